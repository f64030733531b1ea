"""Grammars: what is generated follows them, and is complete within `max_tokens`, whatever comes.

Most tests choose tokens by made-up logits, which are worse than any model's: flat, in love with
brackets, never ending. Some run the bundled model through the engine.
"""

import io
import json
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import bitnet_rs
import json_schemas
from bitnet_rs.completion import Completion, Reply, run
from bitnet_rs.engine import Running
from bitnet_rs.loaders.sentencepiece import tokenizer_from_sentencepiece
from bitnet_rs.model import Model
from bitnet_rs.server.grammar import GrammarConstraint, Grammars
from bitnet_rs.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "python" / "bitnet_rs" / "demo"
ENDS = frozenset({4094, 4095})
VOCAB_SIZE = 4096

Logits = NDArray[np.float32]

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2},
        "age": {"type": "integer", "minimum": 18, "maximum": 120},
        "height": {"type": "number"},
        "kind": {"enum": ["friend", "foe", None]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "home": {
            "type": "object",
            "properties": {
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                "since": {"type": "string", "format": "date"},
            },
            "required": ["zip", "since"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "kind", "tags", "home"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {"$ref": "#/$defs/tree", "$defs": json_schemas._DEFINITIONS}


@pytest.fixture(scope="module")
def model() -> Model:
    return bitnet_rs.load("demo")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB_SIZE, ENDS)


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer) -> list[str]:
    """The tokens' texts; parts of characters are U+FFFD."""
    return [tokenizer.token_text(i) for i in range(VOCAB_SIZE)]


def flat(rng: np.random.Generator, size: int = VOCAB_SIZE) -> Logits:
    return rng.normal(size=size).astype(np.float32)


def write(
    constraint: GrammarConstraint,
    max_tokens: int,
    logits: Callable[[], Logits],
    ends: frozenset[int] = ENDS,
) -> tuple[list[int], bool]:
    """Takes the most probable token every time; says whether the text came to its end."""
    tokens: list[int] = []
    for remaining in range(max_tokens, 0, -1):
        row = logits()
        constraint.restrict(row, remaining)
        token = int(row.argmax())
        assert row[token] > -np.inf
        if token in ends:
            return tokens, True
        tokens.append(token)
        if constraint.accept(token):
            return tokens, True
    return tokens, False


# Every text is complete, in time.


def wishes(style: str, seed: int, texts: list[str]) -> Callable[[], Logits]:
    """Logits of a model with one bad habit."""
    rng = np.random.default_rng(seed)
    habit = np.zeros(VOCAB_SIZE, np.float32)
    if style == "opens":
        habit[:] = [sum(map(t.count, '{[",')) - t.count("}") - t.count("]") for t in texts]
    elif style == "goes on":
        habit[[*ENDS]] = -9
        habit[[i for i, text in enumerate(texts) if set(text) & set('"}]')]] = -9
    elif style == "long words":
        habit[:] = [len(text) for text in texts]
    return lambda: habit * 8 + 3 * flat(rng)


STYLES = ["flat", "opens", "goes on", "long words"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    json_schemas.schemas(),
    st.integers(0, 1 << 30),
    st.sampled_from(STYLES),
    st.sampled_from([0, 0, 1, 4, 20, 60, 300]),
)
def test_texts_of_any_schema_parse_and_validate(
    grammars: Grammars,
    tokenizer: Tokenizer,
    texts: list[str],
    schema: dict[str, Any],
    seed: int,
    style: str,
    more: int,
) -> None:
    constraint = grammars.json_schema(schema)
    tokens, ended = write(constraint, constraint.shortest + more, wishes(style, seed, texts))
    assert ended
    value = json.loads(tokenizer.decode(tokens))
    jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("more", [0, 3, 40, 150])
@pytest.mark.parametrize(
    "schema", [PERSON, TREE, {"type": "object"}], ids=["person", "tree", "any"]
)
def test_hard_schemas_end_in_time(
    grammars: Grammars,
    tokenizer: Tokenizer,
    texts: list[str],
    schema: dict[str, Any],
    style: str,
    more: int,
) -> None:
    constraint = grammars.json_schema(schema)
    tokens, ended = write(constraint, constraint.shortest + more, wishes(style, 1, texts))
    assert ended
    jsonschema.Draft202012Validator(schema).validate(json.loads(tokenizer.decode(tokens)))


@pytest.mark.parametrize(
    ("schema", "most"),
    [
        # Short ways out that a straight walk misses.
        ({"anyOf": [{"type": "string", "minLength": 500}, {"type": "null"}]}, 4),
        ({"anyOf": [{"type": "integer", "minimum": 10**15}, {"type": "string"}]}, 2),
        ({"type": "string", "pattern": "^(ab)*c$"}, 3),
        ({"type": "string", "pattern": "^([a-z]{40}|z)$"}, 3),
        ({"enum": ["a" * 90, "b" * 30, "cc"]}, 4),
        ({"type": "integer", "multipleOf": 7}, 2),
    ],
    ids=str,
)
def test_short_texts_are_found_where_there_is_room_for_no_others(
    grammars: Grammars, tokenizer: Tokenizer, texts: list[str], schema: dict[str, Any], most: int
) -> None:
    for style in STYLES:
        constraint = grammars.json_schema(schema)
        tokens, ended = write(constraint, most, wishes(style, 1, texts))
        assert ended
        jsonschema.Draft202012Validator(schema).validate(json.loads(tokenizer.decode(tokens)))


def test_with_too_few_tokens_the_text_ends_for_its_length(
    grammars: Grammars, tokenizer: Tokenizer, texts: list[str]
) -> None:
    constraint = grammars.json_schema(PERSON)
    tokens, ended = write(constraint, constraint.shortest // 2, wishes("flat", 1, texts))
    assert not ended
    assert len(tokens) == constraint.shortest // 2
    assert tokenizer.decode(tokens).startswith('{"name":"')


@pytest.mark.parametrize("more", [0, 2, 30])
def test_regular_expressions(
    grammars: Grammars, tokenizer: Tokenizer, texts: list[str], more: int
) -> None:
    for pattern in ("[a-z]+@[a-z]+\\.(com|org)", "(a|b)*c{5}", "x/y\\n?", "\\d{3}-\\d{4}"):
        for style in STYLES:
            constraint = grammars.regex(pattern)
            tokens, ended = write(constraint, constraint.shortest + more, wishes(style, 2, texts))
            assert ended
            assert re.fullmatch(pattern, tokenizer.decode(tokens))


def test_a_grammar_of_ones_own(grammars: Grammars, tokenizer: Tokenizer, texts: list[str]) -> None:
    sums = 'start: term ("+" term)*\nterm: /[0-9]+/ | "(" start ")"'
    for more in (0, 7, 60):
        constraint = grammars.lark(sums)
        tokens, ended = write(constraint, constraint.shortest + more, wishes("opens", 3, texts))
        assert ended
        assert re.fullmatch(r"[0-9+()]+", tokenizer.decode(tokens))
        assert tokenizer.decode(tokens).count("(") == tokenizer.decode(tokens).count(")")


@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0, "maximum": 0.5},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1e-7},
        {"minimum": 1.5, "exclusiveMaximum": 2},
        {"exclusiveMinimum": -1.5, "exclusiveMaximum": -1.4},
        {"exclusiveMinimum": 10**6, "maximum": 10**6 + 0.25},
        {"exclusiveMinimum": 10**15},
        {"exclusiveMaximum": -0.001, "maximum": -3},
        {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
        {"type": ["integer", "null"], "exclusiveMinimum": 3.5},
    ],
    ids=str,
)
def test_numbers_keep_within_their_bounds_and_end(
    grammars: Grammars, tokenizer: Tokenizer, texts: list[str], bounds: dict[str, Any]
) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "number", **bounds}},
        "required": ["n"],
    }
    zeros = np.array([8 * (set(text) <= {"0", "."}) for text in texts], np.float32)
    for seed, habit in ((1, 0), (2, 0), (3, 0), (1, 1), (2, 1)):
        rng = np.random.default_rng(seed)
        constraint = grammars.json_schema({**schema, "additionalProperties": False})
        tokens, ended = write(constraint, 80, lambda: habit * zeros + flat(rng))  # noqa: B023 (used at once)
        assert ended
        # Zeros alone do not fill what there is room for.
        assert len(tokens) < 40
        jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)


# What may come next.


def test_far_from_the_end_the_grammar_alone_decides(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    constraint = grammars.json_schema(PERSON)
    for token in tokenizer.encode('{"name":"Al', add_special_tokens=False):
        assert not constraint.accept(token)
    row = np.zeros(VOCAB_SIZE, np.float32)
    constraint.restrict(row, 2000)
    # In a string nearly all may come, and what may come is as probable as before.
    assert np.count_nonzero(row == 0) > 3000
    assert np.count_nonzero(row == -np.inf) == VOCAB_SIZE - np.count_nonzero(row == 0)
    assert all(row[end] == -np.inf for end in ENDS)


def test_near_the_end_probable_tokens_are_kept(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.json_schema({"enum": ["yes", "no", "not at all"]})
    row = np.zeros(VOCAB_SIZE, np.float32)
    constraint.restrict(row, 4)
    constraint.accept(tokenizer.encode('"', add_special_tokens=False)[0])
    row = flat(np.random.default_rng(1))
    before = row.copy()
    constraint.restrict(row, 3)
    allowed = {tokenizer.token_text(int(i)) for i in np.flatnonzero(row > -np.inf)}
    assert {"yes", "no", "not"} >= allowed >= {"yes", "no"} or "y" in allowed
    kept = row > -np.inf
    assert np.array_equal(row[kept], before[kept])


def test_only_a_complete_text_may_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.json_schema({"type": "integer", "minimum": 10})
    for digits in ("", "1", "12"):
        if digits:
            (digit,) = tokenizer.encode(digits[-1], add_special_tokens=False)
            assert not constraint.accept(digit)
        row = np.zeros(VOCAB_SIZE, np.float32)
        constraint.restrict(row, 500)
        assert [row[end] == 0 for end in ENDS] == [len(digits) == 2] * 2


def test_where_nothing_may_follow_the_text_is_over(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    constraint = grammars.json_schema({"const": {"a": [1]}})
    *most, last = tokenizer.encode('{"a":[1]}', add_special_tokens=False)
    assert not any(constraint.accept(token) for token in most)
    assert constraint.accept(last)


def test_any_end_ends(grammars: Grammars) -> None:
    # With ignore_eos it is no stop id of the request, and comes here.
    assert all(grammars.json_schema({}).accept(end) for end in ENDS)


def test_properties_may_be_called_as_keywords_are(
    grammars: Grammars, tokenizer: Tokenizer, texts: list[str]
) -> None:
    names = ["exclusiveMinimum", "enum", "required", "$ref", "x-guidance", "minItems", "pattern"]
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    tokens, ended = write(grammars.json_schema(schema), 200, wishes("flat", 1, texts))
    assert ended
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)


def test_json_has_no_blanks_and_one_spelling(grammars: Grammars, tokenizer: Tokenizer) -> None:
    def follows(schema: dict[str, Any], text: str) -> bool:
        constraint = grammars.json_schema(schema)
        for token in tokenizer.encode(text, add_special_tokens=False):
            row = np.zeros(VOCAB_SIZE, np.float32)
            constraint.restrict(row, 5000)
            if row[token] == -np.inf:
                return False
            constraint.accept(token)
        return True

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert follows(schema, '{"a":1,"b":"x y\\n"}')
    assert not follows(schema, '{"a": 1')
    assert not follows(schema, ' {"a"')
    # Another spelling of a name would get around its schema.
    assert not follows(schema, '{"\\u0061":"x"')
    assert not follows(schema, '{"a":1,"a"')
    # A schema's own options for llguidance do not count.
    schema["x-guidance"] = {"whitespace_flexible": True}
    assert not follows(schema, '{ "a"')


# Vocabularies.


def test_rows_without_a_token_are_never_chosen(tokenizer: Tokenizer) -> None:
    padded = Grammars(tokenizer, VOCAB_SIZE + 100, ENDS)
    constraint = padded.json_schema({"type": "string"})
    for remaining in (900, 3):
        row = np.zeros(VOCAB_SIZE + 100, np.float32)
        row[VOCAB_SIZE:] = 9
        constraint.restrict(row, remaining)
        assert row.max() == 0
        constraint.accept(tokenizer.encode('"', add_special_tokens=False)[0])


def test_tokens_without_a_row_are_not_needed(tokenizer: Tokenizer) -> None:
    # The model has 300 rows only; the ends are beyond them.
    grammars = Grammars(tokenizer, 300, ENDS)
    rng = np.random.default_rng(1)
    for more in (0, 50):
        constraint = grammars.json_schema(PERSON)
        tokens, ended = write(constraint, constraint.shortest + more, partial(flat, rng, 300))
        assert ended
        jsonschema.validate(json.loads(tokenizer.decode(tokens)), PERSON)


def test_without_any_end_the_first_one_counts(tokenizer: Tokenizer, texts: list[str]) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, frozenset())
    constraint = grammars.json_schema({"type": "integer", "minimum": 1000})
    tokens, ended = write(constraint, 50, wishes("flat", 1, texts), frozenset())
    assert ended
    assert int(tokenizer.decode(tokens)) >= 1000


def test_a_vocabulary_of_sentencepiece() -> None:
    corpus = (DEMO.parents[2] / "README.md").read_text(encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    files = tokenizer_from_sentencepiece(model.getvalue(), "tokenizer.model", add_bos=False)
    tokenizer = Tokenizer._of_files(files, "tokenizer.model", None, "")
    size = tokenizer.vocab_size
    ends = frozenset(tokenizer.eos_token_ids)
    grammars = Grammars(tokenizer, size, ends)
    rng = np.random.default_rng(1)
    for more in (0, 20, 200):
        constraint = grammars.json_schema(PERSON)
        rows = partial(flat, rng, size)
        tokens, ended = write(constraint, constraint.shortest + more, rows, ends)
        assert ended
        jsonschema.validate(json.loads(tokenizer.decode(tokens)), PERSON)


def test_a_tokenizer_that_cannot_be_read_is_named() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(ValueError, match="grammars do not work with this model's tokenizer"):
        Grammars(Tokenizer(backend), 2, frozenset({1})).json_object()


# What is refused, and how fast.


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(levels: int) -> dict[str, Any]:
    """A small schema whose texts have 2^levels parts."""
    definitions: dict[str, Any] = {"n0": {"type": "null"}}
    for i in range(levels):
        twice = [{"$ref": f"#/$defs/n{i}"}] * 2
        definitions[f"n{i + 1}"] = {"type": "array", "prefixItems": twice, "minItems": 2}
    return {"$ref": f"#/$defs/n{levels}", "$defs": definitions}


REFUSED: list[tuple[Any, str]] = [
    (True, "no JSON object"),
    ([], "no JSON object"),
    ({"enum": {1}}, "no JSON object"),
    ({"type": "foo"}, "Invalid type: foo"),
    ({"properties": 3}, "properties must be an object"),
    ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
    ({"if": {}, "then": {}}, 'Unimplemented keys: \\["if", "then"\\]'),
    ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
    ({"type": "object", "minProperties": 2}, "minProperties 2 where properties may have any name"),
    ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
    ({"type": "string", "format": "iri"}, "Unknown format: iri"),
    ({"type": "string", "pattern": "(a"}, "unclosed group"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"enum": ["a\x01"]}, "enum has the control character U\\+0001"),
    ({"const": {"k": ["\x7f"]}}, "const has the control character U\\+007F"),
    ({"enum": ["\ud800"]}, "failed to parse"),
    ({"enum": []}, "Unsatisfiable"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "Unsatisfiable"),
    ({"type": "integer", "minimum": 10**30}, "Failed to generate regex for integer range"),
    ({"$ref": "#/$defs/nowhere"}, "'/\\$defs/nowhere' does not exist"),
    ({"$ref": "http://example.com/x.json"}, "is not present in a registry"),
    ({"$ref": "#"}, "no text was found"),
    (
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        "no text was found",
    ),
    ({"type": "string", "minLength": 10**6}, "no text was found that satisfies it within"),
    ({"type": "array", "minItems": 10**6}, "no text was found"),
    ({"type": "string", "pattern": "(((a{99}){99}){99}){99}"}, "no text was found|too"),
    (doubling(40), "no text was found"),
    (deep(100), "recursion limit"),
    ({"enum": [f"value {i}" for i in range(100_000)]}, "characters; wanted at most"),
    ({"enum": [f"v{i}" for i in range(33_000)]}, "too big|characters"),
    (
        {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(9)]} for i in range(9)]},
        "too large",
    ),
]


@pytest.mark.parametrize(("schema", "match"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_soon(grammars: Grammars, schema: Any, match: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=match) as error:
        grammars.json_schema(schema)
    # Seconds, for machines that are busy; it takes one at most.
    assert time.perf_counter() - start < 15
    # Nothing of the grammar around it, of which whoever sent the schema knows nothing.
    assert "start:" not in str(error.value)
    assert "x-guidance" not in str(error.value)
    assert len(str(error.value)) < 700


def test_a_schema_too_deep_for_python_is_refused(grammars: Grammars) -> None:
    with pytest.raises(ValueError, match="no JSON object: maximum recursion depth"):
        grammars.json_schema(deep(10_000))


def test_grammars_that_are_none_are_refused(grammars: Grammars) -> None:
    with pytest.raises(ValueError, match="the regular expression is not supported: invalid regex"):
        grammars.regex("(a")
    with pytest.raises(ValueError, match='the grammar is not supported: unknown name: "x"'):
        grammars.lark("start: x")
    with pytest.raises(ValueError, match="the grammar is not supported: no text was found"):
        grammars.lark('start: "a" start')


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"value {i}" for i in range(10_000)]},
        {"type": "string", "maxLength": 10**9},
        {
            "type": "array",
            "maxItems": 10**6,
            "items": {"type": "string", "pattern": "(.*a.*b){20}"},
        },
        deep(40),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_large_takes_no_longer(
    grammars: Grammars, tokenizer: Tokenizer, texts: list[str], schema: dict[str, Any]
) -> None:
    start = time.perf_counter()
    constraint = grammars.json_schema(schema)
    tokens, ended = write(constraint, constraint.shortest + 20, wishes("flat", 1, texts))
    assert ended
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)
    assert time.perf_counter() - start < 15


def test_what_gets_too_complex_on_the_way_is_an_error(grammars: Grammars, texts: list[str]) -> None:
    pattern = "^(([a-z]{1,30}){1,30}){1,30}x(.{1,50}y){1,50}$"
    constraint = grammars.json_schema({"type": "string", "pattern": pattern})
    with pytest.raises(ValueError, match="the grammar is too complex: lexer error: too many exp"):
        write(constraint, 400, wishes("goes on", 1, texts))


# Many at once.


def test_a_compiled_grammar_serves_many_texts(grammars: Grammars, tokenizer: Tokenizer) -> None:
    first, second = grammars.json_schema(PERSON), grammars.json_schema(PERSON)
    for token in tokenizer.encode('{"name":"', add_special_tokens=False):
        first.accept(token)
    row = np.zeros(VOCAB_SIZE, np.float32)
    second.restrict(row, 500)
    allowed = [tokenizer.token_text(int(i)) for i in np.flatnonzero(row == 0)]
    assert all(text.startswith("{") for text in allowed)


def test_threads_compile_at_once(tokenizer: Tokenizer, texts: list[str]) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, ENDS)
    done: list[int] = []

    def work(i: int) -> None:
        schema = {"type": "array", "items": {"const": i % 3}, "minItems": 3}
        constraint = grammars.json_schema(schema)
        tokens, ended = write(constraint, 30, wishes("flat", i, texts))
        if ended and set(json.loads(tokenizer.decode(tokens))) == {i % 3}:
            done.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(12))


# With the bundled model.


def generate(model: Model, constraint: GrammarConstraint, **options: Any) -> Completion:
    prompt = np.array(model.encode("Once upon a time there was a man:"), np.uint32)
    settings = model.settings(**options)
    request = model.request(prompt, settings, constraint=constraint)
    reply = Reply(Running(request), model.tokenizer)
    for _ in run(model.runner, [reply]):
        pass
    return reply.completion()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("more", [0, 15, 150])
@pytest.mark.parametrize(
    "schema", [PERSON, TREE, {"type": "object"}], ids=["person", "tree", "any"]
)
def test_the_model_writes_json(
    model: Model, schema: dict[str, Any], more: int, temperature: float
) -> None:
    constraint = Grammars(model.tokenizer, model.vocab_size, model.stop_ids).json_schema(schema)
    most = constraint.shortest + more
    found = generate(model, constraint, max_tokens=most, temperature=temperature, seed=1)
    jsonschema.Draft202012Validator(schema).validate(json.loads(found.text))
    assert found.finish_reason == "stop"
    assert len(found.tokens) <= most


def test_too_few_tokens_show_as_such(model: Model) -> None:
    constraint = Grammars(model.tokenizer, model.vocab_size, model.stop_ids).json_schema(PERSON)
    found = generate(model, constraint, max_tokens=constraint.shortest // 2)
    assert found.finish_reason == "length"
    assert found.text.startswith('{"name":')
