"""What runs inside the server, beside each Python model; the packager copies this folder as it is.

Nothing here may import the rest of the checkout: numpy, and `tokenizers` in `text`, are all there is.
"""
