#!/bin/sh
# Install into /app: from the wheels in /wheels if there are any, otherwise from the package index of pip.
set -eu
if ls /wheels/*.whl >/dev/null 2>&1; then
  export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
fi
# As root on purpose, and into an environment without its own pip.
exec python3 -m pip --python /app/bin/python install \
  --no-cache-dir --disable-pip-version-check --root-user-action=ignore --only-binary=:all: "$@"
