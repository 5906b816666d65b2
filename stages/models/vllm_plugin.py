"""What vLLM loads in each of its processes before anything is computed (an entry point of `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Asks the system for Intel's AMX registers where the processor has them.

    vLLM's attention for bfloat16 on CPUs (0.32.0, `cpu_attn.py`) uses them as soon as the processor can, but Linux
    gives them only to a process that asked. Where no library did before, the worker dies of an illegal instruction.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
