"""compiled_train_step says what is wrong, and a step that cannot be compiled changes nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

import bnbops
from bnbops.compile import GraphBreakError, NothingTrainedError
from bnbops.optim import AdamW8bit
from cases.compiled import Step, assert_same, batches, make, make_model, snapshot, usual_step


def printing(model: nn.Module, optimizer: AdamW8bit) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        print("loss", loss)
        optimizer.zero_grad()
        return loss

    return step


def branching(model: nn.Module, optimizer: AdamW8bit) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(model(x), y)
        if loss > 3:
            return loss
        return usual_step(model, optimizer)(x, y)

    return step


def branching_on_item(model: nn.Module, optimizer: AdamW8bit) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = usual_step(model, optimizer)(x, y)
        return loss if loss.item() > 3 else -loss

    return step


def checking_the_norm(model: nn.Module, optimizer: AdamW8bit) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        return loss

    return step


def raising(model: nn.Module, optimizer: AdamW8bit) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        usual_step(model, optimizer)(x, y)
        raise ValueError("no such batch")

    return step


@pytest.mark.every_torch
@pytest.mark.parametrize(
    ("make_step", "said"),
    [
        (printing, r"(?s)`print`.*compile_errors.py:\d+, in step: print\("),
        (branching, r"(?s)ata-dependent.*in step: if loss > 3"),
        (branching_on_item, r"(?s)ata-dependent.*in step: return loss if loss.item\(\) > 3"),
        (checking_the_norm, r"ata-dependent"),
        (raising, r"the code raised ValueError\('no such batch'\)"),
    ],
)
def test_a_graph_break_is_explained_and_changes_nothing(make_step: Callable[..., Step], said: str) -> None:
    model, optimizer = make()
    usual_step(model, optimizer)(*batches(1)[0])
    cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()  # there are gradients to lose
    lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = bnbops.compiled_train_step(make_step(model, optimizer), optimizer, backend="eager")
    before, wrapper = snapshot(model, optimizer), optimizer.step
    assert any(name.startswith("grad") for name in before)

    with pytest.raises(GraphBreakError, match=said) as caught:
        step(*batches(1)[0])
    assert "step() cannot be compiled into one graph" in str(caught.value)
    assert "What to do" in str(caught.value)
    assert isinstance(caught.value.__cause__, torch._dynamo.exc.TorchDynamoException)
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.step is wrapper
    assert not torch._dynamo.config.trace_autograd_ops
    assert step.graph_count == 0


@pytest.mark.every_torch
def test_after_a_graph_break_another_step_still_compiles() -> None:
    model, optimizer = make()
    with pytest.raises(GraphBreakError):
        bnbops.compiled_train_step(printing(model, optimizer), optimizer, backend="eager")(*batches(1)[0])
    bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend="eager")(*batches(1)[0])
    reference, its_optimizer = make()
    usual_step(reference, its_optimizer)(*batches(1)[0])
    assert_same(snapshot(model), snapshot(reference))


def test_item_alone_is_no_graph_break() -> None:
    model, optimizer = make()
    usual = usual_step(model, optimizer)
    step = bnbops.compiled_train_step(lambda x, y: usual(x, y).item(), optimizer, backend="eager")
    loss = step(*batches(1)[0])
    assert isinstance(loss, float) and loss == pytest.approx(2.1, abs=0.2)
    assert step.graph_count == 1


def test_a_hook_that_the_graph_would_leave_out_is_rejected() -> None:
    model, optimizer = make()
    step = bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend="eager")
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    before = snapshot(model, optimizer)
    with pytest.raises(GraphBreakError, match="post-accumulate-grad hook"):
        step(*batches(1)[0])
    assert_same(snapshot(model, optimizer), before)
    handle.remove()
    step(*batches(1)[0])


@pytest.mark.every_torch
def test_too_many_recompiles_end_in_an_error_that_says_what_to_look_for() -> None:
    model, optimizer = make()
    phase = {"name": "0"}  # a constant of the graph

    def step_fn(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(model(x), y)
        if phase["name"] != "off":
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = bnbops.compiled_train_step(step_fn, optimizer, backend="eager")
    with pytest.raises(GraphBreakError, match=r"compiled too often.*A Python number"):
        for i, batch in enumerate(batches(20)):
            phase["name"] = str(i)
            step(*batch)


def no_step(model: nn.Module, optimizer: AdamW8bit, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y).backward()


def no_backward(model: nn.Module, optimizer: AdamW8bit, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y)
    optimizer.step()


def zero_between(model: nn.Module, optimizer: AdamW8bit, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    optimizer.step()


def nothing(model: nn.Module, optimizer: AdamW8bit, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


@pytest.mark.every_torch
@pytest.mark.parametrize(
    ("body", "accumulate", "said"),
    [
        (no_step, False, r"step\(\) ran, but never called step\(\) on the AdamW8bit.*accumulate=True"),
        (no_backward, False, r"AdamW8bit.step\(\) found no gradient"),
        (zero_between, False, r"AdamW8bit.step\(\) found no gradient"),
        (zero_between, True, r"AdamW8bit.step\(\) found no gradient"),
        (nothing, True, r"left no gradient in any parameter"),
        (no_step, True, None),
    ],
)
def test_a_step_that_trains_nothing(body: Callable[..., object], accumulate: bool, said: str | None) -> None:
    model, optimizer = make()

    def step(x: Tensor, y: Tensor) -> object:
        return body(model, optimizer, x, y)

    compiled = bnbops.compiled_train_step(step, optimizer, accumulate=accumulate, backend="eager")
    if said is None:
        compiled(*batches(1)[0])
        return
    with pytest.raises(NothingTrainedError, match=said):
        compiled(*batches(1)[0])


def test_a_step_that_trains_another_optimizer() -> None:
    model, optimizer = make()
    _, other = make()
    step = bnbops.compiled_train_step(usual_step(model, optimizer), other, backend="eager")
    optimizer.init_state()
    with pytest.raises(NothingTrainedError, match="never called"):
        step(*batches(1)[0])


def test_a_graph_that_is_compiled_later_is_checked_too() -> None:
    model, optimizer = make()

    def step(x: Tensor, y: Tensor) -> None:
        cross_entropy(model(x), y).backward()
        if len(x) == 16:
            optimizer.step()
        optimizer.zero_grad()

    compiled = bnbops.compiled_train_step(step, optimizer, backend="eager")
    compiled(*batches(1)[0])
    with pytest.raises(NothingTrainedError):
        compiled(*batches(1, rows=8)[0])


def test_the_check_reads_no_step_counter_when_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    step = bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend="eager")
    reads: list[int] = []
    original = type(step)._steps
    monkeypatch.setattr(type(step), "_steps", lambda self: reads.append(1) or original(self))
    for batch in batches(5):
        step(*batch)
    assert len(reads) == 2  # before and after the first call


def test_a_compiled_step_without_state_says_what_to_call() -> None:
    model, optimizer = make()
    cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    before = snapshot(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"init_state\(\)"):
        torch.compile(lambda: type(optimizer).step(optimizer), fullgraph=True, backend="eager")()
    assert_same(snapshot(model), before)
    assert not any(optimizer.state.values())


def test_wrong_arguments() -> None:
    model = make_model()
    optimizer = AdamW8bit(model.parameters())
    step = usual_step(model, optimizer)
    with pytest.raises(TypeError, match="pass the optimizer"):
        bnbops.compiled_train_step(step)
    with pytest.raises(TypeError, match="pass the optimizer"):
        bnbops.compiled_train_step(step, [])
    with pytest.raises(TypeError, match="pass the optimizer"):
        bnbops.compiled_train_step(step, list(model.parameters()))
    with pytest.raises(TypeError, match="by name"):
        bnbops.compiled_train_step(optimizer)
    with pytest.raises(TypeError, match="step_fn must be a function, got Tensor"):
        bnbops.compiled_train_step(torch.zeros(()), optimizer)
    with pytest.raises(TypeError, match=r"AdamW has no init_state\(\).*bnbops.optim"):
        bnbops.compiled_train_step(step, torch.optim.AdamW(model.parameters()))


def test_a_torch_that_cannot_differentiate_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    model, optimizer = make()
    with pytest.raises(
        NotImplementedError, match=r"^compiled_train_step needs torch 2\.11 or later, this is .*2\.10\.0\+cpu: pip"
    ):
        bnbops.compiled_train_step(usual_step(model, optimizer), optimizer)
    with pytest.raises(NotImplementedError, match=r"^compiled_train_step needs torch 2\.11"):
        bnbops.compiled_train_step(optimizer=optimizer)
    assert not optimizer.state
