#!/usr/bin/env bash
# Everything behind docs/results.md, in order. Hours on two cores; what is made already is passed over, so it may be stopped and started again.
set -euo pipefail
cd "$(dirname "$0")/../.."

for recipe in typology-8 typology-4 typology-16 tfidf-4 tfidf-8 random-8 rounds lora-8 typology-8-seed1 typology-8-seed2; do
  megaxelm run "recipes/evidence/$recipe.yaml"
done

copy() { [ -e "runs/$2" ] || { cp -a "runs/$1" "runs/$2.part" && mv "runs/$2.part" "runs/$2"; }; }

# New languages, in a copy: the run that everything is compared with stays as it is.
copy evidence-typology-8 evidence-grown
megaxelm grow runs/evidence-grown --languages az,he,pl,sv --lapt
megaxelm evaluate runs/evidence-grown

# The same experts with another way to find them: the router tfidf with a centre for each language.
for run in typology-8 grown; do
  copy "evidence-$run" "evidence-$run-centres"
  megaxelm run recipes/evidence/typology-8.yaml --set "name=evidence-$run-centres" --set ensemble.centres=language
done

# One set of experts, used in many ways.
megaxelm merge runs/evidence-typology-8 --into average
megaxelm merge runs/evidence-typology-8 --into moe
megaxelm merge runs/evidence-typology-8 --into distilled --steps 100
megaxelm ladder runs/evidence-typology-8
megaxelm evaluate runs/evidence-typology-8 --tasks "$(echo evidence_xcopa_{en,sw,tr,vi,zh} | tr ' ' ,)" \
  --include_path recipes/evidence/tasks --rung all --output runs/evidence-typology-8/merged/tasks.json

python -m benchmarks.evidence.collect runs
python -m benchmarks.evidence.write benchmarks/results/evidence docs/results.md
