# Sourced by setup_*.sh: an environment apart from .venv. Needs $folder, and $want: a digest of what it is made from.
# Ends the script where the folder was made from the same; else leaves it with a Python (PYTHON=... chooses which) and `pip`.
# shellcheck shell=bash disable=SC2154
ready=$folder/.ready
[ -f "$ready" ] && [ "$(cat "$ready")" = "$want" ] && exit 0
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' ||
  { echo "$(basename "$0" .sh): needs Python 3.10, 3.11 or 3.12; set PYTHON=..." >&2; exit 2; }
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
