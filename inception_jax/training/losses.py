"""The training objective and the top-k decision, one value an example.

Nothing here averages over the batch: the step weighs, sums and counts, so that training and masked
evaluation share these functions.
"""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -sum(targets * log softmax(logits)) of each example, in nats.

    Args:
      logits: float [B, K]; computed in float32 whatever their type.
      targets: float32 [B, K], rows summing to 1.

    Returns:
      float32 [B].
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def smooth(targets: jax.Array, label_smoothing: float) -> jax.Array:
    """Returns (1 - label_smoothing) * targets + label_smoothing / K.

    Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7, with u(k) = 1 / K.

    Args:
      targets: float32 [B, K], rows summing to 1.
      label_smoothing: share of the target spread evenly, in [0, 1).

    Returns:
      float32 [B, K].
    """
    return (1 - label_smoothing) * targets + label_smoothing / targets.shape[-1]


def objective(
    logits: jax.Array,
    aux_logits: tuple[jax.Array, ...],
    targets: jax.Array,
    *,
    label_smoothing: float,
    aux_weight: float,
) -> jax.Array:
    """Returns the loss that training minimises: main + aux_weight * (the sum of the others).

    Szegedy et al. 2015, "Going Deeper with Convolutions", section 5, where aux_weight is 0.3. All
    heads are held to the same smoothed targets. Weight decay is the optimizer's.

    Args:
      logits: float [B, K].
      aux_logits: float [B, K] of each auxiliary head; () without any.
      targets: float32 [B, K], rows summing to 1.
      label_smoothing: share of the target spread evenly over the classes.
      aux_weight: weight of each auxiliary head's loss.

    Returns:
      float32 [B].
    """
    targets = smooth(targets, label_smoothing)
    loss = cross_entropy(logits, targets)
    for head in aux_logits:
        loss += aux_weight * cross_entropy(head, targets)
    return loss


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Returns whether each label is among the k classes with the largest logits.

    Of equal logits the lower class number comes first, as in argmax and in a stable sort; a network
    that says the same for all classes thus scores one class, not every example. An example with a
    NaN among its logits counts as wrong. With k >= K every other example counts as right.

    Args:
      logits: float [B, K].
      labels: int32 [B], in [0, K).
      k: at least 1.

    Returns:
      bool [B].
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])[None, :]
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    rank = jnp.sum(ahead, axis=1)
    return (rank < k) & ~jnp.any(jnp.isnan(logits), axis=1)
