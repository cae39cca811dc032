"""Buttons to pause, resume and stop the run that this process coordinates, and to change its deadline."""

from __future__ import annotations

from nicegui import ui

from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.elements import button, heading
from fedbpt.dashboard.views import RunView
from fedbpt.errors import ConfigError


class Controls:
    """The buttons and their dialogs. ``control`` None: no buttons."""

    def __init__(self, control: RunControl | None) -> None:
        self._control = control
        if control is None:
            return
        with ui.element("div").classes("row") as self._row:
            self._pause = button("Pause", "pause", self._toggle_pause, "plain")
            button("Deadline", "timer", self._open_deadline, "plain")
            button("Stop", "stop", lambda: self._stopping.open(), "stop")
        self._stopping = self._stop_dialog(control)
        self._deadline_dialog(control)

    def show(self, view: RunView) -> None:
        if self._control is None:
            return
        self._row.visible = view.status not in ("finished", "stopped")
        self._deadline = view.deadline_s
        paused = self._control.wish.paused
        self._pause.text = "Resume" if paused else "Pause"
        self._pause.icon = "play_arrow" if paused else "pause"

    def _toggle_pause(self) -> None:
        assert self._control is not None
        if self._control.wish.paused:
            self._control.resume()
        else:
            self._control.pause()
            ui.notify("The run pauses after the current round.")

    def _stop_dialog(self, control: RunControl) -> ui.dialog:
        def stop() -> None:
            control.stop()
            dialog.close()

        with ui.dialog() as dialog, ui.card():
            heading("Stop this run?")
            ui.label("Completed rounds are kept. The same command resumes the run.")
            with ui.row():
                button("Keep running", "", dialog.close, "plain").props("autofocus")
                button("Stop the run", "", stop, "stop")
        dialog.props('aria-label="Stop this run?"')
        return dialog

    def _deadline_dialog(self, control: RunControl) -> None:
        def change() -> None:
            try:
                control.set_deadline(float(self._seconds.value or 0))
            except ConfigError as error:
                ui.notify(str(error), type="warning")
                return
            self._changing.close()
            ui.notify("The new deadline applies from the next round on.")

        with ui.dialog() as self._changing, ui.card():
            heading("Round deadline")
            ui.label("Reports that arrive later are not used. Applies from the next round until the run ends.")
            self._seconds = ui.number("Deadline, seconds", min=1).props("autofocus outlined")
            with ui.row():
                button("Cancel", "", self._changing.close, "plain")
                button("Change", "", change, "main")
        self._changing.props('aria-label="Round deadline"')

    def _open_deadline(self) -> None:
        self._seconds.value = self._deadline
        self._changing.open()
