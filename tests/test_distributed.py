"""多进程：CPU 上用 gloo，由 torchrun 启动。与一个进程、同样的有效批量得到同样的模型。"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from conftest import ROOT, call, environment, read_jsonl, write_jsonl
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler

import a100_train

STEPS = 20
TRAINING = ["--device", "cpu", "--vocab_size", 1000, "--n_layer", 1, "--n_embd", 32, "--n_head", 2,
            "--block_size", 32, "--batch_size", 4, "--effective_batch_size", 16, "--max_steps", STEPS,
            "--eval_steps", 4, "--logging_steps", 1, "--learning_rate", 0.01,
            "--optim", "adamw_torch_fused"]        # FSDP 只用它


@pytest.fixture(scope="module", autouse=True)
def no_plot():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a100_train, "plot_curve", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def corpus(real_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return [f"{name}={write_jsonl(folder / f'{name}.jsonl', texts[:600])}"
            for name, texts in real_texts.items()]


def launch(*command, **variables):
    """启动 python -m command...；输出（stdout 和 stderr 在一起）在 .stdout。variables 是另加的环境变量。"""
    return subprocess.Popen([sys.executable, "-m", *map(str, command)], env=environment() | variables,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                            start_new_session=True)


def torchrun(arguments, processes=2, nodes=()):
    """启动 torchrun；nodes 是多机时的参数。"""
    return launch("torch.distributed.run", f"--nproc_per_node={processes}", *(nodes or ("--standalone",)),
                  ROOT / "a100_train.py", *arguments)


def accelerate(script, arguments, **variables):
    """README 里的 FSDP 命令：accelerate launch --config_file fsdp.yaml --num_processes 2 ...。"""
    return launch("accelerate.commands.launch", "--config_file", ROOT / "fsdp.yaml", "--num_processes", 2,
                  script, *arguments, **variables)


def finish(process, timeout=200):
    """等它结束，返回输出；超时就把它的进程都结束掉。"""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    """两个进程从 jsonl 跑到底。返回 (工作目录, 输出)。"""
    work = tmp_path_factory.mktemp("two") / "work"
    process = torchrun(["--corpus", *corpus, *TRAINING, "--work_dir", work])
    output = finish(process)
    assert process.returncode == 0, output
    return work, output


@pytest.fixture(scope="module")
def one(two, tmp_path_factory):
    """一个进程，同样的语料和有效批量（梯度累积四次）。"""
    work = tmp_path_factory.mktemp("one") / "work"
    prepared(two[0], work)
    assert call(a100_train, *TRAINING, "--work_dir", work) == 0
    return work


def prepared(source, work):
    for name in ("corpus", "tokenizer", "packed"):
        shutil.copytree(source / name, work / name)


def check_same(work, expected):
    """权重、每一步的损失、验证值都（几乎）一样；每步恰一行。"""
    ours, theirs = (load_file(folder / "final_model/model.safetensors") for folder in (work, expected))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        a, b = ours[name], theirs[name]
        if name.endswith("c_attn.bias"):     # k 的偏置加在每个位置上，softmax 里抵消：梯度只有舍入误差，Adam 又把它放大
            (a, a_key), (b, b_key) = ((torch.cat([q, v]), k) for q, k, v in (a.chunk(3), b.chunk(3)))
            torch.testing.assert_close(a_key, b_key, atol=1e-3, rtol=0, msg=name)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=name)
    rows, expected_rows = (read_jsonl(folder / "train_log.jsonl") for folder in (work, expected))
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_char"):
        values = [(row["step"], row[key]) for row in rows if key in row]
        expected_values = [(row["step"], row[key]) for row in expected_rows if key in row]
        assert [step for step, _ in values] == [step for step, _ in expected_values]
        torch.testing.assert_close([value for _, value in values], [value for _, value in expected_values],
                                   atol=2e-4, rtol=1e-3 if key == "grad_norm" else 1e-4, msg=key)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))


# ==== 相同的结果 ====

def test_two_processes_equal_one(one, two):
    check_same(two[0], one)
    untrained = a100_train.build_model(1000, 1, 32, 2, 32, "sdpa", False, 42)
    trained = load_file(one / "final_model/model.safetensors")["transformer.wte.weight"]
    assert (trained - untrained.transformer.wte.weight).abs().max() > 0.05, "没有学到东西，比较就没有意义"


def test_only_rank_zero_prepares_and_prints(two):
    work, output = two
    for line in ("运行 prepare_corpus.py", "运行 train_tokenizer.py", "打包 ", "微批量 4 × 2 个进程", "步 7/20 ",
                 "验证 8 ", "完成。模型"):
        assert output.count(line) == 1, line
    assert {path.name for path in (work / "checkpoints/checkpoint-20").glob("rng_state*")} == {
        "rng_state_0.pth", "rng_state_1.pth"}
    assert "Traceback" not in output


def test_two_nodes_equal_one(one, tmp_path):
    """两台“机器”：两个 torchrun，经 127.0.0.1 会合，同一个工作目录。"""
    prepared(one, tmp_path / "work")
    for timeout in (90, 200):                # 找到的空闲端口可能恰好又被别人占去，两边就会合不上：换一个端口再来一次
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = [torchrun([*TRAINING, "--work_dir", tmp_path / "work"], 1,
                          ("--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1",
                           f"--master_port={port}")) for rank in (0, 1)]
        try:
            outputs = [finish(node, timeout) for node in nodes]
            break
        except subprocess.TimeoutExpired:
            for node in nodes:
                if node.poll() is None:
                    os.killpg(node.pid, signal.SIGKILL)
            assert timeout == 90 and not (tmp_path / "work/checkpoints").exists(), "会合以后才卡住的，不是端口的事"
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "步 20/20" in outputs[0] and "步 20/20" not in outputs[1]
    check_same(tmp_path / "work", one)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_each_step_sees_the_same_blocks(micro_batch):
    """Trainer 把一批批轮流分给各进程：不论微批量和进程数，第 k 步用的都是第 16k 到 16k+15 块。"""
    effective, length = 16, 16 * 5
    for world in (1, 2):
        accumulation = effective // (micro_batch * world)
        batches = BatchSampler(SequentialSampler(range(length)), micro_batch, drop_last=False)
        shards = [list(BatchSamplerShard(batches, world, rank)) for rank in range(world)]
        for step in range(5):
            micro_steps = slice(step * accumulation, (step + 1) * accumulation)
            seen = sorted(i for shard in shards for batch in shard[micro_steps] for i in batch)
            assert seen == list(range(step * effective, (step + 1) * effective)), (world, step)


# ==== 停下与换进程数 ====

def test_sigterm_to_torchrun_then_one_two_one(one, tmp_path, monkeypatch, capsys):
    """1 个进程开头，2 个接着，SIGTERM 停在商量好的一步，再换回 1 个：与一口气跑完的一样。"""
    work = tmp_path / "work"
    prepared(one, work)
    with monkeypatch.context() as patch:
        patch.setattr(a100_train.GPT2Trainer, "reserve_seconds",
                      lambda self: 1e9 if self.state.global_step == 3 else 0)
        assert call(a100_train, *TRAINING, "--work_dir", work, "--max_hours", 100) == 0
    assert "停在第 3 步" in capsys.readouterr().out
    process, log, end = torchrun([*TRAINING, "--work_dir", work]), work / "train_log.jsonl", time.time() + 150
    while time.time() < end and process.poll() is None and '"step": 5' not in log.read_text("utf-8"):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode != 0
    stopped = re.search(r"停在第 (\d+) 步，检查点已存好。接着训练：torchrun --nproc_per_node=2 ", output)
    assert stopped and 5 <= int(stopped[1]) < STEPS, output
    assert output.count("停在第") == 1 and "a100_train.py\", line" not in output
    checkpoint = work / f"checkpoints/checkpoint-{stopped[1]}"
    assert a100_train.checkpoint_problem(checkpoint) is None
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    assert call(a100_train, *TRAINING, "--work_dir", work) == 0
    assert f"从第 {stopped[1]} 步接着训练" in capsys.readouterr().out
    check_same(work, one)


def test_error_of_rank_zero_ends_the_job(one, tmp_path):
    """0 号进程发现设置变了：整个任务以非零退出，只有一行错误；等着的进程随即被叫停，不用等它超时。"""
    work = tmp_path / "work"
    shutil.copytree(one, work)
    start = time.time()
    process = torchrun([*TRAINING, "--work_dir", work, "--seed", 7])
    output = finish(process)
    assert process.returncode != 0 and time.time() - start < 100
    lines = [line for line in output.splitlines() if "错误" in line]
    assert len(lines) == 1 and "seed" in lines[0] and "--fresh" in lines[0], output
    assert "a100_train.py\", line" not in output, "我们自己的代码没有 traceback"


def test_bad_arguments_are_reported_once(tmp_path):
    """参数的错，每个进程都看得出来，也只打印一次。"""
    process = torchrun([*TRAINING, "--batch_size", 16, "--work_dir", tmp_path / "work"])
    output = finish(process)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if "错误" in line]
    assert len(lines) == 1 and "2 个进程" in lines[0], output
    assert not (tmp_path / "work/corpus").exists()


# ==== FSDP ====

def test_fsdp_one_fsdp_equals_one(one, tmp_path, monkeypatch, capsys):
    """2 个 FSDP 进程开头，SIGTERM 停下；1 个普通进程接着；再换回 FSDP（加 --gradient_checkpointing）到底。

    与 1 个进程一口气跑完的一样：检查点的格式相同，连优化器状态也一样。
    """
    work, script = tmp_path / "work", ROOT / "tests/fsdp_on_cpu.py"
    prepared(one, work)
    process = accelerate(script, [*TRAINING, "--work_dir", work], SAMPLES=str(tmp_path / "a"))
    log, end = work / "train_log.jsonl", time.time() + 150
    while time.time() < end and process.poll() is None and not (
            log.exists() and '"step": 5' in log.read_text("utf-8")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    stopped = re.search(r"停在第 (\d+) 步，检查点已存好。接着训练：accelerate launch --config_file fsdp.yaml "
                        r"--num_processes 2 ", output)
    assert stopped and 5 <= int(stopped[1]) < STEPS - 2, output
    with monkeypatch.context() as patch:
        patch.setattr(a100_train.GPT2Trainer, "reserve_seconds",
                      lambda self: 1e9 if self.state.global_step == int(stopped[1]) + 2 else 0)
        assert call(a100_train, *TRAINING, "--work_dir", work, "--max_hours", 100) == 0
    assert f"从第 {stopped[1]} 步接着训练" in capsys.readouterr().out
    process = accelerate(script, [*TRAINING, "--work_dir", work, "--gradient_checkpointing"],
                         SAMPLES=str(tmp_path / "b"))
    output = finish(process)
    assert process.returncode == 0 and f"从第 {int(stopped[1]) + 2} 步接着训练" in output, output
    check_same(work, one)
    ours, expected = (torch.load(folder / "checkpoints/checkpoint-20/optimizer.pt", weights_only=True)
                      for folder in (work, one))
    assert ours["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(ours["state"], expected["state"], atol=1e-4, rtol=0)
    for name in ("a", "b"):         # 各进程的续写一样长，通信才对得上
        assert (tmp_path / f"{name}0").read_bytes() == (tmp_path / f"{name}1").read_bytes() != b""
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "final_model")
    assert type(model) is transformers.GPT2LMHeadModel
    assert model.config.architectures == ["GPT2LMHeadModel"]


def test_fsdp_without_a_gpu_is_refused(one, tmp_path):
    """没有显卡时 accelerate 会悄悄改用 DDP：一行说清，不训练。"""
    prepared(one, tmp_path / "work")
    process = accelerate(ROOT / "a100_train.py", [*TRAINING, "--work_dir", tmp_path / "work"])
    output = finish(process)
    lines = [line for line in output.splitlines() if "错误" in line]
    assert process.returncode != 0 and len(lines) == 1, output
    assert "DDP" in lines[0] and "torchrun" in lines[0]
    assert not (tmp_path / "work/config.json").exists()


def fsdp_speed(**changes):
    """(自动选的加速设置, 命令行)：changes 是命令行明说的。"""
    asked = {"optim": "auto", "compile": None, "liger": None, "precision": "auto"} | changes
    speed = {"device": "cuda", "precision": "bf16", "optimizer": "adamw_bnb_8bit", "compile": True,
             "liger": False}
    chosen = {{"optim": "optimizer"}.get(key, key): value for key, value in changes.items()}
    return speed | chosen, SimpleNamespace(**asked)


def test_fsdp_replaces_automatic_choices():
    speed, args = fsdp_speed()
    a100_train.restrict_to_fsdp(speed, args)
    assert (speed["optimizer"], speed["compile"], speed["precision"]) == ("adamw_torch_fused", False, "bf16")


@pytest.mark.parametrize(("name", "value"), [("optim", "muon"), ("optim", "adamw_bnb_8bit"),
                                             ("compile", True), ("liger", True), ("precision", "fp16")])
def test_fsdp_refuses_what_was_not_tried(name, value):
    with pytest.raises(a100_train.UserError, match=rf"--{name} .*{value}"):
        a100_train.restrict_to_fsdp(*fsdp_speed(**{name: value}))
