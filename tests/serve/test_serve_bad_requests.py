"""A real server before requests that no client should make, by the thousand: each ends with an error that
names what is wrong, or with an answer; the models' processes live on, and pictures stay what they are.
"""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from raw_requests import Raw, connected, raw

from mmdit.contract import Dtype, components, served_models
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set
from serve.processes import model_processes

# Model → how many requests it gets. Inner models have clients of their own too.
EXAMPLES = {"text_to_image": 300, "text_to_image_stream": 200, "denoiser": 200, "text_encoder": 80}
EXAMPLES |= {"prompt_encoder": 50, "picture": 60, "mmdit": 60, "vae_decoder": 60, "clip_l": 40, "t5": 20}
# Whose errors are an engine's, which knows nodes of a graph and no names of inputs.
ENGINES = ("mmdit", "vae_decoder", "clip_l", "t5")
SIZE = {"h": 8, "w": 8, "H": 64, "W": 64, "r": 1}
# Not so many that their bytes wrap round 64 bits: Triton 2.51 takes that for an empty tensor, and the model's
# process dies of it (mended upstream in May 2025, github.com/triton-inference-server/server/pull/8182).
HUGE = (1000, 2**20, 2**31 - 1)
# Triton 2.51 of an ensemble's request without its prompt and with other inputs: it counts them.
NO_PROMPT = "at least one output is not set"


@pytest.fixture(scope="module")
def signatures(miniature):
    """Model → its tensors, by the contract."""
    family = family_from_checkpoint(miniature)
    return components(family, shape_set(family)) | served_models(family)


@pytest.fixture(scope="module")
def connection(server):
    """A raw connection to the server."""
    with connected(server.ports.grpc) as opened:
        yield opened


@pytest.fixture(autouse=True)
def unharmed(server, client):
    """The same processes and the same picture, before and after."""
    processes = model_processes(server._process.pid)
    before = client.generate("a circle", seed=5, steps=3).image
    yield
    assert server.failure() is None
    assert model_processes(server._process.pid) == processes
    np.testing.assert_array_equal(client.generate("a circle", seed=5, steps=3).image, before)


def right(signature):
    """A small request that is served."""
    values = {}
    for tensor in signature.inputs:
        if tensor.optional and tensor.name not in ("steps", "guidance_scale"):
            continue
        dims = [SIZE[dim] if isinstance(dim, str) else dim for dim in tensor.dims]
        dims = [1, *dims] if signature.max_rows else dims
        values[tensor.name] = np.full(
            dims, b"a circle" if tensor.dtype is Dtype.BYTES else 1, tensor.dtype.numpy
        )
    return {name: raw(value) for name, value in values.items()}


def content(tensor):
    """Bytes of one element that is extreme, or none of its kind."""
    if tensor.dtype is Dtype.BYTES:
        text = st.sampled_from(
            [b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"x" * 8192, b"x" * 8193, "🙂".encode() * 2100]
        ) | st.binary(max_size=50)
        whole = text.map(lambda value: len(value).to_bytes(4, "little") + value)
        return whole | st.sampled_from([b"", b"\1", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7fabc", bytes(8)])
    if tensor.dtype in (Dtype.INT32, Dtype.INT64):
        numbers = st.sampled_from([0, -1, -64, 1, 63, 64, 80, 120, 272, 2**15, 2**31 - 1, -(2**31)])
        if tensor.name == "steps":
            numbers = numbers.filter(lambda number: number < 5 or number > 200)
    elif tensor.dtype in (Dtype.FP16, Dtype.FP32):
        numbers = st.sampled_from([0.0, -1.0, 1.0, 5.0, 101.0, 1e-7, 6e4, np.nan, np.inf, -np.inf])
    else:
        numbers = st.integers(0, 255)
    return numbers.map(lambda number: np.asarray(number).astype(tensor.dtype.numpy).tobytes())


@st.composite
def wrong(draw, tensor, base):
    """The tensor with something about it that is not as it should be, and often is all the same."""
    dims = [SIZE[dim] if isinstance(dim, str) else dim for dim in tensor.dims]
    shape = base.shape if base else tuple(dims)
    element = draw(content(tensor))
    count = int(np.prod(shape))
    kind = draw(st.sampled_from(["value", "value", "dtype", "shape", "claimed", "bytes"]))
    if kind == "value":
        return Raw(tensor.dtype.value, shape, element * count if count <= 4096 or base is None else element)
    if kind == "dtype":
        dtype = draw(
            st.sampled_from([*(each.value for each in Dtype), "FP64", "BF16", "UINT64", "", "STRING"])
        )
        return Raw(dtype, shape, element * count)
    if kind == "shape":  # honest, and of other dims
        changed = draw(st.lists(st.integers(0, 9), max_size=4).filter(lambda given: np.prod(given) < 4096))
        index = draw(st.integers(0, len(shape) - 1))
        changed = draw(
            st.sampled_from([tuple(changed), shape[:index] + (0,) + shape[index + 1 :], shape[1:]])
        )
        return Raw(tensor.dtype.value, changed, element * int(np.prod(changed)))
    if kind == "claimed":  # what the bytes cannot be
        index = draw(st.integers(0, len(shape) - 1))
        claimed = list(shape)
        claimed[index] = draw(st.sampled_from([-1, -(2**31), *HUGE]))
        return Raw(tensor.dtype.value, tuple(claimed), draw(st.sampled_from([b"", element])))
    return Raw(tensor.dtype.value, shape, (element * count)[: draw(st.integers(0, 64))])


@st.composite
def requests(draw, signature):
    """A request, and which of its tensors are wrong, missing or unknown."""
    request = right(signature)
    names = {tensor.name: tensor for tensor in signature.inputs}
    spoilt = draw(st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=3, unique=True))
    for name in spoilt:
        request[name] = draw(wrong(names[name], request.get(name)))
    if draw(st.integers(0, 9)) == 0:
        spoilt.append(draw(st.sampled_from(sorted(names))))
        request.pop(spoilt[-1], None)
    if draw(st.integers(0, 9)) == 0:
        spoilt.append("nothing")
        request["nothing"] = Raw("INT32", (1,), bytes(4))
    return request, spoilt


@pytest.mark.parametrize("model", EXAMPLES)
def test_a_wrong_request_ends_with_an_error_that_names_what_is_wrong(signatures, connection, model):
    """Or with an answer, if it was right by chance."""
    stream = model == "text_to_image_stream"

    @hypothesis.settings(
        derandomize=True, database=None, deadline=None, max_examples=EXAMPLES[model], print_blob=False
    )
    @hypothesis.given(requests(signatures[model]))
    def ask(drawn):
        request, spoilt = drawn
        answer = connection.send(model, request, stream=stream)
        if answer.code is None:
            assert answer.responses >= 1
            return
        assert answer.message
        if model in ENGINES:
            return
        names = {*spoilt, "size"} if {"height", "width", "latents"} & {*spoilt} else {*spoilt}
        names |= {"height", "width"} if "latents" in spoilt else set()
        names |= {"time-out"} if "deadline" in spoilt else set()
        assert any(name in answer.message for name in names) or NO_PROMPT in answer.message, answer.message

    ask()
