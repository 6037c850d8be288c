"""The base of every frozen specification, and the bounded number types they are made of.

A specification is configuration, validation and behaviour in one: TOML decodes straight into it, wrong
values are refused while decoding, and methods on it say how the thing behaves.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import msgspec.inspect
from msgspec import Meta

Name = Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
NonNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
PositiveCount = Annotated[int, Meta(ge=1)]


class SpecError(ValueError):
    """A specification that is well formed but makes no sense; the message says what would be valid."""

    exit_code = 2  # of the command that it ends


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen, hashable, comparable record. Unknown keys are refused while decoding."""

    def replace(self, **changes: Any) -> Any:
        """A copy with some fields changed, validated like a freshly decoded one."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__} | changes
        copy = type(self)(**fields)
        return msgspec.convert(msgspec.to_builtins(copy), type(copy))


T = TypeVar("T")


def decode(raw: Any, kind: type[T], where: str, *, strict: bool = True) -> T:
    """`raw` (from TOML or JSON) as a `kind`, or a SpecError that says where, what, and what would be valid.

    Not `strict`: text is taken as a number where a number is wanted.
    """
    try:
        return msgspec.convert(raw, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise SpecError(f"{where}: {_explain(str(error), raw, kind)}") from None


def named(text: str, kinds: Mapping[str, type[T]], what: str, otherwise: str) -> T:
    """The specification that a command-line argument names: `name` or `name:field=value,…`.

    `what` it is, and what may stand there `otherwise`, are for the message of the SpecError if it is none.
    """
    name, _, rest = text.partition(":")
    if name not in kinds:
        raise SpecError(f"{what} {name!r} does not exist; {closest(name, kinds)}; or {otherwise}")
    fields: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise SpecError(f"{what} {text!r}: {part!r} is not of the form field=value")
        fields[key.strip()] = value.strip()
    return decode(fields, kinds[name], f"{what} {text!r}", strict=False)


def read_json(path: Path, give: str) -> Any:
    """The contents of a JSON file, or a SpecError that names it; `give` says what to give instead."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; give {give}") from None
    except ValueError as error:
        raise SpecError(f"{path}: not valid JSON: {error}") from None


def read_toml(path: Path, what: str) -> Any:
    """The contents of a TOML file, or a SpecError that names it; `what` says what should have been given."""
    try:
        return msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; give the path of {what}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid TOML: {error}") from None


def closest(wrong: str, known: Iterable[str]) -> str:
    """A did-you-mean, or the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(known)}"


def _explain(message: str, raw: Any, kind: Any) -> str:
    """Adds candidates to msgspec's messages about unknown fields, tags and choices."""
    match = re.search(
        r"(?:unknown field `(?P<field>[^`]*)`|Invalid (?:enum )?value '(?P<value>[^']*)')", message
    )
    if not match:
        return message
    place = re.search(r"at `\$([^`]*)`", message)
    steps = re.findall(r"\.([\w-]+)|\[(\d+|\.\.\.)\]", place[1] if place else "")
    known = _known_at(msgspec.inspect.type_info(kind), raw, [name or index for name, index in steps])
    wrong = match["field"] if match["field"] is not None else match["value"]
    return f"{message}; {closest(wrong, known)}" if known else message


def _known_at(info: Any, raw: Any, steps: list[str]) -> list[str]:
    """The field names, tags or literals that are valid at the end of a path."""
    if isinstance(info, msgspec.inspect.Metadata):
        return _known_at(info.type, raw, steps)
    if isinstance(info, msgspec.inspect.UnionType):
        structs = [t for t in info.types if isinstance(t, msgspec.inspect.StructType)]
        tag = raw.get(structs[0].tag_field) if structs and isinstance(raw, dict) else None
        if structs and steps == [structs[0].tag_field]:
            return [str(t.tag) for t in structs]
        others = [t for t in info.types if not isinstance(t, msgspec.inspect.NoneType)]
        chosen = next((t for t in structs if t.tag == tag), others[0])
        return _known_at(chosen, raw, steps)
    if isinstance(info, msgspec.inspect.LiteralType):
        return [str(v) for v in info.values]
    if isinstance(info, msgspec.inspect.StructType):
        if not steps:
            names = [field.encode_name for field in info.fields]
            return [*names, info.tag_field] if info.tag_field else names
        for field in info.fields:
            if field.encode_name == steps[0]:
                return _known_at(field.type, raw.get(steps[0]) if isinstance(raw, dict) else None, steps[1:])
        return []
    if isinstance(info, msgspec.inspect.DictType) and steps:
        inner = raw.get(steps[0]) if isinstance(raw, dict) else None
        if steps[0] == "...":  # msgspec does not say which key: any value of the right kind will do
            inner = next(iter(raw.values()), None) if isinstance(raw, dict) else None
        return _known_at(info.value_type, inner, steps[1:])
    if isinstance(info, (msgspec.inspect.VarTupleType, msgspec.inspect.ListType)) and steps:
        item = raw[int(steps[0])] if isinstance(raw, list) and steps[0].isdigit() else None
        return _known_at(info.item_type, item, steps[1:])
    return []
