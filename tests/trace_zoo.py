"""Models of the tracer's sweep: the zoo of the benchmarks and further architectures, and the comparison with eager.
Must not know the tracer's insides; a recording is judged by replaying it.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from replay import replay

from autopar.trace.record import record
from autopar.trace.recording import Recording

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import models

MORE_CAUSAL = """gemma3_text starcoder2 cohere gptj qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 gpt_oss mamba2 qwen3_next rwkv granite
stablelm phi olmo nemotron glm codegen biogpt xglm helium""".split()  # noqa: SIM905
MORE_MASKED = """albert deberta-v2 modernbert xlm-roberta longformer camembert mobilebert squeezebert mpnet layoutlm roformer
nystromformer""".split()  # noqa: SIM905
MORE_SEQ2SEQ = ["mbart", "marian", "pegasus", "switch_transformers", "mt5", "blenderbot", "longt5", "bigbird_pegasus"]
MORE_IMAGE = ["beit", "mobilenet_v2", "poolformer", "pvt", "efficientnet", "vit_msn", "regnet", "mobilevit"]
MORE_AUDIO = ["wav2vec2", "hubert"]
MORE = MORE_CAUSAL + MORE_MASKED + MORE_SEQ2SEQ + MORE_IMAGE + MORE_AUDIO


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(module, forward arguments with labels) of a zoo or further architecture."""
    import transformers as hf

    if name in models.ZOO:
        module, given = models.build(name)
        return module, given | ({"use_cache": False} if name == "mamba" else {})
    torch.manual_seed(0)
    small: dict[str, Any] = {}
    if name in ("gptj", "codegen"):
        small = dict(rotary_dim=4)
    if name == "qwen3_moe":
        small = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    if name == "mamba2":
        small = dict(hidden_size=64, num_heads=8, head_dim=16, expand=2, n_groups=1, state_size=8)
    if name in ("deepseek_v2", "deepseek_v3"):
        small = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, head_dim=8, num_key_value_heads=8,
                     v_head_dim=8, n_routed_experts=4,
                     n_group=1, topk_group=1,
                     num_experts_per_tok=2, first_k_dense_replace=1, moe_intermediate_size=32)  # fmt: skip
    if name == "rwkv":
        small = dict(attention_hidden_size=64)
    if name == "longformer":
        small = dict(attention_window=8)
    if name in MORE_AUDIO:
        small = dict(conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=16,
                     num_conv_pos_embedding_groups=2,
                     num_feat_extract_layers=2, vocab_size=32, mask_time_length=2)  # fmt: skip
    cfg = models.config(name, **small)
    kinds = {
        "CausalLM": MORE_CAUSAL,
        "MaskedLM": MORE_MASKED,
        "Seq2SeqLM": MORE_SEQ2SEQ,
        "ImageClassification": MORE_IMAGE,
        "CTC": MORE_AUDIO,
    }
    kind = next(k for k, names in kinds.items() if name in names)
    model = getattr(hf, f"AutoModelFor{kind}").from_config(cfg).train()
    ids = torch.randint(3, models.VOCAB - 1, (2, models.SEQ))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    inputs: dict[str, Any] = dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    if kind == "ImageClassification":
        inputs = dict(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.randint(0, 12, (2,)))
    elif kind == "CTC":
        inputs = dict(input_values=torch.randn(2, 800), labels=torch.randint(1, 30, (2, 5)))
    elif name in ("mamba2", "rwkv"):
        del inputs["attention_mask"]
    if kind in ("CausalLM", "Seq2SeqLM"):
        inputs["use_cache"] = False
    if name == "bigbird_pegasus":
        model(**inputs)  # its first call replaces its attention modules
    return model, inputs


def loss_of(out: Any) -> torch.Tensor:
    loss = out["loss"] if isinstance(out, dict) else out.loss
    assert isinstance(loss, torch.Tensor)
    return loss


def run(module: torch.nn.Module, call: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None], dict[str, torch.Tensor]]:
    """(loss, gradients, buffers) with a fixed seed."""
    torch.manual_seed(0)
    module.zero_grad()
    loss = loss_of(call())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters()}, {n: b.clone() for n, b in module.named_buffers()}


def compare(module: torch.nn.Module, given: dict[str, Any], recording: Recording) -> float:
    """The largest difference of loss, gradients and buffers between eager and the replayed recording."""
    a, b = copy.deepcopy(module), copy.deepcopy(module)
    loss, grads, buffers = run(a, lambda: a(**copy.deepcopy(given)))
    loss2, grads2, buffers2 = run(b, lambda: replay(recording, b, copy.deepcopy(given)))
    assert {n for n, g in grads.items() if g is None} == {n for n, g in grads2.items() if g is None}
    worst = float((loss - loss2).abs())
    for n, g in grads.items():
        other = grads2[n]
        if g is not None and other is not None and g.numel():
            worst = max(worst, float((g - other).abs().max()) / max(1.0, float(g.abs().max())))
    for n, v in buffers.items():
        worst = max(worst, float((v.double() - buffers2[n].double()).abs().max()) if v.numel() else 0.0)
    return worst


def exact(name: str, train: bool, strategy: str, fold: bool) -> float:
    module, given = build(name)
    module.train(train)
    return compare(module, given, record(module, given, strategy=strategy, constant_folding=fold))
