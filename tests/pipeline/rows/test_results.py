"""The table of rows from what their students said."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.data.errors import KdpipeError
from kdpipe.data.manifest import Sample
from kdpipe.pipeline.rows.definition import ROWS
from kdpipe.pipeline.rows.results import Answered, markdown, read_correct, results, table

GROUPS = {"hearing": ["who"], "reasoning": ["sum", "parity"]}


def sample(name: str, task: str | None) -> Sample:
    rest = dict.fromkeys(["answer", "split", "start", "end", "trace", "response", "description"])
    return Sample(id=name, audio=(), question="?", choices=(), task=task, extra={}, **rest)


TASKS = {"a": "sum", "b": "parity", "c": "who", "d": "who"}
SAMPLES = [*(sample(name, task) for name, task in TASKS.items()), sample("unscored", "sum")]


def said(*right: str) -> dict[str, bool]:
    return {name: name in right for name in TASKS}


@pytest.fixture
def found():
    base = Answered(ROWS["base"], {0: said("c", "d")})
    sft = Answered(ROWS["sft"], {0: said("a"), 1: said("a", "b", "c")})
    without_d = {name: right for name, right in said("a", "b").items() if name != "d"}
    top = Answered(ROWS["top"], {0: without_d, 1: said("a", "b", "c"), 7: said()})
    return results([base, sft, top], SAMPLES, GROUPS)


def test_accuracy_is_over_questions_and_seeds(found):
    rows = {row["name"]: row for row in found["rows"]}
    assert [row["n"] for row in rows.values()] == [4, 4, 4]
    assert {name: group["accuracy"] for name, group in rows["base"]["groups"].items()} == {
        "hearing": 1.0,
        "reasoning": 0.0,
        "all": 0.5,
    }
    assert rows["sft"]["groups"]["reasoning"]["accuracy"] == 0.75
    assert rows["top"]["groups"]["hearing"]["accuracy"] == pytest.approx(1 / 6), "no answer counts as wrong"
    assert rows["sft"]["tasks"]["sum"]["accuracy"] == 1.0 and rows["sft"]["tasks"]["sum"]["n"] == 1
    assert rows["top"]["seeds"] == [0, 1, 7] and rows["base"]["seeds"] == []
    assert rows["sft"]["by_seed"]["1"] == {"hearing": 0.5, "reasoning": 1.0, "all": 0.75}
    for row in rows.values():
        for cell in (*row["groups"].values(), *row["tasks"].values()):
            assert 0 <= cell["interval"][0] <= cell["accuracy"] <= cell["interval"][1] <= 1


def test_rows_are_set_against_base_and_sft_on_the_seeds_that_both_have(found):
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows["top"]["against"]) == {"base", "sft"} and set(rows["sft"]["against"]) == {"base"}
    assert rows["top"]["against"]["sft"]["reasoning"]["difference"] == 0.25
    assert rows["sft"]["against"]["base"]["hearing"]["difference"] == pytest.approx(-0.75)
    assert rows["top"]["against"]["base"]["reasoning"]["difference"] == pytest.approx(4 / 6), "all three seeds"


def test_seeds_without_a_counterpart_are_not_compared():
    one, other = Answered(ROWS["sft"], {0: said("a")}), Answered(ROWS["top"], {1: said("a")})
    against = results([one, other], SAMPLES, {})["rows"][1]["against"]["sft"]["all"]
    assert against == {"difference": None, "interval": None, "n": 0}


def test_the_table_says_what_the_results_say(found):
    lines = table(found)
    assert lines[0].split() == ["row", "seeds", "hearing", "reasoning", "all", *("over", "SFT:", "hearing"), "over",
                                "SFT:", "reasoning", "over", "SFT:", "all"]  # fmt: skip
    assert lines[1].startswith("Base") and "0.0 [0.0, " in lines[1]
    assert "+25.0 [" in lines[3]
    assert "2 hearing, 2 reasoning, 4 all" in lines[-1]
    assert len({len(line) for line in lines[:-1]}) == 1, "columns are straight"
    text = markdown(found).splitlines()
    assert text[0] == "| row | seeds | hearing | reasoning | all | parity | sum | who |"
    assert all(line.count("|") == 9 for line in text[:5]) and text[2].startswith("| Base | - | 100.0 [")
    place = text.index("Difference from SFT only, in percentage points:")
    assert text[place + 5].startswith("| Top textual + SFT | ") and "| +25.0 [" in text[place + 5]


def test_answers_are_read_from_predictions(tmp_path):
    file = tmp_path / "predictions.parquet"
    rows = [("a", "student", True), ("b", "student", None), ("a", "base", False), ("c", "student", False)]
    pq.write_table(pa.table(dict(zip(("id", "source", "correct"), zip(*rows, strict=True), strict=True))), file)
    assert read_correct(file) == {"a": True, "c": False}
    file.write_bytes(b"PAR1 no")
    with pytest.raises(KdpipeError, match=r"predictions\.parquet: cannot be read .* Remove this file"):
        read_correct(file)
