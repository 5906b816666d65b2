"""MELD and IEMOCAP: which emotion a clip holds, in the form of Qwen-Audio (`audio`, `prompt`, `gt`, `source`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdpipe.data.manifest_rows import Problems
from kdpipe.stages.evaluate.benchmarks.base import Benchmark, Pairs, Parsed, json_list
from kdpipe.stages.evaluate.benchmarks.files import Fields, clip_name, stem
from kdpipe.stages.evaluate.scorers import iemocap, meld

QUESTION = "Which emotion does the speaker express?"
"""Asked where a prompt holds nothing but a model's special tokens."""

_TOKENS = re.compile(r"<audio>.*?</audio>|<\|[^|<>]*\|>")
_SESSION = re.compile(r"(?:session|ses)?[ _]?0*([1-5])", re.IGNORECASE)
_IN_NAME = re.compile(r"Ses0([1-5])[FM]_|(?:^|/)Session([1-5])/")


def _meld_rows(items: Sequence[tuple[str, dict[str, Any]]], problems: Problems, notes: list[str]) -> list[Parsed]:
    return _rows([Fields(where, item, problems) for where, item in items], task="meld")


def _iemocap_rows(items: Sequence[tuple[str, dict[str, Any]]], problems: Problems, notes: list[str]) -> list[Parsed]:
    """The items of session 5: named so in the column `session`, or by the file name (`Ses05F_...`)."""
    taken, left_out = [], 0
    for where, item in items:
        fields = Fields(where, item, problems)
        session = _session(fields)
        if session is None:
            problems.add(
                where, "neither a column `session` (1 to 5) nor the file name (`Ses05F_...`) tells the session"
            )
        elif session != "5":
            left_out += 1
            continue
        taken.append(fields)
    if left_out:
        notes.append(f"rows of sessions 1 to 4, which were left out: {left_out}")
    return _rows(taken, task="iemocap")


def _session(fields: Fields) -> str | None:
    named = fields.optional("session")
    if named is not None:
        found = _SESSION.fullmatch(named.strip())
        return found[1] if found else None
    found = _IN_NAME.search(str(fields.item.get("audio") or "").replace("\\", "/"))
    return (found[1] or found[2]) if found else None


def _rows(taken: Sequence[Fields], *, task: str) -> list[Parsed]:
    """The rows; their choices are the labels that the file gives, in alphabetical order."""
    found = [(fields, fields.text("audio"), fields.text("gt")) for fields in taken]
    labels = tuple(sorted({label for _, _, label in found if label}))
    return [
        Parsed(
            where=fields.where,
            id=stem(clip_name(audio)),
            audio=(clip_name(audio),),
            question=_TOKENS.sub("", fields.optional("prompt") or "").strip() or QUESTION,
            choices=labels,
            answer=label,
            task=task,
            item=fields.item,
            columns={"category": label, "dataset": fields.optional("source")},
        )
        for fields, audio, label in found
    ]


def _reference(item: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return str(item["gt"]), ()


def _respond(prediction: str, choices: Sequence[str]) -> str:
    """The prediction without its outer white space, as the official script takes a model's output."""
    return prediction.strip()


def _meld_file(pairs: Pairs) -> bytes:
    return _results(pairs, "meld")


def _iemocap_file(pairs: Pairs) -> bytes:
    return _results(pairs, "iemocap")


def _results(pairs: Pairs, source: str) -> bytes:
    """The items that have a prediction, as the official script saves them."""
    return json_list(
        [
            {
                "gt": str(item["gt"]),
                "response": text,
                "source": item.get("source") or source,
                "audio_path": item.get("audio"),
            }
            for item, text in pairs
            if text is not None
        ]
    )


MELD = Benchmark(
    name="meld",
    title="MELD, in the form of Qwen-Audio",
    file="meld_eval.jsonl",
    rule="exactly the label",
    official_file="meld_results.json",
    scorer=meld,
    parse=_meld_rows,
    reference=_reference,
    respond=_respond,
    write=_meld_file,
)

IEMOCAP = Benchmark(
    name="iemocap",
    title="IEMOCAP, session 5",
    file="a .jsonl or .csv with audio and gt",
    rule="exactly the label; mean recall",
    official_file="iemocap_results.json",
    scorer=iemocap,
    parse=_iemocap_rows,
    reference=_reference,
    respond=_respond,
    write=_iemocap_file,
)
