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
from pathlib import Path

import pytest
from conftest import ROOT
from kaggle_hub import TOKEN, KaggleHub

FILE = ROOT / "kaggle_pretrain_combined.py"
GUIDE = ROOT / "docs" / "kaggle"
SOURCE = FILE.read_text(encoding="utf-8")
sys.path.insert(0, str(GUIDE))
# 一个几秒钟就训练完的设置
SMALL = {
    'PRESET = "full"': 'PRESET = "demo"',
    "PROCESSES = None": "PROCESSES = 2",
    '"logging_steps": 10': '"logging_steps": 5',
    '"n_layer": 2': '"n_layer": 1',
    '"n_embd": 128': '"n_embd": 32',
    '"n_head": 4': '"n_head": 2',
    '"block_size": 64': '"block_size": 32',
    '"max_steps": 1350': '"max_steps": 20',
    '"eval_steps": 225': '"eval_steps": 10',
    '"demo": 4_500': '"demo": 900',
    "in demo_documents():": "in islice(demo_documents(), 0, None, 25):",
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
    module = types.ModuleType("kaggle_file")
    body = ast.parse(edited(SOURCE, tree, **constants)).body
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

    text = error_of(assemble.assemble, "from a100_train import pack, no_such_name\n")
    assert "a100_train.py" in text and "no_such_name" in text and "pack" not in text.partition("；")[0]


def test_only_whole_definitions():
    """与脚本同名的定义，除了下面几个，都一字不差，说明和注释也在。"""
    scripts = {}
    for name in ("prepare_corpus", "train_tokenizer", "a100_train"):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                scripts.setdefault(node.name, []).append(ast.get_source_segment(source, node))
    different = set()
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in scripts:
            if ast.get_source_segment(SOURCE, node) not in scripts[node.name]:
                different.add(node.name)
    assert different == {"build_optimizer", "save_snapshot", "save_final_model", "StopRequest"}


def test_settings_are_those_of_the_scripts(monkeypatch):
    import a100_train

    monkeypatch.setattr(sys, "argv", ["a100_train.py"])
    defaults = vars(a100_train.read_settings())
    table = next(
        node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "FULL"
    )
    for name, value in ast.literal_eval(table.value).items():
        assert defaults[name] == value, name


def test_requirements_are_those_of_the_repository(kaggle):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    known = {re.split(r"\s*[;#]", line)[0].strip() for line in lines}
    assert set(kaggle.REQUIREMENTS) <= known


def documents_of(folder):
    """{(train 或 eval, 来源, 文字)}，按文件里的次序。"""
    import pyarrow.parquet as pq

    rows = []
    for path in sorted(folder.glob("*.parquet")):
        rows += [(path.name, row["source"], row["text"]) for row in pq.read_table(path).to_pylist()]
    return rows


@pytest.mark.parametrize("preset", ["demo", "full"])
def test_corpus_is_that_of_prepare_corpus(kaggle, real_texts, tmp_path, monkeypatch, preset):
    """同样的文档，同样的验证集，次序也相同：演示的，和下载的维基、知乎的形状。"""
    import pandas as pd
    from conftest import call

    import prepare_corpus

    sources = ["demo"]
    kaggle.PRESET = preset
    if preset == "demo":
        monkeypatch.setattr(kaggle, "islice", lambda documents, *numbers: documents)
    else:
        sources = ["wiki", "zhihu"]
        wiki = [
            {"completion": text, "source": "x"}
            for text in real_texts["news"][:3000] + ["短", "<p>标签</p>一段"]
        ]
        zhihu = [
            {"INSTRUCTION": "这个怎么样？", "RESPONSE": text, "METADATA": "{}"}
            for text in [*real_texts["reviews"][:1000], "", None, "编辑于 2020-01-01"]
        ]
        for name in sources:
            (tmp_path / name).mkdir()
        (tmp_path / "wiki" / "wiki.json").write_text(json.dumps(wiki, ensure_ascii=False), encoding="utf-8")
        (tmp_path / "wiki" / "README.md").write_text("# 说明", encoding="utf-8")
        pd.DataFrame(zhihu).to_parquet(tmp_path / "zhihu" / "train.parquet")

        def downloaded(repo, **settings):
            return str(tmp_path / ("wiki" if "wiki" in repo else "zhihu"))

        monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    kaggle.prepare_corpus(kaggle.s)
    call(prepare_corpus, "--corpus", *sources, "--output_dir", tmp_path / "corpus")
    theirs = documents_of(tmp_path / "corpus")
    assert documents_of(kaggle.s.work_dir / "corpus") == theirs and len(theirs) > 3000
    report = json.loads((tmp_path / "corpus" / "report.json").read_text(encoding="utf-8"))
    assert kaggle.s.data_fingerprint[2] == report["corpus_hash"]


def test_muon_direction_in_fp16(kaggle):
    """T4 上 Newton–Schulz 用 fp16 算：与 fp32 的方向几乎相同，不溢出。"""
    import torch

    class OnT4(torch.Tensor):
        is_cuda = True

    torch.manual_seed(0)
    before = kaggle.torch.cuda.get_device_capability
    kaggle.torch.cuda.get_device_capability = lambda: (7, 5)
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

    kaggle.choose_device(kaggle.s)
    kaggle.choose_speed(kaggle.s)
    model = kaggle.build_model(kaggle.s)
    groups = kaggle.parameter_groups(model, 1e-3, 0.02)
    optimizer = kaggle.Muon(groups, lr=1e-3, betas=kaggle.BETAS, foreach=True, fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ids = torch.arange(64).view(2, 32)
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


T4 = gpu()
A10 = gpu("NVIDIA A10", 8, 6, 23_600_000_000)


@pytest.mark.parametrize(
    "card, count, precision, batch_size",
    [(T4, 2, "fp16", 16), (T4, 1, "fp16", 16), (A10, 1, "bf16", 32)],
)
def test_settings_of_a_card(kaggle, monkeypatch, capsys, card, count, precision, batch_size):
    """一张卡用什么数、微批量多少，规则与 a100_train.py 相同；两张 T4，和魔搭等处借的 24 GB 的卡。"""
    cuda = kaggle.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: count)
    monkeypatch.setattr(cuda, "get_device_name", lambda *number: card.name)
    monkeypatch.setattr(cuda, "get_device_capability", lambda *number: (card.major, card.minor))
    monkeypatch.setattr(cuda, "get_device_properties", lambda number: card)
    kaggle.PROCESSES = None
    kaggle.WORLD_SIZE = count
    s = kaggle.s
    vars(s).update(kaggle.FULL, vocab_size=32_000, parameters=82_066_944)
    kaggle.check_machine(s)
    assert (s.precision, s.attn, s.processes, s.device) == (precision, "sdpa", count, "cuda")
    assert kaggle.choose_batch_size(s) == batch_size
    assert ("会快近一倍" in capsys.readouterr().out) == (count == 1)


def test_no_internet(kaggle, monkeypatch):
    monkeypatch.setattr(kaggle.subprocess, "run", lambda *args, **kwargs: types.SimpleNamespace(returncode=1))
    assert "打开右侧 Internet 开关" in error_of(kaggle.install)


def test_no_token_is_said_before_training(tmp_path):
    kaggle = load(tree_in(tmp_path), UPLOAD="True")
    text = error_of(kaggle.restore, kaggle.s)
    assert "HF_TOKEN" in text and "Secrets" in text
    calls = [ast.unparse(node.value.func) for node in ast.parse(SOURCE).body if isinstance(node, ast.Expr)]
    places = [calls.index(name) for name in ("restore", "prepare_corpus", "launch", "upload")]
    assert places == sorted(places)


def test_disk_almost_full(kaggle, monkeypatch):
    """训练中快满了，几个进程一起停下，并存检查点。"""
    kaggle.s.work_dir.mkdir()
    (kaggle.WORKING / "others").write_bytes(bytes(1 << 20))
    assert kaggle.room() <= 20e9 - 2**20
    monkeypatch.setattr(kaggle, "room", lambda: 1e6)
    kaggle.s.parameters = 10**6
    kaggle.s.deadline = math.inf
    bag = types.SimpleNamespace
    stop = kaggle.StopRequest(kaggle.s)
    control = bag(should_training_stop=False, should_save=False)
    for step, stopped in (4, False), (5, True):
        stop.on_step_end(bag(logging_steps=5), bag(global_step=step), control)
        assert control.should_training_stop == control.should_save == stopped


def test_out_of_memory_starts_all_processes_again(kaggle, monkeypatch, capsys):
    sizes = []

    def full(s):
        asked = json.loads((kaggle.TEMP / "settings.json").read_text(encoding="utf-8"))["asked_batch_size"]
        sizes.append(asked or 16)
        return (1, f"错误：显存放不下微批量 {sizes[-1]}；同一条命令") if len(sizes) < 3 else (0, "")

    kaggle.s.work_dir.mkdir()
    monkeypatch.setattr(kaggle, "run_processes", full)
    monkeypatch.setattr(kaggle, "worker_source", lambda: "")
    kaggle.s.data_fingerprint = ["demo", 900, "x"]
    kaggle.launch(kaggle.s)
    assert sizes == [16, 8, 4] and "微批量减到 4" in capsys.readouterr().out
    for line in "错误：显存放不下微批量 1；同一条命令", "错误：第 7 步的损失是 nan":
        monkeypatch.setattr(kaggle, "run_processes", lambda s, line=line: (1, line))
        assert error_of(kaggle.launch, kaggle.s) == line
    monkeypatch.setattr(kaggle, "run_processes", lambda s: (-9, ""))
    assert "什么也没有上传" in error_of(kaggle.launch, kaggle.s)


def test_worker_source(kaggle, tmp_path, monkeypatch):
    """训练进程只运行写明的格子，次序不变；格子里 ! 和 % 开头的行换成 pass，不把整格丢掉。"""
    source = kaggle.worker_source.__globals__["__file__"] = str(tmp_path / "script.py")
    mark = "# 训练进程也运行这一格"
    cells = [
        f"%%time\n{mark}\n%matplotlib inline\na = 1\nif a:\n    !pip list\n",
        "# 自己加的\na = 2\n",
        f"{mark}\na += 10\n",
    ]
    Path(source).write_text("# %%\n" + "\n# %%\n".join(cells), encoding="utf-8")
    names = {"train_worker": lambda: None}
    exec(kaggle.worker_source(), names)
    assert names["a"] == 11


def test_half_written_log(kaggle, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    assert kaggle.read_jsonl(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


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
    held_out = [loss for _, _, loss in losses(work_dir) if loss]
    assert len(held_out) == 3
    assert abs(held_out[0] - math.log(900)) < 0.5 and held_out[-1] < held_out[0] - 0.2
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
    folder = tmp_path_factory.mktemp("sessions")
    runs = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number, hours in enumerate(("1e-9", "11")):
            tree = tree_in(folder / str(number))
            if runs:
                shutil.copytree(runs[0][0], tree / "input" / "notebooks" / "me" / "earlier" / "gpt2-chinese")
            notebook = as_notebook(edited(SOURCE, tree, MAX_HOURS=hours), pasted=bool(runs))
            if not runs:  # 有人在格子里加了 notebook 的命令
                notebook.cells[2].source = "%%time\n" + notebook.cells[2].source
                notebook.cells[6].source += "\n%matplotlib inline\n!echo 你好"
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
    assert (
        "你好" in text
        and "步 1/20" in text
        and "步 5/20" in text
        and "步 10/20" not in text
        and pictures == 1
    )
    assert "arning" not in text and max(map(len, text.splitlines())) < 400
    assert not (work_dir / "final_model").exists() and (work_dir / "checkpoints" / "checkpoint-5").is_dir()


def test_next_session_is_bit_identical(two_sessions, long_run):
    work_dir, notebook = two_sessions[1]
    text, pictures = outputs(notebook)
    assert "第 5 步接着训练" in text and "打包好的数据还在" in text and "步 20/20" in text and pictures == 1
    assert losses(work_dir)[-4:] == losses(long_run[0])[-4:]
    for name in ("final_model/model.safetensors", "checkpoints/checkpoint-20/model.safetensors"):
        assert (work_dir / name).read_bytes() == (long_run[0] / name).read_bytes()


def test_plain_jupyter(tmp_path, monkeypatch):
    """没有 /kaggle 的 Jupyter：一个进程，写在当前文件夹。"""
    need_jupyter()
    notebook = as_notebook(edited(SOURCE, tmp_path / "no_such_place", MAX_HOURS="1e-9", PROCESSES="1"))
    monkeypatch.chdir(tmp_path)
    execute(notebook, monkeypatch)
    text, pictures = outputs(notebook)
    assert "1 个进程" in text and "步 5/20" in text and pictures == 1
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2-chinese", "gpt2-chinese-temp"}
    assert (tmp_path / "gpt2-chinese/checkpoints/checkpoint-5").is_dir()


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
    start = "        trainer.train("
    full = '        if s.batch_size > 8:\n            raise torch.OutOfMemoryError("CUDA out of memory.")\n'
    for old, new in {'numbers = [logs["loss"]]': 'numbers = [float("nan")]', start: full + start}.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    notebook = as_notebook(source)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="发散了"):
        execute(notebook, monkeypatch)
    text, pictures = outputs(notebook)
    assert "错误：第 1 步的损失" in text and pictures == 0 and not hub.commits and not hub.files
    assert "微批量减到 8" in text


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
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("markdown") == 12 and kinds[:3] == ["markdown", "markdown", "code"]
    text = "\n".join(cell.source for cell in notebook.cells)
    assert text.count("# 训练进程也运行这一格\n") == 6


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
