"""The gateway for which a form is printed: what a configuration of the service does not have."""

from collections.abc import Collection, Sequence
from typing import Final

from msgspec import Struct

GATEWAY: Final = "--gateway"
HOSTNAMES: Final = "--hostname"
PORT: Final = "--port"
LISTENERS: Final = "--listener"
SELECTOR: Final = "--selector"


class ObjectName(Struct, frozen=True):
    """Name of an object in Kubernetes, with its namespace."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Target(Struct, frozen=True):
    """Listeners of a gateway that exists already, and the host names whose requests it passes to the block."""

    gateway: ObjectName | None = None
    hostnames: Sequence[str] = ()
    """Host names of the requests. Without any, all requests are meant."""
    port: int | None = None
    """Port of the first listener."""
    listeners: Sequence[str] = ()
    """Names of the listeners."""
    selector: Sequence[tuple[str, str]] = ()
    """Labels of the gateway's pods, by which a control plane finds them."""

    @property
    def named_gateway(self) -> ObjectName:
        """The gateway, for a form that needs one.

        Raises:
            ValueError: There is none; :func:`mismatch` reports that first.
        """
        if self.gateway is None:
            raise ValueError(f"{GATEWAY} is missing")
        return self.gateway

    @property
    def given(self) -> frozenset[str]:
        """The options that have a value."""
        values = {
            GATEWAY: self.gateway,
            HOSTNAMES: self.hostnames,
            PORT: self.port,
            LISTENERS: self.listeners,
            SELECTOR: self.selector,
        }
        return frozenset(option for option, value in values.items() if value)


_EXAMPLES: Final = {
    GATEWAY: "--gateway default/eg",
    HOSTNAMES: "--hostname llm.example.com",
    PORT: "--port 8080",
    LISTENERS: "--listener http",
    SELECTOR: "--selector istio=ingressgateway",
}


def mismatch(form: str, target: Target, takes: Collection[str], needs: Collection[str]) -> str | None:
    """Return why a form cannot be printed for *target*, and what to do about it.

    Args:
        form: Name of the form.
        target: What the command line gives.
        takes: The options that the form uses.
        needs: Those of them without which it cannot be printed.
    """
    if useless := sorted(target.given.difference(takes)):
        return f"{', '.join(useless)}: --format {form} has no use for it; remove it"
    if missing := sorted(set(needs).difference(target.given)):
        examples = " ".join(_EXAMPLES[option] for option in missing)
        return f"--format {form}: {', '.join(missing)} is missing; add it, such as: {examples}"
    return None
