#!/usr/bin/env bash
# Packs the wheels that a machine with PyTorch, transformers and Lightning, but no network, still lacks, and prints what to
# run there:
#
#     benchmarks/pack_for_gpu.sh [FOLDER]         .whl by default, which git ignores
#
# Versions are those of the locks. PYTHON_THERE=3.12 and PLATFORM_THERE=x86_64 describe the machine; EXTRA="wandb" names
# further packages, each with its own requirements.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-.whl}
PYTHON=${PYTHON:-python3}
NAMES="hydra-core omegaconf pydantic pydantic_core annotated-types typing-inspection gguf nltk defusedxml typer ${EXTRA:-}"

version() { # NAME: the name with its version in the locks, or the name alone
  grep -ihm1 "^$1==" requirements.lock requirements-dev.lock | head -1 | cut -d' ' -f1 | grep . || echo "$1"
}

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_${PLATFORM_THERE:-x86_64}")
done
wanted=()
for name in $NAMES; do wanted+=("$(version "$name")"); done
mkdir -p "$FOLDER"
rm -f "$FOLDER"/*.whl
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON_THERE:-3.12}" --implementation cp \
  "${platforms[@]}" -d "$FOLDER" "${wanted[@]}"
# It is published as a source only; the wheel is pure Python.
"$PYTHON" -m pip wheel -q --no-deps -w "$FOLDER" "$(version antlr4-python3-runtime)"
du -sh "$FOLDER"
cat <<END
With this folder and $FOLDER there, run:

WHEELS=$FOLDER PACK=/tmp/found.tar.gz benchmarks/on_gpu.sh /tmp/found
END
