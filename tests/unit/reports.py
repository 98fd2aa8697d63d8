"""Reports, for tests of those who show them."""

from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.serving.report import ListenerReport, Report, WorkerReport

#: All counters that a report of the daemon has, each with another value.
COUNTERS = {
    name: 1000 + number
    for number, name in enumerate(Scoreboard(1).totals() | Scoreboard(1).events())
}

NASTY = "<script>alert('1\")</script>&amp;\\\n"

REPORT = Report(
    version="1.2.3",
    host="example.org",
    now=1_795_641_654.5,
    began=1_795_555_254.25,
    listeners=[
        ListenerReport("upper", "127.0.0.1:9999", 7, 4096, 0, 864_000),
        ListenerReport("metrics", "/run/socket", None, None, 1, None),
    ],
    workers=[
        WorkerReport(11, "serving", 1_000, 1_009, 12_345, 86_400, 0.25, 0.0125, 1.5),
        WorkerReport(12, "starting", 0, 0, 0, 0.001, None, 0.0, 0.0),
    ],
    counters=COUNTERS,
    limit=20_000,
    peak=1_234,
    configuration="/etc/tcpupperd/tcpupperd.toml",
    loaded=1_795_555_255.5,
    current=True,
    last_reload=1_795_555_256.5,
)
