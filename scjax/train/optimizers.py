"""From a frozen config to an optax transformation; the defaults are scIMF's."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from scjax.check import at_least, non_negative, one_of, positive, probability

__all__ = ["OptimizerConfig", "clip_by_norm", "learning_rate", "make_optimizer"]

_OF_SCHEDULE = {
    "decay_every": "step",
    "decay_factor": "step",
    "final_fraction": "cosine",
    "cosine_updates": "cosine",
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, clipping, warm-up and accumulation. Every default is scIMF's.

    An update is one change of the parameters: a step of training where `accumulate` is 1, and `accumulate` steps
    otherwise. Warm-up and schedule count updates. The schedules, from the peak at the end of the warm-up on:
    "constant"; "step", times `decay_factor` after every `decay_every` updates; "cosine", half a cosine down to
    `final_fraction` of the peak at the last update, or after `cosine_updates`. A field of a schedule that is not chosen
    must be left alone.
    """

    learning_rate: float = 1e-3  # at the peak
    schedule: Literal["constant", "step", "cosine"] = "step"  # of the learning rate, after the warm-up
    decay_every: int = 100  # of "step", updates
    decay_factor: float = 0.9  # of "step"
    final_fraction: float = 0.0  # of "cosine", of the peak
    cosine_updates: int | None = None
    """Of "cosine": updates from the peak to the bottom; after them the rate climbs again, as PyTorch's
    CosineAnnealingLR does. None: the bottom is at the last update."""
    n_warmup: int = 0  # updates on which the rate climbs in a line from 0; the schedule begins after them
    b1: float = 0.9  # Adam: decay of the mean of gradients
    b2: float = 0.999  # Adam: decay of the mean of their squares
    eps: float = 1e-8  # Adam: added to the root of that
    weight_decay: float = 0.0  # AdamW's, times the learning rate; spares leaves of fewer than two axes
    clip_norm: float | None = 0.1  # largest global norm of a gradient; None leaves it alone
    accumulate: int = 1  # gradients of this many batches are averaged for one update

    def __post_init__(self):
        positive("learning_rate", self.learning_rate)
        one_of("schedule", self.schedule, ("constant", "step", "cosine"))
        at_least("decay_every", self.decay_every, 1)
        positive("decay_factor", self.decay_factor)
        non_negative("final_fraction", self.final_fraction)
        if self.cosine_updates is not None:
            at_least("cosine_updates", self.cosine_updates, 1)
        for f in fields(self):
            owner = _OF_SCHEDULE.get(f.name, self.schedule)
            if owner != self.schedule and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name} is of schedule={owner!r} and does nothing with {self.schedule!r}; "
                    f"leave it at {f.default}, got {getattr(self, f.name)}."
                )
        at_least("n_warmup", self.n_warmup, 0)
        probability("b1", self.b1)
        probability("b2", self.b2)
        positive("eps", self.eps)
        non_negative("weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)
        at_least("accumulate", self.accumulate, 1)


def make_optimizer(config: OptimizerConfig, n_steps: int) -> optax.GradientTransformation:
    """clip, then Adam, then weight decay, then the learning rate, as the config says, for a run of `n_steps` batches.

    Raises:
        ValueError: `accumulate` does not divide `n_steps` (the last gradients would be lost), or the warm-up is longer
            than the run.
    """
    at_least("n_steps", n_steps, 1)
    if n_steps % config.accumulate:
        raise ValueError(
            f"accumulate must divide n_steps, or the last gradients are never used; "
            f"got accumulate={config.accumulate}, n_steps={n_steps}."
        )
    parts = [] if config.clip_norm is None else [clip_by_norm(config.clip_norm)]
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_is_matrix))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, n_steps // config.accumulate)))
    tx = optax.chain(*parts)
    return tx if config.accumulate == 1 else optax.MultiSteps(tx, config.accumulate).gradient_transformation()


def learning_rate(config: OptimizerConfig, n_updates: int) -> optax.Schedule:
    """The rate of update 0, 1, ..., n_updates - 1.

    Raises:
        ValueError: the warm-up leaves no update to the schedule.
    """
    if config.n_warmup >= n_updates:
        raise ValueError(f"n_warmup must be less than the number of updates, {n_updates}; got {config.n_warmup}.")
    after = _after_warmup(config, n_updates - config.n_warmup)
    if not config.n_warmup:
        return after
    # The first update is not wasted on a rate of zero: update i has (i + 1) / (n_warmup + 1) of the peak.
    peak, n = config.learning_rate, config.n_warmup
    return optax.join_schedules([optax.linear_schedule(peak / (n + 1), peak, n), after], [n])


def _after_warmup(config: OptimizerConfig, n_updates: int) -> optax.Schedule:
    peak = config.learning_rate
    if config.schedule == "step":
        return optax.exponential_decay(peak, config.decay_every, config.decay_factor, staircase=True)
    if config.schedule == "cosine" and config.cosine_updates is not None:
        low, half = peak * config.final_fraction, config.cosine_updates
        return lambda update: low + (peak - low) * (1 + jnp.cos(jnp.pi * update / half)) / 2
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, max(n_updates - 1, 1), alpha=config.final_fraction)
    return optax.constant_schedule(peak)


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Gradients times min(1, max_norm / (norm + 1e-6)), norm over all leaves.

    This is `torch.nn.utils.clip_grad_norm_`. optax's own divides by the norm alone, and Adam does not forgive the
    difference: where the first moments are tiny it shows at 1e-5.
    """

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _is_matrix(params: optax.Params) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)
