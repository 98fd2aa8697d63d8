"""What the kernel knows about a connection."""

import socket

import pytest

from tcpupperd.host.tcp_info import Traffic, cookie, traffic
from unit.channels import close, tcp_pairs


def test_cookie_stays_with_the_socket_wherever_it_goes() -> None:
    ((client, server),) = tcp_pairs(1)
    number = cookie(server)
    assert number not in (0, cookie(client))
    client.send(b"hello")
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [server.fileno()])
    _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
    server.close()
    with socket.socket(fileno=fd) as again:
        assert cookie(again) == number
    close([client, ours, theirs])


def test_local_socket_has_a_cookie_but_no_counts() -> None:
    one, other = socket.socketpair()
    assert cookie(one) != cookie(other)
    with pytest.raises(OSError, match="not supported"):
        traffic(one, eof=False)
    close([one, other])


def test_closed_socket_has_none() -> None:
    ((client, server),) = tcp_pairs(1)
    close([client, server])
    with pytest.raises(OSError, match="Bad file descriptor"):
        cookie(server)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_bytes_are_counted_and_ends_are_not(host: str) -> None:
    ((client, server),) = tcp_pairs(1, host)
    assert traffic(server, eof=False) == Traffic(0, 0)
    client.sendall(b"hello")
    assert server.recv(9) == b"hello"
    server.sendall(b"HELLO, world")
    assert traffic(server, eof=False) == Traffic(5, 12)
    client.shutdown(socket.SHUT_WR)
    assert server.recv(9) == b""
    assert traffic(server, eof=True) == Traffic(5, 12)
    server.shutdown(socket.SHUT_WR)
    assert client.recv(99, socket.MSG_WAITALL) == b"HELLO, world"
    assert traffic(server, eof=True) == Traffic(5, 12)
    close([client, server])


def test_end_that_was_not_read_yet_is_not_counted() -> None:
    ((client, server),) = tcp_pairs(1)
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    assert server.recv(9, socket.MSG_PEEK) == b"hello"
    assert traffic(server, eof=False).received == 5
    close([client, server])


def test_bytes_that_wait_to_be_sent_count_as_sent() -> None:
    ((client, server),) = tcp_pairs(1)
    server.setblocking(False)
    sent = 0
    while True:
        try:
            sent += server.send(b"x" * 65536)
        except BlockingIOError:
            break
    assert traffic(server, eof=False) == Traffic(0, sent)
    close([client, server])
