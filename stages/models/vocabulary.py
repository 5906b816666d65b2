"""Which token ids mean the same to teacher and student, found from the tokenizer files alone.

Models of one family share their ordinary (BPE) tokens, but their special ids collide: 151646 is
`<|object_ref_start|>` in text models and `<|AUDIO|>` in Qwen2.5-Omni. Their output heads are padded to
different sizes. A distribution can be compared only over ids on which both agree, so the rest is masked on
both sides before any normalization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdpipe.data.errors import ModelError, VocabularyError


@dataclass(frozen=True)
class Vocabulary:
    """Token strings by id; `special` ids are the added ones that text never encodes to by merging."""

    name: str
    tokens: Mapping[int, str]
    special: frozenset[int]


@dataclass(frozen=True)
class Alignment:
    """Ids that teacher and student share.

    Attributes:
        valid: ids at or beyond it exist in one model only, or are padding rows of an output head.
        masked: ids below `valid` on which the two disagree, ascending.
    """

    valid: int
    masked: tuple[int, ...]


def load_vocabulary(folder: Path, name: str) -> Vocabulary:
    """Reads a tokenizer's ids from `tokenizer.json`, or from `vocab.json` and `tokenizer_config.json`.

    Raises:
        ModelError: neither is there, or they cannot be read.
    """
    try:
        if (folder / "tokenizer.json").exists():
            data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            entries = data["model"]["vocab"]
            ordinary = dict(entries) if isinstance(entries, dict) else {e[0]: i for i, e in enumerate(entries)}
            added = {int(entry["id"]): entry["content"] for entry in data.get("added_tokens") or []}
        else:
            ordinary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            added = {}
        extra = folder / "tokenizer_config.json"
        if extra.exists():
            decoder = json.loads(extra.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
            added |= {int(index): entry["content"] for index, entry in decoder.items()}
        tokens = {index: token for token, index in ordinary.items()} | added
        odd = [pair for pair in tokens.items() if type(pair[0]) is not int or not isinstance(pair[1], str)]
        if odd:
            raise ValueError(f"{odd[0]!a} is no id with its token")
    except FileNotFoundError:
        raise ModelError(
            f"{name}: {folder} has neither tokenizer.json nor vocab.json. Save the tokenizer beside the model."
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{name}: the tokenizer files in {folder} cannot be read ({error!r}).") from None
    return Vocabulary(name, tokens, frozenset(added))


def align(student: Vocabulary, teacher: Vocabulary, student_rows: int, teacher_rows: int) -> Alignment:
    """Finds the shared ids of two models.

    Args:
        student_rows: rows of the student's output head.
        teacher_rows: rows of the teacher's.

    Raises:
        VocabularyError: an id is an ordinary token in both and they differ; names the first such id.
    """
    ours = {i for i in student.tokens if i < student_rows}
    theirs = {i for i in teacher.tokens if i < teacher_rows}
    differing = [i for i in sorted(ours & theirs) if student.tokens[i] != teacher.tokens[i]]
    for index in differing:
        if index not in student.special and index not in teacher.special:
            raise VocabularyError(
                f"{teacher.name} and {student.name} have different tokenizers: id {index} is "
                f"{teacher.tokens[index]!r} in the teacher and {student.tokens[index]!r} in the student. "
                "Choose a teacher with the student's base vocabulary (Qwen2.x and Qwen3 share one)."
            )
    shared = ours & theirs - set(differing)
    if not shared:
        raise VocabularyError(f"{teacher.name} and {student.name} share no token ids. Choose another teacher.")
    valid = max(shared) + 1
    return Alignment(valid, tuple(i for i in range(valid) if i not in shared))
