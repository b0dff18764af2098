"""The filters that end a stream with an error event if its engine is lost in mid-response.

When an engine is lost in mid-response, Envoy's HTTP router resets the client's connection without calling a filter.
Therefore a listener that only forwards bytes stands between the router and the engine. A network filter there gets the
end of the engine's connection as the last piece of data, and may append to it. That filter is ``stream_end.c``.
"""

from datetime import timedelta
from importlib.resources import files
from typing import Final

from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.listener.v3 import Filter
from envoy_data_plane.envoy.extensions.filters.common.set_filter_state import v3 as filter_state
from envoy_data_plane.envoy.extensions.filters.http.set_filter_state import v3 as set_filter_state
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.filters.network.tcp_proxy.v3 import TcpProxy
from envoy_data_plane.envoy.extensions.filters.network.wasm.v3 import Wasm
from envoy_data_plane.envoy.extensions.wasm import v3 as wasm

from dp_extproc.contract import DECODE_HOST
from dp_extproc.envoy_config.filters import http_filter
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.yaml_text import commented, pack

_ADDRESS_KEY: Final = "envoy.network.transport_socket.original_dst_address"
"""Key of the filter state from which an ORIGINAL_DST cluster reads its address (``original_dst_cluster.h``)."""
_NAME: Final = "dp_stream_end"


def remember_decode_endpoint() -> HttpFilter:
    """Build the filter that passes the address of the decode endpoint to the connection that Envoy opens to it."""
    header = core.DataSource(inline_string=f"%REQ({DECODE_HOST})%")
    address = filter_state.FilterStateValue(
        object_key=_ADDRESS_KEY,
        format_string=core.SubstitutionFormatString(text_format_source=header),
        shared_with_upstream=filter_state.FilterStateValueSharedWithUpstream.ONCE,
    )
    return commented(
        http_filter("set_filter_state", set_filter_state.Config(on_request_headers=[address])),
        "Passes the decode endpoint to the connection that the listener decode opens.",
    )


def stream_end_filters(names: Names) -> list[Filter]:
    """Build the network filters that forward the bytes of responses and end truncated streams."""
    module = files(__package__).joinpath("stream_end.wasm").read_bytes()  # built by ``make stream-end``
    code = commented(core.DataSource(inline_bytes=module), inline_bytes="stream_end.c of this project, as WebAssembly.")
    plugin = wasm.PluginConfig(
        name=_NAME,
        root_id=_NAME,
        vm_config=wasm.VmConfig(vm_id=_NAME, runtime="envoy.wasm.runtime.v8", code=core.AsyncDataSource(local=code)),
        failure_policy=wasm.FailurePolicy.FAIL_OPEN,
    )
    forwarding = TcpProxy(
        stat_prefix=names.decode,
        cluster=names.decode_server,
        idle_timeout=timedelta(0),  # Envoy's default would end a request whose prompt takes more than an hour.
    )
    return [
        Filter(name="envoy.filters.network.wasm", typed_config=pack(Wasm(config=plugin))),
        Filter(name="envoy.filters.network.tcp_proxy", typed_config=pack(forwarding)),
    ]
