"""Write the Grafana dashboards: python -m scripts.dashboards.

Every panel states its unit and what it means; a ratio divides sums and shows nothing, rather than
NaN, where there is no traffic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.dashboards.panel import Dashboard, Panel
from scripts.dashboards.panels import DASHBOARDS

FOLDER = Path(__file__).parents[2] / "docker" / "grafana" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


def render(dashboard: Dashboard) -> dict[str, Any]:
    """Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows:
        panels.append(_row(len(panels) + 1, title, y))
        y += 1
        for index, panel in enumerate(row):
            x = index % _COLUMNS * _WIDTH
            panels.append(_graph(len(panels) + 1, panel, x, y + index // _COLUMNS * _HEIGHT))
        y += -(-len(row) // _COLUMNS) * _HEIGHT
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["cos-server"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [_LINK],
        "templating": {"list": _VARIABLES},
        "annotations": {"list": []},
        "panels": panels,
    }


_LINK = {
    "type": "dashboards",
    "title": "cos-server",
    "tags": ["cos-server"],
    "asDropdown": False,
    "keepTime": True,
    "includeVars": True,
}
_JOBS = "label_values(cos_generated_tokens_total, job)"
_VARIABLES = [
    {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "label": "Data source",
        "current": {"text": "Prometheus", "value": "cos-prometheus"},
    },
    {
        "name": "job",
        "type": "query",
        "label": "Job",
        "datasource": SOURCE,
        "query": {"query": _JOBS, "refId": "job"},
        "definition": _JOBS,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    },
]


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": 24, "x": 0, "y": y}
    head = {"id": number, "type": "row", "title": title}
    return {**head, "collapsed": False, "gridPos": place, "panels": []}


def _graph(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
            }
            for index, (legend, expression) in enumerate(panel.queries)
        ],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {
        "lineWidth": 1,
        "fillOpacity": 20 if panel.is_stacked else 8,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
    }
    defaults: dict[str, Any] = {"unit": panel.unit, "noValue": "no traffic", "custom": custom}
    if not any(expression.startswith("-") for _, expression in panel.queries):
        defaults["min"] = 0
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.thresholds:
        steps = [{"value": value, "color": color} for value, color in panel.thresholds]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        custom["thresholdsStyle"] = {"mode": "line+area"}
    return defaults


def main(folder: Path = FOLDER, dashboards: Sequence[Dashboard] = DASHBOARDS) -> int:
    for dashboard in dashboards:
        path = folder / f"{dashboard.uid.removeprefix('cos-')}.json"
        path.write_text(json.dumps(render(dashboard), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
