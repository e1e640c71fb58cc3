"""What the network computes: a CLIP vision tower, a projector and a LLaMA, joined into one vision-LLM.

    pixels ──CLIPVision──> features ──Projector──┐
    ids ─────embedding──────────────────────────┴─> Llama ──> hidden states at chosen positions ──> head_fn

The input is packed: one sequence holds a prompt once, then its answers end to end. Each answer attends to the
prompt and to itself only:

    ids       <bos> USER: <image>…<image> prompt | answer 1 | answer 2 | pad
    position  0 1 2 …                       P-1  | P P+1 …  | P P+1 …  |
    branch    0 0 0 …                         0  | 1 1 …    | 2 2 …    | -1

The hidden state of a token predicts the next token of its answer; that of the last prompt token predicts the
first token of every answer. Logits are computed only where a token is predicted, one chunk of the vocabulary
at a time: no [B, T, V] tensor exists in training.

LLaVA-1.5 sees an image as one square tile. LLaVA-NeXT (1.6) sees a base view of it and a grid of tiles; after
each line of the grid comes one more token, the learned `image_newline` (feature_layout in data.py).

Module names are those of the checkpoint llava-hf/llava-1.5-7b-hf; configurations are transformers' classes.

Legend: B sequences, T positions, N targets (predicted tokens), D width, H heads, K kv-heads (outside
attention: answers per prompt), C channels per head, V vocabulary, v tokens of one vocabulary chunk, S cached
positions, Tq queries, Tk keys, M tiles of the distinct images, I features per tile, R image tokens in the
batch (an image may be shown several times). A "flat position" is an index into [B · T]: sequence · T + index
in the sequence. Boolean masks are True for what is attended to or counted.

Papers: CLIP arXiv:2103.00020, LLaVA arXiv:2304.08485, LLaVA-1.5 and its tiles arXiv:2310.03744, LLaMA
arXiv:2302.13971, RoPE arXiv:2104.09864, GQA arXiv:2305.13245, LoRA arXiv:2106.09685.
"""
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaNextConfig

from data import UserError, shown

# ---- CLIP vision tower ----

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def activation(name):
    """The function for an activation name of a configuration; UserError for an unknown name."""
    if name not in ACTIVATIONS:
        raise UserError(f"got the activation {name!r}, need one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class CLIPEmbeddings(nn.Module):
    """pixels [M, 3, height, width] → class token and patches, with positions added [M, 1 + patches, D]."""

    def __init__(self, config):
        super().__init__()
        D, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.image_size // patch) ** 2, D)

    def forward(self, pixels):
        pixels = pixels.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [M, patches, D]
        class_token = self.class_embedding.expand(len(pixels), 1, -1)  # [M, 1, D]
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class CLIPLayer(nn.Module):
    """One pre-norm transformer block, all tokens attending to all: [M, 1 + patches, D] → the same shape."""

    def __init__(self, config):
        super().__init__()
        D, intermediate, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads, self.activation = config.num_attention_heads, activation(config.hidden_act)
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(D, D) for name in projections})
        self.layer_norm1 = nn.LayerNorm(D, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, intermediate), "fc2": nn.Linear(intermediate, D)})
        self.layer_norm2 = nn.LayerNorm(D, eps=eps)

    def attention(self, x):
        projections = self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)  # [M, H, T, C]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [M, T, D]
        return self.self_attn.out_proj(mixed)

    def forward(self, x):
        x = x + self.attention(self.layer_norm1(x))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class CLIPVision(nn.Module):
    """pixels [M, 3, height, width] → the hidden states of one layer [M, I, D of the tower].

    `feature_layer` indexes transformers' hidden_states: 0 is the embedding, -1 the last layer's output.
    `drop_class` removes the class token, so that I = patches. Later layers and `post_layernorm` are never
    computed; they exist so that the checkpoint can be loaded and exported in full."""

    def __init__(self, config, feature_layer=-2, drop_class=True):
        super().__init__()
        L = config.num_hidden_layers
        self.depth = feature_layer if feature_layer >= 0 else L + 1 + feature_layer  # layers to compute
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
        for layer in self.vision_model.encoder.layers[:self.depth]:
            x = recomputed(layer, x) if self.recompute else layer(x)
        return x[:, 1:].clone() if self.drop_class else x  # an FSDP root must not return a view


def recomputed(function, *inputs):
    """function(*inputs), keeping only the inputs for backward, which runs the function again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Projector(nn.Module):
    """features [M, I, D of the tower] → [M · I, D of the LLaMA]: two linear layers with an activation
    between them (LLaVA-1.5's mlp2x_gelu). LLaVA-NeXT: [M · I + 1, D], the last row being `image_newline`."""

    def __init__(self, config):
        super().__init__()
        D, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.activation = activation(config.projector_hidden_act)
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, D, bias=bias)
        self.linear_2 = nn.Linear(D, D, bias=bias)
        self.image_newline = nn.Parameter(torch.empty(D)) if config.model_type == "llava_next" else None

    def forward(self, features):
        x = self.linear_1(features.flatten(0, 1))  # [M · I, D]; an FSDP root must not return a view
        x = self.linear_2(self.activation(x))
        return x if self.image_newline is None else torch.cat([x, self.image_newline[None]])


# ---- LLaMA ----

def rope_frequencies(config):
    """RoPE frequencies in radians per position, one for each channel pair [C/2] (fp32), with linear or llama3
    scaling. UserError for any other scaling.

    llama3 (Meta's LLaMA-3.1 code) looks at the turns that a pair makes in the original context: below
    `low_freq_factor` turns the frequency is divided by `factor`, above `high_freq_factor` turns it is
    unchanged, and in between it is interpolated linearly in the number of turns."""
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
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)  # weight of the unchanged frequency
    return unscaled * frequency + (1 - unscaled) * frequency / rope["factor"]


def rotate(x, cos, sin):
    """RoPE (Eq. 34, arXiv:2104.09864): rotates the channel pairs (c, c + C/2) of x [B, H, T, C]. cos and sin
    are [B, 1, T, C]; the first half of sin is negated."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # the halves of each channel vector
    return torch.addcmul(x * cos, swapped, sin)


def attention_mask(q_branch, k_branch, q_index, k_index):
    """The mask of packed sequences [B, 1, Tq, Tk]: a query sees a key iff the key comes no later, is not
    padding, and belongs to the prompt or to the query's own answer.

    branch [B, Tq or Tk]: 0 prompt, 1, 2, … answers, -1 padding; index [Tq or Tk]: index in the sequence."""
    q, k = q_branch[:, None, :, None], k_branch[:, None, None, :]  # [B, 1, Tq, 1], [B, 1, 1, Tk]
    return (k_index <= q_index[:, None]) & (k >= 0) & ((k == 0) | (k == q))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension. In bf16 it is rounded once; transformers'
    LLaMA also rounds before the product with the weight."""

    def __init__(self, D, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def attend(q, k, v, mask):
    """Attention: q [B, H, T, C], k and v [B, K, S, C] → [B, H, T, C].

    `mask` is added to the scores of the last Tq queries; earlier queries are causal, which is exact because
    padding is on the right. None: all are causal. Its shape is [B, 1, group · Tq, S], where the `group` query
    heads of a kv-head count as further queries of it, so that a long cache is not copied."""
    if mask is None:
        return causal_attention(q, k, v)
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    n_causal = T - mask.shape[2] // group
    causal, masked = q.split([n_causal, T - n_causal], dim=2)
    grouped = masked.unflatten(1, (-1, group)).flatten(2, 3)  # [B, K, group · Tq, C]
    output = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    output = output.unflatten(2, (group, -1)).flatten(1, 2)  # [B, H, Tq, C]
    if not n_causal:
        return output
    output = causal_attention(causal, k[:, :, :n_causal], v[:, :, :n_causal]), output
    # joined as [B, T, H, C], the layout in memory of attention's output
    return torch.cat([part.transpose(1, 2) for part in output], dim=1).transpose(1, 2)


def causal_attention(q, k, v):
    """`attend` without a mask, for as many keys as queries"""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))  # [B, H, T, C]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class LlamaAttention(nn.Module):
    """Grouped-query attention with RoPE: x [B, T, D] → [B, T, D]. A LLaMA with `attention_bias` has biases in
    all four projections, Qwen2 in q, k and v, Mistral in none. rope: (cos, sin) as in `rotate`."""

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
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)  # [B, H, T, C]
        k = self.k_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)  # [B, K, T, C]
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)  # [B, K, T, C]
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(self, k, v)  # [B, K, S, C]
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))  # [B, T, D]


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, intermediate = config.hidden_size, config.intermediate_size
        bias = config.model_type == "llama" and config.mlp_bias
        self.activation = activation(config.hidden_act)
        self.gate_proj = nn.Linear(D, intermediate, bias=bias)
        self.up_proj = nn.Linear(D, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, D, bias=bias)

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """One pre-norm transformer block: x [B, T, D] → [B, T, D]."""

    def __init__(self, config):
        super().__init__()
        self.recompute = False
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, mask, cache=None):
        return recomputed(self.compute, x, rope, mask, cache) if self.recompute else self.compute(
            x, rope, mask, cache)

    def compute(self, x, rope, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embeds tokens and images, runs the decoder layers, and applies `head_fn` to chosen hidden states."""

    def __init__(self, config):
        super().__init__()
        self.frequencies = rope_frequencies(config)  # not a buffer: it has values in a model built on `meta`
        self.group = config.num_attention_heads // config.num_key_value_heads  # query heads per kv-head
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tied = config.tie_word_embeddings
        self.tie()

    def tie(self):
        """Makes embedding and head one parameter, if they are tied; call it after replacing parameters."""
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, position, mask, positions, head_fn, images=None, image_position=None, cache=None):
        """→ head_fn(hidden [N, D], head weight [V, D]), where hidden are the final hidden states at the flat
        `positions` [N].

        ids [B, T]; position [B, T]: for RoPE, as at the head of this file; mask [B, 1, Tq, S]: bool, as in
        `attention_mask`; images [R, D]: embeddings for the flat positions image_position [R]."""
        x = self.model.embed_tokens(ids)  # [B, T, D]
        if images is not None:
            x = x.flatten(0, 1).index_copy(0, image_position, images.to(x.dtype)).view_as(x)
        self.frequencies = self.frequencies.to(x.device)  # copied to a GPU once, not in every pass
        angle = position[:, None, :, None] * self.frequencies  # [B, 1, T, C/2]
        cos, sin = angle.cos(), angle.sin()
        rope = torch.cat([cos, cos], dim=-1).to(x.dtype), torch.cat([-sin, sin], dim=-1).to(x.dtype)
        if mask is not None:
            # What `attend` adds to the scores. Finite, as all keys of a padding sequence are masked; half of
            # the minimum, as kernels multiply it by log2 e.
            mask = mask.repeat(1, 1, self.group, 1)  # [B, 1, group · Tq, S]
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, torch.finfo(x.dtype).min / 2)
        for layer in self.model.layers:
            x = layer(x, rope, mask, cache)
        hidden = self.model.norm(x.flatten(0, 1)[positions])  # [B · T, D] → [N, D]
        return head_fn(hidden, self.lm_head.weight)


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden · headᵀ / temperature)[target] [N] and, with `with_entropy`, the entropy of that
    softmax [N] (else None), both in nats. Logits exist for one chunk of the vocabulary at a time.

    Forward saves no logits; backward computes them again. With p the softmax and H its entropy:
    ∂ logp / ∂ logit_v = [v = target] − p_v, ∂ H / ∂ logit_v = −p_v (log p_v + H).
    Chunks divide the vocabulary, not the targets, so the rows of d_head for a chunk are complete after one
    product. Only d_hidden is summed over chunks (in fp32), and lse and entropy (in fp64).
    """

    @staticmethod
    def forward(ctx, hidden, head, target, temperature, with_entropy=False):
        N = len(target)
        # over the chunks so far: entropy, and lse = log Σ exp(logit), from a finite minimum as 0 · ∞ is NaN
        lse = torch.full((N,), torch.finfo(torch.float64).min, dtype=torch.float64, device=hidden.device)
        entropy, target_logit = torch.zeros_like(lse), torch.zeros_like(lse)
        for chunk in chunks(len(head), N):
            logits = F.linear(hidden, head[chunk]).float().div_(temperature)  # [N, v]
            inside, column = in_chunk(target, chunk)
            target_logit = torch.where(inside, logits.gather(1, column).squeeze(1), target_logit)
            previous, lse = lse, torch.logaddexp(lse, logits.logsumexp(-1).double())
            if with_entropy:  # earlier log p move by `shift`: H ← e^shift (H − shift) − Σ_chunk p log p
                shift, logp = previous - lse, logits.sub_(lse.float()[:, None])
                entropy = shift.exp() * (entropy - shift) - (logp.exp() * logp).sum(-1)
        entropy = entropy.float() if with_entropy else None
        ctx.save_for_backward(hidden, head, target, lse.float(), entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # d_entropy is None where the loss has no entropy
        return (target_logit - lse).float(), entropy

    @staticmethod
    def backward(ctx, d_logprob, d_entropy):
        hidden, head, target, lse, entropy = ctx.saved_tensors
        d_logprob = torch.zeros_like(lse) if d_logprob is None else d_logprob
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_head = torch.empty_like(head) if ctx.needs_input_grad[1] else None
        for chunk in chunks(len(head), len(target)):
            logp = F.linear(hidden, head[chunk]).float().div_(ctx.temperature).sub_(lse[:, None])  # [N, v]
            factor = -d_logprob[:, None]  # what p_v is multiplied by
            if d_entropy is not None:
                factor = factor - (logp + entropy[:, None]) * d_entropy[:, None]
            d_logits = logp.exp_().mul_(factor)  # [N, v]
            inside, column = in_chunk(target, chunk)
            d_logits.scatter_add_(1, column, (inside * d_logprob)[:, None])
            d_logits = d_logits.div_(ctx.temperature).to(hidden.dtype)
            d_hidden += d_logits @ head[chunk]
            if d_head is not None:
                d_head[chunk] = d_logits.T @ hidden
        return d_hidden.to(hidden.dtype), d_head, None, None, None


def chunks(V, N, elements=2**22, least=1024):
    """Slices of a vocabulary of V tokens. The logits of a chunk [N, v] have at most `elements` numbers (16 MB
    in fp32), unless v would be below `least`, where matrix products become inefficient. v is a multiple of
    64, since a GPU's products are slow for other widths."""
    v = max(least, elements // max(1, N) // 64 * 64)
    return [slice(start, min(start + v, V)) for start in range(0, V, v)]


def in_chunk(target, chunk):
    """→ which targets lie in the chunk [N], and their columns in its logits [N, 1] (others: clamped)."""
    inside = (target >= chunk.start) & (target < chunk.stop)
    return inside, (target - chunk.start).clamp(0, chunk.stop - chunk.start - 1)[:, None]


# ---- rankings: of rewards in rm.py, of log-ratios in dpo.py ----

def plackett_luce(values, mask):
    """−log P(ranking) per sequence [B]: Σ_k logsumexp(values_k … values_K) − values_k (Eq. 18,
    arXiv:2305.18290), for K answers here.

    values [B, K], best first; mask [B, K]: True for answers, False for padding. Padding is filled with a
    finite minimum, because −inf times a zero mask would be NaN."""
    K = values.shape[1]
    not_better = torch.ones(K, K, dtype=torch.bool, device=values.device).triu()  # [k, j]: j ≥ k
    remaining = not_better & mask[:, None, :]  # [B, K, K]
    lse = values[:, None, :].masked_fill(~remaining, torch.finfo(values.dtype).min).logsumexp(-1)  # [B, K]
    return ((lse - values) * mask).sum(-1)


def ranking_accuracy(values, mask):
    """Fraction of each record's pairs whose better answer has the larger value [B]; a tie counts 1/2.
    values [B, K], best first; mask [B, K]: False for padding."""
    difference = values[:, :, None] - values[:, None, :]  # [B, K, K]: better answer, worse answer
    pairs = torch.ones_like(difference, dtype=torch.bool).triu(1) & mask[:, None, :]
    return ((torch.sign(difference) + 1) / 2 * pairs).sum((1, 2)) / pairs.sum((1, 2))


# ---- LoRA ----

class LoRA(nn.Module):
    """A frozen linear layer plus a low-rank update: x Wᵀ + alpha / rank · x Aᵀ Bᵀ (Eq. 3, arXiv:2106.09685).
    B is initialised to 0, so the output is unchanged at first. `on` = False leaves the update out."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.rank, self.alpha, self.on = rank, alpha, True

    def forward(self, x):
        flat = x.flatten(0, -2)  # [B · T, in]
        y = F.linear(flat, self.weight, self.bias)  # [B · T, out]
        if self.on:
            low_rank = F.linear(flat, self.lora_A.weight)  # [B · T, rank]
            y = y.addmm_(low_rank, self.lora_B.weight.T, alpha=self.alpha / self.rank)
        return y.view(*x.shape[:-1], -1)


def add_lora(model, rank, alpha):
    """Replaces the seven projections of each LLaMA layer by LoRA layers. Frozen weights keep their names."""
    for layer in model.language_model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                setattr(block, name, LoRA(linear, rank, alpha))


# ---- the vision-LLM ----

class VisionLLM(nn.Module):
    """CLIP tower, projector and LLaMA, under the names of a Hugging Face LLaVA checkpoint (config:
    LlavaConfig or LlavaNextConfig). With `score` it also has a scalar head, for rewards or values.

    The caller computes `features = model.vision_tower(batch.pixels)` [M, I, D of the tower] and passes them
    in, so that models with the same frozen tower can share them."""

    def __init__(self, config, score=False):
        super().__init__()
        self.config = config
        drop_class = config.vision_feature_select_strategy == "default"
        self.vision_tower = CLIPVision(config.vision_config, config.vision_feature_layer, drop_class)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text_config)
        if score:
            self.score = nn.Linear(config.text_config.hidden_size, 1)

    def set_recompute(self, on):
        """Activation checkpointing: only the inputs of layers are saved; backward runs each layer again."""
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = on

    def set_adapters(self, on):
        """Switches all LoRA updates on or off; off gives the model without adapters."""
        for module in self.modules():
            if isinstance(module, LoRA):
                module.on = on

    def hidden(self, batch, features, positions, head_fn, cache=None):
        """→ head_fn(hidden [N, D], head weight [V, D]) for a data.Batch, where hidden are the final hidden
        states at the flat `positions` [N]."""
        projected = self.multi_modal_projector(features)  # [M · I, D], and image_newline as the last row
        # Not projected[…], whose backward adds up repeated rows in no fixed order on CPUs. image_newline goes
        # another way, as its many rows would be added up in bf16 on GPUs.
        images = projected.index_select(0, batch.image_feature.clamp(min=0))  # [R, D]
        images = torch.where(batch.image_feature[:, None] < 0, projected[-1], images)
        mask, T, n = None, batch.ids.shape[1], batch.causal_prefix
        if n < T:  # from position n on, some sequence holds several answers: causal attention is not enough
            index = torch.arange(T, device=batch.ids.device)
            mask = attention_mask(batch.branch[:, n:], batch.branch, index[n:], index)  # [B, 1, T − n, T]
        return self.language_model(batch.ids, batch.position, mask, positions, head_fn, images,
                                   batch.image_position, cache)

    def forward(self, batch, features, temperature=1.0, entropy=False):
        """→ the log-probability of each target [N] (fp32, nats). With `entropy` also the entropy of the
        softmax that predicts it [N]. The hidden state at batch.logit_position[n] predicts batch.target[n]."""
        def head_fn(hidden, head):
            return TokenLogProbs.apply(hidden, head, batch.target, temperature, entropy)
        logprob, entropies = self.hidden(batch, features, batch.logit_position, head_fn)
        return (logprob, entropies) if entropy else logprob

    def scores(self, batch, features, positions):
        """→ the scalar head's output at flat `positions` [N] (fp32). Rewards are at batch.last_token; values
        are at batch.logit_position, so V_t does not depend on token t."""
        return self.score(self.hidden(batch, features, positions, lambda hidden, head: hidden)).squeeze(-1)


# ---- checkpoints: their configurations and the names in them ----

# model_type of a language model or an original LLaVA → that of the language model
LANGUAGE_MODELS = {
    "llama": "llama", "llava": "llama", "llava_llama": "llama", "mistral": "mistral",
    "llava_mistral": "mistral", "qwen2": "qwen2", "llava_qwen": "qwen2", "llava_qwen2": "qwen2"}

# settings of config.json that change results → the values implemented here (an absent setting is always fine)
ANY_MODEL = {"quantization_config": (None,), "quantization": (None,), "compression_config": (None,)}
LLAVA = {**ANY_MODEL, "mm_projector_type": ("mlp2x_gelu",)}
LANGUAGE_MODEL = {**ANY_MODEL, "attention_dropout": (0,)}
VISION_TOWER = {**ANY_MODEL, "attention_dropout": (0,), "num_channels": (3,)}
LLAVA_NEXT = {**LLAVA, "use_image_newline_parameter": (True,), "vision_feature_select_strategy": ("default",)}
ORIGINAL_LLAVA = {
    **LLAVA, "mm_vision_select_feature": ("patch", "cls_patch"), "mm_use_im_start_end": (False, None),
    "mm_patch_merge_type": ("flat", None), "use_mm_proj": (True, None), "s2": (False, None),
    "image_aspect_ratio": ("square", "pad", None), "use_pos_skipping": (False, None)}
ORIGINAL_NEXT = {**ORIGINAL_LLAVA, "mm_patch_merge_type": ("spatial_unpad",),
                 "image_aspect_ratio": ("anyres",), "mm_vision_select_feature": ("patch",)}
# settings of an original LLaVA that are read elsewhere, or only concern training rates, tiling or video
OTHER_MM = {
    "mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "mm_use_im_patch_token", "mm_projector_lr",
    "mm_vision_tower_lr", "mm_tunable_parts", "mm_newline_position", "mm_spatial_pool_mode",
    "mm_spatial_pool_stride", "image_grid_pinpoints", "image_crop_resolution", "image_split_resolution"}


def check_settings(folder, settings, implemented):
    """UserError for the first setting of a config.json whose value is not implemented, and for a model that
    brings its own code."""
    for key, values in implemented.items():
        if key in settings and settings[key] not in values:
            value = "" if isinstance(settings[key], dict) else f" {settings[key]!r}"
            need = " or ".join(repr(value) for value in values if value is not None) or "a model without it"
            raise UserError(f"{folder}/config.json: got {key}{value}, which is not implemented: need {need}")
    code = [name for name in settings.get("auto_map") or () if name.startswith("AutoModel")]
    if code:
        raise UserError(f"{folder}/config.json: its auto_map names code of its own ({code[0]}), not run here")


def original_llava_config(folder, settings, clip, clip_settings):
    """The configuration of an original LLaVA, or of a language model that gets a new projector. For the
    parameters see `llava_config`."""
    tiles = settings.get("mm_patch_merge_type") == "spatial_unpad"  # LLaVA-NeXT
    check_settings(folder, {"image_aspect_ratio": None, **settings} if tiles else settings,
                   {**LANGUAGE_MODEL, **(ORIGINAL_NEXT if tiles else ORIGINAL_LLAVA)})
    if "mm_vision_tower" in settings and "mm_projector_type" not in settings:
        raise UserError(f"{folder}/config.json: got no mm_projector_type, which means 'linear' (the first "
                        "LLaVA) and is not implemented: need 'mlp2x_gelu'")
    for key in settings.keys() - ORIGINAL_LLAVA.keys() - OTHER_MM:
        if key.startswith(("mm_", "image_", "vision_")) and settings[key] not in (None, False, ""):
            raise UserError(f"{folder}/config.json: got {key} {settings[key]!r}, which is not implemented: "
                            "need LLaVA-1.5 or LLaVA-NeXT")
    check_settings(clip, clip_settings, ANY_MODEL)
    check_settings(clip, clip_settings.get("vision_config", clip_settings), VISION_TOWER)
    kind = clip_settings.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"{clip}/config.json: got model_type {kind!r}, need clip or clip_vision_model")
    vision = CLIPVisionConfig.from_pretrained(clip)
    if settings.get("mm_hidden_size") not in (None, vision.hidden_size):
        raise UserError(f"{folder}/config.json: got mm_hidden_size {settings['mm_hidden_size']}, but the "
                        f"tower in {clip} is {vision.hidden_size} wide: need the tower it was trained with")
    # The config.json of an original LLaVA is that of its language model plus mm_* settings. AutoConfig would
    # read its model_type "llava" as transformers' LLaVA.
    text = {key: settings[key] for key in settings if key != "model_type" and not key.startswith("mm_")}
    text = AutoConfig.for_model(LANGUAGE_MODELS[settings["model_type"]], **text)
    class_token = settings.get("mm_vision_select_feature") == "cls_patch"
    config = (LlavaNextConfig if tiles else LlavaConfig)(
        vision_config=vision, text_config=text, projector_hidden_act="gelu",
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if class_token else "default")
    config.image_token_index = -1
    if tiles:  # pairs of width and height; transformers has the height first
        config.image_grid_pinpoints = [grid[::-1] for grid in settings["image_grid_pinpoints"]]
    return config


def llava_config(folder, settings, clip=None, clip_settings=None):
    """→ LlavaConfig or LlavaNextConfig with image_seq_length set; its image_token_index is −1 where the
    tokenizer has to tell. UserError names a setting that is not implemented.

    settings: the config.json in `folder`. For transformers' LLaVA that is all. For an original LLaVA or a
    language model: also the folder and config.json of its CLIP."""
    where = f"{folder}/config.json"
    if clip is None:
        tiles = settings["model_type"] == "llava_next"
        check_settings(folder, settings, LLAVA_NEXT if tiles else LLAVA)
        check_settings(folder, settings["text_config"], LANGUAGE_MODEL)
        check_settings(folder, settings.get("vision_config") or {}, VISION_TOWER)
        config = (LlavaNextConfig if tiles else LlavaConfig).from_pretrained(folder)
    else:
        config = original_llava_config(folder, settings, clip, clip_settings)
    text, vision = config.text_config, config.vision_config
    if text.model_type not in ("llama", "mistral", "qwen2") or vision.model_type != "clip_vision_model":
        raise UserError(f"{where}: got a {text.model_type} and a {vision.model_type}, need a llama, mistral "
                        "or qwen2, and a clip_vision_model")
    # Mistral's sliding window applies to all layers, Qwen2's to the layers that layer_types names
    window = getattr(text, "sliding_window", None) if text.model_type != "llama" else None
    if window and (text.model_type == "mistral" or {*text.layer_types} != {"full_attention"}):
        raise UserError(f"{where}: got sliding_window {window} (a Mistral has one unless the file says "
                        "null), which is not implemented: need a model without it")
    try:  # building the model raises these errors too, but only after the weights are downloaded
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
    if config.model_type == "llava_next":
        grids, edges = config.image_grid_pinpoints, range(vision.image_size, 2**16, vision.image_size)
        if not grids or not all(len(grid) == 2 and {*grid} <= {*edges} for grid in grids):
            raise UserError(f"{where}: got image_grid_pinpoints {shown(settings.get('image_grid_pinpoints'))}"
                            f", need pairs of multiples of {vision.image_size}, the tower's image_size")
    class_token = config.vision_feature_select_strategy == "full"
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2 + class_token
    return config


# names of tensors in checkpoints → our names, those of llava-hf/llava-1.5-7b-hf; the first match is applied
SPELLINGS = {
    r"^model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",  # original LLaVA
    r"^model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    r"^(model\.)?image_newline$": "multi_modal_projector.image_newline",  # outside of it in every checkpoint
    r"^model\.vision_tower\.vision_tower\.": "vision_tower.",
    r"^model\.language_model\.": "language_model.model.",  # transformers' names in memory
    r"^model\.(vision_tower|multi_modal_projector)\.": r"\1.",
    r"^model\.": "language_model.model.",  # a LLaMA
    r"^lm_head\.": "language_model.lm_head.",
    r"^vision_model\.": "vision_tower.vision_model.",  # a CLIP
    r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.": r"vision_tower.vision_model.\1.",
}
EXTRAS = re.compile(r"text_model\.|logit_scale$|(visual|text)_projection\.weight$|position_ids$|inv_freq$")
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def our_name(name):
    """A tensor's name in any known checkpoint → the name of our parameter."""
    pattern = next((pattern for pattern in SPELLINGS if re.search(pattern, name)), None)
    if pattern:
        name = re.sub(pattern, SPELLINGS[pattern], name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def initial_std(name, shape):
    """Standard deviation of a newly initialised parameter: 0 for biases and LoRA's B, PEFT's for LoRA's A.
    The scalar head's gives scores of about unit variance (arXiv:2009.01325)."""
    if len(shape) == 1 or ".lora_B." in name:
        return 0.0
    if ".lora_A." in name:
        return (3 * shape[1]) ** -0.5
    return (shape[1] + 1) ** -0.5 if name.startswith("score.") else 0.02


def tensor_shape(tensor):
    """The shape of a tensor or of a slice of a safetensors file."""
    return tuple(tensor.shape if torch.is_tensor(tensor) else tensor.get_shape())


def check_names(model, tensors, resized_vocab, newly_initialised, folders):
    """UserError with the full list of differences unless the tensors (name → tensor or safetensors slice) fit
    the model: no parameter is missing, no tensor is unused, and all shapes are equal.

    resized_vocab: (old, new) sizes of a vocabulary that gets more tokens than the folders hold, or None;
    newly_initialised: substrings of parameter names that may be missing."""
    where = " + ".join(folders)
    floats = {"F16", "BF16", "F32", "F64", torch.float16, torch.bfloat16, torch.float32, torch.float64}
    for name, tensor in tensors.items():
        dtype = tensor.dtype if torch.is_tensor(tensor) else tensor.get_dtype()
        if dtype not in floats:
            raise UserError(f"{where}: {name} is {dtype}, as in quantised weights: need floating-point "
                            "weights of 16 bits or more")
    shapes = {name: tensor_shape(tensor) for name, tensor in tensors.items()}
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems = [f"missing: {name} {wanted[name]}" for name in sorted(wanted.keys() - shapes.keys())
                if not any(substring in name for substring in newly_initialised)]
    problems += [f"not known: {name} {shapes[name]}" for name in sorted(shapes.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & shapes.keys()):
        need = (resized_vocab[0], *wanted[name][1:]) if resized_vocab and name in VOCABULARY else wanted[name]
        if shapes[name] != need:
            problems.append(f"shape: {name} is {shapes[name]}, need {need}")
    if problems:
        raise UserError("\n  ".join([f"the weights in {where} do not fit its config.json:", *problems]))


# ---- generation ----

class Cache:
    """Keys and values of at most `size` positions per sequence. All tensors exist from the start and are
    changed in place, so that a decoding step can be captured in a CUDA graph. branch [B, size]: the answer
    that a position belongs to (0: the prompt), -1 for padding and positions not yet filled. Attention reads
    the first `visible` positions."""

    def __init__(self, B, size, device):
        self.size, self.visible, self.store = size, size, {}
        self.branch = torch.full((B, size), -1, device=device)
        self.all_positions = torch.arange(size, device=device)

    def append(self, branch, index):
        """Reserves the positions index [T], of the given branches [B, T], for the next forward pass."""
        self.reserved = index
        self.branch.index_copy_(1, index, branch)

    def mask(self, branch):
        """The attention mask of the reserved positions, of the given branches [B, T] → [B, 1, T, visible]"""
        visible = slice(self.visible)
        return attention_mask(branch, self.branch[:, visible], self.reserved, self.all_positions[visible])

    def extend(self, layer, k, v):
        """Stores a layer's keys and values [B, K, T, C] at the reserved positions. → keys and values of the
        visible positions [B, K, visible, C]"""
        if layer not in self.store:  # zeros, since a masked NaN would still be NaN
            B, K, _, C = k.shape
            self.store[layer] = k.new_zeros(B, K, self.size, C), v.new_zeros(B, K, self.size, C)
        for stored, new in zip(self.store[layer], (k, v)):
            stored.index_copy_(2, self.reserved, new)
        return [stored[:, :, :self.visible] for stored in self.store[layer]]


def keyed_uniforms(seed, minibatch, prompts, num_samples, num_steps):
    """Uniforms in [0, 1) [B, num_samples, num_steps] (fp64), for B integers that identify the prompts. Each
    depends only on (seed, minibatch, prompt, sample, step), not on the batch, the rank or earlier draws."""
    return torch.from_numpy(np.stack([
        [np.random.default_rng([seed, minibatch, prompt, k]).random(num_steps) for k in range(num_samples)]
        for prompt in prompts]))


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """logits [..., V] (fp32), uniform [...] → token ids [...], by the inverse CDF of
    softmax(logits / temperature), restricted to the top_k most likely tokens (0: all) and then to the
    smallest set of tokens with probability ≥ top_p. Greedy if uniform is None or temperature is 0."""
    if uniform is None or temperature == 0:
        return logits.argmax(-1)
    p = F.softmax(logits.double() / temperature, dim=-1)  # [..., V]
    if top_k:
        p = p.masked_fill(p < p.topk(min(top_k, p.shape[-1]), dim=-1).values[..., -1:], 0)
    if top_p < 1:
        ranked, order = (p / p.sum(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
        outside = ranked.cumsum(-1) - ranked >= top_p  # the more likely tokens alone reach top_p
        p = p.masked_fill(outside.gather(-1, order.argsort(-1)), 0)  # back in the order of the vocabulary
    cdf = p.cumsum(-1)
    # the first token with cdf > uniform · total, so never one of probability 0; V, out of range, if p is NaN
    token = torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[..., -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)


def aligned(positions):
    """The next multiple of 16: PyTorch's fused attention copies a mask whose rows have another length."""
    return -(-positions // 16) * 16


def pacing(device, cuda_graph):
    """→ steps between questions whether any sample still runs, which a GPU has to be waited for; steps per
    CUDA graph, in which attention reads equally many positions (a multiple of the former, so that a graph is
    idle when the next one replaces it)."""
    on_gpu = device.type == "cuda"
    return 8 if on_gpu else 1, 128 if on_gpu and cuda_graph else 1


class Decoder:
    """K samples per prompt, one token of each per step. The tensors that change are changed in place."""

    def __init__(self, model, batch, features, max_new_tokens, stop, banned, uniforms, num_samples, sampling):
        """Prefill: each prompt once. Its last hidden state predicts the first token of all K samples."""
        device, (B, T), K = batch.ids.device, batch.ids.shape, num_samples
        self.model, self.sampling = model, sampling  # temperature, top_k, top_p
        self.stop, self.banned = (torch.tensor(sorted(ids), device=device, dtype=torch.long)
                                  for ids in (stop, banned))
        self.uniforms = None if uniforms is None else uniforms.to(device)  # [B, K, max_new_tokens]
        self.length = (batch.branch == 0).sum(1)  # of the prompts [B]
        self.cache = Cache(B, aligned(T + K * (max_new_tokens - 1)), device)
        self.cache.append(batch.branch, torch.arange(T, device=device))
        last_token = torch.arange(B, device=device) * T + self.length - 1  # flat positions [B]
        logits = model.hidden(batch, features, last_token, F.linear, self.cache)  # [B, V]
        # Each step appends one position per sample to the cache: K per sequence, of branches 1 … K.
        self.branch = torch.arange(1, K + 1, device=device).expand(B, -1)  # [B, K]
        self.all_new = torch.arange(B * K, device=device)  # flat positions in [B, K]: all of a step
        self.index = T + torch.arange(K, device=device)  # positions in the cache of the next step's tokens
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # number of tokens sampled so far
        self.tokens = torch.zeros(B, K, max_new_tokens, dtype=torch.long, device=device)
        self.lengths = torch.zeros(B, K, dtype=torch.long, device=device)
        self.logprob = torch.zeros(B, K, device=device)
        self.running = (self.length > 0)[:, None].repeat(1, K)  # a sequence of padding gets empty answers
        self.token = torch.zeros(B, K, dtype=torch.long, device=device)  # the last one of each sample
        self.sample(logits[:, None].expand(-1, K, -1))

    def sample(self, logits):
        """Appends a token to each sample, from logits [B, K, V]."""
        logits = logits.float()
        uniform = None if self.uniforms is None else self.uniforms.index_select(2, self.step).squeeze(2)
        allowed = logits.index_fill(-1, self.banned, -torch.inf)
        self.token.copy_(sample_token(allowed, uniform, *self.sampling))
        token = self.token.unsqueeze(-1)  # [B, K, 1]
        self.tokens.index_copy_(2, self.step, token)
        self.lengths += self.running
        self.logprob += self.running * F.log_softmax(logits, dim=-1).gather(-1, token).squeeze(-1)
        self.running &= ~(token == self.stop).any(-1)
        self.step += 1

    def advance(self):
        """A step: a forward pass of the last tokens, then the next ones."""
        self.cache.append(self.branch, self.index)
        position = (self.length + self.step - 1)[:, None].expand_as(self.token)  # [B, K]
        logits = self.model.language_model(self.token, position, self.cache.mask(self.branch), self.all_new,
                                           F.linear, cache=self.cache)  # [B · K, V]
        self.index += self.token.shape[1]
        self.sample(logits.unflatten(0, self.token.shape))


def captured(function):
    """function() as a CUDA graph: its kernels are launched together, without Python. It must have run before,
    and change tensors in place only."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
        function()
    return graph.replay


@torch.no_grad()
def generate(model, batch, features, max_new_tokens, stop, banned=(), uniforms=None, num_samples=1,
             temperature=1.0, top_k=0, top_p=1.0, any_running=torch.any, cuda_graph=True, stream=None):
    """Samples answers to a batch of prompts (sequences without answers). → answers[b][k], a list of ids, and
    each answer's log-probability under the model [B, num_samples] (at temperature 1, full vocabulary).

    stop: ids that end an answer, and are its last token; banned: ids that are never sampled;
    uniforms [B, num_samples, max_new_tokens], or None for greedy decoding; any_running(running): whether
    to take another step (ranks with sharded weights must agree on it); cuda_graph: on a GPU, replay steps
    as a CUDA graph, which a sharded model cannot; stream(ids): is called now and then with the first
    prompt's first answer so far."""
    decoder = Decoder(model, batch, features, max_new_tokens, stop, banned, uniforms, num_samples,
                      (temperature, top_k, top_p))
    T, (check_every, segment) = batch.ids.shape[1], pacing(batch.ids.device, cuda_graph)
    for step in range(max_new_tokens - 1):
        if step % check_every == 0:
            if stream:
                stream(decoder.tokens[0, 0, :decoder.lengths[0, 0]].tolist())
            if not any_running(decoder.running):
                break
        if step % segment == 0:
            reach = T + num_samples * (step + segment)
            decoder.cache.visible = min(aligned(reach), decoder.cache.size) if segment > 1 else reach
            advance = decoder.advance
        advance()
        if segment > 1 and step % segment == 0 and step + check_every < max_new_tokens:  # else not worth it
            advance = captured(decoder.advance)
    tokens, lengths = decoder.tokens.tolist(), decoder.lengths.tolist()
    return [[ids[:n] for ids, n in zip(*samples)] for samples in zip(tokens, lengths)], decoder.logprob
