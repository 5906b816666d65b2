"""The loss: every term of a training step from one pass over the output head.

`head` has the primitive and its forms (`reference`, `chunked`, `triton_head`, `in_forward`), `divergence` what is made
of its results, `teacher` one cached teacher, `joint` all terms of a step together, `hidden` the distances of hidden
states. docs/losses.md has the mathematics.
"""

from kdpipe.stages.train.losses.divergence import (
    Divergence,
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
    sampled_cross_entropy,
    skew_kl,
    skew_reverse_kl,
    student_outcomes,
    teacher_at_temperature,
    tvd,
)
from kdpipe.stages.train.losses.head import Form, choose_form, linear_logsumexp_gather, linear_loss
from kdpipe.stages.train.losses.hidden import Projection, StoredStates, hidden_loss
from kdpipe.stages.train.losses.joint import HeadTerms, head_terms
from kdpipe.stages.train.losses.teacher import Diagnostics, Distribution, TeacherRows

__all__ = [
    "Diagnostics",
    "Distribution",
    "Divergence",
    "Form",
    "HeadTerms",
    "Projection",
    "StoredStates",
    "TeacherRows",
    "choose_form",
    "cross_entropy",
    "forward_kl",
    "head_terms",
    "hidden_loss",
    "jsd",
    "linear_logsumexp_gather",
    "linear_loss",
    "reverse_kl",
    "sampled_cross_entropy",
    "skew_kl",
    "skew_reverse_kl",
    "student_outcomes",
    "teacher_at_temperature",
    "tvd",
]
