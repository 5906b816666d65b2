"""Disks that are full, broken or read-only, files that vanish or change, clocks that go back, and folders of others.

Whatever happens: the message says what, where and the remedy; what was committed is kept; and the same command, once
the fault is gone, ends as if nothing had been. KDPIPE_FAULTS says at how many steps disks fail.
"""

from __future__ import annotations

import errno
import os
import random
import re
from pathlib import Path

import pytest

from .commands import Commands, Ended, Fault, contents, difference
from .test_kills import left_behind, look
from .world import SCENARIOS, Scenario, World

FAULTS = int(os.environ.get("KDPIPE_FAULTS", "9"))
EVERYTHING = "create write truncate fsync rename link remove mkdir"
ERRORS = {
    "full": (errno.ENOSPC, "create write mkdir", "No space left on device", "free space|[mM]ake room"),
    "quota": (errno.EDQUOT, "create write mkdir fsync", "Disk quota exceeded", "free space|[mM]ake room"),
    "read-only": (
        errno.EROFS,
        EVERYTHING,
        "Read-only file system",
        "writable|mend what|[mM]ake room|permissions",
    ),
    "broken": (errno.EIO, "write fsync", "Input/output error", "that disk|mend what is said|Make room"),
}


def ended_well(commands: Commands, world: World, scenario: Scenario, run: Path) -> None:
    """The same command, with the fault gone, leaves what an undisturbed one leaves."""
    again = commands(run, *scenario.words)
    assert again.code in ({0, 1} if scenario.name == "verify" else {0}), again.text
    assert left_behind(scenario, run, world.after(scenario)) == []


def says(ended: Ended, *patterns: str) -> None:
    """One error, for people, that holds all of the patterns."""
    assert ended.code == 2, ended.text
    errors = ended.text[ended.text.index("Error: ") :]
    assert "Traceback" not in ended.text and errors.count("Error: ") == 1, errors
    for pattern in patterns:
        assert re.search(pattern, errors), f"{pattern!r} is not in {errors}"


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_disk_that_fails_from_some_step_on(commands: Commands, world: World, scenario: Scenario, kind: str) -> None:
    number, what, said, remedy = ERRORS[kind]
    world.after(scenario)
    chance = random.Random(f"{scenario.name} {kind}")
    turns = [place for place in range(FAULTS) if place % (len(SCENARIOS) * len(ERRORS)) == _place(scenario, kind)]
    if not turns:
        pytest.skip("another turn")
    by_place = {}
    for step in world.steps[scenario.name]:
        if step.kind in what.split() and not re.search("fingerprints|look|speed|locks/", step.path):
            by_place.setdefault(step.place, []).append(step.number)
    chosen = list(by_place.values())
    chance.shuffle(chosen)
    for numbers in chosen[: len(turns)]:
        at = chance.choice(numbers)
        run = world.fresh(scenario)
        ended = commands(run, *scenario.words, fault=Fault(at, "fail", error=number, what=what))
        hit = world.steps[scenario.name][at - 1]
        try:
            if ended.code == 0 or (scenario.name == "verify" and "Made anew" in ended.text):
                assert difference(contents(run), contents(world.after(scenario))) == []  # nothing was left to fail
                continue
            says(ended, said, re.escape(str(run)), remedy)
            look(commands, world, scenario, run)
            ended_well(commands, world, scenario, run)
        except AssertionError as error:
            raise AssertionError(f"{kind} at {hit}: {error}") from error
        print(scenario.name, kind, *hit.place, flush=True)


def _place(scenario: Scenario, kind: str) -> int:
    """So that a few faults are spread over commands and kinds."""
    number = SCENARIOS.index(scenario)
    return number + len(SCENARIOS) * ((number + [*ERRORS].index(kind)) % len(ERRORS))
