"""Optimizer states in memory-mapped files, which the operating system pages out when memory runs short."""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, UntypedStorage

from bnbops.tracing import is_compiling

_ALIGNMENT = 64  # a cache line
_CHUNK = 2**20  # what small tensors share
_SMALL = _CHUNK // 16  # so that less than a sixteenth of a chunk is left over
_DESCRIPTORS = "/dev/fd"
_ADVICE = "name another directory (paged_directory=...) or use is_paged=False"


class PagedMemory:
    """Tensors on the CPU whose pages belong to files of a directory instead of the process's private memory.

    Under memory pressure the operating system writes such pages to their file and takes the memory; the next access
    reads them back. bitsandbytes' paged optimizers do the same for a GPU, with unified memory.

    The files have no name, mode 0600 and no open descriptor: only the mapping keeps a file alive, and only the tensors
    in it the mapping. So nothing is left behind however the process ends, and a dropped tensor gives its disk space
    back. A tensor of 64 KiB or more has a file of its own; smaller ones share files of 1 MiB. Disk space is reserved
    before a tensor is handed out, and pages that were never written cost no reading or writing.

    A copy (`copy.deepcopy`, pickle, `torch.save`, `share_memory_`) of a tensor is ordinary memory with the tensor's own
    bytes only. A copy of a PagedMemory is an empty one for the same directory.

    Args:
        directory: where the files are; the system's temporary directory if None. Should be on a disk.

    Raises:
        OSError: no file can be made there; FileNotFoundError, NotADirectoryError, PermissionError where they fit. Or
            the system is neither Linux nor macOS.

    Warns:
        UserWarning: the directory is itself held in memory (tmpfs), so that nothing is gained.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._process: int | None = None  # that holds tensors
        self._chunk: UntypedStorage | None = None
        self._used = 0  # bytes of the chunk
        if not os.path.isdir(_DESCRIPTORS):
            raise OSError(errno.ENOTSUP, f"paged optimizer states need {_DESCRIPTORS}, as on Linux; use is_paged=False")
        named = tempfile.gettempdir() if directory is None else os.fspath(directory)
        try:
            os.stat(named)  # tempfile takes "" for the current directory
            tempfile.TemporaryFile(dir=named).close()
        except OSError as error:
            wanted = f"paged optimizer states cannot be kept in {named!r}"
            raise OSError(error.errno, f"{wanted}: {error.strerror}; {_ADVICE}") from error
        self.directory = os.path.abspath(named)
        self._copied_to = None if directory is None else self.directory
        if _held_in_memory(self.directory):
            warnings.warn(
                f"paged optimizer states in {self.directory!r} stay in memory, since it is a tmpfs; name a directory "
                "on a disk (paged_directory=...)",
                stacklevel=2,
            )

    def __reduce__(self) -> tuple[type[PagedMemory], tuple[str | None]]:
        return type(self), (self._copied_to,)

    def zeros(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros, aligned to 64 bytes. One without elements is ordinary memory.

        Raises:
            OSError: no space left in the directory (ENOSPC, EDQUOT, EFBIG), or in the address space (ENOMEM). Nothing
                has changed then.
            RuntimeError: called in a forked child.
        """
        self.check_process()
        result = torch.empty(shape, dtype=dtype, device="meta")
        nbytes = result.nbytes
        if nbytes == 0:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        storage = self._small(nbytes) if nbytes < _SMALL else self._map(nbytes)
        self._process = os.getpid()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage).view(result.shape)

    def check_process(self) -> None:
        """Refuses to go on in a forked child, which would write the states of its parent: their pages are shared.

        Raises:
            RuntimeError: this is not the process that made the tensors.
        """
        if is_compiling():  # the compiler cannot trace os.getpid
            return
        if self._process not in (None, os.getpid()):
            raise RuntimeError(
                f"paged optimizer states belong to process {self._process}, which was forked into this one "
                f"({os.getpid()}); make the optimizer in the process that uses it, or use is_paged=False"
            )

    def _small(self, nbytes: int) -> UntypedStorage:
        """The next bytes of the shared chunk, or of a new one."""
        start = -(self._used // -_ALIGNMENT) * _ALIGNMENT
        if self._chunk is None or start + nbytes > _CHUNK:
            self._chunk, start = self._map(_CHUNK), 0
        self._used = start + nbytes
        # A storage of its own, so that copying or saving the tensor takes its bytes, not the chunk's.
        return self._chunk[start : self._used]

    def _map(self, nbytes: int) -> UntypedStorage:
        """A new file's bytes, all zero. The storage keeps its mapping, and the mapping its file."""
        try:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                _reserve(file, nbytes)
                mapped = UntypedStorage.from_file(_path(file), shared=True, nbytes=nbytes)
        except OSError as error:
            raise self._no_room(nbytes, error.errno, error.strerror) from error
        except RuntimeError as error:  # torch's, when the mapping fails
            raise self._no_room(nbytes, errno.ENOMEM, str(error)) from error
        return mapped[:]  # torch takes the mapping itself for shared memory, and could not send it to a process

    def _no_room(self, nbytes: int, number: int | None, reason: str | None) -> OSError:
        wanted = f"no room for a paged optimizer state of {nbytes:,} bytes in {self.directory!r}"
        return OSError(number, f"{wanted}: {reason}; free some, {_ADVICE}")


def _path(file: IO[bytes]) -> str:
    """A path that opens a file without a name."""
    return f"{_DESCRIPTORS}/{file.fileno()}"


def _reserve(file: IO[bytes], nbytes: int) -> None:
    """Gives a file its disk blocks. Without them a full disk would kill the process when it writes (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system's, where libc has no substitute
                raise
    zeros = bytes(min(nbytes, _CHUNK))
    for start in range(0, nbytes, len(zeros)):
        file.write(zeros[: nbytes - start])
    file.flush()


def _held_in_memory(directory: str) -> bool:
    """Whether a directory is on a tmpfs, as far as Linux tells."""
    device = os.stat(directory).st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    for fields in map(str.split, mounts):  # proc(5): field 3 is the device, the one after "-" the type
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    return False
