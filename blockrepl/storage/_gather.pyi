from typing_extensions import Buffer

BLOCK_BYTES: int
SHOWS_DATA: int
SHOWS_BASE: int

ENDS_TOO_SOON: int
WRONG_DIGEST: int
WRONG_SIZE: int
LEADS_OUT: int

class ProvenBlocks:
    def __init__(self, bits: int) -> None: ...
    def add(self, segment: int, frame: int, block: int, offset: int, size: int) -> None: ...

class Gather:
    missing: list[tuple[int, int, int]]
    def __init__(
        self,
        proven: ProvenBlocks,
        bounds: Buffer,
        kinds: Buffer,
        segments: Buffer,
        frames: Buffer,
        positions: Buffer,
        first: int,
        last: int,
    ) -> None: ...
    def files(self) -> list[int]: ...
    def prove(
        self,
        wanted: list[tuple[int, int, int, int, int, bool, int]],
        target: Buffer,
        flags: int,
    ) -> tuple[int, int, list[bytes | None]]: ...
    def supply(self, number: int, block: Buffer, target: Buffer) -> bool: ...
    def read(
        self, descriptors: dict[int, int], target: Buffer, flags: int
    ) -> tuple[int, int, int]: ...
