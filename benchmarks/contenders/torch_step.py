"""The training and evaluation step in PyTorch: channels_last, autocast for bfloat16.

Bare, like ours: the batch is on the device as normalized float32 pixels, without augmentation.
"""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.contenders import network, serve


class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(
            outputs, eps=network.NORM_EPSILON, momentum=1 - network.NORM_MOMENTUM
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H', W']."""
        return functional.relu(self.norm(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """The inception module."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        self.one = Unit(inputs, one)
        self.three = nn.Sequential(Unit(inputs, reduce3), Unit(reduce3, three, 3))
        self.five = nn.Sequential(Unit(inputs, reduce5), Unit(reduce5, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), Unit(inputs, pool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, inputs, H, W] to [B, sum of the four branches, H, W]."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def googlenet(stem: str, classes: int) -> nn.Module:
    """Returns the network of `network`."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    first = network.STEMS[stem]
    layers: list[nn.Module] = [Unit(3, 64, first.kernel_size, first.stride), pool()]
    layers += [Unit(64, 64), Unit(64, 192, 3)]
    if first.second_pool:
        layers.append(pool())
    inputs = 192
    for name, widths in network.MODULES.items():
        layers.append(Inception(inputs, widths))
        inputs = widths[0] + widths[2] + widths[4] + widths[5]
        if name in network.POOL_AFTER:
            layers.append(pool())
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(network.DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


class Steps:
    """The network with a batch on the device."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        size, count = settings["image_size"], settings["batch_size"]
        self.device = device
        self.autocast = settings["dtype"] == "bfloat16"
        model = googlenet(settings["stem"], settings["classes"]).to(device)
        self.model = model.to(memory_format=torch.channels_last)
        self.parameters = sum(each.numel() for each in model.parameters())
        self.forward = self.model
        if settings["compile"]:
            self.forward = torch.compile(self.model, mode=settings["compile_mode"])
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            network.LEARNING_RATE,
            momentum=network.MOMENTUM,
            nesterov=True,
            fused=device.type == "cuda",
        )
        images = torch.randn(count, 3, size, size, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(settings["classes"], (count,), device=device)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context that computes in the contender's dtype."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def train(self) -> None:
        """Runs one training step."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            loss = functional.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    def evaluate(self) -> None:
        """Computes the loss and top-1 of the batch."""
        self.model.eval()
        with torch.no_grad(), self.precision():
            logits = self.forward(self.images)
            functional.cross_entropy(logits, self.labels)
            (logits.argmax(1) == self.labels).sum()


def matmul(settings: dict[str, Any], device: torch.device, wait: Any) -> serve.TimedOperation:
    """Returns a timed product of two square matrices."""
    size = settings["matmul_size"]
    a = torch.randn(size, size, device=device, dtype=getattr(torch, settings["dtype"]))
    result = torch.empty_like(a)
    return serve.TimedOperation(lambda: torch.matmul(a, a, out=result), wait).warm_up()


def make(settings: dict[str, Any]) -> serve.Contender:
    """Creates the contender with the modes (train, eval, matmul) of settings["modes"]."""
    use_cuda = settings["platform"] == "gpu"
    device = torch.device("cuda" if use_cuda else "cpu")
    if use_cuda:
        # TF32 instead of float32, as in JAX by default.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    steps = Steps(settings, device)
    wait = torch.cuda.synchronize if use_cuda else lambda: None
    makers = {
        "train": lambda: serve.TimedOperation(steps.train, wait).warm_up(),
        "eval": lambda: serve.TimedOperation(steps.evaluate, wait).warm_up(),
        "matmul": lambda: matmul(settings, device, wait),
    }
    facts = {
        "versions": {"torch": torch.__version__},
        "device": torch.cuda.get_device_name() if use_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": steps.parameters,
    }
    return serve.Contender(facts, {mode: makers[mode]() for mode in settings["modes"]})
