"""How predicted perturbation effects compare with observed ones, gene by gene: names and values as in cell-eval 0.8.2.

Cells are log-normalised expression, log(1 + normalised count); an effect (delta) is the mean of a population minus the
mean of the control cells of its context. Both sides of every comparison are held against the *real* controls.
`profiles` reduces populations of cells to the statistics that the metrics read; a metric compares two such sets and
gives one value for each population, NaN where it has none. Cells are not paired: nothing here is an error per cell.

Not here: cell-eval's `clustering_agreement`, which needs igraph: see `clustering`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Float

from scjax import check
from scjax.metrics.population import POPULATION_METRICS
from scjax.metrics.rank_sum import Ordered, ordered, rank_sums
from scjax.types import Population

__all__ = [
    "CELL_EVAL_METRICS",
    "DIRECTIONS",
    "ENERGY_DISTANCE",
    "EXPRESSION_METRICS",
    "Control",
    "DifferentialExpression",
    "ExpressionMetric",
    "Profiles",
    "average_precision",
    "differential_expression",
    "differential_expression_table",
    "discrimination_score",
    "energy_distance",
    "pearson",
    "profiles",
    "roc_auc",
    "score_perturbations",
    "spearman",
    "top_genes",
]

Cells: TypeAlias = Float[np.ndarray | Array, "_cells genes"]

FDR = 0.05  # a gene is called differentially expressed below it
WAITING = 1 << 25  # values of cells that wait for their test: 128 MB
CHUNK = 4_000_000  # distances that are held at once: 32 MB
CONSTANT = 1e-6  # relative to the largest mean: a vector that varies less is rounding, and correlates with nothing
DIRECTIONS = ("lower is better", "higher is better", "1 is best", "no direction")


class DifferentialExpression(NamedTuple):
    """Of each gene: p-value of the rank sum, false discovery rate, log2 fold change (infinite where one side is 0), z.

    z is that of the rank sum, positive where the gene is higher than in the controls.
    """

    p_value: np.ndarray
    fdr: np.ndarray
    log2_fold_change: np.ndarray
    z: np.ndarray


@dataclass(frozen=True)
class Control:
    """The real control cells of one context, with what all of its populations share."""

    cells: Cells

    @functools.cached_property
    def mean(self) -> Float[np.ndarray, " genes"]:
        return np.mean(self.cells, axis=0, dtype=np.float64)

    @functools.cached_property
    def ordered(self) -> Ordered:
        return ordered(self.cells)

    @functools.cached_property
    def mean_distance(self) -> float:
        """Between two of the cells, a cell with itself included."""
        return _mean_distance(self.cells, self.cells)


@dataclass(frozen=True)
class Profiles:
    """What the metrics read of a set of populations; rows of a population that cannot be scored are NaN.

    Attributes:
        mean: of the cells (the pseudobulk), not of their counts.
        delta: mean minus the mean of the context's controls.
        variance: of the cells, summed over the genes (n - 1 in the denominator).
        de: differential expression against the context's controls, [populations, genes]; None if not asked for.
        edistance: to the context's controls, 2 E|x-c| - E|x-x'| - E|c-c'|, Euclidean; None if not asked for.
        n_nonfinite: predicted cells with a NaN or infinite value. One of them fails its population.
        genes: names of the columns; () if they are not known.
        reference: mean delta of the training perturbations, for the metrics named "hat"; None if there is none.
    """

    populations: tuple[Population, ...]
    mean: Float[np.ndarray, "populations genes"]
    delta: Float[np.ndarray, "populations genes"]
    variance: Float[np.ndarray, " populations"]
    de: DifferentialExpression | None
    edistance: Float[np.ndarray, " populations"] | None
    n_cells: tuple[int, ...]
    n_nonfinite: tuple[int, ...]
    genes: tuple[str, ...]
    reference: Float[np.ndarray, " genes"] | None


class ExpressionMetric(NamedTuple):
    """A named number for each population, from the profiles of predicted and of real cells.

    Attributes:
        definition: in words, for the foot of a table; values under two definitions are not comparable.
        unit: of the value, where the unit of expression is "x".
        direction: one of `DIRECTIONS`.
        fn: (predicted, real) -> one value for each population; a number over all populations is repeated.
        needs: besides means and variances: "de" and "edistance" of both sides, "real de" of the real one.
        equal_cells: it feels the number of cells (power of a test, noise of a distance), so that a table gives it equal
            numbers; else it reads means over all the cells that there are.
    """

    name: str
    definition: str
    unit: str
    direction: str
    fn: Callable[[Profiles, Profiles], np.ndarray]
    needs: tuple[str, ...] = ()
    equal_cells: bool = False


def differential_expression(cells: Cells, control: Cells | Control) -> DifferentialExpression:
    """`differential_expression_table` of one population: [genes]."""
    alone = Population(("one",))
    return DifferentialExpression(
        *(values[0] for values in differential_expression_table({alone: cells}, {"": control}))
    )


def differential_expression_table(
    cells: Mapping[Population, Any], controls: Mapping[str, Any]
) -> DifferentialExpression:
    """Each gene of many populations against the controls of their contexts: rank sums, Benjamini-Hochberg, fold change.

    The false discovery rate is over the genes of one population. The fold change is that of expm1(mean of the log
    values), as in cell-eval: +-inf where one of the two is zero, and 0 where both are.

    Args:
        cells: log-normalised cells [cells, genes] of each population, dense or a SciPy sparse array; made when asked.
        controls: such cells, or a `Control`, by context.

    Returns:
        [populations, genes] each.

    Raises:
        ValueError: as `rank_sum.rank_sums`; a population that is a control, or whose context has no controls.
    """
    known = {c: x if isinstance(x, Control) else Control(np.asarray(_dense(x))) for c, x in controls.items()}
    if not cells:
        raise ValueError("cells must hold at least one population; it is empty.")
    tests = _Tests((len(cells), control_of(next(iter(cells)), known).mean.size))
    for row, population in enumerate(cells):
        x, control = _dense(cells[population]), control_of(population, known)
        tests.add(row, x, np.mean(x, axis=0, dtype=np.float64), control)
    return tests.finish()


def profiles(
    cells: Mapping[Population, Any],
    controls: Mapping[str, Control],
    *,
    de: bool = True,
    edistance: bool = True,
    genes: Sequence[str] = (),
    reference: Float[np.ndarray, " genes"] | None = None,
) -> Profiles:
    """Statistics of populations of cells, taken some at a time: a mapping may make its cells when asked.

    A population whose value is None (a prediction that is not defined), or that has a cell which is not finite, has NaN
    everywhere.

    Args:
        cells: log-normalised cells [cells, genes] of each population, the control itself not among them.
        controls: by context.
        de: whether to test for differential expression.
        edistance: whether to compute distances to the controls.
        genes: names of the columns.
        reference: mean delta of the training perturbations.

    Raises:
        ValueError: no population, a control among them, a context without controls, other numbers of genes.
    """
    if not cells:
        raise ValueError("cells must hold at least one population; it is empty.")
    populations = tuple(cells)
    for population in populations:
        control_of(population, controls)
    n_genes = controls[populations[0].context].mean.size
    if genes and len(genes) != n_genes:
        raise ValueError(f"genes must name the {n_genes} columns of the cells; got {len(genes)} names.")
    shape = (len(populations), n_genes)
    mean, delta = np.full(shape, np.nan), np.full(shape, np.nan)
    variance, distance = np.full(len(populations), np.nan), np.full(len(populations), np.nan)
    tests = _Tests(shape)
    n_cells, n_nonfinite = [], []
    for row, population in enumerate(populations):
        x, control = cells[population], controls[population.context]
        if x is None:
            n_cells.append(0)
            n_nonfinite.append(0)
            continue
        x = np.asarray(x)
        if x.ndim != 2 or x.shape[1] != control.mean.size or control.mean.size != n_genes:
            raise ValueError(
                f"the cells of {population} must be [cells, genes] with the {n_genes} genes of the controls; "
                f"got the shape {x.shape}."
            )
        check.at_least(f"the number of cells of {population}", len(x), 1)
        n_cells.append(len(x))
        n_nonfinite.append(int((~np.isfinite(x)).any(axis=1).sum()))
        if n_nonfinite[-1]:
            continue
        mean[row] = np.mean(x, axis=0, dtype=np.float64)
        delta[row] = mean[row] - control.mean
        if len(x) > 1:
            variance[row] = np.var(x, axis=0, ddof=1, dtype=np.float64).sum()
        if de:
            tests.add(row, x, mean[row], control)
        if edistance:
            distance[row] = 2 * _mean_distance(x, control.cells) - _mean_distance(x, x) - control.mean_distance
    return Profiles(
        populations=populations,
        mean=mean,
        delta=delta,
        variance=variance,
        de=tests.finish() if de else None,
        edistance=distance if edistance else None,
        n_cells=tuple(n_cells),
        n_nonfinite=tuple(n_nonfinite),
        genes=tuple(genes),
        reference=reference,
    )


def control_of(population: Population, controls: Mapping[str, Any]) -> Any:
    """The entry of the population's context.

    Raises:
        ValueError: the population is the control itself, or its context has no controls.
    """
    if population.is_control:
        raise ValueError(f"{population} is the control itself: it belongs among the controls, not the populations.")
    if population.context not in controls:
        known = ", ".join(repr(c) for c in controls) or "none"
        raise ValueError(
            f"{population} has no control cells: controls hold the contexts {known}."
            + check.suggestion(population.context, controls)
        )
    return controls[population.context]


def score_perturbations(
    pred: Mapping[Population, Any],
    real: Mapping[Population, Any],
    controls: Mapping[str, Cells],
    metrics: Mapping[str, ExpressionMetric] | None = None,
    *,
    genes: Sequence[str] = (),
    reference: Float[np.ndarray, " genes"] | None = None,
) -> dict[str, dict[Population, float]]:
    """All metrics of all populations, on all of their cells, as cell-eval has them.

    A number over all populations stands beside each of them. `perturbation_report.perturbation_table` gives the same
    beside baselines and a ceiling, and at equal numbers of cells where they matter.

    Args:
        pred, real: log-normalised cells [cells, genes] of the same populations.
        controls: the real control cells of each context, for both sides.
        metrics: by name; cell-eval's and ours unless given (ours named "hat" only with a `reference`).
        genes: names of the columns; the discrimination score leaves a perturbed gene out by its name.
        reference: mean delta of the training perturbations.

    Raises:
        ValueError: as `profiles`; a population without prediction; real cells that are not finite.
    """
    if metrics is None:
        metrics = {k: m for k, m in EXPRESSION_METRICS.items() if reference is not None or "hat" not in k}
    for population in real:
        if population not in pred:
            raise ValueError(f"pred has no cells of {population}.{check.suggestion(population, pred)}")
        check.finite(f"real[{population}]", np.asarray(real[population]))
    shared = {context: Control(np.asarray(cells)) for context, cells in controls.items()}
    for context, control in shared.items():
        check.finite(f"controls[{context!r}]", np.asarray(control.cells))
    asked = {"de": any("de" in m.needs for m in metrics.values())}
    asked["edistance"] = any("edistance" in m.needs for m in metrics.values())
    truth = profiles(real, shared, de=True, edistance=asked["edistance"], genes=genes, reference=reference)
    ours = profiles({p: pred[p] for p in real}, shared, **asked, genes=genes, reference=reference)
    return {
        name: dict(zip(truth.populations, map(float, metric.fn(ours, truth)), strict=True))
        for name, metric in metrics.items()
    }


def pearson(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], tolerance: float = 0.0) -> float:
    """Correlation; NaN with fewer than two entries, a value that is not finite, or where one does not vary.

    `tolerance` is the largest standard deviation that still counts as not varying.
    """
    if x.size < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    if min(np.std(x), np.std(y)) <= tolerance:
        return float("nan")
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Correlation of ranks, equal values at their mean rank; infinite values are the outermost."""
    from scipy.stats import rankdata

    if np.isnan(x).any() or np.isnan(y).any():
        return float("nan")
    return pearson(rankdata(x), rankdata(y))


def average_precision(relevant: np.ndarray, fdr: Float[np.ndarray, " genes"]) -> float:
    """Area under the steps of precision over recall when genes are called by rising `fdr`; equal ones at once.

    NaN where all or none are relevant. cell-eval ranks -log10(fdr) with 0 put at 1e-10, so that there a gene whose fdr
    is too small for a number falls behind others; here it comes first.
    """
    if not 0 < relevant.sum() < relevant.size or np.isnan(fdr).any():
        return float("nan")
    order = np.argsort(fdr, kind="stable")
    hits, called = np.cumsum(relevant[order]), np.arange(1, relevant.size + 1)
    last = np.append(np.diff(fdr[order]) > 0, True)  # of a group of equal values
    recall = hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * (hits / called)[last]))


def roc_auc(relevant: np.ndarray, fdr: Float[np.ndarray, " genes"]) -> float:
    """Chance that a relevant gene has the smaller `fdr` than another one, equal ones counted half; NaN as above."""
    from scipy.stats import rankdata

    n = int(relevant.sum())
    if not 0 < n < relevant.size or np.isnan(fdr).any():
        return float("nan")
    above = rankdata(-fdr)[relevant].sum() - n * (n + 1) / 2
    return float(above / (n * (relevant.size - n)))


def energy_distance(x: Cells, y: Cells) -> float:
    """That of `population.energy_distance`, without a program to compile for every number of cells."""
    return _mean_distance(x, y) - _mean_distance(x, x) / 2 - _mean_distance(y, y) / 2


def top_genes(real: Profiles, n: int) -> np.ndarray:
    """Columns of the `n` genes that tell each population best from its controls: least p-value, then largest |delta|.

    [populations, n]; all genes where there are fewer.
    """
    return np.stack([_top(real, row, n) for row in range(len(real.populations))])


def discrimination_score(
    pred: Profiles, real: Profiles, *, distance: str, exclude_parts: bool = False
) -> Float[np.ndarray, " populations"]:
    """1 - (how many real effects lie nearer to the predicted one than the true one does) / (their number).

    Among the populations of one context; NaN where there is only one. Equal distances count half (cell-eval: in the
    order of the table). The gene called like the perturbation is left out, as cell-eval does, which is none for `A+B`;
    with `exclude_parts` the genes of all its parts are.
    """
    from scipy.spatial.distance import cdist

    check.one_of("distance", distance, ("l1", "l2", "cosine"))
    kind = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}[distance]
    contexts = np.array([p.context for p in real.populations])
    names = np.array(real.genes)
    scores = np.full(len(real.populations), np.nan)
    for row, population in enumerate(real.populations):
        peers = np.flatnonzero(contexts == population.context)
        if len(peers) < 2 or not np.isfinite(pred.delta[row]).all():
            continue
        left_out = population.perturbation if exclude_parts else (population.condition,)
        kept = ~np.isin(names, left_out) if names.size else slice(None)
        effect = pred.delta[row][kept]
        if kind == "cosine" and np.abs(effect).max(initial=0) <= CONSTANT * np.abs(real.mean[row]).max():
            scores[row] = 1 - (len(peers) - 1) / 2 / len(peers)  # no effect has no direction: all are equally far
            continue
        far = cdist(effect[None], real.delta[peers][:, kept], kind)[0]  # pyright: ignore[reportArgumentType, reportCallIssue]  # the names are literals there
        own = far[peers == row]
        rank = np.sum(far < own) + (np.sum(far == own) - 1) / 2
        scores[row] = 1 - rank / len(peers)
    return scores


class _Tests:
    """Differential expression of populations as they come: they wait, and are tested many at once."""

    def __init__(self, shape: tuple[int, int]):
        self.tables = DifferentialExpression(*(np.full(shape, np.nan) for _ in DifferentialExpression._fields))
        self.waiting: list[tuple[int, np.ndarray, np.ndarray, Control]] = []

    def add(self, row: int, cells: np.ndarray, mean: Float[np.ndarray, " genes"], control: Control) -> None:
        self.waiting.append((row, cells, mean, control))
        if sum(x.size for _, x, _, _ in self.waiting) >= WAITING:
            self._test()

    def finish(self) -> DifferentialExpression:
        self._test()
        return self.tables

    def _test(self) -> None:
        for control in {id(c): c for *_, c in self.waiting}.values():
            rows, cells, means, _ = zip(*(w for w in self.waiting if w[3] is control), strict=True)
            for table, values in zip(self.tables, _against(cells, np.stack(means), control), strict=True):
                table[list(rows)] = values
        self.waiting = []


def _against(
    cells: Sequence[np.ndarray], means: Float[np.ndarray, "populations genes"], control: Control
) -> DifferentialExpression:
    from scipy.stats import false_discovery_control

    tests = rank_sums(cells, control.ordered)
    target, reference = np.expm1(means), np.expm1(control.mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Shifted control cells can have a mean below zero, which is no expression at all.
        ratio = np.maximum(target, 0) / np.maximum(reference, 0)
        fold = np.log2(np.where(np.isnan(ratio), 1.0, ratio))
    return DifferentialExpression(tests.p_value, false_discovery_control(tests.p_value, axis=1), fold, tests.z)


def _dense(cells: Any) -> Any:
    return cells.toarray() if hasattr(cells, "toarray") else cells


def _mean_distance(x: Any, y: Any) -> float:
    """Mean Euclidean distance over all pairs, in double precision, some rows at a time.

    Not through a matrix product: a threaded one waits for busy cores far longer than it computes.
    """
    from scipy.spatial.distance import cdist

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    rows = max(1, CHUNK // len(y))
    return sum(float(cdist(x[i : i + rows], y).sum()) for i in range(0, len(x), rows)) / (len(x) * len(y))


def _each(fn: Callable[[Profiles, Profiles, int], float]) -> Callable[[Profiles, Profiles], np.ndarray]:
    """A metric of one population, given its row, as one of all."""

    def all_of_them(pred: Profiles, real: Profiles) -> np.ndarray:
        return np.array([fn(pred, real, row) for row in range(len(real.populations))], np.float64)

    return all_of_them


def _over_all(fn: Callable[[Profiles, Profiles], float]) -> Callable[[Profiles, Profiles], np.ndarray]:
    """One number of all populations together, beside each of them."""
    return lambda pred, real: np.full(len(real.populations), fn(pred, real))


def _de(side: Profiles) -> DifferentialExpression:
    if side.de is None:
        raise ValueError("these profiles were made without differential expression; call profiles(..., de=True).")
    return side.de


def _edistance(side: Profiles) -> np.ndarray:
    if side.edistance is None:
        raise ValueError("these profiles were made without energy distances; call profiles(..., edistance=True).")
    return side.edistance


def _top(real: Profiles, row: int, n: int) -> np.ndarray:
    return np.lexsort((-np.abs(real.delta[row]), _de(real).p_value[row]))[:n]


def _failed(side: Profiles, row: int) -> bool:
    return not np.isfinite(side.mean[row]).all()


def _pearson_of(pred: Profiles, real: Profiles, row: int, offset: Any = 0.0, genes: Any = slice(None)) -> float:
    if _failed(pred, row):
        return float("nan")
    tolerance = CONSTANT * float(np.abs(real.mean[row]).max())
    return pearson((pred.delta[row] - offset)[genes], (real.delta[row] - offset)[genes], tolerance)


def _r2_score(pred: Profiles, real: Profiles, row: int, genes: Any = slice(None)) -> float:
    ours, theirs = pred.mean[row][genes], real.mean[row][genes]
    if _failed(pred, row) or theirs.size < 2 or np.std(theirs) <= CONSTANT * np.abs(theirs).max():
        return float("nan")
    return 1 - float(np.sum((ours - theirs) ** 2) / np.sum((theirs - theirs.mean()) ** 2))


def _weighted_mse(pred: Profiles, real: Profiles, row: int) -> float:
    """NaN where all genes are tested alike, so that there is nothing to weigh by."""
    strength = np.abs(_de(real).z[row])
    scaled = (strength - strength.min()) ** 2
    if not scaled.sum() > 0:
        return float("nan")
    return float(np.average((pred.mean[row] - real.mean[row]) ** 2, weights=scaled))


def _reference(real: Profiles) -> np.ndarray:
    if real.reference is None:
        raise ValueError(
            "pearson_delta_hat is relative to the mean of the training perturbations: give it as `reference`."
        )
    return real.reference


def _ranked(side: Profiles, row: int) -> np.ndarray:
    """Significant genes by falling |log2 fold change|."""
    de = _de(side)
    significant = np.flatnonzero(de.fdr[row] < FDR)
    return significant[np.argsort(-np.abs(de.log2_fold_change[row, significant]), kind="stable")]


def _shared(k: int | None, of: str) -> Callable[[Profiles, Profiles, int], float]:
    """Genes shared by the first k' of both lists, over k' = min(k, length of the real (or predicted) list)."""

    def fraction(pred: Profiles, real: Profiles, row: int) -> float:
        if _failed(pred, row):
            return float("nan")
        ours, theirs = _ranked(pred, row), _ranked(real, row)
        length = len(theirs if of == "real" else ours)
        n = length if k is None else min(k, length)
        return len(np.intersect1d(ours[:n], theirs[:n])) / n if n else 0.0

    return fraction


def _direction_match(pred: Profiles, real: Profiles, row: int) -> float:
    significant = _ranked(real, row)
    if not len(significant) or _failed(pred, row):
        return float("nan")
    ours, theirs = (np.sign(_de(side).log2_fold_change[row, significant]) for side in (pred, real))
    return float(np.mean(ours == theirs))


def _spearman_lfc(pred: Profiles, real: Profiles, row: int) -> float:
    significant = _ranked(real, row)
    return spearman(*(_de(side).log2_fold_change[row, significant] for side in (pred, real)))


def _recall(pred: Profiles, real: Profiles, row: int) -> float:
    significant = _ranked(real, row)
    if not len(significant) or _failed(pred, row):
        return float("nan")
    return float(np.mean(_de(pred).fdr[row, significant] < FDR))


def _n_significant(side: Profiles) -> np.ndarray:
    fdr = _de(side).fdr
    return np.where(np.isnan(fdr).any(axis=1), np.nan, np.sum(fdr < FDR, axis=1))


def _spearman_nsig(pred: Profiles, real: Profiles) -> float:
    theirs = _n_significant(real)
    counted = theirs > 0
    return spearman(_n_significant(pred)[counted], theirs[counted]) if counted.any() else 1.0


def _variance_ratio(pred: Profiles, real: Profiles) -> np.ndarray:
    return np.divide(pred.variance, real.variance, out=np.full(len(real.variance), np.nan), where=real.variance > 0)


def _catalogue(*metrics: ExpressionMetric) -> Mapping[str, ExpressionMetric]:
    return MappingProxyType({m.name: m for m in metrics})


LOWER, HIGHER, ONE, NONE = DIRECTIONS
CUTS = {"N": None, "50": 50, "100": 100, "200": 200, "500": 500}
SIGNIFICANT = "significant genes (Mann-Whitney against the real controls, Benjamini-Hochberg, FDR < 0.05)"
BY_FOLD = "by |log2 fold change|"
TOP_20 = (
    "the 20 genes that differ most between the real cells and their controls (least Mann-Whitney p-value, then largest "
    "|delta|)"
)
DETERMINATION = (
    "1 - sum (predicted - real)^2 / sum (real - its mean over these genes)^2; not bounded below, so that one "
    "population can decide a mean: read the median"
)

CELL_EVAL_METRICS: Mapping[str, ExpressionMetric] = _catalogue(
    *(
        ExpressionMetric(
            f"overlap_at_{name}",
            f"{SIGNIFICANT} {BY_FOLD}: share of the first k of the real list that is among the first k predicted, "
            + ("k the length" if k is None else f"k = {k}, at most the length")
            + " of the real list; 0 where that is empty",
            "1",
            HIGHER,
            _each(_shared(k, "real")),
            ("de",),
            True,
        )
        for name, k in CUTS.items()
    ),
    *(
        ExpressionMetric(
            f"precision_at_{name}",
            f"{SIGNIFICANT} {BY_FOLD}: share of the first k of the predicted list that is among the first k real, "
            + ("k the length" if k is None else f"k = {k}, at most the length")
            + " of the predicted list; 0 where that is empty",
            "1",
            HIGHER,
            _each(_shared(k, "pred")),
            ("de",),
            True,
        )
        for name, k in CUTS.items()
    ),
    ExpressionMetric(
        "de_spearman_sig",
        "Spearman correlation over the populations that have any, of the numbers of significant genes; 1 if none has",
        "1",
        HIGHER,
        _over_all(_spearman_nsig),
        ("de",),
        True,
    ),
    ExpressionMetric(
        "de_direction_match",
        "share of the really significant genes that are predicted to change in the true direction",
        "1",
        HIGHER,
        _each(_direction_match),
        ("de",),
        True,
    ),
    ExpressionMetric(
        "de_spearman_lfc_sig",
        "Spearman correlation of the log2 fold changes over the really significant genes",
        "1",
        HIGHER,
        _each(_spearman_lfc),
        ("de",),
        True,
    ),
    ExpressionMetric(
        "de_sig_genes_recall",
        "share of the really significant genes that are significant in the prediction",
        "1",
        HIGHER,
        _each(_recall),
        ("de",),
        True,
    ),
    ExpressionMetric(
        "de_nsig_counts_real",
        "number of really significant genes",
        "genes",
        NONE,
        lambda pred, real: _n_significant(real),
        ("de",),
        True,
    ),
    ExpressionMetric(
        "de_nsig_counts_pred",
        "number of significant genes of the prediction",
        "genes",
        NONE,
        lambda pred, real: _n_significant(pred),
        ("de",),
        True,
    ),
    ExpressionMetric(
        "pr_auc",
        "average precision of the really significant genes when genes are called by their predicted FDR",
        "1",
        HIGHER,
        _each(lambda pred, real, row: average_precision(_de(real).fdr[row] < FDR, _de(pred).fdr[row])),
        ("de",),
        True,
    ),
    ExpressionMetric(
        "roc_auc",
        "area under the ROC curve of the really significant genes when genes are called by their predicted FDR",
        "1",
        HIGHER,
        _each(lambda pred, real, row: roc_auc(_de(real).fdr[row] < FDR, _de(pred).fdr[row])),
        ("de",),
        True,
    ),
    ExpressionMetric(
        "pearson_delta",
        "Pearson correlation over genes of mean - control mean",
        "1",
        HIGHER,
        _each(_pearson_of),
    ),
    ExpressionMetric(
        "mse",
        "mean over genes of the squared difference of the means",
        "x^2",
        LOWER,
        lambda pred, real: np.mean((pred.mean - real.mean) ** 2, axis=1),
    ),
    ExpressionMetric(
        "mae",
        "mean over genes of the absolute difference of the means",
        "x",
        LOWER,
        lambda pred, real: np.mean(np.abs(pred.mean - real.mean), axis=1),
    ),
    ExpressionMetric(
        "mse_delta",
        "mse of mean - control mean; equal to mse, both sides having the real controls",
        "x^2",
        LOWER,
        lambda pred, real: np.mean((pred.delta - real.delta) ** 2, axis=1),
    ),
    ExpressionMetric(
        "mae_delta",
        "mae of mean - control mean; equal to mae, both sides having the real controls",
        "x",
        LOWER,
        lambda pred, real: np.mean(np.abs(pred.delta - real.delta), axis=1),
    ),
    *(
        ExpressionMetric(
            f"discrimination_score_{distance}",
            "1 - (number of real effects of the same context nearer to the predicted one than the true one) / (their "
            f"number), {words}, ties half, the gene called like the perturbation left out; chance is near 1/2",
            "1",
            HIGHER,
            functools.partial(discrimination_score, distance=distance),
        )
        for distance, words in {
            "l1": "L1 distance of mean - control mean",
            "l2": "Euclidean distance of mean - control mean",
            "cosine": "cosine distance of mean - control mean, which does not see their size",
        }.items()
    ),
    ExpressionMetric(
        "pearson_edistance",
        "Pearson correlation over the populations of predicted and real energy distances to the controls, "
        "2 E|x-c| - E|x-x'| - E|c-c'|, Euclidean norm not squared, all pairs",
        "1",
        HIGHER,
        _over_all(lambda pred, real: pearson(_edistance(pred), _edistance(real))),
        ("edistance",),
        True,
    ),
)

EXPRESSION_METRICS: Mapping[str, ExpressionMetric] = MappingProxyType(
    {
        **CELL_EVAL_METRICS,
        **_catalogue(
            ExpressionMetric(
                "pearson_delta_hat",
                "Pearson correlation over genes of mean - (control mean + mean delta of the training perturbations): "
                "what is particular to the perturbation; undefined for the mean of the training perturbations itself",
                "1",
                HIGHER,
                _each(lambda pred, real, row: _pearson_of(pred, real, row, _reference(real))),
            ),
            ExpressionMetric(
                "pearson_delta_hat_20",
                f"pearson_delta_hat over {TOP_20}",
                "1",
                HIGHER,
                _each(lambda pred, real, row: _pearson_of(pred, real, row, _reference(real), _top(real, row, 20))),
                ("real de",),
            ),
            ExpressionMetric(
                "l2",
                "Euclidean norm of the difference of the means",
                "x",
                LOWER,
                lambda pred, real: np.linalg.norm(pred.mean - real.mean, axis=1),
            ),
            ExpressionMetric(
                "r2",
                "squared Pearson correlation over genes of the means; high for the control too",
                "1",
                HIGHER,
                _each(lambda pred, real, row: pearson(pred.mean[row], real.mean[row]) ** 2),
            ),
            ExpressionMetric(
                "r2_20",
                f"r2 over {TOP_20}",
                "1",
                HIGHER,
                _each(
                    lambda pred, real, row: (
                        pearson(*(side.mean[row][_top(real, row, 20)] for side in (pred, real))) ** 2
                    )
                ),
                ("real de",),
            ),
            ExpressionMetric(
                "r2_score",
                f"coefficient of determination of the means over genes, {DETERMINATION}",
                "1",
                HIGHER,
                _each(_r2_score),
            ),
            ExpressionMetric(
                "r2_score_20",
                f"coefficient of determination of the means over {TOP_20}, {DETERMINATION}",
                "1",
                HIGHER,
                _each(lambda pred, real, row: _r2_score(pred, real, row, _top(real, row, 20))),
                ("real de",),
            ),
            ExpressionMetric(
                "weighted_mse",
                "sum over genes of weight times squared difference of the means; weights sum to 1 and are proportional "
                "to the square of (|z| - least |z|), z of the Mann-Whitney test of the real cells against their "
                "controls (after Mejia et al. 2025, who take a t statistic)",
                "x^2",
                LOWER,
                _each(_weighted_mse),
                ("real de",),
            ),
            ExpressionMetric(
                "variance_ratio",
                "variance of the predicted cells over that of the real ones, each summed over genes",
                "1",
                ONE,
                _variance_ratio,
            ),
        ),
    }
)

ENERGY_DISTANCE = POPULATION_METRICS["Energy"]._replace(name="energy_distance", fn=energy_distance)
