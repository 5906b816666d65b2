"""Brings the rows up to date, one student after the other, and writes their table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kdpipe.data.errors import ConfigError, KdpipeError
from kdpipe.data.files import write_json
from kdpipe.pipeline.check import check
from kdpipe.pipeline.derived import write_configuration
from kdpipe.pipeline.recall import look, recall
from kdpipe.pipeline.rows.definition import ROWS, Row, refuse_missing_weights, settings, widest
from kdpipe.pipeline.rows.results import Answered, read_correct, results
from kdpipe.pipeline.runner import Request, bring_up_to_date
from kdpipe.pipeline.terminal import printable
from kdpipe.stages.base import Context


@dataclass(frozen=True)
class Student:
    """One run of the table.

    Attributes:
        row: the row.
        seed: of its training; 0 for the row that is not trained.
        request: its configuration.
    """

    row: Row
    seed: int
    request: Request

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}" if self.row.trains else self.row.name


def folder_of(ctx: Context) -> Path:
    """Where the rows of a run lie."""
    return ctx.run_folder / "rows"


def students(request: Request, ctx: Context, rows: Sequence[Row], seeds: Sequence[int]) -> list[Student]:
    """The runs of these rows and seeds, seed by seed, so that whole tables are there early."""
    found = []
    for seed in seeds:
        for row in rows:
            if row.trains or seed == seeds[0]:
                found.append(_student(request, ctx, row, seed if row.trains else 0))
    return found


def _student(request: Request, ctx: Context, row: Row, seed: int) -> Student:
    place = folder_of(ctx) / row.name
    place = place / f"seed-{seed}" if row.trains else place
    own = settings(ctx.config, row, seed, place, ctx.cache_folder)
    return Student(row, seed, Request(request.config_file, (*request.overrides, *own)))


def run_rows(
    request: Request, rows: Sequence[Row], seeds: Sequence[int], groups: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Makes what is not fresh of the rows, and `rows/results.json` from all rows and seeds that are fresh.

    Args:
        request: the configuration that the rows are changes of.
        rows: which.
        seeds: values of `train.seed`.
        groups: tasks by the name of their group; none: those of the results that are there.

    Returns:
        What stands in `rows/results.json`: what `kdpipe.pipeline.rows.results.results` gives, the `split` and
        `group_tasks`, the groups.

    Raises:
        ConfigError: a row cannot be had from this configuration.
        KdpipeError: a stage cannot run.
        StageFailed: a stage process failed.
    """
    ctx = request.context()
    refuse_missing_weights(ctx.config, rows)
    refuse_unknown_tasks(ctx, groups)
    wanted = students(request, ctx, rows, seeds)
    if any(student.row.trains for student in wanted):
        click.echo("== the teachers' files for all rows ==")
        shared = Request(request.config_file, (*request.overrides, *widest(ctx.config, rows)))
        if not bring_up_to_date(shared, "cache-teachers"):
            click.echo("fresh")
    for number, student in enumerate(wanted, 1):
        click.echo(f"\n== {student} ({number} of {len(wanted)}) ==")
        if not bring_up_to_date(student.request, "evaluate"):
            click.echo("fresh")
        write_configuration(student.request)
    file = folder_of(ctx) / "results.json"
    split = ctx.config.data.eval_split
    groups = groups or _earlier_groups(ctx, file)
    found = results(list(_answered(request, ctx, wanted)), ctx.samples(split), groups)
    found |= {"split": split, "group_tasks": {name: list(tasks) for name, tasks in groups.items()}}
    write_json(file, found, ctx.run_folder / "tmp")
    return found


def _earlier_groups(ctx: Context, file: Path) -> Mapping[str, Sequence[str]]:
    """The groups of the results that are there, where they are of the same split and its tasks."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        groups = found["group_tasks"] if found["split"] == ctx.config.data.eval_split else {}
        if not all(isinstance(tasks, list) for tasks in groups.values()):
            return {}
        refuse_unknown_tasks(ctx, groups)
        return groups
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def refuse_unknown_tasks(ctx: Context, groups: Mapping[str, Sequence[str]]) -> None:
    """Refuses groups that name tasks which the evaluated split does not have.

    Raises:
        ConfigError: all of them.
    """
    known = {sample.task for sample in ctx.samples(ctx.config.data.eval_split) if sample.task}
    problems = [
        f"--group {name}: no question of split {ctx.config.data.eval_split!r} has the task {task!r}; there are "
        f"{', '.join(sorted(known)) or 'none'}"
        for name, tasks in groups.items()
        for task in tasks
        if task not in known
    ]
    if problems:
        raise ConfigError(problems)


def is_fresh(student: Student) -> bool:
    """Whether its answers are there and up to date."""
    try:
        ctx = student.request.context()
        recalled = recall(ctx)
        statuses = look(ctx).keep() if recalled is None else recalled.statuses
    except (KdpipeError, OSError):
        return False
    return all(status.state == "fresh" for status in statuses if status.name in _needed(student))


def _needed(student: Student) -> tuple[str, ...]:
    return ("train", "evaluate") if student.row.trains else ("evaluate",)


def _answered(request: Request, ctx: Context, made: Sequence[Student]) -> Iterator[Answered]:
    """Of each row the students just made and those of other calls that are still fresh."""
    for row in ROWS.values():
        correct = {one.seed: read_correct(_predictions(one)) for one in made if one.row == row}
        for seed in _others(folder_of(ctx) / row.name, row):
            if seed not in correct:
                student = _student(request, ctx, row, seed)
                try:
                    refuse_missing_weights(ctx.config, [row])
                    fresh = is_fresh(student)
                    if fresh:
                        correct[seed] = read_correct(_predictions(student))
                except KdpipeError as error:
                    click.echo(printable(f"Left out of the table: {student}: {error}"))
                else:
                    if not fresh:
                        click.echo(f"Left out of the table, not fresh under this configuration: {student}")
        if correct:
            yield Answered(row, correct)


def _predictions(student: Student) -> Path:
    return student.request.context().folder("evaluate") / "predictions.parquet"


def _others(folder: Path, row: Row) -> list[int]:
    """Seeds of which there is a folder."""
    if not row.trains:
        return [0] if folder.is_dir() else []
    names = [path.name.removeprefix("seed-") for path in folder.glob("seed-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 19)


def dry_run(
    request: Request, rows: Sequence[Row], seeds: Sequence[int], groups: Mapping[str, Sequence[str]]
) -> list[str]:
    """What `run_rows` would do, a line a student, after the same checks.

    Raises:
        ConfigError: a row cannot be had from this configuration.
    """
    ctx = request.context()
    refuse_missing_weights(ctx.config, rows)
    refuse_unknown_tasks(ctx, groups)
    check(ctx)
    wanted = students(request, ctx, rows, seeds)
    width = max(len(str(student)) for student in wanted)
    lines = []
    for student in wanted:
        state = "fresh" if is_fresh(student) else "to do"
        lines.append(f"{student!s:<{width}}  {state}  {printable(str(student.request.context().run_folder))}")
    return lines
