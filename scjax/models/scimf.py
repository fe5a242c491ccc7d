"""scIMF: a population of cells as an interacting mean-field neural SDE.

    dx_i = [ f(x_i) + g(x_i, {x_j : j != i}) ] dt + sigma dW_i

f is an MLP of the cell alone, g is attention from a cell (receiver) to all other cells (senders). Neither knows the
time. All cells are simulated together from the first time on; a Sinkhorn divergence compares them with the cells that
were observed at each later time, and a kinetic energy keeps the paths short.

Reference: Jiang et al., "Learning collective multi-cellular dynamics from temporal scRNA-seq via a
transformer-enhanced Neural SDE", arXiv 2505.16492.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from scjax.batches import TimeSeriesBatch
from scjax.check import at_least, non_negative, one_of, positive, probability
from scjax.losses import annealed_sinkhorn_divergence, self_transport, solve_sinkhorn
from scjax.nn.attention import (
    attend,
    attention_logits,
    attention_weights,
    merge_heads,
    split_heads,
    unnormalised_weights,
)
from scjax.nn.blockwise import CELLS, attend_blockwise, devices_along_cells
from scjax.nn.landmarks import attend_to_landmarks, group
from scjax.nn.linear import Linear
from scjax.processes import sde
from scjax.processes.sde import Trajectory
from scjax.types import Metrics, Model, Params, Scalar

__all__ = [
    "BlockAttention",
    "Config",
    "Heads",
    "attention",
    "build",
    "diffusion",
    "drift",
    "heads",
    "init",
    "interaction_scores",
    "loss",
    "receiver_scores",
    "simulate",
    "target_self_transport",
]


DENSE_CELLS, DENSE_CELLS_OF_ACCELERATORS = 1024, 8192
"""Up to so many cells attention="auto" holds all weights at once, on a CPU and elsewhere. On a CPU tiles are as fast
from there on, and three times as fast with gradients; accelerators, not measured, like few large operations."""

AttentionKind = Literal["auto", "dense", "blockwise", "landmarks"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, physics and loss weights; the defaults are the reference's.

    "State unit" is the unit of the latent space that the cells live in, "time unit" that of the observation times.
    """

    n_dims: int  # of the cell state; 50 principal components in the paper
    intrinsic_widths: tuple[int, ...] = (256, 256)  # hidden layers of the cell-autonomous drift
    n_blocks: int = 1  # interaction blocks; 0 removes the interaction
    n_heads: int = 2  # of the attention; must divide n_dims
    residual: bool = False
    """False is the reference: each block's output replaces its input, so from the second block on a cell's own state
    enters only through what the block before left of it. True adds each sub-layer to its input, as transformers do,
    and the interaction is the sum of what was added."""
    dropout: float = 0.1  # of attention weights, in training only; drawn anew at every solver step
    attention: AttentionKind = "auto"
    """How attention is computed. "dense" holds the weights of all pairs of cells; "blockwise" gives the same numbers
    from tiles of them, in memory that grows with the cells, gradient included; "auto" is dense up to `DENSE_CELLS` and
    blockwise beyond, or wherever cells are spread over devices (dropout then draws others of the same law). "landmarks"
    is an approximation, linear in cells also in time: see `nn.landmarks`. Its error is measured by
    benchmarks/large_population.py; on Klein, 64 landmarks: 1.4 % of the interaction at 1000 cells, and paths of 100,000
    cells that end 0.7 % of their displacement off. It trains without dropout only, which is of single senders."""
    n_landmarks: int = 64  # of "landmarks"; with as many as cells it is exact
    diffusion: Literal["constant", "learned", "mlp"] = "constant"
    """"learned" is a trained vector, one entry a dimension; "mlp" a network of the cell's own state, within (-1, 1)."""
    sigma: float = 0.1
    """State units per sqrt(time unit): the constant, or the scale of the normal draw that a learned vector starts from
    (1 in the reference). Not used by "mlp"."""
    diffusion_widths: tuple[int, ...] = (256, 256)  # hidden layers of the "mlp" diffusion
    dt: float = 0.1  # longest solver step, time units
    sinkhorn: Literal["annealed", "converged"] = "annealed"
    """"annealed" is the reference: one update per temperature, biased low where cluster masses differ (see
    `losses.annealed_sinkhorn_divergence`). "converged" iterates on ott-jax until the marginals are met."""
    blur: float = 0.1  # root of the transport's temperature, state units
    scaling: float = 0.7  # of "annealed": ratio of successive blurs
    debiased: bool = True
    """True is the reference: the divergence, whose minimum is the observed population. False (with "annealed" only)
    compares by the entropic cost alone, without what the simulated cells cost among themselves: its minimum is a
    narrower population, the observed one less noise of a standard deviation of about blur (Rigollet and Weed, C. R.
    Math. 356, 2018)."""
    sinkhorn_threshold: float = 1e-3  # of "converged": the largest total error of a marginal
    sinkhorn_iterations: int = 20_000  # of "converged": at most
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and activations. Parameters, normalisations, softmax, transport and the state of the SDE stay
    float32."""
    sinkhorn_weight: float = 1.0  # of the mean divergence over the observed times, in squared state units
    energy_weight: float = 1.0  # of the kinetic energy per time unit, squared state units per squared time unit

    def __post_init__(self):
        at_least("n_dims", self.n_dims, 1)
        at_least("n_blocks", self.n_blocks, 0)
        at_least("n_heads", self.n_heads, 1)
        at_least("n_landmarks", self.n_landmarks, 1)
        at_least("sinkhorn_iterations", self.sinkhorn_iterations, 1)
        for name in ("intrinsic_widths", "diffusion_widths"):
            for width in getattr(self, name):
                at_least(f"each of {name}", width, 1)
        if self.n_dims % self.n_heads:
            divisors = ", ".join(str(h) for h in range(1, self.n_dims + 1) if self.n_dims % h == 0)
            raise ValueError(
                f"n_heads must divide n_dims; got n_heads={self.n_heads}, n_dims={self.n_dims}. "
                f"Take one of {divisors}, or another number of dimensions."
            )
        one_of("diffusion", self.diffusion, ("constant", "learned", "mlp"))
        one_of("attention", self.attention, get_args(AttentionKind))
        one_of("sinkhorn", self.sinkhorn, ("annealed", "converged"))
        one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        if self.sinkhorn == "converged" and not self.debiased:
            raise ValueError(
                "debiased=False is of sinkhorn='annealed'; with sinkhorn='converged' leave it at True, got False."
            )
        probability("dropout", self.dropout)
        non_negative("sigma", self.sigma)
        positive("dt", self.dt)
        positive("blur", self.blur)
        positive("sinkhorn_threshold", self.sinkhorn_threshold)
        positive("scaling", self.scaling)
        probability("scaling", self.scaling)
        non_negative("sinkhorn_weight", self.sinkhorn_weight)
        non_negative("energy_weight", self.energy_weight)

    @property
    def dtype(self) -> Any:
        """For flax's layers: None computes in the dtype of the parameters."""
        return jnp.bfloat16 if self.compute_dtype == "bfloat16" else None


def is_in_tiles(config: Config, n_cells: int) -> bool:
    """Whether one device, which `drift` gets without a mesh, holds no n x n weights of so many cells."""
    if config.attention != "auto":
        return config.attention != "dense"
    return n_cells > (DENSE_CELLS if jax.default_backend() == "cpu" else DENSE_CELLS_OF_ACCELERATORS)


class BlockAttention(NamedTuple):
    """What one interaction block attends to; axis -2 is the receiver, axis -1 the sender.

    Attributes:
        logits: before the softmax; -inf on the diagonal.
        weights: after it; each row sums to 1, the diagonal is 0.
        value_norms: length of each sender's value vector, per head.
    """

    logits: Float[Array, "heads cells cells"]
    weights: Float[Array, "heads cells cells"]
    value_norms: Float[Array, "heads cells"]


class Heads(NamedTuple):
    """What cells ask for, answer to and tell in one interaction block; linear in cells, unlike `BlockAttention`."""

    q: Float[Array, "heads cells head_dims"]
    k: Float[Array, "heads cells head_dims"]
    v: Float[Array, "heads cells head_dims"]


class MLP(nn.Module):
    widths: tuple[int, ...]
    n_out: int
    activation: str  # "leaky_relu" or "lipswish"
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "cells inputs"]) -> Float[Array, "cells outputs"]:
        act = {"leaky_relu": nn.leaky_relu, "lipswish": lambda u: 0.909 * nn.silu(u)}[self.activation]
        for i, width in enumerate(self.widths):
            x = act(Linear(width, dtype=self.dtype, name=f"hidden_{i}")(x))
        return Linear(self.n_out, dtype=self.dtype, name="output")(x)


class Interaction(nn.Module):
    """One block: attention to the other cells, then a feed-forward layer."""

    config: Config
    mesh: Mesh | None = None

    def setup(self):
        d, dtype = self.config.n_dims, self.config.dtype
        norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False, dtype=dtype)
        self.norm_query_key, self.norm_value, self.norm_feedforward = norm(), norm(), norm()
        self.query, self.key, self.value = (Linear(d, use_bias=False, dtype=dtype) for _ in range(3))
        self.feedforward = MLP((4 * d,), d, "leaky_relu", dtype)

    def qkv(self, z: Float[Array, "cells dims"]) -> tuple[Float[Array, "heads cells head_dims"], ...]:
        a, b = self.norm_query_key(z), self.norm_value(z)
        return tuple(split_heads(p, self.config.n_heads) for p in (self.query(a), self.key(a), self.value(b)))

    def __call__(self, z: Float[Array, "cells dims"], key: PRNGKeyArray | None = None) -> Float[Array, "cells dims"]:
        received = merge_heads(self.receive(z, key))
        if not self.config.residual:
            return self.feedforward(self.norm_feedforward(received))
        z = z + received.astype(z.dtype)
        return z + self.feedforward(self.norm_feedforward(z)).astype(z.dtype)

    def receive(self, z: Float[Array, "cells dims"], key: PRNGKeyArray | None) -> Float[Array, "heads cells head_dims"]:
        c, (q, k, v), n = self.config, self.qkv(z), z.shape[0]
        if c.attention == "landmarks":
            n_landmarks = min(c.n_landmarks, n)
            return attend_to_landmarks(q, k, v, group(merge_heads(k), n_landmarks), n_landmarks, mesh=self.mesh)
        if c.attention == "dense" or (self.mesh is None and not is_in_tiles(c, n)):
            return attend(q, k, v, exclude_self=True, dropout_rate=c.dropout, key=key)
        return attend_blockwise(q, k, v, excluded=jnp.arange(n), dropout_rate=c.dropout, key=key, mesh=self.mesh)[0]

    def attention(self, z: Float[Array, "cells dims"]) -> BlockAttention:
        q, k, v = self.qkv(z)
        logits = attention_logits(q, k, exclude_self=True)
        return BlockAttention(logits, attention_weights(logits), jnp.linalg.norm(v, axis=-1))


class Drift(nn.Module):
    config: Config
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        self.intrinsic = MLP(c.intrinsic_widths, c.n_dims, "leaky_relu", c.dtype)
        self.interaction = [Interaction(c, self.mesh) for _ in range(c.n_blocks)]

    def __call__(self, x: Float[Array, "cells dims"], key: PRNGKeyArray | None = None) -> Float[Array, "cells dims"]:
        alone = self.intrinsic(x).astype(x.dtype)
        if not self.config.n_blocks:
            return alone
        z = x
        for i, block in enumerate(self.interaction):
            z = block(z, None if key is None else jax.random.fold_in(key, i))
        pulled = z - x if self.config.residual else z.astype(x.dtype)
        # A single cell has nobody to attend to; the feed-forward layer's bias is not an interaction.
        return alone + (pulled if x.shape[0] > 1 else jnp.zeros_like(x))

    def attention(self, x: Float[Array, "cells dims"]) -> list[BlockAttention]:
        read = []
        for block in self.interaction:
            read.append(block.attention(x))
            x = block(x)
        return read

    def heads(self, x: Float[Array, "cells dims"], n: int) -> Heads:
        for block in self.interaction[:n]:
            x = block(x)
        return Heads(*self.interaction[n].qkv(x))


class Diffusion(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "cells dims"]) -> Float[Array, "cells dims"]:
        c = self.config
        if c.diffusion == "mlp":
            return jnp.tanh(MLP(c.diffusion_widths, c.n_dims, "lipswish", c.dtype, name="mlp")(x).astype(x.dtype))
        sigma = self.param("sigma", nn.initializers.normal(c.sigma), (c.n_dims,))
        return jnp.broadcast_to(sigma[None], x.shape)


def init(key: PRNGKeyArray, config: Config) -> Params:
    """Parameters as PyTorch would draw them: {"drift": ..., "diffusion": ...}, the latter only where it is learned."""
    key_drift, key_diffusion = jax.random.split(key)
    x = jnp.zeros((2, config.n_dims), jnp.float32)
    params = {"drift": Drift(config).init(key_drift, x)["params"]}
    if config.diffusion != "constant":
        params["diffusion"] = Diffusion(config).init(key_diffusion, x)["params"]
    return params


def drift(
    params: Params,
    x: Float[Array, "cells dims"],
    *,
    key: PRNGKeyArray | None = None,
    config: Config,
    mesh: Mesh | None = None,
) -> Float[Array, "cells dims"]:
    """Velocity of each cell given all others, state units per time unit: f(x_i) + g(x_i, {x_j : j != i}).

    Deterministic without a key; with one, attention weights are dropped out at the rate of the config. Applied to the
    observed cells of one time it is their velocity field.

    Args:
        mesh: of devices, with an axis "cells" (`jax.make_mesh` with `AxisType.Auto`): each then computes the velocity
            of its share of the cells. Values are those of one device but for rounding; dropout draws the same.

    Raises:
        ValueError: x is not of the width that the config names; a number of cells that is no multiple of the devices
            along "cells"; attention="dense" on a mesh; a key where attention="landmarks" and dropout is not 0.
    """
    _check_width("x", x, config)
    if config.n_blocks and config.attention == "dense" and mesh is not None:
        raise ValueError("attention='dense' holds all pairs of cells on one device; with a mesh take 'auto'.")
    if config.n_blocks and config.attention == "landmarks" and key is not None and config.dropout:
        raise ValueError(
            f"dropout must be 0 where a model is trained with attention='landmarks'; got {config.dropout}. "
            "It leaves out single senders, and landmarks stand for many."
        )
    if mesh is not None:
        devices_along_cells(mesh, x.shape[0])
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(CELLS)))
    return _applied(Drift(config, mesh), params["drift"], x, key)


def diffusion(params: Params, x: Float[Array, "cells dims"], *, config: Config) -> Float[Array, "cells dims"]:
    """Noise strength g of each cell and coordinate, state units per sqrt(time unit).

    A learned one may be negative: the noise then has the same law.
    """
    _check_width("x", x, config)
    if config.diffusion == "constant":
        return jnp.full_like(x, config.sigma)
    return _applied(Diffusion(config), params["diffusion"], x)


def attention(params: Params, x: Float[Array, "cells dims"], *, config: Config) -> list[BlockAttention]:
    """What each block attends to in this population, without dropout; one entry a block, none without interaction."""
    _check_width("x", x, config)
    return _applied(Drift(config), params["drift"], x, method="attention")


def interaction_scores(
    params: Params,
    x: Float[Array, "cells dims"],
    *,
    config: Config,
    softmax: bool = True,
    scale_by_value: bool = True,
    block: int = 0,
) -> Float[Array, "heads cells cells"]:
    """How strongly each receiver (row) is driven by each sender (column); the diagonal is 0.

    Args:
        softmax: True gives the attention weights; False exp(logit - largest logit of the row), which does not make
            senders compete for a receiver. The rows then do not sum to 1.
        scale_by_value: multiply by the length of the sender's value vector, since a weight on a short vector moves
            little.
        block: number of the interaction block; only block 0 sees the cells' own states.

    Returns:
        Scores of all pairs. Where these are too many, `heads` and `receiver_scores` give some rows at a time.

    Raises:
        ValueError: the model has no such block.
    """
    one_of("block", block, range(config.n_blocks))
    read = attention(params, x, config=config)[block]
    scores = read.weights if softmax else unnormalised_weights(read.logits)
    return scores * read.value_norms[:, None, :] if scale_by_value else scores


def heads(params: Params, x: Float[Array, "cells dims"], *, config: Config, block: int = 0) -> Heads:
    """Queries, keys and values of all cells in an interaction block: once for many calls of `receiver_scores`.

    Raises:
        ValueError: the model has no such block.
    """
    _check_width("x", x, config)
    one_of("block", block, range(config.n_blocks))
    return _applied(Drift(config), params["drift"], x, block, method="heads")


def receiver_scores(
    of: Heads, receivers: Int[Array, " receivers"], *, softmax: bool = True, scale_by_value: bool = True
) -> Float[Array, "heads receivers cells"]:
    """The rows of `interaction_scores` of some receivers, given by their numbers; no other row is computed.

    The scores are those of exact attention, with attention="landmarks" too: what the landmarks stand for.
    """
    logits = attention_logits(of.q[:, receivers], of.k)
    logits = logits.at[:, jnp.arange(len(receivers)), receivers].set(-jnp.inf)
    scores = attention_weights(logits) if softmax else unnormalised_weights(logits)
    return scores * jnp.linalg.norm(of.v, axis=-1)[:, None, :] if scale_by_value else scores


def simulate(
    params: Params,
    x0: Float[Array, "cells dims"],
    ts: Sequence[float] | np.ndarray,
    key: PRNGKeyArray | None,
    *,
    config: Config,
    dW: Float[Array, "steps cells dims"] | None = None,
    mesh: Mesh | None = None,
) -> Trajectory:
    """The population x0, observed at ts[0], at each of ts: Trajectory(x, kinetic_energy).

    One continuous path on a fixed grid (`processes.sde.time_grid(ts, config.dt)`). The cells interact, so a part of a
    population develops differently from the whole.

    Args:
        x0: cells at ts[0], state units.
        ts: increasing times, concrete numbers (they decide the number of compiled steps).
        key: of the noise; None where dW is given or sigma is 0.
        dW: recorded increments of variance dt, instead of the key's.
        mesh: spreads the cells over devices, see `drift`.

    Raises:
        ValueError: a width other than config.n_dims, unsorted times, dW of another shape, neither key nor dW; what
            `drift` raises about a mesh.
        TypeError: traced times.
    """
    return _simulate(params, x0, ts, key, None, config=config, dW=dW, mesh=mesh)


def _simulate(params, x0, ts, key, key_dropout, *, config, dW=None, mesh=None) -> Trajectory:
    _check_width("x0", x0, config)

    def drift_at(x, step):
        key_step = None if key_dropout is None else jax.random.fold_in(key_dropout, step)
        return drift(params, x, key=key_step, config=config, mesh=mesh)

    noiseless = config.diffusion == "constant" and config.sigma == 0
    return sde.simulate(
        drift_at,
        None if noiseless else partial(diffusion, params, config=config),
        x0,
        ts,
        key,
        dt=config.dt,
        dW=None if noiseless else dW,
    )


def loss(
    params: Params, batch: TimeSeriesBatch, key: PRNGKeyArray, *, config: Config, mesh: Mesh | None = None
) -> tuple[Scalar, Metrics]:
    """sinkhorn_weight * mean_t S(observed_t, simulated_t) + energy_weight * E int |drift|^2 dt / (last - first time).

    S is the Sinkhorn divergence, about W2^2 / 2 in squared state units (with debiased=False, S and half the entropic
    cost of moving the simulated cells onto themselves). Times are compared one after the other
    (`lax.map`): no more than one cells x cells cost matrix is held, and none where it would be large (`losses`).

    Args:
        mesh: spreads the simulated cells over devices, see `drift`; in transport each has the costs of its own cells.

    Returns:
        The scalar, and its unweighted terms "sinkhorn" and "kinetic_energy"; with the converged divergence also
        "sinkhorn_converged", the share of times whose transport met its threshold.

    Raises:
        ValueError: cells of another width than config.n_dims, or fewer than two times.
    """
    at_least("the number of times in batch.ts", len(batch.ts), 2)
    key_noise, key_dropout = jax.random.split(key)
    key_dropout = key_dropout if config.dropout > 0 else None
    path = _simulate(params, batch.x0, batch.ts, key_noise, key_dropout, config=config, mesh=mesh)
    populations = (batch.targets, batch.weights, path.x[1:], batch.self_transport)
    if config.sinkhorn == "annealed":
        sinkhorn, terms = jnp.mean(jax.lax.map(partial(_annealed, config), populations)), {}
    else:
        solution = jax.lax.map(partial(_converged, config), populations)
        sinkhorn = jnp.mean(solution.divergence)
        terms = {"sinkhorn_converged": jnp.mean(solution.converged.astype(sinkhorn.dtype))}
    energy = jnp.mean(path.kinetic_energy[-1]) / (batch.ts[-1] - batch.ts[0])
    terms = {"sinkhorn": sinkhorn, "kinetic_energy": energy, **terms}
    return config.sinkhorn_weight * sinkhorn + config.energy_weight * energy, terms


def _annealed(config, population):
    target, weights, x, own = population
    blurring = {"blur": config.blur, "scaling": config.scaling}
    divergence = annealed_sinkhorn_divergence(target, x, a=weights, self_transport_x=own, **blurring)
    return divergence if config.debiased else divergence + self_transport(x, **blurring)


def _converged(config, population):
    target, weights, x, _ = population
    return solve_sinkhorn(
        target,
        x,
        blur=config.blur,
        a=weights,
        threshold=config.sinkhorn_threshold,
        max_iterations=config.sinkhorn_iterations,
    )


def target_self_transport(batch: TimeSeriesBatch, *, config: Config) -> Float[Array, " times"]:
    """`batch.self_transport` for populations that are the same at every step; compute it once and keep it.

    The gradient of the loss stays exactly the same, its value moves in the fourth digit (the temperatures then start
    at the targets' own diameter), and the largest transport problem of a step is gone.
    """
    return jax.lax.map(
        lambda p: self_transport(p[0], blur=config.blur, scaling=config.scaling, a=p[1]),
        (batch.targets, batch.weights),
    )


def build(config: Config) -> Model:
    """The config bound to the functions above; `predict` is `simulate`."""
    return Model(
        config=config,
        init=partial(init, config=config),
        loss=partial(loss, config=config),
        predict=partial(simulate, config=config),
    )


def _applied(module: nn.Module, params: Params, *args: Any, method: str | None = None) -> Any:
    return module.apply({"params": params}, *args, method=method)


def _check_width(name: str, x: Array, config: Config) -> None:
    if x.ndim != 2 or x.shape[1] != config.n_dims:
        raise ValueError(
            f"{name} must have the shape (cells, n_dims) with n_dims={config.n_dims} of the config; got {x.shape}. "
            "Cells must be given in the latent space that the model was made for."
        )
