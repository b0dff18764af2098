"""Packages import in one direction, pure ones have no effects, and modules stay short."""

import ast
from pathlib import Path

import pytest

import dp_extproc

ROOT = Path(dp_extproc.__file__).parent

LAYERS = (
    {"__main__"},
    {"cli"},
    {"lab.demo"},
    {"lab.testbed", "lab.simulate"},
    {"lab.workload"},
    {"lab.engine"},
    {"runtime"},
    {"observability", "envoy_check"},
    {"extproc", "fleet", "sync.transport", "envoy_config"},
    {"legs"},
    {"attempt"},
    {"scheduling", "sync"},
    {"load"},
    {"estimators", "prefix_cache"},
    {"engines"},
    {"request", "response"},
    {"config"},
    {"background", "contract", "settled", "variables"},
)
"""Packages from top to bottom. A package imports from rows below its own, never from above, nor from its neighbours."""
PURE = {
    *("attempt", "scheduling", "sync", "load", "estimators", "prefix_cache", "engines", "request", "response"),
    *("config", "contract", "variables", "lab.workload"),
}
"""Packages of LAYERS that do no I/O and have no clock and no randomness of their own: all of their modules."""
PURE_IN_LAB = {
    *("lab/engine/scheduler/", "lab/engine/text.py", "lab/demo/jobs.py", "lab/demo/estimate.py"),
    *(
        f"lab/simulate/{name}.py"
        for name in ("fleet", "engines", "decode", "workers", "simulation", "routers", "settings", "outcome")
    ),
}
"""Files and folders in packages of the lab that start processes or ask the time elsewhere."""
IMPURE = {
    *("asyncio", "grpc", "httpx", "logging", "os", "socket", "subprocess", "threading", "time", "uvloop"),
}
READS_THE_FILE = "config/source.py"
"""It takes a path, and may read it with pathlib; nothing else in a pure package does."""
CONFINED = {
    "aiohttp": {"legs"},
    "grpc": {"extproc", "runtime"},
    "httpx": {"cli", "fleet", "runtime", "envoy_check", "lab.demo", "lab.engine", "lab.testbed"},
}
"""Libraries that belong to some packages alone."""
MOST_LINES = 400
"""Of a module, with docstrings. A longer one has more than one job."""
EVERY_MODULE = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports_of(module: str) -> set[str]:
    """Name everything a module imports, also inside functions: ``package.module`` or ``package.module.name``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(name: str) -> str:
    """Find the module that an import of this project's leads to."""
    parts = name.split(".")[1:]
    for path in ("/".join(parts) + ".py", "/".join(parts[:-1]) + ".py", "/".join(parts[:-1]) + "/__init__.py"):
        if (ROOT / path).is_file():
            return path
    raise AssertionError(name)


def package_of(module: str) -> str:
    """Name the entry of LAYERS that a module belongs to; the longest that fits counts."""
    name = module.removesuffix(".py").replace("/", ".")
    entries = [each for row in LAYERS for each in row if f"{name}.".startswith(f"{each}.")]
    return max(entries, key=len, default=name)


def imported_by(module: str) -> set[str]:
    """Find the modules of this project that a module imports. The root has the version alone, free for all."""
    names = {name for name in imports_of(module) if name.startswith("dp_extproc.")} - {"dp_extproc.__version__"}
    return {file_of(name) for name in names} - {module}


PURE_MODULES = [
    module for module in EVERY_MODULE if package_of(module) in PURE or module.startswith(tuple(PURE_IN_LAB))
]


def test_every_pure_part_is_there() -> None:
    """A part that was moved is not silently left unchecked."""
    assert set().union(*LAYERS) >= PURE
    assert [entry for entry in PURE_IN_LAB if not (ROOT / entry).exists()] == []
    assert len(PURE_MODULES) > 60


@pytest.mark.parametrize("module", PURE_MODULES)
def test_a_pure_module_has_no_effects(module: str) -> None:
    """Clocks, chance and whatever comes from outside are handed in; of ``random`` only the type is named."""
    imports = imports_of(module)
    packages = {name.partition(".")[0] for name in imports}
    assert packages & IMPURE == set()
    assert {name for name in imports if name.partition(".")[0] == "random"} <= {"random.Random"}
    assert "datetime.now" not in (ROOT / module).read_text(encoding="utf-8")
    assert ("pathlib" in packages) == (module == READS_THE_FILE)


@pytest.mark.parametrize("module", PURE_MODULES)
def test_a_pure_module_imports_pure_modules_alone(module: str) -> None:
    """An effect must not come in through another module."""
    assert imported_by(module) <= set(PURE_MODULES)


@pytest.mark.parametrize("library", sorted(CONFINED))
def test_a_library_is_imported_by_its_packages_alone(library: str) -> None:
    """Whoever exchanges gRPC or the HTTP client finds all uses in a few places."""
    users = {
        package_of(module)
        for module in EVERY_MODULE
        if any(name.partition(".")[0] == library for name in imports_of(module))
    }
    assert users <= CONFINED[library]


@pytest.mark.parametrize("module", EVERY_MODULE)
def test_a_module_is_short(module: str) -> None:
    """It can be read in one go."""
    assert len((ROOT / module).read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_every_package_has_a_layer() -> None:
    """A new one is put into the list."""
    roots = {"__init__", "lab.__init__"}
    assert {package_of(module) for module in EVERY_MODULE} - roots == set().union(*LAYERS)


def test_packages_import_from_lower_layers_alone() -> None:
    """A reader of one package never has to know what stands above it."""
    rows = {package: row for row, packages in enumerate(LAYERS) for package in packages}
    broken = {
        (package, other.removesuffix(".py").replace("/", "."))
        for module in EVERY_MODULE
        if (package := package_of(module)) in rows
        for other in imported_by(module)
        if package_of(other) != package and rows[package_of(other)] <= rows[package]
    }
    assert broken == set()


def test_no_modules_import_each_other() -> None:
    """Also not through others, nor for types alone."""
    reached = {module: imported_by(module) for module in EVERY_MODULE}
    grown = True
    while grown:
        grown = False
        for module, known in reached.items():
            further = set().union(known, *(reached[other] for other in known))
            if further != known:
                reached[module], grown = further, True
    circles = {
        frozenset(other for other in known if module in reached[other])
        for module, known in reached.items()
        if module in known
    }
    assert circles == set()


def test_kinds_of_engines_are_compared_by_their_adapters_alone() -> None:
    """Whatever differs between kinds of engines is a member of the adapter, so a new kind changes nothing else."""
    users = {module for module in EVERY_MODULE if "dp_extproc.engines.model.Kind" in imports_of(module)}

    assert {package_of(module) for module in users} == {"engines"}


@pytest.mark.parametrize("module", EVERY_MODULE)
def test_a_module_waits_with_asyncio_timeout(module: str) -> None:
    """``asyncio.wait_for`` of Python 3.11 loses a cancellation that comes when its wait ends, so a stop would hang."""
    calls = [node.attr for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8")))
             if isinstance(node, ast.Attribute)]  # fmt: skip

    assert "wait_for" not in calls
