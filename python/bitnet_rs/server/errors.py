"""Errors as OpenAI's clients expect them, whatever went wrong.

For all files of the server. Apart because there is one form for all of them:
`{"error": {"message", "type", "param", "code"}}`, and what is inside the server stays there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

# What Python says of a request's values is cut off here in messages.
_MAX_SHOWN = 80

_INTERNAL = "something went wrong in the server; its log says what"


class ApiError(Exception):
    """A request cannot be served.

    Args:
        status: HTTP status.
        message: What was found, what was wanted, the cure.
        param: The field of the request it is about.
        code: A word for programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that says so."""
        return {
            "error": {
                "message": self.message,
                "type": _type_of(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The whole answer."""
        return Response(
            json.dumps(self.body(), ensure_ascii=False),
            self.status,
            self.headers,
            media_type="application/json",
        )


def _type_of(status: int) -> str:
    """OpenAI's word for a class of errors."""
    if status == 429:
        return "rate_limit_error"
    if status in (401, 403):
        return "authentication_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request asks for what cannot be done."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """What a client learns of an error that is not its own."""
    return ApiError(500, _INTERNAL, code="internal_error")


def shown(value: object) -> str:
    """A value of a request, for a message: not longer than a line."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _locate(body: Any, loc: tuple[int | str, ...]) -> tuple[str, Any]:
    """Where in the body an error is, as `messages[0].content`, and what stands there.

    Pydantic's paths also name the alternatives of unions, which are no part of the body.
    """
    name, value = "", body
    for step in loc:
        if isinstance(step, str) and isinstance(value, dict) and step in value:
            name, value = f"{name}.{step}".lstrip("."), value[step]
        elif isinstance(step, int) and isinstance(value, list) and step < len(value):
            name, value = f"{name}[{step}]", value[step]
    return name, value


def validation_error(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, in a line: the field, what stands there, what was wanted."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        at = errors[0]["loc"][-1]
        return bad_request(
            f"the body is not JSON: {errors[0]['ctx']['error']} at character {at}",
            code="invalid_json",
        )
    first = errors[0]
    param, value = _locate(error.body, first["loc"][1:])
    if first["type"] == "missing":
        missing = str(first["loc"][-1])
        if missing == "body":
            return bad_request("the body is empty; wanted a JSON object")
        param = f"{param}.{missing}".lstrip(".")
        return bad_request(f"{param} is missing", param)
    # Alternatives of a union that all failed at the same place are told together.
    wanted: dict[str, None] = {}
    for each in errors:
        if _locate(error.body, each["loc"][1:])[0] == param:
            wanted.setdefault(_wanted(each))
    where = param or "the body"
    return bad_request(f"{where} is {shown(value)}; wanted {' or '.join(wanted)}", param or None)


def _wanted(error: dict[str, Any]) -> str:
    """What pydantic says was wanted, as the end of a sentence."""
    if error["type"] == "too_short":
        return f"at least {error['ctx']['min_length']}"
    message: str = error["msg"].removeprefix("Input should be ")
    return message[:1].lower() + message[1:]


def install(app: FastAPI) -> None:
    """Makes an app answer all errors in this form."""

    async def api(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _of_http(request, error).response()

    async def other(_: Request, __: Exception) -> Response:
        return internal_error().response()

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, other)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    """The framework's own errors: no such path, no such method, a body that cannot be parsed."""
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"there is nothing at {request.url.path}", "not_found"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        message = f"{request.method} is not for {request.url.path}; wanted {allowed}"
        code = "method_not_allowed"
    elif error.status_code == 400:  # from the framework: bad UTF-8, or nested too deeply
        message, code = "the body is not JSON that can be read", "invalid_json"
    return ApiError(error.status_code, message, code=code, headers=error.headers)
