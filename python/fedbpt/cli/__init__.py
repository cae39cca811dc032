"""The command line: ``fedbpt COMMAND``. One command a file; errors are one line and an exit code."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from keyword import iskeyword
from types import TracebackType
from typing import Annotated, Any

import typer

from fedbpt.cli.options import help_without_command
from fedbpt.cli.streams import repair_streams
from fedbpt.dashboard import DEFAULT_ADDRESS
from fedbpt.errors import FedbptError, ModelWarning, RunStopped
from fedbpt.plain_text import PlainFormatter, echo
from fedbpt.version import VERSION

COMMANDS = (
    *("demo", "device", "tune", "evaluate", "chat", "serve", "export", "import"),
    *("bench", "models", "tasks", "runs", "dashboard", "devices", "certs"),
)
"""Each a module of `fedbpt.cli`: with a function of its name, or, for a group, with an ``app``.

Names that Python keeps to itself end in ``_`` there.
"""

INTERRUPTED = 130
_COMPLETES = "_FEDBPT_COMPLETE"
_RESUMED = (["demo"], ["tune"], ["models", "pull"])  # the commands that go on where they were stopped

# typer brings its own copy of click in some versions and uses the installed one in others: this is whichever it uses.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"fedbpt {VERSION}")
        raise typer.Exit


def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""
    del version, debug  # the one is done by its callback, the other by main, which outlives the command
    help_without_command(context)


def make_app(wanted: str | None = None) -> typer.Typer:
    """The command line with the one command ``wanted``: a device holds no more than it needs. None, or unknown: all."""
    app = typer.Typer(
        name="fedbpt",
        help="Federated black-box prompt tuning: adapt an LLM across devices that keep their data.\n\n"
        "Example: fedbpt demo",
        context_settings={"help_option_names": ["-h", "--help"]},  # of the commands, too
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(options)
    for name in [wanted] if wanted in COMMANDS else COMMANDS:
        spelled = f"{name}_" if iskeyword(name) else name
        module = import_module(f"fedbpt.cli.{spelled}")
        if hasattr(module, "app"):
            app.add_typer(module.app)
        else:
            app.command(name)(getattr(module, spelled))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """The ``fedbpt`` program. Exit codes: 0 done, 1 it failed, 2 the command was wrong, 130 interrupted."""
    repair_streams()
    if _COMPLETES in os.environ:
        _complete()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # wherever it stands
    given = _with_address([word for word in given if word != "--debug"])
    code = 0
    warnings.filterwarnings("ignore", category=ModelWarning)  # commands print a model's notes
    if logging.lastResort is not None:  # what writes records to the terminal
        logging.lastResort.setFormatter(PlainFormatter())
    try:
        with _terminated_as_interrupted():
            _run(given)
            sys.stdout.flush()  # here a full disk or a broken pipe can still be told
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort, RunStopped) as stop:
        echo(f"fedbpt: {_stopped(given, begun=isinstance(stop, RunStopped))}", err=True)
        code = INTERRUPTED
    except _ClickException as error:
        echo(f"fedbpt: {_usage(error)}", err=True)
        code = error.exit_code
    except BrokenPipeError:  # who reads the output has seen enough: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug:
            sys.excepthook = _show_traceback
            raise
        echo(f"fedbpt: {_one_line(error)}", err=True)
        code = error.exit_code if isinstance(error, FedbptError) else 1
    sys.exit(code)


def _complete() -> None:
    """Answer the shell that wants the rest of a command, as ``fedbpt --install-completion`` has told it to ask."""
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    command = typer.main.get_command(make_app(next(iter(typed.split()[1:]), None)))
    command.main(args=[], prog_name="fedbpt")  # this exits


def _run(given: Sequence[str]) -> None:
    # Not by calling the app: what that makes of Ctrl-C differs between versions of typer.
    wanted = next((word for word in given if not word.startswith("-")), None)
    command = typer.main.get_command(make_app(wanted))
    with command.make_context("fedbpt", list(given)) as context:
        command.invoke(context)


def _with_address(given: Sequence[str]) -> list[str]:
    """``--dashboard`` may stand without its HOST:PORT; typer knows no option whose value may be left out."""
    words = []
    for word, after in pairwise([*given, ""]):
        alone = word == "--dashboard" and not re.fullmatch(r"\S+:\d+", after)
        words.append(f"{word}={DEFAULT_ADDRESS}" if alone else word)
    return words


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    echo("".join(traceback.format_exception(kind, error, trace)).rstrip(), err=True)


def _stopped(given: Sequence[str], begun: bool) -> str:
    """What to say; ``begun``: a run has taken the place of the one that was to be forgotten."""
    if not any(list(given[: len(command)]) == command for command in _RESUMED):
        return "stopped"
    again = shlex.join(word for word in given if not (begun and word == "--fresh"))
    return f"stopped; to go on from there: fedbpt {again}"


def _usage(error: Any) -> str:
    message = " ".join(str(error.format_message()).split()).replace("Value error, ", "")  # as some typers say
    context = error.ctx if isinstance(error, _UsageError) else None
    return message if context is None else f"{message.rstrip('.')}: see `{context.command_path} --help`"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, FedbptError):
        if error.strerror.startswith("No usable temporary directory"):  # as `tempfile` says
            return "there is no folder for temporary files: set TMPDIR to one that can be written"
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "home directory" in text:  # as `pathlib` says, to a library of ours
        return "this user has no home folder: set HOME to one"
    if isinstance(error, FedbptError):
        return text
    return f"unexpected {type(error).__name__}: {text} (a fault of fedbpt: --debug shows where)"


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: its devices are told, its child processes ended.

    Also in the background of a shell script, where processes start with SIGINT ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    terminate = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)
