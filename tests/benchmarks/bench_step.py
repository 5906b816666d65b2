"""A training step with two teachers beside a plain fine-tuning step of the same student on the same batches.

    python tests/benchmarks/bench_step.py

A Qwen2.5-Omni student and a Qwen3 teacher, untaught, with the padded vocabulary of 16,384 rows; samples with clips and
traces of made-up words, cached by the real stage. *kdpipe* reads each batch from the store in threads ahead, decodes
its clips, and takes a step of the whole objective: cross-entropy, the textual teacher's last layer, and the acoustic
teacher's states at every layer. *Plain* is given the same batches in memory: transformers' forward pass with labels,
its own cross-entropy, backward pass, clipping, and torch's fused AdamW. Rounds alternate; ratios are medians of the
ratios within each round.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import capture_world
import click
import torch

from kdpipe.data.store.reader import Store
from kdpipe.data.stream import Stream, prefetch
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.config import TrainConfig, WeightsConfig
from kdpipe.stages.miniature.models import make_qwen2_5_omni, make_qwen3
from kdpipe.stages.miniature.tokenizer import AUDIO_SPECIALS, TEXT_SPECIALS, train_tokenizer
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.loaded import LoadedModel, load_model
from kdpipe.stages.train import loop
from kdpipe.stages.train.data import GlobalBatch, Reader
from kdpipe.stages.train.objective import Objective
from kdpipe.stages.train.optimizer import Optimizer
from kdpipe.stages.train.run import stream_of
from kdpipe.stages.train.stage import current_plans
from kdpipe.stages.train.terms import resolve_terms
from kdpipe.stages.train.weights import Weighting
from kdpipe.stages.train.world import World


def make(folder: Path, *, samples: int, hidden: int, layers: int) -> Context:
    """Models, samples, and the cache of both teachers."""
    sizes = capture_world.Sizes()
    words = capture_world.Words(2 * sizes.ids, 0)
    texts = ["\n".join(words.all[at : at + 64]) for at in range(0, len(words.all), 64)]
    text, audio = (train_tokenizer(texts, sizes.ids, specials) for specials in (TEXT_SPECIALS, AUDIO_SPECIALS))
    make_qwen3(folder / "models" / "teacher", tokenizer=text, hidden=256, layers=4, rows=sizes.rows)
    student = folder / "models" / "student"
    make_qwen2_5_omni(student, tokenizer=audio, hidden=hidden, layers=layers, rows=sizes.rows)
    capture_world.write_run(folder / "base", samples, sizes, seed=1)
    weights = WeightsConfig(layer=0.0)
    config = capture_world.configuration(folder / "models", weights=weights, batch_tokens=4096)
    train = TrainConfig(
        weights=weights, global_batch_tokens=4096, micro_batch_tokens=2048, epochs=1, device="cpu", warmup_ratio=0.0
    )
    layers_config = dataclasses.replace(config.layers, mode="top")
    ctx = Context(dataclasses.replace(config, train=train, layers=layers_config), folder / "base", lambda line: None)
    capture_world.textualize(ctx)
    CACHE_TEACHERS.run(ctx, capture_world.to_make(ctx))
    return ctx


class Bench:
    """A student in training by kdpipe, and a second one by plain fine-tuning."""

    def __init__(self, ctx: Context):
        config, needs = ctx.config.train, requirements(ctx)
        self.world, self.terms = World.alone("cpu"), resolve_terms(ctx.config, needs)
        assert needs.textual is not None
        ledger = current_plans(ctx)["cache-teachers"].ledger
        samples = {sample.id: sample for sample in ctx.samples("train")}
        targets = {name: row for name in samples if (row := ledger.get(name, "targets")) is not None}
        self.stream: Callable[[], Stream] = lambda: stream_of(config, targets, self.world)
        self.reader = Reader(
            ctx.config,
            self.terms,
            Encoder(needs.student),
            samples,
            Store(ledger.parts, ledger),
            {name: row.length for name, row in targets.items()},
            needs.textual.layers,
        )
        self.steps = self.stream().total_steps()
        self.weights = Weighting(self.terms, dict.fromkeys(samples), 1000)
        self.student, self.other = (load_model(needs.student, device="cpu", train=True) for _ in range(2))
        self.objective = Objective(
            self.student, self.terms, teacher=needs.textual, alignment=needs.alignment, seed=0, form=config.head_form
        )
        self.optimizer = Optimizer(trained(self.student), {}, config, 1000)
        self.adamw = torch.optim.AdamW(
            trained(self.other).values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.batches: list[GlobalBatch] = [self.reader.load(item) for item in self.stream()]
        self.waited = 0.0

    def kdpipe(self) -> float:
        """Seconds of an epoch, and in `waited` those of them spent waiting for data."""
        self.waited, began = 0.0, time.perf_counter()
        with closing(prefetch(self.stream(), self.reader.load, depth=4, threads=2)) as batches:
            for number in range(self.steps):
                start = time.perf_counter()
                batch = next(batches)
                if number:  # nothing can be read ahead of the first
                    self.waited += time.perf_counter() - start
                loop.train_step(self.objective, self.weights, self.optimizer, batch, number, self.world)
                batch.release()
        return time.perf_counter() - began

    def plain(self) -> float:
        """Seconds of an epoch of plain fine-tuning."""
        began = time.perf_counter()
        for batch in self.batches:
            for micro in batch.micros:
                found = micro.batch
                labels = torch.full_like(found.input_ids, -100).flatten()
                labels[found.response_rows + 1] = found.targets
                out = self.other.model(**found.forward, labels=labels.view_as(found.input_ids), use_cache=False)
                (out.loss * (len(found.targets) / batch.response_tokens)).backward()
            torch.nn.utils.clip_grad_norm_(trained(self.other).values(), 1.0)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
        return time.perf_counter() - began


def trained(loaded: LoadedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of a student that a sample reaches."""
    return {name: p for name, p in loaded.model.named_parameters() if not name.startswith("visual.")}


@click.command(help=__doc__)
@click.option("--samples", type=click.IntRange(2), default=96, show_default=True)
@click.option("--hidden", type=click.IntRange(32), default=512, show_default=True, help="Width of the student.")
@click.option("--layers", type=click.IntRange(1), default=8, show_default=True, help="Depth of the student.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch.")
def main(samples: int, hidden: int, layers: int, repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="bench_step-") as made:
        bench = Bench(make(Path(made), samples=samples, hidden=hidden, layers=layers))
        tokens = sum(batch.tokens for batch in bench.batches)
        ours, theirs, waits = [], [], []
        for number in range(repeats + 1):
            pair = [bench.kdpipe, bench.plain]
            seconds = {work.__name__: work() for work in (pair if number % 2 else pair[::-1])}
            click.echo(f"round {number}/{repeats}", err=True)
            if number:  # the first is to warm up
                ours.append(seconds["kdpipe"])
                theirs.append(seconds["plain"])
                waits.append(bench.waited / seconds["kdpipe"])
    count = sum(parameter.numel() for parameter in trained(bench.student).values())
    click.echo(
        f"student of {count:,} weights, {tokens} tokens in {bench.steps} steps of {samples} samples, "
        f"{threads} thread(s), torch {torch.__version__}, Python {sys.version.split()[0]}\n"
    )
    click.echo("| | tokens/s | of plain's time | waiting for data |\n|---|--:|--:|--:|")
    ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
    click.echo(f"| kdpipe, two teachers | {tokens / median(ours):,.0f} | {ratio:.2f} | {median(waits):.1%} |")
    click.echo(f"| plain fine-tuning | {tokens / median(theirs):,.0f} | 1.00 | |")


if __name__ == "__main__":
    main()
