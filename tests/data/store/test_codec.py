"""Codecs of hidden states and their fidelity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.codec import Fidelity, decode_states, encode_states, fit_basis
from kdpipe.data.store.format import STORED_AS, StatesCodec, hidden_specs, is_low_rank

CODECS: tuple[StatesCodec, ...] = ("bfloat16", "float32", "int8", "fp8", "low_rank", "low_rank_int8")


def encoded(states: torch.Tensor, codec: StatesCodec, rank: int = 3) -> dict[str, np.ndarray]:
    """Encoded, with the basis of these states beside, as a part gives it back."""
    if not is_low_rank(codec):
        return encode_states(states, codec)
    basis = fit_basis(states, rank)
    return {**encode_states(states, codec, basis), "basis": basis}


def round_trip(states: torch.Tensor, codec: StatesCodec) -> torch.Tensor:
    return decode_states(encoded(states, codec), codec)


def states(tokens: int = 50, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, width, generator=generator) * torch.logspace(-3, 3, tokens)[:, None]


@pytest.mark.parametrize("codec", CODECS)
def test_encoded_arrays_are_what_the_specifications_say(codec: StatesCodec):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arrays = encoded(states().to(dtype), codec)
        for spec in hidden_specs(3, 64, codec, 3):
            array = arrays.pop(spec.name.removeprefix("hidden/03/"))
            rows = 3 if spec.axis == "part" else 50
            assert array.dtype == STORED_AS[spec.dtype] and array.shape == (rows, *spec.width)
            assert array.flags.c_contiguous
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


def test_fp8_is_within_half_a_step_of_its_four_bits():
    """3 bits after the first: half a step is 2^-4 of the number, and 2^-10 of the scale where numbers are smallest."""
    true = states()
    arrays = encode_states(true, "fp8")
    back = decode_states(arrays, "fp8")
    assert back.dtype == torch.float32 and arrays["states"].dtype == np.uint8
    scale = true.abs().amax(1, keepdim=True) / 448
    np.testing.assert_allclose(arrays["scale"], scale[:, 0].numpy(), rtol=1e-6)
    assert bool(((back - true).abs() <= 1.0001 * torch.maximum(true.abs() / 16, scale / 1024)).all())
    peak = true.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, peak), true.gather(1, peak), rtol=1e-6, atol=0)
    codes = torch.from_numpy(arrays["states"]).view(torch.float8_e4m3fn).float()
    assert bool(torch.isfinite(codes).all()) and float(codes.abs().max()) == 448


def test_low_rank_is_the_projection_on_the_basis():
    true = states()
    basis = torch.from_numpy(fit_basis(true, 20)).float()
    coefficients = true @ basis.T
    back = round_trip_of_rank(true, "low_rank", 20)
    torch.testing.assert_close(back, coefficients.bfloat16().float() @ basis, rtol=1e-5, atol=1e-5)
    error = (back - coefficients @ basis).norm(dim=1)
    assert bool((error <= 2**-8 * coefficients.norm(dim=1)).all()), "beside the projection only bfloat16 is lost"


def test_low_rank_int8_is_within_half_a_step_of_each_coefficient():
    true = states()
    basis = torch.from_numpy(fit_basis(true, 20)).float()
    coefficients = true @ basis.T
    step = coefficients.abs().amax(1, keepdim=True) / 127
    arrays = encoded(true, "low_rank_int8", 20)
    found = torch.from_numpy(arrays["states"]).float() * torch.from_numpy(arrays["scale"])[:, None]
    assert bool(((found - coefficients).abs() <= 0.501 * step).all())
    torch.testing.assert_close(decode_states(arrays, "low_rank_int8"), found @ basis, rtol=1e-5, atol=1e-5)


def round_trip_of_rank(states: torch.Tensor, codec: StatesCodec, rank: int) -> torch.Tensor:
    return decode_states(encoded(states, codec, rank), codec)


@pytest.mark.parametrize("codec", ["low_rank", "low_rank_int8"])
def test_states_of_few_directions_lose_nothing_but_rounding(codec: StatesCodec):
    few = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    true = torch.randn(50, 3, generator=torch.Generator().manual_seed(2)) @ few
    back = round_trip_of_rank(true, codec, 3)
    assert float((back - true).norm() / true.norm()) < 0.01
    assert float(torch.nn.functional.cosine_similarity(back, true).min()) > 0.999


@pytest.mark.parametrize("codec", CODECS)
def test_odd_inputs(codec: StatesCodec):
    assert round_trip(torch.zeros(0, 8), codec).shape == (0, 8)
    zeros = round_trip(torch.zeros(3, 8), codec)
    assert torch.equal(zeros.float(), torch.zeros(3, 8))
    strided = states().T[::2]
    same = round_trip(strided.contiguous(), codec)
    assert torch.equal(round_trip(strided, codec), same)
    tracked = states().requires_grad_()
    assert not round_trip(tracked, codec).requires_grad
    tiny = torch.full((1, 4), 1e-42)
    assert bool(torch.isfinite(round_trip(tiny, codec)).all())
    with pytest.raises(ValueError, match="shape"):
        encode_states(torch.zeros(2, 3, 4), codec)


@pytest.mark.parametrize("codec", CODECS)
def test_a_token_does_not_depend_on_its_neighbours(codec: StatesCodec):
    true = states()
    basis = fit_basis(true, 3)
    whole = encode_states(true, codec, basis)
    apart = [encode_states(rows, codec, basis) for rows in true.split([1, 19, 30])]
    for name, array in whole.items():
        found = np.concatenate([part[name] for part in apart])
        np.testing.assert_allclose(found.astype(np.float64), array.astype(np.float64), rtol=1e-5, atol=1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_states_that_are_not_finite_are_refused(codec: StatesCodec, value: float):
    broken = states()
    broken[7, 3] = value
    with pytest.raises(KdpipeError, match=r"NaN or infinity.*float32"):
        encode_states(broken, codec, np.zeros((3, 64), np.float16))


@pytest.mark.parametrize("codec", ["bfloat16", "low_rank"])
def test_states_that_bfloat16_can_not_hold_are_refused(codec: StatesCodec):
    large = torch.full((2, 4), 3.4e38)
    with pytest.raises(KdpipeError, match=r"too large for bfloat16; set `teachers.states: float32`"):
        encode_states(large, codec, np.full((1, 4), 0.5, np.float16))


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
