"""The content of a tokenizer.json to GGUF metadata, or a clear no.

For `convert.py`. Apart from `loaders/gguf_tokenizer.py`, which reads what this writes, because it
knows how tokenizer.json files are written and refuses what GGUF has no words for.
"""

import itertools
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.gguf_tokenizer import GPT2, PREFIX, ROLES, RULES, TEMPLATE, padding
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
    escape_spaces,
    first_repeated,
    merges_of_scores,
)


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
            PREFIX + "model": "gpt2",
            PREFIX + "pre": json.rule_name(),
            PREFIX + "merges": [" ".join(pair) for pair in json.merges()],
        }
    else:
        prefix = json.space_prefix()
        byte_tokens = BYTE_TOKENS if json.model.get("byte_fallback") else ()
        unknown = json.model.get("unk_token")
        kind = {
            PREFIX + "model": "llama",
            PREFIX + "pre": "default",
            PREFIX + "add_space_prefix": prefix,
        }

    tokens = [padding(i) for i in range(vocab_size)]
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
        kind[PREFIX + "scores"] = json.scores(tokens, types.tolist())
    return {
        **kind,
        PREFIX + "tokens": tokens,
        PREFIX + "token_type": types,
        **_roles(json, special_tokens, ids),
        **({} if chat_template is None else {TEMPLATE: chat_template}),
    }


def _roles(
    json: "_Json", special_tokens: Mapping[str, str], ids: Mapping[str, int]
) -> dict[str, Any]:
    """Which token opens and closes a text, and whether by itself."""
    named = dict(special_tokens)
    flags = {}
    for end, text in zip(("bos", "eos"), json.ends(), strict=True):
        flags[f"{PREFIX}add_{end}_token"] = text is not None
        if text is None:
            continue
        if text not in ids or named.setdefault(f"{end}_token", text) != text:
            raise json.fail(
                "post_processor",
                f"puts {text!r} around a text; it must be a token, and the {end}_token of "
                f"tokenizer_config.json, which is {named.get(f'{end}_token')!r}",
            )
    ids_of_roles = {
        PREFIX + name: ids[named[role]] for role, name in ROLES.items() if named.get(role) in ids
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
        for name, rule in RULES.items():
            same = rule.nfc == bool(normalizers) and rule.ignore_merges == ignore_merges
            if same and _cuts(steps) == (*(["digits"] if rule.digits else []), rule.regex):
                return name
        raise self.fail(
            "pre_tokenizer",
            f"is {_short(steps)}, with{'' if normalizers else 'out'} NFC and with"
            f"{'' if ignore_merges else 'out'} `ignore_merges`; known to GGUF's readers and to "
            f"bitnet-rs are those of {', '.join(RULES)}",
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
            found += [GPT2] if step.get("use_regex", True) else []
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
