"""Codecs of hidden states, and how faithful they are.

Dimension key: T tokens, H width of the model, r rank, C numbers stored of a token (H, or r with a basis), S states that
a basis is fitted on.

    float32: as they are.
    bfloat16: rounded to bfloat16; exact where the teacher runs in bfloat16.
    int8: symmetric, one scale a token: `scale = max |x| / 127`, `q = round(x / scale)`, decoded as `q * scale`.
    fp8: float8_e4m3fn (3 bits of mantissa), one scale a token: `scale = max |x| / 448`.
    low_rank: coefficients `c = B x` of an orthonormal basis B [r, H], in bfloat16, decoded as `B^T c`.
    low_rank_int8: these coefficients as in int8.

The basis of a layer are the leading eigenvectors of `sum x x^T / |x|^2`, which of all bases of rank r keeps the largest
mean squared cosine between a state and what is left of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.format import StatesCodec, is_low_rank

if TYPE_CHECKING:
    import torch

_LARGEST = {"int8": 127.0, "low_rank_int8": 127.0, "fp8": 448.0}
"""Largest code of the codecs that have a scale a token."""


def gram_of(states: torch.Tensor) -> torch.Tensor:
    """What a basis is fitted on: `sum x x^T / |x|^2`, float32 [H, H] (float64 of float64), on the states' device.

    Args:
        states: [S, H], any floating dtype. Those of several batches are added up.

    Raises:
        KdpipeError: the states hold NaN or infinity.
    """
    import torch

    rows_SH = _finite(states.detach())
    rows_SH = rows_SH.to(torch.float64 if rows_SH.dtype == torch.float64 else torch.float32)
    rows_SH = rows_SH / rows_SH.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return rows_SH.T @ rows_SH


def basis_of(gram: torch.Tensor, rank: int) -> np.ndarray:
    """The basis of a layer.

    Args:
        gram: [H, H], of `gram_of`.
        rank: r, at most H. Where there were fewer than r different directions the rest of the basis is arbitrary.

    Returns:
        float16 [r, H], rows orthonormal, the direction that matters most first; each row's largest entry is positive.

    Raises:
        KdpipeError: the rank is larger than the width.
    """
    import torch

    width = len(gram)
    if rank > width:
        raise KdpipeError(f"teachers.rank: {rank} is more than the width of the model, {width}. Lower it.")
    _, vectors_HH = torch.linalg.eigh(gram.double())
    basis_rH = vectors_HH.flip(1)[:, :rank].T
    peak_r1 = basis_rH.gather(1, basis_rH.abs().argmax(1, keepdim=True))
    return (basis_rH * peak_r1.sign()).half().cpu().numpy()


def fit_basis(states: torch.Tensor, rank: int) -> np.ndarray:
    """The basis of these states alone; see `gram_of` and `basis_of`."""
    return basis_of(gram_of(states), rank)


def encode_states(states: torch.Tensor, codec: StatesCodec, basis: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Encodes hidden states for storing; `encode_tensors`, brought to the host.

    Returns:
        `states` [T, C] in the codec's storage dtype (uint16 bits for bfloat16, uint8 for float8), and where the codec
        has scales `scale` float32 [T].
    """
    return {name: tensor.cpu().numpy() for name, tensor in encode_tensors(states, codec, basis).items()}


def encode_tensors(
    states: torch.Tensor, codec: StatesCodec, basis: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    """Encodes hidden states where they are.

    Args:
        states: [T, H], any floating dtype, any device.
        codec: name of the codec.
        basis: float16 [r, H] from `basis_of`, for the low-rank codecs.

    Returns:
        On the states' device, contiguous, in the dtypes that are stored: `states` [T, C], and where the codec has
        scales `scale` float32 [T].

    Raises:
        KdpipeError: the states hold NaN or infinity.
    """
    import torch

    if states.ndim != 2:
        raise ValueError(f"states have shape {tuple(states.shape)}, not [tokens, width]")
    states = _finite(states.detach())
    if codec == "float32":
        return {"states": states.float().contiguous()}
    if is_low_rank(codec):
        assert basis is not None
        states = states.float() @ torch.from_numpy(basis).to(states.device).float().T
    if codec in ("bfloat16", "low_rank"):
        states = states.to(torch.bfloat16)
        if not bool(torch.isfinite(states).all()):
            raise KdpipeError("hidden states are too large for bfloat16; set `teachers.states: float32`")
        return {"states": states.contiguous().view(torch.uint16)}
    if codec not in _LARGEST:
        raise ValueError(f"unknown codec {codec!r}")
    largest, states_TC = _LARGEST[codec], states.float()
    scale_T = states_TC.abs().amax(dim=1) / largest if states_TC.shape[1] else states_TC.new_zeros(len(states_TC))
    if not bool(torch.isfinite(scale_T).all()):
        raise KdpipeError("hidden states are too large for a basis; set `teachers.states: float32`")
    codes_TC = (states_TC / torch.where(scale_T > 0, scale_T, 1.0)[:, None]).clamp(-largest, largest)
    if codec == "fp8":
        return {"states": codes_TC.to(torch.float8_e4m3fn).contiguous().view(torch.uint8), "scale": scale_T}
    return {"states": codes_TC.round().to(torch.int8).contiguous(), "scale": scale_T}


def decode_states(arrays: Mapping[str, np.ndarray], codec: StatesCodec) -> torch.Tensor:
    """Decodes what `encode_states` made, or what the store gave back.

    Args:
        arrays: `states` [T, C], and where the codec has them `scale` [T] and `basis` [r, H].
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
    if codec == "low_rank":
        codes_TC = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).float()
    elif codec == "fp8":
        codes_TC = torch.from_numpy(stored).view(torch.float8_e4m3fn).float()
    elif codec in ("int8", "low_rank_int8"):
        codes_TC = torch.from_numpy(stored).float()
    else:
        raise ValueError(f"unknown codec {codec!r}")
    if "scale" in arrays:
        codes_TC = codes_TC * torch.from_numpy(arrays["scale"])[:, None]
    return codes_TC @ torch.from_numpy(arrays["basis"]).float() if is_low_rank(codec) else codes_TC


def _finite(states: torch.Tensor) -> torch.Tensor:
    import torch

    if not bool(torch.isfinite(states).all()):
        raise KdpipeError("hidden states hold NaN or infinity; run the teacher in a wider dtype (`dtype: float32`)")
    return states


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
