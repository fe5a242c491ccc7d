"""Files of weights: from a file to a flat dict of arrays and back, by readers that run nothing that lies in it.

A `.pt` file is a pickle, which may run code when it is read; `torch.load(path, weights_only=True)` takes tensors and
plain values and refuses everything that acts.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from scjax.check import one_of
from scjax.whole import made_whole

__all__ = ["WhichWeights", "check_new", "read_torch", "write_torch"]

WhichWeights: TypeAlias = Literal["main", "ema", "last"]

_OF_TORCH = (".pt", ".pth", ".ckpt", ".bin")
_SUFFIXES = (*_OF_TORCH, ".npz", ".safetensors")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")  # beside the last weights
_INSIDE = ("state_dict", "model_state_dict", "model")
_TYPES = {  # of safetensors
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
_LONGEST = 100 * 2**20  # bytes of the header of a safetensors file


def read_torch(path: str | Path, *, weights: WhichWeights = "main") -> dict[str, np.ndarray]:
    """The state dict in a file of weights: arrays by name, without the prefixes of wrappers.

    .pt, .pth, .ckpt, .bin (with torch, the extra `torch`): a state dict, or a checkpoint with one under "state_dict",
    "model_state_dict" or "model". .npz and .safetensors need no torch. float16 and bfloat16 become float32, which holds
    them exactly; other types are kept. "module." in front of every name and "_orig_mod." anywhere are taken away, as
    the wrappers for several devices and for compilation put them there.

    Args:
        weights: "main" takes the main state dict, which in files of Lightning with a moving average is that average
            (they keep the last weights under "current_model_state"); else there is one alone. "ema" and "last" ask for
            the average, or for the last weights, and refuse a file without an average: it does not tell which of the
            two its only weights are.

    Raises:
        ValueError: no such file or kind of file; one that is cut short, or holds more than tensors and plain values; no
            state dict in it; weights that it does not have; tensors that are no arrays of numbers.
        ImportError: torch is needed and not installed.
    """
    one_of("weights", weights, ("main", "ema", "last"))
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path must be a file of weights; there is no file {path}.")
    one_of("the end of the file's name", path.suffix, _SUFFIXES)
    if path.suffix in _OF_TORCH:
        found = _loaded(path)
    else:
        found = _unpacked(path) if path.suffix == ".npz" else dict(_safetensors(path))
    state = _chosen(found, weights, path)
    arrays, wrong = {}, []
    for name, value in state.items():
        try:
            arrays[name] = _as_array(value)
        except (ValueError, TypeError, RuntimeError) as err:
            wrong.append(f"{name!r:.80}: {str(err).splitlines()[0]:.120}")
    if wrong:
        raise ValueError(f"{path}: the state dict must hold arrays of numbers alone:\n  " + "\n  ".join(wrong[:20]))
    return _unwrapped(arrays, path)


def write_torch(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """A new file with a plain state dict, .pt or .pth (with torch, the extra `torch`) or .npz; whole or not at all.

    `model.load_state_dict(torch.load(path, weights_only=True))` reads it.

    Raises:
        ValueError: the file exists, its folder does not, another kind of file.
        FileExistsError: something has come there meanwhile.
        ImportError: torch is needed and not installed.
    """
    path = Path(path)
    check_new(path)
    with made_whole(path) as beside:
        if path.suffix == ".npz":
            np.savez(beside, **state)  # pyright: ignore[reportArgumentType]
        else:
            torch = _torch(path)
            torch.save({name: torch.from_numpy(np.array(value)) for name, value in state.items()}, beside)


def check_new(path: Path) -> None:
    """Whether `write_torch` may write there.

    Raises:
        ValueError: the file exists, its folder does not, another kind of file.
    """
    one_of("the end of the file's name", path.suffix, (".pt", ".pth", ".npz"))
    if path.exists():
        raise ValueError(f"{path} exists already and is not overwritten; choose another name.")
    if not path.parent.is_dir():
        raise ValueError(f"{path} would lie in a folder that does not exist; make {path.parent} first.")


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as err:
        raise ImportError(
            f"{path.suffix} files need torch, which is not installed: pip install 'scjax[torch]'. Without it, where "
            'torch is, np.savez("weights.npz", **{k: v.numpy() for k, v in state.items()}) makes a file that is read '
            "here."
        ) from err
    return torch


def _loaded(path: Path) -> Any:
    torch = _torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # whatever torch, pickle and zipfile say about a file that they cannot read
        said = " ".join(str(err).split()).rpartition("WeightsUnpickler error: ")[2]
        if re.search(r"unsupported|instantiate|blocked", said, re.IGNORECASE):
            raise ValueError(
                f"{path} holds more than tensors and plain values, and reading that could run code: it is not read "
                f"({said[:100]}). If you trust the file, open it where its program is installed, and save its state "
                'dict alone: torch.save(checkpoint["state_dict"], "weights.pt").'
            ) from err
        raise ValueError(
            f"{path} cannot be read as a file of torch ({type(err).__name__}: {said[:160]}); it may be cut short: "
            "compare its size and checksum with those of its source."
        ) from err


def _unpacked(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # NumPy leaves its own open
            return {name: file[name] for name in file.files}
    except Exception as err:  # whatever numpy and zipfile say about a file that they cannot read
        said = " ".join(str(err).split())
        raise ValueError(
            f"{path} cannot be read as .npz of arrays ({type(err).__name__}: {said[:160]}); it may be cut short."
        ) from err


def _safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Eight bytes that say how long the header is, the header, then the numbers; nothing of it can act."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST):
            raise ValueError(f"{path} is cut short or no file of safetensors: its header would be {length} bytes long.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = []
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                entries.append((name, _TYPES[entry["dtype"]], tuple(entry["shape"]), start, stop))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise ValueError(f"{path}: its header makes no sense ({type(err).__name__}: {str(err):.80}).") from err
        for name, dtype, shape, start, stop in entries:
            if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or 8 + length + stop > size:
                raise ValueError(f"{path} is cut short or damaged: {name!r:.80} lies outside of it.")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path}: {name!r:.80} has the shape {shape}, but {stop - start} bytes.")
            file.seek(8 + length + start)
            yield name, np.frombuffer(file.read(stop - start), dtype).reshape(shape)


def _chosen(found: Any, weights: str, path: Path) -> Mapping[Any, Any]:
    """The state dict of these weights, in a file that may hold several."""
    if not isinstance(found, Mapping) or not found:
        what = "an empty one" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{path} holds no state dict but {what}.")
    inside = [name for name in _INSIDE if isinstance(found.get(name), Mapping) and found[name]]
    if any(_is_tensor(value) for value in found.values()):
        inside = []  # a state dict itself
    elif not inside:
        raise ValueError(
            f"{path} holds no state dict, neither as a whole nor under {', '.join(_INSIDE)}. It has: "
            f"{', '.join(map(str, list(found)[:10]))}{', ...' if len(found) > 10 else ''}."
        )
    main = found[inside[0]] if inside else found
    average = next((name for name in _AVERAGES if isinstance(found.get(name), Mapping) and found[name]), None)
    last = found.get("current_model_state")
    if isinstance(last, Mapping) and last:
        return last if weights == "last" else main
    if weights == "main":
        return main
    if average is None:
        raise ValueError(
            f"weights={weights!r}, but {path} holds one set of weights only, and does not tell which it is: take "
            "weights='main'."
        )
    return found[average] if weights == "ema" else main


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray) or type(value).__name__ in ("Tensor", "Parameter")


def _as_array(value: Any) -> np.ndarray:
    if not _is_tensor(value):
        raise ValueError(f"no tensor but {type(value).__name__}")
    if not isinstance(value, np.ndarray):
        import torch

        if value.layout is not torch.strided or value.is_quantized:
            raise ValueError("a sparse or quantized tensor")
        value = value.detach()
        value = (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
    return value.astype(np.float32) if value.dtype in (np.dtype(np.float16), np.dtype(jnp.bfloat16)) else value


def _unwrapped(state: dict[Any, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    if not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{path}: the names of tensors must be words; got {next(n for n in state if type(n) is not str)!r}."
        )
    names = {name: name.replace("_orig_mod.", "") for name in state}
    while all(name.startswith("module.") for name in names.values()):
        names = {old: name.removeprefix("module.") for old, name in names.items()}
    if len(set(names.values())) < len(names):
        twice = next(n for n in names.values() if list(names.values()).count(n) > 1)
        raise ValueError(f"{path} holds {twice} more than once, with and without the prefix of a wrapper.")
    return {names[old]: value for old, value in state.items()}
