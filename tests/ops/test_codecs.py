"""Codecs of optimizer states, all alike: what codes mean, which one a number gets, and steps on coded states."""

import math

import pytest
import torch
from torch import Tensor

from bnbops import facts
from bnbops.functional import create_dynamic_map
from cases.backends import on_every_backend
from cases.rules import DTYPES
from reference.group import Group, random_group
from reference.states import dynamic_values

SHAPES = [(5, 257), (1, 513), (2, 1), (17, 512), (4, 3, 5, 7), (3, 700)]
CODECS = list(facts.CODECS)
every_role = pytest.mark.parametrize("role", facts.ROLES)
every_codec = pytest.mark.parametrize("codec", CODECS)


def values_of(codec: str, role: str) -> Tensor:
    return torch.tensor(facts.CODECS[codec].values(facts.ROLES[role]))


def encode(x: Tensor, codec: str, role: str, flat: bool = False) -> tuple[Tensor, Tensor]:
    codes, absmax = torch.ops.bnbops.encode_state(x, codec, role, flat)
    assert codes.dtype == facts.CODECS[codec].dtype and codes.shape == x.shape
    return codes, absmax


def numbers(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8).long()


def test_values_are_those_of_the_formats():
    for role, signed in (("signed", True), ("square", False)):
        values = values_of("dynamic8", role)
        assert torch.equal(values, dynamic_values(signed))
        ulps = values.view(torch.int32) - create_dynamic_map(signed).view(torch.int32)
        assert ulps.abs().max() <= 4, "too far from bitsandbytes' map"
    of_torch = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    of_torch[[127, 255]] = torch.tensor([480.0, -480.0]).double()  # where torch has NaN
    inverse = torch.tensor(1 / 448).double()  # in fp32
    for role in facts.ROLES:
        assert torch.equal(values_of("e4m3", role), (of_torch * inverse).float())


@every_role
@every_codec
def test_zero_and_one_have_codes(codec, role):
    role = facts.ROLES[role]
    assert 0 <= facts.CODECS[codec].code(0.0, role) < 256
    codes, absmax = encode(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.0, 3.0]]), codec, role.name)
    zero, one = (facts.CODECS[codec].code(value, role) for value in (0.0, 1.0))
    assert numbers(codes).tolist() == [[zero, zero], [one, zero], [zero, one]]
    assert absmax.tolist() == [[0.0], [1.0], [3.0]]


@on_every_backend
@every_role
@every_codec
def test_codes_are_the_nearest(codec, role):
    """Over ten decades, to within the rounding of x / absmax; what is positive under a divisor stays so."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1000, generator=generator) * 10 ** (-10 * torch.rand(40, 1000, generator=generator))
    x[0, :9] = torch.tensor([0.0, -0.0, 1e-41, -1e-41, 3e38, -3e38, math.inf, -math.inf, math.nan])
    role = facts.ROLES[role]
    x = x.abs() if role.divisor else x
    codes, absmax = encode(x, codec, role.name)
    finite = x.nan_to_num(nan=0.0)
    scale = finite.abs().unflatten(0, (40, 1)).squeeze(1)
    blocks = torch.nn.functional.pad(scale, (0, 24)).view(40, 4, 256).amax(-1)
    assert torch.equal(absmax, blocks)
    normalised = finite.double() / blocks.repeat_interleave(256, 1)[:, :1000]
    values = values_of(codec, role.name).double()
    table = values.sort().values
    place = torch.searchsorted(table, normalised).clamp(1, 255)
    nearest = torch.minimum((normalised - table[place - 1]).abs(), (table[place] - normalised).abs())
    chosen = values[numbers(codes)]
    if role.divisor:
        assert bool((chosen[x > 0] > 0).all()), "a positive number has become 0"
        kept = (x > 0) & (chosen == table[table > 0].min())
        nearest = torch.where(kept, (normalised - chosen).abs(), nearest)
    assert bool(((chosen - normalised).abs() <= nearest + 4e-7 * normalised.abs() + 1e-9).all())


@on_every_backend
@every_codec
@pytest.mark.parametrize("rule", [rule.name for rule in facts.RULES.values() if rule.states])
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_a_step_on_codes_is_one_on_their_values(rule, codec, flat):
    """Decoded, stepped in fp32 and encoded: the same bits, elements included that are left alone."""
    plain = random_group(rule, SHAPES, bits=32, dtype=DTYPES[1], grad_dtype=torch.float32, steps=(0, 1, 999))
    plain.grads[0].view(-1)[::5] = math.inf
    coded, states = plain.clone(), facts.RULES[rule].states
    for state in states:
        pairs = [encode(x, codec, state.role.name, flat) for x in plain.states[state.name]]
        coded.states[state.name], coded.absmax[state.name] = map(list, zip(*pairs, strict=True))
        plain.states[state.name] = [
            torch.ops.bnbops.decode_state(codes, absmax, codec, state.role.name) for codes, absmax in pairs
        ]
    plain.step()
    coded.step(None, codec=codec)
    assert all(map(torch.equal, coded.params, plain.params)) and coded.steps == plain.steps
    for state in states:
        for x, codes, absmax in zip(*(group[state.name] for group in lists(plain, coded)), strict=True):
            expected, scales = encode(x, codec, state.role.name, flat)
            assert torch.equal(numbers(codes), numbers(expected)) and torch.equal(absmax, scales)


def lists(plain: Group, coded: Group) -> tuple[dict[str, list[Tensor]], ...]:
    return plain.states, coded.states, coded.absmax
