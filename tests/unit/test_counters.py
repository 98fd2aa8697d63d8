"""The table of counters, and the manual's."""

import re
from pathlib import Path

import pytest

from tcpupperd.serving import counters
from tcpupperd.serving.counters import BUG, DAEMON, ENDS, PROXY_ABSENT, WORKER, Row, reason

ROWS = [*WORKER.rows, *DAEMON.rows]
ROOT = Path(__file__).parents[2]
MAN_PAGE = ROOT / "data/man/tcpupperd.8"
NEWS = ROOT / "NEWS.md"

#: Numbers of the log whose metrics are no counters, or are in another unit.
OTHERS = {"open": "connections_open", "loop_microseconds": "loop_seconds_total"}


@pytest.mark.parametrize("table", [WORKER, DAEMON], ids=["worker", "daemon"])
def test_constant_of_each_number_is_its_position(table: counters.Table) -> None:
    for position, name in enumerate(table.names):
        assert getattr(counters, name.upper()) == position


def test_names_in_the_log_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)


def test_reason_is_the_word_of_the_metric() -> None:
    assert (reason(BUG), reason(PROXY_ABSENT)) == ("bug", "proxy absent")


def test_manual_lists_every_counter_with_its_metric() -> None:
    rows = {row.name: (sample(row), row.help) for row in ROWS if row.metric}
    found = dict(manual())
    for name, metric in OTHERS.items():
        assert found.pop(name)[0] == f"tcpupperd_{metric}"
    assert found == rows


def test_news_lists_the_counters_whose_names_changed() -> None:
    """A script that reads those of 0.1.0 needs no more than this table."""
    first = "open accepted taken given lines bytes refused reset idle_timeout line_timeout"
    first += " write_timeout cut damaged errors shortages"
    table = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(.*)` \|$", NEWS.read_text(), re.MULTILINE)
    names = {row.name: row for row in ROWS}
    assert {old for old, _, _ in table} == set(first.split()) - names.keys()
    assert all(sample(names[new]) == metric for _, new, metric in table)


def sample(row: Row) -> str:
    """The name and the label of a counter in the text format."""
    assert row.metric
    name = f"tcpupperd_{row.metric.name}_total"
    return f'{name}{{{row.metric.label}="{row.value}"}}' if row.value else name


def manual() -> list[tuple[str, tuple[str, str]]]:
    """For each counter of the manual its metric and its text. In a list of reasons, the text
    before the list names the metric."""
    found = []
    _, _, section = MAN_PAGE.read_text().partition(".Sh COUNTERS\n")
    for part in re.split(r"^\.Pp\n", section.partition(".Sh ")[0], flags=re.MULTILINE):
        before, *items = re.split(r"^\.It ", part, flags=re.MULTILINE)
        metrics = re.findall(r"^\.Li (tcpupperd_\w+)", before, re.MULTILINE)
        for item in items:
            head, text = item.partition("\n.El")[0].split("\n", 1)
            name, _, metric = head.removeprefix("Cm ").partition(" , Li ")
            found.append((name, (metric or f'{metrics[0]}{{reason="{name}"}}', plain(text))))
    return found


def plain(mdoc: str) -> str:
    """The text without macros."""
    words = re.sub(r"^\.Pq (.*?)( \.)?$", r"(\1)\2", mdoc, flags=re.MULTILINE)
    words = re.sub(r"^\.|\b(Cm|No) ", "", words, flags=re.MULTILINE)
    return re.sub(r" ([,.])", r"\1", " ".join(words.split()))


def test_every_counter_has_an_explanation() -> None:
    assert all(row.help for row in ROWS if row.metric)
    assert {row.metric.label for row in ROWS if row.metric in ENDS} == {"reason"}
