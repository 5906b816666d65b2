"""What every benchmark can do: read its published file, judge, score, and write the official prediction file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kdpipe.data.answers import is_choice
from kdpipe.data.errors import KdpipeError
from kdpipe.data.manifest_rows import Problems
from kdpipe.stages.evaluate.benchmarks.files import locate, read_items
from kdpipe.stages.evaluate.scorers.counting import Item

Pairs = Sequence[tuple[Mapping[str, Any], str | None]]
"""Published items, each with what the model said; None where it said nothing at all (the sample was rejected)."""

_NAMED = 5


class Scorer(Protocol):
    """A module of `kdpipe.stages.evaluate.scorers`."""

    @property
    def is_correct(self) -> Callable[[Any, str, list[str]], bool]: ...

    @property
    def score(self) -> Callable[[Sequence[Item]], dict[str, Any]]: ...


@dataclass(frozen=True)
class Parsed:
    """One item, ready to become a row of a manifest.

    Attributes:
        where: its place in the file, for messages.
        id: its name in the benchmark; made unique later.
        audio: places of its clip below the folder of clips, the likeliest first.
        question: the question.
        choices: the bare texts of the choices.
        answer: the right answer; None where the benchmark withholds it.
        task: kind of task.
        item: the published item.
        columns: other columns of the manifest; None is left out.
    """

    where: str
    id: str
    audio: tuple[str, ...]
    question: str
    choices: tuple[str, ...]
    answer: str | None
    task: str
    item: Mapping[str, Any]
    columns: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """A published file as rows of a manifest.

    Attributes:
        rows: the rows; `audio` holds absolute paths.
        missing: clips that were not found, as the file names them. Their rows are among `rows` all the same, so that
            they count as wrong in the strict score.
        notes: what else the user should know.
    """

    rows: list[dict[str, Any]]
    missing: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: the name in manifests and on the command line.
        title: the name for people.
        file: what its published file is called.
        rule: in a few words, when an answer is right.
        official_file: name of the prediction file.
        scorer: its rules.
        parse: turns published items (each with its place) into rows; adds to the problems, and to the notes.
        reference: the right answer (None where it is withheld) and the choices of a published item, as they stand in
            the official file.
        respond: from what a model said, and those choices, to the response in the official file.
        write: the official file, from items and responses (None: no prediction).
    """

    name: str
    title: str
    file: str
    rule: str
    official_file: str
    scorer: Scorer
    parse: Callable[[Sequence[tuple[str, dict[str, Any]]], Problems, list[str]], list[Parsed]]
    reference: Callable[[Mapping[str, Any]], tuple[str | tuple[str, ...] | None, tuple[str, ...]]]
    respond: Callable[[str, Sequence[str]], str]
    write: Callable[[Pairs], bytes]

    def read(self, path: Path, audio: Path) -> Imported:
        """Reads a published file.

        Args:
            path: the file (`.json`, `.jsonl` or `.csv`).
            audio: the folder of clips.

        Raises:
            ManifestError: all that is wrong with the file, each problem with its row.
            KdpipeError: the folder, or every clip, is missing.
        """
        problems, notes = Problems(), []
        items = list(read_items(Path(path), problems))
        parsed = self.parse(items, problems, notes)
        if not parsed and not problems.texts:
            problems.add(str(path), f"holds no items of {self.title}" + "".join(f" ({note})" for note in notes))
        problems.raise_any()
        return self._located(parsed, Path(audio), notes)

    def _located(self, parsed: list[Parsed], audio: Path, notes: list[str]) -> Imported:
        if not audio.is_dir():
            raise KdpipeError(
                f"--audio {audio}: no such folder. Name the folder in which the clips of {self.title} lie."
            )
        rows, missing, ids = [], [], set[str]()
        for one in parsed:
            path = locate(audio, one.audio)
            if path is None:
                missing.append(one.audio[0])
            columns = {
                "id": _unique(f"{self.name}-{one.id}", ids),
                "audio": str(path or audio / one.audio[0]),
                "question": one.question,
                "choices": list(one.choices) or None,
                "answer": one.answer,
                "task": one.task,
                "split": "test",
                "benchmark": self.name,
                **one.columns,
                "item": json.dumps(one.item),
            }
            rows.append({name: value for name, value in columns.items() if value is not None})
        if len(missing) == len(parsed):
            raise KdpipeError(
                f"--audio {audio}: none of the {len(parsed)} clips lies there; looked for {_some(missing)}, each also "
                "without its leading folders."
            )
        odd = [
            one for one in parsed if one.answer is not None and one.choices and not is_choice(one.answer, one.choices)
        ]
        if odd:
            places = _some([one.where for one in odd])
            notes.append(f"rows whose answer is none of their choices, which evaluate rejects: {len(odd)} ({places})")
        return Imported(rows, missing, notes)

    def is_correct(
        self,
        answer: str | Sequence[str],
        prediction: str,
        choices: Sequence[str],
        item: Mapping[str, Any] | None = None,
    ) -> bool:
        """Whether a model's answer is right by the benchmark's rule.

        Args:
            answer: the right answer of the manifest's row; not looked at where there is an item.
            prediction: what the model said, its trace removed.
            choices: the choices of that row; not looked at where there is an item.
            item: the published item.

        Raises:
            KdpipeError: the item is none of this benchmark's.
        """
        if item is not None:
            known, choices = self.reference_of(item)
            answer = answer if known is None else known
        return self.scorer.is_correct(answer, self.respond(prediction, choices), list(choices))

    def score(self, pairs: Pairs) -> dict[str, Any]:
        """The benchmark's score, officially and strictly counted. Items without an answer are in neither.

        Returns:
            `measure`, and under `official` and `strict` the `score` (0 to 1; None without items) and `n`.

        Raises:
            KdpipeError: an item is none of this benchmark's.
        """
        items = []
        for item, prediction in pairs:
            answer, choices = self.reference_of(item)
            if answer is not None:
                response = None if prediction is None else self.respond(prediction, choices)
                items.append(Item(answer, response, choices))
        return self.scorer.score(items)

    def official(self, pairs: Pairs) -> tuple[str, bytes]:
        """The prediction file that the benchmark's own script reads: its name and content.

        Raises:
            KdpipeError: an item is none of this benchmark's.
        """
        responses = []
        for item, prediction in pairs:
            _, choices = self.reference_of(item)
            responses.append((item, None if prediction is None else self.respond(prediction, choices)))
        return self.official_file, self.write(responses)

    def reference_of(self, item: Mapping[str, Any]) -> tuple[str | tuple[str, ...] | None, tuple[str, ...]]:
        """The right answer (None where it is withheld) and the choices of a published item.

        Raises:
            KdpipeError: it is none of this benchmark's.
        """
        try:
            return self.reference(item)
        except (KeyError, TypeError, AttributeError):
            raise KdpipeError(
                f"{json.dumps(item, default=str)[:200]}: no item of {self.title}. Make the manifest anew with "
                f"`kdpipe benchmark import {self.name}`."
            ) from None


def json_list(values: Sequence[Mapping[str, Any]]) -> bytes:
    """A JSON file of one list."""
    return (json.dumps(list(values), indent=2) + "\n").encode("ascii")


def json_lines(values: Sequence[Mapping[str, Any]]) -> bytes:
    """A JSON file of one object a line."""
    return "".join(json.dumps(value) + "\n" for value in values).encode("ascii")


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or `name-2` and so on where it is taken."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    taken.add(found)
    return found


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more
