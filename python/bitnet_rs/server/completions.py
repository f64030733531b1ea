"""`POST /v1/completions`: text that continues prompts, in one piece or as a stream.

For `app.py`. Apart because of what only this older form has: several prompts at once, prompts of
token ids, and prompts that come back with their tokens' log-probabilities (`echo`), by which models
are evaluated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bitnet_rs.engine import check_ids
from bitnet_rs.model import DEFAULT_MAX_TOKENS
from bitnet_rs.server.errors import bad_request
from bitnet_rs.server.generation import (
    DONE,
    Generation,
    Piece,
    event,
    logprob,
)
from bitnet_rs.server.service import Plan, without_limit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from starlette.requests import Request
    from starlette.responses import Response

    from bitnet_rs.engine import Running
    from bitnet_rs.sampling import Logprobs
    from bitnet_rs.server.protocol import CompletionRequest, TokenIds
    from bitnet_rs.server.service import Service
    from bitnet_rs.tokenizer import Tokenizer


async def complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Answers a request.

    Raises:
        ApiError: It cannot be served.
    """
    service.check_model(body.model)
    body.check_supported()
    service.check_generates()
    plan, texts = await service.prepare(partial(_prepare, service, body))
    generation = service.begin(plan)
    answer = _Answer(service, body, generation, texts)
    return await service.respond(request, generation, answer, stream=bool(body.stream))


def _prepare(service: Service, body: CompletionRequest) -> tuple[Plan, list[str]]:
    """Prompts to ids, fields to requests; and the prompts' texts, for each choice."""
    model = service.model
    given = body.prompts()
    n = body.n or 1
    service.check_choices(n * len(given))
    prompts = [
        _ids(service, each, "prompt" if len(given) == 1 else f"prompt[{i}]")
        for i, each in enumerate(given)
    ]
    nothing = body.max_tokens == 0
    if nothing and not body.echo:
        raise bad_request(
            "max_tokens is 0; wanted at least 1, or echo: true to look at the prompt only",
            "max_tokens",
        )
    options = body.options()
    options["max_tokens"] = None if nothing else service.most_tokens(body.max_tokens, "max_tokens")
    options["logprobs"] = body.logprobs
    plan = service.plan(
        prompts,
        model.settings(**options),
        n,
        what="prompt",
        default_max_tokens=DEFAULT_MAX_TOKENS,
        constraint=service.constraint(body),
        prompt_logprobs=bool(body.echo) and (nothing or body.logprobs is not None),
    )
    if nothing:
        requests = [without_limit(each) for each in plan.requests]
        plan = Plan(requests, plan.stops, plan.per_prompt)
    texts = [
        each if isinstance(each, str) else model.tokenizer.decode(each)
        for each in given
        for _ in range(n)
    ]
    return plan, texts


def _ids(service: Service, prompt: str | TokenIds, name: str) -> NDArray[np.uint32]:
    model = service.model
    try:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{name} is empty; wanted some text")
            return model.check_encoded(model.tokenizer.encode_prompt(prompt), name)
        return check_ids(prompt, model.vocab_size, name)
    except ValueError as error:
        raise bad_request(str(error), name) from None


class _Tokens:
    """Tokens with log-probabilities in the layout of this route: lists side by side.

    Offsets are where in the text a token's own begins. A token that is part of a character begins
    where the character does, and one that shows as no text where the next one does.

    Args:
        tokenizer: For the tokens' texts.
        top: Whether the most probable tokens are wanted, too.
    """

    def __init__(self, tokenizer: Tokenizer, *, top: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder()
        self._top = top
        self._n_text = 0
        self._lists = self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, found: Logprobs | None) -> None:
        """Takes the next token; None: it is the first of a prompt, which nothing predicts."""
        text = self._tokenizer.token_text(token)
        lists = self._lists
        lists["tokens"].append(text)
        lists["text_offset"].append(self._n_text)
        self._n_text += len(self._decoder.push(token))
        lists["token_logprobs"].append(None if found is None else logprob(found.logprob))
        top: dict[str, float] | None = None
        if found is not None and self._top:
            top = {}
            for i, value in found.top:
                # Several tokens may show as the same text; the most probable comes first.
                top.setdefault(self._tokenizer.token_text(i), logprob(value))
            top.setdefault(text, logprob(found.logprob))
        lists["top_logprobs"].append(top)

    def add_prompt(self, sequence: Running) -> None:
        """Takes a prompt, whose log-probabilities are there."""
        prompt = [int(i) for i in sequence.request.prompt]
        for token, found in zip(prompt, [None, *sequence.prompt_logprobs], strict=True):
            self.add(token, found)

    def take(self) -> dict[str, Any]:
        """What was added since the last call."""
        lists, self._lists = self._lists, self._empty()
        return lists if self._top else {**lists, "top_logprobs": None}


class _Answer:
    """A generation as clients of this route read it."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        generation: Generation,
        texts: Sequence[str],
    ) -> None:
        self._service = service
        self._body = body
        self._generation = generation
        tokenizer = service.model.tokenizer
        self._tokens = [
            None if body.logprobs is None else _Tokens(tokenizer, top=body.logprobs > 0)
            for _ in generation.replies
        ]
        # What is still to be said before anything that was generated.
        self._before = dict(enumerate(texts)) if body.echo else {}

    def _take(self, piece: Piece) -> dict[str, Any]:
        """What is new of a choice."""
        i = piece.choice
        text = piece.text
        tokens = self._tokens[i]
        if i in self._before:
            text = self._before.pop(i) + text
            if tokens is not None:
                tokens.add_prompt(self._generation.replies[i].sequence)
        if tokens is not None:
            for each in piece.events:
                if each.token is not None:
                    tokens.add(each.token, each.logprobs)
        return {
            "index": i,
            "text": text,
            "logprobs": None if tokens is None else tokens.take(),
            "finish_reason": piece.finish_reason,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices: list[dict[str, Any]] = [{} for _ in self._tokens]
        async for pieces in self._generation.pieces():
            for piece in pieces:
                choices[piece.choice] = _joined(choices[piece.choice], self._take(piece))
        return {
            **self._service.head("text_completion", "cmpl"),
            "choices": choices,
            "usage": self._generation.usage().body(),
        }

    async def stream(self) -> AsyncGenerator[bytes | None, None]:
        """The answer as events; None where nothing has come for a while."""
        head = self._service.head("text_completion", "cmpl")
        usage = {"usage": None} if self._body.include_usage else {}
        async for pieces in self._generation.pieces(self._service.settings.keep_alive):
            chunks = []
            for choice in map(self._take, pieces):
                if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
                    chunks.append(event({**head, "choices": [choice], **usage}))
            if chunks or not pieces:
                yield b"".join(chunks) or None
        if self._body.include_usage:
            total = self._generation.usage().body()
            yield event({**head, "choices": [], "usage": total})
        yield DONE


def _joined(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A choice with what is new of it."""
    if not before:
        return new
    logprobs = before["logprobs"]
    if logprobs is not None:
        for name, values in new["logprobs"].items():
            if values is not None:
                logprobs[name] += values
    return {**new, "text": before["text"] + new["text"], "logprobs": logprobs}
