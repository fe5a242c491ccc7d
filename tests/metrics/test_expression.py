"""Metrics of perturbation effects: against scipy, closed forms and limits; what is NaN and why."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from scjax.metrics import expression, population
from scjax.metrics.expression import (
    DIRECTIONS,
    ENERGY_DISTANCE,
    EXPRESSION_METRICS,
    Control,
    average_precision,
    differential_expression,
    differential_expression_table,
    discrimination_score,
    pearson,
    profiles,
    roc_auc,
    score_perturbations,
    spearman,
    top_genes,
)
from scjax.metrics.rank_sum import rank_sum
from scjax.types import Population

A, B, C, AB = Population(("A",)), Population(("B",)), Population(("C",)), Population(("A", "B"))
GENES = ("A", "B", "g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7")


def counts(rng, n, shift=None):
    """Log of few counts, so that there are many ties and many zeros."""
    rate = np.linspace(0.2, 3, len(GENES)) * (1 if shift is None else np.exp(shift))
    return np.log1p(rng.poisson(rate, (n, len(GENES))).astype(np.float32))


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    shifts = {p: rng.normal(size=len(GENES)) for p in (A, B, C, AB)}
    real = {p: counts(rng, 40 + 7 * i, s) for i, (p, s) in enumerate(shifts.items())}
    return real, {"": counts(rng, 60)}


def score(pred, world, name, **settings):
    real, controls = world
    metrics = {name: EXPRESSION_METRICS[name]}
    return np.array(list(score_perturbations(pred, real, controls, metrics, genes=GENES, **settings)[name].values()))


def test_distances_in_chunks(monkeypatch, world):
    real, controls = world
    whole = profiles(real, {"": Control(controls[""])}).edistance
    monkeypatch.setattr(expression, "CHUNK", 150)  # some rows at a time
    np.testing.assert_allclose(profiles(real, {"": Control(controls[""])}).edistance, whole, rtol=1e-9)


def test_differential_expression_of_what_is_absent():
    """A gene that one side lacks has an infinite fold change; one that both lack has none, and p = 1."""
    cells = np.log1p(np.array([[0, 3, 0, 4.0]] * 20))
    control = np.log1p(np.array([[2, 0, 0, 4.0]] * 30))
    found = differential_expression(cells, control)
    np.testing.assert_allclose(found.log2_fold_change, [-np.inf, np.inf, 0, 0], atol=1e-12)
    assert (found.p_value[2:] == 1).all()
    assert (found.fdr[:2] < 1e-6).all()
    np.testing.assert_allclose(found.fdr, stats.false_discovery_control(found.p_value))


def test_many_populations_are_tested_as_one_by_one(monkeypatch):
    """Over contexts, some at a time, dense or sparse, and in `profiles`."""
    monkeypatch.setattr(expression, "WAITING", 1_000)
    rng = np.random.default_rng(0)
    cells = {Population((name,), c): counts(rng, 20 + 9 * i) for i, name in enumerate("ABC") for c in "xy"}
    controls = {c: counts(rng, 50) for c in "xy"}
    found = differential_expression_table(cells, controls)
    shared = {c: Control(x) for c, x in controls.items()}
    in_profiles = profiles(cells, shared, edistance=False).de
    as_sparse = differential_expression_table({p: sparse.csr_array(x) for p, x in cells.items()}, controls)
    for row, (p, x) in enumerate(cells.items()):
        theirs = stats.mannwhitneyu(x.astype(float), controls[p.context].astype(float), method="asymptotic", axis=0)
        np.testing.assert_allclose(found.p_value[row], theirs.pvalue, rtol=1e-12)
        for table, alone in zip(found, differential_expression(x, shared[p.context]), strict=True):
            np.testing.assert_array_equal(table[row], alone)
    for table, same, dense in zip(found, in_profiles, as_sparse, strict=True):
        np.testing.assert_array_equal(table, same)
        np.testing.assert_array_equal(table, dense)
    with pytest.raises(ValueError, match="has no control cells"):
        differential_expression_table({Population(("A",), "z"): counts(rng, 5)}, controls)
    with pytest.raises(ValueError, match="at least one population"):
        differential_expression_table({}, controls)


@pytest.mark.filterwarnings("ignore")  # of pandas, about scanpy's use of it
def test_differential_expression_equals_scanpy():
    """Its test corrects ties and not continuity: the score is (U - n m / 2) / spread."""
    scanpy = pytest.importorskip("scanpy", reason="a second implementation to compare with")
    import anndata
    import pandas

    rng = np.random.default_rng(0)
    x, y = counts(rng, 40, rng.normal(0, 0.5, len(GENES))), counts(rng, 90)
    obs = pandas.DataFrame({"c": ["A"] * 40 + ["control"] * 90}, index=[f"{i}" for i in range(130)]).astype("category")
    adata = anndata.AnnData(np.concatenate([x, y]), obs)
    scanpy.tl.rank_genes_groups(adata, "c", reference="control", method="wilcoxon", tie_correct=True)
    theirs = scanpy.get.rank_genes_groups_df(adata, "A").set_index("names").loc[list(adata.var_names)]
    ours, tested = differential_expression(x, y), rank_sum(x, y)
    off = tested.statistic - 40 * 90 / 2
    np.testing.assert_allclose(ours.z * off / (off - 0.5 * np.sign(off)), theirs["scores"], rtol=1e-5)


def test_determination_and_weights_by_hand(world):
    """Against scikit-learn; a prediction far off costs without bound, and weights are those of the tests."""
    from sklearn.metrics import mean_squared_error, r2_score

    real, controls = world
    rng = np.random.default_rng(1)
    pred = {p: x + rng.normal(0, 0.3, x.shape[1]).astype(np.float32) for p, x in real.items()}
    means = [(real[p].mean(0, dtype=float), pred[p].mean(0, dtype=float)) for p in real]
    np.testing.assert_allclose(score(pred, world, "r2_score"), [r2_score(a, b) for a, b in means], rtol=1e-9)
    np.testing.assert_allclose(score(pred, world, "r2_score_20"), score(pred, world, "r2_score"))  # all ten genes
    np.testing.assert_allclose(score(pred, world, "r2_20"), score(pred, world, "r2"))
    assert (score({p: x + 100 for p, x in real.items()}, world, "r2_score") < -1000).all()
    weights = []
    for x in real.values():
        p = stats.mannwhitneyu(x.astype(float), controls[""].astype(float), method="asymptotic", axis=0).pvalue
        z = stats.norm.isf(p / 2)
        weights.append((z - z.min()) ** 2)
    want = [mean_squared_error(a, b, sample_weight=w) for (a, b), w in zip(means, weights, strict=True)]
    np.testing.assert_allclose(score(pred, world, "weighted_mse"), want, rtol=1e-6)


def test_top_20_are_fewer_than_all():
    rng = np.random.default_rng(0)
    level = rng.uniform(1, 5, 60)
    control, moved = rng.normal(level, 1, (80, 60)), np.r_[np.full(20, 2.0), np.zeros(40)]
    real = profiles({A: rng.normal(level + moved, 1, (80, 60))}, {"": Control(control)})
    pred = profiles({A: rng.normal(level, 1, (80, 60))}, {"": Control(control)}, de=False)
    ours, theirs = pred.mean[0, :20], real.mean[0, :20]
    assert set(top_genes(real, 20)[0]) == set(range(20))
    value = EXPRESSION_METRICS["r2_score_20"].fn(pred, real)[0]
    assert value == pytest.approx(1 - np.sum((ours - theirs) ** 2) / np.sum((theirs - theirs.mean()) ** 2))
    assert EXPRESSION_METRICS["r2_20"].fn(pred, real)[0] == pytest.approx(np.corrcoef(ours, theirs)[0, 1] ** 2)
    flat = dataclasses.replace(real, mean=np.ones_like(real.mean))
    assert np.isnan(EXPRESSION_METRICS["r2_score"].fn(pred, flat)).all()
    # what did not change weighs nothing
    close = dataclasses.replace(pred, mean=np.r_[real.mean[0, :20], pred.mean[0, 20:] + 1][None])
    assert EXPRESSION_METRICS["weighted_mse"].fn(close, real)[0] < 0.1 * EXPRESSION_METRICS["mse"].fn(close, real)[0]


def test_the_truth_scores_best(world):
    """Of every metric that has a direction the real cells themselves get the best value there is."""
    real, _ = world
    best = {"lower is better": 0, "higher is better": 1, "1 is best": 1}
    reference = np.linspace(-0.5, 0.5, len(GENES))
    for name, metric in EXPRESSION_METRICS.items():
        assert metric.direction in DIRECTIONS
        if metric.direction != "no direction":
            want = best[metric.direction]
            np.testing.assert_allclose(score(real, world, name, reference=reference), want, atol=1e-7, err_msg=name)


def test_means_by_hand(world):
    real, controls = world
    shift = np.linspace(-0.3, 0.6, len(GENES))
    pred = {p: x + shift for p, x in real.items()}
    np.testing.assert_allclose(score(pred, world, "mse"), np.mean(shift**2), rtol=1e-5)
    np.testing.assert_allclose(score(pred, world, "mae"), np.mean(np.abs(shift)), rtol=1e-5)
    np.testing.assert_allclose(score(pred, world, "l2"), np.linalg.norm(shift), rtol=1e-5)
    np.testing.assert_allclose(score(pred, world, "variance_ratio"), 1, rtol=1e-5)
    np.testing.assert_allclose(score(pred, world, "mse_delta"), score(pred, world, "mse"), rtol=1e-6)
    np.testing.assert_allclose(score(pred, world, "mae_delta"), score(pred, world, "mae"), rtol=1e-6)
    delta = real[A].mean(0) - controls[""].mean(0)
    means = real[A].mean(0), (real[A] + shift).mean(0)
    assert score(pred, world, "pearson_delta")[0] == pytest.approx(np.corrcoef(delta, delta + shift)[0, 1], rel=1e-5)
    assert score(pred, world, "r2")[0] == pytest.approx(np.corrcoef(*means)[0, 1] ** 2, rel=1e-5)
    doubled = {p: x.mean(0, keepdims=True) + 2**0.5 * (x - x.mean(0, keepdims=True)) for p, x in real.items()}
    np.testing.assert_allclose(score(doubled, world, "variance_ratio"), 2, rtol=1e-5)


def test_hat_is_relative_to_the_training_mean(world):
    """It takes away what all perturbations share, and asks nothing of a prediction that is only that."""
    real, controls = world
    reference = np.linspace(-1, 1, len(GENES))
    pred = {p: x[: len(x) // 2] for p, x in real.items()}
    ours = score(pred, world, "pearson_delta_hat", reference=reference)
    offset = controls[""].mean(0) + reference
    want = [np.corrcoef(pred[p].mean(0) - offset, x.mean(0) - offset)[0, 1] for p, x in real.items()]
    np.testing.assert_allclose(ours, want, rtol=1e-5)
    mean_baseline = {p: (controls[""] + reference).astype(np.float32) for p in real}
    assert np.isnan(score(mean_baseline, world, "pearson_delta_hat", reference=reference)).all()
    assert np.isfinite(score(mean_baseline, world, "pearson_delta")).all()
    assert np.isnan(score({p: controls[""] for p in real}, world, "pearson_delta")).all()
    with pytest.raises(ValueError, match="give it as `reference`"):
        score(pred, world, "pearson_delta_hat")
    assert "pearson_delta_hat" not in score_perturbations(pred, real, controls)


def test_top_genes_are_those_that_differ():
    rng = np.random.default_rng(0)
    control = rng.normal(size=(50, 30)) + 5
    cells = rng.normal(size=(40, 30)) + 5
    cells[:, [3, 17, 8]] += [4, -3, 2]
    real = profiles({A: cells}, {"": Control(control)})
    assert set(top_genes(real, 3)[0]) == {3, 8, 17}
    assert top_genes(real, 99).shape == (1, 30)
    reference = np.zeros(30)
    chosen = top_genes(real, 20)[0]
    pred = rng.normal(size=(40, 30)) + 5
    ours = EXPRESSION_METRICS["pearson_delta_hat_20"].fn(
        profiles({A: pred}, {"": Control(control)}, de=False), dataclasses.replace(real, reference=reference)
    )
    delta = pred.mean(0) - control.mean(0)
    assert ours[0] == pytest.approx(np.corrcoef(delta[chosen], real.delta[0][chosen])[0, 1])


def test_energy_distance_equals_the_population_metric(world):
    """cell-eval's distance to the controls is twice as large."""
    real, controls = world
    want = [population.energy_distance(x, controls[""]) for x in real.values()]
    np.testing.assert_allclose([ENERGY_DISTANCE.fn(x, controls[""]) for x in real.values()], want, rtol=1e-4)
    found = profiles(real, {"": Control(controls[""])}).edistance
    np.testing.assert_allclose(found, 2 * np.array(want), rtol=1e-4)
    assert ENERGY_DISTANCE.fn(real[A], real[A]) == pytest.approx(0, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 30), levels=st.integers(1, 8))
def test_areas_equal_their_definition(seed, n, levels):
    """Precision and recall at every threshold, and the share of well ordered pairs, by brute force."""
    rng = np.random.default_rng(seed)
    relevant, fdr = rng.random(n) < 0.5, rng.integers(0, levels, n) / 10
    if not 0 < relevant.sum() < n:
        assert np.isnan(average_precision(relevant, fdr))
        assert np.isnan(roc_auc(relevant, fdr))
        return
    area, recall = 0.0, 0.0
    for cut in np.unique(fdr):
        called = fdr <= cut
        now = (relevant & called).sum() / relevant.sum()
        area += (now - recall) * (relevant & called).sum() / called.sum()
        recall = now
    assert average_precision(relevant, fdr) == pytest.approx(area)
    pairs = fdr[relevant][:, None] - fdr[~relevant][None]
    assert roc_auc(relevant, fdr) == pytest.approx(np.mean((pairs < 0) + 0.5 * (pairs == 0)))


def test_correlations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=20), rng.integers(0, 4, 20) * 1.0
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert spearman(np.array([1.0, 2, np.inf]), np.array([-np.inf, 0, 1])) == pytest.approx(1)
    for bad in (np.ones(20), np.where(np.arange(20) == 3, np.nan, x)):
        assert np.isnan(pearson(x, bad))
        assert np.isnan(spearman(x, bad))
    assert np.isnan(pearson(x[:1], y[:1]))


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
def test_discrimination_counts_the_nearer_ones(world, distance):
    """The truth is nearest to itself; a swap of two effects puts each behind the other; no effect is in the middle."""
    real, controls = world
    name = f"discrimination_score_{distance}"
    np.testing.assert_array_equal(score(real, world, name), 1)
    swapped = score({**real, A: real[B], B: real[A]}, world, name)
    assert (swapped[:2] < 1).all()
    np.testing.assert_array_equal(swapped[2:], 1)
    if distance == "cosine":
        np.testing.assert_array_equal(score({p: controls[""] for p in real}, world, name), 1 - 1.5 / 4)


def test_discrimination_leaves_out_the_gene_of_that_name(world):
    """Single perturbations lose their own gene; the parts of a combination only when asked."""
    real, controls = world
    told = {p: x.copy() for p, x in real.items()}
    for p in told:
        told[p][:, [GENES.index(part) for part in p.perturbation if part in GENES]] += 100
    shared = {"": Control(controls[""])}
    truth, ours = (profiles(side, shared, genes=GENES) for side in (real, told))
    np.testing.assert_array_equal(discrimination_score(ours, truth, distance="l1")[:2], 1)
    rows = truth.populations.index(AB)
    without = [GENES.index("A"), GENES.index("B")]
    cut = discrimination_score(ours, truth, distance="l1", exclude_parts=True)[rows]
    assert cut == 1
    far = [np.abs(np.delete(ours.delta[rows] - other, without)).sum() for other in truth.delta]
    assert np.argmin(far) == rows


def test_discrimination_is_among_one_context():
    """Alone in its context a population has nobody to be confused with, and no value."""
    rng = np.random.default_rng(0)
    real = {Population(("A",), c): rng.normal(size=(9, 5)) + i for i, c in enumerate("xyy")}
    real[Population(("B",), "y")] = rng.normal(size=(9, 5)) + 3
    controls = {c: rng.normal(size=(9, 5)) for c in "xy"}
    found = score_perturbations(real, real, controls, {"d": EXPRESSION_METRICS["discrimination_score_l2"]})["d"]
    assert {p.context: v for p, v in found.items() if p.context == "y"} == {"y": 1.0}
    assert np.isnan(found[Population(("A",), "x")])


def test_failed_predictions_are_nan_everywhere(world):
    """One cell that is not finite fails its population, in every metric, and no other population's own values."""
    real, controls = world
    broken = real[B].copy()
    broken[3, 2] = np.nan
    shared = {"": Control(controls[""])}
    reference = np.linspace(-1, 1, len(GENES))
    truth = profiles(real, shared, reference=reference)
    for bad in (broken, None):
        pred = profiles({**real, B: bad}, shared)
        assert pred.n_nonfinite == ((0, 1, 0, 0) if bad is broken else (0, 0, 0, 0))
        for name, metric in EXPRESSION_METRICS.items():
            values = metric.fn(pred, truth)
            if name == "de_nsig_counts_real":
                continue
            assert np.isnan(values[1]), name
            over_all = name in ("de_spearman_sig", "pearson_edistance")
            assert np.isnan(values[[0, 2, 3]]).all() if over_all else np.isfinite(values[[0, 2, 3]]).all(), name


def test_weak_perturbations_have_no_genes_to_find():
    """Values that even the truth lacks are NaN; overlaps are 0, as in cell-eval."""
    rng = np.random.default_rng(0)
    cells = rng.poisson(2, (60, 6)) * 1.0
    world = ({A: cells[:20], B: cells[20:40]}, {"": cells[40:]})
    for name, want in {
        "pr_auc": np.nan,
        "roc_auc": np.nan,
        "de_direction_match": np.nan,
        "de_sig_genes_recall": np.nan,
        "de_spearman_lfc_sig": np.nan,
        "overlap_at_N": 0,
        "precision_at_50": 0,
        "de_nsig_counts_real": 0,
        "de_spearman_sig": 1,
    }.items():
        values = score_perturbations(world[0], *world, {name: EXPRESSION_METRICS[name]})[name]
        np.testing.assert_array_equal(list(values.values()), want, err_msg=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, c: profiles({}, c), "at least one population"),
        (lambda r, c: profiles({Population(()): r[A]}, c), "control is the control itself"),
        (lambda r, c: profiles({Population(("A",), "k"): r[A]}, c), "controls hold the contexts ''"),
        (lambda r, c: profiles({A: r[A][:, :3]}, c), r"cells of A must be .* the 10 genes .* shape \(40, 3\)"),
        (lambda r, c: profiles(r, c, genes=("A",)), "must name the 10 columns"),
        (lambda r, c: score_perturbations({A: r[A]}, r, {"": c[""].cells}), "pred has no cells of B"),
        (
            lambda r, c: score_perturbations(r, {**r, B: r[B] * np.nan}, {"": c[""].cells}),
            r"real\[B\] must hold finite",
        ),
        (
            lambda r, c: EXPRESSION_METRICS["pr_auc"].fn(profiles(r, c, de=False), profiles(r, c)),
            "without differential expression",
        ),
        (
            lambda r, c: EXPRESSION_METRICS["pearson_edistance"].fn(profiles(r, c), profiles(r, c, edistance=False)),
            "without energy distances",
        ),
        (
            lambda r, c: discrimination_score(profiles(r, c), profiles(r, c), distance="cosin"),
            "Did you mean 'cosine'",
        ),
    ],
)
def test_bad_input_is_named(world, call, message):
    real, controls = world
    with pytest.raises(ValueError, match=message):
        call(real, {"": Control(controls[""])})
