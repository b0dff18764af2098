#!/usr/bin/env bash
# Run every simulation of docs/scheduling.md, and write its tables and plots again: a quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
SEEDS=${SEEDS:-5}
OUT=docs/scheduling

simulate() {  # NAME OPTIONS...
  local name=$1
  shift
  "$BIN/dp-extproc" simulate --seeds "$SEEDS" --json "$OUT/$name.json" "$@"
}

policies=(lockstep/minimum_tokens least_tokens/minimum_tokens least_requests/token_round_robin
  power_of_two/minimum_tokens random/minimum_tokens round_robin/minimum_tokens random/minimum_tokens/scraped)
[[ " ${ONLY:-policies} " == *" policies "* ]] && simulate policies --setting all "${policies[@]/#/--policy=}"

if [[ " ${ONLY:-affinity} " == *" affinity "* ]]; then
  simulate affinity --setting 4p2d8-sessions --policy lockstep/minimum_tokens --policy lockstep/minimum_tokens/blind \
    --policy random/minimum_tokens
fi

if [[ " ${ONLY:-replicas} " == *" replicas "* ]]; then
  for replicas in 1 2 4 8; do
    simulate "replicas-$replicas-blind" --setting 4p2d8-agent --replicas "$replicas"
    for late in 20 50 200; do
      [[ $replicas == 1 ]] || simulate "replicas-$replicas-$late" --setting 4p2d8-agent --replicas "$replicas" --sync "$late"
    done
  done
fi

if [[ " ${ONLY:-robustness} " == *" robustness "* ]]; then
  robust() {
    local name=$1
    shift
    simulate "robust-$name" --setting 4p2d8-agent --policy lockstep/minimum_tokens --policy lockstep/none \
      --policy random/minimum_tokens/scraped "$@"
  }
  robust as-it-is
  robust sigma-0.6 --error-sigma 0.6
  robust sigma-1.0 --error-sigma 1.0
  robust bias-4 --bias 4
  robust bias-quarter --bias 0.25
  robust underrated --underrated 0.3
  robust scrape-0.1s --scrape-interval 0.1
  robust scrape-10s --scrape-interval 10
  robust no-scrapes --no-scrapes
  robust stale --stale-after 0.5
  robust mute --stale-after 5 --mute 0.3
  robust lying --lying
  robust no-answers --no-answers
  robust slow-prefill --slow-prefill 2 --rate 24
  robust slow-decode --slow-decode 1.67
  robust direct --direct-share 0.3
  robust aborts --aborts 0.3
fi

"$BIN/python" bench/scheduling_page.py
"$BIN/python" -m bench.groups  # only prints its table
