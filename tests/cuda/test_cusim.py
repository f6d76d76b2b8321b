"""The simulator of cuda_on_cpu/: right kernels give right results, and each planted bug is found."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from cuda_on_cpu.library import HERE, build

BUILDS = (None, "address", "thread")
CASES = HERE / "selftest" / "torch_library" / "sanitized.py"
ORDERS = ["forward", "reverse", "random:1", "random:2"]
ALL, PLAIN = BUILDS, [None]

WRONG = r"is .*, expected"
RACE = "WARNING: ThreadSanitizer: data race"
OUT_OF_HEAP = "ERROR: AddressSanitizer: heap-buffer-overflow"

# What finds which bug: the builds, the orders, and what they say.
PLANTED = [
    ("global_read", ["address"], ORDERS, OUT_OF_HEAP),
    ("global_write", ["address"], ORDERS, OUT_OF_HEAP),
    ("shared_write", ["address"], ORDERS, "runtime error: index 96 out of bounds"),
    ("shared_write_by_pointer", ["address"], ORDERS, "ERROR: AddressSanitizer: global-buffer-overflow"),
    ("dynamic_shared_write", ["address"], ORDERS, OUT_OF_HEAP),
    ("missing_barrier", ["thread"], ORDERS, RACE),
    ("missing_barrier", PLAIN, ["reverse", "random:1", "random:2"], WRONG),
    ("missing_barrier_before_refill", ["thread"], ORDERS, RACE),
    ("missing_barrier_before_refill", PLAIN, ORDERS, WRONG),
    ("missing_warp_barrier", ["thread"], ORDERS, RACE),
    ("shuffle_as_barrier", ["thread"], ORDERS, RACE),
    ("sum_without_atomic", ["thread"], ORDERS, RACE),
    ("block_needs_another", PLAIN, ["reverse", "random:1", "random:2"], WRONG),
    ("divergent_barrier", ALL, ORDERS, r"cusim: \S+: divergent barrier: thread \(0,0,0\) waits at \S+ in kernel"),
    ("divergent_loop", ALL, ORDERS, r"cusim: \S+: divergent barrier: thread \(0,0,0\) waits at \S+ in kernel"),
    ("lane_at_barrier", ALL, ORDERS, r"cusim: \S+: divergent warp: mask ffffffff names lane 5, which waits at"),
    ("divergent_shuffle", ALL, ORDERS, r"cusim: \S+: divergent warp: mask ffffffff names lane 16, which waits at"),
    ("misaligned_load", ALL, ORDERS, r"cusim: misaligned load of 16 bytes at \S+ \(8 past a boundary\) in kernel"),
    ("misaligned_store", ALL, ORDERS, r"cusim: misaligned store of 16 bytes at \S+ \(4 past a boundary\) in kernel"),
    ("misaligned_plain_load", ["address"], ORDERS, "runtime error: .* misaligned address"),
    ("shuffle_names_exited_lane", ALL, ORDERS, r"cusim: \S+: mask ffffffff names lane 2\d, which has exited in kernel"),
    ("mask_without_caller", ALL, ORDERS, r"cusim: \S+: mask 0007ffff lacks the calling lane 19 in kernel"),
    ("shuffle_reads_beyond_mask", ALL, ORDERS, r"cusim: \S+: lane \d+ reads lane 25, which mask 000fffff lacks"),
    ("static_table_kept", PLAIN, ORDERS, WRONG),
    ("inline_table_kept", PLAIN, ORDERS, WRONG),
    ("dynamic_table_kept", ALL, ORDERS, WRONG),
    ("missing_wait", ALL, ORDERS, WRONG),
    ("wait_for_older_copy", ALL, ORDERS, WRONG),
    ("missing_barrier_after_wait", ["thread"], ORDERS, RACE),
    ("missing_barrier_after_wait", PLAIN, ORDERS, WRONG),
    ("async_copy_to_global", PLAIN, ORDERS, r"cusim: cp\.async outside of shared memory in kernel"),
]


@pytest.fixture(scope="session")
def selftest():
    """Runs the self-tests of one build in one order, or one planted bug; gives the exit status and the errors."""

    @cache
    def program(sanitizer: str | None) -> Path:
        return build(sanitizer, "cusim_selftest")

    def run(sanitizer: str | None, order: str, *bug: str) -> tuple[int, str]:
        done = subprocess.run(
            [program(sanitizer), *bug], text=True, capture_output=True, env={**os.environ, "CUSIM_ORDER": order}
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize("sanitizer", BUILDS)
def test_right_kernels_pass_in_every_order(selftest, sanitizer):
    """The sanitizers, which are slow, see two orders."""
    for order in ORDERS[::3] if sanitizer else ORDERS:
        assert selftest(sanitizer, order) == (0, "")


@pytest.mark.parametrize("sanitizer", BUILDS)
def test_planted_bugs_are_found(selftest, sanitizer):
    """In every order that shows them; the sanitizers do not depend on it."""
    for bug, builds, orders, message in PLANTED:
        if sanitizer not in builds:
            continue
        for order in orders[:1] if sanitizer else orders:
            status, errors = selftest(sanitizer, order, bug)
            assert status != 0 and re.search(message, errors), f"{bug}, {order}: {errors or 'not found'}"


def test_every_planted_bug_is_listed():
    source = (HERE / "selftest" / "planted.cu").read_text()
    assert set(re.findall(r"^BUG\((\w+)\)", source, re.MULTILINE)) == {bug for bug, *_ in PLANTED}


def test_failure_names_kernel_block_and_thread(selftest):
    _, errors = selftest(None, "forward", "mask_without_caller")
    assert errors.endswith("in kernel (shuffle_by_mask<mask, source>) block (0,0,0) thread (19,0,0)\n")


def test_unknown_order_is_refused(selftest):
    status, errors = selftest(None, "backward")
    assert status != 0 and "CUSIM_ORDER=backward is not forward, reverse or random:SEED" in errors


@pytest.mark.parametrize(
    ("sanitizer", "bug", "message"), [("address", "beyond", OUT_OF_HEAP), ("thread", "race", RACE)]
)
def test_sanitizers_work_within_python(sanitizer, bug, message):
    """An operator of torch: its right kernel passes, the one with a bug makes the process fail."""
    options = ["--product", "libcusim_selftest_torch.so", "--", "-v", "-k", f"right or {bug}", CASES]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "CUSIM_ORDER": "forward"}
    command = [sys.executable, "-m", "cuda_on_cpu.sanitize", sanitizer, *options]
    done = subprocess.run(command, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    before, _, after = done.stdout.partition("::test_right PASSED")
    assert message not in before and message in after and done.returncode != 0, done.stdout
