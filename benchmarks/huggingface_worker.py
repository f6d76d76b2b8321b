"""One library's side of huggingface.py: a process that does what it is told, through Transformers' public API.

    python benchmarks/huggingface_worker.py bitsandbytes|bnbops|dense

A line of JSON on stdin, `{"call": name, ...arguments}`, is answered by one on stdout; tensors go through files. Nothing
but `import_library` may import bnbops: bitsandbytes' process has none. That of dense models has neither.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "int8, threshold 0": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
LORA_RANK = 16


def import_library(name: str) -> str:
    """Makes `import bitsandbytes` mean that library, and tells its version."""
    if name == "dense":
        return "-"
    if name == "bnbops":
        import bnbops

        bnbops.install_as_bitsandbytes()
        return bnbops.__version__
    if importlib.util.find_spec("bnbops"):
        raise RuntimeError("bnbops is in the environment of bitsandbytes, which it might stand in for")
    return importlib.import_module(name).__version__


class StepTimes(TrainerCallback):
    """Seconds of each step of a Trainer, and of its optimizer in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_began = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer.append(time.perf_counter() - self._optimizer_began)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self._began)


class Worker:
    """Holds one model at a time. The public methods are the calls, and answer with what JSON can hold."""

    def __init__(self, library: str) -> None:
        self.version = import_library(library)
        self.model: Any = None

    def versions(self) -> dict[str, Any]:
        return {
            "library": self.version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }

    def free(self) -> None:
        self.model = None
        gc.collect()
        if sys.platform == "linux":  # else what the last model had would hide what the next one takes
            import ctypes

            ctypes.CDLL(None).malloc_trim(0)

    def load(self, folder: str, quantization: str | None, dtype: str, encoder: bool = False) -> dict[str, Any]:
        """A language model or an encoder."""
        options: dict[str, Any] = {"dtype": DTYPES[dtype]}
        if quantization is not None:
            scheme = dict(QUANTIZATIONS[quantization])
            if "load_in_4bit" in scheme:
                scheme["bnb_4bit_compute_dtype"] = DTYPES[dtype]
            options["quantization_config"] = BitsAndBytesConfig(**scheme)
        if encoder:
            options |= {
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            }  # training mode computes the same
        began = time.perf_counter()
        self.model = (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(folder, **options)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "bytes": sum(tensor.nbytes for tensor in self.model.state_dict().values())}

    def dequantize(self, dtype: str) -> None:
        """The model goes on with dense weights of the dtype: those that the quantized ones stand for."""
        if getattr(self.model, "is_quantized", False):
            self.model = self.model.dequantize()
        self.model.to(DTYPES[dtype])

    def adapt(self) -> None:
        """QLoRA: adapters on every linear layer of the frozen model."""
        model = self.model
        if getattr(model, "is_quantized", False):  # else it would cast all weights to fp32
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        config = LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        self.model = get_peft_model(model, config)

    def outputs(self, inputs: str, out: str, training: bool = False) -> float:
        """Writes logits, or sentence vectors, for the tensors in `inputs`; tells the seconds."""
        tensors = load_file(inputs)
        self.model.train(training)
        with torch.set_grad_enabled(training):
            began = time.perf_counter()
            result = self._forward(tensors)
            seconds = time.perf_counter() - began
        save_file({"out": result.detach().contiguous()}, out)
        return seconds

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        if "attention_mask" not in inputs:
            return self.model(**inputs).logits
        hidden, mask = self.model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    def generate(self, inputs: str, tokens: int) -> dict[str, Any]:
        """Greedily, exactly so many tokens."""
        ids = load_file(inputs)["input_ids"]
        self.model.eval()
        began = time.perf_counter()
        out = self.model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return {"seconds": time.perf_counter() - began, "tokens": out[:, ids.shape[1] :].tolist()}

    def train(self, inputs: str, optimizer: str, steps: int, folder: str) -> dict[str, Any]:
        """Some steps of a Trainer on the same batch; the first, which makes the states, is not timed."""
        ids = load_file(inputs)["input_ids"]
        rows = [{"input_ids": row, "labels": row} for row in ids] * (steps + 1)
        times = StepTimes()
        arguments = TrainingArguments(
            folder, optim=optimizer, max_steps=steps + 1, per_device_train_batch_size=len(ids), learning_rate=1e-3,
            bf16=True, use_cpu=True, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(self.model, arguments, train_dataset=rows, callbacks=[times])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"steps": times.steps[1:], "optimizer": times.optimizer[1:], "losses": losses}


def serve(worker: Worker) -> None:
    """Answers calls until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"result": getattr(worker, arguments.pop("call"))(**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # bitsandbytes' int8 layers would warn in each call
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_interop_threads(1)
    serve(Worker(Path(sys.argv[1]).name))
