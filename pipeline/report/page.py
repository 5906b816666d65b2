"""The page of a run: gathers its sections, each of which may fail alone, and writes one self-contained HTML file."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdpipe.data.errors import KdpipeError
from kdpipe.data.files import write_atomically
from kdpipe.pipeline.report import accuracy, examples, flow, losses, rows, tokens
from kdpipe.pipeline.report.reading import ROWS, NotThere, made_files, read_metrics_lines, read_scores, unread_metrics
from kdpipe.pipeline.report.values import cut, visible
from kdpipe.pipeline.runner import Request
from kdpipe.pipeline.unforeseen import of_the_system
from kdpipe.stages.base import Context

MARK = '<meta name="generator" content="kdpipe report">'
"""Stands near the beginning of every page, by which an earlier one is known."""

_HERE = Path(__file__).parent
_BEGINNING = 2_000
_LONG = 8_000  # characters of a text that are shown
T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """A section's content, or why there is none.

    Attributes:
        value: the content; None where it could not be made.
        problem: why not, or empty.
        is_missing: whether the problem is only that a stage has not run.
    """

    value: T | None
    problem: str = ""
    is_missing: bool = False


def _part(make: Callable[[], T]) -> Part[T]:
    try:
        return Part(make())
    except NotThere as error:
        return Part(None, str(error), True)
    except KdpipeError as error:
        return Part(None, str(error))
    except OSError as error:
        return Part(None, of_the_system(error))


def write_report(
    request: Request, output: Path, *, rows: Path | None = None, audio: bool = True, force: bool = False
) -> list[str]:
    """Writes the page of a run, whole or not at all.

    Args:
        request: the run's configuration.
        output: the page.
        rows: results.json of `kdpipe rows`; None: the one in the run folder, if it is there.
        audio: whether the page holds the sound of the examples.
        force: replace a file that is no page of kdpipe's.

    Returns:
        What could not be shown because it is damaged, a line each.

    Raises:
        KdpipeError: there is nothing to show, or `output` may not be written.
    """
    _refuse_output(output, force)
    ctx = request.context()
    if rows is not None and not rows.is_file():
        raise KdpipeError(f"--rows {rows}: there is no such file. Name the results.json that `kdpipe rows` wrote.")
    if rows is None and (ctx.run_folder / ROWS).is_file():
        rows = ctx.run_folder / ROWS
    if not made_files(ctx, rows):
        raise KdpipeError(
            f"{ctx.run_folder}: nothing has run yet, so there is nothing to report. "
            f"Run `kdpipe run -c {request.config_file}` first."
        )
    content = gather(ctx, request.config_file, rows, audio=audio)
    text = render(content).encode("utf-8", "backslashreplace")
    write_atomically(output, lambda path: path.write_bytes(text), output.absolute().parent)
    parts = [part for part in content.values() if isinstance(part, Part)]
    return [part.problem for part in parts if part.problem and not part.is_missing]


def _refuse_output(output: Path, force: bool) -> None:
    folder = output.absolute().parent
    if not folder.is_dir():
        raise KdpipeError(f"-o {output}: the folder {folder} does not exist. Make it first, or name another place.")
    if output.is_dir():
        raise KdpipeError(f"-o {output}: is a folder. Name a file, such as {output / 'report.html'}.")
    if output.exists() and not output.is_file():
        raise KdpipeError(f"-o {output}: is no ordinary file. Name another place.")
    if force or not output.exists():
        return
    with output.open("rb") as file:
        if MARK.encode() not in file.read(_BEGINNING):
            raise KdpipeError(f"-o {output}: is there and is no page of kdpipe's. Name another file, or use --force.")


def gather(ctx: Context, config_file: Path, rows_file: Path | None, *, audio: bool) -> dict[str, Any]:
    """Everything that the page shows, by its name in the template."""
    lines = _part(lambda: read_metrics_lines(ctx))
    scores = _part(lambda: read_scores(ctx))
    score_tables = _follow(scores, accuracy.tables)
    first = (score_tables.value or [None])[0]
    return {
        "title": f"kdpipe report: {ctx.run_folder.name}",
        "head": _head(ctx, config_file, rows_file),
        "result": "" if scores.value is None else accuracy.sentence(scores.value),
        "flow": _part(lambda: flow.flow(ctx)),
        "charts": _charts(ctx, lines),
        "tables": score_tables,
        "differences": None if first is None else accuracy.difference_plot(first.rows),
        "benchmarks": [] if scores.value is None else accuracy.benchmarks(scores.value),
        "forgotten": _part(lambda: examples.forgotten(ctx)),
        "counted": None if first is None or first.rows[0].pair is None else first.rows[0].pair.forgotten,
        "rows": None if rows_file is None else _part(lambda: rows.read_rows(rows_file)),
        "taught": _part(lambda: tokens.taught(ctx)),
        "apart": _follow(lines, losses.apart),
        "rejects": _part(lambda: flow.rejects(ctx)),
        "examples": _part(lambda: examples.examples(ctx, audio=audio)),
        "levels": [words for _, words in tokens.LEVELS],
        "audio": audio,
    }


def _charts(ctx: Context, lines: Part[list[dict[str, Any]]]) -> Part[Any]:
    """The curves, with what is to be said of a file that is damaged further on."""
    charts = _follow(lines, lambda found: losses.loss_charts(ctx, found))
    if lines.value is None or charts.value is None:
        return charts
    return Part(charts.value, unread_metrics(ctx, lines.value))


def _follow(part: Part[T], make: Callable[[T], Any]) -> Part[Any]:
    """A part that is made of another."""
    value = part.value
    return Part(None, part.problem, part.is_missing) if value is None else _part(lambda: make(value))


def _head(ctx: Context, config_file: Path, rows_file: Path | None) -> list[tuple[str, str]]:
    """What is told at the top: words and text."""
    config = ctx.config
    teachers = {
        "student": config.student.model,
        "textual teacher": config.teachers.textual.model,
        "acoustic teacher": config.acoustic,
        "describer": config.describer,
        "writer of traces": config.tracer,
    }
    same = [name for name, model in teachers.items() if name != "student" and model.path == config.student.model.path]
    here = Path.cwd().resolve()
    folder = ctx.run_folder.relative_to(here) if ctx.run_folder.is_relative_to(here) else ctx.run_folder
    told = [("run folder", str(folder)), ("configuration", str(config_file))]
    told += [(name, model.path) for name, model in teachers.items() if name not in same]
    told += [("the student's model is also", ", ".join(same))] if same else []
    weights = config.train.weights
    named = {name: getattr(weights, name) for name in ("top", "layer", "acoustic", "acoustic_top", "sft")}
    told.append(("weights of the loss", ", ".join(f"{name} {value:g}" for name, value in named.items() if value)))
    told.append(("made with this configuration", _made_so(ctx)))
    newest = max(path.stat().st_mtime for path in made_files(ctx, rows_file))
    return [*told, ("last result written", _time(newest)), ("page written", _time(time.time()))]


def _made_so(ctx: Context) -> str:
    """Whether what is shown was made with the configuration that is named, as far as it is known."""
    from kdpipe.pipeline.recall import recall

    recalled = recall(ctx)
    if recalled is None:
        return "not known: something changed since kdpipe last looked, or it never did; `kdpipe status` looks"
    other = [status.name for status in recalled.statuses if status.state != "fresh"]
    return f"no, not all: {', '.join(other)} not fresh; `kdpipe status` says why" if other else "yes"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def render(content: Mapping[str, Any]) -> str:
    """The page as text: everything but our own drawings is escaped, and no script or address outside is allowed."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printed,
    )
    environment.filters |= {"name": cut, "long": lambda text: cut(text, _LONG)}
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    hashed = base64.b64encode(sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashed}'; img-src data:; media-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    page = environment.get_template("page.html")
    return page.render(content, mark=Markup(MARK), style=Markup(style), policy=Markup(policy))


def _printed(value: Any) -> Any:
    """Texts with what does not print made visible; drawings as they are."""
    return value if isinstance(value, Markup) else visible(str(value))
