"""What TensorRT 10 and 11 write when they fail, sorted into causes with the way out.

The messages are shaped as users report them in public issue threads.
"""

import pytest

from engines.tensorrt.failures import CAUSES, way_out

ALLOCATOR = "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"
AUTOTUNING = (
    "Error Code: 9: Skipping tactic 0x0000000000000000 due to exception [tunable_graph.cpp:create:117] "
    "autotuning: User allocator error allocating 15485030400-byte buffer"
)
NO_KERNEL = (
    "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for "
    "node {ForeignNode[/blocks.0/Cast_output_0.../blocks.0/Add_4]}.)"
)
OLD_NO_KERNEL = "Could not find any implementation for node conv1/7x7_s2 + conv1/relu_7x7."
SKIPPED = (
    "Skipping tactic 4 due to insufficient memory on requested size of 66048 detected for tactic 0x1f. "
    "Try decreasing the workspace size with IBuilderConfig::setMemoryPoolLimit()."
)
PARSED = (
    "In node 11 with name: /x_embedder/GridSample and operator: GridSample3D (checkFallbackPluginImporter): "
    'INVALID_NODE: creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
)
VERSION = (
    "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead == "
    "kSERIALIZATION_VERSION failed.Version tag does not match. Note: Current Version: 240, Serialized Engine "
    "Version: 239)"
)
DEVICE = (
    "The engine plan file is generated on an incompatible device, expecting compute 9.0 got compute 8.9, "
    "please rebuild."
)
TRUNCATED = "[stdArchiveReader.cpp] Error Code 1: Serialization (Magic tag does not match)"
NO_FP8 = (
    "IBuilder::buildSerializedNetwork: Error Code 9: API Usage Error (Networks with FP8 Q/DQ layers require "
    "hardware with FP8 support.)"
)
TYPES = (
    "ITensor::getDimensions: Error Code 4: API Usage Error (/norm/Mul: elementwise inputs must have same "
    "type. In a strongly typed network, Half and Float are mixed)"
)
DRIVER = (
    "CUDA initialization failure with error: 35. Please check your CUDA installation; TypeError: "
    "pybind11::init(): factory function returned nullptr"
)


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (f"{ALLOCATOR}; {AUTOTUNING}; {NO_KERNEL}", "--workspace-gib, or choose a smaller shape set"),
        (
            "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory "
            "(Requested size was 16581132288 bytes.)",
            "Building takes about twice",
        ),
        ("MemoryError: std::bad_alloc", "Building takes about twice"),
        (NO_KERNEL, "does node {ForeignNode[/blocks.0/Cast_output_0.../blocks.0/Add_4]} in its precision"),
        (f"{OLD_NO_KERNEL}; Invalid Engine", "does node conv1/7x7_s2 + conv1/relu_7x7 in its precision"),
        (
            "Could not find any implementation for node (Unnamed Layer* 8) [Convolution].",
            "does node (Unnamed Layer* 8) [Convolution] in its precision",
        ),
        (PARSED, "no GridSample3D as node /x_embedder/GridSample uses it"),
        ("UNSUPPORTED_NODE: Assertion failed: no importer registered for op", "does not know a node"),
        (VERSION, "of another TensorRT or GPU, or damaged"),
        (DEVICE, "of another TensorRT or GPU, or damaged"),
        (TRUNCATED, "of another TensorRT or GPU, or damaged"),
        (NO_FP8, "PRECISION=fp16"),
        (TYPES, "mixes types"),
        (DRIVER, "nvidia-smi"),
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("ImportError: libnvinfer.so.11: cannot open shared object file", "pip install tensorrt"),
        (
            "IBuilderConfig::addOptimizationProfile: Error Code 3: (kMIN dimensions of latent > kMAX)",
            "another shape set",
        ),
    ],
)
def test_a_failure_has_its_way_out(errors: str, words: str) -> None:
    assert words in (way_out(errors) or "")


def test_a_tactic_skipped_for_want_of_memory_explains_why_no_kernel_was_left() -> None:
    assert "Building takes about twice" in (way_out(NO_KERNEL, SKIPPED + NO_KERNEL) or "")


def test_a_tactic_skipped_for_want_of_memory_explains_nothing_else() -> None:
    assert "no GridSample3D" in (way_out(PARSED, SKIPPED) or "")


def test_memory_that_lacks_when_an_engine_is_loaded_is_not_the_builders() -> None:
    assert "--workspace-gib" not in (way_out(ALLOCATOR, building=False) or "")
    assert "smaller shape set" in (way_out(ALLOCATOR, building=False) or "")


def test_a_failure_that_nobody_knows_gets_no_advice() -> None:
    assert way_out("Error Code 99: (Assertion foo == bar failed.)") is None


def test_every_cause_is_reached_by_a_message_above() -> None:
    messages = [value for name, value in globals().items() if name.isupper() and isinstance(value, str)]
    messages += ["no space left on device", "cannot open shared object file", "unsupported_node", "kMIN"]
    reached = {way_out(message) for message in messages}
    assert len(reached) >= len({cause.name for cause in CAUSES})
