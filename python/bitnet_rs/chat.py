"""A conversation with a model: messages, and turns.

For users, through `Model.chat`. Apart because it is the only place with memory from call to call.
Each turn writes the whole conversation with the chat template. The engine keeps the keys and values
of what was said and computes only what is new, so whatever is done to `messages` in between, the
answer is the one that a fresh start would give.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

from bitnet_rs.checks import check_iterable
from bitnet_rs.completion import Reply, Stream, stream
from bitnet_rs.engine import Running

if TYPE_CHECKING:
    from bitnet_rs.model import Model
    from bitnet_rs.options import Options


class Chat:
    """A conversation. For one thread at a time; the model itself can serve many chats.

    Args:
        model: The model to talk to.
        system: An instruction to put first, as the system message.

    Raises:
        TypeError: `system` is not a string.
        ValueError: The checkpoint has no chat template, or a broken one.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        model.tokenizer.check_chat_template()
        self._model = model
        self._messages: list[dict[str, Any]] = []
        if system is not None:
            if not isinstance(system, str):
                raise TypeError(f"system is of type {type(system).__name__}; wanted a str, or None")
            self.messages.append({"role": "system", "content": system})
        # Weak, so that a stream that is dropped halfway ends there and then.
        self._open: weakref.ref[Stream] | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far: dicts with `role` and `content`.

        It may be edited or replaced between turns, by any sequence of such dicts.

        Raises:
            TypeError: It is replaced by something that is no sequence.
        """
        return self._messages

    @messages.setter
    def messages(self, messages: Iterable[dict[str, Any]]) -> None:
        wanted = "a list of dicts with the keys 'role' and 'content'"
        found = check_iterable("messages", messages, wanted)
        # A list stays the caller's own: edits there are edits here.
        self._messages = found if isinstance(found, list) else list(found)

    def __repr__(self) -> str:
        return f"Chat({self._model.name!r}, {len(self.messages)} messages)"

    def send(self, text: str, **options: Unpack[Options]) -> str:
        """Says something and returns the whole answer.

        Args:
            text: What the user says.
            **options: As `Model.complete`; without `max_tokens`, the answer may be as long as
                the checkpoint says, else as fits the context.

        Raises:
            ValueError: `text` is empty, an option is out of range, or the conversation does not
                fit the context any more. `messages` are as before.
        """
        return "".join(self.stream(text, **options))

    def stream(self, text: str, **options: Unpack[Options]) -> Stream:
        """Says something and returns the answer in pieces, as `Model.stream`.

        Both sides join `messages` when the first piece is asked for, and the answer grows there.
        Closing the stream, or Ctrl-C, ends the turn: what was said so far stays as the answer. If
        nothing was said yet, the turn is taken back.

        Raises:
            ValueError: As `send`; raised here, not at the first piece.
        """
        if not isinstance(text, str) or not text:
            raise ValueError(f"text is {text!r}; wanted a str that is not empty")
        self._end_turn()
        model = self._model
        user = {"role": "user", "content": text}
        prompt = model.tokenizer.apply_chat_template([*self.messages, user])
        # The template writes BOS itself.
        encoded = model.encode(prompt, add_special_tokens=False)
        if not encoded:
            raise ValueError(
                f"{model.checkpoint.path}: the chat template writes nothing for this conversation; "
                "repair it (chat_template.jinja, or chat_template in tokenizer_config.json), or "
                "use complete()"
            )
        ids = model.check_encoded(encoded, "the conversation")
        settings = model.settings(**options)
        request = model.request(
            ids,
            settings,
            name="the conversation",
            cure="start over with clear(), or take old turns out of `messages`",
            default_max_tokens=None,
        )
        model.runner.check(request)
        reply = Reply(Running(request), model.tokenizer, settings.stop)
        turn = Stream(self._turn(reply, user), reply)
        self._open = weakref.ref(turn)
        return turn

    def clear(self) -> None:
        """Starts over: forgets all messages but a system message at the front."""
        self._end_turn()
        first = self.messages[:1]
        # Whatever was put there: starting over must work, and be it from a list of nonsense.
        keep = bool(first) and isinstance(first[0], Mapping) and first[0].get("role") == "system"
        self.messages = first if keep else []

    def _end_turn(self) -> None:
        """Closes the stream of the last turn, if it is still open."""
        turn = self._open() if self._open is not None else None
        if turn is not None:
            turn.close()

    def _turn(self, reply: Reply, user: dict[str, Any]) -> Generator[str, None, None]:
        answer = {"role": "assistant", "content": ""}
        self.messages += [user, answer]
        pieces = stream(self._model.runner, reply)
        try:
            for piece in pieces:
                answer["content"] += piece
                yield piece
        finally:
            pieces.close()
            cut_short = reply.finish_reason in (None, "cancelled")
            untouched = [id(m) for m in self.messages[-2:]] == [id(user), id(answer)]
            if cut_short and not answer["content"] and untouched:
                del self.messages[-2:]
