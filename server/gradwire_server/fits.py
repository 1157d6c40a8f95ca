"""The fits that run now, of all models: begun, stopped, and ended when the service drains."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from gradwire_proto.values import FitPlan, FitProgress
from gradwire_server.datasets import Datasets
from gradwire_server.fit import Fit
from gradwire_server.hosted_model import HostedModel


class Fits:
    """See the module."""

    def __init__(self, datasets: Datasets) -> None:
        self._datasets = datasets
        self._running: set[Fit] = set()

    async def run(self, model: HostedModel, plan: FitPlan, request_id: str) -> AsyncGenerator[FitProgress, None]:
        """Train the model on the plan's dataset, for as long as this is read. See Fit.

        A plan that says stop ends also what other calls with its request id have begun.
        """
        dataset = self._datasets.get(plan.dataset, "dataset")
        validation = None
        if plan.validation is not None:
            validation = self._datasets.get(plan.validation, "validation_dataset")
        if plan.stop:
            for running in self._running:
                running.stopped |= running.request_id == request_id
        fit = Fit(model.description.info.id, model.commands, model.fitting, plan, dataset, validation, request_id)
        with ExitStack() as uses:
            for each in filter(None, (dataset, validation)):
                uses.enter_context(self._datasets.used(each))
            self._running.add(fit)
            try:
                async with aclosing(fit.progress()) as steps:
                    async for progress in steps:
                        yield progress
            finally:
                self._running.discard(fit)
                model.fitting.let_go()

    def drain(self) -> None:
        """Have every fit end between two commands: its client comes back with its request id."""
        for fit in self._running:
            fit.draining = True
