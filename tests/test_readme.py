"""The README tells the truth: its tree is the folders' tree, and the commands that it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from benchmarks.report import block
from typer.main import get_group

import gradwire
from gradwire.cli import app
from gradwire_server.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Everything set as code: what a reader may type.
TYPED = "\n".join([*re.findall(r"`([^`\n]+)`", README), *(text for _, text in BLOCKS)])
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
# Every file in these folders stands in the tree; generated stubs share one line.
FOLDERS = ["proto/gradwire_proto", "client", "server/gradwire_server", "workers/gradwire_workers"]


def paths_in_the_tree() -> list[str]:
    """Paths from the repository's root. Two spaces more mean one folder deeper; ` · ` parts names on one line."""
    (tree,) = [text for _, text in BLOCKS if "proto/gradwire_proto/" in text and "workers/gradwire_workers/" in text]
    found, parents = [], [""]
    for line in filter(str.strip, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split(" · ")
        found += [parents[depth] + name for name in names]
        parents[depth + 1 :] = [parents[depth] + names[0]]
    return found


def test_every_path_in_the_tree_exists():
    assert not [path for path in paths_in_the_tree() if not any(ROOT.glob(path))]


def test_every_file_has_its_line_in_the_tree():
    listed, missing = set(paths_in_the_tree()), []
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name not in listed and "_pb2" not in name and path.name != "__init__.py":
            promise = ast.get_docstring(ast.parse(path.read_text())) or ""
            missing.append(f"{name}  {promise.splitlines()[:1]}")
    assert not missing, "\n".join(["README's tree lacks", *sorted(missing)])


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", TYPED))
    assert {"demo", "test", "lint", "bench-gpu"} <= named <= targets


@pytest.mark.parametrize("target", ["make bench", "make bench-gpu"])
def test_figures_are_those_of_the_last_run_in_the_results(target):
    results = (ROOT / "tests/benchmarks/RESULTS.md").read_text()
    assert block(README, target) == block(results, target) != ""


def test_subcommands_that_are_named_exist():
    named = set(re.findall(r"(?:^|/)gradwire ([a-z][a-z-]*)", TYPED, re.MULTILINE))
    assert {"serve", "demo"} <= named <= set(get_group(app).commands)


def test_settings_of_the_table_exist_and_none_that_durability_depends_on_is_left_out():
    table = README.split("| setting |", 1)[1].split("\n\n", 1)[0]
    named = {name for row in re.findall(r"^\|([^|]*)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    settings = set(ServerConfig.model_fields)
    durable = {name for name in settings if re.match("storage|durability|checkpoint_|keep_|stored_|spare_", name)}
    assert durable <= named <= settings


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_python_and_use_names_that_exist(program):
    used = {
        node.attr
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gradwire"
    }
    assert not {name for name in used if not hasattr(gradwire, name)}
