"""README 里的数字都来自提交的日志或代码；两条命令原样可用。"""

import json
import re

from conftest import ROOT, read_jsonl

import a100_train
import doctor
import train_tokenizer

FULL, DEMO_PRESET = ({row[0]: row[column] for row in a100_train.SETTINGS} for column in (3, -1))

README = (ROOT / "README.md").read_text("utf-8")
DEMO = ROOT / "results" / "demo"
CONFIG = json.loads((DEMO / "config.json").read_text("utf-8"))
ROWS = read_jsonl(DEMO / "train_log.jsonl")
EVALS = [row for row in ROWS if "eval_loss" in row]


def test_two_commands():
    """.ci/run 从 README 里取这两条命令。"""
    commands = re.findall(r"^(pip install -r requirements(?:-dev)?\.txt && .*?)\s*(?:#.*)?$", README, re.M)
    assert commands == ["pip install -r requirements.txt && python a100_train.py --preset demo",
                        "pip install -r requirements-dev.txt && python -m pytest"]


def test_demo_figures_come_from_the_log():
    first, last = EVALS[0], EVALS[-1]
    assert f"{first['eval_loss']:.2f} → **{last['eval_loss']:.2f}** nat" in README
    assert f"{first['eval_bits_per_char']:.2f} → **{last['eval_bits_per_char']:.2f}**" in README
    assert f"{CONFIG['parameters']:,} 参数" in README and f"{last['step']:,} 步" in README
    assert f"只看词频 {CONFIG['unigram_entropy']:.2f}" in README
    seconds = [row["elapsed_seconds"] for row in ROWS if "elapsed_seconds" in row][-1]
    assert f"训练 {int(seconds // 60)} 分 {round(seconds % 60)} 秒" in README
    search = read_jsonl(ROOT / "results" / "demo_recipe.jsonl")
    demo = next(row for row in search if row["name"] == "demo")
    assert demo["bits_per_char"] == round(last["eval_bits_per_char"], 5)
    assert f"bigram 是 {demo['bigram_bits_per_char']:.2f}" in README
    assert last["eval_bits_per_char"] < demo["bigram_bits_per_char"]        # 要胜过这把标尺


def test_committed_demo_used_the_current_preset():
    preset = DEMO_PRESET | {"learning_rate": a100_train.LEARNING_RATES["demo"][0]}     # 演示用 Muon
    for key in ("n_layer", "n_embd", "n_head", "block_size", "effective_batch_size", "learning_rate",
                "max_steps", "vocab_size"):
        assert CONFIG[key] == preset[key], key


def test_committed_samples_are_the_same_run():
    table = (ROOT / "generation_samples.md").read_text("utf-8")
    for row in read_jsonl(DEMO / "samples.jsonl"):
        assert row["prompt"] in a100_train.PROMPTS
        assert f"| {row['step']} | {row['eval_loss']:.3f} | **{row['prompt']}**" in table


def test_full_model_figures():
    full = FULL
    assert (full["n_layer"], full["n_embd"], full["n_head"], full["block_size"]) == (8, 768, 12, 1024)
    assert full["effective_batch_size"] * full["block_size"] == 98_304 and "98,304" in README
    assert train_tokenizer.VOCAB_SIZE["full"] == 32_000 and "32,000 词块" in README


def test_processes_figures():
    measured = json.loads((ROOT / "results/processes.json").read_text("utf-8"))
    low, high = min(measured["ratios"]), max(measured["ratios"])
    assert f"**{measured['median_ratio']:.2f} 倍**（三次 {low:.2f} 到 {high:.2f}）" in README
    assert f"效率 {measured['efficiency']:.0%}".replace("%", " %") in README and measured["date"] in README


def test_data_preparation_figures():
    rows = json.loads((ROOT / "results/data_prep.json").read_text("utf-8"))["rows"]
    full = [row for row in rows if row["scale"] == "真实大小"]
    assert full[0]["input_documents"] == 1_260_765 and full[0]["text_mb"] > 2390
    for row in full:
        assert f"{row['seconds']:.1f} |" in README and f"| {row['peak_rss_mb']:,} MB |" in README
        assert row["peak_rss_mb"] <= 1500
    for row in full[:2]:
        assert f"| {row['text_mb'] / row['seconds']:.1f} | {row['peak_rss_mb']:,} MB |" in README
    corpus, pack, baseline = (row for row in rows if row["scale"] == "16x")
    for seconds in (corpus["seconds"] + pack["seconds"], baseline["seconds"]):
        assert f"{seconds:.1f} 秒" in README
    assert f"{baseline['peak_rss_mb']:,} MB" in README and f"{baseline['disk_mb']:,} MB" in README


def test_memory_table(capsys):
    doctor.print_memory_table()
    rows = re.findall(r"(\d+) GB +(\d+（[\d.]+ GB）) +(\d+（[\d.]+ GB）)", capsys.readouterr().out)
    assert len(rows) == 5
    for size, eight_bit, full in rows:
        assert f"| {size} GB | {eight_bit} | {full} |" in README


def test_every_option_in_the_readme_exists():
    scripts = "".join(path.read_text("utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
    others = {"index", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "help",
              "config_file", "num_processes", "repo"}                 # pip、torchrun、accelerate、hf
    for option in set(re.findall(r"--(?:\[no-\])?([a-z][a-z_\d]+)", README)) - others:
        assert f'"--{option}"' in scripts, option


def test_files_named_in_the_readme_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
