"""PagedMemory: tensors in unlinked, memory-mapped files, and what happens where that goes wrong."""

import copy
import errno
import gc
import io
import os
import pickle
import signal
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, UntypedStorage

from bnbops.optim.paging.paged import PagedMemory
from cases.paged import in_a_fork, is_paged, mapped, run

LARGE = (64, 1024)  # fp32: a file of its own
SMALL = (8, 16)  # shares one


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a disk, which `tmp_path` need not be."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), 5, SMALL, (3, 0, 2), LARGE, torch.Size([1, 65536, 3])], ids=str)
def test_zeros(shape, dtype, tmp_path):
    x = PagedMemory(tmp_path).zeros(shape, dtype)
    expected = torch.zeros(shape, dtype=dtype)
    assert torch.equal(x, expected) and x.dtype == dtype and x.stride() == expected.stride()
    assert x.device.type == "cpu" and not x.requires_grad
    assert x.untyped_storage().nbytes() == x.nbytes and x.storage_offset() == 0
    assert x.data_ptr() % 64 == 0
    assert x.numel() == 0 or is_paged(x, tmp_path)


def test_tensors_do_not_overlap(tmp_path):
    memory = PagedMemory(tmp_path)
    sizes = [1, 63, 64, 65, 4096, 65535, 65536, 65537, 2**20, 40000, 40000] * 20
    tensors = [memory.zeros(size, torch.uint8) for size in sizes]
    for i, x in enumerate(tensors):
        assert x.data_ptr() % 64 == 0 and not x.any(), "someone else's bytes"
        x.fill_(i + 1)
    assert all((x == i + 1).all() for i, x in enumerate(tensors))


def test_small_tensors_share_mappings(tmp_path):
    memory = PagedMemory(tmp_path)
    before = open_files()
    small = [memory.zeros(1000, torch.float32) for _ in range(1000)]
    assert len(mapped(tmp_path)) == 4  # of a MiB each
    large = [memory.zeros(LARGE, torch.float32) for _ in range(1000)]
    assert open_files() == before
    assert len(small) == len(large) == 1000


def test_bad_arguments(tmp_path):
    memory = PagedMemory(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="negative"):
        memory.zeros((2, -3), torch.float32)
    with pytest.raises(TypeError):
        memory.zeros("many", torch.float32)


# Files


@pytest.fixture
def files(monkeypatch) -> list[os.stat_result]:
    """What every file was like when it was mapped."""
    seen = []

    def from_file(path, shared, nbytes, _real=UntypedStorage.from_file):
        seen.append(os.stat(path))
        return _real(path, shared=shared, nbytes=nbytes)

    monkeypatch.setattr(UntypedStorage, "from_file", from_file)
    return seen


def test_a_file_is_private_reserved_and_unnamed(tmp_path, files):
    memory = PagedMemory(tmp_path)
    tensors = [memory.zeros(nbytes, torch.uint8) for nbytes in (1, 2**16, 2**21 + 101)]
    assert [file.st_size for file in files] == [2**20, *(x.nbytes for x in tensors[1:])]
    for file in files:
        assert stat.S_IMODE(file.st_mode) == 0o600 and file.st_nlink == 0
        assert file.st_size <= 512 * file.st_blocks
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fallocate", ["missing", errno.EOPNOTSUPP, errno.EINVAL])
def test_where_space_cannot_be_reserved_zeros_are_written(fallocate, tmp_path, files, monkeypatch):
    def refuse(fd, offset, length):
        raise OSError(fallocate, os.strerror(fallocate))

    if fallocate == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    test_a_file_is_private_reserved_and_unnamed(tmp_path, files)
    assert not PagedMemory(tmp_path).zeros(2**21 + 1, torch.uint8).any()


def test_nothing_is_left_by_a_killed_process(tmp_path):
    code = """
        import os, signal, sys, torch
        from bnbops.optim.paging.paged import PagedMemory
        memory = PagedMemory(sys.argv[1])
        tensors = [memory.zeros(size, torch.uint8).fill_(1) for size in (100, 2**20)]
        assert os.listdir(sys.argv[1]) == []
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run(code, tmp_path, status=-signal.SIGKILL)
    assert os.listdir(tmp_path) == []


def test_the_default_is_the_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory = PagedMemory()
    assert memory.directory == str(tmp_path)
    assert is_paged(memory.zeros(LARGE, torch.float32), tmp_path)


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    for name in ("states", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    memory = PagedMemory("states")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert is_paged(memory.zeros(LARGE, torch.float32), tmp_path / "states")


def test_a_dropped_tensor_gives_its_file_back(tmp_path):
    memory = PagedMemory(tmp_path)
    large, small = memory.zeros(LARGE, torch.float32), memory.zeros(SMALL, torch.float32)
    view = large[3:5]
    del large
    gc.collect()
    assert len(mapped(tmp_path)) == 2 and is_paged(view, tmp_path)
    del view
    gc.collect()
    assert len(mapped(tmp_path)) == 1
    del memory
    gc.collect()
    assert is_paged(small.add_(1), tmp_path) and (small == 1).all()
    del small
    gc.collect()
    assert mapped(tmp_path) == []


def test_untouched_pages_cost_nothing(disk):
    def written() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["write_bytes"])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    memory = PagedMemory(disk)
    before = written(), resident()
    x = memory.zeros(2**26, torch.uint8)
    assert written() - before[0] < 2**20 and resident() - before[1] < 2**22
    x[::4096] = 1
    assert written() - before[0] >= 2**26 and resident() - before[1] >= 2**26 - 2**22


# What goes wrong


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing", FileNotFoundError),
        ("file", NotADirectoryError),
        ("locked", PermissionError),
        ("", FileNotFoundError),
    ],
)
def test_bad_directories(name, error, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    directory = str(tmp_path / name) if name else ""
    user = os.geteuid()
    if user == 0 and name == "locked":
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(error, match=f"cannot be kept in '{directory}'.*paged_directory=.*is_paged=False"):
            PagedMemory(directory)
    finally:
        os.seteuid(user)
    assert sorted(os.listdir(tmp_path)) == ["file", "locked"] and os.listdir(tmp_path / "locked") == []


def test_a_directory_in_memory_warns(disk):
    with pytest.warns(UserWarning, match="'/dev/shm' stay in memory.*paged_directory"):
        PagedMemory("/dev/shm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PagedMemory(disk)


def test_no_descriptors_to_open_by_path(monkeypatch):
    monkeypatch.setattr("bnbops.optim.paging.paged._DESCRIPTORS", "/no/such/fd")
    with pytest.raises(OSError, match=r"need /no/such/fd.*is_paged=False"):
        PagedMemory()


@pytest.mark.parametrize("fallocate", [True, False])
def test_no_room(fallocate, tmp_path):
    """A limit on the size of files is a full disk for one process."""
    code = """
        import errno, os, resource, sys, torch
        from bnbops.optim.paging.paged import PagedMemory
        if sys.argv[2] == "False":
            del os.posix_fallocate
        memory = PagedMemory(sys.argv[1])
        kept = [memory.zeros(size, torch.uint8).fill_(1) for size in (100, 2**21)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))
        fds = os.listdir("/proc/self/fd")
        try:
            memory.zeros((3, 2**20), torch.uint8)
        except OSError as error:
            assert error.errno == errno.EFBIG
            print(error)
        assert fds == os.listdir("/proc/self/fd")
        assert all((x == 1).all() for x in kept)
        kept += [memory.zeros(size, torch.uint8) for size in (100, 2**21)]
        kept[2].fill_(2)
        assert [x.sum().item() for x in kept] == [100, 2**21, 200, 0]
    """
    message = run(code, tmp_path, fallocate)
    for part in ("3,145,728 bytes", repr(str(tmp_path)), "File too large", "paged_directory=", "is_paged=False"):
        assert part in message
    assert os.listdir(tmp_path) == []


def test_a_full_disk(tmp_path, monkeypatch):
    memory = PagedMemory(tmp_path)
    first = memory.zeros(60000, torch.uint8)

    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        room = memory.zeros(60000, torch.uint8)  # in the first chunk
        with pytest.raises(OSError, match=r"65,536 bytes in .*No space left on device"):
            memory.zeros(2**16, torch.uint8)
        many = []
        with pytest.raises(OSError, match="1,048,576 bytes"):
            for _ in range(20):
                many.append(memory.zeros(60000, torch.uint8))
        last = memory.zeros(10, torch.uint8)  # still fits
    second = [memory.zeros(60000, torch.uint8) for _ in range(2)]
    tensors = [first, room, *many, last, *second]
    for i, x in enumerate(tensors):
        x.fill_(i)
    assert all((x == i).all() for i, x in enumerate(tensors)) and len(mapped(tmp_path)) == 2


def test_no_room_in_the_address_space(tmp_path):
    code = """
        import errno, re, resource, sys, torch
        from bnbops.optim.paging.paged import PagedMemory
        memory = PagedMemory(sys.argv[1])
        size = int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))
        try:
            memory.zeros(2**27, torch.uint8)
        except OSError as error:
            assert error.errno == errno.ENOMEM
            print(error)
        assert memory.zeros(2**22, torch.uint8).fill_(1).all()
    """
    message = run(code, tmp_path)
    assert "134,217,728 bytes" in message and "Cannot allocate memory" in message


def test_a_forked_child_is_refused(tmp_path):
    memory = PagedMemory(tmp_path)
    assert in_a_fork(lambda: memory.zeros(SMALL, torch.float32).sum().item()) == "0.0"  # none of the parent's yet
    x = memory.zeros(SMALL, torch.float32)
    memory.check_process()
    for call in (memory.check_process, lambda: memory.zeros(SMALL, torch.float32)):
        message = in_a_fork(call)
        assert message.startswith("RuntimeError: ") and f"belong to process {os.getpid()}" in message
    assert in_a_fork(lambda: copy.copy(memory).zeros(SMALL, torch.float32).sum().item()) == "0.0"
    memory.check_process()
    assert not x.any()


# Copies


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    assert len(file.getvalue()) < x.nbytes + 2048, "more than the tensor's own bytes"
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_a_copy_is_ordinary_memory(shape, how, tmp_path):
    memory = PagedMemory(tmp_path)
    x, neighbour = memory.zeros(shape, torch.float32).fill_(1), memory.zeros(shape, torch.float32)
    other = COPIES[how](x)
    assert torch.equal(other, x) and not is_paged(other, tmp_path)
    assert other.untyped_storage().nbytes() == x.nbytes
    other.fill_(2)
    assert (x == 1).all() and not neighbour.any()
    assert len(mapped(tmp_path)) == (1 if shape == SMALL else 2)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_sharing_moves_a_tensor_into_shared_memory(shape, tmp_path):
    """As for every tensor; what it must not do is to hand the file, or a neighbour, to another process."""
    memory = PagedMemory(tmp_path)
    x, neighbour = memory.zeros(shape, torch.float32).fill_(1), memory.zeros(shape, torch.float32).fill_(2)
    x.share_memory_()
    assert (x == 1).all() and x.is_shared() and not is_paged(x, tmp_path)
    assert (neighbour == 2).all() and not neighbour.is_shared() and is_paged(neighbour, tmp_path)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_memory_starts_empty(how, tmp_path, monkeypatch):
    memory = PagedMemory(tmp_path)
    x = memory.zeros(SMALL, torch.float32)
    other = COPIES[how](memory)
    y = other.zeros(SMALL, torch.float32).fill_(1)
    assert other.directory == memory.directory and is_paged(y, tmp_path)
    assert len(mapped(tmp_path)) == 2 and not x.any()

    default = PagedMemory()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # another machine's
    assert COPIES[how](default).directory == str(tmp_path)
