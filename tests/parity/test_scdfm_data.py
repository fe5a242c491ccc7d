"""scDFM's data handling against the recorded numbers of the PyTorch code; each kind of file has its test.

Splits, gene choices, vocabularies, ids and masks agree exactly. The other kinds are read by `test_scdfm`.
"""

import json

import numpy as np
import pytest
from goldens import cases, load, or_absent, require

from scjax.data.graph import GraphRule, coexpression, neighbour_table
from scjax.data.preprocess import Preprocess, fit
from scjax.data.splits import AdditiveSplit, ComboSciPlexSplit, HoldOutGenes, split_populations
from scjax.data.vocabulary import Vocabulary
from scjax.types import Population

KINDS = ("coexpression_mask", "split_additive", "pipeline_norman_like", "pipeline_combosciplex_like")
CASES = cases("scdfm", KINDS)
RULES = {
    "additive_fold0": AdditiveSplit(fold=0),
    "additive_fold3": AdditiveSplit(fold=3),
    "combinations_fold0": HoldOutGenes(fold=0, follow="code"),
    "combinations_fold3": HoldOutGenes(fold=3, follow="code"),
    "unseen_fold0": AdditiveSplit(fold=0),  # the code never gets to its unseen genes
}


def each(kind):
    return pytest.mark.parametrize("case", or_absent("scdfm", kind, CASES[kind]))


@pytest.fixture(autouse=True)
def _at_hand():
    require("scdfm")


def strings(array):
    return tuple(map(str, array))


def parse(condition):
    """Names as they are written."""
    return tuple("control" if name == "ctrl" else name for name in condition.split("+"))


def population(condition):
    return Population(tuple(sorted(name for name in parse(condition) if name != "control")))


def split_of(rule, conditions):
    populations = sorted(set(map(population, conditions)))
    return split_populations(rule, populations, written=set(map(parse, conditions)))


def padded(allowed, genes, vocabulary):
    """The mask of the code, True where a token may not attend, from the table of neighbours."""
    table = neighbour_table(allowed, genes, vocabulary)
    mask = np.ones((len(table), len(table)), bool)
    for token, row in enumerate(table):
        mask[token, row[row >= 0]] = False
    return mask


def lognormalised(n_top_genes):
    return Preprocess(library_size=None, log1p=False, n_top_genes=n_top_genes, scale=False, n_components=None)


@each("coexpression_mask")
def test_graph(case):
    golden = load("scdfm", case)
    genes = strings(golden["in/gene_names"])
    vocabulary = Vocabulary.of(genes, ())
    order = np.argsort(genes)
    for k in json.loads(str(golden["meta_json"]))["ks"]:
        for negative in (0, 1):
            rule = GraphRule(n_neighbours=k, absolute=bool(negative), log1p=True)
            allowed = coexpression(golden["in/X"], rule)
            np.testing.assert_array_equal(~allowed, golden[f"out/mask_k{k}_neg{negative}"])
            mask = padded(allowed, genes, vocabulary)
            np.testing.assert_array_equal(mask, golden[f"out/padded_k{k}_neg{negative}"])
            np.testing.assert_array_equal(mask[4:, 4:], ~allowed[order][:, order])


@each("split_additive")
def test_additive_folds(case):
    golden = load("scdfm", case)
    doubles = strings(golden["in/doubles_sorted"])
    before = np.random.get_state()[1].copy()
    for fold in range(5):
        split = split_of(AdditiveSplit(fold=fold), ("ctrl", *doubles))
        assert {p.condition for p in split.test} == set(strings(golden[f"fold{fold}/test"]))
        assert {p.condition for p in split.train} == {"control", *strings(golden[f"fold{fold}/train"])}
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # the code seeds the global generator, we do not


@each("pipeline_norman_like")
@pytest.mark.parametrize("name", RULES)
def test_norman_pipeline(case, name):
    golden = load("scdfm", case)
    settings = json.loads(str(golden["meta_json"]))
    x, genes, written = golden["in/X_lognorm"], strings(golden["in/genes"]), strings(golden["in/condition"])
    split = split_of(RULES[name], written)
    test = {p for p in split.test if not p.is_control}
    is_test = np.array([population(c) in test for c in written])

    def renamed(condition):
        return "+".join(parse(condition))

    # The recorded list names every `X+control` of a held-out gene, whether the data write it so or not.
    held_out = {renamed(c) for c in written if population(c) in test}
    listed = set(strings(golden[f"{name}/test_conditions"]))
    assert held_out <= listed
    assert listed - held_out <= {f"{gene}+control" for gene in strings(golden["in/perturbed_genes"])}

    forced = sorted({g for c in written for g in parse(c)} & set(genes))
    assert forced == sorted(strings(golden["in/perturbed_genes"]))
    transform = fit(lognormalised(settings["n_top_genes"]), x, genes, "lognormalised", forced)
    kept = [genes.index(g) for g in transform.feature_names]
    vocabulary = Vocabulary.of(transform.feature_names, {g for c in written for g in parse(c)})
    rule = GraphRule(n_neighbours=settings["topk"], absolute=name != "unseen_fold0", log1p=True)
    mask = padded(coexpression(x[~is_test][:, kept], rule), transform.feature_names, vocabulary)
    if name == "unseen_fold0":
        assert listed == set(strings(golden["additive_fold0/test_conditions"]))
        np.testing.assert_array_equal(mask, golden[f"{name}/mask_padded_no_negative"])
        return

    np.testing.assert_array_equal(mask, golden[f"{name}/mask_padded"])
    np.testing.assert_array_equal(np.where(is_test, "test", "train"), golden[f"{name}/mode"])
    assert strings(golden[f"{name}/condition_renamed"]) == tuple(map(renamed, written))
    assert transform.feature_names == strings(golden[f"{name}/var_names_train"])
    assert vocabulary.tokens == strings(golden["vocab/tokens"])
    np.testing.assert_array_equal(vocabulary.gene_tokens(transform.feature_names), golden["vocab/train_gene_ids"])
    assert vocabulary.perturbations == strings(golden[f"{name}/perturbation_vocab"])

    controls = np.array([population(c).is_control for c in written])
    for part, rows in (("train", ~is_test), ("test", is_test | controls)):
        assert rows.sum() == golden[f"{name}/n_{part}"]
        there = [parse(c) for c, row in zip(written, rows, strict=True) if row]
        ids = vocabulary.encode([("control", "control") if c == ("control",) else c for c in there], "table", 2)
        np.testing.assert_array_equal(ids, golden[f"{name}/{part}_condition_ids"])
        named = {"+".join(c) for c in there if c != ("control",)}
        assert tuple(sorted(named)) == strings(golden[f"{name}/{part}_perturbations"])

    scored = fit(
        lognormalised(settings["infer_top_gene"]),
        x[is_test | controls][:, kept],
        transform.feature_names,
        "lognormalised",
    )
    assert scored.feature_names == strings(golden[f"{name}/var_names_test"])


@each("pipeline_norman_like")
@pytest.mark.parametrize("fold", [0, 3])
def test_all_that_the_paper_holds_out_and_the_code_does_not(case, fold):
    golden = load("scdfm", case)
    written = strings(golden["in/condition"])
    code, paper = (split_of(HoldOutGenes(fold=fold, follow=follow), written) for follow in ("code", "paper"))
    assert set(code.test) < set(paper.test)
    genes = {g for c in strings(golden[f"combinations_fold{fold}/test_conditions"]) for g in c.split("+")} - {"control"}
    assert all(genes.isdisjoint(p.perturbation) for p in paper.train)
    assert any(not genes.isdisjoint(p.perturbation) for p in code.train)
    # Without the spellings, singles written `ctrl+X` are test like the others.
    blind = split_populations(HoldOutGenes(fold=fold, follow="code"), sorted(set(map(population, written))))
    leaked = {p for p in blind.test if p not in code.test}
    assert leaked == {population(c) for c in written if c.startswith("ctrl+") and genes.issuperset(c.split("+")[1:])}
    assert leaked


@each("pipeline_norman_like")
def test_additive_folds_of_the_pipeline(case):
    golden = load("scdfm", case)
    written = strings(golden["in/condition"])
    for fold in range(5):
        split = split_of(AdditiveSplit(fold=fold), written)
        assert {p.condition for p in split.test} == set(strings(golden[f"additive_splits/{fold}_test"]))
        doubles = {p.condition for p in split.train if len(p.perturbation) > 1}
        assert doubles == set(strings(golden[f"additive_splits/{fold}_train"]))


@each("pipeline_combosciplex_like")
def test_combosciplex_pipeline(case):
    golden = load("scdfm", case)
    settings = json.loads(str(golden["meta_json"]))
    counts, genes, written = golden["in/counts"], strings(golden["in/genes"]), strings(golden["in/condition"])
    split = split_of(ComboSciPlexSplit(), written)
    is_test = np.array([population(c) in split.test for c in written])
    np.testing.assert_array_equal(np.where(is_test, "test", "train"), golden["out/mode"])

    steps = Preprocess(
        library_size="all_genes",
        target_sum="median",
        n_top_genes=settings["n_top_genes"],
        select_on="all",
        scale=False,
        n_components=None,
    )
    transform = fit(steps, counts[~is_test], genes, "counts", x_all=counts)
    assert transform.feature_names == strings(golden["out/var_names_train"])
    np.testing.assert_array_equal(np.isin(genes, transform.feature_names), golden["out/highly_variable"])
    x = transform.apply(counts, genes)
    recorded = golden["out/X_lognorm"][:, golden["out/highly_variable"]]
    np.testing.assert_allclose(x, recorded, rtol=1e-6)  # theirs is computed in float32

    vocabulary = Vocabulary.of(transform.feature_names, ())
    rule = GraphRule(n_neighbours=settings["topk"], absolute=True, log1p=True)
    mask = padded(coexpression(x[~is_test], rule), transform.feature_names, vocabulary)
    np.testing.assert_array_equal(mask, golden["out/mask_padded"])

    drugs = Vocabulary.of(transform.feature_names, {d for c in written for d in parse(c)})
    assert drugs.perturbations == strings(golden["out/perturbation_vocab"])
    controls = np.array([population(c).is_control for c in written])
    for part, rows in (("train", ~is_test), ("test", is_test | controls)):
        there = [c for c, row in zip(written, rows, strict=True) if row]
        ids = drugs.encode(list(map(parse, there)), "table", 2)
        np.testing.assert_array_equal(ids, golden[f"out/{part}_condition_ids"])
        named = {c for c in there if not population(c).is_control}
        assert tuple(sorted(named)) == strings(golden[f"out/{part}_perturbations"])

    scored = fit(
        lognormalised(settings["infer_top_gene"]), x[is_test | controls], transform.feature_names, "lognormalised"
    )
    assert scored.feature_names == strings(golden["out/var_names_test"])
