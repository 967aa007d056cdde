"""模型、损失、优化器、评估：参数个数、因果性、配置里的陷阱、Muon。全部是一两层的小模型，CPU。

显卡上才走的几条路（compile、bf16、fp16 的溢出）在 CPU 上照样能看出对错，也在这里。
"""

import argparse
import inspect
import json
import math
from copy import deepcopy as copy_of

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import VOCAB_SIZE, defaults

import a100_train

TINY = dict(vocab_size=500, n_layer=2, n_embd=32, n_head=4, block_size=16, attn="sdpa", seed=0)


def tiny_model(**changes):
    return a100_train.build_model(argparse.Namespace(**(TINY | changes)))


def random_batch(rows=4, columns=16, seed=0):
    """一批 {"input_ids", "labels"}：labels 是错开一位的下一个 token。"""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, TINY["vocab_size"], (rows, columns + 1), generator=generator)
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def loss_and_gradient(model, batch=None):
    loss = model(**(batch or random_batch()))["loss"]
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


# ==== 结构 ====


@pytest.mark.parametrize("size", [{}, dict(n_layer=2, n_embd=128, n_head=4, block_size=64, vocab_size=4500)])
def test_parameter_count(work_dir, tmp_path, monkeypatch, size):
    """完整模型恰好 82,066,944 个参数；derive 的公式等于真的数一遍。"""
    meta = json.loads((work_dir / "packed/meta.json").read_text("utf-8"))
    chosen = dict(device="cpu", device_name="cpu", precision="fp32", attn="sdpa", optim="muon", compile=False)
    s = argparse.Namespace(**(vars(defaults("full")) | size | chosen | dict(work_dir=tmp_path)))
    monkeypatch.setattr(
        a100_train, "read_report", lambda *_: meta | {"vocab_size": s.vocab_size, "train_tokens": 581_855_232}
    )
    a100_train.derive(s)
    with torch.device("meta"):
        model = a100_train.build_model(s)
    assert model.num_parameters() == s.parameters == (82_066_944 if not size else s.parameters)
    assert model.lm_head.weight is model.transformer.wte.weight, "输入输出嵌入共用"
    if not size:
        assert (s.tokens_per_step, s.n_blocks, s.total_steps) == (98_304, 568_218, 11_838)
        # N 去掉位置向量 1,024 × 768；6 × 81,280,512 + 12 × 8 × 768 × 1,024
        assert s.flops_per_token == 487_683_072 + 75_497_472


def test_config_traps():
    config = tiny_model().config
    assert config.pad_token_id is None  # 否则每次前向都查一遍 padding
    assert (config.bos_token_id, config.eos_token_id, config.n_positions) == (2, 3, 16)
    assert config.activation_function == "gelu_pytorch_tanh"
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0 and config.use_cache is False
    assert tiny_model(attn="eager").config._attn_implementation == "eager"
    x = torch.linspace(-8, 8, 4001)
    functions = transformers.activations.ACT2FN
    assert (functions["gelu_pytorch_tanh"](x) - functions["gelu_new"](x)).abs().max() < 1e-6


def test_same_seed_same_weights():
    def flat(seed):
        return torch.cat([p.flatten() for p in tiny_model(seed=seed).parameters()])

    assert torch.equal(flat(1), flat(1)) and not torch.equal(flat(1), flat(2))


# ==== 因果性与注意力 ====


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_causality(attn):
    """改动第 10 个 token：之前的 logits 不变，之后的要变；训练用的损失也一样。"""
    model = tiny_model(attn=attn).eval()
    batch = random_batch()
    ids = batch["input_ids"]
    labels = torch.full_like(batch["labels"], -100)
    changed = ids.clone()
    labels[:, 9] = batch["labels"][:, 9]
    changed[:, 10] = (ids[:, 10] + 7) % TINY["vocab_size"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = model(input_ids=changed).logits
        first = model(ids, labels)["loss"]
        second = model(changed, labels)["loss"]
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_eager_equals_sdpa():
    (loss_a, gradient_a), (loss_b, gradient_b) = (
        loss_and_gradient(tiny_model(attn=attn)) for attn in ("sdpa", "eager")
    )
    assert loss_a == pytest.approx(loss_b, abs=1e-5) and torch.allclose(gradient_a, gradient_b, atol=1e-6)


def spied_attention(monkeypatch):
    """记下每次 scaled_dot_product_attention 的 (attn_mask, is_causal)。"""
    seen = []
    original = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        seen.append((attn_mask, is_causal))
        return original(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("train", [True, False])
def test_attention_is_causal_without_a_mask(monkeypatch, train):
    """只传 is_causal=True，掩码是 None：有掩码就用不上 FlashAttention 核。"""
    seen = spied_attention(monkeypatch)
    batch = random_batch()
    tiny_model()(**(batch if train else {"input_ids": batch["input_ids"]}))
    assert seen == [(None, True)] * TINY["n_layer"]


def compiled_graphs(model, batch):
    """用一个只记图、不生成代码的后端编译；返回 (损失, 梯度, [每个图里每次注意力的 (掩码, is_causal)])。"""
    calls = []

    def backend(graph, _):
        for node in graph.graph.nodes:
            if node.op == "call_function" and "scaled_dot_product_attention" in str(node.target):
                named = dict(
                    zip(
                        ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"],
                        node.args,
                        strict=False,
                    )
                ) | dict(node.kwargs)
                calls.append((named.get("attn_mask"), named.get("is_causal", False)))
        return graph.forward

    torch._dynamo.reset()
    return *loss_and_gradient(torch.compile(model, fullgraph=True, backend=backend), batch), calls


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_attention_is_causal_without_a_mask(checkpointing):
    """fullgraph=True：整个前向是一张图，图里的注意力也只有 is_causal；损失、梯度与不编译的相同。"""
    model = tiny_model().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    loss, gradient, calls = compiled_graphs(model, random_batch())
    if not checkpointing:  # 重算的那一份在子图里，这里看不见
        assert calls == [(None, True)] * TINY["n_layer"]
    expected_loss, expected = loss_and_gradient(tiny_model().train())
    assert loss == pytest.approx(expected_loss, abs=1e-6) and torch.allclose(gradient, expected, atol=1e-6)


def test_compile_gives_the_same_loss_and_gradients():
    """前向、反向都由 torch.compile 做成图（aot_eager：与默认的 inductor 只差最后的代码生成，那要编译一分钟）。"""
    expected_loss, expected = loss_and_gradient(tiny_model())
    torch._dynamo.reset()
    loss, gradient = loss_and_gradient(torch.compile(tiny_model(), fullgraph=True, backend="aot_eager"))
    assert loss == pytest.approx(expected_loss, abs=1e-5) and torch.allclose(gradient, expected, atol=1e-5)


def test_bf16_autocast_is_within_one_percent():
    expected, gradient = loss_and_gradient(tiny_model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiny_model()(**random_batch())["loss"]
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(expected, rel=0.01)
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**random_batch())["loss"].backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert F.cosine_similarity(ours, gradient, dim=0) > 0.99


def test_generation_matches_step_by_step_argmax():
    """带缓存的续写等于每次重算整个前缀：sdpa_causal 在只有一个新 token 时也对。"""
    model = tiny_model(block_size=32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # 让分布不那么平，argmax 才稳
    ids = expected = random_batch(1, 5)["input_ids"]
    config = transformers.GenerationConfig(max_new_tokens=15, do_sample=False, use_cache=True, pad_token_id=0)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    with torch.no_grad():
        for _ in range(15):
            token = model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, token], dim=1)
    assert output.shape == (1, 20) and torch.equal(output, expected)


# ==== 损失 ====


def test_initial_loss_is_near_uniform():
    """随机初始化的模型就是均匀瞎猜：ln 500 = 6.215。"""
    assert loss_and_gradient(tiny_model(), random_batch(32))[0] == pytest.approx(math.log(500), abs=0.05)


def test_loss_equals_the_original_class():
    """与 transformers 原版的损失、梯度相同：原版在内部错位，我们传错好位的 labels。训练时不返回 logits（显存）。"""
    model = tiny_model()
    batch = random_batch()
    plain = transformers.GPT2LMHeadModel(model.config)
    plain.load_state_dict(model.state_dict())
    plain.loss_type = "ForCausalLM"
    batch["labels"][:, -1] = -100  # 原版的最后一个位置没有标签
    output = model(**batch)
    assert set(output) == {"loss"}
    theirs = plain(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    assert torch.allclose(output["loss"], theirs, atol=1e-6)
    output["loss"].backward()
    theirs.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model().train()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert torch.allclose(loss_and_gradient(model)[1], loss_and_gradient(tiny_model())[1], atol=1e-7)


# ==== 优化器 ====


def muon_for(model):
    return optimizer_for(model, optim="muon", precision="fp16")


def optimizer_for(model, **changes):
    s = dict(optim="muon", precision="fp32", learning_rate=1e-2, muon_learning_rate=2e-2) | changes
    return a100_train.build_optimizer(model, argparse.Namespace(**s))


def test_optimizers_and_their_kernels():
    """fp16 的 Muon 不用 fused（溢出时，它那一半会自己跳过），但也不写 False：那样连 foreach 也关掉，一个个张量地走。"""
    for precision, fused in (("fp32", True), ("bf16", True), ("fp16", None)):
        muon = optimizer_for(tiny_model(), precision=precision)
        assert type(muon) is a100_train.Muon and (muon.defaults["fused"], muon.defaults["foreach"]) == (
            fused,
            None,
        )
        assert muon.defaults["betas"] == a100_train.BETAS
    for name, fused in (("adamw_torch_fused", True), ("adamw_torch", None)):
        adamw = optimizer_for(tiny_model(), optim=name)
        assert type(adamw) is torch.optim.AdamW and adamw.defaults["fused"] == fused
        assert {(p.ndim, group["weight_decay"]) for group in adamw.param_groups for p in group["params"]} == {
            (2, 0.1),
            (1, 0.0),
        }
        assert {group["lr"] for group in adamw.param_groups} == {1e-2}


def test_parameter_groups():
    """每个参数恰好在一组里；衰减的恰好是矩阵；Muon 管的恰好是每层的四个矩阵，c_attn 分三份。"""
    model = tiny_model()
    groups = a100_train.parameter_groups(model, 1e-2, 2e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names)
    for name, group in found.items():
        matrix = name.endswith("weight") and any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        parts = 0  # 不是矩阵
        if matrix:
            parts = 3 if "c_attn" in name else 1
        assert group["split"] == parts, name
        assert group["lr"] == (2e-2 if matrix else 1e-2)
        assert group["weight_decay"] == (0.1 if matrix or "wte" in name or "wpe" in name else 0.0), name


@torch.no_grad()
def one_by_one(p, momentum, group):
    """Muon 对一个矩阵的更新，照定义写。"""
    momentum.mul_(0.95).add_(p.grad, alpha=0.05)
    update = 0.05 * p.grad + 0.95 * momentum
    parts = [a100_train.orthogonalize(part[None])[0] for part in update.chunk(group["split"], dim=1)]
    scale = max(1, parts[0].size(1) / parts[0].size(0)) ** 0.5
    return p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * scale * torch.cat(parts, dim=1)


def test_muon_equals_its_definition():
    """两步：矩阵照定义走（q、k、v 各自正交化），其余的与 torch 的 AdamW 逐步相同。"""
    model = tiny_model()
    copy = tiny_model()
    momenta = {}
    optimizer = muon_for(model)
    groups = [group for group in a100_train.parameter_groups(copy, 1e-2, 2e-2) if not group["split"]]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for seed in range(2):
        model(**random_batch(seed=seed))["loss"].backward()
        for p, q in zip(model.parameters(), copy.parameters(), strict=True):
            q.grad = p.grad.clone()
        expected = {
            p: one_by_one(p, momenta.setdefault(p, torch.zeros_like(p)), group)
            for group in optimizer.param_groups
            if group["split"]
            for p in group["params"]
        }
        optimizer.step()
        optimizer.zero_grad()
        adamw.step()
        for p, value in expected.items():
            assert torch.allclose(p, value, atol=1e-6)
    matrices = set(expected)
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        assert p in matrices or torch.equal(p, q)


def test_q_k_v_are_orthogonalised_apart():
    """把 v 的梯度放大一千倍：q、k 那两份的更新不变，每一份的更新都是近似正交的。"""

    def update(scale):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(16, 48))
        gradient = torch.randn(16, 48)
        gradient[:, 32:] *= scale
        weight.grad = gradient
        a100_train.Muon([dict(params=[weight], lr=1.0, weight_decay=0.0, split=3)]).step()
        return weight.detach().chunk(3, dim=1)

    for small, large in zip(update(1), update(1000), strict=True):
        assert torch.allclose(small, large, atol=1e-3)
        values = torch.linalg.svdvals(small)
        assert values.max() < 1.3 and values.median() > 0.65


@pytest.mark.parametrize("shape", [(1, 24, 24), (1, 16, 64), (1, 64, 16), (3, 32, 32)])
def test_orthogonalize(shape):
    """奇异值都接近 1，左右奇异向量不变（与 U Vᵀ 方向一致）；输入放大一千倍，结果不变。"""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = a100_train.orthogonalize(matrix)
    assert result.shape == matrix.shape and result.dtype == matrix.dtype
    assert torch.allclose(result, a100_train.orthogonalize(matrix * 1000), atol=1e-3)
    values = torch.linalg.svdvals(result)
    # 这组系数不收敛到 1，而是停在 0.7–1.2（Jordan 的原文）；很小的奇异值五步还到不了
    assert values.max() < 1.3 and values.median() > 0.65 and (values > 0.3).float().mean() > 0.9
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert F.cosine_similarity(result.flatten(), (u @ vh).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_two_byte_iteration_agrees_with_fp32(dtype, scale):
    """显卡上迭代用 2 字节的数：在 CPU 上照做一遍，方向与 fp32 一致，不溢出。"""
    source = inspect.getsource(a100_train.orthogonalize)
    on_gpu = "if x.is_cuda:\n        x = x.half()"
    assert source.count(on_gpu) == 1, "下面替换的就是显卡上用的那个类型"
    space = {"torch": torch}
    exec(source.replace(on_gpu, f"x = x.to(torch.{dtype})"), space)
    matrix = scale * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = space["orthogonalize"](matrix)
    expected = a100_train.orthogonalize(matrix)
    assert torch.isfinite(ours).all()
    assert F.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) > 0.99


def test_overflow_touches_nothing():
    """fp16 的一步溢出了：GradScaler 跳过它，权重和每一份 Muon、AdamW 的历史都逐位不变；下一步照常。"""
    model = tiny_model()
    optimizer = muon_for(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(bad):
        scaler.scale(model(**random_batch())["loss"]).backward()
        if bad:
            model.transformer.wpe.weight.grad[0, 0] = math.inf  # AdamW 管的一个数溢出，矩阵的那一半也不许动
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return (
            [p.detach().clone() for p in model.parameters()],
            [copy_of(optimizer.state[p]) for p in model.parameters()],
        )

    weights, states = step(False)
    after_weights, after_states = step(True)
    assert all(map(torch.equal, weights, after_weights))
    for before, after in zip(states, after_states, strict=True):
        assert before.keys() == after.keys() and len(before) >= 2
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert scaler.get_scale() == 512.0
    assert not all(map(torch.equal, weights, step(False)[0]))


def test_optimizer_state_can_be_loaded():
    """存了再读，接着走一步，与没有中断的逐位相同。"""
    model = tiny_model()
    copy = tiny_model()
    optimizer = muon_for(model)
    other = muon_for(copy)
    for seed in range(3):
        if seed == 2:
            copy.load_state_dict(model.state_dict())
            other.load_state_dict(copy_of(optimizer.state_dict()))
            copy(**random_batch(seed=seed))["loss"].backward()
            other.step()
        model(**random_batch(seed=seed))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, model.parameters(), copy.parameters()))


def test_muon_learns():
    """同一批反复学，损失降到接近 0：梯度能到达每一层。"""
    model = tiny_model()
    optimizer = muon_for(model)
    for _ in range(60):
        loss = model(**random_batch())["loss"]
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.1


def test_learning_rate_scale():
    """预热到 1，再线性降到 0；从不超过 1；第 1,000 步的数与注释里的一样。"""
    total = 11_838
    scales = [a100_train.learning_rate_scale(step, total) for step in range(total)]
    warmup = round(0.05 * total)
    assert warmup == 592 and scales[:2] == [1 / 592, 2 / 592] and scales[591] == 1 == max(scales)
    assert scales[1000] == pytest.approx((11_838 - 1000) / (11_838 - 592)) and round(scales[1000], 3) == 0.964
    assert all(0 < b < a for a, b in zip(scales[592:], scales[593:], strict=False))
    assert a100_train.learning_rate_scale(total, total) == 0
    for total in (1, 2, 3, 25):
        assert all(0 < a100_train.learning_rate_scale(step, total) <= 1 for step in range(total))


# ==== 评估 ====


def evaluation(work_dir, **changes):
    meta = json.loads((work_dir / "packed/meta.json").read_text("utf-8"))
    return argparse.Namespace(**(dict(work_dir=work_dir, block_size=16) | meta | changes))


class Spy:
    """冒充模型：记下评估时的输入；第 k 种 token 的损失总是 weights[k] 加一个常数，所以由损失看得出答案是谁。"""

    device = "cpu"

    def __init__(self):
        self.weights = torch.rand(VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 5
        self.rows = []

    def __call__(self, input_ids):
        assert input_ids.shape[1] == 16 and len(input_ids) <= 16
        self.rows += input_ids.tolist()
        return argparse.Namespace(logits=-self.weights.expand(*input_ids.shape, -1))

    def loss_of(self, tokens):
        """这些 token 的损失的平均。"""
        constant = (-self.weights.double()).logsumexp(0)
        return float(self.weights.double()[torch.from_numpy(tokens.astype(np.int64))].mean() + constant)


def test_evaluation_predicts_every_token_once(work_dir):
    """各来源首尾相接，每个 token（包括 </s>）恰好当一次答案；输入错开一位，最前面是 </s>，末尾补齐的不算。"""
    spy = Spy()
    s = evaluation(work_dir)
    metrics = a100_train.held_out_loss(spy, s)
    tokens = np.fromfile(work_dir / "packed/eval.bin", dtype=np.uint16)
    inputs = np.array(spy.rows).flatten()
    assert len(tokens) % 16, "末尾没有要补齐的，下面就什么也没有试"
    assert np.array_equal(inputs[: len(tokens)], np.concatenate([[3], tokens[:-1]]))
    assert len(inputs) - len(tokens) < 16 and set(inputs[len(tokens) :]) == {3}
    assert set(s.eval_sources) == {"news", "reviews"}
    for name, place in s.eval_sources.items():
        part = tokens[place["start"] : place["end"]]
        assert metrics[f"eval_{name}_loss"] == pytest.approx(spy.loss_of(part), rel=1e-6), name
    assert metrics["eval_loss"] == pytest.approx(spy.loss_of(tokens), rel=1e-6)
    characters = sum(place["characters"] for place in s.eval_sources.values())
    bits = spy.loss_of(tokens) * len(tokens) / math.log(2) / characters
    assert metrics["eval_bits_per_char"] == pytest.approx(bits, rel=1e-6)


def test_evaluation_is_shared_out(work_dir, monkeypatch):
    """两个进程各算一半的块，没有重的、没有漏的；加起来与一个进程的相同，每个进程得到的都是总数。"""
    model = tiny_model(vocab_size=VOCAB_SIZE).eval()
    s = evaluation(work_dir)
    alone = a100_train.held_out_loss(model, s)
    spy = Spy()
    a100_train.held_out_loss(spy, s)
    monkeypatch.setattr(a100_train, "WORLD_SIZE", 2)
    partial = []
    rows = []

    def sum_over_ranks(tensor, reduction="mean"):
        assert reduction == "sum", "默认的是平均"
        if len(partial) < 2:
            partial.append(tensor)
        return sum(partial)

    monkeypatch.setattr(a100_train.accelerate.utils, "reduce", sum_over_ranks)
    for rank in (0, 1, 0):
        monkeypatch.setattr(a100_train, "RANK", rank)
        together = a100_train.held_out_loss(model, s)
    assert together == pytest.approx(alone, rel=1e-6) and together.keys() == alone.keys()
    for rank in (0, 1):
        monkeypatch.setattr(a100_train, "RANK", rank)
        half = Spy()
        a100_train.held_out_loss(half, s)
        rows.append(half.rows)
    assert abs(len(rows[0]) - len(rows[1])) <= 16
    assert sorted(rows[0] + rows[1]) == sorted(spy.rows)
