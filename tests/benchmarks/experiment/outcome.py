"""The table and the plot of what the rows measured.

Intervals (95 %) are Wilson's over the questions of the test set, of the accuracy averaged over the seeds: all seeds
answer the same questions, so more seeds do not make them more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.world import HEARING, REASONING

GROUPS = {"reasoning": REASONING, "hearing": HEARING}


@dataclass(frozen=True)
class Row:
    """One row: by seed, and in it by task, how many answers are right of how many."""

    name: str
    seeds: Mapping[str, Mapping[str, tuple[int, int]]]

    def shares(self, tasks: Sequence[str]) -> list[float]:
        """Accuracy over some tasks, a number for each seed; every question counts alike."""
        found = []
        for by_task in self.seeds.values():
            counts = [by_task[task] for task in tasks if task in by_task]
            found.append(sum(right for right, _ in counts) / max(1, sum(n for _, n in counts)))
        return found

    def mean(self, tasks: Sequence[str]) -> float:
        """Accuracy averaged over the seeds."""
        shares = self.shares(tasks)
        return sum(shares) / len(shares)

    def interval(self, tasks: Sequence[str]) -> tuple[float, float]:
        """Wilson's interval of `mean`, over the questions."""
        first = next(iter(self.seeds.values()))
        return wilson(self.mean(tasks), sum(first[task][1] for task in tasks if task in first))


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share of n."""
    if not n:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def read(results: Mapping[str, Any]) -> list[Row]:
    """The rows of `rows/results.json`: `{"rows": {row: {"seeds": {seed: SCORES}}}}`, SCORES as in scores.json."""
    return [
        Row(
            name,
            {
                seed: {task: (count["correct"], count["n"]) for task, count in scores["by_task"].items()}
                for seed, scores in row["seeds"].items()
            },
        )
        for name, row in results["rows"].items()
    ]


def table(rows: Sequence[Row]) -> str:
    """A table in Markdown: accuracy in percent, with its interval for the two groups."""
    tasks = (*REASONING, *HEARING)
    lines = [
        "| row | reasoning | hearing | " + " | ".join(tasks) + " |",
        "|---|---|---|" + "--:|" * len(tasks),
    ]
    for row in rows:
        cells = []
        for group in GROUPS.values():
            low, high = row.interval(group)
            cells.append(f"{100 * row.mean(group):.1f} ({100 * low:.1f} to {100 * high:.1f})")
        cells += [f"{100 * row.mean([task]):.1f}" for task in tasks]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws both groups side by side: means with intervals, and a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "kdpipe", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.5 + 0.45 * len(rows)), sharey=True, layout="constrained")
        places = range(len(rows))
        for axis, (group, tasks), colour in zip(axes, GROUPS.items(), ("#3b6ea5", "#b5651d"), strict=True):
            for place, row in zip(places, rows, strict=True):
                mean, (low, high) = 100 * row.mean(tasks), row.interval(tasks)
                axis.barh(place, mean, color=colour, alpha=0.35)
                axis.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2)
                axis.plot([100 * share for share in row.shares(tasks)], [place] * len(row.seeds), ".", color="black")
            axis.axvline(100 * rows[0].mean(tasks), color="grey", linewidth=0.8, linestyle="--")
            axis.set_title(f"{group}: {', '.join(tasks)}", fontsize=9)
            axis.set_xlim(0, 100)
            axis.set_xlabel("right answers, % of the test questions")
        axes[0].set_yticks(list(places), [row.name for row in rows])
        axes[0].invert_yaxis()
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
