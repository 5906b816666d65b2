"""The page in headless Chromium, as wide as a phone and as a desk."""

from __future__ import annotations

from pathlib import Path

import pytest

from .browser import chromium, look, picture
from .test_hostile import hostile_page

PROGRAM = chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed (apt-get install chromium)")
SECTIONS = ["flow", "losses", "accuracy", "rows", "disagreement", "rejects", "examples"]


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_nothing_sticks_out(page: Path, width: int, dark: bool):
    found = look(PROGRAM, page, width, dark=dark)
    assert found["width"] == width and found["scroll"] <= width and found["wide"] == []
    assert found["sections"] == SECTIONS and found["scripts"] == 0
    assert found["images"] and all(found["images"]), "the pictures are drawn, so the page's policy lets them"
    assert found["background"] == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")


def test_a_picture_of_it(page: Path, tmp_path: Path):
    target = tmp_path / "page.png"
    picture(PROGRAM, page, target, width=390, height=900)
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 10_000


def test_a_hostile_run_runs_nothing(run: Path, tmp_path: Path):
    found = look(PROGRAM, hostile_page(run, tmp_path), 390)
    assert found["ran"] == 0 and found["scripts"] == 0 and found["sections"] == SECTIONS
    assert found["scroll"] <= 390 and found["wide"] == []
