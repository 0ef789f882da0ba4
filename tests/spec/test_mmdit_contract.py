"""The tensor contract and the shape sets: one table that everything else derives from."""

import numpy as np
import pytest

from mmdit.contract import (
    COMPONENTS,
    Dtype,
    components,
    dims_at,
    dims_vary,
    ensemble_steps,
    profiles,
    served_models,
)
from mmdit.errors import ContractError
from mmdit.family import Family, family_from_checkpoint
from mmdit.shapes import NAMES, ShapeSet, SizeRange, shape_set, tokens


@pytest.fixture(scope="module")
def small(miniature) -> Family:
    return family_from_checkpoint(miniature)


@pytest.fixture(scope="module")
def large(small) -> Family:
    """As SD3.5 Large: pictures of 1024², position embedding up to 3072."""
    return small.model_copy(update={"name": "large", "default_size": 1024, "max_latent": 384})


@pytest.fixture(params=["small", "large"])
def family(request) -> Family:
    return request.getfixturevalue(request.param)


def test_every_component_has_a_signature(family):
    """All five, each with inputs and outputs of distinct names."""
    table = components(family, shape_set(family))
    assert tuple(table) == COMPONENTS
    for signature in table.values():
        for tensors in (signature.inputs, signature.outputs):
            names = [tensor.name for tensor in tensors]
            assert names and len(names) == len(set(names))
        assert signature.max_rows >= 1


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("component", COMPONENTS)
def test_profiles_are_ordered_and_lie_in_the_shape_set(component, name, large):
    """min ≤ opt ≤ max in every dim; the MMDiT has one for each range, the others one over all sizes."""
    shapes = shape_set(large, name)
    signature = components(large, shapes)[component]
    table = profiles(signature, shapes)
    ranges = shapes.ranges if component == "mmdit" else (shapes.hull,)
    for profile, each in zip(table, ranges, strict=True):
        assert list(profile) == [tensor.name for tensor in signature.inputs]
        for tensor in signature.inputs:
            low, middle, high = profile[tensor.name]
            assert all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True))
            assert (low[0], middle[0], high[0]) == (each.min_rows, each.opt_rows, each.max_rows)
            assert low[1:] == dims_at(tensor, each.min)
            assert middle[1:] == dims_at(tensor, each.opt)
            assert high[1:] == dims_at(tensor, each.max)
    assert max(each.max_rows for each in ranges) == signature.max_rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("guidance_scale", "rows"), [(3.5, 2), (1.0, 1)])
def test_the_first_profile_is_static_for_a_lone_request_of_the_usual_size(name, guidance_scale, rows, large):
    """Triton takes the nearest profile, of equals the first; a CUDA graph holds one shape."""
    first, *others = shape_set(large.model_copy(update={"guidance_scale": guidance_scale}), name).ranges
    assert first.static and first.max_rows == rows
    assert not any(each.static for each in others)


@pytest.mark.parametrize("name", NAMES)
def test_no_call_passes_the_budget_of_its_shape_set(name, large):
    """At the largest size and the most rows of each range."""
    shapes = shape_set(large, name)
    for each in shapes.ranges:
        assert each.max_rows * tokens(large, each.max) <= shapes.row_tokens


def test_buckets_share_a_range_with_their_neighbours(large):
    """Each in a range that is at most 15 % larger; together in fewer ranges than there are sizes."""
    shapes = shape_set(large, "buckets-1mp")
    assert len(shapes.ranges) == 1 + 5 and len(shapes.sizes) == 9
    for each in shapes.ranges[1:]:
        members = [size for size in shapes.sizes if each.holds(*size)]
        assert members
        assert tokens(large, each.max) <= 1.15 * max(tokens(large, size) for size in members)
    assert all(shapes.rows_at(*size) >= 8 for size in shapes.sizes)
    (alone,) = [each for each in shapes.ranges[1:] if each.holds(1024, 1024)]
    assert alone.opt == (1024, 1024)
    assert shapes.hull.max == (1536, 1536)  # what one range for all would reserve


def test_a_size_between_the_listed_ones_is_not_served(large):
    """Though its profile would take it: the models were not trained on it."""
    shapes = shape_set(large, "buckets-1mp")
    assert shapes.rows_at(1152, 896) and not shapes.rows_at(1136, 896)
    assert any(each.holds(1136, 896) for each in shapes.ranges)


def test_larger_pictures_leave_fewer_rows(large):
    """In one set of any sizes, by nested ranges."""
    shapes = shape_set(large, "any-256-1536")
    assert [shapes.rows_at(*size) for size in ((512, 256), (640, 512), (1024, 1024), (1536, 256))] == [
        *(16, 8, 8, 3)
    ]
    assert shapes.rows_at(1552, 256) == shapes.rows_at(1000, 1000) == 0


def test_only_what_depends_on_the_size_varies(family):
    """The text encoders have fixed dims but for rows."""
    table = components(family, shape_set(family))
    assert {name for name in COMPONENTS if dims_vary(table[name])} == {"mmdit", "vae_decoder"}


def test_dims_follow_from_the_size_in_pixels(small):
    """h and w are eighths of the height and the width, H and W the pixels themselves."""
    table = components(small, shape_set(small))
    (latent,), (image,) = table["vae_decoder"].inputs, table["vae_decoder"].outputs
    assert dims_at(latent, (80, 112)) == (16, 10, 14)
    assert dims_at(image, (80, 112)) == (3, 80, 112)


@pytest.mark.parametrize(
    ("name", "max_rows", "budget"),
    [("any-64-256", 16, 16 * 589), ("square-512", 16, 16 * 1357), ("square-1024", 8, 8 * 4429)],
)
def test_rows_follow_from_a_budget_of_tokens(name, max_rows, budget, large):
    """The table's numbers for SD3.5's 333 text tokens; longer texts leave room for fewer rows."""
    shapes = shape_set(large, name)
    _, size_range = shapes.ranges
    assert size_range.max_rows == max_rows
    assert max_rows * tokens(large, size_range.max) <= budget
    longer = large.model_copy(update={"t5_tokens": 512})
    rows = shape_set(longer, name).max_rows
    assert rows < max_rows
    assert rows * tokens(longer, size_range.max) <= budget < (rows + 1) * tokens(longer, size_range.max)


def test_a_family_has_a_shape_set_of_its_own_size(small, large):
    """Unless another is named."""
    assert shape_set(small).name == "any-64-256"
    assert shape_set(large).name == "square-1024"
    assert shape_set(large, "square-512").hull.max == (512, 512)


def test_an_unknown_shape_set_is_refused(small):
    """With the names that there are."""
    with pytest.raises(ContractError, match=r"'huge' is unknown: expected one of any-64-256, square-512"):
        shape_set(small, "huge")


def test_a_shape_set_beyond_the_position_embedding_is_refused(small):
    """Positions that were never embedded would be cropped in silence."""
    assert small.max_latent * 8 == 512
    assert shape_set(small, "square-512").hull.max == (512, 512)
    with pytest.raises(ContractError, match=r"'square-1024' goes up to 1024 pixels.*covers 512"):
        shape_set(small, "square-1024")


@pytest.mark.parametrize(
    "values",
    [
        {"min": (128, 64), "opt": (64, 64), "max": (128, 128), "max_rows": 2},
        {"min": (64, 64), "opt": (64, 128), "max": (128, 64), "max_rows": 2},
        {"min": (0, 64), "opt": (64, 64), "max": (64, 64), "max_rows": 2},
        {"min": (64, 64), "opt": (64, 64), "max": (64, 64), "max_rows": 1},
    ],
    ids=["min above opt", "opt above max", "nothing", "usual rows above the most"],
)
def test_a_size_range_that_cannot_be_a_profile_is_refused(values):
    """When it is made, not when TensorRT refuses it."""
    with pytest.raises(ValueError, match=r"needs 0 < min"):
        SizeRange(**values)


def test_a_size_range_holds_its_bounds_and_no_more():
    """Height and width each for themselves."""
    size_range = SizeRange(min=(64, 80), opt=(128, 128), max=(256, 160), max_rows=2)
    assert size_range.holds(64, 80) and size_range.holds(256, 160) and size_range.holds(256, 80)
    assert not size_range.holds(48, 80) and not size_range.holds(256, 176) and not size_range.holds(272, 80)


def test_a_shape_set_survives_a_manifest(large):
    """It travels as JSON to the packager and to the server."""
    shapes = shape_set(large)
    assert ShapeSet.model_validate_json(shapes.model_dump_json()) == shapes


@pytest.mark.parametrize("dtype", Dtype)
def test_a_dtype_has_its_names(dtype):
    """NumPy's type and the name in config.pbtxt, which has another for bytes."""
    assert dtype.triton == ("TYPE_STRING" if dtype is Dtype.BYTES else f"TYPE_{dtype.name}")
    if dtype not in (Dtype.BYTES, Dtype.BOOL):
        kind, bits = {"U": "u", "I": "i", "F": "f"}[dtype.name[0]], int(dtype.name.lstrip("UINTFP"))
        assert np.dtype(dtype.numpy) == np.dtype(f"{kind}{bits // 8}")


def test_the_ensemble_maps_every_tensor_once(family):
    """Triton's rules: each step's required inputs are mapped, each tensor is made once, none is unused."""
    served = served_models(family) | components(family, shape_set(family))
    whole = served["text_to_image"]
    available = {tensor.name for tensor in whole.inputs}
    made: list[str] = []
    read: set[str] = set()
    for model, inputs, outputs in ensemble_steps(family):
        names = {tensor.name: tensor for tensor in served[model].inputs}
        assert inputs.keys() <= names.keys()
        assert all(tensor.optional or name in inputs for name, tensor in names.items())
        assert set(inputs.values()) <= available  # linear: nothing is read before it is made
        assert outputs.keys() <= {tensor.name for tensor in served[model].outputs}
        read |= set(inputs.values())
        made += outputs.values()
        available |= set(outputs.values())
    assert len(made) == len(set(made))
    assert not set(made) & {tensor.name for tensor in whole.inputs}
    assert {tensor.name for tensor in whole.outputs} <= set(made)
    assert available == read | {tensor.name for tensor in whole.outputs}


def test_no_served_model_has_an_input_named_like_an_output(family):
    """Triton 2.51 answers twice, or never, when an ensemble's input and output share a name."""
    for name in ("text_to_image", "text_to_image_stream"):
        signature = served_models(family)[name]
        shared = {t.name for t in signature.inputs} & {t.name for t in signature.outputs}
        assert shared <= ({"steps"} if name == "text_to_image_stream" else set())  # a Python model may
