"""The Lua filter by which a request that is placed anew says where it has failed.

It stands in the upstream filter chain of the way from the front door to the place where requests are placed, which
runs anew for each attempt, while the dynamic metadata belongs to the request and outlives them.
"""

from typing import Final

from envoy_data_plane.envoy.config.core.v3 import DataSource
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.google.protobuf import Any

from dp_extproc.contract import AVOID, FAILED

_NAMESPACE: Final = "dp_extproc.retry"

_SCRIPT: Final = f"""\
function envoy_on_request(request)
  local known = request:streamInfo():dynamicMetadata():get("{_NAMESPACE}")
  if known then request:headers():replace("{AVOID}", known["failed"]) end
end
function envoy_on_response(response)
  local failed = response:headers():get("{FAILED}")
  if failed then
    local metadata = response:streamInfo():dynamicMetadata()
    local known = metadata:get("{_NAMESPACE}")
    if known then failed = known["failed"] .. ";" .. failed end
    metadata:set("{_NAMESPACE}", "failed", failed)
  end
end
"""


def remember_failed_hosts() -> HttpFilter:
    """Build the filter."""
    script = DataSource(inline_string=_SCRIPT)
    return HttpFilter(name="envoy.filters.http.lua", typed_config=Any.pack(Lua(default_source_code=script)))
