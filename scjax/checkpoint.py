"""Checkpoints on disk: named trees of arrays, and a JSON document that says what they are. The only home of orbax.

A directory holds one run; each complete checkpoint is a folder in it, named by its step:

    with CheckpointWriter(directory, about={"run": run_id, "config": ...}) as writer:
        writer.save(100, {"state": state, "transform": arrays})      # returns soon, writes in the background
    step, arrays, about = read(directory)                            # the newest
    step, arrays, about = read(directory, like={"state": template})  # NamedTuples and optax states come back as such

A checkpoint knows nothing of devices. Arrays that are spread over several are stored whole, and come back on whatever
devices the template names: what 8 devices saved, 1 or 2 processes of 2 go on from. With several processes
(`scjax.hosts`) all of them open the writer and hand in their arrays; the first alone writes, so that what is said of
one writer stays true: where orbax writes from all of them, one that cannot write leaves the others waiting, for twenty
minutes, before anybody is told. The arrays pass through the memory of its host, leaf by leaf; no device holds more of a
leaf that is spread over processes than the whole of that one leaf.

What the arrays mean and what `about` says is the caller's affair; this module writes atomically, keeps the last few,
and notices what was damaged: every leaf is stored with a digest of its bytes, shape and dtype, which `read` checks.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scjax import hosts
from scjax.check import at_least, suggestion
from scjax.mesh import put

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "list_steps",
    "provenance",
    "read",
    "read_about",
    "sole_writer",
    "understanding",
]

_FORMAT = 1
_DEEPEST = 100  # words in the path of a leaf
_KEYS = ("threefry2x32", "rbg", "unsafe_rbg", "fry", "urbg")  # kinds of random keys, as jax.random.key_impl tells them
_LOCK = ".lock"  # in a directory that somebody writes into
_REMOVED = "removed-"  # what an older checkpoint is called while it is deleted
_LIBRARIES = ("scjax", "jax", "jaxlib", "flax", "optax", "diffrax", "ott-jax", "orbax-checkpoint", "numpy")


class Checkpoint(NamedTuple):
    """What `read` gives: the step, `arrays` by name, and the document written with them."""

    step: int
    arrays: dict[str, Any]
    about: dict[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of one run into one directory, in the background, keeping the last `keep`.

    `about` is a JSON object with an id of the run under "run"; it is stored with every checkpoint. A directory that
    already holds checkpoints is refused, unless `resume_from` names one of its steps and the run is the same. Steps
    after `resume_from` are then set aside (renamed to `superseded-<step>-<n>`), since the run will come by them again.

    A checkpoint is complete or invisible: it is written under another name, and renamed once it is whole; an older one
    is renamed before it is deleted. A process killed while writing leaves the earlier checkpoints untouched.

    Raises:
        ValueError: `about` is no JSON object or has no "run"; the directory belongs to another run, or to this one and
            `resume_from` is missing; `resume_from` is not one of its steps; another writer has it open (`sole_writer`).
    """

    def __init__(
        self, directory: str | Path, *, about: Mapping[str, Any], keep: int = 3, resume_from: int | None = None
    ):
        at_least("keep", keep, 1)
        self.directory = Path(directory).resolve()
        self.about = _plain_json(about)
        self.keep = keep
        self._stack = ExitStack()
        self._manager: Any = None  # the first process has one
        hosts.together(lambda: self._begin(resume_from) if hosts.is_first() else None, "Opening checkpoints")
        self.last_step = resume_from  # the newest step that this run can be taken up from
        self._open = True

    def _begin(self, resume_from: int | None) -> None:
        _check_folder(self.directory)

        import orbax.checkpoint as ocp

        with ExitStack() as stack:
            stack.enter_context(sole_writer(self.directory))
            _admit(self.directory, self.about["run"], resume_from)
            for half in self.directory.glob(f"{_REMOVED}*"):  # by a process that was killed while deleting
                shutil.rmtree(half)
            stack.enter_context(_quiet_orbax())  # until the writer is closed: orbax talks from its threads
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    enable_async_checkpointing=True,
                    cleanup_tmp_directories=True,  # left by a process that was killed while writing
                    **_alone(),
                ),
            )
            stack.callback(self._close_manager)
            self._stack = stack.pop_all()

    def save(self, step: int, arrays: Mapping[str, Any]) -> None:
        """Copies the arrays to the host now, so that they may be donated or changed, and writes them in the background.

        `arrays` maps names to trees of arrays. An error of the previous write comes here or from `wait`.

        Of several processes each calls this, at the same step.

        Raises:
            ValueError: the step exists already; a leaf is no array; a name in the tree cannot be stored.
            OSError: a checkpoint could not be written; the newest complete one is named.
        """
        at_least("step", step, 0)
        if not self._open:
            raise ValueError(f"the writer of {self.directory} is closed; open another to save step {step}.")
        hosts.together(lambda: self._check_new(step) if hosts.is_first() else None, "Writing a checkpoint")
        leaves = _pack(arrays)
        hosts.together(lambda: self._write(step, leaves) if hosts.is_first() else None, "Writing a checkpoint")
        self.last_step = step

    def _check_new(self, step: int) -> None:
        if step in list_steps(self.directory) or step == self._manager.latest_step():
            raise ValueError(f"{self.directory} holds step {step} already, and a checkpoint is never overwritten.")

    def _write(self, step: int, packed: "_Packed") -> None:
        import orbax.checkpoint as ocp

        leaves, manifest = packed.leaves, _manifest(packed)
        manifest["digest"] = _seal(manifest, self.about)
        stored = {path: leaf for path, leaf in leaves.items() if leaf.size}  # orbax refuses arrays without entries
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(_nest(stored)),
                    manifest=ocp.args.JsonSave(manifest),
                    about=ocp.args.JsonSave(self.about),
                ),
                force=True,
            )
            self._remove_old()

    def wait(self) -> None:
        """Blocks until every checkpoint handed to `save` is on the disk; raises what went wrong in writing it.

        Of several processes the first alone waits, and learns of it.
        """
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()
                self._remove_old()

    def close(self) -> None:
        """Waits, and frees the threads. Closing twice does nothing."""
        if self._open:
            self._open = False
            with self._stack:
                self.wait()

    def _close_manager(self) -> None:
        with self._writing():  # where several writes failed, it is told of one more of them
            self._manager.close()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        if kind is None:  # and so on every process: none goes on before the first has written what it was handed
            hosts.together(self.close, "Writing a checkpoint")
        else:
            self.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _deaf_to_late_tasks():
                yield
        except Exception as err:  # whatever orbax and tensorstore say about a full disk, a lost folder
            steps = list_steps(self.directory)
            self.last_step = steps[-1] if steps else None
            left = f"The newest complete one is step {steps[-1]}." if steps else "No complete one is there."
            raise OSError(f"a checkpoint could not be written into {self.directory}: {_reason(err)}. {left}") from err

    def _remove_old(self) -> None:
        """All but the last `keep` that are complete. A name that counts as a checkpoint is never half deleted."""
        for step in list_steps(self.directory)[: -self.keep]:
            aside = self.directory / f"{_REMOVED}{step}"
            (self.directory / str(step)).rename(aside)
            shutil.rmtree(aside)


@contextmanager
def sole_writer(directory: str | Path) -> Iterator[None]:
    """Nobody else writes into `directory`, which is made if need be, until this ends.

    A lock on the file `.lock` in it, which is gone afterwards. The system frees the lock when the process ends, also
    when it is killed: what is left of the file then locks nobody out. Between machines that share a folder it holds
    where the file system locks for all of them: NFS 4 does, NFS mounted with `nolock` or Lustre with `localflock` do
    not. A file system without locks gets a warning, and Windows has none of this kind. Of the processes of one
    distributed run the first locks.

    Raises:
        ValueError: somebody else does; the message says who.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    file = _locked(directory) if jax.process_index() == 0 else None
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # of a disk that has become read-only; the lock goes with the descriptor
                (directory / _LOCK).unlink(missing_ok=True)
            os.close(file)


def _locked(directory: Path) -> int | None:
    """The descriptor that holds the lock; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(file, 200).decode(errors="replace")
            os.close(file)
            raise ValueError(
                f"{directory} is being written into by {who or 'another process'}. Wait for its end, or choose "
                "another folder."
            ) from None
        except OSError as err:
            os.close(file)
            (directory / _LOCK).unlink(missing_ok=True)
            warnings.warn(
                f"{directory} lies on a file system without locks ({err}): see to it that only one run writes there.",
                stacklevel=4,
            )
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(directory / _LOCK)):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        os.close(file)  # it was the file of another, who has deleted it in between


def list_steps(directory: str | Path) -> tuple[int, ...]:
    """Steps of the complete checkpoints, in increasing order; none where there is no such directory."""
    directory = Path(directory)
    if not directory.is_dir():
        return ()
    return tuple(sorted(int(p.name) for p in directory.iterdir() if _is_number(p.name) and p.is_dir()))


def _is_number(name: str) -> bool:
    """As `save` writes it: 7, not 007, nor a digit of another script."""
    return name.isdecimal() and name == str(int(name))


def read(directory: str | Path, step: int | None = None, *, like: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest, every byte of its arrays verified.

    Arrays come back as they were: jax arrays and typed keys on the default device, NumPy arrays as NumPy. Without a
    template every tree is a nested dict of strings: a field of a NamedTuple is an entry of its name, an element of a
    tuple one of its index, a None is absent.

    Args:
        like: templates by the names given to `save`; arrays, or `jax.ShapeDtypeStruct`s as `jax.eval_shape` gives them.
            These entries come back in the template's structure and with the sharding of its committed arrays, or of
            its structs that have one (`scjax.mesh.template`): each device gets its part alone, of several processes
            each reads the files and keeps the parts of its devices.

    Raises:
        ValueError: no such directory or step; the checkpoint is damaged (the message names what, and the newest earlier
            one that can be read); a template differs from what is stored, named by the leaf's path.
    """
    directory = Path(directory)
    step = _chosen(directory, step)
    try:
        leaves, manifest, about = _load(directory / str(step))
    except _DamagedError as err:
        raise ValueError(f"{err} {_alternative(directory, step)}") from err
    like = like or {}
    # What a template places is not put on the default device first, which may have no room for all of it.
    arrays = _nest({path: _unpack(path, leaf, manifest[path]) for path, leaf in leaves.items() if path[0] not in like})
    for name, template in like.items():
        flat = {p: v for p, v in leaves.items() if p[0] == name}
        arrays[name] = _in_form_of(template, name, flat, manifest, directory / str(step))
    return Checkpoint(step, arrays, about)


def read_about(directory: str | Path, step: int | None = None) -> dict[str, Any]:
    """The JSON document alone, of `step` or the newest; no array is read, and none verified.

    Raises:
        ValueError: no such directory or step, or the document is damaged.
    """
    directory = Path(directory)
    step = _chosen(directory, step)
    try:
        return _documents(directory / str(step))[1]
    except _DamagedError as err:
        raise ValueError(f"{err} {_alternative(directory, step)}") from err


@contextmanager
def understanding(directory: str | Path) -> Iterator[None]:
    """What a checkpoint of `directory` says is taken up; what it lacks, or has in another form, is a ValueError.

    The digest tells of accidents alone: another version, or a hand, may have sealed another document.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError) as err:
        raise ValueError(
            f"the checkpoint in {directory} does not hold what this version of scjax expects of it "
            f"({_first_line(err)}). Read it with the version that wrote it (`scjax show`), or train again."
        ) from err


def provenance() -> dict[str, Any]:
    """Versions, machine and source that produced a checkpoint: an entry for `about`."""
    return {"versions": versions(), "device": jax.devices()[0].device_kind, "source": source_digest()}


def versions() -> dict[str, str]:
    """Of Python, scjax and the libraries that decide what a checkpoint means."""
    from scjax import __version__

    return versions_of(_LIBRARIES) | {"scjax": __version__, "python": platform.python_version()}


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Of those that are installed: scjax may be a checkout on the path, others are optional."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def source_digest() -> str:
    """Of this package's Python files, so that an edited checkout is told from a release."""
    package = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# -- who may write where


def _plain_json(about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError) as err:
        raise ValueError(f"about must be a JSON object of finite numbers, strings, lists and objects: {err}") from err
    if plain != dict(about):
        raise ValueError("about must come back from JSON as it went in; give lists for tuples, and strings as keys.")
    if not isinstance(plain.get("run"), str) or not plain["run"]:
        raise ValueError(
            f"about needs an id of the run under 'run', a string; it has: {', '.join(plain) or 'nothing'}."
        )
    return plain


def _check_folder(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory must be a folder for checkpoints; {directory} is a file.")


def _admit(directory: Path, run: str, resume_from: int | None) -> None:
    steps = list_steps(directory)
    if resume_from is not None and resume_from not in steps:
        listed = ", ".join(map(str, steps)) or "no checkpoint"
        raise ValueError(f"resume_from={resume_from} is not a checkpoint in {directory}; it holds {listed}.")
    if not steps:
        return
    theirs = _run_of(directory, steps)
    if resume_from is None or theirs != run:
        whose = "this run" if theirs == run else f"another run ({theirs!r}; this one is {run!r})"
        mend = "choose another directory" + (", or resume from one of them" if theirs == run else "")
        raise ValueError(f"{directory} holds checkpoints of {whose}, steps {', '.join(map(str, steps))}: {mend}.")
    for step in steps:
        if step > resume_from:
            aside = (directory / f"superseded-{step}-{n}" for n in range(1, 1_000_000))
            (directory / str(step)).rename(next(p for p in aside if not p.exists()))


def _run_of(directory: Path, steps: Sequence[int]) -> str | None:
    for step in reversed(steps):
        try:
            return _documents(directory / str(step))[1].get("run")
        except _DamagedError:
            continue
    return None


def _chosen(directory: Path, step: int | None) -> int:
    if not directory.is_dir():
        raise ValueError(f"directory must hold checkpoints; there is no folder {directory}.")
    steps = list_steps(directory)
    if not steps:
        raise ValueError(f"{directory} holds no complete checkpoint.")
    if step is not None and step not in steps:
        raise ValueError(f"step must be one of {', '.join(map(str, steps))} in {directory}; got {step}.")
    return steps[-1] if step is None else step


# -- a tree as leaves by path, with a manifest


class _Packed(NamedTuple):
    """Private host copies of the leaves by path, and a description of each; empty on processes that do not write."""

    leaves: dict[tuple[str, ...], np.ndarray]
    notes: dict[tuple[str, ...], dict[str, Any]]


def _pack(arrays: Mapping[str, Any]) -> _Packed:
    packed, n_entries = _Packed({}, {}), 0
    for path, leaf in _paths(dict(arrays)):
        note: dict[str, Any] = {"jax": isinstance(leaf, jax.Array)}
        if _is_key(leaf):
            note["prng"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array) and np.asarray(leaf).dtype.kind in "OUSmM":
            raise ValueError(f"{'/'.join(path)} must be an array of numbers; got {leaf!r}. Text belongs into about.")
        n_entries += np.size(leaf)
        value = _whole(leaf)
        if hosts.is_first():
            packed.leaves[path] = value  # pyright: ignore[reportArgumentType]
            packed.notes[path] = note | {"shape": list(value.shape), "dtype": value.dtype.name}  # pyright: ignore[reportOptionalMemberAccess]
    if not n_entries:
        raise ValueError("arrays must hold at least one array with entries.")
    return packed


def _whole(leaf: Any) -> np.ndarray | None:
    """A copy: the buffer of a jax array on the CPU may be donated to the next step. None where nothing is written."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(leaf, tiled=True))  # of an array that nobody else holds
    return np.array(leaf) if hosts.is_first() else None


def _manifest(packed: _Packed) -> dict[str, Any]:
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = dict(zip(packed.leaves, pool.map(_digest, packed.leaves.values()), strict=True))
    leaves = {"/".join(path): note | {"digest": digests[path]} for path, note in packed.notes.items()}
    return {"format": _FORMAT, "leaves": leaves}


def _paths(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    seen = {}
    for entries, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = tuple(_word(entry, entries) for entry in entries)
        stored_as = ".".join(path)  # orbax joins names by dots
        if stored_as in seen:
            raise ValueError(f"{'/'.join(path)} and {seen[stored_as]} would be stored under one name; rename one.")
        seen[stored_as] = "/".join(path)
        yield path, leaf


def _word(entry: Any, entries: Sequence[Any]) -> str:
    for attribute in ("key", "idx", "name"):  # of a dict, a sequence, a NamedTuple or dataclass
        if hasattr(entry, attribute):
            word = getattr(entry, attribute)
            break
    else:
        word = str(entry)
    if isinstance(word, int):
        word = str(word)
    if not isinstance(word, str) or not word or "/" in word:
        raise ValueError(
            f"the keys of a tree in a checkpoint must be words without '/'; got {word!r} in "
            f"{jax.tree_util.keystr(tuple(entries))}."
        )
    return word


def _nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for word in path[:-1]:
            node = node.setdefault(word, {})
        node[path[-1]] = leaf
    return tree


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _digest(value: np.ndarray) -> str:
    h = hashlib.blake2b(f"{value.dtype.name}{value.shape}".encode(), digest_size=16)
    h.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return h.hexdigest()


def _seal(manifest: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    text = json.dumps([{k: v for k, v in manifest.items() if k != "digest"}, about], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# -- reading, and what can be wrong


class _DamagedError(Exception):
    """A checkpoint that was complete once and cannot be trusted now."""


def _documents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import orbax.checkpoint as ocp

    wanted = ocp.args.Composite(manifest=ocp.args.JsonRestore(), about=ocp.args.JsonRestore())
    restored = _restored(path, wanted, "its documents cannot be read")
    manifest, about = restored.manifest, restored.about
    if (
        not isinstance(manifest, dict)
        or not isinstance(about, dict)
        or manifest.get("digest") != _seal(manifest, about)
    ):
        raise _DamagedError(f"the checkpoint {path} is damaged: its documents do not match their digest.")
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r:.60}; this version reads {_FORMAT}: update scjax."
        )
    problem = _nonsense(manifest.get("leaves"))
    if problem:
        raise _DamagedError(f"the checkpoint {path} is damaged: its manifest makes no sense ({problem}).")
    return manifest["leaves"], about


def _nonsense(leaves: Any) -> str:
    """What is no description of a leaf. The digest tells of accidents; who writes a manifest of his own can seal it."""
    if not isinstance(leaves, dict) or not leaves:
        return "leaves is no object with an entry for each array"
    for name, note in leaves.items():
        words = name.split("/")
        if not all(words) or len(words) > _DEEPEST or any(name.startswith(f"{other}/") for other in leaves):
            return f"{name!r:.60} is no path of a leaf"
        kinds = {"shape": list, "dtype": str, "digest": str, "jax": bool}
        if not isinstance(note, dict) or not all(isinstance(note.get(k), kind) for k, kind in kinds.items()):
            return f"{name!r:.60} lacks one of {', '.join(kinds)}"
        if not all(type(n) is int and n >= 0 for n in note["shape"]) or math.prod(note["shape"]) > 2**48:
            return f"{name!r:.60} has the shape {note['shape']!r:.60}"
        try:
            is_number = jnp.issubdtype(jnp.dtype(note["dtype"]), jnp.number) or note["dtype"] == "bool"
        except TypeError:
            is_number = False
        if not is_number:
            return f"{name!r:.60} has the dtype {note['dtype']!r:.60}"
        if "prng" in note and (note["prng"] not in _KEYS or not note["jax"]):
            return f"{name!r:.60} is a random key of kind {note['prng']!r:.60}"
    return ""


def _load(path: Path) -> tuple[dict[tuple[str, ...], np.ndarray], dict[tuple[str, ...], Any], dict[str, Any]]:
    import orbax.checkpoint as ocp

    notes, about = _documents(path)
    notes = {tuple(name.split("/")): note for name, note in notes.items()}
    blank = {p: np.zeros(note["shape"], jnp.dtype(note["dtype"])) for p, note in notes.items()}  # untouched pages
    wanted = ocp.args.Composite(arrays=ocp.args.StandardRestore(_nest({p: b for p, b in blank.items() if b.size})))
    tree = _restored(path, wanted, "its arrays cannot be read").arrays
    leaves = {}
    for p, b in blank.items():
        leaves[p] = _at(tree, p) if b.size else b
        if _digest(leaves[p]) != notes[p]["digest"]:
            raise _DamagedError(f"the checkpoint {path} is damaged: {'/'.join(p)} does not match its digest.")
    return leaves, notes, about


def _restored(path: Path, wanted: Any, problem: str) -> Any:
    import orbax.checkpoint as ocp

    try:
        alone = _alone()
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(**alone))
        with _quiet_orbax(), _deaf_to_late_tasks(), ocp.Checkpointer(handler, **alone) as checkpointer:
            return checkpointer.restore(path.resolve(), args=wanted)
    except Exception as err:  # whatever orbax, tensorstore or json say about a broken file
        raise _DamagedError(f"the checkpoint {path} is damaged: {problem} ({_first_line(err)}).") from err


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {next(iter(str(err).splitlines()), '')[:200]}"


def _reason(err: Exception) -> str:
    """What the system said, where it said something: tensorstore puts its number at the end of a long line."""
    found = re.search(r"os_error_code='(\d+)'", str(err))
    number = err.errno if isinstance(err, OSError) else int(found[1]) if found else None
    return _first_line(err) if number is None else os.strerror(number)


def _alone() -> dict[str, Any]:
    """Options with which this process reads or writes without waiting for others: orbax would meet them at barriers."""
    if jax.process_count() == 1:
        return {}
    from orbax.checkpoint.options import MultiprocessingOptions

    me = jax.process_index()
    alone = MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"scjax_{me}")
    return {"multiprocessing_options": alone}


def _at(tree: Any, path: Sequence[str]) -> np.ndarray:
    for word in path:
        tree = tree[word]
    return np.asarray(tree)


def _alternative(directory: Path, step: int) -> str:
    for earlier in reversed([s for s in list_steps(directory) if s < step]):
        try:
            _load(directory / str(earlier))
        except _DamagedError:
            continue
        return f"The previous complete one is step {earlier}: pass step={earlier}."
    return "No earlier checkpoint there can be read."


def _unpack(path: Sequence[str], value: np.ndarray, note: Mapping[str, Any]) -> Any:
    if not note["jax"]:
        return value
    array = _on_device("/".join(path), value)
    return _as_key("/".join(path), array, note["prng"]) if "prng" in note else array


def _as_key(name: str, data: jax.Array, kind: str) -> jax.Array:
    try:
        return jax.random.wrap_key_data(data, impl=kind)
    except TypeError as err:
        raise ValueError(f"{name} is no random key of kind {kind!r}: {_first_line(err)}.") from err


def _on_device(name: str, value: np.ndarray) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(f"{name} was saved in {value.dtype}; enable jax_enable_x64 to read it.")
    return jnp.asarray(value)


def _in_form_of(template: Any, name: str, flat: Mapping[tuple[str, ...], np.ndarray], notes: Any, place: Path) -> Any:
    wanted = dict(_paths({name: template}))
    for path in wanted:
        if path not in flat:
            known = ["/".join(p) for p in flat]
            raise ValueError(f"{place} holds no {'/'.join(path)}, which like has.{suggestion('/'.join(path), known)}")
    for path in flat:
        if path not in wanted:
            raise ValueError(f"{place} holds {'/'.join(path)}, which like lacks.")
    leaves = [_as_leaf(leaf, path, flat[path], notes[path], place) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _as_leaf(leaf: Any, path: Sequence[str], value: np.ndarray, note: Mapping[str, Any], place: Path) -> Any:
    at = "/".join(path)
    if _is_key(leaf) != ("prng" in note):
        raise ValueError(f"{at} is {'a' if 'prng' in note else 'no'} random key in {place}; like says otherwise.")
    if _is_key(leaf):
        key = _as_key(at, _on_device(at, value), note["prng"])
        sharding = _sharding_of(leaf)
        key = key if sharding is None else put(key, sharding)
        if key.dtype != leaf.dtype or key.shape != leaf.shape:
            raise ValueError(f"{at} is {key.dtype}{key.shape} in {place}; like has {leaf.dtype}{leaf.shape}.")
        return key
    shape, dtype = np.shape(leaf), np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if (value.shape, value.dtype) != (shape, dtype):
        raise ValueError(f"{at} is {value.dtype.name}{value.shape} in {place}; like has {dtype.name}{shape}.")
    sharding = _sharding_of(leaf)
    if sharding is not None:
        return put(value, sharding)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return _on_device(at, value)
    return value


def _sharding_of(leaf: Any) -> Any:
    """Where a template wants its array; None leaves that to JAX."""
    wants = leaf.committed if isinstance(leaf, jax.Array) else isinstance(leaf, jax.ShapeDtypeStruct)
    return leaf.sharding if wants else None


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.ERROR or "orbax" not in record.pathname


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drops what orbax tells the absl log, errors too: they are raised. Other users of that log are left alone."""
    log, chatter = logging.getLogger("absl"), _NotOrbax()
    log.addFilter(chatter)
    try:
        yield
    finally:
        log.removeFilter(chatter)


@contextmanager
def _deaf_to_late_tasks() -> Iterator[None]:
    """At the first leaf that cannot be read or written orbax gives up and closes its event loop. What is under way then
    finds it closed, which Python would print, once for each, above the error that matters.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        time.sleep(0.2)  # for the last of them
        raise
    finally:
        sys.unraisablehook = before
