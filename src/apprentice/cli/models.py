"""The command for local models: what there is, fetch one, load and unload it, examine it, measure it, export it."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from apprentice import config as configuration
from apprentice import export, hub, inventory, plugins
from apprentice.cli.terminal import Command, above_zero, positive, print_json
from apprentice.config import Config
from apprentice.errors import ConfigError, NoLocalModel
from apprentice.inventory import Chosen, Inventory, Measured
from apprentice.types import Json, Store


def _models(parsed: argparse.Namespace) -> int:
    """Local models: list them, pull one from a file or a hub; load, unload, probe, bench or export a version of a task."""
    acts: dict[str, Callable[[argparse.Namespace], int]] = {
        "list": _list,
        "pull": _pull,
        "load": _load,
        "unload": _unload,
        "probe": _probe,
        "bench": _bench,
        "export": _export,
    }
    if parsed.action != "list" and parsed.what is None:
        what = "MODEL" if parsed.action == "pull" else "TASK"
        raise ConfigError(f"models {parsed.action} needs a {what}", hint=f"apprentice models {parsed.action} {what}")
    return acts[parsed.action](parsed)


def _opened[T](config: Config, read: Callable[[Store | None], Awaitable[T]]) -> T:
    """With the store, if there is one already."""

    async def run() -> T:
        if config.store.backend == "sqlite" and not config.store.path.exists():
            return await read(None)
        store: Store = plugins.build("stores", config.store.backend, path=config.store.path)
        try:
            return await read(store)
        finally:
            await store.close()

    return asyncio.run(run())


def _list(parsed: argparse.Namespace) -> int:
    config = configuration.load(parsed.config)
    found = _opened(config, lambda store: inventory.listed(config, store))
    if parsed.json:
        print_json(found.model_dump(mode="json"))
    else:
        print("\n".join(_lines(found)))
    return 0


def _lines(found: Inventory) -> list[str]:
    lines = []
    for base in found.bases:
        about = [
            base.state,
            *([size(base.size)] if base.size is not None else []),
            *([base.digest] * bool(base.digest)),
        ]
        lines.append(
            f"base     {base.backend} {base.model or '-'} ({', '.join(base.tasks)}): {', '.join(map(str, about))}"
        )
    for one in found.students:
        files = size(one.size) if one.files == "here" else "its files are gone"
        lines.append(f"version  {one.task} {one.version} {one.state}: {one.checkpoint}, {files}")
    for server in found.servers:
        loaded = f", loaded: {', '.join(server.loaded) or 'nothing'}" if server.state == "up" else ""
        lines.append(f"server   {server.backend} at {server.url} ({', '.join(server.tasks)}): {server.state}{loaded}")
    lines += [f"process  {one.pid}: {size(one.memory)}, {one.program}" for one in found.owned]
    lines += [f"file     {one.path}: {one.state}, {size(one.size)}, {one.source or one.name}" for one in found.files]
    return lines


def size(count: int) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# --- pull -------------------------------------------------------------------------------------------------------------


def _pull(parsed: argparse.Namespace) -> int:
    config = configuration.load(parsed.config)
    local, what = config.local, str(parsed.what)
    path = Path(what)
    if local.backend == "ollama" and parsed.hub is None and not path.exists():
        url = inventory.address(local)
        if url is None:
            raise ConfigError("Ollama is started by the process that asks it", hint="ollama pull, while it runs")
        near = local.settings.get("allow_internal") is True
        print(f"{what}: Ollama at {url} pulls it; this can take long", file=sys.stderr)
        said: Json = asyncio.run(hub.into_ollama(what, url, tell=_tell, allow_internal=near))
        _say(parsed, {"model": what, "server": url, "said": said}, f"{what} is in Ollama at {url}")
        return 0
    base = inventory.bases_folder(config)
    if path.exists():
        pulled = asyncio.run(hub.from_path(path, base))
    else:
        order = hub.Order(
            hub.address(parsed.hub),
            what,
            parsed.revision,
            parsed.sha256,
            int(parsed.max_gb * 1e9),
            parsed.allow_internal,
            os.environ.get("HF_TOKEN", ""),
        )
        pulled = asyncio.run(hub.from_hub(order, base, tell=_tell))
    about = (
        f"{pulled.kind}, {pulled.architecture or 'architecture not said'}, {pulled.quantisation}, {size(pulled.size)}"
    )
    _say(parsed, pulled.model_dump(mode="json"), f"{pulled.path}: {about}\n  local: {{base_model: {pulled.path}}}")
    return 0


def _tell(name: str, there: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if there == total else ""
        print(f"\r{name}: {size(there)} of {size(total)}", end=end, file=sys.stderr, flush=True)


def _say(parsed: argparse.Namespace, value: Json, text: str) -> None:
    if parsed.json:
        print_json(value)
    else:
        print(text)


# --- one version ------------------------------------------------------------------------------------------------------


def _with_choice[T](
    parsed: argparse.Namespace, act: Callable[[Chosen, Store | None], Awaitable[T]], *, needs: bool = True
) -> T:
    """What is done with the chosen version; before, it says what loading it takes."""
    config = configuration.load(parsed.config)

    async def run(store: Store | None) -> T:
        chosen = await inventory.choose(config, store, parsed.what, parsed.version)
        if needs:
            memory = await inventory.memory_of(chosen)
            said = "not known" if memory.needs is None else f"about {size(memory.needs)}"
            free = "" if memory.free is None else f", {size(memory.free)} free"
            print(f"{parsed.what} {chosen.name}: memory needed {said}{free}", file=sys.stderr)
        return await act(chosen, store)

    return _opened(config, run)


def _load(parsed: argparse.Namespace) -> int:
    done = _with_choice(parsed, lambda chosen, _: inventory.load(chosen))
    held = "" if done.memory is None else f", {size(done.memory)} of memory"
    after = f"loaded at {done.url}" if done.stays else "it loads and answers as it should, and was unloaded again"
    _say(parsed, done.model_dump(mode="json"), f"{done.task} {done.version}: {after} ({done.seconds:.1f} s{held})")
    return 0


def _unload(parsed: argparse.Namespace) -> int:
    url = _with_choice(parsed, lambda chosen, _: inventory.unload(chosen), needs=False)
    _say(parsed, {"task": parsed.what, "server": url, "loaded": False}, f"{parsed.what}: unloaded at {url}")
    return 0


def _probe(parsed: argparse.Namespace) -> int:
    found = _with_choice(parsed, lambda chosen, _: inventory.probe(chosen), needs=False)
    lines = [f"{found.task} {found.version}: {found.verdict}" + (f": {found.why}" if found.why else "")]
    lines += [f"  {found.probes} recorded answers repeated"] * (found.verdict == "same")
    lines += [f"  {name}: {str(value)[:200]}" for name, value in found.fingerprint.items()]
    _say(parsed, found.model_dump(mode="json"), "\n".join(lines))
    return 5 if found.verdict == "failed" else 0


def _bench(parsed: argparse.Namespace) -> int:
    run = partial(inventory.bench, requests=parsed.requests, at_once=parsed.at_once)
    found = _with_choice(parsed, run)
    _say(parsed, found.model_dump(mode="json"), "\n".join(_measured(found)))
    return 5 if found.p50 is None else 0


def _measured(found: Measured) -> list[str]:
    def rate(value: float | None) -> str:
        return "not counted" if value is None else f"{value:.1f} a second"

    asked = f"{found.requests} requests, {found.at_once} at once, {found.inputs} inputs"
    lines = [
        f"{found.task} {found.version}: {asked}",
        f"  answers        {rate(found.answers_per_second)}, {found.failed} failed",
        f"  valid          {found.valid:.1%} fit the schema",
        f"  prompt tokens  {rate(found.prompt_tokens_per_second)}",
        f"  generated      {rate(found.generated_tokens_per_second)}",
    ]
    if found.p50 is not None and found.p99 is not None:
        lines.append(f"  latency        p50 {found.p50 * 1000:.0f} ms, p99 {found.p99 * 1000:.0f} ms")
    return lines if found.memory is None else [*lines, f"  memory         {size(found.memory)}"]


# --- export -----------------------------------------------------------------------------------------------------------


def _export(parsed: argparse.Namespace) -> int:
    if parsed.format is None or parsed.to is None:
        raise ConfigError("models export needs --as and --to", hint="--as gguf --to ./exported")
    config = configuration.load(parsed.config)
    chosen = _opened(config, lambda store: inventory.choose(config, store, parsed.what, parsed.version))
    if chosen.version is None:
        raise NoLocalModel(f"task {parsed.what!r} has no version to export", hint="teach it first, or name a version")
    context = chosen.local.settings.get("context")
    order = export.Order(
        checkpoint=Path(chosen.version.path),
        task=chosen.task.task,
        version=chosen.version.id,
        format=parsed.format,
        to=Path(parsed.to),
        base=_base_file(parsed, chosen),
        type=parsed.type,
        adapter_only=parsed.adapter_only,
        licence=parsed.licence,
        context=context if isinstance(context, int) else export.CONTEXT,
        force=parsed.force,
    )
    done = export.write(order)
    lines = [f"{done.path}: {', '.join(done.files)}, {size(done.size)}", *(f"  {note}" for note in done.notes)]
    lines += [f"  {command}" for command in done.commands]
    _say(parsed, done.model_dump(mode="json"), "\n".join(lines))
    return 0


def _base_file(parsed: argparse.Namespace, chosen: Chosen) -> Path | None:
    """What was said, else the configured base model where it is a GGUF file on this machine."""
    if parsed.base is not None:
        return Path(parsed.base)
    told = inventory.base_of(chosen.local)
    wanted = parsed.format in ("gguf", "ollama") and not parsed.adapter_only
    return Path(told) if wanted and told is not None and Path(told).is_file() else None


_ACTIONS = {
    "list": "what there is, where, and what is loaded",
    "pull": "bring a file, folder, archive or org/name:file.gguf of a hub into MODEL_DIR/base, checked; for the backend "
    "ollama, have it pull a name",
    "load": "have a server that runs anyway load a version; a server of our own lives in the process that asks it, so it "
    "is started, examined and ended again",
    "unload": "have a server that runs anyway let go of it",
    "probe": "does it answer as it was taught to?",
    "bench": "how fast and how valid are its answers?",
    "export": "write a version as a folder that other programs serve, with its licence and origin beside it",
}

COMMANDS = (
    Command(
        "models",
        _models,
        "apprentice models pull org/name:file.gguf --hub https://HOST",
        (
            ("action", {"choices": tuple(_ACTIONS), "help": "; ".join(f"{k}: {v}" for k, v in _ACTIONS.items())}),
            ("what", {"nargs": "?", "metavar": "MODEL | TASK"}),
            (
                "version",
                {"nargs": "?", "metavar": "VERSION", "help": "default: the one that serves; `base`: the base model"},
            ),
            ("--hub", {"metavar": "URL", "help": "pull: the model hub; default: the variable HF_ENDPOINT"}),
            ("--revision", {"default": "main", "help": "pull: branch, tag or commit; default: %(default)s"}),
            ("--sha256", {"metavar": "HASH", "help": "pull: what the file has to have; default: what the hub says"}),
            (
                "--max-gb",
                {"type": above_zero, "default": hub.MOST / 1e9, "help": "pull: at most; default: %(default)s"},
            ),
            ("--allow-internal", {"action": "store_true", "help": "pull: the hub may be in the local network"}),
            ("--requests", {"type": positive, "default": 50, "help": "bench: how many; default: %(default)s"}),
            ("--at-once", {"type": positive, "default": 1, "help": "bench: at the same time; default: %(default)s"}),
            ("--as", {"dest": "format", "choices": export.FORMATS, "help": "export: what to write"}),
            ("--to", {"metavar": "DIR", "help": "export: the folder to make"}),
            ("--base", {"metavar": "PATH", "help": "export: the base model; default: the one that it was taught on"}),
            ("--type", {"choices": export.TYPES, "help": "export: of merged GGUF tensors; default: 8 bits or more"}),
            (
                "--adapter-only",
                {"action": "store_true", "help": "export: gguf, ollama: without merging it into its base"},
            ),
            ("--licence", {"metavar": "NAME", "help": "export: of the base, where its files do not say"}),
            ("--force", {"action": "store_true", "help": "export: replace an earlier export"}),
        ),
    ),
)
