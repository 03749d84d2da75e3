"""The corpus stage: the split, the bounded sample, the account, and the second pass."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import training_documents as read_training

from megaxelm.corpus.document import Document, text_key
from megaxelm.corpus.prepare import load_manifest, prepare_corpus, read_documents
from megaxelm.corpus.smallest import SmallestKeys
from megaxelm.errors import CorpusError
from megaxelm.recipe import Recipe, parse_recipe


def recipe(**corpus: Any) -> Recipe:
    return parse_recipe({"name": "t", "corpus": corpus, "clusters": {"partitioner": "language"}})


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"id": str(i), "language": code, "text": text}) + "\n" for i, (code, text) in enumerate(rows)))
    return str(path)


def prepared(tmp_path: Path, **corpus: Any) -> tuple[Recipe, Path, dict[str, Any]]:
    made = recipe(**corpus)
    out = tmp_path / f"corpus{random.random()}"
    out.mkdir()
    prepare_corpus(made, tmp_path / "shards", out)
    return made, out, load_manifest(out)


def training_documents(recipe: Recipe, corpus_folder: Path) -> list[Document]:
    return read_training(recipe, corpus_folder, corpus_folder.parent / "shards")


def rows(language: str, count: int) -> list[tuple[str, str]]:
    return [(language, f"{language} text number {i}\nwith two lines \u00e9") for i in range(count)]


def test_the_split_by_hash_is_disjoint_complete_and_stable(tmp_path: Path) -> None:
    all_rows = rows("sw", 1000) + rows("en", 1000)
    path = write(tmp_path / "a.jsonl", all_rows)
    made, out, manifest = prepared(tmp_path, train=path, held_out={"share": 0.1})
    train = {document.text for document in training_documents(made, out)}
    valid = {document.text for code in ("sw", "en") for document in read_documents(out / "valid" / f"{code}.jsonl")}
    assert train | valid == {text for _, text in all_rows}
    assert not train & valid
    for counts in manifest["languages"].values():
        assert 60 < counts["held_out_documents"] < 140
        assert counts["train_documents"] + counts["held_out_documents"] == 1000
    assert manifest["held_out"] == "hash"
    shuffled = list(all_rows)
    random.Random(0).shuffle(shuffled)
    _, other, again = prepared(tmp_path, train=write(tmp_path / "b.jsonl", shuffled), held_out={"share": 0.1})
    assert {document.text for document in read_documents(other / "valid" / "sw.jsonl")} == {text for text in valid if text.startswith("sw")}
    assert again["languages"] == manifest["languages"]


def test_manifest_counts_are_those_of_the_second_pass(tmp_path: Path) -> None:
    made, out, manifest = prepared(tmp_path, train=write(tmp_path / "a.jsonl", rows("sw", 300)), held_out={"share": 0.1})
    documents = list(training_documents(made, out))
    counts = manifest["languages"]["sw"]
    assert (len(documents), sum(len(d.text.encode()) for d in documents)) == (counts["train_documents"], counts["train_bytes"])
    sample = list(read_documents(out / "sample" / "sw.jsonl"))
    assert sorted(d.text for d in sample) == sorted(d.text for d in documents)
    assert [text_key(d.text) for d in sample] == sorted(text_key(d.text) for d in sample)


def test_given_held_out_text_wins_and_is_not_trained_on(tmp_path: Path) -> None:
    train = write(
        tmp_path / "a.jsonl", [*rows("sw", 50), ("sw", "cafe\u0301"), ("en", "x"), ("en", "sw text number 3\nwith two lines \u00e9")]
    )
    valid = write(tmp_path / "v.jsonl", [*rows("sw", 5), ("sw", "caf\u00e9"), ("en", "y"), ("fr", "bonjour")])
    made, out, manifest = prepared(tmp_path, train=train, valid=valid)
    assert len(list(training_documents(made, out))) == 46
    assert manifest["duplicates_of_valid"] == 7
    assert manifest["held_out"] == "given"
    assert manifest["valid_without_training"] == {"fr": 1}
    assert manifest["languages"]["sw"]["valid_documents"] == 6


def test_a_small_language_holds_out_the_text_with_the_smallest_key(tmp_path: Path) -> None:
    texts = ["moja", "mbili", "tatu", "tatu"]
    path = write(tmp_path / "a.jsonl", [("sw", text) for text in texts])
    made, out, manifest = prepared(tmp_path, train=path, held_out={"share": 1e-6})
    smallest = min(texts, key=text_key)
    assert [d.text for d in read_documents(out / "valid" / "sw.jsonl")] == [smallest]
    assert sorted(d.text for d in training_documents(made, out)) == sorted(text for text in texts if text != smallest)
    counts = manifest["languages"]["sw"]
    assert counts["train_documents"] == len(list(training_documents(made, out)))
    assert counts["sample_documents"] == 2
    assert manifest["held_out_by_smallest_key"] == ["sw"]


def test_a_language_with_one_text_cannot_be_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("sw", "moja"), ("sw", "moja"), *rows("en", 10)])
    with pytest.raises(CorpusError, match=r"no held-out text in sw.*raise corpus.held_out.share or give corpus.valid"):
        prepared(tmp_path, train=path)


def test_a_language_without_training_text_is_an_error_that_names_what_there_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows("sw", 10) + rows("fr", 3))
    with pytest.raises(CorpusError, match=r"asks for en, .*languages that occur: fr, sw"):
        prepared(tmp_path, train=path, languages=["sw", "en"])
    with pytest.raises(CorpusError, match="no held-out text in sw"):
        prepared(tmp_path, train=path, valid=write(tmp_path / "v.jsonl", [("fr", "x")]), languages=["sw", "fr"])


def test_no_documents_and_bad_codes_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(CorpusError, match="no documents"):
        prepared(tmp_path, train=str(tmp_path / "a.jsonl"))
    with pytest.raises(CorpusError, match="corpus.languages"):
        prepared(tmp_path, train=str(tmp_path / "a.jsonl"), languages=["../sw"])


def test_bounds_hold_and_what_is_beyond_is_neither_trained_on_nor_scored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows("sw", 2000))
    made, out, manifest = prepared(tmp_path, train=path, held_out={"share": 0.3}, valid_bytes=2000, sample_bytes=3000)
    counts = manifest["languages"]["sw"]
    assert 1900 < counts["valid_bytes"] <= 2000
    assert 2900 < counts["sample_bytes"] <= 3000
    assert counts["held_out_documents"] > 500 > counts["valid_documents"]
    assert len(list(training_documents(made, out))) == 2000 - counts["held_out_documents"] == counts["train_documents"]


def test_broken_documents_are_in_the_manifest(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", rows("sw", 30)))
    path.write_text(path.read_text() + "{\n")
    _, _, manifest = prepared(tmp_path, train=str(path), max_bad_share=0.1, held_out={"share": 0.1})
    assert manifest["broken"]["count"] == 1
    assert manifest["broken"]["examples"][0].startswith("a.jsonl, line 31: not JSON")
    assert str(tmp_path) not in json.dumps(manifest)


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=40, unique_by=lambda pair: pair[0]),
    order=st.randoms(use_true_random=False),
)
def test_the_smallest_keys_do_not_depend_on_the_order(documents: list[tuple[int, int]], order: random.Random) -> None:
    def kept(pairs: list[tuple[int, int]]) -> list[int]:
        heap: SmallestKeys[None] = SmallestKeys(100)
        for key, size in pairs:
            heap.add(key, None, size)
        return [key for key, _, _ in heap.items()]

    shuffled = list(documents)
    order.shuffle(shuffled)
    result = kept(documents)
    assert result == kept(shuffled)
    small = sorted(pair for pair in documents if pair[1] <= 50)
    total, expected = 0, []
    for key, size in small:
        total += size
        if total > 100:
            break
        expected.append(key)
    assert result == (expected or [min(documents)[0]])


def test_meta_survives_even_with_half_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one \\u00e9", "language": "sw", "title": "x \\ud83d"}\n{"text": "two", "language": "sw", "n": 5}\n')
    _, out, _ = prepared(tmp_path, train=str(path))
    documents = [*read_documents(out / "valid" / "sw.jsonl"), *read_documents(out / "sample" / "sw.jsonl")]
    assert sorted(json.dumps(document.meta) for document in documents) == ['{"n": 5}', '{"title": "x \\ud83d"}']


def test_other_languages_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*rows("sw", 5), *rows("en", 30)])
    made, out, manifest = prepared(tmp_path, train=path, languages=["en"], held_out={"share": 0.2})
    assert {document.language for document in training_documents(made, out)} == {"en"}
    assert manifest["skipped_languages"] == {"sw": 5}


def test_text_files_share_one_account_of_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "sw").mkdir()
    for i in range(9):
        (tmp_path / "sw" / f"{i}.txt").write_text(f"habari {i}")
    (tmp_path / "sw" / "9.txt").write_bytes(b"caf\xe9")
    _, _, manifest = prepared(tmp_path, train=f"{tmp_path}/sw/*.txt", max_bad_share=0.1, held_out={"share": 0.3})
    assert manifest["broken"]["count"] == 1
    assert "9.txt: not UTF-8" in manifest["broken"]["examples"][0]
    with pytest.raises(CorpusError, match="1 of 10"):
        prepared(tmp_path, train=f"{tmp_path}/sw/*.txt", max_bad_share=0.05)


def test_a_source_that_changed_after_the_stage_is_an_error(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", rows("sw", 100)))
    made, out, _ = prepared(tmp_path, train=str(path), held_out={"share": 0.1})
    before = path.read_bytes()
    path.write_bytes(before + b'{"text": "mpya", "language": "sw"}\n')
    with pytest.raises(CorpusError, match=r"has changed since the corpus stage read it \(a.jsonl\)"):
        training_documents(made, out)


def test_a_change_in_the_middle_of_a_long_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", rows("sw", 6000)))
    assert path.stat().st_size > 4 * 64 * 1024
    made, out, _ = prepared(tmp_path, train=str(path), held_out={"share": 0.1})
    before = path.read_bytes()
    path.write_bytes(before.replace(b"sw text number 3000\\n", b"SW text number 3000\\n"))
    with pytest.raises(CorpusError, match="a.jsonl: has changed since"):
        training_documents(made, out)
    made, out, _ = prepared(tmp_path, train=str(path), held_out={"share": 0.1})
    assert any("SW text number 3000" in document.text for document in training_documents(made, out))


def test_repeated_texts_are_left_out_once_asked_for_and_the_first_stays(tmp_path: Path) -> None:
    for name, start in (("b.jsonl", 0), ("a.jsonl", 5)):
        texts = [("sw", f"maandishi namba {i} caf\u00e9") for i in range(start, start + 20)]
        write(tmp_path / name, [*texts, texts[3], ("sw", "maandishi namba 7 cafe\u0301")])
    arguments: dict[str, Any] = {"train": f"{tmp_path}/*.jsonl", "held_out": {"share": 0.1}}
    made, out, manifest = prepared(tmp_path, **arguments, deduplicate="exact")
    documents = training_documents(made, out)
    keys = [text_key(document.text) for document in documents]
    assert len(keys) == len(set(keys))
    plain, other, before = prepared(tmp_path, **arguments)
    everything = training_documents(plain, other)
    first: dict[int, Document] = {}
    for document in everything:
        first.setdefault(text_key(document.text), document)
    assert documents == list(first.values())
    assert manifest["duplicates"] == len(everything) - len(documents) > 0 == before["duplicates"]
    assert manifest["languages"]["sw"]["train_documents"] == len(documents)


def test_a_text_counts_as_repeated_only_after_one_that_is_trained_on(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(40)]
    path = write(tmp_path / "a.jsonl", [(code, text) for code in ("en", "sw") for text in texts])
    made, out, manifest = prepared(tmp_path, train=path, languages=["sw"], held_out={"share": 0.1}, deduplicate="exact")
    held_out = manifest["languages"]["sw"]["held_out_documents"]
    assert manifest["duplicates"] == 0 and len(training_documents(made, out)) == 40 - held_out > 30


def test_near_duplicates_are_left_out_in_any_script(tmp_path: Path) -> None:
    draw = random.Random(0)
    letters = [a + b + c for a in "bdkmt" for b in "aeiou" for c in "lnrsw"]
    words = {"en": letters, "hi": [f"कि{word}" for word in letters], "zh": [chr(0x4E00 + i) for i in range(400)]}
    lines, expected = [], []
    for code, known in words.items():
        joint = "" if code == "zh" else " "
        for i in range(12):
            text = draw.choices(known, k=120)
            lines.append((code, joint.join(text)))
            expected.append(lines[-1][1])
            if i % 4 == 0:
                lines.append((code, joint.join([*text[:60], known[i], *text[61:]])))
    valid = write(tmp_path / "v.jsonl", [(code, f"x {code}") for code in words])
    made, out, manifest = prepared(tmp_path, train=write(tmp_path / "a.jsonl", lines), valid=valid, deduplicate="minhash")
    assert manifest["duplicates"] == 9
    assert [document.text for document in training_documents(made, out)] == expected


def test_languages_are_detected_where_the_recipe_asks(tmp_path: Path) -> None:
    texts = {
        "sw": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa, wote wamejaliwa akili na dhamiri",
        "de": "Alle Menschen sind frei und gleich an Wuerde und Rechten geboren und mit Vernunft begabt",
        "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах",
    }
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(60):
            code = list(texts)[i % 3]
            file.write(json.dumps({"id": f"{code}-{i}", "text": f"{texts[code]} {i}"}) + "\n")
    made, out, manifest = prepared(
        tmp_path, train=str(tmp_path / "a.jsonl"), language="detect", held_out={"share": 0.1}, languages=["de", "sw"]
    )
    documents = training_documents(made, out)
    assert {document.language for document in documents} == {"de", "sw"}
    made, out, manifest = prepared(tmp_path, train=str(tmp_path / "a.jsonl"), language="detect", held_out={"share": 0.1})
    documents = training_documents(made, out)
    assert documents and all(document.id.startswith(document.language) for document in documents)
    assert set(manifest["languages"]) == set(texts)
    with pytest.raises(CorpusError, match="corpus.language = detect: the detector does not know xq"):
        prepared(tmp_path, train=str(tmp_path / "a.jsonl"), language="detect", languages=["xq"])


def test_a_language_that_the_detector_does_not_know_may_be_named_by_its_source(tmp_path: Path) -> None:
    own = {"files": [write(tmp_path / "own.jsonl", [("", f"maneno ya lugha nyingine {i}") for i in range(60)])], "language": "xq"}
    other = write(tmp_path / "other.jsonl", [("", f"this is plainly an English sentence with number {i}") for i in range(60)])
    made, out, manifest = prepared(tmp_path, train=[own, other], language="detect", languages=["en", "xq"], held_out={"share": 0.1})
    assert set(manifest["languages"]) == {"en", "xq"}
    with pytest.raises(CorpusError, match="the detector does not know xq"):
        prepared(tmp_path, train=[own, other], language="detect", languages=["xq"])


def test_a_file_in_two_sources_loses_no_text_when_repeated_texts_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows("sw", 50))
    made, out, manifest = prepared(tmp_path, train=[path, path], held_out={"share": 0.1}, deduplicate="exact")
    documents = training_documents(made, out)
    alone, other, _ = prepared(tmp_path, train=path, held_out={"share": 0.1})
    assert documents == training_documents(alone, other)
    assert manifest["duplicates"] == len(documents) > 0


@pytest.mark.parametrize("role", ["train", "valid"])
def test_what_an_earlier_corpus_held_never_shows_in_sample_and_held_out_text(tmp_path: Path, role: str) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.jsonl", [("sw", f"{number}: maandishi namba {i}") for i in range(200)])
    other = write(tmp_path / "other", [("sw", f"maneno mengine {i}") for i in range(20)])
    arguments: dict[str, Any] = {role: f"{tmp_path}/*.jsonl", "sample_bytes": 1000, "valid_bytes": 1000}
    arguments |= {"held_out": {"share": 0.1}} if role == "train" else {"train": [{"files": [other], "format": "jsonl"}]}
    prepared(tmp_path, **arguments)
    for number in range(3):
        (tmp_path / f"{number}.jsonl").unlink()
    _, after, _ = prepared(tmp_path, **arguments)
    (tmp_path / "shards").rename(tmp_path / "old")
    _, alone, _ = prepared(tmp_path, **arguments)
    for name in ("sample", "valid"):
        assert (after / name / "sw.jsonl").read_bytes() == (alone / name / "sw.jsonl").read_bytes()


def test_the_folder_of_text_files_names_their_language_also_when_it_was_renamed(tmp_path: Path) -> None:
    folder = tmp_path / "en"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text {i}")
    prepared(tmp_path, train=f"{folder}/*.txt", held_out={"share": 0.1})
    folder.rename(tmp_path / "sw")
    _, _, manifest = prepared(tmp_path, train=f"{tmp_path}/sw/*.txt", held_out={"share": 0.1})
    assert set(manifest["languages"]) == {"sw"}


def test_a_text_held_out_of_a_small_language_is_in_no_sample(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(3)]
    path = write(tmp_path / "a.jsonl", [(code, text) for code in ("sw", "en") for text in texts] + rows("en", 50))
    made, out, manifest = prepared(tmp_path, train=path, held_out={"share": 0.001})
    held_out = {text_key(d.text) for code in ("sw", "en") for d in read_documents(out / "valid" / f"{code}.jsonl")}
    assert "sw" in manifest["held_out_by_smallest_key"]
    assert not held_out & {text_key(d.text) for code in ("sw", "en") for d in read_documents(out / "sample" / f"{code}.jsonl")}


def test_training_text_that_is_all_held_out_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows("sw", 10))
    with pytest.raises(CorpusError, match=r"nothing but the texts of corpus.valid \(10 documents\)"):
        prepared(tmp_path, train=path, valid=path)


@pytest.mark.parametrize("name", ["result.json", "keys.npy", "languages.npy", "sizes.npy", "sample.jsonl", "valid.jsonl", "smallest.jsonl"])
def test_a_damaged_scan_is_found_and_the_way_out_works(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.jsonl", rows("sw", 100))
    made, out, _ = prepared(tmp_path, train=path, held_out={"share": 0.1})
    expected = training_documents(made, out)
    (folder,) = (tmp_path / "shards" / "scan").iterdir()
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for data in (whole[:-3], bytes(flipped), None):
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)
        with pytest.raises(CorpusError, match="remove it and start again with --from corpus|make the corpus stage again"):
            training_documents(made, out)
        if data is not None or name != "result.json":
            with pytest.raises(CorpusError, match=f"scan .*{folder.name}: damaged"):
                prepared(tmp_path, train=path, held_out={"share": 0.1})
            shutil.rmtree(folder)
        made, out, _ = prepared(tmp_path, train=path, held_out={"share": 0.1})
        assert training_documents(made, out) == expected
