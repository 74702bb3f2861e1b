"""Flops of a step against the definition of MFU, and what Meter makes of time, tokens and data.
Shapes are small, and sizes differ from each other.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.train import metrics
from autopar.train.flops import Work, count_tokens, flops_per_token, peak_tflops, trained_flops, work_of
from autopar.train.metrics import Meter, TrainStepMetrics, ValMetrics
from tests import train_cases
from tests.procs import run_processes

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from llama import Config, Llama

BATCH, SEQ = 3, 24
LLAMA = Config(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64)


def ids(batch: int = BATCH, seq: int = SEQ) -> torch.Tensor:
    return torch.zeros(batch, seq, dtype=torch.long)


def by_hand(c: Config, seq: int = SEQ) -> float:
    """The definition for a Llama, parameter by parameter."""
    d = c.hidden // c.heads
    layer = c.hidden * d * (2 * c.heads + 2 * c.kv_heads) + 3 * c.hidden * c.ffn
    return 6.0 * (c.layers * layer + c.hidden * c.vocab) + 6.0 * c.layers * c.heads * (d + d) * seq


# -- flops


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("policy", ["dp", "tp"])
def test_llama_by_its_graph(tmp_path, policy, folded):
    config = autopar.ComputeConfig(constant_folding=folded)
    module = autopar.parallelize(Llama(LLAMA), {"ids": ids(), "labels": ids()}, policy, config, gen_savedir=tmp_path)
    work = work_of(module)
    assert work.per_token == by_hand(LLAMA) == flops_per_token(17408, 2, 4, 16, SEQ)
    assert work.per_sample == work.per_token * SEQ
    assert work.of(1000, 7) == 1000 * work.per_token and work.of(None, 7) == 7 * work.per_sample


def test_every_rank_counts_the_whole_model(tmp_path):
    def rank_main(rank: int) -> tuple[Work, int]:
        compute = autopar.ComputeConfig(plan_ngpus=2)
        module = autopar.parallelize(Llama(LLAMA), {"ids": ids(), "labels": ids()}, "tp", compute, gen_savedir=tmp_path)
        meter = Meter(module, device="cpu")
        return meter.work, meter.devices

    for work, devices in run_processes(rank_main, 2):
        assert work.per_token == by_hand(LLAMA) and devices == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_face_llama(attention):
    """Its rotary tables are a matrix product, which the definition leaves out; eager attention is two products."""
    transformers = pytest.importorskip("transformers")
    from autopar.trace import trace

    c = LLAMA
    config = transformers.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.hidden, intermediate_size=c.ffn, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    graph = trace(model, {"input_ids": ids(), "labels": ids()})
    assert trained_flops(graph) == by_hand(c) * BATCH * SEQ
    # Without a graph: the same by the formula, with heads from the configuration.
    assert work_of(model, {"input_ids": ids()}).per_token == by_hand(c)


def test_sample_of_an_end_to_end_module(tmp_path):
    """The MLP has no tokens: flops by sample. The GPT's tokens are those of its sample."""
    sample = {"x": torch.randn(5, 8), "y": torch.randn(5, 8)}
    module = autopar.parallelize(train_cases.MLP(), {"batch": sample}, "dp", {"use_end2end": True}, gen_savedir=tmp_path)
    assert work_of(module) == Work(None, 6.0 * 2 * (8 * 16 + 16 * 8))
    tokens = {"ids": ids(3, 6)}
    module = autopar.parallelize(train_cases.TinyGPT(), {"sample": tokens}, "dp", {"use_end2end": True}, gen_savedir=tmp_path)
    positions, dim, vocab = 3 * 5, 8, train_cases.VOCAB
    want = positions * flops_per_token(dim * 3 * dim + dim * dim + 2 * dim * 2 * dim + dim * vocab, 1, 2, 8, 5)
    assert work_of(module).of(count_tokens(tokens), 3) == pytest.approx(want)


def test_outside_of_parallel_modules(tmp_path):
    """The layer by its graph, the rest by its parameters; embeddings and biases are no matrix products."""
    model = train_cases.Around()
    sample = {"x": torch.randn(5, 8), "y": torch.randn(5, 8)}
    want = 6.0 * (8 * 8 + 2 * 8 * 16 + 8 * 8)
    assert work_of(model, sample) == Work(None, want)
    model.layer = autopar.parallelize(model.layer, {"x": torch.randn(3, 8)}, "dp", gen_savedir=tmp_path)
    assert work_of(model, sample) == Work(None, want)
    assert work_of(nn.Embedding(4, 8)) == Work(None, None)
    assert work_of(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 5)), ids()).per_token == 6.0 * 40


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 3060", None),
        ("cpu", None),
    ],
)
def test_peaks(name, peak):
    assert peak_tflops(name) == peak


@dataclass
class Sample:
    mask: torch.Tensor
    ids: torch.Tensor


@pytest.mark.parametrize(
    "sample, tokens",
    [
        (ids(2, 7), 14),
        ({"x": torch.zeros(4, 8), "ids": ids(3, 5), "labels": ids(9, 9)}, 15),
        ([torch.zeros(3, dtype=torch.long), (ids(2, 6).int(),)], 12),
        (Sample(torch.zeros(2, 6, dtype=torch.bool), ids(2, 6)), 12),
        ({"x": torch.zeros(4, 8), "y": torch.zeros(4, dtype=torch.long)}, None),
        (torch.zeros(2, 3, 8, 8), None),
        ("text", None),
    ],
)
def test_count_tokens(sample, tokens):
    assert count_tokens(sample) == tokens


# -- the meter


@pytest.fixture
def clock(monkeypatch):
    """time.perf_counter of the metrics, moved by hand."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now.s)
    return now


def meter(**changes: Any) -> Meter:
    made = Meter(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), device="cpu", sample=ids(2, 10))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_step(clock):
    m = meter(peak=4e-7, devices=2)
    with m.data_wait():
        clock.s += 0.25
    clock.s += 0.5
    with m.data_wait():
        clock.s += 0.25
    n = m.step(tokens=100, samples=10)
    assert (n.step_s, n.data_wait_s, n.tokens_per_s, n.samples_per_s) == (1.0, 0.5, 100.0, 10.0)
    assert n.tflops == pytest.approx(100 * 6 * (8 * 16 + 16 * 4) / 2 / 1e12)
    assert n.mfu == pytest.approx(n.tflops / 4e-7)
    assert 0.01 < n.memory_gb < 100
    clock.s += 2
    n = m.step(tokens=None, samples=10)
    assert (n.step_s, n.data_wait_s, n.tokens_per_s, n.samples_per_s) == (2.0, 0.0, None, 5.0)
    assert n.tflops == pytest.approx(10 * 10 * 6 * (8 * 16 + 16 * 4) / 2 / 2 / 1e12)


def test_restart_leaves_validation_out(clock):
    m = meter()
    with m.data_wait():
        clock.s += 50
    m.restart()
    clock.s += 1
    n = m.step(tokens=3, samples=1)
    assert (n.step_s, n.data_wait_s) == (1.0, 0.0)


def test_unknown_device_and_unknown_flops():
    m = meter(work=Work(None, None))
    n = m.step(tokens=5, samples=1)
    assert n.tflops is None and n.mfu is None and m.peak is None
    assert meter().step(tokens=5, samples=1).mfu is None
    assert meter().describe() == "1 x cpu, 0.001152 MFLOP per token"
    assert meter(peak=989.0).describe().endswith("MFU of 989 TFLOP/s, the datasheet's dense half precision")


def test_what_is_logged():
    m = TrainStepMetrics(2.5, gnorm=1.5)
    m.add(meter().step(tokens=None, samples=4))
    m.extra["accuracy"] = 0.5
    m.train_loss = 2.0  # as a hook may
    d = m.to_dict()
    names = ["train_loss", "gnorm", "step_s", "samples_per_s", "tflops", "memory_gb", "data_wait_s", "accuracy"]
    assert list(d) == names and d["train_loss"] == 2.0 and d["accuracy"] == 0.5
    assert ValMetrics(3.0).to_dict() == {"val_loss": 3.0}
    assert list(vars(m))[-1] == "extra"


def test_a_step_costs_microseconds():
    m, sample, best = meter(), {"ids": ids(8, 64), "labels": ids(8, 64)}, float("inf")
    for _ in range(20):
        start = time.process_time()
        for _ in range(50):
            with m.data_wait():
                tokens = count_tokens(sample)
            made = TrainStepMetrics(1.0, 2.0, 3.0, 4)
            made.add(m.step(tokens=tokens, samples=8))
            made.to_dict()
        best = min(best, (time.process_time() - start) / 50)
    assert best < 100e-6
