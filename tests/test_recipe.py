"""benchmarks/width.py、width_report.py：最优学习率的拟合、外推，和一个真的跑完的小试验。"""

import shutil
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import width
import width_report

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]


def parabola(best, height=5.0):
    return [height + 0.03 * np.log2(rate / best) ** 2 for rate in RATES]


def test_fit_finds_the_vertex_between_the_points():
    optimum = width_report.fit_optimum(RATES, parabola(5e-3), noise=0.003)
    assert optimum["best"] == pytest.approx(5e-3, rel=1e-6) and optimum["edge"] == ""
    assert optimum["low"] < 5e-3 < optimum["high"] < 8e-3
    noisier = width_report.fit_optimum(RATES, parabola(5e-3), noise=0.02)
    assert noisier["high"] / noisier["low"] > optimum["high"] / optimum["low"]


def test_fit_says_when_the_lowest_point_is_at_the_edge():
    assert width_report.fit_optimum(RATES, parabola(1e-4), 0.01)["edge"] == "<"
    assert width_report.fit_optimum(RATES, parabola(1.0), 0.01)["edge"] == ">"
    diverged = parabola(5e-3)[:-1] + [float("inf")]
    assert width_report.fit_optimum(RATES, diverged, 0.003)["best"] == pytest.approx(5e-3, rel=1e-6)


def test_laws_recover_their_exponents():
    optima = []
    for wide, batch in ((192, 2048), (384, 2048), (768, 2048), (192, 512), (192, 8192)):
        best = 1e-2 * (wide / 192) ** -0.5 * (batch / 2048) ** 0.3
        optimum = {"best": best, "low": best / 1.1, "high": best * 1.1}
        optima.append(({"width": wide, "batch": batch}, optimum))
    law = width_report.fit_laws(optima, ["width", "batch"])
    assert law[0][1:] == pytest.approx([-0.5, 0.3])


def test_shift_borrows_the_curvature_of_the_base():
    """对照只有两个点：顶点低一半（log2 移动 -1）也认得出来。"""

    def run(rate, layers, best):
        settings = dict.fromkeys(width_report.FIELDS) | vars(width.Trial(rate=rate, layers=layers))
        return settings | {"bits": 5 + 0.03 * np.log2(rate / best) ** 2}

    runs = [run(rate, 2, 4e-3) for rate in RATES] + [run(rate, 8, 2e-3) for rate in RATES[:2]]
    moved, sigma = width_report.shift(runs, 0.003, layers=8)
    assert moved == pytest.approx(-1) and 0 < sigma < 0.2
    assert width_report.shift(runs, 0.003, vocab=32_000) is None


def test_learning_rate_rises_then_falls():
    trial = width.Trial(rate=1e-2, steps=100)
    scales = [width.learning_rate_scale(trial, step) for step in range(101)]
    assert scales[0] == pytest.approx(0.2) and max(scales) == 1 and scales[100] == 0
    cosine = width.learning_rate_scale(replace(trial, schedule="cosine"), 52)
    assert 0.5 < cosine < 0.51  # 预热后剩下的 95 步走到一半


def test_small_trial_learns_and_is_not_run_twice(work_dir, tmp_path, capsys):
    shutil.copytree(work_dir, tmp_path / "v1500")
    trial = width.Trial(rate=8e-3, width=64, layers=1, vocab=1500, batch=512, steps=6, precision="fp32")
    assert width.run_trial(trial, tmp_path, tmp_path / "logs", None)
    (run,) = width_report.load(tmp_path / "logs")
    assert [row["step"] for row in run["rows"]] == [0, 6] and run["bits"] < run["rows"][0]["bits_per_char"]
    model, *_ = width.build(trial, work_dir)
    assert run["parameters"] == sum(p.numel() for p in model.parameters())
    assert not width.run_trial(trial, tmp_path, tmp_path / "logs", None)


def test_committed_logs_are_what_their_names_say():
    runs = width_report.load(width_report.RESULTS / "scaling")
    assert len(runs) > 20
    for run in runs:
        trial = width.Trial(**{field.name: run[field.name] for field in fields(width.Trial)})
        assert trial.name == run["name"] and width.parameters(trial) == run["parameters"]
        assert run["rows"][-1]["step"] == trial.steps or "error" in run["rows"][-1]
    full = {run["muon"]: run["bits"] for run in runs if run["parameters"] == 82_066_944 - 768 * 768}
    assert full[0.02] < full[0]  # 真实大小上，Muon 好于 AdamW
