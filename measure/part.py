"""One part of a measurement in a process of its own: `python -m measure.part '<Part as JSON>'`.

Prints a line of JSON for each number of rows as soon as it is measured, so that this survives what comes
after it: a crash, a lack of memory, the end of the part's time. With no argument it describes the machine.
"""

import json
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from measure.geometry import config_of
from measure.timing import timed


class Part(BaseModel):
    """A model in one variant at `size` = (height, width) in pixels, on "cuda" or "cpu".

    The weights are those of the transformer in the folder `weights`, else random ones of `model`'s geometry.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    variant: str
    size: tuple[int, int]
    rows: tuple[int, ...]
    device: str = "cuda"
    toy: bool = False
    weights: Path | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of diffusers' SD3Transformer2DModel."""
        if self.weights is None:
            return config_of(self.model, toy=self.toy)
        content = json.loads((self.weights / "config.json").read_text(encoding="utf-8"))
        return {name: value for name, value in content.items() if not name.startswith("_")}


def main() -> None:
    """Measure the part that the command line gives, or describe the machine."""
    warnings.simplefilter("ignore")  # ModelOpt's about versions and experiments, torch's about its compiler
    if len(sys.argv) == 1:
        print(json.dumps(machine()))
        return
    import diffusers.utils.logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    measure(Part.model_validate_json(sys.argv[1]))


def machine() -> dict[str, Any]:
    """The GPU that torch sees, or None, and the versions of what is measured."""
    import torch

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        **{name: metadata.version(name) for name in ("torch", "diffusers", "nvidia-modelopt")},
    }


def measure(part: Part) -> None:
    """Measure each number of rows, fewest first; after one that does not fit into memory none is tried."""
    import torch

    from measure.variants import dtype_of, flops, transformer

    if part.variant.endswith("fp8") and part.device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        for rows in part.rows:
            _say({"rows": rows, "error": "this GPU has no FP8: it needs sm89, sm90 or later"})
        return
    counted = flops(part.config, part.size)
    model = run = None
    for rows in sorted(part.rows):
        try:
            with torch.no_grad():
                if model is None:
                    model = transformer(part.config, part.weights, dtype_of(part.variant), part.device)
                run, row = _row(part, rows, model, run)
        except torch.OutOfMemoryError as error:
            for left in (each for each in sorted(part.rows) if each >= rows):
                _say({"rows": left, "error": f"out of memory at {rows} rows: {str(error).split('. ')[0]}"})
            return
        _say(row | {"flops": {name: count * rows for name, count in counted.items()}})


def _row(part: Part, rows: int, model: Any, run: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from measure.variants import dtype_of, not_real_fp8, prepared, random_inputs

    inputs = random_inputs(model.config, rows, part.size, dtype_of(part.variant), part.device)
    if run is None:
        run = prepared(model, part.variant, inputs)
    begin = time.monotonic()
    finite = bool(run(**inputs)[0].isfinite().all())
    first_call = time.monotonic() - begin
    if part.device == "cuda":
        torch.cuda.empty_cache()  # what compiling took is not what running takes
        torch.cuda.reset_peak_memory_stats()
    times = timed(lambda: run(**inputs), part.device)
    row = {
        "rows": rows,
        "milliseconds": times.median,
        "min": times.min,
        "max": times.max,
        "runs": times.runs,
        "peak_bytes": torch.cuda.max_memory_allocated() if part.device == "cuda" else None,
        "first_call_seconds": round(first_call, 1),
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }
    if not finite:
        row["note"] = "the velocity holds values that are not finite: they cost a GPU less power, and time"
    if fallen := not_real_fp8(model):
        row["note"] = f"{len(fallen)} FP8 layers ran as 16-bit products"
    return run, row


def _say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
