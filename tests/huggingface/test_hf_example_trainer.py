"""examples/trainer_adamw8bit.py at tiny scale."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

from bnbops.integrations.transformers import CompiledTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # where Python looks when it runs the script
example = importlib.import_module("trainer_adamw8bit")

TINY = ["--vocabulary=300", "--layers=1", "--width=64", "--heads=2", "--block-size=16", "--batch-size=2", "--steps=8"]


@pytest.fixture(autouse=True)
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("".join(f"the number {n} follows the number {n - 1}, " for n in range(1, 400)))


def test_it_learns_with_an_eighth_of_the_states(capsys: pytest.CaptureFixture[str]) -> None:
    result = example.main([*TINY, "--data=book.txt", "--lr=1e-2", "--out=out", "--accumulate=2"])
    assert type(result.trainer) is Trainer
    assert result.loss_after < 0.8 * result.loss_before
    assert result.state_bytes < 0.5 * result.torch_state_bytes  # the embedding, a third of the weights, has 32 bits
    out = capsys.readouterr().out
    for shown in (f"{result.loss_after:.3f}", f"{result.state_bytes:,}", f"{result.torch_state_bytes:,}", "eager"):
        assert shown in out

    saved = LlamaForCausalLM.from_pretrained("out/model").state_dict()
    for name, weight in result.trainer.model.state_dict().items():
        assert torch.equal(saved[name], weight), name


def test_compiled_it_is_one_graph() -> None:
    result = example.main([*TINY, "--data=book.txt", "--steps=2", "--out=out", "--compile", "--backend=eager"])
    assert type(result.trainer) is CompiledTrainer
    assert result.trainer.compiled_step.graph_count == 1
    embedding = result.trainer.model.model.embed_tokens.weight
    assert result.trainer.optimizer.state[embedding]["exp_avg"].dtype == torch.float32


def test_bad_arguments_say_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main([*TINY, "--data=missing.txt"])
    assert "error: no such file or folder: missing.txt" in capsys.readouterr().err
