"""compiled_train_step: one graph, no recompiles, the bits of eager. Reference: the step function, run eagerly."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

import bnbops
from bnbops.optim import AdamW8bit
from cases.compiled import Step, assert_same, batches, make, make_model, snapshot, usual_step


def train(compiled: bool, data: list[tuple[Tensor, Tensor]], backend: str) -> tuple[list, dict[str, Tensor], Step]:
    model, optimizer = make()
    step = usual_step(model, optimizer)
    if compiled:
        step = bnbops.compiled_train_step(step, optimizer, backend=backend)
    return [step(*batch) for batch in data], snapshot(model, optimizer), step


@pytest.mark.every_torch
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_graph_and_the_bits_of_eager(compiler: str) -> None:
    losses, tensors, _ = train(False, batches(5), compiler)
    compiled_losses, compiled_tensors, step = train(True, batches(5), compiler)
    assert compiled_losses == losses
    assert_same(compiled_tensors, tensors)
    assert (step.graph_count, step.recompiles) == (1, 0)


@pytest.mark.every_torch
def test_a_new_batch_shape_compiles_once_more_and_still_trains() -> None:
    # After the first trace Dynamo has marked the parameters; unless the mark is undone the second graph trains nothing.
    data = batches(2) + batches(2, rows=5) + batches(2, rows=9)
    losses, tensors, _ = train(False, data, "aot_eager")
    compiled_losses, compiled_tensors, step = train(True, data, "aot_eager")
    assert compiled_losses == losses
    assert_same(compiled_tensors, tensors)
    assert (step.graph_count, step.recompiles) == (2, 1)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], object]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda i: 1 / (i + 1)),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 50),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=60, cycle_momentum=False),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=5), lr_scheduler.ExponentialLR(opt, 0.9)], [5]
    ),
}


@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_recompile_in_50_steps_with_a_scheduler(name: str, attach: str) -> None:
    def train(compiled: bool) -> tuple[dict[str, Tensor], Step]:
        model, optimizer = make()
        step = usual_step(model, optimizer)
        scheduler = SCHEDULERS[name](optimizer) if attach == "before" else None
        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="eager")
        scheduler = scheduler or SCHEDULERS[name](optimizer)
        seen = []
        for batch in batches(50):
            step(*batch)
            scheduler.step()
            seen.append(float(optimizer.param_groups[0]["lr"]))
        assert len(set(seen)) >= 45  # the learning rate did change
        return snapshot(model, optimizer), step

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # e.g. "lr_scheduler.step() before optimizer.step()"
        warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)  # SequentialLR's own
        expected, _ = train(compiled=False)
        actual, step = train(compiled=True)
    assert_same(actual, expected)
    assert step.graph_count == 1


def test_a_scheduler_still_warns_when_it_steps_before_the_optimizer() -> None:
    model, optimizer = make()
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend="eager")
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


@pytest.mark.every_torch
def test_the_schedulers_wrapper_is_back_after_the_call() -> None:
    model, optimizer = make()
    step = bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend="eager")
    step(*batches(1)[0])
    assert "step" not in optimizer.__dict__
    lr_scheduler.ExponentialLR(optimizer, 0.9)
    wrapper = optimizer.step
    step(*batches(1)[0])
    assert optimizer.step is wrapper
    assert step.graph_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_lr_is_kept(dtype: torch.dtype) -> None:
    model = make_model()
    lr = torch.tensor(1e-2, dtype=dtype)
    optimizer = AdamW8bit(model.parameters(), lr=lr)
    step = bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend="eager")
    assert optimizer.param_groups[0]["lr"] is lr
    step(*batches(1)[0])
    lr.zero_()
    before = snapshot(model)
    step(*batches(1)[0])
    assert_same(snapshot(model), before)  # nothing moves at lr 0
    assert step.graph_count == 1


def test_a_float_lr_assigned_later_takes_effect_without_a_recompile() -> None:
    model, optimizer = make()
    step = bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend="eager")
    reference_model, reference = make()
    eager = usual_step(reference_model, reference)
    for i, batch in enumerate(batches(4)):
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = 0.1 / (i + 1)
        step(*batch)
        eager(*batch)
    assert_same(snapshot(model, optimizer), snapshot(reference_model, reference))
    assert step.graph_count == 1


@pytest.mark.every_torch
def test_gradient_accumulation_as_two_graphs() -> None:
    def train(compiled: bool) -> tuple[list[dict[str, Tensor]], list[Step]]:
        model, optimizer = make()
        optimizer.init_state()  # as the compiled run has it before the first update

        def accumulate(x: Tensor, y: Tensor) -> Tensor:
            loss = cross_entropy(model(x), y) / 2
            loss.backward()
            return loss

        def update(x: Tensor, y: Tensor) -> Tensor:
            loss = cross_entropy(model(x), y) / 2
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        steps = [accumulate, update]
        if compiled:
            steps[0] = bnbops.compiled_train_step(accumulate, optimizer, accumulate=True, backend="aot_eager")
            steps[1] = bnbops.compiled_train_step(update, optimizer, backend="aot_eager")
        seen = []
        for i, batch in enumerate(batches(6)):
            steps[i % 2](*batch)
            seen.append(snapshot(model, optimizer))
        return seen, steps

    expected, _ = train(compiled=False)
    actual, steps = train(compiled=True)
    for i in range(6):
        assert any(name.startswith("grad") for name in actual[i]) == (i % 2 == 0)
        assert_same(actual[i], expected[i])
    assert [step.graph_count for step in steps] == [1, 1]


@pytest.mark.every_torch
def test_a_loaded_checkpoint_and_a_new_param_group() -> None:
    results = []
    for compiled in (False, True):
        model, optimizer = make()
        step = usual_step(model, optimizer)
        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="eager")
        data = batches(6)
        step(*data[0])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        step(*data[1])
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        step(*data[2])
        model[0].register_parameter("scale", nn.Parameter(torch.ones(())))
        model[0].register_forward_hook(lambda module, _, out: out * module.scale)
        optimizer.add_param_group({"params": [model[0].scale]})
        step(*data[3])
        results.append(snapshot(model, optimizer))
    assert_same(results[1], results[0])


@pytest.mark.every_torch
def test_arguments_outputs_and_the_decorator() -> None:
    model, optimizer = make()

    @bnbops.compiled_train_step(optimizer=optimizer, backend="aot_eager")
    def step(x: Tensor, *, y: Tensor, weight: Tensor) -> dict[str, object]:
        """A docstring."""
        logits = model(x)
        loss = (cross_entropy(logits, y, reduction="none") * weight).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "more": (logits, [logits.argmax(-1)]), "rows": len(x)}

    x, y = batches(1)[0]
    out = step(x, y=y, weight=torch.ones(16))
    assert out["loss"].shape == () and out["more"][0].shape == (16, 8) and out["rows"] == 16
    assert out["more"][1][0].dtype == torch.int64
    assert not out["loss"].requires_grad and not out["more"][0].requires_grad
    assert (step.__name__, step.__doc__, step.graph_count) == ("step", "A docstring.", 1)


def test_a_step_that_a_gradient_scaler_skips_is_no_error() -> None:
    model, optimizer = make()
    step = bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend="eager")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    before = snapshot(model, optimizer)
    step(*batches(1)[0])
    assert_same(snapshot(model, optimizer), before)
    optimizer.found_inf.zero_()
    step(*batches(1)[0])
    assert [float(state["step"]) for state in optimizer.state.values()] == [1.0] * 4
    assert step.graph_count == 1


@pytest.mark.every_torch
def test_the_optimizers_own_step_compiles_alone() -> None:
    results = []
    for compiled in (False, True):
        model, optimizer = make()
        lr_scheduler.ExponentialLR(optimizer, 0.9)
        optimizer.init_state()
        update = lambda optimizer=optimizer: type(optimizer).step(optimizer)  # noqa: E731
        if compiled:
            update = torch.compile(update, fullgraph=True, backend="aot_eager")
        for x, y in batches(3):
            cross_entropy(model(x), y).backward()
            update()
            optimizer.zero_grad()
        results.append(snapshot(model, optimizer))
    assert_same(results[1], results[0])


def test_force_eager_runs_the_function_as_it_is() -> None:
    model, optimizer = make()
    step = bnbops.compiled_train_step(usual_step(model, optimizer), optimizer)
    with torch.compiler.set_stance("force_eager"):
        loss = step(*batches(1)[0])
    assert not loss.requires_grad and step.graph_count == 0
    assert [float(state["step"]) for state in optimizer.state.values()] == [1.0] * 4
