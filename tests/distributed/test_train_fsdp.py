"""examples/train_fsdp.py at tiny scale: runs that any number of processes continues, and what it says to bad calls."""

import importlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from cases.ranks import run_on_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python looks when it runs the script
demo_fsdp = importlib.import_module("demo_fsdp")
train_fsdp = importlib.import_module("train_fsdp")

pytestmark = pytest.mark.usefixtures("restore_determinism")

# Small, but with tensors of both kinds, 8-bit states and 32-bit ones; 301 rows are not even on any number of ranks.
MODEL = ["--vocabulary=301", "--layers=1", "--width=64", "--heads=2", "--block-size=16", "--batch-size=4"]
TINY = [*MODEL, "--data=book.txt", "--steps=8"]
NEAR = 1e-5  # nats; those of the same number of processes are equal


def train(folder: str, *options: str) -> dict[str, Any]:
    """On the ranks that call it."""
    os.chdir(folder)
    return asdict(train_fsdp.run([*TINY, *options]))


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# -------------------------------------------------------------------------------------------------------------- resumed


def test_torchrun_with_2_processes_then_4(book: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = demo_fsdp.torchrun(2, Path("whole"), *TINY, "--save-every=4")
    output = capfd.readouterr()
    resumed = demo_fsdp.torchrun(4, Path("resumed"), *TINY, "--resume=whole/step-4")

    assert len(whole["losses"]) == len(resumed["losses"]) == 8
    assert (whole["resumed_at"], resumed["resumed_at"]) == (0, 4)
    assert whole["losses"][-1] < 0.95 * whole["losses"][0]
    assert resumed["losses"][:4] == whole["losses"][:4]
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=NEAR)
    assert "2 x cpu, fsdp2: loss" in output.out
    assert output.err.count("0/8 [00:00<?, ?step/s]") == 1 and "8/8" in output.err  # one progress bar
    assert "Error" not in output.err


def resumed_in_every_mode(folder: str) -> None:
    runs = {}
    for mode in train_fsdp.MODES:
        options = [f"--mode={mode}", "--backend=eager"]
        runs[mode] = train(folder, *options, "--save-every=5", f"--out={mode}")
        resumed = train(folder, *options, f"--resume={mode}/step-5", "--out=resumed")
        assert resumed["resumed_at"] == 5
        assert resumed["losses"] == runs[mode]["losses"], mode
    crossed = train(folder, "--mode=fsdp2", "--resume=data_parallel/step-5", "--out=resumed")
    for run in (*runs.values(), crossed):
        assert run["losses"] == pytest.approx(runs["ddp"]["losses"], abs=NEAR)
    assert runs["fsdp2"]["state_bytes"] == runs["data_parallel"]["state_bytes"]
    assert sum(runs["fsdp2"]["state_bytes"]) == pytest.approx(runs["ddp"]["state_bytes"][0], rel=0.01)
    assert runs["ddp"]["adamw_bytes"][0] > 3.5 * runs["ddp"]["state_bytes"][0]


def test_every_mode_resumes_bit_for_bit(book: Path) -> None:
    run_on_ranks(2, resumed_in_every_mode, str(book.parent))


def test_demo(book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs: dict[int, dict[str, Any]] = {}

    def torchrun(ranks: int, out: Path, *options: str) -> dict[str, Any]:
        """The script's, on processes that start sooner."""
        runs[ranks] = run_on_ranks(ranks, train, str(book.parent), *options, f"--out={out}")[0]
        return runs[ranks]

    monkeypatch.setattr(demo_fsdp, "torchrun", torchrun)
    arguments = [*MODEL, "--data=book.txt", "--optimizer=Lion8bit", "--steps=6", "--resume-at=4", "--out=out"]
    demo_fsdp.main(arguments)
    report = Path("out/table.txt").read_text()
    assert report in capsys.readouterr().out
    losses, states, _ = report.split("\n\n")
    assert [line.split()[0] for line in losses.splitlines()[2:]] == ["2", "3", "4", "5", "6"]
    assert [len(line.split()) for line in losses.splitlines()[2:]] == [2, 2, 2, 6, 6]
    label, *cells = states.splitlines()[3].split()
    one, two, four = (int(cell.replace(",", "")) for cell in cells)
    assert label == "Lion8bit"
    assert two == pytest.approx(one / 2, rel=0.02) and four == pytest.approx(one / 4, rel=0.03)

    runs[4]["losses"][-1] += 2e-4
    monkeypatch.setattr(demo_fsdp, "torchrun", lambda ranks, *_: runs[ranks])
    with pytest.raises(SystemExit, match="do not continue the uninterrupted one"):
        demo_fsdp.main(arguments)
    with pytest.raises(SystemExit) as exit_:
        demo_fsdp.main([*arguments, "--resume-at=6"])
    assert exit_.value.code == 2


@contextmanager
def disk_full_at(step: str) -> Iterator[None]:
    """Saving this step's checkpoint fails before the last file, and ends the script."""
    finish = FileSystemWriter.finish

    def full(self: FileSystemWriter, *args: Any, **options: Any) -> None:
        if step in str(self.path):
            raise OSError("No space left on device")
        finish(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(FileSystemWriter, "finish", full)
        yield


def test_an_interrupted_save_costs_nothing(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train_fsdp.main([*TINY, "--save-every=3", "--out=whole"])
    assert names("whole") == {"step-6", "step-8", "history.json"}  # the last two
    with disk_full_at("step-6"):
        train_fsdp.main([*TINY, "--save-every=2", "--out=run"])
    assert "No space left on device" in capsys.readouterr().err
    assert {"step-2", "step-4"} <= names("run") and "step-6" not in names("run")
    resumed = train_fsdp.main([*TINY, "--resume=run", "--save-every=2", "--out=run"])
    assert resumed.resumed_at == 4
    assert resumed.losses == whole.losses
    assert names("run") == {"step-6", "step-8", "history.json"}


def test_checkpoints_of_a_run_that_got_further_do_not_count(book: Path) -> None:
    train_fsdp.main([*TINY, "--save-every=6", "--out=run"])
    with disk_full_at("step-8"):
        train_fsdp.main([*TINY, "--resume=run/step-6", "--save-every=1", "--keep=1", "--out=run"])
    assert {"step-7", "step-8"} <= names("run") and "step-6" not in names("run")


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=missing.txt"], "no such file or folder: missing.txt"),
        (["--mode=magic"], "argument --mode: invalid choice: 'magic'"),
        (["--optimizer=GlobalOptimManager"], "argument --optimizer: invalid choice: 'GlobalOptimManager'"),
        (["--heads=3"], "--width 64 is not a multiple of --heads 3"),
        (["--resume=missing"], "'missing' is no checkpoint"),
        (["--resume=book.txt"], "book.txt"),
        (["--out=book.txt"], "File exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "refused",
)
def test_bad_arguments(book: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused([*TINY, "--out=.", *arguments], message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr=0.5"], "is of another configuration: lr 0.0005 is now 0.5"),
        (["--width=32"], "run/step-5 is of another configuration: 'token_embedding.weight' was saved with shape"),
        (["--layers=2"], "run/step-5 is of another configuration: the checkpoint is not of the model"),
        (["--optimizer=Adam8bit"], "is of another configuration: optimizer AdamW8bit is now Adam8bit"),
        (["--optimizer=AdamW32bit"], "run/step-5 is of another configuration: "),
        (["--data=other.txt"], "is of another configuration: data "),
        (["--batch-size=2"], "is of another configuration: batch_size 4 is now 2"),
        (["--resume=run"], "run/step-8 is of a run that finished its 8 steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "refused",
)
def test_checkpoint_of_another_run(
    saved: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(saved)
    assert_refused([*TINY, "--out=.", "--resume=run/step-5", *arguments], message, capsys)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its text and another one."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "book.txt").write_text("one for the money, two for the show, three to get ready\n" * 50)
    (folder / "other.txt").write_text("two for the money, one for the show, three to get ready\n" * 50)
    options = [*TINY, f"--data={folder}/book.txt", f"--out={folder}/run", "--save-every=5"]
    train_fsdp.main(options)
    return folder


def assert_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line on stderr, and nothing written."""
    before = set(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train_fsdp.main(arguments)
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("train_fsdp.py: error: ")
    assert output.err.count("\n") == 1
    assert not output.out
    assert set(Path().rglob("*")) == before


def refused_everywhere(folder: str) -> list[tuple[int, str]]:
    """This rank's exit codes and what it says; one of the texts is there for rank 0 only."""
    said = []
    for options in (["--batch-size=3"], [f"--data=text-{train_fsdp.rank()}.txt"], ["--resume=missing"], ["--lr=1e30"]):
        with redirect_stderr(io.StringIO()) as output, pytest.raises(SystemExit) as exit_:
            train(folder, *options)
        said.append((exit_.value.code, output.getvalue()))
    return said


def test_all_ranks_end_and_one_says_why(book: Path) -> None:
    book.with_name("text-0.txt").write_text(book.read_text())
    first, second = run_on_ranks(2, refused_everywhere, str(book.parent))
    assert second == [(2, ""), (2, ""), (2, ""), (1, "")]
    assert [code for code, _ in first] == [2, 2, 2, 1]
    batch, data, resume, lr = (output for _, output in first)
    assert "--batch-size 3 cannot be split evenly among 2 processes; make it a multiple" in batch
    assert "no such file or folder: text-1.txt" in data
    assert "'missing' is no checkpoint" in resume
    assert "AdamW8bit diverged at step" in lr
