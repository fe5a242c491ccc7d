"""Expression to the space of a model and back: statistics of training cells only, and the affine map they define."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from scjax.check import at_least, finite, one_of, positive, suggestion
from scjax.config import from_dict, to_dict
from scjax.data.disk import DiskMatrix, as_sliceable, cells_at_once
from scjax.data.spec import Space

__all__ = ["Preprocess", "Transform", "check_generates_expression", "fit", "most_variable", "preprocess_for"]

_EIGH = 5000  # genes up to which the eigenvectors of their covariance are quick
_MOST = 10_000  # genes of which a covariance, 0.8 GB, is made of cells on disk


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The steps, in their order. The defaults are scIMF's for counts; `preprocess_for` has them for each space.

    Attributes:
        library_size: whose counts make a cell's total, brought to `target_sum`: "all_genes" of the data;
            "selected_genes", the `n_top_genes` kept, as scIMF does it, though their total does not tell a cell's depth;
            None leaves the counts as they are.
        target_sum: counts per cell after that; "median" takes the median total of the `select_on` cells.
        log1p: natural log(1 + x).
        n_top_genes: keep the genes of highest normalised dispersion (`most_variable`); None keeps all.
        select_on: the cells that choose the genes, and their median total: "train"; or "all" of the data set, as the
            scDFM code does it, which tells the choice about the test cells. Scaling and PCA see training cells only.
        scale: divide each gene by its population standard deviation, after centring.
        n_components: of a principal component analysis, centred and not whitened; None keeps genes.
        unit_variance: centre, and divide everything by one number: the training cells' variance, averaged over the
            dimensions of the model's space, is then 1, whatever the data's unit; shapes stay as they are.
    """

    library_size: Literal["all_genes", "selected_genes"] | None = "all_genes"
    target_sum: float | Literal["median"] = 1e4
    log1p: bool = True
    n_top_genes: int | None = None
    select_on: Literal["train", "all"] = "train"
    scale: bool = True
    n_components: int | None = 50
    unit_variance: bool = False

    def __post_init__(self):
        one_of("library_size", self.library_size, ("all_genes", "selected_genes", None))
        if isinstance(self.target_sum, str):
            one_of("target_sum", self.target_sum, ("median",))
        else:
            positive("target_sum", self.target_sum)
        one_of("select_on", self.select_on, ("train", "all"))
        if self.n_top_genes is not None:
            at_least("n_top_genes", self.n_top_genes, 1)
        if self.n_components is not None:
            at_least("n_components", self.n_components, 1)


def preprocess_for(space: Space, n_components: int | None = 50) -> Preprocess:
    """The usual steps: all of scIMF's for counts, scaling and PCA for log-normalised genes, none for a latent."""
    if space == "counts":
        return Preprocess(n_components=n_components)
    if space == "lognormalised":
        return Preprocess(library_size=None, log1p=False, n_components=n_components)
    return Preprocess(library_size=None, log1p=False, scale=False, n_components=None)


def check_generates_expression(preprocess: Preprocess, space: Space, model: str) -> None:
    """After these steps X is log-normalised expression, which `model` generates.

    Raises:
        ValueError: a latent space, scaling or components, counts that stay counts.
    """
    if space == "latent":
        raise ValueError(
            f"spec.space='latent', but {model} generates expression: give counts or log-normalised values."
        )
    if preprocess.scale or preprocess.n_components is not None:
        raise ValueError(
            f"preprocess must leave expression as it is: scale=False and n_components=None; got scale="
            f"{preprocess.scale}, n_components={preprocess.n_components}."
        )
    if space == "counts" and not (preprocess.library_size and preprocess.log1p):
        raise ValueError(
            f"spec.space='counts', but {model} generates log-normalised expression: set library_size='all_genes' and "
            f"log1p=True; got preprocess.library_size={preprocess.library_size!r}, preprocess.log1p="
            f"{preprocess.log1p}."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Transform:
    """Fitted steps: z = W (n(x) - mean) / std with n the normalisation; its statistics are float64.

    Attributes:
        preprocess, space: what was asked for.
        input_names: the genes that `apply` needs: all that make the totals, or the kept ones.
        feature_names: the kept genes, in the order of `mean`, `std` and the columns of `components`.
        target_sum: counts per cell after normalisation, the fitted median where that was asked for; None where the
            library size stays.
        mean, std: float64[genes]; 0 and 1 where nothing is centred or scaled. A constant gene has std 1.
        components: float64[dims, genes] or None; orthonormal rows, the largest loading of each is positive.
        explained_variance: float64[dims] or None; of the training cells, denominator n - 1.
    """

    preprocess: Preprocess
    space: Space
    input_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    target_sum: float | None
    mean: Float[np.ndarray, " genes"]
    std: Float[np.ndarray, " genes"]
    components: Float[np.ndarray, "dims genes"] | None = None
    explained_variance: Float[np.ndarray, " dims"] | None = None

    @property
    def n_dims(self) -> int:
        return len(self.feature_names) if self.components is None else len(self.components)

    def normalise(self, x: Any, feature_names: Iterable[str]) -> Float[np.ndarray, "n genes"]:
        """The kept genes after library size and log1p, before scaling, in float64. `x` as for `apply`."""
        return np.concatenate([part for _, part in self._normalised(x, feature_names)])

    def apply(self, x: Any, feature_names: Iterable[str], dtype: Any = np.float32) -> Float[np.ndarray, "n dims"]:
        """Cells in the model's space; computed in float64, given as `dtype`.

        `x`, an array or a SciPy sparse matrix cells x features, is aligned by name: another order of the genes is the
        same, genes that the fit did not use are ignored.

        Raises:
            ValueError: a gene is missing, occurs twice, or the width of `x` is not the number of names; no cells.
        """
        out = np.empty((x.shape[0], self.n_dims), dtype)
        for rows, part in self._normalised(x, feature_names):
            z = (part - self.mean) / self.std
            out[rows] = z if self.components is None else z @ self.components.T
        return out

    def inverse(self, z: Float[np.ndarray, "*n dims"], dtype: Any = np.float32) -> Float[np.ndarray, "*n genes"]:
        """Normalised expression (log-normalised where the input was logged) of the kept genes.

        Exact without a PCA; with one, the nearest expression in the span of the components, which may be slightly
        negative. Library sizes are gone: there is no way back to counts.
        """
        return (self._unscaled(z) + self.mean).astype(dtype)

    def inverse_velocity(
        self, v: Float[np.ndarray, "*n dims"], dtype: Any = np.float32
    ) -> Float[np.ndarray, "*n genes"]:
        """Change of expression that belongs to a change `v` in the model's space: the linear part of `inverse`."""
        return self._unscaled(v).astype(dtype)

    def to_tree(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays, and the rest as what JSON can hold. `from_tree` gives the same Transform, bit for bit."""
        arrays = {name: getattr(self, name) for name in ("mean", "std", "components", "explained_variance")}
        rest = {
            "preprocess": to_dict(self.preprocess),
            "space": self.space,
            "input_names": list(self.input_names),
            "feature_names": list(self.feature_names),
            "target_sum": self.target_sum,
        }
        return {name: a for name, a in arrays.items() if a is not None}, rest

    @classmethod
    def from_tree(cls, arrays: Mapping[str, Any], rest: Mapping[str, Any]) -> "Transform":
        """The Transform of what `to_tree` gave.

        Raises:
            ValueError: arrays that are not of the kept genes, or of each other's dims.
        """
        arrays = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
        n = len(rest["feature_names"])
        n_dims = len(arrays["components"]) if "components" in arrays else n
        wanted = {"mean": (n,), "std": (n,), "components": (n_dims, n), "explained_variance": (n_dims,)}
        for name, a in arrays.items():
            if a.shape != wanted[name]:
                raise ValueError(
                    f"{name} of a Transform of {n} genes must have the shape {wanted[name]}; got {a.shape}."
                )
        return cls(
            preprocess=from_dict(Preprocess, rest["preprocess"]),
            space=rest["space"],
            input_names=tuple(rest["input_names"]),
            feature_names=tuple(rest["feature_names"]),
            target_sum=rest["target_sum"],
            **arrays,
        )

    def _unscaled(self, z: np.ndarray) -> np.ndarray:
        z = np.asarray(z, np.float64)
        if z.ndim == 0 or z.shape[-1] != self.n_dims:
            raise ValueError(f"The last axis must have this Transform's {self.n_dims} dims; got shape {z.shape}.")
        return (z if self.components is None else z @ self.components) * self.std

    def _normalised(self, x: Any, feature_names: Iterable[str]) -> Iterator[tuple[slice, np.ndarray]]:
        columns = _all_or(_columns(self.input_names, _names(x, feature_names)), x.shape[1])
        position = {name: i for i, name in enumerate(self.input_names)}
        kept = _all_or(np.array([position[name] for name in self.feature_names]), len(position))
        for rows, part in _chunks(x):
            yield rows, _normalise(part[:, columns], kept, self.target_sum, self.preprocess.log1p)


def fit(
    preprocess: Preprocess,
    x_train: Any,
    feature_names: Iterable[str],
    space: Space,
    forced: Iterable[str] = (),
    *,
    x_all: Any = None,
) -> Transform:
    """The Transform of these training cells, and of no others unless `select_on="all"`.

    What is read is read in parts, and in the same parts wherever the cells are: those on disk give the same Transform,
    bit for bit, up to 5000 kept genes.

    Args:
        x_train: cells x features, an array, a SciPy sparse matrix or a `disk.DiskMatrix`, in `space`.
        feature_names: unique, one a column.
        forced: genes that are kept besides the `n_top_genes`, whatever their dispersion. Kept genes stay in the order
            of `feature_names`.
        x_all: all cells of the data set; only for `select_on="all"`, and needed there.

    Raises:
        ValueError: negative counts, steps that do not suit the space, names that repeat or do not match the width, more
            genes or components than there are, a forced gene that is not there, fewer than two cells, `x_all` missing.
    """
    _check_steps(preprocess, space)
    names, forced = _names(x_train, feature_names), set(forced)
    at_least("the number of training cells", x_train.shape[0], 2)
    _check_values("x_train", x_train, space)
    if preprocess.select_on == "all":
        if x_all is None:
            raise ValueError("select_on='all' needs x_all, all cells of the data set; got None. Or set 'train'.")
        _names(x_all, names)
        _check_values("x_all", x_all, space)
    unknown = sorted(forced - set(names))
    if unknown:
        raise ValueError(
            f"forced must name genes of the data; {len(unknown)} are not: {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}.{suggestion(unknown[0], names)} Leave unmeasured genes out."
        )

    x_select = x_all if preprocess.select_on == "all" else x_train
    n_top = preprocess.n_top_genes
    if n_top is None:
        kept = np.arange(len(names))
    else:
        if n_top > len(names):
            raise ValueError(f"n_top_genes must be at most the {len(names)} genes of the data; got {n_top}.")
        chosen = _select(preprocess, x_select, space)
        kept = np.union1d(chosen, [i for i, name in enumerate(names) if name in forced]).astype(int)
    identity = Transform(
        preprocess=preprocess,
        space=space,
        input_names=names if preprocess.library_size == "all_genes" else tuple(names[i] for i in kept),
        feature_names=tuple(names[i] for i in kept),
        target_sum=_target_sum(preprocess, x_select, kept if preprocess.library_size == "selected_genes" else None),
        mean=np.zeros(len(kept)),
        std=np.ones(len(kept)),
    )
    if not preprocess.scale and preprocess.n_components is None and not preprocess.unit_variance:
        return identity
    return _fit_affine(identity, x_train, names)


def most_variable(
    mean: Float[np.ndarray, " genes"], variance: Float[np.ndarray, " genes"], n_top: int, n_bins: int = 20
) -> Int[np.ndarray, " n_top"]:
    """Indices, increasing, of the genes that vary most for their level: the "seurat" flavour of scanpy.

    The log of the dispersion variance / mean is standardised among the genes of the same bin; bins are equally wide in
    log(1 + mean). A gene alone in its bin scores 1. A gene that does not vary comes last; ties go to the first gene.
    `mean` and `variance` (denominator n - 1) are of normalised counts, not of their logarithms.

    Reference: Satija et al., Nat Biotechnol 33 (2015); scanpy, `highly_variable_genes`.
    """
    mean = np.where(mean == 0, 1e-12, mean)
    dispersion = np.full_like(mean, np.nan)
    np.log(variance / mean, out=dispersion, where=variance > 0)
    level = np.log1p(mean)
    edges = np.linspace(level.min(), level.max(), n_bins + 1)
    bins = np.clip(np.searchsorted(edges, level, side="left"), 1, n_bins)  # (low, high], the lowest gene in the first
    score = np.full_like(mean, -np.inf)
    for b in np.unique(bins):
        here = (bins == b) & ~np.isnan(dispersion)
        if here.sum() == 1:
            score[here] = 1.0
        elif here.any():
            spread = dispersion[here].std(ddof=1)
            centred = dispersion[here] - dispersion[here].mean()
            score[here] = np.divide(centred, spread, out=np.full_like(centred, -np.inf), where=spread > 0)
    score = np.round(score, 9)  # two genes in a bin score +-0.707...: a tie that the last digit must not decide
    return np.sort(np.argsort(-score, kind="stable")[:n_top])


def _check_steps(preprocess: Preprocess, space: Space) -> None:
    one_of("space", space, ("counts", "lognormalised", "latent"))
    if space == "counts":
        return
    wrong = {"library_size": preprocess.library_size is not None, "log1p": preprocess.log1p}
    if space == "latent":
        wrong["n_top_genes"] = preprocess.n_top_genes is not None
    if any(wrong.values()):
        given = ", ".join(f"{name}={getattr(preprocess, name)!r}" for name, bad in wrong.items() if bad)
        mend = ", ".join(f"{name}={'False' if name == 'log1p' else 'None'}" for name, bad in wrong.items() if bad)
        raise ValueError(f"Preprocess has {given}, which is for counts; for space={space!r} set {mend}.")


def _check_values(name: str, x: Any, space: Space) -> None:
    if isinstance(x, DiskMatrix):
        step = cells_at_once(x.shape[1])
        for start in range(0, len(x), step):
            stop = min(start + step, len(x))
            _check_values(f"{name}[{start}:{stop}]", x[start:stop], space)
        return
    values = np.asarray(x.data if hasattr(x, "indptr") else x)
    finite(name, values)
    if space == "counts" and values.size and values.min() < 0:
        raise ValueError(f"{name} must hold counts, none below zero; the least is {values.min():g}. Is it scaled?")


def _target_sum(preprocess: Preprocess, x: Any, genes: np.ndarray | None) -> float | None:
    """The counts to which every cell is brought; a median is of the totals over `genes` (None: all) that are not 0."""
    if preprocess.library_size is None:
        return None
    if preprocess.target_sum != "median":
        return float(preprocess.target_sum)
    totals = np.concatenate([(part if genes is None else part[:, genes]).sum(axis=1) for _, part in _chunks(x)])
    if not (totals > 0).any():
        raise ValueError("target_sum='median' needs cells with counts; all of them are empty.")
    return float(np.median(totals[totals > 0]))


def _select(preprocess: Preprocess, x: Any, space: Space) -> np.ndarray:
    """The most variable genes, with totals over all genes."""
    shift, n = None, x.shape[0]
    target_sum = _target_sum(preprocess, x, None)
    total = square = 0.0
    for _, part in _chunks(x):  # sums of shifted values, which lose no digits to a large mean
        if space == "lognormalised":
            values = np.expm1(part)
        else:
            values = part if target_sum is None else _to_total(part, target_sum)
        shift = values.mean(axis=0) if shift is None else shift
        total = total + (values - shift).sum(axis=0)
        square = square + ((values - shift) ** 2).sum(axis=0)
    variance = np.maximum(square - total**2 / n, 0.0) / (n - 1)
    return most_variable(shift + total / n, variance, preprocess.n_top_genes)  # pyright: ignore[reportArgumentType]


def _fit_affine(identity: Transform, x_train: Any, names: Sequence[str]) -> Transform:
    """Two passes over the cells: their mean, then what is square."""
    preprocess, n_components = identity.preprocess, identity.preprocess.n_components
    n_cells, n_genes = x_train.shape[0], len(identity.feature_names)
    if n_components is not None:
        _check_components(n_components, n_cells, n_genes, on_disk=isinstance(x_train, DiskMatrix))
    chunks = _Normalised(identity, x_train, names)

    shift, total = None, np.zeros(n_genes)  # sums of shifted values, which lose no digits to a large mean
    for part in chunks:
        shift = part[0].copy() if shift is None else shift
        total += (part - shift).sum(axis=0)
    mean = shift + total / n_cells

    by_covariance = n_components is not None and (n_genes <= _EIGH or isinstance(x_train, DiskMatrix))
    product = _product(chunks, mean) if by_covariance else None
    square = sum(((part - mean) ** 2).sum(axis=0) for part in chunks) if product is None else np.diagonal(product)
    std = np.ones(n_genes)
    if preprocess.scale:
        std = np.sqrt(square / n_cells)
        std = np.where(std <= 10 * np.finfo(np.float64).eps * np.abs(mean), 1.0, std)
    components = explained_variance = None
    if by_covariance:
        components, explained_variance = _of_covariance(product, std, n_cells, n_components)  # pyright: ignore[reportArgumentType]
    elif n_components is not None:
        z = np.concatenate([(part - mean) / std for part in chunks])
        components, explained_variance = _principal_components(z, n_components)
    if preprocess.unit_variance:
        of_dims = square / std**2 if components is None else explained_variance * (n_cells - 1)
        variance = float(of_dims.mean()) / n_cells
        if not variance > 0:
            raise ValueError("unit_variance=True needs training cells that differ; these are all alike.")
        std = std * variance**0.5
        explained_variance = None if explained_variance is None else explained_variance / variance
    return Transform(
        preprocess=preprocess,
        space=identity.space,
        input_names=identity.input_names,
        feature_names=identity.feature_names,
        target_sum=identity.target_sum,
        mean=mean,
        std=std,
        components=components,
        explained_variance=explained_variance,
    )


class _Normalised:
    """The kept genes of the training cells, some cells at a time, as often as they are asked for."""

    def __init__(self, identity: Transform, x_train: Any, names: Sequence[str]):
        self.identity, self.x_train, self.names = identity, x_train, names

    def __iter__(self) -> Iterator[np.ndarray]:
        for _, part in self.identity._normalised(self.x_train, self.names):
            yield part


def _check_components(n_components: int, n_cells: int, n_genes: int, *, on_disk: bool) -> None:
    smaller = min(n_cells, n_genes)
    if n_components > smaller:
        raise ValueError(
            f"n_components must be at most {smaller}, the smaller of {n_cells} training cells and {n_genes} "
            f"genes; got {n_components}."
        )
    if on_disk and n_genes > _MOST:
        raise ValueError(
            f"a PCA of cells on disk needs the covariance of their genes in memory, {8e-9 * n_genes**2:.1f} GB for "
            f"{n_genes}; set n_top_genes to at most {_MOST}, or read the data into memory."
        )


def _product(chunks: Iterable[np.ndarray], mean: np.ndarray) -> np.ndarray:
    """Of the centred genes with each other, in the upper triangle."""
    from scipy.linalg.blas import dsyrk  # pyright: ignore[reportAttributeAccessIssue]  # made when scipy is built

    product = np.zeros((len(mean), len(mean)), order="F")
    for part in chunks:
        # adds in place, at half the cost of a matrix product
        product = dsyrk(1.0, (part - mean).T, beta=1.0, c=product, overwrite_c=1)
    return product


def _of_covariance(
    product: np.ndarray, std: np.ndarray, n_cells: int, n_components: int
) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import eigh

    product /= std * (n_cells - 1)
    product /= std[:, None]
    n_genes = len(std)
    variance, vectors = eigh(
        product,
        lower=False,
        overwrite_a=True,
        check_finite=False,
        subset_by_index=[n_genes - n_components, n_genes - 1],
    )
    return _signed(vectors.T[::-1]), np.maximum(variance[::-1], 0.0)


def _principal_components(z: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.decomposition import PCA

    # Both are exact, and the same as `_of_covariance` to ten digits; arpack cannot find the last component.
    solver = "arpack" if n_components < min(z.shape) else "full"
    pca = PCA(n_components, svd_solver=solver, random_state=0).fit(z)
    return _signed(pca.components_), pca.explained_variance_  # pyright: ignore[reportArgumentType]


def _signed(components: np.ndarray) -> np.ndarray:
    strongest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return components * np.where(strongest < 0, -1.0, 1.0)


def _normalise(part: np.ndarray, kept: Any, target_sum: float | None, log1p: bool) -> np.ndarray:
    """`part` holds the input genes, which make the totals; `kept` says which of them stay."""
    if target_sum is not None:
        part = _to_total(part, target_sum)
    part = part[:, kept]
    return np.log1p(part) if log1p else part


def _to_total(part: np.ndarray, target_sum: float) -> np.ndarray:
    totals = part.sum(axis=1, keepdims=True)
    return part * np.divide(
        target_sum, totals, out=np.zeros_like(totals), where=totals > 0
    )  # an empty cell stays empty


def _chunks(x: Any) -> Iterator[tuple[slice, np.ndarray]]:
    """Dense float64 rows, some at a time."""
    x = as_sliceable(x)
    step = cells_at_once(x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        part = x[rows]
        yield rows, np.asarray(part.toarray() if hasattr(part, "toarray") else part, np.float64)


def _names(x: Any, feature_names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(map(str, feature_names))
    if x.shape[0] == 0 or len(x.shape) != 2 or x.shape[1] != len(names):
        raise ValueError(
            f"x must be cells x features, with one of the {len(names)} names a column; its shape is {x.shape}."
        )
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"feature_names must be unique; {repeated!r} occurs {names.count(repeated)} times.")
    return names


def _all_or(columns: np.ndarray, n: int) -> Any:
    """A slice where these are all columns in their order, which spares a copy."""
    return slice(None) if np.array_equal(columns, np.arange(n)) else columns


def _columns(wanted: Sequence[str], names: Sequence[str]) -> np.ndarray:
    position = {name: i for i, name in enumerate(names)}
    missing = [name for name in wanted if name not in position]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} genes of the fit are missing: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Give data with these gene names; their order does not matter."
        )
    return np.array([position[name] for name in wanted])
