"""From a file to what a network computes: recorded weights, converted, saved and opened, give the recorded outputs."""

import json
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import absence, cases, load, require, told_absent, under

from scjax import convert
from scjax.models import perturbdiff, scdfm, scimf
from scjax.models.perturbdiff import Config
from scjax.processes.diffusion import guide

KNOWN = {  # of recordings whose settings are not the published ones
    "mod_d12_constparam": {"diffusion": "learned"},
    "velocity_drug": {"perturbation": "table"},
}
HOLDING = {  # recordings that hold the weights of a whole network
    "scimf": ("mod_", "traj_", "grad_", "attn_types_"),
    "scdfm": ("velocity_", "rk4_sample", "train_step_", "inverse_search"),
    "perturbdiff": ("sampling_", "trainloss_", "trainsteps_"),
}


def weights_of(system, case):
    arrays = load(system, case)
    state = under(arrays, "w/") or under(arrays, "w0/")
    known = dict(KNOWN.get(case, {}))
    if system == "scimf" and str(arrays.get("cfg/sigma_type", "const")) == "const_param":
        known["diffusion"] = "learned"
    return arrays, state, known


def all_cases():
    found = {system: cases(system, kinds) for system, kinds in HOLDING.items()}
    why = next(filter(None, map(absence, HOLDING)), "the recordings hold no whole network")
    all_of_them = [(s, case) for s, of_system in found.items() for k in HOLDING[s] for case in of_system[k]]
    return all_of_them or [told_absent(why, 2)]


@pytest.mark.parametrize(("system", "case"), all_cases())
def test_every_recorded_state_dict_comes_back(system, case):
    """Bit for bit, and the reference would load it strictly: no name is missing, none too many."""
    _, state, known = weights_of(system, case)
    weights = convert.from_torch(state, **known)
    assert weights.system == system
    back = convert.to_torch(weights)
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype, name
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def through_files(tmp_path, state, suffix, **known):
    """A file, converted, saved as a checkpoint, opened again."""
    path = tmp_path / f"weights{suffix}"
    convert.write_torch(path, state)
    read = convert.read_torch(path)
    digest = convert.digest(path)
    convert.save(tmp_path / "converted", convert.from_torch(read, **known), source=path.name, sha256=digest)
    loaded = convert.load(tmp_path / "converted")
    assert loaded.about["converted"]["sha256"] == digest
    assert loaded.about["converted"]["source"] == path.name
    return loaded.weights


@pytest.fixture(params=[".npz", ".pt"])
def suffix(request):
    if request.param == ".pt":
        pytest.importorskip("torch", reason="writes and reads .pt files; of the extra 'torch'")
    return request.param


def test_scimf_computes_the_recorded_drift(tmp_path, suffix):
    require("scimf")
    golden, state, known = weights_of("scimf", "mod_d10_h2_L2")
    weights = through_files(tmp_path, state, suffix, **known)
    drift = jax.jit(partial(scimf.drift, config=weights.config))(weights.params, jnp.asarray(golden["in/x"]))
    largest = 1 + np.abs(golden["out/drift"]).max()
    np.testing.assert_allclose(drift, golden["out/drift"], rtol=0, atol=5e-6 * largest)
    assert weights.assumed == {"n_heads": 2, "dt": 0.1}


def test_scdfm_computes_the_recorded_velocity(tmp_path, suffix):
    require("scdfm")
    golden, state, known = weights_of("scdfm", "velocity_diff_perceiver")
    weights = through_files(tmp_path, state, suffix, **known)
    assert weights.config.n_heads == json.loads(str(golden["meta_json"]))["num_heads"]
    rows = [np.flatnonzero(~row) for row in golden["in/mask"]]
    widest = max(map(len, rows))
    graph = np.stack([np.pad(row, (0, widest - len(row)), constant_values=-1) for row in rows])
    velocity = jax.jit(partial(scdfm.velocity, config=weights.config))
    v = velocity(
        weights.params,
        jnp.asarray(golden["in/x_t"]),
        jnp.asarray(golden["in/t"]),
        jnp.asarray(golden["in/source"]),
        jnp.asarray(golden["in/pert_ids"], jnp.int32),
        jnp.asarray(golden["in/gene_ids"][0], jnp.int32),
        constants=scdfm.Constants(jnp.asarray(graph, jnp.int32)),
    )
    np.testing.assert_allclose(v, golden["out/velocity"], atol=3e-6, rtol=1e-5)


def test_perturbdiff_computes_the_recorded_prediction(tmp_path, suffix):
    require("perturbdiff")
    golden, state, _ = weights_of("perturbdiff", "sampling_h32")
    weights = through_files(tmp_path, state, suffix, divisor=1.0)
    ids = {"perturbation": golden["cov_pert"] + 1, "cell_type": golden["cov_celltype"], "batch": golden["cov_batch"]}
    ids = {role: jnp.asarray(values[:, 0], jnp.int32) for role, values in ids.items()}
    index = 2
    t = jnp.full(len(golden["x"]), int(golden["step_t"][index]), jnp.int32)
    x, control, previous = (jnp.asarray(golden[n], jnp.float32) for n in ("x", "cont_emb", "prev_pred"))

    @jax.jit
    def predict(covariates):
        return perturbdiff.denoise(
            weights.params, x, t, control, covariates, previous, constants=weights.constants, config=weights.config
        )

    conditional, without = predict(ids), predict(None)
    for got, name in ((conditional, "raw_cond_out"), (without, "raw_uncond_out")):
        largest = np.abs(golden[name]).max()
        np.testing.assert_allclose(got, golden[name], rtol=0, atol=3e-5 * largest, err_msg=name)
    assert guide(conditional, without, 2.0).shape == x.shape


# -- without recordings

TINY = Config(
    n_genes=5, n_perturbations=4, n_cell_types=3, n_batches=2, d_model=6, n_layers=2, n_heads=3, mlp_ratio=2.0,
    d_covariate=3,
)  # fmt: skip
VECTORS = replace(
    TINY, perturbation="vector", n_perturbations=None, n_perturbation_features=4, cell_type="vector",
    n_cell_types=None, n_cell_type_features=7, n_spaces=2,
)  # fmt: skip
MODELS = {
    "scimf": (scimf, scimf.Config(n_dims=4, intrinsic_widths=(5,))),
    "scdfm": (scdfm, scdfm.Config(n_tokens=9, d_model=8, n_layers=1, n_heads=2, graph_heads=2)),
    "perturbdiff": (perturbdiff, TINY),
    "vectors": (perturbdiff, VECTORS),
}


def weights_like(name, seed=0):
    """Random weights of a small model, with whatever else belongs to them."""
    model, config = MODELS[name]
    rng = np.random.default_rng(seed)
    tree = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)
    constants, spaces = None, ()
    if model is perturbdiff:
        constants = perturbdiff.Constants()
    if name == "vectors":
        tables = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((11, 4), (3, 7)))
        constants, spaces = perturbdiff.Constants(*tables), ("tahoe100m", "pbmc")
    system = "perturbdiff" if name == "vectors" else name
    return convert.Weights(system, config, params, constants, spaces, None, {})


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_ours_there_and_back(name):
    """As of a training run: with nothing of an original at hand."""
    weights = weights_like(name)
    known = {"graph_heads": 2} if name == "scdfm" else {}
    back = convert.from_torch(convert.to_torch(weights), **known)
    if name == "scimf":  # whose constant goes through a float32
        assert back.config.sigma == np.float32(weights.config.sigma)
        back = back._replace(config=replace(back.config, sigma=weights.config.sigma))
    assert (back.system, back.config, back.spaces) == (weights.system, weights.config, weights.spaces)
    jax.tree.map(np.testing.assert_array_equal, back.params, weights.params)
    jax.tree.map(np.testing.assert_array_equal, back.constants, weights.constants)
    assert all(not value.any() for value in back.originals.values() if name != "scimf")


@pytest.mark.parametrize("name", MODELS)
def test_all_misfits_at_once(name):
    state = convert.to_torch(weights_like(name))
    known = {"graph_heads": 2} if name == "scdfm" else {}
    some = [n for n, value in state.items() if value.ndim == 1 and re.search(r"norm|t_embedder", n)]
    some = [n for n in some if not n.endswith("q_norm.weight")]  # which tells the heads
    del state[some[0]]
    state[some[1]] = np.zeros((2, 2, 2), np.float32)
    state["more"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as caught:
        convert.from_torch(state, **known)
    told = str(caught.value)
    assert f"{some[0]} is missing" in told
    assert f"{some[1]} has the shape (2, 2, 2)" in told
    assert "more (3,) has no place" in told


def test_double_precision_is_rounded_and_half_is_exact():
    state = convert.to_torch(weights_like("scimf"))
    wide = {
        name: value.astype(np.float64) + (1e-12 if name != "diffusion.sigma" else 0) for name, value in state.items()
    }
    wide["diffusion.sigma"] = np.full((1, 4), 0.1)
    found = convert.from_torch(wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype("float32")}


def test_settings_that_tensors_do_not_tell():
    state = convert.to_torch(weights_like("scdfm"))
    found = convert.from_torch(state, graph_heads=4)
    assert found.assumed == {"perturbation": "gene", "start": "gaussian"}
    assert found.config.graph_heads == 4
    state = convert.to_torch(weights_like("perturbdiff"))
    assert convert.from_torch(state).assumed == {
        "class_silu": False, "schedule": "linear", "n_times": 1000, "divisor": 10.0, "condition_dropout": 0.5,
    }  # fmt: skip
    marginal = convert.from_torch(state, perturbation="none")
    assert marginal.params["covariates"]["perturbation"]["embedding"].shape == (1, 3)
    assert set(convert.to_torch(marginal)) == set(state)
    for name, value in convert.to_torch(marginal).items():
        np.testing.assert_array_equal(value, state[name])
    with pytest.raises(ValueError, match="n_head is not a field of Config. Did you mean 'n_heads'"):
        convert.from_torch(state, n_head=4)


def test_whose_weights_these_are():
    for name in MODELS:
        weights = weights_like(name)
        assert convert.system_of(convert.to_torch(weights)) == weights.system
    with pytest.raises(ValueError, match=r"of no system that is known here .scIMF has drift_intra.*It has: layer"):
        convert.from_torch({"layer": np.zeros(3)})
    both = {name: value for key in ("scimf", "scdfm") for name, value in convert.to_torch(weights_like(key)).items()}
    with pytest.raises(ValueError, match="marks of several systems"):
        convert.from_torch(both)
    with pytest.raises(ValueError, match="system must be one of"):
        convert.from_torch({}, "scgpt")
    with pytest.raises(ValueError, match="not one of scIMF"):
        convert.from_torch(convert.to_torch(weights_like("scdfm")), "scimf")
