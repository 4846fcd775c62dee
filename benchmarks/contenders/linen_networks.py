"""Plain Flax networks and their training step, to compare with ours under the same compilers.

GoogLeNet is written as a user of `flax.linen` would write it. ResNet-50 is the network that
everyone has measured (He et al. 2015, arXiv:1512.03385; version 1.5, with its strides in the 3x3
convolutions). The step has no augmentation: it normalizes the images, and updates by SGD with
Nesterov momentum and weight decay.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from benchmarks.contenders import network
from inception_jax.runtime import sharding

RESNET_BLOCKS = (3, 4, 6, 3)


def _norm(train: bool, dtype: Any) -> Any:
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=network.NORM_MOMENTUM,
        epsilon=network.NORM_EPSILON,
        dtype=dtype,
    )


class GoogLeNet(nn.Module):
    """GoogLeNet with BatchNorm and the stem of `network.STEMS`; maps [B, H, W, 3] to logits."""

    stem: str
    classes: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns float32 [B, classes]."""
        norm = _norm(train, self.dtype)
        pool = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")

        def unit(x: jax.Array, features: int, side: int = 1, stride: int = 1) -> jax.Array:
            x = nn.Conv(features, (side, side), stride, use_bias=False, dtype=self.dtype)(x)
            return nn.relu(norm()(x))

        stem = network.STEMS[self.stem]
        x = unit(x, 64, stem.kernel_size, stem.stride)
        x = pool(x, strides=(2, 2))
        x = unit(unit(x, 64), 192, 3)
        if stem.second_pool:
            x = pool(x, strides=(2, 2))
        for name, (one, reduce3, three, reduce5, five, project) in network.MODULES.items():
            branches = [
                unit(x, one),
                unit(unit(x, reduce3), three, 3),
                unit(unit(x, reduce5), five, 5),
                unit(pool(x, strides=(1, 1)), project),
            ]
            x = jnp.concatenate(branches, axis=-1)
            if name in network.POOL_AFTER:
                x = pool(x, strides=(2, 2))
        x = x.mean((1, 2)).astype(jnp.float32)
        return nn.Dense(self.classes)(nn.Dropout(network.DROPOUT, deterministic=not train)(x))


class ResNet50(nn.Module):
    """ResNet-50, version 1.5; maps [B, H, W, 3] to logits."""

    classes: int
    width: int = 64
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns float32 [B, classes]."""
        norm = _norm(train, self.dtype)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = nn.relu(norm()(conv(self.width, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(RESNET_BLOCKS):
            features = self.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(features, (1, 1))(x)))
                y = nn.relu(norm()(conv(features, (3, 3), stride)(y)))
                y = norm(scale_init=nn.initializers.zeros)(conv(4 * features, (1, 1))(y))
                if not block:
                    x = norm()(conv(4 * features, (1, 1), stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.classes)(x.mean((1, 2)).astype(jnp.float32))


def lower_train_step(
    model: GoogLeNet | ResNet50, mesh: Mesh, *, batch_size: int, image_size: int
) -> jax.stages.Lowered:
    """Traces the training step of a plain network; computes nothing.

    Args:
      model: the network.
      mesh: the devices, which share the batch.
      batch_size: images of all devices together.
      image_size: side of the images, pixels.
    """
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-4),
        optax.sgd(network.LEARNING_RATE, network.MOMENTUM, nesterov=True),
    )

    def init(key: jax.Array) -> Any:
        variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)), train=False)
        return variables, optimizer.init(variables["params"])

    # The audit looks for these names of arguments.
    def train_step(state: Any, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        variables, momentum = state

        def loss(params: Any) -> Any:
            logits, updates = model.apply(
                variables | {"params": params},
                (batch["image"].astype(jnp.float32) / 255 - 0.5).astype(model.dtype),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), updates

        (value, updates), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, momentum = optimizer.update(gradient, momentum, variables["params"])
        params = optax.apply_updates(variables["params"], change)
        return (dict(updates) | {"params": params}, momentum), value

    shared, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def abstract(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.tree.map(lambda leaf: abstract(leaf, everywhere), jax.eval_shape(init, key))
    shape = (batch_size, image_size, image_size, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=shared),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=shared),
    }
    return jax.jit(train_step, donate_argnums=0).lower(state, batch, abstract(key, everywhere))
