#!/usr/bin/env bash
# All that docs/speed.md wants of a GPU, in at most nine minutes: bash benchmark/studies/gpu_check.sh FOLDER
# Each part has its own limit and may fail alone. The results are copied to FOLDER.
set -u
cd "$(dirname "$0")/../.."
out=${1:?a folder for the results}
mkdir -p "$out"
python=${PYTHON:-python}
part() { # seconds, name, command
  local limit=$1 name=$2
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || echo "$name: exit status $?, see $out/$name.log"
}
nvidia-smi --query-gpu=name,driver_version --format=csv >"$out/gpu.csv" 2>&1
speed="$python benchmark/studies/speed.py"
# where the time goes, then the two switches that cost nothing to try
part 60 phases $speed atari-ppo --cuda --phases --blocks 8
part 60 phases-not-deterministic $speed atari-ppo --cuda --phases --blocks 8 --more=--no-torch-deterministic
part 60 phases-eight-threads $speed atari-ppo --cuda --phases --blocks 8 --more='--num-threads 8'
part 90 phases-compile $speed atari-ppo --cuda --phases --blocks 8 --more=--compile
# equal numbers with and without --compile, on the GPU
part 120 equal env CUDA_VISIBLE_DEVICES=0 "$python" -m pytest tests/test_faster_steps.py tests/test_update.py -k compiled -n 0 -q
# side by side with Stable-Baselines3, A B A B
part 170 atari-ppo $speed atari-ppo --cuda --rounds 2 --blocks 8
part 130 atari-a2c $speed atari-a2c --cuda --rounds 2 --blocks 6
cp benchmark/results/speed/*-gpu* "$out"/
