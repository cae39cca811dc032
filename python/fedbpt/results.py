"""Results of `fedbpt.tune` and `fedbpt.evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedbpt.display.console import describe_accuracy, describe_answers
from fedbpt.display.notebook import show_figures
from fedbpt.errors import MissingExtraError
from fedbpt.html_tables import html_table
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.specs import Template
from fedbpt.runs.intervals import wilson_interval
from fedbpt.runs.result import FUTILE, NOT_BETTER, UNSCORED, VARIANTS, RunResult, Score, perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EvaluationResult:
    """The result of evaluating a prompt, or the model without one.

    Attributes:
        n: number of rows.
        correct: number of correct predictions; 0 for target texts.
        loss: mean over rows in nats; for target texts, per token.
        predictions: label indices [n]; −1 for target texts.
    """

    n: int
    correct: int
    loss: float
    predictions: NDArray[np.intp] = field(repr=False)

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return perplexity(self.loss)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (`wilson_interval`)."""
        return wilson_interval(self.correct, self.n)

    @property
    def _generates(self) -> bool:
        return bool(self.n and self.predictions[0] < 0)

    def _repr_html_(self) -> str:
        low, high = self.interval
        figures = [("accuracy", f"{self.accuracy:.4f}"), ("95 % interval", f"{low:.4f} – {high:.4f}")]
        if self._generates:
            figures = [("perplexity", f"{self.perplexity:.3f}")]
        return html_table("Evaluation", [*figures, ("loss", f"{self.loss:.4f} nats"), ("rows", f"{self.n:,}")])

    def __repr__(self) -> str:
        if self._generates:
            return f"EvaluationResult(perplexity={self.perplexity:.3f}, loss={self.loss:.4f}, n={self.n})"
        low, high = self.interval
        return (
            f"EvaluationResult(accuracy={self.accuracy:.4f} [{low:.4f}, {high:.4f}], loss={self.loss:.4f}, n={self.n})"
        )


@dataclass(frozen=True)
class TuneResult:
    """The result of `fedbpt.tune`.

    Attributes:
        prompt: the tuned prompt.
        run: all figures of the run.
        curve: (evaluations so far, mean mini-batch loss in nats) of each round of the search.
        dev_curve: (evaluations so far, accuracy or perplexity) of each evaluation on development rows.
        interrupted: Ctrl-C ended the search before the budget was spent.
    """

    prompt: Prompt
    run: RunResult
    curve: tuple[tuple[int, float], ...] = field(repr=False)
    dev_curve: tuple[tuple[int, float], ...] = field(repr=False)
    interrupted: bool = False

    @property
    def template(self) -> Template:
        """The template selected on the training rows."""
        return self.run.template

    def __repr__(self) -> str:
        return (
            f"TuneResult({self.run.task!r}: {self.run.evaluations} evaluations, {self.run.tokens:,} tokens, "
            f"{self.run.seconds:.1f} s; {self.prompt!r})"
        )

    def _repr_html_(self) -> str:
        run = self.run
        lines = [
            ("model", run.model_name),
            ("template", repr(run.template.pattern)),
            ("evaluations", f"{run.evaluations:,} in {run.rounds:,} rounds"),
            ("forward tokens", f"{run.tokens:,}"),
            ("seconds", f"{run.seconds:.1f}"),
            *((f"zero-shot, {each.template.pattern!r}", describe_accuracy(each)) for each in run.templates),
        ]
        lines += [(f"{name} {_figure_name(run)}", _gain(run, scores)) for name, scores in self._splits() if scores]
        for name, answered in run.answer_scores().items():
            lines.append((f"{VARIANTS[name]}, {run.metric} of answers", describe_answers(answered)))
        if run.is_unscored:
            lines.append(("zero-shot", UNSCORED))
        if run.futile:
            lines.append(("search", FUTILE))
        if run.is_not_better:
            lines.append(("tuned", NOT_BETTER))
        return html_table(f"Tuned for {run.task}", lines) + self.prompt._repr_html_()

    def _splits(self) -> list[tuple[str, dict[str, Score]]]:
        return [("development", self.run.scores("dev")), ("test", self.run.scores("test"))]

    def plot(self) -> Figure:
        """Plot the mini-batch loss and, if there are development rows, their accuracy or perplexity, by evaluations.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("plotting", "plot") from error
        show_figures()
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*_columns(self.curve), linewidth=1, label="mean loss of the population")
        axes.set(xlabel="evaluations", ylabel="loss (nats)", title=self.run.task)
        if self.dev_curve:
            right = axes.twinx()
            name = _figure_name(self.run)
            right.plot(*_columns(self.dev_curve), color="tab:green", marker=".", label=f"development {name}")
            right.set_ylabel(name)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def _figure_name(run: RunResult) -> str:
    return "perplexity" if run.generates else "accuracy"


def _gain(run: RunResult, scores: Mapping[str, Score]) -> str:
    """Zero-shot → tuned, on the same rows; tuned alone where there is no zero-shot figure."""
    after = scores["tuned"]
    low, high = after.interval
    interval = "" if run.generates else f" [{low:.3f}, {high:.3f}]"
    shown = [scores["zero_shot"], after] if "zero_shot" in scores else [after]
    figures = (f"{score.perplexity if run.generates else score.accuracy:.3f}" for score in shown)
    return f"{' → '.join(figures)}{interval} on {after.n:,} rows"


def _columns(points: tuple[tuple[int, float], ...]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
