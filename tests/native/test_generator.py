"""Generated texts against the numpy reference and the scorer, and the reuse of KV between them."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from numpy.typing import NDArray
from tests.support.raises import raises
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.engine.native_generator import NativeGenerator, NativeStream
from fedbpt.engine.text_generator import Placed, Sampling, Token
from fedbpt.errors import InputError, ModelFileError, ScoringInterrupted

TOLERANCE = 1e-3  # nats per token, on float32 weights
GREEDY = Sampling()
PLACEMENTS = pytest.mark.parametrize("placement", ["front", "cue"])


def new(case: Case) -> NativeGenerator:
    """A new generator on the weights that the case has loaded."""
    return NativeGenerator(case.scorer._engine, case.scorer._files)


def placed(ids: NDArray[np.int32], rows: NDArray[np.float32], placement: str) -> Placed:
    """Place the rows after the first token, or in place of the last ones."""
    if placement == "cue":
        return Placed(ids, rows, len(ids) - len(rows))
    return Placed(np.concatenate([ids[:1], np.zeros(len(rows), dtype=np.int32), ids[1:]]), rows, 1)


def tokens(stream: NativeStream, n: int, n_likeliest: int = 0) -> list[Token]:
    return [stream.next(n_likeliest) for _ in range(n)]


def generated(generator: NativeGenerator, given: Placed, n: int, sampling: Sampling = GREEDY) -> list[Token]:
    return tokens(generator.open(given, sampling), n)


def same(case: Case, found: list[Token], expected: list[Token], exactly: bool = False) -> bool:
    """Compare up to rounding: attention sums over cells in the order in which they lie, and activations are quantised.

    ``exactly``: bit for bit, except float32 weights: upstream's attention rounds by where cells lie.
    """
    if exactly and case.model.weights != "f32":
        return found == expected
    most = 1e-4 if case.model.weights == "f32" else 0.05
    close = [abs(a.log_prob - b.log_prob) <= most for a, b in zip(found, expected, strict=True)]
    return all(close) and [token.id for token in found] == [token.id for token in expected]


def inputs(case: Case, given: Placed) -> NDArray[np.float64]:
    rows = case.reference.token_embeddings(given.ids)
    rows[given.rows_at : given.rows_at + len(given.rows)] = given.rows
    return rows


@pytest.mark.parametrize("n_prompt", [0, 1, 4])
@PLACEMENTS
def test_each_token_is_the_likeliest_of_the_reference(case: Case, placement: str, n_prompt: int) -> None:
    given = placed(case.ids(19), case.prompts(1, n_prompt)[0], placement)
    sequence = inputs(case, given)
    for token in tokens(new(case).open(given, GREEDY), 12, n_likeliest=3):
        logits = case.reference.logits(sequence)[-1]
        log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert log_p[token.id] >= log_p.max() - TOLERANCE
        assert abs(token.log_prob - log_p[token.id]) <= TOLERANCE
        assert token.likeliest[0] == (token.id, token.log_prob)
        assert [p for _, p in token.likeliest] == pytest.approx(np.sort(log_p)[:-4:-1], abs=TOLERANCE)
        sequence = np.concatenate([sequence, case.reference.token_embeddings([token.id])])


@PLACEMENTS
def test_greedy_text_is_step_by_step_the_argmax_of_the_scorer(case: Case, placement: str) -> None:
    text, rows = case.ids(19), case.prompts(1, 3)[0]
    found = generated(new(case), placed(text, rows, placement), 8)
    ids = [token.id for token in found]
    # for the scorer, the text before the rows is the prefix, the rows are in front, and the rest is the text
    given = placed(text, rows, placement)
    end = given.rows_at + len(rows)
    for n, token in enumerate(found):
        if placement == "cue" and n == 0:
            [[logits]] = case.scorer.score_with_soft_prompt([text], rows, placement="cue")
        else:
            follows = [*given.ids[end:].tolist(), *ids[:n]]
            [[logits]] = case.scorer.score_with_soft_prompt([follows], rows, None, "front", given.ids[: given.rows_at])
        assert logits[token.id] >= logits.max() - TOLERANCE


@PLACEMENTS
def test_the_text_has_the_log_probability_that_the_scorer_gives(repeatable: Case, placement: str) -> None:
    text, rows = repeatable.ids(19), repeatable.prompts(1, 3)[0]
    found = generated(new(repeatable), placed(text, rows, placement), 8)
    prefix, tail = (text[:1], text[1:]) if placement == "front" else (None, text)
    plan = repeatable.scorer.compile(
        [tail], placement=placement, prefix=prefix, continuations=[[[token.id for token in found]]]
    )
    rounding = TOLERANCE if repeatable.model.weights == "f32" else 0.15  # activations are quantised
    assert abs(plan.score(rows)[0, 0, 0] - sum(token.log_prob for token in found)) <= rounding * len(found)


def test_a_text_that_fills_more_than_a_batch_matches(llama: Case) -> None:
    given = Placed(llama.ids(500), llama.prompts(1, 5)[0], 3)
    [token] = generated(new(llama), given, 1)
    logits = llama.reference.logits(inputs(llama, given))[-1]
    assert logits[token.id] >= logits.max() - TOLERANCE


# --- what is computed once -------------------------------------------------------------------------------------------


def test_a_prompts_rows_and_the_tokens_before_them_are_computed_once(repeatable: Case) -> None:
    generator, rows = new(repeatable), repeatable.prompts(2, 20)
    texts = repeatable.texts([9, 30, 17])
    for text in texts:  # followed by texts with another prompt and without one: the prompt's head is kept
        for prompt in (rows[0], rows[1], rows[0][:0]):
            before = generator.n_tokens
            given = Placed(np.concatenate([[1], np.zeros(len(prompt), dtype=np.int32), text]), prompt, 1)
            stream = generator.open(given, GREEDY)
            found = tokens(stream, 5)
            fresh = len(given.ids) - stream.n_reused
            assert stream.n_reused >= (0 if text is texts[0] else 1 + len(prompt))
            assert generator.n_tokens - before == fresh + 4  # the last token is not decoded
            assert same(repeatable, found, generated(new(repeatable), given, 5))


def test_a_text_continues_from_its_longest_common_prefix(repeatable: Case) -> None:
    generator, rows = new(repeatable), repeatable.prompts(1, 3)[0]
    text = repeatable.ids(40)
    generated(generator, Placed(text), 4)
    for n in (40, 25, 31):
        other = np.concatenate([text[:n], repeatable.ids(6, seed=n)])
        stream = generator.open(Placed(other), GREEDY)
        assert stream.n_reused >= n
        assert same(repeatable, tokens(stream, 4), generated(new(repeatable), Placed(other), 4))
    stream = generator.open(Placed(text, rows, 37), GREEDY)  # reuses KV up to the rows
    assert stream.n_reused == 37
    assert same(repeatable, tokens(stream, 4), generated(new(repeatable), Placed(text, rows, 37), 4))
    stream = generator.open(Placed(text, rows + 1, 37), GREEDY)
    assert stream.n_reused == 37


def test_the_same_text_again_reads_one_token(repeatable: Case) -> None:
    generator, given = new(repeatable), placed(repeatable.ids(40), repeatable.prompts(1, 3)[0], "front")
    first = generated(generator, given, 6)
    stream = generator.open(given, GREEDY)
    assert stream.n_reused == len(given.ids) - 1
    assert same(repeatable, tokens(stream, 6), first, exactly=True)


def test_texts_generated_in_turn_are_those_generated_alone(repeatable: Case) -> None:
    generator = new(repeatable)
    given = [placed(repeatable.ids(n), repeatable.prompts(1, 4, seed=n)[0], "cue") for n in (12, 30, 21)]
    streams = [generator.open(each, Sampling(temperature=0.8, seed=5)) for each in given]
    found: list[list[Token]] = [[], [], []]
    for turn in (0, 0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2):
        found[turn].append(streams[turn].next())
    for each, of_stream in zip(given, found, strict=True):
        alone = generated(new(repeatable), each, 4, Sampling(temperature=0.8, seed=5))
        assert same(repeatable, of_stream, alone, exactly=True)


def test_growth_of_the_cache_does_not_change_texts(repeatable: Case) -> None:
    generator, text = new(repeatable), Placed(repeatable.ids(30), repeatable.prompts(1, 3)[0], 5)
    stream = generator.open(text, GREEDY)
    found = tokens(stream, 3)
    small = generator.n_cells
    others = [generator.open(Placed(repeatable.ids(n)), GREEDY) for n in (480, 490)]
    for other in others:
        tokens(other, 2)
    assert generator.n_cells > small
    found += tokens(stream, 5)
    assert same(repeatable, found, generated(new(repeatable), text, 8))


def test_growth_of_the_cache_keeps_cells_that_a_window_has_passed(repeatable: Case) -> None:
    ids, none = repeatable.ids(60), np.zeros((0, repeatable.model.n_embd), dtype=np.float32)
    generator = new(repeatable)
    growing = generator.open(Placed(ids, none, 0), GREEDY)
    tokens(growing, 4)
    before = generator.n_cells
    others = [generator.open(Placed(repeatable.ids(n)), GREEDY) for n in (480, 490)]
    for other in others:
        tokens(other, 2)
    assert generator.n_cells > before
    tokens(growing, 4)
    again = Placed(ids[:40], none, 0)  # the growing text is past its window of 24 tokens
    stream = generator.open(again, GREEDY)
    assert stream.n_reused == 39
    assert same(repeatable, tokens(stream, 6), generated(new(repeatable), again, 6))


def test_earlier_texts_are_evicted_and_the_cache_does_not_grow_with_their_number(llama: Case) -> None:
    generator = new(llama)
    generated(generator, Placed(llama.ids(200)), 2)
    cells = generator.n_cells
    for seed in range(20):
        generated(generator, Placed(llama.ids(200, seed=seed)), 2)
    assert generator.n_cells == cells


def test_more_prompts_than_heads_still_match(llama: Case) -> None:
    generator, rows = new(llama), llama.prompts(12, 3)
    for _ in range(2):
        for prompt in rows:
            given = placed(llama.ids(9), prompt, "front")
            assert same(llama, generated(generator, given, 3), generated(new(llama), given, 3))


# --- sampling --------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_again(llama: Case) -> None:
    given = Placed(llama.ids(9))
    first, again, other = (generated(new(llama), given, 20, Sampling(1.5, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert generated(new(llama), given, 20, Sampling(1.5)) != generated(new(llama), given, 20, Sampling(1.5))


@pytest.mark.parametrize("sampling", [Sampling(2.0, top_k=1, seed=3), Sampling(2.0, top_p=1e-6, seed=3)])
def test_sampling_from_one_token_gives_the_likeliest(llama: Case, sampling: Sampling) -> None:
    given = Placed(llama.ids(9))
    assert generated(new(llama), given, 8, sampling) == generated(new(llama), given, 8)


def test_token_frequencies_match_their_probabilities(llama: Case) -> None:
    generator, given, n = new(llama), Placed(llama.ids(9)), 3000
    likeliest = generator.open(given, GREEDY).next(5).likeliest
    found = [generator.open(given, Sampling(1.0, seed=seed)).next().id for seed in range(n)]
    for token, log_p in likeliest:
        p = np.exp(log_p)
        assert abs(found.count(token) - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1


# --- ends ------------------------------------------------------------------------------------------------------------


def test_the_context_is_used_to_its_last_token(llama: Case) -> None:
    generator, n_ctx = new(llama), llama.model.n_ctx
    stream = generator.open(Placed(llama.ids(n_ctx - 2)), GREEDY)
    tokens(stream, 3)
    with pytest.raises(InputError, match=str(n_ctx)):
        stream.next()


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (Placed(np.empty(0, dtype=np.int32)), ""),
        (Placed(np.array([5, 10_000], dtype=np.int32)), "10000"),
        (Placed(np.array([5, -1], dtype=np.int32)), "-1"),
        (Placed(np.full(512, 5, dtype=np.int32)), "512"),
        (Placed(np.array([5, 6], dtype=np.int32), np.zeros((2, 64), dtype=np.float32), 1), "2"),
        (Placed(np.array([5, 6], dtype=np.int32), np.zeros((1, 63), dtype=np.float32)), "63"),
        (Placed(np.array([5, 6], dtype=np.int32), np.full((1, 64), np.nan, dtype=np.float32)), "NaN"),
    ],
)
def test_an_invalid_input_is_refused(llama: Case, given: Placed, value: str) -> None:
    generator = new(llama)
    with raises(InputError) as refused:
        generator.open(given, GREEDY)
    assert value in str(refused.value)
    assert generated(generator, Placed(llama.ids(5)), 2) == generated(new(llama), Placed(llama.ids(5)), 2)


@pytest.mark.parametrize("rows_at", [-1, 2, 2**64 - 1, 2**70])
def test_rows_outside_the_text_are_refused(llama: Case, rows_at: int) -> None:
    given = Placed(np.array([5, 6], dtype=np.int32), np.zeros((1, 64), dtype=np.float32), rows_at)
    with raises(InputError):
        new(llama).open(given, GREEDY)
    with raises(InputError, field="n_said"):
        new(llama).open(Placed(np.array([5, 6], dtype=np.int32), n_said=-1), GREEDY)


@pytest.mark.parametrize("rows_at", ["x", -1, 2**70, 2**64 - 1])
def test_the_native_module_survives_arguments_of_other_kinds(llama: Case, rows_at: object) -> None:
    native = llama.scorer._engine.generator()
    ids, rows = np.array([5, 6], dtype=np.int32), np.zeros((1, 64), dtype=np.float32)
    with pytest.raises((TypeError, InputError)):
        native.open(ids, rows, rows_at, 0.0, 1.0, 0, 0)
    stream = native.open(ids, rows, 0, 0.0, 1.0, 0, 0)
    del native  # the text keeps it
    assert stream.n_reused == 0


def test_a_text_of_another_generator_is_refused(llama: Case) -> None:
    mine, others = new(llama), new(llama)
    stream = others.open(Placed(llama.ids(5)), GREEDY)
    with pytest.raises(InputError, match="another generator"):
        mine.next_all([stream], [0])
    expected = generated(new(llama), Placed(llama.ids(5)), 3)
    assert tokens(stream, 3) == expected


def test_a_model_with_damaged_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tiny_gguf.tensors(tiny_gguf.SMALLEST)
    tensors["output_norm.weight"][3] = np.nan
    monkeypatch.setattr(tiny_gguf, "tensors", lambda _model: tensors)
    damaged = Case(tiny_gguf.SMALLEST, tiny_gguf.write(tmp_path / "damaged.gguf", tiny_gguf.SMALLEST))
    with pytest.raises(ModelFileError, match=r"damaged\.gguf"):
        _ = damaged.scorer


def test_more_texts_at_once_than_there_are_slots_are_refused(llama: Case) -> None:
    generator = new(llama)
    streams = [generator.open(Placed(llama.ids(5, seed=i)), GREEDY) for i in range(generator.n_places)]
    with pytest.raises(InputError, match=str(generator.n_places)):
        generator.open(Placed(llama.ids(5)), GREEDY)
    del streams[3]
    generator.open(Placed(llama.ids(5)), GREEDY)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model that is slow enough to be interrupted while it reads a text."""
    model = tiny_gguf.TinyModel(
        "llama", "spm", n_layer=12, n_embd=256, n_head=8, n_head_kv=8, head_dim=32, n_ff=1024, n_ctx=4096
    )
    return Case(model, tiny_gguf.write(tmp_path_factory.mktemp("slow") / "slow.gguf", model))


@pytest.mark.parametrize("by", ["another thread", "a signal handler"])
def test_it_can_be_interrupted_while_reading_without_effect_on_later_texts(slow: Case, by: str) -> None:
    generator, short = new(slow), placed(slow.ids(9), slow.prompts(1, 2)[0], "front")
    expected = generated(generator, short, 3)
    stream = generator.open(Placed(slow.ids(4000)), GREEDY)
    before = generator.n_tokens

    class StoppedError(Exception):
        pass

    def on_signal(*_: object) -> None:
        raise StoppedError

    def act() -> None:
        if by == "another thread":
            time.sleep(0.2)
            stream.cancel()
        else:
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    handler = signal.signal(signal.SIGUSR1, on_signal)
    thread = threading.Thread(target=act)
    thread.start()
    try:
        with pytest.raises((ScoringInterrupted, StoppedError)) as caught:
            stream.next()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, handler)
    assert caught.type is (ScoringInterrupted if by == "another thread" else StoppedError)
    assert generator.n_tokens - before < 4000
    assert generated(generator, short, 3) == expected


def test_cancelling_between_two_tokens_keeps_all_kv(llama: Case) -> None:
    generator, given = new(llama), Placed(llama.ids(30))
    stream = generator.open(given, GREEDY)
    stream.next()
    stream.cancel()
    with pytest.raises(ScoringInterrupted):
        stream.next()
    assert generator.open(given, GREEDY).n_reused == 29


def test_two_threads_generate_the_same_texts_as_alone(llama: Case) -> None:
    generator = new(llama)
    given = [Placed(llama.ids(20, seed=seed)) for seed in (1, 2)]
    found: dict[int, list[Token]] = {}

    def run(i: int) -> None:
        found[i] = generated(generator, given[i], 30)

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, each in enumerate(given):
        assert same(llama, found[i], generated(new(llama), each, 30))


def test_scoring_runs_concurrently(llama: Case) -> None:
    generator, texts = new(llama), llama.texts([9, 20])
    expected = llama.scorer.score_with_soft_prompt(texts, llama.prompts(1, 2), [5, 6])
    stream = generator.open(Placed(llama.ids(20)), GREEDY)
    for _ in range(3):
        stream.next()
        np.testing.assert_array_equal(llama.scorer.score_with_soft_prompt(texts, llama.prompts(1, 2), [5, 6]), expected)


# --- text ------------------------------------------------------------------------------------------------------------


def test_pieces_make_the_text_that_was_tokenised(case: Case) -> None:
    generator, text = case.scorer.generator, "a good movie, 3 € and ☃"
    pieces = b"".join(generator.piece(int(token)) for token in case.scorer.tokenize(text, add_bos=False))
    assert pieces.decode().strip() == text


def test_the_end_of_text_token_is_known_and_has_no_text(case: Case) -> None:
    end = tiny_gguf.vocabulary(case.model).eos
    assert case.scorer.generator.is_end(end)
    assert case.scorer.generator.piece(end) == b""
    assert not case.scorer.generator.is_end(200)


def test_messages_are_refused_by_a_model_without_chat_template(llama: Case) -> None:
    with raises(InputError):
        llama.scorer.generator.chat_ids([("user", "hi")])


def test_a_scorer_has_one_generator(llama: Case) -> None:
    scorer = fedbpt.load_model(llama.path, n_threads=N_THREADS)
    assert scorer.generator is scorer.generator
    assert generated(scorer.generator, Placed(llama.ids(5)), 3) == generated(new(llama), Placed(llama.ids(5)), 3)


# --- several texts in one pass ---------------------------------------------------------------------------------------


def all_of(generator: NativeGenerator, streams: list[NativeStream], n: int) -> list[list[Token]]:
    """The next ``n`` tokens of each stream, generated together."""
    steps = [generator.next_all(streams, [0] * len(streams)) for _ in range(n)]
    return [[token for token in own if isinstance(token, Token)] for own in zip(*steps, strict=True)]


def shifted(case: Case, ids: NDArray[np.int32], seed: int) -> Placed:
    rows = case.prompts(seed + 1, case.model.n_layer)[seed] * 0.1
    return Placed(ids, rows, len(ids) - 1, (0, case.model.n_layer, True))


@pytest.mark.parametrize("placement", ["front", "cue", "layers"])
def test_texts_generated_together_are_as_alone(repeatable: Case, placement: str) -> None:
    texts = repeatable.texts([19, 5, 33])
    if placement == "layers":
        given = [shifted(repeatable, text, i) for i, text in enumerate(texts)]
    else:
        given = [placed(text, rows, placement) for text, rows in zip(texts, repeatable.prompts(3, 3), strict=True)]
    generator = new(repeatable)
    streams = [generator.open(each, GREEDY) for each in given]
    found = all_of(generator, streams, 6)
    alone = [generator.next_all([stream], [2])[0] for stream in streams]  # and each by itself again
    for each, own, last in zip(given, found, alone, strict=True):
        assert isinstance(last, Token)
        assert same(repeatable, [*own, last._replace(likeliest=())], generated(new(repeatable), each, 7))
        assert len(last.likeliest) == 2


def test_a_text_joins_others_and_the_context_grows(llama: Case) -> None:
    generator = new(llama)
    given = [Placed(llama.ids(length, seed=length)) for length in (20, 200, 350)]
    streams = [generator.open(given[0], GREEDY)]
    found = [generator.next_all(streams, [0])]
    streams += [generator.open(each, GREEDY) for each in given[1:]]
    first = all_of(generator, streams, 5)
    assert generator.n_cells >= 570
    expected = [generated(new(llama), each, 6) for each in given]
    assert isinstance(found[0][0], Token)
    assert same(llama, [found[0][0], *first[0]], expected[0])
    assert same(llama, first[1], expected[1][:5])
    assert same(llama, first[2], expected[2][:5])


def test_one_of_several_texts_is_cancelled_or_not_finite(llama: Case) -> None:
    generator = new(llama)
    given = [Placed(llama.ids(20, seed=i)) for i in range(3)]
    much = np.full((llama.model.n_layer, llama.model.n_embd), 3e38, dtype=np.float32)  # twice that is infinite
    wrong = Placed(llama.ids(20, seed=9), much, 19, (0, llama.model.n_layer, True))
    streams = [generator.open(each, GREEDY) for each in (*given, wrong)]
    streams[1].cancel()
    steps = [generator.next_all(streams, [0] * 4) for _ in range(3)]
    for step in steps:
        assert isinstance(step[1], ScoringInterrupted)
        assert isinstance(step[3], InputError)
    for i in (0, 2):
        found = [token for step in steps if isinstance(token := step[i], Token)]
        assert same(llama, found, generated(new(llama), given[i], 3))


def test_reading_a_text_among_others_can_be_cancelled(slow: Case) -> None:
    generator, short = new(slow), placed(slow.ids(9), slow.prompts(1, 2)[0], "front")
    expected = generated(new(slow), short, 3)
    streams = [generator.open(short, GREEDY), generator.open(Placed(slow.ids(4000)), GREEDY)]
    threading.Timer(0.2, streams[1].cancel).start()
    token, interrupted = generator.next_all(streams, [0, 0])
    assert isinstance(token, Token)
    assert isinstance(interrupted, ScoringInterrupted)
    assert same(slow, [token, *all_of(generator, streams[:1], 2)[0]], expected)


def test_a_closed_text_cannot_be_continued(llama: Case) -> None:
    generator = new(llama)
    stream = generator.open(Placed(llama.ids(5)), GREEDY)
    stream.close()
    with pytest.raises(InputError, match="closed"):
        generator.next_all([stream], [0])


def test_texts_that_share_their_beginning_outgrow_the_context(llama: Case) -> None:
    generator, head = new(llama), llama.ids(230, seed=1)
    given = [Placed(np.concatenate([head, llama.ids(3, seed=i)])) for i in range(generator.n_places)]
    streams, first = [], []
    for each in given:
        streams.append(generator.open(each, GREEDY))
        first += generator.next_all(streams[-1:], [0])  # computed, so that the next one shares its KV
    assert all(stream.n_reused >= 230 for stream in streams[1:])
    found = all_of(generator, streams, 40)
    streams.pop()
    joining = Placed(llama.ids(460, seed=99))
    streams.append(generator.open(joining, GREEDY))
    last = [own[0] for own in all_of(generator, streams, 1)]
    for each, begun, own, token in zip(given[:-1], first, found, last, strict=False):
        assert isinstance(begun, Token)
        assert same(llama, [begun, *own, token], generated(new(llama), each, 42))
    assert same(llama, last[-1:], generated(new(llama), joining, 1))


def test_a_text_that_goes_on_takes_the_place_of_its_own_kv(llama: Case) -> None:
    generator = new(llama)
    given = [Placed(llama.ids(40, seed=i)) for i in range(generator.n_places)]
    streams = [generator.open(each, GREEDY) for each in given]
    said = [[token.id for token in own] for own in all_of(generator, streams, 3)]
    del streams
    for each, ids in zip(reversed(given), reversed(said), strict=True):
        stream = generator.open(Placed(np.concatenate([each.ids, np.array(ids, dtype=np.int32)])), GREEDY)
        assert stream.n_reused == 42
        del stream


def test_a_stream_is_given_once(llama: Case) -> None:
    generator = new(llama)
    stream = generator.open(Placed(llama.ids(5)), GREEDY)
    with pytest.raises(InputError, match="twice"):
        generator.next_all([stream, stream], [0, 0])


def test_a_full_context_is_one_texts_own_error(llama: Case) -> None:
    generator = new(llama)
    streams = [generator.open(Placed(llama.ids(n, seed=n)), GREEDY) for n in (generator.n_ctx - 1, 10)]
    steps = [generator.next_all(streams, [0, 0]) for _ in range(4)]
    assert isinstance(steps[-1][0], InputError)
    assert all(isinstance(step[1], Token) for step in steps)
