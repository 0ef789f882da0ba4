"""The evaluation prompts: disjoint from calibration's, the same every time, and errors that name a line."""

import csv

import pytest

from export.prompts import calibration_prompts
from mmdit.errors import QuantizationError
from quality.prompts import PROMPTS, check_disjoint, evaluation_tasks, read_prompts, tasks_digest


def test_the_projects_evaluation_prompts_are_many_different_and_none_of_calibrations():
    """64, each once, whatever the case or the white space."""
    tasks = evaluation_tasks(64, miniature=False)
    assert len({" ".join(task.prompt.casefold().split()) for task in tasks}) == 64
    assert any(task.negative_prompt for task in tasks)
    check_disjoint([task.prompt for task in tasks], [prompt for prompt, _ in calibration_prompts()])


@pytest.mark.parametrize("change", [str, str.upper, lambda text: f"  {text.replace(' ', '  ')} "])
def test_an_evaluation_prompt_of_the_calibration_set_is_an_error_that_names_it(tmp_path, change):
    """Case and white space do not hide it; it is found also beyond the prompts that are used."""
    seen = next(prompt for prompt, _ in calibration_prompts() if len(prompt.split()) > 3)
    file = tmp_path / "own.tsv"
    file.write_text(f"prompt\tnegative_prompt\na new one\t\n{change(seen)}\t\n", encoding="utf-8")
    with pytest.raises(QuantizationError, match="is in the calibration set") as error:
        evaluation_tasks(1, miniature=False, file=file)
    assert repr(change(seen)) in str(error.value)


def test_the_miniature_is_asked_for_scenes_that_its_training_never_saw():
    """Each with the scene that the picture should show; seeds count up from 0."""
    tasks = evaluation_tasks(16, miniature=True)
    assert [task.seed for task in tasks] == list(range(16))
    assert all(task.scene is not None and task.scene.held_out for task in tasks)
    assert tasks == evaluation_tasks(200, miniature=True)[:16]


def test_a_file_takes_the_place_of_the_default_for_every_model(tmp_path):
    """A prompt without a negative prompt keeps its tab."""
    file = tmp_path / "own.tsv"
    file.write_text("prompt\tnegative_prompt\na heron\t\nein Reiher\tblurry\n")
    (only,) = evaluation_tasks(1, miniature=True, file=file)
    assert (only.prompt, only.negative_prompt, only.seed, only.scene) == ("a heron", "", 0, None)
    assert evaluation_tasks(2, miniature=False, file=file)[1].negative_prompt == "blurry"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no table of prompts"),
        ("prompt,negative_prompt\na,b\n", "expected the columns prompt and negative_prompt"),
        ("prompt\tnegative_prompt\na heron\n", "line 2: expected a prompt, a tab"),
        ("prompt\tnegative_prompt\na heron\t\n \tblurry\n", "line 3: expected a prompt, a tab"),
        ("prompt\tnegative_prompt\na heron\t\n", r"--count 2 is out of range: own.tsv has 1 prompts"),
        (b"prompt\tnegative_prompt\n\xff\t\n", "no table of prompts"),
    ],
)
def test_a_file_that_is_no_table_of_prompts_is_refused_with_the_line(tmp_path, text, words):
    """A prompt that would be read wrongly is worse than none."""
    file = tmp_path / "own.tsv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(QuantizationError, match=words):
        evaluation_tasks(2, miniature=False, file=file)


def test_a_missing_file_and_a_count_of_none_are_refused(tmp_path):
    """One line each, with the value."""
    with pytest.raises(QuantizationError, match="own.tsv is not there"):
        read_prompts(tmp_path / "own.tsv")
    with pytest.raises(QuantizationError, match="--count 0 is out of range"):
        evaluation_tasks(0, miniature=True)


def test_another_prompt_seed_or_negative_prompt_is_another_digest():
    """The gate is made again when what is asked for changes."""
    tasks = evaluation_tasks(3, miniature=False)
    others = [
        tasks[:2],
        [tasks[0], tasks[2], tasks[1]],
        [*tasks[:2], type(tasks[2])(tasks[2].prompt, "else", 2)],
    ]
    assert len({tasks_digest(each) for each in (tasks, *others)}) == 4


def test_the_prompt_file_has_two_columns_throughout():
    """No tab was lost when it was edited."""
    with PROMPTS.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert {len(row) for row in rows} == {2}
    assert all(row == [cell.strip() for cell in row] for row in rows)
