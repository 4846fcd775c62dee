#!/usr/bin/env bash
# Runs the benchmarks of a machine with a GPU. The arguments name the parts to run:
#
#   benchmarks/accelerator.sh [--smoke] PART...
#
#   compile  the GPU as XLA describes it, and the estimate of tools.compile for it beside the measured
#            time of the training step, with the last stem and the first batch: $OUT/target_config.pbtxt,
#            $OUT/compile.{json,txt}. Calls without --smoke begin with it until there is a result
#   compare  step_time for each of STEMS and BATCHES, bfloat16, alongside PyTorch (torch.compile,
#            channels_last, autocast): $OUT/step_STEM_BATCH.{json,txt}
#   profile  trace of the step with the first stem and the last batch: $OUT/profile.{json,txt}, $OUT/trace
#   train    the flagship run, experiments/tiny.py, in $WORKDIR. Stops after $LIMIT seconds and resumes
#            when called again; copies metrics, result and plots to $OUT/train
#   export   the weights of $WORKDIR in bfloat16: $OUT/weights.safetensors
#   ablate   the variants of benchmarks/ablations/tiny.toml in $ABLATION, or only those named in
#            $VARIANTS. Finished ones are not trained again; stops after $LIMIT seconds:
#            $OUT/ablation.{json,txt}
#
# --smoke: the same on the CPU with tiny sizes, in a few minutes, to test the script.
#
# Environment variables and their defaults: OUT=runs/accelerator, PYTHON=python3, PYTHON_TORCH=$PYTHON,
# STEMS="s16 s32", BATCHES="512 1024", CONTENDERS="ours torch torch-compile", ROUNDS=5,
# WORKDIR=runs/tiny, LIMIT=0 (none), TRAIN_FLAGS="" (additional flags of the training command, such as
# --config.data.directory=DATA --config.data.source=tiny-imagenet-200.zip), ABLATION=runs/ablation,
# VARIANTS="" (all), SETTINGS="" (settings of all variants, such as data.directory=DATA).
#
# `compile` takes about 5 minutes, each stem and batch of `compare` about 3, mostly for compilation.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
}

smoke=
parts=()
for argument in "$@"; do
  case "$argument" in
    --help | -h) usage; exit 0 ;;
    --smoke) smoke=yes ;;
    compile | compare | profile | train | export | ablate) parts+=("$argument") ;;
    *) echo "$argument: must be compile, compare, profile, train, export, ablate or --smoke; see --help" >&2; exit 2 ;;
  esac
done
if [ "${#parts[@]}" -eq 0 ]; then
  usage >&2
  exit 2
fi

PYTHON=${PYTHON:-python3}
PYTHON_TORCH=${PYTHON_TORCH:-$PYTHON}
OUT=${OUT:-runs/accelerator}
ROUNDS=${ROUNDS:-5}
LIMIT=${LIMIT:-0}
if [ -n "$smoke" ]; then
  platform=cpu
  step=(--matmul-size 256 --image-size 32)
  STEMS=${STEMS:-s16}
  BATCHES=${BATCHES:-8}
  CONTENDERS=${CONTENDERS:-ours torch}
  compare=(--rounds 2 --seconds 0.2)
  WORKDIR=${WORKDIR:-runs/smoke}
  train=(--config experiments/digits.py)
  plan=benchmarks/ablations/digits.toml
  ABLATION=${ABLATION:-runs/smoke_ablation}
else
  platform=gpu
  step=(--matmul-size 8192)
  STEMS=${STEMS:-s16 s32}
  BATCHES=${BATCHES:-512 1024}
  CONTENDERS=${CONTENDERS:-ours torch torch-compile}
  compare=(--rounds "$ROUNDS" --seconds 2)
  WORKDIR=${WORKDIR:-runs/tiny}
  train=(--config experiments/tiny.py)
  plan=benchmarks/ablations/tiny.toml
  ABLATION=${ABLATION:-runs/ablation}
fi
mkdir -p "$OUT"

compile() {
  "$PYTHON" -m benchmarks.estimates --platform "$platform" --stem "${STEMS##* }" \
    --batch-size "${BATCHES%% *}" --dtype bfloat16 --target-config "$OUT/target_config.pbtxt" \
    --json "$OUT/compile.json" "${step[@]}" "${compare[@]}" | tee "$OUT/compile.txt"
}

# Word splitting of the lists is intended.
# shellcheck disable=SC2086
compare() {
  local stem batch
  for stem in $STEMS; do
    for batch in $BATCHES; do
      "$PYTHON" -m benchmarks.step_time --platform "$platform" --stem "$stem" \
        --batch-size "$batch" --dtypes bfloat16 --contenders $CONTENDERS \
        --python-torch "$PYTHON_TORCH" --json "$OUT/step_${stem}_$batch.json" \
        "${step[@]}" "${compare[@]}" | tee "$OUT/step_${stem}_$batch.txt"
    done
  done
}

profile() {
  "$PYTHON" -m benchmarks.profile_step --platform "$platform" --stem "${STEMS%% *}" \
    --batch-size "${BATCHES##* }" --dtype bfloat16 --trace "$OUT/trace" \
    --json "$OUT/profile.json" "${step[@]}" | tee "$OUT/profile.txt"
}

# Exit code 124: stopped at the limit by timeout; 75: stopped otherwise. Both have saved.
# shellcheck disable=SC2086
train() {
  local code=0 file
  timeout --signal=INT "$LIMIT" "$PYTHON" -m inception_jax.main "${train[@]}" \
    --workdir "$WORKDIR" --platform="$platform" ${TRAIN_FLAGS:-} || code=$?
  mkdir -p "$OUT/train"
  for file in metrics.jsonl result.json config.json plots; do
    if [ -e "$WORKDIR/$file" ]; then
      cp -r "$WORKDIR/$file" "$OUT/train/"
    fi
  done
  if [ "$code" -eq 124 ] || [ "$code" -eq 75 ]; then
    echo "train: stopped and saved; rerun the same command to resume" >&2
  elif [ "$code" -ne 0 ]; then
    return "$code"
  fi
}

export_weights() {
  "$PYTHON" -m inception_jax.tools.export --to=savedweights --workdir "$WORKDIR" --checkpoint=last \
    --dtype=bfloat16 --output "$OUT/weights.safetensors"
}

# shellcheck disable=SC2086
ablate() {
  timeout --signal=INT "$LIMIT" "$PYTHON" -m benchmarks.ablation "$plan" --output "$ABLATION" \
    --platform "$platform" --json "$OUT/ablation.json" \
    ${VARIANTS:+--only $VARIANTS} ${SETTINGS:+--set $SETTINGS} | tee "$OUT/ablation.txt"
}

if [ -z "$smoke" ] && [ ! -e "$OUT/compile.json" ] && [[ " ${parts[*]} " != *" compile "* ]]; then
  echo "=== compile"
  compile || echo "compile: failed; continuing with the other parts" >&2
fi

for part in "${parts[@]}"; do
  echo "=== $part"
  case "$part" in
    export) export_weights ;;
    *) "$part" ;;
  esac
done
