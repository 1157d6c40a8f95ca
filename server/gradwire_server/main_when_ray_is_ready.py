"""The frontend of a supervised service: it is imported while Ray still starts, and joins Ray when that is ready.

`python -m gradwire_server.main_when_ray_is_ready [settings of gradwire_server.main, but for --ray-address]`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ray  # noqa: F401 - takes most of a second, which passes while Ray starts

from gradwire_server import main as frontend
from gradwire_server.processes.ray_head import ADDRESS_FILE_VARIABLE, wait_for_address

if __name__ == "__main__":
    sys.argv.append(f"--ray-address={wait_for_address(Path(os.environ[ADDRESS_FILE_VARIABLE]))}")
    sys.exit(frontend.main())
