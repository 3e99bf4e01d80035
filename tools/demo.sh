#!/usr/bin/env bash
# From a bare machine with Python to a benchmark report: installs into .venv and runs `hpcssl demo` with the arguments given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/install.sh"
exec "${HPCSSL_VENV:-$root/.venv}/bin/hpcssl" demo "$@"
