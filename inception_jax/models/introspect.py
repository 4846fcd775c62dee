"""Inspects a network's modules, their outputs and its traced program."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

# (module, its path, its output) -> the output its caller receives.
OutputHook = Callable[[nn.Module, str, Any], Any]

# Primitives that call an inner program, whose operations belong to the calling module.
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
    """Returns the inner program that an operation calls, or None if it is not a call."""
    if equation.primitive.name not in _CALLS:
        return None
    (inner,) = jaxprs_in_params(equation.params)
    return inner


@contextlib.contextmanager
def intercept_outputs(hook: OutputHook) -> Iterator[None]:
    """Passes the output of every module called inside the `with` block through a function.

    Args:
      hook: receives the module, its slash-separated path as in the network's variables (''
        for the network itself) and its output, and returns the output to use instead.
    """

    def intercept(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = function(*args, **kwargs)
        if context.method_name != "__call__":
            return result
        # A custom network shares the scope of its adapter, so its variables lack this name.
        path = (name for name in context.module.path if name != "adapted_network")
        return hook(context.module, "/".join(path), result)

    with nn.intercept_methods(intercept):
        yield


def spatial_layers(
    network: nn.Module, variables: Any, images: jax.Array | jax.ShapeDtypeStruct
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the modules that output a feature map in evaluation, in the order they finish.

    Args:
      network: as `networks.create` returns it.
      variables: of the network.
      images: float32 [B, H, W, 3], or their shape.

    Returns:
      The shape [B, h, w, C] and dtype of each such output by the module's path inside the network,
      such as "inception_4e/conv_3x3".
    """
    layers = {}

    def record(_: nn.Module, path: str, result: Any) -> Any:
        if path and getattr(result, "ndim", 0) == 4:
            layers[path] = jax.ShapeDtypeStruct(result.shape, result.dtype)
        return result

    with intercept_outputs(record):
        jax.eval_shape(lambda v, x: network.apply(v, x, train=False), variables, images)
    return layers
