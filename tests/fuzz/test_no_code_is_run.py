"""No pickle is read, no archive unpacked, nothing evaluated; whatever lies where data or weights are expected."""

import ast
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from malformed import Trap

from scjax.cli import main
from scjax.data.source import read_anndata
from scjax.data.splits import load_split
from scjax.experiment import read_experiment
from scjax.predict import load

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for part in ("scjax", "benchmarks", "tests") for p in (ROOT / part).rglob("*.py"))
FORBIDDEN_IMPORTS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ARCHIVES = {"tarfile", "zipfile"}  # members may be named ../../anything
FORBIDDEN_CALLS = {"read_pickle", "unpack_archive", "extractall"}
UNPACKS_ITS_OWN = "test_package.py"  # the distributions that it has built
HERE = {"test_no_code_is_run.py", "test_fuzz_checkpoint.py"}  # they write pickles, to hand them to readers


def breaches(path):
    """(line, what) of everything that reads a pickle or an archive, or may."""
    in_package = path.is_relative_to(ROOT / "scjax")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in FORBIDDEN_IMPORTS | (ARCHIVES if in_package else set()):
                    yield node.lineno, name
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if last == "extractall" and path.name == UNPACKS_ITS_OWN:
                continue
            if last in FORBIDDEN_CALLS or (in_package and called in ("eval", "exec", "compile", "__import__")):
                yield node.lineno, called
            if options.get("allow_pickle", "False") != "False":
                yield node.lineno, "allow_pickle"
            if called in ("torch.load", "torch.jit.load") and options.get("weights_only") != "True":
                yield node.lineno, called


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_what_may_act(path):
    if path.name not in HERE:
        assert not list(breaches(path))


def test_breaches_are_found(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import pickle\nnp.load(p, allow_pickle=True)\ntorch.load(p)\npd.read_pickle(p)\n")
    assert [line for line, _ in breaches(path)] == [1, 2, 3, 4]
    path.write_text("np.load(p, allow_pickle=False)\ntorch.load(p, weights_only=True)\n")
    assert not list(breaches(path))


@pytest.fixture
def mark(tmp_path):
    """Is there once a trap was sprung."""
    yield tmp_path / "was run"
    assert not (tmp_path / "was run").exists()


def traps(mark, folder):
    """The same pickle alone, in an object array, in an archive as torch writes it, whose members want out."""
    folder.mkdir()
    (folder / "alone").write_bytes(pickle.dumps(Trap(mark)))
    np.save(folder / "array.npy", np.array([Trap(mark)], object), allow_pickle=True)  # noqa: S301
    with zipfile.ZipFile(folder / "torch.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(mark)))
        archive.writestr("archive/version", "3\n")
        archive.writestr("../../escaped", "out")
    return sorted(folder.iterdir())


def test_pickles_in_place_of_files(tmp_path, mark):
    """Wherever a path is taken."""
    for i, trap in enumerate(traps(mark, tmp_path / "traps")):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        for name in ("experiment.json", "split.json", "cells.h5ad", "weights.pt"):
            (folder / name).write_bytes(trap.read_bytes())
        for suffix in ("zarr.json", ".zgroup", ".zmetadata"):
            (folder / "cells.zarr").mkdir(exist_ok=True)
            (folder / "cells.zarr" / suffix).write_bytes(trap.read_bytes())
        for read, name in (
            (read_experiment, "experiment.json"), (load_split, "split.json"), (read_anndata, "cells.h5ad"),
            (read_anndata, "cells.zarr"), (read_anndata, "weights.pt"), (load, "."), (read_experiment, "weights.pt"),
        ):  # fmt: skip
            with pytest.raises((ValueError, OSError)):
                read(folder / name)
        for arguments in (
            ["show", "cells.h5ad"],
            ["show", "weights.pt"],
            ["show", "."],
            ["train", "--config", "weights.pt"],
        ):
            with pytest.raises(SystemExit) as ended:
                main([arguments[0], *(str(folder / a) if not a.startswith("-") else a for a in arguments[1:])])
            assert ended.value.code == 2
    assert not (tmp_path / "escaped").exists()


@pytest.mark.filterwarnings("ignore")  # of torch, about what is put before it here
def test_torch_takes_weights_only(tmp_path, mark):
    """The way that `scjax.convert` tells to read a file of weights."""
    torch = pytest.importorskip("torch", reason="reads .pt files; of the extra 'torch'")
    for trap in traps(mark, tmp_path / "traps"):
        with pytest.raises((pickle.UnpicklingError, RuntimeError, ValueError)):
            torch.load(trap, weights_only=True)


def zarr_with_objects(folder, mark):
    """A store of the older zarr format whose words are pickles, by the codec that numcodecs has for that.

    Alone it is no type that zarr knows; behind another codec it is, and what it does depends on the version.
    """
    adata = pytest.importorskip("anndata").AnnData(np.ones((2, 2), np.float32))
    adata.write_zarr(folder)
    place = folder / "uns" / "trap"
    place.mkdir(parents=True)
    meta = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": None, "fill_value": None,
        "order": "C", "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 4}],
    }  # fmt: skip
    (place / ".zarray").write_text(json.dumps(meta))
    (place / ".zattrs").write_text(json.dumps({"encoding-type": "array", "encoding-version": "0.2.0"}))
    (place / "0").write_bytes(pickle.dumps(Trap(mark)))


@pytest.mark.filterwarnings("ignore")  # of zarr, about a format of the past
@pytest.mark.parametrize("version", [2, 3])
def test_zarr_with_pickled_words(tmp_path, mark, version):
    import anndata

    before = anndata.settings.zarr_write_format
    anndata.settings.zarr_write_format = version
    try:
        zarr_with_objects(tmp_path / "cells.zarr", mark)
    finally:
        anndata.settings.zarr_write_format = before
    (tmp_path / "cells.zarr" / ".zmetadata").unlink(missing_ok=True)
    if version == 3:
        document = tmp_path / "cells.zarr" / "uns" / "trap" / "zarr.json"
        codec = {"name": "numcodecs.pickle", "configuration": {}}
        document.write_text(json.dumps({"zarr_format": 3, "node_type": "array", "codecs": [codec]}))
    with pytest.raises(ValueError, match="pickle"):
        read_anndata(tmp_path / "cells.zarr")
    uns = tmp_path / "cells.zarr" / "uns"
    (uns / "trap").rename(tmp_path / "elsewhere")
    (uns / "trap").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "round").symlink_to(uns, target_is_directory=True)  # and without end
    with pytest.raises(ValueError, match="pickle"):
        read_anndata(tmp_path / "cells.zarr")
