"""The algorithm of Kubernetes' HorizontalPodAutoscaler, as its documentation and API reference describe it.

Sources: "Horizontal Pod Autoscaling" (algorithm details, default behavior, stabilization window) and the reference of
``autoscaling/v2``. The defaults are those of kube-controller-manager: a sync every 15 s, and a tolerance of 0.1.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

SYNC_SECONDS: Final = 15.0
TOLERANCE: Final = 0.1


def average_value(value: float, target: float, replicas: int) -> int:
    """Return the proposal for an external metric with a target of type AverageValue."""
    if abs(1 - value / (target * replicas)) <= TOLERANCE:
        return replicas
    return math.ceil(value / target)


def pods_average(values: list[float], target: float, replicas: int) -> int:
    """Return the proposal for a metric of each pod, such as its utilization.

    Args:
        values: One of each ready pod, at least one.
        target: The average that is wanted.
        replicas: All pods. Those that are not ready yet count as idle if the others are above the target.
    """
    ratio = sum(values) / len(values) / target
    unready = replicas - len(values)
    if unready <= 0 or ratio <= 1:
        return replicas if abs(1 - ratio) <= TOLERANCE else math.ceil(ratio * len(values))
    all_pods = sum(values) / replicas / target
    if abs(1 - all_pods) <= TOLERANCE or all_pods < 1:
        return replicas
    return max(replicas, math.ceil(all_pods * replicas))


@dataclass(frozen=True, slots=True)
class Behavior:
    """How fast a workload is scaled. The defaults are those of ``autoscaling/v2``."""

    up_window: float = 0.0
    """Seconds; the least proposal within them counts."""
    up_pods: int = 4
    """Pods that are added at most every 15 s; or as many as there are, whatever is more."""
    up_share: float = 1.0
    """The same as a share of the pods."""
    down_window: float = 300.0
    """Seconds; the greatest proposal within them counts."""


class Autoscaler:
    """One HorizontalPodAutoscaler."""

    def __init__(self, least: int, most: int, behavior: Behavior) -> None:
        self.replicas = least
        self._least = least
        self._most = most
        self._behavior = behavior
        self._proposals: deque[tuple[float, int]] = deque()

    def sync(self, now: float, proposal: int) -> int:
        """Take a proposal, and return the replicas from now on."""
        behavior, current = self._behavior, self.replicas
        longest = max(behavior.up_window, behavior.down_window)
        while self._proposals and self._proposals[0][0] <= now - longest:
            self._proposals.popleft()
        self._proposals.append((now, proposal))
        lowest = min(each for at, each in self._proposals if at > now - behavior.up_window or at == now)
        highest = max(each for at, each in self._proposals if at > now - behavior.down_window)
        stabilized = min(max(current, lowest), highest)
        limit = max(current + behavior.up_pods, math.ceil(current * (1 + behavior.up_share)))
        self.replicas = max(self._least, min(self._most, stabilized, limit))
        return self.replicas
