"""Work in a process of its own: what comes back, and what is said of a process that dies."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.tensorrt.child import in_child
from engines.tensorrt.monitor import interrupted_gently
from mmdit.errors import ArtifactError, EngineError

ROOT = Path(__file__).resolve().parents[2]


def named(value: int, *, name: str) -> dict[str, object]:
    print("a library's word")  # must not get between the answer's bytes
    os.write(1, b"and another\n")
    return {name: value, "process": os.getpid()}


def refuses() -> None:
    raise ArtifactError("clip_l: no such file") from ValueError("not for the parent")


def dies(number: int) -> None:
    if number == signal.SIGSEGV:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), number)
    time.sleep(10)


def leaves(status: int) -> None:
    os._exit(status)


def breaks() -> None:
    raise ZeroDivisionError("a mistake of this program")


def is_interrupted() -> None:
    raise KeyboardInterrupt


def waits_for_an_interrupt(marker: Path) -> None:
    with interrupted_gently() as interrupted:
        marker.write_text("building")
        for _ in range(400):
            if interrupted.is_set():
                break
            time.sleep(0.05)
        else:
            return
        marker.write_text("stopped gently")


def test_the_result_comes_from_another_process_and_what_it_prints_goes_to_stderr(
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = in_child("clip_l", named, 3, name="three")
    assert found["three"] == 3 and found["process"] != os.getpid()
    printed = capfd.readouterr()
    assert "a library's word" in printed.err and "and another" in printed.err
    assert printed.out == ""


def test_an_error_for_the_user_is_the_same_error_here() -> None:
    with pytest.raises(ArtifactError, match="^clip_l: no such file$"):
        in_child("clip_l", refuses)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "died of SIGKILL: the machine's memory probably ran out"),
        (signal.SIGSEGV, "died of SIGSEGV: TensorRT or the GPU's driver crashed"),
        (signal.SIGABRT, "died of SIGABRT: TensorRT or the GPU's driver crashed"),
        (signal.SIGTERM, "died of SIGTERM: something on this machine ended it"),
    ],
)
def test_a_process_that_dies_is_named_by_its_component_and_signal(number: int, words: str) -> None:
    with pytest.raises(EngineError, match=f"^t5: .*{words}[^\n]*$"):
        in_child("t5", dies, number)


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_leaves_without_a_result_is_an_error(status: int) -> None:
    with pytest.raises(EngineError, match=f"^t5: .* ended with status {status} and no result"):
        in_child("t5", leaves, status)


def test_a_mistake_of_the_program_shows_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match="^t5: .* ended with status 1"):
        in_child("t5", breaks)
    assert "ZeroDivisionError: a mistake of this program" in capfd.readouterr().err


def test_a_child_that_was_interrupted_interrupts_its_parent() -> None:
    with pytest.raises(KeyboardInterrupt):
        in_child("t5", is_interrupted)


@pytest.mark.parametrize("whole_group", [True, False])
def test_an_interrupt_lets_the_child_end_by_itself_before_the_command_ends(
    tmp_path: Path, whole_group: bool
) -> None:
    """Ctrl-C reaches parent and child; `kill -INT` the parent alone."""
    marker = tmp_path / "marker"
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path; from mmdit.errors import run_command\n"
        "from engines.tensorrt.child import in_child\n"
        "from test_engines_child import waits_for_an_interrupt\n"
        f"run_command(lambda: in_child('t5', waits_for_an_interrupt, Path({str(marker)!r})))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _wait_for(marker)
    (os.killpg if whole_group else os.kill)(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert parent.returncode == 130
    assert marker.read_text() == "stopped gently"
    assert "t5: stopping at TensorRT's next step" in errors and "Traceback" not in errors


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """A build that nobody waits for would hold the GPU's memory."""
    marker = tmp_path / "marker"
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path; from engines.tensorrt.child import in_child\n"
        "from test_engines_child import tells_who_it_is\n"
        f"in_child('t5', tells_who_it_is, Path({str(marker)!r}))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    _wait_for(marker)
    child = int(marker.read_text())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not _running(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child went on")


def tells_who_it_is(marker: Path) -> None:
    partial = marker.with_suffix(".partial")
    partial.write_text(str(os.getpid()))
    partial.rename(marker)
    time.sleep(30)


def test_an_interrupt_is_seen_while_the_main_thread_is_inside_tensorrt() -> None:
    """Python's handlers run on the main thread alone, and not while it is in C."""
    import threading

    seen = threading.Event()
    main_thread_left_c = threading.Event()

    def another_thread() -> None:
        time.sleep(0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # delivered here: the call in C goes on
        for _ in range(100):
            if interrupted.is_set():
                break
            time.sleep(0.01)
        if interrupted.is_set() and not main_thread_left_c.is_set():
            seen.set()

    with pytest.raises(KeyboardInterrupt), interrupted_gently() as interrupted:
        thread = threading.Thread(target=another_thread)
        thread.start()
        ctypes.CDLL(None).usleep(700_000)
        main_thread_left_c.set()
        thread.join()
    assert seen.is_set()


def _wait_for(marker: Path) -> None:
    for _ in range(400):
        if marker.exists() and marker.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"{marker} did not appear")


def _running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
