"""A byte-level BPE trained on the spot, with ids that collide between model families as Qwen's do."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kdpipe.data.errors import KdpipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
AUDIO, AUDIO_START, AUDIO_END = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
IMAGE, VIDEO, VISION_START, VISION_END = "<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"

TEXT_SPECIALS = (
    *(END_OF_TEXT, TURN_START, TURN_END),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<think>", "</think>"),
)
"""Special tokens of a text model, in the order of Qwen3's ids from 151643 on."""
AUDIO_SPECIALS = (
    *(END_OF_TEXT, TURN_START, TURN_END),
    *(AUDIO, AUDIO_START, AUDIO_END, "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *(VISION_START, VISION_END, "<|vision_pad|>", IMAGE, VIDEO),
)
"""Special tokens of an audio model, in the order of Qwen2.5-Omni's ids from 151643 on."""
_NAMES = {
    "audio_token": AUDIO,
    "audio_bos_token": AUDIO_START,
    "audio_eos_token": AUDIO_END,
    "image_token": IMAGE,
    "video_token": VIDEO,
    "vision_bos_token": VISION_START,
    "vision_eos_token": VISION_END,
}
"""Attributes under which a processor asks its tokenizer for special tokens."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's split into words: every digit stands alone."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE like Qwen's: ordinary ids first, then the special tokens.

    The same texts and vocabulary size give the same ordinary ids whatever the special tokens are, so two tokenizers
    trained with different special tokens differ only there.

    Args:
        texts: The training corpus.
        vocab_size: Number of ordinary ids, the 256 bytes included.
        specials: Special tokens, given the ids from `vocab_size` on.

    Returns:
        The tokenizer; `<|im_end|>` ends a response and `<|endoftext|>` pads.

    Raises:
        KdpipeError: The texts hold too few distinct pairs for `vocab_size`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise KdpipeError(
            f"the texts give {bpe.get_vocab_size()} ordinary tokens, not {vocab_size}; "
            "ask for a smaller vocab_size or bring more varied texts"
        )
    bpe.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=32_768,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={name: token for name, token in _NAMES.items() if token in specials},
    )
