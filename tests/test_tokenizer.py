"""The tokenizer: what `tokenizer.json` says, streaming decode, chat templates, bad files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from bitnet_rs.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
DEMO = Path(__file__).parents[1] / "python" / "bitnet_rs" / "demo"

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi"},
]
SCRIPTS = [
    "Zażółć gęślą jaźń",
    "Ελληνικά και Русский",
    "日本語のテキスト、中文字符。",
    "한국어 문장",
    "العربية ועברית",
    "हिन्दी தமிழ் ไทย",
    "🙂🏳️‍🌈👩‍👩‍👧‍👦 e\u0301 \u200d",
    "tabs\tand\r\nlines\n\n  x = 1_000",
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def folder(tmp_path: Path, **files: Any) -> Path:
    """A checkpoint folder with a real tokenizer.json and the given other files."""
    shutil.copy(DATA / "bitnet-online" / "tokenizer.json", tmp_path)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return tmp_path


def with_template(tmp_path: Path, template: Any) -> Tokenizer:
    config = {"bos_token": {"content": "<|begin_of_text|>"}, "chat_template": template}
    return Tokenizer.from_folder(folder(tmp_path, tokenizer_config__json=config))


# Text and ids.


def test_bos_comes_from_the_post_processor(demo: Tokenizer) -> None:
    ids = demo.encode("Once upon a time")
    assert ids[0] == demo.bos_token_id == 4093
    assert demo.encode("Once upon a time", add_special_tokens=False) == ids[1:]
    assert demo.decode(ids) == "Once upon a time"
    assert demo.decode(ids, skip_special_tokens=False) == "<|begin_of_text|>Once upon a time"


def test_special_tokens_of_the_checkpoint(demo: Tokenizer) -> None:
    assert demo.vocab_size == 4096
    assert demo.eos_token_ids == (4094,)
    assert set(demo.end_of_turn_ids) == {4094, 4095}
    assert demo.special_id("<|eot_id|>") == 4095
    assert demo.special_id("the") is None


def test_prompt_gets_exactly_one_bos(demo: Tokenizer) -> None:
    bos = demo.bos_token_id
    assert demo.encode_prompt("hi")[:2] != [bos, bos]
    assert demo.encode_prompt("<|begin_of_text|>hi") == demo.encode_prompt("hi")
    # Two in the text are the user's own doing.
    assert demo.encode_prompt("<|begin_of_text|><|begin_of_text|>")[:3] == [bos, bos]


@pytest.mark.parametrize("text", SCRIPTS)
def test_round_trip(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text)) == text


def test_token_text_shows_special_tokens_and_parts_of_characters(demo: Tokenizer) -> None:
    assert demo.token_text(4095) == "<|eot_id|>"
    parts = demo.encode("\U0001f9ff", add_special_tokens=False)
    assert len(parts) > 1
    assert demo.token_text(parts[0]) == "\ufffd"


def test_ids_beyond_the_vocabulary_stand_for_no_text(demo: Tokenizer) -> None:
    assert demo.decode([*demo.encode("a b"), 4096, 2**31]) == "a b"
    for wrong in (-1, 1.5, "x"):
        with pytest.raises(ValueError, match="wanted integers >= 0"):
            demo.decode([wrong])  # type: ignore[list-item]


def test_text_that_is_no_text(demo: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        demo.encode("a\ud800")
    with pytest.raises(TypeError, match="is a bytes; wanted a str"):
        demo.encode(b"a")  # type: ignore[arg-type]


def test_training_time_truncation_and_padding_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_folder(tmp_path).encode("a b c d e f g h")
    assert ids == Tokenizer.from_folder(DEMO).encode("a b c d e f g h")


# Streaming decode.


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> list[str]:
    decoder = tokenizer.stream_decoder(skip_special_tokens=skip_special_tokens)
    return [*map(decoder.push, ids), decoder.flush()]


# The byte tokens stand first in the vocabulary, so small ids make invalid UTF-8 often; 4,097 to
# 4,100 are in no vocabulary.
random_ids = st.lists(st.integers(0, 255) | st.integers(0, 4100), max_size=120)


@given(random_ids, st.booleans())
def test_stream_of_random_ids_is_the_whole_decode(
    demo: Tokenizer,
    ids: list[int],
    skip: bool,  # noqa: FBT001
) -> None:
    pieces = streamed(demo, ids, skip_special_tokens=skip)
    assert "".join(pieces) == demo.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.sampled_from(SCRIPTS) | st.text(), max_size=6).map(" ".join))
def test_stream_of_text_never_has_half_a_character(demo: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    pieces = streamed(demo, demo.encode(text), skip_special_tokens=True)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_gives_words_as_they_come(demo: Tokenizer) -> None:
    ids = demo.encode(" the king", add_special_tokens=False)
    decoder = demo.stream_decoder()
    assert [decoder.push(i) for i in ids] == [demo.token_text(i) for i in ids]
    assert decoder.flush() == ""


def test_stream_of_bytes_that_never_become_text_goes_on(demo: Tokenizer) -> None:
    # 0xE2 opens a character of three bytes that never comes.
    opener = demo.encode("\u2500", add_special_tokens=False)[:1]
    assert demo.token_text(opener[0]) == "\ufffd"
    decoder = demo.stream_decoder()
    pieces = [decoder.push(opener[0]) for _ in range(50)]
    assert len("".join(pieces)) >= 40
    assert "".join(pieces) + decoder.flush() == "\ufffd" * 50


@pytest.mark.parametrize("kind", ["text", "bytes"])
def test_stream_decodes_short_windows_only(
    demo: Tokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = demo.encode("word " * 200 if kind == "text" else "\u2500" * 3)
    if kind == "bytes":
        ids = ids[1:2] * 200
    lengths: list[int] = []
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: list[int], **options: Any) -> str:
        lengths.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    streamed(demo, ids, skip_special_tokens=True)
    assert max(lengths) <= 20
    assert sum(lengths) <= 120 * len(ids)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer of the older Llama kind: U+2581 for spaces, bytes as a fallback."""
    words = ["\u2581", "\u2581the", "\u2581cat", "s", "\u2581"]
    vocab = dict.fromkeys(["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), *words], 0)
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocab)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def test_stream_of_sentencepiece_keeps_spaces_between_words(sentencepiece: Tokenizer) -> None:
    tokens = ["<s>", "\u2581", "\u2581the", "\u2581cat", "s", "\u2581", "\u2581the"]
    tokens += [f"<0x{b:02X}>" for b in "日 🙂".encode()]
    ids = [i for token in tokens if (i := sentencepiece.token_id(token)) is not None]
    assert len(ids) == len(tokens)
    pieces = streamed(sentencepiece, ids, skip_special_tokens=True)
    assert "".join(pieces) == sentencepiece.decode(ids) == " the cats  the日 🙂"
    assert not any("\ufffd" in piece for piece in pieces)
    word = sentencepiece.token_id("\u2581cat")
    assert word is not None
    assert sentencepiece.token_text(word) == " cat"


# Chat templates.


def test_template_of_the_demo(demo: Tokenizer) -> None:
    text = demo.apply_chat_template(MESSAGES)
    assert text == "<|begin_of_text|>System: Be brief.<|eot_id|>User: Hi<|eot_id|>Assistant: "
    shorter = demo.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert text == shorter + "Assistant: "


def test_template_file_goes_before_the_config(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        chat_template__jinja="file {{ messages[0].content }}",
        tokenizer_config__json={"chat_template": "config"},
    )
    assert Tokenizer.from_folder(path).apply_chat_template(MESSAGES) == "file  Be brief. "


def test_template_named_default_is_taken_from_a_list(tmp_path: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ bos_token }}plain"},
    ]
    tokenizer = with_template(tmp_path, templates)
    assert tokenizer.apply_chat_template(MESSAGES) == "<|begin_of_text|>plain"


def test_template_sees_what_transformers_gives_it(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages %}\n"
        "  {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "  {% generation %}{{ m | tojson }}{% endgeneration %}\n"
        "{%- endfor %}\n"
        "{{ {'b': '<é>', 'a': [1]} | tojson(indent=1) }}{{ tools is none }}{{ extra }}"
        "{{ strftime_now('%Y') | length }}"
    )
    text = with_template(tmp_path, template).apply_chat_template(MESSAGES, extra="!")
    assert text == (
        '{"role": "system", "content": " Be brief. "}{\n "b": "<é>",\n "a": [\n  1\n ]\n}True!4'
    )


def test_template_that_refuses_names_file_field_and_roles(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ raise_exception('no system role') }}")
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json, field chat_template.*no system role.*'system'"
    ):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
        "{% include 'x' %}",
    ],
)
def test_template_runs_in_a_sandbox(tmp_path: Path, template: str) -> None:
    with pytest.raises(ValueError, match="chat template refused"):
        with_template(tmp_path, template).apply_chat_template(MESSAGES)


def test_broken_template_does_not_parse(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{% for m in messages %}\n{{ m ")
    for use in (tokenizer.check_chat_template, lambda: tokenizer.apply_chat_template(MESSAGES)):
        with pytest.raises(ValueError, match=r"field chat_template: .*does not parse \(line 2"):
            use()


@pytest.mark.parametrize(
    ("template", "error"),
    [("{% break %}", "SyntaxError"), ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "Recursion")],
    ids=["break", "deep"],
)
def test_template_that_does_not_compile(tmp_path: Path, template: str, error: str) -> None:
    tokenizer = with_template(tmp_path, template)
    for use in (tokenizer.check_chat_template, lambda: tokenizer.apply_chat_template(MESSAGES)):
        with pytest.raises(
            ValueError,
            match=rf"tokenizer_config\.json, field chat_template: .*not compile \({error}",
        ):
            use()


def test_no_template_suggests_complete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no chat template.*complete\(\)"):
        Tokenizer.from_folder(folder(tmp_path)).apply_chat_template(MESSAGES)


@pytest.mark.parametrize("template", [5, {"default": "x"}, [{"name": "rag", "template": "x"}]])
def test_template_field_of_another_kind(tmp_path: Path, template: object) -> None:
    with pytest.raises(ValueError, match=r"field chat_template: .*; wanted"):
        with_template(tmp_path, template)


def test_messages_are_checked(demo: Tokenizer) -> None:
    with pytest.raises(ValueError, match="messages is empty"):
        demo.apply_chat_template([])
    with pytest.raises(ValueError, match=r"messages\[1\] has the keys \['role'\]; wanted"):
        demo.apply_chat_template([MESSAGES[0], {"role": "user"}])
    with pytest.raises(TypeError, match=r"messages\[0\] is a str; wanted a dict"):
        demo.apply_chat_template(["hi"])  # type: ignore[list-item]


# Files.


def test_special_tokens_from_a_special_tokens_map(tmp_path: Path) -> None:
    path = folder(tmp_path, special_tokens_map__json={"eos_token": {"content": "<|eot_id|>"}})
    assert Tokenizer.from_folder(path).eos_token_ids == (1023,)


def test_a_special_token_outside_the_vocabulary_has_no_id(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer_config__json={"bos_token": "<nope>", "eos_token": None})
    tokenizer = Tokenizer.from_folder(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, ())


def test_a_special_token_that_is_no_text_has_no_id(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer_config__json={"bos_token": "\ud800"})
    assert Tokenizer.from_folder(path).bos_token_id is None


def with_model(tmp_path: Path, model: dict[str, Any], **parts: Any) -> Path:
    """A folder whose tokenizer.json has this model."""
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    text = json.dumps({**content, "model": model, **parts})
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # it does load
    return tmp_path


WORDS = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({**WORDS, "vocab": {"a": 0}}, r"Missing \[UNK\]"),
        ({**WORDS, "unk_token": "?"}, r"Missing \[UNK\]"),
        (
            {
                "type": "WordPiece",
                "vocab": {"a": 0},
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
            },
            r"Missing \[UNK\]",
        ),
        ({"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}, "`unk_id` is missing"),
    ],
    ids=["WordLevel", "WordLevel-other", "WordPiece", "Unigram"],
)
def test_a_tokenizer_without_its_unknown_token_is_refused(
    tmp_path: Path, model: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*cannot encode .*{reason}"):
        Tokenizer.from_folder(with_model(tmp_path, model))


def test_a_tokenizer_that_panics_is_refused(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    path = with_model(tmp_path, WORDS, post_processor=template)
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizer cannot encode"):
        Tokenizer.from_folder(path)


def test_a_tokenizer_that_fails_later_is_named(tmp_path: Path) -> None:
    # Built past `from_folder` and its trial, as a text that the trial does not foresee would be.
    file = str(with_model(tmp_path, {**WORDS, "vocab": {"a": 0}}) / "tokenizer.json")
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(file), source=file)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*cannot encode a text of 3 char"):
        tokenizer.encode("a b")


def test_interrupts_are_not_taken_for_failures(demo: Tokenizer) -> None:
    class Backend:
        def encode(self, text: str, **options: Any) -> None:
            raise KeyboardInterrupt

        def decode(self, ids: list[int], **options: Any) -> str:
            raise RuntimeError("no such luck")

    tokenizer = Tokenizer(demo._backend)
    tokenizer._backend = Backend()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*cannot decode 1 ids \(no such luck"):
        tokenizer.decode([1])


def test_no_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer; wanted tokenizer\.json\. Put"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"kind of T5 only.*save_pretrained.*tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": "1.0"'),
        ("tokenizer.json", b""),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"model_max_length": ' + b"9" * 5000 + b"}"),
        ("special_tokens_map.json", b"null"),
        ("chat_template.jinja", b"caf\xe9"),
    ],
    ids=str,
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (folder(tmp_path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(tmp_path)
