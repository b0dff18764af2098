"""The pure core stays pure: no I/O, no clock, no chance of its own, and nothing of the adapters around it."""

import ast
from pathlib import Path

import pytest

import dp_extproc

ROOT = Path(dp_extproc.__file__).parent

CORE = [
    *("contract.py", "config", "request", "response", "engines", "estimators", "prefix_cache", "load", "scheduling"),
    *("attempt", "sync"),
    *("lab/workload", "lab/engine/scheduler", "lab/engine/text.py"),
    *(f"lab/simulate/{name}.py" for name in ("fleet", "engines", "simulation", "routers", "settings", "outcome")),
    *(f"lab/demo/{name}.py" for name in ("jobs", "estimate")),
]
ADAPTERS_WITHIN = ["sync/transport"]
"""Packages inside of pure ones that are not."""
IMPURE = {
    "asyncio",
    "grpc",
    "httpx",
    "socket",
    "time",
    "threading",
    "subprocess",
    "os",
    "uvloop",
    "logging",
}
READS_THE_FILE = "config/loader.py"
"""It takes a path, and may read it with pathlib; nothing else in the core does."""

LAYERS = (
    {"__main__"},
    {"cli"},
    {"lab.demo"},
    {"lab.testbed", "lab.simulate"},
    {"lab.workload"},
    {"lab.engine"},
    {"runtime"},
    {"observability"},
    {"extproc", "fleet", "sync.transport", "envoy_config"},
    {"attempt"},
    {"scheduling", "sync"},
    {"load"},
    {"estimators", "prefix_cache"},
    {"engines"},
    {"request", "response"},
    {"config"},
    {"background", "contract"},
)
"""Packages from top to bottom. A package imports from rows below its own, never from above, nor from its neighbours."""

EVERY_MODULE = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for entry in CORE
    for path in ([ROOT / entry] if entry.endswith(".py") else (ROOT / entry).glob("**/*.py"))
    if not any(path.is_relative_to(ROOT / adapter) for adapter in ADAPTERS_WITHIN)
)


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


def test_every_part_of_the_core_is_there() -> None:
    """A part that was moved is not silently left unchecked."""
    assert [entry for entry in CORE if not (ROOT / entry).exists()] == []
    assert len(MODULES) > 20


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_core_is_pure(module: str) -> None:
    """Clocks, chance and whatever comes from outside are handed in; of ``random`` only the type is named."""
    imports = imports_of(module)
    packages = {name.partition(".")[0] for name in imports}
    assert packages & IMPURE == set()
    assert {name for name in imports if name.partition(".")[0] == "random"} <= {"random.Random"}
    assert "datetime.now" not in (ROOT / module).read_text(encoding="utf-8")
    assert ("pathlib" in packages) == (module == READS_THE_FILE)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_core_leans_on_the_core_alone(module: str) -> None:
    """What the core imports of this project belongs to the core, too."""
    ours = {file_of(name) for name in imports_of(module) if name.startswith("dp_extproc.")}
    assert ours <= set(MODULES)


def package_of(module: str) -> str:
    """Name the entry of LAYERS that a module belongs to; the longest that fits counts."""
    name = module.removesuffix(".py").replace("/", ".")
    entries = [each for row in LAYERS for each in row if f"{name}.".startswith(f"{each}.")]
    return max(entries, key=len, default=name)


def imported_by(module: str) -> set[str]:
    """Find the modules of this project that a module imports. The root has the version alone, free for all."""
    names = {name for name in imports_of(module) if name.startswith("dp_extproc.")} - {"dp_extproc.__version__"}
    return {file_of(name) for name in names} - {module}


def test_every_package_has_a_layer() -> None:
    """A new one is put into the list."""
    roots = {"__init__", "lab.__init__"}
    assert {package_of(module) for module in EVERY_MODULE} - roots == set().union(*LAYERS)


def test_packages_import_from_lower_layers_alone() -> None:
    """The rooms of the project have one direction."""
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
