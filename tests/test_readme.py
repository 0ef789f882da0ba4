"""The README's commands and code are run, or at least known to make."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs/serving.md").read_text(encoding="utf-8")


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
