"""Files of a model that are removed while a stage runs: after it was found and hashed, before it is loaded."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kdpipe.data.errors import KdpipeError
from kdpipe.pipeline.plan import STAGES, make_plans
from kdpipe.pipeline.runner import Request, bring_up_to_date
from kdpipe.stages.textualize import run as textualize
from kdpipe.stages.train import run as train

TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>A tone.</CAPTION><REASONING>One tone.</REASONING>"
    "<SUMMARY>One.</SUMMARY></THINK><RESPONSE>one</RESPONSE>"
)
CONFIG = """\
data: {manifest: manifest.jsonl}
student: {model: {path: student, dtype: float32}}
teachers: {textual: {model: {path: teacher, dtype: float32}}}
"""


CHANGED = "{}: changed, added or removed since the command was started; .* run the command again"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, family) -> Path:
    """Two runs with models of their own: `new`, of which nothing is made, and `traced`, whose manifest brings traces
    and of which all is made but the teachers' outputs and the student."""
    folder = tmp_path_factory.mktemp("removed")
    given = {"description": "a tone", "trace": TRACE}
    for name, more in (("new", {}), ("traced", given)):
        shutil.copytree(family.qwen2_5_omni, folder / name / "student")
        shutil.copytree(family.teacher, folder / name / "teacher")
        rows = []
        for number in range(2):
            tone = 0.3 * np.sin(np.arange(8_000) * 0.1 * (number + 1))
            soundfile.write(folder / name / f"{number}.wav", tone, 16_000)
            rows.append(
                {"id": f"s{number}", "audio": f"{number}.wav", "question": "How many?", "answer": "one", **more}
            )
        rows.append({**rows[0], "id": "held-out", "split": "test"})
        (folder / name / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / name / "kdpipe.yaml").write_text(CONFIG)
    bring_up_to_date(Request(folder / "traced" / "kdpipe.yaml"), "textualize")
    return folder


@pytest.fixture(scope="module")
def cached(made: Path) -> Path:
    """The same, and what the teachers say of the run with traces is cached."""
    folder = made.with_name("cached")
    shutil.copytree(made / "traced", folder / "traced")
    bring_up_to_date(Request(folder / "traced" / "kdpipe.yaml"), "cache-teachers")
    return folder


@pytest.mark.parametrize(
    ("run", "stage", "removed", "why"),
    [
        ("new", "textualize", "student/tokenizer.json", "student: the tokenizer in .* Restore its files"),
        ("new", "textualize", "student/model.safetensors", None),
        ("traced", "cache-teachers", "student/tokenizer_config.json", None),
        ("traced", "cache-teachers", "teacher/tokenizer.json", "teacher: the tokenizer in .* Restore its files"),
        ("traced", "cache-teachers", "teacher/model.safetensors", "teacher: the weights in .* Restore the checkpoint"),
        ("traced", "cache-teachers", "teacher/tokenizer_config.json", None),
    ],
)
def test_a_stage_says_what_is_gone_and_records_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, stage: str, removed: str, why: str | None
) -> None:
    """`why` is None where the model could be loaded without the file, and would be another one."""
    monkeypatch.setattr(textualize, "open_engine", lambda *arguments, **options: nullcontext())
    _without(shutil.copytree(made / run, tmp_path / "run"), stage, removed, why)


def test_training_does_not_begin_from_another_student(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file goes when the stage has looked at what there is."""
    folder, name = shutil.copytree(cached / "traced", tmp_path / "run"), "student/generation_config.json"
    ctx, load = Request(folder / "kdpipe.yaml").context(), train._student

    def late(*arguments: Any) -> Any:
        (folder / name).unlink()
        return load(*arguments)

    monkeypatch.setattr(train, "_student", late)
    with pytest.raises(KdpipeError, match=CHANGED.format(name)):
        STAGES["train"].run(ctx, make_plans(ctx, "train")["train"].todo)
    assert not list(ctx.ledger("train").rows()) and not (folder / "train" / "student").exists()


def _without(folder: Path, stage: str, removed: str, why: str | None) -> None:
    ctx = Request(folder / "kdpipe.yaml").context()
    todo = make_plans(ctx, stage)[stage].todo
    before = [row.source for row in ctx.ledger(stage).rows()]
    (folder / removed).unlink()
    with pytest.raises(KdpipeError, match=why or CHANGED.format(removed)):
        STAGES[stage].run(ctx, todo)
    ledger = ctx.ledger(stage)
    assert {row.source for row in ledger.rows()} <= {"targets"} and not before
    assert not list(ledger.rejects()) and not ledger.lost_parts() and not ledger.unreferenced_parts()
    assert {path.name for path in ctx.tmp(stage).iterdir()} <= {"fingerprints.sqlite", "look.npz", "descriptions.jsonl"}
