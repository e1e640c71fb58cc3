"""model.py against transformers on tiny random models, and against its own definitions.

Everything is fp32 on the CPU and nothing is downloaded. `peer` is the transformers model with the same random
weights, `ours` is model.py. Token ids: 0 … 39 are words of answers, 40 … 62 are words of users and never
targets, 63 is the image token.

Legend: B sequences, T positions, N targets, D width, V vocabulary, K answers or samples.
"""
import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import dpo
import model as ours
import ppo
import sft

VOCAB, USER, IMAGE = 64, 40, 63
PATCHES = 4  # an image of 8 × 8 pixels in patches of 4 × 4
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
STORIES = Path(__file__).resolve().parents[2] / "shared/real/stories260k-hf"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


# ---- tiny random models, ours and transformers' with the same weights ----

def clip_config(**changes):
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                "image_size": 8, "patch_size": 4, "hidden_act": "quick_gelu"}
    return hf.CLIPVisionConfig(**{**settings, **changes})


def llama_config(**changes):
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return hf.LlamaConfig(**{**settings, **changes})


def llava_config(text=None, **changes):
    settings = {"vision_config": clip_config(hidden_size=24, num_attention_heads=2),
                "text_config": text or llama_config(), "tie_word_embeddings": False,
                "image_token_index": IMAGE, "image_seq_length": PATCHES,
                "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    return hf.LlavaConfig(**{**settings, **changes})


def our_name(name):
    """The name in model.py (and in checkpoints) of the parameter `name` of a transformers model in memory."""
    for theirs, mine in (("model.vision_tower.", "vision_tower.vision_model."),
                         ("model.multi_modal_projector.", "multi_modal_projector."),
                         ("model.language_model.", "language_model.model."),
                         ("lm_head.", "language_model.lm_head.")):
        if name.startswith(theirs):
            return mine + name[len(theirs):]
    raise AssertionError(name)


@torch.no_grad()
def randomise(model, seed=0):
    """Weights large enough for each parameter to matter: norms near 1, biases away from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.copy_(0.2 * torch.randn(p.shape, generator=generator) + (name.endswith("weight") and p.dim() == 1))
    return model.eval()


@torch.no_grad()
def copy_weights(peer, model, rename=our_name):
    """Copies the peer's parameters into ours, which must be the same set."""
    theirs = {rename(name): p for name, p in peer.named_parameters()}
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.shape == theirs[name].shape, name
        p.copy_(theirs[name])


def llava_pair(config, seed=0):
    peer = randomise(hf.LlavaForConditionalGeneration(config), seed)
    model = ours.VisionLLM(config)
    copy_weights(peer, model)
    return model, peer


def vision_llm(config=None, seed=0):
    return randomise(ours.VisionLLM(config or llava_config()), seed)


# ---- batches ----

def image_tokens(n=PATCHES):
    return [IMAGE] * n


def make_batch(rows, image=(), extra=0, pad=0):
    """(prompt ids, [answer ids, …]) pairs → data.Batch, written from its definition, padded to the longest
    sequence + extra. image: which of IMAGES each run of image tokens shows, in order."""
    packed = []  # per sequence: (id, position, branch) of each token
    predicted = []  # (sequence, index of the token that predicts, target id, answer)
    last_token, sequence = [], []  # per answer
    for b, (prompt, answers) in enumerate(rows):
        tokens = [(token, i, 0) for i, token in enumerate(prompt)]
        for k, ids in enumerate(answers):
            before = end = len(prompt) - 1  # what predicts the next token; the last target
            for i, token in enumerate(ids):
                if token < USER:
                    predicted.append((b, before, token, len(sequence)))
                before = len(tokens)
                tokens.append((token, len(prompt) + i, k + 1))
                end = before if token < USER else end
            last_token.append((b, end))
            sequence.append(b)
        packed.append(tokens)
    T = max(map(len, packed)) + extra
    ids, position, branch = torch.tensor([row + [(pad, 0, -1)] * (T - len(row)) for row in packed]).unbind(-1)
    pixels = IMAGES[:max(image) + 1] if image else torch.zeros(1, 3, 8, 8)
    return data.Batch(
        ids.contiguous(), position.contiguous(), branch.contiguous(), pixels,
        image=torch.tensor(image, dtype=torch.long),
        image_position=(ids == IMAGE).flatten().nonzero().flatten(),
        target=torch.tensor([token for *_, token, _ in predicted], dtype=torch.long),
        logit_position=torch.tensor([b * T + index for b, index, *_ in predicted], dtype=torch.long),
        answer=torch.tensor([a for *_, a in predicted], dtype=torch.long),
        last_token=torch.tensor([b * T + index for b, index in last_token], dtype=torch.long),
        sequence=torch.tensor(sequence, dtype=torch.long),
        causal_prefix=min([T, *(len(prompt) for prompt, answers in rows if len(answers) > 1)]),
        token_shape=(len(sequence), max(Counter(a for *_, a in predicted).values(), default=0)),
        answer_shape=(len(rows), max(len(answers) for _, answers in rows)) if sequence else (0, 0))


def padding_batch():
    batch = make_batch([([0], [])])
    batch.branch.fill_(-1)
    return batch


def random_words(n, seed):
    return np.random.default_rng(seed).integers(3, USER, n).tolist()


# ---- comparing ----

def close(a, b, limit=1e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= limit, (a - b).abs().max()


def weighted(logprob):
    """A loss with a different weight for each target."""
    return (logprob * torch.linspace(-1, 2, len(logprob))).sum()


def gradients(model, loss, rename=str):
    """Backward through the loss; → {our name: gradient, or None where the loss does not reach}."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {rename(name): p.grad for name, p in model.named_parameters()}


def without_gradient(grads):
    return {name for name, grad in grads.items() if grad is None}


def same_gradients(a, b, limit=1e-4):
    """Each parameter's gradient is within `limit` in relative norm, and the same parameters have None."""
    assert a.keys() == b.keys()
    assert without_gradient(a) == without_gradient(b)
    total = torch.stack([grad.norm() for grad in b.values() if grad is not None]).norm()
    assert total > 0
    for name, grad in b.items():
        if grad is None:
            continue
        if "vision_model" in name and name.endswith("k_proj.bias"):  # softmax ignores it: 0, rounded
            assert max(a[name].norm(), grad.norm()) <= 1e-5 * total, name
        else:
            error = (a[name] - grad).norm()
            assert error <= limit * grad.norm(), (name, error / grad.norm())


def logprobs(model, batch, **options):
    return model(batch, model.vision_tower(batch.pixels), **options)


def peer_distribution(peer, batch):
    """log softmax [N, V] at each target of the batch, by transformers; one answer per sequence."""
    images = {"pixel_values": batch.pixels[batch.image]} if len(batch.image) else {}
    logits = peer(input_ids=batch.ids, attention_mask=(batch.branch >= 0).long(), **images).logits
    return F.log_softmax(logits.flatten(0, 1)[batch.logit_position], dim=-1)


def pick_targets(logp, target):
    return logp.gather(1, target[:, None]).squeeze(1)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


# ---- CLIP ----

@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer, drop_class", [
    (-2, True), (-2, False), (-1, True), (-1, False), (0, True), (0, False), (1, True), (3, False), (-4, True)
])
def test_clip_is_transformers(act, layer, drop_class):
    """Features are hidden_states[layer] with or without the class token; gradients agree too."""
    config = clip_config(hidden_act=act)
    peer, model = randomise(hf.CLIPVisionModel(config)), ours.CLIPVision(config, layer, drop_class)
    copy_weights(peer, model, "vision_model.{}".format)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    features = model(pixels)
    expected = peer(pixels, output_hidden_states=True).hidden_states[layer][:, int(drop_class):]
    close(features, expected)
    assert features.shape == (2, PATCHES + (not drop_class), 32)
    same_gradients(gradients(model, weighted(features.flatten())),
                   gradients(peer, weighted(expected.flatten()), "vision_model.{}".format))


@pytest.mark.parametrize("layer", [4, -5])
def test_clip_layer_out_of_range(layer):
    """A feature layer outside the tower is an error that gives the range."""
    with pytest.raises(ValueError, match=rf"vision_feature_layer {layer}, need -4\.\.3 "):
        ours.CLIPVision(clip_config(), layer)


# ---- LLaMA ----

@pytest.mark.parametrize("changes", [
    pytest.param({"num_key_value_heads": 4}, id="MHA"),
    pytest.param({}, id="GQA"),
    pytest.param({"num_key_value_heads": 1}, id="MQA"),
    pytest.param({"head_dim": 12}, id="head_dim"),
    pytest.param({"head_dim": 16, "rope_parameters": LLAMA3}, id="llama3"),
    pytest.param({"rope_parameters": LINEAR}, id="linear"),
    pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, id="rope_theta"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"attention_bias": True, "mlp_bias": True}, id="biased"),
    pytest.param({"rms_norm_eps": 0.1, "hidden_act": "gelu"}, id="eps-gelu"),
])
def test_llama_is_transformers(changes):
    """Log-probabilities at 48 positions (three times llama3's original context) and all gradients agree."""
    config = llama_config(**changes)
    peer, model = randomise(hf.LlamaForCausalLM(config)), ours.Llama(config)
    copy_weights(peer, model, str)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    B, T = 2, 48
    ids, target = torch.randint(0, IMAGE, (2, B, T), generator=torch.Generator().manual_seed(2))
    position = torch.arange(T).expand(B, -1)
    logp = F.log_softmax(model(ids, position, None, torch.arange(B * T), F.linear), dim=-1)
    expected = F.log_softmax(peer(ids).logits.flatten(0, 1), dim=-1)
    close(logp, expected)
    same_gradients(gradients(model, weighted(pick_targets(logp, target.flatten()))),
                   gradients(peer, weighted(pick_targets(expected, target.flatten()))))


def test_llama3_scaling_by_hand():
    """Over 4 turns in the original context: unchanged; under 1: divided by 8; interpolated between."""
    def stretch(context):
        scaled = {**LLAMA3, "original_max_position_embeddings": context}
        plain = {"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]}
        a, b = (ours.rope_frequencies(llama_config(head_dim=16, rope_parameters=r)) for r in (plain, scaled))
        torch.testing.assert_close(a[::4], torch.tensor([1.0, 0.1]))  # 100^(-c/16) for c = 0, 8
        return a / b
    torch.testing.assert_close(stretch(64)[:1], torch.ones(1))  # 10.2 turns
    torch.testing.assert_close(stretch(16)[4:], torch.full((4,), 8.0))  # 0.25 turns and fewer
    share = (16 / (2 * math.pi) - 1) / (4 - 1)  # 2.55 turns: 0.52 of the way from 1 to 4
    torch.testing.assert_close(stretch(16)[0].item(), 1 / (share + (1 - share) / 8))


def test_unknown_rope_types_and_activations_are_refused():
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
    with pytest.raises(ValueError, match="got rope_type 'yarn', need default, linear or llama3"):
        ours.Llama(llama_config(rope_parameters=yarn))
    with pytest.raises(ValueError, match="got the activation 'gelu_new'"):
        ours.Llama(llama_config(hidden_act="gelu_new"))


# ---- the vision-LLM ----

ONE = ([1, *image_tokens(), 41, 42], [[5, 6, 2]])
TWO = ([1, *image_tokens(), 41, *image_tokens(), 42, 43], [[7, 8, 9, 10, 2]])
ADJACENT = ([1, 44, *image_tokens(), *image_tokens()], [[11, 2]])
TURNS = ([1, *image_tokens(), 41], [[5, 6, 2, 43, 44, 7, 8, 2]])
LATER = ([1, 45, 41], [[5, 2, 46, *image_tokens(), 43, 9, 9, 2]])  # an image in the second turn
TEXT = ([1, 45, 62, 47, 48], [[12, 13, 14, 2]])


UNEQUAL = [([1, *image_tokens(), 41], [[5, 6, 2]]),
           ([1, 42, *image_tokens(), 43, *image_tokens()], [[7, 8, 9, 2]])]
WITH_CLASS_TOKEN = [([1, *image_tokens(5), 41], [[5, 6, 2]])]


@pytest.mark.parametrize("changes, rows, image", [
    pytest.param({}, [ONE], [0], id="one image"),
    pytest.param({}, [TWO], [0, 1], id="two images"),
    pytest.param({}, [ADJACENT], [1, 0], id="two images side by side"),
    pytest.param({}, [TURNS], [0], id="multi-turn"),
    pytest.param({}, [LATER], [0], id="image in a later turn"),
    pytest.param({}, [ONE, TEXT, TWO, LATER], [1, 0, 1, 2], id="mixed with text only and a shared image"),
    pytest.param({"vision_feature_select_strategy": "full"}, WITH_CLASS_TOKEN, [0], id="class token"),
    pytest.param({"vision_feature_layer": -1}, UNEQUAL, [0, 1, 0], id="last layer"),
    pytest.param({"multimodal_projector_bias": False}, UNEQUAL, [0, 1, 0], id="projector without bias"),
    pytest.param({"text": llama_config(tie_word_embeddings=True), "tie_word_embeddings": True}, UNEQUAL,
                 [0, 1, 0], id="tied"),
    pytest.param({"projector_hidden_act": "quick_gelu"}, UNEQUAL, [0, 1, 0], id="projector activation"),
])
def test_vlm_is_transformers(changes, rows, image):
    """Log-probabilities, entropies and all gradients; layers after the feature layer get none."""
    config = llava_config(**changes)
    model, peer = llava_pair(config)
    assert (model.multi_modal_projector.linear_1.bias is not None) == config.multimodal_projector_bias
    batch = make_batch(rows, image)
    logprob, entropy = logprobs(model, batch, entropy=True)
    expected = peer_distribution(peer, batch)
    assert len(logprob) == sum(token < USER for _, [answer] in rows for token in answer)
    close(logprob, pick_targets(expected, batch.target))
    close(entropy, -(expected.exp() * expected).sum(-1))
    grads = gradients(model, weighted(logprob))
    same_gradients(grads, gradients(peer, weighted(pick_targets(expected, batch.target)), our_name))
    unused = ["vision_tower.vision_model.post_layernorm."]
    if config.vision_feature_layer == -2:
        unused.append("vision_tower.vision_model.encoder.layers.2.")
    assert without_gradient(grads) == {name for name in grads if name.startswith(tuple(unused))}


def test_names_are_the_mapping():
    """model.our_name gives the names that the parity tests use, and leaves them as they are."""
    for name, _ in hf.LlavaForConditionalGeneration(llava_config()).named_parameters():
        assert ours.our_name(name) == ours.our_name(our_name(name)) == our_name(name)


@pytest.mark.parametrize("size", ["LLaVA-1.5 7B", "LLaVA-1.5 13B", "LLaMA-3 70B"])
def test_models_of_real_sizes(size, monkeypatch):
    """Without weights: every name and shape of transformers' model, in each spelling of a checkpoint, is one
    of ours and none is missing; an export has the hub's names; eight ranks hold every row once."""
    monkeypatch.syspath_prepend(str(tiny.ROOT / "benchmarks"))
    import memory
    config = memory.llava_config(*memory.SIZES[size])
    with torch.device("meta"):
        model, peer = ours.VisionLLM(config), hf.LlavaForConditionalGeneration(config)
    for spelling in (tiny.MEMORY, tiny.HUB, tiny.NEW):
        named = tiny.named(peer, spelling)
        tensors = {ours.our_name(name): tensor for name, tensor in named.items()}
        assert len(tensors) == len(named) == len(peer.state_dict())
        ours.check_names(model, tensors, None, (), [size])  # UserError lists every difference
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes.keys() == tiny.named(peer, tiny.HUB).keys()
    if size == "LLaVA-1.5 7B":  # the numbers of llava-hf/llava-1.5-7b-hf
        assert (len(shapes), sum(map(math.prod, shapes.values()))) == (686, 7_063_427_072)
    rows = dict.fromkeys(shapes, 0)
    for rank in range(8):
        with memory.fake_world(rank, 8) as world:
            sharded = memory.fsdp.build_sharded(config, tiny.options(), world)
        for name, p in sharded.named_parameters():
            assert p.to_local().shape[1:] == shapes[name][1:]
            rows[name] += len(p.to_local())
    assert rows == {name: shape[0] for name, shape in shapes.items()}


@pytest.mark.parametrize("case", ["text only", "no answers", "padding"])
def test_batches_without_images_or_targets_stay_connected(case):
    """Gradients are zero rather than None, because all ranks must reduce the same gradients."""
    model = vision_llm()
    usual = gradients(model, logprobs(model, make_batch([ONE], [0])).sum())
    batch = {"text only": make_batch([TEXT]), "no answers": make_batch([(ONE[0], [])], [0]),
             "padding": padding_batch()}[case]
    grads = gradients(model, logprobs(model, batch).sum())
    assert without_gradient(grads) == without_gradient(usual)
    for name, grad in grads.items():
        nonzero = case == "text only" and name.startswith("language_model.")
        assert grad is None or grad.any() == nonzero, name


# ---- token log-probabilities ----

def head_inputs(N, D=8, V=50, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(N, D, generator=g).to(dtype), torch.randn(V, D, generator=g).to(dtype)
    return hidden.requires_grad_(), head.requires_grad_(), torch.randint(0, V, (N,), generator=g)


def set_chunk_size(monkeypatch, n):
    """Chunks of n tokens of the vocabulary."""
    monkeypatch.setattr(ours, "chunks", lambda V, N: [slice(i, min(i + n, V)) for i in range(0, V, n)])


def all_logits(hidden, head, target, temperature):
    """What TokenLogProbs computes, with all logits at once in fp64."""
    logp = F.log_softmax(hidden.double() @ head.double().T / temperature, dim=-1)
    return pick_targets(logp, target), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("size", [1000, 7, 1])
def test_token_logprobs(monkeypatch, temperature, size):
    """Log-probability, entropy and the gradients of either and both are log_softmax's, for any chunk size."""
    set_chunk_size(monkeypatch, size)
    hidden, head, target = head_inputs(20)
    logprob, entropy = ours.TokenLogProbs.apply(hidden, head, target, temperature, True)
    expected = all_logits(hidden, head, target, temperature)
    close(logprob.double(), expected[0])
    without_entropy, none = ours.TokenLogProbs.apply(hidden, head, target, temperature)
    assert none is None and torch.equal(without_entropy, logprob)
    for x, y in zip(torch.autograd.grad(weighted(without_entropy), (hidden, head)),
                    torch.autograd.grad(weighted(logprob), (hidden, head), retain_graph=True)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    close(entropy.double(), expected[1])
    for a, b in ((1, 0), (0, 1), (1, -0.3)):
        result, truth = (
            torch.autograd.grad(a * weighted(p) + b * weighted(h.flip(0)), (hidden, head), retain_graph=True)
            for p, h in ((logprob, entropy), expected))
        for x, y in zip(result, truth):
            assert (x - y).norm() <= 1e-5 * y.norm()


def test_token_logprobs_far_apart(monkeypatch):
    """Exact to 1e-5 over 250 chunks, with a target in a chunk that holds all the probability, and another
    target of log-probability below −40."""
    set_chunk_size(monkeypatch, 4)
    hidden, head, target = head_inputs(20, V=1000)
    with torch.no_grad():
        hidden *= 4
        head[:3] = 9 * hidden[0] / hidden[0].norm()
        target[0], target[1] = 1, (head @ hidden[1]).argmin()
    expected = all_logits(hidden, head, target, 1.0)
    assert expected[0][0] > -2 and expected[0].min() < -40
    result = ours.TokenLogProbs.apply(hidden, head, target, 1.0, True)
    for x, y in zip(result, expected):
        close(x.double(), y)
    for x, y in zip(*(torch.autograd.grad(weighted(p) - weighted(h), (hidden, head))
                      for p, h in (result, expected))):
        assert (x - y).norm() <= 1e-5 * y.norm()


def test_a_frozen_head_gets_no_gradient():
    """Under LoRA no gradient of the head is computed; that of the hidden hidden is the same."""
    hidden, head, target = head_inputs(5)
    expected, = torch.autograd.grad(all_logits(hidden, head, target, 1.0)[0].sum(), hidden)
    logprob, _ = ours.TokenLogProbs.apply(hidden, head.detach(), target, 1.0)
    d_hidden, d_head, *_ = ours.TokenLogProbs.backward(logprob.grad_fn, torch.ones(5), None)
    close(d_hidden, expected)
    assert d_head is None


def test_token_logprobs_without_targets():
    """The gradients of hidden hidden and head are zero, not None."""
    hidden, head, target = head_inputs(0)
    logprob, entropy = ours.TokenLogProbs.apply(hidden, head, target, 1.0, True)
    assert logprob.shape == entropy.shape == (0,) and logprob.dtype == torch.float32
    d_hidden, d_head = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, head))
    assert d_hidden.shape == (0, 8) and d_head.shape == (50, 8) and not d_head.any()


def test_bf16_gradients_are_not_summed_in_bf16(monkeypatch):
    """The gradients of the hidden hidden (256 chunks) and of the head (2048 targets) have less than a quarter
    of the error of sums in bf16."""
    N, V, n = 2048, 2048, 8
    set_chunk_size(monkeypatch, n)
    hidden, head, target = head_inputs(N, V=V, dtype=torch.bfloat16)
    logp = F.log_softmax((hidden @ head.T).double(), dim=-1).detach()
    d = F.one_hot(target, V) - logp.exp()
    truth = d @ head.detach().double(), d.T @ hidden.detach().double()
    loss = ours.TokenLogProbs.apply(hidden, head, target, 1.0)[0].sum()
    result = torch.autograd.grad(loss, (hidden, head))
    d, in_bf16 = d.bfloat16(), [torch.zeros_like(hidden), torch.zeros_like(head)]
    for i in range(0, N, n):
        in_bf16[0] += d[:, i:i + n] @ head[i:i + n].detach()
        in_bf16[1] += d[i:i + n].T @ hidden[i:i + n].detach()
    for exact, ours_, summed in zip(truth, result, in_bf16):
        assert ours_.dtype == torch.bfloat16
        assert 4 * (ours_.double() - exact).norm() < (summed.double() - exact).norm()


def test_chunks():
    """Chunks cover the vocabulary once, in order, and hold at most `elements` logits, or `least` tokens;
    their widths are multiples of 64 (the last one's as far as V is)."""
    for V, N, elements, least in itertools.product((1, 7, 64), (0, 3, 50), (10, 100, 1000), (1, 5)):
        chunks = ours.chunks(V, N, elements, least)
        assert [i for chunk in chunks for i in range(V)[chunk]] == list(range(V))
        assert all(0 < chunk.stop - chunk.start <= max(least, elements // max(1, N)) for chunk in chunks)
    for N in (0, 1, 408, 1200, 10**6):
        assert not any(chunk.start % 64 or chunk.stop % 64 for chunk in ours.chunks(32064, N))


def test_no_logits_are_saved(monkeypatch):
    """No tensor of targets × vocabulary exists at any time; forward saves only its inputs and [N] tensors."""
    N, D, V, elements = 512, 8, 2048, 2**13
    monkeypatch.setattr(ours.chunks, "__defaults__", (elements, 16))
    hidden, head, target = head_inputs(N, D, V)
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprob, entropy = ours.TokenLogProbs.apply(hidden, head, target, 1.0, True)
        (logprob.sum() + entropy.sum()).backward()
    assert sum(saved) <= N * D + V * D + 3 * N
    assert elements // 2 <= largest.numbers <= max(elements, V * D) < N * V // 50


def test_memory_does_not_grow_with_positions_times_vocabulary():
    """With 64 or 1024 image tokens, training creates no tensor of positions × vocabulary."""
    V, D = 8192, 16
    text = llama_config(vocab_size=V, hidden_size=D, intermediate_size=16)
    for side in (16, 64):
        tokens = (side // 2) ** 2
        tower = clip_config(image_size=side, patch_size=2)
        model = vision_llm(llava_config(text, vision_config=tower, image_seq_length=tokens))
        batch = make_batch([([1, *image_tokens(tokens), 41], [[5, 6, 2]])], [0])
        batch.pixels = torch.randn(1, 3, side, side)
        with Largest() as largest:
            logprobs(model, batch).sum().backward()
        # the gradient of a [V, D] matrix, or the [T, T] attention scores of four heads
        assert largest.numbers <= max(V * D, 4 * (tokens + 8) ** 2) < tokens * V


# ---- answers that share a prompt ----

def test_attention_mask_is_the_definition():
    """q sees k iff k comes no later, is not padding, and belongs to the prompt or to q's own answer."""
    branch = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, -1, -1], [0, 1, 2, 2, 1, 3, 3, -1, -1, 3]])
    index = torch.arange(10)
    for first in (0, 6):  # all queries, or the last four against a cache of all keys
        mask = ours.attention_mask(branch[:, first:], branch, index[first:], index)
        assert mask.shape == (2, 1, 10 - first, 10)
        for b, q, k in itertools.product(range(2), range(first, 10), range(10)):
            q_branch, k_branch = branch[b, q].item(), branch[b, k].item()
            expected = k <= q and k_branch != -1 and k_branch in (0, q_branch)
            assert mask[b, 0, q - first, k].item() == expected, (b, q, k)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_packed_answers_equal_separate_sequences(K):
    """K packed answers of unequal length have the log-probabilities, last hidden states (which a reward head
    reads) and gradients of K sequences of one answer each."""
    model = vision_llm()
    answers = [random_words(n, n) + [2] for n in (4, 1, 7, 2, 0)[:K]]
    shared = make_batch([(ONE[0], answers), (TEXT[0], answers[::-1])], [0])
    separate = make_batch([(ONE[0], [a]) for a in answers] + [(TEXT[0], [a]) for a in answers[::-1]], [0] * K)
    assert shared.causal_prefix == (shared.ids.shape[1] if K == 1 else len(TEXT[0]))
    assert separate.causal_prefix == separate.ids.shape[1]
    assert len(shared.target) == len(separate.target) and shared.answer.tolist() == separate.answer.tolist()
    hidden = [model.hidden(batch, model.vision_tower(batch.pixels), batch.last_token, lambda x, head: x)
              for batch in (shared, separate)]
    assert hidden[0].shape == (2 * K, 32)
    close(*hidden)
    a, b = logprobs(model, shared), logprobs(model, separate)
    close(a, b)
    same_gradients(gradients(model, weighted(a)), gradients(model, weighted(b)), 1e-5)


MANY = [(ONE[0], [[5, 6, 2], [7, 2]]), (TEXT[0], [[9, 10, 11, 12, 2]]), (TWO[0], [[3, 2], [4, 4, 2], [2]])]
causal_and_masked = pytest.mark.parametrize("rows", [
    pytest.param([ONE, TEXT, TWO], id="causal"), pytest.param(MANY, id="masked")])


@causal_and_masked
def test_padding_does_not_matter(rows):
    """Seven more tokens of padding, of any id, change no log-probability and no gradient."""
    model = vision_llm()
    a, b = (logprobs(model, make_batch(rows, [0, 1, 2], **more)) for more in ({}, {"extra": 7, "pad": 33}))
    close(a, b)
    same_gradients(gradients(model, weighted(a)), gradients(model, weighted(b)), 1e-5)


@causal_and_masked
def test_batch_order_does_not_matter(rows):
    """Sequences in another order give the same log-probabilities, in that order, and the same gradients."""
    model = vision_llm()
    first, second = make_batch(rows, [0, 1, 2]), make_batch(rows[::-1], [1, 2, 0])
    a, b = logprobs(model, first), logprobs(model, second)
    T, order = first.ids.shape[1], []
    for row in (2, 1, 0):
        order += torch.nonzero(first.logit_position // T == row).squeeze(1).tolist()
    close(a[order], b)
    weight = torch.linspace(-1, 2, len(a))
    same_gradients(gradients(model, (a * weight).sum()), gradients(model, (b * weight[order]).sum()), 1e-5)


@causal_and_masked
def test_recompute_changes_nothing(rows):
    """With recompute on, each layer runs twice and all gradients are the same."""
    model = vision_llm()
    batch, runs, grads = make_batch(rows, [0, 1, 2]), [], []
    for linear in (*(layer.mlp.gate_proj for layer in model.language_model.model.layers),
                   *(layer.mlp.fc1 for layer in model.vision_tower.vision_model.encoder.layers)):
        linear.register_forward_pre_hook(lambda *_: runs.append(1))
    for on in (False, True):
        model.set_recompute(on)
        runs.clear()
        grads.append(gradients(model, weighted(logprobs(model, batch))))
        assert len(runs) == (2 + 2) * (1 + on)
    same_gradients(*grads, 1e-6)


def test_collate_is_the_definition(tmp_path):
    """data.collate packs examples as make_batch does: image tokens expanded, each distinct image once."""
    for name in "ab":
        data.Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    a, b = (str(tmp_path / f"{name}.png") for name in "ab")
    processor = data.Processor(
        tokenizer=None, template=None, image_token=IMAGE, image_tokens=PATCHES, size=8, mode="crop",
        mean=data.CLIP_MEAN, std=data.CLIP_STD, resize=8, resample=data.BICUBIC, pad=0, stop=frozenset({2}),
        banned=frozenset(), max_len=100)
    rows, images = [LATER, MANY[2], TEXT], [[b], [a, b], []]

    def short(ids):  # one token per image, as in data.Example
        text = " ".join(map(str, ids)).replace(" ".join(map(str, image_tokens())), str(IMAGE))
        return np.array(text.split(), dtype=np.int32)
    examples = [data.Example(i, str(i), short(prompt), [short(answer) for answer in answers],
                             [short(answer) < USER for answer in answers], images[i])
                for i, (prompt, answers) in enumerate(rows)]
    batch, expected = data.collate(examples, processor), make_batch(rows, [0, 1, 0])
    for name in ("ids", "position", "branch", "image", "image_position", "target", "logit_position", "answer",
                 "last_token", "sequence"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name), msg=name)
    assert batch.pixels.shape == (2, 3, 8, 8) and batch.causal_prefix == expected.causal_prefix
    assert (batch.token_shape, batch.answer_shape) == (expected.token_shape, expected.answer_shape)
    assert batch.pixels[0, 2].mean() > batch.pixels[0, 0].mean()  # the first image of the batch is blue


# ---- generation ----

PROMPTS = [ONE[0], TEXT[0], TWO[0], [1, *image_tokens(), 50, 51, 52, 53, 54, 55], [1]]
PROMPT_IMAGES = [[0], [], [1, 2], [1], []]
STEPS = 12


def all_prompts():
    return make_batch([(prompt, []) for prompt in PROMPTS], sum(PROMPT_IMAGES, []))


def single_prompt(b):
    return make_batch([(PROMPTS[b], [])], PROMPT_IMAGES[b])


def generate(model, batch, max_new=STEPS, stop=(), **options):
    return ours.generate(model, batch, model.vision_tower(batch.pixels), max_new, stop, **options)


def peer_generate(peer, b, stop=(), banned=()):
    """transformers' greedy answer to one of PROMPTS."""
    batch = single_prompt(b)
    images = {"pixel_values": batch.pixels[batch.image]} if PROMPT_IMAGES[b] else {}
    out = peer.generate(
        input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), max_new_tokens=STEPS, do_sample=False,
        pad_token_id=0, eos_token_id=list(stop) or None, suppress_tokens=list(banned) or None, **images)
    return out[0, batch.ids.shape[1]:].tolist()


@pytest.fixture(scope="module")
def pair():
    """A model, its peer, and a stop id that some greedy answers contain early, some late or never."""
    model, peer = llava_pair(llava_config(), seed=2)
    answers = [peer_generate(peer, b) for b in range(len(PROMPTS))]
    stop = next(t for t in range(VOCAB) if 2 <= sum(t in answer[:-1] for answer in answers) < len(answers)
                and any(t in answer[1:6] and t != answer[0] for answer in answers))
    return model, peer, stop


def test_greedy_is_transformers(pair):
    """Greedy answers equal transformers', with and without stop ids and banned ids."""
    model, peer, stop = pair
    banned = [t for t in range(20, 50) if t != stop]
    for options in ({}, {"stop": [stop]}, {"stop": [stop, 5], "banned": banned}, {"banned": [stop]}):
        expected = [peer_generate(peer, b, **options) for b in range(len(PROMPTS))]
        answers, _ = generate(model, all_prompts(), **options)
        assert answers == [[answer] for answer in expected], options
        if options == {"stop": [stop]}:
            ended = [answer[-1] == stop for answer in expected]
            assert any(ended) and not all(ended) and len({len(answer) for answer in expected}) > 1, expected
        assert not {t for answer in expected for t in answer} & set(options.get("banned", ()))


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.8}])
def test_a_batch_is_one_by_one(pair, options):
    """K samples per prompt of a batch equal each sample generated by itself with its own uniforms."""
    model, _, stop = pair
    K = 3
    uniforms = ours.keyed_uniforms(0, 0, range(len(PROMPTS)), K, STEPS) if options else None
    answers, logprob = generate(model, all_prompts(), stop=[stop], num_samples=K, uniforms=uniforms,
                                **options)
    for b, k in itertools.product(range(len(PROMPTS)), range(K)):
        own = None if uniforms is None else uniforms[b:b + 1, k:k + 1]
        [[expected]], alone = generate(model, single_prompt(b), stop=[stop], uniforms=own, **options)
        assert answers[b][k] == expected, (b, k)
        close(logprob[b, k], alone[0, 0], 1e-4)
        assert stop not in expected[:-1] and (len(expected) == STEPS or expected[-1] == stop)
    greedy = options in ({}, {"temperature": 0.0})
    assert all((len({tuple(answer) for answer in samples}) == 1) == greedy for samples in answers)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_returned_logprob_is_teacher_forced(pair, temperature):
    """The returned log-probability is that of a forward pass over the answer: at temperature 1, with the stop
    id, and with banned ids in the softmax."""
    model, _, _ = pair
    K, stop = 3, range(1, USER, 5)
    banned = range(USER, VOCAB)  # never predicted, as make_batch has it
    uniforms = ours.keyed_uniforms(1, 0, range(len(PROMPTS)), K, STEPS)
    answers, logprob = generate(model, all_prompts(), stop=stop, banned=banned, uniforms=uniforms,
                                num_samples=K, temperature=temperature)
    batch = make_batch(list(zip(PROMPTS, answers)), sum(PROMPT_IMAGES, []))
    assert len({len(answer) for row in answers for answer in row}) > 2
    forced = torch.zeros(len(PROMPTS) * K).index_add(0, batch.answer, logprobs(model, batch).detach())
    close(logprob.flatten(), forced, 1e-4)


@pytest.mark.parametrize("max_new", [1, 2, 7])
def test_max_new_tokens_and_banned(pair, max_new):
    """Without stop ids, answers have max_new_tokens tokens, none of them banned, even at temperature 50."""
    model, _, _ = pair
    banned = [0, 1, *range(10, 40), IMAGE]
    uniforms = ours.keyed_uniforms(2, 0, range(len(PROMPTS)), 4, max_new)
    answers, logprob = generate(model, all_prompts(), max_new, uniforms=uniforms, num_samples=4,
                                banned=banned, temperature=50.0)
    assert [len(row) for row in answers] == [4] * len(PROMPTS) and logprob.shape == (len(PROMPTS), 4)
    assert {len(answer) for row in answers for answer in row} == {max_new}
    used = {token for row in answers for answer in row for token in answer}
    assert len(used) > 4 and not used & set(banned)


def test_padding_gets_empty_answers(pair):
    """Beside prompts, by itself, and while other ranks still decode."""
    model, _, _ = pair
    uniforms = ours.keyed_uniforms(0, 0, [0, 1], 2, 4)
    both = make_batch([([0], []), (PROMPTS[0], [])], PROMPT_IMAGES[0])
    both.branch[0] = -1
    answers, _ = generate(model, both, 4, uniforms=uniforms, num_samples=2)
    [expected], _ = generate(model, single_prompt(0), 4, uniforms=uniforms[1:], num_samples=2)
    assert answers == [[[], []], expected]
    asked = []

    def any_running(running):
        asked.append(running.any().item())
        return len(asked) < 3
    answers, logprob = generate(model, padding_batch(), 4, uniforms=uniforms[:1], num_samples=2,
                                any_running=any_running)
    assert answers == [[[], []]] and not logprob.any() and asked == [False] * 3


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.8}])
def test_steps_of_fixed_shape(pair, options):
    """A decoding step that always attends over the full cache, as one recorded in a CUDA graph does, and
    that takes no state from Python, gives the same tokens and log-probabilities."""
    model, _, stop = pair
    uniforms = ours.keyed_uniforms(0, 0, range(len(PROMPTS)), 3, STEPS) if options else None
    batch = all_prompts()
    expected, logprob = generate(model, batch, stop=[stop], num_samples=3, uniforms=uniforms, **options)
    sampling = options.get("temperature", 1.0), options.get("top_k", 0), options.get("top_p", 1.0)
    with torch.no_grad():
        decoder = ours.Decoder(model, batch, model.vision_tower(batch.pixels), STEPS, [stop], [], uniforms, 3,
                               sampling)
        state = {name: value for name, value in vars(decoder).items() if torch.is_tensor(value)}
        for _ in range(STEPS - 1):
            decoder.advance()
    assert decoder.cache.visible == decoder.cache.size
    assert all(getattr(decoder, name) is value for name, value in state.items())  # changed in place
    found = [[ids[:n] for ids, n in zip(*samples)]
             for samples in zip(decoder.tokens.tolist(), decoder.lengths.tolist())]
    assert found == expected
    close(decoder.logprob, logprob, 1e-5)


@pytest.mark.parametrize("check_every, segment", [(2, 2), (3, 6), (4, 4), (8, 128)])
def test_segments_of_steps(check_every, segment, pair, monkeypatch):
    """On a GPU, steps are replayed from one graph per segment, over positions that are not all filled yet,
    and only every few of them is asked whether a sample still runs: the same answers. (Here the graph is the
    step itself.)"""
    model, _, stop = pair
    uniforms = ours.keyed_uniforms(0, 0, range(len(PROMPTS)), 3, STEPS)
    options, captured = {"stop": [stop], "num_samples": 3, "uniforms": uniforms}, []
    expected, logprob = generate(model, all_prompts(), **options)
    monkeypatch.setattr(ours, "pacing", lambda device, cuda_graph: (check_every, segment))
    monkeypatch.setattr(ours, "captured", lambda step: captured.append(step) or step)
    found, again = generate(model, all_prompts(), **options)
    assert found == expected
    close(again, logprob, 1e-5)
    assert len(captured) == sum(step + check_every < STEPS for step in range(0, STEPS - 1, segment))


def test_no_step_reads_from_the_device():
    """Model, losses, advantages and a decoding step run on meta, which has shapes and no values: a tensor
    that is read by Python, or left on the CPU, raises."""
    def on_meta(batch):
        return batch.to("meta")
    model = vision_llm(llava_config()).to("meta")
    args = SimpleNamespace(beta=0.1, loss="sigmoid", label_smoothing=0.1, length_norm=False, sft_coef=1.0,
                           temperature=1.0, clip_range=0.2)
    pairs = on_meta(make_batch([MANY[0], (ONE[0], [[9, 2], [8, 7, 2]])], [0, 1]))
    loss, _ = dpo.micro_batch_loss(model, pairs, [{"logps": [-1.0, -2.0]}] * 2, 2, 9, args)
    loss.backward()
    mixed = on_meta(make_batch([ONE, TEXT, TWO], [0, 1, 2]))
    features = model.vision_tower(mixed.pixels)
    sft.sft_loss(model(mixed, features), 9).backward()
    value, mask = data.pad_by_sequence(model(mixed, features.detach()).detach(), mixed.answer,
                                       mixed.token_shape)
    rewards = ppo.kl_reward(value, value, value[:, 0], mask, 0.1)
    advantages, returns = ppo.gae(rewards, value, mask, 1.0, 0.95)
    rollout = ppo.Rollout([], mixed, None, features.detach(), None)
    old = ppo.OldOutputs(mask, value, value, value, features.detach())
    ppo.policy_backward(rollout, old, ppo.Targets(advantages, returns), model, 9, args)
    prompts = on_meta(all_prompts())
    uniforms = torch.empty(len(PROMPTS), 2, 4, dtype=torch.float64, device="meta")
    for sampling in ((1.0, 0, 1.0), (0.7, 5, 0.9), (0, 0, 1.0)):
        with torch.no_grad():
            features = model.vision_tower(prompts.pixels)
            decoder = ours.Decoder(model, prompts, features, 4, [2], [3], uniforms, 2, sampling)
            decoder.advance()
        assert decoder.tokens.device.type == "meta"


# ---- sampling a token ----

def test_sample_token_follows_the_softmax():
    """Frequencies at temperature 0.7 pass a chi-square test (level 0.001) for 0.7 and fail it for 1."""
    logits = torch.tensor([0.5, -1.0, 1.2, 0.0, -0.3, 0.9, -2.0, 0.1])
    N = 20_000
    uniform = ours.keyed_uniforms(0, 0, [0], 1, N)[0, 0]
    counts = torch.bincount(ours.sample_token(logits.expand(N, -1), uniform, 0.7), minlength=8)

    def chi_square(temperature):
        expected = N * F.softmax(logits.double() / temperature, dim=-1)
        return ((counts - expected) ** 2 / expected).sum()
    assert chi_square(0.7) < 24.32 < chi_square(1.0)  # 7 degrees of freedom


EIGHTHS = torch.tensor([1, 4, 1, 2]).div(8).log()  # probabilities 1/8, 1/2, 1/8, 1/4


def token_shares(logits, **options):
    """The share of evenly spread uniforms that each token gets."""
    N = 1680
    uniform = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    tokens = ours.sample_token(logits.expand(N, -1), uniform, **options)
    return torch.bincount(tokens, minlength=len(logits)) / N


@pytest.mark.parametrize("options, expected", [
    ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"top_k": 1}, [0, 1, 0, 0]),
    ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_k": 9}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"top_p": 0.01}, [0, 1, 0, 0]),  # the most likely token always stays
    ({"top_p": 0.49}, [0, 1, 0, 0]),
    ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_p": 0.74}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of equally likely tokens, the first
    ({"top_p": 0.88}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # top_k first: it leaves 2/3 and 1/3
    ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),  # 1 : 16 : 1 : 4, so 16/22 = 0.727 reaches 0.7
    ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
])
def test_top_k_and_top_p(options, expected):
    """Shares worked by hand."""
    shares = token_shares(EIGHTHS, **options)
    close(shares, torch.tensor(expected, dtype=torch.float32), 1e-3)
    assert (shares > 0).tolist() == [share > 0 for share in expected]


def test_probability_of_exactly_top_p_is_enough():
    assert token_shares(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.6), (0, 0.95), (12, 0.7)])
def test_top_k_and_top_p_are_transformers(top_k, top_p):
    """On random logits the tokens that remain are those of transformers' warpers, top_k before top_p."""
    for logits in 2 * torch.randn(20, 30, generator=torch.Generator().manual_seed(4)):
        warped = hf.TopKLogitsWarper(top_k)(None, logits[None]) if top_k else logits[None]
        warped = hf.TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
        probability = F.softmax(warped[0].double(), dim=-1)
        middle = probability.cumsum(0) - probability / 2  # a uniform in the middle of each token's interval
        chosen = ours.sample_token(logits.expand(30, -1), middle, top_k=top_k, top_p=top_p)
        assert torch.equal(chosen[probability > 0], torch.arange(30)[probability > 0])
        grid = torch.linspace(0, 1 - 1e-16, 101, dtype=torch.float64)
        chosen = ours.sample_token(logits.expand(101, -1), grid, top_k=top_k, top_p=top_p)
        assert (probability[chosen] > 0).all()


@pytest.mark.parametrize("likely", [[0], [3], [7], [2, 5], [0, 7], list(range(1, 7))])
def test_tokens_of_probability_zero_are_never_sampled(likely):
    """The extreme uniforms give the first and the last token of positive probability."""
    logits = torch.full((8,), -torch.inf)
    logits[likely] = torch.linspace(-1, 1, len(likely))
    ends = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert ends[1] < 1
    for temperature in (0.3, 1.0, 3.0):
        assert ours.sample_token(logits.expand(2, -1), ends, temperature).tolist() == [likely[0], likely[-1]]


def test_greedy_without_uniform_or_temperature():
    assert ours.sample_token(EIGHTHS, None) == ours.sample_token(EIGHTHS, None, 2.0, top_k=3, top_p=0.9) == 1
    assert ours.sample_token(EIGHTHS, torch.tensor(0.99), temperature=0.0) == 1


def test_keyed_uniforms_depend_only_on_their_key():
    """Not on the batch or on the numbers of samples and steps; other keys give other numbers."""
    uniforms = ours.keyed_uniforms(3, 1, [4, 9, 2], 5, 6)
    assert uniforms.shape == (3, 5, 6) and uniforms.dtype == torch.float64
    assert 0 <= uniforms.min() and uniforms.max() < 1
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(ours.keyed_uniforms(3, 1, [2, 4], 5, 6), uniforms[[2, 0]])
    assert torch.equal(ours.keyed_uniforms(3, 1, [9], 2, 3), uniforms[1:2, :2, :3])
    keys = (3, 1, [4, 9, 2]), (4, 1, [4, 9, 2]), (3, 2, [4, 9, 2]), (1, 3, [4, 9, 2]), (3, 1, [5])
    drawn = torch.cat([ours.keyed_uniforms(*key, 5, 6).flatten() for key in keys])
    assert len(drawn.unique()) == len(drawn)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


# ---- a real model ----

@pytest.mark.skipif(not STORIES.is_dir(), reason="no ../shared/real/stories260k-hf")
def test_real_stories():
    """150 greedy tokens of a real 260K-parameter LLaMA equal transformers'."""
    peer = hf.LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    text = hf.LlamaConfig.from_pretrained(STORIES)
    model = ours.VisionLLM(llava_config(text, image_token_index=-1))  # no image occurs
    weights = load_file(STORIES / "model.safetensors")
    missing, unexpected = model.language_model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if "lm_head.weight" not in weights else [])
    prompt = [1, 403, 407]
    expected = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.long),
                             max_new_tokens=150, do_sample=False, eos_token_id=None, pad_token_id=0)
    [[answer]], logprob = generate(model, make_batch([(prompt, [])]), 150)
    assert len(answer) == 150 and answer == expected[0, 3:].tolist()
    assert -150 < logprob.item() < 0  # below 1 nat per token; uniform guessing would be 150 log 512 = 936
