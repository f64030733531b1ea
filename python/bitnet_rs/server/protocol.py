"""Requests as clients write them: OpenAI's fields, and a few of our own.

For `app.py` and what serves each route. Apart because these are agreed with the outside: what is
here is checked for its form before anything is computed. Fields that are not known are ignored, as
clients send all sorts; fields that are known and would change the result, but are not supported,
are refused by name rather than ignored.

Answers are plain dicts, made where they are sent: there may be thousands a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from bitnet_rs.options import Options
from bitnet_rs.server.errors import bad_request, shown

# Most of the most probable tokens that are reported with each token.
MAX_LOGPROBS: Final = 20

# Each is looked for at each token.
_MAX_STOPS: Final = 64
_MAX_STOP: Final = 1000

TokenIds = list[StrictInt]


class _Strict(BaseModel):
    """Numbers are numbers here: no "5", no true for 1."""

    model_config = ConfigDict(strict=True)


class _Message(_Strict):
    """What a chat template gets, which may look at more fields than those named here."""

    model_config = ConfigDict(strict=True, extra="allow")


class TextPart(_Strict):
    """A part of a message's content; only text is read."""

    type: str
    text: str | None = None


class Message(_Message):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(_Strict):
    """What else a stream is to tell."""

    include_usage: bool | None = None


class _Generation(_Strict):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ours.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    response_format: dict[str, Any] | None = None
    # Known, and refused where they would change anything.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def options(self) -> Options:
        """Those that `Model.settings` takes as they are."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": self.stop or None,
            "ignore_eos": bool(self.ignore_eos),
        }

    def check_supported(self) -> None:
        """Refuses what would change the result and is not there.

        Raises:
            ApiError: A field asks for it.
        """
        for name in ("frequency_penalty", "presence_penalty"):
            if value := getattr(self, name):
                raise _unsupported(name, value, "0; repetition_penalty is supported")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > _MAX_STOPS or any(len(each) > _MAX_STOP for each in stops):
            raise bad_request(
                f"stop has {len(stops)} strings; wanted up to {_MAX_STOPS}, of up to {_MAX_STOP} "
                "characters",
                "stop",
            )
        if self.logit_bias:
            raise _unsupported("logit_bias", self.logit_bias, "none")
        if self.stream_options is not None and not self.stream:
            raise bad_request(
                "stream_options is for streams; wanted stream: true", "stream_options"
            )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(_Generation):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    web_search_options: dict[str, Any] | None = None

    def check_supported(self) -> None:
        """Refuses what would change the result and is not there."""
        super().check_supported()
        if self.modalities not in (None, ["text"]):
            raise _unsupported("modalities", self.modalities, '["text"]')
        for name in ("audio", "web_search_options"):
            if (value := getattr(self, name)) is not None:
                raise _unsupported(name, value, "none")
        for name, new in (("functions", "tools"), ("function_call", "tool_choice")):
            if value := getattr(self, name):
                raise _unsupported(name, value, f"{new}, which took its place")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs is for logprobs; wanted logprobs: true", "top_logprobs")

    @property
    def most_tokens(self) -> tuple[str, int | None]:
        """How many tokens are asked for, by OpenAI's new name or the old one, and which of them."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def template_messages(self) -> list[dict[str, Any]]:
        """The messages as chat templates know them: contents are texts.

        Raises:
            ApiError: A part is no text.
        """
        return [_template_message(i, message) for i, message in enumerate(self.messages)]


class CompletionRequest(_Generation):
    """The body of `POST /v1/completions`."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: int | None = None

    def check_supported(self) -> None:
        """Refuses what would change the result and is not there."""
        super().check_supported()
        if self.suffix:
            raise _unsupported("suffix", self.suffix, "none")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _unsupported("best_of", self.best_of, f"the value of n ({self.n or 1})")

    def prompts(self) -> Sequence[str | TokenIds]:
        """The prompts, always as a list.

        Raises:
            ApiError: There are none.
        """
        return _listed(self.prompt, "prompt")


class EmbeddingRequest(_Strict):
    """The body of `POST /v1/embeddings`."""

    model: str | None = None
    input: str | TokenIds | list[str] | list[TokenIds]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def inputs(self) -> Sequence[str | TokenIds]:
        """What is to be embedded, always as a list.

        Raises:
            ApiError: There is nothing.
        """
        return _listed(self.input, "input")


class TokenizeRequest(_Strict):
    """The body of `POST /tokenize`. The text goes by the name that other servers have for it."""

    model: str | None = None
    text: str | None = None
    content: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True

    def given(self) -> str:
        """The text.

        Raises:
            ApiError: There is none, or several.
        """
        found = [t for t in (self.text, self.content, self.prompt) if t is not None]
        if len(found) != 1:
            raise bad_request(f"{len(found)} texts are given; wanted text, once", "text")
        return found[0]


class DetokenizeRequest(_Strict):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


def _unsupported(name: str, value: object, wanted: str) -> Exception:
    return bad_request(
        f"{name} is {shown(value)}, which this server does not support; wanted {wanted}",
        name,
        "unsupported_parameter",
    )


def _listed(
    given: str | TokenIds | list[str] | list[TokenIds], name: str
) -> Sequence[str | TokenIds]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise bad_request(f"{name} is empty; wanted text, or token ids", name)
    ids = [each for each in given if isinstance(each, int)]  # all of them, or none
    return [ids] if ids else [each for each in given if not isinstance(each, int)]


def _template_message(position: int, message: Message) -> dict[str, Any]:
    plain = message.model_dump(exclude_unset=True)
    # The name that newer OpenAI models have for it; templates know the old one.
    plain["role"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        plain["content"] = _text_of(message.content, f"messages[{position}].content")
    elif message.content is None:
        if message.role != "assistant" or not message.tool_calls:
            name = f"messages[{position}].content"
            raise bad_request(f"{name} is missing; wanted text", name)
        plain["content"] = ""
    return plain


def _text_of(parts: list[TextPart], name: str) -> str:
    for i, part in enumerate(parts):
        if part.type != "text":
            raise bad_request(
                f"{name}[{i}].type is {shown(part.type)}; this server reads text only",
                f"{name}[{i}].type",
                "unsupported_content",
            )
        if part.text is None:
            raise bad_request(f"{name}[{i}].text is missing", f"{name}[{i}].text")
    return "\n".join(part.text or "" for part in parts)
