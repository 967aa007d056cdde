# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 一步训练，拆开来看
#
# `a100_train.py` 把训练交给 Trainer，模型交给 transformers 库。这里把**一步**训练拆开：文字怎样变成数字，一个注意力头怎样算，
# 损失、梯度、更新各是什么。每个手算的数都和库算的比过：`assert` 后面的话不成立，这一格就会停下报错。
#
# 每一节是一个问题、一小段代码、一张图、一句要带走的话。用的是演示的分词器，和一个只训练了 300 步的演示模型。
#
# 自己运行：装好 `requirements.txt` 和 Jupyter（`pip install jupyterlab`），在 `docs/` 里打开本文件，从上到下逐格运行；没有显卡也行，
# 头一次要一两分钟。改一改数字再运行，是最好的学法。（改了 `one_step.py`，用 `jupytext --to ipynb --execute one_step.py` 重新生成。）

# %%
# ruff: noqa: E402
import copy
import json
import math
import struct
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

warnings.filterwarnings("ignore", message="IProgress")  # 没有装 ipywidgets 也行：不画进度条
import transformers

ROOT = Path.cwd().parent  # 本文件在 docs/ 里，脚本在上一层
sys.path.insert(0, str(ROOT))
import a100_train
import plot_loss

STEPS = 300  # 训练几步；改成 1350 就是完整的演示
RUN = ROOT / f"run-{STEPS}-steps"
plt.rcParams["figure.dpi"] = 80
transformers.utils.logging.disable_progress_bar()

CHINESE = plot_loss.use_chinese_font() == "zh"


def words(chinese, english):
    """图上的字：这台机器没有中文字体，就用英文，不会出现方框。"""
    return chinese if CHINESE else english


# %% [markdown]
# ## 0. 准备：训练 300 步
#
# 就是 README 的那条命令，只是步数少。它做好语料、分词器和打包好的数据，训练一个 2 层、128 维、98 万参数的模型。
# 已经训练过，就直接用。

# %%
if not (RUN / "final_model").exists():
    command = [sys.executable, "a100_train.py", "--preset", "demo", "--fresh"]
    command += ["--device", "cpu", "--max_steps", str(STEPS), "--work_dir", str(RUN)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr[-500:]

settings = Namespace(**json.loads((RUN / "config.json").read_text(encoding="utf-8")))
log = [json.loads(line) for line in (RUN / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
tokenizer = transformers.AutoTokenizer.from_pretrained(RUN / "tokenizer")

untrained = a100_train.build_model(settings)  # 训练开始前的模型：同一个种子，同样的随机数
model = a100_train.build_model(settings)
trained = transformers.GPT2LMHeadModel.from_pretrained(RUN / "final_model")
model.load_state_dict(trained.state_dict())
model.set_attn_implementation("eager")  # 同样的结果，而且肯交出注意力的权重，好拿来比

V = settings.vocab_size
C = settings.n_embd
T = settings.block_size
print(f"词表 V = {V:,}，向量 C = {C} 维，上下文 T = {T}，{settings.n_layer} 层，每层 {settings.n_head} 个头")

train_rows = [row for row in log if "loss" in row]
plt.figure(figsize=(6, 2.5))
plt.plot([row["step"] for row in train_rows], [row["loss"] for row in train_rows])
plt.axhline(math.log(V), color="gray", linestyle=":")
plt.xlabel(words("步", "step"))
plt.ylabel(words("训练损失（nat）", "training loss (nat)"))
plt.title(words("虚线是 ln V：什么都没学的损失", "dotted: ln V, the loss of knowing nothing"))
plt.show()

# %% [markdown]
# ## 1. 一句话怎样变成数字？
#
# 分词器把文字切成 token（词块），每块在词表里有一个编号（id）。模型只看得见编号。

# %%
text = "今天天气很好，我们去北京看朋友。"
ids = tokenizer(text).input_ids
pieces = [tokenizer.decode([i]) for i in ids]
for piece, i in zip(pieces, ids, strict=True):
    print(f"{piece} → {i}", end="   ")
print()

assert "".join(pieces) == text  # 切开了再拼上，一个字也不差
assert tokenizer.decode(ids) == text
print(f"{len(text)} 个字，{len(ids)} 个 token")

# %% [markdown]
# 训练用的全部文档首尾相接成一长串编号，切成每 64 个一块（block）；一块就是一个样本。标签（label）是每个位置的**下一个** token：
# 64 个位置，就是 64 道填空题。

# %%
blocks = a100_train.BlockStream(RUN / "packed" / "train.bin", T, 64, seed=7)
inputs = blocks[0]["input_ids"]
labels = blocks[0]["labels"]
print("输入：", [tokenizer.decode([i]) for i in inputs[:8]], "……")
print("标签：", [tokenizer.decode([i]) for i in labels[:8]], "……")

everything = np.fromfile(RUN / "packed" / "train.bin", np.uint16)
n_blocks = len(everything) // T
all_blocks = everything[: n_blocks * T].reshape(n_blocks, T)
print(f"整个语料 {len(everything):,} 个 token，切成 {n_blocks:,} 块")
assert (all_blocks == inputs).all(axis=1).any()  # 手切的块里，有一块就是它
assert (inputs[1:] == labels[:-1]).all()  # 标签就是输入错开一位

# %% [markdown]
# `</s>` 是一篇的结束。`�` 是半个字：不常见的字在词表里没有自己的一行，拆成 UTF-8 的三个字节，一个字节一个 token，单独一个显示不出来。
#
# **带走一句**：模型的世界里没有字，只有 0 到 V−1 的编号；训练就是不停地猜下一个编号。

# %% [markdown]
# ## 2. 编号怎样变成向量？
#
# 编号 4 并不比编号 3 “大”，所以不能直接拿来算。模型给每个编号准备一行 128 个数（词向量，embedding），给每个位置也准备一行（位置向量），
# 两行相加。取第 i 行，就是查表。

# %%
x = torch.tensor([ids])  # (1, 句长)：一批里只有一句
word_table = model.transformer.wte.weight  # (V, C)
position_table = model.transformer.wpe.weight  # (T, C)
hidden = word_table[x] + position_table[: len(ids)]  # (1, 句长, C)
print("词向量表", tuple(word_table.shape), "  位置向量表", tuple(position_table.shape))
print("编号", tuple(x.shape), "→ 向量", tuple(hidden.shape))

library = model(input_ids=x, output_hidden_states=True, output_attentions=True)
assert torch.equal(hidden, library.hidden_states[0])  # 库算的，第 0 层的输入

share = word_table.numel() / sum(p.numel() for p in model.parameters())
print(f"词向量表占全部参数的 {share:.0%}")

plt.figure(figsize=(6, 2.6))
plt.imshow(hidden[0].detach(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
plt.yticks(range(len(ids)), pieces if CHINESE else ids)
plt.xlabel(words("向量的 128 个数", "the 128 numbers of a vector"))
plt.colorbar()
plt.show()

# %% [markdown]
# **带走一句**：词向量表是一张查找表，一开始是随机数，训练把它慢慢改成有意义的；小模型的参数大半在这里。

# %% [markdown]
# ## 3. 一个注意力头在做什么？
#
# 每个位置发出一个问题 q（query），亮出一个名牌 k（key），带着一份内容 v（value），都是由自己的向量乘矩阵得来的。q 和 k 的点积大，就是“合得来”；
# 按合得来的程度，把前面各位置的 v 加权平均，就是这个头的输出。一共五行。

# %%
layer = model.transformer.h[0]  # 第一层
normal = layer.ln_1(hidden[0])  # (句长, C)：先把每个向量缩放到差不多大
qkv = normal @ layer.attn.c_attn.weight + layer.attn.c_attn.bias  # (句长, 3C)：q、k、v 并排
size = C // settings.n_head  # 每个头 32 维
n = len(ids)
future = torch.ones(n, n).triu(1).bool()  # 右上角是 True：第 i 行的位置 i+1 以后，是它的未来

# 第 1 个头，五行：
q, k, v = [part[:, :size] for part in qkv.split(C, dim=1)]  # 各 (句长, 32)
scores = q @ k.T / math.sqrt(size)  # (句长, 句长)：合不合得来；除以 √32，数才不会太大
scores = scores.masked_fill(future, -math.inf)  # 未来不许看
weights = scores.softmax(dim=1)  # 每一行变成概率，合计是 1
output = weights @ v  # (句长, 32)：按概率平均各位置的内容

heads = []
hook = layer.attn.c_proj.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
model(input_ids=x)  # 钩子（hook）记下库里各个头的输出：(1, 句长, C)，四个头并排
hook.remove()
library_weights = library.attentions[0][0, 0]
library_output = heads[0][0, :, :size]
print(f"权重与库最多相差 {(weights - library_weights).abs().max().item():.1e}")
print(f"输出与库最多相差 {(output - library_output).abs().max().item():.1e}")
assert torch.allclose(weights, library_weights, atol=1e-5)
assert torch.allclose(output, library_output, atol=1e-5)

# %%
labels_of_axes = pieces if CHINESE else ids
figure, axes = plt.subplots(1, 2, figsize=(9, 4))
for number, axis in enumerate(axes):
    axis.imshow(library.attentions[number][0, 0].detach(), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(n), labels_of_axes, rotation=0 if CHINESE else 90)
    axis.set_yticks(range(n), labels_of_axes)
    axis.set_title(words(f"第 {number + 1} 层，第 1 个头", f"layer {number + 1}, head 1"))
    axis.set_xlabel(words("看哪里", "looks at"))
axes[0].set_ylabel(words("谁在看", "who looks"))
plt.show()

# %% [markdown]
# 每一行是一个位置在看谁，一行合计是 1。第一个位置前面没有别人，只好看自己。
#
# **带走一句**：注意力就是加权平均，权重由 q 和 k 的点积现算；五行代码，没有别的秘密。

# %% [markdown]
# ## 4. 为什么训练时不会偷看答案？
#
# 64 道填空题一次算完，而第 i 题的答案就在第 i+1 个位置上。挡住它的是上面那行“未来不许看”（因果掩码，causal mask）。
# 验证：换掉第 6 个位置的 token，前面的输出应当一个数也不动。

# %%
changed = x.clone()
place = 5  # 从 0 数
changed[0, place] = tokenizer("花").input_ids[0]
with torch.no_grad():
    before = model(input_ids=x).logits[0]
    after = model(input_ids=changed).logits[0]
difference = (before - after).abs().max(dim=1).values  # 每个位置上，输出最多变了多少
print(f"把“{pieces[place]}”换成“{tokenizer.decode(changed[0, place : place + 1])}”")
assert difference[:place].max() == 0  # 前面的一点不变
assert (difference[place:] > 0).all()  # 自己和后面的都变了

plt.figure(figsize=(6, 2.2))
plt.bar(range(n), difference)
plt.xticks(range(n), labels_of_axes)
plt.ylabel(words("输出变了多少", "change of the output"))
plt.show()

# %% [markdown]
# **带走一句**：信息只能从左往右流。所以一块 64 个 token 能同时当 64 道题，而且没有一道看得见自己的答案。

# %% [markdown]
# ## 5. 损失是什么？
#
# 模型给词表里每个 token 一个分数（logit）。softmax 把分数变成概率：各取 e 的幂，再除以总和。损失是 −ln(正确答案的概率)：
# 猜得有把握而且对，接近 0；把正确答案的概率说成百分之一，就是 ln 100 = 4.6。

# %%
with torch.no_grad():
    logits = model(input_ids=x).logits[0]  # (句长, V)
guess = logits[3]  # 看完前 4 个 token 后的分数，(V,)
probabilities = guess.exp() / guess.exp().sum()
assert torch.allclose(probabilities, guess.softmax(dim=0))
answer = ids[4]
print(f"“{''.join(pieces[:4])}”后面是“{pieces[4]}”，概率 {probabilities[answer]:.4f}，")
print(f"这道题的损失 −ln {probabilities[answer]:.4f} = {-math.log(probabilities[answer]):.3f}")

best = probabilities.topk(10).indices.tolist()
names = [tokenizer.decode([i]) for i in best]
plt.figure(figsize=(6, 2.4))
plt.bar(range(10), probabilities[best], color=["tab:orange" if i == answer else "tab:blue" for i in best])
plt.xticks(range(10), names if CHINESE else best)
plt.ylabel(words("概率", "probability"))
plt.title(words("模型最看好的 10 个下一个 token", "the ten most probable next tokens"))
plt.show()


# %% [markdown]
# 一批（batch）数据的损失，是所有题目的平均。手算，与模型自己算的比：


# %%
def loss_by_hand(any_model, batch):
    """-ln(正确答案的概率)，在 (B, T) 道题上平均。"""
    logits = any_model(input_ids=batch["input_ids"]).logits  # (B, T, V)
    log_probabilities = logits.log_softmax(dim=2)
    correct = log_probabilities.gather(2, batch["labels"][:, :, None])  # 每道题只取正确答案那一个
    return -correct.mean()


def make_batch(first, count):
    return torch.utils.data.default_collate([blocks[i] for i in range(first, first + count)])


batch = make_batch(0, 8)  # 8 块 × 64 = 512 道题
another = make_batch(8, 8)
by_hand = loss_by_hand(model, batch)
by_model = model(**batch)["loss"]
assert torch.allclose(by_hand, by_model, atol=1e-5)
print(f"手算 {by_hand:.5f}，模型 {by_model:.5f}")

at_start = untrained(**batch)["loss"]
print(f"训练前 {at_start:.3f}；ln V = ln {V:,} = {math.log(V):.3f}")
assert abs(at_start - math.log(V)) < 0.1

# %% [markdown]
# 训练前的模型给每个 token 差不多一样的概率 1/V，损失就是 −ln(1/V) = ln V。自己的第一行日志离它很远，多半是哪里错了。
#
# **带走一句**：损失是“对正确答案有多意外”，从 ln V 开始往下走。

# %% [markdown]
# ## 6. 反向传播算出来的梯度，是什么意思？
#
# 梯度（gradient）说的是：这个参数加大一点点，损失变化多少倍那么多。`loss.backward()` 一次算出全部 98 万个。真去加大一点点，看损失变多少，
# 就能检查它；这样做叫有限差分，一个参数要算两遍损失，98 万个就是 196 万遍。挑一行词向量里的 5 个数来比。

# %%
exact = copy.deepcopy(model).double()  # 64 位浮点数：差得太小，32 位看不准
table = exact.transformer.wte.weight
row = int(batch["input_ids"][0, 0])  # 这一批第一个 token 的那一行
loss_by_hand(exact, batch).backward()

small = 1e-5
for column in range(5):
    with torch.no_grad():
        table[row, column] += small
        higher = loss_by_hand(exact, batch)
        table[row, column] -= 2 * small
        lower = loss_by_hand(exact, batch)
        table[row, column] += small
    slope = float(higher - lower) / (2 * small)
    gradient = float(table.grad[row, column])
    print(f"第 {column} 个数：有限差分 {slope:+.9f}，backward {gradient:+.9f}")
    assert abs(slope - gradient) < 1e-8

lengths = table.grad.norm(dim=1)
never = np.bincount(everything, minlength=V) == 0
tiny = lengths < 1e-5
print(f"{tiny.sum()} 行的梯度不到 1e-5，其中 {tiny[never].sum()} 行的 token 整个语料里没有")
seen = torch.zeros(V, dtype=torch.bool)
seen[batch["input_ids"].flatten()] = True
plt.figure(figsize=(6, 2.4))
plt.hist(lengths[seen].log10(), bins=40, alpha=0.7, label=words("这一批里有的 token", "tokens of this batch"))
plt.hist(lengths[~seen].log10(), bins=40, alpha=0.7, label=words("没有的", "other tokens"))
plt.xlabel(words("那一行的梯度有多长（log10）", "length of the row's gradient (log10)"))
plt.legend()
plt.show()

# %% [markdown]
# 这一批里没有的 token 也有梯度：输出层与词向量表共用（tied），每道题都要把全部 V 个 token 的分数推高或压低一点。
# 最左边的一小堆几乎从不出现（多数是用不到的字节）：概率已经压到差不多是 0，没有什么可改了。
#
# **带走一句**：梯度就是“推一下这个数，损失怎么动”；反向传播只是一次把它们全算出来的快办法。

# %% [markdown]
# ## 7. AdamW 怎样更新一个参数？
#
# 它记两份历史：梯度的平均 m，和梯度平方的平均 v。走的方向是 m ÷ √v：梯度一直同号，就走满一个学习率；忽正忽负，就走得少。
# 另外每步把参数缩小一点点（权重衰减，weight decay）。连做两步，与 torch 的 AdamW 比：

# %%
LEARNING_RATE = 0.01
DECAY = 0.1
BETA1 = 0.9
BETA2 = 0.95
EPSILON = 1e-8

student = copy.deepcopy(model)
parameter = student.transformer.wte.weight
optimizer = torch.optim.AdamW([parameter], LEARNING_RATE, (BETA1, BETA2), EPSILON, DECAY)

by_hand = parameter.detach().clone()
m = torch.zeros_like(by_hand)
v = torch.zeros_like(by_hand)
moves = []
for step, data in enumerate((batch, another), start=1):
    optimizer.zero_grad()
    student(**data)["loss"].backward()
    gradient = parameter.grad.clone()
    optimizer.step()

    m = BETA1 * m + (1 - BETA1) * gradient
    v = BETA2 * v + (1 - BETA2) * gradient**2
    m_corrected = m / (1 - BETA1**step)  # 从 0 开始平均，头几步偏小，除回来
    v_corrected = v / (1 - BETA2**step)
    move = m_corrected / (v_corrected.sqrt() + EPSILON)
    by_hand = by_hand * (1 - LEARNING_RATE * DECAY) - LEARNING_RATE * move
    assert torch.allclose(by_hand, parameter, atol=1e-6)
    moves.append(move.flatten())
    print(f"第 {step} 步与库最多相差 {(by_hand - parameter).abs().max().item():.1e}")

plt.figure(figsize=(6, 2.4))
plt.hist(
    [moves[0].numpy(), moves[1].numpy()],
    bins=41,
    label=[words("第 1 步", "step 1"), words("第 2 步", "step 2")],
)
plt.xlabel(words("走几个学习率", "move, in learning rates"))
plt.yscale("log")
plt.legend()
plt.show()

# %% [markdown]
# 第 1 步 m ÷ √v 就是梯度 ÷ |梯度|，差不多不是 +1 就是 −1：不管梯度多大，都走一个学习率（中间的少数，是梯度小到与防止除以 0 的
# ε = 1e-8 相当的）。第 2 步才有了大小之分。
#
# **带走一句**：AdamW 看的主要是梯度的方向和稳不稳定，不是大小；学习率就是一个数一步最多大约走多远。

# %% [markdown]
# ## 8. Muon 怎样更新一个矩阵？
#
# AdamW 一个数一个数地看，Muon 把矩阵当一个整体：先取动量（梯度的滑动平均），再把它**正交化**，也就是奇异值都变成差不多 1。
# 奇异值（singular value）是矩阵在各个方向上拉伸的倍数。下面手算一步，与 `a100_train.py` 的 Muon 比。

# %%
student = copy.deepcopy(model)
groups = a100_train.parameter_groups(student, 0.016, 0.02)
muon = a100_train.Muon(groups)
matrix = student.transformer.h[0].mlp.c_fc.weight  # (C, 4C)
decay = next(group["weight_decay"] for group in groups if any(p is matrix for p in group["params"]))
student(**batch)["loss"].backward()
gradient = matrix.grad.clone()
old = matrix.detach().clone()
muon.step()

momentum = 0.05 * gradient  # 第一步：旧的动量是 0，占 95%；新的梯度占 5%
update = 0.05 * gradient + 0.95 * momentum  # Nesterov：再往前看一步
z = update / update.norm()  # 奇异值都不超过 1
for _ in range(5):  # Newton–Schulz 迭代：只用矩阵乘法，把每个奇异值 s 变成 3.4445 s − 4.7750 s³ + 2.0315 s⁵
    gram = z @ z.T
    z = 3.4445 * z - 4.7750 * gram @ z + 2.0315 * gram @ gram @ z
library_z = a100_train.orthogonalize(update[None])[0]  # 它一次可以算几个矩阵，所以前后多一维
scale = math.sqrt(4)  # (C, 4C) 的矩阵，步子放大 √4 倍
by_hand = old * (1 - 0.02 * decay) - 0.02 * scale * z

print(f"与 orthogonalize 最多相差 {(z - library_z).abs().max().item():.1e}")
print(f"与 Muon 最多相差 {(by_hand - matrix).abs().max().item():.1e}")
assert torch.allclose(z, library_z, atol=1e-4)
assert torch.allclose(by_hand, matrix, atol=1e-5)

# %%
singular_before = torch.linalg.svdvals(update)
singular_after = torch.linalg.svdvals(z)
print(f"之前：最大的是中间的 {singular_before[0] / singular_before[C // 2]:.0f} 倍")
near_one = (singular_after > 0.6) & (singular_after < 1.2)
print(f"之后：{near_one.sum()} 个在 0.6 与 1.2 之间，最小的是 {singular_after.min():.2f}")

figure, axes = plt.subplots(1, 2, figsize=(8, 2.6))
axes[0].bar(range(C), singular_before)
axes[0].set_title(words("正交化之前的 128 个奇异值", "128 singular values before"))
axes[1].bar(range(C), singular_after)
axes[1].set_title(words("之后", "after"))
plt.show()

# %% [markdown]
# 之前，更新集中在几个方向上，别的方向几乎不动；之后，各个方向走得差不多远。五次迭代不求精确的 1，落在 1 附近就够用，这样快；
# 原来就小得几乎是 0 的，五次还拉不上来。
#
# **带走一句**：Muon 让矩阵在每个方向上都学，而不只是在最响的几个方向上。

# %% [markdown]
# ## 9. 走一步，损失真的降了吗？
#
# 用上面的优化器在 `batch` 上走一步，步子从很小到很大，看同一批和另一批（没有用来算梯度的）的损失各变成多少。训练前的模型和训练了
# 300 步的模型，各走一次。

# %%
multiples = [0.01, 0.03, 0.1, 0.3, 1, 3]  # 演示的最高学习率（0.016 和 0.02）的几倍


def losses_after_one_step(start, multiple):
    """从模型 start 出发走一步，返回同一批和另一批的损失。"""
    student = copy.deepcopy(start)
    optimizer = a100_train.Muon(a100_train.parameter_groups(student, 0.016 * multiple, 0.02 * multiple))
    student(**batch)["loss"].backward()
    optimizer.step()
    with torch.no_grad():
        return [student(**data)["loss"].item() for data in (batch, another)]


names = [words("训练前", "untrained"), words(f"{STEPS} 步以后", f"after {STEPS} steps")]
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for name, start, axis in zip(names, (untrained, model), axes, strict=True):
    with torch.no_grad():
        same_before = start(**batch)["loss"].item()
        other_before = start(**another)["loss"].item()
    after = [losses_after_one_step(start, multiple) for multiple in multiples]
    same = [losses[0] for losses in after]
    other = [losses[1] for losses in after]
    assert min(same) < same_before
    print(f"{name}：同一批 {same_before:.3f}，走一步最低 {min(same):.3f}；", end="")
    print(f"另一批 {other_before:.3f}，最低 {min(other):.3f}")
    axis.plot(multiples, same, "o-", color="tab:blue", label=words("同一批", "same batch"))
    axis.plot(multiples, other, "o-", color="tab:orange", label=words("另一批", "another batch"))
    axis.axhline(same_before, color="tab:blue", linestyle=":")
    axis.axhline(other_before, color="tab:orange", linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel(
        words("学习率是最高值的几倍（虚线：走之前）", "multiple of the peak rate (dotted: before)")
    )
    axis.set_title(name)
axes[0].set_ylabel(words("损失", "loss"))
axes[0].legend()
plt.show()

# %% [markdown]
# 训练前，一批教的东西（哪些 token 常见）到处用得上，另一批也跟着降。300 步以后，容易学的都学过了，这 512 道题只能教会模型背自己，
# 另一批一点也不降，步子大了还变差。所以真正的训练靠的不是哪一步：优化器把许多批的梯度平均起来，学习率越走越小，背下来的互相抵消，
# 共同的才留下。
#
# **带走一句**：同一批的损失降了，不等于学到了；没见过的数据上降多少，才算数。

# %% [markdown]
# ## 10. 显存放不下大批量怎么办？
#
# 把 8 块分成两个微批量，各 4 块，各自的损失除以 2，梯度相加（梯度累积，gradient accumulation）。平均的平均就是平均，所以梯度一样。

# %%
student = copy.deepcopy(model)
student(**batch)["loss"].backward()
at_once = [p.grad.clone() for p in student.parameters()]

student.zero_grad()
for micro_batch in (make_batch(0, 4), make_batch(4, 4)):
    loss = student(**micro_batch)["loss"] / 2
    loss.backward()  # 不清零，梯度就加在原来的上面
accumulated = [p.grad for p in student.parameters()]

largest = max((a - b).abs().max().item() for a, b in zip(at_once, accumulated, strict=True))
print(f"{len(at_once)} 个参数，梯度最多相差 {largest:.1e}")
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(at_once, accumulated, strict=True))

# %% [markdown]
# **带走一句**：微批量只管显存和速度，不改变训练的结果（只差浮点舍入）；改变结果的是有效批量。


# %% [markdown]
# ## 11. bf16 把一个数变成了什么？
#
# 一个 fp32 数有 32 位：1 位正负，8 位指数，23 位小数。bf16 只留前 16 位，小数剩 7 位：范围一样大，精度只有两三位有效数字。
# 四舍五入（正好一半时取偶数）可以直接在整数上做：


# %%
def bits_of(number):
    """fp32 的 32 位，当作一个整数。"""
    return struct.unpack(">I", struct.pack(">f", number))[0]


def round_to_bf16(number):
    bits = bits_of(number)
    last = (bits >> 16) & 1  # 留下的最后一位
    rounded = (bits + 0x7FFF + last) >> 16 << 16  # 加上差不多一半再砍掉后 16 位
    return struct.unpack(">f", struct.pack(">I", rounded))[0]


for number in (0.1, 3.14159265, 1.0 + 0.003, 1000.0 + 3.0):
    library_value = float(torch.tensor(number).bfloat16())
    assert round_to_bf16(number) == library_value
    print(f"{number:<12} → bf16 {library_value}")

COLORS = ["tomato"] + ["gold"] * 8 + ["lightskyblue"] * 23  # 正负 1 位，指数 8 位，小数 23 位
figure, axis = plt.subplots(figsize=(8, 1.6))
for line, value in enumerate((3.14159265, round_to_bf16(3.14159265))):
    for place, bit in enumerate(f"{bits_of(value):032b}"[: 32 - 16 * line]):
        axis.add_patch(plt.Rectangle((place, 1 - line), 0.9, 0.8, color=COLORS[place]))
        axis.text(place + 0.45, 1.4 - line, bit, ha="center", va="center")
axis.set_xlim(0, 32)
axis.set_ylim(0, 2)
axis.set_yticks([1.4, 0.4], ["fp32", "bf16"])
axis.set_xticks([])
axis.set_title(words("3.14159265：正负、指数、小数", "3.14159265: sign, exponent, fraction"))
plt.show()

# %% [markdown]
# 1 + 0.003 变成了 1：1 附近的 bf16 数相隔 1/128 = 0.0078，这一步白走了。所以训练时权重留在 fp32，只在做矩阵乘法时用 bf16：
# 乘法快得多，小小的更新也不会丢。
#
# **带走一句**：bf16 省的是精度，不是范围；凡是要一点一点累加的（权重、动量），都不能只用它存。

# %% [markdown]
# ## 一步训练，合起来
#
# ```
# 编号 → 向量 → 各层（注意力 + MLP）→ 分数 → 概率 → 损失       第 1–5 节，前向
# 损失 → 每个参数的梯度                                       第 6 节，反向
# 参数 −= 学习率 × 方向                                       第 7–9 节，更新
# ```
#
# 完整训练把它重复 11,838 次，每次 98,304 道题。接下来：读 `a100_train.py` 第 6 节，那里是同样的几行；做 `docs/experiments.md` 里的实验。
