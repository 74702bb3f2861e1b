"""Ops that are known and (almost) never split: their result depends on all entries. Recurrent nets and transforms split their batch.
Must not hold ops that a closer look could split: those are replicated as unknown, and reported.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import refs
from autopar.rules.case import Case, NoRule
from autopar.rules.recipe import Recipe
from autopar.rules.registry import rule
from autopar.rules.terms import term

UNSPLIT = """
bincount histc histogram nonzero argwhere masked_select masked_scatter unique unique_consecutive unique_dim index_put
cartesian_prod combinations cov corrcoef as_strided take put embedding_bag block_diag trace
fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift fft_fftfreq fft_rfftfreq
stft istft hann_window hamming_window bartlett_window blackman_window kaiser_window equal allclose is_nonzero vander trapezoid
lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell segment_reduce renorm quantile nanquantile linalg_matrix_rank linalg_lstsq
""".split()  # noqa: SIM905


@rule(*UNSPLIT)
def unsplit(c: Case) -> Recipe:
    return c.unsplit()


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(c: Case) -> Recipe:
    """(input, hidden, weights, has_bias, layers, dropout, training, bidirectional, batch_first): the batch splits."""
    args = c.op.args
    if c.op.kwargs or len(args) != 9 or not isinstance(args[3], bool) or not isinstance(args[8], bool):
        return replace(c.unsplit(), random=True)  # a packed sequence
    first = args[8]
    count = len(list(refs(args[1])))
    x, out = c.inputs[0].shape, c.outputs[0].shape
    if len(x) != 3 or len(out) != 3 or len(c.outputs) != 1 + count:
        raise NoRule("a recurrent net of another form")
    at = 0 if first else 1

    def line(shape: tuple[int, ...], prefix: str, batch: int) -> str:
        return term(shape, prefix, kept=[i for i in range(3) if i != batch], names={batch: "b"})

    terms: list[str] = [line(x, "x", at), *(line(v.shape, f"h{i}_", 1) for i, v in enumerate(c.inputs[1 : 1 + count]))]
    terms += ["?"] * (len(c.inputs) - len(terms))
    outs = [line(out, "y", at), *(line(v.shape, f"o{i}_", 1) for i, v in enumerate(c.outputs[1:]))]
    made = _by_position(c, terms, outs)
    return replace(made, random=bool(args[5]) and args[6] is not False)


def _by_position(c: Case, terms: list[str], outs: list[str]) -> Recipe:
    """A recipe of terms in the order of the op's tensors, for calls whose arguments have no names."""
    from autopar.rules.notation import combine

    bound = combine(tuple(terms), tuple(outs)).bind([v.shape for v in c.inputs], [v.shape for v in c.outputs])
    return Recipe(bound.inputs, bound.outputs, bound.factors)


@rule(
    "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft",
    args="input, n=None, dim=-1, norm=None",
)  # fmt: skip
def transform(c: Case) -> Recipe:
    x, out, dim = c.inputs[0].shape, c.outputs[0].shape, c.dim("dim")
    names = term(x, kept=[dim])
    result = names.split()
    result[dim] = "1" if out[dim] == 1 else "f^"
    return c.make({"input": names}, " ".join(result))


@rule("linalg_solve_triangular", "triangular_solve", args="input|self|A, B, ...")
def solve_triangular(c: Case) -> Recipe:
    a, b = c.tensor("input").shape, c.tensor("B").shape
    if c.name != "linalg_solve_triangular" or c.op.kwargs.get("left", True) is not True or a[:-2] != b[:-2] or len(a) != len(b):
        return c.unsplit()
    lead = " ".join("1" if n == 1 else f"b{i}" for i, n in enumerate(a[:-2]))
    n, k = "1" if a[-1] == 1 else "n^", "1" if b[-1] == 1 else "k"
    return c.make({"input": f"{lead} {n} {n}", "B": f"{lead} {n} {k}"}, f"{lead} {n} {k}", linear=[("B",)])


@rule(
    "linalg_inv", "inverse", "linalg_det", "det", "logdet", "linalg_cholesky", "cholesky", "linalg_matrix_exp", "matrix_exp",
    args="input|self|A, ...",
)  # fmt: skip
def matrices(c: Case) -> Recipe:
    x, out = c.inputs[0].shape, c.outputs[0].shape
    lead = " ".join("1" if n == 1 else f"b{i}" for i, n in enumerate(x[:-2]))
    tail = " ".join("1" if n == 1 else "n^" for n in x[-2:])
    return c.make({"input": f"{lead} {tail}"}, f"{lead} {tail}" if len(out) == len(x) else lead)
