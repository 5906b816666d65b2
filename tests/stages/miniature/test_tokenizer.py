"""The trained BPE: shared ordinary ids, colliding special ids, nothing lost on the way through."""

import pytest

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.miniature import models, tokenizer, world


@pytest.fixture(scope="module")
def pair():
    return models.make_tokenizers(seed=0)


def test_ordinary_ids_come_first_and_are_shared(pair) -> None:
    text, audio = (made.get_vocab() for made in pair)
    ordinary = {token: index for token, index in text.items() if index < models.BPE_SIZE}
    assert sorted(ordinary.values()) == list(range(models.BPE_SIZE))
    assert ordinary == {token: index for token, index in audio.items() if index < models.BPE_SIZE}


def test_special_ids_collide_as_in_the_qwen_family(pair) -> None:
    text, audio = pair
    base = models.BPE_SIZE
    assert [text.convert_ids_to_tokens(base + offset) for offset in range(6)] == [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    ]
    assert [audio.convert_ids_to_tokens(base + offset) for offset in range(6)] == [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    ]
    assert len(text) != len(audio)


def test_tags_are_plain_text_and_common_ones_are_merged(pair) -> None:
    for made in pair:
        ids = made("<THINK><PLANNING>Count the tones.</PLANNING>")["input_ids"]
        assert max(ids) < models.BPE_SIZE
        assert len(ids) <= 12
        assert "PLANNING" in made.get_vocab()


def test_every_digit_stands_alone(pair) -> None:
    assert pair[0].tokenize("2025") == ["2", "0", "2", "5"]


def test_any_text_survives(pair) -> None:
    sentence = "Naïve 音 <|AUDIO|>\n\ttwo  spaces, 𝄞!"
    for made in pair:
        assert made.decode(made(sentence)["input_ids"]) == sentence


def test_special_tokens_have_names_where_they_exist(pair) -> None:
    text, audio = pair
    assert audio.audio_token == "<|AUDIO|>"
    assert audio.video_token == "<|VIDEO|>"
    assert not hasattr(text, "audio_token")
    assert (text.eos_token, text.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_give_the_same_size(seed: int) -> None:
    made = tokenizer.train_tokenizer(world.texts(300, seed=seed), models.BPE_SIZE, tokenizer.TEXT_SPECIALS)
    assert len(made) == models.BPE_SIZE + len(tokenizer.TEXT_SPECIALS)


def test_too_few_texts_are_an_error_that_says_so() -> None:
    with pytest.raises(KdpipeError, match="not 400"):
        tokenizer.train_tokenizer(["la la la"], 400, tokenizer.TEXT_SPECIALS)
