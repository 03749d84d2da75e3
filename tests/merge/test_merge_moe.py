"""The experts as one mixture-of-experts model, and its routers in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from merge_run import branched, seed_model, small_config
from torch import Tensor

from megaxelm.errors import MergeError
from megaxelm.merge.make import MergeOptions, Merging
from megaxelm.merge.material import Material
from megaxelm.merge.moe import moe_config, moe_source
from megaxelm.merge.ridge import SCALES, fit_routers, fit_scale, ridge_router
from megaxelm.merge.sample import refuse_without_text, sample_texts
from megaxelm.model.decoder import Decoder, parameter_shapes
from megaxelm.model.hub import load_pretrained, save_pretrained
from megaxelm.model.layerwise import feed_forward_inputs
from megaxelm.model.source import WeightSource, decoder_source
from megaxelm.run import RunFolder

TEXTS = [[1, 5, 9, 121, 7], [1, 64, 3], [1, 88, 90, 17, 45, 200, 31]]


def logits(decoder: Decoder, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(torch.tensor(tokens), torch.arange(len(tokens)), torch.tensor([0, len(tokens)])))


def filled(source: WeightSource) -> Decoder:
    decoder = Decoder(source.config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.weight(name))
    return decoder.eval()


def random_routers(config: object, seed: int = 0) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(config.num_experts, config.hidden_size, generator=draw) for layer in range(config.num_layers)}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("family", "merged"), [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen3", "qwen3_moe")])
def test_identical_experts_are_the_dense_model_and_transformers_agrees(family: str, merged: str, tmp_path: object) -> None:
    transformers = pytest.importorskip("transformers")
    dense = seed_model(small_config(300, family))
    config = moe_config(dense.config, 3, 2)
    assert config.family == merged
    source = moe_source([decoder_source(dense)] * 3, [1.0, 1.0, 2.0], random_routers(config), config)
    save_pretrained(source, tmp_path)  # type: ignore[arg-type]
    model = load_pretrained(tmp_path)  # type: ignore[arg-type]
    assert float((logits(model, TEXTS[2]) - logits(dense, TEXTS[2])).abs().max()) < 1e-4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[merged]
    with torch.no_grad():
        assert float((theirs(torch.tensor([TEXTS[2]])).logits[0] - logits(model, TEXTS[2])).abs().max()) < 1e-4


def test_each_expert_keeps_its_feed_forward_part_and_the_rest_is_averaged() -> None:
    seed = seed_model(small_config(300))
    models = [branched(seed, number) for number in range(3)]
    config = moe_config(seed.config, 3, 1)
    routers = random_routers(config)
    source = moe_source([decoder_source(model) for model in models], [1.0, 0.0, 3.0], routers, config)
    for name in parameter_shapes(config):
        tensor = source.weight(name)
        if ".experts." in name:
            number = int(name.split(".experts.")[1][0])
            assert torch.equal(tensor, models[number].get_parameter(name.replace(f".experts.{number}", "")))
        elif "router" in name:
            assert torch.equal(tensor, routers[int(name.split(".")[1])])
        else:
            expected = 0.25 * models[0].get_parameter(name).double() + 0.75 * models[2].get_parameter(name).double()
            assert torch.equal(tensor, expected.float()), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"family": "xglm"}, "xglm family.*GELU"),
        ({"family": "qwen2", "qkv_bias": True}, "qwen2 family.*biases"),
        ({"family": "mixtral", "num_experts": 2, "experts_per_token": 1}, "mixtures of experts already"),
        ({"qkv_bias": True, "out_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_models_without_such_a_form_are_refused_with_the_reason(change: dict[str, object], text: str) -> None:
    with pytest.raises(MergeError, match=text):
        moe_config(replace(small_config(300), **change), 2, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [0, 4])
def test_top_k_beyond_the_experts_is_refused(top_k: int) -> None:
    with pytest.raises(MergeError, match=f"--top-k {top_k}: choose 1 to 3"):
        moe_config(small_config(300), 3, top_k)


def test_the_ridge_router_is_the_least_squares_solution_with_columns_of_unit_length() -> None:
    draw = np.random.default_rng(0)
    inputs, owner, ridge = draw.normal(size=(50, 6)).astype(np.float32), draw.integers(0, 3, 50), 0.7
    augmented = np.vstack([inputs.astype(np.float64), np.sqrt(ridge) * np.eye(6)])
    targets = np.vstack([np.eye(3)[owner], np.zeros((6, 3))])
    expected = np.linalg.lstsq(augmented, targets, rcond=None)[0]
    expected /= np.linalg.norm(expected, axis=0)
    found = ridge_router(torch.from_numpy(inputs), torch.from_numpy(owner), 3, ridge)
    np.testing.assert_allclose(found.numpy(), expected.T, rtol=1e-9, atol=1e-12)


def test_the_fitted_scale_has_the_lowest_cross_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 3, (400,), generator=draw)
    scores = torch.nn.functional.one_hot(owner, 3).double() * 0.4 + 0.3 * torch.randn(400, 3, generator=draw, dtype=torch.float64)
    scale = fit_scale(scores, owner)

    def loss(factor: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores * factor, owner))

    assert SCALES[0] < scale < SCALES[1]
    assert loss(scale) <= min(loss(scale * factor) for factor in (0.9, 0.97, 1.03, 1.1))
    apart = torch.nn.functional.one_hot(owner, 3).double()
    assert fit_scale(apart, owner) > 20, "a sample that is divided without a mistake: as sharp as may be"


def test_inputs_of_feed_forward_parts_are_those_of_the_model() -> None:
    seed = seed_model(small_config(300))
    config = moe_config(seed.config, 3, 2)
    source = moe_source([decoder_source(branched(seed, number)) for number in range(3)], [1.0] * 3, random_routers(config), config)
    model, seen = filled(source), {}
    for number, layer in enumerate(model.layers):
        layer.mlp.register_forward_hook(lambda module, given, output, number=number: seen.__setitem__(number, given[0].clone()))
    tokens = torch.tensor([token for text in TEXTS for token in text])
    positions = torch.cat([torch.arange(len(text)) for text in TEXTS])
    with torch.no_grad():
        model(tokens, positions, torch.tensor([0, 5, 8, 15]))
    for number, inputs in feed_forward_inputs(source, TEXTS):
        torch.testing.assert_close(inputs, seen[number], rtol=1e-5, atol=1e-5)
    assert len(seen) == config.num_layers


def test_each_layer_is_fitted_to_what_the_routers_before_it_make() -> None:
    """The fit of a layer, repeated on the inputs that the finished model has there, is the same; with another first router it is not."""
    seed = seed_model(small_config(300))
    config = moe_config(seed.config, 3, 1)
    experts = [decoder_source(branched(seed, number, change=0.6)) for number in range(3)]
    routers: dict[int, Tensor] = {}
    source = moe_source(experts, [1.0] * 3, routers, config)
    owners = [0, 1, 2]
    fits = fit_routers(source, routers, TEXTS, owners)
    owner = torch.tensor([0] * 5 + [1] * 3 + [2] * 7)
    inputs = dict(feed_forward_inputs(source, TEXTS))
    for layer in range(config.num_layers):
        again = ridge_router(inputs[layer], owner, 3) * fits[layer].scale
        torch.testing.assert_close(again.float(), routers[layer], rtol=1e-3, atol=1e-3)
        scores = inputs[layer].double() @ again.T
        assert fits[layer].accuracy == pytest.approx(float((scores.argmax(-1) == owner).double().mean()))
        assert fits[layer].cross_entropy == pytest.approx(float(torch.nn.functional.cross_entropy(scores, owner)), rel=1e-3)
    routers[0] = routers[0].flip(0)
    other = dict(feed_forward_inputs(source, TEXTS))[1]
    assert float((other - inputs[1]).abs().max()) > 1e-2
    fixed: dict[int, Tensor] = {}
    fit_routers(moe_source(experts, [1.0] * 3, fixed, config), fixed, TEXTS, owners, scale=7.0)
    assert torch.allclose(fixed[0].norm(dim=1), torch.full((3,), 7.0))
    with pytest.raises(MergeError, match="above 0"):
        fit_routers(source, routers, TEXTS, owners, ridge=0.0)


def test_the_sample_takes_languages_in_turn_and_knows_the_expert_of_each(material: Material) -> None:
    texts = sample_texts(material, 400, 16)
    assert sum(len(text.ids) for text in texts) == 400 and max(len(text.ids) for text in texts) <= 16
    counts = {code: sum(text.language == code for text in texts) for code in ("bg", "de", "en", "ru")}
    assert max(counts.values()) - min(counts.values()) <= 1
    for text in texts:
        assert material.names[text.expert] == material.ensemble.data.language_expert[text.language]
    with pytest.raises(MergeError, match=f"no document of {material.names[1]}"):
        refuse_without_text(material, [text for text in texts if text.expert == 0])


def test_a_grown_expert_has_its_text_in_its_own_run(run: RunFolder) -> None:
    from megaxelm.merge.material import open_material

    material = open_material(run)
    name = material.names[0]
    folder = run.path / "grown" / name / "corpus" / "sample"
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": "mvua inanyesha leo asubuhi", "id": str(number), "language": "sw"}) for number in range(20)]
    (folder / "sw.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(MergeError, match="no expert of the ensemble holds the language 'sw'"):
        sample_texts(material, 100, 16)
    material.ensemble.data.language_expert["sw"] = name
    texts = sample_texts(material, 300, 16)
    assert {text.expert for text in texts if text.language == "sw"} == {0}


def test_a_rung_with_experts_routes_to_the_expert_of_a_text(merging: Callable[[], Merging], run: RunFolder) -> None:
    made = merging()
    folder = made.make(MergeOptions("moe", top_k=1, sample_tokens=1500))
    record = json.loads((folder / "merge.json").read_text())
    assert record["kind"] == "moe" and record["facts"]["sample_tokens"] == 1500 and len(record["facts"]["layers"]) == 2
    assert all(layer["accuracy"] > 0.6 for layer in record["facts"]["layers"])
    model = load_pretrained(folder)
    assert (model.config.family, model.config.num_experts, model.config.experts_per_token) == ("mixtral", 2, 1)
    assert record["active_parameters"] < record["parameters"]
    assert "fresh" not in made.said[-1]  # type: ignore[attr-defined]
    made.make(MergeOptions("moe", top_k=1, sample_tokens=1500))
    assert "fresh" in made.said[-1]  # type: ignore[attr-defined]
    made.make(MergeOptions("moe", top_k=2, sample_tokens=1500))
    assert "fresh" not in made.said[-1]  # type: ignore[attr-defined]
    from megaxelm.ensemble.folder import load_ensemble
    from megaxelm.ensemble.generation import generate
    from megaxelm.evaluate.rungs import open_rung

    written = generate(open_rung(run.path, "moe"), ["the old house"], max_new_tokens=4, stop_at_eos=False)[0]
    alone = load_pretrained(folder)
    ids = [load_ensemble(run.folder("ensemble")).tokenizer.start_id, *open_rung(run.path, "moe").tokenizer.encode(["the old house"])[0]]
    for token in written.token_ids:
        assert int(logits(alone, ids)[-1].argmax()) == token
        ids.append(token)
