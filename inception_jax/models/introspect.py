"""Looking inside a network: its modules and what they give, and the program it is traced to."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

# What a module of a path gave → what its caller gets.
OutputHook = Callable[[nn.Module, str, Any], Any]

# Programs inside a program, whose operations belong to the module that calls them.
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat2",
    "checkpoint",
}


def called_jaxpr(equation: JaxprEqn) -> Jaxpr | None:
    """Returns the program that an operation of a program is a call of; None: it is none."""
    if equation.primitive.name not in _CALLS:
        return None
    (inner,) = jaxprs_in_params(equation.params)
    return inner


@contextlib.contextmanager
def intercept_outputs(see: OutputHook) -> Iterator[None]:
    """Shows a function the result of every module that is called inside.

    Args:
      see: is given the module, its path in the network with slashes ('': the network itself) and
        its result, and returns what the module is to return instead.
    """

    def intercept(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = function(*args, **kwargs)
        if context.method_name != "__call__":
            return result
        return see(context.module, "/".join(context.module.path), result)

    with nn.intercept_methods(intercept):
        yield


def spatial_layers(
    network: nn.Module, variables: Any, images: jax.Array | jax.ShapeDtypeStruct
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the modules that give a grid in evaluation, in the order in which they end.

    Args:
      network, variables: as `networks.create` makes them.
      images: float32 [B, H, W, 3], or their shape.

    Returns:
      Shape [B, h, w, C] and type of the output of every module that gives a grid, by its path
      inside the network, such as "inception_4e/conv_3x3".
    """
    found = {}

    def see(_: nn.Module, path: str, result: Any) -> Any:
        if path and getattr(result, "ndim", 0) == 4:
            found[path] = jax.ShapeDtypeStruct(result.shape, result.dtype)
        return result

    with intercept_outputs(see):
        jax.eval_shape(lambda v, x: network.apply(v, x, train=False), variables, images)
    return found
