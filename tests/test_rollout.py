"""The sampler: cached equals naive, both equal an independent sampler in plain Python, no answer depends on
its neighbours, and the distribution is exact."""
import gc
import math
import weakref

import pytest
import torch
from conftest import tiny_model, with_random_vectors

import rollout
from kernels.decode_sampling import distribution, pick, stream_keys, uniform
from model import FAMILIES, Cache, Model, onednn_runs
from rollout import Request, Sampling, Slots, naive, sample, stream
from studies.measure import Waits

PROMPTS = [[1, 5, 9], [2, 3, 4, 5, 6, 7, 8, 9], [3], [10, 11, 12, 13, 14], [4, 4, 4, 4]]
HOW = dict(max_new_tokens=12, stop=[0, 2, 5], seed=3, step=7)


def same(a, b):
    """Two rollouts, field by field."""
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def requests_of(n):
    """n requests for each of PROMPTS, as `stream` takes them."""
    return [(prompt, i, k) for i, prompt in enumerate(PROMPTS) for k in range(n)]


# ---- an independent sampler -------------------------------------------------------------------

def splitmix(z):
    """Splitmix64's output function on a Python integer."""
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9 % 2**64
    z = (z ^ z >> 27) * 0x94d049bb133111eb % 2**64
    return z ^ z >> 31


def draw_by_hand(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Logits, a list -> the token at u, in Python floats. No boundary lies so near that float32 could decide
    otherwise, on whatever machine."""
    if temperature == 0:
        return max(range(len(logits)), key=lambda i: logits[i])
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -weights[i])
    ranked = ranked[:top_k] if top_k else ranked
    total = sum(weights[i] for i in ranked)
    kept = []
    for i in ranked:
        before = sum(weights[j] for j in kept) / total
        assert abs(before - top_p) > 1e-5 or top_p == 1
        if before < top_p:
            kept.append(i)
    total = sum(weights[i] for i in kept)
    mass = 0.0
    for i in sorted(kept):
        mass += weights[i] / total
        assert abs(mass - u) > 1e-5 or i == max(kept), 'choose another seed'
        if mass > u:
            return i
    return max(kept)


def answer_by_hand(model, prompt, numbers, *, max_new_tokens, stop, vocab=None, **how):
    """numbers: seed, step, prompt number, sample number -> ids, ended by a stop token?"""
    golden = 0x9e3779b97f4a7c15
    key = 0
    for number in numbers:
        key = splitmix((key + golden) % 2**64 ^ number % 2**64)
    answer = []
    for position in range(max_new_tokens):
        u = (splitmix((key + (position + 1) * golden) % 2**64) >> 11) / 2**53
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]))[0, -1, :vocab].tolist()
        answer.append(draw_by_hand(logits, u, **how))
        if answer[-1] in stop:
            return answer, True
    return answer, False


@pytest.mark.parametrize('change', [
    dict(seed=4), dict(step=-1), dict(which=[3, 0, 9, 10**12, 1]), dict(temperature=0.5),
    dict(temperature=0.0), dict(top_k=3), dict(top_p=0.5), dict(vocab=15), dict(stop=[7, 30]),
    dict(max_new_tokens=5),
    dict(seed=-8, step=2, which=[5, 4, 3, 2, 1], temperature=1.7, top_k=9, top_p=0.8, vocab=30, stop=[1])])
def test_every_setting_of_a_call_reaches_the_token(change):
    """seed, step, which, temperature, top_k, top_p, vocab or stop taken and then ignored, by `sample` or by
    `naive`: each of them changes the answers, and into those of a sampler in plain Python."""
    model = tiny_model()
    how = HOW | change
    roll = sample(model, PROMPTS, 2, **how)
    ended = roll.stopped.tolist()
    which = how.pop('which', range(len(PROMPTS)))
    seed = how.pop('seed')
    step = how.pop('step')
    expected = []
    for prompt, number in zip(PROMPTS, which, strict=True):
        for k in range(2):
            expected.append(answer_by_hand(model, prompt, (seed, step, number, k), **how))
    assert list(zip(roll.answers(), ended, strict=True)) == expected
    assert same(roll, naive(model, PROMPTS, 2, **HOW | change))
    assert roll.answers() != sample(model, PROMPTS, 2, **HOW).answers()


@pytest.mark.parametrize('family', FAMILIES)
def test_a_decode_step_has_every_weight_where_a_forward_has_it(family):
    """`Block.decode` is written apart from `Block.forward`: a norm that is taken for the other, a bias left out."""
    model = with_random_vectors(tiny_model(family=family)).double()
    ids = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(0))
    cache = Cache(model.config, 3, 16, 'cpu', torch.float64)
    with torch.no_grad():
        want = model(ids)[:, -1]
        model(ids[:, :8], cache)
        cache.length = torch.full((3,), 8)
        cache.longest = 8
        got = model(ids[:, 8:], cache)[:, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_an_unknown_setting_is_an_error():
    """`top_n` would otherwise be no limit at all."""
    for sampler in (sample, naive):
        with pytest.raises(TypeError, match='top_n'):
            sampler(tiny_model(), PROMPTS, **HOW, top_n=3)


# ---- cached equals naive ----------------------------------------------------------------------

@pytest.mark.parametrize('how', [{}, {'temperature': 0.0}, {'temperature': 0.6, 'top_k': 5},
                                 {'temperature': 1.3, 'top_p': 0.8}])
def test_cached_equals_naive(how):
    """Same tokens, lengths and finish reasons; rows stop at different times and leave the batch."""
    model = tiny_model()
    fast, slow = sample(model, PROMPTS, 3, **HOW, **how), naive(model, PROMPTS, 3, **HOW, **how)
    assert same(fast, slow)
    if not how:
        assert fast.stopped.any() and not fast.stopped.all() and len(set(fast.resp_len.tolist())) > 3


@pytest.mark.parametrize('rows, budget', [(1, 1), (2, 9), (4, 10**6), (7, 20), (99, 10**6)])
def test_slots_are_refilled(rows, budget):
    """However few slots there are: the same answers as all at once, each yielded as it ends; never more
    forwards than one after the other; prompts read once per prefill, in pieces of `budget`."""
    model, n = tiny_model(), 4
    whole = sample(model, PROMPTS, n, **HOW)
    requests = requests_of(n)
    calls = []
    model.embed.register_forward_pre_hook(lambda m, args: calls.append(tuple(args[0].shape)))
    got = list(stream(model, requests, rows=rows, budget=budget, **HOW))
    assert sorted(i for i, *_ in got) == list(range(len(requests)))
    assert all((ids, end) == (whole.answers()[i], bool(whole.stopped[i])) for i, ids, end in got)
    decoding = [B for B, T in calls if T == 1 and B > 0]
    pieces = n * sum(map(len, PROMPTS)) * (budget == 1)      # of one token, so they look like decoding
    assert max(B for B, _ in calls) <= max(rows, len(PROMPTS))
    assert len(decoding) <= whole.resp_len.sum() + pieces
    assert max(B * T for B, T in calls if T > 1 or budget == 1) <= max(budget, rows)     # pieces of a prompt
    if rows == 4:                            # fewer steps than in batches of four, one after the other
        batches = [int(whole.resp_len[i:i + 4].max()) for i in range(0, len(requests), 4)]
        assert len([1 for B, T in calls if T == 1]) < sum(batches)


@pytest.mark.parametrize('limit', [1, 2, 3, 5, 12, 16, 17])
@pytest.mark.parametrize('rows', [1, 3, 99])
def test_polling_every_16_tokens_changes_no_answer(rows, limit):
    """As on a GPU, where finished rows run on until the next poll: the same answers, nothing out of range;
    a stop token first; no stop tokens; equal prompts that are two objects."""
    model = tiny_model()
    requests = [(list(p) if k else p, i, k) for i, p in enumerate(PROMPTS) for k in range(3)]
    for stop in ([0, 2, 5], [], list(range(0, 37, 2))):
        how = HOW | dict(max_new_tokens=limit, stop=stop)
        want = naive(model, PROMPTS, 3, **how)
        got = {i: (ids, end) for i, ids, end in stream(model, requests, rows=rows, poll_every=16, **how)}
        assert [got[i] for i in range(15)] == list(zip(want.answers(), want.stopped.tolist(), strict=True))


def test_a_limit_for_each_request():
    """A list of max_new_tokens: each answer is the beginning of the one it would have been."""
    model, most = tiny_model(), [3, 12, 1, 7, 12]
    whole = sample(model, PROMPTS, **HOW).answers()
    got = sample(model, PROMPTS, **HOW | {'max_new_tokens': most})
    assert got.answers() == [a[:n] for a, n in zip(whole, most, strict=True)]
    assert same(got, naive(model, PROMPTS, **HOW | {'max_new_tokens': most}))


@pytest.mark.parametrize('poll_every', [1, 5])
def test_a_cache_grows(poll_every, monkeypatch):
    """From hardly any room to the longest answer: the same answers, and never much more room than is used."""
    model, how = tiny_model(), HOW | dict(max_new_tokens=40, stop=[0])
    want = sample(model, PROMPTS, 2, **how)
    rooms, change = [], rollout.Cache.change
    monkeypatch.setattr(rollout, 'ROOM', 2)

    def record_room(cache, new):
        change(cache, new)
        rooms.append(cache.room)
    monkeypatch.setattr(rollout.Cache, 'change', record_room)
    got = {i: ids for i, ids, _ in stream(model, requests_of(2), rows=4, poll_every=poll_every, **how)}
    assert [got[i] for i in range(10)] == want.answers() and len(set(rooms)) > 2
    assert max(rooms) <= min(48, 1.5 * (want.length.max() + poll_every))


@pytest.mark.parametrize('how', [{}, {'temperature': 0.0}, {'top_k': 3, 'top_p': 0.9}])
def test_a_step_can_be_a_cuda_graph(how):
    """It looks at no value and its tensors keep their storage; that is all a recording needs."""
    model = tiny_model().requires_grad_(False)
    slots = Slots(model, 3, 8, 40, 99, Sampling(stop=[0], vocab=30, **how))
    slots.prefill([0, 1, 2], [Request(p, i, 0, 12) for i, p in enumerate(PROMPTS[:3])])

    def storages():
        held = [*vars(slots).values(), *slots.cache.kv, slots.cache.length]
        return [t.data_ptr() for t in held if torch.is_tensor(t)]
    before = storages()
    slots.reserve(8, 20)
    with torch.no_grad(), Waits() as waits:
        slots.decode(20)
    assert waits.count == 0 and storages() == before and len(before) > 10
    assert (slots.count.tolist(), slots.done.all()) != ([1, 1, 1], False)
    with Waits() as waits:
        slots.poll()
    assert waits.count == 1                  # and the watch does see one


@pytest.mark.skipif(not onednn_runs(torch.zeros(1)), reason='oneDNN is not built for this processor')
def test_packed_weights_write_the_naive_answers_and_follow_an_update(monkeypatch):
    """A copy that outlives its call would answer with the weights before the update."""
    monkeypatch.setattr('model.PACKED_FROM', 1)
    multiplied = []
    real_packed = Model.packed
    monkeypatch.setattr(Model, 'packed', lambda self: multiplied.append(real_packed(self)) or multiplied[-1])
    model = tiny_model()
    before = sample(model, PROMPTS, 2, **HOW)
    assert same(before, naive(model, PROMPTS, 2, **HOW))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    after = sample(model, PROMPTS, 2, **HOW)
    assert same(after, naive(model, PROMPTS, 2, **HOW)) and not same(before, after)
    assert len(multiplied) == 2 and all(twin is not model and twin.head.packed_weight is not None for twin in multiplied)


def test_the_host_polls_once_in_32_tokens():
    """Waits for the device as a GPU run would have them, an answer's own retrieval included: at most one in
    16 tokens."""
    model, steps = tiny_model(context=300), []
    model.embed.register_forward_pre_hook(lambda m, args: steps.append(1))
    with Waits() as waits:
        answers = list(stream(model, requests_of(1), rows=5, max_new_tokens=200, stop=[], poll_every=32))
    assert len(answers) == 5 and 200 <= len(steps) < 240 and 0 < waits.count <= len(steps) / 16


def test_the_cache_goes_with_the_rollout(monkeypatch):
    """Its memory is the update's next: nothing may keep it until Python's collector comes by."""
    caches, init = [], rollout.Cache.__init__

    def remember(cache, *args, **how):
        init(cache, *args, **how)
        caches.append(weakref.ref(cache))
    monkeypatch.setattr(rollout.Cache, '__init__', remember)
    gc.disable()
    try:
        sample(tiny_model(), PROMPTS, **HOW)
        assert caches and not any(ref() for ref in caches)
    finally:
        gc.enable()


def test_replay_runs_records_then_replays(monkeypatch):
    """A recorded step does not run; every call is exactly one step, the first eagerly."""
    did = []

    class Graph:
        def replay(self):
            did.append('replayed')

    class Recording:
        def __init__(self, graph):
            pass

        def __enter__(self):
            did.append('recording')

        def __exit__(self, *_):
            assert did.pop() == 'ran' and did[-1] == 'recording'             # recorded, not run

    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'graph', Recording)
    replay = rollout.Replay()
    for _ in range(4):
        replay(lambda: did.append('ran'))
    assert did == ['ran', 'recording', 'replayed', 'replayed', 'replayed']


LONGROPE = dict(rope_type='longrope', short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 3.0, 9.0],
                original_max_position_embeddings=12)


def longrope_model():
    """Larger weights than usual, so that attention, and with it the rotation, decides most tokens."""
    model = tiny_model(family='phi3', rope=LONGROPE)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 4
            block.attn.out.weight *= 4
    return model


@pytest.mark.parametrize('rows, budget', [(1, 10**6), (3, 4), (99, 10**6)])
def test_longrope_reads_a_prompt_with_the_frequencies_of_the_whole_answer(rows, budget, monkeypatch):
    """The prompts end within the original context of 12 tokens, their answers do not. The frequencies of the
    piece that is read, of the prompt, or of the room that the cache has before it grows would be the short
    ones; those of the longest text to come are the long ones, for which `naive` must be told `reach`."""
    monkeypatch.setattr(rollout, 'ROOM', 2)
    how = HOW | dict(max_new_tokens=20, stop=[])
    told, untold = longrope_model(), longrope_model()
    told.max_length = max(map(len, PROMPTS)) + 20
    want = naive(told, PROMPTS, 2, **how).answers()
    got = {i: ids for i, ids, _ in stream(untold, requests_of(2), rows=rows, budget=budget, **how)}
    assert [got[i] for i in range(10)] == want
    short = naive(untold, PROMPTS, 2, **how).answers()
    changed = [i for i in range(10) if short[i] != want[i]]
    assert len(changed) >= 4, changed        # or the test could not fail


def test_longrope_within_the_original_context_has_the_short_frequencies():
    """Long ones from the start would be those of another model; and a `reach` beyond decides for all."""
    model = longrope_model()
    how = HOW | dict(max_new_tokens=4, stop=[])
    short = sample(model, PROMPTS, 2, **how)
    assert same(short, naive(model, PROMPTS, 2, **how))
    model.max_length = 13
    long = sample(model, PROMPTS, 2, **how)
    assert same(long, naive(model, PROMPTS, 2, **how)) and long.answers() != short.answers()


def test_a_stop_token_at_the_greatest_length_counts_as_stopped():
    """An answer can end for both reasons at once; one token earlier it is cut."""
    model = tiny_model()
    whole = sample(model, PROMPTS, 3, **HOW)
    ended = [b for b, stopped in enumerate(whole.stopped.tolist()) if stopped and whole.resp_len[b] > 1]
    lengths = whole.resp_len.tolist()
    exact = sample(model, PROMPTS, 3, **HOW | dict(max_new_tokens=lengths))
    assert len(ended) > 2 and same(exact, whole)
    assert same(exact, naive(model, PROMPTS, 3, **HOW | dict(max_new_tokens=lengths)))
    for b in ended:
        lengths[b] -= 1
    cut = sample(model, PROMPTS, 3, **HOW | dict(max_new_tokens=lengths))
    for b in ended:
        assert not cut.stopped[b] and cut.answers()[b] == whole.answers()[b][:-1]


def test_an_answer_does_not_depend_on_its_neighbours():
    """Alone, in another order, or on another rank: prompt number and sample number decide. In float32; in
    bfloat16 the logits of a row change with the shape of the batch."""
    model = tiny_model()
    whole = sample(model, PROMPTS, 4, **HOW)
    for which in ([3], [4, 1], [2, 0, 3, 1]):
        part = sample(model, [PROMPTS[i] for i in which], 4, which=which, **HOW)
        for j, i in enumerate(which):
            assert part.answers()[4 * j:4 * j + 4] == whole.answers()[4 * i:4 * i + 4]
    fewer = sample(model, PROMPTS, 2, **HOW)
    assert fewer.answers()[2:4] == whole.answers()[4:6]      # n changes nothing either


def test_rollout_fields():
    """Prompt kept, padding 0, the stop token counted and last, cut answers exactly max_new_tokens."""
    roll = sample(tiny_model(), PROMPTS, 2, **HOW)
    for b, (prompt, answer) in enumerate(zip(roll.prompt.tolist(), roll.answers(), strict=True)):
        assert roll.ids[b, :roll.prompt_len[b]].tolist() == PROMPTS[prompt]
        assert not roll.ids[b, roll.length[b]:].any() and len(answer) == roll.resp_len[b] >= 1
        assert (answer[-1] in HOW['stop']) == bool(roll.stopped[b])
        assert not set(answer[:-1]) & set(HOW['stop'])
        assert roll.stopped[b] or len(answer) == 12
    assert roll.ids.shape[1] == roll.length.max()


def test_seed_step_prompt_sample_and_position_all_matter():
    p, s = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    keys = torch.cat([stream_keys(seed, step, p, s) for seed in (0, 1) for step in (-1, 0, 1)])
    u = torch.cat([uniform(keys, t) for t in range(50)])
    assert len(u.unique()) == len(u) == 24 * 50


def test_splitmix_known_answers():
    """Published splitmix64: seed 1234567 gives 6457827717110365317, 3203168211198807973, ..."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = [int(uniform(torch.tensor([1234567]), t).item() * 2**53) for t in range(4)]
    assert got == [w >> 11 for w in want]


def test_uniform_is_uniform():
    """Over samples and over positions: mean, variance and a chi-squared over 64 bins."""
    keys = stream_keys(0, 1, torch.zeros(4000, dtype=torch.long), torch.arange(4000))
    u = torch.stack([uniform(keys, t) for t in range(16)])
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    counts = torch.histc(u.flatten(), 64, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 120         # 63 degrees of freedom: p < 1e-5 beyond


@pytest.mark.parametrize('how', [dict(), dict(temperature=0.5), dict(top_k=4), dict(top_p=0.7),
                                 dict(temperature=1.5, top_k=6, top_p=0.8)])
def test_sampled_frequencies_match_the_distribution(how):
    """Chi-squared of 40,000 draws against brute force in Python floats."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(2)) * 2
    weights = [2.718281828459045 ** (x / how.get('temperature', 1.0)) for x in logits.tolist()]
    ranked = sorted(range(11), key=lambda i: -weights[i])[:how.get('top_k', 11)]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if mass / total < how.get('top_p', 1.0):
            kept.append(i)
            mass += weights[i]
    want = torch.tensor([weights[i] / mass if i in kept else 0.0 for i in range(11)])
    p = distribution(logits[None], **how)[0]
    assert (p / p.sum() - want).abs().max() < 1e-6
    keys = stream_keys(5, 0, torch.zeros(40_000, dtype=torch.long), torch.arange(40_000))
    draws = pick(logits.expand(40_000, -1), uniform(keys, 0), **how)
    counts = torch.bincount(draws, minlength=11).double()
    assert counts[want == 0].sum() == 0
    chi = ((counts - 40_000 * want) ** 2 / (40_000 * want))[want > 0].sum()
    assert chi < 40                                          # at most 10 degrees of freedom


@pytest.mark.parametrize('how', [{}, {'temperature': 0.3}, {'top_k': 50}, {'top_p': 0.5}])
@pytest.mark.parametrize('V', [4097, 5120, 50_000])
def test_two_stages_invert_the_same_distribution(V, how):
    """A block of 512, then a token of it, against one cumulative sum; both ends of [0, 1), many between."""
    g = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(6, V, generator=g)
    logits[0, :V // 2], logits[1, V // 2:], logits[2, 600:] = -1e9, -1e9, -1e9           # blocks without mass
    mass = distribution(logits, **how).double().cumsum(-1)
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for u in torch.cat([ends[:, None].expand(4, 6), torch.rand(30, 6, generator=g, dtype=torch.float64)]):
        token = pick(logits, u, **how)
        below_total = mass[:, -1:] * (1 - 1e-15)
        want = torch.searchsorted(mass, (u[:, None] * mass[:, -1:]).clamp(max=below_total), right=True)
        before, after = (mass.gather(-1, t[:, None]) for t in ((token - 1).clamp(min=0), token))
        x = u[:, None] * mass[:, -1:]
        assert (token == want.squeeze(-1)).all() or ((before - 1e-12 < x) & (x < after + 1e-12)).all()
        assert (distribution(logits, **how).gather(-1, token[:, None]) > 0).all()


def test_no_draw_lands_on_a_forbidden_token():
    """u just below 1 with a tail of zero mass: an fp32 sum that ends below 1 would pick the last token."""
    logits = torch.cat([torch.zeros(150_000), torch.full((936,), -1e9)])[None]
    assert pick(logits, torch.tensor([1 - 2.0**-53], dtype=torch.float64)) == 149_999
    assert pick(logits, torch.tensor([0.0], dtype=torch.float64)) == 0
    assert pick(logits * float('nan'), torch.tensor([0.5], dtype=torch.float64)) < logits.shape[-1]


def test_padding_of_the_embedding_is_never_sampled():
    """Rows beyond the tokenizer (151,936 against 151,665) stand for no text."""
    roll = sample(tiny_model(), PROMPTS, 20, **HOW, temperature=5.0, vocab=15)
    assert max(max(a) for a in roll.answers()) == 14
    greedy = sample(tiny_model(), PROMPTS, **HOW, temperature=0.0, vocab=15)
    assert max(max(a) for a in greedy.answers()) <= 14


def test_bfloat16_model_samples():
    """The cache takes the model's dtype; a float32 cache would fail or cost double."""
    roll = sample(tiny_model().bfloat16(), PROMPTS, 2, **HOW)
    assert roll.resp_len.min() >= 1
