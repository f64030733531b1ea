"""Tokenizers in GGUF metadata, to the content of a tokenizer.json.

For `Tokenizer.from_gguf`; `writers/gguf_tokenizer.py` is the way back. Apart from reading GGUF files because it
needs the metadata only, and from `tokenizer_json` because what the keys mean, and what holds where
one is missing, is the business of GGUF and llama.cpp alone.

Two kinds of tokenizers are known. `gpt2` is byte-level BPE: a list of merges, and the name of a
rule (`pre`) that cuts a text into words first. `llama` is sentencepiece: scores instead of merges,
no words, bytes as a fallback.
"""

import reprlib
from collections.abc import Collection, Mapping
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

PREFIX: Final = "tokenizer.ggml."
TEMPLATE: Final = "tokenizer.chat_template"
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
GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Rule:
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
RULES: Final[Mapping[str, Rule]] = {
    "llama-bpe": Rule(_LLAMA3, ignore_merges=True),
    "llama3": Rule(_LLAMA3, ignore_merges=True),
    "llama-v3": Rule(_LLAMA3, ignore_merges=True),
    "falcon3": Rule(_LLAMA3, ignore_merges=True),
    "falcon_e": Rule(_LLAMA3, ignore_merges=True),
    "smaug-bpe": Rule(_LLAMA3),
    "gpt-2": Rule(GPT2),
    "olmo": Rule(GPT2, nfc=True),  # GPT-NeoX, as in TriLM
    "mpt": Rule(GPT2, nfc=True),
    "qwen2": Rule(_QWEN2, nfc=True),
    "grok-2": Rule(_QWEN2),
    "smollm": Rule(GPT2, digits=True),
    "starcoder": Rule(GPT2, digits=True),
    "refact": Rule(GPT2, digits=True),
}
_DEFAULT_RULE: Final = "llama-bpe"
# Where `add_bos_token` is missing, llama.cpp adds BOS for these, and for sentencepiece.
_ADD_BOS: Final = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon_e")

# Roles in special_tokens_map.json and the keys that name them in GGUF.
ROLES: Final = {
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
    kind = reader.text(PREFIX + "model")
    if kind is None or kind in ("no_vocab", "none"):
        found = "is missing" if kind is None else f"is {kind!r}"
        raise FileNotFoundError(
            f"{where}: holds no tokenizer (field `{PREFIX}model` {found}). Use a file that has "
            "one, or the safetensors checkpoint of the same model"
        )
    if kind == "gpt2":
        json, vocabulary, notes = _byte_level(reader)
    elif kind == "llama":
        json, vocabulary, notes = _sentencepiece(reader)
    else:
        raise reader.fail(
            PREFIX + "model",
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
    key = PREFIX + "tokens"
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(reader.strings(key))]
    count = len(tokens)
    types = [NORMAL] * count
    if PREFIX + "token_type" in reader:
        types = reader.numbers(PREFIX + "token_type", "iu", count).tolist()
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED or token != padding(i)
    }
    repeated = first_repeated(tokens)
    if repeated is not None:
        first, second = repeated
        text = reprlib.repr(tokens[first])
        raise reader.fail(key, f"has {text} twice, as {first} and {second}", "different tokens")
    roles = {
        role: found
        for role, name in ROLES.items()
        if (found := reader.token_id(PREFIX + name, count)) is not None
    }
    for role, (token_id, kind) in default_roles.items():
        if token_id < count and types[token_id] == kind:
            roles.setdefault(role, token_id)
    return _Vocabulary(tokens, types, ids, roles)


def padding(token_id: int) -> str:
    """The text of a token that only makes the vocabulary as large as the embedding."""
    return f"[PAD{token_id}]"


def _ends(
    reader: _Metadata, vocabulary: _Vocabulary, *, add_bos: bool
) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """The tokens before and behind a text; `add_bos` holds where the file does not say."""

    def end(name: str, default: bool) -> tuple[str, int] | None:  # noqa: FBT001 (a value)
        if not reader.flag(f"{PREFIX}add_{name}_token", default):
            return None
        token = vocabulary.token(f"{name}_token")
        if token is None:
            raise reader.fail(
                f"{PREFIX}{name}_token_id",
                "is missing",
                f"the id of a token, as `{PREFIX}add_{name}_token` asks for one around texts (for "
                "some kinds of tokenizers also where it is missing)",
            )
        return token

    return end("bos", add_bos), end("eos", False)


def _byte_level(reader: _Metadata) -> tuple[dict[str, Any], _Vocabulary, tuple[str, ...]]:
    vocabulary = _vocabulary(reader, {})
    name, notes = _rule_name(reader, vocabulary)
    rule = RULES[name]
    merges = _merges(reader, vocabulary.ids)
    bos, eos = _ends(reader, vocabulary, add_bos=name in _ADD_BOS)
    pre: list[dict[str, Any]] = []
    if rule.digits:
        pre.append({"type": "Digits", "individual_digits": True})
    if rule.regex != GPT2:
        split = {"Regex": rule.regex}
        pre.append({"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    json = tokenizer_json(
        bpe(vocabulary.ids, merges, ignore_merges=rule.ignore_merges),
        vocabulary.added(),
        normalizers=[{"type": "NFC"}] if rule.nfc else [],
        pre_tokenizers=[*pre, {**level, "use_regex": rule.regex == GPT2}],
        decoder={**level, "use_regex": True},
        bos=bos,
        eos=eos,
    )
    return json, vocabulary, notes


def _rule_name(reader: _Metadata, vocabulary: _Vocabulary) -> tuple[str, tuple[str, ...]]:
    key = PREFIX + "pre"
    name = reader.text(key)
    if name is not None and name in RULES:
        return name, ()
    known = f"one of {', '.join(RULES)}"
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
    key = PREFIX + "merges"
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
    key = PREFIX + "scores"
    if key not in reader:
        raise reader.fail(key, "is missing", "a score for each token, which says what to merge")
    scores = reader.numbers(key, "iuf", len(tokens)).tolist()
    bytes_ = [token for token, kind in zip(tokens, types, strict=True) if kind == BYTE]
    wrong = next((token for token in bytes_ if token not in BYTE_TOKENS), None)
    if wrong is not None:
        raise reader.fail(
            PREFIX + "token_type",
            f"says that {reprlib.repr(wrong)} is a byte",
            "bytes as <0x00> to <0xFF>",
        )
    merges, notes = merges_of_scores(tokens, scores, types, f"{reader.where}: field `{key}`")
    bos, eos = _ends(reader, vocabulary, add_bos=True)
    prefix = reader.flag(PREFIX + "add_space_prefix", True)
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
    template = reader.text(TEMPLATE)
    if template is None or not all(mark in template for mark in _WRONG_TEMPLATE):
        return template, ()
    if reader.text("general.architecture") not in _BITNET:
        return template, ()
    note = (
        f"{reader.where}: field `{TEMPLATE}` holds the template of another model ('Human: ...', "
        "'BITNETAssistant: '), with which this one does not stop; the one of "
        "microsoft/bitnet-b1.58-2B-4T is used instead"
    )
    return _RIGHT_TEMPLATE, (note,)
