"""Resuming in the middle of an epoch repeats and skips nothing, with every kind of loader; and windows and positions by themselves.
Must not know how checkpoints are written.
"""

import random

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

import autopar
from autopar.train.data import Feed, Window, checksum, example
from autopar.train.state import TrainStatus, randomness_kept
from tests import train_cases as cases
from tests.procs import run_processes


def shuffling(dataset, num_replicas, rank):
    """A sampler that draws its order from torch's default generator: it has no set_epoch, and no seed."""
    return RandomSampler(dataset)


class Drawing(cases.Noisy):
    """Draws from torch and from Python for every sample."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return {**sample, "y": sample["y"] + random.random()}


SHUFFLED = {"dataset_sampler": {"train_args": {"shuffle": True}}}
LOADERS = {
    "a loader of torch": SHUFFLED,
    "with a state": {**SHUFFLED, "dataloader": {"type": cases.StatefulLoader}},
    "random numbers in the data": {**SHUFFLED, "dataset": {"type": Drawing}},
    "random numbers in workers": {**SHUFFLED, "dataset": {"type": Drawing}, "dataloader": {"train_args": {"num_workers": 1}}},
    "an order drawn when the epoch begins": {"dataset_sampler": {"type": shuffling, "train_args": {}}},
    "a stream without a length": {"dataset": {"type": cases.Stream, "train_args": {"size": 20}}},
}
SCHEDULE = {"lr_scheduler": {"type": "torch.optim.lr_scheduler.StepLR", "args": {"step_size": 1, "gamma": 0.5}}}


def losses_of(args, **changes):
    _, seen = cases.train(cases.merged(args, changes))
    return seen.losses, seen.lrs


@pytest.mark.parametrize("loader", LOADERS)
def test_resume_bitwise(tmp_path, loader):
    """Epochs of 4 steps (10 micro batches in windows of 3): resumed inside of one, at the end of one, and before its last, short step."""
    base = cases.shared_args(tmp_path, model={"args": {"dropout": 0.2}}, grad_accumulation_steps=3, max_epochs=3, **SCHEDULE)
    args = cases.merged({**base, "dataset_sampler": {}}, LOADERS[loader])
    whole = losses_of(args)
    assert len(whole[0]) == 12 and len(set(whole[1])) == 3
    for first in (5, 8, 7) if "worker" not in loader else (6,):
        checkpoint = {"no_save": False, "resume_from": "last", "save_dir": str(tmp_path / str(first))}
        begun = losses_of(args, max_train_steps=first, checkpoint=checkpoint)
        gone_on = losses_of(args, checkpoint=checkpoint)
        assert begun[0] + gone_on[0] == whole[0], f"after {first}"
        assert begun[1] + gone_on[1] == whole[1], f"learning rates after {first}"


def test_saving_every_step_changes_nothing(tmp_path):
    """Nothing is read ahead of a save, and the losses are the same."""
    args = cases.merged(cases.shared_args(tmp_path, model={"args": {"dropout": 0.2}}), LOADERS["random numbers in the data"])
    saving = {
        "checkpoint": {"no_save": False, "every_n_train_steps": 1, "keep_last_n_checkpoints": 1},
        "dataset": {"val_args": {"size": 4}},
    }
    assert losses_of(args, **saving) == losses_of(args)


def test_a_loader_with_a_state_reads_nothing_again(tmp_path):
    args = cases.shared_args(tmp_path, max_train_steps=4, checkpoint={"no_save": False, "resume_from": "last"}, **LOADERS["with a state"])
    cases.train(args)
    trainer, _ = cases.train(cases.merged(args, {"max_train_steps": 7}))
    assert trainer.dataloader["train"].read == 1 + 3, "an example for the model, and 3 micro batches"


class Counting(cases.SimpleDataset):
    read = 0

    def __getitem__(self, i):
        Counting.read += 1
        return super().__getitem__(i)


def test_a_loader_of_this_process_skips_without_reading(tmp_path):
    args = cases.shared_args(tmp_path, max_train_steps=4, checkpoint={"no_save": False, "resume_from": "last"}, dataset={"type": Counting})
    cases.train(args)
    Counting.read = 0
    cases.train(cases.merged(args, {"max_train_steps": 7}))
    assert Counting.read == 2 * (1 + 3), "an example for the model, and 3 micro batches"


def test_another_number_of_units_goes_on_with_the_same_samples(tmp_path):
    """Two units with windows of 2, then one unit with windows of 4: the same global batches."""
    args = cases.shared_args(
        tmp_path,
        dataset={"train_args": {"size": 32}},
        checkpoint={"no_save": False, "resume_from": "last"},
        max_epochs=3,
        global_batch_size=8,
        **SHUFFLED,
    )
    whole = losses_of(cases.merged(args, {"checkpoint": {"no_save": True, "resume_from": None}}))[0]
    begun = run_processes(lambda rank: losses_of(args, max_train_steps=6)[0], 2)[0]
    assert begun + losses_of(args)[0] == pytest.approx(whole, abs=1e-5)


# -- positions


def test_position_follows_from_the_steps_and_the_length_of_an_epoch():
    status = TrainStatus(finished_train_steps=11)
    assert status.position(4) == (2, 3) and status.position(None) == (0, 11)
    status.anchor(2, 3, 4)
    assert (status.epoch, status.epoch_start) == (0, 0), "nothing is kept that follows from the rest"
    status.anchor(2, 3, None)  # an epoch without a known length began after 8 steps
    assert (status.epoch, status.epoch_start) == (2, 8) and status.position(None) == (2, 3)
    status.anchor(3, 0, 5)
    assert status.position(5) == (3, 0)
    assert TrainStatus.from_dict({**status.to_dict(), "of another version": 1}) == status
    assert TrainStatus.from_dict({}) == TrainStatus()


# -- windows


def feed(size, n, batch=2, **options):
    return Feed(DataLoader(cases.SimpleDataset(size=n), batch_size=batch), size, device=torch.device("cpu"), **options)


def test_windows_are_filled_up_with_dummies():
    f = feed(3, 7)
    f.begin(0)
    first, second, third = (f.fetch() for _ in range(3))
    assert (first.real, first.dummies, first.samples) == (3, None, 6)
    assert (second.real, second.dummies, second.samples) == (1, [False, True, True], 1)
    assert second.data == second.batches[:1] and second.batches[1] is second.batches[0]
    assert (third.real, third.dummies) == (0, [True] * 3) and f.taken == 4


def test_a_rank_without_any_data_uses_the_example():
    data = cases.SimpleDataset()
    f = Feed(iter_of([]), 2, device=torch.device("cpu"), spare=example(DataLoader(data), 3))
    f.begin(0)
    window = f.fetch()
    assert window.real == 0 and window.batches[1]["x"].shape == (3, 8)


def iter_of(batches):
    return type("Loader", (), {"__iter__": lambda self: iter(batches)})()


def test_inputs_are_prepared():
    f = feed(1, 2, prepare=lambda b: {k: v.double() for k, v in b.items()})
    f.begin(0)
    assert f.fetch().batches[0]["x"].dtype == torch.float64


def test_the_example_is_collated_and_draws_nothing():
    data = cases.Noisy(size=2)
    before = torch.get_rng_state()
    sample = example(DataLoader(data, shuffle=True), 3)
    assert sample["x"].shape == (3, 8) and torch.equal(torch.get_rng_state(), before)
    stream = cases.Stream(size=4)
    assert example(DataLoader(stream, batch_size=2), 2)["x"].shape == (2, 8)
    with pytest.raises(autopar.ConfigError, match="is empty"):
        example(DataLoader(cases.SimpleDataset(size=0)), 1)


def test_checksum_of_windows():
    a, b = ({"x": torch.arange(4.0), "ids": torch.arange(n)} for n in (2, 3))
    windows = [Window([a], 1), Window([b], 1), Window([a, a], 1), Window([{"x": a["x"].bfloat16(), "ids": torch.tensor(1)}], 1)]
    sums = [checksum(w) for w in windows]
    assert sums[0] == sums[2] and len(set(sums)) == 3, "dummies do not count"


def test_randomness_is_kept():
    torch.manual_seed(1)
    random.seed(1)
    with randomness_kept():
        inside = torch.rand(3), random.random()
    assert torch.equal(torch.rand(3), inside[0]) and random.random() == inside[1]
