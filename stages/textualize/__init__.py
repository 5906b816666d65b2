"""Textualize: clips become descriptions, questions reasoning traces, with vLLM. Only `run` imports heavy packages."""
