"""Several experts of one architecture as one model: their weights lie stacked [slots, out, in], and one product serves all of them.

stack = load_stack([open_pretrained(folder) for folder in folders])
cache = stack.new_cache()
row = cache.new_row(100)
read = stack.read([Piece(expert=0, row=row, tokens=[1, 17, 5])], cache)  # read.hidden [1, H]: after the last token

Rows lie sorted by expert, so the number of launches does not grow with the number of experts. What all experts have in common (a frozen
embedding) is kept once, with a stride of zero over the experts; experts that are low-rank deltas of one base have all of it in common,
and a projection is x W^T + (x A_e^T) B_e^T with the scale in B. Where not all experts fit, the stack has fewer slots than experts: an
expert that is wanted takes the slot of the one that was wanted longest ago, and reads its weights from where they came.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import sinusoidal_positions
from megaxelm.model.moe import top_experts
from megaxelm.model.source import WeightSource
from megaxelm.model.stacked_cache import CachedAttention, CacheRow, StackedCache
from megaxelm.model.stacked_weights import StackedWeights
from megaxelm_kernels.activations import gelu_bias, swiglu
from megaxelm_kernels.backend import choose_kernels
from megaxelm_kernels.grouped_linear import grouped_linear
from megaxelm_kernels.grouped_norms import grouped_layer_norm, grouped_rms_norm
from megaxelm_kernels.rotary import apply_rotary_qk, rotary_tables
from megaxelm_kernels.rotary_frequencies import rotary_parameters
from megaxelm_kernels.row_groups import RowGroups


@dataclass(frozen=True)
class Piece:
    """New tokens of one text for one expert: they follow what `row` holds."""

    expert: int
    row: CacheRow
    tokens: Sequence[int]


@dataclass(frozen=True)
class Read:
    """What a call of the stack gives. Rows lie sorted by slot, so `hidden` and `groups` go to the head as they are."""

    hidden: Tensor
    """[rows, H] after the last norm: a row a piece, or a row a token where all positions were asked for."""
    groups: RowGroups
    first_row: list[int]
    """By piece, in the order given: where its rows begin in `hidden`."""


class Attends(Protocol):
    """Attention of new tokens over what their texts hold."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` [N, heads, d], `k` and `v` [N, kv_heads, d] of one layer -> [N, heads, d]."""


@dataclass
class SwapCost:
    """What bringing experts in has cost so far."""

    swaps: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """In words, for the user."""
        rate = self.bytes / max(self.seconds, 1e-9) / 1e9
        return f"experts brought in {self.swaps} times: {self.bytes / 1e9:.2f} GB in {self.seconds:.1f} s ({rate:.1f} GB/s)"


@dataclass
class StackedDecoder:
    """Experts of one architecture behind one forward pass. Made by `load_stack`."""

    config: DecoderConfig
    sources: Sequence[WeightSource]
    weights: StackedWeights
    kernels: str = "torch"
    swaps: SwapCost = field(default_factory=SwapCost)
    _slot_of: dict[int, int] = field(default_factory=dict)  # expert -> slot, longest unused first

    @property
    def num_experts(self) -> int:
        """Experts, resident or not."""
        return len(self.sources)

    @property
    def num_slots(self) -> int:
        """Experts that are resident at one time."""
        return self.weights.num_slots

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.weights.dtype

    @property
    def heads(self) -> Tensor:
        """Heads of the resident experts by slot [slots, padded vocab, H]; of stride 0 where all share one."""
        return self.weights["embed.weight" if self.config.tie_embeddings else "head.weight"]

    def slot(self, expert: int) -> int:
        """Where a resident expert lies in the stacked weights."""
        return self._slot_of[expert]

    def new_cache(self, max_tokens: int | None = None) -> StackedCache:
        """An empty cache, of at most `max_tokens` places in all."""
        return StackedCache(self.config, self.dtype, self.device, max_tokens)

    def batches(self, experts: Sequence[int]) -> list[list[int]]:
        """The experts in groups that are resident together; resident ones come first."""
        wanted = sorted(set(experts), key=lambda expert: (expert not in self._slot_of, expert))
        return [wanted[at : at + self.num_slots] for at in range(0, len(wanted), self.num_slots)]

    @torch.inference_mode()
    def read(self, pieces: Sequence[Piece], cache: StackedCache, *, all_positions: bool = False) -> Read:
        """Read the next tokens of some texts, each for one expert, and remember them.

        Args:
            pieces: at least one token each; a row occurs once.
            all_positions: give the hidden states of every token and not only of each piece's last.

        Raises:
            ModelError: a text that outgrows its row, or more experts than slots.
        """
        slots = self._resident({piece.expert for piece in pieces})
        order = sorted(range(len(pieces)), key=lambda index: slots[pieces[index].expert])
        sorted_pieces = [pieces[index] for index in order]
        counts = [len(piece.tokens) for piece in sorted_pieces]
        tokens_of, pieces_of = [0] * self.num_slots, [0] * self.num_slots
        for piece, count in zip(sorted_pieces, counts, strict=True):
            tokens_of[slots[piece.expert]] += count
            pieces_of[slots[piece.expert]] += 1
        groups = RowGroups.from_counts(tokens_of, self.device)
        tokens = torch.tensor([token for piece in sorted_pieces for token in piece.tokens], device=self.device)
        positions = torch.tensor(
            [place for piece in sorted_pieces for place in range(piece.row.length, piece.row.length + len(piece.tokens))],
            device=self.device,
        )
        attention = CachedAttention(cache, [piece.row for piece in sorted_pieces], counts, self.kernels)
        x, residual = self.layers(tokens, positions, groups, attention)
        for piece in sorted_pieces:
            piece.row.length += len(piece.tokens)
        if not all_positions and len(tokens) > len(pieces):
            last = torch.tensor(counts, device=self.device).cumsum(0) - 1
            x, residual = x[last], residual[last]
            groups = RowGroups.from_counts(pieces_of, self.device)
            counts = [1] * len(pieces)
        hidden = self.last_norm(x, residual, groups)
        first_row, at = [0] * len(pieces), 0
        for index, count in zip(order, counts, strict=True):
            first_row[index] = at
            at += count
        return Read(hidden, groups, first_row)

    def last_norm(self, branch: Tensor, residual: Tensor, groups: RowGroups) -> Tensor:
        """Hidden states for the head, [rows, H], from what `layers` gives."""
        return self._norm("norm", branch, groups, residual)[0]

    def layers(self, tokens: Tensor, positions: Tensor, groups: RowGroups, attention: Attends) -> tuple[Tensor, Tensor]:
        """The last branch and the residual stream before it, [N, H] each, of tokens [N] at positions [N]; rows sorted by slot."""
        config, weights, kernels = self.config, self.weights, self.kernels
        table = weights["embed.weight"]
        residual = F.embedding(tokens, table[0]) if table.stride(0) == 0 else table[groups.group_of_row, tokens]
        if config.embed_scale != 1.0:
            residual = residual * config.embed_scale
        if config.positions == "sinusoidal":
            residual = residual + sinusoidal_positions(positions + config.position_offset, config).to(residual.dtype)
        rotary = self._rotary(positions)
        head_groups = None
        if config.qk_norm:
            # A query or key head is a row of its own for the norm.
            heads = (config.num_heads, config.num_kv_heads)
            head_groups = [_of_heads(groups, number) for number in heads]
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        branch: Tensor | None = None
        for layer in range(config.num_layers):
            name = f"layers.{layer}"
            x, residual = self._norm(
                f"{name}.attention_norm", branch if branch is not None else residual, groups, residual if branch is not None else None
            )
            joined = self._linear(f"{name}.attention.qkv", x, groups)
            q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in joined.split([query, key_value, key_value], -1))
            if head_groups is not None:
                q = self._head_norm(f"{name}.attention.q_norm", q, head_groups[0])
                k = self._head_norm(f"{name}.attention.k_norm", k, head_groups[1])
            if rotary is not None:
                q, k = apply_rotary_qk(q, k, *rotary, kernels=kernels)
            found = attention.attend(layer, q, k, v)
            branch = self._linear(f"{name}.attention.out", found.flatten(1), groups)
            x, residual = self._norm(f"{name}.mlp_norm", branch, groups, residual)
            branch = (self._experts if config.num_experts else self._mlp)(f"{name}.mlp", x, groups)
        assert branch is not None
        return branch, residual

    def _norm(self, name: str, x: Tensor, groups: RowGroups, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of `x` (+ `residual`), and what was normed."""
        weight, eps, kernels = self.weights[f"{name}.weight"], self.config.norm_eps, self.kernels
        found: Tensor | tuple[Tensor, Tensor]
        if self.config.norm == "layernorm":
            found = grouped_layer_norm(x, weight, self.weights[f"{name}.bias"], eps, groups, residual=residual, kernels=kernels)
        else:
            found = grouped_rms_norm(x, weight, eps, groups, residual=residual, kernels=kernels)
        return found if isinstance(found, tuple) else (found, x)

    def _head_norm(self, name: str, x: Tensor, groups: RowGroups) -> Tensor:
        """RMSNorm of each head of `x` [N, heads, d]."""
        rows = x.reshape(-1, x.shape[-1])
        found = grouped_rms_norm(rows, self.weights[f"{name}.weight"], self.config.norm_eps, groups, kernels=self.kernels)
        assert isinstance(found, Tensor)
        return found.view(x.shape)

    def _linear(self, name: str, x: Tensor, groups: RowGroups, bias: bool = True) -> Tensor:
        weights, kernels = self.weights, self.kernels
        out = grouped_linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias") if bias else None, groups, kernels=kernels)
        lora_a = weights.get(f"{name}.lora_A")
        if lora_a is not None:
            inner = grouped_linear(x, lora_a, None, groups, kernels=kernels)
            out += grouped_linear(inner, weights[f"{name}.lora_B"], None, groups, kernels=kernels)
        return out

    def _mlp(self, name: str, x: Tensor, groups: RowGroups) -> Tensor:
        config = self.config
        if config.activation == "silu_gated":
            gate, up = self._linear(f"{name}.gate_up", x, groups).chunk(2, -1)
            if self.kernels == "triton":
                gate, up = gate.contiguous(), up.contiguous()
            hidden = swiglu(gate, up, kernels=self.kernels)
        else:
            hidden = self._linear(f"{name}.up", x, groups)
            approximate = "tanh" if config.activation == "gelu_tanh" else "none"
            hidden = (
                F.gelu(hidden, approximate=approximate)
                if self.kernels == "torch"
                else gelu_bias(hidden, None, approximate, kernels=self.kernels)
            )
        return self._linear(f"{name}.down", hidden, groups)

    def _experts(self, name: str, x: Tensor, groups: RowGroups) -> Tensor:
        """The mixture of feed-forward experts that each row's model has in this layer."""
        weights, chosen = top_experts(self._linear(f"{name}.router", x, groups), self.config.experts_per_token)
        found = torch.zeros_like(x)
        for number in range(self.config.num_experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                # Rows come in their order, so they lie sorted by slot again.
                counts = groups.group_of_row[rows].bincount(minlength=groups.num_groups).tolist()
                part = self._mlp(f"{name}.experts.{number}", x[rows], RowGroups.from_counts(counts, x.device))
                found.index_add_(0, rows, (part * weights[rows, place, None]).to(found.dtype))
        return found

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rotary":
            return None
        frequencies, factor = self._frequencies
        return rotary_tables(positions, frequencies, attention_factor=factor)

    @cached_property
    def _frequencies(self) -> tuple[Tensor, float]:
        config = self.config
        try:
            frequencies, factor = rotary_parameters(config.head_dim, config.rope_theta, config.rope_scaling)
        except ValueError as error:
            raise ModelError(str(error)) from None
        return frequencies.to(self.device), factor

    def _resident(self, experts: set[int]) -> dict[int, int]:
        """Slots of the experts; those that are not resident are brought in."""
        if len(experts) > self.num_slots:
            raise ModelError(
                f"{len(experts)} experts are to run together, {self.num_slots} fit: read them in turn (StackedDecoder.batches)"
            )
        for expert in sorted(experts):
            slot = self._slot_of.pop(expert, None)
            if slot is None:
                slot = self._free_slot(experts)
                began = time.perf_counter()
                self.swaps.bytes += self.weights.fill(slot, self.sources[expert])
                self.swaps.seconds += time.perf_counter() - began
                self.swaps.swaps += 1
            self._slot_of[expert] = slot
        return self._slot_of

    def _free_slot(self, wanted: set[int]) -> int:
        if len(self._slot_of) < self.num_slots:
            return min(set(range(self.num_slots)) - set(self._slot_of.values()))
        oldest = next(expert for expert in self._slot_of if expert not in wanted)
        return self._slot_of.pop(oldest)


def _of_heads(groups: RowGroups, heads: int) -> RowGroups:
    """Groups of the heads of the rows. What a step's graph has on the device stays there."""
    found = RowGroups([offset * heads for offset in groups.offsets], groups.device)
    found.group_of_row = groups.group_of_row.repeat_interleave(heads)
    return found


def load_stack(
    sources: Sequence[WeightSource],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    resident: int | None = None,
    kernels: str = "auto",
) -> StackedDecoder:
    """Stack experts; each tensor goes from its file straight to its place.

    Args:
        resident: experts that are in the memory of `device` at one time; None: all.
        kernels: `auto`, `triton` or `torch`.

    Raises:
        ModelError: experts of different architectures, or `resident` out of range.
    """
    if not sources:
        raise ModelError("a stack needs at least one expert")
    shapes = [_shape(source.config) for source in sources]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            first, other = vars(shapes[0]), vars(shape)
            name = next(name for name in first if first[name] != other[name])
            raise ModelError(
                f"experts 0 and {number} differ in {name} ({first[name]!r}, {other[name]!r}): a mixture takes experts of one architecture"
            )
    resident = len(sources) if resident is None else resident
    if not 1 <= resident <= len(sources):
        raise ModelError(f"resident = {resident}: choose 1 to {len(sources)}, the number of experts")
    try:
        chosen = choose_kernels(kernels, device)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if dtype == torch.float64 and kernels == "auto":
        chosen = "torch"
    weights = StackedWeights.load(sources, resident, dtype, torch.device(device))
    stack = StackedDecoder(shapes[0], list(sources), weights, chosen)
    stack._slot_of = {expert: expert for expert in range(resident)}
    return stack


def _shape(config: DecoderConfig) -> DecoderConfig:
    """What decides the arithmetic: without dropout and the fields that are only carried along."""
    return replace(config, residual_dropout=0.0, attention_dropout=0.0, extra={})
