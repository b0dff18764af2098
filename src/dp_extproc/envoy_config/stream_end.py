"""How a stream ends whose server is lost in mid-answer: with an error event, or as a cut connection.

Envoy's HTTP router answers the loss of a server in mid-answer by cutting the client's connection, and asks no filter.
So between the router and the server stands a listener that only passes bytes on: a network filter there sees the end
of the server's connection as the last piece of data, to which it may append. The filter is ``stream_end.c``.
"""

from datetime import timedelta
from importlib.resources import files
from typing import Final

from envoy_data_plane.envoy.config.core.v3 import AsyncDataSource, DataSource, SubstitutionFormatString
from envoy_data_plane.envoy.config.listener.v3 import Filter
from envoy_data_plane.envoy.extensions.filters.common.set_filter_state.v3 import (
    FilterStateValue,
    FilterStateValueSharedWithUpstream,
)
from envoy_data_plane.envoy.extensions.filters.http.set_filter_state.v3 import Config as SetFilterState
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.filters.network.tcp_proxy.v3 import TcpProxy
from envoy_data_plane.envoy.extensions.filters.network.wasm.v3 import Wasm
from envoy_data_plane.envoy.extensions.wasm.v3 import FailurePolicy, PluginConfig, VmConfig

from dp_extproc.contract import DECODE_HOST
from dp_extproc.envoy_config.addresses import DECODE, DECODE_SERVER
from dp_extproc.envoy_config.filters import http_filter
from dp_extproc.envoy_config.yaml_text import commented, pack

_ADDRESS: Final = "envoy.network.transport_socket.original_dst_address"
"""The key under which a cluster of type ORIGINAL_DST looks for an address (``original_dst_cluster.h``)."""
_NAME: Final = "dp_stream_end"


def remember_decode_host() -> HttpFilter:
    """Build the filter that hands the decode server's address to the connection that is opened for it."""
    address = FilterStateValue(
        object_key=_ADDRESS,
        format_string=SubstitutionFormatString(text_format_source=DataSource(inline_string=f"%REQ({DECODE_HOST})%")),
        shared_with_upstream=FilterStateValueSharedWithUpstream.ONCE,
    )
    return commented(
        http_filter("set_filter_state", SetFilterState(on_request_headers=[address])),
        "The address for the connection that the listener decode opens.",
    )


def stream_end_filters() -> list[Filter]:
    """Build the filters that pass the bytes of answering servers on and end their streams."""
    code = commented(DataSource(inline_bytes=_module()), inline_bytes="stream_end.c of this project, as WebAssembly.")
    plugin = PluginConfig(
        name=_NAME,
        root_id=_NAME,
        vm_config=VmConfig(
            vm_id=_NAME,
            runtime="envoy.wasm.runtime.v8",
            code=AsyncDataSource(local=code),
        ),
        failure_policy=FailurePolicy.FAIL_OPEN,
    )
    passing_on = TcpProxy(
        stat_prefix=DECODE,
        cluster=DECODE_SERVER,
        idle_timeout=timedelta(0),  # by default a prompt that takes more than an hour would be cut
    )
    return [
        Filter(name="envoy.filters.network.wasm", typed_config=pack(Wasm(config=plugin))),
        Filter(name="envoy.filters.network.tcp_proxy", typed_config=pack(passing_on)),
    ]


def _module() -> bytes:
    """Read the filter, as ``make stream-end`` has built it."""
    return files(__package__).joinpath("stream_end.wasm").read_bytes()
