"""Tokenizers in GGUF metadata: to the content of a tokenizer.json, and back.

For `Tokenizer.from_gguf`, and for writing GGUF files. Apart from reading GGUF files because it
needs the metadata only, and from `tokenizer_json` because what the keys mean, and what holds where
one is missing, is the business of GGUF and llama.cpp alone.

Two kinds of tokenizers are known. `gpt2` is byte-level BPE: a list of merges, and the name of a
rule (`pre`) that cuts a text into words first. `llama` is sentencepiece: scores instead of merges,
no words, bytes as a fallback.
"""

import itertools
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.tokenizer_json import (
    BYTE,
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
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

__all__ = ["gguf_from_tokenizer", "tokenizer_from_gguf"]

_PREFIX: Final = "tokenizer.ggml."
_TEMPLATE: Final = "tokenizer.chat_template"
_CURE: Final = "fetch the file again, or convert the model again"

# The models of Microsoft's own converter, which writes neither `pre` nor the right template.
_BITNET: Final = ("bitnet", "bitnet-25", "bitnet-b1.58")

# Regular expressions of the original tokenizer.json files.
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# The one that `ByteLevel` brings along, written out as some files have it.
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Rule:
    """How a byte-level tokenizer prepares a text.

    Attributes:
        regex: Matches words.
        digits: Each digit is a word of its own, before anything else.
        nfc: Texts are brought to Unicode's form NFC first. llama.cpp leaves that out; the
            models were trained with it.
        ignore_merges: A word that is a token is taken as this token.
    """

    regex: str
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False


# Names of `tokenizer.ggml.pre`, as in llama.cpp's `llama-vocab.cpp` (`falcon_e`: in bitnet.cpp's
# fork). Of those that mean the same the first is written.
_RULES: Final[Mapping[str, _Rule]] = {
    "llama-bpe": _Rule(_LLAMA3, ignore_merges=True),
    "llama3": _Rule(_LLAMA3, ignore_merges=True),
    "llama-v3": _Rule(_LLAMA3, ignore_merges=True),
    "falcon3": _Rule(_LLAMA3, ignore_merges=True),
    "falcon_e": _Rule(_LLAMA3, ignore_merges=True),
    "smaug-bpe": _Rule(_LLAMA3),
    "gpt-2": _Rule(_GPT2),
    "olmo": _Rule(_GPT2, nfc=True),  # GPT-NeoX, as in TriLM
    "mpt": _Rule(_GPT2, nfc=True),
    "qwen2": _Rule(_QWEN2, nfc=True),
    "grok-2": _Rule(_QWEN2),
    "smollm": _Rule(_GPT2, digits=True),
    "starcoder": _Rule(_GPT2, digits=True),
    "refact": _Rule(_GPT2, digits=True),
}
_DEFAULT_RULE: Final = "llama-bpe"
# Where `add_bos_token` is missing, llama.cpp adds BOS for these, and for sentencepiece.
_ADD_BOS: Final = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon_e")

# Roles in special_tokens_map.json and the keys that name them in GGUF.
_ROLES: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "eot_token": "eot_token_id",
}
# What llama.cpp assumes for sentencepiece where a key is missing, and the type it then must have.
_SENTENCEPIECE_ROLES: Final = {
    "unk_token": (0, UNKNOWN),
    "bos_token": (1, CONTROL),
    "eos_token": (2, CONTROL),
}

# What microsoft/bitnet-b1.58-2B-4T has in tokenizer_config.json. Its GGUF file has a template of
# another model, with which it does not stop: recognised by both marks.
_WRONG_TEMPLATE: Final = ("Human: ", "BITNETAssistant: ")
_RIGHT_TEMPLATE: Final = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = message['role'] | capitalize + ': '+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


# From GGUF.


class _Metadata:
    """Typed access to metadata; whatever has the wrong type is refused by its key."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self.where = where

    def fail(self, key: str, found: str, wanted: str, cure: str = _CURE) -> ValueError:
        return ValueError(f"{self.where}: field `{key}` {found}; wanted {wanted}: {cure}")

    def __contains__(self, key: str) -> bool:
        return key in self._metadata

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, f"is a {type(value).__name__}", "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:  # noqa: FBT001 (a value, not an option)
        value = self._metadata.get(key, default)
        if not isinstance(value, bool | np.bool_):
            raise self.fail(key, f"is {reprlib.repr(value)}", "true or false")
        return bool(value)

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(key)
        if value is None:
            raise self.fail(key, "is missing", "a list of strings")
        if not isinstance(value, list) or not all(type(entry) is str for entry in value):
            raise self.fail(key, f"is a {type(value).__name__}", "a list of strings")
        try:
            "".join(value).encode()
        except UnicodeEncodeError:
            wrong = next(i for i, entry in enumerate(value) if not _is_text(entry))
            raise self.fail(key, f"has an entry {wrong} that is not UTF-8", "text") from None
        return value

    def numbers(self, key: str, kinds: str, length: int) -> NDArray[Any]:
        value = np.asarray(self._metadata[key])
        if value.dtype.kind not in kinds or value.shape != (length,):
            raise self.fail(
                key,
                f"is an array of {value.dtype} of shape {value.shape}",
                f"{length} {'integers' if kinds == 'iu' else 'numbers'}, one for each token",
            )
        return value

    def token_id(self, key: str, count: int) -> int | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise self.fail(key, f"is {reprlib.repr(value)}", "a token id")
        if not 0 <= value < count:
            raise self.fail(key, f"is {value}", f"a token id, 0 to {count - 1}")
        return int(value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by id, with what stands for no text (padding of the embedding) left out of `ids`."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    roles: dict[str, int]

    def added(self) -> list[AddedToken]:
        return [
            AddedToken(i, self.tokens[i], special=kind != USER_DEFINED)
            for i, kind in enumerate(self.types)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def token(self, role: str) -> tuple[str, int] | None:
        found = self.roles.get(role)
        return None if found is None else (self.tokens[found], found)


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> TokenizerFiles:
    """Builds the tokenizer that GGUF metadata describes.

    Args:
        metadata: The file's metadata: scalars, strings, lists of strings, and numpy arrays for
            arrays of numbers.
        where: The file, for messages.

    Returns:
        The content of a tokenizer.json, the special tokens and the chat template. `notes` says
        what was replaced or assumed.

    Raises:
        FileNotFoundError: The file holds no tokenizer.
        ValueError: The tokenizer is of a kind that is not known, or a key is missing, malformed
            or contradicts another one.
    """
    reader = _Metadata(metadata, where)
    kind = reader.text(_PREFIX + "model")
    if kind is None or kind in ("no_vocab", "none"):
        found = "is missing" if kind is None else f"is {kind!r}"
        raise FileNotFoundError(
            f"{where}: holds no tokenizer (field `{_PREFIX}model` {found}). Use a file that has "
            "one, or the safetensors checkpoint of the same model"
        )
    if kind == "gpt2":
        json, vocabulary, notes = _byte_level(reader)
    elif kind == "llama":
        json, vocabulary, notes = _sentencepiece(reader)
    else:
        raise reader.fail(
            _PREFIX + "model",
            f"is {kind!r}",
            "'gpt2' (byte-level BPE) or 'llama' (sentencepiece)",
            "put the tokenizer.json of the same model to use with the safetensors checkpoint",
        )
    template, replaced = _chat_template(reader)
    return TokenizerFiles(
        json=json,
        special_tokens={role: vocabulary.tokens[i] for role, i in vocabulary.roles.items()},
        chat_template=template,
        notes=(*notes, *replaced),
    )


def _vocabulary(reader: _Metadata, default_roles: Mapping[str, tuple[int, int]]) -> _Vocabulary:
    key = _PREFIX + "tokens"
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(reader.strings(key))]
    count = len(tokens)
    types = [NORMAL] * count
    if _PREFIX + "token_type" in reader:
        types = reader.numbers(_PREFIX + "token_type", "iu", count).tolist()
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED or token != _padding(i)
    }
    repeated = first_repeated(tokens)
    if repeated is not None:
        first, second = repeated
        text = reprlib.repr(tokens[first])
        raise reader.fail(key, f"has {text} twice, as {first} and {second}", "different tokens")
    roles = {
        role: found
        for role, name in _ROLES.items()
        if (found := reader.token_id(_PREFIX + name, count)) is not None
    }
    for role, (token_id, kind) in default_roles.items():
        if token_id < count and types[token_id] == kind:
            roles.setdefault(role, token_id)
    return _Vocabulary(tokens, types, ids, roles)


def _padding(token_id: int) -> str:
    """The text of a token that only makes the vocabulary as large as the embedding."""
    return f"[PAD{token_id}]"


def _ends(
    reader: _Metadata, vocabulary: _Vocabulary, *, add_bos: bool
) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """The tokens before and behind a text; `add_bos` holds where the file does not say."""

    def end(name: str, default: bool) -> tuple[str, int] | None:  # noqa: FBT001 (a value)
        if not reader.flag(f"{_PREFIX}add_{name}_token", default):
            return None
        token = vocabulary.token(f"{name}_token")
        if token is None:
            raise reader.fail(
                f"{_PREFIX}{name}_token_id",
                "is missing",
                f"the id of a token, as `{_PREFIX}add_{name}_token` asks for one around texts (for "
                "some kinds of tokenizers also where it is missing)",
            )
        return token

    return end("bos", add_bos), end("eos", False)


def _byte_level(reader: _Metadata) -> tuple[dict[str, Any], _Vocabulary, tuple[str, ...]]:
    vocabulary = _vocabulary(reader, {})
    name, notes = _rule_name(reader, vocabulary)
    rule = _RULES[name]
    merges = _merges(reader, vocabulary.ids)
    bos, eos = _ends(reader, vocabulary, add_bos=name in _ADD_BOS)
    pre: list[dict[str, Any]] = []
    if rule.digits:
        pre.append({"type": "Digits", "individual_digits": True})
    if rule.regex != _GPT2:
        split = {"Regex": rule.regex}
        pre.append({"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    json = tokenizer_json(
        bpe(vocabulary.ids, merges, ignore_merges=rule.ignore_merges),
        vocabulary.added(),
        normalizers=[{"type": "NFC"}] if rule.nfc else [],
        pre_tokenizers=[*pre, {**level, "use_regex": rule.regex == _GPT2}],
        decoder={**level, "use_regex": True},
        bos=bos,
        eos=eos,
    )
    return json, vocabulary, notes


def _rule_name(reader: _Metadata, vocabulary: _Vocabulary) -> tuple[str, tuple[str, ...]]:
    key = _PREFIX + "pre"
    name = reader.text(key)
    if name is not None and name in _RULES:
        return name, ()
    known = f"one of {', '.join(_RULES)}"
    if name not in (None, "", "default"):
        raise reader.fail(
            key, f"is {name!r}", known, "use the safetensors checkpoint of the same model"
        )
    arch = reader.text("general.architecture")
    if arch not in _BITNET and "<|begin_of_text|>" not in vocabulary.ids:
        raise reader.fail(
            key,
            "is missing, and the tokens are not those of Llama 3",
            known,
            "convert the model again with a newer converter, or use its safetensors checkpoint",
        )
    note = f"{reader.where}: field `{key}` is missing; texts are cut up as by {_DEFAULT_RULE}"
    return _DEFAULT_RULE, (note,)


def _merges(reader: _Metadata, ids: Collection[str]) -> list[list[str]]:
    """Merges as pairs. Of equal ones the first counts, as in llama.cpp."""
    key = _PREFIX + "merges"
    # Byte-level tokens hold no space, so the only one stands between the two halves.
    pairs = [merge.split(" ") for merge in dict.fromkeys(reader.strings(key))]
    for pair in pairs:
        if len(pair) == 2 and pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids:
            continue
        raise reader.fail(
            key,
            f"has the merge {reprlib.repr(' '.join(pair))}",
            "two tokens with a space between, which together are a token",
        )
    return pairs


def _sentencepiece(reader: _Metadata) -> tuple[dict[str, Any], _Vocabulary, tuple[str, ...]]:
    vocabulary = _vocabulary(reader, _SENTENCEPIECE_ROLES)
    tokens, types = vocabulary.tokens, vocabulary.types
    key = _PREFIX + "scores"
    if key not in reader:
        raise reader.fail(key, "is missing", "a score for each token, which says what to merge")
    scores = reader.numbers(key, "iuf", len(tokens)).tolist()
    bytes_ = [token for token, kind in zip(tokens, types, strict=True) if kind == BYTE]
    wrong = next((token for token in bytes_ if token not in BYTE_TOKENS), None)
    if wrong is not None:
        raise reader.fail(
            _PREFIX + "token_type",
            f"says that {reprlib.repr(wrong)} is a byte",
            "bytes as <0x00> to <0xFF>",
        )
    merges, notes = merges_of_scores(tokens, scores, types, f"{reader.where}: field `{key}`")
    bos, eos = _ends(reader, vocabulary, add_bos=True)
    prefix = reader.flag(_PREFIX + "add_space_prefix", True)
    unknown = vocabulary.token("unk_token")
    json = tokenizer_json(
        bpe(
            vocabulary.ids,
            merges,
            byte_fallback=bool(bytes_),
            unknown=None if unknown is None else unknown[0],
        ),
        vocabulary.added(),
        normalizers=escape_spaces(SPACE if prefix else None),
        decoder=unescape_spaces(prefix=prefix),
        bos=bos,
        eos=eos,
    )
    return json, vocabulary, tuple(f"{reader.where}: {note}" for note in notes)


def _chat_template(reader: _Metadata) -> tuple[str | None, tuple[str, ...]]:
    template = reader.text(_TEMPLATE)
    if template is None or not all(mark in template for mark in _WRONG_TEMPLATE):
        return template, ()
    if reader.text("general.architecture") not in _BITNET:
        return template, ()
    note = (
        f"{reader.where}: field `{_TEMPLATE}` holds the template of another model ('Human: ...', "
        "'BITNETAssistant: '), with which this one does not stop; the one of "
        "microsoft/bitnet-b1.58-2B-4T is used instead"
    )
    return _RIGHT_TEMPLATE, (note,)


# To GGUF.


def gguf_from_tokenizer(
    tokenizer_json: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    chat_template: str | None,
    vocab_size: int,
    where: str,
) -> dict[str, Any]:
    """Writes a tokenizer as GGUF metadata, so that `tokenizer_from_gguf` gives the same ids.

    Args:
        tokenizer_json: The content of a tokenizer.json.
        special_tokens: Texts by role: `bos_token`, `eos_token`, `unk_token`, `pad_token`,
            `eot_token`. A text that is no token is left out.
        chat_template: The chat template, or None.
        vocab_size: Rows of the embedding. Ids without a token are padded with unused ones.
        where: The tokenizer's file, for messages.

    Returns:
        Metadata by key: int (ids), bool, str, list[str], and numpy arrays: int32 for token types,
        float32 for scores; both of shape (vocab_size,).

    Raises:
        ValueError: GGUF has no words for this tokenizer; the message says for what.
    """
    json = _Json(tokenizer_json, where)
    ids = json.vocabulary(vocab_size)
    added = json.added(ids)
    if json.is_byte_level():
        byte_tokens: Collection[str] = ()
        unknown = None
        kind: dict[str, Any] = {
            _PREFIX + "model": "gpt2",
            _PREFIX + "pre": json.rule_name(),
            _PREFIX + "merges": [" ".join(pair) for pair in json.merges()],
        }
    else:
        prefix = json.space_prefix()
        byte_tokens = BYTE_TOKENS if json.model.get("byte_fallback") else ()
        unknown = json.model.get("unk_token")
        kind = {
            _PREFIX + "model": "llama",
            _PREFIX + "pre": "default",
            _PREFIX + "add_space_prefix": prefix,
        }

    tokens = [_padding(i) for i in range(vocab_size)]
    types = np.full(vocab_size, UNUSED, np.int32)
    for token, i in ids.items():
        tokens[i] = token
        types[i] = BYTE if token in byte_tokens else NORMAL
    for entry in added:
        types[entry.id] = CONTROL if entry.special else USER_DEFINED
        if entry.normalized and not entry.special:
            tokens[entry.id] = entry.content.replace(SPACE, " ")
    if unknown in ids:
        types[ids[unknown]] = UNKNOWN
    repeated = first_repeated(tokens)
    if repeated is not None:
        raise json.fail("model.vocab", f"has {tokens[repeated[0]]!r}, which stands for padding")
    if not json.is_byte_level():
        kind[_PREFIX + "scores"] = json.scores(tokens, types.tolist())
    return {
        **kind,
        _PREFIX + "tokens": tokens,
        _PREFIX + "token_type": types,
        **_roles(json, special_tokens, ids),
        **({} if chat_template is None else {_TEMPLATE: chat_template}),
    }


def _roles(
    json: "_Json", special_tokens: Mapping[str, str], ids: Mapping[str, int]
) -> dict[str, Any]:
    """Which token opens and closes a text, and whether by itself."""
    named = dict(special_tokens)
    flags = {}
    for end, text in zip(("bos", "eos"), json.ends(), strict=True):
        flags[f"{_PREFIX}add_{end}_token"] = text is not None
        if text is None:
            continue
        if text not in ids or named.setdefault(f"{end}_token", text) != text:
            raise json.fail(
                "post_processor",
                f"puts {text!r} around a text; it must be a token, and the {end}_token of "
                f"tokenizer_config.json, which is {named.get(f'{end}_token')!r}",
            )
    ids_of_roles = {
        _PREFIX + name: ids[named[role]] for role, name in _ROLES.items() if named.get(role) in ids
    }
    return {**ids_of_roles, **flags}


class _Json:
    """Checked access to the content of a tokenizer.json."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self._content = content
        self._where = where
        self.model = self._part("model")
        for key, allowed in (
            ("type", ("BPE",)),
            ("dropout", (None, 0)),
            ("continuing_subword_prefix", (None, "")),
            ("end_of_word_suffix", (None, "")),
        ):
            if self.model.get(key) not in allowed:
                raise self.fail(f"model.{key}", f"is {self.model.get(key)!r}; BPE has {allowed[0]}")

    def fail(self, field: str, what: str) -> ValueError:
        return ValueError(
            f"{self._where}: field `{field}` {what}. GGUF cannot say that; the model can be "
            "written without its tokenizer"
        )

    def _part(self, key: str) -> Mapping[str, Any]:
        part = self._content.get(key)
        if not isinstance(part, Mapping):
            raise self.fail(key, f"is a {type(part).__name__}; wanted an object")
        return part

    def _steps(self, key: str, inner: str) -> list[Mapping[str, Any]]:
        """The parts of a normalizer, pre-tokenizer or post-processor, sequences laid flat."""
        steps: list[Mapping[str, Any]] = []
        pending = [self._content.get(key)]
        while pending:
            step = pending.pop(0)
            if step is None:
                continue
            if not isinstance(step, Mapping):
                raise self.fail(key, f"holds a {type(step).__name__}; wanted objects")
            if step.get("type") != "Sequence":
                steps.append(step)
            elif isinstance(step.get(inner), list):
                pending = [*step[inner], *pending]
            else:
                raise self.fail(key, f"has a sequence without `{inner}`")
        return steps

    # Vocabulary.

    def vocabulary(self, vocab_size: int) -> dict[str, int]:
        """Ids of all tokens by text, added ones included."""
        ids = self.model.get("vocab")
        if not isinstance(ids, Mapping):
            raise self.fail("model.vocab", "is no object of tokens and ids")
        ids = dict(ids)
        for entry in self._added_entries():
            if ids.setdefault(entry["content"], entry["id"]) != entry["id"]:
                raise self.fail(
                    "added_tokens",
                    f"gives {entry['content']!r} the id {entry['id']}, the vocabulary "
                    f"{ids[entry['content']]}",
                )
        for token, i in ids.items():
            if type(i) is not int or not 0 <= i < vocab_size:
                raise self.fail(
                    "model.vocab",
                    f"gives {token!r} the id {i!r}; the model has {vocab_size} tokens, from 0",
                )
        if len(set(ids.values())) < len(ids):
            by_id: dict[int, str] = {}
            first, second = next(
                (by_id[i], token) for token, i in ids.items() if by_id.setdefault(i, token) != token
            )
            raise self.fail("model.vocab", f"gives {first!r} and {second!r} the same id")
        return ids

    def _added_entries(self) -> list[Mapping[str, Any]]:
        entries = self._content.get("added_tokens") or []
        if not isinstance(entries, list) or not all(
            isinstance(entry, Mapping)
            and isinstance(entry.get("content"), str)
            and type(entry.get("id")) is int
            for entry in entries
        ):
            raise self.fail("added_tokens", "is no list of objects with `id` and `content`")
        return entries

    def added(self, ids: Mapping[str, int]) -> list[AddedToken]:
        """The added tokens.

        A special one counts as one that is looked for in the text as it stands, even where the
        file asks for the normalized text: readers of GGUF know no other.
        """
        plain = not self._steps("normalizer", "normalizers")
        tokens = []
        for entry in self._added_entries():
            content = entry["content"]
            flag = next((f for f in ("lstrip", "rstrip", "single_word") if entry.get(f)), None)
            if flag is not None:
                raise self.fail("added_tokens", f"has {content!r} with `{flag}`")
            token = AddedToken(
                ids[content],
                content,
                special=bool(entry.get("special")),
                normalized=bool(entry.get("normalized")) and not plain,
            )
            if token.normalized and not token.special and self._changes(content):
                raise self.fail(
                    "added_tokens", f"has {content!r} with `normalized`, and a normalizer"
                )
            tokens.append(token)
        return tokens

    def _changes(self, content: str) -> bool:
        """Whether looking for a token in the normalized text makes a difference."""
        if self.is_byte_level():
            return not content.isascii()
        return self.space_prefix()

    def merges(self) -> list[list[str]]:
        """Pairs of tokens; both spellings, `"a b"` and `["a", "b"]`."""
        found = self.model.get("merges")
        if not isinstance(found, list):
            raise self.fail("model.merges", f"is a {type(found).__name__}; wanted a list")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in found]
        for pair in pairs:
            if type(pair) is not list or [type(half) for half in pair] != [str, str]:
                raise self.fail("model.merges", f"has {reprlib.repr(pair)}; wanted pairs of tokens")
        return pairs

    # What is done to a text.

    def is_byte_level(self) -> bool:
        """Whether tokens are written in GPT-2's alphabet of bytes."""
        steps = self._steps("pre_tokenizer", "pretokenizers")
        return any(step.get("type") == "ByteLevel" for step in steps)

    def rule_name(self) -> str:
        """The name that GGUF has for this normalizer and pre-tokenizer."""
        normalizers = self._steps("normalizer", "normalizers")
        if [step.get("type") for step in normalizers] not in ([], ["NFC"]):
            raise self.fail("normalizer", f"is {_short(normalizers)}")
        if self.model.get("byte_fallback"):
            raise self.fail("model.byte_fallback", "is true in a byte-level tokenizer")
        steps = self._steps("pre_tokenizer", "pretokenizers")
        ignore_merges = bool(self.model.get("ignore_merges"))
        for name, rule in _RULES.items():
            same = rule.nfc == bool(normalizers) and rule.ignore_merges == ignore_merges
            if same and _cuts(steps) == (*(["digits"] if rule.digits else []), rule.regex):
                return name
        raise self.fail(
            "pre_tokenizer",
            f"is {_short(steps)}, with{'' if normalizers else 'out'} NFC and with"
            f"{'' if ignore_merges else 'out'} `ignore_merges`; known to GGUF's readers and to "
            f"bitnet-rs are those of {', '.join(_RULES)}",
        )

    def space_prefix(self) -> bool:
        """Whether a sentencepiece tokenizer puts a space before a text; others are refused."""
        normalizers = self._steps("normalizer", "normalizers")
        steps = self._steps("pre_tokenizer", "pretokenizers")
        if steps == [_METASPACE] and not normalizers:
            return False
        for prefix in (SPACE, None):
            # Gemma's pre-tokenizer cuts at spaces, of which the normalizer has left none.
            if normalizers == escape_spaces(prefix) and steps in ([], [_GEMMA]):
                return prefix is not None
        raise self.fail(
            "normalizer",
            f"is {_short(normalizers)}, and `pre_tokenizer` is {_short(steps)}: neither byte-level "
            "nor sentencepiece with a space in front of each stretch of text or none",
        )

    def scores(self, tokens: Sequence[str], types: Sequence[int]) -> NDArray[np.float32]:
        """Scores that give the merges of a sentencepiece tokenizer; float32, shape (tokens,)."""
        # Added tokens are taken out of a text before, so what would merge into one never does.
        normal = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
        merges = [
            (left, right)
            for left, right in self.merges()
            if left in normal and right in normal and left + right in normal
        ]
        order = dict.fromkeys(left + right for left, right in merges)
        order.update(dict.fromkeys(normal))  # characters: behind, as sentencepiece has them
        scores = np.zeros(len(tokens), np.float32)
        for rank, token in enumerate(order):
            scores[normal[token]] = -rank
        again, _ = merges_of_scores(tokens, scores.tolist(), types, self._where)
        if _by_result(again) != _by_result(merges):
            raise self.fail("model.merges", "are not those of scores, as sentencepiece has them")
        return scores

    def ends(self) -> tuple[str | None, str | None]:
        """The tokens that are put before and behind a text."""
        found: list[tuple[str | None, str | None]] = []
        for step in self._steps("post_processor", "processors"):
            if step.get("type") == "ByteLevel":  # only moves offsets
                continue
            if step.get("type") != "TemplateProcessing" or found:
                raise self.fail("post_processor", f"has a step of type {step.get('type')!r}")
            found.append(self._around(step.get("single")))
        return found[0] if found else (None, None)

    def _around(self, single: Any) -> tuple[str | None, str | None]:
        ends: list[list[str]] = [[], []]
        behind = 0
        for part in single if isinstance(single, list) else []:
            if isinstance(part, Mapping) and "Sequence" in part:
                behind += 1
            elif isinstance(part, Mapping) and isinstance(part.get("SpecialToken"), Mapping):
                ends[min(behind, 1)].append(str(part["SpecialToken"].get("id")))
        if behind != 1 or max(map(len, ends)) > 1:
            raise self.fail("post_processor", "puts more around a text than BOS and EOS")
        return tuple(end[0] if end else None for end in ends)  # type: ignore[return-value]


_METASPACE: Final = {
    "type": "Metaspace",
    "replacement": SPACE,
    "prepend_scheme": "never",
    "split": False,
}
_GEMMA: Final = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


def _cuts(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the pre-tokenizers of a byte-level tokenizer look for, in order.

    `digits`, and regular expressions. What no rule has comes out as the name of the step.
    """
    found = []
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern")
        how = (step.get("behavior"), bool(step.get("invert")))
        if kind == "Digits" and step.get("individual_digits"):
            found.append("digits")
        # The expressions match every character, so all is kept either way.
        elif kind == "Split" and how in (("Isolated", False), ("Removed", True)):
            found.append(str(pattern.get("Regex") if isinstance(pattern, Mapping) else pattern))
        elif kind == "ByteLevel" and step is steps[-1] and not step.get("add_prefix_space", True):
            found += [_GPT2] if step.get("use_regex", True) else []
        else:
            found.append(str(kind))
    return tuple(found)


def _by_result(merges: Iterable[Sequence[str]]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Merges by what they make, in order; among those that make the same it does not matter."""
    groups = itertools.groupby(map(tuple, merges), key="".join)
    return [(made, sorted(group)) for made, group in groups]


def _short(steps: Sequence[Mapping[str, Any]]) -> str:
    """Steps of a tokenizer.json for a message."""
    return reprlib.repr([{**step} for step in steps]) if steps else "absent"
