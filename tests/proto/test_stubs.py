"""The generated code that is committed is what the protos give today, and buf has nothing to say about them."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def test_committed_stubs_are_those_of_the_protos(repository: Path, tmp_path: Path) -> None:
    proto = repository / "proto"
    sources = [path.relative_to(proto).as_posix() for path in sorted(proto.glob("gradwire_proto/v1/*.proto"))]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    roots = ["-I", ".", "-I", sysconfig.get_path("purelib")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *roots, *outputs, *sources], cwd=proto, check=True)
    generated = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    committed = {path.relative_to(proto): path.read_text() for path in proto.glob("gradwire_proto/v1/*_pb2*.py*")}
    assert sources and sorted(generated) == sorted(committed)
    differing = [str(path) for path, text in generated.items() if committed[path] != text]
    assert not differing, "run `make stubs`"


def test_protos_keep_the_rules_of_buf_yaml(repository: Path) -> None:
    lint = subprocess.run([sys.executable, "proto/buf_lint.py"], cwd=repository, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_every_package_says_that_it_is_typed(repository: Path) -> None:
    packages = ["proto/gradwire_proto", "client/gradwire", "server/gradwire_server", "workers/gradwire_workers"]
    assert all((repository / package / "py.typed").is_file() for package in packages)
