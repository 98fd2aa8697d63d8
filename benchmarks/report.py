"""Everything that follows from ``results/results.json``: tables, figure, and the numbers in the
documentation.

``python3 -m benchmarks.report`` writes all of it again.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks import figure
from benchmarks.figure import digits
from benchmarks.load import (
    CONNECT,
    LATENCIES,
    LATENCY_ALONE,
    ONE_AT_A_TIME,
    PIPELINED,
    RATES,
    STREAM,
    Work,
)
from benchmarks.results import FILE, Results, Row, spread

TREE = Path(__file__).parents[1]
NOTHING = "-"
DAEMON, WITHOUT_C, LIMIT = figure.DAEMON, figure.WITHOUT_C, figure.LIMIT
STANDARD, UVLOOP = "socketserver threads", "uvloop Protocol"

TIMES = "\N{MULTIPLICATION SIGN}"

#: Bytes of an idle connection in the kernel: socket, inode, file, directory entry, place in epoll.
KERNEL_BYTES = 3789


def files(results: Results) -> dict[Path, str]:
    """All files and their contents."""
    texts = {
        FILE: results.as_json(),
        FILE.with_suffix(".md"): tables(results),
        FILE.with_suffix(".svg"): figure.draw(panels(results)),
    }
    for path, blocks in BLOCKS.items():
        text = (TREE / path).read_text()
        for name, block in blocks.items():
            text = replaced(text, name, block(results))
        texts[TREE / path] = text
    return texts


def replaced(text: str, name: str, content: str) -> str:
    """A document in which the block of this name has another content."""
    begin, end = f"<!-- measured: {name} -->\n", "<!-- end -->\n"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    changed, count = re.subn(pattern, lambda _: f"{begin}\n{content}\n{end}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"{count} blocks named {name!r}")
    return changed


# The tables of results.md


def tables(results: Results) -> str:
    parts = [conditions(results), disturbance(results), summary(results)]
    parts += [details(results, work) for work in RATES]
    parts += [latencies(results), memory(results), measures(results.measures)]
    return "# Measured\n\n" + "\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def conditions(results: Results) -> str:
    said = results.conditions
    return (
        f"The daemon is {said['program']}.\n"
        f"The machine: {said['cpu']}, Linux {said['kernel']}, {said['python']}, "
        f"{said['packages']}.\n"
        f"Server on CPU {said['server_cpu']}, load generator on CPU {said['load_cpu']}. "
        f"Medians of {said['rounds']} interleaved rounds of {said['seconds']} s, lowest..highest "
        "in brackets;\n"
        "ratios are taken within a round. Slow servers took part in every fifth round. Every byte "
        "of every answer was checked.\n"
    )


def disturbance(results: Results) -> str:
    """A warning if other programs were running: otherwise the C server is hardly ever idle."""
    if not results.of(LIMIT, ONE_AT_A_TIME.title):
        return ""
    busy = results.median(LIMIT, ONE_AT_A_TIME.title, "server_busy")
    if busy >= 0.8:
        return ""
    return (
        "**Unreliable:** other programs were running, "
        f"and the C server got only {busy:.0%} of its CPU.\n"
    )


def summary(results: Results) -> str:
    """Each server's rates as shares of the limit's."""
    works = [work for work in RATES if results.of(LIMIT, work.title)]
    head = ["rate relative to the C server", *(work.title for work in works)]
    return table(head, ([server, *_shares(results, server, works)] for server in results.servers))


def _shares(results: Results, server: str, works: Iterable[Work]) -> list[str]:
    ratios = (results.ratios(server, LIMIT, work.title) for work in works)
    return [f"{spread(ratio, digits(ratio))}" if ratio else NOTHING for ratio in ratios]


def details(results: Results, work: Work) -> str:
    head = (
        work.title,
        f"{work.unit}/s",
        "times socketserver",
        "CPU µs each",
        "CPU time relative to C",
        "server CPU busy",
        "load CPU busy",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
    )
    measured = [server for server in results.servers if results.of(server, work.title)]
    return table(head, (_row(results, one, work.title) for one in measured)) if measured else ""


def _row(results: Results, server: str, work: str) -> list[str]:
    def middle(figure: str) -> float:
        return results.median(server, work, figure)

    has_latency = middle("p50_us") > 0  # a stream has no line that is waited for
    latencies = [f"{middle(figure):,.0f}" for figure in ("p50_us", "p99_us", "p999_us")]
    return [
        server,
        f"{middle('rate'):,.0f}",
        _spread_or_nothing(results.ratios(server, STANDARD, work)),
        f"{middle('cpu_us'):.3g}",
        _spread_or_nothing(results.ratios(server, LIMIT, work, "cpu_us")),
        f"{middle('server_busy'):.0%}",
        f"{middle('load_busy'):.0%}",
        *(latencies if has_latency else [NOTHING] * 3),
    ]


def _spread_or_nothing(ratios: list[float], digits: int = 2) -> str:
    return spread(ratios, digits) if ratios else NOTHING


def latencies(results: Results) -> str:
    """The p99 next to other traffic is also given as a ratio: to that alone, and to C's."""
    works = [work for work in LATENCIES if results.of(LIMIT, work.title)]
    others = [work for work in works if work is not LATENCY_ALONE]
    head = (
        "latency of one connection, µs",
        *(f"{share}, {work.title}" for work in works for share in _SHARES),
        *(f"p99 relative to C's, {work.title}" for work in others),
    )
    measured = (s for s in results.servers if all(results.of(s, work.title) for work in works))
    return table(head, (_latency_row(results, one, works, others) for one in measured))


_SHARES = {"p50": "p50_us", "p99": "p99_us", "p99.9": "p999_us"}


def _latency_row(
    results: Results, server: str, works: Iterable[Work], others: Iterable[Work]
) -> list[str]:
    figures = (
        results.median(server, work.title, figure) for work in works for figure in _SHARES.values()
    )
    ratios = (results.ratios(server, LIMIT, work.title, "p99_us") for work in others)
    return [server, *(f"{one:,.0f}" for one in figures), *(spread(one, 1) for one in ratios)]


def memory(results: Results) -> str:
    head = ("one of 10,000 idle connections", "private bytes")
    return table(head, ([server, f"{size:,.0f}"] for server, size in results.memory.items()))


def measures(rows: Iterable[Row]) -> str:
    return table(("other measurements of tcpupperd", "value", "target"), rows)


def panels(results: Results) -> figure.Panels:
    """The ratios for the figure, of each server that could do a workload to the limit."""
    found: dict[str, dict[str, figure.Ratios]] = {}
    for work in RATES:
        ratios = {one: results.ratios(one, LIMIT, work.title) for one in results.servers}
        if any(ratios.values()):
            found[work.title] = {
                name: figure.Ratios(median(values), min(values), max(values))
                for name, values in ratios.items()
                if values
            }
    return found


# The blocks in documents

HEADLINES = (ONE_AT_A_TIME, PIPELINED, STREAM, CONNECT)


def rates(results: Results) -> str:
    """README.md: the rates of the daemon, and what they are compared with."""
    head = ("rate", "relative to C", "relative to uvloop", "to uvloop, without the C module")
    rows = [
        [work.title, *(_middle(results, *pair, work) for pair in _PAIRS)]
        for work in HEADLINES
        if results.of(DAEMON, work.title)
    ]
    return table(head, rows)


_PAIRS = ((DAEMON, LIMIT), (DAEMON, UVLOOP), (WITHOUT_C, UVLOOP))


def _middle(results: Results, server: str, base: str, work: Work) -> str:
    ratios = results.ratios(server, base, work.title)
    return f"{median(ratios):.2f}" if ratios else NOTHING


def costs(results: Results) -> str:
    """docs/scaling.md: what a line, a connection and a worker cost."""
    cpu = {
        f"line of 64 bytes, one at a time{_pure(results, ONE_AT_A_TIME)}": ONE_AT_A_TIME,
        f"line of 64 bytes, 256 pipelined{_pure(results, PIPELINED)}": PIPELINED,
        f"connection with one line, opened and closed{_pure(results, CONNECT)}": CONNECT,
    }
    rows = [[title, f"{_cpu(results, work):.2g} µs", NOTHING] for title, work in cpu.items()]
    idle = results.memory[DAEMON]
    rows += [
        ["idle connection, in the worker", NOTHING, f"{idle:.0f} bytes"],
        [
            "idle connection, in the kernel: socket, inode, file, directory entry, place in epoll",
            NOTHING,
            f"{KERNEL_BYTES:,} bytes",
        ],
        ["worker, of its own", NOTHING, _measure(results, "private memory of a worker")],
    ]
    return table(("for each", "CPU", "memory"), rows)


def _pure(results: Results, work: Work) -> str:
    ratio = median(results.ratios(WITHOUT_C, DAEMON, work.title, "cpu_us"))
    return f" (without the C module, {ratio:.1f} times as much)"


def _cpu(results: Results, work: Work) -> float:
    return results.median(DAEMON, work.title, "cpu_us")


def _measure(results: Results, title: str) -> str:
    return next((value for name, value, _ in results.measures if name == title), NOTHING)


def needs(results: Results) -> str:
    """docs/scaling.md: what a load needs."""
    line, connection = _cpu(results, ONE_AT_A_TIME), _cpu(results, CONNECT)
    each = results.memory[DAEMON] + KERNEL_BYTES
    loads = (
        (1, 1000, "nothing"),
        (10_000, 10_000, "nothing"),
        (
            100_000,
            100_000,
            "`max_connections` (10,000 per worker): raise it, or run more workers",
        ),
        (
            1_000_000,
            1_000_000,
            "`LimitNOFILE=` (524,288): a restart can hand over fifteen sixteenths of that; so"
            " three machines, or instances",
        ),
    )
    rows = [
        [
            f"{open_:,} connection{'s' * (open_ > 1)}, {lines:,} lines per second in total",
            f"{lines * line / 1e6:.2g}",
            f"{open_ * each / 2**20:,.0f} MiB" if open_ > 1 else NOTHING,
            limit,
        ]
        for open_, lines, limit in loads
    ]
    share = 400 / line
    rows.append(
        [
            "100 machines with 8 CPUs, half busy",
            "400",
            NOTHING,
            f"{share:.0f} million lines per second; the balancers in front of them, each of which"
            " does the same work and more for each line",
        ]
    )
    formula = (
        f"- CPUs: `l` {TIMES} {line:.2g} µs + `c` {TIMES} {connection:.2g} µs, if lines arrive one"
        " at a time. Keep half of them free for\n"
        "  restarts, failed servers and the balancer's checks; besides, latency rises as a CPU"
        " fills up.\n"
        f"- Memory: `n` {TIMES} {each / 1024:.1f} KiB, and up to `max_line` for each incomplete"
        " line.\n"
        "- Servers: enough for the others to carry the load of one that is being restarted or has"
        " failed.\n"
    )
    return f"{formula}\n{table(('load', 'CPUs busy', 'memory', 'limited by'), rows)}"


BLOCKS: Mapping[str, Mapping[str, Callable[[Results], str]]] = {
    "README.md": {"rates": rates},
    "docs/scaling.md": {"costs": costs, "needs": needs},
}


def write(contents: Mapping[Path, str]) -> None:
    for path, text in contents.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    write(files(Results.read(FILE.read_text())))
