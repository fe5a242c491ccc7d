"""Files and folders that are there when they are whole, and replace nothing."""

import errno
import glob
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["made_whole"]

_UNDER_WAY: set[Path] = set()  # by this process


@contextmanager
def made_whole(path: str | Path) -> Iterator[Path]:
    """Where to make the file or folder that is found at `path` afterwards; after an error nothing is.

    It is made in a hidden folder beside. What a maker that was killed left of the same name is removed by the next one,
    where its process is gone. The folder of `path` must be there.

    Raises:
        FileExistsError: something has come to `path` meanwhile; it stays as it is.
    """
    path = Path(path)
    mine = f".{path.name}.part-{socket.gethostname()}-"
    _remove_left(path.parent, mine)
    # The number of a process may come again: in a container that is started anew it does.
    beside = path.parent / f"{mine}{os.getpid()}.{secrets.token_hex(4)}"
    _UNDER_WAY.add(beside)
    try:
        beside.mkdir()
        made = beside / path.name
        yield made
        _rename(made, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        _UNDER_WAY.discard(beside)


def _remove_left(folder: Path, mine: str) -> None:
    for left in folder.glob(f"{glob.escape(mine)}*"):
        process, _, rest = left.name.removeprefix(mine).partition(".")
        # What is no number is of a host whose name begins like this one's.
        if process.isdecimal() and rest and left not in _UNDER_WAY and not _is_other(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _is_other(process: int) -> bool:
    """Whether another process has this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # no process has a number as large as some names tell
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _rename(made: Path, path: Path) -> None:
    if not path.exists():
        if made.is_dir():
            # What comes at this very moment is replaced if it is an empty folder, and else an error.
            os.rename(made, path)
            return
        try:
            os.link(made, path)  # `rename` would replace what comes at this very moment
            return
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.rename(made, path)
            return
    raise FileExistsError(errno.EEXIST, "something came there meanwhile, and is not overwritten", str(path))
