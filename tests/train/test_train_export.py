"""`megaxelm export` of any checkpoint of a run: without ranks, DeepSpeed or a GPU, and with a sentence for what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megaxelm.cli import app
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import CheckpointError, MegaxelmError, ModelError, StageError
from megaxelm.files import hash_file, write_json
from megaxelm.model.config import config_from_recipe, write_config
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_pretrained
from megaxelm.run import RunFolder
from megaxelm.train.export import sample_texts


@pytest.fixture
def checkpoints(indexed_run: Path) -> Path:
    """`checkpoints/` of a seed with one complete checkpoint, as ZeRO 0 in fp32 writes it, of `Decoder.initialise(11)`."""
    recipe, tokenizer = RunFolder(indexed_run).recipe(), Tokenizer.load(indexed_run / "tokenizer")
    config = config_from_recipe(recipe.model, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.hf.pad_token_id)
    model = Decoder(config)
    model.initialise(11)
    folder = indexed_run / "experts" / "seed" / "checkpoints"
    (folder / "6").mkdir(parents=True)
    optimizer = torch.optim.AdamW(sorted(model.parameters(), key=lambda parameter: parameter.ndim <= 1))
    state = {"module": model.state_dict(), "buffer_names": [], "optimizer": optimizer.state_dict(), "mp_world_size": 1}
    path = folder / "6" / "mp_rank_00_model_states.pt"
    torch.save(state, path)
    marker = {"step": 6, "samples": 48, "layout": {"ranks": 1, "zero_stage": 0, "precision": "fp32"}}
    marker["files"] = {path.name: {"bytes": path.stat().st_size, "xxh3": hash_file(path)}}
    write_json(folder / "6" / "complete.json", marker)
    (folder / "latest").write_text("6")
    write_config(config, folder.parent / "model_config.json")
    return folder


def export(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_checkpoint_is_exported_and_the_newest_by_its_folder(checkpoints: Path, tmp_path: Path) -> None:
    printed = export(checkpoints / "6", "--to", "hf", "--output", tmp_path / "a", "--dtype", "float32")
    assert "checkpoints/6 in float32; reloaded, and its logits agree" in printed
    assert "checkpoints/6 in bfloat16" in export(checkpoints, "--output", tmp_path / "b")
    exported = load_pretrained(tmp_path / "a")
    expected = Decoder(exported.config)
    expected.initialise(11)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name), parameter, rtol=0, atol=0)
    assert (tmp_path / "a" / "tokenizer.json").exists()
    assert "lm_head.weight" not in (tmp_path / "a" / "model.safetensors").read_bytes()[:20000].decode("latin1")


def damage_file(checkpoints: Path) -> None:
    path = checkpoints / "6" / "mp_rank_00_model_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_shapes(checkpoints: Path) -> None:
    path = checkpoints.parent / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 32}))


@pytest.mark.parametrize(
    ("damage", "arguments", "kind", "text"),
    [
        (lambda folder: shutil.rmtree(folder / "6"), ["6"], CheckpointError, "no such checkpoint; there are: none"),
        (lambda folder: (folder / "6" / "complete.json").unlink(), ["6"], CheckpointError, "unfinished"),
        (lambda folder: (folder / "latest").unlink(), [""], CheckpointError, "no complete checkpoint there"),
        (damage_file, ["6"], CheckpointError, "mp_rank_00_model_states.pt: damaged since"),
        (damage_shapes, ["6"], CheckpointError, r"has shape \(64, 32\), model_config.json asks for \(32, 32\)|has shape \(32, 64\)"),
        (lambda folder: (folder.parent / "model_config.json").unlink(), ["6"], ModelError, "model_config.json: not readable"),
        (lambda folder: None, ["6", "--to", "gguf"], StageError, "--to gguf: choose hf or adapter"),
        (lambda folder: None, ["6", "--expert", "seed"], StageError, "leave --expert out"),
        (lambda folder: None, ["6", "--dtype", "int8"], ModelError, "choose float32 or bfloat16"),
        (lambda folder: (folder.parents[4] / "out").mkdir(), ["6"], ModelError, "exists already"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(damage, arguments, kind, text, checkpoints: Path, tmp_path: Path) -> None:
    damage(checkpoints)
    before = (tmp_path / "out").exists()
    with pytest.raises(kind, match=text) as error:
        export(checkpoints / arguments[0], *arguments[1:], "--output", tmp_path / "out")
    assert isinstance(error.value, MegaxelmError)
    assert (tmp_path / "out").exists() == before


def test_a_run_needs_the_name_of_an_expert(indexed_run: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="--expert is missing"):
        export(indexed_run, "--output", tmp_path / "out")


def test_logits_are_compared_on_texts_that_the_model_can_read(indexed_run: Path) -> None:
    run, tokenizer = RunFolder(indexed_run), Tokenizer.load(indexed_run / "tokenizer")
    texts = sample_texts(run, tokenizer, max_positions=64)
    short = sample_texts(run, tokenizer, max_positions=5)
    assert texts and max(map(len, texts)) > 5 and max(map(len, texts)) <= 64
    assert short == [text[:5] for text in texts] and {text[0] for text in short} == {tokenizer.start_id}
