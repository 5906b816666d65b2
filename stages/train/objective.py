"""The loss of one micro-batch, from one forward pass and one pass over the output head.

Dimension key: N response tokens of the micro-batch, A audio tokens, M rows of the output head (N for the last layer
and N more for each further lens layer), H width of the student, W width of the textual teacher, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.inputs import Batch
from kdpipe.stages.models.loaded import LoadedModel
from kdpipe.stages.models.vocabulary import Alignment
from kdpipe.stages.train.losses import (
    Diagnostics,
    Distribution,
    Divergence,
    Form,
    Projection,
    StoredStates,
    TeacherRows,
    choose_form,
    head_terms,
    hidden_loss,
)
from kdpipe.stages.train.terms import Terms
from kdpipe.stages.train.weights import OVER_AUDIO, Factor, add, split, weighed


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass, with what the teachers say about them in the same order of tokens.

    Attributes:
        batch: the student's inputs.
        textual: textual teacher's distributions by its layer, its last layer included: N rows each.
        acoustic_top: acoustic teacher's distribution over the response, or None.
        textual_states: textual teacher's states [N, W] by its layer, as stored.
        acoustic_states: acoustic teacher's states [A, H] by layer, as stored.
        block_starts: first ids of the vocabulary blocks of the tails.
    """

    batch: Batch
    textual: Mapping[int, Distribution]
    acoustic_top: Distribution | None
    textual_states: Mapping[int, StoredStates]
    acoustic_states: Mapping[int, StoredStates]
    block_starts: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(
            self.batch.to(device),
            {layer: given.to(device) for layer, given in self.textual.items()},
            None if self.acoustic_top is None else self.acoustic_top.to(device),
            {layer: states.to(device) for layer, states in self.textual_states.items()},
            {layer: states.to(device) for layer, states in self.acoustic_states.items()},
            self.block_starts,
        )


@dataclass(frozen=True)
class Sums:
    """What a micro-batch adds to its global batch.

    Attributes:
        loss: the weighted sum of all terms, a scalar with gradients.
        terms: term to its unweighted sum over tokens (nats, or distance), without gradients; `sft` is always there.
        sources: by source and layer (`top`, `layer/03`, `acoustic/03`, `acoustic_top`; student layers, counted from
            1), name to a sum over tokens, without gradients: `divergence` (`cross_entropy` where that is taken) with
            the fields of `Diagnostics`, or `distance`.
    """

    loss: torch.Tensor
    terms: Mapping[str, torch.Tensor]
    sources: Mapping[str, Mapping[str, torch.Tensor]]


class Objective:
    """Weighs the student against its teachers.

    Args:
        student: the model in training.
        terms: what to compare.
        teacher: the textual teacher's folder, for its depth and width; None where no term needs it.
        alignment: ids that distributions are compared over; None where none are compared.
        seed: of the projections' initial values.
        form: how the output head is computed.
        filler: where the student is sharded over ranks, what a rank computes while others have more to do than it.
    """

    def __init__(
        self,
        student: LoadedModel,
        terms: Terms,
        *,
        teacher: ModelFolder | None,
        alignment: Alignment | None,
        seed: int,
        form: Form = "auto",
        filler: MicroBatch | None = None,
    ):
        self._filler = filler
        self._student = student
        self._terms = terms
        self._teacher_layers = 0 if teacher is None else teacher.layers
        self._alignment = alignment
        self._form: Form = form
        self.projections = nn.ModuleDict()
        if terms.match == "hidden" and teacher is not None:
            generator = torch.Generator().manual_seed(seed)
            for layer in terms.layers:
                self.projections[str(layer)] = Projection(student.width, teacher.width, generator)
        self.projections.to(student.device)

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self._student.device

    @property
    def is_sharded(self) -> bool:
        """Whether every rank must run the student equally often."""
        return self._filler is not None

    def idle(self, times: int) -> None:
        """Runs a sharded student, and back where gradients are made, to lend the others this rank's share.

        Adds zeros to the gradients.

        Args:
            times: how often.
        """
        assert self._filler is not None
        for _ in range(times):
            made = self(self._filler.to(self.device), {})
            if torch.is_grad_enabled():
                made.loss.backward()

    def form(self) -> Form:
        """The form in which the output head will be computed here."""
        weight = self._student.head_weight
        return choose_form(self._form, weight, weight, with_loss=True)

    def __call__(self, micro: MicroBatch, factors: Mapping[str, Factor]) -> Sums:
        """Runs the student and compares.

        Args:
            micro: on the student's device.
            factors: of each term in the loss, its share of the global normalizer included: one number, or one a token;
                0 for those not named.
        """
        terms, batch = self._terms, micro.batch
        depth = len(self._student.layers)
        lens = [layer for layer in terms.layers if layer != depth] if terms.match == "lens" else []
        inner = list(terms.layers) if terms.match == "hidden" else lens
        with (
            self._student.capture(inner, batch.response_rows) as states_NH,
            self._student.capture(terms.acoustic_layers, batch.audio_rows) as heard_AH,
        ):
            hidden_BLH = self._student.hidden(batch)
        last_NH = hidden_BLH.flatten(0, 1)[batch.response_rows]
        loss, sums, sources = self._head(micro, last_NH, {layer: states_NH[layer] for layer in lens}, factors)
        if terms.match == "hidden" and terms.distance is not None:
            distances = {
                layer: hidden_loss(
                    states_NH[layer], micro.textual_states[theirs], self.projections[str(layer)], terms.distance
                )
                for layer, theirs in terms.layers.items()
            }
            loss = loss + weighed(distances.values(), factors.get("layer", 0.0))
            sums["layer"], seen = _distances("layer", distances)
            sources |= seen
        if terms.acoustic_layers and terms.distance is not None:
            distances = {
                layer: hidden_loss(heard_AH[layer], micro.acoustic_states[layer], None, terms.distance)
                for layer in terms.acoustic_layers
            }
            loss = loss + weighed(distances.values(), factors.get(OVER_AUDIO, 0.0)) / len(distances)
            total, seen = _distances(OVER_AUDIO, distances)
            sums[OVER_AUDIO] = total / len(distances)
            sources |= seen
        return Sums(loss, sums, sources)

    def _head(
        self,
        micro: MicroBatch,
        last_NH: torch.Tensor,
        lens_NH: Mapping[int, torch.Tensor],
        factors: Mapping[str, Factor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
        """Labels, top, lens layers and acoustic top through the output head at once."""
        terms, targets_N = self._terms, micro.batch.targets
        count = len(targets_N)
        hidden_MH = torch.cat([last_NH, *(self._student.final_norm(states) for states in lens_NH.values())])
        labels_M = torch.cat([targets_N, targets_N.new_full((len(hidden_MH) - count,), -1)])

        # Group 0 of the rows is the last layer, the others are lens layers. The lens of the last layer against the
        # teacher's last layer is the top itself, and is computed once for both terms.
        group = {layer: place + 1 for place, layer in enumerate(lens_NH)}
        top = (0, self._teacher_layers)
        names: dict[tuple[int, int], list[str]] = {top: ["top"]} if terms.on("top") else {}
        for ours, theirs in terms.layers.items() if terms.match == "lens" else ():
            names.setdefault((group.get(ours, 0), theirs), []).append(f"layer/{ours:02d}")
        teachers = [
            TeacherRows(
                slice(place * count, (place + 1) * count),
                micro.textual[theirs],
                *split(add(factors.get(name.split("/")[0], 0.0) for name in named)),
            )
            for (place, theirs), named in names.items()
        ]
        given = list(names.values())
        if micro.acoustic_top is not None:
            weight = split(factors.get("acoustic_top", 0.0))
            teachers.append(TeacherRows(slice(0, count), micro.acoustic_top, *weight))
            given.append(["acoustic_top"])

        compared = terms.compared
        label_weight, own_N = split(factors.get("sft", 0.0))
        result = head_terms(
            hidden_MH,
            self._student.head_weight,
            labels_M,
            teachers,
            divergence=Divergence("jsd")
            if compared is None
            else Divergence(compared.kind, compared.beta, compared.alpha),
            temperature=1.0 if compared is None else compared.temperature,
            t_squared=compared is not None and compared.t_squared,
            label_weight=label_weight,
            label_token_weights=None if own_N is None else F.pad(own_N, (0, len(hidden_MH) - count)),
            z_loss=terms.z_loss,
            blocks=micro.block_starts if len(micro.block_starts) > 1 else None,
            valid_vocab=None if self._alignment is None else self._alignment.valid,
            masked_ids=() if self._alignment is None else self._alignment.masked,
            form=self._form,
        )
        compared_as = "cross_entropy" if compared is not None and compared.kind == "sampled_ce" else "divergence"
        sums, sources = {"sft": result.cross_entropy.sum()}, {}
        for named, value_N, seen in zip(given, result.divergence, result.diagnostics, strict=True):
            values = {compared_as: value_N.sum(), **_sums(seen)}
            for name in named:
                sources[name] = values
                term = name.split("/")[0]
                sums[term] = sums.get(term, 0.0) + values[compared_as]
        return result.loss, sums, dict(sorted(sources.items()))


def _sums(seen: Diagnostics) -> dict[str, torch.Tensor]:
    return {field.name: getattr(seen, field.name).sum() for field in fields(seen)}


def _distances(
    name: str, distances: Mapping[int, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
    """Sum over rows and layers, and the sums over rows by layer, without gradients."""
    sums = {layer: value.detach().sum() for layer, value in distances.items()}
    seen = {f"{name}/{layer:02d}": {"distance": value} for layer, value in sums.items()}
    return torch.stack(list(sums.values())).sum(), seen
