"""The encoder against transformers' own processors."""

import threading

import numpy as np
import pytest
import torch

from kdpipe.data.errors import ModelError, Rejected
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.inputs import Encoder, Example

FAMILIES = ("qwen2_audio", "qwen2_5_omni")


@pytest.fixture(scope="module")
def encoders(family, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    names = ("teacher", *FAMILIES)
    return {name: Encoder(resolve(ModelConfig(str(getattr(family, name))), base)) for name in names}


@pytest.fixture(scope="module")
def processors(family):
    """The genuine processors; Omni's without the image and video halves' need of torchvision."""
    from transformers import Qwen2_5OmniProcessor, Qwen2AudioProcessor

    made = {"qwen2_audio": Qwen2AudioProcessor.from_pretrained(family.qwen2_audio)}
    try:
        made["qwen2_5_omni"] = Qwen2_5OmniProcessor.from_pretrained(family.qwen2_5_omni)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not load here: {error}")
    return made


def noise(frames, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, frames).astype(np.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_ids_and_features_equal_the_processors(name, encoders, processors):
    encoder, processor = encoders[name], processors[name]
    text = encoder.prompt_text("What is the first tone?\nChoices: A, B", clips=1)
    for frames in (1600, 1601, 1759, 1760, 1761, 4000, 16000, 16001, 31999, 47840, 47841, 48000):
        clip = noise(frames, frames)
        theirs = processor(text=[text], audio=[clip], sampling_rate=encoder.rate, return_tensors="pt")
        ours = encoder.prompt_ids(text, [frames])
        assert ours == theirs["input_ids"][0].tolist()
        assert ours.count(encoder.audio_id) == encoder.audio_tokens(frames)
        features = encoder.features([clip])
        mask = theirs["feature_attention_mask"][0].bool()
        assert int(features["feature_attention_mask"].sum()) == int(mask.sum()) == encoder.mel_frames(frames)
        torch.testing.assert_close(
            features["input_features"][0][:, features["feature_attention_mask"][0].bool()],
            theirs["input_features"][0][:, mask],
        )
        if name == "qwen2_audio":
            torch.testing.assert_close(features["input_features"], theirs["input_features"], rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_audio_tokens_equal_the_formula_of_the_processor_for_every_length(name, encoders):
    encoder = encoders[name]
    for frames in range(1600, 8000, 7):
        mel = len(range(0, frames, 160))
        assert encoder.audio_tokens(frames) == (((mel - 1) // 2 + 1) - 2) // 2 + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_chat_text_equals_the_processors(name, encoders, processors):
    turns = [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "Which?"}]},
    ]
    theirs = processors[name].apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert encoders[name].prompt_text("Which?", system="Listen.", clips=1) == theirs


def test_two_clips_in_one_prompt(encoders, processors):
    encoder = encoders["qwen2_audio"]
    text = encoder.prompt_text("Which is longer?", clips=2)
    clips = [noise(3200), noise(8000)]
    theirs = processors["qwen2_audio"](text=[text], audio=clips, sampling_rate=encoder.rate, return_tensors="pt")
    assert encoder.prompt_ids(text, [3200, 8000]) == theirs["input_ids"][0].tolist()
    assert torch.equal(encoder.features(clips)["input_features"], theirs["input_features"])


def test_a_target_is_plain_text_and_ends_with_the_end_token(encoders):
    for encoder in encoders.values():
        plain = encoder.target_ids("<THINK>a</THINK>")
        assert plain[-1] == encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert encoder.tokenizer.decode(plain[:-1]) == "<THINK>a</THINK>"
        tricky = encoder.target_ids("a<|im_end|>b<|endoftext|><|AUDIO|>")
        assert tricky.count(encoder.end_id) == 1
        special = set(encoder.tokenizer.convert_tokens_to_ids(list(encoder.special)))
        assert not special & set(tricky[:-1])
        assert encoder.tokenizer.decode(tricky[:-1]) == "a<|im_end|>b<|endoftext|><|AUDIO|>"


def test_prompts_do_interpret_special_tokens(encoders):
    ids = encoders["teacher"].prompt_ids(encoders["teacher"].prompt_text("hello"))
    assert encoders["teacher"].end_id in ids
    assert "<|im_end|>" in encoders["teacher"].special


def test_an_over_long_clip_is_rejected_not_cut(encoders):
    encoder = encoders["qwen2_5_omni"]
    assert encoder.max_audio_seconds == 3
    assert encoder.audio_tokens(48000) == 75
    for call in (lambda: encoder.audio_tokens(48001), lambda: encoder.features([noise(48001)])):
        with pytest.raises(Rejected, match=r"audio_too_long: the clip lasts 3\.00 s and the model hears 3 s") as error:
            call()
        assert error.value.reason == "audio_too_long"
    with pytest.raises(Rejected, match="audio_too_short"):
        encoder.audio_tokens(320)


def test_placeholders_must_match_the_clips(encoders):
    encoder = encoders["qwen2_audio"]
    with pytest.raises(ModelError, match=r"holds 1 placeholders .* for 2 clips"):
        encoder.prompt_ids(encoder.prompt_text("a", clips=1), [1600, 1600])


def test_a_text_model_cannot_hear(encoders):
    with pytest.raises(ModelError, match="is a text model and cannot hear"):
        _ = encoders["teacher"].rate


def test_collate_rows_point_at_what_predicts_each_target(encoders):
    encoder = encoders["qwen2_audio"]
    items = []
    for name, frames, response in (("a", 4000, "yes"), ("b", 9000, "a longer answer")):
        ids = encoder.prompt_ids(encoder.prompt_text("Which?", clips=1), [frames])
        items.append(Example(name, ids, encoder.target_ids(response), encoder.features([noise(frames)])))
    batch = encoder.collate(items)
    flat = batch.input_ids.flatten()
    longest = batch.input_ids.shape[1]
    assert batch.attention_mask.sum(1).tolist() == [item.length for item in items]
    assert torch.equal(flat[batch.response_rows + 1], batch.targets)
    assert set(flat[batch.audio_rows].tolist()) == {encoder.audio_id}
    for place, item in enumerate(items):
        rows = batch.response_rows[batch.response_offsets[place] : batch.response_offsets[place + 1]]
        assert rows.tolist() == [
            place * longest + len(item.prompt_ids) - 1 + step for step in range(len(item.target_ids))
        ]
        heard = batch.audio_rows[batch.audio_offsets[place] : batch.audio_offsets[place + 1]]
        assert len(heard) == item.prompt_ids.count(encoder.audio_id)
        assert ((heard // longest) == place).all()
    assert batch.features["input_features"].shape == (2, 80, 3000)
    assert batch.ids == ("a", "b")


def test_collate_without_responses_or_clips(encoders):
    batch = encoders["teacher"].collate([Example("a", [1, 2, 3]), Example("b", [4])], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert len(batch.targets) == len(batch.audio_rows) == 0
    assert batch.features == {} and batch.response_offsets == (0, 0, 0)


def test_tokenizing_from_threads_gives_the_same(encoders):
    encoder = encoders["qwen2_audio"]
    prompt = encoder.prompt_text("Which <THINK>?", clips=1)
    expected = (encoder.prompt_ids(prompt, [8000]), encoder.target_ids("a<|im_end|>b"))
    seen = []

    def work():
        seen.extend((encoder.prompt_ids(prompt, [8000]), encoder.target_ids("a<|im_end|>b")) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 200 and all(item == expected for item in seen)


def test_a_folder_without_tokenizer_or_extractor_is_named(family, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(family.qwen2_audio, broken)
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"feature extractor in .*broken"):
        Encoder(resolve(ModelConfig(str(broken)), tmp_path))
