"""Muon: orthogonalized momentum for the kernels of hidden layers, and Adam for everything else."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from inception_jax.models import protocol


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Returns Muon's update direction (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

    The Nesterov momentum of each kernel, as a matrix [H * W * I, O], is orthogonalized and
    multiplied by sqrt(max(1, O / (H * W * I))). The Frobenius norm of the update is then about
    sqrt(O) whatever the kernel's shape, and that of a kernel from `layers.he_normal` sqrt(2 O): the
    first update changes every kernel by the same fraction, rate / sqrt(2). (The "consistent RMS"
    scale of Liu et al. 2025 would change kernels with a large fan-in more.) Unlike airbench94_muon
    by the same author, a step does not reset the kernels' norms: weight decay bounds them.
    """

    def orthogonalize_kernel(kernel: jax.Array) -> jax.Array:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        scale = max(1.0, matrix.shape[1] / matrix.shape[0]) ** 0.5
        return (scale * orthogonalize(matrix)).reshape(kernel.shape)

    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless_with_tree_map(lambda update, _: orthogonalize_kernel(update)),
    )


def orthogonalize(matrix: jax.Array) -> jax.Array:
    """Computes approximately U V^T, where U S V^T is the matrix's singular value decomposition.

    Five Newton-Schulz iterations X <- a X + b (X X^T) X + c (X X^T)^2 X from X = matrix / its
    Frobenius norm, with the coefficients of Jordan et al. 2024, bring each singular value that was
    at least 1/500 of the norm to between 0.68 and 1.21. They are computed on G = X X^T of the
    smaller side: with P = a + b G + c G^2, X becomes P X and G becomes P G P.
    optax.contrib.scale_by_muon multiplies X itself each time, which takes two to four times as
    long.

    Args:
      matrix: float32 [M, N].

    Returns:
      float32 [M, N]; zeros for a zero matrix.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    a, b, c = 3.4445, -4.7750, 2.0315
    # Rounding errors in G grow twelvefold per iteration: too much for fast modes of accelerators.
    with jax.default_matmul_precision("highest"):
        x = matrix / (jnp.linalg.norm(matrix) + 1e-12)
        gram, identity = x @ x.T, jnp.eye(len(x), dtype=x.dtype)
        product = identity
        for _ in range(5):
            polynomial = a * identity + b * gram + c * gram @ gram
            product = polynomial @ product
            gram = polynomial @ gram @ polynomial
        return product @ x


def param_labels(network: nn.Module, params: optax.Params) -> optax.Params:
    """Returns a tree of labels: "muon" for kernels of hidden layers, "adam" for everything else.

    The first convolution and the classifiers are not hidden layers; the reference implementation
    also uses Adam for them.

    Raises:
      ConfigError: if the network does not declare them.
    """
    purpose = "config.optimizer.name = 'muon'"
    ends = (
        protocol.require_attribute(network, "first_conv", purpose),
        *protocol.require_attribute(network, "classifiers", purpose),
    )

    def rule(path: str, leaf: Any) -> str:
        hidden = protocol.is_kernel(path, leaf) and not protocol.is_inside(path, *ends)
        return "muon" if hidden else "adam"

    return protocol.label_params(params, rule)
