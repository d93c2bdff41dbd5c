"""A remote to practise with: answers in a provider's wire format, from a recording.

    python -m apprentice.testing RECORDING [--format openai|responses|anthropic|google] [--port N]

Each line of the recording is a JSON object with `text` and `teacher`, the answer to it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from apprentice import plugins
from apprentice.errors import ApprenticeError
from apprentice.testing.formats import FORMATS
from apprentice.testing.servers import serve_recorded
from apprentice.types import Task

ANYTHING = Task(name="recorded", description="", input_schema={}, output_schema={"type": "object"})


async def serve(recording: str, format: str, port: int) -> None:
    """Answer until stopped."""
    model = plugins.build("models", "recorded", path=recording)
    async with serve_recorded(model, ANYTHING, format=format, port=port) as server:
        print(f"{recording} answers at {server.url}", flush=True)  # noqa: T201  (this is a command)
        await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m apprentice.testing", description=__doc__)
    parser.add_argument("recording")
    parser.add_argument("--format", choices=list(FORMATS), default="openai", help="default: openai")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    arguments = parser.parse_args()
    try:
        asyncio.run(serve(arguments.recording, arguments.format, arguments.port))
    except KeyboardInterrupt:
        return 0
    except (ApprenticeError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
