"""The tables of bench_store.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass
class Result:
    """Seconds of each round of a contender, or why there are none."""

    phase: str
    order: str | None
    case: str
    title: str
    base: str
    goal: float | None = None
    seconds: list[float] = field(default_factory=list)
    resident: float = 0.0
    same: bool | None = None
    failure: str | None = None


def summary(results: list[Result], size: int) -> list[dict[str, Any]]:
    """A row for each result; a ratio is speed by that of the base."""
    by_key = {(r.phase, r.order, r.case): r for r in results}
    rows = []
    for result in results:
        row: dict[str, Any] = {"phase": result.phase, "order": result.order, "case": result.case}
        row |= {"title": result.title, "failure": result.failure, "same": result.same, "goal": result.goal}
        base = by_key[result.phase, result.order, result.base]
        ours = by_key.get((result.phase, result.order, "kdpipe-crc-0"))
        ahead = by_key.get((result.phase, result.order, "kdpipe-crc-2"))
        anew = by_key.get((result.phase, result.order, "memmap-anew-0"))
        row |= {"base": result.base, "seconds": result.seconds, "resident": result.resident}
        if result.failure is None:
            row |= {"median": size / median(result.seconds) / 1e9, "best": size / min(result.seconds) / 1e9}
            row["ratio"] = _ratio(base, result)
            row["of_memmap_anew"] = _ratio(anew, result)
            row["ours"], row["ours_ahead"] = _ratio(result, ours), _ratio(result, ahead)
        rows.append(row)
    return rows


def _ratio(slower: Result | None, faster: Result | None) -> float | None:
    """Median over rounds of how many times as fast the second is."""
    if slower is None or faster is None or slower.failure or faster.failure:
        return None
    return median(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _goal(value: float | None, goal: float | None, *, least: bool = True) -> str:
    if goal is None or value is None:
        return ""
    return f"{'≥' if least else '≤'} {goal:g}: {'met' if (value >= goal if least else value <= goal) else 'short'}"


def table(rows: list[dict[str, Any]], small: list[dict[str, Any]]) -> str:
    """The rows as Markdown, a table for each phase and order."""
    lines: list[str] = []
    for place in dict.fromkeys((row["phase"], row["order"]) for row in rows):
        chosen = [row for row in rows if (row["phase"], row["order"]) == place]
        read_columns = place[0] == "read"
        head = ["", "GB/s", "best", "/ baseline", "baseline", "goal", "same bytes"]
        head += ["/ memmap mapped anew", "kdpipe, CRC on / this", "the same with 2 threads"] if read_columns else []
        lines += [f"**{', '.join(filter(None, place))}**", "", f"| {' | '.join(head)} |"]
        lines.append("|---|--:|--:|--:|---|---|---|" + ("--:|--:|--:|" if read_columns else ""))
        for row in chosen:
            if row["failure"]:
                why = " ".join(row["failure"].split()).replace("|", "\\|")[:200]
                lines.append(f"| {row['title']} | {why} |" + " |" * (len(head) - 2))
                continue
            same = {True: "yes", False: "NO", None: ""}[row["same"]]
            cells = [row["title"], *(_number(row[name]) for name in ("median", "best", "ratio"))]
            cells += [row["base"], _goal(row["ratio"], row["goal"]), same]
            if read_columns:
                cells += [_number(row[name]) for name in ("of_memmap_anew", "ours", "ours_ahead")]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        if kept := max(row["resident"] for row in chosen):
            lines += [f"At most {kept:.1%} of a file's pages were still in the page cache.", ""]
    if small:
        lines += ["**rows**", "", "| | microseconds a sample | best | entries a token | goal | same |"]
        lines.append("|---|--:|--:|--:|---|---|")
        for row in small:
            middle, same = median(row["micros"]), "yes" if row["same"] else "NO"
            goal = _goal(middle, row["goal"], least=False)
            cells = [row["title"], f"{middle:,.1f}", f"{min(row['micros']):,.1f}", f"{row['entries']:.1f}", goal, same]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).rstrip()
