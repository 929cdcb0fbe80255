#!/usr/bin/env bash
# Every restraint around every editor, some runs at once on one device, and the table and figure of what is complete:
#
#     benchmarks/study.sh FOLDER OVERRIDE...        METHODS="rome memit" RESTRAINTS="none prune" AT_ONCE=5
#
# `make restraints` does the same one run after another, and resumes.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?usage: benchmarks/study.sh FOLDER OVERRIDE...}
shift
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$OUT"

run() { # METHOD RESTRAINT OVERRIDE...
  local folder="$OUT/$1-$2-0" start=$SECONDS
  "$PYTHON" train.py experiment=restraints resume=null ledger=false progress=false "method=$1" "restraint=$2" "${@:3}" \
    "hydra.run.dir=$folder" >"$OUT/$1-$2.log" 2>&1
  printf '%-12s %-16s exit %s %4d s\n' "$1" "$2" $? $((SECONDS - start))
}

for method in ${METHODS:-rome r_rome memit alphaedit ft_m}; do
  for restraint in ${RESTRAINTS:-none prune rect}; do
    while [ "$(jobs -rp | wc -l)" -ge "${AT_ONCE:-5}" ]; do wait -n; done
    run "$method" "$restraint" "$@" &
  done
done
wait
"$PYTHON" -m prune_lightning.report.compare "$OUT"/*-*-0 --out "$OUT"
