"""Experts in the layers of a decoder: who reads a token, with which weight, in training, decoding and the stack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig, active_parameters, num_parameters
from megaxelm.model.decoder import Decoder
from megaxelm.model.layers import FeedForward, feed_forward
from megaxelm.model.moe import MoeFeedForward, top_experts
from megaxelm.model.source import WeightSource, decoder_source
from megaxelm.model.stacked import Piece, load_stack

DENSE = DecoderConfig(
    family="llama",
    vocab_size=130,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    max_positions=32,
)
CONFIG = replace(DENSE, family="mixtral", num_experts=4, experts_per_token=2)
TOKENS = [5, 9, 121, 7, 7, 64, 3, 2, 88, 90]


def drawn(config: DecoderConfig, seed: int) -> Decoder:
    """Random weights that are far from uniform predictions."""
    decoder = Decoder(config)
    decoder.initialise(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return decoder.eval()


def logits(decoder: Decoder, tokens: list[int] = TOKENS) -> Tensor:
    count = len(tokens)
    with torch.no_grad():
        return decoder.logits(decoder(torch.tensor(tokens), torch.arange(count), torch.tensor([0, count])))


def test_weights_of_the_chosen_sum_to_one_and_keep_their_ratios() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 5.0, 4.0]])
    weights, chosen = top_experts(scores, 2)
    assert chosen.tolist() == [[1, 2], [2, 3]]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    torch.testing.assert_close(weights[:, 0] / weights[:, 1], torch.full((2,), 2.718281828))


def test_a_router_that_knows_its_mind_gives_that_experts_feed_forward_part() -> None:
    layer = feed_forward(replace(CONFIG, experts_per_token=1))
    assert isinstance(layer, MoeFeedForward)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1.0
    with torch.no_grad():
        for number in range(4):
            layer.router.weight.zero_()  # type: ignore[union-attr, operator]
            layer.router.weight[number, 0] = 50.0  # type: ignore[index]
            assert torch.equal(layer(x), layer.experts[number](x))


def moe_of(experts: list[Decoder], config: DecoderConfig, router_seed: int) -> Decoder:
    """Experts of layers from dense models; all else is the first's."""
    moe = drawn(config, router_seed)
    state = {name: tensor for name, tensor in experts[0].state_dict().items() if ".mlp." not in name}
    for number, expert in enumerate(experts):
        for name, tensor in expert.state_dict().items():
            if ".mlp." in name:
                state[name.replace(".mlp.", f".mlp.experts.{number}.")] = tensor
    moe.load_state_dict(state, strict=False)
    return moe


@pytest.mark.parametrize("k", [1, 2, 4])
def test_identical_experts_are_the_dense_model_whatever_the_router(k: int) -> None:
    dense = drawn(DENSE, 0)
    moe = moe_of([dense] * 4, replace(CONFIG, experts_per_token=k), router_seed=k)
    assert float((logits(moe) - logits(dense)).abs().max()) < 2e-5


def test_all_experts_weighted_by_hand() -> None:
    moe = drawn(replace(CONFIG, experts_per_token=3), 3)
    layer = moe.layers[0].mlp
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = layer(x)
        scores = x @ layer.router.weight.T
        expected = torch.zeros_like(x)
        for row in range(9):
            chosen = sorted(range(4), key=lambda e: -float(scores[row, e]))[:3]
            share = torch.softmax(scores[row, chosen], 0)
            expected[row] = sum(share[i] * layer.experts[e](x[row : row + 1])[0] for i, e in enumerate(chosen))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_has_a_gradient_in_training_also_where_no_token_came() -> None:
    moe = drawn(replace(CONFIG, num_experts=6, experts_per_token=1), 1).train()
    tokens = torch.tensor([5, 9])
    moe(tokens, torch.arange(2), torch.tensor([0, 2]), labels=tokens).loss_sum.backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())
    chosen = [float(expert.up.weight.grad.abs().sum()) > 0 for expert in moe.layers[0].mlp.experts]
    assert 1 <= sum(chosen) <= 2, "two tokens, one expert each"
    two = drawn(CONFIG, 1).train()
    two(tokens, torch.arange(2), torch.tensor([0, 2]), labels=tokens).loss_sum.backward()
    assert float(two.layers[1].mlp.router.weight.grad.abs().sum()) > 0


def test_cached_decoding_reads_as_the_whole_text() -> None:
    moe = drawn(CONFIG, 2)
    cache = moe.new_cache(1, 16)
    parts = [TOKENS[:4], TOKENS[4:5], TOKENS[5:]]
    hidden = [moe.decode(torch.tensor([part]), torch.tensor([len(part)]), cache, all_positions=True)[0] for part in parts]
    with torch.no_grad():
        found = moe.logits(torch.cat(hidden))
    assert float((found - logits(moe)).abs().max()) < 1e-4


def test_a_stack_of_such_models_reads_as_each_alone() -> None:
    models = [drawn(CONFIG, seed) for seed in range(3)]
    stack = load_stack([decoder_source(model) for model in models])
    cache = stack.new_cache()
    texts = [TOKENS, TOKENS[3:], TOKENS[:1]]
    pieces = [Piece(expert, cache.new_row(16), text) for expert, text in ((2, texts[0]), (0, texts[1]), (1, texts[2]))]
    read = stack.read(pieces, cache, all_positions=True)
    for piece, first in zip(pieces, read.first_row, strict=True):
        with torch.inference_mode():
            found = models[piece.expert].logits(read.hidden[first : first + len(piece.tokens)])
        assert float((found - logits(models[piece.expert], list(piece.tokens))).abs().max()) < 1e-4


def test_parameters_are_counted_in_all_and_for_a_token() -> None:
    moe = Decoder(CONFIG)
    padding = (CONFIG.padded_vocab_size - CONFIG.vocab_size) * CONFIG.hidden_size
    assert num_parameters(CONFIG) == sum(parameter.numel() for parameter in moe.parameters()) - padding
    expert = sum(parameter.numel() for parameter in FeedForward(CONFIG).parameters())
    assert num_parameters(CONFIG) - active_parameters(CONFIG) == 2 * (4 - 2) * expert
    assert active_parameters(DENSE) == num_parameters(DENSE)


def test_fresh_experts_write_into_the_residual_stream_as_a_dense_layer_does() -> None:
    moe = Decoder(replace(CONFIG, hidden_size=64, intermediate_size=64))
    moe.initialise(0)
    mlp = moe.layers[0].mlp
    assert float(mlp.experts[3].down.weight.detach().std()) == pytest.approx(0.01, rel=0.1)  # 0.02 / sqrt(2 layers * 2)
    assert float(mlp.experts[3].up.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("values", [{"experts_per_token": 0}, {"experts_per_token": 5}, {"num_experts": 0}, {"mlp_bias": True}])
def test_numbers_of_experts_that_make_no_sense_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="experts"):
        replace(CONFIG, **values)


def test_a_source_of_another_number_of_experts_is_not_stacked() -> None:
    sources: list[WeightSource] = [decoder_source(drawn(CONFIG, 0)), decoder_source(drawn(replace(CONFIG, num_experts=3), 0))]
    with pytest.raises(ModelError, match=r"num_experts \(4, 3\)"):
        load_stack(sources)
