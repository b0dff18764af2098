"""What the command line of ``envoy-config`` gives about a gateway."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from dp_extproc.cli import main
from dp_extproc.lab.testbed.ports import free_port

ENGINES = ("--prefill", "http://10.0.0.1:30000", "--decode", "http://10.0.0.2:30000")


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--gateway", "eg"], "'eg': write namespace and name, such as default/eg"),
        (["--gateway", "Default/eg"], "'Default/eg': write namespace and name, such as default/eg"),
        (["--hostname", "https://llm"], "'https://llm': write a host name"),
        (["--listener", "a b"], "'a b': write a name of Kubernetes"),
        (["--selector", "istio"], "'istio': write a label of the pods, such as istio=ingressgateway"),
        (["--port", "70000"], "'70000' is no port; write a number from 1 to 65535"),
        (["--keep", "-o", "out"], "--keep is for files that Envoy reads again; add: --format xds -o DIR"),
        (["--keep", "--format", "xds"], "--keep is for files that Envoy reads again; add: --format xds -o DIR"),
        (["--gateway", "default/eg", "--port", "80"], "--gateway, --port: --format bootstrap has no use for it"),
    ],
)
def test_options_of_the_gateway_are_refused_with_a_remedy(
    options: Sequence[str], refusal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["envoy-config", *ENGINES, *options])
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    assert status == 2
    assert refusal in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "remedy"),
    [
        (["parts"], "envoy.cors has no effect with --format parts: it is in front-door.yaml only"),
        (
            ["envoy-gateway", "--gateway", "default/eg", "--listener", "http"],
            "envoy.cors has no effect with --format envoy-gateway: set cors in a SecurityPolicy",
        ),
        (
            ["istio", "--gateway", "default/gw", "--hostname", "llm.test", "--port", "80"],
            "envoy.cors has no effect with --format istio: leave it to the engines",
        ),
        (["bootstrap"], None),
        (["xds"], None),
    ],
)
def test_settings_without_effect_are_named(
    form: Sequence[str], remedy: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The form is printed all the same. Settings with their default are not named."""
    pools = [{"models": ["*"], "workers": {"endpoints": ["http://10.0.0.1:1"]}}]
    envoy = {"accept_http_10": True, "cors": {"allow_origins": ["https://chat.test"]}}
    path = tmp_path / "dp-extproc.yaml"
    path.write_text(yaml.safe_dump({"envoy": envoy, "pools": pools}), encoding="utf-8")

    assert main(["envoy-config", "-c", str(path), "--format", *form]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    assert len(notes) == (remedy is not None)
    assert all(line.startswith(remedy or "") for line in notes)


def test_blocks_of_old_files_are_kept_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without ``--keep``, only the new block is left. With it, a note says that no Envoy confirms the new one."""
    pools = [{"models": ["*"], "workers": {"endpoints": ["http://10.0.0.1:1"]}}]
    path = tmp_path / "dp-extproc.config"
    path.write_text(yaml.safe_dump({"envoy": {"admin": f"127.0.0.1:{free_port()}"}, "pools": pools}), encoding="utf-8")
    xds = ["envoy-config", "-c", str(path), "--format", "xds", "-o", str(tmp_path)]

    def names(file: str) -> set[str]:
        return {each["name"] for each in yaml.safe_load((tmp_path / file).read_text(encoding="utf-8"))["resources"]}

    assert main(xds) == 0
    old = names("lds.yaml"), names("cds.yaml")
    assert main([*xds, "--name-prefix", "new-", "--keep"]) == 0
    assert "give it cds.yaml, lds.yaml, rds.yaml one by one" in capsys.readouterr().err
    assert "new-inference" in (tmp_path / "rds.yaml").read_text(encoding="utf-8")
    both = names("lds.yaml"), names("cds.yaml")
    assert main([*xds, "--name-prefix", "new-"]) == 0
    new = names("lds.yaml"), names("cds.yaml")

    (listeners, clusters), front_doors = both, {"inference", "new-inference"}
    assert listeners - front_doors == (old[0] | new[0]) - front_doors
    assert clusters == old[1] | new[1]
    assert old[1].isdisjoint(new[1])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_files_that_are_not_resources_are_no_old_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They stay as they are."""
    (tmp_path / "lds.yaml").write_text("listeners: []", encoding="utf-8")

    status = main(["envoy-config", *ENGINES, "--format", "xds", "-o", str(tmp_path), "--keep"])

    assert status == 1
    assert "lds.yaml has no list of named resources; move it away" in capsys.readouterr().err
    assert (tmp_path / "lds.yaml").read_text(encoding="utf-8") == "listeners: []"
