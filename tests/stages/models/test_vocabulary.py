"""Which ids two tokenizers share."""

import json

import pytest

from kdpipe.data.errors import ModelError, VocabularyError
from kdpipe.stages.models.vocabulary import Vocabulary, align, load_vocabulary


def vocabulary(name, tokens, special=()):
    return Vocabulary(name, dict(enumerate(tokens)), frozenset(special))


def test_the_first_differing_ordinary_id_is_named():
    ours = vocabulary("student", ["a", "b", "c", "d"])
    theirs = vocabulary("teacher", ["a", "b", "x", "y"])
    with pytest.raises(VocabularyError, match=r"teacher and student have .* id 2 is 'x' in the teacher and 'c' in the"):
        align(ours, theirs, 4, 4)


def test_colliding_special_ids_are_masked_and_shared_ones_are_not():
    ours = vocabulary("student", ["a", "b", "<end>", "<audio>", "<last>"], {2, 3, 4})
    theirs = vocabulary("teacher", ["a", "b", "<end>", "<box>", "<last>"], {2, 3, 4})
    found = align(ours, theirs, 8, 6)
    assert (found.valid, found.masked) == (5, (3,))


def test_an_id_that_is_special_in_one_model_only_is_masked():
    ours = vocabulary("student", ["a", "b", "c"])
    theirs = vocabulary("teacher", ["a", "<x>", "c"], {1})
    assert align(ours, theirs, 3, 3).masked == (1,)


def test_padding_rows_and_ids_of_one_model_are_left_out():
    ours = vocabulary("student", ["a", "b", "c", "d"])
    theirs = vocabulary("teacher", ["a", "b", "c", "d", "e"])
    assert align(ours, theirs, 100, 200).valid == 4
    # A head with fewer rows than the tokenizer has ids cannot score the rest.
    assert align(ours, theirs, 3, 200).valid == 3


def test_holes_are_masked():
    ours = Vocabulary("student", {0: "a", 2: "c"}, frozenset())
    assert align(ours, vocabulary("teacher", ["a", "b", "c"]), 3, 3).masked == (1,)


def test_nothing_in_common():
    with pytest.raises(VocabularyError, match="share no token ids"):
        align(vocabulary("s", ["<a>"], {0}), vocabulary("t", ["<b>"], {0}), 1, 1)


def test_the_miniatures_collide_as_the_qwen_family_does(family):
    from transformers import AutoTokenizer

    text, audio = (load_vocabulary(path, path.name) for path in (family.teacher, family.qwen2_audio))
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (family.teacher, family.qwen2_audio))
    assert dict(text.tokens) == {i: t for t, i in theirs.get_vocab().items()}
    assert set(text.special) == set(theirs.added_tokens_decoder)
    index = ours.convert_tokens_to_ids("<|AUDIO|>")
    assert theirs.convert_ids_to_tokens(index) == "<|object_ref_start|>"
    found = align(audio, text, 10_000, 10_000)
    assert index in found.masked
    assert ours.convert_tokens_to_ids("<|im_end|>") not in found.masked
    assert set(found.masked) <= audio.special
    assert all(found.valid <= len(tokenizer) for tokenizer in (ours, theirs))


def test_older_folders_with_vocab_json(family, tmp_path):
    from transformers import AutoTokenizer

    new = load_vocabulary(family.teacher, "new")
    tokenizer = AutoTokenizer.from_pretrained(family.teacher)
    ordinary = {token: index for index, token in new.tokens.items() if index not in new.special}
    (tmp_path / "vocab.json").write_text(json.dumps(ordinary))
    decoder = {str(index): {"content": str(token)} for index, token in tokenizer.added_tokens_decoder.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    old = load_vocabulary(tmp_path, "old")
    assert dict(old.tokens) == dict(new.tokens) and old.special == new.special


def test_missing_and_torn_files(tmp_path):
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_vocabulary(tmp_path, "x")
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(ModelError, match="cannot be read"):
        load_vocabulary(tmp_path, "x")


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"model": {"vocab": {"a": "x"}}},
        {"model": {"vocab": [1]}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0, "content": None}]},
    ],
)
def test_tokenizer_files_of_other_types_are_errors_of_the_model(tmp_path, document):
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"the tokenizer files in .* cannot be read"):
        load_vocabulary(tmp_path, "student")
