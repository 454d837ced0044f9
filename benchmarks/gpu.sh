#!/usr/bin/env bash
# For a person with a GPU: correctness against the CPU, compute-sanitizer, timings. Nobody has run this yet.
#   benchmarks/gpu.sh [FOLDER]      results go to FOLDER (gpu-results)
# Needs an editable install with CUDA (dllm info says so), pytest, and compute-sanitizer on PATH for the second part.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-results}
mkdir -p "$out" weights
bin=build/current/bin

python - <<'PY' || exit 1
import sys, torch
from dllm_ext import _build_info
if not _build_info.CUDA:
    sys.exit(f"this build has no CUDA: {_build_info.CUDA_REASON}")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
PY
{ dllm info; nvidia-smi; } >"$out/machine.txt" 2>&1

echo "1. tests marked gpu"
pytest -m gpu python_tests --junitxml="$out/tests.xml" | tee "$out/tests.txt" | tail -1

echo "2. compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    for cache in none prefix dual dllm d2; do
      DLLM_CUDA_GRAPHS=0 compute-sanitizer --tool $tool --error-exitcode 9 "$bin/dllm_run" dllm_ext/models/mini-llada \
        --device cuda --cache $cache --gen-length 16 --block-length 8 --ids 2,733,625,317 >"$out/$tool-$cache.txt" 2>&1 &&
        echo "   $tool $cache: clean" || echo "   $tool $cache: see $out/$tool-$cache.txt"
    done
  done
else
  echo "   not found: skipped"
fi

echo "3. timings: steps of 32 rows (fraction of the memory roof: GB/s of weights over the GPU's own copy bandwidth)"
for model in llada-1b llada-8b; do
  [ -d weights/$model-seed0 ] || python benchmarks/random_model.py $model --folder weights
  for quantization in none int8 int4; do
    for rows in 8 32 64; do
      "$bin/dllm_bench" weights/$model-seed0 --device cuda --dtype bfloat16 --quantization $quantization --rows $rows \
        --keys 1024 --repeat 50 | sed "s/^/$model /" | tee -a "$out/steps.txt"
    done
  done
done
python - <<'PY' | tee "$out/bandwidth.txt"
import torch
x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
y = torch.empty_like(x)
times = []
for _ in range(20):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record(); y.copy_(x); b.record(); torch.cuda.synchronize(); times.append(a.elapsed_time(b))
print(f"copy bandwidth {2 * (1 << 30) / min(times) / 1e6:.0f} GB/s")
PY

echo "4. generations: dual cache, block 32"
for quantization in none int8 int4; do
  "$bin/dllm_run" weights/llada-8b-seed0 --device cuda --dtype bfloat16 --quantization $quantization --cache dual \
    --gen-length 256 --stop-at-eos false --ids "$(seq -s, 5 260)" --repeat 3 2>>"$out/generations.txt" >/dev/null
done
cat "$out/generations.txt"
echo "results are in $out/"
