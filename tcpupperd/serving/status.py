"""The report as a self-contained HTML page."""

from __future__ import annotations

import os
import string
import time
from collections.abc import Iterator

from tcpupperd.serving.counters import CLOSED, ENDS, Row
from tcpupperd.serving.health import is_silent
from tcpupperd.serving.http import Page
from tcpupperd.serving.metrics import counters
from tcpupperd.serving.report import ListenerReport, Report, WorkerReport
from tcpupperd.words import counted

#: Fraction of a limit above which a warning is shown.
NEARLY_FULL = 0.9

#: The counters of connections that the daemon lost.
LOST = ("worker_died", "state_unreadable", "bug")

#: The hashes of the page's style and script; a browser will run no other.
STYLE = "sha256-q/x6GgrDbhh4eYP0ASwE8QBNxTxBIQiVO6lc4Ch3hJI="
SCRIPT = "sha256-Gm3+AHN8JzPaSB+Jlc5QSfNR1K9y6APmbPJPIt7IYFU="

POLICY = (
    f"Content-Security-Policy: default-src 'none'; style-src '{STYLE}'; script-src '{SCRIPT}';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)

with open(os.path.join(os.path.dirname(__file__), "status.html.in"), encoding="utf-8") as _file:
    _TEMPLATE = string.Template(_file.read())


def page(report: Report) -> Page:
    """The whole page."""
    text = _TEMPLATE.substitute(
        host=escaped(report.host),
        trouble="".join(f"<li>{escaped(text)}" for text in problems(report)),
        figures=_figures(report),
        facts=_facts(report),
        workers="".join(map(_worker, report.workers)),
        listeners="".join(_listener(one, report) for one in report.listeners),
        totals=_counters(report, ends=False),
        reasons=_counters(report, ends=True),
        seconds=f"{report.now:.3f}",
        now=f"As of {_moment(report.now)}; totals since the daemon started",
    )
    return Page("text/html; charset=utf-8", text, (POLICY, "Referrer-Policy: no-referrer"))


def problems(report: Report) -> Iterator[str]:
    """Problems that need the administrator's attention."""
    if report.leaving:
        yield "The service is about to stop; load balancers should send new clients elsewhere."
    if report.last_reload_failed:
        yield "The last reload failed; the log says why."
    if report.current is False:
        yield (
            f"{report.configuration} does not match the running configuration: it was changed, is"
            " invalid or is missing."
        )
    for worker in report.workers:
        if worker.since_heartbeat and is_silent(worker):
            silence = duration(worker.since_heartbeat)
            yield f"Worker {worker.pid} has not responded for {silence}."
    for one in report.listeners:
        if one.queue and one.queue_limit and one.queue > NEARLY_FULL * one.queue_limit:
            yield f"The queue of {one.address} is nearly full."
    yield from _fullness(report)
    if lost := sum(report.counters.get(name, 0) for name in LOST):
        yield f"{counted(lost, 'connection')} lost since the daemon started; the log says why."


def _fullness(report: Report) -> Iterator[str]:
    count = report.clients
    if report.limit and count >= report.limit:
        waiting = counted(report.waiting, "client")
        yield f"Full: all {report.limit:,} allowed connections are in use; waiting: {waiting}."
    elif report.limit and count > NEARLY_FULL * report.limit:
        yield f"Nearly all of the {report.limit:,} allowed connections are in use."


def duration(seconds: float) -> str:
    """A duration in words, with at most two units."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{counted(hours // 24, 'day')} {hours % 24} h"


def escaped(text: str) -> str:
    """Text for HTML, including attribute values."""
    for character, name in (("&", "amp"), ("<", "lt"), (">", "gt"), ('"', "quot"), ("'", "#39")):
        text = text.replace(character, f"&{name};")
    return text


def _figures(report: Report) -> str:
    counters = report.counters
    serving = sum(worker.state == "serving" for worker in report.workers)
    limit = f"limit {report.limit:,}, " if report.limit else ""
    figures = (
        ("Connections", f"{counters.get('open', 0):,}", f"{limit}peak {report.peak:,}"),
        ("Clients waiting", f"{report.waiting:,}", "to be accepted"),
        ("Lines answered", f"{counters.get('lines', 0):,}", ""),
        ("Workers", f"{serving} of {len(report.workers)}", "serving"),
        ("Uptime", duration(report.now - report.began), ""),
    )
    return "".join(
        f"<div><dt>{name}<dd>{value} <small>{more}</small></div>" for name, value, more in figures
    )


def _facts(report: Report) -> str:
    facts = [("Version", escaped(report.version)), ("Started", _moment(report.began))]
    if report.configuration:
        facts.append(("Configuration", _configuration(report)))
    facts.append(("Last reload", _last_reload(report)))
    return "".join(f"<dt>{name}<dd>{value}" for name, value in facts)


def _configuration(report: Report) -> str:
    path = escaped(report.configuration)
    if not report.current:
        return f'{path}, <span class="bad">not current</span>'
    return f'{path}, <span class="good">current</span>, loaded {_moment(report.loaded)}'


def _last_reload(report: Report) -> str:
    if not report.last_reload:
        return "none since the daemon started"
    outcome = (
        '<span class="bad">failed</span>'
        if report.last_reload_failed
        else '<span class="good">succeeded</span>'
    )
    return f"{outcome}, {_moment(report.last_reload)}"


def _worker(worker: WorkerReport) -> str:
    return _row(
        str(worker.pid),
        worker.state,
        f"{worker.connections:,}",
        f"{worker.most_connections:,}",
        f"{worker.lines:,}",
        "-" if worker.since_heartbeat is None else f"{duration(worker.since_heartbeat)} ago",
        duration(worker.longest_iteration),
        duration(worker.age),
        numbers=6,
    )


def _listener(listener: ListenerReport, report: Report) -> str:
    address, service = escaped(listener.address), escaped(listener.service)
    accepted = _count(f"listener-{listener.number}", listener.accepted, report)
    queue, limit = _known(listener.queue), _known(listener.queue_limit)
    return (
        f'<tr><th scope="row">{address}<td>{service}{accepted}'
        f'<td class="number">{queue}<td class="number">{limit}'
    )


def _counters(report: Report, *, ends: bool) -> str:
    """The rows of the counters that say why connections ended, or of all others."""
    return "".join(
        _counter(row, count, report)
        for metric, rows in counters(report).items()
        if (metric in ENDS) is ends
        for row, count in rows
    )


def _counter(row: Row, count: int, report: Report) -> str:
    zero = "" if count else ' class="zero"'
    heading = f'<tr{zero} title="{escaped(row.help)}"><th scope="row">{_heading(row)}'
    return heading + _count(row.name, count, report)


def _count(name: str, count: int | None, report: Report) -> str:
    """Cells with a count and its average rate; the script replaces it with the current rate."""
    if count is None:
        return '<td class="number">-' * 2
    rate = count / max(1, report.now - report.began)
    return (
        f'<td class="number" id="{name}" data-count="{count}">{count:,}'
        f'<td class="number">{rate:,.1f}'
    )


def _heading(row: Row) -> str:
    """The heading of a counter: its metric in words, and which of its counters this is. The table
    of ends is of the connections that were closed, except where the heading says more."""
    assert row.metric
    name = row.metric.name.removeprefix("connections_")
    words = row.value if row.metric is CLOSED else f"{name}: {row.value}" if row.value else name
    return words.replace("_", " ").capitalize()


def _row(*cells: str, numbers: int) -> str:
    """A table row whose last `numbers` cells are numbers."""
    first, *rest = map(escaped, cells)
    words = len(rest) - numbers
    row = "".join(f"<td>{cell}" for cell in rest[:words])
    row += "".join(f'<td class="number">{cell}' for cell in rest[words:])
    return f'<tr><th scope="row">{first}{row}'


def _known(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _moment(when: float) -> str:
    """A point in time."""
    text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when))
    return f'<time datetime="{text.replace(" ", "T")}Z">{text} UTC</time>'
