"""The decoder: isolation of documents, loss, dropout, checkpointing, cached decoding, padded vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig, config_from_recipe
from megaxelm.model.decoder import Decoder, DropoutKey, LossOutput, dropout_keys
from megaxelm.recipe import ModelConfig

VOCAB = 301
LENGTHS = [30, 1, 17, 40, 22, 3]


def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    model = ModelConfig(
        family=family,  # type: ignore[arg-type]
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=None if family == "xglm" else 2,
        intermediate_size=48,
        max_positions=128,
    )
    decoder = Decoder(replace(config_from_recipe(model, VOCAB, 1, 2, 3), **changes))
    decoder.initialise(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # far from uniform predictions, so that differences show
    return decoder.to(dtype)


def packed(lengths: list[int] | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    lengths = LENGTHS if lengths is None else lengths
    tokens = torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.cat([torch.arange(n) for n in lengths]), torch.tensor([0, *lengths]).cumsum(0)


def labels_of(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    labels = tokens.roll(-1)
    labels[cu_seqlens[1:] - 1] = -100
    return labels


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    named = dict(decoder.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("family", ["llama", "xglm"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [LENGTHS, [32] * 4, [20] * 12, [100] + [7] * 9, [60, 4, 64, 30, 34]])
@torch.no_grad()
def test_changing_one_document_leaves_the_others_bit_identical(
    lengths: list[int], dtype: torch.dtype, window: int | None, family: str
) -> None:
    decoder = make(family, dtype, sliding_window=window)
    tokens, positions, cu_seqlens = packed(lengths)
    start, stop = cu_seqlens[1:3].tolist()
    changed = tokens.clone()
    changed[start:stop] = (changed[start:stop] + 1) % VOCAB
    before, after = (decoder.logits(decoder(t, positions, cu_seqlens)) for t in (tokens, changed))
    others = torch.ones(len(tokens), dtype=torch.bool)
    others[start:stop] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


@torch.no_grad()
def test_a_packed_document_equals_the_document_alone() -> None:
    decoder = make()
    tokens, positions, cu_seqlens = packed()
    together = decoder(tokens, positions, cu_seqlens).split(LENGTHS)
    for document, hidden in zip(tokens.split(LENGTHS), together, strict=True):
        n = len(document)
        torch.testing.assert_close(decoder(document, torch.arange(n), torch.tensor([0, n])), hidden, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_token_sees_a_later_one() -> None:
    decoder = make()
    tokens, positions, cu_seqlens = packed([50])
    before = decoder(tokens, positions, cu_seqlens)
    tokens[30:] = (tokens[30:] + 1) % VOCAB
    assert torch.equal(before[:30], decoder(tokens, positions, cu_seqlens)[:30])


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_cross_entropy_of_the_logits(tied: bool) -> None:
    decoder = make(tie_embeddings=tied).double()
    tokens, positions, cu_seqlens = packed()
    labels, weights = labels_of(tokens, cu_seqlens), torch.rand(len(tokens), dtype=torch.float64)
    out = decoder(tokens, positions, cu_seqlens, labels=labels, loss_weights=weights, loss_chunk_rows=13)
    assert isinstance(out, LossOutput)
    logits = decoder.logits(decoder(tokens, positions, cu_seqlens))
    truth = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(out.loss_sum, truth)
    assert out.num_targets.item() == len(tokens) - len(LENGTHS)
    expected = gradients(decoder, truth)
    for name, grad in gradients(decoder, out.loss_sum).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_of_the_vocabulary_has_no_probability_and_no_gradient() -> None:
    decoder = make()
    assert decoder.head.weight.shape[0] == 384
    tokens, positions, cu_seqlens = packed()
    with torch.no_grad():
        decoder.head.weight[VOCAB:] = 10.0
    hidden = decoder(tokens, positions, cu_seqlens)
    assert decoder.logits(hidden).shape[-1] == VOCAB
    grads = gradients(decoder, decoder(tokens, positions, cu_seqlens, labels=tokens).loss_sum)
    assert not grads["embed.weight"][VOCAB:].any()
    scores = decoder.score(tokens, positions, cu_seqlens, tokens).target_logprob
    torch.testing.assert_close(scores, decoder.logits(hidden).log_softmax(-1).gather(1, tokens[:, None])[:, 0].detach())


def test_score_is_the_log_probability_of_the_label() -> None:
    decoder = make()
    tokens, positions, cu_seqlens = packed()
    labels = labels_of(tokens, cu_seqlens)
    scores = decoder.score(tokens, positions, cu_seqlens, labels, rows_per_chunk=10).target_logprob
    assert scores.dtype == torch.float32 and not scores.requires_grad
    loss = decoder(tokens, positions, cu_seqlens, labels=labels).loss_sum
    torch.testing.assert_close(-scores.sum(), loss.detach())
    assert torch.equal(scores == 0, labels == -100)


def keys_for(lengths: list[int], step: int = 0, seed: int = 0, samples: list[int] | None = None) -> DropoutKey:
    ids = torch.tensor(range(len(lengths)) if samples is None else samples).repeat_interleave(torch.tensor(lengths))
    return dropout_keys(seed, step, ids, torch.cat([torch.arange(n) for n in lengths]))


def test_dropout_follows_the_sample_not_its_place_in_the_batch() -> None:
    decoder = make(residual_dropout=0.2)
    tokens, positions, cu_seqlens = packed([20, 30, 10])
    together = decoder(tokens, positions, cu_seqlens, dropout=keys_for([20, 30, 10]))
    alone = decoder(tokens[20:50], torch.arange(30), torch.tensor([0, 30]), dropout=keys_for([30], samples=[1]))
    torch.testing.assert_close(together[20:50], alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(together, decoder(tokens, positions, cu_seqlens, dropout=keys_for([20, 30, 10])))
    assert not torch.allclose(together, decoder(tokens, positions, cu_seqlens, dropout=keys_for([20, 30, 10], step=1)))
    assert not torch.allclose(together, decoder(tokens, positions, cu_seqlens, dropout=keys_for([20, 30, 10], seed=1)))


def test_dropout_acts_at_every_place_in_training_and_nowhere_in_evaluation() -> None:
    decoder = make(residual_dropout=0.5)
    tokens, positions, cu_seqlens = packed([40])
    with pytest.raises(ModelError, match="residual_dropout = 0.5"):
        decoder(tokens, positions, cu_seqlens)
    from megaxelm_kernels import dropout as kernel

    sites: list[int] = []
    original = kernel.drop_mask
    try:
        kernel.drop_mask = lambda keys, site, features, p: sites.append(site) or original(keys, site, features, p)  # type: ignore[func-returns-value]
        decoder(tokens, positions, cu_seqlens, dropout=keys_for([40]))
    finally:
        kernel.drop_mask = original
    assert sites == [0, 1, 2, 3, 4], "embedding, then two places a layer"
    decoder.eval()
    plain = make()
    assert torch.equal(decoder(tokens, positions, cu_seqlens, dropout=keys_for([40])), plain(tokens, positions, cu_seqlens))


@pytest.mark.parametrize("residual", [0.0, 0.2])
@pytest.mark.parametrize("attention", [0.0, 0.2])
def test_activation_checkpointing_gives_the_same_loss_and_gradients(residual: float, attention: float) -> None:
    decoder = make(residual_dropout=residual, attention_dropout=attention)
    tokens, positions, cu_seqlens = packed()
    results = []
    for every in (0, 1, 2):
        decoder.enable_activation_checkpointing(every)
        torch.manual_seed(0)
        loss = decoder(tokens, positions, cu_seqlens, labels=tokens, dropout=keys_for(LENGTHS)).loss_sum
        results.append((loss.detach(), gradients(decoder, loss)))
    for loss, grads in results[1:]:
        assert torch.equal(results[0][0], loss)
        for name in results[0][1]:
            assert torch.equal(results[0][1][name], grads[name]), name


def test_activation_checkpointing_keeps_fewer_tensors() -> None:
    decoder = make()
    tokens, positions, cu_seqlens = packed()
    kept: list[int] = []
    for every in (0, 2, 1):
        decoder.enable_activation_checkpointing(every)
        count = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, count=count: count.__setitem__(0, count[0] + x.numel()) or x, lambda x: x):
            decoder(tokens, positions, cu_seqlens)
        kept.append(count[0])
    assert kept[2] < kept[0] / 4 and kept[2] < kept[1] < kept[0]


def rows_of(tokens: Tensor, lengths: list[int], start: list[int], take: list[int]) -> Tensor:
    rows = torch.full((len(lengths), max(take)), VOCAB - 1)
    for row, document in enumerate(tokens.split(lengths)):
        piece = document[start[row] : start[row] + take[row]]
        rows[row, : len(piece)] = piece
    return rows


@pytest.mark.parametrize(("family", "window"), [("llama", None), ("llama", 5), ("qwen3", None), ("xglm", None)])
def test_cached_decoding_equals_the_packed_forward(family: str, window: int | None) -> None:
    lengths = [30, 9, 17, 40]
    decoder = make(family, sliding_window=window).eval()
    tokens, positions, cu_seqlens = packed(lengths)
    with torch.no_grad():
        truth = decoder(tokens, positions, cu_seqlens).split(lengths)
    cache = decoder.new_cache(4, 40)
    done = [0, 0, 0, 0]
    # A prompt of different lengths, a second piece with an idle row, then one token at a time.
    pieces = [[12, 3, 1, 7], [5, 0, 9, 20], *[[1, 1, 1, 1]] * 40]
    for step, take in enumerate(pieces):
        take = [min(n, length - d) for n, length, d in zip(take, lengths, done, strict=True)]
        if not any(take):
            break
        batch = rows_of(tokens, lengths, done, take)
        if step == 1:
            every = decoder.decode(batch, torch.tensor(take), cache, all_positions=True)
            last = every[torch.arange(4), (torch.tensor(take) - 1).clamp_min(0)]
            for row, n in enumerate(take):
                torch.testing.assert_close(every[row, :n], truth[row][done[row] : done[row] + n], rtol=1e-5, atol=1e-5)
        else:
            last = decoder.decode(batch, torch.tensor(take), cache)
        done = [d + n for d, n in zip(done, take, strict=True)]
        for row, n in enumerate(take):
            if n:
                torch.testing.assert_close(last[row], truth[row][done[row] - 1], rtol=1e-5, atol=1e-5)
    assert done == lengths
    assert cache.lengths.tolist() == lengths


def test_selected_rows_of_a_cache_go_on_alone() -> None:
    decoder = make().eval()
    cache = decoder.new_cache(3, 20)
    prompt = torch.randint(0, VOCAB, (3, 6))
    decoder.decode(prompt, torch.tensor([6, 2, 4]), cache)
    picked = cache.select(torch.tensor([2, 2, 0]))
    token = torch.tensor([[7], [8], [9]])
    together = decoder.decode(torch.tensor([[9], [0], [7]]), torch.tensor([1, 1, 1]), cache)
    alone = decoder.decode(token, torch.tensor([1, 1, 1]), picked)
    torch.testing.assert_close(alone[[0, 2]], together[[2, 0]], rtol=1e-5, atol=1e-5)
    assert picked.lengths.tolist() == [5, 5, 7]


def test_a_cache_that_is_full_says_so() -> None:
    decoder = make().eval()
    cache = decoder.new_cache(2, 8)
    decoder.decode(torch.zeros(2, 6, dtype=torch.int64), torch.tensor([6, 1]), cache)
    decoder.decode(torch.zeros(2, 6, dtype=torch.int64), torch.tensor([2, 6]), cache)
    with pytest.raises(ModelError, match="9 tokens do not fit max_length = 8"):
        decoder.decode(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1, 1]), cache)
    with pytest.raises(ModelError, match="max_length = 129"):
        decoder.new_cache(1, 129)


def test_initialisation_is_a_function_of_the_seed_and_ties_stay_tied() -> None:
    first, second, other = Decoder(make().config), Decoder(make().config), Decoder(make().config)
    first.initialise(1)
    second.to(torch.bfloat16).initialise(1)
    other.initialise(2)
    assert second.head.weight is second.embed.weight
    for name, parameter in first.state_dict().items():
        assert torch.equal(parameter.to(torch.bfloat16), second.state_dict()[name]), name
    assert not torch.equal(first.embed.weight, other.embed.weight)
    assert abs(first.embed.weight[:VOCAB].std() - 0.02) < 1e-3
    assert abs(first.layers[0].mlp.down.weight.std() - 0.02 / 4**0.5) < 1e-3
    assert not first.embed.weight[VOCAB:].any()


def test_positions_are_exact_in_a_bf16_module() -> None:
    decoder = make("xglm", torch.bfloat16, max_positions=2048)
    assert not list(decoder.buffers())
    from megaxelm.model.decoder import sinusoidal_positions

    rows = torch.tensor([1999, 2000])
    table = sinusoidal_positions(rows, decoder.config)
    assert table.dtype == torch.float32
    assert abs(table[1, 0] - torch.tensor(2000.0, dtype=torch.float64).sin()) < 1e-6


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "xglm"])
def test_bf16_trains_close_to_fp32(family: str) -> None:
    exact, low = make(family), make(family, torch.bfloat16)
    tokens, positions, cu_seqlens = packed()
    truth = exact(tokens, positions, cu_seqlens, labels=tokens)
    out = low(tokens, positions, cu_seqlens, labels=tokens)
    assert out.loss_sum.dtype == torch.float32
    assert abs(out.loss_sum / truth.loss_sum - 1) < 0.03
    expected = gradients(exact, truth.loss_sum)
    for name, grad in gradients(low, out.loss_sum).items():
        if name.endswith("attention.k.bias"):
            continue  # moves all scores of a query alike: its true gradient is zero
        assert (grad.float() - expected[name]).norm() < 0.2 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, "packed documents"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, "positions have shape"),
        ({"cu_seqlens": torch.tensor([0, 50])}, "cu_seqlens ends at 50"),
        ({"cu_seqlens": torch.tensor([0, 0, 113])}, "document 0 has 0 tokens"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels have shape"),
        ({"attention": "varlen"}, "CUDA only"),
        ({"attention": "flash"}, "choose auto"),
    ],
)
def test_input_that_does_not_fit_is_named(change: dict[str, Any], text: str) -> None:
    tokens, positions, cu_seqlens = packed()
    with pytest.raises(ModelError, match=text):
        make()(**{"tokens": tokens, "positions": positions, "cu_seqlens": cu_seqlens, **change})


def test_a_document_longer_than_the_positions_is_an_error() -> None:
    tokens, positions, cu_seqlens = packed([129])
    with pytest.raises(ModelError, match="129 tokens is longer than max_positions = 128"):
        make()(tokens, positions, cu_seqlens)


@pytest.mark.parametrize(
    ("field", "value"), [("num_kv_heads", 3), ("head_dim", 7), ("norm", "batch"), ("residual_dropout", 1.0), ("vocab_size", 0)]
)
def test_a_configuration_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=field):
        replace(make().config, **{field: value})


def test_every_parameter_is_used_by_the_module_that_owns_it_alone() -> None:
    """What ZeRO-3 needs: outside of its owner's forward a weight is empty."""
    decoder = make(tie_embeddings=False, qk_norm=True)
    for module in decoder.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        full = {name: parameter.data for name, parameter in own.items()}
        for parameter in own.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype)

        def gather(module: torch.nn.Module, args: object, own: dict = own, full: dict = full) -> None:
            for name, parameter in own.items():
                parameter.data = full[name]

        def release(module: torch.nn.Module, args: object, out: object, own: dict = own) -> None:
            for parameter in own.values():
                parameter.data = torch.empty(0, dtype=parameter.dtype)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    tokens, positions, cu_seqlens = packed()
    with torch.no_grad():
        loss = decoder(tokens, positions, cu_seqlens, labels=tokens).loss_sum
    plain = make(tie_embeddings=False, qk_norm=True)(tokens, positions, cu_seqlens, labels=tokens)
    torch.testing.assert_close(loss, plain.loss_sum.detach())


def test_configuration_dataclass_pads_to_128() -> None:
    config = DecoderConfig("llama", 256008, 32, 1, 4, 4, 8, 48, 64)
    assert config.padded_vocab_size == 256128
    assert replace(config, vocab_size=8192).padded_vocab_size == 8192
