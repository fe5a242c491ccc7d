"""What a bug report needs: versions, platform, devices, flags, optional parts. Nothing of the user's own."""

import os
import platform
import re
from collections.abc import Mapping, Sequence

import jax

from scjax.checkpoint import source_digest, versions, versions_of

__all__ = ["EXTRAS", "information"]

# The distributions behind each extra of pyproject.toml that an installed scjax may lack.
EXTRAS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "logging": ("tensorboardX",),
    "chem": ("rdkit",),
    "eval": ("cell-eval", "igraph", "pyarrow"),
}

_LIBRARIES = ("anndata", "h5py", "zarr", "pandas", "scipy", "scikit-learn", "POT", "matplotlib", "tyro", "jaxtyping")
_SETTINGS = (
    "jax_platforms",
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_numpy_rank_promotion",
    "jax_debug_nans",
    "jax_disable_jit",
)
_VARIABLES = re.compile(r"(JAX|XLA|TF_GPU|NCCL|CUDA_VISIBLE|OMP_NUM|OPENBLAS_NUM|MKL_NUM)\w*")
_ADDRESS = re.compile(
    r"(\w+:)?[^\s=,;:\"']*[/\\][^\s,;:\"']*|\b[\w.-]+:\d+\b|\b\d+(\.\d+){3}\b"
)  # of a file or a machine


def information() -> str:
    """A block of plain text, ready to be pasted: no names of users, machines or files are in it.

    The "source" is the digest that checkpoints carry too: it tells an edited copy from a release. Devices are started
    if they were not; why they cannot be is told in their place.
    """
    known = versions()
    rows = {
        "scjax": f"{known.pop('scjax')}, source {source_digest()}",
        "python": f"{known.pop('python')} ({platform.python_implementation()})",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}, {_n_cores()} CPU cores",
        "devices": _devices(),
        "libraries": _named(known | _versions(_LIBRARIES)),
        **{f"extra {name}": _named(_versions(parts)) for name, parts in EXTRAS.items()},
        "jax settings": ", ".join(f"{name.removeprefix('jax_')}={getattr(jax.config, name)}" for name in _SETTINGS),
        "compile cache": "on" if jax.config.jax_compilation_cache_dir else "off",
        "environment": _flags(os.environ),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {told}" for name, told in rows.items()) + "\n"


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = versions_of(names)
    return {name: found.get(name, "missing") for name in names}


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _devices() -> str:
    try:
        devices = jax.devices()
    except RuntimeError as err:  # a driver that does not fit is just what a report is about
        return _without_addresses(f"none: {' '.join(str(err).split())}")
    kinds = [f"{d.platform} {d.device_kind}" for d in devices]
    several = f" of {n} processes" if (n := jax.process_count()) > 1 else ""
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) + several


def _n_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flags(environment: Mapping[str, str]) -> str:
    """Variables that change what is compiled and where it runs, without the places that they name."""
    kept = {name: value for name, value in sorted(environment.items()) if _VARIABLES.fullmatch(name)}
    return "; ".join(f"{name}={_without_addresses(value)}" for name, value in kept.items()) or "nothing set"


def _without_addresses(text: str) -> str:
    return _ADDRESS.sub("...", text)
