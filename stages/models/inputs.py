"""From clips and text to what a model's forward pass takes; no weights.

Two families of audio models share one scheme: a Whisper feature extractor, and one placeholder token in the prompt
that becomes as many as the clip has audio tokens,

    mel = ceil(frames / hop);  L = (mel - 1) // 2 + 1;  tokens = (L - 2) // 2 + 1

(two strided convolutions and a pooling; 25 tokens a second at 16 kHz and hop 160). Text models take text alone.

Dimension key: B examples, L longest sequence of the batch, T response tokens, A audio tokens, C clips, M mel bins,
F mel frames.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor

from kdpipe.data.errors import ModelError, Rejected
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.prompt import messages, render

AUDIO_TOKEN = "<|AUDIO|>"
TURN_END = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: a prompt whose audio placeholders are expanded, and the response that follows it.

    Attributes:
        id: sample id.
        prompt_ids: token ids up to where the response starts.
        target_ids: token ids of the response, end token included; may be empty.
        features: what `Encoder.features` gave for its clips; empty for text.
    """

    id: str
    prompt_ids: Sequence[int] | np.ndarray
    target_ids: Sequence[int] | np.ndarray = ()
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return len(self.prompt_ids) + len(self.target_ids)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right. Row indices point into hidden states flattened to `[B * L, H]`.

    Attributes:
        ids: sample ids, in order.
        input_ids: [B, L] int64.
        attention_mask: [B, L] int64, 0 at padding.
        features: `input_features` float32 [C, M, F] and `feature_attention_mask` int64 [C, F] of all clips in order,
            or nothing.
        targets: [T] int64, the responses one after the other.
        response_rows: [T] int64, the row whose state predicts each of `targets`.
        response_offsets: B + 1 bounds of the examples within `targets`.
        audio_rows: [A] int64, the rows of the audio tokens.
        audio_offsets: B + 1 bounds of the examples within `audio_rows`.
        position_ids: of packed examples (`kdpipe.stages.models.packing`), which then stand in one row: [1, L] or
            [axes, 1, L] int64, anew from 0 for each example; None: they are padded.
    """

    ids: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    features: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    response_rows: torch.Tensor
    response_offsets: tuple[int, ...]
    audio_rows: torch.Tensor
    audio_offsets: tuple[int, ...]
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        features = {name: value.to(device) for name, value in self.features.items()}
        return Batch(
            ids=self.ids,
            features=features,
            response_offsets=self.response_offsets,
            audio_offsets=self.audio_offsets,
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            **moved,
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        if self.position_ids is None:
            return self.attention_mask.sum(1).tolist()
        last = self.position_ids.reshape(-1, self.input_ids.shape[1])[0]
        starts = [*(last == 0).nonzero().flatten().tolist(), len(last)]
        return [stop - start for start, stop in pairwise(starts)]

    @property
    def forward(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's forward pass."""
        if self.position_ids is not None:
            return {"input_ids": self.input_ids, "position_ids": self.position_ids, **self.features}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.features}


_TENSORS = ("input_ids", "attention_mask", "targets", "response_rows", "audio_rows")


class Encoder:
    """Tokenizer, chat template and feature extractor of a model. Safe to share between threads.

    Args:
        folder: the model.

    Raises:
        ModelError: the tokenizer, the chat template or the feature extractor is missing or cannot be used.
    """

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        trust = folder.settings.trust_remote_code
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=trust, local_files_only=True)
        except Exception as error:  # of damaged files transformers raises whatever its parts do
            why = " ".join(str(error).split())
            raise ModelError(
                f"{folder.name}: the tokenizer in {folder.path} cannot be loaded ({why}). Restore its files."
            ) from None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"{folder.name}: kdpipe needs a fast tokenizer. Add tokenizer.json to {folder.path}.")
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = tuple(sorted({str(token) for token in added.values() if token.special}))
        self._prompts = _plain_copy(backend, split_special=False)
        self._targets = _plain_copy(backend, split_special=True)
        self.end_id = self._end_id()
        self.audio_id: int | None = None
        self._extractor: WhisperFeatureExtractor | None = None
        if folder.hears:
            self.audio_id = tokenizer.get_vocab().get(AUDIO_TOKEN)
            if self.audio_id is None:
                raise ModelError(f"{folder.name}: the tokenizer has no {AUDIO_TOKEN} to stand for a clip.")
            self._extractor = _load_extractor(folder)
        self._template = self._load_template()

    def _end_id(self) -> int:
        names = {str(token): index for index, token in self.tokenizer.added_tokens_decoder.items()}
        index = names.get(TURN_END, self.tokenizer.eos_token_id)
        if index is None:
            raise ModelError(f"{self.folder.name}: the tokenizer has neither {TURN_END} nor an end-of-sequence token.")
        return int(index)

    def _load_template(self) -> str:
        """The chat template: chat_template.jinja, chat_template.json, tokenizer_config.json, or the family's own."""
        folder = self.folder.path
        if (folder / "chat_template.jinja").exists():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if (folder / "chat_template.json").exists():
            return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
        if self.tokenizer.chat_template is not None:
            return self.tokenizer.get_chat_template()
        if self.folder.family == "qwen2_audio":
            from transformers import Qwen2AudioProcessor

            template = Qwen2AudioProcessor(self._extractor, self.tokenizer).chat_template
            assert isinstance(template, str)
            return template
        raise ModelError(f"{self.folder.name}: has no chat template. Use the instruction-tuned checkpoint.")

    @property
    def rate(self) -> int:
        """Sample rate the model hears at (Hz)."""
        return self._hearing.sampling_rate

    @property
    def max_audio_seconds(self) -> float:
        """Longest clip that the feature extractor takes whole (seconds)."""
        return self._hearing.n_samples / self.rate

    @property
    def _hearing(self) -> WhisperFeatureExtractor:
        if self._extractor is None:
            raise ModelError(f"{self.folder.name}: is a text model and cannot hear. Name an audio model here.")
        return self._extractor

    def mel_frames(self, frames: int) -> int:
        """Mel frames of a clip.

        Args:
            frames: length of the clip at `rate`.

        Raises:
            Rejected: `audio_too_long`, more than the feature extractor takes; nothing is ever cut off.
        """
        if frames > self._hearing.n_samples:
            raise Rejected(
                "audio_too_long",
                f"the clip lasts {frames / self.rate:.2f} s and the model hears {self.max_audio_seconds:g} s at most",
            )
        return -(-frames // self._hearing.hop_length)

    def audio_tokens(self, frames: int) -> int:
        """Audio tokens of a clip of `frames` samples at `rate`.

        Raises:
            Rejected: `audio_too_long`, as `mel_frames` does, or `audio_too_short` for a clip without any token.
        """
        tokens = ((self.mel_frames(frames) - 1) // 2 - 1) // 2 + 1
        if tokens < 1:
            raise Rejected("audio_too_short", f"the clip has {frames} frames at {self.rate} Hz: no audio token")
        return tokens

    def tower_positions(self, frames: int) -> int:
        """Positions that the audio tower attends over for a clip: what the clip costs beside its audio tokens."""
        window = self._hearing.nb_max_frames
        return (window if self.folder.family == "qwen2_audio" else self.mel_frames(frames)) // 2

    def prompt_text(self, text: str, *, system: str | None = None, clips: int = 0, **chat: Any) -> str:
        """The chat-templated prompt, one placeholder a clip, ending where the response starts.

        Args:
            text: the user's text.
            system: system message; None leaves it to the template.
            clips: number of clips, which stand before the text.
            chat: passed to the chat template.
        """
        turns = messages(text, system=system, clips=clips)
        return render(self.tokenizer, turns, chat_template=self._template, **chat)

    def prompt_ids(self, prompt_text: str, clip_frames: Sequence[int] = ()) -> list[int]:
        """Tokenizes a prompt, each placeholder expanded to its clip's audio tokens.

        Args:
            prompt_text: from `prompt_text`.
            clip_frames: length of each clip at `rate`.

        Raises:
            ModelError: the prompt has another number of placeholders.
            Rejected: `audio_too_long` or `audio_too_short`.
        """
        if self.folder.hears:
            pieces = prompt_text.split(AUDIO_TOKEN)
            if len(pieces) != len(clip_frames) + 1:
                raise ModelError(
                    f"{self.folder.name}: the prompt holds {len(pieces) - 1} placeholders {AUDIO_TOKEN} for "
                    f"{len(clip_frames)} clips. Its chat template does not suit kdpipe."
                )
            expanded = [AUDIO_TOKEN * self.audio_tokens(frames) for frames in clip_frames]
            prompt_text = "".join(piece + audio for piece, audio in zip(pieces, [*expanded, ""], strict=True))
        return self._prompts.encode(prompt_text, add_special_tokens=False).ids

    def target_ids(self, text: str) -> list[int]:
        """Tokenizes a response as plain text and adds the end token.

        Text that looks like a special token becomes ordinary tokens. The end token is `<|im_end|>`, which ends every
        turn of the supported families, or the tokenizer's end-of-sequence token where there is none.
        """
        return [*self._targets.encode(text, add_special_tokens=False).ids, self.end_id]

    def features(self, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Log-mel features, equal to what the model's processor gives at the frames it does not mask.

        Args:
            clips: float32 [frames] each, mono, at `rate`.

        Returns:
            `input_features` float32 [C, M, F] and `feature_attention_mask` int64 [C, F]; nothing for no clips. F is
            the model's whole window for Qwen2-Audio, whose tower takes no other, and else the longest clip's.

        Raises:
            Rejected: `audio_too_long`.
        """
        if not len(clips):
            return {}
        extractor = self._hearing
        longest = max(self.mel_frames(len(clip)) for clip in clips)
        window = extractor.n_samples
        if self.folder.family != "qwen2_audio":
            # Zeros of one analysis window behind the clip keep reflected padding out of the frames that count.
            window = min(window, (longest + -(-extractor.n_fft // extractor.hop_length)) * extractor.hop_length)
        made = extractor(
            [np.asarray(clip, dtype=np.float32) for clip in clips],
            sampling_rate=self.rate,
            padding="max_length",
            max_length=window,
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        )
        kept = extractor.nb_max_frames if self.folder.family == "qwen2_audio" else longest
        return {
            "input_features": made["input_features"][..., :kept].contiguous(),
            "feature_attention_mask": made["attention_mask"][..., :kept].to(torch.int64).contiguous(),
        }

    def collate(self, items: Sequence[Example], pad_id: int | None = None) -> Batch:
        """Pads examples on the right and finds their rows.

        Args:
            items: at least one example; all with clips or all without.
            pad_id: id to pad with, which attention never sees; None: the tokenizer's.
        """
        if pad_id is None:
            pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_id
        longest = max(item.length for item in items)
        input_ids = torch.full((len(items), longest), pad_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(items), longest), dtype=torch.int64)
        targets, response_rows, audio_rows = [], [], []
        response_offsets, audio_offsets = [0], [0]
        for place, item in enumerate(items):
            sequence = torch.cat(
                [torch.as_tensor(ids, dtype=torch.int64) for ids in (item.prompt_ids, item.target_ids)]
            )
            input_ids[place, : len(sequence)] = sequence
            attention_mask[place, : len(sequence)] = 1
            start, prompt, response = place * longest, len(item.prompt_ids), len(item.target_ids)
            targets.append(sequence[prompt:])
            response_rows.append(torch.arange(response, dtype=torch.int64) + (start + prompt - 1))
            response_offsets.append(response_offsets[-1] + response)
            heard = sequence[:prompt] == self.audio_id if self.audio_id is not None else sequence[:0].bool()
            audio_rows.append(heard.nonzero().squeeze(1) + start)
            audio_offsets.append(audio_offsets[-1] + len(audio_rows[-1]))
        return Batch(
            ids=tuple(item.id for item in items),
            input_ids=input_ids,
            attention_mask=attention_mask,
            features=_stack_features([item.features for item in items]),
            targets=torch.cat(targets),
            response_rows=torch.cat(response_rows),
            response_offsets=tuple(response_offsets),
            audio_rows=torch.cat(audio_rows),
            audio_offsets=tuple(audio_offsets),
        )


def _plain_copy(backend: Any, *, split_special: bool) -> Any:
    """A tokenizer of its own, so that no call from another thread changes its settings."""
    mine = copy.deepcopy(backend)
    mine.no_truncation()
    mine.no_padding()
    mine.encode_special_tokens = split_special
    return mine


def _load_extractor(folder: ModelFolder) -> WhisperFeatureExtractor:
    try:
        return WhisperFeatureExtractor.from_pretrained(folder.path, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelError(
            f"{folder.name}: the feature extractor in {folder.path} cannot be loaded ({error}). "
            "Restore preprocessor_config.json."
        ) from None


def _stack_features(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Puts the clips of all examples together, shorter ones padded with zeros behind."""
    filled = [item for item in items if item]
    if not filled:
        return {}
    longest = max(item["input_features"].shape[-1] for item in filled)

    def padded(name: str) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(item[name], (0, longest - item[name].shape[-1])) for item in filled])

    return {name: padded(name) for name in ("input_features", "feature_attention_mask")}
