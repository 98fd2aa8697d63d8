"""What a scraper sees of a real daemon."""

import contextlib
from email.message import Message
from http.client import BadStatusLine, HTTPConnection

from prometheus_client.parser import text_string_to_metric_families

from integration.client import endpoint
from integration.daemon import Daemon
from waiting import DEADLINE

#: Addresses of the service, and of its metrics.
LISTEN = ["127.0.0.1:0", "metrics=127.0.0.1:0"]


def get(address: str, path: str = "/metrics") -> tuple[int, Message, str]:
    """Status, header and body of the answer to a GET, as Python's own client understands it; the
    status is 0 if it is not HTTP."""
    with contextlib.closing(HTTPConnection(*endpoint(address), timeout=DEADLINE)) as connection:
        connection.request("GET", path)
        try:
            answer = connection.getresponse()
        except BadStatusLine:
            return 0, Message(), ""
        return answer.status, answer.headers, answer.read().decode()


def scrape(daemon: Daemon) -> str:
    """The metrics as text."""
    status, header, text = get(daemon.address_of("metrics"))
    assert (status, header["Content-Type"]) == (200, "text/plain; version=0.0.4")
    return text


def value(daemon: Daemon, name: str, **labels: str) -> float:
    """One value, as Prometheus' own parser finds it."""
    (found,) = (
        sample.value
        for family in text_string_to_metric_families(scrape(daemon))
        for sample in family.samples
        if (sample.name, sample.labels) == (name, labels)
    )
    return float(found)
