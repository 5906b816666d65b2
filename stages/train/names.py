"""Names of weights, in a checkpoint and in transformers' modules, and what configurations say of them. Light."""

from __future__ import annotations

NEVER_TRAINED = {
    "qwen2_audio": ("audio_tower.embed_positions.",),
    "qwen2_5_omni": ("visual.", "audio_tower.audio_bos_eos_token."),
}
"""What transformers keeps fixed (sinusoidal positions) and what no training sample reaches."""
_INNER = ("audio_tower.", "language_model.", "multi_modal_projector.")


def is_named(prefix: str, name: str, published: str, family: str) -> bool:
    """Whether an entry of `train.freeze` means a weight.

    Args:
        prefix: the entry: the beginning of a name, or `audio_tower`, `projector`, `embeddings`.
        name: of the weight in the model.
        published: its name in the checkpoint.
        family: the student's family.
    """
    projector = "audio_tower.proj." if family == "qwen2_5_omni" else "multi_modal_projector."
    if prefix == "audio_tower":
        return "audio_tower." in name and projector not in name
    if prefix == "projector":
        return projector in name
    if prefix == "embeddings":
        return name.endswith("embed_tokens.weight")
    return name.startswith(prefix) or published.startswith(prefix)


def canonical(family: str, name: str) -> str:
    """One name for a tensor, whether it stands in the checkpoint or in transformers' module tree."""
    if family == "qwen2_5_omni":
        return name.removeprefix("thinker.")
    inner = name.removeprefix("model.")
    if inner.startswith(_INNER):
        name = inner
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return name.replace("language_model.model.", "language_model.", 1)
