"""一个做好的工作目录，几秒钟造出来，不经过训练脚本：测试 generate.py、space/、publish.py 用。

分词器按 README 的配方手工拼成（Unigram、字节兜底），词表只有常用的几百个字；模型是随机的，所以续写里有很多
字节词块——正好测试拼不成字的情形。
"""

import itertools
import json
import math
import string

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
TEXT = (
    "中国的历史，人工智能是今天天气很好。在科学研究中教育的目的是培养人！？、“”《》（）我们他她你不了有这个"
)
WORDS = ["中国", "历史", "人工", "智能", "今天", "天气", "科学", "研究", "教育", "目的", "我们", "的历史"]
CONTEXT = 64
STEPS = {0: 5.9, 10: 4.2, 100: None, 200: 2.5}  # 第 100 步没有验证过


def tokenizer(vocab_size=0):
    """词块凑不满 vocab_size 时用两个字的组合补满（量速度时要和真的一样大）。"""
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    characters = TEXT + "▁\n" + string.ascii_lowercase + string.digits
    pieces += [(character, -6.0) for character in dict.fromkeys(characters)]
    pieces += [(word, -7.0) for word in WORDS]
    extra = (chr(0x4E00 + count // 200) + chr(0x6E00 + count % 200) for count in range(vocab_size))
    pieces += [(piece, -9.0) for piece in itertools.islice(extra, max(vocab_size - len(pieces), 0))]
    made = Tokenizer(Unigram(pieces, unk_id=1, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"<(?=0x[0-9A-F]{2}>|/?s>|unk>)"), "isolated")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def model(vocab_size, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": CONTEXT} | sizes
    config = GPT2Config(vocab_size=vocab_size, bos_token_id=2, eos_token_id=3, **sizes)
    made = AutoModelForCausalLM.from_config(config)
    made.generation_config = GenerationConfig(
        do_sample=True,
        max_new_tokens=CONTEXT // 2,
        use_cache=True,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    made.transformer.wte.weight.data[3] = 0  # 随机模型几乎不写文末符号：测试要它一直写下去
    return made.eval()


def steady_model(chances):
    """不看上文的模型：下一个词块的概率总是 chances（{词块: 概率}），别的几乎不写。"""
    pieces = tokenizer()
    made = model(len(pieces))
    with torch.no_grad():
        made.transformer.ln_f.weight.zero_()
        made.transformer.ln_f.bias.zero_()
        made.transformer.ln_f.bias[0] = 1  # 最后的向量总是 (1, 0, 0, …)，分数就是词向量的第一个数
        made.transformer.wte.weight.zero_()
        made.transformer.wte.weight[:, 0] = -30
        for piece, chance in chances.items():
            made.transformer.wte.weight[pieces.convert_tokens_to_ids(piece), 0] = math.log(chance)
    return made


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make(folder, vocab_size=0, **sizes):
    """在 folder 里写 final_model/、tokenizer/、snapshots/ 和各种日志；返回 folder。"""
    pieces = tokenizer(vocab_size)
    for place in ("tokenizer", "final_model"):
        pieces.save_pretrained(folder / place)
    model(len(pieces), seed=200, **sizes).save_pretrained(folder / "final_model")
    for step, loss in STEPS.items():
        snapshot = folder / "snapshots" / f"step-{step}"
        model(len(pieces), seed=step, **sizes).to(torch.bfloat16).save_pretrained(snapshot)
        write_json(
            snapshot / "snapshot.json",
            {
                "step": step,
                "eval_step": step,
                "eval_loss": loss,
                "tokens": step * 2048,
                "eval_bits_per_char": loss and loss * 1.12,
            },
        )
    write_logs(folder)
    return folder


def write_logs(folder):
    """训练、语料、分词器留下的说明，格式同真的。"""
    write_json(
        folder / "config.json",
        {
            "n_layer": 2,
            "n_embd": 32,
            "n_head": 2,
            "block_size": CONTEXT,
            "effective_batch_size": 32,
            "learning_rate": 0.016,
            "muon_learning_rate": 0.02,
            "lr_schedule": "linear",
            "weight_decay": 0.1,
            "seed": 42,
            "optim": "muon",
            "vocab_size": len(tokenizer()),
            "parameters": 49_000,
            "total_steps": 200,
            "preset": "demo",
            "characters_per_token": 1.29,
            "unigram_entropy": 5.1,
            "device_name": "CPU（测试，2 线程）",
            "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.24.0"},
            "command": "python a100_train.py --preset demo",
        },
    )
    log = [
        {
            "step": 0,
            "eval_loss": 5.9,
            "eval_bits_per_char": 6.6,
            "eval_news_loss": 5.9,
            "eval_news_bits_per_char": 6.7,
        }
    ]
    log += [
        {
            "step": step,
            "loss": 6 - step / 60,
            "learning_rate": 1e-3,
            "tokens_per_second": 900.0,
            "elapsed_seconds": step * 0.5,
        }
        for step in range(10, 210, 10)
    ]
    log += [
        {
            "step": 200,
            "eval_loss": 2.5,
            "eval_bits_per_char": 2.8,
            "eval_news_loss": 2.4,
            "eval_news_bits_per_char": 2.7,
        }
    ]
    write_jsonl(folder / "train_log.jsonl", log)
    write_jsonl(
        folder / "samples.jsonl",
        [
            {
                "step": step,
                "prompt": "中国的历史",
                "text": f"中国的历史，第 {step} 步写的 <b>一段</b>| 话。",
                "eval_loss": 5.0,
            }
            for step in (0, 200)
        ],
    )
    source = {"rows": 120, "documents": 100, "train_documents": 95, "eval_documents": 5, "characters": 9500}
    write_json(
        folder / "corpus" / "report.json",
        {
            "key": "k",
            "corpus_hash": "h",
            "sources": {"news": source},
            "files": {"train-00000.parquet": 8, "eval-00000.parquet": 8},
        },
    )
    (folder / "corpus" / "README.md").write_text(
        "| 来源 | 许可 |\n|---|---|\n| news | MIT |\n", encoding="utf-8"
    )
    for name in ("train-00000.parquet", "eval-00000.parquet"):
        (folder / "corpus" / name).write_bytes(b"PAR1PAR1")
    write_json(
        folder / "tokenizer" / "report.json",
        {
            "key": "k",
            "corpus_hash": "h",
            "vocab_size": len(tokenizer()),
            "characters_per_token": 1.29,
            "files": {},
        },
    )
