"""PURE: whose answer a row is, what its terms say, and so whether it may train a model; and the proof of that.

Fitting heads, calibration tables or embeddings on answers is training; evaluating and sampling are not. Unknown is no.
The table at the end is a dated reading of public terms in words of ours; it is no legal advice, and its sources decide.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date
from fnmatch import fnmatchcase
from functools import lru_cache
from ipaddress import ip_address
from typing import Literal, NamedTuple

from apprentice.errors import TrainingError
from apprentice.types import Example, Json, Permission, Seconds, TermsClass, Value

_SEVERITY: dict[TermsClass, int] = {"own": 0, "permissive": 1, "conditional": 2, "unknown": 3, "forbidden": 4}
_USUAL_HOSTS = {
    "anthropic": "api.anthropic.com",
    "google": "generativelanguage.googleapis.com",
    "openai": "api.openai.com",
}
_SERVERS = {"llama_cpp", "ollama", "vllm"}  # on the operator's own machines unless a host says otherwise
_PRIVATE_ENDINGS = (".localhost", ".local", ".lan", ".internal", ".home.arpa", ".svc", ".cluster.local")
_OWN = "own server"


class Terms(Value):
    """What one text says, from `since` until before `until`, about training a model on answers.

    `hosts` are the services that it governs, `models` the names of the models whose weights (or, where none are published,
    whose answers) it governs; "*" stands for any letters. Names are compared as `_plain` gives them.
    """

    name: str
    hosts: tuple[str, ...] = ()
    makers: tuple[str, ...] = ()  # accounts under which these weights are published: the part before the "/"
    models: tuple[str, ...] = ()
    terms: Literal["permissive", "conditional", "forbidden", "unknown"]
    since: date | None = None
    until: date | None = None
    conditions: tuple[str, ...] = ()
    source: str
    checked: date
    note: str = ""  # what could not be verified

    def in_force(self, at: date) -> bool:
        return (self.since is None or self.since <= at) and (self.until is None or at < self.until)


class Ruling(Value):
    """Whether the answers of a teacher may train, and what the decision rests on."""

    may_train: bool
    terms: TermsClass
    teacher: str  # "provider@host"; "a person"
    model: str = ""
    at: date | None = None  # the day of the answer
    basis: str = ""  # kept with the Example; empty where it may not train
    reason: str = ""  # why it may not train
    fix: str = ""  # what an operator could do about that
    conditions: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()  # where the terms that count can be read


class Teacher(NamedTuple):
    """One that is asked: as what (`role`), by which plugin, for which model, where, and what the operator was permitted.

    `host` is the host of its base_url; None where the plugin's usual address is used.
    """

    role: str
    provider: str
    model: str
    host: str | None = None
    permission: Permission | None = None


# --- the decision -----------------------------------------------------------------------------------------------------


def gate(
    provider: str,
    model: str,
    host: str | None,
    at: date,
    *,
    task: str,
    permission: Permission | None = None,
    today: date,
) -> Ruling:
    """Whether an answer may train a model for this task.

    `provider` and `host` say where it was asked (see Teacher), `model` who answered, `at` on which day; `today` is the day
    of the training. The service's terms and the weights' licence both count, the stricter decides; a closed one is opened
    by a permission that holds today, and by nothing else.

    >>> today = date(2026, 11, 21)
    >>> gate("vllm", "Qwen/Qwen3-32B", None, today, task="sort", today=today).may_train
    True
    >>> gate("anthropic", "claude-sonnet-4-5", None, today, task="sort", today=today).terms
    'forbidden'
    """
    where = _where(provider, model, host)
    found = _found(where, model, at)
    rows = [row for _, _, row in found if row is not None]
    terms = max((part for _, part, _ in found), key=_SEVERITY.__getitem__)
    ruling = Ruling(
        may_train=False,
        terms=terms,
        teacher=f"{provider}@{where}",
        model=model,
        at=at,
        conditions=tuple(dict.fromkeys(said for row in rows for said in row.conditions)),
        sources=tuple(row.source for row in rows),
    )
    if at > today:
        reason = f"the answer is dated {at}, which is still to come"
        return ruling.model_copy(update={"reason": reason, "fix": "set the clock of the machine that recorded it"})
    if terms == "permissive":
        basis = "; ".join(f"{row.name}; {row.source}; checked {row.checked}" for row in rows)
        return ruling.model_copy(update={"may_train": True, "basis": basis})
    reason = "; ".join(said for said, part, _ in found if part != "permissive")
    problem = permission.problem(task, today) if permission is not None else None
    if permission is None or problem is not None:
        reason = f"{reason}; {problem}" if problem else reason
        return ruling.model_copy(update={"reason": reason, "fix": _fix(terms)})
    return ruling.model_copy(update={"may_train": True, "basis": f"{permission.text()} [{terms}: {reason}]"})


def judge(example: Example, teacher: Teacher | None, *, task: str, today: date) -> Ruling:
    """The ruling for one row: its target is a person's, or the answer of `example.model`, asked at `teacher`.

    A person's target has the source "gold" and no model; an approved answer keeps its model (see `authored`), and so
    needs that model's ruling. Without a teacher nobody knows where it was asked.
    """
    if example.source == "gold" and not example.model:
        return Ruling(may_train=True, terms="own", teacher="a person", basis="a person's own words")
    try:
        at = day(example.at) if example.at > 0 else None  # 0: nobody said
    except (ValueError, OverflowError, OSError):
        at = None
    if teacher is None or at is None or not example.model:
        known = {"when": at, "where": teacher, "by which model": example.model}
        reason = f"nobody recorded {' and '.join(what for what, value in known.items() if not value)} it was answered"
        return Ruling(
            may_train=False, terms="unknown", teacher="", model=example.model, at=at, reason=reason, fix=_fix("unknown")
        )
    return gate(
        teacher.provider, example.model, teacher.host, at, task=task, permission=teacher.permission, today=today
    )


def strictest(rulings: Sequence[Ruling]) -> Ruling:
    """The one that decides where it is not known which of several teachers answered. Raises ValueError for none."""
    return max(rulings, key=lambda ruling: (not ruling.may_train, _SEVERITY[ruling.terms]))


def authored(target: Json, answer: Json) -> bool:
    """Whether a person's target is a text of its own beside a model's answer; other case or white space is not.

    >>> authored({"label": "Spam"}, {"label": "spam "}), authored({"label": "ham"}, {"label": "spam"})
    (False, True)
    """
    return bool(_plain_json(target) != _plain_json(answer))


def _plain_json(value: Json) -> Json:
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {key: _plain_json(item) for key, item in value.items()}
    return [_plain_json(item) for item in value] if isinstance(value, list) else value


# --- which rows of the table count ------------------------------------------------------------------------------------


def _where(provider: str, model: str, host: str | None) -> str:
    """The public host whose users' terms count; `_OWN` for an own server; "?" where the address is not known."""
    if host is None:
        host = "localhost" if provider in _SERVERS else _USUAL_HOSTS.get(provider, "?")
    host = host.strip().lower().rstrip(".").strip("[]")
    if not _private(host):
        return host or "?"
    # Ollama forwards models of these names to its own service, through the server on this machine.
    return "ollama.com" if model.lower().endswith(("-cloud", ":cloud")) else _OWN


def _private(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return host not in ("", "?") and ("." not in host or host.endswith(_PRIVATE_ENDINGS))
    return bool(address.is_private or address.is_loopback or address.is_link_local)


@lru_cache(maxsize=4096)  # a hundred thousand rows come from few models, on few days
def _found(where: str, model: str, at: date) -> tuple[tuple[str, TermsClass, Terms | None], ...]:
    """What the texts that count say: a sentence, the class, and the row, if there is one."""
    account, name = _plain(model)
    weights, why = _most_specific([(pattern, row) for row in TABLE for pattern in row.models], name, at)
    if weights is not None and account and account not in weights.makers:
        weights, why = None, f": these weights are published by {account!r}, not by their maker"
    found: list[tuple[str, TermsClass, Terms | None]] = []
    if where != _OWN:
        service, why_not = _most_specific([(host, row) for row in TABLE for host in row.hosts], where, at)
        found.append(_said(service, f"the terms of the service at {where} are not known{why_not}"))
        if service is not None and service is weights:
            return tuple(found)
    found.append(_said(weights, f"the licence of {model or 'an unnamed model'!r} is not known{why}"))
    return tuple(found)


def _said(row: Terms | None, unknown: str) -> tuple[str, TermsClass, Terms | None]:
    if row is None:
        return unknown, "unknown", None
    said = {
        "permissive": f"allowed by {row.name}",
        "conditional": f"allowed on conditions only by {row.name}",
        "forbidden": f"forbidden by {row.name}",
        "unknown": f"not known to be allowed by {row.name}",
    }
    return said[row.terms], row.terms, row


def _most_specific(patterns: Iterable[tuple[str, Terms]], name: str, at: date) -> tuple[Terms | None, str]:
    """The row in force whose pattern fits best: most letters, then the strictest; or None, and why not, if that is known."""
    fits = [(len(pattern.replace("*", "")), row) for pattern, row in patterns if fnmatchcase(name, pattern)]
    most = max((letters for letters, _ in fits), default=0)
    best = [row for letters, row in fits if letters == most]
    in_force = [row for row in best if row.in_force(at)]
    if in_force:
        return max(in_force, key=lambda row: (_SEVERITY[row.terms], row.name)), ""
    return None, f" for {at}: the table has only later terms" if best else ""


def _plain(model: str) -> tuple[str, str]:
    """The account and the name, without case, tags and versions set apart by "-" alone.

    >>> _plain("meta-llama/Llama-3.1-8B"), _plain("models/gemini-2.5-pro"), _plain("qwen2.5:3b")
    (('meta-llama', 'llama-3.1-8b'), ('', 'gemini-2.5-pro'), ('', 'qwen2.5-3b'))
    """
    account, _, name = model.strip().lower().removeprefix("models/").rpartition("/")
    for sign in ":_@":
        name = name.replace(sign, "-")
    return account, name


def _fix(terms: TermsClass) -> str:
    other = (
        "or name a teacher under Apache-2.0 or MIT on a server of your own, or one whose service allows it (DeepSeek)"
    )
    first = {
        "conditional": "if you meet the conditions, say how in `permission: {basis, by, date, scope}` of the provider",
        "forbidden": "if the provider consents in writing, record that in its `permission: {basis, by, date, scope}`",
    }
    unread = "read its terms, and if they allow it, say where in `permission: {basis, by, date, scope}` of the provider"
    return f"{first.get(terms, unread)}; {other}"


# --- rows ---------------------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """A row with the ruling about it."""

    example: Example
    ruling: Ruling


class Sifted(NamedTuple):
    """The rows that may train, each with its basis filled in, and those that may not."""

    admitted: tuple[Judged, ...]
    refused: tuple[Judged, ...]

    @property
    def examples(self) -> list[Example]:
        return [row.example for row in self.admitted]

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were refused for each reason, the most frequent first."""
        return dict(Counter(row.ruling.reason for row in self.refused).most_common())


def sift(examples: Iterable[Example], rule: Callable[[Example], Ruling]) -> Sifted:
    """The rows that may train and those that may not, in their order. `rule` gives the ruling for a row (see `judge`).

    A row that may train is refused all the same if a refused one has the same input and target and is not clearly another
    answer: both name a request and a model, and not the same ones. A person's own target stands by itself.
    """
    judged = [Judged(example, rule(example)) for example in examples]
    closed: dict[str, list[Example]] = {}
    for example, ruling in judged:
        if not ruling.may_train:
            closed.setdefault(_content(example), []).append(example)
    admitted, refused = [], []
    for example, ruling in judged:
        if not ruling.may_train:
            refused.append(Judged(example, ruling.model_copy(update={"basis": ""})))
        elif ruling.terms != "own" and any(_may_be_one(example, other) for other in closed.get(_content(example), ())):
            refused.append(Judged(example, ruling.model_copy(update=_TWO_LICENCES)))
        else:
            filled = {"basis": ruling.basis, "teacher": ruling.teacher, "terms": ruling.terms}
            admitted.append(Judged(example.model_copy(update=filled), ruling))
    return Sifted(tuple(admitted), tuple(refused))


_TWO_LICENCES = {
    "may_train": False,
    "basis": "",
    "reason": "the same answer is also here under terms that do not let it train",
    "fix": "record for each answer which model gave it to which request, or remove one of the two",
}


def _content(example: Example) -> str:
    return _digest(_plain_json([example.input, example.target]))


def _may_be_one(one: Example, other: Example) -> bool:
    named = one.request_id and one.model and other.request_id and other.model
    return not named or (one.request_id, one.model) == (other.request_id, other.model)


# --- the proof --------------------------------------------------------------------------------------------------------


def proof(sifted: Sifted, *, today: date) -> dict[str, Json]:
    """What a checkpoint's manifest keeps: who taught it under which terms, what was refused, and the hash of its rows.

    JSON: {"table", "judged", "rows", "sha256", "by": [{"teacher", "model", "terms", "basis", "rows"}], "refused": {reason:
    rows}}. The hash does not depend on the order of the rows.
    """
    groups = Counter((r.teacher, r.model, r.terms, r.basis) for _, r in sifted.admitted)
    keys = ("teacher", "model", "terms", "basis")
    return {
        "table": version(),
        "judged": today.isoformat(),
        "rows": len(sifted.admitted),
        "sha256": _digest(sorted(_digest(_identity(row)) for row in sifted.admitted)),
        "by": [dict(zip(keys, group, strict=True)) | {"rows": rows} for group, rows in sorted(groups.items())],
        "refused": sifted.reasons,
    }


def check_proof(proven: Mapping[str, Json], sifted: Sifted) -> None:
    """Nothing, if the rows judged now are those of the proof, on the same bases.

    Raises TrainingError that names what changed: a row came, went or was altered, or its terms or permission did.
    """
    now = proof(sifted, today=date.min)
    if now["sha256"] == proven.get("sha256") and now["rows"] == proven.get("rows") and now["by"] == proven.get("by"):
        return
    before = {_group(group): group["rows"] for group in proven.get("by", ())}
    after = {_group(group): group["rows"] for group in now["by"]}
    changed = [
        f"{g}: {before.get(g, 0)} -> {after.get(g, 0)}" for g in sorted(before | after) if before.get(g) != after.get(g)
    ]
    refused = [f"{rows} refused now: {reason}" for reason, rows in sifted.reasons.items()]
    raise TrainingError(
        "the rows that may train are not those that were selected; "
        + "; ".join(changed[:3] or ["a row was altered"])
        + "".join(f"; {said}" for said in refused[:3]),
        hint="terms, permissions or rows changed since the selection: select again; `apprentice licence` explains",
    )


def version() -> str:
    """The table's: the last day on which one of its rows was checked, and the start of its hash."""
    rows = [row.model_dump(mode="json") for row in TABLE]
    return f"{max(row.checked for row in TABLE)}/{_digest(rows)[:12]}"


def _identity(row: Judged) -> Json:
    example, ruling = row
    day = ruling.at.isoformat() if ruling.at is not None else None
    return [
        example.input,
        example.target,
        example.source,
        ruling.teacher,
        ruling.model,
        ruling.terms,
        day,
        ruling.basis,
    ]


def _group(group: Mapping[str, Json]) -> str:
    return f"{group['model'] or 'own words'} of {group['teacher']} ({group['terms']}; {group['basis']})"


def _digest(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- what a configuration means ---------------------------------------------------------------------------------------


class Line(NamedTuple):
    """What the answers of one configured teacher may be used for: all of them serve; they train for `trains` alone."""

    teacher: Teacher
    ruling: Ruling  # of the first task that they may not train for, or else of the first one
    trains: tuple[str, ...]
    refused: tuple[str, ...]


def explain(teachers: Sequence[Teacher], tasks: Sequence[str], *, today: date) -> list[Line]:
    """What today's answers of each configured teacher may be used for, in the order given. Raises ValueError for no task."""
    if not tasks:
        raise ValueError("a configuration has a task")
    lines = []
    for teacher in teachers:
        rulings = {
            task: gate(
                teacher.provider,
                teacher.model,
                teacher.host,
                today,
                task=task,
                permission=teacher.permission,
                today=today,
            )
            for task in tasks
        }
        trains = tuple(task for task, ruling in rulings.items() if ruling.may_train)
        refused = tuple(task for task, ruling in rulings.items() if not ruling.may_train)
        lines.append(Line(teacher, rulings[(*refused, *trains)[0]], trains, refused))
    return lines


def day(at: Seconds) -> date:
    """The day of a moment, in UTC. Raises ValueError, OverflowError or OSError for a moment that no calendar has."""
    return datetime.datetime.fromtimestamp(at, UTC).date()


# --- the table --------------------------------------------------------------------------------------------------------

_CHECKED = date(2026, 11, 21)
_HF = "https://huggingface.co"
_LLAMA = "https://github.com/meta-llama/llama-models/blob/main/models"
_COPY = "read in quotations of others; the page itself could not be opened"
_UNREAD = "what it says of training on answers could not be read"


def _row(
    name: str,
    terms: Literal["permissive", "conditional", "forbidden", "unknown"],
    source: str,
    *conditions: str,
    hosts: str = "",
    makers: str = "",
    models: str = "",
    since: date | None = None,
    until: date | None = None,
    note: str = "",
) -> Terms:
    return Terms(
        name=name,
        hosts=tuple(hosts.split()),
        makers=tuple(makers.split()),
        models=tuple(models.split()),
        terms=terms,
        since=since,
        until=until,
        conditions=conditions,
        source=source,
        checked=_CHECKED,
        note=note,
    )


def _in_regions(name: str) -> str:
    """A name as Bedrock has it: alone, and before it the region that answers."""
    return " ".join([name, *(f"{region}.{name}" for region in ("us", "eu", "apac", "global"))])


# fmt: off
_SERVICES = (
    _row("Anthropic Commercial Terms and Usage Policy", "forbidden",
         "https://www.anthropic.com/legal/commercial-terms",
         "no competing product and no training of competing models without Anthropic's express approval (D.4)",
         "the Usage Policy wants prior authorization for training any model on inputs and outputs",
         "Anthropic's help pages name kinds of model that do not compete (sorting, extraction); they are no contract",
         hosts="api.anthropic.com", makers="anthropic", models=f"claude* {_in_regions('anthropic.claude*')}",
         since=date(2025, 6, 17), note=f"{_COPY}; the Usage Policy is of 2025-09-15"),
    _row("OpenAI Services Agreement", "conditional", "https://openai.com/policies/services-agreement/",
         "no models that compete with OpenAI's products and services (3.3 e)",
         "excepted: models that mainly categorize, classify or organize data, neither distributed nor sold to others",
         "excepted: fine-tuning of OpenAI's models on its own service", hosts="api.openai.com *.api.openai.com",
         makers="openai", models="gpt-3* gpt-4* gpt-5* chatgpt-* ft-gpt-* o1 o1-* o3 o3-* o4-*",
         since=date(2026, 1, 1), note=_COPY),
    _row("OpenAI Terms of Use before 2026", "forbidden", "https://openai.com/policies/row-terms-of-use/",
         "no use of output for models that compete with OpenAI", hosts="api.openai.com *.api.openai.com",
         makers="openai", models="gpt-3* gpt-4* gpt-5* chatgpt-* ft-gpt-* o1 o1-* o3 o3-* o4-*",
         since=date(2023, 3, 14), until=date(2026, 1, 1),
         note=f"{_COPY}; its business terms of then may have had the exceptions of 2026"),
    _row("Gemini API Additional Terms", "forbidden", "https://ai.google.dev/gemini-api/terms",
         "no models that compete with the Gemini API or Google AI Studio; no extraction of its models",
         hosts="generativelanguage.googleapis.com", makers="google", models="gemini-*", since=date(2024, 3, 20),
         note="read in the archive of the page, up to 2025, and in quotations of 2026; 'compete' is not defined there"),
    _row("Google Cloud Service Specific Terms", "forbidden", "https://cloud.google.com/terms/service-terms",
         "no use of output to develop a similar or competing product or service",
         hosts="aiplatform.googleapis.com *-aiplatform.googleapis.com", since=date(2024, 3, 20),
         note=f"{_COPY}; its first day is not known and taken from the Gemini API"),
    _row("Microsoft Product Terms for generative AI", "forbidden", "https://www.microsoft.com/licensing/terms/",
         "no use of the service's data to create, train or improve a similar or competing product or service",
         hosts="*.openai.azure.com *.services.ai.azure.com *.cognitiveservices.azure.com models.inference.ai.azure.com",
         note=_COPY),
    _row("AWS Service Terms for Bedrock", "forbidden", "https://aws.amazon.com/service-terms/",
         "no models that compete with Bedrock or other services of AWS", hosts="bedrock-runtime.*.amazonaws.com",
         makers="amazon", models=f"nova-* {_in_regions('amazon.nova-*')}", note=_COPY),
    _row("xAI Terms of Service for enterprises", "forbidden", "https://x.ai/legal/terms-of-service-enterprise",
         "no training of any model on output unless an order form says so (3.2)", hosts="api.x.ai", makers="x-ai xai",
         models="grok-3* grok-4* grok-5* grok-code*",
         note=f"{_COPY}, of 2026-08-14; earlier terms are taken to be the same"),
    _row("DeepSeek Open Platform Terms", "permissive",
         "https://cdn.deepseek.com/policies/en-US/deepseek-open-platform-terms-of-service.html",
         "published answers are to be marked as made by a machine; no use of DeepSeek's name for the student",
         hosts="api.deepseek.com", makers="deepseek deepseek-ai",
         models="deepseek-chat deepseek-reasoner deepseek-flash", since=date(2025, 1, 20),
         note=f"{_COPY}: terms of 2026-04-29 (4.2); from 2025-01-20 on as its release note of that day says"),
    _row("Mistral Commercial Terms", "conditional", "https://legal.mistral.ai/terms/commercial-terms-of-service",
         "no image outputs for a competing image product (3.3); no output for reverse engineering; text is not named",
         hosts="api.mistral.ai codestral.mistral.ai", makers="mistralai mistral",
         models="mistral-medium* mistral-large-latest mistral-small-latest ministral-3b-latest ministral-8b-latest "
                "codestral-latest magistral-medium* devstral-medium*", since=date(2026, 9, 25),
         note=f"{_COPY}; that text may train follows from silence, so an operator has to say it"),
    _row("OpenRouter Terms", "conditional", "https://openrouter.ai/terms",
         "the terms of each model, and of the host that OpenRouter picks for it, hold as well; no competing service",
         hosts="openrouter.ai", note=f"{_COPY}, of 2026-08-31; pin one upstream host, and say what its terms are"),
    _row("Fireworks AI Terms of Service", "forbidden", "https://fireworks.ai/terms-of-service",
         "no content from the service for training or developing models", hosts="api.fireworks.ai",
         note=f"{_COPY}; whether answers are such content is the cautious reading"),
    _row("Together AI Terms", "unknown", "https://www.together.ai/terms-of-service",
         hosts="api.together.xyz api.together.ai", note=_UNREAD),
    _row("Groq Services Agreement", "unknown", "https://console.groq.com/docs/legal/services-agreement",
         hosts="api.groq.com", note=_UNREAD),
    _row("Cohere SaaS Agreement", "unknown", "https://cohere.com/saas-agreement", hosts="api.cohere.com api.cohere.ai",
         note=_UNREAD),
    _row("Hugging Face Terms of Service", "unknown", f"{_HF}/terms-of-service",
         hosts="router.huggingface.co *.endpoints.huggingface.cloud", note=_UNREAD),
    _row("Ollama Terms", "unknown", "https://ollama.com/terms", hosts="ollama.com", note=_UNREAD),
)

# fmt: on
_LLAMA_STUDENT = (
    'a model trained on outputs that is distributed or made available has a name that begins with "Llama"',
    'products that contain Llama show "Built with Llama"; the Acceptable Use Policy holds; 700 million users need a licence',
)
_QWEN_STUDENT = (
    'a distributed model trained on outputs shows "Built with Qwen" or "Improved using Qwen" in its documentation'
)
_RESEARCH = "for research or other non-commercial purposes only"
_OPENRAIL = "a model distilled from its outputs is a derivative: passed on, it carries the licence's use restrictions"

# fmt: off
_WEIGHTS = (
    _row("Llama 2 Community License", "forbidden",
         "https://github.com/meta-llama/llama-models/blob/main/models/llama2/LICENSE",
         "no improving of large language models other than Llama 2 with outputs (1.b.v)", makers="meta-llama",
         models="llama-2* llama2* codellama*"),
    _row("Meta Llama 3 Community License", "forbidden", f"{_LLAMA}/llama3/LICENSE",
         "no improving of large language models other than Llama 3 with outputs (1.b.v)", makers="meta-llama",
         models="llama-3* llama3* meta-llama-3* meta.llama3-8b* meta.llama3-70b*"),
    _row("Llama 3.1, 3.2, 3.3 or 4 Community License", "conditional", f"{_LLAMA}/llama3_1/LICENSE", *_LLAMA_STUDENT,
         makers="meta-llama",
         models="llama-3.1* llama-3.2* llama-3.3* llama3.1* llama3.2* llama3.3* meta-llama-3.1* llama-4* llama4* "
                "meta.llama3-1* meta.llama3-2* meta.llama3-3* meta.llama4*",
         note="3.1 and 4 were read whole, 3.2 and 3.3 in quotations"),
    _row("Tongyi Qianwen License", "forbidden", f"{_HF}/Qwen/Qwen2-72B-Instruct/blob/main/LICENSE",
         "no improving of other large language models with outputs", makers="qwen",
         models="qwen-1-8b* qwen-7b* qwen-14b* qwen-72b* qwen1.5* qwen2-72b*",
         note="its clause on outputs was not seen in full"),
    _row("Apache-2.0 (Qwen2)", "permissive", f"{_HF}/Qwen/Qwen2-7B-Instruct", makers="qwen", models="qwen2 qwen2-*"),
    _row("Apache-2.0 (Qwen2.5)", "permissive", f"{_HF}/Qwen/Qwen2.5-7B-Instruct/blob/main/LICENSE", makers="qwen",
         models="qwen2.5*"),
    _row("Qwen License", "conditional", f"{_HF}/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE", _QWEN_STUDENT,
         makers="qwen", models="qwen2.5-72b* qwen2.5-*-72b*"),
    _row("Qwen Research License", "conditional", f"{_HF}/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE", _RESEARCH,
         _QWEN_STUDENT, makers="qwen", models="qwen2.5-3b* qwen2.5-*-3b*"),
    _row("Apache-2.0 (Qwen3 to 3.6)", "permissive", f"{_HF}/Qwen/Qwen3-32B/blob/main/LICENSE", makers="qwen",
         models="qwen3 qwen3-* qwen3.5* qwen3.6*", note="3.5 and 3.6 by their model cards, quoted"),
    _row("Apache-2.0 (Qwen3.8 27B)", "permissive", f"{_HF}/Qwen/Qwen3.8-27B", makers="qwen", models="qwen3.8-27b*",
         note=_COPY),
    _row("Qwen3.8-Max License or Qwen Community License", "conditional",
         f"{_HF}/Qwen/Qwen3.8-2.4T-A95B/blob/main/LICENSE",
         "whether a student is a derivative work is not said; if it is, large users and model services need more",
         makers="qwen", models="qwen3.8* qwen3.8-flash-next*", note=_COPY),
    _row("Alibaba Model Studio Terms", "unknown", "https://www.alibabacloud.com/help/en/legal/", makers="qwen",
         models="qwen-max* qwen-plus* qwen-turbo* qwen-flash* qwen*-max* qwen*-plus* qwen*-turbo* qwen*-flash*",
         note=f"models without published weights; {_UNREAD}"),
    _row("Apache-2.0 (Mistral)", "permissive", "https://docs.mistral.ai/getting-started/models/",
         makers="mistralai mistral",
         models="mistral mistral-7b* open-mistral-7b* mixtral* open-mixtral* mistral-nemo* open-mistral-nemo* "
                "mistral-small-24b* mistral-small3* mistral-small-3* mistral-small-4* mistral-large-3* "
                "ministral-3-* devstral-small* magistral-small* pixtral-12b*",
         note="Small 3 and later, Large 3 and Ministral 3 by their model cards, quoted"),
    _row("Mistral Research or Non-Production License", "conditional", "https://mistral.ai/licenses/MRL-0.1.md",
         _RESEARCH + ", of outputs as well", makers="mistralai mistral",
         models="mistral-large* mistral-small* ministral* pixtral-large* codestral*",
         note="a name that does not tell the version is taken to be under it"),
    _row("Modified MIT (Mistral Medium 3.5)", "conditional", f"{_HF}/mistralai",
         "not for companies of more than 20 million dollars a month, nor what is derived from it",
         makers="mistralai mistral", models="mistral-medium-3.5*", note=_COPY),
    _row("MIT (DeepSeek)", "permissive", "https://github.com/deepseek-ai/DeepSeek-R1", makers="deepseek deepseek-ai",
         models="deepseek-r1* deepseek-v3-0324* deepseek-v3.1* deepseek-v3.2* deepseek-v4*",
         note="R1's README was read; V3-0324 to V4 by their model cards, quoted"),
    _row("Llama licence (DeepSeek-R1 distilled into Llama)", "conditional",
         "https://github.com/deepseek-ai/DeepSeek-R1", *_LLAMA_STUDENT, makers="deepseek deepseek-ai",
         models="deepseek-r1-distill-llama* deepseek-r1-8b* deepseek-r1-70b*"),
    _row("DeepSeek License 1.0", "conditional", "https://github.com/deepseek-ai/DeepSeek-V3/blob/main/LICENSE-MODEL",
         _OPENRAIL, makers="deepseek deepseek-ai",
         models="deepseek-v3* deepseek-v2* deepseek-llm* deepseek-coder* deepseek-vl*"),
    _row("Apache-2.0 (Gemma 4)", "permissive", "https://ai.google.dev/gemma/docs/gemma_4_license", makers="google",
         models="gemma-4-* gemma4*", note=_COPY),
    _row("Gemma Terms of Use", "conditional", "https://ai.google.dev/gemma/terms",
         "a model trained on outputs to perform like Gemma is a derivative: passed on, it carries Gemma's terms and "
         "use policy", makers="google", models="gemma gemma-* gemma2* gemma3* codegemma*"),
    _row("MIT (Phi)", "permissive", f"{_HF}/microsoft/Phi-3.5-mini-instruct/blob/main/LICENSE", makers="microsoft",
         models="phi-3* phi-4* phi3* phi4*"),
    _row("Apache-2.0 (SmolLM)", "permissive", f"{_HF}/HuggingFaceTB/SmolLM2-1.7B-Instruct", makers="huggingfacetb",
         models="smollm smollm-* smollm2* smollm3*"),
    _row("Apache-2.0 (OLMo)", "permissive", f"{_HF}/allenai/OLMo-2-1124-7B-Instruct", makers="allenai",
         models="olmo-* olmo2* olmo3* olmoe*"),
    _row("Apache-2.0 (Granite)", "permissive", f"{_HF}/ibm-granite/granite-3.3-8b-instruct", makers="ibm-granite ibm",
         models="granite-3* granite-4* granite3* granite4*"),
    _row("Apache-2.0 (gpt-oss)", "permissive", f"{_HF}/openai/gpt-oss-120b",
         "its usage policy asks for compliance with the law", makers="openai",
         models="gpt-oss-20b* gpt-oss-120b* gpt-oss"),
    _row("CC-BY-NC-4.0 (Command, Aya)", "conditional", f"{_HF}/CohereLabs/c4ai-command-r-plus", _RESEARCH,
         makers="cohere coherelabs cohereforai", models="command-r* command-a* c4ai-* aya-*",
         note="whether the licence of weights binds outputs is not settled; the cautious reading"),
    _row("Apache-2.0 (Falcon 7B and 40B)", "permissive", f"{_HF}/tiiuae/falcon-40b", makers="tiiuae",
         models="falcon-7b* falcon-40b*"),
    _row("TII Falcon License", "unknown", "https://falconllm.tii.ae/falcon-terms-and-conditions.html", makers="tiiuae",
         models="falcon-180b* falcon2* falcon3* falcon-h1* falcon-e*", note=_UNREAD),
    _row("Apache-2.0 (Yi)", "permissive", f"{_HF}/01-ai/Yi-34B-200K/discussions/11", makers="01-ai",
         models="yi-6b* yi-9b* yi-34b* yi-1.5* yi-coder*"),
    _row("MIT (GLM)", "permissive", f"{_HF}/zai-org/GLM-4.5", makers="zai-org z-ai",
         models="glm-4.5* glm-4.6* glm-4.7* glm-5.3-flash*", note="4.6 and later by their model cards, quoted"),
    _row("GLM License", "conditional", f"{_HF}/zai-org/GLM-5.3",
         "like MIT, but the largest model services need a review; whether a student is a derivative work is not said",
         makers="zai-org z-ai", models="glm-5.3*", note=_COPY),
    _row("Modified MIT or Kimi License", "conditional", f"{_HF}/moonshotai/Kimi-K2-Instruct",
         "derivative works of 100 million users or 20 million dollars a month show the model's name; K3 asks more "
         "of services", makers="moonshotai", models="kimi-k2* kimi-k3*",
         note=f"{_COPY}; whether a student is a derivative work is not said"),
    _row("MiniMax Community License", "conditional", f"{_HF}/MiniMaxAI/MiniMax-M3/blob/main/LICENSE",
         "non-commercial; commercial use, of derivative works too, shows the model's name and is notified",
         makers="minimaxai minimax", models="minimax-*",
         note=f"{_COPY}, for M3; M1 and M2, which may allow more, are taken to be under it"),
    _row("Apache-2.0 (Grok 1)", "permissive", "https://github.com/xai-org/grok-1", makers="xai-org",
         models="grok-1 grok-1-0*", note=_COPY),
    _row("xAI Community License (Grok 2)", "forbidden", f"{_HF}/xai-org/grok-2/blob/main/LICENSE",
         "no training of foundation, language or general-purpose models on outputs, but for changes to Grok itself",
         makers="xai-org", models="grok-2*"),
)

# fmt: on
TABLE: tuple[Terms, ...] = (*_SERVICES, *_WEIGHTS)
"""Every text that the gate knows."""
