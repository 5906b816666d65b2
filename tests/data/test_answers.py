"""The matching rule: golden cases of MMAU's matcher, and the cases it leaves open."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.answers import equal, is_choice, matches, normalize


def mmau(answer, prediction, choices):
    """MMAU's `string_match` (evaluation.py, v05.15.25), as published."""

    def tokenize(text):
        return set(re.findall(r"\b\w+\b", text.lower()))

    prediction_tokens = tokenize(prediction)
    answer_tokens = tokenize(answer)
    if not prediction_tokens:
        return False
    incorrect_tokens = set()
    for choice in choices:
        choice_tokens = tokenize(choice)
        if choice_tokens != answer_tokens:
            incorrect_tokens.update(choice_tokens - answer_tokens)
    return answer_tokens.issubset(prediction_tokens) and prediction_tokens.isdisjoint(incorrect_tokens)


ANIMALS = ("a dog", "a cat", "a cat and a dog")


@pytest.mark.parametrize(
    ("answer", "prediction", "choices", "right"),
    [
        ("Happy", "happy", ("Happy", "Sad"), True),
        ("Happy", "The speaker sounds HAPPY.", ("Happy", "Sad"), True),
        ("Happy", "sad", ("Happy", "Sad"), False),
        ("Happy", "Happy or sad", ("Happy", "Sad"), False),
        ("Happy", "unhappy", ("Happy", "Sad"), False),
        ("Happy", "", ("Happy", "Sad"), False),
        ("Happy", " ...", ("Happy", "Sad"), False),
        ("Happy", "A", ("Happy", "Sad"), False),
        ("a dog", "dog", ANIMALS, False),
        ("a dog", "A dog!", ANIMALS, True),
        ("a dog", "a cat and a dog", ANIMALS, False),
        ("a cat and a dog", "a dog and a cat", ANIMALS, True),
        ("10", "It is 10 seconds", ("1", "10"), True),
        ("10", "100", ("1", "10"), False),
        ("don't", "don t", ("don't", "do"), True),
        ("C major", "C-major", ("C major", "C minor"), True),
        ("二", "二", ("一", "二"), True),
    ],
)
def test_multiple_choice(answer, prediction, choices, right):
    assert matches(answer, prediction, choices) is right


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        ("three tones", "Three  tones.", True),
        ("three tones", "tones three", False),
        ("three tones", "there are three tones", False),
        ("three", "", False),
        ("", "", False),
        ("+", "+", True),
        ("+", "-", False),
    ],
)
def test_free_form(answer, prediction, right):
    assert matches(answer, prediction, ()) is right


def test_answers_without_words_are_compared_as_they_stand():
    assert matches("+", " + ", ("+", "-"))
    assert not matches("+", "-", ("+", "-"))
    assert not matches("+", "plus", ("+", "-"))


def test_normalize_and_equal():
    assert normalize("  The  DOG's bark! ") == "the dog s bark"
    assert normalize("?!") == ""
    assert equal("Two.", "two") and not equal("two", "") and not equal("?", "!")
    assert is_choice("two", ("One", "Two")) and not is_choice("three", ("One", "Two")) and not is_choice("x", ())


texts = st.lists(st.sampled_from(["dog", "cat", "A", "a", "and", ",", "!", "10", "é"]), max_size=5).map(" ".join)


@settings(deadline=None, database=None)
@given(answer=texts.filter(normalize), prediction=texts, others=st.lists(texts, max_size=3))
def test_equals_the_published_rule_with_choices(answer, prediction, others):
    choices = [answer, *others]
    assert matches(answer, prediction, choices) is mmau(answer, prediction, choices)
