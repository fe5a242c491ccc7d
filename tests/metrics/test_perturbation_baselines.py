"""Training-free predictions of an effect: exact in the worlds they assume, and the figures noted for the real data."""

import numpy as np
import pytest

from scjax.metrics.expression import EXPRESSION_METRICS, score_perturbations
from scjax.metrics.perturbation_baselines import RULES, fit_baselines, perturbation_baselines
from scjax.types import Population

N_GENES = 7


def population(name, context=""):
    return Population(() if name == "control" else tuple(sorted(name.split("+"))), context)


def cells_of(name, effects, rng, context="", n=12):
    """Cells whose mean is exactly the context's level plus the sum of the effects of the parts."""
    x = rng.normal(size=(n, N_GENES))
    x += {"": 0.0, "k": 2.0, "l": -1.0}[context] - x.mean(axis=0)
    return x if name == "control" else x + sum(effects[part] for part in name.split("+"))


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    effects = {part: rng.normal(size=N_GENES) for part in "ABCD"}
    names = ("control", "A", "B", "C", "A+C", "B+C")
    return effects, {population(n): cells_of(n, effects, rng, n=10 + i) for i, n in enumerate(names)}


def delta(predicted):
    assert predicted.delta is not None, predicted.note
    return predicted.delta


def test_deltas_in_an_additive_world(world):
    effects, training = world
    a, b, c = (effects[part] for part in "ABC")
    found = fit_baselines(training).predict(population("A+B"))
    assert list(found) == list(RULES)
    np.testing.assert_allclose(delta(found["control"]), 0)
    np.testing.assert_allclose(delta(found["mean of perturbations"]), (2 * a + 2 * b + 3 * c) / 5)
    np.testing.assert_allclose(delta(found["additive"]), a + b)
    np.testing.assert_allclose(delta(found["nearest"]), (a + b) / 2)  # each shares a half; A+C and B+C a third
    np.testing.assert_allclose(delta(found["ridge"]), a + b, atol=0.01)  # shrunk by the least strength on offer
    assert found["shift"].delta is None
    assert "no other context" in found["shift"].note


def test_cells_are_the_controls_moved(world):
    _, training = world
    rows = perturbation_baselines(training, population("A+B"))
    control = training[population("control")]
    deltas = fit_baselines(training).predict(population("A+B"))
    for name, row in rows.items():
        if row.cells is None:
            assert row.note.startswith("not defined")
            continue
        np.testing.assert_allclose(row.cells - control, np.broadcast_to(deltas[name].delta, control.shape), atol=1e-12)
        assert "not clipped" in row.note
    np.testing.assert_array_equal(rows["control"].cells, control)


@pytest.mark.parametrize(
    ("target", "undefined"),
    [
        ("A+D", {"additive": "D alone is not in training", "shift": "no other context"}),
        ("D", {"additive": "not a combination", "shift": "", "nearest": "shares a part", "ridge": "none of its parts"}),
        ("A+B", {"shift": "no other context"}),
    ],
)
def test_what_is_not_defined_says_why(world, target, undefined):
    found = fit_baselines(world[1]).predict(population(target))
    assert {name for name, (d, _) in found.items() if d is None} == set(undefined)
    for name, reason in undefined.items():
        assert found[name].note.startswith("not defined: ")
        assert reason in found[name].note
    if target == "A+D":
        assert "D unseen: adds nothing" in found["ridge"].note


def test_over_contexts():
    """Each perturbation weighs one, whatever its number of contexts; additive takes the context's own singles first."""
    rng = np.random.default_rng(0)
    effects = {part: rng.normal(size=N_GENES) for part in "ABC"}
    stronger = {part: 2 * effect for part, effect in effects.items()}
    training = {}
    for context, effect in (("", effects), ("k", stronger), ("l", effects)):
        for name in ("control", "A", "B"):
            if (name, context) != ("B", "l"):
                training[population(name, context)] = cells_of(name, effect, rng, context)
    training[population("C", "k")] = cells_of("C", effects, rng, "k")
    fitted = fit_baselines(training)
    a, b, c = effects["A"], effects["B"], effects["C"]
    np.testing.assert_allclose(fitted.mean_delta, (4 / 3 * a + 3 / 2 * b + c) / 3)
    found = fitted.predict(population("B", "l"))
    np.testing.assert_allclose(delta(found["shift"]), 1.5 * b)
    np.testing.assert_allclose(delta(found["nearest"]), 1.5 * b)
    assert "2 other contexts" in found["shift"].note
    combination = fitted.predict(population("A+B", "l"))["additive"]
    np.testing.assert_allclose(delta(combination), a + 1.5 * b)
    assert "B from other contexts" in combination.note
    moved = fitted.cells(population("B", "l"), delta(found["shift"]))
    np.testing.assert_allclose(moved.mean(axis=0), -1 + 1.5 * b)


def test_vectors_reach_what_was_never_seen():
    """Effects that are linear in given vectors are learnt by the ridge, for parts without any training cell."""
    rng = np.random.default_rng(0)
    vectors = {f"g{i}": rng.normal(size=3) for i in range(12)}
    weights = rng.normal(size=(3, N_GENES))
    effects = {part: v @ weights for part, v in vectors.items()}
    names = [f"g{i}" for i in range(10)]
    training = {population(n): cells_of(n, effects, rng) for n in ("control", *names, "g0+g1")}
    fitted = fit_baselines(training, vectors=vectors)
    found = fitted.predict(population("g10+g11"))
    np.testing.assert_allclose(delta(found["ridge"]), effects["g10"] + effects["g11"], atol=0.02)
    near = fit_baselines(training, vectors={**vectors, "g11": 3 * vectors["g4"]}).predict(population("g11"))["nearest"]
    np.testing.assert_allclose(delta(near), effects["g4"])
    assert near.note.endswith("g4")
    lacking = fit_baselines(training, vectors={k: v for k, v in vectors.items() if k != "g11"})
    for rule in ("nearest", "ridge"):
        assert lacking.predict(population("g11"))[rule].note == "not defined: no vector of g11"


def test_ridge_errors_are_those_of_leaving_out(world):
    """The closed form of the leave-one-out error equals fitting again without each perturbation."""
    rng = np.random.default_rng(1)
    effects = {part: rng.normal(size=N_GENES) for part in "ABCD"}
    names = ["A", "B", "C", "D", "A+B", "C+D", "A+D"]
    training = {population(n): cells_of(n, effects, rng) for n in ("control", *names)}
    for n in names:
        training[population(n)] += rng.normal(size=N_GENES) * 0.3
    fitted = fit_baselines(training)
    chosen, errors = fitted.ridge.strength, fitted.ridge.errors
    vectors = fitted.ridge.vectors
    x = np.stack([sum(vectors[part] for part in name) for name in fitted.by_perturbation])
    y = np.stack(list(fitted.by_perturbation.values()))
    unit = np.sum((x - x.mean(0)) ** 2) / len(x)
    residuals = []
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        centre, level = x[rest].mean(0), y[rest].mean(0)
        gram = (x[rest] - centre).T @ (x[rest] - centre) + chosen * unit * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, (x[rest] - centre).T @ (y[rest] - level))
        residuals.append(y[i] - level - (x[i] - centre) @ weights)
    assert min(errors) == pytest.approx(np.mean(np.square(residuals)))


@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        ({}, population("A"), "target=A is among the training populations"),
        ({}, population("control"), "target is the control itself"),
        ({}, population("A", "k"), r"context of target=A \(k\) has no control cells"),
        ({population("control"): None}, population("A+B"), "must hold control cells"),
        ({population("A", "k"): np.ones((3, N_GENES))}, population("A+B"), r"has A \(k\), and no control cells"),
        ({population("D"): np.ones((3, 2))}, population("A+B"), "equal numbers of genes"),
        ({population("D"): np.full((3, N_GENES), np.nan)}, population("A+B"), r"training\[D\] must hold finite"),
        ({population("D"): np.ones((0, N_GENES))}, population("A+B"), "with a cell at least"),
    ],
)
def test_bad_input_is_named(world, change, target, message):
    training = {p: x for p, x in {**world[1], **change}.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        perturbation_baselines(training, target)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "it is empty"),
        ({"A": np.zeros(2)}, r"vectors\['A'\] must be one finite vector"),
        ({"A": np.ones(2), "B": np.ones(3)}, "one length"),
    ],
)
def test_bad_vectors_are_named(world, vectors, message):
    with pytest.raises(ValueError, match=message):
        fit_baselines(world[1], vectors=vectors)
    only_control = {population("control"): world[1][population("control")]}
    with pytest.raises(ValueError, match="at least one perturbation"):
        fit_baselines(only_control)


def read(path, context_key=None):
    import anndata as ad

    data = ad.read_h5ad(path)
    x = data.X.toarray() if hasattr(data.X, "toarray") else np.asarray(data.X)
    labels = data.obs["perturbation"].astype(str).to_numpy()
    contexts = np.full(len(x), "") if context_key is None else data.obs[context_key].astype(str).to_numpy()
    pairs = sorted(set(zip(labels, contexts, strict=True)))
    return {population(n, c): x[(labels == n) & (contexts == c)] for n, c in pairs}, data.var


def test_norman_figures(shared_data):
    """Those of the data's own README: Pearson of deltas on the 120 genes seen in ten cells, L2 on all 500."""
    found, var = read(shared_data / "pert_norman2019_subset.h5ad")
    seen = (var["n_cells"] >= 10).to_numpy()
    assert seen.sum() == 120
    targets = ("KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2")
    real = {population(t): found[population(t)] for t in targets}
    fitted = fit_baselines({p: x for p, x in found.items() if p not in real})

    def scores(rule, name, genes=slice(None)):
        pred = {p: fitted.cells(p, fitted.predict(p)[rule].delta)[:, genes] for p in real}
        cut = {p: x[:, genes] for p, x in real.items()}
        controls = {c: x[:, genes] for c, x in fitted.controls.items()}
        return list(score_perturbations(pred, cut, controls, {name: EXPRESSION_METRICS[name]})[name].values())

    additive = [0.981, 0.987, 0.729, 0.709, 0.946]
    mean = [0.844, 0.847, 0.034, -0.376, -0.488]
    np.testing.assert_allclose(scores("additive", "pearson_delta", seen), additive, atol=6e-4)
    np.testing.assert_allclose(scores("mean of perturbations", "pearson_delta", seen), mean, atol=6e-4)
    np.testing.assert_allclose(scores("control", "l2"), [1.918, 2.222, 0.634, 0.572, 1.523], atol=6e-4)
    np.testing.assert_allclose(scores("additive", "l2"), [0.371, 0.413, 0.480, 0.444, 0.522], atol=6e-4)


def test_kang_figures(shared_data):
    """Leaving out the stimulated cells of one type: R2 of the means and Pearson of deltas, README of the data."""
    found, _ = read(shared_data / "pert_kang2018_ifnb.h5ad", "cell_type")
    controls = {p.context: x for p, x in found.items() if p.is_control}
    figures = {
        "B cells": (0.814, 0.928, 0.817),
        "CD14+ Monocytes": (0.521, 0.792, 0.837),
        "CD4 T cells": (0.890, 0.927, 0.829),
        "CD8 T cells": (0.889, 0.892, 0.749),
        "FCGR3A+ Monocytes": (0.652, 0.910, 0.896),
    }
    for target in [p for p in found if not p.is_control]:
        rows = perturbation_baselines({p: x for p, x in found.items() if p != target}, target)
        ours = []
        for rule, metric in (("control", "r2"), ("shift", "r2"), ("shift", "pearson_delta")):
            chosen = {metric: EXPRESSION_METRICS[metric]}
            scores = score_perturbations({target: rows[rule].cells}, {target: found[target]}, controls, chosen)
            ours.append(scores[metric][target])
        np.testing.assert_allclose(ours, figures[target.context], atol=6e-4, err_msg=target.context)
