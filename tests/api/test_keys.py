"""API keys: how they are read, and who a header belongs to."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from server.api.keys import load_keys
from server.config import HttpConfig
from server.errors import ConfigError

ALICE = "alice-0123456789abcdef"
BOB = "bob-0123456789abcdef+/="


def write(path: Path, text: str) -> HttpConfig:
    file = path / "keys"
    file.write_text(text, encoding="utf-8")
    return HttpConfig(keys_file=str(file))


def test_a_file_and_the_environment_add_up(tmp_path: Path) -> None:
    http = write(tmp_path, f"# ours\n\nalice: {ALICE}\n".replace(": ", ":"))
    keys = load_keys(http, {"COS_API_KEYS": f"{BOB}, ops:{BOB}x\n"})
    assert keys.names == {"alice", "key-1", "ops"}
    assert keys.name_of(f"Bearer {ALICE}") == "alice"
    assert keys.name_of(f"bearer  {BOB} ") == "key-1"
    assert keys.name_of(f"Bearer {BOB}x") == "ops"


def test_nameless_keys_of_two_sources_are_told_apart(tmp_path: Path) -> None:
    http = write(tmp_path, f"{ALICE}\n")
    keys = load_keys(http, {"COS_API_KEYS": BOB})
    assert keys.names == {"key-1", "key-2"}
    assert keys.name_of(f"Bearer {ALICE}") == "key-1"
    assert keys.name_of(f"Bearer {BOB}") == "key-2"


def test_several_keys_may_share_a_name() -> None:
    keys = load_keys(HttpConfig(), {"COS_API_KEYS": f"a:{ALICE},a:{BOB}"})
    assert keys.names == {"a"}
    assert keys.name_of(f"Bearer {ALICE}") == keys.name_of(f"Bearer {BOB}") == "a"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}",
     f"Bearer alice:{ALICE}", "Bearer \udcff\xe9"],
)  # fmt: skip
def test_nothing_else_is_a_key(header: str) -> None:
    keys = load_keys(HttpConfig(), {"COS_API_KEYS": f"alice:{ALICE}"})
    assert keys.name_of(header) is None


def test_no_source_means_no_keys() -> None:
    assert not load_keys(HttpConfig(), {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "short",
        f"{ALICE}\nwith space 0123456789",
        f"bad/name:{ALICE}",
        f"a:b:{ALICE}",
        f"{ALICE}\u00e9",
        f"{ALICE}\nalice:{ALICE}",
    ],
)
def test_a_malformed_source_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_keys(write(tmp_path, text), {})
    assert "keys" in str(raised.value)
    assert "0123456789" not in str(raised.value)
    with pytest.raises(ConfigError, match="COS_API_KEYS"):
        load_keys(HttpConfig(), {"COS_API_KEYS": text})


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_keys(HttpConfig(keys_file=str(tmp_path / "none")), {})


def test_only_digests_are_kept() -> None:
    keys = load_keys(HttpConfig(), {"COS_API_KEYS": f"alice:{ALICE}"})
    keys.name_of(f"Bearer {ALICE}")
    held = repr(gc.get_referents(*gc.get_referents(keys)))
    assert "alice" in held
    assert ALICE not in held
