"""`kdpipe benchmark`: published benchmarks as manifests. Only click is imported at the top, as in `cli`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

_NAMED = 5


@click.group()
def benchmark() -> None:
    """Turn published benchmarks into manifests to evaluate on."""


@benchmark.command("list")
def list_benchmarks() -> None:
    """Name the benchmarks that can be imported.

    Each with what its published file is called, and when an answer is right.
    """
    from kdpipe.stages.evaluate.benchmarks import BENCHMARKS

    rows = [("name", "benchmark", "file", "right is")]
    rows += [(one.name, one.title, one.file, one.rule) for one in BENCHMARKS.values()]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    for row in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


@benchmark.command("import")
@click.argument("name")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--audio", required=True, type=click.Path(path_type=Path), help="The folder in which the clips lie.")
@click.option(
    "-o",
    "--output",
    default="manifest.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The manifest to write; paths in it start from its folder.",
)
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def import_benchmark(name: str, source: Path, audio: Path, output: Path, force: bool) -> None:
    """Write a published benchmark as a manifest.

    NAME is one of `kdpipe benchmark list`, SOURCE its published file. The rows are of the split `test`, and
    evaluate scores them by the benchmark's own rule. Clips are looked for under the paths of the published file, with
    and without their leading folders. docs/benchmarks.md says where the files come from and how each is read.
    """
    from kdpipe.pipeline.terminal import printable

    for line in write_manifest(name, source, audio, output, force=force):
        click.echo(printable(line))


def write_manifest(name: str, source: Path, audio: Path, output: Path, *, force: bool) -> list[str]:
    """Reads a published file and writes the manifest.

    Args:
        name: of the benchmark.
        source: its published file.
        audio: the folder of clips.
        output: the manifest.
        force: replace a file that exists.

    Returns:
        What was done, in lines for the user.

    Raises:
        KdpipeError: no such benchmark, the output cannot be written, or no clip is there.
        ManifestError: all that is wrong with the published file.
    """
    from kdpipe.stages.evaluate.benchmarks import find

    known = find(name)
    _refuse(source, output, force=force)
    imported = known.read(source, audio)
    folder = output.absolute().parent
    rows = [{**row, "audio": _relative(row["audio"], folder)} for row in imported.rows]
    _write(output, rows)
    count = len({row["audio"] for row in rows})
    lines = [f"Wrote {output}: {len(rows)} questions of {known.title} about {count} clips, split test."]
    if imported.missing:
        missing = list(dict.fromkeys(imported.missing))
        lines.append(
            f"Missing clips below {audio}: {len(missing)}. Evaluate rejects their rows ({len(imported.missing)}), for "
            "which data.max_reject_fraction must have room, and the strict score counts them as wrong: "
            f"{_some(missing)}"
        )
    lines += [f"{note[:1].upper()}{note[1:]}." for note in imported.notes]
    if any(_is_outside(row["audio"], folder) for row in rows):
        lines.append("The clips lie outside the manifest's folder: set `data.allow_outside: true`.")
    lines.append(f"Next: `kdpipe evaluate --model train/student --manifest {shlex.quote(str(output))} --split test`.")
    return lines


def _refuse(source: Path, output: Path, *, force: bool) -> None:
    """Refuses an output that is the source, is there already, or is none that a manifest can be read from."""
    from kdpipe.data.errors import ConfigError

    if output.suffix.lower() != ".jsonl":
        raise ConfigError([f"-o {output}: a manifest is written as JSON lines; name it like {output.stem}.jsonl"])
    if output.is_dir():
        raise ConfigError([f"-o {output}: is a folder. Name a file."])
    if os.path.realpath(source) == os.path.realpath(output):
        raise ConfigError([f"-o {output}: is the benchmark's own file. Choose another name."])
    if os.path.lexists(output) and not force:
        raise ConfigError([f"-o {output}: exists already. Choose another name, or replace it with --force."])


def _write(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from kdpipe.data.errors import ConfigError
    from kdpipe.data.files import write_atomically

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"), output.absolute().parent)
    except OSError as error:
        raise ConfigError([f"-o {output}: cannot be written ({error.strerror})."]) from None
    except UnicodeEncodeError:
        raise ConfigError(["--audio: a path is no valid Unicode, which a manifest cannot hold; rename it."]) from None


def _relative(clip: str, folder: Path) -> str:
    """The path of a clip from the manifest's folder; with `..` in it where the clip lies outside."""
    path = os.path.abspath(clip)
    below = os.path.relpath(path, folder)
    if below.split(os.sep)[0] != os.pardir:
        return below
    # Through links, `..` leads where the real folder lies.
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def _is_outside(name: str, folder: Path) -> bool:
    """Whether reading the manifest needs `data.allow_outside`."""
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(folder / name)]) != root


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more
