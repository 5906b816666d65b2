"""Traces: render, parse, grammar, and what is refused."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.cota import DEFAULT_SECTIONS, Trace, TraceSchema
from kdpipe.data.errors import ConfigError, Rejected

SCHEMA = TraceSchema()
TEXT = (
    "<THINK><PLANNING>plan</PLANNING><CAPTION>cap</CAPTION><REASONING>why</REASONING>"
    "<SUMMARY>sum</SUMMARY></THINK><RESPONSE>two</RESPONSE>"
)
TRACE = Trace(sections=dict(zip(DEFAULT_SECTIONS, ("plan", "cap", "why", "sum"), strict=True)), response="two")

plain = st.text(st.characters(exclude_characters="<", exclude_categories=("Cs",)), max_size=40)
plain = plain.map(str.strip).filter(bool)
traces = st.builds(
    lambda texts, response: Trace(dict(zip(DEFAULT_SECTIONS, texts, strict=True)), response),
    st.tuples(*[plain] * 4),
    plain,
)


def rejection(text: str, schema: TraceSchema = SCHEMA) -> Rejected:
    with pytest.raises(Rejected) as caught:
        schema.parse(text)
    return caught.value


@settings(deadline=None, database=None)
@given(traces)
def test_parse_undoes_render(trace):
    text = SCHEMA.render(trace)
    assert SCHEMA.parse(text) == trace
    assert SCHEMA.render(SCHEMA.parse(text)) == text
    assert re.fullmatch(SCHEMA.regex(max_chars_per_section=40, response=None), text)
    assert re.fullmatch(SCHEMA.regex(max_chars_per_section=None, response=None), text)
    assert re.fullmatch(SCHEMA.regex(max_chars_per_section=40, response=["other", trace.response]), text)


@settings(deadline=None, database=None)
@given(st.from_regex(SCHEMA.regex(max_chars_per_section=3, response=["a (b)", "c|d"]), fullmatch=True))
def test_all_that_the_grammar_allows_parses(text):
    assert SCHEMA.parse(text).response in ("a (b)", "c|d")


def test_render_is_canonical():
    assert SCHEMA.render(TRACE) == TEXT
    shuffled = Trace({name: f" {TRACE.sections[name]}\n" for name in reversed(DEFAULT_SECTIONS)}, "two ")
    assert SCHEMA.render(shuffled) == TEXT
    assert list(SCHEMA.parse(TEXT).sections) == list(DEFAULT_SECTIONS)


def test_parse_tolerates_space_and_case_and_other_angle_brackets():
    loose = TEXT.replace("><", ">\n  <").replace("plan", " plan: f < 440 Hz <unk> </p>\n").replace("THINK", "think")
    loose = "\n" + loose.replace("<RESPONSE>", "<Response>") + "\n"
    trace = SCHEMA.parse(loose)
    assert trace.sections["PLANNING"] == "plan: f < 440 Hz <unk> </p>"
    assert trace.response == "two"
    assert SCHEMA.parse(SCHEMA.render(trace)) == trace


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (TEXT.replace("<CAPTION>cap</CAPTION>", ""), "section <CAPTION> is missing"),
        (TEXT.replace("</CAPTION>", ""), "<CAPTION> is not closed"),
        (TEXT.replace("<CAPTION>", ""), "section <CAPTION> is missing"),
        (TEXT.replace("cap", " \n"), "<CAPTION> is empty"),
        (TEXT.replace("cap", "<CAPTION>x</CAPTION>"), "<CAPTION> stands 2 times"),
        (TEXT.replace("cap</CAPTION><REASONING>why", "<REASONING>why</CAPTION>cap"), "<REASONING> stands where"),
        (TEXT.replace("CAPTION", "X").replace("REASONING", "CAPTION").replace("X", "REASONING"), "stands where"),
        (TEXT.replace("<THINK>", "").replace("</THINK>", ""), "section <THINK> is missing"),
        (TEXT.replace("<RESPONSE>two</RESPONSE>", ""), "section <RESPONSE> is missing"),
        (TEXT.replace("</RESPONSE>", ""), "<RESPONSE> is not closed"),
        (TEXT.replace("two", ""), "<RESPONSE> is empty"),
        (TEXT + " and more", "outside the tags: 'and more'"),
        ("Sure! " + TEXT, "outside the tags: 'Sure!'"),
        (TEXT.replace("</THINK>", "</THINK>so " + "y" * 99), "outside the tags: 'so yyy"),
        (TEXT + TEXT, "stands 2 times"),
        ("no tags at all", "section <THINK> is missing"),
        (TEXT.replace("<RESPONSE>", "<RE\u017fPONSE>"), "section <RESPONSE> is missing"),
    ],
)
def test_malformed_traces_say_what_is_wrong(text, detail):
    error = rejection(text)
    assert error.reason == "trace_malformed"
    assert detail in error.detail


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_traces(text):
    assert rejection(text).reason == "trace_empty"


@pytest.mark.parametrize(
    ("sections", "response"),
    [
        ({**TRACE.sections, "CAPTION": " "}, "two"),
        ({**TRACE.sections, "CAPTION": "a </caption> b"}, "two"),
        ({**TRACE.sections, "EXTRA": "x"}, "two"),
        ({"PLANNING": "x"}, "two"),
        (TRACE.sections, ""),
        (TRACE.sections, "<THINK>"),
    ],
)
def test_render_refuses_what_could_not_be_parsed(sections, response):
    with pytest.raises(Rejected, match="trace_malformed"):
        SCHEMA.render(Trace(sections, response))


def test_other_schemas():
    schema = TraceSchema(sections=("A", "B_C"), think="T", response="R")
    trace = Trace({"A": "1", "B_C": "2"}, "3")
    assert schema.render(trace) == "<T><A>1</A><B_C>2</B_C></T><R>3</R>"
    assert schema.parse("<T><A>1</A><B_C>2</B_C></T><R>3</R>") == trace
    assert schema.extract_response("<R>3") == "3"


def test_bad_schemas_name_every_problem():
    with pytest.raises(ConfigError) as caught:
        TraceSchema(sections=("A", "A", "bad", "1X", "THINK"))
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match="no sections"):
        TraceSchema(sections=())


def test_regex_bounds_and_choices():
    bounded = SCHEMA.regex(max_chars_per_section=4, response=["two", "a.b (c)?"])
    assert re.fullmatch(bounded, TEXT)
    assert not re.fullmatch(bounded, TEXT.replace("plan", "plans"))
    assert not re.fullmatch(bounded, TEXT.replace("two", "three"))
    assert re.fullmatch(bounded, TEXT.replace("two", "a.b (c)?"))
    assert not re.fullmatch(bounded, TEXT.replace("two", "aXb (c)?"))
    assert re.fullmatch(SCHEMA.regex(max_chars_per_section=1, response=None), re.sub(r">\w+<", ">x<", TEXT))
    for bad in ({"max_chars_per_section": 0, "response": None}, {"max_chars_per_section": 9, "response": ["a", " "]}):
        with pytest.raises(ConfigError):
            SCHEMA.regex(**bad)
    for choices in ([], ["</RESPONSE>"]):
        with pytest.raises(ConfigError):
            SCHEMA.regex(max_chars_per_section=9, response=choices)


def test_the_grammar_means_the_same_to_xgrammar():
    """vLLM's default backend has a regular expression converter of its own."""
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar comes with vLLM")
    from xgrammar.testing import _is_grammar_accept_string as accepts

    special = "é\n{a}[b](c)^d|e\\f*+?$./-#&~ 二"
    for most in (1, 64, None):
        grammar = xgrammar.Grammar.from_regex(SCHEMA.regex(max_chars_per_section=most, response=["two", special]))
        short = TRACE if most != 1 else Trace(dict.fromkeys(DEFAULT_SECTIONS, "x"), "two")
        assert accepts(grammar, SCHEMA.render(short))
        assert accepts(grammar, SCHEMA.render(Trace(short.sections, special)))
        assert not accepts(grammar, SCHEMA.render(Trace(short.sections, "three")))
        assert not accepts(grammar, TEXT.replace("plan", " "))
        assert accepts(grammar, TEXT.replace("plan", "plän\n*二*")) is (most != 1)
        assert accepts(grammar, TEXT.replace("plan", "x" * 65)) is (most is None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (TEXT, "two"),
        ("<RESPONSE>one</RESPONSE> hm, no: <response> two \n</Response> end", "two"),
        ("<THINK>never closed <RESPONSE>two", "two"),
        ("<RESPONSE>two</RESP", "two"),
        ("<RESPONSE>two</", "two"),
        ("<RESPONSE>a </b> c", "a </b> c"),
        ("<RESPONSE>", ""),
        ("two", None),
        ("", None),
        ("</RESPONSE>", None),
    ],
)
def test_extract_response(text, answer):
    assert SCHEMA.extract_response(text) == answer
