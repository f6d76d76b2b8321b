"""Memory while models load: near the size of the quantized model, far from that of the float one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}

# from_pretrained from bf16 to fp32 casts a tensor at a time
CASES = [
    "from_pretrained nf4 float32",
    "from_pretrained int8 bfloat16",
    "alias nf4 float32",
    "alias int8 float32",
    "quantize_ nf4 float32",
    "quantize_ int8 bfloat16",
]

# Each case in a process of its own, which is forked once everything is imported. Anonymous memory: pages of the
# checkpoint that are mapped are the system's to take back.
MEASURE = """
import os, sys, tempfile, threading
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
import bnbops
from bnbops.integrations.transformers import BnbOpsConfig

def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024

def load(how, quant, dtype, folder):
    if how == "alias":
        bnbops.install_as_bitsandbytes()
        bits = {"load_in_8bit": True} if quant == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": quant}
        config = BitsAndBytesConfig(**bits)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    if how == "from_pretrained":
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BnbOpsConfig(quant), dtype=dtype)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # a buffer that is in no checkpoint
    return bnbops.nn.quantize_(model, quant, state=f"{folder}/model.safetensors", progress=False)

def measure(how, quant, dtype, folder):
    dtype = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as small:
        sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
        LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(dtype).save_pretrained(small)
        load(how, quant, dtype, small)
    done, before = threading.Event(), anonymous()
    peak = before

    def watch():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(how, quant, dtype, folder)
    done.set()
    watcher.join()
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    print(size, peak - before, flush=True)

torch.set_num_threads(1)
for case in sys.argv[2:]:
    if (child := os.fork()) == 0:
        measure(*case.split(), sys.argv[1])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 M random parameters in bf16: 128 MiB."""
    path = tmp_path_factory.mktemp("large")
    config = LlamaConfig(vocab_size=64, num_hidden_layers=4, **SIZES)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    state = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1) for name, shape in shapes.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, list[float]]:
    """The quantized model's size, and the peak, in MiB."""
    command = [sys.executable, "-c", MEASURE, str(folder), *CASES]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    return {case: [int(number) / 2**20 for number in line.split()] for case, line in zip(CASES, lines, strict=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_peak_memory_is_near_the_quantized_size(case: str, measured: dict[str, list[float]]) -> None:
    size, peak = measured[case]
    print(f"{case}: quantized {size:.1f} MiB, peak {peak:.1f} MiB")
    dtype = getattr(torch, case.split()[-1])
    floats = 64 * dtype.itemsize
    largest = SIZES["hidden_size"] * SIZES["intermediate_size"] * dtype.itemsize / 2**20
    held = 2.5 if case.startswith("alias") else 1.5  # Transformers' own converter holds a weight until the next is read
    assert size / 2 < peak < size + held * largest + 8
    assert peak < 0.7 * floats
