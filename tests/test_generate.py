"""generate.py：续写、快照、半个字、出错的一行话；README 和模型卡里的代码原样运行。"""

import io
import re
import subprocess
import sys

import pytest
import tiny_run
import torch
from conftest import ROOT, call, error_of
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
        (["<0xE9>", "<0xBA>", "<0x92>"], ["", "", "麒", "\n"], 0),
        (["天", "<0xE9>", "<0xBA>"], ["天", "", "", "\n"], 1),  # 写到一半就停：半个字不显示
        (["<0xE9>", "<0xBA>", "天"], ["", "", "天", "\n"], 1),  # 被别的词块打断
        (["<0xE9>", "<0xBA>", "<0x92>", "<0xE9>", "天"], ["", "", "麒", "", "天", "\n"], 1),
        (["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "</s>"], ["", "", "", "\U0001f600", "", "\n"], 0),
    ],
)
def test_half_characters_are_held_back(capsys, pieces, shown, broken):
    tokenizer = tiny_run.tokenizer()
    printer, seen = generate.Printer(tokenizer, 2), []
    printer.put(torch.tensor([[5, 6]]))  # 提示词
    for token in tokenizer.convert_tokens_to_ids(pieces):
        printer.put(torch.tensor([token]))
        seen.append(capsys.readouterr().out)
    printer.end()
    assert seen + [capsys.readouterr().out] == shown
    assert (printer.broken, printer.tokens) == (broken, len(pieces))


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
    (tmp_path / "snapshots").symlink_to(run_folder / "snapshots")
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
        (["天", "--snapshot", 50], "只有第 0、10、100、200 步的快照"),
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
    assert "也没有快照" in error_of(generate, "天", "--model", tmp_path)
    for file in (run_folder / "final_model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "读不出来" in error_of(generate, "天", "--model", tmp_path)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "读不出来" in error_of(generate, "天", "--model", tmp_path, "--temperature", 0)


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
