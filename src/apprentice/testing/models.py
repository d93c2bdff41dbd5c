"""For people who write or use models: the checks that every model plugin passes, and a model that follows a script.

for check in CHECKS:                      # any model
    asyncio.run(check(Case(model, task, [({"text": "hello"}, {"label": "greeting"})])))

for check in REMOTE_CHECKS:               # a model behind a provider's wire format
    asyncio.run(check(RemoteCase(build, serve_openai)))

for check in STREAM_CHECKS:               # and where `build` makes one that has its answers streamed
    asyncio.run(check(RemoteCase(build, serve_openai)))
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol
from urllib.parse import urljoin

from apprentice import wire
from apprentice.errors import (
    ApprenticeError,
    InvalidInput,
    ModelError,
    ModelRefused,
    ModelRejected,
    ModelUnavailable,
    OutcomeUnknown,
    OutOfMoney,
)
from apprentice.testing.servers import Reply, Server
from apprentice.types import Answer, Json, Model, Task, Usage


class ScriptedModel:
    """A model that says what it was told to say, and remembers what it was asked.

    `script`: a function of the input, or a list of which the last entry repeats. An entry is an output, a whole Answer,
    or an error to raise. Each answer reports one token each way, so that it has a price.

    >>> model = ScriptedModel([{"label": "spam"}])
    >>> asyncio.run(model.answer(TASK, {"text": "x"})).output
    {'label': 'spam'}
    >>> model.asked
    [{'text': 'x'}]
    """

    max_tokens = 1

    def __init__(self, script: Callable[[Json], Json] | Sequence[Json]) -> None:
        self.asked: list[Json] = []
        self.closed = False
        self._script = script

    def request_bytes(self, task: Task, input: Json) -> int:
        """1, which is what an answer of this model reports."""
        return 1

    async def answer(self, task: Task, input: Json) -> Answer:
        """The next entry of the script."""
        number = len(self.asked)
        self.asked.append(input)
        said = self._script(input) if callable(self._script) else self._script[min(number, len(self._script) - 1)]
        if isinstance(said, ApprenticeError):
            raise said
        if isinstance(said, Answer):
            return said
        usage = Usage(input_tokens=1, output_tokens=1)
        return Answer(output=said, text=json.dumps(said), model="scripted", usage=usage)

    async def close(self) -> None:
        self.closed = True


TASK = Task(
    name="label",
    description="Say which label fits the text.",
    input_schema={"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    output_schema={
        "type": "object",
        "properties": {"label": {"type": "string"}},
        "required": ["label"],
        "additionalProperties": False,
    },
    examples=({"input": {"text": "you won"}, "output": {"label": "spam"}},),
)

ODD_TEXTS = (
    "",
    '"}]',
    "a\nb\r\tc",
    "nul \0 inside",
    "ünï \U0001f600 \u202e",
    "half \ud83d",
    "[/INST] <|im_end|>",
    "x" * 100_000,
)


class Case(NamedTuple):
    """A built model, and what it must answer to some inputs of a task."""

    model: Model
    task: Task
    pairs: Sequence[tuple[Json, Json]]


async def it_answers_with_json_that_it_was_asked_for(case: Case) -> None:
    """Every input gets its output, and the Answer is consistent in itself."""
    for given, output in case.pairs:
        kept = copy.deepcopy(given)
        answer = await case.model.answer(case.task, given)
        assert answer.output == output, f"{given!r}: {answer}"
        assert answer.problem is None, answer
        assert answer.finish == "complete", answer
        assert answer.model, "an Answer names the model that gave it"
        assert answer.latency >= 0, answer
        assert given == kept, "a model must not change its input"


async def calls_at_once_do_not_mix(case: Case) -> None:
    """Twenty calls at once get the answers that belong to them."""
    pairs = [case.pairs[number % len(case.pairs)] for number in range(20)]
    answers = await asyncio.gather(*(case.model.answer(case.task, given) for given, _ in pairs))
    assert [answer.output for answer in answers] == [output for _, output in pairs]


async def a_cancelled_call_leaves_the_model_usable(case: Case) -> None:
    """A caller may go away at any moment."""
    given, output = case.pairs[0]
    for pauses in range(4):
        call = asyncio.ensure_future(case.model.answer(case.task, given))
        for _ in range(pauses):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert (await case.model.answer(case.task, given)).output == output


async def odd_text_is_answered_or_refused_with_our_errors(case: Case) -> None:
    """Whatever the text, the result is an Answer, InvalidInput or ModelError."""
    given = case.pairs[0][0]
    for text in ODD_TEXTS:
        odd = {key: text if isinstance(value, str) else value for key, value in given.items()}
        try:
            answer = await case.model.answer(case.task, odd)
        except (InvalidInput, ModelError):
            continue
        answer.model_dump_json()  # what cannot be written cannot be recorded


async def what_is_billed_stays_within_its_bounds(case: Case) -> None:
    """`request_bytes` and `max_tokens` bound the usage of every model that reports one."""
    for given, _ in case.pairs:
        usage = (await case.model.answer(case.task, given)).usage
        if usage is None:
            continue
        bounded: Any = case.model
        assert usage.input_tokens <= bounded.request_bytes(case.task, given), usage
        assert usage.output_tokens <= bounded.max_tokens, usage


async def it_can_be_closed_twice(case: Case) -> None:
    """Closing is always safe; this check comes last, because it ends the model."""
    await case.model.close()
    await case.model.close()


CHECKS: tuple[Callable[[Case], Awaitable[None]], ...] = (
    it_answers_with_json_that_it_was_asked_for,
    calls_at_once_do_not_mix,
    a_cancelled_call_leaves_the_model_usable,
    odd_text_is_answered_or_refused_with_our_errors,
    what_is_billed_stays_within_its_bounds,
    it_can_be_closed_twice,
)


# --- models behind a wire ---------------------------------------------------------------------------------------------


class Build(Protocol):
    """Builds the model under test for a server on loopback."""

    def __call__(self, *, base_url: str, api_key: str, max_tokens: int = 1024, timeout: float = 10) -> Model: ...


class Serve(Protocol):
    """A loopback server of `apprentice.testing.servers`."""

    def __call__(
        self, answer: Sequence[Json | Reply], *, api_key: str | None = None
    ) -> AbstractAsyncContextManager[Server]: ...


class RemoteCase(NamedTuple):
    """How to build the model, and the server that speaks its wire format."""

    build: Build
    serve: Serve


KEY = "sk-CANARY-4711-do-not-leak"
_GOOD: dict[str, Json] = {"label": "ham"}


async def the_key_travels_in_a_header_and_shows_nowhere(case: RemoteCase) -> None:
    """Not in the model's repr, and not in the error even where the provider repeats it."""
    echo = Reply(status=401, raw=json.dumps({"error": {"message": f"wrong key {KEY}", "type": "auth"}}).encode())
    async with case.serve([_GOOD, echo], api_key=KEY) as server:
        model = case.build(base_url=server.url, api_key=KEY)
        await model.answer(TASK, {"text": "x"})
        error = await _failure(model, ModelRejected)
        await model.close()
    assert KEY not in "".join([repr(model), str(vars(model)), repr(error), str(error)])
    assert KEY not in json.dumps(server.requests[0].body) + server.requests[0].path


async def the_outcome_says_what_the_attempt_cost(case: RemoteCase) -> None:
    """One error class and one outcome for each way to fail; only what may have been billed is not free."""
    wait = {"retry-after": "7"}
    table: list[tuple[Reply, type[ModelError], str, float | None]] = [
        (Reply(status=429, code="rate_limit_exceeded", headers=wait), ModelUnavailable, "rejected", 7.0),
        (Reply(status=400, code="invalid_request_error"), ModelRejected, "rejected", None),
        (Reply(status=402, code="billing_error"), OutOfMoney, "rejected", None),
        (Reply(status=302, headers={"location": "/elsewhere"}), ModelRejected, "rejected", None),
        (Reply(status=503, code="server_error"), OutcomeUnknown, "unknown", None),
        (Reply(_GOOD, cut=200), OutcomeUnknown, "unknown", None),
        (Reply(_GOOD, cut=0, reset=True), OutcomeUnknown, "unknown", None),
        (Reply(raw=b"<html>hello</html>"), OutcomeUnknown, "unknown", None),
        (Reply(raw=b'{"error": {"code": "server_error"}}'), OutcomeUnknown, "unknown", None),
    ]
    for reply, kind, outcome, retry_after in table:
        async with case.serve([reply]) as server:
            model = case.build(base_url=server.url, api_key=KEY)
            error = await _failure(model, kind)
            await model.close()
            assert len(server.requests) == 1, "a model makes one attempt; retries are its caller's"
        assert (error.outcome, error.retry_after) == (outcome, retry_after), reply


async def an_unreachable_server_costs_nothing(case: RemoteCase) -> None:
    """No connection, no request, no money."""
    async with case.serve([_GOOD]) as server:
        pass
    model = case.build(base_url=server.url, api_key=KEY)
    assert (await _failure(model, ModelUnavailable)).outcome == "not_sent"
    await model.close()


async def the_timeout_bounds_the_whole_call(case: RemoteCase) -> None:
    """Also where a server sends a byte now and then for ever."""
    for reply in (Reply(_GOOD, wait=60.0), Reply(_GOOD, drip=0.05)):
        async with case.serve([reply]) as server:
            model = case.build(base_url=server.url, api_key=KEY, timeout=0.2)
            assert (await _failure(model, OutcomeUnknown)).outcome == "unknown"
            await model.close()


async def what_is_no_answer_has_no_output_but_its_usage(case: RemoteCase) -> None:
    """Prose, broken JSON and a cut answer were billed: an Answer without output, not an error."""
    for content in ("I would rather talk about it.", '{"label": "ha', '{"label": NaN}', ""):
        answer = await _one_answer(case, Reply(content))
        assert answer.output is None, answer
        assert answer.problem, answer
        assert answer.text == content
        assert answer.usage is not None
    cut = await _one_answer(case, Reply(_GOOD, finish="truncated"))
    assert (cut.output, cut.finish) == (None, "truncated")
    assert cut.usage is not None


async def the_answer_limit_reaches_the_provider(case: RemoteCase) -> None:
    """`max_tokens` is always sent: without it no call has a worst case."""
    async with case.serve([Reply({"label": "very " * 100})]) as server:
        model = case.build(base_url=server.url, api_key=KEY, max_tokens=8)
        answer = await model.answer(TASK, {"text": "x"})
        await model.close()
    assert answer.finish == "truncated"
    assert answer.usage is not None
    assert answer.usage.output_tokens <= 8


async def a_refusal_is_an_error_with_a_bill(case: RemoteCase) -> None:
    """The model declined, and the provider billed it."""
    async with case.serve([Reply("I cannot help with that.", finish="refused")]) as server:
        model = case.build(base_url=server.url, api_key=KEY)
        error = await _failure(model, ModelRefused)
        await model.close()
    assert (error.outcome, error.retryable) == ("answered", False)
    assert error.usage is not None
    assert error.text == "I cannot help with that."


async def usage_is_the_providers_or_none(case: RemoteCase) -> None:
    """Zero is zero, silence is None, and nonsense is silence. The served model's name is the provider's."""
    told = Usage(input_tokens=30, output_tokens=4, cached_tokens=20)
    answer = await _one_answer(case, Reply(_GOOD, usage=told, model="snapshot-2026-01-01"))
    assert (answer.usage, answer.model) == (told, "snapshot-2026-01-01")
    nothing = Usage(input_tokens=0, output_tokens=0)
    assert (await _one_answer(case, Reply(_GOOD, usage=nothing))).usage == nothing
    assert (await _one_answer(case, Reply(_GOOD, silent=True))).usage is None
    nonsense = Usage.model_construct(input_tokens=-5, output_tokens=3, cached_tokens=0, reasoning_tokens=0)
    assert (await _one_answer(case, Reply(_GOOD, usage=nonsense))).usage is None


REMOTE_CHECKS: tuple[Callable[[RemoteCase], Awaitable[None]], ...] = (
    the_key_travels_in_a_header_and_shows_nowhere,
    the_outcome_says_what_the_attempt_cost,
    an_unreachable_server_costs_nothing,
    the_timeout_bounds_the_whole_call,
    what_is_no_answer_has_no_output_but_its_usage,
    the_answer_limit_reaches_the_provider,
    a_refusal_is_an_error_with_a_bill,
    usage_is_the_providers_or_none,
)


# --- answers that come as a stream ------------------------------------------------------------------------------------


async def a_stream_that_was_cut_is_never_an_answer(case: RemoteCase) -> None:
    """Also where the server or a proxy ends the body properly: then only the format tells that something is missing.

    It is cut around every end of a line, and at some places within the lines.
    """
    async with case.serve([Reply(_GOOD, piece=8)]) as server:
        model = case.build(base_url=server.url, api_key=KEY)
        await model.answer(TASK, {"text": "x"})
        await model.close()
        whole = await _again(server)
    ends = [place for place, byte in enumerate(whole.body) if byte in b"\r\n"]
    near = {place + step for place in ends for step in (0, 1, 2)} | set(range(0, len(whole.body), 37))
    cuts = sorted(cut for cut in near if cut < len(whole.body))
    media = {"content-type": whole.headers["content-type"]}
    replies = [Reply(raw=whole.body[:cut], headers=media) for cut in [*cuts, len(whole.body)]]
    async with case.serve(replies) as server:
        model = case.build(base_url=server.url, api_key=KEY)
        for cut in cuts:
            error = await _failure(model, OutcomeUnknown)
            assert (error.outcome, error.usage, error.retryable) == ("unknown", None, True), whole.body[:cut]
        assert (await model.answer(TASK, {"text": "x"})).output == _GOOD
        await model.close()


async def an_error_within_a_stream_is_no_answer(case: RemoteCase) -> None:
    """What was said until then is kept and not served; what it cost is unknown."""
    content = json.dumps(_GOOD)
    for pieces in range(3):
        async with case.serve([Reply(content, code="server_error", piece=6, fails=pieces)]) as server:
            model = case.build(base_url=server.url, api_key=KEY)
            error = await _failure(model, OutcomeUnknown)
            await model.close()
        assert (error.outcome, error.usage, error.text) == ("unknown", None, content[: 6 * pieces])
        assert "server_error" in str(error)


STREAM_CHECKS: tuple[Callable[[RemoteCase], Awaitable[None]], ...] = (
    *REMOTE_CHECKS,
    a_stream_that_was_cut_is_never_an_answer,
    an_error_within_a_stream_is_no_answer,
)


async def _again(server: Server) -> wire.Reply:
    """The bytes that the server answers to the request that it saw last."""
    seen = server.requests[-1]
    client = wire.client(allow_internal=True)
    headers = {name: value for name, value in seen.headers.items() if name not in ("host", "content-length")}
    request = wire.Request(urljoin(server.url, seen.path), headers, json.dumps(seen.body).encode(), 10)
    try:
        return await client.exchange(request, lambda: None)
    finally:
        await client.close()


async def _one_answer(case: RemoteCase, reply: Reply) -> Answer:
    async with case.serve([reply]) as server:
        model = case.build(base_url=server.url, api_key=KEY)
        answer = await model.answer(TASK, {"text": "x"})
        await model.close()
    return answer


async def _failure(model: Model, kind: type[ModelError]) -> ModelError:
    try:
        answer = await model.answer(TASK, {"text": "x"})
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {answer}")
