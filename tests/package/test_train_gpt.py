"""examples/train_gpt.py at tiny scale: its report, bit-exact resuming, and what it says to bad arguments."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python looks when it runs the script
train_gpt = importlib.import_module("train_gpt")
text_data = importlib.import_module("text_data")

pytestmark = pytest.mark.usefixtures("restore_determinism")

# Small, but with tensors of both kinds: 8-bit states for the matrices, 32-bit ones for norms and positions.
TINY = ["--vocabulary=300", "--layers=1", "--width=64", "--heads=2", "--block-size=16", "--batch-size=2", "--steps=8"]
EAGER = ["--no-compile"]
COMPILED = ["--backend", "aot_eager"]
INDUCTOR = ["--backend", "inductor"]


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value of a checkpoint with its place; wall-clock times, which differ, left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        yield path, value
    elif not path.endswith("step_seconds"):
        for key, item in items:
            yield from leaves(item, f"{path}/{key}")


def assert_same_bytes(left: Path, right: Path) -> None:
    ours, theirs = (dict(leaves(torch.load(path, weights_only=True))) for path in (left, right))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        same = torch.equal(value, theirs[path]) if isinstance(value, torch.Tensor) else value == theirs[path]
        assert same, path


@pytest.mark.parametrize("mode", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_both_optimizers_side_by_side(book: Path, mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    baseline, ours = train_gpt.main([*TINY, *mode, "--data=book.txt", "--steps=60", "--lr=3e-3", "--out=out"])

    assert tree(book.parent) == {"book.txt", "out", "out/loss.png", "out/history.json", "out/table.txt"}
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads(Path("out/history.json").read_text())
    assert list(runs) == ["torch-adamw", "adamw8bit"]
    for run in runs.values():
        assert len(run["history"]["train_loss"]) == 60
        assert run["history"]["validation_loss"][-1][0] == 60
        assert run["history"]["train_loss"][-1] < 0.8 * run["history"]["train_loss"][0]
    assert Path("out/table.txt").read_text() in capsys.readouterr().out

    assert baseline.history.train_loss[0] == ours.history.train_loss[0]  # same weights, same batch
    assert ours.validation_loss == pytest.approx(baseline.validation_loss, rel=0.01)
    assert ours.state_bytes < 0.3 * baseline.state_bytes
    assert (baseline.graphs, ours.graphs) == (("eager", "eager") if mode == EAGER else ("1 + eager step", "1"))


def test_table_is_aligned(book: Path) -> None:
    results = train_gpt.main([*TINY, *EAGER, "--data", "book.txt"])
    lines = train_gpt.table(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["torch-adamw", "adamw8bit"]
    state_row = next(line for line in lines if line.startswith("optimizer state"))
    assert state_row.endswith(f"  {results[1].state_bytes:,}")


@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [
        *((name, EAGER) for name in train_gpt.OPTIMIZERS),
        ("torch-adamw", COMPILED),
        ("adamw8bit", COMPILED),
        ("adamw8bit", INDUCTOR),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1].lstrip("-"),
)
def test_resumed_run_repeats_the_uninterrupted_one(book: Path, optimizer: str, mode: list[str]) -> None:
    arguments = [*TINY, *mode, "--data", "book.txt", "--save-every", "5", "--optimizer", optimizer]
    (whole,) = train_gpt.main([*arguments, "--out", "whole"])
    (resumed,) = train_gpt.main([*arguments, "--out", "resumed", "--resume", f"whole/{optimizer}-5.pt"])

    assert resumed.history.train_loss == whole.history.train_loss
    assert resumed.history.validation_loss == whole.history.validation_loss
    assert resumed.sample == whole.sample
    assert_same_bytes(Path(f"whole/{optimizer}-8.pt"), Path(f"resumed/{optimizer}-8.pt"))
    assert f"resumed/{optimizer}-5.pt" not in tree(book.parent)


def test_bfloat16_resumes_too_and_the_checkpoint_names_the_optimizer(book: Path) -> None:
    arguments = [*TINY, *EAGER, "--data", "book.txt", "--save-every", "5", "--dtype", "bfloat16"]
    train_gpt.main([*arguments, "--out", "whole", "--optimizer", "adamw8bit"])
    train_gpt.main([*arguments, "--out", "resumed", "--resume", "whole/adamw8bit-5.pt"])
    assert_same_bytes(Path("whole/adamw8bit-8.pt"), Path("resumed/adamw8bit-8.pt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "no such file or folder: missing.txt"),
        (["--data", "short.txt"], "too little text in short.txt: 5 tokens to train on and 3 to validate on"),
        (["--data", "empty"], "too little text in empty: 0 tokens to train on"),
        (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
        (["--steps", "0"], "argument --steps: '0' is not a positive whole number"),
        (["--lr", "nan"], "argument --lr: 'nan' is not a positive number"),
        (["--backend", "nonsense"], "argument --backend: invalid choice: 'nonsense'"),
        (["--heads", "3"], "--width 64 is not a multiple of --heads 3"),
        (["--resume", "missing.pt"], "no such checkpoint: missing.pt"),
        (["--resume", "book.txt"], "book.txt is not a checkpoint"),
        (["--resume", "other.pt"], "other.pt is not a checkpoint of this script"),
        (["--out", "book.txt"], "File exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "refused",
)
def test_bad_arguments(book: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.txt").write_text("thirty bytes are not enough...")
    Path("empty").mkdir()
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    assert_refused([*TINY, *EAGER, "--data", "book.txt", *arguments], message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0.5"], "is of another configuration: lr 0.0005 is now 0.5"),
        (["--width", "32"], "is of another configuration: width 64 is now 32"),
        (["--optimizer", "torch-adamw"], "is of another configuration: optimizer adamw8bit is now torch-adamw"),
        (["--data", "other.txt"], "is of another configuration: data "),
        (["--resume", "run/adamw8bit-8.pt"], "is of a run that finished its 8 steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "refused",
)
def test_checkpoint_of_another_run(
    book: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*TINY, *EAGER, "--data", "book.txt"]
    train_gpt.main([*run, "--optimizer", "adamw8bit", "--save-every", "5", "--out", "run"])
    Path("other.txt").write_text(book.read_text().replace("beer", "wine"))
    assert_refused([*run, "--resume", "run/adamw8bit-5.pt", *arguments], message, capsys)


def assert_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line on stderr, and nothing written."""
    before = tree(Path())
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train_gpt.main(arguments)
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out
    assert tree(Path()) == before


def test_runs_as_a_script(book: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_gpt.py"), *TINY, *EAGER, "--data", "book.txt", "--threads", "1"]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "validation loss" in good.stdout
    assert "Warning" not in good.stderr
    bad = subprocess.run([*command, "--optimizer", "sgd"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")


def test_divergence_is_reported(book: Path) -> None:
    with pytest.raises(SystemExit, match="torch-adamw diverged at step"):
        train_gpt.main([*TINY, *EAGER, "--data", "book.txt", "--lr", "1e30"])


def test_files_are_held_out_whole(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index:02}.txt").write_text(f"{chr(ord('a') + index)} " * 50)
    (tmp_path / "picture.bin").write_bytes(b"\xff\x00" * 50)
    text = text_data.load_text(tmp_path, vocabulary_size=256, block_size=8)
    held_out, trained_on = (set(text.vocabulary.decode(split).split()) for split in (text.validation, text.train))
    assert held_out == {"j", "t"}
    assert trained_on == set("abcdefghijklmnopqrst") - held_out


def test_the_default_text_is_the_standard_library() -> None:
    text = text_data.load_text(None, vocabulary_size=512, block_size=128)
    assert min(len(text.train), len(text.validation)) > 100_000
    assert "import os" in text.vocabulary.decode(text.train)


def test_words_are_tokens_and_nothing_is_unknown() -> None:
    vocabulary = text_data.Vocabulary(b"the cat and the dog and the cat", size=259)
    assert vocabulary.pieces[256:] == [b" and", b" cat", b" the"]
    unseen = "the zebra, \u00e9l\u00e9gant,\n and the cat"
    tokens = vocabulary.encode(unseen.encode())
    assert len(tokens) < len(unseen.encode())
    assert vocabulary.decode(tokens) == unseen


def test_batches_are_a_function_of_seed_and_step(book: Path) -> None:
    text = text_data.load_text(book, vocabulary_size=300, block_size=16)
    inputs, targets = text.batch("train", seed=1, step=7, batch_size=4, block_size=16)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, text.batch("train", seed=1, step=7, batch_size=4, block_size=16)[0])
    assert not torch.equal(inputs, text.batch("train", seed=1, step=8, batch_size=4, block_size=16)[0])
    assert not torch.equal(inputs, text.batch("train", seed=2, step=7, batch_size=4, block_size=16)[0])
