"""Memory of one device while a model trains, by part, from what DeepSpeed 0.19 allocates.

Sizes are counted in bytes over P parameters, n devices, w bytes a parameter in the compute type and g in the type in which gradients are
accumulated. Three moments can be the peak of a step, and the largest is the plan:

    backward   what lasts, the activations, the loss, and the gradients as far as they are there
    reduction  what lasts, the gradients in the bucket, and the copy of them that is reduced
    step       what lasts, the gradients, an fp32 copy of the partition, and what AdamW takes meanwhile

What lasts: the weights (ZeRO-3: 1/n of them, and the layers that are gathered), fp32 weights and two moments (1/n with ZeRO 1 to 3;
none besides the weights in fp32 with ZeRO 0 and 3). ZeRO 1 and 2 keep an fp32 copy of their partition even when the weights are fp32.
Of a model that is trained as low-rank deltas the whole has weights and activations; gradients, fp32 copy and moments are the deltas'.
Read in DeepSpeed: runtime/zero/stage_1_and_2.py and stage3.py (flat buffers, `setup_buckets`, `allreduce_bucket`, `step`),
runtime/fp16 (ZeRO 0). Formulas of ZeRO: Rajbhandari et al. 2020, section 5; of activations: Korthikanti et al. 2022, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megaxelm.model.config import DecoderConfig, num_parameters
from megaxelm.model.lora import lora_parameters, lora_shapes
from megaxelm.model.source import Lora
from megaxelm.train.ds_config import offloads
from megaxelm_kernels.head_chunks import rows_per_chunk

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "float16": 2, "bfloat16": 2, "float32": 4}
MARGIN = 0.06
"""Share of a device's memory that the plan leaves to fragments of the allocator, the CUDA context and NCCL's buffers."""


@dataclass(frozen=True)
class Work:
    """What a device works on at a time. `checkpoint_every`: of each so many layers one is recomputed; 0: none, 1: all. `loss_chunk_rows`:
    None is what a memory budget holds. `kernels`: `triton` or `torch`, which keeps more tensors."""

    micro_batch_size: int
    sequence_length: int
    checkpoint_every: int
    loss_chunk_rows: int | None
    precision: str
    kernels: str = "torch"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part, at the moment `peak` when they are most; `host`: on the host a device, for offload."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    loss: int
    buckets: int
    temporary: int
    host: int
    peak: str

    @property
    def total(self) -> int:
        """Bytes on the device, without the margin."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.loss + self.buckets + self.temporary


def padded_parameters(config: DecoderConfig) -> int:
    """Parameters as trained: the rows that pad the vocabulary are there too."""
    tables = 1 if config.tie_embeddings else 2
    return num_parameters(config) + tables * (config.padded_vocab_size - config.vocab_size) * config.hidden_size


def layer_activations(config: DecoderConfig, work: Work, lora: Lora | None = None) -> int:
    """Bytes that one layer keeps from its forward to its backward pass.

    A tensor is counted where autograd saves it: the input and the result of a norm, query, key and value before and after the rotation,
    the result of the attention, the inner tensors of the feed-forward part. Flash attention keeps no scores.
    """
    width = _BYTES[work.precision]
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size * max(1, config.experts_per_token)
    fused = work.kernels == "triton"
    attention = 2 * hidden + (heads + 2 * kv_heads) + heads
    if config.positions == "rotary" and (config.qk_norm or not fused):
        attention += heads + kv_heads  # the kernels turn in place what no norm has kept
    feed_forward = 2 * hidden + ((3 if fused else 4) if config.activation == "silu_gated" else 2) * inner
    saved = width * (attention + feed_forward)
    if config.qk_norm and not fused:
        saved += 2 * 4 * (heads + kv_heads)  # two fp32 forms of q and k that torch's norm keeps
    # The fp32 copy that torch's norm keeps, for the gradient of its weight.
    norms = 2 * 4 * (hidden if config.norm == "rmsnorm" and not fused and lora is None else 2)
    scores = 4 * config.num_heads  # log-sum-exp of the attention
    return work.tokens * (saved + norms + scores + _delta_activations(config, work, lora))


def _delta_activations(config: DecoderConfig, work: Work, lora: Lora | None) -> int:
    """Bytes a token that the deltas of a layer keep: the product with A of each, and with dropout its input and mask. The projections
    themselves are frozen and keep no input."""
    if lora is None:
        return 0
    width = _BYTES[work.precision]
    kept = width * lora.rank * len(lora.targets)
    if lora.dropout:
        inputs = [shape[1] for name, shape in lora_shapes(config, lora).items() if name.startswith("layers.0.") and ".lora_A." in name]
        alone = 2 * config.hidden_size + config.num_heads * config.head_dim + config.intermediate_size
        kept += sum(inputs) * (width + 1) - alone * width
    return kept


def activations(config: DecoderConfig, work: Work, lora: Lora | None = None) -> int:
    """Bytes of all layers together at the end of the forward pass; of a recomputed layer its input alone, and one layer in full."""
    whole = layer_activations(config, work, lora)
    kept = work.tokens * config.hidden_size * _BYTES[work.precision]
    every = work.checkpoint_every
    recomputed = -(-config.num_layers // every) if every else 0
    stream = 2 * kept  # embedding and last norm
    return (config.num_layers - recomputed) * whole + recomputed * kept + (whole if recomputed else 0) + stream


def loss_memory(config: DecoderConfig, work: Work, device_type: str, frozen: bool = False) -> int:
    """Bytes of the head's loss: a chunk of logits (with torch again in fp32), the head's gradient in fp32 beside that of a chunk (none if
    the head is `frozen`), and the gradient of the hidden states."""
    width = _BYTES[work.precision]
    vocab, hidden = config.padded_vocab_size, config.hidden_size
    dtype = torch.float32 if width == 4 else torch.bfloat16
    rows = rows_per_chunk(work.tokens, vocab, dtype, device_type, chunk_rows=work.loss_chunk_rows, kernels=work.kernels)
    logits = min(rows, work.tokens) * vocab * (width if width == 4 or work.kernels == "triton" else width + 4)
    return logits + (0 if frozen else vocab * hidden * (4 + width)) + work.tokens * hidden * width


@dataclass(frozen=True)
class _Moment:
    """What is there besides what lasts, in bytes."""

    weights: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    loss: float = 0.0
    buckets: float = 0.0
    temporary: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.activations + self.loss + self.buckets + self.temporary


def plan_memory(
    config: DecoderConfig, ds_config: dict[str, Any], world_size: int, work: Work, cuda: bool, lora: Lora | None = None
) -> Memory:
    """The memory of one of `world_size` devices.

    Args:
        ds_config: as it is in its file or filled.
        cuda: False for processes on a CPU, where pages of a buffer count when they are written, and AdamW is torch's.
        lora: the deltas of a model that is trained as such.
    """
    zero = ds_config["zero_optimization"]
    stage = zero.get("stage", 0)
    parameters, trained = _parameters(config, lora)
    width = _BYTES[work.precision]
    held = parameters / world_size  # with ZeRO-3
    part = trained / (world_size if stage else 1)
    on_host = offloads(ds_config, "offload_optimizer")
    weights_on_host = offloads(ds_config, "offload_param")
    master = 4 if work.precision != "fp32" or stage in (1, 2) else 0
    states = part * (8 + master)
    weights = parameters * width if stage < 3 else 0.0 if weights_on_host else held * width
    host = (states + part * (4 + width) if on_host else 0.0) + (held * width if weights_on_host else 0.0)
    moments = _moments(config, ds_config, world_size, work, cuda, lora)
    name = max(moments, key=lambda moment: moments[moment].total)
    peak = moments[name]
    return Memory(
        weights=int(weights + peak.weights),
        optimizer=0 if on_host else int(states),
        gradients=int(peak.gradients),
        activations=int(peak.activations),
        loss=int(peak.loss),
        buckets=int(peak.buckets),
        temporary=int(peak.temporary),
        host=int(host),
        peak=name,
    )


def _parameters(config: DecoderConfig, lora: Lora | None) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    whole = padded_parameters(config)
    if lora is None:
        return whole, whole
    trained = lora_parameters(config, lora)
    return whole + trained, trained


def _moments(
    config: DecoderConfig, ds_config: dict[str, Any], world_size: int, work: Work, cuda: bool, lora: Lora | None
) -> dict[str, _Moment]:
    """The moments of a step that can be its peak."""
    zero = ds_config["zero_optimization"]
    stage, (whole, parameters) = zero.get("stage", 0), _parameters(config, lora)
    width = _BYTES[work.precision]
    grad_width = _BYTES[(ds_config.get("data_types") or {}).get("grad_accum_dtype") or work.precision]
    part = parameters / (world_size if stage else 1)
    on_host = offloads(ds_config, "offload_optimizer")
    bucket = zero.get("reduce_bucket_size", 500_000_000)
    filled = float(min(bucket, parameters) * width)
    # On a device a buffer is taken whole; on a CPU its pages count when gradients are written into them.
    buffer = float(bucket * width) if cuda else filled
    overlap = zero.get("overlap_comm")
    inside, loss = activations(config, work, lora), loss_memory(config, work, "cuda" if cuda else "cpu", lora is not None)
    several = parameters > bucket  # otherwise all gradients fit the bucket, and it is reduced when the activations are gone
    adam = 0.0 if cuda or on_host else 8.0 * part  # torch's AdamW takes two tensors as large as its parameter
    fp32_copy = 0.0 if on_host or (width == 4 and stage == 0) else 4.0 * part
    live = 0.0
    if stage == 0:
        own, buffer = float(parameters * grad_width), 0.0
        backward, reduction, held = own, own, own
    elif stage == 1:
        # Gradients of all parameters wait in place for the reduction; then they lie in the bucket, which so outlives the step.
        own = float(parameters * grad_width)
        backward, reduction, held = own, own if several else 0.0, own
    elif stage == 2:
        buffer *= 2 if overlap else 1
        own = 0.0 if on_host else part * grad_width
        backward, reduction, held = own if several else 0.0, own if several else 0.0, own
    else:
        live = _live_parameters(config, zero, whole) * width
        own = 0.0 if on_host else part * grad_width
        backward, reduction, held = own, own, own
    in_backward = buffer if stage >= 2 else 0.0
    return {
        "backward": _Moment(live, backward, inside, loss, in_backward, filled if several and stage >= 2 else 0.0),
        "reduction": _Moment(live, reduction, 0.0, 0.0, buffer, filled if world_size > 1 else 0.0),
        "step": _Moment(0.0, held + fp32_copy, 0.0, 0.0, buffer if stage == 3 else 0.0, adam),
    }


def _live_parameters(config: DecoderConfig, zero: dict[str, Any], parameters: int) -> float:
    """Parameters that ZeRO-3 has gathered at once: those within `max_reuse_distance` stay, at most `max_live_parameters`."""
    live = zero.get("stage3_max_live_parameters", zero.get("max_live_parameters", 1e9))
    reuse = zero.get("stage3_max_reuse_distance", zero.get("max_reuse_distance", 1e9))
    prefetch = zero.get("stage3_prefetch_bucket_size", zero.get("prefetch_bucket_size", 5e7))
    layer = (num_parameters(config) - config.vocab_size * config.hidden_size) / config.num_layers
    table = config.padded_vocab_size * config.hidden_size
    working = max(layer, table) + prefetch
    return min(parameters, live, max(working, min(reuse, parameters)))
