"""Every rule finds the leak that is planted for it, and says nothing of data that have none."""

import json
import tracemalloc
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scjax.data import datasets, synthetic
from scjax.data.cellsets import prepare_cell_sets
from scjax.data.evidence import Evidence
from scjax.data.leaks import RULES, Finding, Findings, check_split
from scjax.data.perturbation import prepare_perturbation
from scjax.data.preprocess import Preprocess, fit
from scjax.data.spec import DataSpec
from scjax.data.splits import (
    HoldOutConditions,
    HoldOutContexts,
    HoldOutGenes,
    HoldOutNone,
    HoldOutPopulations,
    HoldOutTimes,
    LeaveOut,
    PerturbationSplit,
    TimeSplit,
    UnseenSingles,
    split_populations,
    split_times,
)
from scjax.data.timeseries import prepare_time_series
from scjax.presets import preset
from scjax.types import Population

SPEC = DataSpec(space="counts", perturbation="drug", batch="plate", covariates=("line",))
SERIES = DataSpec(space="counts", time="day", batch="plate")
LOGGED = DataSpec(space="lognormalised", perturbation="drug", batch="plate", covariates=("line",))
STEPS = Preprocess(n_top_genes=20, scale=False, n_components=None)
SCALED = Preprocess(n_top_genes=15, n_components=4)
AS_GIVEN = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
GENES = [f"g{i}" for i in range(40)]
DRUGS, LINES, N = ("ctrl", "A", "B", "C", "D", "E", "F"), ("x", "y"), 30


def cells_of(level, rng):
    return rng.poisson(level * rng.gamma(4.0, 0.25, level.shape)).astype(np.int32)


def make_perturbed(drugs=DRUGS, lines=LINES, n=N, genes=GENES, seed=0):
    """Counts of every drug in every line on two plates, in random order. A drug changes a few genes of its own."""
    rng = np.random.default_rng(seed)
    cells = [(drug, line, f"plate{i % 2}") for drug in drugs for line in lines for i in range(n)]
    cells = [cells[i] for i in rng.permutation(len(cells))]
    base = np.linspace(1.0, 20.0, len(genes))

    def effect(word):
        return np.exp(np.random.default_rng(list(word.encode())).normal(size=len(genes)) / 4)

    level = np.stack([base * (1 if drug == "ctrl" else effect(drug)) * effect(line) for drug, line, _ in cells])
    obs = pd.DataFrame(cells, columns=["drug", "line", "plate"], index=[f"c{i}" for i in range(len(cells))])
    return anndata.AnnData(cells_of(level, rng), obs=obs, var=pd.DataFrame(index=list(genes)))


def make_series(seed=0):
    rng = np.random.default_rng(seed)
    day = rng.permutation(np.repeat([0.0, 1.0, 2.0, 3.0], 40))
    level = np.linspace(2.0, 12.0, 30) * np.exp(np.outer(day, np.linspace(-0.4, 0.4, 30)))
    obs = pd.DataFrame(
        {"day": day, "plate": [f"plate{i % 2}" for i in range(160)]}, index=[f"c{i}" for i in range(160)]
    )
    return anndata.AnnData(cells_of(level, rng), obs=obs, var=pd.DataFrame(index=GENES[:30]))


def perturbed(adata=None, spec=SPEC, rule=None, steps=STEPS):
    """Arguments of `check_split`, all fitted as an experiment does; controls are divided between the parts."""
    adata = make_perturbed() if adata is None else adata
    rule = HoldOutConditions(conditions=("E", "F")) if rule is None else rule
    data = prepare_cell_sets(adata, spec, rule, steps, control_seed=1)
    return {"adata": adata, "spec": spec, "split": data.split, "transform": data.transform, "part": data.part}


def series(adata=None, spec=SERIES, rule=None, steps=SCALED):
    adata = make_series() if adata is None else adata
    data = prepare_time_series(adata, spec, HoldOutTimes(times=(2.0,)) if rule is None else rule, steps)
    return {"adata": adata, "spec": spec, "split": data.split, "transform": data.transform}


def logged(adata):
    """The same cells, as log-normalised values."""
    adata = adata.copy()
    x = adata.X.astype(np.float64)
    adata.X = np.log1p(x / x.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
    return adata


def rename(adata, old, new, rows=slice(None)):
    adata = adata.copy()
    drug = adata.obs["drug"].to_numpy(dtype=object)
    here = np.flatnonzero(drug == old)[rows]
    drug[here] = new
    adata.obs["drug"] = drug
    return adata


def findings_of(given, rule):
    return [f for f in check_split(**given).found if f.rule == rule]


CLEAN = {
    "perturbed": perturbed,
    "series": series,
    "log-normalised": lambda: perturbed(logged(make_perturbed()), LOGGED, steps=replace(AS_GIVEN, n_top_genes=20)),
    "sparse": lambda: perturbed(with_matrix(make_perturbed(), sparse.csr_matrix)),
    "median": lambda: perturbed(steps=replace(STEPS, target_sum="median")),
    "selected genes": lambda: series(steps=replace(SCALED, library_size="selected_genes", target_sum="median")),
    "scaled only": lambda: series(steps=replace(SCALED, n_components=None)),
    "sparse series": lambda: series(with_matrix(make_series(), sparse.csr_matrix)),
    "nothing held out": lambda: series(rule=HoldOutNone()),
    "untransformed": lambda: perturbed() | {"transform": None},
    "Klein 2015": lambda: shipped("scimf/klein", datasets.klein2015()),
}


def with_matrix(adata, make):
    adata = adata.copy()
    adata.X = make(adata.X)
    return adata


def shipped(name, adata):
    e = preset(name).experiment
    return series(adata, e.spec, e.split, e.preprocess)


@pytest.mark.parametrize("make", CLEAN.values(), ids=CLEAN.keys())
def test_nothing_is_found_in_clean_data(make):
    findings = check_split(**make())
    assert findings.found == ()
    assert findings.rules == tuple(rule.name for rule in RULES)
    findings.stop()


# ---------------------------------------------------------------- one planted leak for each rule


def in_both_parts():
    given = perturbed()
    split = given["split"]
    return given | {"split": replace(split, train=(*split.train, Population(("E",), "x"))), "part": None}


def validated_on_test():
    given = perturbed()
    return given | {"split": replace(given["split"], validation=given["split"].test[:3])}


def split_of_other_data():
    given = perturbed()
    split = given["split"]
    test = (Population(("Z",), "x"), *split.test[1:])  # Z is not there, and E in x is in no part
    return given | {"split": replace(split, test=test)}


def under_two_names():
    return perturbed(make_perturbed(("ctrl", "A", "B", "Drug C", "drug-c")), rule=only("drug-c"))


def unnamed_control():
    return perturbed(make_perturbed(("ctrl", "DMSO", "B", "C", "E")), rule=only("E"))


def only(*conditions):
    return HoldOutConditions(conditions=conditions)


def in_other_lines():
    return perturbed(rule=HoldOutPopulations(populations=(("E", "x"), ("F", "y"), ("F", "x"))))


def start_held_out():
    given = series()
    rule = HoldOutTimes(times=(0.0,))
    return given | {"split": TimeSplit(rule=rule, train=(1.0, 2.0, 3.0), held_out=(0.0,)), "transform": None}


def times_side_by_side():
    adata = make_series()
    day = adata.obs["day"].to_numpy().copy()
    day[np.flatnonzero(day == 2.0)[:20]] = 2.01
    adata.obs["day"] = day
    return series(adata)


def chosen_with_test_cells():
    given = perturbed(world_of_selection())
    return given | {"transform": fit(STEPS, given["adata"].X, GENES, "counts")}


def world_of_selection():
    """Held-out drugs make other genes vary than the drugs of training do."""
    adata = make_perturbed()
    rng, held_out = np.random.default_rng(1), np.isin(adata.obs["drug"], ["E", "F"])
    x = adata.X.copy()
    x[np.ix_(held_out, range(5))] *= rng.integers(0, 12, (held_out.sum(), 5))
    adata.X = x
    return adata


def chosen_beforehand():
    given = perturbed()
    adata = given["adata"]
    adata.var["highly_variable"] = True
    return given


def scaled_with_test_cells():
    given = series()
    steps = replace(SCALED, n_top_genes=None)
    return given | {"transform": fit(steps, given["adata"].X, given["adata"].var_names, "counts")}


def embedded_with_test_cells():
    return latent(slice(None))


def latent(rows):
    """Principal components of the log-normalised cells, fitted on some of them."""
    adata = logged(make_series())
    x = adata.X.astype(np.float64)
    mean = x[rows].mean(axis=0)
    adata.obsm["X_pca"] = ((x - mean) @ np.linalg.svd(x[rows] - mean)[2][:5].T).astype(np.float32)
    return series(adata, replace(SERIES, space="latent", expression="obsm/X_pca"), steps=AS_GIVEN)


def fitted_on_another_split():
    given = series()
    return given | {"split": split_times(HoldOutTimes(times=(1.0,)), (0.0, 1.0, 2.0, 3.0))}


def of_another_checkpoint():
    return perturbed() | {"digests": ("3f2a", "77c1")}


def targets_measured():
    return perturbed(make_perturbed(genes=["E", *GENES[1:]]), steps=replace(STEPS, n_top_genes=None))


def without_embedding():
    adata = make_perturbed()
    rng = np.random.default_rng(0)
    adata.uns["esm"] = {name: rng.normal(size=3) for name in DRUGS[1:]}
    adata.uns["esm"]["F"] = np.zeros(3)
    return perturbed(adata, replace(SPEC, vectors="esm"))


def copied_cells():
    return perturbed(copied("A", "E", 5))


def copied(source, target, n):
    adata = make_perturbed()
    x, drug = adata.X.copy(), adata.obs["drug"].to_numpy()
    x[np.flatnonzero(drug == target)[:n]] = x[np.flatnonzero(drug == source)[:n]]
    adata.X = x
    return adata


def repeated_cells():
    adata = make_perturbed()
    x, rows = adata.X.copy(), np.flatnonzero(adata.obs["drug"] == "A")
    x[rows[1:4]] = x[rows[0]]
    adata.X = x
    return perturbed(adata)


def undivided_controls():
    return perturbed() | {"part": None, "transform": None}


def without_controls():
    adata = make_perturbed()
    adata = adata[~((adata.obs["drug"] == "ctrl") & (adata.obs["line"] == "y"))].copy()
    populations, _ = SPEC.read_populations(adata)
    return {"adata": adata, "spec": SPEC, "split": split_populations(only("E", "F"), populations, ("line",))}


def unlike_controls():
    adata = make_perturbed(lines=("x", "y", "z"))
    x, rows = adata.X.copy(), np.flatnonzero(adata.obs["line"] == "z")
    x[rows] = x[rows][:, ::-1]
    adata.X = x
    return perturbed(adata, rule=LeaveOut(covariate="line", value="z"))


def on_a_plate_of_its_own():
    adata = make_perturbed()
    adata.obs.loc[adata.obs["drug"] == "F", "plate"] = "plate9"
    return perturbed(adata)


def few_cells():
    adata = make_perturbed()
    spare = np.flatnonzero((adata.obs["drug"] == "E") & (adata.obs["line"] == "x"))[7:]
    return perturbed(adata[np.setdiff1d(np.arange(adata.n_obs), spare)].copy())


def nothing_to_train_on():
    given = perturbed()
    populations, _ = SPEC.read_populations(given["adata"])
    split = given["split"]
    train = tuple(p for p in populations if p.is_control)
    test = tuple(p for p in populations if not p.is_control)
    return given | {"split": replace(split, train=train, test=test), "part": None, "transform": None}


def counts_called_logged():
    adata = make_perturbed()
    adata.X = np.minimum(adata.X, 15).astype(np.float32)
    return perturbed(adata, LOGGED, steps=AS_GIVEN)


def twice_logged():
    adata = logged(make_perturbed())
    adata.X = np.log1p(adata.X)
    return perturbed(adata, LOGGED, steps=AS_GIVEN)


# rule: what plants it, its severity, and what the evidence must say
PLANTED = {
    "test-in-training": (in_both_parts, "error", "1 of 4 held-out populations are in training too: E (x)"),
    "test-as-validation": (validated_on_test, "error", "3 of 3 validation populations are in test too: E (x), E (y), "),
    "stale-split": (split_of_other_data, "error", "1 population of the split, not of the data: Z (x)"),
    "same-perturbation-two-names": (under_two_names, "error", "'Drug C' (train) and 'drug-c' (test)"),
    "control-by-another-name": (unnamed_control, "warning", "'DMSO' of 60 cells count as perturbations"),
    "seen-elsewhere": (in_other_lines, "note", "the perturbations of 1 of 3 held-out populations elsewhere"),
    "start-time-scored": (start_held_out, "error", "not after the first training time 1, where simulations start: 0."),
    "neighbouring-times": (times_side_by_side, "warning", "2 is 0.01 from the training time 2.01"),
    "genes-from-test-cells": (chosen_with_test_cells, "error", "all 420 cells, "),
    "genes-chosen-before": (chosen_beforehand, "warning", "the 40 genes were chosen as variable ones"),
    "scaling-from-test-cells": (scaled_with_test_cells, "error", "those of all 160 cells, 40 held-out ones among them"),
    "embedding-from-test-cells": (embedded_with_test_cells, "error", "'obsm/X_pca' is a PCA of all cells, 40 held-out"),
    "stale-transform": (fitted_on_another_split, "error", "the genes of the transform are of other cells; "),
    "stale-data": (of_another_checkpoint, "error", "the digest of these data is 3f2a, that of the checkpoint's 77c1"),
    "targets-among-features": (targets_measured, "note", "1 of the 2 perturbed genes of the test are among the 40"),
    "zero-vectors": (without_embedding, "error", "1 held-out perturbation with a vector of zeros: F."),
    "duplicates-across-parts": (copied_cells, "error", "5 of "),
    "duplicates-within-part": (repeated_cells, "warning", "3 of "),
    "shared-controls": (undivided_controls, "note", "60 of the 60 control cells of held-out contexts"),
    "no-own-controls": (without_controls, "warning", "2 of 4 held-out populations have no control cells"),
    "controls-differ": (unlike_controls, "note", "the controls of 1 of 1 held-out contexts are unlike"),
    "batch-confounded": (on_a_plate_of_its_own, "warning", "2 of 4 held-out populations (F (x), F (y))"),
    "few-held-out-cells": (few_cells, "warning", "1 of 4 held-out populations have fewer than 20 cells: E (x) 7."),
    "small-training": (nothing_to_train_on, "error", "training has 0 conditions and 60 cells, 360 cells are held out"),
    "space-declared-wrong": (counts_called_logged, "error", "are integers, up to 15, but space='lognormalised'"),
    "logged-twice": (twice_logged, "error", "exp(exp(x) - 1) - 1 gives multiples of the smallest value (100% of"),
}
# What a planted leak brings with it in truth: without `part` all controls are shared, another split is stale, ...
BESIDES = {
    "test-as-validation": {"shared-controls"},
    "no-own-controls": {"shared-controls"},
    "small-training": {"shared-controls"},
    "test-in-training": {"shared-controls", "stale-transform", "seen-elsewhere"},
    "controls-differ": {"seen-elsewhere"},
}


def test_every_rule_has_its_plant():
    assert list(PLANTED) == [rule.name for rule in RULES]
    for rule in RULES:
        assert PLANTED[rule.name][1] == rule.severity or rule.name == "seen-elsewhere"  # its warning: see below
        assert rule.looks_for.endswith(".")
        assert len(rule.looks_for) > 20


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_leak_is_found(rule):
    plant, severity, told = PLANTED[rule]
    findings = check_split(**plant())
    found = [f for f in findings.found if f.rule == rule]
    assert found[0].severity == severity
    assert told in found[0].evidence
    assert found[0].mend
    assert {f.rule for f in findings.found} - {rule} <= BESIDES.get(rule, set())
    if severity == "error":
        with pytest.raises(ValueError, match=f"allow_leaks=.*{rule}"):
            findings.stop()
        everything = {f.rule for f in findings.of("error")}
        check_split(**plant(), allowed=sorted(everything)).stop()


# ---------------------------------------------------------------- names


def split_by_hand(test, train=(("A",), ("B",))):
    """Of data with the conditions of these names in two lines; nothing is canonical but what the caller makes so."""
    names = sorted({"+".join(names) for names in (*test, *train)})
    adata = make_perturbed(("ctrl", *names), n=20)
    parts = {"train": [(), *train], "test": test}
    populations = {part: tuple(Population(n, line) for n in names for line in LINES) for part, names in parts.items()}
    return adata, PerturbationSplit(rule=only("E"), validation=(), **populations)


@pytest.mark.parametrize("spelling", [("A", "ctrl"), ("ctrl", "A"), ("control", "A"), ("A ", "ctrl")])
def test_a_condition_is_recognised_in_whatever_form_the_split_has_it(spelling):
    adata, split = split_by_hand([spelling])
    found = findings_of({"adata": adata, "split": split, "spec": SPEC}, "test-in-training")
    assert "2 of 2 held-out populations are in training too: A (x), A (y)." in found[0].evidence


def test_the_order_of_names_in_a_split_does_not_matter():
    adata, split = split_by_hand([("B", "A")], [("A",), ("A", "B")])
    found = findings_of({"adata": adata, "split": split, "spec": SPEC}, "test-in-training")
    assert "A+B (x)" in found[0].evidence


@pytest.mark.parametrize(
    ("train", "test", "is_one"),
    [
        ("KLF1", "klf1", True),
        ("KLF 1", "KLF1", True),
        ("JQ1@0.5", "jq1@0.5", True),
        ("A+B", "A_B", True),
        ("A+B", "b|a", True),
        ("A", "A_ctrl", True),
        ("KLF1", "KLF11", False),
        ("JQ1@0.5", "JQ1@5", False),
        ("A+C", "A_B", False),
        ("IL2", "IL4", False),
        ("HLA_A", "HLA_B", False),
    ],
)
def test_names_that_differ_in_their_spelling_alone_are_one(train, test, is_one):
    given = perturbed(make_perturbed(("ctrl", "A", "B", "C", train, test), n=20), rule=only(test))
    found = findings_of(given, "same-perturbation-two-names")
    assert [f.severity for f in found] == (["error"] if is_one else [])


def test_two_names_in_one_part_are_a_warning():
    given = perturbed(make_perturbed(("ctrl", "A", "a", "E"), n=20), rule=only("E"))
    (found,) = findings_of(given, "same-perturbation-two-names")
    assert found.severity == "warning"
    assert "'A' (train) and 'a' (train)" in found.evidence


def test_what_is_new_is_told_by_axis():
    """Also where a rule promises unseen perturbations and keeps half of them, as the published code does."""
    adata = make_perturbed(("ctrl", "A", "B", "C", "A+B", "A+C", "B+C"), n=20)
    rule = HoldOutPopulations(populations=(("B+C", "x"), ("B+C", "y"), ("A", "y")))
    (found,) = findings_of(perturbed(adata, rule=rule), "seen-elsewhere")
    assert found.severity == "note"
    assert "combination: 2 (B+C (x), B+C (y))" in found.evidence
    assert "pair: 1 (A (y))" in found.evidence
    rule = HoldOutGenes(follow="code", n_doubles=1, test_fraction=0.34)
    (found,) = findings_of(perturbed(adata, rule=rule), "seen-elsewhere")
    assert found.severity == "warning"
    assert not findings_of(perturbed(adata, rule=UnseenSingles(n_genes=1)), "seen-elsewhere")


# ---------------------------------------------------------------- what was fitted


@pytest.mark.parametrize("steps", [replace(SCALED, n_components=None), replace(SCALED, scale=False)])
def test_each_statistic_of_a_scaling_is_compared(steps):
    """With genes that nobody chose; another split of the same data is neither training nor all."""
    steps = replace(steps, n_top_genes=None)
    given = series(steps=steps)
    x, names = given["adata"].X, given["adata"].var_names
    assert check_split(**given).found == ()
    (found,) = check_split(**given | {"transform": fit(steps, x, names, "counts")}).found
    assert (found.rule, found.severity) == ("scaling-from-test-cells", "error")
    (found,) = check_split(**given | {"transform": fit(steps, x[:50], names, "counts")}).found
    assert (found.rule, found.severity) == ("stale-transform", "error")
    whole = given["transform"]
    if steps.n_components is None:  # only the standard deviations are of all cells
        wrong = replace(whole, std=whole.std * 1.1)
    else:  # the PCA is not of these cells, the means are
        wrong = replace(whole, explained_variance=whole.explained_variance * 1.1)
    assert [f.rule for f in check_split(**given | {"transform": wrong}).found] == ["stale-transform"]


def test_a_median_total_of_all_cells_is_a_leak():
    steps = replace(STEPS, n_top_genes=None, target_sum="median")
    adata = make_perturbed()
    x = adata.X.copy()
    x[np.isin(adata.obs["drug"], ["E", "F"])] *= 3
    adata.X = x
    given = perturbed(adata, steps=steps)
    assert check_split(**given).found == ()
    (found,) = check_split(**given | {"transform": fit(steps, x, GENES, "counts")}).found
    assert (found.rule, found.severity) == ("genes-from-test-cells", "error")
    assert "the median total is" in found.evidence


def test_a_choice_on_all_cells_that_was_asked_for_is_a_warning():
    (found,) = check_split(**perturbed(world_of_selection(), steps=replace(STEPS, select_on="all"))).found
    assert (found.rule, found.severity) == ("genes-from-test-cells", "warning")
    assert "136 held-out cells choose genes too" in found.evidence


def test_perturbed_genes_that_were_forced_in_are_no_choice():
    adata = make_perturbed(genes=["A", "E", *GENES[2:]])  # both hardly vary
    spec = replace(SPEC, covariates=("line",))
    data = prepare_perturbation(adata, spec, only("E", "F"), STEPS)
    assert {"A", "E"} < set(data.transform.feature_names)
    rules = {f.rule for f in check_split(adata, data.split, data.transform, spec=spec).found}
    assert rules == {"targets-among-features", "shared-controls"}


def test_genes_that_the_data_lack_make_a_transform_stale():
    given = perturbed()
    given["adata"] = given["adata"][:, :-2].copy()
    (found,) = check_split(**given).found
    assert (found.rule, found.severity) == ("stale-transform", "error")
    assert "2 of the transform's 40 genes: g38, g39." in found.evidence


def test_a_latent_is_proven_or_suspected():
    """A PCA of the training cells proves itself, another embedding only can be doubted."""
    train = np.flatnonzero(make_series().obs["day"] != 2.0)
    assert check_split(**latent(train)).found == ()
    world = synthetic.to_anndata(
        synthetic.GaussianShift(velocity=(1.0, 0.0)).simulate((0.0, 1.0, 2.0), seed=0, n_cells=40)
    )
    spec = DataSpec(expression="obsm/latent", space="latent", time="time", cell_type="kind")
    (found,) = check_split(**series(world, spec, HoldOutTimes(times=(1.0,)), AS_GIVEN)).found
    assert (found.rule, found.severity) == ("embedding-from-test-cells", "warning")
    assert "the 40 held-out cells" in found.evidence


def test_variable_genes_in_obsm_are_doubted():
    adata = logged(make_perturbed())
    adata.obsm["X_hvg"] = pd.DataFrame(adata.X[:, :30], index=adata.obs_names, columns=GENES[:30])
    (found,) = check_split(**perturbed(adata, replace(LOGGED, expression="obsm/X_hvg"), steps=AS_GIVEN)).found
    assert (found.rule, found.severity) == ("genes-chosen-before", "warning")
    adata.var["highly_variable"] = [True] * 30 + [False] * 10  # marks that the run does not use
    assert check_split(**perturbed(adata, LOGGED, steps=AS_GIVEN)).found == ()


def test_vectors_that_others_have_too():
    given = without_embedding()
    vectors = given["adata"].uns["esm"]
    vectors["F"], vectors["A"] = vectors["B"], np.zeros(3)
    found = findings_of(given, "zero-vectors")
    assert [f.severity for f in found] == ["warning", "warning"]
    assert "1 training perturbation with a vector of zeros: A." in found[0].evidence
    assert "B=F" in found[1].evidence


# ---------------------------------------------------------------- cells


def test_one_copy_among_many_is_a_warning():
    (found,) = findings_of(perturbed(copied("A", "E", 1)), "duplicates-across-parts")
    assert found.severity == "warning"
    names = perturbed(copied("A", "E", 1))["adata"].obs_names
    one, other = found.evidence.split(": ")[1].rstrip(".").split("=")
    assert {one, other} <= set(names)


def test_fingerprints_tell_equal_cells_whatever_they_are_stored_in():
    """Dense, sparse with explicit zeros, in pieces, with columns unsorted, of another dtype, -0 beside 0."""
    x = np.random.default_rng(0).poisson(0.7, (300, 60)).astype(np.float64)
    x[7], x[9] = 0.0, x[8]

    def of(matrix):
        adata = anndata.AnnData(obs=make_perturbed().obs[:300], var=pd.DataFrame(index=[f"g{i}" for i in range(60)]))
        adata.layers["m"] = matrix
        spec = replace(SPEC, expression="layers/m")
        return Evidence(adata=adata, spec=spec, split=split_by_hand([("E",)])[1]).fingerprints

    found, n_values = of(x)
    np.testing.assert_array_equal(n_values, (x != 0).sum(axis=1))
    _, same = np.unique(x, axis=0, return_inverse=True)
    np.testing.assert_array_equal(found[:, None] == found, same[:, None] == same)
    whole = sparse.csr_matrix(x)
    zeros = whole.copy()
    zeros.data[::7] = 0.0
    pieces = sparse.csr_matrix(  # each value in two halves
        (np.repeat(whole.data / 2, 2), np.repeat(whole.indices, 2), whole.indptr * 2), shape=x.shape
    )
    for other in (
        whole,
        whole.astype(np.float32),
        x.astype(np.int32),
        np.where(x == 0, -0.0, x),
        whole.tocsc(),
        pieces,
    ):
        np.testing.assert_array_equal(of(other)[0], found)
    assert pieces.nnz == 2 * whole.nnz  # the user's own matrix is left as it was
    np.testing.assert_array_equal(of(zeros)[0], of(zeros.toarray())[0])
    np.testing.assert_array_equal(of(zeros)[1], of(zeros.toarray())[1])


def test_batches_that_the_split_means_are_not_reported():
    """Held-out donors are of another batch, of course; and where the spec names no batch, a column called so counts."""
    adata = make_perturbed(n=20)
    adata.obs["plate"] = adata.obs["line"].map({"x": "p", "y": "q"})
    spec = replace(SPEC, batch=None, covariates=("plate",))
    given = perturbed(adata, spec, HoldOutContexts(covariates=("plate",), values=(("p",),)))
    assert not findings_of(given, "batch-confounded")
    spec = replace(SPEC, batch=None, covariates=("line",))
    given = perturbed(adata, spec, HoldOutContexts(covariates=("line",), values=(("x",),)))
    (found,) = findings_of(given, "batch-confounded")
    assert "obs['plate'] that training has not (p)" in found.evidence


@pytest.mark.parametrize("n_logs", [0, 1, 2])
def test_logarithms_are_counted(n_logs):
    """0: counts per ten, which no bound on log-normalised values refuses."""
    adata = make_perturbed()
    x = adata.X / adata.X.sum(axis=1, keepdims=True) * (10 if n_logs == 0 else 1e4)
    for _ in range(n_logs):
        x = np.log1p(x)
    adata.X = x.astype(np.float32)
    found = [(f.rule, f.severity) for f in check_split(**perturbed(adata, LOGGED, steps=AS_GIVEN)).found]
    assert found == [[("space-declared-wrong", "error")], [], [("logged-twice", "error")]][n_logs]


def test_integers_that_are_called_a_latent_are_doubted():
    found = findings_of(series(spec=replace(SERIES, space="latent"), steps=AS_GIVEN), "space-declared-wrong")
    assert [f.severity for f in found] == ["warning"]


def test_a_training_smaller_than_the_test_is_a_warning():
    given = series(rule=HoldOutTimes(times=(1.0, 2.0)))
    assert not findings_of(given, "small-training")
    adata = make_series()
    small = np.concatenate([np.flatnonzero(adata.obs["day"] == day)[20:] for day in (0.0, 3.0)])
    given = series(adata[np.setdiff1d(np.arange(160), small)].copy(), rule=HoldOutTimes(times=(1.0, 2.0)))
    assert [f.severity for f in findings_of(given, "small-training")] == ["warning"]


def test_a_large_sparse_matrix_stays_sparse():
    rng = np.random.default_rng(0)
    n, n_genes = 6000, 20_000  # 480 MB as float32
    x = sparse.csr_matrix(
        (
            rng.integers(1, 9, 10 * n).astype(np.float32),
            np.sort(rng.integers(0, 2000, (n, 10)) + 2000 * np.arange(10), axis=1).ravel(),
            np.arange(n + 1) * 10,
        ),
        shape=(n, n_genes),
    )
    obs = pd.DataFrame({"drug": np.tile(["ctrl", "A", "E"], n // 3), "line": "x"}, index=[f"c{i}" for i in range(n)])
    adata = anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))
    spec = replace(SPEC, batch=None)
    split = split_populations(only("E"), spec.read_populations(adata)[0], ("line",))
    tracemalloc.start()
    found = check_split(adata, split, spec=spec).found
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [f.rule for f in found] == ["shared-controls"]
    assert peak < 150e6


# ---------------------------------------------------------------- findings


def test_the_shipped_presets_have_no_errors():
    norman, mcfaline = (preset(name).experiment for name in ("scdfm/norman_subset", "perturbdiff/mcfaline"))
    adata = datasets.norman2019()
    data = prepare_perturbation(adata, norman.spec, norman.split, norman.preprocess, norman.graph)
    found = check_split(adata, data.split, data.transform, spec=norman.spec).found
    adata = datasets.mcfaline2023()
    data = prepare_cell_sets(adata, mcfaline.spec, mcfaline.split, mcfaline.preprocess)
    found += check_split(adata, data.split, data.transform, spec=mcfaline.spec, part=data.part).found
    assert {f.rule for f in found} == {"seen-elsewhere", "shared-controls"}
    assert {f.severity for f in found} == {"note"}


FINDINGS = Findings(
    (Finding("a", "error", "3 cells.", "Mend it."), Finding("b", "note", "2 genes.", "Say so.")), ("a", "b", "c")
)


def test_findings_stop_what_nobody_allowed():
    with pytest.raises(
        ValueError, match=r"1 leak in the data or the split:\n  a: 3 cells\. Mend it\.\n.*allow_leaks=\['a'\]"
    ):
        FINDINGS.stop()
    replace(FINDINGS, allowed=("a",)).stop()
    replace(FINDINGS, found=FINDINGS.of("note")).stop()


def test_findings_are_told_and_come_back_from_json():
    assert FINDINGS.render().splitlines() == [
        "check_split: 3 rules; 1 error, 0 warnings, 1 note",
        "  error a: 3 cells.",
        "    Mend it.",
        "  note b: 2 genes.",
        "    Say so.",
    ]
    allowed = replace(FINDINGS, allowed=("a",))
    assert "error (allowed) a: 3 cells." in allowed.render()
    assert Findings.from_json_dict(json.loads(json.dumps(allowed.to_json_dict()))) == allowed


def test_errors_come_first():
    severities = [f.severity for f in check_split(**in_both_parts() | {"digests": ("a", "b")}).found]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert len(set(severities)) > 1


def test_bad_arguments_are_refused():
    given = perturbed()
    with pytest.raises(ValueError, match="allow_leaks must be one of .* got 'stale-date'. Did you mean 'stale-data'"):
        check_split(**given, allowed=["stale-date"])
    with pytest.raises(ValueError, match="part must have an entry for each of the 420 cells; got 7"):
        check_split(**given | {"part": np.zeros(7, np.int8)})
