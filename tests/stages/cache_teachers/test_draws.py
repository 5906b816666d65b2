"""Draws from the tail: which ids come up how often, and what they depend on."""

import numpy as np
import pytest
import torch

from kdpipe.stages.cache_teachers import draws as module
from kdpipe.stages.cache_teachers.draws import systematic_draws, uniforms
from kdpipe.stages.cache_teachers.head import distribution
from kdpipe.stages.config import LayersConfig, WeightsConfig
from kdpipe.stages.models.vocabulary import Alignment
from kdpipe.stages.train.losses import sampled_cross_entropy

VALID, MASKED, K = 60, (3, 17, 40), 6
TEMPERATURES = [1.0, 2.0]


def cached(hidden, weight, numbers, draws, *, k=K, chunk=1000, **more):
    return distribution(
        hidden,
        weight,
        k=k,
        temperatures=TEMPERATURES,
        bounds=(0, VALID),
        alignment=Alignment(VALID, MASKED),
        chunk=chunk,
        draws=draws,
        uniforms=numbers,
        **more,
    )


def tail_of(logits, ids, temperature):
    """Distribution over the tail alone [V], in float64."""
    left = logits[:VALID].double().clone()
    left[list(MASKED)] = -torch.inf
    left[ids] = -torch.inf
    return torch.softmax(left / temperature, 0)


def one_row(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 8, generator=generator, dtype=dtype)
    weight = 1.2 * torch.randn(VALID + 10, 8, generator=generator, dtype=dtype)
    return hidden, weight


@pytest.mark.parametrize("draws", [1, 3, 16])
def test_draws_have_the_distribution_of_the_tail(draws):
    hidden, weight = one_row()
    rows = 6000
    numbers = torch.from_numpy(uniforms("sample", "top", rows, TEMPERATURES))
    made = cached(hidden.expand(rows, -1), weight, numbers, draws)
    assert made["draws"].shape == (rows, 2, draws) and made["draws"].dtype == torch.int64
    for column, temperature in enumerate(TEMPERATURES):
        p = tail_of(hidden[0] @ weight.T, made["ids"][0], temperature)
        counts = torch.bincount(made["draws"][:, column].flatten(), minlength=VALID).double()
        assert counts[p == 0].sum() == 0, "a kept or masked id was drawn"
        expected = (p * rows * draws)[p > 0]
        freedom = len(expected) - 1
        chi_square = float(((counts[p > 0] - expected) ** 2 / expected).sum())
        # Independent draws would give `freedom` on average; systematic ones give no more.
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
        # Each id comes up floor(D p) or ceil(D p) times in a row.
        often = (made["draws"][:, column, :, None] == torch.arange(VALID)).sum(1)
        assert (often >= (draws * p - 1e-6).floor()).all() and (often <= (draws * p + 1e-6).ceil()).all()


def test_the_gradient_of_the_sampled_loss_is_unbiased():
    hidden, weight = one_row(1, torch.float64)
    rows, draws = 5000, 4
    grid = ((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)[:, None].expand(-1, 2)
    made = cached(hidden.expand(rows, -1), weight, grid, draws)
    student = torch.randn(VALID, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    student[list(MASKED)] = -torch.inf
    for column, temperature in enumerate(TEMPERATURES):
        teacher = (hidden[0] @ weight.T)[:VALID]
        teacher[list(MASKED)] = -torch.inf
        p = torch.softmax(teacher / temperature, 0)

        z = student.clone().requires_grad_()
        log_q = torch.log_softmax(z / temperature, 0)
        exact = -(p * log_q.masked_fill(p == 0, 0.0)).sum()
        (true,) = torch.autograd.grad(exact, z)

        z = student.clone().requires_grad_()
        log_q = torch.log_softmax(z / temperature, 0)
        log_p_NK = made["logprob"] + made["log_z"][:, :1]
        log_p_NK = log_p_NK / temperature - made["log_z"][:, column, None]
        value_N = sampled_cross_entropy(
            log_p_NK, log_q[made["ids"]], made["log_tail"][:, column, 0], log_q[made["draws"][:, column]]
        )
        (found,) = torch.autograd.grad(value_N.mean(), z)
        # Over an even grid of u, an id's share is right to one point in rows * draws.
        torch.testing.assert_close(value_N.mean(), exact, rtol=0, atol=1e-3)
        torch.testing.assert_close(found, true, rtol=0, atol=2 / (rows * draws))
        assert float((value_N - exact).detach().std()) > 1e-3, "one row alone is noisy"


def test_a_position_does_not_depend_on_its_batch(monkeypatch):
    """Products of small whole numbers are exact, so that logits are the same in every batch."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (40, 8), generator=generator).float()
    weight = torch.randint(-2, 3, (VALID, 8), generator=generator).float() / 4
    numbers = torch.rand(40, 2, dtype=torch.float64, generator=generator)
    whole = cached(hidden, weight, numbers, 5)["draws"]
    assert torch.equal(cached(hidden, weight, numbers, 5, chunk=7)["draws"], whole)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(cached(hidden[order], weight, numbers[order], 5)["draws"], whole[order])
    monkeypatch.setattr(module, "_TABLE_BYTES", 3 * 8 * VALID)
    assert torch.equal(cached(hidden, weight, numbers, 5)["draws"], whole)


def test_more_entries_may_be_kept_than_the_draws_leave_out():
    hidden, weight = one_row()
    hidden, numbers = hidden + torch.linspace(-1, 1, 40)[:, None], torch.rand(40, 2, dtype=torch.float64)
    narrow, wide = cached(hidden, weight, numbers, 5), cached(hidden, weight, numbers, 5, k=20, draws_k=K)
    assert torch.equal(wide["draws"], narrow["draws"]) and wide["ids"].shape == (40, 20)
    plain = cached(hidden, weight, None, 0, k=20)
    assert all(torch.equal(plain[name], wide[name]) for name in plain)


def test_an_empty_tail_and_no_positions():
    hidden, weight = one_row()
    whole = VALID - len(MASKED)
    made = cached(hidden, weight, torch.zeros(1, 2), 3, k=whole)
    assert (made["draws"] == -1).all() and (made["log_tail"] == -torch.inf).all()
    last = cached(hidden, weight, torch.zeros(1, 2), 3, k=whole, draws_k=whole - 1)
    assert (last["draws"] == last["ids"][0, -1]).all()
    assert cached(hidden[:0], weight, torch.zeros(0, 2), 3)["draws"].shape == (0, 2, 3)
    assert "draws" not in cached(hidden, weight, None, 0)


def test_numbers_at_the_ends_and_probabilities_far_apart():
    """The last point may be rounded up to 1, and ids without probability stand at both ends."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -200.0, -5.0, -torch.inf]])
    below_one = np.nextafter(1.0, 0.0)
    for u in (0.0, 1e-300, 0.5, below_one):
        found = systematic_draws(logits, 1.0, torch.tensor([u], dtype=torch.float64), 1000)
        assert set(found.unique().tolist()) == {1, 4}
        assert int((found == 4).sum()) in (6, 7)  # 1000 exp(-5) / (1 + exp(-5)) = 6.7


def test_numbers_are_of_sample_prefix_and_temperature_alone():
    both = uniforms("s1", "top", 2000, [1.0, 2.0])
    assert both.dtype == np.float64 and both.min() >= 0 and both.max() < 1
    np.testing.assert_array_equal(uniforms("s1", "top", 2000, [2, 1]), both[:, ::-1])
    np.testing.assert_array_equal(uniforms("s1", "top", 7, [1.0]), both[:7, :1])
    assert uniforms("s1", "top", 0, [1.0]).shape == (0, 1)
    others = [uniforms("s2", "top", 2000, [1.0]), uniforms("s1", "lens/01", 2000, [1.0]), both[:, 1:]]
    for other in others:
        assert abs(np.corrcoef(both[:, 0], other[:, 0])[0, 1]) < 0.1
    # Stores are the same bytes everywhere, so these may never change.
    np.testing.assert_array_equal(uniforms("dog-1", "top", 2, [1.0])[:, 0], [0.18123315518776917, 0.20684918085733928])


def test_draws_of_a_run_are_from_the_stored_tails_whatever_the_batches(begin, full, tmp_path):
    _, masked_log_softmax = full
    settings = {
        "k": 8,
        "draws": 16,
        "weights": WeightsConfig(acoustic=0, acoustic_top=0.1),
        "layers": LayersConfig("top"),
    }
    one = begin(tmp_path / "one", **settings)
    two = begin(tmp_path / "two", **settings, batch_tokens=300, head_chunk=5, part_samples=1)
    for run in (one, two):
        run.bring_up()
    alignment = one.needs.alignment
    for source, folder in (("textual", one.needs.textual), ("acoustic_top", one.needs.acoustic)):
        found = []
        for run in (one, two):
            part, row = run.store.get("s2", source)
            assert part.attributes["distributions"]["draws"] == {"count": 16, "k": 8}
            found.append(part.distribution(row, "top", draws=True))
        stored, other = found
        assert stored.draws.shape == (len(stored.ids), 2, 16) and (stored.draws >= 0).all()
        assert not (stored.draws[..., None] == stored.ids[:, None, None]).any()
        assert not np.isin(stored.draws, alignment.masked).any() and stored.draws.max() < alignment.valid
        # Rounding of the logits may move a draw to the id beside it.
        assert (stored.draws == other.draws).mean() > 0.999
        seen = one.naive(folder, "s2")
        for column, temperature in enumerate(stored.temperatures):
            logprob = masked_log_softmax(seen.logits[seen.batch.response_rows], alignment, temperature)
            left = logprob.scatter(1, torch.from_numpy(stored.ids), -torch.inf).double().softmax(1)
            often = (stored.draws[:, column, :, None] == np.arange(alignment.valid)).sum(1)
            assert np.abs(often - 16 * left.numpy()).max() < 1 + 1e-3
