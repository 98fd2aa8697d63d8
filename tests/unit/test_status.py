"""A report as a page for people."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from tcpupperd.serving.metrics import counters
from tcpupperd.serving.report import ListenerReport, Report
from tcpupperd.serving.status import LOST, POLICY, SCRIPT, STYLE, duration, page, problems
from unit import reports
from unit.reports import NASTY, REPORT

#: The counters of a daemon that has lost no connection.
UNHARMED = reports.COUNTERS | dict.fromkeys(LOST, 0)

NO_END = {"meta", "link", "input"}
#: Whose end may be left out (HTML, 13.1.2.4).
END_LEFT_OUT = {"li", "dt", "dd", "tr", "td", "th"}


class Reader(HTMLParser):
    """What is in a page, read as a browser does."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in NO_END | END_LEFT_OUT:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in END_LEFT_OUT:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(report: Report = REPORT) -> Reader:
    return Reader(page(report).text)


def test_page_is_whole() -> None:
    reader = read()
    assert reader.open == []
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page_shows_the_report() -> None:
    text = read().text
    for shown in (
        "on example.org",
        "Version 1.2.3",
        "Uptime 1 day 0 h",
        "Workers 1 of 2 serving",
        "Connections 1,000 limit 20,000, peak 1,234",
        "Clients waiting 7 to be accepted",
        "11 serving 1,000 1,009 12,345 250 ms ago 12 ms 1 day 0 h",
        "12 starting 0 0 0 - 0.0 ms 1.0 ms",
        "127.0.0.1:9999 upper 864,000 10.0 7 4,096",
        "/run/socket metrics - - - -",
        "/etc/tcpupperd/tcpupperd.toml, current , loaded 2026-11-24 21:20:55 UTC",
        "Last reload succeeded , 2026-11-24 21:20:56 UTC",
        "As of 2026-11-25 21:20:54 UTC",
    ):
        assert shown in text


def test_page_shows_every_counter() -> None:
    text = read().text
    shown = [row.name for rows in counters(REPORT).values() for row, _ in rows]
    for field in [*shown, "open"]:
        assert f"{reports.COUNTERS[field]:,}" in text


def test_headings_say_which_counter_of_a_metric_it_is() -> None:
    text = read().text
    for heading in ("Accepted", "Handed over: out", "Workers died: hung", "Refused: proxy absent"):
        assert f" {heading} {reports.COUNTERS['accepted'] // 1000}," in text
    assert f" Idle timeout {reports.COUNTERS['idle_timeout']:,}" in text


def test_page_explains_every_counter() -> None:
    titles = [attributes.get("title") for tag, attributes in read().tags if tag == "tr"]
    for rows in counters(REPORT).values():
        for row, _ in rows:
            assert row.help in titles


def test_page_shows_the_average_rate_of_each_counter() -> None:
    accepted = reports.COUNTERS["accepted"]
    rate = accepted / (REPORT.now - REPORT.began)
    assert f"Accepted {accepted:,} {rate:.1f} " in read().text


def test_page_needs_nothing_from_elsewhere() -> None:
    for tag, attributes in read().tags:
        assert attributes.get("href", "data:,") == "data:,", tag
        assert "src" not in attributes


def test_policy_allows_only_the_style_and_script_of_the_page() -> None:
    text = page(REPORT).text
    for tag, hash_ in (("style", STYLE), ("script", SCRIPT)):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        found = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert hash_ == f"sha256-{found}", f"change {tag.upper()} in status.py"
        assert f"{tag}-src '{hash_}'" in POLICY
    assert POLICY in page(REPORT).fields
    assert not any(name.startswith("on") for _, one in read().tags for name in one)


def test_everything_is_escaped() -> None:
    report = REPORT._replace(
        version=NASTY,
        host=NASTY,
        configuration=NASTY,
        current=False,
        listeners=[ListenerReport(NASTY, NASTY, 1, 1)],
    )
    assert [tag for tag, _ in read(report).tags].count("script") == 1
    assert read(report).text.count(" ".join(NASTY.split())) == 8


def test_heading_of_each_table_and_row_is_known_to_a_screen_reader() -> None:
    tags = read().tags
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    ids = {attributes.get("id") for _, attributes in tags}
    named = [one["aria-labelledby"] for _, one in tags if "aria-labelledby" in one]
    assert named
    assert set(named) <= ids
    assert all("tabindex" in one for _, one in tags if one.get("class") == "scroll")


@pytest.mark.parametrize(
    ("changed", "trouble"),
    [
        ({"last_reload_failed": True}, "The last reload failed"),
        ({"current": False}, "tcpupperd.toml does not match the running configuration"),
        ({"limit": 1000}, "Full: all 1,000 allowed connections are in use; waiting: 7 clients."),
        ({"counters": UNHARMED | {"bug": 2}}, "2 connections lost since the daemon started"),
        ({"limit": 1100}, "Nearly all of the 1,100 allowed connections are in use"),
        (
            {"listeners": [ListenerReport("upper", "[::1]:1", 4000, 4096)]},
            "The queue of [::1]:1 is nearly full",
        ),
        (
            {"workers": [REPORT.workers[0]._replace(since_heartbeat=75.2)]},
            "Worker 11 has not responded for 1 min 15 s",
        ),
    ],
)
def test_trouble_comes_first(changed: dict[str, object], trouble: str) -> None:
    healthy = REPORT._replace(counters=UNHARMED)
    assert list(problems(healthy)) == []
    report = healthy._replace(**changed)  # type: ignore[arg-type]
    (found,) = problems(report)
    assert trouble in found
    text = read(report).text
    assert text.index(trouble) < text.index("Lines answered")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 ms"),
        (0.0004, "0.4 ms"),
        (0.25, "250 ms"),
        (1, "1.0 s"),
        (59.7, "60 s"),
        (61, "1 min 1 s"),
        (3 * 3600 + 59, "3 h 0 min"),
        (86_400, "1 day 0 h"),
        (10 * 86_400 + 7205, "10 days 2 h"),
    ],
)
def test_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text
