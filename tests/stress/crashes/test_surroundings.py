"""What others do to a run while it works: files vanish or change, a clock goes back, a folder is somebody else's.

The message says what, where and the remedy; nothing made from what changed is recorded; and the next run, with the
fault gone, ends like an undisturbed one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from .commands import Commands, Fault, contents, copy_of, difference
from .test_faults import says
from .world import BY_NAME, World, trace_records

ENGINE_FREE = ("textualize", "cache-teachers", "train")
CLOCK = """
import time
real, calls = time.time_ns, [0]
def back():
    calls[0] += 1
    return real() - calls[0] * 3600 * 10**9
time.time_ns = back
time.time = lambda: back() / 1e9
"""


def do(when: str, what: str) -> Fault:
    """Lets a shell do something before the first step that is named so."""
    return Fault(mode="do", when=when, what=what)


def state(commands: Commands, run: Path) -> dict[str, str]:
    return {one["name"]: one["state"] for one in json.loads(commands(run, "status", "--json").text)["stages"]}


@pytest.mark.parametrize("name", ENGINE_FREE)
def test_a_clip_that_vanishes_while_a_stage_runs_is_refused(commands: Commands, world: World, name: str) -> None:
    begun = {"textualize": "create tmp/descriptions", "cache-teachers": "mkdir tmp/", "train": "rename train/metrics"}
    scenario, run = BY_NAME[name], world.fresh(BY_NAME[name])
    ended = commands(run, *scenario.words, fault=do(begun[name], "mv data/0.wav data/1.wav ."))
    says(ended, r"data/[01]\.wav: changed while the stage was running; nothing made from it was recorded", "again")
    told = commands(run, "status", "--why", "s00").text
    assert re.search(f"^{name} .* (missing|waiting|stale) ", told, re.MULTILINE), "nothing made of it was recorded"
    for clip in ("0.wav", "1.wav"):
        shutil.move(run / clip, run / "data" / clip)
    assert commands(run, *scenario.words).code == 0
    assert difference(contents(run), contents(world.after(scenario))) == []


@pytest.mark.parametrize("name", ENGINE_FREE)
@pytest.mark.parametrize("turn", range(3))
def test_a_clip_that_is_edited_while_a_stage_runs(commands: Commands, world: World, name: str, turn: int) -> None:
    """At whatever step: what ends up recorded as fresh was made of the bytes that are there."""
    scenario, run = BY_NAME[name], world.fresh(BY_NAME[name])
    world.after(scenario)
    steps = world.steps[name]
    soundfile.write(run / "new.wav", 0.2 * np.sin(np.arange(9_000) * 0.3), 16_000)
    at = steps[(2 * turn + 1) * len(steps) // 6].number
    ended = commands(run, *scenario.words, fault=Fault(at, "do", what="mv new.wav data/1.wav"))
    if ended.code:
        says(ended, "changed while the stage was running|An input changed meanwhile", "s01|data/1.wav", "again")
    assert state(commands, run)["textualize"] != "fresh" or name == "textualize"
    assert commands(run, *scenario.words).code == 0
    for path in (run / "tmp").iterdir():
        path.unlink()  # what is remembered of files
    assert {state(commands, run)[stage] for stage in ENGINE_FREE[: ENGINE_FREE.index(name) + 1]} == {"fresh"}
    clean = world.fresh(scenario, "clean")
    shutil.copy(run / "data" / "1.wav", clean / "data" / "1.wav")
    assert commands(clean, *scenario.words).code == 0
    records = [trace_records(folder) for folder in (run, clean)]
    assert records[0] == records[1] and records[0]["s01"]["audio_samples"] == [9_000]
    if name != "textualize":
        assert _told(commands, run) == _told(commands, clean)
    if name == "train":
        assert difference(contents(run, "train/student"), contents(clean, "train/student")) == []


def _told(commands: Commands, run: Path) -> str:
    """What the store says of the sample; where it says it is another thing."""
    return re.sub(r"parts/\w+\.zarr, row \d+", "", commands(run, "cache", "inspect", "s01").text)


def test_a_part_that_vanishes_while_training_reads_it(commands: Commands, world: World) -> None:
    scenario, run = BY_NAME["train"], world.fresh(BY_NAME["train"])
    ended = commands(run, "train", fault=do("rename train/metrics.jsonl", "mv cache-teachers/parts aside"))
    says(ended, r"cache-teachers/parts/\w+\.zarr", "kdpipe cache-teachers|kdpipe cache verify")
    assert state(commands, run)["cache-teachers"] == "stale"
    assert commands(run, "train").code == 0
    shutil.rmtree(run / "aside")
    assert difference(contents(run), contents(world.after(scenario))) == []


@pytest.mark.parametrize("name", ENGINE_FREE)
def test_a_manifest_of_the_ledger_that_vanishes(commands: Commands, world: World, name: str) -> None:
    scenario, run = BY_NAME[name], copy_of(world.after(BY_NAME[name]), world.before(BY_NAME[name]).parent / "run")
    (manifest,) = (run / name / "manifests").glob("*.parquet")
    manifest.unlink()
    for words in (scenario.words, ("status",)):
        says(commands(run, *words), re.escape(str(manifest)), "Remove .*build this stage anew|restore")
    shutil.rmtree(run / name)
    assert commands(run, *scenario.words).code == 0
    assert difference(contents(run), contents(world.after(scenario))) == []


@pytest.mark.parametrize("name", ENGINE_FREE)
def test_a_run_folder_that_is_removed_while_a_stage_runs(commands: Commands, world: World, name: str) -> None:
    scenario, run = BY_NAME[name], world.fresh(BY_NAME[name])
    steps = (world.after(scenario), world.steps[name])[1]
    ended = commands(run, *scenario.words, fault=Fault(steps[len(steps) // 2].number, "do", what='rm -rf "$PWD"/*'))
    assert ended.code == 2 and "Traceback" not in ended.text, ended.text
    assert str(run) in ended.text[ended.text.index("Error: ") :]
    run = world.fresh(scenario)
    assert commands(run, *scenario.words).code == 0
    assert difference(contents(run), contents(world.after(scenario))) == []


@pytest.mark.parametrize("name", ENGINE_FREE)
def test_a_clock_that_goes_back_an_hour_at_each_look(commands: Commands, world: World, name: str) -> None:
    scenario, run = BY_NAME[name], world.fresh(BY_NAME[name])
    world.after(scenario)
    ended = commands(run, *scenario.words, fault=Fault(first=CLOCK))
    assert ended.code == 0, ended.text
    assert difference(contents(run), contents(world.after(scenario))) == []
    clip = run / "data" / "1.wav"
    before = clip.stat()
    content = bytearray(clip.read_bytes())
    content[-1] ^= 1
    clip.write_bytes(content)
    os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))
    told = json.loads(commands(run, "status", "--json", fault=Fault(first=CLOCK)).text)["stages"]
    assert told[0]["state"] == "stale" and told[0]["samples"]["stale"] == 1, "same size, same time stamp, other bytes"


def as_somebody_else(first: str = "") -> Fault:
    return Fault(first=f"import os\n{first}\nos.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n")


@pytest.fixture
def shared(world: World) -> Iterator[Path]:
    """A run after textualize that everybody may enter; made by root."""
    if os.getuid() != 0:
        pytest.skip("it takes root to become somebody else")
    run = world.fresh(BY_NAME["cache-teachers"])
    models = Path(re.findall("path: (/[^,]*),", (run / "kdpipe.yaml").read_text())[0])
    opened = [folder for folder in [models, *models.parents, *run.parents] if folder.stat().st_mode & 0o005 != 0o005]
    opened += models.parent.rglob("*")
    modes = {path: path.stat().st_mode for path in opened}
    for path in opened:
        path.chmod(0o755)
    yield run
    for path, mode in modes.items():
        path.chmod(mode)


def test_a_run_folder_of_somebody_else(commands: Commands, world: World, shared: Path) -> None:
    scenario = BY_NAME["cache-teachers"]
    before = contents(shared)
    refused = commands(shared, "cache-teachers", fault=as_somebody_else())
    says(refused, re.escape(str(shared)), "ermission", "run.folder")
    told = commands(shared, "status", "--json", fault=as_somebody_else())
    assert told.code == 1 and json.loads(told.text)["stages"][0]["state"] == "fresh", "looking is allowed"
    for folder in (shared, shared / "locks"):
        folder.chmod(0o777)
    ended = commands(shared, "cache-teachers", fault=as_somebody_else())
    says(ended, r"locks/run\.lock", "ermission denied", "user")
    for path in [shared, *shared.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o644)
    (shared / "locks" / "run.lock").chmod(0o666)
    (shared / "tmp").chmod(0o755)
    says(commands(shared, "cache-teachers", fault=as_somebody_else()), re.escape(str(shared / "tmp")), "writable")
    assert contents(shared) == before
    (shared / "tmp").chmod(0o777)
    assert commands(shared, "cache-teachers", fault=as_somebody_else()).code == 0, "who may write may go on"
    found = difference(contents(shared), contents(world.after(scenario)))
    assert found == []


def test_who_may_read_one_file_of_a_student_may_read_all(world: World) -> None:
    student = world.after(BY_NAME["train"]) / "train" / "student"
    assert len({path.stat().st_mode for path in student.iterdir()}) == 1


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system in memory, if this process may mount one."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", [*ENGINE_FREE, "evaluate"])
def test_a_real_disk_that_is_full_and_then_grows(commands: Commands, world: World, name: str) -> None:
    scenario = BY_NAME[name]
    size = {"textualize": 48, "cache-teachers": 180, "train": 4000, "evaluate": 20}[name]
    world.after(scenario)
    place = world.before(scenario).parent / "disk"
    with small_disk(place, "100m"):
        run = copy_of(world.before(scenario), place / "run")
        used = int(subprocess.run(["du", "-sk", place], capture_output=True, text=True, check=True).stdout.split()[0])
        subprocess.run(["mount", "-o", f"remount,size={used + size}k", str(place)], check=True)
        ended = commands(run, *scenario.words)
        says(ended, "No space left on device", re.escape(str(run)), "[mM]ake room|free space")
        assert commands(run, "status").code == 1
        subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
        assert commands(run, *scenario.words).code == 0
        assert difference(contents(run), contents(world.after(scenario))) == []


def test_a_real_disk_that_is_mounted_read_only(commands: Commands, world: World) -> None:
    scenario = BY_NAME["cache-teachers"]
    place = world.before(scenario).parent / "disk"
    with small_disk(place, "100m"):
        run = copy_of(world.after(scenario), place / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        for words in (("cache-teachers",), ("cache", "verify"), ("cache", "gc"), ("train",)):
            says(commands(run, *words), re.escape(str(run)), "Read-only file system", "run.folder|writable")
        assert state(commands, run)["cache-teachers"] == "fresh"
        assert commands(run, "cache", "inspect", "s01").code == 0
