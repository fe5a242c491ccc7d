"""The graph against its definition written out, its symmetries, and the table of neighbours against the mask."""

import numpy as np
import pytest
from scipy import sparse

from scjax.data import graph
from scjax.data.graph import GraphRule, coexpression, neighbour_table
from scjax.data.vocabulary import SPECIAL_TOKENS, Vocabulary

N_GENES = 30


def expression(n_cells=80, n_genes=N_GENES, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_cells, 4)) @ rng.normal(size=(4, n_genes)) + rng.normal(size=(n_cells, n_genes))
    return np.maximum(x, 0).astype(np.float32)


def written_out(x, rule):
    """Each gene's list, the larger of an entry and its mirror image, and the diagonal."""
    x = np.log1p(x.astype(np.float64)) if rule.log1p else x.astype(np.float64)
    correlation = np.corrcoef(x.T)
    weight = correlation - np.diag(np.diag(correlation))
    weight = np.abs(weight) if rule.absolute else weight
    n = len(weight)
    kept = np.zeros((n, n))
    for i in range(n):
        for j in sorted(range(n), key=lambda j: -abs(weight[i, j]))[: rule.n_neighbours]:
            kept[i, j] = weight[i, j]
    return (np.maximum(kept, kept.T) != 0) | np.eye(n, dtype=bool)


@pytest.mark.parametrize("log1p", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("n_neighbours", [1, 4, N_GENES - 1, 100])
def test_definition(n_neighbours, absolute, log1p, monkeypatch):
    monkeypatch.setattr(graph, "_CELLS", 33)  # several blocks of each, the last of them short
    monkeypatch.setattr(graph, "_GENES", 8)
    rule = GraphRule(n_neighbours=n_neighbours, absolute=absolute, log1p=log1p)
    allowed = coexpression(expression(), rule)
    np.testing.assert_array_equal(allowed, written_out(expression(), rule))
    np.testing.assert_array_equal(allowed, allowed.T)


def test_each_option_matters():
    graphs = [
        coexpression(expression(), rule)
        for rule in (
            GraphRule(n_neighbours=4),
            GraphRule(n_neighbours=5),
            GraphRule(n_neighbours=4, absolute=False),
            GraphRule(n_neighbours=4, log1p=False),
        )
    ]
    assert all((a != b).any() for i, a in enumerate(graphs) for b in graphs[:i])


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_sparse_and_dense_agree(form):
    rule = GraphRule(n_neighbours=4)
    np.testing.assert_array_equal(coexpression(form(expression()), rule), coexpression(expression(), rule))


def test_cells_have_no_order_and_genes_only_names():
    x, rule = expression(), GraphRule(n_neighbours=4)
    rng = np.random.default_rng(1)
    cells, genes = rng.permutation(len(x)), rng.permutation(N_GENES)
    allowed = coexpression(x, rule)
    np.testing.assert_array_equal(coexpression(x[cells][:, genes], rule), allowed[genes][:, genes])


@pytest.mark.parametrize("level", [0.0, 0.1, 7.3])
def test_a_gene_that_does_not_vary_has_only_itself(level):
    """0.1 is no sum of powers of two: the mean of equal values is not quite the value."""
    x = expression()
    x[:, 5] = level
    for n_neighbours in (4, 100):
        allowed = coexpression(x, GraphRule(n_neighbours=n_neighbours))
        assert np.flatnonzero(allowed[5]).tolist() == [5]
        others = np.delete(np.arange(N_GENES), 5)
        without = coexpression(np.delete(x, 5, axis=1), GraphRule(n_neighbours=n_neighbours))
        np.testing.assert_array_equal(allowed[np.ix_(others, others)], without)


def test_a_gene_of_tiny_variation_is_not_constant():
    x = expression().astype(np.float64)
    x[:, 5] = 5 + 1e-7 * x[:, 6]
    assert coexpression(x, GraphRule(n_neighbours=1))[5, 6]


def test_the_table_holds_what_the_mask_allows():
    allowed = coexpression(expression(), GraphRule(n_neighbours=3))
    genes = [f"gene{i}" for i in np.random.default_rng(2).permutation(N_GENES)]
    vocabulary = Vocabulary.of(genes, ("gene3", "unmeasured"))
    table = neighbour_table(allowed, genes, vocabulary)
    assert table.dtype == np.int32
    assert table.shape == (vocabulary.n_tokens, allowed.sum(1).max())
    for i, name in enumerate(genes):
        row = table[vocabulary.gene_tokens([name])[0]]
        neighbours = sorted(vocabulary.gene_tokens([genes[j] for j in np.flatnonzero(allowed[i])]).tolist())
        assert row.tolist() == neighbours + [-1] * (len(row) - len(neighbours))
    for token in (*range(len(SPECIAL_TOKENS)), vocabulary.n_tokens - 1):
        assert table[token].tolist() == [token] + [-1] * (table.shape[1] - 1)


def test_table_without_edges():
    vocabulary = Vocabulary.of(("a", "b"), ())
    assert neighbour_table(np.eye(2, dtype=bool), ("b", "a"), vocabulary).tolist() == [[i] for i in range(6)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GraphRule(n_neighbours=0), "n_neighbours must be at least 1"),
        (lambda: coexpression(expression()[:1], GraphRule()), "training cells must be at least 2"),
        (lambda: coexpression(expression()[0], GraphRule()), r"cells x genes; its shape is \(30,\)"),
        (lambda: coexpression(expression() * np.nan, GraphRule()), "x_train must hold finite numbers"),
        (
            lambda: neighbour_table(np.eye(2, dtype=bool), ("a",), Vocabulary.of(("a",), ())),
            "name the 2 rows of allowed; got 1",
        ),
        (lambda: neighbour_table(np.eye(1, dtype=bool), ("b",), Vocabulary.of(("a",), ())), "'b' is not among"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
