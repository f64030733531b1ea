"""The routes, and the app that has them: any ASGI server can run it.

For `serving.py`, and for programs that bring their own server. Apart because here is what there is,
by path; what each route does stands in a file of its own.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import Body as FromBody
from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from bitnet_rs import __version__
from bitnet_rs.server import chat, completions, embeddings, errors, limits, metrics
from bitnet_rs.server.errors import ApiError
from bitnet_rs.server.generation import json_response
from bitnet_rs.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from bitnet_rs.server.service import Service
from bitnet_rs.server.settings import ServerSettings

if TYPE_CHECKING:
    from bitnet_rs.model import Model

# What needs no key: whether the server lives, and the page, which asks for it.
_OPEN: Final = ("/", "/health")


class App:
    """The server of one model, as an ASGI app.

    Args:
        model: The model. It is not closed when the app ends.
        settings: How to serve it; the address is for whoever listens.

    Attributes:
        service: The model as the routes see it.
        traffic: What is being answered, and whether more is taken.
    """

    def __init__(self, model: Model, settings: ServerSettings | None = None) -> None:
        settings = settings or ServerSettings()
        self.service = Service(model, settings)
        self.traffic = limits.Traffic()
        # No documentation pages: they would load scripts from elsewhere.
        app = FastAPI(
            title="bitnet-rs",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            responses={"4XX": {"description": "An error, in the form of OpenAI's API"}},
        )
        errors.install(app)
        _add_routes(app, self.service, self.traffic)
        # The last one added is the first that a request passes.
        app.add_middleware(limits.Body, limit=settings.max_body)
        app.add_middleware(
            limits.Guard,
            api_key=settings.api_key,
            open_paths=_OPEN,
            traffic=self.traffic,
        )
        if settings.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After", "X-Request-Id"],
            )
        app.add_middleware(limits.Hosts, names=settings.host_names)
        app.add_middleware(
            limits.Record,
            metrics=self.service.metrics,
            endpoints=[route.path for route in app.routes if hasattr(route, "path")],
            traffic=self.traffic,
            log_requests=settings.log_requests,
        )
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one connection's request, as ASGI has it."""
        await self._app(scope, receive, send)


def _add_routes(app: FastAPI, service: Service, traffic: limits.Traffic) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(
        request: Request, body: Annotated[ChatRequest, FromBody()]
    ) -> Response:
        return await chat.chat(service, request, body)

    @app.post("/v1/completions")
    async def plain_completions(
        request: Request, body: Annotated[CompletionRequest, FromBody()]
    ) -> Response:
        return await completions.complete(service, request, body)

    @app.post("/v1/embeddings")
    async def embedding(
        request: Request, body: Annotated[EmbeddingRequest, FromBody()]
    ) -> Response:
        return await embeddings.embed(service, request, body)

    @app.post("/tokenize")
    async def tokenize(body: Annotated[TokenizeRequest, FromBody()]) -> Response:
        return await embeddings.tokenize(service, body)

    @app.post("/detokenize")
    async def detokenize(body: Annotated[DetokenizeRequest, FromBody()]) -> Response:
        return await embeddings.detokenize(service, body)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return embeddings.tokenizer_info(service)

    @app.get("/v1/models")
    async def models() -> Response:
        names = [service.name, *(name for name in service.settings.aliases if name != "*")]
        return json_response({"object": "list", "data": [_model(service, n) for n in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_response(_model(service, name))

    @app.head("/health", include_in_schema=False)  # some monitors ask so
    @app.get("/health")
    async def health() -> Response:
        if traffic.draining:
            raise ApiError(503, "the server is about to end", code="shutting_down")
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(service.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})

    if resources.files("bitnet_rs.server").joinpath("page", "__init__.py").is_file():
        from bitnet_rs.server.page import page

        @app.get("/", include_in_schema=False)
        async def chat_page() -> Response:
            found = page()
            return Response(found.html, headers=dict(found.headers))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "bitnet-rs",
        "context_length": service.model.context_length,
    }
