"""Muon: momentum made orthogonal, for the kernels of hidden layers, and Adam for all else."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from inception_jax.models import protocol


def direction(momentum: float) -> optax.GradientTransformation:
    """Returns Muon's direction (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

    The Nesterov momentum of each kernel, as the matrix [H * W * I, O], is replaced by
    `orthogonalized`, and multiplied by sqrt(max(1, O / (H * W * I))). The Frobenius norm of the
    direction is then about sqrt(O) whatever the kernel's shape, and that of a kernel from
    `layers.he_normal` sqrt(2 O): the first update changes every kernel by the same share,
    rate / sqrt(2). (The "consistent RMS" scale of Liu et al. 2025 would change kernels of large
    fan-in more.) Unlike airbench94_muon of the same author, a step does not reset the kernels'
    norms: weight decay bounds them.
    """

    def of_kernel(kernel: jax.Array) -> jax.Array:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        scale = max(1.0, matrix.shape[1] / matrix.shape[0]) ** 0.5
        return (scale * orthogonalized(matrix)).reshape(kernel.shape)

    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.stateless_with_tree_map(lambda update, _: of_kernel(update)),
    )


def orthogonalized(matrix: jax.Array) -> jax.Array:
    """Returns about U V^T, where U S V^T is the matrix's singular value decomposition.

    Five Newton-Schulz iterations X <- a X + b (X X^T) X + c (X X^T)^2 X from X = matrix / its
    Frobenius norm, with the coefficients of Jordan et al. 2024, bring each singular value that was
    at least 1/500 of the norm to between 0.68 and 1.21. They are carried out on
    G = X X^T of the smaller side: with P = a + b G + c G^2, X becomes P X and G becomes P G P.
    optax.contrib.scale_by_muon multiplies X itself each time, and takes two to four times as long.

    Args:
      matrix: float32 [M, N].

    Returns:
      float32 [M, N]; zeros for zeros.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    a, b, c = 3.4445, -4.7750, 2.0315
    # A rounding error in G grows twelvefold each time: too much for the fast modes of accelerators.
    with jax.default_matmul_precision("highest"):
        x = matrix / (jnp.linalg.norm(matrix) + 1e-12)
        gram, identity = x @ x.T, jnp.eye(len(x), dtype=x.dtype)
        product = identity
        for _ in range(5):
            polynomial = a * identity + b * gram + c * gram @ gram
            product = polynomial @ product
            gram = polynomial @ gram @ polynomial
        return product @ x


def split(network: nn.Module, params: optax.Params) -> optax.Params:
    """Returns a tree of names: "muon" for hidden layers' kernels, "adam" for all else.

    The first convolution maps pixels and the classifiers give logits: neither is a hidden layer,
    and the reference gives both to Adam.

    Raises:
      ConfigError: if the network does not say which they are.
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
