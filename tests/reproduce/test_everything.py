"""``tamingfast reproduce all`` on the smoke presets."""

from __future__ import annotations

import pytest
from commands import run

from tamingfast import cli, reproduce

#: Without the study that takes long.
IN_ALL = {name: about for name, about in reproduce.EXPERIMENTS.items() if name != "recipe"}


class TestAll:
    def test_index_links_every_report(self, everything):
        index = (everything / "report.md").read_text()
        assert sorted(path.name for path in everything.iterdir() if path.is_dir()) == sorted(IN_ALL)
        for name, about in IN_ALL.items():
            assert f"[{name}]({name}/report.md) | {about} |" in index
            assert (everything / name / "report.md").is_file()

    def test_what_is_finished_is_not_run_again(self, everything, monkeypatch):
        ran = []
        first, last = next(iter(IN_ALL)), list(IN_ALL)[-1]
        report = everything / last / "report.md"
        text = report.read_text()
        report.unlink()
        try:
            with monkeypatch.context() as patch:
                original = reproduce.run

                def noted(experiment, *rest):
                    if experiment == reproduce.ALL:
                        return original(experiment, *rest)
                    ran.append((experiment, rest[2:4]))
                    report.write_text(text)
                    return report

                patch.setattr(reproduce, "run", noted)
                words = ["--preset", "smoke", "--out", everything, "--resume", f"{last}.data.seed=3"]
                assert run("reproduce", "all", *words) == 0
        finally:
            report.write_text(text)
        assert ran == [(last, (["data.seed=3"], True))] and first != last

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["all", "--preset", "paper"], "one that all experiments have; orderings has cifar10, cpu, smoke"),
            (["all", "--preset", "smoke", "data.seed=1"], "expected EXPERIMENT.key=value"),
            (["all", "--preset", "smoke", "pixel.data.seed=1"], "did you mean 'pixels'"),
            (["al"], "did you mean 'all'"),
            (["all", "--preset", "smoke", "recipe.data.seed=1"], "expected EXPERIMENT.key=value"),
        ],
    )
    def test_mistakes_are_one_sentence(self, tmp_path, capsys, words, message):
        assert run("reproduce", *words, "--out", tmp_path / "out") == cli.USAGE_ERROR
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1

    def test_reports_are_not_overwritten(self, everything, capsys):
        assert run("reproduce", "all", "--preset", "smoke", "--out", everything) == cli.USAGE_ERROR
        assert "--resume" in capsys.readouterr().err
