#!/usr/bin/env bash
# Installs hpcssl into .venv of this checkout (or $HPCSSL_VENV): `bash tools/install.sh [extras]`, for example `dev`.
# Done once for every change of setup.py; needs Python 3.10 to 3.13 (or $PYTHON) and, where venv or pip is missing, apt as root.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${HPCSSL_VENV:-$root/.venv}
extras=${1:-}

say() { echo "[install] $*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  say "error: no Python 3.10 to 3.13 found; install one, or name it: PYTHON=/path/to/python bash $0"
  return 2
}

make_venv() {
  local python=$1 new=1
  [ -e "$venv" ] && new=0
  if ! "$python" -m venv "$venv" 2>/dev/null; then
    [ $new = 0 ] || rm -rf "$venv"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      say "python3-venv is missing: installing it"
      apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
      "$python" -m venv "$venv"
    else
      say "error: $python has no venv; on Debian: apt install python3-venv"
      return 2
    fi
  fi
}

stamp=$venv/.hpcssl-installed
wanted="$(sha256sum "$root/setup.py" | cut -d' ' -f1) $extras $root"
have=$(cat "$stamp" 2>/dev/null || true)
if [ "$have" = "$wanted" ] || { [ -z "$extras" ] && [ "$have" = "${wanted%% *} dev $root" ]; }; then exit 0; fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # none yet, or one that was interrupted
  python=$(find_python) || exit 2
  make_venv "$python"
fi
say "installing into $venv (PyTorch is large: the first time takes some minutes)"
log=$venv/install.log
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >>"$log" 2>&1; }
if ! { pip --upgrade pip setuptools wheel && pip --editable "$root${extras:+[$extras]}"; }; then
  tail -n 5 "$log" >&2
  say "error: the installation failed; all of it is in $log"
  exit 1
fi
echo "$wanted" >"$stamp"
