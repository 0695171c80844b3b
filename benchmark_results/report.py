"""Tables and figures from the raw runs: python benchmark_results/report.py

Writes benchmark_results/results.md and learning_curves.png. Per data set and variant: means over seeds of the last
evaluation, of the mean of the last ten and of the best one; the interquartile mean of the last evaluation's episodes
over all seeds with a 95 % bootstrap interval; updates per second.
"""

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
LABELS = {"edp_iql": "EDP-IQL", "bc": "behaviour cloning"}
COLOURS = {"edp_iql": "#4477aa", "bc": "#cc6677"}


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half."""
    ordered = np.sort(values)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def main() -> None:
    statistics = json.loads((HERE.parent / "datasets" / "statistics.json").read_text())
    runs: dict[str, dict[str, list[Path]]] = {}
    for folder in sorted((HERE / "raw").glob("*__*__*")):
        env_id, variant, _ = folder.name.split("__")
        runs.setdefault(env_id, {}).setdefault(variant, []).append(folder)

    columns = "data | mean return of the data | algorithm | seeds | updates | last | mean of last 10 | best"
    lines = [f"| {columns} | IQM of last [95 %] | updates/s |", "|" + "---|" * 10]
    fig, axes = plt.subplots(
        1, max(len(runs), 1), figsize=(5.5 * max(len(runs), 1), 3.6), squeeze=False, constrained_layout=True
    )
    rng = np.random.default_rng(0)
    for ax, (env_id, variants) in zip(axes[0], runs.items(), strict=False):
        data_mean = statistics[env_id]["return_mean"]
        ax.axhline(data_mean, color="grey", linestyle="--", linewidth=1, label="mean return of the data")
        for variant, folders in variants.items():
            curves, last, results = [], [], []
            for folder in folders:
                with open(folder / "evaluations.csv") as file:
                    rows = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
                steps = sorted({step for step, _ in rows})
                curves.append([np.mean([r for s, r in rows if s == step]) for step in steps])
                last += [r for s, r in rows if s == steps[-1]]
                results.append(json.loads((folder / "result.json").read_text()))
            for curve in curves:
                ax.plot(steps, curve, color=COLOURS[variant], linewidth=0.7, alpha=0.5)
            ax.plot(
                steps, np.mean(curves, axis=0), color=COLOURS[variant], label=f"{LABELS[variant]}, {len(curves)} seeds"
            )
            sample = [interquartile_mean(rng.choice(last, len(last))) for _ in range(2_000)]
            low, high = np.percentile(sample, [2.5, 97.5])
            mean = {key: np.mean([r["return"][key] for r in results]) for key in ("last", "mean_of_last_10", "best")}
            speed = np.median([r["updates_per_second"] for r in results])
            lines.append(
                f"| {env_id} | {data_mean:.0f} | {LABELS[variant]} | {len(folders)} | {steps[-1]} | {mean['last']:.0f} "
                f"| {mean['mean_of_last_10']:.0f} | {mean['best']:.0f} "
                f"| {interquartile_mean(np.array(last)):.0f} [{low:.0f}, {high:.0f}] | {speed:.0f} |"
            )
        ax.set(title=env_id, xlabel="updates", ylabel="return")
        ax.legend(frameon=False, fontsize=8)
    fig.savefig(HERE / "learning_curves.png", dpi=110)
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
