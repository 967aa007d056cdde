"""benchmarks/experiments.py：选项都认得，补丁做的是它说的，表和 docs/experiments.md 由提交的日志写成。"""

import argparse
import json
import re
import sys
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, call

import a100_train

sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import experiments
import patched_train

GUIDE = ROOT / "docs" / "experiments.md"
VARIANTS = [(name, variant) for name, variants in experiments.EXPERIMENTS.items() for variant in variants]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "GUIDE", tmp_path / "guide.md")
    for name in ("layers", "vocabulary", "recipe"):
        numbers = dict.fromkeys(experiments.EXPERIMENTS[name], 0.1) | {"base": 0.2}
        (tmp_path / f"{name}.json").write_text(json.dumps(numbers), encoding="utf-8")
    return tmp_path


def write_log(folder, name, bits, steps=400):
    rows = [
        {
            "command": "c",
            "commit": "abc",
            "machine": "m",
            "versions": "v",
            "date": "d",
            "tokens_per_step": 2048,
        },
        {"step": steps, "loss": 5.0},
        {"step": steps, "eval_loss": 5.1, "eval_bits_per_char": bits},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name,variant", VARIANTS)
def test_options_and_patches_of_every_variant_exist(results, monkeypatch, name, variant):
    options, patches = experiments.settle(name, variant)
    arguments = experiments.all_arguments(options)
    monkeypatch.setattr(sys, "argv", ["a100_train.py", *arguments])
    a100_train.read_settings()  # 不认得的选项，argparse 会退出
    for patch in patches:
        key = patch.partition("=")[0]
        assert patch in patched_train.PATCHES or key in patched_train.PATCHES or hasattr(a100_train, key)
    last = len(arguments) - arguments[::-1].index("--max_steps")
    assert arguments[arguments.index("--eval_steps") + 1] == arguments[last]


def test_steps_follow_the_measured_ratio(results):
    assert experiments.settle("layers", "1")[0] == ["--n_layer", "1", "--max_steps", "800"]
    assert experiments.settle("layers", "base") == ([], [])


def test_every_experiment_compares_with_the_demo():
    assert experiments.TITLES.keys() == experiments.EXPERIMENTS.keys()
    assert all("base" in variants for variants in experiments.EXPERIMENTS.values())


@pytest.mark.parametrize("name", ["context", "batch", "positions", "epochs"])
def test_equal_tokens(name):
    for variant in experiments.EXPERIMENTS[name]:
        words = experiments.all_arguments(experiments.settle(name, variant)[0])
        used = {"--block_size": "64", "--effective_batch_size": "32"}
        used |= dict(pairwise(words))
        steps = int(used["--max_steps"])
        assert steps * int(used["--block_size"]) * int(used["--effective_batch_size"]) == 400 * 32 * 64


def test_table_calls_what_is_inside_the_spread_no_effect(results):
    for seed, bits in ((42, 6.30), (43, 6.34), (44, 6.32)):
        write_log(results, f"base-s{seed}", bits)
        write_log(results, f"positions-none-s{seed}", bits + 0.03)
        write_log(results, f"epochs-ten-s{seed}", bits + 1)
    assert "没有（+0.030，在起伏 0.040 之内）" in experiments.table("positions")
    assert "| +1.000 |" in experiments.table("epochs")
    assert "**6.320**（6.300–6.340）" in experiments.table("epochs")
    assert experiments.table("optimizer") == ""  # 只跑过演示，没有可比的
    write_log(results, "batch-8-s42", 6.9)
    assert "只有一个种子" in experiments.table("batch")


def test_patches_do_what_they_say(monkeypatch, work_dir):
    for name in ("build_model", "BlockStream", "parameter_groups"):
        monkeypatch.setattr(a100_train, name, getattr(a100_train, name))
    config = json.loads((ROOT / "results" / "demo" / "config.json").read_text(encoding="utf-8"))
    patched_train.apply_patches(["positions=off", "blocks=tenth", "vectors=0.25"])
    model = a100_train.build_model(argparse.Namespace(**config))
    positions = model.transformer.wpe.weight
    assert positions.abs().max() == 0 and not positions.requires_grad
    groups = a100_train.parameter_groups(model, 0.016, 0.02)
    for group in groups:
        vectors = all(p.ndim < 2 for p in group["params"])
        assert (group["lr"] == 0.004) == vectors
    blocks = a100_train.BlockStream(work_dir / "packed" / "train.bin", 32, 200, 42)
    plain = a100_train.BlockStream.__base__(work_dir / "packed" / "train.bin", 32, 200, 42)
    used = [tuple(blocks[i]["input_ids"]) for i in range(200)]
    tenth = {tuple(plain[i]["input_ids"]) for i in range(20)}
    assert set(used) == tenth
    assert all(set(used[i : i + 20]) == tenth for i in range(0, 200, 20))  # 每遍恰好各一次
    assert used[:20] != used[20:40]


def test_a_variant_really_runs_and_is_not_run_again(results, work_dir, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    common.link_data(work_dir, work / "data-4500")
    tiny = "--preset demo --device cpu --no-snapshots --n_layer 1 --n_embd 32 --n_head 2 --max_steps 2"
    monkeypatch.setattr(experiments, "BASE", tiny)
    monkeypatch.setattr(sys, "argv", [])
    call(experiments, "positions", "--work_dir", work)
    head, *rows = common.read_lines(results / "positions-none-s42.jsonl")
    assert head["patches"] == ["positions=off"] and head["command"].startswith("python a100_train.py")
    assert str(tmp_path) not in json.dumps(head)
    assert rows[-1]["step"] == 2 and rows[-1]["eval_bits_per_char"] > 0
    assert "没有位置向量" in (results / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(experiments, "train", None)
    call(experiments, "positions", "--work_dir", work)  # 有日志的不再跑


def test_step_times_are_taken_in_turn(results, work_dir, tmp_path):
    common.link_data(work_dir, tmp_path / "work" / "data-4500")
    threads = torch.get_num_threads()
    experiments.measure_step_times("layers", tmp_path / "work", rounds=2)
    torch.set_num_threads(threads)
    report = json.loads((results / "layers.json").read_text(encoding="utf-8"))
    assert report["4"] > report["1"] > 0 and report["base"] > 0


def test_guide_shows_the_tables_of_the_committed_logs():
    """失败了就运行 python benchmarks/experiments.py --table，它也重写 docs/experiments.md 里的表。"""
    text = GUIDE.read_text(encoding="utf-8")
    shown = re.findall(r"<!-- 表 (\w+) -->\n\n(.*?)\n\n<!-- 表完 -->", text, re.S)
    assert len(shown) == len(set(name for name, _ in shown)) >= 2
    for name, table in shown:
        assert table == experiments.table(name), name
    for name, _ in shown:
        section = text[: text.index(f"<!-- 表 {name} -->")].rpartition("\n## ")[2]
        assert "你猜会怎样？" in section and "<details>" in section
