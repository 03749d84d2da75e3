"""One rank of a training under DeepSpeed's AutoTP, started by torchrun: prints the losses of this decoder and of one that is whole."""

import json
import os

import deepspeed
import torch

from megaxelm.model.config import config_from_recipe
from megaxelm.model.decoder import Decoder
from megaxelm.recipe import ModelConfig
from megaxelm.train.process_group import join_process_group

STEPS, TOKENS, VOCABULARY = 4, 64, 500


def main() -> None:
    join_process_group(cuda=False)
    shape = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128, max_positions=TOKENS)
    config = config_from_recipe(shape, VOCABULARY, 0, 2, 1)
    whole, parted = Decoder(config).train(), Decoder(config).train()
    for model in (whole, parted):
        model.initialise(0)
    torch.manual_seed(0)
    tokens, labels = torch.randint(4, VOCABULARY, (2, TOKENS))
    batch = (tokens, torch.arange(TOKENS), torch.tensor([0, TOKENS]))
    columns = [r".*attention\.[qkv]\.weight$", r".*mlp\.(gate|up)\.weight$"]
    rows = [r".*attention\.out\.weight$", r".*mlp\.down\.weight$"]
    specs = [{"patterns": columns, "partition_type": "column"}, {"patterns": rows, "partition_type": "row"}]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
        "tensor_parallel": {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}},
    }
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2, weight_decay=0.0)
    engine, _, _, _ = deepspeed.initialize(model=parted, model_parameters=parted.parameters(), config=settings)
    losses: dict[str, list[float]] = {"whole": [], "parted": []}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = whole(*batch, labels=labels).loss_sum / TOKENS
        loss.backward()
        optimizer.step()
        losses["whole"].append(loss.item())
        loss = engine(*batch, labels=labels).loss_sum / TOKENS
        engine.backward(loss)
        engine.step()
        losses["parted"].append(loss.item())
    if os.environ["RANK"] == "0":
        print(json.dumps(losses | {"query": list(engine.module.layers[0].attention.q.weight.shape)}))


if __name__ == "__main__":
    main()
