"""How models are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gradwire_proto.values import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How models are kept where they do not say so themselves: the settings of the same names."""

    durability: str
    checkpoint_commands: int
    checkpoint_bytes: int
    checkpoint_seconds: float
    keep_checkpoints: int

    def of(self, spec: ModelSpec) -> ModelSpec:
        """The spec, with how its model is kept filled in."""
        durability = spec.durability or self.durability
        if durability == "none":
            return replace(spec, durability=durability, checkpoint_every=0, keep_checkpoints=0)
        return replace(
            spec,
            durability=durability,
            checkpoint_every=spec.checkpoint_every or self.checkpoint_commands,
            keep_checkpoints=spec.keep_checkpoints or self.keep_checkpoints,
        )
