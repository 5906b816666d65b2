"""Which students of the table count, without training any."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.data.errors import ConfigError
from kdpipe.pipeline.rows import run
from kdpipe.pipeline.rows.command import rows as command
from kdpipe.pipeline.rows.definition import choose
from kdpipe.pipeline.runner import Request

CONFIG = """\
data: {manifest: m.jsonl}
student: {model: {path: student, dtype: float32}}
teachers: {textual: {model: teacher}}
train: {task_weights: {who: {sft: 0}}}
"""


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    asked = {"audio": "a.wav", "question": "?", "answer": "1", "split": "test"}
    rows = [{"id": name, "task": task, **asked} for name, task in (("a", "who"), ("b", "sum"))]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "kdpipe.yaml").write_text(CONFIG)
    return Request(tmp_path / "kdpipe.yaml")


def predictions(folder: Path) -> None:
    (folder / "evaluate").mkdir(parents=True)
    table = pa.table({"id": ["a", "b"], "source": ["student"] * 2, "correct": [True, False]})
    pq.write_table(table, folder / "evaluate" / "predictions.parquet")


@pytest.fixture
def made(request_: Request, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of students that were brought up to date; all with answers count as fresh."""
    names: list[str] = []

    def bring(request: Request, target: str) -> bool:
        ctx = request.context()
        if target == "evaluate":
            assert (ctx.config.evaluate.model is None) == (ctx.run_folder.name != "base")
            names.append(str(ctx.run_folder.relative_to(ctx.base / "rows")))
            predictions(ctx.run_folder)
        return True

    monkeypatch.setattr(run, "bring_up_to_date", bring)
    monkeypatch.setattr(run, "is_fresh", lambda student: (student.request.context().run_folder / "evaluate").is_dir())
    return names


def test_base_is_asked_once_and_the_others_with_each_seed(request_: Request, made: list[str]) -> None:
    found = run.run_rows(request_, choose(["base", "sft", "ours"]), [0, 4], {"hearing": ["who"]})
    assert made == ["base", "sft/seed-0", "ours/seed-0", "sft/seed-4", "ours/seed-4"]
    assert [(row["name"], row["seeds"]) for row in found["rows"]] == [("base", []), ("sft", [0, 4]), ("ours", [0, 4])]
    assert json.loads((request_.config_file.parent / "rows" / "results.json").read_text()) == found
    assert (request_.config_file.parent / "rows" / "ours" / "seed-4" / "kdpipe.yaml").is_file()


def test_a_model_to_score_in_the_configuration_is_no_student_of_the_rows(request_: Request, made: list[str]) -> None:
    run.run_rows(Request(request_.config_file, ("evaluate.model=other",)), choose(["base", "sft"]), [0], {})
    assert made == ["base", "sft/seed-0"]


def test_rows_of_earlier_calls_count_and_what_cannot_is_named(
    request_: Request, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run.run_rows(request_, choose(["sft", "top"]), [0], {"hearing": ["who"]})
    place = request_.config_file.parent / "rows"
    (place / "sft" / "seed-7").mkdir()
    (place / "sft" / "seed-99999999999999999999").mkdir()
    (place / "sft" / "seed-5").touch()
    (place / "top" / "seed-0" / "evaluate" / "predictions.parquet").write_bytes(b"no")
    made.clear()
    found = run.run_rows(request_, choose(["base"]), [0], {})
    assert made == ["base"]
    assert [(row["name"], row["seeds"]) for row in found["rows"]] == [("base", []), ("sft", [0])]
    assert found["group_tasks"] == {"hearing": ["who"]}, "as the last time"
    said = capsys.readouterr().out
    assert "Left out of the table, not fresh under this configuration: sft, seed 7" in said
    assert "Left out of the table: top, seed 0" in said and "predictions.parquet: cannot be read" in said


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"split": "test", "group_tasks": {"g": "who"}}', '{"split": "test", "group_tasks": {"g": ["x"]}}'],
)
def test_groups_of_a_damaged_or_other_table_are_not_taken(request_: Request, made: list[str], text: str) -> None:
    place = request_.config_file.parent / "rows"
    place.mkdir()
    (place / "results.json").write_text(text)
    assert run.run_rows(request_, choose(["base"]), [0], {})["group_tasks"] == {}


def test_groups_of_unknown_tasks_are_refused_before_anything_runs(request_: Request, made: list[str]) -> None:
    with pytest.raises(ConfigError, match="no question of split 'test' has the task 'when'; there are sum, who"):
        run.run_rows(request_, choose(["base"]), [0], {"hearing": ["when"]})
    assert made == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--seeds", "0,x"], "write whole numbers"),
        (["--seeds", ""], "write whole numbers"),
        (["--rows", "best"], "'best' is no row"),
        (["--group", "hearing"], "write NAME=TASK,TASK"),
        (["--group", "all=who"], "is the group of all tasks"),
        (["--group", "a=who", "--group", "a=sum"], "is given twice"),
    ],
)
def test_options_that_say_nothing_are_refused(request_: Request, words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        command.main([*words, "-c", str(request_.config_file), "--dry-run"], standalone_mode=False)
