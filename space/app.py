"""模型的网页：续写，看它怎样一步步长大，看训练到哪里了，看分词，看下一个词怎样选出来，看模型里面。

    pip install -r space/requirements.txt
    python space/app.py --model gpt2-chinese       # 然后用浏览器打开它打印的地址

--model 是工作目录、其中的 final_model/，或 Hub 上的 名字/仓库。作为 Space 运行时没有参数，模型取自环境变量 MODEL_ID。
还没训练完时，用最新的快照；刚开始训练、一份快照也没有，就只有“训练中”一页。
模型在本机时不用网络；输入和续写都当文本显示，不当 HTML。
"""

import argparse
import html
import json
import math
import os
import sys
import threading
import time
import urllib.request
from functools import lru_cache, partial
from pathlib import Path


def settle_proxies():
    """Gradio 启动时要访问一次自己的地址，这一次不能经过代理。它用的 httpx 遇到不认识的代理就报错，所以不用那样的。"""
    proxies = urllib.request.getproxies()  # 环境变量里的；Windows 和 Mac 上没有设时，是系统设置里的
    for kind, address in proxies.items():
        if address.startswith("socks"):
            print(f"{kind}_proxy 是 SOCKS 代理，这里用不上，这次不用它；要从 Hub 下载，请换成 http:// 的")
            address = ""
        os.environ[f"{kind}_proxy"] = address  # 小写的优先，空的等于没有
    os.environ["no_proxy"] = "localhost,127.0.0.1," + proxies.get("no", "")


settle_proxies()  # 要在 import gradio 之前：它一被 import 就读代理的设置

import gradio as gr  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from huggingface_hub import snapshot_download  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着
HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"
MAX_CHARACTERS = 2000  # 开头最长多少字：再长，分词和网页都慢
MAX_NEW_TOKENS = 400
TIME_LIMIT = 60  # 一次续写最多多少秒：别人在排队
MAX_HEADS = 16  # 藏头诗最多几句
MAX_PIECES = 32  # “里面”那一页最多画多少个词块：再多，格子就太小
REFRESH = 3  # “训练中”那一页几秒看一次日志
EXAMPLES = ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"]
SIDES = {"左": "#ea580c", "右": "#16a34a"}  # 成长那一页的两边，和它们在曲线上的颜色
INSIDE = """
- 上面的图：每个词块一行，它从自己和前面的词块取信息；格子越深，从那一列取得越多（指着格子，看从谁到谁、多少）。
- 下面的表：把每一层的结果直接当成最后的结果，模型会猜下一个词块是什么（0 层：还没有进任何一层）。这只是朝里面看一眼，不是解释。
"""
STYLE = """
.tab-container button { padding: 0 9px }  /* 手机上也并排放得下 */
#bars .bar { height: 10px }
#inside { overflow-x: auto }
#inside table { position: relative; margin-bottom: 32px; width: auto }
#inside th, #inside td { border: 1px solid #8884; font-weight: normal; padding: 4px 12px }
#inside table:first-of-type * { min-width: 20px; height: 20px; padding: 0 2px }
#inside table:first-of-type tr:first-child th { max-width: 20px; vertical-align: bottom }
#inside table:first-of-type tr:first-child th { word-break: break-all }
#inside td:hover::after { content: attr(data-hint); position: absolute; left: 0; bottom: -28px }
@media (max-width: 500px) { #inside table:first-of-type tr:first-child th { max-width: 9px }
  #inside table:first-of-type * { min-width: 9px; padding: 0; font-size: 9px } }
#samples { max-height: 600px; overflow-y: auto }
#samples p { white-space: pre-wrap; margin: 4px 0 }
#samples h4 { margin: 16px 0 4px }
"""
# 采样的几个参数：名字、最小、最大、默认、一格、说明
SAMPLING = [
    ("温度", 0, 2, 0.8, 0.05, "越高越敢选少见的词块；0 是每步取最可能的"),
    ("top_k", 1, 200, 50, 1, "只在最可能的几个词块里抽"),
    ("top_p", 0.05, 1, 0.9, 0.05, "只在累计概率到这么多的词块里抽"),
    ("重复惩罚", 1, 2, 1.1, 0.05, "出现过的词块不那么可能再出现；1 是不罚"),
]
QUIET = {"show_progress": "hidden"}  # 改一个字就重算的：不要一闪一闪的进度


# ==== 1. 一次训练留下的东西 ====


def read_json(path):
    """一个 JSON 文件的内容。没有这个文件，或它正写到一半，就是空的。"""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_rows(path):
    """.jsonl 文件的各行。训练还在写的话，最后一行可能只有一半，不要它。"""
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                rows.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return rows


class Run:
    """工作目录里的模型、分词器、快照、日志。权重用到了才读。"""

    def __init__(self, name):
        self.name = name
        self.lock = threading.Lock()
        self.home = find_home(name)
        self.prompts = self.config().get("prompts") or EXAMPLES  # 训练途中续写用的开头
        self.snapshots = find_snapshots(self.home)
        # 能用的模型和它们的说明，从旧到新：各个快照，最后是训练好的。刚开始训练时一个也没有
        self.folders = [note["folder"] for note in self.snapshots]
        self.captions = [caption(note) for note in self.snapshots]
        final = self.home / "final_model"
        if not os.path.isdir(final):
            final = self.home
        if os.path.isfile(final / "model.safetensors"):
            self.folders.append(final)
            self.captions.append("训练好的模型")
        if not os.path.isfile(final / "tokenizer.json"):
            final = self.home / "tokenizer"
        if self.folders:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(final)

    def model(self, index=-1):
        """第 index 个模型；不写就是最新的。"""
        folder = self.folders[int(index)]
        with self.lock:
            if not os.path.isfile(folder / "model.safetensors"):
                snapshot_download(self.name, allow_patterns=f"snapshots/{folder.name}/*")
            return load(folder)

    def config(self):
        return read_json(self.home / "config.json")

    def log(self):
        return read_rows(self.home / "train_log.jsonl")


def find_home(name):
    """工作目录；本机没有这个文件夹，就从 Hub 下载（不带快照的权重）。"""
    home = Path(name).resolve()
    if home.name == "final_model":
        home = home.parent
    if os.path.isdir(home):
        return home
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.jsonl", "model.safetensors"]))


def find_snapshots(home):
    """各个快照的说明（步数、当时的验证损失、文件夹），按步数排。"""
    notes = []
    for path in home.glob("snapshots/step-*[0-9]/snapshot.json"):
        note = read_json(path)
        if note:
            notes.append({**note, "folder": path.parent})
    return sorted(notes, key=lambda note: note["step"])


def caption(note):
    """快照的步数和当时的验证损失。"""
    step = f"第 {note['step']:,} 步"
    if not note["eval_loss"]:
        return step
    bits = note["eval_bits_per_char"]
    return f"{step}，最近一次验证损失 {note['eval_loss']:.2f}，每字比特 {bits:.2f}"


@lru_cache(maxsize=4)  # 82 M 参数的每个 0.33 GB
def load(folder):
    """fp32：快照存成 bf16 是为了省地方，多数 CPU 算 bf16 慢得多。只有 eager 的注意力肯把权重交出来看。"""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device)


# ==== 2. 续写 ====


def encode(run, text):
    """文字的词块编号；太长的说一句话就停。"""
    if len(text) > MAX_CHARACTERS:
        raise gr.Error(f"最多 {MAX_CHARACTERS:,} 字，现在是 {len(text):,} 字", print_exception=False)
    return run.tokenizer.encode(text, add_special_tokens=False)


def readable(run, ids):
    """词块的文字。生僻字由几个字节词块（如 <0xE4>）拼成；还没凑齐、拼不成字的是 U+FFFD，不显示。"""
    return run.tokenizer.decode(ids, skip_special_tokens=True).replace("\ufffd", "")


def names(run, ids):
    """词块在词表里的写法；换行是一个字节 <0x0A>，画成箭头。"""
    return [piece.replace("<0x0A>", "⏎") for piece in run.tokenizer.convert_ids_to_tokens(ids)]


@torch.inference_mode()
def forward(model, ids, cache=None):
    """ids 之后下一个词块的分数 (V,)。cache 存着前文的 K、V：每步只要算新的一个词块。"""
    batch = torch.tensor([ids], device=model.device)
    output = model(batch, cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1].cpu()


def probabilities(scores, ids, temperature, top_k, top_p, penalty):
    """分数变成概率 (V,)：罚出现过的，除以温度，留最可能的 top_k 个，再留累计到 top_p 的，归一。"""
    if temperature == 0:
        top_k = 1  # 只留最可能的
    rules = [
        transformers.RepetitionPenaltyLogitsProcessor(float(penalty)),
        transformers.TemperatureLogitsWarper(max(float(temperature), 0.01)),
        transformers.TopKLogitsWarper(int(top_k)),
        transformers.TopPLogitsWarper(float(top_p)),
    ]
    scores = scores[None]
    for rule in rules:
        scores = rule(torch.tensor([ids]), scores)
    return scores[0].softmax(-1)


def write(run, model, prompt, temperature, top_k, top_p, penalty, max_new_tokens, seed):
    """逐个词块续写，给出 (全文，说明)；没有开头就另起一篇。"""
    end = run.tokenizer.eos_token_id
    ids = encode(run, prompt) or [end]
    context = model.config.n_positions
    seed = int(seed or 0)
    random = torch.Generator().manual_seed(seed)  # 各用各的：两个人同时用，互不影响
    written = []
    new = ids[1 - context :]
    cache = transformers.DynamicCache()
    start = time.monotonic()
    for count in range(1, int(max_new_tokens) + 1):
        scores = forward(model, new, cache)
        chances = probabilities(scores, ids, temperature, top_k, top_p, penalty)
        token = torch.multinomial(chances, 1, generator=random).item()
        ids.append(token)
        written.append(token)
        new = [token]
        if cache.get_seq_length() == context:  # 上下文用满：只留后一半，接着写
            new = ids[-context // 2 :]
            cache = transformers.DynamicCache()
        seconds = time.monotonic() - start
        yield prompt + readable(run, written), f"{count} 个词块，{seconds:.2f} 秒，种子 {seed}"
        if token == end or seconds > TIME_LIMIT:
            return


def write_acrostic(run, model, title, heads, *values):
    """藏头诗：每一句先写上给定的字，再由模型写到句末的标点。没有给字，就平常地续写。"""
    if not heads:
        yield from write(run, model, title, *values)
        return
    poem = title.strip()
    for number, head in enumerate(heads[:MAX_HEADS]):
        if number % 2 == 0:
            poem += "\n"  # 训练用的诗，题目一行，以后两句一行
        for text, note in write(run, model, poem + head, *values):
            yield text, note
            if text[-1] in "，。！？；\n":
                break
        poem = text


def best(run, chances, count):
    """最可能的 count 个词块：[(编号，写法，概率), …]。"""
    values, tokens = chances.topk(count)
    ids = tokens.tolist()
    return list(zip(ids, names(run, ids), values.tolist(), strict=True))


@torch.inference_mode()
def look_inside(model, ids):
    """各层的注意力 [(1, H, T, T), …]，和最后一个位置在各层之后的猜测：各词块的概率 (L + 1, V)。"""
    batch = torch.tensor([ids], device=model.device)
    output = model(batch, output_attentions=True, output_hidden_states=True)
    states = torch.stack([state[0, -1] for state in output.hidden_states])  # 第 0 个是词向量 + 位置向量
    states[:-1] = model.transformer.ln_f(states[:-1])  # 最后一个已经过了 ln_f
    return output.attentions, model.lm_head(states).softmax(-1).cpu()


# ==== 3. 图 ====


def points(log, key):
    return [(row["step"], row[key]) for row in log if key in row]


def references(config):
    """两个参照：每个词块都一样可能时的损失 ln V；不看前文、只知道各个词块多常见时的损失（词频的熵）。"""
    if "unigram_entropy" not in config:
        return {}
    return {"瞎猜：ln V": math.log(config["vocab_size"]), "只看词频": config["unigram_entropy"]}


def curve(run, marks):
    """损失曲线（SVG，只填数字），和几个标记 {名字: 步数}。横轴是 log(1 + 步数)，与快照的间隔相称。"""
    log = run.log()
    config = run.config()
    train = points(log, "loss")
    held_out = points(log, "eval_loss")
    levels = references(config)
    losses = [*levels.values(), *[loss for _, loss in train + held_out]]
    if not losses:
        return ""
    low = min(losses) - 0.2
    high = max(losses) + 0.2
    steps = [row["step"] for row in log]
    last = max(10, config.get("total_steps", 0), *steps, *marks.values())

    def x(step):
        share = math.log1p(step) / math.log1p(last)
        return round(40 + 420 * share, 1)

    def y(loss):
        share = (high - loss) / (high - low)
        return round(20 + 180 * share, 1)

    parts = axes(range(math.ceil(low), math.ceil(high)), last, x, y)
    for name, loss in levels.items():
        parts.append(f'<path d="M40 {y(loss)} H460" stroke="#dc2626" stroke-dasharray="6"/>')
        parts.append(f'<text x="400" y="{y(loss) - 5}">{name} {loss:.2f}</text>')
    line = " ".join(f"{x(step)},{y(loss)}" for step, loss in train)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#999" stroke-width="2"/>')
    for step, loss in held_out:
        parts.append(f'<circle cx="{x(step)}" cy="{y(loss)}" r="4" fill="#2563eb"/>')
    for name, step in marks.items():
        mark = f'<path d="M{x(step)} 20 V204"/><text x="{x(step)}" y="15">{name}</text>'
        parts.append(f'<g stroke="{SIDES[name]}">{mark}</g>')
    style = 'font-size="14" fill="currentColor" text-anchor="middle"'
    size = 'style="width: 100%; max-width: 600px; margin: auto"'
    return f'<svg viewBox="0 0 480 240" {style} {size}>{"".join(parts)}</svg>'


def axes(losses, last, x, y):
    """横线和两条轴上的数字；x、y 把步数、损失换成图上的位置。"""
    parts = ['<text x="250" y="238">步数（线：训练损失，点：验证损失）</text>']
    for loss in losses:
        parts.append(f'<path d="M40 {y(loss)} H460" stroke="#8884"/>')
        parts.append(f'<text x="25" y="{y(loss) + 5}">{loss}</text>')
    for step in [0, 1, 10, 100, 1000, 10_000, last]:
        if step < last / 2 or step == last:
            parts.append(f'<text x="{x(step)}" y="220">{step}</text>')
    return parts


def table(rows):
    return "<table><tr>" + "</tr><tr>".join(rows) + "</tr></table>"


def heat_map(pieces, weights):
    """注意力 (T, T) 画成表格。每个词块一行；颜色越深，它从那一列的词块取得越多。"""
    pieces = [html.escape(piece) for piece in pieces]
    rows = ["<th></th>" + "".join(f"<th>{name}</th>" for name in pieces)]
    for position, name in enumerate(pieces):
        cells = [f"<th>{name}</th>"]
        for source, weight in zip(pieces, weights[position], strict=True):
            hint = f"从「{name}」看「{source}」：{weight:.1%}"
            cells.append(
                f'<td data-hint="{hint}" style="background: rgb(37 99 235 / {weight**0.5:.3f})"></td>'
            )
        rows.append("".join(cells))
    return table(rows)


# ==== 4. 标签页 ====


def text_box(label, text, name):
    return gr.Textbox(text, label=label, lines=2, max_lines=6, elem_id=name)


def sampling_controls(tokens):
    """采样的几个参数，各带一句解释；tokens 是默认的长度。"""
    length = ("长度", 1, MAX_NEW_TOKENS, tokens, 1, f"最多写多少个词块；到 {TIME_LIMIT} 秒也停")
    controls = []
    with gr.Accordion("参数", open=False):
        for name, low, high, value, step, info in [*SAMPLING, length]:
            controls.append(gr.Slider(low, high, value, step=step, label=name, info=info))
        info = "同样的种子，同样的续写"
        controls.append(gr.Number(42, precision=0, minimum=0, maximum=2**53, label="种子", info=info))
    return controls


def generate_tab(run):
    prompt = text_box("开头", run.prompts[0], "prompt")
    gr.Examples(run.prompts, prompt, label="例子")
    label = "藏头诗：各句的第一个字（开头作题目）；空着就平常地续写"
    heads = gr.Textbox("", label=label, visible=run.config().get("preset") == "poem", elem_id="heads")
    with gr.Row():
        start = gr.Button("续写", variant="primary", elem_id="start", min_width=80)
        stop = gr.Button("停", elem_id="stop", min_width=80)
    output = gr.Textbox(label="续写", lines=8, buttons=["copy"], elem_id="output")
    note = gr.Markdown(elem_id="note")
    controls = sampling_controls(200)
    answer = partial(write_acrostic, run, run.model())
    event = start.click(answer, [prompt, heads, *controls], [output, note], show_progress="minimal")
    stop.click(None, cancels=event, queue=False)


def growth_tab(run):
    gr.Markdown("同一个开头、同一个种子，训练到不同的步数。拖动滑块，看乱码怎样变成句子。")
    prompt = text_box("开头", run.prompts[0], "growth-prompt")
    both = gr.Button("两边都写", variant="primary", elem_id="both")
    controls = sampling_controls(60)
    last = len(run.snapshots) - 1
    sliders = []

    def write_one(index, prompt, *values):
        for text, _ in write(run, run.model(index), prompt, *values):
            yield gr.Textbox(text, label=run.captions[int(index)])

    def draw(*indexes):
        steps = [run.snapshots[int(index)]["step"] for index in indexes]
        return curve(run, dict(zip(SIDES, steps, strict=True)))

    chart = gr.HTML(draw(0, last), elem_id="curve")
    with gr.Row():
        for side, index in zip(SIDES, [0, last], strict=True):
            with gr.Column(min_width=280):
                label = f"{side}：第几个快照"
                slider = gr.Slider(0, last, index, step=1, label=label, elem_id=f"slider-{side}")
                output = gr.Textbox(label=run.captions[index], lines=5, elem_id=f"growth-{side}")
            gr.on([slider.change, both.click], write_one, [slider, prompt, *controls], output, **QUIET)
            sliders.append(slider)
    gr.on([slider.change for slider in sliders], draw, sliders, chart, **QUIET)


def training_tab(run):
    timer = gr.Timer(REFRESH, active=os.path.isdir(run.name))  # 从 Hub 来的不会再变
    gr.Markdown(partial(progress, run), every=timer, elem_id="progress")
    gr.HTML(partial(curve, run, {}), every=timer, elem_id="training-curve")
    gr.HTML(partial(samples, run), every=timer, elem_id="samples")


def progress(run):
    """训练到哪里了，多快，还要多久。"""
    rows = [row for row in run.log() if "loss" in row]
    if not rows:
        return f"{run.home} 里还没有训练日志。在另一个终端里运行 a100_train.py，准备好数据以后就有。"
    last = rows[-1]
    step = last["step"]
    minutes = last["elapsed_seconds"] / 60
    total = run.config().get("total_steps", step)
    left = minutes / step * (total - step)
    return (
        f"第 **{step:,}** / {total:,} 步，损失 **{last['loss']:.2f}**，每秒 {last['tokens_per_second']:,.0f} 个词块，"
        f"用了 {minutes:.1f} 分钟，约剩 **{left:.1f}** 分钟。"
    )


def samples(run):
    """每次验证时写的几段，新的在前。"""
    evaluations = {}
    for row in read_rows(run.home / "samples.jsonl"):
        title = f"<h4>第 {row['step']:,} 步，验证损失 {row['eval_loss']:.2f}</h4>"
        text = f"<p>{html.escape(row['text'])}</p>"
        evaluations[title] = evaluations.get(title, "") + text
    parts = [title + texts for title, texts in evaluations.items()]
    return "".join(reversed(parts))


def tokenizer_tab(run):
    gr.Markdown(
        "模型看到的不是字，是**词块**：常见的词是一块，生僻的字拆成几个字节。后面的数字是词块的编号。"
    )
    example = "今天天气很好，我在图书馆里读《红楼梦》，“饕餮”两个字不认识。"

    def split(text):
        ids = encode(run, text)
        pieces = list(zip(names(run, ids), map(str, ids), strict=True))
        average = len(text) / max(len(ids), 1)
        return f"{len(text)} 字，{len(ids)} 个词块，每块 **{average:.2f}** 字", pieces

    summary, pieces = split(example)
    text = text_box("写点什么", example, "pieces-text")
    outputs = [
        gr.Markdown(summary, elem_id="pieces-count"),
        gr.HighlightedText(pieces, label="分词器切的", elem_id="pieces"),
    ]
    text.change(split, text, outputs, **QUIET)


def next_token_tab(run):
    gr.Markdown(
        "模型给每个词块一个概率，再按概率**抽一个**。点一个候选，把它接上（`<0xE9>` 这样的单个字节接不上）；"
        "改温度，看概率怎样变：低，集中在最可能的；高，接近平均。"
    )

    def distribution(text, temperature):
        model = run.model()
        ids = encode(run, text) or [run.tokenizer.eos_token_id]
        scores = forward(model, ids[1 - model.config.n_positions :])
        return probabilities(scores, ids, temperature, len(scores), 1, 1)

    def show(text, temperature):
        top = best(run, distribution(text, temperature), 10)
        return {f"{piece}  #{token}": chance for token, piece, chance in top}

    def append(text, token):
        return text + readable(run, [token])

    def pick(text, event: gr.SelectData):
        token = event.value.rsplit("#", 1)[1]
        return append(text, int(token))

    def draw(text, temperature):
        token = torch.multinomial(distribution(text, temperature), 1)
        return append(text, token.item())

    text = text_box("开头", run.prompts[0], "next-text")
    temperature = gr.Slider(0, 2, 1, step=0.05, label="温度", elem_id="heat")
    bars = gr.Label(show(run.prompts[0], 1), label="最可能的 10 个词块", show_heading=False, elem_id="bars")
    gr.on([text.change, temperature.change], show, [text, temperature], bars, **QUIET)
    bars.select(pick, text, text, **QUIET)
    gr.Button("按概率抽一个", elem_id="draw").click(draw, [text, temperature], text)


def inside_tab(run):
    gr.Markdown(INSIDE)
    config = run.model().config
    limit = min(MAX_PIECES, config.n_positions)
    example = "今天天气很好，我们去图书馆看书；明天天气也很好，我们去"
    text = text_box("写点什么", example, "inside-text")
    stage = gr.Dropdown(run.captions, value=run.captions[-1], type="index", label="模型", elem_id="stage")
    with gr.Row():
        layer = number_choice("层", config.n_layer)
        head = number_choice("头", config.n_head)

    def show(text, stage, layer, head):
        ids = encode(run, text) or [run.tokenizer.eos_token_id]
        note = ""
        if len(ids) > limit:
            note = f"<p>有 {len(ids)} 个词块，太长了，只看前 {limit} 个</p>"
        ids = ids[:limit]
        attentions, guesses = look_inside(run.model(stage), ids)
        picture = heat_map(names(run, ids), attentions[layer][0, head].tolist())
        return f"{note}{picture}{guess_table(run, guesses)}"

    output = gr.HTML(show(example, -1, 0, 0), elem_id="inside")
    inputs = [text, stage, layer, head]
    gr.on([part.change for part in inputs], show, inputs, output, **QUIET)


def number_choice(label, count):
    return gr.Radio(list(range(1, count + 1)), value=1, type="index", label=label, elem_id=label)


def guess_table(run, guesses):
    """每一层之后最可能的三个词块。"""
    rows = []
    for layer, chances in enumerate(guesses):
        row = f"<th>{layer} 层之后</th>"
        for _, piece, chance in best(run, chances, 3):
            row += f"<td>{html.escape(piece)} {chance:.1%}</td>"
        rows.append(row)
    return table(rows)


# ==== 5. 主程序 ====


def build(run):
    tabs = {
        "生成": generate_tab,
        "成长": growth_tab,
        "训练中": training_tab,
        "分词": tokenizer_tab,
        "下一个词": next_token_tab,
        "里面": inside_tab,
    }
    if not run.folders:
        tabs = {"训练中": training_tab}
    elif len(run.snapshots) < 2:
        del tabs["成长"]
    introduction = "还没有模型。留下第一份快照以后，重新启动网页，就有另外几页。"
    if run.folders:
        size = f"{run.model().num_parameters():,} 个参数，从零训练"
        introduction = f"{size}（{run.captions[-1]}）。它学的是怎样接着写，写的不一定是真的。"
    with gr.Blocks(title="中文 GPT-2", analytics_enabled=False) as page:
        gr.Markdown(f"# 中文 GPT-2\n{introduction}")
        for name, tab in tabs.items():
            with gr.Tab(name):
                tab(run)
    # 每件事同时最多做两份，其余排队，最多 60 人：Space 免费的机器是 2 核
    return page.queue(max_size=60, default_concurrency_limit=2, api_open=False)


def main():
    parser = argparse.ArgumentParser()
    model = os.environ.get("MODEL_ID", str(HOME))
    parser.add_argument("--model", default=model, help="文件夹，或 Hub 上的 名字/仓库；默认 %(default)s")
    args = parser.parse_args()
    try:
        page = build(Run(args.model))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        sys.exit(f"错误：读不出模型 {args.model}（{reason}）；先训练，或用 --model 指定")
    page.launch(ssr_mode=False, footer_links=[], css=STYLE)


if __name__ == "__main__":
    main()
