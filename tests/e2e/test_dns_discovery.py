"""Engines that come and go by DNS, through real Envoy."""

from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST
from e2e.steady_load import LATE, Departures, steady_load
from fleet.discovery.dns_server import DnsServer, dns_server
from patience import wait_for

ROLES = ("prefill", "decode")


def publish(zone: DnsServer, role: str, engines: list[HostedEngine]) -> None:
    """Change the SRV records of a role in one step."""
    zone.set(f"_http._tcp.{role}.test", "SRV", *(f"0 0 {engine.port} node.test." for engine in engines))


def test_no_request_fails_while_a_fleet_grows_and_shrinks_by_dns() -> None:
    """Each role has two engines, then four, then the two new ones. The others are not picked any more soon after."""
    hosted = HostedEngines()
    flags = ("--dp-attention", "--dp-size", "2", *FAST)
    engines = {role: [hosted.add("--role", role, *flags) for _ in range(4)] for role in ROLES}
    with dns_server() as zone:
        zone.set("node.test", "A", "127.0.0.1")
        source = {"type": "srv", "nameserver": f"127.0.0.1:{zone.port}", "interval": "100ms"}
        pool = {"models": ["*"], **{role: {"dns": {"name": f"_http._tcp.{role}.test", **source}} for role in ROLES}}
        for role in ROLES:
            publish(zone, role, engines[role][:2])
        with hosted, ServiceProcess(write_config([pool])) as service, EnvoyProcess(service.config) as envoy:

            def is_fresh(count: int) -> bool:
                return [each["state"] for each in service.loads()["endpoints"]] == ["fresh"] * count

            wait_for(lambda: is_fresh(4), 30)
            service.wait_until_ready()
            departures = Departures()
            with steady_load(envoy.url) as load:
                load.go_on(0.5)
                for role in ROLES:
                    publish(zone, role, engines[role])
                wait_for(lambda: is_fresh(8), 30)
                load.go_on(0.5)
                for role in ROLES:
                    publish(zone, role, engines[role][2:])
                    departures.left(*engines[role][:2])
                load.go_on(LATE + 1.0)
            load.check()
            departures.check()
            assert is_fresh(4)
            assert all(engine.requests() for role in ROLES for engine in engines[role])
            service.wait_until_idle()
