#!/usr/bin/env bash
# Builds Kubernetes' own API server and endpoint controller, etcd and helm from their Go modules, outside of this tree.
# Wants Go 1.26 and a module proxy; twenty minutes on one processor, 8 GB, and 0.4 GB are kept. With names of programs
# it builds only those: helm alone takes a few minutes.
#
#   KUBE_BIN=~/.cache/dp-extproc/kubernetes/bin interop/kubernetes/build.sh [PROGRAM...]
set -euo pipefail

KUBERNETES=${KUBERNETES:-1.36.3} # the module k8s.io/kubernetes has v1.x.y, its staging modules have v0.x.y
ETCD=${ETCD:-3.6.5}
HELM=${HELM:-3.22.0}
KUBE_BIN=${KUBE_BIN:-$HOME/.cache/dp-extproc/kubernetes/bin}
[ $# -gt 0 ] || set -- kube-apiserver kube-controller-manager etcd helm
wanted=" $* "

# Whether a program is asked for and not there yet.
missing() { [[ $wanted == *" $1 "* ]] && ! [ -x "$KUBE_BIN/$1" ]; }

# A link of these programs needs 3 GB; two at a time are too much for a small machine.
export CGO_ENABLED=0 GOFLAGS="-p=${JOBS:-2}" GOMEMLIMIT=5GiB GOBIN=$KUBE_BIN
mkdir -p "$KUBE_BIN"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Kubernetes replaces its staging modules by folders of its own repository; their releases stand in for those here.
if missing kube-apiserver || missing kube-controller-manager; then
  mkdir kubernetes && cd kubernetes && go mod init build 2>/dev/null
  module=$(go mod download -json "k8s.io/kubernetes@v$KUBERNETES" | sed -n 's/^\t"GoMod": "\(.*\)",$/\1/p')
  staging=$(awk -v version="v0.${KUBERNETES#1.}" '/=> \.\/staging/ {print "-replace=" $1 "=" $1 "@" version}' "$module")
  # shellcheck disable=SC2086 # one word for each module
  go mod edit -require "k8s.io/kubernetes@v$KUBERNETES" $staging
  cat >tools.go <<'G'
//go:build tools

package build

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
)
G
  go mod tidy
  # Clients such as helm ask for the version.
  version="-X k8s.io/component-base/version.gitVersion=v$KUBERNETES"
  for program in kube-apiserver kube-controller-manager; do
    ! missing "$program" || go build -ldflags "$version" -o "$KUBE_BIN/" "k8s.io/kubernetes/cmd/$program"
  done
  cd ..
fi

# etcd's module has replace directives, so `go install` refuses it.
if missing etcd; then
  mkdir etcd && cd etcd && go mod init build 2>/dev/null
  go get "go.etcd.io/etcd/server/v3@v$ETCD"
  go build -o "$KUBE_BIN/etcd" go.etcd.io/etcd/server/v3
  cd ..
fi

if missing helm; then
  go install -ldflags='-s -w' "helm.sh/helm/v3/cmd/helm@v$HELM"
fi
ls -l "$KUBE_BIN"
