#!/usr/bin/env bash
# Installs into .venv and runs linters, types and tests: `bash tools/test.sh [--full] [pytest arguments]`.
# --full adds the long tests: random kills, SLURM, the README's own commands, a whole demo; `-m fast` is for every push.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
markers="not long and not slurm" processes=2
if [ "${1:-}" = --full ]; then
  markers="" processes=3 # for two cores: a SLURM waits more than it computes
  shift
fi
bash tools/install.sh dev
bin=${HPCSSL_VENV:-$root/.venv}/bin
export OMP_NUM_THREADS=1 # bitwise promises are made for one thread
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest -m "$markers" -n "$processes" --durations=10 "$@"
