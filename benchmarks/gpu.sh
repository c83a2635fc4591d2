#!/usr/bin/env bash
# Speed and correctness on one GPU (made for an H200) in one call of at most nine minutes, without a network:
#
#     bash benchmarks/gpu.sh                              every part; figures to docs/benchmarks-h200.json as they come
#     bash benchmarks/gpu.sh --only train,sample-1        some parts; --list names them
#     bash benchmarks/gpu.sh --rehearse                   tiny sizes on the CPU, every part, two and a half minutes; figures to a scratch file
#     bash benchmarks/gpu.sh --out FILE --minutes 9 --remat full,attention_out      the remat policies that train steps take
#
# The machine has Python 3.12, jax with CUDA (jax[cuda13], 0.10.2 to 0.12), PyTorch with CUDA, and a C compiler, which torch.compile needs.
# What else is missing comes as wheels in a folder that PIXART_WHEELS names; they are installed into a temporary folder, without dependencies.
# From requirements.txt: flax, optax, orbax-checkpoint, grain, array_record, tensorflow-datasets, qwix, transformers (5), safetensors,
# sentencepiece, tensorboardX, tyro, tqdm, Pillow, numpy, scipy, ml_dtypes, matplotlib, pyarrow, beautifulsoup4, ftfy, ImageHash, textblob,
# importlib_resources; and diffusers (0.42). `python benchmarks/gpu_check.py` says the first that is missing. To fill the folder elsewhere:
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d WHEELS diffusers==0.42.1 flax …
#
# Parts, the most important first. Each has a time limit of its own and never more than what is left of the whole; a part that fails, or for
# which no time is left, is recorded and leaves the others alone. Exit status 1 if there was one. `python -m benchmarks.speed.table FILE`
# prints the tables. Random weights, 2.4 GB a model, are written to $PIXART_JAX_CACHE by the first part, or an earlier call.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=docs/benchmarks-h200.json ONLY="" MINUTES=9 REMAT=full,attention_out REHEARSE="" LIST=""
while [ $# -gt 0 ]; do
  case "$1" in
    --rehearse) REHEARSE=1 ;;
    --list) LIST=1 ;;
    --out | --only | --minutes | --remat)
      [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      case "$1" in --out) OUT="$2" ;; --only) ONLY="$2" ;; --minutes) MINUTES="$2" ;; --remat) REMAT="$2" ;; esac
      shift ;;
    *) echo "error: $1 is unknown: --rehearse, --only PARTS, --list, --out FILE, --minutes N, --remat NAMES" >&2; exit 2 ;;
  esac
  shift
done

PARTS="weights train sample-1 check draw sample-16 largest fused"
if [ -n "$LIST" ]; then echo "$PARTS" | tr ' ' '\n'; exit 0; fi
for name in ${ONLY//,/ }; do
  case " $PARTS " in *" $name "*) ;; *) echo "error: no part $name: --list names them" >&2; exit 2 ;; esac
done
SCRATCH=$(mktemp -d) || exit 1
trap 'rm -rf "$SCRATCH"' EXIT
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error
if [ -n "${PIXART_WHEELS:-}" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SCRATCH/site" "$PIXART_WHEELS"/*.whl || exit 1
  export PYTHONPATH="$SCRATCH/site:$PYTHONPATH"
fi
if [ -n "$REHEARSE" ]; then
  export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
  [ "$OUT" != docs/benchmarks-h200.json ] || OUT="$SCRATCH/rehearsal.json"
  MODEL=tiny TRAIN=(--px 32ms --batch 2) ONE=(--px 32 --batch 1 --steps 3) MANY=(--px 32 --batch 2 --steps 3)
  DRAW=(--px 64 --steps 3) LARGEST=(--px 32 --batch 2 --memory 0.004) CHECK=(--tiny)
  FUSED=(--work train --px 32 --batch 2 --repeat 2)
  COMMON=(--keep --repeat 2 --peer-backend eager --compile-cache "${JAX_COMPILATION_CACHE_DIR:-$SCRATCH}/rehearsal")
else
  MODEL=XL/2 TRAIN=(--px 256,512,1024ms --batch 32) ONE=(--px 512,1024ms --batch 1) MANY=(--px 512,1024ms --batch 16)
  DRAW=(--px 1024ms) LARGEST=(--px 256,512,1024ms --batch 64) CHECK=()
  FUSED=(--work train,sample --px 256 --batch 32 --dtype bfloat16)
  COMMON=(--keep)
fi
COMMON+=(--model "$MODEL" --json "$OUT")
END=$((SECONDS + MINUTES * 60))
FAILED=0

part() { # NAME, SECONDS at most, COMMAND …
  local name=$1 most=$2 begun=$SECONDS left=$((END - SECONDS)) status
  shift 2
  case ",$ONLY," in ",,") ;; *",$name,"*) ;; *) return ;; esac
  [ "$left" -lt "$most" ] || [ -n "$REHEARSE" ] && most=$left # a rehearsal's machine may be a busy one
  if [ "$most" -lt 5 ]; then
    status="no time left"
  else
    echo "== $name, at most $most s" >&2
    timeout --kill-after=5 "$most" "$@"
    case $? in 0) status=done ;; 124 | 137) status="over its time of $most s" ;; *) status=failed ;; esac
  fi
  [ "$status" = done ] || FAILED=1
  echo "== $name: $status, $((SECONDS - begun)) s" >&2
  "$PYTHON" -m benchmarks.speed.record "$OUT" "$name" "$status" "$((SECONDS - begun))" || FAILED=1
}

part weights 90 "$PYTHON" -m benchmarks.speed.weights "$MODEL" plain multi-scale
# Blocks are compiled one for all where the GPU is busy with large batches: the same kernels, and less of the nine minutes.
part train 200 "$PYTHON" benchmarks/train_step.py "${COMMON[@]}" "${TRAIN[@]}" --remat "$REMAT" --peer-compile blocks --budget 12
part sample-1 150 "$PYTHON" benchmarks/sample.py "${COMMON[@]}" "${ONE[@]}" --peer-compile whole --budget 8
part check 60 "$PYTHON" benchmarks/gpu_check.py --json "$OUT" ${CHECK[@]+"${CHECK[@]}"}
part draw 120 "$PYTHON" benchmarks/sample.py "${COMMON[@]}" "${DRAW[@]}" --draw --peer-compile whole --budget 8
part sample-16 150 "$PYTHON" benchmarks/sample.py "${COMMON[@]}" "${MANY[@]}" --peer-compile blocks --budget 15
part largest 240 "$PYTHON" benchmarks/train_step.py "${COMMON[@]}" "${LARGEST[@]}" --largest-batch --peer-compile blocks --budget 8
part fused 120 "$PYTHON" benchmarks/fused_projections.py --model "$MODEL" --json "$OUT" "${FUSED[@]}" --ways 1,3

"$PYTHON" -m benchmarks.speed.table "$OUT"
exit "$FAILED"
