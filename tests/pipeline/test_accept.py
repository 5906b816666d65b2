"""`kdpipe accept` on a small real store: what counts as fresh afterwards, and what cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner

from kdpipe.data.store.open import open_store
from kdpipe.pipeline.cli import STAGE_NAMES, main
from kdpipe.pipeline.plan import STAGES, make_plans, status_of
from kdpipe.pipeline.runner import Request
from kdpipe.stages import environment

from .test_cache import IDS, bring_up, build, write_manifest

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

OTHER_PROMPT = 'teachers.textual.prompt="Heard: {description} {question} {choices}"'
SHORTER = "data.max_seconds=17"


@pytest.fixture(scope="module")
def original(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("accept") / "run"
    build(base, family, IDS)
    return base


@pytest.fixture
def request_(original: Path, tmp_path: Path) -> Request:
    shutil.copytree(original, tmp_path / "run")
    return Request(tmp_path / "run" / "kdpipe.yaml")


def kdpipe(request: Request, *words: str, settings: tuple[str, ...] = (), code: int = 0) -> str:
    options = [word for setting in settings for word in ("--set", setting)]
    done = CliRunner().invoke(main, [*words, "-c", str(request.config_file), *options])
    assert done.exit_code == code, done.output
    return done.output


def states(request: Request, *settings: str) -> dict[str, str]:
    plans = make_plans(Request(request.config_file, settings).context())
    return {name: status_of(plan).state for name, plan in plans.items()}


def contents(request: Request) -> dict[str, bytes]:
    folder = request.context().run_folder
    return {str(path): path.read_bytes() for path in folder.glob("*/parts/**/*") if path.is_file()}


def test_the_names_of_stages_are_those_there_are() -> None:
    assert tuple(STAGES) == STAGE_NAMES


def test_what_is_accepted_is_fresh_and_used(request_: Request) -> None:
    before, settings = contents(request_), (OTHER_PROMPT,)
    assert states(request_, *settings)["cache-teachers"] == "stale"
    dry = kdpipe(request_, "accept", "cache-teachers", "--dry-run", settings=settings)
    assert "4 of 4 would be taken as they are" in dry and states(request_, *settings)["cache-teachers"] == "stale"
    said = kdpipe(request_, "accept", "textualize", "cache-teachers", settings=settings)
    assert said.startswith("textualize: everything is fresh\ncache-teachers: 4 of 4 taken as they are\n")
    assert "  accepted    textual: teacher.prompt " in said and said.rstrip().endswith(": 4")
    assert states(request_, *settings)["cache-teachers"] == "fresh" and contents(request_) == before
    kdpipe(request_, "cache", "verify", settings=settings)
    store = open_store(request_.context().folder("cache-teachers"))
    assert store["dog-1"].textual.top.log_z.shape[0] > 3
    lock = yaml.safe_load((request_.context().run_folder / "kdpipe.lock").read_text())
    assert lock["stages"]["cache-teachers"]["state"] == "fresh" and lock["stages"]["cache-teachers"]["accepted"] == 4
    assert "accepted as it is, not made so (kdpipe accept): 4" in kdpipe(request_, "status", settings=settings, code=1)
    assert "not made so" not in kdpipe(request_, "status", code=1), "put back it is what it was made as"
    # Back without a second `accept`; and accepted it stays.
    assert states(request_)["cache-teachers"] == states(request_, *settings)["cache-teachers"] == "fresh"
    # What is made from accepted rows does not notice.
    train = make_plans(request_.context())["train"].wanted
    accepted = make_plans(Request(request_.config_file, settings).context())["train"].wanted
    assert [want.key for want in train] == [want.key for want in accepted]
    assert bring_up(Request(request_.config_file, ('teachers.textual.prompt="{description}"',)))
    assert states(request_, *settings)["cache-teachers"] == "stale", "made anew it is what it was made as"


def test_traces_are_accepted_and_read(request_: Request) -> None:
    assert states(request_, SHORTER)["textualize"] == "stale"
    kdpipe(request_, "accept", "textualize", settings=(SHORTER,))
    found = states(request_, SHORTER)
    assert found["textualize"] == "fresh" and found["cache-teachers"] == "stale", "its keys hold that, too"
    request = Request(request_.config_file, (SHORTER,))
    assert {source for _, source in bring_up(request)} >= {"targets"}, "made from the accepted traces"
    assert kdpipe(request_, "accept", "textualize", settings=(SHORTER,)) == "textualize: everything is fresh\n"


def test_what_is_not_there_is_left(request_: Request) -> None:
    settings = ("teachers.k=9", "data.max_reject_fraction=0.5")
    said = kdpipe(request_, "accept", "cache-teachers", settings=settings)
    assert "0 of 8 taken" in said and "left        textual: k 8 -> 9: 4" in said
    write_manifest(request_.config_file.parent, [*IDS, "new"])
    said = kdpipe(request_, "accept", "textualize")
    assert "0 of 1 taken" in said and "left        trace: new: 1" in said
    assert states(request_)["textualize"] == "partial"


def test_rows_for_other_response_tokens_are_refused(request_: Request) -> None:
    path = request_.config_file.parent / "manifest.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["trace"] = rows[0]["trace"].replace("Listen", "Listen well")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(request_.config_file.parent, ["a", "b"])
    said = kdpipe(request_, "accept", "textualize", "cache-teachers", "--dry-run")
    assert "cache-teachers: what is asked of it is known once textualize is fresh" in said
    assert "waits for textualize. Accept or run that first" in kdpipe(request_, "accept", "cache-teachers", code=2)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ctx = request_.context()
    STAGES["textualize"].run(ctx, make_plans(ctx, "textualize")["textualize"].todo)
    said = kdpipe(request_, "accept", "cache-teachers")
    assert "0 of 3 taken" in said and said.count("made for the tokens of another response: 1") == 3


def test_a_lost_part_is_left(request_: Request) -> None:
    part = sorted(request_.context().ledger("cache-teachers").parts.glob("*.zarr"))[0]
    shutil.rmtree(part)
    said = kdpipe(request_, "accept", "cache-teachers")
    assert f"{part.name} is gone or lacks files" in said and states(request_)["cache-teachers"] == "stale"


def test_a_student_is_accepted_for_other_samples(request_: Request, tmp_path: Path) -> None:
    """Trained for real: one sample fewer, another learning rate, and the same files."""
    settings = ("train.epochs=1", "evaluate.base=false", "data.eval_split=train")
    kdpipe(request_, "train", settings=settings)
    student = request_.context().folder("train") / "student" / "model.safetensors"
    before = student.read_bytes()
    write_manifest(request_.config_file.parent, IDS[:3])
    other = (*settings, "train.learning_rate=0.3")
    assert states(request_, *other)["train"] == "stale"
    said = kdpipe(request_, "accept", "train", settings=other)
    assert "train: 3 of 3 taken as they are" in said and "student: made from 1 more samples" in said
    assert states(request_, *other)["train"] == "fresh" and student.read_bytes() == before
    write_manifest(request_.config_file.parent, IDS)
    kdpipe(request_, "accept", "train", settings=other)
    assert states(request_, *other)["train"] == "fresh", "a sample that it was not trained on counts, too"


def test_other_libraries_are_told_and_count_where_asked(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: "9.9" if name == "torch" else real(name))
    now = real("torch")
    said = kdpipe(request_, "status", code=1)
    assert said.count(f"made with torch {now} -> 9.9: ") == 2 and "kept (run.strict_env is off)" in said
    assert states(request_)["cache-teachers"] == "fresh"
    strict = ("run.strict_env=true",)
    said = kdpipe(request_, "status", "--strict-env", code=1)
    assert f"trace: libraries torch {now} -> 9.9: 4 of 4" in said
    assert states(request_, *strict)["textualize"] == "stale"
    said = kdpipe(request_, "accept", "textualize", "cache-teachers", settings=strict)
    assert "textualize: 4 of 4 taken as they are" in said
    assert states(request_, *strict)["cache-teachers"] == "fresh"
    (made_with,) = {text for (text,) in request_.context().ledger("textualize").values("trace", "made_with")}
    assert made_with.startswith("vllm ") and " torch 9.9," in made_with and f" <- vllm {real('vllm')}" in made_with
    monkeypatch.undo()
    assert states(request_, *strict)["textualize"] == "stale", "made with these, but accepted for others"
