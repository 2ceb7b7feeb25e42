"""Array files (``.npy``), read in one way: mapped, so that a size that lies takes no memory, and never as a pickle."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmo_stream.errors import CorruptError
from elmo_stream.files import naming


def map_array(path: Path) -> NDArray[Any]:
    """Map an array file.

    Raises:
        FileNotFoundError: it is not there.
        CorruptError: it holds no array, or objects.
    """
    try:
        with naming(path):
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptError(f"{path}: not a valid array file ({error}); it is damaged.") from error
    return array
