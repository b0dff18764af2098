"""Run the scenarios through Envoy Gateway: ``make envoy-gateway-run MESH_BIN=...``.

Envoy Gateway's ports are fixed, so it runs in a network namespace of its own. The exit status is 0 if everything holds.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dp_extproc.lab.testbed.envoy import find_envoy
from interop.envoy_gateway import picker
from interop.envoy_gateway.api_server import checked_by_api_server
from interop.envoy_gateway.cases import (
    CASES,
    HOST,
    NEIGHBOUR,
    OTHER_GATEWAYS,
    Rig,
    accepted,
    neighbour_of,
    printed,
)
from interop.envoy_gateway.control_plane import ControlPlane
from interop.kubernetes.cluster import ADDRESS
from interop.mesh.scenarios import run_scenarios
from interop.mesh.site import Fleet, Neighbour, Site, open_site, run_fleet
from interop.own_namespace import run_inside
from interop.report import Report


@contextmanager
def run_gateway(plane: ControlPlane, fleet: Fleet, neighbour: Neighbour, report: Report, gateway: str) -> Iterator[Rig]:
    """Run Envoy Gateway with the resources of the gateway, of a neighbour, and ours."""
    texts = printed(fleet.config)
    plane.apply("gateway", gateway)
    plane.apply("neighbour", neighbour_of(neighbour.port))
    plane.apply("ours", texts["dp-extproc.yaml"])
    with plane, open_site(fleet, plane, HOST, NEIGHBOUR, report) as site:
        yield Rig(site, plane, texts)


def run(program: Path, envoy: Path, folder: Path, arguments: argparse.Namespace) -> Report:
    """Run everything with one Envoy."""
    version = subprocess.run([envoy, "--version"], check=True, capture_output=True, text=True).stdout
    report = Report(f"Envoy {re.findall(r'/([0-9.]+)/', version)[0]}")

    def plane_of(name: str) -> ControlPlane:
        return ControlPlane(program, envoy, folder / name)

    modes = [each for each in picker.MODES if not arguments.only or each in arguments.only]
    with Neighbour() as neighbour:
        if set(arguments.only) - set(modes) or not arguments.only:
            run_printed(plane_of, neighbour, report, arguments)
        if modes:
            with run_fleet(**picker.SECTIONS) as fleet:
                for mode in modes:
                    with picker.run_gateway(plane_of(mode), fleet, neighbour, report, mode) as rig:
                        run_scenarios(rig.site, [*(_for(rig, case) for case in picker.CASES), *picker.SCENARIOS])
    return report


def run_printed(
    plane_of: Callable[[str], ControlPlane], neighbour: Neighbour, report: Report, arguments: argparse.Namespace
) -> None:
    """Run everything that the printed resources are for."""
    only = arguments.only
    with run_fleet(prefill_leg=arguments.prefill_leg) as fleet:
        gateway = printed(fleet.config)["gateway.yaml"]
        with run_gateway(plane_of("gateway"), fleet, neighbour, report, gateway) as rig:
            accepted(rig, arguments.recordings)
            run_scenarios(rig.site, only=only)
            run_scenarios(rig.site, [_for(rig, case) for case in CASES], only)
        for what, (text, case) in OTHER_GATEWAYS.items():
            if only and what not in only:
                continue
            with run_gateway(plane_of(what), fleet, neighbour, report, text(gateway)) as rig:
                run_scenarios(rig.site, [_for(rig, case)])


def _for(rig: Rig, case: Callable[[Rig], None]) -> Callable[[Site], None]:
    def scenario(_: Site) -> None:
        case(rig)

    scenario.__name__ = case.__name__
    return scenario


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=Path, required=True, help="folder with envoy-gateway")
    parser.add_argument(
        "--envoy",
        type=Path,
        action="append",
        default=[],
        help="an Envoy to run with; may be repeated (that of the tests)",
    )
    parser.add_argument("--recordings", type=Path, help="folder for what Envoy Gateway makes of the resources")
    parser.add_argument("--prefill-leg", choices=("envoy", "service"), default="envoy", help="prefill_leg")
    parser.add_argument("--only", action="append", default=[], help="name of a case")
    arguments = parser.parse_args()
    program = arguments.programs / "envoy-gateway"
    if not program.is_file():
        parser.error(f"{program} is missing; build it with interop/mesh/build.sh")
    if (status := run_inside("interop.envoy_gateway")) is not None:
        return status
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "address", "add", f"{ADDRESS}/16", "dev", "lo"], check=True)
    reports = [Report("API server")]
    with tempfile.TemporaryDirectory(prefix="dp-extproc-envoy-gateway-") as scratch:
        checked_by_api_server(arguments.programs, Path(scratch), reports[0])
    for envoy in arguments.envoy or [Path(find_envoy())]:
        with tempfile.TemporaryDirectory(prefix="dp-extproc-envoy-gateway-") as scratch:
            reports.append(run(program, envoy, Path(scratch), arguments))
    rows = [row for report in reports for row in report.rows]
    print(f"{sum(row.good for row in rows)} of {len(rows)} checks hold")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
