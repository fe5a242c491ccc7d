"""The battery that every model of `model_table.py` passes."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_table import MODELS

from scjax.checkpoint import CheckpointWriter, read
from scjax.config import from_dict, to_dict, to_json
from scjax.train.loop import fit
from scjax.types import Model

each = pytest.mark.parametrize("name", MODELS)
# Training is compiled for one row of each model: its options change the loss, and no word of the loop.
each_module = pytest.mark.parametrize("name", {row.module: name for name, row in reversed(MODELS.items())}.values())
EPS = np.finfo(np.float32).eps


class Subject:
    """A model of the table with its parameters and its compiled loss."""

    def __init__(self, name):
        self.row = MODELS[name]
        self.config = self.row.config
        self.params = jax.jit(lambda key: self.row.module.init(key, self.config))(jax.random.key(1))
        self.value_and_grad = jax.jit(jax.value_and_grad(self.loss, has_aux=True))

    def loss(self, params, batch, key):
        return self.row.module.loss(params, batch, key, config=self.config, **self.row.constants(self.config))

    def batch_at(self, n):
        return self.row.batch_at(self.config, n)

    def evaluate(self, seed=0):
        return self.value_and_grad(self.params, self.batch_at(0), jax.random.key(seed))


subject_of = functools.cache(Subject)  # compiled once for the whole module


@pytest.fixture
def subject(name):
    return subject_of(name)


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in leaves(tree).items()}


@each
def test_loss_and_terms_are_finite(subject):
    (total, terms), grads = subject.evaluate()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((total, terms, grads)))
    assert all(jnp.shape(leaf) == () for leaf in jax.tree.leaves((total, terms)))


@each
def test_the_loss_is_the_documented_sum_of_its_terms(subject):
    (total, terms), _ = subject.evaluate()
    np.testing.assert_allclose(total, subject.row.total(subject.config, terms), rtol=4 * EPS)


@each
def test_randomness_is_the_key_s_alone(subject):
    (first, _), grads = subject.evaluate(seed=0)
    (again, _), grads_again = subject.evaluate(seed=0)
    (other, _), _ = subject.evaluate(seed=1)
    assert bits((first, grads)) == bits((again, grads_again))
    assert first != other


@each
def test_every_parameter_learns(subject):
    _, grads = subject.evaluate()
    idle = [path for path, leaf in leaves(grads).items() if not np.any(leaf)]
    assert not idle, f"no gradient reaches {idle}"


@each
def test_params_are_nested_dicts_of_float32(subject):
    def check(node, at):
        if isinstance(node, dict):
            assert node, f"{at} is empty"
            for name, child in node.items():
                assert isinstance(name, str)
                check(child, f"{at}.{name}")
        else:
            assert isinstance(node, jax.Array), f"{at} is a {type(node).__name__}"
            assert node.dtype == jnp.float32, f"{at} is {node.dtype}"

    assert type(subject.params) is dict
    check(subject.params, "params")


@each
def test_init_is_a_function_of_the_key(subject):
    init = lambda seed: subject.row.module.init(jax.random.key(seed), subject.config)  # noqa: E731
    shapes = jax.eval_shape(lambda: init(1))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), subject.params
    )
    again = jax.jit(lambda key: subject.row.module.init(key, subject.config))
    assert bits(again(jax.random.key(1))) == bits(subject.params)
    assert bits(again(jax.random.key(2))) != bits(subject.params)


@each
def test_build_binds_the_plain_functions(subject):
    model = subject.row.module.build(subject.config, **subject.row.constants(subject.config))
    assert isinstance(model, Model)
    assert model.config == subject.config
    assert jax.eval_shape(model.init, jax.random.key(0)) == jax.eval_shape(lambda: subject.params)
    bound = jax.eval_shape(model.loss, subject.params, subject.batch_at(0), jax.random.key(0))
    assert bound == jax.eval_shape(subject.loss, subject.params, subject.batch_at(0), jax.random.key(0))


@each
def test_config_survives_json(subject):
    written = json.loads(to_json(subject.config))
    assert from_dict(type(subject.config), written) == subject.config
    assert hash(subject.config) == hash(from_dict(type(subject.config), written))
    with pytest.raises(ValueError, match="is not a field"):
        from_dict(type(subject.config), {**to_dict(subject.config), "no_such_knob": 1})


@each
def test_params_survive_a_checkpoint(subject, tmp_path):
    with CheckpointWriter(tmp_path, about={"run": "conformance", "config": to_dict(subject.config)}) as writer:
        writer.save(3, {"params": subject.params})
    step, arrays, about = read(tmp_path)
    assert step == 3
    assert bits(arrays["params"]) == bits(subject.params)
    assert jax.tree.structure(arrays["params"]) == jax.tree.structure(subject.params)
    assert from_dict(type(subject.config), about["config"]) == subject.config


@each_module
def test_batches_stack_and_scan(subject):
    """Stacked batches scanned in one program give what each gives alone."""
    batches = [subject.batch_at(n) for n in range(2)]
    keys = jax.random.split(jax.random.key(5), 2)
    stacked = jax.tree.map(lambda *a: np.stack(a), *batches)
    scan = jax.jit(lambda p: jax.lax.scan(lambda c, at: (c, subject.loss(p, *at)[0]), None, (stacked, keys))[1])
    alone = [subject.value_and_grad(subject.params, b, k)[0][0] for b, k in zip(batches, keys, strict=True)]
    np.testing.assert_allclose(scan(subject.params), alone, rtol=1e-5)


@each_module
def test_training_compiles_once_and_resumes_bit_for_bit(subject):
    """Six steps are four and, from the state they leave, two more; no call after the first traces the loss."""
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return subject.loss(*args)

    def run(n_steps, state=None):
        nonlocal traces
        traces = 0
        options = {"key": jax.random.key(3), "n_steps": n_steps, "scan_steps": 2, "state": state}
        return fit(counted, subject.params, optax.adam(1e-2), subject.batch_at, **options), traces

    (four, in_two_calls), (six, in_three_calls) = run(4), run(6)
    assert in_two_calls == in_three_calls
    resumed, _ = run(6, four)
    assert (int(four.step), int(resumed.step)) == (4, 6)
    as_data = lambda state: state._replace(key=jax.random.key_data(state.key))  # noqa: E731
    assert bits(as_data(resumed)) == bits(as_data(six))
    assert bits(six.params) != bits(four.params)


# -- configs


def program(row, config):
    """The traced loss and the shapes and statements of init, addresses in memory left out."""
    key = jax.random.key(0)
    init = jax.make_jaxpr(lambda key: row.module.init(key, config), return_shape=True)
    init_program, params = init(key)
    loss = jax.make_jaxpr(lambda p, b, k: row.module.loss(p, b, k, config=config, **row.constants(config)))
    traced = loss(params, row.batch_at(config, 0), key)
    text = [str(p) for p in (init_program, traced)] + [repr(np.asarray(c)) for c in traced.consts]
    return re.sub(r"0x[0-9a-f]+", "", "\n".join(text))


def test_every_field_of_every_config_has_an_alternative():
    """Over all rows of a model: what is not listed is not known to do anything."""
    for row in MODELS.values():
        listed = {f for other in MODELS.values() if other.module is row.module for f in other.alternatives}
        assert listed == {f.name for f in dataclasses.fields(row.module.Config)}


def alternatives():
    for name, row in MODELS.items():
        for field, change in row.alternatives.items():
            yield pytest.param(
                name, field, change if isinstance(change, dict) else {field: change}, id=f"{name}-{field}"
            )


@functools.cache
def program_of(name, config):
    return program(MODELS[name], config)


@pytest.mark.parametrize(("name", "field", "change"), list(alternatives()))
def test_no_dead_knob(name, field, change):
    """Each field changes the traced program, beside a config that differs in that field alone."""
    config = MODELS[name].config
    before = dataclasses.replace(config, **{f: v for f, v in change.items() if f != field})
    after = dataclasses.replace(config, **change)
    assert getattr(before, field) != getattr(after, field)
    assert program_of(name, before) != program_of(name, after)
    assert from_dict(type(after), json.loads(to_json(after))) == after


def test_a_program_is_told_from_itself_by_nothing():
    """The comparison above would be empty if tracing twice gave two texts."""
    row = MODELS["scimf"]
    converged = dataclasses.replace(row.config, sinkhorn="converged")
    for config in (row.config, converged):
        jax.clear_caches()
        assert program(row, config) == program_of("scimf", config)
