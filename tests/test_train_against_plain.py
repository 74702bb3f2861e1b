"""The trainer against a hand-written loop in one process, with the same data order: losses and norms of 20 steps.
Must not know how a step is made.
"""

import pytest
import torch

from tests import train_cases as cases
from tests.procs import run_processes

STEPS = 20
# name: (processes, plan_ngpus, policy, compute settings, accumulation, samples, precision)
LAYOUTS = {
    "one": (1, 1, "dp", {}, 1, 22, None),
    "dp2": (2, 1, "dp", {}, 1, 22, None),
    "tp2": (2, 2, "tp", {}, 1, 22, None),
    "tp2 x 2, ZeRO": (4, 2, "tp", {"use_zero": True}, 1, 24, None),
    "dp2, ZeRO-3, accumulation": (2, 1, "dp", {"use_zero": 3}, 2, 22, None),
    "accumulation 3, short last window": (1, 1, "dp", {}, 3, 22, None),
    "dp2, accumulation 3, short last window": (2, 1, "dp", {"use_async_reducer": True}, 3, 18, None),
    "tp2, bf16": (2, 2, "tp", {}, 1, 22, "bf16"),
    "dp2, bf16, accumulation": (2, 1, "dp", {}, 3, 18, "bf16"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_of_20_steps(name, tmp_path):
    n, plan, policy, compute, accumulation, size, precision = LAYOUTS[name]
    args = cases.shared_args(
        tmp_path,
        compute_config={"plan_ngpus": plan, "runtime_ngpus": n, **compute},
        pas_policy=policy,
        model={"type": cases.TinyGPT},
        optimizer={"type": "torch.optim.AdamW", "args": {"lr": 0.01}, "clip_gnorm": 1.5},
        dataset={"type": cases.ByteDataset, "train_args": {"size": size}},
        dataset_sampler={"train_args": {"shuffle": True}},
        grad_accumulation_steps=accumulation,
        precision=precision,
        max_epochs=None,
        max_train_steps=STEPS,
    )

    def rank_main(rank):
        _, seen = cases.train(args)
        return seen.losses, seen.norms, seen.counts

    got = run_processes(rank_main, n)
    assert all(g == got[0] for g in got[1:]), "all ranks report the same numbers"

    torch.manual_seed(7)
    model = cases.TinyGPT(dim=8)
    if precision:
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, norms = cases.train_plain(
        model, optimizer, cases.ByteDataset(size), steps=STEPS, units=n // plan, accumulation=accumulation, shuffle=True, clip=1.5
    )
    tol = 2e-2 if precision else 1e-5
    print(f"{name}: losses of {STEPS} steps differ by {max(abs(a - b) for a, b in zip(got[0][0], losses, strict=True)):.1e} at most")
    torch.testing.assert_close(torch.tensor(got[0][0]), torch.tensor(losses), rtol=0, atol=tol)
    torch.testing.assert_close(torch.tensor(got[0][1]), torch.tensor(norms), rtol=tol if not precision else 0.1, atol=tol)
    assert losses[-1] < losses[0] - 0.1, "it learns"
    if accumulation == 3:
        assert len(set(got[0][2])) > 1, "the last window of an epoch is shorter"
