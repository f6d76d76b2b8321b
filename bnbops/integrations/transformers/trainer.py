"""Transformers' Trainer with its whole training step in one compiled graph."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import ParallelMode

from bnbops.compile import CompiledTrainStep, compiled_train_step
from bnbops.dynamo import unwrapped
from bnbops.integrations.transformers.models import keep_embeddings_in_32_bits
from bnbops.optim.core.optimizer import Optimizer
from bnbops.versions import require

__all__ = ["CompiledStep", "CompiledTrainer"]

require("transformers", "CompiledTrainer")

logger = logging.getLogger(__name__)

_LOGGING = ("debug", "info", "info_once", "warning", "warning_advice", "warning_once")


class CompiledStep:
    """Mixed into a Trainer, it runs forward, backward, clipping and the optimizer's step as one compiled graph.

    ``class CompiledMyTrainer(CompiledStep, MyTrainer)``: `training_step` and `compute_loss` of MyTrainer become part of
    the graph. All else is the Trainer's: the schedule of the learning rate, logs, checkpoints, evaluation, which is
    eager. It needs an optimizer of `bnbops.optim` and one process. States of embeddings are kept in 32 bits.

    Callbacks are called where they always are, but at `on_pre_optimizer_step` the step is over and gradients are gone.

    Args:
        args, kwargs: the Trainer's.
        compile_backend, compile_mode, compile_options, compile_dynamic: `backend`, `mode`, `options` and `dynamic` of
            `bnbops.compiled_train_step`.
        graph_per: "step": one graph holds all micro-batches of an optimizer step. "micro_batch": each is a graph of its
            own, and the last one's has the update. That compiles faster with many `gradient_accumulation_steps`.

    Attributes:
        compiled_step: the `CompiledTrainStep`, or None before the first step; `compiled_step.graph_count` tells what
            was compiled.

    Raises:
        ValueError: an argument that cannot go with one graph.
        TypeError: (by `train`) an optimizer that is not one of `bnbops.optim`.
        GraphBreakError: (by `train`) the step cannot be captured as one graph. Nothing was run.
    """

    def __init__(
        self,
        *args: Any,
        compile_backend: Any = "inductor",
        compile_mode: str | None = None,
        compile_options: dict[str, Any] | None = None,
        compile_dynamic: bool | None = None,
        graph_per: Literal["step", "micro_batch"] = "step",
        **kwargs: Any,
    ) -> None:
        if graph_per not in ("step", "micro_batch"):
            raise ValueError(f'graph_per must be "step" or "micro_batch", got {graph_per!r}')
        super().__init__(*args, **kwargs)
        _refuse_what_is_not_one_graph(self, graph_per)
        self.compiled_step: CompiledTrainStep[..., Any] | None = None
        self._graph_per = graph_per
        how = {"backend": compile_backend, "mode": compile_mode, "options": compile_options, "dynamic": compile_dynamic}
        self._compile_options = how
        self._compiled_for: tuple[nn.Module, Optimizer] | None = None
        self._ignored_logging: set[Any] = set()
        self._micro_batches: list[dict[str, Any]] = []  # of this step, not run yet
        self._grad_norm: Tensor | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        super().create_optimizer(model)
        if not isinstance(unwrapped(self.optimizer), Optimizer):
            raise TypeError(
                f"{type(self).__name__} needs an optimizer of bnbops.optim, got "
                f"{type(unwrapped(self.optimizer)).__name__}: pass e.g. "
                'optimizer_cls_and_kwargs=(bnbops.optim.AdamW8bit, {"lr": args.learning_rate})'
            )
        keep_embeddings_in_32_bits(self.model if model is None else model)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        self._micro_batches = []  # a callback may have ended the last step early
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs the graph, or only notes the micro-batch if more are to come into it. Returns the loss that is new."""
        self._micro_batches.append(dict(self._prepare_inputs(inputs)))
        update = self.accelerator.sync_gradients
        if not update and self._graph_per == "step":
            return torch.zeros((), dtype=torch.float32, device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        model.train()  # in the graph alone, it would make the next call's guards fail
        step = self._step_for(model)
        graphs = step.graph_count
        with (
            torch._dynamo.config.patch(ignore_logging_functions=self._ignored_logging),
            nullcontext() if graphs else _caches_unmentioned(),
        ):
            loss, self._grad_norm = step(micro_batches, num_items_in_batch, update)
        if step.graph_count > graphs > 0 and self._graph_per == "step":
            _tell_of_another_graph(step.graph_count, micro_batches)
        return loss

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        # As Trainer's, which asks of a nullcontext for its class: Dynamo cannot before torch 2.13.
        return self.autocast_smart_context_manager()

    def _step_for(self, model: nn.Module) -> CompiledTrainStep[..., Any]:
        optimizer = unwrapped(self.optimizer)
        if self._compiled_for != (model, optimizer):
            self._compiled_for = (model, optimizer)
            self.compiled_step = self._compile(model, optimizer)
            self._ignored_logging = _logging_of_transformers()
        return self.compiled_step

    def _compile(self, model: nn.Module, optimizer: Optimizer) -> CompiledTrainStep[..., Any]:
        forward_backward = super().training_step
        max_norm = self.args.max_grad_norm or math.inf  # with inf it only measures, as the Trainer does

        def step(micro_batches: list[dict[str, Any]], num_items_in_batch: Any, update: bool) -> Any:
            loss = sum(forward_backward(model, dict(inputs), num_items_in_batch) for inputs in micro_batches)
            if not update:
                return loss, None
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            return loss, norm

        step.__name__ = f"{type(self).__name__}.training_step"  # for error messages
        return compiled_train_step(
            step, optimizer, accumulate=self._graph_per == "micro_batch", **self._compile_options
        )

    # After the graph has run, the Trainer clips, takes a step and clears the gradients: there are none, and nothing
    # happens. Of the gradients' norm it is told the one that the graph found.

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        return self._grad_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | None:
        return self._grad_norm


class CompiledTrainer(CompiledStep, Trainer):
    """`transformers.Trainer` with its training step in one compiled graph; see `CompiledStep`.

    Example::

        trainer = CompiledTrainer(
            model, args, train_dataset=data, optimizer_cls_and_kwargs=(bnbops.optim.AdamW8bit, {"lr": 1e-3})
        )
        trainer.train()
        trainer.compiled_step.graph_count  # 1
    """


def _refuse_what_is_not_one_graph(trainer: Trainer, graph_per: str) -> None:
    args, accelerator, config = trainer.args, trainer.accelerator, getattr(trainer.model, "config", None)
    one_process = "run one process on one device, or use Trainer"
    refused = {
        "DeepSpeed": (trainer.is_deepspeed_enabled, one_process),
        "FSDP": (bool(args.fsdp) or trainer.is_fsdp_enabled, one_process),
        "a model sharded when it was loaded": (trainer.is_distributed_loading_by_transformers, one_process),
        "several processes (DistributedDataParallel)": (args.parallel_mode == ParallelMode.DISTRIBUTED, one_process),
        f"DataParallel on {args.n_gpu} GPUs": (args.n_gpu > 1, "set CUDA_VISIBLE_DEVICES to one of them"),
        f"{accelerator.mixed_precision} mixed precision": (
            accelerator.mixed_precision not in ("no", "bf16"),
            "its gradient scaler decides outside of a graph; use bf16=True, or a model in bfloat16",
        ),
        "torch_compile=True": (args.torch_compile, "leave it out: the model is compiled together with the step"),
        "activation checkpointing of fused attention": (
            args.activation_checkpointing and getattr(config, "_attn_implementation", "eager") != "eager",
            "torch takes it for a random operation, which it does not recompute; attn_implementation='eager' works",
        ),
        "activation checkpointing of several micro-batches": (
            args.activation_checkpointing and args.gradient_accumulation_steps > 1 and graph_per == "step",
            "torch recomputes for one backward in a graph; use graph_per='micro_batch'",
        ),
        "torch_empty_cache_steps": (args.torch_empty_cache_steps is not None, "leave it out: nothing runs between"),
    }
    for what, (given, advice) in refused.items():
        if given:
            raise ValueError(f"{type(trainer).__name__} cannot compile one graph with {what}: {advice}")


def _logging_of_transformers() -> set[Any]:
    """What Transformers' code may call in a step and a graph leaves out: it would break there."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("transformers")]
    return {getattr(each, name) for each in loggers for name in _LOGGING if hasattr(each, name)}


@contextmanager
def _caches_unmentioned() -> Iterator[None]:
    """Without Dynamo's warning that it looks up anew what Transformers caches: which libraries are installed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        yield


def _tell_of_another_graph(count: int, micro_batches: list[dict[str, Any]]) -> None:
    shapes = [{name: list(x.shape) for name, x in batch.items() if isinstance(x, Tensor)} for batch in micro_batches]
    logger.warning(
        f"graph {count} was compiled, for micro-batches of {shapes}. One graph needs one shape: pad to one length, "
        "dataloader_drop_last=True, and a number of batches that gradient_accumulation_steps divides"
    )
