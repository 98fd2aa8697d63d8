"""The events, the catalog and the manual say the same."""

import re
import subprocess
from pathlib import Path

from tcpupperd.events import DOCUMENTATION, Event
from tcpupperd.serving.counters import ENDS, PROXY_UNTRUSTED, RESET, WORKER, reason
from tcpupperd.settings import INTRODUCED
from tools import need

ROOT = Path(__file__).parents[2]
CATALOG = ROOT / "data/catalog/tcpupperd.catalog"
MAN_PAGE = (ROOT / "data/man/tcpupperd.8").read_text()
JOURNAL = MAN_PAGE.partition(".Sh JOURNAL\n")[2].partition("\n.Sh ")[0]


def catalog() -> dict[str, tuple[dict[str, str], str]]:
    """For each identifier the headers and the text."""
    found = {}
    for part in re.split(r"^-- ", CATALOG.read_text(), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n\n")
        message_id, *lines = head.splitlines()
        found[message_id] = (dict(line.split(": ", 1) for line in lines), text)
    return found


def used_fields() -> set[str]:
    """Our fields that the code sets."""
    texts = (path.read_text() for path in (ROOT / "tcpupperd").rglob("*.py"))
    introduced = {f"TCPUPPERD_{name.upper()}" for name in INTRODUCED}
    return introduced | set(re.findall(r"TCPUPPERD_[A-Z_]+(?==|\")", "\n".join(texts))) - {
        "TCPUPPERD_PURE_PYTHON",
        "TCPUPPERD_SOCKET_UNIT",
    }


def test_every_event_has_an_identifier_of_its_own() -> None:
    identifiers = [event.message_id for event in Event]
    assert len(set(identifiers)) == len(identifiers)
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in identifiers)


def test_catalog_explains_every_event_and_no_other() -> None:
    found = {message_id: headers["Subject"] for message_id, (headers, _) in catalog().items()}
    assert found == {event.message_id: event.title for event in Event}


def test_catalog_names_only_pages_and_fields_that_exist() -> None:
    for headers, text in catalog().values():
        page, section = re.fullmatch(r"man:([\w.]+)\((\d)\)", headers["Documentation"]).groups()  # type: ignore[union-attr]
        assert (ROOT / f"data/man/{page}.{section}").exists()
        assert set(re.findall("@(.*?)@", text)) <= used_fields()
    assert DOCUMENTATION == "man:tcpupperd(8)"


def test_catalog_lists_every_reason_why_a_connection_ends() -> None:
    """A failed connection has the kernel's words; one from an untrusted address never began."""
    _, text = catalog()[Event.CONNECTION_ENDED.message_id]
    found = re.findall(r"^    (\w.*?)(?:  .*)?$", text, re.MULTILINE)
    counters = [number for number, row in enumerate(WORKER.rows) if row.metric in ENDS]
    reasons = {reason(one) for one in counters if one not in (RESET, PROXY_UNTRUSTED)}
    assert set(", ".join(found[:-1]).split(", ")) == reasons


def test_manual_lists_every_event_and_no_other() -> None:
    found = re.findall(r"^\.It (.*)\n\.Li ([0-9a-f]{32})$", JOURNAL, re.MULTILINE)
    assert found == [(event.title, event.message_id) for event in Event]


def test_manual_lists_every_field_and_no_other() -> None:
    assert set(re.findall(r"TCPUPPERD_\w+", JOURNAL)) == used_fields()


def test_every_event_is_logged_somewhere() -> None:
    texts = (path.read_text() for path in (ROOT / "tcpupperd").rglob("*.py"))
    assert set(re.findall(r"Event\.([A-Z_]+)", "\n".join(texts))) == set(Event.__members__)


def test_journalctl_reads_the_catalog(tmp_path: Path) -> None:
    need("journalctl")
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    (folder / CATALOG.name).write_text(CATALOG.read_text())
    journalctl = ("journalctl", f"--root={tmp_path}")
    subprocess.run([*journalctl, "--update-catalog"], check=True)
    listed = subprocess.run(
        [*journalctl, "--list-catalog"], check=True, capture_output=True, text=True
    )
    assert sorted(listed.stdout.splitlines()) == sorted(
        f"{event.message_id} tcpupperd: {event.title}" for event in Event
    )
