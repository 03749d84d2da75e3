"""Peak memory of a model too large to be held carelessly: `start` it on every rank under ZeRO-3, or `export` its checkpoint.

Started by `test_train_large.py`; prints one JSON line: peaks of resident memory above that after the imports, in bytes.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from tiny_run import REPOSITORY, tiny_recipe

import megaxelm.model.hub as hub
from megaxelm.model.config import DecoderConfig, num_parameters
from megaxelm.model.export import export_to
from megaxelm.model.source import drawn_source
from megaxelm.recipe import parse_recipe
from megaxelm.run import RunFolder
from megaxelm.train.ds_config import fill_ds_config
from megaxelm.train.engine import build_model, fill_engine, start_engine
from megaxelm.train.environment import find_processes
from megaxelm.train.export import open_checkpoint
from megaxelm.train.members import plan_members
from megaxelm.train.process_group import join_process_group
from megaxelm.train.setting import Setting

CONFIG = DecoderConfig("llama", 400, 1024, 40, 8, 8, 128, 2816, 64, tie_embeddings=False)


def peak() -> int:
    """The most resident memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start(folder: Path) -> dict[str, float]:
    processes = find_processes()
    join_process_group(cuda=False)
    recipe = parse_recipe(tiny_recipe(folder, train={"precision": "bf16"}))
    member = plan_members(recipe, ["x", "y"])["seed"]
    ds_config = fill_ds_config(REPOSITORY / "ds_configs/zero3.json", recipe.train, member, processes.world_size, cuda=False)
    run = RunFolder(folder / "run")
    setting = Setting(run, recipe, member, ds_config, processes, torch.device("cpu"))
    if processes.rank == 0:
        setting.folder.mkdir(parents=True)
        hub.save_pretrained(drawn_source(CONFIG, 0), folder / "seed", max_shard_bytes=500_000_000)
    torch.distributed.barrier()
    base = peak()
    source = hub.open_pretrained(folder / "seed")
    model = build_model(setting, source.config)
    built = peak()
    engine = start_engine(setting, model)
    started = peak()
    began = time.monotonic()
    fill_engine(engine, source.weight, None, 0)
    filled = peak()
    seconds = time.monotonic() - began
    engine.save_checkpoint(str(setting.folder / "checkpoints"), tag="0", save_latest=False)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {"base": base, "build": built - base, "start": started - base, "fill": filled - base, "fill_seconds": seconds}


def export(folder: Path) -> dict[str, float]:
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    import transformers

    assert transformers.AutoModelForCausalLM and transformers.GenerationConfig and transformers.LlamaConfig  # imported when first named
    base, began = peak(), time.monotonic()
    source = open_checkpoint(folder / "run" / "experts" / "seed" / "checkpoints" / "0")
    export_to(source, folder / "exported", "float32", tokenizer, [[1, 5, 9, 300, 2], [1, 7, 8]])
    return {"export": peak() - base, "export_seconds": time.monotonic() - began}


def main() -> None:
    folder = Path(sys.argv[2])
    peaks = start(folder) if sys.argv[1] == "start" else export(folder)
    print(json.dumps(peaks | {"parameters": num_parameters(CONFIG)}), flush=True)


if __name__ == "__main__":
    main()
