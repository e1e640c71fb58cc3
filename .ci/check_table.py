"""Whether the chain's table says what alignment is for: fewer inventions, nothing less said; else exits 1."""
import json
import sys
from pathlib import Path

found = {(Path(r["file"]).stem, r["over"]): r for r in json.loads(Path(sys.argv[1]).read_text())
         if r.get("sets") == "all"}
sft, best = found["sft-sampled", "4 samples"], found["best-of-8", "answer"]
wrong = []
for name, after in (("best of 8", best), ("DPO", found["dpo-sampled", "4 samples"]),
                    ("PPO", found["ppo-sampled", "4 samples"])):
    for figure, better in (("chair_s", after["chair_s"] < sft["chair_s"] / 2),
                           ("coverage", after["coverage"] > sft["coverage"] - 0.03),
                           ("exact", after["exact"] > sft["exact"])):
        line = f"{name}: {figure} {after[figure]:.3f} after {sft[figure]:.3f}"
        print(line if better else f"{line}: WRONG")
        wrong += [] if better else [line]
sys.exit(bool(wrong))
