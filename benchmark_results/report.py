"""Tables and figures from the raw runs: python benchmark_results/report.py

Writes the README's tables and its figures, the one of speed from speed.json, a table from candidates.json. Per data set
and variant: means and standard deviations over seeds of the last evaluation, of the mean of the last ten and of the
best one; the interquartile mean of the last evaluation's episodes over all seeds with a 95 % bootstrap interval, seeds
resampled first, then episodes within each. For EDIS, where all is of the online phase, its difference to the other
variants seed by seed, and the distances of its synthetic transitions with and without guidance too.
"""

import csv
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
LABELS = {
    "edp_iql": "EDP-IQL", "edp_crr": "EDP-CRR", "edp_td3": "EDP-TD3", "bc": "behaviour cloning",
    "bc_q": "behaviour cloning, selected by Q", "edp_iql_1": "EDP-IQL, one candidate",
    "edp_crr_1": "EDP-CRR, one candidate", "edp_td3_1": "EDP-TD3, one candidate",
    "weighted": "EDP-IQL, coefficient 1", "weighted_1": "EDP-IQL, coefficient 1, one candidate",
    "elbo": "EDP-IQL, weighted ELBO", "bf16": "EDP-IQL, bfloat16 products",
    "diffusion_ql": "Diffusion-QL, 5 steps", "diffusion_ql_tau": "Diffusion-QL, target rate 0.005",
    "iql": "IQL, feed-forward", "td3_bc": "TD3+BC, feed-forward",
    "edis": "EDIS", "synther": "SynthER, without energies", "offline": "real offline data instead",
    "none": "online data only", "edis_no_state": "EDIS without E1", "edis_no_policy": "EDIS without E2",
    "edis_no_transition": "EDIS without E3", "edis_no_energies": "EDIS without energies",
    "edis_inpainted": "EDIS, inpainted negatives", "exact": "what the energies aim at, exact",
    "exact_no_state": "the same at the states of all data",
}  # fmt: skip
FORWARD = ("iql", "td3_bc")  # no diffusion
COMPARED = ("edis", "synther", "offline", "none")  # in one figure; EDIS and all that is not listed in another
OTHERS = ("edp_crr_1", "edp_td3_1")  # in tables only
PARTS = ("edp_iql", "bc", "bc_q", "edp_iql_1", "weighted", "weighted_1", "elbo")  # in a figure, three in the other too
DRAWN = ("bc_q", "edp_iql", "weighted", "elbo", "edp_td3")  # policies whose candidates are compared
SHADES = (0, 2, 4, 6, 12, 1, 3, 5, 18, 19, 8, 1, 14, 14, 8, 10, 0, 2, 4, 6, 8, 10, 12, 18, 3, 14, 16)
COLOURS = dict(zip(LABELS, map(plt.get_cmap("tab20"), SHADES), strict=True))
DISTANCES = {  # and the energy that aims at it
    "state": ("states to the recent ones", "state"), "policy": ("actions to the policy's", "policy"),
    "dynamics": ("dynamics error, mean", "transition"),
    "dynamics_rms": ("dynamics error, root mean square", "transition"),
}  # fmt: skip


class Job(NamedTuple):
    """A finished run: its evaluations' steps and mean returns, the last one's episodes, result.json, metrics.jsonl.

    EDIS counts from its first online step; what is below 0 is offline.
    """

    steps: list[int]
    curve: list[float]
    last: list[float]
    result: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def online(self) -> list[float]:
        """The curve without its offline part; that of the EDP scripts has none."""
        return [r for step, r in zip(self.steps, self.curve, strict=True) if step > 0]


Runs = dict[str, dict[str, dict[str, Job | None]]]  # by data set, variant and seed; None: diverged


def only(runs: Runs, wanted: Callable[[str], bool]) -> Runs:
    """The runs of some variants."""
    return {env_id: {v: jobs for v, jobs in variants.items() if wanted(v)} for env_id, variants in runs.items()}


def finished(jobs: dict[str, Job | None]) -> list[Job]:
    return [job for job in jobs.values() if job]


def load(folder: Path) -> Job | None:
    """None: it diverged. Exit 2 where the folder holds neither a result nor a divergence."""
    if (folder / "diagnostics.json").exists():
        return None
    try:
        return load_finished(folder)
    except (OSError, ValueError, KeyError, IndexError) as error:
        print(f"report.py: error: {folder} is not a finished run: {error!r}", file=sys.stderr)
        raise SystemExit(2) from None


def load_finished(folder: Path) -> Job:
    with open(folder / "evaluations.csv") as file:
        rows = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
    steps = sorted({step for step, _ in rows})
    curve = [float(np.mean([r for s, r in rows if s == step])) for step in steps]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [r for s, r in rows if s == steps[-1]]
    start = json.loads((folder / "args.json").read_text())["args"].get("offline_updates", {"value": 0})["value"]
    return Job([step - start for step in steps], curve, last, json.loads((folder / "result.json").read_text()), metrics)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis."""
    ordered, cut = np.sort(values), values.shape[-1] // 4
    return ordered[..., cut : values.shape[-1] - cut].mean(-1)


def over_seeds(rows: list[tuple[Any, ...]], decimals: int = 0) -> str:
    """Cells: means over seeds, from two on with their standard deviation."""
    values = np.array(rows)
    cells = [f"{value:.{decimals}f}" for value in values.mean(0)]
    if len(rows) > 1:
        cells = [f"{cell} ± {value:.{decimals}f}" for cell, value in zip(cells, values.std(0, ddof=1), strict=True)]
    return " | ".join(cells)


def by_data(columns: str, rows: dict[str, list[str]]) -> list[str]:
    """A table for each data set that has rows, under its title: narrow enough for a phone."""
    lines = []
    for title, cells in rows.items():
        if cells:
            head = (f"| {columns} |", "|" + "---|" * (columns.count("|") + 1))
            lines += [f"**{title}**", "", *head, *(f"| {row} |" for row in cells), ""]
    return lines


def results_table(runs: Runs, statistics: dict[str, Any], unit: str) -> list[str]:
    rows: dict[str, list[str]] = {}
    for env_id, variants in runs.items():
        length = max((job.steps[-1] for jobs in variants.values() for job in finished(jobs)), default=0)
        title = f"{env_id}: {length} {unit}; mean return of the data {statistics[env_id]['return_mean']:.0f}"
        lines = rows[title] = []
        for variant, all_jobs in variants.items():
            jobs, name = finished(all_jobs), f"{LABELS[variant]} `{variant}`"
            seeds = (
                f"{len(jobs)}, {len(all_jobs) - len(jobs)} diverged" if len(jobs) < len(all_jobs) else f"{len(jobs)}"
            )
            if not jobs:
                lines.append(f"{name} | {seeds}" + " | -" * 4)
                continue
            if jobs[0].steps[-1] < length:
                name += f", {jobs[0].steps[-1]} {unit}"
            last = np.array([job.last for job in jobs])
            rng = np.random.default_rng(0)  # a row does not depend on the rows before it
            seed = rng.integers(len(jobs), size=(10_000, len(jobs), 1))
            picks = last[seed, rng.integers(last.shape[1], size=(10_000, *last.shape))]
            low, high = np.percentile(interquartile_mean(picks.reshape(10_000, -1)), [2.5, 97.5])
            middle = f"{interquartile_mean(last.ravel()):.0f}" + f" [{low:.0f}, {high:.0f}]" * (len(jobs) > 1)
            means = over_seeds([(job.online[-1], np.mean(job.online[-10:]), max(job.online)) for job in jobs])
            lines.append(f"{name} | {seeds} | {means} | {middle}")
    return by_data("algorithm | seeds | last | mean of last 10 | best | IQM of last [95 %]", rows)


def summary_table(runs: Runs, statistics: dict[str, Any]) -> list[str]:
    """Means over seeds of the last ten evaluations as multiples of the data's; how many seeds, if not three."""
    lines = [f"| | {' | '.join(env_id.removesuffix('-mini').replace('-', ' ', 1) for env_id in runs)} |"]
    lines.append("|---" * (len(runs) + 1) + "|")
    for variant in LABELS:
        cells = []
        for env_id, variants in runs.items():
            seeds = variants.get(variant, {})
            jobs = finished(seeds)
            share = np.mean([np.mean(job.online[-10:]) for job in jobs] or 0) / statistics[env_id]["return_mean"]
            n = f"{len(jobs)} of {len(seeds)}" if len(jobs) < len(seeds) else f"{len(jobs)}"
            cells.append(f"{share:.1f}" + f" ({n})" * (n != "3") if jobs else "diverged" if seeds else "-")
        if {*cells} != {"-"}:
            lines.append(f"| {LABELS[variant]} | {' | '.join(cells)} |")
    return [*lines, ""]


def seeds_table(runs: Runs) -> list[str]:
    """Of each seed: the mean of the last ten evaluations; of diffusion policies the loss over the second half too."""
    table: dict[str, list[str]] = {}
    for env_id, variants in runs.items():
        lines = table[env_id] = []
        for variant, jobs in ((variant, finished(jobs)) for variant, jobs in variants.items() if finished(jobs)):
            returns = ", ".join(f"{np.mean(job.online[-10:]):.0f}" for job in jobs)
            halves = [[row for row in job.metrics if row["step"] > job.steps[-1] / 2] for job in jobs]
            key, diffuses = "losses/diffusion_loss", variant not in FORWARD
            losses = [[row[key] for row in half if key in row] for half in halves]
            each = ", ".join(f"{np.mean(x):.3f}" for x in losses) if diffuses and all(losses) else "-"
            lines.append(f"{LABELS[variant]} | {returns} | {each}")
    return by_data("algorithm | mean of last 10 | diffusion loss, second half", table)


def candidates_table(keys: dict[str, str], decimals: int) -> list[str]:
    """What candidates offer to the selection by Q, or what it returns, of candidates.json: means over seeds."""
    rows: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    found = json.loads((HERE / "candidates.json").read_text())["runs"]
    for name, values in found.items():
        if not values.keys() >= {*keys}:  # measured before these were
            continue
        env_id, variant, seed = name.split("__")
        if variant == "edp_iql_1" and f"{env_id}__edp_iql__{seed}" not in found:  # trained alike
            variant = "edp_iql"
        rows.setdefault(env_id, {}).setdefault(variant, []).append(tuple(values[key] for key in keys))
    lines = {
        env_id: [
            f"{LABELS[v]} | {len(variants[v])} | {over_seeds(variants[v], decimals)}" for v in DRAWN if v in variants
        ]
        for env_id, variants in rows.items()
        if len(variants) > 1  # there is something to compare
    }
    return by_data(f"policy | seeds | {' | '.join(keys.values())}", lines)


def precision_table(runs: Runs) -> list[str]:
    """EDP-IQL with float32 and with bfloat16 products: means of the same updates, over the seeds that both have."""
    rows: dict[str, list[str]] = {}
    losses = ("diffusion_loss", "guidance_loss", "value_loss", "qf1_loss", "q_mean", "q_max")
    keys = {"charts/episodic_return": "return", **{f"losses/{name}": f"`losses/{name}`" for name in losses}}
    for env_id, variants in runs.items():
        ours, coarse = (variants.get(name, {}) for name in ("edp_iql", "bf16"))
        pairs = [(a, b) for seed, b in coarse.items() if b and (a := ours.get(seed))]
        half = pairs[0][1].steps[-1] // 2 if pairs else 0
        for start, (key, name) in itertools.product((0, half) if pairs else (), keys.items()):
            means = [
                tuple(np.mean([r[key] for r in m if key in r and start < r["step"] <= start + half]) for m in metrics)
                for metrics in ((a.metrics, b.metrics) for a, b in pairs)
            ]
            cells = over_seeds(means, 0 if name == "return" else 3)
            title = f"{env_id}, {len(pairs)} seeds"
            rows.setdefault(title, []).append(f"{start} to {start + half} | {name} | {cells}")
    return by_data("updates | mean of | float32 | bfloat16", rows)


def paired_table(runs: Runs) -> list[str]:
    """EDIS's mean of the online evaluations less that of other variants that went on from the same agents."""
    rows: dict[str, list[str]] = {}
    for env_id, variants in runs.items():
        lines = rows[env_id] = []
        means = {
            variant: {seed: np.mean(job.online) for seed, job in jobs.items() if job}
            for variant, jobs in variants.items()
        }
        ours = means.pop("edis", {})
        for variant, theirs in means.items():
            seeds = sorted(ours.keys() & theirs.keys())
            less = [ours[seed] - theirs[seed] for seed in seeds]
            each = ", ".join(f"{value:+.0f}" for value in less)
            if less:
                lines.append(f"{LABELS[variant]} | {len(less)} | {np.mean(less):+.0f} | {each}")
    return by_data("EDIS less | seeds | mean | of each seed", rows)


def training_table(runs: Runs) -> list[str]:
    """Over seeds: the online evaluations' mean; that of the training episodes that end in each third of the phase."""
    table: dict[str, list[str]] = {}
    for env_id, variants in runs.items():
        lines = table[env_id] = []
        for variant, jobs in ((variant, finished(jobs)) for variant, jobs in variants.items() if finished(jobs)):
            rows = []
            for job in jobs:
                offline, total = job.result["updates"] - job.steps[-1], job.steps[-1]
                ends = [
                    (row["step"] - offline, row["charts/online_return"])
                    for row in job.metrics
                    if "charts/online_return" in row
                ]
                thirds = [np.mean([r for end, r in ends if i < 3 * end / total <= i + 1]) for i in range(3)]
                rows.append((np.mean(job.online), *thirds))
            lines.append(f"{LABELS[variant]} | {len(jobs)} | {over_seeds(rows)}")
    return by_data("algorithm | seeds | evaluations | training, first third | second | last", table)


def d4rl_table(runs: Runs) -> list[str]:
    """Normalised scores, mean of the last ten evaluations, feed-forward beside EDP: published, and ours where run.

    Behind ours: seeds, of how many if some diverged, and updates. Data that the paper has not come last; returns where
    they have no reference scores.
    """
    published, lines = json.loads((HERE / "published.json").read_text()), []
    env_ids = [*published["scores"], *sorted(runs.keys() - published["scores"].keys())]
    for names in (("td3_bc", "edp_td3"), ("iql", "edp_iql"), ("edp_crr",)):
        columns = " | ".join(f"{LABELS[name]}, published | ours (seeds, updates)" for name in names)
        lines += ["", f"| data | {columns} |", "|" + "---|" * (1 + 2 * len(names))]
        for env_id in env_ids:
            cells, scores = [env_id], published["scores"].get(env_id, {})
            for name in names:
                jobs = runs.get(env_id, {}).get(name, {})
                done, ours = finished(jobs), f"all of {len(jobs)} diverged" if jobs else "not run"
                if done:
                    kind = "normalized_score" if done[0].result["normalized_score"] else "return"
                    score = np.mean([job.result[kind]["mean_of_last_10"] for job in done])
                    seeds = f"{len(done)} of {len(jobs)}" if len(done) < len(jobs) else len(done)
                    ours = f"{'return ' * (kind == 'return')}{score:.1f} ({seeds}, {done[0].result['updates']})"
                cells += [f"{scores.get(name, '-')}", ours]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines[1:], "", f"Published: {published['source']}."]


def distance_table(runs: Runs) -> list[str]:
    """Means over seeds and rounds: unguided, guided by the other energies only, by all, and of real recent transitions.

    Behind a mean: in how many rounds all energies made it less.
    """
    table: dict[str, list[str]] = {}
    for env_id, variants in runs.items():
        lines = table[env_id] = []
        for variant, jobs in variants.items():
            rounds = [row for job in finished(jobs) for row in job.metrics if "guided/state" in row]
            for key, (label, energy) in DISTANCES.items() if rounds else ():
                cells = [f"{np.mean([row[f'guided/{key}'] for row in rounds]):.4f}"]
                for kind in ("unguided", f"{energy}_off"):
                    pairs = [(row[f"guided/{key}"], row[f"{kind}/{key}"]) for row in rounds if f"{kind}/{key}" in row]
                    less = f"{sum(x < y for x, y in pairs)} of {len(pairs)}"
                    cells.append(f"{np.mean(pairs, axis=0)[1]:.4f} ({less})" if pairs else "-")
                cells.append(f"{np.mean([row[f'recent/{key}'] for row in rounds]):.4f}")
                lines.append(f"{LABELS[variant]} | {label} | {' | '.join(cells)}")
    return by_data(
        "algorithm | distance | all energies | none (all: less in rounds) | all but its own (the same) | real", table
    )


def draw(runs: Runs, statistics: dict[str, Any], unit: str, path: Path, window: int = 1) -> None:
    """Means over seeds, in bands from the worst seed to the best; of the last `window` evaluations at each point."""
    rows, columns = math.ceil(len(runs) / 2), min(len(runs), 2)  # no wider than what can be read on a page
    size = (max(5.5 * columns, 7), 3.6 * rows)  # room for the legend
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    for ax in axes.flat[len(runs) :]:
        ax.set_axis_off()
    for ax, (env_id, variants) in zip(axes.flat, runs.items(), strict=False):
        mean = statistics[env_id]["return_mean"]
        ax.axhline(mean, color="grey", linestyle="--", linewidth=1, label="mean return of the data")
        for variant, jobs in ((variant, finished(jobs)) for variant, jobs in variants.items()):
            if not jobs:
                continue
            n = min(window, len(jobs[0].steps))
            curves = np.array([np.convolve(job.curve, np.full(n, 1 / n), "valid") for job in jobs])
            steps, colour = jobs[0].steps[n - 1 :], COLOURS[variant]
            label = f"{LABELS[variant]}, {len(jobs)} seed{'s' * (len(jobs) > 1)}"
            ax.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            ax.plot(steps, curves.mean(0), color=colour, label=label)
        ax.set(title=env_id, xlabel=unit, ylabel="return")
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_speed(found: dict[str, Any], path: Path) -> None:
    """Updates per second at batch 256, compiled and not, beside the arithmetic floor."""
    rates = {name: r for name, r in found["results"].items() if "updates_per_second" in r and ", batch " not in name}
    fig, ax = plt.subplots(figsize=(8, 4.2), constrained_layout=True)
    eager, bound = ([r[key] for r in rates.values()] for key in ("updates_per_second", "floor"))
    fast = [r.get("accelerated", r["updates_per_second"]) for r in rates.values()]
    ax.barh(list(rates), bound, color="lightgrey", label="floor: the matrix products alone")
    bars = ax.barh(list(rates), fast, height=0.5, color=COLOURS["edp_iql"], label="compiled, but for K = 100")
    ax.barh(list(rates), eager, height=0.2, color="black", label="not compiled")
    ax.bar_label(bars, [f"{value:.1f}" for value in fast], padding=3, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel=f"updates per second, batch 256: {found['device']}, {found['threads']} thread")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def write(tables: dict[str, list[str]]) -> None:
    """Put each table between the README's markers of its name."""
    text = README.read_text()
    for name, lines in tables.items():
        begin = f"<!-- generated by benchmark_results/report.py: {name} -->\n"
        if text.count(begin) != 1:
            print(f"report.py: error: README.md needs the line {begin[:-1]!r} once", file=sys.stderr)
            raise SystemExit(2)
        before, rest = text.split(begin)
        text = "\n".join((before + begin[:-1], *lines, rest[rest.index("<!-- end -->") :]))
    README.write_text(text)
    for lines in tables.values():
        print(*lines, sep="\n", end="\n\n")


def main() -> None:
    statistics = json.loads((HERE.parent / "datasets" / "statistics.json").read_text())
    edp: Runs = {}
    edis: Runs = {}
    d4rl: Runs = {}
    trained_on: dict[str, str | None] = {}
    order = list(LABELS)
    folders = [folder.name.split("__") for folder in (HERE / "raw").glob("*__*__*")]
    if unknown := ["__".join(parts) for parts in folders if len(parts) != 3 or parts[1] not in order]:
        print(f"report.py: error: not a data set, a known variant and a seed: {', '.join(unknown)}", file=sys.stderr)
        raise SystemExit(2)
    for env_id, variant, seed in sorted(folders, key=lambda parts: (parts[0], order.index(parts[1]), parts[2])):
        bundled = edp if order.index(variant) < order.index("edis") else edis
        runs = bundled if env_id in statistics else d4rl
        jobs = runs.setdefault(env_id, {}).setdefault(variant, {})
        jobs[seed] = load(HERE / "raw" / "__".join((env_id, variant, seed)))
        shapes = {(tuple(job.steps), len(job.last)) for job in finished(jobs)}
        if len(shapes) > 1:
            print(f"report.py: error: seeds of {env_id}__{variant} differ in evaluations or episodes", file=sys.stderr)
            raise SystemExit(2)
        about = json.loads((HERE / "raw" / "__".join((env_id, variant, seed)) / "args.json").read_text())
        if trained_on.setdefault(env_id, sha := about["dataset"].get("sha256")) != sha:
            print(f"report.py: error: {env_id}__{variant}__{seed}: of other data than the runs before", file=sys.stderr)
            raise SystemExit(2)
    # The data on which most is compared first
    edp, edis = (dict(sorted(runs.items(), key=lambda item: -len(item[1]))) for runs in (edp, edis))
    tables = {"D4RL": d4rl_table(d4rl)}
    if any("bf16" in variants for variants in edp.values()):
        tables["precision"] = precision_table(edp)
        edp = only(edp, lambda v: v != "bf16")
    if edp:
        tables |= {"EDP": results_table(edp, statistics, "updates"), "EDP, seeds": seeds_table(edp)}
        offered = {"effective": "effective share", "deviation": "deviation", "distance": "distance"}
        offered |= {"gain": "Q above the data's", "selected_gain": "of the selected"}
        tables["candidates"] = candidates_table(offered, 2)
        kept = {"promised": "promised by Q", "delivered": "delivered", "return": "undiscounted return"}
        tables["candidates, played"] = candidates_table(kept, 0)
        judged = {"by_bc_q": "selected by cloning's Q", "by_edp_td3": "by EDP-TD3's Q", "alone": "one candidate"}
        tables["candidates, judged"] = candidates_table(judged, 0)
        curves = only(edp, lambda v: v not in (*PARTS[3:], *OTHERS))
        tables["EDP, summary"] = summary_table(curves, statistics)
        for variants in curves.values():  # of the two, the one with its authors' target rate, where there is one
            variants.pop("diffusion_ql" if "diffusion_ql_tau" in variants else "", None)
        draw(curves, statistics, "updates", HERE / "learning_curves.png")
        if parted := {env_id: variants for env_id, variants in edp.items() if {*variants} & {*PARTS[2:]}}:
            draw(only(parted, PARTS.__contains__), statistics, "updates", HERE / "edp_iql_parts.png")
    if edis:
        tables["EDIS"] = results_table(edis, statistics, "online steps")
        tables |= {"EDIS, paired": paired_table(edis), "EDIS, training": training_table(edis)}
        tables["distances"] = distance_table(edis)
        unit = "online steps (below 0: offline updates)"
        draw(only(edis, COMPARED.__contains__), statistics, unit, HERE / "edis_curves.png", window=4)
        if ablated := {env_id: variants for env_id, variants in edis.items() if {*variants} - {*COMPARED}}:
            ablations = only(ablated, lambda v: v not in COMPARED[1:])
            draw(ablations, statistics, unit, HERE / "edis_ablations.png", window=4)
    draw_speed(json.loads((HERE / "speed.json").read_text()), HERE / "speed.png")
    write(tables)


if __name__ == "__main__":
    main()
