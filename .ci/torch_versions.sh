#!/usr/bin/env bash
# Runs the tests with other versions of torch, each in a virtual environment of its own:
#
#     .ci/torch_versions.sh 2.10.0 2.14.1
#
# It ends with a line for each version. The exit status is the number of versions that failed. ARGS
# are pytest's arguments, PYTHON is the Python to use.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  sed -n '2,7s/^# \?//p' "$0"
  exit 2
fi
failed=0 lines=""
for version in "$@"; do
  log="$(mktemp)"
  if make test TORCH="$version" VENV=".venv-torch-$version" 2>&1 | tee "$log"; then
    ended="passed"
  else
    ended="FAILED" failed=$((failed + 1))
  fi
  lines+="torch $version: $ended; $(grep -E 'passed|failed' "$log" | tail -n 1)"$'\n'
  rm "$log"
done
printf '\n%s' "$lines"
exit "$failed"
