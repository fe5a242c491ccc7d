"""PyTorch models with the names of the published programs: files that they write, and weights of ours that they load.

The models are the peers of the benchmarks, which hold the reference's names and are compared with its recordings.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax import convert
from scjax.cli import main
from scjax.models import perturbdiff, scdfm, scimf

torch = pytest.importorskip("torch", reason="writes and reads .pt files; of the extra 'torch'")

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
N_TOKENS, N_GENES, N_CELLS = 11, 5, 4
SCDFM = scdfm.Config(n_tokens=N_TOKENS, d_model=16, n_heads=2, n_layers=2)
SCIMF = scimf.Config(n_dims=6, n_heads=2, n_blocks=2, intrinsic_widths=(5, 3))
PERTURBDIFF = perturbdiff.Config(
    n_genes=N_GENES, n_perturbations=4, n_cell_types=3, n_batches=2, d_covariate=4, d_model=8, n_layers=2, n_heads=2
)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def peer(system):
    spec = importlib.util.spec_from_file_location(f"torch_{system}", PEERS / f"torch_{system}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.usefixtures("one_thread")


RNG = np.random.default_rng(0)
GRAPH = np.eye(9, dtype=bool) | (RNG.random((9, 9)) < 0.3)
X, OTHER = (RNG.random((N_CELLS, 6), np.float32) for _ in range(2))
T = np.linspace(0.1, 0.9, N_CELLS).astype(np.float32)
# One perturbation for all cells: of several the reference takes the neighbours of the first (graph_rows="first").
GENES, PERTURBED = np.array([4, 7, 5, 8, 6, 4]), np.tile([5, 7], (N_CELLS, 1))
SETS = RNG.random((3, 2, N_CELLS, N_GENES), np.float32)  # cells, their first guess, controls
IDS = {"perturbation": np.array([1, 3]), "cell_type": np.array([0, 2]), "batch": np.array([1, 0])}


def torch_model(system):
    """The model, and what it computes of the inputs above."""
    module, t = peer(system), torch.from_numpy
    if system == "scimf":
        model = module.ScIMF(6, n_heads=2, n_layers=2, intra=(5, 3))
        return model, lambda: model.drift(t(X))
    if system == "scdfm":
        model = module.ScDFM(t(~GRAPH), n_tokens=N_TOKENS, d_model=16, n_heads=2, n_layers=2)
        genes = t(np.broadcast_to(GENES, (N_CELLS, 6)).copy())
        return model, lambda: model(genes, t(X), t(T), t(OTHER), t(PERTURBED))
    sizes = {"n_perturbations": 3, "n_cell_types": 3, "n_batches": 2, "d_covariate": 4}
    model = module.PerturbDiff(N_GENES, **sizes, d_model=8, n_layers=2, n_heads=2)

    def compute():
        per_cell = {role: t(np.repeat(ids[:, None], N_CELLS, 1)) for role, ids in IDS.items()}
        per_cell["perturbation"] = per_cell["perturbation"] - 1  # whose table has a row more, in front
        return model(t(SETS[0]), t(SETS[1]), t(SETS[2]), torch.tensor([3, 700]), model.cov_encoder(*per_cell.values()))

    return model, compute


def ours(weights):
    """The same of our functions."""
    return jax.jit(lambda params, constants: _ours(weights._replace(params=params, constants=constants)))(
        weights.params, weights.constants
    )


def _ours(weights):
    params, config = weights.params, weights.config
    if weights.system == "scimf":
        return scimf.drift(params, jnp.asarray(X), config=config)
    if weights.system == "scdfm":
        widest = GRAPH.sum(1).max()
        rows = [np.pad(np.flatnonzero(row), (0, widest - row.sum()), constant_values=-1) for row in GRAPH]
        constants = scdfm.Constants(jnp.asarray(np.stack(rows), jnp.int32))
        inputs = (jnp.asarray(X), jnp.asarray(T), jnp.asarray(OTHER))
        ids = (jnp.asarray(PERTURBED, jnp.int32), jnp.asarray(GENES, jnp.int32))
        return scdfm.velocity(params, *inputs, *ids, constants=constants, config=config)
    cells, guess, controls = map(jnp.asarray, SETS)
    ids = {role: jnp.asarray(values, jnp.int32) for role, values in IDS.items()}
    t = jnp.array([3, 700], jnp.int32)
    return perturbdiff.denoise(params, cells, t, controls, ids, guess, constants=weights.constants, config=config)


CONFIGS = {"scimf": SCIMF, "scdfm": SCDFM, "perturbdiff": PERTURBDIFF}
each = pytest.mark.parametrize("system", CONFIGS)


@pytest.fixture
def random_model(system):
    """All weights random: some begin as zeros, and would hide what is misplaced."""
    model, compute = torch_model(system)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name != "diffusion.sigma":
                value.copy_(torch.randn_like(value) * (0.3 if value.ndim > 1 else 0.1) + ("norm" in name))
    return model.eval(), compute


WRAPPED = {
    "plain": lambda state: state,
    "of a trainer": lambda state: {"iteration": 5, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "of Lightning": lambda state: {
        "state_dict": state,
        "current_model_state": {name: torch.zeros_like(value) for name, value in state.items()},
        "averaging_state": {"n_averaged": torch.tensor(4)},
        "hyper_parameters": {"d_model": 8},
    },
    "of several devices, compiled": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
}


@each
def test_files_of_torch_models(system, random_model, tmp_path):
    """In every wrapping the same weights, and they compute the same."""
    model, compute = random_model
    found = []
    for how, wrap in WRAPPED.items():
        torch.save(wrap(model.state_dict()), tmp_path / f"{how}.ckpt")
        found.append(convert.from_torch(convert.read_torch(tmp_path / f"{how}.ckpt")))
    first, *others = found
    assert first.system == system
    known = {"sigma": first.config.sigma} if system == "scimf" else {}  # 0.1 in float32
    assert first.config == CONFIGS[system].__class__(**{**vars(CONFIGS[system]), **known})
    with torch.no_grad():
        np.testing.assert_allclose(ours(first), compute().numpy(), **CLOSE)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other.params, first.params)


@each
def test_torch_models_load_weights_of_ours(system, random_model, tmp_path):
    """Strictly: every name, every shape. What nothing depends on is zero there, and the output is that of ours."""
    model, compute = random_model
    module = {"scimf": scimf, "scdfm": scdfm, "perturbdiff": perturbdiff}[system]
    rng = np.random.default_rng(2)
    tree = jax.eval_shape(lambda key: module.init(key, CONFIGS[system]), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), tree)
    constants = perturbdiff.Constants() if system == "perturbdiff" else None
    weights = convert.Weights(system, CONFIGS[system], params, constants, (), None, {})
    convert.write_torch(tmp_path / "ours.pt", convert.to_torch(weights))
    model.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True), strict=True)
    with torch.no_grad():
        np.testing.assert_allclose(compute().numpy(), ours(weights), **CLOSE)


FULL = {
    "scdfm": (scdfm, scdfm.Config(n_tokens=6000), 219, 60_359_169),
    "perturbdiff": (
        perturbdiff,
        perturbdiff.Config(n_genes=2000, n_perturbations=91, n_cell_types=18, n_batches=12),
        None,
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("system", FULL)
def test_published_sizes_through_files(system, tmp_path):
    """A file of random weights, to a checkpoint, and back to a file: every number is where it was."""
    module, config, n_tensors, n_values = FULL[system]
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda key: module.init(key, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), tree)
    constants = perturbdiff.Constants() if system == "perturbdiff" else None
    state = convert.to_torch(convert.Weights(system, config, params, constants, (), None, {}))
    state = {n: v if v.any() else rng.random(v.shape, np.float32) for n, v in state.items()}  # what is left out, too
    if system == "scdfm":
        assert (len(state), sum(value.size for value in state.values())) == (n_tensors, n_values)
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    last = {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}
    torch.save({"state_dict": tensors, "current_model_state": last}, tmp_path / "run.ckpt")
    main(["convert", str(tmp_path / "run.ckpt"), "--out", str(tmp_path / "converted")])
    main(["convert", str(tmp_path / "converted"), "--to-torch", str(tmp_path / "back.pt")])
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
