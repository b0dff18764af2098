#!/usr/bin/env bash
# Builds the control planes of Envoy Gateway and Istio from their Go modules, outside of this tree. Wants Go 1.26 and a
# module proxy; ten minutes on two processors, 6 GB, and 0.4 GB are kept. With names of programs it builds only those.
# The definitions of their resources, of those of the Gateway API and of the InferencePool are kept beside the programs.
#
#   MESH_BIN=~/.cache/dp-extproc/mesh/bin interop/mesh/build.sh [envoy-gateway] [pilot-discovery]
set -euo pipefail

ENVOY_GATEWAY=${ENVOY_GATEWAY:-v1.9.0}
ISTIO=${ISTIO:-v0.0.0-20260827124520-eed52ebb66ad} # istio.io/istio has no tags of releases that the proxy serves
MESH_BIN=${MESH_BIN:-$HOME/.cache/dp-extproc/mesh/bin}
[ $# -gt 0 ] || set -- envoy-gateway pilot-discovery
wanted=" $* "

# Whether a program is asked for and not there yet.
missing() { [[ $wanted == *" $1 "* ]] && ! [ -x "$MESH_BIN/$1" ]; }

# A link of these programs needs 3 GB; two at a time are too much for a small machine.
export CGO_ENABLED=0 GOFLAGS="-p=${JOBS:-2}" GOMEMLIMIT=5GiB GOBIN=$MESH_BIN
mkdir -p "$MESH_BIN"
! missing envoy-gateway || go install "github.com/envoyproxy/gateway/cmd/envoy-gateway@$ENVOY_GATEWAY"
# The tags are those of Istio's own build.
! missing pilot-discovery ||
  go install -tags=vtprotobuf,disable_pgv "istio.io/istio/pilot/cmd/pilot-discovery@$ISTIO"

# Where the files of a module are.
folder() { go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'; }
if [[ $wanted == *" envoy-gateway "* ]]; then
  crds=$(folder "github.com/envoyproxy/gateway@$ENVOY_GATEWAY")/charts/gateway-helm/charts/crds/crds
  cat "$crds"/gatewayapi-crds.yaml "$crds"/generated/*_{backends,clienttrafficpolicies}.yaml \
    "$crds"/generated/*_envoy{extensionpolicies,patchpolicies,proxies}.yaml >"$MESH_BIN/envoy-gateway-crds.yaml"
fi
if [[ $wanted == *" pilot-discovery "* ]]; then
  istio=$(folder "istio.io/istio@$ISTIO")
  required() { folder "$1@$(sed -n "s|^\t$1 ||p" "$istio/go.mod")"; } # folder of a module, in the version that Istio has
  gateway_api=$(required sigs.k8s.io/gateway-api)
  inference=$(required sigs.k8s.io/gateway-api-inference-extension)
  install -m 644 "$istio/manifests/charts/base/files/crd-all.gen.yaml" "$MESH_BIN/istio-crds.yaml"
  for kind in gatewayclasses gateways httproutes grpcroutes referencegrants; do
    echo --- && cat "$gateway_api/config/crd/standard/gateway.networking.k8s.io_$kind.yaml"
  done >"$MESH_BIN/gateway-api-crds.yaml"
  pools=$inference/config/crd/bases/inference.networking.k8s.io_inferencepools.yaml
  install -m 644 "$pools" "$MESH_BIN/inference-crds.yaml"
fi
ls -l "$MESH_BIN"
