"""What a stream shows on the way: previews by projection and by the VAE, and how near the picture they are.

python -m bench.previews        writes docs/previews.png
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio

from mmdit.artifact import Layout, shown
from mmdit.contract import Precision
from mmdit.errors import run_command
from mmdit.family import VAE_SCALE
from quality.metrics import similarity
from serve.client import Client, Picture, Progress
from serve.launcher import running
from serve.ports import Ports

PROMPTS = (
    "a large red circle on the left and a small blue cross on the right on a white background",
    "a small yellow triangle at the top and a large purple circle at the bottom on a gray background",
    "a large green cross in the centre on a brown background",
)
STEPS = 20
SHOWN = (1, 2, 4, 6, 8, 10, 12, 15, 18)
SIDE = 88  # pixels of a picture in the strip
LINE = 18  # pixels of a line of text
GAP = 4
PATH = Path("docs/previews.png")


@dataclass(frozen=True)
class Previews:
    """One picture and what was shown of it after each of its steps, by step."""

    prompt: str
    projected: dict[int, NDArray[np.uint8]]
    decoded: dict[int, NDArray[np.uint8]]
    picture: NDArray[np.uint8]


def previews_of(client: Client, prompt: str, seed: int) -> Previews:
    """Stream a picture twice, with either kind of previews."""
    kinds = []
    for with_vae in (False, True):
        updates = client.stream(prompt, seed=seed, steps=STEPS, preview_every=1, preview_with_vae=with_vae)
        previews = {}
        for update in updates:
            if isinstance(update, Picture):
                picture = update.image
            elif isinstance(update, Progress) and update.preview is not None:
                previews[update.step] = update.preview
        kinds.append(previews)
    return Previews(prompt, *kinds, picture)


def table(rows: list[Previews]) -> list[str]:
    """How near each step's previews are to the picture: the projection's to its block means, in dB; SSIM."""
    lines = [f"{'step':>4}  {'projection, PSNR':>16}  {'VAE, SSIM':>9}"]
    for step in SHOWN:
        decibels, alike = [], []
        for each in rows:
            height, width, _ = each.picture.shape
            blocks = each.picture.reshape(height // VAE_SCALE, VAE_SCALE, width // VAE_SCALE, VAE_SCALE, 3)
            means = np.round(blocks.mean((1, 3))).astype(np.uint8)
            decibels.append(peak_signal_noise_ratio(means, each.projected[step]))
            alike.append(similarity(each.decoded[step], each.picture))
        lines.append(f"{step:>4}  {np.mean(decibels):>13.1f} dB  {np.mean(alike):>9.3f}")
    return lines


def draw(rows: list[Previews], path: Path) -> None:
    """Draw them as PNG: for each prompt a row of projections and one of the VAE's, then the picture."""
    font = ImageFont.load_default(12)
    pitch = SIDE + GAP
    block = LINE + 2 * pitch + GAP
    left = 76
    strip = Image.new("RGB", (left + (len(SHOWN) + 1) * pitch, LINE + len(rows) * block), "white")
    pen = ImageDraw.Draw(strip)
    for column, label in enumerate([*(f"step {step}" for step in SHOWN), f"picture ({STEPS})"]):
        pen.text((left + column * pitch, 3), label, "black", font)
    for number, each in enumerate(rows):
        top = LINE + number * block
        pen.text((left, top + 2), each.prompt, "black", font)
        for line, (kind, previews) in enumerate((("projection", each.projected), ("VAE", each.decoded))):
            y = top + LINE + line * pitch
            pen.text((4, y + SIDE // 2 - 7), kind, "black", font)
            images = [*(previews[step] for step in SHOWN), each.picture]
            for column, image in enumerate(images):
                resized = Image.fromarray(image).resize(
                    (SIDE, SIDE), Image.Resampling.NEAREST if len(image) < SIDE else Image.Resampling.LANCZOS
                )
                strip.paste(resized, (left + column * pitch, y))
    strip.save(path, optimize=True)


def main() -> None:
    """Stream the prompts from a server over the miniature's FP16 repository."""
    layout, ports = Layout("miniature"), Ports.free()
    repository = layout.repository("cpu", Precision.FP16)
    log = layout.root / "triton" / "previews.log"
    with running(repository, ports, log), Client(f"localhost:{ports.grpc}") as client:
        rows = [previews_of(client, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    draw(rows, PATH)
    print("\n".join(table(rows)))
    print(shown(PATH))


if __name__ == "__main__":
    run_command(main)
