"""Predictions of populations, whatever model makes them: what a user asks for, in one form, and what came of it."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from jaxtyping import Float

from scjax.check import column, suggestion
from scjax.config import from_dict
from scjax.data.conditions import dose_of
from scjax.data.source import open_source
from scjax.data.spec import AnnData, DataSpec
from scjax.types import Population

__all__ = [
    "asked_conditions",
    "brought_vectors",
    "cells_of",
    "check_vectors",
    "generation_of",
    "number_of",
    "predicted_cells",
    "unseen_parts",
]


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


def check_vectors(spec: DataSpec, parts: Iterable[str], known: Iterable[str], brought: Iterable[str]) -> None:
    """Raises ValueError for the first part without a vector, in the checkpoint or brought: what to bring, and how."""
    known = set(known)
    for part in parts:
        if part not in known:
            drug = part if spec.vector_dose == "name" else dose_of(part)[0]
            some = len(set(brought))
            raise ValueError(
                f"perturbation {part!r} is not known to the model: it was in no training population, and there is no "
                f"vector of {drug!r} in the checkpoint, nor in adata.uns[{spec.vectors!r}], "
                f"{f'which has {some} others' if some else 'which is not there'}."
                f"{suggestion(drug, {*known, *brought})} "
                "Bring a table that has it (data.embeddings.attach; --vectors FILE of `scjax predict`), or let another "
                "stand for it by on_unknown='mean' or 'nearest'."
            )


def unseen_parts(spec: DataSpec, trained: Iterable[str], asked: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """What of the asked conditions training never saw and only vectors tell: by the name, in words.

    Args:
        trained: the names in the populations of training.
        asked: conditions, in parts.
    """
    trained, found = set(trained), {}
    doses: dict[str, list[float]] = {}
    for name in trained:
        drug, dose = dose_of(name)
        if dose is not None:
            doses.setdefault(drug, []).append(dose)
    for part in sorted({part for parts in asked for part in parts} - trained):
        drug, dose = dose_of(part)
        seen = sorted(doses.get(drug, ())) if spec.vector_dose != "name" and dose is not None else []
        if dose is None or not seen:
            found[part] = "in no training population: told by its vector alone"
        elif dose < seen[0] or dose > seen[-1]:
            found[part] = f"extrapolated: training saw {drug} at doses from {seen[0]:g} to {seen[-1]:g}"
        else:
            below, above = max(d for d in seen if d < dose), min(d for d in seen if d > dose)
            found[part] = f"interpolated between the trained doses {below:g} and {above:g} of {drug}"
    return found


def cells_of(
    trained: Any, adata: AnnData, populations: Iterable[Population]
) -> dict[Population, Float[np.ndarray, "_cells genes"]]:
    """All cells of these populations in the model's space. `spec.check(adata)` is the caller's.

    Raises:
        ValueError: a population without cells.
    """
    known, population_of = trained.spec.read_populations(adata)
    source = open_source(adata, trained.spec)
    found = {}
    for population in populations:
        if population not in known:
            raise ValueError(f"adata has no cells of {population}.{suggestion(population, known)}")
        rows = source.rows(np.flatnonzero(population_of == known.index(population)))
        found[population] = trained.transform.apply(rows, source.feature_names)
    return found


def number_of(population: Population) -> int:
    """For random streams: the same for a name wherever and whenever it is asked for."""
    name = json.dumps([population.perturbation, population.context])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) >> 1


def predicted_cells(
    trained: Any, predicted: AnnData, populations: Iterable[Population], genes: Sequence[str] | None = None
) -> dict[Population, Float[np.ndarray, "_cells genes"]]:
    """The cells of these populations in an AnnData such as `predict` gives, whoever made it.

    X is taken as it is, so that it must be in the model's space: log-normalised expression of the kept genes (or of
    `genes`), in any order and among others. obs has the columns condition (in any spelling that the run understands)
    and context.

    Raises:
        ValueError: a column or a gene that is missing, a population without cells.
    """
    genes = list(trained.genes if genes is None else genes)
    for name in ("condition", "context"):
        column(name, name, predicted.obs, "predicted.obs")
    missing = [name for name in genes if name not in predicted.var_names]
    if missing:
        raise ValueError(
            f"predicted must have the {len(genes)} genes of the model; "
            f"{len(missing)} are missing, the first is {missing[0]!r}."
        )
    x = predicted[:, genes].X
    x = np.asarray(x.toarray() if hasattr(x, "toarray") else x, np.float32)
    spelled = {name: trained.spec.parse_condition(name) for name in predicted.obs["condition"].unique()}
    rows: dict[Population, list[int]] = {}
    for i, (name, context) in enumerate(zip(predicted.obs["condition"], predicted.obs["context"], strict=True)):
        rows.setdefault(Population(spelled[name], str(context)), []).append(i)
    found = {}
    for population in populations:
        if population not in rows:
            raise ValueError(f"predicted has no cells of {population}.{suggestion(population, rows)}")
        found[population] = x[rows[population]]
    return found


def generation_of(predicted: AnnData, cls: type) -> tuple[Any, dict[str, str]]:
    """How `predict` made these cells, as a `cls`, and what stood for names it did not know; (None, {}) of what others
    made.
    """
    told = predicted.uns.get("scjax")
    if told is None:
        return None, {}
    values = {f.name: np.asarray(told[f.name]).item() for f in fields(cls)}
    return from_dict(cls, values), json.loads(told["replaced"])
