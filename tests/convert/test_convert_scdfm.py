"""State dicts of the reference and parameters of scDFM say the same; what does not fit is told in full."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from scjax.convert.scdfm import config_from_torch, left_over, params_from_torch, params_to_torch
from scjax.models import scdfm

TINY = scdfm.Config(n_tokens=9, d_model=8, n_layers=2, n_heads=2, graph_heads=2)
CONFIGS = {
    "differential perceiver": TINY,
    "differential transformer": replace(TINY, fusion="differential_transformer", n_layers=3),
    "perceiver": replace(TINY, fusion="perceiver", condition_dropout=0.1),
    "table": replace(TINY, perturbation="table", n_perturbations=4),
    "inverse": replace(TINY, objective="perturbation"),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# Parameters (by a path without the last part) and the reference's modules, as its code names them.
MODULES = {
    r"time/mlp/Dense_0": "t_embedder.mlp.0",
    r"time/mlp/Dense_1": "t_embedder.mlp.2",
    r"tokens": "encoder.embedding",
    r"tokens/norm": "encoder.enc_norm",
    r"tokens/layer/norm_attention": "encoder.perturbation_interaction.norm1",
    r"tokens/layer/norm_feedforward": "encoder.perturbation_interaction.norm2",
    r"tokens/layer/hidden": "encoder.perturbation_interaction.linear1",
    r"tokens/layer/output": "encoder.perturbation_interaction.linear2",
    r"tokens/layer/attention/(\w+)": r"encoder.perturbation_interaction.cross_attn.\1",
    r"perturbations": "perturbation_embedder.embedding",
    r"perturbations/norm": "perturbation_embedder.enc_norm",
    r"value_state/mlp/Dense_0": "value_encoder_1.linear1",
    r"value_state/mlp/Dense_1": "value_encoder_1.linear2",
    r"value_state/LayerNorm_0": "value_encoder_1.norm",
    r"value_control/mlp/Dense_0": "value_encoder_2.linear1",
    r"value_control/mlp/Dense_1": "value_encoder_2.linear2",
    r"value_control/LayerNorm_0": "value_encoder_2.norm",
    r"fusion/joined": "fusion_layer.0",
    r"fusion/output": "fusion_layer.2",
    r"fusion/norm": "fusion_layer.3",
    r"velocity_head/joined": "final_layer.fc.0",
    r"velocity_head/hidden": "final_layer.fc.2",
    r"velocity_head/output": "final_layer.fc.4",
    r"perturbation_head/LayerNorm_0": "p_head.0",
    r"perturbation_head/Dense_0": "p_head.1",
    r"layer_(\d)/gene_modulation": r"gene_adaLN.\1.adaLN_modulation.1",
    r"layer_(\d)/gene_norm": r"gene_adaLN.\1.norm",
    r"layer_(\d)/adapter": r"adapter_layer.\1.0",
    r"layer_(\d)/adapter_output": r"adapter_layer.\1.3",
    r"layer_(\d)/(\w+)/modulation": r"blocks.\1.\2.adaLN_modulation.1",
    r"layer_(\d)/(first|second)/feedforward/Dense_0": r"blocks.\1.\2.mlp.fc1",
    r"layer_(\d)/(first|second)/feedforward/Dense_1": r"blocks.\1.\2.mlp.fc2",
    r"layer_(\d)/(first|second)/attention": r"blocks.\1.\2.attn",
    r"layer_(\d)/(first|second)/attention/query_(\d)": r"blocks.\1.\2.attn.q_proj_\3",
    r"layer_(\d)/(first|second)/attention/key_(\d)": r"blocks.\1.\2.attn.k_proj_\3",
    r"layer_(\d)/(first|second)/attention/value": r"blocks.\1.\2.attn.v_proj",
    r"layer_(\d)/(first|second)/attention/output": r"blocks.\1.\2.attn.out_proj",
    r"layer_(\d)/perceiver/feedforward/Dense_0": r"blocks.\1.perceiver.mlp.0",
    r"layer_(\d)/perceiver/feedforward/Dense_1": r"blocks.\1.perceiver.mlp.2",
    r"layer_(\d)/perceiver/norm_cross": r"blocks.\1.perceiver.ln_z1",
    r"layer_(\d)/perceiver/norm_self": r"blocks.\1.perceiver.ln_z2",
    r"layer_(\d)/perceiver/norm_feedforward": r"blocks.\1.perceiver.ln_z3",
    r"layer_(\d)/perceiver/(q)uery": r"blocks.\1.perceiver.\2",
    r"layer_(\d)/perceiver/(k)ey": r"blocks.\1.perceiver.\2",
    r"layer_(\d)/perceiver/(v)alue": r"blocks.\1.perceiver.\2",
    r"layer_(\d)/perceiver/(q)uery_self": r"blocks.\1.perceiver.\g<2>2",
    r"layer_(\d)/perceiver/(k)ey_self": r"blocks.\1.perceiver.\g<2>2",
    r"layer_(\d)/perceiver/(v)alue_self": r"blocks.\1.perceiver.\g<2>2",
    r"layer_(\d)/perceiver/cross_attention/(\w+)": r"blocks.\1.perceiver.cross.\2",
    r"layer_(\d)/perceiver/self_attention/(\w+)": r"blocks.\1.perceiver.self_attn.\2",
}
LEAVES = {
    "kernel": ".weight",
    "scale": ".weight",
    "embedding": ".weight",
    "bias": ".bias",
    "head_scale": ".subln.weight",
}
BLOCKS = {
    "differential_perceiver": {".first": ".diff_self_attn", ".second": ".diff_cross_attn"},
    "differential_transformer": {".second": ""},
    "perceiver": {".perceiver": ""},
}


def params_of(config, seed=0):
    """Random parameters of the tree that `init` gives."""
    rng = np.random.default_rng(seed)
    tree = jax.eval_shape(lambda key: scdfm.init(key, config), jax.random.key(0))
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), tree)


def to_torch(params, config):
    """The state dict that the reference would hold, by the table above."""
    state, stacked = {}, {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        *where, leaf = [part.key for part in path]
        if not where:
            state["p_mask_embed"] = value
            continue
        (name,) = [
            re.sub(pattern, theirs, "/".join(where))
            for pattern, theirs in MODULES.items()
            if re.fullmatch(pattern, "/".join(where))
        ]
        for ours, theirs in BLOCKS[config.fusion].items():
            name = re.sub(rf"(blocks\.\d){re.escape(ours)}", rf"\1{theirs}", name)
        value = value.T if leaf == "kernel" else value
        module, _, part = name.rpartition(".")
        if part in ("query", "key", "value"):
            suffix = "in_proj_weight" if leaf == "kernel" else "in_proj_bias"
            stacked.setdefault(f"{module}.{suffix}", {})[part] = value
        elif part == "output":
            state[f"{module}.out_proj{LEAVES[leaf]}"] = value
        else:
            state[name + LEAVES.get(leaf, f".{leaf}")] = value
    return state | {name: np.concatenate([p["query"], p["key"], p["value"]]) for name, p in stacked.items()}


def unused_by(config):
    """What the reference holds in every state dict, whatever it has a use for."""
    everything = replace(config, perturbation="table", n_perturbations=5, objective="perturbation")
    state = to_torch(params_of(everything, seed=1), everything)
    return {k: v for k, v in state.items() if re.match(r"perturbation_embedder|p_head|p_mask_embed", k)}


@each
def test_there_and_back(config):
    """All of the tree that `init` gives, in shape, dtype and value; what the config has no use for is left out."""
    params = params_of(config)
    state = unused_by(config) | to_torch(params, config)
    before = {name: value.copy() for name, value in state.items()}
    back = params_from_torch(state, config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype("float32")}
    assert set(state) == set(before)  # the caller's dict is left alone
    assert all((state[name] == before[name]).all() for name in state)


@each
def test_the_way_back_is_that_of_the_table(config):
    """Bit for bit; held against the table above, which is written by hand. What has no place is theirs, or zeros."""
    params = params_of(config)
    by_hand, unused = to_torch(params, config), unused_by(config)
    state = unused | by_hand
    whole = params_to_torch(params, config, originals=left_over(state, config))
    assert {name: (v.shape, v.dtype) for name, v in whole.items()} == {n: (v.shape, v.dtype) for n, v in state.items()}
    for name, value in state.items():
        np.testing.assert_array_equal(whole[name], value, err_msg=name)
    assert set(params_to_torch(params, config, originals={})) == set(by_hand)
    blank = params_to_torch(params, config)
    assert set(blank) == set(state)
    for name, value in blank.items():
        np.testing.assert_array_equal(value, by_hand.get(name, np.zeros(value.shape)), err_msg=name)
    if config.perturbation != "table":
        assert blank["perturbation_embedder.embedding.weight"].shape == (9, 8)


def test_the_published_sizes():
    """Those of the released checkpoint: 219 tensors, 60,359,169 values. Each comes back where it was."""
    config = scdfm.Config(n_tokens=6000)
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda key: scdfm.init(key, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), tree)
    state = params_to_torch(params, config)
    assert len(state) == 219
    assert sum(tensor.size for tensor in state.values()) == 60_359_169
    assert state["encoder.embedding.weight"].shape == (6000, 512)
    assert config_from_torch(state) == config
    assert all(map(np.array_equal, jax.tree.leaves(params_from_torch(state, config)), jax.tree.leaves(params)))
    narrow = replace(config, d_model=128)
    tree = jax.eval_shape(lambda key: scdfm.init(key, narrow), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), tree)
    assert sum(tensor.size for tensor in params_to_torch(zeros, narrow).values()) == 4_964_481


def test_heads_are_told_where_they_have_weights_of_their_own():
    state = to_torch(params_of(TINY), TINY)
    assert config_from_torch(state, graph_heads=2) == TINY
    perceiver = to_torch(params_of(CONFIGS["perceiver"]), CONFIGS["perceiver"])
    assert config_from_torch(perceiver).n_heads == 8


@each
def test_config_is_read_off_names_and_shapes(config):
    told = ("perturbation", "n_heads", "graph_heads", "condition_dropout", "objective")
    found = config_from_torch(to_torch(params_of(config), config), **{name: getattr(config, name) for name in told})
    assert found == config


def test_what_is_told_goes_before_what_is_read():
    state = to_torch(params_of(TINY), TINY)
    found = config_from_torch(state, n_heads=4, gamma=0.0, start="poisson")
    assert (found.n_heads, found.gamma, found.start, found.perturbation) == (4, 0.0, "poisson", "gene")


def test_dtype_is_kept():
    state = {name: value.astype(np.float64) for name, value in to_torch(params_of(TINY), TINY).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(params_from_torch(state, TINY))} == {np.dtype("float64")}


def test_every_misfit_is_listed_at_once():
    state = to_torch(params_of(TINY), TINY)
    del state["final_layer.fc.4.bias"]
    del state["blocks.1.diff_cross_attn.attn.lambda_q1"]
    state["fusion_layer.0.weight"] = state["fusion_layer.0.weight"].T
    state["encoder.perturbation_interaction.cross_attn.in_proj_weight"] = np.zeros((25, 8), np.float32)
    state["blocks.2.diff_self_attn.mlp.fc1.bias"] = np.zeros(32, np.float32)
    state["optimizer"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="does not fit the config") as caught:
        params_from_torch(state, TINY)
    lines = (
        "final_layer.fc.4.bias is missing; wanted the shape (1,)",
        "blocks.1.diff_cross_attn.attn.lambda_q1 is missing; wanted the shape (4,)",
        "fusion_layer.0.weight has the shape (16, 8); wanted (8, 16)",
        "encoder.perturbation_interaction.cross_attn.in_proj_weight has the shape (25, 8); wanted (24, 8)",
        "blocks.2.diff_self_attn.mlp.fc1.bias (32,) has no place in this config",
        "optimizer (3,) has no place in this config",
    )
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == set(lines)


def test_another_fusion_does_not_fit():
    with pytest.raises(ValueError, match="does not fit the config"):
        params_from_torch(to_torch(params_of(TINY), TINY), replace(TINY, fusion="perceiver"))


def test_external_vectors_are_refused():
    with pytest.raises(ValueError, match="perturbation='vector' has a projection that the reference lacks"):
        params_from_torch({}, replace(TINY, perturbation="vector", n_vector=3))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "not one of scDFM: it lacks encoder.embedding.weight, t_embedder.mlp.0.weight.* It has: nothing"),
        ({"layer.weight": np.zeros((2, 2))}, "It has: layer.weight"),
    ],
)
def test_other_state_dicts_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        config_from_torch(state)


def test_a_table_must_be_there_to_be_read():
    with pytest.raises(ValueError, match=r"it lacks perturbation_embedder\.embedding\.weight\."):
        config_from_torch(to_torch(params_of(TINY), TINY), perturbation="table")
