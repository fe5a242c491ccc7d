"""scDFM state dicts of the PyTorch reference -> parameters and config of `models.scdfm`.

| state dict                                                     | parameters                                        |
|----------------------------------------------------------------|---------------------------------------------------|
| t_embedder.mlp.0, 2                                            | time.mlp.Dense_0, Dense_1                         |
| value_encoder_1, value_encoder_2: linear1, linear2, norm       | value_state, value_control: mlp, LayerNorm_0      |
| fusion_layer.0, 2, 3                                           | fusion.joined, output, norm                       |
| encoder.embedding, enc_norm                                    | tokens.embedding, norm                            |
| encoder.perturbation_interaction.cross_attn                    | tokens.layer.attention.query, ..., output         |
| encoder.perturbation_interaction.norm1, norm2                  | tokens.layer.norm_attention, norm_feedforward     |
| encoder.perturbation_interaction.linear1, linear2              | tokens.layer.hidden, output                       |
| perturbation_embedder.embedding, enc_norm ("table" alone)      | perturbations.embedding, norm                     |
| gene_adaLN.<l>.adaLN_modulation.1, norm                        | layer_<l>.gene_modulation, gene_norm              |
| adapter_layer.<l>.0, 3                                         | layer_<l>.adapter, adapter_output                 |
| blocks.<l>.diff_self_attn, diff_cross_attn (or blocks.<l>)     | layer_<l>.first, second                           |
| .attn.q_proj_1, k_proj_1, ..., out_proj, lambda_*, subln      | .attention.query_1, ..., head_scale               |
| .adaLN_modulation.1, mlp.fc1, mlp.fc2                          | .modulation, feedforward                          |
| blocks.<l> of a perceiver                                      | layer_<l>.perceiver                               |
| final_layer.fc.0, 2, 4                                         | velocity_head.joined, hidden, output              |
| p_head.0, 1; p_mask_embed                                      | perturbation_head; mask                           |

The reference always holds a perturbation table, a head and a mask embedding; those that the config has no use for are
left out, whatever else is left over is an error.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from scjax.convert import state as states
from scjax.convert.state import Blank, checked, fill, remainder, shape_of
from scjax.models.scdfm import Config
from scjax.types import Params

__all__ = ["config_from_torch", "left_over", "params_from_torch", "params_to_torch", "told_by", "untold"]


def config_from_torch(state: Mapping[str, np.ndarray], **known: Any) -> Config:
    """The config that a state dict's names and shapes tell.

    Args:
        state: arrays by their state-dict names.
        known: what they do not tell: perturbation ("gene" unless given), n_heads of a perceiver, graph_heads (8 unless
            given), dropout, gamma, start, ...

    Raises:
        ValueError: no scDFM state dict.
    """
    return Config(**(told_by(state, **known) | known))


def told_by(state: Mapping[str, np.ndarray], **known: Any) -> dict[str, Any]:
    """The fields of the config that a state dict tells, given those that are known."""
    state = checked(state)
    needed = ["encoder.embedding.weight", "t_embedder.mlp.0.weight"]
    if known.get("perturbation") == "table":
        needed.append("perturbation_embedder.embedding.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(
            f"the state dict is not one of scDFM: it lacks {', '.join(missing)}. "
            f"It has: {', '.join(sorted(state)[:10]) or 'nothing'}{', ...' if len(state) > 10 else ''}."
        )
    if any(name.startswith("blocks.0.diff_") for name in state):
        fusion = "differential_perceiver"
    else:
        fusion = "perceiver" if "blocks.0.ln_z1.weight" in state else "differential_transformer"
    layers = {int(m.group(1)) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))}
    n_tokens, d = shape_of(state, needed[0], 2)
    found: dict[str, Any] = {
        "n_tokens": int(n_tokens),
        "d_model": int(d),
        "n_layers": len(layers),
        "fusion": fusion,
    }
    at_head = next((name for name in state if re.fullmatch(r"blocks\.0\..*attn\.subln\.weight", name)), None)
    if at_head is not None:
        (width,) = shape_of(state, at_head, 1)
        found["n_heads"] = max(1, d // width)
    if known.get("perturbation") == "table":
        found["n_perturbations"] = shape_of(state, needed[2], 2)[0]
    return found


def untold(config: Config) -> tuple[str, ...]:
    """Fields of the config that predictions depend on, and that names and shapes may not tell."""
    return ("n_heads", "graph_heads", "perturbation", "start")


def params_from_torch(state: Mapping[str, np.ndarray], config: Config) -> Params:
    """Parameters of `models.scdfm`, all or nothing; dtypes are kept.

    Raises:
        ValueError: tensors missing, left over or of another shape than the config asks for; all of them are listed.
            perturbation="vector", which the reference does not have.
    """
    _check_kind(config)
    reader = Reader(checked(state), config.d_model)
    params = _network(reader, config)
    reader.finish()
    return params


def params_to_torch(
    params: Params, config: Config, *, originals: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The state dict of a reference model with these parameters: the way back of `params_from_torch`, bit for bit.

    What the reference always holds and the config has no use for comes from `originals`, which may lack some or all of
    it. Without originals it is there and zero, the perturbation table with n_tokens rows as in the reference.

    Args:
        originals: a state dict of the reference model, or what `left_over` kept of it.

    Raises:
        ValueError: parameters missing, left over or of another shape than the config asks for; all of them are listed.
            perturbation="vector", which the reference does not have.
    """
    _check_kind(config)
    return fill(partial(_blank, config=config), params, originals)


def left_over(state: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """What of a state dict `params_from_torch` leaves out: `originals` for the way back."""
    return remainder(partial(_blank, config=config), checked(state))


def _check_kind(config: Config) -> None:
    if config.perturbation == "vector":
        raise ValueError("perturbation='vector' has a projection that the reference lacks; take 'gene' or 'table'.")


def _blank(tensors: Blank, config: Config) -> Params:
    return _network(Reader(tensors, config.d_model), config)


class Reader(states.Reader):
    """With the layers of this network, of width `d` where nothing else is said."""

    def __init__(self, state: dict[str, np.ndarray], d: int):
        super().__init__(state)
        self.d = d

    def linear(self, name: str, n_in: int | None = None, n_out: int | None = None, *, bias: bool = True) -> Params:
        return super().linear(name, n_in or self.d, n_out or self.d, bias=bias)

    def norm(self, name: str) -> Params:
        return self.affine(name, self.d)

    def attention(self, name: str) -> Params:
        weights = np.split(self.take(f"{name}.in_proj_weight", (3 * self.d, self.d)), 3)
        biases = np.split(self.take(f"{name}.in_proj_bias", (3 * self.d,)), 3)
        inputs = {
            part: {"kernel": w.T, "bias": b}
            for part, w, b in zip(("query", "key", "value"), weights, biases, strict=True)
        }
        return inputs | {"output": self.linear(f"{name}.out_proj")}

    def feedforward(self, first: str, second: str) -> Params:
        return {"Dense_0": self.linear(first, n_out=4 * self.d), "Dense_1": self.linear(second, n_in=4 * self.d)}

    def graph_layer(self, at: str) -> Params:
        return {
            "attention": self.attention(f"{at}.cross_attn"),
            "norm_attention": self.norm(f"{at}.norm1"),
            "norm_feedforward": self.norm(f"{at}.norm2"),
            "hidden": self.linear(f"{at}.linear1", n_out=4 * self.d),
            "output": self.linear(f"{at}.linear2", n_in=4 * self.d),
        }

    def differential_attention(self, at: str, n_heads: int) -> Params:
        width = self.d // n_heads
        return {
            **{f"query_{i}": self.linear(f"{at}.q_proj_{i}", bias=False) for i in (1, 2)},
            **{f"key_{i}": self.linear(f"{at}.k_proj_{i}", bias=False) for i in (1, 2)},
            "value": self.linear(f"{at}.v_proj", bias=False),
            "output": self.linear(f"{at}.out_proj", bias=False),
            **{f"lambda_{name}": self.take(f"{at}.lambda_{name}", (width,)) for name in ("q1", "k1", "q2", "k2")},
            "head_scale": self.take(f"{at}.subln.weight", (width,)),
        }

    def differential(self, at: str, n_heads: int) -> Params:
        return {
            "attention": self.differential_attention(f"{at}.attn", n_heads),
            "modulation": self.linear(f"{at}.adaLN_modulation.1", n_out=6 * self.d),
            "feedforward": self.feedforward(f"{at}.mlp.fc1", f"{at}.mlp.fc2"),
        }

    def perceiver(self, at: str) -> Params:
        return {
            "norm_cross": self.norm(f"{at}.ln_z1"),
            "norm_self": self.norm(f"{at}.ln_z2"),
            "norm_feedforward": self.norm(f"{at}.ln_z3"),
            **{ours: self.linear(f"{at}.{ours[0]}") for ours in ("query", "key", "value")},
            **{f"{ours}_self": self.linear(f"{at}.{ours[0]}2") for ours in ("query", "key", "value")},
            "cross_attention": self.attention(f"{at}.cross"),
            "self_attention": self.attention(f"{at}.self_attn"),
            "modulation": self.linear(f"{at}.adaLN_modulation.1", n_out=6 * self.d),
            "feedforward": self.feedforward(f"{at}.mlp.0", f"{at}.mlp.2"),
        }

    def value_encoder(self, at: str) -> Params:
        mlp = {"Dense_0": self.linear(f"{at}.linear1", n_in=1), "Dense_1": self.linear(f"{at}.linear2")}
        return {"mlp": mlp, "LayerNorm_0": self.norm(f"{at}.norm")}

    def layer(self, i: int, config: Config) -> Params:
        layer = {
            "gene_modulation": self.linear(f"gene_adaLN.{i}.adaLN_modulation.1", n_out=3 * self.d),
            "gene_norm": self.norm(f"gene_adaLN.{i}.norm"),
            "adapter": self.linear(f"adapter_layer.{i}.0", n_in=2 * self.d),
            "adapter_output": self.linear(f"adapter_layer.{i}.3"),
        }
        if config.fusion == "perceiver":
            return layer | {"perceiver": self.perceiver(f"blocks.{i}")}
        if config.fusion == "differential_transformer":
            return layer | {"second": self.differential(f"blocks.{i}", config.n_heads)}
        return layer | {
            "first": self.differential(f"blocks.{i}.diff_self_attn", config.n_heads),
            "second": self.differential(f"blocks.{i}.diff_cross_attn", config.n_heads),
        }


def _network(read: Reader, config: Config) -> Params:
    d = config.d_model
    params: Params = {
        "time": {
            "mlp": {"Dense_0": read.linear("t_embedder.mlp.0", n_in=256), "Dense_1": read.linear("t_embedder.mlp.2")}
        },
        "tokens": {
            "embedding": read.take("encoder.embedding.weight", (config.n_tokens or 0, d)),
            "norm": read.norm("encoder.enc_norm"),
            "layer": read.graph_layer("encoder.perturbation_interaction"),
        },
        "value_state": read.value_encoder("value_encoder_1"),
        "value_control": read.value_encoder("value_encoder_2"),
        "fusion": {
            "joined": read.linear("fusion_layer.0", n_in=2 * d),
            "output": read.linear("fusion_layer.2"),
            "norm": read.norm("fusion_layer.3"),
        },
        "velocity_head": {
            "joined": read.linear("final_layer.fc.0", n_in=2 * d),
            "hidden": read.linear("final_layer.fc.2"),
            "output": read.linear("final_layer.fc.4", n_out=1),
        },
        **{f"layer_{i}": read.layer(i, config) for i in range(config.n_layers)},
    }
    table, head, mask = "perturbation_embedder", "p_head", "p_mask_embed"
    if config.perturbation == "table":
        params["perturbations"] = {
            "embedding": read.take(f"{table}.embedding.weight", (config.n_perturbations or 0, d)),
            "norm": read.norm(f"{table}.enc_norm"),
        }
    else:
        read.leave(f"{table}.embedding.weight", (None, d), config.n_tokens)
        for part in ("weight", "bias"):
            read.leave(f"{table}.enc_norm.{part}", (d,))
    if config.objective == "perturbation":
        params["perturbation_head"] = {"LayerNorm_0": read.norm(f"{head}.0"), "Dense_0": read.linear(f"{head}.1")}
    else:
        for part, shape in (("0.weight", (d,)), ("0.bias", (d,)), ("1.weight", (d, d)), ("1.bias", (d,))):
            read.leave(f"{head}.{part}", shape)
    if config.objective == "perturbation" or config.condition_dropout > 0:
        params["mask"] = read.take(mask, (d,))
    else:
        read.leave(mask, (d,))
    return params
