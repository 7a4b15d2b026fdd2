"""Deployment files agree with each other and with the code; nothing here needs Docker."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from scripts.dashboards import replay
from scripts.dashboards.__main__ import main as write_dashboards
from scripts.dashboards.promql import Evaluator, Recording
from server import __version__
from server.config import HttpConfig
from server.config_file import load_config
from server.engine.cost_table import CostTable, Timings
from server.metrics import Metrics, ModelFacts

ROOT = Path(__file__).parents[1]
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))
RULES = ROOT / "docker" / "prometheus" / "rules.yml"
_SAMPLE_SUFFIXES = ("_bucket", "_sum", "_count")


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def services() -> dict[str, Any]:
    found: dict[str, Any] = read_yaml("docker-compose.yml")["services"]
    return found


def all_metrics() -> Metrics:
    """Those of an app with a calibrated engine that measures standard decoding too."""
    metrics = Metrics(load_config(ROOT / "configs" / "default.yaml"))
    metrics.engine.watch(lambda: 0, lambda: 0, lambda: 0.0)
    metrics.engine.watch_models(
        lambda: (0, 0), lambda: (0, 0), [ModelFacts("cpu", "float32", 1, 1, 1)] * 2
    )
    metrics.engine.watch_phase(lambda: "ready")
    metrics.speedup.calibrated(CostTable(Timings((1,), ((1.0,), (1.0,)), (0.0,), (1.0,))))
    metrics.speedup.shadowed()
    metrics.http.observe("/ready", "GET", 200, 0.1)
    return metrics


def described_metrics() -> dict[str, set[str]]:
    """Labels by name, for all of this project's own."""
    found: dict[str, set[str]] = {}
    for family in all_metrics().registry.collect():
        if not family.name.startswith("cos_"):
            continue
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        found[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    return found


def exported_metrics() -> set[str]:
    """Names as they are scraped."""
    described = re.findall(r"^# TYPE (\S+) (\S+)$", all_metrics().render().decode(), re.MULTILINE)
    names = {name for name, kind in described if kind != "histogram"}
    histograms = {name for name, kind in described if kind == "histogram"}
    return names | {name + suffix for name in histograms for suffix in _SAMPLE_SUFFIXES}


def queried_metrics(expression: str) -> set[str]:
    return set(re.findall(r"(?<![\w:])cos_\w+", expression))


def expressions(dashboard: Path) -> Iterator[str]:
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]


def test_images_are_pinned():
    for name, service in services().items():
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), name
    assert f":{__version__}-" in services()["server"]["image"]
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-", dockerfile, re.MULTILINE)


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_compose_files_follow_the_specification(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    compose = PyCompose.from_yaml(text)
    compose.validate()
    compose.to_spec()
    with pytest.raises(ValueError, match="comand"):  # it would say so
        PyCompose.from_yaml(text.replace("  server:", "  server:\n    comand: [x]", 1))


def test_what_services_refer_to_is_there():
    compose = read_yaml("docker-compose.yml")
    for service in services().values():
        named = {source for each in service["volumes"] if "/" not in (source := each.split(":")[0])}
        assert named <= set(compose["volumes"])
        for other, condition in service.get("depends_on", {}).items():
            awaited = "service_started" if other == "server" else "service_healthy"
            assert condition == {"condition": awaited}
            # The server's own check is in its image.
            assert other == "server" or "healthcheck" in services()[other]


def test_services_may_gain_no_privileges():
    for name, service in services().items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_linter_finds_nothing_in_the_dockerfile():
    path = Path(sysconfig.get_path("scripts")) / "hadolint"
    linted = subprocess.run([path, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_ports_are_published_on_loopback_only():
    ports = [port for service in services().values() for port in service["ports"]]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_mounted_files_exist():
    for service in services().values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), source


def test_grace_period_is_longer_than_the_drain():
    grace = int(services()["server"]["stop_grace_period"].removesuffix("s"))
    for path in (ROOT / "configs").glob("*.yaml"):
        assert grace > load_config(path).http.drain_seconds + 5


def test_prometheus_scrapes_the_server():
    [job] = read_yaml("docker/prometheus/prometheus.yml")["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"server:{HttpConfig().port}"]


def test_gpu_override_changes_services_that_exist():
    override = read_yaml("docker-compose.gpu.yml")["services"]
    assert set(override) <= set(services())
    assert override["server"]["build"]["args"]["VARIANT"] == "cuda"


def test_dockerfile_keeps_its_promises():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = dict(
        re.findall(r"^FROM \S+ AS (\S+)$(.*?)(?=^FROM|\Z)", text, re.DOTALL | re.MULTILINE)
    )
    runtime = stages["runtime"]
    assert "USER 10001" in runtime
    assert "/ready" in runtime[runtime.index("HEALTHCHECK") :]
    assert 'ENTRYPOINT ["cos-server", "serve"' in runtime
    # Only what launches kernels on a GPU is compiled where it runs.
    compilers = r"apt-get|gcc|build-essential"
    with_compiler = {name for name, stage in stages.items() if re.search(compilers, stage)}
    assert with_compiler == {"runtime-cuda"}


def test_dockerfile_copies_what_the_context_holds():
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = re.findall(
        r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    assert copied
    for source in " ".join(copied).split():
        assert f"!{source}" in allowed, source
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_queries_only_exported_metrics(path: Path):
    queried = {name for expression in expressions(path) for name in queried_metrics(expression)}
    assert queried
    assert queried <= exported_metrics()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_takes_its_source_and_interval_from_grafana(path: Path):
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    sources = {panel["datasource"]["uid"] for panel in dashboard["panels"] if "targets" in panel}
    assert sources == {"${datasource}"}
    for expression in expressions(path):
        assert "rate(" not in expression or "[$__rate_interval]" in expression
        assert expression.count(" / ") == expression.count(" > 0)")  # no division by nothing


def test_dashboards_are_what_the_script_writes(tmp_path: Path):
    write_dashboards(tmp_path)
    assert [path.name for path in DASHBOARDS] == sorted(path.name for path in tmp_path.iterdir())
    for path in DASHBOARDS:
        assert path.read_text(encoding="utf-8") == (tmp_path / path.name).read_text("utf-8")


def test_panels_do_not_overlap():
    for path in DASHBOARDS:
        panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
        cells = [
            (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
            for panel in panels
            for x in range(panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["h"])
        ]
        assert len(cells) == len(set(cells)), path.name
        assert len({panel["id"] for panel in panels}) == len(panels)


def test_default_source_of_dashboards_is_provisioned():
    [source] = read_yaml("docker/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    for path in DASHBOARDS:
        variables = json.loads(path.read_text(encoding="utf-8"))["templating"]["list"]
        [variable] = [each for each in variables if each["type"] == "datasource"]
        assert variable["current"]["value"] == source["uid"]


@pytest.mark.parametrize("query", list(replay.queries()), ids=lambda query: query.where)
def test_queries_can_be_worked_out(query: replay.Query):
    # Of nothing: that it is PromQL, and of forms that the replay understands.
    Evaluator(Recording((), frozenset()), 0.0).evaluate(query.text)


def test_rules_query_only_exported_metrics_and_each_other():
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        assert queried_metrics(rule["expr"]) <= exported_metrics()
        assert set(re.findall(r"cos:\w+(?::\w+)*", rule["expr"])) <= recorded
