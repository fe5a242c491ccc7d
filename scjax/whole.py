"""Files and folders that are there when they are whole, and replace nothing."""

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["made_whole"]


@contextmanager
def made_whole(path: str | Path) -> Iterator[Path]:
    """Where to make the file or folder that is found at `path` afterwards; after an error nothing is.

    It is made in a hidden folder beside, which its maker holds a lock in. What a maker of the same name that was killed
    left on this machine is removed by the next one; where there are no locks it stays. The folder of `path` must be
    there.

    Raises:
        FileExistsError: something has come to `path` meanwhile; it stays as it is.
    """
    path = Path(path)
    mine = f".{path.name}.part-{socket.gethostname()[:20]}-"
    for left in path.parent.glob(".*.part-*"):
        if left.name.startswith(mine) and re.fullmatch("[0-9a-f]{8}", left.name.removeprefix(mine)):
            _remove_unless_locked(left)
    beside = path.parent / f"{mine}{secrets.token_hex(4)}"
    beside.mkdir()
    lock = None
    try:
        lock = _locked(beside)
        yield beside / path.name
        _put(beside / path.name, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks the file `.lock` in the folder, which is there once it is locked; None without locks."""
    file = os.open(folder / ".new", os.O_RDWR | os.O_CREAT, 0o644)
    if not _lock(file):
        os.close(file)
        return None
    os.rename(folder / ".new", folder / ".lock")
    return file


def _remove_unless_locked(folder: Path) -> None:
    with suppress(OSError):  # it is gone by now, or not ours
        file = os.open(folder / ".lock", os.O_RDWR)
        try:
            if _lock(file):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(file)


def _lock(file: int) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _put(made: Path, path: Path) -> None:
    """`rename` replaces a file, and an empty folder; of what comes at this very moment too."""
    try:
        if made.is_dir():
            if not os.path.lexists(path):
                os.rename(made, path)
                return
        elif _linked(made, path):
            return
    except OSError:
        if not os.path.lexists(path):
            raise
    raise FileExistsError(errno.EEXIST, "something came there meanwhile, and is not overwritten", str(path))


def _linked(made: Path, path: Path) -> bool:
    try:
        os.link(made, path)
    except FileExistsError:
        return os.path.exists(path) and os.path.samefile(made, path)  # NFS may tell of our own link
    except OSError:  # a file system without links
        with open(path, "xb"):
            pass
        os.rename(made, path)
    return True
