"""Test Envoy and the service in front of real SGLang engines: ``make interop``.

The exit status is 0 if everything works.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import httpx

from interop.cases import CASES, PATIENCE_SECONDS, Rig, unified_answers, unified_echoes, unified_logprobs
from interop.forms import FORMS, run_form
from interop.record import record_logprobs
from interop.report import Report
from interop.servers import SHAPES, RealEngine, Shape, run_engines


def run(shape: Shape, forms: Sequence[str], venv: Path, folder: Path, report: Report) -> None:
    """Test everything on engines of one shape, with each of the forms in turn."""
    report.shape = shape.name
    unified, prefill, decode = (RealEngine(role, shape, venv, folder) for role in ("unified", "prefill", "decode"))
    began = time.monotonic()
    with httpx.Client(timeout=PATIENCE_SECONDS, trust_env=False) as client:
        with run_engines(unified):
            answers, logprobs = unified_answers(client, unified), unified_logprobs(client, unified)
            echoes = unified_echoes(client, unified)
        with run_engines(prefill, decode):
            record_logprobs(client, prefill, decode, folder / "recorded" / shape.model)
            print(f"{shape.name}: engines are up after {time.monotonic() - began:.0f} s", flush=True)
            for form in forms:
                for engine in (prefill, decode):
                    engine.restart_if_killed()
                report.shape = f"{shape.name}, prefill leg by {form}"
                with run_form(form, prefill, decode) as url:
                    rig = Rig(client, url, prefill, decode, answers, logprobs, echoes, report, form)
                    for case in CASES:
                        try:
                            case(rig)
                        except Exception as error:  # noqa: BLE001 - the other cases run all the same
                            traceback.print_exc()
                            report.add(case.__name__, f"{type(error).__name__}: {error}"[:200], good=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True, help="where SGLang is installed")
    parser.add_argument("--run", type=Path, required=True, help="folder with the models")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this one")
    parser.add_argument("--form", choices=FORMS, action="append", help="only this way to send prefill legs")
    arguments = parser.parse_args()
    report = Report()
    for name in arguments.shape or SHAPES:
        run(SHAPES[name], arguments.form or list(FORMS), arguments.venv, arguments.run, report)
    print(f"\n{report.table()}")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
