"""benchmarks/gpu.py: every stage runs in small sizes without a GPU and finds what a CPU must find; a stage
that fails or hangs is reported, and the next one runs. No timing is asserted."""
import argparse
import functools
import json
import math
import sys
import time

import pytest
import tiny


def test_every_stage_finds_what_a_cpu_must_find(tmp_path):
    """All stages, as a user starts them: resumes, exports and ranks agree, and transformers with ours."""
    done = tiny.command("benchmarks/gpu", "--tiny", "--out", tmp_path)
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log"]
    found = json.loads((tmp_path / "gpu.json").read_text())
    stages = {name: value for name, value in found.items() if isinstance(value, dict)}
    assert [*stages] == "card parity scripts decode sft dpo full ppo ranks".split()
    for name, stage in stages.items():
        assert stage["end"] == "done" and len(stage) > 2, (name, stage)
        json.dumps(stage, allow_nan=False)  # raises
    for name, errors in found["parity"].items():  # with itself in fp32; bf16 is close
        fp32 = name.endswith("fp32")
        if "answers/" in name:
            assert max(errors.values()) < (1e-5 if fp32 else 0.1), (name, errors)
        elif isinstance(errors, dict):
            assert errors["graph_is_eager"] and (errors["equal_to_cpu"] == 1 or not fp32), (name, errors)
    assert found["parity"]["lora/fp32"] < 1e-5
    assert found["scripts"]["resume_difference"] == 0 and found["scripts"]["export_error"] < 1e-5
    assert found["scripts"]["dpo"]["loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert found["ranks"]["loss_error"] < 1e-5 and found["ranks"]["gradient_error"] < 1e-4
    assert found["decode"]["equal_tokens/8"] == 1  # greedy ones, as transformers'
    for script in ("sft", "dpo"):
        ours, peer = found[script]["ours"], found[script]["transformers"]
        if isinstance(peer, dict):  # peft is installed: steps from the same adapters
            assert peer["loss"] == pytest.approx(ours["loss"], abs=1e-3)
    assert found["ppo"]["metrics"]["first/policy/ratio"] == pytest.approx(1)


def fail(found, args):
    found.add("before", 1.23456)
    raise ValueError("the reason")


def hang(found, args):
    found.add("before", 1)
    time.sleep(60)


def run_broken_stages(out):
    sys.path.insert(0, str(tiny.ROOT / "benchmarks"))
    import gpu
    args = argparse.Namespace(out=str(out), tiny=True)
    stages = {"fails": fail, "hangs": hang, "ends": lambda found, args: found.add("after", 2)}
    results = {name: gpu.run_stage(name, stage, args, 1) for name, stage in stages.items()}
    (out / "results.json").write_text(json.dumps(results))


def test_a_failing_stage_is_reported_and_the_next_one_runs(tmp_path):
    tiny.spread(functools.partial(run_broken_stages, tmp_path), 1)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["fails"]["end"] == "failed" and results["fails"]["before"] == 1.235
    assert results["fails"]["error"].startswith("ValueError: the reason (")
    assert results["hangs"]["end"] == "cut after 1 s" and results["hangs"]["before"] == 1
    assert results["ends"]["end"] == "done" and results["ends"]["after"] == 2


def test_a_stage_runs_without_a_fork_and_no_gpu_is_an_error(tmp_path):
    done = tiny.command("benchmarks/gpu", "--tiny", "--out", tmp_path, "--stage", "card")
    assert done.code == 0, done.err
    assert "matrix_tflops" in json.loads((tmp_path / "card.part.json").read_text())
    done = tiny.command("benchmarks/gpu", "--out", tmp_path)
    assert done.code == 2 and "got no GPU" in done.err
