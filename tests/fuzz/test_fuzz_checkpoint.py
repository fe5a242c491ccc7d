"""Checkpoints from anywhere: bytes changed by chance, and documents that somebody wrote with care and sealed."""

import json
import pickle
import shutil
from contextlib import suppress

import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from malformed import DEEP, Trap, fuzz, junk, malformed_trees, nested

from scjax.checkpoint import CheckpointWriter, _seal, list_steps, read, read_about

ABOUT = {"run": "a1", "kind": "scimf", "model": {"n_dims": 50}, "times": [0.0, 1.5]}


def arrays():
    rng = np.random.default_rng(0)
    return {
        "params": {"w": jax.numpy.asarray(rng.normal(size=(3, 4)), "float32")},
        "key": jax.random.key(3),
        "transform": {"mean": rng.normal(size=5), "none": np.zeros((0, 2)), "n": np.int64(7)},
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    with CheckpointWriter(directory, about=ABOUT) as writer:
        for step in (1, 2):
            writer.save(step, arrays())
    return directory


def files_of(directory):
    """In an order that the random names of some of them do not change, but for files of one size."""
    return sorted((p for p in directory.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, p))


@st.composite
def damages(draw):
    """Which file, and what becomes of its bytes; positions as shares of its length."""
    how = draw(st.sampled_from(["flip", "flip", "flip", "cut", "insert", "replace", "lost", "folder", "link"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    other = st.binary(min_size=1, max_size=40) | st.sampled_from([b"{}", b"[]", b"null", b"[" * DEEP, b"\x80\x04N."])
    return draw(st.integers(0, 10_000)), how, where, draw(st.integers(0, 7)), draw(other)


def damaged(path, how, where, bit, other):
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    path.unlink()
    if how == "flip" and content:
        content[at] ^= 1 << bit
    elif how == "cut":
        content = content[:at]
    elif how == "insert":
        content[at:at] = other
    elif how == "replace":
        content = other
    elif how == "folder":
        path.mkdir()
        return
    elif how == "link":
        path.symlink_to(path)
        return
    if how != "lost":
        path.write_bytes(content)


@pytest.mark.parametrize("n", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_files(written, tmp_path, n):
    """Each is found, and the last good step is named; or it does no harm, and the arrays are what they were."""
    directory, wanted, n_found = tmp_path / "checkpoints", jax.tree.leaves(arrays()), 0

    def attempt(case):
        nonlocal n_found
        number, *damage = case
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(written, directory)
        files = files_of(directory / "2")
        damaged(files[number % len(files)], *damage)
        try:
            found = read(directory)
        except ValueError as err:
            n_found += 1
            if str(err).endswith("The previous complete one is step 1: pass step=1."):
                raise
            raise AssertionError(str(err)) from err
        assert (found.step, found.about) == (2, ABOUT)
        for one, other in zip(jax.tree.leaves(found.arrays), wanted, strict=True):
            raw = [
                jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
                for x in (one, other)
            ]
            np.testing.assert_array_equal(*map(np.asarray, raw))
        raise ValueError("no harm")

    fuzz(n, damages(), attempt)
    assert n_found >= n // 8  # most bytes are of parts that nobody reads


def rewrite(step, *, manifest=None, about=None, seal=True):
    """The documents of a checkpoint, changed, under a digest that agrees with them."""
    paths = {name: step / name / "metadata" for name in ("manifest", "about")}
    now = {name: json.loads(path.read_text()) for name, path in paths.items()}
    now |= {name: value for name, value in (("manifest", manifest), ("about", about)) if value is not None}
    if seal and isinstance(now["manifest"], dict):
        now["manifest"] = {**now["manifest"], "digest": _seal(now["manifest"], now["about"])}
    for name, path in paths.items():
        path.write_text(json.dumps(now[name]))


NOTES = ("shape", "dtype", "digest", "jax")


@pytest.mark.parametrize("n", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_sealed_documents_that_make_no_sense(written, tmp_path, n):
    """A digest tells of accidents. Whoever writes a checkpoint himself can make one that agrees."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(written, directory)
    whole = json.loads((written / "2" / "manifest" / "metadata").read_text())
    trees = [{k: v for k, v in whole.items() if k != "digest"}]
    odd_notes = st.fixed_dictionaries(
        {
            "shape": st.sampled_from(
                [[3, 4], [-1], [2**62, 2**62], ["3"], 3, None, [10**30], [3, 4, 1], [1.5], [True]]
            ),
            "dtype": st.sampled_from(
                ["object", "O", "float32", "U100", "nonsense", "", None, 3, "M8[s]", "V8", "bfloat16"]
            ),
            "digest": st.just("0" * 32),
            "jax": st.sampled_from([True, False, "yes", None]),
        },
        optional={"prng": st.sampled_from(["fry", "nonsense", "", None, 3])},
    )
    odd = st.builds(
        lambda note, name: {**trees[0], "leaves": {**trees[0]["leaves"], name: note}},
        odd_notes | junk,
        st.sampled_from(["params/w", "params/w/x", "params", "", "/", "../../x", "a" * 300, "a/" * 2000 + "b", "\0"]),
    )
    cases = odd | malformed_trees(trees, lambda tree, at: at[-1] in (*NOTES, "leaves", "format"), unknown=False)

    def attempt(manifest):
        rewrite(directory / "2", manifest=manifest)
        read(directory)

    fuzz(n, cases, attempt)
    assert read(directory, 1).step == 1


@pytest.mark.parametrize("about", [[], "a", 3, None, {"run": float("nan")}])
def test_documents_that_are_no_objects(written, tmp_path, about):
    directory = tmp_path / "checkpoints"
    shutil.copytree(written, directory)
    (directory / "2" / "about" / "metadata").write_text(json.dumps(about))
    for reader in (read, read_about):
        with pytest.raises(ValueError, match="is damaged: its documents"):
            reader(directory)
    (directory / "2" / "about" / "metadata").write_text(nested(DEEP))
    with pytest.raises(ValueError, match="is damaged: its documents cannot be read"):
        read_about(directory)


def test_folders_that_are_no_steps(written, tmp_path):
    """Digits of other scripts, zeros in front, signs: no checkpoint goes by such a name."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(written, directory)
    for name in ("٣", "007", "+5", "-1", "1.5", "²", " 4", "9" * 200 + "x", "3.orbax-checkpoint-tmp", "removed-1"):
        (directory / name).mkdir()
    (directory / "8").write_text("a file")
    assert list_steps(directory) == (1, 2)
    assert read(directory).step == 2


def test_pickles_in_place_of_every_file(written, tmp_path):
    """Nothing that reads a checkpoint runs what it reads."""
    mark = tmp_path / "was run"
    for i in range(len(files_of(written / "2"))):
        directory = tmp_path / f"checkpoints{i}"
        shutil.copytree(written, directory)
        files_of(directory / "2")[i].write_bytes(pickle.dumps(Trap(mark)))
        with suppress(ValueError):  # some files nobody needs
            read(directory)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))  # the trap is one
    assert mark.exists()
