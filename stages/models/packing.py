"""Sequences one after the other in a single row, without padding.

transformers builds the attention mask of a model that is given positions and no mask from the positions alone: where
they start anew a sequence starts, and no token sees one of another sequence (`masking_utils`, packed sequences). Audio
features are put in at the audio tokens in their order, which stays what it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from kdpipe.stages.models.inputs import Batch


def pack(batch: Batch, family: str) -> Batch:
    """The same sequences in one row: hidden states at the rows of the new batch are those at the rows of the old.

    Args:
        batch: padded on the right.
        family: of the model. Qwen2.5-Omni counts positions on three axes, which agree where there is no image, and
            finds sequences by a fourth.
    """
    kept = batch.attention_mask.bool().flatten()
    place = kept.cumsum(0) - 1
    positions = (batch.attention_mask.cumsum(1) - 1).flatten()[kept][None]
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids.flatten()[kept][None],
        attention_mask=torch.ones_like(positions),
        response_rows=place[batch.response_rows],
        audio_rows=place[batch.audio_rows],
        position_ids=positions[None].expand(4, -1, -1) if family == "qwen2_5_omni" else positions,
    )


def split_by_size(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups sequences, from long to short, so that each group has at most `budget` tokens; a longer one is alone.

    Returns:
        Places in `lengths`.
    """
    groups: list[list[int]] = []
    sizes: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fits = next((index for index, size in enumerate(sizes) if size + lengths[place] <= budget), None)
        if fits is None:
            groups.append([place])
            sizes.append(lengths[place])
        else:
            groups[fits].append(place)
            sizes[fits] += lengths[place]
    return groups
