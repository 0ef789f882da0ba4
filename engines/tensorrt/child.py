"""A function in a process of its own: its memory is returned, and a crash ends it alone.

TensorRT's builder holds the weights several times over, keeps CUDA's context and may end its process. The
child takes a pickled call on its standard input and answers on its standard output; what libraries print
there goes to stderr, where the progress bar is too.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from mmdit.errors import EngineError, MmditError

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WAYS_OUT = {
    signal.SIGKILL: "the machine's memory probably ran out: free some, or build on a machine with more",
    signal.SIGTERM: "something on this machine ended it",
}
_CRASHED = (
    "TensorRT or the GPU's driver crashed: the driver's log (`dmesg`) may say why; try a lower "
    "--optimization-level, or another version of TensorRT"
)


def in_child(component: str, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Call an importable function in a child process, and give what it returns.

    An error of this project that it raises is raised here. Raises EngineError when the process ends without
    an answer, with its signal. Ctrl-C lets it end by itself; a second one ends it at once.
    """
    call = pickle.dumps((function, arguments, keywords))
    paths = [path or os.getcwd() for path in sys.path]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "engines.tensorrt.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    ) as child:
        try:
            answer, _ = child.communicate(call)
        except KeyboardInterrupt:
            _end(component, child)
            raise
    if child.returncode < 0:
        number = signal.Signals(-child.returncode)
        why = _WAYS_OUT.get(number, _CRASHED)
        raise EngineError(f"{component}: the process that worked on its engine died of {number.name}: {why}")
    if child.returncode or not answer:
        raise EngineError(
            f"{component}: the process that worked on its engine ended with status {child.returncode} and no "
            "result: what it wrote stands above"
        )
    raised, result = pickle.loads(answer)
    if raised:
        raise result
    return result


def _end(component: str, child: "subprocess.Popen[bytes]") -> None:
    """Wait for a child that is to stop; Ctrl-C reached it too, but a signal to this process alone did not."""
    print(f"{component}: stopping at TensorRT's next step; Ctrl-C again ends it at once", file=sys.stderr)
    try:
        child.send_signal(signal.SIGINT)
        child.wait()
    except KeyboardInterrupt:
        child.kill()


def main() -> None:
    """In the child: take the call, make it, answer with ("did it raise?", its result or error)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no build goes on without its parent
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        try:
            function, arguments, keywords = pickle.load(sys.stdin.buffer)
            answer = False, function(*arguments, **keywords)
        except (MmditError, KeyboardInterrupt) as error:
            answer = True, type(error)(*error.args)  # without its cause, which may not be picklable
        with contextlib.suppress(BrokenPipeError):
            answers.write(pickle.dumps(answer))


if __name__ == "__main__":
    main()
