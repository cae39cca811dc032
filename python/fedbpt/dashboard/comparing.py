"""`Comparison`: the original and the tuned model, asked by visitors of a page, one question at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Final

from fedbpt.api import make_prompt
from fedbpt.coordinator.clients import RemoteDevice
from fedbpt.dashboard.examples import Examples, Row
from fedbpt.engine.text_generator import TextModel
from fedbpt.errors import FedbptError, InputError
from fedbpt.protocol.questions import DEFAULT_TOKENS, Answer, Question, check_answer
from fedbpt.protocol.seeding import generator
from fedbpt.runs.result import RunResult
from fedbpt.side_by_side.sides import Probabilities, Side, SideBySide
from fedbpt.tasks import Task, read_task_rows

MOST_WAITING: Final = 16
"""Questions that wait; more are refused."""

ASK_S: Final = 120.0
"""How long a device may take for an answer."""

QUESTIONS: Final = 192
"""Held-out rows that are looked at for examples, at most."""

log = logging.getLogger(__name__)


def questions_of(task: Task, path: Path, n: int = QUESTIONS) -> tuple[Row, ...]:
    """``n`` rows of a data file, at random and always the same. Raises `DataError`."""
    rows = read_task_rows(task, path)
    chosen = sorted(generator(0, "questions").permutation(len(rows))[:n])
    names = [rows[i] for i in chosen]
    return tuple(Row(text, task.labels[label] if isinstance(label, int) else label) for text, label in names)


def comparing(scorer: TextModel, task: Task, result: RunResult) -> SideBySide:
    """A finished run's prompt beside its model. Raises `PromptError`: ``scorer`` is another model."""
    return SideBySide(scorer, make_prompt(scorer, task, result))


class Comparison:
    """Answers for any number of pages, from a thread of its own.

    Args:
        make: loads the model and the prompt; called in that thread, for the first question.
        labels: the task's; empty where texts are generated.
        questions: held-out rows to choose from.
        devices: those that may be asked instead of this machine; used on one event loop.
    """

    def __init__(
        self,
        make: Callable[[], SideBySide],
        labels: Sequence[str],
        questions: Sequence[Row] = (),
        devices: Sequence[RemoteDevice] = (),
    ) -> None:
        self.labels = tuple(labels)
        self.questions = tuple(questions)
        self.devices = {device.name: device for device in devices}
        self._make = make
        self._made: SideBySide | None = None
        self.examples = Examples(questions if labels else (), self.labels, lambda text: self._pair().classify(text))
        """What both models say to ``questions``, as far as `look_for_examples` has come."""
        self.trouble = ""
        """Why no more examples come; empty: nothing is the matter."""
        self._looking = self._closed = False
        self._pool = ThreadPoolExecutor(1, "fedbpt-compare")
        self._waiting = 0

    async def classify(self, text: str) -> Probabilities:
        """Probabilities of the labels. Raises `InputError`, `ModelError`, or `FedbptError` where too many wait."""
        with self._place():
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: self._pair().classify(text))

    async def generate(self, text: str) -> AsyncGenerator[tuple[Side, str], None]:
        """Pieces of both answers as they come; ends early where the caller lets go. Raises as `classify`."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[Side, str] | None]()
        unwanted = threading.Event()

        def work() -> None:
            try:
                with closing(self._pair().generate(text, max_tokens=DEFAULT_TOKENS)) as generated:
                    for piece in generated:
                        loop.call_soon_threadsafe(pieces.put_nowait, piece)
                        if unwanted.is_set():
                            return
            finally:
                loop.call_soon_threadsafe(pieces.put_nowait, None)

        with self._place():
            working = loop.run_in_executor(self._pool, work)
            try:
                while (piece := await pieces.get()) is not None:
                    yield piece
                await working
            finally:
                unwanted.set()

    async def ask_device(self, name: str, text: str, on_answer: Callable[[Answer], None]) -> Answer:
        """What the device ``name`` says; ``on_answer``: told what there is so far.

        Raises also `DeviceError`, `WireError`.
        """
        if not text.strip():
            raise InputError("an empty text says nothing: give some words")
        with self._place():
            pair = await asyncio.get_running_loop().run_in_executor(self._pool, self._pair)
            prompt = pair.prompt
            question = Question(
                model_fingerprint=prompt.model_fingerprint, prompt=prompt.to_bytes(), text=text,
                max_text_tokens=pair.max_text_tokens,
            )  # fmt: skip
            answer = await self.devices[name].ask(question, ASK_S, on_answer)
            check_answer(answer, self.labels)
            return answer

    def look_for_examples(self) -> None:
        """Begin, once: row by row, so that visitors' questions come between. From any thread."""
        if not self._looking:
            self._looking = True
            self._look_on()

    def _look_on(self) -> None:
        if not self._closed:
            self._pool.submit(self.examples.look).add_done_callback(self._looked)

    def _looked(self, found: Future[bool]) -> None:
        if found.cancelled():
            return
        error = found.exception()
        if error is None:
            if found.result():
                self._look_on()
        elif isinstance(error, FedbptError):
            self.trouble = str(error)
        else:
            self.trouble = "examples could not be looked for: the log says why"
            log.error("no more examples are looked for", exc_info=error)

    async def aclose(self) -> None:
        """No more questions; the one under way is not waited for."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for device in self.devices.values():
            await device.aclose()

    def _pair(self) -> SideBySide:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _place(self) -> _Place:
        if self._waiting >= MOST_WAITING:
            raise FedbptError(f"{MOST_WAITING} questions wait already: try again in a moment")
        return _Place(self)


class _Place:
    """In the queue, for as long as the block lasts."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def __enter__(self) -> None:
        self._comparison._waiting += 1

    def __exit__(self, *_: object) -> None:
        self._comparison._waiting -= 1
