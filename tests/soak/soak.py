"""The soak: a load above saturation, every finished text compared with its request's alone."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import httpx

from server.bench.machine import describe_machine, describe_versions, git_hash
from tests.soak.client import Corrupt, Texts, finish, leave, refuse
from tests.soak.server import Server
from tests.soak.workload import Job, make_pool
from tests.support.live_server import wait_until

_DISCONNECTS, _INVALID = 0.20, 0.05
_MEMORY_SECONDS = 2.0
_RETRY_SECONDS = 0.05
_WARM_UP = 0.25  # of the time; memory is compared after it


@dataclass
class Findings:
    """What happened.

    Attributes:
        counts: requests by what became of them.
        problems: descriptions of lost, corrupted or wrongly refused requests.
        memory: (seconds since the start, resident bytes of the server).
        probes: seconds that probes took, by path.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    probes: dict[str, list[float]] = field(default_factory=dict)


def soak(
    server: Server, *, seconds: float, num_clients: int, pool_size: int, seed: int = 0
) -> dict[str, Any]:
    """Run the load; returns its figures, in which `problems` must be empty."""
    pool = make_pool(pool_size, random.Random(seed))
    findings = Findings()
    starting = _answers(server)
    started = time.monotonic()
    alone = asyncio.run(_all_alone(server.url, pool))
    reference_seconds = time.monotonic() - started
    with _probing(server.url, findings):
        asyncio.run(_load(server, pool, alone, findings, seconds, num_clients, seed))
    wait_until(lambda: _num_held(server) == 0, 60)
    return {
        "machine": {**describe_machine(), "load_average": os.getloadavg()},
        "versions": describe_versions(),
        "commit": git_hash(),
        "seconds": seconds,
        "clients": num_clients,
        "distinct_requests": pool_size,
        "reference_seconds": round(reference_seconds, 1),
        "requests": dict(findings.counts),
        "problems": findings.problems,
        "memory": _memory(findings.memory, seconds),
        "probes": {path: _quantiles(times) for path, times in findings.probes.items()},
        **_server_figures(server, starting),
    }


async def _all_alone(url: str, pool: Sequence[Job]) -> list[Texts]:
    """Each request with nothing beside it."""
    found = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for job in pool:
            texts = await finish(http, job, is_stream=False)
            assert texts is not None
            found.append(texts)
    return found


async def _load(
    server: Server,
    pool: Sequence[Job],
    alone: Sequence[Texts],
    findings: Findings,
    seconds: float,
    num_clients: int,
    seed: int,
) -> None:
    started = time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients)

    async def client(index: int) -> None:
        rng = random.Random(f"{seed} {index}")
        # Plain HTTP: reading certificates for each of them would take the load its first seconds.
        async with httpx.AsyncClient(
            base_url=server.url, timeout=300, limits=limits, verify=False
        ) as http:
            while time.monotonic() - started < seconds:
                await _one(http, pool, alone, findings, rng)

    async def watch_memory() -> None:
        while (now := time.monotonic() - started) < seconds:
            findings.memory.append((now, server.resident_bytes()))
            await asyncio.sleep(_MEMORY_SECONDS)

    await asyncio.gather(watch_memory(), *(client(index) for index in range(num_clients)))


async def _one(
    http: httpx.AsyncClient,
    pool: Sequence[Job],
    alone: Sequence[Texts],
    findings: Findings,
    rng: random.Random,
) -> None:
    index, kind = rng.randrange(len(pool)), rng.random()
    try:
        if kind < _INVALID:
            await refuse(http, rng)
            findings.counts["invalid, refused"] += 1
        elif kind < _INVALID + _DISCONNECTS:
            await leave(http, pool[index], rng)
            findings.counts["left by the client"] += 1
        else:
            texts = await finish(http, pool[index], is_stream=rng.random() < 0.6)
            if texts is None:
                findings.counts["429"] += 1
                await asyncio.sleep(_RETRY_SECONDS)
            elif texts == alone[index]:
                findings.counts["finished, as alone"] += 1
            else:
                findings.counts["finished, otherwise"] += 1
                raise Corrupt(f"{pool[index].body}: {texts} is not {alone[index]}")
    except (Corrupt, httpx.HTTPError) as error:
        findings.counts["problems"] += 1
        if len(findings.problems) < 20:
            findings.problems.append(f"{type(error).__name__}: {error}")


@contextmanager
def _probing(url: str, findings: Findings) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.soak.probe", url]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as probe:
        try:
            yield
            findings.probes.update(json.loads(probe.communicate()[0]))
        finally:
            # By its input's end it stops its own child too.
            with suppress(subprocess.TimeoutExpired, ValueError):
                probe.communicate(timeout=10)
            probe.kill()


def _num_held(server: Server) -> float:
    """Pages that sequences hold, and sequences that are still somewhere."""
    scrape = server.scrape()
    names = ("cos_kv_pages_used", "cos_sequences_running", "cos_sequences_waiting")
    return sum(scrape.total(name) for name in names)


def _memory(samples: Sequence[tuple[float, int]], seconds: float) -> dict[str, Any]:
    """Growth from the first tenth after the warm-up to the last tenth."""
    warm = [size for now, size in samples if now >= _WARM_UP * seconds] or [samples[-1][1]]
    tenth = max(1, len(warm) // 10)
    first, last = mean(warm[:tenth]), mean(warm[-tenth:])
    return {
        "resident_mib_after_warm_up": round(first / 2**20, 1),
        "resident_mib_at_the_end": round(last / 2**20, 1),
        "growth": round(last / first - 1, 4),
    }


def _quantiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)

    def at(share: float) -> float:
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    return {"count": len(ordered), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1)}


def _answers(server: Server) -> Counter[tuple[str, str]]:
    """HTTP requests by route and status since the server's start."""
    answers: Counter[tuple[str, str]] = Counter()
    for labels, count in server.scrape().samples.get("cos_http_requests_total", {}).items():
        by_name = dict(labels)
        answers[by_name["route"], by_name["status"]] += int(count)
    return answers


def _server_figures(server: Server, starting: Counter[tuple[str, str]]) -> dict[str, Any]:
    """The server's own, those of requests without what it answered before it was ready."""
    scrape = server.scrape()
    log = server.log.read_text(encoding="utf-8", errors="replace")
    answers = _answers(server) - starting
    return {
        "answers_before_the_load": _named(starting),
        "answers": _named(answers),
        "http_5xx": sum(count for (_, status), count in answers.items() if status[0] == "5"),
        "engine_faults": scrape.total("cos_engine_faults_total"),
        "preemptions": scrape.total("cos_preemptions_total"),
        "generated_tokens": scrape.total("cos_generated_tokens_total"),
        "pages_used_at_the_end": scrape.total("cos_kv_pages_used"),
        "tracebacks_in_the_log": log.count("Traceback"),
    }


def _named(answers: Counter[tuple[str, str]]) -> dict[str, int]:
    return {f"{route} {status}": count for (route, status), count in sorted(answers.items())}
