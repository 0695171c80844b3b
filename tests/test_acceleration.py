"""What a CUDA graph needs, shown on the CPU: a recorder of operations stands in for the graph.

Like a graph it keeps the operations and the tensors of one call; a number that Python read or chose in it is frozen.
"""

import importlib
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import EDP, SCRIPTS
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
FLAGS = {
    "edp_iql": ["", "--likelihood elbo"],
    "edp_crr": ["", "--weight binary --advantage-baseline max", "--sampler ddim"],
    "edp_td3": [
        "", "--max-q-backup --max-q-candidates 3 --max-q-top-k 2", "--sampler ddpm",
        "--no-action-approximation --sampler ddpm --beta-schedule vp --diffusion-steps 5",
    ],
    "edis_sac": ["", "--no-calibrate", "--cql-alpha 0 --cql-alpha-online 0"],
}  # fmt: skip
CASES = [(name, flags) for name, variants in FLAGS.items() for flags in variants]


class Recorder(TorchDispatchMode):
    """As `with torch.cuda.graph(recorder)`: what is computed is recorded and undone; `replay` computes it."""

    def __enter__(self):
        self.operations, self.made, self.before = [], set(), {}
        self.rng = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = [*zip(func._schema.arguments, args, strict=False)]
        values += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
        for argument, value in values:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for storage in (x.untyped_storage() for x in tree_leaves(value)):
                    if storage.data_ptr() not in self.made:
                        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **kwargs)
        new = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        new = [x for x in new if x.untyped_storage().data_ptr() not in given]
        self.made |= {x.untyped_storage().data_ptr() for x in new}
        self.operations.append((func, args, kwargs, out, {id(x) for x in new}))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)
        torch.set_rng_state(self.rng)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, recorded, new in self.operations:
            for old, value in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if id(old) in new:
                    old.copy_(value)


class HostReads(TorchDispatchMode):
    """Counts operations that wait for a device: values read, and shapes that depend on values."""

    count = 0

    def __enter__(self):
        self.patches = ExitStack()
        for name in ("cpu", "numpy", "tolist"):  # on a CPU no operation
            self.patches.enter_context(mock.patch.object(torch.Tensor, name, self.counted(getattr(torch.Tensor, name))))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        super().__exit__(*error)

    def counted(self, method):
        def call(tensor, *args, **kwargs):
            self.count += 1
            return method(tensor, *args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, masks = (
            func.overloadpacket.__name__,
            [x for x in tree_leaves(args) if getattr(x, "dtype", 0) == torch.bool],
        )
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
        self.count += name in ("index", "index_put_") and bool(masks)
        return func(*args, **(kwargs or {}))


class Stream:
    """Of no device."""

    __enter__ = __exit__ = wait_stream = lambda *_: None


class FailedCapture(Recorder):
    """As a capture that was not allowed ends: with an error of its own."""

    def __exit__(self, *error):
        super().__exit__(*error)
        raise RuntimeError("capture was invalidated")


@pytest.fixture
def stand_in(monkeypatch):
    for name, value in (("CUDAGraph", Recorder), ("Stream", Stream), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)


def prepare(name, flags):
    """An update, batch and chance of step i, networks and optimisers, alike at every call."""
    script = importlib.import_module(name)
    args = script.parse_args([*flags.split(), "--batch-size", "32"])
    torch.manual_seed(0)
    if name == "edis_sac":
        networks = script.make_networks(11, 3, args, CPU)
        update, optimizers = script.make_update(args, networks)
        update = script.partial(update, cql_alpha=args.cql_alpha)
    else:
        steps, order = args.sampler_steps, args.solver_order
        diffusion = script.Diffusion(args.diffusion_steps, args.sampler, steps, order, CPU, args.beta_schedule)
        networks = script.make_networks(11, 3, CPU)
        update, optimizers = script.make_update(args, diffusion, networks)

    def inputs(i):
        torch.manual_seed(i)
        parts = torch.randn(32, 28).split([11, 3, 11, 1, 1, 1], dim=1)  # views of rows, as in main
        s, a, next_s, r, mask, mc = parts
        batch = {"s": s, "a": a.tanh(), "next_s": next_s, "r": r[:, 0], "mask": (mask[:, 0] < 1).float()}
        if name == "edis_sac":
            return batch | {"mc": mc[:, 0]}
        chance, step = script.draw(args, diffusion, 3, CPU), 995 + i  # around the first move of the policy's target
        return batch | chance | script.schedule(args, step, CPU)

    return script, update, inputs, networks, optimizers


def spy(update):
    """The update, and where the tensors of each call lie."""
    seen = []

    def spied(**inputs):
        seen.append({name: (x.data_ptr(), x.stride()) for name, x in inputs.items()})
        return update(**inputs)

    return seen, spied


@pytest.mark.parametrize("name, flags", CASES)
def test_a_captured_update_is_the_update(name, flags, stand_in):
    """Bit for bit over 20 updates, 17 of them replayed: nothing that changes is frozen."""
    runs = []
    for captured in (False, True):
        script, update, inputs, networks, optimizers = prepare(name, flags)
        if captured:
            seen, update = spy(update)
            update = script.Captured(update)
        rows = [{key: x.clone() for key, x in update(**inputs(i)).items()} for i in range(20)]
        states = [part.state_dict() for part in (*networks.values(), *optimizers.values())]
        runs.append((rows, states))
    assert update.graph.operations and len(seen) == 4
    assert seen[1:] == seen[:-1]  # other strides would be compiled for anew, in the capture
    for eager, replayed in zip(tree_leaves(runs[0]), tree_leaves(runs[1]), strict=True):
        assert torch.equal(eager, replayed) if isinstance(eager, torch.Tensor) else eager == replayed


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_captured_run_is_the_run(name, hopper_file, tmp_path, stand_in, monkeypatch):
    """Batches and noise are drawn anew in each replay, targets move on their schedule."""
    script, states, graphs = importlib.import_module(name), [], []
    flags = ["--dataset-path", str(hopper_file), "--runs-dir", str(tmp_path), "--batch-size", "8", "--log-every", "1"]
    if name == "edis_sac":
        flags += ["--offline-updates", "9", "--online-steps", "0"]
    else:
        flags += ["--env-id", "my-robot", "--num-updates", "9"]
        flags += ["--policy-target-start", "2", "--policy-target-every", "3"] if name != "edp_iql" else []
    for captured in (False, True):
        if captured:
            monkeypatch.setattr(
                script, "capture", lambda args, f, device: graphs.append(script.Captured(f)) or graphs[-1]
            )
        result = script.main(script.parse_args(flags))
        saved = script.load_checkpoint(result["run_dir"])
        rows = [json.loads(line) for line in (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
        rows = [{key: x for key, x in row.items() if "losses/" in key} for row in rows]
        states.append([rows, [saved[key] for key in saved if key not in ("args", "progress", "run_dir")]])
    assert any(graph.graph and graph.graph.operations for graph in graphs)
    for eager, replayed in zip(tree_leaves(states[0]), tree_leaves(states[1]), strict=True):
        assert torch.equal(eager, replayed) if isinstance(eager, torch.Tensor) else eager == replayed


@pytest.mark.parametrize("name, flags", CASES)
def test_an_update_waits_for_nothing(name, flags):
    _, update, inputs, _, _ = prepare(name, flags)
    update(**inputs(0))
    with HostReads() as reads:
        update(**inputs(1))
    assert reads.count == 0


@pytest.mark.parametrize("name", EDP)
@pytest.mark.parametrize("sampler", ["dpm-solver", "ddim", "ddpm"])
def test_a_sample_waits_for_nothing(name, sampler):
    script = importlib.import_module(name)
    diffusion = script.Diffusion(30, sampler, 15, 3, CPU)
    with HostReads() as reads, torch.no_grad():
        diffusion.sample(script.Policy(11, 3), torch.randn(4, 11), torch.randn(diffusion.draws, 4, 3))
    assert reads.count == 0


@pytest.mark.parametrize("name", EDP)
def test_the_loop_waits_for_nothing(name, hopper_file, tmp_path):
    """More updates between two logs, no more reads."""
    script, counts = importlib.import_module(name), []
    for updates in ("2", "5"):
        flags = ["--env-id", "my-robot", "--dataset-path", str(hopper_file), "--runs-dir", str(tmp_path)]
        flags += ["--batch-size", "8", "--num-updates", updates]
        with HostReads() as reads:
            script.main(script.parse_args(flags))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_what_is_counted_as_a_wait():
    x = torch.arange(3)
    with HostReads() as reads:
        x.sum().item(), float(x[0]), bool(x.any()), x[x > 0], x[x[1]], x.nonzero(), x.cpu(), x.numpy(), x.tolist()
    assert reads.count == 9


@pytest.mark.parametrize("told", ["operation not permitted\nand more", ""])
def test_a_capture_that_fails(told, stand_in, monkeypatch, capsys):
    """One line with the cause, and the updates go on as they are."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FailedCapture)
    rows = []
    for captured in (False, True):
        script, update, inputs, _, _ = prepare("edp_iql", "")

        def failing(update=update, **inputs):
            if isinstance(_get_current_dispatch_mode(), Recorder):
                raise RuntimeError(told)
            return update(**inputs)

        update = script.Captured(failing) if captured else update
        rows.append([update(**inputs(i)) for i in range(6)])
    expected = told.split("\n")[0] or "RuntimeError('')"
    assert capsys.readouterr().err == f"warning: no CUDA graph: {expected}; goes on without\n"
    assert tree_leaves(rows[0]) == tree_leaves(rows[1])


def test_the_precision_of_products_is_set(script):
    before = torch.get_float32_matmul_precision()
    try:
        script.set_up(script.parse_args(["--matmul-precision", "high", "--device", "cpu"]))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def at_precision():
    """Calls a function with a precision of products, from the same seed."""
    before = torch.get_float32_matmul_precision()

    def call(precision, function):
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        return function()

    yield call
    torch.set_float32_matmul_precision(before)


def test_bfloat16_between_hidden_layers(script, at_precision):
    """Products of rounded factors, themselves rounded; what enters and leaves a network is not."""

    def passes(make):
        rows = []
        for layer in (layer for layer in make().modules() if isinstance(layer, torch.nn.Linear)):
            torch.nn.init.normal_(layer.bias)
            x = torch.randn(50, layer.in_features, requires_grad=True)
            y = layer(x)
            assert y.dtype == torch.float32
            product = (x.bfloat16().double() @ layer.weight.bfloat16().double().T).bfloat16().double() + layer.bias
            rows.append((product, y, *torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])))
        return rows

    networks = [(lambda: script.MLP(30, 3), 2)]
    if script.__name__ == "edis_sac":
        networks.append((lambda: script.Denoiser(14, 64, 3), 3))
    for make, hidden in networks:
        exact, coarse = (at_precision(precision, partial(passes, make)) for precision in ("highest", "medium"))
        rounded = []
        for (_, *fine), (product, *rough) in zip(exact, coarse, strict=True):
            errors = [((a - b).norm() / a.norm()).item() for a, b in zip(fine, rough, strict=True)]
            rounded.append(max(errors) > 1e-5)
            if rounded[-1]:
                assert (rough[0] - product).norm() < 1e-3 * product.norm()  # halves can round either way
                assert min(errors) > 1e-4 and max(errors) < 1e-2
        assert rounded == [False, *[True] * hidden, False]


def test_samples_agree_whatever_the_products(at_precision):
    """Guided and not, from the same noise: bfloat16 moves each by less than a hundredth of the deviation."""
    import edis_sac

    args = edis_sac.parse_args([])
    edm = edis_sac.EDM(args.sampling_steps, args.churn, CPU, args.sigma_min, args.sigma_max)

    def sample(guided):
        networks = edis_sac.make_networks(11, 3, args, CPU)
        steering = edis_sac.make_guidance(networks["energies"], (1.0, 1.0, 1.0), True, args.guidance_clip)
        return edm.sample(networks["denoiser_ema"], torch.randn(100, 25), steering if guided else None)

    for guided in (False, True):
        exact, coarse = (at_precision(precision, partial(sample, guided)) for precision in ("highest", "medium"))
        assert 1e-5 < (coarse - exact).square().mean().sqrt() / exact.std() < 0.01
