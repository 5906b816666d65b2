"""Distributions against float64 over the whole vocabulary."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.cache_teachers import head
from kdpipe.stages.cache_teachers.blocks import block_bounds
from kdpipe.stages.cache_teachers.head import distribution, refuse_nonfinite
from kdpipe.stages.models.vocabulary import Alignment

TEMPERATURES = [0.5, 1.0, 2.0]


def truth(hidden, weight, alignment, bounds, ids):
    """log_z [N, T] and log_tail [N, T, B] in float64."""
    logits = hidden.double() @ weight[: alignment.valid].double().T
    logits[:, list(alignment.masked)] = -torch.inf
    log_z = torch.stack([torch.logsumexp(logits / T, 1) for T in TEMPERATURES], 1)
    left = logits.scatter(1, ids, -torch.inf)
    tails = [torch.stack([torch.logsumexp(left[:, a:b] / T, 1) for a, b in pairwise(bounds)], 1) for T in TEMPERATURES]
    return logits, log_z, torch.stack(tails, 1) - log_z[..., None]


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("blocks", [1, 4])
def test_tails_are_exact_even_for_a_nearly_one_hot_teacher(sharpness, blocks):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 24), torch.randn(1100, 24) * sharpness / 24**0.5
    alignment = Alignment(1000, (5, 700, 701))
    bounds = block_bounds(1000, blocks)
    made = distribution(hidden, weight, k=16, temperatures=TEMPERATURES, bounds=bounds, alignment=alignment, chunk=10)
    logits, log_z, log_tail = truth(hidden, weight, alignment, bounds, made["ids"])
    # The float32 product itself is off by some 1e-6 of the largest logit; what is summed from it adds nothing.
    slack = 1e-6 * float(logits[logits.isfinite()].abs().max()) * 4
    torch.testing.assert_close(made["log_z"].double(), log_z, rtol=1e-5, atol=slack)
    torch.testing.assert_close(made["log_tail"].double().exp(), log_tail.exp(), rtol=1e-4, atol=0)
    top = logits.topk(16, 1)
    assert torch.equal(made["ids"], top.indices)
    torch.testing.assert_close(made["logprob"].double(), top.values - log_z[:, 1:2], rtol=1e-5, atol=slack)
    assert made["log_tail"].shape == (37, 3, blocks)
    mass = made["logprob"].double().exp().sum(1) + made["log_tail"][:, 1].double().exp().sum(1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-5, atol=0)
    if sharpness == 30.0 and blocks == 1:
        # Here `1 - sum(kept)` in float32 has nothing left to say.
        assert float(made["log_tail"][:, 1].min()) < -40


def test_the_whole_vocabulary_leaves_no_tail():
    torch.manual_seed(0)
    alignment = Alignment(40, (3,))
    made = distribution(
        torch.randn(5, 8),
        torch.randn(50, 8),
        k=39,
        temperatures=TEMPERATURES,
        bounds=(0, 40),
        alignment=alignment,
        chunk=2,
    )
    assert (made["log_tail"] == -torch.inf).all()
    assert 3 not in made["ids"] and int(made["ids"].max()) < 40
    torch.testing.assert_close(made["logprob"].exp().sum(1), torch.ones(5))


def test_rows_beyond_the_shared_ids_have_no_say():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8), torch.randn(50, 8)
    loud = weight.clone()
    loud[40:] *= 100
    loud[7] *= 100
    asked = {"k": 5, "temperatures": [1.0], "bounds": (0, 40), "alignment": Alignment(40, (7,)), "chunk": 4}
    for name, value in distribution(hidden, weight, **asked).items():
        assert torch.equal(distribution(hidden, loud, **asked)[name], value)


def test_low_precision_models_give_float32_logits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 64).bfloat16(), (3 * torch.randn(300, 64)).bfloat16()
    alignment = Alignment(300, ())
    made = distribution(hidden, weight, k=8, temperatures=[1.0], bounds=(0, 300), alignment=alignment, chunk=4)
    logits = hidden.double() @ weight.double().T
    torch.testing.assert_close(made["log_z"][:, 0].double(), torch.logsumexp(logits, 1), rtol=1e-6, atol=1e-5)
    assert made["log_z"].dtype == made["logprob"].dtype == torch.float32


def test_no_tensor_of_all_positions_over_the_vocabulary(monkeypatch):
    monkeypatch.setattr(head, "_TILE", 128)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype.is_floating_point:
                sizes.append(out.numel())
            return out

    hidden, weight = torch.randn(64, 8).bfloat16(), torch.randn(2000, 8).bfloat16()
    with Watch():
        distribution(
            hidden, weight, k=4, temperatures=[1.0, 2.0], bounds=(0, 2000), alignment=Alignment(2000, (1,)), chunk=5
        )
    # Nothing exceeds one chunk of 5 positions, in tiles that are filled up.
    assert max(sizes) == 5 * 2016


def test_a_nan_is_an_error():
    hidden = torch.full((1, 4), torch.nan)
    asked = {"k": 1, "temperatures": [1.0], "bounds": (0, 9), "alignment": Alignment(9, ()), "chunk": 1}
    made = distribution(hidden, torch.ones(9, 4), draws=2, uniforms=torch.zeros(1, 1), **asked)
    assert -1 <= int(made["draws"].min()) <= int(made["draws"].max()) < 9
    with pytest.raises(KdpipeError, match="NaN or infinity"):
        refuse_nonfinite(made["log_z"].numpy())


def test_no_positions():
    made = distribution(
        torch.empty(0, 4), torch.ones(9, 4), k=2, temperatures=[1.0], bounds=(0, 9), alignment=Alignment(9, ()), chunk=3
    )
    assert made["ids"].shape == (0, 2) and made["log_tail"].shape == (0, 1, 1)


def test_block_bounds_are_classes_of_frequency():
    assert block_bounds(151_936, 1) == (0, 151_936)
    assert block_bounds(151_936, 4) == (0, 256, 2151, 18080, 151_936)
    many = block_bounds(151_936, 16)
    assert len(many) == 17 and many[-1] == 151_936
    assert many[1] == block_bounds(151_936, 32)[1] == 256, "the bytes stay together, however many blocks there are"
    assert all(high <= 1.6 * low for low, high in pairwise(many[2:]))
    assert len(block_bounds(487, 16)) == 17
    with pytest.raises(KdpipeError, match="tail_blocks: 12 is too many for 20 shared ids"):
        block_bounds(20, 12)
    with pytest.raises(KdpipeError, match="is too many for 20 shared ids"):
        block_bounds(20, 10**12)


@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("left", [1e-7, 1e-12, 1e-30])
def test_the_tail_of_a_teacher_that_keeps_nearly_all_its_mass(k, left):
    """Kept mass 1e-7 below one, and exactly one in float32; with a single entry, and with 16."""
    rows, vocabulary, alignment = 33, 5000, Alignment(5000, (9,))
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 24, generator=generator), torch.randn(vocabulary, 24, generator=generator)
    favourite = torch.stack([10 + torch.randperm(4000, generator=generator)[:k] for _ in range(rows)])
    # A column of its own for each row, which raises its favourites until the others have the mass asked for.
    others = (hidden.double() @ weight.double().T / 4).scatter(1, favourite, -torch.inf)
    others[:, 9] = -torch.inf
    spread = torch.rand(rows, k, dtype=torch.float64, generator=generator)
    raised = torch.logsumexp(others, 1, True) - torch.logsumexp(spread, 1, True) + spread - math.log(left)
    raised = raised - (hidden.double() @ weight.double().T / 4).gather(1, favourite)
    hidden, weight = torch.cat([hidden, torch.eye(rows)], 1), torch.cat([weight / 4, torch.zeros(vocabulary, rows)], 1)
    weight[favourite, 24 + torch.arange(rows)[:, None]] = raised.float()
    made = distribution(
        hidden, weight, k=k, temperatures=TEMPERATURES, bounds=(0, vocabulary), alignment=alignment, chunk=10
    )
    assert torch.equal(made["ids"].sort(1).values, favourite.sort(1).values)
    _, _, log_tail = truth(hidden, weight, alignment, (0, vocabulary), made["ids"])
    tail = log_tail[:, 1, 0].exp()
    torch.testing.assert_close(tail, torch.full_like(tail, left), rtol=1e-3, atol=0)
    assert bool(((1 - tail).float() == 1).all()) == (left < 3e-8)
    relative = (made["log_tail"].double() - log_tail).expm1().abs().amax((0, 2))
    assert float(relative.max()) < 1e-4
