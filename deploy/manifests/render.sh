#!/usr/bin/env bash
# Renders the plain manifests from the chart into a directory (default: this one). Needs helm.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PATH=${KUBE_BIN:-$HOME/.cache/dp-extproc/kubernetes/bin}:$PATH
for topology in sidecar service picker; do
  {
    echo "# The topology $topology for the namespace llm, made by \`make manifests\` from deploy/helm/dp-extproc with"
    echo "# ci/$topology-values.yaml. Replace the image, the names of Services and labels, and the namespace by yours."
    helm template dp-extproc "$here/../helm/dp-extproc" --namespace llm --kube-version 1.31.0 \
      --values "$here/../helm/dp-extproc/ci/$topology-values.yaml" |
      grep -v -e '^# Source: ' -e ' app.kubernetes.io/managed-by: ' -e ' helm.sh/chart: '
  } >"${1:-$here}/$topology.yaml"
done
