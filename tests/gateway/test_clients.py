"""Other people's clients work unchanged: only the base URL and the key are theirs."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

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
