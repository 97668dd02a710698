#!/usr/bin/env bash
# Installs LibTorch with CUDA from PyPI's wheels, checked against the sums in libtorch.txt, and prints the
# environment in which `--features switchyard-cli/libtorch` builds. No Python code of it is ever run.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: install-libtorch.sh [DIRECTORY]

Installs into DIRECTORY (target/libtorch of this repository without one; about 4 GB), unless it is there
already, and prints what to export:

  eval "$(launch/install-libtorch.sh)"
  cargo build --release --features switchyard-cli/libtorch

Needs python3 with pip, and PyPI or a mirror that pip is configured for.
TEXT
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; exit 1 ;;
esac

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
directory="${1:-$here/../target/libtorch}"
wanted="$(sha256sum <"$here/libtorch.txt")"

if [ "$(cat "$directory/installed" 2>/dev/null || true)" != "$wanted" ]; then
  if ! python3 -m pip --version >/dev/null 2>&1; then
    echo "error: python3 with pip is needed to fetch the wheels (Debian, Ubuntu: apt-get install python3-pip)" >&2
    exit 1
  fi
  mkdir -p "$directory"
  platforms=()
  for version in 2_28 2_27 2_25 2_18 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${version}_x86_64"); done
  for name in manylinux2014 manylinux2010 manylinux1; do platforms+=(--platform "${name}_x86_64"); done
  echo "installing LibTorch into $directory" >&2
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile --upgrade \
    --only-binary=:all: --require-hashes --implementation cp --python-version 3.11 "${platforms[@]}" \
    --target "$directory" --requirement "$here/libtorch.txt" >&2
  echo "$wanted" >"$directory/installed"
fi

echo "export LIBTORCH='$(cd "$directory" && pwd)/torch'"
