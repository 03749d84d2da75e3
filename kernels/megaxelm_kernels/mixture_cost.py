"""What the Triton kernels of `mixture` move and launch for one token of each sequence, beside the floor."""

from __future__ import annotations

from dataclasses import dataclass

WAYS = ("greedy", "drawn", "filtered", "expert_then_token")
_HEAD_TILE, _MIX_TILE = 128, 1024  # tokens of a tile of `head_product` and of `mix_tiles`
_FILTER_LAUNCHES = 18  # 8 passes for top-k, 8 for top-p, one for equal tokens, one that draws


@dataclass(frozen=True)
class MixtureCost:
    """Bytes of device memory, most of them in the caches where rows are few, and launches."""

    floor_bytes: int
    """Heads of the experts in use, hidden states and results, each once."""
    bytes: int
    """All that is read and written: as if a filter left out no block of tokens in any pass, and greedy looked at one tile a sequence."""
    launches: int

    @property
    def floor_share(self) -> float:
        """Floor over bytes: what the time can at best be of the floor's."""
        return self.floor_bytes / self.bytes


def mixture_cost(
    *,
    batch: int,
    experts_a_sequence: int,
    experts_in_use: int,
    vocab_size: int,
    hidden_size: int,
    itemsize: int = 2,
    way: str = "greedy",
    temperature_on: str = "mixture",
    shared_head: bool = False,
) -> MixtureCost:
    """Cost of `mixture_next_token` (ways greedy, drawn, filtered) or `draw_expert_then_token` for `batch` sequences.

    Args:
        experts_in_use: experts that some sequence has kept; for expert_then_token those that were drawn. One head if `shared_head`.
        itemsize: bytes of a weight.

    Raises:
        ValueError: an unknown way; a count below 1.
    """
    if way not in WAYS:
        raise ValueError(f"way = {way!r}: choose one of {', '.join(WAYS)}")
    counts = {"batch": batch, "experts_a_sequence": experts_a_sequence, "experts_in_use": experts_in_use, "vocab_size": vocab_size}
    for name, count in (counts | {"hidden_size": hidden_size, "itemsize": itemsize}).items():
        if count < 1:
            raise ValueError(f"{name} = {count}: choose at least 1")
    alone = way == "expert_then_token"
    rows = batch * (1 if alone else experts_a_sequence)
    heads = (1 if shared_head else experts_in_use) * vocab_size * hidden_size * itemsize
    results = batch * (24 if alone else 12 + 4 * experts_a_sequence)
    floor = heads + rows * hidden_size * itemsize + results
    tiles, mix_tiles = -(-vocab_size // _HEAD_TILE), -(-vocab_size // _MIX_TILE)
    if alone:
        return MixtureCost(floor, floor + 2 * 20 * rows * tiles + 20 * batch * experts_a_sequence, 3)
    moved = floor + rows * (4 * vocab_size + 2 * 8 * tiles + 2 * 8)
    if way == "greedy":
        moved += rows * 4 * (tiles + _MIX_TILE) + batch * 2 * 8 * mix_tiles
    else:
        moved += rows * 4 * vocab_size + batch * 2 * 8 * mix_tiles
    on_experts = temperature_on == "experts" and way != "greedy"
    if on_experts:
        moved += rows * 4 * vocab_size
    if way == "filtered":
        moved += batch * 4 * vocab_size * (1 + _FILTER_LAUNCHES)
    return MixtureCost(floor, moved, 4 + on_experts + (_FILTER_LAUNCHES if way == "filtered" else 0))
