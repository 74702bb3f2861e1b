"""Sample calls of rules/matmul.py.
Must not know how the ops are split.
"""

import torch

from autopar.rules.samples import Sample, T

F = "torch.nn.functional."


def single(x: torch.Tensor) -> torch.Tensor:
    """Small whole numbers: float32 computes with them exactly. Grouped products take no float64."""
    return (2 * x).round().float()


OFFSETS = torch.tensor([4, 8, 10, 16], dtype=torch.int32)

GROUPED = [
    Sample("torch._grouped_mm", T(16, 32, values=single), T(4, 32, 16, values=single), offs=OFFSETS, splits="k n"),
    Sample("torch._grouped_mm", T(4, 8, 32, values=single), T(4, 32, 16, values=single), splits="g m k n"),
    Sample(F + "grouped_mm", T(16, 16, values=single), T(4, 16, 32, values=single), offs=OFFSETS, splits="k n"),
]

SAMPLES = [
    Sample(F + "linear", T(8, 12, 16), T(4, 16), splits="*0 *1 k n"),
    Sample(F + "linear", T(8, 12, 16), T(4, 16), T(4), splits="*0 *1 k n"),
    Sample(F + "linear", bias=T(4), weight=T(4, 16), input=T(8, 16), splits="n k *0"),
    Sample(F + "linear", T(16), T(4, 16), splits="k n"),
    Sample(F + "linear", T(8, 16), T(16), splits="*0 k"),
    Sample("torch.matmul", T(8, 12), T(12, 16), splits="m k n"),
    Sample("torch.matmul", T(4, 8, 12), T(12, 16), splits="b0 m k n"),
    Sample("torch.matmul", T(4, 8, 12), T(4, 12, 16)),
    Sample("torch.matmul", T(4, 1, 8, 12), T(20, 12, 16), splits="b0 m k b1 n"),
    Sample("torch.matmul", T(1, 8, 12), T(4, 12, 16)),
    Sample("torch.matmul", T(12), T(4, 12, 16), splits="k b0 n"),
    Sample("torch.matmul", T(4, 8, 12), T(12)),
    Sample("torch.matmul", T(12), T(12), splits="k"),
    Sample("torch.Tensor.__matmul__", T(8, 12), T(12, 16)),
    Sample("operator.matmul", T(8, 12), T(12, 16)),
    Sample("torch.Tensor.__rmatmul__", T(12, 16), T(8, 12), splits="k n m"),
    Sample("torch.mm", T(8, 12), T(12, 16)),
    Sample("torch.bmm", T(4, 8, 12), T(4, 12, 16), splits="b0 m k n"),
    Sample("torch.mv", T(8, 12), T(12)),
    Sample("torch.dot", T(12), T(12), splits="k"),
    Sample("torch.vdot", T(12), T(12)),
    Sample("torch.inner", T(12), T(12)),
    Sample("torch.outer", T(8), T(12), splits="m n"),
    Sample("torch.addmm", T(16), T(8, 12), T(12, 16), splits="n m k"),
    Sample("torch.addmm", T(8, 1), T(8, 12), T(12, 16), beta=0.5, alpha=2.0),
    Sample("torch.addmm", T(8, 16), T(8, 12), T(12, 16)),
    Sample("torch.Tensor.addmm_", T(8, 16), T(8, 12), T(12, 16)),
    Sample("torch.addmv", T(8), T(8, 12), T(12)),
    Sample("torch.baddbmm", T(4, 8, 16), T(4, 8, 12), T(4, 12, 16), beta=0.5, splits="b m n k"),
    Sample("torch.baddbmm", T(1, 16), T(4, 8, 12), T(4, 12, 16)),
    Sample("torch.einsum", "bsd,hd->bsh", T(4, 8, 12), T(16, 12), splits="b s d h"),
    Sample("torch.einsum", "bhid, bhjd -> bhij", (T(4, 8, 12, 16), T(4, 8, 20, 16)), splits="b h i d j"),
    Sample("torch.einsum", "ij,jk", T(8, 12), T(12, 16), splits="i j k"),
    Sample("torch.einsum", "...d,de->...e", T(4, 8, 12), T(12, 16), splits="e0 e1 d e"),
    Sample("torch.einsum", "...ij,...jk->...ik", T(4, 8, 12), T(12, 16), splits="e0 i j k"),
    Sample("torch.einsum", "ij->", T(8, 12), splits="i j"),
    Sample("torch.einsum", "ij->i", T(8, 12)),
    Sample("torch.einsum", "ii->i", T(8, 8), splits=""),
    Sample("torch.einsum", "ii,j->ij", T(8, 8), T(12), splits="j"),
    Sample("torch.einsum", "bi,bj->bij", T(1, 8), T(4, 12), splits="i b j"),
    Sample("torch.einsum", "i,j,k->ijk", T(4), T(8), T(12), splits="i j k"),
    *GROUPED,
]
