"""Turns what a fleet reports of its devices into events of the run and records in its store."""

from __future__ import annotations

from fedbpt.coordinator.devices.members import Listener
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.protocol.rounds import DeviceInfo, MeansResult, RoundProgress, RoundReport
from fedbpt.runs.events import DeviceBack, DeviceLost, EventCallback, LateReport, Progressed


def listener_for(ledger: RunLedger, emit: EventCallback) -> Listener:
    """A listener for `fedbpt.coordinator.devices.fleet.Fleet`; the store is written once the run is open."""
    store = ledger.store
    run = ledger.run

    def lost(device: str, round: int, reason: str) -> None:
        emit(DeviceLost(device=device, round=round, reason=reason))
        if ledger.is_open:
            store.record_losses(run, round, {device: reason})

    def back(device: str, round: int) -> None:
        emit(DeviceBack(device=device, round=round))

    def reported(report: RoundReport) -> None:
        if report.run == run and isinstance(report.result, MeansResult):
            ledger.record_release(report.round)

    def late(report: RoundReport) -> None:
        if report.run != run:
            return  # of a live evaluation, which is not stored
        reported(report)
        store.record_late(run, report)
        emit(LateReport(device=report.device, round=report.round))

    def progress(device: str, where: RoundProgress) -> None:
        emit(Progressed(device=device, round=where.round, done=where.done, total=where.total, paused=where.paused))

    def connected(device: str, info: DeviceInfo) -> None:
        if ledger.is_open:
            store.record_devices(run, {device: info})

    return Listener(lost=lost, back=back, reported=reported, late=late, progress=progress, connected=connected)
