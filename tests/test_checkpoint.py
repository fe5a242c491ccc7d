import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scjax.checkpoint import Checkpoint, CheckpointWriter, list_steps, provenance, read, read_about

ROOT = Path(__file__).parents[1]
ABOUT = {"run": "a1", "model": {"name": "scimf", "n_dims": 50}, "times": [0.0, 1.5], "author": "Ünal"}


class Inner(NamedTuple):
    key: jax.Array
    nothing: None
    pair: tuple


def arrays(scale: float = 1.0) -> dict:
    """Every kind of leaf that a run has."""
    rng = np.random.default_rng(0)
    params = {"dense": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) * scale, "b.ias": jnp.zeros(4)}}
    state = Inner(
        key=jax.random.split(jax.random.key(3), 2),
        nothing=None,
        pair=(optax.adam(1e-3).init(params), jnp.asarray([1.0, np.nan, -0.0], jnp.bfloat16)),
    )
    transform = {
        "mean": rng.normal(size=5) * scale,  # float64, in NumPy
        "kept": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "n": 7,
    }
    return {"params": params, "state": state, "transform": transform}


def write(directory: Path, steps=(1,), about=ABOUT, **options) -> None:
    with CheckpointWriter(directory, about=about, **options) as writer:
        for step in steps:
            writer.save(step, arrays(float(step)))


def same(a, b) -> bool:
    """Structure, kinds, dtypes and bits."""
    raw = [[jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(t)] for t in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(*raw, strict=True)
    )


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    write(directory, steps=(1, 2))
    return directory


def test_what_is_read_is_what_was_written(written):
    got = read(written, like=jax.eval_shape(arrays) | {"transform": arrays()["transform"]})
    assert isinstance(got, Checkpoint)
    assert (got.step, got.about) == (2, ABOUT)
    assert same(got.arrays, arrays(2.0))
    assert isinstance(got.arrays["params"]["dense"]["kernel"], jax.Array)
    assert isinstance(got.arrays["transform"]["mean"], np.ndarray)
    one, two = (jax.random.normal(k.arrays["state"].key[1]) for k in (got, Checkpoint(0, arrays(), {})))
    assert one == two


def test_without_a_template_trees_are_nested_dicts(written):
    got = read(written, 1).arrays
    assert same(got["params"], arrays()["params"])
    assert same(got["transform"], jax.tree.map(np.asarray, arrays()["transform"]))
    assert isinstance(got["params"]["dense"]["kernel"], jax.Array)
    assert isinstance(got["transform"]["mean"], np.ndarray)
    assert set(got["state"]) == {"key", "pair"}  # a None is absent
    assert set(got["state"]["pair"]["0"]["0"]) == {"count", "mu", "nu"}
    np.testing.assert_array_equal(got["state"]["pair"]["0"]["0"]["mu"]["dense"]["b.ias"], np.zeros(4))
    assert _is_key(got["state"]["key"])


def test_the_document_alone(written):
    assert read_about(written) == ABOUT
    assert read_about(written, 1) == ABOUT


def test_orbax_reads_it_too(written):
    """A checkpoint does not need this package: plain orbax finds the names and the numbers."""
    import orbax.checkpoint as ocp

    like = {"params": jax.tree.map(np.asarray, arrays()["params"])}
    with ocp.PyTreeCheckpointer() as checkpointer:
        wanted = ocp.args.PyTreeRestore(item=like, partial_restore=True)
        tree = checkpointer.restore((written / "2" / "arrays").resolve(), args=wanted)
    np.testing.assert_array_equal(tree["params"]["dense"]["kernel"], arrays(2.0)["params"]["dense"]["kernel"])


def test_saving_copies_at_once(tmp_path):
    """What is saved is what was there at `save`, whatever becomes of the arrays while it is written."""
    mine = {"x": np.ones(200_000)}
    theirs = jnp.ones(200_000)
    spoil = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with CheckpointWriter(tmp_path, about=ABOUT) as writer:
        writer.save(1, {"mine": mine, "theirs": theirs})
        mine["x"][:] = -1
        spoil(theirs).block_until_ready()
    got = read(tmp_path).arrays
    assert (got["mine"]["x"] == 1).all()
    assert (got["theirs"] == 1).all()


def test_the_last_few_are_kept(tmp_path):
    write(tmp_path, steps=(5, 10, 15, 20), keep=2)
    assert list_steps(tmp_path) == (15, 20)
    assert list_steps(tmp_path / "nowhere") == ()


def files_of(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def outcome(directory: Path) -> str | None:
    """What `read` complains of; None where it gives what was written."""
    try:
        got = read(directory)
    except ValueError as err:
        return str(err)
    assert (got.step, got.about) == (2, ABOUT)
    assert same(got.arrays["transform"], jax.tree.map(np.asarray, arrays(2.0)["transform"]))
    assert same(got.arrays["params"], arrays(2.0)["params"])
    return None


def test_no_damaged_byte_goes_unnoticed(tmp_path):
    """Whichever file is cut, emptied, flipped or lost: the arrays come back whole, or a ValueError says what to do."""
    write(tmp_path, steps=(1, 2))
    newest = tmp_path / "2"
    rng = np.random.default_rng(0)
    refused = 0
    for path in files_of(newest):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        for at in rng.integers(0, max(len(whole), 1), size=min(3, len(whole))):
            flipped[at] ^= 1 << int(rng.integers(8))
        for damaged in (whole[: len(whole) // 2], b"", bytes(flipped), None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            message = outcome(tmp_path)
            if message is not None:
                refused += 1
                assert f"the checkpoint {newest} is damaged" in message
                assert message.endswith("The previous complete one is step 1: pass step=1.")
            path.write_bytes(whole)
    assert refused >= 8
    assert read(tmp_path).step == 2  # mended


def test_the_digest_names_the_leaf(tmp_path):
    """Arrays that are well-formed files but not what was saved: another checkpoint's, put in place."""
    write(tmp_path, steps=(1, 2))
    (tmp_path / "2" / "arrays").rename(tmp_path / "2" / "gone")
    (tmp_path / "1" / "arrays").rename(tmp_path / "2" / "arrays")
    with pytest.raises(ValueError, match="params/dense/kernel does not match its digest. No earlier checkpoint"):
        read(tmp_path)


def test_an_edited_document_is_noticed(tmp_path):
    write(tmp_path)
    path = next(p for p in files_of(tmp_path / "1" / "about") if b"n_dims" in p.read_bytes())
    path.write_text(json.dumps(ABOUT | {"model": {"name": "scimf", "n_dims": 51}}))
    for reader in (read, read_about):
        with pytest.raises(ValueError, match="documents do not match their digest. No earlier checkpoint there"):
            reader(tmp_path)


KILLED = """
import os, signal, sys
import numpy as np
from scjax.checkpoint import CheckpointWriter
writer = CheckpointWriter(sys.argv[1], about={"run": "a"})
writer.save(1, {"x": np.arange(1000.0)})
writer.wait()
writer.save(2, {"x": np.random.default_rng(0).random(16_000_000)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_writing_leaves_the_previous_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, timeout=120, check=False)
    assert done.returncode == -9
    assert any(not p.name.isdecimal() for p in tmp_path.iterdir())  # it was killed while writing
    assert list_steps(tmp_path) == (1,)
    step, got, _ = read(tmp_path)
    assert step == 1
    np.testing.assert_array_equal(got["x"], np.arange(1000.0))
    with CheckpointWriter(tmp_path, about={"run": "a"}, resume_from=1) as writer:
        writer.save(2, got)
    assert list_steps(tmp_path) == (1, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_another_run_s_directory_is_refused(tmp_path):
    write(tmp_path, steps=(1, 2))
    before = {p: p.read_bytes() for p in files_of(tmp_path)}
    with pytest.raises(
        ValueError, match=r"holds checkpoints of another run \('a1'; this one is 'b2'\), steps 1, 2: choose"
    ):
        CheckpointWriter(tmp_path, about={"run": "b2"})
    with pytest.raises(ValueError, match="of another run"):
        CheckpointWriter(tmp_path, about={"run": "b2"}, resume_from=2)
    with pytest.raises(ValueError, match="of this run, steps 1, 2: choose another directory, or resume from one"):
        CheckpointWriter(tmp_path, about=ABOUT)
    with pytest.raises(ValueError, match="resume_from=3 is not a checkpoint in .*; it holds 1, 2"):
        CheckpointWriter(tmp_path, about=ABOUT, resume_from=3)
    assert {p: p.read_bytes() for p in files_of(tmp_path)} == before
    write(tmp_path, steps=(3,), resume_from=2)
    assert list_steps(tmp_path) == (1, 2, 3)


def test_resuming_from_an_earlier_step_sets_the_later_ones_aside(tmp_path):
    write(tmp_path, steps=(1, 2, 3))
    for n in (1, 2):
        write(tmp_path, steps=(2, 3), resume_from=1)
        assert list_steps(tmp_path) == (1, 2, 3)
        assert (tmp_path / f"superseded-3-{n}").is_dir()
    assert same(read(tmp_path, 2).arrays["params"], arrays(2.0)["params"])


def test_nothing_is_overwritten(tmp_path):
    with CheckpointWriter(tmp_path, about=ABOUT) as writer:
        writer.save(1, arrays())
        with pytest.raises(ValueError, match="holds step 1 already"):
            writer.save(1, arrays(2.0))
    writer.close()  # twice does nothing
    with pytest.raises(ValueError, match="is closed; open another to save step 2"):
        writer.save(2, arrays())
    assert same(read(tmp_path).arrays["params"], arrays()["params"])


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"params": {"dense": {"kernel": jnp.ones((3, 5)), "b.ias": jnp.zeros(4)}}},
         r"params/dense/kernel is float32\(3, 4\) in .*; like has float32\(3, 5\)"),
        ({"params": {"dense": {"kernel": jnp.ones((3, 4), jnp.bfloat16), "b.ias": jnp.zeros(4)}}},
         r"params/dense/kernel is float32.*; like has bfloat16"),
        ({"params": {"dense": {"kernal": jnp.ones((3, 4)), "b.ias": jnp.zeros(4)}}},
         "holds no params/dense/kernal, which like has. Did you mean 'params/dense/kernel'"),
        ({"params": {"dense": {"kernel": jnp.ones((3, 4))}}}, "holds params/dense/b.ias, which like lacks"),
        ({"ema": jnp.ones(3)}, "holds no ema, which like has"),
        ({"params": {"dense": {"kernel": jax.random.key(0), "b.ias": jnp.zeros(4)}}}, "kernel is no random key in"),
    ],
)  # fmt: skip
def test_templates_that_do_not_fit_name_the_leaf(written, like, message):
    with pytest.raises(ValueError, match=message):
        read(written, like=like)


def test_a_key_of_another_kind_is_noticed(tmp_path):
    with CheckpointWriter(tmp_path, about=ABOUT) as writer:
        writer.save(1, {"key": jax.random.key(0, impl="rbg")})
    assert str(jax.random.key_impl(read(tmp_path).arrays["key"])) == "rbg"
    with pytest.raises(ValueError, match=r"key is key<rbg>\(\) in .*; like has key<fry>\(\)"):
        read(tmp_path, like={"key": jax.random.key(0)})


def test_double_precision_needs_x64(tmp_path):
    with jax.enable_x64(True), CheckpointWriter(tmp_path, about=ABOUT) as writer:
        writer.save(1, {"x": jnp.ones(2, jnp.float64)})
    with pytest.raises(ValueError, match="x was saved in float64; enable jax_enable_x64"):
        read(tmp_path)
    with jax.enable_x64(True):
        assert read(tmp_path).arrays["x"].dtype == np.float64


def test_places_that_hold_nothing(tmp_path, written):
    with pytest.raises(ValueError, match="there is no folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        read(tmp_path)
    with pytest.raises(ValueError, match="step must be one of 1, 2 in .*; got 7"):
        read(written, 7)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder for checkpoints; .* is a file"):
        CheckpointWriter(tmp_path / "file", about=ABOUT)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"model": "scimf"}, "about needs an id of the run under 'run', a string; it has: model"),
        ({"run": ""}, "about needs an id"),
        ({"run": "a", "x": np.ones(2)}, "about must be a JSON object"),
        ({"run": "a", "x": float("nan")}, "about must be a JSON object"),
        ({"run": "a", "x": (1, 2)}, "give lists for tuples"),
    ],
)
def test_documents_that_json_cannot_hold(tmp_path, about, message):
    with pytest.raises(ValueError, match=message):
        CheckpointWriter(tmp_path / "new", about=about)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"x": np.array(["a"])}, "x must be an array of numbers.*Text belongs into about"),
        ({"x": object()}, "x must be an array of numbers"),
        ({"x": {"a/b": np.ones(1)}}, "must be words without '/'; got 'a/b'"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "would be stored under one name"),
        ({"x": None}, "at least one array"),
    ],
)
def test_trees_that_cannot_be_stored(tmp_path, tree, message):
    with CheckpointWriter(tmp_path, about=ABOUT) as writer, pytest.raises(ValueError, match=message):
        writer.save(1, tree)
    assert list_steps(tmp_path) == ()


def test_orbax_is_quiet_and_the_log_is_left_alone(tmp_path, caplog):
    absl = logging.getLogger("absl")
    before = (absl.level, list(absl.filters), list(absl.handlers), logging.getLogger().level)
    with caplog.at_level(logging.INFO), CheckpointWriter(tmp_path, about=ABOUT) as writer:
        writer.save(1, arrays())
        writer.wait()
        absl.warning("of somebody else")
        read(tmp_path)
    assert [r.getMessage() for r in caplog.records if r.name == "absl"] == ["of somebody else"]
    assert (absl.level, absl.filters, absl.handlers, logging.getLogger().level) == before


def test_provenance_names_versions_and_source():
    about = provenance()
    assert {"scjax", "jax", "numpy", "python", "orbax-checkpoint"} <= set(about["versions"])
    assert about["versions"]["jax"] == jax.__version__
    assert len(about["source"]) == 32
    assert about == json.loads(json.dumps(about)) == provenance()


def test_importing_is_light():
    code = "import sys, scjax.checkpoint; sys.exit('orbax' in sys.modules or 'optax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=True)


def test_an_error_that_is_told_again_at_the_end(tmp_path, monkeypatch):
    """Where several writes fail, orbax keeps one for its own end; that is told in the same words."""
    writer = CheckpointWriter(tmp_path, about={"run": "a"})
    writer.save(3, {"x": np.ones(3)})
    writer.wait()
    close = writer._manager.close

    def full():
        raise OSError(28, "No space left on device")

    def closes_and_is_full():
        close()
        full()

    monkeypatch.setattr(writer._manager, "wait_until_finished", full)
    monkeypatch.setattr(writer._manager, "close", closes_and_is_full)
    told = r"could not be written into .*: No space left on device. The newest complete one is step 3\."
    with pytest.raises(OSError, match=told):
        writer.close()
    with CheckpointWriter(tmp_path, about={"run": "a"}, resume_from=3):  # its lock is gone
        pass
