"""The manifests for Kubernetes: the pod's arguments are those of a daemon, and its probes are sent
as the kubelet sends them."""

import signal
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from integration.daemon import Daemon
from integration.processes import stopped
from integration.scraper import get
from waiting import until

MANIFEST = Path(__file__).parents[2] / "examples/kubernetes/tcpupperd.yaml"

#: What an idle connection takes in the worker and in the kernel, rounded up.
PER_CONNECTION = 5 * 1024


def documents() -> dict[str, Any]:
    """The manifests, by kind."""
    return {one["kind"]: one for one in YAML(typ="safe").load_all(MANIFEST.read_text())}


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = documents()["Deployment"]["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    [one] = pod()["containers"]
    assert isinstance(one, dict)
    return one


def arguments() -> dict[str, str]:
    """The last value of each option of the daemon."""
    return dict(word.removeprefix("--").split("=", 1) for word in container()["args"])


def probe(daemon: Daemon, name: str) -> bool:
    """Whether a probe succeeds; its port is that of the metrics."""
    action = container()[name]["httpGet"]
    assert action["port"] == "metrics"
    status, _, _ = get(daemon.address_of("metrics"), action["path"])
    return 200 <= status < 400


def test_arguments_are_valid_and_the_ports_are_those_of_the_listeners() -> None:
    status, log = Daemon("--check", *container()["args"]).run()
    assert status == 0, log
    listen = [word.removeprefix("--listen=") for word in container()["args"] if "listen" in word]
    ports = {one["name"]: one["containerPort"] for one in container()["ports"]}
    assert listen == [f"{ports['upper']}", f"metrics={ports['metrics']}"]


def test_pod_that_is_full_or_leaving_is_not_ready_but_alive() -> None:
    listen = ["127.0.0.1:0", "metrics=127.0.0.1:0"]
    delay = 3600.0
    with Daemon(listen=listen, workers=1, max_connections=1, shutdown_delay=delay) as daemon:
        assert probe(daemon, "readinessProbe")
        client = daemon.connect()
        assert client.ask(b"hello") == b"HELLO"
        assert not probe(daemon, "readinessProbe")
        assert probe(daemon, "livenessProbe")
        client.close()
        until(lambda: probe(daemon, "readinessProbe"))
        daemon.send_signal(signal.SIGTERM)
        until(lambda: not probe(daemon, "readinessProbe"))
        assert probe(daemon, "livenessProbe")
        assert daemon.connect().ask(b"late") == b"LATE"


def test_pod_whose_workers_are_stopped_is_neither_ready_nor_alive() -> None:
    with Daemon(listen=["127.0.0.1:0", "metrics=127.0.0.1:0"], workers=2) as daemon:
        where = daemon.address_of("metrics")
        with stopped(*daemon.workers()):
            asking = daemon.connect(where)
            asking.send(b"GET /ready HTTP/1.0\r\n\r\n")
            asking.socket.settimeout(0.5)
            try:
                answered = bool(asking.socket.recv(1))
            except TimeoutError:
                answered = False
            assert not answered


def test_memory_is_enough_for_incomplete_lines_on_all_connections() -> None:
    options = arguments()
    connections = int(options["workers"]) * int(options["max-connections"])
    needed = connections * (int(options["max-line"]) + PER_CONNECTION)
    limit = container()["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("Mi")) * 2**20 >= needed


def test_grace_period_covers_the_delay_and_the_drain() -> None:
    drain_timeout = 10
    delay = int(arguments()["shutdown-delay"])
    assert pod()["terminationGracePeriodSeconds"] > delay + drain_timeout
    # An unready pod is noticed before the delay is over.
    readiness = container()["readinessProbe"]
    assert readiness["periodSeconds"] < delay


def test_pods_are_spread_and_drained_one_at_a_time() -> None:
    labels = documents()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for one in pod()["topologySpreadConstraints"]:
        assert one["labelSelector"]["matchLabels"] == labels
    budget = documents()["PodDisruptionBudget"]["spec"]
    assert (budget["maxUnavailable"], budget["selector"]["matchLabels"]) == (1, labels)
