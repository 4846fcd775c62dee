"""One training step against its parts, and eight devices against one."""

import copy
import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from inception_jax.config import Augment, Optimizer, Schedule
from inception_jax.errors import ConfigError
from inception_jax.input import pipeline
from inception_jax.models import ops
from inception_jax.models.layers import ModelOutput
from inception_jax.training import run, state, step
from tests import small
from tests.programs import chains


def build(data_directory: pathlib.Path, devices: int) -> run.Run:
    """Returns a run whose only randomness is initialization, on the first `devices` devices."""
    config = small.config(
        data_directory,
        augment=Augment(crop="none", flip=False),
        optimizer=Optimizer(name="sgd", momentum=0.0),
        schedule=Schedule(name="constant", learning_rate=0.1),
    )
    config.model.dropout = 0.0
    config.train.label_smoothing = 0.1
    config.train.ema = "2 steps"
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return dataclasses.replace(small.build(config), mesh=mesh)


def make_train_step(this: run.Run) -> jax.stages.Wrapped:
    return step.make_train_step(this, this.dataset.image_size)


def batches(this: run.Run, stop: int) -> list[dict[str, jax.Array]]:
    return list(
        pipeline.train_batches(
            this.dataset.train, batch_size=64, seed=0, start=0, stop=stop, mesh=this.mesh
        )
    )


def test_step_as_written_for_a_gpu_computes_the_same(
    data_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = build(data_directory, 1)
    batch, after = batches(this, 1)[0], {}
    for kind in ("cpu", "gpu"):
        monkeypatch.setattr(ops, "preferred_rewrite", lambda device, kind=kind: kind)
        lowered = make_train_step(this).lower(state.create(this), batch)
        assert ("LayoutConstraint" in lowered.as_text()) is (kind == "gpu")
        after[kind], _ = lowered.compile()(state.create(this), batch)
    for one, other in zip(*map(jax.tree.leaves, after.values()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_step_equals_its_parts(data_directory: pathlib.Path) -> None:
    this = build(data_directory, 1)
    before = jax.device_get(state.create(this))
    batch = batches(this, 1)[0]
    images = (np.asarray(batch["image"], np.float32) / 255 - this.dataset.mean) / this.dataset.std
    targets = 0.9 * np.eye(10, dtype=np.float32)[batch["label"]] + np.float32(0.01)

    def loss(params: dict) -> tuple[jax.Array, tuple[jax.Array, dict]]:
        output, updated = this.model.apply(
            {"params": params, "batch_stats": before.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        log_p = output.logits - jax.nn.logsumexp(output.logits, axis=1, keepdims=True)
        return -(targets * log_p).sum(1).mean(), (output.logits, updated["batch_stats"])

    with jax.numpy_rank_promotion("allow"):
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (expected, (logits, batch_stats)), grads = gradient(before.params)
    after, output = make_train_step(this)(state.create(this), batch)

    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
    assert output.finite.shape == (1 + len(grads),) and output.finite.all()
    assert int(after.step) == 1
    close = {"rtol": 1e-3, "atol": 1e-5}
    for old, new, grad in zip(
        *map(jax.tree.leaves, (before.params, after.params, grads)), strict=True
    ):
        np.testing.assert_allclose(new, old - 0.1 * grad, **close)
    # At the first step the running statistics keep 0.1 of the old ones instead of 0.9.
    for old, new, model in zip(
        *map(jax.tree.leaves, (before.batch_stats, after.batch_stats, batch_stats)), strict=True
    ):
        batch_statistic = (model - 0.9 * old) / 0.1
        np.testing.assert_allclose(new, 0.1 * old + 0.9 * batch_statistic, **close)
    # The first update of an average with time constant 2 keeps min(1/2, 1/10) of the old one.
    for old, new, mean in zip(
        *map(jax.tree.leaves, (before.params, after.params, after.average["params"])), strict=True
    ):
        np.testing.assert_allclose(mean, 0.1 * old + 0.9 * np.asarray(new), **close)
    metrics = after.metrics.compute()
    correct = np.asarray(logits).argmax(1) == np.asarray(batch["label"])
    assert metrics["top1"] == pytest.approx(100 * correct.mean())
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-3)


def test_batches_are_mixed_until_mix_end(data_directory: pathlib.Path) -> None:
    probability = jax.jit(step.mix_probability, static_argnums=(1, 2))
    assert [float(probability(number, 0.75, 2)) for number in range(4)] == [0.75, 0.75, 0, 0]
    assert [float(probability(number, 0.75, 0)) for number in range(4)] == [0.75] * 4

    plain = dataclasses.replace(build(data_directory, 1), model=small.Linear())
    config = copy.deepcopy(plain.config)
    config.augment.mixup, config.augment.mix_end = 1.0, "129 examples"
    mixed = dataclasses.replace(plain, config=config)
    batch = batches(plain, 1)[0]
    # 129 examples end within the third batch of 64, the one after 2 finished steps.
    for finished, is_mixed in ((2, True), (3, False)):
        first, second = (
            make_train_step(this)(state.create(this).replace(step=jnp.int32(finished)), batch)[0]
            for this in (plain, mixed)
        )
        kernels = [jax.tree.leaves(after.params)[-1] for after in (first, second)]
        assert np.allclose(kernels[0], kernels[1], rtol=1e-4) != is_mixed


@pytest.mark.parametrize("norm_group_size", [0, 4, 16])
def test_eight_devices_equal_one(norm_group_size: int, data_directory: pathlib.Path) -> None:
    losses = []
    for devices in (1, 8):
        this = build(data_directory, devices)
        model = this.model.clone(norm_group_size=norm_group_size)
        this = dataclasses.replace(this, model=model)
        current, train_step = state.create(this), make_train_step(this)
        run_losses = []
        for batch in batches(this, 4):
            current, output = train_step(current, batch)
            run_losses.append(float(output.loss))
        losses.append(run_losses)
        assert len(jax.tree.leaves(current.params)[0].sharding.device_set) == devices
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[0][3] < losses[0][0]


def test_devices_exchange_no_statistics_of_groups_that_they_hold(
    data_directory: pathlib.Path,
) -> None:
    longest = {}
    for norm_group_size in (0, 4, 8, 16):
        this = build(data_directory, 8)
        this = dataclasses.replace(this, model=this.model.clone(norm_group_size=norm_group_size))
        lowered = step.lower_train_step(this, state.abstract_state(this), this.dataset.image_size)
        _, longest[norm_group_size] = chains.all_reduces(lowered.compile().as_text() or "")
    # Two BatchNorms forward and two back, and the gradient of the first convolution's kernel.
    assert longest == {0: 5, 4: 1, 8: 1, 16: 5}


def test_input_state_is_donated(data_directory: pathlib.Path) -> None:
    this = build(data_directory, 1)
    before = state.create(this)
    after, _ = make_train_step(this)(before, batches(this, 1)[0])
    assert jax.tree.leaves(before.params)[0].is_deleted()
    assert not jnp.isnan(jax.tree.leaves(after.params)[0]).any()


def test_restored_state_matches_new_state(data_directory: pathlib.Path) -> None:
    this = build(data_directory, 8)
    new, described = state.create(this), state.abstract_state(this)
    names = [
        [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (new, described)
    ]
    assert names[0] == names[1]
    for leaf, description in zip(jax.tree.leaves(new), jax.tree.leaves(described), strict=True):
        assert (leaf.shape, leaf.dtype) == (description.shape, description.dtype)
        assert leaf.sharding.is_equivalent_to(description.sharding, leaf.ndim)


@pytest.mark.parametrize("norm", ["batch", "lrn"])
def test_step_of_every_network_keeps_state_structure(
    norm: str, data_directory: pathlib.Path
) -> None:
    config = small.config(data_directory)
    config.data.image_size = 32
    config.model.name, config.model.stem = "googlenet", "s32"
    config.model.norm, config.model.aux_heads, config.model.dtype = norm, True, "bfloat16"
    this = run.assemble(config, log=lambda _: None)
    batch = pipeline.abstract_train_batch(this.dataset.train, batch_size=64, mesh=this.mesh)
    # Flax's BatchNorm relies on promotion from bfloat16.
    with jax.numpy_dtype_promotion("standard"):
        before = state.abstract_state(this)
        after, output = jax.eval_shape(make_train_step(this), before, batch)
    assert (output.loss.shape, output.loss.dtype) == ((), jnp.float32)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert bool(before.batch_stats) == (norm == "batch")
    assert any("aux" in name for name in before.params)


class Linear(nn.Module):
    """A single layer, whose results depend neither on micro-batches nor on their order."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> ModelOutput:
        return ModelOutput(nn.Dense(10)(images.reshape(len(images), -1)))


@pytest.mark.parametrize("devices", [1, 8])
def test_microbatches_do_not_change_steps_and_metrics(
    devices: int, data_directory: pathlib.Path
) -> None:
    ends = []
    for accumulate, on in ((1, 1), (4, devices)):
        this = dataclasses.replace(build(data_directory, on), model=Linear())
        this.config.train.grad_accum_steps = accumulate
        this.config.optimizer.sam_rho = 0.05
        this.config.augment = Augment(crop="pad", pad=1, mixup=0.5)
        current, train_step = state.create(this), make_train_step(this)
        for batch in batches(this, 3):
            current, _ = train_step(current, batch)
        ends.append((current.step, current.params, current.metrics.compute()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *ends)


def test_sam_rho_reaches_step(data_directory: pathlib.Path) -> None:
    ends = []
    for rho in (0.0, 0.5):
        this = dataclasses.replace(build(data_directory, 1), model=Linear())
        this.config.optimizer.sam_rho = rho
        current, _ = make_train_step(this)(state.create(this), batches(this, 1)[0])
        ends.append(current)
    structures = {str(jax.tree.structure(end.opt_state)) for end in ends}
    assert len(structures) == 1
    assert not np.allclose(*(end.params["Dense_0"]["kernel"] for end in ends))


def test_resize_kernel_reaches_step(data_directory: pathlib.Path) -> None:
    losses = []
    for kernel in ("linear", "lanczos3"):
        this = build(data_directory, 1)
        this.config.data.resize_kernel = kernel
        _, output = step.make_train_step(this, 6)(state.create(this), batches(this, 1)[0])
        losses.append(float(output.loss))
    assert abs(losses[0] - losses[1]) > 1e-4


def test_batch_not_divisible_into_microbatches_is_rejected(tmp_path: pathlib.Path) -> None:
    config = small.config(tmp_path)
    config.train.grad_accum_steps = 3
    with pytest.raises(ConfigError, match=r"batch_size = 64.*grad_accum_steps.*48 or 72"):
        run.assemble(config, log=lambda _: None)
