#!/usr/bin/env python3
"""由 results/recipe/scaling/ 的日志写 results/recipe/README.md 和 scaling.png：最优学习率随宽度、批量、步数的变化，外推，真实大小的曲线。

    python benchmarks/width_report.py

最优：在 log2(学习率) 上给最低点两侧的几个点配一条抛物线，取顶点；范围是给每个点加上种子那样大的噪声、重配 1,000 次得到的
16%–84%。最低点在扫过的边上时不外推，只说“不小于”或“不大于”。
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from common import ROOT, read_lines, write_atomic

RESULTS = ROOT / "results" / "recipe"
TARGET = dict(width=768, batch=98_304, steps=11_838)     # 完整训练；步数是公开参考的
FIELDS = ("width", "layers", "vocab", "batch", "steps", "schedule", "warmup", "beta2", "vectors", "precision")
DRAWS = 1000
PUBLISHED = [(524_288, 3.6e-3, "modded-nanogpt\n124M, 词向量共享")]     # (token/步, AdamW 部分的学习率, 出处)


# ==== 1. 读日志 ====

def load(folder):
    """每个试验一个 dict：第一行的设置，加上 rows（逐次验证）和 bits（最后的每字比特，发散的是 inf）。"""
    runs = []
    for path in sorted(folder.glob("*.jsonl")):
        header, *rows = read_lines(path)
        runs.append(header | {"rows": rows, "bits": rows[-1].get("bits_per_char", math.inf)})
    return runs


def curves(runs, swept):
    """{其余设置: {swept 的值: [各种子的每字比特]}}；swept 是 rate 或 muon。"""
    result, other = {}, "muon" if swept == "rate" else "rate"
    for run in runs:
        key = tuple((name, run[name]) for name in (*FIELDS, other))
        result.setdefault(key, {}).setdefault(run[swept], []).append(run["bits"])
    return {key: dict(sorted(curve.items())) for key, curve in result.items()}


def seed_noise(runs):
    """同样设置、不同种子的每字比特的标准差（各组合并）；共同的起落先减去：比较学习率时种子是同一个。"""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in (*FIELDS, "muon")), {}).setdefault(run["rate"], {})[
            run["seed"]] = run["bits"]
    squares = []
    for curve in groups.values():
        pairs = [points[43] - points[42] for points in curve.values() if {42, 43} <= points.keys()]
        if len(pairs) > 1:
            squares.append((np.var(pairs, ddof=1) / 2, len(pairs) - 1))
    return math.sqrt(sum(v * n for v, n in squares) / sum(n for _, n in squares)) if squares else 0.01


# ==== 2. 最优学习率和它的误差 ====

def vertex(x, y):
    """最低点左右至多各两个点配抛物线，返回顶点的 x；开口不向上就返回最低的点。"""
    lowest = int(np.argmin(y))
    near = slice(max(0, lowest - 2), lowest + 3)
    a, b, _ = np.polyfit(x[near] - x[lowest], y[near], 2)
    return float(np.clip(x[lowest] - b / (2 * a) if a > 0 else x[lowest], x[0] - 1, x[-1] + 1))


def fit_optimum(rates, bits, noise, seed=0):
    """返回 {"best", "low", "high", "edge"}：最优学习率、16%–84% 范围，edge 是 "<"、">"（最低点在边上）或 ""。"""
    pairs = [(math.log2(rate), value) for rate, value in zip(rates, bits, strict=True) if math.isfinite(value)]
    x, y = map(np.array, zip(*sorted(pairs), strict=True))
    lowest = int(np.argmin(y))
    edge = "<" if lowest == 0 else ">" if lowest == len(x) - 1 else ""
    if edge or len(x) < 3:
        return {"best": 2 ** x[lowest], "low": 2 ** (x[lowest] - 1), "high": 2 ** (x[lowest] + 1), "edge": edge or "?"}
    rng = np.random.default_rng(seed)
    draws = [vertex(x, y + noise * rng.standard_normal(len(y))) for _ in range(DRAWS)]
    low, high = np.percentile(draws, [16, 84])
    return {"best": 2 ** vertex(x, y), "low": 2**low, "high": 2**high, "edge": ""}


def fit_laws(optima, variables):
    """log2(最优) = 常数 + Σ 指数 × log2(变量)，加权最小二乘。optima：[(设置 dict, fit_optimum 的结果)]。

    返回 (系数, 协方差)；权重来自各个最优的范围，至少 ±0.15 个 log2，免得一条碰巧很尖的曲线说了算。
    """
    rows = [[1, *(math.log2(settings[name]) for name in variables)] for settings, _ in optima]
    sigma = [max(0.15, math.log2(o["high"] / o["low"]) / 2) for _, o in optima]
    design = np.array(rows) / np.array(sigma)[:, None]
    target = np.array([math.log2(o["best"]) for _, o in optima]) / sigma
    covariance = np.linalg.inv(design.T @ design)
    return covariance @ design.T @ target, covariance


def predict(law, settings, variables):
    """外推：(最优, 低, 高)，范围只含拟合的误差，不含“这条律在这么远还成立吗”。"""
    coefficients, covariance = law
    row = np.array([1, *(math.log2(settings[name]) for name in variables)])
    center, sigma = row @ coefficients, math.sqrt(row @ covariance @ row)
    return tuple(2 ** (center + k * sigma) for k in (0, -1, 1))


# ==== 3. 表 ====

def describe(settings):
    """一条曲线的设置，写成一句话；与缺省相同的不写。"""
    s = dict(settings)
    text = f"{s['width']} 维 × {s['layers']} 层，{s['batch']:,} token/步，{s['steps']} 步"
    extra = [(s["vocab"] != 8000, f"词表 {s['vocab']:,}"), (s.get("muon") == 0, "只用 AdamW"),
             (s["precision"] != "bf16", s["precision"]), (s["vectors"] != 1, f"LayerNorm、偏置 × {s['vectors']:g}")]
    return "，".join([text, *(words for true, words in extra if true)])


def show(optimum):
    if optimum["edge"]:
        return {"<": "≤ ", ">": "≥ "}.get(optimum["edge"], "") + f"{optimum['best']:.1e}（在边上）"
    return f"**{optimum['best']:.1e}**（{optimum['low']:.1e}–{optimum['high']:.1e}）"


def optimum_table(runs, swept, noise):
    """一条曲线一行：各学习率的每字比特和最优。返回 (表的几行, [(设置, 最优)])；不到三个值的曲线只列不配。"""
    lines, optima = [], []
    for key, curve in sorted(curves(runs, swept).items()):
        settings = dict(key)
        if len(curve) < 2 or settings["layers"] == 8 or (swept == "muon" and 0 in curve):
            continue
        means = {rate: float(np.mean(bits)) for rate, bits in curve.items()}
        best = fit_optimum(means, means.values(), noise)
        cells = "，".join(f"{rate:g}：{value:.3f}" if math.isfinite(value) else f"{rate:g}：发散"
                         for rate, value in means.items())
        seeds = max(map(len, curve.values()))
        fixed = f"；矩阵 {settings['muon']:g}" if swept == "rate" and settings["muon"] else ""
        fixed = f"；AdamW 部分 {settings['rate']:g}" if swept == "muon" else fixed
        lines.append(f"| {describe(key)}{fixed} | {cells}{f'（{seeds} 个种子）' if seeds > 1 else ''} | {show(best)} |")
        optima.append((settings, best))
    return lines, optima


def full_table(runs):
    """真实大小：每个配方一行，各验证点的每字比特。"""
    full = sorted((r for r in runs if r["layers"] == 8), key=lambda r: (r["steps"], r["bits"]))
    lines = []
    for run in full:
        points = "，".join(f"{row['tokens'] / 1000:.0f}k：{row['bits_per_char']:.3f}" for row in run["rows"]
                          if "bits_per_char" in row)
        lines.append(f"| {recipe_name(run)} | {run['seed']} | {run['steps']} | **{run['bits']:.3f}** | "
                     f"{run['rows'][-1].get('eval_loss', math.nan):.3f} | {points} |")
    return lines


def recipe_name(run):
    if run["muon"]:
        return f"Muon {run['muon']:g} + AdamW {run['rate']:g}，线性"
    return f"AdamW {run['rate']:g}，" + ("余弦、预热 17 %、β2 0.999（公开参考）" if run["schedule"] == "cosine" else "线性")


def select(optima, **fixed):
    """挑出设置与 fixed 相同、不在边上、其余都是缺省（Muon、bf16、词表 8,000）的最优。"""
    fixed = dict(layers=2, vocab=8000, precision="bf16", vectors=1.0, schedule="linear", muon=0.02) | fixed
    return [(s, o) for s, o in optima if not o["edge"] and all(s.get(k) == v for k, v in fixed.items())]


def laws(optima):
    """宽度、批量、长度各自的指数（每种只让一个变），和三个合起来的外推。"""
    base = dict(width=192, batch=2048, steps=160)
    parts = {name: select(optima, **{k: v for k, v in base.items() if k != name}) for name in base}
    found = {name: fit_laws(points, [name]) for name, points in parts.items() if len(points) > 1}
    return parts, found
