"""One run of the train stage: loads, trains or goes on, exports, records."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from kdpipe.data.errors import ConfigError, KdpipeError
from kdpipe.data.files import build_aside, listing, move_into_place, retire
from kdpipe.data.hashing import digest
from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.reader import Store
from kdpipe.data.stream import Entry, Stream
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.config import TrainConfig, identity_of
from kdpipe.stages.environment import environment
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.loaded import LoadedModel, load_model
from kdpipe.stages.train import checkpoint
from kdpipe.stages.train.card import Made, model_card
from kdpipe.stages.train.data import Reader
from kdpipe.stages.train.export import published_names, write_student
from kdpipe.stages.train.loop import Place, train
from kdpipe.stages.train.lora import Adapter, add_adapter
from kdpipe.stages.train.lora_targets import describe
from kdpipe.stages.train.metrics import missing_watchers, read_metrics
from kdpipe.stages.train.names import NEVER_TRAINED
from kdpipe.stages.train.objective import MicroBatch, Objective
from kdpipe.stages.train.optimizer import Optimizer, freeze
from kdpipe.stages.train.sharding import shard
from kdpipe.stages.train.speed import set_speed
from kdpipe.stages.train.stage import ADAPTER, SOURCE, STAGE, student_identity
from kdpipe.stages.train.terms import NO_FLOAT16, resolve_terms
from kdpipe.stages.train.validation import NOWHERE, Validation, held_out_targets
from kdpipe.stages.train.weights import Weighting
from kdpipe.stages.train.world import World


def run(ctx: Context, plans: Mapping[str, StagePlan], world: World | None = None) -> None:
    """Trains the student that `plans` ask for and records it.

    Args:
        ctx: the run.
        plans: of this stage and those upstream, as things are on disk.
        world: the processes that train together; None: this one alone.

    Raises:
        KdpipeError: something upstream is not fresh, or training cannot go on; says why.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was written.
    """
    plan, config = plans[STAGE.name], ctx.config.train
    world = World.alone(config.device) if world is None else world
    waiting = [want for want in plan.wanted if want.pending is not None]
    if waiting or not plan.wanted:
        raise KdpipeError(
            f"train: {waiting[0].pending if waiting else 'cache-teachers'} is not done for {len(waiting)} samples "
            f"and {len(plan.wanted) - len(waiting)} are ready. Run `kdpipe train`, which runs what it needs."
        )
    needs = requirements(ctx)
    base, terms = needs.student, resolve_terms(ctx.config, needs)
    if base.settings.dtype == "float16":
        raise KdpipeError(NO_FLOAT16)
    if problems := missing_watchers(config.log_to):
        raise ConfigError(problems)
    ledger = plans["cache-teachers"].ledger
    targets = {want.id: row for want in plan.wanted if (row := ledger.get(want.id, "targets")) is not None}
    held = held_out_targets(ctx, plans)
    stream = stream_of(config, targets, world)
    total = stream.total_steps(config.max_steps)
    samples = {sample.id: sample for sample in ctx.samples(ctx.config.data.train_split)}
    reader = Reader(
        ctx.config,
        terms,
        Encoder(base),
        samples,
        Store(ledger.parts, ledger),
        {sample: row.length for sample, row in (targets | held).items()},
        needs.textual.layers if needs.textual is not None else 0,
        pinned=world.device.type == "cuda",
    )

    tasks = {sample.id: sample.task for sample in samples.values()}
    weights = Weighting(terms, tasks, total)

    def recheck() -> None:
        ctx.recheck([samples[want.id] for want in plan.wanted])

    place = Place(ctx.folder(STAGE.name), ctx.tmp(STAGE.name), student_identity(plan), ctx.say, recheck)
    if any(row.content != place.identity for row in ctx.ledger(STAGE.name).rows()):
        cache = shlex.quote(os.path.relpath(ctx.cache_folder, ctx.base))
        ctx.say(
            f"train: the student in {place.folder / SOURCE} was trained otherwise and will be replaced; to keep it, "
            f"train this one with --set run.folder=NAME --set run.cache={cache}"
        )
    is_sharded = config.fsdp and world.size > 1
    with _reproducible(config.seed):
        student, adapter = _student(ctx, base, torch.device("cpu") if is_sharded else world.device)
        ctx.recheck_model(base.path)
        trained = _trained(student)
        count, whole = _numel(trained.values()), _numel(student.model.parameters())
        ctx.say(f"train: {count:,} weights trained, {whole - count:,} frozen, {total} steps on {world.device}")
        if adapter is not None:
            ctx.say(f"train: LoRA: {describe(adapter.config, adapter.layers)}")
        if is_sharded:
            shard(student, world)
            trained = _trained(student)
            ctx.say(f"train: weights, gradients and moments are shared out to {world.size} processes (FSDP2)")
        elif config.fsdp:
            ctx.say("train: train.fsdp has no effect in a process that trains alone")
        objective = Objective(
            student,
            terms,
            teacher=needs.textual,
            alignment=needs.alignment,
            seed=config.seed,
            form=config.head_form,
            filler=_filler(reader, targets) if is_sharded else None,
        )
        for line in terms.describe():
            ctx.say(f"train: loss: {line}")
        chosen = "chosen for this device" if config.head_form == "auto" else "as train.head_form says"
        ctx.say(f"train: output head and losses in form {objective.form()} ({chosen})")
        optimizer = Optimizer(trained, dict(objective.projections.named_parameters()), config, total)
        validation = None
        if held:
            validation = Validation(
                student.model,
                objective,
                weights,
                reader,
                held,
                tasks,
                batch_tokens=config.global_batch_tokens,
                every=config.validate_steps,
                world=world,
            )
        if config.validation_fraction > 0:
            ctx.say(f"train: {len(held)} samples are held out for validation, {len(plan.wanted)} are trained on")
        train(config, place, objective, weights, optimizer, stream, reader, total, world, validation)

    def export() -> None:
        nonlocal student, adapter
        recheck()
        step = total
        if config.export == "best" and validation is not None and validation.best_step is not None:
            step = validation.best_step
        if is_sharded:
            student, adapter = _student(ctx, base, torch.device("cpu"))
        if is_sharded or step != total:
            checkpoint.restore(student.model, checkpoint.check(checkpoint.named(place.checkpoints, step)))
        made = Made(
            base=base,
            textual=needs.textual,
            acoustic=needs.acoustic,
            terms=terms,
            settings=identity_of(config),
            samples=len(plan.wanted),
            response_tokens=sum(row.tokens for row in targets.values()),
            steps=total,
            exported=step,
            identity=place.identity,
            metrics=read_metrics(place.metrics),
            prompt=ctx.config.student.prompt,
            system=ctx.config.student.system,
            lora=None if adapter is None else describe(adapter.config, adapter.layers),
        )
        own = ctx.ledger(STAGE.name)
        with _writing(place.folder), build_aside(place.tmp) as built, build_aside(place.tmp) as beside:
            if adapter is not None:
                adapter.write(beside)
                adapter.merge()
            write_student(built, base, student.model, model_card(made))
            # Rows of the student that is replaced go first: at no moment do they stand beside another's weights.
            own.commit(drop=[(row.id, row.source) for row in own.rows()])
            retire(place.folder / ADAPTER, place.tmp)
            if adapter is not None:
                move_into_place(beside, place.folder / ADAPTER)
            move_into_place(built, place.folder / SOURCE)
        files = listing(place.folder / SOURCE) + [f"../{ADAPTER}/{file}" for file in listing(place.folder / ADAPTER)]
        about = {"content": place.identity, "cover": {"files": files}, "made_with": environment(ctx, STAGE.name).text}
        rows = [
            Row(want.id, SOURCE, want.key, want.fields, SOURCE, tokens=targets[want.id].tokens, **about)
            for want in plan.wanted
        ]
        own.commit(rows)
        ctx.say(f"train: {total} steps on {len(rows)} samples; the student is in {place.folder / SOURCE}")

    world.first_does(export)


def stream_of(config: TrainConfig, targets: Mapping[str, Row], world: World) -> Stream:
    """The order in which samples are trained on, and this rank's share of them."""
    entries = [Entry(sample, row.part, row.length) for sample, row in sorted(targets.items())]
    return Stream(
        entries,
        digest=digest(entries),
        seed=config.seed,
        batch_tokens=config.global_batch_tokens,
        window_parts=config.window_parts,
        epochs=config.epochs,
        rank=world.rank,
        world=world.size,
    )


def _student(ctx: Context, base: ModelFolder, device: torch.device) -> tuple[LoadedModel, Adapter | None]:
    """The student as training starts from it: loaded, with its adapter, frozen where nothing is trained."""
    config = ctx.config.train
    student = load_model(base, device=device, train=True)
    names = published_names(student.model, base)
    freeze(student.model, names, NEVER_TRAINED.get(base.family, ()), base.family)
    adapter = None if config.lora is None else add_adapter(student.model, base, names, config.lora, seed=config.seed)
    freeze(student.model, names, config.freeze, base.family)
    set_speed(student, config)
    return student, adapter


def _trained(student: LoadedModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in student.model.named_parameters() if parameter.requires_grad}


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _filler(reader: Reader, targets: Mapping[str, Row]) -> MicroBatch:
    """The shortest sample, for a rank that has no other."""
    shortest = min(targets, key=lambda sample: (targets[sample].length, sample))
    return reader.load((NOWHERE, [shortest])).micros[0]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says of safetensors' own error, which is no OSError, what and where."""
    try:
        yield
    except SafetensorError as error:
        raise KdpipeError(
            f"train: the student could not be written to {folder} ({error}). The last checkpoint is whole: make room, "
            "and run the same command again."
        ) from None


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seeds torch and asks for algorithms that give the same bits each time, where there are such."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
