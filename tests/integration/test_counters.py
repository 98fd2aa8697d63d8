"""What the daemon counts of its workers and reloads, and what survives them."""

import os
import signal

from integration.daemon import Daemon
from integration.processes import stopped
from waiting import until


def test_counters_of_a_killed_worker_stay_in_the_totals() -> None:
    with Daemon(workers=1) as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        until(lambda: daemon.counters()["lines"] == 1)
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_for_workers(1, without=worker)
        assert daemon.connect().ask(b"two") == b"TWO"
        until(lambda: daemon.counters()["lines"] == 2)
        counters = daemon.counters()
        assert (counters["accepted"], counters["open"]) == (2, 1)
        assert (counters["workers_started"], counters["workers_signalled"]) == (2, 1)


def test_reloads_are_counted_by_how_they_ended() -> None:
    with Daemon() as daemon:
        assert daemon.connect().ask(b"one") == b"ONE"
        daemon.reload()
        daemon.configure("nonsense = 1\n")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "reload failed" in daemon.log)
        counters = daemon.counters()
        assert (counters["reloads"], counters["reloads_failed"]) == (1, 1)
        assert (counters["lines"], counters["workers_started"]) == (1, 4)
        dead = ("workers_exited", "workers_signalled", "workers_hung", "workers_late")
        assert [counters[name] for name in dead] == [0] * 4


def test_worker_that_does_not_leave_in_time_is_counted_as_late() -> None:
    with Daemon(workers=1, drain_timeout=0) as daemon:
        (worker,) = daemon.workers()
        with stopped(worker):
            daemon.reload()
            until(lambda: daemon.counters()["workers_late"] == 1)
        assert daemon.counters()["workers_signalled"] == 0
