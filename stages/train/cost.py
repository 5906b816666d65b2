"""What memory training will take, from the student's config.json and the headers of its weights. Light: no torch.

Weights and what the optimizer keeps of them are exact. Activations are counted tensor by tensor as autograd keeps them,
in the manner of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198,
section 4.1), for the layers that transformers runs here: RMSNorm computed in float32, grouped-query attention by
`scaled_dot_product_attention`, which keeps no scores, and SwiGLU. Bytes of a token and decoder layer, with width H,
heads A (heads times their size) and intermediate I:

    bfloat16   16 H + 8 A + 8 I     norms 2 x (float32 copy, normalized, scaled); q, k, v and output; four of the MLP
    float32    24 H + 16 A + 16 I

and the mask of a padded batch as numbers, as long as the longest sequence: 2 L or 4 L.

With gradient checkpointing: the input of each recomputed layer, and one layer whole. docs/training.md, "Memory", holds
this against measurements.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdpipe.data.ledger import Ledger
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.requirements import Requirements
from kdpipe.stages.config import LoraConfig, TrainConfig
from kdpipe.stages.models.folder import ModelFolder, weight_shapes
from kdpipe.stages.train.launch import Launch
from kdpipe.stages.train.lora_targets import adapted_layers
from kdpipe.stages.train.names import NEVER_TRAINED, canonical, is_named
from kdpipe.stages.train.terms import Terms

PROCESS_BYTES = 700_000_000
"""Python with torch and transformers (from the measurements in docs/training.md), or about what CUDA takes of a GPU."""
FILE_BYTES = 256 * 2**20
"""Size of a file of a checkpoint, about: while it is written, a file is held in memory once more."""
AHEAD = 5
"""Global batches in memory: four read ahead, and the one in work."""
FIRM = 0.75
"""Share of an estimated line that a refusal counts on."""
_ENTRY_BYTES = 64
"""Of a kept entry in the loss: id, logit, log-probability, and what the divergence makes of them in float64."""
_STATE_BYTES = {"bfloat16": 2.0, "int8": 1.0, "fp8": 1.0, "float32": 4.0}
_WINDOW_POSITIONS = 1500
"""Positions of Qwen2-Audio's tower for a clip, whatever its length."""


@dataclass(frozen=True)
class Load:
    """What one full micro-batch holds (tokens): in all, in its longest row, in responses, of audio; and the
    positions that its clips are in the audio tower."""

    tokens: int
    longest: int
    response: int
    audio: int
    positions: int


@dataclass(frozen=True)
class Line:
    """One part of the memory.

    Attributes:
        name: what it is.
        bytes: of it.
        note: what it is counted from.
        exact: whether it is certain, or estimated.
    """

    name: str
    bytes: int
    note: str
    exact: bool = False


@dataclass(frozen=True)
class Memory:
    """What training takes on its device.

    Attributes:
        device: `cpu` or `cuda`.
        lines: its parts.
        host: bytes beside them in the computer's memory, where the device is a GPU.
        total: bytes that the device has; None where that cannot be found out.
    """

    device: str
    lines: tuple[Line, ...]
    host: int
    total: int | None

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(line.bytes for line in self.lines)

    @property
    def firm_bytes(self) -> int:
        """What it takes for certain."""
        return sum(line.bytes if line.exact else int(FIRM * line.bytes) for line in self.lines)


def estimate(ctx: Context, needs: Requirements, terms: Terms, cache: Ledger, launch: Launch | None = None) -> Memory:
    """What training as configured takes, of each process.

    Args:
        ctx: the run.
        needs: what is asked of the teachers.
        terms: of the loss.
        cache: ledger of cache-teachers; its rows say how long samples are, where they are there.
        launch: how this process was started together with others; None: it trains alone.
    """
    config, student = ctx.config.train, needs.student
    device = find_device(config.device)
    size = 4 if student.settings.dtype == "float32" else 2
    counts = parameters(student, config.freeze, config.lora)
    load = typical_load(student, config, cache, ctx.config.teachers.max_length)
    wide = counts.trained if size == 2 else 0
    pairs = len(terms.layers) if terms.match == "hidden" and needs.textual is not None else 0
    projections = pairs * student.width * (needs.textual.width if needs.textual is not None else 0)
    how = "gradient checkpointing" if config.gradient_checkpointing else "all kept"
    flight = _flight(ctx, needs, terms, load, config.global_batch_tokens)
    ranks = launch.size if launch is not None and config.fsdp else 1
    trained, every = counts.trained + counts.adapters, counts.all + counts.adapters + projections

    def share(of_model: int, of_projections: int = 0) -> int:
        return -(-of_model // ranks) + of_projections

    if ranks > 1:
        # Trained weights are held in float32, and rounded where they are gathered.
        weights = 4 * trained + size * (counts.all - counts.trained)
        gathered = size * (2 * counts.outside + 2 * counts.layer)
        wide = 0
    else:
        weights, gathered = size * counts.all + 4 * counts.adapters, 0
    of = f", 1 / {ranks}" if ranks > 1 else ""
    learnt = f"{trained + projections:,} trained{of}"
    written = share(12 * trained, 12 * projections)
    written += min(written, FILE_BYTES)
    lines = [
        Line("weights", share(weights, 4 * projections), f"{every:,}{of}", exact=True),
        Line("gathered", gathered, "two layers, and what is outside of layers") if gathered else None,
        Line("float32 copies", 4 * wide, f"{counts.trained:,} trained", exact=True) if wide else None,
        Line("gradients (float32)", share(4 * trained, 4 * projections), learnt, exact=True),
        Line("AdamW moments", share(8 * trained, 8 * projections), f"two, float32{of}", exact=True),
        Line("activations", activations(student, config, counts, load, size), f"{load.tokens:,} tokens, {how}"),
        Line("output head, losses", head_bytes(student, config, terms, needs.k, load, size, device), "at its peak"),
        Line("teachers' data", flight if device == "cpu" else flight // AHEAD, "batches read ahead"),
        Line("checkpoint", written, "while it is written") if device == "cpu" else None,
        Line("process" if device == "cpu" else "CUDA", PROCESS_BYTES, "libraries"),
    ]
    kept = tuple(line for line in lines if line is not None)
    total = device_memory(device)
    if device == "cpu" and launch is not None and total is not None:
        total //= launch.local_size  # they share one memory
    return Memory(device, kept, 0 if device == "cpu" else PROCESS_BYTES + flight + written, total)


@dataclass(frozen=True)
class Counts:
    """Weights of a student as transformers loads it.

    Attributes:
        all, trained: numbers of weights; with LoRA none of them is trained.
        hears: whether anything of the audio tower is trained, and so its activations are kept.
        adapters: weights of LoRA's adapters, float32, all trained.
        adapted: inputs of the decoder's adapted linear layers, all together.
        ranks: rank of each of these, all together.
        layer: weights of the largest layer of any part.
        outside: weights that are in no layer.
    """

    all: int
    trained: int
    hears: bool
    adapters: int = 0
    adapted: int = 0
    ranks: int = 0
    layer: int = 0
    outside: int = 0


def parameters(student: ModelFolder, freeze: Iterable[str], lora: LoraConfig | None = None) -> Counts:
    """Counts weights from the headers of the safetensors files; a prefix that names none counts for nothing.

    Raises:
        ConfigError: LoRA is to adapt what is not there.
    """
    prefixes = (*NEVER_TRAINED.get(student.family, ()), *freeze)
    tied = _is_tied(student)
    every = trained = 0
    hears = False
    layers: dict[str, int] = {}
    for published, count in _sizes(student.path).items():
        if student.family == "qwen2_5_omni" and not published.startswith("thinker."):
            continue
        name = canonical(student.family, published)
        if tied and name.startswith("lm_head."):
            continue
        every += count
        inside = re.match(r".*?\.(?:layers|blocks)\.\d+\.", name)
        layer = inside[0] if inside else ""
        layers[layer] = layers.get(layer, 0) + count
        spelled = (name, f"model.{name}")
        if any(is_named(prefix, one, published, student.family) for prefix in prefixes for one in spelled):
            continue
        trained += count
        hears = hears or ("audio_tower." in name and "audio_tower.proj." not in name)
    outside = layers.pop("", 0)
    largest = max(layers.values(), default=0)
    if lora is None:
        return Counts(every, trained, hears, layer=largest, outside=outside)
    adapted = adapted_layers(student, lora)
    decoder = [layer for layer in adapted if layer.part == "decoder"]
    return Counts(
        every,
        trained=0,
        hears=any(layer.part == "audio_tower" for layer in adapted),
        adapters=lora.rank * sum(sum(layer.shape) for layer in adapted),
        adapted=sum(layer.shape[1] for layer in decoder),
        ranks=lora.rank * len(decoder),
        layer=largest,
        outside=outside,
    )


def activations(student: ModelFolder, config: TrainConfig, counts: Counts, load: Load, size: int) -> int:
    """Bytes that autograd keeps between forward and backward pass of a micro-batch, up to the final norm.

    Args:
        student: its sizes.
        config: how activations are kept.
        counts: whether the audio tower is trained.
        load: of the micro-batch.
        size: bytes of a number in the model's precision.
    """
    width, layers = student.width, student.layers
    heads = int(student.text["num_attention_heads"])
    attended = heads * int(student.text.get("head_dim") or width // heads)
    inner = int(student.text["intermediate_size"])
    layer = load.tokens * (_layer_bytes(width, attended, inner, size) + load.longest * size)
    # An adapter takes its input in float32, and its first matrix gives as many numbers as its rank.
    layer += load.tokens * 4 * ((counts.adapted if size == 2 else 0) + counts.ranks) // layers
    inputs = load.tokens * width * size
    around = load.tokens * _norm_bytes(width, size) + inputs
    again = -(-layers // config.checkpoint_every) if config.gradient_checkpointing else 0
    decoder = again * inputs + (layers - again + bool(again)) * layer
    tower = _tower(student)
    audio = 0
    if counts.hears and tower:
        d, f, depth = (int(tower[name]) for name in ("d_model", "encoder_ffn_dim", "encoder_layers"))
        masked = _WINDOW_POSITIONS if student.family == "qwen2_audio" else 0
        one = load.positions * size * (8 * d + 2 * f + masked)
        audio = depth * load.positions * size * d + one if config.gradient_checkpointing else depth * one
        # Two convolutions before the layers: twice the positions go through the first, with its GELU.
        audio += load.positions * size * 6 * d
    return decoder + around + audio


def _layer_bytes(width: int, attended: int, inner: int, size: int) -> int:
    return 2 * _norm_bytes(width, size) + size * (4 * attended + 4 * inner)


def _norm_bytes(width: int, size: int) -> int:
    """Input as float32, normalized, and scaled."""
    return width * (4 + 2 * size)


def head_bytes(
    student: ModelFolder, config: TrainConfig, terms: Terms, k: int, load: Load, size: int, device: str
) -> int:
    """Bytes that the output head and the losses take at their peak; see docs/losses.md, "Forms"."""
    lens = len([layer for layer in terms.layers if layer != student.layers]) if terms.match == "lens" else 0
    rows = load.response * (1 + lens)
    given = terms.on("top") + lens + terms.on("acoustic_top")
    head = student.head_rows * student.width
    form = config.head_form
    if form == "auto":
        form = "triton" if device == "cuda" else "in_forward" if size == 4 else "chunked"
    tile = {
        "reference": 4 * rows * student.head_rows * 4,
        "chunked": 4 * max((128 if device == "cuda" else 8) << 20, rows * 256 * 4),
        "triton": 4 * (128 << 20),
        "in_forward": min((512 if device == "cuda" else 128) << 20, 2 * rows * student.head_rows * 4),
    }[form]
    # The head's gradient is summed up in float32, and rounded before it is added to the float32 one that is kept.
    gradient = 0 if config.lora is not None else head * (4 + size) if size == 2 else head * 4
    states = rows * (_norm_bytes(student.width, size) + 3 * size * student.width)
    return tile + gradient + states + load.response * given * k * _ENTRY_BYTES


def _flight(ctx: Context, needs: Requirements, terms: Terms, load: Load, batch_tokens: int) -> int:
    """Bytes of the global batches in memory: distributions, states, and log-mel features."""
    scale = batch_tokens / max(1, load.tokens)
    lens = len(set(terms.layers.values())) if terms.match == "lens" else 0
    given = lens + terms.on("top") + terms.on("acoustic_top")
    number = _STATE_BYTES.get(ctx.config.teachers.states, 0.0)
    heard = len(terms.acoustic_layers) * needs.student.width * number
    hidden = len(terms.layers) * needs.textual.width * number if terms.match == "hidden" and needs.textual else 0.0
    mel = int(_tower(needs.student).get("num_mel_bins", 128)) * 4 * 2
    each = load.response * (given * needs.k * 12 + hidden) + load.audio * heard + load.positions * mel
    return int(AHEAD * scale * each)


def typical_load(student: ModelFolder, config: TrainConfig, cache: Ledger, most: int) -> Load:
    """A full micro-batch: of samples as they are in the cache, or, without one, half audio and half response.

    Args:
        student: its family.
        config: budgets of tokens.
        cache: ledger of cache-teachers.
        most: tokens of the longest sample that is let through.
    """
    rows = [row for row in cache.rows() if row.source == "targets" and row.length]
    longest = max((row.length for row in rows), default=0)
    whole = sum(row.length for row in rows)
    tokens = max(
        longest, min(config.micro_batch_tokens, config.global_batch_tokens, whole or config.micro_batch_tokens)
    )
    spoken = sum(row.tokens for row in rows) / whole if whole else 0.5
    response = round(tokens * spoken)
    audio = tokens - response if rows else round(tokens / 2)
    positions = 2 * audio
    if student.family == "qwen2_audio":
        clips = -(-tokens * len(rows) // whole) if whole else 1 + audio // 250
        positions = clips * _WINDOW_POSITIONS
    row = tokens if config.packing else min(tokens, longest or most)
    return Load(tokens, row, response, audio, positions)


def find_device(wanted: str) -> str:
    """`cpu` or `cuda`, found without torch."""
    if wanted != "auto":
        return wanted
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "cuda" if not hidden and any(Path("/proc/driver/nvidia/gpus").glob("*")) else "cpu"


def device_memory(device: str) -> int | None:
    """Bytes that a device has: the GPU that is seen first, or what the computer or its container has."""
    if device == "cuda":
        return _gpu_memory(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    import psutil

    total = psutil.virtual_memory().total
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return total


@lru_cache(maxsize=4)
def _gpu_memory(index: str) -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _is_tied(student: ModelFolder) -> bool:
    return bool(student.text.get("tie_word_embeddings", student.config.get("tie_word_embeddings", False)))


def _tower(student: ModelFolder) -> Mapping[str, Any]:
    inner = student.config.get("thinker_config", student.config)
    return inner.get("audio_config", {})


@lru_cache(maxsize=8)
def _sizes(folder: Path) -> Mapping[str, int]:
    """Number of weights of each tensor of a checkpoint."""
    return {name: math.prod(shape) for name, shape in weight_shapes(folder).items()}
