"""How far a plan's outputs may be from ONNX Runtime's, derived on the GPU that runs it.

Both are held against torch in FP32. What FP16 costs is measured with torch in FP16 on the same GPU; what the
scales of FP8 cost is in the FP8 file, as ONNX Runtime runs it. Two runs of the same arithmetic that round at
other places differ by about √2 of what either differs from the exact result.

In FP8 most of the error is the scales', which both runs share: two runs of one quantized model were seen to
differ by 0.44 to 0.56 of it. So less is allowed there: a little over the √2 of errors that share nothing.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from mmdit.contract import Precision

FACTOR = 3 * math.sqrt(2)  # over √2: kernels sum in other orders, and one input is no distribution
FP8_FACTOR = 1.5
_LEAST = 2.0**-10  # half a unit in FP16's last place: no engine is asked for less


class Difference(BaseModel):
    """One output: ‖a − b‖ / ‖b‖, and the cosine between them."""

    model_config = ConfigDict(frozen=True)

    relative: float
    cosine: float


class Comparison(BaseModel):
    """One output of a plan against ONNX Runtime; `failure` says why it is too far, None that it is not.

    `torch_fp16` and `onnxruntime` are errors against torch in FP32, from which `bound` comes.
    """

    model_config = ConfigDict(frozen=True)

    component: str
    output: str
    plan: Difference
    torch_fp16: Difference
    onnxruntime: Difference
    bound: float
    failure: str | None


def difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> Difference:
    """How far `found` is from `expected`; relative is infinite and cosine 0 where values are not finite."""
    a, b = (np.asarray(each, dtype=np.float64).ravel() for each in (found, expected))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(relative=math.inf, cosine=0.0)
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    if norm_b == 0:
        return Difference(relative=math.inf if norm_a else 0.0, cosine=float(norm_a == 0))
    cosine = float(a @ b / (norm_a * norm_b)) if norm_a else 0.0
    return Difference(relative=float(np.linalg.norm(a - b) / norm_b), cosine=cosine)


def compared(
    component: str,
    precision: Precision,
    *,
    plan: dict[str, npt.NDArray[Any]],
    onnxruntime: dict[str, npt.NDArray[Any]],
    torch_fp16: dict[str, npt.NDArray[Any]],
    torch_fp32: dict[str, npt.NDArray[Any]],
) -> list[Comparison]:
    """Hold each output of a plan against ONNX Runtime's, with a bound from errors against torch in FP32.

    In FP16 FACTOR times the larger of torch's FP16 and ONNX Runtime's; in FP8 FP8_FACTOR times the latter.
    """
    found = []
    for output, exact in torch_fp32.items():
        fp16, runtime = (difference(each[output], exact) for each in (torch_fp16, onnxruntime))
        against = difference(plan[output], onnxruntime[output])
        if precision is Precision.FP8:
            bound = max(_LEAST, FP8_FACTOR * runtime.relative)
        else:  # plain FP16 may overflow where the export has a remedy
            errors = [each.relative for each in (fp16, runtime) if math.isfinite(each.relative)]
            bound = max(_LEAST, FACTOR * max(errors, default=math.inf))
        found.append(
            Comparison(
                component=component,
                output=output,
                plan=against,
                torch_fp16=fp16,
                onnxruntime=runtime,
                bound=bound,
                failure=_failure(against, bound),
            )
        )
    return found


def _failure(against: Difference, bound: float) -> str | None:
    if not math.isfinite(bound):
        return "what it is held against holds values that are not finite"
    if not math.isfinite(against.relative):
        return "it holds values that are not finite"
    if against.relative > bound:
        return f"relative error {against.relative:.2e}, expected at most {bound:.2e}"
    return None
