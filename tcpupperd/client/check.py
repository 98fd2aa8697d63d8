"""``tcpupper --check``: a plugin that follows the Monitoring Plugins Development Guidelines."""

import errno
import math
import os
import socket
import sys
import threading
import time

from tcpupperd.client.endpoint import ends, reason
from tcpupperd.client.greeting import Greeting
from tcpupperd.client.options import CheckOptions
from tcpupperd.client.pending_lines import PendingLines, WrongAnswerError
from tcpupperd.client.plugin import CRITICAL, OK, UNKNOWN, WARNING, report
from tcpupperd.errors import ExpectedError

#: Local errors, which say nothing about the server.
LOCAL_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}

#: A status, a message about it, and performance data if there is any.
Result = tuple[int, str, str]


def check(options: CheckOptions) -> int:
    """Check the server, print the line for the monitoring system, and return the status."""
    return report(*run_with_timeout(options))


def run_with_timeout(options: CheckOptions) -> Result:
    """The result, reached within the timeout.

    Only a separate thread can be abandoned if a name lookup hangs. Other plugins use alarm(2), but
    Python handles no signal before getaddrinfo(3) has returned.
    """
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(run_check(options)), daemon=True)
    thread.start()
    thread.join(options.timeout)
    late = f"no answer from {options.endpoint.name} for {options.timeout:g} s"
    return results[0] if results else (CRITICAL, late, "")


def run_check(options: CheckOptions) -> Result:
    start = time.monotonic()
    try:
        connection = ask(options)
    except ExpectedError as error:
        cause = error.__cause__
        is_local = isinstance(cause, OSError) and cause.errno in LOCAL_ERRORS
        return UNKNOWN if is_local else CRITICAL, str(error), ""
    except Exception as error:  # a bug, which must not look like a state of the server
        # The module traceback would take longer to import than everything else.
        sys.excepthook(type(error), error, error.__traceback__)
        return UNKNOWN, f"{type(error).__name__}: {error}", ""
    seconds = time.monotonic() - start
    said = f"{options.endpoint.name} answered in {seconds:.6f} s"
    more = f", connected {connection}" if options.verbose else ""
    return rate(options, seconds), said + more, performance(options, seconds)


def ask(options: CheckOptions) -> str:
    """Ask the server and verify its answer; raises ExpectedError if it is not correct. Returns the
    addresses of the connection if they are to be shown."""
    name = options.endpoint.name
    try:
        # `run_with_timeout` limits the time for the rest.
        with options.endpoint.connect_within(options.timeout) as server:
            # Afterwards, the server may have reset the connection, which then has no addresses.
            connection = ends(server) if options.verbose else ""
            converse(server, Greeting(options.greeting))
            return connection
    except WrongAnswerError as error:
        raise ExpectedError(f"wrong answer from {name}: {error}") from error
    except OSError as error:
        raise ExpectedError(f"lost the connection to {name}: {reason(error)}") from error


def converse(server: socket.socket, greeting: Greeting) -> None:
    lines = PendingLines(f"tcpupper {os.urandom(6).hex()} check")
    server.sendall(lines.ask(0.0))
    while lines.pending:
        data = server.recv(4096)
        if not data:
            raise ConnectionError("the server closed the connection without answering")
        list(lines.receive(greeting.strip(data)))


def rate(options: CheckOptions, seconds: float) -> int:
    """The status for a correct answer that took this long."""
    if seconds > options.critical:
        return CRITICAL
    return WARNING if seconds > options.warning else OK


def performance(options: CheckOptions, seconds: float) -> str:
    """The time, its thresholds and its range."""
    thresholds = (options.warning, options.critical)
    limits = ["" if math.isinf(limit) else f"{limit:g}" for limit in thresholds]
    return f"time={seconds:.6f}s;{';'.join(limits)};0;{options.timeout:g}"
