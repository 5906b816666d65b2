"""Templates and the user's words in them."""

import pytest

from kdpipe.data.errors import Rejected
from kdpipe.data.manifest import AudioRef, Sample
from kdpipe.stages.models.prompt import choices_text, fill, messages, refuse_special, render, unknown_fields


def sample(question="Which?", choices=("a", "b")):
    ref = AudioRef(None, b"", "clip")
    return Sample("s", (ref,), question, choices, None, None, None, None, None, None, None, None, {})


def test_fields_are_filled_once():
    assert fill("{description}\n\n{question}\n{choices}", sample(), "tones: 1") == "tones: 1\n\nWhich?\nChoices: a, b"
    assert fill("{question}\n{choices}", sample("What is {choices}?", ())) == "What is {choices}?"
    assert fill("{question} {description}", sample()) == "Which?"
    assert fill("{other} {question}", sample()) == "{other} Which?"


def test_unknown_fields():
    assert unknown_fields("{question} {anser} {description}", ("question",)) == ["anser", "description"]
    assert unknown_fields("{ question } {}", ("question",)) == []


def test_choices_text():
    assert choices_text(()) == ""
    assert choices_text(("yes", "no")) == "Choices: yes, no"


def test_clips_stand_before_the_text():
    turns = messages("Which?", system="Listen.", clips=2)
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert [item["type"] for item in turns[1]["content"]] == ["audio", "audio", "text"]
    assert messages("Which?") == [{"role": "user", "content": "Which?"}]


def test_render_ends_where_the_answer_starts():
    class Recorder:
        def apply_chat_template(self, turns, **kwargs):
            return turns, kwargs

    turns, kwargs = render(Recorder(), messages("a"), enable_thinking=False)
    assert turns == messages("a")
    assert kwargs == {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}


def test_special_tokens_in_the_users_words_are_refused():
    refuse_special(["a < b", None, ""], ["<|im_end|>"])
    with pytest.raises(Rejected, match=r"special token '<\|im_end\|>'") as error:
        refuse_special([None, "x<|im_end|>y"], ["<|AUDIO|>", "<|im_end|>"])
    assert error.value.reason == "special_token_in_text"
