"""The examples for Hugging Face's libraries, at tiny sizes."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--base-steps", "2", "--base-width", "64", "--tokens", "4"]


@pytest.fixture(scope="module")
def load_4bit_generate() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))  # where Python looks when it runs the script
    return importlib.import_module("load_4bit_generate")


def sizes(out: str) -> list[int]:
    """Bytes of the models that were loaded."""
    return [int(found.replace(",", "")) for found in re.findall(r"^loaded .*: ([\d,]+) bytes,", out, re.MULTILINE)]


def test_load_4bit_generate(load_4bit_generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_4bit_generate.main([*TINY, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.endswith("the reloaded model generates the same tokens\n") and out.count("generated 4 tokens") == 2
    four, again = sizes(out)
    load_4bit_generate.main([*TINY, "--out", str(tmp_path), "--model", str(tmp_path / "base"), "--quant", "int8"])
    eight, _ = sizes(capsys.readouterr().out)
    layers, rows, weights = 28, 4 * (2 * 64 + 2 * 32 + 2 * 128 + 64), 4 * 64 * (2 * 64 + 2 * 32 + 3 * 128)
    nested = layers * 4 * (256 + 2)  # a codebook, a scale and an offset for the scales of each layer
    assert four == again and eight - four == weights + 4 * rows - (weights // 2 + weights // 64 + nested)


def test_a_folder_without_a_model(
    load_4bit_generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_4bit_generate.main(["--model", str(tmp_path)])
    assert capsys.readouterr().err.endswith(f"error: no model in {tmp_path}\n")


def test_a_reloaded_model_that_differs_is_an_error(
    load_4bit_generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((4, 5))
    generate = load_4bit_generate.generate
    monkeypatch.setattr(
        load_4bit_generate,
        "generate",
        lambda model, tokenizer, prompt, _: generate(model, tokenizer, prompt, next(counts)),
    )
    with pytest.raises(SystemExit, match="generates other tokens"):
        load_4bit_generate.main([*TINY, "--out", str(tmp_path)])


def test_qlora_sft(tmp_path: Path) -> None:
    """In a process of its own, as bnbops takes bitsandbytes' name there for good."""
    options = ["--steps", "3", "--block-size", "32", "--eval-windows", "8", "--lr", "1e-2", "--out", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "qlora_sft.py"), *TINY, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr

    def figure(label: str) -> float:
        return float(re.search(rf"^{label}\s+([\d.,]+)", done.stdout, re.MULTILINE)[1].replace(",", ""))

    assert figure("validation loss after") < figure("validation loss before")
    linear = [(64, 64)] * 2 + [(64, 32)] * 2 + [(64, 128)] * 3
    assert figure("trained parameters, bytes") == 2 * 4 * 16 * sum(a + b for a, b in linear)  # TRL trains them in bf16
    weights, embeddings = 4 * sum(a * b for a, b in linear), 2 * 2 * 2048 * 64
    assert weights / 2 < figure("frozen weights, bytes") - embeddings < weights * 0.6
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    assert "the merged model continues 'The '" in done.stdout
