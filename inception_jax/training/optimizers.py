"""Update rules.

The package's optimizers are always the same chain of transformations: settings that are switched
off leave their place in the chain, and with it the structure of a checkpoint, as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

from inception_jax import registry
from inception_jax.config import Optimizer
from inception_jax.errors import ConfigError
from inception_jax.models import protocol
from inception_jax.registry import register_optimizer
from inception_jax.training import muon as muon_rule


@dataclasses.dataclass
class Settings(Optimizer):
    """The settings of an optimizer, with what it may have to know of the network.

    Attributes:
      network: whose parameters it updates; None: it is not known.
    """

    network: nn.Module | None = None

    def decay_mask(self, params: optax.Params) -> optax.Params:
        """Returns a tree of bools, true for the parameters that weight decay takes."""
        if self.decay_norm_and_bias:
            return jax.tree.map(lambda _: True, params)
        return protocol.decay_mask(self.network)(params)

    def decay(self) -> optax.GradientTransformation:
        """Returns what adds weight_decay times the weights that it takes."""
        return optax.add_decayed_weights(self.weight_decay, mask=self.decay_mask)


def make_optimizer(
    optimizer: Optimizer, schedule: optax.Schedule, network: nn.Module | None = None
) -> optax.GradientTransformation:
    """Returns the update rule: clip, weight decay, momentum or Adam, learning rate.

    First the gradient is scaled down to a global norm of clip_norm, where it is larger (Pascanu et
    al. 2013). Then comes what is registered under the name: a whole rule, or a direction between
    decay and rate (`registry.register_optimizer`). Only the parameters that `protocol` names decay
    (kernels; not biases and norm scales), unless decay_norm_and_bias.

    The state's structure depends on the name alone (sgd and sgd_nesterov share theirs), so a run
    can be resumed with any other setting changed.

    Args:
      optimizer: the settings.
      schedule: learning rate as a function of the updates already made.
      network: whose parameters are updated; None: one that follows no Protocol.

    Returns:
      A transformation whose `update` needs the parameters.

    Raises:
      ConfigError: if what was registered returns none, or needs to know more of the network.
    """
    part = registry.OPTIMIZERS.get(optimizer.name)
    settings = Settings(**vars(registry.fill(part, optimizer)), network=network)
    with registry.explained(part, f"the optimizer {part.name!r}"):
        built = part.build(settings, schedule)
    if not isinstance(built, optax.GradientTransformation):
        raise ConfigError(
            f"{part.place}: the optimizer {part.name!r} returned {built!r}, a "
            f"{type(built).__name__}; it has to return an optax.GradientTransformation"
        )
    clip = (
        optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    )
    rate = optax.scale_by_learning_rate(schedule)
    chains = {
        "own": (clip, built),
        "l2": (clip, settings.decay(), built, rate),
        "decoupled": (clip, built, settings.decay(), rate),
    }
    return optax.chain(*chains[part.decay])


_ADAM = ("beta1", "beta2", "epsilon")
_DECAY = ("weight_decay", "decay_norm_and_bias")

# Directions by name: where the weight decay stands, the settings that they read, and the rule.
_DIRECTIONS: dict[str, tuple[str, tuple[str, ...], Callable[[Settings, Any], Any]]] = {
    # torch.optim.SGD: g += wd * p; v = momentum * v + g; p -= rate * v
    "sgd": ("l2", ("momentum",), lambda s, _: optax.trace(s.momentum)),
    "sgd_nesterov": ("l2", ("momentum",), lambda s, _: optax.trace(s.momentum, nesterov=True)),
    # torch.optim.Adam: wd * p is added to the gradient, so rescaled with it.
    "adam": ("l2", _ADAM, lambda s, _: optax.scale_by_adam(s.beta1, s.beta2, s.epsilon)),
    # torch.optim.AdamW: p -= rate * wd * p besides (Loshchilov & Hutter 2019).
    "adamw": ("decoupled", _ADAM, lambda s, _: optax.scale_by_adam(s.beta1, s.beta2, s.epsilon)),
    # Chen et al. 2023, arXiv:2302.06675; its authors take a beta2 of 0.99, a rate of 1/10 to 1/3 of
    # AdamW's and a decay as many times larger.
    "lion": ("decoupled", _ADAM[:2], lambda s, _: optax.scale_by_lion(s.beta1, s.beta2)),
    # torch.optim.RMSprop: beta2 is its alpha.
    "rmsprop": (
        "l2",
        ("beta2", "epsilon", "momentum"),
        lambda s, _: optax.chain(
            optax.scale_by_rms(s.beta2, s.epsilon, eps_in_sqrt=False), optax.trace(s.momentum)
        ),
    ),
    # Shazeer & Stern 2018, arXiv:1804.04235, without momentum: the rate is relative to the root
    # mean square of each parameter.
    "adafactor": (
        "decoupled",
        (),
        lambda s, _: optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ),
    ),
    # You et al. 2020, arXiv:1904.00962: the decay is part of what the trust ratio scales.
    "lamb": (
        "own",
        _ADAM,
        lambda s, schedule: optax.lamb(
            schedule, s.beta1, s.beta2, s.epsilon, weight_decay=s.weight_decay, mask=s.decay_mask
        ),
    ),
}
for _name, (_place, _settings, _rule) in _DIRECTIONS.items():
    register_optimizer(
        _name,
        decay=_place,
        settings=(*_settings, *_DECAY),
        auto_rate=_name.startswith("sgd"),
    )(_rule)


@register_optimizer("muon", settings=("momentum", *_ADAM, "muon_adam_lr_ratio", *_DECAY))
def muon(settings: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns Muon for the kernels of hidden layers and AdamW for the rest."""
    network = settings.network
    if network is None:
        raise ConfigError("config.optimizer.name = 'muon': needs to know the network")
    decay = settings.decay()
    rules = {
        "muon": optax.chain(
            muon_rule.direction(settings.momentum), decay, optax.scale_by_learning_rate(schedule)
        ),
        "adam": optax.chain(
            optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon),
            decay,
            optax.scale_by_learning_rate(
                lambda count: settings.muon_adam_lr_ratio * schedule(count)
            ),
        ),
    }
    return optax.partition(rules, lambda params: muon_rule.split(network, params))
