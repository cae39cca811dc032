"""A device without a model, whose losses are a known function of the candidates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from fedbpt.errors import ScoringInterrupted
from fedbpt.protocol import codec
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import (
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    LocalResult,
    LocalWork,
    PooledResult,
    Result,
    RoundPlan,
    RoundReport,
    SelectResult,
    SelectWork,
)
from fedbpt.protocol.specs import Array
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.search.population import sample_population

FINGERPRINT = "sha256:toy"

TOY = TaskIdentity.of("toy", ("x", "y"), (("text",), "label", None))  # a Task's default reading
"""The identity of `tests.support.toy_scene.ToyTask`."""


class FakeDevice:
    """Losses are squared distances to ``target``. ``slow_s``: duration of a round; ``fail``: raised by its work.

    ``gate``: cleared to hold a round; ``change``: applied to reports.
    """

    def __init__(
        self,
        name: str,
        *,
        slow_s: float = 0.0,
        target: float = 1.0,
        fingerprint: str = FINGERPRINT,
        task: TaskIdentity | None = TOY,
    ) -> None:
        self.name = name
        self.slow_s = slow_s
        self.evaluate_slow_s = 0.0
        self.target = target
        self.fingerprint = fingerprint
        self.task = task
        self.fail: Exception | None = None
        self.change: Callable[[RoundReport], RoundReport] = lambda report: report
        self.plans: list[RoundPlan] = []
        self.requests: list[EvaluateRequest] = []
        self.questions: list[Question] = []
        self.interrupts = 0
        self.gate = threading.Event()
        self.gate.set()

    def info(self) -> DeviceInfo:
        return DeviceInfo(
            name=self.name,
            version="0",
            model_fingerprint=self.fingerprint,
            model_name=self.fingerprint.split(":")[1],
            backend="toy",
            n_train=16,
            n_dev=10,
            n_test=20,
            ram_bytes=2**30,
            rss_bytes=2**20,
            peak_rss_bytes=2**21,
            task=self.task,
        )

    def run(self, plan: RoundPlan, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> RoundReport:
        self.plans.append(plan)
        began = time.monotonic()
        while time.monotonic() - began < self.slow_s or not self.gate.is_set():
            if cancelled():
                raise ScoringInterrupted("cancelled")
            progress(1, 2)
            time.sleep(0.005)
        if self.fail is not None:
            raise self.fail
        return self.change(
            RoundReport(
                run=plan.run,
                round=plan.round,
                device=plan.device,
                plan_digest=codec.digest(plan),
                result=self._result(plan),
                n_texts=8,
                evaluations=4,
                tokens=32,
                seconds=time.monotonic() - began,
                peak_rss_bytes=3 * 2**20,
            )
        )

    def interrupt(self) -> None:
        self.interrupts += 1

    def answer(self, question: Question, said: Callable[[Answer], None], cancelled: Callable[[], bool]) -> Answer:
        """Both sides repeat the text, one word per piece, each taking ``slow_s``."""
        self.questions.append(question)
        texts = ("", "")
        for n, word in enumerate(question.text.split(), start=1):
            began = time.monotonic()
            while time.monotonic() - began < self.slow_s:
                if cancelled():
                    raise ScoringInterrupted("cancelled")
                time.sleep(0.005)
            texts = (f"{texts[0]}{word} ", f"{texts[1]}{word.upper()} ")
            said(Answer(texts=texts, n=n))
        if self.fail is not None:
            raise self.fail
        return Answer(texts=texts, n=n, done=True)

    def evaluate(
        self, request: EvaluateRequest, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> EvaluateReport:
        self.requests.append(request)
        began = time.monotonic()
        while time.monotonic() - began < self.evaluate_slow_s:
            if cancelled():
                raise ScoringInterrupted("cancelled")
            progress(1, 2)
            time.sleep(0.005)
        n = self.info().n_dev if request.split == "dev" else self.info().n_test
        n = min(n, request.max_rows or n)
        distances = [self._loss(latent) for latent in request.latents.numpy()]
        d = request.latents.shape[1]
        return EvaluateReport(
            n=n,
            correct=tuple(int(n * max(0.0, 1 - 0.5 * distance / (d * self.target**2))) for distance in distances),
            loss_sums=tuple(n * distance for distance in distances),
            seconds=0.01,
        )

    def _loss(self, latent: np.ndarray) -> float:
        return float(((latent - self.target) ** 2).sum())

    def _result(self, plan: RoundPlan) -> Result:
        work = plan.work
        if isinstance(work, SelectWork):
            return SelectResult(loss_sums=Array.of(np.array([float(len(t.pattern)) for t in work.templates])))
        if isinstance(work, LocalWork):
            mean = work.state.mean.numpy()
            return LocalResult(mean=Array.of(mean + 0.1), fitness=self._loss(mean), sigma_squares=1.0)
        population = sample_population(work.state, work.popsize, plan.seed, work.generation)
        return PooledResult(losses=Array.of(np.array([self._loss(z) for z in population])))
