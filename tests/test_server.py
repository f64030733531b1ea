"""The server as its clients see it: the openai package, curl, and sockets that mean no good.

All talk to real servers with the bundled model. What a process alone can show (signals, exit codes)
is in `test_serve.py`.
"""

import asyncio
import base64
import importlib
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest

import bitnet_rs
import soak_server
from bitnet_rs import Model
from bitnet_rs.server import settings as server_settings
from bitnet_rs.server.settings import ServerSettings
from checkpoints import write
from serving import Served, occupied, serving, wait_until

PROMPT = "Once upon a time there was"
HELLO = [{"role": "user", "content": "Hello! How are you?"}]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with bitnet_rs.load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Served]:
    with serving(model) as served:
        yield served


@pytest.fixture(scope="module")
def narrow() -> Iterator[Served]:
    """One place, one that may wait, and a key."""
    with (
        bitnet_rs.load(max_sequences=1) as loaded,
        serving(
            loaded,
            max_queue=1,
            api_key="secret",
            cors_origins=("https://example.com",),
            aliases=("gpt-4o-mini",),
            max_tokens=100,
            max_body=100_000,
            keep_alive=0.05,
        ) as served,
    ):
        served.client.headers["Authorization"] = "Bearer secret"
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in an answer, whose form is checked."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return dict(body["error"])


def events(text: str) -> list[Any]:
    """The events of a stream that ended as it should."""
    found = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    assert all(part.startswith("data: ") for part in found)
    assert found[-1] == "data: [DONE]"
    return [json.loads(part[6:]) for part in found[:-1]]


# --- Text: what the model alone would write. ---


def test_completion_is_what_the_model_writes(server: Served, client: openai.OpenAI) -> None:
    expected = server.model.complete(PROMPT, max_tokens=40, temperature=0)
    found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, temperature=0)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    assert (found.model, found.object) == ("demo", "text_completion")


def test_sampling_options_reach_the_model(server: Served) -> None:
    options: dict[str, Any] = {
        "max_tokens": 30,
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "seed": 7,
    }
    expected = server.model.complete(PROMPT, **options)
    found = server.post("/v1/completions", prompt=PROMPT, **options).json()
    assert found["choices"][0]["text"] == expected.text
    longer = {**options, "ignore_eos": True, "max_tokens": 100}
    found = server.post("/v1/completions", prompt="The end.", **longer).json()
    assert found["usage"]["completion_tokens"] == 100


def test_several_prompts_and_choices(server: Served, client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Emma looked", "Call me Ishmael."]
    model = server.model
    found = client.completions.create(
        model="demo", prompt=prompts, n=2, max_tokens=12, temperature=0.8, seed=3
    )
    expected = [
        completion.text
        for prompt in prompts
        for completion in many(model.complete(prompt, n=2, max_tokens=12, temperature=0.8, seed=3))
    ]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == list(range(6))
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(model.encode(prompt)) for prompt in prompts)


def many(found: Any) -> list[bitnet_rs.Completion]:
    assert isinstance(found, list)
    return found


def test_prompts_of_ids(server: Served) -> None:
    model = server.model
    ids = [model.encode(PROMPT), model.encode("Emma")]
    for prompt in (ids[0], ids):
        found = server.post("/v1/completions", prompt=prompt, max_tokens=8, temperature=0).json()
        wanted = [ids[0]] if prompt is ids[0] else ids
        assert [choice["text"] for choice in found["choices"]] == [
            model.complete(each, max_tokens=8, temperature=0).text for each in wanted
        ]


def test_stop_strings(server: Served) -> None:
    whole = server.model.complete(PROMPT, max_tokens=40, temperature=0).text
    stop = whole[20:24]
    for stream in (False, True):
        response = server.post(
            "/v1/completions",
            prompt=PROMPT,
            max_tokens=40,
            temperature=0,
            stop=["@@@", stop],
            stream=stream,
        )
        if stream:
            choices = [event["choices"][0] for event in events(response.text)]
        else:
            choices = response.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"


def test_streamed_completion(server: Served, client: openai.OpenAI) -> None:
    expected = server.model.complete(PROMPT, max_tokens=60, temperature=0)
    chunks = list(
        client.completions.create(
            model="demo",
            prompt=PROMPT,
            max_tokens=60,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.usage.completion_tokens


def test_streamed_choices_are_told_apart(server: Served) -> None:
    options = {"n": 3, "max_tokens": 30, "temperature": 1.0, "seed": 5}
    whole = server.post("/v1/completions", prompt=PROMPT, **options).json()
    parts = server.post("/v1/completions", prompt=PROMPT, stream=True, **options).text
    texts = ["", "", ""]
    for chunk in events(parts):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_requests_at_the_same_time(server: Served) -> None:
    """Each gets what it would get alone."""
    prompts = [f"Chapter {i}. It was" for i in range(24)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:

            async def one(prompt: str, *, stream: bool) -> str:
                if not stream:
                    found = await client.completions.create(
                        model="demo", prompt=prompt, max_tokens=16, temperature=0
                    )
                    return found.choices[0].text
                text = ""
                chunks = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=16, temperature=0, stream=True
                )
                async for chunk in chunks:
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(
                *(one(prompt, stream=i % 2 == 0) for i, prompt in enumerate(prompts))
            )

    assert asyncio.run(ask()) == server.model.generate(prompts, max_tokens=16, temperature=0)


# --- Chat. ---


def test_chat(server: Served, client: openai.OpenAI) -> None:
    expected = server.model.chat(system="Be brief.").send(
        HELLO[0]["content"], max_tokens=20, temperature=0
    )
    found = client.chat.completions.create(
        model="demo",
        messages=[{"role": "developer", "content": "Be brief."}, *HELLO],  # type: ignore[list-item]
        max_completion_tokens=20,
        temperature=0,
    )
    assert found.choices[0].message.content == expected
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason in ("stop", "length")


def test_content_in_parts(server: Served) -> None:
    whole = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "a\nb"}],
        max_tokens=8,
        temperature=0,
    ).json()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": parts}],
        max_tokens=8,
        temperature=0,
    ).json()
    assert found["choices"] == whole["choices"]


def test_streamed_chat(server: Served, client: openai.OpenAI) -> None:
    messages: Any = HELLO
    whole = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=30, n=2, seed=1, temperature=1.0
    )
    texts = ["", ""]
    reasons: list[str | None] = [None, None]
    roles = []
    with client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=30,
        n=2,
        seed=1,
        temperature=1.0,
        stream=True,
        stream_options={"include_usage": True},
    ) as chunks:
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason
                if choice.delta.role:
                    roles.append((choice.index, choice.delta.role))
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert sorted(roles) == [(0, "assistant"), (1, "assistant")]
    assert chunk.usage is not None
    assert whole.usage is not None
    assert chunk.usage.total_tokens == whole.usage.total_tokens


def test_a_conversation_goes_on_where_it_was(server: Served) -> None:
    begun = [{"role": "user", "content": PROMPT * 10}]
    first = server.post("/v1/chat/completions", messages=begun, max_tokens=20).json()
    messages = [*begun, first["choices"][0]["message"], {"role": "user", "content": "And you?"}]
    second = server.post("/v1/chat/completions", messages=messages, max_tokens=20).json()
    usage = second["usage"]
    assert 50 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


# --- Text of a given form, and calls of tools. ---

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Looks up the {name} of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 10}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time")
]


def test_json_schema(client: openai.OpenAI) -> None:
    messages: Any = HELLO
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    found = client.chat.completions.create(
        model="demo",
        messages=messages,
        response_format=wanted,
        max_tokens=60,
        n=3,
        temperature=1.2,
        seed=1,
    )
    for choice in found.choices:
        assert choice.message.content is not None
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
        ({"response_format": {"type": "text"}}, r".+"),
        ({"regex": "[0-9]{3}-[a-f]{2,4}"}, r"[0-9]{3}-[a-f]{2,4}"),
        ({"response_format": {"type": "regex", "regex": "(yes|no)!"}}, r"(yes|no)!"),
        ({"grammar": 'start: "a" ("b" | "c") "d"'}, r"a[bc]d"),
        ({"response_format": {"type": "grammar", "grammar": 'start: "x"'}}, r"x"),
    ],
)
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_forms(server: Served, route: str, fields: dict[str, Any], pattern: str) -> None:
    given: dict[str, Any] = {"messages": HELLO} if route[1] == "h" else {"prompt": PROMPT}
    for stream in (False, True):
        response = server.post(f"/v1/{route}", **given, **fields, max_tokens=40, stream=stream)
        text = ""
        for part in events(response.text) if stream else [response.json()]:
            choice = part["choices"][0]
            text += choice.get("text") or choice.get("delta", choice.get("message", {})).get(
                "content", ""
            )
        assert re.fullmatch(pattern, text, re.DOTALL)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"regex": "("}, "regex", "unclosed group"),
        ({"grammar": "start: ("}, "grammar", "Expected"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format",
            "type",
        ),
        ({"tools": [{"type": "magic"}]}, "tools[0]", "not supported"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice", "'perhaps'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            {"tools": TOOLS, "tool_choice": "required", "regex": "a"},
            "regex",
            "regex and tool_choice are given",
        ),
    ],
)
def test_forms_that_are_none(
    server: Served, fields: dict[str, Any], param: str, message: str
) -> None:
    response = server.post("/v1/chat/completions", messages=HELLO, **fields)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert message in error["message"]


def test_a_call_of_a_named_tool(client: openai.OpenAI) -> None:
    messages: Any = HELLO
    options: Any = {
        "model": "demo",
        "messages": messages,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "time"}},
        "max_tokens": 60,
        "seed": 1,
    }
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    assert call.id.startswith("call_")
    assert call.function.name == "time"
    jsonschema.validate(json.loads(call.function.arguments), TOOLS[1]["function"]["parameters"])
    streamed: list[Any] = []
    reason = None
    with client.chat.completions.create(**options, stream=True) as chunks:
        for chunk in chunks:
            streamed += chunk.choices[0].delta.tool_calls or []
            reason = chunk.choices[0].finish_reason
            assert not chunk.choices[0].delta.content
    assert reason == "tool_calls"
    assert [each.index for each in streamed] == [0]
    assert streamed[0].function.name == call.function.name
    assert streamed[0].function.arguments == call.function.arguments


def test_required_calls_and_their_results(client: openai.OpenAI) -> None:
    messages: list[Any] = [*HELLO]
    options: Any = {"model": "demo", "tools": TOOLS, "max_tokens": 60, "temperature": 1, "seed": 2}
    message = (
        client.chat.completions.create(messages=messages, tool_choice="required", **options)
        .choices[0]
        .message
    )
    assert message.tool_calls
    calls: list[Any] = list(message.tool_calls)
    assert {call.function.name for call in calls} <= {"weather", "time"}
    one = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **options
    ).choices[0]
    (call,) = one.message.tool_calls or []
    messages += [one.message, {"role": "tool", "tool_call_id": call.id, "content": "12"}]
    answer = client.chat.completions.create(messages=messages, tool_choice="auto", **options)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


# --- Log-probabilities. ---


def log_softmax(model: Model, ids: list[int]) -> Any:
    logits = model.logits(ids).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_log_probabilities(server: Served, max_tokens: int, *, stream: bool) -> None:
    model = server.model
    response = server.post(
        "/v1/completions",
        prompt=PROMPT,
        echo=True,
        logprobs=3,
        max_tokens=max_tokens,
        temperature=0,
        stream=stream,
    )
    if stream:
        choices = [event["choices"][0] for event in events(response.text)]
    else:
        choices = response.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    lists: dict[str, list[Any]] = {
        name: [each for choice in choices for each in choice["logprobs"][name]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    more = model.complete(PROMPT, max_tokens=max_tokens, temperature=0).tokens if max_tokens else []
    ids = model.encode(PROMPT) + more
    expected = log_softmax(model, ids)
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    np.testing.assert_allclose(
        lists["token_logprobs"][1:], [expected[i, token] for i, token in enumerate(ids[1:])], 1e-5
    )
    for i, top in enumerate(lists["top_logprobs"][1:]):
        assert max(top.values()) == pytest.approx(expected[i].max(), rel=1e-5)
        assert 3 <= len(top) <= 4
    assert text == PROMPT + model.decode(more)
    texts = [*lists["text_offset"], len(text)]
    # Each token's text is where its offset says.
    for token, start, end in zip(lists["tokens"][1:], texts[1:], texts[2:], strict=False):
        assert text[start:end] == token


def test_offsets_of_parts_of_characters(server: Served) -> None:
    found = server.post(
        "/v1/completions", prompt="☃ a", echo=True, logprobs=0, max_tokens=0
    ).json()["choices"][0]["logprobs"]
    assert found["top_logprobs"] is None
    parts = found["tokens"].count("\ufffd")
    assert parts > 1  # the snowman is no token of this vocabulary
    assert found["text_offset"] == [0] * (1 + parts) + list(
        range(1, 1 + len(found["tokens"]) - 1 - parts)
    )


def test_chat_log_probabilities(server: Served, client: openai.OpenAI) -> None:
    messages: Any = HELLO
    options: Any = {"max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(model="demo", messages=messages, **options)
    assert whole.choices[0].logprobs is not None
    entries = whole.choices[0].logprobs.content
    assert entries is not None
    assert "".join(entry.token for entry in entries) == whole.choices[0].message.content
    assert entries[0].bytes == list(entries[0].token.encode())
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(entries)
    streamed: list[Any] = []
    with client.chat.completions.create(
        model="demo", messages=messages, stream=True, **options
    ) as chunks:
        for chunk in chunks:
            if chunk.choices[0].logprobs:
                streamed += chunk.choices[0].logprobs.content or []
    assert streamed == entries
    none = server.post("/v1/chat/completions", messages=HELLO, max_tokens=2, logprobs=True).json()
    assert none["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


# --- Models, tokens, metrics. ---


def test_models(server: Served, client: openai.OpenAI) -> None:
    assert [found.id for found in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "bitnet-rs"
    with pytest.raises(openai.NotFoundError, match="'x' is not served here"):
        client.models.retrieve("x")


def test_tokens(server: Served) -> None:
    model = server.model
    for name in ("text", "content", "prompt"):
        found = server.post("/tokenize", **{name: PROMPT}).json()
        assert found == {"tokens": model.encode(PROMPT), "count": len(model.encode(PROMPT))}
    plain = server.post("/tokenize", text=PROMPT, add_special_tokens=False).json()["tokens"]
    assert plain == model.encode(PROMPT, add_special_tokens=False)
    assert server.post("/detokenize", tokens=plain).json() == {"text": PROMPT, "prompt": PROMPT}
    info = server.client.get("/tokenizer_info").json()
    assert info["bos_token"] == model.tokenizer.bos_token
    assert info["chat_template"] == model.tokenizer.chat_template
    assert error_of(server.post("/tokenize"))["param"] == "text"
    assert "-1" in error_of(server.post("/detokenize", tokens=[-1]))["message"]


def metric(text: str, name: str) -> float:
    lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    assert len(lines) == 1, name
    return float(lines[0].rpartition(" ")[2])


def test_metrics(server: Served) -> None:
    before = server.client.get("/metrics").text
    server.post("/v1/completions", prompt=PROMPT, max_tokens=9, ignore_eos=True)
    server.post("/v1/completions", prompt=PROMPT, max_tokens="x")
    server.wait_idle()
    after = server.client.get("/metrics").text

    def grown(name: str) -> float:
        return metric(after, f"bitnet_rs_{name}") - metric(before, f"bitnet_rs_{name}")

    assert grown("generated_tokens_total") == 9
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("inter_token_seconds_count") == 8
    assert grown("prefix_cache_lookups_total") == 1
    assert grown("prompt_tokens_total") + grown("prompt_tokens_cached_total") == len(
        server.model.encode(PROMPT)
    )
    assert 0 < metric(after, "bitnet_rs_kv_bytes") <= metric(after, "bitnet_rs_kv_limit_bytes")
    assert metric(after, "bitnet_rs_active_sequences") == 0
    assert metric(after, "bitnet_rs_queue_length") == 0
    assert 'bitnet_rs_requests_total{endpoint="/v1/completions",status="400"}' in after
    server.client.get("/some/where/else")
    assert "some/where" not in server.client.get("/metrics").text  # no label for whoever asks


def test_embeddings(tmp_path: Path) -> None:
    write(
        tmp_path / "embedding",
        architecture="gemma3_text",
        form="values",
        projection_norms=True,
        prefix="",
        head_dim=32,
        n_heads=2,
        n_kv_heads=1,
    )
    texts = ["Once upon", "a time", "there was"]
    with bitnet_rs.load(tmp_path / "embedding") as model, serving(model) as served:
        expected = model.embed(texts)
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            for form in ("float", "base64"):
                found = client.embeddings.create(
                    model="embedding",
                    input=texts,
                    encoding_format=form,
                )
                rows: Any = [each.embedding for each in found.data]
                if form == "base64":
                    rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
                np.testing.assert_array_equal(np.array(rows, np.float32), expected)
        ids = [model.encode(text) for text in texts]
        for given, rows_wanted in (
            (ids, expected),
            (ids[0], expected[:1]),
            (texts[1], expected[1:2]),
        ):
            body = served.post("/v1/embeddings", input=given).json()
            rows = np.array([each["embedding"] for each in body["data"]], np.float32)
            np.testing.assert_array_equal(rows, rows_wanted)
        assert body["usage"]["prompt_tokens"] == len(ids[1])
        for path, more in (
            ("/v1/chat/completions", {"messages": HELLO}),
            ("/v1/completions", {"prompt": "a"}),
        ):
            response = served.post(path, **more)
            assert response.status_code == 400
            assert "/v1/embeddings" in error_of(response)["message"]
        too_long = served.post("/v1/embeddings", input=[[1] * 5, [1] * 65])
        assert error_of(too_long)["code"] == "context_length_exceeded"
        assert error_of(too_long)["param"] == "input[1]"
        assert error_of(served.post("/v1/embeddings", input=""))["param"] == "input"
        assert error_of(served.post("/v1/embeddings", input=[]))["param"] == "input"
        assert (
            error_of(served.post("/v1/embeddings", input="a", dimensions=8))["param"]
            == "dimensions"
        )
        assert served.client.get("/metrics").status_code == 200


# --- What is refused. ---

MESSAGES = {"messages": HELLO}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("chat/completions", {}, "messages", "is missing"),
        ("chat/completions", {"messages": []}, "messages", "wanted at least 1"),
        (
            "chat/completions",
            {"messages": [{"role": "x", "content": ""}]},
            "messages[0].role",
            "'x'",
        ),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "is 5; wanted a valid string or a valid list",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "reads text only",
        ),
        ("chat/completions", {**MESSAGES, "temperature": "hot"}, "temperature", "'hot'"),
        ("chat/completions", {**MESSAGES, "temperature": -1}, "temperature", "-1"),
        ("chat/completions", {**MESSAGES, "top_p": 2}, "top_p", "up to 1"),
        ("chat/completions", {**MESSAGES, "max_tokens": 0}, "max_tokens", ">= 1"),
        ("chat/completions", {**MESSAGES, "max_tokens": "5"}, "max_tokens", "'5'"),
        ("chat/completions", {**MESSAGES, "n": 0}, "n", "greater than or equal to 1"),
        ("chat/completions", {**MESSAGES, "n": 1000}, "n", "up to 80"),
        ("chat/completions", {**MESSAGES, "logit_bias": {"5": 1}}, "logit_bias", "not support"),
        (
            "chat/completions",
            {**MESSAGES, "presence_penalty": 1},
            "presence_penalty",
            "not support",
        ),
        ("chat/completions", {**MESSAGES, "frequency_penalty": 1}, "frequency_penalty", "wanted 0"),
        ("chat/completions", {**MESSAGES, "modalities": ["audio"]}, "modalities", "not support"),
        ("chat/completions", {**MESSAGES, "functions": [{}]}, "functions", "wanted tools"),
        ("chat/completions", {**MESSAGES, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        (
            "chat/completions",
            {**MESSAGES, "logprobs": True, "top_logprobs": 21},
            "top_logprobs",
            "20",
        ),
        ("chat/completions", {**MESSAGES, "n": 10**30}, "n", "up to 80"),
        ("completions", {"prompt": ["a"] * 50, "n": 2}, "n", "up to 80"),
        ("chat/completions", {**MESSAGES, "stop": [""]}, "stop", "not empty"),
        ("chat/completions", {**MESSAGES, "stop": ["a"] * 65}, "stop", "up to 64"),
        ("chat/completions", {**MESSAGES, "seed": -1}, "seed", "-1"),
        ("chat/completions", {**MESSAGES, "model": "gpt-4"}, "model", "not served here"),
        (
            "chat/completions",
            {**MESSAGES, "stream_options": {"include_usage": True}},
            "stream_options",
            "stream: true",
        ),
        (
            "chat/completions",
            {**MESSAGES, "response_format": {"type": "xml"}},
            "response_format.type",
            "'xml'",
        ),
        (
            "chat/completions",
            {**MESSAGES, "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "`schema`",
        ),
        (
            "chat/completions",
            {**MESSAGES, "regex": "a", "grammar": "b"},
            "regex",
            "one of them only",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a " * 600}]},
            "messages",
            "512",
        ),
        ("completions", {}, "prompt", "is missing"),
        ("completions", {"prompt": ""}, "prompt", "is empty"),
        ("completions", {"prompt": []}, "prompt", "is empty"),
        ("completions", {"prompt": ["a", ""]}, "prompt[1]", "is empty"),
        ("completions", {"prompt": [5, 99999]}, "prompt", "99999 at position 1"),
        ("completions", {"prompt": [[5], [-1]]}, "prompt[1]", "-1 at position 0"),
        ("completions", {"prompt": ["a", 5]}, "prompt", "wanted"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "not support"),
        ("completions", {"prompt": "a", "best_of": 3}, "best_of", "value of n"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs", "20"),
        ("completions", {"prompt": "a " * 600}, "prompt", "512"),
        ("embeddings", {"input": "a"}, "model", "writes text"),
    ],
)
def test_bad_requests(
    server: Served, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    for stream in (False, True) if param != "stream_options" else (False,):
        response = server.post(f"/v1/{path}", **body, stream=stream)
        error = error_of(response)
        assert response.status_code == (404 if param == "model" and path[0] == "c" else 400)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert message in error["message"]
        if "512" in message:
            assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 10**30},
        {"seed": 10**40},
        {"max_tokens": 10**30, "stop": "e"},
        {"temperature": 1e308},
        {"temperature": 1e-308},
        {"min_p": 1.0, "temperature": 1},
        {"repetition_penalty": 1e308, "temperature": 1},
        {"repetition_penalty": 1e-308, "temperature": 1},
    ],
)
def test_options_at_their_ends(server: Served, options: dict[str, Any]) -> None:
    """Each gives text, or is refused: none is an error of the server."""
    response = server.post("/v1/completions", **{"prompt": PROMPT, "max_tokens": 4, **options})
    assert response.status_code in (200, 400), response.text


def test_unknown_fields_are_ignored(server: Served) -> None:
    body = {"user": "me", "store": False, "metadata": {}, "frequency_penalty": 0, "logit_bias": {}}
    response = server.post("/v1/chat/completions", messages=HELLO, max_tokens=1, new=1, **body)
    assert response.status_code == 200


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("GET", "/nothing", b"", {}, 404, "not_found"),
        ("DELETE", "/v1/models", b"", {}, 405, "method_not_allowed"),
        ("GET", "/v1/completions", b"", {}, 405, "method_not_allowed"),
        ("POST", "/v1/completions", b"{'a'}", JSON, 400, "invalid_json"),
        ("POST", "/v1/completions", b"[" * 100_000, JSON, 400, "invalid_json"),
        ("POST", "/v1/completions", b"\xff\xfe{}", JSON, 400, "invalid_json"),
        ("POST", "/v1/completions", b'"text"', JSON, 400, None),
        ("POST", "/v1/completions", b"", JSON, 400, None),
        ("POST", "/v1/completions", b'{"prompt": "a"}', {}, 415, "unsupported_media_type"),
        (
            "POST",
            "/v1/completions",
            b'{"prompt": "a"}',
            {"content-type": "text/plain"},
            415,
            "unsupported_media_type",
        ),
        ("GET", "/health", b"", {"host": "evil.example:8080"}, 403, "host_not_allowed"),
    ],
)
def test_requests_that_are_none(
    server: Served,
    method: str,
    path: str,
    content: bytes,
    headers: dict[str, str],
    status: int,
    code: str | None,
) -> None:
    response = server.client.request(method, path, content=content, headers=headers)
    assert response.status_code == status
    assert error_of(response)["code"] == code


def test_values_that_json_cannot_hold(server: Served) -> None:
    for body in (b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}'):
        response = server.client.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code == 400
        assert error_of(response)["param"] == "temperature"
    response = server.client.post(
        "/v1/completions", content=b'{"prompt": "a\\ud800"}', headers=JSON
    )
    assert response.status_code == 400


def test_hosts_of_this_machine(server: Served) -> None:
    for host in (f"localhost:{server.port}", "127.0.0.1", f"[::1]:{server.port}", "LOCALHOST"):
        assert server.client.get("/health", headers={"host": host}).json() == {"status": "ok"}


# --- Limits. ---


def test_the_key(narrow: Served) -> None:
    for given in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            response = httpx.get(narrow.url + path, headers=given)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{narrow.url}/health").status_code == 200
    assert httpx.head(f"{narrow.url}/health").status_code == 200
    assert narrow.client.get("/v1/models").status_code == 200
    with (
        openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_aliases(narrow: Served) -> None:
    assert [each["id"] for each in narrow.client.get("/v1/models").json()["data"]] == [
        "demo",
        "gpt-4o-mini",
    ]
    found = narrow.post("/v1/completions", model="gpt-4o-mini", prompt="a", max_tokens=1)
    assert found.json()["model"] == "demo"


def test_most_tokens(narrow: Served) -> None:
    response = narrow.post("/v1/completions", prompt="a", max_tokens=101)
    assert response.status_code == 400
    assert error_of(response)["param"] == "max_tokens"
    found = narrow.post("/v1/chat/completions", messages=HELLO, ignore_eos=True).json()
    assert found["usage"]["completion_tokens"] == 100


def test_a_full_queue(narrow: Served) -> None:
    answers: list[httpx.Response] = []

    def wait_in_line() -> None:
        answers.append(narrow.post("/v1/completions", prompt=PROMPT, max_tokens=5))

    with occupied(narrow.model):
        waiting = threading.Thread(target=wait_in_line)
        waiting.start()
        wait_until(lambda: narrow.model.runner.stats().waiting == 1)
        for stream in (False, True):
            response = narrow.post("/v1/completions", prompt=PROMPT, max_tokens=5, stream=stream)
            assert response.status_code == 429
            assert error_of(response)["code"] == "queue_full"
            assert response.headers["retry-after"] == "1"
        assert not answers
    waiting.join(20)
    assert answers[0].json()["choices"][0]["text"]


def test_a_stream_that_waits_is_kept_alive(narrow: Served) -> None:
    with occupied(narrow.model):
        with narrow.client.stream(
            "POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 5, "stream": True}
        ) as response:
            parts = response.iter_raw()
            assert next(parts).startswith(b": keep-alive\n\n")
            assert narrow.model.runner.stats().waiting == 1
        # Who leaves the queue is not computed for.
        wait_until(lambda: narrow.model.runner.stats().waiting == 0)


def test_other_origins(server: Served, narrow: Served) -> None:
    asking = {
        "Origin": "https://example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    allowed = httpx.options(f"{narrow.url}/v1/chat/completions", headers=asking)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://example.com"
    refused = httpx.get(f"{narrow.url}/v1/models", headers={"Origin": "https://example.com"})
    assert refused.status_code == 401  # and the page may read why
    assert refused.headers["access-control-allow-origin"] == "https://example.com"
    other = httpx.options(
        f"{narrow.url}/v1/chat/completions", headers={**asking, "Origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in other.headers
    nobody = httpx.options(f"{server.url}/v1/chat/completions", headers=asking)
    assert "access-control-allow-origin" not in nobody.headers


# --- Clients that mean no good, or leave. ---


def request_bytes(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


LONG = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "n": 16}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "half", "reset"])
def test_who_leaves_is_not_computed_for(server: Served, how: str, *, stream: bool) -> None:
    runner = server.model.runner
    server.wait_idle()
    before = runner.stats()
    with server.connect() as connection:
        connection.sendall(request_bytes({**LONG, "stream": stream}))
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: runner.stats().active == 16)
        if how == "half":
            connection.shutdown(socket.SHUT_WR)
            read_all(connection)
        elif how == "reset":
            linger = b"\1\0\0\0\0\0\0\0"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    server.wait_idle(5)
    after = runner.stats()
    assert after.generated_tokens - before.generated_tokens < 16 * 480
    assert after.finished - before.finished == 16
    # What is still held is kept for prompts that begin alike, within the limit.
    assert after.kv_bytes <= after.kv_limit
    assert server.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200


def test_a_client_that_stops_reading(server: Served) -> None:
    """Holds up nobody else."""
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request_bytes({**LONG, "n": 4, "stream": True}))
        assert connection.recv(10) == b"HTTP/1.1 2"
        found = server.post("/v1/completions", prompt=PROMPT, max_tokens=10, temperature=0).json()
        assert found["choices"][0]["text"] == server.model.generate(
            PROMPT, max_tokens=10, temperature=0
        )
    server.wait_idle(5)


JSON_HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\nZZ\r\n",
        JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ],
)
def test_what_is_not_http(server: Served, sent: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        answer = connection.recv(65536)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404"))
    assert b"Traceback" not in answer
    assert server.client.get("/health").status_code == 200


def test_a_body_that_never_comes(server: Served) -> None:
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
        assert server.client.get("/health").status_code == 200
    assert server.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200


def test_bodies_that_are_too_long(narrow: Served) -> None:
    content = json.dumps({"prompt": "a " * 60_000}).encode()
    response = narrow.client.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(content), 5000):
            yield content[at : at + 5000]

    response = narrow.client.post("/v1/completions", content=pieces(), headers=JSON)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    # One that only says that it is long is answered before any of it is there.
    with narrow.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Authorization: Bearer secret\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999999999999\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_long_text_holds_up_nobody(server: Served) -> None:
    """Tokenizing megabytes takes seconds; others are answered meanwhile."""
    answers: list[httpx.Response] = []
    text = "the quick brown fox " * 20_000

    def ask() -> None:
        answers.append(server.post("/v1/completions", prompt=text, max_tokens=1))

    asking = threading.Thread(target=ask)
    asking.start()
    slowest = 0.0
    while asking.is_alive():
        start = time.perf_counter()
        assert server.client.get("/health").status_code == 200
        slowest = max(slowest, time.perf_counter() - start)
    asking.join()
    assert error_of(answers[0])["code"] == "context_length_exceeded"
    assert slowest < 0.5


def test_many_clients_of_all_kinds() -> None:
    """A small one of what `soak_server.py` does for longer: nothing is mixed up, nothing left."""
    with (
        bitnet_rs.load(max_sequences=6, kv_memory=24_000_000) as loaded,
        serving(loaded, max_queue=8, max_body=soak_server.MAX_BODY) as served,
    ):
        pool = [
            (body, soak_server.alone(loaded, body)) for body in soak_server.bodies(seed=1, n=12)
        ]
        seen = asyncio.run(soak_server.clients(served.url, pool, n=60, width=10, seed=1))
        assert seen.wrong == []
        served.wait_idle()
        assert loaded.runner.stats().kv_bytes <= 24_000_000


# --- Other clients. ---


def test_curl(server: Served) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stream": True})
    done = subprocess.run(
        ["curl", "-sSN", f"{server.url}/v1/completions", "--json", body],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    text = "".join(event["choices"][0]["text"] for event in events(done.stdout))
    assert text == server.model.generate(PROMPT, max_tokens=20, temperature=0)


def test_evaluation_harness(server: Served) -> None:
    """lm-eval's own client, where it is installed: what it reads are the model's probabilities."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    instance = importlib.import_module("lm_eval.api.instance").Instance
    client = completions.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="demo", tokenizer_backend="remote"
    )
    pairs = [
        ("Once upon a", " time"),
        ("The whale", " is a fish"),
        ("It was the best", " of times"),
    ]
    found = client.loglikelihood(
        [instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    )
    model = server.model
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        ids = model.encode(context + continuation, add_special_tokens=False)
        n = len(model.encode(context, add_special_tokens=False))
        rows = log_softmax(model, ids)
        wanted = [(rows[i - 1, ids[i]], rows[i - 1].argmax() == ids[i]) for i in range(n, len(ids))]
        assert logprob == pytest.approx(sum(each for each, _ in wanted), rel=1e-5)
        assert greedy == all(best for _, best in wanted)


# --- What the server is told. ---


def test_settings() -> None:
    assert ServerSettings().loopback
    assert ServerSettings(host="::1").loopback
    assert not ServerSettings(host="0.0.0.0").loopback
    assert ServerSettings(host="0.0.0.0").host_names is None
    assert ServerSettings(allowed_hosts=("*",)).host_names is None
    assert "model.example" in (ServerSettings(allowed_hosts=("Model.Example",)).host_names or ())
    wrong: dict[str, Any]
    for wrong in ({"api_key": ""}, {"api_key": "ä"}, {"cors_origins": ("example.com",)}):
        with pytest.raises(ValueError, match=r"; wanted"):
            ServerSettings(**wrong)


def test_a_path_is_not_told(tmp_path: Path) -> None:
    write(tmp_path / "my-model")
    with bitnet_rs.load(tmp_path / "my-model") as loaded:
        assert server_settings.served_name(loaded) == "my-model"
