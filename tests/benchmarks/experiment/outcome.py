"""The table and the plot of what `kdpipe rows` wrote to `rows/results.json`.

Its intervals (95 %) are over questions and seeds; differences are taken on the same questions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.world import HEARING, REASONING

GROUPS = {"reasoning": REASONING, "hearing": HEARING}
"""Tasks by the name of their group, as `kdpipe rows` is asked for them."""

Results = Mapping[str, Any]
_CAPTION = re.compile("<CAPTION>(.*?)</CAPTION>")


def table(results: Results) -> str:
    """Accuracy in percent in Markdown: both groups with intervals, what they are over SFT and over base, each task."""
    tasks = (*REASONING, *HEARING)
    head = ["row", "reasoning", "over SFT", "hearing", "over base", *tasks]
    lines = ["| " + " | ".join(head) + " |", "|---" * 5 + "|" + "--:|" * len(tasks)]
    for row in results["rows"]:
        cells = [row["title"]]
        for group, other in (("reasoning", "sft"), ("hearing", "base")):
            found = row["groups"][group]
            cells.append(f"{100 * found['accuracy']:.1f} ({_percent(found['interval'])})")
            over = row["against"].get(other, {}).get(group)
            if over is None or over["difference"] is None:
                cells.append("")
            else:
                cells.append(f"{100 * over['difference']:+.1f} ({_percent(over['interval'], '+')})")
        cells += [f"{100 * row['tasks'][task]['accuracy']:.1f}" for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    """Draws both groups side by side as SVG: accuracy with its interval, and a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    with pyplot.rc_context({"svg.hashsalt": "kdpipe", "svg.fonttype": "path"}):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 1 + 0.4 * len(rows)), sharey=True, layout="constrained")
        for axis, (group, tasks), colour in zip(axes, GROUPS.items(), ("#3b6ea5", "#b5651d"), strict=True):
            for place, row in enumerate(rows):
                found = row["groups"][group]
                low, high = found["interval"]
                dots = [100 * seed[group] for seed in row["by_seed"].values()]
                axis.barh(place, 100 * found["accuracy"], color=colour, alpha=0.35)
                axis.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2)
                axis.plot(dots, [place] * len(dots), ".", color="black", markersize=5)
            axis.axvline(100 * rows[0]["groups"][group]["accuracy"], color="grey", linewidth=0.8, linestyle="--")
            axis.set_title(f"{group}: {', '.join(tasks)}", fontsize=9)
            axis.set_xlim(0, 100)
            axis.set_xlabel("right answers, % of the test questions", fontsize=9)
        axes[0].set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes[0].invert_yaxis()
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def captions(folder: Path) -> str:
    """For each trained row, exact captions on reasoning questions, and right answers with and without, in percent."""
    import pyarrow.parquet as pq

    manifest = (folder / "data" / "manifest.jsonl").read_text(encoding="utf-8")
    heard = {row["id"]: row["heard"] for row in map(json.loads, manifest.splitlines())}
    found: dict[str, dict[bool, list[bool]]] = {}
    for file in sorted((folder / "rows").glob("*/seed-*/evaluate/predictions.parquet")):
        by_caption = found.setdefault(file.parents[2].name, {True: [], False: []})
        for answer in pq.read_table(file).to_pylist():
            if answer["task"] in REASONING:
                caption = _CAPTION.search(answer["output"])
                by_caption[caption is not None and caption[1] == heard[answer["id"]]].append(answer["correct"])
    lines = [
        "Reasoning questions, all seeds: exact captions, right answers with an exact caption, and with another (%)"
    ]
    for name, parted in found.items():
        exact, other = parted[True], parted[False]
        shares = (len(exact) / len(exact + other), *(sum(part) / max(1, len(part)) for part in (exact, other)))
        lines.append(f"{name:<10}" + "".join(f"{100 * share:>8.1f}" for share in shares))
    return "\n".join(lines)


def _percent(interval: Sequence[float], sign: str = "") -> str:
    return " to ".join(format(100 * value, f"{sign}.1f") for value in interval)
