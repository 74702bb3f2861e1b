"""check: accepts programs written by hand and every lowered one, and finds seeded mutations of them.
Cases of mutations are tests/mutate.py; MISSES says what only numbers can find.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import handwritten
import pytest
import small_models
from mutate import mutations
from random_plans import MESHES, random_plan

from autopar.errors import CheckError
from autopar.ir.types import I, P, R, S
from autopar.lower.check import check, errors
from autopar.lower.program import Convert, Placement

HAND = {name: make() for name, make in handwritten.PAIRS.items()}


@pytest.mark.parametrize("name", HAND)
def test_handwritten_programs_are_accepted(name):
    check(*HAND[name])


@pytest.mark.parametrize("kind", mutations)
def test_mutations_of_handwritten_programs_are_found(kind):
    for graph, program in HAND.values():
        for seed in range(8):
            if (mutant := mutations[kind](program, Random(seed))) is not None:
                assert mutant != program
                assert errors(graph, mutant), f"seed {seed}"


def edit(name, **changes):
    graph, program = HAND[name]
    block = program.blocks[program.root]
    fields = {k: f(getattr(block, k)) for k, f in changes.items()}
    return graph, replace(program, blocks={block.name: replace(block, **fields)})


def at(n, **changes):
    return lambda items: (*items[:n], replace(items[n], **changes), *items[n + 1 :])


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (edit("mlp", recompute=lambda _: True), "recompute is True, expected False"),
        (edit("mlp", instances=lambda _: ("x",)), "says its instances are ['x'], but it is called as ['']"),
        (edit("mlp", inputs=lambda _: ()), "inputs hold [], expected ['x']"),
        (edit("mlp", body=lambda b: (*b[:2], *b[3:])), "act/gelu was dropped (model.py:11"),
        (edit("mlp", body=lambda b: (b[0], b[2], b[1], *b[3:])), "act/gelu (model.py:11 `act/gelu ...`): runs before up/linear"),
        (edit("mlp", body=at(1, choice=("k",))), "argument 0 %5 'x' has type R, expected S(1)"),
        (edit("mlp", body=at(1, choice=("nope",))), "may not be split on 'nope'"),
        (edit("mlp", body=at(0, axis="dp")), "the mesh(tp=2) has no such axis"),
        (edit("mlp", body=at(0, dst=P)), "gives type P, but its result is written as R"),
        (edit("mlp", values=at(0, shape=(4, 9))), "shape is (4, 9), expected (4, 8)"),
        (edit("mlp", values=at(0, grad=False)), "grad is False, expected True"),
        (edit("mlp", values=at(0, type=(S(7),))), "shards dim 7 of a value of shape (4, 8)"),
        (edit("mlp", values=at(0, type=(I, I))), "type (I, I) has 2 axes, the mesh 1"),
        (edit("counter", body=lambda b: [replace(x, copy=False) if isinstance(x, Convert) else x for x in b]), "so it must copy"),
        (edit("counter", body=at(3, writes=())), "writes [] in place, expected [['v', 'v'], ['t', 't']]"),
    ],
)
def test_errors_say_what_and_where(case, says):
    with pytest.raises(CheckError) as e:
        check(*case)
    assert says in str(e.value)


def test_errors_name_op_source_line_expected_and_found():
    graph, program = HAND["mlp"]
    mutant = mutations["conversion_dropped"](program, Random(1))
    with pytest.raises(CheckError, match=r"MLP: .*linear \(model.py:\d+ `.*`\): argument \d %\d+ '\w+' has type \w, expected \w"):
        check(graph, mutant)


@pytest.mark.parametrize(
    ("placements", "says"),
    [
        (lambda p: p[1:], "up.weight has no placement"),
        (lambda p: (*p, p[0]), "up.weight is placed twice"),
        (lambda p: (*p, Placement("nope", (I,))), "nope is no tensor of the graph"),
        (lambda p: (Placement("up.weight", (P,)), *p[1:]), "a tensor that is kept cannot be P"),
        (lambda p: (Placement("up.weight", (R,)), *p[1:]), "up.weight is S(0) here but placed R"),
    ],
)
def test_placements(placements, says):
    graph, program = HAND["mlp"]
    with pytest.raises(CheckError) as e:
        check(graph, replace(program, placements=placements(program.placements)))
    assert says in str(e.value)


def lowered(name: str, folded: bool, count: int):
    """(graph, program) of a small model under random plans."""
    from autopar.lower.lower import lower
    from autopar.trace import trace

    module, args = small_models.inputs(name)
    graph = trace(module, args, constant_folding=folded)
    for seed in range(count):
        yield graph, lower(graph, random_plan(graph, MESHES[seed % len(MESHES)], Random(seed)))


TRIED: Counter[str] = Counter()


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", small_models.NAMES)
def test_lowered_programs_are_accepted_and_their_mutants_found(name, folded):
    missed = Counter()
    for seed, (graph, program) in enumerate(lowered(name, folded, 4)):
        assert not errors(graph, program), f"seed {seed}"
        for kind, mutate in mutations.items():
            if (mutant := mutate(program, Random(seed))) is not None:
                assert mutant != program
                TRIED[kind] += 1
                missed[kind] += not errors(graph, mutant)
    assert not +missed


def test_every_mutation_was_tried():
    if len(TRIED) > 20:  # only where the tests above ran
        assert not set(mutations) - set(TRIED)


@pytest.mark.slow
@pytest.mark.parametrize("name", small_models.NAMES)
def test_hundreds_of_lowered_programs_are_accepted(name):
    for seed, (graph, program) in enumerate(lowered(name, False, 60)):
        assert not errors(graph, program), f"seed {seed}"


@pytest.mark.parametrize("name", ["mlp", "lm"])
def test_a_constant_changed_on_one_rank_is_told_by_numbers(name):
    """A Program is one for all ranks, so the checker cannot see it."""
    from mutation_table import Subject, on_one_rank

    subject, told = Subject(name), []
    for seed, program in enumerate(subject.programs(4)):
        good = subject.step(program)
        assert not subject.differs(good, program)
        told.append(on_one_rank(subject, program, good, Random(seed)))
    assert False not in told and True in told
