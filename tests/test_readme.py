"""The README's commands and code run; the documents' links and module names exist."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "miniature/*.md")
    for path in ROOT.glob(pattern)
)

MODULES = [
    str(path)
    for folder in ROOT.iterdir()
    if folder.is_dir() and not folder.name.startswith(".") and folder.name != "build"
    for path in folder.rglob("*.py")
]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_make_command_of_the_readme_has_a_target():
    """`make -n` knows each, with its variables."""
    commands = set(re.findall(r"`(make [a-z0-9-]+[^`]*)`", README))
    for block in re.findall(r"```\n(.*?)```", README, re.S):
        commands |= {line.split("#")[0].strip() for line in block.splitlines() if line.startswith("make ")}
    assert len(commands) > 5
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", f"{command} -n"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_readmes_python_runs(server, tmp_path, monkeypatch, capsys):
    """The client's example, as it stands, on this server's port."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("localhost:8001", f"localhost:{server.ports.grpc}"), {})
    assert (tmp_path / "circle.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("Progress(step=") == 20


def test_the_inputs_and_outputs_of_docs_serving_are_the_contracts(miniature):
    """The two tables name every tensor of the served models, and no other."""
    from mmdit.contract import served_models
    from mmdit.family import family_from_checkpoint

    served = served_models(family_from_checkpoint(miniature))
    for field in ("inputs", "outputs"):
        start = SERVING.index(f"| {field[:-1]} |")
        table = SERVING[start : SERVING.index("\n\n", start)]
        first_cells = [line.split("|")[1] for line in table.splitlines()]
        named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
        models = (served["text_to_image"], served["text_to_image_stream"])
        assert named == {tensor.name for model in models for tensor in getattr(model, field)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_document_has_a_destination(page):
    """Files exist, and headings that a link names."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            destination = page.parent / file if file else page
            assert destination.exists(), link
            assert not anchor or anchor in anchors(destination), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_that_a_document_names_exists(page):
    """`serve/launcher.py`, or its last parts."""
    named = set(re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")))
    missing = {name for name in named if not any(file.endswith(f"/{name}") for file in MODULES)}
    assert not missing
