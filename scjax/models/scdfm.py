"""scDFM: what a perturbation makes of a population, by conditional flow matching over genes.

    x_t = (1 - t) x0 + t x1,   loss = E |v(x_t, t | controls, perturbation) - (x1 - x0)|^2 + gamma MMD^2(x1_hat, x1)

x0 is noise (or a control cell), x1 a perturbed cell, x1_hat = x_t + (1 - t) v the endpoint in one step. Genes are
tokens: the velocity of a cell is read off a transformer over its genes (the PAD-Transformer), which sees the state, the
expression of a control cell on the same genes, the identities of the genes, mixed with their neighbours in a
co-expression graph, and the perturbation.

What is the same for all cells is computed once: gene tokens once a batch (once a sampling run), whatever depends on
control cells and perturbation alone once a run and not at every solver stage.

Reference: Yu et al., "scDFM: Distributional flow matching model for robust single-cell perturbation prediction",
ICLR 2026, arXiv 2602.07103.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from scjax.batches import PairedBatch
from scjax.check import at_least, non_negative, one_of, positive, probability
from scjax.kernels import median_bandwidths
from scjax.losses import mmd2
from scjax.nn.adaln import modulate
from scjax.nn.attention import attend, attend_to_all, differential_attend, merge_heads, split_heads
from scjax.nn.blockwise import RESIDUALS
from scjax.nn.dropout import drop
from scjax.nn.layers import init_alike
from scjax.nn.time import sinusoids
from scjax.processes.flow import Solver, endpoint, integrate, poisson_start, straight_path
from scjax.types import Metrics, Model, Params, Scalar

__all__ = [
    "Config",
    "Constants",
    "add_perturbation_head",
    "build",
    "embed_vectors",
    "gene_tokens",
    "init",
    "loss",
    "loss_at",
    "parts_of",
    "perturbation_embedding",
    "predict_perturbation",
    "rank_pairs",
    "rank_singles",
    "sample",
    "velocity",
]

FusionKind: TypeAlias = Literal["differential_perceiver", "differential_transformer", "perceiver"]
PerturbationKind: TypeAlias = Literal["gene", "table", "vector"]

_N_WAVES = 256  # features of the time embedding before its MLP
_LARGEST = 512.0  # expression above is cut, as in the reference
_DENSE = 8  # a graph with more than an eighth of all tokens in its widest row is cheaper as a mask
_LEAKY_SLOPE = 0.01
# What attention received is kept by `remat`: it is as small as the layer's input, and the dearest thing to make again.
_KEEP = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, conditioning, start and loss; the defaults are what the reference computes unless a comment says other.

    Expression is log1p of normalised counts; flow time runs from 0, the start, to 1, the data.
    """

    n_tokens: int | None = None
    """Rows of the token table: special tokens, genes, perturbed names without a gene. None: as many as the data have,
    filled in before `init`. The reference's checkpoints have 6000, whatever the data."""
    n_perturbations: int | None = None  # rows of the perturbation table ("table"); None: as many as the data have
    n_vector: int | None = None  # features of an external perturbation vector ("vector"); None: as the data have
    perturbation: PerturbationKind = "gene"
    """What a perturbation is: "gene", the tokens of the perturbed genes, seen through the gene graph; "table", a
    learned entry of its own (drugs); "vector", an external embedding, for perturbations that training never saw."""
    d_model: int = 512
    n_layers: int = 4  # 4 of a differential perceiver, 8 of the other two in the reference
    n_heads: int = 8  # of the attention between genes; must divide d_model
    graph_heads: int = 8  # of the attention in the gene graph; must divide d_model
    fusion: FusionKind = "differential_perceiver"
    graph_rows: Literal["each", "first"] = "each"
    """Whose neighbours a perturbation token attends to: its own, or (the reference) those of the first perturbation of
    the batch, which is wrong as soon as a batch holds several."""
    dropout: float = 0.1  # of value encoders, gene encoder and adapters, in training only
    start: Literal["gaussian", "poisson", "control"] = "gaussian"
    """Where a path starts: standard normal noise; log1p of counts drawn around the control cell; a control cell with a
    little noise (ours: then the flow only has to move what the perturbation moves). The network is shown another
    control cell than the one at the start: of start and state together it could read the velocity off."""
    start_noise: float = 0.3
    """Standard deviation of that little noise, in units of expression. Without any, most genes start at exactly zero,
    and the velocity of such a gene is its state divided by t: steep near t = 0, and learned from single cells."""
    poisson_alpha: float = 0.8  # counts drawn per count of the control cell
    poisson_target_sum: float | None = None
    """Counts drawn per cell over the genes of a batch, instead of alpha. The reference's default, -1, was taken as a
    target and made every rate 1e-8: all starts were zero."""
    gamma: float = 0.5
    """Weight of the MMD; 0 leaves it out. The endpoint that it compares is a conditional mean, narrower than the cells:
    a large weight widens what is generated (Gaussians of the tests, in variance: 8 % at 0.5, 1.6 % at 0.1)."""
    condition_dropout: float = 0.0
    """Chance that training hides a population's perturbation, for classifier-free guidance; not in the reference."""
    objective: Literal["velocity", "perturbation"] = "velocity"
    """"perturbation" trains the head that reads the perturbation off perturbed cells; all other parameters stay."""
    head_input: Literal["masked", "leaking"] = "masked"
    """What the network is told while that head guesses: nothing, or (the reference) the answer."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and activations. Parameters, normalisations, softmax, MMD and the state of the ODE stay
    float32."""
    remat: Literal["none", "layers", "cells"] = "none"
    """What the backward pass computes again to save memory: "layers" keeps the input of each layer and what attention
    received; "cells" goes through the cells of a batch one by one and keeps nothing of them but what all share, which
    costs one more forward pass and makes memory independent of the number of cells."""

    def __post_init__(self):
        for name in ("n_tokens", "n_perturbations", "n_vector"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        for name in ("d_model", "n_layers", "n_heads", "graph_heads"):
            at_least(name, getattr(self, name), 1)
        for name in ("n_heads", "graph_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(
                    f"{name} must divide d_model; got {name}={getattr(self, name)}, d_model={self.d_model}."
                )
        one_of("perturbation", self.perturbation, get_args(PerturbationKind))
        one_of("fusion", self.fusion, get_args(FusionKind))
        one_of("graph_rows", self.graph_rows, ("each", "first"))
        one_of("start", self.start, ("gaussian", "poisson", "control"))
        one_of("objective", self.objective, ("velocity", "perturbation"))
        one_of("head_input", self.head_input, ("masked", "leaking"))
        one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        one_of("remat", self.remat, ("none", "layers", "cells"))
        probability("dropout", self.dropout)
        probability("condition_dropout", self.condition_dropout)
        non_negative("start_noise", self.start_noise)
        positive("poisson_alpha", self.poisson_alpha)
        if self.poisson_target_sum is not None:
            positive("poisson_target_sum", self.poisson_target_sum)
        non_negative("gamma", self.gamma)

    @property
    def dtype(self) -> Any:
        """For flax's layers: None computes in the dtype of the parameters."""
        return jnp.bfloat16 if self.compute_dtype == "bfloat16" else None


class Constants(NamedTuple):
    """Arrays that are fitted to data and not trained.

    Attributes:
        graph: int[tokens, neighbours], the tokens that each token attends to, itself among them; -1 fills the row.
        vectors: float[perturbations, features], external vectors ("vector" alone).
    """

    graph: Int[Array, "tokens neighbours"]
    vectors: Float[Array, "perturbations features"] | None = None


# ---------------------------------------------------------------- layers, written for one cell

_xavier = nn.initializers.xavier_uniform()


def _dense(config: Config, features: int, *, use_bias: bool = True, kernel_init: Callable = _xavier) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, kernel_init=kernel_init, dtype=config.dtype)


def _norm(config: Config, *, epsilon: float = 1e-5, affine: bool = True) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, use_bias=affine, use_scale=affine, use_fast_variance=False, dtype=config.dtype)


def _erf_gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=False)


def _leaky(x: Array) -> Array:
    return nn.leaky_relu(x, _LEAKY_SLOPE)


@jax.custom_jvp
def _made(x: Array) -> Array:
    """An array that is made once, before it is used, where no gradient is asked for.

    XLA's CPU compiler otherwise joins normalisations, activations and the matrix products around them into one kernel,
    which is slower than its parts and holds constants as large as the hidden layer. Programs with gradients are cut
    into parts by what the backward pass keeps.
    """
    return jax.lax.optimization_barrier(x)


@_made.defjvp
def _made_as_it_is(x: tuple[Array], dx: tuple[Array]) -> tuple[Array, Array]:
    return x[0], dx[0]


class MLP(nn.Module):
    config: Config
    widths: tuple[int, ...]
    activation: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "*n inputs"]) -> Float[Array, "*n outputs"]:
        for i, width in enumerate(self.widths):
            x = _dense(self.config, width)(x if i == 0 else _made(self.activation(x)))
        return x


class Joined(nn.Module):
    """A linear layer of [x, y] whose part of y can be computed apart from, and more rarely than, that of x."""

    config: Config

    def setup(self):
        d = self.config.d_model
        self.kernel = self.param("kernel", _xavier, (2 * d, d))
        self.bias = self.param("bias", nn.initializers.zeros, (d,))

    def of_second(self, y: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y, kernel, bias = promote_dtype(y, self.kernel, self.bias, dtype=self.config.dtype)
        return y @ kernel[self.config.d_model :] + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))

    def __call__(self, x: Float[Array, "*n d"], of_second: Float[Array, "*m d"]) -> Float[Array, "*n d"]:
        x, kernel = promote_dtype(x, self.kernel, dtype=self.config.dtype)
        return x @ kernel[: self.config.d_model] + of_second


class ValueEncoder(nn.Module):
    """A number of a gene as a token."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, " genes"], key: PRNGKeyArray | None) -> Float[Array, "genes d"]:
        z = MLP(self.config, (self.config.d_model,) * 2, nn.relu, name="mlp")(jnp.minimum(x, _LARGEST)[:, None])
        return drop(_norm(self.config)(z), self.config.dropout, key)


class MultiHeadAttention(nn.Module):
    """Plain attention with biases, as PyTorch's: its three input projections start as one stacked matrix."""

    config: Config

    def setup(self):
        d = self.config.d_model
        stacked = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")  # Xavier of a (3d, d) matrix
        self.query, self.key, self.value = (_dense(self.config, d, kernel_init=stacked) for _ in range(3))
        self.output = _dense(self.config, d)

    def heads(self, name: str, x: Float[Array, "n d"]) -> Float[Array, "heads n head_features"]:
        return split_heads(getattr(self, name)(x), self.config.n_heads)

    def __call__(self, x: Float[Array, "n d"], k: Array, v: Array, key: PRNGKeyArray | None) -> Float[Array, "n d"]:
        q = self.heads("query", x)
        if key is None:
            return self.output(merge_heads(attend_to_all(q, k, v)))
        return self.output(merge_heads(attend(q, k, v, dropout_rate=self.config.dropout, key=key)))


class GraphAttention(nn.Module):
    """Attention of tokens to their neighbours in the gene graph; keys and values belong to the whole vocabulary."""

    config: Config

    def setup(self):
        d = self.config.d_model
        stacked = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
        self.query, self.key, self.value = (_dense(self.config, d, kernel_init=stacked) for _ in range(3))
        self.output = _dense(self.config, d)

    def __call__(
        self,
        tokens: Float[Array, "n d"],
        memory: Float[Array, "tokens d"],
        neighbours: Int[Array, "n neighbours"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "n d"]:
        heads, n_memory = self.config.graph_heads, len(memory)
        split = lambda x: x.reshape(len(x), heads, -1)  # noqa: E731
        q, k, v = split(self.query(tokens)), split(self.key(memory)), split(self.value(memory))
        q = q * q.shape[-1] ** -0.5
        if _DENSE * neighbours.shape[1] <= n_memory:
            logits = jnp.einsum("nhd,nkhd->nhk", q, k[neighbours])
            allowed = (neighbours >= 0)[:, None]
        else:
            rows = jnp.arange(len(neighbours))[:, None]
            at = jnp.where(neighbours >= 0, neighbours, n_memory)  # out of bounds: dropped
            allowed = jnp.zeros((len(neighbours), n_memory), bool).at[rows, at].set(True, mode="drop")[:, None]
            logits = jnp.einsum("nhd,mhd->nhm", q, k)
        weights = nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1, where=allowed)
        weights = drop(weights, self.config.dropout, key).astype(v.dtype)
        if _DENSE * neighbours.shape[1] <= n_memory:
            mixed = jnp.einsum("nhk,nkhd->nhd", weights, v[neighbours])
        else:
            mixed = jnp.einsum("nhm,mhd->nhd", weights, v)
        return self.output(mixed.reshape(len(tokens), -1))


class GraphLayer(nn.Module):
    """Tokens, mixed with their neighbours' in the gene graph; then a feed-forward layer."""

    config: Config

    def setup(self):
        c = self.config
        self.norm_attention, self.norm_feedforward = _norm(c), _norm(c)
        self.attention = GraphAttention(c)
        self.hidden, self.output = _dense(c, 4 * c.d_model), _dense(c, c.d_model)

    def __call__(
        self,
        tokens: Float[Array, "n d"],
        memory: Float[Array, "tokens d"],
        neighbours: Int[Array, "n neighbours"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "n d"]:
        rate = self.config.dropout
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        a = tokens + drop(self.attention(self.norm_attention(tokens), memory, neighbours, keys[0]), rate, keys[1])
        z = drop(_erf_gelu(self.hidden(self.norm_feedforward(a))), rate, keys[2])
        return a + drop(self.output(z), rate, keys[3])


class GeneEncoder(nn.Module):
    """Tokens of genes and perturbed genes: an embedding, mixed with those of its neighbours in the graph."""

    config: Config

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (c.n_tokens, c.d_model))
        self.norm, self.layer = _norm(c), GraphLayer(c)

    def __call__(
        self, ids: Int[Array, " n"], neighbours: Int[Array, "n neighbours"], n_memory: int, key: PRNGKeyArray | None
    ) -> Float[Array, "n d"]:
        memory = self.norm(self.embedding[:n_memory])
        return self.layer(memory[ids], memory, neighbours, key)


class PerturbationTable(nn.Module):
    """A learned or external vector of each perturbation, normalised."""

    config: Config

    def setup(self):
        c = self.config
        if c.perturbation == "table":
            self.embedding = self.param("embedding", nn.initializers.normal(1.0), (c.n_perturbations, c.d_model))
        else:
            self.project = _dense(c, c.d_model)
        self.norm = _norm(c)

    def __call__(self, vectors: Float[Array, "n features"]) -> Float[Array, "n d"]:
        return self.norm(vectors if self.config.perturbation == "table" else self.project(vectors))

    def of_ids(self, ids: Int[Array, " n"], vectors: Array | None) -> Float[Array, "n d"]:
        return self(self.embedding[ids] if self.config.perturbation == "table" else vectors[ids])  # pyright: ignore[reportOptionalSubscript]


class DifferentialAttention(nn.Module):
    """The difference of two attentions over one set of values: (A1 - lambda A2) V, normalised per head.

    `keys_from="stream"` (the first half of a layer): queries of both maps and values from y, keys of both from u.
    `keys_from="control"`: the first map is of y with itself, the second of u with itself, values from y. What depends
    on u alone can be computed apart (`of_control`).

    Reference: Ye et al., "Differential transformer", ICLR 2025, with the keys of arXiv 2602.07103's code.
    """

    config: Config
    layer: int
    keys_from: Literal["stream", "control"]

    def setup(self):
        c = self.config
        for name in ("query_1", "key_1", "query_2", "key_2", "value", "output"):
            setattr(self, name, _dense(c, c.d_model, use_bias=False))
        width = c.d_model // c.n_heads
        small = nn.initializers.normal(0.1)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            self.param(f"lambda_{name}", small, (width,)) for name in ("q1", "k1", "q2", "k2")
        )
        self.head_scale = self.param("head_scale", nn.initializers.ones, (width,))

    def of_control(self, u: Float[Array, "genes d"]) -> tuple[Array, Array]:
        split = partial(split_heads, n_heads=self.config.n_heads)
        if self.keys_from == "stream":
            return split(self.key_1(u)), split(self.key_2(u))
        return split(self.query_2(u)), split(self.key_2(u))

    def __call__(self, y: Float[Array, "genes d"], of_control: tuple[Array, Array]) -> Float[Array, "genes d"]:
        split = partial(split_heads, n_heads=self.config.n_heads)
        if self.keys_from == "stream":
            q1, q2, (k1, k2) = split(self.query_1(y)), split(self.query_2(y)), of_control
        else:
            q1, k1, (q2, k2) = split(self.query_1(y)), split(self.key_1(y)), of_control
        v = split(self.value(y))
        initial = 0.8 - 0.6 * math.exp(-0.3 * self.layer)
        strength = jnp.exp(self.lambda_q1 @ self.lambda_k1) - jnp.exp(self.lambda_q2 @ self.lambda_k2) + initial
        received = differential_attend(q1, k1, q2, k2, v, strength)
        wide = received.astype(jnp.promote_types(received.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * self.head_scale[None, None]
        return self.output(merge_heads((wide * (1 - initial)).astype(received.dtype)))


class DifferentialBlock(nn.Module):
    config: Config
    layer: int
    keys_from: Literal["stream", "control"]

    def setup(self):
        c = self.config
        self.modulation = _dense(c, 6 * c.d_model)
        self.norm = _norm(c, epsilon=1e-6, affine=False)
        self.attention = DifferentialAttention(c, self.layer, self.keys_from)
        self.feedforward = MLP(c, (4 * c.d_model, c.d_model), nn.gelu)

    def of_control(self, u: Float[Array, "genes d"]) -> tuple[Array, Array]:
        return self.attention.of_control(u)

    def __call__(
        self, y: Float[Array, "genes d"], of_control: tuple[Array, Array], c: Float[Array, " d"]
    ) -> Float[Array, "genes d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(nn.silu(c))[None], 6, axis=-1)
        y = y + gate1 * self.attention(_made(modulate(self.norm(y), shift1, scale1)), of_control)
        return y + gate2 * self.feedforward(_made(modulate(self.norm(y), shift2, scale2)))


class PerceiverBlock(nn.Module):
    """Plain attention: to the control tokens, then among the genes, then a feed-forward layer."""

    config: Config

    def setup(self):
        c = self.config
        self.modulation = _dense(c, 6 * c.d_model)
        self.norm_cross, self.norm_self, self.norm_feedforward = _norm(c), _norm(c), _norm(c)
        self.query, self.key, self.value = (_dense(c, c.d_model) for _ in range(3))
        self.query_self, self.key_self, self.value_self = (_dense(c, c.d_model) for _ in range(3))
        self.cross_attention, self.self_attention = MultiHeadAttention(c), MultiHeadAttention(c)
        self.feedforward = MLP(c, (4 * c.d_model, c.d_model), _erf_gelu)

    def of_control(self, u: Float[Array, "genes d"]) -> tuple[Array, Array]:
        heads = self.cross_attention.heads
        return heads("key", self.key(u)), heads("value", self.value(u))

    def __call__(
        self, z: Float[Array, "genes d"], of_control: tuple[Array, Array], c: Float[Array, " d"], key: Any
    ) -> Float[Array, "genes d"]:
        keys = (None, None) if key is None else jax.random.split(key)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(nn.silu(c))[None], 6, axis=-1)
        z = z + self.cross_attention(self.query(self.norm_cross(z)), *of_control, keys[0])
        z = modulate(self.norm_self(z), shift1, scale1)  # as published: it replaces the stream
        heads = self.self_attention.heads
        k, v = heads("key", self.key_self(z)), heads("value", self.value_self(z))
        z = z + gate1 * self.self_attention(self.query_self(z), k, v, keys[1])
        return z + gate2 * self.feedforward(modulate(self.norm_feedforward(z), shift2, scale2))


class Hoisted(NamedTuple):
    """What a layer needs and the state does not change: of the genes, of the perturbation, of the control cell."""

    of_genes: Float[Array, "genes d3"]
    of_perturbation: Float[Array, "*cells d"]
    of_control: tuple[Array, Array]


class Layer(nn.Module):
    """Genes modulate the stream, the perturbation is injected, genes attend to genes."""

    config: Config
    layer: int

    def setup(self):
        c = self.config
        self.gene_modulation, self.gene_norm = _dense(c, 3 * c.d_model), _norm(c)
        self.adapter, self.adapter_output = Joined(c), _dense(c, c.d_model)
        if c.fusion == "perceiver":
            self.perceiver = PerceiverBlock(c)
        else:
            if c.fusion == "differential_perceiver":
                self.first = DifferentialBlock(c, self.layer, "stream")
            self.second = DifferentialBlock(c, self.layer, "control")

    def of_genes(self, g: Float[Array, "genes d"]) -> Float[Array, "genes d3"]:
        return self.gene_modulation(nn.silu(g))

    def modulated(self, x: Float[Array, "genes d"], of_genes: Float[Array, "genes d3"]) -> Float[Array, "genes d"]:
        shift, gate, scale = jnp.split(of_genes, 3, axis=-1)
        return x + gate * (self.gene_norm(x) * scale + shift)  # as published: no 1 + scale, and in this order

    def of_perturbation(self, p: Float[Array, "*cells d"]) -> Float[Array, "*cells d"]:
        return self.adapter.of_second(p)

    def of_control(self, v2: Float[Array, "genes d"]) -> tuple[Array, Array]:
        return (self.perceiver if self.config.fusion == "perceiver" else self.second).of_control(v2)

    def __call__(
        self, x: Float[Array, "genes d"], hoisted: Hoisted, c: Float[Array, " d"], key: PRNGKeyArray | None
    ) -> Float[Array, "genes d"]:
        key_adapter, key_block = (None, None) if key is None else jax.random.split(key)
        x = self.modulated(x, hoisted.of_genes)
        x = _leaky(self.adapter(x, hoisted.of_perturbation[None]))
        x = _leaky(self.adapter_output(drop(x, self.config.dropout, key_adapter)))
        if self.config.fusion == "perceiver":
            return self.perceiver(x, hoisted.of_control, c, key_block)
        if self.config.fusion == "differential_perceiver":
            x = self.first(x, self.first.of_control(x), c)
        return self.second(x, hoisted.of_control, c)


class TimeEmbedding(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, t: Float[Array, " cells"]) -> Float[Array, "cells d"]:
        return MLP(self.config, (self.config.d_model,) * 2, nn.silu, name="mlp")(sinusoids(t, _N_WAVES))


class Fusion(nn.Module):
    """State tokens and control tokens as one stream."""

    config: Config

    def setup(self):
        self.joined, self.output, self.norm = (
            Joined(self.config),
            _dense(self.config, self.config.d_model),
            _norm(self.config),
        )

    def of_control(self, v2: Float[Array, "genes d"]) -> Float[Array, "genes d"]:
        return self.joined.of_second(v2)

    def __call__(self, v1: Float[Array, "genes d"], of_control: Float[Array, "genes d"]) -> Float[Array, "genes d"]:
        return self.norm(self.output(_erf_gelu(self.joined(v1, of_control))))


class VelocityHead(nn.Module):
    config: Config

    def setup(self):
        self.joined = Joined(self.config)
        self.hidden, self.output = _dense(self.config, self.config.d_model), _dense(self.config, 1)

    def of_perturbation(self, p: Float[Array, "*cells d"]) -> Float[Array, "*cells d"]:
        return self.joined.of_second(p)

    def __call__(self, x: Float[Array, "genes d"], of_perturbation: Float[Array, " d"]) -> Float[Array, " genes"]:
        z = _leaky(self.hidden(_leaky(self.joined(x, of_perturbation[None]))))
        return self.output(z)[:, 0]


class PerturbationHead(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "genes d"]) -> Float[Array, " d"]:
        return _dense(self.config, self.config.d_model)(_norm(self.config)(x.mean(axis=0)))


# ---------------------------------------------------------------- the network on a batch of cells


class OfGenes(NamedTuple):
    """What all cells of a batch share: the tokens of its genes, and what each layer makes of them."""

    tokens: Float[Array, "genes d"]
    layers: tuple[Float[Array, "genes d3"], ...]


class Prepared(NamedTuple):
    """All that no solver stage changes, for a batch of cells on one list of genes."""

    genes: Float[Array, "genes d"]
    fused_control: Float[Array, "cells genes d"]
    layers: tuple[Hoisted, ...]
    head: Float[Array, "cells d"]


def init(key: PRNGKeyArray, config: Config) -> Params:
    """Parameters as the reference draws them: Xavier-uniform matrices, zero biases, unit normal embeddings.

    The adaLN modulations too, so that the blocks are not the identity at the start, whatever the paper calls them.

    Raises:
        ValueError: a size that the data decide is still None.
    """
    needed = {"gene": ("n_tokens",), "table": ("n_tokens", "n_perturbations"), "vector": ("n_tokens", "n_vector")}
    for name in needed[config.perturbation]:
        if getattr(config, name) is None:
            raise ValueError(f"{name} is None; the data decide it: give the config the number before init.")
    d = config.d_model
    vector, tokens = jnp.zeros(d), jnp.zeros((2, d))
    ids, neighbours = jnp.zeros(2, jnp.int32), jnp.zeros((2, 1), jnp.int32)
    keys = iter(jax.random.split(key, config.n_layers + 9))

    def of(name: str, *args: Any, method: Callable | str | None = None) -> Params:
        return _init(name, config, next(keys), *args, method=method)

    def whole_layer(layer: Layer) -> Array:
        hoisted = Hoisted(layer.of_genes(tokens), layer.of_perturbation(vector), layer.of_control(tokens))
        return layer(tokens, hoisted, vector, None)

    params = {
        "time": of("time", jnp.zeros(1)),
        "tokens": of("tokens", ids, neighbours, 2, None),
        "value_state": of("value_state", jnp.zeros(2), None),
        "value_control": of("value_control", jnp.zeros(2), None),
        "fusion": of("fusion", method=lambda m: m(tokens, m.of_control(tokens))),
        "velocity_head": of("velocity_head", method=lambda m: m(tokens, m.of_perturbation(vector))),
    }
    one_layer = partial(_init, "layer_0", config, method=whole_layer)
    layers = init_alike(one_layer, list(islice(keys, config.n_layers)))
    params |= {f"layer_{i}": layer for i, layer in enumerate(layers)}
    if config.perturbation != "gene":
        vectors = None if config.perturbation == "table" else jnp.zeros((1, config.n_vector))
        params["perturbations"] = of("perturbations", ids[:1], vectors, method="of_ids")
    key_head = next(keys)
    if config.objective == "perturbation":
        return add_perturbation_head(key_head, params, config)
    if config.condition_dropout > 0:
        params["mask"] = jax.random.normal(key_head, (d,))  # pyright: ignore[reportArgumentType]
    return params


def add_perturbation_head(key: PRNGKeyArray, params: Params, config: Config) -> Params:
    """The parameters of a trained velocity, with those that objective="perturbation" trains beside them."""
    key_head, key_mask = jax.random.split(key)
    head = _init("perturbation_head", config, key_head, jnp.zeros((2, config.d_model)))
    mask = params.get("mask", jax.random.normal(key_mask, (config.d_model,)))
    return {**params, "perturbation_head": head, "mask": mask}


def gene_tokens(
    params: Params,
    genes: Int[Array, " genes"],
    *,
    constants: Constants,
    key: PRNGKeyArray | None = None,
    config: Config,
) -> Float[Array, "genes d"]:
    """Each gene as the network sees it: its embedding mixed with those of its neighbours in the graph."""
    return _encode(params, genes, constants.graph[genes], constants, key, config)


def perturbation_embedding(
    params: Params,
    perturbation: Int[Array, "n slots"],
    *,
    constants: Constants,
    key: PRNGKeyArray | None = None,
    config: Config,
) -> Float[Array, "n d"]:
    """The mean over the slots of what stands in them; a single perturbation shares its mean with the control.

    Unknown perturbations can be given an embedding of this kind, a mean of known ones for instance.
    """
    ids = perturbation.ravel()
    if config.perturbation == "gene":
        tokens = _encode(params, ids, _perturbation_rows(perturbation, constants, config), constants, key, config)
    else:
        tokens = _apply(params, "perturbations", config, ids, constants.vectors, method="of_ids")
    return tokens.reshape(*perturbation.shape, -1).mean(axis=1)


def embed_vectors(params: Params, vectors: Float[Array, "n features"], *, config: Config) -> Float[Array, "n d"]:
    """External perturbation vectors as embeddings: projected ("vector"), or of d_model features as they are ("table").

    Raises:
        ValueError: a model whose perturbations are genes; it has no such table.
    """
    if config.perturbation == "gene":
        raise ValueError("perturbation='gene' takes its embeddings from gene tokens; external vectors need 'vector'.")
    return _apply(params, "perturbations", config, vectors)


def velocity(
    params: Params,
    x_t: Float[Array, "cells genes"],
    t: Float[Array, " cells"],
    source: Float[Array, "cells genes"],
    perturbation: Int[Array, "cells slots"] | Float[Array, "cells d"],
    genes: Int[Array, " genes"],
    *,
    constants: Constants,
    key: PRNGKeyArray | None = None,
    config: Config,
) -> Float[Array, "cells genes"]:
    """dx/dt of each cell, in log-normalised expression per unit of flow time.

    Args:
        x_t: states at the times `t` in [0, 1].
        source: a control cell for each, on the same genes; nothing pairs it with the state.
        perturbation: ids in as many slots as training had, or embeddings as `perturbation_embedding` gives them.
        genes: token of each column; any genes in any order and number.
        key: of dropout; deterministic without.

    Raises:
        ValueError: shapes that do not fit each other or the config.
    """
    _check_shapes(x_t, t, source, perturbation, genes, constants, config)
    _check_rows(perturbation, x_t)
    key_tokens, key_cells = (None, None) if key is None else jax.random.split(key)
    g, p = _tokens(params, genes, perturbation, constants, key_tokens, config)
    return _velocity(params, x_t, t, source, p, g, key_cells, config)


def loss(
    params: Params, batch: PairedBatch, key: PRNGKeyArray, *, constants: Constants, config: Config
) -> tuple[Scalar, Metrics]:
    """E |v(x_t, t | source, perturbation) - (x1 - x0)|^2 + gamma MMD^2(x1_hat, x1).

    x0 is drawn as the config's start says; where that is "control" it is near the batch's source, whose pairing
    with the target (a coupling) then matters, and each cell is shown the source of the next one.

    The mean is over cells and genes; MMD^2 is unbiased, under Gaussian kernels whose bandwidths follow the observed
    cells' median distance, between the cells of one population and their one-step endpoints, then averaged over the
    populations of the batch: it never compares cells of different perturbations. All times count alike.

    With objective="perturbation" the loss is the mean cosine distance between the head's guess from perturbed cells and
    the embedding of their perturbation; gradients reach the head and the mask embedding alone.

    Returns:
        The scalar and its unweighted terms: "flow" and, unless gamma is 0, "mmd2"; or "cosine".

    Raises:
        ValueError: fewer than two cells of a population with gamma above 0; shapes that do not fit.
    """
    key_start, key_t, key_net = jax.random.split(key, 3)
    if config.objective == "perturbation":
        return _perturbation_loss(params, batch, key_net, constants, config)
    x0 = _start(key_start, batch.source, config)
    if config.start == "control":
        at_least("the number of cells of a population, where start='control'", batch.source.shape[1], 2)
        batch = replace(batch, source=jnp.roll(batch.source, 1, axis=1))
    t = jax.random.uniform(key_t, batch.target.shape[:2], batch.target.dtype)
    return loss_at(params, batch, x0, t, key_net, constants=constants, config=config)


def loss_at(
    params: Params,
    batch: PairedBatch,
    x0: Float[Array, "populations cells genes"],
    t: Float[Array, "populations cells"],
    key: PRNGKeyArray | None = None,
    *,
    constants: Constants,
    config: Config,
) -> tuple[Scalar, Metrics]:
    """`loss` of a velocity at these starts and times; without a key nothing is dropped and no perturbation hidden."""
    n_populations, n_cells, n_genes = batch.target.shape
    x0, x1, source = (jnp.reshape(x, (-1, n_genes)) for x in (x0, batch.target, batch.source))
    t = t.ravel()
    x_t, u_t = straight_path(x0, x1, t)
    key_hide, key_drop = (None, None) if key is None else jax.random.split(key)
    key_tokens, key_cells = (None, None) if key is None or config.dropout == 0 else jax.random.split(key_drop)  # pyright: ignore[reportArgumentType]

    _check_shapes(x_t, t, source, batch.perturbation, batch.genes, constants, config)
    g, p = _tokens(params, batch.genes, batch.perturbation, constants, key_tokens, config)
    told = jnp.ones(n_populations, x1.dtype)
    if key is not None and config.condition_dropout > 0:
        told = jax.random.bernoulli(key_hide, 1 - config.condition_dropout, (n_populations,)).astype(x1.dtype)  # pyright: ignore[reportArgumentType]
        p = jnp.where(told[:, None] > 0, p, params["mask"][None])
    v_t = _velocity(params, x_t, t, source, jnp.repeat(p, n_cells, axis=0), g, key_cells, config)

    terms = {"flow": jnp.mean((v_t - u_t) ** 2)}
    if config.gamma == 0:
        return terms["flow"], terms
    x1_hat = endpoint(x_t, v_t, t).reshape(batch.target.shape)
    discrepancy = jax.vmap(lambda x, y: mmd2(x, y, median_bandwidths(y)))(x1_hat, batch.target)
    # A population whose perturbation was hidden is not to look like this perturbation's cells.
    terms["mmd2"] = jnp.sum(told * discrepancy) / jnp.maximum(told.sum(), 1)
    return terms["flow"] + config.gamma * terms["mmd2"], terms


def sample(
    params: Params,
    source: Float[Array, "cells genes"],
    perturbation: Int[Array, "cells ... slots"] | Float[Array, "cells ... d"],
    genes: Int[Array, " genes"],
    key: PRNGKeyArray | None,
    *,
    constants: Constants,
    config: Config,
    x0: Float[Array, "cells genes"] | None = None,
    begin: Float[Array, "cells genes"] | None = None,
    solver: Solver = "rk4_38",
    n_steps: int = 19,
    tolerance: float = 1e-3,
    guidance: float = 1.0,
    weights: Sequence[float] | None = None,
    trajectory: bool = False,
) -> Float[Array, "cells genes"] | Float[Array, "times cells genes"]:
    """Perturbed cells, one for each control cell of `source`: log-normalised expression, cut at zero.

    Cells do not see each other: a cell of a batch is what it would be alone.

    Args:
        perturbation, genes: as for `velocity`.
        key: of the start; may be None where x0 is given.
        x0: the start itself, instead of a drawn one.
        begin: the control cells at whose places paths begin, where config.start is "control"; others than `source`.
        solver, n_steps, tolerance: see `processes.flow.integrate`. The published code takes the 3/8 rule on 20 points,
            the paper 100 Euler steps.
        guidance: g of classifier-free guidance, v_hidden + g (v - v_hidden), where v_hidden is told of no perturbation:
            1 is v itself, more exaggerates the perturbation. Other values than 1 need a model that was trained with
            condition_dropout.
        weights: one a part, where `perturbation` has one more axis, [cells, parts, slots] or [cells, parts, d]: the
            velocity is then the weighted sum of those that the parts have alone. `parts_of` composes a combination.
        trajectory: the uncut states at n_steps + 1 times instead.

    Raises:
        ValueError: shapes that do not fit, a start without a key, guidance without condition_dropout.

    Reference: Ho and Salimans, "Classifier-free diffusion guidance", 2022.
    """
    weights = (1.0,) if weights is None else tuple(weights)
    parts = perturbation[:, None] if perturbation.ndim == 2 else perturbation
    if parts.ndim != 3 or parts.shape[1] != len(weights):
        raise ValueError(
            f"weights has one number for each part of a perturbation; got {len(weights)} of them and perturbation of "
            f"the shape {perturbation.shape}, which should be cells x slots, or cells x parts x slots."
        )
    told = jnp.swapaxes(parts, 0, 1).reshape(-1, parts.shape[2])
    _check_shapes(source, source[:, 0], source, parts[:, 0], genes, constants, config)
    _check_rows(perturbation, source)
    if guidance != 1 and "mask" not in params:
        raise ValueError(
            f"guidance={guidance} needs a model that was trained with condition_dropout above 0; this one has no "
            "embedding of a hidden perturbation. Use guidance=1."
        )
    if x0 is None:
        if key is None:
            raise ValueError(f"start={config.start!r} draws where paths begin: pass a key, or x0.")
        if (begin is None) == (config.start == "control"):
            what = "at control cells: pass them as begin, others than those of source"
            raise ValueError(f"start={config.start!r} begins {what if begin is None else 'at noise: leave begin out'}.")
        x0 = _start(key, source if begin is None else begin, config)
    g, p = _tokens(params, genes, told, constants, None, config)
    if guidance != 1:
        p = jnp.concatenate([p, jnp.broadcast_to(params["mask"][None], (len(source), config.d_model))])
        weights = (*(guidance * w for w in weights), 1 - guidance)
    # All that a cell is told of goes through the network as a cell of its own: one program, whatever is combined.
    n = len(weights)
    prepared = _prepare(params, jnp.tile(source, (n, 1)), p, _of_genes(params, g, config), None, config)

    def field(t: Array, x: Array) -> Array:
        v = _field(params, prepared, jnp.tile(x, (n, 1)), jnp.full(n * len(x), t, x.dtype), None, config)
        return v if n == 1 else jnp.einsum("w,wcg->cg", jnp.asarray(weights, v.dtype), v.reshape(n, *x.shape))

    x = integrate(field, x0, solver=solver, n_steps=n_steps, tolerance=tolerance, trajectory=trajectory)
    return x if trajectory else jnp.maximum(x, 0)


def parts_of(
    perturbation: Shaped[Array, "cells slots"], control: Shaped[Array, " slots"]
) -> tuple[Shaped[Array, "cells parts slots"], tuple[float, ...]]:
    """What stands in each slot alone, and then nothing at all; with the weights that make `sample` add up effects.

    v_0 + sum_s (v_s - v_0), with v_0 the velocity of the control and v_s that of slot s alone: a rule for combinations
    that training did not see, at slots + 1 evaluations in place of one. The model must have seen controls as targets.

    Args:
        control: its id, in as many slots.

    Reference: Liu et al., "Compositional visual generation with composable diffusion models", ECCV 2022.
    """
    n_slots = perturbation.shape[1]
    none = jnp.broadcast_to(control[None], perturbation.shape)
    alone = [none.at[:, 0].set(perturbation[:, slot]) for slot in range(n_slots)]
    return jnp.stack([*alone, none], axis=1), (*([1.0] * n_slots), 1.0 - n_slots)


def predict_perturbation(
    params: Params,
    target: Float[Array, "cells genes"],
    source: Float[Array, "cells genes"],
    genes: Int[Array, " genes"],
    *,
    perturbation: Int[Array, "cells slots"] | Float[Array, "cells d"] | None = None,
    t: Float[Array, " cells"] | None = None,
    constants: Constants,
    config: Config,
) -> Float[Array, "cells d"]:
    """The embedding of the perturbation that the head reads off each perturbed cell, beside a control cell.

    `perturbation` is the answer; only the reference's leaking variant wants it. `t` is the flow time of `target`, 1
    unless given: they are cells, not states on the way.

    Raises:
        ValueError: parameters without the head, an answer for head_input="masked", none for "leaking".
    """
    if "perturbation_head" not in params:
        raise ValueError("params have no perturbation head; add one with add_perturbation_head and train it.")
    if (perturbation is None) != (config.head_input == "masked"):
        what = "leaks the answer into the network: pass it" if perturbation is None else "wants no answer: leave it out"
        raise ValueError(f"head_input={config.head_input!r} {what} (argument perturbation).")
    if perturbation is None:
        g = gene_tokens(params, genes, constants=constants, config=config)
        p = jnp.broadcast_to(params["mask"][None], (len(target), config.d_model))
    else:
        g, p = _tokens(params, genes, perturbation, constants, None, config)
    t = jnp.ones(len(target), target.dtype) if t is None else t
    return _guess(params, target, t, source, p, g, None, config)


def rank_singles(
    guess: Float[Array, " d"], candidates: Float[Array, "n d"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Candidate embeddings by their cosine with a guessed one, best first, and these cosines."""
    scores = _cosine(candidates, guess[None])
    order = jnp.argsort(-scores)
    return order, scores[order]


def rank_pairs(
    guess: Float[Array, " d"], candidates: Float[Array, "n d"], *, n_preselected: int = 64
) -> tuple[Int[Array, "pairs two"], Float[Array, "pairs two"], Float[Array, " pairs"]]:
    """Pairs of candidates by how well a mixture of the two gives the guessed embedding, best first.

    The weights of a pair solve least squares (ridge 1e-6), are cut at zero and made to sum to 1.

    Args:
        n_preselected: only pairs among so many candidates of largest cosine are tried.

    Returns:
        The pairs, their weights, and the norm of what remains.

    Raises:
        ValueError: fewer than two candidates.
    """
    at_least("the number of candidates", len(candidates), 2)
    chosen = rank_singles(guess, candidates)[0][:n_preselected]
    i, j = jnp.triu_indices(len(chosen), k=1)
    pairs = jnp.stack([chosen[i], chosen[j]], axis=-1)

    def fit(pair: Array) -> tuple[Array, Array]:
        basis = candidates[pair]
        weights = jnp.linalg.solve(basis @ basis.T + 1e-6 * jnp.eye(2, dtype=basis.dtype), basis @ guess)
        weights = jnp.maximum(weights, 0)
        weights = weights / jnp.maximum(weights.sum(), 1e-12)
        return weights, jnp.linalg.norm(guess - weights @ basis)

    weights, remainders = jax.vmap(fit)(pairs)
    order = jnp.argsort(remainders)
    return pairs[order], weights[order], remainders[order]


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
    "tokens": GeneEncoder,
    "perturbations": PerturbationTable,
    "value_state": ValueEncoder,
    "value_control": ValueEncoder,
    "fusion": Fusion,
    "velocity_head": VelocityHead,
    "perturbation_head": PerturbationHead,
}


def _module(name: str, config: Config) -> nn.Module:
    if name.startswith("layer_"):
        return Layer(config, int(name.removeprefix("layer_")))
    return _MODULES[name](config)


def _init(name: str, config: Config, key: PRNGKeyArray, *args: Any, method: Callable | str | None = None) -> Params:
    made: Any = _module(name, config).init(key, *args, method=method)
    return made["params"]


def _apply(params: Params, name: str, config: Config, *args: Any, method: str | None = None) -> Any:
    return _module(name, config).apply({"params": params[name]}, *args, method=method)


def _each_cell(params: Params, name: str, config: Config, *args: Any, method: str | None = None, axes: Any = 0) -> Any:
    return jax.vmap(partial(_apply, params, name, config, method=method), in_axes=axes)(*args)


def _encode(params, ids, neighbours, constants, key, config):
    return _apply(params, "tokens", config, ids, neighbours, len(constants.graph), key)


def _perturbation_rows(perturbation, constants, config):
    whose = perturbation if config.graph_rows == "each" else jnp.broadcast_to(perturbation[:1], perturbation.shape)
    return constants.graph[whose.ravel()]


def _tokens(params, genes, perturbation, constants, key, config) -> tuple[Array, Array]:
    """Gene tokens and perturbation embeddings; both from one pass over the vocabulary where they share it."""
    key_genes, key_perturbation = (None, None) if key is None else jax.random.split(key)
    if config.perturbation != "gene" or jnp.issubdtype(perturbation.dtype, jnp.floating):
        g = gene_tokens(params, genes, constants=constants, key=key_genes, config=config)
        if jnp.issubdtype(perturbation.dtype, jnp.floating):
            return g, perturbation
        return g, perturbation_embedding(params, perturbation, constants=constants, key=key_perturbation, config=config)
    ids = jnp.concatenate([genes, perturbation.ravel()])
    rows = jnp.concatenate([constants.graph[genes], _perturbation_rows(perturbation, constants, config)])
    tokens = _encode(params, ids, rows, constants, key, config)
    return tokens[: len(genes)], tokens[len(genes) :].reshape(*perturbation.shape, -1).mean(axis=1)


def _of_genes(params, g, config) -> OfGenes:
    layers = tuple(_apply(params, f"layer_{i}", config, g, method="of_genes") for i in range(config.n_layers))
    return OfGenes(g, layers)


def _prepare(params, source, p, of_genes, key, config) -> Prepared:
    keys = None if key is None else jax.random.split(key, len(source))
    v2 = _each_cell(params, "value_control", config, source, keys, axes=(0, None if keys is None else 0))
    v2 = v2 + of_genes.tokens[None]
    layers = tuple(
        Hoisted(
            of_genes=of_genes.layers[i],
            of_perturbation=_apply(params, f"layer_{i}", config, p, method="of_perturbation"),
            of_control=_each_cell(params, f"layer_{i}", config, v2, method="of_control"),
        )
        for i in range(config.n_layers)
    )
    return Prepared(
        genes=of_genes.tokens,
        fused_control=_each_cell(params, "fusion", config, v2, method="of_control"),
        layers=layers,
        head=_apply(params, "velocity_head", config, p, method="of_perturbation"),
    )


def _stream(params, prepared, x_t, t, key, config) -> Array:
    """The gene tokens of each cell after the last layer."""
    n_cells = len(x_t)
    keys = [None] * (config.n_layers + 1)
    if key is not None:
        keys = list(jax.random.split(key, (config.n_layers + 1, n_cells)))
    of_key = None if key is None else 0
    v1 = _each_cell(params, "value_state", config, x_t, keys[-1], axes=(0, of_key)) + prepared.genes[None]
    x = _each_cell(params, "fusion", config, v1, prepared.fused_control)
    c = _apply(params, "time", config, t)
    for i, hoisted in enumerate(prepared.layers):
        axes = (0, Hoisted(None, 0, 0), 0, of_key)  # pyright: ignore[reportArgumentType]
        layer = partial(_each_cell, params, f"layer_{i}", config, axes=axes)
        x = (jax.checkpoint(layer, policy=_KEEP) if config.remat == "layers" else layer)(x, hoisted, c, keys[i])
    return x


def _field(params, prepared, x_t, t, key, config) -> Array:
    x = _stream(params, prepared, x_t, t, key, config)
    return _each_cell(params, "velocity_head", config, x, prepared.head).astype(x_t.dtype)


def _velocity(params, x_t, t, source, p, g, key, config) -> Array:
    of_genes = _of_genes(params, g, config)

    def of_cells(x_t, t, source, p, key):
        key_control, key_state = (None, None) if key is None else jax.random.split(key)
        return _field(params, _prepare(params, source, p, of_genes, key_control, config), x_t, t, key_state, config)

    if config.remat != "cells":
        return of_cells(x_t, t, source, p, key)
    # A loop, for some compilers would otherwise join the second computation with the first.
    one = jax.checkpoint(lambda cell: of_cells(*(a[None] for a in cell[:4]), cell[4])[0])  # pyright: ignore[reportCallIssue]
    keys = None if key is None else jax.random.split(key, len(x_t))
    return jax.lax.map(one, (x_t, t, source, p, keys))


def _guess(params, target, t, source, p, g, key, config) -> Array:
    key_control, key_state = (None, None) if key is None else jax.random.split(key)
    prepared = _prepare(params, source, p, _of_genes(params, g, config), key_control, config)
    x = _stream(params, prepared, target, t, key_state, config)
    return _each_cell(params, "perturbation_head", config, x)


def _perturbation_loss(params, batch, key, constants, config):
    trained = ("perturbation_head", "mask")
    params = {name: p if name in trained else jax.lax.stop_gradient(p) for name, p in params.items()}
    n_cells, n_genes = batch.target.shape[1:]
    target, source = batch.target.reshape(-1, n_genes), batch.source.reshape(-1, n_genes)
    key_tokens, key_cells = (None, None) if config.dropout == 0 else jax.random.split(key)
    _check_shapes(target, target[:, 0], source, batch.perturbation, batch.genes, constants, config)
    g, p = _tokens(params, batch.genes, batch.perturbation, constants, key_tokens, config)
    answer = jax.lax.stop_gradient(jnp.repeat(p, n_cells, axis=0))
    told = answer if config.head_input == "leaking" else jnp.broadcast_to(params["mask"][None], answer.shape)
    t = jnp.ones(len(target), target.dtype)
    cosine = jnp.mean(_cosine(_guess(params, target, t, source, told, g, key_cells, config), answer))
    return 1 - cosine, {"cosine": cosine}


def _start(key, cells, config) -> Array:
    """Where paths begin that belong to these control cells."""
    if config.start == "poisson":
        return poisson_start(key, cells, target_sum=config.poisson_target_sum, alpha=config.poisson_alpha)
    noise = jax.random.normal(key, cells.shape, cells.dtype)
    return cells + config.start_noise * noise if config.start == "control" else noise


def _cosine(a: Array, b: Array) -> Array:
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-8)


def _check_shapes(x, t, source, perturbation, genes, constants, config) -> None:
    if x.shape != source.shape or x.shape != (len(t), len(genes)):
        raise ValueError(
            f"states and source must be cells x genes, with a time for each cell and a token for each gene; got "
            f"states {x.shape}, source {source.shape}, {len(t)} times, {len(genes)} genes."
        )
    if config.n_tokens is None or len(constants.graph) > config.n_tokens:
        raise ValueError(
            f"n_tokens must be at least the {len(constants.graph)} tokens of constants.graph; got {config.n_tokens}."
        )
    if jnp.issubdtype(perturbation.dtype, jnp.floating) and perturbation.shape[1] != config.d_model:
        raise ValueError(
            f"a perturbation given as an embedding has d_model={config.d_model} features; got {perturbation.shape[1]}. "
            "External vectors go through embed_vectors."
        )
    if config.perturbation == "vector" and (constants.vectors is None or constants.vectors.shape[1] != config.n_vector):
        got = None if constants.vectors is None else constants.vectors.shape
        raise ValueError(
            f"perturbation='vector' needs constants.vectors of n_vector={config.n_vector} features; {got}."
        )


def _check_rows(perturbation, cells) -> None:
    if len(perturbation) != len(cells):
        raise ValueError(
            f"perturbation must have a row for each of the {len(cells)} cells; got {len(perturbation)}. "
            "Repeat the one row of a population."
        )
