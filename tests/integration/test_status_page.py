"""The status page in Chromium, wide and as narrow as a telephone, light and dark: it fits, it says
what is wrong, and its colours can be told apart."""

import json
import os
import re
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from integration.client import OWN
from integration.daemon import Daemon
from integration.test_metrics import page
from tools import need
from waiting import DEADLINE, until

#: In a frame of a certain width, because a browser's window has a minimum.
FRAME = """<!DOCTYPE html><title>-</title><style>body {{ margin: 0 }}</style>
<script>addEventListener("message", (event) => {{ document.title = event.data; }});</script>
<iframe srcdoc="{page}" width="{width}" height="2600" style="border: 0"></iframe>
"""

#: What the page measures once it is shown: the width that it needs, that of the frame, the parts
#: beyond its edge that no scrolling region contains, and the contrast of each text.
MEASURE = """
<script>
function channel(value) {
  return value <= 10.31475 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
}
function luminance(color) {
  const [red, green, blue] = color.match(/[0-9.]+/g).map(Number).map(channel);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
function ground(one) {
  const color = getComputedStyle(one).backgroundColor;
  return color === "rgba(0, 0, 0, 0)" && one.parentElement ? ground(one.parentElement) : color;
}
function contrast(one) {
  const pair = [luminance(getComputedStyle(one).color), luminance(ground(one))];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}
addEventListener("load", () => {
  const all = [...document.querySelectorAll("body *:not(script)")];
  const outside = all.filter(
    (one) => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll"));
  const pale = all.filter((one) => one.textContent.trim() && contrast(one) < 4.5);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  parent.postMessage(JSON.stringify({
    needed: document.documentElement.scrollWidth, width: innerWidth, dark,
    outside: outside.map((one) => one.outerHTML), pale: pale.map((one) => one.outerHTML)}), "*");
});
</script>
"""


def shown(text: str, *, width: int, dark: bool, directory: Path) -> dict[str, Any]:
    """What the page measures of itself. SCREENSHOTS=directory also keeps what it looks like."""
    file = directory / "frame.html"
    file.write_text(FRAME.format(page=escape(text + MEASURE), width=width), encoding="utf-8")
    command = [
        need("chromium"),
        *("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}/profile"),
        *("--hide-scrollbars", f"--window-size={max(width, 500)},2600"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    if kept := os.environ.get("SCREENSHOTS"):
        picture = f"{kept}/status-{width}-{'dark' if dark else 'light'}.png"
        run(*command, f"--screenshot={picture}", file.as_uri())
    dom = run(*command, "--virtual-time-budget=1000", "--dump-dom", file.as_uri())
    [title] = re.findall("<title>(.*?)</title>", dom)
    found: dict[str, Any] = json.loads(unescape(title))
    return found


def run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=4 * DEADLINE, check=True
    )
    return done.stdout


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1000, 390])
def test_page_fits_and_can_be_read(width: int, dark: bool, tmp_path: Path) -> None:
    need("chromium")
    listen = ["metrics=127.0.0.1:0", "127.0.0.1:0", f"{OWN}-{'x' * 60}"]
    with Daemon(listen=listen, workers=1, max_connections=2) as daemon:
        upper = next(one for one in daemon.addresses if "=" not in one)
        clients = [daemon.connect(upper) for _ in range(5)]
        assert clients[0].ask(b"hello") == b"HELLO"
        text = until(lambda: found if "Full: all 2 all" in (found := page(daemon)) else "")
    assert "waiting: 3 clients" in text
    found = shown(text, width=width, dark=dark, directory=tmp_path)
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["needed"] == width
    assert (found["outside"], found["pale"]) == ([], [])
