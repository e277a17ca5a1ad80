"""
The peers that studies/bench.py measures this project against, on the same weights.

    transformers        its model of the family, with generate() or with one of its caches; a training step as
                        one would write it with its hidden states
    Liger               Liger-Kernel's fused linear JSD, where liger-kernel is installed and there is CUDA
    Liger's scheme      the same in plain PyTorch, for every device: its rule for the chunk and its tensors,
                        with the KL of Eq. (4) for its kernel

Simpler than usual: no peer is wrapped or configured. Each runs as its own documentation says, except that
attention masks and stop tokens are left out, for nothing is padded and nothing stops. What is not here: vLLM,
which is an engine of its own, and training frameworks.

How to run it: `python -m studies.bench head`, and the other tables.

Letters: K rows, C of them in a chunk, d width, V vocabulary, L layers, G key/value heads, e head width.
"""
import importlib
import importlib.util

import torch

from formats.huggingface import hf_config, hf_tensors
from losses import oprd_loss
from support.optimizer import adamw


def installed(package):
    """Is a package there?"""
    return importlib.util.find_spec(package) is not None


# ---- transformers ---------------------------------------------------------------------------------

def transformers_model(model, env):
    """The same weights in transformers' model of the family."""
    peer = importlib.import_module('transformers')
    config = peer.AutoConfig.for_model(**hf_config(model.config))
    with env.device:
        theirs = peer.AutoModelForCausalLM.from_config(config, dtype=env.dtype).eval().requires_grad_(False)
    tensors = hf_tensors(model.config, dict(model.named_parameters()))
    left = theirs.load_state_dict(tensors, strict=False)
    assert set(left.missing_keys) <= {'lm_head.weight'} and not left.unexpected_keys, left
    theirs.tie_weights()
    return theirs


class TransformersDecode:
    """A token for each of `rows` answers that hold `context` tokens, sampled at temperature 1.

    static: with the static cache. On CUDA the model is compiled for it, as generate() does.
    """
    def __init__(self, theirs, c, rows, context, steps, static):
        self.c = c
        self.rows = rows
        self.context = context
        self.steps = steps
        self.theirs = theirs
        self.forward = theirs.forward
        self.cache = None                    # the static one
        if static:
            peer = importlib.import_module('transformers')
            self.cache = peer.StaticCache(config=theirs.config, max_cache_len=context + steps)
            if theirs.device.type == 'cuda':
                self.forward = torch.compile(theirs.forward, mode='reduce-overhead')

    def filled(self):
        """A cache as if `context` tokens had been read; what keys it holds does not change the time."""
        if self.cache is None:
            cache = importlib.import_module('transformers').DynamicCache()
        else:
            cache = self.cache
            cache.reset()
        empty = torch.zeros(self.rows, self.c.G, self.context, self.c.e, dtype=self.theirs.dtype,
                            device=self.theirs.device)
        for layer in range(self.c.L):
            cache.update(empty, empty, layer)
        return cache

    @torch.no_grad()
    def __call__(self):
        device = self.theirs.device
        cache = self.filled()
        ids = torch.ones(self.rows, 1, dtype=torch.long, device=device)
        for step in range(self.steps):
            position = torch.full((self.rows, 1), self.context + step, device=device)
            logits = self.forward(input_ids=ids, position_ids=position, past_key_values=cache,
                                  use_cache=True).logits                     # (rows, 1, V)
            ids = logits[:, -1].float().softmax(-1).multinomial(1)


class TransformersUpdate:
    """A training step of Eq. (6) as one would write it with transformers: both models keep all hidden
    states, the supervised rows are picked out of them, and autograd does the rest. No head."""
    def __init__(self, student, teacher, env, checkpointing):
        self.env = env
        self.student = transformers_model(student, env).float().train().requires_grad_(True)
        self.teacher = transformers_model(teacher, env)
        if checkpointing:
            self.student.gradient_checkpointing_enable()
        self.opt = adamw(self.student, 1e-6, (0.9, 0.999), 1e-8, 0.0)

    def __call__(self, ids, at, weights):
        """ids (B, T), at (K,) flat positions in B * T, weights (K,)."""
        dtype = self.env.dtype
        with torch.autocast(self.env.device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                states = self.teacher.model(ids, output_hidden_states=True).hidden_states[1:]
                h_t = [h.flatten(0, 1)[at] for h in states]                  # L of (K, d)
                del states
            states = self.student.model(ids, output_hidden_states=True).hidden_states[1:]
            h_s = [h.flatten(0, 1)[at] for h in states]
        oprd_loss(h_s, h_t, weights).backward()
        self.opt.step()
        self.opt.zero_grad()


# ---- Liger ----------------------------------------------------------------------------------------

def liger(h, W, h_t, W_t):
    """Liger-Kernel's fused linear JSD with beta 1, which is the reverse KL, forward and backward."""
    function = importlib.import_module('liger_kernel.ops.fused_linear_jsd').LigerFusedLinearJSDFunction
    loss = function.apply(h, W, h_t, W_t, None, 1.0)
    if isinstance(loss, tuple):              # some versions return more than the loss
        loss = loss[0]
    torch.autograd.grad(loss, (h, W))


def liger_scheme(h, W, h_t, W_t, w):
    """The scheme of Liger-Kernel 0.8's fused linear JSD: rows (K, d) of both models under their heads (V, d),
    weights w (K,) -> loss, gradient of h, gradient of W.

    There are ceil(V / d) chunks, their size rounded up to a power of two. A chunk has both logits, both
    log-softmaxes, the softmax, the loss and its gradient, in float32.
    """
    K = len(h)
    V, d = W.shape
    chunks = -(-V // d)
    rows_of_a_chunk = -(-K // chunks)
    power_of_two = 1 << (rows_of_a_chunk - 1).bit_length()
    C = min(K, power_of_two)
    d_W = torch.zeros_like(W)
    d_h = torch.zeros_like(h)
    total = 0.0
    for start in range(0, K, C):
        rows = slice(start, start + C)
        weight = w[rows, None]
        z_s = (h[rows] @ W.t()).float() / 1.0                                # (C, V), a copy
        z_t = (h_t[rows] @ W_t.t()).float() / 1.0
        logp = z_s.log_softmax(-1)
        logq = z_t.log_softmax(-1)
        p = z_s.softmax(-1)
        divergence = p * (logp - logq)
        total += (weight * divergence).sum()

        # dD/dlog p in place, then through the softmax.
        logp.copy_(divergence.add_(p).mul_(weight))
        grad = ((logp - p * logp.sum(-1, keepdim=True)) / 1.0).to(h.dtype)
        d_h[rows] = grad @ W
        d_W.addmm_(grad.t(), h[rows])
    return total, d_h, d_W
