"""The report in the text format of Prometheus, version 0.0.4.

Names follow the conventions of Prometheus: base units, `_total` for counters, one label to
distinguish kinds. A client is never a label value, because the number of clients is unbounded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping

from tcpupperd.serving.counters import DAEMON, WORKER, Metric, Row
from tcpupperd.serving.health import obstacle
from tcpupperd.serving.http import Page
from tcpupperd.serving.report import STATES, Report

#: This exact text is required: Prometheus 3 rejects content types that it does not know.
CONTENT_TYPE = "text/plain; version=0.0.4"


#: A metric: name, type, help, and the values with their labels.
MetricFamily = tuple[str, str, str, Iterable[tuple[Mapping[str, str], float]]]


def page(report: Report) -> Page:
    """All metrics."""
    return Page(CONTENT_TYPE, "".join(map(_format, (*_counters(report), *_gauges(report)))))


def counters(report: Report) -> dict[Metric, list[tuple[Row, int]]]:
    """The counters of a report, by metric."""
    found: dict[Metric, list[tuple[Row, int]]] = {}
    for row in (*WORKER.rows, *DAEMON.rows):
        if row.metric and row.name in report.counters:
            found.setdefault(row.metric, []).append((row, report.counters[row.name]))
    return found


def _counters(report: Report) -> Iterator[MetricFamily]:
    for metric, rows in counters(report).items():
        values = [
            ({metric.label: row.value} if metric.label else {}, count) for row, count in rows
        ]
        yield f"tcpupperd_{metric.name}_total", "counter", metric.help, values


def _gauges(report: Report) -> Iterator[MetricFamily]:
    yield from _process(report)
    yield from _capacity(report)
    yield from _listeners(report)
    yield from _queues(report)
    yield from _times(report)
    yield from _configuration(report)


def _gauge(name: str, text: str, value: float | None) -> MetricFamily:
    return name, "gauge", text, [] if value is None else [({}, value)]


def _process(report: Report) -> Iterator[MetricFamily]:
    python = ".".join(map(str, sys.version_info[:3]))
    build = {"version": report.version, "python": python}
    text = (
        "A metric with the constant value 1, labelled with the versions of tcpupperd and Python."
    )
    yield "tcpupperd_build_info", "gauge", text, [(build, 1)]
    text = "Start time of the main process since the Unix epoch in seconds."
    yield _gauge("process_start_time_seconds", text, report.began)


def _capacity(report: Report) -> Iterator[MetricFamily]:
    text = (
        "Whether new clients are welcome: 0 while about to stop, full, or without a live worker."
    )
    yield _gauge("tcpupperd_ready", text, not obstacle(report))
    text = "Open connections."
    yield _gauge("tcpupperd_connections_open", text, report.counters.get("open"))
    text = "Maximum number of open connections for all workers together."
    yield _gauge("tcpupperd_connections_limit", text, report.limit)
    text = "Largest number of connections open at the same time since the main process started."
    yield _gauge("tcpupperd_connections_open_peak", text, report.peak)
    states = [worker.state for worker in report.workers]
    counts = [({"state": state}, float(states.count(state))) for state in STATES]
    yield "tcpupperd_workers", "gauge", "Workers, by state.", counts


def _configuration(report: Report) -> Iterator[MetricFamily]:
    text = "Whether the running configuration matches the file on disk."
    yield _gauge("tcpupperd_configuration_current", text, report.current)
    text = "Time at which the running configuration was loaded, in seconds since the Unix epoch."
    name = "tcpupperd_configuration_loaded_timestamp_seconds"
    yield _gauge(name, text, report.loaded or None)
    text = "Whether the last reload succeeded (1 if there has been none)."
    yield _gauge("tcpupperd_last_reload_successful", text, not report.last_reload_failed)


def _listeners(report: Report) -> Iterator[MetricFamily]:
    known = [
        ({"listener": one.address, "service": one.service}, float(one.accepted))
        for one in report.listeners
        if one.accepted is not None
    ]
    text = "Connections accepted, by listener, including those that were refused afterwards."
    yield "tcpupperd_listener_accepted_total", "counter", text, known


def _queues(report: Report) -> Iterator[MetricFamily]:
    known = [
        ({"listener": one.address, "service": one.service}, one.queue, one.queue_limit)
        for one in report.listeners
        if one.queue is not None and one.queue_limit is not None
    ]
    text = "Connections waiting to be accepted."
    values = [(labels, float(queue)) for labels, queue, _ in known]
    yield "tcpupperd_accept_queue_connections", "gauge", text, values
    text = (
        "Maximum number of connections waiting to be accepted; beyond it, the kernel drops them."
    )
    limits = [(labels, float(limit)) for labels, _, limit in known]
    yield "tcpupperd_accept_queue_limit", "gauge", text, limits


def _times(report: Report) -> Iterator[MetricFamily]:
    """Times and maxima; the report has the counter of time in microseconds."""
    seconds = report.counters.get("loop_microseconds", 0) / 1_000_000
    text = "Time spent by workers in event loop iterations, excluding time spent waiting."
    yield "tcpupperd_loop_seconds_total", "counter", text, [({}, seconds)]
    longest = max((worker.longest_iteration for worker in report.workers), default=0.0)
    text = "Longest event loop iteration of any running worker."
    yield "tcpupperd_loop_longest_seconds", "gauge", text, [({}, longest)]
    longest = max((worker.longest_queue for worker in report.workers), default=0.0)
    text = "Longest time that a connection waited before a running worker accepted it."
    yield "tcpupperd_accept_queue_longest_seconds", "gauge", text, [({}, longest)]


def _format(family: MetricFamily) -> str:
    name, kind, text, values = family
    lines = [f"{name}{_labels(labels)} {_number(value)}\n" for labels, value in values]
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{''.join(lines)}" if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}" if labels else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    """Large numbers without an exponent, so that counters stay exact."""
    return str(int(value)) if value == int(value) else repr(value)
