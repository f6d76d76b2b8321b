"""The quantization method "bnbops": its config, and what is refused, with what is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig

from bnbops.integrations.transformers import BnbOpsConfig
from cases.hf import saved, tiny_gpt2, tiny_llama

KEY = "model.layers.0.mlp.up_proj.weight"

# ---- the config ------------------------------------------------------------------------------------------------------

CONFIGS = [
    {},
    {"quant": "fp4", "double_quant": False, "blocksize": 128, "compute_dtype": torch.bfloat16},
    {"quant_storage": "float32", "skip": ["lm_head", "layers.*.mlp"], "embeddings": True, "experts": False},
    {"quant": "int8", "threshold": 0, "skip": []},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_a_config_comes_back_from_json(options: dict, tmp_path: Path) -> None:
    config = BnbOpsConfig(**options)
    config.to_json_file(tmp_path / "config.json")
    read = json.loads((tmp_path / "config.json").read_text())
    again = AutoQuantizationConfig.from_dict(read)
    assert type(again) is BnbOpsConfig
    assert again == config
    assert vars(again) == vars(config)
    assert dict(again) == read


def test_dtypes_and_skip_in_all_forms() -> None:
    assert BnbOpsConfig(compute_dtype="torch.bfloat16") == BnbOpsConfig(compute_dtype=torch.bfloat16)
    assert BnbOpsConfig(skip="lm_head") == BnbOpsConfig(skip=("lm_head",))
    assert BnbOpsConfig() != BnbOpsConfig("fp4")


def test_update_checks_and_returns_the_rest() -> None:
    config = BnbOpsConfig()
    assert config.update(quant="int8", other=1) == {"other": 1}
    assert config.quant == "int8"
    with pytest.raises(ValueError, match="quant must be one of"):
        config.update(quant="nf5")
    assert config.quant == "int8"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant": "nf5"}, ValueError, "quant must be one of nf4, fp4, int4, int8, got 'nf5'"),
        ({"quant": "int8", "double_quant": False}, ValueError, "double_quant: not for int8"),
        ({"quant": "int8", "blocksize": 128}, ValueError, "blocksize: not for int8"),
        ({"quant": "int8", "compute_dtype": "bfloat16"}, ValueError, "compute_dtype: not for int8"),
        ({"threshold": 3.0}, ValueError, "threshold is an option of int8, not of nf4"),
        ({"quant": "int8", "threshold": -1.0}, ValueError, "threshold must not be negative"),
        ({"quant": "int8", "threshold": "6"}, TypeError, "threshold must be a number, got '6'"),
        ({"blocksize": 48}, ValueError, "blocksize"),
        ({"blocksize": 64.0}, TypeError, "blocksize must be an integer, got 64.0"),
        ({"compute_dtype": "int8"}, ValueError, "compute_dtype must be float32, bfloat16, float16 or None"),
        ({"compute_dtype": "bf16"}, ValueError, "compute_dtype must be a torch dtype or its name, got 'bf16'"),
        ({"quant_storage": "int16"}, ValueError, "storage"),
        ({"double_quant": "yes"}, TypeError, "double_quant must be True or False, got 'yes'"),
        (
            {"skip": lambda name, module: True},
            TypeError,
            "skip must be names or patterns of modules, which config.json",
        ),
        ({"skip": [3]}, TypeError, "skip must hold names or patterns of modules, got 3"),
        ({"load_in_4bit": True}, ValueError, "no option load_in_4bit; it has quant, double_quant, blocksize"),
        ({"quant_method": "gptq"}, ValueError, "is of method 'gptq', expected 'bnbops'"),
    ],
)
def test_options_that_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BnbOpsConfig(**options)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(), tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def quantized(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def folder(quant: str) -> Path:
        return saved(load(floats, quant), tmp_path_factory.mktemp(quant))

    return folder


def load(folder: Path, *args: object, device_map: object = None, **kwargs: object) -> nn.Module:
    config = {"quantization_config": BnbOpsConfig(*args, **kwargs)} if args else {}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **config)


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = folder / "model.safetensors"
    state = load_file(file)
    edit(state)
    file.unlink()
    save_file(state, file, metadata={"format": "pt"})
    return folder


def test_a_skip_that_matches_nothing(floats: Path) -> None:
    with pytest.raises(ValueError, match="skip: nothing in the model is called 'lm_haed'"):
        load(floats, "nf4", skip=["lm_haed"])


def test_nothing_to_quantize(floats: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)nothing to quantize in this LlamaForCausalLM:.*skip has 'model'"):
        load(floats, "nf4", skip=["model", "lm_head"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device_map", ["cuda", {"": 0}, {"": "cuda:0"}])
def test_a_gpu_that_is_not_there(floats: Path, device_map: object) -> None:
    with pytest.raises((ValueError, RuntimeError), match='this torch sees no GPU: pass device_map="cpu"'):
        load(floats, "nf4", device_map=device_map)


def test_a_device_without_kernels(floats: Path) -> None:
    with pytest.raises(ValueError, match="has 'xpu:0', but bnbops computes on CPUs and CUDA GPUs only"):
        load(floats, "nf4", device_map={"": "xpu:0"})


def test_the_disk(floats: Path) -> None:
    with pytest.raises(ValueError, match="puts modules on the disk, from where quantized layers cannot be computed"):
        load(floats, "nf4", device_map={"model": "cpu", "lm_head": "disk"})


def test_a_weight_with_a_nan(floats: Path, tmp_path: Path) -> None:
    folder = edited(saved(tiny_llama(), tmp_path), lambda state: state[KEY][3, 5].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"(?s)cannot be quantized \(nf4\):.*{KEY} has a value that is NaN"):
        load(folder, "nf4")


def test_a_float_weight_of_another_shape(tmp_path: Path) -> None:
    def cut(state: dict[str, torch.Tensor]) -> None:
        state[KEY] = state[KEY][:64].clone()

    folder = edited(saved(tiny_llama(), tmp_path), cut)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # Transformers', as for floats
        load(folder, "nf4")
    config = BnbOpsConfig("nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, ignore_mismatched_sizes=True)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.model.layers[0].mlp.up_proj.weight.isfinite().all()


def test_no_scales(quantized: Callable[[str], Path]) -> None:
    def drop(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.startswith(f"{KEY}.")]:
            del state[key]

    def drop_int8(state: dict[str, torch.Tensor]) -> None:
        for name in ("SCB", "weight_format"):
            del state[KEY.replace("weight", name)]

    message = rf"does not fit its quantization config \(nf4\):\n  {KEY}: there are codes .*, but no scales"
    with pytest.raises(ValueError, match=message):
        load(edited(quantized("nf4"), drop))
    with pytest.raises(ValueError, match=r"up_proj\.weight: there are codes \(torch\.int8 .*, but no scales"):
        load(edited(quantized("int8"), drop_int8))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("absmax", "there is no absmax"),
        ("quant_map", "there is no quant_map"),
        ("nested_absmax", "codes of scales, but there is no nested_absmax"),
        ("nested_quant_map", "there is no nested_quant_map"),
        (
            "quant_state.bitsandbytes__nf4",
            "it comes with absmax, .* but without quant_state.bitsandbytes__nf4 or ...fp4 or ...int4",
        ),
    ],
)
def test_one_entry_is_missing(quantized: Callable[[str], Path], entry: str, message: str) -> None:
    folder = edited(quantized("nf4"), lambda state: state.pop(f"{KEY}.{entry}"))
    with pytest.raises(ValueError, match=f"{KEY}: .*{message}|{KEY}: {message}"):
        load(folder)


def test_no_codes(quantized: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=rf"{KEY}: there are scales \(absmax, .*\), but no codes"):
        load(edited(quantized("nf4"), lambda state: state.pop(KEY)))


def with_config(folder: Path, **options: object) -> Path:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = config.quantization_config | options
    config.save_pretrained(folder)
    return folder


def test_codes_of_another_quantization_than_the_config_says(quantized: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=rf"(?s)config \(fp4\):.*{KEY}: the codes are nf4, expected fp4"):
        load(with_config(quantized("nf4"), quant="fp4"))
    with pytest.raises(ValueError, match=rf"(?s)config \(nf4\):.*{KEY}: the codes are int8, expected nf4"):
        load(with_config(quantized("int8"), quant="nf4"))


def test_codes_of_another_shape(quantized: Callable[[str], Path]) -> None:
    def other(name: str) -> Callable:
        def swap(state: dict[str, torch.Tensor]) -> None:
            for key in [key for key in state if key.startswith(KEY)]:
                state[key] = state[key.replace("up_proj", name)].clone()

        return swap

    with pytest.raises(ValueError, match=rf"{KEY}: the quantized weight has shape \[64, 128\], expected \[128, 64\]"):
        load(edited(quantized("nf4"), other("down_proj")))
    with pytest.raises(ValueError, match=rf"{KEY}: expected int8 codes \[128, 64\], got torch\.int8 \[64, 128\]"):
        load(edited(quantized("int8"), other("down_proj")))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_two_values_for_a_tied_weight(quant: str, tmp_path: Path) -> None:
    """One is enough, and two may be there if they are equal."""
    table, head = "transformer.wte.weight", "lm_head.weight"
    folder = saved(tiny_gpt2(), tmp_path / "float")
    expected = load(folder, quant, embeddings=True, skip=[])
    packed = saved(expected, tmp_path / "quantized")
    suffixes = [key.removeprefix("transformer.wte") for key in load_file(packed / "model.safetensors") if "wte" in key]

    def double(state: dict[str, torch.Tensor]) -> None:
        state.update({f"lm_head{suffix}": state[f"transformer.wte{suffix}"].clone() for suffix in suffixes})

    edited(folder, lambda state: state.update({head: state[table].clone()}))
    for model in (load(folder, quant, embeddings=True, skip=[]), load(edited(packed, double))):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)

    message = "(lm_head|wte).weight: it is tied to .*, but the checkpoint has another value for it"
    with pytest.raises(ValueError, match=message):
        load(edited(folder, lambda state: state[head][3].neg_()), quant, embeddings=True, skip=[])
    with pytest.raises(ValueError, match=message):
        load(edited(packed, lambda state: state[head][3].add_(1)))


def test_a_float_checkpoint_that_is_called_quantized(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = BnbOpsConfig("nf4")
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"is quantized \(nf4\), but it has no quantized weight"):
        load(folder)


def test_a_config_of_a_later_version(quantized: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"no option rotation; .* may come from a later version"):
        load(with_config(quantized("nf4"), rotation="hadamard"))
