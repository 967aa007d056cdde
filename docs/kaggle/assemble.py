#!/usr/bin/env python3
"""由 template.txt 和几个脚本拼出仓库根目录下的 kaggle_pretrain_combined.py。

    python docs/kaggle/assemble.py           # 改了脚本或模板以后，运行它
    python docs/kaggle/assemble.py --check   # 已提交的那份不是现在该有的，就报错（测试用的就是它）

模板里以 #@ 开头的行换成别处的原文：
    #@ a100_train: encode pack                 这些名字的函数、类、常量，一字不差
    #@ a100_train: save_final_model - plot     同上，去掉提到 plot 的语句，几个词用逗号分开
    #@ a100_train!: write_history              同上，去掉说明（docstring）和单独成行的注释：讲解留在原处
    #@ a100_train: pack ~ 旧 => 新             同上，换掉一处文字（必须恰有一处；可以再接 ~ 旧 => 新）
    #@ requirements: datasets                  requirements.txt 里这些包的版本范围，一个 Python 列表
"""

import argparse
import ast
import re
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULT = ROOT / "kaggle_pretrain_combined.py"


def names_of(node):
    """顶层的一句定义了哪些名字。"""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def unwanted(node, words, lines):
    """要去掉的行号（从 0 数）：提到 words 的语句；if 之类看它的第一行，提到就整个去掉，否则往里找。"""
    fields = ("body", "orelse", "handlers", "finalbody")
    body = [child for field in fields for child in getattr(node, field, [])]
    if body and isinstance(node, ast.FunctionDef | ast.ClassDef):
        return set().union(*(unwanted(child, words, lines) for child in body))
    last = body[0].lineno - 1 if body else node.end_lineno
    if any(word in "\n".join(lines[node.lineno - 1 : max(last, node.lineno)]) for word in words):
        return set(range(node.lineno - 1, node.end_lineno))
    inside = [unwanted(child, words, lines) for child in body]
    empty = body and all(inside)  # 里面的都去掉了，外面的也不要
    return set(range(node.lineno - 1, node.end_lineno)) if empty else set().union(*inside)


def remarks(node, lines):
    """docstring 和单独成行的注释的行号。"""
    functions = [each for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.ClassDef)]
    strings = [each.body[0] for each in functions if ast.get_docstring(each)]
    rows = {i for each in strings for i in range(each.lineno - 1, each.end_lineno)}
    rows |= {i for i in range(node.lineno - 1, node.end_lineno) if lines[i].lstrip().startswith("#")}
    first = [each.body[0].end_lineno for each in functions if ast.get_docstring(each)]
    return rows | {i for i in first if not lines[i].strip() and i < node.end_lineno}  # 说明后面的空行


def definition(script, name, words, bare=False):
    """script 里 name 的原文，连同装饰器和行尾的注释。"""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    lines = source.split("\n")
    node = next((node for node in ast.parse(source).body if name in names_of(node)), None)
    if node is None:
        sys.exit(f"错误：{script}.py 里没有 {name}；它改了名，就改 {HERE.name}/template.txt")
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    dropped = (unwanted(node, words, lines) if words else set()) | (remarks(node, lines) if bare else set())
    return "\n".join(line for i, line in enumerate(lines[start : node.end_lineno], start) if i not in dropped)


def requirements(packages):
    """requirements.txt 里的版本范围，写成一个 Python 列表的内容。"""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    lines = [re.split(r"\s*[;#]", line)[0] for line in lines if re.match(r"\w", line)]
    wanted = {re.match(r"[\w-]+", line)[0]: line for line in lines}
    if missing := [package for package in packages if package not in wanted]:
        sys.exit(
            f"错误：requirements.txt 里没有 {missing}，而 Kaggle 上要装；加上，或改 {HERE.name}/template.txt"
        )
    text = "REQUIREMENTS = " + str([wanted[package] for package in packages]).replace("'", '"')
    return textwrap.fill(text, 100, subsequent_indent=" " * 16)


def replace_once(text, change, line):
    old, new = change.split(" => ")
    if text.count(old) != 1:
        sys.exit(
            f"错误：{line[:40]!r} 里的 {old!r} 出现了 {text.count(old)} 次，应当恰有一次；改 {HERE.name}/template.txt"
        )
    return text.replace(old, new)


def expand(line):
    """一行 #@ -> 它代表的原文；类和函数之间空一行，常量连着写。"""
    line, *changes = line.split(" ~ ")
    script, names, words = re.fullmatch(r"#@ (\w+!?): (.+?)(?: - (.+))?", line).groups()
    script, bare = script.rstrip("!"), "!" in script
    if script == "requirements":
        return requirements(names.split())
    text, words = "", [word.strip() for word in words.split(",")] if words else []
    for name in names.split():
        piece = definition(script, name, words, bare)
        gap = "\n\n" if piece.startswith(("def ", "class ", "@")) else "\n"
        text += (gap if text else "") + piece
    if words and text == expand(f"#@ {script}{'!' * bare}: {names}"):
        sys.exit(f"错误：{line} 里没有提到 {words} 的语句；改 {HERE.name}/template.txt")
    for change in changes:
        text = replace_once(text, change, line)
    return text


def assemble():
    template = (HERE / "template.txt").read_text(encoding="utf-8")
    return "".join((expand(line) if line.startswith("#@") else line) + "\n" for line in template.splitlines())


def main():
    parser = argparse.ArgumentParser(description="拼出 kaggle_pretrain_combined.py", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="只检查已提交的那份")
    check, text = parser.parse_args().check, assemble()
    if check and RESULT.read_text(encoding="utf-8") != text:
        sys.exit(f"错误：{RESULT.name} 与模板和脚本不符；运行 python docs/kaggle/assemble.py 后一起提交")
    if not check:
        RESULT.write_text(text, encoding="utf-8")
    print(f"{RESULT.name}：{text.count(chr(10))} 行，{len(text.encode())} 字节")


if __name__ == "__main__":
    main()
