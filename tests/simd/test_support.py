"""Where kernels are not to be run, the reason is said and nothing is compiled."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator

import pytest

from server.simd import support

numba = pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    support.missing.cache_clear()
    yield
    support.missing.cache_clear()


def test_a_processor_without_fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """There each of them would be a call of the C library."""
    binding = importlib.import_module("llvmlite.binding")
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"fma": False, "sse4.2": True})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert support.missing() == "this processor has no fused multiply-add"


@pytest.mark.parametrize("name", ["CPU_NAME", "CPU_FEATURES"])
def test_numba_compiles_for_another_processor(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(numba.config, name, "generic")
    assert f"NUMBA_{name}" in (support.missing() or "")


@pytest.mark.parametrize("error", [ImportError("numpy"), OSError("no object"), AttributeError("x")])
def test_numba_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    assert support.missing() == f"Numba cannot be imported ({error})"
