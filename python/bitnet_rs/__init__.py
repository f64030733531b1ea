"""Run ternary (1.58-bit) language models on CPUs: exact and fast.

    import bitnet_rs as br

    model = br.load()                       # the small bundled model; or a folder, or a hub id
    print(model.generate("Once upon a time"))

This file is the public API and nothing else: it re-exports names.
"""

from bitnet_rs._core import __version__
from bitnet_rs.chat import Chat
from bitnet_rs.completion import Completion, Stream, Timings, TokenLogprob, Usage
from bitnet_rs.convert import ConvertReport, convert
from bitnet_rs.machine import Info, info
from bitnet_rs.model import Model, load
from bitnet_rs.sampling import SamplingParams

__all__ = [
    "Chat",
    "Completion",
    "ConvertReport",
    "Info",
    "Model",
    "SamplingParams",
    "Stream",
    "Timings",
    "TokenLogprob",
    "Usage",
    "__version__",
    "convert",
    "info",
    "load",
]
