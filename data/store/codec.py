"""Codecs of hidden states, and how faithful they are.

Dimension key: T tokens, H width of the model.

    float32: as they are.
    bfloat16: rounded to bfloat16; exact where the teacher runs in bfloat16.
    int8: symmetric, one scale a token: `scale = max |x| / 127`, `q = round(x / scale)`, decoded as `q * scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.format import StatesCodec

if TYPE_CHECKING:
    import torch


def encode_states(states: torch.Tensor, codec: StatesCodec) -> dict[str, np.ndarray]:
    """Encodes hidden states for storing.

    Args:
        states: [T, H], any floating dtype, any device.
        codec: name of the codec.

    Returns:
        `states` [T, H] in the codec's storage dtype (uint16 bits for bfloat16), and for int8 `scale` float32 [T].

    Raises:
        KdpipeError: the states hold NaN or infinity.
    """
    import torch

    if states.ndim != 2:
        raise ValueError(f"states have shape {tuple(states.shape)}, not [tokens, width]")
    states = states.detach()
    if not bool(torch.isfinite(states).all()):
        raise KdpipeError("hidden states hold NaN or infinity; run the teacher in a wider dtype (`dtype: float32`)")
    if codec == "float32":
        return {"states": states.float().cpu().numpy()}
    if codec == "bfloat16":
        states = states.to(torch.bfloat16)
        if not bool(torch.isfinite(states).all()):
            raise KdpipeError("hidden states are too large for bfloat16; set `teachers.states: float32`")
        return {"states": states.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)}
    if codec == "int8":
        states_TH = states.float()
        scale_T = states_TH.abs().amax(dim=1) / 127 if states_TH.shape[1] else states_TH.new_zeros(len(states_TH))
        divisor_T1 = torch.where(scale_T > 0, scale_T, 1.0)[:, None]
        codes_TH = (states_TH / divisor_T1).round().clamp(-127, 127).to(torch.int8)
        return {"states": codes_TH.cpu().numpy(), "scale": scale_T.cpu().numpy()}
    raise ValueError(f"unknown codec {codec!r}")


def decode_states(arrays: Mapping[str, np.ndarray], codec: StatesCodec) -> torch.Tensor:
    """Decodes what `encode_states` made, or what the store gave back.

    Args:
        arrays: `states` [T, H] and, for int8, `scale` [T].
        codec: name of the codec.

    Returns:
        [T, H] on the CPU: bfloat16 for `bfloat16`, else float32. It may share memory with `arrays`.
    """
    import torch

    stored = arrays["states"]
    if codec == "float32":
        return torch.from_numpy(stored)
    if codec == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    if codec == "int8":
        return torch.from_numpy(stored).float() * torch.from_numpy(arrays["scale"])[:, None]
    raise ValueError(f"unknown codec {codec!r}")


class Fidelity:
    """Accumulates how close decoded states are to the true ones, token by token.

    The cosine of a token is that between its true and its decoded state; two zero states count as 1.
    The relative error is `sqrt(sum (decoded - true)^2 / sum true^2)` over everything seen.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._cosine_sum = 0.0
        self._cosine_worst = 1.0
        self._error = 0.0
        self._energy = 0.0

    def update(self, states: torch.Tensor, decoded: torch.Tensor) -> None:
        """Takes in true and decoded states, both [T, H] on the same device."""
        import torch

        if states.shape != decoded.shape:
            raise ValueError(f"shapes {tuple(states.shape)} and {tuple(decoded.shape)} differ")
        if not len(states):
            return
        true_TH, decoded_TH = states.detach().double(), decoded.detach().double()
        error_T = (decoded_TH - true_TH).square().sum(1)
        energy_T, decoded_energy_T = true_TH.square().sum(1), decoded_TH.square().sum(1)
        norms_T = (energy_T * decoded_energy_T).sqrt()
        cosine_T = torch.where(norms_T > 0, (true_TH * decoded_TH).sum(1) / norms_T.clamp_min(1e-300), 0.0)
        cosine_T = torch.where(error_T == 0, 1.0, cosine_T).clamp(-1, 1)
        self._tokens += len(states)
        self._cosine_sum += float(cosine_T.sum())
        self._cosine_worst = min(self._cosine_worst, float(cosine_T.min()))
        self._error += float(error_T.sum())
        self._energy += float(energy_T.sum())

    def result(self) -> dict[str, Any]:
        """Tokens seen, mean and worst cosine, and relative error, as plain numbers for a part's attributes."""
        relative = math.sqrt(self._error / self._energy) if self._energy else 0.0
        return {
            "tokens": self._tokens,
            "cosine_mean": self._cosine_sum / self._tokens if self._tokens else 1.0,
            "cosine_worst": self._cosine_worst,
            "relative_error": relative,
        }
