"""docs/planning.md: its tables are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdpipe.stages.cache_teachers.cost.planning import LAYOUTS, STUDENT, TEACHER, fill_page, tables

PAGE = Path(__file__).resolve().parents[3] / "docs" / "planning.md"


def test_its_tables_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert all(made in page for made in tables().values())
    assert fill_page(page) == page, "run `python -m kdpipe.stages.cache_teachers.cost.planning docs/planning.md`"


def test_bytes_of_a_token_by_hand():
    assert LAYOUTS["k = 64, float16"].bytes_per_token() == 64 * 18 / 8 + 64 * 2 + 4 + 2
    assert LAYOUTS["mass 0.99, uint8"].bytes_per_token(12) == 12 * 18 / 8 + 12 + 1 + 4 + 4 + 2


def test_weights_are_those_that_were_published():
    """Non-embedding parameters of the model cards: 6.53 and 6.95 billion."""
    assert pytest.approx(6.53e9, rel=2e-3) == STUDENT.body
    assert pytest.approx(6.95e9, rel=2e-3) == TEACHER.body
