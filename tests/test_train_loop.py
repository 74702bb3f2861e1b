"""What the loop does: limits, intervals, schedules, reductions, windows that are not full, validation, data without a length.
Must not know checkpoints on disk, nor faults.
"""

import pytest
import torch
from torch.utils.data import DistributedSampler

import autopar
from autopar.train import AggregatedOutputs
from tests import train_cases as cases
from tests.procs import run_processes


@pytest.fixture
def run(tmp_path):
    def call(n=1, give=lambda trainer, seen: (trainer.train_status.finished_train_steps, seen), **changes):
        args = cases.shared_args(tmp_path, **changes)

        def rank_main(rank):
            return give(*cases.train(args))

        return rank_main(0) if n == 1 else run_processes(rank_main, n)

    return call


# -- limits


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_epochs": 2}, 20),
        ({"max_epochs": None, "max_train_steps": 7}, 7),
        ({"max_epochs": 1, "max_train_steps": 13}, 10),
        ({"max_epochs": 3, "max_train_steps": 13}, 13),
        ({"max_epochs": 3, "grad_accumulation_steps": 3}, 12),  # 10 micro batches: 3 + 3 + 3 + 1
        ({"max_epochs": 1, "global_batch_size": 20}, 1),
        ({"max_epochs": 1, "micro_batch_size": 7}, 3),
    ],
)
def test_limits(run, limits, steps):
    done, seen = run(**limits)
    assert done == steps == len(seen.losses)


def test_no_limit_at_all_is_an_error(tmp_path):
    with pytest.raises(autopar.ConfigError, match="neither max_epochs nor max_train_steps"):
        autopar.Trainer(cases.mlp_args(tmp_path, max_epochs=None))


def test_zero_steps_is_an_error(tmp_path):
    with pytest.raises(autopar.ConfigError, match="max_train_steps is 0; it must be a whole number of at least 1"):
        autopar.Trainer(cases.mlp_args(tmp_path, max_train_steps=0))


# -- validation


VAL = {"train_args": {"size": 20}, "val_args": {"size": 11, "seed": 1}}


def plain_val_loss(model, size=11):
    data = cases.SimpleDataset(8, size, seed=1)
    with torch.no_grad():
        return torch.nn.functional.mse_loss(model({"x": data.x, "y": data.y})[1], data.y).item()


def model_after(steps, **options):
    """The plain model after so many steps of mlp_args' training."""
    torch.manual_seed(7)
    model = cases.MLP(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cases.train_plain(model, optimizer, cases.SimpleDataset(8, 20), steps=steps, **options)
    return model


@pytest.mark.parametrize(
    ("intervals", "at"),
    [
        ({}, [10, 20]),
        ({"val_every_n_epochs": 2}, [20]),
        ({"val_every_n_epochs": None}, []),
        ({"val_every_n_epochs": None, "val_every_n_train_steps": 6}, [6, 12, 18]),
        ({"val_every_n_train_steps": 5}, [5, 10, 15, 20]),  # twice due in step 10, done once
        ({"max_train_steps": 13}, [10]),
    ],
)
def test_when_it_is_validated(run, intervals, at):
    _, seen = run(dataset=VAL, **intervals)
    assert list(seen.val) == at


def test_validation_is_the_mean_over_all_samples(run):
    """11 samples in micro batches of 2: the last one is smaller, and counts less."""
    _, seen = run(dataset=VAL)
    for steps, loss in seen.val.items():
        assert loss == pytest.approx(plain_val_loss(model_after(steps)), abs=1e-6)


def test_validation_is_the_mean_over_all_ranks(run):
    """12 samples on 2 units; and with a window of 4 micro batches a unit has 3, 3."""
    for accumulation in (1, 4):
        dataset = {"train_args": {"size": 20}, "val_args": {"size": 12, "seed": 1}}
        results = run(2, dataset=dataset, max_epochs=1, grad_accumulation_steps=accumulation)
        steps = results[0][0]
        want = plain_val_loss(model_after(steps, units=2, accumulation=accumulation), 12)
        assert [seen.val[steps] for _, seen in results] == [pytest.approx(want, abs=1e-6)] * 2


def test_max_val_steps(run):
    """Steps of validation are windows, as those of training are."""
    _, seen = run(dataset=VAL, max_val_steps=2, grad_accumulation_steps=2, max_train_steps=5)
    first = cases.SimpleDataset(8, 11, seed=1)
    model = model_after(5, accumulation=2)
    with torch.no_grad():
        want = model({"x": first.x[:8], "y": first.y[:8]})[0].item()
    assert seen.val == {5: pytest.approx(want, abs=1e-6)}


def test_validation_draws_no_random_numbers_of_training(run):
    """Dropout and a shuffled validation set: the same losses with and without validation."""
    model = {"args": {"dropout": 0.3}}
    _, without = run(model=model, max_epochs=1)
    _, with_it = run(model=model, max_epochs=1, dataset=VAL, val_every_n_train_steps=1, dataset_sampler={"val_args": {"shuffle": True}})
    assert with_it.losses == without.losses and len(with_it.val) == 10


def test_validation_is_in_eval_mode(run):
    _, seen = run(model={"args": {"dropout": 0.5}}, optimizer={"args": {"lr": 0.0}}, dataset=VAL, max_epochs=1)
    torch.manual_seed(7)
    assert seen.val[10] == pytest.approx(plain_val_loss(cases.MLP().eval()), abs=1e-6)
    assert len(set(seen.losses)) == 10, "training is in train mode"


# -- schedules


def test_lr_scheduler_by_epoch_and_by_step(run):
    schedule = {"type": "torch.optim.lr_scheduler.StepLR", "args": {"step_size": 1, "gamma": 0.5}}
    _, by_epoch = run(lr_scheduler=schedule, max_epochs=3, max_train_steps=25)
    _, by_step = run(lr_scheduler={**schedule, "interval": "step"}, max_epochs=1)
    assert by_epoch.lrs == [0.1] * 10 + [0.05] * 10 + [0.025] * 5
    assert by_step.lrs == [0.1 * 0.5**i for i in range(10)]


def test_reduce_on_plateau_gets_the_validation_loss(run):
    schedule = {
        "type": "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "args": {"patience": 0, "factor": 0.1, "threshold": 10.0, "threshold_mode": "abs"},
    }
    _, seen = run(lr_scheduler=schedule, max_epochs=3, dataset=VAL)
    assert seen.lrs[0] == 0.1 and seen.lrs[-1] == pytest.approx(0.01)
    _, by_step = run(lr_scheduler={**schedule, "interval": "step"}, max_train_steps=4)
    assert by_step.lrs == pytest.approx([0.1, 0.1, 0.01, 0.001])


# -- losses and gradients


def test_loss_and_grad_reduction(run):
    """A sum of gradients is a mean of three times the size."""
    common = {"grad_accumulation_steps": 3, "max_train_steps": 3, "dataset": {"train_args": {"size": 18}}}
    _, mean = run(**common)
    _, summed = run(**common, optimizer={"loss_reduction": "sum", "grad_reduction": "sum", "args": {"lr": 0.1 / 3}})
    assert summed.losses == pytest.approx([3 * x for x in mean.losses], rel=1e-5)
    assert summed.norms == pytest.approx([3 * x for x in mean.norms], rel=1e-5)


@pytest.mark.parametrize("n", [1, 2])
def test_per_token_mean(run, n):
    """Losses are sums over tokens, of which every micro batch has another number."""
    results = run(
        n,
        model={"type": cases.SumTokens},
        dataset={"type": cases.Labelled, "train_args": {"size": 16}},
        optimizer={"grad_reduction": "per-token-mean", "loss_reduction": "sum", "aggregate_outputs_fn": cases.count_tokens_fn},
        grad_accumulation_steps=2,
        max_epochs=1,
        give=lambda trainer, seen: (seen.losses, seen.norms),
    )
    torch.manual_seed(7)
    model = cases.SumTokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = [], []
    data = cases.Labelled(16)
    for batches in cases.windows(data, units=n, micro=2, accumulation=2, epoch=0, shuffle=False):
        optimizer.zero_grad()
        outs = [model(b) for b in batches]
        tokens = sum(o[1] for o in outs)
        (sum(o[0] for o in outs) / tokens).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item())
        losses.append(sum(o[0] for o in outs).item())
        optimizer.step()
    for got in [results] if n == 1 else results:
        assert got == (pytest.approx(losses, rel=1e-5), pytest.approx(norms, rel=1e-5))


def no_tokens(loss_outputs, sync_group):
    return AggregatedOutputs(loss_sum=1.0, num_batches=1)


def test_per_token_mean_needs_tokens(run):
    with pytest.raises(autopar.ConfigError, match="num_tokens=None"):
        run(optimizer={"grad_reduction": "per-token-mean", "aggregate_outputs_fn": no_tokens})


def of_trainer(self, loss_outputs, sync_group):
    assert self.world_size == 1
    return AggregatedOutputs(loss_sum=2.0, num_batches=2, aggregated_outputs=[o[1].shape for o in loss_outputs])


def test_aggregate_outputs_fn_with_self(run):
    """The signature of the reference document; what it returns is what is logged and what hooks get."""
    _, seen = run(optimizer={"aggregate_outputs_fn": of_trainer}, max_train_steps=2)
    assert seen.losses == [1.0, 1.0] and seen.counts == [2, 2]


# -- data


def test_ranks_with_different_numbers_of_batches(run):
    """Unit 1 has fewer samples than unit 0, and neither knows how many: every step is the mean over the batches that there are."""
    dataset = {"type": cases.Stream, "train_args": {"size": 22, "uneven": 5}}
    results = run(2, dataset=dataset, grad_accumulation_steps=2, max_epochs=2)
    torch.manual_seed(7)
    model = cases.MLP(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = cases.SimpleDataset(8, 22)
    units = [list(range(0, 22, 2)), list(range(1, 22, 2))[:6]]
    per_unit = [[torch.utils.data.default_collate([data[i] for i in u[k : k + 2]]) for k in range(0, len(u), 2)] for u in units]
    losses, counts = [], []
    for _ in range(2):
        for k in range(0, 6, 2):
            batches = [b for unit in per_unit for b in unit[k : k + 2]]
            optimizer.zero_grad()
            loss = sum(model(b)[0] for b in batches) / len(batches)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            counts.append(len(batches))
    assert counts == [4, 3, 2] * 2
    for done, seen in results:
        assert (done, seen.counts) == (6, counts)
        assert seen.losses == pytest.approx(losses, abs=1e-5)


def test_data_shorter_than_a_global_batch(run, caplog):
    """Every step is a true mean over what there is."""
    done, seen = run(dataset={"train_args": {"size": 5}}, grad_accumulation_steps=4, max_epochs=2)
    assert done == 2 and seen.counts == [3, 3]
    assert "an epoch has 3 micro batches per scale unit, fewer than the 4 of a step" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"train_args": {"size": 0}}}, "training set is empty: SimpleDataset has 0 samples"),
        ({"dataset": {"train_args": {"size": 3}}, "micro_batch_size": 4, "dataloader": {"train_args": {"drop_last": True}}}, "no step"),
        ({"dataset": {"type": cases.Stream, "train_args": {"size": 0}}}, "training set is empty: DataLoader gave no batch"),
        ({"dataset": {"val_args": {"size": 0}}}, "the validation set is empty"),
    ],
)
def test_no_data(run, changes, message):
    with pytest.raises(autopar.ConfigError, match=message):
        run(**changes)


def test_an_empty_stream_for_validation_is_a_warning(run, caplog):
    _, seen = run(dataset={"type": cases.Stream, "val_args": {"size": 0}}, max_epochs=1)
    assert seen.val == {10: seen.losses[-1]}
    assert "the validation set gave no batch on any rank" in caplog.text


class Epochs(DistributedSampler):
    told = ()

    def set_epoch(self, epoch):
        Epochs.told += (epoch,)
        super().set_epoch(epoch)


def test_set_epoch_is_called(run):
    Epochs.told = ()
    run(dataset_sampler={"type": Epochs}, max_epochs=3)
    assert Epochs.told == (0, 1, 2)


def sampler_seen(trainer, seen):
    sampler = trainer.dataloader["train"].sampler
    return sampler.num_replicas, sampler.rank, trainer.dataloader["train"].batch_size


def test_units_share_the_data_and_ranks_of_a_unit_do_not(run):
    tp = {"compute_config": {"plan_ngpus": 2, "runtime_ngpus": 4}, "pas_policy": "tp", "max_train_steps": 1}
    assert run(4, give=sampler_seen, **tp) == [(2, 0, 2), (2, 0, 2), (2, 1, 2), (2, 1, 2)]


def test_ranks_of_a_unit_with_different_data_are_found(run):
    """A data set that shards by rank, where two ranks form one unit."""

    def attempt(trainer, seen):
        raise AssertionError("trained")

    with pytest.raises(AssertionError, match="ranks 0, 1 form one scale unit, but the first batches of epoch 0 differ"):
        run(
            2, give=attempt, dataset={"type": cases.Stream}, compute_config={"plan_ngpus": 2}, pas_policy="tp",
        )  # fmt: skip


class Same(cases.Stream):
    """Not sharded at all."""

    def __iter__(self):
        return iter([self.data[i] for i in range(len(self.data))])


def test_units_with_the_same_data_are_warned(run):
    texts = run(2, give=lambda trainer, seen: getattr(trainer.loop, "_warned", False), dataset={"type": Same}, max_train_steps=1)
    assert texts == [True, False]


# -- models


def test_parts_of_an_ordinary_model_are_parallel(run):
    """`layer` is split over two ranks and has two scale units; what is around it is replicated."""
    part = {"type": cases.Layer, "forward_args_gen_fn": cases.layer_args}
    results = run(
        4,
        compute_config={"plan_ngpus": 2, "runtime_ngpus": 4, "use_end2end": False},
        model={"type": cases.Around, "parallel_modules": [part]},
        pas_policy="tp",
        dataset=VAL | {"val_args": {"size": 12, "seed": 1}},
        grad_accumulation_steps=2,
        optimizer={"clip_gnorm": 0.5},
        max_epochs=2,
        give=lambda trainer, seen: (seen.losses, seen.norms, seen.val),
    )
    torch.manual_seed(7)
    model = cases.Around()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = cases.train_plain(model, optimizer, cases.SimpleDataset(8, 20), steps=6, units=2, accumulation=2, clip=0.5)
    data = cases.SimpleDataset(8, 12, seed=1)
    for got in results:
        assert got[0] == pytest.approx(losses, abs=1e-5) and got[1] == pytest.approx(norms, abs=1e-5)
        assert got[2][6] == pytest.approx(model({"x": data.x, "y": data.y}).item(), abs=1e-5)


def test_a_hugging_face_llama(tmp_path):
    """A small random configuration on two processes, split by columns and rows, against plain PyTorch."""
    transformers = pytest.importorskip("transformers")
    assert transformers.LlamaForCausalLM  # NB: it is imported here, before the fork
    args = cases.llama_args(tmp_path)
    results = run_processes(lambda rank: cases.train(args)[1].losses, 2, timeout=240)
    torch.manual_seed(7)
    model = cases.Llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, _ = cases.train_plain(model, optimizer, cases.ByteDataset(8, length=12), steps=6)
    for got in results:
        assert got == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]
