"""PerturbDiff as its published PyTorch program computes it, written anew to be timed; checked on its numbers.

Same operations in the same order: the covariates of every cell are encoded, and every cell has its own six modulations
a block and stream, though a set has one condition; the control head is computed and used nowhere; a first pass without
gradient gives the self-condition; the energy distance is that of geomloss, written out, and is evaluated once more for
the log; a reverse step calls the network once with the condition and once without, and combines the two as noise. One
thing is cheaper here than there, so a comparison flatters this side: no training framework stands around the step.

Needs torch and numpy. Parameters carry the names of the published state dict.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Average",
    "Backbone",
    "Diffusion",
    "PerturbDiff",
    "Step",
    "Terms",
    "energy",
    "linear_diffusion",
    "loss",
    "make_optimizer",
    "reverse_step",
    "sample",
    "train_step",
]

N_FREQUENCIES = 128  # of the time embedding
N_GENE_FEATURES = 5120  # of the projection that the published network holds and does not use
SMALLEST_SQUARE = 1e-8  # under the root of a distance
CUTOFF = 1e-4  # a sampled value below it is set to 0


class _Mlp(nn.Module):
    def __init__(self, d_model: int, ratio: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, int(ratio * d_model)), nn.Linear(int(ratio * d_model), d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class _RMSNorm(nn.Module):
    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_dims))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


class _Attention(nn.Module):
    """Self-attention among the cells of a set."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = _RMSNorm(width // n_heads), _RMSNorm(width // n_heads)

    def forward(self, x: Tensor) -> Tensor:
        n_sets, n_cells, width = x.shape
        parts = self.qkv(x).view(n_sets, n_cells, 3, self.n_heads, width // self.n_heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        pulled = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(pulled.transpose(1, 2).reshape(x.shape))


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return _norm(x) * (1 + scale) + shift


def _modulation(d_model: int, n_parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(d_model, n_parts * d_model))


class _Block(nn.Module):
    """Both streams attend as one token a cell, of twice the width; attention and MLP read the block's input."""

    def __init__(self, d_model: int, n_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = _Attention(2 * d_model, n_heads)
        self.mlp, self.control_mlp = _Mlp(d_model, mlp_ratio), _Mlp(d_model, mlp_ratio)
        self.adaLN_modulation, self.control_adaLN_modulation = _modulation(d_model, 6), _modulation(d_model, 6)

    def forward(self, x: Tensor, control: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        c_shift1, c_scale1, c_gate1, c_shift2, c_scale2, c_gate2 = self.control_adaLN_modulation(c).chunk(6, dim=-1)
        both = torch.cat([_modulate(x, shift1, scale1), _modulate(control, c_shift1, c_scale1)], dim=-1)
        pulled, c_pulled = self.attn(both).chunk(2, dim=-1)
        after = x + gate1 * pulled + gate2 * self.mlp(_modulate(x, shift2, scale2))
        c_after = control + c_gate1 * c_pulled + c_gate2 * self.control_mlp(_modulate(control, c_shift2, c_scale2))
        return after, c_after


class _CrossBlock(nn.Module):
    """Only a level of the published names."""

    def __init__(self, *sizes) -> None:
        super().__init__()
        self.block = _Block(*sizes)

    def forward(self, x: Tensor, control: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x, control, c)


class _Head(nn.Module):
    def __init__(self, d_model: int, n_genes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, n_genes)
        self.adaLN_modulation = _modulation(d_model, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(_modulate(x, *self.adaLN_modulation(c).chunk(2, dim=-1)))


class _TimeEmbedder(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * N_FREQUENCIES, d_model), nn.SiLU(), nn.Linear(d_model, d_model))

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype
        i = torch.arange(N_FREQUENCIES, dtype=dtype, device=t.device)
        angles = t.to(dtype).unsqueeze(-1) * torch.exp(-math.log(10_000.0) * i / N_FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)).unsqueeze(1)


class _GeneEmbedding(nn.Module):
    """A learned vector added to every token; the projection and its norm are held, averaged, and never used."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gene_embedding, self.layer_norm = nn.Linear(N_GENE_FEATURES, d_model), nn.LayerNorm(d_model)
        self.null_emb = nn.Embedding(1, d_model)


class _ClassEmbedding(nn.Module):
    def __init__(self, n_genes: int, d_model: int) -> None:
        super().__init__()
        self.emb, self.null_emb = nn.Linear(n_genes, d_model), nn.Embedding(1, d_model)

    def forward(self, condition: Tensor | None, n_sets: int) -> Tensor:
        if condition is None:
            return self.null_emb(torch.zeros(n_sets, 1, dtype=torch.int64, device=self.null_emb.weight.device))
        return self.emb(functional.silu(condition))


class Backbone(nn.Module):
    """The network: [sets, cells, 2 genes] of each stream -> [sets, cells, genes] of each, not below 0."""

    def __init__(
        self,
        n_genes: int,
        *,
        d_model: int = 512,
        n_layers: int = 8,
        n_heads: int = 8,
        mlp_ratio: float = 4.0,
        class_silu: bool = False,
    ) -> None:
        super().__init__()
        if 2 * d_model % n_heads:
            raise ValueError(f"n_heads must divide 2 d_model; got n_heads={n_heads}, d_model={d_model}.")
        self.class_silu = class_silu
        self.x_embedder, self.x_control_embedder = nn.Linear(2 * n_genes, d_model), nn.Linear(2 * n_genes, d_model)
        self.gene_embedding = _GeneEmbedding(d_model)
        self.t_embedder = _TimeEmbedder(d_model)
        self.class_embedding = _ClassEmbedding(n_genes, d_model)
        self.blocks = nn.ModuleList(_CrossBlock(d_model, n_heads, mlp_ratio) for _ in range(n_layers))
        self.final_layer, self.control_final_layer = _Head(d_model, n_genes), _Head(d_model, n_genes)
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if "adaLN_modulation" in name:
                nn.init.zeros_(module.weight)
            elif name.startswith(("t_embedder", "gene_embedding")):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def tokens(self, x: Tensor, control: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Both streams after the last block [sets, cells, d], and what modulates them [sets, 1 or cells, d]."""
        null = self.gene_embedding.null_emb.weight
        h, h_control = self.x_embedder(x) + null, self.x_control_embedder(control) + null
        c = self.t_embedder(t) + self.class_embedding(condition, len(x))
        c = functional.silu(c) if self.class_silu else c
        for block in self.blocks:
            h, h_control = block(h, h_control, c)
        return h, h_control, c

    def forward(self, x: Tensor, control: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        h, h_control, c = self.tokens(x, control, t, condition)
        return torch.relu(self.final_layer(h, c)), torch.relu(self.control_final_layer(h_control, c))


class _CovariateEncoder(nn.Module):
    """Three ids of every cell -> [sets, cells, genes]; row 0 of the perturbations' table is that of id -1."""

    def __init__(self, n_genes: int, n_perturbations: int, n_cell_types: int, n_batches: int, d: int) -> None:
        super().__init__()
        self.pert_encoder = nn.Embedding(n_perturbations + 1, d)
        self.celltype_encoder, self.batch_encoder = nn.Embedding(n_cell_types, d), nn.Embedding(n_batches, d)
        self.transform = nn.Linear(3 * d, n_genes)

    def forward(self, perturbation: Tensor, cell_type: Tensor, batch: Tensor) -> Tensor:
        parts = self.pert_encoder(perturbation + 1), self.celltype_encoder(cell_type), self.batch_encoder(batch)
        return self.transform(torch.cat(parts, dim=-1))


class PerturbDiff(nn.Module):
    """Network and covariate encoder. Arrays are expression / 10; `condition` is what `cov_encoder` gives, or None.

    Args:
        n_genes: of a cell.
        n_perturbations, n_cell_types, n_batches: ids of each table, the control's perturbation included.
        d_covariate: width of a covariate.
        **sizes: of `Backbone`.
    """

    def __init__(
        self,
        n_genes: int,
        *,
        n_perturbations: int,
        n_cell_types: int,
        n_batches: int,
        d_covariate: int = 128,
        **sizes,
    ) -> None:
        super().__init__()
        self.model = Backbone(n_genes, **sizes)
        self.cov_encoder = _CovariateEncoder(n_genes, n_perturbations, n_cell_types, n_batches, d_covariate)

    def forward(self, x_t: Tensor, x_self: Tensor, control: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """The cells without noise, [sets, cells, genes]."""
        x, _ = self.model(
            torch.cat([x_t, x_self], dim=-1), torch.cat([control, torch.zeros_like(control)], dim=-1), t, condition
        )
        return x


class Diffusion(NamedTuple):
    """A noise schedule, float64[times]; `variance` is the one of a DDPM step that the published program takes."""

    betas: Tensor
    alpha_bars: Tensor
    alpha_bars_before: Tensor
    posterior_variance: Tensor
    variance: Tensor


def linear_diffusion(n_times: int = 1000) -> Diffusion:
    betas = np.linspace(1e-4, 0.02, n_times) * (1000 / n_times)
    alpha_bars = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bars[:-1])
    posterior = betas * (1 - before) / (1 - alpha_bars)
    variance = np.append(posterior[1], betas[1:])
    return Diffusion(*map(torch.from_numpy, (betas, alpha_bars, before, posterior, variance)))


def _at(table: Tensor, t: Tensor) -> Tensor:
    """[sets, 1, 1] in single precision, as the published program gathers its tables."""
    return table.to(t.device)[t].float().view(-1, 1, 1)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """[sets, n, m], through the expanded square."""
    squares = x.square().sum(-1).unsqueeze(2) - 2 * (x @ y.transpose(1, 2)) + y.square().sum(-1).unsqueeze(1)
    return squares.clamp(min=SMALLEST_SQUARE).sqrt()


class _TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


def energy(x: Tensor, y: Tensor) -> Tensor:
    """[sets]: E|x - y| - E|x - x'| / 2 - E|y - y'| / 2, all pairs. Within a set one side is differentiated."""
    within_x = _distances(_TwiceTheGradient.apply(x), x.detach()).mean((1, 2))
    within_y = _distances(_TwiceTheGradient.apply(y), y.detach()).mean((1, 2))
    return _distances(x, y).mean((1, 2)) - within_x / 2 - within_y / 2


class Terms(NamedTuple):
    """`total` is the mean of `mse` + weight times the mean of `energy`, both [sets]."""

    total: Tensor
    mse: Tensor
    energy: Tensor


def loss(
    model: PerturbDiff,
    diffusion: Diffusion,
    target: Tensor,
    control: Tensor,
    covariates: tuple[Tensor, Tensor, Tensor],
    *,
    energy_weight: float = 1.0,
    log_again: bool = True,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    drop_condition: bool | None = None,
    drop_control: bool = False,
    self_condition: bool | None = None,
) -> Terms:
    """Squared error of the cells without noise, and energy distance between the sets.

    Args:
        model: whose `cov_encoder` reads `covariates`.
        diffusion: the noise schedule.
        target, control: [sets, cells, genes], expression / 10.
        covariates: int[sets, cells] of perturbation (-1: none), cell type, batch.
        energy_weight: of the distance.
        log_again: evaluate the distance a second time, without gradient, as the published log does.
        t: int[sets]; None draws it.
        noise: [sets, cells, genes], double precision; None draws it.
        drop_condition, self_condition: None tosses a coin for the whole batch.
        drop_control: a control of zeros.
    """
    t = torch.randint(len(diffusion.betas), (len(target),), device=target.device) if t is None else t
    noise = torch.randn(target.shape, dtype=torch.float64, device=target.device) if noise is None else noise
    alpha_bar = diffusion.alpha_bars
    x_t = (_at(alpha_bar.sqrt(), t) * target + _at((1 - alpha_bar).sqrt(), t) * noise).to(target.dtype)
    control = torch.zeros_like(control) if drop_control else control
    condition = model.cov_encoder(*covariates)
    if _coin(drop_condition):
        condition = None
    x_self = torch.zeros_like(target)
    if _coin(self_condition):
        with torch.no_grad():
            x_self = model(x_t, x_self, control, t, condition)
    predicted = model(x_t, x_self, control, t, condition)
    mse = (target - predicted).square().mean((1, 2))
    discrepancy = energy(predicted, target)
    if log_again:
        with torch.no_grad():
            discrepancy_logged = energy(predicted, target)
    else:
        discrepancy_logged = discrepancy.detach()
    return Terms((mse + energy_weight * discrepancy.mean()).nanmean(), mse.detach(), discrepancy_logged)


def _coin(given: bool | None) -> bool:
    return bool(torch.rand(()) < 0.5) if given is None else given


class Average:
    """The moving average of all weights, updated at steps 0, `every`, 2 `every` ...; the first update copies."""

    def __init__(self, model: nn.Module, decay: float = 0.99, every: int = 10) -> None:
        self.decay, self.every = decay, every
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.started = False

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        if step % self.every:
            return
        for kept, now in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if self.started:
                kept.mul_(self.decay).add_(now, alpha=1 - self.decay)
            else:
                kept.copy_(now)
        self.started = True


def make_optimizer(
    model: nn.Module,
    *,
    learning_rate: float = 2e-4,
    n_warmup: int = 200,
    plateau: float = 0.1,
    n_steps: int = 200_000,
    floor: float = 0.1,
    weight_decay: float = 0.01,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW that spares the biases, and its rate: from 0 up in a line, a plateau, a cosine to `floor` of the peak."""
    spared, decayed = [], []
    for name, parameter in model.named_parameters():
        (spared if "bias" in name or "layer_norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8)
    falls_at = n_warmup + int(plateau * n_steps)

    def factor(step: int) -> float:
        if step < n_warmup:
            return step / n_warmup
        if step < falls_at:
            return 1.0
        return max(floor, 0.5 * (1 + math.cos(math.pi * (step - falls_at) / max(1, n_steps - falls_at))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_step(
    model: PerturbDiff,
    diffusion: Diffusion,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    average: Average,
    step: int,
    target: Tensor,
    control: Tensor,
    covariates: tuple[Tensor, Tensor, Tensor],
    *,
    clip_norm: float = 1.0,
    **settings,
) -> tuple[Terms, Tensor]:
    """Gradients, clipping, AdamW, its schedule and the moving average; the terms, and the norm before clipping."""
    optimizer.zero_grad()
    terms = loss(model, diffusion, target, control, covariates, **settings)
    terms.total.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    scheduler.step()
    average.update(model, step)
    return terms._replace(total=terms.total.detach()), norm


class Step(NamedTuple):
    """What one reverse step gives: the next state, the cells that the network saw in it, and the DDPM's law."""

    x: Tensor
    x0: Tensor
    mean: Tensor
    variance: Tensor
    log_variance: Tensor


@torch.no_grad()
def reverse_step(
    model: PerturbDiff,
    diffusion: Diffusion,
    x: Tensor,
    t: Tensor,
    x_self: Tensor,
    control: Tensor,
    condition: Tensor,
    *,
    guidance: float = 1.0,
    sampler: str = "ddim",
    eta: float = 0.0,
    small_variance: bool = False,
    noise: Tensor | None = None,
) -> Step:
    """From time t to t - 1; the network is called twice, one call after the other, where there is guidance.

    Args:
        model: without its covariate encoder, which `condition` has passed.
        diffusion: the noise schedule.
        x: [sets, cells, genes], the state at `t`.
        t: int[sets].
        x_self: [sets, cells, genes], the last prediction, zeros at first.
        control: [sets, cells, genes].
        condition: [sets, cells, genes].
        guidance: w of (1 + w) conditional - w unconditional.
        sampler: "ddim" or "ddpm".
        eta: of DDIM, the share of noise.
        small_variance: of DDPM, take the posterior's variance.
        noise: [sets, cells, genes]; None draws it.
    """
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"sampler must be one of 'ddim', 'ddpm'; got {sampler!r}.")
    alpha_bar, before = _at(diffusion.alpha_bars, t), _at(diffusion.alpha_bars_before, t)
    up, ratio = _at(diffusion.alpha_bars.rsqrt(), t), _at((1 / diffusion.alpha_bars - 1).sqrt(), t)
    x0 = model(x, x_self, control, t, condition)
    if guidance:
        eps = (up * x - x0) / ratio
        eps_free = (up * x - model(x, x_self, control, t, None)) / ratio
        x0 = up * x - ratio * ((1 + guidance) * eps - guidance * eps_free)
    x0 = torch.where(x0 < CUTOFF, torch.zeros_like(x0), x0)

    betas, before64, alpha_bars = diffusion.betas, diffusion.alpha_bars_before, diffusion.alpha_bars
    mean = (
        _at(betas * before64.sqrt() / (1 - alpha_bars), t) * x0
        + _at((1 - before64) * (1 - betas).sqrt() / (1 - alpha_bars), t) * x
    )
    kept = diffusion.posterior_variance if small_variance else diffusion.variance
    log_kept = torch.cat([diffusion.posterior_variance[1:2], kept[1:]]).log()
    variance, log_variance = _at(kept, t), _at(log_kept, t)
    noise = torch.randn_like(x) if noise is None else noise
    later = (t > 0).view(-1, 1, 1)
    if sampler == "ddpm":
        return Step(mean + later * torch.exp(0.5 * log_variance) * noise, x0, mean, variance, log_variance)
    eps = (up * x - x0) / ratio
    sigma = eta * ((1 - before) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / before).sqrt()
    after = x0 * before.sqrt() + (1 - before - sigma**2).sqrt() * eps + later * sigma * noise
    return Step(after, x0, mean, variance, log_variance)


@torch.no_grad()
def sample(
    model: PerturbDiff,
    diffusion: Diffusion,
    control: Tensor,
    covariates: tuple[Tensor, Tensor, Tensor],
    *,
    start: int = 100,
    n_steps: int | None = None,
    x: Tensor | None = None,
    **settings,
) -> Tensor:
    """The sets [sets, cells, genes] after the steps t = start - 1, ..., 0 of the whole chain, as published.

    Args:
        model: weights to sample with.
        diffusion: the noise schedule.
        control: [sets, cells, genes], expression / 10.
        covariates: int[sets, cells] of perturbation, cell type, batch.
        start: time steps of a run.
        n_steps: stop after so many of them.
        x: [sets, cells, genes] to start from; None draws standard normal noise.
        **settings: of `reverse_step`.
    """
    x = torch.randn_like(control) if x is None else x
    condition, x_self = model.cov_encoder(*covariates), torch.zeros_like(control)
    for t in list(range(start - 1, -1, -1))[:n_steps]:
        times = torch.full((len(x),), t, device=x.device)
        x, x_self, *_ = reverse_step(model, diffusion, x, times, x_self, control, condition, **settings)
    return x
