"""A stack of low-rank deltas computes what each merged expert computes, and holds their base once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lora_models import CONFIGS, VOCAB, adapted, merged, write_base
from torch import Tensor

from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import open_pretrained
from megaxelm.model.lora import lora_parameters
from megaxelm.model.source import WeightSource, decoder_source
from megaxelm.model.stacked import Piece, StackedDecoder, load_stack


def text(seed: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def truth(source: WeightSource, tokens: Sequence[int]) -> Tensor:
    """Hidden states [tokens, H] of the merged model in fp64."""
    wide = Decoder(source.config).double()
    wide.load_state_dict(merged(source).state_dict())
    with torch.no_grad():
        return wide(torch.tensor(tokens), torch.arange(len(tokens)), torch.tensor([0, len(tokens)]))  # type: ignore[no-any-return]


def check(stack: StackedDecoder, sources: Sequence[WeightSource], pairs: Sequence[tuple[int, int]]) -> None:
    """Texts of several lengths that read together, in two calls, get what each merged expert computes alone. `pairs`: (expert, length)."""
    cache = stack.new_cache()
    texts = [text(number, length) for number, (_, length) in enumerate(pairs)]
    rows = [cache.new_row(length) for _, length in pairs]
    for begin, end in ((0, 5), (5, None)):
        pieces = [Piece(expert, row, tokens[begin:end]) for (expert, _), row, tokens in zip(pairs, rows, texts, strict=True)]
        read = stack.read(pieces, cache, all_positions=True)
        for (expert, _), first, tokens, piece in zip(pairs, read.first_row, texts, pieces, strict=True):
            found = read.hidden[first : first + len(piece.tokens)]
            torch.testing.assert_close(found.double(), truth(sources[expert], tokens)[begin:end], rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_rows_of_many_experts_get_what_each_merged_expert_computes(family: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family)
    sources = [adapted(base, seed) for seed in range(3)]
    stack = load_stack(sources)
    check(stack, sources, [(2, 9), (0, 30), (2, 6), (0, 12)])  # none for expert 1
    assert stack.weights.shared == set(stack.weights.layout), "the whole base is kept once"


def test_ranks_targets_and_scales_may_differ_and_the_base_itself_may_stand_beside(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    sources = [
        adapted(base, 0, rank=5, alpha=3.0),
        adapted(base, 1, rank=2, targets=["k_proj", "up_proj"]),
        open_pretrained(base),
        adapted(base, 2, rank=1, alpha=8.0, targets=["v_proj", "down_proj", "o_proj"]),
    ]
    check(load_stack(sources), sources, [(0, 9), (1, 20), (2, 7), (3, 8), (1, 6)])


def test_projections_without_deltas_cost_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    stack = load_stack([adapted(base, seed, targets=["v_proj"]) for seed in range(2)])
    assert {name for name in stack.weights if ".lora_" in name} == {
        f"layers.{i}.attention.qkv.lora_{kind}" for i in (0, 1) for kind in "AB"
    }
    assert stack.weights["layers.0.attention.qkv.lora_A"].shape == (2, 3, 48)


def test_four_experts_take_the_memory_of_one_and_their_deltas(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "xglm")
    sources = [adapted(base, seed, rank=2) for seed in range(4)]
    one = load_stack([open_pretrained(base)]).weights.nbytes
    four = load_stack([decoder_source(merged(source)) for source in sources]).weights.nbytes
    deltas = load_stack(sources).weights.nbytes
    assert sources[0].adapter is not None
    # B of the joined q, k and v has room for three ranks in each of its rows.
    joined = 4 * 2 * 4 * 2 * (3 * 48) * (3 - 1)
    assert deltas == one + 4 * 4 * lora_parameters(sources[0].config, sources[0].adapter.lora) + joined
    # Of the full experts the embedding, which the deltas leave alone, is shared; so it is in the one that is compared with.
    assert deltas < 1.5 * one < 0.6 * four


def test_experts_take_turns_in_fewer_slots_and_only_deltas_move(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    sources = [adapted(base, 0, rank=3), adapted(base, 1, rank=2, targets=["q_proj"]), open_pretrained(base)]
    stack = load_stack(sources, resident=1)
    for expert in (1, 0, 2, 1, 0):
        check(stack, sources, [(expert, 9)])
    assert stack.swaps.swaps == 5
    names = [name for name in stack.weights if ".lora_" in name]
    assert stack.swaps.bytes == 5 * sum(stack.weights[name][0].nbytes for name in names)


def test_deltas_of_different_bases_are_merged_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = write_base(tmp_path / "base"), write_base(tmp_path / "other", seed=1)
    sources = [adapted(base, 0), open_pretrained(other), adapted(other, 1)]
    stack = load_stack(sources)
    assert "low-rank deltas of 3 different bases are merged" in capsys.readouterr().out
    assert not any(".lora_" in name for name in stack.weights)
    check(stack, sources, [(0, 9), (1, 8), (2, 7)])


def test_the_same_base_in_two_folders_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, copy = write_base(tmp_path / "base"), write_base(tmp_path / "copy")
    stack = load_stack([adapted(base, 0), adapted(copy, 1)])
    assert stack.weights.shared == set(stack.weights.layout) and capsys.readouterr().out == ""


def test_half_precision_and_kernels_add_the_deltas(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    sources = [adapted(base, seed) for seed in range(2)]
    stack = load_stack(sources, torch.bfloat16)
    cache = stack.new_cache()
    tokens = text(0, 12)
    read = stack.read([Piece(1, cache.new_row(12), tokens)], cache, all_positions=True)
    expected = truth(sources[1], tokens)
    assert (read.hidden.double() - expected).abs().mean() < 0.03 * expected.abs().mean()
    assert (read.hidden.double() - truth(open_pretrained(base), tokens)).abs().mean() > 0.2 * expected.abs().mean()


@pytest.mark.slow
def test_triton_adds_the_deltas(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    base = write_base(tmp_path / "base", "xglm")
    sources = [adapted(base, seed) for seed in range(2)]
    check(load_stack(sources, kernels="triton"), sources, [(1, 7), (0, 6)])
