"""What checkpoint files do not say about themselves, and the user may.

For `open_checkpoint` and whoever passes the options on to it. Apart because each loader reads
some of it and none of them owns it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Self, get_args

from bitnet_rs.loaders.families import Activations

I2sLayout = Literal["x86", "arm", "rows4"]
I2S_LAYOUTS: Final[tuple[I2sLayout, ...]] = get_args(I2sLayout)
Tile = tuple[int, int, int]


@dataclass(frozen=True)
class GgmlOptions:
    """What no GGUF file says about itself.

    Attributes:
        i2s_layout: Where I2_S puts weights follows from the machine that wrote the file: `x86`
            (groups of 128, as in all published files), `arm` (groups of 64), or `rows4` (x86
            without ACT_PARALLEL, four rows interleaved).
        tl_tiles: Tiles that the writer of a TL1 or TL2 file was compiled with, (BM, BK, bm) by
            (rows, cols): bitnet.cpp's `include/kernel_config.ini` has them.
    """

    i2s_layout: I2sLayout = "x86"
    tl_tiles: Mapping[tuple[int, int], Tile] = field(default_factory=dict)


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

    @classmethod
    def of(
        cls,
        *,
        activations: Activations | None,
        masters: bool,
        i2s_layout: I2sLayout,
        tl_tiles: Mapping[tuple[int, int], Tile] | None,
    ) -> Self:
        """The options as `load` and `convert` take them, one by one."""
        return cls(activations, masters, GgmlOptions(i2s_layout, dict(tl_tiles or {})))
