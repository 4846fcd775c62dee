"""The training objective, one value an example.

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
      label_smoothing: share of the target spread evenly over the classes, in [0, 1) (Szegedy et al.
        2016, "Rethinking the Inception Architecture", section 7, with u(k) = 1 / K).
      aux_weight: weight of each auxiliary head's loss.

    Returns:
      float32 [B].
    """
    targets = optax.smooth_labels(targets, label_smoothing)
    loss = cross_entropy(logits, targets)
    for head in aux_logits:
        loss += aux_weight * cross_entropy(head, targets)
    return loss
