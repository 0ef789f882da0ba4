"""What the gate asks for: prompts that calibration has not seen, each with the seed of its noise."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.prompts import calibration_prompts
from mmdit.artifact import digest
from mmdit.errors import QuantizationError

if TYPE_CHECKING:
    from miniature.scenes import Scene

PROMPTS = Path(__file__).with_name("evaluation_prompts.tsv")


@dataclass(frozen=True)
class Task:
    """One picture to make; `scene` is what it should show, where a program can read that."""

    prompt: str
    negative_prompt: str
    seed: int
    scene: "Scene | None" = None


def evaluation_tasks(count: int, *, miniature: bool, file: Path | None = None) -> list[Task]:
    """The first `count` tasks, the same every time; their seeds count up from 0.

    From `file`, else for the miniature captions of scenes that its training never saw, else the project's
    own prompts. Raises QuantizationError when there are not so many, when the file is no table of
    prompts, or when calibration has seen one of them: FP8's ranges were made on it.
    """
    if count < 1:
        raise QuantizationError(f"--count {count} is out of range: expected 1 or more")
    if miniature and file is None:
        from miniature.tasks import tasks

        found = [Task(each.caption, "", each.seed, each.scene) for each in tasks(count)]
        source = "the miniature's held-out captions"
    else:
        rows = read_prompts(file or PROMPTS)
        found = [Task(prompt, negative, seed) for seed, (prompt, negative) in enumerate(rows)]
        source = (file or PROMPTS).name
    check_disjoint([task.prompt for task in found], [prompt for prompt, _ in calibration_prompts()])
    if count > len(found):
        raise QuantizationError(f"--count {count} is out of range: {source} has {len(found)} prompts")
    return found[:count]


def read_prompts(file: Path) -> list[tuple[str, str]]:
    """The (prompt, negative prompt) pairs of a tab-separated file whose header names these columns.

    Raises QuantizationError naming the line that is wrong.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    except FileNotFoundError:
        raise QuantizationError(f"--prompts {file} is not there") from None
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise QuantizationError(f"--prompts {file} is no table of prompts ({error})") from None
    if header != ["prompt", "negative_prompt"]:
        raise QuantizationError(
            f"--prompts {file} begins with {header}: expected the columns prompt and negative_prompt, "
            "separated by a tab"
        )
    pairs: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or not row[0].strip():
            raise QuantizationError(
                f"--prompts {file}, line {number}: expected a prompt, a tab and a negative prompt (which may "
                f"be empty), found {row}"
            )
        pairs.append((row[0], row[1]))
    return pairs


def check_disjoint(evaluation: list[str], calibration: list[str]) -> None:
    """Raise QuantizationError naming the first evaluation prompt that calibration has seen.

    Case and white space make no difference.
    """
    seen = {_normal(prompt) for prompt in calibration}
    for prompt in evaluation:
        if _normal(prompt) in seen:
            raise QuantizationError(
                f"the evaluation prompt {prompt!r} is in the calibration set: FP8's ranges were made on it, "
                "so its picture proves nothing; take it out of one of them"
            )


def tasks_digest(tasks: list[Task]) -> str:
    """The SHA-256 of what is asked for."""
    return digest([[task.prompt, task.negative_prompt, task.seed] for task in tasks])


def _normal(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
