"""What a user asks of a model of perturbations, in one form: conditions, their vectors, numbers of populations."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from scjax.data.spec import AnnData, DataSpec
from scjax.types import Population

__all__ = ["asked_conditions", "brought_vectors", "number_of"]


def asked_conditions(spec: DataSpec, conditions: Iterable[str]) -> list[tuple[str, ...]]:
    """In canonical form, each once.

    Raises:
        ValueError: a text instead of a list of them, two names of one condition, none at all.
    """
    if isinstance(conditions, str):
        raise ValueError(
            f"conditions must be a list of names; got the one text {conditions!r}. Write [{conditions!r}]."
        )
    spelled: dict[tuple[str, ...], str] = {}
    for name in conditions:
        names = spec.parse_condition(name)
        if names in spelled:
            raise ValueError(f"conditions must differ; {name!r} and {spelled[names]!r} are the same.")
        spelled[names] = name
    if not spelled:
        raise ValueError("conditions must name at least one condition; got none.")
    return list(spelled)


def brought_vectors(spec: DataSpec, adata: AnnData) -> dict[str, Any]:
    """Those of `adata`, where it brings any: a prediction needs them for new names only."""
    return spec.read_vectors(adata) if spec.vectors is not None and spec.vectors in adata.uns else {}


def number_of(population: Population) -> int:
    """For random streams: the same for a name wherever and whenever it is asked for."""
    name = json.dumps([population.perturbation, population.context])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) >> 1
