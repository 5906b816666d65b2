"""What cache-teachers will cost, as a table; and the refusal of what has no room."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from kdpipe.data.errors import KdpipeError
from kdpipe.pipeline import cost
from kdpipe.pipeline.cli import main
from kdpipe.pipeline.cost import cost_lines, human_bytes, human_seconds, refuse_what_does_not_fit, room
from kdpipe.pipeline.plan import make_plans
from kdpipe.pipeline.runner import Request, bring_up_to_date

Usage = namedtuple("Usage", "total used free")
TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>A tone.</CAPTION><REASONING>One tone.</REASONING>"
    "<SUMMARY>One.</SUMMARY></THINK><RESPONSE>one</RESPONSE>"
)
CONFIG = """\
data: {{manifest: data/manifest.jsonl}}
student: {{model: {{path: {student}, dtype: float32}}}}
teachers:
  textual: {{model: {{path: {teacher}, dtype: float32}}}}
  k: 8
  mass: {mass}
  states: low_rank_int8
  rank: 8
  device: cpu
layers: {{mode: all, match: hidden}}
"""


def build(folder: Path, family, *, mass: str = "null") -> Request:
    """A run whose manifest brings descriptions and traces."""
    (folder / "data").mkdir(parents=True)
    seconds = np.arange(16_000) / 16_000
    soundfile.write(folder / "data" / "a.wav", 0.3 * np.sin(2 * np.pi * 220 * seconds), 16_000)
    rows = [
        {"id": f"s{number}", "audio": "a.wav", "question": "How many tones?", "answer": "one", "description": "a tone",
         "trace": TRACE, "split": "test" if number == 3 else "train"}
        for number in range(4)
    ]  # fmt: skip
    (folder / "data" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.format(student=family.qwen2_5_omni, teacher=family.teacher, mass=mass)
    (folder / "kdpipe.yaml").write_text(text)
    return Request(folder / "kdpipe.yaml")


def free(monkeypatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**6, 10**6 - count, count))


def test_dry_run_prints_a_table_that_fits_a_terminal(tmp_path, family):
    request = build(tmp_path, family)
    done = CliRunner().invoke(main, ["cache-teachers", "-c", str(request.config_file), "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("cache-teachers will store"))
    table = lines[head:]
    assert [line[:36].strip() for line in table[1:7]] == [
        "targets",
        "textual: top",
        "textual: 4 layers, low_rank_int8",
        "acoustic: 4 layers, low_rank_int8",
        "ledger",
        "in all",
    ]
    assert all(len(line) <= 80 for line in table if not line.startswith("time on"))
    assert "free (without" in table[7] and any("at least" in line for line in table)
    assert not (tmp_path / "cache-teachers").exists() and not (tmp_path / "textualize").exists()


def test_what_does_not_fit_is_refused_before_a_model_is_loaded(tmp_path, family, monkeypatch):
    request = build(tmp_path, family)
    free(monkeypatch, 60_000)
    with pytest.raises(KdpipeError) as caught:
        bring_up_to_date(request, "cache-teachers")
    text = str(caught.value)
    assert f"{tmp_path / 'cache-teachers'} has no room: about" in text
    assert "50.0 kB are free for it (10.0 kB are kept back)" in text, "60 kB without 1 % of the disk"
    for remedy in ("fewer layers", "teachers.k, teachers.mass", "run.cache on another disk"):
        assert remedy in text
    assert not (tmp_path / "cache-teachers" / "HEAD").exists()
    free(monkeypatch, 900_000)
    refuse_what_does_not_fit(request.context(), make_plans(request.context(), "cache-teachers")["cache-teachers"])


def test_an_upper_bound_only_warns(tmp_path, family, monkeypatch):
    request = build(tmp_path, family, mass="0.9")
    plan = make_plans(request.context(), "cache-teachers")["cache-teachers"]
    whole = cost.estimate(request.context(), plan, cost.requirements(request.context()), time=False)
    assert whole.firm_bytes < whole.bytes
    free(monkeypatch, 10_000 + (whole.firm_bytes + whole.bytes) // 2)
    said: list[str] = []
    ctx = request.context()
    object.__setattr__(ctx, "say", said.append)
    refuse_what_does_not_fit(ctx, plan)
    assert len(said) == 1 and "may need up to" in said[0]
    assert any(line.endswith("too little?") for line in cost_lines(ctx, plan))
    free(monkeypatch, 10_000 + whole.firm_bytes // 2)
    with pytest.raises(KdpipeError, match="up to"):
        refuse_what_does_not_fit(ctx, plan)
    assert any(line.endswith("TOO LITTLE") for line in cost_lines(ctx, plan))


def test_room_keeps_a_hundredth_or_a_gibibyte_back(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "there"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**12))
    assert room(folder) == (10**12 - 2**30, 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 5, 5))
    assert room(folder) == (0, 10**7)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4_080_000, "4.08 MB"), (99_960, "100 kB"), (999_700, "1.00 MB")],
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0.4 s"), (42, "42 s"), (800, "13 min"), (27_400, "7.6 h"), (276_480, "3.2 days")]
)
def test_seconds_for_people(seconds, text):
    assert human_seconds(seconds) == text
