"""All terms of a step in one pass over the head, from cached teachers, against full distributions."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses import Distribution, Divergence, TeacherRows, head_terms, joint

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

M, H, V = 12, 16, 50
KINDS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd"),
    Divergence("jsd", 0.2),
    Divergence("tvd"),
    Divergence("skew_kl"),
    Divergence("skew_reverse_kl", alpha=0.3),
]
FORMS = ["reference", "chunked", "in_forward"]
EVERYTHING = slice(0, M)


def student(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = (0.7 * torch.randn(V, H, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(V, (M,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def teacher_logits(rows=M, seed=9, spread=3.0):
    return spread * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cache(logits, k, temperatures=(1.0,), blocks=(0,), dtype=torch.float32):
    """What the store keeps of a teacher with these logits; ids of logit -inf are left out on both sides."""
    top, top_ids = logits.topk(k)
    ids = top_ids.where(top > -torch.inf, -1)
    rest = logits.scatter(1, top_ids, -torch.inf)
    log_z = torch.stack([(logits / t).logsumexp(1) for t in temperatures], 1)
    edges = [*blocks, V]
    tails = [
        torch.stack([(rest[:, a:b] / t).logsumexp(1) for a, b in pairwise(edges)], 1) - log_z[:, t_index, None]
        for t_index, t in enumerate(temperatures)
    ]
    logprob = top - logits.logsumexp(1, keepdim=True)
    return Distribution(ids, logprob.to(dtype).float(), log_z.float(), torch.stack(tails, 1).float(), temperatures)


def full_divergence(divergence, log_p, log_q):
    """Over the whole vocabulary, with torch's own functions; entries of -inf must be left out before."""

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(1)

    if divergence.kind == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(1) / 2
    if divergence.kind.startswith("skew"):
        a, b = (log_p, log_q) if divergence.kind == "skew_kl" else (log_q, log_p)
        return kl(a, (divergence.alpha * a.exp() + (1 - divergence.alpha) * b.exp()).log())
    if divergence.kind != "jsd":
        return kl(log_p, log_q) if divergence.kind == "forward_kl" else kl(log_q, log_p)
    beta = divergence.beta
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def terms(hidden, weight, labels, teachers, divergence=KINDS[2], temperature=1.0, label_weight=0.0, **settings):
    return head_terms(
        hidden,
        weight,
        labels,
        teachers,
        divergence=divergence,
        temperature=temperature,
        label_weight=label_weight,
        **settings,
    )


def assert_same_loss(got, want, leaves, tolerance=1e-5):
    """Values to `tolerance`, and gradients to `tolerance` of their largest entry or absolutely."""
    torch.testing.assert_close(got, want.sum(), rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(x.sum(), leaves, retain_graph=x is want) for x in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [None, (0, 4, 20)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_whole_vocabulary_equals_the_live_teacher(divergence, temperature, blocks, form):
    """k = V, float32 store: loss and gradients of the full distributions, to 1e-5."""
    hidden, weight, labels = student()
    logits = teacher_logits()
    given = cache(logits, V, (1.0, 2.0), blocks or (0,))
    assert (given.log_tail == -torch.inf).all(), "nothing is left"
    settings = {"blocks": blocks, "form": form, "chunk_bytes": 5 * V * 4}
    teachers = [TeacherRows(EVERYTHING, given)]
    got = terms(hidden, weight, labels, teachers, divergence, temperature, **settings)
    silent = [TeacherRows(EVERYTHING, given, weight=0.0)]
    labels_only = terms(hidden, weight, labels, silent, divergence, temperature, 1.0, **settings)
    student_logits = hidden @ weight.T
    live = full_divergence(
        divergence,
        (logits / temperature).log_softmax(1).float(),
        (student_logits / temperature).log_softmax(1),
    )
    torch.testing.assert_close(got.divergence[0], live.detach(), rtol=1e-5, atol=1e-5)
    assert_same_loss(got.loss, live, (hidden, weight))
    cross_entropy = F.cross_entropy(student_logits, labels, reduction="none")
    torch.testing.assert_close(got.cross_entropy, cross_entropy.detach(), rtol=1e-5, atol=1e-5)
    assert_same_loss(labels_only.loss, cross_entropy, (hidden, weight))
    torch.testing.assert_close(got.diagnostics[0].teacher_kept, torch.ones(M))
    torch.testing.assert_close(got.diagnostics[0].student_kept, torch.ones(M))


@pytest.mark.parametrize("blocks", [(0,), (0, 4, 20)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_tails_equal_the_vocabulary_summed_by_hand(divergence, temperature, blocks):
    hidden, weight, labels = student()
    logits = teacher_logits()
    given = cache(logits, 7, (2.0, 1.0), blocks)
    got = terms(
        hidden, weight, labels, [TeacherRows(EVERYTHING, given)], divergence, temperature, t_squared=True, blocks=blocks
    )

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    sides = []
    for z in (logits, exact[0] @ exact[1].T):
        log = (z / temperature).log_softmax(1)
        rest = log.scatter(1, given.ids, -torch.inf)
        edges = [*blocks, V]
        tails = [rest[:, a:b].logsumexp(1, keepdim=True) for a, b in pairwise(edges)]
        sides.append(torch.cat([log.gather(1, given.ids), *tails], 1))
    want = temperature**2 * full_divergence(divergence, *sides)
    torch.testing.assert_close(got.divergence[0].double(), want.detach(), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got.loss, (hidden, weight))
    for a, b in zip(gradients, torch.autograd.grad(want.sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)

    full = full_divergence(
        divergence, (logits / temperature).log_softmax(1), (exact[0] @ exact[1].T / temperature).log_softmax(1)
    )
    assert (want <= temperature**2 * full + 1e-9).all(), "a lower bound of the divergence over the vocabulary"


@pytest.mark.parametrize("form", ["chunked", "in_forward"])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_gradcheck(divergence, form):
    hidden, weight, labels = student(dtype=torch.float64)
    labels[2] = -1
    blocks = (0, 4, 20)
    tokens = torch.rand(8, generator=torch.Generator().manual_seed(1))
    teachers = [
        TeacherRows(slice(0, 8), cache(teacher_logits(8), 5, (1.0, 2.0), blocks), 0.7, tokens),
        TeacherRows(slice(4, 12), cache(teacher_logits(8, 3), 3, (2.0, 1.0), blocks), 1.3),
    ]
    settings = {"blocks": blocks, "z_loss": 0.01, "softcap": 9.0, "logit_scale": 0.9, "chunk_bytes": 5 * V * 24}

    def run(h, w):
        return terms(h, w, labels, teachers, divergence, 2.0, 0.5, form=form, **settings).loss

    leaves = (hidden[:, :4].detach().requires_grad_(), weight[:, :4].detach().requires_grad_())
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("tail", [1e-7, 0.0])
@pytest.mark.parametrize("k", [1, 5])
def test_teachers_with_almost_nothing_left(divergence, tail, k):
    """Tails near 0 and exactly 0, down to a single entry: finite, and zero where the student agrees."""
    hidden, weight, labels = student()
    p = torch.full((M, k), (1 - tail) / k, dtype=torch.float64)
    ids = torch.arange(k).expand(M, k).contiguous()
    given = Distribution(ids, p.log().float(), torch.full((M, 1), 3.0), torch.full((M, 1, 1), tail).log(), (1.0,))
    got = terms(hidden, weight, labels, [TeacherRows(EVERYTHING, given)], divergence)
    gradients = torch.autograd.grad(got.loss, (hidden, weight))
    assert got.divergence[0].isfinite().all() and (got.divergence[0] >= 0).all()
    assert all(g.isfinite().all() for g in gradients)


def test_left_out_ids_are_left_out_on_both_sides():
    """Padding rows and colliding special ids: as if the head had never had them."""
    hidden, weight, labels = student()
    valid, masked = 40, (3, 17)
    keep = [i for i in range(valid) if i not in masked]
    labels = torch.tensor(keep)[labels % len(keep)]
    logits = teacher_logits()
    logits[:, valid:] = -torch.inf
    logits[:, list(masked)] = -torch.inf
    for k in (6, V):
        given = cache(logits, k)
        teachers = [TeacherRows(EVERYTHING, given)]
        got = terms(hidden, weight, labels, teachers, valid_vocab=valid, masked_ids=masked, label_weight=1.0)
        renumber = torch.full((V + 1,), -1)
        renumber[keep] = torch.arange(len(keep))
        smaller = Distribution(renumber[given.ids], given.logprob, given.log_z, given.log_tail, (1.0,))
        want = terms(hidden, weight[keep], renumber[labels], [TeacherRows(EVERYTHING, smaller)])
        torch.testing.assert_close(got.divergence[0], want.divergence[0])
        torch.testing.assert_close(got.cross_entropy, want.cross_entropy)
        (gradient,) = torch.autograd.grad(got.loss, weight)
        assert (gradient[valid:] == 0).all() and (gradient[list(masked)] == 0).all()
        live = full_divergence(
            KINDS[2], logits[:, keep].log_softmax(1).float(), (hidden @ weight[keep].T).log_softmax(1)
        )
        if k == V:
            torch.testing.assert_close(got.divergence[0], live.detach(), rtol=1e-5, atol=1e-5)


def test_one_pass_for_labels_lens_rows_and_both_teachers(monkeypatch):
    hidden, weight, labels = student()
    labels[6:] = -1
    top, lens, acoustic = (cache(teacher_logits(n, seed), k) for n, seed, k in [(6, 1, 4), (6, 2, 3), (4, 3, 5)])
    teachers = [TeacherRows(slice(0, 6), top), TeacherRows(slice(6, 12), lens), TeacherRows(slice(2, 6), acoustic)]
    seen = []

    def recorded(*args, **kwargs):
        seen.append(args[2])
        return original(*args, **kwargs)

    original = joint.linear_loss
    monkeypatch.setattr(joint, "linear_loss", recorded)
    got = terms(hidden, weight, labels, teachers)
    assert len(seen) == 1 and seen[0].shape == (M, 1 + 4 + 5), "lens rows share the columns of the top"
    assert [len(x) for x in got.divergence] == [6, 6, 4]
    assert (got.cross_entropy[6:] == 0).all() and (got.cross_entropy[:6] > 0).all()
    for teacher, value in zip(teachers, got.divergence, strict=True):
        alone = terms(
            hidden[teacher.rows], weight, labels[teacher.rows], [TeacherRows(slice(None), teacher.distribution)]
        )
        torch.testing.assert_close(value, alone.divergence[0])


def test_rows_that_are_not_valid():
    hidden, weight, labels = student()
    given = cache(teacher_logits(), 4)
    valid = torch.ones(M, dtype=torch.bool)
    valid[[0, 5]] = False
    want = terms(hidden, weight, labels, [TeacherRows(EVERYTHING, given)])
    empty = given.log_z.clone()
    empty[~valid] = torch.nan
    ids, logprob, tail = given.ids.clone(), given.logprob.clone(), given.log_tail.clone()
    ids[0], logprob[0], tail[0] = -1, -torch.inf, torch.nan
    masked = Distribution(ids, logprob, empty, tail, (1.0,), valid)
    got = terms(hidden, weight, labels, [TeacherRows(EVERYTHING, masked)])
    torch.testing.assert_close(got.divergence[0], torch.where(valid, want.divergence[0], 0.0))
    assert (got.diagnostics[0].agreement[~valid] == 0).all()
    assert (got.diagnostics[0].teacher_kept[~valid] == 0).all() and (got.diagnostics[0].student_kept[~valid] == 0).all()
    (gradient,) = torch.autograd.grad(got.loss, hidden)
    assert gradient.isfinite().all() and (gradient[~valid] == 0).all() and (gradient[valid] != 0).any()


def test_half_precision_store_still_gives_a_divergence():
    """Entries rounded to float16 do not sum to one; the value stays non-negative and 0 at the teacher itself."""
    hidden, weight, labels = student()
    own = (hidden @ weight.T).detach().double()
    for k in (3, V):
        for divergence in KINDS:
            given = cache(own, k, dtype=torch.float16)
            got = terms(hidden, weight, labels, [TeacherRows(EVERYTHING, given)], divergence).divergence[0]
            assert (got >= -1e-6).all() and (got < 2e-3).all()


def test_diagnostics():
    hidden, weight, labels = student()
    own = (hidden @ weight.T).detach().double()
    other = own.clone()
    other[0] = -own[0]
    got = terms(hidden, weight, labels, [TeacherRows(EVERYTHING, cache(x, 4)) for x in (own, other)])
    same, differing = got.diagnostics
    assert same.agreement.tolist() == [1.0] * M
    assert differing.agreement.tolist() == [0.0] + [1.0] * (M - 1)
    torch.testing.assert_close(same.teacher_kept, own.softmax(1).topk(4)[0].sum(1).float())
    torch.testing.assert_close(same.student_kept, same.teacher_kept)
    assert not same.student_kept.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_without_teachers_and_without_rows(form):
    hidden, weight, labels = student()
    got = terms(hidden, weight, labels, [], temperature=2.0, form=form)
    want = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(got.cross_entropy, want.detach())
    assert got.divergence == ()
    nothing = cache(teacher_logits(0), 4)
    got = terms(hidden[:0], weight, labels[:0], [TeacherRows(slice(0, 0), nothing)], form=form)
    assert got.cross_entropy.shape == got.divergence[0].shape == (0,)
    got.loss.backward()
    assert float(got.loss.detach()) == 0 and weight.grad is not None and (weight.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_one_normalizer_makes_micro_batches_one_big_batch(form):
    """Weights by token, divided once by their sum over the whole batch, give the same loss however rows are cut."""
    hidden, weight, labels = student(dtype=torch.float64)
    given, tokens = cache(teacher_logits(), 5), torch.rand(M, generator=torch.Generator().manual_seed(2))
    tokens[3] = 0.0
    total = float(tokens.sum())

    def loss(rows):
        teacher = TeacherRows(slice(None), given.of_rows(rows), 0.8 / total, tokens[rows])
        settings = {"label_weight": 0.5 / total, "label_token_weights": tokens[rows], "form": form}
        return terms(hidden[rows], weight, labels[rows], [teacher], KINDS[2], **settings).loss

    whole = loss(slice(0, M))
    parts = [loss(slice(0, 1)), loss(slice(1, 9)), loss(slice(9, M))]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    want = torch.autograd.grad(whole, (hidden, weight))
    got = [torch.autograd.grad(part, (hidden, weight)) for part in parts]
    for index in range(2):
        torch.testing.assert_close(sum(g[index] for g in got), want[index])
    assert (want[0][3] == 0).all(), "a row of weight 0 is masked"


@pytest.mark.parametrize("form", FORMS)
def test_a_masked_row_may_hold_anything(form):
    """Infinite values in rows of weight 0 reach neither loss nor gradient of the others."""
    hidden, weight, labels = student()
    labels = labels.where(labels != 3, 4)
    labels[2] = 3
    given, tokens = cache(teacher_logits(), 5), torch.ones(M)
    tokens[2] = 0.0
    got = terms(hidden, weight, labels, [], label_weight=1.0, label_token_weights=tokens, masked_ids=(3,), form=form)
    assert got.cross_entropy[2] == torch.inf and got.loss.isfinite()
    silent = terms(hidden, weight, labels, [], label_weight=0.0, masked_ids=(3,), form=form)
    assert float(silent.loss.detach()) == 0, "nor do terms of weight 0"
    assert all((g == 0).all() for g in torch.autograd.grad(silent.loss, (hidden, weight)))
    teacher = TeacherRows(EVERYTHING, given, token_weights=tokens)
    got = terms(hidden, weight, labels, [teacher], form=form)
    (gradient,) = torch.autograd.grad(got.loss, hidden)
    assert (gradient[2] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_sampled_cross_entropy(form, temperature):
    """Draws as the whole tail, each as often as its probability says: the full forward cross-entropy."""
    hidden, weight, labels = student()
    logits = teacher_logits()
    given = cache(logits, 5, (1.0, 2.0))
    log_p = (logits / temperature).log_softmax(1)
    log_q = (hidden @ weight.T / temperature).log_softmax(1)
    draws = torch.stack([torch.multinomial(log_p.scatter(1, given.ids, -torch.inf).exp(), 400, True)] * 2, 1)
    drawn = Distribution(given.ids, given.logprob, given.log_z, given.log_tail, given.temperatures, draws=draws)
    teachers = [TeacherRows(EVERYTHING, drawn)]
    got = terms(hidden, weight, labels, teachers, Divergence("sampled_ce"), temperature, form=form)
    tail = log_p.scatter(1, given.ids, -torch.inf).exp().sum(1)
    kept = (log_p.gather(1, given.ids).exp() * log_q.gather(1, given.ids)).sum(1)
    want = -(kept + tail / 400 * log_q.gather(1, draws[:, 0]).sum(1))
    assert_same_loss(got.loss, want.float(), (hidden, weight), 2e-5)
    full = -(log_p.exp() * log_q).sum(1).detach()
    assert float((got.divergence[0] - full).abs().max()) < 0.2 and float((got.divergence[0] - full).mean().abs()) < 0.03


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["logprob", "log_tail"])
def test_a_broken_teacher_shows(name, value):
    """NaN where the teacher says something is no divergence of 0."""
    hidden, weight, labels = student()
    given = cache(teacher_logits(), 4)
    broken = dataclasses.replace(given, **{name: torch.full_like(getattr(given, name), value)})
    for divergence in KINDS:
        assert terms(hidden, weight, labels, [TeacherRows(EVERYTHING, broken)], divergence).loss.isnan()


def test_labels_that_do_not_fit():
    hidden, weight, labels = student()
    with pytest.raises(KdpipeError, match=r"labels \(3,\) do not fit 12 rows"):
        terms(hidden, weight, labels[:3], [])


def test_sampled_cross_entropy_needs_draws():
    hidden, weight, labels = student()
    teachers = [TeacherRows(EVERYTHING, cache(teacher_logits(), 4))]
    with pytest.raises(KdpipeError, match=r"Set `teachers.draws`"):
        terms(hidden, weight, labels, teachers, Divergence("sampled_ce"))


@pytest.mark.parametrize(
    ("message", "rows", "changes", "settings"),
    [
        ("a teacher of 12 rows stands at rows", slice(0, 5), {}, {}),
        ("logprob of a cached teacher is", EVERYTHING, {"logprob": torch.zeros(M, 3)}, {}),
        ("and 2 tail blocks", EVERYTHING, {}, {"blocks": (0, 9)}),
        ("pass its `blocks`", EVERYTHING, {"block_bounds": (0, V)}, {"valid_vocab": 45}),
        ("rows_valid of a teacher", EVERYTHING, {"rows_valid": torch.ones(3, dtype=torch.bool)}, {}),
        ("z_loss -1 is negative", EVERYTHING, {}, {"z_loss": -1.0}),
        ("temperature 3 is not in the teacher cache", EVERYTHING, {}, {"temperature": 3.0}),
    ],
)
def test_bad_teachers(message, rows, changes, settings):
    hidden, weight, labels = student()
    given = cache(teacher_logits(), 4)
    fields = {name: getattr(given, name) for name in ("ids", "logprob", "log_z", "log_tail", "temperatures")} | changes
    with pytest.raises(KdpipeError, match=message):
        terms(hidden, weight, labels, [TeacherRows(rows, Distribution(**fields))], **settings)
