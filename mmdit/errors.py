"""The errors that a user can cause and mend; each message names the value, what was expected and the way out.

MmditError
├── CheckpointError     a checkpoint that cannot be read, is incomplete or damaged
├── ContractError       a size, tensor or model that the contract does not allow
├── ArtifactError       an artifact that is missing, half there, or of another model
├── QuantizationError   a precision that cannot be had, or was not reached
├── TargetError         an engine target that this machine cannot build
├── EngineError         an engine that could not be built or run
├── RepositoryError     a Triton model repository that would not be right
└── ServerError         a Triton server that cannot start, or does not answer
    ├── UnavailableError    the server takes no request now: the same may be asked again
    └── DeadlineError       the answer was not there in time
"""

import sys
from collections.abc import Callable


class MmditError(Exception):
    """Base of all errors that end a command with exit status 2 and one readable line."""


class CheckpointError(MmditError):
    """The checkpoint cannot be read, is incomplete or damaged."""


class ContractError(MmditError):
    """A size, tensor or model that the contract does not allow."""


class ArtifactError(MmditError):
    """An artifact is missing, half there, or made from another model."""


class QuantizationError(MmditError):
    """A precision cannot be had, or was not reached."""


class TargetError(MmditError):
    """This machine cannot build for the engine target."""


class EngineError(MmditError):
    """An engine could not be built or run."""


class RepositoryError(MmditError):
    """The Triton model repository would not be right."""


class ServerError(MmditError):
    """The Triton server cannot start, or does not answer."""


class UnavailableError(ServerError):
    """The server takes no request now (its queue is full, it stops, it is not there): ask again later."""


class DeadlineError(ServerError):
    """The answer was not there within the time that its client gave it."""


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to stand in a message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0, 2 after a user's error, 130 after Ctrl-C."""
    try:
        sys.exit(main() or 0)
    except MmditError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output, `head` say, has seen enough
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # no space, no permission, a folder where a file should be
        print(f"error: {error.filename or 'the file system'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
