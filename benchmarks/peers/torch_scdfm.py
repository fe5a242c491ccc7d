"""scDFM as its published PyTorch program computes it, written anew for side-by-side timing and checked on its numbers.

Same operations in the same order: each cell of the batch attends to its own copy of all token embeddings under a dense
genes x tokens mask, once for its genes and once more for its perturbation; the softmax of both maps of a differential
attention is written out, and autograd keeps the maps; a sampling run encodes the genes anew at each of its four
evaluations a step. Two things are cheaper here than there, so a comparison flatters this side: sampling runs without
dropout (the published evaluation forgets to switch it off), and no adaptive-solver library stands between the steps.

Needs torch and nothing else. Parameters carry the names of the published state dict.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ScDFM", "Terms", "bandwidths", "loss", "make_optimizer", "mmd2", "rk4_38", "sample", "train_step"]

N_FREQUENCIES = 128  # of the time embedding
LARGEST_VALUE = 512.0  # expression above it is cut


class _ValueEncoder(nn.Module):
    """One number -> one token."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, d_model)
        self.linear2 = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.linear1(x.clamp(max=LARGEST_VALUE).unsqueeze(-1)))
        return self.dropout(self.norm(self.linear2(hidden)))


class _TimeEmbedder(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * N_FREQUENCIES, d_model), nn.SiLU(), nn.Linear(d_model, d_model))

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(N_FREQUENCIES, dtype=t.dtype, device=t.device)
        angles = t.unsqueeze(-1) * torch.exp(-math.log(10_000.0) * k / N_FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class _MaskedCrossAttention(nn.Module):
    """Pre-norm cross-attention to a memory under a mask (True = may not attend), and a feed-forward part."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(d_model, 8, dropout=dropout, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.linear1, self.linear2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        pulled, _ = self.cross_attn(self.norm1(x), memory, memory, attn_mask=mask, need_weights=False)
        x = x + self.dropout(pulled)
        hidden = self.dropout(functional.gelu(self.linear1(self.norm2(x))))
        return x + self.dropout(self.linear2(hidden))


class _GeneEncoder(nn.Module):
    """Token ids [cells, genes] -> [cells, genes, d]; the mask rows are those of the first cell's ids, for all cells."""

    def __init__(self, n_tokens: int, d_model: int, mask: Tensor, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d_model)
        self.enc_norm = nn.LayerNorm(d_model)
        self.perturbation_interaction = _MaskedCrossAttention(d_model, dropout)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        memory = self.enc_norm(self.embedding.weight[: len(self.mask)]).expand(len(ids), -1, -1)
        return self.perturbation_interaction(self.enc_norm(self.embedding(ids)), memory, self.mask[ids[0]])


class _PerturbationTable(nn.Module):
    def __init__(self, n_tokens: int, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d_model)
        self.enc_norm = nn.LayerNorm(d_model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.enc_norm(self.embedding(ids))


class _RMSNorm(nn.Module):
    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class _DifferentialAttention(nn.Module):
    """Softmax map 1 minus lambda times softmax map 2, on the values of `y`.

    `keys_from_other`: both queries from `y`, both keys from `other`. Otherwise map 1 is of `y` with itself and map 2 of
    `other` with itself.
    """

    def __init__(self, d_model: int, n_heads: int, depth: int, *, keys_from_other: bool) -> None:
        super().__init__()
        self.n_heads, self.keys_from_other = n_heads, keys_from_other
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        n_dims = d_model // n_heads
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(n_dims)))
        for name in ("q_proj_1", "k_proj_1", "q_proj_2", "k_proj_2", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(d_model, d_model, bias=False))
        self.subln = _RMSNorm(n_dims)

    def _heads(self, projected: Tensor) -> Tensor:
        n_cells, n_tokens, d_model = projected.shape
        return projected.view(n_cells, n_tokens, self.n_heads, d_model // self.n_heads).transpose(1, 2)

    def forward(self, y: Tensor, other: Tensor) -> Tensor:
        k1_from, q2_from = (other, y) if self.keys_from_other else (y, other)
        scale = (y.shape[-1] // self.n_heads) ** -0.5
        q1, k1 = self._heads(self.q_proj_1(y)) * scale, self._heads(self.k_proj_1(k1_from))
        q2, k2 = self._heads(self.q_proj_2(q2_from)) * scale, self._heads(self.k_proj_2(other))
        map1 = torch.softmax(q1 @ k1.transpose(-1, -2), dim=-1)
        map2 = torch.softmax(q2 @ k2.transpose(-1, -2), dim=-1)
        lam = torch.exp(self.lambda_q1 @ self.lambda_k1) - torch.exp(self.lambda_q2 @ self.lambda_k2) + self.lambda_init
        out = self.subln((map1 - lam * map2) @ self._heads(self.v_proj(y))) * (1 - self.lambda_init)
        return self.out_proj(out.transpose(1, 2).reshape(y.shape))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class _Mlp(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class _DifferentialBlock(nn.Module):
    """Differential attention and a feed-forward part, both shifted, scaled and gated by the time embedding."""

    def __init__(self, d_model: int, n_heads: int, depth: int, *, keys_from_other: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model, eps=1e-6, elementwise_affine=False)
        self.attn = _DifferentialAttention(d_model, n_heads, depth, keys_from_other=keys_from_other)
        self.mlp = _Mlp(d_model)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d_model, 6 * d_model))

    def forward(self, y: Tensor, other: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        y = y + gate1.unsqueeze(1) * self.attn(_modulate(self.norm(y), shift1, scale1), other)
        return y + gate2.unsqueeze(1) * self.mlp(_modulate(self.norm(y), shift2, scale2))


class _DifferentialPerceiverLayer(nn.Module):
    def __init__(self, d_model: int, n_heads: int, depth: int) -> None:
        super().__init__()
        self.diff_self_attn = _DifferentialBlock(d_model, n_heads, depth, keys_from_other=True)
        self.diff_cross_attn = _DifferentialBlock(d_model, n_heads, depth, keys_from_other=False)

    def forward(self, y: Tensor, control: Tensor, c: Tensor) -> Tensor:
        return self.diff_cross_attn(self.diff_self_attn(y, y, c), control, c)


class _PerceiverLayer(nn.Module):
    """Plain attention: to the control tokens, then among the tokens."""

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        for name in ("ln_z1", "ln_z2", "ln_z3"):
            self.add_module(name, nn.LayerNorm(d_model))
        for name in ("q", "k", "v", "q2", "k2", "v2"):
            self.add_module(name, nn.Linear(d_model, d_model))
        for name in ("cross", "self_attn"):
            self.add_module(name, nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True))
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d_model, 6 * d_model))

    def forward(self, z: Tensor, control: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        q, k, v = self.q(self.ln_z1(z)), self.k(control), self.v(control)
        z = z + self.cross(q, k, v, need_weights=False)[0]
        z = _modulate(self.ln_z2(z), shift1, scale1)  # in the place of z, not a residual branch
        pulled, _ = self.self_attn(self.q2(z), self.k2(z), self.v2(z), need_weights=False)
        z = z + gate1.unsqueeze(1) * pulled
        return z + gate2.unsqueeze(1) * self.mlp(_modulate(self.ln_z3(z), shift2, scale2))


class _GeneModulation(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d_model, 3 * d_model))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, genes: Tensor, x: Tensor) -> Tensor:
        shift, gate, scale = self.adaLN_modulation(genes).chunk(3, dim=-1)
        return x + gate * (self.norm(x) * scale + shift)


class _VelocityHead(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(2 * d_model, d_model), nn.LeakyReLU(), nn.Linear(d_model, d_model), nn.LeakyReLU(),
            nn.Linear(d_model, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).squeeze(-1)


def _layer(fusion: str, d_model: int, n_heads: int, depth: int, dropout: float) -> nn.Module:
    if fusion == "differential_perceiver":
        return _DifferentialPerceiverLayer(d_model, n_heads, depth)
    if fusion == "differential_transformer":
        return _DifferentialBlock(d_model, n_heads, depth, keys_from_other=False)
    if fusion == "perceiver":
        return _PerceiverLayer(d_model, n_heads, dropout)
    raise ValueError(
        f"fusion must be one of 'differential_perceiver', 'differential_transformer', 'perceiver'; got {fusion!r}."
    )


class ScDFM(nn.Module):
    """Velocity of noisy cells given unpaired control cells, genes and perturbation; `train()` switches dropout on.

    Args:
        mask: bool[tokens, tokens], True = the row's token may not attend to the column's.
        n_tokens: rows of the two embedding tables, at least those of the mask; the published program has 6000.
        d_model: width of a token.
        n_heads: of the layers; the gene encoder always has 8.
        n_layers: the published program has 4 for "differential_perceiver", 8 for the others.
        fusion: kind of layer.
        perturbation: "gene": ids are tokens, which the gene encoder encodes; "table": ids of the table of drugs.
        dropout: rate.
    """

    def __init__(
        self,
        mask: Tensor,
        *,
        n_tokens: int = 6000,
        d_model: int = 128,
        n_heads: int = 8,
        n_layers: int = 4,
        fusion: str = "differential_perceiver",
        perturbation: str = "gene",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model; got n_heads={n_heads}, d_model={d_model}.")
        if perturbation not in ("gene", "table"):
            raise ValueError(f"perturbation must be one of 'gene', 'table'; got {perturbation!r}.")
        self.perturbation = perturbation
        self.p_mask_embed = nn.Parameter(torch.randn(d_model))
        self.t_embedder = _TimeEmbedder(d_model)
        self.perturbation_embedder = _PerturbationTable(n_tokens, d_model)
        self.fusion_layer = nn.Sequential(
            nn.Linear(2 * d_model, d_model), nn.GELU(), nn.Linear(d_model, d_model), nn.LayerNorm(d_model)
        )
        self.value_encoder_1, self.value_encoder_2 = _ValueEncoder(d_model, dropout), _ValueEncoder(d_model, dropout)
        self.encoder = _GeneEncoder(n_tokens, d_model, mask, dropout)
        self.blocks = nn.ModuleList(_layer(fusion, d_model, n_heads, i, dropout) for i in range(n_layers))
        self.gene_adaLN = nn.ModuleList(_GeneModulation(d_model) for _ in range(n_layers))
        self.adapter_layer = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 * d_model, d_model), nn.LeakyReLU(), nn.Dropout(dropout), nn.Linear(d_model, d_model),
                nn.LeakyReLU(),
            )
            for _ in range(n_layers)
        )  # fmt: skip
        self.p_head = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, d_model))
        self.final_layer = _VelocityHead(d_model)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed_perturbation(self, ids: Tensor) -> Tensor:
        """[cells, slots] -> [cells, d]."""
        encode = self.encoder if self.perturbation == "gene" else self.perturbation_embedder
        return encode(ids).mean(1)

    def tokens(self, genes: Tensor, x_t: Tensor, t: Tensor, source: Tensor, perturbation: Tensor) -> Tensor:
        """[cells, genes, 2 d]: the last layer's gene tokens, and beside each the perturbation's embedding."""
        encoded = self.encoder(genes)
        p = self.embed_perturbation(perturbation).unsqueeze(1).expand_as(encoded)
        c = self.t_embedder(t.expand(len(x_t)))
        control = self.value_encoder_2(source) + encoded
        x = self.fusion_layer(torch.cat([self.value_encoder_1(x_t) + encoded, control], dim=-1))
        for modulate, inject, layer in zip(self.gene_adaLN, self.adapter_layer, self.blocks, strict=True):
            x = inject(torch.cat([modulate(encoded, x), p], dim=-1))
            x = layer(x, control, c)
        return torch.cat([x, p], dim=-1)

    def forward(self, genes: Tensor, x_t: Tensor, t: Tensor, source: Tensor, perturbation: Tensor) -> Tensor:
        """Velocity [cells, genes].

        Args:
            genes: [cells, genes] tokens, the same row for each cell.
            x_t, source: [cells, genes] noisy cells, and control cells.
            t: [cells] or a scalar, in 0 ... 1.
            perturbation: [cells, slots] ids.
        """
        return self.final_layer(self.tokens(genes, x_t, t, source, perturbation))

    def predict_perturbation(
        self, genes: Tensor, x_t: Tensor, t: Tensor, source: Tensor, perturbation: Tensor
    ) -> Tensor:
        """[cells, d]: the embedding read off the mean gene token."""
        x, _ = self.tokens(genes, x_t, t, source, perturbation).chunk(2, dim=-1)
        return self.p_head(x.mean(1))


def bandwidths(target: Tensor) -> Tensor:
    """Four widths about the median distance (lower middle value) among the target's cells; no gradient."""
    with torch.no_grad():
        squares = torch.cdist(target, target) ** 2
        others = ~torch.eye(len(target), dtype=torch.bool, device=target.device)
        median = squares[others].median().clamp(min=1e-12)
        return torch.sqrt(median * torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=target.dtype, device=target.device))


def mmd2(x: Tensor, y: Tensor, sigmas: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy, the mean over Gaussian kernels of widths `sigmas`."""
    m, n = len(x), len(y)
    squares_xx, squares_yy, squares_xy = torch.cdist(x, x) ** 2, torch.cdist(y, y) ** 2, torch.cdist(x, y) ** 2
    values = []
    for sigma in sigmas:
        k_xx, k_yy, k_xy = (torch.exp(-s / (2 * sigma**2 + 1e-12)) for s in (squares_xx, squares_yy, squares_xy))
        within_x = (k_xx.sum() - k_xx.diagonal().sum()) / (m * (m - 1) + 1e-12)
        within_y = (k_yy.sum() - k_yy.diagonal().sum()) / (n * (n - 1) + 1e-12)
        values.append(within_x + within_y - 2 * k_xy.mean())
    return torch.stack(values).mean()


class Terms(NamedTuple):
    """`total` = `flow` + gamma `mmd2`."""

    total: Tensor
    flow: Tensor
    mmd2: Tensor


def loss(
    model: ScDFM,
    genes: Tensor,
    source: Tensor,
    target: Tensor,
    perturbation: Tensor,
    *,
    gamma: float = 0.5,
    t: Tensor | None = None,
    x0: Tensor | None = None,
) -> Terms:
    """Squared velocity error on straight paths from noise to `target`, and MMD^2 of the endpoint estimate.

    Args:
        model: whose mode decides about dropout.
        genes: [genes] tokens.
        source, target: [cells, genes], control cells, and cells of one perturbation.
        perturbation: [cells, slots] ids.
        gamma: weight of the MMD.
        t: [cells] recorded times; None draws them.
        x0: [cells, genes] recorded noise; None draws it.
    """
    t = torch.rand(len(target), dtype=target.dtype, device=target.device) if t is None else t
    x0 = torch.randn_like(target) if x0 is None else x0
    at = t.unsqueeze(1)
    x_t, u_t = (1 - at) * x0 + at * target, target - x0
    v_t = model(genes.expand(len(target), -1), x_t, t, source, perturbation)
    flow = (v_t - u_t).square().mean()
    discrepancy = mmd2(x_t + (1 - at) * v_t, target, bandwidths(target))
    return Terms(flow + gamma * discrepancy, flow, discrepancy)


def make_optimizer(
    model: ScDFM,
    *,
    learning_rate: float = 5e-5,
    last_rate: float = 1e-6,
    n_steps: int = 200_000,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam, and a rate that falls along a cosine to `last_rate` at `n_steps`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=betas, eps=eps)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_steps, eta_min=last_rate)


def train_step(
    model: ScDFM,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    genes: Tensor,
    source: Tensor,
    target: Tensor,
    perturbation: Tensor,
    *,
    n_subset: int,
    permutation: Tensor | None = None,
    **settings,
) -> Terms:
    """One step of the published loop on a fresh subset of the genes: gradients, Adam, its schedule.

    Args:
        model: whose mode decides about dropout.
        optimizer, scheduler: of `make_optimizer`.
        genes: [genes] tokens of all columns.
        source, target: [cells, genes], all columns.
        perturbation: [cells, slots] ids.
        n_subset: columns of the step.
        permutation: [genes] recorded order of the columns, the first of which are kept; None draws it.
        **settings: of `loss`.
    """
    order = torch.randperm(len(genes), device=genes.device) if permutation is None else permutation
    kept = order[:n_subset]
    optimizer.zero_grad()
    terms = loss(model, genes[kept], source[:, kept], target[:, kept], perturbation, **settings)
    terms.total.backward()
    optimizer.step()
    scheduler.step()
    return Terms(*(term.detach() for term in terms))


def rk4_38(field, x: Tensor, ts: Tensor) -> Tensor:
    """[times, ...]: the path of dx/dt = field(t, x) from `x` at `ts[0]`, one step of the 3/8-rule for each gap."""
    path = [x]
    for t, after in zip(ts[:-1], ts[1:], strict=True):
        h = after - t
        k1 = field(t, x)
        k2 = field(t + h / 3, x + h * k1 / 3)
        k3 = field(t + 2 * h / 3, x + h * (k2 - k1 / 3))
        k4 = field(after, x + h * (k1 - k2 + k3))
        x = x + h * (k1 + 3 * (k2 + k3) + k4) / 8
        path.append(x)
    return torch.stack(path)


def sample(
    model: ScDFM, genes: Tensor, source: Tensor, perturbation: Tensor, *, ts: Tensor, x0: Tensor | None = None
) -> Tensor:
    """Generated cells [cells, genes], not below 0; without dropout and without gradients.

    Args:
        model: put into evaluation mode.
        genes: [genes] tokens.
        source: [cells, genes] control cells.
        perturbation: [cells, slots] ids.
        ts: times of the solver's grid; the published program has 20 points from 0 to 1.
        x0: [cells, genes] the start; None draws standard normal noise.
    """
    model.eval()
    with torch.no_grad():
        x0 = torch.randn_like(source) if x0 is None else x0
        ids = genes.expand(len(source), -1)
        path = rk4_38(lambda t, x: model(ids, x, t, source, perturbation), x0, ts)
        return path[-1].clamp(min=0)
