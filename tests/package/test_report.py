"""What `python -m bnbops` finds missing, on machines and installations that are made up, and how it says so."""

import copy
from typing import Any

import pytest
import torch

from bnbops import report, versions
from bnbops._library import ISAS, NO_CUDA_KERNELS

ALL_THERE: dict[str, Any] = {
    "torch": {"version": "2.13.0+cu130", "cuda": "13.0"},
    "cpu": {"processor": "x86_64", "isa": "amx", "available": list(ISAS)},
    "cuda": {
        "loaded": True,
        "problem": None,
        "toolkit": "13.0.88",
        "architectures": ["80-real", "90-real"],
        "driver": {"version": "580.65.06", "cuda": "13.0"},
        "devices": [{"name": "H100", "capability": "9.0", "has_code": True}],
    },
    "features": {"compiled_train_step": {"needs_torch": ">=2.11", "available": True}},
    "extras": {"hf": {"peft": {"needs": "<0.22,>=0.21", "found": "0.21.2", "problem": None}}},
}


def gpu(name: str, capability: str) -> dict[str, Any]:
    return {"name": name, "capability": capability, "has_code": False}


CASES: dict[str, tuple[dict[tuple[str, str], Any], str]] = {
    "an instruction set by choice": (
        {("cpu", "isa"): "avx2"},
        "CPU kernels: BNBOPS_ISA chose avx2; without it they use amx, which is faster",
    ),
    "an older processor": (
        {("cpu", "available"): ["baseline", "avx2"], ("cpu", "isa"): "avx2"},
        "CPU kernels for avx512, amx: this processor or its system lacks them",
    ),
    "another processor": (
        {("cpu", "available"): ["baseline"], ("cpu", "isa"): "baseline", ("cpu", "processor"): "aarch64"},
        "CPU kernels for avx2, avx512, amx: they are for x86-64, this is aarch64",
    ),
    "torch without CUDA": (
        {("torch", "cuda"): None, ("cuda", "problem"): "this torch has no CUDA"},
        "CUDA kernels: this torch has no CUDA: install one that has (https://pytorch.org/get-started)",
    ),
    "no kernels": ({("cuda", "problem"): NO_CUDA_KERNELS}, f"CUDA kernels: {NO_CUDA_KERNELS}"),
    "no driver": (
        {("cuda", "driver"): None, ("cuda", "devices"): []},
        "CUDA kernels: there is no NVIDIA driver: install it where there is a GPU",
    ),
    "an old driver": (
        {("cuda", "driver"): {"version": "550.54", "cuda": "12.4"}, ("cuda", "devices"): []},
        "CUDA kernels: the NVIDIA driver runs CUDA 12.4 at most, and CUDA 13.0.88 built bnbops: "
        "update the driver, or reinstall bnbops with an older nvcc",
    ),
    "no GPU": (
        {("cuda", "devices"): []},
        "CUDA kernels: torch sees no GPU: `nvidia-smi` and CUDA_VISIBLE_DEVICES tell which there are",
    ),
    "a GPU without code": (
        {("cuda", "devices"): [gpu("B200", "10.0")]},
        "CUDA kernels on GPU 0 (B200, compute capability 10.0): this build has code for 8.0, 9.0: reinstall bnbops "
        "with `pip install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native`",
    ),
    "a GPU that is too old": (
        {("cuda", "devices"): [gpu("T4", "7.5")]},
        "CUDA kernels on GPU 0 (T4, compute capability 7.5): bnbops needs 8.0 (Ampere) or later",
    ),
    "an older torch": (
        {
            ("torch", "version"): "2.10.0",
            ("features", "compiled_train_step"): {"needs_torch": ">=2.11", "available": False},
        },
        "compiled_train_step: needs torch>=2.11, this is 2.10.0: pip install 'torch>=2.11'",
    ),
    "an extra": (
        {("extras", "hf"): {"peft": {"needs": "<0.22,>=0.21", "problem": "found 0.19.1"},
                            "trl": {"needs": ">=1.16", "problem": "which is not installed"}}},
        "Hugging Face's libraries: peft<0.22,>=0.21 (found 0.19.1), trl>=1.16 (which is not installed): "
        "pip install 'bnbops[hf]'",
    ),
}  # fmt: skip


def test_nothing_is_missing():
    assert report.missing(ALL_THERE) == []


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing(case):
    changes, sentence = CASES[case]
    found = copy.deepcopy(ALL_THERE)
    for (group, name), value in changes.items():
        found[group][name] = value
    assert report.missing(found) == [sentence]


def test_a_driver_of_the_toolkits_version_will_do():
    """A later minor version of the toolkit's runs on it, too."""
    found = copy.deepcopy(ALL_THERE)
    found["cuda"]["toolkit"] = "13.2.40"
    assert report.missing(found) == []


def test_this_machine(monkeypatch):
    found = report.collect()
    assert found["torch"]["version"] == torch.__version__ and found["torch"]["needs"] == f">={versions.OLDEST_TORCH}"
    assert found["cpu"]["isa"] in found["cpu"]["available"]
    assert found["extras"]["hf"].keys() >= {"transformers", "peft", "accelerate", "safetensors"}
    assert found["features"].keys() == versions.FEATURES.keys()
    monkeypatch.setattr(versions, "version", lambda package: "0.1")
    assert any("transformers<6,>=5.23 (found 0.1)" in sentence for sentence in report.collect()["missing"])


@pytest.mark.parametrize(
    ("content", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC", "550.54.14"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
    ],
)
def test_driver(content, version, tmp_path, monkeypatch):
    """The kernel's part is there, and the library that tells of CUDA is not, as in a container without it."""
    monkeypatch.setattr(report, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(report.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert report.driver() is None
    (tmp_path / "version").write_text(content)
    assert report.driver() == {"version": version, "cuda": None}
