"""A rank that runs some of the experts: prints what the ranks write together, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megaxelm.ensemble.engine import Engine
from megaxelm.ensemble.folder import load_ensemble
from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams
from megaxelm.ensemble.shards import Shards


def main() -> None:
    dist.init_process_group("gloo")
    ensemble = load_ensemble(Path(sys.argv[1]))
    shards = Shards(len(ensemble.experts))
    found = {}
    for router, top_m, combine, temperature in json.loads(sys.argv[2]):
        engine = Engine(ensemble, router=router, top_m=top_m, combine=combine, shards=shards)
        sampling = SamplingParams(max_new_tokens=8, temperature=temperature, stop_at_eos=False)
        numbers = [engine.add(GenerationRequest(prompt, "en", sampling)) for prompt in ("the cat", "кот", "")]
        written: dict[int, list[int]] = {number: [] for number in numbers}
        while engine.has_work:
            for event in engine.step():
                written[event.request_id].append(event.token_id)
        found[f"{router} {top_m} {combine} {temperature}"] = list(written.values())
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert all(other == found for other in everywhere), everywhere
    if dist.get_rank() == 0:
        print(json.dumps({"experts": len(ensemble._decoders), "stack": engine.stack.num_experts, "written": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
