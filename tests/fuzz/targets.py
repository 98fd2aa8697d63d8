"""The fuzz targets: functions of some bytes that raise an exception only if there is a bug.

Each takes bytes as they come from a fuzzer, makes of them what a client, an administrator or
another version of the daemon could have written, and checks what can be checked in the result.
"""

import contextlib
import io
import os
import re
import socket
from collections.abc import Callable, Iterator

from outlive.channel import HandoverError
from tcpupperd import cli
from tcpupperd.address import parse_address
from tcpupperd.config import Config
from tcpupperd.config_file import ConfigError, load
from tcpupperd.processes import connection_format
from tcpupperd.serving.http import HEAD_MAX, HttpProtocol, Page
from tcpupperd.serving.protocol import ChunkProtocol, LineProtocol
from tcpupperd.serving.proxy import Header, HeaderError, HeaderProtocol, parse


def protocol(data: bytes) -> None:
    """Two bytes of settings, then chunks, each after a byte with its length: all that is
    answered, and nothing else, is what was sent, upper-cased."""
    max_line, limit = data[0] + 1, data[1] % 4
    protocols: list[LineProtocol | ChunkProtocol]
    protocols = [LineProtocol(max_line, limit), LineProtocol(max_line), ChunkProtocol()]
    answers = [b""] * len(protocols)
    sent = b""
    for chunk in chunks(data[2:]):
        sent += chunk
        for number, one in enumerate(protocols):
            answers[number] += one.receive(chunk)
            assert len(one.held) <= max_line
    for number, one in enumerate(protocols):
        answers[number] += one.receive_eof()
    lines = split(sent.upper())
    assert answers[0] == (b"".join(lines[:limit]) if limit else sent.upper())
    assert answers[1] == answers[2] == sent.upper()
    assert protocols[1].lines == len(lines)


def chunks(data: bytes) -> Iterator[bytes]:
    """None is empty: that would be the end of input."""
    while data:
        size = data[0]
        if chunk := data[1 : size + 1]:
            yield chunk
        data = data[size + 1 :]


def split(data: bytes) -> list[bytes]:
    """Lines with their newlines; `bytes.splitlines` takes more than newlines for their ends."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def proxy_header(data: bytes) -> None:
    """A byte that says where to split the rest, a PROXY header: the result does not depend on
    that, and never changes once it is known."""
    at, whole = data[0], data[1:]
    outcome, half = parsed(whole), parsed(whole[:at])
    assert half in (None, outcome)
    in_pieces = HeaderProtocol(refuse)
    for piece in filter(None, (whole[:at], whole[at:])):
        if not in_pieces.finished:
            assert in_pieces.receive(piece) == b""
    if isinstance(outcome, str):
        assert str(in_pieces.found) == outcome
        assert outcome.isprintable()
    else:
        assert in_pieces.found == outcome
    if outcome is None:
        assert in_pieces.held == whole
    elif isinstance(outcome, Header) and isinstance(outcome.source, tuple):
        host, port = outcome.source
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        assert socket.inet_ntop(family, socket.inet_pton(family, host)) == host
        assert 0 <= port <= 65535


def refuse(connection: object, found: object) -> None:
    """No client is served."""


def parsed(data: bytes) -> Header | str | None:
    """The header, or the reason why it is invalid."""
    try:
        return parse(data)
    except HeaderError as error:
        return str(error)


def configuration(data: bytes) -> None:
    """A configuration file: settings that are all usable, or errors meant for people."""
    message, config = "", Config()
    file = os.memfd_create("tcpupperd.toml")
    path = f"/proc/self/fd/{file}"
    try:
        os.write(file, data)
        config = load(path, {})
    except ConfigError as error:
        message = str(error)
    finally:
        os.close(file)
    assert all(line.startswith(path) for line in message.splitlines())
    assert config.worker_count > 0
    for address in config.listen:
        parse_address(address)


def command_line(data: bytes) -> None:
    """Arguments with NULs between them: they are taken, or the exit status is 2 (0 for --help)."""
    arguments = [os.fsdecode(argument) for argument in data.split(b"\0")]
    said, status = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.parse(arguments)
        except SystemExit as end:
            status = end.code
    assert (status, said.getvalue()) == (None, "") or (status in (0, 2) and said.getvalue())


def address(data: bytes) -> None:
    """An address to listen on."""
    with contextlib.suppress(ValueError):
        parse_address(os.fsdecode(data))


def handover_message(data: bytes) -> None:
    """A message of another version: a byte with the number and the family of the sockets, a byte
    with the length of the greeting, the greeting, and the state, which a hole of 1 TiB follows
    if it ends in that word. Every socket arrives, what is believed can be given again, and nothing
    is left open."""
    count, family, size = data[0] % 4, data[0] // 4 % len(FAMILIES), data[1]
    lowest_free = os.dup(0)
    os.close(lowest_free)
    send_end, receive_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with send_end, receive_end:
        send_message(send_end, data[2 : size + 2], data[size + 2 :], count, FAMILIES[family])
        try:
            connections = connection_format.receive(receive_end, MAX_LINE)
            sockets = [one.socket for one in connections]
            connection_format.send(send_end, connections)
            sockets += [one.socket for one in connection_format.receive(receive_end, MAX_LINE)]
        except HandoverError as error:
            sockets = error.sockets
        except EOFError:
            sockets = []
        for one in sockets:
            one.close()
    file = os.dup(0)
    os.close(file)
    assert file == lowest_free


#: Any state with less than this is believed.
MAX_LINE = 2**20
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


def send_message(
    end: socket.socket, greeting: bytes, state: bytes, count: int, family: int
) -> None:
    file = os.memfd_create("state")
    sockets = [socket.socket(family) for _ in range(count)]
    try:
        os.write(file, state)
        if state.endswith(b"hole"):
            os.truncate(file, 2**40)
        socket.send_fds(end, [greeting], [file, *(one.fileno() for one in sockets)])
    finally:
        os.close(file)
        for one in sockets:
            one.close()


def http_request(data: bytes) -> None:
    """A byte with the length of the pieces in which the rest arrives: it is answered once at most,
    never before something invalid or complete has arrived, and little of it is kept."""
    protocol = HttpProtocol({b"/": lambda: Page("text/plain", "page")})
    size, answers = data[0] + 1, []
    for start in range(1, len(data), size):
        if answer := protocol.receive(data[start : start + size]):
            answers.append(answer)
        assert len(protocol.held) <= HEAD_MAX
        assert bool(answers) == protocol.finished
    assert len(answers) <= 1
    assert all(re.match(rb"HTTP/1.1 (200|400|404|405|431|505) ", answer) for answer in answers)
    assert protocol.receive_eof() == b""


#: Each with the least number of bytes that it makes sense of.
TARGETS: dict[str, tuple[Callable[[bytes], None], int]] = {
    "protocol": (protocol, 2),
    "proxy_header": (proxy_header, 1),
    "configuration": (configuration, 0),
    "command_line": (command_line, 0),
    "address": (address, 0),
    "handover_message": (handover_message, 2),
    "http_request": (http_request, 1),
}


def run(name: str, data: bytes) -> None:
    """Try a target."""
    target, least = TARGETS[name]
    if len(data) >= least:
        target(data)
