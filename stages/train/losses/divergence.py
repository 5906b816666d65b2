"""Divergences between a cached teacher and the student, on kept outcomes plus the tail.

A cached distribution is k kept entries and the mass of what is left, whole (B = 1) or by vocabulary block. With the
student's probabilities summed the same way, both are proper distributions over M = k + B outcomes, and any
f-divergence between them is a lower bound of the one over the whole vocabulary (data processing), equal to it when
nothing is left. Derivations: docs/losses.md.

Everything is in nats, in log space, and a value per row. An outcome of probability 0 is -inf.

Shape suffixes: N rows, K kept entries, B vocabulary blocks, M outcomes (K + B), T declared temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from kdpipe.data.errors import KdpipeError

# Share of a block that the student must leave outside its kept entries for the logarithm of the rest to be taken as
# it is. Below it float32 logits no longer say how much is left, and the logarithm goes on along its tangent.
SMALLEST_REST = 1e-6


def cross_entropy(picked_label_N: torch.Tensor, lse_1_N: torch.Tensor, z_loss: float = 0.0) -> torch.Tensor:
    """Cross-entropy lse - z[label] plus `z_loss` * lse^2 (PaLM, arXiv 2204.02311, section 5), in nats.

    Args:
        picked_label_N: logit of the label [N].
        lse_1_N: log-sum-exp of the logits at temperature 1 [N].
        z_loss: weight of the squared log-sum-exp (PaLM: 1e-4).

    Returns:
        [N], in the dtype of `lse_1_N`.
    """
    loss_N = lse_1_N - picked_label_N
    return loss_N + z_loss * lse_1_N.square() if z_loss else loss_N


def teacher_at_temperature(
    logprob_1_NK: torch.Tensor, log_z_NT: torch.Tensor, temperatures: Sequence[float], temperature: float
) -> torch.Tensor:
    """Kept log-probabilities at a declared temperature, from those at temperature 1.

    The store holds log p_i = z_i - log_z[1] and log_z[T] = log sum exp(z / T) over the whole vocabulary, so
    log p_i at T is (log p_i + log_z[1]) / T - log_z[T].

    Args:
        logprob_1_NK: kept log-probabilities at temperature 1 [N, K]; -inf for absent entries.
        log_z_NT: log normalizers [N, T].
        temperatures: the declared temperatures, in the order of `log_z_NT`.
        temperature: the one asked for.

    Returns:
        float32 [N, K].

    Raises:
        KdpipeError: the temperature was not declared when the cache was made.
    """
    column = declared_column(temperatures, temperature)
    if temperature == 1.0:
        return logprob_1_NK.float()
    log_z_NT = log_z_NT.double()
    logit_NK = logprob_1_NK.double() + log_z_NT[:, declared_column(temperatures, 1.0), None]
    return (logit_NK / temperature - log_z_NT[:, column, None]).float()


def declared_column(temperatures: Sequence[float], temperature: float) -> int:
    """Place of a temperature among those that a cache was made for.

    Raises:
        KdpipeError: it is not among them.
    """
    if temperature not in temperatures:
        raise KdpipeError(
            f"temperature {temperature:g} is not in the teacher cache, which was made for "
            f"{', '.join(f'{t:g}' for t in temperatures)}; add it to `teachers.temperatures` and run "
            "`kdpipe cache-teachers`, or train at one of those."
        )
    return tuple(temperatures).index(temperature)


def student_outcomes(
    picked_NK: torch.Tensor,
    lse_NB: torch.Tensor,
    block_NK: torch.Tensor,
    present_NK: torch.Tensor,
    left_NB: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's log-probabilities of a teacher's kept entries and of the tail of each block.

    log q_i = z_i / T - lse, and with s_b = sum of exp(z_i / T - lse_b) over the kept entries of block b,
    log q_tail_b = lse_b - lse + log(1 - s_b). Computed in float64 (these are a few numbers a row), so that
    1 - s_b is as exact as the logits are; below `SMALLEST_REST` the logarithm is continued along its tangent, which
    keeps values finite and each gradient through a tail within that tail's weight in the loss.

    Args:
        picked_NK: logits of the kept entries [N, K].
        lse_NB: log-sum-exp of z / T in each block [N, B]; float64 is worth having where tails are small.
        block_NK: int64 block of each kept entry [N, K]; anything in range where absent.
        present_NK: which entries there are (bool).
        left_NB: which tails there are (bool): False where the kept entries are all the ids of a block.
        temperature: T.

    Returns:
        log_q_NK, log_q_tail_NB: in the dtype of `picked_NK`; -inf for absent entries and tails.
    """
    lse_NB = lse_NB.double()
    lse_N1 = torch.logsumexp(lse_NB, dim=1, keepdim=True)
    log_q_NK = picked_NK.double() / temperature - lse_N1
    left_NB = left_NB & (lse_NB > -torch.inf)
    log_block_NB = torch.where(lse_NB > -torch.inf, lse_NB, 0.0) - lse_N1

    log_share_NK = torch.where(present_NK, log_q_NK - log_block_NB.gather(1, block_NK), 0.0)
    share_NK = torch.where(present_NK, log_share_NK.exp(), 0.0)
    rest_NB = 1.0 - torch.zeros_like(log_block_NB).scatter_add(1, block_NK, share_NK)

    log_q_tail_NB = torch.where(left_NB, log_block_NB + _log_along_tangent(rest_NB), -torch.inf)
    log_q_NK = torch.where(present_NK, log_q_NK, -torch.inf)
    return log_q_NK.to(picked_NK.dtype), log_q_tail_NB.to(picked_NK.dtype)


def _log_along_tangent(x: torch.Tensor) -> torch.Tensor:
    """log(x), and below `SMALLEST_REST` its tangent there (also for x <= 0, which rounding can give)."""
    above = x >= SMALLEST_REST
    return torch.where(
        above,
        torch.where(above, x, SMALLEST_REST).log(),
        math.log(SMALLEST_REST) + (x - SMALLEST_REST) / SMALLEST_REST,
    )


def forward_kl(log_p_NM: torch.Tensor, log_q_NM: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p (log p - log q) of each row, in nats: p the teacher's outcomes, q the student's.

    Outcomes with p = 0 add nothing. Infinite where p > 0 = q.
    """
    live = log_p_NM != -torch.inf  # not NaN either: what is broken must show
    log_p = torch.where(live, log_p_NM, 0.0)
    log_q = torch.where(live, log_q_NM, 0.0)
    return torch.where(live, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def reverse_kl(log_p_NM: torch.Tensor, log_q_NM: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of each row, in nats; infinite where q > 0 = p."""
    return forward_kl(log_q_NM, log_p_NM)


def jsd(log_p_NM: torch.Tensor, log_q_NM: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence of each row, in nats.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, p the teacher. As in Liger 0.8.5
    (`liger_kernel/chunked_loss/jsd_loss.py`), beta = 0 stands for KL(p || q) and beta = 1 for KL(q || p), to which
    the divergence tends when divided by beta or 1 - beta; the formula itself would be 0 at both ends.
    """
    if beta == 0.0:
        return forward_kl(log_p_NM, log_q_NM)
    if beta == 1.0:
        return reverse_kl(log_p_NM, log_q_NM)
    log_m_NM = _mixture(log_p_NM, log_q_NM, beta)
    return beta * forward_kl(log_p_NM, log_m_NM) + (1.0 - beta) * forward_kl(log_q_NM, log_m_NM)


def tvd(log_p_NM: torch.Tensor, log_q_NM: torch.Tensor) -> torch.Tensor:
    """Total variation distance of each row, sum |p - q| / 2, between 0 and 1."""
    return 0.5 * (log_p_NM.exp() - log_q_NM.exp()).abs().sum(-1)


def skew_kl(log_p_NM: torch.Tensor, log_q_NM: torch.Tensor, alpha: float = 0.1) -> torch.Tensor:
    """KL(p || alpha p + (1 - alpha) q) of each row, in nats (DistiLLM, Ko et al., arXiv 2402.03898, section 3.1).

    Forward KL at alpha = 0; with alpha > 0 at most -log(alpha), wherever the student is.
    """
    return forward_kl(log_p_NM, _mixture(log_p_NM, log_q_NM, alpha))


def skew_reverse_kl(log_p_NM: torch.Tensor, log_q_NM: torch.Tensor, alpha: float = 0.1) -> torch.Tensor:
    """KL(q || alpha q + (1 - alpha) p) of each row, in nats (as `skew_kl`); reverse KL at alpha = 0."""
    return forward_kl(log_q_NM, _mixture(log_q_NM, log_p_NM, alpha))


def _mixture(log_a_NM: torch.Tensor, log_b_NM: torch.Tensor, share: float) -> torch.Tensor:
    """log(share a + (1 - share) b); where both are 0, anything finite."""
    if share == 0.0:
        return log_b_NM
    live = (log_a_NM > -torch.inf) | (log_b_NM > -torch.inf)
    return torch.logaddexp(
        torch.where(live, log_a_NM, 0.0) + math.log(share), torch.where(live, log_b_NM, 0.0) + math.log1p(-share)
    )


def sampled_cross_entropy(
    log_p_NK: torch.Tensor, log_q_NK: torch.Tensor, log_tail_N: torch.Tensor, log_q_ND: torch.Tensor
) -> torch.Tensor:
    """Forward cross-entropy -sum p log q, exact on the kept entries and sampled on the tail, in nats.

    With tail mass t and D draws v_j from the tail's own distribution, -sum_K p log q - t / D sum_j log q(v_j): its
    expectation over the draws is the cross-entropy over the whole vocabulary, and so is its gradient's. K = 0 is pure
    sampling (t = 1). Not a divergence: at its minimum it is the teacher's entropy.

    Args:
        log_p_NK: the teacher's kept log-probabilities [N, K]; -inf where absent.
        log_q_NK: the student's of the same ids [N, K].
        log_tail_N: log mass of the teacher's tail [N].
        log_q_ND: the student's log-probabilities of the draws [N, D].
    """
    live = log_p_NK > -torch.inf
    kept_N = (log_p_NK.exp() * torch.where(live, log_q_NK, 0.0)).sum(1)
    tail_N = log_tail_N.exp()
    drawn_N = torch.where(tail_N > 0, log_q_ND.mean(1), 0.0) * tail_N
    return -(kept_N + drawn_N)


Kind = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "sampled_ce"]


@dataclass(frozen=True)
class Divergence:
    """A divergence chosen by name.

    Attributes:
        kind: which one; `sampled_ce` is `sampled_cross_entropy`, which needs draws.
        beta: mixture weight of `jsd`, in [0, 1]; the others have none.
        alpha: skew of `skew_kl` and `skew_reverse_kl`, in [0, 1).
    """

    kind: Kind
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise KdpipeError(f"divergence {self.kind!r} is not one of {', '.join(get_args(Kind))}.")
        if not 0.0 <= self.beta <= 1.0:
            raise KdpipeError(f"beta {self.beta:g} of the divergence is not between 0 and 1.")
        if not 0.0 <= self.alpha < 1.0:
            raise KdpipeError(f"alpha {self.alpha:g} of the divergence is not at least 0 and below 1.")

    @property
    def sampled(self) -> bool:
        """Whether the tail is taken from draws."""
        return self.kind == "sampled_ce"

    def __call__(self, log_p_NM: torch.Tensor, log_q_NM: torch.Tensor) -> torch.Tensor:
        """The divergence of each row [N], from log-probabilities [N, M] over the same outcomes."""
        match self.kind:
            case "forward_kl":
                return forward_kl(log_p_NM, log_q_NM)
            case "reverse_kl":
                return reverse_kl(log_p_NM, log_q_NM)
            case "jsd":
                return jsd(log_p_NM, log_q_NM, self.beta)
            case "skew_kl":
                return skew_kl(log_p_NM, log_q_NM, self.alpha)
            case "skew_reverse_kl":
                return skew_reverse_kl(log_p_NM, log_q_NM, self.alpha)
            case "tvd":
                return tvd(log_p_NM, log_q_NM)
            case "sampled_ce":
                raise KdpipeError("sampled_ce is no function of outcomes: call sampled_cross_entropy with draws.")
