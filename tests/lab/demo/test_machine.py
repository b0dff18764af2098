"""Test the measured use of processors."""

import subprocess
import sys

import pytest

from dp_extproc.lab.demo import machine
from dp_extproc.lab.demo.machine import Spent

_BURN = "import time\nwhile time.process_time() < 0.5: pass\nprint('burnt', flush=True)\ninput()"


@pytest.mark.skipif(sys.platform != "linux", reason="wants /proc")
def test_own_share_includes_children() -> None:
    """It does so while they run, and when they have ended; the client's share is this process alone."""
    before = Spent.now()
    with subprocess.Popen([sys.executable, "-c", _BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"burnt\n"
        running = Spent.now().since(before)
        child.communicate(b"\n")
    ended = Spent.now().since(before)

    for spent in (running, ended):
        assert spent.machine is not None
        total, busy, own = spent.machine
        assert own >= 45  # hundredths of a second
        assert total >= busy >= 0
        assert spent.client < 0.5
    assert running.plus(ended).seconds == pytest.approx(running.seconds + ended.seconds)


def test_only_the_client_is_measured_without_proc(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On macOS there is no /proc."""
    monkeypatch.setattr(machine, "_PROC", tmp_path_factory.mktemp("empty"))
    share = Spent.now().since(Spent.now()).share()

    assert share.busy is None
    assert share.external is None
    assert share.client >= 0
