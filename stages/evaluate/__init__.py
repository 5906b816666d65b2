"""Evaluate: the student, and the untouched one beside it, answer with vLLM. Only `run` imports heavy packages."""
