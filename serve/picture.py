"""What a server answers: pictures, and progress on the way to them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tritonclient.grpc import InferResult, service_pb2

from mmdit.errors import ServerError


@dataclass(frozen=True)
class Picture:
    """A picture, UINT8 [H, W, 3], with what made it: `request` holds the model's defaults too.

    `truncated`: the prompt was longer than an encoder reads.
    """

    image: npt.NDArray[np.uint8] = field(repr=False)
    seed: int
    truncated: bool
    request: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a PNG with the model, the prompt, the seed and the settings in its metadata."""
        information = PngInfo()
        height, width, _ = self.image.shape
        told = self.request | {"seed": self.seed, "height": height, "width": width}
        for name, value in sorted(told.items()):
            if not isinstance(value, np.ndarray):
                information.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.image).save(path, format="PNG", pnginfo=information)


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` is done, at noise level `sigma`.

    `preview`, where the step has one: UINT8 [h, w, 3], as small as the latents, or UINT8 [H, W, 3] by the
    VAE.
    """

    step: int
    steps: int
    sigma: float
    preview: npt.NDArray[np.uint8] | None = field(repr=False)


def picture_from(answer: service_pb2.ModelInferResponse, request: dict[str, Any]) -> Picture:
    """The picture in an answer, for a stream its last one; `request` is told with the model's defaults.

    Raises ServerError for an answer without a picture.
    """
    result = InferResult(answer)
    image, seed, truncated = (result.as_numpy(name) for name in ("image", "used_seed", "truncated"))
    if image is None:
        raise ServerError(f"{answer.model_name} ended without a picture")
    if seed is None or truncated is None:
        raise ServerError(
            f"{answer.model_name} gave the picture without its seed: Triton's cache holds what another "
            "client asked for; all clients of a server with cached pictures should ask for every output"
        )
    return Picture(image=image, seed=int(seed[0]), truncated=bool(truncated[0]), request=request)


def progress_from(answer: service_pb2.ModelStreamInferResponse) -> Progress:
    """The progress in an answer of a stream."""
    result = InferResult(answer.infer_response)
    step, steps, sigma = (result.as_numpy(name)[0] for name in ("step", "steps", "sigma"))
    return Progress(int(step), int(steps), float(sigma), result.as_numpy("preview"))
