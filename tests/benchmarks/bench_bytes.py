"""Bytes a token against fidelity, for every codec of the store: what docs/format.md says of them.

    kdpipe demo --folder DEMO
    python tests/benchmarks/bench_bytes.py --miniature DEMO

Distributions go through `Layout.encode` and `decode` as they do on their way to disk and back, and bytes are those of
the encoded arrays. Fidelity is the cosine between the gradient for a student's output head from what comes back and
from the teacher's full distribution, for teachers, students and divergences of `bench_fidelity.py`. A last table
names, for each of these, the cheapest layout whose cosine is no lower than that of fixed k = 64 in float16 with one
tail.

States are those of the demo's student at the audio positions of its training clips, encoded with each codec; low-rank
bases are fitted on every other clip and measured on the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_fidelity import DIVERGENCES, cosine, full_gradient, outcomes_gradient
from fidelity_cases import miniature_teacher, zipf_teacher
from fidelity_forms import CHUNK, Student, Teacher

from kdpipe.data.store.codec import Fidelity, decode_states, encode_states, fit_basis
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import StatesCodec, is_low_rank
from kdpipe.stages.cache_teachers.blocks import block_bounds
from kdpipe.stages.cache_teachers.head import distribution
from kdpipe.stages.train.losses import Distribution

MOST = 512
"""Most entries of a token where a mass decides."""
MASSES = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
BLOCKS = (1, 8)


def layouts(vocabulary: int, live: int) -> Iterator[tuple[str, Layout]]:
    """Layouts by name; the first is the one that the others are held against."""
    whole = (0, vocabulary)
    for dtype in ("float16", "uint8"):
        for k in (64, 32):
            yield f"k = {k}, {dtype}, 1 tail", Layout(k, min(k, live), (1.0,), whole, dtype)
        for blocks in BLOCKS:
            bounds = whole if blocks == 1 else block_bounds(vocabulary, blocks)
            for mass in MASSES:
                name = f"mass {mass:g}, {dtype}, {blocks} tail{'s' if blocks > 1 else ''}"
                yield name, Layout(MOST, min(MOST, live), (1.0,), bounds, dtype, mass=mass)


def stored(teacher: Teacher, layout: Layout) -> tuple[Distribution, float, float]:
    """What comes back of a teacher, bytes a token, and mean entries of a token."""
    made = distribution(
        teacher.hidden_NH,
        teacher.weight_VH,
        k=layout.kept,
        temperatures=layout.temperatures,
        bounds=layout.block_bounds,
        alignment=teacher.alignment,
        chunk=CHUNK,
        mass=1.0 if layout.mass is None else layout.mass,
    )
    arrays = layout.encode({name: value.numpy() for name, value in made.items()})
    back = layout.decode(arrays)
    given = Distribution(**{name: torch.from_numpy(array) for name, array in back.items()}, temperatures=(1.0,))
    tokens = len(teacher.hidden_NH)
    return given, sum(array.nbytes for array in arrays.values()) / tokens, float((given.ids >= 0).sum()) / tokens


@dataclass(frozen=True)
class Row:
    """One layout of one teacher; `cosines` by student and divergence."""

    name: str
    bytes: float
    entries: float
    cosines: dict[tuple[str, str], float]


def measure(teacher: Teacher) -> list[Row]:
    """All layouts of a teacher."""
    truths: dict[tuple[str, str], tuple[Student, torch.Tensor]] = {
        (student.name, name): (student, full_gradient(teacher, student, divergence)[0])
        for student in teacher.students
        for name, divergence in DIVERGENCES.items()
    }
    rows = []
    for name, layout in layouts(teacher.alignment.valid, teacher.live):
        given, size, entries = stored(teacher, layout)
        cosines = {
            (who, how): cosine(
                outcomes_gradient(teacher, student, given, layout.block_bounds, DIVERGENCES[how]), truth_VH
            )
            for (who, how), (student, truth_VH) in truths.items()
        }
        rows.append(Row(name, size, entries, cosines))
    return rows


def distribution_tables(teacher: Teacher, rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: all layouts, and the cheapest that is as faithful as the first."""
    keys = list(rows[0].cosines)
    yield f"**{teacher.name}**: bytes and entries a token, and cosine of the gradient"
    yield ""
    yield "| layout | bytes | entries | " + " | ".join(f"{who}, {how}" for who, how in keys) + " |"
    yield "|---" * (3 + len(keys)) + "|"
    for row in rows:
        cells = " | ".join(f"{row.cosines[key]:.5f}" for key in keys)
        yield f"| {row.name} | {row.bytes:.0f} | {row.entries:.1f} | {cells} |"
    yield ""
    base = rows[0]
    yield f"As faithful as {base.name} ({base.bytes:.0f} bytes; 392 in format 1):"
    yield ""
    yield "| student, divergence | cosine to reach | cheapest layout | bytes | of format 2 | of format 1 |"
    yield "|---" * 6 + "|"
    for key in [*keys, None]:
        good = [row for row in rows if all(row.cosines[k] >= base.cosines[k] for k in (keys if key is None else [key]))]
        best = min(good, key=lambda row: row.bytes)
        label, goal = ("all of these", "") if key is None else (f"{key[0]}, {key[1]}", f"{base.cosines[key]:.5f}")
        yield (
            f"| {label} | {goal} | {best.name} | {best.bytes:.0f} | {best.bytes / base.bytes:.2f} "
            f"| {best.bytes / 392:.2f} |"
        )
    yield ""


def miniature_states(demo: Path, clips: int) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """States [S, H] by layer of the demo's student at audio positions: to fit on, and to measure on."""
    from kdpipe.stages.config import ModelConfig
    from kdpipe.stages.miniature import world
    from kdpipe.stages.models.folder import resolve
    from kdpipe.stages.models.inputs import Encoder, Example
    from kdpipe.stages.models.loaded import load_model

    folder = resolve(ModelConfig(str((demo / "models/student").resolve()), dtype="float32"), Path())
    encoder, model = Encoder(folder), load_model(folder, device="cpu")
    rng = np.random.default_rng(11)
    sets: list[dict[int, list[torch.Tensor]]] = [{}, {}]
    for number in range(clips):
        samples, _ = world.render(world.sample_question(rng, held_out=False)[0], rng)
        prompt = encoder.prompt_ids(encoder.prompt_text("", clips=1), [len(samples)])
        batch = encoder.collate([Example("", prompt, (), encoder.features([samples]))])
        layers = range(1, len(model.layers) + 1)
        with torch.no_grad(), model.capture(layers, batch.audio_rows) as states:
            model.hidden(batch)
        for layer in layers:
            sets[number % 2].setdefault(layer, []).append(states[layer].clone())
    fitted, held = ({layer: torch.cat(found) for layer, found in one.items()} for one in sets)
    return fitted, held


def states_table(fitted: dict[int, torch.Tensor], held: dict[int, torch.Tensor]) -> Iterator[str]:
    """Markdown: every codec on all layers together."""
    tokens, width = next(iter(held.values())).shape
    yield f"**States of the miniature's student**, width {width}, {len(held)} layers, {tokens} audio tokens each"
    yield ""
    yield "| codec | bytes | of bfloat16 | mean cosine | worst cosine | relative error |"
    yield "|---" * 6 + "|"
    ranks = [r for r in (width // 2, width // 4 - 4, width // 4, width // 8) if r > 0]
    plain: tuple[StatesCodec, ...] = ("bfloat16", "fp8", "int8")
    small: tuple[StatesCodec, ...] = ("low_rank", "low_rank_int8")
    for codec, rank in [*((codec, 0) for codec in plain), *((codec, r) for codec in small for r in ranks)]:
        seen, size = Fidelity(), 0
        for layer, states in held.items():
            basis = fit_basis(fitted[layer], rank) if is_low_rank(codec) else None
            arrays = encode_states(states, codec, basis)
            size += sum(array.nbytes for array in arrays.values())
            seen.update(states, decode_states(arrays | ({} if basis is None else {"basis": basis}), codec).float())
        found, each = seen.result(), size / (tokens * len(held))
        label = f"{codec}, rank {rank}" if rank else codec
        yield (
            f"| {label} | {each:.0f} | {each / (2 * width):.3f} | {found['cosine_mean']:.5f} "
            f"| {found['cosine_worst']:.4f} | {found['relative_error']:.4f} |"
        )
    yield ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", type=Path, metavar="DEMO", help="folder of a finished `kdpipe demo`")
    parser.add_argument("--rows", type=int, default=512, help="positions of the Zipf teacher (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="its ids (default %(default)s)")
    parser.add_argument("--clips", type=int, default=64, help="clips for the states (default %(default)s)")
    options = parser.parse_args(arguments)
    teachers = [miniature_teacher(options.miniature)] if options.miniature else []
    if options.rows:
        teachers.append(zipf_teacher(options.vocabulary, options.rows))
    for teacher in teachers:
        print("\n".join(distribution_tables(teacher, measure(teacher))), flush=True)
    if options.miniature:
        print("\n".join(states_table(*miniature_states(options.miniature, options.clips))))


if __name__ == "__main__":
    main()
