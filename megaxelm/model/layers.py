"""The parts of a decoder. Each module's forward uses only its own parameters, so DeepSpeed ZeRO-3 can gather them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaxelm.model.config import DecoderConfig
from megaxelm.model.moe import MoeFeedForward
from megaxelm_kernels.activations import gelu_bias, swiglu
from megaxelm_kernels.attention import PackedLayout, packed_attention
from megaxelm_kernels.dropout import DropoutKey, keyed_dropout
from megaxelm_kernels.linear_cross_entropy import linear_cross_entropy_each, target_logprobs
from megaxelm_kernels.linear_distillation import Teacher, linear_distillation
from megaxelm_kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megaxelm_kernels.rotary import apply_rotary_qk, norm_rotary_qk

SITES_A_LAYER = 2  # attention output, feed-forward output; site 0 of the whole model is the embedding


class Surroundings(Protocol):
    """What a layer needs besides its input: positions, who sees whom, and dropout."""

    rotary: tuple[Tensor, Tensor] | None
    kernels: str
    """`triton` or `torch`: which implementation of norms, activations, rotary positions and the loss runs."""
    exclusive: bool
    """Whether attention makes new gradients for q and k and keeps none, so that they may be turned in place."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `q` [N, heads, d] over `k`, `v` [N, kv_heads, d] and what came before them -> [N, heads, d]."""
        ...

    def drop(self, x: Tensor, site: int, p: float | None = None) -> Tensor:
        """Dropout of `x` [N, H] at one place of the model, with the residual probability or with `p`."""
        ...


@dataclass
class PackedSurroundings:
    """One packed batch: every token of every document is at hand."""

    layout: PackedLayout
    rotary: tuple[Tensor, Tensor] | None
    sliding_window: int | None
    backend: str
    kernels: str = "torch"
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    dropout: DropoutKey | None = None
    exchange: Callable[[Callable[[Tensor, Tensor, Tensor], Tensor], Tensor, Tensor, Tensor], Tensor] | None = None
    """Where ranks share the tokens of a batch: calls attention with all tokens of some heads."""

    @property
    def exclusive(self) -> bool:
        return self.exchange is None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v) if self.exchange is None else self.exchange(self._attend, q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(
            q, k, v, self.layout, sliding_window=self.sliding_window, dropout_p=self.attention_dropout, backend=self.backend
        )

    def drop(self, x: Tensor, site: int, p: float | None = None) -> Tensor:
        if self.dropout is None:
            return x
        return keyed_dropout(x, self.dropout.token_keys, site, self.residual_dropout if p is None else p)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over `size` features."""

    def __init__(self, kind: str, size: int, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layernorm" else None

    def forward(self, x: Tensor, kernels: str = "torch") -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps, kernels=kernels)
        return layer_norm(x, self.weight, self.bias, self.eps, kernels=kernels)


class AddNorm(Norm):
    """The norm of a sum, and the sum: the residual stream after a branch was added to it."""

    def forward(self, x: Tensor, residual: Tensor, kernels: str = "torch") -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.bias is None:
            return add_rms_norm(x, residual, self.weight, self.eps, kernels=kernels)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, kernels=kernels)


class Linear(nn.Module):
    """x @ weight.T + bias; the weight is allocated, not drawn: `Decoder.initialise` or a checkpoint fills it.

    With a low-rank delta (`add_low_rank`; Hu et al. 2021, section 4.1) scale * (x @ lora_A.weight.T) @ lora_B.weight.T is added. A and B
    are modules of their own, since ZeRO-3 gathers a weight for the module that owns it.
    """

    def __init__(self, size_in: int, size_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size_out, size_in))
        self.bias = nn.Parameter(torch.zeros(size_out)) if bias else None
        self.lora_A: Linear | None = None
        self.lora_B: Linear | None = None

    def add_low_rank(self, lora_A: Linear, lora_B: Linear, scale: float, dropout: float, site: int) -> None:
        """Add a delta. `lora_A` [rank, in], `lora_B` [out, rank]; `dropout` is of the delta's input, at place `site` of the model."""
        self.lora_A, self.lora_B = lora_A, lora_B
        self.lora_scale, self.lora_dropout, self.lora_site = scale, dropout, site

    def forward(self, x: Tensor, gelu: str | None = None, kernels: str = "torch", around: Surroundings | None = None) -> Tensor:
        """`gelu`: None, or `none` or `tanh`: the activation of the product, exact or approximate. `around`: who drops a delta's input."""
        fused = gelu is not None and kernels != "torch"
        product = F.linear(x, self.weight, None if fused else self.bias)
        if self.lora_A is not None and self.lora_B is not None:
            dropped = around.drop(x, self.lora_site, self.lora_dropout) if around is not None and self.lora_dropout else x
            product = torch.add(product, self.lora_B(self.lora_A(dropped)), alpha=self.lora_scale)
        if gelu is None:
            return product
        return gelu_bias(product, self.bias, gelu, in_place=True, kernels=kernels) if fused else F.gelu(product, approximate=gelu)


def project(linear: Linear, x: Tensor, around: Surroundings | None) -> Tensor:
    """`linear` of `x`. Only deltas need `around`: what DeepSpeed's AutoTP puts in the place of a Linear takes `x` alone."""
    return linear(x) if getattr(linear, "lora_A", None) is None else linear(x, around=around)


class Attention(nn.Module):
    """Multi-head attention with optional grouped queries, biases, and q/k norm."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, width, config.qkv_bias)
        self.k = Linear(config.hidden_size, kv_width, config.qkv_bias)
        self.v = Linear(config.hidden_size, kv_width, config.qkv_bias)
        self.out = Linear(width, config.hidden_size, config.out_bias)
        self.q_norm = Norm("rmsnorm", config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm("rmsnorm", config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        """`x` [N, H] -> [N, H]."""
        q, k, v = (project(linear, x, around).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        q, k = self._positioned(q, k, around)
        return project(self.out, around.attend(self.index, q, k, v).flatten(1), around)

    def _positioned(self, q: Tensor, k: Tensor, around: Surroundings) -> tuple[Tensor, Tensor]:
        """Norm and rotation of q and k, where the model has them."""
        kernels = around.kernels
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight, self.k_norm.weight
            # ZeRO-3 gathers a weight for the module that owns it alone: there the norms run by themselves.
            if kernels == "triton" and around.rotary is not None and not hasattr(weights[0], "ds_id"):
                return norm_rotary_qk(q, k, *weights, self.q_norm.eps, *around.rotary, kernels=kernels)
            q, k = self.q_norm(q, kernels), self.k_norm(k, kernels)
        if around.rotary is None:
            return q, k
        return apply_rotary_qk(q, k, *around.rotary, kernels=kernels, in_place=kernels == "triton" and around.exclusive)


class FeedForward(nn.Module):
    """Gated SiLU (gate, up, down) or plain GELU (up, down)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias) if self.activation == "silu_gated" else None
        self.up = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor, kernels: str = "torch", around: Surroundings | None = None) -> Tensor:
        """`x` [N, H] -> [N, H]."""
        if self.gate is not None:
            gated = swiglu(project(self.gate, x, around), project(self.up, x, around), in_place=True, kernels=kernels)
            return project(self.down, gated, around)
        return project(self.down, self.up(x, "tanh" if self.activation == "gelu_tanh" else "none", kernels, around), around)


def feed_forward(config: DecoderConfig) -> nn.Module:
    """One feed-forward part for all tokens, or a mixture of experts."""
    if not config.num_experts:
        return FeedForward(config)
    router = Linear(config.hidden_size, config.num_experts, False)
    return MoeFeedForward(config, router, [FeedForward(config) for _ in range(config.num_experts)])


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.first_site = 1 + index * SITES_A_LAYER
        self.attention_norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.attention = Attention(config, index)
        self.mlp_norm = AddNorm(config.norm, config.hidden_size, config.norm_eps)
        self.mlp = feed_forward(config)

    def forward(self, x: Tensor, around: Surroundings) -> Tensor:
        """`x` [N, H] -> [N, H]."""
        branch = around.drop(self.attention(self.attention_norm(x, around.kernels), around), self.first_site)
        normed, x = self.mlp_norm(branch, x, around.kernels)
        return x + around.drop(self.mlp(normed, around.kernels, around), self.first_site + 1)


class Embedding(nn.Module):
    """Token vectors times `scale`. Rows from the vocabulary's size on are padding and never looked up."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.scale = config.embed_scale
        self.weight = nn.Parameter(torch.zeros(config.padded_vocab_size, config.hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` [N] int64 -> [N, H]."""
        x = F.embedding(tokens, self.weight)
        return x if self.scale == 1.0 else x * self.scale


class Head(nn.Module):
    """The output projection with everything that needs its weight inside its forward.

    `weight` is given when input and output share one matrix: then both modules register the same Parameter.
    """

    def __init__(self, config: DecoderConfig, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.weight = nn.Parameter(torch.zeros(config.padded_vocab_size, config.hidden_size)) if weight is None else weight

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        *,
        chunk_rows: int | None = None,
        score: bool = False,
        kernels: str = "torch",
        teacher: Teacher | None = None,
        label_weight: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [N, vocab_size] without labels; with labels the summed loss (scalar) and that of each token [N]; with `score`
        log p(label) [N]. With `teacher` the loss is that of `linear_distillation`."""
        if labels is None:
            return F.linear(hidden, self.weight)[..., : self.vocab_size]
        if teacher is not None:
            assert loss_weights is None and not score
            return linear_distillation(
                hidden, self.weight, labels, teacher, vocab_size=self.vocab_size, label_weight=label_weight, chunk_rows=chunk_rows
            )
        if score:
            return target_logprobs(hidden, self.weight, labels, vocab_size=self.vocab_size, chunk_rows=chunk_rows, kernels=kernels)
        return linear_cross_entropy_each(
            hidden, self.weight, labels, vocab_size=self.vocab_size, loss_weights=loss_weights, chunk_rows=chunk_rows, kernels=kernels
        )
