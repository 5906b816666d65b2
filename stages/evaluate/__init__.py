"""Evaluate: the student, and the untouched one beside it, answer a split with vLLM. Only `run` imports heavy packages."""
