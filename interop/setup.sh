#!/bin/sh
# Make a virtual environment for real SGLang without a GPU, and two tiny models: about 4 minutes, 3 GB.
# SGLVENV and SGLRUN name the folders; existing files are kept. Needs Python 3.11 on Linux x86-64, and the library
# libibverbs1, which Mooncake links; root on Debian installs it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${SGLVENV:?}" "${SGLRUN:?}"
version=0.5.23
python="$SGLVENV/bin/python"
[ -e "$SGLVENV/ready-$version" ] && exit 0

${PYTHON:-python3.11} -m venv "$SGLVENV"
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install --requirement "$here/requirements.txt"
# SGLang imports these but never runs them on a CPU, except Mooncake, which transfers the KV cache. Their own
# dependencies would install CUDA.
pip install --no-deps triton==3.7.1 torchvision==0.28.0 xgrammar==0.2.7 tml-renderers==0.1.0 deepseek-recipe==0.2.0 modelscope \
  mooncake-transfer-engine-non-cuda==0.3.13.post1
pip install --no-deps "sglang==$version"
"$python" "$here/mend_torchvision.py"
if ! ldconfig -p | grep -q libibverbs.so.1; then
  apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends libibverbs1
fi
mkdir -p "$SGLRUN"
"$python" "$here/tiny_model.py" llama "$SGLRUN/llama"
"$python" "$here/tiny_model.py" qwen3 "$SGLRUN/qwen3"
touch "$SGLVENV/ready-$version"
