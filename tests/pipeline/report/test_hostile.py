"""A run whose manifest, models and results mean harm: all of it is text in the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kdpipe.data.ledger_files import Reject
from kdpipe.pipeline.report.page import write_report
from kdpipe.pipeline.report.values import visible
from kdpipe.pipeline.runner import Request

from .reader import Page
from .world import add_evaluation, write_manifest

EVIL = (
    '"\'></td></style></svg><script>window.kdpipe_ran=1</script><img src=x onerror="window.kdpipe_ran=1">'
    "{{ 7 * 7 }}{% raw %}&lt;b&gt;\u202egnp.exe\u2066\x1b[2Jjavascript:alert(1) " + "w" * 300
)
SHOWN = "<script>window.kdpipe_ran=1</script>"
CLIPS = ("2.wav", "javascript:alert(1)", "noise.wav", "silent.wav", "3.wav", ["2.wav", "gone.wav", "5.wav"])


def hostile_page(run: Path, folder: Path) -> Path:
    """The page of a run in which every text that comes from outside is `EVIL`."""
    others = [
        {
            "id": f"{place}{EVIL}",
            "audio": CLIPS[place % len(CLIPS)],
            "question": EVIL,
            "choices": [EVIL, "nothing"],
            "answer": EVIL,
            "task": f"{place % 2}{EVIL}",
            "difficulty": EVIL,
            "split": "test",
        }
        for place in range(9)
    ]
    write_manifest(run, 10, 0, others)
    request = Request(run / "kdpipe.yaml")
    ctx = request.context()
    output = f"<THINK><PLANNING>{EVIL}\x00</PLANNING><{EVIL}></THINK>".replace("{", "{{").replace("}", "}}")
    scores = add_evaluation(ctx, output)
    scores["split"] = EVIL
    scores["by"][EVIL] = scores["by"].pop("difficulty")
    scores["benchmarks"][EVIL] = {EVIL: {"measure": EVIL, "official": {"score": 0.5, "n": 2}}}
    (run / "evaluate" / "scores.json").write_text(json.dumps(scores))
    ctx.ledger("textualize").commit(rejects=[Reject("train-002", EVIL, "k", EVIL, EVIL)])
    lines = (run / "train" / "metrics.jsonl").read_text()
    (run / "train" / "metrics.jsonl").write_text(
        lines.replace('"layer/01"', json.dumps(EVIL)).replace('"sft"', json.dumps(EVIL))
    )
    rows = json.loads((run / "rows" / "results.json").read_text())
    for row in rows["rows"]:
        row |= {
            "title": EVIL,
            "name": EVIL,
            "groups": {EVIL: row["groups"]["hearing"]},
            "tasks": {EVIL: row["tasks"]["order"]},
        }
        row["against"] = {EVIL: {EVIL: {"difference": 0.1, "interval": [0.0, 0.2], "n": 1}}}
    (run / "rows" / "results.json").write_text(json.dumps(rows))
    target = folder / "hostile.html"
    assert write_report(request, target) == []
    return target


def test_everything_from_outside_is_text(run: Path, tmp_path: Path):
    page = Page(hostile_page(run, tmp_path))
    assert page.active() == [] and page.outside() == []
    for name in ("accuracy", "losses", "rows", "disagreement", "rejects", "examples"):
        assert SHOWN in page.sections[name].text, name
    assert "{{ 7 * 7 }}" in page.sections["examples"].text and "49" not in page.table("Forgotten samples")[1][2]
    raw = page.source
    assert not re.search("[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\u200e\u200f]", raw)
    assert "\\u202egnp.exe" in raw and "&lt;script&gt;" in raw and "<script" not in raw


def test_clips_that_are_none_are_said_so(run: Path, tmp_path: Path):
    page = Page(hostile_page(run, tmp_path))
    said = [one.text for one in page.sections["examples"].all("p") if one.attributes.get("class") == "problem"]
    reasons = {match[1] for text in said if (match := re.search(r"\((audio_\w+)\)", text))}
    assert reasons and reasons <= {"audio_missing", "audio_unreadable", "audio_silent"}
    assert all("cannot be shown" in text for text in said)
    assert page.sections["examples"].all("audio"), "the others are there"


def test_what_does_not_print_is_made_visible():
    assert visible("a\u202eb\x1b[2J\x00\ud800") == "a\\u202eb\\x1b[2J\\x00\\ud800"
    assert visible("שלום, 猫\n\té") == "שלום, 猫\n\té"
