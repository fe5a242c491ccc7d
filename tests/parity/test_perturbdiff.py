"""PerturbDiff's network, loss and sampler against the recorded numbers of the PyTorch reference.

Tolerances are those of the recordings' README, errors measured against the largest entry of an array. Schedules,
losses on their own, data and optimisation have files of their own beside this one.
"""

import ast
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import cases, load, or_absent, require, under

from scjax.batches import CellSetBatch
from scjax.convert import perturbdiff as convert
from scjax.losses import energy_distance
from scjax.models import perturbdiff
from scjax.models.perturbdiff import Coins, Config, Constants
from scjax.nn.time import sinusoids
from scjax.processes.diffusion import ddim_step, ddpm_step, diffuse, guide, make_schedule, posterior

# Compiling is nearly all the time these tests take; without LLVM's optimisations it is half of that.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

ELSEWHERE = ("datasets_", "diffusion_", "losses_", "schedules_", "trainsteps_")
KINDS = ("block_", "embedders_", "covencoder_", "backbone_det_", "backbone_", "trainloss_", "sampling_")
CASES = cases("perturbdiff", KINDS + ELSEWHERE)


def each(kind):
    return pytest.mark.parametrize("case", or_absent("perturbdiff", kind, CASES[kind]))


@pytest.fixture(autouse=True)
def _at_hand():
    require("perturbdiff")


def test_every_file_is_of_a_known_kind():
    assert not CASES["unknown"], f"no test reads {CASES['unknown']}"
    assert any(CASES.values()), "the folder of recordings is empty"


class Golden:
    """A recording: its settings, inputs, outputs and weights."""

    def __init__(self, case):
        self.arrays = load("perturbdiff", case)

    def __getitem__(self, name):
        """An array, as what our functions take: integers as int32, floats as float32."""
        value = self.arrays[name]
        return jnp.asarray(value.astype({"i": np.int32, "f": np.float32}.get(value.dtype.kind, value.dtype)))

    def number(self, name):
        return self.arrays[name].item()

    def state(self, prefix="w/", to=""):
        return {to + name: w for name, w in under(self.arrays, prefix).items()}

    def config(self, **settings):
        """Of the network, but for its covariates."""
        known = {"d_model": self.number("hidden"), "n_heads": self.number("heads"), "divisor": 1.0}
        if "genes" in self.arrays:
            known |= {"n_genes": self.number("genes"), "n_layers": self.number("depth")}
        return Config(**{**known, **settings})

    def whole(self, **settings):
        """Config, parameters and constants of a recording that holds the covariate encoder, too."""
        state = self.state()
        config = convert.config_from_torch(state, divisor=1.0, **settings)
        expected = self.config()
        for name in ("n_genes", "d_model", "n_layers", "n_heads"):
            assert getattr(config, name) == getattr(expected, name), name
        return config, on_device(convert.params_from_torch(state, config)), convert.constants_from_torch(state, config)

    def covariates(self, per="set"):
        """Ids, one a set or one a cell; the row 0 of the reference's table is that of no perturbation."""
        ids = {"perturbation": self["cov_pert"] + 1, "cell_type": self["cov_celltype"], "batch": self["cov_batch"]}
        assert all((i == i[:, :1]).all() for i in ids.values())
        return {role: i if per == "cell" else i[:, 0] for role, i in ids.items()}


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def close(actual, reference, tolerance=2e-6, what=""):
    reference = np.asarray(reference, np.float64)
    largest = np.abs(reference).max(initial=0)
    np.testing.assert_allclose(
        np.asarray(actual), reference, rtol=0, atol=tolerance * max(largest, 1e-30), err_msg=what
    )


@partial(jit, static_argnums=(0, 1))
def each_set(module, method, params, args):
    return jax.vmap(lambda *a: module.apply({"params": params}, *a, method=method))(*args)


def run(module, params, *args, method=None):
    """The module on each set of a batch."""
    return each_set(module, method, on_device(params), args)


def in_torch_s_layout(state, config, tree):
    """Arrays in the shape of our parameters as a dict of the state's names, zeros where a tensor is left out.

    A state whose entries are their own positions goes through the converter, and says where everything went.
    """
    sizes = {name: value.size for name, value in state.items()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    positions = {n: starts[n] + np.arange(v.size).reshape(v.shape) for n, v in state.items()}
    where = convert.params_from_torch(positions, config)
    flat = np.zeros(sum(sizes.values()))
    for at, values in zip(jax.tree.leaves(where), jax.tree.leaves(tree), strict=True):
        flat[at] = values
    return {name: flat[starts[name] :][: v.size].reshape(v.shape) for name, v in state.items()}


# -- parts


def layer_of(golden, last=False):
    config = golden.config(n_genes=1, n_layers=1, mlp_ratio=golden.number("mlp_ratio"))
    reader = convert.Reader(golden.state(to="part."), config)
    params = reader.layer("part", last)
    assert not reader.misfits
    return config, perturbdiff.Layer(config, last), params


def whole_layer(layer, x, control, c):
    return layer(x, control, layer.of_condition(c), None)


def whole_head(head, x, c):
    return head(x, head.of_condition(c))


@each("block_")
def test_layer(case):
    golden = Golden(case)
    x, control = golden["x"], golden["x_control"]
    _, layer, params = layer_of(golden)
    for c, suffix in (("c", ""), ("c_single", "_csingle")):
        out, out_control = run(layer, params, x, control, golden[c], method=whole_layer)
        close(out, golden[f"out_x{suffix}"], what=c)
        close(out_control, golden[f"out_x_control{suffix}"], what=c)
        _, last, its_params = layer_of(golden, last=True)
        close(
            run(last, its_params, x, control, golden[c], method=whole_layer)[0], golden[f"out_x{suffix}"], what="last"
        )


@each("block_")
def test_parts_of_a_layer(case):
    golden = Golden(case)
    config, layer, params = layer_of(golden)
    for got, name in zip(
        run(layer, params, golden["c"], method=lambda m, c: m.of_condition(c)),
        ("adaln_out", "control_adaln_out"),
        strict=True,
    ):
        close(got, golden[name], what=name)
    close(run(layer, params, golden["x"], method=lambda m, x: m.norm(x)), golden["norm1_out"])
    close(run(layer, params, golden["x"], method=lambda m, x: m.feedforward(x)), golden["mlp_out"])
    close(
        run(layer, params, golden["x_control"], method=lambda m, x: m.control_feedforward(x)), golden["control_mlp_out"]
    )
    attend = perturbdiff.FeatureAttention(config, False)
    both = lambda m, x: jnp.concatenate(m(*jnp.split(x, 2, axis=-1), None), axis=-1)  # noqa: E731
    close(run(attend, params["attention"], golden["attn_in"], method=both), golden["attn_out"])
    # Under a mask of all cells another implementation of attention does the same.
    masked = lambda m, x: jnp.concatenate(m(*jnp.split(x, 2, axis=-1), jnp.ones(len(x), bool)), axis=-1)  # noqa: E731
    close(run(attend, params["attention"], golden["attn_in"], method=masked), golden["attn_out"])


@each("block_")
def test_gradients_of_a_layer(case):
    golden = Golden(case)
    _, layer, params = layer_of(golden)

    def total(params, x, control, c):
        each_set = jax.vmap(lambda *a: layer.apply({"params": params}, *a, method=whole_layer))
        out, out_control = each_set(x, control, c)
        return jnp.sum(out * golden["r1"]) + jnp.sum(out_control * golden["r2"])

    inputs = (on_device(params), golden["x"], golden["x_control"], golden["c"])
    of_params, of_x, of_control, of_c = jit(jax.grad(total, (0, 1, 2, 3)))(*inputs)
    close(of_x, golden["grad_x"], 1e-5)
    close(of_control, golden["grad_x_control"], 1e-5)
    close(of_c, golden["grad_c"], 1e-5)
    close(of_params["attention"]["joined"]["kernel"].T, golden["grad_qkv_weight"], 1e-5)
    close(of_params["attention"]["query_norm"]["scale"], golden["grad_q_norm"], 1e-5)
    close(of_params["modulation"]["kernel"].T, golden["grad_adaln_weight"], 1e-5)


@each("embedders_")
def test_embedders_and_head(case):
    golden = Golden(case)
    (d, n_genes), n_classes = golden["w/class.emb.weight"].shape, golden["w/final.linear.weight"].shape[0]
    config = Config(d_model=d, n_genes=n_genes, n_heads=1)
    assert n_classes == n_genes
    reader = convert.Reader(golden.state(), config)

    waves = sinusoids(golden["time_t"].astype(jnp.float32), 256)
    # Angles reach 999 rad, where one rounding of a float32 is 6.1e-5; PyTorch's and XLA's exp differ in the last digit.
    close(waves[:, None], golden["time_freq_emb"], np.spacing(np.float32(golden.arrays["time_t"].max())))
    time = perturbdiff.TimeEmbedding(config).apply({"params": on_device(reader.time("time"))}, golden["time_t"])
    close(time[:, None], golden["time_out"], 3e-5)

    condition, params = perturbdiff.Condition(config), reader.condition("class")
    close(run(condition, params, golden["class_in"]), golden["class_out"])
    null = condition.apply({"params": on_device(params)}, method="nothing")
    close(jnp.broadcast_to(null, golden["class_out_null"].shape), golden["class_out_null"])

    # The head without its ReLU: what it lets through, less what it lets through of the negative.
    head, params = perturbdiff.Head(config), reader.head("final")
    negative = {**params, "output": jax.tree.map(np.negative, params["output"])}
    for c, out in (("final_c", "final_out"), ("final_c_single", "final_out_csingle")):
        positive, of_negative = (
            run(head, p, golden["final_x"], golden[c], method=whole_head) for p in (params, negative)
        )
        close(positive - of_negative, golden[out], what=out)
        close(positive, jnp.maximum(golden[out], 0), what=out)
    assert not reader.misfits

    # What a token gets besides its projection: with projections of nothing, the learned null vector alone.
    inputs = jax.eval_shape(lambda key: perturbdiff.init(key, with_tables(config))["inputs"], jax.random.key(0))
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), inputs) | {"gene": golden["w/gene.null_emb.weight"][0]}
    zeros = jnp.zeros((*golden["gene_out_null"].shape[:2], n_genes))
    for method in ("of_state", "of_control"):
        tokens = run(perturbdiff.Inputs(config), inputs, zeros, method=lambda m, x, of=method: getattr(m, of)(x, None))
        close(tokens, golden["gene_out_null"])
        close(tokens, golden["gene_out_allzero"])


def with_tables(config):
    return replace(config, n_perturbations=1, n_cell_types=1, n_batches=1)


@each("embedders_")
def test_gene_embeddings_are_left_out(case):
    """The reference has an optional projection of 5120 features of a gene, which none of its runs uses."""
    names = [f"model.gene_embedding.{name}" for name in Golden(case).state("w/gene8.")]
    patterns = convert.left_out(Config(n_layers=1))
    kept = [name for name in names if not any(convert.re.fullmatch(pattern, name) for pattern in patterns)]
    assert len(names) == 5
    assert kept == ["model.gene_embedding.null_emb.weight"]


@each("covencoder_")
def test_covariate_encoder(case):
    golden = Golden(case)
    variants = [name.removesuffix("/out") for name in golden.arrays if name.endswith("/out")]
    assert variants
    for variant in variants:
        state = golden.state(f"{variant}/w/", to="cov_encoder.")
        settings = convert._covariates_of(state)
        if variant == "non":
            settings |= {"perturbation": "none", "n_perturbations": None}
        config = Config(n_genes=golden[f"{variant}/out"].shape[-1], **settings)
        reader = convert.Reader(state, config)
        params, constants = {"covariates": on_device(reader.covariates())}, reader.constants()
        assert set(reader.left) <= {"cov_encoder.dose_indices"}
        assert not reader.misfits
        frozen = sum(table is not None for table in constants)
        assert frozen == len(golden.arrays[f"{variant}/frozen_names"])
        index = golden[f"{variant}/pert"]
        ids = {"cell_type": golden["celltype"], "batch": golden["batch"]}
        ids["perturbation"] = index if variant in ("genept", "chemberta") else index + 1
        if config.n_doses is not None:
            ids["dose"] = golden[f"{variant}/w/dose_indices"][index]
        embed = partial(perturbdiff.covariate_embedding, params, constants=constants, config=config)
        close(embed(ids), golden[f"{variant}/out"], what=variant)
        # Ids that are one for all cells of a set give each of these cells the same.
        of_sets = {role: i[:, 0] for role, i in ids.items()}
        close(embed(of_sets)[:, 0], golden[f"{variant}/out"][:, 0], what=variant)


@each("covencoder_")
def test_tables_of_external_vectors(case):
    golden = Golden(case)
    table = partial(perturbdiff.vector_table, control_vector="scalar_mean", on_missing="zeros")
    names = golden.arrays["genept/pert_names_by_index"].tolist()
    raw = golden.arrays["genept/raw_embeddings"]
    known = [f"GENE{i}" for i in range(len(raw))]
    close(table(names, known, raw, control="non-targeting"), golden["genept/w/pert_encoder.0.weight"])

    drugs = [ast.literal_eval(name)[0][0] for name in golden.arrays["chemberta/pert_names_by_index"].tolist()]
    raw = golden.arrays["chemberta/raw_drug_embeddings"]
    known = [f"drug{i}" for i in range(len(raw))]
    close(table(drugs, known, raw, control="DMSO_TF"), golden["chemberta/w/drug_encoder.0.weight"])
    doses = [ast.literal_eval(name)[0][1] for name in golden.arrays["chemberta/pert_names_by_index"].tolist()]
    rank = np.unique(doses, return_inverse=True)[1]
    np.testing.assert_array_equal(rank, golden.arrays["chemberta/w/dose_indices"])
    raw = golden.arrays["llm/raw_celltype_embeddings"]
    cell_types = [f"type {i}" for i in range(len(raw))]
    close(table(cell_types, cell_types, raw), golden["llm/w/celltype_encoder.0.weight"])


# -- the network


def spaces_of(golden, state):
    """Which input projections each set goes through: that of the family whose name stands in the data set's."""
    families = convert.spaces_from_torch(state)
    if not families:
        return None
    found = [[i for i, f in enumerate(families) if f in str(name).lower()] for name in golden.arrays["ds_name"]]
    assert all(len(i) == 1 for i in found)
    return jnp.array([i[0] for i in found], jnp.int32)


def both_streams(golden, state, config, space, *, condition):
    """Streams after each layer, and what both heads make of the last: no part of the last layer left out."""
    reader = convert.Reader(dict(state), config)
    x, control = golden["x_in"], golden["control_in"]
    g = config.n_genes
    np.testing.assert_array_equal(control[..., g:], 0)
    inputs, params = perturbdiff.Inputs(config), on_device(reader.inputs(convert.spaces_from_torch(state)))
    of = lambda method, x: jax.vmap(  # noqa: E731
        lambda x, space: inputs.apply({"params": params}, x, space, method=method)
    )(x, space)
    x, control = of("of_state", x[..., :g]) + of("of_previous", x[..., g:]), of("of_control", control[..., :g])
    time = perturbdiff.TimeEmbedding(config).apply({"params": on_device(reader.time())}, golden["t"])
    embed, params = perturbdiff.Condition(config), {"params": on_device(reader.condition())}
    e = embed.apply(params, golden["cov_emb"]) if condition else embed.apply(params, method="nothing")[None, None]
    c = time[:, None] + e
    c = jax.nn.silu(c) if config.class_silu else c
    streams = []
    for i in range(config.n_layers):
        layer, params = perturbdiff.Layer(config, False), reader.layer(f"model.blocks.{i}.block", False)
        x, control = run(layer, params, x, control, c, method=whole_layer)
        streams.append((x, control))
    heads = [
        run(perturbdiff.Head(config), reader.head(f"model.{name}"), stream, c, method=whole_head)
        for name, stream in (("final_layer", x), ("control_final_layer", control))
    ]
    assert not reader.misfits
    return streams, heads


def network_of(golden, state):
    """Config and parameters of a network whose covariate encoder is not in the file: one of zeros."""
    spaces = convert.spaces_from_torch(state)
    config = golden.config(
        n_spaces=max(1, len(spaces)),
        class_silu=bool(golden.arrays.get("use_class_silu", False)),
        mlp_ratio=state["model.blocks.0.block.mlp.fc1.bias"].size / golden.number("hidden"),
        cell_type="none",
        batch="none",
        n_perturbations=1,
        d_covariate=1,
        covariate_width=int(golden["cov_emb"].shape[-1]),
    )
    width = config.width_of_covariates
    encoder = {"pert_encoder.weight": (1, 1), "transform.weight": (width, 1), "transform.bias": (width,)}
    state = state | {f"cov_encoder.{name}": np.zeros(shape, np.float32) for name, shape in encoder.items()}
    return state, config, on_device(convert.params_from_torch(state, config))


@each("backbone_")
def test_backbone(case):
    golden = Golden(case)
    state, config, params = network_of(golden, golden.state(to="model."))
    if "separate_embedder" in golden.arrays:
        assert (config.n_spaces > 1) == (golden.arrays["separate_embedder"].item() != "False")
    space, g = spaces_of(golden, state), config.n_genes
    x, x0_prev, control = golden["x_in"][..., :g], golden["x_in"][..., g:], golden["control_in"][..., :g]
    for prefix, covariates in (("", golden["cov_emb"]), ("uncond_", None)):
        out = perturbdiff.denoise(
            params, x, golden["t"], control, covariates, x0_prev, space=space, constants=Constants(), config=config
        )
        close(out, golden[f"{prefix}out_x"], 3e-5, f"{prefix}out_x")
        streams, heads = both_streams(golden, state, config, space, condition=covariates is not None)
        close(heads[0], golden[f"{prefix}out_x"], 3e-5, f"{prefix}out_x")
        close(heads[1], golden[f"{prefix}out_x_control"], 3e-5, f"{prefix}out_x_control")
        if not prefix:
            close(streams[-1][0], golden["out_pert_hidden"], 3e-5, "out_pert_hidden")
            close(streams[-1][1], golden["out_control_hidden"], 3e-5, "out_control_hidden")
            close(jnp.mean(out > 0), golden["frac_positive"], 1e-6)


def generated(name, k, shape, salt):
    """The recordings' formula for the weights of a large network."""
    i = np.arange(np.prod(shape), dtype=np.uint32)
    with np.errstate(over="ignore"):
        h = np.uint32(2654435761) * i + np.uint32((40503 * (k + 1) + salt) % 2**32)
        h ^= h >> np.uint32(15)
        h *= np.uint32(2246822519)
        h ^= h >> np.uint32(13)
        h *= np.uint32(3266489917)
        h ^= h >> np.uint32(16)
    u = 2 * (h.astype(np.float64) + 0.5) / 2**32 - 1
    if name.endswith(("q_norm.weight", "k_norm.weight", "layer_norm.weight")):
        u = 1 + 0.1 * u
    elif name.endswith("bias"):
        u = 0.05 * u
    elif "null_emb" in name:
        u = 0.5 * u
    else:
        u = u * np.sqrt(3 / shape[-1])
    return u.reshape(shape).astype(np.float32)


def shape_of(name, d, g, heads):
    """Of a tensor of the reference's network, MLP ratio 4."""
    outputs_inputs = {
        "x_embedder": (d, 2 * g),
        "x_control_embedder": (d, 2 * g),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "class_embedding.emb": (d, g),
        "class_embedding.null_emb": (1, d),
        "gene_embedding.null_emb": (1, d),
        "gene_embedding.gene_embedding": (d, 5120),
        "gene_embedding.layer_norm": (d,),
        "attn.qkv": (6 * d, 2 * d),
        "attn.proj": (2 * d, 2 * d),
        "attn.q_norm": (2 * d // heads,),
        "attn.k_norm": (2 * d // heads,),
        "mlp.fc1": (4 * d, d),
        "mlp.fc2": (d, 4 * d),
        "block.adaLN_modulation.1": (6 * d, d),
        "control_adaLN_modulation.1": (6 * d, d),
        "final_layer.linear": (g, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    module, _, leaf = name.rpartition(".")
    shape = outputs_inputs[max((m for m in outputs_inputs if module.endswith(m)), key=len)]
    return shape if leaf == "weight" else shape[:1]


@each("backbone_det_")
def test_large_backbone_with_gradients(case):
    golden = Golden(case)
    names = golden.arrays["sorted_param_names"].tolist()
    d, g, heads = golden.number("hidden"), golden.number("genes"), golden.number("heads")
    weights = {
        f"model.{name}": generated(name, k, shape_of(name, d, g, heads), golden.number("salt"))
        for k, name in enumerate(names)
    }
    close([w.sum(dtype=np.float64) for w in weights.values()], golden["param_checksum"], 1e-6)
    close([w.ravel()[0] for w in weights.values()], golden["param_first"], 1e-6)
    state, config, params = network_of(golden, weights)
    x, x0_prev, control = golden["x_in"][..., :g], golden["x_in"][..., g:], golden["control_in"][..., :g]

    def predict(params, covariates):
        return perturbdiff.denoise(
            params, x, golden["t"], control, covariates, x0_prev, constants=Constants(), config=config
        )

    def loss(params):
        out, target = predict(params, golden["cov_emb"]), golden["target"]
        return jnp.mean((out - target) ** 2) + jnp.mean(jax.vmap(energy_distance)(target, out)), out

    (value, out), grads = jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(out, golden["out_x"], 3e-5)
    close(jnp.mean(out > 0), golden["frac_positive"], 1e-3)
    close(jit(predict)(params, None), golden["uncond_out_x"], 3e-5)
    close(value, golden["loss"], 3e-4)
    streams, (_, of_control) = both_streams(golden, state, config, None, condition=True)
    close(of_control, golden["out_x_control"], 3e-5)
    for i, name in enumerate(("pert", "control")):
        close(jnp.stack([s[i][..., :8] for s in streams]), golden[f"{name}_hidden_after_each_block_first8"], 3e-5, name)
    grads = in_torch_s_layout(state, config, grads)
    # Norms were recorded by PyTorch's float32 norm, which falls short by up to 2e-4 on millions of entries.
    for name, norm in zip(names, golden.arrays["grad_norm_by_sorted_name"], strict=True):
        grad = grads[f"model.{name}"]
        rtol = 1e-4 if grad.size < 2**19 else 3e-4
        np.testing.assert_allclose(np.linalg.norm(grad), max(norm, 0), rtol=rtol, err_msg=name)
    for name, first in golden.state("grad/").items():
        close(grads[f"model.{name}"].ravel()[: first.size], first, 2e-4, name)


# -- training


def coins_of(case, n_sets):
    every = lambda word: jnp.full(n_sets, word in case)  # noqa: E731
    shown = jnp.full(n_sets, "selfcond" in case or "dropcontrol" in case)
    return Coins(hide_condition=every("dropcond"), hide_control=every("dropcontrol"), self_condition=shown)


@each("trainloss_")
def test_training_loss(case):
    golden = Golden(case)
    config, params, constants = golden.whole(energy_weight=golden.number("mmd_factor"))
    config = replace(config, n_times=1000, schedule="linear")
    batch = CellSetBatch(
        cells=golden["pert_emb"],
        control=golden["cont_emb"],
        covariates=golden.covariates(),
        mask=jnp.ones(golden["pert_emb"].shape[:2], bool),
    )
    t, noise = golden["t"], golden["noise"]
    close(diffuse(make_schedule("linear", 1000), batch.cells, t, noise), golden["x_t"], 1e-6)
    embedding = perturbdiff.covariate_embedding(params, batch.covariates, constants=constants, config=config)
    close(jnp.broadcast_to(embedding, golden["cov_emb"].shape), golden["cov_emb"])
    loss = jit(
        jax.value_and_grad(partial(perturbdiff.loss_at, constants=constants), has_aux=True), static_argnames="config"
    )
    state = golden.state()
    settings = [name.removesuffix("/loss") for name in golden.arrays if name.endswith("/loss")]
    assert settings
    for name in settings:
        of = lambda key: golden[f"{name}/{key}"]  # noqa: E731, B023
        coins = coins_of(name, len(t))
        (value, terms), grads = loss(params, batch, t, noise, coins, config=config)
        close(value, of("loss"), 3e-4, name)
        close(terms["denoising"], of("loss_mse_only"), 1e-5, name)
        close(terms["denoising"], of("mse_per_set").mean(), 1e-5, name)
        close(terms["energy_distance"], of("mmd_mean"), 3e-4, name)
        close(terms["energy_distance"], of("loss_mmd_only"), 3e-4, name)
        close(terms["denoising"] + 0.3 * terms["energy_distance"], of("loss_mmd_factor_0.3"), 3e-4, name)
        close(value, terms["denoising"] + config.energy_weight * terms["energy_distance"], 1e-6, name)
        # Each id given for a cell instead of a set, and each set alone.
        (again, _), _ = loss(
            params, replace(batch, covariates=golden.covariates("cell")), t, noise, coins, config=config
        )
        close(again, value, 1e-5)
        for i in range(len(t)):
            one = lambda tree, i=i: jax.tree.map(lambda a: a[i : i + 1], tree)  # noqa: E731
            (_, terms), _ = loss(params, one(batch), t[i : i + 1], one(noise), one(coins), config=config)
            close(terms["denoising"], of("mse_per_set")[i], 1e-5, f"{name}, set {i}")
            close(terms["energy_distance"], of("mmd_per_set")[i], 3e-4, f"{name}, set {i}")
        grads = in_torch_s_layout(state, config, grads)
        names, norms = golden.arrays[f"{name}/grad_names"], golden.arrays[f"{name}/grad_norms"]
        got = [np.linalg.norm(grads[n]) for n in names]
        np.testing.assert_allclose(got, norms, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(np.linalg.norm(got), of("total_grad_norm"), rtol=1e-4, err_msg=name)
        assert {n for n in grads if n not in names} <= set(golden.arrays[f"{name}/none_grad_names"].tolist())
        assert not any(np.any(grads[n]) for n in golden.arrays[f"{name}/none_grad_names"] if n in grads)
        for leaf, wanted in golden.state(f"{name}/grad/").items():
            close(grads[leaf], wanted, 2e-4, f"{name}, {leaf}")


# -- sampling


@each("sampling_")
def test_reverse_steps(case):
    golden = Golden(case)
    config, params, constants = golden.whole()
    cutoff, schedule = golden.number("cutoff"), make_schedule(golden.number("schedule"), golden.number("steps"))
    x, previous, z = golden["x"], golden["prev_pred"], golden["step_noise"]
    covariates = golden.covariates()
    embedding = perturbdiff.covariate_embedding(params, covariates, constants=constants, config=config)
    close(jnp.broadcast_to(embedding, golden["cov_emb"].shape), golden["cov_emb"])

    @jit
    def predict(t, covariates):
        t = jnp.full(len(x), t)
        return perturbdiff.denoise(
            params, x, t, golden["cont_emb"], covariates, previous, constants=constants, config=config
        )

    tolerance = 5e-4 if golden.number("schedule") == "linear" else 2e-3
    for index, t in enumerate(golden["step_t"]):
        conditional, without = predict(t, covariates), predict(t, None)
        if index == 2:
            close(conditional, golden["raw_cond_out"], 3e-5)
            close(without, golden["raw_uncond_out"], 3e-5)
        for w in golden.arrays["guidances"].tolist():
            at = lambda name: golden[f"t{t}/w{w}/{name}"]  # noqa: E731, B023
            x0 = guide(conditional, without, 1 + w)
            x0 = jnp.where(x0 < cutoff, 0, x0)
            expected = at("pred_xstart")
            # A prediction within a rounding of the cut-off may fall on either side of it.
            same = np.asarray((x0 > 0) == (expected > 0)) | (np.abs(x0 - expected) < 2 * cutoff)
            assert same.all()
            close(x0, expected, tolerance)
            close(posterior(schedule, x0, x, t).mean, at("mean"), tolerance)
            variance = schedule.betas[int(t)] if t > 0 else schedule.posterior_variance[1]
            close(at("variance"), variance, 1e-5)
            close(at("log_variance"), np.log(variance), 1e-5)
            for name in under(golden.arrays, f"t{t}/w{w}/"):
                kind, _, how = name.partition("_")
                if kind == "ddpm":
                    got = ddpm_step(schedule, x0, x, t, z, variance=how.removeprefix("fixed_"))
                elif kind == "ddim":
                    got = ddim_step(schedule, x0, x, t, z, eta=float(how.removeprefix("eta")))
                else:
                    continue
                close(got, at(name), tolerance, f"{name} at t={t}, w={w}")


@each("sampling_")
def test_sampling_loops(case):
    golden = Golden(case)
    n = golden.number("loop_from")
    config, params, constants = golden.whole(schedule=golden.number("schedule"), n_times=golden.number("steps"))
    assert "ddpm_loop_noise" in golden.arrays
    draw = partial(
        perturbdiff.sample,
        constants=constants,
        config=config,
        n_steps=n,
        spacing="truncated",
        guidance=2.0,
        cutoff=golden.number("cutoff"),
        start=golden["loop_init"],
        trajectory=True,
    )
    draw = jit(draw, static_argnames=("sampler",))
    inputs = (params, golden["cont_emb"], golden.covariates(), jax.random.key(0))
    path = draw(*inputs, sampler="ddim")
    close(path.x, golden["ddim_loop_samples"], 5e-4)
    close(path.x0, golden["ddim_loop_pred_xstart"], 5e-4)
    path = draw(*inputs, sampler="ddpm", noise=golden["ddpm_loop_noise"])
    close(path.x, golden["ddpm_loop_samples"], 5e-4)
