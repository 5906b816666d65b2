"""A training step with two teachers beside a plain fine-tuning step of the same student on the same batches.

\b
    python tests/benchmarks/bench_step.py                   # CPU
    python tests/benchmarks/bench_step.py --preset gpu      # one GPU, a student of a billion weights

A Qwen2.5-Omni student and a Qwen3 teacher, untaught; samples with clips and traces of made-up words, cached by the
real stage. *kdpipe* reads each batch from the store in threads ahead, decodes its clips, and takes a step of the whole
objective: cross-entropy, the textual teacher's last layer, and the acoustic teacher's states at every layer. *Plain* is
given the same batches in memory (the GPU's, where there is one): transformers' forward pass with labels, its own
cross-entropy, backward pass, clipping, and torch's fused AdamW. In bfloat16 plain fine-tuning keeps float32 weights
under autocast, as transformers' Trainer does with `bf16=True`, and kdpipe bfloat16 weights with a float32 copy. Rounds
alternate; ratios are medians of the ratios within each round. Peak memory (on a GPU) is what tensors took: weights,
gradients and moments of the one that was at work, and all that its steps needed.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, Literal

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
from kdpipe.stages.train.speed import set_speed
from kdpipe.stages.train.stage import current_plans
from kdpipe.stages.train.terms import resolve_terms
from kdpipe.stages.train.weights import Weighting
from kdpipe.stages.train.world import World


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured: the student's shape, the batches, and where."""

    samples: int
    ids: int
    rows: int
    hidden: int
    layers: int
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    global_tokens: int
    micro_tokens: int
    repeats: int
    threads: int
    compile: bool = False


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"samples": 96, "ids": 16_000, "rows": 16_384, "hidden": 512, "layers": 8, "dtype": "float32"}
    | {"device": "cpu", "global_tokens": 4096, "micro_tokens": 2048, "repeats": 5, "threads": 1},
    "gpu": {"samples": 768, "ids": 60_000, "rows": 61_440, "hidden": 2048, "layers": 20, "dtype": "bfloat16"}
    | {"device": "cuda", "global_tokens": 32_768, "micro_tokens": 16_384, "repeats": 5, "threads": 4},
}


def make(folder: Path, settings: Settings) -> Context:
    """Models, samples, and the cache of both teachers."""
    sizes = capture_world.Sizes(ids=settings.ids, rows=settings.rows)
    words = capture_world.Words(2 * sizes.ids, 0)
    texts = ["\n".join(words.all[at : at + 64]) for at in range(0, len(words.all), 64)]
    text, audio = (train_tokenizer(texts, sizes.ids, specials) for specials in (TEXT_SPECIALS, AUDIO_SPECIALS))
    make_qwen3(folder / "models" / "teacher", tokenizer=text, hidden=256, layers=4, rows=sizes.rows)
    student = folder / "models" / "student"
    make_qwen2_5_omni(student, tokenizer=audio, hidden=settings.hidden, layers=settings.layers, rows=sizes.rows)
    capture_world.write_run(folder / "base", settings.samples, sizes, seed=1)
    weights = WeightsConfig(layer=0.0)
    config = capture_world.configuration(
        folder / "models", dtype=settings.dtype, weights=weights, batch_tokens=4096, device=settings.device
    )
    train = TrainConfig(
        weights=weights,
        global_batch_tokens=settings.global_tokens,
        micro_batch_tokens=settings.micro_tokens,
        epochs=1,
        device=settings.device,
        warmup_ratio=0.0,
        compile=settings.compile,
    )
    model = dataclasses.replace(config.student.model, dtype=settings.dtype)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, model=model),
        train=train,
        layers=dataclasses.replace(config.layers, mode="top"),
    )
    ctx = Context(config, folder / "base", lambda line: None)
    capture_world.textualize(ctx)
    CACHE_TEACHERS.run(ctx, capture_world.to_make(ctx))
    return ctx


class Bench:
    """A student in training by kdpipe, and a second one by plain fine-tuning."""

    def __init__(self, ctx: Context, settings: Settings):
        self._settings = settings
        config, needs = ctx.config.train, requirements(ctx)
        self.world, self.terms = World.alone(settings.device), resolve_terms(ctx.config, needs)
        self.device = self.world.device
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
            pinned=self.device.type == "cuda",
        )
        self.steps = self.stream().total_steps()
        self.weights = Weighting(self.terms, dict.fromkeys(samples), 1000)
        self.held = {"kdpipe": 0, "plain": 0}
        """Bytes of weights and moments of each, once it has taken a step; of tensors on a GPU."""
        self.student = load_model(needs.student, device=self.device, train=True)
        set_speed(self.student, config)
        self.objective = Objective(
            self.student, self.terms, teacher=needs.textual, alignment=needs.alignment, seed=0, form=config.head_form
        )
        self.optimizer = Optimizer(trained(self.student), {}, config, 1000)
        self.waited, self.peak = 0.0, 0
        self.kdpipe()
        self.held["kdpipe"] = self._allocated()
        self.other = load_model(needs.student, device=self.device, dtype=torch.float32, train=True)
        if settings.compile:
            set_speed(self.other, config)
        self.adamw = torch.optim.AdamW(
            trained(self.other).values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.batches: list[GlobalBatch] = [self.reader.load(item) for item in self.stream()]
        self.plain()
        self.held["plain"] = self._allocated() - self.held["kdpipe"]

    def _allocated(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def measured(self, name: str) -> float:
        """Seconds of an epoch; `peak` is the memory that it took."""
        gc.collect()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds = getattr(self, name)()
        if on_gpu:
            others = sum(held for whose, held in self.held.items() if whose != name)
            self.peak = torch.cuda.max_memory_allocated() - others
        return seconds

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
        return self._since(began)

    def plain(self) -> float:
        """Seconds of an epoch of plain fine-tuning."""
        began = time.perf_counter()
        low = self._settings.dtype == "bfloat16"
        for batch in self.batches:
            for micro in batch.micros:
                found = micro.batch
                labels = torch.full_like(found.input_ids, -100).flatten()
                labels[found.response_rows + 1] = found.targets
                labels = labels.view_as(found.input_ids).to(self.device, non_blocking=True)
                forward = {key: value.to(self.device, non_blocking=True) for key, value in found.forward.items()}
                with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                    out = self.other.model(**forward, labels=labels, use_cache=False)
                (out.loss * (len(found.targets) / batch.response_tokens)).backward()
            torch.nn.utils.clip_grad_norm_(trained(self.other).values(), 1.0)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
        return self._since(began)

    def _since(self, began: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def trained(loaded: LoadedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of a student that a sample reaches."""
    return {name: p for name, p in loaded.model.named_parameters() if not name.startswith("visual.")}


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="cpu", show_default=True, help="Sizes and device.")
@click.option("--samples", type=click.IntRange(2), help="Samples of an epoch, instead of the preset's.")
@click.option("--ids", type=click.IntRange(512), help="Ordinary ids of the tokenizer.")
@click.option("--rows", type=click.IntRange(512), help="Rows of the output head.")
@click.option("--hidden", type=click.IntRange(32), help="Width of the student.")
@click.option("--layers", type=click.IntRange(1), help="Depth of the student.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]))
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
@click.option("--global-tokens", type=click.IntRange(1), help="Tokens of a step.")
@click.option("--micro-tokens", type=click.IntRange(1), help="Tokens of a forward pass.")
@click.option("--repeats", type=click.IntRange(1), help="Rounds.")
@click.option("--threads", type=click.IntRange(1), help="Of torch.")
@click.option("--compile", is_flag=True, help="Both with torch.compile on the decoder layers.")
def main(preset: str, **changes: Any) -> None:
    settings = Settings(**{**PRESETS[preset], **{name: value for name, value in changes.items() if value is not None}})
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device is here; choose --device cpu.")
    torch.set_num_threads(settings.threads)
    seconds: dict[str, list[float]] = {"kdpipe": [], "plain": []}
    peaks: dict[str, int] = {}
    waits: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench_step-") as made:
        bench = Bench(make(Path(made), settings), settings)
        tokens = sum(batch.tokens for batch in bench.batches)
        for number in range(settings.repeats):
            for name in list(seconds)[:: 1 if number % 2 else -1]:
                seconds[name].append(bench.measured(name))
                peaks[name] = max(peaks.get(name, 0), bench.peak)
            waits.append(bench.waited / seconds["kdpipe"][-1])
            click.echo(f"round {number + 1}/{settings.repeats}", err=True)
    count = sum(parameter.numel() for parameter in trained(bench.student).values())
    where = torch.cuda.get_device_name() if settings.device == "cuda" else f"CPU, {settings.threads} thread(s)"
    click.echo(
        f"student of {count:,} weights in {settings.dtype}{', compiled' if settings.compile else ''}, "
        f"{tokens:,} tokens in {bench.steps} steps of {settings.samples} samples, {where}, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}\n"
    )
    click.echo("| | tokens/s | of plain's time | waiting for data | peak GiB |\n|---|--:|--:|--:|--:|")
    ratio = median(a / b for a, b in zip(seconds["kdpipe"], seconds["plain"], strict=True))
    for name, title, of, wait in (
        ("kdpipe", "kdpipe, two teachers", f"{ratio:.2f}", f"{median(waits):.1%}"),
        ("plain", "plain fine-tuning", "1.00", ""),
    ):
        peak = f"{peaks[name] / 2**30:.2f}" if settings.device == "cuda" else ""
        click.echo(f"| {title} | {tokens / median(seconds[name]):,.0f} | {of} | {wait} | {peak} |")


if __name__ == "__main__":
    main()
