"""Tests the networks against PyTorch, with the same random weights on both sides.

The PyTorch modules below have the names of torchvision's GoogLeNet, and its geometry (ceil-mode
pools, padding of half the kernel, adaptive average pools) or that of the paper.
"""

import argparse
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from inception_jax.config import Model
from inception_jax.models import networks, torchvision_weights, weights
from tests import command

torch = pytest.importorskip("torch", reason="the reference is written in PyTorch")
nn, functional = torch.nn, torch.nn.functional

WIDTHS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


# The classes need "type: ignore": with importorskip, mypy never sees torch.
class Unit(nn.Module):  # type: ignore[name-defined]
    def __init__(self, i: int, o: int, size: int = 1, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, size, stride, size // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(o, eps=1e-3) if norm else nn.Identity()

    def forward(self, x: Any) -> Any:
        return functional.relu(self.bn(self.conv(x)))


class Inception(nn.Module):  # type: ignore[name-defined]
    def __init__(self, widths: tuple[int, ...], five: int, norm: bool) -> None:
        super().__init__()
        i, one, reduce3, three, reduce5, five_out, pool = widths
        self.branch1 = Unit(i, one, norm=norm)
        self.branch2 = nn.Sequential(
            Unit(i, reduce3, norm=norm), Unit(reduce3, three, 3, norm=norm)
        )
        self.branch3 = nn.Sequential(
            Unit(i, reduce5, norm=norm), Unit(reduce5, five_out, five, norm=norm)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), Unit(i, pool, norm=norm))

    def forward(self, x: Any) -> Any:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Head(nn.Module):  # type: ignore[name-defined]
    def __init__(self, i: int, grid: int, adaptive: bool, norm: bool) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.conv = Unit(i, 128, norm=norm)
        self.fc1 = nn.Linear(128 * grid * grid, 1024)
        self.fc2 = nn.Linear(1024, 10)

    def forward(self, x: Any) -> Any:
        if self.adaptive:
            x = functional.adaptive_avg_pool2d(x, 4)
        else:
            x = functional.avg_pool2d(x, min(5, x.shape[-1]), 3)
        return self.fc2(functional.relu(self.fc1(self.conv(x).flatten(1))))


class Reference(nn.Module):  # type: ignore[name-defined]
    """torchvision's network, or the paper's if `lrn`."""

    def __init__(self, lrn: bool, head_grid: int) -> None:
        super().__init__()
        norm, self.lrn = not lrn, lrn
        self.conv1 = Unit(3, 64, 7, 2, norm=norm)
        self.conv2 = Unit(64, 64, norm=norm)
        self.conv3 = Unit(64, 192, 3, norm=norm)
        for name, widths in WIDTHS.items():
            self.add_module(f"inception{name}", Inception(widths, 5 if lrn else 3, norm))
        self.aux1 = Head(512, head_grid, not lrn, norm)
        self.aux2 = Head(528, head_grid, not lrn, norm)
        self.fc = nn.Linear(1024, 10)

    def respond(self, x: Any) -> Any:
        return functional.local_response_norm(x, 5, 1e-4, 0.75, 1.0) if self.lrn else x

    def forward(self, x: Any) -> list[Any]:
        x = self.respond(functional.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True))
        x = self.respond(self.conv3(self.conv2(x)))
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        aux = []
        for name in WIDTHS:
            x = getattr(self, f"inception{name}")(x)
            if name in ("4a", "4d"):
                aux.append((self.aux1 if name == "4a" else self.aux2)(x))
            if name in ("3b", "4e"):
                window = 2 if name == "4e" and not self.lrn else 3
                x = functional.max_pool2d(x, window, 2, ceil_mode=True)
        return [self.fc(x.mean((2, 3))), *aux]


def random_weights(reference: Any) -> None:
    """Fills weights, biases and BatchNorm statistics randomly, keeping activations near 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(tensor: Any) -> Any:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(normal(module.weight) * (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(0.1 * normal(module.bias))
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(1 + 0.1 * normal(module.weight))
                module.bias.copy_(0.1 * normal(module.bias))
                module.running_mean.copy_(0.3 * normal(module.running_mean))
                module.running_var.copy_(torch.exp(0.3 * normal(module.running_var)))


def arrays(reference: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in reference.state_dict().items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("model", "size", "head_grid"),
    [
        (Model(name="googlenet_torchvision", aux_heads=True), 64, 4),
        (Model(name="googlenet_torchvision", aux_heads=True), 99, 4),
        (Model(norm="lrn", aux_heads=True), 64, 1),
        (Model(norm="lrn", aux_heads=True), 131, 2),
    ],
    ids=["torchvision-64", "torchvision-99", "paper-64", "paper-131"],
)
def test_logits_of_all_heads_match_pytorch(model: Model, size: int, head_grid: int) -> None:
    reference = Reference(model.norm == "lrn", head_grid)
    random_weights(reference)
    model.dropout = model.aux_dropout = 0.0
    module = networks.create(model, 10)
    images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    abstract_variables = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = torchvision_weights.convert(arrays(reference), abstract_variables)
    torch_images = torch.from_numpy(images).permute(0, 3, 1, 2)

    with torch.no_grad():
        logits, *_ = reference.eval()(torch_images)
    output = jax.jit(module.apply)(variables, images)
    assert_close(output.logits, logits)
    assert output.aux == ()

    with torch.no_grad():
        all_logits = reference.train()(torch_images)
    output, _ = jax.jit(lambda *args: module.apply(*args, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    for logits, torch_logits in zip((output.logits, *output.aux), all_logits, strict=True):
        assert_close(logits, torch_logits)


def assert_close(logits: jax.Array, expected: Any) -> None:
    """Asserts that logits agree to within 1e-4 of the largest."""
    expected = expected.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("heads", [True, False], ids=["heads", "no-heads"])
def test_state_dict_is_converted_to_weights_file(
    suffix: str, heads: bool, tmp_path: pathlib.Path
) -> None:
    reference = Reference(False, 4)
    random_weights(reference)
    state = {k: v for k, v in reference.state_dict().items() if heads or not k.startswith("aux")}
    source, names = tmp_path / f"googlenet{suffix}", tmp_path / "names.txt"
    target = tmp_path / "weights.safetensors"
    if suffix == ".pth":
        # As saved by torchvision's training script on several devices.
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, source)
    else:
        save_file({k: v.numpy() for k, v in state.items()}, source)
    names.write_text("".join(f"class {index}\n" for index in range(10)))

    arguments = (f"--input={source}", f"--output={target}", f"--class_names={names}")
    output = command.check("tools.import_weights", *arguments)
    assert "googlenet_torchvision, 10 classes; mean (0.5, 0.5, 0.5)" in output

    imported = weights.load(target)
    assert imported.class_names == tuple(f"class {index}" for index in range(10))
    assert imported.model.aux_heads == heads
    assert imported.mean.tolist() == imported.std.tolist() == [0.5, 0.5, 0.5]
    assert (imported.image_size, imported.eval_crop) == (224, 0.875)
    expected = torchvision_weights.from_torchvision(arrays(reference))[1]
    leaves = weights.flatten(imported.variables)
    assert any("aux_4a" in name for name in leaves) == heads
    for name, leaf in weights.flatten(expected).items():
        if heads or "aux" not in name:
            np.testing.assert_array_equal(leaves[name], leaf, err_msg=name)


def test_state_dict_of_another_network_is_rejected(tmp_path: pathlib.Path) -> None:
    reference = Reference(False, 4)
    state = reference.state_dict()
    state["layer1.weight"] = state.pop("conv2.conv.weight")
    state["conv3.bn.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "other.pth")
    done = command.run(
        "tools.import_weights", f"--input={tmp_path / 'other.pth'}", f"--output={tmp_path / 'out'}"
    )
    assert done.returncode == 2
    for message in (
        "2 entries",
        "missing: conv2.conv.weight",
        "layer1.weight",
        "conv3.bn.weight: has",
    ):
        assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_training_scripts_are_read(tmp_path: pathlib.Path) -> None:
    reference = Reference(False, 4)
    random_weights(reference)
    state = reference.state_dict()
    expected = weights.flatten(torchvision_weights.from_torchvision(arrays(reference))[1])
    progress = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3, 3)}}}}
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "args": argparse.Namespace(lr=0.1),
    }
    source, target = tmp_path / "last.ckpt", tmp_path / "weights.safetensors"
    torch.save(progress | checkpoint, source)
    command.check("tools.import_weights", f"--input={source}", f"--output={target}")
    for name, leaf in weights.flatten(weights.load(target).variables).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)

    torch.save({"state_dict": state, "config": Touch(tmp_path)}, source)
    done = command.run("tools.import_weights", f"--input={source}", f"--output={target}")
    assert done.returncode == 2 and "next to the weights" in done.stderr


def test_pickle_that_runs_code_is_rejected(tmp_path: pathlib.Path) -> None:
    trace, source = tmp_path / "trace", tmp_path / "evil.pth"
    source.write_bytes(pickle.dumps(Touch(trace)))
    done = command.run("tools.import_weights", f"--input={source}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert str(source) in done.stderr and "Traceback" not in done.stderr
    assert not trace.exists()


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")
