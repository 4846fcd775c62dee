"""Results computed from measurements."""

import dataclasses
import json
import pathlib
import types
import zipfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
    command,
    end_to_end,
    estimates,
    fault_injection,
    finite_flags,
    input_pipeline,
    measure,
    profile_step,
    programs,
    programs_bound,
    programs_peers,
    regression,
    scaling,
    startup,
    step_time,
    workers,
)
from benchmarks.contenders import network, ours_step
from inception_jax import config
from inception_jax.config import Model
from inception_jax.errors import ConfigError
from inception_jax.models import networks
from inception_jax.models.layers import Conv
from tests import small

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("stem", "image_size", "width"),
    [("paper", 64, 1.0), ("s16", 64, 1.0), ("s32", 64, 0.5), ("paper", 224, 1.0)],
)
def test_counts_match_our_network(stem: str, image_size: int, width: float) -> None:
    module = networks.create(Model(stem=stem, width=width), 200)

    def shapes() -> Any:
        images = jnp.zeros((1, image_size, image_size, 3))
        variables = module.init(jax.random.key(0), images)

        def is_conv(layer: nn.Module, method: str) -> bool:
            return isinstance(layer, Conv)

        _, captured = module.apply(
            variables, images, capture_intermediates=is_conv, mutable=["intermediates"]
        )
        return variables["params"], captured["intermediates"]

    params, outputs = jax.eval_shape(shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == network.parameters(
        stem, 200, width
    )
    grids = {
        tuple(key.key for key in path if hasattr(key, "key"))[:-1]: leaf.shape[1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(outputs)
    }
    macs = params["classifier"]["dense"]["kernel"].size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(key.key for key in path)
        if names[-1] == "kernel" and names[:-1] in grids:
            macs += leaf.size * grids[names[:-1]] ** 2
    assert macs == network.multiply_adds(stem, image_size, 200, width)


def test_bare_step_uses_the_counted_network() -> None:
    settings = {
        "stem": "s16",
        "dtype": "bfloat16",
        "image_size": 32,
        "batch_size": 8,
        "classes": 200,
    }
    run = ours_step.make_run(settings)
    assert run.config.model.dtype == "bfloat16"
    assert run.dataset.train.image_shape == (32, 32, 3)
    assert len(run.dataset.train) == 100_000 and len(run.dataset.evaluation) == 8
    assert run.dataset.num_classes == 200


def test_bare_steps_can_be_repeated(data_directory: pathlib.Path) -> None:
    settings = small.config(data_directory)
    settings.train.batch_size = 8
    made = ours_step.make_run(
        {"config": config.to_dict(settings), "image_size": 8, "batch_size": 8, "classes": 10}
    )
    made = dataclasses.replace(made, model=small.Network(0.0))
    step, train = ours_step.timed_step(made)
    assert "fusion" in (step.as_text() or "")
    for mode in (train, ours_step.timed_eval_step(made)):
        measured = mode(0.0)
        assert measured["count"] == 2 and measured["seconds"] > 0


def rounds(*seconds: float) -> list[dict[str, float]]:
    return [{"seconds": each} for each in seconds]


def test_step_time_is_relative_to_the_fastest_matmul_of_the_dtype() -> None:
    arguments = step_time.parse(["--matmul-size=1000", "--batch-size=10", "--modes", "train"])
    numbers = {
        ("ours float32", "matmul"): rounds(0.02, 0.02),
        ("torch float32", "matmul"): rounds(0.01, 0.03, 0.01),
        ("ours float32", "train"): rounds(2.0, 1.0, 3.0),
        ("torch float32", "train"): rounds(1.0, 1.0, 1.0),
    }
    peak = step_time.matmul_peaks(numbers, 1000)["float32"]
    assert peak == {"flops": pytest.approx(2e11), "contender": "torch", "size": 1000}
    ours, torch = step_time.results(numbers, arguments)
    assert (ours["contender"], ours["dtype"], ours["mode"]) == ("ours", "float32", "train")
    assert ours["images_per_second"] == 5.0
    # 0.129 GMACs an image, three passes.
    assert ours["share_of_peak"] == pytest.approx(5 * 6 * 129_318_912 / 2e11)
    line = step_time.report([ours, torch], ["train"]).split("\n")[-1]
    assert [cell.strip() for cell in line.split("|")][1:8] == [
        "torch",
        "float32",
        "1000.0",
        "1000.0–1000.0",
        "0%",
        "10",
        "0.50",
    ]


def test_mismatched_network_is_rejected() -> None:
    worker: Any = types.SimpleNamespace(name="peer", facts={"parameters": 6_185_832})
    assert step_time.check_same_network([worker], "paper") == 6_185_832
    with pytest.raises(workers.ContenderError, match="peer: 6,185,832 parameters, expected"):
        step_time.check_same_network([worker], "s16")


def figures(step: float, matmul: float, read: float = 1.0) -> dict[str, dict[str, Any]]:
    return {
        name: {"value": value, "dtype": "float32", "unit": "images/s", "spread": 0.05}
        for name, value in (
            ("matmul float32", matmul),
            ("train float32", step),
            ("read host", read),
        )
    }


def test_regression_is_relative_to_matmul() -> None:
    # A machine at half the speed does half the steps: no change.
    moved = regression.changes(figures(100, 400, 8), figures(50, 200, 3))
    assert moved == {"train float32": pytest.approx(0.0), "read host": pytest.approx(-0.25)}
    spreads = {"train float32": 0.05, "read host": 0.05}
    assert regression.verdict(moved, spreads) == (["read host: SLOWER by 25%"], True)
    lines, slower = regression.verdict({"train float32": 0.3, "read host": -0.09}, spreads)
    assert (lines, slower) == (["train float32: faster by 30%"], False)
    lines, slower = regression.verdict(moved, {**spreads, "read host": 0.4})
    assert (lines, slower) == (["read host: SLOWER by 25%, within its spread"], False)


ENVIRONMENT: dict[str, Any] = {
    "cpu": "one",
    "cpu_model": "GenuineIntel 6 143",
    "cpu_instructions": ["amx_bf16", "avx512f"],
    "cores": 2,
    "python": "3.12.1",
    "versions": {"jax": "0.12.0", "flax": "0.12"},
    "date": "2026-11-21T00:00:00",
    "revision": "aaa",
}


def regression_result(step: float, **environment: Any) -> dict[str, Any]:
    return {
        "benchmark": "regression",
        "environment": ENVIRONMENT | environment,
        "settings": {"batch_size": 128},
        "figures": figures(step, 400),
    }


@pytest.fixture
def start_regression(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the command with a made-up result, and returns what it prints."""

    def start(result: dict[str, Any], *flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["regression", f"--results={tmp_path}", *flags])
        monkeypatch.setattr(measure, "environment", lambda: result["environment"])
        monkeypatch.setattr(regression, "run", lambda arguments: result)
        try:
            regression.main()
        except measure.BenchmarkError as error:
            return f"{capsys.readouterr().out}error: {error}"
        return capsys.readouterr().out

    return start


def test_regression_reports_slowdowns_and_stores_on_request(
    tmp_path: pathlib.Path, start_regression: Callable[..., str]
) -> None:
    assert "No earlier result in" in start_regression(regression_result(100))
    assert "Stored: " in start_regression(regression_result(100), "--store")
    later = {"date": "2026-11-22T00:00:00", "revision": "bbb"}
    printed = start_regression(regression_result(100, **later))
    assert "No change of more than 10%" in printed
    assert "one (GenuineIntel 6 143); amx_bf16 avx512f; Python 3.12.1, jax 0.12.0" in printed
    printed = start_regression(regression_result(80, **later), "--store")
    assert "train float32: SLOWER by 20%" in printed
    assert "error: slower than the stored result" in printed
    assert "No change" in start_regression(regression_result(80)), "the newest counts"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "regression-20261121T000000-aaa.json",
        "regression-20261122T000000-bbb.json",
    ]


@pytest.mark.parametrize(
    ("changed", "flags", "words"),
    [
        ({"cpu": "two"}, [], "cpu: two here, one there"),
        ({"cpu_model": "AuthenticAMD 25 1"}, [], "cpu_model: AuthenticAMD 25 1 here, GenuineIntel"),
        ({"cpu_instructions": ["avx2"]}, [], "cpu_instructions: avx2 here, amx_bf16 avx512f there"),
        ({"cores": 4}, [], "cores: 4 here, 2 there"),
        ({"python": "3.13.0"}, [], "python: 3.13.0 here, 3.12.1 there"),
        ({"versions": {"jax": "0.13", "flax": "0.12"}}, [], "jax 0.13 here, 0.12.0 there"),
        ({}, ["--batch-size=64"], "batch size: 64 here, 128 there"),
    ],
)
def test_regression_compares_only_with_the_same_machine_and_versions(
    changed: dict[str, Any],
    flags: list[str],
    words: str,
    tmp_path: pathlib.Path,
    start_regression: Callable[..., str],
) -> None:
    stored = regression.store(tmp_path, regression_result(100))
    printed = start_regression(regression_result(50, **changed), *flags)
    assert words in printed and "is not compared" in printed
    assert "SLOWER" not in printed and "error" not in printed
    against = start_regression(regression_result(50, **changed), *flags, f"--against={stored}")
    assert words in against and "train float32: SLOWER by 50%" in against


def test_regression_prefers_a_like_result_to_a_newer_one(
    tmp_path: pathlib.Path, start_regression: Callable[..., str]
) -> None:
    like = regression.store(tmp_path, regression_result(100))
    regression.store(tmp_path, regression_result(10, date="2026-11-22T00:00:00", cpu="two"))
    # As results were stored before processors were described in full.
    old = regression_result(10, date="2026-11-23T00:00:00")
    del old["environment"]["cpu_instructions"]
    regression.store(tmp_path, old)
    printed = start_regression(regression_result(100))
    assert f"Before: {like}" in printed and "No change" in printed
    like.unlink()
    printed = start_regression(regression_result(100))
    assert "cpu_instructions: amx_bf16 avx512f here, not recorded there" in printed


def test_regression_rejects_files_that_are_not_its_results(
    tmp_path: pathlib.Path, start_regression: Callable[..., str]
) -> None:
    path = tmp_path / "other.json"
    assert "cannot be read" in start_regression(regression_result(100), f"--against={path}")
    path.write_text('{"benchmark": "startup"}')
    printed = start_regression(regression_result(100), f"--against={path}")
    assert "must be a result of benchmarks.regression" in printed


def test_startup_attributes_each_second_to_one_phase() -> None:
    spans = {"imports": [(0.0, 2.0)], "compile": [(1.0, 4.0), (9.0, 20.0)], "trace": [(3.0, 5.0)]}
    seconds = startup.attribute(spans, 10.0)
    assert seconds == {"imports": 2.0, "compile": 3.0, "trace": 1.0, "rest": 4.0}


def test_startup_parses_python_and_jax_logs() -> None:
    log = "DEBUG:jax._src.dispatch:Finished "
    messages = [
        (1.0, "import time: self [us] | cumulative | imported package\n"),
        (2.0, "import time:      1000 |       1500 |   inner\n"),
        (3.0, "import time:      1000 |     500000 | outer\n"),
        (4.0, f"{log}tracing step for jit in 0.25 sec\n"),
        (
            5.0,
            f"{log}jaxpr to MLIR module conversion jit(f) in 5e-1 sec\n",
        ),
        (9.0, f"{log}XLA compilation of jit(step) in 3.0 sec\n"),
    ]
    assert startup.intervals(messages) == {
        "imports": [(2.5, 3.0)],
        "compile": [(6.0, 9.0)],
        "trace": [(3.75, 4.0), (4.5, 5.0)],
    }


def test_failing_training_command_is_explained() -> None:
    with (
        command.training("experiments/digits.py", ["--config.no.such=1"]) as run,
        pytest.raises(command.CommandError, match=r"config\.no\.such: no such setting"),
    ):
        list(run.reports())


def test_settings_change_the_measured_experiment() -> None:
    made = end_to_end.load_experiment(
        "experiments/tiny_cpu.py",
        [
            "train.batch_size=32",
            "data.directory=data",
            "augment.flip=false",
            "train.image_sizes=(64,)",
            "train.image_size_boundaries=",
            "evaluation.metrics=top1,top5",
        ],
    )
    assert (made.train.batch_size, made.data.directory, made.augment.flip) == (32, "data", False)
    assert (made.train.image_sizes, made.train.image_size_boundaries) == ((64,), ())
    assert made.evaluation.metrics == ("top1", "top5")
    with pytest.raises(ConfigError, match=r"train\.batch_size = 'many': must be of type int"):
        end_to_end.load_experiment("experiments/tiny_cpu.py", ["train.batch_size=many"])
    with pytest.raises(ConfigError, match="no such setting"):
        end_to_end.load_experiment("experiments/tiny_cpu.py", ["train.no=1"])


@pytest.mark.parametrize("archived", [True, False])
def test_peers_get_training_images_of_all_classes(tmp_path: pathlib.Path, archived: bool) -> None:
    source = tmp_path / "tiny"
    for folder in ("train/n1/images", "train/n2/images", "val/images"):
        (source / folder).mkdir(parents=True)
        for index in range(4):
            (source / folder / f"{index}.JPEG").write_bytes(folder.encode())
    path = source
    if archived:
        path = tmp_path / "tiny.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in source.rglob("*.JPEG"):
                archive.write(file, f"tiny/{file.relative_to(source)}")
    with input_pipeline.jpeg_files(str(path), 4) as files:
        copied = sorted(pathlib.Path(files).rglob("*.JPEG"))
        assert [file.parent.parent.name for file in copied] == ["n1", "n1", "n2", "n2"]
        assert all(file.read_bytes().startswith(b"train") for file in copied)
    assert not pathlib.Path(files).exists()


def test_peers_require_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        input_pipeline.parse([])
    assert "--source" in capsys.readouterr().err
    assert input_pipeline.parse(["--contenders=ours"]).contenders == ["ours"]


def test_scaling_changes_one_thing_at_a_time() -> None:
    arguments = scaling.parse([])
    base = scaling.contender(arguments, "batch", 128).settings
    for axis, (name, points) in scaling.AXES.items():
        changed = scaling.contender(arguments, axis, points[-1])
        assert {key for key in base if base[key] != changed.settings[key]} == {name}
        # More devices share the same work.
        assert (scaling.work(changed.settings) > scaling.work(base)) == (axis != "devices")
    assert changed.environment["JAX_NUM_CPU_DEVICES"] == "8"


def event(operation: str, kernel: str, nanoseconds: int) -> Any:
    stats = [("hlo_op", operation)] if operation else []
    return types.SimpleNamespace(name=kernel, duration_ns=nanoseconds, stats=stats)


def plane(name: str, **lines: list[Any]) -> Any:
    made = [types.SimpleNamespace(name=line, events=events) for line, events in lines.items()]
    return types.SimpleNamespace(name=name, lines=made)


def test_profile_sums_kernels_and_ignores_the_host_with_a_gpu() -> None:
    host = plane("/host:CPU", Threads=[event("dot", "dot", 5), event("", "Execute", 100)])
    gpu = plane(
        "/device:GPU:0",
        Stream1=[event("conv", "cudnn", 30), event("conv", "cudnn", 10), event("dot", "gemm", 50)],
        Ops=[event("conv", "conv", 1000)],
    )
    assert profile_step.operations([host, gpu]) == [
        profile_step.Operation("dot", "gemm", 50e-9, 1),
        profile_step.Operation("conv", "cudnn", 40e-9, 2),
    ]
    assert profile_step.operations([host]) == [profile_step.Operation("dot", "dot", 5e-9, 1)]


def test_profile_names_the_source_of_an_operation() -> None:
    program = '  %fusion.1 = f32[2]{0} fusion(%x), metadata={op_name="jit(f)/conv1/conv"}\n'
    assert profile_step.op_sources(program) == {"fusion.1": "jit(f)/conv1/conv"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")))
def test_stored_results_describe_their_environment(path: pathlib.Path) -> None:
    environment = json.loads(path.read_text())["environment"]
    assert {"cpu", "cores", "python", "date", "revision", "command"} <= set(environment)


def test_all_benchmarks_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    for module in (
        end_to_end,
        estimates,
        fault_injection,
        finite_flags,
        input_pipeline,
        profile_step,
        programs,
        programs_bound,
        programs_peers,
        regression,
        scaling,
        startup,
        step_time,
    ):
        with pytest.raises(SystemExit) as caught:
            module.parse(["--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        name = module.__name__.rpartition(".")[2]
        assert f"python -m benchmarks.{name}" in text
        assert "minute" in text
    assert measure.ROOT == ROOT
