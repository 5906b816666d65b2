"""Codecs of hidden states and their fidelity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.codec import Fidelity, decode_states, encode_states
from kdpipe.data.store.format import STORED_AS, StatesCodec, hidden_specs

CODECS: tuple[StatesCodec, ...] = ("bfloat16", "float32", "int8")


def states(tokens: int = 50, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, width, generator=generator) * torch.logspace(-3, 3, tokens)[:, None]


@pytest.mark.parametrize("codec", CODECS)
def test_encoded_arrays_are_what_the_specifications_say(codec: StatesCodec):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arrays = encode_states(states().to(dtype), codec)
        for spec in hidden_specs(3, 64, codec):
            array = arrays.pop(spec.name.removeprefix("hidden/03/"))
            assert array.dtype == STORED_AS[spec.dtype] and array.shape == (50, *spec.width)
        assert not arrays


def test_float32_is_exact_and_bfloat16_is_the_rounding():
    true = states()
    assert torch.equal(decode_states(encode_states(true, "float32"), "float32"), true)
    back = decode_states(encode_states(true, "bfloat16"), "bfloat16")
    assert back.dtype == torch.bfloat16 and torch.equal(back, true.bfloat16())
    assert torch.equal(decode_states(encode_states(true.bfloat16(), "bfloat16"), "bfloat16"), true.bfloat16())


def test_int8_is_within_half_a_step_of_each_token():
    true = states()
    arrays = encode_states(true, "int8")
    back = decode_states(arrays, "int8")
    assert back.dtype == torch.float32
    step = true.abs().amax(1, keepdim=True) / 127
    assert bool(((back - true).abs() <= 0.5001 * step).all())
    assert int(np.abs(arrays["states"].astype(int)).max()) == 127
    np.testing.assert_allclose(arrays["scale"], step[:, 0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_odd_inputs(codec: StatesCodec):
    assert decode_states(encode_states(torch.zeros(0, 8), codec), codec).shape == (0, 8)
    zeros = decode_states(encode_states(torch.zeros(3, 8), codec), codec)
    assert torch.equal(zeros.float(), torch.zeros(3, 8))
    strided = states().T[::2]
    same = decode_states(encode_states(strided.contiguous(), codec), codec)
    assert torch.equal(decode_states(encode_states(strided, codec), codec), same)
    tracked = states().requires_grad_()
    assert not decode_states(encode_states(tracked, codec), codec).requires_grad
    tiny = torch.full((1, 4), 1e-42)
    assert bool(torch.isfinite(decode_states(encode_states(tiny, codec), codec)).all())
    with pytest.raises(ValueError, match="shape"):
        encode_states(torch.zeros(2, 3, 4), codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_states_that_are_not_finite_are_refused(codec: StatesCodec, value: float):
    broken = states()
    broken[7, 3] = value
    with pytest.raises(KdpipeError, match=r"NaN or infinity.*float32"):
        encode_states(broken, codec)


def test_unknown_codecs_are_refused():
    with pytest.raises(ValueError, match="unknown codec 'fp4'"):
        encode_states(states(), "fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown codec 'fp4'"):
        decode_states({"states": np.zeros((1, 1))}, "fp4")  # type: ignore[arg-type]


def test_fidelity_is_the_definition_whatever_the_batches():
    true = states()
    decoded = decode_states(encode_states(true, "int8"), "int8")
    cosine = torch.nn.functional.cosine_similarity(true.double(), decoded.double(), dim=1)
    expected = {
        "tokens": 50,
        "cosine_mean": float(cosine.mean()),
        "cosine_worst": float(cosine.min()),
        "relative_error": float((decoded.double() - true.double()).norm() / true.double().norm()),
    }
    for cuts in ([50], [1, 49], [7, 0, 23, 20]):
        fidelity = Fidelity()
        for a, b in zip(true.split(cuts), decoded.split(cuts), strict=True):
            fidelity.update(a, b)
        assert fidelity.result() == pytest.approx(expected, rel=1e-12)
    assert 0.999 < expected["cosine_worst"] < 1


def test_fidelity_of_what_has_no_angle():
    fidelity = Fidelity()
    assert fidelity.result() == {"tokens": 0, "cosine_mean": 1.0, "cosine_worst": 1.0, "relative_error": 0.0}
    fidelity.update(torch.zeros(2, 4), torch.zeros(2, 4))
    assert fidelity.result() == {"tokens": 2, "cosine_mean": 1.0, "cosine_worst": 1.0, "relative_error": 0.0}
    fidelity.update(torch.ones(2, 4), torch.zeros(2, 4))
    assert fidelity.result() == {"tokens": 4, "cosine_mean": 0.5, "cosine_worst": 0.0, "relative_error": 1.0}
    with pytest.raises(ValueError, match="differ"):
        fidelity.update(torch.zeros(2, 4), torch.zeros(2, 3))
