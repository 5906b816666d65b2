"""Choosing a trace: the manifest's own, and the first good candidate."""

from __future__ import annotations

from typing import Any

import pytest

from kdpipe.data.cota import TraceSchema
from kdpipe.data.errors import Rejected
from kdpipe.data.manifest import AudioRef, Sample
from kdpipe.stages.models.engine import Output
from kdpipe.stages.textualize.choose import choose, given_trace, response_pattern

SCHEMA = TraceSchema(("PLANNING", "SUMMARY"))
THINK = "<THINK><PLANNING>Count.</PLANNING><SUMMARY>Two.</SUMMARY></THINK>"


def sample(**changes: Any) -> Sample:
    values: dict[str, Any] = dict.fromkeys(Sample.__dataclass_fields__)
    values |= {"id": "a", "audio": (AudioRef(None, b"", "a"),), "question": "How many?", "choices": (), "extra": {}}
    return Sample(**(values | changes))


def output(response: str, finish: str = "stop") -> Output:
    return Output(f"{THINK}<RESPONSE>{response}</RESPONSE>", finish, 9)


def test_given_trace_is_parsed_and_matched():
    chosen = given_trace(
        sample(trace=f"{THINK}\n<RESPONSE>two</RESPONSE>", answer="two", choices=("one", "two")), SCHEMA
    )
    assert chosen.trace.response == "two"
    assert dict(chosen.trace.sections) == {"PLANNING": "Count.", "SUMMARY": "Two."}
    assert (chosen.answer_match, chosen.index, chosen.output) == (True, None, None)


def test_given_trace_takes_the_response_column():
    assert given_trace(sample(trace=THINK, response="two"), SCHEMA).trace.response == "two"
    own = sample(trace=f"{THINK}<RESPONSE>one</RESPONSE>", response="two")
    assert given_trace(own, SCHEMA).trace.response == "one"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trace": THINK}, "trace_malformed"),
        ({"trace": "Two tones, I think.", "response": "two"}, "trace_malformed"),
        ({"trace": "  "}, "trace_empty"),
        ({"trace": "  ", "response": "two"}, "trace_empty"),
        ({"trace": THINK, "response": "one", "answer": "two"}, "answer_mismatch"),
    ],
)
def test_given_trace_is_rejected(changes, reason):
    with pytest.raises(Rejected) as caught:
        given_trace(sample(**changes), SCHEMA)
    assert caught.value.reason == reason


def test_the_first_matching_candidate_is_kept():
    outputs = [output("one"), Output("no tags", "stop", 3), output("two"), output("two")]
    chosen = choose(sample(answer="two"), outputs, SCHEMA, require_match=True)
    assert (chosen.index, chosen.answer_match, chosen.output) == (2, True, outputs[2])


def test_without_an_answer_the_first_well_formed_one_is_kept():
    chosen = choose(sample(), [Output("<THINK>", "stop", 3), output("one")], SCHEMA, require_match=True)
    assert (chosen.index, chosen.answer_match) == (1, None)


def test_a_wrong_candidate_serves_only_where_no_match_is_required():
    outputs = [output("one"), output("three")]
    with pytest.raises(Rejected) as caught:
        choose(sample(answer="two"), outputs, SCHEMA, require_match=True)
    assert caught.value.reason == "no_candidate_matches"
    assert "'one', 'three'" in caught.value.detail
    chosen = choose(sample(answer="two"), outputs, SCHEMA, require_match=False)
    assert (chosen.index, chosen.answer_match) == (0, False)


def test_truncated_and_malformed_candidates_are_told_apart():
    cut = output("two", finish="length")
    with pytest.raises(Rejected) as caught:
        choose(sample(answer="two"), [cut, cut], SCHEMA, require_match=True)
    assert caught.value.reason == "trace_truncated"
    with pytest.raises(Rejected) as caught:
        choose(sample(answer="two"), [cut, Output("two", "stop", 1)], SCHEMA, require_match=True)
    assert caught.value.reason == "trace_malformed"


def test_response_pattern_offers_the_choices():
    import re

    pattern = response_pattern(sample(choices=("1.5 s", "two")), SCHEMA, 20)
    assert re.fullmatch(pattern, f"{THINK}<RESPONSE>1.5 s</RESPONSE>")
    assert not re.fullmatch(pattern, f"{THINK}<RESPONSE>1x5 s</RESPONSE>")
    assert re.fullmatch(response_pattern(sample(), SCHEMA, 20), f"{THINK}<RESPONSE>anything</RESPONSE>")
    with pytest.raises(Rejected) as caught:
        response_pattern(sample(choices=("<THINK>", "two")), SCHEMA, 20)
    assert caught.value.reason == "choices_unusable"
