"""Whose weights a state dict holds: the system, its config, parameters and constants, told from names and shapes."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scjax.check import one_of
from scjax.config import from_dict
from scjax.convert import perturbdiff, scdfm, scimf
from scjax.convert.state import checked
from scjax.models import perturbdiff as perturbdiff_model
from scjax.models import scdfm as scdfm_model
from scjax.models import scimf as scimf_model
from scjax.types import Params

__all__ = ["SYSTEMS", "Weights", "from_torch", "system_of", "to_torch"]


class System(NamedTuple):
    """A system whose state dicts are known.

    Attributes:
        title: its name in tables.
        convert: of `scjax.convert`.
        model: of `scjax.models`.
        mark: how names begin in its state dicts, and in those of no other system.
    """

    title: str
    convert: ModuleType
    model: ModuleType
    mark: str


SYSTEMS = {
    "scimf": System("scIMF", scimf, scimf_model, "drift_intra."),
    "scdfm": System("scDFM", scdfm, scdfm_model, "encoder.perturbation_interaction."),
    "perturbdiff": System("PerturbDiff", perturbdiff, perturbdiff_model, "model.blocks."),
}


class Weights(NamedTuple):
    """What a state dict holds, as the functions of `scjax.models` take it.

    Attributes:
        system: "scimf", "scdfm" or "perturbdiff".
        config: of `scjax.models.<system>`.
        params: float32 arrays; what a file has in float64 is rounded.
        constants: PerturbDiff's frozen tables of vectors; None for the others. scDFM's gene graph is in no state dict.
        spaces: PerturbDiff's names of the data sets with input projections of their own.
        originals: what of the state dict has no place in the parameters, for the way back; None where they are of a
            training run.
        assumed: fields of the config that neither the state dict told nor the caller, with the published values that
            were taken.
    """

    system: str
    config: Any
    params: Params
    constants: perturbdiff_model.Constants | None
    spaces: tuple[str, ...]
    originals: dict[str, np.ndarray] | None
    assumed: dict[str, Any]


def from_torch(state: Mapping[str, np.ndarray], system: str | None = None, **known: Any) -> Weights:
    """A state dict's system, config and parameters, all or nothing.

    Args:
        state: arrays by their names, as `read_torch` gives them.
        system: "scimf", "scdfm" or "perturbdiff"; told by the names of the tensors unless given.
        known: fields of the config, where the state dict does not tell them or tells too little (`Weights.assumed` has
            those that were taken from the published settings): n_heads of scIMF and of scDFM's perceiver, scDFM's
            perturbation="table" for drugs, PerturbDiff's perturbation="none" for a pretrained model, ...

    Raises:
        ValueError: a state dict of no system, a field that the config does not have, tensors that are missing, left
            over, misshapen or not finite; all of them are listed.
    """
    state = checked(state)
    system = system_of(state) if system is None else system
    one_of("system", system, SYSTEMS)
    chosen = SYSTEMS[system]
    found = chosen.convert.told_by(state, **known)
    config = from_dict(chosen.model.Config, found | known)
    params = chosen.convert.params_from_torch(state, config)
    constants, spaces = None, ()
    if system == "perturbdiff":
        constants = jax.tree.map(_float32, chosen.convert.constants_from_torch(state, config))
        spaces = chosen.convert.spaces_from_torch(state)
    return Weights(
        system=system,
        config=config,
        params=jax.tree.map(_float32, params),
        constants=constants,
        spaces=spaces,
        originals=chosen.convert.left_over(state, config),
        assumed={name: getattr(config, name) for name in chosen.convert.untold(config) if name not in found | known},
    )


def to_torch(weights: Weights) -> dict[str, np.ndarray]:
    """The state dict of a model of the PyTorch program with these weights; see `params_to_torch` of each system.

    Raises:
        ValueError: parameters that do not fit the config, a config that the PyTorch program does not have.
    """
    one_of("system", weights.system, SYSTEMS)
    more: dict[str, Any] = {"originals": weights.originals}
    if weights.system == "perturbdiff":
        more |= {"constants": weights.constants, "spaces": weights.spaces}
    return SYSTEMS[weights.system].convert.params_to_torch(weights.params, weights.config, **more)


def system_of(state: Mapping[str, np.ndarray]) -> str:
    """The system that a state dict is of, by its names.

    Raises:
        ValueError: none of the systems, or marks of several.
    """
    found = [key for key, system in SYSTEMS.items() if any(name.startswith(system.mark) for name in state)]
    if len(found) != 1:
        marks = "; ".join(f"{system.title} has {system.mark}*" for system in SYSTEMS.values())
        what = "marks of several systems" if found else "of no system that is known here"
        raise ValueError(
            f"the state dict is {what} ({marks}). It has: {', '.join(sorted(state)[:10]) or 'nothing'}"
            f"{', ...' if len(state) > 10 else ''}."
        )
    return found[0]


def _float32(leaf: Any) -> Any:
    return jnp.asarray(np.asarray(leaf), jnp.float32)
