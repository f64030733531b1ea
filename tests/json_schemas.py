"""JSON schemas by chance, as hypothesis draws them: all satisfiable, all of supported keywords.

For test_grammar.py and the tests of the server. Apart because both draw from the same.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_NAMES = st.sampled_from(
    ["name", "age", "id", "next", "x", "y", "tags", "a/b", "ключ", 'q"t', "née", "value", "kind"]
)
_PATTERNS = st.sampled_from(
    [
        "^[a-z]{3}-[0-9]{4}$",
        "^(ab)*c$",
        "^[0-9]+x$",
        "[A-Z]{2}",
        "^(yes|no|perhaps not)$",
        "^#[0-9a-fA-F]{6}$",
        "^a.*z$",
        r"^\+?\d{1,3}( \d{3}){2}$",
    ]
)
_FORMATS = st.sampled_from(
    ["date", "time", "date-time", "uuid", "email", "ipv4", "ipv6", "hostname", "duration", "uri"]
)


@st.composite
def _strings(draw: st.DrawFn) -> Schema:
    schema: Schema = {"type": "string"}
    match draw(st.integers(0, 4)):
        case 0:
            schema["minLength"] = draw(st.integers(0, 30))
            if draw(st.booleans()):
                schema["maxLength"] = schema["minLength"] + draw(st.integers(0, 20))
        case 1:
            schema["pattern"] = draw(_PATTERNS)
        case 2:
            schema["format"] = draw(_FORMATS)
        case 3:
            words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)
            schema["enum"] = draw(st.lists(words, min_size=1, max_size=5, unique=True))
    return schema


@st.composite
def _numbers(draw: st.DrawFn) -> Schema:
    schema: Schema = {"type": draw(st.sampled_from(["integer", "number"]))}
    if schema["type"] == "number" and draw(st.booleans()):
        low, high = draw(
            st.sampled_from([(-1.5, -1.4), (0, 1), (0.999, 1.1), (41, 44.5), (1e6, 2e6)])
        )
        return schema | {"exclusiveMinimum": low, "exclusiveMaximum": high}
    if draw(st.booleans()):
        schema["minimum"] = draw(st.integers(-(10**6), 10**6))
    if draw(st.booleans()):
        schema["maximum"] = schema.get("minimum", 0) + draw(st.integers(8, 10**5))
    elif schema["type"] == "integer" and draw(st.booleans()):
        schema["multipleOf"] = draw(st.sampled_from([2, 5, 7, 100]))
    return schema


def _scalars() -> st.SearchStrategy[Schema]:
    fixed: list[Schema] = [
        {"type": "boolean"},
        {"type": "null"},
        {"const": {"a": [1, None, "b"]}},
        {"enum": [1, "one", None, False, [2, "two"]]},
        {"type": ["string", "null"]},
    ]
    return st.one_of(_strings(), _numbers(), st.sampled_from(fixed))


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(_NAMES, inner, max_size=5))
    schema: Schema = {"type": "object", "properties": properties}
    required = [name for name in properties if draw(st.booleans())]
    if required:
        schema["required"] = required
    more = draw(st.sampled_from(["closed", "closed", "any", "typed"]))
    if more == "closed":
        schema["additionalProperties"] = False
    elif more == "typed":
        schema["additionalProperties"] = {"type": "integer"}
        if draw(st.booleans()):
            schema["patternProperties"] = {"^x-": {"type": "string"}}
    return schema


@st.composite
def _both(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    """Two schemas of objects at once."""
    first, second = draw(inner), draw(inner)
    return {
        "type": "object",
        "allOf": [
            {"properties": {"first": first}, "required": ["first"]},
            {"properties": {"second": second}, "required": draw(st.sampled_from([[], ["second"]]))},
        ],
    }


@st.composite
def _arrays(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    schema: Schema = {"type": "array", "items": draw(inner)}
    if draw(st.booleans()):
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
    schema["minItems"] = draw(st.integers(0, 3))
    if draw(st.booleans()):
        schema["maxItems"] = schema["minItems"] + draw(st.integers(0, 3))
    return schema


# A tree and a list: what may come again is always optional, so that there is an end.
_DEFINITIONS: Schema = {
    "tree": {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
        },
        "required": ["value", "children"],
        "additionalProperties": False,
    },
    "list": {
        "type": "object",
        "properties": {
            "head": {"type": "string", "minLength": 2},
            "tail": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]},
        },
        "required": ["head", "tail"],
        "additionalProperties": False,
    },
}


def schemas() -> st.SearchStrategy[Schema]:
    """Schemas of objects, arrays or scalars, nested some levels deep."""
    leaves = st.one_of(
        _scalars(), _scalars(), st.sampled_from([{"$ref": f"#/$defs/{n}"} for n in _DEFINITIONS])
    )

    def deeper(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
        several = st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each})
        return st.one_of(_objects(inner), _objects(inner), _arrays(inner), several, _both(inner))

    def complete(schema: Schema) -> Schema:
        return {**schema, "$defs": _DEFINITIONS}

    return st.recursive(leaves, deeper, max_leaves=12).map(complete)
