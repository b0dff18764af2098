"""A configuration made of the flags of the reference endpoint picker of the Gateway API Inference Extension.

Charts pass these flags to any picker. What has no meaning here is accepted, and named in a warning.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from dp_extproc.config.problems import ConfigError, Problem
from dp_extproc.config.source import FixedText
from dp_extproc.variables import escape

READ: Final[Mapping[str, str]] = {
    "pool-name": "InferencePool whose pods are the endpoints",
    "pool-namespace": "its namespace; the variable NAMESPACE, or else that of the service account, if left out",
    "pool-group": "its API group; there is only inference.networking.k8s.io",
    "endpoint-selector": "label selector of pods, in place of an InferencePool",
    "endpoint-target-ports": "ports of these pods, separated by commas",
    "grpc-port": "port for the gateway (9002)",
    "grpc-health-port": "port for health checks, without TLS (9003)",
    "metrics-port": "port of the admin pages (9090)",
    "secure-serving": "whether the gateway has to use TLS (true)",
    "cert-path": "directory with tls.crt and tls.key; a self-signed certificate if left out",
    "drain-timeout": "time to continue after SIGTERM, such as 30s (10s)",
}
"""Flags with a meaning here."""
IGNORED: Final = frozenset({
    "allow-experimental-plugins", "cache-info-metric", "config-file", "config-text",
    "disable-endpoint-subset-filter", "emit-endpoint-scores", "enable-cert-reload", "enable-grpc-stream-metrics",
    "enable-pprof", "grpc-max-recv-msg-size", "grpc-max-send-msg-size", "ha-enable-leader-election",
    "health-checking", "kv-cache-usage-percentage-metric", "kubeconfig", "lora-info-metric", "metrics-cert-dir",
    "metrics-client-ca-file", "metrics-endpoint-auth", "metrics-staleness-threshold",
    "model-server-metrics-https-insecure-skip-verify", "model-server-metrics-path", "model-server-metrics-port",
    "model-server-metrics-scheme", "refresh-metrics-interval", "refresh-prometheus-metrics-interval",
    "tls-cipher-suites", "tls-min-version", "total-queued-requests-metric", "total-running-requests-metric",
    "tracing", "v", "zap-devel", "zap-encoder", "zap-log-level", "zap-stacktrace-level", "zap-time-encoding",
})  # fmt: skip
"""Flags of the reference picker that are accepted without an effect."""

_GROUP: Final = "inference.networking.k8s.io"
_DURATION: Final = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>ms|s|m|h)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_BOOLEANS: Final = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
_WORKERS: Final = "pools[0].workers"


def configure_picker(flags: Mapping[str, str], models: tuple[str, ...], namespace: str) -> FixedText:
    """Make the configuration of flags.

    Args:
        flags: The values of the given flags of :data:`READ`, by name.
        models: The models that are served.
        namespace: The namespace of the InferencePool if no flag names one; empty for that of the service account.

    Raises:
        ConfigError: Flags are missing, do not fit together, or have no valid value.
    """
    flags = {name: value for name, value in flags.items() if value}  # charts pass unset values as empty ones
    problems: list[Problem] = []
    listen: dict[str, Any] = {
        "grpc": f"0.0.0.0:{flags.get('grpc-port', '9002')}",
        "health": f"0.0.0.0:{flags.get('grpc-health-port', '9003')}",
        "admin": f"0.0.0.0:{flags.get('metrics-port', '9090')}",
        # No gateway of this kind addresses a single process.
        "advertise": f"127.0.0.1:{flags.get('grpc-port', '9002')}",
    }
    secure = _BOOLEANS.get(flags.get("secure-serving", "true").lower())
    if secure is None:
        problems.append(Problem(None, "--secure-serving", "write true or false"))
    elif secure:
        path = flags.get("cert-path")
        listen["tls"] = {"self_signed": True} if path is None else {"cert": f"{path}/tls.crt", "key": f"{path}/tls.key"}
    content: dict[str, Any] = {"protocol": "endpoint_picker", "listen": listen}
    if (drain := flags.get("drain-timeout")) is not None:
        content["drain"] = _seconds(drain)
    if flags.get("pool-group", _GROUP) != _GROUP:
        problems.append(Problem(None, "--pool-group", f"only {_GROUP} (version v1) is read"))
    endpoints = list(_endpoints(flags, namespace, problems))
    if problems:
        raise ConfigError("command line", problems)
    content["pools"] = [{"models": list(models), "workers": {"kubernetes": endpoints}}]
    return FixedText("command line", escape(yaml.safe_dump(content, sort_keys=False, allow_unicode=True)))


def _endpoints(flags: Mapping[str, str], namespace: str, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    pool, selector = flags.get("pool-name"), flags.get("endpoint-selector")
    namespace = flags.get("pool-namespace") or namespace
    place = {"namespace": namespace} if namespace else {}
    if (pool is None) == (selector is None):
        problems.append(Problem(None, "--pool-name, --endpoint-selector", "give one of them"))
    elif pool is not None:
        yield {"inference_pool": pool, **place}
    else:
        ports = [port.strip() for port in flags.get("endpoint-target-ports", "").split(",")]
        if not all(port.isdecimal() for port in ports):
            problems.append(Problem(None, "--endpoint-target-ports", "write the ports of the engines, such as 30000"))
            return
        for port in dict.fromkeys(map(int, ports)):
            yield {"pods": selector, "port": port, **place}


def _seconds(text: str) -> str:
    """Rewrite a duration of several units, such as 1m30s. One that cannot be read is left to the loader."""
    parts = list(_DURATION.finditer(text))
    if not parts or "".join(part[0] for part in parts) != text:
        return text
    return f"{sum(float(part['number']) * _SECONDS[part['unit']] for part in parts):g}s"
