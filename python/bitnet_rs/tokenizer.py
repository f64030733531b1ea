"""Text to token ids and back, streaming decode, and chat templates.

For `model.py`, which is the only caller. Apart because text is nobody else's
business: the engine and the core see ids only, and this is the only file that
imports `tokenizers` (when a tokenizer is opened, not before) and `jinja2` (when
a chat template is first used).

What a special token is, whether BOS is put in front of a text and how text is
cut up are decided by the checkpoint's `tokenizer.json` alone. Where there is
none, `loaders` writes its content from GGUF metadata or from sentencepiece's
`tokenizer.model`, and the rest is the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bitnet_rs.jsonfile import read_object, read_text

if TYPE_CHECKING:
    import jinja2
    import tokenizers

    from bitnet_rs.loaders import Checkpoint
    from bitnet_rs.loaders.tokenizer_json import AddedToken, TokenizerFiles

_T = TypeVar("_T")

_REPLACEMENT = "\ufffd"

# How many tokens may stand for one undecided character. A UTF-8 character has at most 4 bytes and
# a token at least one, so with 8 there are always earlier tokens that can be settled.
_UNDECIDED = 8

# Characters, or ids, from which on tokenizers is called by its functions for batches: only those let
# go of the GIL, and a megabyte takes a second or two. Not for all: they start threads.
_LONG = 1 << 13

# Tokens that end a turn in the chat formats of the supported families. Some checkpoints name only
# one of two as `eos` (2B-4T: <|end_of_text|>, while its turns end with <|eot_id|>).
_END_OF_TURN = (
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
)

_CURE = (
    "convert it once with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained"
    "(FOLDER), or put the tokenizer.json of the same tokenizer beside it"
)


# Encoded once at load. Words, digits and spaces that any tokenizer for text takes apart, and
# characters that most vocabularies lack, so that a missing unknown token shows here and not at
# some user's first prompt.
_TRIAL = "Trial 1 ☃ 𪛖"


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no such file."""
    return read_object(path) if path.is_file() else {}


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like, by name; each is a string or {"content": ...}."""
    found: dict[str, str] = {}
    for source in (_read_object(folder / "special_tokens_map.json"), config):
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = _content(source.get(name))
            if isinstance(value, str):
                found[name] = value
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The chat template and the name of where it stands, for messages."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file), str(file)
    where = f"{folder / 'tokenizer_config.json'}, field chat_template"
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value, where
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
        if isinstance(named.get("default"), str):
            return named["default"], f"{where}, entry 'default'"
        raise ValueError(f"{where}: has entries {sorted(map(str, named))}; wanted one 'default'")
    raise ValueError(
        f"{where}: is a {type(value).__name__}; wanted a string, or a list of {{name, template}}"
    )


class Tokenizer:
    """The tokenizer of one checkpoint. Immutable; safe to share between threads.

    Attributes:
        vocab_size: Number of tokens, added ones included.
        bos_token: The text of the beginning-of-sequence token, if the checkpoint names one.
        bos_token_id: Its id; None where there is none in the vocabulary.
        eos_token: The text of the end-of-sequence token, if the checkpoint names one.
        eos_token_ids: Its id, or nothing.
        end_of_turn_ids: Ids of the tokens in the vocabulary that end a turn or a text in the
            chat formats of these model families.
        chat_template: Source of the chat template (jinja), or None.
        notes: Sentences about what was not taken as the files have it; empty for tokenizer.json.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        chat_template_source: str = "chat_template",
        source: str = "tokenizer.json",
        notes: Sequence[str] = (),
    ) -> None:
        self._backend = backend
        self._source = source
        self._special_tokens = dict(special_tokens or {})
        self._template_source = chat_template_source
        self._compiled: jinja2.Template | None = None
        self.chat_template = chat_template
        self.notes = tuple(notes)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token = self._special_tokens.get("bos_token")
        self.eos_token = self._special_tokens.get("eos_token")
        self._special_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token_id = self.token_id(self.bos_token) if self.bos_token else None
        eos = self.token_id(self.eos_token) if self.eos_token else None
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        named = self._special_tokens.get("eot_token")
        ends = dict.fromkeys([*_END_OF_TURN, *([named] if named else [])])
        turns = (self.token_id(token) for token in ends)
        self.end_of_turn_ids = tuple(i for i in turns if i is not None and self.is_special(i))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Opens the tokenizer of a checkpoint: in its folder, or in its GGUF file.

        Raises:
            FileNotFoundError: It has none.
            ValueError: It is of a kind that is not supported, or damaged.
        """
        if checkpoint.gguf_metadata is not None:
            return cls.from_gguf(checkpoint.gguf_metadata, str(checkpoint.path))
        return cls.from_folder(checkpoint.path)

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Opens the tokenizer of a checkpoint folder.

        Args:
            path: A folder with `tokenizer.json`, or else with sentencepiece's `tokenizer.model`,
                and, where the checkpoint has them, `tokenizer_config.json`,
                `special_tokens_map.json`, `added_tokens.json` and `chat_template.jinja`.

        Raises:
            FileNotFoundError: There is no tokenizer in the folder.
            ValueError: There is one in another format, it cannot encode text, or a file is
                damaged.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        model = path / "tokenizer.model"
        if not file.is_file() and not model.is_file():
            raise _no_tokenizer(path)
        config = _read_object(path / "tokenizer_config.json")
        special_tokens = _special_tokens(path, config)
        template, source = _chat_template(path, config)
        if not file.is_file():
            files = _from_sentencepiece(model, config, special_tokens)
            return cls._of_files(files, str(model), template, source)
        import tokenizers

        backend = _load_backend(lambda: tokenizers.Tokenizer.from_file(str(file)), str(file))
        tokenizer = cls(backend, special_tokens, template, source, str(file))
        tokenizer.decode(tokenizer.encode(_TRIAL))
        return tokenizer

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """Builds the tokenizer that the metadata of a GGUF file describes.

        Args:
            metadata: The file's metadata: scalars, strings, lists of strings, and numpy arrays
                for arrays of numbers.
            source: The file, for messages.

        Raises:
            FileNotFoundError: The file holds no tokenizer.
            ValueError: The tokenizer is of a kind that is not known, or its metadata is damaged.
        """
        from bitnet_rs.loaders.gguf_tokenizer import tokenizer_from_gguf

        files = tokenizer_from_gguf(metadata, source)
        where = f"{source}: field `tokenizer.chat_template`"
        return cls._of_files(files, source, files.chat_template, where)

    @classmethod
    def _of_files(
        cls, files: TokenizerFiles, source: str, template: str | None, template_source: str
    ) -> Tokenizer:
        """Loads the content of a tokenizer.json that was built from another format."""
        import tokenizers

        text = json.dumps(files.json, ensure_ascii=False)
        backend = _load_backend(lambda: tokenizers.Tokenizer.from_str(text), source)
        tokenizer = cls(
            backend, files.special_tokens, template, template_source, source, files.notes
        )
        tokenizer.decode(tokenizer.encode(_TRIAL))
        return tokenizer

    def to_json(self) -> str:
        """The content of a tokenizer.json that gives this tokenizer again."""
        return str(self._backend.to_str())

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of special tokens by role: `bos_token`, `eos_token` and their like."""
        return dict(self._special_tokens)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text in the vocabulary; None where there is no such token."""
        try:
            found = self._backend.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate, which no vocabulary can hold
            return None
        return None if found is None else int(found)

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out unless asked to keep special tokens."""
        return token_id in self._special_ids

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this text; None where there is none."""
        found = self.token_id(text)
        return found if found is not None and self.is_special(found) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: Any text. Special tokens written in it count as special tokens.
            add_special_tokens: Put BOS (and whatever else `tokenizer.json` asks for) around it.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` holds lone surrogates, which no encoding can represent, or
                `tokenizer.json` has no token for a part of it.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; wanted a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds a lone surrogate at position {error.start}, which is not a character; "
                "decode the input as UTF-8, or with errors='replace'"
            ) from None

        def run() -> tokenizers.Encoding:
            if len(text) < _LONG:
                return self._backend.encode(text, add_special_tokens=add_special_tokens)
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return batch[0]

        encoding = _call_backend(
            run,
            f"{self._source}: the tokenizer cannot encode a text of {len(text)} characters",
            "its unknown token or a special token is missing; fetch the file again, or repair it",
        )
        return list(encoding.ids)

    def encode_prompt(self, text: str) -> list[int]:
        """As `encode`, but a text that starts with BOS already does not get a second one."""
        ids = self.encode(text)
        bos = self.bos_token_id
        doubled = bos is not None and ids[:2] == [bos, bos]
        if doubled and self.bos_token and text.startswith(self.bos_token):
            # The text may itself hold two on purpose; only the added one goes.
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 come out as U+FFFD.

        Args:
            ids: Token ids. Ids beyond the vocabulary, which models with a padded embedding can
                produce, stand for no text.
            skip_special_tokens: Leave special tokens out.

        Raises:
            ValueError: An id is negative or not an integer, or the decoder of `tokenizer.json`
                fails.
        """
        checked = list(map(_token_id, ids))

        def run() -> str:
            if len(checked) < _LONG:
                return str(self._backend.decode(checked, skip_special_tokens=skip_special_tokens))
            batch = self._backend.decode_batch([checked], skip_special_tokens=skip_special_tokens)
            return str(batch[0])

        return _call_backend(
            run,
            f"{self._source}: the tokenizer cannot decode {len(checked)} ids",
            "fetch the file again, or repair its `decoder`",
        )

    def token_text(self, token_id: int) -> str:
        """The text of one token on its own; U+FFFD where it is only part of a character."""
        text = self.decode([token_id], skip_special_tokens=False)
        # Sentencepiece decoders drop the space that opens a text; inside a text it is there.
        token = self._backend.id_to_token(token_id)
        if token is not None and token.startswith("\u2581") and not text.startswith(" "):
            return " " + text
        return text

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def check_chat_template(self) -> None:
        """Makes sure that there is a chat template and that it parses.

        Raises:
            ValueError: There is none, or it is broken.
        """
        self._template()

    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template (neither chat_template.jinja nor "
                "chat_template in tokenizer_config.json): it is a base model, or a file is "
                "missing. Use complete() with a plain prompt"
            )
        if self._compiled is None:
            import jinja2

            try:
                self._compiled = _template_environment().from_string(self.chat_template)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(
                    f"{self._template_source}: the chat template does not parse (line "
                    f"{error.lineno}: {error.message}); repair it, or use complete()"
                ) from None
            except Exception as error:  # jinja leaves the rest to Python's own compiler
                raise ValueError(
                    f"{self._template_source}: the chat template does not compile "
                    f"({type(error).__name__}: {error}); repair it, or use complete()"
                ) from error
        return self._compiled

    def apply_chat_template(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Writes a conversation the way the model was trained to read it.

        Args:
            messages: Messages with the keys `role` and `content`.
            add_generation_prompt: End with what opens the assistant's turn.
            **variables: Further variables for the template, such as `tools`.

        Returns:
            The text of the prompt. It has its own BOS: encode it with
            `add_special_tokens=False`, or with `encode_prompt`.

        Raises:
            TypeError: A message is not a dict.
            ValueError: There is no template, it is broken, or it refuses these messages.
        """
        template = self._template()
        checked = [_message(i, message) for i, message in enumerate(messages)]
        if not checked:
            raise ValueError("messages is empty; wanted at least one message")
        settings: dict[str, Any] = {
            # Templates test these for being there at all, as transformers always passes them.
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **variables,
            "messages": checked,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(**settings)
        except Exception as error:  # a template runs foreign code, which can raise anything
            raise ValueError(
                f"{self._template_source}: the chat template refused these messages "
                f"({type(error).__name__}: {error}); roles were "
                f"{[message['role'] for message in checked]}"
            ) from error


def _no_tokenizer(path: Path) -> Exception:
    """The error for a folder without a tokenizer that can be read."""
    if (path / "spiece.model").is_file():
        return ValueError(
            f"{path}: has a tokenizer of the kind of T5 only (spiece.model); wanted "
            f"tokenizer.json: {_CURE}"
        )
    if (path / "vocab.json").is_file() or (path / "tokenizer_config.json").is_file():
        return ValueError(f"{path}: has no tokenizer.json, only older files: {_CURE}")
    return FileNotFoundError(
        f"{path}: has no tokenizer; wanted tokenizer.json. Put the tokenizer.json (and "
        "tokenizer_config.json) of the model it was trained from beside config.json"
    )


def _from_sentencepiece(
    file: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> TokenizerFiles:
    """Converts tokenizer.model with what the slow tokenizers of transformers keep beside it."""
    from bitnet_rs.loaders.sentencepiece import tokenizer_from_sentencepiece

    def flag(name: str, default: bool) -> bool:  # noqa: FBT001 (a value, not an option)
        value = config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(
                f"{file.with_name('tokenizer_config.json')}: field `{name}` is {value!r}; wanted "
                "true or false"
            )
        return default if value is None else value

    return tokenizer_from_sentencepiece(
        file.read_bytes(),
        str(file),
        # The defaults of transformers' LlamaTokenizer.
        add_bos=flag("add_bos_token", True),
        add_eos=flag("add_eos_token", False),
        added_tokens=_added_tokens(file.parent, config, special_tokens),
        special_tokens=special_tokens,
        legacy=flag("legacy", True),
    )


def _added_tokens(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> list[AddedToken]:
    """Tokens beside tokenizer.model: added_tokens.json, and `added_tokens_decoder` of the config.

    What has a role (`pad_token`) is special, the rest is as `added_tokens_decoder` says.
    """
    from bitnet_rs.loaders.tokenizer_json import AddedToken

    more = config.get("additional_special_tokens")
    special = set(special_tokens.values())
    for token in map(_content, more if isinstance(more, list) else []):
        if isinstance(token, str):
            special.add(token)
    found: dict[tuple[Any, Any], AddedToken] = {}
    file = folder / "added_tokens.json"
    for content, token_id in _read_object(file).items():
        if type(token_id) is not int:
            raise ValueError(f"{file}: {content!r} has the id {token_id!r}; wanted an integer")
        found[token_id, content] = AddedToken(token_id, content, special=content in special)
    decoder = config.get("added_tokens_decoder") or {}
    where = f"{folder / 'tokenizer_config.json'}: field `added_tokens_decoder`"
    for key, entry in decoder.items() if isinstance(decoder, dict) else [("", decoder)]:
        text = entry.get("content") if isinstance(entry, dict) else None
        if not key.isascii() or not key.isdigit() or len(key) > 9 or not isinstance(text, str):
            raise ValueError(
                f"{where} has the entry {key!r}: {entry!r}; wanted an id, and an object with "
                "`content`"
            )
        found[int(key), text] = AddedToken(
            int(key),
            text,
            special=bool(entry.get("special")) or text in special,
            lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")),
        )
    return list(found.values())


def _content(token: Any) -> Any:
    """The text of a token that is written as a string or as an object."""
    return token.get("content") if isinstance(token, Mapping) else token


def _load_backend(load: Callable[[], tokenizers.Tokenizer], source: str) -> tokenizers.Tokenizer:
    """A tokenizer of the tokenizers library, without the habits of its training run."""
    import tokenizers

    backend = _call_backend(
        load,
        f"{source}: not a tokenizer that this version of tokenizers ({tokenizers.__version__}) "
        "can read",
        "fetch the file again, or upgrade tokenizers",
    )
    # Some files keep the padding and truncation of their training run.
    backend.no_padding()
    backend.no_truncation()
    return backend


def _call_backend(call: Callable[[], _T], what: str, cure: str) -> _T:
    """Calls into tokenizers, whose errors become ValueErrors: what failed, why, and the cure.

    Its Rust code panics on some files that it loads; such a panic is no Exception in Python.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # noqa: BLE001 (what tokenizers raises has no class of its own)
        raise ValueError(f"{what} ({error}); {cure}") from None


def _token_id(value: Any) -> int:
    """A token id as an int that the backend takes (32 bits, unsigned)."""
    try:
        number = value.__index__()
    except AttributeError:
        number = -1
    if not 0 <= number < 2**32:
        raise ValueError(f"token id {value!r} is not one; wanted integers >= 0")
    return int(number)


def _message(position: int, message: Any) -> dict[str, Any]:
    """One message as a plain dict."""
    if not isinstance(message, Mapping):
        raise TypeError(
            f"messages[{position}] is a {type(message).__name__}; wanted a dict with the keys "
            "'role' and 'content'"
        )
    missing = [key for key in ("role", "content") if key not in message]
    if missing or not isinstance(message["role"], str):
        raise ValueError(
            f"messages[{position}] has the keys {sorted(map(str, message))}; wanted 'role' (a "
            "str) and 'content'"
        )
    return dict(message)


def _template_environment() -> jinja2.Environment:
    """The sandbox in which transformers runs chat templates, so that they see what they expect."""
    import datetime

    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks assistant text for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,  # noqa: FBT001 (templates pass it by position, as in transformers)
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,  # noqa: FBT001
    ) -> str:
        # jinja2's own filter escapes for HTML, which no model was trained on.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class StreamDecoder:
    """Decodes ids as they arrive, never half a character. For one sequence and one thread.

    All pieces and the flush together are `decode` of all ids, for byte-level tokenizers
    exactly (hypothesis tests that). Only a short window of ids is decoded at each push: those
    behind the last settled character and, before them, those of the piece settled last, because
    sentencepiece decoders treat the first token of a text in their own way.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._start()

    def _start(self) -> None:
        self._window: list[int] = []
        self._n_settled = 0  # of the window, from its front
        self._settled_text = ""  # of those, as decoded on their own

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _settle(self, text: str) -> str:
        """Declares the whole window, whose text is given, settled; returns what is new of it."""
        piece = text[len(self._settled_text) :]
        self._window = self._window[self._n_settled :]
        self._n_settled = len(self._window)
        self._settled_text = self._decode(self._window)
        return piece

    def push(self, token_id: int) -> str:
        """Takes one id; returns the text that is certain by now, often one word, maybe ""."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""  # decode drops it before anything else, so the window needn't hold it
        self._window.append(token_id)
        text = self._decode(self._window)
        # A text that ends in U+FFFD may end inside a character. One that did not grow may be the
        # opening space that a sentencepiece decoder dropped: settling it would drop the next, too.
        if len(text) > len(self._settled_text) and not text.endswith(_REPLACEMENT):
            return self._settle(text)
        if len(self._window) - self._n_settled < _UNDECIDED:
            return ""
        return self._settle_part()

    def _settle_part(self) -> str:
        """Settles the front of a window that has stayed undecided for too long to be a character.

        The bytes really are not UTF-8 (or stand for no text at all). Where cutting the window
        leaves both sides' text as it is, the cut is not inside a character; keep the newest
        tokens undecided.
        """
        window, whole = self._window, self._decode(self._window)
        for cut in range(len(window) - 1, self._n_settled, -1):
            front = self._decode(window[:cut])
            if front + self._decode(window[cut:]) == whole:
                self._window = window[:cut]
                piece = self._settle(front)
                self._window += window[cut:]
                return piece
        return self._settle(whole)

    def flush(self) -> str:
        """Returns what is still held back, and starts over."""
        piece = self._decode(self._window)[len(self._settled_text) :]
        self._start()
        return piece
