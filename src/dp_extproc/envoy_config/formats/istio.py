"""Resources of Istio for a gateway that a team has already. Its ``EnvoyFilter`` adds the block and a route into it.

1. Nothing changes for other virtual hosts of the gateway. Clusters and internal listeners are added, and a route to the
   virtual hosts of our names.
2. The bootstrap extension of internal listeners is not printed. Istio's proxy has it already, and with two of them no
   request passes an internal listener.
3. There is no ``ServiceEntry``: no cluster of the block comes from Istio's registry, and no route of it names one.
4. There is no ``Gateway``: the one that exists would be overwritten.
5. The filter that removes untrusted headers on one route (:func:`.entrance.strip_filter`) is left out. It would change
   every HTTP listener of the gateway, and Envoy closes the connections of a changed listener after the drain time.
   Istio's connection manager removes the ``x-envoy-*`` headers that its router reads, and the block removes the rest.
6. With labels of the pods, the gateway is one of Istio's own API, else one of the Gateway API of Kubernetes.
"""

from collections.abc import Iterator
from typing import Any, Final

from envoy_data_plane.envoy.config.route.v3 import Route

from dp_extproc.config import Config
from dp_extproc.envoy_config.block import build_block
from dp_extproc.envoy_config.entrance import entrance_route
from dp_extproc.envoy_config.formats.resources import documents, name_of_ours, resource
from dp_extproc.envoy_config.formats.target import GATEWAY, HOSTNAMES, PORT, SELECTOR, ObjectName, Target
from dp_extproc.envoy_config.yaml_text import Fields, commented

NEEDS: Final = (GATEWAY, HOSTNAMES, PORT)
TAKES: Final = (*NEEDS, SELECTOR)

WITHOUT_EFFECT: Final = {
    "tls": "set tls of the server or listener in your Gateway",
    "accept_http_10": "set PILOT_HTTP10 in the environment of istiod",
    "cors": "leave it to the engines; the inserted route has no policy of yours",
    "request_headers_timeout": "set it with an EnvoyFilter of the gateway's connection manager",
    "request_timeout": "set it with an EnvoyFilter of the gateway's connection manager",
    "ipv4_compat": "set ISTIO_DUAL_STACK of istiod and the proxies",
}
"""Keys of the front door that belong to the gateway."""

_PRIORITY: Final = 10
"""Priority of the ``EnvoyFilter``. Istio applies those of a higher one later, and the route inserted last is first."""
_API: Final = "networking.istio.io"
_GATEWAY_API: Final = "gateway.networking.k8s.io"

_HEADER: Final = """\
Printed by: dp-extproc envoy-config --format istio

Requests for these host names go to SGLang engines through the service dp-extproc, and no other route changes.
For the details see docs/mesh/istio.md.
"""


def files(config: Config, target: Target) -> dict[str, str]:
    """Return the file ``dp-extproc.yaml``: an ``EnvoyFilter``, and a route that makes the virtual hosts."""
    return {"dp-extproc.yaml": documents(_HEADER, _resources(config, target, target.named_gateway))}


def _resources(config: Config, target: Target, gateway: ObjectName) -> Iterator[Fields]:
    name = name_of_ours(config, gateway)
    yield _virtual_service(name, gateway, target) if target.selector else _http_route(name, gateway, target)
    by_labels = {"workloadSelector": {"labels": dict(target.selector)}}
    by_name = {"targetRefs": [{"group": _GATEWAY_API, "kind": "Gateway", "name": gateway.name}]}
    attached = by_labels if target.selector else by_name
    spec = {**attached, "priority": _PRIORITY, "configPatches": list(_patches(config, target))}
    yield resource(f"{_API}/v1alpha3", "EnvoyFilter", name, spec)


def _virtual_service(name: ObjectName, gateway: ObjectName, target: Target) -> Fields:
    reason = f"The EnvoyFilter {name} does not apply to this host and port."
    rest = {"name": "rest", "directResponse": {"status": 503, "body": {"string": reason}}}
    spec = {"hosts": target.hostnames, "gateways": [str(gateway)], "http": [rest]}
    return commented(
        resource(f"{_API}/v1", "VirtualService", name, spec),
        "Makes the virtual hosts. The EnvoyFilter inserts a route into them; without it, requests get this 503.",
    )


def _http_route(name: ObjectName, gateway: ObjectName, target: Target) -> Fields:
    parent = {"name": gateway.name, "port": target.port}
    spec = {"parentRefs": [parent], "hostnames": target.hostnames, "rules": [{"name": "rest"}]}
    return commented(
        resource(f"{_GATEWAY_API}/v1", "HTTPRoute", name, spec),
        "Makes the virtual hosts. The EnvoyFilter inserts a route into them; without it, requests get a 500, as\n"
        "this rule has no backend.",
    )


def _patches(config: Config, target: Target) -> Iterator[Fields]:
    block = build_block(config)
    for cluster in block.clusters:
        yield _patch("CLUSTER", "ADD", cluster)
    for listener in block.listeners:
        yield _patch("LISTENER", "ADD", listener)
    for host in target.hostnames:
        virtual_host = {"vhost": {"name": f"{host}:{target.port}"}}
        yield _patch("HTTP_ROUTE", "INSERT_FIRST", _entrance(config), routeConfiguration=virtual_host)


def _entrance(config: Config) -> Route:
    route = entrance_route(config)
    route.typed_per_filter_config = {}
    return route


def _patch(kind: str, operation: str, value: object, **match: Any) -> Fields:
    return Fields(
        applyTo=kind,
        match={"context": "GATEWAY", **match},
        patch={"operation": operation, "value": value},
    )
