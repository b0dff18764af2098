"""Every printed form of Envoy's side, given to an Envoy."""

import asyncio
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final

import yaml

from certificates import Authority
from dp_extproc.config import BodyMode, Config, Supervise, TruncatedStreams
from dp_extproc.envoy_check import Severity, audit
from dp_extproc.envoy_check.reader import read_envoy
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats.target import Target
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import find_envoy
from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.waiting import wait_until

FAILED: Final = "failed"
_ACCEPTED: Final = "accepted"
_START_SECONDS: Final = 30.0
_POOL: Final[Mapping[str, Any]] = {
    "models": ["*"],
    "prefill": {"endpoints": ["http://127.0.0.1:1"]},
    "decode": {"endpoints": ["http://127.0.0.1:2"]},
}
_NO_BODIES: Final[Mapping[str, Any]] = {"routing_fields": "headers", "policy": {"affinity": {"prefixes": False}}}

_TEAM: Final = """\
admin: {address: {socket_address: {address: 127.0.0.1, port_value: ADMIN}}}
static_resources:
  listeners:
    - name: edge
      address: {socket_address: {address: 127.0.0.1, port_value: PORT}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: edge
                route_config:
                  virtual_hosts:
                    - {name: llm, domains: [llm.example.com], routes: []}
                    - {name: other, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 204}}]}
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
"""  # noqa: E501
"""A bootstrap of another team, to which the parts are added."""


def check_forms(tell: Callable[[str], object]) -> dict[str, str]:
    """Give every form to the Envoy of the environment.

    Returns:
        For each form whether it is accepted, or the reason that it is not.
    """
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="dp-extproc-forms-") as name:
        authority = Authority.found(Path(name) / "authority")
        for form, config in _configurations(authority):
            path = Path(name) / "envoy.yaml"
            path.write_text(FORMS["bootstrap"].files(config, Target())["envoy.yaml"], encoding="utf-8")
            found[f"bootstrap, {form}"] = _validate(path)
        for form in ("bootstrap", "parts", "xds"):
            folder = Path(name) / form
            folder.mkdir()
            found[f"{form}, started"] = _start(form, folder)
    for form, result in found.items():
        if FAILED in result:
            tell(f"{form}: {result}")
    return found


def _configurations(authority: Authority) -> Iterator[tuple[str, Config]]:
    """Yield configurations with each setting that changes what is printed."""
    for mode, supervision, ending in product(BodyMode, Supervise, TruncatedStreams):
        pool = {**_POOL, **(_NO_BODIES if mode is BodyMode.NONE else {})}
        envoy = {"body_mode": mode, "truncated_streams": ending}
        content = {"pools": [pool], "envoy": envoy, "supervision": {"mode": supervision}}
        yield f"{mode}, supervision {supervision}, {ending}", Config.model_validate(content)
    pair = authority.issue("service")
    encrypted = {**_POOL, "prefill": {"endpoints": ["https://127.0.0.1:1"]}}
    encrypted["decode"] = {"endpoints": ["https://127.0.0.1:2"]}
    tls = {"ca": authority.ca, "name": "dp-extproc.test", **pair}
    more: Mapping[str, Mapping[str, Any]] = {
        "TLS to the service": {"listen": {"tls": pair}, "envoy": {"service_tls": tls}},
        "a name of the service": {"envoy": {"service": "dp-extproc:9002"}},
        "standby and workers": {"envoy": {"standby": ["127.0.0.2:9002"]}, "listen": {"workers": 2}},
        "sessions and prefix": {"envoy": {"session_header": "x-session-id", "name_prefix": "llm_"}},
        "no retries": {"retry": {"attempts": 1}},
        "legs of the service": {"prefill_leg": "service"},
        "TLS to engines": {"pools": [encrypted], "engine_tls": {"ca": authority.ca, "names": ["engine.llm"], **pair}},
    }
    for name, sections in more.items():
        yield name, Config.model_validate({"pools": [_POOL], **sections})


def _validate(path: Path) -> str:
    done = subprocess.run(
        [find_envoy(), "--mode", "validate", "--config-path", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return f"{FAILED}: {done.stderr.strip().splitlines()[-1]}"
    return f"{FAILED}: deprecated" if "deprecated" in done.stderr.lower() else _ACCEPTED


def _start(form: str, folder: Path) -> str:
    """Start Envoy with a form, and compare what it made of it: ``--mode validate`` reads no files of listeners."""
    inference, admin, service = free_ports(3)
    addresses = {"inference": f"127.0.0.1:{inference}", "admin": f"127.0.0.1:{admin}"}
    config = Config.model_validate({"pools": [_POOL], "envoy": addresses, "listen": {"grpc": f"127.0.0.1:{service}"}})
    texts = dict(FORMS[form].files(config, Target()))
    if form == "parts":
        texts = {"bootstrap.yaml": _joined(texts, inference, admin)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    main = "envoy.yaml" if form == "bootstrap" else "bootstrap.yaml"
    argv = [find_envoy(), "--config-path", main, "--disable-hot-restart", "--log-level", "warning"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{admin}"
    try:
        wait_until(lambda: loopback.CLIENT.get(f"{url}/ready").is_success, _START_SECONDS, log.read_text)
        found = audit(asyncio.run(read_envoy([url])), config)
    except RuntimeError as error:
        return f"{FAILED}: {str(error).strip().splitlines()[-1]}"
    finally:
        process.kill()
        process.wait()
    errors = [f"{each.code} at {each.place}" for each in found if each.severity is Severity.ERROR]
    return f"{FAILED}: {'; '.join(errors)}" if errors else _ACCEPTED


def _joined(texts: Mapping[str, str], port: int, admin: int) -> str:
    """Add the parts to the bootstrap of another team, as docs/mesh/envoy.md describes it."""
    team = yaml.safe_load(_TEAM.replace("ADMIN", str(admin)).replace("PORT", str(port)))
    block = yaml.safe_load(texts["block.yaml"])
    resources = team["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    manager["route_config"]["virtual_hosts"][0]["routes"] = yaml.safe_load(texts["route.yaml"])
    manager["http_filters"][:0] = yaml.safe_load(texts["filter.yaml"])
    resources["listeners"] += block["static_resources"]["listeners"]
    resources["clusters"] = block["static_resources"]["clusters"]
    team["bootstrap_extensions"] = block["bootstrap_extensions"]
    return yaml.safe_dump(team, sort_keys=False)
