"""What every stage agrees on: model families, the tensor contract, shape sets, artifacts, errors."""

__version__ = "0.1.0"
