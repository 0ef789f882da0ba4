"""ONNX to one engine for each component and GPU target: `python -m engines --help`."""
