"""What a run will cost each device: tokens, seconds and bytes, from its settings and the devices' infos.

These are upper bounds: every text is taken to be as long as the task allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.means_fit import N_PUBLIC
from fedbpt.aggregation.methods import method_named
from fedbpt.aggregation.readout import EXCHANGES, ReadoutFit
from fedbpt.bench.measurement import Measurement, Projection
from fedbpt.coordinator.costs.layer_cost import EXCHANGES as EXCHANGES_OF_LAYERS
from fedbpt.coordinator.costs.layer_cost import (
    LOGISTIC_EXCHANGES,
    MEANS_EXCHANGES,
    layer_bytes,
    logistic_bytes,
    means_bytes,
)
from fedbpt.coordinator.costs.secure_cost import secure_bytes
from fedbpt.coordinator.layer_reading import most_looks, only_reads, reads_layers, states_alone
from fedbpt.engine.layers import middle_layer
from fedbpt.errors import ConfigError
from fedbpt.objective.answers import ANSWERED_ROWS
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    DeviceInfo,
    FitResult,
    FitWork,
    KeysWork,
    LocalResult,
    PooledResult,
    PooledWork,
    Result,
    RoundPlan,
    RoundReport,
    Work,
)
from fedbpt.protocol.specs import Array, Template
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Task
from fedbpt.tasks.reading import MAX_TEMPLATES, PATTERNS, reading_templates

TEMPLATE_TOKENS = 12
"""Tokens that a template adds to a text, before and after it; those of the shipped tasks add 2 to 6."""


_NO_DEADLINE_S = 1e9


@dataclass(frozen=True)
class Tokens:
    """Forward tokens: of texts and prompts, and of label words beyond the first token of each."""

    texts: int
    words: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.texts + other.texts, self.words + other.words)

    def __mul__(self, times: int) -> Tokens:
        return Tokens(self.texts * times, self.words * times)

    @property
    def total(self) -> int:
        return self.texts + self.words

    def seconds(self, info: DeviceInfo) -> float | None:
        """Seconds that they take on the device; None: its speed is unknown."""
        if not info.tokens_per_second:
            return None
        of_words = info.word_tokens_per_second or info.tokens_per_second
        return self.texts / info.tokens_per_second + self.words / of_words


class Parts(NamedTuple):
    """What a run costs one device.

    ``select``: selecting the template; ``texts``: the texts once, and fits of words; ``round``: one round of the
    search; ``others``: the readout's fit as far as it is not in ``texts``; ``fit``: the part that is; ``probe``:
    reading the texts' hidden states without a prompt.
    """

    select: Tokens
    texts: Tokens
    round: Tokens
    others: Tokens
    fit: Tokens
    probe: Tokens

    def whole(self, rounds: int) -> Tokens:
        return self.select + self.texts + self.round * rounds + self.others + self.probe


class DeviceCost(msgspec.Struct, frozen=True, kw_only=True):
    """Upper bounds for one device, with the fits of interim looks, without evaluations. ``seconds`` None: no speed.

    ``select``, ``texts``, ``probe``, ``round`` and ``others`` are forward tokens: selecting the template, the texts
    once (if their KV is kept), reading their hidden states without a prompt, one round of the search, and the
    readout's other templates or hidden states. ``words``: tokens that the label words of the most expensive template
    add to a candidate's cost of a text; None: unknown, taken as 0.
    """

    name: str
    tokens: int
    seconds: float | None
    bytes_up: int
    bytes_down: int
    rss_bytes: int
    select: int
    texts: int
    round: int
    others: int
    words: int | None
    probe: int = 0


class RunCost(msgspec.Struct, frozen=True, kw_only=True):
    """``rounds`` of the search and ``evaluations`` in them, until the budget is spent.

    ``epsilon``: spent by then on a training row of the device with the fewest rows; None: the run is not private.
    """

    rounds: int
    evaluations: int
    devices: tuple[DeviceCost, ...]
    epsilon: float | None = None


def estimate(settings: RunSettings, task: Task, infos: Sequence[DeviceInfo], aggregator: Aggregator) -> RunCost:
    """The cost of a run on the devices of ``infos``; ``aggregator`` is fresh from the same settings.

    Raises:
        ConfigError: a budget that is spent before the search begins, or a deadline that the slowest device cannot
            keep; ``limit`` is the nearest possible value.
    """
    settings = settings.for_labels(task.labels, task.generation)
    local = method_named(settings.method).local
    open_run = not settings.secure and settings.privacy is None and settings.robust == "none"
    answers = task.generation and open_run and not settings.prompt.in_front
    answer = task.generation.max_tokens if task.generation and answers else 0
    parts = [tokens_of(settings, task.templates, info, answer) for info in infos]
    per_round = settings.popsize * settings.iterations + 1 if local else settings.popsize
    only = only_reads(task.templates, settings, infos[0].n_layer)
    rounds = 0 if only else _rounds(settings, infos, parts, per_round)
    longest = msgspec.structs.replace(settings, metric_share=float(settings.metric_share > 0))
    _check_deadline(settings, infos, [tokens_of(longest, task.templates, info, answer) for info in infos])
    devices = []
    for info, part in zip(infos, parts, strict=True):
        whole = part.whole(rounds) + part.others * most_looks(task.templates, settings, info.n_layer, rounds)
        up, down = _bytes(settings, task, rounds, aggregator, info, len(infos))
        devices.append(
            DeviceCost(
                name=info.name,
                tokens=whole.total,
                seconds=whole.seconds(info),
                bytes_up=up,
                bytes_down=down,
                rss_bytes=info.rss_bytes,
                select=part.select.total,
                texts=part.texts.total,
                round=part.round.total,
                others=part.others.total,
                words=_dearest_words(task.templates, info),
                probe=part.probe.total,
            ),
        )
    spent = settings.epsilon(len(task.templates), min(info.n_train for info in infos), rounds, readouts=1)
    return RunCost(rounds=rounds, evaluations=rounds * per_round, devices=tuple(devices), epsilon=spent)


def spent_share(settings: RunSettings, searched: int, evaluations: int, tokens: int, seconds: float) -> float:
    """Share of the budget that is spent, 0 to 1, by the limit that is nearest. ``searched``: rounds of the search."""
    spent = [
        (searched, settings.rounds),
        (evaluations, settings.evaluations),
        (tokens, settings.tokens),
        (seconds, settings.seconds),
    ]
    return min(1.0, max(done / limit for done, limit in spent if limit))


def project(found: Measurement, task: Task, rows: int = 128) -> Projection:
    """What tuning with the default settings and ``rows`` rows would cost on the measured machine."""
    settings = RunSettings(deadline_s=_NO_DEADLINE_S)
    info = DeviceInfo(
        name="device",
        version=found.fedbpt_version,
        model_fingerprint=found.model_fingerprint,
        model_name="model",
        backend="any",
        n_train=rows,
        n_dev=0,
        n_test=0,
        ram_bytes=found.ram_bytes,
        rss_bytes=0,
        peak_rss_bytes=0,
        shares_beginnings=True,
        n_layer=1,
    )
    cost = estimate(settings, task, [info], settings.aggregator())
    [device] = cost.devices
    search = cost.rounds * device.round
    candidates = found.front if settings.prompt.in_front else found.cue
    seconds = (device.tokens - search) / found.prefill.tokens_per_second + search / candidates.tokens_per_second
    return Projection(
        task=task.name,
        rows=rows,
        rounds=cost.rounds,
        evaluations=cost.evaluations,
        tokens=device.tokens,
        seconds=seconds,
    )


def _pattern_tokens(template: Template) -> int:
    """Most tokens of a pattern: a few, or those of the examples in it, of three bytes or more each."""
    return TEMPLATE_TOKENS + max(len(template.pattern.encode()) - 5 * TEMPLATE_TOKENS, 0) // 3


def tokens_of(settings: RunSettings, templates: Sequence[Template], info: DeviceInfo, answer_tokens: int = 0) -> Parts:
    """Most forward tokens on a device; ``settings`` are those of `RunSettings.for_labels`.

    ``answer_tokens``: most of an answer that selects the template; 0: none does.
    """
    objective = settings.objective
    prompt = settings.prompt
    n_rows = info.n_train
    n_templates = len(templates)
    around = max(map(_pattern_tokens, templates))
    text = objective.max_text_tokens + around
    target = objective.max_text_tokens if objective.loss == "nll" else 0
    # An answer's tokens, spread over all rounds of the search.
    answer = math.ceil(settings.metric_share * objective.generation.max_tokens) if objective.generation else 0
    words = _dearest_words(templates, info) or 0
    alike = len({template.pattern.partition("{text}")[0] for template in templates}) == 1
    # Under another template with the same beginning, a text costs only its end.
    again = around if info.shares_beginnings and not prompt.in_front and alike else text
    selected = min(settings.select_rows or n_rows, n_rows) if n_templates > 1 else int(settings.balanced)
    select = Tokens(text + again * (n_templates - 1) + target * n_templates, words * n_templates) * selected
    if answer_tokens and n_templates > 1:
        select += Tokens((text + answer_tokens) * n_templates) * min(selected, ANSWERED_ROWS)
    batch = min(objective.batch_size or n_rows, n_rows)
    cue = not prompt.in_front
    # For one candidate; a prompt in front is computed once for all texts.
    a_text = Tokens(target + answer + (prompt.n_prompt if cue else text), words)
    a_candidate = a_text * batch + Tokens(0 if cue else prompt.n_prompt)
    if objective.perturb > 0:
        a_candidate += Tokens(text + prompt.n_prompt, words) * batch
    each = a_candidate * settings.popsize
    first = Tokens(0)
    n_run = info.n_layer - 1 - middle_layer(info.n_layer)  # layers after the shifted one
    if prompt.placement == "layer" and not words and not target and n_run > 0:
        # The first candidates run all layers too, to compare; each text's state, to resume from, costs a token.
        first = each + Tokens(n_rows)
        each = Tokens(-(-each.texts * n_run // info.n_layer))
    if method_named(settings.method).local:  # and the mean on all rows
        each = each * settings.iterations + a_text * n_rows
    fits = settings.calibrate or objective.readout_words > 0
    fitted = min(settings.fit_rows or n_rows, n_rows) if fits else 0
    a_fit = Tokens(prompt.n_prompt if cue else prompt.n_prompt + text, words) * fitted
    plans = 2 if objective.generation else 1  # texts are read to be scored, and to be answered
    once = Tokens(plans * n_rows * text if cue else 0) + first
    if reads_layers(templates, settings, info.n_layer):
        own = Tokens(text + again * (n_templates - 1))  # under the task's own templates
        view = Tokens(text)
        probe = own + view * (_n_views(templates) - n_templates) + Tokens(0, words) * n_templates
        none = Tokens(0)
        if settings.reads_privately:  # reports count a token a row and view, and those of public texts
            words_once = probe if not states_alone(templates, settings, info.n_layer) else Tokens(probe.texts)
            return Parts(none, none, none, none, none, words_once * (fitted + N_PUBLIC))
        if states_alone(templates, settings, info.n_layer):
            return Parts(none, none, none, none, none, Tokens(probe.texts) * fitted)
        # Without the label words, states of the task's own templates are read anew.
        readout = view + Tokens(prompt.n_prompt, words) + own
        return Parts(select, once + a_fit, each, readout * fitted, Tokens(0), probe * fitted)
    texts = once + a_fit * 2
    n_others = min(settings.ensemble, n_templates) - 1 if objective.readout_words else 0
    return Parts(select, texts, each, Tokens(again, words) * (n_others * fitted), a_fit, Tokens(0))


def _n_views(templates: Sequence[Template]) -> int:
    """Templates under which hidden states are read; see `fedbpt.tasks.reading.reading_templates`."""
    known = {template.pattern for template in templates}
    return min(len(templates) + sum(pattern not in known for pattern in PATTERNS), MAX_TEMPLATES)


def readout_tokens(
    settings: RunSettings, templates: Sequence[Template], infos: Sequence[DeviceInfo], calibrated: int
) -> float:
    """Expected forward tokens of the readout's fit on the device where it costs most.

    ``calibrated``: tokens of the calibration on all devices, which show how long texts are; 0: take the upper bound.
    """
    if not settings.objective.readout_words:
        return 0.0
    parts = [tokens_of(settings, templates, info) for info in infos]
    at_most = sum(part.texts.total - part.fit.total for part in parts)
    share = min(1.0, calibrated / at_most) if calibrated and at_most else 1.0
    return share * max((part.fit.total + part.others.total for part in parts), default=0)


def _dearest_words(templates: Sequence[Template], info: DeviceInfo) -> int | None:
    """Most tokens that a template's label words add to a candidate's cost of a text; None: unknown."""
    if not any(template.label_words for template in templates):
        return 0
    known = [info.word_tokens.get(codec.digest(template)) for template in templates]
    found = [tokens for tokens in known if tokens is not None]
    return max(found) if len(found) == len(known) else None


def _rounds(settings: RunSettings, infos: Sequence[DeviceInfo], parts: Sequence[Parts], evaluations: int) -> int:
    """Rounds until the first limit. Raises `ConfigError` for a limit before the first round."""
    limits = []
    if settings.rounds:
        limits.append(settings.rounds)
    if settings.evaluations:
        limits.append(math.ceil(settings.evaluations / evaluations))
    if settings.tokens:
        before = sum((part.texts + part.probe).total for part in parts)
        each = sum(part.round.total for part in parts)
        if settings.tokens < before + each:
            raise ConfigError(
                f"tokens = {settings.tokens} may be spent before the first round of the search: "
                f"give at least {before + each}",
                field="tokens",
                limit=before + each,
            )
        limits.append((settings.tokens - before) // each)
    if settings.seconds and all(info.tokens_per_second for info in infos):
        # Every round waits for the slowest device.
        first, then = (
            max(tokens.seconds(info) or 0.0 for tokens, info in zip(which, infos, strict=True))
            for which in ([part.texts + part.probe for part in parts], [part.round for part in parts])
        )
        if settings.seconds < first + then:
            least = math.ceil(first + then)
            raise ConfigError(
                f"seconds = {settings.seconds:g} may be over before the first round of the search: "
                f"give at least {least}",
                field="seconds",
                limit=least,
            )
        limits.append(int((settings.seconds - first) / then))
    if not limits:
        raise ConfigError("the cost of a budget in seconds needs the speed of every device: set rounds", field="rounds")
    return min(limits)


def _check_deadline(settings: RunSettings, infos: Sequence[DeviceInfo], parts: Sequence[Parts]) -> None:
    for info, part in zip(infos, parts, strict=True):
        longest = max(tokens.seconds(info) or 0.0 for tokens in part)
        if longest > settings.deadline_s:
            needed = math.ceil(longest)
            raise ConfigError(
                f"deadline_s = {settings.deadline_s:g} is too short for {info.name}, which may need {needed} s "
                f"for a round ({info.tokens_per_second:.0f} tokens/s): give at least {needed}",
                field="deadline_s",
                limit=needed,
            )


def _bytes(
    settings: RunSettings, task: Task, rounds: int, aggregator: Aggregator, info: DeviceInfo, n_devices: int
) -> tuple[int, int]:
    """Bytes (up, down) of the bodies of a device's rounds, from messages of the same sizes."""
    n_labels, zero = len(task.labels), np.zeros(settings.prompt.d)
    work = aggregator.work(1)
    if isinstance(work, PooledWork) and work.state.step is None:  # set from the second generation on
        state = msgspec.structs.replace(work.state, step=work.state.mean)
        work = msgspec.structs.replace(work, state=state)
    result: Result = PooledResult(losses=Array.of(np.zeros(settings.popsize), "<f4"))
    if method_named(settings.method).local:
        result = LocalResult(mean=Array.of(zero), fitness=0.0, sigma_squares=1.0)
    sent: list[tuple[int, Work, Result]] = [(rounds, work, result)]
    n_words = settings.objective.readout_words
    others = task.templates[1 : settings.ensemble]
    fits: list[tuple[int, tuple[Template, ...]]] = [(0, ())] if settings.calibrate else []
    of_layers = reads_layers(task.templates, settings, info.n_layer)
    if n_words and not of_layers:
        fits += [(n_words, ())] if settings.baselines else []
        fits.append((n_words // (1 + len(others)), others))
    for width, with_others in fits:
        means = Array.of(np.zeros((1 + len(with_others), 1 + width, n_labels)), "<f2")
        fitted = FitResult(purpose="readout", loss=0.0, means=means)
        sent.append((EXCHANGES + 1, _fit_work(zero, width, n_labels, with_others), fitted))
    up = down = 0
    n_sums = sum(times for times, _, _ in sent)
    for times, each, answer in sent:
        up += times * len(codec.encode(_report(answer)))
        down += times * len(codec.encode(_plan(settings, task, each)))
    if of_layers:
        n_fitted = min(settings.fit_rows or info.n_train, info.n_train)
        alone = states_alone(task.templates, settings, info.n_layer)
        only = only_reads(task.templates, settings, info.n_layer)
        if only:
            up = down = 0
        n_templates = 0 if alone else min(len(task.templates), MAX_TEMPLATES)
        n_views = _n_views(task.templates)
        n_exchanges = EXCHANGES_OF_LAYERS
        n_readouts = 0 if only else 1 + most_looks(task.templates, settings, info.n_layer, rounds)
        if settings.reads_privately:
            n_exchanges = MEANS_EXCHANGES
            arrays = means_bytes(len(task.labels), n_templates, n_views, info)
        elif settings.readout == "logistic":
            n_exchanges = 1 + LOGISTIC_EXCHANGES
            judged = settings.robust == "none"
            arrays = logistic_bytes(len(task.labels), n_templates, n_views, info.n_embd, judged, n_readouts)
        else:
            secure = settings.secure
            arrays = layer_bytes(len(task.labels), n_templates, n_views, n_fitted, info, n_readouts, secure)
        empty = FitResult(purpose="readout", loss=0.0, means=Array.of(np.zeros(0)))
        reading = FitWork(
            purpose="readout",
            latent=Array.of(zero),
            n_words=0,
            others=reading_templates(task.templates, task.templates[0]),
        )
        n_exchanges *= 1 + n_readouts
        up += arrays[0] + n_exchanges * len(codec.encode(_report(empty)))
        down += arrays[1] + n_exchanges * len(codec.encode(_plan(settings, task, reading)))
        n_sums += n_exchanges
    if settings.secure:
        a_plan = len(codec.encode(_plan(settings, task, KeysWork(epoch="0" * 32, n_uses=1))))
        more = secure_bytes(n_devices, n_sums, a_plan, len(codec.encode(_report(result))))
        up, down = up + more[0], down + more[1]
    return up, down


def _fit_work(latent: np.ndarray, n_words: int, n_labels: int, others: tuple[Template, ...]) -> FitWork:
    fit = ReadoutFit("readout", latent, n_words, n_labels, others=others)
    return msgspec.structs.replace(fit.work(), readout=fit.readout)


def _plan(settings: RunSettings, task: Task, work: Work) -> RoundPlan:
    return RoundPlan(
        run="run",
        round=100,
        device="device",
        seed=settings.seed,
        model_fingerprint="sha256:" + 64 * "0",
        task=task.identity,
        labels=task.labels,
        template=task.templates[0],
        prompt=settings.prompt,
        objective=settings.objective,
        work=work,
        deadline_s=settings.deadline_s,
        label_bias=tuple([0.0] * len(task.labels)),
        label_weights=tuple([1.0] * len(task.labels)) if settings.balanced else (),
        privacy=settings.privacy,
    )


def _report(result: Result) -> RoundReport:
    return RoundReport(
        run="run",
        round=100,
        device="device",
        plan_digest=32 * "0",
        result=result,
        n_texts=256,
        evaluations=16,
        tokens=1000,
        seconds=1.0,
        peak_rss_bytes=2**28,
    )
