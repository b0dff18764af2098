"""The two Lua filters: one turns the mirrored request into the prefill leg, one completes responses of the block."""

from typing import Final

from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter

from dp_extproc import contract
from dp_extproc.envoy_config.filters import http_filter
from dp_extproc.envoy_config.yaml_text import commented

_SWAP_LEG_PREAMBLE: Final = f"""\
function envoy_on_request(request)
  local headers = request:headers()
  local rid = headers:get("{contract.PREFILL_RID}")
  if rid then
    local rank = headers:get("{contract.PREFILL_RANK}")
    headers:remove("{contract.OVERRIDE_RANK}")  -- the decode leg's
    if rank then headers:add("{contract.OVERRIDE_RANK}", rank) end
    headers:replace("{contract.OVERRIDE_RID}", rid)
    headers:remove("{contract.PREFILL_RID}")
    return
  end
  local length = tonumber(string.match(request:headers():get("{contract.PREFIX_LENGTH}") or "", "^%d+$"))
  local prefix = request:headers():get("{contract.PREFILL_PREFIX}")
  local body = request:body()  -- waits for the whole body
  if not length or not prefix or not body or length > body:length() then
    request:logErr("a prefill leg without a usable prefix is not forwarded")
    request:respond({{[":status"] = "500"}}, "the prefill leg has no usable prefix")
    return
  end
  local rest = body:getBytes(length, body:length() - length)
  request:headers():replace("content-length", tostring(body:setBytes(prefix .. rest)))
  request:headers():remove("{contract.PREFIX_LENGTH}")
end
"""
"""The script removes its header last. A script that fails lets the request go on, and the route refuses the header."""


def swap_leg_preamble() -> HttpFilter:
    """Build the filter that replaces the decode leg's preamble, or its headers, by those of the prefill leg.

    A body that it cannot rewrite has the routing fields of the decode leg and must not be forwarded.
    """
    return commented(
        _lua(_SWAP_LEG_PREAMBLE),
        "The copy begins with the leg preamble of the decode leg. The script replaces it by that of\n"
        "the prefill leg; all other bytes are the same for both.",
    )


_NAMESPACE: Final = "dp_extproc.retry"

_SEND_FAILED_ENDPOINTS: Final = f"""\
function envoy_on_request(request)
  local known = request:streamInfo():dynamicMetadata():get("{_NAMESPACE}")
  if known then request:headers():replace("{contract.AVOID}", known["failed"]) end
end
"""
_REMEMBER_FAILED_ENDPOINTS: Final = f"""\
  local failed = response:headers():get("{contract.FAILED}")
  if failed then
    local metadata = response:streamInfo():dynamicMetadata()
    local known = metadata:get("{_NAMESPACE}")
    if known then failed = known["failed"] .. ";" .. failed end
    metadata:set("{_NAMESPACE}", "failed", failed)
    response:headers():remove("{contract.FAILED}")
  end
"""
"""The header stays in the block, whichever route led there: it has addresses of engines."""

_RETRY_AFTER: Final = """\
  local headers = response:headers()
  local status = headers:get(":status")
  if (status == "503" or status == "429") and not headers:get("retry-after") then
    headers:add("retry-after", "1")
  end
"""


def complete_responses(*, retries: bool) -> HttpFilter:
    """Build the filter that gives errors of overload a time to wait, and remembers failed endpoints for a retry.

    It belongs to the upstream filter chain between the front door and the listener where requests are scheduled. That
    chain runs anew for each attempt, while the dynamic metadata of the request stays.
    """
    script = f"function envoy_on_response(response)\n{{}}{_RETRY_AFTER}end\n"
    comment = "Clients try again by retry-after, which engines do not send."
    if not retries:
        return commented(_lua(script.format("")), comment)
    comment = (
        "Runs anew for each attempt, and sends the endpoints of failed attempts along. Their addresses leave\n"
        f"no response. {comment}"
    )
    return commented(_lua(_SEND_FAILED_ENDPOINTS + script.format(_REMEMBER_FAILED_ENDPOINTS)), comment)


def _lua(script: str) -> HttpFilter:
    return http_filter("lua", Lua(default_source_code=core.DataSource(inline_string=script)))
