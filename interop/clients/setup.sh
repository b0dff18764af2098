#!/bin/sh
# Installs the official clients in their current versions into the directory $CLIENTS, once: Python's and Node's.
# To get newer ones, remove the directory.
set -eu
: "${CLIENTS:?the directory to install into}"
mkdir -p "$CLIENTS"
cd "$CLIENTS"
if [ ! -e ready ]; then
  "${PYTHON:-python3}" -m venv venv
  venv/bin/python -m pip install --quiet --disable-pip-version-check openai anthropic langchain-openai \
    langchain-anthropic litellm llama-index-llms-openai-like
  echo '{"private":true}' >package.json
  npm install --silent --no-audit --no-fund openai @anthropic-ai/sdk ai @ai-sdk/openai @ai-sdk/anthropic \
    @langchain/core @langchain/openai @langchain/anthropic
  touch ready
fi
