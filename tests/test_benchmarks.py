"""基准程序不腐烂：每个都导入、给得出 --help，各走一小段；提交的参考曲线，plot_loss.py 认得。"""

import importlib
import json
import sys

import pytest
import torch
import transformers
from conftest import ROOT, call, defaults

import a100_train
import plot_loss

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation
import cpu_step
import patched_train
import processes
import reference_curves

SHAPE = dict(vocab_size=300, n_layer=2, n_embd=32, n_head=2, block_size=16)
CONSTANTS = (
    "WARMUP",
    "WEIGHT_DECAY",
    "BETAS",
    "learning_rate_scale",
    "build_model",
    "generate_samples",
    "save_final_model",
)


def settings(monkeypatch, *argv, **changes):
    """a100_train.py 的设置对象，有几项换成 changes。"""
    monkeypatch.setattr(sys, "argv", ["a100_train.py", "--device", "cpu", *argv])
    s = a100_train.read_settings()
    a100_train.choose_device(s)
    a100_train.choose_speed(s)
    a100_train.choose_packages(s)
    for name in changes:
        setattr(s, name, changes[name])
    return s


def batch(rows=4, length=16, seed=0):
    tokens = torch.randint(4, 300, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}


@pytest.fixture
def unpatched(monkeypatch):
    """补丁改的名字，测完还原。"""
    for name in CONSTANTS:
        monkeypatch.setattr(a100_train, name, getattr(a100_train, name))
    for name in ("TrainingArguments", "GPT2Config"):
        monkeypatch.setattr(a100_train.transformers, name, getattr(a100_train.transformers, name))
    for model in (a100_train.GPT2LMHeadModel, transformers.GPT2Model):
        monkeypatch.setattr(model, "forward", model.forward)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_imports_and_explains_itself(name, capsys):
    module = importlib.import_module(name)
    if hasattr(module, "main"):
        with pytest.raises(SystemExit) as stopped:
            call(module, "--help")
        assert stopped.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["default", "reference"])
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_every_row_of_the_ablation_is_accepted(monkeypatch, base, size):
    """每一行的参数都是今天的 a100_train.py 有的，补丁都认得；名字不重复。"""
    names = [change[0] for change in ablation.changes(base, size)]
    assert len(names) == len(set(names)) > 30
    for change in ablation.changes(base, size):
        arguments, patches = ablation.settings(base, size, change)
        monkeypatch.setattr(sys, "argv", ["a100_train.py", *arguments])
        a100_train.read_settings()
        for patch in patches:
            key = patch.partition("=")[0]
            assert (
                key.startswith(("args.", "config."))
                or key in patched_train.PATCHES
                or (patch in patched_train.PATCHES or hasattr(a100_train, key))
            ), patch


def test_options_of_the_process_comparison_exist(monkeypatch):
    assert settings(monkeypatch, *processes.TRAINING).effective_batch_size == 8


# ==== 补丁 ====


def test_unknown_patch_is_one_line():
    with pytest.raises(SystemExit, match="错误：没有补丁"):
        patched_train.apply_patches(["nonsense=1"])


def test_forward_and_mask_do_not_change_the_loss(unpatched, monkeypatch):
    s = settings(monkeypatch, "--preset", "demo", **SHAPE)
    expected = a100_train.build_model(s)(**batch())["loss"].item()
    patched_train.apply_patches(["attention=padding_mask", "forward=transformers"])
    model = a100_train.build_model(s)
    masks = []
    block = model.transformer.forward
    monkeypatch.setattr(model.transformer, "forward", lambda *a, **k: masks.append(k) or block(*a, **k))
    result = model(**batch())
    assert result["logits"].shape == (4, 16, 300) and masks
    assert result["loss"].item() == pytest.approx(expected, abs=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_schedule_constants_config_and_vocabulary(unpatched, monkeypatch):
    patched_train.apply_patches(
        [
            "schedule=cosine",
            "WARMUP=0.2",
            "config.activation_function=gelu_new",
            "config.initializer_range=0.01",
            "vocab_extra=20",
        ]
    )
    scales = [a100_train.learning_rate_scale(step, 100) for step in (0, 19, 60, 100)]
    assert scales == pytest.approx([0.05, 1, 0.5, 0])
    model = a100_train.build_model(settings(monkeypatch, "--preset", "demo", **SHAPE))
    assert model.config.activation_function == "gelu_new" and model.config.vocab_size == 320
    assert float(model.transformer.wte.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


# ==== 消融 ====


@pytest.mark.skipif(torch.cuda.is_available(), reason="这里只走 CPU 的一路")
def test_ablation_really_measures_a_row(work_dir):
    """公开参考的设置，在子进程里真的训练几步：一次走到 common.py、patched_train.py 和大半的补丁。"""
    change = next(ablation.changes("reference", "tiny"))
    arguments, patches = ablation.settings("reference", "tiny", change)
    small = ["--n_layer", "1", "--n_embd", "32", "--n_head", "2"]
    row = ablation.measure(work_dir, [*arguments, *small], patches, steps=8, window=2, peak=1e11)
    assert "error" not in row, row
    assert row["windows"] == 3 and row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 1e8
    assert 5 < row["eval_loss"] < 8 and row["chosen"]["optim"] == "adamw_torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="这里只走 CPU 的一路")
def test_ablation_resumes_and_records_what_it_cannot(work_dir, tmp_path, monkeypatch, capsys):
    """没有显卡的一行记为未测；量过的不再量；时间到了就停；训练脚本变了就从头量。"""
    argv = ["--base", work_dir, "--results", tmp_path, "--only", "^default/(激活 gelu_new|注意力 flash)"]
    measured = []
    row = {
        "tokens_per_second": 2.0,
        "slowest": 1.0,
        "fastest": 3.0,
        "mfu": 0.1,
        "peak_memory_bytes": 1e9,
        "first_window_extra_seconds": 0.0,
        "eval_loss": 5.0,
    }
    monkeypatch.setattr(ablation, "measured_peak", lambda: (1e11, "假装的"))
    monkeypatch.setattr(ablation, "measure", lambda *args: measured.append(args) or dict(row))
    for _ in range(2):
        call(ablation, *argv)
    path = tmp_path / "ablation-cpu.json"
    document = json.loads(path.read_text("utf-8"))
    assert len(measured) == 2 and document["rows"]["default/激活 gelu_new"]["unchanged"] == 2.0
    table = path.with_suffix(".md").read_text("utf-8")
    assert "| 注意力 flash_attention_2 | 未测 |" in table and "1.00×" in table
    path.write_text(json.dumps(document | {"script": "旧的"}), "utf-8")
    call(ablation, *argv, "--budget_minutes", 0)
    assert "到时间了" in capsys.readouterr().out
    call(ablation, *argv)
    assert len(measured) == 4


# ==== 每一步的比较 ====


def test_plain_gpt2_is_the_same_model(monkeypatch):
    """cpu_step 里的普通 GPT-2 与 transformers 的同样权重时，损失和梯度相同：比的是同一件事。"""
    model = a100_train.build_model(settings(monkeypatch, "--preset", "demo", **SHAPE))
    plain = cpu_step.PlainGPT2(**SHAPE)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if "lm_head" not in name})
    loss = model(**batch())["loss"]
    plain_loss = plain(**batch())
    loss.backward()
    plain_loss.backward()
    assert loss.item() == pytest.approx(plain_loss.item(), abs=1e-6)
    for name, p in plain.named_parameters():
        assert torch.allclose(p.grad, model.get_parameter(name).grad, atol=1e-6), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw_torch_fused"])
def test_three_contestants_do_the_same_steps(work_dir, monkeypatch, optimizer):
    """Trainer 和两个手写循环走到同样的损失；表写得出来。"""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(a100_train.signal, "signal", lambda *_: None)  # Ctrl-C 还是 pytest 的
    runs = cpu_step.compare(work_dir, optimizer, windows=1, window=2)
    losses = [run["loss"] for run in runs.values()]
    assert set(runs) == set(cpu_step.NAMES) and max(losses) - min(losses) < 0.002, losses
    assert len(cpu_step.comparison_lines({optimizer: runs})) == 5


# ==== 参考曲线 ====


def demo_config(**changes):
    return vars(defaults("demo")) | {"optim": "muon", "total_steps": 1350} | changes


def test_committed_reference_is_todays_demo():
    """演示的 config.json 里的键，和曲线的设置一字不差地对得上；换一个就对不上。"""
    (curve,) = json.loads((ROOT / "results/reference_curves.json").read_text("utf-8"))
    assert plot_loss.find_reference(demo_config(**curve["corpus"])) == curve
    assert plot_loss.find_reference(demo_config(**curve["corpus"]) | {"n_layer": 3}) is None
    assert set(reference_curves.SETTINGS) | {"logging_steps"} == set(curve["settings"])
    assert len(curve["tokens"]) == len(curve["loss"]) == len(curve["spread"]) == 135


def test_reference_curve_from_runs(tmp_path, monkeypatch):
    """两次训练合成一条，写出来的 plot_loss.py 找得到；设置不同的不能合。"""
    config = demo_config(n_blocks=100, unigram_entropy=7.0, device_name="cpu")
    for seed in (42, 43):
        (tmp_path / f"run{seed}").mkdir()
        text = json.dumps(config | {"seed": seed}, default=str)
        (tmp_path / f"run{seed}/config.json").write_text(text, "utf-8")
        rows = [
            json.dumps({"step": step, "loss": 8.0 - step / 100, "tokens_per_second": 5.0}) + "\n"
            for step in (1, 10, 20, 30, 40)
        ]
        (tmp_path / f"run{seed}/train_log.jsonl").write_text("".join(rows), "utf-8")
    folders = [tmp_path / "run42", tmp_path / "run43"]
    output = tmp_path / "curves.json"
    for _ in range(2):
        call(reference_curves, *folders, "--name", "x", "--output", output)
    (curve,) = json.loads(output.read_text("utf-8"))
    monkeypatch.setattr(plot_loss, "REFERENCE", output)
    assert plot_loss.find_reference(config) == curve
    assert curve["tokens"][0] == 10 * 2048 and curve["loss"][1] == 7.8 and curve["seeds"] == [42, 43]
    (tmp_path / "run43/config.json").write_text(json.dumps(config | {"n_layer": 9}, default=str), "utf-8")
    with pytest.raises(SystemExit, match="设置与"):
        reference_curves.build_curve(folders, "x")
