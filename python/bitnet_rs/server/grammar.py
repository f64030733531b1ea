"""Grammars that generated text must follow: JSON schemas above all.

For the server's routes, which hand a constraint to the engine with a request. Apart because it is
the only file that imports `llguidance`, which decides what may come next; this file makes the text
end in time. Whatever the model would like to write, the text is complete within `max_tokens`, if a
text of the grammar was found that is so short. If none was, the text follows the grammar as far as
it goes, and ends for its length, like any other: `GrammarConstraint.shortest` tells before.

How it ends in time. A *closing* is a text that, put behind what was written so far, completes it.
Before each token one is known that fits in what is left. Far from the end any token will do. Near
it, a token may be chosen only if there is a closing behind it that still fits: the most probable
tokens are looked at one by one. The first token of the closing that is known always passes, so
there is always one to choose, and the invariant holds to the end.

Closings are looked for byte by byte, with a second matcher over a vocabulary of the 256 bytes: its
masks take microseconds, and a token has at least one byte, so n bytes fit in n tokens.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from numpy.typing import NDArray

from bitnet_rs.tokenizer import Tokenizer

# Characters of a grammar's text. OpenAI takes 120,000; this many compile in about a second.
_MOST_CHARACTERS = 1 << 18

# Bytes of the shortest text that was found for a grammar: longer ones are refused, as are grammars
# that no text satisfies at all. To look for one takes about 10 µs a byte.
_LONGEST_CLOSING = 4096

# Steps of a search for a shorter closing, of 10 to 100 µs each: before anything runs, and while
# other sequences wait.
_PATIENCE = 6_000
_LITTLE_PATIENCE = 2_000

# Compiled grammars that are kept. Few take a megabyte; an enum of 10,000 names takes 14.
_KEPT = 16

# Near the end: tokens looked at, at most, and together how probable they are, of those that are at
# most so many nats below the best one. The rest is left out.
_CANDIDATES = 64
_CANDIDATE_SHARE = 0.999
_CANDIDATE_RANGE = 10.0

# A number ends behind so many digits, if it can: a model that may write zeros may write nothing
# else, and 15 are those that every float keeps, so that what is above a bound stays above it. Of
# these, an exponent has 2: beyond e308 there are no floats.
_DIGITS = 15
_EXPONENT_DIGITS = 2

# Choices of a walk that are remembered for a search: each keeps a copy of a matcher.
_CHOICES = 128

# Bytes of a string that are remembered while it is written, to tell names of properties.
_NAME = 256

# Steps of all walks for new closings before one token; candidates that would need further ones are
# left out.
_WALKING = 200

# Limits of one compile and one step, for grammars from strangers: about a second and 15 ms, then
# there is an error.
_LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)

# Compact JSON: a model that may write blanks may write nothing else. Each character can be written
# in one way only, so that no escape makes a second spelling of a property's name.
_JSON_OPTIONS: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": '"\\bfnrt',
    "json_allow_general_unicode_escapes": False,
}

_Kind = Literal["schema", "regular expression", "grammar"]

_END = 256  # in the vocabulary of bytes

# What to try first where a value, or what follows one, is wanted: the shortest way out.
_OUTSIDE = b'}],9876543210"ntf[{-:.eE+'

# The same within strings that cannot end yet, by turns (`_by_turns`): a loop of one kind of
# character is left by another.
_TURNS = (
    b"abcdefghijklmnopqrstuvwxyz",
    b"0123456789",
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    *(bytes([c]) for c in b"@.:/-_ ,;+()[]{}=#%&?!*$'|~^<>`"),
    b'"',
    b"\\",
    bytes(range(0x80, 0x100)),
    bytes(range(0x20)) + b"\x7f",
)

# So many bytes are looked at one by one, more by their kinds.
_FEW = 16
_TURN_OF = {byte: i for i, turn in enumerate(_TURNS) for byte in turn}


@cache
def _byte_tokenizer() -> LLTokenizer:
    """A vocabulary of the 256 bytes and an end."""

    class Bytes:
        eos_token_id = _END
        bos_token_id = None
        tokens = (*(bytes([i]) for i in range(256)), b"<end>")
        special_token_ids = (_END,)

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    return LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=257, eos_token=[_END], slices=[])


def _leading_digits(text: bytes) -> bytes:
    found = re.match(rb"\.?[0-9][0-9.]*", text[:99])
    return found[0] if found else b""


class _Vocabulary:
    """What tokens are as bytes. Special ones, and those that the model has no row for, are none."""

    def __init__(self, tokenizer: LLTokenizer, n_tokens: int) -> None:
        self.bytes = [
            b"" if tokenizer.is_special_token(i) else tokenizer.decode_bytes([i])
            for i in range(n_tokens)
        ]
        self._ids: dict[bytes, int] = {}
        for i, text in enumerate(self.bytes):
            self._ids.setdefault(text, i)
        self._ids.pop(b"", None)
        self._longest = min(32, max(map(len, self._ids), default=1))
        # How many digits a token begins with, a decimal point between them or not.
        self.digits = np.array(
            [len(_leading_digits(t).replace(b".", b"")) for t in self.bytes], np.uint8
        )
        self.most_digits = int(self.digits.max())
        # How many objects and arrays one token can open.
        self.most_opened = max((t.count(b"{") + t.count(b"[") for t in self._ids), default=0)

    def first(self, text: bytes) -> int | None:
        """The longest token that a text begins with; None where there is none."""
        for n in range(min(self._longest, len(text)), 0, -1):
            token = self._ids.get(text[:n])
            if token is not None:
                return token
        return None

    def count(self, text: bytes) -> int:
        """How many tokens a text takes, the longest first."""
        count = 0
        while text:
            token = self.first(text)
            # Without a token for each byte there is no telling; so many it takes at least.
            text = text[1 if token is None else len(self.bytes[token]) :]
            count += 1
        return count

    def fits(self, text: bytes, left: int) -> bool:
        """Whether a text takes at most so many tokens."""
        # A token has at least one byte, and most texts are far from the limit.
        return len(text) <= left or self.count(text) <= left


@dataclass(slots=True)
class _JsonText:
    """Where a JSON text is, by its bytes alone.

    Attributes:
        quoted: Within a string.
        escaped: Behind a backslash in one.
        string: The string so far, without its quote; no more than its beginning.
        digits: How many the number has that the text ends in.
        recent: The last three bytes.
    """

    quoted: bool = False
    escaped: bool = False
    string: bytes = b""
    digits: int = 0
    recent: bytes = b""

    def take(self, text: bytes) -> None:
        """Goes on by some bytes."""
        self.recent = (self.recent + text)[-3:]
        for byte in text:
            if not self.quoted:
                self._take_outside(byte)
            elif self.escaped:
                self.escaped = False
            elif byte == 0x22:
                self.quoted = False
            else:
                self.escaped = byte == 0x5C
                if len(self.string) < _NAME:
                    self.string += bytes([byte])

    def _take_outside(self, byte: int) -> None:
        if 0x30 <= byte <= 0x39:
            self.digits += 1
        elif byte in b"eE" and self.digits:
            self.digits = max(self.digits, _DIGITS - _EXPONENT_DIGITS)
        elif byte not in b".+-":
            self.digits = 0
            self.quoted, self.string = byte == 0x22, b""


class _Place:
    """A place in a text: the byte matcher there; and where it is as JSON, if it is that."""

    def __init__(self, matcher: LLMatcher, text: _JsonText | None) -> None:
        self.matcher = matcher
        self.json = text

    def copy(self) -> _Place:
        return _Place(self.matcher.deep_copy(), None if self.json is None else replace(self.json))

    def take(self, text: bytes) -> bool:
        """Goes on by some bytes; False where they may not follow."""
        if not self.matcher.consume_tokens(list(text)):
            return False
        if self.json is not None:
            self.json.take(text)
        return True

    def ends(self, text: bytes) -> bool:
        """Whether the text is complete with these bytes behind it."""
        ids = [*text, _END]
        return self.matcher.validate_tokens(ids) == len(ids)

    def allowed(self) -> bytes:
        """The bytes that may come next."""
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(mask[:32], bitorder="little")).astype("u1").tobytes()


@dataclass(slots=True)
class _Choice:
    """A byte of a closing that could have been another."""

    at: int
    place: _Place
    others: bytes


@dataclass(slots=True)
class _Walk:
    """Bytes that were put behind a place, whether they complete the text, and what they took."""

    text: bytes
    complete: bool
    steps: int
    choices: list[_Choice]


class _Closer:
    """Finds closings for one grammar.

    It goes for what looks shortest, byte by byte (`walk`). Where that is too long, it tries the
    other choices along the way, one at a time (`search`).

    Args:
        keys: Names of required properties, which lead on where others are detours.
        patterns: Regular expressions and the like. What is spelled out in them is worth a try
            where anything may come: `.*x` goes on for ever without an x.
    """

    def __init__(self, keys: Iterable[str], patterns: Iterable[str]) -> None:
        # As they stand in JSON behind the first quote, up to the one that ends them.
        self._hints = frozenset("".join(patterns).encode("ascii", "ignore")) - frozenset(b'"\\')
        self._keys = tuple({json.dumps(key, ensure_ascii=False).encode()[1:] for key in keys})

    def walk(self, place: _Place, limit: int, *, remember: bool = False) -> _Walk:
        """Goes on from a place, which is used up, to the end or until there are `limit` bytes."""
        text = bytearray()
        used: dict[int, int] = {}  # by turn, the last step
        choices: list[_Choice] = []
        steps = 0
        complete = place.matcher.is_accepting()
        while not complete and len(text) < limit:
            steps += 1
            go_on = place.matcher.compute_ff_bytes()
            if not go_on:
                order = self._order(place, place.allowed(), used)
                if not order:
                    break
                go_on = order[:1]
                for few in (True, False):
                    used[self._turn(go_on[0], few=few)] = steps
                if remember and len(order) > 1 and len(choices) < _CHOICES:
                    choices.append(_Choice(len(text), place.copy(), order[1:]))
            if not place.take(go_on):
                break
            text += go_on
            complete = place.matcher.is_accepting()
        return _Walk(bytes(text), complete and len(text) <= limit, steps, choices)

    def search(self, place: _Place, enough: int, patience: int) -> bytes | None:
        """The shortest closing that so many steps could find; one of `enough` bytes will do."""
        # A walk that goes round in circles goes to its limit, so low limits come first.
        for limit in (64, 512, _LONGEST_CLOSING):
            best = self.walk(place.copy(), limit, remember=True)
            patience -= best.steps
            while not (best.complete and len(best.text) <= enough) and patience > 0:
                better, steps = self._improve(best, limit, patience)
                patience -= steps
                if better is None:
                    break
                best = better
            if best.complete:
                return best.text
        return None

    def _improve(self, walk: _Walk, limit: int, patience: int) -> tuple[_Walk | None, int]:
        """A shorter walk that is complete, by one other choice; and the steps taken to find it."""
        steps = 0
        room = len(walk.text) - 1 if walk.complete else limit
        for i, choice in enumerate(walk.choices):
            for other in choice.others:
                if choice.at >= room or steps >= patience:
                    return None, steps
                place = choice.place.copy()
                if not place.take(bytes([other])):
                    continue
                rest = self.walk(place, room - choice.at - 1, remember=True)
                steps += rest.steps + 1
                if rest.complete:
                    head = walk.text[: choice.at] + bytes([other])
                    for later in rest.choices:
                        later.at += len(head)
                    choices = [*walk.choices[:i], *rest.choices]
                    return _Walk(head + rest.text, True, 0, choices), steps
        return None, steps

    def _order(self, place: _Place, allowed: bytes, used: Mapping[int, int]) -> bytes:
        """What to try, in this order: one byte of each kind that may come next."""
        if not allowed:
            return b""
        text = place.json
        if text is None:
            return self._by_turns(allowed, used)
        if not text.quoted:
            order = bytes(b for b in _OUTSIDE if b in allowed) or allowed
            if 0x30 <= order[0] <= 0x39:
                # With one digit over and over, some numbers never end: multiples of 7 need others,
                # those of 100 need zeros.
                by_use = sorted(order, key=lambda b: used.get(b, 0))
                if text.digits >= 2 and not text.recent.endswith(b"000"):
                    by_use.sort(key=lambda b: b != 0x30)
                return bytes(by_use)
            return order
        order = self._by_turns(allowed, used)
        if 0x22 in allowed:
            order = b'"' + order.replace(b'"', b"")
        elif (at := len(text.string)) < _NAME:
            keys = [k for k in self._keys if len(k) > at and k.startswith(text.string)]
            leads = bytes(dict.fromkeys(k[at] for k in sorted(keys, key=len) if k[at] in allowed))
            order = leads + bytes(b for b in order if b not in leads)
        return order

    def _by_turns(self, allowed: bytes, used: Mapping[int, int]) -> bytes:
        """Bytes to try, those first that were not used for longest: all, or one of each kind."""
        first: dict[int, int] = {}
        few = len(allowed) <= _FEW
        for byte in allowed:
            first.setdefault(self._turn(byte, few=few), byte)
        return bytes(first[turn] for turn in sorted(first, key=lambda t: (used.get(t, 0), t)))

    def _turn(self, byte: int, *, few: bool) -> int:
        """What a byte takes turns as: itself, with few to choose from, else its kind."""
        return byte if few or byte in self._hints else 256 + _TURN_OF[byte]


@dataclass(frozen=True)
class _Bounds:
    """How long closings can get.

    Attributes:
        anywhere: Bytes that complete a text wherever it is; infinite where texts can nest.
        jump: Bytes that one token can add to a closing, at most.
    """

    anywhere: float
    jump: float


# Where nothing is known, no token goes unchecked.
_UNKNOWN = _Bounds(np.inf, np.inf)


class _Schema:
    """What is to be known of a JSON schema beside its grammar.

    Its `size` is that of a text that has everything in it once: every property, every branch,
    arrays of `minItems`. Completing an object or array takes no more than its own, from wherever
    it is.
    """

    # Bytes of a number, and of a string of some format.
    _VALUE = 24
    _FORMAT = 64

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._sizes: dict[str, float] = {}
        self._open: set[str] = set()
        self.nests = False
        self.keys: set[str] = set()
        self.patterns: list[str] = []
        self.size = self._value(root)

    def _value(self, schema: object) -> float:
        if not isinstance(schema, Mapping):
            self.nests = self.nests or schema is not False
            return 8
        size: float = 8
        if "$ref" in schema:
            size += self._ref(schema["$ref"])
        for word in ("enum", "const"):
            if word in schema:
                _check_characters(word, schema[word])
                size += len(json.dumps(schema[word]))
        size += self._object(schema) + self._array(schema) + self._scalar(schema)
        for word in ("anyOf", "oneOf", "allOf"):
            size += sum(map(self._value, _list(schema.get(word))))
        if not schema.keys() & {"type", "$ref", "enum", "const", "anyOf", "oneOf", "allOf"}:
            self.nests = True
        return size

    def _object(self, schema: Mapping[str, Any]) -> float:
        properties = _dict(schema.get("properties"))
        patterns = _dict(schema.get("patternProperties"))
        required = [key for key in _list(schema.get("required")) if isinstance(key, str)]
        others = schema.get("additionalProperties", True)
        self.keys.update(required)
        least = _count(schema.get("minProperties"))
        if least > len(required) and (others is not False or patterns):
            raise ValueError(
                f"the schema is not supported: minProperties {least} where properties may have any "
                "name; wanted all named in `properties`, and additionalProperties false"
            )
        size: float = sum(map(len, map(json.dumps, required))) + 16 * len(required)
        for key, value in [*properties.items(), *patterns.items()]:
            size += len(json.dumps(key)) + 2 + self._value(value)
        if isinstance(others, Mapping):
            size += self._value(others) + 4
        elif _may_be(schema, "object") and others is not False:
            self.nests = True
        return size

    def _array(self, schema: Mapping[str, Any]) -> float:
        size = sum(map(self._value, _list(schema.get("prefixItems"))))
        least = max(1, _count(schema.get("minItems")))
        if "items" in schema:
            size += least * (self._value(schema["items"]) + 1)
        elif _may_be(schema, "array"):
            self.nests = True
            size += 8 * least
        return size

    def _scalar(self, schema: Mapping[str, Any]) -> float:
        size: float = _count(schema.get("minLength"))
        if _may_be(schema, "number") or _may_be(schema, "integer"):
            size += self._VALUE
        if "format" in schema:
            size += self._FORMAT
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            _check_characters("pattern", pattern)
            self.patterns.append(pattern)
            # Each part as often as all counts together can ask for.
            times = math.prod(max(1.0, float(n)) for n in re.findall(r"\{(\d+)", pattern))
            size += 2 * len(pattern) * times
        return size

    def _ref(self, ref: object) -> float:
        ref = str(ref)
        if ref in self._open:
            self.nests = True
            return 0
        if ref not in self._sizes:
            self._open.add(ref)
            self._sizes[ref] = self._value(self._target(ref))
            self._open.remove(ref)
        return self._sizes[ref]

    def _target(self, ref: str) -> object:
        """What a JSON pointer points to; where it is none that is known here, any value."""
        found: Any = self._root
        if not ref.startswith("#"):
            return True
        for part in ref[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = found.get(part, True)
            elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                return True
        return found


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _with_bounds_included(schema: Any) -> Any:
    """A schema whose numbers keep a little away from bounds that they must not reach.

    Else a model could go on with -1.4000... for ever where only less will do; and llguidance takes
    some bounds to be included that are not (1.9: those of 0 < x <= 0.5).
    """
    if isinstance(schema, list):
        return [_with_bounds_included(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    # What stands in these is no schema.
    values = ("enum", "const", "default", "examples")
    found = {k: v if k in values else _with_bounds_included(v) for k, v in schema.items()}
    if found.get("type") == "integer":
        return found
    for side, other, sign in (("inimum", "aximum", 1), ("aximum", "inimum", -1)):
        bound = _number(found.get(f"exclusiveM{side}"))
        if bound is None:
            continue
        del found[f"exclusiveM{side}"]
        step = max(1e-9, abs(bound) * 1e-12)
        for end in map(_number, (found.get(f"m{other}"), found.get(f"exclusiveM{other}"))):
            if end is not None and end != bound:
                step = min(step, abs(end - bound) / 1000)
        near = bound + sign * step
        included = _number(found.get(f"m{side}"))
        if included is not None:
            near = sign * max(sign * near, sign * included)
        found[f"m{side}"] = near
    return found


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check_characters(word: str, value: object) -> None:
    """Refuses control characters that JSON has no short escape for."""
    if isinstance(value, str):
        found = re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f]", value)
        if found:
            raise ValueError(
                f"the schema is not supported: {word} has the control character "
                f"U+{ord(found[0]):04X}; wanted none but tab, newline, return, backspace, form feed"
            )
    elif isinstance(value, list | dict):
        for each in [*value, *(value.values() if isinstance(value, dict) else ())]:
            _check_characters(word, each)


def _may_be(schema: Mapping[str, Any], kind: str) -> bool:
    """Whether a value of this kind may be written, by the schema's own `type`."""
    kinds = schema.get("type")
    if kinds is None:
        return not schema.keys() & {"$ref", "enum", "const", "anyOf", "oneOf", "allOf"}
    return kind == kinds or (isinstance(kinds, list) and kind in kinds)


@dataclass(frozen=True)
class _Compiled:
    """A grammar, ready to be copied for each text."""

    matcher: LLMatcher
    place: _Place
    closer: _Closer
    bounds: _Bounds
    closing: bytes


class GrammarConstraint:
    """What may come next in one text: an `engine.Constraint`.

    Attributes:
        shortest: Tokens of a short text of the grammar, not always the shortest. With a
            `max_tokens` of at least that the text is complete; with a lower one a shorter text is
            looked for, and where there is none, it ends for its length, incomplete.
    """

    def __init__(
        self, compiled: _Compiled, vocabulary: _Vocabulary, vocab_size: int, ends: frozenset[int]
    ) -> None:
        self._matcher = compiled.matcher.deep_copy()
        self._place = compiled.place.copy()
        self._closer = compiled.closer
        self._bounds = compiled.bounds
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._ends = ends
        self._text = None if self._place.json is None else replace(self._place.json)
        # A closing at `_place`, from where `_ahead` was written. None: none was found there.
        self._closing: bytes | None = compiled.closing
        self._ahead = b""
        self._passed: dict[int, bytes] = {}  # tokens that were looked at, and closings behind them
        self._in_vain = False  # there was no closing that fits, and no use in looking again
        self._left = 0
        self.shortest = vocabulary.count(compiled.closing)

    def restrict(self, logits: NDArray[np.float32], remaining: int) -> None:
        """As `engine.Constraint`."""
        self._left = remaining - 1
        self._passed = {}
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        _apply(mask, logits)
        if self._left < self._bounds.anywhere:
            self._catch_up()
            closing = self._closing
            if closing is None or not self._vocabulary.fits(closing, remaining):
                closing = self._look_for_shorter(remaining)
            if closing is not None and self._left < len(closing) + self._bounds.jump:
                self._keep_what_ends_in_time(logits, closing)
        if self._text is not None and self._text.digits + self._vocabulary.most_digits > _DIGITS:
            self._end_number(logits, _DIGITS - self._text.digits)

    def _end_number(self, logits: NDArray[np.float32], digits: int) -> None:
        """Takes out tokens that begin with more digits than so many, if any others are left."""
        n = len(self._vocabulary.digits)
        longer = np.flatnonzero(self._vocabulary.digits > max(digits, 0))
        values = logits[longer]
        logits[longer] = -np.inf
        if logits[:n].max() == -np.inf:
            logits[longer] = values

    def accept(self, token: int) -> bool:
        """As `engine.Constraint`."""
        if token in self._ends:
            return True
        self._matcher.consume_token(token)
        self._check()
        text = self._vocabulary.bytes[token]
        if self._text is not None:
            self._text.take(text)
        self._ahead += text
        if token in self._passed and self._place.take(self._ahead):
            self._ahead, self._closing = b"", self._passed[token]
        if self._matcher.is_stopped():
            return True
        # Without a token that ends texts, the first end is the end. Where nothing can be put behind
        # any more, the text is complete as it is.
        return (not self._left or not self._ends) and self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _too_complex(self._matcher)

    def _catch_up(self) -> None:
        """Goes with `_place` and `_closing` to where the text is now."""
        ahead, self._ahead = self._ahead, b""
        if not ahead:
            return
        known = self._continue(ahead)
        if not self._place.take(ahead):
            raise _too_complex(self._place.matcher)
        if known is None:
            limit = _WALKING if self._in_vain else _LONGEST_CLOSING
            walk = self._closer.walk(self._place.copy(), limit)
            known = walk.text if walk.complete else None
        self._closing = known

    def _continue(self, text: bytes) -> bytes | None:
        """A closing behind `text`, which comes at `_place`, made of the closing there."""
        closing = self._closing
        if closing is None:
            return None
        if closing.startswith(text):
            return closing[len(text) :]
        # The text may stand for as much of the closing, its end for the closing's beginning, or
        # it may come before it all.
        overlaps = [
            n for n in range(min(len(text), len(closing)), 0, -1) if text[-n:] == closing[:n]
        ]
        for at in dict.fromkeys([len(text), *overlaps, 0]):
            if at <= len(closing) and self._place.ends(text + closing[at:]):
                return closing[at:]
        return None

    def _look_for_shorter(self, most: int) -> bytes | None:
        """Replaces the known closing by one of at most so many tokens, if there is one."""
        if not self._in_vain:
            found = self._closer.search(self._place.copy(), most, _LITTLE_PATIENCE)
            if found is not None:
                self._closing = found
                if self._vocabulary.fits(found, most):
                    return found
            self._in_vain = True
        return None

    def _keep_what_ends_in_time(self, logits: NDArray[np.float32], closing: bytes) -> None:
        """Leaves only tokens behind which there is a closing that fits in what is left."""
        left = self._left
        first = self._vocabulary.first(closing)
        steps = _WALKING
        for token in self._candidates(logits):
            if token == first:
                continue
            text = self._vocabulary.bytes[token]
            found = self._continue(text)
            if found is None and steps > 0:
                place = self._place.copy()
                if place.take(text):
                    walk = self._closer.walk(place, min(4 * left, _LONGEST_CLOSING, steps))
                    steps -= walk.steps
                    found = walk.text if walk.complete else None
            if found is not None and self._vocabulary.fits(found, left):
                self._passed[token] = found
        if first is not None:
            self._passed[first] = closing[len(self._vocabulary.bytes[first]) :]
        kept = [*self._passed, *(i for i in self._ends if i < self._vocab_size)]
        values = logits[kept]
        logits.fill(-np.inf)
        logits[kept] = values

    def _candidates(self, logits: NDArray[np.float32]) -> list[int]:
        """The most probable tokens that may come next, but those that end the text."""
        best = logits.max()
        likely = np.flatnonzero(logits > max(best - _CANDIDATE_RANGE, -np.inf))
        weights = np.exp(logits[likely] - best)
        enough = _CANDIDATE_SHARE * weights.sum()
        if len(likely) > _CANDIDATES:
            top = np.argpartition(-weights, _CANDIDATES)[:_CANDIDATES]
            likely, weights = likely[top], weights[top]
        order = np.argsort(-weights, kind="stable")
        n = int(np.searchsorted(np.cumsum(weights[order]), enough)) + 1
        return [i for i in likely[order[:n]].tolist() if i not in self._ends]


# Of each byte of a mask: +inf where a bit is set, -inf where it is not.
_OF_BITS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(np.inf),
    np.float32(-np.inf),
)


def _apply(mask: NDArray[np.uint8], logits: NDArray[np.float32]) -> None:
    """Sets logits whose bit is not set to -inf. By tables: five times as fast as by `where`."""
    allowed = np.take(_OF_BITS, mask, axis=0).reshape(-1)
    n = min(len(allowed), len(logits))
    np.minimum(logits[:n], allowed[:n], out=logits[:n])
    logits[n:] = -np.inf


def _too_complex(matcher: LLMatcher) -> ValueError:
    """The error for a grammar that compiles, and then cannot be followed within the limits."""
    return ValueError(f"the grammar is too complex: {_reason(matcher.get_error())}")


def _reason(message: str) -> str:
    """What llguidance says, on one line, without the state of its parser or our own grammar."""
    text = re.split("<state>|<non-verbose/>", message)[0].partition("\n   1 | start: ")[0]
    text = re.sub(r"^at 1\(\d+\): (failed to compile JSON schema: )?", "", " ".join(text.split()))
    return text[:500] or "no reason given"


class Grammars:
    """Makes constraints for one model. Safe to use from any thread.

    Args:
        tokenizer: The model's.
        vocab_size: Rows of its logits; the tokenizer may have fewer tokens, or more.
        eos_ids: Ids that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = frozenset(eos_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[_Kind, str], _Compiled] = OrderedDict()

    def json_schema(self, schema: Mapping[str, Any]) -> GrammarConstraint:
        """JSON that satisfies a schema, without blanks between its parts.

        Properties come in the order of the schema.

        Raises:
            ValueError: The schema is wrong, has keywords that are not supported, is too large, or
                nothing satisfies it.
        """
        try:
            # Schemas may bring options of their own for llguidance, which these replace.
            text = json.dumps(_with_bounds_included({**schema, "x-guidance": _JSON_OPTIONS}))
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the schema is no JSON object: {error}") from None
        return self._constraint("schema", text)

    def json_object(self) -> GrammarConstraint:
        """Any JSON object, without blanks between its parts."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> GrammarConstraint:
        """Text that matches a regular expression as a whole.

        Raises:
            ValueError: It is none, or too large.
        """
        return self._constraint("regular expression", pattern)

    def lark(self, text: str) -> GrammarConstraint:
        """Text that a grammar in the manner of Lark makes.

        Raises:
            ValueError: It is none, or too large.
        """
        return self._constraint("grammar", text)

    def _constraint(self, kind: _Kind, text: str) -> GrammarConstraint:
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(
                f"the {kind} has {len(text)} characters; wanted at most {_MOST_CHARACTERS}"
            )
        key = (kind, text)
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            # Not with the lock: it can take a second, and others need not wait for it.
            compiled = self._compile(kind, text)
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            # A copy, which must not meet another one being made.
            return GrammarConstraint(compiled, self._opened[1], self._vocab_size, self._ends)

    @cached_property
    def _opened(self) -> tuple[LLTokenizer, _Vocabulary]:
        """The tokenizer, which takes a moment to open."""
        n_tokens = max(self._vocab_size, self._tokenizer.vocab_size)
        # It wants some; where there are none, what it puts in a mask ends nothing.
        ends = sorted(i for i in self._ends if i < n_tokens) or None
        try:
            opened = LLTokenizer(self._tokenizer.to_json(), n_vocab=n_tokens, eos_token=ends)
        except ValueError as error:
            raise ValueError(
                f"grammars do not work with this model's tokenizer: {_reason(str(error))}"
            ) from None
        n_rows = min(self._vocab_size, self._tokenizer.vocab_size)
        return opened, _Vocabulary(opened, n_rows)

    def _compile(self, kind: _Kind, text: str) -> _Compiled:
        tokenizer, vocabulary = self._opened
        if kind == "schema":
            grammar = f"start: %json {text}"
        elif kind == "regular expression":
            grammar = f"start: /{regex_to_lark(text)}/"
        else:
            grammar = text
        # Without this, what is certain could only be written with the tokenizer's own tokens for
        # it, which may be more than the closing counts with.
        grammar += '\n%llguidance {"no_forcing": true}'
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise ValueError(f"the {kind} is not supported: {_reason(matcher.get_error())}")
        closer, bounds = _Closer((), [text]), _UNKNOWN
        if kind == "schema":
            facts = _Schema(json.loads(text))
            closer = _Closer(facts.keys, facts.patterns)
            jump = facts.size * (1 + vocabulary.most_opened)
            bounds = _Bounds(np.inf if facts.nests else facts.size, jump)
        of_bytes = LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=_LIMITS)
        place = _Place(of_bytes, _JsonText() if kind == "schema" else None)
        closing = closer.search(place, _LONGEST_CLOSING, _PATIENCE)
        if closing is None:
            raise ValueError(
                f"the {kind} is not supported: no text was found that satisfies it within "
                f"{_LONGEST_CLOSING} bytes"
            )
        return _Compiled(matcher, place, closer, bounds, closing)
