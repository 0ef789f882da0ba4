"""The ONNX graphs of SD3.5's real geometry without a checkpoint: what readiness, planner and roofline read.

    python -m bench.graphs large big/graphs

Every component in FP16 and the MMDiT in FP8, as artifacts below `big/graphs/large`, in minutes of one core.
The weights are the length of a sparse file: their values are not written, so nothing can be computed with
these files.
"""

import argparse
import json
import shutil
from pathlib import Path

import export.quiet  # noqa: F401  isort: skip
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from export.checkpoint import MINIATURE
from export.fp8_from_calibration import quantized_graph
from export.modules import ClipTextEncoder, Mmdit, T5TextEncoder, VaeDecoder
from export.onnx_from_checkpoint import ONNX_FILE
from export.policy import read_policy
from export.quantization import input_quantizers, insert_quantizers, set_ranges
from export.ranges import Ranges
from export.tracing import traced
from export.weights import Graph, placed_outside, save_graph
from measure.geometry import MODELS, config_of
from mmdit.artifact import Layout, Manifest, digest, versions, whole
from mmdit.contract import COMPONENTS, Precision, components
from mmdit.family import PARTS, TOKENIZERS, family_from_checkpoint
from mmdit.shapes import shape_set

# From the models' published config.json; what is not here is as in the miniature's.
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "vocab_size": 49408,
}
_T5 = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
_VAE = {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32, "sample_size": 1024}
_WEIGHT = 0.02  # every one


def main() -> None:
    """Write one geometry's graphs below a folder."""
    parser = argparse.ArgumentParser(description="The ONNX graphs of SD3.5's real geometry, without weights.")
    parser.add_argument("geometry", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_graphs(arguments.geometry, arguments.folder, config_of(arguments.geometry))


def write_graphs(name: str, folder: Path, transformer: dict[str, object]) -> Layout:
    """Write the artifacts of a model called `name`, whose transformer has this config, below `folder`."""
    layout = Layout(name, folder)
    configs = layout.root / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    for path in (MINIATURE / "model_index.json", *MINIATURE.glob("scheduler/*.json")):
        copy = configs / path.relative_to(MINIATURE)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    for tokenizer in TOKENIZERS.values():
        (configs / tokenizer).mkdir(exist_ok=True)
    changes = {"clip_l": _CLIP_L, "clip_g": _CLIP_G, "t5": _T5, "mmdit": transformer, "vae_decoder": _VAE}
    for component, part in PARTS.items():
        config = json.loads((MINIATURE / part / "config.json").read_text())
        (configs / part).mkdir(exist_ok=True)
        (configs / part / "config.json").write_text(json.dumps(config | changes[component]))
    family = family_from_checkpoint(configs, name=name)
    signatures = components(family, shape_set(family))

    def write(component: str, precision: Precision) -> None:
        module = hollow(component, configs)
        if precision is Precision.FP8:
            assert isinstance(module, Mmdit)
            _quantize(module)
            graph = quantized_graph(module, signatures[component])
        else:
            graph = traced(module, signatures[component])
        target = layout.onnx(component, precision)
        manifest = Manifest(
            kind="onnx",
            checkpoint=digest(changes),
            made_from={},
            settings={"family": family.model_dump(mode="json"), "component": component},
            versions=versions("torch", "diffusers", "transformers", "onnx"),
        )
        with whole(target, manifest) as partial:
            save_sparse(graph, partial / ONNX_FILE)
        print(f"{component} {precision.value}: {target}", flush=True)

    for component in COMPONENTS:
        write(component, Precision.FP16)
    write("mmdit", Precision.FP8)
    return layout


def hollow(component: str, configs: Path) -> nn.Module:
    """A component's module in FP16 whose weights take no memory: one number each, seen at every index."""
    folder = configs / PARTS[component]
    with init_empty_weights(include_buffers=False):
        module: nn.Module
        if component in ("clip_l", "clip_g"):
            config = CLIPTextConfig.from_pretrained(folder, attn_implementation="mmdit_trt")
            module = ClipTextEncoder(CLIPTextModelWithProjection(config))
        elif component == "t5":
            config = T5Config.from_pretrained(folder, attn_implementation="mmdit_trt")
            module = T5TextEncoder(T5EncoderModel(config))
        elif component == "mmdit":
            module = Mmdit(SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder)))
        else:
            module = VaeDecoder(AutoencoderKL.from_config(AutoencoderKL.load_config(folder)))
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                number = torch.tensor(_WEIGHT, dtype=torch.float16)
                part._parameters[name] = nn.Parameter(number.expand(weight.shape), requires_grad=False)
    return module.half().eval()


def save_sparse(graph: Graph, path: Path) -> None:
    """Write a graph's file, and beside it one of the length that its weights have."""
    data = path.with_name(f"{path.name}.data")
    offsets = placed_outside(graph, data.name)
    last = next(tensor for tensor in reversed(graph.model.graph.initializer) if tensor.name in offsets)
    length = next(int(entry.value) for entry in last.external_data if entry.key == "length")
    with data.open("wb") as stream:
        stream.truncate(offsets[last.name] + length)
    save_graph(graph, path, Ranges())


def _quantize(module: Mmdit) -> None:
    """Quantize as the policy says for Hopper, every range 1."""
    policy = read_policy(None)
    layers = {
        name: tuple(layer.weight.shape)
        for name, layer in module.model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    insert_quantizers(module.model, policy.decide(layers), policy.attention_on("hopper"))
    set_ranges(module.model, dict.fromkeys(input_quantizers(module.model), 1.0))


if __name__ == "__main__":
    main()
