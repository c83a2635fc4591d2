#!/usr/bin/env bash
# Speed and correctness on one GPU (made for an H200), without a network, in two calls of at most nine minutes each:
#
#     bash benchmarks/gpu.sh --only weights,train,check,sample-1        figures go to docs/benchmarks-h200.json as they come
#     bash benchmarks/gpu.sh --only draw,sample-16,largest
#     bash benchmarks/gpu.sh --list                                     name the parts
#     bash benchmarks/gpu.sh --rehearse                                 every part at tiny sizes on the CPU; figures go to a scratch file
#     bash benchmarks/gpu.sh --out FILE --minutes 7.5 --remat full,attention_out      the remat policies of the train steps
#
# The machine has Python 3.12, jax with CUDA (jax[cuda13], 0.10.2 to 0.12), PyTorch with CUDA, and, for torch.compile, a C compiler and Python.h;
# without them the peer runs eager. Other packages come as wheels in the folder $PIXART_WHEELS and are installed into a temporary folder:
# those of requirements.txt and what they import (array_record, beautifulsoup4, defusedxml, dm-tree, docstring_parser, ftfy,
# googleapis-common-protos, grain, ImageHash, immutabledict, importlib_metadata, importlib_resources, lazy_importer, nltk, portpicker, promise,
# pywavelets, qwix, simple_parsing, soupsieve, tensorboardX, tensorflow-datasets, tensorflow-metadata, termcolor, textblob, toml, typeguard,
# tyro, wcwidth), and diffusers 0.42. `python benchmarks/gpu_check.py` names the first that is missing. To fill the folder elsewhere:
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d WHEELS diffusers==0.42.1 tyro …
#
# Each part gets its share of the time that is left. A part or a cell that fails is recorded, and the others go on; the exit status is then 1.
# `python -m benchmarks.speed.table FILE` prints the tables. The first part writes random weights, 2.4 GB a model, to $PIXART_JAX_CACHE.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

RECORD=docs/benchmarks-h200.json ONLY="" MINUTES=9 REMAT=full,attention_out REHEARSE=""
PARTS="weights train check sample-1 draw sample-16 largest"
usage() { echo "error: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --rehearse) REHEARSE=1 ;;
    --list) echo "$PARTS" | tr ' ' '\n'; exit 0 ;;
    --out | --only | --minutes | --remat)
      [ $# -gt 1 ] || usage "$1 needs a value"
      case "$1" in --out) RECORD="$2" ;; --only) ONLY="$2" ;; --minutes) MINUTES="$2" ;; --remat) REMAT="$2" ;; esac
      shift ;;
    *) usage "$1 is unknown: --rehearse, --only PARTS, --list, --out FILE, --minutes N, --remat NAMES" ;;
  esac
  shift
done
[[ $MINUTES =~ ^[0-9]+([.][0-9]+)?$ ]] || usage "--minutes $MINUTES: a number, 7.5 for example"
for name in ${ONLY//,/ }; do
  case " $PARTS " in *" $name "*) ;; *) usage "no part $name: --list names them" ;; esac
done

PYTHON=${PYTHON:-python3}
SCRATCH=$(mktemp -d) || exit 1
trap 'rm -rf "$SCRATCH"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error
if [ -n "${PIXART_WHEELS:-}" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SCRATCH/site" "$PIXART_WHEELS"/*.whl || exit 1
  export PYTHONPATH="$SCRATCH/site:$PYTHONPATH"
fi
if [ -n "$REHEARSE" ]; then
  export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
  [ "$RECORD" != docs/benchmarks-h200.json ] || RECORD="$SCRATCH/rehearsal.json"
  MODEL=tiny TRAIN=(--px 32ms --batch 2) ONE=(--px 32 --batch 1 --steps 3) MANY=(--px 32 --batch 2 --steps 3)
  DRAW=(--px 64 --steps 3) LARGEST=(--px 32 --batch 2 --memory 0.004) CHECK=(--tiny)
  COMMON=(--keep --repeat 2 --peer-backend eager --compile-cache "${JAX_COMPILATION_CACHE_DIR:-$SCRATCH}/rehearsal")
else
  MODEL=XL/2 TRAIN=(--px 256,512,1024ms --batch 32) ONE=(--px 512,1024ms --batch 1) MANY=(--px 512,1024ms --batch 16)
  DRAW=(--px 1024ms) LARGEST=(--px 256,512,1024ms --batch 64) CHECK=()
  COMMON=(--keep)
fi
COMMON+=(--model "$MODEL" --json "$RECORD")

chosen() { case ",$ONLY," in ",,") ;; *",$1,"*) ;; *) return 1 ;; esac; }
share() { # NAME: a part's share of the time, in seconds of a call of 540
  case $1 in weights) echo 110 ;; train) echo 200 ;; check) echo 60 ;; sample-1) echo 150 ;; draw) echo 120 ;; sample-16) echo 160 ;; *) echo 240 ;; esac
}
END=$((SECONDS + $("$PYTHON" -c "print(int(60 * $MINUTES))")))
SHARES=0 FAILED=0
for name in $PARTS; do chosen "$name" && SHARES=$((SHARES + $(share "$name"))); done

part() { # NAME, COMMAND …
  local name=$1 begun=$SECONDS limit status
  shift
  chosen "$name" || return
  limit=$(((END - SECONDS) * $(share "$name") / SHARES))
  SHARES=$((SHARES - $(share "$name")))
  [ -z "$REHEARSE" ] || limit=$((END - SECONDS)) # a busy machine may rehearse
  if [ "$limit" -lt 5 ]; then
    status="no time left"
  else
    echo "== $name, at most $limit s" >&2
    timeout --kill-after=5 "$limit" "$@"
    case $? in 0) status=done ;; 124 | 137) status="over its time of $limit s" ;; *) status=failed ;; esac
  fi
  [ "$status" = done ] || FAILED=1
  echo "== $name: $status, $((SECONDS - begun)) s" >&2
  "$PYTHON" -m benchmarks.speed.table "$RECORD" --part "$name" "$status" "$((SECONDS - begun))" || FAILED=1
}

part weights "$PYTHON" -m benchmarks.speed.weights "$MODEL" plain multi-scale
# With large batches the peer is compiled by blocks, one for all: the same kernels in less compile time.
part train "$PYTHON" benchmarks/train_step.py "${COMMON[@]}" "${TRAIN[@]}" --remat "$REMAT" --peer-compile blocks --budget 12
part check "$PYTHON" benchmarks/gpu_check.py --json "$RECORD" ${CHECK[@]+"${CHECK[@]}"}
part sample-1 "$PYTHON" benchmarks/sample.py "${COMMON[@]}" "${ONE[@]}" --peer-compile whole --budget 8
part draw "$PYTHON" benchmarks/sample.py "${COMMON[@]}" "${DRAW[@]}" --draw --peer-compile whole --budget 8
part sample-16 "$PYTHON" benchmarks/sample.py "${COMMON[@]}" "${MANY[@]}" --peer-compile blocks --budget 15
part largest "$PYTHON" benchmarks/train_step.py "${COMMON[@]}" "${LARGEST[@]}" --largest-batch --peer-compile blocks --budget 8

"$PYTHON" -m benchmarks.speed.table "$RECORD"
exit "$FAILED"
