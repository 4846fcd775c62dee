"""The networks against PyTorch, with the same random weights on both sides.

The PyTorch modules are written here, with the names and the geometry of torchvision's GoogLeNet
(ceil-mode pools, padding of half the kernel, adaptive average pools) and of the paper's.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from inception_jax.config import Model
from inception_jax.models import registry

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


# The classes need "type: ignore": importorskip gives mypy no torch, whether it is there or not.
class Unit(nn.Module):  # type: ignore[name-defined]
    def __init__(self, i: int, o: int, size: int = 1, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, size, stride, size // 2, bias=not norm)
        self.norm = nn.BatchNorm2d(o, eps=1e-3) if norm else nn.Identity()

    def forward(self, x: Any) -> Any:
        return functional.relu(self.norm(self.conv(x)))


class Inception(nn.Module):  # type: ignore[name-defined]
    def __init__(self, widths: tuple[int, ...], five: int, norm: bool) -> None:
        super().__init__()
        i, one, reduce3, three, reduce5, five_out, pool = widths
        self.conv_1x1 = Unit(i, one, norm=norm)
        self.reduce_3x3 = Unit(i, reduce3, norm=norm)
        self.conv_3x3 = Unit(reduce3, three, 3, norm=norm)
        self.reduce_5x5 = Unit(i, reduce5, norm=norm)
        self.conv_5x5 = Unit(reduce5, five_out, five, norm=norm)
        self.pool_proj = Unit(i, pool, norm=norm)

    def forward(self, x: Any) -> Any:
        pooled = functional.max_pool2d(x, 3, 1, 1)
        branches = (
            self.conv_1x1(x),
            self.conv_3x3(self.reduce_3x3(x)),
            self.conv_5x5(self.reduce_5x5(x)),
            self.pool_proj(pooled),
        )
        return torch.cat(branches, 1)


class Head(nn.Module):  # type: ignore[name-defined]
    def __init__(self, i: int, grid: int, adaptive: bool, norm: bool) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.conv = Unit(i, 128, norm=norm)
        self.hidden = nn.Linear(128 * grid * grid, 1024)
        self.classifier = nn.Linear(1024, 10)

    def forward(self, x: Any) -> Any:
        if self.adaptive:
            x = functional.adaptive_avg_pool2d(x, 4)
        else:
            x = functional.avg_pool2d(x, min(5, x.shape[-1]), 3)
        # Flattened with the channels last, as the other side does.
        x = self.conv(x).permute(0, 2, 3, 1).flatten(1)
        return self.classifier(functional.relu(self.hidden(x)))


class Reference(nn.Module):  # type: ignore[name-defined]
    """torchvision's network, or with `lrn` the paper's."""

    def __init__(self, lrn: bool, head_grid: int) -> None:
        super().__init__()
        norm, self.lrn = not lrn, lrn
        self.conv1 = Unit(3, 64, 7, 2, norm=norm)
        self.conv2_reduce = Unit(64, 64, norm=norm)
        self.conv2 = Unit(64, 192, 3, norm=norm)
        for name, widths in WIDTHS.items():
            self.add_module(f"inception_{name}", Inception(widths, 5 if lrn else 3, norm))
        self.aux_4a = Head(512, head_grid, not lrn, norm)
        self.aux_4d = Head(528, head_grid, not lrn, norm)
        self.classifier = nn.Linear(1024, 10)

    def respond(self, x: Any) -> Any:
        return functional.local_response_norm(x, 5, 1e-4, 0.75, 1.0) if self.lrn else x

    def forward(self, x: Any) -> list[Any]:
        x = self.respond(functional.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True))
        x = self.respond(self.conv2(self.conv2_reduce(x)))
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        aux = []
        for name in WIDTHS:
            x = getattr(self, f"inception_{name}")(x)
            if name in ("4a", "4d"):
                aux.append(getattr(self, f"aux_{name}")(x))
            if name in ("3b", "4e"):
                window = 2 if name == "4e" and not self.lrn else 3
                x = functional.max_pool2d(x, window, 2, ceil_mode=True)
        return [self.classifier(x.mean((2, 3))), *aux]


def random_weights(reference: Any) -> None:
    """Fills every weight, bias and BatchNorm statistic at random, to keep activations near 1."""
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


def copied(reference: Any, variables: Any) -> Any:
    """Returns the tree `variables` filled from the reference's module of each leaf's path."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

    def value(path: Any, leaf: Any) -> np.ndarray:
        _, *modules, name = (key.key for key in path)
        modules = [each for each in modules if each != "dense"]
        module = reference.get_submodule(".".join(modules))
        if name != "kernel":
            result = getattr(module, names[name]).detach().numpy()
        elif isinstance(module, nn.Conv2d):
            result = module.weight.detach().numpy().transpose(2, 3, 1, 0)
        else:
            result = module.weight.detach().numpy().T
        assert result.shape == leaf.shape, path
        return np.ascontiguousarray(result)

    return jax.tree_util.tree_map_with_path(value, variables)


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
def test_logits_of_all_heads_agree_with_pytorch(model: Model, size: int, head_grid: int) -> None:
    reference = Reference(model.norm == "lrn", head_grid)
    random_weights(reference)
    model.dropout = model.aux_dropout = 0.0
    module = registry.create(model, 10)
    images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    variables = copied(reference, jax.eval_shape(module.init, jax.random.key(0), images))
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
    """Asserts that logits agree to 1e-4 of the largest."""
    expected = expected.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
