"""模型的网页：续写，看它怎样一步步长大，看分词，看下一个词是怎么选出来的。

    pip install -r space/requirements.txt
    python space/app.py --model gpt2-chinese/final_model       # 然后用浏览器打开它打印的地址

--model 是工作目录、其中的 final_model/，或 Hub 上的 名字/仓库。作为 Space 运行时没有参数，模型取自环境变量 MODEL_ID。
模型在本机时不用网络；输入和续写都当文本显示，不当 HTML。
"""

import argparse
import codecs
import json
import math
import os
import sys
import threading
import time
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path

import gradio as gr
import torch
import transformers
from huggingface_hub import snapshot_download

MAX_CHARACTERS = 2000        # 开头最长多少字：再长，分词和网页都慢
MAX_NEW_TOKENS = 400
TIME_LIMIT = 60              # 一次续写最多多少秒：别人在排队
EXAMPLES = ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"]

# 要算模型的事同时最多做两件，其余排队：Space 免费的机器是 2 核。不算模型的不用等
MODEL = {"concurrency_id": "model", "concurrency_limit": 2, "show_progress": "minimal"}
LATEST = MODEL | {"trigger_mode": "always_last"}             # 正忙时又变了：只做最后那次
QUICK = {"concurrency_limit": None, "show_progress": "hidden", "trigger_mode": "always_last"}


# ==== 1. 模型 ====

class Run:
    """一次训练留下的东西：最终模型、分词器、快照、日志。快照的权重用到了才读。"""

    def __init__(self, name):
        self.name, self.lock, root = name, threading.Lock(), Path(name).resolve()
        if not root.is_dir():
            root = Path(snapshot_download(name, allow_patterns=["*.json", "*.jsonl", "model.safetensors"]))
        home = root if (root / "snapshots").is_dir() else root.parent
        notes = [json.loads(note.read_text(encoding="utf-8")) | {"folder": note.parent}
                 for note in home.glob("snapshots/step-*[0-9]/snapshot.json")]
        self.snapshots = sorted(notes, key=lambda note: note["step"])
        final = root / "final_model" if (root / "final_model").is_dir() else root
        trained = (final / "model.safetensors").exists() or not self.snapshots
        self.folder = final if trained else self.snapshots[-1]["folder"]          # 还没训练完：最新的快照
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(final if trained else root / "tokenizer")
        log = home / "train_log.jsonl"
        self.log = [json.loads(line) for line in log.open(encoding="utf-8")] if log.exists() else []

    def model(self, index=None):
        """最终模型，或第 index 个快照。"""
        folder = self.folder if index is None else self.snapshots[int(index)]["folder"]
        with self.lock:
            if not (folder / "model.safetensors").exists():
                snapshot_download(self.name, allow_patterns=f"snapshots/{folder.name}/*")
            return load(folder)


@lru_cache(maxsize=4)        # 82 M 参数的每个 0.33 GB
def load(folder):
    """fp32：快照存成 bf16 是为了省地方，多数 CPU 算 bf16 慢得多。"""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


# ==== 2. 续写 ====

def encode(run, prompt):
    """文字的词块编号；太长的说一句话就停。"""
    if len(prompt) > MAX_CHARACTERS:
        raise gr.Error(f"最多 {MAX_CHARACTERS:,} 字，现在是 {len(prompt):,} 字", print_exception=False)
    return run.tokenizer.encode(prompt.encode("utf-8", "replace").decode(), add_special_tokens=False)


def piece_bytes(run, token):
    """一个词块的字节：生僻字由几个字节词块（如 <0xE4>）拼成，其余词块就是它的文字。"""
    piece = run.tokenizer.convert_ids_to_tokens(token)
    text = run.tokenizer.decode([token], skip_special_tokens=True)
    return bytes.fromhex(piece[3:5]) if piece.startswith("<0x") else text.encode()


@torch.inference_mode()
def forward(model, ids, cache):
    """ids 之后下一个词块的分数 (V,)。cache 存着前文的 K、V：每步只要算新的一个词块。"""
    output = model(torch.tensor([ids], device=model.device), cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1].cpu()


def probabilities(scores, ids, temperature, top_k, top_p, penalty):
    """分数变成概率 (V,)：罚出现过的，除以温度，留最可能的 top_k 个，再留累计到 top_p 的，归一。"""
    rules = transformers.LogitsProcessorList([
        transformers.RepetitionPenaltyLogitsProcessor(float(penalty)),
        transformers.TemperatureLogitsWarper(max(float(temperature), 0.01)),
        transformers.TopKLogitsWarper(int(top_k) if temperature else 1),          # 温度 0：只留最可能的
        transformers.TopPLogitsWarper(float(top_p)),
    ])
    return rules(torch.tensor([ids]), scores[None])[0].softmax(-1)


def write(run, model, prompt, temperature, top_k, top_p, penalty, max_new_tokens, seed):
    """逐个词块续写，给出 (全文，说明)；没有开头就另起一篇。随机数各用各的：两个人同时用，互不影响。"""
    ids, context = encode(run, prompt) or [run.tokenizer.eos_token_id], model.config.n_positions
    random = torch.Generator().manual_seed(int(seed or 0))
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")          # 半个字先不给，拼不成字的不给
    new, cache, text = ids[1 - context:], transformers.DynamicCache(), prompt
    start = time.monotonic()
    for count in range(1, int(max_new_tokens) + 1):
        scores = forward(model, new, cache)
        chances = probabilities(scores, ids, temperature, top_k, top_p, penalty)
        token = torch.multinomial(chances, 1, generator=random).item()
        ids, new = [*ids, token], [token]
        text += decoder.decode(piece_bytes(run, token))
        if cache.get_seq_length() == context:                          # 上下文用满：只留后一半，接着写
            new, cache = ids[-context // 2:], transformers.DynamicCache()
        seconds = time.monotonic() - start
        yield text, f"{count} 个词块，{seconds:.2f} 秒，种子 {int(seed or 0)}"
        if token == run.tokenizer.eos_token_id or seconds > TIME_LIMIT:
            return


# ==== 3. 标签页 ====

def settings(tokens):
    """采样的几个参数，各带一句解释。"""
    with gr.Accordion("参数", open=False):
        return [
            gr.Slider(0, 2, 0.8, step=0.05, label="温度", info="越高越敢选少见的词块；0 是每步取最可能的"),
            gr.Slider(1, 200, 50, step=1, label="top_k", info="只在最可能的几个词块里抽"),
            gr.Slider(0.05, 1, 0.9, step=0.05, label="top_p", info="只在累计概率到这么多的词块里抽"),
            gr.Slider(1, 2, 1.1, step=0.05, label="重复惩罚", info="出现过的词块不那么可能再出现；1 是不罚"),
            gr.Slider(1, MAX_NEW_TOKENS, tokens, step=1, label="长度", info=f"最多写多少个词块；到 {TIME_LIMIT} 秒也停"),
            gr.Number(42, precision=0, minimum=0, maximum=2**53, label="种子", info="同样的种子，同样的续写"),
        ]


def generate_tab(run):
    prompt = gr.Textbox(EXAMPLES[0], label="开头", lines=2, max_lines=6, elem_id="prompt")
    gr.Examples(EXAMPLES, prompt, label="例子")
    with gr.Row():
        start = gr.Button("续写", variant="primary", elem_id="start", min_width=80)
        stop = gr.Button("停", elem_id="stop", min_width=80)
    output = gr.Textbox(label="续写", lines=8, buttons=["copy"], elem_id="output")
    note = gr.Markdown(elem_id="note")
    controls = settings(200)
    event = start.click(partial(write, run, run.model()), [prompt, *controls], [output, note], **MODEL)
    stop.click(None, cancels=event, queue=False)


def growth_tab(run):
    last = len(run.snapshots) - 1
    gr.Markdown("同一个开头、同一个种子，训练到不同的步数。拖动滑块，看乱码怎样变成句子。")
    prompt = gr.Textbox(EXAMPLES[0], label="开头", max_lines=3, elem_id="growth-prompt")
    both = gr.Button("两边都写", variant="primary", elem_id="both")
    controls = settings(60)
    chart = gr.HTML(curve(run, 0, last), elem_id="curve")

    def one(index, prompt, *values):
        for text, _ in write(run, run.model(index), prompt, *values):
            yield gr.Textbox(text, label=caption(run, index))

    def two(left, right, prompt, *values):
        for pair in zip_longest(one(left, prompt, *values), one(right, prompt, *values)):
            yield [text or gr.skip() for text in pair]

    sliders, outputs = [], []
    with gr.Row():
        for side, index in (("左", 0), ("右", last)):
            with gr.Column(min_width=280):
                slider = gr.Slider(0, last, index, step=1, label=f"{side}：第几个快照", elem_id=f"slider-{side}")
                output = gr.Textbox(label=caption(run, index), lines=5, elem_id=f"growth-{side}")
            slider.change(one, [slider, prompt, *controls], output, **LATEST)
            sliders, outputs = [*sliders, slider], [*outputs, output]
    gr.on([slider.change for slider in sliders], partial(curve, run), sliders, chart, **QUICK)
    both.click(two, [*sliders, prompt, *controls], outputs, **MODEL)


def caption(run, index):
    """快照的步数和当时的验证损失。"""
    note = run.snapshots[int(index)]
    loss = note["eval_loss"] and f"，最近一次验证损失 {note['eval_loss']:.2f}，每字比特 {note['eval_bits_per_char']:.2f}"
    return f"第 {note['step']:,} 步{loss or ''}"


def curve(run, left, right):
    """损失曲线（SVG，只填数字）和左右两个快照的位置。横轴是 log(1 + 步数)，与快照的间隔相称。"""
    train = [(row["step"], row["loss"]) for row in run.log if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in run.log if "eval_loss" in row]
    steps, losses = zip(*(train + held_out or [(1, 0)]), strict=True)
    low, high, last = min(losses) - 0.2, max(losses) + 0.2, max(*steps, run.snapshots[-1]["step"])

    def x(step):
        return round(40 + 420 * math.log1p(step) / math.log1p(last), 1)

    def y(loss):
        return round(20 + 180 * (high - loss) / (high - low), 1)

    parts = ['<svg viewBox="0 0 480 240" font-size="14" fill="currentColor" text-anchor="middle" '
             'style="width: 100%; max-width: 600px; margin: auto">']
    for loss in range(math.ceil(low), math.floor(high) + 1):
        at = y(loss)
        parts.append(f'<path d="M40 {at} H460" stroke="#8884"/><text x="25" y="{at + 5}">{loss}</text>')
    for step in [0, *(10**power for power in range(7) if 10**power < last / 2), last]:
        parts.append(f'<text x="{x(step)}" y="220">{step}</text>')
    path = " ".join(f"{x(step)},{y(loss)}" for step, loss in train)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#999"/>')
    parts += [f'<circle cx="{x(step)}" cy="{y(loss)}" r="4" fill="#2563eb"/>' for step, loss in held_out]
    for side, index, color in (("左", left, "#ea580c"), ("右", right, "#16a34a")):
        at = x(run.snapshots[int(index)]["step"])
        parts.append(f'<g stroke="{color}"><path d="M{at} 20 V204"/><text x="{at}" y="15">{side}</text></g>')
    return "".join([*parts, '<text x="250" y="238">步数（线：训练损失，点：验证损失）</text></svg>'])


def tokenizer_tab(run):
    gr.Markdown("模型看到的不是字，是**词块**：常见的词是一块，生僻的字拆成几个字节。后面的数字是词块的编号。")
    example = "今天天气很好，我在图书馆里读《红楼梦》，“饕餮”两个字不认识。"

    def split(text):
        ids = encode(run, text)
        names = [run.tokenizer.convert_ids_to_tokens(token) for token in ids]
        summary = f"{len(text)} 字，{len(ids)} 个词块，每块 **{len(text) / max(len(ids), 1):.2f}** 字"
        return summary, list(zip(names, map(str, ids), strict=True)), [(character, "字") for character in text]

    summary, pieces, characters = split(example)
    text = gr.Textbox(example, label="写点什么", lines=2, max_lines=6, elem_id="pieces-text")
    outputs = [gr.Markdown(summary, elem_id="pieces-count"),
               gr.HighlightedText(pieces, label="分词器切的", elem_id="pieces"),
               gr.HighlightedText(characters, label="逐字切", elem_id="characters", show_inline_category=False)]
    text.change(split, text, outputs, **QUICK)


def next_token_tab(run):
    gr.Markdown("模型给每个词块一个概率，再按概率**抽一个**。点一个候选，把它接上（`<0xE9>` 这样的单个字节接不上）；改温度，看概率怎样变。")

    def distribution(text, temperature):
        model, ids = run.model(), encode(run, text) or [run.tokenizer.eos_token_id]
        scores = forward(model, ids[1 - model.config.n_positions:], transformers.DynamicCache())
        return probabilities(scores, ids, temperature, len(scores), 1, 1)

    def show(text, temperature):
        values, best = distribution(text, temperature).topk(10)
        labels = [f"{run.tokenizer.convert_ids_to_tokens(token)}  #{token}" for token in best.tolist()]
        return dict(zip(labels, values.tolist(), strict=True))

    def append(text, token):
        return text + piece_bytes(run, token).decode("utf-8", "ignore")

    def pick(text, event: gr.SelectData):
        return append(text, int(event.value.rsplit("#", 1)[1]))

    def draw(text, temperature):
        return append(text, torch.multinomial(distribution(text, temperature), 1).item())

    text = gr.Textbox(EXAMPLES[0], label="开头", lines=2, max_lines=6, elem_id="next-text")
    temperature = gr.Slider(0, 2, 1, step=0.05, label="温度", info="低：集中在最可能的；高：接近平均", elem_id="heat")
    bars = gr.Label(show(EXAMPLES[0], 1), label="最可能的 10 个词块", show_heading=False, elem_id="bars")
    gr.on([text.change, temperature.change], show, [text, temperature], bars, **LATEST)
    bars.select(pick, text, text, **QUICK)
    gr.Button("按概率抽一个", elem_id="draw").click(draw, [text, temperature], text, **MODEL)


# ==== 4. 主程序 ====

TABS = {"生成": generate_tab, "成长": growth_tab, "分词": tokenizer_tab, "下一个词": next_token_tab}


def build(run):
    size = sum(parameter.numel() for parameter in run.model().parameters())
    with gr.Blocks(title="中文 GPT-2", analytics_enabled=False) as page:
        gr.Markdown(f"# 中文 GPT-2\n{size:,} 个参数，从零训练。它学的是怎样接着写，写的不一定是真的。")
        for name, tab in TABS.items():
            if tab != growth_tab or run.snapshots:
                with gr.Tab(name):
                    tab(run)
    return page.queue(max_size=60, api_open=False)                     # 最多 60 人排队；只给网页用


def main():
    parser = argparse.ArgumentParser(description="模型的网页", allow_abbrev=False)
    parser.add_argument("--model", default=os.environ.get("MODEL_ID", "gpt2-chinese"),
                        help="文件夹，或 Hub 上的 名字/仓库；默认 %(default)s")
    args = parser.parse_args()
    try:
        page = build(Run(args.model))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"错误：读不出模型 {args.model}（{str(error).split(chr(10))[0]}）；先训练，或用 --model 指定")
    font = ("system-ui", "Noto Sans SC", "PingFang SC", "Microsoft YaHei", "sans-serif")      # 不从网上取字体
    page.launch(share=False, ssr_mode=False, footer_links=[], theme=gr.themes.Default(font=font),
                css="#bars .bar { height: 10px }")


if __name__ == "__main__":
    main()
