"""数一个 Python 文件有多重、多密，不管它怎样排版：先解析成语法树，再原样写出来数，所以换行、注释、括号、docstring 都不影响。

python tests/plain_code.py a100_train.py generate.py

tokens       名字、数、运算符、字符串的个数；f 字符串算一个，另加每个 {} 里的
mean、p90    每个逻辑行平均几个 token，九成的行不超过几个（不算 import 和单独的 else、try、finally、pass）
longest      最长的一行；字面量的表、每行一个关键字参数的调用不算
conditionals 每 100 条语句有几个条件表达式
bundles      每 100 条语句有几处把几个值一起赋给几个名字（a, b = x, y），或连等
tricks       戏法：海象运算符，列表乘以真假，真假当下标，一个推导式里两层循环，条件里套条件，x and y or z，
             把 lambda 赋给名字，按名字写设置（vars(...)、setattr、globals()），exec、eval，字符串里的程序
"""

import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

KINDS = (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING)
SILENT = ("import", "from", "else", "try", "finally", "pass")


class Flattener(ast.NodeTransformer):
    """去掉 docstring；f 字符串换成一个普通字符串，{} 里的表达式另外收着。"""

    def __init__(self):
        self.inner = []

    def visit_JoinedStr(self, node):
        for part in ast.walk(node):
            if isinstance(part, ast.FormattedValue):
                self.inner.append(Flattener().visit(part.value))
        return ast.Constant("s")

    def without_docstring(self, node):
        self.generic_visit(node)
        if docstring_of(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_Module = without_docstring
    visit_FunctionDef = without_docstring
    visit_AsyncFunctionDef = without_docstring
    visit_ClassDef = without_docstring


def docstring_of(node):
    """节点的 docstring 那个常量，或 None。"""
    if (
        not isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        or not node.body
    ):
        return None
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        return first.value
    return None


def token_lines(text):
    """每个逻辑行的 token。"""
    lines = []
    current = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in KINDS:
            current.append(token.string)
        elif token.type == tokenize.NEWLINE and current:
            lines.append(current)
            current = []
    return lines


def written(node):
    return token_lines(ast.unparse(ast.fix_missing_locations(node)))


def is_program(text):
    """一个字符串里有没有三条以上的 Python 语句。"""
    try:
        return len(text) > 120 and len(ast.parse(text).body) >= 3
    except (SyntaxError, ValueError):
        return False


def is_flag(node):
    """列表乘以它时，它像一个真假，而不是个数。"""
    counted = isinstance(node, (ast.Constant, ast.BinOp))
    return not counted and not (isinstance(node, ast.Call) and ast.unparse(node.func) == "len")


def trick(node):
    """这个节点是哪一种戏法，或 None。"""
    if isinstance(node, ast.NamedExpr):
        return "海象运算符"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        pairs = ((node.left, node.right), (node.right, node.left))
        if any(isinstance(side, ast.List) and is_flag(times) for side, times in pairs):
            return "列表乘以真假"
    if isinstance(node, ast.Subscript):
        truth = isinstance(node.slice, (ast.Compare, ast.BoolOp))
        negated = isinstance(node.slice, ast.UnaryOp) and isinstance(node.slice.op, ast.Not)
        mask = ast.unparse(node.value) in ast.unparse(node.slice)  # x[x > 0] 是 numpy、torch 的选取
        if (truth or negated) and not mask:
            return "真假当下标"
        if isinstance(node.ctx, ast.Store) and ast.unparse(node.value).startswith(("vars(", "globals(")):
            return "按名字写设置"
    if (
        isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
        and len(node.generators) > 1
    ):
        return "一个推导式里两层循环"
    if isinstance(node, ast.IfExp):
        if any(isinstance(child, ast.IfExp) for child in ast.walk(node) if child is not node):
            return "条件里套条件"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        return "把 lambda 赋给名字"
    if isinstance(node, (ast.Assign, ast.Return)) and isinstance(node.value, ast.BoolOp):
        first = node.value.values[0]
        if (
            isinstance(node.value.op, ast.Or)
            and isinstance(first, ast.BoolOp)
            and isinstance(first.op, ast.And)
        ):
            return "x and y or z"
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in ("setattr", "exec", "eval", "globals") or name.startswith("vars("):
            return f"{name}()"
        if name.endswith("__dict__.update"):
            return "按名字写设置"
    return None


def tricks(tree):
    """[(行号, 哪一种)]。"""
    docstrings = {id(docstring_of(node)) for node in ast.walk(tree)}
    found = set()
    for node in ast.walk(tree):
        what = trick(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings and is_program(node.value):
                what = "字符串里的程序"
        if what:
            found.add((node.lineno, what))
    return sorted(found)


def is_table(statement):
    """字面量的表，或每行一个关键字参数的调用：可以长。"""
    value = getattr(statement, "value", None)
    if isinstance(value, (ast.Dict, ast.List, ast.Tuple, ast.Set)):
        return True
    return any(isinstance(call, ast.Call) and len(call.keywords) > 3 for call in ast.walk(statement))


def longest_line(tree):
    """最长的一条简单语句有几个 token，和它的行号；表和长调用不算。"""
    lengths = [(0, 0)]
    for node in ast.walk(tree):
        simple = isinstance(node, ast.stmt) and not hasattr(node, "body")
        if simple and not is_table(node) and not isinstance(node, (ast.Import, ast.ImportFrom)):
            flattener = Flattener()
            copy = flattener.visit(ast.parse(ast.unparse(node)))
            lengths.append((sum(map(len, written(copy))), node.lineno))
    return max(lengths)


def logical_lines(function):
    """一个函数有几个逻辑行，不算 docstring 和里面的函数。"""
    lines = written(Flattener().visit(ast.parse(ast.unparse(function))))
    return len([line for line in lines if line[0] not in ("else", "try", "finally", "pass")]) - 1


def measure(path):
    source = Path(path).read_text(encoding="utf-8")
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    statements = sum(isinstance(node, ast.stmt) for node in nodes)
    conditionals = sum(isinstance(node, ast.IfExp) for node in nodes)
    bundles = 0
    for node in nodes:
        if isinstance(node, ast.Assign):
            several = isinstance(node.targets[0], (ast.Tuple, ast.List))
            bundles += len(node.targets) > 1 or (several and isinstance(node.value, (ast.Tuple, ast.List)))
    flattener = Flattener()
    lines = written(flattener.visit(ast.parse(source)))
    inner = sum(len(line) for node in flattener.inner for line in written(ast.Expression(node)))
    lengths = sorted(len(line) for line in lines if line[0] not in SILENT)
    return {
        "tokens": sum(map(len, lines)) + inner,
        "mean": (sum(lengths) + inner) / len(lengths),
        "p90": lengths[int(0.9 * len(lengths))],
        "longest": longest_line(tree),
        "conditionals": 100 * conditionals / statements,
        "bundles": 100 * bundles / statements,
        "tricks": tricks(tree),
        "median": statistics.median(lengths),
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        counts = measure(name)
        print(
            f"{name}：{counts['tokens']} tokens，每行 {counts['mean']:.1f} / {counts['p90']}，条件 {counts['conditionals']:.1f}，"
            f"并列赋值 {counts['bundles']:.1f}，最长 {counts['longest']}，戏法 {counts['tricks']}"
        )
