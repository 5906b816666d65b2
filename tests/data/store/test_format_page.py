"""docs/format.md: its program runs on a real part, and its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import FORMAT

from .conftest import bucketed, make_world

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text(encoding="utf-8")


def test_the_program_reads_a_part(tmp_path: Path):
    world = make_world(tmp_path / "a.zarr", [3, 9, 4])
    program = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    program = program.replace("cache-teachers/parts/0123456789abcdef.zarr", str(world.path)).replace("dog-1", "s1")
    names: dict[str, np.ndarray] = {}
    exec(program, names)
    np.testing.assert_array_equal(names["ids"], bucketed(world.logits["s1"], 12)["ids"])


def test_its_numbers_are_those_of_the_code():
    layout = Layout(64, 64, (1.0,), (0, 151_643))
    assert f"({layout.bytes_per_token():.0f} at k = 64, b = 18 and n = B = 1;" in PAGE
    assert f"| `format` | {FORMAT};" in PAGE
