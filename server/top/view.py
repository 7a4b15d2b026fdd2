"""What `cos-server top` shows: a pure function of two scrapes."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from server.scrape import Scrape

_NONE = "-"  # nothing happened, so there is nothing to say


class Window:
    """What happened between two scrapes."""

    def __init__(self, before: Scrape, after: Scrape) -> None:
        self.after = after
        self.seconds = max(after.moment - before.moment, 1e-9)
        self._before = before

    def grown(self, name: str, **labels: str) -> float:
        """Of a counter; its whole value where the server has been restarted."""
        now, then = self.after.total(name, **labels), self._before.total(name, **labels)
        return now - then if now >= then else now

    def rate(self, name: str, **labels: str) -> float:
        return self.grown(name, **labels) / self.seconds

    def ratio(self, over: str, under: str, **labels: str) -> float | None:
        """None where the denominator has not moved."""
        divisor = self.grown(under, **labels)
        return self.grown(over, **labels) / divisor if divisor > 0 else None


def render(before: Scrape, after: Scrape, url: str) -> RenderableType:
    """The whole screen."""
    window = Window(before, after)
    return Group(_head(after, url), _overview(window), _models(window))


def _head(now: Scrape, url: str) -> Text:
    engine, build = now.info("cos_engine_info"), now.info("cos_build_info")
    text = Text.assemble((engine.get("served_model", "?"), "bold"), f"  {url}  ")
    text.append(_state(now), style="green" if now.total("cos_ready") else "red")
    text.append(
        f"  {engine.get('method', '?')} {engine.get('strategy', '?')}"
        f"  gamma {engine.get('gamma', '?')}  version {build.get('version', '?')}"
    )
    return text


def _state(now: Scrape) -> str:
    if now.total("cos_ready"):
        return "ready"
    return "draining" if now.total("cos_draining") else "not ready"


def _overview(window: Window) -> Table:
    table = Table.grid(padding=(0, 3))
    rows = [
        ("tokens/s", f"{window.rate('cos_generated_tokens_total'):.1f}", *_speedup(window)),
        ("running", _count(window, "cos_requests_running"), "pending before", _mean_tail(window)),
        (
            "waiting",
            _count(window, "cos_requests_waiting"),
            "verified a cycle",
            _number(_verified(window)),
        ),
        ("prompt tokens/s", f"{window.rate('cos_prompt_tokens_total'):.1f}", *_gamma(window)),
        (
            "first token",
            _seconds(_mean(window, "cos_time_to_first_token_seconds")),
            "between tokens",
            _seconds(_mean(window, "cos_inter_token_seconds")),
        ),
        (
            "errors/s",
            f"{window.rate('cos_requests_finished_total', reason='error'):.1f}",
            "refused/s",
            f"{window.rate('cos_requests_rejected_total'):.1f}",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _speedup(window: Window) -> tuple[str, str]:
    estimated = "cos_baseline_estimated_seconds_total"
    if estimated not in window.after:
        return "speedup", "not calibrated"
    ratio = window.ratio(estimated, "cos_decode_seconds_total")
    shown = _NONE if ratio is None else f"{ratio:.2f}x"
    return "estimated speedup", f"[red]{shown}[/red]" if ratio is not None and ratio < 1 else shown


def _gamma(window: Window) -> tuple[str, str]:
    return "gamma of new texts", _number(_mean(window, "cos_spec_gamma"))


def _mean_tail(window: Window) -> str:
    return _number(_mean(window, "cos_spec_tail_tokens"))


def _verified(window: Window) -> float | None:
    """Tokens that one verification of one sequence ended in."""
    cycles = window.grown("cos_spec_tail_tokens_count")
    accepted = window.grown("cos_spec_accepted_tokens_total")
    recovered = window.grown("cos_spec_recovered_tokens_total")
    return (accepted + recovered) / cycles if cycles > 0 else None


def _models(window: Window) -> Table:
    table = Table("model", "busy", "proposed/s", "accepted", "KV pages", "KV memory", box=None)
    for name in window.after.values("cos_kv_pages", "model"):
        accepted = window.ratio(
            "cos_spec_accepted_tokens_per_position_total",
            "cos_spec_verified_tokens_per_position_total",
            proposer=name,
        )
        used = window.after.total("cos_kv_pages_used", model=name)
        pages = window.after.total("cos_kv_pages", model=name)
        used_bytes = window.after.total("cos_kv_used_bytes", model=name)
        limit_bytes = window.after.total("cos_kv_limit_bytes", model=name)
        table.add_row(
            name,
            f"{window.rate('cos_model_forward_seconds_total', model=name):.0%}",
            f"{window.rate('cos_spec_draft_tokens_total', proposer=name):.1f}",
            _NONE if accepted is None else f"{accepted:.0%}",
            f"{used:.0f} of {pages:.0f}",
            f"{used_bytes / 2**20:.0f} of {limit_bytes / 2**20:.0f} MiB",
        )
    return table


def _mean(window: Window, histogram: str) -> float | None:
    return window.ratio(f"{histogram}_sum", f"{histogram}_count")


def _count(window: Window, gauge: str) -> str:
    return f"{window.after.total(gauge):.0f}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
