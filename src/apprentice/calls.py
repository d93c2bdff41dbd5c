"""One paid call: reserve, send, settle. Nothing in Apprentice spends money anywhere else.

Each attempt has its own hold in the ledger, durable before a byte leaves. What became of the attempt decides what happens
to the hold: freed when nothing was sent or the provider rejected it, settled by the provider's usage when it answered,
and counted as spent when nobody knows.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from random import Random
from typing import Any, Literal
from zoneinfo import ZoneInfo

import genai_prices
from genai_prices.types import TieredPrices

from apprentice import budget, plugins
from apprentice.config import Config, Price, Remote, TaskConfig
from apprentice.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidAnswer,
    ModelError,
    ModelRefused,
    OutcomeUnknown,
    PriceUnknown,
)
from apprentice.types import Answer, Attempt, Cap, Event, Hold, Json, Micros, Purpose, Seconds, Store, Usage

_FIRST_WAIT: Seconds = 0.25  # before the first retry; doubled each time, jittered, never beyond the caller's deadline
_LONGEST_WAIT: Seconds = 60.0  # a provider that asks for more is left alone: the next one is tried instead
_REMEMBERED = 100  # calls in the running mean of what one costs
_MEASURES = ("repeat", "probe")  # compare the first remote with itself, and answer nobody's request


type Outcome = Literal["not_sent", "rejected", "answered", "answered_no_usage", "unknown"]


class Provider:
    """One configured remote: its model, its price, and how many calls it may have in flight."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.price = price_of(remote)
        self.slots = asyncio.Semaphore(remote.concurrency)
        self._model: Any = None

    @property
    def name(self) -> str:
        return f"{self.remote.provider}/{self.remote.model}"

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

    def cost(self, usage: Usage) -> Micros:
        """What this usage costs, rounded up to a micro-dollar: the configured price, else the price table with its tiers."""
        if self.remote.price is not None:
            return budget.cost(self.price, usage)
        priced = genai_prices.calc_price(
            genai_prices.Usage(
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cache_read_tokens=min(usage.cached_tokens, usage.input_tokens) or None,
            ),
            model_ref=self.remote.model,
            provider_id=self.remote.provider,
        )
        return budget.micros(priced.total_price)

    @asynccontextmanager
    async def slot(self, deadline: Seconds | None) -> AsyncIterator[None]:
        """One of the calls that may be in flight. Raises DeadlineExceeded when none comes free in time."""
        try:
            async with asyncio.timeout_at(deadline):
                await self.slots.acquire()
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.name}: the deadline passed before the call could be sent") from error
        try:
            yield
        finally:
            self.slots.release()

    async def close(self) -> None:
        if self._model is not None:
            await self._model.close()


class Calls:
    """Asks the configured remotes, in order, within the caps. One per Apprentice; safe under concurrency."""

    def __init__(
        self, config: Config, store: Store, *, clock: Callable[[], Seconds], new_id: Callable[[], str], dice: Random
    ) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._new_id = new_id
        self._dice = dice
        self._zone = ZoneInfo(config.budget.timezone)
        self._means: dict[str, float] = {}  # micro-dollars that an answer to a request costs, by task
        self._latest: Seconds = 0.0  # the latest moment seen: a clock that goes back must not re-open a window
        self.providers = [Provider(config.remote), *(Provider(remote) for remote in config.remote.additional_providers)]

    def ready(self) -> None:
        """Build every remote. Raises ConfigError that names what is missing, before anything is asked or spent."""
        for provider in self.providers:
            provider.model()

    async def ask(
        self, task: TaskConfig, input: Json, *, purpose: Purpose, deadline: Seconds | None, attempts: list[Attempt]
    ) -> Answer:
        """The first valid answer of the remotes in order; `attempts` receives one row for each call that was made.

        `deadline` is a moment on the event loop's clock. Raises BudgetError before anything is sent when the caps leave
        no room, ModelError of the last remote when none gave a usable answer, DeadlineExceeded when time ran out.

        A "repeat" or a "probe" is one attempt of the first remote: another one has nothing to say about it, and a call
        that fails is a missing label. It is made only where the caps leave room for a request and its retries besides.
        """
        failure: ModelError | None = None
        measures = purpose in _MEASURES
        for provider in self.providers[:1] if measures else self.providers:
            retries = 0 if measures else provider.remote.retries
            for retry in range(retries + 1):
                try:
                    return await self._attempt(provider, task, input, purpose, deadline, attempts)
                except ModelRefused:
                    raise
                except ModelError as error:
                    failure = error
                    wait = self._wait(error, retry)
                    if not error.retryable or isinstance(error, InvalidAnswer) or wait > _LONGEST_WAIT:
                        break
                    if retry < retries:
                        await self._sleep(wait, deadline, error)
        assert failure is not None  # there is at least one remote, and each either answered or failed
        raise failure

    def _caps(self, task: TaskConfig, now: Seconds) -> list[Cap]:
        own = task.budget.limits if task.budget is not None else {}
        return budget.caps(task.name, now, self._zone, overall=self._config.budget.limits, own=own)

    async def foresee(self, task: TaskConfig, *, gap: Seconds, level: float) -> None:
        """Record INFEASIBLE, once a window, for each cap that cannot pay for the audits and this deferral level any more.

        `gap` is the mean time between two requests; a call costs what the last ones did, and before the first one nothing
        is said. Nothing else is done about it here: when a cap is reached, `budget.on_exhausted` decides. Raises StoreError.
        """
        now = self._now()
        caps, cost = self._caps(task, now), self._means.get(task.name)
        if not caps or cost is None or gap <= 0:
            return
        requests_per_day = 86_400 / gap
        floor = (task.sampling or self._config.sampling).min_floor
        spent = await self._store.spent([cap.window for cap in caps])
        left = {cap.window: budget.left(cap.window, now, self._zone) for cap in caps}
        plan = budget.payable(caps, spent, left, requests_per_day=requests_per_day, cost=cost, floor=floor, level=level)
        for found in plan:
            if found.enough:
                continue
            pays = f"{found.affordable:.0%} of the requests" if found.audits >= 1 else "not even the audits"
            needs = "all requests need the remote now" if level >= 1 else f"{level:.0%} of the requests need the remote"
            message = (
                f"{found.window}: {needs}, and the cap pays for {pays} "
                f"(about {requests_per_day:,.0f} a day, {cost / 1e6:.6f} US dollars each): raise it, or promise less"
            )
            evidence = found._asdict() | {"requests_per_day": requests_per_day, "cost": cost, "floor": floor}
            key = f"INFEASIBLE/{found.window}"
            await self._store.add_event(
                Event(key=key, name="INFEASIBLE", task=task.name, at=now, message=message, evidence=evidence)
            )

    async def close(self) -> None:
        for provider in self.providers:
            await provider.close()

    def _now(self) -> Seconds:
        self._latest = max(self._latest, self._clock())
        return self._latest

    async def _attempt(
        self,
        provider: Provider,
        task: TaskConfig,
        input: Json,
        purpose: Purpose,
        deadline: Seconds | None,
        attempts: list[Attempt],
    ) -> Answer:
        model = provider.model()
        async with provider.slot(deadline):
            now = self._now()
            hold = Hold(
                attempt_id=self._new_id(),
                task=task.name,
                purpose=purpose,
                model=provider.name,
                worst=budget.worst_case(
                    provider.price, model.request_bytes(task.task, input), provider.remote.max_tokens
                ),
                windows=budget.windows(task.name, now, self._zone),
                at=now,
            )
            caps = self._caps(task, now)
            if purpose in _MEASURES:
                spare = hold.worst * (provider.remote.retries + 1)
                caps = [cap.model_copy(update={"limit": max(0, cap.limit - spare)}) for cap in caps]
            await self._reserve(attempts, hold, caps, provider)
            if deadline is not None and asyncio.get_running_loop().time() >= deadline:
                problem = "the deadline passed before the call could be sent"
                await self._settle(attempts, hold, "not_sent", None, provider, problem)
                raise DeadlineExceeded(f"{provider.name}: {problem}")
            try:
                async with asyncio.timeout_at(deadline):
                    answer: Answer = await model.answer(task.task, input)
            except TimeoutError as error:
                await self._settle(attempts, hold, "unknown", None, provider, "the caller's deadline passed")
                raise DeadlineExceeded(f"{provider.name} did not answer before the deadline") from error
            except asyncio.CancelledError:
                # The request may be on its way: settled before the cancellation goes on, or the hold would hang for ever.
                await asyncio.shield(self._settle(attempts, hold, "unknown", None, provider, "the caller went away"))
                raise
            except ModelError as error:
                await self._settle(attempts, hold, error.outcome, error.usage, provider, str(error))
                raise
            except Exception as error:  # a plugin that breaks its promise must not leave a hold for ever
                problem = f"{provider.name} failed: {type(error).__name__}: {error}"
                await self._settle(attempts, hold, "unknown", None, provider, problem)
                raise OutcomeUnknown(problem, retryable=False) from error
            outcome: Outcome = "answered" if answer.usage is not None else "answered_no_usage"
            cost = await self._settle(attempts, hold, outcome, answer.usage, provider, answer.problem)
        if purpose == "serve":
            mean = self._means.get(task.name, cost)
            self._means[task.name] = mean + (cost - mean) / _REMEMBERED
        if answer.output is None:
            raise InvalidAnswer(f"{provider.name}: {answer.problem}")
        task.validate_output(answer.output)
        return answer.model_copy(update={"cost": cost})

    async def _reserve(self, attempts: list[Attempt], hold: Hold, caps: list[Cap], provider: Provider) -> None:
        """Book the hold. A caller who goes away meanwhile leaves none behind: it is freed as soon as it is booked."""
        booking = asyncio.create_task(self._store.reserve(hold, caps))
        try:
            await asyncio.shield(booking)
        except asyncio.CancelledError:
            await asyncio.shield(self._free(booking, attempts, hold, provider))
            raise

    async def _free(self, booking: asyncio.Task[None], attempts: list[Attempt], hold: Hold, provider: Provider) -> None:
        await asyncio.wait([booking])
        if booking.exception() is None:
            await self._settle(attempts, hold, "not_sent", None, provider, "the caller went away before it was sent")

    async def _settle(
        self,
        attempts: list[Attempt],
        hold: Hold,
        outcome: Outcome,
        usage: Usage | None,
        provider: Provider,
        problem: str | None,
    ) -> Micros:
        state: Literal["settled", "released", "assumed"]
        if usage is not None:
            cost, state = provider.cost(usage), "settled"
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
        await self._store.settle(hold.attempt_id, cost, state=state)
        return cost

    def _wait(self, error: ModelError, retry: int) -> Seconds:
        if error.retry_after is not None:
            return error.retry_after
        return float(_FIRST_WAIT * 2**retry * self._dice.uniform(0.5, 1.5))

    async def _sleep(self, wait: Seconds, deadline: Seconds | None, cause: ModelError) -> None:
        if deadline is not None and asyncio.get_running_loop().time() + wait >= deadline:
            raise DeadlineExceeded("no time is left for another attempt") from cause
        await asyncio.sleep(wait)


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
    try:
        found = genai_prices.calc_price(
            genai_prices.Usage(input_tokens=0, output_tokens=0), model_ref=remote.model, provider_id=remote.provider
        ).model_price
    except LookupError as error:
        raise PriceUnknown(f"the price of {remote.provider}/{remote.model} is not in the price table") from error
    input, output = _highest(found.input_mtok), _highest(found.output_mtok)
    if input is None or output is None:
        raise PriceUnknown(f"the price table has no price per token for {remote.provider}/{remote.model}")
    return Price(input=input, output=output)


def _highest(price: Decimal | TieredPrices | None) -> Decimal | None:
    if isinstance(price, TieredPrices):
        return max([price.base, *(tier.price for tier in price.tiers)])
    return price
