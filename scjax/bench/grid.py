"""What `scjax bench` runs: data sets with their splits, systems with their settings, and every pair that makes sense.

A data set that a folder holds is known by its file's name (`IN_FOLDER`); a variant of a system is a function from a
problem (data set and split) to an experiment, one line in `VARIANTS`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scjax.check import at_least, one_of
from scjax.data import datasets
from scjax.data.preprocess import Preprocess, preprocess_for
from scjax.data.source import read_anndata
from scjax.data.spec import AnnData, DataSpec
from scjax.data.splits import HoldOutSeenDoubles, LeaveOut, each_interior
from scjax.experiment import Experiment
from scjax.presets import preset

__all__ = [
    "IN_FOLDER",
    "SHIPPED",
    "SYSTEMS",
    "VARIANTS",
    "Cell",
    "DataSet",
    "Problem",
    "Variant",
    "make_grid",
    "shortened",
]

SYSTEMS = ("scimf", "scdfm", "perturbdiff")
_MOST_CELLS = 5000  # of a time: exact transport, which a baseline needs, takes no more


class DataSet(NamedTuple):
    """How a real data set is used.

    Attributes:
        read: what `read_anndata` or `scjax.data.datasets` gives, made ready.
        splits: of those cells, the rules by name.
        spec: what the parts of the AnnData mean; for perturbations the preset's own is taken, None here.
        preprocess: of a time series, to its space of 10 dimensions or fewer.
        n_dims: of that space.
    """

    name: str
    ready: Callable[[AnnData], AnnData]
    splits: Callable[[AnnData], dict[str, Any]]
    spec: DataSpec | None = None
    preprocess: Preprocess | None = None
    n_dims: int = 10


class Problem(NamedTuple):
    """A data set with one of its splits.

    Attributes:
        rule: of the split.
        times: of a time series, in its unit; () of perturbations.
    """

    data: DataSet
    split: str
    rule: Any
    times: tuple[float, ...]


class Variant(NamedTuple):
    """Settings of a system.

    Attributes:
        experiment: for a problem; None where the system has no answer to it.
        about: where the settings come from.
    """

    experiment: Callable[[Problem], Experiment | None]
    about: str


class Cell(NamedTuple):
    """One line of the grid: a system with some settings on one split of one data set."""

    system: str
    variant: str
    data: str
    split: str
    experiment: Any
    adata: Any
    about: str
    n_times: int

    @property
    def name(self) -> str:
        return f"{self.system}/{self.variant}/{self.data}/{self.split}"

    @property
    def file_stem(self) -> str:
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", self.name)


def make_grid(
    folder: Path | None = None,
    *,
    systems: Sequence[str] = SYSTEMS,
    only: Sequence[str] = (),
    n_steps: int | None = None,
) -> tuple[list[Cell], list[str]]:
    """All cells, and the files of the folder that are not known.

    Args:
        folder: of further data sets; one that also ships is taken from there.
        systems: of `SYSTEMS`.
        only: patterns of cells' names, such as "scimf/*/klein/*"; () takes all.
        n_steps: of every training, in place of its own; to try things out.

    Raises:
        ValueError: no such folder or system, a pattern that fits no cell.
    """
    for system in systems:
        one_of("systems", system, SYSTEMS)
    if n_steps is not None:
        at_least("n_steps", n_steps, 1)
    found, unknown = {data.name: (data, data.ready(read())) for data, read in SHIPPED}, []
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"data must be a folder of .h5ad files; there is no folder {folder}.")
        for path in sorted(folder.glob("*.h5ad")):
            if path.stem not in IN_FOLDER:
                unknown.append(path.name)
                continue
            data = IN_FOLDER[path.stem]
            found[data.name] = (data, data.ready(read_anndata(path)))
    cells = []
    for data, adata in found.values():
        times = () if data.spec is None else tuple(map(float, np.unique(data.spec.read_times(adata))))
        for split, rule in data.splits(adata).items():
            problem = Problem(data, split, rule, times)
            for system in systems:
                for name, variant in VARIANTS[system].items():
                    experiment = variant.experiment(problem)
                    if experiment is not None:
                        if n_steps is not None:
                            experiment = shortened(experiment, n_steps)
                        about = (adata, variant.about, len(times))
                        cells.append(Cell(system, name, data.name, split, experiment, *about))
    names = [cell.name for cell in cells]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"only: {pattern!r} fits no cell of the grid; these are {', '.join(names)}.")
    return [c for c in cells if not only or any(fnmatchcase(c.name, pattern) for pattern in only)], unknown


def shortened(experiment: Experiment, n_steps: int) -> Experiment:
    """The same with another number of steps, and what depends on it."""
    optimizer = replace(experiment.optimizer, n_warmup=min(experiment.optimizer.n_warmup, n_steps - 1))
    scan_steps = next(n for n in range(min(experiment.scan_steps, n_steps), 0, -1) if n_steps % n == 0)
    return replace(experiment, optimizer=optimizer, n_steps=n_steps, scan_steps=scan_steps, checkpoint_every=n_steps)


# ---------------------------------------------------------------- data sets

_LOGGED = DataSpec(space="lognormalised", time="time")
_LATENT = DataSpec(space="latent", time="time")
_PCS = Preprocess(library_size=None, log1p=False, scale=False, n_components=10)


def _as_it_is(adata: AnnData) -> AnnData:
    return adata


def _in_units_of(unit: float) -> Callable[[AnnData], AnnData]:
    """Hours are so short beside a stage that a solver of days would make hundreds of steps."""

    def ready(adata: AnnData) -> AnnData:
        adata = adata.copy()
        adata.obs["time"] = adata.obs["time"].to_numpy(np.float64) / unit
        return adata

    return ready


def _b_cells(adata: AnnData) -> AnnData:
    """The first 10 components, without the outliers, in quarters of a day."""
    return _in_units_of(6.0)(adata[~adata.obs["outlier"].to_numpy(bool), :10])


def _fewer(adata: AnnData) -> AnnData:
    """At most `_MOST_CELLS` cells of a time, in the order of the file."""
    rng, time = np.random.default_rng(0), adata.obs["time"].to_numpy()
    rows = [rng.permutation(np.flatnonzero(time == t))[:_MOST_CELLS] for t in np.unique(time)]
    return adata[np.sort(np.concatenate(rows))].copy()


def _each_interior(adata: AnnData) -> dict[str, Any]:
    rules = each_interior(map(float, np.unique(adata.obs["time"])))
    return {f"time {rule.times[0]:g}": rule for rule in rules}


def _each_type(adata: AnnData) -> dict[str, Any]:
    types = sorted(set(map(str, adata.obs["cell_type"])))
    return {f"without {value}": LeaveOut(covariate="cell_type", value=value) for value in types}


def _series(name: str, spec: DataSpec, preprocess: Preprocess, ready: Any = _as_it_is, n_dims: int = 10) -> DataSet:
    return DataSet(name, ready, _each_interior, spec, preprocess, n_dims)


_NORMAN = DataSet("norman", _as_it_is, lambda _: {"combo_seen2": HoldOutSeenDoubles()})
_MCFALINE = DataSet("mcfaline", _as_it_is, _each_type)
_KANG = DataSet("kang", _as_it_is, _each_type)

SHIPPED: tuple[tuple[DataSet, Callable[[], AnnData]], ...] = (
    (
        _series("klein", DataSpec(space="counts", time="time"), replace(_PCS, library_size="all_genes", log1p=True)),
        datasets.klein2015,
    ),
    (_NORMAN, datasets.norman2019),
    (_MCFALINE, datasets.mcfaline2023),
)
# By the stem of the file. The spaces are those in which naive baselines were measured beside these files.
IN_FOLDER: Mapping[str, DataSet] = {
    "ts_emt_cook2020": _series("emt", _LATENT, preprocess_for("latent")),
    "ts_mesc_klein2015": _series("klein", _LOGGED, _PCS),
    "ts_hsmm_trapnell2014": _series("hsmm", _LOGGED, _PCS, _in_units_of(24.0)),
    "ts_bcell_stategra": _series("bcell", _LATENT, preprocess_for("latent"), _b_cells),
    "ts_embryo_guo2010": _series("guo", _LATENT, _PCS),  # normalised qPCR, also below zero
    "ts_larry2d_weinreb2020": _series("larry2d", _LATENT, preprocess_for("latent"), _fewer, 2),
    "ts_larry_weinreb2020_clones": _series("larry_clones", _LOGGED, _PCS),
    "ts_mef_schiebinger2019_subset": _series("mef", _LOGGED, _PCS),
    "pert_norman2019_subset": _NORMAN,
    "pert_mcfaline2023_subset": _MCFALINE,
    "pert_kang2018_ifnb": _KANG,
}


# ---------------------------------------------------------------- settings


def _time_series(problem: Problem, name: str) -> Experiment | None:
    """A preset on this series, in its space."""
    data = problem.data
    if not problem.times:
        return None
    found = preset(name).experiment
    model = replace(found.model, n_dims=data.n_dims)
    return replace(found, model=model, spec=data.spec, preprocess=data.preprocess, split=problem.rule)


def _scimf_paper(problem: Problem) -> Experiment | None:
    """The settings of the public code on 10 dimensions: 3000 steps of 512 cells, index time."""
    return _time_series(problem, "scimf/pancreas")


def _scimf_scjax(problem: Problem) -> Experiment | None:
    found = _time_series(problem, "scimf/series")
    return found and replace(found, preprocess=replace(found.preprocess, unit_variance=True))


def _scdfm_small(problem: Problem) -> Experiment | None:
    if problem.times:
        return None
    name = "scdfm/norman_subset" if problem.data is _NORMAN else "scdfm/kang"
    return replace(preset(name).experiment, split=problem.rule)


def _perturbdiff_small(problem: Problem) -> Experiment | None:
    """Not for combinations, to which its table of perturbations has no name."""
    if problem.times or problem.data is _NORMAN:
        return None
    return replace(preset(f"perturbdiff/{problem.data.name}").experiment, split=problem.rule)


_SMALL = "the small presets, which run on a CPU; chosen by hand with a look at held-out scores, so not blind to them"
VARIANTS: Mapping[str, Mapping[str, Variant]] = {
    "scimf": {
        "paper": Variant(_scimf_paper, "as the paper's code, on 10 dimensions"),
        "scjax": Variant(_scimf_scjax, "preset scimf/series, in units of the training cells' spread and mean gap"),
    },
    "scdfm": {"scjax": Variant(_scdfm_small, _SMALL)},
    "perturbdiff": {"scjax": Variant(_perturbdiff_small, _SMALL)},
}
