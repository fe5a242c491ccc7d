"""Files: the two formats hold the same cells, a bad file says what is wrong with it, several become one."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scjax.data.datasets import klein2015
from scjax.data.source import as_joined, join, open_source, read_anndata
from scjax.data.spec import DataSpec


@pytest.fixture(scope="module")
def adata():
    return klein2015()[:40, :30].copy()


def test_zarr_reads_as_h5ad_does(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    one, other = read_anndata(tmp_path / "a.h5ad"), read_anndata(str(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(one.X, other.X)
    np.testing.assert_array_equal(one.obs["time"], other.obs["time"])
    assert list(one.var_names) == list(other.var_names) == list(adata.var_names)


def test_missing_file_suggests_its_neighbour(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(FileNotFoundError, match="'cells.h5ad'"):
        read_anndata(tmp_path / "cell.h5ad")


def test_other_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .h5ad or .zarr; got .*cells.csv"):
        read_anndata(tmp_path / "cells.csv")


@pytest.mark.parametrize("keep", [0, 100, 4000])
def test_truncated_file(adata, tmp_path, keep):
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="a.h5ad is no whole HDF5 file: truncated"):
        read_anndata(path)


def test_folder_that_is_no_zarr_group(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(ValueError, match="is no zarr group"):
        read_anndata(tmp_path / "a.zarr")


def test_a_broken_element_is_reported_with_the_file(adata, tmp_path):
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["obs/_index"]
    with pytest.raises(KeyError) as caught:
        read_anndata(path)
    assert any("a.h5ad: it is damaged" in note for note in caught.value.__notes__)


SPEC = DataSpec(space="counts", perturbation="drug", batch="plate", covariates=("plate",))


def screen(counts, genes, drug="A", plate="p1", **uns):
    counts = np.asarray(counts, np.int32)
    obs = pd.DataFrame({"drug": drug, "plate": plate, "other": 1}, index=[f"c{i}" for i in range(len(counts))])
    return anndata.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=list(genes)), uns=uns)


ONE = screen([[1, 2, 3], [4, 5, 6]], "abc")
OTHER = screen([[7, 8, 9]], "cba", drug="ctrl", plate=3)
FEWER = screen([[10, 11]], "bd")


def test_joined_genes_are_matched_by_name():
    joined, sources, measured = join([("one", ONE), ("two", OTHER)], SPEC)
    assert sources == ("one", "two")
    assert list(joined.var_names) == ["a", "b", "c"]
    np.testing.assert_array_equal(joined.X, [[1, 2, 3], [4, 5, 6], [9, 8, 7]])
    assert measured.all()
    assert joined.obs["source"].tolist() == ["one", "one", "two"]
    assert joined.obs["plate"].tolist() == ["one_p1", "one_p1", "two_3"]
    assert joined.obs["drug"].tolist() == ["A", "A", "ctrl"]
    assert joined.obs_names.tolist() == ["one_c0", "one_c1", "two_c0"]
    assert "other" not in joined.obs
    SPEC.check(joined, min_cells=1, every_context=False)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_array])
def test_absent_genes_are_zero_and_marked_or_left_out(kind):
    named = [("one", ONE.copy()), ("two", FEWER.copy())]
    for _, adata in named:
        adata.X = kind(adata.X)
    zero = join(named, SPEC, absent="zero")
    assert list(zero.adata.var_names) == ["a", "b", "c", "d"]
    x = zero.adata.X.toarray() if sparse.issparse(zero.adata.X) else zero.adata.X
    np.testing.assert_array_equal(x, [[1, 2, 3, 0], [4, 5, 6, 0], [0, 10, 0, 11]])
    assert sparse.issparse(zero.adata.X) == (kind is not np.asarray)
    np.testing.assert_array_equal(zero.measured, [[True, True, True, False], [False, True, False, True]])
    both = join(named, SPEC, absent="intersection")
    assert list(both.adata.var_names) == ["b"]
    assert both.measured.all()


def test_files_of_one_name_are_one_source():
    other = OTHER.copy()
    other.obs_names = ["c9"]
    joined, sources, _ = join([("one", ONE), ("one", other)], SPEC)
    assert sources == ("one",)
    assert joined.obs["plate"].tolist() == ["p1", "p1", 3]  # batches of one study keep their names
    measured = join([("one", ONE), ("one", renamed(FEWER)), ("two", OTHER)], SPEC, absent="zero").measured
    np.testing.assert_array_equal(measured, [[False, True, False, False], [True, True, True, False]])


def renamed(adata):
    adata = adata.copy()
    adata.obs_names = [f"x{name}" for name in adata.obs_names]
    return adata


def test_each_source_may_be_a_batch():
    spec = DataSpec(space="counts", perturbation="drug", batch="source", covariates=("source",))
    joined = join([("one", ONE), ("two", OTHER)], spec).adata
    populations, _ = spec.read_populations(joined)
    assert {p.context for p in populations} == {"one", "two"}


@pytest.mark.parametrize("place", ["layers/raw", "obsm/raw"])
def test_joined_expression_lies_where_the_spec_looks(place):
    spec = DataSpec(expression=place, space="counts", perturbation="drug")
    named = []
    for name, adata in (("one", ONE), ("two", OTHER)):
        adata = adata.copy()
        if place.startswith("layers"):
            adata.layers["raw"] = adata.X
        else:
            adata.obsm["raw"] = pd.DataFrame(adata.X, index=adata.obs_names, columns=adata.var_names)
        adata.X = None
        named.append((name, adata))
    joined = join(named, spec).adata
    source = open_source(joined, spec)
    assert source.feature_names == ("a", "b", "c")
    np.testing.assert_array_equal(source.rows(np.array([2, 0])), [[9, 8, 7], [1, 2, 3]])


def test_one_source_as_it_lay_beside_others():
    joined = join([("one", ONE), ("two", FEWER)], SPEC, absent="zero").adata
    alone = as_joined("two", FEWER, SPEC, ("a", "b", "c", "d"), prefix=True)
    np.testing.assert_array_equal(alone.X, joined.X[2:])
    assert alone.obs.equals(joined.obs[2:])


def test_vectors_of_all_sources_are_gathered():
    spec = DataSpec(space="counts", perturbation="drug", vectors="v")
    table = pd.DataFrame([[1.0, 2.0]], index=["A"])
    named = [("one", screen([[1, 2, 3]], "abc", v=table)), ("two", screen([[1, 2, 3]], "abc", v={"B": [3.0, 4.0]}))]
    joined = join(named, spec).adata
    assert {name: v.tolist() for name, v in spec.read_vectors(joined).items()} == {"A": [1.0, 2.0], "B": [3.0, 4.0]}
    named.append(("three", screen([[1, 2, 3]], "abc", v={"A": [9.0, 2.0]})))
    with pytest.raises(ValueError, match="'three' has another vector for 'A'"):
        join(named, spec)


def with_source_column():
    adata = ONE.copy()
    adata.obs["source"] = "x"
    return adata


@pytest.mark.parametrize(
    ("named", "options", "message"),
    [
        ([], {}, "number of AnnData to join must be at least 1"),
        ([("one", ONE), ("two", FEWER)], {}, r"'one' lacks 1 of 4 genes .*\(d\). .*intersection' \(1 genes are in all"),
        ([("one", ONE[:, ["a"]]), ("two", FEWER)], {"absent": "intersection"}, "no gene is in all"),
        ([("one", ONE), ("one", ONE)], {}, "obs_names must be unique within a source"),
        ([("one", with_source_column())], {}, "obs has a column 'source' already"),
    ],
)
def test_what_cannot_be_joined(named, options, message):
    with pytest.raises(ValueError, match=message):
        join(named, SPEC, **options)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_repeated_genes_cannot_be_joined():
    with pytest.raises(ValueError, match="two: the gene 'a' is repeated"):
        join([("one", ONE), ("two", screen([[1, 2]], ["a", "a"]))], SPEC)


def test_joined_times_are_numbers():
    """Also where one of the sources has them as categories."""
    spec = DataSpec(space="counts", perturbation="drug", time="day")
    one, two = ONE.copy(), OTHER.copy()
    one.obs["day"], two.obs["day"] = [0.0, 2.5], pd.Categorical([4])
    joined, _, _ = join([("one", one), ("two", two)], spec)
    np.testing.assert_array_equal(spec.read_times(joined), [0, 2.5, 4])


def written(tmp_path, **files):
    paths = [tmp_path / f"{name}.h5ad" for name in files]
    for path, adata in zip(paths, files.values(), strict=True):
        adata.obs_names = [f"{path.stem}_{cell}" for cell in adata.obs_names]
        adata.write_h5ad(path)
    return paths


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("backed", [False, True])
def test_files_with_repeated_genes_are_not_matched_by_name(tmp_path, backed):
    paths = written(tmp_path, one=screen([[1, 2, 3]], "aab"), two=screen([[4, 5]], "ab"))
    with pytest.raises(ValueError, match=r"one.h5ad has 'a' more than once \(1 such names\)"):
        read_anndata(paths, backed=backed)


def test_files_agree_in_what_is_not_a_number_and_in_sparse_entries(tmp_path):
    uns = {"scores": np.array([1.0, np.nan]), "graph": sparse.csr_matrix(np.eye(2)), "words": np.array(["a", "b"])}
    uns["ranked"] = np.rec.fromarrays([[2.0, np.nan], ["a", "b"]], names="score,gene")  # as scanpy's rank_genes_groups
    uns["gaps"] = sparse.csr_matrix([[1.0, np.nan]])
    both = read_anndata(written(tmp_path, one=screen([[1]], "a", **uns), two=screen([[2]], "a", **uns)))
    assert both.uns.keys() == uns.keys()
    for key, value in (
        ("ranked", np.rec.fromarrays([[3.0, np.nan], ["a", "b"]], names="score,gene")),
        ("ranked", np.rec.fromarrays([[2.0, np.nan], ["a", "b"]], names="score,name")),
        ("gaps", sparse.csr_matrix([[2.0, np.nan]])),
        ("gaps", sparse.csr_matrix([[np.nan, 1.0]])),
    ):
        with pytest.raises(ValueError, match=f"three.h5ad has another '{key}' than before"):
            read_anndata([tmp_path / "one.h5ad", *written(tmp_path, three=screen([[2]], "a", **(uns | {key: value})))])
    other = uns | {"graph": sparse.csr_matrix(np.ones((2, 2)))}
    with pytest.raises(ValueError, match="three.h5ad has another 'graph' than before"):
        read_anndata([tmp_path / "one.h5ad", *written(tmp_path, three=screen([[2]], "a", **other))])


@pytest.mark.parametrize("backed", [False, True])
def test_files_of_other_widths_of_a_latent(tmp_path, backed):
    one, two = screen([[1]], "a"), screen([[2]], "a")
    one.obsm["z"], two.obsm["z"] = np.ones((1, 3)), np.ones((1, 2))
    with pytest.raises(ValueError, match=r"obsm\['z'\] of one width; got .*one.h5ad': 3, .*two.h5ad': 2"):
        read_anndata(written(tmp_path, one=one, two=two), backed=backed)


@pytest.mark.parametrize("backed", [False, True])
def test_tables_beside_arrays_of_a_latent(tmp_path, backed):
    one, two = screen([[1]], "a"), screen([[2]], "a")
    one.obsm["z"], two.obsm["z"] = np.ones((1, 2)), pd.DataFrame({"x": [1.0], "y": [2.0]}, index=two.obs_names)
    files = written(tmp_path, one=one, two=two)
    for paths in (files, files[::-1]):
        with pytest.raises(ValueError, match=r"obsm\['z'\] as a table .*two.h5ad has a table, .*one.h5ad an array"):
            read_anndata(paths, backed=backed)


def test_a_missing_column_names_its_source():
    bad = OTHER.copy()
    del bad.obs["plate"]
    with pytest.raises(ValueError, match="batch names a column of adata.obs; 'plate' is not one") as caught:
        join([("one", ONE), ("two", bad)], SPEC)
    assert caught.value.__notes__ == ["While joining 'two'."]
