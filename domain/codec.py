"""Plain JSON for the frozen types of this folder, and back.

One pair of functions serves every dataclass here, so that the database, the HTTP answers, the snapshot files and
`--json` all show the same document for the same object. A type that wants its own form implements
`to_json()` and `from_json(data)`.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

T = TypeVar("T")
Json = Any  # what json.loads returns


def to_json(value: object) -> Json:
    """Return `value` as what `json.dumps` takes: dict, list, str, int, float, bool, None."""
    own = getattr(value, "to_json", None)
    if own is not None:
        return own()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            name.rstrip("_"): to_json(_as_floats(getattr(value, name)) if holds_floats else getattr(value, name))
            for name, _, holds_floats in _field_types(type(value))
        }
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def from_json(kind: type[T], data: Json) -> T:
    """Build a `kind` from what `to_json` made of one.

    Fields that the document lacks take their default; fields that the type does not know are ignored, so that an
    older reader survives a newer writer. Raises ValueError naming the field where a value does not fit.
    """
    return typing.cast(T, _decode(kind, data, kind.__name__))


def canonical(value: object) -> bytes:
    """Return the canonical JSON of `value`: sorted keys, no white space, UTF-8. Equal values give equal bytes."""
    # default= and not to_json(value): a document that is JSON already (a snapshot to verify) is written 6 times faster
    return json.dumps(
        value, default=to_json, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(value: object) -> str:
    """Return the SHA-256 of the canonical JSON of `value` as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


@functools.cache
def _field_types(kind: type) -> tuple[tuple[str, Any, bool], ...]:
    """Return name, type, and whether it is a float or a tuple of floats, of each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    floats = (float, float | None, tuple[float, float], tuple[float, float] | None)
    return tuple((field.name, hints[field.name], hints[field.name] in floats) for field in dataclasses.fields(kind))


def _as_floats(value: Any) -> Any:
    """Write 10 in a float field as 10.0, as it will be read back: equal values give equal bytes."""
    if isinstance(value, tuple):
        return tuple(float(item) for item in value)
    return None if value is None else float(value)


def _decode(kind: Any, data: Json, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(kind), data, where)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), data, where)
    if isinstance(kind, type):
        if hasattr(kind, "from_json"):
            return _named(where, kind.from_json, data)
        if dataclasses.is_dataclass(kind):
            return _decode_dataclass(kind, data, where)
        if issubclass(kind, enum.Enum):
            return _named(where, kind, data)
        if kind is datetime and isinstance(data, str):
            return _named(where, datetime.fromisoformat, data)
        if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
            return float(data)
        if isinstance(data, kind) and not (kind is int and isinstance(data, bool)):
            return data
        raise ValueError(f"{where}: expected {kind.__name__}, got {data!r}")
    raise TypeError(f"{where}: the codec does not know the type {kind!r}")


def _named(where: str, read: Callable[[Json], Any], data: Json) -> Any:
    try:
        return read(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _decode_union(members: tuple[Any, ...], data: Json, where: str) -> Any:
    if data is None and types.NoneType in members:
        return None
    options = [member for member in members if member is not types.NoneType]
    # bool before int, int before float: the order in which JSON values are narrow
    for option in sorted(options, key=lambda kind: (bool, int, float).index(kind) if kind in (bool, int, float) else 3):
        if isinstance(option, type) and option in (bool, int, float, str) and type(data) is not option:
            continue
        return _decode(option, data, where)
    if len(options) == 1:
        return _decode(options[0], data, where)
    raise ValueError(f"{where}: {data!r} fits none of {', '.join(str(option) for option in options)}")


def _decode_tuple(members: tuple[Any, ...], data: Json, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{where}: expected a list, got {data!r}")
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(_decode(members[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if len(members) != len(data):
        raise ValueError(f"{where}: expected {len(members)} items, got {len(data)}")
    return tuple(_decode(member, item, where) for member, item in zip(members, data, strict=True))


def _decode_dataclass(kind: Any, data: Json, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object, got {data!r}")
    values = {
        name: _decode(hint, data[name.rstrip("_")], f"{where}.{name.rstrip('_')}")
        for name, hint, _ in _field_types(kind)
        if name.rstrip("_") in data
    }
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
