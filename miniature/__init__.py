"""The miniature: a whole Stable Diffusion 3.5 checkpoint in small, trained to draw simple scenes.

Everything in this repository can be run on it, without a GPU. `checkpoint/` is what the others load; the
rest of this folder is how it was made (`python -m miniature train`) and how it is judged
(`make evaluate`). README.md tells what is in it and which habits of the real repositories it copies.
"""
