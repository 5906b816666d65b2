"""The command line of `kdpipe rows`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kdpipe.pipeline.options import request_of, with_config


@click.command()
@with_config
@click.option("--rows", "names", metavar="ROW,ROW", help="Rows of the table; all of them unless given.")
@click.option("--seeds", default="0,1,2", show_default=True, metavar="SEED,SEED", help="Values of train.seed.")
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="NAME=TASK,TASK",
    help="Tasks that are counted together; else as before.",
)
@click.option("--dry-run", is_flag=True, help="Print which students are there and which would be made.")
def rows(
    config_file: Path,
    overrides: tuple[str, ...],
    names: str | None,
    seeds: str,
    groups: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Train and score the rows of the paper's table.

    \b
        base      the untouched student
        sft       cross-entropy alone
        top       textual teacher's last layer, and sft
        skip      and one layer in layers.every
        all       and all layers
        acoustic  all layers, the acoustic teacher, and sft
        ours      the same with train.task_weights

    One cache serves all. A row says which terms are on; their weights are those of the configuration. Each student
    lies in rows/ROW/seed-SEED; the table in rows/results.json and rows/table.md is of all that are fresh. What is
    fresh is not made again.
    """
    from kdpipe.data.files import write_atomically
    from kdpipe.pipeline.rows import run
    from kdpipe.pipeline.rows.definition import NO_TASK_WEIGHTS, ROWS, choose
    from kdpipe.pipeline.rows.results import markdown, table
    from kdpipe.pipeline.runner import StageFailed

    request = request_of(config_file, overrides)
    chosen = choose(_words(names) if names is not None else list(ROWS))
    if names is None and not request.context().config.train.task_weights:
        chosen = [row for row in chosen if not row.by_task]
        click.echo(f"Without row ours: {NO_TASK_WEIGHTS}")
    numbers, parted = _seeds(seeds), _groups(groups)
    if dry_run:
        for line in run.dry_run(request, chosen, numbers, parted):
            click.echo(line)
        return
    try:
        found = run.run_rows(request, chosen, numbers, parted)
    except StageFailed as failure:
        if failure.code not in (2, 130):
            click.echo(f"Error: {failure}.", err=True)
        click.echo("What is done is kept; the same command goes on.", err=True)
        sys.exit(failure.code)
    folder = run.folder_of(request.context())
    write_atomically(
        folder / "table.md", lambda path: path.write_text(markdown(found), encoding="utf-8"), folder.parent / "tmp"
    )
    click.echo()
    for line in table(found):
        click.echo(line)
    click.echo(f"\nWrote results.json and table.md in {folder}. `kdpipe report -c {config_file}` draws them.")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seeds(text: str) -> list[int]:
    from kdpipe.data.errors import ConfigError

    words = _words(text)
    numbers = [int(word) for word in words if word.isascii() and word.isdecimal() and len(word) < 19]
    if not words or len(numbers) < len(words):
        raise ConfigError([f"--seeds {text!r}: write whole numbers with commas between, such as 0,1,2"])
    return list(dict.fromkeys(numbers))


def _groups(texts: tuple[str, ...]) -> dict[str, list[str]]:
    from kdpipe.data.errors import ConfigError

    groups: dict[str, list[str]] = {}
    for text in texts:
        name, equals, tasks = text.partition("=")
        name = name.strip()
        if not equals or not name or not _words(tasks):
            raise ConfigError([f"--group {text!r}: write NAME=TASK,TASK"])
        if name in groups or name == "all":
            raise ConfigError([f"--group {name}: is given twice, or is the group of all tasks; choose another name"])
        groups[name] = list(dict.fromkeys(_words(tasks)))
    return groups
