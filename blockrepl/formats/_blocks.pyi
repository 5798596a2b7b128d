import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from blockrepl.formats.frame import U64

def encode_blocks(
    payload: Buffer, block_bytes: int, raw_bit: int
) -> tuple[list[bytes | memoryview], U64, npt.NDArray[np.uint32]]: ...
def first_damaged(body: Buffer, bounds: U64, digests: U64) -> int: ...
