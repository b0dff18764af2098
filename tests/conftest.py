"""How property tests run: as thoroughly on a busy machine as on an idle one, for time decides no test.

And that what runs side by side stays apart: each process of pytest-xdist has ports of its own.
"""

import os

from hypothesis import HealthCheck, settings

from dp_extproc.lab.testbed.ports import PART

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ[PART] = f"{int(worker.removeprefix('gw')) + 1}/{os.environ['PYTEST_XDIST_WORKER_COUNT']}"

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
