"""Resources of Istio for a gateway that a team has already. Its ``EnvoyFilter`` adds the block and a route into it.

1. Nothing is changed for other hosts of the gateway: clusters and internal listeners are added, the filter that removes
   untrusted headers is disabled but on our route, and that route is added to the virtual hosts of our host names.
2. The bootstrap extension of internal listeners is not printed. Istio's proxy has it already, and with two of them no
   request passes an internal listener.
3. There is no ``ServiceEntry``: no cluster of the block comes from Istio's registry, and no route of it names one.
4. There is no ``Gateway``: the one that exists would be overwritten.
5. With labels of the pods, the gateway is one of Istio's own API, else one of the Gateway API of Kubernetes.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from dp_extproc.config import Config
from dp_extproc.envoy_config.block import build_block
from dp_extproc.envoy_config.entrance import entrance_route, strip_filter
from dp_extproc.envoy_config.formats.target import GATEWAY, HOSTNAMES, PORT, SELECTOR, ObjectName, Target
from dp_extproc.envoy_config.yaml_text import render_yaml

NEEDS: Final = (GATEWAY, HOSTNAMES, PORT)
TAKES: Final = (*NEEDS, SELECTOR)

_PRIORITY: Final = 10
"""Priority of the ``EnvoyFilter``. Istio applies those of a higher one later, and the route inserted last is first."""
_MANAGER: Final = "envoy.filters.network.http_connection_manager"
_ROUTER: Final = "envoy.filters.http.router"
_GATEWAY_API: Final = "gateway.networking.k8s.io"

Resource = Mapping[str, Any]


def files(config: Config, target: Target) -> dict[str, str]:
    """Return the ``EnvoyFilter``, and what makes the virtual hosts: a ``VirtualService`` or an ``HTTPRoute``."""
    gateway = target.gateway
    assert gateway is not None
    prefix = config.envoy.name_prefix.lower().replace("_", "-").strip("-")
    name = ObjectName(gateway.namespace, f"{prefix}-dp-extproc" if prefix else "dp-extproc")
    envoy_filter = {"envoyfilter.yaml": render_yaml(_envoy_filter(config, name, gateway, target))}
    if target.selector:
        return {**envoy_filter, "virtualservice.yaml": render_yaml(_virtual_service(name, gateway, target))}
    return {**envoy_filter, "httproute.yaml": render_yaml(_http_route(name, gateway, target))}


def _envoy_filter(config: Config, name: ObjectName, gateway: ObjectName, target: Target) -> Resource:
    by_reference = {"targetRefs": [{"group": _GATEWAY_API, "kind": "Gateway", "name": gateway.name}]}
    by_labels = {"workloadSelector": {"labels": dict(target.selector)}}
    return {
        **_head("networking.istio.io/v1alpha3", "EnvoyFilter", name),
        "spec": {
            **(by_labels if target.selector else by_reference),
            "priority": _PRIORITY,
            "configPatches": list(_patches(config, target)),
        },
    }


def _patches(config: Config, target: Target) -> Iterator[Resource]:
    block = build_block(config)
    for cluster in block.clusters:
        yield _patch("CLUSTER", "ADD", cluster)
    for listener in block.listeners:
        yield _patch("LISTENER", "ADD", listener)
    before_router = {"filterChain": {"filter": {"name": _MANAGER, "subFilter": {"name": _ROUTER}}}}
    yield _patch("HTTP_FILTER", "INSERT_BEFORE", strip_filter(config), listener=before_router)
    for host in target.hostnames:
        virtual_host = {"vhost": {"name": f"{host}:{target.port}"}}
        yield _patch("HTTP_ROUTE", "INSERT_FIRST", entrance_route(config), routeConfiguration=virtual_host)


def _patch(kind: str, operation: str, value: object, **match: object) -> Resource:
    return {
        "applyTo": kind,
        "match": {"context": "GATEWAY", **match},
        "patch": {"operation": operation, "value": value},
    }


def _virtual_service(name: ObjectName, gateway: ObjectName, target: Target) -> Resource:
    """Build what makes the virtual hosts. Its own route refuses what the route of the ``EnvoyFilter`` does not take."""
    reason = f"The EnvoyFilter {name} does not apply to this host and port."
    return {
        **_head("networking.istio.io/v1", "VirtualService", name),
        "spec": {
            "hosts": list(target.hostnames),
            "gateways": [str(gateway)],
            "http": [{"name": "rest", "directResponse": {"status": 503, "body": {"string": reason}}}],
        },
    }


def _http_route(name: ObjectName, gateway: ObjectName, target: Target) -> Resource:
    """Build what makes the virtual hosts. A rule without a backend gets a 500, so it refuses what is left to it."""
    return {
        **_head(f"{_GATEWAY_API}/v1", "HTTPRoute", name),
        "spec": {
            "parentRefs": [{"name": gateway.name, "port": target.port}],
            "hostnames": list(target.hostnames),
            "rules": [{"name": "rest"}],
        },
    }


def _head(version: str, kind: str, name: ObjectName) -> Resource:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name.name, "namespace": name.namespace},
    }
