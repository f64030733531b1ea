"""Tools: how prompts tell of them, what answers count as calls, and schemas that force a call."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from bitnet_rs.server import tools
from bitnet_rs.server.tools import Delta, Parser, call_schema, prepare
from bitnet_rs.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "python" / "bitnet_rs" / "demo"

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 40}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}

USER = {"role": "user", "content": "How warm is it in Paris?"}
CALLING: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
        },
        {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
    ],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "call_1", "content": "21 °C"},
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
]

KNOWS_ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<result>{{ m.content }}</result>"
    "{% else %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{% endif %}{% endfor %}"
)
KNOWS_TOOLS = "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def with_template(demo: Tokenizer, template: str) -> Tokenizer:
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(demo.to_json()), demo.special_tokens, template)


def shown(
    tokenizer: Tokenizer, messages: list[Any], offered: list[Any], choice: Any = "auto"
) -> str:
    written, variables = prepare(messages, offered, choice, tokenizer)
    return tokenizer.apply_chat_template(written, **variables)


# Prompts.


def test_a_template_that_knows_tools_writes_them(demo: Tokenizer) -> None:
    text = shown(with_template(demo, KNOWS_ALL), [USER, CALLING, *RESULTS], TOOLS)
    assert text.startswith(json.dumps(TOOLS))
    # Arguments come as an object, not as JSON within JSON, and missing content as none.
    assert '<assistant>weather({"city": "Paris"})now({})' in text
    assert text.endswith("<result>21 °C</result><result>noon</result>")


def test_a_template_that_knows_only_tools_gets_calls_as_text(demo: Tokenizer) -> None:
    text = shown(with_template(demo, KNOWS_TOOLS), [USER, CALLING, *RESULTS], TOOLS)
    assert text.startswith(json.dumps(TOOLS))
    assert "<system>" not in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>' in text


def test_the_demo_template_knows_nothing_and_all_is_text(demo: Tokenizer) -> None:
    system = {"role": "system", "content": "Be brief."}
    written, variables = prepare([system, USER, CALLING, *RESULTS], TOOLS, "auto", demo)
    assert variables == {}
    assert [message["role"] for message in written] == ["system", "user", "assistant", "user"]
    instruction = written[0]["content"]
    assert instruction.startswith("Be brief.\n\n")
    assert all(json.dumps(tool) in instruction for tool in TOOLS)
    calls = [delta.call for delta in Parser(TOOLS).push(written[2]["content"])]
    assert [(call.name, call.arguments) for call in calls if call] == [
        ("weather", '{"city": "Paris"}'),
        ("now", "{}"),
    ]
    # Both results are in one message, each with the name of what gave it: turns must alternate.
    results = written[3]["content"].split("\n</tool_response>\n")
    assert [json.loads(r.split("\n")[1])["name"] for r in results] == ["weather", "now"]
    assert "21 °C" in demo.apply_chat_template(written)
    # What was given is as it was.
    assert CALLING["content"] is None
    assert "tool_calls" in CALLING


def test_without_tools_nothing_is_said_of_them(demo: Tokenizer) -> None:
    assert prepare([USER], [], None, demo) == ([USER], {})
    assert prepare([USER], TOOLS, "none", demo) == ([USER], {})
    knows = with_template(demo, KNOWS_ALL)
    assert prepare([USER], TOOLS, "none", knows) == ([USER], {})
    assert shown(demo, [USER], TOOLS).startswith("<|begin_of_text|>System: You may call functions")


def test_arguments_that_were_no_json_are_shown_as_they_were(demo: Tokenizer) -> None:
    function = {"name": "now", "arguments": "{oops"}
    calling = {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]}
    assert "{oops" in shown(demo, [USER, calling], TOOLS)


@pytest.mark.parametrize(
    ("offered", "choice", "match"),
    [
        ([{"type": "retrieval"}], "auto", r"tools\[0\] is not supported"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", r"function.name is 'a b'"),
        ([TOOLS[1], TOOLS[1]], "auto", r"tools\[1\].function.name is 'now' again"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": [1]}}],
            "auto",
            r"tools\[0\].function.parameters is no object",
        ),
        (TOOLS, "always", "tool_choice is 'always'; wanted 'none'"),
        (TOOLS, {"type": "function"}, "tool_choice is .*; wanted 'none'"),
        (TOOLS, {"type": "function", "function": {"name": "f"}}, "names the function 'f'; tools"),
        ([], "required", "no tools to choose from"),
    ],
)
def test_bad_tools_are_named(demo: Tokenizer, offered: Any, choice: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prepare([USER], offered, choice, demo)


def test_a_bad_call_in_the_messages_is_named(demo: Tokenizer) -> None:
    calling = {"role": "assistant", "tool_calls": [{"id": "a", "function": "now"}]}
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[0\] is not supported"):
        prepare([USER, calling], TOOLS, "auto", demo)


# Answers.


def parsed(text: str, cuts: list[int] | None = None, **options: Any) -> tuple[str, list[Any]]:
    """Content and calls of an answer that comes in pieces."""
    parser = Parser(TOOLS, **options)
    deltas: list[Delta] = []
    at = 0
    for cut in [*sorted(cuts or []), len(text)]:
        deltas += parser.push(text[at:cut])
        at = cut
    deltas += parser.finish()
    assert all((delta.content is None) != (delta.call is None) for delta in deltas)
    assert all(delta.content != "" for delta in deltas)
    calls = [(d.call.name, json.loads(d.call.arguments)) for d in deltas if d.call is not None]
    return "".join(delta.content or "" for delta in deltas), calls


W = ("weather", {"city": "Paris"})
N: tuple[str, dict[str, Any]] = ("now", {})
W_JSON = '{"name": "weather", "arguments": {"city": "Paris"}}'
N_JSON = '{"name": "now", "arguments": {}}'
TAGGED = f"<tool_call>\n{W_JSON}\n</tool_call>"

ANSWERS = [
    # Calls, in all their forms.
    (TAGGED, "", [W]),
    (f"{TAGGED}\n<tool_call>{N_JSON}</tool_call>\n", "", [W, N]),
    (f"Let me see.\n{TAGGED}", "Let me see.", [W]),
    (f"{TAGGED}\nThere it is.", "There it is.", [W]),
    (f"<tool_call>{W_JSON}", "", [W]),
    (f"<tool_call>[{W_JSON}, {N_JSON}]</tool_call>", "", [W, N]),
    (W_JSON, "", [W]),
    (f" \n{W_JSON}\n", "", [W]),
    ('{"name": "weather", "parameters": {"city": "Paris"}}', "", [W]),
    ('{"parameters": {"city": "Paris"}, "name": "weather"}', "", [W]),
    ('{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}', "", [W]),
    (f'{{"type": "function", "function": {W_JSON}}}', "", [W]),
    (f"{W_JSON}; {N_JSON}", "", [W, N]),
    (f"{W_JSON}\n{N_JSON}", "", [W, N]),
    (f"[{W_JSON}, {N_JSON}]", "", [W, N]),
    ('{"name": "now"}', "", [N]),
    ('{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}', "", [W]),
    (
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>',
        "",
        [("weather", {"city": "</tool_call>"})],
    ),
    ('{"name":"weather","arguments":{"city":"é{\\n\\"}"}}', "", [("weather", {"city": 'é{\n"}'})]),
    # Text, all of it.
    ("", "", []),
    ("It is warm.", "It is warm.", []),
    ("It is\n\n warm. \n", "It is\n\n warm. \n", []),
    ("[1] says so", "[1] says so", []),
    ("[a link](there)", "[a link](there)", []),
    ('{"city": "Paris"}', '{"city": "Paris"}', []),
    ('{"name": "Bob", "age": 4}', '{"name": "Bob", "age": 4}', []),
    ('{"name": "wea', '{"name": "wea', []),
    ("{}", "{}", []),
    ("[]", "[]", []),
    ("[{}]", "[{}]", []),
    ("{ x }", "{ x }", []),
    (f"I would call {W_JSON} here", f"I would call {W_JSON} here", []),
    ('<tool_call>{"name": "f"}</tool_call>!', '<tool_call>{"name": "f"}</tool_call>!', []),
    ("<tool_call>weather(Paris)</tool_call>", "<tool_call>weather(Paris)</tool_call>", []),
    ('<tool_call>{"name": "now", </tool_call>', '<tool_call>{"name": "now", </tool_call>', []),
    ('<tool_call>{"name": "now", "arg', '<tool_call>{"name": "now", "arg', []),
    ("<tool_call>", "<tool_call>", []),
    ("a <tool and a <tool_cal", "a <tool and a <tool_cal", []),
    ('{"name": "now", "arguments": [1]}', '{"name": "now", "arguments": [1]}', []),
    ('{"name": "now", "arguments": {"a": NaN}}', '{"name": "now", "arguments": {"a": NaN}}', []),
    (f'[{W_JSON}, {{"name": "f"}}]', f'[{W_JSON}, {{"name": "f"}}]', []),
    # Both.
    (f"{W_JSON} is it", "is it", [W]),
    (f"<tool_call>no</tool_call>{TAGGED}", "<tool_call>no</tool_call>", [W]),
    (f"A <b> <tool_call> is {TAGGED}", "A <b> <tool_call> is", [W]),
]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_answers_are_read_however_they_are_cut(text: str, content: str, calls: list[Any]) -> None:
    assert parsed(text) == (content, calls)
    assert parsed(text, list(range(1, len(text)))) == (content, calls)
    rng = random.Random(text)
    for _ in range(10):
        cuts = rng.sample(range(len(text)), rng.randint(0, len(text)))
        assert parsed(text, cuts) == (content, calls), cuts


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        W_JSON,
        '{"name": "now"',
        "}",
        "{",
        "[",
        "]",
        " ",
        "\n",
        "a",
        '"',
    ]
)


@given(st.lists(PIECES, max_size=12), st.data())
def test_any_answer_is_read_alike_in_pieces_and_none_of_it_is_lost(
    pieces: list[str], data: st.DataObject
) -> None:
    text = "".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    content, calls = parsed(text, cuts)
    assert (content, calls) == parsed(text)
    if not calls:
        # Blanks before the first word may be a beginning of calls that never come.
        assert content.strip() == text.strip(" \n")


def pushed(parser: Parser, text: str) -> str:
    return "".join(delta.content or "" for delta in parser.push(text))


def test_text_is_passed_on_at_once() -> None:
    parser = Parser(TOOLS)
    assert pushed(parser, "It") == "It"
    assert pushed(parser, " is <") == " is"
    assert pushed(parser, "b> warm <tool_") == " <b> warm"
    assert pushed(parser, "box>") == " <tool_box>"
    assert pushed(parser, '{"name"') == '{"name"'


@pytest.mark.parametrize("text", ['{"c', '{"name": "x', '{"name": "weathers', "[1", "{1", "[[1"])
def test_json_is_passed_on_once_it_can_be_no_call(text: str) -> None:
    parser = Parser(TOOLS)
    assert pushed(parser, text[:-1]) == ""
    assert pushed(parser, text[-1]) == text


def test_a_call_comes_with_its_last_brace() -> None:
    parser = Parser(TOOLS)
    assert parser.push(W_JSON[:-1]) == []
    (delta,) = parser.push("}")
    assert delta.call is not None
    assert delta.call.name == "weather"
    assert delta.call.id.startswith("call_")
    assert parser.push("\n") == parser.finish() == []


def test_calls_have_ids_of_their_own() -> None:
    calls = [delta.call for delta in Parser(TOOLS).push(f"{W_JSON};{W_JSON}")]
    assert len({call.id for call in calls if call}) == 2


# Forced calls.


def test_only_forced_calls_have_a_schema() -> None:
    assert call_schema(TOOLS, None) is None
    assert call_schema(TOOLS, "auto") is None
    assert call_schema(TOOLS, "none") is None


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        (NAMED, True, [W_JSON], [N_JSON, f"[{W_JSON}]", '{"name":"weather","arguments":{}}']),
        ("required", False, [W_JSON, N_JSON], [f"[{W_JSON}]", '{"name":"f","arguments":{}}']),
        ("required", True, [f"[{W_JSON}]", f"[{N_JSON},{W_JSON}]"], ["[]", W_JSON]),
    ],
)
def test_schemas_of_calls(choice: Any, parallel: bool, good: list[str], bad: list[str]) -> None:  # noqa: FBT001 (a parameter of the test)
    schema = call_schema(TOOLS, choice, parallel=parallel)
    assert schema is not None
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert all(validator.is_valid(json.loads(text)) for text in good)
    assert not any(validator.is_valid(json.loads(text)) for text in bad)


def test_references_in_parameters_are_those_of_their_own_schema() -> None:
    node: dict[str, Any] = {"type": "object"}
    node |= {"properties": {"next": {"$ref": "#"}, "kind": {"$ref": "#/$defs/k"}}}
    node |= {"$defs": {"k": {"enum": [{"$ref": "#"}]}}, "additionalProperties": False}
    offered = [{"type": "function", "function": {"name": "f", "parameters": node}}]
    schema = call_schema(offered, "required", parallel=False)
    assert schema is not None
    validator = Draft202012Validator(schema)
    arguments = {"next": {"next": {}, "kind": {"$ref": "#"}}}
    assert validator.is_valid({"name": "f", "arguments": arguments})
    assert not validator.is_valid({"name": "f", "arguments": {"next": {"kind": 1}}})


def test_forced_calls_are_read_one_by_one() -> None:
    parser = Parser(TOOLS, constrained=True)
    assert parser.push("[" + W_JSON[:-1]) == []
    (first,) = parser.push("},")
    assert first.call is not None
    (second,) = parser.push(N_JSON + "]")
    assert second.call is not None
    assert parser.finish() == []


def test_a_forced_call_that_was_cut_off_is_text() -> None:
    assert parsed(W_JSON[:-5], constrained=True) == (W_JSON[:-5], [])
    assert parsed(f"[{W_JSON},{N_JSON[:9]}", constrained=True) == (f",{N_JSON[:9]}", [W])


def test_the_parser_needs_no_names_to_be_checked() -> None:
    tools.check(TOOLS, NAMED)
    assert tools.chosen(NAMED) == "weather"
    assert tools.chosen("auto") is None
