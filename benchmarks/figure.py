"""The rates as a picture: a panel for each workload, and in it a bar for each server."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import NamedTuple

DAEMON, LIMIT = "tcpupperd", "C epoll"
WITHOUT_C = f"{DAEMON} without its C module"
OURS = (DAEMON, WITHOUT_C)

NAME_WIDTH, FIGURE_WIDTH = 250, 820
RATIO_WIDTH = 260  # of 1.00: one length in all panels
TICK = 0.25
BAR_HEIGHT, STEP = 14, 20
TITLE_HEIGHT, AXIS_HEIGHT, PANEL_GAP = 10, 18, 36

# The colours work on white and on dark pages; a picture in a README cannot know which it is on.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #6e7781 }
.title { font-weight: 600; font-size: 13px }
.ours { fill: #2f81f7 } text.ours { font-weight: 600 }
.peer { fill: #8c959f }
.range { stroke: #57606a; stroke-width: 1.5 }
.axis { stroke: #8c959f; stroke-opacity: 0.4 }
.tick { font-size: 11px; text-anchor: middle }
"""

LEGEND = (
    f"Rate relative to {LIMIT}, which is 1.00.",
    "Bar and number: median of all rounds. Whiskers: lowest and highest round.",
)


class Ratios(NamedTuple):
    """Of a server to the limit: the median of all rounds, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.{digits(self)}f}"


#: The ratios by the title of a work and the name of a server.
Panels = Mapping[str, Mapping[str, Ratios]]


def digits(ratios: Iterable[float]) -> int:
    """Digits after the point with which to show ratios."""
    return 2 if min(ratios) >= 0.095 else 3


def draw(panels: Panels) -> str:
    """The picture as SVG."""
    highest = max(one.high for ratios in panels.values() for one in ratios.values())
    ticks = -int(-highest // TICK)
    parts, top = [], 14
    for line in LEGEND:
        parts.append(f'<text x="0" y="{top}">{escape(line)}</text>\n')
        top += 16
    top += 14
    for title, ratios in panels.items():
        parts.append(_panel(title, ratios, ticks, top))
        top += TITLE_HEIGHT + len(ratios) * STEP + AXIS_HEIGHT + PANEL_GAP
    height = top - PANEL_GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{FIGURE_WIDTH}" height="{height}" '
        f'viewBox="0 0 {FIGURE_WIDTH} {height}" role="img">\n'
        f"<title>Rates relative to {LIMIT}</title>\n"
        f"<style>{STYLE}</style>\n{''.join(parts)}</svg>\n"
    )


def _panel(title: str, ratios: Mapping[str, Ratios], ticks: int, top: int) -> str:
    first = top + TITLE_HEIGHT
    parts = [
        f'<text class="title" x="0" y="{top}">{escape(title)}</text>\n',
        _axis(ticks, first, first + len(ratios) * STEP),
    ]
    names = sorted(ratios, key=lambda name: ratios[name].median, reverse=True)
    for row, name in enumerate(names):
        parts.append(_bar(name, ratios[name], ticks, first + row * STEP + 3))
    return "".join(parts)


def _axis(ticks: int, top: int, bottom: int) -> str:
    parts = []
    for tick in range(ticks + 1):
        x = _x(tick * TICK)
        parts.append(
            f'<path class="axis" d="M{x} {top}V{bottom + 3}"/>\n'
            f'<text class="tick" x="{x}" y="{bottom + 15}">{tick * TICK:.2f}</text>\n'
        )
    return "".join(parts)


def _bar(name: str, ratios: Ratios, ticks: int, y: int) -> str:
    kind = "ours" if name in OURS else "peer"
    baseline = y + BAR_HEIGHT - 3
    width = max(ratios.median * RATIO_WIDTH, 1)
    return (
        f'<text class="{kind}" x="{NAME_WIDTH - 8}" y="{baseline}" text-anchor="end">'
        f"{escape(name)}</text>\n"
        f'<rect class="{kind}" x="{NAME_WIDTH}" y="{y}" width="{width:.1f}" '
        f'height="{BAR_HEIGHT}" rx="2"/>\n'
        f"{_whiskers(ratios, y)}"
        f'<text x="{_x(ticks * TICK) + 14}" y="{baseline}">{ratios}</text>\n'
    )


def _whiskers(ratios: Ratios, y: int) -> str:
    if ratios.low == ratios.high:
        return ""
    low, high, middle = _x(ratios.low), _x(ratios.high), y + BAR_HEIGHT // 2
    ends = "".join(f"M{x} {middle - 3}v6" for x in (low, high))
    return f'<path class="range" d="M{low} {middle}H{high}{ends}"/>\n'


def _x(ratio: float) -> float:
    return round(NAME_WIDTH + ratio * RATIO_WIDTH, 1)
