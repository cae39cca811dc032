"""The compare page in the browser: a tiny model, tuned over real device processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from fedbpt import PromptSpec, load_model
from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.dashboard.comparison import models_of_run
from fedbpt.dashboard.examples import KINDS
from fedbpt.device.device import Device
from fedbpt.net.tokens import watch_token
from fedbpt.protocol.questions import DEFAULT_TOKENS
from fedbpt.protocol.specs import Template
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.side_by_side.sides import Side
from fedbpt.tasks import Task, load_task, write_rows
from tests.browser.conftest import DESKTOP, PHONE, OpenPage, dashboard_of, shown
from tests.browser.test_stored_runs import WCAG_AA
from tests.integration.processes import Fleet
from tests.integration.test_cli_processes import Workshop
from tests.native import tiny_gguf
from tests.unit.engine.test_text_stream import TASK_FILE as MANNER_FILE
from tests.unit.engine.test_text_stream import rows as manner_rows

WATCH_THE_BAR = """() => {
    const bar = document.querySelector('[aria-label="Asking both"]');
    new MutationObserver(() => { window.moved = window.moved || getComputedStyle(bar).display !== "none"; })
        .observe(bar, {attributes: true});
}"""


@pytest.fixture
def workshop(tmp_path: Path, fleet: Fleet) -> Workshop:
    return Workshop(tmp_path, fleet)


def shares(side: object) -> list[float]:
    """The percentages shown on one side."""
    texts = side.locator(".share").all_inner_texts()  # type: ignore[attr-defined]
    return [float(text.removesuffix(" %")) for text in texts]


def test_models_can_be_compared_when_the_run_is_finished(workshop: Workshop, open_page: OpenPage) -> None:
    _, urls = workshop.devices()
    workshop.run_file(urls, "rounds = 12")
    process = workshop.spawn("tune", "run.toml", "--dashboard", "127.0.0.1:0", "--questions", "test.jsonl")
    page = open_page(dashboard_of(process))
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_role("button", name="movie").first).to_be_visible()  # before: "when the run is finished"

    tuned, original = page.locator(".side", has_text="Tuned"), page.locator(".side", has_text="Original")
    page.get_by_role("button", name="movie").first.click()
    expect(page.get_by_role("status")).to_contain_text("Expected:")
    expect(tuned).to_contain_text("%")
    row_says = page.get_by_role("status").inner_text().removeprefix("Expected: ")
    for side in (original, tuned):
        assert sum(shares(side)) == pytest.approx(100, abs=0.2)
        right = side.locator(".most").first.inner_text() == row_says
        expect(side.locator(".state")).to_have_text("right" if right else "wrong")
        expect(side.locator(".verdict")).to_have_text(side.locator(".most").first.inner_text())

    held_out = page.locator(".held-out")
    expect(held_out.locator(".count")).to_have_text(re.compile(r"^(\d+) classified: the two models differ on \d+$"))
    n_rows = int(held_out.locator(".count").inner_text().split()[0])
    kinds = held_out.locator(".kind").all_inner_texts()
    assert [kind.partition(":")[0] for kind in kinds] == list(KINDS.values())
    counts = [re.fullmatch(r".*: (\d+) of (\d+)", kind) for kind in kinds]
    assert sum(int(found[1]) for found in counts if found) == n_rows
    assert {int(found[2]) for found in counts if found} == {n_rows}
    for kind, verdicts in (("Only the tuned", ("wrong", "right")), ("Both are right", ("right", "right"))):
        group = held_out.locator("> div", has_text=kind)
        if group.get_by_role("button").count():
            group.get_by_role("button").first.click()
            for side, said in zip((original, tuned), verdicts, strict=True):
                expect(side.locator(".state")).to_have_text(said)

    first, last = held_out.get_by_role("button").first, held_out.get_by_role("button").last
    found = []
    for offered in (first, last):
        offered.click()
        expect(page.get_by_label("Your text")).to_have_value(offered.inner_text())
        expect(page.get_by_role("status")).to_contain_text("Expected:")
        found.append(shares(tuned))
    assert found[0] != found[1]
    first.click()
    expect(tuned.locator(".share").first).to_have_text(f"{found[0][0]:.1f} %")
    page.evaluate("buttons => buttons.forEach(each => each.click())", [first.element_handle(), last.element_handle()])
    expect(tuned.locator(".share").first).to_have_text(f"{found[1][0]:.1f} %")  # the last one, not the first
    expect(page.get_by_label("Your text")).to_have_value(last.inner_text())

    page.get_by_label("Your text").fill("good great movie 1")
    page.get_by_label("Your text").press("Enter")
    expect(page.get_by_role("status")).to_have_text("")
    expect(tuned.locator(".state")).to_be_hidden()
    page.get_by_label("Your text").press("Shift+Enter")
    page.keyboard.type("more")
    expect(page.get_by_label("Your text")).to_have_value("good great movie 1\nmore")
    code, out, _ = workshop.run(
        "chat", "--prompt", "runs/mood.safetensors", "--model", "tiny.gguf", "--task", "mood.toml", "--json",
        stdin="good great movie 1\n",
    )  # fmt: skip
    assert code == 0
    expected = json.loads(out)
    for side, name in ((original, "original"), (tuned, "tuned")):
        assert shares(side) == [pytest.approx(100 * p, abs=0.06) for p in expected[name].values()]

    here = [shares(side) for side in (original, tuned)]
    page.get_by_role("button", name="movie").first.click()  # something else between
    expect(page.get_by_role("status")).to_contain_text("Expected:")
    page.get_by_label("Your text").fill("good great movie 1")
    page.get_by_label("Answered by").click()
    page.get_by_role("option", name=re.compile(r"^a\b")).first.click()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("status")).to_have_text("")
    assert [shares(side) for side in (original, tuned)] == here

    page.get_by_label("Your text").fill(" ")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("empty")
    page.close()
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_compare_page_is_accessible_and_fits_a_phone(workshop: Workshop, open_page: OpenPage, scheme: str) -> None:
    _, urls = workshop.devices()
    workshop.run_file(urls, "rounds = 2")
    assert workshop.run("tune", "run.toml", "--json")[0] == 0
    more = ("--model", workshop.folder / "tiny.gguf", "--task", workshop.folder / "mood.toml")
    votes = workshop.folder / "votes.jsonl"
    url = shown(workshop.fleet, "mood", workshop.folder / "runs" / "runs.db", *more, "--votes", votes)
    for size in (DESKTOP, PHONE):
        page = open_page(url, size, scheme)
        page.goto(f"{url}/compare")
        page.get_by_label("Your text").fill("bad movie")
        page.evaluate(WATCH_THE_BAR)
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(page.locator(".side").first).to_contain_text("%")
        expect(page.get_by_role("progressbar", name="Asking both")).to_be_hidden()
        if size == DESKTOP:  # the model is loaded
            assert page.evaluate("window.moved")
        expect(page.locator(".side .state").first).to_be_hidden()  # nobody knows the answer
        expect(page.get_by_role("button", name="Compare", exact=True)).to_have_css("opacity", "1")
        page.locator(".vote").get_by_role("button").first.click()
        expect(page.locator(".vote .what")).to_contain_text("kept in")
        found = Axe().run(page, options=WCAG_AA)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    first_label = load_task(workshop.folder / "mood.toml").labels[0]
    assert [json.loads(line) for line in votes.read_text().splitlines()] == [
        {"text": "bad movie", "label": first_label}
    ] * 2


def test_an_absent_model_is_reported_in_one_line(workshop: Workshop, open_page: OpenPage) -> None:
    _, urls = workshop.devices()
    workshop.run_file(urls, "rounds = 1")
    assert workshop.run("tune", "run.toml", "--json")[0] == 0
    url = shown(workshop.fleet, "mood", workshop.folder / "runs" / "runs.db", "--task", workshop.folder / "mood.toml")
    page = open_page(url)
    page.goto(f"{url}/compare")
    page.get_by_label("Your text").fill("bad movie")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("model")


def test_texts_are_generated_side_by_side(tmp_path: Path, fleet: Fleet, open_page: OpenPage) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.LLAMA)
    (tmp_path / "manner.toml").write_text(MANNER_FILE)
    task, scorer = load_task(tmp_path / "manner.toml"), load_model(model, n_threads=1)
    settings = RunSettings(rounds=1, popsize=4, prompt=PromptSpec(d=6)).for_labels(())
    client = InProcessClient(Device("a", scorer, manner_rows(6), test_rows=manner_rows(2, 6), task=task))
    with RunStore(tmp_path / "runs.db") as store:
        result = Federation([client], task, settings, settings.aggregator(), store, "manner").run()
    expected: dict[Side, str] = {"original": "", "tuned": ""}
    for side, piece in models_of_run(scorer, task, result).generate("question 3", max_tokens=DEFAULT_TOKENS):
        expected[side] += piece

    given = ("--model", model, "--task", tmp_path / "manner.toml", "--votes", tmp_path / "votes.jsonl")
    link = shown(fleet, "manner", tmp_path / "runs.db", *given, "--token-file", tmp_path / "token")
    url, _, token = link.partition("/?token=")
    page = open_page(link)
    expect(page.locator(".tile.hero")).to_contain_text("Perplexity")
    page.goto(f"{url}/compare")
    expect(page.locator(".vote")).to_be_hidden()
    page.get_by_label("Your text").fill("question 3")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("status").first).to_have_text("")
    ballot = page.locator(".vote")
    expect(ballot).to_contain_text("Which reply is better?")
    ballot.get_by_role("button", name="Tuned").click()
    expect(ballot.get_by_role("status")).to_contain_text("kept in")
    expect(ballot.get_by_role("button", name="Original")).to_be_hidden()  # one row for each question
    page.get_by_role("button", name="Compare", exact=True).click()
    ballot.get_by_role("button", name="Keep it").click()
    expect(ballot.get_by_role("status")).to_contain_text("empty")
    ballot.get_by_label("A better one").fill(" my own é ")
    ballot.get_by_role("button", name="Keep it").click()
    expect(ballot.get_by_role("status")).to_contain_text("kept in")
    column = task.label_column
    assert [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text(encoding="utf-8").splitlines()] == [
        {"text": "question 3", column: expected["tuned"].strip()},
        {"text": "question 3", column: "my own é"},
    ]
    page.goto(f"{url}/compare?token={watch_token(token)}")  # who only watches may ask, but not vote
    page.get_by_label("Your text").fill("question 3")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("status").first).to_have_text("")
    expect(page.locator(".vote")).to_have_count(0)
    assert all(expected.values())
    for shown_side, said in zip(page.locator(".said").all(), expected.values(), strict=True):
        expect(shown_side).to_have_text(said.replace("\0", ""), use_inner_text=False)


def test_untrusted_text_never_runs_as_a_script(tmp_path: Path, fleet: Fleet, open_page: OpenPage) -> None:
    script = "window.ran = true"
    labels = (
        f'" :data-x="({script})" y="',
        f'<img src=x onerror="{script}">',
        f"`${{{script}}}` {{{{ {script} }}}}",
        f"</script><script>{script}</script>",
    )
    words = (" good", " bad", " one", " two")
    template = Template(pattern=f"{{text}}\n<img src=x onerror='{script}'>:", label_words=words)
    task = Task(name="mood", labels=labels, templates=(template,))
    (tmp_path / "mood.json").write_bytes(msgspec.json.encode(task))
    model = tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.LLAMA)
    scorer, settings = load_model(model, n_threads=1), RunSettings(rounds=1, popsize=4, prompt=PromptSpec(d=6))
    mine = [(f"{label} {i}", i % 4) for i, label in enumerate(labels * 3)]
    write_rows(tmp_path / "rows.jsonl", mine, labels)
    with RunStore(tmp_path / "runs.db") as store:
        client = InProcessClient(Device("a", scorer, mine, test_rows=mine, task=task))
        Federation([client], task, settings, settings.aggregator(), store, "mood").run()
        store.record_losses("mood", 1, {"a": labels[0] + labels[1]})
    more = ("--model", model, "--task", tmp_path / "mood.json", "--questions", tmp_path / "rows.jsonl")
    url = shown(fleet, "mood", tmp_path / "runs.db", *more)
    page = open_page(url)
    expect(page.locator(".notices")).to_contain_text(labels[0] + labels[1])
    assert page.evaluate("window.ran") is None
    page.goto(f"{url}/compare")
    for label in labels:
        expect(page.get_by_label(f"Tuned: {label}", exact=True)).to_be_visible()
    page.get_by_role("button", name=labels[0]).first.click()
    expect(page.get_by_role("status")).to_contain_text("Expected:")
    page.get_by_label("Your text").fill(labels[1])
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("status")).to_have_text("")
    assert page.evaluate("window.ran") is None
    assert page.locator("img[src=x], [data-x]").count() == 0
