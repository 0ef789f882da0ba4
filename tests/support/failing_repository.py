"""A packaged repository whose models fail when they are told to, as an operator's might by themselves.

Beside each `model.py` goes the real one; the new one looks at each call for a file that names a failure.
"""

import shutil
from pathlib import Path

FAILURES = ("error", "exception", "unavailable")
SLOW = "slow"  # no failure: takes a second longer
WRAPPER = """
import time
from pathlib import Path

import triton_python_backend_utils as pb_utils
from real_model import TritonPythonModel as Real

TOLD = Path(__file__).with_name("failure")


class TritonPythonModel(Real):
    def execute(self, requests):
        if not TOLD.exists():
            return super().execute(requests)
        failure, message = TOLD.read_text(), f"{TOLD.parent.parent.name} was told to fail"
        if failure == "slow":
            time.sleep(1)
            return super().execute(requests)
        if failure == "exception":
            raise RuntimeError(message)
        code = pb_utils.TritonError.UNAVAILABLE if failure == "unavailable" else pb_utils.TritonError.INTERNAL
        error = pb_utils.TritonError(message, code)
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
"""


class FailingRepository:
    """A copy of a packaged repository, and what its models are told."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.folder = shutil.copytree(original, folder)
        for model in folder.glob("*/1/model.py"):
            model.rename(model.with_name("real_model.py"))
            model.write_text(WRAPPER)

    def fail(self, model: str, failure: str) -> None:
        """From its next call on the model fails so: one of FAILURES, or SLOW."""
        told = self.folder / model / "1/failure"
        told.with_suffix(".new").write_text(failure)
        told.with_suffix(".new").rename(told)

    def recover(self) -> None:
        """Every model works again."""
        for told in self.folder.glob("*/1/failure"):
            told.unlink()

    def set_parameter(self, model: str, name: str, value: int) -> None:
        """Change a policy in the model's packaged config.pbtxt."""
        config = self.folder / model / "config.pbtxt"
        before, found, after = config.read_text().partition(f'key: "{name}"')
        assert found, f"{config} has no parameter {name}"
        old = after[: after.index("}")]
        config.write_text(
            before + found + after.replace(old, f'\n  value {{\n    string_value: "{value}"\n  ', 1)
        )
