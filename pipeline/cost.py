"""What `cache-teachers` will cost, for people; and refusing it where the disk has no room for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from kdpipe.data.errors import KdpipeError, StoreError
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.cache_teachers.cost.estimate import Estimate, estimate
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.config import Config

_RESERVE_BYTES = 1 << 30
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def room(folder: Path) -> tuple[int, int]:
    """Bytes that may be filled below a folder, which need not be there yet, and the reserve that is kept beside them.

    The reserve is 1 % of the file system or 1 GiB, whichever is smaller, for what others write meanwhile.
    """
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    reserve = min(usage.total // 100, _RESERVE_BYTES)
    return max(0, usage.free - reserve), reserve


def cost_lines(ctx: Context, plan: StagePlan) -> list[str]:
    """A table of what the stage will store and how long it will take; in 80 columns but for long devices.

    Args:
        ctx: the run.
        plan: of cache-teachers, with something to do.
    """
    cost = estimate(ctx, plan, requirements(ctx))
    free, reserve = room(ctx.folder(plan.stage))
    fits = "" if cost.bytes <= free else "TOO LITTLE" if cost.firm_bytes > free else "too little?"
    lines = [_row(f"{plan.stage} will store", "bytes", "units", "tokens", "known")]
    for line in cost.lines:
        units, tokens = (f"{number:,}" if number else "" for number in (line.units, line.tokens))
        tokens = tokens if len(tokens) <= 10 else f"{line.tokens / 1e6:,.0f} M"
        lines.append(_row(f"  {line.name}", human_bytes(line.bytes), units, tokens, line.basis))
    lines.append(_row("  in all", human_bytes(cost.bytes), note=cost.basis))
    lines.append(_row(f"free (without {human_bytes(reserve)} kept back)", human_bytes(free), note=fits))
    lines += [f"  {note}" for note in cost.notes]
    by_device: dict[tuple[str, bool], list[str]] = {}
    for source, took in cost.times.items():
        text = f"{'at least ' if took.rough else ''}{human_seconds(took.seconds)}"
        by_device.setdefault((took.device, took.rough), []).append(f"  {source:<28}{text:>16}")
    for (device, rough), times in by_device.items():
        how = "rough, at the speed of a matrix product" if rough else "as fast as before"
        lines += [f"time on {device} ({how})", *times]
    return lines


def _row(name: str, size: str, units: str = "", tokens: str = "", note: str = "") -> str:
    return f"{name:<36}{size:>10}{units:>10}{tokens:>11}  {note}".rstrip()


def refuse_what_does_not_fit(ctx: Context, plan: StagePlan) -> None:
    """Refuses to start cache-teachers where its output has no room; warns where only an upper bound has none.

    Args:
        ctx: the run.
        plan: of the stage about to be started; other stages are let through.

    Raises:
        KdpipeError: need and room, and what can be done.
    """
    if plan.stage != STAGE.name or not plan.todo:
        return
    try:
        cost = estimate(ctx, plan, requirements(ctx), time=False)
    except StoreError:
        return  # the stage itself names what is damaged
    folder = ctx.folder(plan.stage)
    free, reserve = room(folder)
    if cost.bytes <= free:
        return
    there = f"{human_bytes(free)} are free for it ({human_bytes(reserve)} are kept back)"
    if cost.firm_bytes <= free:
        ctx.say(
            f"{plan.stage}: may need up to {human_bytes(cost.bytes)} in {folder}, and {there}. {_remedy(ctx.config)}"
        )
        return
    largest = max(cost.lines, key=lambda line: line.bytes)
    raise KdpipeError(
        f"{plan.stage}: {folder} has no room: {_need(cost)} are needed, most for {largest.name} "
        f"({human_bytes(largest.bytes)}), and {there}. Nothing was started. {_remedy(ctx.config)} "
        f"`kdpipe {plan.stage} --dry-run` shows the bytes of each."
    )


def _need(cost: Estimate) -> str:
    return f"{ {'exact': '', 'estimated': 'about ', 'at most': 'up to '}[cost.basis] }{human_bytes(cost.bytes)}"


def _remedy(config: Config) -> str:
    ways: Sequence[str] = (
        *(
            ["a smaller codec (teachers.states: int8 or low_rank_int8)"]
            if config.teachers.states != "low_rank_int8"
            else []
        ),
        "fewer layers (layers.mode or teachers.acoustic.layers: skip)",
        "fewer entries (teachers.k, teachers.mass)",
        "run.cache on another disk",
    )
    return f"Choose {', '.join(ways[:-1])}, or {ways[-1]}; or free space."


def human_bytes(count: float) -> str:
    """Three digits and a decimal unit: `4.08 MB`."""
    place = 0
    while count >= 999.5 and place < len(_UNITS) - 1:
        count, place = count / 1000, place + 1
    digits = 0 if place == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {_UNITS[place]}"


def human_seconds(seconds: float) -> str:
    """Two digits and the unit that suits: `42 s`, `13 min`, `7.6 h`, `3.2 days`."""
    for unit, size, limit in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{seconds / size:.{0 if seconds / size >= 9.95 else 1}f} {unit}"
    return f"{seconds / 86400:,.1f} days"
