"""What an engine computes before its server is ready: zeros, once for each size range.

The first call of a kernel loads it, and the first of a profile takes its memory: a first request would pay
for both, or run out of memory. So each size range is called at its usual size, for which its profile is
tuned, with the rows of a lone request and with the most that it takes; a model without rows to share, once at
each size. Never every size of a range: the kernels are the profile's. Triton does this after it has captured
CUDA graphs, past queues and the response cache, and does not load a model that fails
(github.com/triton-inference-server/core, src/backend_model_instance.cc).
"""

from mmdit.contract import Shape, Signature, dims_at
from mmdit.shapes import ShapeSet


def calls(signature: Signature, shapes: ShapeSet, row_by_row: bool) -> list[dict[str, Shape]]:
    """An engine's calls, each the shapes of its inputs by name, rows first; ten at most, for `buckets-1mp`.

    With `row_by_row` Triton hands the rows of a call over one by one (its Python backend does), and there are
    none with the most: they would be the same call again.
    """
    lone = shapes.ranges[0].opt_rows
    found = []
    for each in shapes.ranges:
        for rows in (lone, each.max_rows) if not row_by_row else (lone,):
            taken = min(rows, signature.max_rows)
            call = {tensor.name: (taken, *dims_at(tensor, each.opt)) for tensor in signature.inputs}
            if call not in found:
                found.append(call)
    return found
