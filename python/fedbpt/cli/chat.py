"""``fedbpt chat``: ask the tuned and the original model, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.text import Text

from fedbpt import tasks
from fedbpt.checking import utf8
from fedbpt.cli.evaluate import model_of
from fedbpt.cli.hint import print_hint
from fedbpt.cli.options import AsJson, Ca, GpuLayers, GpuName, Quiet, Threads, chosen_task
from fedbpt.cli.remote import RemoteSideBySide
from fedbpt.cli.replies import print_probabilities, print_texts
from fedbpt.coordinator.clients import HttpClient
from fedbpt.display.plain_console import PlainConsole
from fedbpt.engine.native_scorer import load_model
from fedbpt.engine.text_generator import Sampling
from fedbpt.errors import ConfigError, DeviceError, InputError, WireError
from fedbpt.net.tls import Tls
from fedbpt.net.tokens import read_private
from fedbpt.plain_text import echo, one_line
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.questions import DEFAULT_TOKENS
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Generation
from fedbpt.side_by_side.sides import SIDES, Probabilities, Side, SideBySide
from fedbpt.side_by_side.votes import Votes
from fedbpt.tasks import Row

PromptFile = Annotated[Path, typer.Option("--prompt", "-p", help="The tuned prompt's file.", show_default=False)]
OwnModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Model name or .gguf file. Default: the one in the prompt file.")
]
OwnTask = Annotated[
    str | None, typer.Option("--task", "-t", help="Task name or file. Default: the one in the prompt file.")
]
Data = Annotated[Path | None, typer.Option("--data", "-d", help="Held-out rows to choose questions from.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", min=1, help=f"Maximum length of a reply, in tokens. Default: the task's, or {DEFAULT_TOKENS}."
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="Sampling temperature; 0: always the likeliest token.")
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Sample only from the likeliest tokens up to this total probability.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of sampling, to get the same replies again.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends a reply; repeatable. Default: the task's.")
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Ask the device at this address (`fedbpt device`) instead of this machine."),
]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the token that the device requires.")]
VotesFile = Annotated[
    Path | None,
    typer.Option(
        "--votes",
        help="After each question, ask which reply is better, or which label is right; add it to this file as a row.",
    ),
]
Questions = Annotated[int, typer.Option("--questions", min=1, help="Number of rows of --data to offer.")]


def chat(
    prompt_file: PromptFile,
    model: OwnModel = None,
    task: OwnTask = None,
    device: Device = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    data: Data = None,
    questions: Questions = 5,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    votes: VotesFile = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Ask the tuned and the original model side by side: your own questions, or texts of held-out rows.

    Example: fedbpt chat --prompt prompt.safetensors --data test.csv
    """
    prompt = Prompt.load(prompt_file)
    needs_task = task is not None or data is not None
    chosen = chosen_task(task, prompt.task, prompt.task_name) if needs_task else prompt.task
    if votes is not None and device is not None:
        raise ConfigError("--votes keeps rows on this machine: ask its own model, without --device", field="--votes")
    kept = None if votes is None else Votes(votes, chosen)
    offered = [] if chosen is None or data is None else _offered(chosen, data, questions)
    how = Sampling(temperature, top_p, seed=seed)
    pair: Pair
    if device is not None:
        token = None if token_file is None else read_private(token_file).decode(errors="replace").strip()
        pair = RemoteSideBySide(HttpClient(device, token=token, tls=Tls(ca=ca)), prompt, chosen)
    else:
        scorer = load_model(model or model_of(prompt), n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu)
        pair = SideBySide(scorer, prompt, chosen)
        print_hint(scorer, shown=not (quiet or as_json))
    console = PlainConsole()
    interactive = sys.stdin.isatty() and not as_json
    if interactive and not quiet:
        _introduce(console, pair.name, prompt.task_name, offered)
    for text, label in _read_questions(offered, interactive):
        try:
            utf8(text, "the question")
            choices = _print_reply(console, pair, text, label, how, max_tokens, tuple(stop) if stop else None, as_json)
            if kept is not None:
                _vote(kept, text, choices, interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.print("stopped; Ctrl-D quits")
        except (InputError, DeviceError, WireError) as error:
            if not interactive:
                raise
            console.print(f"fedbpt: {error}", highlight=False)


class Pair(Protocol):
    """Both models, on this machine (`SideBySide`) or on a device (`RemoteSideBySide`)."""

    name: str
    labels: tuple[str, ...]
    answering: Generation | None

    @property
    def classifies(self) -> bool: ...

    def classify(self, text: str) -> Probabilities: ...

    def generate(
        self, text: str, sampling: Sampling | None, max_tokens: int | None, stop: tuple[str, ...] | None
    ) -> Pieces: ...


class Pieces(Iterator[tuple[Side, str]], Protocol):
    """Pieces of both replies, as they are generated."""

    def close(self) -> None: ...


def _offered(task: tasks.Task, data: Path, n: int) -> list[Row]:
    """``n`` rows of the file, chosen at random with a fixed seed."""
    rows = tasks.read_task_rows(task, data)
    chosen = generator(0, "questions").permutation(len(rows))[:n]
    return [rows[i] for i in sorted(chosen)]


def _introduce(console: PlainConsole, model: str, task: str, offered: Sequence[Row]) -> None:
    console.print(f"{model}: original, and tuned for {task}")
    for number, (text, _) in enumerate(offered, start=1):
        line = Text.assemble("  ", (f"{number}", "bold"), f"  {one_line(text)}")
        console.print(line, overflow="ellipsis", no_wrap=True)
    what = "a number or your own text" if offered else "your text"
    console.print(f"Type {what}; Ctrl-D quits.")


def _read_questions(offered: Sequence[Row], interactive: bool) -> Iterator[tuple[str, int | str | None]]:
    """Yield texts from standard input, each with its row's label or target; None: unknown."""
    while True:
        try:
            line = input("> ") if interactive else input()
        except EOFError:
            return
        word = line.strip()
        if word.isdecimal() and len(word) < 10 and 1 <= int(word) <= len(offered):
            yield offered[int(word) - 1]
        elif word:
            yield word, None


def _print_reply(
    console: PlainConsole,
    pair: Pair,
    text: str,
    label: int | str | None,
    how: Sampling,
    max_tokens: int | None,
    stop: tuple[str, ...] | None,
    as_json: bool,
) -> dict[str, str]:
    """Print the replies to ``text``. Returns what a vote may name: a label, or a side, and the answer that it means."""
    name = pair.labels[label] if isinstance(label, int) else label
    if pair.classifies:
        found = pair.classify(text)
        if as_json:
            original = dict(zip(pair.labels, found.original, strict=True))
            tuned = dict(zip(pair.labels, found.tuned, strict=True))
            _print_json({"text": text, "label": name, "original": original, "tuned": tuned})
        else:
            print_probabilities(console, pair.labels, found, name)
        return {label: label for label in pair.labels}
    if max_tokens is None and pair.answering is None:
        max_tokens = DEFAULT_TOKENS
    with closing(pair.generate(text, how, max_tokens, stop)) as pieces:
        if not as_json:
            return {str(side): reply for side, reply in print_texts(console, pieces).items()}
        replies: dict[str, str] = dict.fromkeys(SIDES, "")
        for side, piece in pieces:
            replies[side] += piece
    _print_json({"text": text, "target": name, "original": replies["original"], "tuned": replies["tuned"]})
    return replies


def _vote(votes: Votes, text: str, choices: Mapping[str, str], interactive: bool) -> None:
    """Ask for the better reply or the right label, and add it as a row; an empty line adds none."""
    may_write = any(name != answer for name, answer in choices.items())  # labels are given
    own_words = ", or = and a better one" if may_write else ""
    question = f"{' or '.join(choices)}{own_words}; Enter: none> "
    known = {name.casefold(): answer for name, answer in choices.items()}
    while True:
        try:
            said = (input(question) if interactive else input()).strip()
        except EOFError:
            return
        own = may_write and said.startswith("=")
        answer = said[1:].strip() if own else known.get(said.casefold(), "").strip()
        if not said:
            return
        if answer:
            break
        if not interactive:
            raise InputError(f"a vote must be {' or '.join(choices)}, or an empty line", field="--votes")
    votes.add(text, answer)


def _print_json(value: dict[str, object]) -> None:
    echo(json.dumps(value, ensure_ascii=False))
    sys.stdout.flush()
