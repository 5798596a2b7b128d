from typing import Any

import numpy.typing as npt
from typing_extensions import Buffer

from blockrepl.formats.frame import U64

def pack(values: U64) -> tuple[int, int, int, bytes]: ...
def unpack_into(
    data: Buffer,
    start: int,
    count: int,
    base: int,
    shift: int,
    width: int,
    target: npt.NDArray[Any],
    place: int,
) -> None: ...
