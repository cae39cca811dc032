"""The page on which the original and the tuned model answer the same question, side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Final

from nicegui import ui

from fedbpt.dashboard.comparing import Comparison, Row
from fedbpt.dashboard.elements import button, describe, heading, top
from fedbpt.errors import FedbptError
from fedbpt.protocol.questions import Answer
from fedbpt.side_by_side.sides import SIDES, Side

TITLES: Final[dict[Side, str]] = {"original": "Original", "tuned": "Tuned"}

HERE: Final = "this machine"

LOOK_S: Final = 1.0
"""How often a page without a model looks whether there is one now."""


class ComparePage:
    """``find``: the comparison, once there is one."""

    def __init__(self, run: str, find: Callable[[], Comparison | None]) -> None:
        self._find = find
        with top():
            ui.label(run).classes("title").props("role=heading aria-level=1")
            ui.link("Run", "/").classes("tab")
            ui.label("Compare").classes("tab here").props('aria-current="page"')
            ui.element("div").classes("spring")
        self._waiting = ui.label("There is something to compare when the run is finished.").classes("panel")
        self._timer = ui.timer(LOOK_S, self._look)
        self._look()

    def _look(self) -> None:
        comparison = self._find()
        if comparison is not None:
            self._timer.deactivate()
            self._waiting.delete()
            self._build(comparison)

    def _build(self, comparison: Comparison) -> None:
        self._comparison = comparison
        with ui.element("section").classes("panel"):
            heading("Ask both")
            self._text = ui.textarea("Your text").props("outlined autogrow maxlength=4000").classes("ask")
            with ui.element("div").classes("row"):
                self._where = ui.select([HERE, *comparison.devices], value=HERE, label="Answered by")
                self._where.props("outlined dense").classes("where").visible = bool(comparison.devices)
                self._button = button("Compare", "compare_arrows", self._ask_own, "main")
                self._message = ui.label().classes("what").props('role="status"')
        with ui.element("div").classes("pair"):
            self._sides = {side: _Side(TITLES[side], comparison.labels) for side in SIDES}
        if comparison.questions:
            with ui.element("section").classes("panel"):
                heading("Or ask about a held-out text, which was never trained on")
                with ui.element("div").classes("offers"):
                    for question in comparison.questions:
                        self._offer(question)

    def _offer(self, question: Row) -> None:
        async def ask() -> None:
            self._text.value = question.text
            await self._ask(question.text, question.answer)

        shown = question.text if len(question.text) < 120 else f"{question.text[:118]}…"
        button(shown, "", ask, "plain")

    async def _ask_own(self) -> None:
        await self._ask(str(self._text.value or ""), None)

    async def _ask(self, text: str, answer: str | None) -> None:
        self._message.text = "asking both …"
        self._button.disable()
        try:
            if self._where.value != HERE:
                found = await self._comparison.ask_device(str(self._where.value), text, self._show_texts)
                self._show(found, answer)
            elif self._comparison.labels:
                self._show(Answer(probabilities=tuple(await self._comparison.classify(text))), answer)
            else:
                await self._generate(text)
        except FedbptError as error:
            self._message.text = str(error)
        else:
            self._message.text = "" if answer is None else f"The row says: {answer}"
        finally:
            self._button.enable()

    def _show(self, found: Answer, answer: str | None) -> None:
        if not found.probabilities:
            self._show_texts(found)
        for side, probabilities in zip(SIDES, found.probabilities, strict=False):
            self._sides[side].show(probabilities, answer)

    def _show_texts(self, found: Answer) -> None:
        for side, text in zip(SIDES, found.texts, strict=True):
            self._sides[side].text.text = text

    async def _generate(self, text: str) -> None:
        for shown in self._sides.values():
            shown.text.text = ""
        async with aclosing(self._comparison.generate(text)) as pieces:
            async for side, piece in pieces:
                self._sides[side].text.text += piece


class _Side:
    """One model's answer: a bar for each label, or a text."""

    def __init__(self, title: str, labels: tuple[str, ...]) -> None:
        self._labels = labels
        self._bars = []
        with describe(ui.element("section").classes("panel side"), title):
            with ui.element("div").classes("row"):
                heading(title)
                self._verdict = ui.label().classes("state")
                self._verdict.visible = False
            self.text = ui.label().classes("said").props('aria-live="polite"')
            self.text.visible = not labels
            for label in labels:
                with ui.element("div").classes("label-row"):
                    name = ui.label(label)
                    share = ui.label("–").classes("share")
                    bar = ui.linear_progress(0.0, show_value=False, size="12px", color=None)
                    describe(bar.props("animation-speed=300"), f"{title}: {label}")
                self._bars.append((name, share, bar))

    def show(self, probabilities: tuple[float, ...], answer: str | None) -> None:
        """``answer``: the label that the row has, where it is known."""
        most = max(probabilities)
        right = answer == self._labels[probabilities.index(most)]
        self._verdict.text = "right" if right else "wrong"
        self._verdict.classes(remove="bad") if right else self._verdict.classes(add="bad")
        self._verdict.visible = answer is not None
        for (name, share, bar), value in zip(self._bars, probabilities, strict=True):
            bar.value = round(value, 4)
            share.text = f"{100 * value:.1f} %"
            for element in (name, share):
                element.classes(add="most") if value == most else element.classes(remove="most")
