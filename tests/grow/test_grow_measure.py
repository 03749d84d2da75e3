"""What is measured before growing: the tokenizer's fit and the donors; and the record of what was grown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from growing import write_index

from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import GrowError, RecipeError, StageError
from megaxelm.grow.child import ChildPlan, child_recipe, mixing_weights, parse_sources
from megaxelm.grow.donors import Candidate, choose_donor, find_candidates, sample_bits, typology_distances
from megaxelm.grow.fit import TokenizerFit, measure_fit, poor_fit
from megaxelm.growth import Grown, Growth, evaluated_languages, grown_fingerprint, held_clusters, language_owners, read_growth, write_growth
from megaxelm.recipe import TypologyConfig, parse_recipe


class Pieces:
    """A tokenizer with a piece a word, known letters, and bytes or the unknown piece for the rest."""

    WORDS = {"ev": 10, "çay": 11}
    LETTERS = {letter: 20 + number for number, letter in enumerate("abcdefghij")}
    unk_token_id: int | None = 3

    def __init__(self, unknown: bool = False) -> None:
        self.unknown = unknown

    @property
    def hf(self) -> Any:
        return self

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[token for word in text.split() for token in self._word(word)] for text in texts]

    def _word(self, word: str) -> list[int]:
        if word in self.WORDS:
            return [self.WORDS[word]]
        found = []
        for letter in word:
            if letter in self.LETTERS:
                found.append(self.LETTERS[letter])
            else:
                found += [3] if self.unknown else [100 + byte for byte in letter.encode()]
        return found

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<0x{token - 100:02X}>" if token >= 100 else "<unk>" if token == 3 else "piece" for token in ids]

    def decode(self, ids: list[int]) -> str:
        return "x"


def test_fit_counts_tokens_words_bytes_and_byte_pieces() -> None:
    fit = measure_fit(Pieces(), "az", ["ev çay", "ab ə"])
    assert (fit.documents, fit.words, fit.tokens, fit.byte_tokens, fit.unknown_tokens) == (2, 4, 2 + 2 + 2, 2, 0)
    assert fit.bytes == len("ev çay".encode()) + len("ab ə".encode())
    assert fit.tokens_per_word == 1.5 and fit.bytes_per_token == pytest.approx(12 / 6) and fit.byte_share == pytest.approx(2 / 6)
    unknown = measure_fit(Pieces(unknown=True), "az", ["ev ə ə"])
    assert unknown.unknown_share == pytest.approx(2 / 3) and unknown.byte_tokens == 0
    with pytest.raises(GrowError, match="sample of its text is empty"):
        measure_fit(Pieces(), "az", ["", "  "])


def test_pieces_of_characters_count_as_bytes_without_a_name_of_their_own() -> None:
    class ByteLevel(Pieces):
        unk_token_id = None

        def decode(self, ids: list[int]) -> str:
            return "\N{REPLACEMENT CHARACTER}" if ids[0] == 20 else "x"

    assert measure_fit(ByteLevel(), "az", ["ab"]).byte_tokens == 1


def test_an_unknown_piece_is_no_byte_however_it_is_shown() -> None:
    class Shown(Pieces):
        def decode(self, ids: list[int]) -> str:
            return "\N{REPLACEMENT CHARACTER}" if ids == [3] else "x"

    fit = measure_fit(Shown(unknown=True), "az", ["ev ə"])
    assert (fit.unknown_tokens, fit.byte_tokens) == (1, 0)


def fit_of(language: str, tokens: int, words: int = 100, num_bytes: int = 500, **other: int) -> TokenizerFit:
    return TokenizerFit(
        language, 1, num_bytes, other.pop("characters", 500), words, tokens, other.get("bytes_", 0), other.get("unknown", 0)
    )


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (fit_of("az", 150), None),
        (fit_of("az", 299), None),
        (fit_of("az", 301), "3.0 tokens a word, while the run's languages have 1.5"),
        (fit_of("az", 100, bytes_=11), "11% of the tokens are single bytes"),
        (fit_of("az", 100, bytes_=10), None),
        (fit_of("az", 100, unknown=2), "2.0% of the tokens are unknown"),
        # Written without spaces: tokens a word say nothing, bytes a token do.
        (fit_of("zh", 200, words=10), None),
        (fit_of("zh", 400, words=10, num_bytes=500), "1.2 bytes a token, while the run's languages have 3.3"),
    ],
)
def test_a_poor_fit_is_told_beside_the_runs_languages(fit: TokenizerFit, words: str | None) -> None:
    known = [fit_of("de", 150), fit_of("en", 120), fit_of("tr", 200), fit_of("ja", 150, words=2)]
    found = poor_fit(fit, known)
    assert found == [] if words is None else len(found) == 1 and words in found[0]


def candidate(name: str, *languages: str, **tokens: int) -> Candidate:
    return Candidate(name, languages, tokens, Path(name))


def test_typology_takes_the_nearest_language_of_an_expert_and_the_mean_over_new_ones() -> None:
    experts = [candidate("tr-zh", "tr", "zh"), candidate("de-el", "de", "el")]
    az, notes = typology_distances(["az"], experts, TypologyConfig())
    pl, _ = typology_distances(["pl"], experts, TypologyConfig())
    both, _ = typology_distances(["az", "pl"], experts, TypologyConfig())
    assert notes == [] and az["tr-zh"] < az["de-el"] and pl["de-el"] < pl["tr-zh"]
    assert both["de-el"] == pytest.approx((az["de-el"] + pl["de-el"]) / 2)
    from megaxelm.cluster.typology import donors

    rows = dict(donors(["az"], ["de", "el", "tr", "zh"])[0][1])
    assert az == {"tr-zh": min(rows["tr"], rows["zh"]), "de-el": min(rows["de"], rows["el"])}


def test_what_typology_does_not_know_is_left_out_and_told() -> None:
    experts = [candidate("tr-qq", "tr", "qq"), candidate("qqq", "qqq"), candidate("de", "de")]
    found, notes = typology_distances(["az"], experts, TypologyConfig())
    assert set(found) == {"tr-qq", "de"} and notes == ["no typological features of qq, qqq: left out of the distances"]
    found, notes = typology_distances(["az", "qx"], experts, TypologyConfig())
    assert found == {} and notes[0].startswith("no typological features of qq, qqq") and len(notes) == 2
    assert "no typological features of qx (URIEL, syntax_average)" in notes


def test_own_distances_rule_where_they_are_given(tmp_path: Path) -> None:
    table = tmp_path / "d.csv"
    table.write_text(",az,de,tr\naz,0,0.1,0.5\nde,0.1,0,0.2\ntr,0.5,0.2,0\n")
    experts = [candidate("tr", "tr"), candidate("de", "de")]
    assert typology_distances(["az"], experts, TypologyConfig(distances=str(table)))[0] == {"tr": 0.5, "de": 0.1}
    assert typology_distances(["pl"], experts, TypologyConfig(distances=str(table)))[0] == {}


@pytest.mark.parametrize(
    ("wanted", "distances", "bits", "name", "how"),
    [
        ("auto", {"a": 0.5, "b": 0.3}, {"a": 1.0, "b": 2.0, "c": 0.5, "seed": 0.1}, "b", "typology"),
        ("typology", {"a": 0.5, "b": 0.3}, {"a": 1.0, "b": 2.0, "c": 0.5}, "b", "typology"),
        ("bits", {"a": 0.5, "b": 0.3}, {"a": 1.0, "b": 2.0, "c": 0.5, "seed": 0.1}, "c", "bits"),
        ("auto", {}, {"a": 1.0, "b": 2.0, "c": 1.5, "seed": 0.1}, "a", "bits"),
        # The other measure decides where one is even, then the order.
        ("auto", {"a": 0.3, "b": 0.3, "c": 0.3}, {"a": 2.0, "b": 1.0, "c": 1.5}, "b", "typology"),
        ("bits", {"a": 0.5, "c": 0.3}, {"a": 1.0, "b": 1.0, "c": 1.0}, "c", "bits"),
        ("auto", {"b": 0.3, "c": 0.3}, {"a": 1.0, "b": 1.0, "c": 1.0}, "b", "typology"),
        ("seed", {"a": 0.3}, {"a": 1.0}, "seed", "by hand"),
    ],
)
def test_the_choice_of_a_donor(wanted: str, distances: dict[str, float], bits: dict[str, float], name: str, how: str) -> None:
    choice = choose_donor(wanted, ["a", "b", "c"], distances, bits)
    assert (choice.name, choice.how) == (name, how)


def test_bits_of_a_sample_are_those_that_an_evaluation_gives(grown_run: Path) -> None:
    """The held-out text of az given as a sample: the same bits as in the results."""
    tokenizer = Tokenizer.load(grown_run / "tokenizer")
    recipe = parse_recipe(yaml.safe_load((grown_run / "recipe.yaml").read_text()))
    models = find_candidates(recipe, grown_run, read_growth(grown_run), tokenizer)
    assert list(models) == ["bg-en", "de-ru", "az", "dense", "seed"]
    assert models["az"].languages == ("az",) and set(models["az"].tokens) == {"az", "de", "ru"}
    assert models["de-ru"].languages == ("de", "ru") and models["seed"].languages == ()
    assert models["seed"].tokens["de"] == models["de-ru"].tokens["de"]
    lines = (grown_run / "grown" / "az" / "corpus" / "valid" / "az.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    bits = sample_bits([models["az"], models["seed"]], {"az": [json.loads(line)["text"] for line in lines]}, tokenizer, 32)
    results = json.loads((grown_run / "evaluation" / "results.json").read_text())
    assert bits["az"]["az"] == results["experts"]["az"]["az"]
    assert bits["seed"]["az"] == results["models"]["seed"]["languages"]["az"]["bits_per_byte"]


def test_shares_of_the_languages() -> None:
    weights = mixing_weights({"az": 30.0, "uk": 10.0}, {"tr": 990, "uk": 500, "zh": 2000, "xx": 20, "yy": 0}, 0.2)
    assert list(weights) == ["az", "uk", "tr", "zh"]  # xx has less than 1 %, uk is new
    assert "xx" in mixing_weights({"uk": 1.0}, {"tr": 990, "uk": 5000, "xx": 20}, 0.2)  # 1 % of what may be replayed
    assert weights["az"] == pytest.approx(0.6) and weights["uk"] == pytest.approx(0.2)
    assert weights["tr"] == pytest.approx(0.2 * 990 / 2990) and sum(weights.values()) == pytest.approx(1)
    assert mixing_weights({"az": 1.0}, {"tr": 5}, 0.0) == {"az": 1.0}


def plan_of(**values: Any) -> ChildPlan:
    given = {
        "name": "az",
        "languages": ("az",),
        "donor": "tr",
        "donor_export": Path("r/experts/tr/export"),
        "weights": {"az": 0.75, "tr": 0.25},
    }
    return ChildPlan(**(given | {"steps": 7, "batch_sequences": 3, "sources": ["a.jsonl", "b.jsonl"]} | values))


def test_the_recipe_of_a_child_keeps_the_runs_settings_and_its_own_part() -> None:
    tree: dict[str, Any] = {
        "name": "parent",
        "corpus": {"train": "b.jsonl", "fields": {"language": "lang"}, "deduplicate": "exact"},
        "tokenizer": {"vocab_size": 4000},
        "clusters": {"partitioner": "tfidf", "k": 4, "tfidf": {"analyzer": "char"}},
        "seed": {"steps": 50, "language_alpha": 0.5},
        "train": {"lr": 3e-4, "batch_sequences": 12, "language_alpha": 0.3, "sequence_length": 64, "precision": "fp32"},
        "experts": {"steps": 9, "batch_sequences": 5, "allow_unequal_tokens": True},
        "ensemble": {"top_m": 3, "fixed_weights": {"c0": 1.0}, "router": "fixed", "fallback": "dense"},
        "evaluation": {"routers": ["fixed"], "max_documents": 7, "sequence_length": 48},
    }
    child = child_recipe(parse_recipe(tree), Path("r/tokenizer"), plan_of(overrides=["train.lr=1e-3"]))
    assert (child.name, child.tokenizer.load, child.seed.load) == ("az", "r/tokenizer", "r/experts/tr/export")
    assert child.clusters.mapping == {"az": ["az", "tr"]} and child.corpus.languages == ["az", "tr"]
    assert [source.files[0] for source in child.corpus.train] == ["a.jsonl", "b.jsonl"]  # type: ignore[union-attr]
    assert child.corpus.fields.language == "lang" and child.corpus.deduplicate == "exact"
    assert child.train.language_weights == {"az": 0.75, "tr": 0.25} and child.train.language_alpha == 1.0
    assert (child.train.steps, child.train.batch_sequences, child.train.lr, child.train.sequence_length) == (7, 3, 1e-3, 64)
    assert child.experts.dense is False and child.experts.steps is None and child.experts.batch_sequences is None
    assert child.ensemble.top_m is None and child.ensemble.fallback is None and child.evaluation.max_documents == 7
    assert child.evaluation.sequence_length == 48
    from megaxelm.train.members import plan_members

    parent = parse_recipe(tree)
    again = child_recipe(parse_recipe(tree), Path("r/tokenizer"), plan_of(generation=2))
    assert len({parent.train.seed, child.train.seed, again.train.seed}) == 3  # nor in that of a grown donor
    members = plan_members(child, ["az"])
    orders = {plan_members(parent, list("abcd"))[name].sample_seed(parent.train.seed) for name in ("seed", "a")}
    assert members["az"].sample_seed(child.train.seed) not in orders
    assert (members["az"].steps, members["az"].batch_sequences, members["az"].parent, members["seed"].steps) == (7, 3, "seed", 0)


def test_a_child_of_a_run_of_rounds_has_one() -> None:
    parent = parse_recipe({"name": "p", "corpus": {"train": "b.jsonl"}, "clusters": {"k": 4}, "rounds": [{"k": 2}, {"k": 4}]})
    assert child_recipe(parent, Path("t"), plan_of()).rounds == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed.load=x", "`seed.load` of a grown expert is set by"),
        ("seed={}", "`seed` of a grown expert"),
        ("corpus={}", "`corpus` of a grown expert"),
        ("experts.dense=true", "leave it out"),
        ("corpus.train=x", "use --corpus"),
        ("train.language_weights={az: 1}", "`train.language_weights`"),
    ],
)
def test_what_growing_sets_itself_cannot_be_overridden(override: str, words: str) -> None:
    parent = parse_recipe({"name": "p", "corpus": {"train": "b.jsonl"}, "clusters": {"k": 2}})
    with pytest.raises(GrowError, match=words):
        child_recipe(parent, Path("t"), plan_of(overrides=[override]))
    with pytest.raises(RecipeError, match="warmup_steps = 10 must be below"):
        child_recipe(parent, Path("t"), plan_of(overrides=["train.warmup_steps=10"]))


def test_sources_may_name_their_language() -> None:
    assert parse_sources(["az=x/*.txt", "y=1/z.jsonl"], ["az"]) == [
        {"files": ["x/*.txt"], "language": "az"},
        {"files": ["y=1/z.jsonl"], "language": None},
    ]


def test_who_stands_for_which_text(tmp_path: Path) -> None:
    write_index(tmp_path / "index", {"a": {"de": 5, "tr": 9}, "b": {"tr": 1, "zh": 4}})
    write_index(tmp_path / "grown" / "az" / "index", {"az": {"az": 3, "de": 5, "tr": 9}})
    assert list(evaluated_languages(tmp_path, Growth())) == ["de", "tr", "zh"]
    az = Grown("az", ("az",), "a", "expert", "h")
    lapt = Grown("az-lapt-seed", ("az",), "seed", "lapt", "h")
    growth = Growth((az, lapt))
    assert held_clusters(tmp_path, growth) == {
        "a": {"de": {"tokens": 5}, "tr": {"tokens": 9}},
        "b": {"tr": {"tokens": 1}, "zh": {"tokens": 4}},
        "az": {"az": {"tokens": 3}},
    }
    folders = evaluated_languages(tmp_path, growth)
    assert folders["az"] == tmp_path / "grown" / "az" / "corpus" / "valid" and folders["de"] == tmp_path / "corpus" / "valid"
    assert growth.comparisons == [lapt] and growth.experts == [az]
    both = Grown("az-uk-lapt-seed", ("az", "uk"), "seed", "lapt", "h")
    assert Growth((both,), ("az",)).comparisons == [both] and Growth((both,), ("az", "uk")).comparisons == []
    less = Growth((az, lapt), ("tr", "az"), ("az",))
    assert {name: list(text) for name, text in held_clusters(tmp_path, less).items()} == {"a": ["de"], "b": ["zh"]}
    assert less.comparisons == [] and less.experts == [] and list(evaluated_languages(tmp_path, less)) == ["de", "zh"]
    assert language_owners({"de": "a", "tr": "a", "zh": "b"}, less) == {"de": "a", "zh": "b"}
    assert language_owners({"de": "a"}, growth) == {"de": "a", "az": "az"}


def test_what_is_made_from_a_grown_model_depends_on_training_weights_and_text(tmp_path: Path) -> None:
    model, corpus = (tmp_path / "grown" / "az" / place / "stage.json" for place in ("experts/az", "corpus"))
    for path in (model, corpus):
        path.parent.mkdir(parents=True)

    def found(training: str, weights: str, text: str) -> str:
        model.write_text(json.dumps({"fingerprint": training, "weights": weights}))
        corpus.write_text(json.dumps({"fingerprint": text}))
        return grown_fingerprint(tmp_path, "az")

    assert found("a", "b", "c") == found("a", "b", "c")
    assert len({found(*parts) for parts in ("abc", "xbc", "axc", "abx")}) == 4
    corpus.unlink()
    with pytest.raises(StageError, match="grown/az is not finished; go on with it: megaxelm grow"):
        grown_fingerprint(tmp_path, "az")


def test_the_record_is_read_back_and_damage_is_told(tmp_path: Path) -> None:
    assert read_growth(tmp_path) == Growth() and Growth().settings() == {}
    growth = Growth((Grown("az", ("az",), "tr", "expert", "h"),), ("de",), ("de",))
    write_growth(tmp_path, growth)
    assert read_growth(tmp_path) == growth
    assert growth.settings() == {"grown": [["az", "az"]], "dropped": {"languages": ["de"], "experts": ["de"]}}
    for damage in ('"expert"', '["az"]', '"donor"'):
        (tmp_path / "growth.json").write_text(json.dumps(growth.to_json()).replace(damage, '"wrong"', 1))
        with pytest.raises(StageError, match="growth.json: damaged.*megaxelm grow"):
            read_growth(tmp_path)
    write_growth(tmp_path, Growth())
    assert not (tmp_path / "growth.json").exists()
