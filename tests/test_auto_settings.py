"""Settings from the number of training images: what is left open, and only that."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import pytest

from inception_jax import config as configs
from inception_jax.config import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Evaluation,
    Log,
    Schedule,
    Train,
    auto_settings,
)
from inception_jax.errors import ConfigError
from inception_jax.models import networks, ops
from inception_jax.reporting import diagnosis
from inception_jax.storage.workdir import Workdir
from inception_jax.training import run, state, workdir
from inception_jax.training.checkpoints import Checkpoints
from tests import small


def open_settings() -> Config:
    return Config(
        augment=Augment(mixup=-1.0),
        schedule=Schedule(learning_rate=0.0),
        train=Train(auto_size=True, batch_size=0, duration=""),
        evaluation=Evaluation(every="", train_eval_examples=100),
        checkpoint=Checkpoint(every=""),
        log=Log(every=""),
    )


def resolve(config: Config, train: int, evaluation: int = 0, devices: int = 1) -> Config:
    configs.validate(config)
    resolved = auto_settings.resolve(
        config,
        train_examples=train,
        eval_examples=evaluation or train // 4 + 1,
        devices=devices,
        dtype="bfloat16",
    )
    configs.validate(resolved)
    return resolved


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [(2, 8, 480), (32, 8, 30), (160, 16, 60), (245, 32, 60), (1_000, 64, 60), (4_000, 64, 30)],
)
def test_few_images_get_small_batches_and_many_epochs(images: int, batch: int, epochs: int) -> None:
    found = resolve(open_settings(), images)
    assert found.train.batch_size == batch
    assert found.train.duration == f"{epochs} epochs"
    assert found.schedule.learning_rate == pytest.approx(0.05 * batch / 64)


@pytest.mark.parametrize("images", [1, 2, 7, 32, 100, 3_000, 1_000_000])
@pytest.mark.parametrize("evaluation", [1, 50, 10_000])
def test_every_size_gives_enough_steps_and_evaluations(images: int, evaluation: int) -> None:
    found = resolve(open_settings(), images, evaluation)
    timeline = configs.Timeline(found.train.batch_size, images)
    total = timeline.steps(found.train.duration)
    assert total >= auto_settings.MIN_STEPS
    assert timeline.steps(found.schedule.warmup) == pytest.approx(total / 20, abs=1)
    evaluations = sum(timeline.due(found.evaluation.every, step) for step in range(1, total + 1))
    assert auto_settings.MIN_EVALUATIONS - 1 <= evaluations <= auto_settings.MAX_EVALUATIONS
    assert found.checkpoint.every == found.evaluation.every
    assert 1 <= timeline.steps(found.log.every) <= timeline.steps(found.evaluation.every)


def test_evaluations_of_several_views_are_rarer() -> None:
    every = []
    for settings in ({}, {"flip_tta": True}, {"flip_tta": True, "shift_tta": 1}):
        config = open_settings()
        config.evaluations["views"] = configs.View(**settings)
        found = resolve(config, 1_000, 250)
        every.append(configs.Timeline(1, 1).steps(found.evaluation.every))
    assert every[0] < every[1] < every[2]


def test_mixup_needs_enough_images_and_steps() -> None:
    assert [resolve(open_settings(), n).augment.mixup for n in (32, 80, 245)] == [0.0, 0.0, 0.2]
    config = open_settings()
    config.augment.mixup = 0.0
    assert resolve(config, 10_000).augment.mixup == 0.0
    config = open_settings()
    config.init.pretrained = "weights.safetensors"
    assert resolve(config, 245).augment.mixup == 0.0


def test_settings_chosen_for_ants_and_bees() -> None:
    """245 ants and bees: batch 32, rate 0.025, 60 epochs with 3 of warm-up, mixup 0.2."""
    found = resolve(open_settings(), 245, 153)
    timeline = configs.Timeline(32, 245)
    assert timeline.steps(found.schedule.warmup) == timeline.steps("3 epochs") == 23
    assert (found.train.batch_size, found.schedule.learning_rate) == (32, 0.025)
    assert (found.train.duration, found.augment.mixup) == ("60 epochs", 0.2)


def test_pretrained_weights_need_a_third_of_the_epochs() -> None:
    config = open_settings()
    config.init.pretrained = "weights.safetensors"
    assert resolve(config, 245).train.duration == "20 epochs"
    for images in (8, 20, 32):
        found = resolve(config, images)
        timeline = configs.Timeline(found.train.batch_size, images)
        assert timeline.steps(found.train.duration) >= diagnosis.MIN_STEPS


def test_explicit_settings_are_kept_and_the_rest_derived() -> None:
    config = open_settings()
    config.train.batch_size = 16
    config.train.duration = "40 steps"
    found = resolve(config, 245)
    assert (found.train.batch_size, found.train.duration) == (16, "40 steps")
    assert found.schedule.learning_rate == pytest.approx(0.05 * 16 / 64)
    assert found.schedule.warmup == "2 steps"
    assert found.evaluation.every == "8 steps"
    assert auto_settings.describe(config, found) == (
        "schedule.learning_rate=0.0125, schedule.warmup='2 steps', augment.mixup=0, "
        "evaluation.every='8 steps', checkpoint.every='8 steps', log.every='2 steps'"
    )


def test_nothing_is_chosen_without_auto_size() -> None:
    for config in (Config(), resolve(open_settings(), 100)):
        found = resolve(config, 10)
        assert found == config
        assert not auto_settings.describe(config, found)
    config = Config()
    assert resolve(config, 10) is config


def test_settings_that_an_older_version_accepted_stay_valid(data_directory: pathlib.Path) -> None:
    """As where a run with open settings is resumed."""
    config = open_settings()
    config.data = Data(name="digits", directory=str(data_directory), image_size=8)
    config.model.name = "mini_googlenet"
    config.optimizer.name, config.optimizer.beta1 = "sgd", 0.8
    with pytest.raises(ConfigError, match=r"optimizer\.beta1"):
        configs.validate(config)
    assert run.assemble(config, log=lambda line: None).config.train.batch_size


def test_batch_size_is_a_multiple_of_the_devices() -> None:
    config = open_settings()
    config.train.grad_accum_steps = 2
    assert resolve(config, 32, devices=6).train.batch_size == 12
    assert resolve(config, 10_000, devices=8).train.batch_size == 64


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train.batch_size", 0, "config.train.batch_size = 0: must be at least 1"),
        ("schedule.learning_rate", 0.0, "config.schedule.learning_rate = 0.0: must be more than 0"),
        ("train.duration", "", "config.train.duration = '': must be a duration"),
        ("augment.mixup", -1, "config.augment.mixup = -1: must be at least 0"),
    ],
)
def test_open_settings_need_auto_size(path: str, value: object, words: str) -> None:
    config = Config()
    group, _, name = path.rpartition(".")
    setattr(configs.get(config, group), name, value)
    with pytest.raises(ConfigError, match=words):
        configs.validate(config)


Processor = Callable[..., None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processor]:
    """Makes the package believe in a processor with these flags, and in a version of JAX."""

    def believe(flags: str, version: tuple[int, ...] = (0, 12, 0)) -> None:
        monkeypatch.setattr(ops, "_cpu_flags", flags.split)
        monkeypatch.setattr(jax, "__version_info__", version)
        ops.bfloat16_slowdown.cache_clear()

    yield believe
    ops.bfloat16_slowdown.cache_clear()


def test_auto_dtype_follows_the_hardware() -> None:
    config = Config()
    config.model.dtype = "auto"
    assert resolve(config, 100).model.dtype == "bfloat16"
    assert networks.create(config.model, 2).dtype == ops.auto_dtype()
    config.model.dtype = "float32"
    assert resolve(config, 100).model.dtype == "float32"


@pytest.mark.parametrize(
    ("flags", "version", "reason"),
    [
        ("sse2 amx_bf16 amx_tile", (0, 12, 0), ""),
        ("sse2 avx512_bf16", (0, 12, 0), ""),
        ("sse2 amx_bf16 amx_tile", (0, 10, 2), "does not use this CPU's instructions for it"),
        ("sse2 avx2 avx512f", (0, 12, 0), "no amx_bf16 or avx512_bf16"),
    ],
)
def test_bfloat16_is_chosen_for_cpus_that_multiply_it(
    flags: str, version: tuple[int, ...], reason: str, processor: Processor
) -> None:
    processor(flags, version)
    found = ops.bfloat16_slowdown()
    assert reason in found and bool(reason) == bool(found)
    assert ops.auto_dtype() == ("float32" if reason else "bfloat16")


@pytest.mark.parametrize(
    ("flags", "dtype", "words"),
    [
        (
            "amx_bf16 amx_tile",
            "bfloat16",
            "computing in bfloat16, which this CPU multiplies; --conf",
        ),
        ("avx2 avx512f", "float32", "computing in float32, not bfloat16: this CPU is not known to"),
    ],
)
def test_start_says_which_dtype_the_hardware_decided(
    flags: str, dtype: str, words: str, data_directory: pathlib.Path, processor: Processor
) -> None:
    processor(flags)
    settings = small.config(data_directory)
    settings.model.dtype = "auto"
    lines: list[str] = []
    setup = run.assemble(settings, log=lines.append)
    assert setup.config.model.dtype == dtype
    assert [line for line in lines if words in line and line.startswith(settings.name)]
    assert not [line for line in lines if "settings chosen for" in line]
    lines.clear()
    run.assemble(setup.config, log=lines.append)  # As a resumed run is.
    assert not [line for line in lines if "computing in" in line]


def test_auto_learning_rate_is_for_sgd_only() -> None:
    config = open_settings()
    config.optimizer.name = "adamw"
    with pytest.raises(ConfigError, match="sgd and sgd_nesterov only, not for 'adamw'; set one"):
        configs.validate(config)
    config.schedule.learning_rate = 0.001
    configs.validate(config)


def test_chosen_settings_are_recorded_and_reused_on_resume(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    given = open_settings()
    settings = small.config(
        data_directory,
        schedule=given.schedule,
        train=given.train,
        evaluation=given.evaluation,
        checkpoint=given.checkpoint,
        log=given.log,
    )
    lines: list[str] = []
    first = dataclasses.replace(run.assemble(settings, log=lines.append), model=small.Linear())
    assert first.config.train.batch_size == 64
    assert first.total_steps == first.timeline.steps(first.config.train.duration) > 0
    assert (
        sum("chosen for 1,437 training images: train.batch_size=64, " in line for line in lines)
        == 1
    )

    folder = Workdir(tmp_path)
    # A folder without a checkpoint belongs to nobody.
    assert (
        workdir.with_recorded_auto_settings(workdir.load_previous_run(folder), settings) == settings
    )
    started = state.create(first)
    with Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(started, progress={"seconds": {}}, metrics=None)
    chosen = first.config
    chosen.schedule.learning_rate = 0.025  # As if it had been given, or chosen by other rules.
    workdir.record_start(
        workdir.load_previous_run(folder),
        chosen,
        step=0,
        changed=[],
        dataset=workdir.dataset_record(first.dataset),
    )

    again = workdir.with_recorded_auto_settings(workdir.load_previous_run(folder), settings)
    assert again.schedule.learning_rate == 0.025
    assert workdir.check_compatible(workdir.load_previous_run(folder), again) == []
    assert run.assemble(again, log=lines.append).config == chosen
    # What is given now counts.
    settings.schedule.learning_rate = 0.1
    again = workdir.with_recorded_auto_settings(workdir.load_previous_run(folder), settings)
    assert workdir.check_compatible(workdir.load_previous_run(folder), again) == [
        "config.schedule.learning_rate: 0.025 → 0.1"
    ]
