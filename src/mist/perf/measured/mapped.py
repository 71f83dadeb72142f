"""Arrays of an .npz file as they lie on disk: mapped into memory, so that processes share them.

Under the cache of measured tables, whose files hold their arrays uncompressed. It writes nothing, and raises
`BadZipFile` where a checksum says that the file is damaged.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

#: of a member's header in the archive, in front of its name and its extra field (APPNOTE.TXT 4.3.7)
_LOCAL_HEADER = 30


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of an uncompressed .npz file by name, read-only; each is read from disk as it is used.

    Raises OSError, ValueError or BadZipFile where the file isn't there or isn't whole.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile(f"{path} is damaged")
        return {info.filename.removesuffix(".npy"): _mapped(file, info) for info in archive.infolist()}


def _mapped(file: IO[bytes], info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    start = info.header_offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little")
    file.seek(start + int.from_bytes(header[28:30], "little"))
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if info.compress_type != zipfile.ZIP_STORED or is_fortran or dtype.hasobject:
        raise ValueError(f"{info.filename} can't be mapped")
    if not np.prod(shape):
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype, "r", file.tell(), shape)
