"""Run the scenarios through gateways that Istio configures: ``make istio-run MESH_BIN=...``.

Istio's control plane runs beside Kubernetes' API server, in a network namespace of its own: Kubernetes refuses loopback
addresses of pods. The gateway is Envoy's own release (``DP_EXTPROC_ENVOY`` names another one). The exit status is 0 if
everything holds.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from dp_extproc.config import Config
from dp_extproc.lab.testbed.envoy import find_envoy
from dp_extproc.lab.testbed.ports import free_port
from interop.istio.cases import (
    CASES,
    CLASSIC_CASES,
    Case,
    Rig,
    engines_are_dialled_by_tls,
    extension_is_doubled,
    resources_are_accepted,
)
from interop.istio.control_plane import DEFINITIONS, ControlPlane
from interop.istio.gateways import (
    CLASSIC,
    HOST,
    KINDS,
    NEIGHBOUR,
    Kind,
    backend,
    prepare,
    printed,
    run_envoy,
    with_free_ports,
    with_settings,
)
from interop.istio.inference_pool import run_inference_pool
from interop.istio.mutual_tls import run_strict_fleet
from interop.kubernetes.cluster import ADDRESS, Cluster
from interop.mesh.scenarios import run_scenarios
from interop.mesh.site import Fleet, Neighbour, Site, open_site, run_fleet
from interop.own_namespace import run_inside
from interop.report import Report

PROGRAMS: Final = ("etcd", "kube-apiserver", "kube-controller-manager", "pilot-discovery", *DEFINITIONS)
_NAME: Final = "dp-extproc.llm.svc.cluster.local"
"""Name of the service, which has one address."""
_SHORT_DRAIN: Final = 2
_ISTIOS_DRAIN: Final = 45


@contextmanager
def run_gateway(
    plane: ControlPlane,
    kind: Kind,
    fleet: Fleet,
    config: Config,
    report: Report,
    *,
    extensions: int = 1,
    drain_seconds: int = _ISTIOS_DRAIN,
    secrets: Path | None = None,
) -> Iterator[Rig]:
    """Run the Envoy of a gateway, with the clients of both hosts."""
    with (
        run_envoy(plane, kind, config, extensions=extensions, drain_seconds=drain_seconds, secrets=secrets) as envoy,
        open_site(fleet, envoy, HOST, NEIGHBOUR, report) as site,
    ):
        yield Rig(plane, kind, envoy, site, drain_seconds)


def run(programs: Path, folder: Path, arguments: argparse.Namespace) -> Report:
    """Run everything with the block, and then with an InferencePool."""
    report = Report()
    with Neighbour() as neighbour, Cluster(programs, folder) as cluster, ControlPlane(programs, cluster) as plane:
        plane.apply(backend(neighbour.port))
        if arguments.way in {"block", None}:
            run_block(plane, folder, report, arguments)
        if arguments.way in {"inference-pool", None}:
            run_inference_pool(plane, report, arguments.only, tls=not arguments.plain_picker)
    return report


def run_block(plane: ControlPlane, folder: Path, report: Report, arguments: argparse.Namespace) -> None:
    """Run everything on both kinds of gateways, and what differs in one thing on the first."""
    only = arguments.only
    grpc_port = free_port()
    # As in Kubernetes, Envoy finds the service by a name that may have several addresses.
    envoy = {"body_mode": arguments.body_mode, "service": f"{_NAME}:{grpc_port}"}
    listen = {"grpc": f"127.0.0.1:{grpc_port}"}
    with run_fleet(listen=listen, envoy=envoy, prefill_leg=arguments.prefill_leg) as fleet:
        for kind in KINDS:
            report.shape = kind.title
            config = fleet.config if kind is CLASSIC else with_free_ports(fleet.config)
            prepare(plane, kind, config.envoy.inference.port)
            with run_gateway(plane, kind, fleet, config, report) as rig:
                _run_cases(rig, [partial(resources_are_accepted, recorded=arguments.recordings)])
                run_scenarios(rig.site, only=only)
                _run_cases(rig, CASES, only)
            if kind is CLASSIC:
                with run_gateway(plane, kind, fleet, config, report, drain_seconds=_SHORT_DRAIN) as rig:
                    _run_cases(rig, CLASSIC_CASES, only)
                with run_gateway(plane, kind, fleet, config, report, extensions=2) as rig:
                    _run_cases(rig, [extension_is_doubled], only)
            for each in reversed(printed(fleet.config, kind.target(HOST))):
                plane.delete(each)
        report.shape = f"{CLASSIC.title}, mutual TLS"
        with run_strict_fleet(folder, prefill_leg=arguments.prefill_leg) as (strict, agent):
            config = with_settings(strict.config, inference=fleet.config.envoy.inference)
            with run_gateway(plane, CLASSIC, strict, config, report, secrets=agent) as rig:
                _run_cases(rig, [resources_are_accepted])
                run_scenarios(rig.site, only=only)
                _run_cases(rig, [engines_are_dialled_by_tls])


def _run_cases(rig: Rig, cases: Sequence[Case], only: Sequence[str] = ()) -> None:
    run_scenarios(rig.site, [_scenario(rig, case) for case in cases], only)


def _scenario(rig: Rig, case: Case) -> Callable[[Site], None]:
    def scenario(_: Site) -> None:
        case(rig)

    scenario.__name__ = getattr(case, "__name__", "resources_are_accepted")
    return scenario


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=Path, required=True, help="folder with the programs of Kubernetes and Istio")
    parser.add_argument(
        "--body-mode", choices=("buffered", "full_duplex_streamed"), default="buffered", help="envoy.body_mode"
    )
    parser.add_argument("--prefill-leg", choices=("envoy", "service"), default="envoy", help="prefill_leg")
    parser.add_argument("--way", choices=("block", "inference-pool"), help="run only this one")
    parser.add_argument("--plain-picker", action="store_true", help="let the InferencePool's gateway use no TLS")
    parser.add_argument("--only", action="append", default=[], help="name of a scenario or case")
    parser.add_argument("--recordings", type=Path, help="where to keep what Istio makes of the printed resources")
    arguments = parser.parse_args()
    if missing := [name for name in PROGRAMS if not (arguments.programs / name).is_file()]:
        builders = "interop/mesh/build.sh and interop/kubernetes/build.sh"
        parser.error(f"{arguments.programs} lacks {', '.join(missing)}; build them with {builders}")
    if (status := run_inside("interop.istio")) is not None:
        return status
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "address", "add", f"{ADDRESS}/16", "dev", "lo"], check=True)
    version = subprocess.run([find_envoy(), "--version"], check=True, capture_output=True, text=True).stdout
    print("Envoy", re.findall(r"/(\d[\d.]+)/", version)[-1])
    with tempfile.TemporaryDirectory(prefix="dp-extproc-istio-") as scratch:
        names = Path(scratch) / "hosts"
        names.write_text(f"127.0.0.1 localhost {_NAME}\n", encoding="utf-8")
        subprocess.run(["mount", "--bind", names, "/etc/hosts"], check=True)
        report = run(arguments.programs, Path(scratch), arguments)
    good = sum(row.good for row in report.rows)
    print(f"{good} of {len(report.rows)} checks hold")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
