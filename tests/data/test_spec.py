"""What `DataSpec.check` finds, and that it finds all of it at once."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scjax.config import from_dict, to_dict
from scjax.data.source import CellSource, open_source
from scjax.data.spec import DataSpec, feature_names
from scjax.types import Population

COUNTS = DataSpec(space="counts", time="day")
LOGGED = DataSpec(space="lognormalised", time="day")


def cells(x=None, **obs):
    x = np.random.default_rng(0).poisson(3.0, (8, 5)).astype(np.float32) + 1 if x is None else np.asarray(x)
    obs = pd.DataFrame({"day": [0.0] * 4 + [2.0] * 4, **obs}, index=[f"c{i}" for i in range(len(x))])
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(x.shape[1])]))


def with_value(value, at=(5, 2), dtype=np.float64):
    x = np.full((8, 5), 3, dtype)
    x[at] = value
    return x


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_good_data_pass_and_read_alike_in_every_form(form):
    adata = cells()
    dense = adata.X.copy()
    adata.X = form(dense)
    COUNTS.check(adata)
    source = open_source(adata, COUNTS)
    assert isinstance(source, CellSource)
    assert (source.n_cells, source.feature_names) == (8, ("g0", "g1", "g2", "g3", "g4"))
    rows = source.rows(np.array([6, 1, 6]))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, dense[[6, 1, 6]])


@pytest.mark.parametrize(
    ("spec", "adata", "message"),
    [
        (DataSpec(space="counts", time="dya"), cells(), r"time names a column of adata.obs; 'dya' .* mean 'day'"),
        (
            DataSpec(space="counts", time="day", cell_type="kindd"),
            cells(kind="a"),
            r"cell_type names .* 'kindd' .* Did you mean 'kind'",
        ),
        (COUNTS, cells(day=[0.0, np.nan, np.nan, 0, 2, 2, 2, 2]), r"2 of 8 cells have no value .* the first is 'c1'"),
        (COUNTS, cells(day=["day 0"] * 4 + ["day 4"] * 4), r"not numbers \(day 0, day 4\).* Provide numbers .*'day 0'"),
        (COUNTS, cells(day=pd.Categorical(["early"] * 4 + ["late"] * 4)), r"not numbers \(early, late\)"),
        (
            COUNTS,
            cells(day=pd.Categorical([0, None, None, 0, 2, 2, 2, 2])),
            r"2 of 8 cells have no value .* the first is 'c1'",
        ),
        (COUNTS, cells(day=pd.Categorical(pd.to_datetime(["2020-01-01"] * 8))), r"not numbers \(2020-01-01"),
        (COUNTS, cells(day=pd.to_datetime(["2020-01-01"] * 8)), r"not numbers \(2020-01-01"),
        (COUNTS, cells(day=[0.0] * 4 + [np.inf] * 4), r"4 cells have an infinite time"),
        (COUNTS, cells(day=3.0), r"at least two times .* has 1 \(all at 3.0\)"),
        (COUNTS, cells(day=[0.0] * 7 + [2.0]), r"each time needs at least 2 cells; 2.0 .* has one"),
        (COUNTS, cells(with_value(np.nan)), r"1 values that are NaN or infinite, the first is nan"),
        (LOGGED, cells(with_value(np.inf)), r"1 values that are NaN or infinite, the first is inf"),
        (COUNTS, cells(with_value(-2.0)), r"1 negative values, the least is -2; counts are not negative"),
        (LOGGED, cells(with_value(-0.5)), r"1 negative values, .* space='latent'"),
        (
            COUNTS,
            cells(with_value(1.5)),
            r"not integers, such as 1.5 .* look log-normalised: set space='lognormalised'",
        ),
        (COUNTS, cells(with_value(1.5) * 99), r"not integers, .* round estimated counts"),
        (LOGGED, cells(with_value(400.0)), r"goes up to 400, .* look like counts: .*set space='counts'"),
        (LOGGED, cells(with_value(400.5)), r"goes up to 400.5, .* apply log1p"),
        (COUNTS, cells(with_value(0.0, at=slice(6, 7))), r"zero in every gene for 1 cells \('c6'\)"),
        (
            DataSpec(expression="layers/conuts", space="counts", time="day"),
            cells(),
            r"a key of adata.layers; 'conuts' is not one",
        ),
        (DataSpec(expression="obsm/X_pca", space="latent", time="day"), cells(), r"adata.obsm; .* It has: none"),
    ],
)
def test_each_problem_is_named_with_its_mend(spec, adata, message):
    with pytest.raises(ValueError, match=message):
        spec.check(adata)


def test_a_missing_layer_gets_a_suggestion():
    adata = cells()
    adata.layers["counts"] = adata.X
    with pytest.raises(ValueError, match="Did you mean 'counts'"):
        DataSpec(expression="layers/conuts", space="counts", time="day").check(adata)


def test_sparse_values_are_looked_at_too():
    adata = cells(with_value(-1.0))
    x = adata.X.copy()
    x[3] = 0
    adata.X = sparse.csr_matrix(x)
    with pytest.raises(ValueError, match=r"1 negative values(.|\n)*zero in every gene for 1 cells \('c3'\)"):
        COUNTS.check(adata)


def test_duplicate_gene_names():
    good, names = cells(), pd.DataFrame(index=["a", "b", "a", "c", "d"])
    with pytest.warns(UserWarning, match="not unique"):
        adata = anndata.AnnData(good.X, obs=good.obs, var=names)
    with pytest.raises(ValueError, match=r"1 names occur more than once \(a\)"):
        COUNTS.check(adata)


def test_all_problems_come_in_one_message():
    x = with_value(-1.5)
    x[0] = 0
    adata = cells(x, day=[0.0] * 7 + [2.0])
    with pytest.raises(ValueError, match="5 problems") as caught:
        DataSpec(space="counts", time="day", cell_type="kind").check(adata)
    for words in ("at least 2 cells", "cell_type names", "negative", "not integers", "zero in every gene"):
        assert words in str(caught.value)


def test_missing_x():
    adata = anndata.AnnData(obs=pd.DataFrame({"day": [0.0, 0, 1, 1]}, index=list("abcd")))
    with pytest.raises(ValueError, match="adata.X is None"):
        COUNTS.check(adata)


def test_a_latent_may_be_negative_and_its_coordinates_get_names():
    adata = cells()
    adata.obsm["X_pca"] = np.random.default_rng(1).normal(size=(8, 3))
    spec = DataSpec(expression="obsm/X_pca", space="latent", time="day")
    spec.check(adata)
    assert feature_names(adata, spec) == ("X_pca_0", "X_pca_1", "X_pca_2")
    table = pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names, columns=["a", "b", "c"])
    adata.obsm["X_pca"] = table
    spec.check(adata)
    source = open_source(adata, spec)
    assert source.feature_names == ("a", "b", "c")
    np.testing.assert_array_equal(source.rows(np.array([2])), table.to_numpy(np.float32)[[2]])


@pytest.mark.parametrize("days", [["0"] * 4 + ["2.5"] * 4, pd.Categorical([0] * 4 + [2] * 4), [0] * 4 + [2] * 4])
def test_numbers_are_read_from_any_column_of_numbers(days):
    adata = cells(day=days)
    COUNTS.check(adata)
    np.testing.assert_array_equal(COUNTS.read_times(adata)[[0, 7]], [0.0, float(days[7])])


@pytest.mark.parametrize("kind", [int, float, str])
def test_a_category_of_numbers_may_be_missing(kind):
    """As in a column of floats."""
    adata = cells(day=pd.Categorical([kind(0), None, *[kind(2)] * 6]))
    np.testing.assert_array_equal(COUNTS.read_times(adata), [0, np.nan, *[2] * 6])


def test_the_spec_itself_is_checked_and_survives_json():
    with pytest.raises(ValueError, match="space must be one of .* Did you mean 'counts'"):
        from_dict(DataSpec, {"space": "count", "time": "day"})
    with pytest.raises(ValueError, match="expression must be 'X'"):
        DataSpec(expression="layer/counts", space="counts", time="day")
    assert from_dict(DataSpec, to_dict(COUNTS)) == COUNTS


GENES = DataSpec(space="counts", perturbation="p")
LINES = DataSpec(space="counts", perturbation="p", covariates=("line",))
DOSED = DataSpec(space="counts", perturbation="p", dose="d")
TWO = DataSpec(space="counts", perturbation=("p", "q"), dose=("d", "e"))
NAMES = ["ctrl", "ctrl", "A+ctrl", "ctrl+A", "B+A", "A+B", "C", "C"]
LINE = ["x"] * 4 + ["y"] * 4


def perturbed(p=NAMES, **obs):
    return cells(p=p, **obs)


def test_each_cell_has_its_population_whatever_the_spelling():
    populations, index = GENES.read_populations(perturbed())
    assert populations == (Population(()), Population(("A",)), Population(("A", "B")), Population(("C",)))
    np.testing.assert_array_equal(index, [0, 0, 1, 1, 2, 2, 3, 3])
    GENES.check(perturbed())
    categories = perturbed(pd.Categorical(NAMES))
    GENES.check(categories)
    np.testing.assert_array_equal(GENES.read_populations(categories)[1], index)


def test_spellings_are_those_of_the_data():
    assert GENES.read_spellings(perturbed()) == (
        *(("A", "B"), ("A", "control"), ("B", "A"), ("C", "control"), ("control",), ("control", "A")),
    )


def test_controls_are_matched_within_the_combinations_of_covariates():
    names = ["ctrl", "ctrl", "A", "A", "control", "ctrl", "A", "A"]
    spec = DataSpec(space="counts", perturbation="p", covariates=("line", "batch"))
    adata = perturbed(names, line=LINE, batch=1)
    spec.check(adata)
    populations, index = spec.read_populations(adata)
    assert populations == tuple(Population(p, f"{line} | 1") for p in ((), ("A",)) for line in "xy")
    controls = spec.read_controls(adata)
    assert list(controls) == ["x | 1", "y | 1"]
    np.testing.assert_array_equal(controls["y | 1"], [4, 5])
    np.testing.assert_array_equal(index[controls["x | 1"]], [0, 0])


@pytest.mark.parametrize(
    "dose", [[9.0, np.nan, 1, 1, 0.5, 0.5, 10, 10.0], ["-", "", "1", "1.0", "0.5", ".5", "10", "1e1"]]
)
def test_a_dose_is_part_of_the_name_and_controls_have_none(dose):
    adata = perturbed(["ctrl", "ctrl", "A", "A+ctrl", "A+B", "B+A", "C", "C"], d=dose)
    DOSED.check(adata)
    populations, index = DOSED.read_populations(adata)
    assert [p.condition for p in populations] == ["control", "A@0.5+B@0.5", "A@1", "C@10"]
    np.testing.assert_array_equal(index, [0, 0, 2, 2, 1, 1, 3, 3])


def test_a_dose_for_each_name_and_columns_for_each_slot():
    one = perturbed(["ctrl", "ctrl", "A+B", "B+A"] * 2, d=["0", "0+0", "1+0.2", "0.2+1"] * 2)
    names = (["ctrl", "ctrl", "A", "B"] * 2, ["control", "ctrl", "B", "A"] * 2)
    two = perturbed(names[0], q=names[1], d=[0, 0, 1, 0.2] * 2, e=[0, 0, 0.2, 1] * 2)
    for spec, adata in ((DOSED, one), (TWO, two)):
        spec.check(adata)
        assert [p.condition for p in spec.read_populations(adata)[0]] == ["control", "A@1+B@0.2"]


def test_a_prediction_needs_controls_only():
    adata = perturbed(["ctrl"] * 7 + ["A"], line=[*LINE[:7], "z"])
    LINES.check(adata, min_cells=0)
    with pytest.raises(
        ValueError, match=r"have perturbed cells and no controls \('z'\)(.|\n)*each population .*A \(z\)"
    ):
        LINES.check(adata)
    DOSED.check(adata, min_cells=0)  # no column of doses
    np.testing.assert_array_equal(DOSED.read_controls(adata)[""], np.arange(7))
    with pytest.raises(ValueError, match="no cell of .* is a control"):
        GENES.check(perturbed(["A"] * 8), min_cells=0)


@pytest.mark.parametrize(
    ("spec", "adata", "message"),
    [
        (DataSpec(space="counts", perturbation="q"), perturbed(), r"perturbation names a column .* 'q' is not one"),
        (
            DataSpec(space="counts", perturbation="p", covariates=("lime",), dose="dose"),
            perturbed(line="x"),
            r"2 problems(.|\n)*covariates names .* mean 'line'(.|\n)*dose names a column",
        ),
        (
            GENES,
            perturbed([*NAMES[:7], None]),
            r"1 of 8 cells have no value in obs\['p'\], the first is 'c7'.*'control'",
        ),
        (LINES, perturbed(line=[*LINE[:7], np.nan]), r"covariates: 1 of 8 cells have no value in obs\['line'\]"),
        (GENES, perturbed(["A"] * 4 + ["NT"] * 4), r"no cell of obs\['p'\] is a control .* names are 'A', 'NT'"),
        (GENES, perturbed(["ctrl"] * 8), r"every cell of obs\['p'\] is a control"),
        (LINES, perturbed(line=LINE), r"1 of the combinations of line have perturbed cells and no controls \('y'\)"),
        (GENES, perturbed(["ctrl"] * 6 + ["A", "B"]), r"at least 2 cells; 2 have fewer \(A, B\)"),
        (GENES, perturbed(["ctrl"] * 4 + ["A+"] * 4), r"'A\+' has an empty part.* \(4 cells.\)"),
        (GENES, perturbed(["ctrl"] * 4 + ["A+A"] * 4), r"'A\+A' names 'A' twice"),
        (
            DataSpec(space="counts", perturbation="p", separator="|"),
            perturbed(["ctrl"] * 4 + ["A+B"] * 4),
            r"'A\+B' holds '\+', which joins names. Rename",
        ),
        (
            DataSpec(space="counts", perturbation="p", control="NT"),
            perturbed(["NT"] * 4 + ["control"] * 4),
            r"'control' is a perturbation here, as control=\('NT',\)",
        ),
        (LINES, perturbed(line=["a | b"] * 8), r"'a | b' of obs\['line'\] holds ' \| ', which joins covariates"),
        (DOSED, perturbed(d=-1.0), r"dose: .* has '-1.0' for a dose, which must be a positive number"),
        (DOSED, perturbed(d=0), r"has '0' for a dose.* A dose of zero is a control"),
        (DOSED, perturbed(d=["1"] * 7 + ["high"]), r"'C' has 'high' for a dose.* \(1 cells.\)"),
        (DOSED, perturbed(d=[1.0] * 7 + [np.nan]), r"'C' has no value for a dose"),
        (DOSED, perturbed(d="1+2+3"), r"'1\+2\+3' has 3 numbers for the 2 of 'B\+A'"),
        (TWO, perturbed(q="ctrl", d=1.0, e=1.0), r"'B\+A' holds '\+', which joins names"),
    ],
)
def test_each_problem_of_perturbations_is_named_with_its_mend(spec, adata, message):
    with pytest.raises(ValueError, match=message):
        spec.check(adata)


def test_many_bad_names_are_a_few_lines():
    with pytest.raises(ValueError, match=r"perturbation: 3 more such names") as caught:
        GENES.check(perturbed([f"A{i}+" for i in range(8)]))
    assert str(caught.value).count("empty part") == 5


def test_problems_of_all_kinds_come_in_one_message():
    adata = cells(with_value(1.5), p=["ctrl", "ctrl", "A", "A", "B", "B", "C+", "C+"], d=[1, 1, 1, 1, -1, -1, 1, 1])
    with pytest.raises(ValueError, match="4 problems") as caught:
        DataSpec(space="counts", perturbation="p", dose="d", vectors="v").check(adata)
    for words in ("empty part", "for a dose", "vectors names a key of adata.uns", "not integers"):
        assert words in str(caught.value)


FINE = {"A": [1.0, 2.0], "B": [0.0, 1.0], "C": [3.0, 3.0]}


@pytest.mark.parametrize("form", [dict, lambda v: pd.DataFrame(v).T, lambda v: {k: np.array(x) for k, x in v.items()}])
def test_vectors_come_as_a_table_or_a_dict(form):
    spec, adata = DataSpec(space="counts", perturbation="p", vectors="v"), perturbed()
    adata.uns["v"] = form(FINE | {"never seen": [5.0, 5.0]})
    spec.check(adata)
    vectors = spec.read_vectors(adata)
    assert set(vectors) == {"A", "B", "C", "never seen"}
    np.testing.assert_array_equal(vectors["C"], [3.0, 3.0])
    assert GENES.read_vectors(adata) == {}


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"A": [1.0], "B": [1.0]}, r"has none for 1 perturbations \('C'\)"),
        (FINE | {"B": [1.0]}, r"that of 'B' has shape \(1,\), most have \(2,\)"),
        (FINE | {"B": [1.0, np.nan]}, r"NaN or infinite values for 'B'"),
        (FINE | {"B": ["high", "low"]}, r"no numbers for 'B'"),
        (dict.fromkeys("ABC", 1.0), r"vectors of one length; that of 'A' has shape \(\)"),
        ([1.0, 2.0], r"must be a DataFrame .* it is list"),
    ],
)
def test_each_problem_of_vectors(vectors, message):
    adata = perturbed()
    adata.uns["v"] = vectors
    with pytest.raises(ValueError, match=message):
        DataSpec(space="counts", perturbation="p", vectors="v").check(adata)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "obs column of time .* or of perturbation; both are missing"),
        ({"time": "day", "dose": "d", "vectors": "v"}, "dose, vectors belong to perturbations"),
        ({"cell_type": "t", "dose": "d", "vectors": "v"}, "dose, vectors belong to perturbations"),
        ({"time": "day", "covariates": ("line",)}, "covariates belong to perturbations"),
        ({"perturbation": "p", "cell_type_vectors": "v"}, "cell_type_vectors belong to cell types"),
        ({"perturbation": "p", "separator": " "}, "separator must be a visible sign"),
        ({"perturbation": "p", "control": ()}, "control must hold at least one name"),
        ({"perturbation": "p", "control": "a+b"}, r"control must hold at least one name, without '\+'"),
        ({"perturbation": ("p", "q"), "dose": "d"}, "dose must name as many columns as perturbation"),
    ],
)
def test_roles_that_do_not_fit_together(fields, message):
    with pytest.raises(ValueError, match=message):
        DataSpec(space="counts", **fields)


@pytest.mark.parametrize("spec", [GENES, LINES, DOSED, TWO, DataSpec(space="latent", perturbation="p", control="NT")])
def test_perturbation_roles_survive_json(spec):
    assert from_dict(DataSpec, to_dict(spec)) == spec


def test_roles_that_are_not_named_cannot_be_read():
    with pytest.raises(ValueError, match="time=None: this DataSpec names no obs column of times"):
        GENES.read_times(perturbed())
    with pytest.raises(ValueError, match="perturbation=None: this DataSpec names no obs column of perturbations"):
        COUNTS.read_populations(perturbed())


KINDS = DataSpec(space="counts", cell_type="t", batch="b", covariates=("t", "b"), cell_type_vectors="v")


def typed(**obs):
    adata = cells(**{"t": ["x", "y"] * 4, "b": [1] * 4 + [2] * 4, **obs})
    adata.uns["v"] = {"x": [1.0], "y": [2.0]}
    return adata


def test_cells_of_neither_times_nor_perturbations_have_contexts():
    KINDS.check(typed(), every_role=True)
    assert KINDS.is_unperturbed
    assert not COUNTS.is_unperturbed
    assert not GENES.is_unperturbed
    populations, index = KINDS.read_populations(typed())
    assert populations == tuple(Population((), c) for c in ("x | 1", "x | 2", "y | 1", "y | 2"))
    np.testing.assert_array_equal(index, [0, 2, 0, 2, 1, 3, 1, 3])
    alone = DataSpec(space="counts", batch="b")
    populations, index = alone.read_populations(typed())
    assert populations == (Population(()),)
    assert not index.any()
    assert from_dict(DataSpec, to_dict(KINDS)) == KINDS


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ({"b": [None] + ["1"] * 7}, r"batch: 1 cells have no value in obs\['b'\]"),
        ({"t": [None] + ["x"] * 7}, r"cell_type: 1 cells have no value in obs\['t'\]"),
        ({"t": ["x", "z"] * 4}, r"cell_type_vectors: adata.uns\['v'\] has none for 1 cell types \('z'\)"),
    ],
)
def test_each_problem_of_cell_types_and_batches(obs, message):
    with pytest.raises(ValueError, match=message):
        KINDS.check(typed(**obs), every_role=True)


def test_a_batch_is_asked_for_where_it_is_needed_only():
    spec = DataSpec(space="counts", perturbation="p", batch="plate")
    spec.check(perturbed())
    with pytest.raises(ValueError, match="batch names a column of adata.obs; 'plate' is not one"):
        spec.check(perturbed(), every_role=True)


def test_contexts_without_controls_pass_on_request():
    adata = perturbed(["A"] * 4 + ["ctrl"] * 4, line=LINE)
    with pytest.raises(ValueError, match=r"have perturbed cells and no controls \('x'\)"):
        LINES.check(adata)
    LINES.check(adata, every_context=False)
    with pytest.raises(ValueError, match="is a control"):
        LINES.check(perturbed(["ctrl"] * 8, line=LINE))
    LINES.check(perturbed(["ctrl"] * 8, line=LINE), every_context=False)
    with pytest.raises(ValueError, match="no cell of .* is a control"):
        LINES.check(perturbed(["A"] * 8, line=LINE), every_context=False)
