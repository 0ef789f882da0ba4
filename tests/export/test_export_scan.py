"""The overflow scan and its remedies, proven on doctored checkpoints against two oracles of FP16."""

import functools
from types import SimpleNamespace

import pytest

import export.quiet  # noqa: F401  isort: skip
import torch
from doctored import HIDDEN, STREAMS, doctored
from fp16_oracles import OnnxRun, finite, in_onnx, in_torch, same_module, worst_error
from transformers import CLIPTokenizer, T5TokenizerFast

from export.overflow import LARGEST, SAFETY, remedies_from_scan
from export.remedies import Remedies
from export.scan import scan_component
from mmdit.contract import COMPONENTS, TEXT_ENCODERS
from mmdit.family import TOKENIZERS

CAPTIONS = ["a large red circle on the left, a small blue cross on the right, on white", "a green square"]
# The largest relative error of a doctored component with its remedies against FP32, of torch's FP16 and of
# ONNX Runtime's with all intermediates exposed; tests allow twice that.
MEASURED = {"clip_l": 4.5e-4, "clip_g": 5.6e-4, "t5": 5e-4, "mmdit": 2.2e-3, "vae_decoder": 4.1e-4}
DOCTORINGS = {"streams": STREAMS, "hidden": HIDDEN}
CASES = [(component, name) for name, doctoring in DOCTORINGS.items() for component in doctoring]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(miniature, denoising):
    """Component → inputs as the trained parts meet them, at odd sizes."""

    def ids(component: str) -> torch.Tensor:
        kind, length = (T5TokenizerFast, 256) if component == "t5" else (CLIPTokenizer, 77)
        tokenizer = kind.from_pretrained(miniature / TOKENIZERS[component])
        return tokenizer(CAPTIONS, padding="max_length", max_length=length, return_tensors="pt").input_ids

    noisy = {name: torch.from_numpy(value) for name, value in denoising(600, 80, 112).items()}
    return {
        **{component: (ids(component),) for component in TEXT_ENCODERS},
        "mmdit": tuple(noisy.values()),
        "vae_decoder": (noisy["latent"][:1],),
    }


@pytest.fixture(scope="module")
def case(miniature, inputs, tmp_path_factory):
    """(component, doctoring) → the checkpoint, its scan, its remedies, FP32's outputs."""
    folder = tmp_path_factory.mktemp("doctored")
    checkpoints = {
        name: doctored(miniature, doctoring, folder / name) for name, doctoring in DOCTORINGS.items()
    }

    def make(component: str, doctoring: str) -> SimpleNamespace:
        checkpoint = checkpoints[doctoring]
        given = [x.float() if x.is_floating_point() else x for x in inputs[component]]
        scan, output = scan_component(component, checkpoint, lambda module: module(*given))
        return SimpleNamespace(
            checkpoint=checkpoint,
            scan=scan,
            remedies=remedies_from_scan(scan),
            expected=output if isinstance(output, tuple) else (output,),
        )

    return functools.cache(make)


@pytest.fixture(scope="module")
def unremedied(case, inputs, tmp_path_factory):
    """(component, doctoring) → the run of its ONNX file without remedies."""

    @functools.cache
    def run(component: str, doctoring: str) -> OnnxRun:
        checkpoint = case(component, doctoring).checkpoint
        folder = tmp_path_factory.mktemp("onnx")
        return in_onnx(component, checkpoint, Remedies(), inputs[component], folder)

    return run


@pytest.mark.parametrize(("component", "doctoring"), CASES)
def test_without_remedies_torch_overflows_in_fp16(component, doctoring, case, inputs):
    """The first oracle: what was doctored is beyond FP16, and not beyond FP32."""
    made = case(component, doctoring)
    assert all(torch.isfinite(output).all() for output in made.expected)
    assert not finite(in_torch(component, made.checkpoint, Remedies(), inputs[component]))


@pytest.mark.parametrize(("component", "doctoring"), CASES)
def test_the_onnx_files_infinities_are_where_the_scan_says(component, doctoring, case, unremedied):
    """The second oracle: they begin in modules that the scan names, and the scan names no other."""
    overflows = case(component, doctoring).scan.overflows()
    named = {activation.module for activation in overflows if activation.amax > LARGEST}
    run = unremedied(component, doctoring)
    assert run.first_infinite()
    assert all(any(same_module(path, module) for module in named) for path in run.first_infinite())
    assert all(any(same_module(path, module) for path in run.infinite()) for module in named)


@pytest.mark.parametrize("component", ["t5", "mmdit", "vae_decoder"])
def test_a_plain_run_of_onnx_runtime_hides_the_overflow(component, unremedied):
    """Why it is no oracle: the same file, infinite inside, gives finite outputs."""
    run = unremedied(component, "streams")
    assert finite(run.plain)
    assert not finite(run.exposed)


@pytest.mark.parametrize(("component", "doctoring"), CASES)
def test_with_the_remedies_fp16_is_finite_and_matches_fp32(component, doctoring, case, inputs, tmp_path):
    """Both oracles, and every intermediate tensor of the ONNX file."""
    made = case(component, doctoring)
    by_torch = in_torch(component, made.checkpoint, made.remedies, inputs[component])
    run = in_onnx(component, made.checkpoint, made.remedies, inputs[component], tmp_path)
    assert finite(by_torch)
    assert not run.infinite()
    worst = max(worst_error(by_torch, made.expected), worst_error(run.exposed, made.expected))
    print(f"\n{component}, {doctoring}: relative error {worst:.1e}")
    assert worst <= 2 * MEASURED[component]


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_overflowing_stream_is_folded_and_nothing_else(component, case):
    """The smallest power that makes room, with the safety factor; no FP32 anywhere."""
    remedies = case(component, "streams").remedies
    assert not remedies.islands
    folds = {fold.stream: fold for fold in remedies.folds}
    assert set(folds) == ({"image", "context"} if component == "mmdit" else {"hidden"})
    for fold in folds.values():
        assert LARGEST / 2 < fold.magnitude * SAFETY * 2.0**-fold.power <= LARGEST
        assert f"{fold.magnitude:.3g}" in fold.reason


@pytest.mark.parametrize(
    ("component", "path"),
    [("t5", "encoder.block.0.layer.1.DenseReluDense"), ("mmdit", "model.transformer_blocks.1.ff_context")],
)
def test_a_hidden_product_becomes_an_island(component, path, case):
    """No fold reaches it; the island is the smallest submodule that takes and gives what FP16 holds."""
    remedies = case(component, "hidden").remedies
    assert [island.module for island in remedies.islands] == [path]
    assert remedies.islands[0].magnitude > LARGEST
