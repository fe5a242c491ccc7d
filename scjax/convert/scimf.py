"""scIMF state dicts of the PyTorch reference -> parameters and config of `models.scimf`.

| state dict                                           | parameters                                          |
|------------------------------------------------------|-----------------------------------------------------|
| drift_intra.net.net.linear1, linear2, ..., linear    | drift.intrinsic.hidden_0, hidden_1, ..., output     |
| drift_inter.trm_inter.<l>.norm1, Vnet                | drift.interaction_<l>.norm_query_key, norm_value    |
| drift_inter.trm_inter.<l>.norm2                      | drift.interaction_<l>.norm_feedforward              |
| drift_inter.trm_inter.<l>.attn.q_proj, k_proj, v_proj | drift.interaction_<l>.query, key, value            |
| drift_inter.trm_inter.<l>.fc1, fc2                   | drift.interaction_<l>.feedforward.hidden_0, output  |
| diffusion.sigma (constant)                           | config.sigma                                        |
| diffusion.sigma (trained)                            | diffusion.sigma                                     |
| diffusion.sigma._model.0, 2, ...                     | diffusion.mlp.hidden_0, hidden_1, ..., output       |
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from scjax.convert.state import Blank, Reader, checked, fill, remainder, shape_of
from scjax.models.scimf import Config
from scjax.types import Params

__all__ = ["config_from_torch", "left_over", "params_from_torch", "params_to_torch", "told_by", "untold"]


def config_from_torch(state: Mapping[str, np.ndarray], **known: Any) -> Config:
    """The config that a state dict's shapes tell.

    Args:
        state: arrays by their state-dict names.
        known: what shapes do not tell: n_heads, dt, dropout, and diffusion="learned" where diffusion.sigma is a
            trained vector (as a tensor it looks like the constant).

    Raises:
        ValueError: no scIMF state dict.
    """
    return Config(**(told_by(state, **known) | known))


def told_by(state: Mapping[str, np.ndarray], **known: Any) -> dict[str, Any]:
    """The fields of the config that a state dict tells, given those that are known."""
    state = checked(state)
    hidden = _numbered(state, r"drift_intra\.net\.net\.linear(\d+)\.weight")
    if not hidden or "drift_intra.net.net.linear.weight" not in state:
        raise ValueError(
            "the state dict is not one of scIMF: it lacks drift_intra.net.net.linear1.weight or "
            f"drift_intra.net.net.linear.weight. It has: {', '.join(sorted(state)) or 'nothing'}."
        )
    found: dict[str, Any] = {
        "n_dims": shape_of(state, "drift_intra.net.net.linear.weight", 2)[0],
        "intrinsic_widths": tuple(shape_of(state, f"drift_intra.net.net.linear{i}.weight", 2)[0] for i in hidden),
        "n_blocks": len(_numbered(state, r"drift_inter\.trm_inter\.(\d+)\.fc1\.weight")),
    }
    layers = _numbered(state, r"diffusion\.sigma\._model\.(\d+)\.weight")
    if layers:
        widths = [shape_of(state, f"diffusion.sigma._model.{i}.weight", 2)[0] for i in layers]
        found |= {"diffusion": "mlp", "diffusion_widths": tuple(widths[:-1])}
    elif known.get("diffusion", "constant") == "constant" and "diffusion.sigma" in state:
        values = np.unique(state["diffusion.sigma"])
        if len(values) != 1:
            raise ValueError(
                f"diffusion.sigma holds {len(values)} different values, so it is a trained vector: "
                'pass diffusion="learned".'
            )
        found |= {"diffusion": "constant", "sigma": float(values[0])}
    return found


def untold(config: Config) -> tuple[str, ...]:
    """Fields of the config that predictions depend on, and that names and shapes may not tell."""
    return ("n_heads", "diffusion", "dt", *(("sigma",) if config.diffusion == "constant" else ()))


def params_from_torch(state: Mapping[str, np.ndarray], config: Config) -> Params:
    """Parameters of `models.scimf`, all or nothing; dtypes are kept.

    Raises:
        ValueError: tensors missing, left over or of another shape than the config asks for; all of them are listed.
    """
    reader = Reader(checked(state))
    sigma = reader.left.get("diffusion.sigma")
    if config.diffusion == "constant" and sigma is not None and not np.allclose(sigma, config.sigma):
        reader.misfits.append(f"diffusion.sigma is not the constant config.sigma={config.sigma}")
    params = _network(reader, config)
    reader.finish()
    return params


def params_to_torch(
    params: Params, config: Config, *, originals: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The state dict of a reference model with these parameters: the way back of `params_from_torch`, bit for bit.

    The constant diffusion, which is no parameter, is config.sigma in every dimension; with `originals` it is theirs, or
    not there where they lack it.

    Raises:
        ValueError: parameters missing, left over or of another shape than the config asks for; all of them are listed.
            residual=True, which the reference would compute otherwise.
    """
    if config.residual:
        raise ValueError("residual=True is not what the reference would compute with these parameters.")
    return fill(partial(_blank, config=config), params, originals)


def left_over(state: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """What of a state dict `params_from_torch` leaves out: `originals` for the way back."""
    return remainder(partial(_blank, config=config), checked(state))


def _blank(tensors: Blank, config: Config) -> Params:
    return _network(Reader(tensors), config)


def _network(read: Reader, config: Config) -> Params:
    d = config.n_dims

    def mlp(names: list[str], widths: tuple[int, ...]) -> Params:
        sizes = (d, *widths, d)
        layers = [read.linear(n, i, o) for n, i, o in zip(names, sizes, sizes[1:], strict=False)]
        return {f"hidden_{i}": layer for i, layer in enumerate(layers[:-1])} | {"output": layers[-1]}

    intra = [f"drift_intra.net.net.linear{i + 1}" for i in range(len(config.intrinsic_widths))]
    drift: Params = {"intrinsic": mlp([*intra, "drift_intra.net.net.linear"], config.intrinsic_widths)}
    for block in range(config.n_blocks):
        at = f"drift_inter.trm_inter.{block}"
        drift[f"interaction_{block}"] = {
            "norm_query_key": read.affine(f"{at}.norm1", d),
            "norm_value": read.affine(f"{at}.Vnet", d),
            "norm_feedforward": read.affine(f"{at}.norm2", d),
            "query": read.linear(f"{at}.attn.q_proj", d, d, bias=False),
            "key": read.linear(f"{at}.attn.k_proj", d, d, bias=False),
            "value": read.linear(f"{at}.attn.v_proj", d, d, bias=False),
            "feedforward": mlp([f"{at}.fc1", f"{at}.fc2"], (4 * d,)),
        }
    params: Params = {"drift": drift}
    if config.diffusion == "mlp":
        names = [f"diffusion.sigma._model.{2 * i}" for i in range(len(config.diffusion_widths) + 1)]
        params["diffusion"] = {"mlp": mlp(names, config.diffusion_widths)}
    elif config.diffusion == "learned":
        params["diffusion"] = {"sigma": read.take("diffusion.sigma", (1, d))[0]}
    else:
        read.leave("diffusion.sigma", (1, d), value=config.sigma)
    return params


def _numbered(state: Mapping[str, np.ndarray], pattern: str) -> list[int]:
    return sorted(int(m.group(1)) for name in state if (m := re.fullmatch(pattern, name)))
