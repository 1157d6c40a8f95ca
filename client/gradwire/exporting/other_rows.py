"""Whether a graph serves batches of other numbers of rows than the example's: run, and compared with the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwire.exporting import safety_net
from gradwire.exporting.example import Example
from gradwire.exporting.graph_run import GraphRun
from gradwire.exporting.random_state import seed
from gradwire.exporting.tracing import quiet
from gradwire_proto.autocast import autocast
from gradwire_proto.errors import GradwireError

_TOO_FEW = "Expected more than 1 value per channel"


class RowsNotOpen(Exception):
    """The graph does not compute what the module does for other numbers of rows: its sizes must be fixed."""


@dataclass(frozen=True, kw_only=True)
class OtherRows:
    """A module and its graph, to be run on examples of other numbers of rows.

    eager: the module's forward on an example. check: the graph's. trainable: the module's parameters that are trained.
    buffers: the values of its buffers now. rewound: after it, the module is as before.
    """

    eager: Callable[[Example], safety_net.Forward]
    check: GraphRun
    trainable: dict[str, Tensor]
    buffers: Callable[[], Mapping[str, Tensor]]
    devices: frozenset[int]
    precision: str
    rewound: Callable[[], AbstractContextManager[None]]

    def smallest(self, example: Example) -> int:
        """The fewest rows that the graph serves. Raises RowsNotOpen where it serves only as many as the example has.

        torch.export lets a number of rows stand open that it has baked into something else.
        """
        assert example.rows is not None
        if not self._agree(example.with_rows(2 if example.rows > 2 else 4)):
            raise RowsNotOpen("the graph serves no other number of rows")
        # torch.export takes for granted that there are more than one.
        return 1 if self._agree(example.with_rows(1)) else 2

    def _agree(self, example: Example) -> bool:
        check = self.check.with_example(example)
        if check.has_functions and not self._gradients_agree(example, check):
            return False
        results = []
        with torch.no_grad(), quiet(), autocast(self.precision):
            for forward in (self.eager(example), check.forward):
                seed(self.devices)
                with self.rewound():
                    try:
                        outputs, loss = forward([x.clone() if isinstance(x, Tensor) else x for x in example.inputs])
                        results.append([*outputs, loss, *self.buffers().values()])
                    except ValueError as error:
                        # The graph's batch norm has the same check, on the whole batch.
                        return _TOO_FEW in str(error)
                    except Exception:
                        return False
        return safety_net.agree(*results)

    def _gradients_agree(self, example: Example, check: GraphRun) -> bool:
        """Of functions with a backward of their own, which is a graph of its own."""
        try:
            runs = []
            for subject, forward in (("the module", self.eager(example)), ("the exported graph", check.forward)):
                with self.rewound():
                    runs.append(
                        safety_net.run(
                            forward,
                            example.inputs,
                            self.trainable,
                            subject=subject,
                            differentiate_leaves=False,
                            precision=self.precision,
                        )
                    )
            safety_net.compare(*runs)
        except GradwireError as error:
            # Neither may serve it; that is for the forward to say.
            return _TOO_FEW in str(error)
        return True
