"""A real Prometheus, set up by contrib/, scrapes a real daemon."""

import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from integration.daemon import ROOT, Daemon
from tools import need
from waiting import DEADLINE, until

CONTRIB = ROOT / "contrib"

FAST = "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 200ms}\n"


class Prometheus:
    """What it says over HTTP."""

    def __init__(self, address: str) -> None:
        self._address = address

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples that an expression finds now."""
        url = f"http://{self._address}/api/v1/query?{urlencode({'query': expression})}"
        try:
            with urlopen(url, timeout=DEADLINE) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return found
        except (ConnectionError, URLError):  # it has not started yet
            return []

    def firing(self) -> set[str]:
        """The alerts that fire."""
        found = self.query('ALERTS{alertstate="firing"}')
        return {sample["metric"]["alertname"] for sample in found}


@contextmanager
def scraping(target: str, directory: Path) -> Iterator[Prometheus]:
    """A context in which a Prometheus scrapes by the files in contrib/, only faster."""
    rules = directory / "alerts.yml"
    without_delay = re.sub(r"^ +for: .*\n", "", (CONTRIB / "alerts.yml").read_text(), flags=re.M)
    rules.write_text(without_delay)
    configuration = (CONTRIB / "scrape.yml").read_text()
    configuration = configuration.replace("localhost:9998", target)
    configuration = configuration.replace("/etc/prometheus/tcpupperd-alerts.yml", str(rules))
    (directory / "prometheus.yml").write_text(FAST + configuration)
    with socket.create_server(("127.0.0.2", 0)) as free:  # no other test's clients are there
        address = f"127.0.0.2:{free.getsockname()[1]}"
    command = (
        need("prometheus"),
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address={address}",
    )
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield Prometheus(address)
        finally:
            process.kill()


def expressions() -> list[str]:
    """Every query of the dashboard, with its variables filled in."""
    dashboard = json.loads((CONTRIB / "grafana.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    found = [one["expr"] for one in (*targets, *dashboard["annotations"]["list"])]
    return [re.sub(r"\$__\w+", "1m", one.replace("$instance", ".*")) for one in found]


def test_dashboard_finds_something_and_an_alert_fires_and_ends(tmp_path: Path) -> None:
    listen = ["127.0.0.1:0", "metrics=127.0.0.1:0"]
    with Daemon(listen=listen) as daemon:
        assert daemon.connect().ask(b"hello") == b"HELLO"
        with scraping(daemon.address_of("metrics"), tmp_path) as prometheus:
            until(lambda: prometheus.query('up{job="tcpupperd"} == 1'))
            daemon.reload()  # which an annotation of the dashboard shows
            for expression in expressions():
                until(partial(prometheus.query, expression))
            until(lambda: prometheus.firing() == set())  # none for a scrape that was late

            daemon.configure("nonsense = 1\n")
            daemon.send_signal(signal.SIGHUP)
            expected = {"TcpupperdReloadFailed", "TcpupperdConfigurationNotCurrent"}
            until(lambda: prometheus.firing() == expected)
            daemon.reload()
            until(lambda: prometheus.firing() == set())

            daemon.reload(listen=listen[:1])  # no listener for metrics
            until(lambda: prometheus.firing() == {"TcpupperdDown"})


def test_alerts_fire_when_they_should() -> None:
    promtool = need("promtool")
    for words in (("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")):
        done = subprocess.run(
            [promtool, *words],
            cwd=CONTRIB,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    rules = (CONTRIB / "alerts.yml").read_text()
    names = re.findall(r"- alert: (\w+)\n", rules)
    assert names
    tested = (CONTRIB / "alerts_test.yml").read_text()
    assert all(f'alertname="{name}"' in tested for name in names)
    assert rules.count("summary:") == rules.count("action:") == len(names)
