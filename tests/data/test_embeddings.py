"""Tables of external vectors: what files may hold, what is refused, and where they go."""

import sys
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest

from scjax.config import from_dict, to_dict
from scjax.data.conditions import dosed_vector, undosed_vector
from scjax.data.embeddings import attach, check_table, morgan, read_table
from scjax.data.spec import DataSpec

TABLE = {"KLF1": [1.0, 2.0, -3.0], "control": [0.0, 0.0, 0.0], "NA": [0.5, 0.0, 1.0], "B+A": [4.0, 5.0, 6.0]}
SPEC = DataSpec(space="counts", perturbation="condition", vectors="embedding")


def same(found, wanted):
    assert list(found) == list(wanted)
    for name, vector in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], np.float32(vector))


def frame(table=TABLE):
    return pd.DataFrame(table).T.rename_axis("gene")


def written(folder, kind):
    path, vectors = folder / f"table.{kind.split('-')[0]}", np.float32(list(TABLE.values()))
    if kind in ("csv", "tsv"):
        frame().to_csv(path, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow, of the extra eval")
        frame().to_parquet(path, engine="pyarrow")
    elif kind == "npz-rows":
        np.savez(path, names=np.array(list(TABLE)), vectors=vectors)
    elif kind == "npz-named":
        np.savez(path, **{name: np.asarray(vector) for name, vector in TABLE.items()})
    else:
        adata = anndata.AnnData(vectors, obs=pd.DataFrame(index=list(TABLE)), obsm={"esm": vectors * 2})
        adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "npz-rows", "npz-named", "h5ad"])
def test_every_kind_of_file_gives_the_same_table(tmp_path, kind):
    """Also a gene that is called like a missing value, and a combination in the other order."""
    path = written(tmp_path, kind)
    same(read_table(path), {name if name != "B+A" else "A+B": vector for name, vector in TABLE.items()})
    if kind == "h5ad":
        same(read_table(path, at="obsm/esm"), {n if n != "B+A" else "A+B": 2 * np.array(v) for n, v in TABLE.items()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene,a,b\nA,1,2\nA,3,4\n", r"have several rows: 'A' = 'A'"),
        ("gene,a,b\nA+B,1,2\nC,1,1\nB+A,3,4\n", r"1 have several rows: 'A\+B' = 'B\+A'"),
        ("gene,a,b\nJ@0.5,1,2\nJ@.50,3,4\n", r"'J@0.5' = 'J@.50'"),
        ("gene,a,b\nA,1,2\nB,3,\nC,,\n", r"those of 2 names have NaN or infinite ones: 'B', 'C'"),
        ("gene,a,b\nA,1,2\nB,inf,0\n", r"those of 1 names have NaN or infinite ones: 'B'"),
        ("gene,a,b\nA,0,0\nB,1,0\nC,0,0\nctrl,0,0\n", r"2 names have one: 'A', 'C'. Leave them out"),
        ("gene,a,b\nA,1,x\nB,3,4\n", r"1 do not \('b'\), the first such value is 'x'"),
        ("gene,a,b\nA+,1,2\nB+B,3,4\n", r"'A\+' has an empty part.*'B\+B' names 'B' twice"),
        ("gene\nA\n", "it has 1 columns"),
        ("gene,a,b\n", "it is empty"),
    ],
)
def test_bad_tables_are_refused_with_all_their_names(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.csv: .*{message}"):
        read_table(path)


def test_vectors_have_one_length():
    with pytest.raises(ValueError, match=r"of one length.*\(2,\) of 'A', 'C'; \(3,\) of 'B'"):
        check_table({"A": [1, 2], "B": [1, 2, 3], "C": [1, 2]})
    with pytest.raises(ValueError, match="of one length"):
        check_table({"A": 1.0, "B": 2.0})
    with pytest.raises(ValueError, match="'A' has values that are not numbers"):
        check_table({"A": ["x"], "B": [2.0]})


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table of vectors"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be one of .csv, .tsv, .parquet, .npz, .h5ad; got '.pt'"):
        read_table(tmp_path / "weights.pt")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="torn.npz: is no .npz of plain arrays"):
        read_table(tmp_path / "torn.npz")
    np.savez(tmp_path / "objects.npz", A=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="objects.npz: is no .npz of plain arrays"):
        read_table(tmp_path / "objects.npz")
    np.savez(tmp_path / "uneven.npz", names=np.array(["A"]), vectors=np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"got the shapes \(1,\) and \(2, 3\)"):
        read_table(tmp_path / "uneven.npz")
    path = written(tmp_path, "h5ad")
    with pytest.raises(ValueError, match="no obsm key 'esn'. Did you mean 'esm'"):
        read_table(path, at="obsm/esn")
    with pytest.raises(ValueError, match="at must be 'X' or 'obsm/NAME'; got 'layers/a'"):
        read_table(path, at="layers/a")
    with pytest.raises(ValueError, match="is a place in an .h5ad"):
        read_table(tmp_path / "uneven.npz", at="obsm/esm")


# -- into an AnnData


def screen(*conditions, **obs):
    names = ["ctrl", *conditions]
    obs = pd.DataFrame({"condition": np.repeat(names, 3), **obs}, index=[f"c{i}" for i in range(3 * len(names))])
    return anndata.AnnData(np.ones((len(obs), 2), np.float32), obs=obs, var=pd.DataFrame(index=["g0", "g1"]))


def test_what_was_attached_is_what_the_spec_reads(tmp_path):
    """Also from the file that the AnnData was written to, whatever its names hold."""
    adata, table = screen("A+B", "B+ctrl"), {"A": [1.0, 2.0], "B": [3.0, 4.0], "odd/name": [5.0, 6.0]}
    attach(adata, table, SPEC)
    SPEC.check(adata)
    adata.write_h5ad(tmp_path / "with.h5ad")
    again = anndata.read_h5ad(tmp_path / "with.h5ad")
    for found in (SPEC.read_vectors(adata), SPEC.read_vectors(again)):
        assert {name: list(vector) for name, vector in found.items()} == table


def test_attaching_lists_what_is_missing_with_the_nearest_names():
    table = {"klf1": [1.0], "MAP2K3": [2.0]}
    with pytest.raises(ValueError, match=r"2 of the data's .*'KLF1' \(nearest: 'klf1'\), 'XYZ'\. Add them"):
        attach(screen("KLF1", "KLF1+XYZ", "MAP2K3"), table, SPEC)
    adata = screen("KLF1")
    attach(adata, table, SPEC, every=False)  # a prediction looks at controls alone
    with pytest.raises(ValueError, match="is there already, and is not overwritten"):
        attach(adata, table, SPEC, every=False)
    with pytest.raises(ValueError, match="got perturbation='condition', vectors=None"):
        attach(screen("KLF1"), table, replace(SPEC, vectors=None))
    with pytest.raises(ValueError, match="'A', 'B'"):  # a combination's own vector does not tell those of its parts
        attach(screen("A+B"), {"B+A": [1.0, 2.0]}, SPEC)


# -- doses as numbers


def test_a_dose_is_a_number_of_the_vector():
    """[v, s] or [s v, s], s = log(1 + dose / unit); the drug's own vector comes back."""
    v = np.array([2.0, -1.0])
    s = np.log(1 + 3 / 0.5)
    np.testing.assert_allclose(dosed_vector(v, 3.0, "append", 0.5), [2, -1, s])
    np.testing.assert_allclose(dosed_vector(v, 3.0, "product", 0.5), [2 * s, -s, s])
    np.testing.assert_array_equal(dosed_vector(v, 0.0, "product", 0.5), 0)  # no dose: the control's
    for how in ("append", "product"):
        np.testing.assert_allclose(undosed_vector(dosed_vector(v, 3.0, how, 0.5), how), v)


@pytest.mark.parametrize("how", ["append", "product"])
def test_doses_need_no_vector_of_their_own(how):
    spec = replace(SPEC, dose="dose", vector_dose=how, dose_unit=0.5)
    adata = screen("J", "J", "K", dose=np.repeat([0.0, 1.0, 10.0, 2.0], 3))
    with pytest.raises(ValueError, match=r"1 of the data's perturbations: 'K'"):
        attach(adata, {"J": [1.0, 2.0]}, spec)
    table = {"J": [1.0, 2.0], "K": [0.0, 1.0]}
    attach(adata, table, spec)
    spec.check(adata)
    told = spec.vectors_of(["J@1", "J@7", "K@2", "new@1", "J"], spec.read_vectors(adata))
    assert list(told) == ["J@1", "J@7", "K@2"]  # any dose, no drug without vector, no drug without dose
    np.testing.assert_allclose(told["J@7"], dosed_vector(np.array([1.0, 2.0]), 7.0, how, 0.5))
    again = spec.table_of(told)
    for name, vector in table.items():
        np.testing.assert_allclose(again[name], vector, rtol=1e-6)
    adata.uns["embedding"] = {"J": [1.0, 2.0]}
    with pytest.raises(ValueError, match=r"none for 1 perturbations \('K'\)"):
        spec.check(adata)


def test_settings_of_doses_and_pooling():
    with pytest.raises(ValueError, match="joins doses to vectors: name the obs column of dose"):
        replace(SPEC, vector_dose="append")
    with pytest.raises(ValueError, match="vector_dose must be one of 'name', 'append', 'product'; got 'times'"):
        from_dict(DataSpec, to_dict(SPEC) | {"dose": "dose", "vector_dose": "times"})
    with pytest.raises(ValueError, match="dose_unit must be a positive number"):
        replace(SPEC, dose="dose", vector_dose="append", dose_unit=0.0)
    with pytest.raises(ValueError, match="pooling must be one of 'mean', 'sum'"):
        from_dict(DataSpec, to_dict(SPEC) | {"pooling": "max"})
    a, b = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    np.testing.assert_array_equal(SPEC.pooled([a, b]), [2, 3.5])
    np.testing.assert_array_equal(replace(SPEC, pooling="sum").pooled([b, a]), [4, 7])


# -- fingerprints

ON_ASPIRIN = [11, 23, 33, 64, 175, 356, 386, 389, 423, 444, 456, 592]  # recorded with rdkit 2026.9.1
ON_ASPIRIN += [650, 695, 705, 726, 751, 807, 849, 893, 909, 946, 967, 1017]
ASPIRIN, CAFFEINE = "CC(=O)OC1=CC=CC=C1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"


@pytest.fixture
def rdkit():
    return pytest.importorskip("rdkit", reason="fingerprints are made by rdkit, of the extra chem")


def test_fingerprints_are_those_of_the_molecule(rdkit):
    """However it is written; and the same as ever, so that a run can be repeated."""
    found = morgan({"aspirin": ASPIRIN, "again": "OC(=O)c1ccccc1OC(C)=O", "caffeine": CAFFEINE})
    assert {v.shape for v in found.values()} == {(1024,)}
    np.testing.assert_array_equal(found["aspirin"], found["again"])

    np.testing.assert_array_equal(np.flatnonzero(found["aspirin"]), ON_ASPIRIN)
    assert (found["aspirin"] != found["caffeine"]).any()


def test_options_of_fingerprints(rdkit):
    one = {"aspirin": ASPIRIN}
    bits, counts = morgan(one)["aspirin"], morgan(one, counts=True)["aspirin"]
    np.testing.assert_array_equal(bits > 0, counts > 0)
    times = np.expm1(counts)
    np.testing.assert_allclose(times, np.round(times), atol=1e-5)
    assert times.max() > 1.5
    assert morgan(one, n_bits=64)["aspirin"].shape == (64,)
    assert morgan(one, radius=0)["aspirin"].sum() < morgan(one, radius=1)["aspirin"].sum()
    with pytest.raises(ValueError, match="n_bits must be at least 1"):
        morgan(one, n_bits=0)


def test_every_bad_molecule_is_named(rdkit):
    with pytest.raises(ValueError, match=r"those of 3 names: 'ring' \('C1CC'\), 'word' \('aspirin'\), 'none' \(''\)\."):
        morgan({"aspirin": ASPIRIN, "ring": "C1CC", "word": "aspirin", "none": ""})
    with pytest.raises(ValueError, match="smiles must hold at least one molecule"):
        morgan({})


def test_a_table_of_smiles_is_a_table_of_fingerprints(rdkit, tmp_path):
    path = tmp_path / "drugs.csv"
    path.write_text(f"drug,SMILES\naspirin,{ASPIRIN}\ncaffeine,{CAFFEINE}\n")
    same(read_table(path), morgan({"aspirin": ASPIRIN, "caffeine": CAFFEINE}))
    path.write_text(f"drug,smiles\naspirin,{ASPIRIN}\naspirin,{CAFFEINE}\n")
    with pytest.raises(ValueError, match="drugs.csv: names must name a molecule once; 'aspirin' are repeated"):
        read_table(path)


def test_without_rdkit_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match=r'fingerprints need rdkit: pip install "scjax\[chem\]"'):
        morgan({"aspirin": ASPIRIN})
