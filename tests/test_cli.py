"""The autopar command: what each subcommand prints, and every error as one line with exit code 2.
Must not know how the stages work. Commands run in process; what depends on a fresh interpreter runs in one.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autopar.cli.main import main

MODEL = '''
import torch
import torch.nn.functional as F
from torch import nn

import autopar


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x)
        if mask.all():
            x = x * 2
        return self.head(x)


class NeedsWidth(Net):
    def __init__(self, width):
        super().__init__(width)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Strange(nn.Module):
    def forward(self, x):
        return Own.apply(x)


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        y = self.proj(x)
        return y / y.norm() if y.norm() > 1 else y


class Broken(nn.Module):
    def forward(self, x):
        return x @ x


def build():
    return NeedsWidth(8)


def not_a_module():
    return 3


def raises():
    raise KeyError("weights")


instance = Net()


def inputs():
    return {"x": torch.randn(4, 8), "mask": torch.ones(4, 8, dtype=torch.bool)}


def only_x():
    return {"x": torch.randn(4, 8)}


fixed = inputs()


def as_list():
    return [1, 2]


def columns(graph, config):
    mesh = autopar.Mesh((("tp", config.plan_ngpus),))
    split = {"layers.*.up/linear": {"tp": "S(-1)"}, "layers.*.down/linear": {"tp": "in:S(-1)"}}
    return autopar.follow(graph, autopar.plan_from(graph, mesh, split))


def no_plan(graph, config):
    return "split everything"


def wrong_code():
    """Patches codegen so that what it writes is wrong: the sum of partial results is left out."""
    import autopar.driver as driver

    emit = driver.emit
    driver.emit = lambda *a, **k: {n: t.replace("ap.p_to_i(linear, self.tp)", "linear") for n, t in emit(*a, **k).items()}
    return Net()
'''


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with cli_models.py, as the working folder; removed from the module table afterwards."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_models.py").write_text(MODEL)
    (folder / "cli_fails.py").write_text("import torch\nimport no_such_package\n")
    (folder / "cli_exits.py").write_text("raise SystemExit(1)\n")
    (folder / "pkg").mkdir()
    (folder / "pkg/__init__.py").write_text("")
    (folder / "pkg/inner.py").write_text("from .sibling import Net, inputs\n")
    (folder / "pkg/sibling.py").write_text("from cli_models import Net, inputs\n")
    before, path = os.getcwd(), list(sys.path)
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.path[:] = path
    for name in [n for n in sys.modules if n.startswith("cli_") or n.split(".")[0] == "pkg"]:
        del sys.modules[name]


@pytest.fixture
def run(here, capsys):
    """run('show x') -> (exit code, standard output, standard error)."""

    def run(command):
        capsys.readouterr()
        try:
            code = main(command.split())
        except SystemExit as e:  # argparse
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


COMPILE = "compile cli_models.py:Net --inputs inputs"


@pytest.fixture(scope="module")
def saved(here):
    """Folders compiled once: 'hand' by a policy of the user's, 'drawn' by tp, 'one' on one device."""
    for name, more in {"hand": "--policy cli_models.py:columns --plan-ngpus 2", "drawn": "--plan-ngpus 2", "one": "--policy dp"}.items():
        assert main(f"{COMPILE} {more} --gen-savedir saved --instance-name {name}".split()) == 0
    return {name: f"saved/cli_models.Net/{name}" for name in ("hand", "drawn", "one")}


# ---- compile


def test_compile_prints_stages_reuse_and_where(run):
    code, out, err = run(f"{COMPILE} --policy cli_models.py:columns --plan-ngpus 2 --gen-savedir new")
    assert code == 0 and not err
    stages = re.findall(r"^(\w+) +\d+\.\d\d s", out, re.MULTILINE)
    assert stages == ["trace", "policy", "lower", "check", "emit", "write"]
    assert "traced with strategy 'meta'" in out and "reused    nothing (nothing was generated before)" in out
    assert "ops without a rule, replicated: none" in out
    folder = Path("new/cli_models.Net/_")
    assert f"generated code: {folder / 'model.py'}" in out and (folder / "rank1.py").exists() and not (folder / "rank2.py").exists()
    again = run(f"{COMPILE} --policy cli_models.py:columns --plan-ngpus 2 --gen-savedir new")[1]
    assert "reused    code (everything matches)" in again and "trace" not in again
    changed = run(f"{COMPILE} --policy cli_models.py:columns --plan-ngpus 2 --gen-savedir new --guards warn")[1]
    assert "guards: saved 'error', now 'warn'" in changed
    graph = run(f"{COMPILE} --policy tp --plan-ngpus 2 --gen-savedir new --reuse graph")[1]
    assert "reused    graph (the graph matches)" in graph and "policy" in graph and "trace " not in graph


def test_compile_needs_no_distributed_environment(here):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    command = f"{COMPILE} --plan-ngpus 8 --runtime-ngpus 1024 --gen-savedir wide"
    done = subprocess.run([sys.executable, "-m", "autopar", *command.split()], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (here / "wide/cli_models.Net/_/rank7.py").exists()


@pytest.mark.parametrize(
    "command, plan",
    [
        (f"{COMPILE} --policy dp", {}),
        (f"{COMPILE} --policy data --plan-ngpus 2", {"dp": 2}),
        (f"{COMPILE} --mesh dp=2,tp=2 --policy data,tp", {"dp": 2, "tp": 2}),
        (f"{COMPILE} --mesh a=2,b=2 --policy data,cli_models.py:columns", {"a": 2, "b": 2}),
        ("compile cli_models:instance --inputs cli_models:fixed --plan-ngpus 4 --pas seed=3 _note=mine", {"tp": 4}),
        ("compile cli_models.py:build --inputs inputs --constant-folding", {}),
        ("compile cli_models.py:NeedsWidth --module-fn build --inputs inputs --trace-strategy cpu", {}),
        ("compile pkg.inner:Net --inputs inputs --plan-ngpus 2", {"tp": 2}),
    ],
)
def test_what_can_be_compiled(run, command, plan):
    code, out, err = run(f"{command} --gen-savedir many --reuse override")
    assert code == 0, err
    folder = Path(re.search(r"generated code: (.*)/model.py", out)[1])
    assert json.loads((folder / "plan.json").read_text())["mesh"] == plan


def test_meshes_and_seeds_are_told_apart(run):
    """Policies made by one function are not one policy."""
    base = f"{COMPILE} --policy data,tp --gen-savedir apart"
    for mesh, reused in (("dp=2,tp=2", "nothing"), ("dp=2,tp=2", "code"), ("dp=4,tp=1", "nothing"), ("x=2,y=2", "nothing")):
        assert f"reused    {reused}" in run(f"{base} --mesh {mesh}")[1], mesh
    assert "reused    nothing" in run(f"{base} --mesh x=2,y=2 --pas seed=2")[1]


def test_a_saved_plan_is_a_policy(run, saved):
    code, _, err = run(f"{COMPILE} --policy {saved['hand']}/plan.json --gen-savedir replanned")
    assert code == 0, err
    body = lambda folder: Path(folder, "model.py").read_text().partition("\nimport torch")[2]  # noqa: E731
    assert body("replanned/cli_models.Net/_") == body(saved["hand"])


def test_weights_follow_the_seed(run):
    from safetensors.torch import load_file

    weights = []
    for seed in (0, 0, 1):
        assert run(f"{COMPILE} --policy dp --gen-savedir seeded --reuse override --seed {seed}")[0] == 0
        weights.append(load_file("seeded/cli_models.Net/_/weights.safetensors")["head.weight"])
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_ops_without_a_rule_are_named(run):
    out = run("compile cli_models.py:Strange --inputs only_x --plan-ngpus 2 --gen-savedir strange")[1]
    assert re.search(r"^ops without a rule, replicated: .*Own \(1\)$", out, re.MULTILINE)
    shown = run("show strange --unruled")[1]
    assert "register_op" in shown and re.search(r"cli_models\.py:\d+  \| return Own\.apply\(x\)", shown)


# ---- show


def test_show_summary(run, saved):
    code, out, err = run(f"show {saved['hand']}")
    assert code == 0 and not err
    for line in (
        r"module +cli_models\.Net, traced in train mode, sizes symbolic",
        r"plan +mesh\(tp=2\) by policy columns, 1 scale unit",
        r"code +saved/cli_models\.Net/hand/model\.py, \d+ lines",
        r"matmul flops split +8\d\.\d%|matmul flops split +9\d\.\d%",
        r"parameters per rank +324 of 596, 0\.0 MB",
        r"guards +1, and 0 warnings",
        r"ops without a rule +0",
        r"Layer +2 +\d+ +1 all_reduce +1 all_reduce",
        r"Net +1 +\d+ +none +none",
    ):
        assert re.search(rf"^{line}$", out, re.MULTILINE), (line, out)


def test_show_parts(run, saved):
    graph, plan, types = (run(f"show {saved['hand']} --{x}")[1] for x in ("graph", "plan", "types"))
    assert graph.startswith("graph cli_models.Net: 2 blocks") and "block Layer  # layers.*, 2 instances" in graph
    assert plan == Path(saved["hand"], "plan.json").read_text()
    assert types.startswith("program on mesh(tp=2)") and re.search(r"f32\[4,16 @tp:S\(1\)\] = linear.*\[split tp:n\]", types)
    guards = run(f"show {saved['hand']} --guards")[1]
    assert re.search(r"cli_models\.py:\d+  root: bool\(\.\.\.\) was True  \| if mask\.all\(\):", guards)
    assert run(f"show {saved['hand']} --unruled")[1] == "every op has a rule\n"


def test_show_warns_of_reads_that_depend_on_parameters(run):
    assert run("compile cli_models.py:Clipped --inputs only_x --policy dp --trace-strategy cpu --gen-savedir clipped")[0] == 0
    out = run("show clipped --guards")[1]
    assert "checked at run time: nothing" in out and re.search(r"taken for granted:\n  .*cli_models\.py:\d+: `return y / y\.norm\(\)", out)


def test_what_auto_fell_back_to_is_told(run):
    code, _, err = run("compile cli_models.py:Clipped --inputs only_x --policy dp --gen-savedir fallen")
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("autopar: warning: trace strategy 'meta' does not do") and "tracing again with" in err


def test_show_finds_the_only_folder_below(run, saved):
    assert run("show clipped --plan")[1] == run("show clipped/cli_models.Clipped/_ --plan")[1]
    code, _, err = run("show saved")
    assert code == 2 and "several: saved/cli_models.Net/drawn, saved/cli_models.Net/hand, saved/cli_models.Net/one; name one" in err


def test_diff(run, saved, here):
    code, out, _ = run(f"show {saved['hand']} --diff {saved['one']}")
    assert code == 0
    assert "mesh: mesh(tp=2) | mesh()" in out and "code: plan_ngpus: 2 | 1" in out
    assert "layers.*.up/linear: tp=n | I" in out and "layers.*.down/linear: tp=k | I" in out
    assert run(f"show {saved['hand']} --diff {saved['hand']}")[1] == f"{saved['hand']} and {saved['hand']} are the same\n"


def test_diff_of_plan_files(run, saved, here):
    plan = json.loads(Path(saved["hand"], "plan.json").read_text())
    plan["ops"]["layers.1.up/linear"] = {"tp": "k"}
    (here / "edited.json").write_text(json.dumps(plan))
    only = "layers.1.up/linear: tp=n | tp=k"
    # with a graph at hand, op by op; between two files as they are written
    assert only in run(f"show {saved['hand']} --diff edited.json")[1].splitlines()
    rows = run(f"show {saved['hand']}/plan.json --diff edited.json")[1].splitlines()
    assert rows[2:] == ["layers.1.up/linear: I | tp=k"]


# ---- verify


def test_verify(run):
    code, out, err = run("verify cli_models.py:Net --inputs inputs --policy cli_models.py:columns --plan-ngpus 2 --float64")
    assert code == 0 and not err
    assert "on 2 ranks (mesh(tp=2), units=1)" in out and "all_reduce" in out and "all equal" in out and "(at most 1e-12)" in out
    code, out, _ = run("verify cli_models.py:Net --inputs inputs --plan-ngpus 2 --runtime-ngpus 4 --modes train")
    assert code == 0 and "on 4 ranks" in out and "eval" not in out


def test_verify_ends_with_1_on_a_difference(run):
    import autopar.driver as driver

    emit = driver.emit
    try:
        code, out, _ = run("verify cli_models.py:wrong_code --inputs inputs --policy cli_models.py:columns --plan-ngpus 2")
    finally:
        driver.emit = emit
    assert code == 1 and "WRONG train output" in out


# ---- errors


@pytest.mark.parametrize(
    "command, says",
    [
        ("", "the following arguments are required"),
        ("compil", "invalid choice: 'compil'"),
        ("compile cli_models.py:Net", "--inputs"),
        ("compile Net --inputs inputs", "MODULE 'Net' is not of the form 'package.module:Name' or 'path/to/file.py:Name'"),
        ("compile no_such.mod:Net --inputs inputs", "there is no module 'no_such'"),
        ("compile pkg.nothing:Net --inputs inputs", "pkg was imported, but it has no module 'nothing'"),
        ("compile pkg.sibling:Nett --inputs inputs", "pkg.sibling was imported, but it has no 'Nett': did you mean 'Net'?"),
        ("compile nothing.py:Net --inputs inputs", "there is no file"),
        ("compile cli_fails.py:Net --inputs inputs", "cli_fails.py failed to import: ModuleNotFoundError: No module named 'no_such"),
        ("compile cli_exits:Net --inputs inputs", "cli_exits failed to import: SystemExit"),
        ("compile pkg/inner.py:Net --inputs inputs", "name it as package.module"),
        ("compile cli_models.py:not_a_module --inputs inputs", "returned int; it must return a torch.nn.Module"),
        ("compile cli_models.py:NeedsWidth --inputs inputs", "give --module-fn a function that builds it"),
        ("compile cli_models.py:raises --inputs inputs", "cli_models.py:raises() failed: KeyError: 'weights'"),
        ("compile cli_models.py:fixed --inputs inputs", "no module, class of one or function that builds one"),
        ("compile cli_models.py:Net --inputs input", "has no 'input': did you mean 'inputs'?"),
        ("compile cli_models.py:Net --inputs as_list", "--inputs as_list gave list; it must be a dict"),
        ("compile cli_models.py:Net --inputs raises", "--inputs raises() failed: KeyError: 'weights'"),
        ("compile cli_models.py:Net --inputs only_x", "needs 'mask'"),
        ("compile cli_models.py:Broken --inputs only_x", "RuntimeError: "),
        (f"{COMPILE} --policy tpp", "unknown policy 'tpp': did you mean 'tp'?"),
        (f"{COMPILE} --policy cli_models.py:column", "has no 'column': did you mean 'columns'?"),
        (f"{COMPILE} --policy cli_models.py:no_plan", "no_plan returned str, not a Plan"),
        (f"{COMPILE} --policy cli_models.py:fixed", "a policy is a function (graph, config) -> Plan"),
        (f"{COMPILE} --policy missing.json", "cannot read plan missing.json: No such file or directory"),
        (f"{COMPILE} --policy dp --plan-ngpus 2", "plan_ngpus must be 1, not 2"),
        (f"{COMPILE} --policy data,tp", "give their axes with --mesh"),
        (f"{COMPILE} --mesh dp=2,tp=2", "has 2 axes, --policy names 1"),
        (f"{COMPILE} --mesh dp=2,tp=2 --policy dp,tp", "policy 'dp' is not for an axis of --mesh"),
        (f"{COMPILE} --mesh tp:2", "'tp:2' is not of the form name=size"),
        (f"{COMPILE} --mesh tp=2 --plan-ngpus 4", "mesh(tp=2) has 2 devices, but plan_ngpus is 4"),
        (f"{COMPILE} --plan-ngpus 0", "plan_ngpus is 0"),
        (f"{COMPILE} --plan-ngpus 2 --runtime-ngpus 5", "runtime_ngpus 5 is not a multiple of plan_ngpus 2"),
        (f"{COMPILE} --plan-ngpus two", "invalid int value: 'two'"),
        (f"{COMPILE} --pas seed", "'seed' is not of the form key=value"),
        (f"{COMPILE} --plan-ngpus 2 --pas sed=2", "no setting 'sed': did you mean 'seed'?"),
        (f"{COMPILE} --trace-strategy metta", "unknown trace_strategy 'metta': did you mean 'meta'?"),
        (f"{COMPILE} --guards of", "unknown guards 'of': did you mean 'off'?"),
        (f"{COMPILE} --reuse mach", "unknown reuse 'mach': did you mean 'match'?"),
        (f"{COMPILE} --policy dp --gen-savedir cli_models.py", "cannot write generated code to cli_models.py"),
        ("compile cli_models.py:Clipped --inputs only_x --trace-strategy meta", "which trace_strategy='meta' does not compute; use"),
        ("show nowhere", "there is no folder nowhere"),
        ("show pkg", "holds no complete generated code"),
        ("show pkg --graph --plan", "not allowed with"),
        ("show pkg --diff nowhere.json", "holds no complete generated code"),
        ("show cli_models.py --diff nowhere.json", "is not valid JSON"),
        ("verify cli_models.py:Net --inputs inputs --modes trian", "unknown mode 'trian': did you mean 'train'?"),
        ("verify cli_models.py:Net --inputs inputs --policy tpp", "unknown policy 'tpp'"),
    ],
)
def test_errors_are_one_line(run, command, says):
    code, out, err = run(command)
    assert code == 2 and not out
    assert err.count("\n") == 1 and err.startswith("autopar: error: ") and says in err, err


def test_match_names_every_difference_in_one_line(run, saved):
    code, _, err = run(f"{COMPILE} --gen-savedir saved --instance-name one --policy tp --guards off --reuse match")
    assert code == 2 and err.count("\n") == 1
    assert "policy: saved 'dp', now 'tp'" in err and "guards: saved 'error', now 'off'" in err and "reuse='moo'" in err


def test_a_half_written_folder_says_what_to_do(run, saved, here):
    (here / "torn").mkdir()
    for file in Path(saved["one"]).iterdir():
        if file.name != "plan.json":
            (here / "torn" / file.name).write_bytes(file.read_bytes())
    code, _, err = run("show torn")
    assert code == 2 and "plan.json is missing" in err


def test_a_user_error_names_the_user_line(run):
    err = run("compile cli_models.py:Broken --inputs only_x --policy dp")[2]
    line = MODEL.splitlines().index("        return x @ x") + 1
    assert f"cli_models.py:{line}" in err


def test_traceback_on_request(run):
    with pytest.raises(ValueError, match="unknown policy"):
        run(f"{COMPILE} --policy tpp --traceback")


def test_no_cuda(run):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "needs a CUDA device and there is none here" in run(f"{COMPILE} --policy dp --trace-strategy cuda")[2]


# ---- the command itself


@pytest.mark.procs
def test_help_is_quick_and_imports_no_torch():
    script = "import sys; from autopar.cli.main import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([Path(sys.executable).parent / "autopar", "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
    assert done.returncode == 0 and min(times) < 1.5
    for word in ("compile", "show", "verify"):
        assert word in done.stdout


@pytest.mark.procs
def test_output_cut_short_is_no_error(saved):
    command = f"{sys.executable} -m autopar show {saved['hand']} --graph | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("graph cli_models.Net")
