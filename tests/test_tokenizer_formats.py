"""Tokenizers that are no tokenizer.json: sentencepiece's, and GGUF's, there and back.

The outside truth for sentencepiece is its own package, on models trained here and on vocabularies
made up to be awkward. For GGUF it is the tokenizer.json that went in.
"""

import io
import json
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitnet_rs.loaders.gguf_tokenizer import tokenizer_from_gguf
from bitnet_rs.loaders.sentencepiece import tokenizer_from_sentencepiece
from bitnet_rs.loaders.tokenizer_json import AddedToken
from bitnet_rs.tokenizer import Tokenizer
from bitnet_rs.writers.gguf_tokenizer import gguf_from_tokenizer

DATA = Path(__file__).parent / "data"
DEMO = Path(__file__).parents[1] / "python" / "bitnet_rs" / "demo"

MESSAGES = [{"role": "user", "content": " Hi "}]
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

CORPUS = """\
The miller had three sons, a mill, a donkey and a cat. The sons ground the corn, the donkey
carried the flour, and the cat caught the mice. When the miller died the sons divided what there
was: the eldest took the mill, the second the donkey, and for the youngest nothing was left but
the cat. He was sad and said to himself: "I have got the worst of it. My brothers can earn their
bread, but what am I to do with a cat? I can have a pair of gloves made from his fur, and then
that is the end of it."

"Listen," said the cat, who had understood every word, "there is no need to kill me for a pair of
bad gloves. Have a pair of boots made for me, so that I can go out and be seen among people, and
you shall soon be helped." The miller's son was surprised that the cat could speak; but as the
shoemaker was just passing, he called him in and had him measure the cat for a pair of boots. When
they were ready the cat put them on, took a sack, filled the bottom of it with corn, fastened a
string to the top with which it could be drawn together, threw it over his back and walked out
of the door on two legs, like a man.

    def mill(corn):
        return [grain for grain in corn if grain > 0]

Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. El veloz murciélago hindú comía
feliz cardillo y kiwi. 1 2 3 10 100 1000 == != ---- ==== ....
"""

AWKWARD = [
    "the cat",
    " the cat, the donkey and the mill",
    'He said: "it\'s 100"',
    "  ",
    "\n",
    "\t",
    "\r\n",
    "a" * 9,
    "====",
    "--------",
    "Zażółć gęślą jaźń",
    "日本語、中文",
    "e\u0301\u0323",
    "👩‍👩‍👧 🏳️‍🌈",
    "\x00\x1f\x7f",
    SPACE,
    "<unk>",
    "<0x41>",
    "<sep>",
]
runs = st.builds(str.__mul__, st.sampled_from(" a\n=-\u2581é"), st.integers(0, 70))
texts = st.lists(st.sampled_from(AWKWARD) | runs | st.text(max_size=8), max_size=6).map("".join)

Piece = tuple[str, float, int]


# sentencepiece: trained models.


@cache
def trained(
    *,
    byte_fallback: bool = True,
    prefix: bool = True,
    extra: bool = False,
    symbols: tuple[str, ...] = (),
    kind: str = "bpe",
    rule: str = "identity",
    **options: Any,
) -> bytes:
    """A small sentencepiece model; `extra` is `remove_extra_whitespaces`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")),
        model_writer=model,
        model_type=kind,
        vocab_size=600 if byte_fallback else 340,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=extra,
        normalization_rule_name=rule,
        user_defined_symbols=list(symbols),
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def converted(data: bytes, tmp: Any = None, **options: Any) -> Tokenizer:
    options.setdefault("add_bos", False)
    files = tokenizer_from_sentencepiece(data, "tokenizer.model", **options)
    return Tokenizer._of_files(files, "tokenizer.model", None, "")


@cache
def both(data: bytes) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    return sentencepiece.SentencePieceProcessor(model_proto=data), converted(data)


def assert_same(data: bytes, text: str) -> None:
    original, tokenizer = both(data)
    ids = original.EncodeAsIds(text)
    assert tokenizer.encode(text) == ids, text
    # sentencepiece writes unknown tokens its own way.
    if original.unk_id() not in ids:
        assert tokenizer.decode(ids, skip_special_tokens=False) == original.DecodeIds(ids)


def without_special(text: str) -> str:
    """Special tokens in a text count as such here, and never in sentencepiece."""
    for token in ("<unk>", "<s>", "</s>"):
        text = text.replace(token, "")
    return text


@settings(max_examples=150)
@given(
    texts.map(without_special),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), ("<sep>", "donkey", "\n")]),
)
def test_ids_of_trained_models_are_those_of_sentencepiece(
    text: str,
    byte_fallback: bool,  # noqa: FBT001
    prefix: bool,  # noqa: FBT001
    symbols: tuple[str, ...],
) -> None:
    assume(not (prefix and text in symbols))  # the known difference
    data = trained(byte_fallback=byte_fallback, prefix=prefix, symbols=symbols)
    assert_same(data, text)


@settings(max_examples=60)
@given(texts.map(without_special).map(lambda text: text.replace(SPACE, "")), st.booleans())
def test_extra_spaces_go_as_in_sentencepiece(
    text: str,
    prefix: bool,  # noqa: FBT001
) -> None:
    symbols = ("<sep>", "=")
    assume(not (prefix and text.strip(" ") in symbols))
    assert_same(trained(prefix=prefix, extra=True, symbols=symbols), text)


def test_the_known_difference_is_one_missing_prefix() -> None:
    original, tokenizer = both(trained(symbols=("<sep>", "donkey", "\n")))
    alone = original.EncodeAsIds("<sep>")
    assert original.EncodeAsPieces("<sep>") == [SPACE, "<sep>"]
    assert tokenizer.encode("<sep>") == alone[1:]


def test_user_defined_spaces_are_found_after_escaping() -> None:
    # As Gemma has them: runs of spaces and of line breaks, and no prefix.
    for symbols in ((SPACE * 2, SPACE * 4, "\n\n", f"a{SPACE}b"), ("  ", "x y")):
        data = trained(prefix=False, symbols=symbols)
        for text in ("a  b", "a    b     c", "\n\n\n", "the  cat", "  ", SPACE * 2, "a b", "x y"):
            assert_same(data, text)


# sentencepiece: made-up vocabularies.


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def part(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: str, score: float, kind: int) -> bytes:
    number = varint(2 << 3 | 5) + struct.pack("<f", score)
    return part(1, part(1, text.encode()) + number + part(3, kind))


BYTES: list[Piece] = [(f"<0x{value:02X}>", 0.0, BYTE) for value in range(256)]
BASE: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]


def model(pieces: Iterable[Piece], trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    """A `ModelProto` of the kind BPE: prefix, no bytes, spaces as they come; fields may follow."""
    specs = part(2, part(3, 2) + trainer) + part(3, part(4, 0) + normalizer)
    return b"".join(piece(*one) for one in pieces) + specs


names = st.lists(st.text("ab\u2581", min_size=2, max_size=7), unique=True, max_size=30)


@settings(max_examples=150)
@given(names, st.lists(st.text("ab ", max_size=40), min_size=1, max_size=5))
def test_ids_of_any_vocabulary_are_those_of_sentencepiece(
    pieces: list[str], lines: list[str]
) -> None:
    # Scores in the order of the list, so that long pieces may go before their parts.
    vocabulary = [(text, -float(rank), NORMAL) for rank, text in enumerate([*pieces, *"ab\u2581"])]
    data = model([*BASE, *vocabulary])
    original = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = converted(data)
    assert tokenizer.notes == ()
    for line in lines:
        assert tokenizer.encode(line) == original.EncodeAsIds(line)


def test_runs_of_one_score_grow_from_the_left() -> None:
    # As in Llama's vocabulary, where 2 to 16 spaces have the score -1e9 all.
    spaces = [(SPACE * length, -1e9, NORMAL) for length in (2, 4, 8, 5, 16, 6, 12, 3, 7, 1)]
    letters = [("a", -9.0, NORMAL), (f"{SPACE}a", -1.0, NORMAL)]
    data = model([*BASE, *BYTES, *spaces, *letters], trainer=part(35, 1))
    assert both(data)[1].notes == ()
    for count in range(100):
        assert_same(data, " " * count)
        assert_same(data, "a" + " " * count + "a" + " " * (count // 2))


@pytest.mark.parametrize(
    ("pieces", "note"),
    [
        (
            [("ab", 1.0, NORMAL), ("bc", 1.0, NORMAL), *((c, 0.0, NORMAL) for c in "abc")],
            r"2 pieces such as 'ab' have the score of another one",
        ),
        (
            [("ab", 1.0, NORMAL), ("a", 0.0, NORMAL)],
            r"1 pieces such as 'ab' are made of a character that is no piece",
        ),
        (
            [("ab", 1.0, UNUSED), ("a", 0.0, NORMAL), ("b", 0.0, NORMAL)],
            r"1 unused pieces such as 'ab' are passed over",
        ),
    ],
    ids=["tied", "orphan", "unused"],
)
def test_what_merges_cannot_say_is_noted(pieces: list[Piece], note: str) -> None:
    (said,) = converted(model([*BASE, *pieces])).notes
    assert said.startswith("tokenizer.model: ")
    assert note in said


def test_pieces_that_cannot_be_reached_are_no_reason_for_a_note() -> None:
    # "abc0" would need the character 0 and "abc", which nothing makes.
    data = model([*BASE, ("abc", -1.0, NORMAL), ("abc0", -2.0, NORMAL)])
    assert converted(data).notes == ()


# sentencepiece: bad files.


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "holds no pieces; download"),
        (b"IQ== 0\nIg== 1\n", "list of ranks as tiktoken reads it.*save_pretrained"),
        (b'{"model": {}}', "not a sentencepiece model"),
        (part(1, 7), "field 1 of wire type 0"),
        (b"\x0a\x05abc", r"at byte 2: 5 bytes announced, 3 left"),
        (b"\x0a" + b"\xff" * 11, "a number of more than 64 bits"),
        (b"\x0b", "wire type 3"),
        (b"\xff", "ends inside a number"),
        (part(1, part(1, 7)), r"piece 0: field 1 has wire type 0; wanted 2"),
        (part(1, part(1, b"\xff")), r"piece 0: field 1 is not UTF-8"),
        (model([]), "holds no pieces"),
        (model([*BASE, ("a", 0.0, NORMAL), ("a", 1.0, NORMAL)]), "pieces 3 and 4 are both 'a'"),
        (model([("a", 0.0, NORMAL)]), "0 unknown pieces and 0 empty ones; wanted 1 and 0"),
        (model([*BASE, ("", 0.0, NORMAL)]), "1 unknown pieces and 1 empty ones"),
        (model([*BASE, ("ab", float("nan"), NORMAL)]), r"score of piece 3 \('ab'\) is not a num"),
        (model([*BASE, ("a" * 300, 0.0, NORMAL)]), "piece 3 has 300 characters; .* at most 256"),
        (model([*BASE, *BYTES[1:]], part(35, 1)), "1 bytes such as <0x00> are no pieces"),
        (model(BASE, part(3, 3)), "model_type` is word; supported: BPE.*save_pretrained"),
        (model(BASE, part(3, 9)), "model_type` is 9; supported: BPE"),
        (model(BASE, part(24, 1)), "treat_whitespace_as_suffix` is true; supported: false"),
        (model(BASE, b"", part(5, 0)), "escape_whitespaces` is false; supported: true"),
        (model(BASE, b"", part(2, b"abc")), "precompiled_charsmap` holds 3 bytes; supported: none"),
        (
            model([*BASE, (f"a{SPACE}", 0.0, USER_DEFINED)], b"", part(4, 1)),
            "user-defined pieces with spaces; supported: one of both",
        ),
        (
            model([*BASE, *((f"<{i}>", 0.0, USER_DEFINED) for i in range(1001))]),
            "has 1001 user-defined pieces.*at most 1000",
        ),
    ],
)
def test_unreadable_models_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        converted(data)
    assert str(caught.value).startswith("tokenizer.model: ")


def test_kinds_whose_ids_could_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model_type` is Unigram; supported: BPE"):
        converted(trained(kind="unigram"))
    with pytest.raises(ValueError, match=r"precompiled_charsmap` holds \d+ bytes; supported: none"):
        converted(trained(rule="nmt_nfkc"))


@settings(max_examples=120)
@given(st.data())
def test_damaged_models_fail_cleanly(data: st.DataObject) -> None:
    whole = bytearray(model([*BASE, ("ab", -1.0, NORMAL), ("a", -2.0, NORMAL), ("b", 0.0, NORMAL)]))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        converted(damaged).encode("ab")
    except ValueError as error:
        if not str(error).startswith("tokenizer.model"):
            raise


# sentencepiece: folders.


def spm_folder(tmp_path: Path, data: bytes, **files: Any) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(data)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_folder_with_a_sentencepiece_model_as_1bitllm_has_it(tmp_path: Path) -> None:
    data = trained()
    original = both(data)[0]
    count = original.vocab_size()
    path = spm_folder(
        tmp_path,
        data,
        added_tokens={"<pad>": count, "<extra>": count + 1},
        special_tokens_map={"bos_token": {"content": "<s>"}, "pad_token": "<pad>"},
        tokenizer_config={
            "tokenizer_class": "BitnetTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "eos_token": {"content": "</s>"},
        },
    )
    tokenizer = Tokenizer.from_folder(path)
    assert tokenizer.vocab_size == count + 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.special_tokens["unk_token"] == "<unk>"
    assert tokenizer.special_id("<pad>") == count
    assert tokenizer.token_id("<extra>") == count + 1
    assert not tokenizer.is_special(count + 1)
    assert tokenizer.encode("the cat") == [1, *original.EncodeAsIds("the cat")]
    # Each stretch between special tokens is encoded on its own, prefix and all.
    pieces = [original.EncodeAsIds(text) for text in ("the", " cat ", "x")]
    ids = [*pieces[0], 1, *pieces[1], count + 1, *pieces[2]]
    assert tokenizer.encode("the<s> cat <extra>x", add_special_tokens=False) == ids
    assert tokenizer.decode(tokenizer.encode("  the cat")) == "  the cat"
    again = tmp_path / "again"
    again.mkdir()
    (again / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert Tokenizer.from_folder(again).encode("the<s> cat <extra>x") == [1, *ids]


def test_folder_that_is_not_legacy_has_one_prefix(tmp_path: Path) -> None:
    data = trained()
    original = both(data)[0]
    config = {"legacy": False, "add_bos_token": False, "add_eos_token": True}
    tokenizer = Tokenizer.from_folder(spm_folder(tmp_path, data, tokenizer_config=config))
    assert tokenizer.encode("the cat") == [*original.EncodeAsIds("the cat"), 2]
    # Fields may be written twice, and the later ones count: the same model without a prefix.
    bare = sentencepiece.SentencePieceProcessor(model_proto=data + part(3, part(3, 0)))
    ids = tokenizer.encode("the<s>cat", add_special_tokens=False)
    assert ids == [*original.EncodeAsIds("the"), 1, *bare.EncodeAsIds("cat")]
    assert converted(data + part(3, part(3, 0))).encode("cat") == bare.EncodeAsIds("cat")


def test_config_says_more_about_added_tokens(tmp_path: Path) -> None:
    data = trained()
    count = both(data)[0].vocab_size()
    config = {
        "add_bos_token": False,
        "additional_special_tokens": ["<b>", {"content": "<c>"}, 3],
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            str(count): {"content": "<a>", "special": False, "lstrip": True, "rstrip": True},
            str(count + 1): {"content": "<b>"},
        },
    }
    tokenizer = Tokenizer.from_folder(
        spm_folder(tmp_path, data, tokenizer_config=config, added_tokens={"<c>": count + 2})
    )
    special = [tokenizer.is_special(token) for token in range(count, count + 3)]
    assert special == [False, True, True]
    assert tokenizer.encode("the  <a>  <b>") == [
        *both(data)[0].EncodeAsIds("the"),
        count,
        count + 1,
    ]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"added_tokens": {"<pad>": "1"}}, r"added_tokens\.json: '<pad>' has the id '1'"),
        ({"added_tokens": {"<pad>": 1}}, r"'<pad>' has the id 1, but that id is '<s>'"),
        ({"added_tokens": {"<pad>": -1}}, r"'<pad>' has the id -1"),
        ({"added_tokens": {"<s>": 9000}}, r"'<s>' has the id 9000.*the token has the id 1 else"),
        ({"added_tokens": {"": 9000}}, r"'' has the id 9000"),
        ({"added_tokens": {"<a>": 9000, "<b>": 9000}}, r"'<a>' and '<b>' have the same id 9000"),
        ({"tokenizer_config": {"add_bos_token": 1}}, r"config\.json: field `add_bos_token` is 1"),
        ({"tokenizer_config": {"legacy": "no"}}, r"field `legacy` is 'no'; wanted true or false"),
        ({"tokenizer_config": {"bos_token": "<x>"}}, r"bos_token is '<x>', which is no piece"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"`added_tokens_decoder` has the en"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, r"has the entry 'x': \{\}"),
    ],
)
def test_files_beside_a_sentencepiece_model_are_checked(
    tmp_path: Path, files: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        Tokenizer.from_folder(spm_folder(tmp_path, trained(), **files))
    assert str(tmp_path) in str(caught.value)


# GGUF: byte-level, there and back.


def content(folder: Path) -> dict[str, Any]:
    loaded = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def from_json(content: dict[str, Any]) -> Tokenizer:
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


def to_gguf(source: dict[str, Any], size: int = 4100, **roles: str) -> dict[str, Any]:
    return gguf_from_tokenizer(source, roles, None, size, "tokenizer.json")


@cache
def demo_and_back() -> tuple[Tokenizer, Tokenizer]:
    demo = Tokenizer.from_folder(DEMO)
    metadata = gguf_from_tokenizer(
        content(DEMO), demo.special_tokens, demo.chat_template, demo.vocab_size + 7, "demo"
    )
    return demo, Tokenizer.from_gguf(metadata, "demo.gguf")


@settings(max_examples=60)
@given(texts)
def test_the_bundled_tokenizer_survives_gguf(text: str) -> None:
    demo, back = demo_and_back()
    ids = demo.encode(text)
    assert back.encode(text) == ids
    for skip in (True, False):
        assert back.decode(ids, skip_special_tokens=skip) == demo.decode(
            ids, skip_special_tokens=skip
        )


def test_special_tokens_and_template_survive_gguf() -> None:
    demo, back = demo_and_back()
    assert back.notes == ()
    assert back.vocab_size == demo.vocab_size  # the padding is gone
    assert back.special_tokens == demo.special_tokens
    assert back.eos_token_ids == demo.eos_token_ids
    assert back.end_of_turn_ids == demo.end_of_turn_ids
    assert back.apply_chat_template(MESSAGES) == demo.apply_chat_template(MESSAGES)
    assert back.special_id("<|eot_id|>") == demo.special_id("<|eot_id|>")


@pytest.mark.parametrize("name", ["bitnet-online", "bitnet-packed", "llama-packed"])
def test_golden_tokenizers_survive_gguf(name: str) -> None:
    golden = Tokenizer.from_folder(DATA / name)
    metadata = gguf_from_tokenizer(
        content(DATA / name), golden.special_tokens, golden.chat_template, 1024, name
    )
    assert "[PAD" not in "".join(metadata["tokenizer.ggml.tokens"])
    back = Tokenizer.from_gguf(metadata, name)
    for text in AWKWARD:
        assert back.encode(text) == golden.encode(text)
    assert back.apply_chat_template(MESSAGES) == golden.apply_chat_template(MESSAGES)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
LLAMA3 = content(DEMO)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NFC = {"type": "NFC"}


def split(regex: str, behavior: str = "Isolated", *, invert: bool = False) -> dict[str, Any]:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def like_demo(
    steps: Sequence[dict[str, Any]], normalizer: Any = None, *, ignore_merges: bool = False
) -> dict[str, Any]:
    """The bundled vocabulary behind other pre-tokenizers."""
    source = content(DEMO)
    source["model"]["ignore_merges"] = ignore_merges
    source["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
    source["normalizer"] = normalizer
    source["post_processor"] = {**BYTE_LEVEL, "use_regex": True}
    return source


PLAIN = {**BYTE_LEVEL, "use_regex": False}
WORDS = {**BYTE_LEVEL, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
RULES = {
    "llama-bpe": like_demo([split(LLAMA3), PLAIN], ignore_merges=True),
    "smaug-bpe": like_demo([split(LLAMA3), PLAIN]),
    "gpt-2": like_demo([WORDS]),
    "gpt-2 written out": like_demo([split(GPT2, "Removed", invert=True), PLAIN]),
    "olmo": like_demo([WORDS], NFC),
    "qwen2": like_demo([split(QWEN2), PLAIN], {"type": "Sequence", "normalizers": [NFC]}),
    "grok-2": like_demo([split(QWEN2), PLAIN]),
    "smollm": like_demo([DIGITS, WORDS]),
}


@cache
def rule_and_back(name: str) -> tuple[Tokenizer, Tokenizer]:
    metadata = to_gguf(RULES[name], bos_token="<|begin_of_text|>")
    assert metadata["tokenizer.ggml.pre"] == name.split()[0]
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    return from_json(RULES[name]), Tokenizer.from_gguf(metadata, "x.gguf")


@settings(max_examples=100)
@given(st.sampled_from(list(RULES)), texts | st.text("e\u0301\u0323é12 '\n\r."))
def test_pre_tokenizers_survive_gguf(name: str, text: str) -> None:
    before, after = rule_and_back(name)
    assert after.encode(text) == before.encode(text)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("llama3", "llama-bpe"),
        ("llama-v3", "llama-bpe"),
        ("falcon3", "llama-bpe"),
        ("falcon_e", "llama-bpe"),
        ("mpt", "olmo"),
        ("starcoder", "smollm"),
        ("refact", "smollm"),
        *((name.split()[0], name.split()[0]) for name in RULES),
    ],
)
def test_every_name_is_read_and_the_first_of_equals_written(name: str, written: str) -> None:
    files = tokenizer_from_gguf(metadata(**{"tokenizer.ggml.pre": name}), "x.gguf")
    again = gguf_from_tokenizer(files.json, files.special_tokens, None, 10, "x")
    assert again["tokenizer.ggml.pre"] == written


def test_user_defined_tokens_are_found_but_not_special() -> None:
    source = content(DEMO)
    for i, text in enumerate(("   ", "<tool>")):
        entry = {**source["added_tokens"][0], "id": 4096 + i, "content": text, "special": False}
        source["added_tokens"].append(entry)
    written = to_gguf(source)
    assert written["tokenizer.ggml.token_type"][-5:].tolist() == [3, 4, 4, 5, 5]
    back = Tokenizer.from_gguf(written, "x.gguf")
    assert back.encode("a   b<tool>") == from_json(source).encode("a   b<tool>")
    assert back.decode([4096, 4097]) == "   <tool>"


# GGUF: what metadata may say.


def metadata(**changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer of ten tokens; None takes a key away."""
    tokens = ["a", "b", "\u0120", "ab", "\u0120a", "<s>", "</s>", "c", "ca", "[PAD9]"]
    found: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 1, 1, 3, 3, 1, 1, 5], np.int32),
        "tokenizer.ggml.merges": ["a b", "\u0120 a", "c a"],
        "tokenizer.ggml.bos_token_id": np.uint32(5),
        "tokenizer.ggml.eos_token_id": 6,
        **changes,
    }
    return {key: value for key, value in found.items() if value is not None}


def test_bos_and_eos_as_llama_cpp_has_them() -> None:
    assert Tokenizer.from_gguf(metadata(), "x").encode("ab") == [5, 3]
    off = metadata(**{"tokenizer.ggml.add_bos_token": np.bool_(False)})
    assert Tokenizer.from_gguf(off, "x").encode("ab") == [3]
    ends = metadata(**{"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_eos_token": True})
    assert Tokenizer.from_gguf(ends, "x").encode("ab") == [3, 6]
    both_ends = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    written = Tokenizer.from_gguf(metadata(**both_ends), "x")
    assert written.encode("ab") == [5, 3, 6]
    again = gguf_from_tokenizer(
        json.loads(written.to_json()), written.special_tokens, None, 10, "x"
    )
    assert Tokenizer.from_gguf(again, "x").encode("ab") == [5, 3, 6]


def test_equal_merges_count_once_and_the_first_counts() -> None:
    repeated = metadata(**{"tokenizer.ggml.merges": ["c a", "a b", "\u0120 a", "c a"]})
    plain = {"tokenizer.ggml.pre": "gpt-2"}
    assert Tokenizer.from_gguf({**repeated, **plain}, "x").encode("cab") == [8, 1]
    assert Tokenizer.from_gguf({**metadata(), **plain}, "x").encode("cab") == [7, 3]


def test_a_turn_may_end_with_a_token_that_only_the_file_names() -> None:
    tokenizer = Tokenizer.from_gguf(metadata(**{"tokenizer.ggml.eot_token_id": 6}), "x")
    assert tokenizer.end_of_turn_ids == (6,)


BAD_TEMPLATE = (
    "{% for m in messages %}{{ 'Human: ' + m['content'] + '\\n\\nBITNETAssistant: ' + eos_token }}"
    "{% endfor %}"
)


def test_the_official_file_gets_its_rule_and_its_template() -> None:
    source = content(DEMO)
    written = gguf_from_tokenizer(
        source,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        BAD_TEMPLATE,
        4096,
        "demo",
    )
    del written["tokenizer.ggml.pre"]
    official = {**written, "general.architecture": "bitnet-b1.58"}
    tokenizer = Tokenizer.from_gguf(official, "2b.gguf")
    demo = Tokenizer.from_folder(DEMO)
    assert tokenizer.apply_chat_template(MESSAGES) == demo.apply_chat_template(MESSAGES)
    assert tokenizer.encode("the cat 123") == demo.encode("the cat 123")
    pre, template = tokenizer.notes
    assert pre.startswith("2b.gguf: field `tokenizer.ggml.pre` is missing")
    assert template.startswith("2b.gguf: field `tokenizer.chat_template` holds the template of")
    # Another model may mean it.
    other = Tokenizer.from_gguf({**official, "general.architecture": "llama"}, "x.gguf")
    assert other.chat_template == BAD_TEMPLATE
    assert len(other.notes) == 1  # Llama 3's tokens tell the rule


def test_a_file_without_a_tokenizer_is_no_damaged_one() -> None:
    for name in ("no_vocab", "none", None):
        with pytest.raises(FileNotFoundError, match=r"x\.gguf: holds no tokenizer"):
            Tokenizer.from_gguf(metadata(**{"tokenizer.ggml.model": name}), "x.gguf")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("model", "bert", r"is 'bert'; wanted 'gpt2' \(byte-level BPE\) or 'llama'"),
        ("model", 3, "is a int; wanted a string"),
        ("pre", "falcon", r"is 'falcon'; wanted one of llama-bpe, llama3, .*safetensors"),
        ("pre", None, "is missing, and the tokens are not those of Llama 3"),
        ("pre", "default", "is missing, and the tokens are not those of Llama 3"),
        ("pre", ["llama-bpe"], "is a list; wanted a string"),
        ("tokens", None, "is missing; wanted a list of strings"),
        ("tokens", np.arange(10), "is a ndarray; wanted a list of strings"),
        ("tokens", ["a", 1], "is a list; wanted a list of strings"),
        ("tokens", ["a", "b"], "is an array of int32 of shape"),
        ("tokens", [*"abcdefgh", "a", "i"], "has 'a' twice, as 0 and 8; wanted different"),
        ("tokens", [*"abcdefgh", "i", "\udc80"], "has an entry 9 that is not UTF-8"),
        ("token_type", np.ones(9, np.int32), r"array of int32 of shape \(9,\); wanted 10 integers"),
        (
            "token_type",
            np.ones(10, np.float32),
            r"array of float32 of shape \(10,\); wanted 10 int",
        ),
        ("token_type", "x", "wanted 10 integers, one for each token"),
        ("merges", None, "is missing; wanted a list of strings"),
        ("merges", ["ab"], "has the merge 'ab'; wanted two tokens with a space between"),
        ("merges", ["a b", "a x"], "has the merge 'a x'"),
        ("merges", ["b a"], "has the merge 'b a'"),
        ("merges", ["a b b"], "has the merge 'a b b'"),
        ("merges", [""], "has the merge ''"),
        ("bos_token_id", 10, "is 10; wanted a token id, 0 to 9"),
        ("bos_token_id", -1, "is -1; wanted a token id, 0 to 9"),
        ("bos_token_id", "5", "is '5'; wanted a token id"),
        ("bos_token_id", True, "is True; wanted a token id"),
        ("bos_token_id", None, "is missing; wanted the id of a token, as `tokenizer.ggml.add_bos"),
        ("add_bos_token", 1, "is 1; wanted true or false"),
        ("add_eos_token", "yes", "is 'yes'; wanted true or false"),
    ],
)
def test_malformed_metadata_is_named(key: str, value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        Tokenizer.from_gguf(metadata(**{f"tokenizer.ggml.{key}": value}), "x.gguf")
    assert str(caught.value).startswith("x.gguf: field `tokenizer.ggml.")


def test_a_template_must_be_text() -> None:
    with pytest.raises(ValueError, match=r"field `tokenizer.chat_template` is a int; wanted a str"):
        Tokenizer.from_gguf(metadata(**{"tokenizer.chat_template": 3}), "x.gguf")


def test_empty_tokens_stand_for_nothing() -> None:
    tokens = [*metadata()["tokenizer.ggml.tokens"][:7], "", "ca", ""]
    files = tokenizer_from_gguf(
        metadata(**{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"]}), "x.gguf"
    )
    assert files.json["model"]["vocab"]["[EMPTY_9]"] == 9


# GGUF: sentencepiece, there and back.


@cache
def spm_and_back(*, prefix: bool) -> tuple[Tokenizer, Tokenizer]:
    before = converted(trained(prefix=prefix), add_bos=True)
    written = gguf_from_tokenizer(
        json.loads(before.to_json()), before.special_tokens, None, before.vocab_size + 5, "spm"
    )
    assert written["tokenizer.ggml.model"] == "llama"
    assert written["tokenizer.ggml.scores"].dtype == np.float32
    return before, Tokenizer.from_gguf(written, "spm.gguf")


@settings(max_examples=60)
@given(texts, st.booleans())
def test_sentencepiece_survives_gguf(
    text: str,
    prefix: bool,  # noqa: FBT001
) -> None:
    before, after = spm_and_back(prefix=prefix)
    ids = before.encode(text)
    assert after.encode(text) == ids
    assert after.decode(ids) == before.decode(ids)


def test_sentencepiece_in_gguf_is_marked_as_llama_cpp_expects() -> None:
    before, after = spm_and_back(prefix=True)
    assert after.special_tokens == before.special_tokens
    assert after.vocab_size == before.vocab_size
    written = gguf_from_tokenizer(json.loads(after.to_json()), {}, None, after.vocab_size, "spm")
    types = written["tokenizer.ggml.token_type"]
    assert types[:5].tolist() == [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE]
    assert written["tokenizer.ggml.add_space_prefix"] is True
    assert written["tokenizer.ggml.bos_token_id"] == 1
    # Pieces keep the order of their scores, which is that of their ids in trained models.
    merged = [token for token in written["tokenizer.ggml.tokens"][259:] if len(token) > 1]
    scores = dict(
        zip(written["tokenizer.ggml.tokens"], written["tokenizer.ggml.scores"], strict=True)
    )
    assert sorted(merged, key=lambda token: -scores[token]) == merged


def spm_metadata(**changes: Any) -> dict[str, Any]:
    """Metadata of a sentencepiece tokenizer; None takes a key away."""
    pieces = [*BASE, *BYTES, ("ab", -1.0, 1), (SPACE, -2.0, 1), ("a", -3.0, 1), ("b", -4.0, 1)]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
        "tokenizer.ggml.scores": np.array([score for _, score, _ in pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, _, kind in pieces], np.int32),
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return {key: value for key, value in found.items() if value is not None}


def test_missing_keys_of_sentencepiece_mean_what_llama_cpp_takes_them_for() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata(), "x")
    assert tokenizer.special_tokens == {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    assert tokenizer.encode("ab") == [1, 260, 259]
    assert tokenizer.encode("ab<s>ab\x00") == [1, 260, 259, 1, 260, 259, 3]
    assert tokenizer.decode([1, 260, 259, 260]) == "ab "
    bare = Tokenizer.from_gguf(spm_metadata(add_space_prefix=False, add_bos_token=False), "x")
    assert bare.encode("ab ") == [259, 260]
    assert bare.decode([260, 259]) == " ab"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scores": None}, "scores` is missing; wanted a score for each token"),
        ({"scores": np.zeros(3, np.float32)}, r"of shape \(3,\); wanted 263 numbers"),
        ({"scores": np.full(263, np.nan, np.float32)}, r"score of piece 259 \('ab'\) is not a num"),
        ({"token_type": np.full(263, BYTE, np.int32)}, "says that '<unk>' is a byte"),
        ({"token_type": np.full(263, NORMAL, np.int32)}, "bos_token_id` is missing"),
        ({"add_space_prefix": 1}, "add_space_prefix` is 1; wanted true or false"),
    ],
)
def test_malformed_metadata_of_sentencepiece_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        Tokenizer.from_gguf(spm_metadata(**changes), "x.gguf")
    assert str(caught.value).startswith("x.gguf: field `tokenizer.ggml.")


# GGUF: what it has no words for.


def changed(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(source: dict[str, Any]) -> None:
        for key in path[:-1]:
            source = source[key]
        source[path[-1]] = value

    return change


def flagged(**flags: bool) -> Callable[[dict[str, Any]], None]:
    return lambda source: source["added_tokens"][0].update(flags)


BOS = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed("model", value=None), "field `model` is a NoneType"),
        (changed("model", "type", value="Unigram"), "`model.type` is 'Unigram'; BPE has BPE"),
        (changed("model", "dropout", value=0.1), "`model.dropout` is 0.1"),
        (changed("model", "end_of_word_suffix", value="</w>"), "`model.end_of_word_suffix` is"),
        (changed("model", "byte_fallback", value=True), "`model.byte_fallback` is true"),
        (changed("model", "vocab", value=[]), "`model.vocab` is no object"),
        (changed("model", "vocab", "the", value=9999), "gives 'the' the id 9999; .* 4096 tokens"),
        (changed("model", "vocab", "the", value=-1), "gives 'the' the id -1"),
        (changed("model", "vocab", "the", value=1.0), "gives 'the' the id 1.0"),
        (changed("model", "vocab", "new", value=7), r"gives '.+' and 'new' the same id"),
        (changed("model", "vocab", "<|eot_id|>", value=3), "gives '<|eot_id|>' the id 4095, the"),
        (changed("model", "vocab", value={"[PAD4000]": 0}), r"'\[PAD4000\]', which stands for pad"),
        (changed("model", "merges", value={}), "`model.merges` is a dict"),
        (changed("model", "merges", value=["a"]), r"`model.merges` has \['a'\]"),
        (changed("model", "merges", value=[3]), r"`model.merges` has 3"),
        (changed("added_tokens", value=[{"id": "x"}]), "`added_tokens` is no list of objects"),
        (flagged(lstrip=True), r"has '<\|begin_of_text\|>' with `lstrip`"),
        (flagged(single_word=True), "with `single_word`"),
        (changed("normalizer", value={"type": "Lowercase"}), "`normalizer` is .*Lowercase"),
        (changed("normalizer", value={"type": "Sequence"}), "sequence without `normalizers`"),
        (changed("normalizer", value=3), "`normalizer` holds a int"),
        (changed("pre_tokenizer", value=None), "`normalizer` is absent, and `pre_tokenizer` is ab"),
        (changed("pre_tokenizer", value={"type": "Whitespace"}), "`pre_tokenizer` is .*Whitesp"),
        (
            changed("pre_tokenizer", value={**WORDS, "add_prefix_space": True}),
            "`pre_tokenizer` is .*without NFC and with `ignore_merges`; known",
        ),
        (
            changed("pre_tokenizer", "pretokenizers", value=[split(r"\d"), PLAIN]),
            r"`pre_tokenizer` is .*Split",
        ),
        (
            changed("pre_tokenizer", "pretokenizers", value=[split(LLAMA3, "Removed"), PLAIN]),
            r"`pre_tokenizer` is .*Split",
        ),
        (changed("post_processor", value={"type": "BertProcessing"}), "step of type 'BertProc"),
        (changed("post_processor", "single", value=[BOS, BOS, TEXT]), "more around a text than"),
        (changed("post_processor", "single", value=[BOS]), "more around a text than"),
        (
            changed("post_processor", "single", value=[{"SpecialToken": {"id": "<x>"}}, TEXT]),
            "puts '<x>' around a text; it must be a token",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused(
    change: Callable[[dict[str, Any]], None], match: str
) -> None:
    source = content(DEMO)
    change(source)
    with pytest.raises(ValueError, match=match) as caught:
        to_gguf(source, 4096)
    assert str(caught.value).startswith("tokenizer.json: field `")
    assert "can be written without its tokenizer" in str(caught.value)


def test_another_bos_than_the_one_in_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"puts '<\|begin_of_text\|>' around .* is '<\|eot_id\|>'"):
        to_gguf(content(DEMO), 4096, bos_token="<|eot_id|>")


def test_sentencepiece_that_gguf_cannot_say_is_refused() -> None:
    newer = json.loads(converted(trained(), legacy=False).to_json())
    with pytest.raises(ValueError, match=r"nor sentencepiece with a space in front of each"):
        to_gguf(newer)
    backwards = json.loads(converted(trained()).to_json())
    backwards["model"]["merges"] = backwards["model"]["merges"][:-1]
    with pytest.raises(ValueError, match=r"`model\.merges` are not those of scores"):
        to_gguf(backwards)
    symbols = json.loads(converted(trained(symbols=("<sep>", "donkey", "\n"))).to_json())
    with pytest.raises(ValueError, match=r"field `(added_tokens|normalizer)` "):
        to_gguf(symbols)


def test_user_defined_spaces_survive_gguf() -> None:
    # Gemma's form: no prefix, so nothing else depends on where a stretch of text starts.
    before = converted(trained(prefix=False, symbols=(SPACE * 2, SPACE * 4, "\n\n")))
    after = Tokenizer.from_gguf(to_gguf(json.loads(before.to_json()), 700), "x.gguf")
    for text in ("a  b", "a     b", "\n\n\n the cat", "  "):
        assert after.encode(text) == before.encode(text)
        assert after.decode(before.encode(text)) == text


def test_merges_are_read_in_both_spellings() -> None:
    source = content(DEMO)
    pairs = to_gguf(source)["tokenizer.ggml.merges"]
    source["model"]["merges"] = [" ".join(pair) for pair in source["model"]["merges"]]
    assert to_gguf(source)["tokenizer.ggml.merges"] == pairs


# Size.


def test_large_vocabularies_take_time_in_proportion() -> None:
    # Llama 3's has 128,000 tokens and 280,000 merges. Quadratic work would take hours.
    letters = [chr(0x4E00 + i) for i in range(400)]
    pairs = [(one, two) for one in letters for two in letters[:250]]
    tokens = ["<s>", *letters, *map("".join, pairs)]
    started = time.perf_counter()
    files = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        },
        "x.gguf",
    )
    gguf_from_tokenizer(files.json, {}, None, len(tokens), "x")
    data = model([*BASE, *((token, -float(i), NORMAL) for i, token in enumerate(tokens[1:30_000]))])
    tokenizer_from_sentencepiece(data, "x", added_tokens=[AddedToken(30_002, "<pad>")])
    assert time.perf_counter() - started < 20
