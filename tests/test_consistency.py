"""脚本之间的约定：互不导入，同名的函数一字不差，行宽、函数长度、共有的数值一致。"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

import a100_train
import prepare_corpus
import train_tokenizer

SCRIPTS = ["download_corpus.py", "prepare_corpus.py", "train_tokenizer.py", "a100_train.py", "plot_loss.py",
           "doctor.py"]
# 同名而可以不同的函数或类，每个写明理由
ALLOWED_DIFFERENCES = {
    "main": "每个脚本做自己的事",
    "parse_arguments": "每个脚本有自己的参数",
}
LINE_LIMIT, FUNCTION_LIMIT = 110, 60


def parse(name):
    return ast.parse((ROOT / name).read_text("utf-8"))


def definitions(name):
    """脚本顶层的函数和类：{名字: 源码}。"""
    source = (ROOT / name).read_text("utf-8")
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}


def shared_definitions():
    """在两个以上脚本里出现的名字：{名字: {脚本: 源码}}。"""
    shared = defaultdict(dict)
    for name in SCRIPTS:
        for function, source in definitions(name).items():
            shared[function][name] = source
    return {function: sources for function, sources in shared.items() if len(sources) > 1}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_do_not_import_each_other(name):
    """每个脚本都可以单独拷走：不导入旁边的任何 .py。"""
    modules = {Path(script).stem for script in SCRIPTS} | {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} 第 {node.lineno} 行是相对导入"
            imported = {node.module.split(".")[0]}
        else:
            continue
        assert not imported & modules, f"{name} 第 {node.lineno} 行导入了 {imported & modules}"


def test_shared_definitions_are_identical():
    """同名的函数、类连注释都一样；例外只在 ALLOWED_DIFFERENCES 里。"""
    shared = shared_definitions()
    assert len(shared) >= 8, "没有找到共用的函数，这个测试失去了意义"
    different = {function: sorted(sources) for function, sources in shared.items()
                 if len(set(sources.values())) > 1 and function not in ALLOWED_DIFFERENCES}
    assert not different


def test_allowed_differences_are_needed():
    """名单里不留过期的例外。"""
    shared = shared_definitions()
    for function in ALLOWED_DIFFERENCES:
        assert len(set(shared[function].values())) > 1, f"{function} 已经一样了，从名单里删掉"


@pytest.mark.parametrize("name", SCRIPTS + [f"tests/{p.name}" for p in sorted((ROOT / "tests").glob("*.py"))])
def test_line_length(name):
    """行宽按字符数算（汉字算一个）。"""
    long = [
        f"第 {i} 行 {len(line)} 字符"
        for i, line in enumerate((ROOT / name).read_text("utf-8").split("\n"), 1)
        if len(line) > LINE_LIMIT
    ]
    assert not long, f"{name}：{'；'.join(long)}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_function_length(name):
    """函数不超过 60 行；main 读起来像目录。"""
    long = [f"{node.name} {node.end_lineno - node.lineno + 1} 行" for node in ast.walk(parse(name))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION_LIMIT]
    assert not long, f"{name}：{'；'.join(long)}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_function_takes_a_class_inside(name):
    """函数里不定义类（STYLE 第 4 条）。"""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.FunctionDef):
            inner = [child.name for child in ast.walk(node) if isinstance(child, ast.ClassDef)]
            assert not inner, f"{name} 的 {node.name} 里有类 {inner}"


def test_presets_agree():
    """同一个预设在三个脚本里说的是同一件事。"""
    assert set(prepare_corpus.PRESETS) == set(train_tokenizer.PRESETS) == set(a100_train.PRESETS)
    for preset, values in a100_train.PRESETS.items():
        assert values["corpus"] == prepare_corpus.PRESETS[preset]
        assert values["vocab_size"] == train_tokenizer.PRESETS[preset]["vocab_size"]
    keys = [set(values) for values in a100_train.PRESETS.values()]
    assert all(key == keys[0] for key in keys), "每个预设都要写全同样的键"


def test_preset_numbers():
    """完整训练的数字与说明书一致；微批量整除有效批量，维数整除头数。"""
    full = a100_train.PRESETS["full"]
    assert full["effective_batch_size"] * full["block_size"] == 98_304
    assert (full["n_layer"], full["n_embd"], full["n_head"], full["vocab_size"]) == (8, 768, 12, 32_000)
    for values in a100_train.PRESETS.values():
        assert values["effective_batch_size"] % values["batch_size"] == 0
        assert values["n_embd"] % values["n_head"] == 0


def test_special_ids_agree():
    """训练脚本里写死的特殊 token 编号就是分词器里的位置。"""
    special = train_tokenizer.SPECIAL
    assert special == ["<pad>", "<unk>", "<s>", "</s>"]
    assert [a100_train.PAD, a100_train.BOS, a100_train.EOS] == [
        special.index(t) for t in ("<pad>", "<s>", "</s>")
    ]
