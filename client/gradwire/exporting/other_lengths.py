"""Whether a graph serves other sizes than the example's: run there, and compared with the module, gradients too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gradwire.exporting import safety_net
from gradwire.exporting.example import Example
from gradwire.exporting.lengths import Lengths
from gradwire.exporting.other_rows import OtherRows
from gradwire_proto.errors import GradwireError
from gradwire_proto.values import Symbol


@dataclass(frozen=True, kw_only=True)
class OtherLengths:
    """A module and its graph, to be run on examples of other sizes. differentiate_leaves: give inputs gradients too.

    weighs_the_same: whether what the user says that rows weigh is right on an example.
    """

    runs: OtherRows
    differentiate_leaves: bool
    weighs_the_same: Callable[[Example], bool]

    def served(self, lengths: Lengths) -> Lengths:
        """`lengths` as far as the graph gives what the module does: none of them where it serves no other size.

        The smallest sizes are tried, and larger ones. Where both module and graph refuse those, they stay allowed.
        """
        if not lengths.symbols:
            return lengths
        up = self._agree(lengths, _larger(lengths))
        down = self._agree(lengths, _smallest(lengths))
        if True not in (up, down):
            return Lengths()
        sizes = lengths.sizes
        symbols = [
            Symbol(
                each.name,
                min=sizes[each.name] if down is False else each.min,
                max=sizes[each.name] if up is False else each.max,
            )
            for each in lengths.symbols
        ]
        open_ones = [each for each in symbols if each.min != each.max]
        names = {each.name for each in open_ones}
        return Lengths(
            places={place: name for place, name in lengths.places.items() if name in names},
            symbols=tuple(open_ones),
            sizes={name: size for name, size in sizes.items() if name in names},
        )

    def _agree(self, lengths: Lengths, sizes: Mapping[str, int]) -> bool | None:
        """Whether module and graph give the same; None where both fail, or the sizes are the example's."""
        if sizes == lengths.sizes:
            return None
        runs = self.runs
        example = runs.check.example.with_sizes(lengths.places, sizes)
        before = runs.buffers()
        # A function may ask which of its inputs need gradients: in training the leaves do not.
        ways = {self.differentiate_leaves, False} if runs.check.has_functions else {self.differentiate_leaves}
        for differentiate_leaves in ways:
            ours = self._run(runs.eager(example), example, differentiate_leaves)
            theirs = self._run(runs.check.with_example(example).forward, example, differentiate_leaves)
            if ours is None or theirs is None:
                return None if ours is theirs else False
            try:
                safety_net.compare(ours, theirs, before)
            except GradwireError:
                return False
        return self.weighs_the_same(example)

    def _run(self, forward: safety_net.Forward, example: Example, differentiate_leaves: bool) -> safety_net.Run | None:
        """What it gives; None where it fails."""
        with self.runs.rewound():
            try:
                return safety_net.run(
                    forward,
                    example.inputs,
                    self.runs.trainable,
                    subject="a run at other sizes",
                    differentiate_leaves=differentiate_leaves,
                    buffers=self.runs.buffers,
                    precision=self.runs.precision,
                )
            except GradwireError:
                return None


def _larger(lengths: Lengths) -> dict[str, int]:
    """A little more than the example's sizes, each by another number, so that none is mistaken for another."""
    return {
        each.name: min(lengths.sizes[each.name] + 1 + index, each.max or lengths.sizes[each.name] + 1 + index)
        for index, each in enumerate(lengths.symbols)
    }


def _smallest(lengths: Lengths) -> dict[str, int]:
    return {each.name: each.min for each in lengths.symbols}
