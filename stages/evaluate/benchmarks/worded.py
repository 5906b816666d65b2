"""MMAU and MMAR: the text of the choice is the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdpipe.data.manifest_rows import Problems
from kdpipe.stages.evaluate.benchmarks.base import Benchmark, Pairs, Parsed, json_list
from kdpipe.stages.evaluate.benchmarks.files import Fields, clip_name
from kdpipe.stages.evaluate.benchmarks.options import as_published, bare, bare_answer
from kdpipe.stages.evaluate.scorers import mmar, mmau

_PREDICTIONS = ("model_output", "model_prediction", "answer_prediction")


def _mmau_rows(items: Sequence[tuple[str, dict[str, Any]]], problems: Problems, notes: list[str]) -> list[Parsed]:
    return _rows(items, problems, notes, audio="audio_id", task="task", default="mmau")


def _mmar_rows(items: Sequence[tuple[str, dict[str, Any]]], problems: Problems, notes: list[str]) -> list[Parsed]:
    return _rows(items, problems, notes, audio="audio_path", task="modality", default="mmar")


def _rows(
    items: Sequence[tuple[str, dict[str, Any]]],
    problems: Problems,
    notes: list[str],
    *,
    audio: str,
    task: str,
    default: str,
) -> list[Parsed]:
    rows = []
    for number, (where, item) in enumerate(items, 1):
        fields = Fields(where, item, problems)
        choices, answer, clip = fields.texts("choices"), fields.optional("answer"), clip_name(fields.text(audio))
        columns = {
            "category": fields.label("category"),
            "sub_category": fields.label("sub-category"),
            "difficulty": fields.optional("difficulty"),
            "dataset": fields.optional("dataset"),
        }
        rows.append(
            Parsed(
                where=where,
                id=fields.optional("id") or str(number),
                audio=(clip,),
                question=fields.text("question"),
                choices=bare(choices),
                answer=None if answer is None else bare_answer(answer, choices),
                task=fields.label(task) or default,
                item={key: value for key, value in item.items() if key not in _PREDICTIONS},
                columns=columns,
            )
        )
    withheld = sum(row.answer is None for row in rows)
    if withheld:
        notes.append(f"rows without an answer, which are answered and not scored: {withheld}")
    return rows


def _reference(item: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    answer, choices = item.get("answer"), tuple(str(choice) for choice in item["choices"])
    text = "" if answer is None else str(answer)
    return (text if text.strip() else None), choices


def _mmau_file(pairs: Pairs) -> bytes:
    return _with_keys(pairs, ("model_output", "model_prediction"))


def _mmar_file(pairs: Pairs) -> bytes:
    return _with_keys(pairs, ("answer_prediction", "model_prediction"))


def _with_keys(pairs: Pairs, keys: Sequence[str]) -> bytes:
    """All items in their order; those without a prediction lack the keys, and the scripts pass over them."""
    return json_list([{**item, **({} if text is None else dict.fromkeys(keys, text))} for item, text in pairs])


_RULE = "words of the right choice, and of no other"

MMAU = Benchmark(
    name="mmau",
    title="MMAU (v05.15.25)",
    file="mmau-test-mini.json",
    rule=_RULE,
    official_file="mmau-predictions.json",
    scorer=mmau,
    parse=_mmau_rows,
    reference=_reference,
    respond=as_published,
    write=_mmau_file,
)

MMAR = Benchmark(
    name="mmar",
    title="MMAR",
    file="MMAR-meta.json",
    rule=_RULE,
    official_file="mmar-predictions.json",
    scorer=mmar,
    parse=_mmar_rows,
    reference=_reference,
    respond=as_published,
    write=_mmar_file,
)
