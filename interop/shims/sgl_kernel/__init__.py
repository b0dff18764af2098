"""Stand in for SGLang's compiled kernels, which exist for GPUs and for CPUs with AMX only.

One of them is needed and written in torch. Each other name can be imported and raises when it is called, so nothing is
invented without an error. `torch.ops.sgl_kernel` stays empty, so SGLang uses its own code in torch.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0"


def assign_req_to_token_pool_cpu(
    requests: Any, table: Any, starts: Any, ends: Any, locations: Any, _stride: int
) -> None:
    """Write the cache locations of each request's new tokens into its row."""
    taken = 0
    for row, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = locations[taken : taken + end - start].to(table.dtype)
        taken += end - start


def missing(name: str) -> Callable[..., NoReturn]:
    """Return an object that can be imported by that name, and not be called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not there on this machine")

    return call


__getattr__ = missing
