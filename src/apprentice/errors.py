"""Every error that Apprentice raises, in one tree.

`retryable` says whether the same call may succeed later without anybody changing anything; `hint` says what a person
can do. Both stand on the class, so that a caller can decide without reading prose; an instance may sharpen them.

    ApprenticeError
    ├── ConfigError             a file, a field, a plugin or an extra is wrong or missing
    │   ├── MissingExtra        an optional package is not installed
    │   └── UnsafeFile          a model file must not be loaded
    ├── InvalidRequest          the request cannot be answered as it is
    │   ├── UnknownTask
    │   ├── UnknownRequest
    │   ├── InvalidInput        the input does not fit the task's schema
    │   └── IdempotencyConflict the key was used before with another input
    ├── BudgetError
    │   ├── BudgetExhausted     the caps leave no room for this call
    │   ├── BudgetHeld          room will come back: open reservations fill the caps
    │   └── PriceUnknown        no price, so no worst case, so no call
    ├── ModelError              a model did not give a usable answer
    │   ├── ModelUnavailable    not sent, or the server is down
    │   ├── ModelRejected       the provider refused the request as it is
    │   ├── ModelRefused        the model declined to answer
    │   ├── InvalidAnswer       it answered, but not what the task's schema asks for
    │   ├── OutcomeUnknown      sent, but nobody knows what became of it
    │   └── NoLocalModel        nothing has been learned yet
    ├── DeadlineExceeded
    ├── TrainingError           a teaching cycle could not produce a version
    │   └── CannotLearn         the trainer cannot learn this task by design
    └── StoreError
        ├── StoreBusy
        ├── StoreFull
        ├── StoreCorrupt
        └── StoreTooNew         written by a newer Apprentice
"""

from __future__ import annotations

from typing import Any, Literal

type Became = Literal["not_sent", "rejected", "answered", "answered_no_usage", "unknown"]


class ApprenticeError(Exception):
    """Base of every error raised on purpose."""

    retryable: bool = False
    hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint


class ConfigError(ApprenticeError):
    """The configuration cannot be used; the message names the file, the line and the field."""

    hint = "run `apprentice check --config FILE`"


class MissingExtra(ConfigError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"the package {package!r} is not installed", hint=f"pip install 'apprentice[{extra}]'")


class UnsafeFile(ConfigError):
    """A model file must not be handed to a library; the message names the file and the reason."""

    hint = "use a file from a source that you trust, and whole"


class InvalidRequest(ApprenticeError):
    """The request cannot be answered as it is; nothing was spent on it."""


class UnknownTask(InvalidRequest):
    """No task of that name is configured."""


class UnknownRequest(InvalidRequest):
    """No request of that id is recorded."""

    hint = "the id is in `Result.request_id`; `apprentice explain` takes the same"


class InvalidInput(InvalidRequest):
    """The input does not fit the task's input schema; the message names the field."""


class IdempotencyConflict(InvalidRequest):
    """The idempotency key was used before, with another input."""

    hint = "use a fresh idempotency key for a new request"


class BudgetError(ApprenticeError):
    """A paid call was not made because of money."""


class BudgetExhausted(BudgetError):
    """The caps leave no room for the worst case of this call."""

    hint = "raise the cap in `budget:`, or wait for the next window"


class BudgetHeld(BudgetError):
    """Reservations of calls in flight fill the caps; room may come back when they settle."""

    retryable = True
    hint = "try again when calls in flight have settled"


class PriceUnknown(BudgetError):
    """The price of a model is not known, so its worst case cannot be reserved."""

    hint = "state `price: {input: …, output: …}` (US dollars per million tokens) for the model in the configuration"


class ModelError(ApprenticeError):
    """A model did not give a usable answer; it carries what became of the attempt, because money hangs on it.

    `outcome`: one of the outcomes of types.Attempt. `retry_after`: seconds that the provider asks us to wait. `usage`
    (a types.Usage, which stands above this module) and `text`: what the provider billed, and what it said for it.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        outcome: Became = "unknown",
        retry_after: float | None = None,
        usage: Any = None,
        text: str = "",
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.outcome = outcome
        self.retry_after = retry_after
        self.usage = usage
        self.text = text
        if retryable is not None:
            self.retryable = retryable


class ModelUnavailable(ModelError):
    """The call was not sent, or the provider said that it is overloaded; it cost nothing."""

    retryable = True


class ModelRejected(ModelError):
    """The provider rejected the request as it is (key, model name, shape); repeating it will not help."""


class OutOfMoney(ModelRejected):
    """The provider says that our account with it is empty or at its limit; others may be asked."""

    hint = "fill up the account, or raise its limit, at the provider"


class ModelRefused(ModelError):
    """The model declined to answer; this is its answer, and it is not retried on the same model."""


class InvalidAnswer(ModelError):
    """The model answered something that does not fit the task's output schema."""

    retryable = True


class OutcomeUnknown(ModelError):
    """The request left, and nobody knows what became of it; its worst case counts as spent, unless its usage was told."""

    retryable = True


class NoLocalModel(ModelError):
    """No local model exists yet; a normal state of a young task."""


class DeadlineExceeded(ApprenticeError):
    """The caller's deadline passed before there was an answer."""

    retryable = True


class TrainingError(ApprenticeError):
    """A teaching cycle could not produce a version; serving goes on as before."""


class CannotLearn(TrainingError):
    """The trainer cannot learn this task by design (free text for the embedded student, say)."""


class StoreError(ApprenticeError):
    """The store could not do what was asked; nothing was half done."""


class StoreBusy(StoreError):
    """Another process held the store for too long."""

    retryable = True


class StoreFull(StoreError):
    """The disk is full; the request failed before it cost anything."""

    retryable = True
    hint = "free disk space; no restart is needed"


class StoreCorrupt(StoreError):
    """The store's file is damaged or is no store."""

    hint = "restore a backup made with the backup API; keep the damaged file"


class StoreTooNew(StoreError):
    """The store was written by a newer Apprentice than this one."""

    hint = "upgrade apprentice; an older version must not write to a newer store"
