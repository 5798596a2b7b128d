import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

def sweep(
    starts: U64, ends: U64, ages: tuple[U64, U32, U32, U32] | None, first: int, last: int
) -> tuple[U64, U64, npt.NDArray[np.int64]]: ...
def places(
    starts: U64,
    ends: U64,
    winners: npt.NDArray[np.int64],
    run_starts: U64,
    run_kinds: U8,
    run_segments: U32,
    run_frames: U32,
    run_positions: U32,
) -> tuple[U64, U64, U8, U32, U32, U32]: ...
