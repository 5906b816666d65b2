"""ClothoAQA: questions about sounds, each answered by three people in one word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kdpipe.data.manifest_rows import Problems
from kdpipe.stages.evaluate.benchmarks.base import Benchmark, Pairs, Parsed, json_list
from kdpipe.stages.evaluate.benchmarks.files import Fields, clip_name, stem
from kdpipe.stages.evaluate.scorers import clotho_aqa

_SOURCE = "clothoaqa"  # the official script asks whether the source starts with `clotho`


def _parse(items: Sequence[tuple[str, dict[str, Any]]], problems: Problems, notes: list[str]) -> list[Parsed]:
    """One row a question: rows of the file with the same clip and question are the answers of several people.

    The manifest's answer is the commonest of them, the first among equals; all stand in the item's `answers`.
    """
    questions: dict[tuple[str, str], list[Fields]] = {}
    for where, item in items:
        fields = Fields(where, item, problems)
        questions.setdefault((fields.text("file_name"), fields.text("QuestionText")), []).append(fields)
    rows = []
    for (name, question), asked in questions.items():
        answers = [fields.text("answer") for fields in asked]
        confidences = [fields.optional("confidence") for fields in asked]
        rows.append(
            Parsed(
                where=asked[0].where,
                id=stem(clip_name(name)),
                audio=(clip_name(name),),
                question=question,
                choices=(),
                answer=Counter(answers).most_common(1)[0][0],
                task="clotho_aqa",
                item={"file_name": name, "QuestionText": question, "answers": answers, "confidence": confidences},
                columns={"category": "unanimous" if len(set(answers)) == 1 else "divided"},
            )
        )
    return rows


def _reference(item: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    answers = item["answers"]
    if not isinstance(answers, list):
        raise TypeError
    return tuple(str(answer) for answer in answers), ()


def _respond(prediction: str, choices: Sequence[str]) -> str:
    """The prediction without its outer white space, as the official script takes a model's output."""
    return prediction.strip()


def _write(pairs: Pairs) -> bytes:
    """One entry for each answer of each person, as the official script saves them."""
    return json_list(
        [
            {"gt": answer, "response": text, "source": _SOURCE, "audio_path": item.get("file_name")}
            for item, text in pairs
            if text is not None
            for answer in _reference(item)[0]
        ]
    )


CLOTHO_AQA = Benchmark(
    name="clotho_aqa",
    title="ClothoAQA",
    file="clotho_aqa_test.csv",
    rule="exactly an answer; each person's answer counts",
    official_file="clothoaqa_results.json",
    scorer=clotho_aqa,
    parse=_parse,
    reference=_reference,
    respond=_respond,
    write=_write,
)
