"""TensorRT plans as Triton loads them: profiles, their memory, CUDA graphs, and one plan for each GPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_plans import CAPABILITIES, write_engines
from written_gate import write_gate

from mmdit.artifact import Layout, read_manifest
from mmdit.contract import COMPONENTS, TEXT_ENCODERS, Precision, components, profiles
from mmdit.errors import RepositoryError
from mmdit.shapes import NAMES, shape_set
from serve import model_config, repository
from serve.engine_set import Engines
from serve.repository import package

ROOT = Path(__file__).resolve().parents[2]
BOTH = ("ada", "hopper")


def configs(layout: Layout, *targets: str, precision=Precision.FP16):
    """The packaged configs of the engines, by component."""
    output = layout.repository("-".join(targets), precision)
    package([Engines(layout, target, precision) for target in targets], output)
    return {name: model_config.written(output / name / "config.pbtxt") for name in COMPONENTS}


@pytest.fixture(params=NAMES)
def shapes(large, request):
    """Every shape set, for SD3.5 Large."""
    return shape_set(large, request.param)


@pytest.fixture
def layout(large, shapes, tmp_path) -> Layout:
    """Large's FP16 engines for Hopper with the shape set."""
    layout = Layout("large", tmp_path)
    write_engines(layout, large, shapes, precision=Precision.FP16)
    return layout


def test_each_profile_gets_a_context_of_its_own_size(layout, shapes):
    """Triton's default gives each context the largest profile's memory."""
    written = configs(layout, "hopper")
    mmdit = written["mmdit"]
    assert list(mmdit.instance_group[0].profile) == [str(index) for index in range(len(shapes.ranges))]
    strategy = mmdit.parameters["execution_context_allocation_strategy"].string_value
    assert strategy == "ON_PROFILE_CHANGE"
    for name in (*TEXT_ENCODERS, "vae_decoder"):  # one profile: the default is the same
        assert not written[name].instance_group[0].profile
        assert "execution_context_allocation_strategy" not in written[name].parameters


def test_the_shapes_of_static_profiles_are_captured_as_cuda_graphs(layout, shapes, large):
    """Exactly those, with every input, without the rows: Triton replays a graph for equal shapes alone."""
    for name, config in configs(layout, "hopper").items():
        signature = components(large, shapes)[name]
        static = [p for p in profiles(signature, shapes) if all(low == high for low, _, high in p.values())]
        cuda = config.optimization.cuda
        assert cuda.graphs == bool(static) and not cuda.output_copy_stream
        found = [
            {key: (spec.batch_size, *map(int, shape.dim)) for key, shape in spec.input.items()}
            for spec in cuda.graph_spec
        ]
        assert found == [{key: low for key, (low, _, _) in table.items()} for table in static]
        assert found or name == "vae_decoder"  # whose one profile spans all sizes


def test_the_backend_takes_the_static_profile_for_its_shape(shapes, large):
    """By its own measure of the distance to each profile's usual shape; of equals it takes the first.

    As in instance_state.cc of July 2026, which compares each dim with the one before it.
    """
    tables = profiles(components(large, shapes)["mmdit"], shapes)
    asked = {name: low for name, (low, _, _) in tables[0].items()}

    def distance(table) -> float:
        total = 0
        for name, (low, usual, high) in table.items():
            shape = asked[name]
            if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return float("inf")
            total += abs(usual[0] - shape[0])
            total += sum(abs(a - b) for a, b in zip(usual[1:], shape[:-1], strict=True))
        return total

    distances = [distance(table) for table in tables]
    assert distances.index(min(distances)) == 0


@pytest.mark.parametrize(
    ("text", "graphs"),
    [
        ("optimization { cuda { graphs: false } }", False),
        ("optimization { cuda { busy_wait_events: true } }", False),
        ("optimization { priority: PRIORITY_MAX }", True),
        (
            'parameters { key: "execution_context_allocation_strategy" value { string_value: "STATIC" } }',
            True,
        ),
    ],
)
def test_the_operators_policy_decides_about_graphs_and_memory(
    large,
    tmp_path,
    monkeypatch,
    text,
    graphs,
):
    """A `cuda` block of the policy's, or a strategy, is kept as it is."""
    layout = Layout("large", tmp_path)
    write_engines(layout, large, shape_set(large, "square-1024"), precision=Precision.FP16)
    policies = tmp_path / "model_repository"
    shutil.copytree(ROOT / "model_repository", policies)
    (policies / "mmdit/config.pbtxt").write_text(f"instance_group [ {{ count: 1 }} ]\n{text}")
    monkeypatch.setattr(repository, "POLICIES", policies)
    config = configs(layout, "hopper")["mmdit"]
    assert config.optimization.cuda.graphs == graphs
    strategy = config.parameters["execution_context_allocation_strategy"].string_value
    assert strategy == ("STATIC" if "STATIC" in text else "ON_PROFILE_CHANGE")


def test_the_cpu_repository_has_neither_graphs_nor_gpu_parameters(fp16_repository):
    for name in COMPONENTS:
        config = model_config.written(fp16_repository / name / "config.pbtxt")
        assert not config.HasField("optimization") and not config.parameters
        assert not config.cc_model_filenames and not config.instance_group[0].profile


@pytest.fixture
def both(large, tmp_path) -> Layout:
    """Large's FP8 engines for Ada and Hopper."""
    layout = Layout("large", tmp_path)
    for target in BOTH:
        write_engines(layout, large, shape_set(large, "square-1024"), target=target)
    return layout


def test_one_repository_holds_a_plan_for_each_gpu(both):
    """Triton takes the one of its GPU's compute capability; all else is shared."""
    write_gate(both, "ada")
    write_gate(both, "hopper")
    written = configs(both, *BOTH, precision=Precision.FP8)
    output = both.repository("ada-hopper", Precision.FP8)
    for name, config in written.items():
        assert dict(config.cc_model_filenames) == {"8.9": "ada.plan", "9.0": "hopper.plan"}
        assert {path.name for path in (output / name / "1").iterdir()} == {"ada.plan", "hopper.plan"}
        for target in BOTH:
            assert (output / name / f"1/{target}.plan").read_bytes().startswith(target.encode())
    settings = read_manifest(output).settings
    assert settings["targets"] == list(BOTH)
    assert {plan["file"] for plan in settings["plans"]} == {
        f"{name}/1/{target}.plan" for name in COMPONENTS for target in BOTH
    }
    assert {plan["target"]: plan["compute_capability"] for plan in settings["plans"]} == {
        target: CAPABILITIES[target] for target in BOTH
    }


def test_a_single_target_keeps_tritons_usual_name(both):
    write_gate(both, "hopper")
    for config in configs(both, "hopper", precision=Precision.FP8).values():
        assert not config.cc_model_filenames


@pytest.mark.parametrize("judged", BOTH)
def test_each_targets_fp8_needs_its_own_passed_gate(both, judged):
    """Another GPU has other kernels."""
    write_gate(both, judged)
    (other,) = set(BOTH) - {judged}
    with pytest.raises(RepositoryError, match=f"for {other} are not to be served: .* never run"):
        configs(both, *BOTH, precision=Precision.FP8)
    assert not both.repository("ada-hopper", Precision.FP8).exists()


def test_targets_of_other_shape_sets_do_not_share_a_repository(both, large):
    """One scheduler obeys one table, and one config names the profiles of all."""
    write_engines(both, large, shape_set(large, "buckets-1mp"), target="ada")
    with pytest.raises(RepositoryError, match="hopper have another shapes than those for ada"):
        configs(both, *BOTH, precision=Precision.FP8)


def test_the_command_takes_targets_with_commas_in_any_order(both):
    """And prints how much shared memory a container needs; a GPU without FP8 joins with FP16."""
    for target in BOTH:
        write_gate(both, target)
    command = [sys.executable, "-m", "serve", "package", "--model", "large", "--build", str(both.root.parent)]
    done = subprocess.run(
        [*command, "--target", "hopper,ada"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "large/repository/ada-hopper-fp8\n" in done.stdout
    assert "shared memory: up to " in done.stdout and "--shm-size=" in done.stdout
    alone = subprocess.run(
        [*command, "--target", "cpu,ada"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 2 and "cpu" in alone.stderr


def test_a_gpu_without_fp8_joins_with_its_fp16_engines(both, large):
    """sm86 beside hopper's FP8: the precision is a target's own."""
    shapes = shape_set(large, "square-1024")
    write_engines(both, large, shapes, target="sm86", precision=Precision.FP16)
    write_gate(both, "hopper")
    output = both.repository("hopper-sm86", Precision.FP8)
    engines = [Engines(both, "hopper", Precision.FP8), Engines(both, "sm86", Precision.FP16)]
    package(engines, output)
    assert read_manifest(output).settings["precisions"] == {"hopper": "fp8", "sm86": "fp16"}
    assert Path(output / "mmdit/1/sm86.plan").is_file()
