"""The ways in which prefill legs are sent, and what is in front of the engines in each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import yaml

from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import load_gateway
from interop.servers import RealEngine

FORMS: Final[dict[str, dict[str, Any]]] = {
    "envoy": {},
    "service": {"prefill_leg": "service"},
    "picker": {"protocol": "endpoint_picker", "picker": {"hold": "10s"}},
}
"""The keys of the configuration that make a form."""


@contextmanager
def run_form(form: str, prefill: RealEngine, decode: RealEngine) -> Iterator[str]:
    """Run the service, and the bundled Envoy or the example of another gateway; give the URL for clients."""
    pool = {
        "models": ["*"],
        "prefill": {"endpoints": [{"url": prefill.url, "bootstrap_port": prefill.bootstrap_port}]},
        "decode": {"endpoints": [decode.url]},
        "policy": {"client_dp_rank": "honour"},
    }
    with ServiceProcess(write_config([pool], **FORMS[form])) as service:
        gateway = None
        if form == "picker":
            gateway = yaml.safe_dump(load_gateway(service.config, [decode.port], "endpoint-picker-pd.yaml"))
        with EnvoyProcess(service.config, bootstrap=gateway) as envoy:
            service.wait_until_fresh()
            service.wait_until_ready()
            yield envoy.url
            service.wait_until_idle()
