"""What the command line of ``envoy-config`` gives about a gateway."""

from collections.abc import Sequence

import pytest

from dp_extproc.cli import main

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
