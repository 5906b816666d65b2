"""Writes miniature model folders that are genuine: real classes, published file names and weight names.

Sizes are chosen so that teacher and students differ in width, depth and padded vocabulary, as the published ones do.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.miniature import tokenizer as tokens
from kdpipe.stages.miniature import world

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin, WhisperFeatureExtractor

BPE_SIZE = 480
"""Ordinary ids of the shared BPE."""
TEACHER_ROWS, QWEN2_AUDIO_ROWS, OMNI_ROWS = 512, 544, 528
"""Rows of the output heads, all beyond the tokenizers' sizes."""
QWEN2_AUDIO_SECONDS = 30
MEL_BINS = 80
HEAD_DIM = 32
"""The smallest head size that vLLM's CPU attention supports."""

_TEXT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_AUDIO_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or content['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "AUDIO_MARK"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN2_AUDIO_TEMPLATE = _AUDIO_TEMPLATE.replace(
    "AUDIO_MARK", "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
)
_OMNI_TEMPLATE = _AUDIO_TEMPLATE.replace("AUDIO_MARK", "<|audio_bos|><|AUDIO|><|audio_eos|>")


@dataclass(frozen=True)
class Miniatures:
    """The folders of one family of miniatures, and the sizes of their tokenizers (special tokens included).

    Attributes:
        teacher: Qwen3 text model.
        qwen2_audio: Qwen2-Audio model.
        qwen2_5_omni: Qwen2.5-Omni model, thinker only.
        bpe_size: Ordinary ids, the same in all three; ids from here on are special tokens and collide.
        teacher_tokens: Size of the teacher's tokenizer.
        audio_tokens: Size of the tokenizer of both audio models.
    """

    teacher: Path
    qwen2_audio: Path
    qwen2_5_omni: Path
    bpe_size: int
    teacher_tokens: int
    audio_tokens: int


def make_family(folder: Path, *, seed: int = 0, audio_seconds: int = 3) -> Miniatures:
    """Makes an untaught teacher and both untaught students under `folder`, with one BPE trained on the world's texts.

    Args:
        folder: Receives `teacher/`, `qwen2_audio/` and `qwen2_5_omni/`.
        seed: Seed of the weights and the texts.
        audio_seconds: The longest audio that the Omni model hears, in seconds (Qwen2-Audio: always 30).

    Returns:
        Paths and tokenizer sizes.
    """
    text_tokenizer, audio_tokenizer = make_tokenizers(seed=seed)
    return Miniatures(
        teacher=make_qwen3(folder / "teacher", tokenizer=text_tokenizer, seed=seed),
        qwen2_audio=make_qwen2_audio(folder / "qwen2_audio", tokenizer=audio_tokenizer, seed=seed + 1),
        qwen2_5_omni=make_qwen2_5_omni(
            folder / "qwen2_5_omni", tokenizer=audio_tokenizer, audio_seconds=audio_seconds, seed=seed + 2
        ),
        bpe_size=BPE_SIZE,
        teacher_tokens=len(text_tokenizer),
        audio_tokens=len(audio_tokenizer),
    )


def make_tokenizers(
    *, seed: int = 0, texts: Sequence[str] | None = None
) -> tuple["PreTrainedTokenizerFast", "PreTrainedTokenizerFast"]:
    """Trains the tokenizers of text models and of audio models: the same ordinary ids, different special tokens.

    Args:
        seed: Seed of the texts of the world of tones.
        texts: Texts to train on in their place.
    """
    texts = list(world.texts(300, seed=seed)) if texts is None else texts
    return (
        tokens.train_tokenizer(texts, BPE_SIZE, tokens.TEXT_SPECIALS),
        tokens.train_tokenizer(texts, BPE_SIZE, tokens.AUDIO_SPECIALS),
    )


def make_qwen3(
    folder: Path,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    hidden: int = 128,
    layers: int = 6,
    rows: int = TEACHER_ROWS,
    seed: int = 0,
) -> Path:
    """Writes an untaught `Qwen3ForCausalLM` with tokenizer, ChatML template and generation config.

    Args:
        folder: Receives the model.
        tokenizer: A tokenizer with `TEXT_SPECIALS`.
        hidden: Width.
        layers: Depth.
        rows: Rows of embedding and output head, at least the tokenizer's size.
        seed: Seed of the weights.

    Returns:
        `folder`.

    Raises:
        KdpipeError: `rows` is below the tokenizer's size.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        vocab_size=_check_rows(rows, tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **_ends(tokenizer),
    )
    torch.manual_seed(seed)
    _save_model(Qwen3ForCausalLM(config), folder, tokenizer)
    tokenizer.chat_template = _TEXT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def make_qwen2_audio(
    folder: Path,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    hidden: int = 96,
    layers: int = 4,
    encoder_hidden: int = 64,
    encoder_layers: int = 2,
    rows: int = QWEN2_AUDIO_ROWS,
    seed: int = 0,
) -> Path:
    """Writes an untaught `Qwen2AudioForConditionalGeneration` with its processor, under the published weight names.

    Its window is 30 s as published, since vLLM takes no other: it checks for 3000 mel frames. So every clip costs the
    encoder 1500 positions, however short it is.

    Args:
        folder: Receives the model.
        tokenizer: A tokenizer with `AUDIO_SPECIALS`.
        hidden: Width of the text stack, a multiple of 32.
        layers: Depth of the text stack.
        encoder_hidden: Width of the audio encoder.
        encoder_layers: Depth of the audio encoder.
        rows: Rows of embedding and output head, at least the tokenizer's size.
        seed: Seed of the weights.

    Returns:
        `folder`.

    Raises:
        KdpipeError: `rows` is below the tokenizer's size.
    """
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

    config = Qwen2AudioConfig(
        audio_config={
            **_encoder(encoder_hidden, encoder_layers),
            "model_type": "qwen2_audio_encoder",
            "max_source_positions": 50 * QWEN2_AUDIO_SECONDS,
        },
        text_config={
            **_text_stack(hidden, layers, _check_rows(rows, tokenizer)),
            "model_type": "qwen2",
            **_ends(tokenizer),
        },
        audio_token_index=_id(tokenizer, tokens.AUDIO),
        **_ends(tokenizer),
    )
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    _save_model(model, folder, tokenizer)
    processor = Qwen2AudioProcessor(
        feature_extractor=_feature_extractor(QWEN2_AUDIO_SECONDS),
        tokenizer=tokenizer,
        chat_template=_QWEN2_AUDIO_TEMPLATE,
    )
    _save_processor(processor, folder, {})
    return folder


def make_qwen2_5_omni(
    folder: Path,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    hidden: int = 96,
    layers: int = 4,
    encoder_hidden: int = 96,
    encoder_layers: int = 2,
    rows: int = OMNI_ROWS,
    audio_seconds: int = 3,
    seed: int = 0,
) -> Path:
    """Writes an untaught Qwen2.5-Omni folder like the published one, as far as the thinker goes.

    Weights are named `thinker.*`; talker and vocoder are absent and `enable_audio_output` is false.

    Args:
        folder: Receives the model.
        tokenizer: A tokenizer with `AUDIO_SPECIALS`.
        hidden: Width of the text stack, a multiple of 32.
        layers: Depth of the text stack.
        encoder_hidden: Width of the audio encoder.
        encoder_layers: Depth of the audio encoder.
        rows: Rows of embedding and output head, at least the tokenizer's size.
        audio_seconds: The longest audio in seconds; 25 audio tokens each.
        seed: Seed of the weights.

    Returns:
        `folder`.

    Raises:
        KdpipeError: `rows` is below the tokenizer's size.
    """
    from transformers import (
        Qwen2_5OmniConfig,
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    config = Qwen2_5OmniConfig(
        thinker_config={
            "audio_config": {
                **_encoder(encoder_hidden, encoder_layers),
                "output_dim": hidden,
                "max_source_positions": 50 * audio_seconds,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": hidden,
                "fullatt_block_indexes": [0],
            },
            "text_config": {
                **_text_stack(hidden, layers, _check_rows(rows, tokenizer)),
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1_000_000.0,
                    "mrope_section": [HEAD_DIM // 8, 3 * HEAD_DIM // 16, 3 * HEAD_DIM // 16],
                },
                **_ends(tokenizer),
            },
            "audio_token_index": _id(tokenizer, tokens.AUDIO),
            "image_token_index": _id(tokenizer, tokens.IMAGE),
            "video_token_index": _id(tokenizer, tokens.VIDEO),
            "audio_start_token_id": _id(tokenizer, tokens.AUDIO_START),
            "audio_end_token_id": _id(tokenizer, tokens.AUDIO_END),
            "vision_start_token_id": _id(tokenizer, tokens.VISION_START),
            "vision_end_token_id": _id(tokenizer, tokens.VISION_END),
            **_ends(tokenizer),
        },
        enable_audio_output=False,
    )
    torch.manual_seed(seed)
    thinker: Any = config.thinker_config
    model = Qwen2_5OmniThinkerForConditionalGeneration(thinker)
    images = Qwen2VLImageProcessor()
    processor = Qwen2_5OmniProcessor(
        image_processor=images,
        video_processor=Qwen2VLVideoProcessor(),
        feature_extractor=_feature_extractor(audio_seconds),
        tokenizer=tokenizer,
        chat_template=_OMNI_TEMPLATE,
    )
    _save_model(model, folder, tokenizer)
    config.architectures = ["Qwen2_5OmniModel"]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    _save_processor(processor, folder, images.to_dict())
    return folder


def save_weights(model: "PreTrainedModel", folder: Path) -> None:
    """Writes `model.safetensors` under the published weight names of the model's class.

    Not `model.save_pretrained`: of a model made from a configuration it writes names of its own, which vLLM does not
    know, and of an Omni thinker it would replace the configuration too.

    Args:
        model: A model of one of the three classes.
        folder: Receives the file.
    """
    rename = _PUBLISHED.get(type(model).__name__, str)
    weights = {rename(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _check_rows(rows: int, tokenizer: "PreTrainedTokenizerFast") -> int:
    if rows < len(tokenizer):
        raise KdpipeError(f"{rows} output rows cannot hold a tokenizer of {len(tokenizer)} ids; ask for more rows")
    return rows


def _id(tokenizer: "PreTrainedTokenizerFast", token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def _ends(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    return {
        "bos_token_id": _id(tokenizer, tokens.END_OF_TEXT),
        "eos_token_id": _id(tokenizer, tokens.TURN_END),
        "pad_token_id": _id(tokenizer, tokens.END_OF_TEXT),
    }


def _text_stack(hidden: int, layers: int, rows: int) -> dict[str, Any]:
    """Configuration fields of a Qwen2 text stack."""
    heads = hidden // HEAD_DIM
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


def _encoder(hidden: int, layers: int) -> dict[str, Any]:
    """Configuration fields of a Whisper-like encoder."""
    return {
        "d_model": hidden,
        "encoder_layers": layers,
        "encoder_attention_heads": hidden // HEAD_DIM,
        "encoder_ffn_dim": 2 * hidden,
        "num_mel_bins": MEL_BINS,
    }


def _feature_extractor(audio_seconds: int) -> "WhisperFeatureExtractor":
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(
        feature_size=MEL_BINS, chunk_length=audio_seconds, sampling_rate=world.SAMPLE_RATE, return_attention_mask=True
    )


def _save_model(
    model: "PreTrainedModel",
    folder: Path,
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    """Writes configuration, generation configuration and weights."""
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    GenerationConfig(do_sample=False, **_ends(tokenizer)).save_pretrained(folder)
    save_weights(model, folder)


def _save_processor(processor: "ProcessorMixin", folder: Path, other: dict[str, Any]) -> None:
    """Writes tokenizer, chat template and, as published folders have it, one `preprocessor_config.json`."""
    processor.save_pretrained(folder)
    (folder / "processor_config.json").unlink()
    fields = {**other, **processor.feature_extractor.to_dict(), "processor_class": type(processor).__name__}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=2, default=str) + "\n")


def _qwen2_audio_name(name: str) -> str:
    """The published name of a weight of transformers' `Qwen2AudioForConditionalGeneration`."""
    for ours, published in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name.removeprefix("model.")


_PUBLISHED: dict[str, Callable[[str], str]] = {
    "Qwen2AudioForConditionalGeneration": _qwen2_audio_name,
    "Qwen2_5OmniThinkerForConditionalGeneration": "thinker.{}".format,
}
