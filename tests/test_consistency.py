"""脚本之间的约定：篇幅、互不导入、共用的函数一字不差、只走 Trainer 公开的门、没有只在 POSIX 上才有的调用。"""

import argparse
import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

import a100_train
import prepare_corpus
import train_tokenizer

EVENING = ["prepare_corpus.py", "train_tokenizer.py", "a100_train.py", "plot_loss.py"]
# 行数和字节数的上限：一个晚上读得完，又不许把行挤密（CONTRIBUTING.md）；还没有写的文件跳过
BUDGETS = {
    "prepare_corpus.py": (340, 21_000),
    "train_tokenizer.py": (230, 14_000),
    "a100_train.py": (615, 37_000),
    "plot_loss.py": (180, 11_000),
    "doctor.py": (300, 18_000),
    "kaggle_pretrain_combined.py": (750, 46_000),
    "generate.py": (150, 9_000),
    "publish.py": (200, 12_000),
    "space/app.py": (300, 18_000),
    "README.md": (450, 60_000),
}
EVENING_BUDGET = (1350, 82_000)
LINE_LIMIT, FUNCTION_LIMIT, SHARED_LIMIT = 110, 45, 40
SHARED = {"read_report": 3, "new_folder": 2, "run": 3}  # 函数：至少在几个脚本里
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
PATHS = [*EVENING, *(name for name in BUDGETS if name.endswith(".py") and name not in EVENING)]
SCRIPTS = [name for name in PATHS if (ROOT / name).exists()]


def source(name):
    return (ROOT / name).read_text("utf-8")


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


# ==== 篇幅 ====


def size_of(name):
    """(行数, 字节数)。"""
    return len(source(name).splitlines()), len((ROOT / name).read_bytes())


def within(size, limit):
    return size[0] <= limit[0] and size[1] <= limit[1]


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(name):
    if not (ROOT / name).exists():
        pytest.skip(f"还没有 {name}")
    size, limit = size_of(name), BUDGETS[name]
    assert within(size, limit), f"{size}，上限 {limit}"


def test_budget_of_the_evening():
    """四个脚本加起来。"""
    size = [sum(column) for column in zip(*map(size_of, EVENING), strict=True)]
    assert within(size, EVENING_BUDGET), f"{size}，上限 {EVENING_BUDGET}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_function_length_and_no_class_inside(name):
    for node in functions(ast.parse(source(name))):
        length = node.end_lineno - node.lineno + 1
        assert length <= FUNCTION_LIMIT, f"{name} 的 {node.name} 有 {length} 行"
        assert not any(isinstance(child, ast.ClassDef) for child in ast.walk(node)), f"{node.name} 里有类"


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
    """共用的不超过 40 行，在文件末尾，标题说明可以跳过。"""
    shared = [definitions(name)[function] for function in SHARED if function in definitions(name)]
    assert sum(len(text.splitlines()) for text in shared) <= SHARED_LIMIT + 4  # 另加函数之间的空行
    heading = [line for line in source(name).splitlines() if line.startswith("# ====")][-1]
    assert "跳过" in heading
    for text in shared:
        assert source(name).index(text) > source(name).index(heading)
    assert source(name).endswith('if __name__ == "__main__":\n    run(main)\n')


# ==== Trainer 公开的门 ====


def trainer_classes():
    tree = ast.parse(source("a100_train.py"))
    return [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("Trainer" in ast.unparse(base) for base in node.bases)
    ]


def test_no_private_method_of_trainer_is_overridden_or_patched():
    """下划线开头的方法，下个版本就可能改掉：不覆盖，不打补丁，也不调用。"""
    classes = trainer_classes()
    assert classes
    for node in classes:
        private = [f.name for f in functions(node) if f.name.startswith("_") and not f.name.startswith("__")]
        assert not private, f"{node.name} 覆盖了 {private}"
    text = source("a100_train.py")
    assert not re.search(r"\b(?:trainer|Trainer|self)\._(?!_)\w+", text)
    assert not re.search(r"\b(?:transformers|Trainer|GPT2Trainer)(?:\.\w+)*\.\w+ = ", text), "没有给库打补丁"
    assert "setattr(" not in text


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
        function, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        modes = [argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)]
        text = function == "open" and not any("b" in str(mode) for mode in modes)
        if text or function.endswith((".read_text", ".write_text")):
            assert "encoding" in keywords, f"{name} 第 {node.lineno} 行"


# ==== 数值 ====


def defaults(preset):
    column = 3 if preset == "full" else -1
    return argparse.Namespace(**{row[0]: row[column] for row in a100_train.SETTINGS})


def test_preset_numbers():
    """完整训练的数字与说明书一致；微批量整除有效批量，维数整除头数；分词器的词表一样大。"""
    full = defaults("full")
    assert full.effective_batch_size * full.block_size == 98_304
    assert (full.n_layer, full.n_embd, full.n_head, full.vocab_size) == (8, 768, 12, 32_000)
    for preset in ("full", "demo"):
        s = defaults(preset)
        assert s.effective_batch_size % s.batch_size == 0 and s.n_embd % s.n_head == 0
        assert set(s.corpus) <= {*prepare_corpus.DATASETS, "demo"}
        assert s.vocab_size == train_tokenizer.VOCAB_SIZE[preset]


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
