"""JSON bodies read into types, and errors that name the exact place.

A valid body costs one pass of msgspec. Only when that fails the body is walked a second time, beside its type, to say
what msgspec does not: which key of an object, what would be right, what was found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sized
from functools import cache, cached_property
from types import UnionType
from typing import Annotated, Any, Final, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

from .errors import UNDECODABLE, GatewayError

MAX_WALK: Final = 1024 * 1024
"""Bytes of a body that is walked a second time; of a larger one the error says only what msgspec says."""

MAX_KEYS: Final = 1000
"""Keys of one object that are tried to find the one at fault."""

MAX_SHOWN: Final = 40
"""Characters of a value that an error shows."""

Segment = str | int
_Read = TypeVar("_Read", bound="Asked")


class Asked(msgspec.Struct, kw_only=True):
    """A body that can be read. None stands for what is absent, and null for it."""

    def check(self) -> None:
        """What no type can say. Raises `GatewayError`."""


class Schema(Generic[_Read]):
    """The form of a body."""

    def __init__(self, type: type[_Read]) -> None:
        self.type = type
        self._decode = msgspec.json.Decoder(type).decode

    @cached_property
    def strict(self) -> Schema[_Read]:
        """The same form, but fields that it does not have are refused."""
        return Schema(_strict(self.type))

    def read(self, body: bytes) -> _Read:
        """Raises `GatewayError`: ``invalid_json``, or ``missing_required_parameter``, ``invalid_type``, ``invalid_value``,
        ``unknown_parameter`` with ``param`` as the path of the field."""
        try:
            if not body.isascii():
                body.decode("utf-8")  # JSON is UTF-8 everywhere (RFC 8259), also in the fields that nobody reads here
            asked = self._decode(body)
        except msgspec.ValidationError as error:
            raise _refusal(str(error), body, self.type) from None
        except UNDECODABLE as error:
            raise not_json(body, error) from None
        asked.check()
        return asked


def not_json(body: bytes, error: Exception) -> GatewayError:
    """What is told of a body that is no JSON."""
    if isinstance(error, RecursionError):
        return GatewayError("invalid_json", "The request body is nested too deeply.")
    what = str(error).removeprefix("JSON is malformed: ") if body.strip() else "it is empty"
    return GatewayError("invalid_json", f"The request body is not valid JSON: {what}.")


def missing(param: str) -> GatewayError:
    """What is told of a field that must be there."""
    return GatewayError("missing_required_parameter", f"Missing required parameter: '{param}'.", param=param)


def wrong(param: str, what: str) -> GatewayError:
    """What is told of a field whose value cannot be: ``what`` goes on from its name."""
    return GatewayError("invalid_value", f"Invalid value for '{param}': {what}.", param=param)


# --- the same types, without room for more


_made: Final[dict[Any, Any]] = {}
"""The strict type of each; what several have in common they share."""


def _strict(one: Any) -> Any:
    """The type, in which every structure refuses fields that it does not have."""
    if isinstance(one, type) and issubclass(one, msgspec.Struct):
        if one not in _made:
            hints = get_type_hints(one, include_extras=True)
            own = {name: _strict(hints[name]) for name in one.__struct_fields__}
            body = {"__annotations__": own, "__module__": one.__module__, **_defaults(one)}
            _made[one] = _Meta(one.__name__, (one,), body, forbid_unknown_fields=True, kw_only=True)
        return _made[one]
    origin, parts = get_origin(one), get_args(one)
    if origin is Annotated:
        return Annotated[(_strict(parts[0]), *parts[1:])]
    if origin in (UnionType, Union):
        return Union[tuple(_strict(part) for part in parts)]  # noqa: UP007 - of a tuple
    if origin in (list, dict):
        return origin[tuple(_strict(part) for part in parts)]
    return one


_Meta: Final[Any] = type(msgspec.Struct)


def _defaults(one: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(one) if field.default is not msgspec.NODEFAULT}


# --- what is wrong, and where


_AT: Final = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `([^`]*)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_BOUND: Final = re.compile(r"Expected `(\w+)`((?: of length)?) ([<>=]+) (\S+)")
_TYPES: Final = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_TYPE: Final = re.compile(r"\b(?:str|int|float|bool)\b")
_SEGMENT: Final = re.compile(r"\[(\d+|\.\.\.)\]|\.?([^.\[\]]+)")


def _refusal(text: str, body: bytes, type: type[Asked]) -> GatewayError:
    """What msgspec says, as an error of ours."""
    found = _AT.fullmatch(text)
    what, path = (found["what"], found["path"] or "$") if found else (text, "$")
    try:
        place = _place(path, body, type)
    except UNDECODABLE as error:  # what follows the place is no JSON either
        return not_json(body, error)
    for pattern, code, says in (
        (_MISSING, "missing_required_parameter", "Missing required parameter"),
        (_UNKNOWN, "unknown_parameter", "Unknown parameter"),
    ):
        if named := pattern.fullmatch(what):
            param = _written([*place.path, named[1][:MAX_SHOWN]])
            return GatewayError(code, f"{says}: '{param}'.", param=param)
    param = _written(place.path)
    subject = f"'{param}'" if param else "the request body"
    if bound := _BOUND.fullmatch(what):
        expected = f"{_TYPES.get(bound[1], bound[1])}{bound[2]} {bound[3]} {bound[4].removesuffix('.0')}"
        return _error("invalid_value", "value", subject, param, f"expected {expected}", place.got(length=bool(bound[2])))
    if what.startswith("Invalid "):
        return _error("invalid_value", "value", subject, param, place.expected(), place.got())
    if ", got " not in what:
        what += place.got_type()
    what = _TYPE.sub(lambda word: _TYPES[word[0]], what.replace("`", "'"))
    return _error("invalid_type", "type", subject, param, f"{what[:1].lower()}{what[1:]}")


def _error(code: str, noun: str, subject: str, param: str, what: str, found: str = "") -> GatewayError:
    return GatewayError(code, f"Invalid {noun} for {subject}: {what}.", param=param or None, found=found)


def _written(path: list[Segment]) -> str:
    return "".join(f"[{one}]" if isinstance(one, int) else f".{_printable(one)}" for one in path).removeprefix(".")


def _printable(key: str) -> str:
    """A key as it may stand in a line of text: whoever sent it may have put anything there."""
    return key if key.isprintable() else key.encode("unicode_escape").decode("ascii")


class _Place:
    """A place within a body: its path, the value there if it was looked up, the types that may stand there."""

    def __init__(self, path: list[Segment], value: Any, types: list[inspect.Type]) -> None:
        self.path = path
        self._value = value
        self._types = types

    def got(self, *, length: bool = False) -> str:
        """What was found, for who sent it: a value that is cut to `MAX_SHOWN`, or a length."""
        value = self._value
        if value is msgspec.UNSET:
            return ""
        if length:  # of a name that stands twice, the other one may be looked at
            return f", got {len(value)}" if isinstance(value, Sized) else ""
        shown = repr(value) if isinstance(value, str) else str(msgspec.json.encode(value), "utf-8")
        return f", got {shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + '...'}"

    def got_type(self) -> str:
        """The type that was found, where msgspec does not say."""
        names = {str: "str", bool: "bool", int: "int", float: "float", list: "array", dict: "object", type(None): "null"}
        return "" if self._value is msgspec.UNSET else f", got `{names[type(self._value)]}`"

    def expected(self) -> str:
        """The words that would be right."""
        literals = [type.values for type in self._types if isinstance(type, inspect.LiteralType)]
        words = sorted({str(word) for values in literals for word in values})
        return f"expected one of {', '.join(words)}" if words else "it is none of those that there are"


_described: Final = cache(inspect.type_info)
"""Of each type that a body may have: there are few, and it takes a millisecond."""


def _place(path: str, body: bytes, type: type[Asked]) -> _Place:
    """Where msgspec's path leads. ``[...]`` in it is some key of an object, and is looked for."""
    segments = [int(index) if index.isdigit() else index or name for index, name in _SEGMENT.findall(path.removeprefix("$"))]
    if len(body) > MAX_WALK:
        known = segments[: segments.index("...")] if "..." in segments else segments
        return _Place(known, msgspec.UNSET, [])
    value, types = msgspec.json.decode(body), [_described(type)]
    walked: list[Segment] = []
    for segment in segments:
        types = [part for one in types for part in _plain(one)]
        if isinstance(value, dict) and isinstance(segment, str):
            inner = [one.value_type for one in types if isinstance(one, inspect.DictType)] if segment == "..." else None
            segment = _key_at_fault(value, inner) if inner else segment  # noqa: PLW2901 - the key that it is
        types = [inner for one in types for inner in _within(one, segment)]
        try:
            value = value[segment]
        except (KeyError, IndexError, TypeError):
            return _Place(walked, msgspec.UNSET, [])
        walked.append(segment)
    return _Place(walked, value, [part for one in types for part in _plain(one)])


def _plain(type: inspect.Type) -> Iterator[inspect.Type]:
    """The types that a type stands for."""
    if isinstance(type, inspect.UnionType):
        for one in type.types:
            yield from _plain(one)
    elif isinstance(type, inspect.Metadata):
        yield from _plain(type.type)
    else:
        yield type


def _within(type: inspect.Type, segment: Segment) -> Iterator[inspect.Type]:
    if isinstance(type, inspect.ListType) and isinstance(segment, int):
        yield type.item_type
    elif isinstance(type, inspect.DictType):
        yield type.value_type
    elif isinstance(type, inspect.StructType):
        if segment == type.tag_field:
            yield inspect.LiteralType((type.tag,))
        yield from (field.type for field in type.fields if field.encode_name == segment)


def _key_at_fault(found: dict[str, Any], inner: list[inspect.Type]) -> str:
    for key in list(found)[:MAX_KEYS]:
        if not any(_fits(found[key], one) for one in inner):
            return key[:MAX_SHOWN]
    return "..."


def _fits(value: Any, type: inspect.Type) -> bool:
    """Whether a value is of a plain type: a number within its bounds, or a string."""
    for one in _plain(type):
        if isinstance(one, inspect.StrType) and isinstance(value, str):
            return True
        if isinstance(one, inspect.FloatType | inspect.IntType) and isinstance(value, int | float):
            low, high = one.ge, one.le
            within = (low is None or value >= low) and (high is None or value <= high)
            return within and not isinstance(value, bool)
    return False
