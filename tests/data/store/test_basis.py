"""The basis of a layer: orthonormal, the best of its rank, the same each time."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.codec import fit_basis


def states(count: int = 200, width: int = 24, seed: int = 0) -> torch.Tensor:
    """Some directions matter far more than others, and lengths differ by a factor of 100."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    spread = torch.randn(count, width, generator=generator) * 0.8 ** torch.arange(width)
    return spread @ turned * torch.logspace(-1, 1, count)[:, None]


def mean_squared_cosine(states: torch.Tensor, basis: torch.Tensor) -> float:
    """What is left of a state's direction after the projection, over all states; float64."""
    rows = states.double() / states.double().norm(dim=1, keepdim=True)
    return float((rows @ basis.double().T).square().sum(1).mean())


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_its_rows_are_orthonormal(rank: int):
    basis = fit_basis(states(), rank)
    assert basis.shape == (rank, 24) and basis.dtype == np.float16
    rows = basis.astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(rank), atol=2e-3)
    peaks = np.abs(rows).argmax(1)
    assert (rows[np.arange(rank), peaks] > 0).all(), "the sign is settled"


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_no_basis_of_its_rank_keeps_more(rank: int):
    """The right singular vectors of the normalized states are the best there are."""
    true = states()
    rows = true.double() / true.double().norm(dim=1, keepdim=True)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    basis = torch.from_numpy(fit_basis(true, rank))
    kept = mean_squared_cosine(true, basis)
    assert kept == pytest.approx(float(values[:rank].square().sum()) / len(true), rel=2e-3)
    assert kept == pytest.approx(mean_squared_cosine(true, vectors[:rank]), rel=2e-3)
    overlap = (basis.double() @ vectors[:rank].T).square().sum()
    assert float(overlap) == pytest.approx(rank, rel=2e-3)
    for seed in range(5):
        other = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(seed))).Q[:rank]
        assert mean_squared_cosine(true, other) < kept


def test_the_direction_that_matters_most_comes_first():
    true = states()
    basis = torch.from_numpy(fit_basis(true, 24))
    shares = [mean_squared_cosine(true, basis[[row]]) for row in range(24)]
    assert all(a >= b - 1e-4 for a, b in pairwise(shares))
    assert sum(shares) == pytest.approx(1, rel=2e-3)


def test_long_states_have_no_more_say_than_short_ones():
    true = states()
    order = torch.randperm(len(true), generator=torch.Generator().manual_seed(1))
    scaled = true * torch.logspace(-6, 6, len(true))[order, None]
    np.testing.assert_allclose(fit_basis(scaled, 4).astype(float), fit_basis(true, 4).astype(float), atol=2e-3)


def test_the_same_states_give_the_same_bytes():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        first = fit_basis(states().to(dtype), 6)
        assert first.tobytes() == fit_basis(states().to(dtype), 6).tobytes()
        strided = states().to(dtype).T.contiguous().T.requires_grad_()
        np.testing.assert_allclose(fit_basis(strided, 6).astype(float), first.astype(float), atol=2e-3)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_states_than_rank_are_kept_whole(count: int):
    true = states(count)
    basis = fit_basis(true, 4)
    rows = basis.astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=2e-3)
    if count:
        assert mean_squared_cosine(true, torch.from_numpy(basis)) == pytest.approx(1, rel=2e-3)


def test_states_of_zeros_say_nothing():
    true = states(50)
    with_zeros = torch.cat([true, torch.zeros(7, 24)])
    np.testing.assert_allclose(fit_basis(with_zeros, 3).astype(float), fit_basis(true, 3).astype(float), atol=2e-3)
    assert np.isfinite(fit_basis(torch.zeros(5, 24), 3)).all()


def test_a_rank_above_the_width_is_refused():
    assert fit_basis(states(), 24).shape == (24, 24)
    with pytest.raises(KdpipeError, match=r"teachers\.rank: 25 is more than the width of the model, 24"):
        fit_basis(states(), 25)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused(value: float):
    broken = states()
    broken[3, 2] = value
    with pytest.raises(KdpipeError, match="NaN or infinity"):
        fit_basis(broken, 3)
