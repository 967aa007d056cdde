"""诗的样子是什么时候学会的：每个快照照验证集里的标题写 300 首，数句长、押韵、平仄……，与那 300 首真诗并排。

    python a100_train.py --preset poem --corpus poems=chinese-poetry
    python benchmarks/poem_form.py --work_dir gpt2-chinese     # 写 results/poem/form.json、form.md、form.png

只给标题（和它后面的换行），写到 </s> 或上下文写满；采样与训练途中的续写相同（温度 0.8，top_p 0.95），三个种子各写 100 首。
拼音来自 pypinyin，是今音：古诗按古音押韵、分平仄，入声今天已经读不出来，所以真诗也不到 100 %。真诗的那个数是尺子；
另一头是把真诗的字打乱（标点不动）以后的数，碰巧能有多少。
"""

import argparse
import functools
import json
import math
import random
import re
import sys
from itertools import chain, pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from common import ROOT, provenance, write_atomic
from pypinyin import Style, pinyin
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(ROOT))
from plot_loss import use_chinese_font

EOS = 3
SEEDS = (1, 2, 3)
LONGEST_TITLE = 20  # 标题长的多半是小序，留给诗的位置不够
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "eos_token_id": EOS, "pad_token_id": 0}
HAN = "[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff〇]"


# ==== 1. 读一首诗 ====


def split_verses(text):
    """一篇（标题，换行，正文）的正文分成句，只留汉字：“明月，\\n青天。” 是 ["明月", "青天"]。"""
    body = text.partition("\n")[2]
    return re.findall(f"{HAN}+", body)


def complete_verses(text, finished):
    """没有写完的诗，最后一句可能只有半句，不算。"""
    verses = split_verses(text)
    ends_in_a_mark = not re.search(f"{HAN}$", text)
    if finished or ends_in_a_mark:
        return verses
    return verses[:-1]


# 十三辙：今音里能互相押韵的韵母。介音（i、u、ü）不影响押韵，所以 ian 和 an 在一起。ü 写作 v
THIRTEEN_RHYMES = [
    "a ia ua",
    "o e uo",
    "ie ve",
    "i er v",
    "u",
    "ai uai",
    "ei uei",
    "ao iao",
    "ou iou",
    "an ian uan van",
    "en in uen vn",
    "ang iang uang",
    "eng ing ueng ong iong",
]
RHYME_OF = {}
for group in THIRTEEN_RHYMES:
    finals = group.split()
    RHYME_OF |= dict.fromkeys(finals, finals[0])


@functools.cache
def sound(character):
    """一个字的 (韵，平仄)：今音一、二声是平，三、四声是仄。读不出来的，是 (None, None)。"""
    readings = pinyin(character, style=Style.FINALS_TONE3, strict=True, errors="ignore")
    if not readings:
        return None, None
    final = readings[0][0]
    rhyme = RHYME_OF.get(final.rstrip("1234"))
    if final[-1:] in ("1", "2"):
        return rhyme, "平"
    if final[-1:] in ("3", "4"):
        return rhyme, "仄"
    return rhyme, None  # 轻声


# ==== 2. 数什么：每个函数读一首诗的各句，返回一串“是不是”，所有的诗合在一起算几成 ====


def equal_lengths(verses):
    lengths = set(map(len, verses))
    return [lengths in ({5}, {7}) and len(verses) > 1]


def even_count(verses):
    return [len(verses) > 0 and len(verses) % 2 == 0]


def rhymes(verses):
    """相邻的两个偶数句，末字是不是押韵（同一个字不算押韵）。绝句看一处，律诗看三处。"""
    endings = [verse[-1] for verse in verses[1::2]]
    found = []
    for first, second in pairwise(endings):
        rhyme = sound(first)[0]
        found.append(first != second and rhyme is not None and rhyme == sound(second)[0])
    return found


def tones(verses):
    """一联两句：各句第二、四字平仄相反，上下句又相反，例如 仄平 对 平仄。碰巧是八分之一。"""
    found = []
    for upper, lower in zip(verses[::2], verses[1::2], strict=False):
        if min(len(upper), len(lower)) >= 4:
            places = (upper[1], upper[3], lower[1], lower[3])
            pattern = [sound(character)[1] for character in places]
            found.append(pattern in (["平", "仄", "仄", "平"], ["仄", "平", "平", "仄"]))
    return found


def repeats(verses):
    """每个字，在这首诗里前面是不是已经有了。"""
    characters = "".join(verses)
    return [character in characters[:place] for place, character in enumerate(characters)]


def recited(verses, training_verses):
    """每一句（至少五个字），是不是一字不差就在训练文本里。"""
    return [verse in training_verses for verse in verses if len(verse) >= 5]


def distinct_2(poems):
    """所有的诗合在一起，相邻两个字有几成是不同的（Li 等，2016）：越低，越是翻来覆去那几个词。"""
    pairs = []
    for verses in poems:
        for verse in verses:
            pairs += pairwise(verse)
    return len(set(pairs)) / len(pairs) if pairs else None


def share(found):
    return round(sum(found) / len(found), 4) if found else None


def share_of_all(measure, poems):
    """各首诗的“是不是”接在一起，算几成。"""
    return share(list(chain.from_iterable(map(measure, poems))))


def figures(poems, training_verses, finished=()):
    """poems 是各首诗的句的列表；finished 是每首写完了没有。返回 {名字: 几成}，没有可数的是 None。"""
    pairs = distinct_2(poems)
    return {
        "equal_lengths": share_of_all(equal_lengths, poems),
        "even_count": share_of_all(even_count, poems),
        "finished": share(finished),
        "rhymes": share_of_all(rhymes, poems),
        "tones": share_of_all(tones, poems),
        "repeats": share_of_all(repeats, poems),
        "recited": share_of_all(lambda verses: recited(verses, training_verses), poems),
        "distinct_2": None if pairs is None else round(pairs, 4),
    }


def shuffle_characters(verses, generator):
    """一首诗的字打乱，各句还是原来那么长：碰巧能押多少韵、合多少平仄。"""
    characters = list("".join(verses))
    generator.shuffle(characters)
    shuffled = []
    start = 0
    for verse in verses:
        shuffled.append("".join(characters[start : start + len(verse)]))
        start += len(verse)
    return shuffled


# ==== 3. 真诗 ====


def read_texts(corpus, split):
    for path in sorted(corpus.glob(f"{split}-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(2000, columns=["text"]):
            yield from batch["text"].to_pylist()


def choose_poems(texts, tokenizer, context, limit):
    """验证集里开头的 limit 首：标题不太长，整首放得进上下文，至少两句。"""
    chosen = []
    for text in texts:
        title = text.partition("\n")[0]
        short = (
            len(title) <= LONGEST_TITLE and len(tokenizer.encode(text, add_special_tokens=False)) < context
        )
        if short and len(split_verses(text)) > 1:
            chosen.append(text)
        if len(chosen) == limit:
            break
    return chosen


def find_in_training(corpus, wanted):
    """wanted 里的句，哪些在训练文本里。把训练文本读一遍，不必都装进内存。"""
    found = set()
    for text in read_texts(corpus, "train"):
        found.update(wanted.intersection(split_verses(text)))
    return found


# ==== 4. 每个汉字的损失 ====


@torch.no_grad()
def token_losses(model, ids):
    """一篇的每个 token 和最后的 </s> 的损失（nat）。比上下文长的，一段一段地算，各段只看得见自己。"""
    sequence = torch.tensor([EOS, *ids, EOS], device=model.device)
    context = model.config.n_positions
    losses = []
    for start in range(0, len(sequence) - 1, context):
        window = sequence[start : start + context + 1]
        logits = model(window[None, :-1]).logits[0]
        losses += F.cross_entropy(logits.float(), window[1:], reduction="none").tolist()
    return losses


def is_body_han(pieces):
    """每个词块是不是正文里的汉字。词表里没有的字写成几个字节词块，也是；换行（<0x0A>）和标点不是。"""
    answers = []
    in_body = False
    for piece in pieces:
        byte_of_a_character = re.fullmatch("<0x[89A-F][0-9A-F]>", piece)
        answers.append(in_body and bool(byte_of_a_character or re.fullmatch(f"{HAN}+", piece)))
        in_body = in_body or piece == "<0x0A>"
    return answers


def nats_per_character(model, tokenizer, texts):
    """三种算法的损失（nat），各首单独算，前面是 </s>：

    all：全部 token（标题、标点、换行、</s>），除以全部字符数；body_han：只算正文的汉字，除以正文的汉字数；
    tagged：全部 token，除以不算换行的字符数加 3。有的项目把一首写成 <标题|正文>，每首多三个记号而没有换行，这个才能与它比。
    """
    total = 0.0
    characters = 0
    tagged = 0
    han_total = 0.0
    han_characters = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        losses = token_losses(model, ids)
        total += sum(losses)
        characters += len(text)
        tagged += len(text.replace("\n", "")) + 3
        counted = is_body_han(tokenizer.convert_ids_to_tokens(ids))
        han_total += sum(loss for loss, han in zip(losses, counted, strict=False) if han)
        han_characters += len("".join(split_verses(text)))
    return {
        "all": round(total / characters, 4),
        "body_han": round(han_total / han_characters, 4),
        "tagged": round(total / tagged, 4),
    }


# ==== 5. 写诗 ====


def write_poems(model, tokenizer, titles, seed):
    """一批标题 -> [(全文，写完了没有)]。标题长短不一，左边补齐；attention_mask 让模型看不见补的。"""
    torch.manual_seed(seed)
    prompts = tokenizer(
        [title + "\n" for title in titles],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    length = prompts["input_ids"].size(1)
    output = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=model.config.n_positions - length,
        use_cache=True,
        **SAMPLING,
    )
    poems = []
    for row in output.tolist():
        finished = EOS in row[length:]
        poems.append((tokenizer.decode(row, skip_special_tokens=True), finished))
    return poems


def write_with_seeds(model, tokenizer, titles):
    """标题分成几份，每个种子写一份。"""
    size = math.ceil(len(titles) / len(SEEDS))
    groups = [titles[start : start + size] for start in range(0, len(titles), size)]
    return [write_poems(model, tokenizer, group, seed) for group, seed in zip(groups, SEEDS, strict=False)]


def find_snapshots(work_dir):
    folders = work_dir.glob("snapshots/step-*")
    steps = {int(folder.name.removeprefix("step-")): folder for folder in folders}
    return dict(sorted(steps.items()))


def run_snapshots(work_dir, tokenizer, real):
    """每个快照：损失，和三个种子写的诗。"""
    titles = [text.partition("\n")[0] for text in real]
    runs = []
    for step, folder in find_snapshots(work_dir).items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        run = {"step": step, "parameters": model.num_parameters()}
        run["loss"] = nats_per_character(model, tokenizer, real)
        run["groups"] = write_with_seeds(model, tokenizer, titles)
        runs.append(run)
        print(f"第 {step} 步 | 每字 {run['loss']['all']:.3f} nat | {run['groups'][0][0][0]!r}", flush=True)
    return runs


# ==== 6. 结果 ====

LABELS = {  # 名字: (说明，什么的几成)
    "equal_lengths": ("句句一样长，五字或七字", "首"),
    "even_count": ("句数是双数", "首"),
    "finished": ("自己写完（有 </s>）", "首"),
    "rhymes": ("相邻的偶数句押韵", "处"),
    "tones": ("一联的第二、四字平仄相对", "联"),
    "repeats": ("一首里重复的字", "字"),
    "recited": ("与训练文本一字不差的句", "句"),
    "distinct_2": ("不同的两字组合（distinct-2）", "处"),
}


def measure(work_dir, poems):
    """读真诗，写诗，数。返回要存成 JSON 的结果。"""
    snapshots = find_snapshots(work_dir)
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "tokenizer")
    config = json.loads((snapshots[max(snapshots)] / "config.json").read_text(encoding="utf-8"))
    held_out = [text for text in read_texts(work_dir / "corpus", "eval") if split_verses(text)]
    real = choose_poems(held_out, tokenizer, config["n_positions"], poems)
    if not real:
        sys.exit(f"错误：{work_dir}/corpus 的验证集里没有诗（标题，换行，正文）；用 --preset poem 训练的才有")
    runs = run_snapshots(work_dir, tokenizer, real)

    real_verses = list(map(split_verses, real))
    generator = random.Random(0)
    shuffled = [shuffle_characters(verses, generator) for verses in real_verses]
    all_poems = real_verses + shuffled
    for run in runs:
        run["verses"] = [verses_of(group) for group in run["groups"]]
        all_poems += chain.from_iterable(run["verses"])
    known = find_in_training(work_dir / "corpus", set(chain.from_iterable(all_poems)))
    return {
        "poems": len(real),
        "parameters": runs[-1]["parameters"],
        "held_out": {"poems": len(held_out)} | last_loss(snapshots, tokenizer, held_out),
        "real": figures(real_verses, known),
        "shuffled": figures(shuffled, known),
        "snapshots": [count_snapshot(run, known) for run in runs],
    }


def last_loss(snapshots, tokenizer, held_out):
    """最后一个快照在整个验证集上的损失，长诗也在内。"""
    model = AutoModelForCausalLM.from_pretrained(snapshots[max(snapshots)], dtype=torch.float32).eval()
    return nats_per_character(model, tokenizer, held_out)


def verses_of(group):
    return [complete_verses(text, finished) for text, finished in group]


def count_snapshot(run, known):
    """一个快照的一行：三个种子合在一起的数，各个种子的数（看波动），头三首。"""
    together = list(chain.from_iterable(run["verses"]))
    finished = [done for _, done in chain.from_iterable(run["groups"])]
    return {
        "step": run["step"],
        "loss": run["loss"],
        "figures": figures(together, known, finished),
        "by_seed": [figures(poems, known) for poems in run["verses"]],
        "first_poems": [text for text, _ in run["groups"][0][:3]],
    }


def percent(value):
    return "—" if value is None else f"{value:.1%}"


def table(result):
    names = list(LABELS)
    lines = [
        "| 步 | 每字 nat | 正文每个汉字 nat | " + " | ".join(LABELS[name][0] for name in names) + " |",
        "|---:" * (len(names) + 3) + "|",
    ]
    for row in result["snapshots"]:
        numbers = " | ".join(percent(row["figures"].get(name)) for name in names)
        lines.append(
            f"| {row['step']:,} | {row['loss']['all']:.3f} | {row['loss']['body_han']:.3f} | {numbers} |"
        )
    for label, key in (("**真诗**", "real"), ("真诗，字打乱", "shuffled")):
        numbers = " | ".join(percent(result[key].get(name)) for name in names)
        lines.append(f"| {label} | | | {numbers} |")
    return lines


def report(result):
    last = result["snapshots"][-1]
    held_out = result["held_out"]
    lines = [
        "# 诗的样子是什么时候学会的",
        "",
        f"日期 {result['date']}。机器：{result['machine']}。{result['versions']}。",
        "",
        f"    {result['command']}",
        "",
        f"模型 {result['parameters']:,} 参数。每个快照照验证集里 {result['poems']} 首诗的标题各写一首（三个种子，温度 0.8，top_p "
        "0.95），与这些真诗、与字打乱了的真诗并排。每字 nat 也是在这些真诗上量的，每首单独算。",
        "",
        *table(result),
        "",
        "几成都是所有的诗合在一起算的；同一列里，首、处、联、字、句是单位："
        + "；".join(f"{label}（{unit}）" for label, unit in LABELS.values())
        + "。押韵和平仄按今音（pypinyin，十三辙），所以真诗也不到 100 %。",
        "",
        f"第 {last['step']:,} 步在整个验证集（{held_out['poems']:,} 首，长诗也在内）上：全部字符 {held_out['all']:.3f} nat，"
        f"正文的汉字 {held_out['body_han']:.3f} nat；一首写成“<标题|正文>”、不算换行时，每个记号 {held_out['tagged']:.3f} nat。",
        "",
        f"三个种子的最低到最高（第 {last['step']:,} 步）：" + "；".join(spans(last["by_seed"])) + "。",
        "",
        "![每种能力随步数](form.png)",
        "",
        "各快照写的头三首：",
        "",
    ]
    for row in result["snapshots"]:
        lines.append(f"第 {row['step']:,} 步")
        for text in row["first_poems"]:
            lines.append("- " + " / ".join(text.replace("`", "").split("\n")))
        lines.append("")
    return "\n".join(lines)


def spans(by_seed):
    texts = []
    for name in by_seed[0]:
        values = [numbers[name] for numbers in by_seed if numbers[name] is not None]
        if values:
            texts.append(f"{LABELS[name][0]} {min(values):.1%}–{max(values):.1%}")
    return texts


# ==== 7. 图 ====

PANELS = [
    ("像不像诗（虚线：真诗）", ["equal_lengths", "even_count", "finished", "rhymes", "tones"]),
    ("有没有新意（虚线：真诗）", ["repeats", "recited", "distinct_2"]),
]


def draw(result, path):
    """三格共用一根对数的步数轴：两格能力，一格损失。第 0 步画在最左边。"""
    use_chinese_font()
    figure, axes = plt.subplots(
        3, 1, figsize=(10, 10), sharex=True, constrained_layout=True, height_ratios=[3, 2, 2]
    )
    rows = result["snapshots"]
    steps = [row["step"] for row in rows]
    for axis, (title, names) in zip(axes, PANELS, strict=False):
        for color, name in enumerate(names):
            values = [row["figures"][name] for row in rows]
            percents = [math.nan if value is None else 100 * value for value in values]
            axis.plot(steps, percents, "o-", ms=4, color=f"C{color}", label=LABELS[name][0])
            if result["real"].get(name) is not None:
                axis.axhline(100 * result["real"][name], ls="--", lw=1, color=f"C{color}")
        axis.set(title=title, ylabel="%", ylim=(-3, 103))
    axes[2].plot(steps, [row["loss"]["all"] for row in rows], "o-", ms=4, label="全部字符")
    axes[2].plot(steps, [row["loss"]["body_han"] for row in rows], "o-", ms=4, label="正文的汉字")
    axes[2].set(title="损失", ylabel="nat/字", xlabel="步（对数）")
    first = min((step for step in steps if step > 0), default=1)
    axes[2].set_xscale("symlog", linthresh=first, linscale=0.5)
    axes[2].set_xticks(steps, [f"{step:,}" for step in steps], rotation=45)
    axes[2].minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))  # 放在图外，不挡线
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="数诗的样子", allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, default=Path("gpt2-chinese"), help="训练好的工作目录")
    parser.add_argument("--poems", type=int, default=300, help="写几首；默认 300")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results" / "poem" / "form", help="结果，不带扩展名"
    )
    args = parser.parse_args()
    if not find_snapshots(args.work_dir):
        sys.exit(f"错误：{args.work_dir}/snapshots 里没有快照；先 python a100_train.py --preset poem")
    logging.disable_progress_bar()
    command = "python benchmarks/poem_form.py"
    result = provenance() | {"command": command} | measure(args.work_dir, args.poems)
    write_atomic(args.output.with_suffix(".json"), json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_atomic(args.output.with_suffix(".md"), report(result))
    draw(result, args.output.with_suffix(".png"))
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
