"""Runs of which something is missing or damaged: the page says so in its place, and shows the rest."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdpipe.pipeline.cli import main
from kdpipe.pipeline.report.page import gather, render, write_report
from kdpipe.pipeline.runner import Request

from .reader import Element, Page


def page_of(run: Path, problems: int = 0) -> Page:
    target = run.parent / "r.html"
    said = write_report(Request(run / "kdpipe.yaml"), target, audio=False)
    assert len(said) == problems, said
    return Page(target)


def troubles(section: Element, kind: str) -> list[str]:
    return [one.text for one in section.all("p") if one.attributes.get("class") == kind]


def test_a_run_that_has_only_traces(run: Path):
    for name in ("cache-teachers", "train", "evaluate", "rows"):
        shutil.rmtree(run / name)
    page = page_of(run)
    for name in ("losses", "accuracy", "disagreement", "examples"):
        assert troubles(page.sections[name], "missing"), name
        assert not troubles(page.sections[name], "problem"), name
    assert "audio_silent" in page.sections["rejects"].text and "rows" not in page.sections
    boxes = page.sections["flow"].all("li")
    assert "has not run" in boxes[2].text and "traces" in boxes[1].text
    assert not [one for one in page.elements if one.attributes.get("class") == "result"]


def test_a_run_of_which_nothing_is_done(run: Path):
    for name in ("textualize", "cache-teachers", "train", "evaluate", "rows"):
        shutil.rmtree(run / name)
    result = CliRunner().invoke(main, ["report", "-c", str(run / "kdpipe.yaml"), "-o", str(run / "r.html")])
    assert result.exit_code == 2 and "nothing has run yet" in result.output and "kdpipe run -c" in result.output
    assert not (run / "r.html").exists()


def test_without_its_manifest(run: Path):
    (run / "manifest.jsonl").unlink()
    page = page_of(run)
    (problem,) = troubles(page.sections["examples"], "problem")
    assert "Questions and clips cannot be shown." in problem and "manifest.jsonl" in problem
    assert "damaged" in page.sections["flow"].all("li")[0].attributes["class"]
    assert page.table("By task, as a table") and page.sections["disagreement"].all("article")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 3])


def garble(path: Path) -> None:
    path.write_bytes(b"\x00\xff{]" * 40)


@pytest.mark.parametrize("harm", [cut, garble])
@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("evaluate/scores.json", "accuracy"),
        ("evaluate/predictions.parquet", "examples"),
        ("evaluate/forgotten.jsonl", "accuracy"),
        ("rows/results.json", "rows"),
        ("cache-teachers/HEAD", "disagreement"),
    ],
)
def test_a_damaged_file_is_named_in_its_place(run: Path, file: str, section: str, harm: Callable[[Path], None]):
    harm(run / file)
    page = page_of(run, 1)
    (problem,) = troubles(page.sections[section], "problem")
    assert file in problem and ("emove" in problem or "again" in problem)
    others = {"accuracy", "examples", "rows", "losses"} - {section}
    assert not [name for name in others if troubles(page.sections[name], "problem")]


def test_torn_metrics_are_shown_up_to_there_and_others_are_refused(run: Path):
    file = run / "train" / "metrics.jsonl"
    text = file.read_text()
    number = len(text[: len(text) // 2].splitlines())
    file.write_text(text[: len(text) // 2 - 5])
    losses = page_of(run, 1).sections["losses"]
    assert losses.all("figure")
    assert f"metrics.jsonl: line {number} is no line of metrics" in troubles(losses, "problem")[0]
    garble(file)
    (problem, *_) = troubles(page_of(run, 2).sections["losses"], "problem")
    assert "metrics.jsonl: its first line is no line of metrics" in problem


def test_a_damaged_part_of_the_store_hides_no_other(run: Path):
    parts = sorted((run / "cache-teachers" / "parts").glob("*.zarr"))
    for part in parts[::2]:
        for file in (part / "top").rglob("*"):
            if file.is_file() and file.stat().st_size > 100:
                garble(file)
    section = page_of(run).sections["disagreement"]
    assert troubles(section, "problem") or section.all("article")
    for part in parts:
        shutil.rmtree(part)
    problems = troubles(page_of(run).sections["disagreement"], "problem")
    assert problems and all("cache-teachers" in text or ".zarr" in text for text in problems)


def test_only_one_model_was_scored(run: Path):
    file = run / "evaluate" / "scores.json"
    scores = json.loads(file.read_text())
    del scores["base"], scores["paired"]
    file.write_text(json.dumps(scores))
    page = page_of(run)
    (result,) = [one.text for one in page.elements if one.attributes.get("class") == "result"]
    assert "the base was not scored" in result and "Differences" not in page.sections["accuracy"].text
    assert page.table("By task, as a table")[1][2:4] == ["–", "–"]


def test_a_list_that_is_of_another_evaluation_is_said_so(run: Path):
    file = run / "evaluate" / "forgotten.jsonl"
    file.write_text(file.read_text().partition("\n")[0] + "\n")
    (said,) = troubles(page_of(run).sections["accuracy"], "problem")
    assert "scores.json counts 4" in said and "1 sample" in page_of(run).sections["accuracy"].text


def test_scores_of_an_earlier_release(run: Path):
    file = run / "evaluate" / "scores.json"
    scores = json.loads(file.read_text())
    for name in ("format", "paired", "by", "benchmarks"):
        del scores[name]
    for name in ("base", "student"):
        del scores[name]["interval"]
    file.write_text(json.dumps(scores))
    (run / "evaluate" / "forgotten.jsonl").unlink()
    page = page_of(run)
    assert page.table("By task, as a table")[1][3] == "–"
    assert len(page.table("Forgotten samples")) > 1, "found in the predictions"


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    [1],
    [3, 1],
    {},
    {"a": {}},
]


def odd(value: Any, dice: random.Random) -> Any:
    """The value with some of what is in it replaced by what does not belong there."""
    if dice.random() < 0.06:
        return dice.choice(ODD)
    if isinstance(value, dict):
        return {name: odd(inner, dice) for name, inner in value.items() if dice.random() > 0.03}
    return [odd(inner, dice) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(12))
def test_odd_values_break_no_page(run: Path, seed: int):
    dice = random.Random(seed)
    for name in ("evaluate/scores.json", "rows/results.json"):
        file = run / name
        file.write_text(json.dumps(odd(json.loads(file.read_text()), dice)))
    for name in ("train/metrics.jsonl", "evaluate/forgotten.jsonl"):
        file = run / name
        lines = (odd(json.loads(line), dice) for line in file.read_text().splitlines())
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(run / "cache-teachers")
    (run / "evaluate" / "predictions.parquet").unlink()
    ctx = Request(run / "kdpipe.yaml").context()
    text = render(gather(ctx, run / "kdpipe.yaml", run / "rows" / "results.json", audio=False))
    (run / "r.html").write_text(text)
    assert set(Page(run / "r.html").sections) >= {"flow", "losses", "accuracy", "rows"}
    assert ">nan<" not in text and "Infinity" not in text
