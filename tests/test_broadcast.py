"""Broadcast strategies between nodes that do not share a disk: separate folders for separate groups of forked processes.
Must not know generated code."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import autopar.runtime.broadcast as broadcast
from autopar import ComputeConfig, parallelize
from autopar.errors import LayoutError, SavedirError
from tests.procs import run_processes
from tests.small_models import LM
from tests.test_parallelize import Plain, X, close

pytestmark = pytest.mark.procs
EVERYTHING = {"manifest.json", "graph.json", "constants.safetensors", "plan.json", "model.py", "rank0.py", "rank1.py"} | {
    "weights.safetensors",
    "buffers.safetensors",
}
CODE = {"manifest.json", "plan.json", "model.py", "rank0.py", "rank1.py", "buffers.safetensors"}


@pytest.fixture(scope="module", autouse=True)
def imports(tmp_path_factory):
    """What a compile imports takes seconds; done once, before processes are forked."""
    parallelize(seeded(Plain), X, "dp", gen_savedir=tmp_path_factory.mktemp("first"))


def on_nodes(fn, tmp_path, nodes=2, each=2):
    """fn(rank, folder of its node) on nodes x each processes."""

    def child(rank):
        node, local = divmod(rank, each)
        os.environ.update(LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(each))
        return fn(rank, tmp_path / f"node{node}")

    return run_processes(child, nodes * each)


def seeded(cls, seed=3, **kwargs):
    torch.manual_seed(seed)
    return cls(**kwargs)


def files(folder):
    found = [p for p in Path(folder).rglob("*") if p.is_file()]
    assert len({p.parent for p in found}) <= 1 and not any(p.name.startswith(".") for p in Path(folder).rglob("*")), found
    return {p.name for p in found}


SENT = {"all": EVERYTHING, "no_weights": EVERYTHING - {"weights.safetensors"}, "code": CODE}


@pytest.mark.parametrize("strategy", SENT)
@pytest.mark.parametrize("policy", ["tp", "data"])
def test_what_is_sent(strategy, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(broadcast, "CHUNK", 100)  # files travel in many pieces

    def run(rank, folder):
        # NB: the modules of other ranks have other weights: those of rank 0 count
        module = seeded(Plain, 3 if rank == 0 else 10 + rank)
        local = parallelize(module, X, policy, ComputeConfig(plan_ngpus=2), gen_savedir=folder, broadcast_strategy=strategy)
        close(local(**X), seeded(Plain)(**X))
        for name, place in local.named_placements().items():
            whole = (dict(seeded(Plain).named_parameters()) | dict(seeded(Plain).named_buffers()))[name]
            t = local.get_parameter(name) if place.kind == "param" else local.get_buffer(name)
            assert torch.equal(t, place.shard(local.mesh, lambda s, whole=whole: whole[s]))

    on_nodes(run, tmp_path)
    assert files(tmp_path / "node0") == EVERYTHING and files(tmp_path / "node1") == SENT[strategy]
    for name in SENT[strategy] - {"manifest.json"}:
        one, other = (next((tmp_path / n).rglob(name)).read_bytes() for n in ("node0", "node1"))
        assert one == other


def test_none_says_what_to_do(tmp_path):
    def run(rank, folder):
        try:
            parallelize(seeded(Plain), X, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=folder)
        except (SavedirError, LayoutError) as e:
            return str(e)

    for text in on_nodes(run, tmp_path):
        assert "holds no complete generated code" in text and "does not share rank 0's disk, use broadcast_strategy='all'" in text


def test_nothing_is_sent_where_the_disk_is_shared(tmp_path, monkeypatch):
    def run(rank, folder):
        monkeypatch.setattr(broadcast, "_one_file", None)  # sending would fail
        local = parallelize(seeded(Plain), X, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=tmp_path / "one", broadcast_strategy="all")
        close(local(**X), seeded(Plain)(**X))

    on_nodes(run, tmp_path)
    assert files(tmp_path / "one") == EVERYTHING


def test_three_nodes_two_of_which_share_a_disk(tmp_path):
    def run(rank, folder):
        shared = tmp_path / "node0" if rank // 2 == 2 else folder
        local = parallelize(seeded(Plain), X, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=shared, broadcast_strategy="all")
        close(local(**X), seeded(Plain)(**X))

    on_nodes(run, tmp_path, nodes=3)
    assert not (tmp_path / "node2").exists() and files(tmp_path / "node1") == EVERYTHING


def test_a_second_run_replaces_what_was_sent(tmp_path):
    """New weights and new code reach the other node; what was half sent before is not taken for whole."""

    def run(rank, folder, strategy, seed, policy):
        local = parallelize(
            seeded(Plain, seed), X, policy, ComputeConfig(plan_ngpus=2), gen_savedir=folder, broadcast_strategy=strategy, reuse="moo"
        )
        close(local(**X), seeded(Plain, seed)(**X))

    for strategy, seed, policy in (("all", 1, "tp"), ("code", 2, "tp"), ("no_weights", 3, "data"), ("all", 4, "data")):
        on_nodes(lambda r, f, s=strategy, k=seed, p=policy: run(r, f, s, k, p), tmp_path)
        text = next((tmp_path / "node1").rglob("manifest.json")).read_text()
        assert ("not_sent" in text) == (strategy != "all")


def test_a_node_that_was_sent_code_compiles_anew_on_its_own(tmp_path):
    config = ComputeConfig(plan_ngpus=1, runtime_ngpus=2)

    def both(rank, folder):
        parallelize(seeded(Plain), X, "dp", config, gen_savedir=folder, broadcast_strategy="code")

    on_nodes(both, tmp_path, each=1)
    folder = parallelize(seeded(Plain, 5), X, "dp", config, gen_savedir=tmp_path / "node1", load_module=False)
    assert files(folder) == EVERYTHING - {"rank1.py"}


def test_tied_weights_and_buffers_by_slices_from_rank_0(tmp_path):
    """Ranks of a node without weights receive no more than their slices."""
    args = {"ids": torch.arange(8).reshape(2, 4)}
    received = []

    def run(rank, folder):
        def count(wants, read, inner=broadcast.fetch):
            out = inner(wants, read)
            received.extend(t.numel() for t in out.values())
            return out

        import autopar.runtime.initial as initial

        initial.fetch = count
        module = seeded(LM).eval()
        local = parallelize(module, args, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=folder, broadcast_strategy="no_weights")
        close(local(**args), module(**args))
        return sum(received), sum(p.numel() for p in local.parameters())

    totals = on_nodes(run, tmp_path)
    assert [t[0] for t in totals[:2]] == [0, 0] and all(got == held for got, held in totals[2:])


def test_weights_left_out_on_purpose(tmp_path):
    """init_module_params may differ between ranks, as scripts do that load a checkpoint or broadcast weights afterwards."""

    def run(rank, folder):
        first, config = rank < 2, ComputeConfig(plan_ngpus=2)
        settings = dict(broadcast_strategy="no_weights", init_module_params=first)
        local = parallelize(seeded(Plain), X, "tp", config, gen_savedir=folder, **settings)
        assert all(p.isnan().any().item() is (not first) for p in local.parameters())
        assert torch.equal(local.shift, torch.full((8,), 0.5))
        return True

    assert all(on_nodes(run, tmp_path))


def test_a_node_whose_disk_cannot_be_written(tmp_path):
    """All ranks end with the same error, and say which folder."""
    (tmp_path / "node1").write_text("a file, not a folder")

    def run(rank, folder):
        try:
            parallelize(seeded(Plain), X, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=folder, broadcast_strategy="all")
        except (SavedirError, LayoutError) as e:
            assert dist.get_rank() == rank
            return str(e)

    for text in on_nodes(run, tmp_path):
        assert "cannot write generated code to" in text and "node1" in text


def test_the_module_given_is_not_changed(tmp_path):
    def run(rank, folder):
        module = seeded(Plain)
        before = copy.deepcopy(module.state_dict())
        parallelize(module, X, "tp", ComputeConfig(plan_ngpus=2), gen_savedir=folder, broadcast_strategy="code")
        return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())

    assert all(on_nodes(run, tmp_path))
