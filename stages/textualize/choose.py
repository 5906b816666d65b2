"""Which trace a sample keeps: the manifest's own, or the first good one of several candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdpipe.data.answers import matches
from kdpipe.data.cota import Trace, TraceSchema
from kdpipe.data.errors import ConfigError, Rejected
from kdpipe.data.manifest import Sample

if TYPE_CHECKING:
    from kdpipe.stages.models.engine import Output

_SEEN_CHARS = 300


@dataclass(frozen=True)
class Chosen:
    """The trace that is kept.

    Attributes:
        trace: sections and response.
        answer_match: whether the response matches the answer; None when the manifest has no answer.
        index: which candidate it is; None for the manifest's own.
        output: the candidate; None for the manifest's own.
    """

    trace: Trace
    answer_match: bool | None
    index: int | None = None
    output: Output | None = None


def given_trace(sample: Sample, schema: TraceSchema) -> Chosen:
    """Parses and validates the trace that the manifest brings; its `response` column stands in for a missing tag.

    Raises:
        Rejected: `trace_empty`, `trace_malformed`, or `answer_mismatch`.
    """
    text = sample.trace or ""
    if text.strip() and sample.response is not None and schema.extract_response(text) is None:
        text = f"{text}<{schema.response}>{sample.response}</{schema.response}>"
    trace = schema.parse(text)
    match = _match(sample, trace)
    if match is False:
        raise Rejected("answer_mismatch", f"the trace answers {trace.response!r}, the manifest {sample.answer!r}")
    return Chosen(trace, match)


def response_pattern(sample: Sample, schema: TraceSchema, max_section_chars: int) -> str:
    """The regular expression of the sample's traces for structured output; the response is one of its choices.

    Raises:
        Rejected: `choices_unusable`, a choice is blank or holds a tag of the schema.
    """
    try:
        return schema.regex(max_chars_per_section=max_section_chars, response=sample.choices or None)
    except ConfigError as error:
        raise Rejected("choices_unusable", str(error)) from None


def choose(sample: Sample, outputs: Sequence[Output], schema: TraceSchema, *, require_match: bool) -> Chosen:
    """The first candidate whose response matches the answer, or the first well-formed one where none has to.

    Raises:
        Rejected: `no_candidate_matches` (all responses in the detail), `trace_truncated` (no candidate is complete), or
            `trace_malformed` (complete, but none well-formed).
    """
    wrong: list[Chosen] = []
    truncated, faults = 0, []
    for index, output in enumerate(outputs):
        if output.finish_reason == "length":
            truncated += 1
            continue
        try:
            trace = schema.parse(output.text)
        except Rejected as rejected:
            faults.append(rejected.detail)
            continue
        chosen = Chosen(trace, _match(sample, trace), index, output)
        if chosen.answer_match is not False:
            return chosen
        wrong.append(chosen)
    if wrong and not require_match:
        return wrong[0]
    if wrong:
        seen = ", ".join(repr(chosen.trace.response) for chosen in wrong)[:_SEEN_CHARS]
        raise Rejected(
            "no_candidate_matches", f"the answer is {sample.answer!r}; {len(outputs)} candidates gave: {seen}"
        )
    if faults:
        raise Rejected("trace_malformed", f"none of {len(outputs)} candidates is well-formed; the first: {faults[0]}")
    raise Rejected(
        "trace_truncated",
        f"all {truncated} candidates reached textualize.trace.max_tokens or engine.max_model_len before their end",
    )


def _match(sample: Sample, trace: Trace) -> bool | None:
    return None if sample.answer is None else matches(sample.answer, trace.response, sample.choices)
