"""`tamingfast inspect`, `convert` and `info`."""

from __future__ import annotations

import json

import golden
import tiny
from commands import run

from tamingfast import cli, load_model, tasks
from tamingfast.data import build
from tamingfast.training import prior


class TestFiles:
    def test_inspect(self, capsys):
        assert run("inspect", golden.checkpoint("net2net_seg"), "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["values_by_part"]["cond_stage_model"] > 0 and facts["condition"] == "segmentation"

    def test_inspect_a_run_its_converted_file_and_the_tokens_it_learned(self, runs, tmp_path, capsys):
        def inspected(path):
            assert run("inspect", path, "--json") == 0
            return json.loads(capsys.readouterr().out)

        stage, converted, file = runs / "vqgan", tmp_path / "c.safetensors", tmp_path / "tokens.safetensors"
        data = tiny.CROPS
        assert tasks.encode(load_model(stage), build(data)[0], file) == 16
        settings = tiny.config(tiny.PRIOR, steps=2) | {"data": data}
        settings |= {"prior": {"condition": "none", "ordering": "z_curve"}}
        out = prior.train(settings, stage, tmp_path / "prior", device="cpu")
        facts, tokens = inspected(out), inspected(file)
        assert facts["global_step"] == 2 == inspected(out / "state.pt")["global_step"]
        assert facts["epoch"] is not None and facts["config"] == "beside the file"
        assert facts["size"] == tokens["size"] == "8x8"
        assert facts["model"].endswith("Net2NetTransformer") and facts["ordering"].endswith("ZCurve")
        assert facts["condition"] is None and facts["transformer"]["n_layer"] == 1 and facts["data"]["name"] == "photos"
        assert tokens["images"] == 16 and tokens["grid"] == [4, 4]
        assert "photographs" in tokens["data"]
        assert tokens["first_stage"] == facts["first_stage"] == inspected(stage)["first_stage"]
        assert run("convert", out, converted) == 0
        capsys.readouterr()
        again = inspected(converted)
        assert again["config"] == "in the file" and again["global_step"] is None
        same = ("model", "size", "data", "transformer", "first_stage", "ordering", "values_by_part")
        assert {name: again[name] for name in same} == {name: facts[name] for name in same}

    def test_convert(self, runs, tmp_path, capsys):
        out = tmp_path / "m.safetensors"
        assert run("convert", runs / "prior", out) == 0
        assert run("sample", out, "-n", 1, "--size", "8x8", "--out", tmp_path / "s.png") == 0
        assert run("convert", runs / "prior", tmp_path / "m.bin") == cli.USAGE_ERROR
        assert ".safetensors" in capsys.readouterr().err

    def test_info(self, capsys):
        assert run("info") == 0
        text = capsys.readouterr().out
        assert all(word in text for word in ("torch", "native", "triton", "gpu"))
