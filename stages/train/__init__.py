"""Teaches the student from the cached teachers, and writes it as a folder that transformers and vLLM load."""
