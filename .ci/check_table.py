"""Whether the chain's table says what alignment is for: fewer inventions, nothing less said, and rewards that
put pairs in the right order; else exits 1."""
import json
import operator
import sys
from pathlib import Path

HOLDS = {"<": operator.lt, ">": operator.gt, ">=": operator.ge}
records = json.loads(Path(sys.argv[1]).read_text())
found = {(Path(r["file"]).stem, r["over"]): r for r in records if r.get("sets") == "all"}
right = {(Path(r["file"]).stem, r["pairs"]): r["accuracy"] for r in records if "pairs" in r}
sft, sft_greedy = found["sft-sampled", "4 samples"], found["sft-greedy", "answer"]
ppo, ppo_greedy = found["ppo-sampled", "4 samples"], found["ppo-greedy", "answer"]

needs = []  # name, value, and what it is to be
for name, after in (("best of 8", found["best-of-8", "answer"]), ("DPO", found["dpo-sampled", "4 samples"]),
                    ("PPO", ppo)):
    needs += [(f"{name}: chair_s", after["chair_s"], "<", sft["chair_s"] / 2),
              (f"{name}: coverage", after["coverage"], ">", sft["coverage"] - 0.03),
              (f"{name}: exact", after["exact"], ">", sft["exact"])]
needs += [("PPO: chair_s", ppo["chair_s"], "<", sft["chair_s"] / 3),
          ("PPO: coverage", ppo["coverage"], ">", sft["coverage"]),
          ("PPO: exact", ppo["exact"], ">", sft["exact"] + 0.1),
          ("PPO: well_formed", ppo["well_formed"], ">", 0.9),
          ("PPO greedy: exact", ppo_greedy["exact"], ">", sft_greedy["exact"] - 0.08),
          ("PPO greedy: exact", ppo_greedy["exact"], ">=", 0.85)]
for kind, least in (("added", 0.95), ("recoloured", 0.95), ("dropped", 0.95), ("reshaped", 0.9)):
    needs.append((f"rewards: {kind}", right["rewards", kind], ">=", least))
needs.append(("rewards: sampled", right["rewards-sampled", "sampled"], ">=", 0.8))

wrong = 0
for name, value, sign, bound in needs:
    good = HOLDS[sign](value, bound)
    print(f"{name} {value:.3f} {sign} {bound:.3f}{'' if good else ': WRONG'}")
    wrong += not good
sys.exit(bool(wrong))
