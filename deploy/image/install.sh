#!/bin/sh
# Install into /app: from the wheels in /wheels if there are any, else from the package index that pip knows.
set -eu
if ls /wheels/*.whl >/dev/null 2>&1; then
  export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
fi
# As root on purpose, and in an environment without a pip of its own.
exec python3 -m pip --python /app/bin/python install \
  --no-cache-dir --disable-pip-version-check --root-user-action=ignore --only-binary=:all: "$@"
