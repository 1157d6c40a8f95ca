"""What a rank does for kernels: has them compiled, compares them with eager passes, and takes them into use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradwire_proto.autocast import AUTOCAST_TYPES
from gradwire_workers.kernels.rank_kernels import RankKernels
from gradwire_workers.shard import Shard
from gradwire_workers.training.attempt import Attempt
from gradwire_workers.training.closeness import differing
from gradwire_workers.training.rank_model import RankModel
from gradwire_workers.training.snapshots import Snapshot


class KernelCommands(RankModel):
    """The commands. Every rank is given the same, each a shard of the shape that is meant, with any numbers in it."""

    def begin_kernels(self, shard: Shard) -> None:
        """Have kernels compiled in the background."""
        self._own_kernels.begin(shard)

    def state_of_kernels(self, shard: Shard) -> tuple[str, str]:
        """How far they are. See `RankKernels.state`."""
        return self._own_kernels.state(shard)

    def load_kernels(self, shard: Shard) -> str | None:
        """Have them ready to run, however long it takes. Returns why they cannot be."""
        return self._own_kernels.load(shard)

    def try_kernels(self, shard: Shard) -> str | None:
        """In what they differ from an eager pass over the same shard; None: in nothing but rounding. Changes nothing.

        All ranks call it together, and each has loaded them.
        """
        kernels, example = self._own_kernels.loaded(shard)
        buffers = self._passes.buffers(example)
        with Attempt(self._groups, buffers, changes=False):
            example = self._localised(example)
            before = Snapshot(buffers)
            eager = self._passes.eager(example, 0)
            moved = [each.detach().clone() for each in buffers]
            before.restore()
            compiled = self._passes.compiled(example, 0, kernels)
            names = {id(each): name for name, each in self._program.all_state().items()}
            of_gradients = [f"the gradient of {names[id(each)]}" for each in self._trainable]
            return self._difference(
                ["the loss", *of_gradients],
                [_tensor(compiled.value), *compiled.gradients],
                [_tensor(eager.value), *eager.gradients],
            ) or self._difference([names[id(each)] for each in buffers], buffers, moved)

    def use_kernels(self, shard: Shard) -> None:
        """Run training passes of this shape on them from here on. Every rank has loaded them."""
        self._own_kernels.use(shard)

    def forget_kernels(self, shard: Shard) -> None:
        """There will be none."""
        self._own_kernels.forget(shard)

    @property
    def _own_kernels(self) -> RankKernels:
        assert self._kernels is not None, "only a model that wants them is asked for them"
        return self._kernels

    def _difference(
        self, names: Sequence[str], found: Sequence[Tensor | None], expected: Sequence[Tensor | None]
    ) -> str | None:
        pairs = list(zip(found, expected, strict=True))
        index = next(differing(pairs, AUTOCAST_TYPES.get(self._spec.precision)), None)
        if index is None:
            return None
        return f"results differ from eager ones: {names[index]} by {_distance(*pairs[index]):.1e} of its norm"


def _distance(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    norm = float(torch.linalg.vector_norm(expected.double()))
    distance = float(torch.linalg.vector_norm(found.double() - expected.double())) / (norm or 1.0)
    return distance if math.isfinite(distance) else math.inf


def _tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
