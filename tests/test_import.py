"""Importing is free: nothing heavy is loaded, no setting of JAX moves, nothing is printed. Each in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "matplotlib", "scanpy", "anndata", "pandas", "sklearn", "orbax", "ott", "tyro", "ot", "tqdm")
EXTRAS = ("torch", "tensorboardX", "rdkit", "cell_eval", "igraph", "pyarrow", "scanpy")


def fresh(code: str) -> dict:
    """What `code` leaves in `answer`; fails where the process prints or warns."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    program = f"import json, sys\n{code}\nprint('answer', json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("answer "), "importing printed something"
    return json.loads(done.stdout.removeprefix("answer "))


def loaded_by(statement: str) -> set[str]:
    return set(fresh(f"{statement}\nanswer = sorted({{m.split('.')[0] for m in sys.modules}})"))


def test_import_scjax_loads_nothing_heavy():
    loaded = loaded_by("import scjax")
    assert not loaded & {*HEAVY, *EXTRAS, "jax", "flax", "diffrax", "optax", "numpy"}


def test_importing_a_model_loads_what_models_need():
    loaded = loaded_by("import scjax.models.scimf")
    assert "jax" in loaded
    assert not loaded & {"torch", "matplotlib", "scanpy", "anndata", "pandas", "sklearn", "orbax", "ot", "optax"}


def test_importing_every_module_changes_no_setting_of_jax():
    """All of jax.config's values, before and after; what no function has asked for is not loaded either."""
    answer = fresh(
        """
import importlib, pkgutil, jax
before = {k: repr(v) for k, v in jax.config.values.items()}
import scjax
names = [m.name for m in pkgutil.walk_packages(scjax.__path__, "scjax.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
after = {k: repr(v) for k, v in jax.config.values.items()}
answer = {"changed": sorted(k for k in after if before.get(k) != after[k]), "names": names,
          "loaded": sorted({m.split('.')[0] for m in sys.modules})}
"""
    )
    assert answer["changed"] == []
    assert {"scjax.models.scimf", "scjax.cli", "scjax.plot.palette", "scjax.convert.scimf"} <= set(answer["names"])
    assert not set(answer["loaded"]) & {"matplotlib", *EXTRAS}
