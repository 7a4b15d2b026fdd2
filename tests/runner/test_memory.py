from pathlib import Path

import pytest
import torch

from server.config import EngineConfig
from server.errors import ConfigError
from server.runner import cgroup
from server.runner.memory import KvNeed, ScoreNeed, free_bytes, left_by_scores, num_pages

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def engine(**settings):
    return EngineConfig(page_size=16, **settings)


def test_auto_takes_no_more_than_all_sequences_need():
    needs = [KvNeed(CPU, 100)]
    assert num_pages(needs, engine(max_sequences=4), 160, {CPU: 1 << 40}) == 1 + 4 * 10


def test_auto_takes_half_of_free_ram():
    needs = [KvNeed(CPU, 100), KvNeed(CPU, 300)]
    pages = num_pages(needs, engine(max_sequences=4096), 160, {CPU: 16 * 400 * 2000})
    assert pages == 1000


def test_explicit_size_is_split_by_bytes_per_token():
    needs = [KvNeed(CPU, 1024), KvNeed(CPU, 3 * 1024)]
    pages = num_pages(needs, engine(kv_memory="64MiB", max_sequences=4096), 160, {CPU: 1 << 30})
    assert pages * 16 * 4 * 1024 == 64 << 20


def test_the_fullest_device_decides():
    needs = [KvNeed(CPU, 100), KvNeed(GPU, 100)]
    free = {CPU: 1 << 40, GPU: 16 * 100 * 1000}
    assert num_pages(needs, engine(max_sequences=4096), 160, free) == 800


def test_too_little_names_needed_available_and_settings():
    with pytest.raises(ConfigError) as caught:
        num_pages([KvNeed(CPU, 1 << 20)], engine(kv_memory="100MiB"), 160, {CPU: 1 << 30})
    assert str(caught.value) == (
        "KV memory of one sequence of 160 tokens is 176 MiB, available are 100 MiB "
        "(engine.kv_memory: 100MiB); lower engine.max_length or raise engine.kv_memory"
    )


def test_the_least_is_one_sequence_and_page_0():
    needs = [KvNeed(CPU, 1 << 20)]
    assert num_pages(needs, engine(kv_memory="176MiB"), 160, {CPU: 1 << 30}) == 11
    with pytest.raises(ConfigError, match="available are 160 MiB"):
        num_pages(needs, engine(kv_memory="160MiB"), 160, {CPU: 1 << 30})


def test_more_than_free_is_refused():
    with pytest.raises(ConfigError, match="2,048 MiB on cpu, 1,024 MiB are free besides scores"):
        num_pages(
            [KvNeed(CPU, 1 << 20)],
            engine(kv_memory="2GiB", max_sequences=4096),
            160,
            {CPU: 1 << 30},
        )


def test_this_machine_has_memory():
    assert free_bytes(CPU) > 1 << 20


def test_linux_counts_in_kilobytes(monkeypatch):
    lines = "MemTotal:  16384 kB\nMemFree:  1024 kB\nMemAvailable:  2048 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: lines)
    monkeypatch.setattr(cgroup, "free_bytes", lambda: None)
    assert free_bytes(CPU) == 2 << 20


def test_scores_come_first():
    needs = [ScoreNeed(CPU, 1000), ScoreNeed(GPU, 1000), ScoreNeed(GPU, 2000)]
    left = left_by_scores(needs, 10, {CPU: 1 << 20, GPU: 1 << 20})
    assert left == {CPU: (1 << 20) - 10_000, GPU: (1 << 20) - 30_000}


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"scores of 2048 positions need 2 MiB on cpu, 1 MiB are"):
        left_by_scores([ScoreNeed(CPU, 1024)], 2048, {CPU: 1 << 20})
    with pytest.raises(ConfigError, match="1 MiB are free"):
        left_by_scores([ScoreNeed(CPU, 1024)], 1024, {CPU: 1 << 20})


def test_a_container_has_less_than_its_machine(monkeypatch):
    monkeypatch.setattr(cgroup, "free_bytes", lambda: 12345)
    assert free_bytes(CPU) == 12345
    monkeypatch.setattr(cgroup, "free_bytes", lambda: 1 << 62)
    assert free_bytes(CPU) < 1 << 62
