"""Errors that reach the user: what is wrong, where, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class KdpipeError(ValueError):
    """An error the user can mend. The command line prints its text without a traceback and exits with 2."""


class ConfigError(KdpipeError):
    """One or more mistakes in a configuration; `problems` holds one text for each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class ManifestError(KdpipeError):
    """The manifest cannot be used as a whole (unreadable, missing ids, duplicate ids, paths that escape)."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class ModelError(KdpipeError):
    """A model folder is unknown, incomplete, or of a family kdpipe does not support."""


class VocabularyError(KdpipeError):
    """Teacher and student tokenizers disagree on ordinary token ids."""


class StoreError(KdpipeError):
    """A stored artifact is damaged or of a version this kdpipe does not read."""


class RejectBudgetError(KdpipeError):
    """More samples were rejected than `data.max_reject_fraction` allows; the good ones are done and kept."""


class StaleError(KdpipeError):
    """`--only` was asked for while something upstream is not fresh."""


class Rejected(Exception):
    """One sample cannot be processed. Not an error of the run: it is recorded in the `rejects` table.

    Attributes:
        reason: a short code that is stable across versions, such as `audio_silent`.
        detail: one sentence for the user.
    """

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class SaidElsewhere(KdpipeError):
    """An error of several processes that another of them prints."""


def of_all(error: BaseException) -> BaseException:
    """Marks an error that each of several processes raises, so that none of them leaves before the others."""
    error.of_all = True  # type: ignore[attr-defined]
    return error
