"""Patch three places of SGLang 0.5.23 that never run on a CPU, in memory, when they are imported.

Python imports this module by itself in every process whose PYTHONPATH has this folder, so it reaches all of SGLang's.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def length_of_fillers(module: Any) -> None:
    """DP attention pads ranks that have no work and needs a length from the backend; the one in torch has none."""
    backend = module.TorchNativeAttnBackend
    if not hasattr(backend, "get_cpu_graph_seq_len_fill_value"):
        backend.get_cpu_graph_seq_len_fill_value = lambda _: 1


def rotate_nothing(module: Any) -> None:
    """A rank without work runs with no token, and torch does not reshape an empty tensor to a size to be guessed."""

    def guarded(native: Callable[..., Any]) -> Callable[..., Any]:
        def forward_native(self: Any, positions: Any, query: Any, key: Any = None, *rest: Any, **named: Any) -> Any:
            if query is not None and query.numel() == 0:
                return query, key
            return native(self, positions, query, key, *rest, **named)

        return forward_native

    for found in vars(module).values():
        if isinstance(found, type) and "forward_native" in vars(found):
            found.forward_native = guarded(vars(found)["forward_native"])  # type: ignore[attr-defined]


def send_synchronously(module: Any) -> None:
    """The sender's other way needs pinned memory and a CUDA event."""
    module.MooncakeKVSender.supports_host_tensor_indices = False


MENDED: dict[str, Callable[[Any], None]] = {
    "sglang.srt.disaggregation.mooncake.conn": send_synchronously,
    "sglang.srt.layers.rotary_embedding.base": rotate_nothing,
    "sglang.srt.layers.attention.torch_native_backend": length_of_fillers,
}


class Mender(importlib.abc.MetaPathFinder):
    """An import hook that finds what the other finders find, and patches it once it has run."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        mend = MENDED.pop(name, None)  # removed first, because the search below comes here again
        spec = None if mend is None else importlib.util.find_spec(name)
        if mend is None or spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            mend(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Mender())
