"""The report: one page that needs nothing else, and says first whether FP8 is fine."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stand_in_plans import write_engines

from measure.check_page import CheckRecord
from measure.check_page import page as check_page
from mmdit.artifact import Layout, Manifest, whole
from mmdit.contract import Precision
from mmdit.errors import ArtifactError
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set
from quality.figure import FIGURES
from quality.page import page
from quality.report import report
from quality.subject import Subject

AUDIT = {
    "layers": [
        {
            **{"name": "transformer_blocks.0.attn.to_q", "group": "attention", "precision": "fp8"},
            **{"reason": "large <matrix>", "flops": 4_000_000, "weights": 1000, "bytes_fp16": 2000},
            **{
                "bytes": 1004,
                "weight_amax": 0.5,
                "weight_scale": [0.001, 0.004],
                "amax": 12.5,
                "scale": 0.028,
            },
        },
        {
            **{"name": "proj_out", "group": "outside the blocks", "precision": "fp16", "reason": "small"},
            **{"flops": 1_000_000, "weights": 1000, "bytes_fp16": 2000, "bytes": 2000},
            **dict.fromkeys(("weight_amax", "weight_scale", "amax", "scale")),
        },
    ],
    "attention": [{"name": "transformer_blocks.0.attn", "precision": "fp16", "flops": 9}],
    "totals": {"linear_flops_in_fp8": 0.8},
    "remedies": [
        {
            **{"component": "t5", "remedy": "2^-3", "place": "wo", "tensor": "sum_4"},
            **{"magnitude": 91234.5, "reason": "overflows"},
        }
    ],
    "rules": [
        {"rule": "weights have a DequantizeLinear", "places": 61, "broken": []},
        {"rule": "no lone softmax", "places": 4, "broken": ["attn.2"]},
    ],
}


def content(**other: Any) -> dict[str, Any]:
    """A gate.json of three prompts, the second of which went black in FP8."""
    figures = [
        {"name": name, "fp8": 0.99, "floor": 0.999, "absent": "", "bound": None, "failure": None}
        for name in FIGURES
    ]
    figures[0] |= {"bound": 0.97}
    absent = {"fp8": None, "floor": None, "absent": "torchmetrics is not installed"}
    figures = [entry | (absent if entry["name"] == "lpips_mean" else {}) for entry in figures]
    return {
        **{"model": "tiny", "target": "hopper", "runtime": "tensorrt", "passed": True, "failures": []},
        "mission": {"figure": "ssim_mean", "asked": 0.97, "measured": 0.99, "met": True},
        "profile": {"name": "sd35", "description": "real", "measured": "not measured", "thresholds": {}},
        "settings": {
            **{"prompts": 3, "seeds": [0, 2], "steps": 2, "guidance_scale": 4.5, "size": [32, 32]},
        },
        "figures": figures,
        "steps": [
            {"timestep": 1000.0 - 400 * step, "fp8": {"error": error}, "floor": {"error": 0.001}}
            for step, error in enumerate((0.02, 0.0456))
        ],
        "pictures": [
            {
                **{"prompt": f"<prompt {number}>", "negative_prompt": "no & no", "seed": number},
                "flaws": {"fp32": None, "fp16": None, "fp8": "black" if number == 1 else None},
                "fp8": {"ssim": (0.9, 0.95, 0.5)[number], "ssim_objects": 0.8, "psnr": 30.0},
                "floor": {"ssim": 0.99, "ssim_objects": 0.99, "psnr": 60.0},
                "read": {
                    "fp16": "a circle on white",
                    "fp8": ("a circle", "a cross")[number == 2] + " on white",
                },
                "files": {name: f"pictures/{number:03}-{name}.png" for name in ("fp32", "fp16", "fp8")},
            }
            for number in range(3)
        ],
        "engine_bytes": {"mmdit-fp16": 4_000_000_000, "mmdit-fp8": 2_100_000_000, "t5-fp16": 9_000_000},
        "versions": {"torch": "2.13.0"},
        "seconds": 61.2,
    } | other


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of three prompts: FP16 is 2 levels off FP32, FP8 is 5 levels off FP16."""
    made = tmp_path_factory.mktemp("gate")
    (made / "pictures").mkdir()
    base = np.random.default_rng(0).integers(50, 200, (32, 32, 3))
    for number in range(3):
        for name, shift in (("fp32", 0), ("fp16", 2), ("fp8", 7)):
            picture = (base + shift).astype(np.uint8)
            Image.fromarray(picture).save(made / "pictures" / f"{number:03}-{name}.png")
    return made


@pytest.fixture(scope="module")
def text(folder) -> str:
    return page(content(), folder, AUDIT)


def test_the_page_refers_to_nothing_outside_itself(text):
    """No address, and every source is a data URI: it can be mailed."""
    assert not re.search(r"(?i)https?://|<link|<script|@import|url\(", text)
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == 3 * 5 + 1 and all(source.startswith("data:image/") for source in sources)


def test_the_page_is_well_formed(text):
    """Every element that has an end tag ends, in the order in which it began."""
    open_tags: list[str] = []
    left_open = {"meta", "img", "br", "p", "tr", "td", "th", "li"}

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in left_open:
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in left_open:
                assert open_tags.pop() == tag

    Checker().feed(text)
    assert open_tags == []


def test_the_verdict_and_the_mission_come_first(text, folder):
    """Passed or failed, and the promised SSIM; a failure with its figure, and both in colour."""
    headline = text[text.index("<h1>") : text.index("<h2>")]
    assert "FP8 may be served" in headline and ">met</b> (0.9900" in headline
    failed = content(
        passed=False,
        failures=["SSIM, mean is 0.5 < 0.97"],
        mission={"figure": "ssim_mean", "asked": 0.97, "measured": 0.5, "met": False},
    )
    headline = page(failed, folder, AUDIT)
    headline = headline[headline.index("<h1>") : headline.index("<h2>")]
    assert "FP8 is not to be served" in headline
    assert "SSIM, mean is 0.5 &lt; 0.97" in headline and ">not met</b> (0.5000" in headline


def test_each_figure_stands_beside_its_floor_and_an_absent_one_says_why(text):
    """All of them, the bound where there is one."""
    table = text[text.index("<h2>Figures") : text.index("<h2>Pictures")]
    assert all(meaning.label in html.unescape(table) for meaning in FIGURES.values())
    assert "0.9900<td class=number>0.9990<td class=number>≥ 0.97<td class=good>passed" in table
    assert "not measured: torchmetrics is not installed" in table


def test_the_flawed_and_the_least_alike_pictures_come_first(text):
    """Black, then the lowest SSIM; with what a program reads in it where that differs."""
    table = text[text.index("<h2>Pictures") : text.index("<h2>Error")]
    order = [int(found) for found in re.findall(r"&lt;prompt (\d)&gt;", table)]
    assert order == [1, 2, 0]
    assert "FP8 is black" in table and "FP8 shows a cross on white</b>, FP16 a circle on white" in table
    assert "no &amp; no" in table


def test_difference_maps_are_amplified_by_what_the_page_says(text):
    """5 levels times 50 are 250; the floor's 2 levels times the same are 100."""
    import base64
    import io

    assert "FP8 − FP16, ×50" in text and "amplified 50 times: black" in text
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    maps = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources[3:5]]
    assert [set(np.unique(each)) for each in maps] == [{250}, {100}]


def test_the_worst_timestep_is_told_beside_the_chart(text):
    section = text[text.index("<h2>Error") : text.index("<h2>Layers")]
    assert "data:image/svg+xml;base64," in section
    assert "timestep 600: 4.56 %, where the floor is 0.100 %" in section


def test_sizes_before_and_after_are_told(text):
    """Of the MMDiT and of all engines together."""
    section = text[text.index("<h2>Sizes") :]
    assert "4.00 GB<td class=number>2.10 GB<td class=number>52.5 %" in section
    assert "4.01 GB<td class=number>2.11 GB" in section and "<td>torch<td>2.13.0" in section


def test_an_audit_is_shown_with_its_totals_remedies_and_rules(text):
    """Escaped; a broken rule names its place, a remedy its reason."""
    section = text[text.index("<h2>Layers") : text.index("<h2>Sizes")]
    for words in ("large &lt;matrix&gt;", "linear flops in fp8", "9.123e+04", "kept", "broken at attn.2"):
        assert words in section, words
    assert "<td>sum_4<" in section and "<td>overflows\n" in section
    assert "0.001 to 0.004" in section and "1 in FP16." in section
    assert "transformer_blocks.0.attn.to_q" in section and "80.0 %" in section


def test_an_audit_without_remedies_says_so(folder):
    """Nothing overflowed."""
    assert "no remedy was needed" in page(content(), folder, AUDIT | {"remedies": []})


def test_on_a_cpu_the_page_says_that_the_floor_is_better_than_a_gpus(folder):
    """ONNX Runtime hides what FP16 does."""
    assert "On a CPU" in page(content(runtime="onnxruntime"), folder, AUDIT)
    assert "On a CPU" not in page(content(), folder, AUDIT)


@pytest.fixture
def judged(folder, miniature, tmp_path) -> Layout:
    """Engines for Hopper in both precisions, with the gate of `content` about them."""
    layout, family = Layout("miniature", tmp_path), family_from_checkpoint(miniature)
    write_engines(layout, family, shape_set(family))
    write_engines(layout, family, shape_set(family), precision=Precision.FP16, only=["mmdit"])
    files = Subject(layout, "hopper").files
    manifest = Manifest(kind="quality", checkpoint="one", made_from=files, settings={}, versions={})
    with whole(layout.quality("hopper"), manifest) as partial:
        (partial / "gate.json").write_text(json.dumps(content()))
        (partial / "pictures").mkdir()
        for picture in (folder / "pictures").iterdir():
            (partial / "pictures" / picture.name).write_bytes(picture.read_bytes())
    return layout


def write_export(layout: Layout, audit: dict) -> None:
    """The FP8 ONNX folder with its audit, as what the engine was made from."""
    manifest = Manifest(kind="onnx", checkpoint="one", made_from={}, settings={}, versions={})
    with whole(layout.onnx("mmdit", Precision.FP8), manifest) as partial:
        (partial / "model.onnx").write_text("a graph")
        (partial / "audit.json").write_text(json.dumps(audit))
    path = layout.engine("hopper", "mmdit", Precision.FP8) / "manifest.json"
    made_from = {"model.onnx": manifest.files["model.onnx"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_from": made_from}))


def test_the_page_is_written_once_and_again_when_the_audit_changes(judged, capsys):
    """The layers are those of the file that the engine was made from."""
    write_export(judged, AUDIT)
    assert "attn.2" in report(judged, "hopper", judged.root).read_text()
    report(judged, "hopper", judged.root)
    assert "report: up to date" in capsys.readouterr().out
    write_export(judged, AUDIT | {"rules": []})
    assert "attn.2" not in report(judged, "hopper", judged.root).read_text()


def write_check(folder: Path, name: str, verdict: str, **other: Any) -> None:
    """A record of gpu-check and its page, as measure/check_page.py makes them."""
    record = CheckRecord(
        date=name[:10],
        command="python -m measure check",
        machine={"gpu": "NVIDIA H100 80GB HBM3"},
        model="miniature",
        target="hopper",
        verdict=verdict,
        kept="fp16",
        torch=[{"variant": f"<{name}>", "rows": rows, "error": "late"} for rows in range(1, 9)],
    ).model_copy(update=other)
    (folder / f"{name}.json").write_text(record.model_dump_json())
    (folder / f"{name}.md").write_text(check_page(record))


def test_the_newest_gpu_check_of_the_model_is_summed_up(judged, tmp_path):
    """Name, date, verdict and the first rows; not another model's or target's, nor one that is damaged."""
    write_export(judged, AUDIT)
    folder = tmp_path / "measurements"
    folder.mkdir()
    assert "beside torch" not in report(judged, "hopper", folder).read_text()
    write_check(folder, "2026-11-20-gpu-check-h100-miniature", "the older")
    write_check(folder, "2026-11-22-gpu-check-h100-miniature", "the newer & faster")
    write_check(folder, "2026-11-23-gpu-check-h100-large", "a larger", model="large")
    write_check(folder, "2026-11-24-gpu-check-l40s-miniature", "a smaller", target="ada")
    (folder / "2026-11-25-gpu-check-h100-miniature.json").write_text("{")
    text = report(judged, "hopper", folder).read_text()
    section = text[text.index("<h2>On a GPU, beside torch") : text.index("<h2>Made with")]
    assert "2026-11-22, NVIDIA H100 80GB HBM3: kept: the newer &amp; faster." in section
    assert "docs/measurements/2026-11-22-gpu-check-h100-miniature.md" in section
    assert "<th>ms per step" in section and section.count("<tr>") == 1 + 6
    assert "torch &lt;2026-11-22" in section and "older" not in section


def test_layers_of_another_file_than_the_engines_are_not_reported(judged):
    """An FP8 file exported with another policy, after the gate."""
    write_export(judged, AUDIT)
    path = judged.engine("hopper", "mmdit", Precision.FP8) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_from": {"model.onnx": "other"}}))
    with pytest.raises(ArtifactError, match=r"onnx-fp8/mmdit is not what the FP8 engine was made from"):
        report(judged, "hopper", judged.root)


def test_a_gate_about_other_engines_is_not_reported(judged):
    """The page would praise what is not there."""
    manifest = judged.engine("hopper", "mmdit", Precision.FP8) / "manifest.json"
    changed = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(changed | {"files": {"model.plan": "1" * 64}}))
    with pytest.raises(ArtifactError, match=r"about other engines .*mmdit-fp8/model.plan.*run `make gate"):
        report(judged, "hopper", judged.root)


def test_without_a_gate_the_command_that_makes_it_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="run `make gate MODEL=miniature TARGET=cpu` first"):
        report(Layout("miniature", tmp_path), "cpu")
