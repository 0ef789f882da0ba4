"""The figures of the gate: what each is called, and what it says."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Meaning:
    """A figure's label; `digits` behind the point where it is shown; `higher` is better, or lower."""

    label: str
    digits: int
    higher: bool
    explained: str


FIGURES = {
    "ssim_mean": Meaning("SSIM, mean", 4, True, "structural similarity of whole pictures"),
    "ssim_5th_percentile": Meaning("SSIM, 5th percentile", 4, True, "one picture in twenty is below"),
    "ssim_minimum": Meaning("SSIM, minimum", 4, True, "the picture that changed most"),
    "ssim_objects_mean": Meaning(
        "SSIM over objects, mean", 4, True, "without plain background, which is always alike"
    ),
    "ssim_objects_minimum": Meaning("SSIM over objects, minimum", 4, True, "the object that changed most"),
    "psnr_mean": Meaning("PSNR, mean, dB", 1, True, "peak signal-to-noise ratio"),
    "psnr_minimum": Meaning("PSNR, minimum, dB", 1, True, "of the picture that changed most"),
    "lpips_mean": Meaning("LPIPS, mean", 4, False, "perceptual distance (AlexNet)"),
    "clip_score_lost": Meaning(
        "CLIP score lost", 2, False, "how much less the pictures fit their prompts, of 100"
    ),
    "velocity_cosine_mean": Meaning(
        "velocity cosine, mean",
        5,
        True,
        "the MMDiT's own output, on the same latents at every step of the first 4 prompts",
    ),
    "velocity_cosine_minimum": Meaning(
        "velocity cosine, minimum", 5, True, "the worst step of the first 4 prompts' pictures"
    ),
    "velocity_error_mean": Meaning(
        "velocity error, mean", 4, False, "norm of the difference over norm of the velocity"
    ),
    "flawed_pictures": Meaning("black, flat or not finite", 0, False, "number of pictures that are none"),
    "reader_points_lost": Meaning(
        "reader's score lost, points", 1, False, "the worst of objects' colour, shape, size and place"
    ),
}


class Figure(BaseModel):
    """One figure of FP8 against FP16, and its floor: the same of FP16 against FP32.

    `fp8` is None where it could not be measured, and `absent` says why.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    fp8: float | None
    floor: float | None
    absent: str = ""
