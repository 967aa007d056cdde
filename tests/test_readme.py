"""README：每个数字有来历并与 results/ 一致，命令里的选项都有，链接和锚点都通。只读文件，不训练。"""

import contextlib
import importlib
import io
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT

import a100_train
import doctor

sys.path.insert(0, str(ROOT / "docs"))
import readme_numbers

README = (ROOT / "README.md").read_text("utf-8")
PAGES = ["README.md", "README.en.md", "CONTRIBUTING.md"]
DEMO = {name: defaults[-1] for name, _, _, *defaults in a100_train.SETTINGS}
FULL = {name: defaults[0] for name, _, _, *defaults in a100_train.SETTINGS}
# 别的程序的选项：pip、torchrun
OTHERS = {"index-url", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}


def commands():
    """README 的命令块里的每一条命令：[(脚本, 参数)]。"""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.splitlines():
            for part in re.split(r"&&", re.sub(r"\s#.*", "", line)):
                words = shlex.split(part)
                scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
                if scripts:
                    found.append((words[scripts[0]], words[scripts[0] + 1:]))
    return found


def help_of(script, arguments=()):
    """`python script 参数 --help` 的退出码和文字；在本进程里跑，省去导入。"""
    for folder in ("benchmarks", "docs"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    module, old = importlib.import_module(script.rpartition("/")[2][:-3]), sys.argv
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")          # 脚本会对它 reconfigure
    sys.argv = [script, *arguments, "--help"]
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(out),
              pytest.raises(SystemExit) as exit):
            module.main()
    finally:
        sys.argv = old
    out.flush()
    return exit.value.code, out.buffer.getvalue().decode()


def options_in(text):
    return set(re.findall(r"--(?:\[no-\])?([a-z][\w-]*)", text))


def slug(heading):
    """GitHub 给标题起的锚点。"""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_two_commands():
    """.ci/run 从 README 里取这两条命令。"""
    found = re.findall(r"^(pip install -r requirements(?:-dev)?\.txt && .*?)\s*(?:#.*)?$", README, re.M)
    assert found == ["pip install -r requirements.txt && python a100_train.py --preset demo",
                     "pip install -r requirements-dev.txt && python -m pytest"]


@pytest.mark.parametrize("script", sorted({script for script, _ in commands()} - {"space/app.py"}))
def test_commands_are_accepted(script):
    """选项都在 --help 里，值的类型和范围也对（argparse 走到最后的 --help 才停）。"""
    for arguments in [arguments for name, arguments in commands() if name == script]:
        code, text = help_of(script, arguments)
        assert code == 0, (script, arguments, text)
        assert options_in(" ".join(arguments)) <= options_in(text), (script, arguments)


def test_options_named_in_the_text_exist():
    scripts = "".join(path.read_text("utf-8") for folder in (".", "benchmarks", "space", "scale", "docs")
                      for path in (ROOT / folder).glob("*.py"))
    known = OTHERS | set(re.findall(r'"--(\w+)"', scripts))
    known |= set(re.findall(r'^    \("(\w+)", ', scripts, re.M))
    named = {name.removeprefix("no-") for name in options_in(README)}
    assert named <= known, named - known


def test_numbers_come_from_results():
    assert readme_numbers.problems(README) == []


def test_numbers_without_source_fail():
    """这个检查自己会失败：没有来历的、与文件不同的、没有印出来的。"""
    mark = "<!-- 出处 results/processes.json median_ratio={} -->"
    assert readme_numbers.problems("训练用了 3.7 小时。") != []
    assert readme_numbers.problems("训练用了 3.7 小时，未测。") == []
    assert readme_numbers.problems("快 1.50 倍。 " + mark.format("1.50")) == []
    assert readme_numbers.problems("快 1.60 倍。 " + mark.format("1.60")) != []
    assert readme_numbers.problems("快得多。 " + mark.format("1.50")) != []
    assert readme_numbers.problems("| 乱写的续写 <!-- 续写 0 教育的目的 --> |") != []


def test_update_replaces_only_the_demo(monkeypatch):
    text = ("外面 8.44。\n<!-- demo:begin -->\n损失 8.44，1,350 步。 "
            "<!-- 出处 results/demo/train_log.jsonl 0.eval_loss=8.44 -->\n<!-- demo:end -->\n")
    monkeypatch.setattr(readme_numbers, "look_up", lambda name, path: 8.61)
    expected = text.replace("损失 8.44", "损失 8.61").replace("loss=8.44", "loss=8.61")
    assert readme_numbers.updated(text) == expected


def test_arithmetic():
    """参数、每步的 token、运算次数，与脚本里的设置和公式一致。"""
    width, layers = FULL["n_embd"], FULL["n_layer"]
    vocabulary, context = FULL["vocab_size"], FULL["block_size"]
    layer = 12 * width**2 + 13 * width
    total = vocabulary * width + context * width + layers * layer + 2 * width
    for number in (vocabulary * width, context * width, layer, layers * layer, total):
        assert f"{number:,}" in README
    assert total == 82_066_944
    tokens = FULL["effective_batch_size"] * context
    flops = 6 * (total - context * width) + 12 * layers * width * context
    assert f"{tokens:,}" in README and f"{flops / 1e8:.2f} 亿次" in README
    assert f"{11_838 * tokens / 1e8:.1f} 亿 token" in README
    assert f"{11_838 * tokens * flops / 1e17:.1f} × 10¹⁷" in README
    assert f"{a100_train.learning_rate_scale(1000, 11_838):.3f} 倍" in README


def test_memory_table():
    rows = re.findall(r"^\| (\d+) \| ((?:[\d.]+ \| ){6})([\d.]+) \| (\d+) GB", README, re.M)
    assert len(rows) == 5
    for size, parts, total, card in rows:
        need = [part / 2**30 for part in doctor.memory_needed(int(size)).values()]
        assert parts == "".join(f"{part:.2f} | " for part in need)
        assert total == f"{sum(need):.1f}" and sum(need) < int(card)


def test_committed_demo_used_the_current_preset():
    config = json.loads((ROOT / "results/demo/config.json").read_text("utf-8"))
    for key in ("n_layer", "n_embd", "n_head", "block_size", "effective_batch_size", "max_steps",
                "vocab_size"):
        assert config[key] == DEMO[key], key
    table = (ROOT / "generation_samples.md").read_text("utf-8")
    for line in (ROOT / "results/demo/samples.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        assert f"| {row['step']} | {row['eval_loss']:.3f} | **{row['prompt']}**" in table


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors(page):
    text = (ROOT / page).read_text("utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target.partition("#")[0]).exists(), target


def test_size_and_what_is_gone():
    assert README.count("\n") <= 450 and len(README.encode("utf-8")) <= 60_000
    gone = ("FSDP", "fsdp", "shutdown_when_done", "near_dedup", "normalize ", "skip_cleaning",
            "download_corpus")
    assert not [word for page in PAGES for word in gone if word in (ROOT / page).read_text("utf-8")]
