import numpy as np
import numpy.typing as npt

def paint(
    firsts: npt.NDArray[np.int64], lasts: npt.NDArray[np.int64], cells: int
) -> npt.NDArray[np.int64]: ...
