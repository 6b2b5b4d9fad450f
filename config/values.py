"""From YAML text to checked values: what the schema's types mean, and the messages for wrong values.

This file knows no section and no key of this project; schema.py has those.
"""

import math
import re
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from config.errors import UserError
from config.wording import one_line, show

LARGEST = 2**53  # floats hold every whole number up to here exactly


class Bounds(NamedTuple):
    """An inclusive range for a number; `above` excludes the lower end."""

    low: float
    high: float = LARGEST
    above: bool = False

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return low if self.high == LARGEST else f"{low}, at most {self.high:,.7g}"


class _Loader(yaml.SafeLoader):
    """PyYAML's YAML 1.1, except that `5e-4` is a number (YAML 1.2), a date is text, and duplicate keys are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"the key {key_node.value!r} occurs twice",
                                           problem_mark=key_node.start_mark)
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?"
               r"|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."))


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text into plain values. Raises UserError that names `source` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{where}: not valid YAML: {one_line(error.problem or error.context)}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{source}: not valid YAML: {one_line(error)}") from None


def build_section(cls: type, name: str, values: Any, source: str, origins: dict[str, str]) -> Any:
    """Build the section's dataclass from plain values, each checked against the type of its field. Raises UserError.

    origins: for a key path, where its value came from, if not from `source`.
    """
    hints = get_type_hints(cls, include_extras=True)
    if values is None:  # a section with every line commented out
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: {name}: expected keys ({', '.join(hints)}), found {show(values)}")
    checked = {}
    for key, value in values.items():
        where = origins.get(f"{name}.{key}", source)
        try:
            checked[key] = _check_value(value, hints[key])
        except ValueError as error:
            raise UserError(f"{where}: {name}.{key}: found {show(value)}, expected {error}") from None
    return cls(**checked)


def _check_value(value: Any, kind: Any) -> Any:
    """Return the value as `kind`, or raise a ValueError whose text says what is allowed."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        allowed = []
        for option in get_args(kind):
            try:
                return _check_value(value, option)
            except ValueError as error:
                allowed.append(str(error))
        raise ValueError(" or ".join(sorted(allowed, key=len)))  # null or a whole number, at least 1
    if origin is Annotated:
        base, bounds = get_args(kind)
        noun = "a whole number" if base is int else "a number"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{noun}, {bounds}")
        if not _fits(value, base, bounds):
            raise ValueError(f"{noun}, at most {bounds.high:,.7g}" if value > bounds.high else f"{noun}, {bounds}")
        return base(value)
    if origin is Literal:
        if value in get_args(kind) and isinstance(value, str):
            return value
        raise ValueError(", ".join(map(str, get_args(kind))))
    if origin is tuple:
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) and v.strip() for v in value):
            return tuple(value)
        raise ValueError("a list of texts")
    if kind is type(None):
        if value is None:
            return None
        raise ValueError("null")
    if isinstance(value, kind) and value != "":
        return value
    raise ValueError({bool: "true or false", str: "a text"}[kind])


def _fits(value: float, base: type, bounds: Bounds) -> bool:
    if isinstance(value, float) and (not math.isfinite(value) or (base is int and not value.is_integer())):
        return False
    return bounds.low <= value <= bounds.high and not (bounds.above and value == bounds.low)
