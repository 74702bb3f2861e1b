"""The example policies on Hugging Face's Llama and GPT-2: what is split, and the collectives of one layer, counted.
Shapes are small, names and structure are real.
"""

import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from autopar.config import ComputeConfig
from autopar.ir.types import TABLE
from autopar.lower.lower import lower
from autopar.lower.program import Convert, Local
from autopar.pas.build import split_share
from autopar.pas.policies import mesh_policy
from autopar.trace import trace

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from fsdp import fsdp  # noqa: E402
from megatron import megatron  # noqa: E402

transformers = pytest.importorskip("transformers")
LAYER = {"llama": "LlamaDecoderLayer", "gpt2": "GPT2Block"}
LOCAL = ("ap.scaled_dot_product_attention", "ap.dropout")  # random, but each rank on its own


@cache
def graph(name):
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=256, n_embd=64, n_layer=3, n_head=8, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 256, (4, 16))
    return trace(model, {"input_ids": ids, "labels": ids})


def communication(block):
    """(forward, backward) collectives of a lowered block; local work and slices do not count."""
    quiet = {"nothing", "slice", "place", "keep_first"}
    forward, backward = Counter(), Counter()
    for s in block.body:
        assert not isinstance(s, Local) or s.fn[:3] != "ap." or s.fn in LOCAL, f"{s.fn} may communicate by itself"
        if isinstance(s, Convert):
            there, back = TABLE[s.src.kind, s.dst.kind]
            forward[there] += there not in quiet
            backward[back] += back not in quiet and block.values[s.value].grad
    return +forward, +backward


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_megatron_has_two_all_reduces_per_layer_and_direction(name, size):
    plan = megatron(graph(name), ComputeConfig(size))
    assert split_share(graph(name), plan) >= 0.99
    program = lower(graph(name), plan)
    assert list(program.blocks) == [LAYER[name], program.root]  # one class for all layers
    assert communication(program.blocks[LAYER[name]]) == ({"all_reduce": 2}, {"all_reduce": 2})


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sequence_parallelism_gathers_and_scatters_instead(name, size):
    plan = megatron(graph(name), ComputeConfig(size), sequence=True)
    assert split_share(graph(name), plan) >= 0.99
    layer = lower(graph(name), plan).blocks[LAYER[name]]
    both = {"all_gather": 2, "reduce_scatter": 2}
    assert communication(layer) == (both, both)
    assert [str(layer.values[v].type[0]) for v in layer.outputs] == ["S(1)"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fsdp_places_every_parameter_sharded(name):
    program = lower(graph(name), fsdp(graph(name), ComputeConfig(4)))
    assert {str(p.type[0]) for p in program.placements if graph(name).tensor(p.name).kind == "param"} == {"S(0)"}
    layer = program.blocks[LAYER[name]]
    forward, backward = communication(layer)
    assert forward == {"all_gather": len(layer.params)} and backward == {"reduce_scatter": len(layer.params)}
    assert split_share(graph(name), program.plan) == 1.0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_megatron_with_data_parallelism_on_a_mesh(name):
    plan = mesh_policy({"dp": (2, "data"), "tp": (4, megatron)})(graph(name), ComputeConfig(8))
    assert split_share(graph(name), plan) == 1.0
    assert communication(lower(graph(name), plan).blocks[LAYER[name]]) == ({"all_reduce": 2}, {"all_reduce": 2})


@pytest.mark.parametrize("policy", [megatron, partial(megatron, sequence=True), fsdp])
def test_one_device(policy):
    program = lower(graph("llama"), policy(graph("llama"), ComputeConfig(1)))
    assert sum(isinstance(s, Convert) for b in program.blocks.values() for s in b.body) >= 0


def test_megatron_is_short():
    assert len((EXAMPLES / "megatron.py").read_text().splitlines()) <= 40
