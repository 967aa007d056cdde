"""模型、损失、优化器：参数个数、因果性、配置里的陷阱、梯度累积、Muon。全部是一两层的小模型。"""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import VOCAB_SIZE, call, read_jsonl
from safetensors.torch import load_file

import a100_train

TINY = dict(vocab_size=500, n_layer=2, n_embd=32, n_head=4, block_size=16)


def tiny_model(attention="sdpa", seed=0, **changes):
    return a100_train.build_model(**(TINY | changes), attention=attention, liger=False, seed=seed)


def speed_for(optimizer):
    return a100_train.choose_speed("cpu", "auto", "auto", optimizer, None, None, None)


def random_batch(rows=4, columns=16, seed=0):
    """一批 (ids, labels)：labels 是错开一位的下一个 token。"""
    tokens = torch.randint(
        4, TINY["vocab_size"], (rows, columns + 1), generator=torch.Generator().manual_seed(seed)
    )
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ==== 结构 ====

def test_parameter_count():
    """完整模型恰好 82,066,944 个参数。"""
    full = a100_train.PRESETS["full"]
    with torch.device("meta"):
        model = a100_train.build_model(full["vocab_size"], full["n_layer"], full["n_embd"], full["n_head"],
                                       full["block_size"], "sdpa", False, 0)
    assert sum(p.numel() for p in model.parameters()) == 82_066_944
    assert model.lm_head.weight is model.transformer.wte.weight, "输入输出嵌入共用"


def test_config_traps():
    config = tiny_model().config
    assert config.pad_token_id is None                       # 否则每次前向都查一遍 padding
    assert (config.bos_token_id, config.eos_token_id) == (2, 3)
    assert config.activation_function == "gelu_pytorch_tanh"
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0
    assert config.use_cache is False
    assert config.n_positions == TINY["block_size"]
    assert tiny_model().loss_type == "ForCausalLM"
    assert tiny_model().config._attn_implementation == "sdpa_causal"
    assert tiny_model("eager").config._attn_implementation == "eager"


def test_gelu_is_the_same_function():
    x = torch.linspace(-8, 8, 4001)
    functions = transformers.activations.ACT2FN
    difference = functions["gelu_pytorch_tanh"](x) - functions["gelu_new"](x)
    assert difference.abs().max() < 1e-6


def test_same_seed_same_weights():
    def flat(seed):
        return torch.cat([p.flatten() for p in tiny_model(seed=seed).parameters()])
    assert torch.equal(flat(1), flat(1)) and not torch.equal(flat(1), flat(2))


# ==== 因果性与注意力 ====

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causality(attention):
    """改动第 10 个 token：之前的 logits 不变，之后的要变。"""
    model = tiny_model(attention).eval()
    ids, _ = random_batch()
    changed = ids.clone()
    changed[:, 10] = (ids[:, 10] + 7) % TINY["vocab_size"]
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causality_of_the_training_loss(attention):
    """训练用的 forward 也一样：只让第 5 个位置计损失，改动后面的 token，损失不变。"""
    model = tiny_model(attention)
    ids, labels = random_batch()
    only = torch.full_like(labels, -100)
    only[:, 5] = labels[:, 5]
    changed = ids.clone()
    changed[:, 6:] = 9
    first, second = model(input_ids=ids, labels=only)["loss"], model(input_ids=changed, labels=only)["loss"]
    assert torch.allclose(first, second, atol=1e-6)
    earlier = ids.clone()
    earlier[:, :5] = 9
    assert (model(input_ids=earlier, labels=only)["loss"] - first).abs() > 1e-4


def test_eager_equals_sdpa():
    ids, labels = random_batch()
    sdpa, eager = tiny_model("sdpa"), tiny_model("eager")
    assert torch.allclose(sdpa(input_ids=ids).logits, eager(input_ids=ids).logits, atol=1e-5)
    gradients = []
    for model in (sdpa, eager):
        model(input_ids=ids, labels=labels)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_no_mask_is_created(monkeypatch, train):
    """传给 SDPA 的掩码是 None（只用 is_causal）：有掩码就用不上 FlashAttention 核。"""
    masks = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return original(module, query, key, value, attention_mask, **kwargs)

    original = a100_train.sdpa_attention_forward
    monkeypatch.setattr(a100_train, "sdpa_attention_forward", spy)
    try:
        model = tiny_model()
        ids, labels = random_batch()
        model(input_ids=ids, labels=labels if train else None)
        assert len(masks) == TINY["n_layer"] and all(mask is None for mask in masks)
    finally:
        transformers.AttentionInterface.register("sdpa_causal", original)


def test_generation_matches_step_by_step_argmax():
    """带缓存的续写等于每次重算整个前缀：sdpa_causal 在只有一个新 token 时也对。"""
    model = tiny_model(block_size=32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)                                        # 让分布不那么平，argmax 才稳
    ids = random_batch(1, 5)[0]
    config = transformers.GenerationConfig(max_new_tokens=15, do_sample=False, use_cache=True, pad_token_id=0)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    expected = ids
    with torch.no_grad():
        for _ in range(15):
            expected = torch.cat(
                [expected, model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1
            )
    assert output.shape == (1, 20) and torch.equal(output, expected)


# ==== 损失 ====

def test_initial_loss_is_near_uniform():
    """随机初始化的模型就是均匀瞎猜：ln 500 = 6.215。"""
    ids, labels = random_batch(32)
    assert tiny_model()(input_ids=ids, labels=labels)["loss"].item() == pytest.approx(math.log(500), abs=0.05)


def test_loss_equals_the_original_class():
    """与 transformers 原版的损失相同：原版在内部错位，我们传错好位的 labels。"""
    model = tiny_model()
    plain = transformers.GPT2LMHeadModel(model.config)
    plain.load_state_dict(model.state_dict())
    plain.loss_type = "ForCausalLM"
    ids, labels = random_batch()
    labels[:, -1] = -100                                     # 原版的最后一个位置没有标签
    ours, theirs = model(input_ids=ids, labels=labels)["loss"], plain(input_ids=ids, labels=ids).loss
    assert torch.allclose(ours, theirs, atol=1e-6)
    ours.backward()
    theirs.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_loss_is_the_cross_entropy_of_the_logits():
    """不借助任何库的 labels 参数，直接用 logits 算。"""
    model = tiny_model()
    ids, labels = random_batch()
    log_p = F.log_softmax(model(input_ids=ids).logits, dim=-1)
    direct = -log_p.gather(-1, labels[..., None]).mean()
    assert torch.allclose(model(input_ids=ids, labels=labels)["loss"], direct, atol=1e-6)
    assert set(model(input_ids=ids, labels=labels)) == {"loss"}, "训练时不返回 logits（显存）"


def test_overfits_one_batch():
    """同一批反复学，损失降到接近 0：梯度能到达每一层。"""
    model = tiny_model(n_layer=1)
    ids, labels = random_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels)["loss"]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    ids, labels = random_batch()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(input_ids=ids, labels=labels)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-7)


# ==== 梯度累积：从命令行到权重 ====

def train_tiny(folder, *extra):
    """在已准备好的文件夹里训练几步，返回 (最终权重, train_log 的训练行)。"""
    code = call(
        a100_train, "--work_dir", folder, "--device", "cpu", "--n_layer", 1, "--n_embd", 32, "--n_head", 2,
        "--block_size", 16, "--effective_batch_size", 4, "--max_steps", 4, "--eval_steps", 4,
        "--logging_steps", 1, "--learning_rate", 0.01, "--warmup_ratio", 0, *extra,
    )
    assert code == 0
    rows = [row for row in read_jsonl(folder / "train_log.jsonl") if "loss" in row]
    return load_file(folder / "final_model/model.safetensors"), rows


@pytest.fixture(scope="module")
def prepared(work_dir, tmp_path_factory):
    """打包好的文件夹；同一批测试里的几次训练各用一份拷贝。"""
    def copy(name):
        folder = tmp_path_factory.mktemp("accumulation") / name
        shutil.copytree(work_dir, folder)
        return folder
    return copy


@pytest.mark.parametrize("optimizer", ["adamw_torch", "muon"])
def test_accumulation_changes_nothing(prepared, monkeypatch, optimizer):
    """有效批量 4：一次放 4 块、两次各 2 块、四次各 1 块，损失、梯度范数和最终权重都一样。"""
    monkeypatch.setattr(a100_train, "plot_curve", lambda *_: None)
    results = [
        train_tiny(prepared(f"b{size}"), "--optim", optimizer, "--batch_size", size) for size in (4, 2, 1)
    ]
    weights, rows = results[0]
    for other_weights, other_rows in results[1:]:
        for name in weights:
            # Adam 第一步约等于 lr × sign(g)：接近 0 的梯度受舍入影响大，所以比较整体
            assert (weights[name] - other_weights[name]).abs().mean() < 2e-5, name
        for a, b in zip(rows, other_rows, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    vocab_size, name = len(weights["transformer.wte.weight"]), "transformer.h.0.mlp.c_fc.weight"
    start = a100_train.build_model(vocab_size, 1, 32, 2, 16, "sdpa", False, 42).state_dict()
    moved = (weights[name] - start[name]).abs().mean()
    assert moved > 2e-3, "权重没怎么动，上面的比较没有意义"


# ==== 优化器 ====

def trainer_for(model, optimizer, tmp_path, weight_decay=0.1):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True, learning_rate=0.1, weight_decay=weight_decay, optim="adamw_torch", report_to="none",
    )
    trainer = a100_train.GPT2Trainer(model, arguments)
    trainer.run_config = {"muon_learning_rate": 0.02, "optim": optimizer}
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw_torch", "muon"])
def test_weight_decay_only_on_matrices(tmp_path, optimizer):
    """衰减的恰好是矩阵；偏置和 LayerNorm 不衰减。每个参数恰好在一组里。"""
    model = tiny_model()
    groups = trainer_for(model, optimizer, tmp_path).create_optimizer().param_groups
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len({id(p) for p in members}) == len(list(model.parameters()))
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim == 2 else 0.0)


def test_training_arguments_defaults(tmp_path):
    """β 0.9/0.95、裁剪 1.0；微批量 × 累积 = 有效批量；不让每个微批量都等 GPU。"""
    import argparse
    args = argparse.Namespace(seed=1, **(a100_train.PRESETS["full"] | dict(
        work_dir=tmp_path, lr_schedule="cosine", num_workers=0, report_to="none")))
    speed = speed_for("adamw_torch")
    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    result = a100_train.training_arguments(args, speed, 48, 1000)
    assert before or os.environ.pop("TENSORBOARD_LOGGING_DIR")
    assert (result.adam_beta1, result.adam_beta2) == (0.9, 0.95)
    assert (result.max_grad_norm, result.weight_decay) == (1.0, 0.1)
    assert result.lr_scheduler_type == "cosine" and result.warmup_steps == 50 and result.max_steps == 1000
    assert result.per_device_train_batch_size * result.gradient_accumulation_steps == 96
    assert result.logging_nan_inf_filter is False and result.remove_unused_columns is False


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16), (3, 32, 32)])
def test_orthogonalize(shape):
    """奇异值都接近 1，左右奇异向量不变（与 U Vᵀ 方向一致）。"""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = a100_train.orthogonalize(matrix)
    assert result.shape == matrix.shape and result.dtype == matrix.dtype
    values = torch.linalg.svdvals(result)
    # 这组系数不收敛到 1，而是停在 0.7–1.2（Jordan 的原文）；很小的奇异值五步还到不了
    assert values.max() < 1.3 and values.median() > 0.65 and (values > 0.3).float().mean() > 0.9
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    exact = u @ vh
    assert F.cosine_similarity(result.flatten(), exact.flatten(), dim=0) > 0.95


def test_orthogonalize_ignores_scale():
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    small, large = a100_train.orthogonalize(matrix), a100_train.orthogonalize(matrix * 1000)
    assert torch.allclose(small, large, atol=1e-3)


def test_muon_groups_cover_every_parameter_once():
    model = tiny_model()
    groups = a100_train.muon_groups(model, 1e-3, 2e-2, 0.1)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for group in groups if group.get("muon") for p in group["params"]}
    assert muon == {f"transformer.h.{i}.{part}.weight" for i in range(2)
                    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    split = {names[id(p)] for group in groups if group.get("split") == 3 for p in group["params"]}
    assert split == {"transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"}


def test_muon_orthogonalises_q_k_v_apart():
    """把 v 的梯度放大一千倍：q、k 那两份的更新不变，每一份的更新都是近似正交的。"""
    def update(scale):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(16, 48))
        gradient = torch.randn(16, 48)
        gradient[:, 32:] *= scale
        weight.grad = gradient
        a100_train.Muon(
            [dict(params=[weight], lr=1.0, weight_decay=0.0, muon=True, split=3)], 1.0, (0.9, 0.95)
        ).step()
        return weight.detach().chunk(3, dim=1)
    small, large = update(1), update(1000)
    for part in range(3):
        assert torch.allclose(small[part], large[part], atol=1e-3)
        values = torch.linalg.svdvals(small[part])
        assert values.max() < 1.3 and values.median() > 0.65


def test_muon_adamw_part_equals_torch():
    """嵌入、偏置那几组就是 AdamW，与 torch 的逐步相同。"""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(6, 5, generator=generator), torch.randn(4, 6, 5, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    muon = a100_train.Muon([dict(params=[ours], lr=0.01, weight_decay=0.1)], 0.01, (0.9, 0.95))
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        adamw.step()
    assert torch.allclose(ours, theirs, atol=1e-6) and not torch.allclose(ours, start, atol=1e-2)


def test_muon_learns():
    model = tiny_model()
    ids, labels = random_batch()
    optimizer = a100_train.Muon(a100_train.muon_groups(model, 1e-2, 2e-2, 0.0), 1e-2, (0.9, 0.95))
    for _ in range(60):
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels)["loss"]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


# ==== 评估与估算 ====

def test_flops_per_token():
    """手算：N = 82,066,944，去掉位置向量 1,024 × 768 = 786,432；6 × 81,280,512 + 12 × 8 × 768 × 1,024。"""
    assert a100_train.flops_per_token(82_066_944, 8, 768, 1024) == 487_683_072 + 75_497_472
    # 100 个参数里 4 × 5 是位置向量：6 × 80 + 12 × 2 × 5 × 4 = 960
    assert a100_train.flops_per_token(100, 2, 5, 4) == 960


def test_evaluate_does_not_depend_on_batch_size(work_dir):
    """批量大小只影响速度；返回每个来源和合计，合计不是各来源的简单平均。"""
    model = tiny_model(vocab_size=VOCAB_SIZE)
    meta = json.loads((work_dir / "packed/meta.json").read_text("utf-8"))
    results = [a100_train.evaluate(model, work_dir / "packed/eval.bin", meta["eval_sources"], 16, size, "cpu")
               for size in (1, 7, 64)]
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, rel=1e-5) and results[2][key] == pytest.approx(
            value, rel=1e-5
        )
    tokens = {name: place["end"] - place["start"] for name, place in meta["eval_sources"].items()}
    total = sum(results[0][f"eval_{name}_loss"] * n for name, n in tokens.items())
    assert results[0]["eval_loss"] == pytest.approx(total / sum(tokens.values()), rel=1e-6)


def test_evaluate_predicts_every_token_once(work_dir, monkeypatch):
    """截下评估时的 labels：不计 -100，拼起来正好是 eval.bin，一个不多一个不少。"""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, input_ids, labels):
            seen.append(labels[labels != -100])
            assert input_ids.shape[1] == 16
            return {"loss": torch.tensor(1.0)}

    meta = json.loads((work_dir / "packed/meta.json").read_text("utf-8"))
    metrics = a100_train.evaluate(Spy(), work_dir / "packed/eval.bin", meta["eval_sources"], 16, 8, "cpu")
    tokens = np.fromfile(work_dir / "packed/eval.bin", dtype=np.uint16)
    assert np.array_equal(torch.cat(seen).numpy(), tokens)
    characters = sum(place["characters"] for place in meta["eval_sources"].values())
    assert metrics["eval_loss"] == pytest.approx(1.0)
    assert metrics["eval_bits_per_char"] == pytest.approx(len(tokens) / math.log(2) / characters)
