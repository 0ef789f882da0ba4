"""What every stage agrees on: model families, the tensor contract, shape sets, artifacts, errors."""
