"""Several runs of one experiment, with other seeds, as one predictor of means: their mean, and how far they part.

The spread of runs is what training leaves open: another seed, another mean. It is not the error of the model, which all
runs may share; `experiment.predict_intervals` measures that on conditions that training did not see.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scjax.check import at_least
from scjax.data.spec import AnnData
from scjax.predict import Trained, load, observed_cells, predicting
from scjax.predict import cellsets as of_cellsets
from scjax.predict.cellsets import TrainedCellSets
from scjax.predict.timeseries import TrainedTimeSeries
from scjax.types import Params, Population

__all__ = ["load_members", "observed_means", "observed_populations", "populations_of", "predict_means", "stacked"]


def load_members(runs: Sequence[str | Path]) -> tuple[Trained, ...]:
    """The newest checkpoint of each run, in order.

    Raises:
        ValueError: as `load`; no run, one that is named twice, runs that differ in more than their seed.
    """
    at_least("the number of runs", len(runs), 1)
    members = tuple(load(run) for run in runs)
    names = [member.about["run"] for member in members]
    first = members[0]
    for i, (run, member) in enumerate(zip(runs, members, strict=True)):
        if names[i] in names[:i]:
            raise ValueError(f"runs must differ; {run} is {runs[names.index(names[i])]} once more.")
        for what, mine, theirs in (
            ("settings", _settings(first), _settings(member)),
            ("split", first.about["split"], member.about["split"]),
            ("genes", first.transform.feature_names, member.transform.feature_names),
        ):
            if mine != theirs:
                raise ValueError(
                    f"runs must be of one experiment, with other seeds; {run} has another {what} than {runs[0]}."
                )
    return members


def stacked(members: Sequence[Trained]) -> Params:
    """The parameters of all members, each array with a leading axis for them: what `jax.vmap` maps over.

    jax.vmap(sample, in_axes=(0, None, ...))(stacked(members), source, ...) is all members' cells from one program.
    """
    at_least("the number of members", len(members), 1)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(member.params for member in members))


def predict_means(members: Sequence[Trained], adata: AnnData, wanted: Iterable[Any], **options: Any) -> AnnData:
    """The mean of the predicted cells of each condition and context, or time, over cells and then over members.

    Members are asked one after the other, through one compiled program, with the same control cells and noise (the seed
    is an option of `predict`): in memory there are the cells of one condition and member.

    Args:
        members: of `load_members`.
        wanted, options: as for `predict`.

    Returns:
        One row a condition and context, or time. X: the mean, float32[rows, genes], in the space of `predict`; obs:
        condition and context, or the time, and n_cells of each member. Of two members or more also layers["sd"],
        between members (denominator members - 1), and layers["lowest"], layers["highest"], the least and the largest
        member: if nothing but the seed differs, the mean of a further run lies between them with chance
        (members - 1) / (members + 1). uns["scjax"] as of `predict`, with the runs and steps of all members.

    Raises:
        ValueError: as `predict`, or no member.
    """
    import anndata
    import pandas as pd

    at_least("the number of members", len(members), 1)
    columns = [members[0].spec.time] if isinstance(members[0], TrainedTimeSeries) else ["condition", "context"]
    by = columns if len(columns) > 1 else columns[0]
    wanted = list(wanted) if not isinstance(wanted, str) else wanted
    of_members, n_cells, about = [], {}, {}
    for member in members:
        made = predicting(member, adata, wanted, **options)
        sums: dict[Any, np.ndarray] = {}
        n_cells, about, genes = {}, made.uns["scjax"], made.genes
        for part in made.parts():
            for key, rows in part.obs.groupby(by, sort=False, observed=True).indices.items():
                sums[key] = sums.get(key, 0.0) + part.x[rows].sum(axis=0, dtype=np.float64)
                n_cells[key] = n_cells.get(key, 0) + len(rows)
        of_members.append(np.stack([total / n_cells[key] for key, total in sums.items()]))
    means = np.stack(of_members)
    obs = pd.DataFrame([key if isinstance(key, tuple) else (key,) for key in n_cells], columns=columns)
    obs["n_cells"] = list(n_cells.values())
    obs.index = [" ".join(map(str, row)) for row in obs[columns].itertuples(index=False)]
    layers = {}
    if len(members) > 1:
        layers = {"sd": means.std(axis=0, ddof=1), "lowest": means.min(axis=0), "highest": means.max(axis=0)}
    return anndata.AnnData(
        X=means.mean(axis=0).astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=list(genes)),
        layers={name: values.astype(np.float32) for name, values in layers.items()},
        uns={
            "scjax": {name: value for name, value in about.items() if name not in ("run", "step")}
            | {
                "runs": json.dumps([member.about["run"] for member in members]),
                "steps": json.dumps([member.step for member in members]),
            }
        },
    )


def populations_of(members: Sequence[Trained], means: AnnData) -> list[Population]:
    """What the rows of `predict_means` are, for models of perturbations.

    Raises:
        ValueError: members of a time series.
    """
    if isinstance(members[0], TrainedTimeSeries):
        raise ValueError("members must be of perturbations; the rows of a time series are times.")
    parse = members[0].spec.parse_condition
    return [Population(parse(c), str(x)) for c, x in zip(means.obs["condition"], means.obs["context"], strict=True)]


def observed_populations(
    members: Sequence[Trained], adata: AnnData, populations: Sequence[Population]
) -> dict[Population, Float[np.ndarray, "_cells genes"]]:
    """Their cells of `adata`, in the space of `predict` and of all kept genes.

    Raises:
        ValueError: a population without cells in `adata`, bad values among them.
    """
    look: Any = of_cellsets.observed_cells if isinstance(members[0], TrainedCellSets) else observed_cells
    return look(members[0], adata, populations)


def observed_means(members: Sequence[Trained], adata: AnnData, means: AnnData) -> Float[np.ndarray, "rows genes"]:
    """The mean of the cells of `adata` in each row of `means`, in the same space; the truth, where it is known.

    Raises:
        ValueError: as `populations_of`; a population without cells in `adata`.
    """
    first: Any = members[0]  # a run of a time series is refused next
    populations = populations_of(members, means)
    place = {name: i for i, name in enumerate(first.genes)}
    columns = [place[name] for name in means.var_names]
    found = observed_populations(members, adata, populations)
    return np.stack([found[p].mean(axis=0, dtype=np.float64)[columns] for p in populations])


def _settings(trained: Trained) -> dict[str, Any]:
    return {name: value for name, value in trained.about["experiment"].items() if name != "seed"}
