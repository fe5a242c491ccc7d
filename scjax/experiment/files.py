"""Tables of predictions of any origin: files of predicted cells beside the file of the real ones.

Nothing is guessed: a `DataSpec` says what the columns and the numbers mean. Cells stay as sparse as they lie in the
file; those of one population at a time become dense.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from scjax.check import at_least, column, one_of, suggestion
from scjax.data.conditions import trained_names
from scjax.data.leaks import check_split
from scjax.data.preprocess import Preprocess, Transform, fit
from scjax.data.source import read_anndata
from scjax.data.spec import LARGEST_LOG, AnnData, DataSpec, expression_matrix, feature_names
from scjax.data.splits import HoldOutNone, HoldOutTimes, PerturbationSplit, TimeSplit, load_split
from scjax.experiment import perturbation, timeseries
from scjax.experiment.evidence import Evidence, perturbation_evidence, pseudobulks, series_evidence
from scjax.experiment.held_out import by_unseen_axis
from scjax.metrics.baselines import training_free
from scjax.metrics.perturbation_report import DEFAULT_METRICS, perturbation_table
from scjax.metrics.population import MAX_EXACT, POPULATION_METRICS
from scjax.metrics.report import result_table
from scjax.types import Population

__all__ = ["Allowed", "evaluate_files"]

Allowed = Literal["nan", "negative"]

_CHUNK = 4096  # cells looked at together
_MOST_OF_A_TIME = 10_000  # cells of a time that its table, or a PCA, takes
_MOST_IN_A_DRAW = 2000  # of a time series, unless the caller says how many: exact transport of more takes seconds


def evaluate_files(
    predicted: Mapping[str, Sequence[AnnData | str | Path]],
    real: AnnData | str | Path,
    *,
    spec: DataSpec,
    predicted_spec: DataSpec | None = None,
    genes: str = "same",
    allow: Collection[str] = (),
    split: PerturbationSplit | TimeSplit | str | Path | None = None,
    training: tuple[str, str] | None = None,
    n_components: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    n_cells: int | None = None,
    n_draws: int = 5,
    seed: int = 0,
    provenance: Mapping[str, Any] = MappingProxyType({}),
    keep: list[Evidence] | None = None,
) -> list[Any]:
    """Predicted cells of any tool against real ones, beside training-free baselines and real against real.

    Perturbations give one table (and where populations are new in several ways one of each way besides), on
    log-normalised expression: counts are brought to 10,000 a cell and logged, predicted and real ones alike. The
    controls of both sides are the real ones; control cells among the predicted are counted and not used. A time
    series gives a table for each predicted time, in the space of `spec` (counts likewise logged).

    What the baselines may know is, in this order: the training part of `split`; the cells that the obs column of
    `training` marks; else all that `real` holds besides the predicted conditions or times. Control cells are training
    cells; in a context where the column marks none, all of them are. The provenance says which it was, and under
    "findings" what `data.leaks.check_split` finds in `real` so divided.

    Args:
        predicted: by the names of the rows, one file (or AnnData) for each training seed of a model.
        real: held-out and training cells.
        spec: what the parts of `real` mean; it names perturbations or times, not both.
        predicted_spec: of the predicted files, where their columns have other names; without one, `spec`.
        genes: "same" refuses files whose genes are not those of `real` (their order does not matter); "shared" compares
            the genes that all have, which the title says.
        allow: "nan", predicted cells with values that are not finite: they fail their population and are counted;
            "negative", predicted expression below zero, which is compared as it is.
        split: a split, or its JSON file. Its test part is compared, and must be predicted in full; what is predicted
            besides is not used, and counted.
        training: an obs column of `real` and the value that marks training cells.
        n_components: time series: compare in this many principal components of the real training cells, centred and
            not scaled, instead of in all features.
        metrics: by name; the usual ones of the kind unless given.
        n_cells: the most cells of a population in a draw; time series take 2000 at most unless given.
        n_draws: repeated draws of cells.
        seed: of the draws.
        provenance: more of it, for the JSON.
        keep: a list that gets the evidence of each table, for its figures.

    Raises:
        ValueError: what `DataSpec.check` finds in `real`; a missing column, other genes, NaN or negative values in a
            prediction (see `allow`), numbers that contradict `space`, a predicted condition or time that `real` lacks,
            predictions of unequal conditions, nothing left for the baselines, too few cells of a population.
    """
    one_of("genes", genes, ("same", "shared"))
    for one in allow:
        one_of("allow", one, get_args(Allowed))
    if not predicted:
        raise ValueError("predicted must name at least one model with its files; it is empty.")
    for name, of_row in predicted.items():
        if isinstance(of_row, str | Path) or not isinstance(of_row, Sequence) or not len(of_row):
            raise ValueError(
                f"predicted[{name!r}] must be a list of files or AnnData, one a seed; got {of_row!r:.200}."
            )
    if split is not None and training is not None:
        raise ValueError(f"split and training={training!r} both say what is training data; give one of them.")
    is_series = _is_series(spec)
    if not is_series and spec.space == "latent":
        raise ValueError(
            "space='latent', but perturbations are compared by expression: give 'lognormalised' values or 'counts'."
        )
    if n_components is not None:
        at_least("n_components", n_components, 1)
        if not is_series:
            raise ValueError(f"n_components={n_components} is of time series; perturbations are compared gene by gene.")
    theirs = replace(spec, vectors=None, cell_type_vectors=None) if predicted_spec is None else predicted_spec
    if _is_series(theirs) != is_series or theirs.space != spec.space:
        raise ValueError(
            f"predicted_spec must be of the kind and space of spec; got time={theirs.time!r}, perturbation="
            f"{theirs.perturbation!r}, space={theirs.space!r} beside {spec.time!r}, {spec.perturbation!r}, "
            f"{spec.space!r}."
        )
    if isinstance(split, str | Path):
        split = load_split(split)
    if split is not None and isinstance(split, TimeSplit) != is_series:
        raise ValueError(f"split must be of {'times' if is_series else 'populations'}; got {split!r:.200}")

    truth = _read(real, "real", spec, spec, allow=None, training=training)
    made = {
        name: [_read(one, f"predicted[{name!r}][{i}]", theirs, spec, allow=tuple(allow)) for i, one in enumerate(row)]
        for name, row in predicted.items()
    }
    left_out = _align(truth, [side for row in made.values() for side in row], genes)
    about = {
        **provenance,
        "data": {"digest": truth.digest, "n_cells": truth.n_cells, "file": truth.file},
        "predicted": {
            name: [{"digest": side.digest, "n_cells": side.n_cells, "file": side.file} for side in row]
            for name, row in made.items()
        },
        "space": spec.space,
        "genes": {"choice": genes, "n": len(truth.features), "left_out": left_out},
        "allowed": sorted(allow),
    }
    told = f"; {left_out} genes that not all files have are left out" if left_out else ""
    draws = {"n_draws": n_draws, "seed": seed}
    if is_series:
        use = POPULATION_METRICS if metrics is None else metrics
        return _series_tables(truth, made, split, spec, n_components, use, n_cells, draws, about, told, keep)  # pyright: ignore[reportArgumentType]
    use = DEFAULT_METRICS if metrics is None else metrics
    return _population_tables(truth, made, split, spec, use, n_cells, draws, about, told, keep)  # pyright: ignore[reportArgumentType]


@dataclass(eq=False)
class _Read:
    """A file, without what nobody asks it for.

    Attributes:
        name: for messages.
        rows: of the cells of each population, or of each time.
        marked: the rows that a column marks as training cells; None without such a column.
        adata: of the real file.
        vectors: of perturbations, those of the real file.
    """

    name: str
    file: str
    matrix: Any
    features: tuple[str, ...]
    rows: dict[Any, Int[np.ndarray, " _"]]
    digest: str
    marked: Int[np.ndarray, " _"] | None = None
    adata: AnnData | None = None
    vectors: Mapping[str, Any] | None = None
    columns: Int[np.ndarray, " _"] | None = None
    transform: Transform | None = None

    @property
    def n_cells(self) -> int:
        return int(self.matrix.shape[0])

    def cells(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n _dims"]:
        """Dense, in the space of the comparison."""
        x = self.raw(rows)
        return x if self.transform is None or not len(x) else self.transform.apply(x, self.features)

    def raw(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n _genes"]:
        """Dense, with the columns of the comparison."""
        x = self.matrix[rows]
        x = np.asarray(x.toarray() if hasattr(x, "toarray") else x, np.float32)
        return x if self.columns is None else x[:, self.columns]


class _Lazily(Mapping):
    """The cells of each population, made when they are asked for."""

    def __init__(self, side: _Read, rows: Mapping[Population, np.ndarray]):
        self.side, self.rows = side, rows

    def __getitem__(self, population: Population) -> np.ndarray:
        return self.side.cells(self.rows[population])

    def __iter__(self) -> Iterator[Population]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _is_series(spec: DataSpec) -> bool:
    if (spec.time is None) == (spec.perturbation is None):
        raise ValueError(
            f"spec must name perturbation or time, one of them; got perturbation={spec.perturbation!r}, "
            f"time={spec.time!r}."
        )
    return spec.time is not None


def _read(
    given: AnnData | str | Path,
    name: str,
    spec: DataSpec,
    asked: DataSpec,
    *,
    allow: tuple[str, ...] | None,
    training: tuple[str, str] | None = None,
) -> _Read:
    """`allow` None: the real cells, which `DataSpec.check` looks at, too."""
    is_path = isinstance(given, str | Path)
    is_series = asked.time is not None
    kind: ModuleType = timeseries if is_series else perturbation
    adata = read_anndata(given) if is_path else given
    try:
        if allow is None:
            spec.check(adata)
        matrix = expression_matrix(adata, spec)
        features = feature_names(adata, spec)
        rows = _rows(adata, spec)
        digest = kind.digest(adata, spec)
    except ValueError as err:
        err.add_note(f"In {name}{f', {given}' if is_path else ''}.")
        raise
    if hasattr(matrix, "columns"):  # a DataFrame in obsm
        matrix = matrix.to_numpy()
    elif spec.expression.startswith("obsm/"):  # nothing names its columns, and the keys of two files may differ
        features = tuple(f"dimension {i + 1}" for i in range(matrix.shape[1]))
    matrix = matrix.tocsr() if hasattr(matrix, "tocsr") else matrix
    if len(set(features)) < len(features):
        repeated = next(f for f in features if features.count(f) > 1)
        raise ValueError(f"{name} has the gene {repeated!r} more than once. Call adata.var_names_make_unique().")
    _check_values(name, matrix, spec, () if allow is None else allow)
    marked = None
    if training is not None:
        key, value = training
        column("training", key, adata.obs, "real.obs")
        words = adata.obs[key].astype(str).to_numpy()
        marked = np.flatnonzero(words == value)
        if not len(marked):
            known = sorted(set(words))
            raise ValueError(f"training: no cell of real has {value!r} in obs[{key!r}].{suggestion(value, known)}")
    vectors = spec.read_vectors(adata) or None if allow is None and not is_series else None
    file = Path(given).name if is_path else ""
    return _Read(name, file, matrix, features, rows, digest, marked, adata if allow is None else None, vectors)


def _rows(adata: AnnData, spec: DataSpec) -> dict[Any, np.ndarray]:
    if spec.time is None:
        populations, of_cell = spec.read_populations(adata)
        return {p: np.flatnonzero(of_cell == i) for i, p in enumerate(populations)}
    times = spec.read_times(adata)
    if not np.isfinite(times).all():
        n = int((~np.isfinite(times)).sum())
        raise ValueError(f"time: {n} of {len(times)} cells have no number in obs[{spec.time!r}].")
    return {float(t): np.flatnonzero(times == t) for t in np.unique(times)}


def _check_values(name: str, matrix: Any, spec: DataSpec, allow: tuple[str, ...]) -> None:
    """That the numbers are what `space` says; of a prediction, also what `DataSpec.check` says of real cells."""
    if not (isinstance(matrix, np.ndarray) or hasattr(matrix, "indptr")) or matrix.dtype.kind not in "buif":
        raise ValueError(f"{name}: {spec.expression} must be numbers in memory; got {type(matrix).__name__}.")
    n_bad = n_negative = n_fractions = 0
    least, largest = np.inf, 0.0
    for start in range(0, matrix.shape[0], _CHUNK):
        part = matrix[start : start + _CHUNK]
        values: Any = part.data if hasattr(part, "indptr") else part.ravel()
        finite = values[np.isfinite(values)]
        n_bad += values.size - finite.size
        if finite.size:
            least, largest = min(least, float(finite.min())), max(largest, float(finite.max()))
            n_negative += int((finite < 0).sum())
            n_fractions += int((finite != np.round(finite)).sum())
    where = f"{name}: {spec.expression}"
    if n_bad and "nan" not in allow:
        raise ValueError(
            f"{where} holds {n_bad} values that are NaN or infinite. Mend the prediction, or let these cells fail "
            "their populations and be counted, by allow='nan'."
        )
    if spec.space == "latent":
        return
    if n_negative and "negative" not in allow:
        raise ValueError(
            f"{where} holds {n_negative} negative values, the least is {least:g}, and expression is not negative. "
            "Say what they are: clip them yourself, or have them compared as they are, by allow='negative'."
        )
    if spec.space == "counts" and n_fractions:
        raise ValueError(
            f"{where} holds {n_fractions} values that are not integers (largest {largest:g}), but space='counts'. "
            "Round predicted counts yourself, or give log-normalised values with space='lognormalised'."
        )
    if spec.space == "lognormalised" and (largest > LARGEST_LOG or (not n_fractions and largest > 1)):
        what = f"goes up to {largest:g}" if n_fractions else f"holds integers alone, up to {largest:g}"
        raise ValueError(
            f"{where} {what}, but space='lognormalised', which is log(1 + normalised count). Counts are "
            "space='counts'; of normalised values take log1p."
        )


def _align(truth: _Read, sides: Sequence[_Read], genes: str) -> int:
    """Gives every side the columns to compare, in the order of the real ones; the number of genes left out."""
    union = dict.fromkeys(truth.features)
    common = set(truth.features)
    for side in sides:
        union |= dict.fromkeys(side.features)
        common &= set(side.features)
    if genes == "same":
        for side in sides:
            lacking = [g for g in truth.features if g not in set(side.features)] if len(common) < len(union) else []
            more = [g for g in side.features if g not in set(truth.features)] if len(common) < len(union) else []
            if lacking or more:
                raise ValueError(
                    f"{side.name} and real must have the same genes: {_counted(lacking, len(truth.features))} of real "
                    f"are missing there, {_counted(more, len(side.features))} there are not in real. genes='shared' "
                    f"compares the {len(common)} that all files have."
                )
    if not common:
        raise ValueError(
            f"genes='shared', but no gene is in all files: real has {truth.features[0]!r}, {sides[0].name} has "
            f"{sides[0].features[0]!r}. Are the names of one kind?"
        )
    kept = tuple(g for g in truth.features if g in common)
    for side in (truth, *sides):
        place = {g: i for i, g in enumerate(side.features)}
        columns = np.array([place[g] for g in kept], np.int64)
        side.columns = None if side.features == kept else columns
        side.features = kept
    return len(union) - len(kept)


def _counted(names: Sequence[str], of: int) -> str:
    examples = f" ({', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''})" if names else ""
    return f"{len(names)} of {of} genes{examples}"


def _transforms(
    truth: _Read, sides: Sequence[_Read], rows: np.ndarray, spec: DataSpec, n_components: int | None
) -> None:
    """Fitted on `rows` of the real cells. Expression that stays as it is needs none."""
    if spec.space != "counts" and n_components is None:
        return
    counts = spec.space == "counts"
    steps = Preprocess(
        library_size="all_genes" if counts else None, log1p=counts, scale=False, n_components=n_components
    )
    transform = fit(steps, truth.raw(rows), truth.features, spec.space)
    for side in (truth, *sides):
        side.transform = transform


def _told(split: Any, training: tuple[str, ...] | np.ndarray | None) -> str:
    if split is not None:
        return "the training part of the split"
    return "what real holds besides what is predicted" if training is None else "the cells that a column of real marks"


def _of_training(truth: _Read, keys: Sequence[Any]) -> dict[Any, np.ndarray]:
    """Rows of the training cells of each of `keys`; without a column that marks some, all of their cells."""
    if truth.marked is None:
        return {key: truth.rows[key] for key in keys}
    found = {key: np.intersect1d(truth.rows[key], truth.marked, assume_unique=True) for key in keys}
    return {key: rows for key, rows in found.items() if len(rows)}


def _asked(sides: Sequence[_Read], what: str) -> list[Any]:
    """What all predictions hold, and hold alike."""
    first = sides[0]
    for side in sides:
        for one, other in ((first, side), (side, first)):
            lacking = [key for key in one.rows if key not in other.rows and not getattr(key, "is_control", False)]
            if lacking:
                raise ValueError(
                    f"all predictions must be of the same {what}; {other.name} has no cells of {_named(lacking[0])}, "
                    f"which {one.name} has. Predict it, or give a split that says what is compared."
                )
    return [key for key in first.rows if not getattr(key, "is_control", False)]


def _check_known(wanted: Sequence[Any], truth: _Read, sides: Sequence[_Read], *, of_split: bool) -> None:
    for key in wanted:
        if key not in truth.rows:
            near = "" if isinstance(key, float) else suggestion(_named(key), map(_named, truth.rows))
            mend = "Leave it out of the predicted cells, or give a split: its test part alone is compared."
            if of_split:
                mend = "The split holds it out: give the file that it was made for."
            raise ValueError(f"real has no cells of {_named(key)}, which is to be compared.{near} {mend}")
        for side in sides:
            if key not in side.rows:
                raise ValueError(
                    f"{side.name} has no cells of {_named(key)}, which the split holds out."
                    f"{suggestion(_named(key), map(_named, side.rows))}"
                )


def _named(key: Any) -> str:
    return f"time {key:g}" if isinstance(key, float) else str(key)


def _population_tables(
    truth: _Read,
    made: Mapping[str, Sequence[_Read]],
    split: PerturbationSplit | None,
    spec: DataSpec,
    metrics: Mapping[str, Any],
    n_cells: int | None,
    draws: Mapping[str, int],
    about: Mapping[str, Any],
    told: str,
    keep: list[Evidence] | None,
) -> list[Any]:
    sides = [side for row in made.values() for side in row]
    if split is None:
        test = sorted(_asked(sides, "conditions"))
        if not test:
            raise ValueError(f"{sides[0].name} holds control cells alone; there is no prediction to compare.")
        train = [p for p in truth.rows if p not in test]
    else:
        test = [p for p in split.test if not p.is_control]
        train = [p for p in split.train if p in truth.rows]
    _check_known(test, truth, sides, of_split=split is not None)
    rows = _of_training(truth, train)
    for context in sorted({p.context for p in test}):
        control = Population((), context)
        if control not in rows and control in truth.rows:
            rows[control] = truth.rows[control]  # the column marks none, or the split holds the whole context out
    test_rows = {p: truth.rows[p] for p in test}
    if truth.marked is not None:
        test_rows = {p: np.setdiff1d(r, truth.marked, assume_unique=True) for p, r in test_rows.items()}
        if both := [p for p in test if len(test_rows[p]) < len(truth.rows[p])]:
            raise ValueError(f"{both[0]} is predicted, but some of its cells are marked as training cells.")
    if all(p.is_control for p in rows):
        raise ValueError(
            "no training perturbation is left for the baselines: real holds the predicted conditions and controls "
            "alone. Add the cells that the model was trained on to real, as its other conditions."
        )
    fitted_on = np.sort(np.concatenate(list(rows.values())))
    _transforms(truth, sides, fitted_on[:2], spec, None)  # nothing here depends on which cells they are
    training = pseudobulks(_Lazily(truth, rows))
    observed = {p: truth.cells(r) for p, r in test_rows.items()}
    vectors = None
    if truth.vectors is not None:
        vectors = spec.vectors_of(trained_names([*rows, *test]), truth.vectors) or None
    known = PerturbationSplit(rule=HoldOutNone(), train=tuple(sorted(rows)), validation=(), test=tuple(test))
    unseen, titles = by_unseen_axis(test, known, "predicted populations")
    contexts = {p.context for p in test}
    n_controls = sum(len(r) for p, r in rows.items() if p.is_control and p.context in contexts)
    unused = {
        name: [{_named(p): len(r) for p, r in side.rows.items() if p not in test} for side in row]
        for name, row in made.items()
    }
    about = {
        **about,
        "split": _split_record(_told(split, truth.marked), [str(p) for p in sorted(rows)], [str(p) for p in test]),
        "unseen": unseen,
        "predicted_and_not_used": unused,
        "findings": check_split(truth.adata, split or known, spec=spec).to_json_dict(),
    }
    tables = []
    for title, wanted in titles.items():
        cells = {name: [_Lazily(side, {p: side.rows[p] for p in wanted}) for side in row] for name, row in made.items()}
        table = perturbation_table(
            f"{title}; the {n_controls} real control cells of their contexts on both sides; baselines fitted on "
            f"{_told(split, truth.marked)}{told}",
            cells,
            training,
            {p: observed[p] for p in wanted},
            metrics,
            n_cells=n_cells,
            **draws,
            vectors=vectors,
            gene_names=truth.features,
            provenance=about,
        )
        tables.append(table)
        if keep is not None:
            firsts = {name: row[0] for name, row in cells.items()}
            keep.append(perturbation_evidence(table, firsts, training, observed, truth.features, vectors=vectors))
    return tables


def _series_tables(
    truth: _Read,
    made: Mapping[str, Sequence[_Read]],
    split: TimeSplit | None,
    spec: DataSpec,
    n_components: int | None,
    metrics: Mapping[str, Any],
    n_cells: int | None,
    draws: Mapping[str, int],
    about: Mapping[str, Any],
    told: str,
    keep: list[Evidence] | None,
) -> list[Any]:
    sides = [side for row in made.values() for side in row]
    if split is None:
        test = sorted(_asked(sides, "times"))
        train = [t for t in truth.rows if t not in test or truth.marked is not None]
    else:
        test, train = sorted(split.held_out), [t for t in split.train if t in truth.rows]
    _check_known(test, truth, sides, of_split=split is not None)
    rows = _of_training(truth, train)
    if both := [t for t in test if t in rows]:
        raise ValueError(f"time {both[0]:g} is predicted, but some of its cells are marked as training cells.")
    if not rows:
        raise ValueError(
            f"no training time is left for the baselines: all times of real ({', '.join(f'{t:g}' for t in test)}) are "
            "predicted. Leave predictions of the training times out, or give a split."
        )
    rng = np.random.default_rng([draws["seed"], 4])
    fitted_on = _some(np.concatenate(list(rows.values())), _MOST_OF_A_TIME, rng)
    _transforms(truth, sides, fitted_on, spec, n_components)

    snapshots = {t: truth.cells(_some(r, MAX_EXACT, rng)) for t, r in rows.items()}
    known = TimeSplit(rule=HoldOutTimes(times=tuple(test)), train=tuple(sorted(rows)), held_out=tuple(test))
    about = {
        **about,
        "findings": check_split(truth.adata, split or known, spec=spec).to_json_dict(),
        "split": _split_record(_told(split, truth.marked), sorted(rows), test),
        "most_cells_of_a_time": {"compared": _MOST_OF_A_TIME, "baselines": MAX_EXACT},
        "n_components": n_components,
        "predicted_and_not_used": {
            name: [{_named(t): len(r) for t, r in side.rows.items() if t not in test} for side in row]
            for name, row in made.items()
        },
    }
    of = "latent space" if spec.space == "latent" else "log-normalised expression, log(1 + normalised count)"
    unit = f"unit of the {of}" if n_components is None else f"unit of principal components of the {of}"
    space = f"all {len(truth.features)} features" if n_components is None else f"{n_components} principal components"
    features = truth.features if n_components is None else [f"PC {i + 1}" for i in range(n_components)]
    tables = []
    for t in test:
        rules = training_free(snapshots, t, seed=draws["seed"])
        real = truth.cells(_some(truth.rows[t], _MOST_OF_A_TIME, rng))
        cells = {
            name: [side.cells(_some(side.rows[t], _MOST_OF_A_TIME, rng)) for side in row] for name, row in made.items()
        }
        table = result_table(
            f"predicted time {t:g}, in {space}; baselines fitted on {_told(split, truth.marked)}: times "
            f"{', '.join(f'{u:g}' for u in sorted(rows))}{told}",
            cells,
            rules,
            real,
            metrics,
            n_cells=_fewest(real, cells, rules) if n_cells is None else n_cells,
            **draws,
            unit=unit,
            provenance=about,
        )
        tables.append(table)
        if keep is not None:
            firsts = {name: row[0] for name, row in cells.items()}
            are_genes = n_components is None and spec.space != "latent"
            keep.append(
                series_evidence(t, firsts, snapshots, rules, real, features, are_genes=are_genes, seed=draws["seed"])
            )
    return tables


def _some(rows: Int[np.ndarray, " n"], most: int, rng: np.random.Generator) -> Int[np.ndarray, " _"]:
    """At most so many of the rows, drawn without replacement, increasing."""
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def _fewest(real: np.ndarray, cells: Mapping[str, Sequence[np.ndarray]], rules: Mapping[str, Any]) -> int:
    everyone = [real, *(x for row in cells.values() for x in row), *(b.cells for b in rules.values())]
    return min(_MOST_IN_A_DRAW, *(len(x) for x in everyone if x is not None))


def _split_record(told: str, train: Sequence[Any], test: Sequence[Any]) -> dict[str, Any]:
    record = {"training": told, "train": list(train), "test": list(test)}
    return {**record, "digest": hashlib.blake2b(json.dumps(record).encode(), digest_size=16).hexdigest()}
