"""What the network computes: a CLIP vision tower, a projector and a LLaMA, joined into one vision-LLM.

    pixels ──CLIPVision──> features ──Projector──┐
    ids ─────embedding──────────────────────────┴─> Llama ──> states read at chosen positions

The input is a row: a prompt once, then its answers end to end, each seeing the prompt and itself only:

    ids       <bos> USER: <image>…<image> prompt | answer 1 | answer 2 | pad
    position  0 1 2 …                       P-1  | P P+1 …  | P P+1 …  |
    branch    0 0 0 …                         0  | 1 1 …    | 2 2 …    | -1

Module names are those of the Hugging Face checkpoint llava-hf/llava-1.5-7b-hf, configurations are
transformers'. Logits are made only where they are read, a part of the vocabulary at a time; no [B, T, V]
tensor exists.

Legend: B rows, T positions, N positions read, M images, I tokens an image, R image runs in the rows, D width,
H heads, K kv-heads, C channels a head, V vocabulary, S cached columns. A mask says what is kept.

Papers: CLIP arXiv:2103.00020, LLaVA arXiv:2304.08485, LLaVA-1.5 arXiv:2310.03744, LLaMA arXiv:2302.13971,
RoPE arXiv:2104.09864, GQA arXiv:2305.13245, LoRA arXiv:2106.09685.
"""
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig, Qwen2Config

from data import UserError

# ---- CLIP vision tower ----

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "linear": lambda x: x,
}


def activation(name):
    """The function a configuration's activation name stands for; UserError for one that is not here."""
    if name not in ACTIVATIONS:
        raise UserError(f"got the activation {name!r}, need one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class CLIPEmbeddings(nn.Module):
    """pixels [M, 3, S, S] → patches behind one class token, positions added [M, 1 + patches, D]."""

    def __init__(self, config):
        super().__init__()
        D, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.image_size // patch) ** 2, D)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [M, patches, D]
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class CLIPAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [M, H, tokens, C]
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPVision(nn.Module):
    """pixels [M, 3, S, S] → the hidden states of one layer [M, I, D], class token dropped or kept.

    `feature_layer` counts as transformers' hidden_states do: 0 is the embedding, -1 the last layer's output.
    Later layers and `post_layernorm` are never reached; they are there to be loaded and exported. """

    def __init__(self, config, feature_layer=-2, drop_class=True):
        super().__init__()
        L = config.num_hidden_layers
        self.depth = feature_layer if feature_layer >= 0 else L + 1 + feature_layer
        if not 0 <= self.depth <= L:
            raise UserError(f"got vision_feature_layer {feature_layer}, need {-L - 1}..{L} for {L} layers")
        self.drop_class = drop_class
        self.recompute = False
        self.vision_model = nn.ModuleDict({
            "embeddings": CLIPEmbeddings(config),
            "pre_layrnorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),  # CLIP's spelling
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(CLIPLayer(config) for _ in range(L))}),
            "post_layernorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        })

    def forward(self, pixels):
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))
        for layer in self.vision_model.encoder.layers[: self.depth]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
        return x[:, 1:].clone() if self.drop_class else x  # FSDP wants no view returned


class Projector(nn.Module):
    """features [M, I, D of the tower] → [M · I, D of the LLaMA]: two layers with an activation, or `linear`:
    one."""

    def __init__(self, config):
        super().__init__()
        D, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.activation = activation(config.projector_hidden_act)
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, D, bias=bias)
        self.linear_2 = None if is_linear(config) else nn.Linear(D, D, bias=bias)

    def forward(self, features):
        x = self.linear_1(features.flatten(0, 1))  # [M · I, D]: FSDP wants no view returned
        return x if self.linear_2 is None else self.linear_2(self.activation(x))


def is_linear(config):
    """Whether the projector is one linear layer. transformers knows two layers only, so such a checkpoint is
    written with the identity as its second layer and this mark in its configuration."""
    return getattr(config, "mm_projector_type", None) == "linear"


# ---- LLaMA ----

def rope_frequencies(config):
    """Radians a position for each pair of channels [C/2] (fp32), with linear or llama3 scaling.

    llama3 (as in Meta's LLaMA-3.1 code): wavelengths longer than the original context over `low_freq_factor`
    are stretched by `factor`, those shorter than it over `high_freq_factor` are kept, those between are
    interpolated. """
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"got partial_rotary_factor {rope['partial_rotary_factor']}, need 1")
    C = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequency = rope["rope_theta"] ** -(torch.arange(0, C, 2, dtype=torch.float32, device="cpu") / C)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return frequency
    if kind == "linear":
        return frequency / rope["factor"]
    if kind != "llama3":
        raise UserError(f"got rope_type {kind!r}, need default, linear or llama3")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in that context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / rope["factor"]


def rotate(x, cos, sin):
    """Rotates channel pairs (c, c + C/2) of x [B, H, T, C] by angles of cos, sin [B, 1, T, C], sin negated in
    its first half (RoPE, Eq. 34)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def visible(q_branch, k_branch, q_index, k_index):
    """The row mask [B, 1, Tq, Tk]: a query sees a key that is no later, not padding, and of the prompt or its
    own answer.

    branch [B, T]: 0 prompt, 1… answers, -1 padding; index [T]: column in the row.
    """
    q, k = q_branch[:, None, :, None], k_branch[:, None, None, :]
    return (k_index <= q_index[:, None]) & (k >= 0) & ((k == 0) | (k == q))


class RMSNorm(nn.Module):
    def __init__(self, D, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@torch.compiler.disable  # compiled for varying lengths, backward fails: "expected … stride" (torch 2.13)
def attend(q, k, v, mask):
    """q [B, H, T, C], k and v [B, K, S, C] → [B, H, T, C]. mask [B, 1, Tq, S] is of the last Tq queries
    (None: of none); those before are plain causal, as padding comes after all real tokens."""
    n, g, out = q.shape[2] - (0 if mask is None else mask.shape[2]), q.shape[1] // k.shape[1], []
    if n:
        keys, values = (t[:, :, :n].repeat_interleave(g, dim=1) for t in (k, v))
        out.append(F.scaled_dot_product_attention(q[:, :, :n], keys, values, is_causal=True))
    if mask is not None:  # the g heads of a kv-head as more queries of it: no copies of a long cache
        grouped = q[:, :, n:].unflatten(1, (-1, g)).flatten(2, 3)  # [B, K, g · Tq, C]
        masked = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask.repeat(1, 1, g, 1))
        out.append(masked.unflatten(2, (g, -1)).flatten(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, bias = config.hidden_size, config.model_type == "llama" and config.attention_bias
        qkv_bias = bias or config.model_type == "qwen2"
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        C = getattr(config, "head_dim", None) or D // self.heads
        self.q_proj = nn.Linear(D, self.heads * C, bias=qkv_bias)
        self.k_proj = nn.Linear(D, self.kv_heads * C, bias=qkv_bias)
        self.v_proj = nn.Linear(D, self.kv_heads * C, bias=qkv_bias)
        self.o_proj = nn.Linear(self.heads * C, D, bias=bias)

    def forward(self, x, rope, mask, cache=None):
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, C]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # [B, K, T, C]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(self, k, v)  # [B, K, S, C]
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        bias = config.model_type == "llama" and config.mlp_bias
        self.activation = activation(config.hidden_act)
        self.gate_proj = nn.Linear(D, hidden, bias=bias)
        self.up_proj = nn.Linear(D, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, D, bias=bias)

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """x [B, T, D] → [B, T, D]. With `recompute` only its input is kept for the backward pass; `compiled` is
    what torch.compile makes of `compute`, where asked for. With a cache, longer each step, it is not used."""

    def __init__(self, config):
        super().__init__()
        self.recompute, self.compiled = False, None
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, mask, cache=None):
        if cache is not None:
            return self.compute(x, rope, mask, cache)
        compute = self.compiled or self.compute
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(compute, x, rope, mask, use_reentrant=False, preserve_rng_state=False)
        return compute(x, rope, mask)

    def compute(self, x, rope, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token and image embeddings through the decoder; what is read of the final states is up to `read`."""

    def __init__(self, config, image_token):
        super().__init__()
        self.image_token = image_token
        self.frequencies = rope_frequencies(config)  # no buffer: a model built on `meta` needs its numbers
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, position, mask, at, read, images=None, cache=None):
        """ids, position [B, T]; mask [B, 1, Tq, S] of the last Tq positions (the others are plain causal) or
        None; images [R, I, D]: what stands at the image tokens, in row order. → read(states [N, D] at the
        flat positions `at` [N], head weight [V, D])."""
        x = self.model.embed_tokens(ids)  # [B, T, D]
        if images is not None:
            x = x.masked_scatter((ids == self.image_token).unsqueeze(-1), images.to(x.dtype))
        angle = position[:, None, :, None] * self.frequencies.to(position.device)  # [B, 1, T, C/2]
        cos, sin = angle.cos(), angle.sin()
        rope = torch.cat([cos, cos], dim=-1).to(x.dtype), torch.cat([-sin, sin], dim=-1).to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, rope, mask, cache)
        return read(self.model.norm(x.flatten(0, 1)[at]), self.lm_head.weight)


class TokenLogProbs(torch.autograd.Function):
    """log softmax(states · headᵀ / temperature)[target], and if asked the distribution's entropy (else None),
    with logits made for a part of the vocabulary at a time.

    Forward keeps no logits, backward makes them again. With p the softmax and H the entropy:
    ∂ logp / ∂ logit_v = [v = target] − p_v, ∂ H / ∂ logit_v = −p_v (log p_v + H).
    Parts divide the vocabulary, not the rows: a part's rows of d_head come whole from one product. Only
    d_states is summed over parts, in fp32, and [N], in fp64.
    """

    @staticmethod
    def forward(ctx, states, head, target, temperature, with_entropy=False):
        N = len(target)
        # of the vocabulary so far: log Σ exp(logit), from a finite −∞ (0 · ∞ is NaN), and the entropy
        lse = torch.full((N,), torch.finfo(torch.float64).min, dtype=torch.float64, device=states.device)
        entropy, at_target = torch.zeros_like(lse), torch.zeros_like(lse)
        for chunk in chunks(len(head), N):
            logits = F.linear(states, head[chunk]).float().div_(temperature)  # [N, v]
            inside, column = in_chunk(target, chunk)
            at_target = torch.where(inside, logits.gather(1, column).squeeze(1), at_target)
            before, lse = lse, torch.logaddexp(lse, logits.logsumexp(-1).double())
            if with_entropy:  # every log p so far moves by the shift: e^shift (H − shift) − Σ_part p log p
                shift, logp = before - lse, logits.sub_(lse.float()[:, None])
                entropy = shift.exp() * (entropy - shift) - (logp.exp() * logp).sum(-1)
        entropy = entropy.float() if with_entropy else None
        ctx.save_for_backward(states, head, target, lse.float(), entropy)
        ctx.temperature = temperature
        return (at_target - lse).float(), entropy

    @staticmethod
    def backward(ctx, d_logprob, d_entropy):
        states, head, target, lse, entropy = ctx.saved_tensors
        d_states = torch.zeros_like(states, dtype=torch.float32)
        d_head = torch.empty_like(head) if ctx.needs_input_grad[1] else None
        for chunk in chunks(len(head), len(target)):
            logp = F.linear(states, head[chunk]).float().div_(ctx.temperature).sub_(lse[:, None])  # [N, v]
            times_p = -d_logprob[:, None]
            if entropy is not None:
                times_p = times_p - (logp + entropy[:, None]) * d_entropy[:, None]
            d = logp.exp_().mul_(times_p)
            inside, column = in_chunk(target, chunk)
            d.scatter_add_(1, column, (inside * d_logprob)[:, None])
            d = d.div_(ctx.temperature).to(states.dtype)
            d_states += d @ head[chunk]
            if d_head is not None:
                d_head[chunk] = d.T @ states
        return d_states.to(states.dtype), d_head, None, None, None


def chunks(V, N, elements=2**22, least=1024):
    """Slices of a vocabulary of V: a part's [N, v] logits stay near `elements` numbers (16 MB in fp32), or it
    is of the `least` tokens that keep its products efficient."""
    v = max(least, elements // max(1, N))
    return [slice(start, min(start + v, V)) for start in range(0, V, v)]


def in_chunk(target, chunk):
    """Which targets [N] are in a part of the vocabulary, and their columns in it [N, 1] (for the others,
    any)."""
    inside = (target >= chunk.start) & (target < chunk.stop)
    return inside, (target - chunk.start).clamp(0, chunk.stop - chunk.start - 1)[:, None]


# ---- rankings: of rewards in rm.py, of log-ratios in dpo.py ----

def plackett_luce(values, kept):
    """− log P(ranking) of each row [B]: Σ_k logsumexp(values_k … values_K) − values_k (Eq. 18,
    arXiv:2305.18290). values [B, K], best first; kept [B, K]: which answers there are (the others' terms are
    a finite number times 0: with −inf they would be NaN)."""
    K = values.shape[1]
    left = torch.ones(K, K, dtype=torch.bool, device=values.device).triu() & kept[:, None, :]  # [B, k, j ≥ k]
    rest = values[:, None, :].masked_fill(~left, torch.finfo(values.dtype).min).logsumexp(-1)  # [B, K]
    return ((rest - values) * kept).sum(-1)


# ---- LoRA ----

class LoRA(nn.Module):
    """A frozen linear layer with a low-rank update beside it: x Wᵀ + alpha / rank · x Aᵀ Bᵀ (Eq. 3,
    arXiv:2106.09685). B starts at 0, so nothing changes at first."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.rank, self.alpha, self.on = rank, alpha, True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.alpha / self.rank * self.lora_B(self.lora_A(x)) if self.on else y


def add_lora(model, rank, alpha):
    """Puts an adapter on each of the seven projections of every LLaMA layer; the weights keep their names."""
    for layer in model.language_model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, LoRA(linear, rank, alpha))


# ---- the whole ----

class VisionLLM(nn.Module):
    """CLIP tower, projector and LLaMA under the names of a Hugging Face LLaVA checkpoint (config:
    LlavaConfig); with `score` also a scalar head, for rewards and values.

    `features = model.vision_tower(batch.pixels)` is called first and passed in, so that models with equal
    frozen towers can share one pass. """

    def __init__(self, config, score=False):
        super().__init__()
        self.config = config
        drop_class = config.vision_feature_select_strategy == "default"
        self.vision_tower = CLIPVision(config.vision_config, config.vision_feature_layer, drop_class)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text_config, config.image_token_index)
        if score:
            self.score = nn.Linear(config.text_config.hidden_size, 1)

    def set_recompute(self, on):
        """Trades a second forward pass in backward for the memory of all activations inside a layer."""
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = on

    def compile_layers(self):
        """torch.compile on every layer, but for the LLaMA's attention and for decoding. It takes a minute at
        the first step, and once more at the first of another length, which makes code for any."""
        torch._dynamo.config.recompile_limit = 64  # PPO's four models, with gradients and without
        for layer in self.language_model.model.layers:  # FSDP's units: compiled is what is inside its hooks
            layer.compiled = torch.compile(layer.compute)
        for layer in self.vision_tower.vision_model.encoder.layers:
            layer.compile()

    def set_adapters(self, on):
        """Switches LoRA adapters: off, the model is the one they were put on."""
        for module in self.modules():
            if isinstance(module, LoRA):
                module.on = on

    def hidden(self, batch, features, at, read, cache=None):
        """read(final states [N, D] at the flat positions `at` [N], head [V, D]) for a Batch (see data.py)."""
        projected = self.multi_modal_projector(features).unflatten(0, features.shape[:2])  # [M, I, D]
        images = projected[batch.image]  # [R, I, D]
        mask, T, n = None, batch.ids.shape[1], batch.causal_prefix
        if n < T:
            column = torch.arange(T, device=batch.ids.device)
            mask = visible(batch.branch[:, n:], batch.branch, column[n:], column)  # [B, 1, T − n, T]
        return self.language_model(batch.ids, batch.position, mask, at, read, images, cache)

    def forward(self, batch, features, temperature=1.0, entropy=False):
        """Batch, features [M, I, D of the tower] → log-probability of every target [N] (fp32, nats); with
        `entropy` also the entropy of the distribution it was drawn from [N]. Target n is predicted by the
        state at source n."""
        def read(states, head):
            return TokenLogProbs.apply(states, head, batch.target, temperature, entropy)
        logprob, entropies = self.hidden(batch, features, batch.logit_position, read)
        return (logprob, entropies) if entropy else logprob

    def scores(self, batch, features, at):
        """The scalar head's output at flat positions at [N] → [N] (fp32): rewards at batch.last_token, values at
        batch.logit_position."""
        return self.score(self.hidden(batch, features, at, lambda states, head: states)).squeeze(-1)


# ---- checkpoints: their configurations and the names in them ----

# model_type of a language model or an original LLaVA → transformers' configuration of the language model
LANGUAGE_MODELS = {
    "llama": LlamaConfig, "llava": LlamaConfig, "llava_llama": LlamaConfig,
    "mistral": MistralConfig, "llava_mistral": MistralConfig,
    "qwen2": Qwen2Config, "llava_qwen": Qwen2Config, "llava_qwen2": Qwen2Config}

# settings of a config.json that change results → the values that are implemented; absent is always fine
ANY_MODEL = {"quantization_config": (None,), "quantization": (None,), "compression_config": (None,)}
LANGUAGE_MODEL = {**ANY_MODEL, "attention_dropout": (0,)}
VISION_TOWER = {**ANY_MODEL, "attention_dropout": (0,), "num_channels": (3,)}
ORIGINAL_LLAVA = {
    "mm_vision_select_feature": ("patch", "cls_patch"), "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_use_im_start_end": (False, None), "mm_patch_merge_type": ("flat", None), "use_mm_proj": (True, None),
    "image_aspect_ratio": ("square", "pad", None), "use_pos_skipping": (False, None), "s2": (False, None)}
# of an original LLaVA: read elsewhere, or of no effect on results (rates of training, tiling, video)
OTHER_MM = {
    "mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "mm_use_im_patch_token", "mm_projector_lr",
    "mm_vision_tower_lr", "mm_tunable_parts", "mm_newline_position", "mm_spatial_pool_mode",
    "mm_spatial_pool_stride", "image_grid_pinpoints", "image_crop_resolution", "image_split_resolution"}


def check_settings(folder, settings, implemented):
    """UserError for the first setting of a config.json whose value is not among the implemented ones."""
    for key, values in implemented.items():
        if key in settings and settings[key] not in values:
            value = "" if isinstance(settings[key], dict) else f" {settings[key]!r}"
            need = " or ".join(repr(value) for value in values if value is not None) or "a model without it"
            raise UserError(f"{folder}/config.json: got {key}{value}, which is not implemented: need {need}")
    code = [name for name in settings.get("auto_map") or () if name.startswith("AutoModel")]
    if code:
        raise UserError(f"{folder}/config.json: its auto_map names code of its own ({code[0]}), not run here")


def llava_config(folder, raw, clip=None, raw_clip=None, projector=None):
    """raw: the config.json in folder, of transformers' LLaVA; or, with the folder of its CLIP, the
    config.json there and the kind of its projector, of an original LLaVA or a language model. → LlavaConfig
    with image_seq_length set; image_token_index −1 where the tokenizer has to say. UserError names a setting
    that is not implemented."""
    where = f"{folder}/config.json"
    if clip is None:
        check_settings(folder, raw, ANY_MODEL)
        check_settings(folder, raw["text_config"], LANGUAGE_MODEL)
        check_settings(folder, raw.get("vision_config") or {}, VISION_TOWER)
        config = LlavaConfig.from_pretrained(folder)
    else:
        check_settings(folder, raw, {**LANGUAGE_MODEL, **ORIGINAL_LLAVA})
        for key in raw.keys() - ORIGINAL_LLAVA.keys() - OTHER_MM:
            if key.startswith(("mm_", "image_", "vision_")) and raw[key] not in (None, False):
                raise UserError(f"{where}: got {key} {raw[key]!r}, which is not implemented: need LLaVA-1.5")
        check_settings(clip, raw_clip, ANY_MODEL)
        check_settings(clip, raw_clip.get("vision_config", raw_clip), VISION_TOWER)
        kind = raw_clip.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise UserError(f"{clip}/config.json: got model_type {kind!r}, need clip or clip_vision_model")
        # an original LLaVA's config is that of its language model plus mm_*; AutoConfig would take it for
        # transformers'
        text = {key: value for key, value in raw.items() if key != "model_type" and not key.startswith("mm_")}
        classes = {"cls_patch": "full", "patch": "default"}[raw.get("mm_vision_select_feature", "patch")]
        config = LlavaConfig(
            vision_config=CLIPVisionConfig.from_pretrained(clip),
            text_config=LANGUAGE_MODELS[raw["model_type"]](**text),
            vision_feature_layer=raw.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=classes,
            projector_hidden_act="linear" if projector == "linear" else "gelu")
        config.mm_projector_type, config.image_token_index = projector, -1
        width = raw.get("mm_hidden_size")
        if width not in (None, config.vision_config.hidden_size):
            raise UserError(f"{where}: got mm_hidden_size {width}, but the tower in {clip} is "
                            f"{config.vision_config.hidden_size} wide: need the tower it was trained with")
    text, vision = config.text_config, config.vision_config
    if text.model_type not in ("llama", "mistral", "qwen2") or vision.model_type != "clip_vision_model":
        raise UserError(f"{where}: got a {text.model_type} and a {vision.model_type}, need a llama, mistral "
                        "or qwen2, and a clip_vision_model")
    # Mistral's window is that of every layer, Qwen2's of the layers that layer_types names
    window = getattr(text, "sliding_window", None) if text.model_type != "llama" else None
    if window and (text.model_type == "mistral" or {*text.layer_types} != {"full_attention"}):
        raise UserError(f"{where}: got sliding_window {window} (a Mistral has one unless the file says "
                        "null), which is not implemented: need a model without it")
    try:  # what the model would refuse when it is built, which is after a download
        rope_frequencies(text)
        for name in (text.hidden_act, vision.hidden_act, config.projector_hidden_act):
            activation(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if isinstance(config.vision_feature_layer, list) and len(config.vision_feature_layer) == 1:
        config.vision_feature_layer, = config.vision_feature_layer
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(f"{where}: got vision_feature_layer {config.vision_feature_layer}, need one layer")
    tied = config.tie_word_embeddings or text.tie_word_embeddings
    config.tie_word_embeddings = text.tie_word_embeddings = tied
    patches = (vision.image_size // vision.patch_size) ** 2
    config.image_seq_length = patches + (config.vision_feature_select_strategy == "full")
    return config


# spellings of a tensor's name → ours, that of llava-hf/llava-1.5-7b-hf; the first that fits is applied
SPELLINGS = [(re.compile(pattern), name) for pattern, name in [
    (r"^model\.mm_projector\.(?:0\.)?(weight|bias)$", r"multi_modal_projector.linear_1.\1"),  # original LLaVA
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.language_model\.", "language_model.model."),  # transformers' names in memory
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.", "language_model.model."),  # a LLaMA
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_model\.", "vision_tower.vision_model."),  # a CLIP
    (r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.", r"vision_tower.vision_model.\1."),
]]
EXTRAS = re.compile(r"text_model\.|logit_scale$|(visual|text)_projection\.weight$|position_ids$|inv_freq$")


def our_name(name):
    """A tensor's name in any known checkpoint → the name of our parameter."""
    for pattern, replacement in SPELLINGS:
        if pattern.search(name):
            name = pattern.sub(replacement, name)
            break
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def initial_std(name, shape):
    """Of the normal distribution that a new parameter is drawn from: biases and LoRA's B start at 0, LoRA's A
    at PEFT's variance, the scalar head so that scores start near unit variance (arXiv:2009.01325)."""
    if len(shape) == 1 or ".lora_B." in name:
        return 0.0
    if ".lora_A." in name:
        return (3 * shape[1]) ** -0.5
    return (shape[1] + 1) ** -0.5 if name.startswith("score.") else 0.02


def tensor_shape(tensor):
    """The shape of a tensor or of a slice of a safetensors file."""
    return tuple(tensor.shape if torch.is_tensor(tensor) else tensor.get_shape())


FLOATS = {"F16", "BF16", "F32", "F64", torch.float16, torch.bfloat16, torch.float32, torch.float64}


def tensor_dtype(tensor):
    """The dtype of a tensor, or a safetensors slice's name for it."""
    return tensor.dtype if torch.is_tensor(tensor) else tensor.get_dtype()


def check_names(model, tensors, grown, fresh, folders):
    """Every parameter found among the tensors (name → tensor or safetensors slice), every tensor used, every
    shape equal; else a UserError that lists the difference. grown: (old, new) rows of a vocabulary that gets
    more than the folders hold; fresh: parts of the names that are drawn where no tensor is."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tensor_shape(tensor) for name, tensor in tensors.items()}
    optional = set()
    if is_linear(model.config):  # the identity that transformers needs as a second layer
        optional = {"multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias"}
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys() - optional
    missing = {name for name in missing if not any(part in name for part in fresh)}
    problems = [f"missing: {name} {wanted[name]}" for name in sorted(missing)]
    problems += [f"not known: {name} {found[name]}" for name in sorted(unknown)]
    for name, tensor in tensors.items():
        if tensor_dtype(tensor) not in FLOATS:
            raise UserError(f"{' + '.join(folders)}: {name} is {tensor_dtype(tensor)}, as in quantised "
                            "weights: need floating-point weights of 16 bits or more")
    for name in sorted(wanted.keys() & found.keys()):
        want = (grown[0], *wanted[name][1:]) if grown and name in VOCABULARY else wanted[name]
        if found[name] != want:
            problems.append(f"shape: {name} is {found[name]}, need {want}")
    if problems:
        where = " + ".join(folders)
        raise UserError("\n  ".join([f"the weights in {where} do not fit its config.json:", *problems]))


# ---- generation ----

class Cache:
    """Keys and values of every column so far, for rows of at most `size` columns; `branch` [B, S] is what
    each belongs to."""

    def __init__(self, size):
        self.size, self.length, self.store, self.branch = size, 0, {}, None

    def append(self, branch):
        """Announces the columns [B, T] that the next forward pass adds; → their mask over all columns [B, 1,
        T, S]."""
        if self.branch is None:
            self.branch = branch.new_full((len(branch), self.size), -1)
        start, self.length = self.length, self.length + branch.shape[1]
        self.branch[:, start:self.length] = branch
        column = torch.arange(self.length, device=branch.device)
        return visible(branch, self.branch[:, :self.length], column[start:], column)

    def extend(self, layer, k, v):
        """Stores a layer's keys and values [B, K, T, C] of the announced columns; → those of all columns [B,
        K, S, C]."""
        if layer not in self.store:
            B, K, _, C = k.shape
            self.store[layer] = k.new_empty(B, K, self.size, C), v.new_empty(B, K, self.size, C)
        keys, values = self.store[layer]
        keys[:, :, self.length - k.shape[2]:self.length] = k
        values[:, :, self.length - v.shape[2]:self.length] = v
        return keys[:, :, :self.length], values[:, :, :self.length]


def keyed_uniforms(seed, iteration, prompts, samples, steps):
    """Uniforms in [0, 1) [B, samples, steps] (fp64) that depend on nothing but (seed, iteration, prompt,
    sample, step): not on the batch, the rank or what was drawn before. prompts: B integers."""
    return torch.from_numpy(np.stack([
        [np.random.default_rng([seed, iteration, prompt, sample]).random(steps) for sample in range(samples)]
        for prompt in prompts]))


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """logits [..., V] (fp32) → token ids [...]: the most likely (uniform None or temperature 0), else the
    inverse CDF of the uniform [...] under the softmax at that temperature, cut to the top_k likeliest and to
    the smallest set whose probability reaches top_p."""
    if uniform is None or temperature == 0:
        return logits.argmax(-1)
    p = F.softmax(logits.double() / temperature, dim=-1)
    if top_k:
        p = p.masked_fill(p < p.topk(min(top_k, p.shape[-1]), dim=-1).values[..., -1:], 0)
    if top_p < 1:
        ranked, order = (p / p.sum(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
        outside = ranked.cumsum(-1) - ranked >= top_p  # what stands before a token already reaches top_p
        p = p.masked_fill(outside.gather(-1, order.argsort(-1)), 0)
    cdf = p.cumsum(-1)
    # the first token whose CDF exceeds the draw: one of probability 0 never does; of NaN none does
    token = torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[..., -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(model, batch, features, max_new, stop, banned=(), uniforms=None, samples=1, temperature=1.0,
             top_k=0, top_p=1.0, anyone=torch.any):
    """Answers of a batch of prompts (rows without answers): one prefill, then one column a sample and step.

    stop: ids that end an answer (kept as its last token); banned: ids never chosen; uniforms [B, samples,
    max_new] or None for greedy; anyone(running): whether to go on (ranks that decode in step ask each other).
    → answers[b][k]: list of ids, and their summed log-probability under the model at temperature 1 [B,
    samples]. """
    device = batch.ids.device
    B, T = batch.ids.shape
    cache = Cache(T + samples * (max_new - 1))
    cache.append(batch.branch)
    length = (batch.branch == 0).sum(1)  # [B]
    ends = torch.arange(B, device=device) * T + length - 1  # where every answer's first token is predicted
    logits = model.hidden(batch, features, ends, F.linear, cache)  # [B, V]
    logits = logits[:, None].expand(-1, samples, -1)  # [B, samples, V]
    stop, banned = (torch.tensor(sorted(ids), device=device, dtype=torch.long) for ids in (stop, banned))
    branch = torch.arange(1, samples + 1, device=device).expand(B, -1)
    every = torch.arange(B * samples, device=device)
    tokens = torch.zeros(B, samples, max_new, dtype=torch.long, device=device)
    lengths = torch.zeros(B, samples, dtype=torch.long, device=device)
    logprob = torch.zeros(B, samples, device=device)
    running = (length > 0)[:, None].repeat(1, samples)  # a row of padding has nothing to say
    for step in range(max_new):
        logits = logits.float()
        uniform = None if uniforms is None else uniforms[:, :, step].to(device)
        allowed = logits.index_fill(-1, banned, -torch.inf)
        token = sample_token(allowed, uniform, temperature, top_k, top_p)  # [B, samples]
        tokens[:, :, step] = token
        lengths += running
        logprob += running * F.log_softmax(logits, dim=-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        running = running & ~torch.isin(token, stop)
        if step + 1 == max_new or not anyone(running):
            break
        mask = cache.append(branch)
        position = (length + step)[:, None].expand(-1, samples)
        logits = model.language_model(token, position, mask, every, F.linear, cache=cache)
        logits = logits.view(B, samples, -1)
    tokens, lengths = tokens.tolist(), lengths.tolist()
    return [[ids[:n] for ids, n in zip(*row)] for row in zip(tokens, lengths)], logprob
