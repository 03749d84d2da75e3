#!/usr/bin/env bash
# Everything that wants a GPU, part by part, in under 10 minutes: gpu.sh FOLDER
# Appends one JSON line a part to FOLDER/results.jsonl as soon as it is done; a part that is there already is skipped. Needs torch, triton,
# numpy, transformers and pydantic, for training deepspeed too, no network. Each part has a time limit, one that fails does not stop the
# others, and those for which the time is over wait for the next start.
set -uo pipefail
folder=${1:?usage: gpu.sh FOLDER}
mkdir -p "$folder"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
results=$folder/results.jsonl
BUDGET=570 # seconds in all
touch "$results"

part() {
    local name=$1 seconds=$2
    shift 2
    grep -q "\"part\": \"$name\"" "$results" && { echo "$name: done before"; return; }
    local left=$((BUDGET - SECONDS))
    [ "$left" -gt 60 ] || { echo "$name: no time left, start again"; failed=1; return; }
    [ "$seconds" -lt "$left" ] || seconds=$left
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$folder/$name.log"
    local code=${PIPESTATUS[0]}
    python3 - "$name" "$code" "$folder/$name.log" >>"$results" <<'PYTHON'
import json, sys
name, code, log = sys.argv[1], int(sys.argv[2]), sys.argv[3]
last = (open(log, errors="replace").read().strip().splitlines() or [""])[-1]
print(json.dumps({"part": name, "exit_code": code, "result": json.loads(last) if last.startswith("{") else last}))
PYTHON
    # A part that failed is tried again next time.
    [ "$code" -eq 0 ] || { sed -i '$d' "$results"; echo "$name: exit code $code"; failed=1; }
}

failed=0
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 2
part tests 240 python3 -m pytest -q -m gpu tests/kernels tests/model tests/ensemble
for op in head_loss norms activations rotary attention decode_ops mixture; do
    part "kernels_$op" 100 python3 benchmarks/kernels.py --ops "$op"
done
part decode 240 python3 benchmarks/decode.py --shape 1.7b --experts 4 --batch 1,8,64 --context 512 --tokens 16 --turns 2
part score 150 python3 benchmarks/decode.py --shape 1.7b --experts 4 --scoring --score-length 2048 --score-texts 8 --turns 2
part training_step 180 python3 benchmarks/training_step.py
part training 180 python3 benchmarks/training.py --hidden-size 2048 --layers 12 --heads 16 --intermediate 5632 --vocab 32000 --length 2048 \
    --micro-batch 4 --accumulation 2 --steps 6
part zero 360 python3 benchmarks/zero.py --steps 4
cat "$results"
exit $failed
