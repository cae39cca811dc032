"""Untrusted text is escaped: on a terminal, in a log, in Prometheus' format, in Markdown, in a page's source."""

from __future__ import annotations

import ast
import io
import json
import logging
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

from fedbpt import cli
from fedbpt.display.notebook import NotebookDisplay
from fedbpt.display.plain_console import PlainConsole
from fedbpt.errors import FedbptError, InputError, MissingExtraError
from fedbpt.net.prometheus import Family, Sample, exposition
from fedbpt.plain_text import MOST_TOLD, PlainFormatter, echo, one_line, plain
from fedbpt.prompts.model_card import model_card, use_in_fedbpt
from fedbpt.protocol.specs import Template
from fedbpt.runs.event_log import Entry, Journal, Line, Logged
from fedbpt.runs.events import DeviceLost
from tests.unit.prompts.test_prompt import make

PACKAGE = Path(cli.__file__).parent.parent
HOSTILE = "a\x1b[2J\x1b]0;title\x07b\x9b31m\x08\r\x7f \u202egnp\u2066\u200f\u2028\ud83d\U000e0041 [red]c[/] :boom:"
OBEYED = {*map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x200E, 0x200F, 0x2028, *range(0x202A, 0x202F)])}
OBEYED |= set(map(chr, [*range(0x2066, 0x206A), 0xD83D, 0xE0041]))


def is_harmless(text: str) -> bool:
    return not OBEYED & set(text)


# --- strings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve — ü 日本 👩‍💻\tx\n", "naïve — ü 日本 👩‍💻\tx\n"),
        ("\x1b[31mred", "\\u001b[31mred"),
        ("\x9b31m", "\\u009b31m"),
        ("\x7f\x00\r", "\\u007f\\u0000\\r"),
        ("abc\u202edef", "abc\\u202edef"),
        ("cut \ud83d", "cut \\ud83d"),
        ("\U000e0041", "\\udb40\\udc41"),
    ],
)
def test_control_characters_are_escaped_and_the_rest_is_kept(text: str, shown: str) -> None:
    assert plain(text) == shown == plain(shown)


def test_json_stays_the_same_value() -> None:
    value = {HOSTILE: [HOSTILE, 1]}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert json.loads(plain(text)) == value
        assert is_harmless(plain(text))


def test_a_cut_line_gives_its_original_length() -> None:
    assert one_line(" a\n\tb\x1b ", 100) == "a b\\u001b"
    for text in ("x" * 15_000_000, "\x1b" * 15_000_000, "a b " * 4_000_000):
        line = one_line(text, MOST_TOLD)
        assert len(line) <= MOST_TOLD
        assert f"{len(text):,} characters" in line
        assert one_line(line, MOST_TOLD) == line
    assert one_line("y" * MOST_TOLD, MOST_TOLD) == "y" * MOST_TOLD


def test_an_error_is_one_plain_line_whatever_it_quotes() -> None:
    assert is_harmless(str(InputError(HOSTILE)))
    assert str(InputError("two\nlines")) == "two lines"
    assert len(str(FedbptError("x" * 10**6))) < 10**4
    assert "pip install" in str(MissingExtraError("this", "that"))


# --- terminals -------------------------------------------------------------------------------------------------------


def test_the_console_shows_neither_markup_nor_escapes() -> None:
    stream = io.StringIO()
    console = PlainConsole(file=stream, width=250, force_terminal=True, color_system="truecolor")
    table = Table("name", title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    for shown in (HOSTILE, Text(HOSTILE), table):
        console.print(shown, highlight=False)
    console.print(Text.assemble((HOSTILE, "red")))
    text = stream.getvalue()
    assert text.count("[red]c[/] :boom:") == 6
    assert text.count("\\u001b[2J\\u001b]0;title") == 6
    assert "\x1b[31m" in text  # our own styles are escapes, too
    assert not {"\x1b[2J", "\x1b]"} & {text[i : i + n] for i in range(len(text)) for n in (2, 4)}
    assert is_harmless(text.replace("\x1b[", ""))


def test_echo_and_logging_are_plain(capfd: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    echo(HOSTILE, err=True)
    out, err = capfd.readouterr()
    assert out == err == f"{plain(HOSTILE)}\n"
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", (HOSTILE,), (ValueError, error, None))
    assert is_harmless(PlainFormatter().format(record))


def test_a_command_shows_hostile_arguments_and_files_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = 'name = "a\\u001b[2J\\u202e"\nlabels = ["x"]\n[[templates]]\npattern = "{text}:"\nlabel_words = ["x"]'
    (tmp_path / "task.toml").write_text(name)
    (tmp_path / "run.toml").write_text('task = "task.toml"\ndevices = ["http://127.0.0.1:9"]')
    for arguments in (
        ["runs", "show", "\x1b[2J", "--store", "\x1b[2J.db"],
        ["no-\x1b[2J-command"],
        ["tune", "run.toml"],
        ["tune", "run.toml", "--listen", "\x1b[2J"],
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        told = capsys.readouterr()
        assert is_harmless(told.out + told.err), arguments
        assert told.err


# --- files and formats -----------------------------------------------------------------------------------------------


def test_a_journals_lines_are_plain_and_say_the_same() -> None:
    lines: list[Line] = []
    journal = Journal(lambda line: lines.append(line) or "")
    said = HOSTILE.replace("\ud83d", "")
    journal(DeviceLost(device="a", round=1, reason=said))
    journal(Logged(level="WARNING", logger="x", message=said))
    for line in lines:
        assert is_harmless(line.json.decode())
        assert b"\n" not in line.json
        assert isinstance(line.entry, Entry)
    assert json.loads(lines[0].json)["event"]["reason"] == said


def test_a_label_of_prometheus_ends_where_it_should() -> None:
    value = 'm"} 1\nfedbpt_run_finished{run="r\\\x1b[2J'
    text = exposition([Family("run_info", "gauge", "What.", [Sample(1, {"model": value})])])
    assert text.splitlines()[2:] == [
        'fedbpt_run_info{model="m\\"} 1\\nfedbpt_run_finished{run=\\"r\\\\\\\\u001b[2J"} 1'
    ]


def test_a_notebook_shows_no_markup_of_others() -> None:
    display = NotebookDisplay()
    display(DeviceLost(device="a", round=1, reason='<img src=x onerror="alert(1)"> \x1b[2J'))
    assert "<img" not in display._repr_html_()
    assert is_harmless(repr(display))


NAMES = (
    "<script>alert(1)</script>",
    "[x](javascript:alert(1)) ![y](https://evil.example/y.png)",
    "a | b | c",
    "\\| *b* _i_ `c` ~~s~~ $m$ # h",
    "https://evil.example www.evil.example me@evil.example <https://evil.example>",
    "one\n\n# two\n```\n<b>three</b>",
    "``` ` ```` \\` \x1b[2J\u202e",
    "- `a`",
    "12. `a`",
    "$(touch x); `touch y` 'z' \"w\"",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_card_shows_names_and_texts_as_they_are(name: str) -> None:
    word = f" {name.strip()}"
    template = Template(pattern=f"{name} {{text}}\nMood: (", label_words=(" good", word))
    prompt = make(
        task_name=name, model_name=name, architecture=name, labels=("good", name), template=template,
        history=({"method": name, "base_model": name, "seed": 3, "tuned_accuracy": name},),
    )  # fmt: skip
    text = model_card(prompt, use_in_fedbpt(prompt, "p.safetensors"))
    assert is_harmless(text)
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    inline = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in (*tokens, *inline)}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "list_item_open"}
    assert not kinds & {"em_open", "strong_open", "s_open"}
    headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert [len(headings), "".join(child.content for child in headings[0].children or [])] == [
        6,
        f"{one_line(name)}: a soft prompt for {one_line(name)}",
    ]
    cells = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "td_open"]
    shown = ["".join(child.content for child in cell.children or []) for cell in cells]
    assert shown.count(one_line(name)) == 5  # model, architecture, label, method, base model
    assert one_line(json.dumps(word, ensure_ascii=False)) in shown
    fences = [token.content for token in tokens if token.type == "fence"]
    assert [fences[0], len(fences)] == [f"{plain(template.pattern)}\n", 3]


# --- the source ------------------------------------------------------------------------------------------------------

PARSED = {
    "props",
    "style",
    "html",
    "markdown",
    "add_slot",
    "run_javascript",
    "add_head_html",
    "add_body_html",
    "mermaid",
}
"""Methods and elements of NiceGUI that do not take plain text."""

BUILT = (ast.JoinedStr, ast.BinOp, ast.Call)
"""Expressions that build a string."""

SAFE = {"qr_svg"}
"""Functions whose result holds no untrusted text, such as a QR code."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def is_built(part: ast.AST) -> bool:
    return isinstance(part, BUILT) and not (isinstance(part, ast.Call) and getattr(part.func, "id", "") in SAFE)


def calls(path: Path) -> list[tuple[ast.Call, str]]:
    """Yield calls with the name of the called function or method."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.append((node, name))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_string_is_put_together_for_a_parser(path: Path) -> None:
    in_page = "dashboard" in path.parts
    wrong = [
        f"{path.name}:{node.lineno}: {name}"
        for node, name in calls(path)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords))
        if (in_page and name in PARSED and any(is_built(part) for part in ast.walk(argument))) or name == "from_markup"
    ]
    wrong += [
        f"{path.name}:{node.lineno}: markup"
        for node, name in calls(path)
        for keyword in node.keywords
        if keyword.arg == "markup" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
    ]
    wrong += [f"{path.name}:{node.lineno}: TextColumn" for node, name in calls(path) if name == "TextColumn"
              and "markup" not in {keyword.arg for keyword in node.keywords}]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_everything_that_is_printed_is_plain(path: Path) -> None:
    if path.name in ("plain_text.py", "terminal.py"):
        return  # where it is made so
    wrong = [
        f"{path.name}:{node.lineno}: {ast.unparse(node.func)}"
        for node, name in calls(path)
        if ast.unparse(node.func) in ("typer.echo", "click.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write")
        or (isinstance(node.func, ast.Name) and name in ("print", "Console"))
    ]
    assert not wrong
