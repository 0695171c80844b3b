"""Curves of a run beside the official code's: python benchmark_results/parity.py RUN

RUN is the folder of
    python edp_iql.py --env-id hopper-medium-replay-mini --lr 3e-4 --guidance-coef 1 --no-normalize-observations \
        --sampler ddpm --max-grad-norm 4 --num-updates 60000 --eval-every 30000 --log-every 100 --eval-candidates 10
Its values go into parity.json beside the official ones (sail-sg/edp at b019648, the same settings and data): means over
every 100th update of the 2000 before `step`. report.py makes the table and the figure.
"""

import json
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("parity.json")
NAMES = {"Q": "q_mean", "V": "v_mean", "diffusion loss": "diffusion_loss", "V loss": "value_loss", "Q loss": "qf1_loss"}


def main(run: Path) -> None:
    curves = json.loads(FILE.read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours: dict[str, list[float]] = {name: [] for name in NAMES}
    for step in curves["step"]:
        window = [row for row in rows if step - 2_000 < row["step"] <= step and "losses/q_mean" in row]
        for name, key in NAMES.items():
            ours[name].append(round(float(np.mean([row[f"losses/{key}"] for row in window])), 4))
    returns = {row["step"]: row["charts/episodic_return"] for row in rows if "charts/episodic_return" in row}
    about = json.loads((run / "args.json").read_text())
    curves["here"] = ours | {"returns": returns, "commit": about["commit"], "seed": about["args"]["seed"]}
    FILE.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
