"""What checkpoint files do not say about themselves, and the user may.

For `open_checkpoint` and whoever passes the options on to it. Apart because each loader reads
some of it and none of them owns it.
"""

from dataclasses import dataclass, field
from typing import get_args

from bitnet_rs.loaders.families import Activations
from bitnet_rs.loaders.ggml_types import GgmlOptions


@dataclass(frozen=True)
class FileOptions:
    """Options of `open_checkpoint`.

    Attributes:
        activations: What projections multiply, `int8` or `float`, where the files do not say or
            the user wants otherwise. None: as trained.
        masters: Float weights are masters of a ternary model, to be quantized at load, though
            config.json does not say so.
        ggml: Layouts and tiles of GGUF files.

    Raises:
        ValueError: `activations` is none of those.
        TypeError: `masters` is no bool.
    """

    activations: Activations | None = None
    masters: bool = False
    ggml: GgmlOptions = field(default_factory=GgmlOptions)

    def __post_init__(self) -> None:
        """Checks what is given."""
        if self.activations not in (None, *get_args(Activations)):
            raise ValueError(
                f"activations is {self.activations!r}; wanted 'int8', 'float' or nothing"
            )
        if not isinstance(self.masters, bool):
            raise TypeError(f"masters is {self.masters!r}; wanted True or False")
