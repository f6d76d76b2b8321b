"""Quantized models that Transformers saved and loads again, with bnbops as bitsandbytes and with bitsandbytes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cases.hf import saved, tiny_llama, token_batch
from cases.hf_reference import CASES, FAMILIES, config, quantized

pytestmark = pytest.mark.usefixtures("as_bitsandbytes")
load = AutoModelForCausalLM.from_pretrained
SHARD = "60KB"
GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = {"llama": ("nf4_dq", "fp4_bf16storage", "int8"), "gpt2": ("nf4", "int8")}
golden_folders = pytest.mark.parametrize(
    "folder", [f"huggingface_{model}/{name}" for model, names in FOLDERS.items() for name in names]
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text()) | {"transformers_version": None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_saved_and_loaded(tmp_path, family, case):
    """The same logits, bit for bit; and what was loaded is saved as the same files, byte for byte."""
    original = saved(FAMILIES[family](), tmp_path / "original")
    model = load(original, quantization_config=config(case), dtype=CASES[case][1])
    expected = model(token_batch()).logits
    model.save_pretrained(tmp_path / "first", max_shard_size=SHARD)
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 1

    again = load(tmp_path / "first")
    assert quantized(again).keys() == quantized(model).keys() and again.dtype == model.dtype
    assert torch.equal(again(token_batch()).logits, expected)
    again.save_pretrained(tmp_path / "second", max_shard_size=SHARD)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


@golden_folders
@torch.no_grad()
def test_what_bitsandbytes_saved(tmp_path, folder):
    """Loads, gives bitsandbytes' logits but for the roundings of bf16, and is saved as it was."""
    model = load(GOLDEN / folder)
    logits = load_file(GOLDEN / folder / ".." / "logits.safetensors")
    expected = logits[f"out.{Path(folder).name}"].float()
    assert (model(logits["in.tokens"]).logits.float() - expected).norm() < 0.02 * expected.norm()
    model.save_pretrained(tmp_path)
    assert contents(tmp_path)["model.safetensors"] == contents(GOLDEN / folder)["model.safetensors"]
    assert settings(tmp_path) == settings(GOLDEN / folder)


@golden_folders
def test_what_bitsandbytes_would_save(tmp_path, folder):
    """A float model, quantized and saved: bitsandbytes' file, but for codes of scales (golden/README.md tells why)."""
    options = BitsAndBytesConfig.from_dict(settings(GOLDEN / folder)["quantization_config"])
    load(GOLDEN / folder / ".." / "float", quantization_config=options).save_pretrained(tmp_path)
    assert settings(tmp_path) == settings(GOLDEN / folder)
    if not options.bnb_4bit_use_double_quant:
        assert contents(tmp_path)["model.safetensors"] == contents(GOLDEN / folder)["model.safetensors"]
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path, GOLDEN / folder))
    assert list(found) == list(expected)
    differ = [
        name for name in found if not torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8))
    ]
    assert all(name.endswith("weight.absmax") for name in differ)
    for name in differ:
        assert ((found[name].int() - expected[name].int()).abs() <= 1).all() and found[name].dtype == torch.uint8


@pytest.mark.parametrize("case", ("nf4", "int8"))
@torch.no_grad()
def test_a_trained_model_is_saved_as_it_is(tmp_path, case):
    """Forwards, in both modes, and steps of what is not quantized leave the quantized weights' bytes alone."""
    model = load(saved(tiny_llama(), tmp_path / "original"), quantization_config=config(case))
    model.save_pretrained(tmp_path / "before")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.enable_grad():
        for mode in (True, False):
            model.train(mode)(token_batch(), labels=token_batch()).loss.backward()
            optimizer.step()
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert before.keys() == after.keys() and trained
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in trained), name


def test_moved_folder_and_explicit_config(tmp_path):
    """What is saved holds no paths, and a config that is given to a quantized checkpoint does not requantize it."""
    model = load(saved(tiny_llama(), tmp_path / "original"), quantization_config=config("nf4"))
    model.save_pretrained(tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "second")
    again = load(tmp_path / "second", quantization_config=config("int8"))
    assert torch.equal(again(token_batch()).logits, model(token_batch()).logits)
