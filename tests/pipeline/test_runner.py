"""The runner: budgets, refusals, signals. Stages that need models are covered by tests/integration."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kdpipe.data.errors import ConfigError, RejectBudgetError, StaleError
from kdpipe.pipeline import runner
from kdpipe.pipeline.plan import make_plans, status_of
from kdpipe.pipeline.runner import Request, StageFailed, _check_budget, bring_up_to_date, of_model
from kdpipe.stages.base import StagePlan, Wanted

TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>A tone.</CAPTION><REASONING>One tone.</REASONING>"
    "<SUMMARY>One.</SUMMARY></THINK><RESPONSE>one</RESPONSE>"
)
CONFIG = """\
data: {{manifest: data/manifest.jsonl, max_reject_fraction: {budget}}}
student: {{model: {{path: {student}, dtype: float32}}}}
teachers:
  textual: {{model: {{path: {teacher}, dtype: float32}}}}
train: {{weights: {{top: 0, layer: 0, acoustic: 0, sft: 1}}, max_steps: 2, learning_rate: 1e-3}}
"""


def build(folder: Path, family, *, bad: int = 0, budget: float = 0.0) -> Request:
    """A run whose manifest brings descriptions and traces, so that textualize needs no engine."""
    (folder / "data").mkdir(parents=True)
    seconds = np.arange(16_000) / 16_000
    rows = []
    for number in range(4):
        name = f"{number}.wav"
        if number < bad:
            (folder / "data" / name).write_bytes(b"")
        else:
            soundfile.write(folder / "data" / name, 0.3 * np.sin(2 * np.pi * 220 * (number + 1) * seconds), 16_000)
        rows.append({"id": f"s{number}", "audio": name, "question": "How many tones?", "choices": ["one", "two"],
                     "answer": "one", "description": "a tone", "trace": TRACE})  # fmt: skip
    rows.append({**rows[-1], "id": "held-out", "split": "test"})
    (folder / "data" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.format(budget=budget, student=family.qwen2_5_omni, teacher=family.teacher)
    (folder / "kdpipe.yaml").write_text(text)
    return Request(folder / "kdpipe.yaml")


def states(request: Request) -> dict[str, str]:
    return {name: status_of(plan).state for name, plan in make_plans(request.context()).items()}


def test_runs_what_is_needed_and_then_nothing(tmp_path, family, capfd):
    request = build(tmp_path, family)
    assert bring_up_to_date(request, "train")
    assert states(request) == {
        "textualize": "fresh",
        "cache-teachers": "fresh",
        "train": "fresh",
        "evaluate": "missing",
    }
    assert not bring_up_to_date(request, "train")
    output = capfd.readouterr()
    assert "textualize: 4 of 4 samples to do (trace: 4 new)" in output.out
    assert "Loading weights" not in output.err and "Traceback" not in output.err
    lock = (tmp_path / "kdpipe.lock").read_text()
    assert "state: fresh" in lock and str(tmp_path) not in lock


def test_a_removed_sample_makes_the_student_stale_and_trains_it_again(tmp_path, family):
    request = build(tmp_path, family)
    bring_up_to_date(request, "train")
    manifest = tmp_path / "data" / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1:]))
    plans = {name: status_of(plan) for name, plan in make_plans(request.context()).items()}
    assert plans["textualize"].state == plans["cache-teachers"].state == "fresh"
    assert plans["train"].state == "stale" and "student: 1 no longer wanted" in plans["train"].reasons
    assert bring_up_to_date(request, "train")
    assert states(request)["train"] == "fresh"


def test_a_lost_part_is_made_again(tmp_path, family):
    request = build(tmp_path, family)
    bring_up_to_date(request, "cache-teachers")
    (part,) = (tmp_path / "textualize" / "parts").iterdir()
    part.unlink()
    status = status_of(make_plans(request.context())["textualize"])
    assert (status.state, status.stale) == ("stale", 4) and f"{part.name} is gone" in status.reasons[0]
    assert bring_up_to_date(request, "cache-teachers")
    assert part.exists() and states(request)["cache-teachers"] == "fresh", "same words: the teachers' files stay fresh"


def test_reject_budget_stops_the_run_every_time_and_keeps_the_good(tmp_path, family):
    request = build(tmp_path, family, bad=1, budget=0.2)
    for _ in range(2):
        with pytest.raises(RejectBudgetError, match=r"1 of 4 samples were rejected.*max_reject_fraction = 0.2"):
            bring_up_to_date(request, "cache-teachers")
        status = status_of(make_plans(request.context())["textualize"])
        assert (status.fresh, status.rejected, status.state) == (3, 1, "fresh")
        assert "rejected: audio_empty: 1" in status.reasons
    assert bring_up_to_date(Request(request.config_file, ("data.max_reject_fraction=0.3",)), "cache-teachers")


def test_only_refuses_upstream_work(tmp_path, family):
    request = build(tmp_path, family)
    with pytest.raises(StaleError, match="textualize is missing, and --only was given"):
        bring_up_to_date(request, "cache-teachers", only=True)
    assert bring_up_to_date(request, "textualize", only=True)


def test_problems_are_found_before_anything_runs(tmp_path, family):
    request = build(tmp_path, family)
    text = (
        request.config_file.read_text().replace(str(family.teacher), "nowhere") + "layers: {mode: map, map: {99: 1}}\n"
    )
    request.config_file.write_text(text.replace("manifest.jsonl", "manifest.jsonl, eval_split: tset"))
    with pytest.raises(ConfigError) as caught:
        bring_up_to_date(request, "train")
    found = "\n".join(caught.value.problems)
    assert "nowhere: there is no folder" in found and "in split 'tset'" in found and "did you mean test?" in found
    assert not (tmp_path / "textualize").exists()


def test_a_failing_stage_is_reported_once(tmp_path, family, capfd):
    request = build(tmp_path, family)
    bring_up_to_date(request, "textualize")
    (part,) = (tmp_path / "textualize" / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(StageFailed) as caught:
        bring_up_to_date(request, "cache-teachers")
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert part.name in error and "Traceback" not in error


INTERRUPTED = """
import os, signal, sys, time
from kdpipe.pipeline import worker

def interrupt(*arguments):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)

worker.make_plans = interrupt
sys.exit(worker.main(["train", sys.argv[1]]))
"""


def test_sigint_to_the_runner_alone_ends_the_stage(tmp_path, family, capfd, monkeypatch):
    """As `kill -INT PID` sends it, and not as a terminal, which sends it to both."""
    request, start = build(tmp_path, family), subprocess.Popen
    command = [sys.executable, "-c", INTERRUPTED, str(request.config_file)]
    monkeypatch.setattr(runner.subprocess, "Popen", lambda _, **options: start(command, **options))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(StageFailed) as caught:
        runner._run_stage(request, "train", [])
    assert caught.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err == "train: interrupted. What was committed is kept.\n"


def test_sigint_while_a_stage_is_being_started_ends_it_too(tmp_path, family, monkeypatch):
    start = subprocess.Popen

    def interrupted(_, **options):
        signal.raise_signal(signal.SIGINT)
        return start([sys.executable, "-c", "import time; time.sleep(60)"], stderr=subprocess.DEVNULL, **options)

    monkeypatch.setattr(runner.subprocess, "Popen", interrupted)
    with pytest.raises(StageFailed) as caught:
        runner._run_stage(build(tmp_path, family), "train", [])
    assert caught.value.code == 130


def test_a_student_needs_at_least_one_sample(tmp_path, family):
    request = build(tmp_path, family, bad=4, budget=1.0)
    with pytest.raises(RejectBudgetError, match=r"train: no sample is left, all were rejected upstream.*textualize"):
        bring_up_to_date(request, "train")
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(("rejected", "total", "budget"), [(29, 100, 0.29), (57, 100, 0.57), (3, 30, 0.1), (0, 4, 0.0)])
def test_a_budget_that_is_just_reached_is_kept(tmp_path, family, rejected: int, total: int, budget: float):
    """0.29 * 100 is 28.999999999999996 in binary."""
    ctx = Request(build(tmp_path, family, budget=budget).config_file).context()
    wants = [Wanted(f"s{number}", "trace", {}) for number in range(total)]

    def plan(count: int) -> StagePlan:
        bad = frozenset((want.id, want.source) for want in wants[:count])
        good = frozenset((want.id, want.source) for want in wants[count:])
        return StagePlan("textualize", wants, good, bad, [], [], ctx.ledger("textualize"))

    _check_budget(ctx, plan(rejected))
    with pytest.raises(RejectBudgetError, match=f"{rejected + 1} of {total} samples were rejected"):
        _check_budget(ctx, plan(rejected + 1))


def test_an_interruption_of_a_stage_that_ends_well_stops_the_run(tmp_path, family, monkeypatch):
    """As when it comes while the stage is leaving: the next stage is not to begin."""
    program = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGINT); "
        "time.sleep(1)"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", program], **rest)
    )
    with pytest.raises(StageFailed) as failed:
        runner._run_stage(build(tmp_path, family), "textualize", [])
    assert failed.value.code == 130


def test_another_model_takes_nothing_of_the_one_in_the_configuration(tmp_path, family):
    request = build(tmp_path, family)
    told = ("evaluate.model={path: org/A, revision: abc, trust_remote_code: true}",)
    model = of_model(Request(request.config_file, told), "org/B 😀").context().config.evaluate.model
    assert (model.path, model.revision, model.trust_remote_code, model.dtype) == ("org/B 😀", None, False, "float32")
    asked = Request(request.config_file, ("evaluate.model.dtype=bfloat16",))
    assert of_model(asked, "org/B").context().config.evaluate.model.dtype == "bfloat16"
    (tmp_path / "student").mkdir()
    folders = {of_model(request, name).context().run_folder for name in ("student", str(tmp_path / "student"))}
    assert len(folders) == 1 and folders.pop().parent == tmp_path / "evaluations"
    with pytest.raises(ConfigError, match="names no model"):
        of_model(request, " ")
