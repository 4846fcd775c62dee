"""Custom parts, registered from a file outside the package."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from inception_jax.registry import (
    register_augmentation,
    register_model,
    register_optimizer,
    register_schedule,
)


class Unit(nn.Module):
    features: int
    size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.features, (self.size, self.size), self.stride, use_bias=False)(x)
        return nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))


class Module(nn.Module):
    """Ioffe and Szegedy 2015, figure 5; at stride 2 without the first branch."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        n, stride = self.features, self.stride
        single = Unit(n, 3, stride)(Unit(n)(x, train), train)
        double = Unit(n, 3, stride)(Unit(n, 3)(Unit(n)(x, train), train), train)
        if stride == 2:
            pool = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            return jnp.concatenate([single, double, pool], -1)
        pool = Unit(n)(nn.avg_pool(x, (3, 3), padding="SAME"), train)
        return jnp.concatenate([Unit(n)(x, train), single, double, pool], -1)


class InceptionBN(nn.Module):
    classes: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = Unit(self.width, 3)(x, train)
        for stride in (1, 2, 1):
            x = Module(self.width, stride)(x, train)
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.classes)(x)


@register_model("inception_bn", min_image_size=4, options={"width": 8}, settings=("dropout",))
def inception_bn(settings: Any, num_classes: int) -> nn.Module:
    return InceptionBN(num_classes, settings.options["width"])


@register_model("linear")
def linear(settings: Any, num_classes: int) -> nn.Module:
    """A network without a train argument, statistics or dropout."""

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array) -> jax.Array:
            return nn.Dense(num_classes)(images.reshape(len(images), -1))

    return Linear()


@register_optimizer("my_lion", decay="decoupled", settings=("beta1", "weight_decay"))
def my_lion(settings: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.scale_by_lion(settings.beta1, 0.99)


@register_optimizer("whole_sgd")
def whole_sgd(settings: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(settings.weight_decay, settings.decay_mask)
    return optax.chain(decay, optax.sgd(schedule, settings.momentum))


@register_schedule("triangle", options={"top": 0.5})
def triangle(settings: Any, total_steps: int) -> optax.Schedule:
    rise = settings.options["top"] * total_steps
    peak = settings.learning_rate
    return lambda t: peak * jnp.minimum(t / rise, (total_steps - t) / (total_steps - rise))


@register_augmentation("blur", options={"probability": 0.5})
def blur(key: jax.Array, images: jax.Array, *, probability: float) -> jax.Array:
    rows = (images + jnp.roll(images, 1, 1) + jnp.roll(images, -1, 1)) / 3
    blurred = jax.random.bernoulli(key, probability, (len(images), 1, 1, 1))
    return jnp.where(blurred, rows, images)
