"""Files of weights: what is read of them, what is refused, and that nothing in them is run."""

import json
import os
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from scjax.convert import read_torch, write_torch

STATE = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([0.5, -1], np.float32),
    "ids": np.array([3, 1], np.int64),
}
FORMATS = (".npz", ".pt", ".ckpt", ".safetensors")


def torch():
    return pytest.importorskip("torch", reason="writes and reads .pt files; of the extra 'torch'")


def written(folder, suffix, state, name="weights"):
    """A file of this kind, as its own library would write it."""
    path = folder / f"{name}{suffix}"
    if suffix == ".npz":
        np.savez(path, **state)
    elif suffix == ".safetensors":
        path.write_bytes(safetensors(state))
    else:
        torch().save({name: torch().from_numpy(np.array(value)) for name, value in state.items()}, path)
    return path


def safetensors(state):
    names = {"float32": "F32", "int64": "I64", "bfloat16": "BF16", "float16": "F16"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        entry = {"dtype": names[value.dtype.name], "shape": list(value.shape)}
        header[name] = entry | {"data_offsets": [len(body), len(body) + value.nbytes]}
        body += value.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_kind_of_file(tmp_path, suffix):
    same(read_torch(written(tmp_path, suffix, STATE)), STATE)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_half_precision_is_widened_exactly(tmp_path, suffix):
    """NumPy's own file has no bfloat16: there it is what its bytes are, and no number."""
    exact = np.array([1.5, -0.125, 3e4], np.float32)
    kinds = [np.float16] if suffix == ".npz" else [np.float16, jnp.bfloat16]
    state = {f"x{i}": exact[: 3 - i].astype(kind) for i, kind in enumerate(kinds)}
    same(read_torch(written(tmp_path, suffix, state)), {name: v.astype(np.float32) for name, v in state.items()})


def test_half_precision_of_torch(tmp_path):
    t = torch()
    exact = t.tensor([1.5, -0.125, 3e4])
    t.save({"half": exact.half(), "brain": exact[:2].bfloat16(), "double": exact.double()}, tmp_path / "w.pt")
    found = read_torch(tmp_path / "w.pt")
    same(
        found,
        {
            "half": np.array([1.5, -0.125, 3e4], np.float32),
            "brain": np.array([1.5, -0.125], np.float32),
            "double": np.array([1.5, -0.125, 3e4]),
        },
    )


@pytest.mark.parametrize("place", ["state_dict", "model_state_dict", "model"])
def test_checkpoints_of_trainers(tmp_path, place):
    t = torch()
    state = {name: t.from_numpy(value) for name, value in STATE.items()}
    optimizer = {"state": {0: {"step": t.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    t.save({"iteration": 7, place: state, "optimizer": optimizer, "eval_score": None}, tmp_path / "c.ckpt")
    same(read_torch(tmp_path / "c.ckpt"), STATE)
    with pytest.raises(ValueError, match="weights='ema', but .* holds one set of weights only"):
        read_torch(tmp_path / "c.ckpt", weights="ema")


def lightning(t, main, last):
    """As Lightning writes a checkpoint with its callback for averages."""
    as_tensors = lambda state: {name: t.from_numpy(value) for name, value in state.items()}  # noqa: E731
    return {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": as_tensors(main),
        "current_model_state": as_tensors(last),
        "averaging_state": {"n_averaged": t.tensor(2)},
        "hyper_parameters": {"lr": 1e-3},
        "optimizer_states": [],
    }


def test_averages_of_lightning(tmp_path):
    t = torch()
    last = {name: value + 1 for name, value in STATE.items()}
    t.save(lightning(t, STATE, last), tmp_path / "run.ckpt")
    for weights, wanted in (("main", STATE), ("ema", STATE), ("last", last)):
        same(read_torch(tmp_path / "run.ckpt", weights=weights), wanted)


def test_averages_beside_the_weights(tmp_path):
    t = torch()
    average = {"a.bias": np.array([7, 8], np.float32)}
    both = {"state_dict": {"a.bias": t.tensor([0.5, -1])}, "ema_state_dict": {"a.bias": t.tensor([7.0, 8.0])}}
    t.save(both, tmp_path / "run.pt")
    same(read_torch(tmp_path / "run.pt", weights="ema"), average)
    for weights in ("main", "last"):
        same(read_torch(tmp_path / "run.pt", weights=weights), {"a.bias": STATE["a.bias"]})


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"])
def test_prefixes_of_wrappers(tmp_path, wrapped):
    same(read_torch(written(tmp_path, ".npz", {wrapped.format(name): v for name, v in STATE.items()})), STATE)


def test_a_prefix_of_some_names_is_a_name(tmp_path):
    state = {"module.x": STATE["ids"], "y": STATE["ids"]}
    same(read_torch(written(tmp_path, ".npz", state)), state)
    twice = {"block._orig_mod.x": STATE["ids"], "block.x": STATE["ids"]}
    with pytest.raises(ValueError, match=r"holds block\.x more than once"):
        read_torch(written(tmp_path, ".npz", twice, "twice"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_was_cut_short(tmp_path, suffix):
    whole = written(tmp_path, suffix, STATE).read_bytes()
    for n in (0, 4, 30, len(whole) // 2, len(whole) - 3):
        path = tmp_path / f"cut{n}{suffix}"
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="cut") as caught:
            read_torch(path)
        assert path.name in str(caught.value)


class Trap:
    """Pickled, it leaves a folder behind when somebody loads it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def acting(mark):
    """A pickle, written out by hand, that does the same."""
    return f"cos\nmkdir\n(V{mark}\ntR.".encode()


def test_nothing_in_a_file_is_run(tmp_path):
    t, mark = torch(), tmp_path / "was run"
    t.save({"state_dict": {"a": t.zeros(2)}, "hyper_parameters": Trap(mark)}, tmp_path / "trap.ckpt")
    (tmp_path / "alone.pt").write_bytes(acting(mark))
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("archive/data.pkl", acting(mark))
        archive.writestr("archive/version", "3\n")
    for name in ("trap.ckpt", "alone.pt", "archive.pt"):
        with pytest.raises(ValueError, match="more than tensors and plain values|cannot be read") as caught:
            read_torch(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not mark.exists()
    with pytest.raises(ValueError, match="more than tensors and plain values, and reading that could run code"):
        read_torch(tmp_path / "trap.ckpt")


def test_pickles_in_other_files(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([Trap(tmp_path / "was run")], object))
    (tmp_path / "not.npz").write_bytes(acting(tmp_path / "was run"))
    (tmp_path / "not.safetensors").write_bytes(acting(tmp_path / "was run"))
    for name in ("objects.npz", "not.npz", "not.safetensors"):
        with pytest.raises(ValueError, match=name):
            read_torch(tmp_path / name)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "lies outside of it"),
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "has the shape .3,., but 8 bytes"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, "lies outside of it"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "but -8 bytes"),
        ({"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, "makes no sense"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, r"w.safetensors: its header makes no sense"),
        ({"x": []}, "makes no sense"),
        ([], "makes no sense"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=message):
        read_torch(tmp_path / "w.safetensors")


def test_what_is_no_state_dict(tmp_path):
    t = torch()
    for name, what, message in (
        ("tensor", t.zeros(3), "holds no state dict but Tensor"),
        ("empty", {}, "holds no state dict but an empty one"),
        ("settings", {"lr": 1e-3, "epochs": 4}, "nor under state_dict, model_state_dict, model. It has: lr, epochs"),
        ("mixed", {"a": t.zeros(3), "version": "two"}, "'version': no tensor but str"),
        ("sparse", {"a": t.zeros(3).to_sparse()}, "'a': a sparse or quantized tensor"),
        ("numbers", {0: t.zeros(3)}, "the names of tensors must be words; got 0"),
    ):
        t.save(what, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=message):
            read_torch(tmp_path / f"{name}.pt")


def test_paths(tmp_path):
    with pytest.raises(ValueError, match="path must be a file of weights; there is no file"):
        read_torch(tmp_path / "none.pt")
    (tmp_path / "cells.h5ad").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"the end of the file's name must be one of .* got '.h5ad'"):
        read_torch(tmp_path / "cells.h5ad")


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "w.pt").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"\.pt files need torch, .* pip install 'scjax\[torch\]'"):
        read_torch(tmp_path / "w.pt")
    with pytest.raises(ImportError, match="need torch"):
        write_torch(tmp_path / "out.pt", STATE)
    assert {path.name for path in tmp_path.iterdir()} == {"w.pt"}


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_writing(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    if suffix == ".pt":
        torch()
    write_torch(path, STATE)
    same(read_torch(path), STATE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists already and is not overwritten"):
        write_torch(path, {})
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {path.name}
    for wrong, message in (
        (tmp_path / "out.ckpt", "must be one of '.pt', '.pth', '.npz'; got '.ckpt'"),
        (tmp_path / "no" / "out.npz", "would lie in a folder that does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            write_torch(wrong, STATE)


def test_torch_loads_what_was_written(tmp_path):
    t = torch()
    module = t.nn.Linear(3, 2)
    state = {"weight": STATE["a.weight"], "bias": STATE["a.bias"]}
    write_torch(tmp_path / "linear.pt", state)
    module.load_state_dict(t.load(tmp_path / "linear.pt", weights_only=True), strict=True)
    np.testing.assert_array_equal(module.weight.detach().numpy(), STATE["a.weight"])
