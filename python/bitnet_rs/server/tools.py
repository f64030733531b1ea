"""Tools that a model may call: written into the prompt, and read from what it answers.

For the chat route. Apart because the forms that calls take in text are a matter of their own: what
templates expect, what models write, and JSON schemas that leave no other choice.

Tools, calls and messages are dicts in OpenAI's form. Where the checkpoint's chat template knows
tools, it writes them. Where it does not, they are written in the form of Hermes, which many models
have seen:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

Answers are read in that form and in that of Llama 3 (`{"name": ..., "parameters": ...}` with
nothing before it), whatever the template: small models mix them up.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitnet_rs.tokenizer import Tokenizer

# Calls in one answer where they are forced: a model that goes on and on must come to an end.
_MOST_CALLS = 16

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"

# What a call that stands alone begins with: other objects are told from it by their first key.
_FIRST_KEYS = ("name", "arguments", "parameters", "type", "function", "id")

# Characters after which a text that still is no JSON is passed on as what it is.
_LONGEST_CALL = 1 << 16

_INSTRUCTION = """\
You may call functions to help with what the user asks. These are their signatures, one a line:
<tools>
{tools}
</tools>
To call one, answer with a JSON object with its name and arguments, in these tags:
<tool_call>
{{"name": <name>, "arguments": <arguments as an object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the model wants made.

    Attributes:
        name: Of the tool.
        arguments: JSON, an object.
        id: Names this call, for the answer to it.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True, slots=True)
class Delta:
    """What a parser found next: a piece of the text, or a call."""

    content: str | None = None
    call: Call | None = None


def check(tools: Sequence[Mapping[str, Any]], tool_choice: object = "auto") -> None:
    """Checks tools and the choice among them.

    Raises:
        ValueError: One is wrong; the message names the field.
    """
    names = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise ValueError(
                f"tools[{i}] is not supported; wanted "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
        name = function.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise ValueError(
                f"tools[{i}].function.name is {name!r}; wanted 1 to 64 of a-z, A-Z, 0-9, _, . and -"
            )
        if name in names:
            raise ValueError(f"tools[{i}].function.name is {name!r} again; wanted different names")
        parameters = function.get("parameters", {})
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ValueError(f"tools[{i}].function.parameters is no object; wanted a JSON schema")
        names.append(name)
    _check_choice(tool_choice, names)


def _check_choice(choice: object, names: Sequence[str]) -> None:
    named = chosen(choice)
    if named is None and choice not in (None, "none", "auto", "required"):
        raise ValueError(
            f"tool_choice is {choice!r}; wanted 'none', 'auto', 'required', or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if named is not None and named not in names:
        raise ValueError(f"tool_choice names the function {named!r}; tools has {list(names)}")
    if choice == "required" and not names:
        raise ValueError("tool_choice is 'required', but there are no tools to choose from")


def _dict(value: object) -> Mapping[str, Any]:
    """A JSON object as it is, anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def chosen(tool_choice: object) -> str | None:
    """The function that a tool choice names; None where it names none."""
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function":
        name = _dict(tool_choice.get("function")).get("name")
        return name if isinstance(name, str) else None
    return None


def prepare(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tool_choice: object,
    tokenizer: Tokenizer,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and template variables with which the model learns of tools, calls and results.

    Args:
        messages: The conversation; calls in it (`tool_calls`) and results (role `tool`) included.
        tools: What may be called.
        tool_choice: With `none`, nothing is said of the tools.
        tokenizer: For its chat template.

    Raises:
        ValueError: A tool, the choice, or a call in the messages is not in OpenAI's form.
    """
    check(tools, tool_choice)
    source = tokenizer.chat_template or ""
    written = [dict(message) for message in messages]
    # The template must write both, or a call would stand there without its result.
    if "tool_calls" in source and re.search(r"""["']tool["']""", source):
        written = [_for_template(i, message) for i, message in enumerate(written)]
    else:
        written = _as_text(written)
    if not tools or tool_choice == "none":
        return written, {}
    if re.search(r"\btools\b", source):
        return written, {"tools": [dict(tool) for tool in tools]}
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    instruction = _INSTRUCTION.format(tools=listed)
    if written and written[0].get("role") == "system":
        instruction = f"{written[0].get('content') or ''}\n\n{instruction}".lstrip("\n")
        written = written[1:]
    return [{"role": "system", "content": instruction}, *written], {}


def _calls_of(i: int, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls in a message, with arguments as objects."""
    calls = message.get("tool_calls") or []
    found = []
    for j, call in enumerate(calls if isinstance(calls, list) else [calls]):
        where = f"messages[{i}].tool_calls[{j}]"
        function = _dict(_dict(call).get("function"))
        name = function.get("name")
        if not name or not isinstance(name, str):
            raise ValueError(
                f'{where} is not supported; wanted {{"id": ..., "type": "function", "function": '
                '{"name": ..., "arguments": ...}}'
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                # A model's own mistake: it should see it as it was.
                arguments = {"arguments": arguments}
        found.append({"name": name, "arguments": arguments, "id": call.get("id")})
    return found


def _for_template(i: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates that know calls take it: arguments are objects, content is text."""
    if message.get("content") is None:
        message["content"] = ""
    if message.get("tool_calls"):
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in _calls_of(i, message)
        ]
    return message


def _as_text(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows neither calls nor results."""
    names: dict[object, str] = {}
    written: list[dict[str, Any]] = []
    results = False  # the last message holds results, and more join it
    for i, message in enumerate(messages):
        if message.get("role") == "tool":
            result = {
                "name": names.get(message.get("tool_call_id"), message.get("name", "")),
                "content": message.get("content") or "",
            }
            text = f"<tool_response>\n{json.dumps(result, ensure_ascii=False)}\n</tool_response>"
            if results:
                written[-1]["content"] += f"\n{text}"
            else:
                written.append({"role": "user", "content": text})
            results = True
            continue
        results = False
        calls = _calls_of(i, message)
        names.update({call["id"]: call["name"] for call in calls})
        text = message.get("content") or ""
        for call in calls:
            body = {"name": call["name"], "arguments": call["arguments"]}
            block = f"{_OPENING}\n{json.dumps(body, ensure_ascii=False)}\n{_CLOSING}"
            text = f"{text}\n{block}" if text else block
        written.append({**message, "content": text})
        written[-1].pop("tool_calls", None)
    return written


# Constrained calls.


def call_schema(
    tools: Sequence[Mapping[str, Any]], tool_choice: object, *, parallel: bool = True
) -> dict[str, Any] | None:
    """A JSON schema of the calls that an answer must consist of; None where it need not be calls.

    Args:
        tools: What may be called.
        tool_choice: `required` wants a call of any, a named function one of that.
        parallel: With `required`, there may be several: a list.
    """
    named = chosen(tool_choice)
    if named is None and tool_choice != "required":
        return None
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        function = tool["function"]
        if named is not None and function["name"] != named:
            continue
        place = f"arguments_{len(definitions)}"
        parameters = {"type": "object", **(function.get("parameters") or {})}
        if parameters.keys() == {"type"}:
            parameters["additionalProperties"] = False
        definitions[place] = _moved(parameters, f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"$ref": f"#/$defs/{place}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    one: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if named is None and parallel:
        one = {"type": "array", "items": one, "minItems": 1, "maxItems": _MOST_CALLS}
    return {**one, "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own parts hold when it stands at `place` in another one."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in ("const", "enum", "default", "examples"):
            moved[key] = value
        else:
            moved[key] = _moved(value, place)
    return moved


# Reading answers.


class Parser:
    """Tells calls from text in an answer, while it comes.

    Text is passed on as soon as it cannot be the beginning of a call.

    Args:
        tools: What may be called. A call of anything else is text.
        constrained: The answer follows `call_schema`.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, constrained: bool = False) -> None:
        self._names = frozenset(tool["function"]["name"] for tool in tools)
        self._constrained = constrained
        self._held = ""
        # Nothing but calls so far: the next thing may be one that stands alone.
        self._alone = True
        self._called = False
        self._ended = False

    def push(self, text: str) -> list[Delta]:
        """Takes a piece of the answer; returns what is certain by now."""
        self._held += text
        return self._take()

    def finish(self) -> list[Delta]:
        """The rest, once the answer has ended."""
        self._ended = True
        deltas = self._take()
        # Between calls, and where nothing but them was wanted, blanks and commas are no text.
        if self._held.strip(" \t\r\n;,]" if self._constrained or self._called else ""):
            deltas.append(Delta(self._held))
        self._held = ""
        return deltas

    def _take(self) -> list[Delta]:
        deltas: list[Delta] = []
        while self._held:
            found = self._take_forced() if self._constrained else self._step()
            if found is None:
                break
            deltas += found
        return deltas

    def _take_forced(self) -> list[Delta] | None:
        """A call as `call_schema` has them, as soon as it is whole."""
        rest = self._held.lstrip("[, \n")
        found = _decode(rest)
        if found is None:
            return None
        value, end = found
        self._held = rest[end:]
        return self._calls(value) or [Delta(rest[:end])]

    def _step(self) -> list[Delta] | None:
        """Takes the next text or call off what is held; None while there is nothing certain."""
        if self._alone:
            start = self._held.lstrip(" \t\r\n;,")
            if not start:
                return None
            if start[0] in "[{":
                return self._take_bare(start)
            if start.startswith(_OPENING):
                return self._take_tagged(start)
            if _OPENING.startswith(start) and not self._ended:
                return None
            return self._go_on_with_text()
        at = self._held.find(_OPENING)
        if at < 0:
            length = len(self._held) - (0 if self._ended else _undecided(self._held))
            return self._pass(length) or None
        text = self._held[:at].rstrip()
        found = self._take_tagged(self._held[at:])
        if found is None or not text or found[0].call is None:
            return found
        return [Delta(text), *found]

    def _go_on_with_text(self) -> list[Delta]:
        """What is held is no call that stands alone."""
        self._alone = False
        if self._called:
            self._held = self._held.lstrip()
        return []

    def _pass(self, length: int) -> list[Delta]:
        """So many characters are text."""
        text, self._held = self._held[:length], self._held[length:]
        if text:
            self._alone = False
        return [Delta(text)] if text else []

    def _take_bare(self, start: str) -> list[Delta] | None:
        """What begins with a brace, and may be a call or a list of them."""
        found = _decode(start)
        if found is None:
            is_text = self._ended or not self._may_be_call(start)
            return self._go_on_with_text() if is_text else None
        value, end = found
        calls = self._calls(value)
        if not calls:
            return self._go_on_with_text()
        self._held = start[end:]
        return calls

    def _may_be_call(self, start: str) -> bool:
        """Whether an unfinished JSON text can become a call of a tool, or a list of them."""
        if len(start) > _LONGEST_CALL:
            return False
        inner = start.lstrip("[ \t\r\n")
        if start[0] == "[" and inner == "":
            return True
        if not inner.startswith("{"):
            return False
        key = inner[1:].lstrip(" \t\r\n")
        if key and not any(f'"{k}"'.startswith(key[: len(k) + 2]) for k in _FIRST_KEYS):
            return False
        name = re.match(r'"name"\s*:\s*"([^"]*)("?)', key)
        if name is None:
            return True
        if name[2]:
            return name[1] in self._names
        return any(known.startswith(name[1]) for known in self._names)

    def _take_tagged(self, block: str) -> list[Delta] | None:
        """What begins with the opening tag, and ends what is held."""
        body = block[len(_OPENING) :].lstrip()
        if not body and not self._ended:
            return None
        found = _decode(body)
        calls = self._calls(found[0]) if found is not None else []
        if found is not None and calls:
            rest = body[found[1] :]
            behind = rest.lstrip()
            if behind.startswith(_CLOSING):
                rest = behind[len(_CLOSING) :]
            elif _CLOSING.startswith(behind) and not self._ended:
                return None
            self._held = rest
            self._alone = True
            return calls
        length = len(_OPENING)
        if body[:1] in ("[", "{"):
            end = _end_of_block(block)
            if end >= 0:
                length = end + len(_CLOSING)
            elif found is None and not self._ended and len(body) <= _LONGEST_CALL:
                return None
        return self._pass(len(self._held) - len(block) + length)

    def _calls(self, value: object) -> list[Delta]:
        """The calls that a JSON value stands for; none if any part of it is something else."""
        values = value if isinstance(value, list) else [value]
        calls = [_call(each, self._names) for each in values]
        if None in calls or not calls:
            return []
        self._called = True
        return [Delta(call=call) for call in calls]


def _end_of_block(block: str) -> int:
    """Where the closing tag stands that is in no JSON string, which may be unfinished; else -1."""
    for found in re.finditer(rf'"(?:[^"\\]|\\.)*(?:"|\\?$)|{_CLOSING}', block, re.DOTALL):
        if found[0] == _CLOSING:
            return found.start()
    return -1


def _undecided(text: str) -> int:
    """Length of the end of a text that may belong to a call: blanks, and a beginning of a tag."""
    tag = 0
    for n in range(min(len(_OPENING) - 1, len(text)), 0, -1):
        if _OPENING.startswith(text[-n:]):
            tag = n
            break
    head = text[: len(text) - tag]
    return tag + len(head) - len(head.rstrip())


def _not_json(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_not_json)


def _decode(text: str) -> tuple[object, int] | None:
    """The JSON object or list that a text begins with, and where it ends; None if not (yet)."""
    if text[:1] not in ("{", "["):
        return None
    # Most of the pieces of a long call end nowhere.
    if "}" not in text:
        return None
    try:
        return _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None


def _call(value: object, names: frozenset[str]) -> Call | None:
    """A call in one of the forms that models write it in."""
    call = _dict(_dict(value).get("function", value))
    name = call.get("name")
    if not isinstance(name, str) or name not in names:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        found = _decode(arguments)
        arguments = found[0] if found is not None and found[1] == len(arguments) else arguments
    if not isinstance(arguments, Mapping):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))
