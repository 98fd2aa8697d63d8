"""uvicorn with the example of outlive and a real unit: clients that reuse their connections, such
as a reverse proxy, see neither a restart nor a mistake in the application.

With SOAK=1, there are more restarts, also on testing, and what the clients saw is printed.
"""

import os
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from load.numbered import Numbered
from system.build import both, run_script
from system.container import Container
from system.roots import RELEASES, TESTING, TREE, Root
from system.test_handover import SMALL_BUFFERS
from system.test_outlive import SHARE
from system.test_readme import registry_access
from waiting import until

SOAK = bool(os.environ.get("SOAK"))
CONNECTIONS = 300
RESTARTS = 20 if SOAK else 10
INSTALL_TIMEOUT = 300
UNIT = "kept.service"
APPLICATION = "/usr/local/lib/kept/application.py"
SOCKET = "[Socket]\nListenStream=127.0.0.1:7003\nBacklog=4096\nTriggerLimitIntervalSec=0\n"
#: With a user that no other test has: the kernel limits the descriptors in flight by user ID.
SERVICE = f"""[Unit]
StartLimitIntervalSec=0
[Service]
Type=notify
ExecStart=/opt/kept/bin/python /usr/local/lib/kept/kept_uvicorn.py kept application:application
RestartKillSignal=SIGUSR2
SuccessExitStatus=SIGUSR2
FileDescriptorStoreMax=8
Restart=always
RestartSec=1
WatchdogSec=10
DynamicUser=yes
User=kept-{os.getpid()}
PrivateNetwork=yes
"""
#: A virtual environment, as a user makes it, in which the package of outlive can be imported.
MAKE_ENVIRONMENT = """
apt-get -qq update && apt-get -qq install --yes python3-venv >/dev/null
python3 -m venv --system-site-packages /opt/kept
/opt/kept/bin/pip install --quiet {}
cp --archive /opt/kept /mnt/kept
"""

Work = Callable[[], AbstractContextManager[Numbered]]

pytestmark = pytest.mark.parametrize("release", [*RELEASES, *[TESTING] * SOAK], indirect=True)


@pytest.fixture(scope="session")
def environment(release: str, package: Path) -> str:
    """The virtual environment with the tested versions, in the folder that machines share."""
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    pinned = [name for name in project["optional-dependencies"]["test"] if "==" in name]
    script = MAKE_ENVIRONMENT.format(" ".join(pinned))
    options = ("--pipe", *registry_access())
    root = Root(release, "minimal")
    run_script(root, package.parent, script, *options, timeout=INSTALL_TIMEOUT)
    return "/mnt/kept"


@pytest.fixture
def kept(bare_machine: Container, package: Path, environment: str) -> Container:
    """A machine on which uvicorn serves an application."""
    _, library = both(package)
    bare_machine.run("apt-get", "install", "--yes", f"/mnt/{library.name}")
    bare_machine.run("cp", "--archive", environment, "/opt")
    bare_machine.write(APPLICATION, (TREE / "tests/integration/application.py").read_text())
    bare_machine.run("cp", f"{SHARE}/kept_uvicorn.py", str(Path(APPLICATION).parent))
    bare_machine.write(f"/etc/systemd/system/{UNIT}", SERVICE)
    bare_machine.write("/etc/systemd/system/kept.socket", SOCKET)
    bare_machine.write("/proc/sys/net/ipv4/tcp_wmem", SMALL_BUFFERS)
    bare_machine.run("systemctl", "daemon-reload")
    bare_machine.run("systemctl", "start", "kept.socket")
    return bare_machine


@pytest.fixture
def nothing_is_lost(kept: Container, release: str, capsys: pytest.CaptureFixture[str]) -> Work:
    """A context with clients at work; at its end, what they saw is compared."""

    @contextmanager
    def nothing_is_lost() -> Iterator[Numbered]:
        program = "/mnt/tcpupperd/tests/load/keepalive.py"
        words = ("python3", program, "127.0.0.1", "7003", str(CONNECTIONS))
        with Numbered(kept.popen(*words, stdin=PIPE, stdout=PIPE), CONNECTIONS) as load:
            yield load
            report = load.finish()
        if SOAK:
            with capsys.disabled():
                print(f"\n{release}: {report}")
        assert report.faults == {}, kept.journal(
            "--output=cat", "--grep=clos|rror", f"--unit={UNIT}"
        )
        assert report.open == CONNECTIONS
        assert report.visits

    return nothing_is_lost


def test_restarts(kept: Container, nothing_is_lost: Work) -> None:
    with nothing_is_lost() as load:
        for _ in range(RESTARTS):
            before = kept.show(UNIT, "MainPID")
            kept.run("systemctl", "restart", UNIT)
            assert kept.show(UNIT, "MainPID") not in ("0", before)
            load.go_on()


def test_mistake_in_the_application(kept: Container, nothing_is_lost: Work) -> None:
    """It cannot be started any more; the clients wait until the mistake is corrected."""
    with nothing_is_lost() as load:
        kept.run("sed", "--in-place", "1i def", APPLICATION)
        assert kept.try_run("systemctl", "restart", UNIT).returncode
        until(lambda: int(kept.show(UNIT, "NRestarts")) > 1)
        kept.run("sed", "--in-place", "1d", APPLICATION)
        until(lambda: kept.show(UNIT, "ActiveState") == "active")
        load.go_on()
