"""One paid call: reserve, send, settle. Nothing in Apprentice spends money anywhere else.

Each attempt has its own hold in the ledger, durable before a byte leaves. What became of the attempt decides what happens
to the hold: freed when nothing was sent or the provider rejected it, settled by the provider's usage when it answered,
and counted as spent when nobody knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from typing import Any, Literal, NamedTuple

import genai_prices
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelPrice, TieredPrices

from apprentice import budget, observer, plugins
from apprentice.config import Config, Price, Remote, TaskConfig
from apprentice.errors import (
    BudgetExhausted,
    ConfigError,
    DeadlineExceeded,
    InvalidAnswer,
    ModelError,
    ModelRefused,
    ModelUnavailable,
    OutcomeUnknown,
    OutOfMoney,
    PriceUnknown,
    StoreError,
)
from apprentice.models import Prepared, prepared
from apprentice.observer import Asked
from apprentice.purse import Purse, suspended_models
from apprentice.throttle import Throttle
from apprentice.types import Answer, Attempt, Hold, Json, Micros, Purpose, Seconds, Store, Usage

_FIRST_WAIT: Seconds = 0.25  # before the first retry; doubled each time, jittered, never beyond the caller's deadline
_LONGEST_WAIT: Seconds = 60.0  # a provider that asks for more is left alone: the next one is tried instead
_FAIR: Seconds = 1.0  # who has not answered within this is slow; a deadline before it is the caller's affair
_LONGEST_PAUSE: Seconds = 5.0  # a provider that may be asked so soon is waited for
_MOST_NAMES = 50  # model names of one provider that are remembered: a server may answer with a new one each time
_DATED = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8}|latest)$")  # what sets a snapshot's name apart from its model's
_MEASURES = ("repeat", "probe")  # compare the first remote with itself, and answer nobody's request


type Outcome = Literal["not_sent", "rejected", "answered", "answered_no_usage", "unknown"]
type _End = Literal["settled", "released", "assumed"]


class Served(NamedTuple):
    """What is known of the model that really answered, by the name that the provider gives it."""

    same: bool  # it is the configured one, perhaps a dated snapshot of it
    price: Price | None  # as `price_of`; None: the price table does not have it


class PerToken(NamedTuple):
    """A price of the price table, in US dollars per million tokens, as exact as it stands there."""

    input: Decimal
    output: Decimal
    cached: Decimal


@dataclass(slots=True)
class _Wanted:
    """What whichever remote is asked for; see `Calls.ask`."""

    task: TaskConfig
    input: Json
    purpose: Purpose
    deadline: Seconds | None
    attempts: list[Attempt]
    for_audits: bool
    later: bool

    @property
    def is_measure(self) -> bool:
        return self.purpose in _MEASURES


class Provider:
    """One configured remote: its model, its price, and how many calls it may have in flight."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.price = price_of(remote)
        self.slots = asyncio.Semaphore(remote.concurrency)
        self.throttle = Throttle()
        self.name = f"{remote.provider}/{remote.model}"
        self.teacher = remote.teacher
        self._model: Any = None
        self._names: dict[str, Served] = {}
        self._tables: dict[str, tuple[ModelPrice, PerToken | None]] = {}  # by model: as the table has it, and per token

    def model(self) -> Any:
        """The model, built at the first call. Raises ConfigError when the key or the plugin is missing."""
        if self._model is None:
            settings = dict(self.remote.settings)
            if self.remote.api_key_env is not None:
                key = os.environ.get(self.remote.api_key_env)
                if not key:
                    raise ConfigError(
                        f"{self.name}: the environment variable {self.remote.api_key_env} is not set",
                        hint=f"export {self.remote.api_key_env}=…",
                    )
                settings["api_key"] = key
            if self.remote.base_url is not None:
                settings["base_url"] = self.remote.base_url
            self._model = plugins.build(
                "models",
                self.remote.provider,
                model=self.remote.model,
                max_tokens=self.remote.max_tokens,
                timeout=self.remote.timeout,
                temperature=self.remote.temperature,
                allow_internal=self.remote.allow_internal,
                **settings,
            )
        return self._model

    def served(self, name: str) -> Served | None:
        """What is known of a model of that name; None for the name that is configured.

        The price table has both as one model, or else only a date tells their names apart, where they are the same. A
        dearer one bounds the calls from here on, unless a price is configured.
        """
        if name in ("", self.remote.model):
            return None
        if (found := self._names.get(name)) is None:
            ours, theirs = (_in_table(self.remote.provider, model) for model in (self.remote.model, name))
            same = ours == theirs if ours and theirs else _DATED.sub("", name) == _DATED.sub("", self.remote.model)
            found = Served(same, _price_in_table(self.remote.provider, name))
            if len(self._names) < _MOST_NAMES:
                self._names[name] = found
            if found.price is not None and not found.same and self.remote.price is None:
                dearer = max(self.price.input, found.price.input), max(self.price.output, found.price.output)
                self.price = Price(input=dearer[0], output=dearer[1])
        return found

    def is_as_configured(self, name: str) -> bool:
        """Whether a model of that name needs no word, because it is the configured one."""
        return (found := self.served(name)) is None or found.same

    def remembers(self, name: str) -> bool:
        """Whether the name is among the first ones that the provider gave."""
        return name in self._names

    def cost(self, usage: Usage, served: str = "") -> Micros:
        """What this usage costs, rounded up to a micro-dollar: the configured price, else the price table with its tiers.

        `served`: the name of the model that answered; where it is another one, the dearer of the two is what counts.
        """
        if self.remote.price is not None:
            return budget.cost(self.price, usage)
        other = self.served(served)
        booked = self._priced(self.remote.model, usage)
        if other is None or other.same or other.price is None:
            return booked
        return max(booked, self._priced(served, usage))

    def _priced(self, model: str, usage: Usage) -> Micros:
        per_token = self._per_token(model)
        if per_token is not None and usage.cached_tokens <= usage.input_tokens:
            return budget.cost(per_token, usage)
        priced = genai_prices.calc_price(
            genai_prices.Usage(
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cache_read_tokens=min(usage.cached_tokens, usage.input_tokens) or None,
            ),
            model_ref=model,
            provider_id=self.remote.provider,
        )
        return budget.micros(priced.total_price)

    def _per_token(self, model: str) -> PerToken | None:
        """What the price table says now, as a price per token. It is asked for such a one once, because asking is slow."""
        _, found = get_snapshot().find_provider_model(model, None, self.remote.provider, None)
        price = found.get_prices(datetime.now(UTC))
        known = self._tables.get(model)
        if known is None or known[0] is not price:  # another table, or another time of the day
            if len(self._tables) >= _MOST_NAMES:
                self._tables.clear()
            known = self._tables[model] = price, linear(price)
        return known[1]

    def wait(self, now: Seconds) -> Seconds:
        """Seconds until a call may leave; infinite while nobody knows when."""
        pause = getattr(self._model, "pause", None)  # what the rate limits of the last answer ask for
        return max(self.throttle.wait(now), pause() if pause is not None else 0.0)

    def failed(self, error: ModelError, now: Seconds) -> None:
        """Note what a failed call says about the provider: a request that is wrong in itself says nothing."""
        if isinstance(error, OutOfMoney):
            self.throttle.failed(now, no_money=True)
        elif isinstance(error, ModelUnavailable | OutcomeUnknown):
            self.throttle.failed(now, error.retry_after)
        elif isinstance(error, InvalidAnswer | ModelRefused):
            self.throttle.answered(now)
        else:
            self.throttle.gave_up()

    def kept_waiting(self, sent: Seconds, now: Seconds) -> None:
        """A caller's deadline passed. It says something about the provider where it had a fair time to answer."""
        if now - sent >= min(_FAIR, self.remote.timeout / 2):
            self.throttle.failed(now)

    def left_alone(self, wait: Seconds) -> ModelUnavailable:
        """The error for a call that is not sent because the provider should not be asked now."""
        if self.throttle.suspended:
            problem = "it is suspended, because it billed more than its price list allows"
            return ModelUnavailable(f"{self.name}: {problem}", outcome="not_sent", retryable=False)
        told = wait if wait < float("inf") else None
        return ModelUnavailable(
            f"{self.name} failed too often or is at its limits, and is not asked for a while",
            outcome="not_sent",
            retry_after=told,
        )

    async def slot(self, deadline: Seconds | None) -> asyncio.Semaphore:
        """One of the calls that may be in flight, until it is released. Raises DeadlineExceeded when none comes in time."""
        if not self.slots.locked():
            await self.slots.acquire()  # at once
            return self.slots
        try:
            async with asyncio.timeout_at(deadline):
                await self.slots.acquire()
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.name}: the deadline passed before the call could be sent") from error
        return self.slots

    async def close(self) -> None:
        if self._model is not None:
            await self._model.close()


class Calls:
    """Asks the configured remotes, in order, within the caps. One per Apprentice; safe under concurrency."""

    def __init__(
        self, config: Config, store: Store, *, clock: Callable[[], Seconds], new_id: Callable[[], str], dice: Random
    ) -> None:
        self._store = store
        self._new_id = new_id
        self._dice = dice
        self.purse = Purse(config, store, clock=clock)
        self.observer = observer.of(config.telemetry)
        self._settling: dict[str, asyncio.Task[None]] = {}  # by attempt
        self.providers = [Provider(config.remote), *(Provider(remote) for remote in config.remote.additional_providers)]

    async def open(self) -> None:
        """Build every remote, and learn from the ledger what others left. Raises ConfigError that names what is missing,
        before anything is asked or spent."""
        for provider in self.providers:
            provider.model()
        await self.purse.open()
        await self._suspend()

    async def look(self, task: TaskConfig, *, gap: Seconds, level: float | None) -> None:
        """What is due now and then: see `Purse.foresee` (without a level there is nothing to foresee yet), and follow
        what was said about models elsewhere and what was changed in the budget. Raises StoreError."""
        await self._suspend()
        await self.purse.follow()
        await self.purse.sweep()
        if level is not None:
            await self.purse.foresee(task, gap=gap, level=level)

    async def _suspend(self) -> None:
        suspended = await suspended_models(self._store)
        for provider in self.providers:
            provider.throttle.suspended = provider.name in suspended

    async def ask(
        self,
        task: TaskConfig,
        input: Json,
        *,
        purpose: Purpose,
        deadline: Seconds | None,
        attempts: list[Attempt],
        for_audits: bool = False,
        later: bool = False,
    ) -> Answer:
        """The first valid answer of the remotes in order; `attempts` receives one row for each call that was made.

        `deadline` is a moment on the event loop's clock. `for_audits`: leave the money that audits will need. `later`: the
        answer is given while its hold is being settled, and whoever asks awaits `settled` beside what else it writes. Raises
        BudgetError before anything is sent when the caps leave no room, ModelError of the last remote when none gave a
        usable answer, DeadlineExceeded when time ran out.

        A "repeat" or a "probe" is one attempt of the first remote: another one has nothing to say about it, and a call
        that fails is a missing label. It is made only where the caps leave room for a request and its retries besides.
        """
        wanted = _Wanted(task, input, purpose, deadline, attempts, for_audits, later)
        failure: ModelError | BudgetExhausted | None = None
        loop = asyncio.get_running_loop()
        for provider in self.providers[:1] if wanted.is_measure else self._order():
            wait = provider.wait(loop.time())
            if wait > _LONGEST_PAUSE or (wait > 0 and deadline is not None and loop.time() + wait >= deadline):
                failure = failure or provider.left_alone(wait)
                continue
            if wait > 0:
                await asyncio.sleep(wait)
            try:
                return await self._tried(provider, wanted)
            except ModelRefused:
                raise
            except (ModelError, BudgetExhausted) as error:  # another remote may be up, and may be cheaper
                failure = error
        assert failure is not None  # there is at least one remote, and each either answered or failed
        raise failure

    async def _tried(self, provider: Provider, wanted: _Wanted) -> Answer:
        """One remote's answer, after as many retries as it takes, may have, and time allows."""
        loop = asyncio.get_running_loop()
        retries = 0 if wanted.is_measure else provider.remote.retries
        retry = 0
        while True:
            provider.throttle.leaves(loop.time(), retry=retry > 0)
            try:
                answer = await self._attempt(provider, wanted)
            except ModelError as error:
                provider.failed(error, loop.time())
                wait = self._wait(error, retry)
                hopeless = not error.retryable or isinstance(error, InvalidAnswer) or wait > _LONGEST_WAIT
                if (
                    hopeless
                    or retry >= retries
                    or provider.wait(loop.time()) > wait
                    or not provider.throttle.may_retry()
                ):
                    raise
                await self._sleep(wait, wanted.deadline, error)
                retry += 1
            except BaseException:
                provider.throttle.gave_up()
                raise
            else:
                provider.throttle.answered(loop.time())
                return answer

    def _order(self) -> list[Provider]:
        """The remotes in the order in which they are asked. Weights draw who comes first; without any it is the order given."""
        if len(self.providers) == 1:
            return self.providers
        weights = [provider.remote.weight or 0.0 for provider in self.providers]
        if not any(weights[1:]):
            return self.providers
        weights[0] = weights[0] or 1.0
        first = self._dice.choices(self.providers, weights)[0]
        return [first, *(provider for provider in self.providers if provider is not first)]

    async def close(self) -> None:
        for provider in self.providers:
            await provider.close()

    async def _attempt(self, provider: Provider, wanted: _Wanted) -> Answer:
        task, purpose, deadline = wanted.task, wanted.purpose, wanted.deadline
        request = prepared(provider.model(), task.task, wanted.input)
        worst = budget.worst_case(provider.price, request.bytes, provider.remote.max_tokens)

        def hold_of(at: Seconds, windows: tuple[str, ...]) -> Hold:
            return Hold(
                attempt_id=self._new_id(),
                task=task.name,
                purpose=purpose,
                model=provider.name,
                worst=worst,
                windows=windows,
                at=at,
            )

        slots = await provider.slot(deadline)
        try:
            spare = provider.remote.retries + 1 if wanted.is_measure else 0
            hold = await self.purse.reserve(task, hold_of, spare=spare, for_audits=wanted.for_audits, until=deadline)
            if deadline is not None and asyncio.get_running_loop().time() >= deadline:
                problem = "the deadline passed before the call could be sent"
                await self._settle(wanted, provider, hold, "not_sent", None, problem)
                raise DeadlineExceeded(f"{provider.name}: {problem}")
            asked = Asked(task.name, purpose, provider.remote.provider, provider.remote.model, provider.remote)
            with self.observer.call(asked) as told:
                answer = await self._sent(provider, wanted, request, hold)
                wrong = _wrong(provider, task, answer)
                told(answer, answer.cost, wrong is None)
                if not wanted.later:
                    await self.settled(wanted.attempts)
        finally:
            slots.release()
        if wrong is not None:
            raise wrong
        return answer

    async def _sent(self, provider: Provider, wanted: _Wanted, request: Prepared, hold: Hold) -> Answer:
        """The answer with what it cost. Whatever becomes of the call, its hold is settled."""
        loop = asyncio.get_running_loop()
        sent, limit = loop.time(), None
        try:
            if wanted.deadline is None:
                answer = await request.answer()
            else:
                async with asyncio.timeout_at(wanted.deadline) as limit:
                    answer = await request.answer()
        except asyncio.CancelledError:
            # The request may be on its way: settled before the cancellation goes on, or the hold would hang for ever.
            await asyncio.shield(self._settle(wanted, provider, hold, "unknown", None, "the caller went away"))
            raise
        except ModelError as error:
            await self._settle(wanted, provider, hold, error.outcome, error.usage, str(error))
            raise
        except Exception as error:
            if isinstance(error, TimeoutError) and limit is not None and limit.expired():
                provider.kept_waiting(sent, loop.time())
                await self._settle(wanted, provider, hold, "unknown", None, "the caller's deadline passed")
                raise DeadlineExceeded(f"{provider.name} did not answer before the deadline") from error
            # A plugin that breaks its promise must not leave a hold for ever.
            problem = f"{provider.name} failed: {type(error).__name__}: {error}"
            await self._settle(wanted, provider, hold, "unknown", None, problem)
            raise OutcomeUnknown(problem, retryable=False) from error
        outcome: Outcome = "answered" if answer.usage is not None else "answered_no_usage"
        cost, state = _booked(wanted.attempts, provider, hold, outcome, answer.usage, answer.problem, answer.model)
        settling = self.purse.settle(hold, cost, state=state)
        if self.purse.is_to_watch(wanted.task) or not provider.is_as_configured(answer.model):
            settling = asyncio.create_task(self._tell(settling, wanted.task, provider, answer.model))
        self._settling[hold.attempt_id] = settling
        return answer.model_copy(update={"cost": cost, "provider": provider.teacher})

    async def settled(self, attempts: Sequence[Attempt]) -> None:
        """Return when the ledger has what these attempts did cost. Raises StoreError."""
        some = [self._settling.pop(one.attempt_id) for one in attempts if one.attempt_id in self._settling]
        if running := [one for one in some if not one.done()]:
            await asyncio.wait(running)
        for one in some:
            one.result()

    async def _tell(self, settling: asyncio.Task[None], task: TaskConfig, provider: Provider, served: str) -> None:
        """What is to be said after a call, once it is settled."""
        await settling
        with contextlib.suppress(StoreError):  # the answer is paid for; what was not said is said after the next call
            await self._say_served(task, provider, served)
            await self.purse.watch(task)

    async def _settle(
        self,
        wanted: _Wanted,
        provider: Provider,
        hold: Hold,
        outcome: Outcome,
        usage: Usage | None,
        problem: str | None,
    ) -> None:
        cost, state = _booked(wanted.attempts, provider, hold, outcome, usage, problem)
        await self.purse.settle(hold, cost, state=state)

    async def _say_served(self, task: TaskConfig, provider: Provider, name: str) -> None:
        """Say MODEL_CHANGED, once a pair of names, when another model answered than the one that was asked for."""
        found = provider.served(name)
        if found is None or found.same or not provider.remembers(name):
            return
        if provider.remote.price is not None:
            booked = "it is booked at the configured price"
        elif found.price is None:
            booked = "its price is unknown, and it is booked at the price of the configured model"
        else:
            booked = "the dearer of the two prices is booked"
        message = f"{provider.name} answered as {name!r}, which is another model: {booked}"
        asked = price_of(provider.remote)
        evidence = {
            "configured": provider.name,
            "served": name,
            "configured_price": asked.model_dump(mode="json"),
            "served_price": None if found.price is None else found.price.model_dump(mode="json"),
        }
        await self.purse.say("MODEL_CHANGED", task.name, f"MODEL_CHANGED/{provider.name}/{name}", message, evidence)

    def _wait(self, error: ModelError, retry: int) -> Seconds:
        if error.retry_after is not None:
            return error.retry_after
        return float(_FIRST_WAIT * 2**retry * self._dice.uniform(0.5, 1.5))

    async def _sleep(self, wait: Seconds, deadline: Seconds | None, cause: ModelError) -> None:
        if deadline is not None and asyncio.get_running_loop().time() + wait >= deadline:
            raise DeadlineExceeded("no time is left for another attempt") from cause
        await asyncio.sleep(wait)


def _booked(
    attempts: list[Attempt],
    provider: Provider,
    hold: Hold,
    outcome: Outcome,
    usage: Usage | None,
    problem: str | None,
    served: str = "",
) -> tuple[Micros, _End]:
    """What an attempt did cost, and how its hold ends. `attempts` receives its row."""
    state: _End
    if usage is not None:
        cost, state = provider.cost(usage, served), "settled"
    elif outcome in ("not_sent", "rejected"):
        cost, state = 0, "released"
    else:  # sent, and nobody says what it cost: the worst case counts until there is evidence
        cost, state = hold.worst, "assumed"
    attempts.append(  # before the ledger is written: whoever is cancelled meanwhile still records what it cost
        Attempt(
            attempt_id=hold.attempt_id,
            model=provider.name,
            purpose=hold.purpose,
            outcome=outcome,
            cost=cost,
            problem=problem,
        )
    )
    if cost > hold.worst:  # it does not keep to its price list: no further call until a person says so
        provider.throttle.suspended = True
    return cost, state


def _wrong(provider: Provider, task: TaskConfig, answer: Answer) -> InvalidAnswer | None:
    """Why an answer is of no use."""
    if answer.output is None:
        return InvalidAnswer(f"{provider.name}: {answer.problem}")
    try:
        task.validate_output(answer.output)
    except InvalidAnswer as error:
        return error
    return None


def answered_by(attempts: Sequence[Attempt], purpose: Purpose) -> str | None:
    """The configured remote that gave the last answer for this purpose, as "provider/model"."""
    answered = (a.model for a in reversed(attempts) if a.purpose == purpose and a.outcome.startswith("answered"))
    return next(answered, None)


def price_of(remote: Remote) -> Price:
    """The price that bounds a call: the configured one, else the highest tier in the price table.

    Raises PriceUnknown when there is neither, because an unknown price is not zero.
    """
    if remote.price is not None:
        return remote.price
    if _in_table(remote.provider, remote.model) is None:
        raise PriceUnknown(f"the price of {remote.provider}/{remote.model} is not in the price table")
    if (price := _price_in_table(remote.provider, remote.model)) is None:
        raise PriceUnknown(f"the price table has no price per token for {remote.provider}/{remote.model}")
    return price


def _in_table(provider: str, model: str) -> str | None:
    """What the price table calls the model; None if it does not have it. Dated snapshots are mostly one model there."""
    found = _looked_up(provider, model)
    return None if found is None else found.model.id


def _price_in_table(provider: str, model: str) -> Price | None:
    found = _looked_up(provider, model)
    if found is None:
        return None
    input, output = _highest(found.model_price.input_mtok), _highest(found.model_price.output_mtok)
    return None if input is None or output is None else Price(input=input, output=output)


def _looked_up(provider: str, model: str) -> genai_prices.types.PriceCalculation | None:
    nothing = genai_prices.Usage(input_tokens=0, output_tokens=0)
    try:
        return genai_prices.calc_price(nothing, model_ref=model, provider_id=provider)
    except LookupError:
        return None


def linear(table: ModelPrice) -> PerToken | None:
    """The same price per token; None for one with tiers, or for anything besides tokens."""

    def of(fresh: int, cached: int, output: int) -> Decimal:
        usage = genai_prices.Usage(input_tokens=fresh + cached, output_tokens=output, cache_read_tokens=cached or None)
        total: Decimal = table.calc_price(usage)["total_price"]
        return total

    if any(isinstance(price, TieredPrices) for price in vars(table).values()):
        return None
    million = 10**6
    price = PerToken(of(million, 0, 0), of(0, 0, million), of(0, million, 0))
    sum_of_all = price.input * million + price.cached * 3_001 + price.output * 77
    return price if of(million, 3_001, 77) * million == sum_of_all else None


def _highest(price: Decimal | TieredPrices | None) -> Decimal | None:
    if isinstance(price, TieredPrices):
        return max([price.base, *(tier.price for tier in price.tiers)])
    return price
