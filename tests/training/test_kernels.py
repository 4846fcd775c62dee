"""Kernels that do not start at random, against loops over their elements."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.config import Config, Init, Model, Optimizer
from inception_jax.datasets.dataset import Dataset
from inception_jax.errors import ConfigError
from inception_jax.models import networks, weights
from inception_jax.training import initialization, kernels, run, step
from tests import small


def kernels_of(settings: Config, init: Init) -> dict[str, np.ndarray]:
    """Returns the initial parameters of `small.Network` by path, and checks their average."""
    settings.init = init
    first = jax.device_get(initialization.create_state(small.build(settings)))
    params, average = (weights.flatten(tree) for tree in (first.params, first.average["params"]))
    assert all(np.array_equal(average[path], params[path]) for path in params)
    return params


def test_convolutions_after_the_first_start_as_identity(data_directory: pathlib.Path) -> None:
    settings = small.config(data_directory)
    random = kernels_of(settings, Init())
    start = kernels_of(settings, Init(identity_convs=True))
    changed = {path for path in random if not np.array_equal(random[path], start[path])}
    assert changed == {"conv2/conv/kernel"}
    expected = random["conv2/conv/kernel"].copy()
    assert expected.shape == (3, 3, 8, 16)
    for channel in range(8):
        for row in range(3):
            for column in range(3):
                for source in range(8):
                    is_center = (row, column) == (1, 1)
                    same = is_center and source == channel
                    expected[row, column, source, channel] = 1.0 if same else 0.0
    np.testing.assert_array_equal(start["conv2/conv/kernel"], expected)


def test_identity_convolution_of_fewer_outputs_passes_the_first_inputs_on() -> None:
    random = np.random.default_rng(0).normal(size=(5, 5, 6, 4)).astype(np.float32)
    params = {"next": {"kernel": random}}
    start = kernels.with_identity(small.Network(), params)
    images = np.random.default_rng(1).normal(size=(2, 7, 7, 6)).astype(np.float32)
    output = jax.lax.conv_general_dilated(
        images,
        start["next"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_array_equal(output, images[..., :4])


@pytest.mark.parametrize("name", ["googlenet", "mini_googlenet"])
def test_identity_convolutions_of_the_networks(name: str) -> None:
    model = networks.create(Model(name=name, width=0.125), 10)
    params = small.random_variables(model, 32)["params"]
    before, after = map(weights.flatten, (params, kernels.with_identity(model, params)))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    spatial = {
        path
        for path, leaf in before.items()
        if path.endswith("conv/kernel") and leaf.shape[0] > 1 and path != "conv1/conv/kernel"
    }
    assert changed == spatial and len(spatial) == {"googlenet": 19, "mini_googlenet": 10}[name]


def test_identity_needs_the_path_of_the_first_convolution() -> None:
    with pytest.raises(ConfigError, match=r"identity_convs = True needs .* 'first_conv'"):
        kernels.with_identity(small.Linear(), {"kernel": jnp.zeros((3, 3, 1, 1))})


def colored(side: int, count: int = 40) -> Dataset:
    """Returns a data set of random images whose neighboring pixels and channels are correlated."""
    noise = np.random.default_rng(0).normal(size=(count, side + 1, side + 1, 4))
    smooth = noise[:, 1:, 1:] + 0.8 * noise[:, :-1, 1:] + 0.6 * noise[:, 1:, :-1]
    mixed = smooth[..., :3] + 0.5 * smooth[..., 3:]
    pixels = np.clip(120 + 30 * mixed, 0, 255).astype(np.uint8)
    return Dataset.from_arrays(pixels, np.arange(count) % 2)


def patches_of(dataset: Dataset, size: int) -> np.ndarray:
    """Returns all windows of all training images, normalized, as rows."""
    images = dataset.train.read(np.arange(len(dataset.train))).astype(np.float64)
    images = (images / 255 - dataset.mean) / dataset.std
    places = range(images.shape[1] - size + 1)
    return np.array(
        [
            image[row : row + size, column : column + size].reshape(-1)
            for image in images
            for row in places
            for column in places
        ]
    )


def test_filters_are_scaled_singular_vectors_of_patches() -> None:
    dataset = colored(12)
    patches = patches_of(dataset, 3)
    # An independent way to the eigenvectors of the second moment.
    _, singular, vectors = np.linalg.svd(patches / np.sqrt(len(patches)), full_matrices=False)
    filters = kernels.whitening_filters(dataset, 3, 27)
    assert (filters.shape, filters.dtype) == ((3, 3, 3, 27), np.float32)
    flat = filters.reshape(27, 27)
    expected = vectors.T / np.sqrt(singular**2 + 5e-4)
    signs = np.sign(np.take_along_axis(expected, np.abs(expected).argmax(0)[None], 0))
    np.testing.assert_allclose(flat, expected * signs, rtol=1e-4, atol=1e-4)

    responses = patches @ flat
    variances = singular**2 / (singular**2 + 5e-4)
    np.testing.assert_allclose(
        responses.T @ responses / len(patches), np.diag(variances), atol=1e-4
    )


def test_filters_of_large_images_come_from_a_grid_of_patches() -> None:
    dataset = colored(40)
    patches = patches_of(dataset, 3).reshape(-1, 38, 38, 27)[:, ::3, ::3].reshape(-1, 27)
    flat = kernels.whitening_filters(dataset, 3, 5).reshape(27, 5)
    responses = patches @ flat
    np.testing.assert_allclose(responses.T @ responses / len(patches), np.eye(5), atol=1e-3)


# The stems s16 and s32, MiniGoogLeNet, the paper's stem, a narrow network, and an odd number.
@pytest.mark.parametrize(
    ("side", "outputs", "channels"),
    [(3, 64, 54), (3, 96, 54), (7, 64, 64), (3, 16, 16), (3, 5, 4)],
)
def test_filters_fill_the_first_convolution_in_both_signs(
    side: int, outputs: int, channels: int, data_directory: pathlib.Path
) -> None:
    this = dataclasses.replace(small.build(small.config(data_directory)), dataset=colored(32))
    shape = (side, side, 3, outputs)
    random = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    (kernel,) = kernels.whitened(this, {"conv1": {"conv": {"kernel": random}}}).values()
    assert kernel.shape == shape and kernels.whitened_channels(shape) == channels
    half = channels // 2
    filters = kernels.whitening_filters(this.dataset, side, half)
    np.testing.assert_array_equal(kernel[..., :half], filters)
    np.testing.assert_array_equal(kernel[..., half:channels], -filters)
    np.testing.assert_array_equal(kernel[..., channels:], random[..., channels:])


@pytest.mark.parametrize(
    ("whiten_bias", "finished", "is_bias_trained"),
    [("3 steps", 2, True), ("3 steps", 3, False), ("", 0, True), ("", 100, True)],
)
def test_only_whitening_filters_are_frozen(
    whiten_bias: str, finished: int, is_bias_trained: bool, data_directory: pathlib.Path
) -> None:
    init = Init(whiten=True, whiten_bias=whiten_bias)
    this = small.build(small.config(data_directory, init=init))
    kernel, vector = np.ones((3, 3, 3, 60), np.float32), np.ones(60, np.float32)
    layer = {"conv": {"kernel": kernel}, "norm": {"scale": vector, "bias": vector}}
    tree = {"conv1": layer, "conv2": layer}
    freeze = kernels.make_freeze(this)
    frozen = weights.flatten(freeze(tree, jnp.int32(finished)))
    for path, leaf in frozen.items():
        untouched = path.startswith("conv2") or (is_bias_trained and "norm" in path)
        expected = np.where(np.arange(60) < 54, float(untouched), 1.0)
        np.testing.assert_array_equal(leaf, np.broadcast_to(expected, leaf.shape))


@pytest.mark.parametrize("name", ["sgd_nesterov", "muon"])
def test_whitening_layer_stays_while_the_rest_is_trained(
    name: str, data_directory: pathlib.Path
) -> None:
    settings = small.config(data_directory, init=Init(whiten=True, whiten_bias="2 steps"))
    settings.optimizer = Optimizer(name=name, weight_decay=0.1, decay_norm_and_bias=True)
    settings.schedule.warmup = ""
    this = small.build(settings)
    current, train_step = initialization.create_state(this), step.make_train_step(this)
    seen = [weights.flatten(jax.device_get(current.params))]
    for batch in run.train_batches(this, 0, 4):
        with jax.numpy_dtype_promotion("standard"):
            current, _ = train_step(current, batch)
        seen.append(weights.flatten(jax.device_get(current.params)))
    for path in seen[0]:
        is_changed = [not np.array_equal(a[path], b[path]) for a, b in itertools.pairwise(seen)]
        expected = [path != "conv1/conv/kernel"] * 2
        expected += [not path.startswith("conv1/")] * 2
        assert is_changed == expected, path


def test_whitening_needs_a_convolution_of_the_image(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory, init=Init(whiten=True)))
    params = {"conv1": {"conv": {"kernel": np.zeros((3, 3, 12, 8), np.float32)}}}
    with pytest.raises(ConfigError, match=r"\[H, H, 3, O\], but .* is \[3, 3, 12, 8\]; set it"):
        kernels.whitened(this, params)


def test_whitening_needs_the_path_of_the_first_convolution(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory, init=Init(whiten=True)))
    this = dataclasses.replace(this, model=small.Linear())
    with pytest.raises(ConfigError, match=r"whiten = True needs .* 'first_conv'"):
        initialization.create_state(this)
    with pytest.raises(ConfigError, match=r"whiten = True needs .* 'first_conv'"):
        step.make_train_step(this)
