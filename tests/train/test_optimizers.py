from dataclasses import replace

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scjax.config import from_dict, override, to_dict
from scjax.train.optimizers import (
    OptimizerConfig,
    clip_by_norm,
    learning_rate,
    make_optimizer,
    skip_unused,
)

GOLDENS = goldens.FOLDER / "scimf"
PLAIN = OptimizerConfig(schedule="constant", clip_norm=None)


def steps_of(config: OptimizerConfig, grads: list, params):
    """Parameters after each gradient in turn."""
    tx = make_optimizer(config, len(grads))
    state, seen, update = tx.init(params), [], jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def adam_by_hand(config: OptimizerConfig, grads: list, x, rates: list):
    """Kingma and Ba, algorithm 1, with decoupled weight decay, in NumPy float64."""
    m, v, seen = 0.0, 0.0, []
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g**2
        m_hat, v_hat = m / (1 - config.b1**t), v / (1 - config.b2**t)
        x = x - rate * (m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * x)
        seen.append(x)
    return seen


@pytest.mark.usefixtures("x64")
def test_adam_and_weight_decay_are_the_textbook_s():
    rng = np.random.default_rng(0)
    x, grads = rng.normal(size=(3, 2)), list(rng.normal(size=(6, 3, 2)))
    config = replace(
        PLAIN, schedule="step", weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-3, decay_every=2, decay_factor=0.5
    )
    rates = [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
    got = steps_of(config, [jnp.asarray(g) for g in grads], jnp.asarray(x))
    want = adam_by_hand(config, grads, x, rates)
    # A schedule's rates are float32 whatever the parameters are, hence 6e-8 of each change.
    np.testing.assert_allclose(np.stack(got) - x, np.stack(want) - x, rtol=5e-7)


@pytest.mark.usefixtures("x64")
def test_weight_decay_spares_vectors():
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    after = steps_of(replace(PLAIN, weight_decay=0.5, learning_rate=0.1), [zero], params)[-1]
    np.testing.assert_allclose(after["matrix"], 0.95)  # 1 - 0.1 * 0.5
    np.testing.assert_array_equal(after["bias"], 1)


@pytest.mark.usefixtures("x64")
def test_first_update_is_the_reference_s():
    """Recorded with torch: clip to 0.1, then Adam, from a recorded gradient of norm far above 0.1."""
    goldens.require("scimf")
    checked = 0
    for path in sorted(GOLDENS.glob("grad_*.f64.npz")):
        with np.load(path) as file, np.load(path.with_name(path.name.replace(".f64", ""))) as inputs:
            names = [k.removeprefix("adam_after1/") for k in file if k.startswith("adam_after1/")]
            if not names:
                continue
            lr, b1, b2, eps, clip = map(float, file["adam/hyper"])
            config = OptimizerConfig(learning_rate=lr, b1=b1, b2=b2, eps=eps, clip_norm=clip)
            weights = {k: jnp.asarray(inputs[f"w/{k}"], jnp.float64) for k in names}
            grads = {k: jnp.asarray(file[f"grad_sink07/{k}"]) for k in names}
            assert config == OptimizerConfig()  # the defaults are the reference's
            after = steps_of(config, [grads], weights)[-1]
            for k in names:
                np.testing.assert_allclose(
                    after[k], file[f"adam_after1/{k}"], rtol=0, atol=1e-9, err_msg=k
                )  # their README's
            checked += 1
    assert checked


@pytest.mark.usefixtures("x64")
def test_clipping_is_torch_s():
    """min(1, c / (norm + 1e-6)): at the bound itself torch already shrinks a little, where optax does not."""
    g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}  # norm 5
    for bound, factor in [(0.1, 0.1 / (5 + 1e-6)), (5.0, 5 / (5 + 1e-6)), (5.1, 1.0)]:
        clipped, _ = clip_by_norm(bound).update(g, optax.EmptyState())
        np.testing.assert_allclose(clipped["a"], np.array([3.0, 0.0]) * factor, rtol=1e-15)
        np.testing.assert_allclose(clipped["b"], 4.0 * factor, rtol=1e-15)


def test_clipping_comes_before_the_moments():
    """A gradient scaled by a thousand takes the same step: what Adam sees is clipped."""
    params, g = jnp.ones(3), jnp.array([1.0, 2.0, -2.0])
    config = OptimizerConfig(clip_norm=0.1, eps=1.0)  # a large eps, so that Adam forgets no scale
    one, thousand = (steps_of(config, [g * s], params)[-1] for s in (1.0, 1000.0))
    np.testing.assert_allclose(one - 1, thousand - 1, rtol=1e-4)
    free = steps_of(replace(config, clip_norm=None), [g], params)[-1]
    assert np.abs(free - 1).max() > 2 * np.abs(one - 1).max()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "n_warmup": 2}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ({"decay_every": 2}, [1, 1, 0.9, 0.9, 0.81, 0.81, 0.729]),
        ({"decay_every": 2, "decay_factor": 0.5, "n_warmup": 3}, [0.25, 0.5, 0.75, 1, 1, 0.5, 0.5]),
        ({"schedule": "cosine"}, [(1 + np.cos(np.pi * i / 6)) / 2 for i in range(7)]),
        (
            {"schedule": "cosine", "final_fraction": 0.2, "n_warmup": 2},
            [1 / 3, 2 / 3, *(0.2 + 0.4 * (1 + np.cos(np.pi * i / 4)) for i in range(5))],
        ),
        ({"schedule": "cosine", "cosine_updates": 3}, [1, 0.75, 0.25, 0, 0.25, 0.75, 1]),  # and up again
        ({"schedule": "cosine", "cosine_updates": 2, "final_fraction": 0.2}, [1, 0.6, 0.2, 0.6, 1, 0.6, 0.2]),
        ({"schedule": "cosine", "cosine_updates": 2, "n_warmup": 2}, [1 / 3, 2 / 3, 1, 0.5, 0, 0.5, 1]),
        ({"schedule": "constant", "n_warmup": 2, "warmup_from_zero": True}, [0, 1 / 2, 1, 1, 1, 1, 1]),
        (  # a third of 7 is 2 updates; the cosine's four, of which the last is cut off
            {"schedule": "plateau", "plateau_fraction": 1 / 3, "n_warmup": 1, "floor_fraction": 0.2},
            [1 / 2, 1, 1, *((1 + np.cos(np.pi * i / 4)) / 2 for i in range(3)), 0.2],
        ),
        (
            {"schedule": "plateau", "plateau_fraction": 0.3, "n_warmup": 2, "warmup_from_zero": True},
            [0, 1 / 2, 1, 1, 1, 3 / 4, 1 / 4],
        ),
        (
            {"schedule": "plateau", "plateau_fraction": 0.0, "floor_fraction": 0.0},
            [(1 + np.cos(np.pi * i / 7)) / 2 for i in range(7)],
        ),
    ],
)
def test_learning_rates(settings, expected):
    rate = learning_rate(OptimizerConfig(learning_rate=0.3, **settings), 7)
    np.testing.assert_allclose([rate(i) for i in range(7)], 0.3 * np.array(expected), rtol=1e-5, atol=1e-8)


def test_the_reference_s_rates():
    rate = learning_rate(OptimizerConfig(), 3000)
    for n in (0, 99, 100, 199, 200, 2999):
        np.testing.assert_allclose(rate(n), 1e-3 * 0.9 ** (n // 100), rtol=1e-5)


def test_rates_of_a_long_plateau():
    """PerturbDiff's, whose factors its README's settings fix; single precision counts 200 000 updates well enough."""
    config = OptimizerConfig(learning_rate=2e-4, schedule="plateau", n_warmup=200, warmup_from_zero=True)
    rate = learning_rate(config, 200_000)
    for n, factor in [(0, 0), (50, 0.25), (199, 0.995), (200, 1), (20_200, 1), (163_300, 0.1), (199_999, 0.1)]:
        np.testing.assert_allclose(rate(n), 2e-4 * factor, rtol=1e-6)
    middle = 20_200 + (200_000 - 20_200) // 2
    np.testing.assert_allclose(rate(middle), 1e-4, rtol=1e-6)


NAMED = {
    "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "norm": {"scale": jnp.ones(2)},
    "biases": {"null": jnp.ones((1, 2))},  # a leaf's name counts, not its module's
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("decayed", "spared"), [("matrices", ("bias", "scale")), ("all_but_biases", ("bias",))])
def test_what_weight_decay_pulls_on(decayed, spared, skip):
    config = OptimizerConfig(
        schedule="constant", learning_rate=0.1, weight_decay=0.5, decayed=decayed, skip_unused=skip, clip_norm=None
    )
    tiny = jax.tree.map(lambda p: jnp.full_like(p, 1e-30), NAMED)  # used, and next to eps nothing
    after = steps_of(config, [tiny], NAMED)[-1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        np.testing.assert_allclose(leaf, 1 if path[-1].key in spared else 0.95, err_msg=jax.tree_util.keystr(path))


@pytest.mark.usefixtures("x64")
def test_a_module_that_an_update_does_not_use_is_left_alone():
    """Moments, count and decay know only the updates that used it; the rate is of the run's own count."""
    rng = np.random.default_rng(3)
    config = OptimizerConfig(
        schedule="step", decay_every=1, decay_factor=0.7, weight_decay=0.1, skip_unused=True, clip_norm=None, b2=0.9
    )
    rates = config.learning_rate * 0.7 ** np.arange(6)
    uses = {"always": [0, 1, 2, 3, 4, 5], "at times": [1, 2, 5], "never": []}
    part = lambda used: rng.normal(size=(6, 2, 2)) * np.isin(range(6), used)[:, None, None]  # noqa: E731
    grads = {module: {"kernel": part(used), "other": part(used)} for module, used in uses.items()}
    grads["always"]["kernel"][2] = 0  # zeros in one of its leaves are no absence
    start = jax.tree.map(lambda g: rng.normal(size=g.shape[1:]), grads)
    got = steps_of(config, [jax.tree.map(lambda g: jnp.asarray(g[i]), grads) for i in range(6)], start)  # noqa: B023
    for module, used in uses.items():
        for leaf in ("kernel", "other"):
            x, seen = start[module][leaf], [x[module][leaf] for x in got]
            want = dict(zip(used, adam_by_hand(config, grads[module][leaf][used], x, rates[used]), strict=True))
            last = x
            for i in range(6):
                if i in used:  # a schedule's rates are float32 whatever the parameters are
                    np.testing.assert_allclose(seen[i] - x, want[i] - x, rtol=5e-7)
                else:
                    np.testing.assert_array_equal(seen[i], last)
                last = seen[i]


def test_skipping_changes_nothing_where_all_is_used():
    rng = np.random.default_rng(4)
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), NAMED) for _ in range(4)]
    config = OptimizerConfig(weight_decay=0.1, decayed="all_but_biases")
    plain, skipping = (steps_of(replace(config, skip_unused=s), grads, NAMED)[-1] for s in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, skipping)


def test_any_transformation_can_skip():
    """A momentum does not push a leaf on that is not used; a tree may be of any form, one array included."""
    for form in (lambda x: {"a": (x, [x])}, lambda x: x):
        tx = skip_unused(optax.trace(0.9))
        state = tx.init(form(jnp.ones(2)))
        for grad, want in [(1.0, 1.0), (0.0, 0.0), (1.0, 1.9)]:
            updates, state = tx.update(form(jnp.full(2, grad)), state)
            jax.tree.map(lambda found, want=want: np.testing.assert_allclose(found, want), updates)
            assert jax.tree.structure(updates) == jax.tree.structure(form(1))


def test_accumulation_averages_gradients_and_counts_updates():
    """Three batches an update, equal to one update on their mean; the schedule counts updates."""
    rng = np.random.default_rng(1)
    grads = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    params = jnp.zeros(4)
    config = OptimizerConfig(decay_every=1, decay_factor=0.1, clip_norm=0.5)
    whole = steps_of(config, [grads[:3].mean(0), grads[3:].mean(0)], params)
    parts = steps_of(replace(config, accumulate=3), list(grads), params)
    np.testing.assert_array_equal(parts[1], params)  # nothing moves within a group
    np.testing.assert_allclose(parts[2], whole[0], rtol=1e-5)
    np.testing.assert_allclose(parts[5], whole[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 2e-3),
        ("schedule", "constant"),
        ("decay_every", 3),
        ("decay_factor", 0.2),
        ("n_warmup", 1),
        ("b1", 0.5),
        ("b2", 0.5),
        ("eps", 1e-2),
        ("weight_decay", 0.1),
        ("clip_norm", 10.0),
        ("accumulate", 2),
    ],
)
def test_no_dead_knob(field, value):
    """Each field changes what four gradients do to a matrix."""
    base = OptimizerConfig() if field == "schedule" else OptimizerConfig(decay_every=2, decay_factor=0.5)
    n_steps = 400 if field == "schedule" else 4  # the reference's first decay comes after 100
    grads = [jnp.full((2, 2), s) for s in (1.0, -0.01, 0.02, 2.0)]  # two of them below the clipping norm
    changed = replace(base, **{field: value})
    one, other = (np.stack(steps_of(c, grads * (n_steps // 4), jnp.ones((2, 2)))) for c in (base, changed))
    assert np.abs(one - other).max() > 1e-5


def test_the_end_of_the_cosine_is_no_dead_knob():
    grads = [jnp.full(2, s) for s in (1.0, -0.3, 0.2, 2.0)]
    low, high = (
        steps_of(OptimizerConfig(schedule="cosine", final_fraction=f), grads, jnp.ones(2))[-1] for f in (0.0, 0.9)
    )
    assert np.abs(low - high).max() > 1e-5


PERTURBDIFF = OptimizerConfig(
    schedule="plateau",
    plateau_fraction=0.3,
    n_warmup=1,
    warmup_from_zero=True,
    weight_decay=0.1,
    decayed="all_but_biases",
    skip_unused=True,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plateau_fraction", 0.6),
        ("floor_fraction", 0.9),
        ("warmup_from_zero", False),
        ("decayed", "matrices"),
        ("skip_unused", False),
    ],
)
def test_no_dead_knob_of_perturbdiff_s(field, value):
    grads = [jnp.full(2, s) for s in (1.0, -0.3, 0.0, 2.0)]
    one, other = (
        np.stack(steps_of(c, grads, jnp.ones(2))) for c in (PERTURBDIFF, replace(PERTURBDIFF, **{field: value}))
    )
    assert np.abs(one - other).max() > 1e-5


def test_a_cosine_of_a_given_length_does_not_depend_on_the_run_s():
    """And where that length is the run's own, it is the plain cosine."""
    config = OptimizerConfig(schedule="cosine", cosine_updates=6, learning_rate=0.3)
    short, long = (learning_rate(config, n) for n in (7, 700))
    plain = learning_rate(replace(config, cosine_updates=None), 7)
    for i in range(7):
        assert short(i) == long(i)
        np.testing.assert_allclose(short(i), plain(i), rtol=1e-5, atol=1e-8)


def test_config_survives_json_and_overrides():
    for config in (OptimizerConfig(schedule="cosine", final_fraction=0.1, clip_norm=None), PERTURBDIFF):
        assert from_dict(OptimizerConfig, to_dict(config)) == config
    changed = override(OptimizerConfig(), {"decay_every": "7", "clip_norm": "null"})
    assert changed == OptimizerConfig(decay_every=7, clip_norm=None)
    assert hash(changed) != hash(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be a positive number; got 0.0"),
        ({"decay_every": 0}, "decay_every must be at least 1; got 0"),
        ({"decay_factor": 0.0}, "decay_factor must be a positive"),
        ({"schedule": "cosine", "final_fraction": -0.1}, "final_fraction must be zero or"),
        ({"schedule": "cosine", "cosine_updates": 0}, "cosine_updates must be at least 1; got 0"),
        ({"cosine_updates": 5}, "cosine_updates is of schedule='cosine' and does nothing with 'step'"),
        ({"final_fraction": 0.1}, "final_fraction is of schedule='cosine' and does nothing with 'step'"),
        ({"schedule": "cosine", "decay_every": 5}, "decay_every is of schedule='step'"),
        ({"schedule": "constant", "decay_factor": 0.5}, "decay_factor is of schedule='step'"),
        ({"plateau_fraction": 0.2}, "plateau_fraction is of schedule='plateau' and does nothing with 'step'"),
        ({"schedule": "cosine", "floor_fraction": 0.2}, "floor_fraction is of schedule='plateau'"),
        ({"schedule": "plateau", "final_fraction": 0.2}, "final_fraction is of schedule='cosine'"),
        ({"schedule": "plateau", "plateau_fraction": 1.0}, "plateau_fraction must lie in"),
        ({"schedule": "plateau", "floor_fraction": 1.5}, r"floor_fraction must lie in \[0, 1\].*got 1.5"),
        ({"warmup_from_zero": True}, "warmup_from_zero does nothing without a warm-up; set n_warmup, got 0"),
        ({"n_warmup": -1}, "n_warmup must be at least 0"),
        ({"b1": 1.0}, "b1 must lie in"),
        ({"b2": -0.1}, "b2 must lie in"),
        ({"eps": 0.0}, "eps must be a positive"),
        ({"weight_decay": -1.0}, "weight_decay must be zero or"),
        ({"decayed": "all_but_biases"}, "decayed='all_but_biases' does nothing with weight_decay=0"),
        ({"clip_norm": 0.0}, "clip_norm must be a positive"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


@pytest.mark.parametrize(("field", "value"), [("schedule", "plateaus"), ("decayed", "matrix")])
def test_misspelt_options_are_told(field, value):
    """The suite's type checker would speak first; users do not have it."""
    config = replace(PLAIN)
    object.__setattr__(config, field, value)
    with pytest.raises(ValueError, match=f"{field} must be one of .*; got '{value}'. Did you mean '{value[:5]}"):
        config.__post_init__()


def test_runs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="accumulate must divide n_steps.*accumulate=3, n_steps=10"):
        make_optimizer(OptimizerConfig(accumulate=3), 10)
    with pytest.raises(ValueError, match="n_warmup must be less than the number of updates, 5; got 5"):
        make_optimizer(OptimizerConfig(n_warmup=5, accumulate=2), 10)
    with pytest.raises(ValueError, match="of 10 they take 8 and 3, got plateau_fraction=0.3"):
        make_optimizer(OptimizerConfig(schedule="plateau", plateau_fraction=0.3, n_warmup=8), 10)
