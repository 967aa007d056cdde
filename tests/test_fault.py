"""中断、时限、半成品、密钥：无论怎样被打断，同一条命令再跑，得到同一个模型。

长版本：python tests/fault_injection.py --kills 30，结果在 results/fault_injection.md。
"""

import argparse
import ast
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import fault_injection
import pytest
import transformers
from conftest import ROOT, STEPS, TINY, call, read_jsonl

import a100_train

SCRIPTS = [ROOT / f"{name}.py" for name in ("prepare_corpus", "train_tokenizer", "a100_train", "plot_loss")]


def weights(folder):
    return (folder / "final_model/model.safetensors").read_bytes()


def exit_code(*argv):
    """在本进程里运行，返回退出码；不留住异常对象：它的 traceback 会让文件锁一直占着。"""
    try:
        call(a100_train, *argv)
    except SystemExit as stop:
        return stop.code


# ==== SIGKILL ====


def test_killed_six_times(tmp_path):
    """在随机的时刻杀六次，最后与没有打断的逐位相同，日志每步恰一行。"""
    result = fault_injection.inject(tmp_path, 6, seed=1, starter=fault_injection.Forked, documents=500)
    assert len(result["kills"]) == 6 and "写检查点" in {kill["aimed"] for kill in result["kills"]}
    assert result["rounds"] and not any(result["rounds"]), fault_injection.table(result)


def test_differences_are_noticed(work, finished):
    """上面的比较自己要靠得住：改一个字节、多一行日志、留一个半成品，都看得出来。"""
    assert fault_injection.differences(finished, work) == []
    path = work / "final_model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    log = work / "train_log.jsonl"
    lines = log.read_text("utf-8").splitlines(keepends=True)
    log.write_text("".join([*lines, lines[1]]), "utf-8")
    (work / ".corpus.tmp").mkdir()
    (work / ".corpus.lock").touch()
    problems = " ".join(fault_injection.differences(finished, work))
    for word in (
        "final_model/model.safetensors 不一样",
        "步不全或重复",
        "train_log.jsonl 的数不一样",
        "留下了 .corpus.tmp",
    ):
        assert word in problems
    assert "lock" not in problems


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("written", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_killed_while_writing_a_checkpoint(work, finished, no_plot, step, written):
    """检查点一个文件一个文件地写；写到 written 时被杀（它只有一半），后面的还没有。再跑同一条命令，逐位相同。"""
    shutil.rmtree(work / "final_model")
    for other in range(step + 1, STEPS + 1):
        shutil.rmtree(work / f"checkpoints/checkpoint-{other}", ignore_errors=True)
    folder = work / f"checkpoints/checkpoint-{step}"
    past = False
    for name in (
        "config.json",
        "model.safetensors",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    ):
        if past:
            (folder / name).unlink(missing_ok=True)
        past |= name == written
    (folder / written).write_bytes((folder / written).read_bytes()[:1000])
    call(a100_train, "--work_dir", work, *TINY)
    assert fault_injection.differences(finished, work) == []


# ==== 信号和时限 ====


def start(work, steps, log, *extra):
    training = list(map(str, TINY))
    training[training.index("--max_steps") + 1] = str(steps)
    return fault_injection.Forked([*training, "--work_dir", str(work), *extra], log)


def wait_until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "等得太久"
        time.sleep(0.005)


def logged(work, step):
    log = work / "train_log.jsonl"
    return lambda: log.exists() and f'"step": {step},' in log.read_text("utf-8")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_says_how_to_continue(copied, tmp_path, no_plot, capsys, number, code):
    """Ctrl-C 和 SIGTERM：做完这一步，存检查点，打印接着来的命令；再跑同一条命令从那里接着。"""
    with open(tmp_path / "run.log", "a") as log:
        run = start(copied, 3000, log)
        wait_until(logged(copied, 3))
        os.kill(run.pid, number)
        assert run.wait() == code
        printed = (tmp_path / "run.log").read_text("utf-8")
        stopped = int(re.search(r"停在第 (\d+) 步，检查点已存好。接着训练：同一条命令", printed)[1])
        assert 3 <= stopped < 3000 and "Traceback" not in printed
        assert a100_train.newest_checkpoint(copied).name == f"checkpoint-{stopped}"
        assert max(row["step"] for row in read_jsonl(copied / "train_log.jsonl")) == stopped
        run = start(copied, 3000, log)
        wait_until(logged(copied, stopped + 2))
        os.kill(run.pid, number)
        assert run.wait() == code
    steps = [row["step"] for row in read_jsonl(copied / "train_log.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


def test_three_sessions_equal_one(work_dir, finished, tmp_path, no_plot, monkeypatch, capsys):
    """--max_hours 每次只够一步：打印接着来的命令；六次合起来与一次逐位相同，学习率曲线属于整个训练。"""
    folder = tmp_path / "work"
    shutil.copytree(work_dir, folder)
    for session in range(1, STEPS + 1):
        assert not (folder / "final_model").exists()
        if session < STEPS:
            argv = ["--work_dir", folder, *TINY, "--max_hours", 1e-6]
            if session == 1:
                argv.append("--fresh")
            assert exit_code(*argv) == 0
            assert f"停在第 {session} 步，检查点已存好。接着训练：同一条命令" in capsys.readouterr().out
        else:
            call(a100_train, "--work_dir", folder, *TINY, "--max_hours", 1e-6)
    assert weights(folder) == weights(finished)
    assert fault_injection.log_rows(folder) == fault_injection.log_rows(finished)
    assert (folder / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()


def test_deadline_leaves_time_to_save(monkeypatch):
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert a100_train.StopRequest(argparse.Namespace(max_hours=None)).deadline == math.inf
        for hours, reserve in ((0.5, 18), (11, 396)):
            late = a100_train.StopRequest(argparse.Namespace(max_hours=hours)).deadline - a100_train.START
            assert late == pytest.approx(hours * 3600 - reserve, abs=0.01)
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)


@pytest.fixture
def stop(tmp_path):
    """一个 StopRequest；它接管的信号，测完还回去。"""
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    yield a100_train.StopRequest(argparse.Namespace(max_hours=None, work_dir=tmp_path, parameters=1))
    for which, handler in handlers.items():
        signal.signal(which, handler)


def after_step(stop, step):
    """第 step 步做完以后，Trainer 得到的指示：(停不停, 存不存)。"""
    control = transformers.TrainerControl()
    stop.on_step_end(None, transformers.TrainerState(global_step=step), control)
    return control.should_training_stop, control.should_save


def test_several_processes_vote_at_every_step(stop, monkeypatch):
    """几个进程每一步都商量（torchrun 只等 30 秒）；一个要停，就都停在这一步。一个进程不必商量。"""
    votes = []
    others = [False]
    monkeypatch.setattr(
        a100_train.accelerate.utils, "gather_object", lambda mine: votes.append(mine) or mine + others
    )
    assert after_step(stop, 1) == (False, False) and votes == []
    monkeypatch.setattr(a100_train, "WORLD_SIZE", 2)
    for step in range(1, 8):
        assert after_step(stop, step) == (False, False)
    assert votes == [[False]] * 7
    others[:] = [True]
    assert after_step(stop, 8) == (True, True)
    assert stop.exit_code == 0, "信号是别的进程收到的"


def test_signal_during_the_vote_is_not_lost(stop, monkeypatch):
    """几个进程正在商量停不停（各自已交出“不停”）时来了信号：这一步照商量好的继续，下一步就停。"""
    monkeypatch.setattr(a100_train, "WORLD_SIZE", 2)

    def gather(votes):
        stop.request(signal.SIGTERM, None)
        return votes

    monkeypatch.setattr(a100_train.accelerate.utils, "gather_object", gather)
    assert after_step(stop, 3) == (False, False)
    assert after_step(stop, 4) == (True, True)
    assert stop.exit_code == 128 + signal.SIGTERM


# ==== 日志 ====


def test_killed_between_writing_aside_and_renaming(work, monkeypatch):
    """日志写在旁边，还没有改名就被杀：原来的 train_log.jsonl 一个字节也不少。"""
    names = ("train_log.jsonl", "samples.jsonl", "generation_samples.md", "config.json")
    before = {name: (work / name).read_bytes() for name in names}
    replace = Path.replace
    killed = []

    def kill(path, target):
        killed.append(target.name)
        assert path.read_text("utf-8") != "", "旁边的一份已经写完"
        raise KeyboardInterrupt

    rows = [{"step": 1, "loss": 9.0, "tokens_per_second": 1.0}]
    rows += [{"step": 1, "prompt": "甲", "text": "甲乙", "eval_loss": 9.0}]
    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        a100_train.write_history(work, rows)
    with pytest.raises(KeyboardInterrupt):
        a100_train.write_json(work / "config.json", {"n_layer": 99})
    assert killed == ["train_log.jsonl", "config.json"]
    assert {name: (work / name).read_bytes() for name in names} == before
    monkeypatch.setattr(Path, "replace", replace)
    a100_train.write_history(work, rows)
    assert read_jsonl(work / "train_log.jsonl") == rows[:1] and read_jsonl(work / "samples.jsonl") == rows[1:]
    a100_train.write_json(work / "config.json", {"n_layer": 99})
    assert fault_injection.temporary_files(work) == [], "旁边的一份没有留下"


# ==== 密钥，和文件里的代码 ====


def test_token_is_written_nowhere(work_dir, tmp_path, monkeypatch, capfd, no_plot):
    """HF_TOKEN 在环境里：不出现在任何文件（包括 training_args.bin）和任何一行输出里。"""
    secret = "hf_secret123"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.setenv(name, secret)
    shutil.copytree(work_dir, tmp_path / "work")
    call(a100_train, "--work_dir", tmp_path / "work", *TINY)
    files = {path: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert any(path.name == "training_args.bin" for path in files) and len(files) > 25
    assert [path for path, data in files.items() if secret.encode() in data] == []
    printed = capfd.readouterr()
    assert "完成" in printed.out and secret not in printed.out + printed.err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_code_is_loaded_from_files(path):
    """不信任别人的代码：没有 trust_remote_code，不 unpickle，torch.load 只读权重。"""
    text = path.read_text("utf-8")
    assert "trust_remote_code" not in text and "allow_pickle" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            where = f"{path.name} 第 {node.lineno} 行"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert not re.search(r"(^|\.)(pickle|dill|cloudpickle|joblib)\.", function), where
            assert function not in ("eval", "exec", "Unpickler", "loads", "os.system"), where
            assert keywords.get("shell", "False") == "False", where
            if function == "torch.load":
                assert keywords.get("weights_only") == "True", where


def test_config_is_json(finished):
    config = json.loads((finished / "config.json").read_text("utf-8"))
    assert {"parameters", "tokens_per_step", "total_steps", *a100_train.RECIPE} <= set(config)
