"""What must never stand in a ledger or a registry: values of fields named like secrets, text that looks like one."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

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
