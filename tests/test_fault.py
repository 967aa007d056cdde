"""中断、时限、半成品、密钥：无论怎样被打断，同一条命令再跑，得到同一个模型。

长版本：python tests/fault_injection.py --kills 30，结果在 results/fault_injection.md。
"""

import ast
import json
import math
import os
import re
import shutil
import signal
import time

import fault_injection
import pytest
from conftest import ROOT, call, error_of, read_jsonl

import a100_train

STEPS = 3
TINY = ["--device", "cpu", "--n_layer", 1, "--n_embd", 32, "--n_head", 2, "--block_size", 32,
        "--batch_size", 4, "--effective_batch_size", 8, "--max_steps", STEPS, "--eval_steps", 2,
        "--logging_steps", 1, "--learning_rate", 0.01]
SCRIPTS = sorted(ROOT.glob("*.py"))


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(a100_train, "plot_curve", lambda *_: None)


@pytest.fixture(scope="module")
def finished(work_dir, tmp_path_factory):
    """同样的设置，一口气跑完的工作目录。不要改它。"""
    folder = tmp_path_factory.mktemp("fault") / "work"
    shutil.copytree(work_dir, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a100_train, "plot_curve", lambda *_: None)
        assert call(a100_train, "--work_dir", folder, *TINY) == 0
    return folder


@pytest.fixture
def work(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def weights(folder):
    return (folder / "final_model/model.safetensors").read_bytes()


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.name.endswith(".lock")}


# ==== SIGKILL ====

def test_killed_five_times(tmp_path):
    """在随机的时刻杀五次，最后与没有打断的逐位相同。"""
    result = fault_injection.inject(tmp_path, 5, seed=1, starter=fault_injection.Forked, documents=800)
    assert len(result["kills"]) == 5
    assert result["rounds"] and not any(result["rounds"]), fault_injection.table(result)


def test_differences_are_noticed(work, finished):
    """上面的比较自己要靠得住：改一个字节、多一行日志、留一个半成品，都看得出来。"""
    path = work / "final_model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    log = work / "train_log.jsonl"
    lines = log.read_text("utf-8").splitlines(keepends=True)
    log.write_text("".join([*lines, lines[1]]), "utf-8")
    (work / ".corpus.tmp").mkdir()
    (work / ".corpus.lock").touch()
    (work / "packed/train-00000.tokens").touch()
    problems = " ".join(fault_injection.differences(finished, work))
    for word in ("final_model/model.safetensors 不一样", "步不全或重复", "train_log.jsonl 的数不一样", "留下了 .corpus.tmp",
                 "留下了 packed/train-00000.tokens", "多了 .corpus.tmp"):
        assert word in problems
    assert "lock" not in problems


def test_leftovers_of_a_kill_between_two_renames_are_removed(work, finished, no_plot):
    """最后一个检查点刚改完名就被杀：.staging、还没删和没删完的旧检查点留着。再跑同一条命令都收拾掉。"""
    shutil.rmtree(work / "final_model")
    (work / "checkpoints/.staging/checkpoint-3").mkdir(parents=True)
    (work / "checkpoints/.checkpoint-0.old").mkdir()
    (work / "checkpoints/.checkpoint-0.old/model.safetensors").touch()
    shutil.copytree(work / "checkpoints/checkpoint-2", work / "checkpoints/checkpoint-1")
    assert call(a100_train, "--work_dir", work, *TINY) == 0
    assert fault_injection.differences(finished, work) == []


def start(tmp_path, steps, log):
    """一条从头开始的命令：语料、分词器、打包、训练。"""
    corpus = ["--corpus", *fault_injection.build_corpus(tmp_path, 600)]
    training = list(map(str, TINY))
    training[training.index("--max_steps") + 1] = str(steps)
    arguments = [*corpus, "--vocab_size", "1000", *training, "--work_dir", str(tmp_path / "work")]
    return fault_injection.Forked(arguments, log)


def wait_until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "等得太久"
        time.sleep(0.005)


def test_orphaned_child_is_waited_for(tmp_path):
    """只杀了父进程，训练分词器的子进程还在写：同一条命令等它写完再接着做，不报错。"""
    began = time.time()
    with open(tmp_path / "first.log", "a") as log:
        first = start(tmp_path, STEPS, log)
    wait_until(lambda: fault_injection.phase(tmp_path / "work", began) == "分词器")
    os.kill(first.pid, signal.SIGKILL)
    os.killpg(first.pid, signal.SIGSTOP)                   # 让孤儿停住，第二条命令一定碰得到它
    first.wait()
    try:
        with open(tmp_path / "second.log", "a") as log:
            second = start(tmp_path, STEPS, log)
        wait_until(lambda: "等它结束" in (tmp_path / "second.log").read_text("utf-8"))
        assert second.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    assert second.wait() == 0, (tmp_path / "second.log").read_text("utf-8")
    assert "语料和设置没有变，沿用" in (tmp_path / "second.log").read_text("utf-8")
    assert not fault_injection.temporary_files(tmp_path / "work")
    assert (tmp_path / "work/final_model/model.safetensors").exists()


# ==== 信号和时限 ====

def test_sigterm_saves_and_exits_143(tmp_path):
    """SIGTERM（AutoDL 关机、torchrun 收场）：做完这一步，存检查点，说怎么接着来。SIGINT 见 test_training.py。"""
    log = tmp_path / "work/train_log.jsonl"
    with open(tmp_path / "run.log", "a") as output:
        run = start(tmp_path, 5000, output)
    wait_until(lambda: log.exists() and '"step": 3' in log.read_text("utf-8"))
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 143
    printed = (tmp_path / "run.log").read_text("utf-8")
    stopped = int(re.search(r"停在第 (\d+) 步，检查点已存好。接着训练：python .*--max_steps 5000", printed)[1])
    assert 3 <= stopped < 5000 and "Traceback" not in printed
    assert a100_train.checkpoint_problem(tmp_path / f"work/checkpoints/checkpoint-{stopped}") is None
    assert max(row["step"] for row in read_jsonl(log)) == stopped


def test_three_sessions_equal_one(work_dir, finished, tmp_path, no_plot, capsys):
    """--max_hours 每次只够一步：退出码 0，打印接着来的命令；三次合起来与一次逐位相同，学习率曲线属于整个训练。"""
    folder = tmp_path / "work"
    shutil.copytree(work_dir, folder)
    for session in range(1, STEPS + 1):
        assert not (folder / "final_model").exists()
        assert call(a100_train, "--work_dir", folder, *TINY, "--max_hours", 1e-6) == 0
        printed = capsys.readouterr().out
        assert (f"停在第 {session} 步" in printed and "接着训练：python" in printed) == (session < STEPS)
    assert weights(folder) == weights(finished)
    assert fault_injection.log_rows(folder) == fault_injection.log_rows(finished)
    assert (folder / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()


def test_command_to_continue_drops_fresh(work, no_plot, capsys):
    """第一次带着 --fresh：照印出来的命令再跑，不能又从头开始。"""
    assert call(a100_train, "--work_dir", work, *TINY, "--fresh", "--max_hours", 1e-6) == 0
    command = capsys.readouterr().out.split("接着训练：")[1]
    assert "--fresh" not in command and "--max_hours" in command


def test_deadline_leaves_time_to_save():
    """离时限还剩 60 秒：收尾要 50 秒就再做一步，要 70 秒就停。"""
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = a100_train.StopRequest(1)
        stop.deadline = time.time() + 60
        assert stop.agree(50, None) == 0
        assert stop.agree(70, None) == a100_train.DEADLINE
        assert a100_train.StopRequest(None).deadline == math.inf
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)


# ==== 跑完关机 ====

@pytest.fixture
def shutdown_log(work, tmp_path, monkeypatch):
    """PATH 最前面放一个假的 shutdown：每次调用记一行，最终模型在不在也记下。"""
    log, command = tmp_path / "shutdown.log", tmp_path / "bin/shutdown"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\ntest -f '{work}/final_model/model.safetensors' && echo saved >> '{log}' "
                       f"|| echo missing >> '{log}'\n", "utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    shutil.rmtree(work / "final_model")
    return log


def test_shutdown_after_the_final_model(work, no_plot, shutdown_log):
    assert call(a100_train, "--work_dir", work, *TINY, "--shutdown_when_done") == 0
    assert shutdown_log.read_text("utf-8") == "saved\n"


def test_no_shutdown_unless_asked(work, no_plot, shutdown_log):
    assert call(a100_train, "--work_dir", work, *TINY) == 0
    assert not shutdown_log.exists()


def test_no_shutdown_when_stopped_early(work, no_plot, shutdown_log):
    """到了 --max_hours 就停：没有训练完，机器要留着（或由使用者自己决定）。"""
    shutil.rmtree(work / "checkpoints/checkpoint-3")
    shutil.rmtree(work / "checkpoints/checkpoint-2")
    assert call(a100_train, "--work_dir", work, *TINY, "--max_hours", 1e-6, "--shutdown_when_done") == 0
    assert not shutdown_log.exists() and not (work / "final_model").exists()


@pytest.mark.parametrize("problem", ["different", "unreadable"])
def test_no_shutdown_when_the_final_model_is_bad(work, no_plot, shutdown_log, monkeypatch, problem):
    """写好的模型读回来不一样，或读不回来：报错，不关机，检查点还在。"""
    original = a100_train.transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder):
        if problem == "unreadable":
            raise OSError("坏块")
        model = original(folder)
        model.transformer.wpe.weight.data[0, 0] += 1
        return model

    monkeypatch.setattr(a100_train.transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises((RuntimeError, OSError)):
        call(a100_train, "--work_dir", work, *TINY, "--shutdown_when_done")
    assert not shutdown_log.exists() and not (work / "final_model").exists()
    assert a100_train.checkpoint_problem(work / "checkpoints/checkpoint-3") is None


# ==== 半成品、别的版本 ====

@pytest.mark.parametrize("name", ["train.bin", "eval.bin", "meta.json"])
def test_truncated_packed_file_is_rebuilt(work, finished, no_plot, capsys, name):
    path = work / "packed" / name
    path.write_bytes(path.read_bytes()[:-7])
    shutil.rmtree(work / "final_model")
    assert call(a100_train, "--work_dir", work, *TINY) == 0
    assert "重新打包" in capsys.readouterr().out
    for packed in (finished / "packed").iterdir():
        assert (work / "packed" / packed.name).read_bytes() == packed.read_bytes()
    assert weights(work) == weights(finished)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_is_refused(work, version):
    """工作目录是别的版本写的：一行说清，什么也不动。"""
    config = json.loads((work / "config.json").read_text("utf-8"))
    (work / "config.json").write_text(json.dumps(config | {"format": version}), "utf-8")
    before = content(work)
    message = error_of(a100_train, "--work_dir", work, *TINY)
    assert "format" in message and str(version) in message and "--work_dir" in message and "\n" not in message
    assert content(work) == before


# ==== 密钥，和文件里的代码 ====

def test_token_is_written_nowhere(work_dir, tmp_path, monkeypatch, capfd):
    """HF_TOKEN 在环境里：不出现在任何文件（包括 training_args.bin）和任何一行输出里。"""
    secret = "hf_secret123"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.setenv(name, secret)
    shutil.copytree(work_dir, tmp_path / "work")
    shutil.rmtree(tmp_path / "work/tokenizer")             # 子脚本也要看
    assert call(a100_train, "--work_dir", tmp_path / "work", "--vocab_size", 800, *TINY) == 0
    files = content(tmp_path / "work")
    assert any(path.name == "training_args.bin" for path in files) and len(files) > 25
    assert [path for path, data in files.items() if secret.encode() in data] == []
    printed = capfd.readouterr()
    assert "运行 train_tokenizer.py" in printed.out and secret not in printed.out + printed.err


def calls(path):
    """(函数的写法, 关键字参数 {名字: 写法}, 行号)。"""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), keywords, node.lineno


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_code_is_loaded_from_files(path):
    """不信任别人的代码：没有 trust_remote_code，不 unpickle，torch.load 只读权重。"""
    text = path.read_text("utf-8")
    assert "trust_remote_code" not in text and "allow_pickle" not in text
    for function, keywords, line in calls(path):
        where = f"{path.name} 第 {line} 行"
        assert not re.search(r"(^|\.)(pickle|dill|cloudpickle|joblib)\.", function), where
        assert function not in ("eval", "exec", "Unpickler", "loads", "os.system"), where
        assert keywords.get("shell", "False") == "False", where
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", where
