"""The page of a whole run: what stands in it agrees with the files it was made from, and it needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
import wave
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kdpipe.data.store import open_store
from kdpipe.pipeline.cli import main
from kdpipe.pipeline.report.page import MARK, write_report
from kdpipe.pipeline.report.tokens import taught
from kdpipe.pipeline.runner import Request

from .reader import Page


@pytest.fixture(scope="module")
def read(page: Path) -> Page:
    return Page(page)


def scores_of(run: Path) -> dict:
    return json.loads((run / "evaluate" / "scores.json").read_text())


def shown(share: float) -> str:
    return f"{100 * share:.1f} %"


def test_all_sections_are_there_in_order(read: Page):
    assert list(read.sections) == ["flow", "losses", "accuracy", "rows", "disagreement", "rejects", "examples"]
    for name, section in read.sections.items():
        assert section.all("h2") and section.attributes["aria-labelledby"] == f"{name}-h"
    assert not [one for one in read.elements if one.attributes.get("class") in ("problem", "missing")]
    links = [one.attributes["href"] for one in read.elements if one.tag == "a"]
    ids = {one.attributes["id"] for one in read.elements if "id" in one.attributes}
    assert {link[1:] for link in links} <= ids and len(links) == 8
    assert len(ids) == sum("id" in one.attributes for one in read.elements), "an id stands twice"


def test_the_page_needs_nothing_else_and_runs_nothing(read: Page):
    assert read.outside() == [] and read.active() == []
    (policy,) = [one.attributes["content"] for one in read.elements if one.attributes.get("http-equiv")]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "script" not in policy
    (style,) = [one.text for one in read.elements if one.tag == "style"]
    hashed = base64.b64encode(sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{hashed}'" in policy
    assert len(read.source) < 1_500_000


def test_the_head_says_what_came_out(read: Page, original: Path):
    scores = scores_of(original)
    (result,) = [one.text for one in read.elements if one.attributes.get("class") == "result"]
    pair = scores["paired"]["all"]
    assert shown(scores["student"]["accuracy"]).replace(" %", "\u00a0%") in result
    assert f"{100 * pair['difference']:+.1f} points on the 23" in result
    assert f"{pair['gained']} gained, {pair['forgotten']} forgotten" in result and f"{pair['p_value']:.3f}" in result
    assert result.startswith("No clear difference." if pair["interval"][0] <= 0 else "The student is better.")
    facts = [one.text for one in read.elements if one.tag == "dd"]
    assert str(original) in facts and "top 1, layer 0.05, acoustic 0.05, sft 0.5" in facts


def test_the_flow_counts_what_lies_there(read: Page, original: Path):
    boxes = [one for one in read.sections["flow"].all("li")]
    assert [box.all("span")[0].text for box in boxes] == [
        "manifest",
        "textualize",
        "cache-teachers",
        "train",
        "evaluate",
    ]
    counts = [dict(box.all("table")[0].rows()) for box in boxes]
    assert counts[0] == {"samples": "34", "training (train)": "10", "evaluation (test)": "24"}
    assert counts[1] == {"traces": "9", "rejected": "1"}
    assert counts[2] == {"acoustic": "9", "targets": "9", "textual": "9", "rejected": "0"}
    assert counts[3]["steps"] == "40" and counts[3]["samples trained on"] == "9" and counts[3]["steps skipped"] == "1"
    assert counts[4] == {"answers, base": "23", "answers, student": "23", "rejected": "1"}


def test_losses_are_drawn_with_their_last_values(read: Page, original: Path):
    lines = [json.loads(line) for line in (original / "train" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "terms" in line][-1]
    held = [line["validation"] for line in lines if "validation" in line][-1]
    figures = {one.all("strong")[0].text: one for one in read.sections["losses"].all("figure")}
    whole = figures["Loss, all terms weighted"].text
    assert f"training: last {last['loss']:.3g}" in whole and f"held out: last {held['loss']:.3g}" in whole
    assert f"last {last['terms']['sft']:.3g}" in figures["Cross-entropy on the traces (sft)"].text
    assert "its weight is 0.05" in figures["Textual teacher, inner layers"].text
    assert {"Learning rate", "Gradient norm", "By student layer: acoustic teacher"} <= figures.keys()
    layers = figures["By student layer: textual teacher"]
    assert len([one for one in layers.all("path") if "stroke-opacity" in one.attributes]) == 3 + 3, "curves and legend"
    for figure in figures.values():
        (drawing,) = [one for one in figure.all("svg") if one.attributes.get("role") == "img"]
        assert "over steps" in drawing.attributes["aria-label"]
        texts = [one.text for one in drawing.all("text")]
        assert "step" in texts and "0" in texts and len(texts) >= 6
        assert not re.search("nan|inf", "".join(one.attributes.get("d", "") for one in drawing.all("path")))


def test_accuracy_agrees_with_the_scores(read: Page, original: Path):
    scores = scores_of(original)
    rows = {row[0]: row[1:] for row in read.table("By task, as a table")}
    assert list(rows) == ["task", "all", "counting", "order", "pitch"]
    for task in ("counting", "order", "pitch"):
        base, student = (scores[name]["by_task"][task] for name in ("base", "student"))
        assert rows[task][0] == str(base["n"])
        assert (rows[task][1], rows[task][3]) == (shown(base["accuracy"]), shown(student["accuracy"]))
        low, high = (f"{100 * end:.1f}" for end in student["interval"])
        assert rows[task][4] == f"{low} to {high} %"
    pairs = {row[0]: row for row in read.table("Differences as a table")}
    pair = scores["paired"]["by_task"]["order"]
    assert pairs["order"][2] == f"{100 * pair['difference']:+.1f}".replace("-", "−")
    assert pairs["order"][5:] == [str(pair["gained"]), str(pair["forgotten"])]
    bench = read.table("Benchmarks")
    assert [row[1] for row in bench[1:]] == ["base", "student"] and bench[1][4] == "23" and bench[1][6] == "25"
    assert [row[0] for row in read.table("By difficulty, as a table")] == ["difficulty", "easy", "hard"]


def test_what_was_forgotten_is_listed_with_both_answers(read: Page, original: Path):
    listed = [json.loads(line) for line in (original / "evaluate" / "forgotten.jsonl").read_text().splitlines()]
    rows = read.table("Forgotten samples")[1:]
    assert [row[0] for row in rows] == [line["id"] for line in listed]
    assert rows[0][3:] == [listed[0]["answer"], listed[0]["base"], listed[0]["student"]]
    assert f"{len(listed)} samples." in read.sections["accuracy"].text
    assert len(listed) == scores_of(original)["paired"]["all"]["forgotten"]


def test_the_rows_are_those_of_the_file(read: Page, original: Path):
    given = json.loads((original / "rows" / "results.json").read_text())["rows"]
    rows = read.table("The rows, By group")[1:]
    assert [row[0] for row in rows] == [row["title"] for row in given] and len(rows) == 7
    assert rows[1][1] == "0, 1, 2" and rows[1][2] == shown(given[1]["groups"]["reasoning"]["accuracy"])
    assert rows[1][4] == str(given[1]["groups"]["reasoning"]["n"])
    differences = {row[0]: row[1] for row in read.table("Differences from sft")[1:]}
    last = given[-1]["against"]["sft"]["reasoning"]["difference"]
    assert differences[given[-1]["title"]] == f"{100 * last:+.1f}".replace("-", "−") and len(differences) == 6
    assert len(read.table("Differences from base")) == 7
    plots = [one for one in read.sections["rows"].all("svg") if one.attributes.get("role") == "img"]
    assert len(plots) == 3, "reasoning, hearing, all"
    assert all(len(plot.all("circle")) == 7 + 7 * 3 for plot in plots), "and a small dot for each seed"


def test_tokens_are_shaded_by_what_the_teacher_gives_them(read: Page, original: Path):
    store = open_store(original)
    cards = read.sections["disagreement"].all("article")
    ids = [card.all("bdi")[0].text for card in cards]
    means = {}
    for name in store:
        top, targets = store[name].textual.top, store[name].target_ids.numpy()
        hit = top.ids.numpy() == targets[:, None]
        kept = np.where(hit, top.logprob.numpy(), -np.inf).max(1)
        least = np.where(np.isfinite(top.logprob.numpy()), top.logprob.numpy(), np.inf).min(1)
        tail = np.log(top.tail().numpy().sum(1))
        means[name] = float(np.where(hit.any(1), kept, np.minimum(least, tail)).mean())
    assert ids[0] == min(means, key=lambda name: (means[name], name))
    assert f"{means[ids[0]]:.2f}".replace("-", "−") in cards[0].text
    spans = [one for one in cards[0].all("span") if re.fullmatch("t[0-3]", one.attributes.get("class", ""))]
    assert len(spans) == len(store[ids[0]].target_ids)
    assert "".join(span.text for span in spans).startswith("<THINK><PLANNING>Listen for")
    assert all("probability" in span.attributes["title"] and "expected" in span.attributes["title"] for span in spans)
    assert "9 of 9 stored samples were looked at" in read.sections["disagreement"].text
    assert len(
        {
            tuple(token.text for token in one.tokens)
            for one in taught(Request(original / "kdpipe.yaml").context()).samples
        }
    ) == len(cards)


def test_the_metrics_tell_how_far_student_and_teachers_are_apart(read: Page):
    rows = {row[0]: row for row in read.table("Student against teachers")[1:]}
    assert list(rows) == ["top", "layer/01", "layer/02", "layer/03", "acoustic/01", "acoustic/02", "acoustic/03"]
    assert rows["top"][1] == "divergence" and rows["acoustic/01"][1] == "distance"
    assert float(rows["top"][2]) > float(rows["top"][3]) and rows["top"][6] == "0.9"


def test_rejections_stand_by_stage_and_reason(read: Page):
    rows = read.table("Rejections by stage and reason")[1:]
    assert rows == [["textualize", "audio_silent", "1"], ["evaluate", "audio_missing", "2"]]
    listed = [one.text for one in read.sections["rejects"].all("details")]
    assert "train-001" in listed[0] and "below -80 dBFS" in listed[0] and "all of 1" in listed[0]
    assert "test-023 (base)" in listed[1] and "test-023 (student)" in listed[1]


def test_examples_hold_trace_sound_and_pictures(read: Page, original: Path):
    section = read.sections["examples"]
    titles = [one.text for one in section.all("h3")]
    assert [title.split(":")[0].split(" (")[0] for title in titles] == [
        "Gained",
        "Forgotten",
        "Both right",
        "Both wrong",
    ]
    pair = scores_of(original)["paired"]["all"]
    assert titles[0].endswith(f"(2 of {pair['gained']})")
    for card in section.all("article"):
        assert "Listen for the tones" in card.text and "PLANNING" in card.text and "Right answer:" in card.text
        (sound,) = card.all("audio")
        with wave.open(io.BytesIO(base64.b64decode(sound.attributes["src"].partition(",")[2]))) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
            assert 0.7 <= file.getnframes() / 16_000 <= 1.75
        (image,) = card.all("img")
        assert image.attributes["alt"].startswith("Spectrogram of ") and "seconds" in image.attributes["alt"]
        assert base64.b64decode(image.attributes["src"].partition(",")[2]).startswith(b"\x89PNG")
        assert any(one.attributes.get("class") == "wave" for one in card.all("svg"))


def kdpipe(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["report", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_the_command_writes_replaces_its_own_and_nothing_else(run: Path, tmp_path: Path):
    config, target = str(run / "kdpipe.yaml"), tmp_path / "out" / "r.html"
    assert "does not exist. Make it first" in kdpipe("-c", config, "-o", str(target), code=2)
    target.parent.mkdir()
    assert "is a folder" in kdpipe("-c", config, "-o", str(target.parent), code=2)
    assert "Wrote" in kdpipe("-c", config, "-o", str(target), "--no-audio")
    quiet = Page(target)
    assert not quiet.sections["examples"].all("audio") and "(--no-audio)" in quiet.sections["examples"].text
    before = target.read_bytes()
    kdpipe("-c", config, "-o", str(target))
    assert MARK in target.read_text() and target.read_bytes() != before and list(target.parent.iterdir()) == [target]
    target.write_text("my own notes")
    assert "is no page of kdpipe's" in kdpipe("-c", config, "-o", str(target), code=2)
    assert target.read_text() == "my own notes"
    kdpipe("-c", config, "-o", str(target), "--force")
    assert Page(target).sections


def test_what_cannot_be_written_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "r.html"
    write_report(Request(run / "kdpipe.yaml"), target, audio=False)
    before = target.read_bytes()

    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in kdpipe("-c", str(run / "kdpipe.yaml"), "-o", str(target), code=2)
    assert target.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"run", "r.html"}


def test_rows_can_lie_elsewhere(run: Path, tmp_path: Path):
    config, target = str(run / "kdpipe.yaml"), str(tmp_path / "r.html")
    (run / "rows" / "results.json").rename(tmp_path / "mine.json")
    kdpipe("-c", config, "-o", target, "--no-audio")
    assert "rows" not in Page(Path(target)).sections
    kdpipe("-c", config, "-o", target, "--no-audio", "--rows", str(tmp_path / "mine.json"))
    assert "The rows" in Page(Path(target)).sections["rows"].text
    assert "there is no such file" in kdpipe("-c", config, "-o", target, "--rows", str(tmp_path / "no.json"), code=2)


def test_nothing_in_the_run_folder_changes(run: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    write_report(Request(run / "kdpipe.yaml"), tmp_path / "r.html", audio=False)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
