"""PerturbDiff state dicts of the PyTorch reference -> parameters, constants and config of `models.perturbdiff`.

| state dict                                                   | parameters                                          |
|--------------------------------------------------------------|-----------------------------------------------------|
| model.t_embedder.mlp.0, 2                                    | time.mlp.Dense_0, Dense_1                           |
| model.x_embedder (or .<data set>), two halves of its inputs  | inputs.state, previous, bias                        |
| model.x_control_embedder (or .<data set>), first half        | inputs.control, control_bias                        |
| model.gene_embedding.null_emb                                | inputs.gene                                         |
| model.class_embedding.emb, null_emb                          | condition.project, null                             |
| model.blocks.<l>.block.attn.qkv, q_norm, k_norm, proj        | layer_<l>.attention.joined, query_norm, ..., output |
| model.blocks.<l>.block.mlp, control_mlp: fc1, fc2            | layer_<l>.feedforward, control_feedforward          |
| model.blocks.<l>.block.adaLN_modulation.1, control_adaLN_... | layer_<l>.modulation, control_modulation            |
| model.final_layer.adaLN_modulation.1, linear                 | head.modulation, output                             |
| cov_encoder.pert_encoder, celltype_encoder, batch_encoder    | covariates.perturbation, cell_type, batch           |
| cov_encoder.drug_encoder, dose_encoder                       | covariates.perturbation, dose                       |
| cov_encoder.transform                                        | covariates.joined                                   |
| cov_encoder.pert_encoder.0, drug_encoder.0, celltype_encoder.0 | Constants                                         |

What has no effect on any prediction is left out, and `left_out` names it. Whatever else is left over is an error.

Ids: a table of perturbations ("table"), and ESM2's vectors, have the row 0 for "no perturbation" and the reference's
index + 1 for the others; the rows of GenePT and ChemBERTa vectors are the reference's indices themselves.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from scjax.convert import state as states
from scjax.convert.state import Blank, checked, fill, remainder, shape_of
from scjax.models.perturbdiff import Config, Constants, roles
from scjax.types import Params

__all__ = [
    "config_from_torch",
    "constants_from_torch",
    "left_out",
    "left_over",
    "params_from_torch",
    "params_to_torch",
    "spaces_from_torch",
    "told_by",
    "untold",
]

_ENCODERS = {"perturbation": "pert_encoder", "cell_type": "celltype_encoder", "batch": "batch_encoder"}


def config_from_torch(state: Mapping[str, np.ndarray], **known: Any) -> Config:
    """The config that a state dict's names and shapes tell.

    Args:
        state: arrays by their state-dict names.
        known: what they do not tell: perturbation="none" for a model that was pretrained without perturbations,
            class_silu, schedule, n_times, the chances of dropping, the weights of the loss, ...

    Raises:
        ValueError: no PerturbDiff state dict.
    """
    found = told_by(state, **known)
    return Config(**(found | known))


def told_by(state: Mapping[str, np.ndarray], **known: Any) -> dict[str, Any]:
    """The fields of the config that a state dict tells, given those that are known."""
    state = checked(state)
    needed = (
        "model.final_layer.linear.weight",
        "model.blocks.0.block.attn.q_norm.weight",
        "cov_encoder.transform.weight",
    )
    if missing := [name for name in needed if name not in state]:
        raise ValueError(
            f"the state dict is not one of PerturbDiff: it lacks {', '.join(missing)}. "
            f"It has: {', '.join(sorted(state)[:10]) or 'nothing'}{', ...' if len(state) > 10 else ''}."
        )
    n_genes, d = shape_of(state, needed[0], 2)
    width, _ = shape_of(state, needed[2], 2)
    (n_hidden,) = shape_of(state, "model.blocks.0.block.mlp.fc1.bias", 1)
    (head_width,) = shape_of(state, needed[1], 1)
    layers = {int(m.group(1)) for name in state if (m := re.match(r"model\.blocks\.(\d+)\.", name))}
    found: dict[str, Any] = {
        "n_genes": int(n_genes),
        "n_spaces": max(1, len(spaces_from_torch(state))),
        "d_model": int(d),
        "n_layers": len(layers),
        "n_heads": 2 * d // head_width,
        "mlp_ratio": float(n_hidden / d),
        "covariate_width": {int(d): "model", int(n_genes): "genes"}.get(int(width), int(width)),
        **_covariates_of(state),
    }
    if known.get("perturbation") == "none":
        found.pop("n_perturbations", None)
    return found


def untold(config: Config) -> tuple[str, ...]:
    """Fields of the config that predictions depend on, and that names and shapes may not tell."""
    return ("perturbation", "class_silu", "schedule", "n_times", "divisor", "condition_dropout")


def _covariates_of(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the covariate encoder's tensors tell."""
    found: dict[str, Any] = {}
    sizes = {
        "perturbation": ("n_perturbations", "n_perturbation_features"),
        "cell_type": ("n_cell_types", "n_cell_type_features"),
        "batch": ("n_batches", ""),
    }
    dose = "cov_encoder.dose_encoder.weight"
    has_doses = dose in state
    if has_doses:
        found["n_doses"] = shape_of(state, dose, 2)[0]
    for role, (rows, features) in sizes.items():
        at = _encoder_of(role, has_doses)
        if f"{at}.0.weight" in state:
            found |= {role: "vector", features: shape_of(state, f"{at}.0.weight", 2)[1]}
        elif f"{at}.weight" in state:
            found |= {role: "table", rows: shape_of(state, f"{at}.weight", 2)[0]}
        else:
            found |= {role: "none"}
    n_places = sum(found[role] != "none" for role in sizes) + has_doses
    return found | {"d_covariate": shape_of(state, "cov_encoder.transform.weight", 2)[1] // max(1, n_places)}


def spaces_from_torch(state: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The data sets that have input projections of their own, in the order of their ids; () where all share one."""
    names = (re.fullmatch(r"model\.x_embedder\.(\w+)\.weight", name) for name in state)
    return tuple(m.group(1) for m in names if m)


def params_from_torch(state: Mapping[str, np.ndarray], config: Config) -> Params:
    """Parameters of `models.perturbdiff`, all or nothing; dtypes are kept.

    Raises:
        ValueError: tensors missing, left over or of another shape than the config asks for; all of them are listed.
            attention="tokens", which the reference does not have.
    """
    _check_kind(config)
    reader = Reader(checked(state), config)
    params = reader.network(spaces_from_torch(state))
    reader.tables()  # these tensors have their place, too
    reader.finish()
    return params


def params_to_torch(
    params: Params,
    config: Config,
    *,
    constants: Constants | None = None,
    spaces: Sequence[str] = (),
    originals: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The state dict of a reference model with these parameters: the way back of `params_from_torch`, bit for bit.

    What no prediction depends on (`left_out`) comes from `originals`, which may lack some or all of it. Without
    originals it is there and zero; the projection of gene embeddings then has 5120 features, and the table of
    perturbation="none" one row, as nobody else knows how many the reference gave it.

    Args:
        constants: the frozen tables, where the config has external vectors.
        spaces: the names of the data sets that have input projections of their own, in the order of their ids.
        originals: a state dict of the reference model, or what `left_over` kept of it. It must be there for a model
            with doses: the dose of each perturbation is no parameter.

    Raises:
        ValueError: parameters missing, left over or of another shape than the config asks for; all of them are listed.
            Constants, spaces or originals missing; attention="tokens", which the reference does not have, or
            block="sequential", which it would compute otherwise.
    """
    _check_kind(config)
    if config.block != "parallel":
        raise ValueError(f"block={config.block!r} is not what the reference would compute with these parameters.")
    tables = {name: a for name, a in (constants or Constants())._asdict().items() if a is not None}
    wanted = {f"{role}_vectors" for role in ("perturbation", "cell_type") if getattr(config, role) == "vector"}
    if wanted != set(tables):
        raise ValueError(
            f"constants must have {' and '.join(sorted(wanted)) or 'no vectors'} for this config; they have "
            f"{' and '.join(sorted(tables)) or 'none'}."
        )
    if len(spaces) != (config.n_spaces if config.n_spaces > 1 else 0):
        raise ValueError(
            f"spaces must name the {config.n_spaces} data sets that have input projections of their own (none for one "
            f"that all share); got {tuple(spaces)}."
        )
    rows = {name.removesuffix("_vectors"): len(table) for name, table in tables.items()}
    read = partial(_blank, config=config, spaces=tuple(spaces), rows=rows)
    return fill(read, {"params": params, "constants": tables}, originals)


def left_over(state: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """What of a state dict `params_from_torch` and `constants_from_torch` leave out: `originals` for the way back."""
    return remainder(partial(_blank, config=config, spaces=spaces_from_torch(state), rows={}), checked(state))


def _check_kind(config: Config) -> None:
    if config.attention != "features":
        raise ValueError("attention='tokens' has matrices that the reference lacks; take 'features'.")


def _blank(tensors: Blank, config: Config, spaces: tuple[str, ...], rows: Mapping[str, int]) -> Params:
    reader = Reader(tensors, config)
    return {"params": reader.network(spaces), "constants": reader.tables(rows)}


def constants_from_torch(state: Mapping[str, np.ndarray], config: Config) -> Constants:
    """The frozen tables of a state dict.

    Raises:
        ValueError: a table that the config asks for is missing or has another number of features.
    """
    reader = Reader(checked(state), config)
    constants = reader.constants()
    if reader.misfits:
        raise ValueError("the state dict does not fit the config:\n  " + "\n  ".join(reader.misfits))
    return constants


def left_out(config: Config) -> dict[str, str]:
    """Regular expressions of the tensors that a reference model holds and no prediction depends on, and why.

    Of four more tensors a part is left out: of each x_control_embedder the half that is multiplied with zeros; of the
    last layer's attn.proj and control_adaLN_modulation the rows for the control stream, which ends there; and of the
    perturbation table, with perturbation="none", all rows but the first.
    """
    return {re.escape(name): why for name, _, _, why in _dead(config)}


def _dead(config: Config) -> list[tuple[str, tuple[int | None, ...], int | None, str]]:
    """Name, shape, size that the config does not tell, and why nothing depends on it."""
    d, n = config.d_model, config.n_hidden
    last = f"model.blocks.{config.n_layers - 1}.block.control_mlp"
    ends = "the control stream ends with the last layer's attention"
    head = "a head whose output nothing reads"
    given = "gene embeddings are never given to the network"
    return [
        *((f"model.control_final_layer.linear.{p}", shape, None, head) for p, shape in _pair(config.n_genes, d)),
        *((f"model.control_final_layer.adaLN_modulation.1.{p}", s, None, head) for p, s in _pair(2 * d, d)),
        *((f"{last}.fc1.{p}", shape, None, ends) for p, shape in _pair(n, d)),
        *((f"{last}.fc2.{p}", shape, None, ends) for p, shape in _pair(d, n)),
        *((f"model.gene_embedding.gene_embedding.{p}", s, 5120, given) for p, s in _pair(d, None)),
        *((f"model.gene_embedding.layer_norm.{p}", (d,), None, given) for p in ("weight", "bias")),
        (_DOSES, (None,), None, "the dose of each perturbation: ids of the data, not parameters"),
    ]


def _pair(n_out: int | None, n_in: int | None) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    return ("weight", (n_out, n_in)), ("bias", (n_out,))


_DOSES = "cov_encoder.dose_indices"


class Reader(states.Reader):
    """With the layers of this network."""

    def __init__(self, state: dict[str, np.ndarray], config: Config):
        super().__init__(state)
        self.config, self.d = config, config.d_model

    def network(self, spaces: tuple[str, ...]) -> Params:
        n = self.config.n_layers
        params = {
            "time": self.time(),
            "covariates": self.covariates(),
            "condition": self.condition(),
            "inputs": self.inputs(spaces),
            **{f"layer_{i}": self.layer(f"model.blocks.{i}.block", i == n - 1) for i in range(n)},
            "head": self.head("model.final_layer"),
        }
        for name, shape, unknown, _ in _dead(self.config):
            if name == _DOSES and self.config.n_doses is None:
                continue
            self.leave(name, shape, unknown, value=None if name == _DOSES else 0.0)
        return params

    def time(self, at: str = "model.t_embedder") -> Params:
        first, second = self.linear(f"{at}.mlp.0", 256, self.d), self.linear(f"{at}.mlp.2", self.d, self.d)
        return {"mlp": {"Dense_0": first, "Dense_1": second}}

    def condition(self, at: str = "model.class_embedding") -> Params:
        project = self.linear(f"{at}.emb", self.config.width_of_covariates, self.d)
        return {"project": project, "null": self.take(f"{at}.null_emb.weight", (1, self.d))[0]}

    def inputs(self, spaces: tuple[str, ...] = ()) -> Params:
        g = self.config.n_genes or 0
        if max(1, len(spaces)) != self.config.n_spaces:
            self.misfits.append(
                f"x_embedder is there for {len(spaces) or 1} data sets; the config has n_spaces={self.config.n_spaces}"
            )
        read = lambda name: [  # noqa: E731
            self.linear(f"model.{name}{suffix}", 2 * g, self.d) for suffix in [f".{s}" for s in spaces] or [""]
        ]
        cells, controls = read("x_embedder"), read("x_control_embedder")
        return {
            "state": self.stack([layer["kernel"][:g] for layer in cells]),
            "previous": self.stack([layer["kernel"][g:] for layer in cells]),
            "bias": self.stack([layer["bias"] for layer in cells]),
            "control": self.stack([layer["kernel"][:g] for layer in controls]),
            "control_bias": self.stack([layer["bias"] for layer in controls]),
            "gene": self.take("model.gene_embedding.null_emb.weight", (1, self.d))[0],
        }

    def attention(self, at: str, last: bool) -> Params:
        width = 2 * self.d // self.config.n_heads
        return {
            "joined": self.linear(f"{at}.qkv", 2 * self.d, 6 * self.d),
            "query_norm": {"scale": self.take(f"{at}.q_norm.weight", (width,))},
            "key_norm": {"scale": self.take(f"{at}.k_norm.weight", (width,))},
            "output": self.linear(f"{at}.proj", 2 * self.d, 2 * self.d, keep=self.d if last else None),
        }

    def feedforward(self, at: str) -> Params:
        n = self.config.n_hidden
        return {"Dense_0": self.linear(f"{at}.fc1", self.d, n), "Dense_1": self.linear(f"{at}.fc2", n, self.d)}

    def layer(self, at: str, last: bool) -> Params:
        d, control = self.d, f"{at}.control_adaLN_modulation.1"
        layer = {
            "attention": self.attention(f"{at}.attn", last),
            "feedforward": self.feedforward(f"{at}.mlp"),
            "modulation": self.linear(f"{at}.adaLN_modulation.1", d, 6 * d),
            "control_modulation": self.linear(control, d, 6 * d, keep=2 * d if last else None),
        }
        return layer if last else layer | {"control_feedforward": self.feedforward(f"{at}.control_mlp")}

    def head(self, at: str) -> Params:
        modulation = self.linear(f"{at}.adaLN_modulation.1", self.d, 2 * self.d)
        return {"modulation": modulation, "output": self.linear(f"{at}.linear", self.d, self.config.n_genes)}

    def covariates(self, at: str = "cov_encoder") -> Params:
        c, d = self.config, self.config.d_covariate
        places = roles(c, places=True)
        encoders: Params = {"joined": self.linear(f"{at}.transform", len(places) * d, c.width_of_covariates)}
        for role in places:
            name = _encoder_of(role, c.n_doses is not None, at)
            kind = "table" if role == "dose" else getattr(c, role)
            if kind == "vector":
                n_features = c.n_perturbation_features if role == "perturbation" else c.n_cell_type_features
                encoders[role] = self.linear(f"{name}.1", n_features, d)
            elif kind == "table":
                rows = {
                    "perturbation": c.n_perturbations,
                    "cell_type": c.n_cell_types,
                    "batch": c.n_batches,
                    "dose": c.n_doses,
                }
                encoders[role] = {"embedding": self.take(f"{name}.weight", (rows[role], d))}
            else:
                encoders[role] = {"embedding": self.take(f"{name}.weight", (None, d), c.n_perturbations or 1)[:1]}
        return encoders

    def tables(self, rows: Mapping[str, int] | None = None, at: str = "cov_encoder") -> dict[str, np.ndarray]:
        """The frozen tables; `rows` of them, where the tensors are empty."""
        c, found = self.config, {}
        for role, n_features in (("perturbation", c.n_perturbation_features), ("cell_type", c.n_cell_type_features)):
            if getattr(c, role) == "vector":
                name = f"{_encoder_of(role, c.n_doses is not None, at)}.0.weight"
                found[f"{role}_vectors"] = self.take(name, (None, n_features), (rows or {}).get(role))
        return found

    def constants(self, at: str = "cov_encoder") -> Constants:
        return Constants(**{name: jnp.asarray(table) for name, table in self.tables(at=at).items()})


def _encoder_of(role: str, has_doses: bool, at: str = "cov_encoder") -> str:
    """Where the reference keeps a covariate's encoder; a perturbation with doses is called a drug."""
    if role == "dose":
        return f"{at}.dose_encoder"
    return f"{at}.drug_encoder" if role == "perturbation" and has_doses else f"{at}.{_ENCODERS[role]}"
