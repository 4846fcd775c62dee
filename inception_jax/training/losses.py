"""The training objective, one value per example.

Nothing here averages over the batch: callers weight, sum and count, so that training and masked
evaluation share these functions.
"""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes -sum(targets * log softmax(logits)) for each example, in nats.

    Args:
      logits: float [B, K]; cast to float32.
      targets: float32 [B, K], rows summing to 1.

    Returns:
      float32 [B].

    >>> round(float(cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))[0]), 3)  # log 2
    0.693
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def objective(
    logits: jax.Array,
    aux_logits: tuple[jax.Array, ...],
    targets: jax.Array,
    *,
    label_smoothing: float,
    aux_weight: float,
) -> jax.Array:
    """Computes the training loss: main + aux_weight * (sum over auxiliary heads).

    Szegedy et al. 2015, "Going Deeper with Convolutions", section 5, where aux_weight is 0.3. All
    heads use the same smoothed targets. Weight decay is part of the optimizer.

    Args:
      logits: float [B, K].
      aux_logits: float [B, K] for each auxiliary head; () if there are none.
      targets: float32 [B, K], rows summing to 1.
      label_smoothing: fraction of the target spread evenly over the classes, in [0, 1) (Szegedy et
        al. 2016, "Rethinking the Inception Architecture", section 7, with u(k) = 1 / K).
      aux_weight: weight of each auxiliary head's loss.

    Returns:
      float32 [B].
    """
    targets = optax.smooth_labels(targets, label_smoothing)
    loss = cross_entropy(logits, targets)
    for head in aux_logits:
        loss += aux_weight * cross_entropy(head, targets)
    return loss
