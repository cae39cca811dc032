"""A device's answer to a `Question`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from fedbpt.engine.scorer import Scorer
from fedbpt.engine.text_generator import Sampling
from fedbpt.errors import ScoringInterrupted
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.questions import Answer, Question
from fedbpt.side_by_side.sides import SIDES, SideBySide


def answer_of(
    model: Scorer, question: Question, said: Callable[[Answer], None], cancelled: Callable[[], bool]
) -> Answer:
    """Both sides' answers.

    Args:
        model: the device's.
        question: what is asked, and with which prompt.
        said: called with what there is so far, a piece of text at a time.
        cancelled: asked before each piece.

    Raises:
        PromptError: a damaged prompt, or one for another model.
        InputError: a text that is empty or too long.
        ScoringInterrupted: ``cancelled`` said yes.
    """
    prompt = Prompt.decode(question.prompt, "the question's prompt")
    pair = SideBySide(model, prompt, max_text_tokens=question.max_text_tokens)
    if pair.classifies:
        return Answer(probabilities=tuple(pair.classify(question.text)), done=True)
    how = Sampling(question.temperature, question.top_p, seed=question.seed)
    answer = Answer()
    with closing(pair.generate(question.text, how, question.max_tokens, question.stop)) as pieces:
        for side, piece in pieces:
            if cancelled():
                raise ScoringInterrupted("the answer was cancelled")
            original, tuned = (text + piece * (side == of) for of, text in zip(SIDES, answer.texts, strict=True))
            answer = Answer(texts=(original, tuned), n=answer.n + 1)
            said(answer)
    return Answer(texts=answer.texts, n=answer.n, done=True)
