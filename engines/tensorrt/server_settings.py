"""How a server loads plans: on which GPU, with which of Triton's options."""

import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from engines.intact import check_whole
from engines.tensorrt.compatibility import Plan, built_elsewhere, loadable
from mmdit.artifact import Manifest, shown
from mmdit.errors import ServerError
from mmdit.target import find_gpu


def server_settings(
    repository: Path, manifest: Manifest, version: Callable[[], str]
) -> tuple[list[str], dict[str, str]]:
    """Triton's options and environment. Triton sees only the GPU that was checked.

    `version` gives the server's TensorRT version. Raises ServerError when the server cannot load the plans,
    ArtifactError for a plan that is not what was packaged.
    """
    try:
        plans = [Plan.model_validate(plan) for plan in manifest.settings["plans"]]
        pool = manifest.findings["cuda_pool_bytes"]
    except (KeyError, ValidationError):
        raise ServerError(
            f"{shown(repository)} was packaged by an older version: run `make repository`"
        ) from None
    gpu = find_gpu()
    chosen = loadable(plans, gpu, version())
    assert gpu
    warning = built_elsewhere(chosen, gpu)
    if warning:
        print(f"warning: {shown(repository)}: {warning}", file=sys.stderr)
    check_whole(
        repository,
        {plan.file: manifest.files[plan.file] for plan in chosen},
        {plan.file: plan.bytes for plan in chosen},
        "copy the repository again, or run `make repository`",
    )
    options = [f"--cuda-memory-pool-byte-size=0:{pool}"]
    if any(plan.version_compatible for plan in chosen):
        options.append("--backend-config=tensorrt,version-compatible=true")
    return options, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu.uuid}
