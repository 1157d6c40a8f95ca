"""A load test as one HTML file: figures and plots, nothing to load from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from gradwire.load_test.levels import Level
from gradwire.load_test.results import LATENCIES, Results
from gradwire.load_test.svg_plots import COLOURS, lines, stacked_bars
from gradwire.load_test.tables import number, shown_parts, title
from gradwire.load_test.windows import Window

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #111827 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .6rem; text-align: right }
th { border-bottom: 1px solid #9ca3af; font-weight: 600 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f3f4f6 } .note { color: #b45309; text-align: left }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1rem }
svg { width: 100%; font: 11px system-ui, sans-serif } svg .title { font-size: 13px; font-weight: 600 }
svg .grid { stroke: #e5e7eb } dt { font-weight: 600 } dl { columns: 2 }
"""

_MEANINGS = {
    "req/s": "answers each second in the last three windows, errors not among them",
    "mean, p50 ... max": "from when a request was due (rates) or sent (concurrency) until its answer was there, in ms",
    "unsent": "requests that were due and had waited for too many others when it was over: their latencies are longer",
    "queue": "waiting for requests that came before",
    "transfer": "tensors between frontend and ranks",
    "compute": "forward and backward on the slowest rank",
    "all-reduce": "inside collectives on the slowest rank",
    "other": "the rest of the frontend's time",
    "outside": "network, gRPC and the tester itself",
    "floor": "the same load on a bare gRPC echo of the same sizes",
}


def as_html(results: Results) -> str:
    """The page."""
    options, levels = results.options, results.levels
    subject = ", ".join(options.model_ids) or f"{options.models} × {'-'.join(map(str, options.layers))}"
    facts = {
        "target": results.target + (" (embedded)" if results.is_embedded else ""),
        "started": results.time,
        "method": options.method,
        "models": subject,
        "rows of a batch": options.batch,
        "clients": options.clients,
        "arrivals": options.arrivals if options.is_open_loop else "each after the answer before (closed loop)",
        "windows": f"{options.window:g} s after {options.warm_up:g} s, until three are within {options.stable:.0%}",
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _MEANINGS.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>gradwire load test</title>'
        f"<style>{_STYLE}</style></head><body><h1>Load test of {escape(results.target)}</h1><dl>{items}</dl>"
        f'{_table(levels)}{_errors(levels)}<div class="plots">{"".join(_plots(levels))}</div>'
        f"<h2>What the columns mean</h2><dl>{meanings}</dl></body></html>\n"
    )


def _table(levels: Sequence[Level]) -> str:
    has_floor, parts = any(level.floor for level in levels), shown_parts(levels)
    has_unsent = any(level.measured.unsent for level in levels)
    heads = ["load", "req/s", *LATENCIES, *map(title, parts), "errors", *(["unsent"] if has_unsent else [])]
    heads += ["floor req/s", "ratio"] if has_floor else []
    rows = []
    for level in levels:
        cells = [str(level.load), number(level.rate)]
        cells += [number(level.latencies_ms[name]) for name in LATENCIES]
        cells += [number(level.split_ms.get(part)) for part in parts]
        cells.append(str(level.errors))
        if has_unsent:
            cells.append(str(level.measured.unsent))
        if has_floor:
            cells += [number(level.floor.rate if level.floor else None), number(level.ratio)]
        note = f'<td class="note">{escape(", ".join(level.notes))}</td>'
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}{note}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in [*heads, ""])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _errors(levels: Sequence[Level]) -> str:
    rows = [
        f"<tr><td>{escape(str(level.load))}</td><td>{escape(reason)}</td><td>{count}</td></tr>"
        for level in levels
        for reason, count in level.measured.errors.most_common()
    ]
    head = "<tr><th>load</th><th>error</th><th>times</th></tr>"
    return f"<h2>Errors</h2><table>{head}{''.join(rows)}</table>" if rows else ""


def _plots(levels: Sequence[Level]) -> list[str]:
    """In the order of their loads, whatever that of the sweep was."""
    levels = sorted(levels, key=lambda level: level.load.value)
    if not levels:
        return []
    x = "requests in flight" if not levels[0].load.is_rate else "requests due each second"
    rates = {"service": [(level.load.value, level.rate) for level in levels]}
    if any(level.floor for level in levels):
        rates["bare echo"] = [(level.load.value, level.floor.rate) for level in levels if level.floor]
    latencies = {
        name: [(level.load.value, value) for level in levels if (value := level.latencies_ms[name]) is not None]
        for name in ("p50", "p90", "p95", "p99")
    }
    parts = shown_parts(levels)
    split = {
        f"{level.load.value:g}": {title(part): level.split_ms[part] for part in parts if level.split_ms}
        for level in levels
    }
    return [
        lines("Throughput", rates, x=x, y="requests/s"),
        lines("Latency", latencies, x=x, y="ms"),
        stacked_bars("Where the mean request's time goes", split, x=x, y="ms"),
        _distribution(_few(levels)),
        _over_time(_few(levels)),
    ]


def _few(levels: Sequence[Level]) -> Sequence[Level]:
    """As many as there are colours, spread evenly from the first to the last."""
    most = len(COLOURS)
    if len(levels) <= most:
        return levels
    return [levels[round(index * (len(levels) - 1) / (most - 1))] for index in range(most)]


def _distribution(levels: Sequence[Level]) -> str:
    """Latency by percentile, each nine as wide as the one before."""
    ticks = {0.0: "0", 1.0: "90", 2.0: "99", 3.0: "99.9", 4.0: "99.99"}
    curves = {}
    for level in levels:
        latencies = level.measured.latencies
        # Beyond the last request there is nothing to tell.
        reach = min(4.0, math.log10(latencies.count)) if latencies.count else 0.0
        places = [step / 16 for step in range(int(16 * reach) + 1)]
        found = [(place, latencies.percentile(100 * (1 - 10**-place))) for place in places]
        curves[str(level.load)] = [(place, value / 1000) for place, value in found if value is not None]
    return lines("Latency by percentile", curves, x="percentile", y="ms", x_ticks=ticks)


def _over_time(levels: Sequence[Level]) -> str:
    curves = {str(level.load): list(_rates(level.windows)) for level in levels}
    return lines("Throughput, window by window", curves, x="window", y="requests/s")


def _rates(windows: Sequence[Window]) -> list[tuple[float, float]]:
    return [(float(number), window.rate) for number, window in enumerate(windows, 1)]
