"""Silence the libraries' own progress bars and notices, and let torch's threads wait quietly.

Imported first by the modules that load torch. Warnings about the model itself are still raised as errors.
"""

import logging
import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when torch is loaded. On shared cores a thread that spins at a barrier keeps the one that it waits for
# from running: an MMDiT of two threads took 0.8 s instead of 4 to 12.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for message in (
    ".*is not tested with current version of modelopt.*",  # transformers 5.23; the tests cover what is used
    ".*legacy TorchScript-based ONNX export.*",  # chosen on purpose, see OPSET
    ".*torch.jit.* is deprecated.*",
):
    warnings.filterwarnings("ignore", message=message)

import diffusers.utils.logging as diffusers_logging  # noqa: E402
import transformers.utils.logging as transformers_logging  # noqa: E402

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()
logging.getLogger("modelopt").setLevel(logging.WARNING)
