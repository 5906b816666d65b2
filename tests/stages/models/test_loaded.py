"""Hidden states, layers and head of the real classes."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdpipe.data.errors import KdpipeError, ModelError
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.inputs import Encoder, Example
from kdpipe.stages.models.loaded import load_model, pick_device

NAMES = ("teacher", "qwen2_audio", "qwen2_5_omni")


@pytest.fixture(scope="module", autouse=True)
def threads():
    torch.set_num_threads(2)


def folder_of(path, base, dtype="float32"):
    return resolve(ModelConfig(str(path), dtype=dtype), base)


@pytest.fixture(scope="module", params=NAMES)
def pair(request, family, tmp_path_factory):
    folder = folder_of(getattr(family, request.param), tmp_path_factory.mktemp("base"))
    return Encoder(folder), load_model(folder, device="cpu")


def examples(encoder, lengths=((4000, "yes"), (20000, "a much longer answer than the other"))):
    made = []
    for place, (frames, response) in enumerate(lengths):
        clips = []
        if encoder.folder.hears:
            clips = [np.random.default_rng(place).normal(0, 0.1, frames).astype(np.float32)]
        prompt = encoder.prompt_text(f"Question number {place}?", clips=len(clips))
        ids = encoder.prompt_ids(prompt, [len(clip) for clip in clips])
        made.append(Example(str(place), ids, encoder.target_ids(response), encoder.features(clips)))
    return made


def test_hidden_times_head_equals_the_models_logits(pair):
    encoder, loaded = pair
    batch = encoder.collate(examples(encoder))
    with torch.no_grad():
        hidden = loaded.hidden(batch)
        logits = loaded.model(**batch.forward, use_cache=False).logits
    assert hidden.shape == (2, batch.input_ids.shape[1], loaded.width)
    assert loaded.head_weight.shape == (loaded.folder.head_rows, loaded.width)
    assert len(loaded.layers) == loaded.folder.layers
    real = batch.attention_mask.bool()
    torch.testing.assert_close(hidden[real] @ loaded.head_weight.T, logits[real], rtol=1e-5, atol=1e-5)


def test_no_tensor_over_the_vocabulary_is_made(pair):
    from torch.utils._python_dispatch import TorchDispatchMode

    encoder, loaded = pair
    widths = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim and func is not torch.ops.aten.t.default:
                widths.add(out.shape[-1])
            return out

    with Watch(), torch.no_grad():
        loaded.hidden(encoder.collate(examples(encoder)))
    assert loaded.width in widths
    assert loaded.folder.head_rows not in widths


def test_padding_changes_nothing(pair):
    encoder, loaded = pair
    items = examples(encoder)
    both = encoder.collate(items)
    layers = [1, len(loaded.layers)]
    with torch.no_grad():
        with loaded.capture(layers) as inside:
            together = loaded.hidden(both)
        for place, item in enumerate(items):
            with loaded.capture(layers) as alone:
                single = loaded.hidden(encoder.collate([item]))
            torch.testing.assert_close(together[place, : item.length], single[0], rtol=1e-4, atol=1e-5)
            for layer in layers:
                torch.testing.assert_close(inside[layer][place, : item.length], alone[layer][0], rtol=1e-4, atol=1e-5)


def test_captured_layers_are_those_of_transformers(pair):
    encoder, loaded = pair
    batch = encoder.collate(examples(encoder))
    layers = range(1, len(loaded.layers) + 1)
    with torch.no_grad():
        with loaded.capture(layers) as states, loaded.capture([2], rows=batch.response_rows) as chosen:
            hidden = loaded.hidden(batch)
        theirs = loaded.model(**batch.forward, use_cache=False, output_hidden_states=True).hidden_states
    assert sorted(states) == list(layers)
    for layer in list(layers)[:-1]:
        torch.testing.assert_close(states[layer], theirs[layer], rtol=0, atol=0)
    torch.testing.assert_close(loaded.final_norm(states[len(loaded.layers)]), hidden)
    assert torch.equal(chosen[2], states[2].flatten(0, 1)[batch.response_rows])


def test_an_unknown_layer_is_refused_and_hooks_are_removed(pair):
    _, loaded = pair
    before = [len(layer._forward_hooks) for layer in loaded.layers]
    missing = f"has no layer 99: its layers are 1 to {len(loaded.layers)}"
    with pytest.raises(KdpipeError, match=missing), loaded.capture([99]):
        pass
    with pytest.raises(RuntimeError), loaded.capture([1]):
        raise RuntimeError
    assert [len(layer._forward_hooks) for layer in loaded.layers] == before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_through_the_models_own_logits(name, checkpointing, family, tmp_path):
    folder = folder_of(getattr(family, name), tmp_path)
    encoder, loaded = Encoder(folder), load_model(folder, device="cpu", train=True)
    batch = encoder.collate(examples(encoder))
    layers = [1, 2]

    def backward(use_logits):
        loaded.model.zero_grad()
        with loaded.capture(layers, rows=batch.response_rows) as states:
            if use_logits:
                logits = loaded.model(**batch.forward, use_cache=False).logits.flatten(0, 1)[batch.response_rows]
            else:
                logits = loaded.hidden(batch).flatten(0, 1)[batch.response_rows] @ loaded.head_weight.T
        lens = sum((loaded.final_norm(states[layer]) @ loaded.head_weight.T).square().mean() for layer in layers)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets) + lens
        loss.backward()
        grads = {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}
        return loss.detach(), grads

    expected_loss, expected = backward(True)
    if checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, found = backward(False)
    torch.testing.assert_close(loss, expected_loss)
    assert set(found) == set(expected) and len(found) > 20
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6)


def test_tied_embeddings(family, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tied = tmp_path / "tied"
    shutil.copytree(family.teacher, tied)
    config = Qwen3Config.from_pretrained(tied)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tied)
    folder = folder_of(tied, tmp_path)
    encoder, loaded = Encoder(folder), load_model(folder, device="cpu", train=True)
    assert loaded.head_weight is loaded.model.get_input_embeddings().weight
    batch = encoder.collate(examples(encoder))
    logits = loaded.hidden(batch).flatten(0, 1)[batch.response_rows] @ loaded.head_weight.T
    torch.nn.functional.cross_entropy(logits, batch.targets).backward()
    found = loaded.head_weight.grad.clone()
    loaded.model.zero_grad()
    own = loaded.model(**batch.forward).logits.flatten(0, 1)[batch.response_rows]
    torch.nn.functional.cross_entropy(own, batch.targets).backward()
    torch.testing.assert_close(found, loaded.head_weight.grad)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name, family, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        folder = folder_of(getattr(family, name), tmp_path, dtype=dtype)
        encoder, loaded = Encoder(folder), load_model(folder, device="cpu")
        batch = encoder.collate(examples(encoder))
        with torch.no_grad():
            found[dtype] = loaded.hidden(batch).flatten(0, 1)[batch.response_rows]
    assert found["bfloat16"].dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(found["bfloat16"].float(), found["float32"], dim=1)
    assert float(cosine.min()) > 0.99


def test_loading_freezes_unless_training(family, tmp_path):
    folder = folder_of(family.qwen2_audio, tmp_path, dtype="bfloat16")
    frozen = load_model(folder, device="cpu")
    assert not any(p.requires_grad for p in frozen.model.parameters()) and not frozen.model.training
    assert frozen.head_weight.dtype == torch.bfloat16
    assert frozen.model.config._attn_implementation == "sdpa"
    trained = load_model(folder, device="cpu", dtype=torch.float32, train=True)
    assert trained.model.training and trained.head_weight.requires_grad
    assert trained.head_weight.dtype == torch.float32
    assert not trained.model.model.audio_tower.embed_positions.weight.requires_grad


def test_missing_weights_are_an_error_not_a_random_start(family, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(family.teacher, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if "layers.3.mlp.up_proj" in name)
    del weights[name]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*layers\.3\.mlp\.up_proj"):
        load_model(folder_of(broken, tmp_path), device="cpu")


def test_pickled_weights_are_never_read(family, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(family.teacher, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder_of(pickled, tmp_path), device="cpu")


def test_a_model_that_caps_its_logits_is_refused(family, tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    capped = tmp_path / "capped"
    shutil.copytree(family.teacher, capped)
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=480, final_logit_softcapping=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(capped)
    with pytest.raises(ModelError, match="scales or caps its logits"):
        load_model(folder_of(capped, tmp_path), device="cpu")


def test_pick_device():
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(KdpipeError, match="torch sees no GPU"):
            pick_device("cuda")
