"""model.py against transformers (`peer`, of the same random weights) and its own definitions, in fp32.

Token ids: 0 … 39 are words of answers, 40 … 62 are words of users and never targets, 63 is the image token. A
record is (prompt, answers, images), with one image token per image; images are indices into IMAGES.

Legend: B sequences, T positions, N targets, D width, V vocabulary, K answers or samples.
"""
import itertools
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import dpo
import model as ours
import ppo
import sft

VOCAB, USER, IMAGE = 64, 40, 63
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}

ONE = ([1, IMAGE, 41, 42], [[5, 6, 2]], [0])
TWO = ([1, IMAGE, 41, IMAGE, 42, 43], [[7, 8, 9, 10, 2]], [1, 2])
ADJACENT = ([1, 44, IMAGE, IMAGE], [[11, 2]], [1, 0])
LATER = ([1, 45, 41], [[5, 2, 46, IMAGE, 43, 9, 9, 2]], [2])  # an image in the second turn
TEXT = ([1, 45, 62, 47, 48], [[12, 13, 14, 2]], [])
LONG = ([1, IMAGE, *range(41, 62)], [[*range(USER)]], [0])
CAUSAL = [ONE, TEXT, TWO, LATER, ADJACENT]
PACKED = [(ONE[0], [[5, 6, 2], [7, 2]], [1]), (TEXT[0], [[9, 10, 11, 12, 2]], []),
          (TWO[0], [[3, 2], [4, 4, 2], [2], [17, 5, 4, 3, 9, 30, 2]], [0, 1])]


# ---- models, batches, comparisons ----

def llama_config(**changes):
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return hf.LlamaConfig(**{**settings, **changes})


def llava_config(text=None, **changes):
    settings = {"vision_config": tiny.clip_config(num_hidden_layers=3), "text_config": text or llama_config(),
                "tie_word_embeddings": False, "image_token_index": IMAGE, "image_seq_length": tiny.PATCHES,
                "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    return hf.LlavaConfig(**{**settings, **changes})


@torch.no_grad()
def llava_pair(config, seed=0):
    """Our model and its peer, whose parameters must be the same set."""
    peer = tiny.randomise(hf.LlavaForConditionalGeneration(config), seed)
    model, weights = ours.VisionLLM(config), {ours.our_name(name): p for name, p in peer.named_parameters()}
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.shape == weights[name].shape, name
        p.copy_(weights[name])
    return model, peer


def make_batch(*records, tile_tokens=tiny.PATCHES):
    """data.collate (tests/test_data.py compares it with its definition), with 33 as the padding's id."""
    processor = data.Processor(
        tokenizer=None, template=None, image_token=IMAGE, tile_tokens=tile_tokens, size=16, mode="crop",
        mean=data.CLIP_MEAN, std=data.CLIP_STD, resize=16, resample=data.BICUBIC, grids=(), pad=33,
        end_ids=frozenset(), banned=frozenset(), max_len=2000)
    examples = [data.Example(i, str(i), np.array(prompt), [*map(np.array, answers)],
                             [np.array(answer) < USER for answer in answers], images)
                for i, (prompt, answers, images) in enumerate(records)]
    distinct = [*dict.fromkeys(image for *_, images in records for image in images)]
    return data.collate(examples, processor, IMAGES[distinct or [0]])


def close(a, b, limit=1e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= limit, (a - b).abs().max()


def weighted(logprob):
    """A loss with a different weight for each target."""
    return (logprob * torch.linspace(-1, 2, len(logprob))).sum()


def gradients(model, loss):
    """Backward through the loss; → {our name: gradient} of the parameters that the loss reaches."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {ours.our_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, found, peer, expected, limit=1e-4):
    """The values agree, and so do the gradients of all parameters."""
    close(found, expected)
    found, expected = gradients(model, weighted(found)), gradients(peer, weighted(expected))
    tiny.assert_same_gradients(found, expected, limit)


def logprobs(model, batch, **options):
    return model(batch, model.vision_tower(batch.pixels), **options)


def pick_targets(logp, target):
    return logp.gather(1, target[:, None]).squeeze(1)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


# ---- parity with transformers ----

@pytest.mark.parametrize("changes, records", [
    ({}, CAUSAL), ({}, [LATER]),
    *(({"text": llama_config(**text)}, [LONG]) for text in (
        {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 12},
        {"head_dim": 16, "rope_parameters": LLAMA3}, {"rope_parameters": LINEAR},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"attention_bias": True, "mlp_bias": True}, {"rms_norm_eps": 0.1, "hidden_act": "gelu"})),
    ({"vision_feature_select_strategy": "full", "image_seq_length": 5}, [ONE]),
    *(({"vision_feature_layer": layer}, [ONE, TWO]) for layer in (-1, 1, -4)),
    ({"vision_config": tiny.clip_config(hidden_act="gelu")}, [ONE, TWO]),
    ({"multimodal_projector_bias": False}, [ONE, TWO]),
    ({"text": llama_config(tie_word_embeddings=True), "tie_word_embeddings": True}, [ONE, TWO]),
    ({"projector_hidden_act": "quick_gelu"}, [ONE, TWO])])
def test_vision_llm_is_transformers(changes, records):
    """Log-probabilities, entropies and all gradients, which parameters after the feature layer do not get."""
    config = llava_config(**changes)
    model, peer = llava_pair(config)
    batch = make_batch(*records, tile_tokens=config.image_seq_length)
    logprob, entropy = logprobs(model, batch, entropy=True)
    logits = peer(input_ids=batch.ids, attention_mask=(batch.branch >= 0).long(),
                  pixel_values=tiny.shown(batch, config)).logits
    b, t = ((batch.branch == 1) & (batch.ids < USER)).nonzero(as_tuple=True)
    logp = F.log_softmax(logits[b, t - 1], dim=-1)
    close(entropy, -(logp.exp() * logp).sum(-1))
    assert_same(model, logprob, peer, pick_targets(logp, batch.ids[b, t]))


@pytest.mark.parametrize("size", ["LLaVA-1.5 7B", "LLaVA-1.5 13B", "LLaMA-3 70B"])
def test_models_of_real_sizes(size, monkeypatch):
    """Names and shapes are those on the hub, and eight ranks hold every row of a weight once."""
    monkeypatch.syspath_prepend(str(tiny.ROOT / "benchmarks"))
    import memory
    config = memory.llava_config(*memory.SIZES[size])
    with torch.device("meta"):
        model, peer = ours.VisionLLM(config), hf.LlavaForConditionalGeneration(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in tiny.named(peer, tiny.HUB).items()}
    if size == "LLaVA-1.5 7B":  # that of llava-hf/llava-1.5-7b-hf
        assert sum(map(math.prod, shapes.values())) == 7_063_427_072
    rows = dict.fromkeys(shapes, 0)
    for rank in range(8):
        with memory.fake_world(rank, 8) as world:
            sharded = memory.fsdp.build_sharded(config, tiny.options(), world)
        for name, p in sharded.named_parameters():
            rows[name] += len(p.to_local())
    assert rows == {name: shape[0] for name, shape in shapes.items()}


# ---- token log-probabilities ----

def head_inputs(N, V, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    hidden, head = (torch.randn(n, 8, generator=g).to(dtype).requires_grad_() for n in (N, V))
    return hidden, head, torch.randint(0, V, (N,), generator=g)


@pytest.mark.parametrize("temperature, size, V", [(1.0, 99, 50), (0.7, 7, 50), (2.5, 1, 50), (1.0, 4, 1000)])
def test_token_logprobs_are_log_softmax(monkeypatch, temperature, size, V):
    """And entropies and gradients. V = 1000: one chunk holds nearly all; a target is below −40 nats."""
    monkeypatch.setattr(ours.chunks, "__defaults__", (1, size))  # chunks of this many tokens
    hidden, head, target = head_inputs(20, V)
    if V == 1000:
        hidden.data *= 4
        head.data[:3] = 9 * hidden[0] / hidden[0].norm()
        target[0], target[1] = 1, (head @ hidden[1]).argmin()
    logp = F.log_softmax(hidden.double() @ head.double().T / temperature, dim=-1)
    expected = pick_targets(logp, target), -(logp.exp() * logp).sum(-1)
    assert V == 50 or (expected[0][0] > -2 and expected[0].min() < -40)
    found = ours.TokenLogProbs.apply(hidden, head, target, temperature, True)
    for x, y in zip(found, expected):
        close(x.double(), y)
    for a, b in ((1, 0), (0, 1), (1, -0.3)):
        for x, y in zip(*(torch.autograd.grad(a * weighted(p) + b * weighted(h.flip(0)), (hidden, head),
                                              retain_graph=True) for p, h in (found, expected))):
            assert (x - y).norm() <= (1e-5 if V == 50 else 1e-4) * y.norm()
    logprob, none = ours.TokenLogProbs.apply(hidden, head.detach(), target, temperature)  # a frozen head
    d_hidden, d_head, *_ = ours.TokenLogProbs.backward(logprob.grad_fn, torch.ones(20), None)
    assert none is None and d_head is None and torch.equal(logprob, found[0])
    close(d_hidden, torch.autograd.grad(expected[0].sum(), hidden)[0], 1e-4)


def test_bf16_gradients_are_summed_in_fp32(monkeypatch):
    """Over 256 chunks for hidden, 2048 targets for the head: sums in bf16 have relative errors above 0.01."""
    monkeypatch.setattr(ours.chunks, "__defaults__", (1, 8))
    hidden, head, target = head_inputs(2048, 2048, torch.bfloat16)
    logits = (hidden @ head.T).double()
    expected = torch.autograd.grad(pick_targets(F.log_softmax(logits, dim=-1), target).sum(), logits)[0]
    expected = expected @ head.detach().double(), expected.T @ hidden.detach().double()
    logprob, _ = ours.TokenLogProbs.apply(hidden, head, target, 1.0)
    for x, y in zip(torch.autograd.grad(logprob.sum(), (hidden, head)), expected):
        assert x.dtype == torch.bfloat16 and (x - y).norm() < 0.004 * y.norm()


def test_no_tensor_of_targets_times_vocabulary(monkeypatch):
    """A chunk of the logits has at most `elements` numbers; its width is a multiple of 64."""
    assert all(chunk.stop % 64 == 0 for N in (0, 408, 10**6) for chunk in ours.chunks(32064, N))
    N, V, D, elements = 600, 8192, 16, 2**18
    monkeypatch.setattr(ours.chunks, "__defaults__", (elements, 64))
    text = llama_config(vocab_size=V, hidden_size=D, num_attention_heads=1, num_key_value_heads=1)
    model = tiny.randomise(ours.VisionLLM(llava_config(text)))
    batch = make_batch((ONE[0], [[5] * N], [0]))
    with Largest() as largest:
        sum(map(torch.sum, logprobs(model, batch, entropy=True))).backward()
    # a chunk, the gradient of a [V, D] matrix, or the [T, T] attention scores
    assert largest.numbers <= max(elements, V * D, (N + 8) ** 2) < N * V // 10


# ---- invariances ----

@pytest.mark.parametrize("records", [CAUSAL, PACKED], ids=["causal", "packed"])
def test_packing_padding_and_order_do_not_matter(records):
    """Log-probabilities, gradients and last hidden states are those of each answer by itself."""
    model, batch = tiny.randomise(ours.VisionLLM(llava_config())), make_batch(*records)
    alone = [make_batch((prompt, [ids], images)) for prompt, answers, images in records for ids in answers]
    assert (batch.causal_prefix < batch.ids.shape[1]) == (records is PACKED)
    expected = torch.cat([logprobs(model, one) for one in alone])
    assert_same(model, logprobs(model, batch), model, expected, 1e-5)
    last, *each = (model.hidden(one, model.vision_tower(one.pixels), one.last_token, lambda x, head: x)
                   for one in (batch, *alone))
    close(last, torch.cat(each))


def test_recompute_changes_nothing():
    """With recompute on, each layer runs twice and all gradients are the same."""
    model, batch, runs, grads = tiny.randomise(ours.VisionLLM(llava_config())), make_batch(*PACKED), [], []
    for name, module in model.named_modules():
        if name.endswith(("mlp.gate_proj", "mlp.fc1")):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    for on in (False, True):
        model.set_recompute(on)
        runs.clear()
        grads.append(gradients(model, weighted(logprobs(model, batch))))
        assert len(runs) == (2 + 2) * (1 + on)
    tiny.assert_same_gradients(*grads, 1e-6)


@pytest.mark.parametrize("records", [[TEXT], [(ONE[0], [], [0])], []], ids=["text", "no answers", "padding"])
def test_batches_without_images_or_targets_stay_connected(records):
    """Gradients are zero rather than None, because all ranks must reduce the same gradients."""
    model = tiny.randomise(ours.VisionLLM(llava_config()))
    usual = gradients(model, logprobs(model, make_batch(ONE)).sum()).keys()
    grads = gradients(model, logprobs(model, make_batch(*records)).sum())
    assert grads.keys() == usual
    for name, grad in grads.items():
        assert grad.any() == (records == [TEXT] and name.startswith("language_model.")), name


# ---- generation ----

PROMPTS = [(prompt, [], images) for prompt, _, images in (
    ONE, TEXT, TWO, ([1, IMAGE, *range(50, 56)], [], [1]), ([1], [], []))]
STEPS = 12


def generate(model, batch, max_new=STEPS, stop=(), **options):
    return ours.generate(model, batch, model.vision_tower(batch.pixels), max_new, stop, **options)


def peer_generate(peer, prompt, stop=(), banned=()):
    """transformers' greedy answer."""
    batch = make_batch(prompt)
    images = {"pixel_values": tiny.shown(batch, peer.config)} if len(batch.image_feature) else {}
    out = peer.generate(
        input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), max_new_tokens=STEPS, do_sample=False,
        pad_token_id=0, eos_token_id=list(stop) or None, suppress_tokens=list(banned) or None, **images)
    return out[0, batch.ids.shape[1]:].tolist()


@pytest.fixture(scope="module")
def pair():
    """A model, its peer, and a stop id that some greedy answers contain early, and others do not."""
    model, peer = llava_pair(llava_config(), seed=2)
    answers = [peer_generate(peer, prompt) for prompt in PROMPTS]
    stops = [t for t in range(VOCAB) if 2 <= sum(t in answer[1:-1] for answer in answers) < len(answers)]
    return model, peer, stops[0]


def test_greedy_answers_are_transformers(pair):
    """With and without stop ids and banned ids."""
    model, peer, stop = pair
    banned = [t for t in range(20, 50) if t != stop]
    for options in ({}, {"stop": [stop]}, {"stop": [stop, 5], "banned": banned}, {"banned": [stop]}):
        expected = [[peer_generate(peer, prompt, **options)] for prompt in PROMPTS]
        assert generate(model, make_batch(*PROMPTS), **options)[0] == expected, options


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}])
def test_a_batch_is_generated_as_one_by_one(pair, options):
    """K samples per prompt of a batch equal each sample generated by itself with its own uniforms."""
    (model, _, stop), K = pair, 3
    uniforms = ours.keyed_uniforms(0, 0, range(len(PROMPTS)), K, STEPS)
    answers, logprob = generate(model, make_batch(*PROMPTS), stop=[stop], num_samples=K, uniforms=uniforms,
                                **options)
    for (b, prompt), k in itertools.product(enumerate(PROMPTS), range(K)):
        [[expected]], alone = generate(model, make_batch(prompt), stop=[stop],
                                       uniforms=uniforms[b:b + 1, k:k + 1], **options)
        assert answers[b][k] == expected, (b, k)
        close(logprob[b, k], alone[0, 0], 1e-4)


@pytest.mark.parametrize("temperature, max_new, stop", [
    (1.0, STEPS, range(3, USER, 5)), (0.5, STEPS, range(3, USER, 5)), (50.0, 1, ()), (50.0, 7, ())])
def test_returned_logprob_is_teacher_forced(pair, temperature, max_new, stop):
    """At temperature 1, with the stop id, and with banned ids, which are never sampled, in the softmax."""
    model, K = pair[0], 3
    banned = [0, 1, *range(10, 13), *range(USER, VOCAB)]
    uniforms = ours.keyed_uniforms(1, 0, range(len(PROMPTS)), K, max_new)
    answers, logprob = generate(model, make_batch(*PROMPTS), max_new, stop, banned=banned, uniforms=uniforms,
                                num_samples=K, temperature=temperature)
    lengths = {len(answer) for samples in answers for answer in samples}
    assert (len(lengths) > 2 and max(lengths) <= max_new) if stop else lengths == {max_new}
    assert not set(sum(sum(answers, []), [])) & set(banned)
    batch = make_batch(*((prompt, samples, images) for (prompt, _, images), samples in zip(PROMPTS, answers)))
    forced = torch.zeros(len(PROMPTS) * K).index_add(0, batch.answer, logprobs(model, batch).detach())
    close(logprob.flatten(), forced, 1e-4)


def test_padding_gets_empty_answers(pair):
    """Also while other ranks still decode."""
    uniforms, asked = ours.keyed_uniforms(0, 0, [0], 2, 4), []

    def any_running(running):
        asked.append(running.any().item())
        return len(asked) < 3
    answers, logprob = generate(pair[0], make_batch(), 4, uniforms=uniforms, num_samples=2,
                                any_running=any_running)
    assert answers == [[[], []]] and not logprob.any() and asked == [False] * 3


@pytest.mark.parametrize("check_every, segment", [(2, 2), (3, 6), (8, 128)])
def test_steps_of_a_cuda_graph(check_every, segment, pair, monkeypatch):
    """Replayed per segment over positions not yet filled, they give the same answers and keep each tensor.
    (Here the graph is the step itself.)"""
    model, _, stop = pair
    uniforms = ours.keyed_uniforms(0, 0, range(len(PROMPTS)), 3, STEPS)
    options, graphs = {"stop": [stop], "num_samples": 3, "uniforms": uniforms}, []
    expected, logprob = generate(model, make_batch(*PROMPTS), **options)

    def captured(step):
        graphs.append([(step.__self__, name, value) for name, value in vars(step.__self__).items()])
        return step
    monkeypatch.setattr(ours, "pacing", lambda device, cuda_graph: (check_every, segment))
    monkeypatch.setattr(ours, "captured", captured)
    found, again = generate(model, make_batch(*PROMPTS), **options)
    assert found == expected
    close(again, logprob, 1e-5)
    assert len(graphs) == sum(step + check_every < STEPS for step in range(0, STEPS - 1, segment))
    assert all(getattr(decoder, name) is value for graph in graphs for decoder, name, value in graph)


def test_no_step_reads_from_the_device():
    """They run on meta: a tensor that Python reads, or one that is left on the CPU, raises."""
    model = tiny.randomise(ours.VisionLLM(llava_config())).to("meta")
    argv = "--model", "model", "--data", "data.json"
    dpo_args = tiny.arguments("dpo", *argv, "--label_smoothing", 0.1, "--sft_coef", 1, "--image_coef", 1)
    ppo_args = tiny.arguments("ppo", *argv, "--reward_model", "rm", "--advantage", "grpo",
                              "--samples_per_prompt", 2)
    pairs = make_batch(PACKED[0], (ONE[0], [[9, 2], [8, 7, 2]], [0]), ONE).to("meta")  # ONE: corrupted
    reference = [{"logps": [-1.0, -2.0]}, {"logps": [-1.0, -2.0], "corrupted": -1.0}]
    loss, _ = dpo.micro_batch_loss(model, pairs, reference, 2, 9, dpo_args)
    loss.backward()
    mixed = make_batch(*CAUSAL).to("meta")
    features = model.vision_tower(mixed.pixels)
    sft.sft_loss(model(mixed, features), 9).backward()
    value = model(mixed, features.detach()).detach()
    value, mask = data.pad_by_sequence(value, mixed.answer, mixed.token_shape)
    advantages, returns = ppo.gae(ppo.kl_reward(value, value, value[:, 0], mask, 0.1), value, mask, 1.0, 0.95)
    rollout = ppo.Rollout([], mixed, None, features.detach(), None)
    old = ppo.OldOutputs(mask, value, value, value, features.detach())
    ppo.policy_backward(rollout, old, ppo.Estimates(advantages, returns), model, 9, ppo_args)
    prompts = make_batch(*PROMPTS).to("meta")
    uniforms = torch.empty(len(PROMPTS), 2, 4, dtype=torch.float64, device="meta")
    with torch.no_grad():
        features = model.vision_tower(prompts.pixels)
        ours.Decoder(model, prompts, features, 4, [2], [3], uniforms, 2, (0.7, 5, 0.9)).advance()


# ---- sampling a token ----

@pytest.mark.parametrize("options, expected", [
    ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
    ({"temperature": 0.0}, [0, 1, 0, 0]),
    ({"top_k": 1}, [0, 1, 0, 0]),
    ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_k": 9}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ({"top_p": 0.01}, [0, 1, 0, 0]),  # the most likely token always stays
    ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
    ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of equally likely tokens, the first
    ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # top_k first: it leaves 2/3 and 1/3
    ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),  # 1 : 16 : 1 : 4, so 16/22 = 0.727 reaches 0.7
])
def test_temperature_top_k_and_top_p_by_hand(options, expected):
    """The share of evenly spread uniforms, 0 and almost 1 among them, that each token gets."""
    logits = torch.tensor([1, 4, 1, 2]).div(8).log().expand(1680, -1)
    uniform = torch.linspace(0, 1 - 1e-16, 1680, dtype=torch.float64)
    shares = torch.bincount(ours.sample_token(logits, uniform, **options), minlength=4) / 1680
    close(shares, torch.tensor(expected, dtype=torch.float32), 1e-3)
    assert (shares > 0).tolist() == [share > 0 for share in expected]
    assert ours.sample_token(logits[0], None, **options) == 1  # without a uniform: greedy
    assert ours.sample_token(torch.zeros(1680, 4), uniform, top_p=0.5).max() == 1  # exactly top_p is enough


def test_keyed_uniforms_depend_only_on_their_key():
    """Not on the batch, on the numbers of samples and steps or on earlier draws; other keys give others."""
    uniforms = ours.keyed_uniforms(3, 1, [4, 9, 2], 5, 6)
    assert uniforms.dtype == torch.float64 and 0 <= uniforms.min() and uniforms.max() < 1
    assert torch.equal(ours.keyed_uniforms(3, 1, [2, 4], 5, 6), uniforms[[2, 0]])
    assert torch.equal(ours.keyed_uniforms(3, 1, [9], 2, 3), uniforms[1:2, :2, :3])
    keys = (3, 1, [4, 9, 2]), (4, 1, [4, 9, 2]), (3, 2, [4, 9, 2]), (1, 3, [4, 9, 2]), (3, 1, [5])
    drawn = torch.cat([ours.keyed_uniforms(*key, 5, 6).flatten() for key in keys])
    assert len(drawn.unique()) == len(drawn)
