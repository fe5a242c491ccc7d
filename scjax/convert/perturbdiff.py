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
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from scjax.convert.state import checked, shape_of
from scjax.models.perturbdiff import Config, Constants, roles
from scjax.types import Params

__all__ = ["config_from_torch", "constants_from_torch", "left_out", "params_from_torch", "spaces_from_torch"]

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
    return Config(**(found | known))


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
    if config.attention != "features":
        raise ValueError("attention='tokens' has matrices that the reference lacks; take 'features'.")
    reader = Reader(checked(state), config)
    params = {
        "time": reader.time(),
        "covariates": reader.covariates(),
        "condition": reader.condition(),
        "inputs": reader.inputs(spaces_from_torch(state)),
        **{
            f"layer_{i}": reader.layer(f"model.blocks.{i}.block", i == config.n_layers - 1)
            for i in range(config.n_layers)
        },
        "head": reader.head("model.final_layer"),
    }
    reader.constants()  # these tensors have their place, too
    dead = left_out(config)
    over = {k: v for k, v in reader.left.items() if not any(re.fullmatch(pattern, k) for pattern in dead)}
    misfits = [*reader.misfits, *(f"{name} {value.shape} has no place in this config" for name, value in over.items())]
    if misfits:
        raise ValueError("the state dict does not fit the config:\n  " + "\n  ".join(misfits))
    return params


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
    last = rf"model\.blocks\.{config.n_layers - 1}\.block"
    return {
        r"model\.control_final_layer\..*": "a head whose output nothing reads",
        last + r"\.control_mlp\..*": "the control stream ends with the last layer's attention",
        r"model\.gene_embedding\.(gene_embedding|layer_norm)\..*": "gene embeddings are never given to the network",
        r"cov_encoder\.dose_indices": "the dose of each perturbation: ids of the data, not parameters",
    }


class Reader:
    """Takes tensors by name, and remembers what did not fit."""

    def __init__(self, state: dict[str, np.ndarray], config: Config):
        self.left, self.misfits, self.config, self.d = state, [], config, config.d_model

    def take(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """The tensor; None in the shape stands for any size."""
        wanted = tuple(size or 1 for size in shape)
        if name not in self.left:
            self.misfits.append(f"{name} is missing; wanted the shape {shape}")
            return np.zeros(wanted, np.float32)
        value = np.asarray(self.left.pop(name))
        if len(value.shape) != len(shape) or any(
            s not in (None, got) for s, got in zip(shape, value.shape, strict=True)
        ):
            self.misfits.append(f"{name} has the shape {value.shape}; wanted {shape}")
            return np.zeros(wanted, value.dtype)  # so that the reading goes on, and lists what else is wrong
        return value

    def linear(self, name: str, n_in: int | None, n_out: int | None, keep: int | None = None) -> Params:
        """A layer, or its first `keep` outputs."""
        kernel, bias = self.take(f"{name}.weight", (n_out, n_in)).T, self.take(f"{name}.bias", (n_out,))
        return {"kernel": kernel[:, :keep], "bias": bias[:keep]}

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
            "state": np.stack([layer["kernel"][:g] for layer in cells]),
            "previous": np.stack([layer["kernel"][g:] for layer in cells]),
            "bias": np.stack([layer["bias"] for layer in cells]),
            "control": np.stack([layer["kernel"][:g] for layer in controls]),
            "control_bias": np.stack([layer["bias"] for layer in controls]),
            "gene": self.take("model.gene_embedding.null_emb.weight", (1, self.d))[0],
        }

    def attention(self, at: str, last: bool) -> Params:
        width = 2 * self.d // self.config.n_heads
        return {
            "joined": self.linear(f"{at}.qkv", 2 * self.d, 6 * self.d),
            "query_norm": {"scale": self.take(f"{at}.q_norm.weight", (width,))},
            "key_norm": {"scale": self.take(f"{at}.k_norm.weight", (width,))},
            "output": self.linear(f"{at}.proj", 2 * self.d, 2 * self.d, self.d if last else None),
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
            "control_modulation": self.linear(control, d, 6 * d, 2 * d if last else None),
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
                encoders[role] = {"embedding": self.take(f"{name}.weight", (None, d))[:1]}
        return encoders

    def constants(self, at: str = "cov_encoder") -> Constants:
        c, tables = self.config, {}
        for role, n_features in (("perturbation", c.n_perturbation_features), ("cell_type", c.n_cell_type_features)):
            if getattr(c, role) == "vector":
                name = f"{_encoder_of(role, c.n_doses is not None, at)}.0.weight"
                tables[f"{role}_vectors"] = jnp.asarray(self.take(name, (None, n_features)))
        return Constants(**tables)


def _encoder_of(role: str, has_doses: bool, at: str = "cov_encoder") -> str:
    """Where the reference keeps a covariate's encoder; a perturbation with doses is called a drug."""
    if role == "dose":
        return f"{at}.dose_encoder"
    return f"{at}.drug_encoder" if role == "perturbation" and has_doses else f"{at}.{_ENCODERS[role]}"
