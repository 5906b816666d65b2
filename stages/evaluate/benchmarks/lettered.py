"""MMSU and the foundation part of AIR-Bench: the official scripts compare letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdpipe.data.manifest_rows import Problems
from kdpipe.stages.evaluate.benchmarks.base import Benchmark, Pairs, Parsed, json_lines
from kdpipe.stages.evaluate.benchmarks.files import Fields, as_text, clip_name, stem
from kdpipe.stages.evaluate.benchmarks.options import as_letter, bare, bare_answer
from kdpipe.stages.evaluate.scorers import air_bench, mmsu
from kdpipe.stages.evaluate.scorers.letters import LETTERS, letter_of

_KEYS = tuple(f"choice_{letter.lower()}" for letter in LETTERS)


def _mmsu_rows(items: Sequence[tuple[str, dict[str, Any]]], problems: Problems, notes: list[str]) -> list[Parsed]:
    rows = []
    for number, (where, item) in enumerate(items, 1):
        fields = Fields(where, item, problems)
        clip = clip_name(fields.text("audio_path"))
        rows.append(
            _row(
                fields,
                id=fields.optional("id") or stem(clip) or str(number),
                audio=(clip,),
                task=fields.optional("task_name") or "mmsu",
                columns={"category": fields.label("category"), "sub_category": fields.label("sub-category")},
                problems=problems,
            )
        )
    return rows


def _air_bench_rows(items: Sequence[tuple[str, dict[str, Any]]], problems: Problems, notes: list[str]) -> list[Parsed]:
    rows = []
    for number, (where, item) in enumerate(items, 1):
        fields = Fields(where, item, problems)
        task, dataset, path = fields.text("task_name"), fields.text("dataset_name"), clip_name(fields.text("path"))
        names = (f"{path.removesuffix('.wav')}.flac", path) if task == "Audio_Grounding" else (path,)
        rows.append(
            _row(
                fields,
                id=fields.optional("uniq_id") or str(number),
                audio=tuple(clip_name(f"{task}_{dataset}/{name}") for name in names),
                task=f"{task}_{dataset}",
                columns={"category": task, "dataset": dataset},
                problems=problems,
            )
        )
    return rows


def _row(
    fields: Fields,
    *,
    id: str,
    audio: tuple[str, ...],
    task: str,
    columns: Mapping[str, str | None],
    problems: Problems,
) -> Parsed:
    texts = {key: fields.text(key) if key in _KEYS[:2] else fields.optional(key) for key in _KEYS}
    published = tuple(text or "" for text in texts.values())
    answer = fields.text("answer_gt")
    if answer in LETTERS and answer not in published:
        answer = published[LETTERS.index(answer)]
    if answer and answer not in published:
        listed = ", ".join(repr(text) for text in published if text)
        problems.add(fields.where, f"answer_gt {answer!r} is none of the choices {listed}")
    # As texts, so that what the official script compares is what was compared here.
    item = {**fields.item, **texts, "answer_gt": answer}
    item.pop("response", None)
    return Parsed(
        where=fields.where,
        id=id,
        audio=audio,
        question=fields.text("question"),
        choices=tuple(text for text in bare(published) if text),
        answer=bare_answer(answer, published),
        task=task,
        item=item,
        columns=columns,
    )


def _reference(item: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return str(item["answer_gt"]), tuple(as_text(item.get(key)) or "" for key in _KEYS)


def _respond(prediction: str, choices: Sequence[str]) -> str:
    """The letter of the choice that the prediction is (see `options.as_letter`); otherwise the prediction itself."""
    return as_letter(prediction, choices)


def _air_bench_file(pairs: Pairs) -> bytes:
    """The items that have a prediction, as the official inference leaves out those that it cannot hear."""
    return json_lines([{**item, "response": text} for item, text in pairs if text is not None])


def _mmsu_file(pairs: Pairs) -> bytes:
    """As AIR-Bench's; null stands for what the script would judge by the record before it."""
    said = [(item, text) for item, text in pairs if text is not None]
    return json_lines([{**item, "response": text if _is_said(text) else None} for item, text in said])


def _is_said(text: str) -> bool:
    return letter_of(text) is not None or text.strip().replace("\n", "") not in ("", "None")


_RULE = "the letter in the response, or the text of its choice"

MMSU = Benchmark(
    name="mmsu",
    title="MMSU",
    file="mmsu.jsonl",
    rule=_RULE,
    official_file="mmsu-predictions.jsonl",
    scorer=mmsu,
    parse=_mmsu_rows,
    reference=_reference,
    respond=_respond,
    write=_mmsu_file,
)

AIR_BENCH = Benchmark(
    name="air_bench",
    title="AIR-Bench, foundation",
    file="Foundation_meta.json",
    rule=_RULE,
    official_file="Foundation_result_modelx.jsonl",
    scorer=air_bench,
    parse=_air_bench_rows,
    reference=_reference,
    respond=_respond,
    write=_air_bench_file,
)
