"""`kdpipe report` on the command line. Only click is imported at the top: `--help` must answer at once."""

from __future__ import annotations

from pathlib import Path

import click

from kdpipe.pipeline.options import request_of, with_config


@click.command()
@with_config
@click.option(
    "-o",
    "--output",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The page to write; an earlier page of kdpipe's is replaced.",
)
@click.option(
    "--rows",
    type=click.Path(path_type=Path),
    help="results.json of `kdpipe rows`.  [default: rows/results.json in the run folder, if it is there]",
)
@click.option("--audio/--no-audio", default=True, help="Put the sound of the examples into the page.  [default: audio]")
@click.option("--force", is_flag=True, help="Replace a file that is no page of kdpipe's.")
def report(
    config_file: Path, overrides: tuple[str, ...], output: Path, rows: Path | None, audio: bool, force: bool
) -> None:
    """Write a run as one HTML page.

    The page needs no network and no other file: the flow with its counts, losses, accuracy by task with intervals,
    what was forgotten, where the teacher disagrees with what the student is taught, rejections, and examples with
    their sound. It shows what lies in the run folder; a stage that has not run, or a file that is damaged, is named in
    its place. Runs nothing and changes nothing there.
    """
    from kdpipe.pipeline.cost import human_bytes
    from kdpipe.pipeline.report.page import write_report
    from kdpipe.pipeline.terminal import printable

    problems = write_report(request_of(config_file, overrides), output, rows=rows, audio=audio, force=force)
    for problem in problems:
        click.echo(printable(problem), err=True)
    click.echo(f"Wrote {printable(str(output))} ({human_bytes(output.stat().st_size)}).")
