"""Hidden-state losses: values, gradients, dequantization, memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses import Projection, StoredStates
from kdpipe.stages.train.losses import hidden_loss as loss_of

KINDS = ["cosine", "mse", "smooth_l1"]


def hidden_loss(student, teacher, projection, kind, **settings):
    stored = teacher if isinstance(teacher, StoredStates) else StoredStates(teacher)
    return loss_of(student, stored, projection, kind, **settings)


def states(rows=11, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_cosine_by_hand():
    student, teacher = states(), states(seed=1)
    want = 1 - (student * teacher).sum(1) / student.norm(dim=1) / teacher.norm(dim=1)
    torch.testing.assert_close(hidden_loss(student, teacher, None, "cosine"), want)
    torch.testing.assert_close(hidden_loss(student, 3 * student, None, "cosine"), torch.zeros(11), atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden_loss(student, -student, None, "cosine"), torch.full((11,), 2.0))


def test_mse_is_in_units_of_the_teacher():
    student, teacher = states(), states(seed=1)
    want = ((student - teacher) ** 2).mean(1) / (teacher**2).mean(1)
    for unit in (1.0, 100.0):
        torch.testing.assert_close(hidden_loss(unit * student, unit * teacher, None, "mse"), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden_loss(torch.zeros(11, 6), teacher, None, "mse"), torch.ones(11), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind):
    student, teacher = states(width=6).requires_grad_(), states(width=4, seed=1)
    projection = Projection(6, 4, torch.Generator().manual_seed(2))
    leaves = (student, projection.weight)
    whole = hidden_loss(student, teacher, projection, kind)
    chunked = hidden_loss(student, teacher, projection, kind, chunk_rows=3)
    torch.testing.assert_close(chunked, whole)
    direction = states(1, 11, seed=3)[0]
    for a, b in zip(
        torch.autograd.grad(chunked @ direction, leaves), torch.autograd.grad(whole @ direction, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradients_reach_student_and_projection_only():
    student = states().bfloat16().requires_grad_()
    teacher = states(width=4, seed=1).requires_grad_()
    projection = Projection(6, 4)
    loss = hidden_loss(student, teacher.detach(), projection, "cosine", chunk_rows=4)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16 and student.grad.abs().sum() > 0
    assert projection.weight.grad is not None and projection.weight.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_stored_dtypes(kind):
    student, teacher = states(), states(seed=1)
    exact = hidden_loss(student, teacher, None, kind)
    torch.testing.assert_close(hidden_loss(student, teacher.bfloat16(), None, kind), exact, rtol=0.03, atol=0.03)
    scale = teacher.abs().amax(1) / 127
    codes = (teacher / scale[:, None]).round().to(torch.int8)
    want = hidden_loss(student, codes.float() * scale[:, None], None, kind)
    got = hidden_loss(student, StoredStates(codes, scale.half()), None, kind, chunk_rows=4)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(want, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_states(kind):
    """Codes in a basis, with a mean, alone and as int8: as if they had been decoded before."""
    student, codes, basis, mean = states(), states(width=3, seed=1), states(3, 6, seed=2), states(1, 6, seed=3)[0]
    want = hidden_loss(student, codes @ basis + mean, None, kind)
    torch.testing.assert_close(hidden_loss(student, StoredStates(codes, None, basis, mean), None, kind), want)
    scale = codes.abs().amax(1) / 127
    small = (codes / scale[:, None]).round().to(torch.int8)
    want = hidden_loss(student, (small.float() * scale[:, None]) @ basis + mean, None, kind)
    stored = StoredStates(small, scale, basis, mean)
    torch.testing.assert_close(hidden_loss(student, stored, None, kind, chunk_rows=4), want)


def test_smooth_l1_by_hand():
    """Squared below the teacher's own root mean square, linear beyond: one huge dimension does not rule."""
    teacher = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    student = teacher + torch.tensor([[0.5, 0.0, -3.0, 0.0]])
    got = hidden_loss(student, teacher, None, "smooth_l1")
    torch.testing.assert_close(got, torch.tensor([(0.125 + 2.5) / 4]), rtol=1e-4, atol=0)
    for unit in (1e-2, 100.0):
        torch.testing.assert_close(
            hidden_loss(unit * student, unit * teacher, None, "smooth_l1"), got, rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_zero_states_stay_finite(kind):
    student = torch.zeros(2, 6, requires_grad=True)
    loss = hidden_loss(student, states(2), None, kind)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def test_no_rows():
    student = torch.zeros(0, 6, requires_grad=True)
    loss = hidden_loss(student, torch.zeros(0, 4), Projection(6, 4), "mse")
    assert loss.shape == (0,)
    loss.sum().backward()
    assert student.grad is not None and student.grad.shape == (0, 6)


def test_projection_starts_sensibly():
    assert torch.equal(Projection(5, 5).weight, torch.eye(5))
    wide = Projection(256, 384, torch.Generator().manual_seed(0))
    assert wide.weight.shape == (384, 256) and wide.bias is None and wide.weight.dtype == torch.float32
    assert torch.equal(wide.weight, Projection(256, 384, torch.Generator().manual_seed(0)).weight)
    state = states(64, 256, seed=1)
    assert float(wide(state).detach().std()) == pytest.approx(float(state.std()), rel=0.05)


def test_no_float_copy_of_all_states():
    """Nothing of the size of all states is made in float32, forward or backward, but the student's gradient."""

    class Recorder(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                    Recorder.largest = max(Recorder.largest, leaf.numel())
            return result

    student, teacher = states(512, 32).bfloat16().requires_grad_(), states(512, 32, 1).bfloat16()
    with Recorder():
        hidden_loss(student, teacher, None, "mse", chunk_rows=64).sum().backward()
    assert Recorder.largest <= 64 * 32


@pytest.mark.parametrize(
    ("message", "teacher", "kind"),
    [
        ("not one of cosine, mse, smooth_l1", lambda: StoredStates(states()), "l1"),
        ("11 student states stand against 3", lambda: StoredStates(states(3)), "mse"),
        ("a projection is needed", lambda: StoredStates(states(width=4)), "mse"),
        ("scale for each row is missing", lambda: StoredStates(torch.zeros(11, 6, dtype=torch.int8)), "cosine"),
        ("scale of teacher states is", lambda: StoredStates(states(), torch.ones(3)), "cosine"),
        ("basis of teacher states is", lambda: StoredStates(states(), None, states(3, 6)), "cosine"),
        ("mean of teacher states is", lambda: StoredStates(states(), None, None, torch.ones(5)), "cosine"),
    ],
)
def test_bad_arguments(message, teacher, kind):
    with pytest.raises(KdpipeError, match=message):
        hidden_loss(states(), teacher(), None, kind)
