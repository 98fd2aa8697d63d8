"""A report in the text format of Prometheus."""

import re
from pathlib import Path

from tcpupperd.serving.metrics import counters, page
from tcpupperd.serving.report import ListenerReport
from unit import reports
from unit.reports import NASTY, REPORT

#: Of the counters of a report, what is no counter of Prometheus: it also falls.
GAUGES = {"open"}

#: What is not in base units there.
TIMES = {"loop_microseconds"}


def values() -> dict[str, float]:
    """All samples of the page, by name and labels."""
    rows = (line.rpartition(" ") for line in page(REPORT).text.splitlines() if line[0] != "#")
    return {sample: float(value) for sample, _, value in rows}


def test_type_is_exactly_that_of_the_text_format() -> None:
    assert page(REPORT).content_type == "text/plain; version=0.0.4"


def test_every_counter_is_in_one_metric() -> None:
    names = [row.name for rows in counters(REPORT).values() for row, _ in rows]
    assert sorted(names) == sorted(reports.COUNTERS.keys() - GAUGES - TIMES)
    found = values()
    for metric, rows in counters(REPORT).items():
        for row, count in rows:
            labels = f'{{{metric.label}="{row.value}"}}' if metric.label else ""
            assert found[f"tcpupperd_{metric.name}_total{labels}"] == count
            assert reports.COUNTERS[row.name] == count


def test_gauges_are_those_of_the_report() -> None:
    found = values()
    queue = '{listener="127.0.0.1:9999",service="upper"}'
    assert found["tcpupperd_connections_open"] == reports.COUNTERS["open"]
    assert found["tcpupperd_connections_limit"] == 20_000
    assert found["tcpupperd_connections_open_peak"] == 1_234
    assert found["process_start_time_seconds"] == REPORT.began
    assert found['tcpupperd_workers{state="serving"}'] == 1
    assert found['tcpupperd_workers{state="exiting"}'] == 0
    assert found['tcpupperd_workers{state="leaving"}'] == 0
    assert found["tcpupperd_ready"] == 1
    assert found[f"tcpupperd_listener_accepted_total{queue}"] == 864_000
    assert found[f"tcpupperd_accept_queue_connections{queue}"] == 7
    assert found[f"tcpupperd_accept_queue_limit{queue}"] == 4096
    assert found["tcpupperd_configuration_current"] == 1
    assert found["tcpupperd_configuration_loaded_timestamp_seconds"] == REPORT.loaded
    assert found["tcpupperd_last_reload_successful"] == 1
    assert (
        found["tcpupperd_loop_seconds_total"] == reports.COUNTERS["loop_microseconds"] / 1_000_000
    )
    assert found["tcpupperd_loop_longest_seconds"] == 0.0125
    assert found["tcpupperd_accept_queue_longest_seconds"] == 1.5
    assert any(re.match(r'tcpupperd_build_info\{version="1.2.3",', name) for name in found)


def test_every_metric_has_help_and_a_type_once_before_its_values() -> None:
    seen: list[str] = []
    for line in page(REPORT).text.splitlines():
        found = re.match(r"# (HELP|TYPE) (\S+) \S", line)
        if found:
            assert found[0] not in seen
            seen += [found[0]] if found[1] == "HELP" else [found[2]]
        else:
            assert line.split("{")[0].split()[0] == seen[-1]


def test_unknown_values_are_omitted() -> None:
    text = page(REPORT._replace(current=None, loaded=0, listeners=[])).text
    for name in ("configuration_current", "loaded", "accept_queue_connections"):
        assert name not in text


def test_large_counter_is_exact() -> None:
    text = page(REPORT._replace(counters={"lines": 2**53 - 1})).text
    assert f"\ntcpupperd_lines_total {2**53 - 1}\n" in text


def test_label_is_escaped() -> None:
    listener = ListenerReport("upper", NASTY, 0, 1)
    text = page(REPORT._replace(listeners=[listener])).text
    assert r"""{listener="<script>alert('1\")</script>&amp;\\\n",service="upper"} 0""" in text


def test_no_alert_waits_for_a_counter_that_only_a_stop_changes() -> None:
    """While the daemon stops, no scrape is answered, and the next process counts from 0."""
    text = (Path(__file__).parents[2] / "contrib/alerts.yml").read_text()
    assert "state_unreadable" in text
    assert not re.search("drain_timeout|service_stopped", text)
