"""Resources of Envoy Gateway that lead the requests of an HTTPRoute into the block.

1. Envoy Gateway makes a cluster of every rule of an HTTPRoute. A patch replaces that cluster as a whole by the way into
   the block. So the rule has a backend whose address is never used.
2. Another patch finds the routes by that cluster. Indexes and names depend on other routes, host names and matches.
3. What this module prints as ours changes no other route. What belongs to the whole gateway is in a file of its own.
4. The filter that removes untrusted headers on one route (:func:`.entrance.strip_filter`) is left out. It would be a
   patch of the whole listener. Envoy Gateway's connection manager removes the ``x-envoy-*`` headers that its router
   reads, and the block removes the rest.
"""

from collections.abc import Iterator
from typing import Any, Final

from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.route.v3 import RouteAction

from dp_extproc.config import Config
from dp_extproc.envoy_config.block import Block, build_block, build_bootstrap_extension
from dp_extproc.envoy_config.entrance import entrance_route
from dp_extproc.envoy_config.formats.resources import documents, name_of_ours, resource
from dp_extproc.envoy_config.formats.target import GATEWAY, HOSTNAMES, LISTENERS, PORT, ObjectName, Target
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.yaml_text import Fields, commented, plain

TAKES: Final = (GATEWAY, LISTENERS, HOSTNAMES, PORT)
NEEDS: Final = (GATEWAY, LISTENERS)

WITHOUT_EFFECT: Final = {
    "tls": "set tls of the listener in your Gateway",
    "accept_http_10": "set http1.http10 in a ClientTrafficPolicy",
    "cors": "set cors in a SecurityPolicy",
    "ipv4_compat": "set ipFamily in your EnvoyProxy",
}
"""Keys of the front door that belong to objects of the gateway."""

_API: Final = "gateway.networking.k8s.io"
_EXTENSIONS: Final = "gateway.envoyproxy.io"
_GATEWAY_CLASS: Final = "eg"
_PORT: Final = 80
"""Port of the first listener in the example, unless the command line gives one."""

_CLUSTER: Final = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
_LISTENER: Final = "type.googleapis.com/envoy.config.listener.v3.Listener"
_ROUTES: Final = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"

_UNUSED_ADDRESS: Final = {"ip": {"address": "192.0.2.1", "port": 9}}
"""An address for documentation (TEST-NET-1, RFC 5737) and the port ``discard``."""

_DRAIN_TIME: Final = "900s"
"""Time for open streams when a listener of Envoy changes. Envoy Gateway's default of 60 s cuts longer streams."""

_OURS: Final = """\
Printed by: dp-extproc envoy-config --format envoy-gateway

Requests of this HTTPRoute go to SGLang engines through the service dp-extproc, and no other route changes. The Envoy of
the gateway needs a bootstrap extension first: see gateway.yaml. For the details see docs/mesh/envoy-gateway.md.
"""

_OF_THE_GATEWAY: Final = """\
Printed by: dp-extproc envoy-config --format envoy-gateway

An example of the gateway's own objects. Where they exist already, add to them what has a comment here. Envoy reads its
bootstrap once, when it starts, so this comes before dp-extproc.yaml.
"""


def files(config: Config, target: Target) -> dict[str, str]:
    """Return what is ours as ``dp-extproc.yaml``, and an example of the gateway's own objects as ``gateway.yaml``."""
    gateway = target.named_gateway
    return {
        "dp-extproc.yaml": documents(_OURS, _ours(config, target, gateway)),
        "gateway.yaml": documents(_OF_THE_GATEWAY, _of_the_gateway(config, target, gateway)),
    }


def _ours(config: Config, target: Target, gateway: ObjectName) -> Iterator[Fields]:
    name = name_of_ours(config, gateway)
    yield commented(
        resource(f"{_EXTENSIONS}/v1alpha1", "Backend", name, {"endpoints": [_UNUSED_ADDRESS]}),
        "Envoy Gateway makes a cluster of it, which a patch replaces. Nothing connects to this address.",
    )
    entrance = entrance_route(config)
    rule = commented(
        Fields(
            matches=[{"path": {"type": "PathPrefix", "value": "/"}}],
            timeouts={"request": "0s"},
            filters=[
                {
                    "type": "ResponseHeaderModifier",
                    "responseHeaderModifier": {"remove": entrance.response_headers_to_remove},
                }
            ],
            backendRefs=[{"group": _EXTENSIONS, "kind": "Backend", "name": name.name}],
        ),
        timeouts="No limit, also while a stream is idle. Envoy's default of 15 s would end long generations. A\n"
        "streamIdleTimeout in a ClientTrafficPolicy takes precedence, and has to be longer than the longest prefill.",
    )
    route = {
        "parentRefs": [{"name": gateway.name, "sectionName": listener} for listener in target.listeners],
        **({"hostnames": target.hostnames} if target.hostnames else {}),
        "rules": [rule],
    }
    yield resource(f"{_API}/v1", "HTTPRoute", name, route)
    generated = f"httproute/{name}/rule/0"
    action = entrance.route or RouteAction()
    patches = [
        *_patches_of_block(build_block(config), Names.of(config).dispatch, generated),
        *(
            _patch(_ROUTES, f"{gateway}/{listener}", "add", value, path=path, routes_to=generated)
            for listener in target.listeners
            for path, value in (
                ("/route/retry_policy", action.retry_policy),
                ("/request_body_buffer_limit", entrance.request_body_buffer_limit),
            )
            if value is not None
        ),
    ]
    spec = {
        "type": "JSONPatch",
        "targetRef": {"group": _API, "kind": "Gateway", "name": gateway.name},
        "jsonPatches": patches,
    }
    yield resource(f"{_EXTENSIONS}/v1alpha1", "EnvoyPatchPolicy", name, spec)


def _patches_of_block(block: Block, dispatch: str, generated: str) -> Iterator[Fields]:
    """Yield a patch for each part of the block. The cluster that leads into it takes the place of *generated*."""
    for listener in block.listeners:
        yield _patch(_LISTENER, listener.name, "add", listener)
    for cluster in block.clusters:
        if cluster.name == dispatch:
            yield _patch(_CLUSTER, generated, "replace", _renamed(cluster, generated))
        else:
            yield _patch(_CLUSTER, cluster.name, "add", cluster)


def _renamed(cluster: Cluster, name: str) -> Cluster:
    cluster.name = name
    if cluster.load_assignment is not None:
        cluster.load_assignment.cluster_name = name
    return cluster


def _patch(kind: str, name: str, operation: str, value: Any, *, path: str = "", routes_to: str | None = None) -> Fields:
    """Build a patch of the resource *name*, or of those of its routes that lead to the cluster *routes_to*."""
    filtered = {"jsonPath": f"$.virtual_hosts[*].routes[?(@.route.cluster=='{routes_to}')]"} if routes_to else {}
    return Fields(type=kind, name=name, operation={"op": operation, **filtered, "path": path, "value": value})


def _of_the_gateway(config: Config, target: Target, gateway: ObjectName) -> Iterator[Fields]:
    yield Fields(
        apiVersion=f"{_API}/v1",
        kind="GatewayClass",
        metadata={"name": _GATEWAY_CLASS},
        spec={"controllerName": f"{_EXTENSIONS}/gatewayclass-controller"},
    )
    extension = Fields(op="add", path="/bootstrap_extensions", value=[plain(build_bootstrap_extension())])
    proxy = commented(
        Fields(shutdown={"drainTimeout": _DRAIN_TIME}, bootstrap={"type": "JSONPatch", "jsonPatches": [extension]}),
        shutdown="Time for open streams when a listener changes or the pod ends. The default of 60 s cuts longer ones.",
        bootstrap="Without this extension Envoy refuses internal listeners. With two of them no request passes one.\n"
        "This operation replaces the list, so the extension is there once.",
    )
    yield resource(f"{_EXTENSIONS}/v1alpha1", "EnvoyProxy", gateway, proxy)
    parameters = {"group": _EXTENSIONS, "kind": "EnvoyProxy", "name": gateway.name}
    first_port = target.port or _PORT
    spec = commented(
        Fields(
            gatewayClassName=_GATEWAY_CLASS,
            infrastructure={"parametersRef": parameters},
            listeners=[
                {"name": listener, "protocol": "HTTP", "port": first_port + number}
                for number, listener in enumerate(target.listeners)
            ],
        ),
        infrastructure="The EnvoyProxy above. The GatewayClass may name it instead.",
    )
    yield resource(f"{_API}/v1", "Gateway", gateway, spec)
    timeouts = {
        "requestHeadersReceivedTimeout": f"{config.envoy.request_headers_timeout:g}s",
        "requestReceivedTimeout": f"{config.envoy.request_timeout:g}s",
    }
    clients = commented(
        Fields(
            targetRefs=[{"group": _API, "kind": "Gateway", "name": gateway.name}],
            timeout={"http": timeouts},
            headers={"requestID": "PreserveOrGenerate"},
        ),
        timeout="For all routes of the gateway: a client that stops in the middle of its request would hold buffers\n"
        "for ever.",
        headers="The request id of a client appears in all logs.",
    )
    yield resource(f"{_EXTENSIONS}/v1alpha1", "ClientTrafficPolicy", gateway, clients)
