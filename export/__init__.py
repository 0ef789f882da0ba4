"""Checkpoint → ONNX → FP8 ONNX. `python -m export --help`."""
