"""How alike two pictures or two velocities are, and what makes a picture no picture at all.

Pictures are UINT8 [H, W, 3]. The window of SSIM is Wang et al.'s (2004): Gaussian, sigma 1.5, 11 pixels.
"""

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

Array = npt.NDArray[np.generic]
Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

MOST_PSNR = 100.0  # dB; of equal pictures it would be infinite, which JSON cannot hold
_BLACK = 12  # of 255: at most, in 99.9 % of a black picture's values
_FLAT = 2.0  # of 255: the standard deviation of a picture that shows nothing
_DETAIL = 2.0  # of 255: the standard deviation, over 7 pixels square, of what is no plain background
_GROWN = 4  # pixels around an object that count as the object's: its edge, and where it may have moved


def similarity(one: Picture, other: Picture) -> float:
    """SSIM of two pictures, from -1 to 1; 1 is the same picture."""
    return float(structural_similarity(one, other, **_SSIM))


def similarity_over(one: Picture, other: Picture, mask: Mask) -> float:
    """The mean of the SSIM map over the pixels of `mask` [H, W], or over all when it has none."""
    _, each = structural_similarity(one, other, full=True, **_SSIM)
    return float(each[mask].mean() if mask.any() else each.mean())


_SSIM = {
    "channel_axis": 2,
    "data_range": 255,
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
}


def drawn_objects(drawn: Picture) -> Mask:
    """Where a drawn scene of the miniature shows objects, with a margin of 4 pixels.

    `drawn` is the scene as miniature.scenes.draw makes it, whose corner is background.
    """
    return _with_margin((drawn != drawn[0, 0]).any(axis=-1))


def structured(picture: Picture) -> Mask:
    """Where any picture shows more than plain background, with a margin of 4 pixels.

    There the brightness has a standard deviation of over 2 of 255 within 7 × 7 pixels: skies, walls and
    studio backgrounds, which are alike in any two pictures and flatter SSIM, are left out.
    """
    grey = picture.astype(np.float64).mean(axis=-1)
    mean, mean_of_squares = ndimage.uniform_filter(grey, 7), ndimage.uniform_filter(grey**2, 7)
    return _with_margin(mean_of_squares - mean**2 > _DETAIL**2)


def psnr(one: Picture, other: Picture) -> float:
    """Peak signal-to-noise ratio in dB, at most 100."""
    if np.array_equal(one, other):
        return MOST_PSNR
    return min(float(peak_signal_noise_ratio(one, other, data_range=255)), MOST_PSNR)


def flaw(picture: Picture | None) -> str | None:
    """Why a picture is none: "not finite" (None stands for it), "black" or "flat"; None for a real one."""
    if picture is None:
        return "not finite"
    if np.percentile(picture, 99.9) <= _BLACK:
        return "black"
    return "flat" if picture.astype(np.float64).std(axis=(0, 1)).max() < _FLAT else None


def cosine(one: Array, other: Array) -> float:
    """The cosine between two arrays of one shape, taken as vectors; 0 where one of them is not finite."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    value = float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
    return value if np.isfinite(value) else 0.0


def relative_error(found: Array, expected: Array) -> float:
    """The norm of the difference over the norm of what was expected, at most 1000; 1000 if not finite."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    value = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
    return min(value, 1e3) if np.isfinite(value) else 1e3


def _with_margin(mask: Mask) -> Mask:
    grown: Mask = ndimage.binary_dilation(mask, iterations=_GROWN)
    return grown
