"""The PyTorch peer of the benchmarks computes what the published scDFM computes."""

import importlib.util
import json
import math
import zlib
from pathlib import Path

import goldens
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="benchmarks' other side; of the extra 'torch'")

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("torch_scdfm", ROOT / "benchmarks" / "peers" / "torch_scdfm.py")
peer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peer)

EXACT = {"atol": 3e-6, "rtol": 1e-5}
WIDE = {"atol": 1e-5, "rtol": 1e-5}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recorded():
    """Reads a case: its arrays as tensors, integers and names as NumPy has them, and its settings."""
    goldens.require("scdfm")

    def read(name):
        arrays = goldens.load("scdfm", name)
        return arrays, json.loads(str(arrays["meta_json"]))

    return read


def tensors(arrays, prefix, dtype=torch.float32):
    values = {name: torch.from_numpy(value) for name, value in goldens.under(arrays, prefix).items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}


def close(got, wanted, *, atol=0.0, rtol=0.0):
    np.testing.assert_allclose(got.detach().numpy(), wanted, atol=atol, rtol=rtol)


def load_weights(module, arrays, dtype=torch.float32):
    module.load_state_dict(tensors(arrays, "w/", dtype))
    return module.to(dtype).eval()


def model_of(arrays, meta, dtype=torch.float32, *, weights=None):
    """The peer with the weights of a case, without dropout."""
    model = peer.ScDFM(
        torch.from_numpy(arrays["in/mask"]),
        n_tokens=meta["ntoken"],
        d_model=meta["d_model"],
        n_heads=meta["num_heads"],
        n_layers=meta["nlayers"],
        fusion=meta.get("fusion_method", "differential_perceiver"),
        perturbation="gene" if meta.get("perturbation_function", "crisper") == "crisper" else "table",
    )
    if weights is None:
        return load_weights(model, arrays, dtype)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.to(dtype).eval()


def from_recipe(arrays, meta):
    """Weights of the wide cases: drawn from each tensor's name, as the recordings' README says."""
    weights = {}
    for name, text, sums in zip(
        arrays["recipe/names"], arrays["recipe/shapes"], arrays["recipe/sum_and_abssum"], strict=True
    ):
        name, shape = str(name), tuple(int(n) for n in str(text).split(","))
        if name.endswith("embedding.weight") or name == "p_mask_embed":
            offset, scale = 0.0, 1.0
        elif ".lambda_" in name:
            offset, scale = 0.0, 0.3
        elif len(shape) == 1 and name.endswith("weight"):
            offset, scale = 1.0, 0.1
        elif len(shape) == 1:
            offset, scale = 0.0, 0.05
        else:
            offset, scale = 0.0, math.sqrt(2 / sum(shape))
        draws = np.random.RandomState(zlib.crc32(f"{meta['recipe_seed']}:{name}".encode())).standard_normal(shape)
        weights[name] = (offset + scale * draws).astype(np.float32)
        exact = weights[name].astype(np.float64)
        np.testing.assert_allclose([exact.sum(), np.abs(exact).sum()], sums, rtol=1e-9, atol=1e-9)
    return weights


@pytest.mark.parametrize(
    "case", [f"diff_attention_{kind}_depth{depth}" for kind in ("kfromx", "second") for depth in (0, 3)]
)
def test_differential_attention(case, recorded):
    arrays, meta = recorded(case)
    attention = peer._DifferentialAttention(
        meta["d_model"], meta["num_heads"], depth=meta["depth"], keys_from_other=meta["cross"]
    )
    given = tensors(arrays, "in/")
    close(load_weights(attention, arrays)(given["noisy_y"], given["x"]), arrays["out/y"], **EXACT)


@pytest.mark.parametrize("case", ["diff_block", "diff_block_cross", "diff_perceiver_block", "perceiver_block"])
def test_layers(case, recorded):
    arrays, meta = recorded(case)
    sizes = {"d_model": meta["d_model"], "n_heads": meta["num_heads"]}
    if case == "diff_perceiver_block":
        layer = peer._DifferentialPerceiverLayer(**sizes, depth=meta["depth"])
    elif case == "perceiver_block":
        layer = peer._PerceiverLayer(**sizes, dropout=0.1)
    else:
        layer = peer._DifferentialBlock(**sizes, depth=meta["depth"], keys_from_other=case == "diff_block_cross")
    given = tensors(arrays, "in/")
    close(load_weights(layer, arrays)(given["y"], given["x"], given["c"]), arrays["out/y"], **EXACT)


def test_gene_encoder(recorded):
    arrays, meta = recorded("gene_encoder")
    encoder = peer._GeneEncoder(meta["ntoken"], meta["d_model"], torch.from_numpy(arrays["in/mask"]), 0.1)
    encoder, given = load_weights(encoder, arrays), tensors(arrays, "in/")
    close(encoder(given["gene_ids"]), arrays["out/gene_emb"], **EXACT)
    tokens = encoder(given["pert_ids"])
    close(tokens, arrays["out/pert_tokens"], **EXACT)
    close(tokens.mean(1), arrays["out/pert_emb"], **EXACT)


@pytest.mark.parametrize("case", ["diff_perceiver", "diff_perceiver_subset", "diff_transformer", "perceiver", "drug"])
def test_velocity(case, recorded):
    arrays, meta = recorded(f"velocity_{case}")
    model, given = model_of(arrays, meta), tensors(arrays, "in/")
    genes, x_t, source, perturbation = (given[name] for name in ("gene_ids", "x_t", "source", "pert_ids"))
    close(model(genes, x_t, given["t"], source, perturbation), arrays["out/velocity"], **EXACT)
    scalar = model(genes, x_t, torch.tensor(meta["scalar_t"]), source, perturbation)
    close(scalar, arrays["out/velocity_scalar_t"], **EXACT)
    close(model.embed_perturbation(perturbation), arrays["out/pert_emb"], **EXACT)
    predicted = model.predict_perturbation(genes, x_t, torch.tensor(1.0), source, perturbation)
    close(predicted, arrays["out/pred_p"], **EXACT)


@pytest.mark.parametrize("pair", range(5))
def test_mmd(pair, recorded):
    arrays, _ = recorded("mmd")
    x, y = torch.from_numpy(arrays[f"{pair}/X"]).requires_grad_(), torch.from_numpy(arrays[f"{pair}/Y"])
    sigmas = peer.bandwidths(y)
    close(sigmas, arrays[f"{pair}/sigmas"], rtol=1e-5)
    value = peer.mmd2(x, y, sigmas)
    close(value, arrays[f"{pair}/mmd2_exact_f64"], atol=2e-6)
    (gradient,) = torch.autograd.grad(value, x)
    wanted = arrays[f"{pair}/grad_X"]
    close(gradient, wanted, atol=1e-4 * np.abs(wanted).max())


def test_training_step(recorded):
    """Every term, every gradient and the steps of Adam, in double precision as the finest recordings are."""
    case, meta = recorded("train_step_gaussian_mmd")
    model = model_of(case, meta, torch.float64)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    given, step, adam = tensors(case, "in/", torch.float64), tensors(case, "step/", torch.float64), meta["adam"]
    optimizer, scheduler = peer.make_optimizer(
        model, learning_rate=adam["lr"], last_rate=adam["eta_min"], n_steps=adam["T_max"], betas=tuple(adam["betas"])
    )
    columns = given["gene_ids"], given["source"], given["target"], given["pert_ids"]
    drawn = {"permutation": step["gene_perm"], "t": step["t"], "x0": step["x0"]}
    close(peer.bandwidths(step["x1"]), case["step/sigmas"], rtol=1e-5)

    rates, losses, gradients = [], [], {}
    for n in range(adam["steps"]):
        rates += scheduler.get_last_lr()
        terms = peer.train_step(
            model, optimizer, scheduler, *columns, n_subset=meta["infer_top_gene"], gamma=meta["gamma"], **drawn
        )
        losses.append(terms.total.item())
        if n == 0:
            close(terms.flow, case["step/mse"], rtol=1e-5)
            close(terms.mmd2, case["step/mmd2"], atol=2e-6)
            close(terms.total, case["step/loss"], rtol=1e-5)
            gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    np.testing.assert_allclose(rates, case["adam/lrs"], rtol=1e-9)
    np.testing.assert_allclose(losses, case["adam/losses_f64"][:-1], rtol=1e-5)

    for name, norm in zip(case["gradnorm/names"], case["gradnorm/values_f64"], strict=True):
        if norm < 0:  # none was recorded
            assert name not in gradients
        else:
            np.testing.assert_allclose(gradients[name].norm(), norm, rtol=1e-4, err_msg=name)
    for name, wanted in goldens.under(case, "grad/").items():
        close(gradients[name], wanted, atol=1e-4 * np.abs(wanted).max())

    after = dict(model.named_parameters())
    for name, wanted in goldens.under(case, "adam/after_f64/").items():
        close(after[name], wanted, atol=2e-6)
    norms = case["adam/param_update_norms_f64"]
    assert norms.max() > 1e-2
    for name, norm in zip(case["adam/param_names"], norms, strict=True):
        # The keys' bias has a gradient of rounding noise only, which Adam blows up.
        rtol = 5e-2 if name.endswith("in_proj_bias") else 1e-3
        np.testing.assert_allclose((after[name] - before[name]).norm().detach(), norm, rtol=rtol, err_msg=name)


def test_sampling(recorded):
    arrays, meta = recorded("rk4_sample")
    model, given = model_of(arrays, meta), tensors(arrays, "in/")
    times = []
    model.register_forward_pre_hook(lambda _, inputs: times.append(float(inputs[2])))
    got = peer.sample(
        model, given["gene_ids"], given["source"], given["pert_ids"], ts=given["t_grid"], x0=given["noise"]
    )
    close(got, arrays["out/sample"], atol=1e-5)
    np.testing.assert_allclose(times, arrays["out/eval_times"], atol=1e-6)
    assert (arrays["out/traj"][-1] < 0).any()  # or the cut at 0 would show nothing


def test_solver(recorded):
    arrays, _ = recorded("rk4_solver_only")
    given = tensors(arrays, "in/", torch.float64)

    def field(t, y):
        return torch.sin(3 * t) + y @ given["A"] - 0.3 * y**3

    close(peer.rk4_38(field, given["y0"], given["t_grid"]), arrays["out/traj20"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", ["runsh_d128", "runsh_d512_as_instantiated"])
def test_published_sizes(case, recorded):
    arrays, meta = recorded(case)
    model, given = model_of(arrays, meta, weights=from_recipe(arrays, meta)), tensors(arrays, "in/")
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]
    assert len(model.state_dict()) == meta["n_tensors"]
    genes, source, perturbation = given["gene_ids"], given["source"], given["pert_ids"]
    close(model.encoder(genes[:1]), arrays["out/gene_emb"], **WIDE)
    close(model.embed_perturbation(perturbation), arrays["out/pert_emb"], **WIDE)
    close(model(genes, given["x_t"], given["t"], source, perturbation), arrays["out/velocity"], **WIDE)

    # Gradients in double precision: single precision moves those of lambda by 3e-4, the recorded ones too.
    model, given = model.double(), tensors(arrays, "in/", torch.float64)
    terms = peer.loss(
        model,
        genes[0],
        given["source"],
        given["x1"],
        perturbation,
        gamma=meta["gamma"],
        t=given["t"],
        x0=given["x0"],
    )
    close(terms.flow, arrays["loss/mse"], rtol=1e-5)
    close(terms.mmd2, arrays["loss/mmd2"], atol=2e-6)
    close(terms.total, arrays["loss/total"], rtol=1e-5)
    terms.total.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    for name, norm in zip(arrays["grad/names"], arrays["grad/norms"], strict=True):
        if norm < 0:
            assert gradients[name] is None
        else:
            np.testing.assert_allclose(gradients[name].norm(), norm, rtol=3e-4, err_msg=name)
    for name in ("final_layer.fc.4.weight", "blocks.0.diff_self_attn.attn.lambda_q1", "value_encoder_1.linear1.weight"):
        wanted = arrays[f"grad/{name}"]
        close(gradients[name], wanted, atol=3e-4 * np.abs(wanted).max())


def tiny():
    mask = torch.ones(9, 9, dtype=torch.bool).fill_diagonal_(False)
    return peer.ScDFM(mask, n_tokens=9, d_model=16, n_layers=1), torch.arange(4, 9), torch.tensor([[5, 3]] * 3)


def test_dropout_is_on_in_training_and_off_in_sampling():
    torch.manual_seed(0)
    model, genes, perturbation = tiny()
    x, ts = torch.rand(3, 5), torch.linspace(0, 1, 3)
    model.train()
    ids, t = genes.expand(3, -1), torch.tensor(0.5)
    assert not torch.equal(model(ids, x, t, x, perturbation), model(ids, x, t, x, perturbation))
    first, second = (peer.sample(model, genes, x, perturbation, ts=ts, x0=x) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, peer.sample(model, genes, x, perturbation, ts=ts))  # the noise it starts from


def test_the_learning_rate_falls_along_a_cosine():
    model, _, _ = tiny()
    optimizer, scheduler = peer.make_optimizer(model, n_steps=10)
    rates = []
    for _ in range(11):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    half = 1e-6 + (5e-5 - 1e-6) / 2
    assert [rates[0], rates[5], rates[10]] == pytest.approx([5e-5, half, 1e-6])


def test_wrong_settings_are_refused():
    mask = torch.zeros(6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="n_heads must divide d_model; got n_heads=8, d_model=20"):
        peer.ScDFM(mask, n_tokens=6, d_model=20)
    with pytest.raises(ValueError, match="fusion must be one of .*; got 'cross'"):
        peer.ScDFM(mask, n_tokens=6, d_model=16, fusion="cross")
    with pytest.raises(ValueError, match="perturbation must be one of 'gene', 'table'; got 'drug'"):
        peer.ScDFM(mask, n_tokens=6, d_model=16, perturbation="drug")
