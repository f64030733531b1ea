"""`POST /v1/chat/completions`: from messages to an answer, in one piece or as a stream.

For `app.py`. Apart because only chat has templates, roles and tool calls; what it has in common
with plain completions is in `service.py` and `generation.py`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bitnet_rs.server import tools
from bitnet_rs.server.errors import bad_request
from bitnet_rs.server.generation import (
    DONE,
    Generation,
    Piece,
    event,
    logprob,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from bitnet_rs.sampling import Logprobs
    from bitnet_rs.server.protocol import ChatRequest
    from bitnet_rs.server.service import Plan, Service
    from bitnet_rs.tokenizer import Tokenizer


async def chat(service: Service, request: Request, body: ChatRequest) -> Response:
    """Answers a request.

    Raises:
        ApiError: It cannot be served.
    """
    service.check_model(body.model)
    body.check_supported()
    service.check_generates()
    plan, calling = await service.prepare(partial(_prepare, service, body))
    generation = service.begin(plan)
    answer = _Answer(service, body, generation, calling)
    return await service.respond(request, generation, answer, stream=bool(body.stream))


@dataclass(frozen=True)
class _Calling:
    """What a request allows of tool calls.

    Attributes:
        offered: The functions that may be called; none: no text is taken for a call.
        constrained: Whether the text is nothing but calls.
        parallel: Whether there may be several in one answer.
    """

    offered: list[dict[str, Any]] = field(default_factory=list)
    constrained: bool = False
    parallel: bool = True

    def parser(self) -> tools.Parser | None:
        """What finds calls in one choice's text; None where there are none to be found."""
        if not self.offered:
            return None
        return tools.Parser(self.offered, constrained=self.constrained)


def _prepare(service: Service, body: ChatRequest) -> tuple[Plan, _Calling]:
    """Messages to ids, fields to requests."""
    model = service.model
    if model.tokenizer.chat_template is None:
        raise bad_request(
            f"{service.name} has no chat template: it is a base model, or a file is missing; use "
            "POST /v1/completions",
            "messages",
            "no_chat_template",
        )
    service.check_choices(body.n or 1)
    offered = body.tools or []
    messages, variables = tools.prepare(
        body.template_messages(), offered, body.tool_choice, model.tokenizer
    )
    parallel = body.parallel_tool_calls is not False
    schema = tools.call_schema(offered, body.tool_choice, parallel=parallel)
    calling = _Calling()
    if body.tool_choice != "none":
        calling = _Calling(offered, constrained=schema is not None, parallel=parallel)
    prompt = model.tokenizer.apply_chat_template(messages, **variables)
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)  # the template writes BOS
    name, wanted = body.most_tokens
    options = body.options()
    options["max_tokens"] = service.most_tokens(wanted, name)
    options["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    plan = service.plan(
        [model.check_encoded(ids, "messages")],
        model.settings(**options),
        body.n or 1,
        what="messages",
        default_max_tokens=None,
        constraint=service.constraint(body, schema),
    )
    return plan, calling


class _Choice:
    """One choice of an answer, as it grows.

    Args:
        index: Which one.
        calling: What it may call.
        tokenizer: For the texts of tokens with log-probabilities.
    """

    def __init__(self, index: int, calling: _Calling, tokenizer: Tokenizer) -> None:
        self.index = index
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self._parser = calling.parser()
        self._parallel = calling.parallel
        self._tokenizer = tokenizer

    def take(self, piece: Piece) -> dict[str, Any] | None:
        """Takes what is new; returns it as a chunk's choice, None if there is nothing to show."""
        content, calls = self._split(piece)
        self.text += content
        entries = [
            _entry(self._tokenizer, each.token, each.logprobs)
            for each in piece.events
            if each.token is not None and each.logprobs is not None
        ]
        self.logprobs += entries
        if piece.finish_reason is not None:
            self.finish_reason = "tool_calls" if self.calls else piece.finish_reason
        if not (content or calls or entries or self.finish_reason):
            return None
        delta: dict[str, Any] = {}
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = calls
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": {"content": entries} if entries else None,
            "finish_reason": self.finish_reason,
        }

    def _split(self, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        """New content and new calls."""
        if self._parser is None:
            return piece.text, []
        deltas = list(self._parser.push(piece.text)) if piece.text else []
        if piece.finish_reason is not None:
            deltas += self._parser.finish()
        content = ""
        calls = []
        for delta in deltas:
            content += delta.content or ""
            if delta.call is not None and (self._parallel or not self.calls):
                calls.append({"index": len(self.calls), **_call(delta.call)})
                self.calls.append(_call(delta.call))
        return content, calls

    def message(self) -> dict[str, Any]:
        """The finished choice."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.text if self.text or not self.calls else None,
            "refusal": None,
        }
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def _call(call: tools.Call) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _entry(tokenizer: Tokenizer, token: int, found: Logprobs) -> dict[str, Any]:
    """One token's log-probabilities."""

    def one(token: int, value: float) -> dict[str, Any]:
        text = tokenizer.token_text(token)
        # Part of a character has no text of its own, and its bytes are not told by the vocabulary.
        whole = "\ufffd" not in text
        return {
            "token": text,
            "logprob": logprob(value),
            "bytes": list(text.encode()) if whole else None,
        }

    top = [one(i, value) for i, value in found.top]
    return {**one(token, found.logprob), "top_logprobs": top}


class _Answer:
    """A generation as chat clients read it."""

    def __init__(
        self, service: Service, body: ChatRequest, generation: Generation, calling: _Calling
    ) -> None:
        self._service = service
        self._body = body
        self._generation = generation
        self._choices = [
            _Choice(i, calling, service.model.tokenizer) for i in range(len(generation.replies))
        ]

    def _take(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        for piece in pieces:
            found = self._choices[piece.choice].take(piece)
            if found is not None:
                yield found

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async for pieces in self._generation.pieces():
            for _ in self._take(pieces):
                pass
        return {
            **self._service.head("chat.completion", "chatcmpl"),
            "choices": [
                {
                    "index": choice.index,
                    "message": choice.message(),
                    "logprobs": {"content": choice.logprobs} if self._body.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for choice in self._choices
            ],
            "usage": self._generation.usage().body(),
        }

    async def stream(self) -> AsyncGenerator[bytes | None, None]:
        """The answer as events; None where nothing has come for a while."""
        head = self._service.head("chat.completion.chunk", "chatcmpl")
        usage = {"usage": None} if self._body.include_usage else {}
        begun: set[int] = set()
        async for pieces in self._generation.pieces(self._service.settings.keep_alive):
            chunks = []
            for choice in self._take(pieces):
                if choice["index"] not in begun:
                    begun.add(choice["index"])
                    first = {"role": "assistant", "content": ""}
                    choice["delta"] = {**first, **choice["delta"]}
                chunks.append(event({**head, "choices": [choice], **usage}))
            if chunks or not pieces:
                yield b"".join(chunks) or None
        if self._body.include_usage:
            total = self._generation.usage().body()
            yield event({**head, "choices": [], "usage": total})
        yield DONE
