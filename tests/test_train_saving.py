"""When the trainer saves, and what it validates before: the checkpoint settings of the reference document in whole runs.
Must not know how checkpoints are written (test_train_checkpoint.py).
"""

import json

import pytest

from tests import train_cases as cases


@pytest.fixture(scope="module")
def gen(tmp_path_factory):
    """Generated code is shared by the tests of this file."""
    return str(tmp_path_factory.mktemp("gen"))


def saved(folder):
    """step -> validation loss of each checkpoint in the folder."""
    heads = [json.loads((p / "autopar.json").read_text())["trainer"] for p in folder.glob("0*")]
    return {h["step"]: h["val_loss"] for h in sorted(heads, key=lambda h: h["step"])}


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({"every_n_train_steps": 6}, [6, 12, 18, 20]),  # and at the end
        ({"every_n_epochs": 1}, [10, 20]),
        ({"every_n_epochs": 2, "every_n_train_steps": 8}, [8, 16, 20]),
        ({}, [20]),
        ({"every_n_train_steps": 7, "keep_last_n_checkpoints": 2, "save_best": False}, [14, 20]),
        ({"every_n_epochs": 1, "no_save": True}, []),
    ],
)
def test_when_it_is_saved(tmp_path, gen, settings, at):
    """Two epochs of 10 steps."""
    cases.train(cases.mlp_args(tmp_path, gen_savedir=gen, checkpoint={"no_save": False, **settings}))
    assert list(saved(tmp_path / "checkpoints")) == at


@pytest.mark.parametrize("validation", [True, False])
def test_validation_before_a_save(tmp_path, gen, validation):
    """It runs whatever the validation intervals say, and its loss is in the checkpoint; without a set, the training loss is."""
    _, seen = cases.train(
        cases.mlp_args(
            tmp_path,
            gen_savedir=gen,
            dataset={"val_args": {"size": 6, "seed": 1} if validation else {}},
            checkpoint={"no_save": False, "every_n_train_steps": 4},
            val_every_n_epochs=None,
            max_train_steps=9,
        )
    )
    losses = {step: pytest.approx(seen.val[step] if validation else seen.losses[step - 1]) for step in (4, 8, 9)}
    assert saved(tmp_path / "checkpoints") == losses and list(seen.val) == ([4, 8, 9] if validation else [])
