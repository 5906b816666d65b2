"""Items and their denominators: the official one, and the strict one in which every item counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ACCURACY, UNWEIGHTED = "accuracy", "unweighted_accuracy"


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a benchmark, and what stands for it in the file that the official script reads.

    Attributes:
        answer: the right answer; several for a question that was answered by several people.
        prediction: the response; None where the file has none.
        choices: the choices, in the order of the benchmark's file; empty for a free-form question.
    """

    answer: str | tuple[str, ...]
    prediction: str | None
    choices: tuple[str, ...] = ()


def accuracy(
    items: Sequence[Item],
    is_correct: Callable[[Any, str, list[str]], bool],
    counted: Callable[[Item], bool] = lambda item: item.prediction is not None,
) -> dict[str, Any]:
    """The share of right items, of those the official script counts and of all.

    Args:
        items: the items.
        is_correct: the rule.
        counted: whether the official script counts an item; where it does not, the item is wrong in the strict score.

    Returns:
        `measure`, and under `official` and `strict` the `score` (0 to 1; None without items) and `n`.
    """
    verdicts = [is_correct(one.answer, one.prediction or "", list(one.choices)) for one in items if counted(one)]
    return {
        "measure": ACCURACY,
        "official": share(sum(verdicts), len(verdicts)),
        "strict": share(sum(verdicts), len(items)),
    }


def share(right: float, n: int) -> dict[str, Any]:
    """`right` of `n`, as one entry of a score."""
    return {"score": right / n if n else None, "n": n}


def mean_recall(pairs: Iterable[tuple[str, bool]]) -> float | None:
    """The mean over classes of the share of right items in each.

    Args:
        pairs: class and verdict of each item.

    Returns:
        0 to 1; None without items.
    """
    by_class: dict[str, list[bool]] = {}
    for label, verdict in pairs:
        by_class.setdefault(label, []).append(verdict)
    recalls = [sum(verdicts) / len(verdicts) for verdicts in by_class.values()]
    return sum(recalls) / len(recalls) if recalls else None
