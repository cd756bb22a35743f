"""The commands and files of docs/uptraining.md, in order: from a Llama to a report."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import yaml

from headway.data import tokenizer
from headway.data.corpus.config import TrainTokenizer
from headway.model.attention.gqa import MhaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.huggingface import folder as hf
from headway.model.huggingface.llama import llama_config, llama_name

PAGE = Path(__file__).resolve().parents[2] / "docs/uptraining.md"
SHORT = ["launch.threads=1", "launch.device=cpu", "--no-timing", "--jobs", "1"]


def llama(folder: Path, texts: list[str]) -> None:
    """A Llama with multi-head attention, random weights and a tokenizer."""
    folder.mkdir()
    config = TrainTokenizer(type="train_bpe", vocab_size=300)
    tokenizer.train(config, texts, out=folder / "tokenizer.json", progress=False)
    model = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1)
    attention = MhaConfig(heads=4, head_dim=8)
    decoder = Decoder(model, attention, vocab_size=300, seed=1)
    tensors = {llama_name(name): tensor for name, tensor in decoder.state_dict().items()}
    hf.write_tensors(folder, tensors, max_shard_bytes=1 << 30)
    end = tokenizer.open_file(folder / "tokenizer.json").token_to_id("<|endoftext|>")
    written = llama_config(model, attention, vocab_size=300, seq_len=64, eos_token_id=end)
    hf.write_json(folder / "config.json", written)


def test_the_page_leads_from_a_llama_to_a_report(headway) -> None:
    part = PAGE.read_text().split("## From a Llama to a report")[1].split("\n## ")[0]
    for text in re.findall(r"```yaml\n(.*?)```", part, re.S):
        (headway.folder / text.split()[1]).write_text(text)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(400)]
    texts = [" ".join(draw.choices(words, k=300)) for _ in range(60)]
    (headway.folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (headway.folder / "texts" / f"{number}.txt").write_text(text)
    llama(headway.folder / "LLAMA", texts)
    commands = re.findall(r"^    (headway .*)$", part, re.M)
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command)[1:]
        more = SHORT if words[0] == "study" else []
        done = headway.run(*words, *more)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    losses = {}
    for how in ("mean", "align"):
        card = json.loads((headway.folder / f"converted-{how}" / "conversion.json").read_text())
        losses[how] = card["loss"]["after"] - card["loss"]["before"]
        assert card["loss"]["split"] == "validation"
    assert losses["mean"] != losses["align"]
    page = (headway.folder / "studies/uptraining/report.md").read_text()
    section = page[page.index("## Uptraining") :]
    assert re.search(r"\| gqa-align \| mha to gqa, 1 KV heads, by align \| 0 \| 0 \|", section)
    assert re.search(r"\| gqa-mean \| mha to gqa, 1 KV heads, by mean \| 0.01 \| 4,096 \|", section)
    assert "Teacher imported: loss " in section and (headway.folder / "studies/uptraining/report.html").is_file()
    assert json.loads((headway.folder / "exported/config.json").read_text())["num_key_value_heads"] == 1


def test_the_yaml_of_the_page_parses() -> None:
    found = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    assert len(found) == 4 and all(yaml.safe_load(text) for text in found)
