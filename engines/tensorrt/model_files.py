"""Plans as Triton serves them: its TensorRT backend, one execution context a profile, CUDA graphs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.runtimes import ModelFiles
from engines.tensorrt.compatibility import Plan, check_together, plan_of
from engines.tensorrt.plan_from_onnx import PLAN
from mmdit.artifact import read_manifest
from mmdit.contract import Profile
from mmdit.errors import RepositoryError

# github.com/triton-inference-server/tensorrt_backend, README: parameters
_ALLOCATION = "execution_context_allocation_strategy"


def model_files(
    configs: Mapping[str, Any], folders: Mapping[str, Mapping[str, Path]], model: str
) -> ModelFiles:
    """Set each config's part; plans of several targets lie side by side, named by target.

    Raises ArtifactError for a plan that is not what was built, RepositoryError for a policy with an instance
    on the CPU, for plans that Triton cannot serve, and for plans that no single TensorRT loads.
    """
    files: dict[str, dict[str, Path]] = {}
    plans: list[Plan] = []
    for name in folders:
        config = configs[name]
        if any(group.kind == type(group).KIND_CPU for group in config.instance_group):
            raise RepositoryError(f"{name}: a TensorRT plan cannot have an instance on the CPU")
        files[name] = {}
        by_capability = {}
        profiles: Sequence[Profile] = ()
        for target, folder in folders[name].items():
            manifest = read_manifest(folder)
            served_as = PLAN if len(folders[name]) == 1 else f"{target}.plan"
            plan = plan_of(folder, manifest, target, f"{name}/1/{served_as}", model)
            plans.append(plan)
            (file,) = (file for file in manifest.files if file.endswith(".plan"))
            files[name][served_as] = folder / file
            by_capability[plan.compute_capability] = served_as
            profiles = profiles or manifest.settings["profiles"]  # the same for every target
        config.backend = "tensorrt"
        if len(by_capability) > 1:
            config.cc_model_filenames.update(by_capability)
        _add_profiles(config, len(profiles))
        _add_cuda_graphs(config, profiles)
        for group in config.instance_group:
            group.kind = type(group).KIND_GPU
    targets = [target for each in folders.values() for target in each]
    plans.sort(key=lambda plan: targets.index(plan.target))
    check_together(plans)
    return ModelFiles(files, linked=True, plans=[plan.model_dump() for plan in plans])


def _add_profiles(config: Any, count: int) -> None:
    """Name all profiles: Triton makes one execution context for each that is named, else for the first.

    Each context would take the memory of the largest profile, unless told to take its own profile's.
    """
    if count == 1:
        return
    for group in config.instance_group:
        if not group.profile:
            group.profile.extend(str(index) for index in range(count))
    if _ALLOCATION not in config.parameters:
        config.parameters[_ALLOCATION].string_value = "ON_PROFILE_CHANGE"


def _add_cuda_graphs(config: Any, profiles: Sequence[Profile]) -> None:
    """A CUDA graph for the shape of each static profile, unless the policy decides about CUDA graphs.

    Triton launches a graph for calls of exactly its shapes, on the context of the profile that is nearest,
    which is the static one: profiles of the same distance are taken in their order. It tries to capture
    each graph on every context, at start, on inputs of zeros; a context whose profile does not hold the
    shape logs "Failed to set cuda graph shape" and goes on. `output_copy_stream` stays off: with graphs it
    has ended servers (github.com/triton-inference-server/server/issues/5789).
    """
    static = [table for table in profiles if all(low == high for low, _, high in table.values())]
    if not static or config.optimization.HasField("cuda"):
        return
    config.optimization.cuda.graphs = True
    for table in static:
        shapes = {name: low for name, (low, _, _) in table.items()}
        (rows,) = {shape[0] for shape in shapes.values()}
        spec = config.optimization.cuda.graph_spec.add(batch_size=rows)
        for name, (_, *dims) in shapes.items():
            spec.input[name].dim.extend(dims)
