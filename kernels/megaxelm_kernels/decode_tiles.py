"""Tiles and grids of the kernels of a decoding step, from shapes that the host knows. Needs no triton, so that costs are counted anywhere.

A grid depends on bounds alone, never on how rows are spread over groups or how long they are: a CUDA graph is replayed with other ones.
"""

from __future__ import annotations

from dataclasses import dataclass

LINEAR_PROGRAMS = 256  # wanted at least: about two on each of 132 multiprocessors
_PIPELINE_BYTES = 100 * 1024  # of shared memory a program, so that two fit on a multiprocessor
_LEAST_STEPS, _MOST_LINEAR_SPLITS = 4, 8
ATTENTION_PROGRAMS = 512  # wanted at least: about four on each of 132 multiprocessors
_LEAST_PLACES = 128  # of a split
_MOST_SPLITS = 32  # which the second kernel holds at once


@dataclass(frozen=True)
class LinearTiles:
    """A program's tile of rows, outputs and features (at a time), and the grid."""

    rows: int
    outs: int
    features: int
    splits: int
    """Parts of the features, each of `features_a_split`; with more than one a second kernel adds them."""
    features_a_split: int
    row_tiles: int
    """As many as the rows can need, however they are spread over the groups."""
    stages: int
    warps: int


def linear_tiles(num_rows: int, num_groups: int, size_out: int, size_in: int, itemsize: int) -> LinearTiles:
    """Of `grouped_linear`, for at least one row and one output."""
    rows = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64 if num_rows <= 128 or itemsize == 4 else 128
    busy = min(num_groups, num_rows)
    row_tiles = min(num_rows, (num_rows + (rows - 1) * busy) // rows)
    # Each program reads the features of all its rows: wide tiles where rows are many, narrow ones where programs are few.
    outs = 128 if rows == 128 and row_tiles > 2 * busy else 64
    while outs > 16 and rows <= 64 and _cdiv(size_out, outs) * row_tiles < LINEAR_PROGRAMS:
        outs //= 2
    features = 32 if itemsize == 4 else (256 if rows <= 32 else 128) // itemsize
    features = min(features, max(16, power_of_2(size_in)))
    wanted = LINEAR_PROGRAMS // (_cdiv(size_out, outs) * row_tiles)
    splits = max(1, min(wanted, size_in // (_LEAST_STEPS * features), _MOST_LINEAR_SPLITS))
    features_a_split = max(1, _cdiv(_cdiv(size_in, splits), features)) * features
    return LinearTiles(
        rows=rows,
        outs=outs,
        features=features,
        splits=max(1, _cdiv(size_in, features_a_split)),
        features_a_split=features_a_split,
        row_tiles=row_tiles,
        stages=max(2, min(6, _PIPELINE_BYTES // ((rows + outs) * features * itemsize))),
        warps=8 if rows == 128 or itemsize == 4 else 4,  # products in fp32 are kept in registers
    )


@dataclass(frozen=True)
class AttentionTiles:
    """A program's tile of places (at a time), query heads of one key head and features, and the grid."""

    splits: int
    """Parts of the places, each of `places_a_split`; with more than one a second kernel joins them."""
    places_a_split: int
    places: int
    heads: int
    width: int
    stages: int
    warps: int


def attention_tiles(num_rows: int, kv_heads: int, heads_a_key: int, head_dim: int, places: int, itemsize: int) -> AttentionTiles:
    """Of `decode_attention`; `places` is a bound of those that a row sees."""
    width = max(16, power_of_2(head_dim))
    tile = max(16, min(64, 16384 // (width * itemsize)))
    wanted = _cdiv(ATTENTION_PROGRAMS, max(1, num_rows * kv_heads))
    splits = max(1, min(wanted, _cdiv(places, _LEAST_PLACES), _MOST_SPLITS))
    places_a_split = _cdiv(_cdiv(max(places, 1), splits), tile) * tile
    return AttentionTiles(
        splits=_cdiv(max(places, 1), places_a_split),
        places_a_split=places_a_split,
        places=tile,
        heads=max(16, power_of_2(heads_a_key)),
        width=width,
        stages=3,
        warps=8 if itemsize == 4 else 4,
    )


def power_of_2(size: int) -> int:
    """The least power of 2 that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
