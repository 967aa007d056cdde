"""多进程：CPU 上用 gloo，由 torchrun 启动。与一个进程、同样的有效批量得到同样的模型。"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import ROOT, STEPS, TINY, call, environment, read_jsonl
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler

import a100_train

ARGUMENTS = [*TINY, "--optim", "adamw_torch_fused"]


def torchrun(arguments, processes=2, nodes=("--standalone",)):
    """启动 torchrun；输出（stdout 和 stderr 在一起）在 .stdout。nodes 是多机时的参数。"""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        *nodes,
        ROOT / "a100_train.py",
        *arguments,
    ]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )


def finish(process, timeout=200):
    """等它结束，返回输出；超时就把它的进程都结束掉。"""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def one(work_dir, tmp_path_factory):
    """一个进程一口气跑完。"""
    work = tmp_path_factory.mktemp("one") / "work"
    shutil.copytree(work_dir, work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a100_train, "__file__", "/nowhere/a100_train.py")
        call(a100_train, *ARGUMENTS, "--work_dir", work)
    return work


def check_same(work, expected):
    """权重、每一步的损失、验证值都（几乎）一样；每步恰一行。"""
    ours, theirs = (load_file(folder / "final_model/model.safetensors") for folder in (work, expected))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        a = ours[name]
        b = theirs[name]
        # k 的偏置加在每个位置上，softmax 里抵消：梯度只有舍入误差，Adam 又把它放大
        if name.endswith("c_attn.bias"):
            a, b = (torch.cat([q, v]) for q, _, v in (a.chunk(3), b.chunk(3)))
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=name)
    rows, expected_rows = (read_jsonl(folder / "train_log.jsonl") for folder in (work, expected))
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_char"):
        values = [(row["step"], row[key]) for row in rows if key in row]
        expected_values = [(row["step"], row[key]) for row in expected_rows if key in row]
        assert [step for step, _ in values] == [step for step, _ in expected_values]
        torch.testing.assert_close(
            [value for _, value in values],
            [value for _, value in expected_values],
            atol=2e-4,
            rtol=1e-3 if key == "grad_norm" else 1e-4,
            msg=key,
        )
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))


def test_two_processes_equal_one(one, work_dir, tmp_path):
    """没有打包过的语料、没有分词器的工作目录：0 号进程准备一次，两个进程训练出一个进程的模型。"""
    work = tmp_path / "work"
    for name in ("corpus", "tokenizer"):
        shutil.copytree(work_dir / name, work / name)
    shutil.copytree(work / "tokenizer", tmp_path / "kept")
    shutil.rmtree(work / "tokenizer")
    process = torchrun([*ARGUMENTS, "--vocab_size", 1500, "--work_dir", work])
    output = finish(process)
    assert process.returncode == 0 and "Traceback" not in output, output
    for line in ("第 2 步，共 4 步", "步 6/6 ", "第 4 步的验证", "完成。模型"):
        assert output.count(line) == 1, line
    assert len(list((work / "checkpoints/checkpoint-6").glob("rng_state_*.pth"))) == 2
    assert (work / "packed/train.bin").read_bytes() == (one / "packed/train.bin").read_bytes()
    check_same(work, one)
    untrained = load_file(one / "checkpoints/checkpoint-4/model.safetensors")["transformer.wte.weight"]
    trained = load_file(one / "final_model/model.safetensors")["transformer.wte.weight"]
    assert (trained - untrained).abs().max() > 1e-3, "没有学到东西，比较就没有意义"


def test_two_nodes_equal_one(one, work_dir, tmp_path):
    """两台“机器”：两个 torchrun，经 127.0.0.1 会合，同一个工作目录。"""
    shutil.copytree(work_dir, tmp_path / "work")
    for timeout in (90, 200):  # 找到的空闲端口可能恰好又被别人占去，两边就会合不上：换一个端口再来一次
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        nodes = [
            torchrun(
                [*ARGUMENTS, "--work_dir", tmp_path / "work"],
                1,
                ("--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"),
            )
            for rank in (0, 1)
        ]
        try:
            outputs = [finish(node, timeout) for node in nodes]
            break
        except subprocess.TimeoutExpired:
            for node in nodes:
                if node.poll() is None:
                    os.killpg(node.pid, signal.SIGKILL)
            assert timeout == 90 and not (tmp_path / "work/checkpoints").exists(), (
                "会合以后才卡住的，不是端口的事"
            )
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "步 6/6" in outputs[0] and "步 6/6" not in outputs[1]
    check_same(tmp_path / "work", one)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_each_step_sees_the_same_blocks(micro_batch):
    """Trainer 把一批批轮流分给各进程：不论微批量和进程数，第 k 步用的都是第 16k 到 16k+15 块。"""
    effective = 16
    length = 16 * 5
    for world in (1, 2):
        accumulation = effective // (micro_batch * world)
        batches = BatchSampler(SequentialSampler(range(length)), micro_batch, drop_last=False)
        shards = [list(BatchSamplerShard(batches, world, rank)) for rank in range(world)]
        for step in range(5):
            micro_steps = slice(step * accumulation, (step + 1) * accumulation)
            seen = sorted(i for shard in shards for batch in shard[micro_steps] for i in batch)
            assert seen == list(range(step * effective, (step + 1) * effective)), (world, step)


def test_sigterm_to_torchrun_then_one_process(copied, no_plot):
    """两个进程，SIGTERM 停在商量好的一步，检查点存好；换成一个进程从那里接着，每步恰一行。"""
    arguments = [
        *ARGUMENTS[: ARGUMENTS.index("--max_steps") + 1],
        200,
        *ARGUMENTS[ARGUMENTS.index("--max_steps") + 2 :],
        "--eval_steps",
        100,
        "--work_dir",
        copied,
    ]
    process = torchrun(arguments)
    log = copied / "train_log.jsonl"
    end = time.time() + 150
    while (
        time.time() < end
        and process.poll() is None
        and not (log.exists() and '"step": 5,' in log.read_text("utf-8"))
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    stopped = re.search(r"停在第 (\d+) 步，检查点已存好。接着训练：同一条命令", output)
    assert process.returncode != 0 and stopped and 5 <= int(stopped[1]) < 200, output
    assert output.count("停在第") == 1 and 'a100_train.py", line' not in output
    assert a100_train.newest_checkpoint(copied).name == f"checkpoint-{stopped[1]}"
    call(a100_train, *arguments)
    assert [row["step"] for row in read_jsonl(log) if "loss" in row] == list(range(1, 201))


def test_error_of_rank_zero_ends_the_job(one, tmp_path):
    """0 号进程发现设置变了：整个任务以非零退出，各进程一共只说一行；等着的进程随即退出，不用等它超时。"""
    shutil.copytree(one, tmp_path / "work")
    logs = ("--standalone", "--redirects", 3, "--log-dir", tmp_path / "logs")  # 各进程的输出各写各的文件
    arguments = [*ARGUMENTS, "--work_dir", tmp_path / "work", "--seed", 7]
    start = time.time()
    process = torchrun(arguments, nodes=logs)
    report = finish(process)
    assert process.returncode != 0 and time.time() - start < 150, report
    said = {path.parent.name: path.read_text("utf-8") for path in (tmp_path / "logs").rglob("stderr.log")}
    assert sorted(said) == ["0", "1"] and "Traceback" not in "".join(said.values()), said
    lines = [line for text in said.values() for line in text.splitlines() if "错误" in line]
    assert len(lines) == 1 and "错误" in said["0"], said
    assert "seed" in lines[0] and "--fresh" in lines[0]
    assert "错误" not in report, "torchrun 自己的报告里没有我们的话"


def test_bad_arguments_are_reported_once(monkeypatch, capsys):
    """参数的错每个进程都看得出来：只有 0 号打印那一行，别的只有退出码。"""
    monkeypatch.setattr(a100_train, "WORLD_SIZE", 2)
    for rank in (0, 1):
        monkeypatch.setattr(a100_train, "RANK", rank)
        with pytest.raises(SystemExit) as stop:
            call(a100_train, *ARGUMENTS, "--batch_size", 8)
        assert ("2 个进程" in str(stop.value.code)) if rank == 0 else stop.value.code == 1
