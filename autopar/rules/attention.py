"""Rules of attention as one op: batch and head dims may be split, sequence and head sizes not.
Must not know kernels or masks' meaning: a mask lines up with the scores from the right.
"""

from __future__ import annotations

from math import prod

from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Emitted, Recipe, Split
from autopar.rules.registry import rule
from autopar.rules.terms import shards

ARGS = "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False"


@rule("scaled_dot_product_attention", args=ARGS)
def attention(c: Case) -> Recipe:
    q, k, v, mask = (c.tensor(n) for n in ("query", "key", "value", "attn_mask"))
    if q is None or k is None or v is None or (mask is None and c["attn_mask"] is not None):
        raise NoRule("query, key and value must be tensors")
    out = c.outputs[0].shape
    lead = len(out) - 2
    # NB: grouped heads: query head h uses key head h // r, so the key heads are the outer factor of a query's head dim.
    grouped = bool(c["enable_gqa"]) and len(q.shape) >= 3 and q.shape[-3] != k.shape[-3]
    if grouped and (k.shape[-3] != v.shape[-3] or len({len(x.shape) for x in (q, k, v)}) != 1):
        return c.unsplit()

    def leading(shape: tuple[int, ...], heads: str) -> str:
        first = lead - (len(shape) - 2)
        names = [f"b{first + i}" for i in range(len(shape) - 2)]
        if grouped and names:
            names[-1] = heads
        return " ".join("1" if n == 1 else name for n, name in zip(shape, names, strict=False))

    queries = "(g r)" if k.shape[-3 if grouped else 0] != 1 or not grouped else "r"
    terms = {
        "query": f"{leading(q.shape, queries)} s^ d^",
        "key": f"{leading(k.shape, 'g')} t^ d^",
        "value": f"{leading(v.shape, 'g')} t^ e^",
    }
    if mask is not None:
        if len(mask.shape) < 2 or len(mask.shape) > len(out):
            return c.unsplit()
        rows, cols = ("1" if n == 1 else name for n, name in zip(mask.shape[-2:], ("s^", "t^"), strict=True))
        terms["attn_mask"] = f"{leading(mask.shape, queries)} {rows} {cols}"
    flops = 2.0 * prod(out[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    return c.make(terms, f"{leading(out, queries)} s^ e^", linear=[("value",)], random=drops(c), flops=flops, matmul=True)


def drops(c: Case) -> bool:
    return c["dropout_p"] != 0.0


@attention.local
def _(c: Case, recipe: Recipe, splits: tuple[Split, ...]) -> Emitted:
    if not drops(c):
        return c.emitted()
    return c.emitted(fn="ap.scaled_dot_product_attention", shards=shards(recipe, splits, recipe.outputs[0]))


@rule("multi_head_attention_forward")
def whole_attention(c: Case) -> Recipe:
    return c.unsplit()
