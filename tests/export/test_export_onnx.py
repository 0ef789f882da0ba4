"""The FP16 ONNX files: the same numbers as the libraries' own modules, and the graphs TensorRT wants."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from onnx import TensorProto, numpy_helper
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from export import weights
from export.checkpoint import MINIATURE
from export.onnx_from_checkpoint import ONNX_FILE, write_onnx
from export.remedies import Remedies
from export.tracing import OPSET
from miniature.grammar import caption
from miniature.scenes import scenes
from mmdit.contract import COMPONENTS, TEXT_ENCODERS, Dtype, components, dims_at
from mmdit.errors import EngineError
from mmdit.family import CLIP_TOKENS, PARTS, family_from_checkpoint
from mmdit.shapes import shape_set

LIBRARY_CLASSES = {
    "clip_l": CLIPTextModelWithProjection,
    "clip_g": CLIPTextModelWithProjection,
    "t5": T5EncoderModel,
    "mmdit": SD3Transformer2DModel,
    "vae_decoder": AutoencoderKL,
}
# The largest relative error (Frobenius) that was measured, of FP16 ONNX on ONNX Runtime's CPU provider
# against the library's module in FP32 and FP16; tests allow twice that. ONNX Runtime computes FP16
# operators in FP32, so it is nearer to FP32 than torch's FP16 is (torch against torch: 2.0e-3 for the VAE).
MEASURED = {
    ("clip_l", torch.float32): 4.7e-4,
    ("clip_l", torch.float16): 9.5e-4,
    ("clip_g", torch.float32): 4.8e-4,
    ("clip_g", torch.float16): 1.0e-3,
    ("t5", torch.float32): 3.5e-4,
    ("t5", torch.float16): 8.8e-4,
    ("mmdit", torch.float32): 3.9e-4,
    ("mmdit", torch.float16): 1.0e-3,
    ("vae_decoder", torch.float32): 3.0e-4,
    ("vae_decoder", torch.float16): 2.1e-3,
}
# Of a row alone against the same row among three: at most 1.3e-4 (a matrix product's blocks change with
# its size), 3.4e-4 for the pooled outputs of 64 to 96 numbers, and nothing at all for most rows.
ROW_MEASURED = 3.4e-4
# Traced with 2 rows at 128×160. 80×112 is 35 image tokens, 64×208 is 52.
NEVER_TRACED = ((1, (80, 112)), (3, (80, 112)), (3, (64, 208)), (1, (240, 64)))


@pytest.fixture(scope="module")
def signatures(miniature):
    family = family_from_checkpoint(miniature)
    return components(family, shape_set(family))


@pytest.fixture(scope="module")
def run(build) -> Callable[..., list[np.ndarray]]:
    """Runs a component's ONNX file."""

    @functools.cache
    def session(component: str) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(
            build.onnx(component) / ONNX_FILE, providers=["CPUExecutionProvider"]
        )

    return lambda component, inputs: session(component).run(None, inputs)


@pytest.fixture(scope="module")
def reference(miniature) -> Callable[..., list[np.ndarray]]:
    """Runs the library's own module of a component, with the library's own attention, in a dtype."""

    @functools.cache
    def load(component: str, dtype: torch.dtype) -> torch.nn.Module:
        library_class = LIBRARY_CLASSES[component]
        model = library_class.from_pretrained(miniature / PARTS[component], dtype=dtype, use_safetensors=True)
        return model.to(dtype).eval()

    @torch.no_grad()
    def run(component: str, dtype: torch.dtype, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        model = load(component, dtype)
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        given = {name: x.to(dtype) if x.dtype == torch.float16 else x for name, x in given.items()}
        if component in ("clip_l", "clip_g"):
            output = model(**given, output_hidden_states=True)
            outputs = [output.hidden_states[-2], output.text_embeds]
        elif component == "t5":
            outputs = [model(**given).last_hidden_state]
        elif component == "mmdit":
            velocity = model(
                hidden_states=given["latent"],
                timestep=given["timestep"].squeeze(1),
                encoder_hidden_states=given["context"],
                pooled_projections=given["pooled"],
            ).sample
            outputs = [velocity]
        else:
            outputs = [model.decode(given["latent"]).sample]
        return [output.float().numpy() for output in outputs]

    return run


@pytest.fixture(scope="module")
def graphs(build) -> dict[str, onnx.ModelProto]:
    return {component: onnx.load(build.onnx(component) / ONNX_FILE) for component in COMPONENTS}


@functools.cache
def tokenizer_of_length(length: int) -> Any:
    if length == CLIP_TOKENS:
        return CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")
    return T5TokenizerFast.from_pretrained(MINIATURE / "tokenizer_3")


def random_inputs(signature, rows: int, size: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Captions as ids, timesteps in [0, 1000), normal numbers otherwise.

    Not random ids: a trained T5 answers these with attention so sharp that FP16 alone is 1.3 % off in torch.
    """
    random = np.random.default_rng(seed)
    inputs = {}
    for tensor in signature.inputs:
        shape = (rows, *dims_at(tensor, size))
        if tensor.dtype is Dtype.INT64:
            tokenizer = tokenizer_of_length(shape[1])
            texts = [caption(scene, random) for scene in random.choice(np.array(scenes(), object), rows)]
            values = tokenizer(
                texts, padding="max_length", max_length=shape[1], return_tensors="np"
            ).input_ids
        elif tensor.name == "timestep":
            values = random.uniform(0, 1000, shape)
        else:
            values = random.standard_normal(shape)
        inputs[tensor.name] = values.astype(tensor.dtype.numpy)
    return inputs


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_gives_what_the_librarys_module_gives_at_sizes_never_traced(
    component, dtype, run, reference, signatures
):
    """The graph holds for every size and number of rows, not only for those it was traced with."""
    cases = NEVER_TRACED[:2] if component in TEXT_ENCODERS else NEVER_TRACED
    worst = 0.0
    for seed, (rows, size) in enumerate(cases):
        inputs = random_inputs(signatures[component], rows, size, seed)
        found, expected = run(component, inputs), reference(component, dtype, inputs)
        for tensor, ours, theirs in zip(signatures[component].outputs, found, expected, strict=True):
            assert ours.shape == theirs.shape == (rows, *dims_at(tensor, size))
            worst = max(worst, relative_error(ours, theirs))
    print(f"\n{component} against {dtype}: relative error {worst:.1e}")
    assert worst <= 2 * MEASURED[component, dtype]


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_row_alone_is_the_same_row_in_a_batch(component, run, signatures):
    """Rows of different requests share a call: none may see another."""
    inputs = random_inputs(signatures[component], 3, (80, 112), seed=9)
    batch = run(component, inputs)
    for row in range(3):
        alone = run(component, {name: value[row : row + 1] for name, value in inputs.items()})
        for ours, all_rows in zip(alone, batch, strict=True):
            assert relative_error(ours[0], all_rows[row]) <= 2 * ROW_MEASURED


def test_t5_clamps_no_infinities(graphs):
    """transformers' `isinf(...).any()` would look at the whole batch, and hide overflow in FP16."""
    kinds = {node.op_type for node in graphs["t5"].graph.node}
    assert not kinds & {"IsInf", "IsNaN", "Clip", "ReduceMax"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_file_satisfies_the_checker(component, build, graphs):
    """Valid with shape inference, and an opset whose Q/DQ takes FP16 scales."""
    onnx.checker.check_model(str(build.onnx(component) / ONNX_FILE), full_check=True)
    assert [(entry.domain, entry.version) for entry in graphs[component].opset_import] == [("", OPSET)]
    assert OPSET >= 19


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_tensors_are_the_contracts(component, graphs, signatures):
    """Names, order, dtypes, fixed dims, and one name for each dim that varies."""
    graph, signature = graphs[component].graph, signatures[component]
    for found, expected in ((graph.input, signature.inputs), (graph.output, signature.outputs)):
        assert [value.name for value in found] == [tensor.name for tensor in expected]
        for value, tensor in zip(found, expected, strict=True):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert dims == ["rows", *tensor.dims]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert dtype == np.dtype(tensor.dtype.numpy)


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_weight_is_stored_in_fp32(component, graphs):
    """FP32 is left to scalars, Resize's four factors, and the 128 frequencies of the timestep."""
    graph = graphs[component].graph
    tensors = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute if a.HasField("t"))]
    sizes = {
        dtype: [int(np.prod(tensor.dims)) for tensor in tensors if tensor.data_type == dtype]
        for dtype in (TensorProto.FLOAT, TensorProto.FLOAT16)
    }
    frequencies = [128] if component == "mmdit" else []
    assert [size for size in sizes[TensorProto.FLOAT] if size > 4] == frequencies
    assert sum(sizes[TensorProto.FLOAT16]) > 100_000


@pytest.mark.parametrize("component", COMPONENTS)
def test_attention_is_what_tensorrt_fuses(component, graphs):
    """MatMul, Softmax, MatMul with nothing between but a bias, and the scale before the first product."""
    graph = graphs[component].graph
    producer = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    for softmax in softmaxes:
        product = producer[softmax.input[0]]
        if component in TEXT_ENCODERS:
            assert product.op_type == "Add"  # CLIP's causal mask, T5's position bias
            (product,) = [
                producer[name]
                for name in product.input
                if name in producer and producer[name].op_type == "MatMul"
            ]
        assert product.op_type == "MatMul"
        assert [n.op_type for n in graph.node if softmax.output[0] in n.input] == ["MatMul"]
        query = producer[product.input[0]]
        if component == "t5":  # which has no scale
            assert query.op_type == "Transpose"
            continue
        assert query.op_type == "Mul"
        (scale,) = [float(constants[name]) for name in query.input if name in constants]
        assert 0 < scale < 1
    expected = {"clip_l": 3, "clip_g": 3, "t5": 2, "mmdit": 4 + 2, "vae_decoder": 1}  # with dual attention
    assert len(softmaxes) == expected[component]


def test_weights_lie_beside_a_graph_that_passes_the_limit(miniature, signatures, run, tmp_path, monkeypatch):
    """One file of weights, found by ONNX Runtime, with the same numbers as a single file."""
    monkeypatch.setattr(weights, "INLINE_BYTES", 100_000)
    write_onnx("mmdit", signatures["mmdit"], miniature, Remedies(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ONNX_FILE, f"{ONNX_FILE}.data"]
    assert (tmp_path / ONNX_FILE).stat().st_size < (tmp_path / f"{ONNX_FILE}.data").stat().st_size / 10
    inputs = random_inputs(signatures["mmdit"], 1, (80, 112))
    session = onnxruntime.InferenceSession(tmp_path / ONNX_FILE, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, inputs)[0], run("mmdit", inputs)[0])


def test_a_graph_that_the_checker_refuses_is_refused(tmp_path):
    """No file that is not ONNX gets a name and a manifest."""
    nothing = onnx.helper.make_model(onnx.helper.make_graph([onnx.NodeProto(op_type="Nothing")], "g", [], []))
    with pytest.raises(EngineError, match="not a valid ONNX model"):
        weights.save(weights.Graph(nothing, {}, {}), tmp_path / ONNX_FILE, "nothing")
