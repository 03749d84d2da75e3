"""Averages of parameters: what they come to, whose weights count, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from merge_run import branched, seed_model, small_config

from megaxelm.ensemble.scoring import weighted_scores
from megaxelm.errors import MergeError
from megaxelm.merge.average import average_source
from megaxelm.merge.make import MergeOptions, Merging
from megaxelm.merge.material import Material, open_material
from megaxelm.merge.sample import sample_texts
from megaxelm.merge.weights import average_weights
from megaxelm.model.decoder import parameter_shapes
from megaxelm.model.hub import load_pretrained, open_pretrained, save_pretrained
from megaxelm.model.source import WeightSource, decoder_source
from megaxelm.run import RunFolder


def sources_of(number: int = 3) -> list[WeightSource]:
    seed = seed_model(small_config(300))
    return [decoder_source(branched(seed, index)) for index in range(number)]


def test_the_average_is_the_weighted_mean_of_each_tensor() -> None:
    sources = sources_of()
    mean = average_source(sources, [2.0, 1.0, 1.0])
    for name in parameter_shapes(mean.config):
        parts = [source.weight(name).double() for source in sources]
        expected = 0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2]
        assert torch.equal(mean.weight(name), expected.float()), name


def test_the_average_of_identical_experts_is_the_expert() -> None:
    source = sources_of(1)[0]
    mean = average_source([source, source, source], [0.2, 0.3, 0.1])
    assert all(torch.equal(mean.weight(name), source.weight(name)) for name in parameter_shapes(source.config))


def test_an_expert_without_weight_is_not_read() -> None:
    sources = sources_of(2)

    def broken(name: str) -> torch.Tensor:
        raise AssertionError(name)

    mean = average_source([sources[0], WeightSource(sources[1].config, broken)], [3.0, 0.0])
    assert torch.equal(mean.weight("embed.weight"), sources[0].weight("embed.weight"))


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -0.5], [1.0, float("nan")]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(MergeError, match="weights"):
        average_source(sources_of(2), weights)


def test_uniform_and_given_weights(material: Material) -> None:
    first, second = material.names
    assert average_weights(material, "uniform", None, 32) == {first: 0.5, second: 0.5}
    assert average_weights(material, f"{second}=3, {first}=1", None, 32) == {first: 0.25, second: 0.75}
    assert average_weights(material, f"{second}=2", None, 32) == {first: 0.0, second: 1.0}


def test_weights_by_the_tokens_of_a_language(material: Material) -> None:
    owner = material.ensemble.data.language_expert["de"]
    assert average_weights(material, "language:de", None, 32) == {name: float(name == owner) for name in material.names}
    shared = replace(material.ensemble, languages={material.names[0]: {"de": 30}, material.names[1]: {"de": 10, "ru": 5}})
    found = average_weights(replace(material, ensemble=shared), "language:de", None, 32)
    assert list(found.values()) == [0.75, 0.25]


def test_weights_of_a_router_are_its_means_over_tokens_then_over_languages(material: Material) -> None:
    texts = sample_texts(material, 600, 24)
    assert {text.language for text in texts} == {"bg", "de", "en", "ru"} and sum(len(text.ids) for text in texts) == 600
    ensemble = material.ensemble
    ids, codes = [text.ids for text in texts], [text.language for text in texts]
    scores = weighted_scores(ensemble.decoders, ids, ensemble.tokenizer.start_id, ensemble.router("posterior"), codes)
    by_language = []
    for code in ("bg", "de", "en", "ru"):
        rows = torch.cat([score.log_w.exp() for score, text in zip(scores, texts, strict=True) if text.language == code])
        by_language.append(rows.mean(0))
    expected = torch.stack(by_language).mean(0)
    found = average_weights(material, "router", "posterior", 24, 600)
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-9)
    assert sum(found.values()) == pytest.approx(1.0)
    of_one = average_weights(material, "posterior:ru", None, 24, 200)
    assert list(of_one.values()) != pytest.approx(list(found.values()), abs=1e-4)
    by_language_router = average_weights(material, "router", "language", 24, 600)
    assert list(by_language_router.values()) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("even", "choose uniform"),
        ("language", "choose uniform"),
        ("router:de", "choose uniform"),
        ("language:xx", "no expert was trained on it"),
        ("posterior:xx", "no text of the language 'xx'"),
        ("nobody=1", "is no expert"),
        ("{0}=1,{0}=2", "named twice"),
        ("{0}=much", "is no number"),
        ("{0}=-1", "0 or above"),
        ("{0}=0", "at least one is above 0"),
    ],
)
def test_weights_that_mean_nothing_are_told(wanted: str, text: str, material: Material) -> None:
    with pytest.raises(MergeError, match=text):
        average_weights(material, wanted.format(material.names[0]), None, 32, 200)


def test_a_rung_is_a_checkpoint_with_its_record_and_made_once(merging: Callable[[], Merging], run: RunFolder) -> None:
    transformers = pytest.importorskip("transformers")
    first, second = open_material(run).names
    folder = merging().make(MergeOptions("average", weights=f"{first}=1,{second}=3"))
    assert folder == run.path / "merged" / "average-weights"
    record = json.loads((folder / "merge.json").read_text())
    assert record["facts"]["weights"] == {first: 0.25, second: 0.75} and set(record["made_from"]["experts"]) == {first, second}
    parts = [open_pretrained(run.expert(name) / "export") for name in (first, second)]
    expected = 0.25 * parts[0].weight("layers.1.mlp.up.weight").double() + 0.75 * parts[1].weight("layers.1.mlp.up.weight").double()
    assert torch.equal(open_pretrained(folder).weight("layers.1.mlp.up.weight"), expected.float())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor([1, 9, 77, 30])
    ours = load_pretrained(folder)
    with torch.no_grad():
        difference = theirs(tokens[None]).logits[0] - ours.logits(ours(tokens, torch.arange(4), torch.tensor([0, 4])))
    assert float(difference.abs().max()) < 1e-4
    assert transformers.AutoTokenizer.from_pretrained(folder).vocab_size == ours.config.vocab_size

    before = (folder / "merge.json").stat().st_mtime_ns
    again = merging()
    assert again.make(MergeOptions("average", weights=f"{first}=1,{second}=3")) == folder
    assert "fresh" in again.said[-1] and (folder / "merge.json").stat().st_mtime_ns == before  # type: ignore[attr-defined]
    merging().make(MergeOptions("average", weights=f"{first}=1"))
    assert torch.equal(load_pretrained(folder).embed.weight, load_pretrained(run.expert(first) / "export").embed.weight)


def test_an_expert_that_changed_makes_the_rung_stale(merging: Callable[[], Merging], run: RunFolder) -> None:
    folder = merging().make(MergeOptions("average"))
    old = json.loads((folder / "merge.json").read_text())
    name = open_material(run).names[1]
    expert = run.path / "ensemble" / "experts" / name
    changed = branched(load_pretrained(expert), 9)
    for path in expert.glob("*.safetensors"):
        path.unlink()  # a hard link to the export
    save_pretrained(changed, expert)
    merging().make(MergeOptions("average"))
    new = json.loads((folder / "merge.json").read_text())
    assert new["weights"] != old["weights"] and new["made_from"]["experts"][name] != old["made_from"]["experts"][name]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["average-uniform"]


def test_experts_of_other_shapes_or_seeds_are_not_merged(run: RunFolder) -> None:
    lineage = json.loads((run.path / "lineage.json").read_text())
    first, second = open_material(run).names
    lineage["experts"][second]["parent"] = first
    (run.path / "lineage.json").write_text(json.dumps(lineage))
    open_material(run)
    lineage["experts"][second]["parent"] = "elsewhere"
    (run.path / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(MergeError, match=f"{second} from elsewhere"):
        open_material(run)
    (run.path / "lineage.json").unlink()
    expert = run.path / "ensemble" / "experts" / second
    config = small_config(load_pretrained(expert).config.vocab_size)
    for path in expert.glob("*.safetensors"):
        path.unlink()
    save_pretrained(seed_model(replace(config, intermediate_size=40)), expert)
    with pytest.raises(MergeError, match=f"{first} and {second} differ in intermediate_size"):
        open_material(run)


def test_names_that_cannot_be_rungs_are_refused(merging: Callable[[], Merging], run: RunFolder) -> None:
    made = merging()
    for name in ("../x", "seed", "mixture", ".hidden", ""):
        if name:
            with pytest.raises(MergeError, match="--name"):
                made.make(MergeOptions("average", name=name))
    assert made.make(MergeOptions("average", name="mine")) == run.path / "merged" / "mine"
    with pytest.raises(MergeError, match="choose one of average, moe, distilled"):
        made.make(MergeOptions("soup"))
