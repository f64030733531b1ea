"""sentencepiece's `tokenizer.model` to the content of a tokenizer.json.

For `Tokenizer.from_folder`: 1bitLLM's checkpoints have no other tokenizer. Apart because it reads
a format of its own, a protobuf message. The protobuf package would be a dependency, with a file
generated for each of its versions, for a dozen fields; the wire format takes a page.

Ids equal sentencepiece's own (`tests/test_tokenizer_formats.py` compares them). What would make
them differ is refused by name: models of the kind Unigram, where the tokenizers library breaks
ties in another way, and tables of character replacements, which it applies to whole graphemes.
One difference is known: a text that is nothing but one user-defined piece gets no U+2581 in front.
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bitnet_rs.loaders.tokenizer_json import (
    BYTE,
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    AddedToken,
    TokenizerFiles,
    bpe,
    escape_spaces,
    first_repeated,
    merges_of_scores,
    tokenizer_json,
    unescape_spaces,
)

__all__ = ["tokenizer_from_sentencepiece"]

_CURE: Final = (
    "convert it once with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained"
    "(FOLDER), or put the tokenizer.json of the same tokenizer beside it"
)
_DAMAGED: Final = "download or copy the file again"

# `TrainerSpec.ModelType`.
_KINDS: Final = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE: Final = 2

# With a space in front of texts, user-defined pieces are listed in a regular expression.
_MOST_USER_DEFINED: Final = 1000


# The wire format (protobuf.dev/programming-guides/encoding).

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_FIXED: Final = {_FIXED64: 8, _FIXED32: 4}


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    """The number at a position, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _damaged(where, at, "the data ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _damaged(where, at, "a number of more than 64 bits")


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int, int | bytes]]:
    """Yields (field, wire type, value) of one message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, where)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at, where)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, where)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise _damaged(where, at, f"wire type {wire}")
        if size > len(data) - at:
            raise _damaged(where, at, f"{size} bytes announced, {len(data) - at} left")
        yield number, wire, data[at : at + size]
        at += size


def _damaged(where: str, at: int, found: str) -> ValueError:
    return ValueError(
        f"{where}: not a sentencepiece model (at byte {at}: {found}); wanted a protobuf message. "
        f"{_DAMAGED.capitalize()}"
    )


class _Message:
    """The last value of each field of a message, by number."""

    def __init__(self, data: bytes, where: str) -> None:
        self._where = where
        self._values = {number: (wire, value) for number, wire, value in _fields(data, where)}

    def _get(self, number: int, wire: int) -> Any:
        found = self._values.get(number)
        if found is not None and found[0] != wire:
            raise ValueError(
                f"{self._where}: field {number} has wire type {found[0]}; wanted {wire}. This is "
                f"no sentencepiece model, or a damaged one: {_DAMAGED}"
            )
        return None if found is None else found[1]

    def integer(self, number: int, default: int) -> int:
        value = self._get(number, _VARINT)
        return default if value is None else int(value)

    def flag(self, number: int, *, default: bool) -> bool:
        return bool(self.integer(number, int(default)))

    def real(self, number: int) -> float:
        value = self._get(number, _FIXED32)
        return 0.0 if value is None else float(struct.unpack("<f", value)[0])

    def data(self, number: int) -> bytes:
        value = self._get(number, _BYTES)
        return b"" if value is None else bytes(value)

    def text(self, number: int, default: str = "") -> str:
        value = self._get(number, _BYTES)
        try:
            return default if value is None else bytes(value).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._where}: field {number} is not UTF-8 ({error}); {_DAMAGED}"
            ) from None


# The model.


@dataclass(frozen=True)
class _Model:
    """The parts of a `ModelProto` that decide about ids; numbers of fields in `of`."""

    pieces: list[str] = field(repr=False)
    scores: list[float] = field(repr=False)
    types: list[int] = field(repr=False)
    kind: int
    byte_fallback: bool
    space_behind: bool
    named: dict[str, str]
    charsmap: bytes = field(repr=False)
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    @classmethod
    def of(cls, data: bytes, where: str) -> "_Model":
        """Reads a `ModelProto`, defaults and all (`sentencepiece_model.proto`)."""
        pieces: list[str] = []
        scores: list[float] = []
        types: list[int] = []
        parts: dict[int, list[bytes]] = {2: [], 3: []}
        for number, wire, value in _fields(data, where):
            if number not in (1, 2, 3):
                continue
            if wire != _BYTES or not isinstance(value, bytes):
                raise _damaged(where, 0, f"field {number} of wire type {wire}")
            if number == 1:
                piece = _Message(value, f"{where}: piece {len(pieces)}")
                pieces.append(piece.text(1))
                scores.append(piece.real(2))
                types.append(piece.integer(3, NORMAL))
            else:
                parts[number].append(value)
        # protobuf merges messages that are written twice, as if they were one.
        trainer = _Message(b"".join(parts[2]), f"{where}: trainer_spec")
        normalizer = _Message(b"".join(parts[3]), f"{where}: normalizer_spec")
        return cls(
            pieces=pieces,
            scores=scores,
            types=types,
            kind=trainer.integer(3, 1),
            byte_fallback=trainer.flag(35, default=False),
            space_behind=trainer.flag(24, default=False),
            named={
                "unk_token": trainer.text(45, "<unk>"),
                "bos_token": trainer.text(46, "<s>"),
                "eos_token": trainer.text(47, "</s>"),
                "pad_token": trainer.text(48, "<pad>"),
            },
            charsmap=normalizer.data(2),
            add_dummy_prefix=normalizer.flag(3, default=True),
            remove_extra_whitespaces=normalizer.flag(4, default=True),
            escape_whitespaces=normalizer.flag(5, default=True),
        )

    def check(self, where: str) -> None:
        """Refuses what tokenizer.json cannot say exactly."""
        if not self.pieces:
            raise ValueError(f"{where}: holds no pieces; {_DAMAGED}")
        unsupported = (
            (
                self.kind != _BPE,
                f"field `trainer_spec.model_type` is {_KINDS.get(self.kind, self.kind)}",
                "BPE",
            ),
            (
                bool(self.charsmap),
                f"field `normalizer_spec.precompiled_charsmap` holds {len(self.charsmap)} bytes",
                "none",
            ),
            (self.space_behind, "field `treat_whitespace_as_suffix` is true", "false"),
            (not self.escape_whitespaces, "field `escape_whitespaces` is false", "true"),
        )
        for wrong, found, wanted in unsupported:
            if wrong:
                raise ValueError(f"{where}: {found}; supported: {wanted}. Instead, {_CURE}")
        repeated = first_repeated(self.pieces)
        if repeated is not None:
            first, second = repeated
            raise ValueError(
                f"{where}: pieces {first} and {second} are both {self.pieces[first]!r}; wanted "
                f"different ones. {_DAMAGED.capitalize()}"
            )
        if self.types.count(UNKNOWN) != 1 or "" in self.pieces:
            raise ValueError(
                f"{where}: has {self.types.count(UNKNOWN)} unknown pieces and "
                f"{self.pieces.count('')} empty ones; wanted 1 and 0. {_DAMAGED.capitalize()}"
            )
        missing = BYTE_TOKENS.difference(
            piece for piece, kind in zip(self.pieces, self.types, strict=True) if kind == BYTE
        )
        if self.byte_fallback and missing:
            raise ValueError(
                f"{where}: field `trainer_spec.byte_fallback` is true, but {len(missing)} bytes "
                f"such as {min(missing)} are no pieces; wanted 256. {_DAMAGED.capitalize()}"
            )


def tokenizer_from_sentencepiece(
    data: bytes,
    where: str,
    *,
    add_bos: bool = True,
    add_eos: bool = False,
    added_tokens: Sequence[AddedToken] = (),
    special_tokens: Mapping[str, str] | None = None,
    legacy: bool = True,
) -> TokenizerFiles:
    """Converts a sentencepiece model, with what transformers keeps beside it.

    Args:
        data: The file's content.
        where: The file, for messages.
        add_bos: Put BOS in front of a text, as the slow tokenizers of transformers do.
        add_eos: Put EOS behind it.
        added_tokens: Tokens beyond the model's pieces.
        special_tokens: Texts by role where they are not those of the model.
        legacy: Start each stretch of text between special tokens with a space, as transformers
            did first, and not only a text's beginning. The newer way follows the tokenizers
            library, which adds none to a text that starts with one.

    Returns:
        The content of a tokenizer.json, and the special tokens.

    Raises:
        ValueError: The file is damaged, the model is of a kind whose ids could differ, or an added
            token contradicts it.
    """
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        raise ValueError(
            f"{where}: looks like a list of ranks as tiktoken reads it, not like a sentencepiece "
            f"model. Instead, {_CURE}"
        )
    model = _Model.of(data, where)
    model.check(where)
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    added = _added(model, added_tokens, ids, where)
    named = {role: text for role, text in model.named.items() if text in ids}
    named.update(special_tokens or {})
    ids.update((token.content, token.id) for token in added)

    def end(role: str) -> tuple[str, int]:
        text = named.get(role)
        if text not in ids:
            raise ValueError(
                f"{where}: {role} is {text!r}, which is no piece and no added token, but is to be "
                f"put around texts; name another one in tokenizer_config.json, or set "
                f"add_{role} to false there"
            )
        return text, ids[text]

    merges, notes = merges_of_scores(model.pieces, model.scores, model.types, where)
    prefix = model.add_dummy_prefix
    json = tokenizer_json(
        bpe(
            ids,
            merges,
            byte_fallback=model.byte_fallback,
            unknown=model.pieces[model.types.index(UNKNOWN)],
        ),
        added,
        normalizers=_normalizers(model, where, legacy=legacy),
        pre_tokenizers=[] if legacy or not prefix else [_FIRST],
        decoder=unescape_spaces(prefix=prefix),
        bos=end("bos_token") if add_bos else None,
        eos=end("eos_token") if add_eos else None,
    )
    return TokenizerFiles(json, named, notes=tuple(f"{where}: {note}" for note in notes))


# Puts a space in front of a text, but not behind a special token in it.
_FIRST: Final = {
    "type": "Metaspace",
    "replacement": SPACE,
    "prepend_scheme": "first",
    "split": False,
}


def _added(
    model: _Model, extra: Sequence[AddedToken], ids: Mapping[str, int], where: str
) -> list[AddedToken]:
    """All tokens that are found before pieces are put together."""
    tokens = {}
    for i, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True)):
        if kind in (CONTROL, UNKNOWN):
            tokens[i] = AddedToken(i, piece)
        elif kind == USER_DEFINED and " " not in piece:
            # sentencepiece looks for these when spaces have been written as U+2581, so that it
            # never finds one with a space.
            tokens[i] = AddedToken(i, piece, special=False, normalized=True)
    texts = {token.content: token.id for token in tokens.values()}
    for token in extra:
        held = model.pieces[token.id] if token.id < len(model.pieces) else token.content
        clash = texts.get(token.content, ids.get(token.content, token.id))
        if held != token.content or clash != token.id or not token.content or token.id < 0:
            raise ValueError(
                f"{where}: the added token {token.content!r} has the id {token.id}, but that id "
                f"is {held!r}, or the token has the id {clash} elsewhere; wanted one text to one "
                "id. Fetch added_tokens.json, tokenizer_config.json and tokenizer.model of the "
                "same model"
            )
        kept = tokens.get(token.id)
        if kept is not None and kept.content != token.content:
            raise ValueError(
                f"{where}: the added tokens {kept.content!r} and {token.content!r} have the same "
                f"id {token.id}; fetch added_tokens.json and tokenizer_config.json again"
            )
        texts[token.content] = token.id
        if kept is None or not kept.normalized:
            tokens[token.id] = token
    return list(tokens.values())


def _normalizers(model: _Model, where: str, *, legacy: bool) -> list[dict[str, Any]]:
    """What happens to a text before pieces are looked for, in sentencepiece's order.

    Each is applied to the texts of user-defined pieces as well, before they are looked for; so
    the prefix is taken away again where nothing else is there.
    """

    def replaced(regex: str, content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}

    user_defined = [
        piece
        for piece, kind in zip(model.pieces, model.types, strict=True)
        if kind == USER_DEFINED and " " not in piece
    ]
    prefix = SPACE if model.add_dummy_prefix and legacy else None
    steps = escape_spaces(prefix)
    if prefix and user_defined:
        if len(user_defined) > _MOST_USER_DEFINED:
            raise ValueError(
                f"{where}: has {len(user_defined)} user-defined pieces and adds a space to texts; "
                f"supported: at most {_MOST_USER_DEFINED}. Instead, {_CURE}"
            )
        alone = "|".join("".join(f"\\x{{{ord(c):x}}}" for c in piece) for piece in user_defined)
        steps.append(replaced(f"\\A{SPACE}(?=(?:{alone})\\z)", ""))
    if not model.remove_extra_whitespaces:
        return steps
    if any(SPACE in piece for piece in user_defined):
        raise ValueError(
            f"{where}: field `normalizer_spec.remove_extra_whitespaces` is true, and there are "
            f"user-defined pieces with spaces; supported: one of both. Instead, {_CURE}"
        )
    return [
        replaced(r"\A +", ""),
        replaced(" {2,}", " "),
        *steps,
        replaced(f"{SPACE}+\\z", ""),
    ]
