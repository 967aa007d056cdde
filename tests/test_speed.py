"""加速与配方：Muon 叠在一起算、参考曲线、基准程序；提交的表与提交的数据一致。"""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, read_jsonl

import a100_train

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation
import common
import cpu_step
import patched_train
import recipe
import reference_curves

RESULTS = ROOT / "results"
TINY = dict(vocab_size=300, n_layer=2, n_embd=32, n_head=2, block_size=16)


def batch(rows=4, length=16, seed=0):
    tokens = torch.randint(4, 300, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}


# ==== 优化器与每一步 ====

@torch.no_grad()
def one_by_one(p, momentum, group):
    """Muon 对一个矩阵的更新，照定义写。"""
    momentum.lerp_(p.grad, 1 - group["momentum"])
    update = p.grad.lerp(momentum, group["momentum"])
    parts = [a100_train.orthogonalize(part) for part in update.chunk(group["split"], dim=1)]
    scale = max(1, parts[0].size(1) / parts[0].size(0)) ** 0.5
    return p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * scale * torch.cat(parts, dim=1)


def test_stacked_muon_equals_one_matrix_at_a_time():
    """形状相同的矩阵叠在一起正交化，与一个一个来相同；走两步，动量也对。"""
    model = a100_train.build_model(**TINY, attention="sdpa", liger=False, seed=0)
    optimizer = a100_train.Muon(a100_train.muon_groups(model, 1e-2, 2e-2, 0.1), 1e-2, (0.9, 0.95))
    momenta = {}
    for seed in range(2):
        model(**batch(seed=seed))["loss"].backward()
        expected = {p: one_by_one(p, momenta.setdefault(p, torch.zeros_like(p)), group)
                    for group in optimizer.param_groups if group["muon"] for p in group["params"]}
        optimizer.step()
        optimizer.zero_grad()
        for p, value in expected.items():
            assert torch.allclose(p, value, atol=1e-6)


@pytest.mark.parametrize("ignored", [[], [0, 5], range(7)])
def test_in_place_cross_entropy(ignored):
    """就地反向的交叉熵与 F.cross_entropy 的损失、梯度相同，-100 不计；再乘一个系数（梯度累积）也一样。"""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 50, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (8,), generator=generator)
    labels[list(ignored)] = -100
    other = logits.detach().clone().requires_grad_()
    loss = a100_train.cross_entropy(logits, labels)
    expected = torch.nn.functional.cross_entropy(other, labels)
    (loss / 3).backward()
    (expected / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(logits.grad, other.grad, atol=1e-7)


def test_keep_freed_memory_is_harmless():
    """在没有 glibc 的系统上什么也不做；有的话，之后照常分配。"""
    a100_train.keep_freed_memory()
    assert torch.ones(12_000_000).sum() == 12_000_000


def test_full_preset_learning_rates(monkeypatch):
    """默认用 Muon 的学习率；明说了 AdamW 就换成 AdamW 的；明说了学习率就听明说的。"""
    def learning_rate(*argv, optimizer="muon"):
        monkeypatch.setattr(sys, "argv", ["a100_train.py", *argv])
        args, explicit = a100_train.parse_arguments()
        a100_train.choose_learning_rate(args, explicit, {"optimizer": optimizer})
        return args.learning_rate
    full = a100_train.PRESETS["full"]
    assert learning_rate() == full["learning_rate"]
    assert learning_rate(optimizer="adamw_torch_fused") == full["adamw_learning_rate"] == 3e-4   # FSDP 自动选的也是
    assert learning_rate("--learning_rate", "1e-3", optimizer="adamw_bnb_8bit") == 1e-3


# ==== 参考曲线 ====

@pytest.fixture
def reference(tmp_path, monkeypatch):
    """一份只有一条曲线的 results/reference_curves.json，放在假装的脚本旁边。"""
    curve = {"settings": {"n_layer": 2, "logging_steps": 10}, "corpus": {"n_blocks": 1000},
             "tokens": [100, 200], "loss": [8.0, 6.0], "spread": [0.1, 0.3],
             "tokens_per_second": {"A100": 225_000.0}}
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "reference_curves.json"
    path.write_text(json.dumps([curve]), "utf-8")
    monkeypatch.setattr(a100_train, "__file__", str(tmp_path / "a100_train.py"))
    return path


def test_reference_only_for_the_same_settings(reference):
    same = {"n_layer": 2, "n_blocks": 1004}
    assert a100_train.read_reference(same, 10)["loss"] == [8.0, 6.0]
    assert a100_train.read_reference(same | {"n_layer": 4}, 10) is None        # 别的模型
    assert a100_train.read_reference(same | {"n_blocks": 1100}, 10) is None    # 别的语料
    assert a100_train.read_reference(same, 50) is None                         # 平均的步数不同
    for text in ("", "{", "[1]", '[{"settings": 3}]', "null"):
        reference.write_text(text, "utf-8")
        assert a100_train.read_reference(same, 10) is None
    reference.unlink()
    assert a100_train.read_reference(same, 10) is None                         # 脚本单独拷走了


def test_reference_in_the_log_line(reference):
    curve = a100_train.read_reference({"n_layer": 2, "n_blocks": 1000}, 10)
    row = {"step": 15, "loss": 7.1, "learning_rate": 1e-3, "tokens_per_second": 118_000, "mfu": 0.4}
    line = a100_train.progress_line(row, 20, 10, None, a100_train.reference_notes(curve, 150, "A100"))
    assert "loss 7.10（参考 7.00±0.20） | lr" in line and "118k tok/s（同型号 225.0k） | MFU" in line
    line = a100_train.progress_line(row, 20, 10, None, a100_train.reference_notes(curve, 150, "T4"))
    assert "参考" in line and "同型号" not in line                               # 没有这种设备的速度
    line = a100_train.progress_line(row, 20, 10, None, a100_train.reference_notes(None, 150, "A100"))
    assert "参考" not in line and "同型号" not in line


def test_committed_reference_is_the_demo_preset():
    """提交的曲线就是现在的演示设置；几个种子的日志都在它的 ± 之内（九成以上）。"""
    curve, = json.loads((RESULTS / "reference_curves.json").read_text("utf-8"))
    preset = a100_train.PRESETS["demo"]
    for key in set(preset) & set(curve["settings"]):
        assert curve["settings"][key] == preset[key], key
    assert len(curve["seeds"]) == 3 and len(curve["tokens"]) == len(curve["loss"]) == len(curve["spread"])
    for seed in curve["seeds"]:
        rows = [row for row in read_jsonl(RESULTS / f"reference/demo-s{seed}.jsonl") if "loss" in row]
        near = [abs(row["loss"] - loss) <= spread for row, loss, spread in
                zip(rows, curve["loss"], curve["spread"], strict=True)]
        assert np.mean(near) > 0.9


def test_reference_curve_refuses_different_settings(tmp_path):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        config = dict.fromkeys(reference_curves.SETTINGS, 1) | {"learning_rate": rate}
        (tmp_path / name / "config.json").write_text(json.dumps(config), "utf-8")
        (tmp_path / name / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n', "utf-8")
    with pytest.raises(SystemExit, match="设置与"):
        reference_curves.build_curve([tmp_path / "a", tmp_path / "b"], "")


# ==== 基准程序 ====

def test_plain_gpt2_is_the_same_model():
    """cpu_step 里的普通 GPT-2 与 transformers 的同样权重时，损失和梯度相同：比的是同一件事。"""
    model = a100_train.build_model(**TINY, attention="sdpa", liger=False, seed=0)
    plain = cpu_step.PlainGPT2(**TINY)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if "lm_head" not in name})
    loss, plain_loss = model(**batch())["loss"], plain(**batch())
    loss.backward()
    plain_loss.backward()
    assert loss.item() == pytest.approx(plain_loss.item(), abs=1e-6)
    for name, p in plain.named_parameters():
        assert torch.allclose(p.grad, model.get_parameter(name).grad, atol=1e-6), name


@pytest.fixture
def unpatched(monkeypatch):
    """补丁会改 a100_train 的几个名字，测完还原。"""
    for name in ("TrainingArguments", "GPT2Config", "build_model", "muon_groups", "generate_samples",
                 "plot_curve"):
        monkeypatch.setattr(a100_train, name, getattr(a100_train, name))
    monkeypatch.setattr(a100_train.GPT2LMHeadModel, "forward", a100_train.GPT2LMHeadModel.forward)
    monkeypatch.setattr(patched_train, "FORWARD", dict(patched_train.FORWARD))


def loss_of(model):
    return float(model.eval()(**batch())["loss"].detach())


def tiny_model():
    return a100_train.build_model(*TINY.values(), "sdpa", False, 0)


def test_document_positions():
    ids = torch.tensor([[5, 3, 6, 7, 3, 8], [3, 3, 9, 9, 9, 9]])
    assert patched_train.document_positions(ids).tolist() == [[0, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4]]


def test_documents_apart_do_not_see_each_other(unpatched):
    patched_train.apply_patches(["attention=documents"])
    model = tiny_model().eval()
    first = batch(rows=1)
    first["input_ids"][0, 7] = 3
    second = {key: value.clone() for key, value in first.items()}
    second["input_ids"][0, :7] = 9                                   # 改前一篇
    for each in (first, second):
        each["labels"][0, :8] = -100                                 # 只看后一篇的损失
    assert model(**first)["loss"].item() == pytest.approx(model(**second)["loss"].item(), abs=1e-6)


@pytest.mark.parametrize("patch", ["forward=transformers", "attention=padding_mask", "z_loss=0.1"])
def test_patches_that_must_not_change_the_evaluated_loss(unpatched, patch):
    expected = loss_of(tiny_model())
    patched_train.apply_patches([patch])
    assert loss_of(tiny_model()) == pytest.approx(expected, abs=1e-5)


def test_config_and_vocabulary_patches(unpatched):
    patched_train.apply_patches(["config.activation_function=gelu_new", "vocab_extra=pad64",
                                 "config.initializer_range=0.01"])
    model = tiny_model()
    assert model.config.activation_function == "gelu_new" and model.config.vocab_size == 320
    assert float(model.transformer.wte.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_unknown_patch_is_one_line(unpatched):
    with pytest.raises(SystemExit, match="没有补丁"):
        patched_train.apply_patches(["nonsense=1"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="这里只走 CPU 的一路")
def test_ablation_measures_resumes_and_records_what_it_cannot(work_dir, tmp_path, monkeypatch, capsys):
    """真的量一行；没有显卡的一行记为未测；再跑一次什么也不重量；时间到了就停，下次接着来。"""
    argv = ["ablation.py", "--base", str(work_dir), "--results", str(tmp_path), "--steps", "8",
            "--window", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--only", "^default/(激活 gelu_new|注意力 flash)"])
    monkeypatch.setitem(ablation.SIZES["tiny"]["flags"], "--n_embd", "32")
    ablation.main()
    document = json.loads((tmp_path / "ablation-cpu.json").read_text("utf-8"))
    row = document["rows"]["default/（不改）"]
    assert row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1 and row["peak_memory_bytes"] > 1e8
    assert 4 < row["eval_loss"] < 8 and row["windows"] == 2 and len(row["repeats"]) == 1
    changed = document["rows"]["default/激活 gelu_new"]
    assert changed["unchanged"] == row["tokens_per_second"] and "gelu_new" in changed["patches"][0]
    assert changed["eval_loss"] == pytest.approx(row["eval_loss"], abs=1e-3)
    assert document["rows"]["default/注意力 flash_attention_2"]["error"] == "没有 CUDA 显卡"
    table = (tmp_path / "ablation-cpu.md").read_text("utf-8")
    assert "| 注意力 flash_attention_2 | 未测 |" in table and "1.00×" in table
    monkeypatch.setattr(ablation, "measure", lambda *_: pytest.fail("量过的不该再量"))
    ablation.main()
    monkeypatch.setattr(sys, "argv", [*argv, "--budget_minutes", "0"])
    ablation.main()
    assert "到时间了" in capsys.readouterr().out


def test_recipe_trial_log(work_dir, tmp_path, monkeypatch):
    """一个试验真的跑完，日志第一行是出处，其后每次验证一行。"""
    small = [*recipe.PROXY, "--n_layer", "1", "--n_embd", "32", "--n_head", "2", "--eval_steps", "2"]
    monkeypatch.setattr(recipe, "PROXY", small)
    lines = recipe.run_trial("try", 42, 4, recipe.REFERENCE, work_dir, tmp_path / "work")
    assert lines[0]["name"] == "try" and lines[0]["error"] is None and "machine" in lines[0]
    assert [line["step"] for line in lines[1:]] == [0, 2, 4]
    assert lines[-1]["tokens"] == 4 * 1024 and lines[-1]["bits_per_char"] < lines[1]["bits_per_char"]


def test_failed_trial_is_kept(work_dir, tmp_path, monkeypatch):
    lines = recipe.run_trial("try", 42, 4, "--optim adamw_torch --n_head 7", work_dir, tmp_path / "work")
    assert "整除" in lines[0]["error"] and len(lines) == 1
    common.write_atomic(tmp_path / "try-s42.jsonl", json.dumps(lines[0]) + "\n")
    (header, rows), = recipe.load(tmp_path)["try"]
    assert "失败" in recipe.summary_line("try", [(header, rows)], 1.0, 1)[1]


def test_tokens_to_reach():
    rows = [{"tokens": t, "bits_per_char": b} for t, b in ((0, 9.0), (100, 8.0), (200, 7.0))]
    assert recipe.tokens_to_reach(rows, 7.5) == 150 and recipe.tokens_to_reach(rows, 6.9) is None


# ==== 提交的表就是提交的数据 ====

def test_committed_recipe_table(tmp_path):
    committed = RESULTS / "recipe" / "small"
    for path in committed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    recipe.write_table(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (committed / "README.md").read_text("utf-8")
    names = {(name, seed) for name, seed, *_ in recipe.TRIALS}
    logs = {(header["name"], header["seed"]) for runs in recipe.load(tmp_path).values() for header, _ in runs}
    assert logs <= names


def test_adopted_recipe_beats_the_reference_in_half_its_tokens():
    trials = recipe.load(RESULTS / "recipe" / "small")
    reference = [rows[-1]["bits_per_char"] for _, rows in trials["reference"]]
    half = [rows[-1]["bits_per_char"] for _, rows in trials["muon-linear-half"]]
    assert len(reference) == len(half) == 3 and max(half) < min(reference)


@pytest.mark.skipif(torch.cuda.is_available(), reason="表里的说明随设备而变")
def test_committed_ablation_and_step_tables(tmp_path):
    def write_ablation(document):
        ablation.write_results(tmp_path / "ablation-cpu.json", document)

    def write_step(document):
        cpu_step.write_results(tmp_path, document)

    for name, write in (("ablation-cpu", write_ablation), ("cpu_step", write_step)):
        notes = RESULTS / f"{name}_notes.md"
        if notes.exists():
            (tmp_path / notes.name).write_bytes(notes.read_bytes())
        write(json.loads((RESULTS / f"{name}.json").read_text("utf-8")))
        assert (tmp_path / f"{name}.md").read_text("utf-8") == (RESULTS / f"{name}.md").read_text("utf-8")


def test_readme_figures_come_from_the_tables():
    """README“加速”一节里的数：配方、留住内存、gelu、Trainer 的开销。"""
    readme = (ROOT / "README.md").read_text("utf-8")
    trials = recipe.load(RESULTS / "recipe" / "small")
    for name in ("reference", "muon-linear-half", "muon-linear"):
        final = [rows[-1]["bits_per_char"] for _, rows in trials[name]]
        assert f"{np.mean(final):.2f}（" in readme and f"{min(final):.2f}–{max(final):.2f}" in readme, name
    groups = json.loads((RESULTS / "cpu_step.json").read_text("utf-8"))["groups"]
    on, off = (groups[group]["trainer"]["tokens_per_second"] for group in ("muon", "muon-malloc"))
    assert f"{off:,.0f} → {on:,.0f} token/s，{on / off:.2f} 倍" in readme
    rows = json.loads((RESULTS / "ablation-cpu.json").read_text("utf-8"))["rows"]
    for name, text in (("激活 gelu_new", "gelu_new"), ("注意力 eager", "eager"), ("微批量 4", "4 块")):
        row = rows[f"default/{name}"]
        assert f"{text} {row['tokens_per_second'] / row['unchanged']:.2f}×" in readme, name
    seconds = groups["muon"]
    for other, text in (("loop", "手写循环的"), ("plain", "普通 PyTorch GPT-2 加手写循环的")):
        pairs = zip(seconds[other]["seconds"], seconds["trainer"]["seconds"], strict=True)
        assert f"{text} {np.median([a / b for a, b in pairs]):.2f} 倍" in readme


def test_help(capsys):
    for module in (ablation, cpu_step, recipe, reference_curves):
        with pytest.raises(SystemExit) as stopped:
            call(module, "--help")
        assert stopped.value.code == 0 and "python benchmarks/" in capsys.readouterr().out
