"""A device's reply to a `Question`."""

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
    model: Scorer, question: Question, on_piece: Callable[[Answer], None], cancelled: Callable[[], bool]
) -> Answer:
    """Compute the replies of both models.

    Args:
        model: the device's model.
        question: a text and a tuned prompt.
        on_piece: called with the replies so far, after each piece of text.
        cancelled: called before each piece; True stops.

    Raises:
        PromptError: the prompt is damaged or for another model.
        InputError: the text is empty or too long.
        ScoringInterrupted: ``cancelled`` returned True.
    """
    prompt = Prompt.decode(question.prompt, "the question's prompt")
    pair = SideBySide(model, prompt, max_text_tokens=question.max_text_tokens)
    if pair.classifies:
        return Answer(probabilities=tuple(pair.classify(question.text)), done=True)
    how = Sampling(question.temperature, question.top_p, seed=question.seed)
    answer = Answer()
    texts = dict.fromkeys(SIDES, "")
    with closing(pair.generate(question.text, how, question.max_tokens, question.stop)) as pieces:
        for side, piece in pieces:
            if cancelled():
                raise ScoringInterrupted("the reply was cancelled")
            texts[side] += piece
            answer = Answer(texts=(texts["original"], texts["tuned"]), n=answer.n + 1)
            on_piece(answer)
    return Answer(texts=answer.texts, n=answer.n, done=True)
