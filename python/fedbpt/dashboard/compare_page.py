"""The compare page: replies of the original and the tuned model to the same question, side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import Final

from nicegui import ui

from fedbpt.dashboard.comparison import Comparison
from fedbpt.dashboard.elements import button, describe, heading, page_frame
from fedbpt.dashboard.examples import KINDS, Kind, Row
from fedbpt.errors import FedbptError
from fedbpt.protocol.questions import Answer
from fedbpt.side_by_side.sides import SIDES, Side
from fedbpt.side_by_side.votes import Votes

TITLES: Final[dict[Side, str]] = {"original": "Original", "tuned": "Tuned"}

HERE: Final = "this machine"

POLL_S: Final = 1.0
"""Interval between two checks for the comparison or more examples, in seconds."""

OFFERED: Final[dict[Kind, int]] = {"gained": 3, "lost": 3, "both": 2, "neither": 1}
"""Maximum number of examples of each kind."""

OFFERED_TEXTS: Final = 6
"""Number of rows to offer if texts are generated."""

_ENTER: Final = "(e) => { if (!e.shiftKey && !e.isComposing) { e.preventDefault(); emit(); } }"


class ComparePage:
    """The page in one browser.

    Args:
        run: the run's name.
        find: returns the comparison; None: the run is not finished.
        invitation: the read-only link for others; None: there is none.
        may_vote: whether this browser is the operator's, who may add rows to the comparison's votes.
    """

    def __init__(self, run: str, find: Callable[[], Comparison | None], invitation: str | None, may_vote: bool) -> None:
        self._find = find
        self._may_vote = may_vote
        with page_frame(invitation):
            ui.label(run).classes("title").props("role=heading aria-level=1")
            ui.link("Run", "/").classes("tab")
            ui.label("Compare").classes("tab here").props('aria-current="page"')
            ui.element("div").classes("spring")
        self._waiting = ui.label("Models can be compared once the run is finished.").classes("panel")
        self._timer = ui.timer(POLL_S, self._update)
        self._update()

    def _update(self) -> None:
        comparison = self._find()
        if comparison is not None:
            self._timer.deactivate()
            self._waiting.delete()
            self._build(comparison)

    def _build(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._busy = False
        self._wanted: tuple[str, str | None] = ("", None)
        with ui.element("div").classes("compare"):
            with ui.element("section").classes("panel own"):
                heading("Ask both")
                self._text = ui.textarea("Your text").props("outlined autogrow maxlength=4000").classes("ask")
                self._text.on("keydown.enter", self._ask_own, js_handler=_ENTER)
                with ui.element("div").classes("row"):
                    self._where = ui.select([HERE, *comparison.devices], value=HERE, label="Answered by")
                    self._where.props("outlined dense").classes("where").visible = bool(comparison.devices)
                    self._button = button("Compare", "compare_arrows", self._ask_own, "main")
                    self._message = ui.label().classes("what").props('role="status"')
                self._progress = ui.linear_progress(show_value=False, size="6px", color=None)
                describe(self._progress.props("indeterminate"), "Asking both").visible = False
            with ui.element("div").classes("pair sides"):
                self._sides = {side: _Side(TITLES[side], comparison.labels) for side in SIDES}
            votes = comparison.votes if self._may_vote else None
            self._ballot = None if votes is None else _Ballot(votes, comparison.labels)
            if comparison.questions:
                with ui.element("section").classes("panel held-out"):
                    heading("Or choose a held-out text, which was not used for training")
                    if comparison.labels:
                        _Offers(comparison, self._offer)
                    else:
                        with ui.element("div").classes("offers"):
                            for question in comparison.questions[:OFFERED_TEXTS]:
                                self._offer(question)

    def _offer(self, question: Row) -> None:
        async def ask() -> None:
            self._text.value = question.text
            await self._ask(question.text, question.expected)

        shown = question.text if len(question.text) < 90 else f"{question.text[:88]}…"
        button(shown, "", ask, "plain")

    async def _ask_own(self) -> None:
        await self._ask(str(self._text.value or ""), None)

    async def _ask(self, text: str, expected: str | None) -> None:
        """Ask both models; while they compute, the latest text that is chosen meanwhile comes next."""
        self._wanted = (text, expected)
        if self._busy:
            return
        self._busy = self._progress.visible = True
        self._button.disable()
        answered: tuple[str, str | None] | None = None
        try:
            while answered != self._wanted:
                answered = self._wanted
                await self._answer(*answered)
        finally:
            self._busy = self._progress.visible = False
            self._button.enable()

    async def _answer(self, text: str, expected: str | None) -> None:
        self._message.text = "asking both …"
        if self._ballot is not None:
            self._ballot.close()
        try:
            if self._where.value != HERE:
                found = await self._comparison.ask_device(str(self._where.value), text, self._show_texts)
                self._show(found, expected)
            elif self._comparison.labels:
                self._show(Answer(probabilities=tuple(await self._comparison.classify(text))), expected)
            else:
                await self._generate(text)
        except FedbptError as error:
            self._message.text = str(error)
        else:
            self._message.text = "" if expected is None else f"Expected: {expected}"
            if self._ballot is not None:
                self._ballot.open(text, {side: shown.text.text for side, shown in self._sides.items()})

    def _show(self, found: Answer, expected: str | None) -> None:
        if not found.probabilities:
            self._show_texts(found)
        for side, probabilities in zip(SIDES, found.probabilities, strict=False):
            self._sides[side].show(probabilities, expected)

    def _show_texts(self, found: Answer) -> None:
        for side, text in zip(SIDES, found.texts, strict=True):
            self._sides[side].text.text = text

    async def _generate(self, text: str) -> None:
        for shown in self._sides.values():
            shown.text.text = ""
        async with aclosing(self._comparison.generate(text)) as pieces:
            async for side, piece in pieces:
                self._sides[side].text.text += piece


class _Ballot:
    """Asks which reply is better, or which label is right, once both models have replied; keeps the choice as a row."""

    def __init__(self, votes: Votes, labels: tuple[str, ...]) -> None:
        self._votes = votes
        self._question = ""
        self._replies: dict[Side, str] = {}
        with ui.element("section").classes("panel vote") as self._panel:
            heading("Which label is right?" if labels else "Which reply is better?")
            with ui.element("div").classes("row") as self._choices:
                if labels:
                    for label in labels:
                        button(label, "", partial(self._keep, label), "plain")
                else:
                    for side in SIDES:
                        button(TITLES[side], "", partial(self._keep_reply, side), "plain")
                    self._own = ui.input("A better one").props("outlined dense maxlength=4000")
                    button("Keep it", "", self._keep_own, "plain")
            self._said = ui.label().classes("what").props('role="status"')
        self._panel.visible = False

    def close(self) -> None:
        self._panel.visible = False

    def open(self, question: str, replies: dict[Side, str]) -> None:
        self._question, self._replies = question, replies
        self._said.text = f"Your choice becomes a row of {self._votes.path}, on this machine."
        self._choices.visible = self._panel.visible = True

    def _keep_reply(self, side: Side) -> None:
        self._keep(self._replies[side])

    def _keep_own(self) -> None:
        if self._keep(str(self._own.value or "")):
            self._own.value = ""

    def _keep(self, answer: str) -> bool:
        """Whether the answer was kept."""
        if not answer.strip():
            self._said.text = "that reply is empty: choose another, or write a better one"
            return False
        try:
            self._votes.add(self._question, answer.strip())
        except FedbptError as error:
            self._said.text = str(error)
            return False
        else:
            self._said.text = f"kept in {self._votes.path}"
            self._choices.visible = False  # one row for each question
            return True


class _Offers:
    """Held-out rows to choose from, grouped by which models are right, with the number of rows of every kind."""

    def __init__(self, comparison: Comparison, offer: Callable[[Row], None]) -> None:
        self._comparison = comparison
        self._offer = offer
        self._shown: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._count = ui.label().classes("count")
        self._bar = ui.linear_progress(0.0, show_value=False, size="6px", color=None)
        describe(self._bar, "Held-out texts classified")
        self._groups: dict[Kind, tuple[ui.element, ui.label, ui.element]] = {}
        for kind in KINDS:
            with ui.element("div") as group:
                title = ui.label().classes("kind").props("role=heading aria-level=3")
                self._groups[kind] = group, title, ui.element("div").classes("offers")
            group.visible = False
        comparison.start_examples()
        self._timer = ui.timer(POLL_S, self._update)
        self._update()

    def _update(self) -> None:
        examples = self._comparison.examples
        verdicts = examples.verdicts
        counts = examples.counts()
        n = len(verdicts)
        done = examples.done
        self._bar.value = n / examples.n_rows
        self._bar.visible = not done and not self._comparison.error
        so_far = "" if done else f" of {examples.n_rows} so far"
        self._count.text = (
            self._comparison.error or f"{n:,} classified{so_far}: the two models differ on {examples.n_differ():,}"
        )
        for kind, title in KINDS.items():
            group, label, place = self._groups[kind]
            label.text = f"{title}: {counts[kind]:,} of {n:,}"
            group.visible = n > 0
            found = [verdict for verdict in verdicts if verdict.kind == kind][: OFFERED[kind]]
            with place:
                for verdict in found[self._shown[kind] :]:
                    self._offer(verdict.row)
            self._shown[kind] = len(found)
        if done or self._comparison.error:
            self._timer.deactivate()


class _Side:
    """One model's reply: the predicted label in large type and a bar for each label, or a text."""

    def __init__(self, title: str, labels: tuple[str, ...]) -> None:
        self._labels = labels
        self._bars = []
        with describe(ui.element("section").classes("panel side"), title):
            with ui.element("div").classes("row"):
                heading(title)
                self._right = ui.label().classes("state")
                self._right.visible = False
            self._verdict = ui.label("–").classes("verdict").props('aria-live="polite"')
            self._verdict.visible = bool(labels)
            self.text = ui.label().classes("said").props('aria-live="polite"')
            self.text.visible = not labels
            for label in labels:
                with ui.element("div").classes("label-row"):
                    name = ui.label(label)
                    share = ui.label("–").classes("share")
                    bar = ui.linear_progress(0.0, show_value=False, size="12px", color=None)
                    describe(bar.props("animation-speed=300"), f"{title}: {label}")
                self._bars.append((name, share, bar))

    def show(self, probabilities: tuple[float, ...], expected: str | None) -> None:
        """Show ``probabilities`` of the labels. ``expected``: the correct label; None: unknown."""
        highest = max(probabilities)
        verdict = self._verdict.text = self._labels[probabilities.index(highest)]
        right = expected == verdict
        self._right.text = "right" if right else "wrong"
        for element in (self._right, self._verdict):
            element.classes(add="bad") if expected is not None and not right else element.classes(remove="bad")
        self._right.visible = expected is not None
        for (name, share, bar), value in zip(self._bars, probabilities, strict=True):
            bar.value = round(value, 4)
            share.text = f"{100 * value:.1f} %"
            for element in (name, share):
                element.classes(add="most") if value == highest else element.classes(remove="most")
