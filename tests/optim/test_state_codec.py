"""state_codec: each state of a parameter has a codec of its own, or none."""

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import bnbops
from bnbops import optim
from bnbops.estimate import estimate
from bnbops.facts import CODECS, DEFAULT_CODEC, STATE_BLOCK, STATES, UNCODED
from bnbops.optim import AdamW, AdamW8bit, GlobalOptimManager, RMSprop8bit
from cases.codecs import ADAM, CHOICES, as_bytes, codec_in, codecs_by_state, naively_decoded, option, scales_key
from cases.compiled import batches, make_model, usual_step
from cases.optimizers import MIXED, params, set_grads, train

pytestmark = pytest.mark.every_torch


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, x in expected.items():
        assert actual[key].dtype == x.dtype and torch.equal(as_bytes(actual[key]), as_bytes(x)), key


def assert_encoded(state: Mapping[str, Tensor], name: str, values: Tensor, codec: str) -> None:
    """A state is these values in this codec."""
    assert codec_in(state, name) == codec
    if codec == UNCODED:
        assert torch.equal(state[name], values)
        return
    codes, absmax = torch.ops.bnbops.encode_state(values, codec, STATES[name].role.name)
    assert state[name].dtype == CODECS[codec].dtype
    assert torch.equal(as_bytes(state[name]), as_bytes(codes)) and torch.equal(state[scales_key(name, codec)], absmax)


OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW8bit": {},
    "AdEMAMix8bit": {},
    "PagedAdamW8bit": {},
    "LAMB8bit": {"weight_decay": 0.1},
    "RMSprop8bit": {"momentum": 0.9},
    "Adagrad8bit": {"initial_accumulator_value": 0.5},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_that_of_32_bits_between_decoding_and_encoding(name, choice):
    cls, options = getattr(optim, name), OPTIONS[name]
    states = cls._rules[-1].state_names
    p = params(*MIXED)
    q = copy.deepcopy(p)
    coded = cls(p, lr=1e-2, state_codec=option(choice, states), **options)
    plain = cls.__mro__[1](q, lr=1e-2, **options)
    coded.init_state()
    for step in range(3):
        for x, y in zip(p, q, strict=True):
            plain.set_state(y, coded.dequantized_state(x))
        for parameters, optimizer in ((p, coded), (q, plain)):
            set_grads(parameters, step)
            optimizer.step()
        for x, y in zip(p, q, strict=True):
            assert torch.equal(x, y)
            state, values = coded.state[x], plain.state[y]
            for key, codec in codecs_by_state(choice, states).items():
                codec = codec if x.dim() > 1 and x.numel() >= 4096 else UNCODED
                assert_encoded(state, key, values[key], codec)
                if codec != UNCODED:
                    assert torch.equal(coded.dequantized_state(x)[key], naively_decoded(state, key))


@pytest.mark.parametrize("choice", CHOICES)
def test_compiled_steps_are_the_usual_ones(choice):
    runs = []
    for compiled in (False, True):
        model = make_model()
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, state_codec=option(choice))
        step = usual_step(model, optimizer)
        step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager") if compiled else step
        for x, y in batches(3):
            step(x, y)
        runs.append((list(model.parameters()), optimizer))
    for x, y in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(x, y)
        assert_same(runs[1][1].state[y], runs[0][1].state[x])


def test_parameters_with_the_same_codecs_share_a_call():
    """As a graph has them: one node for all of them."""
    model = make_model()
    manager = GlobalOptimManager.get_instance()
    manager.override_config(model[2].weight, key_value_dict={"min_8bit_size": 0, "state_codec": {"exp_avg_sq": "fp32"}})
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=0)
    graphs = []

    def capture(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    bnbops.compiled_train_step(usual_step(model, optimizer), optimizer, backend=capture)(*batches(1)[0])
    nodes = [node for graph in graphs for node in graph.graph.nodes if "adam_step_" in str(node.target)]
    assert [len(node.args[0]) for node in nodes] == [3, 1]
    assert [node.kwargs.get("codec") for node in nodes] == [DEFAULT_CODEC, DEFAULT_CODEC]


# ---- saving and loading ----------------------------------------------------------------------------------------------


def through_torch_save(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("live", ["default", "fp32", "32 bits"])
@pytest.mark.parametrize("choice", CHOICES)
def test_states_of_any_codec_load_as_they_are(choice, live):
    """Whatever the options of the optimizer that loads them; it has the saved ones then."""
    p = params(*MIXED)
    optimizer = AdamW8bit(p, state_codec=option(choice))
    train(p, optimizer, range(2))
    q = copy.deepcopy(p)
    other = AdamW(q) if live == "32 bits" else AdamW8bit(q, **({} if live == "default" else {"state_codec": live}))
    if live == "fp32":
        train(q, other, range(1))
    other.load_state_dict(through_torch_save(optimizer.state_dict()))
    for x, y in zip(p, q, strict=True):
        assert_same(other.state[y], optimizer.state[x])
        y.data.copy_(x)
    assert other.param_groups[0]["state_codec"] == optimizer.param_groups[0]["state_codec"]
    for parameters, one in ((p, optimizer), (q, other)):
        train(parameters, one, range(2, 4))
    for x, y in zip(p, q, strict=True):
        assert torch.equal(x, y)
        assert_same(other.state[y], optimizer.state[x])


def test_groups_saved_without_the_option_have_the_default():
    p = params(*MIXED)
    optimizer = AdamW8bit(p)
    train(p, optimizer, range(1))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["state_codec"]
    other = AdamW8bit(copy.deepcopy(p), state_codec="fp32")
    other.load_state_dict(saved)
    assert other.param_groups[0]["state_codec"] == DEFAULT_CODEC
    assert other.state_dict()["state"][0].keys() == saved["state"][0].keys()


@pytest.mark.parametrize("how", ["deepcopy", "state dict"])
def test_a_mapping_is_the_groups_own(how):
    choice = {"exp_avg": "fp32"}
    optimizer = AdamW8bit(params(*MIXED), state_codec=choice)
    choice["exp_avg"] = "nonsense"
    saved = copy.deepcopy(optimizer).state_dict() if how == "deepcopy" else optimizer.state_dict()
    other = AdamW8bit(params(*MIXED))
    other.load_state_dict(saved)
    saved["param_groups"][0]["state_codec"]["exp_avg"] = "nonsense"
    assert other.param_groups[0]["state_codec"] == {"exp_avg": "fp32"}
    assert AdamW8bit(params(*MIXED), state_codec={}).param_groups[0]["state_codec"] == DEFAULT_CODEC


@pytest.mark.parametrize("choice", CHOICES)
def test_bitsandbytes_gets_its_codec_or_exact_values(choice):
    p = params((64, 512))
    optimizer = AdamW8bit(p, state_codec=option(choice))
    train(p, optimizer, range(2))
    written = optimizer.bitsandbytes_state_dict()["state"][0]["__bnb_optimizer_quant_state__"]
    state, values = optimizer.state[p[0]], optimizer.dequantized_state(p[0])
    if all(codec_in(state, name) == "dynamic8" for name in ADAM):
        assert torch.equal(written["state1"], state["exp_avg"]) and torch.equal(written["state2"], state["exp_avg_sq"])
    else:
        assert not any(key.startswith(("absmax", "qmap")) for key in written)
        assert torch.equal(written["state1"], values["exp_avg"]) and torch.equal(
            written["state2"], values["exp_avg_sq"]
        )
    other = AdamW8bit(copy.deepcopy(p))
    other.load_state_dict(optimizer.bitsandbytes_state_dict())
    for name, value in other.dequantized_state(other.param_groups[0]["params"][0]).items():
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("choice", CHOICES)
def test_torchs_states_get_the_options_codecs(choice):
    p = params((64, 80))
    theirs = torch.optim.AdamW(p, lr=1e-2, foreach=False)
    train(p, theirs, range(2))
    optimizer = AdamW8bit(copy.deepcopy(p), state_codec=option(choice))
    optimizer.load_state_dict(theirs.state_dict())
    (state,) = optimizer.state.values()
    for name, codec in codecs_by_state(choice).items():
        values = theirs.state[p[0]][name]
        assert_encoded(state, name, values, codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no scales", "'exp_avg' is torch.uint8, which are codes, but '.*absmax' is missing"),
        ("other dtype", "'exp_avg' is torch.float32 of shape .*, expected {dtype}"),
        ("two codecs", "its keys do not fit: missing .*, unexpected .*absmax"),
        ("short scales", "absmax' is torch.float32 of shape"),
    ],
)
def test_states_that_do_not_fit_are_refused(codec, damage, message):
    optimizer = AdamW8bit(params((64, 80)), state_codec=codec)
    optimizer.init_state()
    saved = optimizer.state_dict()
    state, key = dict(saved["state"][0]), scales_key("exp_avg", codec)
    if damage == "no scales":
        del state[key]
    elif damage == "other dtype":
        state["exp_avg"] = torch.zeros(64, 80)
    elif damage == "two codecs":
        state["exp_avg_nonsense_absmax"] = state[key]
    else:
        state[key] = state[key][:-1]
    with pytest.raises(ValueError, match=message.format(dtype=CODECS[codec].dtype)):
        optimizer.load_state_dict({**saved, "state": {0: state}})


# ---- reading and changing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_states_are_set_and_reset_by_values(choice):
    p = params((64, 80))
    optimizer = AdamW8bit(p, state_codec=option(choice))
    train(p, optimizer, range(2))
    before = optimizer.dequantized_state(p[0])
    mask = torch.rand(64, 80, generator=torch.Generator().manual_seed(0)) < 0.5
    optimizer.reset_state(p[0], mask)
    after = optimizer.dequantized_state(p[0])
    for name in ADAM:
        assert torch.equal(after[name], torch.where(mask, 0.0, before[name]))
    optimizer.set_state(p[0], before)
    for name, codec in codecs_by_state(choice).items():
        assert_encoded(optimizer.state[p[0]], name, before[name], codec)
    optimizer.reset_state()
    fresh = AdamW8bit(copy.deepcopy(p), state_codec=option(choice))
    fresh.init_state()
    (expected,) = fresh.state.values()
    assert_same(optimizer.state[p[0]], expected)


@pytest.mark.parametrize("codec", CODECS)
def test_values_that_states_begin_with(codec):
    """And that elements begin anew with, in blocks whose other elements keep theirs."""
    p = params((8, 600))
    optimizer = optim.Adagrad8bit(p, initial_accumulator_value=0.3, state_codec=codec)
    optimizer.init_state()
    assert (optimizer.dequantized_state(p[0])["sum"] == torch.tensor(0.3)).all()
    train(p, optimizer, range(2))
    before, mask = optimizer.dequantized_state(p[0])["sum"], torch.zeros(8, 600, dtype=torch.bool)
    mask[3, 7] = mask[5, 300:400] = True
    optimizer.reset_state(p[0], mask)
    after = optimizer.dequantized_state(p[0])["sum"]
    hit = torch.zeros(8, 600, dtype=torch.bool)
    hit[3, :STATE_BLOCK] = hit[5, STATE_BLOCK : 2 * STATE_BLOCK] = True
    assert torch.equal(after[~hit], before[~hit])
    torch.testing.assert_close(after, torch.where(mask, 0.3, before), rtol=0.1, atol=1e-3)


def test_codes_written_without_their_scales_are_noticed():
    for codec in CODECS:
        p = params((64, 80))
        optimizer = AdamW8bit(p, state_codec=codec)
        train(p, optimizer, range(1))
        optimizer.state[p[0]]["exp_avg"].zero_()
        set_grads(p, 1)
        with pytest.raises(RuntimeError, match=f"'exp_avg' .* not its scales, '{scales_key('exp_avg', codec)}'"):
            optimizer.step()


# ---- states that come later ------------------------------------------------------------------------------------------


def test_a_later_state_has_the_options_codec_where_the_others_are_coded():
    p = params((64, 80))
    optimizer = RMSprop8bit(p, state_codec={"momentum_buffer": "fp32"})
    train(p, optimizer, range(1))
    optimizer.param_groups[0]["momentum"] = 0.9
    train(p, optimizer, range(1, 2))
    assert [codec_in(optimizer.state[p[0]], name) for name in ("square_avg", "momentum_buffer")] == [
        DEFAULT_CODEC,
        UNCODED,
    ]


def test_a_later_state_is_coded_beside_one_that_is_not_by_choice():
    p = params((64, 80))
    optimizer = RMSprop8bit(p, state_codec={"square_avg": "fp32"})
    train(p, optimizer, range(1))
    optimizer.param_groups[0]["momentum"] = 0.9
    train(p, optimizer, range(1, 2))
    assert [codec_in(optimizer.state[p[0]], name) for name in ("square_avg", "momentum_buffer")] == [
        UNCODED,
        DEFAULT_CODEC,
    ]


def test_options_of_existing_states_come_too_late():
    p = params((64, 80))
    optimizer = AdamW8bit(p)
    train(p, optimizer, range(1))
    optimizer.param_groups[0]["state_codec"] = "fp32"
    train(p, optimizer, range(1, 3))
    assert codec_in(optimizer.state[p[0]], "exp_avg") == DEFAULT_CODEC
    with pytest.warns(UserWarning, match="state_codec comes too late"):
        GlobalOptimManager.get_instance().override_config(p[0], "state_codec", "fp32")


def test_groups_and_overrides():
    p = params((64, 80), (64, 80), (64, 80))
    GlobalOptimManager.get_instance().override_config(p[2], "state_codec", {"exp_avg": "fp32"})
    optimizer = AdamW8bit([{"params": p[:1]}, {"params": p[1:], "state_codec": "fp32"}])
    train(p, optimizer, range(2))
    found = [[codec_in(optimizer.state[x], name) for name in ADAM] for x in p]
    assert found == [[DEFAULT_CODEC] * 2, [UNCODED] * 2, [UNCODED, DEFAULT_CODEC]]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nonsense", f"state_codec must be one of '{DEFAULT_CODEC}',.* 'fp32', or a mapping .* got 'nonsense'"),
        (8, "got 8"),
        (None, "got None"),
        ({"exp_avg": "nonsense"}, "got {'exp_avg': 'nonsense'}"),
        ({"exp_avg": 8}, "got {'exp_avg': 8}"),
        ({"exp_avg": ["fp32"]}, "got {'exp_avg': .'fp32'.}"),
        ({"momentum_buffer": "fp32"}, r"has a codec for \['momentum_buffer'\], but the states are exp_avg, exp_avg_sq"),
    ],
)
@pytest.mark.parametrize("where", ["argument", "group", "later", "override"])
def test_bad_codecs_are_refused(value, message, where):
    p = params((64, 80))
    before = p[0].clone()
    with pytest.raises(ValueError, match=message):
        if where == "argument":
            AdamW8bit(p, state_codec=value)
        elif where == "group":
            AdamW8bit([{"params": p, "state_codec": value}])
        else:
            optimizer = AdamW8bit(p)
            if where == "later":
                optimizer.param_groups[0]["state_codec"] = value
            else:
                GlobalOptimManager.get_instance().override_config(p[0], key_value_dict={"state_codec": value})
            train(p, optimizer, range(1))
    assert torch.equal(p[0], before)


def test_estimates_count_each_states_bytes():
    with torch.device("meta"):
        module = torch.nn.Linear(512, 512, bias=False)
    sizes = {UNCODED: (4, 0), **dict.fromkeys(CODECS, (1, 4 / STATE_BLOCK))}
    for choice in CHOICES:
        found = estimate(module, "AdamW8bit", state_codec=option(choice)).whole
        expected = [sizes[codec] for codec in codecs_by_state(choice).values()]
        assert (found.states, found.scales) == tuple(sum(x) * 512 * 512 for x in zip(*expected, strict=True))
