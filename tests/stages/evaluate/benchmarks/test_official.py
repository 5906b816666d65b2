"""Official files: what the benchmarks' scripts find in them is what kdpipe says of the same predictions."""

import json

import pytest

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.evaluate.benchmarks import BENCHMARKS, find, item_of, official_predictions

SAID = {
    "mmau": ["man", "sad", "C major"],
    "mmar": ["It is two."],
    "mmsu": ["happy", "A"],
    "air_bench": ["Happy.", "The answer is C."],
    "meld": [" joy\n", "joy"],
    "iemocap": ["angry", "angry", "sad"],
    "clotho_aqa": ["yes", "roof"],
}
"""What a model says of each item of the miniatures."""


def pairs_of(publish, name, said):
    file, clips = publish(name)
    rows = find(name).read(file, clips).rows
    return [(item_of(row["item"], row["id"]), text) for row, text in zip(rows, said, strict=True)], rows


def _words(text):
    """The words of a text as the script of MMAU takes them."""
    import re

    return set(re.findall(r"\b\w+\b", text.lower()))


def _by_words(entries, key):
    """MMAU's and MMAR's scripts, in short: right and counted."""
    counted = [one for one in entries if key in one]
    right = 0
    for one in counted:
        answer, said = _words(one["answer"]), _words(one[key])
        others = set().union(*(_words(choice) for choice in one["choices"])) - answer
        right += bool(said) and answer <= said and not said & others
    return right, len(counted)


def _by_letters(lines):
    """The scripts of MMSU and AIR-Bench, in short: right and counted."""
    right = counted = 0
    for one in map(json.loads, lines):
        text = (one["response"] or "").strip().replace("\n", "")
        letter = next((char for char in (text[:1], text[-2:-1]) if char and char in "ABCD"), None)
        if letter and text != "None":
            counted += 1
            right += one[f"choice_{letter.lower()}"] == one["answer_gt"]
    return right, counted


def _by_text(entries):
    """Qwen-Audio's scripts, in short: right and counted."""
    return sum(one["gt"] == one["response"] for one in entries), len(entries)


def recomputed(name, content):
    if name in ("mmau", "mmar"):
        entries = [one for one in json.loads(content) if "answer" in one]
        return _by_words(entries, "model_output" if name == "mmau" else "answer_prediction")
    if name in ("mmsu", "air_bench"):
        return _by_letters(content.decode().splitlines())
    return _by_text(json.loads(content))


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "iemocap"])
@pytest.mark.parametrize("change", ["as said", "first rejected", "last empty", "all empty"])
def test_scores_from_the_official_file(publish, name, change):
    said: list[str | None] = list(SAID[name])
    if change == "first rejected":
        said[0] = None
    elif change == "last empty":
        said[-1] = ""
    elif change == "all empty":
        said = [""] * len(said)
    pairs, _ = pairs_of(publish, name, said)
    benchmark = find(name)
    file, content = benchmark.official(pairs)
    assert file == benchmark.official_file and content == official_predictions(name, pairs)
    right, counted = recomputed(name, content)
    found = benchmark.score(pairs)
    assert found["official"] == {"score": right / counted if counted else None, "n": counted}
    assert found["strict"]["n"] == {"mmau": 2, "mmar": 1, "clotho_aqa": 6}.get(name, len(pairs))
    assert found["strict"]["score"] == right / found["strict"]["n"]


def test_mean_recall_from_the_official_file(publish):
    pairs, _ = pairs_of(publish, "iemocap", SAID["iemocap"])  # angry, neutral, angry
    entries = json.loads(find("iemocap").official(pairs)[1])
    assert [one["gt"] == one["response"] for one in entries] == [True, False, False]
    assert find("iemocap").score(pairs)["official"] == {"score": (1 / 2 + 0) / 2, "n": 3}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_verdicts_with_and_without_the_item(publish, name):
    pairs, rows = pairs_of(publish, name, SAID[name])
    benchmark = find(name)
    for (item, said), row in zip(pairs, rows, strict=True):
        if "answer" in row and name != "clotho_aqa":
            bare = benchmark.is_correct(row["answer"], said, row.get("choices", []))
            assert bare is benchmark.is_correct(row["answer"], said, row.get("choices", []), item)


def test_a_bare_text_becomes_what_the_script_compares(publish):
    (_, (prefixed, _), _), _ = pairs_of(publish, "mmau", SAID["mmau"])
    mmau = json.loads(find("mmau").official([(prefixed, "Sad")])[1])
    assert mmau[0]["model_output"] == mmau[0]["model_prediction"] == "(B) sad"
    assert json.loads(find("mmau").official([(prefixed, "quite sad")])[1])[0]["model_output"] == "quite sad"
    (first, second), _ = pairs_of(publish, "mmsu", ["", ""])

    def responses(*said):
        lines = find("mmsu").official([(first[0], text) for text in said])[1].decode().splitlines()
        return [json.loads(line)["response"] for line in lines]

    assert responses("HAPPY", "Angry.", "B", "B. Happy", "sad or happy", "None") == [
        "B",
        "C",
        "B",
        "B. Happy",
        "sad or happy",
        "D",
    ]
    assert responses("", " \n", None) == [None, None], "null where the script would take the letter before"
    (line,) = find("mmsu").official([(second[0], "A")])[1].decode().splitlines()
    assert json.loads(line)["response"] == "C", "the text of a choice wins over a letter"
    (_, (grounding, _)), _ = pairs_of(publish, "air_bench", ["", ""])
    assert find("air_bench").is_correct("", "0 1", [], grounding) is False
    assert find("air_bench").is_correct("", "[2,3]", [], grounding) is True


def test_two_equal_choices_give_no_letter():
    item = {"choice_a": "yes", "choice_b": "Yes.", "choice_c": "no", "choice_d": None, "answer_gt": "yes"}
    mmsu = find("mmsu")
    assert mmsu.is_correct("", "yes", [], item) and not mmsu.is_correct("", "YES", [], item)


def test_mmau_keeps_items_without_a_prediction_in_their_places(publish):
    pairs, _ = pairs_of(publish, "mmau", ["man", None, "C"])
    entries = json.loads(find("mmau").official(pairs)[1])
    assert [one["id"] for one in entries] == ["u1", "u2", "u3"]
    assert [one.get("model_output") for one in entries] == ["man", None, "C"] and "model_output" not in entries[1]


def test_clotho_aqa_is_one_entry_an_answer(publish):
    pairs, _ = pairs_of(publish, "clotho_aqa", ["yes", None])
    entries = json.loads(find("clotho_aqa").official(pairs)[1])
    assert [(one["gt"], one["response"]) for one in entries] == [("yes", "yes"), ("no", "yes"), ("yes", "yes")]
    assert all(one["source"].startswith("clotho") and one["audio_path"] == "Rain, on tin.wav" for one in entries)
    assert find("clotho_aqa").is_correct("yes", "no", [], pairs[0][0]), "any answer that was given"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_item_of_another_benchmark_is_named(name):
    for item in ({"strange": 1}, {"choices": None, "answers": "yes"}):
        with pytest.raises(KdpipeError, match=f"no item of .*kdpipe benchmark import {name}"):
            find(name).score([(item, "x")])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_predictions_give_an_empty_file(name):
    assert find(name).official([])[1] in (b"[]\n", b"")
