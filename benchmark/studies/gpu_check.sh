#!/usr/bin/env bash
# All that docs/speed.md wants of a GPU, in at most nine minutes: bash benchmark/studies/gpu_check.sh FOLDER
# Each part has its own limit and may fail alone. The results of this run are copied to FOLDER.
set -u
out=$(realpath -m "${1:?a folder for the results}")
cd "$(dirname "$0")/../.."
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
part 30 phases $speed atari-ppo --cuda --phases --blocks 4
part 30 phases-not-deterministic $speed atari-ppo --cuda --phases --blocks 4 --more=--no-torch-deterministic
part 30 phases-eight-threads $speed atari-ppo --cuda --phases --blocks 4 --more='--num-threads 8'
part 60 phases-compile $speed atari-ppo --cuda --phases --blocks 4 --more=--compile
# equal numbers with and without --compile, on the GPU
part 90 equal env CUDA_VISIBLE_DEVICES=0 "$python" -m pytest tests/test_update.py -k "compiled and cuda" -n 0 -q
# side by side with Stable-Baselines3, A B A B
part 160 atari-ppo $speed atari-ppo --cuda --rounds 2 --blocks 4
part 140 atari-a2c $speed atari-a2c --cuda --rounds 2 --blocks 4
find benchmark/results/speed -newer "$out/gpu.csv" -type f -exec cp {} "$out" \;
