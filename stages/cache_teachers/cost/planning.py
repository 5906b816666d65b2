"""What the paper's set-up takes, from shapes alone: the tables of docs/planning.md.

    python -m kdpipe.stages.cache_teachers.cost.planning          prints them
    python -m kdpipe.stages.cache_teachers.cost.planning PAGE     writes them into a page, between its markers

A test compares the page with this module.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import TARGET_IDS, TOP, ArraySpec, StatesCodec, hidden_specs, is_low_rank, lens_prefix
from kdpipe.stages.cache_teachers.cost.sizes import PartShape, part_bytes
from kdpipe.stages.cache_teachers.layers import layer_map
from kdpipe.stages.config import LayersConfig

SAMPLES, RESPONSE, AUDIO, PROMPT = 1_000_000, 400, 250, 350
"""Samples; response tokens, audio tokens (10 s) and tokens of the textual teacher's prompt, of each."""
PART_SAMPLES = 256
VOCABULARY = 151_665
MEAN_ENTRIES = 12
"""Entries that reach a mass of 0.99, on average: assumed."""
PEAK, UTILIZATION = 989e12, 0.4
"""An H100's dense bfloat16 product (FLOP a second, its data sheet), and the share of it that is assumed."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model.

    Attributes:
        layers: decoder layers.
        width: of the residual stream.
        body: weights of the decoder layers.
        head_rows: rows of the output head.
        tower: weights of the audio tower.
    """

    layers: int
    width: int
    body: float
    head_rows: int
    tower: float = 0.0

    @property
    def head(self) -> float:
        """Weights of the output head."""
        return float(self.width * self.head_rows)


STUDENT = Model(28, 3584, 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944), 152_064, 0.64e9)
TEACHER = Model(36, 4096, 36 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288), 151_936)
"""Qwen2.5-Omni-7B's thinker and Qwen3-8B."""

LAYOUTS: Mapping[str, Layout] = {
    "k = 64, float16": Layout(64, 64, (1.0,), (0, VOCABULARY)),
    "k = 64, uint8": Layout(64, 64, (1.0,), (0, VOCABULARY), "uint8"),
    "k = 64, float16, 8 blocks": Layout(64, 64, (1.0,), tuple(VOCABULARY * b // 8 for b in range(9))),
    "k = 32, float16": Layout(32, 32, (1.0,), (0, VOCABULARY)),
    "mass 0.99, float16": Layout(64, 64, (1.0,), (0, VOCABULARY), mass=0.99),
    "mass 0.99, uint8": Layout(64, 64, (1.0,), (0, VOCABULARY), "uint8", mass=0.99),
}
CODECS: Mapping[str, tuple[StatesCodec, int]] = {
    "bfloat16": ("bfloat16", 0),
    "int8": ("int8", 0),
    "fp8": ("fp8", 0),
    "low_rank, rank 448": ("low_rank", 448),
    "low_rank_int8, rank 892": ("low_rank_int8", 892),
    "low_rank_int8, rank 256": ("low_rank_int8", 256),
}
MODES: Mapping[str, LayersConfig] = {
    "top": LayersConfig("top"),
    "skip": LayersConfig("skip", every=7),
    "all": LayersConfig("all"),
}


def store_bytes(arrays: Sequence[ArraySpec], tokens: int, *, entries: float = 0, bits: int = 0, rank: int = 0) -> int:
    """Bytes of `SAMPLES` units of `tokens` tokens each, without what parts and ledger say of single samples.

    Args:
        arrays: of a part.
        tokens: of a unit.
        entries: mean entries of a token in the layout `mass`.
        bits: of an id.
        rank: of the low-rank codecs.
    """
    prefixes = {spec.axis.rsplit("/", 1)[0] for spec in arrays if "/" in spec.axis}
    shape = PartShape("", arrays, entries=dict.fromkeys(prefixes, entries), id_bits=bits, rank=rank)
    units = np.full(SAMPLES // PART_SAMPLES, PART_SAMPLES, np.int64)
    return round(sum(part_bytes(shape, units, units * tokens).values()) * SAMPLES / int(units.sum()))


def distribution_bytes(layout: Layout, lens: int) -> int:
    """Bytes of the top layer's distributions and those of so many lens layers."""
    arrays = [spec for prefix in (TOP, *map(lens_prefix, range(1, lens + 1))) for spec in layout.specs(prefix)]
    return store_bytes(arrays, RESPONSE, entries=MEAN_ENTRIES, bits=layout.bits)


def state_bytes(codec: StatesCodec, rank: int, layers: int, width: int, tokens: int) -> int:
    """Bytes of the states of so many layers, bases included."""
    arrays = [spec for layer in range(1, layers + 1) for spec in hidden_specs(layer, width, codec, rank)]
    return store_bytes(arrays, tokens, rank=rank)


def state_token_bytes(codec: StatesCodec, rank: int, width: int) -> int:
    """Bytes of one token in one layer, without checksums."""
    return sum(spec.row_bytes for spec in hidden_specs(1, width, codec, rank) if spec.axis == "tokens")


def inner_layers(mode: str) -> int:
    """Lens layers beside the top, in one of `MODES`."""
    return len(set(layer_map(MODES[mode], STUDENT.layers, TEACHER.layers).values())) - 1


def textual_flop(lens: int) -> float:
    """Operations of the textual teacher for one sample."""
    return 2 * (TEACHER.body * (PROMPT + RESPONSE) + TEACHER.head * RESPONSE * (1 + lens))


def acoustic_flop() -> float:
    """Operations of the acoustic teacher for the states of one clip.

    30 tokens stand before the audio; the tower has two positions a token.
    """
    return 2 * (STUDENT.body * (AUDIO + 30) + STUDENT.tower * 2 * AUDIO)


def tables() -> dict[str, str]:
    """The tables of the page as Markdown, by the name of their marker."""
    target = store_bytes([ArraySpec(TARGET_IDS, (), "uint32")], RESPONSE)
    modes = {name: inner_layers(name) for name in MODES}
    heads = [f"{name} ({1 + lens} layer{'s' if lens else ''})" for name, lens in modes.items()]
    distributions = _table(
        ["distributions", "bytes a token and layer", *heads],
        [
            [name, f"{layout.bytes_per_token(MEAN_ENTRIES):.0f}"]
            + [_size(distribution_bytes(layout, lens)) for lens in modes.values()]
            for name, layout in LAYOUTS.items()
        ],
    )
    of_states = [
        ("acoustic", STUDENT.width, AUDIO, (28, 4)),
        ("textual, `match: hidden`", TEACHER.width, RESPONSE, (28, 4)),
    ]
    states = _table(
        [
            "states",
            "bytes a token and layer",
            *(f"{who}, {n} layers" for who, _, _, counts in of_states for n in counts),
        ],
        [
            [name, " or ".join(str(state_token_bytes(codec, rank, w)) for w in _widths(codec))]
            + [_size(state_bytes(codec, rank, n, w, tokens)) for _, w, tokens, counts in of_states for n in counts]
            for name, (codec, rank) in CODECS.items()
        ],
    )
    speed = PEAK * UTILIZATION
    flop = {f"textual teacher, {name}": textual_flop(lens) for name, lens in modes.items()}
    flop["acoustic teacher, any layers"] = acoustic_flop()
    times = _table(
        ["", "TFLOP a sample", "hours on one H100"],
        [[name, f"{each / 1e12:.1f}", f"{each * SAMPLES / speed / 3600:.1f}"] for name, each in flop.items()],
    )
    return {"targets": f"Targets: {_size(target)}.", "distributions": distributions, "states": states, "times": times}


def fill_page(text: str) -> str:
    """The page with its tables made anew."""
    for name, made in tables().items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"{start}.*?{end}", lambda _, all=f"{start}\n{made}\n{end}": all, text, flags=re.DOTALL)
    return text


def _widths(codec: StatesCodec) -> Iterable[int]:
    return (STUDENT.width,) if is_low_rank(codec) else (STUDENT.width, TEACHER.width)


def _size(count: float) -> str:
    return f"{count / 1e12:.2f} TB" if count >= 0.9995e12 else f"{count / 1e9:.3g} GB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _main(arguments: Sequence[str]) -> None:
    if arguments:
        page = Path(arguments[0])
        page.write_text(fill_page(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    _main(sys.argv[1:])
