"""`RemoteSideBySide`: the original and the tuned model of a connected device, with the interface of `SideBySide`."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Generator
from contextlib import closing

from fedbpt.coordinator.clients import HttpClient
from fedbpt.engine.text_generator import Sampling
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.questions import DEFAULT_TOKENS, MAX_TOKENS, Answer, Question, check_answer
from fedbpt.side_by_side.sides import SIDES, Probabilities, Side, answering_of
from fedbpt.tasks import Task


class RemoteSideBySide:
    """Both models, on the device of ``client``. Other arguments as `SideBySide`; errors as `HttpClient.ask`."""

    def __init__(self, client: HttpClient, prompt: Prompt, task: Task | None = None) -> None:
        self.name = f"{prompt.model_name} on {client.name}"
        self.labels = prompt.labels
        self._client = client
        self._task = prompt.task if task is None else task
        self.answering = answering_of(self._task)
        self._fingerprint = prompt.model_fingerprint
        self._prompt = prompt.to_bytes()

    @property
    def classifies(self) -> bool:
        return bool(self.labels)

    def classify(self, text: str) -> Probabilities:
        *_, answer = self._answers(text, Sampling(), 1, ())
        return Probabilities(*answer.probabilities)

    def generate(
        self,
        text: str,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] | None = None,
    ) -> Generator[tuple[Side, str], None, None]:
        """Yield new text of either side's reply, as messages of the device arrive."""
        known = ("", "")
        if self.answering is not None:
            max_tokens = max_tokens or min(self.answering.max_tokens, MAX_TOKENS)
            stop = self.answering.stop if stop is None else stop
        with closing(self._answers(text, sampling or Sampling(), max_tokens or DEFAULT_TOKENS, stop or ())) as answers:
            for answer in answers:
                for side, before, now in zip(SIDES, known, answer.texts, strict=True):
                    if now != before:
                        yield side, now[len(before) :]
                known = answer.texts

    def _answers(
        self, text: str, how: Sampling, max_tokens: int, stop: tuple[str, ...]
    ) -> Generator[Answer, None, None]:
        """Yield the replies so far, and last the complete ones. Closing the generator early stops the device."""
        clipped = " ".join(text.split()) if self._task is None else self._task.clip(text)
        question = Question(
            model_fingerprint=self._fingerprint,
            prompt=self._prompt,
            text=clipped,
            max_text_tokens=None if self._task is None else self._task.max_text_tokens,
            max_tokens=max_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
            stop=stop,
        )
        received: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        request = loop.create_task(self._ask(question, received))
        thread = threading.Thread(target=lambda: loop.run_until_complete(request), name="fedbpt-ask")
        thread.start()
        try:
            while True:
                item = received.get()
                if isinstance(item, BaseException):
                    raise item
                if item.done:
                    check_answer(item, self.labels)
                yield item
                if item.done:
                    return
        finally:
            loop.call_soon_threadsafe(request.cancel)
            thread.join()
            loop.close()

    async def _ask(self, question: Question, received: queue.SimpleQueue[Answer | BaseException]) -> None:
        outcome: Answer | BaseException
        try:
            outcome = await self._client.ask(question, on_answer=received.put)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - raised in the thread that reads the queue
            outcome = error
        await self._client.aclose()
        received.put(outcome)
