from collections.abc import Sequence

from typing_extensions import Buffer

BLOCK_BYTES: int
SHOWS_DATA: int
SHOWS_BASE: int
IMAGE: int

ENDS_TOO_SOON: int
WRONG_DIGEST: int
WRONG_SIZE: int
LEADS_OUT: int
WRONG_TABLE: int

def unfilled(size: int) -> bytearray: ...

class Blocks:
    table_bytes: int
    payload_bytes: int
    def __init__(self, table_bytes_max: int, payload_bytes_max: int) -> None: ...

class Gather:
    files: list[int]
    def __init__(
        self,
        bounds: Buffer,
        kinds: Buffer,
        segments: Buffer,
        frames: Buffer,
        positions: Buffer,
        first: int,
        last: int,
    ) -> None: ...
    def read(
        self,
        kept: Blocks,
        opened: Sequence[tuple[int, Buffer, int]],
        target: Buffer,
        may_wait: bool,
        proofs_max: int,
    ) -> tuple[int, int, int, int, int] | None: ...
