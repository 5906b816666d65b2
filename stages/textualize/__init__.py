"""Textualize: clips become descriptions, and questions reasoning traces, with vLLM. Only `run` imports heavy packages."""
