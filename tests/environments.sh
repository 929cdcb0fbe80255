#!/usr/bin/env bash
# The numeric and the ledger tests in every numeric environment that a processor of today can present: one line each.
# Arguments name some environments, such as MKL_CBWR=AVX2. PYTEST_ARGS chooses other tests; WHOLE=1 runs the whole suite
# in each; AT_ONCE=N runs N environments at once, each in one process.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
NUMERIC="tests/test_ledger.py tests/test_edit_run.py tests/test_guards.py tests/test_restraint.py tests/test_rect.py
  tests/test_spectral.py tests/test_identities.py tests/test_values.py tests/test_packing.py tests/test_lora.py
  tests/test_fine_tuning.py tests/test_reference_editors.py"
if [ -n "${WHOLE:-}" ]; then NUMERIC=""; fi
ENVIRONMENTS=(
  "-u MKL_CBWR"
  "MKL_CBWR=COMPATIBLE"
  "MKL_CBWR=AVX2"
  "MKL_CBWR=AVX512"
  "ATEN_CPU_CAPABILITY=default"
  "ATEN_CPU_CAPABILITY=avx2"
  "ONEDNN_MAX_CPU_ISA=AVX2"
  "OMP_NUM_THREADS=2"
  "OMP_NUM_THREADS=4"
)
[ $# -eq 0 ] || ENVIRONMENTS=("$@")
at_once=${AT_ONCE:-1}
if [ "$at_once" -gt 1 ]; then workers=0; else workers=2; fi

run() {
  local environment=$1 log start=$SECONDS status
  log=$(mktemp)
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=1 env $environment "$PYTHON" -m pytest -n $workers --dist worksteal -p no:warnings \
    -p no:cacheprovider ${PYTEST_ARGS:-$NUMERIC} >"$log" 2>&1
  status=$?
  [ $status -eq 0 ] || grep -E "^(FAILED|ERROR|E  )" "$log" | head -20
  printf '%-40s %s, %d s\n' "$environment" "$(tail -1 "$log" | sed -E 's/ in [0-9.]+s.*//')" $((SECONDS - start))
  rm -f "$log"
  return $status
}

failed=0
for environment in "${ENVIRONMENTS[@]}"; do
  if [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; then wait -n || failed=1; fi
  if [ "$at_once" -gt 1 ]; then run "$environment" & else run "$environment" || failed=1; fi
done
for job in $(jobs -p); do wait "$job" || failed=1; done
exit $failed
