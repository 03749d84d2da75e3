"""Where the weights of a model come from, and what it is trained with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import load_tokenizer_of, run_module

from megaxelm.corpus.index_folder import open_streams
from megaxelm.corpus.sampling import Blend
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import ModelError
from megaxelm.files import read_json
from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_pretrained, save_pretrained
from megaxelm.recipe import load_recipe
from megaxelm.run import MARKER, RunFolder
from megaxelm.train.engine import build_model, starting_weights
from megaxelm.train.environment import Processes
from megaxelm.train.members import plan_members
from megaxelm.train.setting import Setting
from megaxelm.train.steps import Steps


def random_seed_model(run: Path, folder: Path) -> Decoder:
    tokenizer = Tokenizer.load(run / "tokenizer")
    recipe = RunFolder(run).recipe()
    model = Decoder(config_from_recipe(recipe.model, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.hf.pad_token_id))
    model.initialise(7)
    save_pretrained(model, folder, tokenizer_folder=run / "tokenizer")
    return model


def setting_of(run: Path, name: str, *overrides: str) -> Setting:
    recipe = load_recipe(run / "recipe.yaml", overrides)
    member = plan_members(recipe, ["bg-en", "de-ru"])[name]
    return Setting(RunFolder(run), recipe, member, {"zero_optimization": {"stage": 0}}, Processes(0, 1, 0, "a test"), torch.device("cpu"))


def test_an_expert_starts_from_its_parent_in_training_mode(indexed_run: Path) -> None:
    parent = random_seed_model(indexed_run, indexed_run / "experts" / "seed" / "export")
    setting = setting_of(indexed_run, "de-ru", "model.dropout=0.25")
    source = starting_weights(setting, Tokenizer.load(indexed_run / "tokenizer"))
    model = build_model(setting, source.config)
    assert model.training and model.config.residual_dropout == 0.25
    for name, _ in model.named_parameters():
        torch.testing.assert_close(source.weight(name), parent.get_parameter(name).detach(), rtol=0, atol=0)


def test_a_seed_from_scratch_has_the_weights_of_its_seed(indexed_run: Path) -> None:
    source = starting_weights(setting_of(indexed_run, "seed", "train.seed=5"), Tokenizer.load(indexed_run / "tokenizer"))
    expected = Decoder(source.config)
    expected.initialise(5)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(source.weight(name), parameter.detach(), rtol=0, atol=0)
    # The first numbers of the generator are the first row of the first matrix.
    first = torch.empty(32).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(expected.embed.weight[0].detach(), first, rtol=0, atol=1e-7)


@pytest.mark.parametrize("document_mask", [True, False])
def test_ranks_and_micro_batches_share_the_samples_of_a_step(indexed_run: Path, document_mask: bool) -> None:
    overrides = [f"train.document_mask={document_mask}".lower(), f"tokenizer.begin_of_document={document_mask}".lower()]
    seen, segments = [], 0
    for rank in (0, 1):
        setting = setting_of(indexed_run, "dense", *overrides)
        setting = replace(setting, processes=Processes(rank, 2, rank, "a test"), ds_config={"train_micro_batch_size_per_gpu": 2})
        blend = Blend(open_streams(indexed_run / "index"), 32, 1.0, 0)
        for batch in Steps(setting, None, blend, {})._batches(step=3):
            seen += batch.sample_ids.unique().tolist()
            segments += len(batch.cu_seqlens) - 1
    assert seen == list(range(24, 32))
    assert (segments > 8) == document_mask, "without the mask a segment is a window"


def test_a_loaded_seed_is_exported_as_it_is(indexed_run: Path, tmp_path: Path) -> None:
    loaded = random_seed_model(indexed_run, tmp_path / "seed")
    load_tokenizer_of(indexed_run, tmp_path / "seed")
    done = run_module("megaxelm.train", str(indexed_run), "--expert", "seed", "--set", f"seed.load={tmp_path / 'seed'}")
    assert done.returncode == 0, done.stderr
    exported = load_pretrained(indexed_run / "experts" / "seed" / "export")
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter, loaded.get_parameter(name), rtol=0, atol=0)


def test_a_seed_with_another_tokenizer_is_refused(indexed_run: Path, tmp_path: Path) -> None:
    random_seed_model(indexed_run, tmp_path / "seed")
    load_tokenizer_of(indexed_run, tmp_path / "seed")
    other = tmp_path / "seed" / "tokenizer.json"
    content = json.loads(other.read_text())
    content["model"]["vocab"][300][0] = "another"
    other.write_text(json.dumps(content))
    setting = setting_of(indexed_run, "seed", f"seed.load={tmp_path / 'seed'}")
    with pytest.raises(ModelError, match="its tokenizer has other pieces than the run's: set tokenizer.load"):
        starting_weights(setting, Tokenizer.load(indexed_run / "tokenizer"))


@pytest.mark.slow
def test_megaxelm_train_starts_several_ranks_through_deepspeed(indexed_run: Path) -> None:
    arguments = ["--expert", "seed", "--set", "train.num_devices=2", "--set", "train.deepspeed_config=zero2"]
    done = run_module("megaxelm.cli", "train", str(indexed_run), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    choices = read_json(indexed_run / "experts" / "seed" / "choices.json")
    assert choices["processes"] == 2 and choices["zero_stage"] == 2
    assert choices["attention"] == "sdpa" and choices["resumed_from_step"] == 0


@pytest.mark.slow
def test_a_training_that_blows_up_stops_before_it_saves_broken_weights(indexed_run: Path) -> None:
    overrides = (
        "train.lr=1e25",
        "train.checkpoint_every=1",
        "train.gradient_clipping=0",
        "train.schedule=constant",
        "train.max_skipped_steps=2",
    )
    done = run_module("megaxelm.train", str(indexed_run), "--expert", "seed", *[part for item in overrides for part in ("--set", item)])
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "2 steps in a row" in done.stderr and "Lower train.lr" in done.stderr
    broken = int(done.stderr.split("the last step ")[1].split(",")[0])
    assert f"samples {8 * broken - 8} to {8 * broken - 1}" in done.stderr
    assert not (indexed_run / "experts" / "seed" / "checkpoints" / str(broken)).exists()


def test_a_failed_training_is_told_with_its_reason(indexed_run: Path) -> None:
    arguments = ["--expert", "seed", "--set", "train.num_devices=1", "--set", "train.attention=varlen"]
    done = run_module("megaxelm.cli", "train", str(indexed_run), *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "`seed` was not trained (exit code 2" in done.stderr and "train.attention = varlen" in done.stderr
    assert not (indexed_run / "experts" / "seed" / MARKER).exists()


def test_a_wrong_deepspeed_configuration_is_told_before_anything_is_started(indexed_run: Path) -> None:
    done = run_module("megaxelm.cli", "train", str(indexed_run), "--set", "train.deepspeed_config=zero7")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "zero1, zero2, zero2-offload, zero3" in done.stderr and "was not trained" not in done.stderr
    assert not (indexed_run / "experts" / "seed" / "train.log").exists()
