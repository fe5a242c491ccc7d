"""One run on several processes, of one machine or of many: how they find each other, which of them writes, and how an
error of one reaches the others.

Every process runs the same program. `start` comes first; then `jax.devices()` are those of all of them. The first
process alone writes logs and checkpoints. Steps that may fail on one process only (reading a file, writing one) go
through `together`: the others then stop too, with the number of the process that failed, and do not wait for it.
"""

import hashlib
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from scjax.check import at_least

__all__ = ["PeerError", "anyone", "check_agreed", "is_first", "refuse_several", "start", "together"]

T = TypeVar("T")

_PATIENCE = 60  # seconds that a process which ends in an error of its own waits for others, before they end too
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ARGUMENTS = ("coordinator", "n_processes", "process_id")


class PeerError(RuntimeError):
    """Another process of the run failed; what went wrong is told by that one."""


def start(
    coordinator: str | None = None,
    n_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
) -> bool:
    """Joins the processes of a run (`jax.distributed`); to be called before anything is computed.

    Without arguments the environment decides: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, where they
    are set. Where they are not, the process is on its own, and nothing happens.

    Args:
        coordinator: HOST:PORT of the first process, which the others can reach.
        n_processes: of all machines.
        process_id: of this one, from 0.
        detect: let JAX ask the cluster (SLURM, Open MPI, Kubernetes, TPU pods) instead.

    Returns:
        Whether there are several processes to be waited for.

    Raises:
        ValueError: some of the three and not all, numbers that do not fit, or `detect` beside them.
        RuntimeError: JAX has computed something already, or was joined to others before.
    """
    given = dict(zip(_ARGUMENTS, (coordinator, n_processes, process_id), strict=True))
    if detect:
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise ValueError(f"detect=True asks the cluster for {', '.join(named)}; leave them out, or detect.")
        jax.distributed.initialize(shutdown_timeout_seconds=_PATIENCE)
        return jax.process_count() > 1
    if all(value is None for value in given.values()):
        given = {name: os.environ.get(variable) or None for name, variable in _of_environment().items()}
        if all(value is None for value in given.values()):
            return False
        spelled = _of_environment()
    else:
        spelled = {name: name for name in _ARGUMENTS}
    missing = [spelled[name] for name, value in given.items() if value is None]
    if missing:
        told = ", ".join(f"{spelled[name]}={value}" for name, value in given.items() if value is not None)
        raise ValueError(f"several processes need all of {', '.join(spelled.values())}; {told} came without {missing}.")
    count, number = (_whole(spelled[name], given[name]) for name in ("n_processes", "process_id"))
    at_least(spelled["n_processes"], count, 1)
    if not 0 <= number < count:
        raise ValueError(f"{spelled['process_id']} must lie in 0, ..., {count - 1} of {count} processes; got {number}.")
    host, colon, port = str(given["coordinator"]).rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError(f"{spelled['coordinator']} must be HOST:PORT; got {given['coordinator']!r}.")
    jax.distributed.initialize(f"{host}:{port}", count, number, shutdown_timeout_seconds=_PATIENCE)
    return count > 1


def is_first() -> bool:
    """Whether this process writes and talks for the run; a process on its own does."""
    return jax.process_index() == 0


def together(work: Callable[[], T], doing: str) -> T:
    """What `work()` gives, once all processes have done theirs.

    On one process alone this is `work()`.

    Raises:
        PeerError: on the processes where `work` went well, if it failed on another; `doing` is told.
        BaseException: what `work` raised here.
    """
    if jax.process_count() == 1:
        return work()
    try:
        done = work()
    except BaseException:
        _flags(True)
        raise
    failed = np.flatnonzero(_flags(False))
    if len(failed):
        numbers = ", ".join(map(str, failed))
        raise PeerError(f"{doing} failed on process {numbers} of {jax.process_count()}; its own message says why.")
    return done


def anyone(flag: bool) -> bool:
    """Whether it is true on any process; the same answer on all of them."""
    return flag if jax.process_count() == 1 else bool(_flags(flag).any())


def check_agreed(name: str, text: str) -> None:
    """The same text on all processes.

    Raises:
        ValueError: on all of them, where it is not.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.int32)
    digests = np.asarray(process_allgather(digest))
    differ = np.flatnonzero((digests != digests[:1]).any(axis=1))
    if len(differ):
        raise ValueError(
            f"{name} must be the same on all processes; on process {', '.join(map(str, differ))} other than on 0."
        )


def refuse_several(what: str) -> None:
    if jax.process_count() > 1:
        raise ValueError(f"{what} is for one process; there are {jax.process_count()}.")


def _of_environment() -> dict[str, str]:
    return dict(zip(_ARGUMENTS, _VARIABLES, strict=True))


def _whole(name: str, value: int | str | None) -> int:
    try:
        return int(value)  # pyright: ignore[reportArgumentType]  # None is a TypeError
    except (TypeError, ValueError) as err:
        raise ValueError(f"{name} must be a whole number; got {value!r}.") from err


def _flags(mine: bool) -> np.ndarray:
    """Of each process."""
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(np.int32(mine)))
