"""The part of HTTP/1.1 (RFC 9110, RFC 9112) that is needed to serve pages, sans I/O.

A connection carries one request, and the response closes it. There is therefore no body to skip
and no pipelining, and a client can make the server hold no more data than one request of up to
`HEAD_MAX` bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tcpupperd.serving.protocol import Protocol

#: The maximum size of a request in bytes, up to the empty line.
HEAD_MAX = 8192

_REQUEST = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (\S+) HTTP/([0-9])\.[0-9]\r?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[^\0\r\n]*\r?")
_HEAD_END = re.compile(rb"\n\r?\n")
_AUTHORITY = re.compile(rb"[hH][tT][tT][pP][sS]?://[^/?#]*")

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

METHODS = (b"GET", b"HEAD", b"OPTIONS")
ALLOW = "Allow: GET, HEAD, OPTIONS"

#: Headers of every response: it is a snapshot, and its Content-Type is authoritative.
_ALWAYS = ("Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Connection: close")


class Page(NamedTuple):
    """The content of a response."""

    content_type: str
    text: str
    fields: tuple[str, ...] = ()  # additional header fields
    status: int = 200


class HttpProtocol(Protocol):
    """Answers one request with one of `pages`, which are created on request.

    OPTIONS is what `option httpchk` of HAProxy sends by default; like HEAD, it gets the status of
    the page.
    """

    __slots__ = ("_pages",)

    service = "metrics"
    is_privileged = True

    def __init__(self, pages: Mapping[bytes, Callable[[], Page]]) -> None:
        super().__init__()
        self._pages = pages

    def receive(self, data: bytes) -> bytes:
        """The response, once the request is complete or invalid."""
        if self.finished:
            return b""
        # Empty lines before a request are ignored (RFC 9112, section 2.2).
        self.held = held = bytes(self.held + data).lstrip(b"\r\n")
        self.mid_line = True  # so that line_timeout also limits the empty lines
        line, newline, _ = held.partition(b"\n")
        end = _HEAD_END.search(held)
        if max(len(held) if not end else end.start(), len(line)) > HEAD_MAX:
            return self._answer(refusal(431))
        if newline and not _REQUEST.fullmatch(line):
            return self._answer(refusal(400))  # not HTTP
        return self._answer(self._page(held[: end.start()])) if end else b""

    def finish(self) -> None:
        """Answer nothing more, not even a truncated request."""
        self.held = b""
        self.mid_line = False
        self.finished = True

    def resume(self, lines: int, mid_line: bool, held: bytes) -> bytes:
        """Continue where another process stopped; return the response if it is due."""
        answer = self.receive(held) if held else b""
        self.mid_line = mid_line and not self.finished
        return answer

    def _answer(self, answer: bytes) -> bytes:
        self.finish()
        return answer

    def _page(self, head: bytes) -> bytes:
        """The response to a complete request."""
        line, *fields = head.split(b"\n")
        request = _REQUEST.fullmatch(line)
        assert request
        method, target, version = request.groups()
        if version != b"1":
            return refusal(505)
        if not _are_fields(fields, needs_host=line.rstrip().endswith(b"1.1")):
            return refusal(400)
        page = self._pages.get(path_of(target))
        if page is None:
            return refusal(404)
        if method not in METHODS:
            return refusal(405, ALLOW)
        if method == b"OPTIONS":
            return response(Page("text/plain", "", (ALLOW,), page().status))
        return response(page(), body=method == b"GET")


def path_of(target: bytes) -> bytes:
    """The path of a request's target, which may be an absolute URL (RFC 9112, section 3.2.2),
    without the query. It is not decoded, because no page has a name that needs decoding."""
    path = _AUTHORITY.sub(b"", target, count=1)
    return path.partition(b"?")[0].partition(b"#")[0] or b"/"


def refusal(status: int, *fields: str) -> bytes:
    """An error response."""
    text = f"{status} {_REASONS[status]}\n"
    return response(Page("text/plain; charset=utf-8", text, fields, status))


def response(page: Page, *, body: bool = True) -> bytes:
    """A complete response; without `body`, it states only the length of the body."""
    content = page.text.encode(errors="backslashreplace")
    head = (
        f"HTTP/1.1 {page.status} {_REASONS[page.status]}",
        f"Content-Type: {page.content_type}",
        f"Content-Length: {len(content)}",
        *_ALWAYS,
        *page.fields,
    )
    return "\r\n".join((*head, "", "")).encode() + (content if body else b"")


def _are_fields(lines: list[bytes], *, needs_host: bool) -> bool:
    """Whether these are valid header fields, with one Host in HTTP/1.1 (RFC 9112, section 3.2). A
    field that continues on the next line is obsolete and rejected (section 5.2)."""
    names = [field[1].lower() for line in lines if (field := _FIELD.fullmatch(line))]
    hosts = names.count(b"host")
    return len(names) == len(lines) and (hosts == 1 or (hosts == 0 and not needs_host))
