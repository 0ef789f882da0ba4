"""torch's floor, measured at a toy's size on the CPU: every variant, what is kept, and what fails."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from measure import part as part_module
from measure.__main__ import main
from measure.child import Ended, lines
from measure.geometry import TOY, VARIANTS
from measure.part import Part
from measure.record import Record, opened, page, peak_seconds, save, slug, step_times
from measure.reference import rows_of
from measure.timing import FEWEST, MOST, runs_for, summed_up
from mmdit.errors import ArtifactError, TargetError

H100 = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580", "torch": "2.13.0"}
PART = Part(model="medium", variant="eager-fp16", size=(1024, 1024), rows=(1, 2))


def row(rows: int, milliseconds: float, **more: Any) -> dict[str, Any]:
    """A measured row, as a part says it."""
    times = {"milliseconds": milliseconds, "min": milliseconds, "max": milliseconds, "runs": 5}
    counted = {"linears": rows * 7_017_040_969_728, "attention": rows * 4_232_532_738_048}
    return {"rows": rows, **times, "peak_bytes": 5 * 10**9, "flops": counted, **more}


@pytest.fixture
def fp8_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ModelOpt use its FP8 product, which torch's CPU build has too, where it asks for a GPU."""
    from modelopt.torch.quantization.backends import fp8_per_tensor_gemm as products

    match = {"gemm_func": products.Fp8PerTensorLinear.apply, "availability_check": lambda *_: True}
    monkeypatch.setattr(products.gemm_registry, "_registry", [match])
    monkeypatch.setattr("torch.cuda.nvtx.range", lambda *_: contextlib.nullcontext())


def measured(variant: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What a toy's part says of one row."""
    part_module.measure(
        Part(model="medium", variant=variant, size=(64, 64), rows=(1,), device="cpu", toy=True)
    )
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as in the part's own process
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "eager-fp8"])
def test_every_variant_runs_and_is_one_graph(
    variant: str,
    capsys: pytest.CaptureFixture[str],
    fp8_on_the_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also ModelOpt's FP8 products: a break would leave the parts between to Python.

    Of one layer: tracing ModelOpt's takes a second for each linear.
    """
    monkeypatch.setitem(TOY, "num_layers", 1)
    (row,) = measured(variant, capsys)
    assert 0 < row["min"] <= row["milliseconds"] <= row["max"]
    assert row["graph_breaks"] == 0 and "note" not in row
    assert row["flops"]["linears"] > 0 and row["flops"]["attention"] > 0


@pytest.mark.filterwarnings("ignore")
def test_fp8_that_fell_back_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU ModelOpt runs all 29 linears of the toy's blocks as 16-bit products."""
    (row,) = measured("eager-fp8", capsys)
    assert row["note"] == "29 FP8 layers ran as 16-bit products"


@pytest.mark.slow
def test_a_command_measures_keeps_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run finds the first one's rows, and measures the new one alone."""
    toy = ["reference", "--device", "cpu", "--toy", "--out", str(tmp_path)]
    toy += ["--model", "large", "--variant", "eager-bf16", "--rows"]
    assert main([*toy, "1"]) == 0
    assert main([*toy, "1,2"]) == 0
    printed = capsys.readouterr().out
    assert "measuring 1 rows" in printed and "measuring 2 rows" in printed
    assert main([*toy, "1,2"]) == 0
    assert "large eager-bf16 64×64: measured before" in capsys.readouterr().out
    (written,) = tmp_path.glob("*-gpu-reference-cpu.json")
    assert [each["rows"] for each in json.loads(written.read_text())["rows"]] == [1, 2]
    told = written.with_suffix(".md").read_text()
    assert "at toy size: these are not measurements" in told and "CUDA events" not in told
    assert not list(tmp_path.glob("step-times/*"))


def test_without_a_gpu_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, 'print(\'{"gpu": null, "torch": "2.13"}\')')
    with pytest.raises(TargetError, match="torch 2.13 finds no CUDA GPU"):
        main(["reference"])


@pytest.mark.parametrize(
    "words",
    [["--size", "100x64"], ["--size", "big"], ["--rows", "0,1"], ["--toy"], ["--device", "cpu", "--toy"]],
)
def test_words_that_mean_nothing_are_refused(words: list[str]) -> None:
    """--device cpu --toy without --out would write into docs/measurements."""
    with pytest.raises(SystemExit) as ended:
        main(["reference", *words])
    assert ended.value.code == 2


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr("measure.child._command", lambda *_: [sys.executable, "-c", code])


def test_a_crash_becomes_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before it stays."""
    child(monkeypatch, "print('{\"rows\": 1}', flush=True); raise SystemExit('CUDA error: bad luck')")
    found = list(rows_of(PART, minutes=1))
    assert found == [{"rows": 1}, {"rows": 2, "error": "ended with status 1: CUDA error: bad luck"}]


def test_a_part_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import time; print('{\"rows\": 1}', flush=True); time.sleep(60)")
    found = list(rows_of(PART, minutes=0.02))
    assert found[1]["error"] == "not within 0.02 minutes: run it again, torch keeps what it compiled"


def test_advice_about_time_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every process compiles."""
    child(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(Ended, match=r"not within 0\.005 minutes: has it the cores\?"):
        list(lines("measure.outputs", minutes=0.005, advice="has it the cores?"))


def test_lack_of_memory_names_the_rows_and_ends_the_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More rows would not fit either."""
    import torch

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. More words.")

    monkeypatch.setattr(part_module, "_row", full)
    part_module.measure(PART.model_copy(update={"size": (64, 64), "device": "cpu", "toy": True}))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["rows"] for each in found] == [1, 2]
    assert {each["error"] for each in found} == {"out of memory at 1 rows: CUDA out of memory"}


def test_a_record_of_other_versions_is_left_alone(tmp_path: Path) -> None:
    record, path = opened(tmp_path, "gpu-reference", H100, "make gpu-reference")
    assert path.name.endswith("-gpu-reference-h100-80gb-hbm3.json")
    earlier = path.with_name("2020-01-01" + path.name[10:])
    record.put(PART, row(1, 100.0))
    save(record, earlier)
    assert opened(tmp_path, "gpu-reference", H100, "")[1] == earlier
    newer, at = opened(tmp_path, "gpu-reference", H100 | {"torch": "2.14.0"}, "")
    assert newer.rows == [] and at == path


def test_a_record_that_cannot_be_read_is_no_reason_to_overwrite_it(tmp_path: Path) -> None:
    (tmp_path / "2020-01-01-gpu-reference-h100-80gb-hbm3.json").write_text("{")
    with pytest.raises(ArtifactError, match="mend it or move it away"):
        opened(tmp_path, "gpu-reference", H100, "")


def test_what_failed_is_tried_again() -> None:
    record = Record(date="", command="", machine=H100)
    record.put(PART, row(1, 100.0))
    record.put(PART, {"rows": 2, "error": "out of memory"})
    left = record.missing(PART)
    assert left is not None and left.rows == (2,)
    record.put(PART, row(2, 190.0))
    assert record.missing(PART) is None and len(record.rows) == 2


def test_step_times_are_the_faster_variants_and_no_fall_backs() -> None:
    record = Record(date="", command="", machine=H100)
    record.put(PART, row(1, 100.0))
    record.put(PART.model_copy(update={"variant": "compile-fp16"}), row(1, 80.0))
    record.put(PART.model_copy(update={"variant": "eager-fp8"}), row(1, 50.0, note="fell back"))
    (times,) = step_times(record)
    assert (times.precision, times.milliseconds, times.source) == ("fp16, torch", {1: 80.0}, "measured")


def test_the_share_of_the_peak_is_of_the_cards_dense_products() -> None:
    """11.25 TFLOP at 989.4 TFLOP/s take 11.4 ms; with the linears at FP8's 1,978.9 it is 7.8 ms."""
    record = Record(date="2026-11-21", command="make gpu-reference", machine=H100)
    record.put(PART, row(1, 22.74))
    record.put(PART, {"rows": 2, "error": "out of memory at 2 rows"})
    flops = record.rows[0]["flops"]
    assert peak_seconds(flops, H100["gpu"], linears="bf16") == pytest.approx(0.01137, rel=1e-3)
    assert peak_seconds(flops, H100["gpu"], linears="fp8") == pytest.approx(0.00782, rel=1e-3)
    assert peak_seconds(flops, H100["gpu"], linears="fp8", attention="fp8") == pytest.approx(
        0.00568, rel=1e-3
    )
    assert peak_seconds(flops, "A card of tomorrow", linears="fp8") is None
    lines = page(record).splitlines()
    assert "| 22.7 | 22.7 to 22.7 | 5.0 | 494.7 | 50% |" in lines[-2]
    assert lines[-1].endswith("| out of memory at 2 rows |")


def test_slow_calls_run_less_often_than_fast_ones() -> None:
    assert (runs_for(0.01), runs_for(500), runs_for(9000)) == (MOST, 10, FEWEST)
    assert summed_up([3.0, 1.0, 2.0]).median == 2.0


def test_file_names_hold_no_spaces() -> None:
    assert slug("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"
