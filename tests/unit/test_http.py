"""HTTP requests, valid, invalid, slow and huge: bytes in, bytes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpupperd.serving.http import HEAD_MAX, HttpProtocol, Page, path_of

PAGES = {
    b"/": lambda: Page("text/html; charset=utf-8", "<p>é", ("X-Of: it",)),
    b"/metrics": lambda: Page("text/plain; version=0.0.4", "a 1\n"),
    b"/ready": lambda: Page("text/plain; charset=utf-8", "full\n", status=503),
}
GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


def ask(*chunks: bytes) -> tuple[int, dict[str, str], bytes]:
    """The status, the header fields and the body of the answer; it comes with the last chunk."""
    protocol = HttpProtocol(PAGES)
    *answers, answer = [protocol.receive(chunk) for chunk in chunks]
    assert not any(answers)
    assert protocol.finished
    assert (protocol.held, protocol.mid_line) == (b"", False)
    assert protocol.receive(GET) == b""
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    fields = dict(one.split(": ", 1) for one in lines)
    assert len(fields) == len(lines)
    assert fields["Connection"] == "close"
    assert fields["Cache-Control"] == "no-store"
    return int(line.removeprefix("HTTP/1.1 ").split()[0]), fields, body


def test_page_is_got() -> None:
    status, fields, body = ask(GET)
    assert (status, body) == (200, b"a 1\n")
    assert fields["Content-Type"] == "text/plain; version=0.0.4"
    assert fields["Content-Length"] == "4"


def test_length_is_in_bytes_and_a_page_may_have_fields_of_its_own() -> None:
    status, fields, body = ask(b"GET / HTTP/1.1\r\nhost:\r\n\r\n")
    assert (status, body) == (200, "<p>é".encode())
    assert (fields["Content-Length"], fields["X-Of"]) == ("5", "it")


def test_head_is_told_all_but_the_page() -> None:
    status, fields, body = ask(GET.replace(b"GET", b"HEAD"))
    assert (status, fields, body) == (*ask(GET)[:2], b"")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /metrics HTTP/1.0\r\n\r\n",
        b"GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n",
        b"\r\n\r\n" + GET,
        GET.replace(b"\r\n", b"\n"),
        GET.replace(b"/metrics", b"/metrics?name[]=up&x=%00"),
        GET.replace(b"/metrics", b"http://localhost:9998/metrics"),
        GET.replace(b"HTTP/1.1", b"HTTP/1.9"),
        GET.replace(b"\r\n\r\n", b"\r\nAccept: */*\r\nX-Of:\t \xff \xc3\xa9\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nhello"),
        GET + GET,
    ],
    ids=repr,
)
def test_all_that_scrapers_and_browsers_may_say_is_understood(request_: bytes) -> None:
    status, _, body = ask(request_)
    assert (status, body) == (200, b"a 1\n")


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"TRACE", b"get", b"G!"])
def test_other_methods_are_refused(method: bytes) -> None:
    status, fields, _ = ask(GET.replace(b"GET", method))
    assert (status, fields["Allow"]) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"OPTIONS / HTTP/1.0\r\n\r\n", 200),  # what HAProxy sends
        (GET.replace(b"GET", b"OPTIONS"), 200),
        (b"OPTIONS /ready HTTP/1.0\r\n\r\n", 503),
        (b"OPTIONS /other HTTP/1.0\r\n\r\n", 404),
    ],
)
def test_options_is_told_the_status_of_the_page(request_: bytes, expected: int) -> None:
    status, fields, body = ask(request_)
    assert status == expected
    if status != 404:
        assert (fields["Allow"], fields["Content-Length"], body) == (
            "GET, HEAD, OPTIONS",
            "0",
            b"",
        )


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_page_may_have_a_status_of_its_own(method: bytes) -> None:
    status, fields, body = ask(b"%s /ready HTTP/1.0\r\n\r\n" % method)
    assert (status, fields["Content-Length"]) == (503, "5")
    assert body == (b"full\n" if method == b"GET" else b"")


@pytest.mark.parametrize(
    "target", [b"/metric", b"/metrics/", b"//metrics", b"/%6detrics", b"*", b"/..", b"/\xff"]
)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_there_are_no_other_pages(method: bytes, target: bytes) -> None:
    assert ask(b"%s %s HTTP/1.1\r\nHost: x\r\n\r\n" % (method, target))[0] == 404


@pytest.mark.parametrize(
    "request_",
    [
        b"hello\n",
        b"GET /metrics\r\n",
        b"GET  /metrics HTTP/1.1\r\n",
        b"GET /met rics HTTP/1.1\r\n",
        b" GET /metrics HTTP/1.1\r\n",
        b"GET /metrics HTTP/11\r\n",
        b"GET /metrics http/1.1\r\n",
        b"GET /metrics HTTP/1.1 \r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        GET.replace(b"\r\n\r\n", b"\r\nHost: again\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\n continued\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nno colon\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nspace : x\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nX: nul\0\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\nX: carriage\rreturn\r\n\r\n"),
        GET.replace(b"\r\n\r\n", b"\r\n: x\r\n\r\n"),
    ],
    ids=repr,
)
def test_data_that_is_not_http_is_rejected_as_soon_as_that_is_clear(request_: bytes) -> None:
    assert ask(request_)[0] == 400


@pytest.mark.parametrize("version", [b"HTTP/2.0", b"HTTP/0.9", b"HTTP/9.1"])
def test_other_versions_are_refused(version: bytes) -> None:
    assert ask(GET.replace(b"HTTP/1.1", version))[0] == 505


@pytest.mark.parametrize("endless", [b"x", b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"\0"])
def test_huge_request_is_refused_and_never_kept(endless: bytes) -> None:
    protocol = HttpProtocol(PAGES)
    answer = protocol.receive(endless)
    while not answer:
        assert len(protocol.held) <= HEAD_MAX
        answer = protocol.receive(b"x" * 1000)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert protocol.held == b""


def test_empty_lines_ahead_of_a_request_are_not_kept() -> None:
    protocol = HttpProtocol(PAGES)
    for _ in range(HEAD_MAX):
        assert protocol.receive(b"\r\n" * 10) == b""
        assert (protocol.held, protocol.mid_line) == (b"", True)  # line_timeout applies
    heir = HttpProtocol(PAGES)
    assert heir.resume(protocol.lines, protocol.mid_line, bytes(protocol.held)) == b""
    assert heir.mid_line
    assert heir.receive(GET).startswith(b"HTTP/1.1 200 ")


def test_blanks_in_a_field_are_matched_in_one_way_only() -> None:
    """Trying all ways to divide them among parts of a pattern would take hours of a worker."""
    blanks = b" " * (HEAD_MAX - 100)
    assert ask(GET.replace(b"\r\n\r\n", b"\r\nX:" + blanks + b"\0\r\n\r\n"))[0] == 400


def test_request_of_just_the_size_that_is_allowed_is_answered() -> None:
    room = HEAD_MAX + len("\n\r\n") - len(GET) - len("\r\nX: ")
    assert ask(GET.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * room + b"\r\n\r\n"))[0] == 200
    assert ask(GET.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * (room + 1) + b"\r\n\r\n"))[0] == 431


def test_request_may_arrive_in_any_pieces() -> None:
    for size in range(1, len(GET)):
        chunks = [GET[start : start + size] for start in range(0, len(GET), size)]
        assert ask(*chunks) == ask(GET)


def test_request_continues_in_another_process() -> None:
    for size in range(1, len(GET)):
        first, second = HttpProtocol(PAGES), HttpProtocol(PAGES)
        assert first.receive(GET[:size]) == b""
        assert first.mid_line
        assert second.resume(first.lines, first.mid_line, bytes(first.held)) == b""
        assert second.receive(GET[size:]) == HttpProtocol(PAGES).receive(GET)


def test_truncated_request_gets_no_response() -> None:
    protocol = HttpProtocol(PAGES)
    assert protocol.receive(GET[:-1]) == b""
    assert protocol.receive_eof() == b""
    assert (protocol.finished, protocol.held) == (True, b"")


@given(st.binary(max_size=300), st.integers(1, 300))
def test_any_bytes_are_answered_once_at_most(data: bytes, size: int) -> None:
    protocol = HttpProtocol(PAGES)
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    answers = [answer for chunk in chunks if (answer := protocol.receive(chunk))]
    assert len(answers) == protocol.finished


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/metrics", b"/metrics"),
        (b"/metrics?x", b"/metrics"),
        (b"/?/metrics", b"/"),
        (b"http://host", b"/"),
        (b"HTTP://user@host:1/metrics?x", b"/metrics"),
        (b"https://host?x", b"/"),
        (b"ftp://host/metrics", b"ftp://host/metrics"),
    ],
)
def test_path_of_a_target(target: bytes, path: bytes) -> None:
    assert path_of(target) == path
