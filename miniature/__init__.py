"""Makes the miniature: a whole Stable Diffusion 3.5 checkpoint in small, with random weights.

Everything in this repository can be run on it, on any machine and in seconds:

    python -m miniature --output build/miniature/checkpoint [--seed 0]

README.md beside this file tells what is in it and which habits of the real repositories it copies.
"""
