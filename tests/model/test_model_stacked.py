"""A stack of experts computes what each of them computes alone, whatever reads together, and keeps apart what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig, config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.source import WeightSource, decoder_source
from megaxelm.model.stacked import Piece, StackedDecoder, load_stack
from megaxelm.recipe import ModelConfig

VOCAB = 203
SMALL: dict[str, Any] = {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "intermediate_size": 80, "max_positions": 300}
CONFIGS = {
    "xglm": config_from_recipe(ModelConfig(family="xglm", **SMALL), VOCAB, 0, 2, 1),
    "llama": config_from_recipe(ModelConfig(family="llama", num_kv_heads=2, tie_embeddings=False, **SMALL), VOCAB, 0, 1, 2),
    "window": replace(config_from_recipe(ModelConfig(family="llama", **SMALL), VOCAB, 0, 1, 2), sliding_window=5),
    "qwen2": config_from_recipe(ModelConfig(family="qwen2", num_kv_heads=2, **SMALL), VOCAB, 0, 1, 2),
    "qwen3": config_from_recipe(ModelConfig(family="qwen3", num_kv_heads=1, **SMALL), VOCAB, 0, 1, 2),
}


def expert(config: DecoderConfig, seed: int) -> Decoder:
    decoder = Decoder(config)
    decoder.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():  # biases of zero and norms of one would hide a mistake in them
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return decoder.eval()


def truth(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """Hidden states [tokens, H] in fp64 by the packed forward pass."""
    wide = Decoder(decoder.config).double()
    wide.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        return wide(torch.tensor(tokens), torch.arange(len(tokens)), torch.tensor([0, len(tokens)]))  # type: ignore[no-any-return]


def text(seed: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def stack_of(decoders: Sequence[Decoder], **options: Any) -> StackedDecoder:
    return load_stack([decoder_source(decoder) for decoder in decoders], **options)


@pytest.mark.parametrize("all_positions", [False, True])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_texts_that_read_together_in_pieces_get_what_each_expert_computes_alone(family: str, all_positions: bool) -> None:
    """Beginnings, continuations and single tokens in one call, long texts beside short ones, experts with many texts and with none."""
    decoders = [expert(CONFIGS[family], seed) for seed in range(3)]
    stack = stack_of(decoders, dtype=torch.float32)
    cache = stack.new_cache()
    texts = [text(0, 40), text(1, 9), text(2, 150), text(3, 12)]
    pairs = [(2, 0), (0, 1), (2, 2), (0, 0), (0, 3)]  # (expert, text); no text for expert 1
    rows = [cache.new_row(len(texts[number])) for _, number in pairs]
    # Tokens of each pair in each call; 0: not in this call.
    calls = [[12, 3, 1, 7, 0], [1, 2, 140, 0, 1], [1, 1, 1, 1, 1], [1, 1, 0, 1, 6], [0, 2, 5, 20, 1]]
    expected = [truth(decoders[number], texts[which]) for number, which in pairs]
    for counts in calls:
        chosen = [index for index, count in enumerate(counts) if count]
        pieces = []
        for index in chosen:
            begin = rows[index].length
            pieces.append(Piece(pairs[index][0], rows[index], texts[pairs[index][1]][begin : begin + counts[index]]))
        read = stack.read(pieces, cache, all_positions=all_positions)
        assert read.groups.num_rows == len(read.hidden)
        for place, index in enumerate(chosen):
            end, count = rows[index].length, counts[index] if all_positions else 1
            found = read.hidden[read.first_row[place] : read.first_row[place] + count]
            torch.testing.assert_close(found.double(), expected[index][end - count : end], rtol=2e-5, atol=2e-5)


def test_a_place_that_is_given_back_is_used_again_and_keeps_nothing() -> None:
    config = CONFIGS["llama"]
    decoders = [expert(config, 0)]
    stack = stack_of(decoders)
    cache = stack.new_cache()
    first = cache.new_row(100)
    stack.read([Piece(0, first, text(0, 60))], cache)
    cache.free(first)
    assert cache.num_tokens == 0
    again = cache.new_row(100)
    assert again.slot == first.slot
    read = stack.read([Piece(0, again, text(1, 7))], cache)
    read = stack.read([Piece(0, again, [9])], cache)
    torch.testing.assert_close(read.hidden[0].double(), truth(decoders[0], [*text(1, 7), 9])[-1], rtol=2e-5, atol=2e-5)


def test_a_row_can_be_taken_back_to_an_earlier_length() -> None:
    decoders = [expert(CONFIGS["qwen3"], 0)]
    stack = stack_of(decoders)
    cache = stack.new_cache()
    row = cache.new_row(50)
    stack.read([Piece(0, row, text(0, 20))], cache)
    row.length = 11
    read = stack.read([Piece(0, row, text(5, 4))], cache, all_positions=True)
    torch.testing.assert_close(read.hidden.double(), truth(decoders[0], [*text(0, 20)[:11], *text(5, 4)])[11:], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_what_all_experts_share_is_kept_once(tied: bool) -> None:
    config = replace(CONFIGS["llama"], tie_embeddings=tied)
    decoders = [expert(config, seed) for seed in range(3)]
    with torch.no_grad():
        for decoder in decoders[1:]:
            decoder.embed.weight.copy_(decoders[0].embed.weight)
    stack = stack_of(decoders)
    assert stack.weights.shared == {"embed.weight"}
    assert stack.weights["embed.weight"].stride(0) == 0 and (stack.heads.stride(0) == 0) == tied
    cache = stack.new_cache()
    rows = [cache.new_row(20) for _ in range(3)]
    read = stack.read([Piece(number, row, text(number, 5)) for number, row in enumerate(rows)], cache)
    for number in range(3):
        torch.testing.assert_close(read.hidden[number].double(), truth(decoders[number], text(number, 5))[-1], rtol=2e-5, atol=2e-5)


def test_experts_take_turns_in_the_slots_there_are() -> None:
    config = CONFIGS["qwen2"]
    decoders = [expert(config, seed) for seed in range(4)]
    asked: list[int] = []

    def watched(number: int) -> WeightSource:
        source = decoder_source(decoders[number])
        return WeightSource(source.config, lambda name: (asked.append(number), source.weight(name))[1])  # type: ignore[func-returns-value]

    stack = load_stack([watched(number) for number in range(4)], resident=2)
    asked.clear()
    cache = stack.new_cache()
    assert stack.batches([0, 1, 2, 3]) == [[0, 1], [2, 3]]
    rows = [cache.new_row(20) for _ in range(4)]
    for turn in ([0], [3, 0], [2, 3], [1], [0, 1]):
        read = stack.read([Piece(number, rows[number], text(number, 3)) for number in turn], cache)
        for place, number in enumerate(turn):
            length = rows[number].length
            whole = (text(number, 3) * 3)[:length]
            found = read.hidden[read.first_row[place]]
            torch.testing.assert_close(found.double(), truth(decoders[number], whole)[-1], rtol=2e-5, atol=2e-5)
    # 3 took the place of 1, 2 that of 0, 1 that of 2 (3 was wanted with it, and later than 2 only by its number), then 0 came back.
    assert list(dict.fromkeys(asked)) == [3, 2, 1, 0] and stack.swaps.swaps == 4 and stack.swaps.bytes > 0
    with pytest.raises(ModelError, match=r"3 experts are to run together, 2 fit"):
        stack.read([Piece(number, rows[number], [5]) for number in (0, 1, 2)], cache)


def test_a_row_too_small_for_its_text_is_an_error_and_changes_nothing() -> None:
    stack = stack_of([expert(CONFIGS["llama"], 0)])
    cache = stack.new_cache()
    row = cache.new_row(10)
    stack.read([Piece(0, row, text(0, 100))], cache)
    with pytest.raises(ModelError, match="129 tokens do not fit a row for 128"):
        stack.read([Piece(0, row, text(0, 29))], cache)
    assert row.length == 100
    with pytest.raises(ModelError, match="301 tokens; choose 1 to 300"):
        cache.new_row(301)
    assert cache.new_row(290).capacity == 300


def test_experts_of_two_architectures_are_named_with_what_differs() -> None:
    decoders = [expert(CONFIGS["llama"], 0), expert(replace(CONFIGS["llama"], num_layers=1), 0)]
    with pytest.raises(ModelError, match="experts 0 and 1 differ in num_layers"):
        stack_of(decoders)
    with pytest.raises(ModelError, match="resident = 2: choose 1 to 1"):
        stack_of(decoders[:1], resident=2)


@pytest.mark.parametrize("family", ["xglm", "qwen3"])
def test_bf16_stays_near_fp32(family: str) -> None:
    decoders = [expert(CONFIGS[family], seed) for seed in range(2)]
    stack = stack_of(decoders, dtype=torch.bfloat16)
    cache = stack.new_cache()
    rows = [cache.new_row(30) for _ in range(2)]
    stack.read([Piece(number, row, text(0, 20)) for number, row in enumerate(rows)], cache)
    read = stack.read([Piece(number, row, [7]) for number, row in enumerate(rows)], cache)
    assert read.hidden.dtype == torch.bfloat16
    for number in range(2):
        expected = truth(decoders[number], [*text(0, 20), 7])[-1]
        plain = Decoder(decoders[number].config).bfloat16()
        plain.load_state_dict(decoders[number].state_dict())
        with torch.no_grad():
            tokens = torch.tensor([*text(0, 20), 7])
            same_type = plain(tokens, torch.arange(21), torch.tensor([0, 21]))[-1]
        bound = 3 * (same_type.double() - expected).abs().max()
        assert (read.hidden[number].double() - expected).abs().max() <= bound


@pytest.mark.parametrize("family", ["qwen3", *(pytest.param(family, marks=pytest.mark.slow) for family in ("xglm", "llama", "window"))])
def test_the_kernels_compute_what_torch_computes(family: str) -> None:
    """Prompts, then single tokens of uneven lengths, by Triton and by torch."""
    pytest.importorskip("triton", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoders = [expert(CONFIGS[family], seed) for seed in range(2)]
    found = {}
    for kernels in ("torch", "triton"):
        stack = stack_of(decoders, device=device, kernels=kernels)
        cache = stack.new_cache()
        rows = [cache.new_row(60) for _ in range(3)]
        owners = [1, 0, 1]
        stack.read([Piece(owners[number], rows[number], text(number, 3 + 4 * number)) for number in range(3)], cache)
        parts = [
            stack.read([Piece(owners[number], rows[number], [9 + number]) for number in chosen], cache) for chosen in ([0, 1, 2], [2, 1])
        ]
        found[kernels] = [read.hidden[row].double() for read in parts for row in read.first_row]
    for torchs, tritons in zip(found["torch"], found["triton"], strict=True):
        torch.testing.assert_close(tritons, torchs, rtol=1e-4, atol=1e-4)


def test_places_that_are_given_back_are_all_used_again() -> None:
    cache = stack_of([expert(CONFIGS["llama"], 0)]).new_cache()
    rows = [cache.new_row(20) for _ in range(4)]
    for number in (2, 0, 3):
        cache.free(rows[number])
    again = [cache.new_row(20).slot for _ in range(3)]
    assert again == [0, 2, 3] and cache.slab(128).num_slots == 4
