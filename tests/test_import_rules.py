"""Who may import whom. The rules are what keeps the four packages apart; the source is read, not run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "gradwire_proto": ROOT / "proto/gradwire_proto",
    "gradwire": ROOT / "client/gradwire",
    "gradwire_server": ROOT / "server/gradwire_server",
    "gradwire_workers": ROOT / "workers/gradwire_workers",
}
ALLOWED = {
    "gradwire_proto": set(),
    "gradwire": {"gradwire_proto"},
    "gradwire_server": {"gradwire_proto"},
    "gradwire_workers": {"gradwire_proto"},
}


@dataclass
class Source:
    """What one module imports: `always` when it is imported itself, `later` inside functions."""

    always: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)

    @property
    def all(self) -> set[str]:
        return self.always | self.later


def only_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_statements(body: list[ast.stmt], at_module_level: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Each import that runs (those for type checkers do not), and whether it runs when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_module_level
        elif not only_for_types(node):
            inside = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for block in ("body", "orelse", "finalbody"):
                yield from import_statements(getattr(node, block, []), inside)
            for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
                yield from import_statements(part.body, inside)


def imported_names(node: ast.stmt, module: str, is_package: bool) -> Iterator[str]:
    """The modules that a statement names, submodules of ours told from names inside a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert isinstance(node, ast.ImportFrom)
    base = node.module or ""
    if node.level:
        parents = module.split(".") if is_package else module.split(".")[:-1]
        base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        yield submodule if submodule in paths() else base


@cache
def paths() -> dict[str, Path]:
    """Every module of ours that is written by hand or generated, by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


@cache
def sources() -> dict[str, Source]:
    found = {}
    for module, path in paths().items():
        source = found[module] = Source()
        for node, at_module_level in import_statements(ast.parse(path.read_text()).body):
            names = imported_names(node, module, path.name == "__init__.py")
            (source.always if at_module_level else source.later).update(names)
    return found


def package_of(module: str) -> str:
    return module.split(".")[0]


def modules_of(*packages: str) -> dict[str, Source]:
    return {module: source for module, source in sources().items() if package_of(module) in packages}


def imported_along_with(module: str) -> set[str]:
    """The modules of ours that importing `module` imports, itself included."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in sources() and name not in found:
            found.add(name)
            parents = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)]
            waiting += [*sources()[name].always, *parents]
    return found


@pytest.mark.parametrize("package", FOLDERS)
def test_package_imports_of_ours_only_what_its_rule_allows(package):
    for module, source in modules_of(package).items():
        allowed = ALLOWED[package] | {package}
        if module == "gradwire_server.main":
            allowed = allowed | {"gradwire_workers"}
        ours = {name for name in source.all if package_of(name) in FOLDERS}
        assert not {name for name in ours if package_of(name) not in allowed}, module


def test_workers_know_neither_grpc_nor_the_service_stubs():
    for module in modules_of("gradwire_workers"):
        for reached in imported_along_with(module):
            names = sources()[reached].always | (sources()[reached].later if reached == module else set())
            assert not {name for name in names if package_of(name) in ("grpc", "grpc_status")}, (module, reached)
    for module, source in modules_of("gradwire_workers").items():
        assert not {name for name in source.all if "_pb2_grpc" in name or "gradient_service_pb2" in name}, module


def test_only_the_connection_knows_grpc_in_the_sdk():
    knows = {module for module, source in modules_of("gradwire").items() if "grpc" in map(package_of, source.all)}
    load_test = {"gradwire.load_test.connections", "gradwire.load_test.echo_server"}
    assert knows == {"gradwire.channel", "gradwire.rpc"} | load_test


def test_frontend_and_its_side_of_the_workers_never_import_torch_at_module_level():
    frontend = set().union(*map(imported_along_with, modules_of("gradwire_server")))
    assert "gradwire_workers.worker_group" in frontend
    assert not {module for module in frontend if "torch" in map(package_of, sources()[module].always)}


def test_importing_the_frontend_brings_no_torch():
    code = "import sys, gradwire_server.main; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "False"


def test_no_module_imports_itself_in_a_circle():
    graph = {
        module: {name for name in source.always if name in sources() and name != module}
        for module, source in sources().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
