"""Miniature but genuine checkpoints, and the small world of tones that they can learn in minutes.

`world` synthesizes clips with questions and gold traces, `tokenizer` trains the byte-level BPE that all models share,
`models` writes untaught Qwen3, Qwen2-Audio and Qwen2.5-Omni folders, `teach` trains the textual teacher and the base
student.
"""
