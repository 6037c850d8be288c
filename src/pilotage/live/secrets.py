"""What must never stand in a ledger or a registry: values of fields named like secrets, text that looks like one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import astuple, fields

_BLOT: Final = "[withheld]"
_WORD: Final = (
    "(?:password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|authorization|"
    "cookie)"
)
_SECRET_NAME: Final = re.compile(rf"(?:^|[_\-.]){_WORD}$", re.IGNORECASE)
_SECRET_TEXT: Final = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@ in a URL
    r"|(?<=\bBearer )\S+|(?<=\bBasic )[A-Za-z0-9+/=]{8,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\beyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]+"  # JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*",
)
_SECRET_ARGUMENT: Final = re.compile(
    rf"(--[\w-]*?{_WORD}(?:=|\s+)|\b\w*?{_WORD}(?:=|:\s*))[^\s'\"&]+", re.IGNORECASE
)
# in lower case: a text without any of them holds nothing of the above, which is quickly seen; of the last two, one of
# what they begin is needed besides
_HINTS: Final[dict[bytes, tuple[bytes, ...]]] = dict.fromkeys((
    b"passw", b"pwd", b"secret", b"token", b"credential", b"authorization", b"cookie", b"://", b"bearer ", b"basic ",
    b"akia", b"asia", b"hf_", b"sk-", b"eyj",
), ()) | {
    b"key": (
        b"apikey", b"api_key", b"api-key", b"accesskey", b"access_key", b"access-key",
        b"privatekey", b"private_key", b"private-key", b"private key",
    ),
    b"gh": (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_"),
}  # fmt: skip

_PLAIN: Final = frozenset({float, int, bool, type(None)})


def without_secrets(value: Any) -> Any:
    """Plain data or text without secrets: passwords in URLs, known forms of tokens, and what follows or stands under a
    name such as `api_key` are replaced by a word that says so."""
    return _blotted(value) if suspicious(value) else value


def suspicious(value: Any) -> bool:
    """Whether anything in a value looks as if it could be a secret, or some name as if it named one."""
    text = msgspec.json.encode(value).lower()
    return any(
        hint in text and (not needed or any(one in text for one in needed)) for hint, needed in _HINTS.items()
    )


def suspect(texts: set[str], names: set[str]) -> bool:
    """Whether a secret could be among texts or under names: many are looked at together, which is quick."""
    return any(map(names_secret, names)) or suspicious(list(texts))


def texts_and_names(records: Sequence[Struct]) -> tuple[set[str], set[str]]:
    """All texts in records of one kind, each once, and the names that their groups (dicts, structs) give to fields.

    Names are by themselves, because a rate of tokens is no token.
    """
    texts: set[str] = set()
    names: set[str] = set()
    for column in zip(*map(astuple, records), strict=True):
        there = list(filter(None, column))
        if there[1:] and there.count(there[0]) == len(there):  # which is often so
            there = there[:1]
        for kind in set(map(type, there)) - _PLAIN:
            parts: Iterable[Any] = [part for part in there if type(part) is kind]
            if kind is dict:
                names.update(*parts)
                parts = chain.from_iterable(map(dict.values, parts))
            elif issubclass(kind, Struct):
                names.update(kind.__struct_fields__)
                parts = () if _of_numbers(kind) else chain.from_iterable(map(astuple, parts))
            texts.update(
                part if type(part) is str else _as_text(part) for part in parts if type(part) not in _PLAIN
            )
    return texts, names


@cache
def _of_numbers(kind: type[Struct]) -> bool:
    """Whether a struct's fields are declared as numbers: there are many of them, and none holds a text."""
    return all(field.type in _PLAIN for field in fields(kind))


def _as_text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _blotted(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _BLOT if v and names_secret(k) else _blotted(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_blotted(v) for v in value]
    if isinstance(value, str):
        return _SECRET_ARGUMENT.sub(rf"\1{_BLOT}", _SECRET_TEXT.sub(_BLOT, value))
    return value


def names_secret(name: Any) -> bool:
    """Whether what stands under a name is a secret."""
    return isinstance(name, str) and _SECRET_NAME.search(name) is not None
