"""Teaching, in a few steps: losses fall, weights change in place, and the folder stays what it was.

How well taught models do takes minutes to see: `kdpipe demo` prints it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.miniature import models, teach


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain little from threads, and lose much where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def others_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".safetensors"}


def losses_of(lines: list[str]) -> list[float]:
    return [float(found[1]) for line in lines if (found := re.search(r"loss ([\d.]+)", line))]


def test_teacher_learns_in_place(family: models.Miniatures, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family.teacher, tmp_path / "teacher"))
    lines: list[str] = []
    scores = teach.teach_textual_teacher(folder, seed=0, report=lines.append, steps=30, batch=8)
    assert 0 <= scores["accuracy"] <= 1
    assert losses_of(lines)[-1] < 4.5, "the loss of an untaught model is ln(512) = 6.2 nats"
    assert others_of(folder) == others_of(family.teacher)
    before, after = load_file(family.teacher / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_student_learns_in_place_and_the_same_again(family: models.Miniatures, tmp_path: Path) -> None:
    def taught(name: str) -> tuple[Path, dict[str, float], list[str]]:
        folder = Path(shutil.copytree(family.qwen2_5_omni, tmp_path / name))
        lines: list[str] = []
        scores = teach.teach_student(
            folder, seed=3, report=lines.append, clips=12, frame_steps=4, text_steps=3, batch=4, questions=4
        )
        return folder, scores, lines

    folder, scores, lines = taught("once")
    again, same_scores, same_lines = taught("again")
    assert set(scores) == {"describes", "accuracy", "formed"}
    assert len(losses_of(lines)) == 2
    assert others_of(folder) == others_of(family.qwen2_5_omni)
    before, after = load_file(family.qwen2_5_omni / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("thinker.audio_tower.") for name in changed)
    assert any(name.startswith("thinker.model.layers.") for name in changed)
    assert not any(name.startswith("thinker.visual.") for name in changed)
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (scores, lines) == (same_scores, same_lines)


@pytest.mark.parametrize("name", ["teacher", "qwen2_audio"])
def test_the_student_lesson_is_for_omni_models(family: models.Miniatures, name: str) -> None:
    with pytest.raises(KdpipeError, match="Name another folder"):
        teach.teach_student(getattr(family, name), seed=0, report=print)


ASKER = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from kdpipe.stages.miniature.teach import begin_lesson

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), begin_lesson) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def test_a_lesson_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    script = tmp_path / "asker.py"
    script.write_text(ASKER)
    asker = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    lesson = psutil.Process(int(asker.stdout.readline()))
    os.kill(asker.pid, signal.SIGKILL)
    asker.wait(10)
    try:
        lesson.wait(10)
    finally:
        if lesson.is_running():
            lesson.kill()
