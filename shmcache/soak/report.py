"""The report of a run: text, a page with plots, and the samples as JSON."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from html import escape
from importlib import metadata
from statistics import median
from typing import TYPE_CHECKING, Any

import shmcache
from shmcache.soak.charts import charts
from shmcache.soak.plot import STYLE, clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache.soak.record import Record
    from shmcache.soak.verdict import Judgement

MIB = 1 << 20


def machine() -> dict[str, str]:
    """The machine and the versions with which it ran."""
    versions = {"psutil": metadata.version("psutil")}
    for package in ("gunicorn", "msgpack", "xxhash"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    return {
        "cpu": _cpu(),
        "cpus": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "shmcache": shmcache.__version__,
        "compiled": "yes" if shmcache.compiled else "no",
    } | versions


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def summary(record: Record) -> dict[str, Any]:
    """The figures of a run, under names for people."""
    figures: dict[str, Any] = {
        "seconds": round(record.seconds, 1),
        "samples": len(record.samples),
        "kills": record.count("kill"),
        "recycled": record.count("recycle"),
        "checks": record.checks,
        "workers that were met": len(
            {(w.pid, w.started) for s in record.samples for w in s.workers}
        ),
        "median USS of a worker, MiB": _middle(record, lambda s: s.uss),
        "median PSS of a worker, MiB": _middle(record, lambda s: s.pss),
        "median RSS of a worker, MiB": _middle(record, lambda s: s.rss),
    }
    for name, cache in record.final.items():
        figures[f"{name}: stored"] = cache.sets
        figures[f"{name}: lookups"] = cache.hits + cache.misses
        figures[f"{name}: evicted for room"] = cache.evicted
        figures[f"{name}: expired"] = cache.expired
        figures[f"{name}: recoveries from dead holders"] = cache.recoveries
        if name == "handles":
            figures["handles: opened"] = cache.opened
            figures["handles: closed by their owner"] = cache.closed
            figures["handles: died with a killed owner"] = record.died
    return figures


def _middle(record: Record, of: Callable[[Any], int]) -> float:
    warm = [s for s in record.samples if s.t >= record.options.warm_up]
    values = [of(w) for s in warm for w in s.workers]
    return round(median(values) / MIB, 2) if values else 0.0


def conclusion(record: Record) -> str:
    """The result of a run in one sentence."""
    if record.leaks:
        grown = ", ".join(j.quantity for j in record.leaks)
        return f"It leaks: {grown}."
    if record.findings:
        count = len(record.findings)
        what = "1 thing does" if count == 1 else f"{count} things do"
        return f"{what} not add up; see below."
    if not any(j.judged for j in record.judgements if "worker" in j.quantity):
        return "Everything adds up; no worker lived long enough to be judged."
    return "Flat, and everything adds up."


def text(record: Record) -> str:
    """The report for a terminal."""
    options = record.options
    head = f"profile {options.profile}, {options.server}, {options.workers} workers"
    if options.pid is not None:
        head = f"watching {options.pid}"
    early = ", stopped early" if record.stopped_by else ""
    lines = [
        f"soak: {head}, {record.seconds:.0f} s{early}; warm-up {options.warm_up:g} s",
        *(f"  {name}: {_shown(value)}" for name, value in summary(record).items()),
        *(j.line() for j in record.judgements),
        *(f"BROKEN      {finding}" for finding in record.findings),
        conclusion(record),
    ]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def figures(record: Record) -> dict[str, Any]:
    """The report for programs; ``json.dumps`` accepts it."""
    return {
        "options": record.options.as_dict(),
        "machine": machine(),
        "began": record.began,
        "summary": summary(record),
        "conclusion": conclusion(record),
        "judgements": [
            asdict(j) | {"verdict": j.word, "leak": j.leak} for j in record.judgements
        ],
        "findings": record.findings,
        "marks": record.marks,
        "final": {name: asdict(cache) for name, cache in record.final.items()},
        "samples": [asdict(sample) for sample in record.samples],
    }


# --- the page -------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>soak: {conclusion}</title>
<style>
:root{{color-scheme:light dark}}
body{{font:15px/1.5 system-ui,sans-serif;max-width:1600px;margin:2em auto;
padding:0 1.2em;color:#1f2933;background:#fff}}
h1{{font-size:1.5em;margin-bottom:0}} h2{{font-size:1.15em;margin-top:1.6em}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));
gap:1.2em 1.6em}}
svg{{width:100%;height:auto}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
th,td{{padding:.2em .9em .2em 0;text-align:right;border-bottom:1px solid #e4e7eb}}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){{text-align:left}}
th{{font-weight:600}} .scroll{{overflow-x:auto}}
.good{{color:#047857}} .bad{{color:#b91c1c;font-weight:600}} .dim{{color:#7b8794}}
@media(prefers-color-scheme:dark){{
body{{color:#e4e7eb;background:#1b222b}} th,td{{border-color:#323f4b}}
.good{{color:#34d399}} .bad{{color:#f87171}}}}
{style}
</style>
<h1 class="{mood}">{conclusion}</h1>
<p class="dim">{what}</p>
{findings}
<h2>Verdict</h2>
<div class="scroll">{verdict}</div>
<h2>Plots</h2>
<p class="dim">The grey part is the warm-up, which is not judged. The marks above the
plots are killed and recycled workers. Memory is without the shared segments.</p>
<div class="plots">{plots}</div>
<h2>Figures</h2>
<div class="scroll">{summary}</div>
<h2>Machine</h2>
<div class="scroll">{machine}</div>
</html>
"""


def page(record: Record) -> str:
    """The report as one HTML file, which loads nothing from elsewhere."""
    findings = "".join(f"<li>{escape(finding)}</li>" for finding in record.findings)
    return _PAGE.format(
        style=STYLE,
        conclusion=escape(conclusion(record)),
        mood="bad" if record.leaks or record.findings else "good",
        what=escape(_what(record)),
        findings=f'<ul class="bad">{findings}</ul>' if findings else "",
        verdict=_verdict(record),
        plots="".join(f"<div>{p.svg()}</div>" for p in charts(record).values()),
        summary=_table(summary(record)),
        machine=_table(machine()),
    )


def _what(record: Record) -> str:
    options = record.options
    if options.pid is not None:
        return f"Watched process {options.pid} for {clock(record.seconds)}."
    parts = [
        f"Profile {options.profile}, {options.server}, {options.workers} workers",
        f"{options.rate:g} operations a second",
        "keys from a trace" if options.trace else "keys by Zipf's law",
        f"seed {options.seed}",
    ]
    for what, every in (
        ("killed", options.kill_every),
        ("recycled", options.recycle_every),
    ):
        if every:
            parts.append(f"a worker {what} every {every:g} s")
    return ", ".join(parts) + f"; ran {clock(record.seconds)}."


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(_shown(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


_COLUMNS = (
    *("quantity", "verdict", "median", "per hour", "window", "growth", "tolerance"),
    *("later half", "trend", "series"),
)


def _verdict(record: Record) -> str:
    rows = ["".join(f"<th>{cell}</th>" for cell in _COLUMNS)]
    for j in record.judgements:
        mood = "dim" if not j.judged else "bad" if j.leak else "good"
        cells = [
            f"<td>{escape(j.quantity)}</td>",
            f'<td class="{mood}">{j.word}</td>',
        ]
        if j.judged:
            cells += _cells(j)
        rows.append("".join(cells))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _cells(j: Judgement) -> list[str]:
    unit = f" {j.unit}" if j.unit else ""
    return [
        f"<td>{j.level:,.1f}{unit}</td>",
        f"<td>{j.slope:+,.1f}{unit}</td>",
        f"<td>{clock(j.window)}</td>",
        f"<td>{j.growth:+,.1f}{unit}</td>",
        f"<td>{j.tolerance:g}{unit}</td>",
        f"<td>{j.late:+,.1f}{unit}</td>",
        f"<td>{j.trend:+.2f}</td>",
        f"<td>{j.series}</td>",
    ]
