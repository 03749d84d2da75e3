"""The whole preparation: the same indexes whoever makes them, nothing done twice, nothing lost when a worker dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_run import index_hashes, pipeline_recipe, prepare, write_files
from reading import training_documents
from tiny_run import REPOSITORY

from megaxelm.corpus.index_folder import load_index_manifest
from megaxelm.corpus.shards import TokenShard
from megaxelm.corpus.token_index import TokenIndex
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import ClusterError, CorpusError, StageError, TokenIndexError
from megaxelm.run import RunFolder
from megaxelm.stages import Stages


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a run that was prepared from it in one process."""
    base = tmp_path_factory.mktemp("made")
    prepare(base / "run", pipeline_recipe(write_files(base / "corpus")))
    return base


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def test_every_document_is_in_its_cluster_in_the_order_of_the_corpus(made: Path) -> None:
    run, recipe = made / "run", pipeline_recipe(made / "corpus")
    tokenizer = Tokenizer.load(run / "tokenizer")
    documents = training_documents(recipe, run / "corpus", run / "shards")
    assert [document.id for document in documents] == sorted((d.id for d in documents), key=lambda name: [int(x) for x in name.split("-")])
    manifest = load_index_manifest(run / "index")
    assert sorted(manifest["clusters"]) == ["bg-en", "de-ru"]
    for cluster, languages in manifest["clusters"].items():
        assert sorted(languages) == cluster.split("-")
        for language, counts in languages.items():
            expected = [document for document in documents if document.language == language]
            index = TokenIndex(run / "index" / cluster / language)
            assert [tokenizer.decode(index.document(i).tolist()) for i in range(index.num_documents)] == [d.text for d in expected]
            assert all((int(index.document(i)[0]), int(index.document(i)[-1])) == (1, 2) for i in range(index.num_documents))
            assert (counts["documents"], counts["tokens"]) == (len(expected), index.num_tokens)
            assert counts["bytes"] == sum(document.num_bytes for document in expected)
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint and manifest["verified"] is True


@pytest.mark.parametrize(
    "executor",
    [
        pytest.param({"block_bytes": 1000, "tasks": 3}, id="small"),
        pytest.param({"block_bytes": 32_000_000}, id="large", marks=pytest.mark.slow),
        pytest.param({"workers": 2, "tasks": 5}, id="two", marks=pytest.mark.slow),
    ],
)
def test_indexes_are_the_same_byte_for_byte_whoever_makes_them(made: Path, tmp_path: Path, executor: dict[str, Any]) -> None:
    recipe = pipeline_recipe(made / "corpus", made / "run" / "tokenizer", executor=executor)
    prepare(tmp_path / "run", recipe)
    assert index_hashes(tmp_path / "run") == index_hashes(made / "run")


@pytest.mark.slow
def test_another_clustering_tokenises_nothing(made: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, texts: Any) -> Any:
        calls.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    for clusters in ({"partitioner": "language", "k": 4}, {"partitioner": "random", "k": 3}, {"partitioner": "typology", "k": 2}):
        train = {"batch_sequences": 12}
        said = prepare(run, pipeline_recipe(made / "corpus", clusters=clusters, train=train))
        assert any(line.startswith("clusters    making") for line in said) and any(line.startswith("tokens      fresh") for line in said)
        # the report's picture encodes its own small sample, and nothing of the corpus
        assert all(count <= 256 for count in calls), calls
    calls.clear()
    shutil.rmtree(run / "index")
    prepare(run, pipeline_recipe(made / "corpus", clusters={"partitioner": "typology", "k": 2}, train={"batch_sequences": 12}))
    assert not calls
    assert index_hashes(run) == index_hashes(made / "run")


def test_only_what_is_new_is_read_and_tokenised(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaxelm.corpus.scan import ScanStep
    from megaxelm.corpus.tokens import TokensStep

    shutil.copytree(made / "corpus", tmp_path / "corpus")
    # a tokenizer that was trained on a longer corpus would be another one
    recipe = pipeline_recipe(tmp_path / "corpus", made / "run" / "tokenizer")
    prepare(tmp_path / "run", recipe)
    (tmp_path / "corpus" / "7.jsonl").write_text(
        "".join(json.dumps({"id": f"7-{i}", "language": "en", "text": f"the quiet river {i}"}) + "\n" for i in range(40))
    )
    done: list[str] = []
    for step in (ScanStep, TokensStep):
        do = step.do

        def noted(self: Any, unit: int, progress: Any, do: Any = do) -> None:
            done.append(type(self).__name__)
            do(self, unit, progress)

        monkeypatch.setattr(step, "do", noted)
    prepare(tmp_path / "run", recipe)
    assert done.count("ScanStep") == 1
    tokenised = done.count("TokensStep")
    blocks = len(json.loads((tmp_path / "run" / "tokens" / "manifest.json").read_text())["shards"])
    assert 1 <= tokenised < blocks / 3


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_a_sentence_and_costs_its_own_part_only(made: Path, tmp_path: Path) -> None:
    corpus = write_files(tmp_path / "corpus", files=8, documents=400)
    program = (
        "import sys; from pathlib import Path\n"
        "from pipeline_run import pipeline_recipe, prepare\n"
        "from megaxelm.console import run_guarded\n"
        "if __name__ == '__main__':\n"
        "    corpus, tokenizer, run = map(Path, sys.argv[1:])\n"
        "    recipe = pipeline_recipe(corpus, tokenizer, executor={'workers': 2, 'tasks': 40, 'block_bytes': 20000})\n"
        "    sys.exit(run_guarded(lambda: prepare(run, recipe, until='tokens')))\n"
    )
    (tmp_path / "program.py").write_text(program)
    env = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels", REPOSITORY / "tests")))}
    command = [sys.executable, str(tmp_path / "program.py"), str(corpus), str(made / "run" / "tokenizer"), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    store = tmp_path / "run" / "shards" / "tokens"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (store.exists() and len(finished(store)) >= 3):
        time.sleep(0.01)
    victims = workers_of(process.pid)
    assert victims, "no worker was running"
    os.kill(victims[0], signal.SIGKILL)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker was killed (SIGKILL)" in printed and "Traceback" not in printed, printed
    kept = {name: (store / name / "shard.json").stat().st_mtime_ns for name in finished(store)}
    assert kept
    again = subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)
    assert again.returncode == 0, again.stderr
    assert {name: (store / name / "shard.json").stat().st_mtime_ns for name in kept} == kept
    assert not [path for path in store.iterdir() if path.name.startswith(".")]
    shards = json.loads((tmp_path / "run" / "tokens" / "manifest.json").read_text())["shards"]
    assert sorted(shards) == sorted(finished(store))
    recipe = pipeline_recipe(corpus, made / "run" / "tokenizer", executor={"block_bytes": 20000})
    prepare(tmp_path / "whole", recipe, until="tokens")
    for name in shards:
        for path in (tmp_path / "whole" / "shards" / "tokens" / name).iterdir():
            assert path.read_bytes() == (store / name / path.name).read_bytes()


def finished(store: Path) -> list[str]:
    return [path.parent.name for path in store.glob("[!.]*/shard.json")]


def workers_of(pid: int) -> list[int]:
    """Worker processes below `pid`: the children of its fork server."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    servers = [child for child, parent in parents.items() if parent == pid]
    return [child for child, parent in parents.items() if parent in servers]


def test_mistakes_in_several_files_are_named_at_once_and_the_sound_ones_are_kept(made: Path, tmp_path: Path) -> None:
    corpus = write_files(tmp_path / "corpus", files=30, documents=5)
    (corpus / "3.jsonl").write_text("{broken\n" * 5)
    (corpus / "7.jsonl").write_bytes(b"\xff\xfe" * 50)
    recipe = pipeline_recipe(corpus, made / "run" / "tokenizer", executor={"workers": 1, "tasks": 4})
    with pytest.raises(CorpusError, match="2 parts could not be done") as error:
        prepare(tmp_path / "run", recipe)
    assert "3.jsonl: 5 of 5 documents are broken" in str(error.value) and "7.jsonl" in str(error.value)
    scans = tmp_path / "run" / "shards" / "scan"
    before = {path.name for path in scans.iterdir()}
    assert len(before) == 28
    for name in ("3.jsonl", "7.jsonl"):
        shutil.copyfile(corpus / "1.jsonl", corpus / name)
    prepare(tmp_path / "run", recipe, until="corpus")
    assert before <= {path.name for path in scans.iterdir()}


def test_a_shard_that_was_cut_is_found(made: Path, run: Path) -> None:
    recipe = pipeline_recipe(made / "corpus")
    shutil.rmtree(run / "index")
    store = run / "shards" / "tokens"
    shard = store / json.loads((run / "tokens" / "manifest.json").read_text())["shards"][2]
    whole = {path.name: path.read_bytes() for path in shard.iterdir()}
    for name in ("tokens.bin", "lengths.npy", "keys.npy", "sizes.npy", "shard.json"):
        (shard / name).write_bytes(whole[name][:-3])
        with pytest.raises(TokenIndexError, match=f"token shard .*{shard.name}"):
            prepare(run, recipe)
        (shard / name).write_bytes(whole[name])
    flipped = bytearray(whole["tokens.bin"])
    flipped[10] ^= 1
    (shard / "tokens.bin").write_bytes(flipped)
    with pytest.raises(TokenIndexError, match="have changed"):
        prepare(run, recipe)
    (shard / "tokens.bin").write_bytes(whole["tokens.bin"])
    prepare(run, recipe)
    assert index_hashes(run) == index_hashes(made / "run")


@pytest.mark.slow
def test_another_block_size_in_a_half_made_run_gives_the_same(made: Path, tmp_path: Path) -> None:
    def recipe(size: int, k: int = 2) -> Any:
        settings = {"executor": {"block_bytes": size}, "clusters": {"k": k}, "train": {"batch_sequences": 12}}
        return pipeline_recipe(made / "corpus", made / "run" / "tokenizer", **settings)

    run = tmp_path / "run"
    prepare(run, recipe(3000), until="corpus")
    prepare(run, recipe(1500), until="tokens")
    prepare(run, recipe(6000))
    assert index_hashes(run) == index_hashes(made / "run")
    assert len(json.loads((run / "tokens" / "manifest.json").read_text())["shards"]) > 50
    prepare(run, recipe(6000, k=3))
    manifest = load_index_manifest(run / "index")
    counted = sum(item["documents"] for languages in manifest["clusters"].values() for item in languages.values())
    assert counted == sum(TokenIndex(path.with_suffix("")).num_documents for path in (made / "run" / "index").rglob("*.idx"))


def test_other_documents_of_a_block_are_tokenised_again(made: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"language": "en", "text": f"the house {i:02}"}) + "\n" for i in range(20)]
    corpus, valid = tmp_path / "corpus", tmp_path / "valid.jsonl"
    corpus.mkdir()
    (corpus / "a.jsonl").write_text("".join(lines))
    recipe = pipeline_recipe(
        corpus, made / "run" / "tokenizer", corpus={"valid": str(valid)}, clusters={"k": 1}, train={"batch_sequences": 1}
    )
    for held_out in (3, 7):
        valid.write_text(lines[held_out])
        prepare(tmp_path / "run", recipe, until="tokens")
        store = tmp_path / "run" / "shards" / "tokens"
        (shard,) = [TokenShard(path) for path in store.iterdir()]
        tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer")
        found = [tokenizer.decode(document.tokens.tolist()) for document in shard.documents(1, 1)]
        assert found == [f"the house {i:02}" for i in range(20) if i != held_out]


def test_a_file_that_changes_before_it_is_read_for_other_blocks_is_found(made: Path, tmp_path: Path) -> None:
    corpus = write_files(tmp_path / "corpus", files=1, documents=2000)
    sizes = [pipeline_recipe(corpus, made / "run" / "tokenizer", executor={"block_bytes": size}) for size in (100_000, 200_000)]
    prepare(tmp_path / "run", sizes[0], until="corpus")
    lines = (corpus / "0.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    row = json.loads(lines[1000])
    lines[1000] = lines[1000].replace(json.dumps(row["text"]), json.dumps(row["text"][::-1]))
    (corpus / "0.jsonl").write_text("".join(lines), encoding="utf-8")
    with pytest.raises(CorpusError, match="has changed since the corpus stage read it; start again with --from corpus"):
        prepare(tmp_path / "run", sizes[1], until="tokens")


def test_a_damaged_list_of_what_is_trained_on_is_found(made: Path, run: Path) -> None:
    path = run / "corpus" / "kept" / "00002.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 8
    path.write_bytes(data)
    shutil.rmtree(run / "tokens")
    with pytest.raises(CorpusError, match="the corpus stage counted .* start again with --from corpus"):
        prepare(run, pipeline_recipe(made / "corpus"))


@pytest.mark.parametrize("name", ["shard.json", "tokens.bin"])
def test_a_lost_file_of_a_shard_is_made_again_by_the_way_out(made: Path, run: Path, name: str) -> None:
    recipe = pipeline_recipe(made / "corpus")
    shard = run / "shards" / "tokens" / json.loads((run / "tokens" / "manifest.json").read_text())["shards"][1]
    (shard / name).unlink()
    shutil.rmtree(run / "index")
    with pytest.raises(TokenIndexError, match=r"remove it and start again \(--from tokens\)"):
        prepare(run, recipe)
    if name != "shard.json":
        shutil.rmtree(shard)
    Stages(RunFolder(run), recipe, say=lambda text: None).run(until="index", start="tokens")
    assert index_hashes(run) == index_hashes(made / "run")


def test_held_out_text_is_in_no_index_whatever_file_repeats_it(tmp_path: Path, made: Path) -> None:
    corpus = write_files(tmp_path / "corpus", files=4, documents=50)
    lines = [line for number in range(4) for line in (corpus / f"{number}.jsonl").read_text().splitlines()]
    # every text again in other files, in another normal form
    import unicodedata

    (corpus / "again.jsonl").write_text("".join(unicodedata.normalize("NFD", line) + "\n" for line in lines[::-1]), encoding="utf-8")
    recipe = pipeline_recipe(corpus, made / "run" / "tokenizer", corpus={"train": f"{corpus}/*.jsonl", "held_out": {"share": 0.2}})
    run = tmp_path / "run"
    prepare(run, recipe)
    tokenizer = Tokenizer.load(run / "tokenizer")
    held_out = {
        unicodedata.normalize("NFC", json.loads(line)["text"])
        for path in (run / "corpus" / "valid").glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    trained = set()
    for path in (run / "index").rglob("*.idx"):
        index = TokenIndex(path.with_suffix(""))
        trained |= {unicodedata.normalize("NFC", tokenizer.decode(index.document(i).tolist())) for i in range(index.num_documents)}
    assert len(held_out) > 20 and trained and not held_out & trained
    assert len(held_out | trained) == len({unicodedata.normalize("NFC", json.loads(line)["text"]) for line in lines})


def test_two_runs_on_one_folder_do_not_mix(made: Path, run: Path) -> None:
    lock = run / ".locks" / "run"
    code = f"import fcntl, time; f = open({str(lock)!r}, 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(StageError, match="another megaxelm works here"):
            prepare(run, pipeline_recipe(made / "corpus"))
    finally:
        other.kill()
        other.wait()
    assert RunFolder(run).marker("index") is not None


def test_a_cluster_without_documents_is_an_error(made: Path, run: Path) -> None:
    shutil.rmtree(run / "index")
    report = json.loads((run / "clusters" / "report.json").read_text())
    report["names"].append("third")
    report["clusters"].append({"name": "third", "languages": {}, "forced": False})
    (run / "clusters" / "report.json").write_text(json.dumps(report))
    with pytest.raises(ClusterError, match=r"no document was assigned to cluster third.*lower clusters.k"):
        prepare(run, pipeline_recipe(made / "corpus"))


@pytest.mark.slow
@pytest.mark.parametrize("analyzer", ["subword", "char", "word"])
def test_tfidf_assigns_tokens_as_it_assigns_text(made: Path, run: Path, analyzer: str) -> None:
    from megaxelm.cluster.load import load_partitioner

    clusters = {"partitioner": "tfidf", "k": 3, "tfidf": {"analyzer": analyzer, "dimensions": 8}}
    recipe = pipeline_recipe(made / "corpus", clusters=clusters, train={"batch_sequences": 12})
    prepare(run, recipe)
    partitioner = load_partitioner(run / "clusters", Tokenizer.load(run / "tokenizer"))
    documents = training_documents(recipe, run / "corpus", run / "shards")
    numbers = partitioner.assign(documents)
    tokenizer = Tokenizer.load(run / "tokenizer")
    for number, name in enumerate(partitioner.names):
        for path in (run / "index" / name).glob("*.idx"):
            index = TokenIndex(path.with_suffix(""))
            found = [tokenizer.decode(index.document(i).tolist()) for i in range(index.num_documents)]
            expected = [d.text for d, own in zip(documents, numbers, strict=True) if own == number and d.language == path.stem]
            assert found == expected


@pytest.mark.slow
def test_balanced_assignment_divides_each_block_equally(made: Path, run: Path) -> None:
    clusters = {"partitioner": "tfidf", "k": 2, "tfidf": {"dimensions": 8, "assign": "balanced"}}
    prepare(run, pipeline_recipe(made / "corpus", clusters=clusters))
    for path in (run / "clusters" / "assignment").iterdir():
        sizes = np.bincount(np.load(path), minlength=2)
        assert abs(int(sizes[0]) - int(sizes[1])) <= 1


@pytest.mark.slow
def test_strange_text_survives_the_way_into_the_index(made: Path, tmp_path: Path) -> None:
    texts = [
        "NUL \x00 inside", "right-to-left \u200f\u05e9\u05dc\u05d5\u05dd\u200e mark", "\u2581 itself", "</s> and <0x41>", "a\u0301" * 50,
        "\U0001f600" * 300, "x" * 10_000_000, "\n\n\n", " lead and trail \t", "\ufeffmark",
    ]  # fmt: skip
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [json.dumps({"id": str(i), "language": "en", "text": text}) for i, text in enumerate(texts)]
    (corpus / "a.jsonl").write_text(
        "\n".join([*rows, '{"text": "half \\ud83d", "language": "en"}', '{"text": "", "language": "en"}']) + "\n"
    )
    (tmp_path / "valid.jsonl").write_text(json.dumps({"language": "en", "text": "held out"}) + "\n")
    settings = {"train": f"{corpus}/*.jsonl", "valid": str(tmp_path / "valid.jsonl"), "max_bad_share": 0.5}
    clusters = {"partitioner": "language"}
    recipe = pipeline_recipe(corpus, made / "run" / "tokenizer", corpus=settings, clusters=clusters)
    object.__setattr__(recipe.clusters, "k", None)
    prepare(tmp_path / "run", recipe)
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer")
    index = TokenIndex(tmp_path / "run" / "index" / "en" / "en")
    found = [tokenizer.decode(index.document(i).tolist()) for i in range(index.num_documents)]
    assert found == [text for text in texts if not text.isspace()]
    broken = json.loads((tmp_path / "run" / "corpus" / "manifest.json").read_text())["broken"]
    assert broken["count"] == 3
