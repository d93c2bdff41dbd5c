"""Other people's clients work unchanged: only the base URL and the key are theirs."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any, Literal

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from apprentice.testing.servers import Reply

from .conftest import Live, Serving


class Sorted(BaseModel):
    """The answer as LangChain reads it."""

    kind: Literal["fruit", "animal", "tool"]


def langchain(live: Live) -> ChatOpenAI:
    return ChatOpenAI(model="task:sort", api_key=SecretStr(live.key), base_url=f"{live.url}/v1", max_retries=0)


@pytest.mark.slow
async def test_langchain_asks_streams_and_reads_a_structured_answer(serving: Serving) -> None:
    async with serving() as live:
        model = langchain(live)
        said = await model.ainvoke("please look at the heron number 1")
        assert json.loads(str(said.content)) == {"kind": "animal"}
        assert said.usage_metadata is not None and said.usage_metadata["total_tokens"] > 0
        pieces = [str(chunk.content) async for chunk in model.astream("please look at the heron number 1")]
        assert "".join(pieces) == said.content and len(pieces) > 1
        structured = model.with_structured_output(Sorted)
        found = await structured.ainvoke([("system", "be quick"), ("human", "please look at the drill number 1")])
        assert found == Sorted(kind="tool")
        assert len(await model.abatch(["the pear", "the otter", "the chisel"])) == 3


def litellm_python() -> str:
    """An interpreter with LiteLLM, which wants an older openai than we have beside us."""
    named = os.environ.get("APPRENTICE_LITELLM_PYTHON")
    told = "name an interpreter that has litellm in APPRENTICE_LITELLM_PYTHON"
    assert named or importlib.util.find_spec("litellm"), told
    return named or sys.executable


LITELLM = """
import asyncio, json, sys
import litellm

url, key = sys.argv[1:]
messages = [{"role": "user", "content": "please look at the pear number 1"}]
openai = {"api_base": f"{url}/v1", "api_key": key, "messages": messages}
anthropic = {"api_base": url, "api_key": key, "messages": messages, "max_tokens": 50}

async def streamed(model, given):
    stream = await litellm.acompletion(model=model, stream=True, **given)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

async def failure(**given):
    try:
        await litellm.acompletion(**given)
    except Exception as error:
        return type(error).__name__

async def main():
    found = {}
    for model, given in (("openai/task:sort", openai), ("anthropic/task:sort", anthropic)):
        said = await litellm.acompletion(model=model, **given)
        found[model] = [said.choices[0].message.content, said.usage.total_tokens, await streamed(model, given)]
    routed = litellm.Router(model_list=[{"model_name": "sort", "litellm_params": {"model": "openai/task:sort"} | openai}])
    said = await routed.acompletion(model="sort", messages=messages)
    found["router"] = said.choices[0].message.content
    passed = await litellm.acompletion(model="openai/gpt-4o-mini", **openai | {"max_tokens": 9})
    found["passed through"] = passed.choices[0].message.content
    found["unknown"] = await failure(model="openai/task:none", **openai)
    found["no key"] = await failure(model="openai/task:sort", **openai | {"api_key": "apk-none"})
    found["wrong"] = await failure(model="openai/task:sort", **openai, n=3)
    print(json.dumps(found))

asyncio.run(main())
"""


@pytest.mark.slow
async def test_litellm_asks_streams_and_routes_in_both_formats_and_knows_our_errors(serving: Serving) -> None:
    async with serving([Reply({"kind": "fruit"})]) as live:
        process = await asyncio.create_subprocess_exec(
            litellm_python(), "-c", LITELLM, live.url, live.key,
            env=dict(os.environ) | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        said, told = await process.communicate()
        assert process.returncode == 0, told.decode()[-3_000:]
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        records = await live.records()
    for model in ("openai/task:sort", "anthropic/task:sort"):
        whole, tokens, streamed = found[model]
        assert json.loads(whole) == json.loads(streamed) == {"kind": "fruit"} and tokens > 0
    assert json.loads(found["router"]) == json.loads(found["passed through"]) == {"kind": "fruit"}
    assert (found["unknown"], found["no key"], found["wrong"]) == (
        "NotFoundError", "AuthenticationError", "BadRequestError",
    )  # fmt: skip
    assert [record.served for record in records] == ["remote"] * 5
