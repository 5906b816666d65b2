"""`kill -9` right before, right after and in the middle of the steps of every stage: nothing is lost, nothing doubled.

An uninterrupted run tells which steps there are; they fall into classes of kind and place (a rename of a part into
place, a write to a checkpoint). KDPIPE_KILLS says how many kills are tried: as many classes of each command as that
gives, in an order drawn by chance, and then further steps drawn by chance. The tests of a change try a few; about 500
try all classes.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from .commands import Commands, Ended, Fault, Step, contents, difference
from .world import PART, SCENARIOS, Scenario, World, trace_records

KILLS = int(os.environ.get("KDPIPE_KILLS", "14"))
SEED = int(os.environ.get("KDPIPE_KILLS_SEED", "0"))
WEIGHTS = {"textualize": 3, "cache-teachers": 4, "recache": 4, "train": 4, "retrain": 4, "evaluate": 3}
"""Of the commands, when kills are shared out among them; 1: the others."""
AGAIN = PART + 1
"""Units that one kill may cost: a part, and the first batch of the next, which is computed while that part is flushed.
A batch is one sample here."""


@dataclass
class Tally:
    """What some kills did.

    Attributes:
        kills: that ended a process.
        again: for each, units that were computed twice.
        parts: for each, parts that were finished twice.
        places: classes of steps that were hit.
    """

    kills: int = 0
    again: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    places: set[tuple[str, str]] = field(default_factory=set)

    def add(self, hit: Step, again: int, parts: int) -> None:
        self.kills += 1
        self.places.add(hit.place)
        self.again.append(again)
        self.parts.append(parts)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills at {len(self.places)} classes of steps; computed twice: {sum(self.again)} units, at "
            f"most {max(self.again, default=0)} a kill; finished twice: {sum(self.parts)} parts, at most "
            f"{max(self.parts, default=0)} a kill"
        )


def faults(steps: tuple[Step, ...], share: int, chance: random.Random) -> list[Fault]:
    """A share of the kills: first one for each class of steps, then by chance; before, in the middle of, or after."""
    by_place: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        by_place.setdefault(step.place, []).append(step)
    chosen = [chance.choice(found) for found in by_place.values()]
    chance.shuffle(chosen)
    chosen = (chosen + chance.choices(steps, k=max(0, share - len(chosen))))[:share]
    made = []
    for step in chosen:
        mode = "tear" if step.kind == "write" and chance.random() < 0.5 else "kill"
        after = mode == "kill" and chance.random() < 0.5 and step.number < len(steps)
        made.append(Fault(step.number + after, mode, group=chance.random() < 0.5))
    return made


def put_in_place(steps: Sequence[Step]) -> Counter[str]:
    """Finished parts, by how often they were put in place."""
    return Counter(step.path for step in steps if step.kind == "rename" and "/parts/" in step.path)


def look(commands: Commands, world: World, scenario: Scenario, run: Path) -> None:
    """What a reader finds after a kill is whole, and `kdpipe status` calls nothing fresh that is not done."""
    before, after = contents(world.before(scenario)), contents(world.after(scenario))
    now = contents(run)
    told = commands(run, "status", "--json")
    if scenario.name == "verify" and told.code == 2:  # what it mends is still damaged
        assert "kdpipe cache verify" in told.text and "Traceback" not in told.text
        return
    assert told.code in (0, 1) and "Error" not in told.text, told.text
    for stage in json.loads(told.text)["stages"]:
        if stage["state"] == "fresh" and stage["name"] in scenario.stages:
            missing = [p for p in after if p.startswith(f"{stage['name']}/") and now.get(p) != after[p]]
            assert not missing, f"{stage['name']} is called fresh, but lacks {missing}"
    whole = {path: {known[path] for known in (before, after) if path in known} for path in {*before, *after}}
    for path, content in now.items():
        if re.match(r"[a-z-]+/(parts|manifests|student|adapter)/", path) and path in whole:
            assert content in whole[path], f"{path} is neither as it was nor as it will be"
        assert path in whole or not re.match(r"[a-z-]+/(parts|student|adapter)/", path), f"{path} belongs to nothing"
    for name in ("student", "adapter"):
        states = [{p for p in known if p.startswith(f"train/{name}/")} for known in (before, after, {})]
        assert {path for path in now if path.startswith(f"train/{name}/")} in states, f"half of a {name}"
    for part in {re.sub(r"(/parts/[^/]*).*", r"\1", path) for path in now if "/parts/" in path}:
        states = [{p for p in known if p.startswith(part)} for known in (before, after)]
        assert {path for path in now if path.startswith(part)} in states, f"half of {part}"
    for checkpoint in (run / "train").glob("checkpoints/*"):
        files = json.loads((checkpoint / "state.json").read_text())["files"]
        assert files == {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.name != "state.json"}


def left_behind(scenario: Scenario, run: Path, expected: Path) -> list[str]:
    """Files that differ from those of an uninterrupted run, but for what the next command of its kind removes: `cache
    verify` leaves it to a run to tidy `tmp/`, and a manifest that `HEAD` has just left goes with the next commit."""
    there = contents(expected)
    spared = "manifests/|tmp/" if scenario.name == "verify" else "manifests/"
    found = difference(contents(run), there)
    return [path for path in found if path in there or not re.search(spared, path)]


def _between_rejections_and_rows(killed: Ended) -> bool:
    renamed = [step.path for step in killed.steps if step.kind == "rename" and not step.path.startswith("tmp/")]
    return renamed[-1:] == ["textualize/rejects.parquet"] or renamed[-2:-1] == ["textualize/rejects.parquet"]


def finish(commands: Commands, world: World, scenario: Scenario, run: Path, killed: Ended) -> tuple[int, int]:
    """Runs the same command again; gives the units that were computed and the parts that were finished twice."""
    expected = world.after(scenario)
    again = commands(run, *scenario.words)
    assert again.code in ({0, 1} if scenario.name == "verify" else {0}), again.text
    assert "Traceback" not in again.text
    found = left_behind(scenario, run, expected)
    if found and _between_rejections_and_rows(killed):
        # The part's rejections count already and its rows do not, so the rest is cut into other parts.
        assert trace_records(run) == trace_records(expected)
        assert {path.split("/")[0] for path in found} <= {"textualize", "kdpipe.lock"}
    else:
        assert found == []
    twice = Counter(killed.work) + Counter(again.work) - Counter(world.work[scenario.name])
    parts = put_in_place(killed.steps[:-1]) + put_in_place(again.steps)
    return twice.total(), sum(count - 1 for count in parts.values())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_killed_at_a_step_and_run_again_is_the_run_that_was_never_stopped(
    commands: Commands, world: World, scenario: Scenario
) -> None:
    share = max(1, KILLS * WEIGHTS.get(scenario.name, 1) // sum(WEIGHTS.get(one.name, 1) for one in SCENARIOS))
    world.after(scenario)
    chance = random.Random(f"{SEED} {scenario.name}")
    steps, tally = world.steps[scenario.name], Tally()
    for fault in faults(steps, share, chance):
        run = world.fresh(scenario)
        killed = commands(run, *scenario.words, fault=fault)
        while killed.code not in (-9, 137):  # how often a manifest is written depends on the clock
            run = world.fresh(scenario)
            killed = commands(run, *scenario.words, fault=replace(fault, at=len(killed.steps) - 2))
        hit = killed.steps[-1]
        try:
            look(commands, world, scenario, run)
            again, parts = finish(commands, world, scenario, run, killed)
        except AssertionError as error:
            raise AssertionError(f"{fault}, {hit}: {error}") from error
        tally.add(hit, again, parts)
        print(scenario.name, fault.at, fault.mode, *hit.place, again, parts, flush=True)
    print(f"{scenario.name}: {len(steps)} steps of {len({step.place for step in steps})} classes; {tally}")
    assert max(tally.parts) <= 1
    assert max(tally.again) <= AGAIN


@pytest.mark.parametrize("name", ["textualize", "cache-teachers", "recache", "train", "retrain", "evaluate"])
def test_killed_again_and_again_until_it_is_done(commands: Commands, world: World, name: str) -> None:
    scenario = next(one for one in SCENARIOS if one.name == name)
    world.after(scenario)
    steps, tally = len(world.steps[name]), Tally()
    chance = random.Random(f"{SEED} {name} again")
    run = world.fresh(scenario)
    work: Counter[str] = Counter()
    for number in range(max(1, KILLS // 12)):
        at = chance.randrange(1, max(2, steps // 3))
        ended = commands(run, *scenario.words, fault=Fault(at, "kill", group=number % 2 == 0))
        work += Counter(ended.work)
        if ended.code == 0:
            break
        tally.kills += 1
        look(commands, world, scenario, run)
    work += Counter(commands(run, *scenario.words).work)
    twice = work - Counter(world.work[name])
    print(f"{name}: {tally.kills} kills one after the other; computed twice: {twice.total()} units")
    assert left_behind(scenario, run, world.after(scenario)) == []
    assert twice.total() <= AGAIN * tally.kills


@pytest.mark.parametrize("scenario", SCENARIOS[:6], ids=lambda scenario: scenario.name)
def test_nothing_is_put_in_place_that_is_not_on_the_disk(world: World, scenario: Scenario) -> None:
    """What a power failure asks for: files and folders are flushed before they are renamed, and folders before HEAD."""
    world.after(scenario)
    waiting: set[str] = set()
    checked = 0
    for step in world.steps[scenario.name]:
        parent = os.path.dirname(step.path)
        if step.kind == "fsync":
            waiting.discard(step.path)
        elif step.kind in ("write", "truncate"):
            waiting.add(step.path)
        elif step.kind == "rename":
            below = {p for p in waiting if f"{p}/".startswith(f"{step.before}/")}
            waiting -= below
            if step.path.startswith("tmp/"):
                waiting |= {step.path + p.removeprefix(step.before) for p in below}
            else:
                checked += 1
                unseen = {p for p in below if re.search(r"/\.tmp\w{6}$", p)}  # safetensors renames them, unseen
                assert below <= unseen, f"{step.path} was put in place before {below - unseen} was flushed"
                if step.path.endswith("/HEAD"):
                    named = {p for p in waiting if re.search("/(parts|manifests|student)$", p)}
                    assert not named, f"{step.path} was put in place before {named} was flushed"
            waiting.add(parent)
        elif step.kind in ("create", "mkdir"):
            waiting |= {parent, step.path}
        elif step.kind == "remove":
            waiting = {p for p in waiting if not f"{p}/".startswith(f"{step.path}/")}
    assert checked > 4
