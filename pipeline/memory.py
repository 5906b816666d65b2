"""What memory `train` will take, for people; and refusing it where the device has too little."""

from __future__ import annotations

from kdpipe.data.errors import KdpipeError
from kdpipe.pipeline.cost import human_bytes
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.train.cost import Memory, estimate
from kdpipe.stages.train.launch import Launch
from kdpipe.stages.train.stage import STAGE
from kdpipe.stages.train.terms import resolve_terms


def training_memory(ctx: Context, launch: Launch | None = None) -> Memory:
    """What training takes in this process, one of several where it was launched so; PyTorch is not imported.

    Raises:
        KdpipeError: a model folder cannot be read, or the objective is empty.
    """
    needs = requirements(ctx)
    return estimate(ctx, needs, resolve_terms(ctx.config, needs), ctx.ledger(CACHE_TEACHERS.name), launch)


def memory_lines(ctx: Context) -> list[str]:
    """A line and a table of the memory that training takes; in 80 columns."""
    need = training_memory(ctx)
    lines = [memory_line(need), _row(f"train will take on {need.device}", "bytes", "counted from")]
    lines += [_row(f"  {line.name}", human_bytes(line.bytes), line.note) for line in need.lines]
    lines.append(_row("  in all", human_bytes(need.bytes), "estimated"))
    fits = "unknown" if need.total is None else human_bytes(need.total)
    note = "TOO LITTLE" if _is_too_large(need) else "too little?" if _may_be_too_large(need) else ""
    lines.append(_row("the device has", fits, note))
    if need.host:
        lines.append(_row("beside them, in the computer's memory", human_bytes(need.host), "estimated"))
    return lines


def memory_line(need: Memory) -> str:
    """The same in one line."""
    largest = sorted(need.lines, key=lambda line: -line.bytes)[:3]
    parts = ", ".join(f"{line.name} {human_bytes(line.bytes)}" for line in largest)
    has = "" if need.total is None else f" of {human_bytes(need.total)}"
    return f"train: about {human_bytes(need.bytes)}{has} on {need.device} (most of it: {parts})"


def refuse_training_that_does_not_fit(ctx: Context, plan: StagePlan, launch: Launch | None = None) -> None:
    """Says what memory training will take, and refuses to start it where the device cannot have that much.

    Args:
        ctx: the run.
        plan: of the stage about to be started; other stages are let through.
        launch: how this process was started together with others; None: it trains alone.

    Raises:
        KdpipeError: need and memory, and what can be done.
    """
    if plan.stage != STAGE.name or not plan.todo:
        return
    need = training_memory(ctx, launch)
    if not _is_too_large(need):
        ctx.say(memory_line(need))
        if _may_be_too_large(need):
            ctx.say(
                f"train: this is more than {need.device} has, if the estimate is right. {_remedy(ctx, need, launch)}"
            )
        return
    assert need.total is not None
    raise KdpipeError(
        f"train: {need.device} has {human_bytes(need.total)} of memory{_each(launch)}, and at least "
        f"{human_bytes(need.firm_bytes)} are needed, about {human_bytes(need.bytes)}, most for {_largest(need)}. "
        f"Nothing was loaded. {_remedy(ctx, need, launch)} `kdpipe train --dry-run` shows the bytes of each."
    )


def _is_too_large(need: Memory) -> bool:
    return need.total is not None and need.firm_bytes > need.total


def _may_be_too_large(need: Memory) -> bool:
    return need.total is not None and need.bytes > need.total


def _largest(need: Memory) -> str:
    line = max(need.lines, key=lambda line: line.bytes)
    return f"{line.name} ({human_bytes(line.bytes)})"


def _each(launch: Launch | None) -> str:
    return "" if launch is None or launch.local_size == 1 else f" for each of {launch.local_size} processes"


def _remedy(ctx: Context, need: Memory, launch: Launch | None) -> str:
    train = ctx.config.train
    ways = [
        *(["set train.fsdp: true"] if launch is not None and not train.fsdp else []),
        *([] if train.gradient_checkpointing else ["set train.gradient_checkpointing: true"]),
        f"lower train.micro_batch_tokens ({train.micro_batch_tokens})",
        *(["train fewer weights (train.freeze, train.lora)"] if train.lora is None else []),
        *(["student.model.dtype: bfloat16"] if ctx.config.student.model.dtype == "float32" else []),
    ]
    kept = sum(line.bytes for line in need.lines if line.exact)
    if need.total is not None and kept > need.total:
        # Weights and what is kept of them do not fit by themselves: activations need not be looked at.
        ways = [way for way in ways if "checkpointing" not in way and "micro_batch" not in way]
    return f"{ways[0][0].upper()}{ways[0][1:]}{''.join(f', or {way}' for way in ways[1:])}."


def _row(name: str, size: str, note: str = "") -> str:
    return f"{name:<38}{size:>10}  {note}".rstrip()
