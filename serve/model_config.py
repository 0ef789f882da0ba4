"""config.pbtxt: the operator's policy, filled in with what the contract decides, and validated.

Parsed and written with Triton's own protobuf. A policy that names tensors is refused: they come from the
contract, so they cannot drift from the engines.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from mmdit.contract import Shape, Signature, Tensor, ensemble_steps
from mmdit.errors import RepositoryError
from mmdit.family import Family

ModelConfig: TypeAlias = Any  # a protobuf class that type checkers cannot see
_Instance = model_config_pb2.ModelInstanceGroup
_CONTRACTS = (
    *("input", "output", "max_batch_size", "ensemble_scheduling", "backend", "platform"),
    *("cc_model_filenames", "default_model_filename"),
)


def policy(path: Path) -> ModelConfig:
    """A model's committed config.pbtxt.

    Raises RepositoryError for a file that Triton would not read, or that decides what the contract does.
    """
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise RepositoryError(f"{path} is no valid config.pbtxt: {error}") from None
    decided = [field.name for field, _ in config.ListFields() if field.name in _CONTRACTS]
    if decided or (config.name and config.name != path.parent.name):
        raise RepositoryError(
            f"{path} sets {', '.join(decided) or 'another name'}: that comes from the contract, remove it"
        )
    config.name = path.parent.name
    return config


def engine_config(
    config: ModelConfig, signature: Signature, warm_up: Sequence[Mapping[str, Shape]]
) -> ModelConfig:
    """An engine's config, of which its runtime has set its part: rows, tensors and warm-up.

    `warm_up` are the calls that Triton makes before it is ready, unless the policy has its own.
    """
    config.max_batch_size = signature.max_rows
    _add_tensors(config, signature)
    if not config.model_warmup:
        _add_warm_up(config, warm_up)
    return config


def python_config(config: ModelConfig, signature: Signature, *, decoupled: bool = False) -> ModelConfig:
    """The config of a model that is Python on the CPU, on any machine."""
    config.backend = "python"
    for group in config.instance_group:
        group.kind = _Instance.KIND_CPU
    _add_tensors(config, signature)
    if decoupled:
        config.model_transaction_policy.decoupled = True
    return config


def ensemble_config(
    config: ModelConfig, signature: Signature, family: Family, *, cache_pictures: bool
) -> ModelConfig:
    """The config of the `text_to_image` ensemble; its parameters tell clients a request's defaults."""
    config.platform = "ensemble"
    if cache_pictures:
        config.response_cache.enable = True
    elif config.response_cache.enable:
        raise RepositoryError(
            f"{config.name}: with a response cache and no seed every client would get the same picture; "
            "package with --cache-pictures instead, which makes the seed required"
        )
    defaults = {"model": family.name, "steps": family.steps, "guidance_scale": family.guidance_scale}
    for name, value in defaults.items():
        config.parameters[name].string_value = json.dumps(value)
    _add_tensors(config, signature)
    for model, inputs, outputs in ensemble_steps(family):
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        step.input_map.update(inputs)
        step.output_map.update(outputs)
    return config


def written(path: Path) -> ModelConfig:
    """A packaged model's config.pbtxt."""
    config = model_config_pb2.ModelConfig()
    text_format.Parse(path.read_text(encoding="utf-8"), config)
    return config


def to_text(config: ModelConfig) -> str:
    """The config as Triton reads it."""
    return str(text_format.MessageToString(config))


def check_config(config: ModelConfig, signature: Signature) -> None:
    """Raise RepositoryError unless a config has exactly the contract's tensors, dtypes, dims and rows."""
    for field, tensors in (("input", signature.inputs), ("output", signature.outputs)):
        found = {
            tensor.name: (model_config_pb2.DataType.Name(tensor.data_type), tuple(tensor.dims))
            for tensor in getattr(config, field)
        }
        expected = {tensor.name: (tensor.dtype.triton, _dims(tensor)) for tensor in tensors}
        if found != expected:
            differing = sorted(
                name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
            )
            raise RepositoryError(
                f"{config.name}: {field} {differing[0]} is {found.get(differing[0])}, the contract says "
                f"{expected.get(differing[0])}"
            )
    if config.max_batch_size != signature.max_rows:
        raise RepositoryError(
            f"{config.name}: max_batch_size is {config.max_batch_size}, the contract says "
            f"{signature.max_rows}"
        )


def check_ensemble(configs: dict[str, ModelConfig]) -> None:
    """Raise RepositoryError unless each ensemble's maps fit its steps' tensors.

    Triton's rules: every input that is not optional is mapped, from a tensor that is there; each tensor
    is produced once; what is produced is used; an input and an output do not share a name.
    """
    for config in configs.values():
        if not config.ensemble_scheduling.step:
            continue
        known = {tensor.name: tensor for tensor in config.input}
        used: set[str] = set()
        for step in config.ensemble_scheduling.step:
            where = f"{config.name}, step {step.model_name}"
            if step.model_name not in configs:
                raise RepositoryError(f"{where}: there is no such model")
            model = configs[step.model_name]
            inputs = {tensor.name: tensor for tensor in model.input}
            outputs = {tensor.name: tensor for tensor in model.output}
            required = {name for name, tensor in inputs.items() if not tensor.optional}
            if not required <= step.input_map.keys() <= inputs.keys():
                raise RepositoryError(
                    f"{where}: its inputs are {sorted(inputs)}, mapped are {sorted(step.input_map)}"
                )
            if not step.output_map.keys() <= outputs.keys():
                raise RepositoryError(
                    f"{where}: its outputs are {sorted(outputs)}, mapped are {sorted(step.output_map)}"
                )
            for name, source in step.input_map.items():
                if source not in known or known[source].data_type != inputs[name].data_type:
                    raise RepositoryError(f"{where}: {source} cannot be its input {name}")
                used.add(source)
            for name, tensor in step.output_map.items():
                if tensor in known:
                    raise RepositoryError(f"{where}: {tensor} is there already")
                known[tensor] = outputs[name]
        results = {tensor.name for tensor in config.output}
        if used | results != known.keys():
            raise RepositoryError(f"{config.name}: {sorted((used | results) ^ known.keys())} lead nowhere")


def _add_warm_up(config: ModelConfig, calls: Sequence[Mapping[str, Shape]]) -> None:
    for shapes in calls:
        name, first = next(iter(shapes.items()))
        sample = config.model_warmup.add(name=f"{name} {list(first)}", batch_size=first[0])
        types = {tensor.name: tensor.data_type for tensor in config.input}
        for name, (_, *dims) in shapes.items():
            sample.inputs[name].data_type = types[name]
            sample.inputs[name].dims.extend(dims)
            sample.inputs[name].zero_data = True


def _add_tensors(config: ModelConfig, signature: Signature) -> None:
    for tensor in signature.inputs:
        config.input.add(
            name=tensor.name,
            data_type=model_config_pb2.DataType.Value(tensor.dtype.triton),
            dims=_dims(tensor),
            optional=tensor.optional,
        )
    for tensor in signature.outputs:
        config.output.add(
            name=tensor.name,
            data_type=model_config_pb2.DataType.Value(tensor.dtype.triton),
            dims=_dims(tensor),
        )


def _dims(tensor: Tensor) -> tuple[int, ...]:
    return tuple(-1 if isinstance(dim, str) else dim for dim in tensor.dims)
