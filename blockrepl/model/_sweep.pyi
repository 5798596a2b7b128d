import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

def sweep(
    starts: U64, ends: U64, ages: tuple[U64, U32, U32, U32] | None, first: int, last: int
) -> tuple[U64, U64, npt.NDArray[np.int64]]: ...
