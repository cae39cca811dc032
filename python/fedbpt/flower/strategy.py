"""`FedBPT`: fedbpt's search as a Flower strategy.

`FedBPT.start` runs a `Federation` over the grid: template selection, calibration, search and readout, with quorum and
deadlines. It commits every closed round to a `RunStore`, from which the same call resumes. With the same devices,
settings and seed, it gives the same digests as `fedbpt tune`.

The ``configure_`` and ``aggregate_`` methods run single rounds for Flower's own loop (``Strategy.start(strategy,
...)``) and for strategies that wrap another. That loop waits for every node and fits no readout.
"""

# ruff: noqa: ARG002 - Flower defines the signatures

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedbpt.argument_types import checked
from fedbpt.coordinator.federation import Federation
from fedbpt.errors import ConfigError, QuorumError
from fedbpt.flower.client import FlowerClient
from fedbpt.flower.loop import FlowerLoop, arrays_of, score_metrics
from fedbpt.flower.nodes import Nodes
from fedbpt.net.event_loop import run_to_end
from fedbpt.quantities import NaturalInt
from fedbpt.runs.events import Evaluated, Event, EventCallback, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Task

log = logging.getLogger(__name__)

FIND_S: Final = 300.0
"""Time limit to find a run's devices, in seconds."""


class FedBPT(Strategy):
    """Tunes a prompt over the devices behind a grid. Make a new strategy for each run.

    Args:
        task: name, labels, candidate templates.
        settings: ``method`` selects FedBPT (``fedbpt``), pooled search (``pooled``) or averaged means (``fedavg``).
        store: where rounds are committed. A run of this name in it is resumed.
        run: the run's name.
        devices: number of devices to wait for; 0: the nodes connected at the start.
        find_s: time limit to find them, in seconds.
        on_event: called for each event of `fedbpt.runs.events`.
    """

    @checked
    def __init__(
        self,
        task: Task,
        settings: RunSettings,
        store: RunStore,
        run: str = "run",
        *,
        devices: NaturalInt = 0,
        find_s: float = FIND_S,
        on_event: EventCallback = lambda _event: None,
    ) -> None:
        self.task = task
        if settings.secure:
            raise ConfigError(
                "secure = true does not work on Flower, whose nodes keep no keys between messages: set secure = false",
                field="secure",
            )
        self.settings = settings.for_labels(task.labels, task.generation)
        self.result: RunResult | None = None
        self._store = store
        self._run = run
        self._devices = devices
        self._find_s = find_s
        self._on_event = on_event
        self._loop: FlowerLoop | None = None

    def summary(self) -> None:
        settings = self.settings
        log.info("fedbpt run %r: %s, method %s, seed %d", self._run, self.task.name, settings.method, settings.seed)

    # --- the whole run -------------------------------------------------------------------------------------------

    @checked
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run, or resume, to the end. Afterwards, `result` has fedbpt's own figures.

        Args:
            grid: Flower's.
            initial_arrays: unused, because the search starts at z = 0.
            num_rounds: number of rounds of the search; None: as in the settings.
            timeout: a round's deadline, in seconds; None: as in the settings.
            train_config, evaluate_config: unused, because plans contain all that devices need.
            evaluate_fn: called with the mean of every closed round of the search.

        Raises:
            QuorumError: too few devices, at the start or in a round; the same call resumes the run.
            Others as `Federation.run`.
        """
        settings = self.settings
        if num_rounds is not None:
            settings = msgspec.structs.replace(settings, rounds=num_rounds)
        if timeout is not None:
            settings = msgspec.structs.replace(settings, deadline_s=timeout)
        self.summary()
        aggregator = settings.aggregator()
        found = Result()

        def listen(event: Event) -> None:
            if isinstance(event, RoundClosed) and event.purpose == "search":
                found.train_metrics_clientapp[event.searched] = _round_metrics(event)
                if evaluate_fn is not None and (metrics := evaluate_fn(event.searched, arrays_of(aggregator.mean))):
                    found.evaluate_metrics_serverapp[event.searched] = metrics
            elif isinstance(event, Evaluated):
                searched = max(found.train_metrics_clientapp, default=0)
                found.evaluate_metrics_clientapp[searched] = score_metrics(event.score)
            self._on_event(event)

        async def main() -> RunResult:
            nodes = Nodes(grid)
            try:
                names = await self._find(nodes, math.ceil(self._devices * settings.quorum))
                clients = [FlowerClient(name, nodes) for name in names]
                federation = Federation(clients, self.task, settings, aggregator, self._store, self._run, listen)
                return await federation.run_async()
            finally:
                nodes.close()

        self.result = run_to_end(main)
        found.arrays = arrays_of(self.result.latent)
        if self.result.tuned.n:
            found.evaluate_metrics_clientapp[self.result.rounds] = score_metrics(self.result.tuned)
        return found

    async def _find(self, nodes: Nodes, needed: int) -> list[str]:
        """Names of the devices. Raises `QuorumError` if there are fewer than ``needed``."""
        names = await nodes.find(self._devices, self._find_s)
        needed = max(needed, 1)
        if len(names) < needed:
            reasons = f" ({'; '.join(nodes.problems.values())})" if nodes.problems else ""
            raise QuorumError(
                f"{len(names)} devices were found within {self._find_s:g} s, {needed} are needed{reasons}: "
                "check that their SuperNodes are connected to this SuperLink",
                limit=needed,
            )
        return names

    # --- a round of Flower's own loop ----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's plans, one per device. The store determines the round, not ``server_round``.

        Raises:
            ConfigError: ``arrays`` are not what `aggregate_train` returned.
            QuorumError: too few devices.
        """
        if self._loop is None:
            run_to_end(lambda: self._open(grid))
        return self._opened().plans(arrays)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Commit the round. Raises `QuorumError` if fewer devices reported than the settings require."""
        return self._opened().close(replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluate the mean on ``dev`` rows, every ``settings.evaluate_every`` rounds."""
        every = self.settings.evaluate_every
        return self._opened().evaluations() if every and server_round % every == 0 else []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The accuracy over all devices' rows."""
        return self._opened().scored(replies)

    async def _open(self, grid: Grid) -> None:
        nodes = Nodes(grid)
        try:
            names = await self._find(nodes, self._devices)
            known = {name: (nodes.node_of(name), nodes.take_info(name)) for name in names}
            devices = {name: (node, info) for name, (node, info) in known.items() if node is not None and info}
            self._loop = FlowerLoop(self._store, self._run, self.task, self.settings, devices)
        finally:
            nodes.close()

    def _opened(self) -> FlowerLoop:
        if self._loop is None:
            raise QuorumError("the devices are unknown: call configure_train first")
        return self._loop


def _round_metrics(event: RoundClosed) -> MetricRecord:
    figures = {"loss": event.loss, "devices": len(event.reported), "evaluations": event.evaluations}
    return MetricRecord({**figures, "tokens": event.tokens, "seconds": event.seconds})
