#!/usr/bin/env python3
"""由 template.py 和几个脚本拼出仓库根目录下的 kaggle_pretrain_combined.py。

    python docs/kaggle/assemble.py           # 改了脚本或模板以后，运行它
    python docs/kaggle/assemble.py --check   # 已提交的那份不是现在该有的，就报错（测试用的就是它）

模板里的 from a100_train import encode, pack 换成 encode、pack 在那个脚本里的原文：整个函数、类或常量，连同紧挨在上面的注释，
一字不差。模板自己是一个普通的 Python 文件，ruff 照样检查。
"""

import argparse
import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEMPLATE = HERE / "template.py"
RESULT = ROOT / "kaggle_pretrain_combined.py"
SCRIPTS = ("prepare_corpus", "train_tokenizer", "a100_train")


def names_of(node):
    """顶层的一句定义了哪些名字。"""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    names = set()
    if isinstance(node, ast.Assign):
        for target in node.targets:
            names |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def definitions(script, names):
    """script 里定义 names 的各句原文，按它们在脚本里的次序；一句定义几个名字的，只取一次。"""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    lines = source.split("\n")
    pieces = []
    found = set()
    for node in ast.parse(source).body:
        if not names_of(node) & names:
            continue
        found |= names_of(node)
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        while lines[start - 2].startswith("# ") and not lines[start - 2].startswith("# ===="):
            start -= 1
        pieces.append("\n".join(lines[start - 1 : node.end_lineno]))
    if names - found:
        sys.exit(f"错误：{script}.py 里没有 {names - found}；它改了名，就改 {TEMPLATE.name}")
    return pieces


def is_constant(piece):
    return not re.search(r"(?m)^(def|class) ", piece)


def expand(script, names):
    """一句 import 代表的原文。函数和类前后空两行，常量连着写。"""
    text = ""
    before = True  # 前面的是不是常量
    for piece in definitions(script, names):
        constant = is_constant(piece)
        text += "\n" if before and constant else "\n\n\n"
        text += piece
        before = constant
    return text.lstrip("\n") if is_constant(text) else text + "\n\n"


def assemble(template=None):
    template = template or TEMPLATE.read_text(encoding="utf-8")
    lines = template.split("\n")
    for node in reversed(ast.parse(template).body):
        if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
            names = {alias.name for alias in node.names}
            lines[node.lineno - 1 : node.end_lineno] = [expand(node.module, names)]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description="拼出 kaggle_pretrain_combined.py", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="只检查已提交的那份")
    check = parser.parse_args().check
    text = assemble()
    if check and RESULT.read_text(encoding="utf-8") != text:
        sys.exit(f"错误：{RESULT.name} 与模板和脚本不符；运行 python docs/kaggle/assemble.py 后一起提交")
    if not check:
        RESULT.write_text(text, encoding="utf-8")
    print(f"{RESULT.name}：{text.count(chr(10))} 行，{len(text.encode())} 字节")


if __name__ == "__main__":
    main()
