"""model.py against transformers on tiny random models, and against its own definitions.

Everything is fp32 on the CPU and nothing is downloaded. `peer` is the transformers model with the same random
weights, `ours` is model.py. Tokens here: 0 … 39 are words that answers are made of, 40 … 62 are a user's and
never predicted, 63 is a picture's.

Legend: B rows, T positions, N targets, D width, V vocabulary, I tokens an image, K samples.
"""
import itertools
import math
from pathlib import Path

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
import model as ours

VOCAB, USER, IMAGE = 64, 40, 63
PATCHES = 4  # of a picture of 8 × 8 in patches of 4 × 4
PICTURES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
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
    """The name in model.py (and in checkpoints) of what transformers holds in memory as `name`."""
    for theirs, mine in (("model.vision_tower.", "vision_tower.vision_model."),
                         ("model.multi_modal_projector.", "multi_modal_projector."),
                         ("model.language_model.", "language_model.model."),
                         ("lm_head.", "language_model.lm_head.")):
        if name.startswith(theirs):
            return mine + name[len(theirs):]
    raise AssertionError(name)


@torch.no_grad()
def randomise(model, seed=0):
    """Weights large enough for every part to matter: norms near 1, biases off 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.copy_(0.2 * torch.randn(p.shape, generator=generator) + (name.endswith("weight") and p.dim() == 1))
    return model.eval()


@torch.no_grad()
def give_weights(peer, model, rename=our_name, absent=()):
    """Copies the peer's parameters into ours: all of either side have a twin, but for the peer's `absent`."""
    theirs = {rename(name): p for name, p in peer.named_parameters() if rename(name) not in absent}
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.shape == theirs[name].shape, name
        p.copy_(theirs[name])


def llava_pair(config, seed=0):
    peer = randomise(hf.LlavaForConditionalGeneration(config), seed)
    model = ours.VisionLLM(config)
    give_weights(peer, model)
    return model, peer


def vision_llm(config=None, seed=0):
    return randomise(ours.VisionLLM(config or llava_config()), seed)


# ---- rows ----

def picture(n=PATCHES):
    return [IMAGE] * n


def make_batch(rows, image=(), extra=0, pad=0):
    """(prompt ids, [answer ids, …]) pairs → data.Batch by its definition, padded to the longest + extra.
    image: which of PICTURES each run of image tokens shows, in row order."""
    laid = []  # of each row: (id, position, branch) of its columns
    predicted = []  # (row, column that predicts, id, answer)
    last, owner = [], []
    for b, (prompt, answers) in enumerate(rows):
        columns = [(token, i, 0) for i, token in enumerate(prompt)]
        for k, ids in enumerate(answers):
            before = end = len(prompt) - 1  # the column that predicts the next token; the last predicted one
            for i, token in enumerate(ids):
                if token < USER:
                    predicted.append((b, before, token, len(owner)))
                before = len(columns)
                columns.append((token, len(prompt) + i, k + 1))
                end = before if token < USER else end
            last.append((b, end))
            owner.append(b)
        laid.append(columns)
    T = max(map(len, laid)) + extra
    ids, position, branch = torch.tensor([row + [(pad, 0, -1)] * (T - len(row)) for row in laid]).unbind(-1)
    pixels = PICTURES[:max(image) + 1] if image else torch.zeros(1, 3, 8, 8)
    return data.Batch(
        ids.contiguous(), position.contiguous(), branch.contiguous(), pixels,
        image=torch.tensor(image, dtype=torch.long),
        target=torch.tensor([token for *_, token, _ in predicted], dtype=torch.long),
        logit_position=torch.tensor([b * T + column for b, column, *_ in predicted], dtype=torch.long),
        answer=torch.tensor([a for *_, a in predicted], dtype=torch.long),
        last_token=torch.tensor([b * T + column for b, column in last], dtype=torch.long),
        sequence=torch.tensor(owner, dtype=torch.long),
        causal_prefix=min([T, *(len(prompt) for prompt, answers in rows if len(answers) > 1)]))


def row_of_padding():
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
    """A loss in which every target weighs differently."""
    return (logprob * torch.linspace(-1, 2, len(logprob))).sum()


def gradients(model, loss, rename=str, absent=()):
    """Backward through the loss; → {our name: gradient, or None where the loss does not reach}."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {rename(name): p.grad for name, p in model.named_parameters()}
    return {name: grad for name, grad in found.items() if name not in absent}


def not_reached(found):
    return {name for name, grad in found.items() if grad is None}


def same_gradients(a, b, limit=1e-4):
    """Every parameter's gradient within `limit` in relative norm, and None at the same parameters."""
    assert a.keys() == b.keys()
    assert not_reached(a) == not_reached(b)
    whole = torch.stack([grad.norm() for grad in b.values() if grad is not None]).norm()
    assert whole > 0
    for name, grad in b.items():
        if grad is None:
            continue
        if "vision_model" in name and name.endswith("k_proj.bias"):  # softmax does not see it: 0, rounded
            assert max(a[name].norm(), grad.norm()) <= 1e-5 * whole, name
        else:
            error = (a[name] - grad).norm()
            assert error <= limit * grad.norm(), (name, error / grad.norm())


def logprobs(model, batch, **options):
    return model(batch, model.vision_tower(batch.pixels), **options)


def peer_distribution(peer, batch):
    """log softmax [N, V] where the batch's targets are predicted, by transformers; rows of one answer."""
    pictures = {"pixel_values": batch.pixels[batch.image]} if len(batch.image) else {}
    logits = peer(input_ids=batch.ids, attention_mask=(batch.branch >= 0).long(), **pictures).logits
    return F.log_softmax(logits.flatten(0, 1)[batch.logit_position], dim=-1)


def at_targets(logp, target):
    return logp.gather(1, target[:, None]).squeeze(1)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes, forward or backward."""
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
    """Features are hidden_states[layer], class token dropped or kept; gradients too, none past the layer."""
    config = clip_config(hidden_act=act)
    peer, model = randomise(hf.CLIPVisionModel(config)), ours.CLIPVision(config, layer, drop_class)
    give_weights(peer, model, "vision_model.{}".format)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    features = model(pixels)
    expected = peer(pixels, output_hidden_states=True).hidden_states[layer][:, int(drop_class):]
    close(features, expected)
    assert features.shape == (2, PATCHES + (not drop_class), 32)
    same_gradients(gradients(model, weighted(features.flatten())),
                   gradients(peer, weighted(expected.flatten()), "vision_model.{}".format))


@pytest.mark.parametrize("layer", [4, -5])
def test_clip_layer_out_of_range(layer):
    """A feature layer that the tower does not have is an error that says which it has."""
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
    """All log-probabilities at 48 positions (three times llama3's original context), and every gradient."""
    config = llama_config(**changes)
    peer, model = randomise(hf.LlamaForCausalLM(config)), ours.Llama(config, IMAGE)
    give_weights(peer, model, str)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    B, T = 2, 48
    ids, target = torch.randint(0, IMAGE, (2, B, T), generator=torch.Generator().manual_seed(2))
    position = torch.arange(T).expand(B, -1)
    logp = F.log_softmax(model(ids, position, None, torch.arange(B * T), F.linear), dim=-1)
    expected = F.log_softmax(peer(ids).logits.flatten(0, 1), dim=-1)
    close(logp, expected)
    same_gradients(gradients(model, weighted(at_targets(logp, target.flatten()))),
                   gradients(peer, weighted(at_targets(expected, target.flatten()))))


def test_llama3_scaling_by_hand():
    """What turns over 4 times in the original context stays, under once is divided by 8, else in between."""
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


def test_unknown_parts_are_refused():
    """A rope type or an activation that model.py does not have is an error, not a guess."""
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
    with pytest.raises(ValueError, match="got rope_type 'yarn', need default, linear or llama3"):
        ours.Llama(llama_config(rope_parameters=yarn), IMAGE)
    with pytest.raises(ValueError, match="got the activation 'gelu_new'"):
        ours.Llama(llama_config(hidden_act="gelu_new"), IMAGE)


# ---- the whole vision-LLM ----

ONE = ([1, *picture(), 41, 42], [[5, 6, 2]])
TWO = ([1, *picture(), 41, *picture(), 42, 43], [[7, 8, 9, 10, 2]])
ADJACENT = ([1, 44, *picture(), *picture()], [[11, 2]])
TURNS = ([1, *picture(), 41], [[5, 6, 2, 43, 44, 7, 8, 2]])
LATER = ([1, 45, 41], [[5, 2, 46, *picture(), 43, 9, 9, 2]])  # a picture in the second turn
TEXT = ([1, 45, 62, 47, 48], [[12, 13, 14, 2]])


@pytest.mark.parametrize("rows, image", [
    pytest.param([ONE], [0], id="one image"),
    pytest.param([TWO], [0, 1], id="two images"),
    pytest.param([ADJACENT], [1, 0], id="two images side by side"),
    pytest.param([TURNS], [0], id="multi-turn"),
    pytest.param([LATER], [0], id="image in a later turn"),
    pytest.param([ONE, TEXT, TWO, LATER], [1, 0, 1, 2], id="mixed with a text-only row and a shared image"),
])
def test_vlm_is_transformers(rows, image):
    """Log-probabilities, entropies and every parameter's gradient; the tower's unreached layers get none."""
    model, peer = llava_pair(llava_config())
    batch = make_batch(rows, image)
    logprob, entropy = logprobs(model, batch, entropy=True)
    expected = peer_distribution(peer, batch)
    assert len(logprob) == sum(token < USER for _, [answer] in rows for token in answer)
    close(logprob, at_targets(expected, batch.target))
    close(entropy, -(expected.exp() * expected).sum(-1))
    found = gradients(model, weighted(logprob))
    same_gradients(found, gradients(peer, weighted(at_targets(expected, batch.target)), our_name))
    later = ("vision_tower.vision_model.encoder.layers.2.", "vision_tower.vision_model.post_layernorm.")
    assert not_reached(found) == {name for name in found if name.startswith(later)}


def test_names_are_the_mapping():
    """model.our_name takes every name of transformers' to the one that the parity tests build on."""
    for name, _ in hf.LlavaForConditionalGeneration(llava_config()).named_parameters():
        assert ours.our_name(name) == ours.our_name(our_name(name)) == our_name(name)


@pytest.mark.parametrize("changes", [
    pytest.param({"vision_feature_select_strategy": "full"}, id="class token kept"),
    pytest.param({"vision_feature_layer": -1}, id="last layer"),
    pytest.param({"multimodal_projector_bias": False}, id="projector without bias"),
    pytest.param({"text": llama_config(tie_word_embeddings=True), "tie_word_embeddings": True}, id="tied"),
    pytest.param({"projector_hidden_act": "quick_gelu"}, id="projector activation"),
])
def test_vlm_variants_are_transformers(changes):
    """The same for other configurations, on rows of unequal length."""
    config = llava_config(**changes)
    model, peer = llava_pair(config)
    assert (model.multi_modal_projector.linear_1.bias is not None) == config.multimodal_projector_bias
    shown = picture(PATCHES + (config.vision_feature_select_strategy == "full"))
    rows = [([1, *shown, 41], [[5, 6, 2]]), ([1, 42, *shown, 43, *shown], [[7, 8, 9, 2]])]
    batch = make_batch(rows, [0, 1, 0])
    logprob = logprobs(model, batch)
    expected = at_targets(peer_distribution(peer, batch), batch.target)
    close(logprob, expected)
    same_gradients(gradients(model, weighted(logprob)), gradients(peer, weighted(expected), our_name))


def test_linear_projector_is_transformers():
    """A one-layer projector equals transformers' two with no activation and the identity as the second."""
    peer = randomise(hf.LlavaForConditionalGeneration(llava_config(projector_hidden_act="linear")))
    config = llava_config(projector_hidden_act="gelu", mm_projector_type="linear")  # gelu must not be used
    model = ours.VisionLLM(config)
    absent = ("multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias")
    with torch.no_grad():
        peer.model.multi_modal_projector.linear_2.weight.copy_(torch.eye(32))
        peer.model.multi_modal_projector.linear_2.bias.zero_()
    give_weights(peer, model, absent=absent)
    batch = make_batch([ONE, TEXT], [0])
    logprob, expected = logprobs(model, batch), at_targets(peer_distribution(peer, batch), batch.target)
    close(logprob, expected)
    same_gradients(gradients(model, weighted(logprob)), gradients(peer, weighted(expected), our_name, absent))


def test_text_only_stays_connected():
    """Without pictures tower and projector get zero gradients, not none: every rank must reduce as many."""
    model = vision_llm()
    usual = gradients(model, logprobs(model, make_batch([ONE], [0])).sum())
    found = gradients(model, logprobs(model, make_batch([TEXT])).sum())
    assert not_reached(found) == not_reached(usual)
    for name, grad in found.items():
        assert grad is None or grad.any() == name.startswith("language_model."), name


@pytest.mark.parametrize("padding", [True, False])
def test_no_targets_stay_connected(padding):
    """A row of padding, or a prompt without answers, gives zero gradients to all that is usually reached."""
    model = vision_llm()
    usual = gradients(model, logprobs(model, make_batch([ONE], [0])).sum())
    batch = row_of_padding() if padding else make_batch([(ONE[0], [])], [0])
    found = gradients(model, logprobs(model, batch).sum())
    assert not_reached(found) == not_reached(usual)
    assert not any(grad.any() for grad in found.values() if grad is not None)


# ---- token log-probabilities ----

def head_inputs(N, D=8, V=50, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    states, head = torch.randn(N, D, generator=g).to(dtype), torch.randn(V, D, generator=g).to(dtype)
    return states.requires_grad_(), head.requires_grad_(), torch.randint(0, V, (N,), generator=g)


def cut(monkeypatch, n):
    """Makes parts of n tokens of the vocabulary."""
    monkeypatch.setattr(ours, "chunks", lambda V, N: [slice(i, min(i + n, V)) for i in range(0, V, n)])


def plain(states, head, target, temperature):
    """What TokenLogProbs computes, with all logits at once, in fp64."""
    logp = F.log_softmax(states.double() @ head.double().T / temperature, dim=-1)
    return at_targets(logp, target), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("part", [1000, 7, 1])
def test_token_logprobs(monkeypatch, temperature, part):
    """Log-probability, entropy and the gradients of either and both are log_softmax's, in whatever parts."""
    cut(monkeypatch, part)
    states, head, target = head_inputs(20)
    logprob, entropy = ours.TokenLogProbs.apply(states, head, target, temperature, True)
    expected = plain(states, head, target, temperature)
    close(logprob.double(), expected[0])
    alone, none = ours.TokenLogProbs.apply(states, head, target, temperature)
    assert none is None and torch.equal(alone, logprob)
    for x, y in zip(torch.autograd.grad(weighted(alone), (states, head)),
                    torch.autograd.grad(weighted(logprob), (states, head), retain_graph=True)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    close(entropy.double(), expected[1])
    for a, b in ((1, 0), (0, 1), (1, -0.3)):
        found, truth = (
            torch.autograd.grad(a * weighted(p) + b * weighted(h.flip(0)), (states, head), retain_graph=True)
            for p, h in ((logprob, entropy), expected))
        for x, y in zip(found, truth):
            assert (x - y).norm() <= 1e-5 * y.norm()


def test_token_logprobs_far_apart(monkeypatch):
    """Over 250 parts, with a row whose first part holds all its probability, and a target of log-probability
    below −40: all is log_softmax's to 1e-5, and so are the gradients."""
    cut(monkeypatch, 4)
    states, head, target = head_inputs(20, V=1000)
    with torch.no_grad():
        states *= 4
        head[:3] = 9 * states[0] / states[0].norm()
        target[0], target[1] = 1, (head @ states[1]).argmin()
    expected = plain(states, head, target, 1.0)
    assert expected[0][0] > -2 and expected[0].min() < -40
    found = ours.TokenLogProbs.apply(states, head, target, 1.0, True)
    for x, y in zip(found, expected):
        close(x.double(), y)
    for x, y in zip(*(torch.autograd.grad(weighted(p) - weighted(h), (states, head))
                      for p, h in (found, expected))):
        assert (x - y).norm() <= 1e-5 * y.norm()


def test_a_frozen_head_gets_no_gradient():
    """Under LoRA none of the head is made; the states' gradient is the same."""
    states, head, target = head_inputs(5)
    expected, = torch.autograd.grad(plain(states, head, target, 1.0)[0].sum(), states)
    logprob, _ = ours.TokenLogProbs.apply(states, head.detach(), target, 1.0)
    d_states, d_head, *_ = ours.TokenLogProbs.backward(logprob.grad_fn, torch.ones(5), None)
    close(d_states, expected)
    assert d_head is None


def test_token_logprobs_of_nothing():
    """No targets: zero gradients for states and head, which are there all the same."""
    states, head, target = head_inputs(0)
    logprob, entropy = ours.TokenLogProbs.apply(states, head, target, 1.0, True)
    assert logprob.shape == entropy.shape == (0,) and logprob.dtype == torch.float32
    d_states, d_head = torch.autograd.grad(logprob.sum() + entropy.sum(), (states, head))
    assert d_states.shape == (0, 8) and d_head.shape == (50, 8) and not d_head.any()


def test_bf16_gradients_are_not_summed_in_bf16(monkeypatch):
    """Over 256 parts the states' gradient, and over 2048 rows the head's, is over 4 times nearer the truth
    than autograd's sum of bf16 gradients."""
    N, V, n = 2048, 2048, 8
    cut(monkeypatch, n)
    states, head, target = head_inputs(N, V=V, dtype=torch.bfloat16)
    logp = F.log_softmax((states @ head.T).double(), dim=-1).detach()
    d = F.one_hot(target, V) - logp.exp()
    truth = d @ head.detach().double(), d.T @ states.detach().double()
    loss = ours.TokenLogProbs.apply(states, head, target, 1.0)[0].sum()
    found = torch.autograd.grad(loss, (states, head))
    d, in_bf16 = d.bfloat16(), [torch.zeros_like(states), torch.zeros_like(head)]
    for i in range(0, N, n):
        in_bf16[0] += d[:, i:i + n] @ head[i:i + n].detach()
        in_bf16[1] += d[i:i + n].T @ states[i:i + n].detach()
    for exact, ours_, summed in zip(truth, found, in_bf16):
        assert ours_.dtype == torch.bfloat16
        assert 4 * (ours_.double() - exact).norm() < (summed.double() - exact).norm()


def test_parts():
    """Parts cover the vocabulary once, in order, and hold at most `elements` logits, or `least` columns."""
    for V, N, elements, least in itertools.product((1, 7, 64), (0, 3, 50), (10, 100, 1000), (1, 5)):
        parts = ours.chunks(V, N, elements, least)
        assert [i for part in parts for i in range(V)[part]] == list(range(V))
        assert all(0 < part.stop - part.start <= max(least, elements // max(1, N)) for part in parts)


def test_no_logits_are_kept(monkeypatch):
    """Nothing as large as targets × vocabulary is ever made, nor saved between forward and backward."""
    N, D, V, elements = 512, 8, 2048, 2**13
    monkeypatch.setattr(ours.chunks, "__defaults__", (elements, 1))
    states, head, target = head_inputs(N, D, V)
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprob, entropy = ours.TokenLogProbs.apply(states, head, target, 1.0, True)
        (logprob.sum() + entropy.sum()).backward()
    assert sum(saved) <= N * D + V * D + 3 * N
    assert elements // 2 <= largest.numbers <= max(elements, V * D) < N * V // 50


def test_memory_does_not_grow_with_positions_times_vocabulary():
    """With 64 or 1024 columns of picture, training makes nothing near positions × vocabulary large."""
    V, D = 8192, 16
    text = llama_config(vocab_size=V, hidden_size=D, intermediate_size=16)
    for side in (16, 64):
        tokens = (side // 2) ** 2
        tower = clip_config(image_size=side, patch_size=2)
        model = vision_llm(llava_config(text, vision_config=tower, image_seq_length=tokens))
        batch = make_batch([([1, *picture(tokens), 41], [[5, 6, 2]])], [0])
        batch.pixels = torch.randn(1, 3, side, side)
        with Largest() as largest:
            logprobs(model, batch).sum().backward()
        # the gradient of a [V, D] matrix, or four heads' [T, T] scores where attention makes them
        assert largest.numbers <= max(V * D, 4 * (tokens + 8) ** 2) < tokens * V


# ---- rows that share a prompt ----

def test_visible_is_the_definition():
    """q sees k iff k comes no later in the row, is not padding, and is of the prompt or q's own answer."""
    branch = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, -1, -1], [0, 1, 2, 2, 1, 3, 3, -1, -1, 3]])
    column = torch.arange(10)
    for first in (0, 6):  # all columns, or the last four as queries to a cache of all
        mask = ours.attention_mask(branch[:, first:], branch, column[first:], column)
        assert mask.shape == (2, 1, 10 - first, 10)
        for b, q, k in itertools.product(range(2), range(first, 10), range(10)):
            of, at = branch[b, q].item(), branch[b, k].item()
            expected = k <= q and at != -1 and (at == 0 or at == of)
            assert mask[b, 0, q - first, k].item() == expected, (b, q, k)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_shared_prompt_is_separate_rows(K):
    """A row of K answers of unequal length has the log-probabilities and gradients of K rows of one."""
    model = vision_llm()
    answers = [random_words(n, n) + [2] for n in (4, 1, 7, 2, 0)[:K]]
    shared = make_batch([(ONE[0], answers), (TEXT[0], answers[::-1])], [0])
    separate = make_batch([(ONE[0], [a]) for a in answers] + [(TEXT[0], [a]) for a in answers[::-1]], [0] * K)
    assert shared.causal_prefix == (shared.ids.shape[1] if K == 1 else len(TEXT[0]))
    assert separate.causal_prefix == separate.ids.shape[1]
    assert len(shared.target) == len(separate.target) and shared.answer.tolist() == separate.answer.tolist()
    a, b = logprobs(model, shared), logprobs(model, separate)
    close(a, b)
    same_gradients(gradients(model, weighted(a)), gradients(model, weighted(b)), 1e-5)


def test_states_at_last_are_separate_rows():
    """What a reward head reads, the state at each answer's last token, is the same shared or separate."""
    model = vision_llm()
    answers = [random_words(n, n) + [2] for n in (4, 1, 7)]
    states = []
    for rows in ([(ONE[0], answers)], [(ONE[0], [a]) for a in answers]):
        batch = make_batch(rows, [0] * len(rows))
        states.append(model.hidden(batch, model.vision_tower(batch.pixels), batch.last_token, lambda x, head: x))
        assert (batch.ids.flatten()[batch.last_token] == 2).all()
    assert states[0].shape == (3, 32)
    close(*states)


MANY = [(ONE[0], [[5, 6, 2], [7, 2]]), (TEXT[0], [[9, 10, 11, 12, 2]]), (TWO[0], [[3, 2], [4, 4, 2], [2]])]
causal_and_masked = pytest.mark.parametrize("rows", [
    pytest.param([ONE, TEXT, TWO], id="causal"), pytest.param(MANY, id="masked")])


@causal_and_masked
def test_padding_does_not_matter(rows):
    """Seven more columns of padding, with any id, change no log-probability and no gradient."""
    model = vision_llm()
    a, b = (logprobs(model, make_batch(rows, [0, 1, 2], **more)) for more in ({}, {"extra": 7, "pad": 33}))
    close(a, b)
    same_gradients(gradients(model, weighted(a)), gradients(model, weighted(b)), 1e-5)


@causal_and_masked
def test_batch_order_does_not_matter(rows):
    """Rows in another order give the same log-probabilities, in that order, and the same gradients."""
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
    """With recompute on, every layer reached runs twice and all gradients are the same."""
    model = vision_llm()
    batch, runs, found = make_batch(rows, [0, 1, 2]), [], []
    for module in (*model.language_model.model.layers, *model.vision_tower.vision_model.encoder.layers):
        (module.mlp.gate_proj if hasattr(module.mlp, "gate_proj") else module.mlp.fc1).register_forward_pre_hook(lambda *_: runs.append(1))
    for on in (False, True):
        model.set_recompute(on)
        runs.clear()
        found.append(gradients(model, weighted(logprobs(model, batch))))
        assert len(runs) == (2 + 2) * (1 + on)
    same_gradients(*found, 1e-6)


@tiny.compiles
def test_compiled_layers_compute_the_same():
    """Causal rows and masked ones, of three lengths each: the gradients of compiled layers are those of plain
    ones; what is compiled at the second length fits the third; names are kept; decoding stays plain."""
    model = vision_llm(llava_config(llama_config(num_hidden_layers=12)))  # many more than kinds of code
    made, counts = torch._dynamo.utils.counters["frames"], []
    batches = [make_batch(rows, [0, 1, 2], extra) for rows in ([ONE, TEXT, TWO], MANY) for extra in (0, 3, 5)]
    plain = [gradients(model, weighted(logprobs(model, batch))) for batch in batches]
    names = list(model.state_dict())
    model.compile_layers()
    torch._dynamo.reset()
    made.clear()
    for batch, expected in zip(batches, plain):
        same_gradients(gradients(model, weighted(logprobs(model, batch))), expected, 1e-5)
        counts.append(made["total"])
    assert list(model.state_dict()) == names
    assert 0 < counts[0] < 12 and counts[0] < counts[1] == counts[2] and counts[4] == counts[5] < 36, counts
    features = model.vision_tower(batches[0].pixels).detach()
    ours.generate(model, make_batch([(ONE[0], [])], [0]), features, 4, ())
    assert made["ok"] == made["total"] == counts[5], made
    torch._dynamo.reset()


def test_collate_is_the_definition(tmp_path):
    """data.collate lays examples out as make_batch does, image tokens expanded, distinct pictures once."""
    for name in "ab":
        data.Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    a, b = (str(tmp_path / f"{name}.png") for name in "ab")
    processor = data.Processor(
        tokenizer=None, template=None, image_token=IMAGE, image_tokens=PATCHES, size=8, mode="crop",
        mean=data.CLIP_MEAN, std=data.CLIP_STD, resize=8, resample=data.BICUBIC, pad=0, stop=frozenset({2}),
        banned=frozenset(), max_len=100)
    rows, images = [LATER, MANY[2], TEXT], [[b], [a, b], []]

    def short(ids):  # one image token a picture, as examples hold them
        text = " ".join(map(str, ids)).replace(" ".join(map(str, picture())), str(IMAGE))
        return np.array(text.split(), dtype=np.int32)
    examples = [data.Example(i, str(i), short(prompt), [short(answer) for answer in answers],
                             [short(answer) < USER for answer in answers], images[i])
                for i, (prompt, answers) in enumerate(rows)]
    found, expected = data.collate(examples, processor), make_batch(rows, [0, 1, 0])
    for name in ("ids", "position", "branch", "image", "target", "logit_position", "answer", "last_token", "sequence"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    assert found.pixels.shape == (2, 3, 8, 8) and found.causal_prefix == expected.causal_prefix
    assert found.pixels[0, 2].mean() > found.pixels[0, 0].mean()  # the first picture met is blue


# ---- generation ----

PROMPTS = [ONE[0], TEXT[0], TWO[0], [1, *picture(), 50, 51, 52, 53, 54, 55], [1]]
SHOWN = [[0], [], [1, 2], [1], []]
STEPS = 12


def all_prompts():
    return make_batch([(prompt, []) for prompt in PROMPTS], sum(SHOWN, []))


def alone(b):
    return make_batch([(PROMPTS[b], [])], SHOWN[b])


def generate(model, batch, max_new=STEPS, stop=(), **options):
    return ours.generate(model, batch, model.vision_tower(batch.pixels), max_new, stop, **options)


def peer_generate(peer, b, stop=(), banned=()):
    """transformers' greedy answer to one of PROMPTS alone."""
    batch = alone(b)
    pictures = {"pixel_values": batch.pixels[batch.image]} if SHOWN[b] else {}
    out = peer.generate(
        input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), max_new_tokens=STEPS, do_sample=False,
        pad_token_id=0, eos_token_id=list(stop) or None, suppress_tokens=list(banned) or None, **pictures)
    return out[0, batch.ids.shape[1]:].tolist()


@pytest.fixture(scope="module")
def pair():
    """A model, its peer, and an id that some greedy answers hold early, some late or never."""
    model, peer = llava_pair(llava_config(), seed=2)
    answers = [peer_generate(peer, b) for b in range(len(PROMPTS))]
    stop = next(t for t in range(VOCAB) if 2 <= sum(t in answer[:-1] for answer in answers) < len(answers)
                and any(t in answer[1:6] and t != answer[0] for answer in answers))
    return model, peer, stop


def test_greedy_is_transformers(pair):
    """Greedy answers are transformers' to the token: up to max_new, to a stop that some reach, with bans."""
    model, peer, stop = pair
    banned = [t for t in range(20, 50) if t != stop]
    for options in ({}, {"stop": [stop]}, {"stop": [stop, 5], "banned": banned}, {"banned": [stop]}):
        expected = [peer_generate(peer, b, **options) for b in range(len(PROMPTS))]
        found, _ = generate(model, all_prompts(), **options)
        assert found == [[answer] for answer in expected], options
        if options == {"stop": [stop]}:
            ended = [answer[-1] == stop for answer in expected]
            assert any(ended) and not all(ended) and len({len(answer) for answer in expected}) > 1, expected
        assert not {t for answer in expected for t in answer} & set(options.get("banned", ()))


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.8}])
def test_a_batch_is_one_by_one(pair, options):
    """Unequal prompts in a batch, K samples from one prefill = each sample run alone, with its uniforms."""
    model, _, stop = pair
    K = 3
    uniforms = ours.keyed_uniforms(0, 0, range(len(PROMPTS)), K, STEPS) if options else None
    found, logprob = generate(model, all_prompts(), stop=[stop], num_samples=K, uniforms=uniforms, **options)
    for b, k in itertools.product(range(len(PROMPTS)), range(K)):
        own = None if uniforms is None else uniforms[b:b + 1, k:k + 1]
        [[expected]], single = generate(model, alone(b), stop=[stop], uniforms=own, **options)
        assert found[b][k] == expected, (b, k)
        close(logprob[b, k], single[0, 0], 1e-4)
        assert stop not in expected[:-1] and (len(expected) == STEPS or expected[-1] == stop)
    greedy = options in ({}, {"temperature": 0.0})
    assert all((len({tuple(answer) for answer in row}) == 1) == greedy for row in found)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_returned_logprob_is_teacher_forced(pair, temperature):
    """The returned log-probability is the answer's as a row: temperature 1, stop included, no id banned."""
    model, _, _ = pair
    K, stop = 3, range(1, USER, 5)
    banned = range(USER, VOCAB)  # never predicted, as make_batch has it
    uniforms = ours.keyed_uniforms(1, 0, range(len(PROMPTS)), K, STEPS)
    answers, logprob = generate(model, all_prompts(), stop=stop, banned=banned, uniforms=uniforms, num_samples=K,
                                temperature=temperature)
    batch = make_batch(list(zip(PROMPTS, answers)), sum(SHOWN, []))
    assert len({len(answer) for row in answers for answer in row}) > 2
    forced = torch.zeros(len(PROMPTS) * K).index_add(0, batch.answer, logprobs(model, batch).detach())
    close(logprob.flatten(), forced, 1e-4)


@pytest.mark.parametrize("max_new", [1, 2, 7])
def test_max_new_and_banned(pair, max_new):
    """Answers without a stop have max_new tokens, and none that is banned, at the highest temperature too."""
    model, _, _ = pair
    banned = [0, 1, *range(10, 40), IMAGE]
    uniforms = ours.keyed_uniforms(2, 0, range(len(PROMPTS)), 4, max_new)
    answers, logprob = generate(model, all_prompts(), max_new, uniforms=uniforms, num_samples=4, banned=banned,
                                temperature=50.0)
    assert [len(row) for row in answers] == [4] * len(PROMPTS) and logprob.shape == (len(PROMPTS), 4)
    assert {len(answer) for row in answers for answer in row} == {max_new}
    used = {token for row in answers for answer in row for token in answer}
    assert len(used) > 4 and not used & set(banned)


def test_padding_beside_prompts_says_nothing(pair):
    """A row of padding gets empty answers, on its own too, and for as long as other ranks go on."""
    model, _, _ = pair
    uniforms = ours.keyed_uniforms(0, 0, [0, 1], 2, 4)
    both = make_batch([([0], []), (PROMPTS[0], [])], SHOWN[0])
    both.branch[0] = -1
    found, _ = generate(model, both, 4, uniforms=uniforms, num_samples=2)
    [expected], _ = generate(model, alone(0), 4, uniforms=uniforms[1:], num_samples=2)
    assert found == [[[], []], expected]
    asked = []

    def any_running(running):
        asked.append(running.any().item())
        return len(asked) < 3
    answers, logprob = generate(model, row_of_padding(), 4, uniforms=uniforms[:1], num_samples=2, any_running=any_running)
    assert answers == [[[], []]] and not logprob.any() and asked == [False] * 3


# ---- choosing a token ----

def test_choose_follows_the_softmax():
    """Frequencies at temperature 0.7 pass a chi-square test at the 0.001 level; for 1 they fail."""
    logits = torch.tensor([0.5, -1.0, 1.2, 0.0, -0.3, 0.9, -2.0, 0.1])
    N = 20_000
    uniform = ours.keyed_uniforms(0, 0, [0], 1, N)[0, 0]
    counts = torch.bincount(ours.sample_token(logits.expand(N, -1), uniform, 0.7), minlength=8)

    def chi_square(temperature):
        expected = N * F.softmax(logits.double() / temperature, dim=-1)
        return ((counts - expected) ** 2 / expected).sum()
    assert chi_square(0.7) < 24.32 < chi_square(1.0)  # 7 degrees of freedom


EIGHTHS = torch.tensor([1, 4, 1, 2]).div(8).log()  # probabilities 1/8, 1/2, 1/8, 1/4


def shares(logits, **options):
    """The share of evenly spread uniforms that each token gets."""
    N = 1680
    uniform = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    return torch.bincount(ours.sample_token(logits.expand(N, -1), uniform, **options), minlength=len(logits)) / N


@pytest.mark.parametrize("options, expected", [
    ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"top_k": 1}, [0, 1, 0, 0]),
    ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_k": 9}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"top_p": 0.01}, [0, 1, 0, 0]),  # the likeliest always stays
    ({"top_p": 0.49}, [0, 1, 0, 0]),
    ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_p": 0.74}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of equals, the first
    ({"top_p": 0.88}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # top_k first: it leaves 2/3 and 1/3
    ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),  # 1 : 16 : 1 : 4, so 16/22 = 0.727 reaches 0.7
    ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
])
def test_choose_cuts(options, expected):
    """top_k and top_p keep exactly the right tokens, in their proportions (worked by hand)."""
    found = shares(EIGHTHS, **options)
    close(found, torch.tensor(expected, dtype=torch.float32), 1e-3)
    assert (found > 0).tolist() == [share > 0 for share in expected]


def test_choose_reaches_top_p_exactly():
    """Of four equal tokens top_p = 0.5 keeps two: what reaches top_p suffices."""
    assert shares(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.6), (0, 0.95), (12, 0.7)])
def test_choose_keeps_what_transformers_keeps(top_k, top_p):
    """On random logits the tokens kept are those of transformers' warpers, top_k before top_p."""
    for logits in 2 * torch.randn(20, 30, generator=torch.Generator().manual_seed(4)):
        warped = hf.TopKLogitsWarper(top_k)(None, logits[None]) if top_k else logits[None]
        warped = hf.TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
        kept = F.softmax(warped[0].double(), dim=-1)
        middle = kept.cumsum(0) - kept / 2  # a uniform in the middle of each token's interval
        chosen = ours.sample_token(logits.expand(30, -1), middle, top_k=top_k, top_p=top_p)
        assert torch.equal(chosen[kept > 0], torch.arange(30)[kept > 0])
        grid = torch.linspace(0, 1 - 1e-16, 101, dtype=torch.float64)
        assert (kept[ours.sample_token(logits.expand(101, -1), grid, top_k=top_k, top_p=top_p)] > 0).all()


@pytest.mark.parametrize("likely", [[0], [3], [7], [2, 5], [0, 7], list(range(1, 7))])
def test_choose_never_takes_probability_zero(likely):
    """The least and the greatest uniform take the first and the last token whose probability is not 0."""
    logits = torch.full((8,), -torch.inf)
    logits[likely] = torch.linspace(-1, 1, len(likely))
    ends = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert ends[1] < 1
    for temperature in (0.3, 1.0, 3.0):
        assert ours.sample_token(logits.expand(2, -1), ends, temperature).tolist() == [likely[0], likely[-1]]


def test_choose_greedy():
    """No uniform, or temperature 0: the likeliest token, whatever the cuts."""
    assert ours.sample_token(EIGHTHS, None) == ours.sample_token(EIGHTHS, None, 2.0, top_k=3, top_p=0.9) == 1
    assert ours.sample_token(EIGHTHS, torch.tensor(0.99), temperature=0.0) == 1


def test_keyed_uniforms_depend_on_their_key_only():
    """A number is the same in any batch, among however many samples and steps; other keys give others."""
    whole = ours.keyed_uniforms(3, 1, [4, 9, 2], 5, 6)
    assert whole.shape == (3, 5, 6) and whole.dtype == torch.float64 and 0 <= whole.min() and whole.max() < 1
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(ours.keyed_uniforms(3, 1, [2, 4], 5, 6), whole[[2, 0]])
    assert torch.equal(ours.keyed_uniforms(3, 1, [9], 2, 3), whole[1:2, :2, :3])
    keys = (3, 1, [4, 9, 2]), (4, 1, [4, 9, 2]), (3, 2, [4, 9, 2]), (1, 3, [4, 9, 2]), (3, 1, [5])
    drawn = torch.cat([ours.keyed_uniforms(*key, 5, 6).flatten() for key in keys])
    assert len(drawn.unique()) == len(drawn)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


# ---- a real model ----

@pytest.mark.skipif(not STORIES.is_dir(), reason="no ../shared/real/stories260k-hf")
def test_real_stories():
    """150 greedy tokens of a real 260K-parameter LLaMA equal transformers', its weights read by name."""
    peer = hf.LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    text = hf.LlamaConfig.from_pretrained(STORIES)
    model = ours.VisionLLM(llava_config(text, image_token_index=-1))  # no picture occurs
    weights = load_file(STORIES / "model.safetensors")
    missing, unexpected = model.language_model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if "lm_head.weight" not in weights else [])
    prompt = [1, 403, 407]
    expected = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.long),
                             max_new_tokens=150, do_sample=False, eos_token_id=None, pad_token_id=0)
    [[found]], logprob = generate(model, make_batch([(prompt, [])]), 150)
    assert len(found) == 150 and found == expected[0, 3:].tolist()
    assert -150 < logprob.item() < 0  # under a nat a token; chance would be 150 log 512 = 936
