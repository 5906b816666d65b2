"""Looks at a page with headless Chromium: `python browser.py PAGE --width 390 --picture page.png [--dark]`.

Chromium's window is never narrower than 500 px, so the page is put into a frame of the width that is asked for.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def chromium() -> str | None:
    """The program, or None where none is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def call(program: str, *words: str, seconds: int = 180) -> str:
    """What Chromium writes to standard output."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio")
        apart = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
        command = [program, *quiet, *apart, "--hide-scrollbars", "--allow-file-access-from-files"]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={folder}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout


_FRAME = """<!doctype html><meta charset="utf-8"><style>body{{margin:0}}iframe{{border:0;display:block}}</style>
<iframe id="f" src="{address}" width="{width}" height="{height}"></iframe><pre id="o"></pre>
<script>
const f = document.getElementById("f");
f.onload = () => {{
  const d = f.contentDocument, w = f.contentWindow, e = d.documentElement;
  const wide = [...d.querySelectorAll("body *")].filter(
    (x) => x.getBoundingClientRect().right > w.innerWidth + 1 && !x.closest(".scroll") && !x.closest("svg")
      && !x.closest(".skip")).map((x) => x.outerHTML.slice(0, 120));
  document.getElementById("o").textContent = JSON.stringify({{width: w.innerWidth, scroll: e.scrollWidth,
    height: e.scrollHeight, wide: wide.slice(0, 5), scripts: d.scripts.length, ran: w.kdpipe_ran === undefined ? 0 : 1,
    images: [...d.images].map((x) => x.naturalWidth), background: w.getComputedStyle(d.body).backgroundColor,
    sections: [...d.querySelectorAll("main > section")].map((x) => x.id)}});
}};
</script>
"""


def look(program: str, page: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """Loads a page in a window of a width (pixels) and tells how it lies there.

    Returns:
        `width` of the window, `scroll`: width and `height` of the content, `wide`: elements that stick out, `scripts`,
        `ran`: whether a script of the page ran, `images`: their widths, `background`, `sections`: their ids.
    """
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(_FRAME.format(address=html.escape(page.resolve().as_uri()), width=width, height=900))
        words = ["--blink-settings=preferredColorScheme=0"] if dark else []
        text = call(program, *words, "--virtual-time-budget=5000", "--dump-dom", frame.as_uri())
    found = re.search(r'<pre id="o">(.*?)</pre>', text, re.DOTALL)
    assert found and found[1], "the page did not load"
    return json.loads(html.unescape(found[1]))


def picture(program: str, page: Path, target: Path, *, width: int, height: int, dark: bool = False) -> None:
    """Writes a screenshot of the first `height` pixels of a page in a window of a width."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(_FRAME.format(address=html.escape(page.resolve().as_uri()), width=width, height=height))
        words = ["--blink-settings=preferredColorScheme=0"] if dark else []
        size = f"--window-size={max(width, 500)},{height}"
        call(program, *words, size, f"--screenshot={target.resolve()}", frame.as_uri())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--width", type=int, default=390)
    parser.add_argument("--height", type=int, default=0, help="of the picture; 0: the whole page, 16,000 px at most")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    program = chromium()
    if program is None:
        raise SystemExit("chromium is not installed: apt-get install chromium")
    found = look(program, given.page, given.width, dark=given.dark)
    if given.picture:
        height = given.height or min(found["height"], 16_000)
        picture(program, given.page, given.picture, width=given.width, height=height, dark=given.dark)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
