"""README：每个数字有来历并与 results/ 一致，命令里的选项都有，链接和锚点都通；几秒钟的命令真的跑一遍。不训练。"""

import contextlib
import importlib
import io
import json
import re
import shlex
import sys

import pytest
import tiny_run
from conftest import ROOT, call, defaults

import a100_train
import doctor

sys.path.insert(0, str(ROOT / "docs"))
import readme_numbers

README = (ROOT / "README.md").read_text("utf-8")
PAGES = ["README.md", "README.en.md", "CONTRIBUTING.md", "docs/free_cards.md"]
DEMO = vars(defaults("demo"))
FULL = vars(defaults("full"))
# 别的程序的选项：pip、torchrun；argparse 自己的
OTHERS = {"help", "index-url", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}


def commands(page="README.md"):
    """一页里的每一条命令：[(脚本, 参数)]。命令块里的，和行内的 `python ……`。"""
    found = []
    text = (ROOT / page).read_text("utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    for line in lines + re.findall(r"`(python [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        for part in re.split(r"&&|;", re.sub(r"(?:^|\s)#.*", "", line)):
            words = shlex.split(part)
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if scripts and "pytest" not in words:
                found.append((words[scripts[0]], words[scripts[0] + 1 :]))
    return found


COMMANDS = [command for page in PAGES for command in commands(page)]
QUICK = ("generate.py", "publish.py", "plot_loss.py")  # 在 tiny_run 的模型上几秒钟就跑完，不联网


def help_of(script, arguments=()):
    """`python script 参数 --help` 的退出码和文字；在本进程里跑，省去导入。"""
    for folder in ("benchmarks", "docs", "docs/figures"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    module = importlib.import_module(script.rpartition("/")[2][:-3])
    old = sys.argv
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # 脚本会对它 reconfigure
    sys.argv = [script, *arguments, "--help"]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            pytest.raises(SystemExit) as exit,
        ):
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
    assert found == [
        "pip install -r requirements.txt && python a100_train.py --preset demo",
        "pip install -r requirements-dev.txt && python -m pytest",
    ]


@pytest.mark.parametrize("script", sorted({script for script, _ in COMMANDS} - {"space/app.py"}))
def test_commands_are_accepted(script):
    """选项都在 --help 里，值的类型和范围也对（argparse 走到最后的 --help 才停）。"""
    for arguments in [arguments for name, arguments in COMMANDS if name == script]:
        code, text = help_of(script, arguments)
        assert code == 0, (script, arguments, text)
        assert options_in(" ".join(arguments)) <= options_in(text), (script, arguments)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """当前目录里有训练好的 gpt2-chinese/，README 里提到的别的名字都指向它。"""
    tiny_run.make(tmp_path / "gpt2-chinese")
    for name in ("my-run", "run-a", "run-b"):
        (tmp_path / name).symlink_to(tmp_path / "gpt2-chinese")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quick_commands_run(trained, monkeypatch, capfd):
    """续写、画图、上传（只看不传）：原样跑，不出错，有输出。"""
    done = set()
    for script, arguments in COMMANDS:
        if script in QUICK and not any("Wilsonwin" in argument for argument in arguments):
            module = importlib.import_module(script[:-3])
            if hasattr(module, "WORK_DIR"):
                monkeypatch.setattr(module, "WORK_DIR", "gpt2-chinese")
            dry = ["--dry_run"] if script == "publish.py" and "--dry_run" not in arguments else []
            call(module, *arguments, *dry)
            done.add(script)
            assert capfd.readouterr().out.strip() or "--output" in arguments, (script, arguments)
    assert done == set(QUICK) and (trained / "compare.png").stat().st_size > 10_000


def test_python_snippets_run(trained, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    assert snippets and "中国的历史" in capsys.readouterr().out


def test_memory_table_is_what_doctor_prints(capsys):
    call(doctor, "--memory_table")
    assert "40 GB" in capsys.readouterr().out


def test_options_named_in_the_text_exist():
    scripts = "".join(
        path.read_text("utf-8")
        for folder in (".", "benchmarks", "space", "scale", "docs")
        for path in (ROOT / folder).glob("*.py")
    )
    known = OTHERS | set(re.findall(r'"--(\w+)"', scripts))
    known |= set(re.findall(r'^    \("(\w+)", ', scripts, re.M))
    named = {name.removeprefix("no-") for name in options_in(README)}
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES[:2])
def test_numbers_come_from_results(page):
    assert readme_numbers.problems((ROOT / page).read_text("utf-8")) == []


def test_numbers_without_source_fail():
    """这个检查自己会失败：没有来历的、与文件不同的、没有印出来的。"""
    mark = "<!-- 出处 results/processes.json median_ratio={} -->"
    assert readme_numbers.problems("训练用了 3.7 小时。") != []
    assert readme_numbers.problems("训练用了 3.7 小时，未测。") == []
    assert readme_numbers.problems("快 1.50 倍。 " + mark.format("1.50")) == []
    assert readme_numbers.problems("快 1.60 倍。 " + mark.format("1.60")) != []
    assert readme_numbers.problems("快得多。 " + mark.format("1.50")) != []
    assert readme_numbers.problems("| 乱写的续写 <!-- 续写 0 教育的目的 --> |") != []


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.py")))
def test_marked_numbers_in_scripts(name):
    """脚本里写着“出处 results/…”的数，与那里的相同。"""
    text = (ROOT / name).read_text("utf-8")
    assert readme_numbers.script_problems(text) == []
    if name == "train_tokenizer.py":
        assert text.count("出处 results/") >= 3
        assert readme_numbers.script_problems(text.replace("8.6 %", "6.9 %")) != []
        assert readme_numbers.script_problems(text.replace("unk_rate=8.6%", "unk_rate=6.9%")) != []


def test_update_replaces_what_has_a_source(monkeypatch):
    """同一段里的换，别的段里同样的数不动；百分数的空格也认得。"""
    text = (
        "外面 8.44。\n\n损失 8.44，1,350 步，占 8.4 %。 "
        "<!-- 出处 results/demo/train_log.jsonl 0.eval_loss=8.44 0.share=8.4% -->\n"
    )
    monkeypatch.setattr(readme_numbers, "look_up", lambda name, path: 0.086 if "share" in path else 8.61)
    expected = (
        "外面 8.44。\n\n损失 8.61，1,350 步，占 8.6%。 "
        "<!-- 出处 results/demo/train_log.jsonl 0.eval_loss=8.61 0.share=8.6% -->\n"
    )
    assert readme_numbers.updated(text) == expected


def test_committed_readme_is_up_to_date():
    assert readme_numbers.updated(README) == README


def test_keys_with_dots_and_missing_keys():
    name = "results/repetition.json"
    assert readme_numbers.look_up(name, "mean.采样，重复惩罚␣1.1（generate.py␣的默认）.distinct_2") > 0.9
    with pytest.raises(SystemExit, match="错误：.*没有 mean.没有这个"):
        readme_numbers.look_up(name, "mean.没有这个")


def test_arithmetic():
    """参数、每步的 token、运算次数，与脚本里的设置和公式一致。"""
    width = FULL["n_embd"]
    layers = FULL["n_layer"]
    vocabulary = FULL["vocab_size"]
    context = FULL["block_size"]
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
    for key in (
        "n_layer",
        "n_embd",
        "n_head",
        "block_size",
        "effective_batch_size",
        "max_steps",
        "vocab_size",
    ):
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
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_size_and_what_is_gone():
    assert README.count("\n") <= 500 and len(README.encode("utf-8")) <= 60_000
    gone = (
        "FSDP",
        "fsdp",
        "shutdown_when_done",
        "near_dedup",
        "normalize ",
        "skip_cleaning",
        "download_corpus",
    )
    assert not [word for page in PAGES for word in gone if word in (ROOT / page).read_text("utf-8")]


def test_the_terminal_in_the_text_is_a_recorded_one():
    """第一屏里“它在终端里这样印”的每一行都在记录里；省略号后面的不算。"""
    block = re.search(r"```text\n(第 1 步，共 4 步.*?)```", README, re.S)[1]
    recorded = (ROOT / "results/demo/terminal.txt").read_text("utf-8").splitlines()
    for line in block.splitlines():
        beginning = line.removesuffix("……")
        assert any(other.startswith(beginning) for other in recorded), line
