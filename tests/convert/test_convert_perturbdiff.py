"""State dicts of the PyTorch reference: every tensor has its place, or a word on why it has none."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from scjax.convert.perturbdiff import (
    Reader,
    config_from_torch,
    constants_from_torch,
    left_out,
    left_over,
    params_from_torch,
    params_to_torch,
    spaces_from_torch,
)
from scjax.convert.state import Blank
from scjax.models import perturbdiff
from scjax.models.perturbdiff import Config

PLAIN = Config(
    n_genes=5,
    n_perturbations=4,
    n_cell_types=3,
    n_batches=2,
    d_model=6,
    n_layers=2,
    n_heads=3,
    mlp_ratio=2.0,
    d_covariate=3,
)
CONFIGS = {
    "plain": PLAIN,
    "spaces": replace(PLAIN, n_spaces=2, n_layers=1, covariate_width="model"),
    "vectors": replace(
        PLAIN,
        perturbation="vector",
        n_perturbations=None,
        n_perturbation_features=4,
        cell_type="vector",
        n_cell_types=None,
        n_cell_type_features=7,
        batch="none",
        n_batches=None,
        covariate_width=9,
    ),
    "doses": replace(
        PLAIN, perturbation="vector", n_perturbations=None, n_perturbation_features=4, n_doses=3, mlp_ratio=4.0
    ),
    "pretrained": replace(PLAIN, perturbation="none", n_perturbations=None),
}
SPACES = ("tahoe100m", "pbmc")
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def state_of(config, seed=0):
    """All tensors of a reference model of these sizes, as its code names and shapes them."""
    rng, d, g, dc = np.random.default_rng(seed), config.d_model, config.n_genes, config.d_covariate
    n_hidden, width = config.n_hidden, config.width_of_covariates
    state = {}

    def linear(name, n_in, n_out):
        state[f"{name}.weight"], state[f"{name}.bias"] = (n_out, n_in), (n_out,)

    for space in [f".{s}" for s in SPACES[: config.n_spaces]] if config.n_spaces > 1 else [""]:
        linear(f"model.x_embedder{space}", 2 * g, d)
        linear(f"model.x_control_embedder{space}", 2 * g, d)
    linear("model.t_embedder.mlp.0", 256, d)
    linear("model.t_embedder.mlp.2", d, d)
    linear("model.gene_embedding.gene_embedding", 5120, d)
    state |= {f"model.gene_embedding.{n}": (d,) for n in ("layer_norm.weight", "layer_norm.bias")}
    linear("model.class_embedding.emb", width, d)
    state |= {f"model.{n}_embedding.null_emb.weight": (1, d) for n in ("gene", "class")}
    for at in (f"model.blocks.{i}.block" for i in range(config.n_layers)):
        linear(f"{at}.attn.qkv", 2 * d, 6 * d)
        linear(f"{at}.attn.proj", 2 * d, 2 * d)
        state |= {f"{at}.attn.{n}_norm.weight": (2 * d // config.n_heads,) for n in "qk"}
        for stream in ("", "control_"):
            linear(f"{at}.{stream}adaLN_modulation.1", d, 6 * d)
            linear(f"{at}.{stream}mlp.fc1", d, n_hidden)
            linear(f"{at}.{stream}mlp.fc2", n_hidden, d)
    for at in ("model.final_layer", "model.control_final_layer"):
        linear(f"{at}.linear", d, g)
        linear(f"{at}.adaLN_modulation.1", d, 2 * d)
    drug = "drug" if config.n_doses else "pert"
    if config.perturbation == "vector":
        state[f"cov_encoder.{drug}_encoder.0.weight"] = (11, config.n_perturbation_features)
        linear(f"cov_encoder.{drug}_encoder.1", config.n_perturbation_features, dc)
    else:
        state["cov_encoder.pert_encoder.weight"] = (config.n_perturbations or 8, dc)
    if config.n_doses:
        state |= {"cov_encoder.dose_encoder.weight": (config.n_doses, dc), "cov_encoder.dose_indices": (11,)}
    if config.cell_type == "vector":
        state["cov_encoder.celltype_encoder.0.weight"] = (3, config.n_cell_type_features)
        linear("cov_encoder.celltype_encoder.1", config.n_cell_type_features, dc)
    else:
        state["cov_encoder.celltype_encoder.weight"] = (config.n_cell_types, dc)
    if config.batch == "table":
        state["cov_encoder.batch_encoder.weight"] = (config.n_batches, dc)
    linear("cov_encoder.transform", dc * len(perturbdiff.roles(config, places=True)), width)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in state.items()}


@each
def test_the_tree_is_that_of_init(config):
    state = state_of(config)
    params = params_from_torch(state, config)
    wanted = jax.eval_shape(lambda key: perturbdiff.init(key, config), jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), wanted)
    assert set(state) == set(state_of(config))  # the caller's dict is left alone


@each
def test_config_is_read_off_names_and_shapes(config):
    known = {"perturbation": "none"} if config.perturbation == "none" else {}
    assert config_from_torch(state_of(config), **known) == config


@each
def test_no_number_goes_lost_but_those_left_out(config):
    """With entries that are their own positions: each is found once, and what is not found is named."""
    state, start = {}, 0
    for name, value in state_of(config).items():
        state[name], start = start + np.arange(value.size).reshape(value.shape), start + value.size
    found = np.concatenate([a.ravel() for a in jax.tree.leaves(params_from_torch(state, config))])
    frozen = [np.asarray(a).ravel() for a in constants_from_torch(state, config) if a is not None]
    found = np.concatenate([found, *frozen])
    assert len(np.unique(found)) == len(found)
    lost = {name: np.setdiff1d(value, found) for name, value in state.items()}
    wholly = {name for name, entries in lost.items() if len(entries) == state[name].size}
    named = {name for name in state if any(re.fullmatch(pattern, name) for pattern in left_out(config))}
    assert wholly == named
    last, d, g = f"model.blocks.{config.n_layers - 1}.block", config.d_model, config.n_genes
    partly = {name: entries for name, entries in lost.items() if len(entries) and name not in wholly}
    expected = {f"{last}.attn.proj.{w}": slice(d, None) for w in ("weight", "bias")}
    expected |= {f"{last}.control_adaLN_modulation.1.{w}": slice(2 * d, None) for w in ("weight", "bias")}
    for name in state:
        if re.fullmatch(r"model\.x_control_embedder.*weight", name):
            expected[name] = (slice(None), slice(g, None))
    if config.perturbation == "none":
        expected["cov_encoder.pert_encoder.weight"] = slice(1, None)
    assert set(partly) == set(expected)
    for name, entries in partly.items():
        np.testing.assert_array_equal(entries, np.sort(state[name][expected[name]].ravel()), err_msg=name)


def back_of(params, config, state, **options):
    constants = constants_from_torch(state, config)
    return params_to_torch(params, config, constants=constants, spaces=spaces_from_torch(state), **options)


@each
def test_the_way_back(config):
    """Bit for bit where the original is at hand; else what is left out is zero, and the rest is as it was."""
    state = state_of(config)
    params = params_from_torch(state, config)
    whole = back_of(params, config, state, originals=left_over(state, config))
    assert {name: (v.shape, v.dtype) for name, v in whole.items()} == {n: (v.shape, v.dtype) for n, v in state.items()}
    for name, value in state.items():
        np.testing.assert_array_equal(whole[name], value, err_msg=name)
    if config.n_doses:
        with pytest.raises(ValueError, match="cov_encoder.dose_indices is no parameter of ours.*hand in originals"):
            back_of(params, config, state)
        return
    blank = back_of(params, config, state)
    assert set(blank) == set(state)
    for name, value in blank.items():
        entries = state[name][: len(value)]  # of a table of which one row is used, that row
        assert value.shape == entries.shape
        np.testing.assert_array_equal(value[value != 0], entries[value != 0], err_msg=name)
        is_dead = any(re.fullmatch(pattern, name) for pattern in left_out(config))
        assert bool((value == 0).all()) == is_dead, name
    jax.tree.map(np.testing.assert_array_equal, params_from_torch(blank, config), params)


def test_the_way_back_refuses():
    config, state = CONFIGS["vectors"], state_of(CONFIGS["vectors"])
    params = params_from_torch(state, config)
    with pytest.raises(ValueError, match="constants must have cell_type_vectors and perturbation_vectors"):
        params_to_torch(params, config)
    spaces, several = CONFIGS["spaces"], state_of(CONFIGS["spaces"])
    with pytest.raises(ValueError, match=r"spaces must name the 2 data sets .* got \(\)"):
        params_to_torch(params_from_torch(several, spaces), spaces)
    with pytest.raises(ValueError, match="block='sequential' is not what the reference would compute"):
        params_to_torch(params, replace(config, block="sequential"))
    wrong = {"model.control_final_layer.linear.bias": np.zeros(99, np.float32)}
    with pytest.raises(ValueError, match=r"originals: .*linear.bias has the shape \(99,\); wanted \(5,\)"):
        back_of(params, config, state, originals=wrong)


PUBLISHED = {  # sizes and published counts, in millions; the covariates' encoder comes on top
    "2000 genes": (Config(n_genes=2000, n_perturbations=91, n_cell_types=18, n_batches=12), 103.6),
    "12,626 genes": (Config(n_genes=12626, n_perturbations=91, n_cell_types=18, n_batches=12), 141.7),
    "four projections": (Config(n_genes=12626, n_perturbations=91, n_cell_types=18, n_batches=12, n_spaces=4), 219.3),
}
FAMILIES = ("tahoe100m", "pbmc", "replogle", "cellxgene")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes(name):
    """Numbers that all are zero take no memory until somebody writes into them."""
    config, millions = PUBLISHED[name]
    tree = jax.eval_shape(lambda key: perturbdiff.init(key, config), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), tree)
    blank = perturbdiff_blank(config)
    count = sum(tensor.size for name, tensor in blank.items() if name.startswith("model."))
    assert round(count / 1e6, 1) == millions
    state = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in blank.items()}
    assert config_from_torch(state) == config
    if config.n_spaces == 1:  # else parameters are stacks of what the tensors hold, which takes memory
        params = params_from_torch(state, config)
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, zeros)


def perturbdiff_blank(config):
    blank = Blank(as_marks=True)
    spaces = FAMILIES if config.n_spaces > 1 else ()
    Reader(blank, config).network(spaces)
    return blank


@pytest.mark.slow
def test_published_numbers_come_back():
    config, _ = PUBLISHED["2000 genes"]
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda key: perturbdiff.init(key, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), tree)
    back = params_from_torch(params_to_torch(params, config), config)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(params)))


def test_where_tensors_go():
    """A few by hand; what they compute together is held by the recordings of the reference."""
    state = state_of(CONFIGS["spaces"])
    params = params_from_torch(state, CONFIGS["spaces"])
    assert spaces_from_torch(state) == SPACES
    g, d = PLAIN.n_genes, PLAIN.d_model
    pbmc = state["model.x_embedder.pbmc.weight"]
    np.testing.assert_array_equal(params["inputs"]["state"][1], pbmc[:, :g].T)
    np.testing.assert_array_equal(params["inputs"]["previous"][1], pbmc[:, g:].T)
    control = state["model.x_control_embedder.tahoe100m.weight"]
    np.testing.assert_array_equal(params["inputs"]["control"][0], control[:, :g].T)
    proj = state["model.blocks.0.block.attn.proj.weight"]
    np.testing.assert_array_equal(params["layer_0"]["attention"]["output"]["kernel"], proj[:d].T)
    np.testing.assert_array_equal(
        params["covariates"]["perturbation"]["embedding"], state["cov_encoder.pert_encoder.weight"]
    )
    vectors = state_of(CONFIGS["doses"])
    frozen = constants_from_torch(vectors, CONFIGS["doses"])
    np.testing.assert_array_equal(frozen.perturbation_vectors, vectors["cov_encoder.drug_encoder.0.weight"])
    assert frozen.cell_type_vectors is None


def test_dtype_is_kept():
    state = {name: value.astype(np.float64) for name, value in state_of(PLAIN).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(params_from_torch(state, PLAIN))} == {np.dtype("float64")}


def test_every_misfit_is_listed_at_once():
    state = state_of(PLAIN)
    del state["model.final_layer.linear.bias"]
    state["model.t_embedder.mlp.0.weight"] = state["model.t_embedder.mlp.0.weight"].T
    state["model.blocks.2.block.attn.qkv.bias"] = np.zeros(36, np.float32)
    state["optimizer"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="does not fit the config") as caught:
        params_from_torch(state, PLAIN)
    lines = (
        "model.final_layer.linear.bias is missing; wanted the shape (5,)",
        "model.t_embedder.mlp.0.weight has the shape (256, 6); wanted (6, 256)",
        "model.blocks.2.block.attn.qkv.bias (36,) has no place in this config",
        "optimizer (3,) has no place in this config",
    )
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == set(lines)


def test_a_frozen_table_of_other_features_does_not_fit():
    config = replace(CONFIGS["vectors"], n_perturbation_features=5)
    with pytest.raises(ValueError, match=r"pert_encoder\.0\.weight has the shape \(11, 4\); wanted \(None, 5\)"):
        constants_from_torch(state_of(CONFIGS["vectors"]), config)


def test_spaces_that_the_state_does_not_have():
    with pytest.raises(ValueError, match="there for 1 data sets; the config has n_spaces=2"):
        params_from_torch(state_of(PLAIN), replace(PLAIN, n_spaces=2))


def test_attention_over_tokens_is_refused():
    with pytest.raises(ValueError, match="attention='tokens' has matrices that the reference lacks"):
        params_from_torch({}, replace(PLAIN, attention="tokens"))


@pytest.mark.parametrize("state", [{}, {"layer.weight": np.zeros((2, 2))}])
def test_other_state_dicts_are_refused(state):
    with pytest.raises(ValueError, match=r"not one of PerturbDiff: it lacks model\.final_layer\.linear\.weight"):
        config_from_torch(state)
