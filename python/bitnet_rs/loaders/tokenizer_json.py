"""The content of a `tokenizer.json`, built from parts that other formats hold.

For `gguf_tokenizer` and `sentencepiece`, which read those formats. Apart because both meet the
same kind of vocabulary: GGUF took its token types, and for Llama's older models its scores, from
sentencepiece. Only plain data here: `bitnet_rs.tokenizer` alone hands it to `tokenizers`.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

# Kinds of tokens, numbered alike in sentencepiece (`SentencePiece.Type`) and in GGUF
# (`tokenizer.ggml.token_type`).
NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6

SPACE: Final = "\u2581"  # stands for a space in sentencepiece's vocabularies

# Each way of cutting a piece in two is tried. sentencepiece trains pieces of at most 16 characters
# unless told otherwise; at this limit a hostile vocabulary still costs time in proportion.
_LONGEST_PIECE: Final = 256


@dataclass(frozen=True)
class TokenizerFiles:
    """What a checkpoint folder says about its tokenizer, wherever it was found.

    Attributes:
        json: The content of tokenizer.json.
        special_tokens: Texts by role: `bos_token`, `eos_token` and their like.
        chat_template: The chat template (jinja), if there is one.
        notes: Sentences about what was not taken as it stands.
    """

    json: dict[str, Any] = field(repr=False)
    special_tokens: dict[str, str]
    chat_template: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before anything else cuts it up.

    Attributes:
        id: Its id.
        content: Its text.
        special: Whether decoding leaves it out.
        lstrip: Whether it takes the spaces before it.
        rstrip: Whether it takes the spaces behind it.
        normalized: Whether it is looked for in the normalized text.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    def json(self) -> dict[str, Any]:
        """The token's entry in `added_tokens`."""
        return {
            "id": self.id,
            "content": self.content,
            "single_word": False,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.special,
        }


def tokenizer_json(
    model: Mapping[str, Any],
    added: Iterable[AddedToken],
    *,
    normalizers: Sequence[Mapping[str, Any]] = (),
    pre_tokenizers: Sequence[Mapping[str, Any]] = (),
    decoder: Mapping[str, Any],
    bos: tuple[str, int] | None,
    eos: tuple[str, int] | None,
) -> dict[str, Any]:
    """A whole tokenizer.json.

    Args:
        model: The `model` object.
        added: The added tokens. Their ids are those of the model's vocabulary.
        normalizers: Normalizers, in order.
        pre_tokenizers: Pre-tokenizers, in order.
        decoder: The decoder.
        bos: Text and id of the token to put in front of a text.
        eos: Text and id of the token to put behind a text.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.json() for token in sorted(added, key=lambda token: token.id)],
        "normalizer": _sequence("normalizers", normalizers),
        "pre_tokenizer": _sequence("pretokenizers", pre_tokenizers),
        "post_processor": _bos_and_eos(bos, eos),
        "decoder": dict(decoder),
        "model": dict(model),
    }


def _sequence(key: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if len(parts) < 2:
        return dict(parts[0]) if parts else None
    return {"type": "Sequence", key: [dict(part) for part in parts]}


def _bos_and_eos(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any] | None:
    if bos is None and eos is None:
        return None

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        ends = [
            None if end is None else {"SpecialToken": {"id": end[0], "type_id": type_id}}
            for end in (bos, eos)
        ]
        middle = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [part for part in (ends[0], middle, ends[1]) if part is not None]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]}
            for text, token_id in filter(None, (bos, eos))
        },
    }


def bpe(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    unknown: str | None = None,
) -> dict[str, Any]:
    """A `model` object of the kind BPE.

    Args:
        vocab: Ids by text.
        merges: Pairs of texts, the first to be merged first.
        ignore_merges: Take a word that is a token as this token, whatever the merges say.
        byte_fallback: Write characters without a token as tokens `<0x00>` to `<0xFF>`.
        unknown: The token for what remains.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": dict(vocab),
        "merges": list(merges),
    }


def byte_token(value: int) -> str:
    """The text of sentencepiece's token for one byte."""
    return f"<0x{value:02X}>"


BYTE_TOKENS: Final = frozenset(map(byte_token, range(256)))


def escape_spaces(prefix: str | None) -> list[dict[str, Any]]:
    """Normalizers of sentencepiece's vocabularies: `prefix` in front, then U+2581 for spaces."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return [space] if prefix is None else [{"type": "Prepend", "prepend": prefix}, space]


def unescape_spaces(*, prefix: bool) -> dict[str, Any]:
    """The decoder that undoes `escape_spaces` and puts bytes together."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def first_repeated(values: Sequence[str]) -> tuple[int, int] | None:
    """The positions of the first two equal values; None where all differ."""
    if len(set(values)) == len(values):
        return None
    seen: dict[str, int] = {}
    for position, value in enumerate(values):
        if value in seen:
            return seen[value], position
        seen[value] = position
    return None


def merges_of_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], where: str
) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Merges that cut texts as sentencepiece does by the scores of pieces.

    sentencepiece starts from characters and, as long as two neighbours together are a piece,
    joins those whose piece has the highest score, the leftmost of equal ones (`bpe_model.cc`). So
    every way to put a piece together is a merge, and the scores give the order. In which order
    the ways of one piece stand does not matter: of two overlapping ones the left is met first.

    Llama's runs of 2 to 16 spaces share one score. There, leftmost means that a run grows until
    it is as long as it can be before the next one starts; longer pieces first says the same.

    Args:
        tokens: Texts of the pieces, all different.
        scores: As many scores.
        types: As many token types. Only normal pieces are put together: user-defined ones are
            found in the text before, and never joined to anything.
        where: What holds them, for messages.

    Returns:
        The merges, the first to be merged first, and notes about what merges cannot say.

    Raises:
        ValueError: A score is not a number, or a piece is absurdly long.
    """
    normal = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    for token, i in normal.items():
        _check_piece(i, token, scores[i], where)
    order = sorted(normal, key=lambda token: (-scores[normal[token]], -len(token), normal[token]))
    ways = {token: _ways(token, normal) for token in order}
    made = [token for token in order if ways[token]]
    tied: list[str] = []
    for _, group in itertools.groupby(made, key=lambda token: scores[normal[token]]):
        equal = list(group)
        if len(equal) > 1 and len(set("".join(equal))) > 1:
            tied += equal
    atoms = {*normal, *(token for i, token in enumerate(tokens) if types[i] == USER_DEFINED)}
    orphans = [token for token in order if _lacks_a_character(token, atoms, ways)]
    unused = [
        token for i, token in enumerate(tokens) if types[i] == UNUSED and _ways(token, normal)
    ]
    merges = [way for token in made for way in ways[token]]
    return merges, _notes(tied, orphans, unused)


def _check_piece(position: int, token: str, score: float, where: str) -> None:
    if len(token) > _LONGEST_PIECE:
        raise ValueError(
            f"{where}: piece {position} has {len(token)} characters; supported: at most "
            f"{_LONGEST_PIECE}, which no trained vocabulary reaches. Fetch the file again"
        )
    if math.isnan(score):
        raise ValueError(
            f"{where}: the score of piece {position} ({token!r}) is not a number; it decides which "
            "piece is put together first. Fetch the file again"
        )


def _ways(token: str, pieces: Collection[str]) -> list[tuple[str, str]]:
    """All cuts of a piece into two pieces."""
    if len(token) > _LONGEST_PIECE:  # of an unused one, which nothing has checked
        return []
    return [
        (token[:cut], token[cut:])
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _lacks_a_character(
    token: str, pieces: Collection[str], ways: Mapping[str, Sequence[tuple[str, str]]]
) -> bool:
    """Whether sentencepiece makes a piece of a character that is no piece, as no merge can."""
    if len(token) < 2:
        return False
    return any(
        end not in pieces and (len(rest) == 1 or bool(ways.get(rest)))
        for end, rest in ((token[0], token[1:]), (token[-1], token[:-1]))
    )


def _notes(tied: Sequence[str], orphans: Sequence[str], unused: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if tied:
        notes.append(
            f"{len(tied)} pieces such as {tied[0]!r} have the score of another one; where such pieces "
            "compete, the longer one is put together first, not the one further left"
        )
    if orphans:
        notes.append(
            f"{len(orphans)} pieces such as {orphans[0]!r} are made of a character that is no "
            "piece itself; they are not put together that way"
        )
    if unused:
        notes.append(
            f"{len(unused)} unused pieces such as {unused[0]!r} are passed over, also on the way "
            "to longer ones"
        )
    return tuple(notes)
