"""Programs on a rank: graphs that a client exported, rebuilt against the operator allowlist."""

from gradwire_workers.programs.build import add_variant, build_program
from gradwire_workers.programs.built_program import BuiltProgram

__all__ = ["BuiltProgram", "add_variant", "build_program"]
