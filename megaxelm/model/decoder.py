"""The decoder: one pre-norm transformer for all families, on packed documents, with cached decoding.

decoder = Decoder(config)
decoder.initialise(seed=0)  # or hub.load_pretrained(folder)
loss = decoder(tokens, positions, cu_seqlens, labels=labels)  # LossOutput
hidden = decoder(tokens, positions, cu_seqlens)  # [N, H]; decoder.logits(hidden) [N, vocab_size]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaxelm.errors import ModelError
from megaxelm.model import cache as cached
from megaxelm.model.cache import KVCache
from megaxelm.model.config import DecoderConfig
from megaxelm.model.layers import DecoderLayer, Embedding, Head, Norm, PackedSurroundings
from megaxelm_kernels.attention import PackedLayout, choose_backend
from megaxelm_kernels.backend import choose_kernels
from megaxelm_kernels.dropout import DropoutKey, dropout_keys
from megaxelm_kernels.linear_cross_entropy import IGNORE_INDEX
from megaxelm_kernels.linear_distillation import Teacher
from megaxelm_kernels.rotary import rotary_tables
from megaxelm_kernels.rotary_frequencies import rotary_parameters

__all__ = ["Decoder", "DropoutKey", "KVCache", "LossOutput", "TokenScores", "dropout_keys"]

EMBEDDING_SITE = 0
TABLES = ("embed.weight", "head.weight")  # rows from the vocabulary's size on are padding


class LossOutput(NamedTuple):
    """`loss_sum`: fp32 scalar, nats summed over the counted tokens, each times its weight; `num_targets`: int64 scalar, tokens whose
    label is not -100; `token_losses` [N] fp32: nats of each token, 0 where it is not counted, without a gradient."""

    loss_sum: Tensor
    num_targets: Tensor
    token_losses: Tensor


class TokenScores(NamedTuple):
    """`target_logprob` [N] fp32, nats: log p(label) of each token, 0 where the label is -100."""

    target_logprob: Tensor


class Decoder(nn.Module):
    """A decoder of the shape `config`. Its weights are zero until `initialise` or a checkpoint fills them.

    Tables of positions are computed in fp32 in each forward pass and are no buffers, so casting the module does not round them.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.head = Head(config, self.embed.weight if config.tie_embeddings else None)
        self.checkpointed_every = 0
        self.delta_dropout = 0.0  # of the inputs of low-rank deltas, where there are any

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.norm.weight.dtype

    def enable_activation_checkpointing(self, every: int = 1) -> None:
        """Of each `every`-th layer keep only the input and recompute the rest in the backward pass; 0: of none."""
        self.checkpointed_every = every

    def set_dropout(self, residual: float, attention: float) -> None:
        """Change the dropout probabilities, for example of a loaded seed.

        Raises:
            ModelError: a probability outside 0 to below 1.
        """
        self.config = replace(self.config, residual_dropout=residual, attention_dropout=attention)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights: normal with deviation 0.02, projections into the residual stream 0.02 / sqrt(2 layers), norms 1, biases 0.

        Drawn in fp32 on the CPU in the order of the parameters, so a seed gives the same weights for every type and device.
        """
        for name, tensor in initial_weights(self.config, seed):
            self.get_parameter(name).copy_(tensor)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | PackedLayout,
        *,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        dropout: DropoutKey | None = None,
        loss_chunk_rows: int | None = None,
        attention: str = "sdpa",
        kernels: str = "auto",
        exchange: Callable[..., Tensor] | None = None,
        teacher: Teacher | None = None,
        label_weight: float = 0.0,
    ) -> Tensor | LossOutput:
        """Hidden states after the last norm [N, H], or with `labels` the loss.

        Args:
            tokens, positions: [N] int64; positions count from 0 in each document.
            cu_seqlens: [S + 1] integers, where each document starts and the last ends, or a layout made of them.
            labels: [N] int64, the token that each position shall predict; -100 is not counted.
            loss_weights: [N], weight of each token in the sum.
            dropout: keys of the tokens; needed in training mode when `residual_dropout` is above 0, unused otherwise.
            loss_chunk_rows: rows of logits that exist at one time; None: what a memory budget holds.
            attention: `auto` or a backend of `megaxelm_kernels.attention`.
            kernels: `auto`, `triton` or `torch`.
            exchange: where several ranks share the tokens of the batch `cu_seqlens`, of which `tokens` are this rank's slice: calls
                attention with all tokens of some heads (`megaxelm.train.ulysses`).
            teacher: with `labels`, the distribution that the loss is measured against: log-probabilities [rows, vocab_size] of a slice of
                the batch. label_weight: share of the labels in the loss beside it (`megaxelm_kernels.linear_distillation`).

        Raises:
            ModelError: shapes that do not fit, an empty document, a backend that is missing here, dropout without keys.
        """
        kernels = self._kernels(kernels)
        hidden = self._hidden(tokens, positions, cu_seqlens, dropout, attention, kernels, exchange=exchange)
        if labels is None:
            return hidden
        _same_length("labels", labels, tokens)
        loss_sum, token_losses = self.head(
            hidden, labels, loss_weights, chunk_rows=loss_chunk_rows, kernels=kernels, teacher=teacher, label_weight=label_weight
        )
        return LossOutput(loss_sum, (labels != IGNORE_INDEX).sum(), token_losses)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., vocab_size], in the type of the weights."""
        return self.head(hidden)

    @torch.no_grad()
    def score(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | PackedLayout,
        labels: Tensor,
        rows_per_chunk: int | None = None,
        attention: str = "sdpa",
        kernels: str = "auto",
        rows: Tensor | None = None,
    ) -> TokenScores:
        """log p(label) of each token of a packed batch; full logits exist for `rows_per_chunk` tokens at a time.

        With `rows` [M] int64 only these tokens of the batch are scored: `labels` and the scores are then [M], and the head reads no others.
        """
        kernels = self._kernels(kernels)
        hidden = self._hidden(tokens, positions, cu_seqlens, None, attention, kernels, training=False)
        return self.score_hidden(hidden if rows is None else hidden[rows], labels, rows_per_chunk, kernels)

    @torch.no_grad()
    def score_hidden(self, hidden: Tensor, labels: Tensor, rows_per_chunk: int | None = None, kernels: str = "auto") -> TokenScores:
        """log p(label) of each row of hidden states [M, H] that `forward` or `decode` gave; `labels` [M] int64."""
        if labels.shape != hidden.shape[:1]:
            raise ModelError(f"labels have shape {tuple(labels.shape)}, hidden states {tuple(hidden.shape)}: one a row")
        found = self.head(hidden, labels, chunk_rows=rows_per_chunk, score=True, kernels=self._kernels(kernels))
        return TokenScores(found.float())

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of at most `max_length` tokens.

        Raises:
            ModelError: max_length beyond the model's positions.
        """
        if not 1 <= max_length <= self.config.max_positions:
            raise ModelError(f"cache: max_length = {max_length}: choose 1 to {self.config.max_positions}, the positions of this model")
        return KVCache(self.config, batch, max_length, self.dtype if dtype is None else dtype, self.device)

    @torch.no_grad()
    def decode(self, tokens: Tensor, lengths: Tensor, cache: KVCache, *, all_positions: bool = False) -> Tensor:
        """Read the next tokens of each row and remember them.

        Args:
            tokens: [B, T] int64, padded on the right with any id.
            lengths: [B] int64, valid tokens of each row in this call; 0 leaves a row as it is (its result then means nothing).
            cache: what the rows have read before; it is extended.

        Returns:
            Hidden states of the last valid token of each row [B, H]; with `all_positions` of all [B, T, H] (those of padding mean nothing).

        Raises:
            ModelError: shapes that do not fit, or a row that outgrows the cache.
        """
        batch, width = tokens.shape
        if lengths.shape != (batch,) or cache.lengths.shape != (batch,):
            raise ModelError(
                f"decode: tokens have {batch} rows, lengths are {tuple(lengths.shape)}, the cache has {cache.lengths.shape[0]} rows"
            )
        positions = cache.lengths[:, None] + torch.arange(width, device=tokens.device)
        flat = positions.flatten()
        kernels = self._kernels("auto")
        around = cached.surroundings(cache, lengths, width, self.config.sliding_window, self._rotary(flat), positions, kernels)
        x = self._embed(tokens.flatten(), flat)
        for layer in self.layers:
            x = layer(x, around)
        x = self.norm(x, kernels).view(batch, width, -1)
        cache.lengths = cache.lengths + lengths
        cache.longest = around.mask.shape[-1]
        if all_positions:
            return x
        return x[torch.arange(batch, device=x.device), (lengths - 1).clamp_min(0)]

    def _hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | PackedLayout,
        dropout: DropoutKey | None,
        attention: str,
        kernels: str,
        training: bool | None = None,
        exchange: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        config = self.config
        training = self.training if training is None else training
        if tokens.ndim != 1:
            raise ModelError(f"tokens have shape {tuple(tokens.shape)}: the decoder takes packed documents, [N]")
        _same_length("positions", positions, tokens)
        try:
            layout = cu_seqlens if isinstance(cu_seqlens, PackedLayout) else PackedLayout(cu_seqlens, tokens.device)
            attention_dropout = config.attention_dropout if training else 0.0
            backend = choose_backend(attention, tokens.device, attention_dropout, head_dim=config.head_dim, dtype=self.dtype)
        except ValueError as error:
            raise ModelError(str(error)) from None
        if layout.num_tokens != tokens.shape[0] and exchange is None:
            raise ModelError(f"cu_seqlens ends at {layout.num_tokens}, but there are {tokens.shape[0]} tokens")
        if layout.longest > config.max_positions:
            raise ModelError(
                f"a document of {layout.longest} tokens is longer than max_positions = {config.max_positions}: cut it, or use another model"
            )
        drops = training and (config.residual_dropout > 0 or self.delta_dropout > 0)
        if drops and dropout is None:
            which = "residual_dropout" if config.residual_dropout else "dropout of the low-rank deltas"
            raise ModelError(
                f"{which} = {config.residual_dropout or self.delta_dropout} in training mode needs dropout keys: pass "
                "dropout=dropout_keys(...), or call eval() or set_dropout(0, 0)"
            )
        around = PackedSurroundings(
            layout=layout,
            rotary=self._rotary(positions),
            sliding_window=config.sliding_window,
            backend=backend,
            kernels=kernels,
            attention_dropout=attention_dropout,
            residual_dropout=config.residual_dropout,
            dropout=dropout if drops else None,
            exchange=exchange,
        )
        x = around.drop(self._embed(tokens, positions), EMBEDDING_SITE)
        every = self.checkpointed_every if torch.is_grad_enabled() else 0
        for number, layer in enumerate(self.layers):
            if every and number % every == 0:
                run: Callable[..., Tensor] = layer
                x = checkpoint(run, x, around, use_reentrant=False, preserve_rng_state=attention_dropout > 0)
            else:
                x = layer(x, around)
        return self.norm(x, kernels)

    def _kernels(self, requested: str) -> str:
        if requested == "auto" and self.dtype == torch.float64:
            return "torch"  # the kernels compute in fp32
        try:
            return choose_kernels(requested, self.device)
        except ValueError as error:
            raise ModelError(str(error)) from None

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.config.positions == "sinusoidal":
            x = x + sinusoidal_positions(positions + self.config.position_offset, self.config).to(x.dtype)
        return x

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        config = self.config
        if config.positions != "rotary":
            return None
        try:
            frequencies, factor = rotary_parameters(config.head_dim, config.rope_theta, config.rope_scaling)
        except ValueError as error:
            raise ModelError(str(error)) from None
        return rotary_tables(positions, frequencies.to(positions.device), attention_factor=factor)


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a decoder's parameters in its order; a tied head is the embedding and has no entry."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def initial_weights(config: DecoderConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of `Decoder.initialise(seed)` by name, fp32 on the CPU, drawn one after the other in the order of the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in parameter_shapes(config).items():
        if name.endswith(".bias"):
            yield name, torch.zeros(shape)
        elif len(shape) == 1:
            yield name, torch.ones(shape)
        else:
            residual = name.endswith(("attention.out.weight", ".down.weight"))
            deviation = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
            tensor = torch.empty(shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator)
            if name in TABLES:
                tensor[config.vocab_size :] = 0.0
            yield name, tensor


@lru_cache(maxsize=4)
def _sinusoid_frequencies(half: int, device: torch.device) -> Tensor:
    # Kept: a copy to the device in each call would make it wait, and cannot be part of a CUDA graph.
    with torch.inference_mode(False):
        return torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1))).to(device)


def sinusoidal_positions(rows: Tensor, config: DecoderConfig) -> Tensor:
    """Rows of XGLM's table, fp32 [N, H]: sines in the first half, cosines in the second, wavelengths 2 pi to 20000 pi."""
    angles = rows.to(torch.float32)[:, None] * _sinusoid_frequencies(config.hidden_size // 2, rows.device)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    if config.position_zero_row is not None:
        table = table.masked_fill((rows == config.position_zero_row)[:, None], 0.0)
    return table


def _same_length(name: str, values: Tensor, tokens: Tensor) -> None:
    if values.shape != tokens.shape:
        raise ModelError(f"{name} have shape {tuple(values.shape)}, tokens {tuple(tokens.shape)}: one a token")
