#!/bin/sh
# Proves bnbops on this machine's GPU, and writes a report: ./run.sh --help. Needs python3 (or PYTHON) with torch and numpy.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 4
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "$python is no Python 3.10 or later: install one, or name it: PYTHON=/path/to/python3 $0" >&2
  exit 4
fi
PYTHONPATH="$here/tests${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -B -m gpu_bundle "$@"
