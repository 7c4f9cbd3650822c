"""References in configs stand for the values of other keys."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from tamingfast import UserError
from tamingfast.checkpoints.config import plain


@pytest.mark.parametrize(
    "text",
    [
        "{a: 1, b: '${a}'}", "{a: {b: [1, {c: x}]}, d: '${a.b[1].c}', e: '${a.b.0}', f: '${a[b][1][c]}'}",
        "{a: {b: 1, c: '${.b}', d: {e: '${..b}'}}}", "{a: 3, b: 'x${a}y${a}'}", "{a: [1], b: '${a}', c: '${b}'}",
        "{a: {x: 1}, k: x, b: '${a.${k}}'}", "{a: null, b: 't${a}', c: '${a}'}", "{a: true, b: '${ a }'}",
        "{a: 1.5, b: '${a}', c: [{d: '${b}'}]}", "{a: '???', b: 2}",
    ],
)  # fmt: skip
def test_the_values_are_those_of_omegaconf(text):
    config = OmegaConf.create(text)
    assert plain(config) == OmegaConf.to_container(config, resolve=True)
    for key in config:
        child = config._get_node(key)
        if OmegaConf.is_config(child) and not child._is_interpolation():
            assert plain(child) == OmegaConf.to_container(child, resolve=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{a: {b: '${c.d}'}}", r"a\.b: got '\$\{c\.d\}', which refers to nothing, .*add c\.d"),
        ("{a: [1, '${a[7]}']}", r"a\.1: got .*refers to nothing"),
        ("{a: '${a}'}", "a: got .*leads back to itself"),
        ("{a: '${b}', b: ['${a}']}", "leads back to itself"),
        ("{a: {b: '${a}'}}", "leads back to itself"),
        ("{a: '${...b}'}", "refers to nothing"),
    ],
)
def test_references_that_lead_nowhere(text, said):
    with pytest.raises(UserError, match=said):
        plain(OmegaConf.create(text))
