"""generate.py：续写、快照、半个字、出错的一行话；README 和模型卡里的代码原样运行。"""

import io
import re
import subprocess
import sys

import pytest
import tiny_run
import torch
from conftest import ROOT, call, environment, error_of
from transformers import AutoModelForCausalLM

import generate


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("hands") / "gpt2-chinese")


def written(capsys, *argv):
    call(generate, *argv)
    return capsys.readouterr()


def test_streams_prompt_and_text_only(run_folder, capsys):
    first = written(capsys, "中国的历史", "--model", run_folder / "final_model", "--max_new_tokens", 20)
    again = written(capsys, "中国的历史", "--model", run_folder, "--max_new_tokens", 20)
    other = written(capsys, "中国的历史", "--model", run_folder, "--max_new_tokens", 20, "--seed", 7)
    assert first.out == again.out != other.out  # 工作目录和 final_model/ 是同一个模型
    assert first.out.startswith("中国的历史") and first.out.endswith("\n") and "\ufffd" not in first.out
    assert "20 个词块" in first.err and "种子 42" in first.err and "[" not in first.out


def test_greedy_is_generate(run_folder, capsys):
    """温度 0 的词块与 transformers 的 greedy 相同。"""
    tokenizer = tiny_run.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(run_folder / "final_model", dtype=torch.float32)
    ids = tokenizer("今天天气", return_tensors="pt")
    output = model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
    shown = written(
        capsys,
        "今天天气",
        "--model",
        run_folder,
        "--temperature",
        0,
        "--repetition_penalty",
        1,
        "--max_new_tokens",
        12,
    )
    assert shown.out == tokenizer.decode(output[0]).replace("\ufffd", "") + "\n"


@pytest.mark.parametrize(
    "pieces, shown, broken",
    [
        (["<0xE9>", "<0xBA>", "<0x92>"], ["", "", "麒", ""], False),
        (["天", "<0xE9>", "<0xBA>"], ["天", "", "", ""], True),  # 写到一半就停：半个字不显示
        (["<0xE9>", "<0xBA>", "天"], ["", "", "天", ""], True),  # 被别的词块打断
        (["<0xE9>", "<0xBA>", "<0x92>", "<0xE9>", "天"], ["", "", "麒", "", "天", ""], True),
        (["天", "，", "今", "。", "</s>"], ["天", "", "，今", "", "", "。"], False),  # 标点等下一个字
        (["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "</s>"], ["", "", "", "", "", "\U0001f600"], False),
    ],
)
def test_half_characters_are_held_back(capsys, pieces, shown, broken):
    tokenizer = tiny_run.tokenizer()
    printer = generate.Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    seen = []
    printer.put(torch.tensor([[5, 6]]))  # 提示词
    for token in tokenizer.convert_tokens_to_ids(pieces):
        printer.put(torch.tensor([token]))
        seen.append(capsys.readouterr().out)
    printer.end()
    assert seen + [capsys.readouterr().out] == shown
    assert printer.broken == broken


# ==== 每个选项都改了它该改的 ====


@pytest.fixture
def steady(tmp_path):
    """下一个词块总是 天 0.5、今 0.3、学 0.2 的模型。"""
    folder = tmp_path / "steady"
    tiny_run.tokenizer().save_pretrained(folder)
    tiny_run.steady_model({"天": 0.5, "今": 0.3, "学": 0.2}).save_pretrained(folder)
    return folder


def letters(capsys, folder, *argv):
    """在“中”后面写 40 个（重复惩罚关掉，除非另说），返回写出来的。"""
    plain = [] if "--repetition_penalty" in argv else ["--repetition_penalty", 1]
    text = written(capsys, "中", "--model", folder, "--max_new_tokens", 40, *plain, *argv).out
    return text.removeprefix("中").removesuffix("\n")


def test_sampling_options(steady, capsys):
    free = ["--top_k", 0, "--top_p", 1]
    everything = letters(capsys, steady, *free)
    assert set(everything) == set("天今学") and len(everything) == 40
    assert letters(capsys, steady, *free) == everything != letters(capsys, steady, *free, "--seed", 1)
    assert letters(capsys, steady, *free, "--temperature", 0) == "天" * 40
    assert letters(capsys, steady, *free, "--temperature", 0.2).count("天") > 34
    assert len(set(letters(capsys, steady, *free, "--temperature", 100))) > 10, "越高越敢选少见的"
    assert set(letters(capsys, steady, "--top_k", 2, "--top_p", 1)) == set("天今")
    assert letters(capsys, steady, "--top_k", 1, "--top_p", 1) == "天" * 40
    assert set(letters(capsys, steady, "--top_k", 0, "--top_p", 0.7)) == set("天今")
    assert letters(capsys, steady, "--top_k", 0, "--top_p", 0.4) == "天" * 40


def test_repetition_penalty(steady, capsys):
    """出现过的“天”分数降低，第二个就不是它了；默认是 1.1，照样起作用。"""
    greedy = ["--temperature", 0]
    assert letters(capsys, steady, *greedy, "--repetition_penalty", 1) == "天" * 40
    assert letters(capsys, steady, *greedy, "--repetition_penalty", 10)[:3] == "天今学"
    short = ["中", "--model", steady, "--max_new_tokens", 30, "--top_k", 0, "--top_p", 1]
    default = written(capsys, *short).out
    assert default == written(capsys, *short, "--repetition_penalty", 1.1).out
    assert default != written(capsys, *short, "--repetition_penalty", 3).out


@pytest.mark.parametrize("wanted, expected", [(1, 1), (7, 7), (10**6, tiny_run.CONTEXT - 1)])
def test_max_new_tokens(steady, capsys, wanted, expected):
    """写这么多就停；写到上下文的末尾也停。"""
    shown = written(capsys, "中", "--model", steady, "--max_new_tokens", wanted)
    assert len(shown.out.strip()) == 1 + expected
    assert f"[{expected} 个词块" in shown.err and f"上下文用了 {1 + expected}/{tiny_run.CONTEXT}" in shown.err


def test_stops_where_the_document_ends(tmp_path, capsys):
    tiny_run.tokenizer().save_pretrained(tmp_path)
    tiny_run.steady_model({"天": 0.5, "</s>": 0.5}).save_pretrained(tmp_path)
    shown = written(capsys, "中", "--model", tmp_path)
    assert set(shown.out.strip()[1:]) <= {"天"} and len(shown.out) < 20 and "</s>" not in shown.out


# ==== 藏头诗 ====

VERSES = {"天": 0.25, "今": 0.2, "学": 0.15, "，": 0.15, "。": 0.1, "？": 0.05, "</s>": 0.05, "\n": 0.05}


def make_poet(folder, preset="poem"):
    """一个“写诗”的工作目录：最终模型和一个快照。"""
    tiny_run.tokenizer().save_pretrained(folder / "final_model")
    for place in ("final_model", "snapshots/step-7"):
        tiny_run.steady_model(VERSES).save_pretrained(folder / place)
    tiny_run.write_json(folder / "config.json", {"preset": preset})
    return folder


@pytest.fixture(scope="module")
def poet(tmp_path_factory):
    return make_poet(tmp_path_factory.mktemp("poet") / "run")


@pytest.mark.parametrize("heads", ["中国教育", "中龘国", "人", "中國〇"])
@pytest.mark.parametrize("seed", range(4))
def test_every_line_begins_with_its_head(poet, capsys, heads, seed):
    """词表里有的字、没有的字（龘、國、〇，写的是字节）都一样；只有最后一句可以含逗号。"""
    shown = written(capsys, "--heads", heads, "--model", poet, "--seed", seed, "--repetition_penalty", 1)
    title, *lines = shown.out.splitlines()
    assert title == heads, "没有题目，就拿那几个字当题目"
    assert [line[0] for line in lines] == list(heads)
    for line in lines[:-1]:
        assert re.fullmatch(r"[^，。？]*[，。？]?", line[1:]), line
    assert "注意" not in shown.err and "字节拼不成字" not in shown.err


def test_acrostic_is_fed_as_the_poems_it_learned(poet, capsys, monkeypatch):
    """送进模型的是训练时的样子：题目，换行，两句一行；没有 </s>。"""
    texts = []
    original = generate.continue_text

    def record(model, ids, printer, *rest, **more):
        texts.append(printer.tokenizer.decode(ids[0]))
        return original(model, ids, printer, *rest, **more)

    monkeypatch.setattr(generate, "continue_text", record)
    shown = written(capsys, " 秋夜\n", "--heads", "中国教育", "--model", poet, "--repetition_penalty", 1)
    assert shown.out.startswith("秋夜\n中")
    assert texts[0] == "秋夜\n中" and texts[-1].startswith(texts[-2])
    verse = "[天今学]*[，。？]"
    assert re.fullmatch(rf"秋夜\n中{verse}国{verse}\n教{verse}育", texts[-1])


def test_acrostic_depends_on_the_seed_and_options(poet, capsys):
    def poem(*argv):
        return written(capsys, "--heads", "中国教育", "--model", poet, *argv).out

    assert poem() == poem() != poem("--seed", 1)
    assert poem("--temperature", 0) != poem("--temperature", 0, "--repetition_penalty", 5)
    assert len(poem("--max_new_tokens", 45, "--temperature", 0)) <= 4 + 4 + 45 + 1


def test_acrostic_with_snapshots_and_hint(poet, tmp_path, capsys):
    """快照也能写；不是写诗的模型，标准错误里说一句，照样写。"""
    compared = written(capsys, "--heads", "中国", "--model", poet, "--compare")
    assert compared.out.startswith("中国\n中") and "注意" not in compared.err
    other = make_poet(tmp_path / "news", preset="demo")
    for folder in (other, other / "final_model"):
        shown = written(capsys, "--heads", "中国", "--model", folder)
        assert shown.out.startswith("中国\n中") and shown.err.startswith("注意：")
        assert shown.err.count("\n") == 2
    (other / "config.json").unlink()
    assert "注意" in written(capsys, "--heads", "中国", "--model", other, "--snapshot", 7).err


@pytest.mark.parametrize(
    "heads, words",
    [
        ("", "只能是汉字，至少一个"),
        ("  ", "只能是汉字"),
        ("春 夏", "--heads 是 '春 夏'"),
        ("春\n夏", "只能是汉字"),
        ("春a", "--heads 是 '春a'"),
        ("ABC", "只能是汉字"),
        ("春，夏", "只能是汉字"),
        ("春😀", "只能是汉字"),
        ("春\udce4", "只能是汉字"),
        ("一二三四五六七八九十", "--heads 的字太多，只能写"),
        ("春" * 10_000, "的上下文只有 64"),
    ],
)
def test_bad_heads(poet, capsys, heads, words):
    message = error_of(generate, "--heads", heads, "--model", poet)
    assert words in message and "\n" not in message
    assert capsys.readouterr().out == ""


def test_too_few_tokens_for_the_heads(poet):
    assert "加大 --max_new_tokens" in error_of(
        generate, "--heads", "中国教育", "--model", poet, "--max_new_tokens", 20
    )


# ==== 快照，Hub ====


def test_snapshots(run_folder, capsys):
    compared = written(
        capsys, "人工智能是", "--model", run_folder / "final_model", "--compare", "--max_new_tokens", 9
    )
    assert re.findall(r"第 (\d+) 步；第 \d+ 步的验证损失 (\S+)\]", compared.err) == [
        ("0", "5.9"),
        ("10", "4.2"),
        ("100", "None"),
        ("200", "2.5"),
    ]
    one = written(capsys, "人工智能是", "--model", run_folder, "--snapshot", 10, "--max_new_tokens", 9)
    assert "人工智能是" + compared.out.split("人工智能是")[2] == one.out


def test_unfinished_training_uses_newest_snapshot(run_folder, tmp_path, capsys):
    """还没有 final_model/：分词器在 tokenizer/，模型是最新的快照。"""
    (tmp_path / "tokenizer").symlink_to(run_folder / "tokenizer")
    snapshots = tmp_path / "snapshots"
    snapshots.mkdir()
    (snapshots / "step-0").symlink_to(run_folder / "snapshots/step-0")
    assert "第 0 步" in written(capsys, "教育", "--model", tmp_path, "--max_new_tokens", 3).err
    one = written(capsys, "教育", "--model", tmp_path, "--max_new_tokens", 3, "--compare")
    assert one.err.count("第 0 步；") == 1, "只有一个快照"
    (snapshots / "step-100").symlink_to(run_folder / "snapshots/step-100")
    (snapshots / "step-20").symlink_to(run_folder / "snapshots/step-10")
    assert "第 100 步" in written(capsys, "教育", "--model", tmp_path, "--max_new_tokens", 3).err, (
        "100 比 20 新"
    )
    (snapshots / "step-200").symlink_to(run_folder / "snapshots/step-200")
    assert "第 200 步" in written(capsys, "教育", "--model", tmp_path, "--max_new_tokens", 3).err


def test_from_hub(run_folder, tmp_path, capsys, monkeypatch):
    """Hub 上的仓库：模型在根目录，快照在 snapshots/。只下载用得到的。"""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns[-1]))
        return str(tmp_path)

    for file in (run_folder / "final_model").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "snapshots").symlink_to(run_folder / "snapshots")
    monkeypatch.setattr(generate, "snapshot_download", download)
    written(capsys, "教育", "--model", "me/tiny", "--max_new_tokens", 3)
    tenth = written(capsys, "教育", "--model", "me/tiny", "--max_new_tokens", 3, "--snapshot", 10)
    assert "第 10 步" in tenth.err
    assert asked[1] == ("me/tiny", "snapshots/step-10/*")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["", "--seed", 1], "提示词是空的"),
        (["  \n"], "提示词是空的"),
        (["天" * 64], "提示词有 64 个词块，模型的上下文只有 64"),
        (["天" * 100_000], "模型的上下文只有 64"),
        (["天", "--temperature", -1], "--temperature 是 -1.0；要在 0 到 100"),
        (["天", "--temperature", "nan"], "--temperature 是 nan"),
        (["天", "--top_p", 0], "--top_p 是 0.0"),
        (["天", "--top_k", -1], "--top_k 是 -1"),
        (["天", "--repetition_penalty", "inf"], "--repetition_penalty 是 inf"),
        (["天", "--max_new_tokens", 0], "--max_new_tokens 是 0；要在 1"),
        (["天", "--seed", 2**64], "--seed 是"),
        (["天", "--snapshot", 50], "有快照的步：0、10、100、200"),
        (["天", "--model", "someone/nothing"], "没有文件夹 someone/nothing，Hub 上也取不到"),
        (["天", "--model", "a/b/c"], "没有文件夹 a/b/c"),
    ],
)
def test_bad_input(run_folder, argv, words):
    message = error_of(generate, *argv, *([] if "--model" in argv else ["--model", run_folder]))
    assert words in message and "\n" not in message


def test_broken_model(run_folder, tmp_path):
    folder = tmp_path / "final_model"
    folder.mkdir()
    assert "有快照的步：没有" in error_of(generate, "天", "--model", tmp_path)
    for file in (run_folder / "final_model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "读不出来" in error_of(generate, "天", "--model", tmp_path)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "读不出来" in error_of(generate, "天", "--model", tmp_path, "--temperature", 0)


@pytest.mark.parametrize(
    "proxy",
    [
        {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"ALL_PROXY": "socks://127.0.0.1:9"},
    ],
)
def test_proxies_that_do_not_work(run_folder, proxy):
    """AutoDL 的加速和多数笔记本都设了代理：Hub 上的名字是一行话，本机的模型照样能用。端口 9 没有人听。"""
    clean = {key: value for key, value in environment().items() if key != "HF_HUB_OFFLINE"}
    command = [sys.executable, ROOT / "generate.py", "天", "--max_new_tokens", "2", "--model"]
    pipes = dict(capture_output=True, text=True, encoding="utf-8", timeout=200, env=clean | proxy)
    hub = subprocess.run([*command, "someone/nothing"], **pipes)
    assert hub.returncode == 1 and hub.stdout == ""
    assert hub.stderr.startswith("错误：没有文件夹 someone/nothing") and hub.stderr.count("\n") == 1, (
        hub.stderr
    )
    local = subprocess.run([*command, run_folder], **pipes)
    assert local.returncode == 0 and local.stdout.startswith("天") and "Traceback" not in local.stderr


def test_connection_that_breaks_while_downloading(monkeypatch):
    def broken(*args, **kwargs):
        raise generate.httpx.ReadError("connection reset\nby peer")

    monkeypatch.setattr(generate, "snapshot_download", broken)
    message = error_of(generate, "天", "--model", "me/tiny")
    assert "connection reset" in message and "\n" not in message


def test_bytes_that_are_no_text(run_folder, capsys):
    shown = written(capsys, "天\udce4", "--model", run_folder, "--max_new_tokens", 2)
    assert shown.out.startswith("天?")


def test_closed_pipe_is_quiet(run_folder):
    """| head：没有 traceback。"""
    command = [sys.executable, ROOT / "generate.py", "天", "--model", run_folder, "--compare"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout.read(1) == "天"
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) and "Traceback" not in errors and "Exception" not in errors, errors


def python_blocks(text):
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "transformers" in block]


README_BLOCKS = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", README_BLOCKS)
def test_readme_snippets_run(run_folder, block, monkeypatch):
    """README 里加载模型的代码，在有 gpt2-chinese/final_model 的地方原样运行。"""
    monkeypatch.chdir(run_folder.parent)
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert output.getvalue().startswith("中国的历史")
