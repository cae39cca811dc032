"""`Comparison`: replies of the original and the tuned model to visitors' questions, one at a time."""

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
from fedbpt.protocol.questions import DEFAULT_TOKENS, MAX_TOKENS, Answer, Question, check_answer
from fedbpt.protocol.seeding import generator
from fedbpt.runs.result import RunResult
from fedbpt.side_by_side.sides import Probabilities, Side, SideBySide
from fedbpt.side_by_side.votes import Votes
from fedbpt.tasks import Task, read_task_rows

MAX_WAITING: Final = 16
"""Maximum number of waiting questions; more are rejected."""

ASK_S: Final = 120.0
"""Time limit for a device's reply, in seconds."""

QUESTIONS: Final = 192
"""Maximum number of held-out rows to classify for examples."""

log = logging.getLogger(__name__)


def questions_of(task: Task, path: Path, n: int = QUESTIONS) -> tuple[Row, ...]:
    """``n`` rows of a data file, chosen at random with a fixed seed. Raises `DataError`."""
    rows = read_task_rows(task, path)
    chosen = sorted(generator(0, "questions").permutation(len(rows))[:n])
    names = [rows[i] for i in chosen]
    return tuple(Row(text, task.labels[label] if isinstance(label, int) else label) for text, label in names)


def models_of_run(scorer: TextModel, task: Task, result: RunResult) -> SideBySide:
    """A finished run's model with and without its prompt. Raises `PromptError` if ``scorer`` is another model."""
    return SideBySide(scorer, make_prompt(scorer, task, result))


class Comparison:
    """Computes replies for any number of pages, in a thread of its own.

    Args:
        make: loads the model and the prompt; called in that thread, at the first question.
        labels: the task's labels; empty if texts are generated.
        questions: held-out rows to choose from.
        devices: devices that can be asked instead of this machine; used on one event loop.
        votes: where the operator's votes are kept; None: the page asks for none.
    """

    def __init__(
        self,
        make: Callable[[], SideBySide],
        labels: Sequence[str],
        questions: Sequence[Row] = (),
        devices: Sequence[RemoteDevice] = (),
        votes: Votes | None = None,
    ) -> None:
        self.votes = votes
        self.labels = tuple(labels)
        self.questions = tuple(questions)
        self.devices = {device.name: device for device in devices}
        self._make = make
        self._made: SideBySide | None = None
        self.examples = Examples(questions if labels else (), self.labels, lambda text: self._pair().classify(text))
        """The rows of ``questions`` that are classified so far, see `start_examples`."""
        self.error = ""
        """Why no more examples are computed; empty without an error."""
        self._examples_started = False
        self._closed = False
        self._pool = ThreadPoolExecutor(1, "fedbpt-compare")
        self._waiting = 0

    async def classify(self, text: str) -> Probabilities:
        """Probabilities of the labels. Raises `InputError`, `ModelError`, or `FedbptError` if too many are waiting."""
        with self._slot():
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: self._pair().classify(text))

    async def generate(self, text: str) -> AsyncGenerator[tuple[Side, str], None]:
        """Yield pieces of both replies as they are generated. Closing it cancels them. Raises as `classify`."""
        loop = asyncio.get_running_loop()
        pieces = asyncio.Queue[tuple[Side, str] | None]()
        cancelled = threading.Event()

        def work() -> None:
            try:
                pair = self._pair()
                with closing(pair.generate(text, max_tokens=None if pair.answering else DEFAULT_TOKENS)) as generated:
                    for piece in generated:
                        loop.call_soon_threadsafe(pieces.put_nowait, piece)
                        if cancelled.is_set():
                            return
            finally:
                loop.call_soon_threadsafe(pieces.put_nowait, None)

        with self._slot():
            working = loop.run_in_executor(self._pool, work)
            try:
                while (piece := await pieces.get()) is not None:
                    yield piece
                await working
            finally:
                cancelled.set()

    async def ask_device(self, name: str, text: str, on_answer: Callable[[Answer], None]) -> Answer:
        """The replies of device ``name``. ``on_answer``: called with the replies so far.

        Raises as `classify`, and `DeviceError`, `WireError`.
        """
        if not text.strip():
            raise InputError("the text is empty: enter some words", field="text")
        with self._slot():
            pair = await asyncio.get_running_loop().run_in_executor(self._pool, self._pair)
            prompt = pair.prompt
            question = Question(
                model_fingerprint=prompt.model_fingerprint,
                prompt=prompt.to_bytes(),
                text=text,
                max_text_tokens=pair.max_text_tokens,
                max_tokens=min(pair.answering.max_tokens, MAX_TOKENS) if pair.answering else DEFAULT_TOKENS,
                stop=pair.answering.stop if pair.answering else (),
            )
            answer = await self.devices[name].ask(question, ASK_S, on_answer)
            check_answer(answer, self.labels)
            return answer

    def start_examples(self) -> None:
        """Start classifying examples, row by row, so that visitors' questions come in between. From any thread."""
        if not self._examples_started:
            self._examples_started = True
            self._submit_next()

    def _submit_next(self) -> None:
        if not self._closed:
            self._pool.submit(self.examples.classify_next).add_done_callback(self._on_classified)

    def _on_classified(self, future: Future[bool]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            if future.result():
                self._submit_next()
        elif isinstance(error, FedbptError):
            self.error = str(error)
        else:
            self.error = "the examples could not be computed: see the log"
            log.error("computing examples failed", exc_info=error)

    async def aclose(self) -> None:
        """Cancel waiting questions, without waiting for the current one."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for device in self.devices.values():
            await device.aclose()

    def _pair(self) -> SideBySide:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _slot(self) -> _Slot:
        if self._waiting >= MAX_WAITING:
            raise FedbptError(f"{MAX_WAITING} questions are waiting already: try again in a moment", limit=MAX_WAITING)
        return _Slot(self)


class _Slot:
    """A slot in the queue, held within the block."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def __enter__(self) -> None:
        self._comparison._waiting += 1

    def __exit__(self, *_: object) -> None:
        self._comparison._waiting -= 1
