"""A small Llama of Hugging Face's on text that is on every machine: Python's own source files, cut up by a tokenizer trained on them.
Must not know that autopar exists.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM


class Llama(nn.Module):
    """LlamaForCausalLM with random weights; forward takes one batch and returns the loss first."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.lm = LlamaForCausalLM(config)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.lm(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


@cache
def texts(limit: int) -> tuple[str, ...]:
    """The standard library's .py files in name order, `limit` characters in all."""
    out: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        out.append(file.read_text(encoding="utf-8", errors="replace")[: limit - sum(map(len, out))])
        if sum(map(len, out)) >= limit:
            break
    return tuple(out)


@cache
def tokenizer(vocab: int, limit: int) -> Tokenizer:
    """Byte-pair encoding with `vocab` tokens, trained on the text itself in a few seconds."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(texts(limit), trainer)
    return made


class Tokens(Dataset):
    """Windows of `seq` tokens that do not overlap; every tenth is kept for validation."""

    def __init__(self, seq: int, vocab: int, train: bool = True, limit: int = 400_000) -> None:
        ids = [i for encoded in tokenizer(vocab, limit).encode_batch(list(texts(limit))) for i in encoded.ids]
        windows = torch.tensor(ids[: len(ids) // seq * seq]).view(-1, seq)
        self.windows = windows[(torch.arange(len(windows)) % 10 != 9) == train]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}
