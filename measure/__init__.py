"""Speed and memory on a GPU, written into docs/measurements: `python -m measure --help`."""
