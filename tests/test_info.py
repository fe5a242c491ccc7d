"""The block for bug reports: whole, true, and free of what is the user's own."""

import getpass
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from scjax import __version__, info

ROOT = Path(__file__).parents[1]


def rows(text: str) -> dict[str, str]:
    return {name.strip(): told.strip() for name, told in (line.split("  ", 1) for line in text.splitlines())}


def test_tells_versions_devices_and_extras():
    told = rows(info.information())
    assert told["scjax"].startswith(f"{__version__}, source ")
    assert told["python"].startswith(platform.python_version())
    assert f"jax {jax.__version__}" in told["libraries"]
    assert f"anndata {importlib.metadata.version('anndata')}" in told["libraries"]
    assert told["devices"] == f"{len(jax.devices())} x {jax.devices()[0].platform} {jax.devices()[0].device_kind}"
    assert "numpy_rank_promotion=raise" in told["jax settings"]  # as conftest.py sets it
    for name in info.EXTRAS:
        assert f"extra {name}" in told


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(info.EXTRAS, "eval", ("no-such-distribution", "numpy"))
    assert rows(info.information())["extra eval"] == (
        f"no-such-distribution missing, numpy {importlib.metadata.version('numpy')}"
    )


def test_extras_are_those_of_the_package():
    """Each extra that adds libraries to an installed scjax, with all that it names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra: tuple(one.split(">=")[0] for one in wanted) for extra, wanted in extras.items()}
    of_developers, of_jax = {"test", "dev"}, {"cuda12", "cuda13", "tpu"}
    assert {extra: parts for extra, parts in named.items() if extra not in of_developers | of_jax} == info.EXTRAS


def test_a_device_that_does_not_start_is_told(monkeypatch):
    def fails():
        raise RuntimeError("Unable to load\n /opt/someone/libcuda.so: no driver")

    monkeypatch.setattr(jax, "devices", fails)
    assert rows(info.information())["devices"] == "none: Unable to load ...: no driver"


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "nothing set"),
        ({"HOME": "/home/ada", "SECRET_TOKEN": "x", "MYJAX_KEY": "x", "JAXX": ""}, "JAXX="),
        ({"JAX_ENABLE_X64": "1", "XLA_FLAGS": "--a=2 --b=true"}, "JAX_ENABLE_X64=1; XLA_FLAGS=--a=2 --b=true"),
        ({"XLA_FLAGS": "--xla_dump_to=/home/ada/x --c=1"}, "XLA_FLAGS=--xla_dump_to=... --c=1"),
        ({"XLA_FLAGS": "--xla_dump_to=ada/x"}, "XLA_FLAGS=--xla_dump_to=..."),
        ({"JAX_COMPILATION_CACHE_DIR": "/home/ada/.cache"}, "JAX_COMPILATION_CACHE_DIR=..."),
        ({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/ada"}, "JAX_COMPILATION_CACHE_DIR=..."),
        ({"JAX_COORDINATOR_ADDRESS": "node7.lab.org:1234"}, "JAX_COORDINATOR_ADDRESS=..."),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.7"}, "JAX_COORDINATOR_ADDRESS=..."),
    ],
)
def test_flags_without_places(variables, told):
    assert info._flags(variables) == told


def test_the_command_tells_nothing_private():
    """In a process of its own, with private things in its environment."""
    secret = {"GITHUB_TOKEN": "sesame", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    environment = {**os.environ, **secret, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "scjax", "info"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    first, *block, last = done.stdout.splitlines()
    assert (first, last) == ("```", "```")
    assert rows("\n".join(block))["compile cache"] == "on"
    for private in ("sesame", str(Path.home()) + "/", str(ROOT), socket.gethostname(), f"/{getpass.getuser()}/"):
        assert private not in done.stdout
