"""Updates and samples per second beside the arithmetic floor: python benchmark_results/speed.py

Each case runs in a process of its own: Hopper's sizes, random data, one thread unless told otherwise; medians of
several repetitions. The floor is the time that the update's matrix products would take at the rate of 256 x 256
products measured in the same process. Accelerated is what --compile on does: compiled networks, on cuda one graph per
update; on a CPU measured with twice the threads too. Start-up is that of the script itself, up to its first update,
once, with nothing compiled before. Writes speed.json and the README's tables. Run it on an idle machine.
"""

import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
SCRIPTS = ("edp_iql", "edp_crr", "edp_td3", "edis_sac")
DDPM = ["--sampler", "ddpm", "--beta-schedule", "vp", "--diffusion-steps"]
UPDATES = {
    "EDP-IQL": ["edp_iql"],
    "EDP-CRR, K = 1000, DPM-Solver 15": ["edp_crr"],
    "EDP-TD3, K = 1000, DPM-Solver 15": ["edp_td3"],
    **{f"EDP-TD3, DDPM, K = {K}": ["edp_td3", *DDPM, str(K)] for K in (5, 15, 100)},
    **{f"Diffusion-QL, DDPM, K = {K}": ["edp_td3", "--no-action-approximation", *DDPM, str(K)] for K in (5, 15, 100)},
    "EDIS, SAC's update": ["edis_sac", "--cql-alpha", "0"],
    "EDIS, with the CQL penalty, 2 actions": ["edis_sac", "--cql-actions", "2"],
    "EDIS, with the CQL penalty, 10 actions": ["edis_sac"],
    **{
        f"EDP-{x.upper()}, batch {n}": [f"edp_{x}", "--batch-size", str(n)]
        for n in (1024, 4096)
        for x in ("iql", "td3")
    },
}
SAMPLES = {
    "DPM-Solver, 15 calls, K = 1000": [],
    "DDPM, K = 100": ["--sampler", "ddpm", "--diffusion-steps", "100"],
    "DDPM, K = 1000": ["--sampler", "ddpm"],
}
DECISIONS = {"one environment": 1, "ten environments at once": 10}
STARTS = {
    "`--help`": ["--help"],
    "first update": ["--log-every", "1", "--compile", "off"],
    "first update, `--compile on`": ["--log-every", "1", "--compile", "on"],
}
GENERATIONS = {  # bundled preset; paper's size: data, samples at a time on a CPU
    "EDIS, denoiser 3 x 256, energies 3 x 128, 32 levels": ("hopper-medium-mini", 1_000),
    "EDIS, denoiser 6 x 1024, energies 3 x 256, 128 levels": ("hopper-medium-v2", 100),
}


@dataclass
class Args:
    """Measure updates and samples per second."""

    case: str | None = None
    """measure this one and print it (used by the command itself)"""
    threads: int = 1
    """CPU threads"""
    device: str = "cpu"
    """device"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """of the scripts"""
    seconds: float = 2.0
    """length of one repetition, of five"""


def rate(step: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Calls per second, median of five repetitions after a warm-up."""

    def repeat(duration: float) -> float:
        calls, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < duration:
            step()
            calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        return calls / (time.perf_counter() - begin)

    repeat(seconds / 2)
    return statistics.median(repeat(seconds) for _ in range(5))


def floor(step: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Calls per second if all were matrix products, at the rate of 256 x 256 ones."""
    with FlopCounterMode(display=False) as counter:
        step()
    x = torch.randn(256, 256, device=device)

    def multiply() -> None:
        for _ in range(100):
            x @ x

    multiply()
    if device.type == "cuda":  # else the host's launches would be measured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply()
    products = 100 * rate(graph.replay if device.type == "cuda" else multiply, seconds / 4, device)
    return products * 2 * 256**3 / counter.get_total_flops()


def measure(name: str, args: Args) -> dict[str, float]:
    """One case, in this process."""
    sys.path.insert(0, str(HERE.parent))
    env_id, samples = GENERATIONS.get(name, ("hopper-medium-v2", 256))
    flags = ["edis_sac"] if name in GENERATIONS else UPDATES.get(name) or ["edp_iql", *SAMPLES.get(name, [])]
    script, device = importlib.import_module(flags[0]), torch.device(args.device)
    common = ["--env-id", env_id, "--num-threads", str(args.threads), "--device", args.device]
    given = script.parse_args([*common, "--matmul-precision", args.matmul_precision, "--compile", "on", *flags[1:]])
    script.check_args(given)
    script.set_up(given)
    B, cuda = given.batch_size, device.type == "cuda"
    s, a = torch.randn(B, 11, device=device), 2 * torch.rand(B, 3, device=device) - 1
    batch = {"s": s, "a": a, "next_s": torch.randn_like(s)}
    batch |= {"r": torch.randn(B, device=device), "mask": torch.ones(B, device=device)}
    if flags[0] == "edis_sac":
        networks = script.make_networks(11, 3, given, device)
        edm = script.EDM(given.sampling_steps, given.churn, device)
        update, _ = script.make_update(given, networks)
        update, compiled = script.partial(update, cql_alpha=given.cql_alpha), [networks["denoiser_ema"]]
        batch["mc"] = torch.zeros(B, device=device)
        samples = given.chunk if cuda else samples

        def draw() -> dict[str, torch.Tensor]:
            return {}
    else:
        diffusion = script.Diffusion(
            given.diffusion_steps, given.sampler, given.sampler_steps, given.solver_order, device, given.beta_schedule
        )
        networks = script.make_networks(11, 3, device)
        update, _ = script.make_update(given, diffusion, networks)
        compiled = list(networks.values())

        def draw() -> dict[str, torch.Tensor]:
            return script.draw(given, diffusion, 3, device, 0)

    def accelerate() -> None:
        nonlocal update
        script.compile_networks(given, compiled, device)
        update = script.Captured(update) if cuda else update

    def step() -> None:
        update(**batch, **draw())

    def sample(guidance: Any = None) -> None:
        with torch.no_grad():
            if name in SAMPLES:
                diffusion.sample(networks["policy"], s, torch.randn(diffusion.draws, B, 3, device=device))
            else:
                edm.sample(networks["denoiser_ema"], torch.randn(samples, 25, device=device), guidance)

    if name in UPDATES:
        found = {"updates_per_second": rate(step, args.seconds, device), "floor": floor(step, args.seconds, device)}
        memory = peak(device)  # without the compiler's
        if cuda or not {"edis_sac", "ddpm"} & set(flags):  # on a CPU compiling takes longer than measuring
            accelerate()
            found["accelerated"] = rate(step, args.seconds, device)
        return found | {"peak_MiB": memory}
    if cuda:
        accelerate()
    if name in SAMPLES:
        found = {"actions_per_second": B * rate(sample, args.seconds, device)}
    elif name in DECISIONS:
        parts, generator = (diffusion, networks["policy"], networks["critic"]), torch.Generator(device)
        s = torch.randn(DECISIONS[name], 11, device=device)
        found = {"ms": 1e3 / rate(lambda: script.select_actions(*parts, s, 50, generator), args.seconds, device)}
    else:
        guidance = script.make_guidance(networks["energies"], (1.0, 1.0, 1.0), True, given.guidance_clip)
        found = {}
        for kind, given in (("unguided", None), ("guided", guidance)):
            make = partial(sample, given)
            found[f"{kind}_per_second"] = samples * rate(make, args.seconds, device)
            found[f"{kind}_floor"] = samples * floor(make, args.seconds, device)
    return found | {"peak_MiB": peak(device)}


def peak(device: torch.device) -> float:
    """MiB: of the device, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start(script: str, flags: list[str], args: Args) -> float:
    """Seconds until a script has logged its first update, or has ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / f"{script}.py"), *flags]
        command += ["--runs-dir", folder, "--device", args.device] if "--help" not in flags else []
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        begin = time.perf_counter()
        with subprocess.Popen(command, **options, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}) as process:
            assert process.stdout
            for line in process.stdout:
                if "update 1/" in line:
                    process.kill()
                    break
        return time.perf_counter() - begin


def main(args: Args) -> None:
    if args.case:
        print(json.dumps(measure(args.case, args)))
        return

    def run(name: str, threads: int) -> dict[str, float]:
        command = [sys.executable, __file__, "--case", name, "--threads", str(threads), "--device", args.device]
        command += ["--seconds", str(args.seconds), "--matmul-precision", args.matmul_precision]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    results = {}
    for name in [*UPDATES, *SAMPLES, *DECISIONS, *GENERATIONS]:
        results[name] = run(name, args.threads)
        if "accelerated" in results[name] and args.device == "cpu":
            results[name]["twice_the_threads"] = run(name, 2 * args.threads)["accelerated"]
        print(name, results[name], flush=True)
    starts = {name: {s: start(s, flags, args) for s in SCRIPTS} for name, flags in STARTS.items()}
    about = {"torch": torch.__version__, "machine": platform.machine(), "device": args.device, "threads": args.threads}
    about |= {"instructions": torch.backends.cpu.get_cpu_capability(), "matmul_precision": args.matmul_precision}
    (HERE / "speed.json").write_text(
        json.dumps({**about, "results": results, "seconds_to_start": starts}, indent=1) + "\n"
    )
    columns = "update, batch 256 if not said | updates/s | accelerated | twice the threads | floor | share of the floor"
    lines = [f"| {columns} | peak memory, MiB |", "|---|---|---|---|---|---|---|"]
    for name in UPDATES:
        r = results[name]
        speed, bound = r["updates_per_second"], r["floor"]
        fast, wide = (f"{r[key]:.1f}" if key in r else "" for key in ("accelerated", "twice_the_threads"))
        share = (r["accelerated"] if args.device.startswith("cuda") else speed) / bound  # of what is the default there
        lines.append(f"| {name} | {speed:.1f} | {fast} | {wide} | {bound:.1f} | {share:.2f} | {r['peak_MiB']:.0f} |")
    lines += ["", "| sampling, batch 256 | actions/s | peak memory, MiB |", "|---|---|---|"]
    for name in SAMPLES:
        r = results[name]
        lines.append(f"| {name} | {r['actions_per_second']:.0f} | {r['peak_MiB']:.0f} |")
    lines += ["", "| a decision: 50 candidates, DPM-Solver 15 | ms |", "|---|---|"]
    lines += [f"| {name} | {results[name]['ms']:.1f} |" for name in DECISIONS]
    head = "| synthetic transitions | guided/s | floor | unguided/s | floor | peak memory, MiB |"
    lines += ["", head, "|---|---|---|---|---|---|"]
    for name in GENERATIONS:
        r = results[name]
        speeds = " | ".join(f"{r[f'{x}_{y}']:.0f}" for x in ("guided", "unguided") for y in ("per_second", "floor"))
        lines.append(f"| {name} | {speeds} | {r['peak_MiB']:.0f} |")
    lines += ["", f"| seconds | {' | '.join(f'`{s}.py`' for s in SCRIPTS)} |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{found[s]:.1f}' for s in SCRIPTS)} |" for name, found in starts.items()]
    lines += ["", f"{args.device}, {args.threads} thread, {about['instructions']}, torch {torch.__version__}."]
    rates = {name: r.get("updates_per_second") or r.get("actions_per_second", 0) for name, r in results.items()}
    steps = (5, 15, 100)
    gains = [f"{rates[f'EDP-TD3, DDPM, K = {K}'] / rates[f'Diffusion-QL, DDPM, K = {K}']:.1f}" for K in steps]
    solver, *ancestral = (rates[name] for name in SAMPLES)
    lines += [
        f"With the same sampler for the targets, action approximation makes an update {', '.join(gains)} times as",
        f"fast as Diffusion-QL's at K = {', '.join(map(str, steps))}; DPM-Solver samples",
        f"{solver / ancestral[0]:.0f} and {solver / ancestral[1]:.0f} times as fast as DDPM with 100 and 1000 steps.",
    ]
    readme = HERE.parent / "README.md"
    mark = "<!-- generated by benchmark_results/speed.py -->\n"
    before, rest = readme.read_text().split(mark)
    table = "\n".join(lines) + "\n"
    readme.write_text(f"{before}{mark}{table}{rest[rest.index('<!-- end -->') :]}")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
