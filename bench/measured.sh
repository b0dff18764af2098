#!/usr/bin/env bash
# Measures every fleet and kind of traffic of docs/scheduling.md end to end, and writes numbers and plots to
# docs/scheduling/balance-*. Wants a machine of its own: about an hour for each seed on two cores.
#
#   SEEDS=3 bench/measured.sh [NAME...]
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
SEEDS=${SEEDS:-5}
OUT=${OUT:-docs/scheduling}
WANTED=" $* "

balance() {  # NAME OPTIONS...
  local name=$1
  shift
  [[ $WANTED == "  " || $WANTED == *" $name "* ]] || return 0
  "$BIN/python" -m bench.balance --seeds "$SEEDS" --out "$OUT/balance-$name" "$@"
}

balance 1p1d2-seed-prompts --topology 1p1d2 --trace seed-prompts --requests 300
balance 1p1d2-seed --topology 1p1d2 --trace seed --requests 400
balance 2p2d4-azure --topology 2p2d4 --trace azure --requests 1200
balance 2p2d4-mixed --topology 2p2d4 --trace mixed --requests 1200
balance 2p2d4-sharegpt --topology 2p2d4 --trace sharegpt --requests 2000
balance 2p2d4-agent --topology 2p2d4 --trace agent --requests 300
balance 2p2d4-bursts --topology 2p2d4 --trace agent --requests 300 --load 0.65 --burst 2.5
balance 2p2d4-closed --topology 2p2d4 --trace agent --requests 300 --concurrency 48
balance 2p2d4-long --topology 2p2d4 --trace long --requests 300
balance 2p2d4-sessions --topology 2p2d4 --trace sessions --requests 400
balance 2p2d4-policies --topology 2p2d4 --trace agent --requests 300 --only 'dp-extproc' 'ours *'
