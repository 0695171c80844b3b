"""What a CUDA graph needs, shown on the CPU: a recorder of operations stands in for the graph.

Like a graph it keeps the operations and the tensors of one call; a number that Python read or chose in it is frozen.
"""

import importlib
import sys
import types
from unittest import mock

import pytest
import test_run  # noqa: F401 (has Toy-v0)
import torch
from conftest import CPU, EDP, ROOT, same_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import edp_iql


def storages(tree):
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}


class Recorder(TorchDispatchMode):
    """As `with torch.cuda.graph(recorder)`: what is computed is recorded and undone; `replay` computes it."""

    recorders = []

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.before = [], set(), {}
        self.recorders.append(self)

    def __enter__(self):
        self.state = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = storages((args, kwargs))
        for pointer, storage in given.items():
            if pointer not in self.made:
                self.before.setdefault(pointer, (storage, storage.clone()))
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        new = [x for x in tensors if x.untyped_storage().data_ptr() not in given]
        self.made |= storages(new).keys()
        self.operations.append((func, args, kwargs or {}, out, {id(x) for x in new}))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)
        torch.set_rng_state(self.state)

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
        self.methods = {name: getattr(torch.Tensor, name) for name in ("cpu", "numpy", "tolist")}  # no operations
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, lambda *args, f=method, **options: self.counted(f, *args, **options))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)

    def counted(self, method, *args, **options):
        self.count += 1
        return method(*args, **options)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = any(getattr(x, "dtype", 0) == torch.bool for x in tree_leaves(args))
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
        self.count += name in ("index", "index_put_") and masks
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_cuda(monkeypatch):
    """The script as it runs on cuda, with graphs, but on the CPU and uncompiled."""
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(Recorder, "recorders", [])

    def load(name):
        source = (ROOT / f"{name}.py").read_text().replace('if device.type == "cuda":', "if True:")
        module = types.ModuleType(name)
        module.__file__ = str(ROOT / f"{name}.py")
        monkeypatch.setitem(sys.modules, name, module)  # for dataclasses
        exec(source, module.__dict__)
        return module

    return load


@pytest.mark.parametrize("name", EDP)
def test_a_captured_run_is_the_run(run, on_cuda, name):
    """Bit for bit: batches, noise and candidates are drawn anew in each replay."""
    flags = ["--num-updates", 10, "--eval-every", 5, "--log-every", 1]
    eager = run(importlib.import_module(name), *flags)
    captured = run(on_cuda(name), *flags, "--compile", "on")
    assert len([graph for graph in Recorder.recorders if graph.operations]) >= 2  # updates and decisions
    same_run(importlib.import_module(name), eager, captured)


@pytest.mark.parametrize("sampler", ["dpm-solver", "ddpm"])
def test_a_decision_waits_for_nothing(sampler):
    diffusion = edp_iql.Diffusion(edp_iql.Args(diffusion_steps=30, sampler=sampler), CPU)
    networks, s = edp_iql.make_networks(11, 3), torch.randn(4, 11)
    with HostReads() as reads:
        edp_iql.select_actions(diffusion, networks["policy"], networks["critic"], s, 5)
    assert reads.count == 0


def test_updates_wait_for_nothing(run, script):
    """More updates between two logs, no more reads."""
    counts, rare = [], ["--log-every", 99, "--save-every", 99, "--eval-every", 99]
    for updates in (4, 7):
        with HostReads() as reads:
            run(script, *rare, "--num-updates", updates, env_id="Toy-v0")
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_what_is_counted_as_a_wait():
    x = torch.arange(3)
    with HostReads() as reads:
        x.sum().item(), float(x[0]), bool(x.any()), x[x > 0], x[x[1]], x.nonzero(), x.cpu(), x.numpy(), x.tolist()
    assert reads.count == 9
