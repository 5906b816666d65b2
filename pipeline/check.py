"""Looks at everything that can be wrong before any model is loaded, and reports all of it at once."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kdpipe.data.errors import ConfigError, KdpipeError, ManifestError, Rejected
from kdpipe.data.manifest import Sample, check_sample
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.blocks import block_bounds
from kdpipe.stages.cache_teachers.layers import layer_map
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.vocabulary import Alignment, align, load_vocabulary
from kdpipe.stages.train.lora_targets import adapted_layers, describe
from kdpipe.stages.train.metrics import missing_watchers


@dataclass(frozen=True)
class Findings:
    """What `kdpipe check` prints when nothing is wrong: one line each."""

    lines: tuple[str, ...]


def check(ctx: Context, *, download: bool = False) -> Findings:
    """Checks the manifest, the models' folders, their vocabularies and the layer map.

    Args:
        ctx: the run.
        download: fetch hub models that are not in the local cache.

    Raises:
        ConfigError: all problems found.
    """
    problems: list[str] = []
    lines: list[str] = []

    @contextmanager
    def gather(key: str = "") -> Iterator[None]:
        try:
            yield
        except (ConfigError, ManifestError) as error:
            problems.extend(error.problems)
        except KdpipeError as error:
            problems.append(f"{key}: {error}" if key else str(error))

    def inspect(key: str, settings: ModelConfig, *, hears: bool | None) -> ModelFolder | None:
        with gather(key):
            folder = resolve(settings, ctx.base, download=download)
            lines.append(f"{key}: {folder.name}: {folder.family}, {folder.layers} layers, width {folder.width}")
            if not any(folder.path.glob("*.safetensors")):
                problems.append(
                    f"{key}: {folder.path} has no *.safetensors. kdpipe loads no pickled weights; convert them."
                )
            if hears is not None and folder.hears != hears:
                want, got = ("an audio", "a text") if hears else ("a text", "an audio")
                problems.append(f"{key}: {folder.name} is {got} model; name {want} model.")
            return folder
        return None

    problems += missing_watchers(ctx.config.train.log_to)
    with gather():
        _check_samples(ctx, problems, lines)
    config = ctx.config
    student = inspect("student.model", config.student.model, hears=True)
    if config.textualize.describe.model is not None:
        inspect("textualize.describe.model", config.describer, hears=True)
    if config.textualize.trace.model is not None:
        inspect("textualize.trace.model", config.tracer, hears=None)
    teacher = inspect("teachers.textual.model", config.teachers.textual.model, hears=False)
    acoustic = student
    if config.teachers.acoustic.model is not None:
        acoustic = inspect("teachers.acoustic.model", config.acoustic, hears=True)
    if config.evaluate.model is not None:
        inspect("evaluate.model", config.evaluate.model, hears=True)
    if student is not None and config.train.lora is not None and any(student.path.glob("*.safetensors")):
        with gather():
            lines.append(f"train.lora: {describe(config.train.lora, adapted_layers(student, config.train.lora))}")
    if student is not None and teacher is not None:
        with gather():
            shared = _vocabulary(student, teacher)
            lines.append(
                f"vocabulary: ids below {shared.valid} shared, {len(shared.masked)} of them masked; "
                f"{student.head_rows} rows in the student's head, {teacher.head_rows} in the teacher's"
            )
            block_bounds(shared.valid, config.teachers.tail_blocks)
        with gather():
            layers = layer_map(config.layers, student.layers, teacher.layers)
            text = ", ".join(f"{ours}->{theirs}" for ours, theirs in layers.items())
            lines.append(f"layers (student->teacher): {text or 'top only'}")
    if student is not None and acoustic is not None:
        ours, theirs = (f"{model.layers} layers of width {model.width}" for model in (student, acoustic))
        if ours != theirs:
            problems.append(
                f"teachers.acoustic.model: {acoustic.name} has {theirs}, the student {ours}; "
                "name a snapshot of the student."
            )
    if not problems:
        with gather():
            requirements(ctx)
    if problems:
        raise ConfigError(problems)
    return Findings(tuple(lines))


def _vocabulary(student: ModelFolder, teacher: ModelFolder) -> Alignment:
    ours, theirs = (load_vocabulary(folder.path, folder.name) for folder in (student, teacher))
    return align(ours, theirs, student.head_rows, teacher.head_rows)


def unknown_tasks(named: Iterable[str], samples: Iterable[Sample], split: str) -> list[str]:
    """One problem for each task of `train.task_weights` that no sample of the training split has."""
    there = {sample.task for sample in samples if sample.task is not None}
    problems = []
    for task in named:
        if task not in there:
            close = difflib.get_close_matches(task, list(there), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(
                f"train.task_weights.{task}: no sample of split {split!r} has this task "
                f"(there are {', '.join(sorted(there)) or 'none: the column task is empty'}){hint}"
            )
    return problems


def _check_benchmarks(ctx: Context, problems: list[str], lines: list[str]) -> None:
    """Whether the rows that evaluate scores by the rule of a benchmark hold what that needs."""
    asked = [sample for sample in ctx.samples(ctx.config.data.eval_split) if sample.extra.get("benchmark") is not None]
    if not asked:
        return
    from kdpipe.stages.evaluate.benchmarks import BENCHMARKS, item_of

    counts = Counter(str(sample.extra["benchmark"]) for sample in asked)
    for name, count in counts.items():
        how = f"scored as {BENCHMARKS[name].title}" if name in BENCHMARKS else "not known, scored as any others"
        lines.append(f"manifest: benchmark {name!a}: {count} samples, {how}")
    for sample in asked:
        benchmark = BENCHMARKS.get(str(sample.extra["benchmark"]))
        if benchmark is not None:
            try:
                benchmark.reference_of(item_of(sample.extra.get("item"), sample.id))
            except KdpipeError as error:
                problems.append(f"data.manifest: {error}")
                return


def _check_samples(ctx: Context, problems: list[str], lines: list[str]) -> None:
    data = ctx.config.data
    samples = ctx.manifest.samples
    splits = Counter(sample.split or "train" for sample in samples)
    lines.append(f"manifest: {len(samples)} samples ({', '.join(f'{name} {n}' for name, n in splits.most_common())})")
    trains = ctx.config.evaluate.model is None
    for key, name in (("data.train_split", data.train_split), ("data.eval_split", data.eval_split)):
        if name not in splits and (trains or key == "data.eval_split"):
            close = difflib.get_close_matches(name, list(splits), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(
                f"{key}: no sample of the manifest is in split {name!r} (there are {', '.join(splits)}){hint}"
            )
    if trains:
        problems += unknown_tasks(ctx.config.train.task_weights, ctx.samples(data.train_split), data.train_split)
    _check_benchmarks(ctx, problems, lines)
    wanted = [sample for sample in samples if (sample.split or "train") in (data.train_split, data.eval_split)]
    reasons: dict[str, list[str]] = defaultdict(list)
    for sample in wanted:
        try:
            check_sample(sample)
            if any(ref.path is not None and not ref.path.exists() for ref in sample.audio):
                raise Rejected("audio_missing", "no such file")
        except Rejected as rejected:
            reasons[rejected.reason].append(sample.id)
    for reason, ids in reasons.items():
        lines.append(f"manifest: {len(ids)} of {len(wanted)} samples will be rejected: {reason}, first {ids[0]!a}")
    rejected = sum(map(len, reasons.values()))
    if rejected > data.max_reject_fraction * len(wanted):
        lines.append(f"manifest: that is more than data.max_reject_fraction = {data.max_reject_fraction:g} allows")
