"""`POST /v1/embeddings`, `/tokenize` and `/detokenize`: what needs no generation.

For `app.py`. Apart because the engine has no part in it: embeddings are computed in a thread, one
request at a time, text by text, so that a client that leaves is not computed for.
"""

from __future__ import annotations

import base64
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from bitnet_rs.engine import check_ids
from bitnet_rs.server.errors import ApiError, bad_request
from bitnet_rs.server.generation import NoResponse, json_response, unless_left

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from starlette.requests import Request
    from starlette.responses import Response

    from bitnet_rs.server.protocol import (
        DetokenizeRequest,
        EmbeddingRequest,
        TokenIds,
        TokenizeRequest,
    )
    from bitnet_rs.server.service import Service

# Texts that are computed before looking whether the client is still there.
_AT_ONCE: Final = 8


async def embed(service: Service, request: Request, body: EmbeddingRequest) -> Response:
    """Embeds texts.

    Raises:
        ApiError: It cannot be served.
    """
    service.check_model(body.model)
    model = service.model
    if not model.checkpoint.embedding:
        raise bad_request(
            f"{service.name} is a model that writes text, not one for embeddings, such as "
            "microsoft/bitnet-embedding-0.6b",
            "model",
            "model_not_supported",
        )
    hidden = int(model.facts["hidden_size"])
    if body.dimensions is not None and body.dimensions != hidden:
        raise bad_request(
            f"dimensions is {body.dimensions}; this model's embeddings have {hidden}, and were not "
            "trained to be cut",
            "dimensions",
            "unsupported_parameter",
        )
    inputs = body.inputs()
    ids = await service.prepare(
        lambda: [_ids(service, each, i, len(inputs)) for i, each in enumerate(inputs)]
    )
    rows = await unless_left(request.receive, _compute(service, ids))
    if rows is None:
        return NoResponse()
    n_tokens = sum(map(len, ids))
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(row, body.encoding_format)}
        for i, row in enumerate(rows)
    ]
    return json_response(
        {
            "object": "list",
            "data": data,
            "model": service.name,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }
    )


def _ids(service: Service, given: str | TokenIds, i: int, n: int) -> NDArray[np.uint32]:
    model = service.model
    name = "input" if n == 1 else f"input[{i}]"
    if isinstance(given, str):
        if not given:
            raise bad_request(f"{name} is empty; wanted some text", name)
        ids = model.check_encoded(model.tokenizer.encode_prompt(given), name)
    else:
        try:
            ids = check_ids(given, model.vocab_size, name)
        except ValueError as error:
            raise bad_request(str(error), name) from None
    if len(ids) > model.context_length:
        raise bad_request(
            f"{name} has {len(ids)} tokens; the context holds {model.context_length}: embed it in "
            "pieces",
            name,
            "context_length_exceeded",
        )
    return ids


async def _compute(service: Service, ids: list[NDArray[np.uint32]]) -> list[NDArray[np.float32]]:
    most = service.settings.max_queue
    if service.embeddings_waiting >= most + 1:
        raise ApiError(
            429,
            f"{most} requests wait already; try again later",
            code="queue_full",
            headers={"Retry-After": "1"},
        )
    service.embeddings_waiting += 1
    try:
        async with service.embedding_turn:
            rows: list[NDArray[np.float32]] = []
            for at in range(0, len(ids), _AT_ONCE):
                part = ids[at : at + _AT_ONCE]
                rows += list(await service.prepare(partial(service.model.embed_ids, part)))
            return rows
    finally:
        service.embeddings_waiting -= 1


def _encoded(row: NDArray[np.float32], form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return [float(value) for value in row]


async def tokenize(service: Service, body: TokenizeRequest) -> Response:
    """Token ids of a text."""
    service.check_model(body.model)
    text = body.given()
    encode = partial(
        service.model.tokenizer.encode, text, add_special_tokens=body.add_special_tokens
    )
    ids = await service.prepare(encode)
    return json_response({"tokens": ids, "count": len(ids)})


async def detokenize(service: Service, body: DetokenizeRequest) -> Response:
    """The text of token ids."""
    service.check_model(body.model)
    decode = partial(
        service.model.tokenizer.decode, body.tokens, skip_special_tokens=body.skip_special_tokens
    )
    text = await service.prepare(decode)
    # Once more by the name that vLLM has for it, which evaluation harnesses read.
    return json_response({"text": text, "prompt": text})


def tokenizer_info(service: Service) -> Response:
    """What clients that write prompts themselves want to know, by the names that vLLM has."""
    tokenizer = service.model.tokenizer
    special: dict[str, Any] = dict(tokenizer.special_tokens)
    return json_response({**special, "chat_template": tokenizer.chat_template})
