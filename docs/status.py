"""Records docs/status.png, the status page in the README. Run it as root for each release.

The page is that of the service in a Debian system that was booted for it, with the package of this
tree installed, while clients come, go and stay.
"""

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from docs.session import ROOT, installed

PICTURE = ROOT / "docs/status.png"
SIZE = "1000,930"
PAGE = "//localhost:9998/"

CLIENTS = """
    hostname web1.example.org
    systemctl enable --quiet tcpupperd-metrics.socket
    systemctl restart tcpupperd
    tcpupper --ping --connections 500 -i 0.2 -w 60 --quiet >/dev/null 2>&1 &
    for each in $(seq 10); do tcpupper hello >/dev/null; done
    systemctl reload tcpupperd
    tcpupper --ping -c 20 -i 0.5 --quiet >/dev/null
"""


def record() -> None:
    """Take the picture from within the network of the machine."""
    with installed() as machine, TemporaryDirectory() as profile:
        machine.run("sh", "-ec", CLIENTS)
        subprocess.run(
            [
                *("nsenter", f"--target={machine.leader}", "--net", "--"),
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={profile}", f"--window-size={SIZE}"),
                *(f"--screenshot={PICTURE}", f"http:{PAGE}"),
            ],
            check=True,
            cwd=Path(profile),
            stderr=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    record()
