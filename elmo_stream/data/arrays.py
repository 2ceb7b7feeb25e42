"""Array files (``.npy``), written and read in one way: mapped, so that a size that lies takes no memory; no pickles."""

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


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array file; raises ``OSError`` where a write fails.

    ``numpy.save`` leaves the last bytes of an array to ``fclose``, and takes no notice when that finds the disk full.
    """
    if array.dtype.hasobject:
        raise ValueError("objects are never written")
    array = np.asarray(array, order="C")
    with naming(path), open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(array.data)
