"""
The student answers prompts: a batched sampler with a KV cache, and the naive sampler that it must equal.

`naive` is the obvious version: for every new token it reads the whole text again. `sample` gives the same
answers, many at a time. `stream` is the loop behind `sample`. Each turn of this loop has three steps:

    1. admit or decode   read the prompts of waiting requests into free slots (prefill); if too few slots are
                         free, sample a few more tokens in every slot
    2. poll              ask the device which answers are finished
    3. retire            free the slots of these answers, and yield the answers

A slot is one row of the batch and of the KV cache. When an answer is finished, the next request gets its
slot, while the other answers go on (continuous batching). A decode step reads all the weights for one token
per slot, so memory bandwidth limits it. On CUDA the host could not launch its many small kernels as fast as
they run. Therefore the step, sampling included, is recorded as a CUDA graph and replayed, and the host polls
only every 32 tokens.

Randomness is counter-based: the uniform number behind a token is a function of (seed, step, prompt number,
sample number, position) alone. There is no generator state to save. In float32 an answer therefore does not
depend on the other answers in its batch, on the number of ranks or on a restart, up to a tie in the last
bit: matrix products round differently in batches of different shapes, and a token changes if its uniform
number falls between the two roundings. In bfloat16 this rounding is about 65,000 times coarser: the random
numbers are the same, but an answer can differ when it is sampled in another batch. One exception holds in
every dtype: a longrope model chooses its frequencies by the longest text that the call may produce, unless
`model.max_length` says more. The random numbers, and how one chooses a token, are in
kernels/decode_sampling.py.

Simpler than usual: the cache has one row per slot and no pages, and requests are admitted in their order.
What it does not do: beam search, repetition penalties, reading once what two different prompts begin with.

This file is a library and has no command of its own. On any device:

    roll = sample(model, [[1, 5, 9], [2, 3]], n=4, max_new_tokens=100, stop=[0], temperature=0.6)
    roll.answers()                           # 8 lists of ids

Letters: B slots or answers, n a part of them, T tokens, V vocabulary, d width.
"""
from collections import deque
from dataclasses import dataclass

import torch

import kernels
from kernels.decode_sampling import pick, stream_keys, uniform
from model import Cache
from support.runtime import padded_length


@dataclass
class Rollout:
    """Sampled answers, right-padded with id 0. The lengths, never the ids, say what is padding."""
    ids: torch.Tensor           # (B, T) prompt, answer, padding
    prompt_len: torch.Tensor    # (B,)
    resp_len: torch.Tensor      # (B,) tokens sampled, the stop token included
    stopped: torch.Tensor       # (B,) True: ended by a stop token; False: cut at max_new_tokens
    prompt: torch.Tensor        # (B,) index of the row's prompt in the list that `sample` was given

    @property
    def length(self):
        return self.prompt_len + self.resp_len

    def answers(self):
        """The sampled ids of each row, as lists."""
        answers = []
        spans = zip(self.prompt_len.tolist(), self.length.tolist(), strict=True)
        for ids, (start, end) in zip(self.ids.tolist(), spans, strict=True):
            answers.append(ids[start:end])
        return answers


@dataclass(frozen=True)
class Request:
    """One answer to sample. The two numbers name its stream of random numbers."""
    prompt: list                # ids
    prompt_number: int          # number of the prompt in its problem set
    sample_number: int          # 0 for the first answer to this prompt, 1 for the second, ...
    max_new_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, the same for all requests of a call."""
    stop: list                  # ids that end an answer
    seed: int = 0
    step: int = 0               # training step: another step gives other answers
    temperature: float = 1.0    # 0: always the likeliest token
    top_k: int = 0              # keep the k likeliest tokens; 0: keep all
    top_p: float = 1.0          # keep the likeliest tokens up to this probability; 1: keep all
    vocab: int | None = None    # ids from here on are padding of the embedding, and are never drawn


# ---- the obvious version ----------------------------------------------------------------------

def naive_answer(model, request, sampling):
    """Answer one request; for every token the model reads the whole text again -> ids, stopped."""
    device = model.embed.weight.device
    prompt_number = torch.tensor([request.prompt_number], device=device)
    sample_number = torch.tensor([request.sample_number], device=device)
    keys = stream_keys(sampling.seed, sampling.step, prompt_number, sample_number)       # (1,)

    answer = []
    stopped = False
    while len(answer) < request.max_new_tokens and not stopped:
        # The logits at the last token of the text are those of the next token.
        text = torch.tensor([request.prompt + answer], device=device)        # (1, T)
        logits = model(text)[:, -1]                                          # (1, V)

        # The position in the answer chooses the uniform number, and this chooses the token.
        u = uniform(keys, len(answer))                                       # (1,)
        token = pick(logits, u, sampling.temperature, sampling.top_k, sampling.top_p, sampling.vocab)
        answer.append(token.item())
        stopped = answer[-1] in sampling.stop
    return answer, stopped


@torch.no_grad()
def naive(model, prompts, n=1, *, max_new_tokens, which=None, samples=None, **sampling):
    """What `sample` computes, one answer after the other. Arguments as in `sample`."""
    requests = numbered(prompts, n, which, samples)
    answers = []
    for index, request in enumerate(with_limits(requests, max_new_tokens)):
        ids, stopped = naive_answer(model, request, Sampling(**sampling))
        answers.append((index, ids, stopped))
    return collect(requests, n, answers, model.embed.weight.device)


# ---- slots: the answers in the making ---------------------------------------------------------

ROOM = 1024                     # tokens that a new cache holds beyond the longest prompt


class Replay:
    """Call a function of no arguments, and from the third call on replay it as a CUDA graph.

    The first call runs it, which compiles its kernels. The second call records it and replays the record.
    The tensors of the function must keep their storage. Replay keeps no reference to the function: a cycle
    through the slots would keep the cache in memory until Python's collector runs.
    """
    def __init__(self):
        self.graph = None
        self.warm = False

    def __call__(self, step):
        # Recording runs nothing: this call's own run is the replay below.
        if self.graph is None and self.warm:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            self.graph = graph
        if self.graph is None:
            step()
            self.warm = True
        else:
            self.graph.replay()


class Slots:
    """B answers in the making. Slot b is row b of the KV cache and of the tensors below.

    A decode step looks at no value on the host, and its tensors keep their storage: it can be a CUDA graph.
    Only `compact` and `reserve` replace the tensors, and they reset the graph.

    longest_prompt: the longest of all requests to come. limit: the most tokens that a prompt and its answer
    may have together. budget: the most prompt tokens that are read at once.
    """
    def __init__(self, model, B, longest_prompt, limit, budget, sampling):
        weight = model.embed.weight
        device = weight.device
        self.model = model.packed()          # on a CPU a step's products are faster by packed weights
        self.budget = budget
        self.sampling = sampling

        # The cache grows with the answers, from a little more than the prompts need up to `limit`.
        tokens = min(limit, longest_prompt + ROOM)
        self.cache = Cache(model.config, B, tokens, device, weight.dtype, limit)

        # The state of each slot. A free slot counts as done.
        zeros = torch.zeros(B, dtype=torch.long, device=device)              # (B,)
        self.cache.length = zeros.clone()    # tokens in the cache
        self.ids = torch.zeros(B, limit + 1, dtype=torch.long, device=device)            # sampled tokens
        self.token = zeros.clone()           # the last one, which the model has not read yet
        self.count = zeros.clone()           # how many there are
        self.max_count = zeros.clone()       # max_new_tokens
        self.keys = zeros.clone()            # of the random numbers, see `stream_keys`
        self.done = torch.ones_like(zeros, dtype=torch.bool)
        self.stopped = torch.zeros_like(zeros, dtype=torch.bool)             # by a stop token

        # is_stop[token]: a table on the device. The model cannot sample a stop id beyond its vocabulary.
        V = model.config.V
        self.is_stop = torch.zeros(V, dtype=torch.bool, device=device)
        self.is_stop[[token for token in sampling.stop if token < V]] = True
        self.all_slots = torch.arange(B, device=device)
        self.reset_graph()

    def reset_graph(self):
        """The tensors were reallocated. Drop the CUDA graph: it still points at the old ones."""
        self.replay = Replay() if kernels.fused(self.model.embed.weight) else None

    def tensor(self, values):
        """A list as a tensor on the slots' device."""
        return torch.tensor(values, device=self.ids.device)

    def prefill(self, slots, requests):
        """Put the requests into these slots: read the prompts and sample the first token of each answer."""
        prompts, prompt_of = distinct_prompts(requests)
        ids = right_pad(prompts, self.ids.device)                            # (prompts, T)
        ids = ids[:, :self.cache.room]       # where answers are short, there may be no room for all padding
        length = self.tensor([len(prompt) for prompt in prompts])            # (prompts,)

        # Read as many prompts at once as the budget allows. The cache of such a group has the `limit` of
        # the whole answers, because longrope chooses its frequencies by it.
        T = ids.shape[1]
        dtype = self.cache.kv[0].dtype
        group_size = max(1, self.budget // T)
        states = []
        for start in range(0, len(prompts), group_size):
            end = min(start + group_size, len(prompts))
            cache = Cache(self.model.config, end - start, T, ids.device, dtype, self.cache.limit)
            states.append(self.read_prompts(ids[start:end], length[start:end], cache))

            # Copy the keys and values of each prompt to the slots of all its answers.
            to_slots = []
            from_rows = []
            for slot, prompt in zip(slots, prompt_of, strict=True):
                if start <= prompt < end:
                    to_slots.append(slot)
                    from_rows.append(prompt - start)
            self.cache.put(self.tensor(to_slots), cache, self.tensor(from_rows))

        # The state of the slots before the first token.
        slots = self.tensor(slots)                                           # (n,)
        prompt_of = self.tensor(prompt_of)                                   # (n,)
        seed = self.sampling.seed
        prompt_number = self.tensor([request.prompt_number for request in requests])
        sample_number = self.tensor([request.sample_number for request in requests])
        self.keys[slots] = stream_keys(seed, self.sampling.step, prompt_number, sample_number)
        self.count[slots] = 0
        self.max_count[slots] = self.tensor([request.max_new_tokens for request in requests])
        self.done[slots] = False
        self.stopped[slots] = False
        self.cache.length[slots] = length[prompt_of]

        # The logits at the last token of a prompt give the first token of all its answers.
        logits = self.model.head(torch.cat(states))                          # (prompts, V)
        self.sample_next(slots, logits[prompt_of])

    def read_prompts(self, ids, length, cache):
        """Read right-padded prompts (n, T) into an empty cache -> the state at the last token of each (n, d).

        Long prompts are read in pieces of `budget` tokens, so that the largest activation does not grow with
        the prompt. Padding on the right is harmless: attention is causal, and an answer overwrites the
        keys of the padding before its row is long enough to see them.
        """
        row = torch.arange(len(ids), device=ids.device)                      # (n,)
        last_token = length - 1                                              # (n,)
        last_state = None
        for start in range(0, ids.shape[1], self.budget):
            piece = ids[:, start:start + self.budget]                        # (n, T')
            states = self.model.trunk(piece, cache)                          # (n, T', d)

            # Some prompts end inside this piece: keep their last state.
            column = (last_token - start).clamp(0, piece.shape[1] - 1)       # (n,)
            candidate = states[row, column]                                  # (n, d)
            ends_in_piece = (last_token >= start) & (last_token < start + self.budget)
            if last_state is None:
                last_state = torch.zeros_like(candidate)
            last_state = torch.where(ends_in_piece[:, None], candidate, last_state)
        return last_state

    def sample_next(self, slots, logits):
        """Sample one token for each of these slots (n,) from its logits (n, V), and record it."""
        kernels.sample_next(self, slots, logits)

    def decode_step(self):
        """One more token in every slot. The cache of a finished slot does not get longer."""
        logits = self.model(self.token[:, None], self.cache)[:, 0]           # (B, V)
        self.cache.length += ~self.done
        self.sample_next(self.all_slots, logits)

    def decode(self, steps):
        """So many decode steps, replayed on CUDA. `reserve` must have made room for them."""
        for _ in range(steps):
            if self.replay:
                self.replay(self.decode_step)
            else:
                self.decode_step()

    def poll(self):
        """Wait for the device once -> done, stopped, count and tokens in the cache, a list of B each."""
        return torch.stack([self.done, self.stopped, self.count, self.cache.length]).tolist()

    def retire(self, slots):
        """Free these slots -> the rows of `ids` for them, as lists; the first `count` ids are the answer.

        A free slot holds no tokens, so attention has nothing to read for it.
        """
        self.cache.length[slots] = 0
        return self.ids[slots].tolist()

    def compact(self, slots):
        """Keep only these slots, numbered from 0 again: a smaller batch makes a cheaper step."""
        rows = self.tensor(slots)
        self.cache.keep_rows(rows)
        self.ids = self.ids[rows]
        self.token = self.token[rows]
        self.count = self.count[rows]
        self.max_count = self.max_count[rows]
        self.keys = self.keys[rows]
        self.done = self.done[rows]
        self.stopped = self.stopped[rows]
        self.all_slots = self.all_slots[:len(rows)]
        self.reset_graph()

    def reserve(self, longest, steps):
        """Make room for `steps` more tokens in every slot. longest: the most tokens that a slot holds now."""
        self.cache.longest = longest
        needed = longest + steps
        if needed > self.cache.room and self.cache.room < self.cache.limit:
            self.cache.grow(needed)
            self.reset_graph()


# ---- the loop ---------------------------------------------------------------------------------

@torch.no_grad()
def stream(model, requests, *, rows, max_new_tokens, budget=32768, poll_every=0, on_poll=None, **sampling):
    """Answer the requests -> (index of the request, its ids, ended by a stop token?), each as it ends.

    requests: (prompt ids, prompt number, sample number) each; see `Request`. rows: the number of slots, which
    bounds the memory of the cache. max_new_tokens: a number, or a list of one for each request. budget: the
    most prompt tokens that are read at once. poll_every: decode steps between two polls; each poll waits
    for the device; 0: 32 on CUDA, else 1. on_poll(ended answers, sampled tokens): called after each poll,
    with the numbers so far. sampling: the fields of `Sampling`; stop is required.
    """
    requests = with_limits(requests, max_new_tokens)
    on_cuda = model.embed.weight.is_cuda
    poll_every = poll_every or (32 if on_cuda else 1)
    B = min(rows, len(requests))
    longest_prompt = max(len(request.prompt) for request in requests)
    limit = max(len(request.prompt) + request.max_new_tokens for request in requests)
    slots = Slots(model, B, longest_prompt, limit, budget, Sampling(**sampling))

    # A prefill takes as long as one or two decode steps: wait until an eighth of the slots is free.
    # On CUDA a smaller batch needs a new graph: compact when half of the slots are free, not at a quarter.
    enough_free = max(1, B // 8)
    compact_at = 0.5 if on_cuda else 0.75
    waiting = deque(range(len(requests)))    # indices of requests
    occupant = [None] * B                    # the index of the request in each slot; None: the slot is free
    ended = []                               # lengths of the answers that have ended
    done, stopped, count, length = slots.poll()
    while waiting or any(index is not None for index in occupant):
        free = [slot for slot, index in enumerate(occupant) if index is None]
        busy = [slot for slot, index in enumerate(occupant) if index is not None]

        # 1. Admit waiting requests into free slots. Each answer gets its first token here.
        if waiting and len(free) >= enough_free:
            admitted = free[:len(waiting)]
            for slot in admitted:
                occupant[slot] = waiting.popleft()
            slots.prefill(admitted, [requests[occupant[slot]] for slot in admitted])

        # 1. Or decode until the next poll, but not beyond the greatest length of any answer.
        else:
            longest = max(length[slot] for slot in busy)
            tokens_left = [requests[occupant[slot]].max_new_tokens - count[slot] for slot in busy]
            steps = min(poll_every, max(tokens_left))
            if not waiting and len(busy) <= compact_at * len(occupant):
                slots.compact(busy)
                occupant = [occupant[slot] for slot in busy]
            slots.reserve(longest, steps)
            slots.decode(steps)

        # 2. Poll: wait until the device has done all these steps, and see which answers are finished.
        done, stopped, count, length = slots.poll()
        busy = [slot for slot, index in enumerate(occupant) if index is not None]
        finished = [slot for slot in busy if done[slot]]
        if on_poll:
            on_poll(len(ended) + len(finished), sum(ended) + sum(count[slot] for slot in busy))

        # 3. Retire the finished answers.
        ended += [count[slot] for slot in finished]
        if finished:
            for slot, ids in zip(finished, slots.retire(finished), strict=True):
                yield occupant[slot], ids[:count[slot]], bool(stopped[slot])
                occupant[slot] = None


def sample(model, prompts, n=1, *, max_new_tokens, which=None, samples=None, **settings):
    """n answers to each prompt -> Rollout of B = len(prompts) * n rows, those of a prompt together.

    This is `stream` with as many slots as answers. prompts: lists of ids. max_new_tokens: a number, or a list
    of one for each of the B answers. which: the number of each prompt in its problem set, which fixes its
    random numbers (default: its index in the list). samples: the sample number of each prompt's first answer
    (default: 0), so that another rank can sample the others; a list of ids that comes twice, as the same
    object, is read once. settings: the fields of `Sampling` (stop is required; seed, step, temperature,
    top_k, top_p, vocab), and budget, poll_every and on_poll of `stream`.
    """
    requests = numbered(prompts, n, which, samples)
    answers = stream(model, requests, rows=len(requests), max_new_tokens=max_new_tokens, **settings)
    return collect(requests, n, answers, model.embed.weight.device)


# ---- between lists and tensors ----------------------------------------------------------------

def distinct_prompts(requests):
    """Requests -> their prompts, each list once, and for each request the index of its prompt among these.

    Several answers to one prompt share the same list object: this is what is looked for, not equal ids.
    """
    prompts = []
    prompt_of = []
    index_of = {}                            # {id of the list object: its index in prompts}
    for request in requests:
        key = id(request.prompt)
        if key not in index_of:
            index_of[key] = len(prompts)
            prompts.append(request.prompt)
        prompt_of.append(index_of[key])
    return prompts, prompt_of


def numbered(prompts, n, which, samples):
    """n requests for each prompt: (prompt ids, prompt number, sample number) each."""
    numbers = range(len(prompts)) if which is None else torch.as_tensor(which).tolist()
    first_samples = [0] * len(prompts) if samples is None else samples
    requests = []
    for prompt, prompt_number, first in zip(prompts, numbers, first_samples, strict=True):
        for sample_number in range(first, first + n):
            requests.append((prompt, prompt_number, sample_number))
    return requests


def with_limits(requests, max_new_tokens):
    """(prompt ids, prompt number, sample number) each, and a limit or a list of limits -> list of Request."""
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(requests)
    return [Request(*request, limit) for request, limit in zip(requests, limits, strict=True)]


def right_pad(rows, device):
    """Lists of ids -> one tensor (rows, T), padded with id 0 on the right. T: see `padded_length`."""
    T = padded_length(max(len(row) for row in rows), device)
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    for padded, row in zip(ids, rows, strict=True):
        padded[:len(row)] = torch.tensor(row)
    return ids.to(device)


def collect(requests, n, answers, device):
    """Answers in any order, (index of the request, ids, stopped) each -> Rollout in the requests' order."""
    texts = [prompt for prompt, _, _ in requests]
    prompt_len = [len(prompt) for prompt in texts]
    resp_len = [0] * len(texts)
    stopped = [False] * len(texts)
    for index, ids, ended in answers:
        texts[index] = texts[index] + ids
        resp_len[index] = len(ids)
        stopped[index] = ended

    columns = [torch.tensor(values, device=device) for values in (prompt_len, resp_len, stopped)]
    prompt_index = torch.arange(len(texts), device=device) // n
    return Rollout(right_pad(texts, device), *columns, prompt_index)
