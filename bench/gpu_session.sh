#!/bin/bash
# What only a GPU shows, within a budget of seconds, the most telling first: tests of every family and kernel, then the
# ratios of docs/engine.md (native against static batches, the guard, int8 against exact, Llama 3.1's DPO against Qwen2's).
#
#   bash bench/gpu_session.sh SECONDS FOLDER [STEP ...]         PYTHON=python3   GPU_CAP=1 (scale of the memory caps)
#
# Every step has a timeout and none fails the rest. FOLDER gets two files, written anew behind each step: session.json
# (each step's result, seconds, exit code, and what else used the card before it) and session.log (what they printed).
# Weights are random and made on the card; nothing is downloaded. Needs torch, transformers, bitsandbytes, triton, peft,
# trl, datasets, accelerate, pytest and what the package itself imports (pyproject.toml); no Unsloth. At most 50 GB of
# the card are taken.
set -u
BUDGET=${1:?seconds} FOLDER=${2:?folder}
shift 2
PYTHON=${PYTHON:-python3} SMALL=${GPU_SESSION_SMALL:-}
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$FOLDER" && FOLDER=$(cd "$FOLDER" && pwd) || exit 2
PARTS=$(mktemp -d) BEGAN=$SECONDS
trap 'rm -rf "$PARTS"' EXIT
: >"$FOLDER/session.log"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

others() { nvidia-smi --query-gpu=name,memory.used,utilization.gpu --format=csv,noheader 2>/dev/null || echo "no GPU"; }

# merge: all parts into session.json
merge() {
  "$PYTHON" - "$PARTS" "$FOLDER/session.json" <<'PY'
import json, pathlib, sys, xml.etree.ElementTree as tree
parts, found = pathlib.Path(sys.argv[1]), {}
for line in (parts / "steps").read_text().splitlines():
    name, rc, seconds, before = line.split("\t")
    found[name] = {"rc": int(rc), "seconds": int(seconds), "card_before": before}
    path = parts / f"{name}.json"
    try:
        found[name]["result"] = json.loads(path.read_text())
    except (OSError, ValueError):
        found[name]["result"] = None
    if name == "tests" and (parts / "tests.xml").exists():
        suite = tree.parse(parts / "tests.xml").getroot().find("testsuite")
        found[name]["result"] = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
pathlib.Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")
PY
}

# step NAME SECONDS COMMAND...: its result goes to $PARTS/NAME.json, which the command names as RESULT
step() {
  local name=$1 most=$2 left before began rc
  shift 2
  if [ -n "$WANTED" ] && ! [[ " $WANTED " == *" $name "* ]]; then return; fi
  left=$((BUDGET - (SECONDS - BEGAN)))
  before=$(others | head -1)
  if [ "$left" -lt 20 ]; then
    printf '%s\t%s\t%s\t%s\n' "$name" -1 0 "$before" >>"$PARTS/steps"
    echo "== $name: skipped, $left s are left" | tee -a "$FOLDER/session.log"
    merge
    return
  fi
  [ "$most" -gt "$left" ] && most=$left
  began=$SECONDS
  echo "== $name: at most $most s; the card before: $before" | tee -a "$FOLDER/session.log"
  timeout -k 5 "$most" "${@//RESULT/$PARTS/$name.json}" >"$PARTS/$name.log" 2>&1
  rc=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$rc" "$((SECONDS - began))" "$before" >>"$PARTS/steps"
  cat "$PARTS/$name.log" >>"$FOLDER/session.log"
  echo "== $name: exit $rc after $((SECONDS - began)) s" | tee -a "$FOLDER/session.log"
  tail -n 6 "$PARTS/$name.log" | cut -c1-400
  merge
}

WANTED="$*" SHAPE_14B=qwen3-14b SHAPE_OLMO=olmo2-32b GUARD=guard WIDE=qwen2-32b LLAMA=llama31-32b
LAYERS=16 ROWS=96 EXCHANGES=2000 PER_STAGE=768 SCALE=1.0 PAIR="--tokens 1160 --prompt 200 --steps 10 --rows 32"
if [ -n "$SMALL" ]; then # a dry run of every line on a CPU
  SHAPE_14B=tiny SHAPE_OLMO=tiny-olmo2 GUARD=tiny-guard WIDE=tiny LLAMA=tiny-llama31 LAYERS=2 ROWS=3 EXCHANGES=4 PER_STAGE=6
  SCALE=0.03 PAIR="--tokens 100 --prompt 20 --steps 3 --rows 4 --cpu"
fi
PARALLEL=""
"$PYTHON" -c "import xdist" 2>/dev/null && [ -z "$SMALL" ] && PARALLEL="-n 8 --dist worksteal"
STAGES=instructions+answers+critiques+revisions

TESTS="$PYTHON -m pytest -m '' -rfE --durations=5 --junitxml $PARTS/tests.xml tests/gpu/test_engine_families_gpu.py \
  tests/gpu/test_frozen_gpu.py tests/engine/test_engine_kernel_cases.py tests/engine/test_engine_attention_cases.py"

# pytest's 3 and 4: its plugins do not fit together
step tests 140 bash -c "$TESTS $PARALLEL; rc=\$?; [ -n '$PARALLEL' ] && [[ \$rc = [34] ]] && exec $TESTS; exit \$rc"
step qwen3 90 "$PYTHON" bench/families.py $SHAPE_14B --rows $ROWS --layers $LAYERS --scale $SCALE --cap-gb 50 --out RESULT
step guard 90 "$PYTHON" bench/families.py $GUARD --rows $EXCHANGES --scale $SCALE --cap-gb 40 --out RESULT
step exact 130 "$PYTHON" bench/generate.py made:$WIDE/$LAYERS --mix --scale $SCALE --steps --out RESULT \
  --run native@25:$PER_STAGE/$STAGES
step int8 130 "$PYTHON" bench/generate.py made:$WIDE/$LAYERS --mix --scale $SCALE --steps --out RESULT \
  --run native-int8@25:$PER_STAGE/$STAGES
for kind in llama31 qwen2; do
  shape=$WIDE && [ $kind = llama31 ] && shape=$LLAMA
  step dpo-$kind 70 "$PYTHON" bench/dpo.py made:$shape/$LAYERS --variants ours --saving --cap-gb 40 --out RESULT $PAIR
done
step olmo2 100 "$PYTHON" bench/families.py $SHAPE_OLMO --rows $ROWS --layers $LAYERS --scale $SCALE --cap-gb 50 --out RESULT

"$PYTHON" bench/gpu_bars.py "$FOLDER/session.json" 2>&1 | tee -a "$FOLDER/session.log"
exit 0
