"""State dicts of the reference and parameters say the same; what does not fit is told in full."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.convert.scimf import config_from_torch, left_over, params_from_torch, params_to_torch
from scjax.models import scimf

CONFIGS = {
    "default": scimf.Config(n_dims=4, intrinsic_widths=(5, 3), n_blocks=2),
    "no interaction": scimf.Config(n_dims=4, intrinsic_widths=(6,), n_blocks=0),
    "learned": scimf.Config(n_dims=4, intrinsic_widths=(5,), diffusion="learned"),
    "mlp": scimf.Config(n_dims=6, intrinsic_widths=(5,) * 11, diffusion="mlp", diffusion_widths=(3, 2)),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def state_of(config, seed=0):
    """A random state dict under the reference's names, as its modules would list it."""
    rng = np.random.default_rng(seed)
    state, d = {}, config.n_dims

    def linear(name, n_in, n_out, bias=True):
        state[f"{name}.weight"] = rng.normal(size=(n_out, n_in)).astype(np.float32)
        if bias:
            state[f"{name}.bias"] = rng.normal(size=n_out).astype(np.float32)

    sizes = (d, *config.intrinsic_widths, d)
    names = [*(f"linear{i + 1}" for i in range(len(config.intrinsic_widths))), "linear"]
    for name, n_in, n_out in zip(names, sizes, sizes[1:], strict=False):
        linear(f"drift_intra.net.net.{name}", n_in, n_out)
    for block in range(config.n_blocks):
        at = f"drift_inter.trm_inter.{block}"
        for norm in ("norm1", "Vnet", "norm2"):
            state[f"{at}.{norm}.weight"], state[f"{at}.{norm}.bias"] = rng.normal(size=(2, d)).astype(np.float32)
        for projection in "qkv":
            linear(f"{at}.attn.{projection}_proj", d, d, bias=False)
        linear(f"{at}.fc1", d, 4 * d)
        linear(f"{at}.fc2", 4 * d, d)
    if config.diffusion == "mlp":
        sizes = (d, *config.diffusion_widths, d)
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            linear(f"diffusion.sigma._model.{2 * i}", n_in, n_out)
    elif config.diffusion == "learned":
        state["diffusion.sigma"] = rng.normal(size=(1, d)).astype(np.float32)
    else:
        state["diffusion.sigma"] = np.full((1, d), config.sigma, np.float32)
    return state


def to_torch(params, config):
    """The way back, by the table in the converter's docstring."""
    state = {}

    def put(name, layer):
        for ours, theirs in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            if ours in layer:
                state[f"{name}.{theirs}"] = np.asarray(layer[ours]).T if ours == "kernel" else np.asarray(layer[ours])

    drift = params["drift"]
    for i in range(len(config.intrinsic_widths)):
        put(f"drift_intra.net.net.linear{i + 1}", drift["intrinsic"][f"hidden_{i}"])
    put("drift_intra.net.net.linear", drift["intrinsic"]["output"])
    for block in range(config.n_blocks):
        ours, at = drift[f"interaction_{block}"], f"drift_inter.trm_inter.{block}"
        for theirs, name in (("norm1", "norm_query_key"), ("Vnet", "norm_value"), ("norm2", "norm_feedforward")):
            put(f"{at}.{theirs}", ours[name])
        for name in ("query", "key", "value"):
            put(f"{at}.attn.{name[0]}_proj", ours[name])
        put(f"{at}.fc1", ours["feedforward"]["hidden_0"])
        put(f"{at}.fc2", ours["feedforward"]["output"])
    if config.diffusion == "mlp":
        layers = params["diffusion"]["mlp"]
        for i in range(len(config.diffusion_widths)):
            put(f"diffusion.sigma._model.{2 * i}", layers[f"hidden_{i}"])
        put(f"diffusion.sigma._model.{2 * len(config.diffusion_widths)}", layers["output"])
    elif config.diffusion == "learned":
        state["diffusion.sigma"] = np.asarray(params["diffusion"]["sigma"])[None]
    else:
        state["diffusion.sigma"] = np.full((1, config.n_dims), config.sigma, np.float32)
    return state


@each
def test_there_and_back(config):
    state = state_of(config)
    back = to_torch(params_from_torch(state, config), config)
    assert set(back) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)


@each
def test_the_way_back_is_that_of_the_table(config):
    """Bit for bit, also of what is no parameter; held against the table above, which is written by hand."""
    state = state_of(config)
    params = params_from_torch(state, config)
    by_hand = to_torch(params, config)
    for back in (params_to_torch(params, config), params_to_torch(params, config, originals=left_over(state, config))):
        assert {name: (v.shape, v.dtype) for name, v in back.items()} == {
            n: (v.shape, v.dtype) for n, v in state.items()
        }
        for name, value in by_hand.items():
            np.testing.assert_array_equal(back[name], value)
    again = params_from_torch(params_to_torch(params, config), config)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_constant_that_the_original_lacked_is_not_made_up():
    config = CONFIGS["default"]
    state = state_of(config)
    del state["diffusion.sigma"]
    assert left_over(state, config) == {}
    back = params_to_torch(params_from_torch(state, config), config, originals={})
    assert set(back) == set(state)


def test_what_the_reference_would_compute_otherwise_is_refused():
    config = scimf.Config(n_dims=4, residual=True)
    with pytest.raises(ValueError, match="residual=True is not what the reference would compute"):
        params_to_torch({}, config)


def test_parameters_that_do_not_fit_are_listed_at_once():
    config = CONFIGS["default"]
    params = params_from_torch(state_of(config), config)
    params["drift"]["intrinsic"]["output"]["bias"] = np.zeros(7, np.float32)
    del params["drift"]["interaction_0"]["query"]
    params["more"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="the parameters do not fit the config") as caught:
        params_to_torch(params, config)
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        "['drift']['intrinsic']['output']['bias'] has the shape (7,); wanted (4,)",
        "['drift']['interaction_0']['query']['kernel'] is missing; wanted the shape (4, 4)",
        "['more'] (3,) has no place in this config",
    }


@each
def test_converted_params_are_those_of_init(config):
    """The same tree of the same shapes and dtypes, so that the model takes them."""
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    wanted = jax.eval_shape(lambda: scimf.init(jax.random.key(0), config))
    assert describe(params_from_torch(state_of(config), config)) == describe(wanted)


@each
def test_config_is_read_off_the_shapes(config):
    known = {"diffusion": "learned", "sigma": config.sigma} if config.diffusion == "learned" else {}
    found = config_from_torch(state_of(config), **known)
    assert found.sigma == pytest.approx(config.sigma)
    assert found == scimf.Config(**{**vars(config), "sigma": found.sigma})


def test_what_shapes_do_not_tell_is_passed():
    found = config_from_torch(state_of(CONFIGS["default"]), n_heads=4, dt=0.25, dropout=0.3)
    assert (found.n_heads, found.dt, found.dropout) == (4, 0.25, 0.3)


def test_dtype_is_kept_and_the_sources_are_left_alone():
    config = CONFIGS["learned"]
    state = {k: v.astype(np.float64) for k, v in state_of(config).items()}
    before = {k: v.copy() for k, v in state.items()}
    leaves = jax.tree.leaves(params_from_torch(state, config))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float64)}
    assert set(state) == set(before)
    assert all((state[k] == before[k]).all() for k in state)


def test_every_misfit_is_listed_at_once():
    config = CONFIGS["default"]
    state = state_of(config)
    del state["drift_intra.net.net.linear1.bias"]
    del state["drift_inter.trm_inter.1.attn.q_proj.weight"]
    state["drift_inter.trm_inter.0.fc1.weight"] = state["drift_inter.trm_inter.0.fc1.weight"].T
    state["drift_inter.trm_inter.2.fc1.weight"] = np.zeros((16, 4), np.float32)
    state["optimizer"] = np.zeros(3, np.float32)
    state["diffusion.sigma"] = state["diffusion.sigma"] + 1
    with pytest.raises(ValueError, match="does not fit the config") as caught:
        params_from_torch(state, config)
    for line in (
        "drift_intra.net.net.linear1.bias is missing; wanted the shape (5,)",
        "drift_inter.trm_inter.1.attn.q_proj.weight is missing; wanted the shape (4, 4)",
        "drift_inter.trm_inter.0.fc1.weight has the shape (4, 16); wanted (16, 4)",
        "drift_inter.trm_inter.2.fc1.weight (16, 4) has no place in this config",
        "optimizer (3,) has no place in this config",
        "diffusion.sigma is not the constant config.sigma=0.1",
    ):
        assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 7


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "not one of scIMF: it lacks drift_intra.net.net.linear1.weight .* It has: nothing."),
        ({"layer.weight": np.zeros((2, 2))}, "It has: layer.weight."),
    ],
)
def test_other_state_dicts_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        config_from_torch(state)


def test_a_trained_vector_is_not_taken_for_the_constant():
    with pytest.raises(ValueError, match=re.escape('pass diffusion="learned"')):
        config_from_torch(state_of(CONFIGS["learned"]))


def test_converted_params_move_cells():
    """Through the model itself: one linear layer known by hand."""
    config = scimf.Config(n_dims=2, intrinsic_widths=(2,), n_blocks=0)
    state = {
        "drift_intra.net.net.linear1.weight": np.array([[1, 2], [3, 4]], np.float32),
        "drift_intra.net.net.linear1.bias": np.array([0, -100], np.float32),
        "drift_intra.net.net.linear.weight": np.array([[1, 0], [1, 1]], np.float32),
        "drift_intra.net.net.linear.bias": np.array([0.5, 0], np.float32),
    }
    v = scimf.drift(params_from_torch(state, config), jnp.asarray([[1.0, 1.0]]), config=config)
    hidden = [3.0, 0.01 * (7 - 100)]
    np.testing.assert_allclose(v, [[hidden[0] + 0.5, hidden[0] + hidden[1]]], rtol=1e-6)
