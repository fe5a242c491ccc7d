"""What the rules of `leaks` look at, each computed once: who is in which part, copies of cells, what statistics fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from scjax.data.conditions import CONTROL, canonical_parts, trained_names
from scjax.data.disk import DiskMatrix, Subset, as_sliceable
from scjax.data.preprocess import Transform, fit
from scjax.data.spec import AnnData, DataSpec, expression_matrix, feature_names
from scjax.data.splits import HoldOutContexts, PerturbationSplit, TimeSplit
from scjax.types import Population

__all__ = ["Cells", "Evidence", "Origin", "Projection"]

Cells: TypeAlias = Literal["training cells", "all cells", "other cells"]

_CHUNK, _VALUES = 2048, 4_000_000  # cells that are read together; values, as few cells of many genes are as large
_SHARED = 3  # the part of a control cell that all parts may use
_SAME = 1e-5  # statistics in standard deviations; twice the same sum differs by 1e-7, a few more cells by 1e-4
_UNCORRELATED = 2e-4  # scores of a PCA on the cells of its fit, in float32
_FEW_GENES = 0.01  # share of the kept genes that another order of summing may change


class Origin(NamedTuple):
    """Which cells a statistic is of, and how far it is from that of the training cells, in the words of a finding."""

    cells: Cells
    told: str


class Projection(NamedTuple):
    """Coordinates of a latent over some cells, as a PCA leaves them at zero over the cells that it was fitted on."""

    mean: float  # the largest |mean| of a coordinate, in standard deviations of the widest one
    correlation: float  # the largest |correlation| of two coordinates

    @property
    def is_of_its_fit(self) -> bool:
        return max(self.mean, self.correlation) < _UNCORRELATED


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """A data set under a split. Nothing is read before it is asked for, the matrix always in parts.

    Attributes:
        transform: None where nothing is known of the preprocessing.
        given_part: int8[cells] as in `CellSetData.part`, where cells of a population are in different parts.
        digests: of these data, and of those that the run was trained on.
    """

    adata: AnnData
    spec: DataSpec
    split: TimeSplit | PerturbationSplit
    transform: Transform | None = None
    given_part: Int[np.ndarray, " cells"] | None = None
    digests: tuple[str, str] | None = None

    # -- who is in which part

    @property
    def is_series(self) -> bool:
        return isinstance(self.split, TimeSplit)

    @cached_property
    def is_perturbed(self) -> bool:
        if self.is_series or self.spec.perturbation is None:
            return False
        return not all(p.is_control for p in self.populations)

    @cached_property
    def time(self) -> Float[np.ndarray, " cells"]:
        return self.spec.read_times(self.adata)

    @cached_property
    def _read(self) -> tuple[tuple[Population, ...], np.ndarray]:
        return self.spec.read_populations(self.adata)

    @property
    def populations(self) -> tuple[Population, ...]:
        """Of the data."""
        return self._read[0]

    @property
    def population_of(self) -> Int[np.ndarray, " cells"]:
        """The place of each cell's population among `populations`."""
        return self._read[1]

    @cached_property
    def n_cells_of(self) -> dict[Population, int]:
        return dict(zip(self.populations, np.bincount(self.population_of).tolist(), strict=True))

    @cached_property
    def parts(self) -> dict[str, tuple[Population, ...]]:
        """The populations of the split under the names that the data's have, in the order of the split."""
        controls = (*self.spec.control_names, CONTROL)
        return {
            part: tuple(
                Population(canonical_parts(p.perturbation, controls), p.context) for p in getattr(self.split, part)
            )
            for part in ("train", "validation", "test")
        }

    @cached_property
    def part(self) -> Int[np.ndarray, " cells"]:
        """0 train, 1 validation, 2 test, 3 controls of all parts, -1 none; the last of them for what is in several."""
        if self.given_part is not None:
            return self.given_part
        if isinstance(self.split, TimeSplit):
            part = np.where(np.isin(self.time, self.split.train), 0, -1)
            return np.where(np.isin(self.time, self.split.held_out), 2, part).astype(np.int8)
        number = {p: i for i, populations in enumerate(self.parts.values()) for p in populations}
        shared = self.is_perturbed and not isinstance(self.split.rule, HoldOutContexts)
        of = [
            _SHARED if shared and p.is_control and number.get(p) == 0 else number.get(p, -1) for p in self.populations
        ]
        return np.array(of, np.int8)[self.population_of]

    @property
    def is_train(self) -> Bool[np.ndarray, " cells"]:
        return np.isin(self.part, (0, _SHARED))

    @property
    def is_test(self) -> Bool[np.ndarray, " cells"]:
        return self.part == 2

    @property
    def is_shared(self) -> Bool[np.ndarray, " cells"]:
        return self.part == _SHARED

    @cached_property
    def is_control(self) -> Bool[np.ndarray, " cells"]:
        if not self.is_perturbed:
            return np.zeros(len(self.part), bool)
        return np.array([p.is_control for p in self.populations])[self.population_of]

    @cached_property
    def held_out_groups(self) -> dict[str, np.ndarray]:
        """The rows of each test population, or of each held-out time, by its name."""
        if isinstance(self.split, TimeSplit):
            return {f"time {t:g}": np.flatnonzero(self.time == t) for t in sorted(set(self.split.held_out))}
        place = {p: i for i, p in enumerate(self.populations)}
        test = [p for p in sorted(set(self.parts["test"])) if p in place]
        order = np.argsort(self.population_of, kind="stable")
        ends = np.cumsum(np.bincount(self.population_of))
        rows = [np.sort(order[ends[i] - self.n_cells_of[p] : ends[i]]) for p in test for i in (place[p],)]
        mine = [r[self.is_test[r]] for r in rows]
        return {str(p): r for p, r in zip(test, mine, strict=True) if len(r)}

    # -- the matrix

    @cached_property
    def features(self) -> tuple[str, ...]:
        return feature_names(self.adata, self.spec)

    @cached_property
    def matrix(self) -> Any:
        matrix = as_sliceable(expression_matrix(self.adata, self.spec))
        if not hasattr(matrix, "indptr"):
            return matrix  # on disk: what is read is in canonical format
        if not matrix.has_canonical_format:  # a value in two pieces; the user's own stays as it is
            matrix = matrix.copy()
            matrix.sum_duplicates()
        return matrix

    def rows(self, rows: np.ndarray) -> Any:
        """As the fits of this package get them, to the last digit: sparse as they are, else (and in series) float32."""
        if isinstance(self.matrix, DiskMatrix):
            return Subset(self.matrix, rows, None if self.matrix.is_sparse and not self.is_series else np.float32)
        part = self.matrix[rows]
        return part if hasattr(part, "indptr") and not self.is_series else part.astype(np.float32)

    def dense(self, rows: Any) -> np.ndarray:
        part = self.matrix[rows]
        return np.asarray(part.toarray() if hasattr(part, "indptr") else part, np.float32)

    def chunks(self) -> Iterator[slice]:
        n, step = self.matrix.shape[0], self._step
        for start in range(0, n, step):
            yield slice(start, min(start + step, n))

    @property
    def _step(self) -> int:
        return max(1, min(_CHUNK, _VALUES // max(1, self.matrix.shape[1])))

    @cached_property
    def fingerprints(self) -> tuple[UInt64[np.ndarray, " cells"], Int[np.ndarray, " cells"]]:
        """64 bits for each cell, equal for equal expression, and how many of its values are not zero."""
        n_cells, n_features = self.matrix.shape
        weight = np.random.default_rng(0).integers(0, 2**63, n_features, np.uint64) * np.uint64(2) + np.uint64(1)
        found, n_nonzero = np.empty(n_cells, np.uint64), np.empty(n_cells, np.int64)
        for rows in self.chunks():
            part = self.matrix[rows]
            if hasattr(part, "indptr"):
                hashed = _hashed(part.data) * weight[part.indices]
                found[rows] = _sums(hashed, part.indptr)
                n_nonzero[rows] = _sums((part.data != 0).astype(np.int64), part.indptr)
            else:
                found[rows] = (_hashed(part) * weight).sum(axis=1, dtype=np.uint64)
                n_nonzero[rows] = np.count_nonzero(part, axis=1)
        return found, n_nonzero

    # -- which cells a statistic is of

    @cached_property
    def missing_genes(self) -> tuple[str, ...]:
        """Those that the transform needs and the data lack."""
        return tuple(sorted(set(self.transform.input_names) - set(self.features)))  # pyright: ignore[reportOptionalMemberAccess]

    @cached_property
    def gene_choice(self) -> Origin | None:
        """Of the kept genes and a median total; None where neither was fitted."""
        steps = None if self.transform is None else self.transform.preprocess
        if steps is None or self.missing_genes or self.spec.space == "latent" or self.is_train.sum() < 2:
            return None
        if steps.n_top_genes is None and not (steps.library_size is not None and steps.target_sum == "median"):
            return None
        kept = set(self.transform.feature_names)  # pyright: ignore[reportOptionalMemberAccess]
        names = () if self.is_series else trained_names(self.populations)  # may have been kept whatever they vary
        forced = [name for name in names if name in kept]
        few = _FEW_GENES * len(kept)
        steps = replace(steps, select_on="train", scale=False, n_components=None)

        def away(rows: np.ndarray) -> tuple[int, bool]:
            again = fit(steps, self.rows(rows), self.features, self.spec.space, forced)
            same = steps.library_size is None or np.isclose(again.target_sum, self.transform.target_sum, rtol=_SAME)  # pyright: ignore[reportOptionalMemberAccess]
            return len(set(again.feature_names) - kept), bool(same)

        train = away(np.flatnonzero(self.is_train))
        told = f"{train[0]} of the {len(kept)} kept genes are not those that the training cells choose"
        told += "" if train[1] else f"; the median total is {self.transform.target_sum:g}, not theirs"  # pyright: ignore[reportOptionalMemberAccess]
        if train != (0, True) and not self.is_train.all():
            every = away(np.arange(len(self.part)))
            if every == (0, True) or (every[1] and every[0] < min(train[0], few)):
                return Origin("all cells", told)
        return Origin("training cells" if train[1] and train[0] <= few else "other cells", told)

    @cached_property
    def scaling(self) -> Origin | None:
        """Of mean, standard deviation and PCA; None where none of them was fitted."""
        transform = self.transform
        if transform is None or self.missing_genes or self.is_train.sum() < 2:
            return None
        if not transform.preprocess.scale and transform.components is None:
            return None
        train, others = _Moments(), _Moments()
        for rows in self.chunks():
            here = self.is_train[rows]
            for sums, mask in ((train, here), (others, ~here)):
                if mask.any():
                    x = self.dense(np.arange(rows.start, rows.stop)[mask])
                    sums.add(transform.normalise(x, self.features) - transform.mean, transform)
        away = {"training cells": train.distance(transform), "all cells": (train + others).distance(transform)}
        words = f"they are {away['training cells']:.2g} standard deviations from those of the training cells"
        if away["training cells"] < _SAME:
            return Origin("training cells", words)
        return Origin("all cells" if away["all cells"] < _SAME else "other cells", words)

    def projection(self, rows: np.ndarray) -> Projection:
        """Of the coordinates themselves, for a latent."""
        n, d = len(rows), self.matrix.shape[1]
        shift = self.dense(rows[:1]).astype(np.float64)
        total, square = np.zeros(d), np.zeros((d, d))
        for start in range(0, n, self._step):
            x = self.dense(rows[start : start + self._step]) - shift
            total, square = total + x.sum(axis=0), square + x.T @ x
        mean = total / n
        covariance = square / n - np.outer(mean, mean)
        std = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        widest = max(float(std.max()), np.finfo(np.float32).tiny)
        alive = std > 1e-6 * widest
        correlation = covariance[np.ix_(alive, alive)] / np.outer(std[alive], std[alive])
        between = correlation[~np.eye(len(correlation), dtype=bool)]
        return Projection(float(np.abs(mean + shift[0]).max()) / widest, float(np.abs(between).max(initial=0.0)))  # pyright: ignore[reportArgumentType]

    def control_profiles(self) -> tuple[tuple[str, ...], Float[np.ndarray, "contexts genes"]]:
        """The mean expression of the control cells of each context, log-normalised; contexts sorted."""
        from scipy import sparse

        place = {p: i for i, p in enumerate(self.populations)}
        controls = [p for p in self.populations if p.is_control]
        number = np.full(len(self.populations), -1)
        number[[place[p] for p in controls]] = np.arange(len(controls))
        of_cell = number[self.population_of]
        total = np.zeros((len(controls), self.matrix.shape[1]))
        for rows in self.chunks():
            here = np.flatnonzero(of_cell[rows] >= 0)
            if len(here):
                which = sparse.csr_matrix(
                    (np.ones(len(here)), (of_cell[rows][here], here)), shape=(len(controls), rows.stop - rows.start)
                )
                summed = which @ self.matrix[rows]
                total += summed.toarray() if sparse.issparse(summed) else summed
        mean = total / np.array([self.n_cells_of[p] for p in controls])[:, None]
        if self.spec.space == "counts":
            mean = np.log1p(1e4 * mean / np.maximum(mean.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny))
        return tuple(p.context for p in controls), mean


class _Moments:
    """Of the deviations from a transform's mean, and of its components' scores."""

    def __init__(self):
        self.n, self.x, self.x2, self.z, self.z2 = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, x: np.ndarray, transform: Transform) -> None:
        self.n += len(x)
        self.x, self.x2 = self.x + x.sum(axis=0), self.x2 + np.einsum("ij,ij->j", x, x)
        if transform.components is not None:
            z = x @ (transform.components / transform.std).T
            self.z, self.z2 = self.z + z.sum(axis=0), self.z2 + np.einsum("ij,ij->j", z, z)

    def __add__(self, other: "_Moments") -> "_Moments":
        both = _Moments()
        for name in ("n", "x", "x2", "z", "z2"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def distance(self, transform: Transform) -> float:
        """The largest difference of a statistic, in standard deviations of a gene, or as a share of a variance."""
        mean = self.x / self.n
        std = np.sqrt(np.maximum(self.x2 / self.n - mean**2, 0.0))
        varies = std > 1e-9 * max(float(std.max()), np.finfo(np.float64).tiny)
        away = [np.abs(mean[varies]) / std[varies]]  # pyright: ignore[reportIndexIssue]
        if transform.preprocess.scale:
            away.append(np.abs(transform.std[varies] / std[varies] - 1))
        if transform.components is not None and self.n > 1:
            variance = (self.z2 - self.z**2 / self.n) / (self.n - 1)
            away.append(np.abs(variance - transform.explained_variance) / transform.explained_variance.max())  # pyright: ignore[reportOperatorIssue, reportOptionalMemberAccess]
        return float(np.concatenate(away).max(initial=0.0))


def _hashed(values: np.ndarray) -> np.ndarray:
    """64 mixed bits of each number, 0 for zero, whatever the dtype; the mixer of splitmix64."""
    bits = np.ascontiguousarray(values, np.float64) + 0.0  # -0 is 0
    bits = bits.view(np.uint64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _sums(values: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Over the rows of a CSR matrix, also empty ones; modulo 2^64, in which differences of running sums are exact."""
    running = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype)])
    return running[indptr[1:]] - running[indptr[:-1]]
