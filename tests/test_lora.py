"""LoRA: model.LoRA and add_lora by hand, and --lora_rank of sft.py, rm.py and dpo.py.

Everything is fp32 on the CPU unless a test says otherwise. Base: the weights that adapters are put on.
"""
import json
import os
import re

import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from test_fsdp import assert_close, batch_of, our_logits, their_logits
from tiny import inside, reload

import fsdp
import model as ours

SCRIPTS = {"sft": "rows.json", "rm": "pairs.json", "dpo": "pairs.json"}
ADAPTED = r"language_model\.model\.layers\.[01]\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"


def options(place, **changes):
    given = {"model": str(place / "model"), "template": "auto", "lora_rank": 4, "lora_alpha": 8.0}
    return tiny.options(**{**given, **changes})


def load(place, world, trainable=("language_model.",), **changes):
    args = options(place, **changes)
    checkpoint = fsdp.open_checkpoint(args, world)
    return fsdp.build(checkpoint, args, world, trainable), checkpoint.processor, args


@torch.no_grad()
def stir(model):
    """Adapters as if they had been trained: B off 0, and large enough to matter."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            whole = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            local = fsdp.local_tensor(parameter)
            assert local.shape == whole.shape  # one rank
            local.copy_(whole)


def is_adapter(name):
    return bool(re.fullmatch(ADAPTED + r"\.lora_[AB]\.weight", name))


def base(place):
    return load_file(place / "model" / "model.safetensors")


# ---- the layer ----

def test_a_layer_by_hand():
    """W = [[1, 2], [3, 4]], bias (1, −1), A = (1, 1), B = (2, 0)ᵀ, alpha 3, rank 1, x = (1, 2): x Wᵀ + bias
    is (6, 10); x Aᵀ = 3, times Bᵀ (6, 0), times alpha / rank = 3: (18, 0)."""
    linear = torch.nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        linear.bias.copy_(torch.tensor([1.0, -1]))
        layer = ours.LoRA(linear, rank=1, alpha=3)
        layer.lora_A.weight.copy_(torch.tensor([[1.0, 1]]))
        layer.lora_B.weight.copy_(torch.tensor([[2.0], [0]]))
        x = torch.tensor([[1.0, 2]])
        assert layer(x).tolist() == [[24, 10]]
        layer.on = False
        assert layer(x).tolist() == linear(x).tolist() == [[6, 10]]


def test_alpha_is_divided_by_the_rank():
    """Twice the rank at the same alpha: each direction counts half."""
    linear, x = torch.nn.Linear(3, 3, bias=False), torch.ones(1, 3)
    moved = {}
    for rank in (1, 2, 4):
        layer = ours.LoRA(linear, rank, alpha=4)
        torch.nn.init.ones_(layer.lora_A.weight)
        torch.nn.init.ones_(layer.lora_B.weight)
        moved[rank] = layer(x) - linear(x)  # rank · 3 · alpha / rank
    assert all(torch.allclose(change, torch.full((1, 3), 12.0)) for change in moved.values())


def test_the_gradients_are_the_merged_weights():
    """With G the gradient of W + s B A: that of B is s G Aᵀ, of A s Bᵀ G; W gets none, being frozen."""
    linear, x = torch.nn.Linear(5, 4), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    layer = ours.LoRA(linear, rank=2, alpha=6)
    layer.weight.requires_grad = layer.bias.requires_grad = False
    A, B = layer.lora_A.weight, layer.lora_B.weight
    merged = (layer.weight + 3 * B @ A).detach().requires_grad_()
    F.linear(x, merged, layer.bias).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(B.grad, 3 * merged.grad @ A.detach().T)
    torch.testing.assert_close(A.grad, 3 * B.detach().T @ merged.grad)
    assert layer.weight.grad is None and layer.bias.grad is None


# ---- the model ----

def test_adapters_stand_on_every_projection(place, world):
    """Seven a layer, no other; the weights keep their names; A is drawn, keyed by the seed, and B is 0."""
    model, _, _ = load(place, world)
    held = tiny.state(model)
    adapted = {name for name in base(place) if re.fullmatch(ADAPTED + r"\.weight", name)}
    assert len(adapted) == 2 * 7
    expected = {name.replace(".weight", f".lora_{part}.weight") for name in adapted for part in "AB"}
    assert held.keys() - base(place).keys() == expected == {name for name in held if is_adapter(name)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    other = tiny.state(load(place, world, seed=1)[0])
    for name in expected:
        if ".lora_B." in name:
            assert not held[name].any()
        else:
            assert held[name].shape[0] == 4 and not torch.equal(held[name], other[name])
            std = (3 * held[name].shape[1]) ** -0.5  # Kaiming's with a = √5, as PEFT draws it
            assert 0.7 * std < held[name].std() < 1.3 * std


def test_nothing_changes_at_first(place, world):
    """B = 0: the logits are the base model's, bit for bit."""
    model, processor, _ = load(place, world)
    plain, _, _ = load(place, world, lora_rank=0)
    batch = batch_of(processor, place / "images")
    assert torch.equal(our_logits(model, batch), our_logits(plain, batch))


def test_switched_off_it_is_the_base(place, world):
    """set_adapters(False) gives the base model bit for bit, whatever the adapters; on again, they count."""
    model, processor, _ = load(place, world)
    plain, _, _ = load(place, world, lora_rank=0)
    batch = batch_of(processor, place / "images")
    stir(model)
    on = our_logits(model, batch)
    model.set_adapters(False)
    assert torch.equal(our_logits(model, batch), our_logits(plain, batch))
    model.set_adapters(True)
    assert torch.equal(our_logits(model, batch), on)
    assert (on - our_logits(plain, batch)).abs().max() > 0.1


def test_a_merged_export_is_the_unmerged_model(place, world, tmp_path):
    """transformers' logits from the export are ours with adapters; every weight is W + alpha / rank · B A."""
    model, processor, args = load(place, world)
    stir(model)
    args.out = str(tmp_path / "out")
    os.mkdir(args.out)
    fsdp.export(model, processor, args, world)
    batch = batch_of(processor, place / "images")
    assert_close(our_logits(model, batch), their_logits(reload(tmp_path / "out"), batch))
    held, merged = tiny.state(model), load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == base(place).keys()
    for name, before in base(place).items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in held:
            update = 8 / 4 * held[f"{stem}.lora_B.weight"] @ held[f"{stem}.lora_A.weight"]
            assert update.norm() > 0.1 and torch.allclose(merged[name], before + update, atol=1e-6)
        else:
            assert torch.equal(merged[name], before), name


def test_recomputed_activations_change_nothing(place, world):
    """--recompute with adapters: the same gradients."""
    found = {}
    for recompute in (False, True):
        model, processor, _ = load(place, world)
        stir(model)
        model.set_recompute(recompute)
        batch = batch_of(processor, place / "images")
        model(batch, model.vision_tower(batch.pixels)).sum().backward()
        parameters = dict(model.named_parameters()).items()
        found[recompute] = {name: p.grad.full_tensor() for name, p in parameters if p.grad is not None}
    assert found[True].keys() == found[False].keys()
    assert len(found[False]) == 28 and all(map(is_adapter, found[False]))
    for name, grad in found[False].items():
        assert grad.any() and torch.allclose(found[True][name], grad, rtol=1e-5, atol=1e-6), name


# ---- runs ----

def files(place, script):
    return ["--model", place / "model", "--data", place / SCRIPTS[script], "--images", place / "images",
            "--workers", 0]


LORA = ["--lora_rank", 3, "--lora_alpha", 6, "--batch_size", 5, "--micro_batch", 2, "--max_steps", 3, "--lr",
        "1e-2"]


def in_checkpoint(out, step):
    metadata = dcp.FileSystemReader(out / "checkpoints" / f"step_{step}").read_metadata()
    return set(metadata.state_dict_metadata)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("train", ["llm", "projector,llm"])
def test_adapters_are_trained_and_nothing_else(script, train, place, world, tmp_path):
    """After three steps all adapters (and the projector, or the score head, if they are trained) have moved
    and the base is bit for bit as before; the checkpoint holds what is trained; the export is the model."""
    out = tmp_path / "out"
    model, *_ = inside(script, *files(place, script), "--out", out, *LORA, "--train", train)
    held, before = tiny.state(model), base(place)
    adapters = {name for name in held if is_adapter(name)}
    start = tiny.state(load(place, world, lora_rank=3)[0])
    trained = set(adapters)
    if "projector" in train:
        trained |= {name for name in before if name.startswith("multi_modal_projector.")}
    if script == "rm":
        trained |= {"score.weight"}
    assert len(adapters) == 28
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    for name in adapters:
        assert not torch.equal(held[name], start[name]), name
    moved = {name for name in before if not torch.equal(held[name], before[name])}
    assert moved == trained & before.keys()
    assert set(in_checkpoint(out, 3)) == {f"model.{name}" for name in trained} | {
        f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}

    exported = load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(exported[name], before[name])}
    merged = {re.sub(r"\.lora_[AB]", "", name) for name in adapters}
    assert changed == merged | (trained & before.keys())
    processor = fsdp.open_checkpoint(options(place), world).processor
    batch = batch_of(processor, place / "images")
    assert_close(our_logits(model, batch), their_logits(reload(out), batch))
    assert (out / "adapter").exists() == (train == "llm")  # beside a trained projector it is not the model
    if train == "llm":
        saved = load_file(out / "adapter" / "adapter_model.safetensors")
        assert len(saved) == len(adapters) and sum(map(torch.numel, saved.values())) == sum(
            held[name].numel() for name in adapters)
    if script == "rm":
        assert (out / "score.safetensors").exists() and held["score.weight"].any()
    model.set_adapters(False)
    if train == "llm":
        plain, _, _ = load(place, world, lora_rank=0)
        assert torch.equal(our_logits(model, batch), our_logits(plain, batch))


def test_the_default_is_the_llama_alone(place, world, tmp_path):
    """--lora_rank without --train: adapters only; the projector is the checkpoint's."""
    model, *_ = inside("sft", *files(place, "sft"), "--out", tmp_path / "out", *LORA)
    assert all(is_adapter(name) for name, p in model.named_parameters() if p.requires_grad)
    assert json.loads((tmp_path / "out" / "args.json").read_text())["train"] == "llm"
    assert (tmp_path / "out" / "adapter").exists()


def test_the_first_step_moves_b_alone(place, world, tmp_path):
    """B = 0 keeps A's first gradient at 0: after one step A is as drawn, and every B has moved."""
    model, *_ = inside("dpo", *files(place, "dpo"), "--out", tmp_path / "out", *LORA, "--max_steps", 1)
    start = tiny.state(load(place, world, lora_rank=3)[0])
    for name, tensor in tiny.state(model).items():
        assert torch.equal(tensor, start[name]) != (".lora_B." in name), name


def test_the_reference_is_the_base(place, world, tmp_path):
    """dpo.py: the policy before its first step is the base, so the reference file is that of a run without
    adapters, fingerprint and all; margins start at 0."""
    inside("dpo", *files(place, "dpo"), "--out", tmp_path / "lora", *LORA)
    inside("dpo", *files(place, "dpo"), "--out", tmp_path / "plain", *LORA, "--lora_rank", 0,
           "--lora_alpha", 16)
    one, two = ((tmp_path / name / "reference.json").read_text() for name in ("lora", "plain"))
    assert json.loads(one) == json.loads(two)
    first, *_, last = tiny.log(tmp_path / "lora")
    assert first["rewards/margins"] == 0 and last["rewards/margins"] > 0


@pytest.mark.parametrize("script", ["rm", "dpo"])
def test_in_bf16(script, place, world, tmp_path):
    """The base is kept in bf16, adapters in fp32; training lowers the loss, and all adapters
    move."""
    model, *_ = inside(script, *files(place, script), "--out", tmp_path / "out", *LORA, "--batch_size", 10,
                       "--dtype", "bf16", "--max_steps", 4)
    dtypes = {is_adapter(name) or name.startswith("score."): p.dtype for name, p in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    before, held = base(place), tiny.state(model)
    assert all(torch.equal(held[name], tensor.bfloat16()) for name, tensor in before.items())
    start = tiny.state(load(place, world, lora_rank=3, dtype="bf16")[0])
    assert all(not torch.equal(held[name], start[name]) for name in held if is_adapter(name))
    trace = tiny.log(tmp_path / "out")
    assert trace[-1]["loss"] < trace[0]["loss"]


# ---- PEFT ----

@pytest.mark.parametrize("script", SCRIPTS)
def test_peft_reads_the_adapter(script, place, world, tmp_path):
    """PeftModel on top of transformers' base model gives the logits of the merged export."""
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    inside(script, *files(place, script), "--out", out, *LORA)
    peer = tiny.hf.LlavaForConditionalGeneration.from_pretrained(place / "model")
    adapted = peft.PeftModel.from_pretrained(peer, out / "adapter").eval()
    processor = fsdp.open_checkpoint(options(place), world).processor
    batch = batch_of(processor, place / "images")
    found, expected = their_logits(adapted, batch), their_logits(reload(out), batch)
    assert_close(found, expected)
    with adapted.disable_adapter():
        assert (their_logits(adapted, batch) - expected).norm() > 1e-2 * expected.norm()
