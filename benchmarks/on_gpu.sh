#!/usr/bin/env bash
# Everything that is worth knowing of a GPU, in one command of less than nine minutes:
#
#     benchmarks/on_gpu.sh FOLDER             PARTS="a b" chooses parts, SECONDS_a=90 another limit of one
#
# Each part has its own time limit, all of them together SECONDS_all, and writes FOLDER/PART.json, or a log, as soon as it has something; one that fails
# does not stop the others. Without a GPU, or with TOY=1, every part runs at toy size on the CPU.
#   a  the tests marked `gpu`                  b  the main job, and SmolLM2 where SMOLLM2 names its GGUF
#   c  restraint and editing at 8B shape       d  thousands of edits at 7B shape, by METHODS_d in turn
#   f  the restraint against full decompositions on the device, which take most of that part's time
#   g  METHODS_g x RESTRAINTS_g on SmolLM2 (SMOLLM2), AT_ONCE_g runs at once; WORDS_g are further overrides
#   e  numeric tests (PYTEST_ARGS) in every numeric environment of this processor, beside the others on ASIDE cores
# PACK=FILE.tar.gz holds all that is there after each part, for places that hand back few files. Where Hydra is missing,
# the wheels of benchmarks/pack_for_gpu.sh in WHEELS, .whl by default, are installed into a folder of their own.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:?usage: benchmarks/on_gpu.sh FOLDER}" && cd "$1" && pwd)
PYTHON=$(command -v "${PYTHON:-python3}")
PARTS=${PARTS:-a b c d f}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if ! "$PYTHON" -c "import hydra, omegaconf, pydantic" 2>/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${WHEELS:-.whl}"/*.whl ||
    { echo "hydra, omegaconf or pydantic is missing, and so are wheels of them: benchmarks/pack_for_gpu.sh"; exit 1; }
  export PYTHONPATH="$site:$PYTHONPATH"
fi
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || TOY=1
export TOY=${TOY:-}
failed=0 all=${SECONDS_all:-520}

part() { # NAME SECONDS COMMAND...: run a part, keep its output, and say how it went
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  if [ -n "$TOY" ]; then
    limit=600 # a busy machine is no reason to fail
  elif [ $((all - SECONDS)) -lt "$limit" ]; then
    limit=$((all - SECONDS))
    [ "$limit" -gt 0 ] || { echo "$name left out: the $all s are over"; failed=1; return; }
  fi
  timeout --signal="${STOP:-TERM}" --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  [ $status -eq 124 ] && echo "stopped at its limit of $limit s" >>"$OUT/$name.log"
  [ $status -eq 0 ] || { failed=1; tail -n "${TAIL:-12}" "$OUT/$name.log"; }
  pack
  printf '%-12s exit %-3s %4d s   %s\n' "$name" $status $((SECONDS - start)) "$(tail -1 "$OUT/$name.log" | cut -c1-150)"
}

pack() {
  [ -z "${PACK:-}" ] || { tar -C "$OUT" -czf "$PACK.part" . && mv "$PACK.part" "$PACK"; }
}

choose() { # ON_A_GPU AT_TOY_SIZE: the arguments for this machine
  if [ -n "$TOY" ]; then echo "$2"; else echo "$1"; fi
}

environments() {
  PYTHON="$PYTHON" AT_ONCE=$aside timeout "${SECONDS_e:-420}" taskset -c "$((cores - aside))-$((cores - 1))" \
    tests/environments.sh >"$OUT/environments.log" 2>&1
}

"$PYTHON" benchmarks/machine.py >"$OUT/machine.json" && cat "$OUT/machine.json"
cores=$(nproc) aside=${ASIDE:-6}
[ "$aside" -lt "$cores" ] || aside=1
case " $PARTS " in *" e "*)
  environments & beside=$!
  [ "$cores" -eq 1 ] || taskset -cp "0-$((cores - aside - 1))" $$ >/dev/null # the others keep off its cores
  ;;
esac
for each in $PARTS; do
  case $each in
    a) STOP=INT PYTHONPATH="$PWD/tests:$PYTHONPATH" FAILURES_TO="$OUT/failures.txt" part tests "${SECONDS_a:-110}" \
         "$PYTHON" -m pytest tests/test_gpu.py -p failures -p no:cacheprovider $(choose "-m gpu" "") \
         -n "$(choose "${WORKERS:-12}" 0)" --dist worksteal --tb=short --show-capture=no -p no:warnings --junitxml="$OUT/tests.xml" ;;
    b) part job "${SECONDS_b:-45}" "$PYTHON" benchmarks/gpu_job.py --json "$OUT/job.json"
       if [ -n "${SMOLLM2:-}" ]; then
         part smollm2 "${SECONDS_smollm2:-60}" "$PYTHON" benchmarks/gpu_job.py --gguf "$SMOLLM2" \
           --json "$OUT/smollm2.json" -- ${WORDS_smollm2:-}
       else echo "smollm2      left out: SMOLLM2 names no GGUF"; fi ;;
    c) [ -n "${EDITING_ONLY:-}" ] || part restraint "${SECONDS_restraint:-40}" "$PYTHON" benchmarks/restraint.py \
         --json "$OUT/restraint.json" $(choose "--device cuda --shapes 14336x4096 --reference none" \
         "--shapes 320x80 --reference device")
       part editing "${SECONDS_editing:-115}" "$PYTHON" benchmarks/editing.py --json "$OUT/editing.json" \
         --methods ${METHODS_c:-memit ultraedit rome alphaedit} --requests 4 --plain 1 --graph --trace "$OUT/trace.json.gz" \
         $(choose "--shape llama-3-8b --dtype bfloat16 --device cuda --batch-sizes ${BATCHES:-1 32 256}" \
         "--shape toy --batch-sizes 1 2 4 --steps 3") ;;
    d) for method in ${METHODS_d:-ultraedit memit}; do
         [ -f "configs/method/$method.yaml" ] || continue
         part "stream_$method" "${SECONDS_d:-40}" "$PYTHON" benchmarks/gpu_stream.py --method "$method" \
           --json "$OUT/stream_$method.json" $(choose "--seconds ${SECONDS_edits:-25}" \
           "--shape toy --device cpu --dtype float32 --batch 4 --edits 12 --steps 3")
       done ;;
    e) ;;
    f) part restraint_f "${SECONDS_f:-65}" "$PYTHON" benchmarks/restraint.py --reference device \
         --json "$OUT/restraint_f.json" $(choose "--device cuda --shapes 6400x1600 14336x4096" "--shapes 320x80") ;;
    g) if [ -n "${SMOLLM2:-}$TOY" ]; then
         METHODS=${METHODS_g:-$(choose "" rome)} RESTRAINTS=${RESTRAINTS_g:-$(choose "" "none rect")} \
           AT_ONCE=${AT_ONCE_g:-$(choose 5 1)} PYTHON="$PYTHON" TAIL=60 part study "${SECONDS_g:-420}" \
           benchmarks/study.sh "$OUT/study" ${WORDS_g:-} \
           $(choose "model=smollm2 model.path=${SMOLLM2:-} trainer=gpu" "data.num_edits=2 evaluation=editing method.value.steps=2")
       else echo "study        left out: SMOLLM2 names no GGUF"; fi ;;
    *) echo "unknown part $each"; failed=1 ;;
  esac
done
if [ -n "${beside:-}" ]; then wait "$beside" || failed=1; cat "$OUT/environments.log"; fi
"$PYTHON" benchmarks/gpu_table.py "$OUT" | tee "$OUT/table.txt"
pack
exit $failed
