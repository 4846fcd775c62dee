"""Random keys by name and step.

Each use of randomness has a name, and its key depends on (seed, name, step), never on splits of
another key. Adding a use therefore changes no other, and resuming needs no saved generator state.
"""

import zlib

import jax


def key_for(seed: int, name: str, step: int | jax.Array = 0) -> jax.Array:
    """Returns the random key for one use of randomness at one step.

    Args:
      seed: config.seed.
      name: what the key is for, such as "dropout".
      step: number of finished steps, an int or an int32 scalar on the device.
    """
    named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(named, step)
