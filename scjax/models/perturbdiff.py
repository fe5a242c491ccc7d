r"""PerturbDiff: populations of perturbed cells by diffusion over sets of cells.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise,   loss = E |x_0 - f(x_t, t | controls, covariates)|^2 / genes + E(x_0, f)

x_0 is a set of cells of one population, a_t the share of signal left at time t, E the energy distance between two sets:
an MMD, so the norm of a difference of mean embeddings. The network f sees all cells of a set at once (they attend to
each other and have no order), a set of control cells, the time, what is known about the population (perturbation, cell
type, batch, dose) and, half of the time, its own first guess of x_0. Sampling runs the chain backwards from noise.

What a set has in common is computed once for it: the covariates and the adaptive modulations of all layers, which
depend on time and covariates alone; the control stream's last half layer, which nothing reads, is not computed at all.

Inside, expression is in the model's unit: log-normalised, divided by `Config.divisor`.

Reference: "PerturbDiff: functional diffusion for single-cell perturbation modeling", arXiv 2602.19685.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from scjax.batches import CellSetBatch
from scjax.check import at_least, non_negative, one_of, positive, suggestion
from scjax.kernels import median_bandwidths, squared_distances
from scjax.losses import energy_distance, mmd2
from scjax.nn.adaln import modulate
from scjax.nn.attention import attend, attend_to_all, merge_heads, split_heads
from scjax.nn.layers import init_alike
from scjax.nn.linear import Linear
from scjax.nn.time import sinusoids
from scjax.processes.diffusion import (
    Schedule,
    ScheduleName,
    Spacing,
    Variance,
    ddim_step,
    ddpm_step,
    diffuse,
    guide,
    make_schedule,
    set_noise,
    spaced,
)
from scjax.types import Metrics, Model, Params, Scalar

__all__ = [
    "Coins",
    "Config",
    "Constants",
    "Path",
    "Transferred",
    "build",
    "covariate_embedding",
    "denoise",
    "init",
    "loss",
    "loss_at",
    "roles",
    "sample",
    "transfer",
    "vector_table",
]

Covariates: TypeAlias = Mapping[str, Any]  # int[sets] or int[sets, cells] by role

_N_WAVES = 256  # features of the time embedding before its MLP


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, covariates, noise and loss; the defaults are the published run's unless a comment says other.

    Expression is log1p of normalised counts. Diffusion times are whole numbers from 0, the least noise.
    """

    n_genes: int | None = None  # None, here and below: as many as the data have, filled in before `init`
    n_perturbations: int | None = None  # rows of the table, the control's row 0 among them ("table")
    n_cell_types: int | None = None  # rows of the table ("table")
    n_batches: int | None = None  # rows of the table ("table")
    n_perturbation_features: int | None = None  # of the external vectors ("vector")
    n_cell_type_features: int | None = None  # of the external vectors ("vector")
    n_doses: int | None = None  # rows of the table of doses; None: the dose is no covariate
    n_spaces: int = 1  # gene spaces (data sets that measured other genes) with input projections of their own
    d_model: int = 512
    n_layers: int = 8
    n_heads: int = 8
    mlp_ratio: float = 4.0  # hidden units of a feed-forward layer per feature of the model
    perturbation: Literal["table", "vector", "none"] = "table"
    """What a perturbation is: a learned entry of its own; an external vector (ESM2, GenePT, ChemBERTa) in
    `Constants`, for perturbations that training never saw; or nothing, one learned entry for all, whose place in the
    covariates a finetuned model fills (marginal pretraining)."""
    cell_type: Literal["table", "vector", "none"] = "table"
    """Likewise; "none" has no place in the covariates. Published runs take vectors of a language model."""
    batch: Literal["table", "none"] = "table"
    d_covariate: int = 128  # features of each covariate
    covariate_width: Literal["genes", "model"] | int = "genes"
    """Features of all covariates together, before they are projected to d_model. "genes", the reference's, widens them
    to the number of genes and back, which costs parameters and ties them to a list of genes; "model" is d_model. A
    number keeps the width of a model pretrained on another list of genes."""
    attention: Literal["features", "tokens"] = "features"
    """How the cells of a set and the controls meet: "features", the reference's, makes one token of a cell and the
    control in its row; "tokens" lets each attend to all of both, as in the paper's figure."""
    block: Literal["parallel", "sequential"] = "parallel"
    """What the feed-forward half of a layer reads: the layer's input, as in the reference's code, or what attention
    made of it, as in the paper's equations."""
    class_silu: bool = False  # a further SiLU on time and covariates before the modulations
    schedule: ScheduleName = "linear"
    n_times: int = 1000
    condition_dropout: float = 0.5  # chance that training hides all covariates of a set, for guidance
    control_dropout: float = 0.0  # chance that training hides the controls of a set; 1 in the published pretraining
    self_conditioning: float = 0.5
    """Chance that training shows the network its own first guess, made without gradient. With coins per set, as many
    of the sets of a batch as this makes, so that the cost of the first guess is theirs alone."""
    drop_per: Literal["set", "batch"] = "set"
    """Whose the three coins are. The reference throws one each for a whole batch."""
    mask_filler: bool = True
    """Leave cells that only fill up a set out of attention and loss. In the reference they count as cells."""
    denoising_weight: float = 1.0  # of the squared error, a mean over genes
    energy_weight: float = 1.0  # of the distance between sets, which is the larger term by far
    distance: Literal["energy", "gaussian"] = "energy"
    """Between true and predicted set: the energy distance, or half a squared MMD of Gaussian kernels with the median
    distances of the true set as bandwidths."""
    shared_noise: float = 0.0
    """Correlation of the noise of two cells of a set. 0 is the reference; above it, training also moves whole sets."""
    divisor: float = 10.0  # log-normalised expression per unit of the model
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and the activations between them. Parameters, the two streams, normalisations, softmax and
    losses stay float32."""
    remat: Literal["none", "layers"] = "none"
    """What the backward pass computes again to save memory: "layers" keeps the input of each layer alone."""

    def __post_init__(self):
        sizes = ("n_genes", "n_perturbations", "n_cell_types", "n_batches", "n_doses")
        for name in (*sizes, "n_perturbation_features", "n_cell_type_features"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        for name in ("n_spaces", "d_model", "n_layers", "n_heads", "d_covariate"):
            at_least(name, getattr(self, name), 1)
        width = 2 * self.d_model if self.attention == "features" else self.d_model
        if width % self.n_heads:
            what = "2 d_model" if self.attention == "features" else "d_model"
            raise ValueError(f"n_heads must divide {what}; got n_heads={self.n_heads}, d_model={self.d_model}.")
        positive("mlp_ratio", self.mlp_ratio)
        at_least("mlp_ratio * d_model", self.n_hidden, 1)
        one_of("perturbation", self.perturbation, ("table", "vector", "none"))
        one_of("cell_type", self.cell_type, ("table", "vector", "none"))
        one_of("batch", self.batch, ("table", "none"))
        if isinstance(self.covariate_width, int):
            at_least("covariate_width", self.covariate_width, 1)
        else:
            one_of("covariate_width", self.covariate_width, ("genes", "model"))
        one_of("attention", self.attention, ("features", "tokens"))
        one_of("block", self.block, ("parallel", "sequential"))
        one_of("schedule", self.schedule, get_args(ScheduleName))
        _schedule(self.schedule, self.n_times)
        for name in ("condition_dropout", "control_dropout", "self_conditioning", "shared_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)!r}.")
        one_of("drop_per", self.drop_per, ("set", "batch"))
        non_negative("denoising_weight", self.denoising_weight)
        non_negative("energy_weight", self.energy_weight)
        one_of("distance", self.distance, ("energy", "gaussian"))
        if self.denoising_weight == self.energy_weight == 0:
            raise ValueError("denoising_weight or energy_weight must be above 0; got 0 for both, which is no loss.")
        positive("divisor", self.divisor)
        one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        one_of("remat", self.remat, ("none", "layers"))

    @property
    def n_hidden(self) -> int:
        """Hidden units of a feed-forward layer."""
        return int(self.d_model * self.mlp_ratio)

    @property
    def width_of_covariates(self) -> int | None:
        """`covariate_width` as a number."""
        if isinstance(self.covariate_width, int):
            return self.covariate_width
        return self.n_genes if self.covariate_width == "genes" else self.d_model

    @property
    def dtype(self) -> Any:
        """For flax's layers: None computes in the dtype of the parameters."""
        return jnp.bfloat16 if self.compute_dtype == "bfloat16" else None


class Constants(NamedTuple):
    """External vectors, which are not trained; `vector_table` makes them.

    Attributes:
        perturbation_vectors: float[perturbations, features], row 0 the control's (perturbation="vector" alone).
        cell_type_vectors: float[cell types, features] (cell_type="vector" alone).
    """

    perturbation_vectors: Float[Array, "perturbations features"] | None = None
    cell_type_vectors: Float[Array, "cell_types features"] | None = None


class Coins(NamedTuple):
    """What training does to each set of a batch.

    Attributes:
        hide_condition: the covariates are replaced by the learned null vector.
        hide_control: the control cells are replaced by zeros.
        self_condition: the network is shown its own first guess.
    """

    hide_condition: Bool[Array, " sets"]
    hide_control: Bool[Array, " sets"]
    self_condition: Bool[Array, " sets"]


class Path(NamedTuple):
    """What a sampling run went through, in order of its steps.

    Attributes:
        x: float[steps, sets, cells, genes], the state after each step.
        x0: float[steps, sets, cells, genes], the prediction of the end that each step went towards.
    """

    x: Float[Array, "steps sets cells genes"]
    x0: Float[Array, "steps sets cells genes"]


@cache
def _schedule(name: ScheduleName, n_times: int) -> Schedule:
    return make_schedule(name, n_times)


# ---------------------------------------------------------------- layers, written for one set

_xavier = nn.initializers.xavier_uniform()


def _xavier_of(n_in: int, n_out: int) -> Callable:
    """Xavier's bounds for a matrix of these sizes: for a part of it that stands alone."""
    bound = (6 / (n_in + n_out)) ** 0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _dense(config: Config, features: int, kernel_init: Callable = _xavier) -> nn.Dense:
    return nn.Dense(features, kernel_init=kernel_init, dtype=config.dtype)


def _norm(config: Config) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False, dtype=config.dtype)


def _rms_norm(config: Config) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-6, dtype=config.dtype)


class MLP(nn.Module):
    config: Config
    widths: tuple[int, ...]
    activation: Callable
    kernel_init: Callable = _xavier

    @nn.compact
    def __call__(self, x: Float[Array, "*n inputs"]) -> Float[Array, "*n outputs"]:
        for i, width in enumerate(self.widths):
            x = _dense(self.config, width, self.kernel_init)(x if i == 0 else self.activation(x))
        return x


class TimeEmbedding(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, t: Int[Array, " sets"]) -> Float[Array, "sets d"]:
        small = nn.initializers.normal(0.02)
        waves = sinusoids(t.astype(jnp.float32), _N_WAVES)
        return MLP(self.config, (self.config.d_model,) * 2, nn.silu, small, name="mlp")(waves)


class Entries(nn.Module):
    """A learned vector for each id; an id beyond the table gives NaN."""

    n: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[Array, " n"]) -> Float[Array, "n features"]:
        embedding = self.param("embedding", nn.initializers.normal(1.0), (self.n, self.features))
        return jnp.take(embedding, ids, axis=0)


class CovariateEncoder(nn.Module):
    """All covariates of one cell, or of one set whose cells share them, as one vector."""

    config: Config

    @nn.compact
    def __call__(self, ids: dict[str, Int[Array, " n"]], constants: Constants) -> Float[Array, "n width"]:
        c = self.config
        found = []
        for role in roles(c, places=True):
            kind = "table" if role == "dose" else getattr(c, role)
            if kind == "vector":
                table = getattr(constants, f"{role}_vectors")
                found.append(Linear(c.d_covariate, name=role)(jnp.take(table, ids[role], axis=0)))
            elif kind == "table":
                found.append(Entries(getattr(c, _TABLES[role]), c.d_covariate, name=role)(ids[role]))
            else:
                entry = Entries(1, c.d_covariate, name=role)(jnp.zeros(1, jnp.int32))
                n = len(next(iter(ids.values()))) if ids else 1
                found.append(jnp.broadcast_to(entry, (n, c.d_covariate)))
        return Linear(c.width_of_covariates, name="joined")(jnp.concatenate(found, axis=-1))  # pyright: ignore[reportArgumentType]


_TABLES = {"perturbation": "n_perturbations", "cell_type": "n_cell_types", "batch": "n_batches", "dose": "n_doses"}
_VECTORS = {"perturbation": "n_perturbation_features", "cell_type": "n_cell_type_features"}


class Condition(nn.Module):
    """Covariates in the width of the model, or the learned vector that says nothing about them."""

    config: Config

    def setup(self):
        self.project = _dense(self.config, self.config.d_model)
        self.null = self.param("null", nn.initializers.normal(1.0), (self.config.d_model,))

    def __call__(self, embedding: Float[Array, "*n width"]) -> Float[Array, "*n d"]:
        return self.project(nn.silu(embedding))

    def nothing(self) -> Float[Array, " d"]:
        return self.null


class Inputs(nn.Module):
    """Cells, previous guesses and controls as tokens: a linear layer of each, for each gene space.

    The layer of [x_t, previous guess] in two halves, for the first is needed where the second is zero. The control's
    has no second half: in the reference it is there, and multiplied with zeros.
    """

    config: Config

    def setup(self):
        s, g, d = self.config.n_spaces, self.config.n_genes, self.config.d_model
        whole = _xavier_of(2 * g, d)  # pyright: ignore[reportOperatorIssue]
        self.state, self.previous, self.control = (
            self.param(name, whole, (s, g, d)) for name in ("state", "previous", "control")
        )
        self.bias, self.control_bias = (
            self.param(name, nn.initializers.zeros, (s, d)) for name in ("bias", "control_bias")
        )
        self.gene = self.param("gene", nn.initializers.normal(1.0), (d,))

    def of_state(self, x: Float[Array, "cells genes"], space: Int[Array, ""] | None) -> Float[Array, "cells d"]:
        return self._project(x, self.state, space) + (_pick(self.bias, space) + self.gene)[None]

    def of_previous(self, x: Float[Array, "cells genes"], space: Int[Array, ""] | None) -> Float[Array, "cells d"]:
        return self._project(x, self.previous, space)

    def of_control(self, x: Float[Array, "cells genes"], space: Int[Array, ""] | None) -> Float[Array, "cells d"]:
        return self._project(x, self.control, space) + (_pick(self.control_bias, space) + self.gene)[None]

    def _project(self, x: Array, kernel: Array, space: Array | None) -> Array:
        x, kernel = promote_dtype(x, _pick(kernel, space), dtype=self.config.dtype)
        return (x @ kernel).astype(jnp.float32 if self.config.dtype is not None else x.dtype)


def _pick(table: Array, space: Array | None) -> Array:
    return table[0 if space is None else space]


class FeatureAttention(nn.Module):
    """Attention among rows: a cell and the control beside it are one token, of twice as many features.

    The last layer has no use for what its controls receive.
    """

    config: Config
    last: bool

    def setup(self):
        c = self.config
        self.joined = _dense(c, 6 * c.d_model)
        self.query_norm, self.key_norm = _rms_norm(c), _rms_norm(c)
        square = _xavier_of(2 * c.d_model, 2 * c.d_model)
        self.output = _dense(c, c.d_model if self.last else 2 * c.d_model, square)

    def __call__(
        self, x: Float[Array, "cells d"], control: Float[Array, "cells d"], mask: Bool[Array, " cells"] | None
    ) -> tuple[Float[Array, "cells d"], Float[Array, "cells d"] | None]:
        q, k, v = _heads(self.joined(jnp.concatenate([x, control], axis=-1)), 3, self.config)
        received = self.output(merge_heads(_attend(self.query_norm(q), self.key_norm(k), v, mask)))
        return (received, None) if self.last else tuple(jnp.split(received, 2, axis=-1))  # pyright: ignore[reportReturnType]


class TokenAttention(nn.Module):
    """Attention among twice as many tokens: every cell and every control attends to all cells and all controls."""

    config: Config
    last: bool

    def setup(self):
        c = self.config
        self.joined, self.query_norm, self.key_norm = _dense(c, 3 * c.d_model), _rms_norm(c), _rms_norm(c)
        self.output = _dense(c, c.d_model)
        n_parts = 2 if self.last else 3  # nobody asks what the controls of the last layer receive
        self.control_joined = _dense(c, n_parts * c.d_model, _xavier_of(c.d_model, 3 * c.d_model))
        self.control_key_norm = _rms_norm(c)
        if not self.last:
            self.control_query_norm, self.control_output = _rms_norm(c), _dense(c, c.d_model)

    def __call__(
        self, x: Float[Array, "cells d"], control: Float[Array, "cells d"], mask: Bool[Array, " cells"] | None
    ) -> tuple[Float[Array, "cells d"], Float[Array, "cells d"] | None]:
        q, k, v = _heads(self.joined(x), 3, self.config)
        *q_control, k_control, v_control = _heads(self.control_joined(control), 2 if self.last else 3, self.config)
        q, k, k_control = self.query_norm(q), self.key_norm(k), self.control_key_norm(k_control)
        if not self.last:
            q = jnp.concatenate([q, self.control_query_norm(q_control[0])], axis=1)
        k, v = jnp.concatenate([k, k_control], axis=1), jnp.concatenate([v, v_control], axis=1)
        received = merge_heads(_attend(q, k, v, None if mask is None else jnp.tile(mask, 2)))
        if self.last:
            return self.output(received), None
        own, of_control = jnp.split(received, 2)
        return self.output(own), self.control_output(of_control)


def _heads(x: Float[Array, "n features"], n_parts: int, config: Config) -> list[Array]:
    return [split_heads(part, config.n_heads) for part in jnp.split(x, n_parts, axis=-1)]


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return attend_to_all(q, k, v) if mask is None else attend(q, k, v, senders=mask)


class Layer(nn.Module):
    """Attention and a feed-forward layer, both modulated and gated by time and covariates (adaLN-Zero, MM-DiT).

    Two streams with modulations and feed-forward layers of their own. At the start all gates are shut, and the layer
    is the identity.

    Reference: Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis", ICML 2024.
    """

    config: Config
    last: bool

    def setup(self):
        c, zeros = self.config, nn.initializers.zeros
        self.modulation = _dense(c, 6 * c.d_model, zeros)
        self.control_modulation = _dense(c, (2 if self.last else 6) * c.d_model, zeros)
        self.norm = _norm(c)
        self.attention = (FeatureAttention if c.attention == "features" else TokenAttention)(c, self.last)
        self.feedforward = MLP(c, (c.n_hidden, c.d_model), nn.gelu)
        if not self.last:
            self.control_feedforward = MLP(c, (c.n_hidden, c.d_model), nn.gelu)

    def of_condition(self, c: Float[Array, "*n d"]) -> tuple[Array, Array]:
        """Shifts, scales and gates of the two streams."""
        c = nn.silu(c)
        return self.modulation(c), self.control_modulation(c)

    def __call__(
        self,
        x: Float[Array, "cells d"],
        control: Float[Array, "cells d"],
        of_condition: tuple[Float[Array, "rows d6"], Float[Array, "rows d6_or_d2"]],
        mask: Bool[Array, " cells"] | None,
    ) -> tuple[Float[Array, "cells d"], Float[Array, "cells d"] | None]:
        parts = jnp.split(of_condition[0], 6, axis=-1)
        control_parts = jnp.split(of_condition[1], 2 if self.last else 6, axis=-1)
        normed, normed_control = self.norm(x), self.norm(control)
        received, control_received = self.attention(
            modulate(normed, *parts[:2]), modulate(normed_control, *control_parts[:2]), mask
        )
        x = self._add(x, normed, received, parts, self.feedforward)
        if self.last:
            return x, None
        return x, self._add(control, normed_control, control_received, control_parts, self.control_feedforward)  # pyright: ignore[reportArgumentType]

    def _add(self, x: Array, normed: Array, received: Array, parts: list[Array], feedforward: Callable) -> Array:
        _, _, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * received
        if self.config.block == "sequential":
            normed = self.norm(x)
        return x + gate2 * feedforward(modulate(normed, shift2, scale2))


class Head(nn.Module):
    """Tokens as expression, which is not negative."""

    config: Config

    def setup(self):
        c = self.config
        self.modulation = _dense(c, 2 * c.d_model, nn.initializers.zeros)
        self.norm, self.output = _norm(c), _dense(c, c.n_genes)  # pyright: ignore[reportArgumentType]

    def of_condition(self, c: Float[Array, "*n d"]) -> Float[Array, "*n d2"]:
        return self.modulation(nn.silu(c))

    def __call__(
        self, x: Float[Array, "cells d"], of_condition: Float[Array, "rows d2"]
    ) -> Float[Array, "cells genes"]:
        shift, scale = jnp.split(of_condition, 2, axis=-1)
        return nn.relu(self.output(modulate(self.norm(x), shift, scale)))


# ---------------------------------------------------------------- the network on a batch of sets


def roles(config: Config, *, places: bool = False) -> tuple[str, ...]:
    """The covariates that a model needs, in the order of the reference.

    Args:
        places: those that have a place in the covariates' vector instead; perturbation="none" keeps its own.
    """
    used = [("perturbation", config.perturbation != "none" or places), ("dose", config.n_doses is not None)]
    used += [("cell_type", config.cell_type != "none"), ("batch", config.batch != "none")]
    return tuple(role for role, is_used in used if is_used)


def init(key: PRNGKeyArray, config: Config) -> Params:
    """Parameters as the reference draws them.

    Xavier-uniform matrices with zero biases, modulations that are zero (so that each layer is the identity),
    embeddings and null vectors N(0, 1); in the covariate encoder, linear layers as PyTorch's.

    Raises:
        ValueError: a size that the data decide is still None.
    """
    needed = ["n_genes"]
    for role in _TABLES:
        kind = getattr(config, role, "none")
        needed += {"table": [_TABLES[role]], "vector": [_VECTORS.get(role)], "none": []}[kind]
    for name in needed:
        if getattr(config, name) is None:
            raise ValueError(f"{name} is None; the data decide it: give the config the number before init.")
    d, g = config.d_model, config.n_genes
    tokens, cells, ids = jnp.zeros((2, d)), jnp.zeros((2, g)), jnp.zeros(1, jnp.int32)
    constants = Constants(
        *(None if n is None else jnp.zeros((1, n)) for n in map(config.__getattribute__, _VECTORS.values()))
    )
    keys = iter(jax.random.split(key, config.n_layers + 5))

    def of(name: str, *args: Any, method: Callable | None = None) -> Params:
        return _init(name, config, next(keys), *args, method=method)

    def whole_layer(layer: Layer) -> Array:
        return layer(tokens, tokens, layer.of_condition(tokens), None)[0]

    params = {
        "time": of("time", ids),
        "covariates": of("covariates", dict.fromkeys(roles(config), ids), constants),
        "condition": of("condition", jnp.zeros((1, config.width_of_covariates))),
        "inputs": of("inputs", cells, None, method=Inputs.of_state),
    }
    last = f"layer_{config.n_layers - 1}"  # unlike the others
    layers = init_alike(partial(_init, "layer_0", config, method=whole_layer), list(islice(keys, config.n_layers - 1)))
    params |= {f"layer_{i}": layer for i, layer in enumerate(layers)}
    params[last] = of(last, method=whole_layer)
    params["head"] = of("head", method=lambda m: m(tokens, m.of_condition(tokens)))
    return params


def covariate_embedding(
    params: Params, covariates: Covariates, *, constants: Constants, config: Config
) -> Float[Array, "sets rows width"]:
    """What is known about each set as a vector: one row a set, or one a cell where a covariate is given per cell.

    An id beyond its table gives NaN.
    """
    ids = {role: jnp.asarray(covariates[role]) for role in roles(config)}
    if not ids:
        return _apply(params, "covariates", config, ids, constants)[None]
    shape = jnp.broadcast_shapes(*(i.shape if i.ndim == 2 else (*i.shape, 1) for i in ids.values()))
    flat = {role: jnp.broadcast_to(i if i.ndim == 2 else i[:, None], shape).ravel() for role, i in ids.items()}
    return _apply(params, "covariates", config, flat, constants).reshape(*shape, -1)


def denoise(
    params: Params,
    x_t: Float[Array, "sets cells genes"],
    t: Int[Array, " sets"],
    control: Float[Array, "sets cells genes"],
    covariates: Covariates | Float[Array, "sets rows width"] | None,
    x0_prev: Float[Array, "sets cells genes"] | None = None,
    *,
    mask: Bool[Array, "sets cells"] | None = None,
    space: Int[Array, " sets"] | None = None,
    measured: Bool[Array, "sets genes"] | None = None,
    constants: Constants,
    config: Config,
) -> Float[Array, "sets cells genes"]:
    """The predicted x_0 of each cell, not negative. All expression is in the model's unit (divided by the divisor).

    A set is a set: cells with their controls in another order give the same predictions in that order.

    Args:
        x_t: cells with the noise of the times `t`, which count from 0.
        covariates: ids by role as `CellSetBatch` has them, or vectors as `covariate_embedding` makes them (a mean over
            known perturbations for an unknown one); None is what training with hidden covariates has learned.
        x0_prev: an earlier prediction of x_0; None is a first guess.
        mask: False for filler, which nobody attends to (if config.mask_filler); None: all are cells.
        space: gene space of each set, where the config has several.
        measured: genes that the set's data measured; the others are read as zero, and predicted.

    Raises:
        ValueError: shapes that do not fit each other or the config, or a covariate that is missing.
    """
    _check(x_t, t, control, covariates, x0_prev, mask, space, measured, constants, config)
    view = _View(_of_control(params, control, space, measured, config), mask, space, measured)
    e = _condition(params, covariates, len(x_t), constants, config)
    modulations = _modulations(params, _apply(params, "time", config, t), e, config)
    tokens = _of_state(params, x_t, view, config)
    if x0_prev is not None:
        tokens = tokens + _of_previous(params, x0_prev, view, config)
    return _predict(params, tokens, modulations, view, config)


def loss(
    params: Params, batch: CellSetBatch, key: PRNGKeyArray, *, constants: Constants, config: Config
) -> tuple[Scalar, Metrics]:
    """Its two terms, means over the sets of a batch, weighted and added: see the module's formula.

    Returns:
        denoising_weight denoising + energy_weight energy_distance, in the model's unit; the terms, each unweighted.
        With distance="gaussian" the second is called gaussian_distance; a term of weight zero is left out.

    Raises:
        ValueError: shapes of the batch that do not fit each other or the config, or a covariate that is missing.
    """
    key_t, key_noise, key_coins = jax.random.split(key, 3)
    n_sets = len(batch.cells)
    t = jax.random.randint(key_t, (n_sets,), 0, config.n_times)
    noise = set_noise(key_noise, batch.cells.shape, config.shared_noise)
    coins, first = _toss(key_coins, n_sets, config)
    return _loss(params, batch, t, noise, coins, first, constants, config)


def loss_at(
    params: Params,
    batch: CellSetBatch,
    t: Int[Array, " sets"],
    noise: Float[Array, "sets cells genes"],
    coins: Coins,
    *,
    constants: Constants,
    config: Config,
) -> tuple[Scalar, Metrics]:
    """`loss` for given times, noise and coins."""
    return _loss(params, batch, t, noise, coins, _FirstPass(jnp.arange(len(batch.cells)), False), constants, config)


def sample(
    params: Params,
    control: Float[Array, "sets cells genes"],
    covariates: Covariates | Float[Array, "sets rows width"] | None,
    key: PRNGKeyArray,
    *,
    constants: Constants,
    config: Config,
    n_steps: int = 100,
    sampler: Literal["ddim", "ddpm"] = "ddim",
    spacing: Spacing = "respaced",
    guidance: float = 2.0,
    eta: float = 0.0,
    variance: Variance = "large",
    noise_weight: float = 0.5,
    cutoff: float = 1e-4,
    mask: Bool[Array, "sets cells"] | None = None,
    space: Int[Array, " sets"] | None = None,
    measured: Bool[Array, "sets genes"] | None = None,
    start: Float[Array, "sets cells genes"] | None = None,
    noise: Float[Array, "steps sets cells genes"] | None = None,
    trajectory: bool = False,
) -> Float[Array, "sets cells genes"] | Path:
    """Sets of cells of the populations that these covariates and controls describe, in log-normalised expression.

    Each step predicts x_0, with its previous prediction in view (if config.self_conditioning is above 0), and goes on
    to the x_t of less noise that belongs to it. Both branches of guidance are one call of the network.

    Args:
        control: as many control cells as cells are wanted, in log-normalised expression.
        covariates: as for `denoise`; None samples without them, whatever the guidance.
        n_steps: of the chain; at most config.n_times.
        sampler: "ddim" with `eta`, or "ddpm" with `variance` and `noise_weight`; see `processes.diffusion`.
        spacing: "respaced" spreads the steps over all times; "truncated" takes the first n_steps times from pure
            noise, as the published sampler does, which is far from what the network was trained on.
        guidance: 1 is the conditional prediction; above, it is moved on, away from the unconditional one. The
            reference's guidance strength is this less 1.
        cutoff: predictions of x_0 below, in the model's unit, are set to 0 in every step.
        mask, space, measured: as for `denoise`.
        start, noise: standard normal draws to use instead of the key's: for the start, and for each step in order.
        trajectory: return the whole `Path` instead of its last state.

    Raises:
        ValueError: shapes that do not fit each other or the config, or an option out of its range.
    """
    one_of("sampler", sampler, ("ddim", "ddpm"))
    non_negative("guidance", guidance)
    non_negative("cutoff", cutoff)
    x = jnp.zeros_like(control) if start is None else start
    if x.shape != control.shape or (noise is not None and noise.shape != (n_steps, *x.shape)):
        raise ValueError(
            f"start must have the shape of control, {control.shape}, and noise an axis of n_steps={n_steps} before it; "
            f"got {x.shape} and {None if noise is None else noise.shape}."
        )
    n_sets = len(control)
    _check(x, jnp.zeros(n_sets, jnp.int32), control, covariates, None, mask, space, measured, constants, config)
    chain = spaced(_schedule(config.schedule, config.n_times), n_steps, spacing)
    draws = sampler == "ddpm" or eta > 0

    view = _View(_of_control(params, control / config.divisor, space, measured, config), mask, space, measured)
    e = _condition(params, covariates, n_sets, constants, config)
    guided = covariates is not None and guidance != 1
    both = view
    if guided:
        nothing = jnp.broadcast_to(_nothing(params, config), e.shape)
        e, both = jnp.concatenate([e, nothing]), jax.tree.map(lambda a: jnp.concatenate([a, a]), view)

    def step(state: tuple[Array, Array], at: tuple[Array, Array, Array | None]) -> tuple[tuple[Array, Array], Any]:
        x, x0 = state
        index, key, z = at
        if draws and z is None:
            z = set_noise(key, x.shape, config.shared_noise, x.dtype)
        time = _apply(params, "time", config, jnp.asarray(chain.times)[index][None])
        modulations = _modulations(params, time, e, config)
        tokens = _of_state(params, x, view, config)
        if config.self_conditioning > 0:  # without it, nothing has learned to read a guess
            tokens = tokens + _of_previous(params, x0, view, config)
        if guided:
            conditional, without = jnp.split(
                _predict(params, jnp.concatenate([tokens, tokens]), modulations, both, config), 2
            )
            x0 = guide(conditional, without, guidance)
        else:
            x0 = _predict(params, tokens, modulations, view, config)
        x0 = jnp.where(x0 < cutoff, 0, x0)
        if sampler == "ddim":
            x = ddim_step(chain.schedule, x0, x, index, z if draws else None, eta=eta)
        else:
            x = ddpm_step(chain.schedule, x0, x, index, z, variance=variance, noise_weight=noise_weight)  # pyright: ignore[reportArgumentType]
        return (x, x0), (x, x0) if trajectory else None

    key_start, key_steps = jax.random.split(key)
    if start is None:
        x = set_noise(key_start, control.shape, config.shared_noise, control.dtype)
    backwards = jnp.arange(n_steps - 1, -1, -1)
    (x, _), path = jax.lax.scan(step, (x, jnp.zeros_like(x)), (backwards, jax.random.split(key_steps, n_steps), noise))
    return Path(*(config.divisor * a for a in path)) if trajectory else config.divisor * x


class Transferred(NamedTuple):
    """What became of one array when a model was carried over.

    Attributes:
        name: dotted path in the parameters.
        shape: in the new model; of an array that was left behind, in the old one.
        action: "kept", "fresh: why" or "left behind: why".
    """

    name: str
    shape: tuple[int, ...]
    action: str


def transfer(
    key: PRNGKeyArray,
    params: Params,
    pretrained: Config,
    config: Config,
    *,
    new_genes: bool = False,
    space: int | None = None,
    fresh: Collection[str] = (),
) -> tuple[Params, list[Transferred]]:
    """Parameters with which finetuning starts, and what became of every array on the way.

    As published. Kept: layers, time, the projection of the covariates and the null vector, the layer that joins
    covariates, the cell types' and batches' part of them, and the input projections. Drawn afresh: the head, the
    perturbations (and doses), the cell types if they are of another kind, and, with `new_genes`, the input projections.

    Args:
        pretrained: the config of `params`.
        config: that of the model to be finetuned. On another list of genes it needs `new_genes`, and for covariates
            that were joined in the width of the old list, that number as `covariate_width`.
        space: which of the old model's input projections to keep, where the new one has one of them.
        fresh: further parts to draw afresh: "cell_type", "batch", "joined" (the layer that joins covariates),
            "condition", "time", "inputs", "layers".

    Raises:
        ValueError: an array that should be kept but has no counterpart of its shape; all of them are listed.
    """
    options = ("cell_type", "batch", "joined", "condition", "time", "inputs", "layers")
    for part in fresh:
        one_of("fresh", part, options)
    asked = {part: "asked for" for part in fresh}
    why = {
        "head": "as for every finetuning",
        "perturbation": "another dictionary",
        "dose": "another dictionary",
    } | asked
    if new_genes:
        why["inputs"] = "new genes"
    if pretrained.cell_type != config.cell_type:
        why["cell_type"] = "cell types of another kind"
    picks = "inputs" not in why and pretrained.n_spaces != config.n_spaces
    if picks and (space is None or config.n_spaces != 1 or not 0 <= space < pretrained.n_spaces):
        raise ValueError(
            f"space must say which of the {pretrained.n_spaces} input projections the model with n_spaces="
            f"{config.n_spaces} keeps, a number below {pretrained.n_spaces} for a model of one; got {space!r}."
        )
    old = _leaves(params)
    new, table, misfits = {}, [], []
    for name, value in _leaves(init(key, config)).items():
        part = _part_of(name)
        if part in why and not (part == "inputs" and name == "inputs.gene" and "inputs" not in asked):
            new[name] = value
            table.append(Transferred(name, value.shape, f"fresh: {why[part]}"))
            old.pop(name, None)
            continue
        kept = old.pop(name, None)
        if kept is not None and picks and part == "inputs" and name != "inputs.gene":
            kept = kept[space : space + 1]  # pyright: ignore[reportOptionalOperand]
        if kept is None or kept.shape != value.shape:
            got = "is not there" if kept is None else f"has the shape {kept.shape}"
            misfits.append(
                f"{name} {got}; the new model wants {value.shape}: keep its sizes, or name {part!r} in fresh"
            )
            continue
        new[name] = kept
        from_space = f" (of space {space})" if picks and part == "inputs" and name != "inputs.gene" else ""
        table.append(Transferred(name, kept.shape, "kept" + from_space))
    if misfits:
        raise ValueError("the pretrained parameters do not fit the new model:\n  " + "\n  ".join(misfits))
    table += [Transferred(name, v.shape, "left behind: no place in the new model") for name, v in old.items()]
    return _nested(new), table


def _leaves(params: Params) -> dict[str, Array]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(part.key for part in path): leaf for path, leaf in paths}


def _nested(leaves: Mapping[str, Array]) -> Params:
    tree: Params = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _part_of(name: str) -> str:
    """The word by which `transfer` knows an array."""
    first, second, *_ = name.split(".")
    if first == "covariates":
        return second
    return "layers" if first.startswith("layer_") else first


def vector_table(
    names: Sequence[str],
    known: Sequence[str],
    vectors: Float[np.ndarray, "known features"],
    *,
    control: str | None = None,
    control_vector: Literal["mean", "scalar_mean", "own"] = "mean",
    on_missing: Literal["error", "zeros"] = "error",
) -> Float[np.ndarray, "names features"]:
    """A frozen table for `Constants`: the external vector of each name, in the order of the names.

    Args:
        names: one a row; a name may stand in several rows (a drug at several doses).
        known: the names of `vectors`, each once.
        control: the name whose row is the control's, which no outside model has embedded.
        control_vector: what stands there. "mean" is the mean of the other names' vectors; "scalar_mean" the
            reference's, the one mean of all entries of the table, counted with zeros for absent names and the control,
            in every place (which is likely an oversight); "own" looks it up as any other name.
        on_missing: "zeros" gives a name without a vector zeros, as the reference does; they say "no perturbation" to
            a network that has never seen it, so the default is to refuse.

    Raises:
        ValueError: names without a vector (all are listed), names known twice, or a control that is not among `names`.
    """
    one_of("control_vector", control_vector, ("mean", "scalar_mean", "own"))
    one_of("on_missing", on_missing, ("error", "zeros"))
    row_of = {name: i for i, name in enumerate(known)}
    if len(row_of) != len(known) or len(known) != len(vectors):
        raise ValueError(
            f"known must name each of the {len(vectors)} rows of vectors once; got {len(known)} names, "
            f"{len(row_of)} of them different."
        )
    if control is not None and control not in names:
        raise ValueError(f"control must be one of the names; got {control!r}.{suggestion(control, names)}")
    own = control is None or control_vector == "own"
    missing = [name for name in dict.fromkeys(names) if name not in row_of and (own or name != control)]
    if missing and on_missing == "error":
        raise ValueError(
            f"{len(missing)} names have no vector: {', '.join(map(repr, missing[:10]))}"
            f"{', ...' if len(missing) > 10 else ''}.{suggestion(missing[0], known)} "
            "Add them, leave their cells out, or choose on_missing='zeros'."
        )
    table = np.zeros((len(names), vectors.shape[1]), np.float32)
    found = np.array([name in row_of and (own or name != control) for name in names])
    table[found] = vectors[[row_of[name] for name, is_found in zip(names, found, strict=True) if is_found]]
    if not own:
        at = np.array([name == control for name in names])
        value = table[found].mean(axis=0) if control_vector == "mean" else np.float32(table.mean())
        table[at] = value
    return table


def build(config: Config, constants: Constants) -> Model:
    """The config and the constants bound to the functions above; `predict` is `sample`."""
    return Model(
        config=config,
        init=partial(init, config=config),
        loss=partial(loss, constants=constants, config=config),
        predict=partial(sample, constants=constants, config=config),
    )


_MODULES: dict[str, Callable] = {
    "time": TimeEmbedding,
    "covariates": CovariateEncoder,
    "condition": Condition,
    "inputs": Inputs,
    "head": Head,
}


def _module(name: str, config: Config) -> nn.Module:
    if name.startswith("layer_"):
        return Layer(config, name == f"layer_{config.n_layers - 1}")
    return _MODULES[name](config)


def _init(name: str, config: Config, key: PRNGKeyArray, *args: Any, method: Callable | None = None) -> Params:
    made: Any = _module(name, config).init(key, *args, method=method)
    return made["params"]


def _apply(params: Params, name: str, config: Config, *args: Any, method: str | None = None) -> Any:
    return _module(name, config).apply({"params": params[name]}, *args, method=method)


def _each_set(params: Params, name: str, config: Config, *args: Any, method: str | None = None) -> Any:
    return jax.vmap(partial(_apply, params, name, config, method=method))(*args)


class _View(NamedTuple):
    """What the network sees of each set besides the cells, whatever the time."""

    control: Float[Array, "sets cells d"]  # as tokens
    mask: Bool[Array, "sets cells"] | None
    space: Int[Array, " sets"] | None
    measured: Bool[Array, "sets genes"] | None


def _seen(x, measured):
    return x if measured is None else jnp.where(measured[:, None], x, 0)


def _of_control(params, control, space, measured, config):
    return _each_set(params, "inputs", config, _seen(control, measured), space, method="of_control")


def _of_state(params, x, view, config):
    return _each_set(params, "inputs", config, _seen(x, view.measured), view.space, method="of_state")


def _of_previous(params, x, view, config):
    return _each_set(params, "inputs", config, _seen(x, view.measured), view.space, method="of_previous")


def _nothing(params, config):
    return _apply(params, "condition", config, method="nothing")[None, None]


def _condition(params, covariates, n_sets, constants, config, hidden=None) -> Array:
    """What covariates say in the width of the model: float[sets, 1, d], or float[sets, cells, d] of each cell."""
    if covariates is None:
        return jnp.tile(_nothing(params, config), (n_sets, 1, 1))
    embedding = covariates
    if isinstance(covariates, Mapping):
        embedding = covariate_embedding(params, covariates, constants=constants, config=config)
    e = _apply(params, "condition", config, embedding)
    e = jnp.broadcast_to(e, (n_sets, *e.shape[1:]))
    return e if hidden is None else jnp.where(hidden[:, None, None], _nothing(params, config), e)


def _modulations(params, time, e, config) -> tuple[tuple[tuple[Array, Array], ...], Array]:
    """Of all layers, and of the head: one row a set, or one a cell. `time` has a row for each set, or one for all."""
    c = time[:, None] + e
    c = nn.silu(c) if config.class_silu else c
    layers = tuple(_apply(params, f"layer_{i}", config, c, method="of_condition") for i in range(config.n_layers))
    return layers, _apply(params, "head", config, c, method="of_condition")


def _predict(params, tokens, modulations, view, config) -> Array:
    of_layers, of_head = modulations
    x, control, mask = tokens, view.control, view.mask if config.mask_filler else None
    for i, of_condition in enumerate(of_layers):
        layer = partial(_each_set, params, f"layer_{i}", config)
        x, control = (jax.checkpoint(layer) if config.remat == "layers" else layer)(x, control, of_condition, mask)
    return _each_set(params, "head", config, x, of_head).astype(tokens.dtype)


class _FirstPass(NamedTuple):
    sets: Int[Array, " chosen"]  # all that may have to be guessed first
    is_certain: bool  # whether any of them will have to be, whatever the coins


def _toss(key, n_sets, config) -> tuple[Coins, _FirstPass]:
    """The coins, and the first pass that they ask for."""
    n_coins = n_sets if config.drop_per == "set" else 1
    key_condition, key_control, key_order, key_last = jax.random.split(key, 4)
    condition, control = (
        jnp.broadcast_to(jax.random.bernoulli(k, p, (n_coins,)), n_sets)
        for k, p in ((key_condition, config.condition_dropout), (key_control, config.control_dropout))
    )
    # Not independent: of n sets p n are chosen, and one more with the chance that is left over. Each has the chance p,
    # and the first pass is over the chosen sets alone; with independent coins nearly every batch needed it for all.
    whole, rest = divmod(config.self_conditioning * n_coins, 1)
    chosen = jax.random.permutation(key_order, n_coins)[: int(whole) + (rest > 0)]
    shown = jnp.zeros(n_coins, bool).at[chosen].set(True)
    if rest > 0:
        shown = shown.at[chosen[-1]].set(jax.random.bernoulli(key_last, rest))
    if config.drop_per == "batch":
        chosen = jnp.arange(n_sets if len(chosen) else 0)
    return Coins(condition, control, jnp.broadcast_to(shown, n_sets)), _FirstPass(chosen, whole > 0)


def _loss(params, batch, t, noise, coins, first, constants, config) -> tuple[Scalar, Metrics]:
    x0, control = batch.cells / config.divisor, batch.control / config.divisor
    mask, space, measured = batch.mask if config.mask_filler else None, batch.space, batch.measured
    _check(x0, t, control, batch.covariates, noise, mask, space, measured, constants, config)
    x0 = _seen(x0, measured)
    x_t = diffuse(_schedule(config.schedule, config.n_times), x0, t, noise)
    control = jnp.where(coins.hide_control[:, None, None], 0, control)
    view = _View(_of_control(params, control, space, measured, config), mask, space, measured)
    e = _condition(params, batch.covariates, len(x0), constants, config, coins.hide_condition)
    modulations = _modulations(params, _apply(params, "time", config, t), e, config)
    tokens = _of_state(params, x_t, view, config)
    if len(first.sets):
        fixed = jax.lax.stop_gradient((params, tokens, modulations, view))
        shown = _first_guess(*fixed, coins.self_condition, first, config)
        tokens = tokens + _of_previous(params, shown, view, config)
    return _compare(x0, _seen(_predict(params, tokens, modulations, view, config), measured), mask, measured, config)


def _first_guess(params, tokens, modulations, view, shown, first, config) -> Array:
    """What the network predicts of these sets when it is shown nothing; zeros for sets that are not to see it."""
    n_sets, n_cells = tokens.shape[:2]
    zeros = jnp.zeros((n_sets, n_cells, config.n_genes), tokens.dtype)

    def guess() -> Array:
        if len(first.sets) == n_sets:
            found = _predict(params, tokens, modulations, view, config)
        else:
            part = jax.tree.map(lambda a: a[first.sets], (tokens, modulations, view))
            found = zeros.at[first.sets].set(_predict(params, *part, config))  # pyright: ignore[reportCallIssue]
        return jnp.where(shown[:, None, None], found, 0)

    # A branch costs more than its pass where it is always taken: compilers see less of it.
    return guess() if first.is_certain else jax.lax.cond(shown.any(), guess, lambda: zeros)


def _compare(x0, predicted, mask, measured, config) -> tuple[Scalar, Metrics]:
    """The terms of the loss, and their sum; genes that were not measured are zero in both."""
    n_cells, n_genes = x0.shape[1:]
    mass = jnp.full(x0.shape[:2], 1 / n_cells, x0.dtype)
    if mask is not None:
        mass = mask / mask.sum(axis=1, keepdims=True, dtype=x0.dtype)
    n_measured = n_genes if measured is None else measured.sum(axis=1, dtype=x0.dtype)
    terms = {}
    if config.denoising_weight > 0:
        of_cells = jnp.sum((predicted - x0) ** 2, axis=-1)
        terms["denoising"] = jnp.mean(jnp.sum(mass * of_cells, axis=1) / n_measured)
    if config.energy_weight > 0:
        terms[f"{config.distance}_distance"] = jnp.mean(_distances(x0, predicted, mask, mass, config))
    weights = (config.denoising_weight, config.energy_weight)
    weighted = [w * term for w, term in zip([w for w in weights if w > 0], terms.values(), strict=True)]
    return sum(weighted, jnp.zeros((), x0.dtype)), terms


def _distances(x0, predicted, mask, mass, config) -> Float[Array, " sets"]:
    mass = None if mask is None else mass
    if config.distance == "energy":
        return jax.vmap(energy_distance)(x0, predicted, mass, mass)

    def of_set(x: Array, y: Array, mask: Array | None, mass: Array | None) -> Array:
        bandwidths = median_bandwidths(x) if mask is None else _median_bandwidths(x, mask)
        return mmd2(x, y, bandwidths, unbiased=False, weights_x=mass, weights_y=mass) / 2

    return jax.vmap(of_set)(x0, predicted, mask, mass)


def _median_bandwidths(x: Float[Array, "n dims"], mask: Bool[Array, " n"]) -> Float[Array, " k"]:
    """`median_bandwidths` of the cells under the mask, whose number is not known in advance."""
    i, j = jnp.triu_indices(len(x), k=1)
    counts = mask[i] & mask[j]
    squared = jnp.sort(jnp.where(counts, squared_distances(x, x)[i, j], jnp.inf))
    median = jnp.maximum(squared[(counts.sum() - 1) // 2], 1e-12)
    # Two cells at that distance have it as their median: the scales are those of the function itself.
    pair = jnp.zeros((2, 1), x.dtype).at[1, 0].set(jnp.sqrt(median))
    return median_bandwidths(pair)


def _check(x, t, control, covariates, x0_prev, mask, space, measured, constants, config) -> None:
    n_sets, n_cells, n_genes = x.shape
    wanted = {"t": (t, (n_sets,)), "control": (control, x.shape), "x0_prev or noise": (x0_prev, x.shape)}
    wanted |= {
        "mask": (mask, (n_sets, n_cells)),
        "measured": (measured, (n_sets, n_genes)),
        "space": (space, (n_sets,)),
    }
    for name, (value, shape) in wanted.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name} must have the shape {shape}, for cells of the shape {x.shape}; got {value.shape}."
            )
    if n_genes != config.n_genes:
        raise ValueError(f"cells must have n_genes={config.n_genes} genes; got {n_genes}.")
    if space is None and config.n_spaces > 1:
        raise ValueError(
            f"space must say which of the n_spaces={config.n_spaces} gene spaces each set is of; got None."
        )
    if covariates is None:
        return
    if not isinstance(covariates, Mapping):
        rows, width = (n_cells, 1), config.width_of_covariates
        if covariates.shape[0] != n_sets or covariates.shape[1] not in rows or covariates.shape[2] != width:
            raise ValueError(
                f"covariates given as vectors must have the shape {(n_sets, 1, width)} or {(n_sets, n_cells, width)}; "
                f"got {covariates.shape}."
            )
        return
    for role in roles(config):
        if role not in covariates:
            raise ValueError(f"covariates must hold {', '.join(roles(config))}; got {', '.join(covariates) or 'none'}.")
        if np.shape(covariates[role]) not in ((n_sets,), (n_sets, n_cells)):
            raise ValueError(
                f"covariates[{role!r}] must be one id a set or one a cell, {(n_sets,)} or {(n_sets, n_cells)}; "
                f"got the shape {np.shape(covariates[role])}."
            )
    for role, size in _VECTORS.items():
        table, n_features = getattr(constants, f"{role}_vectors"), getattr(config, size)
        if getattr(config, role) == "vector" and (table is None or table.shape[1] != n_features):
            raise ValueError(
                f"{role}='vector' needs constants.{role}_vectors of {size}={n_features} features; got "
                f"{None if table is None else table.shape}."
            )
