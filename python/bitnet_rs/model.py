"""`load` and `Model`: a checkpoint, its tokenizer and the core under one roof.

For users, through `bitnet_rs`. This is where the parts meet: text becomes ids,
defaults come from the checkpoint, arguments are checked before anything is
computed. It computes nothing itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core, system
from bitnet_rs.chat import Chat
from bitnet_rs.completion import Completion, Reply, Stream, run
from bitnet_rs.engine import PREFILL_TOKENS, Engine, Request
from bitnet_rs.loaders import Checkpoint, open_checkpoint
from bitnet_rs.sampling import SamplingParams
from bitnet_rs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bitnet_rs.bench import BenchReport
    from bitnet_rs.verify import VerifyReport

KvDtype = Literal["f16", "f32"]

# Where neither the caller nor the checkpoint says how much to write.
_DEFAULT_MAX_TOKENS: Final = 128

# Smaller models are loaded before a progress bar could be read.
_PROGRESS_BYTES: Final = 500_000_000

# More is a slip of the keyboard, not a machine.
_MAX_THREADS: Final = 1024


class Options(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream` and `Chat`; `Model.complete` describes them."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked options of one call, with the checkpoint's defaults filled in."""

    max_tokens: int | None
    params: SamplingParams
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    logprobs: int | None


def load(
    source: str | os.PathLike[str] = "demo",
    *,
    threads: int | None = None,
    kernel: str = "auto",
    kv_dtype: KvDtype = "f16",
    context: int | None = None,
    revision: str | None = None,
) -> Model:
    """Loads a ternary model.

    Args:
        source: `demo` (a small model that comes with the package), a folder with the
            checkpoint's files, or a Hugging Face hub id, which is downloaded once and cached.
        threads: Threads that compute. None: the environment variable BITNET_RS_THREADS, else one
            per physical core.
        kernel: A name from `info().kernels`. `auto`: BITNET_RS_KERNEL, else the fastest.
            All kernels compute the same bits.
        kv_dtype: Precision of cached keys and values, `f16` or `f32`.
        context: Most tokens of prompt and answer together. None: what the model was trained for.
        revision: Branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: The checkpoint or one of its files does not exist.
        KeyError: A tensor is missing.
        ValueError: An argument, an environment variable, a file or a field is wrong or not
            supported. The message names it, what was found and what was wanted.
    """
    n_threads = _threads(threads)
    kernel_name = _kernel(kernel)
    if kv_dtype not in ("f16", "f32"):
        raise ValueError(f"kv_dtype is {kv_dtype!r}; wanted 'f16' or 'f32'")
    checkpoint = open_checkpoint(source, revision=revision)
    # A checkpoint without a tokenizer is of use for ids, speed and checks; what needs text says so.
    tokenizer: Tokenizer | FileNotFoundError
    try:
        tokenizer = Tokenizer.from_folder(checkpoint.path)
    except FileNotFoundError as error:
        tokenizer = error.with_traceback(None)
    defaults = _Defaults.of(checkpoint)
    with _progress(checkpoint) as weights:
        core = _core.Model(checkpoint.core_config, weights, kernel=kernel_name, threads=n_threads)
    return Model(checkpoint, core, tokenizer, defaults, kv_dtype=kv_dtype, context=context)


class Model:
    """A loaded model. Immutable and safe to share between threads: each call has its own cache.

    Made by `load`. In a `with` statement it is closed at the end.

    Attributes:
        name: What was loaded, as it was named.
        config: The checkpoint's config.json.
        kernel: Kernel that multiplies the ternary matrices.
        threads: Threads that compute.
        kv_dtype: Precision of cached keys and values.
        context_length: Most tokens of prompt and answer together.
        vocab_size: Rows of the embedding; valid token ids are below it.
        stop_ids: Token ids that end a text.
        facts: Facts about the model in numbers, see `_core.Model.facts`.
        format: How the weights are stored on disk.
        lossless: Whether the computation is exactly the one the model was trained for.
        lossless_reason: Why.
        checkpoint: The files it came from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        core: _core.Model,
        tokenizer: Tokenizer | FileNotFoundError,
        defaults: _Defaults,
        *,
        kv_dtype: KvDtype,
        context: int | None,
    ) -> None:
        self._core: _core.Model | None = core
        self._tokenizer = tokenizer
        self._defaults = defaults
        self.checkpoint: Final = checkpoint
        self.name: Final = checkpoint.name
        self.config: Final = checkpoint.config
        self.format: Final = checkpoint.format
        self.lossless: Final = checkpoint.lossless
        self.lossless_reason: Final = checkpoint.lossless_reason
        self.facts: Final = core.facts
        self.kernel: Final = core.kernel
        self.threads: Final = core.threads
        self.kv_dtype: Final[KvDtype] = kv_dtype
        self.vocab_size: Final = int(self.facts["vocab_size"])
        self.context_length: Final = _context(context, int(self.facts["max_positions"]))
        known = tokenizer if isinstance(tokenizer, Tokenizer) else None
        self.stop_ids: Final = frozenset(
            i
            for i in (
                *defaults.stop_ids,
                *(known.eos_token_ids if known else ()),
                *(known.end_of_turn_ids if known else ()),
            )
            if i < self.vocab_size
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            FileNotFoundError: It has none.
        """
        if isinstance(self._tokenizer, Tokenizer):
            return self._tokenizer
        raise FileNotFoundError(*self._tokenizer.args)

    @property
    def core(self) -> _core.Model:
        """The model below the text: `forward` over ids and caches.

        Raises:
            RuntimeError: The model was closed.
        """
        if self._core is None:
            raise RuntimeError(f"the model {self.name!r} was closed; load it again to use it")
        return self._core

    def close(self) -> None:
        """Gives the weights back, once calls that still run have finished. Closing twice is fine."""
        self._core = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        facts = self.facts
        lossless = "yes" if self.lossless else "no"
        params, ternary = (_count(int(facts[key])) for key in ("params", "ternary_params"))
        rows = (
            f"{self.name}: {facts['architecture']}, {params} parameters, {ternary} of them ternary",
            f"  format    {self.format}",
            f"  kernel    {self.kernel}, {self.threads} thread{'s' * (self.threads > 1)}",
            f"  memory    {int(facts['packed_bytes']) / 1e6:,.1f} MB of weights",
            f"  context   {self.context_length} tokens, keys and values in {self.kv_dtype}",
            f"  lossless  {lossless}: {self.lossless_reason}",
        )
        return "\n".join(rows)

    # Text in, text out.

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> str: ...
    @overload
    def generate(self, prompt: list[str], **options: Unpack[Options]) -> list[str]: ...
    def generate(self, prompt: str | list[str], **options: Unpack[Options]) -> str | list[str]:
        """Continues a prompt, or several at once.

        Args:
            prompt: Text, or a list of texts. Each text of a list gets what it would get alone;
                together they are faster.
            **options: As `complete`. With a seed, every prompt of a list uses the same.

        Returns:
            The text that follows: a string for a string, a list for a list.
        """
        if isinstance(prompt, str):
            return self._run([self._prompt(prompt)], [self.settings(**options)])[0].text
        prompts = []
        for i, text in enumerate(prompt):
            if not isinstance(text, str):
                raise TypeError(
                    f"prompt[{i}] is a {type(text).__name__}; wanted a str. For token ids, use "
                    "complete()"
                )
            prompts.append(self._prompt(text, f"prompt[{i}]"))
        settings = self.settings(**options)
        return [c.text for c in self._run(prompts, [settings] * len(prompts))]

    @overload
    def complete(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        n: Literal[1] = 1,
        **options: Unpack[Options],
    ) -> Completion: ...
    @overload
    def complete(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        n: int,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]: ...
    def complete(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        n: int = 1,
        ignore_eos: bool = False,
    ) -> Completion | list[Completion]:
        """Continues a prompt, and tells everything about it.

        What is None comes from the checkpoint's generation_config.json; where that asks for no
        sampling, decoding is greedy. A `temperature` alone switches sampling on.

        Args:
            prompt: Text, or token ids, which are used as they are (no BOS is added).
            max_tokens: Most tokens to generate; less where the context ends. None: what the
                checkpoint says, else 128.
            temperature: 0 is greedy.
            top_k: Sample among the k most probable tokens; 0 is off.
            top_p: Sample among the most probable tokens that together reach this; 1 is off.
            min_p: Leave out tokens less probable than this share of the best one's; 0 is off.
            repetition_penalty: Above 1 makes tokens that occurred already less probable.
            seed: The same seed gives the same text.
            stop: A string, or several, before which the text ends.
            logprobs: Report log-probabilities, with that many of the most probable tokens.
            n: How many completions. With a seed, the others use seed + 1, seed + 2, ...
            ignore_eos: Go on after stop tokens. They are then among `tokens`, but not in `text`.

        Returns:
            The completion; a list of them where `n` is above 1.

        Raises:
            ValueError: An argument is out of range, the prompt is empty or too long, or a token
                id is not in the vocabulary.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n is {n!r}; wanted an integer >= 1")
        settings = self.settings(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )
        ids = self._prompt(prompt)
        if n == 1:
            return self._run([ids], [settings])[0]
        each = [
            settings
            if settings.params.seed is None
            else replace(settings, params=replace(settings.params, seed=settings.params.seed + i))
            for i in range(n)
        ]
        return self._run([ids] * n, each)

    def stream(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        **options: Unpack[Options],
    ) -> Stream:
        """Continues a prompt, giving pieces of text as they are generated.

        Args:
            prompt: Text or token ids, as for `complete`.
            **options: As `complete`, without `n`.

        Returns:
            An iterator of non-empty strings. Closing it cancels the generation.

        Raises:
            ValueError: As `complete`; raised here, not at the first piece.
        """
        settings = self.settings(**options)
        engine = Engine(self.core, kv_dtype=self.kv_dtype)
        request = self.request(self._prompt(prompt), settings)
        reply = Reply(engine.add(request), self.tokenizer, settings.stop)
        return Stream(_texts(engine, reply), reply)

    def chat(self, system: str | None = None) -> Chat:
        """Starts a conversation.

        Args:
            system: An instruction to put first, as the system message.

        Raises:
            ValueError: The checkpoint has no chat template, or a broken one.
        """
        return Chat(self, system)

    # Tokens and logits.

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens`, BOS where the checkpoint wants it."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_special_tokens: bool = True
    ) -> str:
        """Text of token ids."""
        listed = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return self.tokenizer.decode(listed, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Writes messages (dicts with `role` and `content`) as the prompt the model expects.

        Raises:
            ValueError: There is no chat template, it is broken, or it refuses these messages.
        """
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def logits(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Logits of the next token after each prefix of `ids`.

        Args:
            ids: Token ids, 1 to `context_length` of them.

        Returns:
            float32, shape (n, vocab_size). 4 bytes times both: 0.5 MB a token for a vocabulary
            of 128,256.

        Raises:
            ValueError: `ids` is empty, too long, or has an id that is not in the vocabulary.
        """
        core = self.core
        tokens = self.check_ids(ids, "ids")
        if len(tokens) > self.context_length:
            raise ValueError(
                f"ids has {len(tokens)} tokens; the context holds {self.context_length}"
            )
        cache = core.new_cache(len(tokens), self.kv_dtype)
        rows = np.empty((len(tokens), self.vocab_size), np.float32)
        for at in range(0, len(tokens), PREFILL_TOKENS):
            chunk = tokens[at : at + PREFILL_TOKENS]
            rows[at : at + len(chunk)] = core.forward([(chunk, cache)], logits="all")
        return rows

    def new_cache(self, capacity: int | None = None) -> _core.KvCache:
        """An empty KV cache for `core.forward`; for the whole context when None."""
        return self.core.new_cache(capacity or self.context_length, self.kv_dtype)

    # Reports.

    def verify(self) -> VerifyReport:
        """Checks on this machine that every kernel and every way to compute gives the same bits."""
        from bitnet_rs import verify

        return verify.run(self)

    def bench(
        self,
        *,
        prompt_tokens: int | None = None,
        new_tokens: int | None = None,
        repetitions: int = 3,
    ) -> BenchReport:
        """Measures prefill and decode speed, next to the memory's; `bench.run` tells more."""
        from bitnet_rs import bench

        return bench.run(
            self.core,
            name=self.name,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repetitions=repetitions,
            kv_dtype=self.kv_dtype,
            context_length=self.context_length,
        )

    # What `Chat` and servers build on.

    def settings(
        self,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        ignore_eos: bool = False,
    ) -> Settings:
        """Checks the options of a call and fills in the checkpoint's defaults."""
        defaults = self._defaults
        given = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        changes: dict[str, Any] = {k: value for k, value in given.items() if value is not None}
        params = replace(defaults.params, **changes)
        for name, value, low in (("max_tokens", max_tokens, 1), ("logprobs", logprobs, 0)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < low
            ):
                raise ValueError(f"{name} is {value!r}; wanted an integer >= {low}, or None")
        strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
        for string in strings:
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop has {string!r}; wanted strings that are not empty")
        # Special tokens never show in the text, so a stop string that is one is meant as an id.
        special = {}
        if strings:
            special = {s: i for s in strings if (i := self.tokenizer.special_id(s)) is not None}
        return Settings(
            max_tokens=max_tokens,
            params=params,
            stop_ids=(frozenset() if ignore_eos else self.stop_ids) | set(special.values()),
            stop=tuple(string for string in strings if string not in special),
            logprobs=None if logprobs is None else min(logprobs, self.vocab_size),
        )

    def request(
        self,
        prompt: NDArray[np.uint32],
        settings: Settings,
        *,
        name: str = "prompt",
        cure: str = "shorten it",
        default_max_tokens: int | None = _DEFAULT_MAX_TOKENS,
    ) -> Request:
        """What the engine is to do, within the context.

        Args:
            prompt: Token ids, from `check_ids`.
            settings: From `settings`.
            name: What the prompt is called in the message, should it be too long.
            cure: What to do then.
            default_max_tokens: Where neither the caller nor the checkpoint says; None: what fits.
        """
        room = self.context_length - len(prompt)
        if room < 1:
            most = int(self.facts["max_positions"])
            if self.context_length < most:
                cure += f", or load the model with a larger context (up to {most})"
            raise ValueError(
                f"{name} has {len(prompt)} tokens; the context holds {self.context_length}, with "
                f"at least one for the answer: {cure}"
            )
        wanted = settings.max_tokens or self._defaults.max_tokens or default_max_tokens or room
        return Request(
            prompt, min(wanted, room), settings.params, settings.stop_ids, settings.logprobs
        )

    def _prompt(
        self, prompt: str | Sequence[int] | NDArray[np.integer[Any]], name: str = "prompt"
    ) -> NDArray[np.uint32]:
        """A prompt as checked token ids."""
        if not isinstance(prompt, str):
            return self.check_ids(prompt, name)
        if not prompt:
            raise ValueError(f"{name} is empty; wanted some text")
        return self.check_ids(self.tokenizer.encode_prompt(prompt), name)

    def check_ids(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], name: str
    ) -> NDArray[np.uint32]:
        """Token ids as the core takes them.

        Raises:
            ValueError: There are none, or one is not in the vocabulary; `name` names them.
        """
        try:
            array = np.asarray(ids)
        except (ValueError, OverflowError):  # ragged lists; integers beyond 64 bits
            raise ValueError(f"{name} is not a flat sequence of token ids") from None
        if array.size == 0:
            raise ValueError(f"{name} has no tokens; wanted at least one")
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"{name} has the shape {array.shape} and holds {array.dtype}; wanted integers "
                "along one axis"
            )
        wrong = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if len(wrong):
            raise ValueError(
                f"{name} has the token id {array[wrong[0]]} at position {wrong[0]}; wanted ids "
                f"from 0 to {self.vocab_size - 1}"
            )
        return np.ascontiguousarray(array, np.uint32)

    def _run(
        self, prompts: Sequence[NDArray[np.uint32]], settings: Sequence[Settings]
    ) -> list[Completion]:
        """Runs prompts together, to their ends."""
        engine = Engine(self.core, kv_dtype=self.kv_dtype)
        tokenizer = self.tokenizer
        replies = [
            Reply(engine.add(self.request(prompt, each)), tokenizer, each.stop)
            for prompt, each in zip(prompts, settings, strict=True)
        ]
        for _ in run(engine, replies):
            pass
        return [reply.completion() for reply in replies]


def _texts(engine: Engine, reply: Reply) -> Generator[str, None, None]:
    """The pieces of a single reply; closing it closes the engine with it."""
    pieces = run(engine, [reply])
    try:
        for _, piece in pieces:
            yield piece
    finally:
        pieces.close()


# Defaults from the checkpoint, arguments and the environment.


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What the checkpoint's own files say about generating."""

    params: SamplingParams
    max_tokens: int | None
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Reads generation_config.json and config.json.

        Raises:
            ValueError: A field has a value that can't be used.
        """
        found = checkpoint.generation_config
        names = ["repetition_penalty"]
        values: dict[str, Any] = {}
        if found.get("do_sample"):
            values["temperature"] = 1.0  # what sampling means where no temperature is named
            names += ["temperature", "top_k", "top_p", "min_p"]
        values |= {name: found[name] for name in names if found.get(name) is not None}
        where = checkpoint.path / "generation_config.json"
        try:
            params = SamplingParams(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; repair or remove the field") from None
        max_tokens = found.get("max_new_tokens")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise ValueError(
                f"{where}: max_new_tokens is {max_tokens!r}; wanted an integer >= 1; repair or "
                "remove the field"
            )
        stop_ids: set[int] = set()
        for file, content in (
            (where, found),
            (checkpoint.path / "config.json", checkpoint.config),
        ):
            value = content.get("eos_token_id")
            listed = value if isinstance(value, list) else [] if value is None else [value]
            # -1 stands for "none" in some files.
            if not all(type(i) is int and i >= -1 for i in listed):
                raise ValueError(
                    f"{file}: eos_token_id is {value!r}; wanted a token id, or a list of them"
                )
            stop_ids.update(i for i in listed if i >= 0)
        return cls(params, max_tokens, frozenset(stop_ids))


def _threads(threads: int | None) -> int:
    """How many threads to compute with: argument, environment, physical cores."""
    if threads is not None:
        if type(threads) is int and 1 <= threads <= _MAX_THREADS:
            return threads
        raise ValueError(f"threads is {threads!r}; wanted an integer from 1 to {_MAX_THREADS}")
    text = os.environ.get("BITNET_RS_THREADS", "").strip()
    if not text:
        return system.default_threads()
    if text.isascii() and text.isdigit() and 1 <= int(text) <= _MAX_THREADS:
        return int(text)
    raise ValueError(
        f"the environment variable BITNET_RS_THREADS is {text!r}; wanted an integer from 1 to "
        f"{_MAX_THREADS}, or nothing for one thread per physical core"
    )


def _kernel(kernel: str) -> str | None:
    """Name of the kernel to use, None for the fastest: argument, environment."""
    source = "kernel"
    if kernel == "auto":
        kernel = os.environ.get("BITNET_RS_KERNEL", "").strip() or "auto"
        source = "the environment variable BITNET_RS_KERNEL"
    if kernel == "auto":
        return None
    available = _core.kernels()
    if kernel not in available:
        raise ValueError(
            f"{source} is {kernel!r}; this CPU can run {', '.join(available)}, or auto for the "
            "fastest"
        )
    return kernel


def _context(context: int | None, max_positions: int) -> int:
    """The context length: what is asked for, within what the model was made for."""
    if context is None:
        return max_positions
    if type(context) is int and 1 <= context <= max_positions:
        return context
    raise ValueError(
        f"context is {context!r}; wanted an integer from 1 to {max_positions}, the "
        "max_position_embeddings of this model"
    )


def _count(n: int) -> str:
    """A number of parameters in words: 5.8 M, 2.41 B."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


# Loading, seen from a terminal.


class _Counted(Mapping[str, NDArray[Any]]):
    """Weights that count how many of them were taken."""

    def __init__(self, weights: Mapping[str, NDArray[Any]], on_taken: Any) -> None:
        self._weights = weights
        self._on_taken = on_taken

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self._weights[name]
        self._on_taken()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@contextmanager
def _progress(checkpoint: Checkpoint) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The checkpoint's weights, under a progress bar where someone may be waiting for them."""
    if checkpoint.n_files_bytes < _PROGRESS_BYTES or not sys.stderr.isatty():
        yield checkpoint.weights
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"Loading {checkpoint.name}", total=len(checkpoint.weights))
        yield _Counted(checkpoint.weights, lambda: bar.advance(task))


# The machine.


@dataclass(frozen=True, slots=True)
class Info:
    """What `info` found. Printed, it is a small table.

    Attributes:
        version: Of bitnet-rs.
        build_profile: `release`, or `debug`, which is many times slower.
        cpu: Name of the processor.
        cpu_features: Instruction sets in use.
        kernels: Kernels this CPU can run, fastest first.
        kernel: The one that `load` would use.
        threads: How many threads `load` would use.
        versions: Of Python and of the packages below, by name.
    """

    version: str
    build_profile: str
    cpu: str
    cpu_features: tuple[str, ...]
    kernels: tuple[str, ...]
    kernel: str
    threads: int
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for `json.dumps`."""
        return asdict(self)

    def __str__(self) -> str:
        rows = {
            "bitnet-rs": f"{self.version} ({self.build_profile})",
            "cpu": self.cpu,
            "features": " ".join(self.cpu_features) or "none used",
            "kernels": ", ".join(self.kernels),
            "kernel": self.kernel,
            "threads": str(self.threads),
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def info() -> Info:
    """CPU features, kernels, threads and versions: what to put into a bug report.

    Raises:
        ValueError: BITNET_RS_THREADS or BITNET_RS_KERNEL has a value that can't be used.
    """
    import platform
    from importlib import metadata

    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for package in ("tokenizers", "safetensors", "huggingface_hub"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    kernels = tuple(_core.kernels())
    return Info(
        version=_core.__version__,
        build_profile=_core.build_profile,
        cpu=system.cpu_name(),
        cpu_features=tuple(_core.cpu_features()),
        kernels=kernels,
        kernel=_kernel("auto") or kernels[0],
        threads=_threads(None),
        versions=versions,
    )
