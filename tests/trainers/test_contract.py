"""Every file in src/apprentice/trainers keeps the contract; a new one needs an entry in CASES, or trains in a child.

Those that train in a child keep the second half as well, without their library: in the child's place is pupil.py.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pkgutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import apprentice.trainers
from apprentice import plugins, process
from apprentice.errors import ConfigError, MissingExtra, TrainingError
from apprentice.testing.local_servers import serve_llama_cpp
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import CHECKS, TASK, UPDATE_CHECKS, Case, Check, examples
from apprentice.trainers import Updater, _lora, _training
from apprentice.trainers._training import Trained
from apprentice.types import Checkpoint, Json, Model, Task

from .folders import as_folder
from .programs import understudy
from .services import serving, trainer
from .test_huggingface import QUICK, tiny
from .test_training import ROWS, Halted, folder_of, steps

NAMES = [module.name for module in pkgutil.iter_modules(apprentice.trainers.__path__) if module.name[0] != "_"]
TEXT = {"type": "string", "x-free-text": True}
REPLY = {"reply": "Here you are."}


def answering(name: str, *, both: bool) -> Task:
    """A task that has a reply to write, beside what TASK asks or alone."""
    schema = TASK.output_schema
    properties = (schema["properties"] if both else {}) | {"reply": TEXT}
    output = schema | {"properties": properties, "required": list(properties)}
    return TASK.model_copy(update={"name": name, "output_schema": output})


def embedded(encoder: str) -> Callable[[], AbstractAsyncContextManager[Case]]:
    @contextlib.asynccontextmanager
    async def case() -> AsyncIterator[Case]:
        def serve(checkpoint: Checkpoint) -> Model:
            model: Model = plugins.build("models", "embedded", checkpoint=str(checkpoint.path))
            return model

        made = plugins.build("trainers", "embedded", encoder=encoder)
        yield Case(made, serve, answering("write", both=False))

    return case


@contextlib.asynccontextmanager
async def ensemble() -> AsyncIterator[Case]:
    def serve(checkpoint: Checkpoint) -> Model:
        model: Model = plugins.build("models", "ensemble", checkpoint=str(checkpoint.path))
        return model

    members = [{"settings": {"encoder": encoder}} for encoder in ("minilm", "wordllama")]
    yield Case(plugins.build("trainers", "ensemble", members=members), serve, answering("write", both=False))


@contextlib.asynccontextmanager
async def mixed() -> AsyncIterator[Case]:
    async with serve_llama_cpp(lambda _: REPLY) as server:

        def serve(checkpoint: Checkpoint) -> Model:
            rest = {"backend": "llama_cpp", "base_url": server.url}
            model: Model = plugins.build("models", "mixed", checkpoint=str(checkpoint.path), rest=rest)
            return model

        made = plugins.build("trainers", "mixed", closed={"encoder": "minilm"})
        yield Case(made, serve, TASK, answering("answer", both=True), REPLY)


def remote(name: str) -> Callable[[], AbstractAsyncContextManager[Case]]:
    """A service that has learned what it was sent is asked itself."""

    @contextlib.asynccontextmanager
    async def case() -> AsyncIterator[Case]:
        with serving(name, looks=0) as service:
            base_url = service.url + ("/inference/v1" if name == "fireworks" else "")

            def serve(checkpoint: Checkpoint) -> Model:
                settings = {"model": checkpoint.manifest["model"], "base_url": base_url, "allow_internal": True}
                model: Model = plugins.build("models", "openai", **settings)
                return model

            yield Case(trainer(name, service), serve)

    return case


@contextlib.asynccontextmanager
async def huggingface() -> AsyncIterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        yield Case(tiny(Path(folder)), _served_by_llama_cpp)


def _served_by_llama_cpp(checkpoint: Checkpoint) -> Model:
    settings = {"checkpoint": str(checkpoint.path), "parallel": 1, **QUICK["serving"]}
    model: Model = plugins.build("models", "llama_cpp", **settings)
    return model


CASES: dict[str, list[Callable[[], AbstractAsyncContextManager[Case]]]] = {
    "embedded": [embedded("minilm"), embedded("tfidf")],
    "ensemble": [ensemble],
    "fireworks": [remote("fireworks")],
    "huggingface": [huggingface],
    "mixed": [mixed],
    "openai": [remote("openai")],
}
SLOW = {"huggingface"}  # they need torch, and minutes
FEW = {("embedded", 1)}  # an encoder that is taught itself takes its time; these are short
SHORT = {"it_learns_what_it_is_shown", "little_data_is_enough_to_begin", "an_update_is_a_checkpoint_like_any_other"}


def places(checks: Sequence[Check]) -> pytest.MarkDecorator:
    """Each check for each case of each trainer."""
    return pytest.mark.parametrize(
        ("name", "number", "check"),
        [
            pytest.param(
                name, number, check, id=f"{name}-{number}-{check.__name__}",
                marks=[pytest.mark.slow]
                if name in SLOW or ((name, number) in FEW and check.__name__ not in SHORT) else [],
            )
            for name, cases in CASES.items()
            for number in range(len(cases))
            for check in checks
        ],
    )  # fmt: skip


CHILDREN = [name for name in NAMES if get_type_hints(plugins.find("trainers", name).build)["return"] is Trained]


def test_every_trainer_has_a_case() -> None:
    assert {*CASES, *CHILDREN} == set(NAMES)
    assert {"axolotl", "huggingface", "mlx", "unsloth"} <= set(CHILDREN)


@places(CHECKS)
async def test_trainer_keeps_the_promise(name: str, number: int, check: Check, tmp_path: Path) -> None:
    async with CASES[name][number]() as case:
        await check(case, tmp_path)


@places(UPDATE_CHECKS)
async def test_a_trainer_that_updates_keeps_these_promises_too(
    name: str, number: int, check: Check, tmp_path: Path
) -> None:
    async with CASES[name][number]() as case:
        if isinstance(case.trainer, Updater):
            await check(case, tmp_path)
        else:
            assert not hasattr(case.trainer, "update"), "a trainer with `update` takes what Updater says"


# --- those that train in a child ------------------------------------------------------------------------------------------

WRONG: dict[str, Json] = {
    "rank": 0, "alpha": 0, "dropout": 1.0, "targets": [], "learning_rate": 0.0, "batch_size": 0, "accumulate": 0,
    "epochs": 0, "max_length": 1, "warmup": 1.0, "weight_decay": -0.1, "patience": -1, "held": 0.6,
    "checkpoint_every": 0, "threads": 0, "beta": 0.0, "preference_rate": 0.0, "preference_epochs": 0, "least_pairs": 0,
}  # fmt: skip
KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model: as tiny.gguf, and as safetensors in base/."""
    folder = tmp_path_factory.mktemp("base")
    as_folder(write_tiny(folder / "tiny.gguf"), folder / "base")
    return folder


def in_child(name: str, base: Path, program: str, **settings: Json) -> Trained:
    usual: dict[str, Json] = {"gguf": str(base / "tiny.gguf"), "base_model": str(base / "base"), "python": program}
    made: Trained = plugins.build("trainers", name, **usual | {"serving": QUICK["serving"]} | settings)
    return made


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(plugins.find("trainers", name).build).parameters)


@pytest.mark.parametrize("name", CHILDREN)
def test_settings_have_one_name_one_default_and_one_range_wherever_they_are(
    name: str, base: Path, tmp_path: Path
) -> None:
    program = understudy(tmp_path / "python")
    ours, others = settings_of(name), {other: settings_of(other) for other in CHILDREN}
    for other in others.values():
        assert {key: other[key].default for key in ours.keys() & other} == {
            key: ours[key].default for key in ours.keys() & other
        }
    assert set(_lora._RANGES) == set(WRONG), "each setting with a range has a value here that is out of it"
    for key in ours.keys() & WRONG:
        with pytest.raises(ConfigError, match=rf"\b{key}\b"):
            in_child(name, base, program, **{key: WRONG[key]})
    with pytest.raises(ConfigError, match="rnak"):
        in_child(name, base, program, rnak=8)
    with pytest.raises(ConfigError, match="gguf"):
        in_child(name, base, program, gguf=None)


@pytest.mark.parametrize("name", CHILDREN)
def test_what_an_interpreter_lacks_is_said_with_an_extra_that_there_is(name: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match="'transformers' is not installed") as raised:
        in_child(name, base, understudy(tmp_path / "python", "transformers", "torch"))
    extra = (raised.value.hint or "").removeprefix("pip install 'apprentice[").removesuffix("]'")
    assert extra in (metadata("apprentice").get_all("Provides-Extra") or [])


@pytest.mark.parametrize("name", CHILDREN)
def test_the_job_has_a_name_of_what_is_learned_and_not_of_where(name: str, base: Path, tmp_path: Path) -> None:
    """Whatever changes what is learned makes another job; what only says where or how fast it runs does not."""

    def job(**settings: Json) -> str:
        made = in_child(name, base, understudy(tmp_path / "python"), **settings)
        into = tmp_path / str(len(list(tmp_path.iterdir())))
        return made._begun(TASK, examples(12), into, 0, {}).row.name

    assert job() == job(threads=1) == job(python=understudy(tmp_path / "other"))
    told = {"rank": 8, "epochs": 5, "learning_rate": 0.01, "held": 0.5, "fields": ["kind"], "targets": ["q_proj"]}
    assert len({job(), *(job(**{key: value}) for key, value in told.items())}) == len(told) + 1


TO_THE_END = {"axolotl", "huggingface"}  # one that starts again, and one that goes on


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_knows_no_key_tells_how_far_it_is_and_may_be_killed(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys(monkeypatch)
    into = tmp_path / "models"
    trainer = killed(name, base, understudy(tmp_path / "python"), into)
    check_asked(name, folder_of(into), trainer)
    assert no_key(into)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in TO_THE_END else [pytest.mark.slow]) for name in CHILDREN]
)
def test_a_child_that_was_killed_is_taken_over(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys(monkeypatch)
    program, into = understudy(tmp_path / "python"), tmp_path / "models"
    killed(name, base, program, into)
    late = in_child(name, base, program)
    late.lead(1)
    with pytest.raises(TrainingError, match="another worker has taken over"):
        late.train(TASK, examples(ROWS), into=into, seed=0)
    assert not list(into.glob("sha256-*"))
    next_one = in_child(name, base, program)
    next_one.lead(3)
    made = next_one.train(TASK, examples(ROWS), into=into, seed=0)
    assert steps(into)[:8] == [1, 2, 3, 4, 5, 6, 7, 6]
    told = check_asked(name, folder_of(into), next_one)
    assert made.manifest["trainer"] == {"name": name, **told}
    assert no_key(into)


def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.setenv(key, "CANARY")


def no_key(into: Path) -> bool:
    """Whether nothing below the folder knows what `keys` has set."""
    return not [path for path in into.rglob("*") if path.is_file() and b"CANARY" in path.read_bytes()]


def killed(name: str, base: Path, program: str, into: Path) -> Trained:
    """The trainer, whose child was killed on its way."""
    trainer = in_child(name, base, program)
    with Halted(trainer, into, token=2) as halted:
        folder = folder_of(into)
        [told] = trainer.progress(into)
        assert (told.job, told.step, told.steps, told.loss, told.eta) == (folder.name, 7, 12, 1 / 7, 0.0)
        children = [one for one in process.running() if str(folder) in " ".join(one.argv)]
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match="SIGKILL") as raised:
            halted.made.result(60)
    after = "goes on from its last checkpoint" if trainer._recipe.resumes else "starts again"
    assert after in (raised.value.hint or "")
    return trainer


def check_asked(name: str, folder: Path, trainer: Trained) -> dict[str, Json]:
    """What the child was asked: its script, in a Python that trusts no folder, and nothing but paths and silence.

    What it was told to do.
    """
    asked: dict[str, Any] = json.loads((folder / "asked.json").read_bytes())
    script = Path(_training.__file__).with_name(f"_{name}_run.py")
    assert asked["argv"] == ["-I", str(script), str(folder)]
    assert script.is_file()
    known = set(process.environment({})) | {*_training._DEVICES, *_training._OFFLINE, *trainer._recipe.env, "LC_CTYPE"}
    assert set(asked["environment"]) <= known
    assert asked["environment"]["HF_HUB_OFFLINE"] == "1"
    told: dict[str, Json] = json.loads((folder / "settings.json").read_bytes())
    assert told == {**trainer._recipe.settings, "base": trainer._recipe.base, "seed": 0}
    return told
