"""Settings of the whole suite: how programs are compiled and kept, strict shapes, where the recorded numbers lie."""

import gc
import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of several workers each has a cache of its own: JAX does not write an entry at one stroke.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "alone"))
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


_QUICKLY = "JAX_DISABLE_MOST_OPTIMIZATIONS"
_AS_ASKED = os.environ.get(_QUICKLY)  # "0" compiles everything as users do
# What compares numbers with others' is compiled as it is for users; so is what runs longer than it compiles.
# The tests of training compare bits of programs that are compiled apart.
_OPTIMISED = ("tests/parity", "tests/metrics", "tests/processes", "tests/train", "notebooks/01", "notebooks/04")


class _Optimisation:
    """Registered, as the hooks of a conftest.py do not hear of the notebooks beside it."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        """Most tests compile tiny programs for longer than they run them: LLVM's optimisations would double that.

        XLA's own passes are the same. Programs that a test starts inherit its setting. Of a file all tests have one.
        """
        place = item.path.relative_to(ROOT).as_posix()
        optimised = place.startswith(_OPTIMISED) or item.get_closest_marker("optimised") is not None
        setting = _AS_ASKED or str(int(not optimised))
        if setting != os.environ.get(_QUICKLY):
            jax.clear_caches()  # of functions that other files have compiled the other way
            os.environ[_QUICKLY] = setting
            jax.config.update("jax_disable_most_optimizations", setting != "0")


def pytest_configure(config):
    config.pluginmanager.register(_Optimisation())


_MAPPINGS_OF_FILES, _MAPPINGS_OF_TESTS = 5_000, 40_000  # of memory; Linux allows a process 65,530


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs are let go when there are many: each keeps mappings of memory; at the limit XLA crashes."""
    mappings = Path("/proc/self/maps")
    if nextitem is not None and mappings.exists():
        limit = _MAPPINGS_OF_TESTS if nextitem.path == item.path else _MAPPINGS_OF_FILES
        if mappings.read_bytes().count(b"\n") > limit:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch's: small work on several threads of a busy machine waits at their barriers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets beside the checkout; they are not part of the repository."""
    folder = Path(os.environ.get("SCJAX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at hand: no folder {folder} (set SCJAX_DATA)")
    return folder
