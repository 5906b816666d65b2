"""How faithful the gradient from a cached teacher is to the one from its full distribution, against bytes a token.

For each way of caching a distribution, and as much of it as fits into so many bytes: the cosine between the gradient
for the student's output head from the cache and from the full distribution, in one batch of positions. Everything goes
through the functions that cache and train: `cache_teachers.head.distribution` and `train.losses.head_terms`.

    kdpipe demo --folder DEMO
    python tests/benchmarks/bench_fidelity.py --miniature DEMO --plot docs/fidelity.svg

Teachers: a synthetic one over 151,936 ids whose prior is Zipf's, and the demo's Qwen3 at the response tokens of gold
traces. Without --miniature the synthetic one alone. docs/losses.md has the outcome.

Shape suffixes: N positions, R positions of one chunk, H width, V vocabulary, K kept entries.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from fidelity_cases import miniature_teacher, zipf_teacher
from fidelity_forms import FORMS, Form, Student, Teacher

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses import Distribution, Divergence, TeacherRows, head_terms, linear_loss

BUDGETS = {
    "forward KL": (20, 30, 50, 100, 150, 200, 300, 500),
    "JSD": (50, 100, 200),
}
"""Packed bytes a token that each form may take at most, by divergence."""
GOALS = (0.99, 0.999, 0.9999)


def weight_gradient(teacher: Teacher, student: Student, form: Form, k: int, divergence: Divergence) -> torch.Tensor:
    """Gradient [V, H] of the summed divergence for the student's head, from the cache."""
    given = teacher.cached(form, k)
    weight_VH = student.weight_VH.detach().requires_grad_()
    ids = {"valid_vocab": teacher.alignment.valid, "masked_ids": teacher.alignment.masked}
    if form.kind in ("renormalized", "renormalized_both"):
        log_p_NK = given.logprob.log_softmax(1)

        def loss(lse_RTB: torch.Tensor, picked_RK: torch.Tensor, rows: slice) -> tuple[torch.Tensor, tuple[()]]:
            full_RK = picked_RK - lse_RTB[:, 0]
            return divergence(
                log_p_NK[rows], full_RK if form.kind == "renormalized" else full_RK.log_softmax(1)
            ).sum(), ()

        linear_loss(student.hidden_NH, weight_VH, given.ids, loss, **ids)[0].backward()
    else:
        if form.kind == "renormalized_zero":
            nothing = torch.full_like(given.log_tail, -torch.inf)
            given = replace(given, logprob=given.logprob.log_softmax(1), log_tail=nothing)
        if form.kind in ("sampled", "hybrid"):
            divergence = Divergence("sampled_ce")
        return outcomes_gradient(teacher, student, given, teacher.bounds(form), divergence)
    assert weight_VH.grad is not None
    return weight_VH.grad


def outcomes_gradient(
    teacher: Teacher, student: Student, given: Distribution, bounds: Sequence[int], divergence: Divergence
) -> torch.Tensor:
    """Gradient [V, H] of the summed divergence for the student's head, from kept entries and tails of blocks."""
    weight_VH = student.weight_VH.detach().requires_grad_()
    head_terms(
        student.hidden_NH,
        weight_VH,
        torch.full((len(given.ids),), -1),
        [TeacherRows(slice(0, len(given.ids)), given)],
        divergence=divergence,
        blocks=bounds[:-1] if len(bounds) > 2 else None,
        valid_vocab=teacher.alignment.valid,
        masked_ids=teacher.alignment.masked,
    ).loss.backward()
    assert weight_VH.grad is not None
    return weight_VH.grad


def full_gradient(teacher: Teacher, student: Student, divergence: Divergence) -> tuple[torch.Tensor, float]:
    """The same from the full distribution, and the mean divergence (nats)."""
    valid = teacher.alignment.valid
    weight_VH = student.weight_VH.detach().requires_grad_()
    total = 0.0
    for rows in teacher.chunks():
        logits_RV = student.hidden_NH[rows] @ weight_VH[:valid].T
        masked = torch.zeros(valid, dtype=torch.bool)
        masked[list(teacher.alignment.masked)] = True
        log_q_RV = logits_RV.masked_fill(masked, -torch.inf).log_softmax(1)
        value = divergence(teacher.log_p(rows), log_q_RV).sum()
        value.backward()
        total += value.item()
    assert weight_VH.grad is not None
    return weight_VH.grad, total / len(teacher.hidden_NH)


def cosine(a_VH: torch.Tensor, b_VH: torch.Tensor) -> float:
    """Cosine of two gradients, summed in float64."""
    sums = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(a_VH.split(8192), b_VH.split(8192), strict=True):
        a, b = a.double(), b.double()
        sums += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
    return float(sums[0] / (sums[1] * sums[2]).sqrt())


@dataclass(frozen=True)
class Point:
    """One measurement; `budget` is what the packed bytes had to fit into."""

    teacher: str
    student: str
    divergence: str
    form: str
    budget: int
    k: int
    packed: float
    stored: float | None
    cosine: float


DIVERGENCES = {"forward KL": Divergence("forward_kl"), "JSD": Divergence("jsd", beta=0.5)}


def sweep(
    teacher: Teacher, forms: Sequence[Form], report: Callable[[str], None]
) -> tuple[list[Point], dict[str, float]]:
    """All points of a teacher, and the mean divergence (nats) of each student by name."""
    points, distance = [], {}
    for student in teacher.students:
        for name, divergence in DIVERGENCES.items():
            truth_VH, mean = full_gradient(teacher, student, divergence)
            distance[f"{student.name}, {name}"] = mean
            for form in forms:
                if form.kind in (("renormalized_zero",) if name == "forward KL" else ("sampled", "hybrid")):
                    continue  # the same as `renormalized`; not defined
                try:
                    teacher.bounds(form)
                except KdpipeError as error:
                    report(f"{teacher.name}: no {form.name} ({error})")
                    continue
                done: dict[int, float] = {}
                for budget in BUDGETS[name]:
                    k = min(form.fitting(budget, teacher.live), teacher.live)
                    if not k:
                        continue
                    if k not in done:
                        done[k] = cosine(weight_gradient(teacher, student, form, k, divergence), truth_VH)
                    bytes_ = form.packed_bytes(k, teacher.live), form.stored_bytes(k)
                    points.append(Point(teacher.name, student.name, name, form.name, budget, k, *bytes_, done[k]))
                report(f"{teacher.name}, {student.name} student, {name}: {form.name}")
    return points, distance


def crossing(points: Sequence[Point], goal: float, count: Literal["packed", "stored"]) -> str:
    """Bytes at which a form's curve reaches a cosine, between measurements along a straight line of logarithms."""
    curve = sorted((getattr(p, count), 1 - p.cosine, p.k) for p in points if getattr(p, count) is not None)
    for index, (size, miss, k) in enumerate(curve):
        if miss <= 1 - goal:
            if index:
                size0, miss0, k0 = curve[index - 1]
                share = math.log(miss0 / (1 - goal)) / math.log(miss0 / max(miss, 1e-12))
                size, k = size0 * (size / size0) ** share, round(k0 * (k / k0) ** share)
            return f"{'' if index else '≤ '}{size:.0f} (k {k})"
    return f"> {curve[-1][0]:.0f}" if curve else "-"


def tables(points: Sequence[Point]) -> str:
    """Markdown: the cosine at each budget, and the bytes at which the goals are reached."""
    lines = []
    series = dict.fromkeys((p.teacher, p.student, p.divergence) for p in points)
    for key in series:
        own = [p for p in points if (p.teacher, p.student, p.divergence) == key]
        budgets = sorted({p.budget for p in own})
        lines += [
            "",
            f"**{key[0]}, {key[1]} student, {key[2]}**: cosine, with at most so many packed bytes a token",
            "",
        ]
        lines += ["| | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 1) + "|"]
        for form in dict.fromkeys(p.form for p in own):
            found = {p.budget: p for p in own if p.form == form}
            cells = [f"{found[b].cosine:.5f}" if b in found else "" for b in budgets]
            lines.append(f"| {form} | " + " | ".join(cells) + " |")
        goals = [f"{goal} {count}" for count in ("packed", "stored") for goal in GOALS]
        lines += [
            "",
            "Bytes (and entries) that reach a cosine:",
            "",
            "| | " + " | ".join(goals) + " |",
            "|---" * 7 + "|",
        ]
        for form in dict.fromkeys(p.form for p in own):
            curve = [p for p in own if p.form == form]
            cells = [crossing(curve, goal, count) for count in ("packed", "stored") for goal in GOALS]
            lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


STYLES = {
    "sampled": ("#b03030", ":", "o"),
    "top-k renormalized": ("#e07b00", "-", "s"),
    "top-k renormalized, both sides": ("#e07b00", "--", "D"),
    "hybrid": ("#8d4fb8", ":", "v"),
    "top-k + tail": ("#6aa9e0", "-", "o"),
    "top-k + 8 blocks": ("#1f5fa8", "-", "^"),
    "top-k + 16 blocks of equal mass": ("#1f5fa8", "--", "v"),
    "threshold + 8 blocks of equal mass": ("#1f8a4c", "-", "P"),
    "interpolated top-k + 8 blocks of equal mass": ("#1f8a4c", "--", "X"),
}


def draw(points: Sequence[Point], file: Path) -> None:
    """Forward KL: cosine against packed bytes, a column for each teacher and a row for far and near students."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "kdpipe", "font.size": 10}
    from matplotlib import pyplot

    teachers = list(dict.fromkeys(p.teacher for p in points))
    students = ("far", "near")
    figure, grid = pyplot.subplots(
        len(students),
        len(teachers),
        figsize=(4.8 * len(teachers), 3.5 * len(students) + 0.9),
        squeeze=False,
        sharex=True,
    )
    for axes_row, student in zip(grid, students, strict=True):
        for axes, teacher in zip(axes_row, teachers, strict=True):
            for form, (color, line, marker) in STYLES.items():
                curve = [
                    (p.packed, max(1 - p.cosine, 1e-6))
                    for p in points
                    if (p.teacher, p.student, p.divergence, p.form) == (teacher, student, "forward KL", form)
                ]
                if curve:
                    axes.plot(*zip(*curve, strict=True), color=color, ls=line, marker=marker, ms=4, lw=1.5, label=form)
            axes.set(xscale="log", yscale="log", xlim=(18, 560), ylim=(1, 1e-6), title=f"{teacher}: {student} student")
            axes.set_xticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
            axes.set_yticks([1, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6], ["0", *("0." + "9" * n for n in range(1, 7))])
            axes.minorticks_off()
            axes.grid(color="#dddddd", lw=0.6)
            axes.axhline(1e-3, color="#555555", lw=0.8)
            axes.set_ylabel("cosine to the full gradient")
            axes.set_xlabel("packed bytes a token")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(file, metadata={"Date": None}, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", type=Path, metavar="DEMO", help="folder of a finished `kdpipe demo`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all points there")
    parser.add_argument("--load", type=Path, metavar="FILE", help="take the points from there, measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of forward KL as SVG")
    parser.add_argument("--rows", type=int, default=512, help="positions of the Zipf teacher (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="its ids (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.load:
        loaded = json.loads(options.load.read_text(encoding="utf-8"))
        points, facts = [Point(**point) for point in loaded["points"]], loaded["facts"]
    else:
        points, facts = [], []
        began = time.monotonic()
        # Made first: a folder that is no demo is found before the long part.
        miniatures = [miniature_teacher(options.miniature)] if options.miniature else []
        for teacher in (zipf_teacher(options.vocabulary, options.rows), *miniatures):
            found, distance = sweep(
                teacher,
                FORMS,
                lambda line: print(f"{time.monotonic() - began:5.0f} s  {line}", file=sys.stderr, flush=True),
            )
            points += found
            quantiles = [round(float(teacher.entropy_N.quantile(q)), 2) for q in (0.1, 0.5, 0.9)]
            facts.append(
                f"{teacher.name}: {len(teacher.hidden_NH)} positions; entropy {quantiles[1]} nats in the median, "
                f"{quantiles[0]} and {quantiles[2]} at the first and last tenth; mean divergence in nats: "
                + "; ".join(f"{name} {value:.2g}" for name, value in distance.items())
            )
    print("\n".join(facts))
    print(tables(points))
    if options.json:
        text = json.dumps({"facts": facts, "points": [asdict(point) for point in points]}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        draw(points, options.plot)


if __name__ == "__main__":
    main()
