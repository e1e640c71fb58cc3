"""LoRA: model.LoRA by hand, and --lora_rank of sft.py, rm.py and dpo.py. Base: what adapters are put on."""
import json
import re
from importlib.util import find_spec

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
LORA = "--lora_rank 3 --lora_alpha 6 --batch_size 5 --micro_batch 2 --max_steps 3 --lr 1e-2 --workers 0"


def load(place, world, **changes):
    settings = {"model": str(place / "model"), "template": "auto", "lora_rank": 4, "lora_alpha": 8.0}
    args = tiny.options(**{**settings, **changes})
    checkpoint = fsdp.open_checkpoint(args, world)
    model, processor = fsdp.build(checkpoint, args, world, ("language_model.",)), checkpoint.processor
    return model, batch_of(processor, place / "images"), processor, args


def run(script, place, out, *options):
    return inside(script, "--model", place / "model", "--data", place / SCRIPTS[script], "--images",
                  place / "images", "--out", out, *LORA.split(), *options)[0]


def is_adapter(name):
    return bool(re.fullmatch(ADAPTED + r"\.lora_[AB]\.weight", name))


def base(place):
    return load_file(place / "model" / "model.safetensors")


def test_layer_by_hand():
    """x Wᵀ + bias is (6, 10); x Aᵀ = (3, 2), times Bᵀ (6, 2), times alpha / rank = 6 / 2: (18, 6). Gradients
    are those of the merged weight W + 3 B A; W, being frozen, has none."""
    layer, x = ours.LoRA(torch.nn.Linear(2, 2), rank=2, alpha=6), torch.tensor([[1.0, 2]])
    A, B = layer.lora_A.weight, layer.lora_B.weight
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([1.0, -1])
    A.data, B.data = torch.tensor([[[1, 1], [0, 1]], [[2, 0], [0, 1.0]]])
    layer.weight.requires_grad_(False)
    merged = (layer.weight + 3 * B @ A).detach().requires_grad_()
    F.linear(x, merged, layer.bias.detach()).square().sum().backward()
    out = layer(x)
    assert out.tolist() == [[24, 16]]
    out.square().sum().backward()
    torch.testing.assert_close(B.grad, 3 * merged.grad @ A.detach().T)
    torch.testing.assert_close(A.grad, 3 * B.detach().T @ merged.grad)
    assert layer.weight.grad is None
    layer.on = False
    assert layer(x).tolist() == [[6, 10]]


def test_new_adapters_change_nothing(place, world):
    """All seven projections of each layer have them, and nothing else trains. A is drawn, B is 0."""
    (model, batch, *_), (plain, *_) = load(place, world), load(place, world, lora_rank=0)
    assert torch.equal(our_logits(model, batch), our_logits(plain, batch))
    held, other = tiny.state(model), tiny.state(load(place, world, seed=1)[0])
    adapters = {name for name in held if is_adapter(name)}
    assert held.keys() - base(place).keys() == adapters and len(adapters) == 2 * 7 * 2
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters
    for name in adapters:
        std = (3 * held[name].shape[1]) ** -0.5 * (".lora_A." in name)  # Kaiming's with a = √5, as in PEFT
        assert 0.7 * std <= held[name].std() <= 1.3 * std and held[name].equal(other[name]) == (std == 0)


def test_merged_export_is_the_unmerged_model(place, world, tmp_path):
    """With adapters off the logits are the base's, bit for bit; with --recompute gradients are the same."""
    (model, batch, processor, args), (plain, *_) = load(place, world), load(place, world, lora_rank=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # as if trained
            torch.nn.init.normal_(fsdp.local_tensor(parameter), std=0.3)
    logits, gradients = our_logits(model, batch), []
    model.set_adapters(False)
    assert torch.equal(our_logits(model, batch), our_logits(plain, batch))
    model.set_adapters(True)
    args.out = str(tmp_path)
    fsdp.export(model, processor, args, world)
    assert_close(logits, their_logits(reload(tmp_path), batch))
    held, merged = tiny.state(model), load_file(tmp_path / "model.safetensors")
    for name, before in base(place).items():  # reload() has seen that there is no other
        A, B = (held.get(f"{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        assert torch.equal(merged[name], before) if A is None else torch.allclose(
            merged[name], before + 8 / 4 * B @ A, atol=1e-6), name
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        model(batch, model.vision_tower(batch.pixels)).sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients.append({name: p.grad.full_tensor() for name, p in trained.items()})
    tiny.assert_same_gradients(*gradients)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("train", ["", "projector,llm"])
def test_adapters_are_trained_saved_and_read_by_peft(script, train, place, world, tmp_path):
    """What is trained moves, nothing else, and is in the checkpoint; export and adapter are the model."""
    model = run(script, place, tmp_path, *(["--train", train] if train else []))
    start, batch, *_ = load(place, world, lora_rank=3)
    held, start = tiny.state(model), tiny.state(start)
    trained = {name for name in held if is_adapter(name) or name.startswith(
        ("score.weight", *(["multi_modal_projector."] if train else [])))}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert {name for name in start if not torch.equal(held[name], start[name])} == trained - {"score.weight"}
    saved = dcp.FileSystemReader(tmp_path / "checkpoints" / "step_3").read_metadata().state_dict_metadata
    assert set(saved) == {f"model.{name}" for name in trained} | {
        f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert_close(our_logits(model, batch), their_logits(reload(tmp_path), batch))
    assert (tmp_path / "adapter").exists() == (not train)  # beside a trained projector it is not the model
    if not train and find_spec("peft"):  # installed in .ci/run
        import peft
        peer = tiny.hf.LlavaForConditionalGeneration.from_pretrained(place / "model")
        adapted = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
        assert_close(their_logits(adapted, batch), their_logits(reload(tmp_path), batch))


def test_reference_is_the_base(place, world, tmp_path):
    """dpo.py: the reference file is that of a run without adapters; margins start at 0."""
    run("dpo", place, tmp_path / "lora")
    run("dpo", place, tmp_path / "plain", "--lora_rank", 0, "--lora_alpha", 16)
    one, two = (json.loads((tmp_path / name / "reference.json").read_text()) for name in ("lora", "plain"))
    margins = [line["rewards/margins"] for line in tiny.log(tmp_path / "lora")]
    assert one == two and margins[0] == 0 < margins[-1]


def test_adapters_of_a_bf16_base_are_fp32(place, world, tmp_path):
    """The base stays as it is, rounded to bf16; the loss falls and all adapters move."""
    model = run("rm", place, tmp_path, "--batch_size", 10, "--dtype", "bf16", "--max_steps", 4)
    held, start = tiny.state(model), tiny.state(load(place, world, lora_rank=3, dtype="bf16")[0])
    assert all(torch.equal(held[name], tensor.bfloat16()) for name, tensor in base(place).items())
    assert all(held[name].dtype == torch.float32 for name in held.keys() - base(place).keys())
    assert not any(torch.equal(held[name], start[name]) for name in held if is_adapter(name))
    assert tiny.log(tmp_path)[-1]["loss"] < tiny.log(tmp_path)[0]["loss"]
