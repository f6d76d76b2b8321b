"""examples/quantize_encoder.py: a real sentence encoder keeps the direction of its vectors."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))  # where Python looks when it runs the script
    return importlib.import_module("quantize_encoder")


@pytest.fixture(scope="module")
def results(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out, threads = tmp_path_factory.mktemp("encoder"), torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {run.name: run for run in example.main(["--out", str(out)])}
    torch.set_num_threads(threads)
    assert (out / "encoder.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.txt").read_text() == example.table(list(runs.values())) + "\n"
    return runs


def test_the_encoder_is_the_published_one(example: ModuleType) -> None:
    """The vectors of sentence-transformers 6.2.0 for the same weights."""
    folder = example.get_model_path()
    sentences = ["That is a happy person", "Quantization error grows with the block size."]
    vectors = example.encode(example.load(folder, "fp32"), example.tokenizer_of(folder), sentences)
    expected = torch.tensor(
        [
            [-0.03387696, 0.09194168, 0.04870135, -0.03488358, -0.06482918, -0.02668578],
            [-0.03209796, 0.01572496, 0.03989805, -0.01310666, 0.00603242, -0.04312034],
        ]
    )
    assert vectors.shape == (2, 384)
    torch.testing.assert_close(vectors[:, :6], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_sentences_are_sentences(example: ModuleType) -> None:
    sentences = example.reference_sentences()
    assert len(set(sentences)) == 200
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("int8", 0.999),
        ("int8, embeddings too", 0.999),
        ("NF4", 0.97),  # bitsandbytes' NF4 of the same weights gives 0.973, too
        ("NF4, last layer int8", 0.98),
        ("NF4, embeddings too", 0.965),
    ],
)
def test_vectors_keep_their_direction(results: dict, name: str, mean: float) -> None:
    cosines = results[name].cosines
    assert len(cosines) == 200
    assert mean <= cosines.mean() < 0.99999
    assert cosines.min() > 0.9


def test_bytes(results: dict) -> None:
    whole = results["fp32"].bytes
    linear = 4 * 384 * (6 * (4 * 384 + 2 * 1536) + 384)
    assert results["int8"].bytes == pytest.approx(whole - linear * 3 / 4, rel=0.01)
    assert results["NF4"].bytes == pytest.approx(whole - linear * 7 / 8, rel=0.01)
    assert results["NF4, embeddings too"].bytes < 0.14 * whole


def test_sentences_of_a_file(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("A cat sleeps.\n\nA dog barks at it.\n")
    runs = example.main(["--sentences", str(tmp_path / "mine.txt"), "--out", str(tmp_path)])
    assert [len(run.cosines) for run in runs] == [2] * len(example.VARIANTS)
    (tmp_path / "mine.txt").write_text("\n")
    for path, message in (("mine.txt", "no sentences in"), ("missing.txt", "No such file")):
        with pytest.raises(SystemExit):
            example.main(["--sentences", str(tmp_path / path), "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
