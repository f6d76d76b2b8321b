"""examples/qlora_gpt.py at tiny scale: its report, one graph a step, and what trains."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python looks when it runs the script
qlora_gpt = importlib.import_module("qlora_gpt")
train_gpt = importlib.import_module("train_gpt")

pytestmark = pytest.mark.usefixtures("restore_determinism")

BASE = ["--vocabulary=300", "--layers=1", "--width=64", "--heads=2", "--block-size=16", "--batch-size=4", "--lr=3e-3"]
EAGER = ["--no-compile"]
COMPILED = ["--backend", "aot_eager"]


def song(what: str, line: str) -> str:
    return "".join(line.format(n=n, what=what) for n in range(99))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that knows one song; that one and another lie beside it."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "beer.txt").write_text(
        song("beer", "{n} bottles of {what} on the wall, take one down, pass it around.\n")
    )
    (folder / "wine.txt").write_text(song("wine", "take {n} glasses of {what} around the wall and pass one on down.\n"))
    options, threads = ["--steps=60", "--save-every=60", "--optimizer=adamw8bit"], torch.get_num_threads()
    torch.set_num_threads(1)
    train_gpt.main([*BASE, *EAGER, *options, f"--data={folder / 'beer.txt'}", f"--out={folder}"])
    torch.set_num_threads(threads)
    return folder / "adamw8bit-60.pt"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the checkpoint, which lies in the working directory with the songs."""
    monkeypatch.chdir(tmp_path)
    for name in ("beer.txt", "wine.txt", trained.name):
        shutil.copy(trained.with_name(name), name)
    return trained.name


@pytest.mark.parametrize("mode", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_both_runs_side_by_side(checkpoint: str, mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = ["--base-data=beer.txt", "--data=wine.txt", "--steps=40", "--lr=1e-2", "--dense-lr=3e-3", "--out=out"]
    dense, qlora = qlora_gpt.main(["--checkpoint", checkpoint, *options, *mode])

    for run in (dense, qlora):
        assert len(run.train_loss) == 40
        assert run.validation_after < 0.8 * run.validation_before
    assert qlora.validation_before == pytest.approx(dense.validation_before, rel=0.05)
    assert qlora.train_loss[0] == pytest.approx(dense.train_loss[0], rel=0.05)

    parameters = sum(tensor.nbytes for tensor in train_gpt.load(Path(checkpoint))["model"].values())
    assert (dense.weights, dense.trained) == (0, parameters)
    assert qlora.trained == 4 * 16 * (2 * 64 + (64 + 3 * 64) + 2 * (64 + 4 * 64))
    assert qlora.weights < 0.55 * parameters  # most are embeddings at this size
    assert (dense.graphs, qlora.graphs) == (("eager", "eager") if mode == EAGER else ("1 + eager step", "1"))

    assert Path("out/table.txt").read_text() in capsys.readouterr().out
    adapters = torch.load("out/adapters.pt", weights_only=True)
    assert sum(tensor.nbytes for tensor in adapters.values()) == qlora.trained


def test_only_adapters_train(checkpoint: str) -> None:
    args = qlora_gpt.parser().parse_args([])
    saved = train_gpt.load(Path(checkpoint))
    model = qlora_gpt.GPT(
        len(saved["model"]["token_embedding.weight"]), **{key: saved["config"][key] for key in train_gpt.SHAPE}
    )
    model.load_state_dict(saved["model"])
    tokens = torch.arange(16)[None]
    model, optimizer = qlora_gpt.qlora(model, args)
    with torch.no_grad():
        start = model(tokens)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.loss(tokens, tokens).backward()
    optimizer.step()

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith((".up", ".down"))}
    for module in [module for module in model.modules() if isinstance(module, qlora_gpt.LoRA)]:
        module.up.data.zero_()
    with torch.no_grad():
        assert torch.equal(model(tokens), start)


def test_trains_a_base_where_none_is_given(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(arguments: list[str]) -> None:
        asked.extend(arguments)
        Path("out").mkdir()
        Path(checkpoint).rename("out/adamw8bit-7.pt")

    asked: list[str] = []
    monkeypatch.setattr(train_gpt, "main", main)
    options = ["--base-data=beer.txt", "--data=wine.txt", "--steps=1", "--base-steps=7", "--out=out", *EAGER]
    assert len(qlora_gpt.main(options)) == 2
    assert train_gpt.parser().parse_args(asked).steps == train_gpt.parser().parse_args(asked).save_every == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=missing.pt"], "no such checkpoint: missing.pt"),
        (["--checkpoint=adamw8bit-60.pt", "--base-data=wine.txt"], "was trained on other text than wine.txt"),
        (["--checkpoint=adamw8bit-60.pt", "--base-data=beer.txt", "--data=none"], "no such file or folder: none"),
        (["--rank=0"], "argument --rank: '0' is not a positive whole number"),
    ],
)
def test_bad_arguments(checkpoint: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        qlora_gpt.main([*arguments, "--out=out"])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
