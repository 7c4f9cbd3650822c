"""Training in several processes: torchrun's variables, what the processes share, and what happens when one is lost."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import runs
import shared_layers
import tiny
import torch
from forked import on_ranks, ranks

from tamingfast import UserError
from tamingfast.checkpoints import run_directory
from tamingfast.ranks import World, world

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: All that torchrun sets for one of two processes.
BOTH = {
    "WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}  # fmt: skip
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
NO_NUMBERS = ("-1", "two", "1.0", "1e0", "0x1", "1_0", "+1", "²", "9" * 5000, "$RANK")


def entered(monkeypatch, variables: dict[str, str]) -> World:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with world("cpu") as among:
        return among


class TestVariables:
    @pytest.mark.parametrize(
        "variables",
        [
            {},
            *({name: ""} for name in VARIABLES),
            dict.fromkeys(VARIABLES, ""),
            dict.fromkeys(VARIABLES, "  "),
            {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
            {"WORLD_SIZE": " 1 "},
            {"RANK": "0"},
            {"MASTER_ADDR": "nowhere", "MASTER_PORT": "text"},  # nobody is asked when there is one process
        ],
    )
    def test_alone(self, monkeypatch, variables):
        among = entered(monkeypatch, variables)
        assert (among.rank, among.size) == (0, 1)

    @pytest.mark.parametrize(
        ("name", "variables"),
        [
            *((name, {name: text}) for name in VARIABLES[:4] for text in NO_NUMBERS),
            *((name, {name: "1"}) for name in ("RANK", "LOCAL_RANK")),
            ("WORLD_SIZE", {"WORLD_SIZE": "0"}),
            ("WORLD_SIZE", {"WORLD_SIZE": "99999999999"}),
            ("LOCAL_WORLD_SIZE", {"LOCAL_WORLD_SIZE": "2"}),
            ("RANK", {"WORLD_SIZE": "2"}),
            *((name, {key: BOTH[key] for key in BOTH if key != name}) for name in NEEDED),
            *((name, BOTH | {name: ""}) for name in NEEDED),
            *((name, BOTH | {name: "2"}) for name in ("RANK", "LOCAL_RANK")),
            ("LOCAL_RANK", BOTH | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"}),
            *(("MASTER_PORT", BOTH | {"MASTER_PORT": text}) for text in (*NO_NUMBERS, "0", "65536")),
            *(("MASTER_ADDR", BOTH | {"MASTER_ADDR": text}) for text in ("no such host.invalid", "a" * 300, "::z")),
        ],
    )  # fmt: skip
    def test_refused_by_name(self, monkeypatch, name, variables):
        with pytest.raises(UserError, match=rf"^{name}: got .*, expected .*; .*torchrun") as error:
            entered(monkeypatch, variables)
        assert "\n" not in str(error.value)

    def test_the_others_do_not_come(self, monkeypatch):
        from datetime import timedelta

        from tamingfast import ranks as module

        monkeypatch.setattr(module, "_TO_JOIN", timedelta(seconds=1))
        with pytest.raises(UserError, match=r"^WORLD_SIZE: got no connection among 2 processes at MASTER_ADDR=127"):
            entered(monkeypatch, BOTH)


def test_what_layers_learn_from_their_inputs_is_the_same_on_all_processes():
    found = on_ranks(2, shared_layers.codebook)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    together = shared_layers.moved(*map(shared_layers.latents, range(2)))
    for one, expected in zip(found[0], together, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(*on_ranks(2, shared_layers.actnorm), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_first_learns_what_every_process_chose():
    assert on_ranks(2, shared_layers.every_table) == [[{"kernel": 0}, {"kernel": 1}]] * 2
    assert World(0, 1, torch.device("cpu")).each({"kernel": 5}) == [{"kernel": 5}]


def test_the_entropy_of_codes_is_that_of_all_processes():
    entropies, gradients = zip(*on_ranks(2, shared_layers.entropy), strict=True)
    value, gradient = shared_layers.entropy_of(torch.cat([shared_layers.latents(rank) for rank in range(2)], dim=1))
    np.testing.assert_allclose(np.mean(entropies), value, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(gradients) / 2, gradient, rtol=1e-3, atol=1e-7)


def test_a_silent_process_does_not_hold_the_others_for_ever():
    with pytest.raises(UserError, match="^RANK: got no answer from another of the 2 processes"):
        on_ranks(2, shared_layers.silent, patience=2.0)


class TestTwoProcesses:
    @pytest.fixture
    def config(self, tmp_path):
        """A model with a codebook of averages and a discriminator with a layer that its first batch sets."""
        config = tiny.config(tiny.VQGAN) | {"data": tiny.CROPS}
        config["model"]["target"] = "taming.models.vqgan.EMAVQ"
        config["model"]["params"]["lossconfig"]["params"] |= {"use_actnorm": True}
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(config))
        return path

    def test_a_resumed_run_equals_an_unbroken_one(self, config, tmp_path):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        for words in (
            runs.begin(config, whole, "training.steps=6"),
            runs.begin(config, parts, "training.steps=3"),
            runs.resume(parts, "training.steps=6"),
        ):
            for process in ranks(2, *words):
                assert process.outcome().code == 0
        runs.same_run(parts, whole)

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_lost_process_ends_the_others(self, config, tmp_path, lost):
        out = tmp_path / "run"
        both = ranks(2, *runs.begin(config, out, "training.steps=100000"))
        both[0].wait_until((out / run_directory.WEIGHTS).exists)
        both[lost].kill()
        code, error = both[1 - lost].outcome()
        assert code == 2, error
        said = [line for line in error.splitlines() if "error" in line]
        assert len(said) == 1 and "RANK: got no answer from another of the 2 processes" in said[0]
        assert "Traceback" not in error
        reached = run_directory.progress(out)["step"]
        for process in ranks(2, *runs.resume(out, f"training.steps={reached + 1}")):
            assert process.outcome().code == 0
        assert run_directory.progress(out)["step"] == reached + 1

    def test_a_process_that_stands_still_ends_the_others(self, config, tmp_path):
        out = tmp_path / "run"
        both = ranks(2, *runs.begin(config, out, "training.steps=100000"), silence=3.0)
        both[0].wait_until((out / run_directory.WEIGHTS).exists)
        both[1].kill(signal.SIGSTOP)
        code, error = both[0].outcome()
        both[1].kill()
        assert code == 2, error
        assert error.count("RANK: got no answer from another of the 2 processes (none for 3 seconds)") == 1
        assert "Traceback" not in error

    def test_the_first_one_refuses_for_all(self, config, tmp_path):
        out = tmp_path / "run"
        (holder,) = ranks(1, *runs.begin(config, out, "training.steps=100000"))
        holder.wait_until((out / run_directory.WEIGHTS).exists)
        outcomes = [process.outcome() for process in ranks(2, *runs.resume(out))]
        assert [each.code for each in outcomes] == [2, 2]
        assert f"{out}: got one that another process is writing" in outcomes[0].error
        assert "error" not in outcomes[1].error  # which has been said
        holder.kill(signal.SIGTERM)
        assert holder.outcome().code == 130
