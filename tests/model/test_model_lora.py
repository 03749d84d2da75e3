"""Low-rank deltas: what they compute, what is trained, and what lies on disk, for us and for peft."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import CONFIGS, adapted, base_decoder, logits, lora_of, merged, unmerged, write_adapter, write_base

from megaxelm.errors import ModelError
from megaxelm.model.adapter_files import save_adapter
from megaxelm.model.adapter_files import write_adapter as write_checked
from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder, dropout_keys
from megaxelm.model.export import export_to
from megaxelm.model.hub import load_config, load_pretrained, open_pretrained, weights_hash
from megaxelm.model.lora import add_lora, drawn_lora, lora_from_recipe, lora_parameters, lora_shapes, start_lora
from megaxelm.model.source import WeightSource
from megaxelm.recipe import LoraConfig

FAMILIES = list(CONFIGS)


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", request.param)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_deltas_that_are_zero_are_the_base_bit_for_bit(base: Path) -> None:
    source = open_pretrained(base)
    started = start_lora(source, base, lora_of(source.config), seed=5)
    assert started.adapter is not None
    plain, with_deltas = logits(load_pretrained(base)), logits(unmerged(started))
    assert torch.equal(plain, with_deltas)
    for name in ("layers.1.mlp.up.weight", "embed.weight"):
        assert torch.equal(started.weight(name), source.weight(name))


def test_merged_weights_compute_what_base_and_deltas_do(base: Path) -> None:
    source = adapted(base)
    together, apart = logits(merged(source)), logits(unmerged(source))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert (together - logits(load_pretrained(base))).abs().max() > 0.1 * together.abs().max(), "the deltas must matter"


def test_the_merged_weight_is_the_formula_in_fp32(base: Path) -> None:
    source = adapted(base, rank=3, alpha=12.0)
    assert source.adapter is not None
    name = "layers.1.attention.out.weight"
    a, b = (source.adapter.tensor(f"layers.1.attention.out.lora_{kind}.weight").double() for kind in "AB")
    expected = open_pretrained(base).weight(name).double() + 12 / 3 * (b @ a)
    torch.testing.assert_close(source.weight(name).double(), expected, rtol=1e-6, atol=1e-7)
    assert source.weight(name).dtype == torch.float32


def test_only_the_deltas_are_trained(base: Path) -> None:
    source = adapted(base)
    decoder = unmerged(source).train()
    tokens = torch.arange(3, 23)
    decoder(tokens, torch.arange(20), torch.tensor([0, 20]), labels=tokens).loss_sum.backward()
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert source.adapter is not None and trained == set(lora_shapes(source.config, source.adapter.lora))
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name
    assert sum(decoder.get_parameter(name).numel() for name in trained) == lora_parameters(source.config, source.adapter.lora)


def test_gradients_are_those_of_the_merged_weight(base: Path) -> None:
    """d/dA = scale B^T G and d/dB = scale G A^T, where G is the gradient of the merged weight."""
    source = adapted(base)
    assert source.adapter is not None
    apart, together = unmerged(source).double(), merged(source).double()
    tokens = torch.arange(3, 23)
    for decoder in (apart, together):
        decoder(tokens, torch.arange(20), torch.tensor([0, 20]), labels=tokens).loss_sum.backward()
    scale = source.adapter.lora.scale
    for target in source.adapter.lora.targets:
        module = f"layers.0.{target}"
        gradient = together.get_parameter(f"{module}.weight").grad
        a, b = (apart.get_parameter(f"{module}.lora_{kind}.weight") for kind in "AB")
        assert gradient is not None
        torch.testing.assert_close(a.grad, scale * b.T @ gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad, scale * gradient @ a.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["xglm", "llama"])
def test_fused_kernels_see_the_deltas(family: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    decoder = unmerged(adapted(write_base(tmp_path / "base", family)))
    torch.testing.assert_close(logits(decoder, 10, kernels="triton"), logits(decoder, 10, kernels="torch"), rtol=1e-4, atol=1e-4)


def test_dropout_of_a_delta_is_of_its_input_alone_and_only_in_training(tmp_path: Path) -> None:
    decoder = unmerged(adapted(write_base(tmp_path / "base"), dropout=0.5))
    plain = logits(decoder)
    keys = dropout_keys(0, 1, torch.zeros(20, dtype=torch.int64), torch.arange(20))
    assert torch.equal(logits(decoder, dropout=keys), plain)
    decoder.train()
    dropped = logits(decoder, dropout=keys)
    assert not torch.equal(dropped, plain) and torch.equal(dropped, logits(decoder, dropout=keys))
    with pytest.raises(ModelError, match="dropout of the low-rank deltas = 0.5 in training mode needs dropout keys"):
        logits(decoder)
    for name, parameter in decoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.zeros_(parameter)
    assert torch.equal(logits(decoder, dropout=keys), logits(load_pretrained(tmp_path / "base"))), "the base's input is not dropped"


def test_each_delta_has_a_dropout_of_its_own(tmp_path: Path) -> None:
    decoder = unmerged(adapted(write_base(tmp_path / "base"), dropout=0.5))
    sites = [module.lora_site for module in decoder.modules() if hasattr(module, "lora_site")]
    assert len(sites) == 2 * 7 == len(set(sites)) and min(sites) > 1 + 2 * decoder.config.num_layers


def test_what_is_drawn_follows_from_seed_and_name() -> None:
    config = CONFIGS["llama"]
    lora = lora_of(config)
    first, again, other = (drawn_lora(config, lora, seed) for seed in (3, 3, 4))
    names = list(lora_shapes(config, lora))
    backwards = {name: again(name) for name in reversed(names)}
    for name in names:
        assert torch.equal(first(name), backwards[name])
        assert (not first(name).any()) if ".lora_B." in name else not torch.equal(first(name), other(name))
    a = first("layers.0.mlp.down.lora_A.weight")
    assert 0.8 / 80**0.5 < float(a.abs().max()) <= 1 / 80**0.5
    assert not torch.equal(first("layers.0.attention.q.lora_A.weight"), first("layers.1.attention.q.lora_A.weight"))


def test_targets_are_named_as_the_family_names_them() -> None:
    assert lora_of(CONFIGS["xglm"], targets=["fc2", "q_proj"]).targets == ("attention.q", "mlp.down")
    assert lora_of(CONFIGS["llama"]).targets == tuple(f"attention.{name}" for name in ("q", "k", "v", "out")) + tuple(
        f"mlp.{name}" for name in ("gate", "up", "down")
    )
    with pytest.raises(ModelError, match=r"experts.lora.targets: fc1: the projections of the llama family are q_proj, .*, down_proj"):
        lora_of(CONFIGS["llama"], targets=["q_proj", "fc1"])
    with pytest.raises(ModelError, match="experts.lora.rank = 24: choose 1 to 23"):
        lora_of(CONFIGS["llama"], rank=24)  # keys have 2 heads of 12
    assert lora_of(CONFIGS["llama"], rank=24, targets=["q_proj"]).rank == 24


def test_an_adapter_folder_is_read_back_and_merges(base: Path, tmp_path: Path) -> None:
    source = adapted(base, seed=2, alpha=6.0, dropout=0.25, targets=["q_proj", "v_proj"])
    save_adapter(source, tmp_path / "experts" / "a", torch.float32)
    found = open_pretrained(tmp_path / "experts" / "a")
    assert found.adapter is not None and source.adapter is not None
    assert found.adapter.lora == source.adapter.lora and found.adapter.folder == base
    assert torch.equal(logits(load_pretrained(tmp_path / "experts" / "a")), logits(merged(source)))
    assert load_config(tmp_path / "experts" / "a") == load_config(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_an_adapter_and_computes_the_same(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", family)
    write_adapter(tmp_path / "adapter", base)
    foreign = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(foreign, tmp_path / "adapter").eval()
    tokens = torch.arange(3, 23)
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    source = open_pretrained(tmp_path / "adapter")
    decoder = unmerged(source)
    ours = decoder.logits(decoder(tokens, torch.arange(20), torch.tensor([0, 20])))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if "lora_" in name)


def test_an_adapter_that_peft_wrote_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base")
    foreign = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(foreign, config).eval()
    model.save_pretrained(tmp_path / "theirs")
    tokens = torch.arange(3, 23)
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
        decoder = load_pretrained(tmp_path / "theirs")
        ours = decoder.logits(decoder(tokens, torch.arange(20), torch.tensor([0, 20])))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_merged_export_is_an_ordinary_checkpoint_and_an_adapter_moves_with_its_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "run" / "seed")
    (base / "tokenizer.json").write_text("{}")
    adapter = write_adapter(tmp_path / "run" / "a", base)
    source, texts = open_pretrained(adapter), [[1, 5, 9], [7, 8]]
    export_to(source, tmp_path / "whole", "float32", base, texts)
    export_to(source, tmp_path / "copy", "float32", base, texts, to="adapter")
    whole = open_pretrained(tmp_path / "whole")
    assert whole.adapter is None and torch.equal(logits(load_pretrained(tmp_path / "whole")), logits(merged(source)))
    assert torch.equal(logits(load_pretrained(tmp_path / "copy")), logits(merged(source)))
    expected = logits(merged(source))
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert torch.equal(logits(load_pretrained(tmp_path / "elsewhere" / "a")), expected)
    with pytest.raises(ModelError, match="base_model_name_or_path = ../run/seed: no such folder; an adapter moves together with its base"):
        open_pretrained(tmp_path / "copy")
    with pytest.raises(ModelError, match="--to adapter: this model has weights of its own"):
        export_to(whole, tmp_path / "third", "float32", base, texts, to="adapter")


def test_an_export_that_does_not_agree_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megaxelm.model.adapter_files as files

    base = write_base(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    write_checked(adapted(base, seed=1), tmp_path / "a", "bfloat16", base, [[1, 2, 3]])
    before = weights_hash(tmp_path / "a")
    save = files.save_adapter

    def wrong(source: WeightSource, *given: Any) -> None:
        save(adapted(base, seed=9), *given)

    monkeypatch.setattr(files, "save_adapter", wrong)
    with pytest.raises(ModelError, match="the reloaded export differs"):
        write_checked(adapted(base, seed=1), tmp_path / "a", "bfloat16", base, [[1, 2, 3]])
    assert weights_hash(tmp_path / "a") == before and not list(tmp_path.glob(".*"))


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    source = adapted(write_base(tmp_path / "base"))
    assert source.adapter is not None
    source.adapter.tensor("layers.1.mlp.up.lora_A.weight")[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers.1.mlp.up.lora_A.weight has values that are not finite"):
        save_adapter(source, tmp_path / "a", torch.float32)


def test_the_hash_is_over_deltas_scale_and_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", base)
    first = weights_hash(adapter)
    assert weights_hash(write_adapter(tmp_path / "b", base)) == first
    assert weights_hash(write_adapter(tmp_path / "c", base, seed=1)) != first
    assert weights_hash(write_adapter(tmp_path / "d", base, alpha=13.0)) != first
    write_base(base, seed=1)
    assert weights_hash(adapter) != first


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"use_rslora": True}, "use_rslora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = .* is not supported"),
        ({"r": "3"}, "r = '3', lora_alpha = 12: expected numbers"),
        ({"r": 4}, r"q_proj.lora_A.weight has shape \(3, 48\), shape \(4, 48\) is expected|has shape"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path = None: it must name the folder"),
        ({"base_model_name_or_path": "../nowhere"}, "../nowhere: no such folder"),
    ],
)
def test_adapters_that_cannot_be_read_are_told(fields: dict[str, Any], text: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", write_base(tmp_path / "base"))
    change(adapter / "adapter_config.json", **fields)
    with pytest.raises(ModelError, match=text):
        open_pretrained(adapter)


def test_tensors_that_are_missing_or_too_many_are_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = write_adapter(tmp_path / "a", write_base(tmp_path / "base"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert name in tensors
    save_file({key: value for key, value in tensors.items() if key != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"{name} is missing"):
        open_pretrained(adapter)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 48)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head.lora_A.weight .*is not expected"):
        open_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="adapter_model.safetensors is missing"):
        open_pretrained(adapter)


def test_an_expert_that_branches_from_deltas_goes_on_with_them(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", base, seed=4)
    parent = open_pretrained(adapter)
    config = parent.config
    child = start_lora(parent, adapter, lora_of(config, dropout=0.1), seed=0)
    assert child.adapter is not None and child.adapter.folder == base and child.adapter.lora.dropout == 0.1
    assert torch.equal(logits(merged(child)), logits(merged(parent)))
    name = "layers.0.attention.q.lora_B.weight"
    assert torch.equal(child.part(name), parent.part(name)) and child.part(name).any()
    with pytest.raises(ModelError, match=r"experts.lora.rank = 5: the parent in .*a has 3"):
        start_lora(parent, adapter, lora_of(config, rank=5), seed=0)
    with pytest.raises(ModelError, match=r"experts.lora.targets = attention.q: the parent in .* has attention.q, attention.k"):
        start_lora(parent, adapter, lora_of(config, targets=["q_proj"]), seed=0)


def test_deltas_lie_where_the_decoder_lies_and_in_its_type() -> None:
    decoder = base_decoder(CONFIGS["xglm"]).bfloat16()
    add_lora(decoder, lora_of(CONFIGS["xglm"]))
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}


def test_a_decoder_without_deltas_has_the_parameters_it_had() -> None:
    names = {name for name, _ in Decoder(CONFIGS["xglm"]).named_parameters()}
    assert "layers.0.attention.q.weight" in names and not any("lora" in name for name in names)


def test_settings_that_contradict_are_told() -> None:
    from tiny_run import tiny_recipe

    from megaxelm.errors import RecipeError
    from megaxelm.recipe import parse_recipe

    with pytest.raises(RecipeError, match="experts.lora is set and experts.kind = full"):
        parse_recipe(tiny_recipe(Path("x"), experts={"lora": {"rank": 8}}))
    with pytest.raises(RecipeError, match="experts.lora.targets: name at least one projection, and each once"):
        parse_recipe(tiny_recipe(Path("x"), experts={"kind": "lora", "lora": {"targets": ["q_proj", "q_proj"]}}))
    assert lora_from_recipe(LoraConfig(), CONFIGS["llama"]).scale == 2.0


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_plan_counts_what_autograd_keeps_and_what_is_trained(dropout: float) -> None:
    from megaxelm.plan.memory import Work, activations, loss_memory, padded_parameters, plan_memory

    config = replace(CONFIGS["llama"], num_layers=6)  # the first layer keeps less: what it reads needs no gradient
    lora = lora_of(config, rank=8, dropout=dropout)
    decoder = Decoder(config).train()
    add_lora(decoder, lora)
    own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, keys = torch.arange(120), dropout_keys(0, 1, torch.zeros(120, dtype=torch.int64), torch.arange(120))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(tokens, tokens, torch.tensor([0, 120]), dropout=keys)
    work = Work(1, 120, 0, 64, "fp32")
    assert activations(config, work, lora) == pytest.approx(sum(kept.values()), rel=0.15)
    trained = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    for stage, ranks in ((0, 1), (2, 4), (3, 4)):
        ds_config = {"zero_optimization": {"stage": stage}}
        whole = plan_memory(config, ds_config, ranks, replace(work, precision="bf16"), True)
        deltas = plan_memory(config, ds_config, ranks, replace(work, precision="bf16"), True, lora)
        assert deltas.optimizer == 12 * trained // (ranks if stage else 1)
        assert deltas.weights == pytest.approx(whole.weights + 2 * trained / (ranks if stage == 3 else 1), abs=8 * trained)
        assert deltas.total < whole.total
        assert deltas.peak == "backward"
        assert deltas.loss == loss_memory(config, replace(work, precision="bf16"), "cuda", frozen=True)
    assert loss_memory(config, work, "cpu") - loss_memory(config, work, "cpu", frozen=True) == 8 * padded_parameters_of_head(config)
    assert padded_parameters(config) + trained == sum(parameter.numel() for parameter in decoder.parameters())


def padded_parameters_of_head(config: DecoderConfig) -> int:
    return config.padded_vocab_size * config.hidden_size


def test_the_plan_tells_what_an_expert_trains(capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_run import tiny_recipe

    from megaxelm.plan.table import Hardware, make_plan, show_plan
    from megaxelm.recipe import parse_recipe
    from megaxelm.train.shape import model_shape

    tree = tiny_recipe(Path("x"), experts={"kind": "lora", "lora": {"rank": 4}})
    recipe = parse_recipe(tree)
    shape = model_shape(recipe, 400)
    plan = make_plan(recipe, shape, Hardware(1, 1, 10**10), None, "unknown", None)
    lora = lora_from_recipe(recipe.experts.lora, shape)
    assert plan["deltas"]["trained_parameters"] == lora_parameters(shape, lora)
    assert 0 < plan["deltas"]["total"] < plan["choice"]["total"]
    show_plan(plan)
    assert f"an expert trains {lora_parameters(shape, lora):,} parameters of low-rank deltas" in capsys.readouterr().out
    assert "deltas" not in make_plan(parse_recipe(tiny_recipe(Path("x"))), shape, Hardware(1, 1, 10**10), None, "unknown", None)


def test_the_flops_of_a_token_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megaxelm.train.throughput import token_flops

    decoder = unmerged(adapted_in_memory())
    config, length = decoder.config, 60
    tokens = torch.arange(3, 63)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = decoder(tokens, torch.arange(length), torch.tensor([0, length]))
        decoder.logits(hidden).sum().backward()
    deltas = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    # What the first layer's q, k and v read needs no gradient.
    width = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
    unneeded = 2 * config.hidden_size * (width + 3 * 3)
    padding = 4 * (config.padded_vocab_size - config.vocab_size) * config.hidden_size
    expected = token_flops(config, length, deltas) - unneeded + padding
    assert counter.get_total_flops() / length == expected


def adapted_in_memory() -> WeightSource:
    from lora_models import random_deltas

    from megaxelm.model.lora import adapted_source
    from megaxelm.model.source import decoder_source

    config = CONFIGS["xglm"]
    lora = lora_of(config)
    return adapted_source(decoder_source(base_decoder(config)), lora, random_deltas(config, lora, 0).__getitem__, Path("base"))
