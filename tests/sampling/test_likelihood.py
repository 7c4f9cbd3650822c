"""The likelihood of real tokens under each schedule."""

from __future__ import annotations

import pytest
import torch
from gpts import SHAPES, VOCAB, prior, tokens

from tamingfast.sampling.likelihood import negative_log_likelihood, tokens_per_token
from tamingfast.sampling.schedule import RULES, make_schedule


@torch.no_grad()
@pytest.mark.parametrize("per_call", [1, 8192])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_each_token_by_itself(gpt, rule, kind, per_call, monkeypatch):
    monkeypatch.setattr("tamingfast.sampling.likelihood.TOKENS_PER_CALL", per_call)
    image = tokens(2, 7, 9, seed=4)
    cond = tokens(*SHAPES[kind])
    nats = negative_log_likelihood(gpt, cond, image, window=4, schedule=rule, stride=2)
    plan = make_schedule(7, 9, 4, rule, 2)
    expected = torch.empty(2, 63)
    for run in plan.runs:
        cells = plan.cells(run)
        context = cond.flatten(1)[:, cells] if kind == "grid" else cond
        context = cond[:, run.row, run.column] if kind == "windows" else context
        for step in run.steps:
            sequence = torch.cat((context, image.flatten(1)[:, cells[:step]]), 1)
            log = gpt(sequence)[0][:, -1].log_softmax(-1)
            expected[:, cells[step]] = -log.gather(1, image.flatten(1)[:, cells[step], None])[:, 0]
    torch.testing.assert_close(nats, expected.view(2, 7, 9))


def test_probabilities_of_all_codes_sum_to_one(gpt):
    cond = tokens(1, 3).expand(6, -1)
    codes = torch.arange(6)[:, None, None]
    nats = negative_log_likelihood(prior(gpt, codes=6), cond, codes, window=4)
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-5)
    assert VOCAB > 6


def test_work_of_the_schedules():
    work = {rule: tokens_per_token(32, 32, 1, 16, rule, 8) for rule in RULES}
    assert work["block"] == work["strided"] < work["paper"] / 4
