"""A report as Prometheus reads it: its text format, version 0.0.4.

Names follow its conventions: base units, `_total` for what only grows, one label to say of which
kind. No client is ever a label: their number has no bound.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from tcpupperd.serving.http import Page
from tcpupperd.serving.report import STATES, Report

#: Exactly this: Prometheus 3 refuses what it does not know.
CONTENT_TYPE = "text/plain; version=0.0.4"


class Counter(NamedTuple):
    """A metric that only grows, from one or more of a report's counters, each with its value of
    the label."""

    name: str
    help: str
    label: str
    fields: Mapping[str, str]


COUNTERS = (
    Counter("lines", "Lines answered.", "", {"": "lines"}),
    Counter("received_bytes", "Bytes received from clients.", "", {"": "received"}),
    Counter("sent_bytes", "Bytes sent to clients.", "", {"": "bytes"}),
    Counter("connections_accepted", "Connections accepted.", "", {"": "accepted"}),
    Counter(
        "connections_closed",
        "Connections ended, by reason.",
        "reason",
        {
            "client_closed": "eof",
            "finished": "finished",
            "service_stopped": "stopped",
            "probe": "probes",
            "reset": "reset",
            "idle_timeout": "idle_timeout",
            "line_timeout": "line_timeout",
            "write_timeout": "write_timeout",
            "drain_timeout": "cut",
            "damaged": "damaged",
            "bug": "errors",
            "worker_died": "lost",
        },
    ),
    Counter(
        "connections_refused",
        "Connections ended before anything was answered, by reason.",
        "reason",
        {
            "source_limit": "refused",
            "proxy_untrusted": "proxy_untrusted",
            "proxy_absent": "proxy_absent",
            "proxy_incomplete": "proxy_incomplete",
            "proxy_invalid": "proxy_invalid",
            "proxy_checksum": "proxy_checksum",
        },
    ),
    Counter(
        "connections_handed_over",
        "Connections that left one process for another, by direction.",
        "direction",
        {"given": "given", "taken": "taken"},
    ),
    Counter(
        "accept_shortages",
        "Times that accepting stopped for lack of room, descriptors or memory.",
        "",
        {"": "shortages"},
    ),
    Counter("turns", "Iterations of the workers' event loops.", "", {"": "turns"}),
    Counter("restarts_survived", "Restarts that live connections survived.", "", {"": "restarts"}),
    Counter("workers_started", "Workers started.", "", {"": "workers_started"}),
    Counter(
        "workers_died",
        "Workers that ended without having been told to, or had to be killed, by reason.",
        "reason",
        {
            "exit": "workers_exited",
            "signal": "workers_signalled",
            "hung": "workers_hung",
            "late": "workers_late",
        },
    ),
    Counter(
        "reloads",
        "Reloads, by result.",
        "result",
        {"success": "reloads", "failure": "reloads_failed"},
    ),
)

#: A metric: name, type, help, and the values with their labels.
Family = tuple[str, str, str, Iterable[tuple[Mapping[str, str], float]]]


def page(report: Report) -> Page:
    """All metrics."""
    return Page(CONTENT_TYPE, "".join(map(_written, (*_counters(report), *_gauges(report)))))


def _counters(report: Report) -> Iterator[Family]:
    for name, text, label, fields in COUNTERS:
        values = [
            ({label: value} if label else {}, report.counters[field])
            for value, field in fields.items()
            if field in report.counters
        ]
        yield f"tcpupperd_{name}_total", "counter", text, values


def _gauges(report: Report) -> Iterator[Family]:
    def gauge(name: str, text: str, value: float | None) -> Family:
        return name, "gauge", text, [] if value is None else [({}, value)]

    python = ".".join(map(str, sys.version_info[:3]))
    build = {"version": report.version, "python": python}
    yield "tcpupperd_build_info", "gauge", "The version, as labels of the value 1.", [(build, 1)]
    yield gauge(
        "process_start_time_seconds", "When the main process began, since 1970.", report.began
    )
    yield gauge("tcpupperd_connections_open", "Connections open now.", report.counters.get("open"))
    yield gauge(
        "tcpupperd_connections_limit",
        "Connections that all workers together may have.",
        report.limit,
    )
    states = [worker.state for worker in report.workers]
    counts = [({"state": state}, float(states.count(state))) for state in STATES]
    yield "tcpupperd_workers", "gauge", "Workers, by state.", counts
    yield from _queues(report)
    yield from _times(report)
    in_force = None if report.in_force is None else float(report.in_force)
    yield gauge(
        "tcpupperd_configuration_in_force", "Whether the file on disk is in force.", in_force
    )
    yield gauge(
        "tcpupperd_configuration_loaded_timestamp_seconds",
        "When the configuration in use came into force, since 1970.",
        report.loaded or None,
    )
    yield gauge(
        "tcpupperd_last_reload_successful",
        "Whether the last reload succeeded, or there was none.",
        float(not report.last_reload_failed),
    )


def _queues(report: Report) -> Iterator[Family]:
    known = [
        ({"listener": one.address, "service": one.service}, one.queue, one.queue_limit)
        for one in report.listeners
        if one.queue is not None and one.queue_limit is not None
    ]
    text = "Connections that wait to be accepted."
    values = [(labels, float(queue)) for labels, queue, _ in known]
    yield "tcpupperd_accept_queue_connections", "gauge", text, values
    text = "Connections that may wait to be accepted; more are dropped."
    limits = [(labels, float(limit)) for labels, _, limit in known]
    yield "tcpupperd_accept_queue_limit", "gauge", text, limits


def _times(report: Report) -> Iterator[Family]:
    """Counters of time and maxima, which are in microseconds in the report."""
    busy = report.counters.get("busy", 0) / 1_000_000
    text = "Time that the workers spent in loop iterations, without waiting."
    yield "tcpupperd_turn_seconds_total", "counter", text, [({}, busy)]
    longest = max((worker.longest_turn for worker in report.workers), default=0.0)
    text = "The longest loop iteration of the workers that run."
    yield "tcpupperd_turn_longest_seconds", "gauge", text, [({}, longest)]
    longest = max((worker.longest_queue for worker in report.workers), default=0.0)
    text = "The longest time that a connection to the workers that run waited to be accepted."
    yield "tcpupperd_accept_queue_longest_seconds", "gauge", text, [({}, longest)]


def _written(family: Family) -> str:
    name, kind, text, values = family
    lines = [f"{name}{_labels(labels)} {_number(value)}\n" for labels, value in values]
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{''.join(lines)}" if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}" if labels else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    """Large ones without an exponent: counters stay exact."""
    return str(int(value)) if value == int(value) else repr(value)
