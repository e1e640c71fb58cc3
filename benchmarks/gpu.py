"""Checks and times this project on one GPU of 80 GB, with random weights: nothing is downloaded.

    python benchmarks/gpu.py --out DIR                      all stages, within --budget seconds
    python benchmarks/gpu.py --out DIR --only card,parity
    python benchmarks/gpu.py --out DIR --tiny               the same stages in small sizes, also without a GPU

    card      rates of the card; what attention costs for a new length; NaN gradients of cuDNN's attention
    parity    a small model against the CPU in fp32; decoding as a CUDA graph against eager decoding
    scripts   sft, rm, dpo, ppo and predict as a user starts them; a resume; the export in transformers
    decode    LLaVA-1.5-7B: prefill and decoding, against transformers
    sft, dpo  LoRA steps of the 7B model, against transformers with PEFT
    full      a full fine-tuning step of a LLaVA of 2.9B parameters
    ppo       the phases of an iteration: a 7B policy and critic with LoRA, a 7B reward model
    ranks     two ranks on one card against one rank

DIR/gpu.json holds the findings, DIR/gpu.log what the stages print. Each stage runs in its own process, with a
time limit. Every finding is written at once, so a stage that fails or is cut keeps what it has found. Times
are medians in seconds; `memory` is the peak of allocated memory in GB; `matrix_share` is model FLOPs of the
packed batch (common.forward_flops; recomputation not counted) per second over the rate of a large matrix
product; `bandwidth_share` is the bytes that a decoding step has to read per second over the rate of a copy;
`kernels` are what one profiled call ran on the card: their number, milliseconds, and those that took longest.

Legend: B records, A answers per record, K samples per prompt, T positions, n tokens per answer.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import gc
import importlib.metadata
import itertools
import json
import multiprocessing
import operator
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from traceback import extract_tb, format_exc

import gpu_models as G  # before what may initialise CUDA
import torch
import torch.nn.functional as F
from gpu_models import DEVICE, DTYPE, GPU, ROOT
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import data
import dpo
import fsdp
import model as M
import ppo
import sft

# ---- findings ----

class Findings:
    """What a stage finds, name → value; written to a file at every change."""

    def __init__(self, path):
        self.path, self.values = path, {}

    def add(self, name, value):
        """value: of JSON; floats get four significant digits."""
        text = json.dumps(value)
        self.values[name] = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.4g}"))
        fsdp.write_json(self.path, self.values)
        print(name, self.values[name], flush=True)


# ---- stages ----

def card(found, args):
    flop_rate, byte_rate = G.card_rates(args)
    found.add("matrix_tflops", flop_rate / 1e12)
    found.add("copy_tb_per_s", byte_rate / 1e12)
    found.add("cudnn_attention_after_launch", torch.backends.cuda.cudnn_sdp_enabled())
    if GPU:
        found.add("cudnn", torch.backends.cudnn.version())
        found.add("nccl", ".".join(map(str, torch.cuda.nccl.version())))
        found.add("multiprocessors", torch.cuda.get_device_properties(0).multi_processor_count)
        found.add("expandable_segments", all(
            segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))

    def attention(T, q_scale=1.0, mean_score=0.0):
        """→ a function: forward and backward of masked attention → gradient of the queries"""
        q, k, v = torch.randn(3, 4, 8, T, 64, device=DEVICE, dtype=torch.bfloat16) * q_scale
        q[..., 0], k[..., 0] = 1.0, mean_score * 8
        mask = torch.ones(4, 1, T, T, dtype=torch.bool, device=DEVICE).tril()
        q.requires_grad_()

        def run():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return torch.autograd.grad(out.sum(), q)[0]
        return run
    for name, cudnn in (("cudnn", True), ("no_cudnn", False)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for T in (200, 201):  # 200 loads the kernels
            run = attention(T)
            first, following = G.timed(run, 1, 0)["seconds"], G.timed(run, 5, 0)["seconds"]
        # pytorch issue 196678: scores far below 0, and a length of 64 more than a multiple of 128
        nan = int((~attention(704, 0.1, -120.0)().isfinite()).sum())
        found.add(f"attention/{name}", {"new_length": first, "same_length": following, "nan_gradients": nan})


def model_outputs(model, batch):
    """→ log-probabilities, entropies, the gradient of their weighted sum, scores at the last tokens"""
    model.zero_grad()
    batch = G.place(batch, model)
    features = model.vision_tower(batch.pixels)
    logprob, entropy = model(batch, features, entropy=True)
    (logprob.sum() + 0.1 * entropy.sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    scores = model.scores(batch, features.detach(), batch.last_token)
    return {"logprob": logprob, "entropy": entropy, "gradient": gradient, "scores": scores}


def equal_share(answers, others):
    """Share of equal tokens; where one answer is longer, its tokens differ."""
    pairs = [pair for a, b in zip(sum(answers, []), sum(others, [])) for pair in itertools.zip_longest(a, b)]
    return sum(a == b for a, b in pairs) / len(pairs)


def parity(found, args):
    """Modules without FSDP. Those on the CPU in fp32 are the reference."""
    G.common.world()
    found.add("allow_tf32", torch.backends.cuda.matmul.allow_tf32)
    torch.manual_seed(0)
    for size in ("gqa", "mha"):
        checkpoint, n = G.make_checkpoint(args, size), 24
        reference = M.VisionLLM(checkpoint.config, score=True)
        for name, p in reference.named_parameters():
            nn.init.normal_(p, float(G.is_norm(name)), 0.05)
        models = {name: copy.deepcopy(reference).to(DEVICE, dtype) for name, dtype in fsdp.DTYPES.items()}
        for A in (1, 3):
            _, batch = G.make_batch(checkpoint, 3, 24, n, A, ragged=3)
            expected = model_outputs(reference, batch)
            for name, model in models.items():
                outputs = model_outputs(model, batch)
                found.add(f"{size}/{A} answers/{name}",
                          {what: G.relative_error(outputs[what], expected[what]) for what in expected})
        _, batch = G.make_batch(checkpoint, 4, 24, ragged=5)
        stop, draws = range(0, 32000, 64), M.keyed_uniforms(0, 1, range(4), 3, n)
        for kind, how in (("greedy", {}), ("sampled", {"uniforms": draws, "num_samples": 3}),
                          ("top_p", {"uniforms": draws, "num_samples": 3, "top_p": 0.9})):
            expected = G.sample(reference, batch, n, stop, **how)
            for name, model in models.items():
                graph, eager = (G.sample(model, batch, n, stop, cuda_graph=on, **how) for on in (True, False))
                found.add(f"{size}/{kind}/{name}", {
                    "equal_to_cpu": equal_share(graph, expected), "graph_is_eager": graph == eager})
    expected = G.sample(reference, batch, 300)  # a GPU replays three graphs
    graph, eager = (G.sample(models["fp32"], batch, 300, cuda_graph=on) for on in (True, False))
    found.add("300 tokens", {"equal_to_cpu": equal_share(graph, expected), "graph_is_eager": graph == eager})
    layer, x = M.LoRA(nn.Linear(512, 384), 16, 16), torch.randn(8, 512)
    nn.init.normal_(layer.lora_B.weight, 0, 0.05)
    results = []
    for lora in (copy.deepcopy(layer).to(DEVICE), layer):
        y = lora(x.to(lora.weight.device))
        gradients = torch.autograd.grad(y.square().sum(), (lora.lora_A.weight, lora.lora_B.weight))
        results.append(torch.cat([t.flatten() for t in (y, *gradients)]))
    found.add("lora/fp32", G.relative_error(*results))


def profiled(function):
    """→ {kernel: (milliseconds, calls)} of a second call; without a GPU, of operators"""
    function()
    G.clock()
    activity = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        function()
        G.clock()
    key = "self_device_time_total" if GPU else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if GPU else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    return {event.key: (getattr(event, key) / 1e3, event.count) for event in events}


def kernels(table):
    """A finding of a result of `profiled`; gpu.log gets thirty kernels."""
    ranked = sorted(table.items(), key=lambda item: -item[1][0])
    for name, (ms, calls) in ranked[:30]:
        print(f"{ms:10.3f} ms {calls:8.1f} calls  {name[:150]}", flush=True)
    ms, calls = (sum(values[i] for values in table.values()) for i in (0, 1))
    top = [(name.removeprefix("void ").replace("at::native::", "")[:64], *values)
           for name, values in ranked[:12]]
    return {"number": calls, "ms": ms, "top": top}


# runs a script that leaves the checkpoints of a finished run in place, for one that resumes from them
KEEPING_CHECKPOINTS = """import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import fsdp
fsdp.remove_checkpoints = lambda out: None
runpy.run_path(sys.argv[0], run_name="__main__")"""


def run_script(folder, label, script, *argv):
    """`python SCRIPT argv…`; --out is named by the label's part before a blank. → label, result"""
    start, out = time.perf_counter(), folder / label.split()[0]
    command = [sys.executable, *(["-c", KEEPING_CHECKPOINTS] if "--save_every" in argv else [])]
    done = subprocess.run([*command, ROOT / script, "--out", out, *map(str, argv)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    result, log = {"exit": done.returncode, "seconds": time.perf_counter() - start}, out / "log.jsonl"
    print(f"---- {label}\n{done.stdout[-4000:]}", flush=True)
    if log.is_file():
        name = "first/policy/ratio"
        result["loss"] = [line.get("loss", {name: line.get(name)}) for line in read_lines(log)]
    return label, result if done.returncode == 0 else {**result, "output": done.stdout[-500:]}


def read_lines(path):
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def scripts(found, args):
    folder = Path(tempfile.mkdtemp())
    shapes, base, rm, full_size = folder / "shapes", folder / "base", folder / "rm", not args.tiny

    def run(*commands):  # at the same time
        with ThreadPoolExecutor() as pool:
            for label, result in pool.map(lambda command: run_script(folder, *command), commands):
                found.add(label, result)
    run(("shapes", "examples/shapes.py", "--train", 96, "--synthetic", 96, "--prompts", 96, "--test", 16,
         "--warm_up", 10))
    train = "--images", shapes / "images", "--max_steps", 4, "--batch_size", 16, "--micro_batch", 8
    first = ("sft.py", *train, "--model", shapes / "model", "--data", shapes / "sft.json", "--eval_data",
             shapes / "test.json", "--save_every", 2)
    run(("sft", *first))
    shutil.copytree(folder / "sft", base)  # what the others read while sft is resumed
    shutil.rmtree(folder / "sft" / "checkpoints" / "step_4")
    pairs = ("dpo.py", *train, "--model", base, "--data", shapes / "pairs.json")
    run(("sft resumed", *first, "--resume"), ("dpo", *pairs), *[("rm", "rm.py", *pairs[1:])] * full_size)
    losses = [[line["loss"] for line in read_lines(out / "log.jsonl")] for out in (base, folder / "sft")]
    found.add("resume_difference", max(abs(a - b) for a, b in zip(*losses, strict=True)))
    if full_size:
        predict = ("predict.py", "--images", shapes / "images", "--model", base, "--max_new_tokens", 12,
                   "--data", shapes / "test.json")
        ppo_run = ("ppo.py", *train, "--model", base, "--max_new_tokens", 12, "--reward_model", rm,
                   "--data", shapes / "prompts.json", "--rollout_batch", 32)
        run(("ppo", *ppo_run), ("ppo_sharded", *ppo_run, "--rollout", "sharded"), ("greedy.jsonl", *predict),
            ("greedy_sharded.jsonl", *predict, "--sharded"),
            ("best.jsonl", *predict, "--num_samples", 4, "--reward_model", rm),
            ("dpo_lora", *pairs, "--lora_rank", 8), ("sft_offload", *first, "--offload"))
        shutil.copytree(folder / "sft_offload", folder / "uninterrupted")
        shutil.rmtree(folder / "sft_offload" / "checkpoints" / "step_4")
        run(("sft_offload resumed", *first, "--offload", "--resume"))
        for name, (a, b), value in (
                ("resume_difference/offload", ("uninterrupted/log.jsonl", "sft_offload/log.jsonl"), "loss"),
                ("sharded_difference/ppo", ("ppo/log.jsonl", "ppo_sharded/log.jsonl"), "objective/scores")):
            found.add(name, max(abs(x - y) for x, y in zip(*(
                [line[value] for line in read_lines(folder / file)] for file in (a, b)), strict=True)))
        answers = [read_lines(folder / f"{name}.jsonl") for name in ("greedy", "greedy_sharded")]
        found.add("sharded_equal_answers/predict", sum(map(operator.eq, *answers)) / len(answers[0]))
    found.add("export_error", export_error(folder / "dpo", shapes))
    shutil.rmtree(folder)


@torch.no_grad()
def export_error(folder, shapes):
    """Relative error of the log-probabilities that transformers computes with an exported checkpoint."""
    images, world = shapes / "images", G.common.world()
    settings = G.options(sft, "--model", folder, "--data", shapes / "test.json", "--images", images)
    checkpoint = fsdp.open_checkpoint(settings, world)
    model = fsdp.build(checkpoint, settings, world)
    examples = fsdp.read_examples(settings.data, "turns", checkpoint.processor, settings, world)
    batch = data.collate(examples[:8], checkpoint.processor).to(DEVICE)
    ours = model(batch, model.vision_tower(batch.pixels))
    peer = G.LlavaForConditionalGeneration.from_pretrained(folder, dtype=DTYPE).to(DEVICE)
    logits = peer(input_ids=batch.ids, attention_mask=(batch.branch >= 0).long(),
                  pixel_values=batch.pixels.to(DTYPE)).logits.float().flatten(0, 1)[batch.logit_position]
    return G.relative_error(logits.log_softmax(-1).gather(-1, batch.target[:, None]).squeeze(-1), ours)


def decode(found, args):
    n, many = (8, 4) if args.tiny else (64, 64)
    checkpoint, (_, byte_rate) = G.make_checkpoint(args, "7b"), G.card_rates(args)
    text, tokens = checkpoint.config.text_config, {}
    settings = G.options(sft)
    model = fsdp.build(checkpoint, settings, G.common.world())
    weights = sum(p.numel() for p in model.language_model.parameters()) - text.vocab_size * text.hidden_size
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # numbers per position

    def measure(name, B, decoder, K=1):
        """decoder(examples, batch, n) → tokens. A token's time is the mean of all after the first, so that it
        contains what capturing a graph takes."""
        examples, batch = G.make_batch(checkpoint, B)
        batch = batch.to(DEVICE)
        decoder(examples, batch, n)

        def run(length):
            tokens[name] = decoder(examples, batch, length)
        prefill, result = (G.timed(functools.partial(run, length), 1, 0) for length in (1, n))
        token = (result["seconds"] - prefill["seconds"]) / (n - 1)
        read = DTYPE.itemsize * (weights + B * cache * (batch.ids.shape[1] + K * n // 2))
        found.add(name, {**result, "prefill": prefill["seconds"], "token": token,
                         "tokens_per_s": B * K / token, "bandwidth_share": read / token / byte_rate})
        gc.collect()
        torch.cuda.empty_cache()
    plain = fsdp.unsharded(model, settings, G.common.world())
    draws = M.keyed_uniforms(0, 1, range(8), 8, n)
    measure("ours/8", 8, lambda examples, batch, n: G.sample(plain, batch, n))
    measure("ours/8/eager", 8, lambda examples, batch, n: G.sample(plain, batch, n, cuda_graph=False))
    batch = G.make_batch(checkpoint, 8)[1].to(DEVICE)
    one, nine = (profiled(lambda n=n: G.sample(plain, batch, n, cuda_graph=False)) for n in (1, 9))
    found.add("kernels/a step of 8 prompts", kernels(
        {name: [(a - b) / 8 for a, b in zip(nine[name], one.get(name, (0, 0)))] for name in nine}))
    measure(f"ours/{many}", many, lambda examples, batch, n: G.sample(plain, batch, n))
    measure("ours/8 prompts, 8 samples", 8, K=8, decoder=lambda examples, batch, n: G.sample(
        plain, batch, n, uniforms=draws[:, :, :n], num_samples=8))
    peer = G.make_peer(checkpoint.config, model)

    def generate(examples, batch, n, **how):
        inputs = G.peer_inputs(checkpoint, examples, batch)
        ids = peer.generate(**inputs, max_new_tokens=n, do_sample=False, **how)
        return [[sequence] for sequence in ids[:, -n:].tolist()]
    for B in (8, many):
        measure(f"transformers/{B}", B, generate)
        found.add(f"equal_tokens/{B}", equal_share(tokens[f"ours/{B}"], tokens[f"transformers/{B}"]))
    measure("transformers/8/static cache", 8, functools.partial(
        generate, cache_implementation="static", disable_compile=True))


def lora_step(found, args, script):
    run = G.Training(args, script)
    found.add("positions", run.batch.ids.shape[1])
    trained = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    adapters = {name: fsdp.local_tensor(p.detach()).clone() for name, p in trained}
    found.add("ours", run.measure(run.step, run.losses))
    found.add("kernels", kernels(profiled(run.step)))
    if script is sft:
        run.use(8)
        found.add("ours/8 records", run.measure(run.step, run.losses, 3))
        run.use(4)
    run.model.set_recompute(True)
    found.add("ours/recompute", run.measure(run.step, run.losses, 3))
    if "peft" not in sys.modules:
        found.add("transformers", "not run: peft is not installed")
        return
    peer = G.add_peer_lora(G.make_peer(run.checkpoint.config, run.model), adapters)
    inputs, n = G.peer_inputs(run.checkpoint, run.examples, run.batch), run.n
    run.model = run.step = None
    gc.collect()

    def loss():
        if script is sft:
            return -G.peer_logprobs(peer, inputs, n).mean()
        with torch.no_grad(), peer.disable_adapter():
            ref = G.peer_logprobs(peer, inputs, n).sum(1)
        chosen, rejected = (G.peer_logprobs(peer, inputs, n).sum(1) - ref).chunk(2)
        return -F.logsigmoid(run.settings.beta * (chosen - rejected)).mean()
    step, losses = G.train_step(peer.parameters(), nn.utils.clip_grad_norm_, loss)
    for name in ("transformers", "transformers/recompute"):
        if name.endswith("recompute"):
            peer.train()  # it recomputes nothing in eval mode; there is no dropout
            peer.gradient_checkpointing_enable()
            peer.enable_input_require_grads()
        try:
            found.add(name, run.measure(step, losses))
        except torch.OutOfMemoryError:
            found.add(name, "out of memory")


def full(found, args):
    run = G.Training(args, sft, "3b", lora=False)
    found.add("positions", run.batch.ids.shape[1])
    found.add("parameters", sum(p.numel() for p in run.model.parameters() if p.requires_grad))
    found.add("ours", run.measure(run.step, run.losses))
    found.add("kernels", kernels(profiled(run.step)))


def ppo_iteration(found, args):
    """The phases of ppo.main, with a few prompts first; then they are timed."""
    B, micro_batch, n = (4, 2, 6) if args.tiny else (32, 4, 128)
    settings = G.options(ppo, "--reward_model", "random", "--lora_rank", 16, "--max_new_tokens", n,
                       "--rollout_batch", B, "--batch_size", B, "--micro_batch", micro_batch)
    checkpoint, world, stop = G.make_checkpoint(args, "7b"), G.common.world(), fsdp.Stop()
    processor, (examples, _) = checkpoint.processor, G.make_batch(checkpoint, B)
    policy, reference, scorer, critic = ppo.build_models(checkpoint, checkpoint, settings, world)
    models = {"policy": policy, "critic": critic}
    optimizers = {name: ppo.adam(model, settings.lr, settings) for name, model in models.items()}
    found.add("memory/models", torch.cuda.memory_allocated() / 1e9)
    prompts = ppo.Prompts(examples, [], {example.index: example for example in examples})
    moments = torch.tensor([0.0, 1.0])

    def generate():
        batches = iter([prompt_batches])
        return ppo.generate_rollouts(policy, steps, 0, 1, batches, processor, settings, world, stop)
    for iteration, count in ((1, micro_batch), (2, B)):
        steps = data.Steps(examples[:count], processor, count, micro_batch, 0, 1, drop_last=True)
        prompt_batches, = data.Loader(steps, 0, 1, 0)  # ppo.py loads them during the iteration before
        times = [G.clock()]
        rollouts = generate()
        times.append(G.clock())
        scores = [scorer.score(rollout, prompts) for rollout in rollouts]
        scores = ppo.postprocess_scores(scores, rollouts, moments, settings)
        times.append(G.clock())
        old_outputs = [ppo.logprobs_and_values(rollout, policy, reference, critic, settings)
                       for rollout in rollouts]
        fsdp.reshard(policy, critic, scorer.model)
        times.append(G.clock())
        estimates = ppo.compute_advantages(old_outputs, scores, settings, world)
        minibatch = list(zip(rollouts, old_outputs, estimates))
        results = [ppo.ppo_step(minibatch, None, models, optimizers, iteration, settings, world)
                   for _ in range(settings.ppo_epochs)]
        times.append(G.clock())
    phases = ("generate", "score", "forward", "update")
    seconds = dict(zip(phases, (end - start for start, end in itertools.pairwise(times))))
    found.add("phases", {**seconds, "generate_share": seconds["generate"] / sum(seconds.values())})
    found.add("memory", torch.cuda.max_memory_allocated() / 1e9)
    found.add("metrics", {name: float(value) for name, value in ppo.update_metrics(results).items()})
    found.add("kernels/update of a micro-batch", kernels(profiled(lambda: ppo.ppo_step(
        minibatch[:1], None, models, optimizers, iteration, settings, world))))
    found.add("kernels/generate", kernels(profiled(generate)))


class ThroughHost:
    """A collective of FSDP's by way of host memory, as NCCL wants one card per rank and gloo crashes on CUDA
    tensors."""

    def __init__(self, collective):
        self.collective = collective

    def allocate(self, size, *, dtype, device):
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False, **op):
        output = torch.empty_like(output_tensor, device="cpu")
        self.collective(output, input_tensor.cpu(), group=group, **op)
        output_tensor.copy_(output)


def rank_steps(ranks, folder, args):
    """Two SFT steps in fp32 as one of `ranks` ranks on one device. → losses, gradients; or an error's text"""
    try:
        rank, os.environ["LOCAL_RANK"] = int(os.environ.get("RANK", 0)), "0"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks,
            timeout=datetime.timedelta(seconds=20))
        mesh = init_device_mesh(DEVICE.type, (ranks,), mesh_dim_names=("shard",))
        world = fsdp.World(rank, ranks, DEVICE, mesh)
        checkpoint = G.make_checkpoint(args, "gqa")
        model = fsdp.build(checkpoint, G.options(sft, "--dtype", "fp32"), world, ["language_model."])
        for module in model.modules() if ranks > 1 else ():
            if isinstance(module, fsdp.FSDPModule):
                module.set_custom_all_gather(ThroughHost(torch.distributed.all_gather_into_tensor))
                module.set_custom_reduce_scatter(ThroughHost(torch.distributed.reduce_scatter_tensor))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        examples, _ = G.make_batch(checkpoint, 4, 24, 24, 1, ragged=3)
        batch = data.collate(examples[rank::ranks], checkpoint.processor).to(DEVICE)
        count, losses, gradients = world.sum(len(batch.target))[0], [], []
        for _ in range(2):
            loss = G.sft_loss(model, batch, count)
            loss.backward()
            losses += world.sum(loss.detach())
            for p in model.parameters():
                gradients += world.gather(p.grad.to_local().flatten().cpu()) if p.requires_grad else []
            optimizer.step()
            optimizer.zero_grad()
        return losses, torch.cat(gradients).numpy()
    except Exception:
        return format_exc()[-600:]


def ranks(found, args):
    with tempfile.TemporaryDirectory() as folder:
        one, two = (G.common.forked(rank_steps, n, folder, args, ranks=n) for n in (1, 2))
    if isinstance(one, str) or isinstance(two, str):
        found.add("not supported", {"one": one, "two": two} if isinstance(one, str) else two)
        return
    (losses, gradient), (losses2, gradient2) = one, two
    found.add("loss", losses)
    found.add("loss_error", G.relative_error(torch.tensor(losses2), torch.tensor(losses)))
    found.add("gradient_error", G.relative_error(torch.from_numpy(gradient2), torch.from_numpy(gradient)))


STAGES = {  # name → function, limit in seconds
    "card": (card, 40), "parity": (parity, 60), "scripts": (scripts, 110), "decode": (decode, 120),
    "sft": (functools.partial(lora_step, script=sft), 60),
    "dpo": (functools.partial(lora_step, script=dpo), 60),
    "full": (full, 60), "ppo": (ppo_iteration, 90), "ranks": (ranks, 60)}


# ---- the parent: imports once, never initialises CUDA, and forks a process per stage ----

def run_here(name, function, args):
    """Runs a stage and ends this process."""
    found = Findings(os.path.join(args.out, f"{name}.part.json"))
    try:
        function(found, args)
    except Exception as error:
        where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in extract_tb(error.__traceback__)[-4:])
        found.add("error", f"{type(error).__name__}: {str(error)[:500]} ({where})")
        raise
    sys.stdout.flush()
    os._exit(0)  # no teardown


def run_child(name, function, args, forked):
    """The stage's process: the head of a process group, its output in gpu.log."""
    os.setsid()
    log = os.open(os.path.join(args.out, "gpu.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"======== {name}", flush=True)
    if forked:
        G.show_gpus()
        run_here(name, function, args)
    sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", name]).returncode)


def fork(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def run_stage(name, function, args, limit, forked=True):
    """→ {"end": "done" or what happened, "seconds", its findings, and "error" if it raised one}"""
    start, process = time.perf_counter(), fork(run_child, name, function, args, forked)
    try:
        process.join(limit)
        code = process.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has started
    end = {0: "done", 1: "failed", None: f"cut after {limit:.0f} s"}.get(code, f"ended with {code}")
    found = data.read_json(args.out, f"{name}.part.json", {})
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(args.out, f"{name}.part.json"))
    return {"end": end, "seconds": round(time.perf_counter() - start, 1), **found}


def header():
    """What runs: card, versions, commit, command."""
    def output(*command):
        found = shutil.which(command[0])
        return found and subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    card = output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {"gpu": card, "cpus": os.cpu_count(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "transformers": importlib.metadata.version("transformers"), "command": " ".join(sys.argv),
            "commit": os.environ.get("GIT_COMMIT") or output("git", "-C", str(ROOT), "rev-parse", "HEAD")}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--out", required=True, help="folder of gpu.json and gpu.log")
    add("--budget", type=float, default=480, help="seconds for all stages")
    add("--only", default=",".join(STAGES), help="stages, comma-joined")
    add("--tiny", action="store_true", help="small sizes, to test that the stages run")
    add("--stage", help=argparse.SUPPRESS)  # the stage that this process is to run
    args = parser.parse_args()
    if not set(args.only.split(",")) <= set(STAGES):
        parser.error(f"got --only {args.only}, need any of {','.join(STAGES)}")
    if not GPU and not args.tiny:
        parser.error("got no GPU (nvidia-smi lists none), need one; --tiny runs without")
    if args.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
        torch.set_num_threads(1)
    if args.stage:
        G.show_gpus()
        run_here(args.stage, STAGES[args.stage][0], args)
    os.makedirs(args.out, exist_ok=True)
    start, results = time.perf_counter(), header()

    def probe():  # whether a forked process can initialise CUDA; if not, each stage starts Python anew
        G.show_gpus()
        if GPU:
            torch.cuda.init()
    probe = fork(probe)
    probe.join()
    results["forked"] = probe.exitcode == 0
    print(json.dumps(results), flush=True)
    for name in args.only.split(","):
        function, limit = STAGES[name]
        left = args.budget - (time.perf_counter() - start)
        results[name] = {"end": f"skipped, {left:.0f} s were left"}
        if left > 10:
            limit = min(left, 3 * limit if args.tiny else limit)
            results[name] = run_stage(name, function, args, limit, results["forked"])
        fsdp.write_json(os.path.join(args.out, "gpu.json"), results)
        print(json.dumps({"stage": name, **results[name]}, separators=(",", ":")), flush=True)


if __name__ == "__main__":
    main()
