"""examples/forks: each diff is short, applies to the scripts, and gives what its line in the README says."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

FORKS = {  # diff: script, options, and a check of the first line of log.jsonl
    "loss": ("dpo", "--loss apo", lambda line: abs(line["loss"] - 1) < 1e-6),
    "reward": ("ppo", "--length_penalty 100", lambda line: line["objective/scores"] < -50),
    "advantage": ("ppo", "--advantage dr_grpo --samples_per_prompt 2 --ppo_epochs 1",
                  lambda line: line["first/policy/ratio"] == 1 and "val/clipfrac" not in line)}


@pytest.mark.parametrize("name", FORKS)
def test_forks_apply_and_run(name, place, trained, tmp_path):
    """On a copy, as a reader would: policy = reference gives APO-zero 1 − σ(0) + σ(0) = 1."""
    script, options, holds = FORKS[name]
    diff = tiny.ROOT / "examples" / "forks" / f"{name}.diff"
    lines = [line for line in diff.read_text().splitlines() if line[:3] not in ("+++", "---")]
    changed = [line for line in lines if line[0] in "+-"]
    assert len(changed) <= 12
    for file in [*tiny.ROOT.glob("*.py"), tiny.ROOT / "option_names.json"]:
        shutil.copy(file, tmp_path)
    shutil.copytree(tiny.ROOT / "templates", tmp_path / "templates")
    subprocess.run(["git", "apply", diff], cwd=tmp_path, check=True)
    argv = (f"--model {trained}/model --images {place}/images --out {tmp_path}/out --batch_size 4"
            " --max_steps 1")
    if script == "dpo":
        argv += f" --data {place}/pairs.json"
    else:
        argv += (f" --data {trained}/rows.json --reward_model {trained}/reward --rollout_batch 4"
                 " --max_new_tokens 6 --missing_eos_score 0")
    done = subprocess.run([sys.executable, f"{script}.py", *argv.split(), *options.split()], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert holds(line), line
