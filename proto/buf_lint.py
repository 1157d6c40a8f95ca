"""Lint the contract's protos by buf.yaml: `python proto/buf_lint.py`. Works offline; exit code 0 where all is well.

buf would fetch the google/api protos from its registry. Here protoc compiles ours against those that the package
googleapis-common-protos brings, and buf lints the result, ours alone.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTO = Path(__file__).resolve().parent


def main() -> int:
    packages, programs = sysconfig.get_path("purelib"), Path(sysconfig.get_path("scripts"))
    sources = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.glob("gradwire_proto/v1/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        image = f"{folder}/image.binpb"
        compiler = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "-I", packages]
        compile_image = [*compiler, "--include_imports", "--include_source_info", "-o", image, *sources]
        lint = [str(programs / "buf"), "lint", image, "--config", "buf.yaml", "--path", "gradwire_proto"]
        for command in (compile_image, lint):
            code = subprocess.run(command, cwd=PROTO, check=False).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
