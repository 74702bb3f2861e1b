"""The Hugging Face architectures of the zoo, built by one rule from small random configurations, labels given.
Must not know autopar: it only makes (module, inputs) pairs.
"""

from __future__ import annotations

from typing import Any

import torch

BATCH, SEQ, VOCAB = 4, 24, 512

CAUSAL = "gpt2 llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 opt gpt_neox bloom falcon mixtral olmo2 mamba".split()  # noqa: SIM905
MASKED = ["bert", "roberta", "electra", "distilbert"]
SEQ2SEQ = ["t5", "bart"]
IMAGE = ["vit", "deit", "swin", "convnext", "resnet", "dinov2", "segformer"]
OTHER = ["clip", "whisper"]
ZOO = CAUSAL + MASKED + SEQ2SEQ + IMAGE + OTHER

# One table of settings for all: each is applied where the configuration has such a field.
SETTINGS: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, d_model=64, n_embd=64, dim=64, embedding_size=64, word_embed_proj_dim=64,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, num_decoder_layers=2, encoder_layers=2, decoder_layers=2,
    num_attention_heads=8, n_head=8, n_heads=8, num_heads=8, encoder_attention_heads=8, decoder_attention_heads=8, num_key_value_heads=4,
    num_kv_heads=4, head_dim=8, d_kv=8, intermediate_size=128, ffn_dim=128, d_ff=128, hidden_dim=128, encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    max_position_embeddings=64, n_positions=64, max_source_positions=24, max_target_positions=64, num_mel_bins=16,
    num_local_experts=4, sliding_window=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    image_size=32, patch_size=8, num_labels=12, state_size=8, time_step_rank=8,
)  # fmt: skip
# Families whose stages have lists of sizes instead of one.
STAGED: dict[str, dict[str, Any]] = dict(
    swin=dict(embed_dim=32, depths=[2, 2], num_heads=[4, 8], window_size=2, patch_size=4),
    convnext=dict(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, patch_size=4),
    resnet=dict(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2]),
    segformer=dict(hidden_sizes=[16, 32], depths=[2, 2], num_encoder_blocks=2, num_attention_heads=[4, 8], sr_ratios=[2, 1],
                   patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[4, 4], decoder_hidden_size=32),
)  # fmt: skip


def config(name: str, **overrides: Any) -> Any:
    """A small configuration of an architecture: SETTINGS where the field exists, then the family's lists."""
    from transformers import AutoConfig

    base = AutoConfig.for_model(name)
    if name == "clip":
        small = {k: v for k, v in SETTINGS.items() if k not in ("eos_token_id", "pad_token_id", "bos_token_id")}
        parts = {}
        for part in ("text_config", "vision_config"):
            parts[part] = {k: v for k, v in small.items() if hasattr(getattr(base, part), k)}
        parts["text_config"]["eos_token_id"] = VOCAB - 1
        return AutoConfig.for_model(name, projection_dim=32, **parts)
    fixed = {k for k in SETTINGS if isinstance(p := getattr(type(base), k, None), property) and p.fset is None}
    fields = {k: v for k, v in SETTINGS.items() if hasattr(base, k) and k not in fixed}
    if base.is_encoder_decoder:
        fields["decoder_start_token_id"] = 1
    fields.update(STAGED.get(name, {}))
    if name in STAGED:
        fields = {k: v for k, v in fields.items() if k in STAGED[name] or k in ("image_size", "num_labels")}
    return AutoConfig.for_model(name, **{**fields, **overrides})


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(module in training mode, forward arguments with labels). Row 0 of token inputs is padded at the right."""
    import transformers as hf

    cfg = config(name, **overrides)
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed + 1)
    if name in CAUSAL:
        model = hf.AutoModelForCausalLM.from_config(cfg)
    elif name in MASKED:
        model = hf.AutoModelForMaskedLM.from_config(cfg)
    elif name in SEQ2SEQ:
        model = hf.AutoModelForSeq2SeqLM.from_config(cfg)
    elif name in IMAGE:
        model = getattr(hf, type(cfg).__name__.replace("Config", "ForImageClassification"))(cfg)
    elif name == "clip":
        model = hf.CLIPModel(cfg)
    else:
        model = hf.WhisperForConditionalGeneration(cfg)
    model = model.to(dtype).train()
    ids = torch.randint(3, VOCAB - 1, (BATCH, SEQ), generator=gen)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    pixels = torch.randn(BATCH, 3, 32, 32, generator=gen, dtype=dtype)
    if name in IMAGE:
        inputs: dict[str, Any] = dict(pixel_values=pixels, labels=torch.randint(0, 12, (BATCH,), generator=gen))
    elif name == "clip":
        ids[:, -1] = VOCAB - 1
        inputs = dict(input_ids=ids, pixel_values=pixels, return_loss=True)
    elif name == "whisper":
        inputs = dict(input_features=torch.randn(BATCH, 16, 2 * SEQ, generator=gen, dtype=dtype), labels=labels)
    else:
        inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
        if name == "mamba":
            del inputs["attention_mask"]
    if name in CAUSAL + SEQ2SEQ + ["whisper"]:
        inputs["use_cache"] = False
    return model, inputs
