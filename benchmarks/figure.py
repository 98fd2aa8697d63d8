"""The rates as a picture: a panel for each work, a bar for each server, the limit's as 100 %."""

from collections.abc import Sequence
from html import escape
from statistics import median

from benchmarks.load import RATES, Work
from benchmarks.rounds import Rounds
from benchmarks.servers import DAEMON, LIMIT, WITHOUT_C, Server

NAME_WIDTH, BAR_WIDTH, FIGURE_WIDTH = 210, 380, 780
BAR_HEIGHT, STEP, PANEL_GAP = 14, 20, 46

# The colours hold on white and on dark pages; a README's picture cannot know which it is on.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #6e7781 }
.title { font-weight: 600; font-size: 13px }
.ours { fill: #2f81f7 } text.ours { font-weight: 600 }
.peer { fill: #8c959f }
.range { stroke: #57606a; stroke-width: 1.5 }
"""


def draw(results: Rounds, servers: Sequence[Server]) -> str:
    parts, top = [], 24
    for work in RATES:
        measured = [server for server in servers if results.ratios(server, LIMIT, work)]
        parts.append(_panel(results, measured, work, top))
        top += len(measured) * STEP + PANEL_GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{FIGURE_WIDTH}" height="{top - 24}" '
        f'viewBox="0 0 {FIGURE_WIDTH} {top - 24}" role="img">\n'
        "<title>Rates as shares of what a C epoll server does</title>\n"
        f"<style>{STYLE}</style>\n{''.join(parts)}</svg>\n"
    )


def _panel(results: Rounds, servers: Sequence[Server], work: Work, top: int) -> str:
    def share(server: Server) -> float:
        return median(results.ratios(server, LIMIT, work))

    title = f"{work.title}: {work.unit} a second, C epoll = 100 %"
    parts = [f'<text class="title" x="0" y="{top}">{escape(title)}</text>\n']
    scale = BAR_WIDTH / max(max(results.ratios(server, LIMIT, work)) for server in servers)
    for row, server in enumerate(sorted(servers, key=share, reverse=True)):
        ratios = results.ratios(server, LIMIT, work)
        rate = results.median(server, work, "rate")
        parts.append(_bar(server, ratios, scale, rate, top + 10 + row * STEP))
    return "".join(parts)


def _bar(server: Server, ratios: Sequence[float], scale: float, rate: float, y: int) -> str:
    share, low, high = (scale * of(ratios) for of in (median, min, max))
    kind = "ours" if server in (DAEMON, WITHOUT_C) else "peer"
    baseline, middle = y + BAR_HEIGHT - 3, y + BAR_HEIGHT / 2
    label = f"{median(ratios):.1%} · {rate:,.0f}/s"
    return (
        f'<text class="{kind}" x="{NAME_WIDTH - 8}" y="{baseline}" text-anchor="end">'
        f"{escape(server.name)}</text>\n"
        f'<rect class="{kind}" x="{NAME_WIDTH}" y="{y}" width="{max(share, 1):.1f}" '
        f'height="{BAR_HEIGHT}" rx="2"/>\n'
        f'<path class="range" d="M{NAME_WIDTH + low:.1f} {middle}H{NAME_WIDTH + high:.1f}"/>\n'
        f'<text x="{NAME_WIDTH + BAR_WIDTH + 8}" y="{baseline}">{label}</text>\n'
    )
