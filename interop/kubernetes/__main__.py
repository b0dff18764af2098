"""Test discovery against Kubernetes' own API server: ``make kubernetes-run KUBE_BIN=...``.

It runs in namespaces of its own: Kubernetes refuses loopback addresses in EndpointSlices, and a pod has its credentials
in a fixed folder. The exit status is 0 if everything holds.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from dp_extproc.fleet.discovery.kubernetes import access
from interop.kubernetes import fleet
from interop.kubernetes.cluster import ADDRESS, Cluster
from interop.kubernetes.rollout import rolling_replacement
from interop.kubernetes.source_cases import CASES, Rig
from interop.own_namespace import run_inside
from interop.report import Report

RECORDED = ("service.jsonl", "outage.jsonl")
"""Conversations that a test plays back."""
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "helm")


def run(programs: Path, folder: Path, recordings: Path, only: list[str]) -> Report:
    """Run all cases on one cluster."""
    report = Report("kubernetes")
    account = access.SERVICE_ACCOUNT
    with Cluster(programs, folder) as cluster:
        fleet.prepare(cluster)
        cluster.request("POST", f"{fleet.CORE}/serviceaccounts", {"metadata": {"name": fleet.ACCOUNT}})
        (account / "ca.crt").write_bytes(cluster.ca.read_bytes())
        (account / "namespace").write_text(fleet.NAMESPACE, encoding="utf-8")
        rig = Rig(cluster, programs, account, recordings, report)
        rig.rotate("extproc-0")
        os.environ |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port)}
        for case in (*CASES, rolling_replacement):
            if only and case.__name__ not in only:
                continue
            try:
                case(rig)
            except Exception as error:  # noqa: BLE001 - the other cases run all the same
                traceback.print_exc()
                report.add(case.__name__, f"{type(error).__name__}: {error}"[:300], good=False)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--programs", type=Path, required=True, help="folder with etcd, helm and the programs of Kubernetes"
    )
    parser.add_argument("--recordings", type=Path, help="where to keep what source and API server sent to each other")
    parser.add_argument("--only", action="append", default=[], help="name of a case")
    arguments = parser.parse_args()
    if missing := [name for name in PROGRAMS if not (arguments.programs / name).is_file()]:
        parser.error(f"{arguments.programs} lacks {', '.join(missing)}; build them with interop/kubernetes/build.sh")
    if (status := run_inside("interop.kubernetes")) is not None:
        return status
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", Path("/var/run").resolve()], check=True)
    access.SERVICE_ACCOUNT.mkdir(parents=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "address", "add", f"{ADDRESS}/16", "dev", "lo"], check=True)
    with tempfile.TemporaryDirectory(prefix="dp-extproc-kubernetes-") as scratch:
        folder = Path(scratch)
        (folder / "recordings").mkdir()
        report = run(arguments.programs, folder, folder / "recordings", arguments.only)
        for name in RECORDED if arguments.recordings else ():
            shutil.copy(folder / "recordings" / name, arguments.recordings)
    good = sum(row.good for row in report.rows)
    print(f"{good} of {len(report.rows)} checks hold")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
