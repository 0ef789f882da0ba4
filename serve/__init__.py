"""Engines → Triton repository → running server → client. `python -m serve --help`."""
