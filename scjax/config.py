"""Frozen dataclasses to JSON and back, and dotted overrides; an unknown key is an error with a suggestion.

A dataclass is written as a JSON object of its fields. Where a field may be one of several dataclasses, the object
carries the class's name under "kind". Tuples become lists and come back as tuples. Numbers are finite.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from scjax.check import suggestion

__all__ = ["from_dict", "from_json", "from_text", "override", "to_dict", "to_json"]

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, numbers, strings; what `json` can write."""
    return {f.name: _plain(getattr(config, f.name), _type_of(config, f.name)) for f in dataclasses.fields(config)}


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(cls: type[T], path: str | Path) -> T:
    """A config from a JSON file.

    Raises:
        ValueError: no valid JSON, an unknown or missing key, a value of the wrong type; the file is named.
    """
    try:
        return from_dict(cls, json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unrepeated))
    except json.JSONDecodeError as err:
        raise ValueError(f"{path} is no valid JSON: {err}.") from err
    except ValueError as err:  # also UnicodeDecodeError
        raise ValueError(f"{path}: {err}") from err
    except RecursionError as err:
        raise ValueError(f"{path}: its lists and objects are nested too deeply.") from err


def from_dict(cls: type[T], values: Any, at: str = "") -> T:
    """The dataclass `cls` with these values, a mapping as JSON gives it; `at` is the dotted place for messages.

    Raises:
        ValueError: an unknown or missing key, or a value that its field cannot hold.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{at or cls.__name__} must be an object of fields; got {values!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in values:
        if key not in fields:
            raise ValueError(
                f"{_join(at, key)} is not a field of {cls.__name__}.{suggestion(key, fields)} "
                f"It has: {', '.join(fields) or 'none'}."
            )
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{at or cls.__name__} lacks {', '.join(missing)}, which has no default.")
    return cls(**{key: _typed(value, hints[key], _join(at, key)) for key, value in values.items()})


def override(config: T, assignments: Mapping[str, Any]) -> T:
    """`config` with dotted fields replaced: `{"model.n_heads": 4, "optimizer.learning_rate": "3e-4"}`.

    A string is read as JSON where it is valid JSON, so that values may come from a command line. The order of the
    assignments does not matter: another "kind" is chosen first, and takes none of the former class's fields over.

    Raises:
        ValueError: no such field, or a value that it cannot hold.
    """
    tree = to_dict(config)
    for dotted in sorted(assignments, key=lambda name: name.rpartition(".")[2] != "kind"):
        value = assignments[dotted]
        *parents, last = dotted.split(".")
        node = tree
        for depth, name in enumerate(parents):
            inner = node.get(name)
            if not isinstance(inner, dict):
                place = ".".join(parents[: depth + 1])
                objects = [k for k, v in node.items() if isinstance(v, dict)]
                raise ValueError(f"{dotted}: {place} is no object with fields.{suggestion(name, objects)}")
            node = inner
        value = from_text(value, dotted) if isinstance(value, str) else value
        if last == "kind" and node.get("kind", value) != value:
            node.clear()
        node[last] = value
    try:
        return from_dict(type(config), tree)
    except RecursionError as err:
        raise ValueError(f"{', '.join(assignments)}: the values are nested too deeply.") from err


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs more than once in one object.")
    return found


def from_text(text: str, at: str) -> Any:
    """What a user wrote as the value of `at`: JSON, or else the text as it stands.

    Raises:
        ValueError: lists and objects that are nested too deeply.
    """
    try:
        return json.loads(text)
    except ValueError:
        return text
    except RecursionError as err:
        raise ValueError(f"{at}: its lists and objects are nested too deeply.") from err


def _as_float(value: int, at: str) -> float:
    try:
        return float(value)
    except OverflowError as err:
        raise ValueError(f"{at} must be a number that a float can hold; got {value}.") from err


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _type_of(config: Any, name: str) -> Any:
    return typing.get_type_hints(type(config))[name]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_class(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _is_tagged(hint: Any) -> bool:
    return sum(_is_class(a) for a in _alternatives(hint)) > 1


def _plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value):
        tag = {"kind": type(value).__name__} if _is_tagged(hint) else {}
        return tag | to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v, None) for v in value]
    return value


def _typed(value: Any, hint: Any, at: str) -> Any:
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        return _typed_union(value, alternatives, at)
    origin = typing.get_origin(hint)
    if _is_class(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, at)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            options = typing.get_args(hint)
            raise ValueError(
                f"{at} must be one of {', '.join(map(repr, options))}; got {value!r}.{suggestion(value, options)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{at} must be a list; got {value!r}.")
        inner = typing.get_args(hint)
        kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            raise ValueError(f"{at} must hold {len(kinds)} values; got {value!r}.")
        return tuple(_typed(v, k, f"{at}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value, at)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} must be a finite number; got {value!r}.")
    if hint in (int, float, str, bool):
        if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
            raise ValueError(f"{at} must be {hint.__name__}; got {value!r}.")
        if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{at} must be a number of at most 64 bits; got {value}.")
        return value
    return value


def _typed_union(value: Any, alternatives: tuple[Any, ...], at: str) -> Any:
    if value is None and type(None) in alternatives:
        return None
    classes = {a.__name__: a for a in alternatives if _is_class(a)}
    if len(classes) > 1 and not isinstance(value, tuple(classes.values())):
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(kind, str) or kind not in classes:
            got = f"kind {kind!r}" if isinstance(value, Mapping) else repr(value)
            raise ValueError(
                f"{at} must be an object whose kind is one of {', '.join(map(repr, classes))}; got {got}."
                f"{suggestion(kind or value, classes)}"
            )
        return from_dict(classes[kind], {k: v for k, v in value.items() if k != "kind"}, at)  # pyright: ignore[reportOptionalMemberAccess]
    errors = []
    for alternative in alternatives:
        if alternative is type(None):
            continue
        try:
            return _typed(value, alternative, at)
        except ValueError as err:
            errors.append(str(err))
    raise ValueError(" Or: ".join(errors))
