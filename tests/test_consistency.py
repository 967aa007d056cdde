"""脚本之间的约定：轻重和密度、互不导入、共用的函数一字不差、只走 Trainer 公开的门、没有只在 POSIX 上才有的调用。"""

import argparse
import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import plain_code
import pytest
from conftest import ROOT, environment

import a100_train
import prepare_corpus
import train_tokenizer

sys.path.insert(0, str(ROOT / "docs"))
import readme_numbers

EVENING = ["prepare_corpus.py", "train_tokenizer.py", "a100_train.py", "plot_loss.py"]
# 每个脚本至多多重（tests/plain_code.py 数的 token，与排版无关）；行数不限。三个脚本还没有瘦到该有的样子
# （prepare_corpus.py 3,700，a100_train.py 6,000，kaggle_pretrain_combined.py 6,800，四个脚本 13,200）：先不许再重
BUDGETS = {
    "prepare_corpus.py": 4_400,
    "train_tokenizer.py": 1_750,
    "a100_train.py": 7_400,
    "plot_loss.py": 1_750,
    "doctor.py": 2_900,
    "generate.py": 1_650,
    "publish.py": 1_600,
    "space/app.py": 4_300,
    "kaggle_pretrain_combined.py": 9_900,
}
EVENING_BUDGET = 15_350
# 每个逻辑行平均至多几个 token；九成的行至多几个；最长的一行；每 100 条语句里的条件表达式、并列赋值
MEAN, P90, LONGEST, CONDITIONALS, BUNDLES = 11.5, 22, 60, 4, 1
WIDER_MEAN = {"space/app.py": 12.5, "publish.py": 12.5, "doctor.py": 12.5}
README_CHARACTERS = 60_000
LINE_LIMIT, FUNCTION_LIMIT, SHARED_LIMIT = 110, 40, 40
TRACKED_LIMIT = 1_500_000  # 字节；只有 models/poem/ 可以更大
DATA_ENDINGS = (
    ".parquet",
    ".bin",
    ".arrow",
    ".pt",
    ".pth",
    ".safetensors",
    ".model",
    ".zip",
    ".xz",
    ".gz",
    ".zst",
)
SHARED = {"read_report": 3, "new_folder": 2, "run": 4}  # 函数：至少在几个脚本里
# 不许出现的调用：Windows 上没有，或者在那里报错
POSIX_ONLY = [
    "os.pread",
    "os.pwrite",
    "os.fork",
    "os.fsync",
    "os.setsid",
    "os.killpg",
    "os.getuid",
    "os.geteuid",
    "os.posix_fadvise",
    "os.sched_getaffinity",
    "os.uname",
    "signal.SIGKILL",
    "signal.SIGALRM",
    "signal.alarm",
    "signal.pause",
    "fcntl",
    "resource",
    "pwd",
    "grp",
    "termios",
]
SCRIPTS = list(BUDGETS)


def source(name):
    return (ROOT / name).read_text("utf-8")


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


# ==== 轻，而且平实 ====


@functools.cache
def counts(name):
    return plain_code.measure(ROOT / name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_weight(name):
    assert counts(name)["tokens"] <= BUDGETS[name]


def test_weight_of_the_evening():
    assert sum(counts(name)["tokens"] for name in EVENING) <= EVENING_BUDGET


@pytest.mark.parametrize("name", SCRIPTS)
def test_plain(name):
    """一行一个念头：密度、最长的一行、条件表达式、并列赋值，没有戏法。"""
    found = counts(name)
    assert found["mean"] <= WIDER_MEAN.get(name, MEAN) and found["p90"] <= P90, found
    assert found["longest"][0] <= LONGEST, found["longest"]
    assert found["conditionals"] <= CONDITIONALS and found["bundles"] <= BUNDLES, found
    assert not found["tricks"], found["tricks"]


def test_the_counts_count(tmp_path):
    """数得对：注释、docstring、换行、括号都不算；每一种戏法都认得出来。"""
    (tmp_path / "a.py").write_text(
        '"""说明"""\nx = 1  # 注释\n\n\nif (x):\n    print(f"{x + 1} 个")\n', "utf-8"
    )
    found = plain_code.measure(tmp_path / "a.py")
    assert found["tokens"] == 3 + 3 + 4 + 3 and found["tricks"] == []  # x = 1；if x :；print ( s )；x + 1
    program = repr("a = 1\nb = 2\nc = 3\n" + "# 很长\n" * 40)
    lines = [
        "if (y := x): pass",
        "z = [1] * x",
        "z = x[y > 1]",
        "z = [a for b in c for a in b]",
        "z = 1 if x else 2 if y else 3",
        "z = x and y or w",
        "f = lambda: 1",
        "vars(s)['a'] = 1",
        "setattr(s, 'a', 1)",
        "exec('1')",
        f"p = {program}",
    ]
    for line in lines:
        (tmp_path / "a.py").write_text(line + "\n", "utf-8")
        assert len(plain_code.measure(tmp_path / "a.py")["tricks"]) == 1, line
    for line in ("z = [0] * len(x)", "z = x[x > 1]", "z = x or y", "a, b = f()", "z = [0] * 3"):
        (tmp_path / "a.py").write_text(line + "\n", "utf-8")
        found = plain_code.measure(tmp_path / "a.py")
        assert not found["tricks"] and not found["bundles"], line
    for line in ("a, b = 1, 2", "a = b = 0"):
        (tmp_path / "a.py").write_text(line + "\n", "utf-8")
        assert plain_code.measure(tmp_path / "a.py")["bundles"] == 100


@pytest.mark.parametrize("name", SCRIPTS)
def test_function_length_and_no_class_inside(name):
    for node in functions(ast.parse(source(name))):
        length = plain_code.logical_lines(node)
        assert length <= FUNCTION_LIMIT, f"{name} 的 {node.name} 有 {length} 行"
        assert not any(isinstance(child, ast.ClassDef) for child in ast.walk(node)), f"{node.name} 里有类"


def tracked():
    """git 管着的文件；不是从 git 来的（下载的 ZIP）就跳过。"""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("这里不是 git 仓库，不知道哪些文件是提交了的")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in listing.decode("utf-8").split("\0") if name]


def test_nothing_heavy_and_no_data_is_tracked():
    """程序写出来的东西不提交：只有 results/、图片、运行过的 notebook 和 models/poem/。"""
    files = [path for path in tracked() if path.exists() and ROOT / "models/poem" not in path.parents]
    assert [path for path in files if path.stat().st_size > TRACKED_LIMIT] == []
    assert [path for path in files if path.name.endswith(DATA_ENDINGS)] == []


def test_readme_is_short():
    text = re.sub(r"<!--.*?-->", "", source("README.md"), flags=re.S)
    assert len(text) <= README_CHARACTERS


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_in_scripts_are_those_of_the_results(name):
    """脚本里写着“出处 results/文件 路径=印出的数”的，与 results/ 里的对照；印出的数就在附近。"""
    lines = source(name).split("\n")
    for i, line in enumerate(lines):
        marked = re.search(r"出处 (results/.+?)\s*$", line)
        near = "\n".join(lines[max(0, i - 6) : i + 8])
        for part in marked[1].split(";") if marked else []:
            file, *pairs = part.split()
            for pair in pairs:
                path, printed = pair.split("=")
                assert readme_numbers.printed_as(readme_numbers.look_up(file, path), printed) == printed, line
                assert re.search(
                    rf"(?<![\d.,]){re.escape(printed).replace('%', ' ?%')}(?!\d)", near.replace(marked[0], "")
                ), line


@pytest.mark.parametrize("name", SCRIPTS + [f"tests/{p.name}" for p in sorted((ROOT / "tests").glob("*.py"))])
def test_line_length(name):
    """按字符数算（汉字算一个）。"""
    limit = LINE_LIMIT if name in SCRIPTS else 125  # 测试不是给初学者读的，宽一点
    long = [i for i, line in enumerate(source(name).split("\n"), 1) if len(line) > limit]
    assert not long, f"{name} 第 {long} 行超过 {limit} 字符"


# ==== 每个脚本可以单独拷走 ====


@pytest.mark.parametrize("name", EVENING)
def test_no_local_imports(name):
    """不导入仓库里的任何模块或文件夹。"""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    local = {path.stem for path in files} | {path.name for path in folders}
    for node in ast.walk(ast.parse(source(name))):
        imported = set()
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} 第 {node.lineno} 行是相对导入"
            imported = {node.module.split(".")[0]}
        assert not imported & local, f"{name} 第 {node.lineno} 行导入了 {imported & local}"
    assert "importlib.import_module" not in source(name) and "__import__" not in source(name)


@functools.cache
def definitions(name):
    """脚本顶层的函数和类：{名字: 连同装饰器的源码}。"""
    lines = source(name).split("\n")
    return {
        node.name: "\n".join(
            lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno]
        )
        for node in ast.parse(source(name)).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


@pytest.mark.parametrize("function", SHARED)
def test_shared_functions_are_identical(function):
    copies = {name: definitions(name)[function] for name in EVENING if function in definitions(name)}
    assert len(copies) >= SHARED[function], sorted(copies)
    assert len(set(copies.values())) == 1, f"{function} 在 {sorted(copies)} 里不一样"


def test_other_functions_of_the_same_name_are_few():
    """同名而不同的函数会让读者以为它们一样：只有每个脚本自己的这几个。"""
    names = {function for name in EVENING for function in definitions(name)}
    for function in names - SHARED.keys() - {"main", "parse_arguments"}:
        copies = [definitions(name)[function] for name in EVENING if function in definitions(name)]
        assert len(set(copies)) == 1, function


@pytest.mark.parametrize("name", EVENING[:3])
def test_shared_part_is_short_and_last(name):
    """共用的不超过 40 行（说明不算），在文件末尾，标题说明可以跳过。"""
    shared = [definitions(name)[function] for function in SHARED if function in definitions(name)]
    assert sum(len(text.splitlines()) - 1 for text in shared) <= SHARED_LIMIT
    heading = [line for line in source(name).splitlines() if line.startswith("# ====")][-1]
    assert "跳过" in heading
    for text in shared:
        assert source(name).index(text) > source(name).index(heading)
    assert source(name).endswith('if __name__ == "__main__":\n    run(main)\n')


# ==== Trainer 公开的门 ====


def test_trainer_is_used_as_it_is():
    """没有 Trainer 的子类，不碰下划线开头的，没有给库打补丁。"""
    text = source("a100_train.py")
    bases = [
        ast.unparse(base)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    assert bases and not [base for base in bases if base.endswith("Trainer")]
    assert not re.search(r"\b(?:trainer|Trainer|self)\._(?!_)\w+", text)
    assert not re.search(r"\btransformers(?:\.\w+)*\.\w+ = ", text)


@pytest.mark.parametrize("name", EVENING)
def test_default_folder_is_written_the_same_way(name):
    lines = source(name).splitlines()
    assert 'AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着' in lines
    assert 'HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"' in lines


# ==== Windows 和 Mac ====


@pytest.mark.parametrize("name", EVENING)
def test_no_posix_only_calls(name):
    code = code_of(name)
    found = [word for word in POSIX_ONLY if re.search(rf"(?<![\w.]){re.escape(word)}\b", code)]
    assert not found, f"{name}：{found}"


def code_of(name):
    """去掉注释和文档字符串。"""
    tree = ast.parse(source(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


@pytest.mark.parametrize("name", EVENING)
def test_text_files_are_opened_as_utf8(name):
    """中文 Windows 默认用 GBK：每个文本文件都要写明编码。"""
    for node in ast.walk(ast.parse(source(name))):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        keywords = {keyword.arg for keyword in node.keywords}
        modes = [argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)]
        text = function == "open" and not any("b" in str(mode) for mode in modes)
        if text or function.endswith((".read_text", ".write_text")):
            assert "encoding" in keywords, f"{name} 第 {node.lineno} 行"


# ==== 数值 ====


def defaults(preset):
    parser = argparse.ArgumentParser()
    a100_train.add_settings(parser)
    parser.set_defaults(**a100_train.PRESETS[preset])
    return parser.parse_args([])


def test_presets_are_options_and_have_everything():
    """预设里的每个名字都是一个选项；每个预设都有语料、词表和两个学习率，词表与 train_tokenizer.py 的一样大。"""
    options = vars(defaults("full"))
    for preset, values in a100_train.PRESETS.items():
        assert values.keys() <= options.keys()
        s = defaults(preset)
        assert s.n_embd % s.n_head == 0
        assert set(a100_train.CORPUS[preset]) <= {*prepare_corpus.DATASETS, "demo"}
        assert a100_train.VOCAB_SIZE[preset] == train_tokenizer.VOCAB_SIZE[preset]
        assert all(a100_train.LEARNING_RATE[family][preset] > 0 for family in ("muon", "adamw"))


def test_preset_numbers():
    full = defaults("full")
    assert full.effective_batch_size * full.block_size == 98_304
    assert (full.n_layer, full.n_embd, full.n_head) == (8, 768, 12)
    assert a100_train.VOCAB_SIZE["full"] == 32_000


def test_special_ids_agree():
    text = source("train_tokenizer.py")
    assert "pad_id=0" in text.replace(" ", "") or train_tokenizer.SPECIAL == ["<pad>", "<unk>", "<s>", "</s>"]
    assert (a100_train.PAD, a100_train.BOS, a100_train.EOS) == (0, 2, 3)


def test_default_work_dir():
    expected = "/root/autodl-tmp/gpt2-chinese" if os.path.isdir("/root/autodl-tmp") else "gpt2-chinese"
    assert defaults("full").work_dir == Path(expected)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_where_roots_folder_is_closed(name, tmp_path):
    """普通用户看不了 /root（Debian、Ubuntu 的默认）：每个脚本的 --help 照样能用。测试多半是 root 在跑，所以让 stat 说“没有权限”。"""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\noriginal = os.stat\n"
        "def refused(path, *args, **kwargs):\n"
        "    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith('/root/autodl-tmp'):\n"
        "        raise PermissionError(13, 'Permission denied', os.fspath(path))\n"
        "    return original(path, *args, **kwargs)\n"
        "os.stat = refused\n",
        "utf-8",
    )
    if name == "kaggle_pretrain_combined.py":
        pytest.skip("它没有命令行，也不看这个文件夹")
    result = subprocess.run(
        [sys.executable, str(ROOT / name), "--help"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment() | {"PYTHONPATH": str(tmp_path)},
        timeout=120,
    )
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr
