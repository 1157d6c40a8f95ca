"""The kernels of one rank: which are compiled, which are in use, and which of them a shard runs on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from gradwire_proto.values import Limits, ModelSpec
from gradwire_workers.kernels.compilation import Compilation
from gradwire_workers.kernels.compiled_pass import CompiledPass
from gradwire_workers.kernels.order import order_of
from gradwire_workers.shard import Shard
from gradwire_workers.training.replica import Replica


@dataclass(slots=True)
class _Kernels:
    """Those of one shape. refused: why there are none. example: a shard that came while they were compiled."""

    compilation: Compilation | None = None
    run: CompiledPass | None = None
    refused: str | None = None
    example: Shard | None = None
    in_use: bool = False


class RankKernels:
    """See the module. `place`: the folder for what is compiled; None: nothing can be.

    Every rank is told the same at the same time, each for its own shard: so a batch runs on kernels on all ranks, or on
    none.
    """

    def __init__(
        self, replica: Replica, spec: ModelSpec, trained: Sequence[nn.Parameter], limits: Limits, place: Path | None
    ) -> None:
        self._replica = replica
        self._spec = spec
        self._trained = trained
        self._limits = limits
        self._place = place
        self._by_shape: dict[Hashable, _Kernels] = {}

    def of(self, shard: Shard) -> CompiledPass | None:
        """What a pass over this shard runs on; None: eagerly."""
        if not self._by_shape:
            return None
        known = self._by_shape.get(_shape_of(shard))
        if known is None:
            return None
        if known.in_use:
            return known.run
        if known.example is None:
            known.example = _kept(shard)
        return None

    def _of(self, shard: Shard) -> _Kernels:
        return self._by_shape.setdefault(_shape_of(shard), _Kernels())

    def begin(self, shard: Shard) -> None:
        """Have kernels compiled for shards of this shape, in the background. `shard`: one with any numbers in it."""
        known = self._of(shard)
        if known.compilation is not None or shard.idle:
            return
        known.refused = self._unfit(shard)
        if known.refused is not None:
            return
        assert self._place is not None
        names = {each: name for name, each in self._replica.program.parameters_by_name().items()}
        trained = [names[each] for each in self._trained]
        try:
            order = order_of(self._replica, self._spec, trained, shard, limits=self._limits)
            known.compilation = Compilation(order, self._place)
        except Exception as error:
            known.refused = str(error)

    def _unfit(self, shard: Shard) -> str | None:
        """Why no kernels can be made for such shards, as far as can be told without trying."""
        if self._place is None:
            return "the rank has no folder for them"
        if self._replica.groups is None or shard.whole:
            return None
        if self._replica.program.has_batch_norm(shard.variant):
            return "in the middle of a pass, batch norm needs what the other ranks' rows are"
        if self._replica.weight_of(shard.variant) is not None:
            return "its loss is put together by weights that the ranks tell each other"
        return None

    def state(self, shard: Shard) -> tuple[str, str]:
        """How far those for this shape are, and why: "compiling", "compiled" with an example at hand, or "refused"."""
        known = self._of(shard)
        if known.refused is None and known.compilation is not None and known.compilation.is_over:
            known.refused = known.compilation.refused
        if known.refused is not None:
            return "refused", known.refused
        if known.compilation is not None and not known.compilation.is_over:
            return "compiling", ""
        return ("compiling", "no batch has come since") if known.example is None else ("compiled", "")

    def load(self, shard: Shard) -> str | None:
        """Have those for this shape ready to run, however long it takes. Returns why they cannot be."""
        self.begin(shard)
        known = self._of(shard)
        if known.refused is not None or known.run is not None or known.compilation is None:
            return known.refused
        known.compilation.wait()
        known.refused = known.compilation.refused
        if known.refused is None:
            try:
                call, form = known.compilation.load()
                known.run = CompiledPass(call, form, self._replica, self._trained)
            except Exception as error:
                known.refused = f"what was compiled cannot be loaded: {type(error).__name__}: {error}"
        return known.refused

    def loaded(self, shard: Shard) -> tuple[CompiledPass | None, Shard]:
        """(those for this shape, which are loaded, a shard to try them with). None: the rank has nothing to compute."""
        known = self._of(shard)
        assert known.example is not None
        return known.run, known.example

    def use(self, shard: Shard) -> None:
        """Run passes of this shape on them from here on. They must be loaded on every rank."""
        known = self._of(shard)
        known.in_use, known.example = True, None

    def forget(self, shard: Shard) -> None:
        """There will be none for this shape."""
        known = self._by_shape.pop(_shape_of(shard), None)
        if known is not None and known.compilation is not None:
            known.compilation.give_up()

    def close(self) -> None:
        """Let go of everything, and end what compiles."""
        for known in self._by_shape.values():
            if known.compilation is not None:
                known.compilation.give_up()
        self._by_shape = {}


def _shape_of(shard: Shard) -> Hashable:
    shapes = tuple(each.shape if isinstance(each, Tensor) else None for each in (*shard.inputs, *shard.targets))
    return shard.variant, shard.rows, shard.whole, shapes


def _kept(shard: Shard) -> Shard:
    """A copy: the batch's memory is not this rank's to keep."""
    inputs, targets = (
        tuple(each.clone() if isinstance(each, Tensor) else each for each in leaves)
        for leaves in (shard.inputs, shard.targets)
    )
    return replace(shard, inputs=inputs, targets=targets)
