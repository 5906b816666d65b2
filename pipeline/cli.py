"""The command line. Only click is imported at the top: `--help` must answer at once."""

from __future__ import annotations

import io
import os
import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdpipe.pipeline.benchmark import benchmark
from kdpipe.pipeline.cache_commands import cache
from kdpipe.pipeline.options import Commands, request_of, with_config
from kdpipe.pipeline.report.command import report as report_command
from kdpipe.pipeline.rows.command import rows

if TYPE_CHECKING:
    from kdpipe.pipeline.plan import StageStatus
    from kdpipe.pipeline.runner import Request
    from kdpipe.stages.base import Context, StagePlan
    from kdpipe.stages.train.launch import Launch


_LEAVE_LATER_SECONDS = 1.0
STAGE_NAMES = ("textualize", "cache-teachers", "train", "evaluate")  # those of `kdpipe.pipeline.plan.STAGES`


class _Group(Commands):
    """Prints errors of the user's without a traceback and ends with the right status."""

    def invoke(self, ctx: click.Context) -> Any:
        from kdpipe.data.errors import KdpipeError, SaidElsewhere

        try:
            return super().invoke(ctx)
        except SaidElsewhere:
            # Once one process has left, the launcher ends the others, who may not have spoken yet.
            time.sleep(_LEAVE_LATER_SECONDS)
            sys.exit(2)
        except KdpipeError as error:
            lines = [_printable(line) for line in str(error).splitlines()] or [type(error).__name__]
            head = f"Error: {len(lines)} problems:\n  " if len(lines) > 1 else "Error: "
            click.echo(head + "\n  ".join(lines), err=True)
            sys.exit(2)
        except BrokenPipeError:
            raise
        except OSError as error:
            from kdpipe.pipeline.unforeseen import of_the_system

            click.echo(f"Error: {of_the_system(error)}", err=True)
            sys.exit(2)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from kdpipe.pipeline.unforeseen import unforeseen

            click.echo(f"Error: {unforeseen(error)}", err=True)
            sys.exit(1)


def _printable(text: str) -> str:
    """What manifests, models and messages of libraries say, with what a terminal would obey escaped."""
    from kdpipe.pipeline.terminal import printable

    return printable(text)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kdpipe")
def main() -> None:
    """Teach audio language models to reason, from files.

    Large teachers say once, on disk, what they know about your audio questions; a smaller audio model is then
    trained from those files at the price of ordinary fine-tuning.

    \b
        kdpipe init              writes kdpipe.yaml, commented
        kdpipe check             finds every mistake in it
        kdpipe run               does what is not done yet
        kdpipe status            says what is stale, and why
        kdpipe accept STAGE      takes what is there as fresh, deliberately

    Only what is stale runs again, sample by sample.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error does: names of files may be no valid Unicode
        sys.stdout.reconfigure(errors="backslashreplace")


def _quoted(text: str) -> str:
    """A text as `--set` reads it, whatever is in it."""
    import json

    return json.dumps(text, ensure_ascii=False)


@main.command()
@click.argument("file", default="kdpipe.yaml", type=click.Path(path_type=Path))
@click.option("--recipe", default="acoustic", show_default=True, help="One of those above.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def init(file: Path, recipe: str, force: bool) -> None:
    """Write a commented starter configuration to FILE.

    Recipes are the rows of the paper's table: sft (cross-entropy only), top (textual teacher's last layer),
    skip (one layer in seven), all (every layer), acoustic (every layer and the acoustic teacher); and ours, the last
    with other weights for hearing tasks. `kdpipe rows` runs all of them.
    """
    from kdpipe.pipeline.starter import write_starter

    write_starter(file, recipe, force=force)
    click.echo(f"Wrote {file}. Set data.manifest and the models in it, then run `kdpipe check -c {file}`.")


@main.command()
@with_config
def check(config_file: Path, overrides: tuple[str, ...]) -> None:
    """Find every mistake in configuration, manifest and models.

    Reads the manifest, the models' config.json and their tokenizers; loads no weights and runs nothing. All
    problems are reported at once, each with its line and its remedy.
    """
    from kdpipe.pipeline.check import check as run_check

    for line in run_check(request_of(config_file, overrides).context()).lines:
        click.echo(_printable(line))
    click.echo("No problems found.")


@main.command()
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Look at the folders of this run too; kdpipe.yaml if it is there.",
)
@click.option("--vllm/--no-vllm", default=True, help="Start vLLM on a tiny model: a minute or two.  [default: vllm]")
def doctor(config_file: Path | None, vllm: bool) -> None:
    """Look at this machine: versions, GPU, disk, limits, vLLM.

    Says what will not work, and the remedy. Ends with status 1 where there is a problem. `kdpipe check` looks at
    configuration, manifest and models instead.
    """
    from kdpipe.pipeline.doctor import examine, report
    from kdpipe.pipeline.terminal import terminal_width

    if config_file is None and Path("kdpipe.yaml").is_file():
        config_file = Path("kdpipe.yaml")
    folders = {"temporary files": Path(tempfile.gettempdir())}
    if config_file is not None:
        ctx = request_of(config_file, ()).context()
        folders |= {"run folder": ctx.run_folder}
        if ctx.cache_folder != ctx.run_folder:
            folders |= {"cache folder": ctx.cache_folder}
    else:
        folders |= {"this folder": Path.cwd()}
    findings = []
    width = max(40, terminal_width() - 10)
    color = {"ok": "green", "note": "yellow", "problem": "red"}
    for one in examine(folders, vllm=vllm):
        findings.append(one)
        first, *more = textwrap.wrap(one.what, width, break_on_hyphens=False)
        click.echo(f"{click.style(f'{one.verdict:<8}', fg=color[one.verdict])} {first}")
        if one.remedy:
            more += textwrap.wrap(f"-> {one.remedy}", width, break_on_hyphens=False)
        for line in more:
            click.echo(f"{'':<8} {line}")
    click.echo(report(findings))
    sys.exit(any(one.verdict == "problem" for one in findings))


def _stage_command(name: str, text: str) -> None:
    @main.command(name, help=text)
    @with_config
    @click.option("--only", is_flag=True, help="Refuse, instead of running them, when earlier stages are not fresh.")
    @click.option("--dry-run", is_flag=True, help="Print what would run, why, and at what cost; run nothing.")
    def command(config_file: Path, overrides: tuple[str, ...], only: bool, dry_run: bool) -> None:
        _bring(config_file, overrides, name, only=only, dry_run=dry_run)


_stage_command(
    "textualize",
    "Write each clip's description and reasoning trace (vLLM).\n\n"
    "Traces that the manifest brings are parsed and checked instead. Samples that fail are recorded with a reason in "
    "textualize/rejects.parquet.",
)
_stage_command(
    "cache-teachers",
    "Keep on disk what the teachers say of the traces.\n\n"
    "The textual teacher reads description and question, the acoustic teacher hears the clip; both score the same "
    "token ids. Distributions and hidden states go to Zarr v3 parts. Runs textualize first where needed.",
)
_stage_command(
    "train",
    "Train the student from the teachers' files.\n\n"
    "No teacher is loaded. Continues from the last checkpoint of the same configuration and data. Writes "
    "train/metrics.jsonl and a Hugging Face folder, train/student, that transformers and vLLM load. Runs earlier "
    "stages first where needed. Started by torchrun or srun, all processes train together, and earlier stages must "
    "have been run.",
)


@main.command()
@with_config
@click.option("--model", metavar="MODEL", help="Score this folder or hub model instead, and train nothing.")
@click.option("--manifest", type=click.Path(path_type=Path), help="With --model: the questions of another manifest.")
@click.option("--split", metavar="SPLIT", help="Split of the manifest to answer (data.eval_split).")
@click.option("--only", is_flag=True, help="Refuse, instead of running them, when earlier stages are not fresh.")
@click.option("--dry-run", is_flag=True, help="Print what would run, why, and at what cost; run nothing.")
def evaluate(
    config_file: Path,
    overrides: tuple[str, ...],
    model: str | None,
    manifest: Path | None,
    split: str | None,
    only: bool,
    dry_run: bool,
) -> None:
    """Score the student beside the untouched model (vLLM).

    Answers data.eval_split and writes into evaluate/: predictions.parquet, scores.json (accuracy by task with 95 %
    intervals, and what differs), forgotten.jsonl, and under official/ the benchmarks' own files. Runs earlier stages
    first where needed.

    With --model, any model that vLLM hears with (train/student of another run, say) is scored beside the untouched
    student, in the folder evaluations/ of the run, and no other stage is needed.
    """
    if manifest is not None and model is None:
        raise click.UsageError("--manifest goes with --model: the student of this run belongs to data.manifest")
    if manifest is not None:
        overrides = (*overrides, f"data.manifest={_quoted(str(manifest.absolute()))}")
    if split is not None:
        overrides = (*overrides, f"data.eval_split={_quoted(split)}")
    if model is not None:
        from kdpipe.pipeline.runner import of_model

        request = of_model(request_of(config_file, overrides), model)
        click.echo(f"Scoring {_printable(model)} in {_printable(str(request.context().run_folder))}")
        overrides = request.overrides
    _bring(config_file, overrides, "evaluate", only=only, dry_run=dry_run)
    if model is not None and not dry_run:
        from kdpipe.pipeline.derived import write_configuration

        written = write_configuration(request_of(config_file, overrides))
        click.echo(f"Look at it by `kdpipe report -c {shlex.quote(str(written))}`.")


@main.command()
@with_config
@click.option("--dry-run", is_flag=True, help="Print what would run, why, and at what cost; run nothing.")
def run(config_file: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Bring everything up to date, evaluation included."""
    _bring(config_file, overrides, "evaluate", only=False, dry_run=dry_run)


def _bring(config_file: Path, overrides: tuple[str, ...], target: str, *, only: bool, dry_run: bool) -> None:
    from kdpipe.pipeline.runner import StageFailed, bring_up_to_date
    from kdpipe.stages.train.launch import find_launch

    request, launch = request_of(config_file, overrides), find_launch(os.environ)
    if launch is not None:
        _bring_launched(request, launch, target, dry_run=dry_run)
        return
    if dry_run:
        from kdpipe.pipeline.check import check as run_check
        from kdpipe.pipeline.plan import make_plans
        from kdpipe.pipeline.runner import refuse_stale
        from kdpipe.pipeline.standing import standing

        ctx = request.context()
        run_check(ctx)
        plans = make_plans(ctx, target)
        statuses = standing(ctx, plans)
        for status in statuses:
            if only and status.name != target:
                refuse_stale(status)
        _print_table([status for status in statuses if status.state != "fresh"] or statuses)
        _print_cost(ctx, plans)
        return
    try:
        ran = bring_up_to_date(request, target, only=only)
    except StageFailed as failure:
        # Errors of the user's (2) and interruptions (130) were explained by the stage itself.
        if failure.code not in (2, 130):
            click.echo(f"Error: {failure}.", err=True)
        sys.exit(failure.code)
    click.echo("Done." if ran else "Everything is fresh; nothing to do.")


def _print_cost(ctx: Context, plans: Mapping[str, StagePlan]) -> None:
    """Bytes, time and memory of what is to do."""
    teachers, train = plans.get("cache-teachers"), plans.get("train")
    if teachers is not None and teachers.todo:
        from kdpipe.pipeline.cost import cost_lines

        click.echo("\n" + "\n".join(cost_lines(ctx, teachers)))
    if train is not None and train.todo:
        from kdpipe.pipeline.memory import memory_lines

        click.echo("\n" + "\n".join(memory_lines(ctx)))


def _bring_launched(request: Request, launch: Launch, target: str, *, dry_run: bool) -> None:
    from kdpipe.pipeline.launched import refuse_launched, train_launched

    refuse_launched(f"{target} --dry-run" if dry_run else target, launch)
    try:
        ran = train_launched(request, launch)
    except KeyboardInterrupt as interrupt:
        if launch.rank == 0:
            click.echo(str(interrupt) or "train: interrupted. What was committed is kept.", err=True)
        else:
            time.sleep(_LEAVE_LATER_SECONDS)
        sys.exit(130)
    if launch.rank == 0:
        click.echo("Done." if ran else "Everything is fresh; nothing to do.")


@main.command()
@with_config
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.option("--cost", is_flag=True, help="Also the bytes, time and memory of what is to do.")
@click.option("--why", "sample", metavar="SAMPLE", help="Where one sample stands, and every reason.")
def status(config_file: Path, overrides: tuple[str, ...], as_json: bool, cost: bool, sample: str | None) -> None:
    """Say what is fresh, what is stale, and why.

    Ends with status 0 when everything is fresh and 1 when not.
    """
    from kdpipe.pipeline.recall import look, recall

    ctx = request_of(config_file, overrides).context()
    if sample is not None:
        from kdpipe.pipeline.plan import make_plans, why

        lines = why(make_plans(ctx), sample)
        if as_json:
            import json

            names = ("stage", "source", "state", "reason")
            click.echo(json.dumps([dict(zip(names, line, strict=True)) for line in lines], indent=2))
        else:
            for stage, source, state, reason in [("stage", "source", "state", "why"), *lines]:
                click.echo(_printable(f"{stage:<15}{source:<14}{state:<9} {reason}"))
        sys.exit(0 if all(line[2] in ("fresh", "rejected", "unasked") for line in lines) else 1)
    recalled = recall(ctx)
    statuses = look(ctx).keep() if recalled is None else recalled.statuses
    next_ = None
    if unfinished := [status.name for status in statuses if status.state != "fresh"]:
        sets = [word for override in overrides for word in ("--set", override)]
        next_ = shlex.join(["kdpipe", unfinished[0], "-c", str(config_file), *sets])
    if as_json:
        import json

        click.echo(json.dumps({"stages": [status.as_json() for status in statuses], "next": next_}, indent=2))
    else:
        _print_table(statuses)
        if next_ is not None:
            click.echo(f"\nNext: {next_}   (or `kdpipe run` for all)")
        if unfinished and cost:
            from kdpipe.pipeline.plan import make_plans

            _print_cost(ctx, make_plans(ctx))
    sys.exit(0 if all(status.state == "fresh" for status in statuses) else 1)


def _print_table(statuses: Sequence[StageStatus]) -> None:
    color = {"fresh": "green", "partial": "yellow", "stale": "yellow", "missing": "red"}
    click.echo(f"{'stage':<15}{'state':<9}{'samples':>9}{'fresh':>9}{'stale':>9}{'rejected':>10}")
    for status in statuses:
        state = click.style(f"{status.state:<9}", fg=color[status.state])
        click.echo(f"{status.name:<15}{state}{status.total:>9}{status.fresh:>9}{status.stale:>9}{status.rejected:>10}")
        for reason in status.reasons:
            click.echo(f"    {_printable(reason)}")


main.add_command(rows)
main.add_command(cache)


@main.command()
@click.argument("stages", metavar="STAGE...", nargs=-1, required=True, type=click.Choice(STAGE_NAMES))
@with_config
@click.option("--dry-run", is_flag=True, help="Say what would be accepted; change nothing.")
def accept(stages: tuple[str, ...], config_file: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Take what a stage has as what is asked for, deliberately.

    For a change that you know does not matter, like a comma in a prompt or a clip that was stored in another form: what
    is stale for that reason counts as fresh from then on, and nothing is computed. What is not there, or was made for
    other response tokens, is left to be made. Putting the configuration back needs no second `accept`.
    """
    from kdpipe.pipeline.accept import accept as accept_stages

    for line in accept_stages(request_of(config_file, overrides), stages, dry_run=dry_run):
        click.echo(_printable(line))


main.add_command(report_command)


@main.command()
@click.option(
    "--folder", default="runs/demo", show_default=True, type=click.Path(path_type=Path), help="Where the demo is built."
)
def demo(folder: Path) -> None:
    """Do the whole thing in miniature, on this machine.

    Makes a small world of tone sequences with questions, teaches miniature models (a Qwen3 teacher and a Qwen2.5-Omni
    student) just enough, then textualizes, caches, trains twice (fine-tuning only, and distillation) and evaluates.
    Leaves FOLDER/kdpipe.yaml for every other command to be tried on.
    """
    from kdpipe.pipeline.demo import run_demo

    run_demo(folder)


main.add_command(benchmark)
