"""Golden cases of each benchmark's rule, and the two denominators."""

import pytest

from kdpipe.stages.evaluate.scorers import air_bench, clotho_aqa, iemocap, meld, mmar, mmau, mmsu
from kdpipe.stages.evaluate.scorers.counting import Item

ANIMALS = ["a dog", "a dog and a cat", "a cat"]
PREFIXED = ["(A) Man", "(B) Woman", "(C) Child"]
MOODS = ["Sad", "Happy", "Angry", "Calm"]


@pytest.mark.parametrize("scorer", [mmau, mmar])
@pytest.mark.parametrize(
    ("answer", "prediction", "choices", "right"),
    [
        ("Man", "man", ["Man", "Woman"], True),
        ("Man", "It is a MAN.", ["Man", "Woman"], True),
        ("Man", "a man, not a woman", ["Man", "Woman"], False),
        ("Man", "", ["Man", "Woman"], False),
        ("Man", "...", ["Man", "Woman"], False),
        ("Man", "A", ["Man", "Woman"], False),  # a letter scores nothing
        ("a dog", "a dog", ANIMALS, True),  # one choice begins another
        ("a dog", "a dog and a cat", ANIMALS, False),
        ("a dog and a cat", "a cat and a dog", ANIMALS, True),
        ("a dog and a cat", "a dog", ANIMALS, False),
        ("(A) Man", "(A) Man", PREFIXED, True),  # the prefix is a word of the answer
        ("(A) Man", "Man", PREFIXED, False),
        ("(A) Man", "(B) Man", PREFIXED, False),
        ("C", "C major", ["C", "G"], True),
        ("10", "100", ["1", "10"], False),
        ("Man", "a man", [], True),  # without choices, whatever holds the answer
        ("+", "plus", ["+", "-"], True),  # no word in the answer: any words that no choice claims
        ("+", "+", ["+", "-"], False),
        ("don't", "don t", ["don't", "do"], True),
    ],
)
def test_sets_of_words(scorer, answer, prediction, choices, right):
    assert scorer.is_correct(answer, prediction, choices) is right


@pytest.mark.parametrize("scorer", [mmsu, air_bench])
@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("B", True),
        ("B.", True),
        ("B. Happy", True),
        (" \nB\n", True),
        ("The answer is B.", True),
        ("The answer\nis B.", True),
        ("the answer is B", False),  # the last but one is a space
        ("(B)", True),
        ("(B) Happy", False),
        ("b", False),
        ("E", False),
        ("?", False),
        ("Happy", False),  # the text alone: `benchmarks` makes a letter of it first
        ("Boring", True),  # a word that begins with the letter is that letter
        ("Angry", False),
        ("A or B.", False),  # the first letter wins
        ("", False),
        ("None", False),
    ],
)
def test_letters(scorer, response, right):
    assert scorer.is_correct("Happy", response, MOODS) is right


def test_letters_of_equal_choices_and_of_missing_ones():
    twice = ["Yes", "No", "Yes", ""]
    assert mmsu.is_correct("Yes", "A", twice) and mmsu.is_correct("Yes", "C", twice)
    assert air_bench.is_correct("Yes", "A", twice) and not air_bench.is_correct("Yes", "C", twice)
    for scorer in (mmsu, air_bench):
        assert not scorer.is_correct("Yes", "D", ["Yes", "No"])
        assert scorer.is_correct("B", "B.", MOODS) and not scorer.is_correct("B", "A", MOODS)
        assert scorer.is_correct("B", "C", ["D", "A", "B", "C"])  # a choice that is a letter is a text
        assert not scorer.is_correct("five", "E", ["one", "two", "three", "four", "five"])


@pytest.mark.parametrize(
    ("prediction", "right"), [("joy", True), (" joy\n", True), ("Joy", False), ("joy.", False), ("", False)]
)
def test_labels_are_compared_exactly(prediction, right):
    for scorer in (meld, iemocap, clotho_aqa):
        assert scorer.is_correct("joy", prediction, ["joy", "anger"]) is right


def test_several_references():
    answers = ["yes", "yes", "no"]
    assert clotho_aqa.is_correct(answers, "yes", []) and clotho_aqa.is_correct(answers, " no", [])
    assert not clotho_aqa.is_correct(answers, "maybe", []) and not clotho_aqa.is_correct(answers, "Yes", [])
    assert not clotho_aqa.is_correct((), "yes", [])


def _scores(score):
    return [score[name][part] for name in ("official", "strict") for part in ("score", "n")]


def test_an_item_without_a_prediction_leaves_the_official_denominator():
    items = [
        Item("a", "a", ("a", "b")),
        Item("a", "", ("a", "b")),
        Item("a", None, ("a", "b")),
        Item("a", "b", ("a", "b")),
    ]
    for scorer in (mmau, mmar, meld):
        found = scorer.score(items)
        assert found["measure"] == "accuracy" and _scores(found) == [1 / 3, 3, 1 / 4, 4]


def test_a_response_without_a_letter_leaves_the_official_denominator():
    responses = ["B", "A", "", "None", "(B) Happy", None]
    items = [Item("Happy", response, tuple(MOODS)) for response in responses]
    for scorer in (mmsu, air_bench):
        assert _scores(scorer.score(items)) == [1 / 2, 2, 1 / 6, 6]


def test_unweighted_accuracy_is_the_mean_recall():
    items = [
        Item("angry", "angry"),
        Item("angry", "sad"),
        Item("angry", None),
        Item("angry", "angry"),
        Item("sad", "sad"),
    ]
    found = iemocap.score(items)
    assert found["measure"] == "unweighted_accuracy"
    assert _scores(found) == pytest.approx([(2 / 3 + 1) / 2, 4, (2 / 4 + 1) / 2, 5])
    assert _scores(iemocap.score([Item("sad", None)])) == [None, 0, 0.0, 1]


def test_every_answer_of_every_person_counts():
    items = [Item(("yes", "yes", "no"), "yes"), Item(("two",), "2"), Item(("red", "blue", "red"), None)]
    assert _scores(clotho_aqa.score(items)) == [2 / 4, 4, 2 / 7, 7]


@pytest.mark.parametrize("scorer", [mmau, mmar, mmsu, air_bench, meld, iemocap, clotho_aqa])
def test_nothing_to_score(scorer):
    assert _scores(scorer.score([])) == [None, 0, None, 0]
