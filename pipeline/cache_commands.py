"""`kdpipe cache`: commands that look into the teacher store."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kdpipe.pipeline.options import Commands, request_of, with_config


@click.group(cls=Commands)
def cache() -> None:
    """Look at the teacher store, prove it, tidy it."""


@cache.command()
@click.argument("sample", required=False)
@with_config
@click.option("--layer", type=int, help="With SAMPLE: the lens of this layer of the textual teacher.")
@click.option("--tokens", metavar="A:B", default=":", help="With SAMPLE: response tokens A to B only.")
def inspect(sample: str | None, config_file: Path, overrides: tuple[str, ...], layer: int | None, tokens: str) -> None:
    """Say what the teacher store holds, or show one SAMPLE.

    Without SAMPLE: samples, tokens and bytes by source, how they are stored, and how faithfully. With its id: each
    token of the response beside what the teachers expected there.
    """
    if sample is None and (layer is not None or tokens != ":"):
        raise click.UsageError("--layer and --tokens are about one sample: name it, as in `kdpipe cache inspect dog-1`")
    ctx = request_of(config_file, overrides).context()
    if sample is None:
        from kdpipe.pipeline.overview import overview

        lines = overview(ctx)
    else:
        from kdpipe.pipeline.sample import show_sample

        lines = show_sample(ctx, sample, layer=layer, tokens=_slice(tokens))
    click.echo("\n".join(lines))


def _slice(text: str) -> slice:
    first, colon, last = text.partition(":")
    try:
        start, stop = (int(part) if part else None for part in (first, last))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not like 10:20, 10: or :20", param_hint="--tokens") from None
    return slice(start, stop if colon else None if start in (None, -1) else start + 1)


@cache.command()
@with_config
@click.option("--report-only", is_flag=True, help="Change nothing.")
@click.option(
    "--live", type=click.IntRange(1), metavar="N", help="Also ask the live teachers again, N samples of each source."
)
def verify(config_file: Path, overrides: tuple[str, ...], report_only: bool, live: int | None) -> None:
    """Prove every byte of the teacher store.

    Reads all of it: checksums, metadata, lengths, and whether the values can be what a teacher said. What is damaged
    is set aside in cache-teachers/damaged/, so that `kdpipe cache-teachers` makes just that anew. Ends with status 1
    when damage was found.
    """
    from kdpipe.pipeline.cache import verify as run_verify

    ctx = request_of(config_file, overrides).context()
    is_sound, lines = run_verify(ctx, report_only=report_only)
    click.echo("\n".join(lines))
    if live is not None:
        from kdpipe.pipeline.cache import compare_live

        click.echo("\n".join(compare_live(ctx, live)))
    sys.exit(0 if is_sound else 1)


@cache.command()
@with_config
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
@click.option("--unasked", is_flag=True, help="Also forget samples that the manifest does not name any more.")
def gc(config_file: Path, overrides: tuple[str, ...], dry_run: bool, unasked: bool) -> None:
    """Remove what no sample needs.

    Parts that were replaced, manifests and files that a killed run left behind, and what `verify` set aside. Samples
    that only another configuration asks for are kept.
    """
    from kdpipe.pipeline.cache import collect_garbage

    ctx = request_of(config_file, overrides).context()
    click.echo("\n".join(collect_garbage(ctx, dry_run=dry_run, unasked=unasked)))
