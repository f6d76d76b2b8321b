"""Our optimizers in Lightning's Trainer and Fabric, in mixed precision. Reference: the same steps in a plain loop."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bnbops
from bnbops.optim import AdamW8bit
from cases.compiled import assert_same, batches, make, snapshot, usual_step

pytestmark = pytest.mark.every_torch

CLIPPING = {"norm": 0.3, "value": 0.02}
STEPS = 4
FITS, OVERFLOWS = 2.0**10, 2.0**30  # scales of the loss, for gradients in float16


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    """Imported where it is needed, because that takes seconds."""
    return importlib.import_module("lightning")


def scaler_of(precision: str, scale: float) -> torch.amp.GradScaler:
    """After an overflow the scale fits."""
    return torch.amp.GradScaler("cpu", scale, backoff_factor=FITS / OVERFLOWS, enabled=precision == "16-mixed")


def amp_plugin(precision: str, package: str, scale: float = FITS) -> Any:
    """Mixed precision on the CPU. Asked for "16-mixed" there, Lightning itself would take bfloat16."""
    plugins = importlib.import_module(f"lightning.{package}.plugins")
    scaler = scaler_of(precision, scale)
    return plugins.MixedPrecision(precision, "cpu", scaler if scaler.is_enabled() else None)


def clip(model: nn.Module, algorithm: str | None) -> None:
    if algorithm == "norm":
        assert nn.utils.clip_grad_norm_(model.parameters(), CLIPPING["norm"]) > CLIPPING["norm"]
    elif algorithm == "value":
        nn.utils.clip_grad_value_(model.parameters(), CLIPPING["value"])


def expected(precision: str, algorithm: str | None, scale: float = FITS) -> dict[str, Tensor]:
    """Unscaled, clipped and stepped by hand."""
    model, optimizer = make()
    scaler = scaler_of(precision, scale)
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip(model, algorithm)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    return snapshot(model, optimizer)


def fit(lightning: ModuleType, folder: Path, optimizer: AdamW8bit, model: nn.Module, **options: Any) -> None:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "default_root_dir": folder}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, **quiet, **options)
    trainer.fit(Module(), torch.utils.data.DataLoader(batches(STEPS), batch_size=None))
    optimizer.zero_grad()


@pytest.mark.parametrize("algorithm", [None, *CLIPPING])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_trainer(lightning, tmp_path, precision, algorithm):
    model, optimizer = make()
    clipping = {"gradient_clip_val": CLIPPING[algorithm], "gradient_clip_algorithm": algorithm} if algorithm else {}
    fit(lightning, tmp_path, optimizer, model, plugins=[amp_plugin(precision, "pytorch")], **clipping)
    assert_same(snapshot(model, optimizer), expected(precision, algorithm))


@pytest.mark.parametrize("algorithm", [None, *CLIPPING])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_fabric(lightning, precision, algorithm):
    fabric = lightning.Fabric(accelerator="cpu", plugins=[amp_plugin(precision, "fabric")])
    model, optimizer = make()
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    for x, y in batches(STEPS):
        wrapped_optimizer.zero_grad()
        with fabric.autocast():
            loss = cross_entropy(wrapped(x), y)
        fabric.backward(loss)
        if algorithm:
            limit = {"norm": {"max_norm": CLIPPING["norm"]}, "value": {"clip_val": CLIPPING["value"]}}[algorithm]
            fabric.clip_gradients(wrapped, wrapped_optimizer, **limit)
        wrapped_optimizer.step()
    optimizer.zero_grad()
    assert_same(snapshot(model, optimizer), expected(precision, algorithm))


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_skips_the_step(lightning, tmp_path, fused):
    """Fused or not, in the Trainer: the same steps are left out, the others are the same."""
    model, optimizer = make()
    optimizer.fused_scaling = fused
    fit(lightning, tmp_path, optimizer, model, plugins=[amp_plugin("16-mixed", "pytorch", OVERFLOWS)])
    assert_same(snapshot(model, optimizer), expected("16-mixed", None, OVERFLOWS))
    assert optimizer.state[model[0].weight]["step"] == STEPS - 1


def test_clipping_what_the_operator_unscales_is_refused(lightning, tmp_path):
    model, optimizer = make()
    optimizer.fused_scaling = True
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="performs unscaling of gradients internally"):
        plugin = amp_plugin("16-mixed", "pytorch")
        fit(lightning, tmp_path, optimizer, model, plugins=[plugin], gradient_clip_val=CLIPPING["norm"])
    model.zero_grad()
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("wrapper", ["Fabric", "Accelerator"])
def test_a_compiled_step_with_a_wrapped_optimizer(lightning, wrapper):
    """One graph for all learning rates of a schedule, with the bits of eager."""
    runs = []
    for compiled in (False, True):
        model, optimizer = make()
        if wrapper == "Fabric":
            wrapped = lightning.Fabric(accelerator="cpu").setup(model, optimizer)[1]
        else:
            wrapped = importlib.import_module("accelerate").Accelerator(cpu=True).prepare(optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = usual_step(model, wrapped)
        if compiled:
            step = bnbops.compiled_train_step(step, wrapped, backend="eager")
        for batch in batches(STEPS):
            step(*batch)
            scheduler.step()
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)
    assert step.graph_count == 1
