"""What a caller may ask for: options, checked, with the checkpoint's defaults filled in.

For `Model`, which computes with the outcome, and for those who pass options on to it. Apart
because nothing here needs a loaded model: each option is checked in one place, and what is left
out comes from the checkpoint's own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict

from bitnet_rs.checks import check_integer, check_iterable
from bitnet_rs.sampling import SamplingParams

if TYPE_CHECKING:
    from bitnet_rs.loaders import Checkpoint
    from bitnet_rs.tokenizer import Tokenizer

# Options that are fields of `SamplingParams`.
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


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

    def repeated(self, n: int) -> list[Self]:
        """The same for each of `n` completions; with a seed, it is one higher in each."""
        seed = self.params.seed
        if seed is None:
            return [self] * n
        return [replace(self, params=replace(self.params, seed=seed + i)) for i in range(n)]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the checkpoint's own files say about generating."""

    params: SamplingParams
    max_tokens: int | None
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Self:
        """Reads generation_config.json and config.json; more stop ids are the tokenizer's.

        Raises:
            ValueError: A field has a value that can't be used.
        """
        found = checkpoint.generation_config
        names = ["repetition_penalty"]
        values: dict[str, Any] = {}
        where = checkpoint.config_file.with_name("generation_config.json")
        do_sample = found.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise ValueError(
                f"{where}: do_sample is {do_sample!r}; wanted true or false; repair or remove "
                "the field"
            )
        if do_sample:
            values["temperature"] = 1.0  # what sampling means where no temperature is named
            names += ["temperature", "top_k", "top_p", "min_p"]
        values |= {name: found[name] for name in names if found.get(name) is not None}
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
        if tokenizer is not None:
            stop_ids.update(tokenizer.eos_token_ids, tokenizer.end_of_turn_ids)
        for file, content in (
            (where, found),
            (checkpoint.config_file, checkpoint.config),
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


def check_options(
    options: Options,
    defaults: Defaults,
    *,
    stop_ids: frozenset[int],
    vocab_size: int,
    special_id: Callable[[str], int | None],
) -> Settings:
    """Checks the options of a call and fills in the checkpoint's defaults.

    Args:
        options: What was asked; None is the same as nothing.
        defaults: What the checkpoint says.
        stop_ids: Token ids that end a text, unless `ignore_eos` is asked for.
        vocab_size: No more log-probabilities than that are reported.
        special_id: The id of a special token by its text, None for all other text. Called only
            if there are stop strings.

    Raises:
        TypeError: There is no such option, or `stop` is neither a string nor several.
        ValueError: An option is out of range; the message names it.
    """
    known = Options.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"there is no option {name!r}; wanted one of {', '.join(known)}")
    given: Mapping[str, Any] = {k: value for k, value in options.items() if value is not None}
    params = replace(defaults.params, **{name: given[name] for name in _SAMPLING if name in given})
    # There are no more to keep, and the core counts in 64 bits.
    params = replace(params, top_k=min(params.top_k, vocab_size))
    counts = {
        name: check_integer(name, given[name], low, wanted=f"an integer >= {low}, or None")
        for name, low in (("max_tokens", 1), ("logprobs", 0))
        if name in given
    }
    strings = _stop_strings(given.get("stop", ()))
    # Special tokens never show in the text, so a stop string that is one is meant as an id.
    special = {string: i for string in strings if (i := special_id(string)) is not None}
    logprobs = counts.get("logprobs")
    return Settings(
        max_tokens=counts.get("max_tokens", defaults.max_tokens),
        params=params,
        stop_ids=(frozenset() if given.get("ignore_eos") else stop_ids) | set(special.values()),
        stop=tuple(string for string in strings if string not in special),
        logprobs=None if logprobs is None else min(logprobs, vocab_size),
    )


def _stop_strings(stop: Any) -> tuple[str, ...]:
    """The option `stop` as a tuple."""
    if isinstance(stop, str):
        stop = (stop,)
    strings = tuple(check_iterable("stop", stop, "a str, or a list of them"))
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop has {string!r}; wanted strings that are not empty")
    return strings


def choose_context(context: int | None, max_positions: int) -> int:
    """The context length: what is asked for, within what the model was made for."""
    if context is None:
        return max_positions
    wanted = f"an integer from 1 to {max_positions}, the max_position_embeddings of this model"
    return check_integer("context", context, 1, max_positions, wanted=wanted)
