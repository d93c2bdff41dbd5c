"""Finds e-mail addresses, phone numbers, payment cards, IBANs and keys by what they look like and by their check digits."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from apprentice.errors import ConfigError, MissingExtra
from apprentice.redactors import apart
from apprentice.types import Finding, Redactor

try:
    import phonenumbers
    from detect_secrets.plugins.base import RegexBasedDetector
    from stdnum import iban, luhn
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "phonenumbers", "redaction") from error

Kind = Literal["email", "phone", "card", "iban", "key"]
# In the order in which they win: the digits of a card may be read as a phone number, those within a key as anything.
KINDS: tuple[Kind, ...] = ("key", "iban", "email", "card", "phone")

# Expressions of detect-secrets that take no word of a language for a key, and no more than a window's time.
_DETECTORS = (
    "aws",
    "azure_storage_key",
    "basic_auth",
    "discord",
    "github_token",
    "gitlab_token",
    "jwt",
    "mailchimp",
    "pypi_token",
    "sendgrid",
    "slack",
    "square_oauth",
    "stripe",
    "telegram_token",
    "twilio",
)
# What those do not know: keys of OpenAI, Anthropic and others who write "sk-", of Google, of Hugging Face, of this gateway.
_MORE = (
    r"(?<![A-Za-z0-9])(?:sk|pk|rk|apk)[-_][A-Za-z0-9_-]{20,200}",
    r"AIza[A-Za-z0-9_-]{35}",
    r"hf_[A-Za-z0-9]{30,50}",
)
# Looked at in pieces, so that no text costs more than its length; they overlap by a key's length.
_WINDOW, _STEP = 768, 512
_MORE_OF_A_KEY = re.compile(r"[A-Za-z0-9_.=+/-]*")
_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")

_EMAIL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_DIGITS = re.compile(r"[0-9](?:[ -]?[0-9]){12,}")
_GROUP = re.compile(r"[0-9]+")
_CARD = range(13, 20)  # digits: ISO/IEC 7812
_ISSUERS = "23456"  # the first digit of cards that pay: 1 and 7 to 9 are other industries'


def build(kinds: list[Kind] | None = None, region: str | None = "US") -> Redactor:
    """`kinds`: what is looked for; all of them when left out. `region`: the country whose phone numbers may be written
    without "+" and its code, as ISO 3166 has it; null: no country's. Raises ConfigError for a region that does not exist.
    """
    if region is not None and region not in phonenumbers.SUPPORTED_REGIONS:
        raise ConfigError(
            f"redactor 'patterns', setting 'region': there is no region {region!r}", hint="such as DE or US"
        )
    finders: dict[Kind, Callable[[str], Iterable[tuple[int, int]]]] = {
        "key": _keys,
        "iban": _ibans,
        "email": lambda text: (match.span() for match in _EMAIL.finditer(text)) if "@" in text else (),
        "card": _cards,
        "phone": functools.partial(_phones, region),
    }
    chosen = [kind for kind in KINDS if kinds is None or kind in kinds]

    def find(text: str) -> list[Finding]:
        return apart(Finding(*span, kind.upper()) for kind in chosen for span in finders[kind](text))

    return find


@functools.cache
def _expressions() -> tuple[re.Pattern[str], ...]:
    found = []
    for name in _DETECTORS:
        module = importlib.import_module(f"detect_secrets.plugins.{name}")
        for member in vars(module).values():
            if isinstance(member, type) and issubclass(member, RegexBasedDetector) and member is not RegexBasedDetector:
                found += list(member().denylist)
    return (*found, *map(re.compile, _MORE))


def _keys(text: str) -> Iterator[tuple[int, int]]:
    ended = 0
    for begin in _BEGIN.finditer(text):
        if begin.start() >= ended:
            end = _END.search(text, begin.end())
            ended = len(text) if end is None else end.end()  # cut off: it may be all key from here on
            yield begin.start(), ended
    for start in range(0, max(len(text) - (_WINDOW - _STEP), 1), _STEP):
        window = text[start : start + _WINDOW]
        for expression in _expressions():
            for match in expression.finditer(window):
                more = _MORE_OF_A_KEY.match(text, start + match.end())
                yield start + match.start(), more.end() if more is not None else start + match.end()


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        for end in range(match.end(), match.start() + 14, -1):  # words behind it may look as if they belonged to it
            if text[end - 1].isalnum() and iban.is_valid(text[match.start() : end]):
                yield match.start(), end
                break


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _DIGITS.finditer(text):
        groups = list(_GROUP.finditer(text, *match.span()))
        for first, group in enumerate(groups):  # numbers before and behind it may look as if they belonged to it
            if group[0][0] in _ISSUERS and (end := _card(groups[first:])):
                yield group.start(), end


def _card(groups: list[re.Match[str]]) -> int:
    """Where the longest card ends that begins with the first group; 0 for none."""
    digits, longest = "", 0
    for group in groups[: _CARD.stop]:
        digits += group[0]
        if len(digits) in _CARD and luhn.is_valid(digits):
            longest = group.end()
    return longest


def _phones(region: str | None, text: str) -> Iterator[tuple[int, int]]:
    if sum(character.isdigit() for character in text) >= 7:
        for match in phonenumbers.PhoneNumberMatcher(text, region, max_tries=len(text)):
            opened = match.raw_string.startswith("(") and ")" not in match.raw_string
            yield match.start + opened, match.end
