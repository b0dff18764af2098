"""The Lua filter that turns the mirrored decode leg into the prefill leg: its body, or its headers."""

from typing import Final

from envoy_data_plane.envoy.config.core.v3 import DataSource
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.google.protobuf import Any

from dp_extproc.contract import (
    OVERRIDE_RANK,
    OVERRIDE_RID,
    PREFILL_PREFIX,
    PREFILL_RANK,
    PREFILL_RID,
    PREFIX_LENGTH,
)

_SCRIPT: Final = f"""\
function envoy_on_request(request)
  local headers = request:headers()
  local rid = headers:get("{PREFILL_RID}")
  if rid then
    local rank = headers:get("{PREFILL_RANK}")
    headers:remove("{OVERRIDE_RANK}")  -- the decode leg's
    if rank then headers:add("{OVERRIDE_RANK}", rank) end
    headers:replace("{OVERRIDE_RID}", rid)
    headers:remove("{PREFILL_RID}")
    return
  end
  local length = tonumber(string.match(request:headers():get("{PREFIX_LENGTH}") or "", "^%d+$"))
  local prefix = request:headers():get("{PREFILL_PREFIX}")
  local body = request:body()  -- waits for the whole body
  if not length or not prefix or not body or length > body:length() then
    request:logErr("a prefill leg without a usable prefix is not forwarded")
    request:respond({{[":status"] = "500"}}, "the prefill leg has no usable prefix")
    return
  end
  local rest = body:getBytes(length, body:length() - length)
  request:headers():replace("content-length", tostring(body:setBytes(prefix .. rest)))
  request:headers():remove("{PREFIX_LENGTH}")
end
"""
"""A script that fails halfway lets the request go on; the header it removes last tells the route that it did not."""


def swap_prefix() -> HttpFilter:
    """Build the filter. A body that it cannot rewrite carries the decode leg's fields and must not be forwarded."""
    script = DataSource(inline_string=_SCRIPT)
    return HttpFilter(name="envoy.filters.http.lua", typed_config=Any.pack(Lua(default_source_code=script)))
