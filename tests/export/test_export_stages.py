"""What `python -m export` remakes and what it keeps: interrupted, changed, unchanged."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.stages import Export
from mmdit.artifact import MANIFEST, Layout, read_manifest
from mmdit.contract import COMPONENTS, Precision
from mmdit.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ("tokenizers", "scan", *(f"onnx {component}" for component in COMPONENTS), "preview")
FP8_ARTIFACTS = ("calibration", "onnx-fp8 mmdit")


@pytest.fixture
def copy(build, tmp_path) -> Layout:
    """A copy of the exported artifacts, to change."""
    shutil.copytree(build.root, tmp_path / "build" / build.name)
    return Layout(build.name, tmp_path / "build")


def partial_folders(build: Path) -> list[Path]:
    return [path for path in build.rglob(".*") if path.is_dir()]


def up_to_date(*labels: str) -> list[str]:
    return [f"{label}: up to date" for label in labels]


def options(**settings: dict[str, int]) -> list[str]:
    """Settings as they are given on the command line."""
    return [
        word
        for what, values in settings.items()
        for name, value in values.items()
        for word in (f"--{what}-{name}", str(value))
    ]


@pytest.mark.slow
def test_an_interrupted_export_recovers(miniature, scan, tmp_path):
    """Killed half-way, it leaves whole artifacts or none, and the next run makes the rest."""
    command = [sys.executable, "-m", "export", "onnx", "--model", miniature, "--build", tmp_path]
    command += options(scan=scan)
    onnx = Layout(str(miniature), tmp_path).tokenizers.parent
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ((onnx / "tokenizers").is_dir() and partial_folders(onnx)):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert partial_folders(onnx)
    made = sorted(path.name for path in onnx.iterdir() if not path.name.startswith("."))
    assert "tokenizers" in made and len(made) < len(ARTIFACTS) - 1
    before = {name: (onnx / name / MANIFEST).stat().st_ino for name in made}

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    *onnx_files, previews = again.stderr.splitlines()
    assert all(": 3/3 of load, trace, save" in line for line in onnx_files)
    assert previews.startswith("fitting previews: 96/96")
    for label in ARTIFACTS:
        kept = label.split()[-1] in ("scan", *made)
        assert (f"{label}: up to date" in again.stdout) is kept
        assert (f"{label}: making it" in again.stdout) is not kept
    assert {name: (onnx / name / MANIFEST).stat().st_ino for name in made} == before
    assert not partial_folders(tmp_path)
    for folder in onnx.iterdir():
        assert {path.name for path in folder.iterdir()} == {MANIFEST, *read_manifest(folder).files}


def test_nothing_is_remade_when_nothing_changed(build, scan, calibration, miniature, capsys):
    """Each artifact says so."""
    export = Export(str(miniature), build.root.parent)
    export.onnx(**scan)
    assert capsys.readouterr().out.splitlines() == up_to_date(*ARTIFACTS)
    export.fp8(**calibration)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == up_to_date(*FP8_ARTIFACTS)
    assert "53 layers in FP8, 8 with FP8 weights, 7 in FP16" in lines[2]


@pytest.mark.parametrize("stage", ["onnx", "fp8", "--help"])
def test_torch_is_not_loaded_when_there_is_nothing_to_make(stage, build, scan, calibration, miniature):
    """A second `make demo` should take seconds; importing torch and diffusers takes ten."""
    words = [stage, "--model", str(miniature), "--build", str(build.root.parent)]
    words += options(calibration=calibration) if stage == "fp8" else options(scan=scan)
    code = f"""
import sys
from export.__main__ import main
sys.argv = {["export", *words]!r}
try:
    main()
except SystemExit:
    pass
print({{"torch", "diffusers", "transformers", "modelopt", "onnx"}} & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "set()", ended.stdout
    assert "making it" not in ended.stdout


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: flip_a_byte(folder / "model.onnx"), "model.onnx changed on disk"),
        (lambda folder: (folder / "model.onnx").unlink(), "a file of it is gone"),
        (lambda folder: (folder / MANIFEST).unlink(), "is not there yet"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
    ],
    ids=["a byte changed", "a file gone", "no manifest", "a damaged manifest"],
)
def test_a_changed_artifact_is_noticed_and_remade(damage, reason, build, copy, scan, miniature, capsys):
    """Only that one, with the reason, and the same file as before."""
    folder = copy.onnx("clip_l")
    damage(folder)
    Export(str(miniature), copy.root.parent).onnx(**scan)
    lines = capsys.readouterr().out.splitlines()
    (making,) = [line for line in lines if "making it" in line]
    assert making.startswith("onnx clip_l: making it (") and reason in making
    assert f"onnx clip_l: {folder}" in lines
    assert [line for line in lines if line.endswith("up to date")] == up_to_date(
        *(label for label in ARTIFACTS if label != "onnx clip_l")
    )
    assert (folder / "model.onnx").read_bytes() == (build.onnx("clip_l") / "model.onnx").read_bytes()
    assert not partial_folders(copy.root)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_another_calibration_remakes_the_fp8_file(build, calibration, copy, miniature, capsys):
    """The FP8 file is made from the calibration's ranges, and the calibration from its settings."""
    Export(str(miniature), copy.root.parent).fp8(**calibration | {"steps": 2, "prompts": 2})
    lines = capsys.readouterr().out.splitlines()
    assert "calibration: making it (settings differ: prompts 8 → 2, steps 4 → 2)" in lines
    assert any(
        line.startswith("onnx-fp8 mmdit: making it (made_from differ: calibration.json") for line in lines
    )
    path = Path("model.onnx")
    folders = (build.onnx("mmdit", Precision.FP8), copy.onnx("mmdit", Precision.FP8))
    assert (folders[0] / path).read_bytes() != (folders[1] / path).read_bytes()


def test_an_error_while_remaking_keeps_the_old_artifact(copy, scan, miniature, monkeypatch):
    """What was there stays usable until something whole can take its place."""
    folder = copy.onnx("clip_l")
    flip_a_byte(folder / "model.onnx")
    before = (folder / "model.onnx").read_bytes()

    def fail(*_: object) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr("export.onnx_from_checkpoint.load_module", fail)
    with pytest.raises(CheckpointError):
        Export(str(miniature), copy.root.parent).onnx(**scan)
    assert (folder / "model.onnx").read_bytes() == before
    assert not partial_folders(copy.root)
