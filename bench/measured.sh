#!/usr/bin/env bash
# Measure every fleet and kind of traffic of docs/scheduling.md end to end, and write numbers and plots to
# docs/scheduling/balance-*. This needs a machine of its own: an hour and a half for each seed on two cores.
#
#   SEEDS=3 bench/measured.sh [NAME...]
#   SEEDS=5 bench/measured.sh --add [NAME...]    keeps the existing seeds and measures the missing ones
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
SEEDS=${SEEDS:-5}
OUT=${OUT:-docs/scheduling}
add=()
if [[ ${1:-} == --add ]]; then
  add=(--add)
  shift
fi
WANTED=" $* "

balance() {  # NAME OPTIONS...
  local name=$1
  shift
  [[ $WANTED == "  " || $WANTED == *" $name "* ]] || return 0
  "$BIN/python" -m bench.balance --seeds "$SEEDS" --out "$OUT/balance-$name" "${add[@]}" "$@"
}

all=("engines' own" dp-extproc 'ours scraped' 'smg *')
# The best of smg's configurations; no other is the best in any row.
few=("engines' own" dp-extproc 'smg cache_aware 1 s' 'smg cache_aware dp-aware' 'smg least_load dp-aware')

balance 1p1d2-seed-prompts --topology 1p1d2 --trace seed-prompts --requests 250 --only "${few[@]}"
balance 1p1d2-seed --topology 1p1d2 --trace seed --requests 250 --only "${few[@]}"
# Time per output token needs more requests: sequences last half a minute, so ranks do not fill in a minute of arrivals.
balance 1p1d2-seed-longer --topology 1p1d2 --trace seed --requests 1000 \
  --only "engines' own" dp-extproc 'smg cache_aware 1 s'
balance 2p2d4-agent --topology 2p2d4 --trace agent --requests 300 --only "${all[@]}"
balance 2p2d4-azure --topology 2p2d4 --trace azure --requests 600 --only "${few[@]}"
balance 2p2d4-mixed --topology 2p2d4 --trace mixed --requests 600 --only "${few[@]}"
# The most requests per second of all: the CPU time of router, client and stand-ins must stay a small part of a step.
# If the machine is busy for more than a third of the time in this row, double its time.
balance 2p2d4-sharegpt --topology 2p2d4 --trace sharegpt --requests 2000 --time-scale 4 --only "${few[@]}"
balance 2p2d4-bursts --topology 2p2d4 --trace agent --requests 300 --load 0.65 --burst 2.5 --only "${few[@]}"
balance 2p2d4-closed --topology 2p2d4 --trace agent --requests 300 --concurrency 48 --only "${few[@]}"
balance 2p2d4-long --topology 2p2d4 --trace long --requests 300 --only "${few[@]}"
# Nearly twice the capacity of the fleet without its prefix caches, as in the simulation.
balance 2p2d4-sessions --topology 2p2d4 --trace sessions --requests 600 --rate 12 --only "${few[@]}"
balance 2p2d4-policies --topology 2p2d4 --trace agent --requests 300 --only dp-extproc 'ours *'
