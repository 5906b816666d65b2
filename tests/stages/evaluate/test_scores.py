"""Scores: predictions from outputs, accuracy by task, and the files made from the ledger."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
import pytest

from kdpipe.data.errors import Rejected
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualTeacherConfig,
)
from kdpipe.stages.evaluate.results import assemble, assembled, to_table
from kdpipe.stages.evaluate.run import prediction_of
from kdpipe.stages.evaluate.scores import by_columns, pairs, report, score
from kdpipe.stages.textualize.parts import Parts


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("<THINK><SUMMARY>Two.</SUMMARY></THINK><RESPONSE> two </RESPONSE>", "two"),
        ("<think>hm</think><response>two</response>", "two"),
        ("<THINK>...</THINK><RESPONSE>tw", "tw"),
        ("<THINK><PLANNING>Count the tones and", ""),
        ("</THINK> two", ""),
        ("  two \n", "two"),
        ("3 < 4", "3 < 4"),
        ("", ""),
    ],
)
def test_prediction_is_the_response_or_an_untagged_output(output, expected):
    assert prediction_of(output) == expected


def record(name: str, source: str, correct: bool | None, task: str | None = "count", prediction: str = "two") -> dict:
    texts = {"key": "k", "answer": "two", "prediction": prediction, "output": prediction, "finish_reason": "stop"}
    return {"id": name, "source": source, "task": task, "correct": correct, "tokens": 2, **texts}


def test_scores_count_by_task():
    records = [
        record("a", "base", True),
        record("b", "base", False),
        record("c", "base", False, "parity", ""),
        record("d", "base", None),
        record("e", "base", True, None),
    ]
    scores = score(records, rejected=2)
    by_task = scores.pop("by_task")
    low, high = scores.pop("interval")
    assert 0 <= low < 0.5 < high <= 1
    for counted in by_task.values():
        low, high = counted.pop("interval")
        assert 0 <= low < high <= 1 and low <= counted["accuracy"] <= high
    assert scores == {"accuracy": 0.5, "n": 4, "correct": 2, "unanswered": 1, "unscored": 1, "rejected": 2}
    assert by_task == {
        "all": {"accuracy": 1.0, "n": 1, "correct": 1, "unanswered": 0},
        "count": {"accuracy": 0.5, "n": 2, "correct": 1, "unanswered": 0},
        "parity": {"accuracy": 0.0, "n": 1, "correct": 0, "unanswered": 1},
    }
    assert score([], 0)["accuracy"] is None


def test_report_sets_base_beside_student():
    records = {
        "base": [record(f"{i}", "base", i >= 6) for i in range(8)] + [record("p", "base", True, "parity")],
        "student": [record(f"{i}", "student", i < 7) for i in range(8)] + [record("p", "student", True, "parity")],
    }
    scores = {"base": score(records["base"], 0), "student": score(records["student"], 1), "paired": pairs(records)}
    assert report(scores) == [
        "task         n               base %            student %            student - base      p",
        "count        8   25.0 [ 0.0,  50.0]   87.5 [62.5, 100.0]   +62.5 [ +12.5, +100.0]  0.125",
        "parity       1  100.0 [20.7, 100.0]  100.0 [20.7, 100.0]    +0.0 [ -79.3,  +79.3]  1.000",
        "all          9   33.3 [ 0.0,  66.7]   88.9 [66.7, 100.0]   +55.6 [ +11.1, +100.0]  0.125",
        "6 gained, 1 forgotten",
        "student: 1 rejected",
    ]
    del scores["base"], scores["paired"]
    assert report(scores)[0] == "task         n            student %"


def test_pairs_are_of_scored_answers_that_both_gave():
    records = {
        "base": [record("a", "base", True), record("b", "base", None), record("c", "base", False, "parity")],
        "student": [record("a", "student", False), record("b", "student", True), record("d", "student", True)],
    }
    found = pairs(records)
    assert (found["all"]["n"], found["all"]["forgotten"], set(found["by_task"])) == (1, 1, {"count"})
    assert pairs({"student": records["student"]}) is None


def test_answers_are_counted_by_columns_of_the_manifest(ctx):
    extras = {"a": {"category": ["speech", "music"], "difficulty": "hard"}, "b": {"category": "music"}, "c": {}}
    samples = {name: dataclasses.replace(ctx.manifest.by_id[name], extra=extra) for name, extra in extras.items()}
    answers = [record("a", "student", True), record("b", "student", False), record("c", "student", True)]
    found = by_columns(samples, {"student": answers})
    shown = {
        column: {value: (one["student"]["correct"], one["student"]["n"]) for value, one in of.items()}
        for column, of in found.items()
    }
    assert shown == {"category": {"music": (1, 2), "speech": (1, 1)}, "difficulty": {"hard": (1, 1)}}


@pytest.fixture
def ctx(tmp_path):
    asked = {"audio": "a.wav", "question": "?", "answer": "two", "task": "count", "split": "test"}
    rows = [{"id": name, **asked} for name in "cab"]
    rows.append({"id": "t", "audio": "a.wav", "question": "?"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ModelConfig("none")
    config = Config(
        DataConfig("manifest.jsonl"),
        StudentConfig(model),
        TeachersConfig(TextualTeacherConfig(model)),
        evaluate=EvaluateConfig(),
    )
    return Context(config, tmp_path, say=lambda line: None)


def commit(ctx: Context, records: list[dict[str, Any]], rejected: Sequence[tuple[str, str]] = ()) -> None:
    todo = [Wanted(r["id"], r["source"], {"x": r["id"]}) for r in records]
    refused = [Wanted(name, source, {"x": name}) for name, source in rejected]
    parts = Parts(ctx, "evaluate", [*todo, *refused], size=2, to_table=to_table)
    for want, values in zip(todo, records, strict=True):
        parts.done(want, values | {"key": want.key}, tokens=1, content="c")
    for want in refused:
        parts.reject(want, Rejected("audio_missing", "gone"))


def test_assemble_writes_what_the_ledger_holds_of_the_split(ctx):
    assert not assembled(ctx)
    said = {"student": "two", "base": "three"}
    records = [record(name, source, None, prediction=said[source]) for source in said for name in "abt"]
    commit(ctx, records, [("c", "base"), ("c", "student")])
    scores = assemble(ctx)
    assert assembled(ctx)
    folder = ctx.folder("evaluate")
    assert json.loads((folder / "scores.json").read_text()) == scores
    assert (scores["split"], scores["samples"]) == ("test", 3)
    assert (scores["base"]["accuracy"], scores["student"]["accuracy"]) == (0.0, 1.0)
    assert (scores["base"]["n"], scores["base"]["rejected"]) == (2, 1)
    table = pq.read_table(folder / "predictions.parquet").to_pylist()
    assert [(row["source"], row["id"]) for row in table] == [
        ("base", "a"),
        ("base", "b"),
        ("student", "a"),
        ("student", "b"),
    ]
    assert [row["correct"] for row in table] == [False, False, True, True], "judged by the manifest, not as stored"
    assert (scores["paired"]["all"]["gained"], (folder / "forgotten.jsonl").read_text()) == (2, "")
    (folder / "scores.json").unlink()
    assert not assembled(ctx)
    assert assemble(ctx) == scores


def test_what_was_forgotten_is_listed_with_both_answers(ctx):
    said = {("a", "base"): "two", ("a", "student"): "<b>three", ("b", "base"): "two", ("b", "student"): "two"}
    commit(ctx, [record(name, source, None, prediction=text) for (name, source), text in said.items()])
    assert assemble(ctx)["paired"]["all"]["forgotten"] == 1
    lines = (ctx.folder("evaluate") / "forgotten.jsonl").read_text().splitlines()
    told = {"id": "a", "task": "count", "question": "?", "choices": [], "answer": "two"}
    assert [json.loads(line) for line in lines] == [{**told, "base": "two", "student": "<b>three"}]


@pytest.fixture
def done(ctx):
    """Results of samples a and b; c was rejected."""
    commit(ctx, [record(name, source, True) for source in ("base", "student") for name in "ab"], [("c", "base")])
    assemble(ctx)
    assert assembled(ctx)
    return ctx


def again(ctx: Context, **changes: Any) -> Context:
    """The run as the next command sees it."""
    return Context(dataclasses.replace(ctx.config, **changes), ctx.base, ctx.say)


def test_results_name_what_they_were_made_from(done):
    scores = json.loads((done.folder("evaluate") / "scores.json").read_text())
    assert len(scores["made_from"]) == 32
    assert assembled(again(done)), "another process comes to the same digest"


def test_results_are_not_those_of_new_answers(done):
    want = Wanted("a", "student", {"x": "another model"})
    parts = Parts(done, "evaluate", [want], size=1, to_table=to_table)
    parts.done(want, record("a", "student", False, prediction="three") | {"key": want.key}, tokens=1, content="d")
    assert not assembled(done)
    assert assemble(done)["student"]["correct"] == 1
    assert assembled(done)


def test_results_are_not_those_of_new_rejections(done):
    commit(done, [], [("c", "student")])
    assert not assembled(done)
    assert assemble(done)["student"]["rejected"] == 1


@pytest.mark.parametrize("change", [{"task": "parity"}, {"split": "train"}, {"id": "d"}])
def test_results_are_not_those_of_another_manifest(done, change):
    manifest = done.base / "manifest.jsonl"
    first, *others = manifest.read_text().splitlines()
    manifest.write_text("\n".join([json.dumps(json.loads(first) | change), *others]) + "\n")
    assert not assembled(again(done))


def test_results_are_not_those_of_another_split_or_of_fewer_models(done):
    config = done.config
    assert not assembled(again(done, data=dataclasses.replace(config.data, eval_split="train")))
    manifest = done.base / "manifest.jsonl"
    text = manifest.read_text()
    manifest.write_text(text.replace('"test"', '"dev"'))
    assert not assembled(again(done, data=dataclasses.replace(config.data, eval_split="dev"))), "the same by a new name"
    manifest.write_text(text)
    student_alone = again(done, evaluate=dataclasses.replace(config.evaluate, base=False))
    assert not assembled(student_alone)
    assert "base" not in assemble(student_alone) and assembled(student_alone) and not assembled(done)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", "{}", '{"split": "test"}', "\xff"])
def test_scores_that_cannot_be_read_or_tell_no_origin_are_made_again(done, text):
    file = done.folder("evaluate") / "scores.json"
    good = file.read_bytes()
    file.write_bytes(text.encode("latin-1"))
    assert not assembled(done)
    assemble(done)
    assert file.read_bytes() == good and assembled(done)
    for name in ("predictions.parquet", "forgotten.jsonl"):
        (done.folder("evaluate") / name).unlink()
        assert not assembled(done)
        assemble(done)
        assert assembled(done)
    file = done.folder("evaluate") / "predictions.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    assert not assembled(done), "a file that was cut off"


def test_the_rows_of_a_benchmark_are_scored_by_its_rule_and_written_as_it_reads_them(tmp_path):
    """One is right, one has a wrong choice's word, one was rejected: only the strict score counts the last."""
    item = {
        "question": "What?",
        "choices": ["a dog", "a cat"],
        "answer": "a dog",
        "task": "sound",
        "difficulty": "hard",
    }
    rows = [
        {"id": f"mmau-{name}", "audio": "a.wav", "question": "What?", "choices": item["choices"], "answer": "a dog",
         "split": "test", "benchmark": "mmau", "difficulty": "hard", "item": json.dumps(item | {"id": name})}
        for name in "xyz"
    ]  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ModelConfig("none")
    config = Config(
        DataConfig("manifest.jsonl"),
        StudentConfig(model),
        TeachersConfig(TextualTeacherConfig(model)),
        evaluate=EvaluateConfig(base=False),
    )
    ctx = Context(config, tmp_path, say=(said := []).append)
    answers = [
        record("mmau-x", "student", None, prediction="A dog!"),
        record("mmau-y", "student", None, prediction="dog, a cat"),
    ]
    commit(ctx, answers, [("mmau-z", "student")])
    scores = assemble(ctx)
    assert scores["benchmarks"]["mmau"]["student"] == {
        "measure": "accuracy",
        "official": {"score": 0.5, "n": 2},
        "strict": {"score": pytest.approx(1 / 3), "n": 3},
    }
    assert scores["by"]["difficulty"]["hard"]["student"]["n"] == 2
    (file,) = (ctx.folder("evaluate") / "official" / "mmau" / "student").iterdir()
    assert [line.get("model_output") for line in json.loads(file.read_text())] == ["A dog!", "dog, a cat", None]
    assert "mmau, student: accuracy: official 50.00 % of 2, strict 33.33 % of 3" in said
