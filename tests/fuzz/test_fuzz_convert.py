"""State dicts of PyTorch programs: every tensor has its name, its shape and numbers, or nothing is converted."""

import importlib
import json

import numpy as np
import pytest
from hypothesis import strategies as st
from malformed import DEEP, fuzz, words

from scjax import convert
from scjax.convert import perturbdiff, scdfm, scimf

NAMES = ("scimf", "scdfm", "perturbdiff")
CONVERTERS = dict(zip(NAMES, (scimf, scdfm, perturbdiff), strict=True))


def config_of(name):
    config = importlib.import_module(f"scjax.models.{name}").Config
    return {
        "scimf": lambda: config(n_dims=4, intrinsic_widths=(5, 3), n_blocks=2),
        "scdfm": lambda: config(n_tokens=6, d_model=8, n_layers=1, n_heads=2, graph_heads=2),
        "perturbdiff": lambda: config(
            n_genes=6, n_perturbations=3, n_cell_types=2, n_batches=2, d_model=8, n_layers=1, n_heads=2,
            perturbation="table", cell_type="table", batch="table", d_covariate=4,
        ),
    }[name]()  # fmt: skip


def whole(name):
    """A state dict that fits: found by asking the converter what is missing, as its message lists that."""
    convert, config, state = CONVERTERS[name], config_of(name), {}
    rng = np.random.default_rng(0)
    for _ in range(20):
        try:
            convert.params_from_torch(state, config)
        except ValueError as err:
            for line in str(err).splitlines()[1:]:
                tensor, _, rest = line.strip().partition(" is missing; wanted the shape ")
                shape = tuple(int(n) if n.strip() != "None" else 3 for n in rest.strip("()").split(",") if n.strip())
                state[tensor] = rng.normal(size=shape).astype(np.float32)
        else:
            return config, state
    raise AssertionError(f"{name} is never content: {sorted(state)}")


WHOLE = {name: whole(name) for name in NAMES}


def odd_tensors(value):
    """No array that may stand for `value`."""
    shapes = [
        (),
        (0,),
        (1,) * 8,
        (*value.shape, 1),
        value.shape[1:],
        tuple(n + 1 for n in value.shape),
        value.shape[::-1],
    ]
    shapes = [shape for shape in shapes if shape != value.shape and not (len(value.shape) == 2 and len(shape) == 2)]
    spoiled = []
    for bad in (np.nan, np.inf, -np.inf):
        copy = value.copy()
        copy.flat[-1] = bad
        spoiled.append(copy)
    return st.sampled_from(
        [
            *(np.zeros(shape, np.float32) for shape in shapes),
            *spoiled,
            value.astype(object), value.astype("U5"), value.astype(np.complex64), value.astype("M8[s]"),
            value.tolist(), None, 3, 2.5, "weights", b"\x80\x04N.", {}, {"a": value},
            (value,), object(), np.array(None), np.float32(1), type(value), np.ma.masked_all(value.shape),
        ]
    )  # fmt: skip


@st.composite
def wrong_states(draw):
    name = draw(st.sampled_from(NAMES))
    config, state = WHOLE[name]
    how = draw(st.sampled_from(["odd", "odd", "odd", "lost", "more", "renamed", "key", "whole"]))
    tensor = draw(st.sampled_from(sorted(state)))
    if how == "odd":
        return name, {**state, tensor: draw(odd_tensors(state[tensor]))}
    if how == "lost":
        return name, {k: v for k, v in state.items() if k != tensor}
    if how == "more":
        more = f"{tensor}{draw(st.sampled_from(['.more', '/../x', '.0.weight', ' ']))}"
        return name, {**state, more: state[tensor]}
    if how == "renamed":
        return name, {(f"module.{k}" if k == tensor else k): v for k, v in state.items()}
    if how == "key":
        odd = draw(words.filter(lambda word: word not in state) | st.sampled_from([0, None, ("a",), b"x", 1.5]))
        return name, {**state, odd: state[tensor]}
    deep: dict = {}
    for _ in range(DEEP):
        deep = {"a": deep}
    junk = [None, [], [("a", 1)], "state", 7, {}, {"state_dict": state}, deep, {"a": deep}, np.zeros(3), b"\x80\x04N."]
    return name, draw(st.sampled_from(junk))


@pytest.mark.parametrize("n", [100, pytest.param(700, marks=pytest.mark.slow)])
def test_state_dicts(n):
    def convert(case):
        name, state = case
        CONVERTERS[name].params_from_torch(state, WHOLE[name][0])

    fuzz(n, wrong_states(), convert)


@pytest.mark.parametrize("n", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_configs_of_state_dicts(n):
    """What shapes tell, of a state dict with one thing wrong: its config is refused, or its parameters are."""

    def convert(case):
        name, state = case
        known = {"n_heads": 2, "graph_heads": 2} if name == "scdfm" else {}
        CONVERTERS[name].params_from_torch(state, CONVERTERS[name].config_from_torch(state, **known))

    fuzz(n, wrong_states().filter(lambda case: not _is_another_model(*case)), convert)


def _is_another_model(name, state):
    """A whole state dict all the same: with a table of other rows, say."""
    try:
        found = CONVERTERS[name].config_from_torch(
            state, **({"graph_heads": 2, "n_heads": 2} if name == "scdfm" else {})
        )
        CONVERTERS[name].params_from_torch(state, found)
    except Exception:  # noqa: BLE001  the test says what may come
        return False
    return all(type(v) is np.ndarray and v.dtype == np.float32 and np.isfinite(v).all() for v in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_right_is_converted(name):
    config, state = WHOLE[name]
    assert CONVERTERS[name].params_from_torch(state, config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small file of weights of each kind, as bytes by the end of its name."""
    folder, state = tmp_path_factory.mktemp("files"), {"a.weight": np.ones((2, 3), np.float32), "b": np.arange(3)}
    np.savez(folder / "w.npz", **state)
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (folder / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    found = {path.suffix: path.read_bytes() for path in folder.iterdir()}
    return found, folder


@pytest.mark.parametrize("n", [150, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_of_weights(files, suffix, n):
    """Some bytes are others, or are gone: what is read is refused as a wrong file is, or is a dict of arrays."""
    whole, path = files[0][suffix], files[1] / f"damaged{suffix}"

    def damaged(draw_from):
        changes, keep = draw_from
        data = bytearray(whole)
        for place, value in changes:
            data[place % len(data)] = value
        return bytes(data[: len(data) - keep])

    def read(case):
        path.write_bytes(damaged(case))
        found = convert.read_torch(path)
        assert all(isinstance(value, np.ndarray) for value in found.values())
        raise ValueError("the change was of a number, or of nothing that is read")

    changes = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3)
    fuzz(n, st.tuples(changes, st.sampled_from([0, 0, 0, 1, 7])), read)
