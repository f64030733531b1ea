"""The model as the routes see it: requests are checked against it, generations are begun on it.

For `app.py` and the routes' files. Apart because it is what they share, and because what takes a
moment (tokenizing, templates, grammars) is done in threads from here, off the event loop.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from uuid import uuid4

from bitnet_rs import __version__
from bitnet_rs.completion import Reply
from bitnet_rs.engine import Running
from bitnet_rs.options import Options
from bitnet_rs.server.errors import ApiError, bad_request, shown
from bitnet_rs.server.generation import (
    EventStream,
    Generation,
    NoResponse,
    json_response,
    unless_left,
    with_errors,
)
from bitnet_rs.server.metrics import Metrics
from bitnet_rs.server.settings import ServerSettings, served_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

    from bitnet_rs.engine import Constraint, Request
    from bitnet_rs.model import Model
    from bitnet_rs.options import Settings
    from bitnet_rs.server.grammar import Grammars
    from bitnet_rs.server.protocol import ChatRequest, CompletionRequest

_T = TypeVar("_T")

MakeConstraint = Callable[[], "Constraint"]


class Answer(Protocol):
    """A generation as the clients of one route read it."""

    async def whole(self) -> dict[str, Any]:
        """In one piece."""

    def stream(self) -> AsyncGenerator[bytes | None, None]:
        """As events; None where nothing has come for a while."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request comes to, before it is begun.

    Attributes:
        requests: For each choice.
        stops: The strings that end each choice's text.
        per_prompt: How many choices in a row have the same prompt.
    """

    requests: Sequence[Request]
    stops: Sequence[tuple[str, ...]]
    per_prompt: int


class Service:
    """One model, served.

    Args:
        model: The model.
        settings: How to serve it.

    Attributes:
        name: What clients call it.
        created: When it was, in seconds of the epoch.
    """

    def __init__(self, model: Model, settings: ServerSettings) -> None:
        model.tokenizer.vocab_size  # noqa: B018 (raises where there is none: all routes need it)
        self.model = model
        self.settings = settings
        self.name = served_name(model)
        self.created = int(time.time())
        self.metrics = Metrics(model, self.name)
        self.embedding_turn = asyncio.Semaphore(1)
        self.embeddings_waiting = 0
        self._live: set[Generation] = set()

    # Which model.

    def check_model(self, name: str | None) -> None:
        """Refuses a request for another model.

        Raises:
            ApiError: The name is none of this one's.
        """
        known = (self.name, *self.settings.aliases)
        if name is not None and name not in known and "*" not in known:
            raise ApiError(
                404,
                f"the model {shown(name)} is not served here; wanted {self.name}: name that, or "
                "none, or start the server with --alias NAME",
                param="model",
                code="model_not_found",
            )

    def head(self, kind: str, prefix: str) -> dict[str, Any]:
        """What all answers of the generating routes begin with."""
        return {
            "id": f"{prefix}-{uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
            "system_fingerprint": f"bitnet-rs-{__version__}",
        }

    # Off the event loop.

    async def prepare(self, work: Callable[[], _T]) -> _T:
        """Does what takes a moment in a thread.

        Raises:
            ApiError: Also in place of the ValueErrors of the package, whose messages are for users.
        """
        return await asyncio.to_thread(_with_api_errors, work)

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars for this model."""
        from bitnet_rs.server.grammar import Grammars

        model = self.model
        return Grammars(model.tokenizer, model.vocab_size, model.stop_ids)

    # Requests for text. Called in threads.

    def check_generates(self) -> None:
        """Refuses what a model for embeddings cannot do.

        Raises:
            ApiError: It is one.
        """
        if self.model.checkpoint.embedding:
            raise bad_request(
                f"{self.name} is a model for embeddings, which does not write; use "
                "POST /v1/embeddings",
                "model",
                "model_not_supported",
            )

    def check_choices(self, n: int) -> None:
        """Refuses a request for more choices than could ever be taken.

        Raises:
            ApiError: It is one.
        """
        most = self.settings.max_queue + self.model.max_sequences
        if n > most:
            raise bad_request(
                f"n choices for each prompt are {n} together; this server takes up to {most} in a "
                "request: send several",
                "n",
            )

    def most_tokens(self, wanted: int | None, name: str) -> int | None:
        """How many tokens a choice may have; None: as many as fit, or as the checkpoint says.

        Raises:
            ApiError: More are wanted than the server allows.
        """
        limit = self.settings.max_tokens
        if wanted is not None and limit is not None and wanted > limit:
            raise bad_request(f"{name} is {wanted}; this server allows {limit}: ask for less", name)
        return wanted

    def plan(
        self,
        prompts: Sequence[NDArray[np.uint32]],
        settings: Settings,
        n: int,
        *,
        what: str,
        default_max_tokens: int | None,
        constraint: MakeConstraint | None = None,
        prompt_logprobs: bool = False,
    ) -> Plan:
        """Requests for the engine: `n` for each prompt.

        Raises:
            ApiError: A prompt does not fit the context.
            ValueError: As `Model.request`.
        """
        limit = self.settings.max_tokens
        if limit is not None:
            wanted = settings.max_tokens or default_max_tokens or limit
            settings = replace(settings, max_tokens=min(wanted, limit))
        requests: list[Request] = []
        stops: list[tuple[str, ...]] = []
        for i, prompt in enumerate(prompts):
            name = what if len(prompts) == 1 else f"{what}[{i}]"
            self._check_length(len(prompt), name, what)
            for each in settings.repeated(n):
                request = self.model.request(
                    prompt,
                    each,
                    name=name,
                    default_max_tokens=default_max_tokens,
                    constraint=None if constraint is None else constraint(),
                    prompt_logprobs=prompt_logprobs,
                )
                requests.append(request)
                stops.append(each.stop)
        return Plan(requests, stops, n)

    def _check_length(self, n: int, name: str, param: str) -> None:
        context = self.model.context_length
        if n >= context:
            raise bad_request(
                f"{name} has {n} tokens; the context holds {context}, with at least one for the "
                "answer: shorten it",
                param,
                "context_length_exceeded",
            )

    def constraint(
        self, body: ChatRequest | CompletionRequest, call_schema: dict[str, Any] | None = None
    ) -> MakeConstraint | None:
        """What makes the constraint that a request asks for, each time a new one.

        Args:
            body: The request.
            call_schema: A schema of the tool calls that it must consist of.

        Raises:
            ApiError: It asks for several, or for what there is not.
            ValueError: The grammar cannot be compiled.
        """
        wanted = dict(_formats(body))
        if call_schema is not None:
            wanted["tool_choice"] = ("json_schema", call_schema)
        if not wanted:
            return None
        if len(wanted) > 1:
            raise bad_request(
                f"{' and '.join(wanted)} are given; the text can follow one of them only",
                next(iter(wanted)),
            )
        ((param, (kind, value)),) = wanted.items()

        def make() -> Constraint:
            grammars = self.grammars
            if kind == "json_object":
                return grammars.json_object()
            if kind == "json_schema":
                return grammars.json_schema(value)
            return grammars.regex(value) if kind == "regex" else grammars.lark(value)

        try:
            make()  # so that what is wrong with it is told as being about it
        except ValueError as error:
            raise bad_request(str(error), param, "invalid_grammar") from None
        return make

    # Generations.

    def begin(self, plan: Plan) -> Generation:
        """Begins what was planned. Whoever begins it ends it.

        Raises:
            ApiError: Too many sequences wait already, or a request cannot run at all.
        """
        tokenizer = self.model.tokenizer
        replies = [
            Reply(Running(request), tokenizer, stop)
            for request, stop in zip(plan.requests, plan.stops, strict=True)
        ]
        generation = Generation(self.model.runner, replies, plan.per_prompt, self.metrics)
        generation.start(self.settings.max_queue)
        self._live.add(generation)
        return generation

    async def respond(
        self, request: HttpRequest, generation: Generation, answer: Answer, *, stream: bool
    ) -> Response:
        """Answers a request with a generation that was begun for it, and ends that."""
        end = partial(self.end, generation)
        if stream:
            return EventStream(with_errors(answer.stream()), end)
        try:
            whole = await unless_left(request.receive, answer.whole())
        finally:
            end()
        return NoResponse() if whole is None else json_response(whole)

    def end(self, generation: Generation) -> None:
        """Cancels what is left of a generation."""
        generation.cancel()
        self._live.discard(generation)

    def abort_all(self) -> None:
        """Ends all generations; their clients are told why."""
        for generation in tuple(self._live):
            generation.abort(
                ApiError(503, "the server ended before this was complete", code="shutting_down")
            )


def without_limit(request: Request) -> Request:
    """The same request, to generate nothing: only its prompt is looked at."""
    return replace(request, max_tokens=0)


def _with_api_errors(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except ValueError as error:
        message = str(error)
        param = message.partition(" ")[0]
        known = re.split(r"[\[.]", param)[0] in _FIELDS
        raise bad_request(message, param if known else None) from None


# The messages begin with the name of the option or the field that they are about.
_FIELDS = frozenset({*Options.__annotations__, "prompt", "messages", "tools", "tool_choice"})


def _formats(body: ChatRequest | CompletionRequest) -> list[tuple[str, tuple[str, Any]]]:
    """The fields of a request that ask for text of a form: field, kind of grammar, grammar."""
    found: list[tuple[str, tuple[str, Any]]] = []
    if body.regex is not None:
        found.append(("regex", ("regex", body.regex)))
    if body.grammar is not None:
        found.append(("grammar", ("grammar", body.grammar)))
    if body.response_format is not None:
        wanted = _response_format(body.response_format)
        if wanted is not None:
            found.append(("response_format", wanted))
    return found


def _response_format(given: dict[str, Any]) -> tuple[str, Any] | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return "json_object", None
    if kind == "json_schema":
        named = given.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            raise bad_request(
                f"response_format.json_schema is {shown(named)}; wanted an object with the key "
                "`schema`, an object",
                "response_format.json_schema",
            )
        return "json_schema", schema
    if kind in ("regex", "grammar"):
        value = given.get(kind)
        if not isinstance(value, str):
            raise bad_request(
                f"response_format.{kind} is {shown(value)}; wanted a string",
                f"response_format.{kind}",
            )
        return kind, value
    raise bad_request(
        f"response_format.type is {shown(kind)}; wanted text, json_object, json_schema, regex or "
        "grammar",
        "response_format.type",
    )
