"""Random keys by name and step.

Each use of randomness has a name; its key is derived from (seed, name, step) and never from another
key's splits. So adding a use changes no other, and a resumed run needs no saved generator state.
"""

import zlib

import jax


def derive(seed: int, name: str, step: int | jax.Array = 0) -> jax.Array:
    """Returns the key of the use `name` at a step.

    Args:
      seed: of the run.
      name: of the use, such as "dropout".
      step: finished steps, an int or an int32 scalar on the device.
    """
    named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(named, step)
