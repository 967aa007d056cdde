"""kaggle_pretrain_combined.py：不用 Kaggle，在一棵假的 /kaggle 里当脚本、当 notebook 真的训练。"""

import ast
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import urllib.error
from pathlib import Path

import pytest
from conftest import ROOT
from kaggle_hub import TOKEN, KaggleHub

FILE, GUIDE = ROOT / "kaggle_pretrain_combined.py", ROOT / "docs" / "kaggle"
SOURCE = FILE.read_text(encoding="utf-8")
sys.path.insert(0, str(GUIDE))
# 一个几秒钟就训练完的设置
SMALL = {
    'PRESET = "full"': 'PRESET = "demo"',
    "PROCESSES = None": "PROCESSES = 2",
    "logging_steps=10": "logging_steps=5",
    "vocab_size=4_500, n_layer=2, n_embd=128, n_head=4, block_size=64": "vocab_size=900, n_layer=1, n_embd=32, n_head=2, block_size=32",
    "max_steps=1350, eval_steps=225": "max_steps=20, eval_steps=10",
    "zip(*demo_documents(), strict=True)": "zip(*islice(demo_documents(), 0, None, 25), strict=True)",
}


def edited(source, tree, **constants):
    """设置换成小的，/kaggle 换成 tree，另改几个常量。"""
    for old, new in (SMALL | {'Path("/kaggle")': f"Path({str(tree)!r})"}).items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    for name, value in constants.items():
        source, times = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value}", source)
        assert times == 1, name
    return source


def tree_in(folder):
    for name in ("working", "input"):
        (folder / "kaggle" / name).mkdir(parents=True)
    return folder / "kaggle"


def environment(**more):
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | more


def run_as_script(folder, tree, **constants):
    script = folder / "script.py"
    script.write_text(edited(SOURCE, tree, **constants), encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=280,
    )


def load(tree, **constants):
    """只取定义，不执行调用，当模块用。"""
    (tree / "temp" / "gpt2-chinese-temp").mkdir(parents=True)
    module, body = types.ModuleType("kaggle_file"), ast.parse(edited(SOURCE, tree, **constants)).body
    kept = [node for node in body if not isinstance(node, ast.Expr)]
    before = dict(os.environ)
    exec(compile(ast.Module(kept, []), "kaggle_file", "exec"), vars(module))
    os.environ.clear()
    os.environ.update(before)
    return module


def error_of(function, *args):
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert str(stop.value.code).startswith("错误：") and "\n" not in stop.value.code
    return stop.value.code


@pytest.fixture
def kaggle(tmp_path):
    return load(tree_in(tmp_path))


# ==== 1. 拼装，预算，与脚本一致 ====


def test_committed_file_is_assembled():
    """失败了就运行 python docs/kaggle/assemble.py，再提交。"""
    import assemble

    assert assemble.assemble() == SOURCE


def test_assemble_refuses_what_is_gone():
    import assemble

    for line in "no_such_name", "pack - no_such_word", "pack ~ no_such_text => x":
        assert error_of(assemble.expand, f"#@ a100_train: {line}")


def test_budget():
    assert SOURCE.count("\n") <= 750 and len(SOURCE.encode()) <= 46_000
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 45


def test_settings_are_those_of_the_scripts():
    import a100_train

    rows = {row[0]: row[3:] for row in a100_train.SETTINGS}
    tables = {
        node.targets[0].id: node.value.keywords
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("dict(")
    }
    for table, column in ("FULL", 0), ("DEMO", -1):
        for keyword in tables[table]:
            assert rows[keyword.arg][column] == ast.literal_eval(keyword.value), keyword.arg


def test_training_arguments_are_those_of_a100_train():
    def arguments(source):
        call = next(
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "transformers.TrainingArguments"
        )
        return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}

    ours, theirs = arguments(SOURCE), arguments((ROOT / "a100_train.py").read_text(encoding="utf-8"))
    assert theirs.keys() - ours.keys() == {"torch_compile", "tf32", "activation_checkpointing"}
    assert ours.keys() <= theirs.keys()
    different = {name for name, value in ours.items() if theirs[name] != value}
    assert different <= {"optim", "report_to"}


def test_cleaning_and_split_are_those_of_prepare_corpus(kaggle, real_texts):
    import numpy as np
    import pandas as pd

    import prepare_corpus

    texts = (
        real_texts["news"][:2000]
        + real_texts["reviews"][:2000]
        + real_texts["news"][:50]
        + [
            "",
            "短",
            "<p>一段<br>文字</p>&amp;后面",
            "文字。发布于 2023-01-01",
            "####@@@@$$$$%%%%",
            "a\u2581b\u200b 中文\r\n",
        ]
    )
    assert [kaggle.clean(text) for text in texts] == [prepare_corpus.clean(text)[0] for text in texts]
    batch = kaggle.clean_batch({"text": texts})
    sources = np.arange(len(texts)) // 3000
    table = pd.DataFrame({"hash": batch["hash"], "source": sources})
    theirs = table.assign(characters=list(map(len, batch["text"])))
    kaggle.split(table)
    prepare_corpus.split(theirs)
    for part in ("train_documents", "eval_documents"):
        assert table[part].tolist() == theirs[part].tolist() and table[part].sum() > 10


def test_muon_direction_in_fp16(kaggle):
    """T4 上 Newton–Schulz 用 fp16 算：与 fp32 的方向几乎相同，不溢出。"""
    import torch

    class OnT4(torch.Tensor):
        is_cuda = True

    torch.manual_seed(0)
    kaggle.torch.cuda.get_device_capability, before = lambda: (7, 5), kaggle.torch.cuda.get_device_capability
    try:
        for shape, size in ((3, 64, 64), 1e-6), ((1, 64, 256), 1.0), ((1, 256, 64), 1e4):
            gradient = torch.randn(shape) * size
            half = kaggle.orthogonalize(gradient.as_subclass(OnT4)).as_subclass(torch.Tensor)
            full = kaggle.orthogonalize(gradient)
            assert half.isfinite().all() and not torch.equal(half, full)
            assert torch.nn.functional.cosine_similarity(half.flatten(), full.flatten(), dim=0) > 0.999
    finally:
        kaggle.torch.cuda.get_device_capability = before


def test_grad_scaler_skips_an_overflow(kaggle):
    """fp16 的梯度溢出时，GradScaler 跳过整步：矩阵（Muon）和其余（AdamW）都不动；下一步照常。"""
    import torch

    kaggle.s.vocab_size = 900
    model = kaggle.build_model(kaggle.s)
    groups = kaggle.parameter_groups(model, 1e-3, 0.02)
    optimizer = kaggle.Muon(groups, lr=1e-3, betas=kaggle.BETAS, foreach=True, fused=False)
    scaler, ids = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.arange(64).view(2, 32)
    for overflow in True, False:
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(ids, ids)["loss"]).backward()
        if overflow:
            model.transformer.wte.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(same) if overflow else not any(same)
        assert scaler.get_scale() == 512.0


# ==== 2. 训练前就该说清的错误 ====


def gpu(name="Tesla T4", major=7, minor=5, memory=15_835_660_288):
    return types.SimpleNamespace(name=name, major=major, minor=minor, total_memory=memory)


@pytest.mark.parametrize(
    "gpus, words", [([], "GPU T4 x2"), ([gpu("Tesla P100-PCIE-16GB", 6, 0)], "计算能力 6.0.*选择 T4 x2")]
)
def test_wrong_accelerator(kaggle, monkeypatch, gpus, words):
    monkeypatch.setattr(kaggle.torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(kaggle.torch.cuda, "get_device_properties", lambda i: gpus[i])
    kaggle.PRESET = "full"
    assert re.search(words, error_of(kaggle.check_machine, kaggle.s))


@pytest.mark.parametrize("count, batch, accumulation", [(2, 16, 3), (1, 16, 6)])
def test_t4_settings(kaggle, monkeypatch, capsys, count, batch, accumulation):
    monkeypatch.setattr(kaggle.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(kaggle.torch.cuda, "get_device_properties", lambda i: gpu())
    kaggle.PROCESSES, s = None, types.SimpleNamespace(**kaggle.FULL, optim="muon")
    kaggle.check_machine(s)
    assert (s.precision, s.processes, s.batch_size, s.device) == ("fp16", count, batch, "cuda")
    assert s.effective_batch_size == count * batch * accumulation
    assert ("会快近一倍" in capsys.readouterr().out) == (count == 1)
    for size, gib in (16, "11.7"), (24, "16.3"):
        parts = kaggle.memory_needed(size, "muon", "fp16")
        need = (sum(parts.values()) + parts["gradients"]) / 2**30
        assert f"{need:.1f}" == gib and f"{size} 块要 {gib}" in SOURCE


def test_no_internet(kaggle, monkeypatch):
    def closed(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(kaggle.urllib.request, "urlopen", closed)
    kaggle.PRESET = "full"
    assert "打开右侧 Internet 开关" in error_of(kaggle.read_texts)
    monkeypatch.setattr(kaggle.subprocess, "run", lambda *args, **kwargs: types.SimpleNamespace(returncode=1))
    assert "打开右侧 Internet 开关" in error_of(kaggle.install)


def test_no_token_is_said_before_training(tmp_path):
    kaggle = load(tree_in(tmp_path), UPLOAD="True")
    text = error_of(kaggle.restore, kaggle.s)
    assert "HF_TOKEN" in text and "Secrets" in text
    calls = [ast.unparse(node.value.func) for node in ast.parse(SOURCE).body if isinstance(node, ast.Expr)]
    places = [calls.index(name) for name in ("restore", "prepare_corpus", "train", "upload")]
    assert places == sorted(places)


def test_disk_almost_full(kaggle, monkeypatch):
    """训练前不够就不开始；训练中快满了，几个进程一起停下，并存检查点。"""
    monkeypatch.setattr(kaggle, "read_report", lambda *args: {"train_tokens": 64_000})
    kaggle.s.work_dir.mkdir()
    (kaggle.WORKING / "others").write_bytes(bytes(1 << 20))
    assert kaggle.room() <= 20e9 - 2**20
    monkeypatch.setattr(kaggle, "room", lambda: 1e6)
    kaggle.s.batch_size = 8
    assert "删掉别的文件" in error_of(kaggle.derive, kaggle.s)
    kaggle.s.deadline, bag = math.inf, types.SimpleNamespace
    stop, control = kaggle.StopRequest(kaggle.s), bag(should_training_stop=False, should_save=False)
    for step, stopped in (4, False), (5, True):
        stop.on_step_end(bag(logging_steps=5), bag(global_step=step), control)
        assert control.should_training_stop == control.should_save == stopped


def test_out_of_memory_starts_all_processes_again(kaggle, monkeypatch, capsys):
    sizes = []

    def full(s):
        sizes.append(json.loads((kaggle.TEMP / "settings.json").read_text())["batch_size"])
        return (1, "torch.OutOfMemoryError: CUDA out of memory.") if len(sizes) < 3 else (0, "")

    kaggle.s.work_dir.mkdir()
    monkeypatch.setattr(kaggle, "run_processes", full)
    monkeypatch.setattr(kaggle, "definitions", lambda: "")
    monkeypatch.setattr(kaggle, "derive", lambda s: None)
    kaggle.s.batch_size, kaggle.s.key = 16, ["demo", 900, 1]
    kaggle.train(kaggle.s)
    assert sizes == [16, 8, 4] and "微批量减到 4" in capsys.readouterr().out
    kaggle.s.batch_size, sizes[:] = 3, []
    assert "OutOfMemory" in error_of(kaggle.train, kaggle.s) and sizes == [3]
    monkeypatch.setattr(kaggle, "run_processes", lambda s: (1, "错误：第 7 步的损失是 nan"))
    assert error_of(kaggle.train, kaggle.s) == "错误：第 7 步的损失是 nan"
    monkeypatch.setattr(kaggle, "run_processes", lambda s: (-9, ""))
    assert "什么也没有上传" in error_of(kaggle.train, kaggle.s)


def test_stop_button(kaggle, capsys):
    """按停止键：训练进程收不到信号，看到 STOP 才停，正常退出。"""
    kaggle.s.processes = 2
    (kaggle.TEMP / "train.py").write_text(
        f"import time\nfrom pathlib import Path\nwhile not Path({str(kaggle.STOP)!r}).exists():\n"
        "    time.sleep(0.1)\nprint('存好了')\n",
        encoding="utf-8",
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # 在后台启动的 shell 里，它是被忽略的
    try:
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert kaggle.run_processes(kaggle.s) == (0, "")
    finally:
        signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr().out
    assert "收到停止信号" in shown and shown.count("存好了") == 2


# ==== 3. 真的训练 ====


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """一口气训练完：当脚本，两个进程。"""
    folder = tmp_path_factory.mktemp("long")
    done = run_as_script(folder, tree_in(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "kaggle" / "working" / "gpt2-chinese", done


def losses(work_dir):
    rows = [json.loads(line) for line in (work_dir / "train_log.jsonl").read_text("utf-8").splitlines()]
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows]


def test_script_trains_with_two_processes(long_run):
    work_dir, done = long_run
    assert "2 个进程" in done.stdout and "步 20/20" in done.stdout
    assert not re.search("Traceback|arning", done.stdout + done.stderr)
    log = losses(work_dir)
    assert abs(log[0][2] - math.log(900)) < 0.5 and log[-1][2] < log[0][2] - 0.2
    assert {path.name for path in (work_dir / "checkpoints").iterdir()} == {"checkpoint-10", "checkpoint-20"}
    assert (work_dir / "checkpoints" / "checkpoint-20" / "rng_state_1.pth").exists()
    assert (work_dir / "loss_curve.png").stat().st_size > 10_000
    kept = {path.name for path in work_dir.parent.iterdir()}
    assert kept == {"gpt2-chinese"} and not (work_dir / "corpus").exists()  # 大而临时的都在别处
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work_dir / "final_model")
    text = "中国，你好！"
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "final_model")
    assert tokenizer.decode(tokenizer.encode(text)) == text and model.config.vocab_size == 900


def need_jupyter():
    missing = [name for name in ("jupytext", "nbclient", "ipykernel") if not importlib.util.find_spec(name)]
    if missing and os.environ.get("REQUIRE_KAGGLE") == "1":
        pytest.fail(f"REQUIRE_KAGGLE=1，却没有 {missing}")
    if missing:
        pytest.skip(f"没有装 {missing}：pip install -r requirements-dev.txt")


def execute(notebook, monkeypatch):
    """在真的 Jupyter 内核里逐格运行；返回各格的 (文字, 图片数)。"""
    import nbclient

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3").execute()


def outputs(notebook):
    text, pictures = "", 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text += output.get("text", "") if output.output_type == "stream" else ""
            pictures += "image/png" in output.get("data", {})
    text = re.sub(r".*TqdmWarning: IProgress.*\n.*tqdm\n", "", text)  # 没有装 ipywidgets；Kaggle 有
    return text, pictures


def as_notebook(source, pasted=False):
    import jupytext
    import nbformat

    if pasted:
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    return jupytext.reads(source, fmt="py:percent")


@pytest.fixture(scope="module")
def two_sessions(tmp_path_factory):
    """第一次逐格运行，时间到了停下；第二次粘贴成一格，从第一次的输出接着来。返回两次的 (work_dir, notebook)。"""
    need_jupyter()
    folder, runs = tmp_path_factory.mktemp("sessions"), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number, hours in enumerate(("1e-9", "11")):
            tree = tree_in(folder / str(number))
            if runs:
                shutil.copytree(runs[0][0], tree / "input" / "notebooks" / "me" / "earlier" / "gpt2-chinese")
            notebook = as_notebook(edited(SOURCE, tree, MAX_HOURS=hours), pasted=bool(runs))
            monkeypatch.chdir(folder)
            execute(notebook, monkeypatch)
            runs.append((tree / "working" / "gpt2-chinese", notebook))
    return runs


def test_notebook_cell_by_cell(two_sessions):
    work_dir, notebook = two_sessions[0]
    text, pictures = outputs(notebook)
    assert [cell.cell_type for cell in notebook.cells[:3]] == ["markdown", "markdown", "code"]
    titles = re.findall(r"(?m)^## (\d+)", "\n".join(cell.source for cell in notebook.cells))
    assert titles == [str(i) for i in range(1, 12)]
    assert "步 1/20" in text and "步 5/20" in text and "步 10/20" not in text and pictures == 1
    assert "arning" not in text and max(map(len, text.splitlines())) < 400
    assert not (work_dir / "final_model").exists() and (work_dir / "checkpoints" / "checkpoint-5").is_dir()


def test_next_session_is_bit_identical(two_sessions, long_run):
    work_dir, notebook = two_sessions[1]
    text, pictures = outputs(notebook)
    assert "第 5 步接着训练" in text and "打包好的数据还在" in text and "步 20/20" in text and pictures == 1
    assert losses(work_dir)[-4:] == losses(long_run[0])[-4:]
    for name in ("final_model/model.safetensors", "checkpoints/checkpoint-20/model.safetensors"):
        assert (work_dir / name).read_bytes() == (long_run[0] / name).read_bytes()


def test_state_of_other_settings_is_refused(two_sessions, tmp_path):
    tree = tree_in(tmp_path)
    shutil.copytree(two_sessions[0][0], tree / "input" / "earlier" / "gpt2-chinese")
    kaggle = load(tree)
    kaggle.s.n_layer = 3
    text = error_of(kaggle.restore, kaggle.s)
    assert "n_layer 是 1，这次是 3" in text and not kaggle.s.work_dir.exists()
    kaggle.s.n_layer = 1
    state = tree / "input/earlier/gpt2-chinese/checkpoints/checkpoint-5/optimizer.pt"
    state.write_bytes(state.read_bytes()[:1000])
    kaggle.restore(kaggle.s)  # 坏的检查点不算
    assert not kaggle.s.work_dir.exists()


def small_program(tree, hub, folder, calls):
    """只有定义和 calls 的程序，对着假的 Hub；令牌由假的 kaggle_secrets 给。"""
    (folder / "kaggle_secrets.py").write_text(
        "class UserSecretsClient:\n    def get_secret(self, name):\n"
        f"        return {{'HF_TOKEN': {TOKEN!r}}}[name]\n"
    )
    body = ast.parse(edited(SOURCE, tree, UPLOAD="True")).body
    body = [node for node in body if not isinstance(node, ast.Expr)]
    (tree / "temp" / "gpt2-chinese-temp").mkdir(parents=True, exist_ok=True)
    (folder / "program.py").write_text(ast.unparse(ast.Module(body, [])) + f"\n{calls}\n", encoding="utf-8")
    more = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=environment(**more),
        encoding="utf-8",
        capture_output=True,
        timeout=120,
    )


@pytest.fixture
def hub():
    made = KaggleHub()
    yield made
    made.close()


def test_state_goes_through_a_private_repository(long_run, hub, tmp_path):
    tree = tree_in(tmp_path)
    shutil.copytree(long_run[0], tree / "working" / "gpt2-chinese")
    for _ in range(2):  # 第二次什么也不用传
        done = small_program(tree, hub, tmp_path, "upload(s)")
        assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr[-2000:]
    assert hub.exists and hub.private
    assert {
        "packed/train.bin",
        "tokenizer/sentencepiece.model",
        "train_log.jsonl",
        "config.json",
        "final_model/model.safetensors",
        "checkpoints/checkpoint-20/optimizer.pt",
    } <= hub.files.keys()
    assert not any("checkpoint-10" in path for path in hub.files)
    assert TOKEN.encode() not in b"".join(hub.objects.values())
    shutil.rmtree(tree / "working" / "gpt2-chinese")
    done = small_program(tree, hub, tmp_path, "restore(s)")
    assert done.returncode == 0 and "第 20 步接着训练" in done.stdout, done.stderr[-2000:]
    restored = tree / "working" / "gpt2-chinese"
    for path in hub.files:
        assert (restored / path).read_bytes() == (long_run[0] / path).read_bytes(), path


def test_public_repository_is_refused(hub, tmp_path):
    hub.private = False
    done = small_program(tree_in(tmp_path), hub, tmp_path, "restore(s)")
    assert (
        done.returncode == 1 and re.fullmatch(r"错误：me/state 是公开的.*\n", done.stderr) and not hub.commits
    )


def test_failing_training_stops_the_notebook(long_run, hub, tmp_path, monkeypatch):
    """显存不够，减半重来；又发散了：notebook 以错误结束，那一行话在，后面的格子没有运行，什么也没有上传。"""
    need_jupyter()
    import nbclient

    tree = tree_in(tmp_path)
    for name in ("packed", "tokenizer"):
        shutil.copytree(long_run[0] / name, tree / "working" / "gpt2-chinese" / name)
    monkeypatch.chdir(tmp_path)
    small_program(tree, hub, tmp_path, "")  # 写好 kaggle_secrets.py
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    source = edited(SOURCE, tree, UPLOAD="True")
    start = "\n    trainer = build_trainer(s, checkpoint)"
    full = '\n    if s.batch_size > 8:\n        raise torch.OutOfMemoryError("CUDA out of memory.")'
    for old, new in {'["loss"] + (': '["loss"] + float("nan") + (', start: full + start}.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    notebook = as_notebook(source)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="发散了"):
        execute(notebook, monkeypatch)
    text, pictures = outputs(notebook)
    assert "错误：第 1 步的损失是" in text and pictures == 0 and not hub.commits and not hub.files
    assert "微批量减到 8" in text and text.rindex("Traceback") < text.index("微批量减到 8")


def test_command_of_the_guide_makes_the_notebook(tmp_path):
    """指南里的 jupytext 命令，原样运行。"""
    need_jupyter()
    import nbformat

    commands = set(re.findall(r"(?m)^ *(jupytext .+)$", (GUIDE / "README.md").read_text(encoding="utf-8")))
    (tmp_path / "docs" / "kaggle").mkdir(parents=True)
    shutil.copy(FILE, tmp_path)
    assert len(commands) == 1
    subprocess.run([sys.executable, "-m", *commands.pop().split()], cwd=tmp_path, check=True, timeout=60)
    notebook = nbformat.read(tmp_path / "docs" / "kaggle" / f"{FILE.stem}.ipynb", 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.language == "python"
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", *["markdown", "code"] * 11]


def test_kernel_metadata_and_guide():
    metadata = json.loads((GUIDE / "kernel-metadata.json").read_text(encoding="utf-8"))
    assert metadata["machine_shape"] == "NvidiaTeslaT4" and metadata["enable_gpu"]
    assert metadata["enable_internet"] and metadata["is_private"]
    assert Path(metadata["code_file"]).suffix == ".ipynb"
    guide = (GUIDE / "README.md").read_text(encoding="utf-8")
    assert metadata["code_file"] in guide
    for picture in re.findall(r"\]\(([\w/.-]+\.png)\)", guide):
        assert (GUIDE / picture).stat().st_size > 10_000
    flops = 6 * (82_066_944 - 1024 * 768) + 12 * 8 * 768 * 1024  # 一个 token
    rows = re.findall(r"\| (\d+) % \| ([\d.]+) k \| ([\d.]+) \| (\d) \| ([\d.]+) \| (\d) \|", guide)
    assert len(rows) == 4 and f"{flops / 1e8:.2f} 亿次" in guide
    for share, speed, *figures in rows:
        assert float(speed) == round(2 * 65e9 * int(share) / 100 / flops, 1)
        for cards, hours, sessions in (2, *figures[:2]), (1, *figures[2:]):
            exact = 11_838 * 98_304 / (cards * 65e12 * int(share) / 100 / flops) / 3600
            assert float(hours) == round(exact, 1) and int(sessions) == math.ceil((exact + 0.5) / 11)
