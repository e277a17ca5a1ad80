"""
The CUDA path on a machine without a GPU: sampling, every objective, training, bridge and evaluation on a device that is
computed on the CPU (emulated_cuda.py), and mistakes of each kind that it must notice.
"""
import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import Products, argv, byte_loss, for_script, log_of, opd_loss
from cuda_cases import (
    GRADIENTS,
    HOW,
    PROMPTS,
    SAMPLING,
    assert_same_gradient,
    cuda_model,
    device_answers,
    gradient,
    plain_answers,
    plain_answers_of_limits,
    refilled_answers,
)

import bridge
import distill
import eval_math
import kernels
import rollout
import step
from configs import load_config
from cross_tokenizer.next_byte import ByteTable
from model import Attention, Cache
from output_losses import add_product, log_probs
from rollout import Sampling, Slots, naive, numbered, sample, with_limits
from support.checkpoints import require_finite, tensors
from support.files import read_json
from support.optimizer import adamw, share_below_eps
from support.runtime import UserError

pytest.importorskip('triton')
from emulated_cuda import CUDA, CudaError, emulated_cuda  # noqa: E402


@pytest.fixture
def cuda():
    with emulated_cuda() as device:
        yield device


# ---- sampling ------------------------------------------------------------------------------------

LONG = dict(max_new_tokens=[90 - 5 * i for i in range(15)], stop=[])


@pytest.mark.parametrize('room, shape, how', SAMPLING)
def test_sampling_equals_naive(room, shape, how):
    """A graph that replays stale addresses, lengths or random numbers; a wait or a copy in a decode step."""
    want = plain_answers(shape, how)
    with emulated_cuda() as cuda:
        assert device_answers(CUDA, room, shape, how) == want
    assert cuda.count['replay'] > cuda.count['graph'] >= 1 and cuda.count['attend']
    assert not cuda.waits('decode') and not cuda.uploads('decode')


def test_every_growth_of_the_cache_and_every_smaller_batch_has_a_graph_of_its_own(monkeypatch):
    """One graph for all would replay on memory that is not the cache any more."""
    resets, growths = [], []
    monkeypatch.setattr(Slots, 'reset_graph', noting(resets, Slots.reset_graph))
    monkeypatch.setattr(Cache, 'grow', noting(growths, Cache.grow))
    want = plain_answers({}, LONG)
    with emulated_cuda() as cuda:
        assert device_answers(CUDA, 2, {}, LONG) == want
    assert len(growths) > 1 and len(resets) > 1 + len(growths) and cuda.count['graph'] > 2


@pytest.mark.parametrize('rows', [2, 5])
def test_refilled_slots_equal_naive(rows):
    """A graph that is replayed for a slot whose answer is another one by now."""
    want = plain_answers_of_limits()
    with emulated_cuda() as cuda:
        assert refilled_answers(CUDA, rows) == want
    assert cuda.count['replay']


def noting(made, function):
    """The function, which also appends its arguments to a list."""
    def noted(*args, **kwargs):
        made.append(args)
        return function(*args, **kwargs)
    return noted


# ---- one step of every objective -------------------------------------------------------------------

@pytest.mark.parametrize('how', GRADIENTS, ids=str)
def test_the_gradient_is_the_cpu_s(how):
    """A tensor on the wrong device, in the forward or in the backward; a kernel that is given what it cannot read."""
    want = gradient('cpu', **how)
    with emulated_cuda() as cuda:
        got = gradient(CUDA, **how)
    assert_same_gradient(want, got)
    assert cuda.count['launch'] or not how.get('oprd_weight', 1)


def test_products_under_the_head_take_bfloat16(cuda):
    """On CUDA a product of bf16 factors is summed in float32. A CPU has no such product, so no other test calls it."""
    h, W = torch.randn(6, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    G = torch.randn(6, 9)
    got = log_probs(h.to(CUDA), W[:9].to(CUDA), 0.7)
    want = (h.float() @ W[:9].float().t() / 0.7).log_softmax(-1)
    assert got.is_cuda and got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), want)
    d_W = torch.zeros(11, 8, device=CUDA)
    add_product(d_W[:9], G.to(CUDA), h.to(CUDA), 0.5)
    torch.testing.assert_close(d_W[:9].cpu(), 0.5 * G.bfloat16().float().t() @ h.float())


@contextmanager
def noted_lengths():
    """The lengths of the sequences that attention sees meanwhile: (without a cache, and in a prefill)."""
    forward, lengths = Attention.forward, (set(), set())

    def noted(attention, x, rope, cache=None, layer=0, watch=None):
        lengths[cache is not None].add(x.shape[1])
        return forward(attention, x, rope, cache, layer, watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, 'forward', noted)
        yield lengths


LENGTHS = dict(lengths=((5, 40), (9, 125), (3, 260)), budget=400)


@pytest.mark.parametrize('how', [dict(), dict(opd=dict(kind='full')), dict(bridge=True), dict(drift=True)], ids=str)
def test_lengths_are_rounded_up_and_the_gradient_is_the_cpu_s(how):
    """Every length that attention has not seen costs the plan of a kernel on CUDA, and the lengths of answers never repeat.
    A CPU computes no padding beyond the longest answer of a micro-batch."""
    with noted_lengths() as (lengths, _):
        want = gradient('cpu', **LENGTHS, **how)
    assert lengths == {263, 134}             # the answers of 134 and 45 tokens share a micro-batch
    with emulated_cuda(), noted_lengths() as (lengths, _):
        got = gradient(CUDA, **LENGTHS, **how)
    assert lengths == {384, 256, 128}        # two of 256 tokens would be more than the budget
    assert_same_gradient(want, got, 3 * 2 * (350 + 384) + 75)


def test_lengths_that_are_not_rounded_are_noticed(cuda, monkeypatch):
    """The test above, without the rounding."""
    monkeypatch.setattr(rollout, 'padded_length', lambda T, device: T)
    monkeypatch.setattr(step, 'padded_length', lambda T, device: T)
    with noted_lengths() as (lengths, _):
        gradient(CUDA, **LENGTHS)
    assert lengths == {263, 134}


@pytest.mark.parametrize('new, length', [(300, 128), (100, 108)])
def test_prompts_are_read_at_rounded_lengths(cuda, new, length):
    """As far as the cache has room: it has room for a prompt of 8 tokens and an answer, and for no more. The first token of
    every answer is the plain sampler's."""
    want = naive(cuda_model(), PROMPTS, 2, max_new_tokens=1, **HOW).answers()
    requests = with_limits(numbered(PROMPTS, 2, None, None), new)
    slots = Slots(cuda_model().to(CUDA), 10, 8, 8 + new, 32768, Sampling(**HOW))
    with noted_lengths() as (_, lengths):
        slots.prefill(list(range(10)), requests)
    assert lengths == {length} and slots.ids[:, :1].tolist() == want


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', ['full', 'topk', 'sampled', 'supervised', 'byte', None])
def test_matrices_under_the_head_have_aligned_rows(cuda, kind, dtype):
    """The products of CUDA with a vocabulary of 301 and padding, or none (the teacher): no tensor core takes rows that begin
    at odd addresses."""
    g = torch.Generator().manual_seed(0)
    h, W, h_t, W_t = (torch.randn(n, 16, generator=g).to(CUDA, dtype) for n in (11, 304, 22, 301))
    h.requires_grad_()
    W.requires_grad_()
    w = torch.rand(11, generator=g).to(CUDA)
    with Products() as products:
        if kind == 'byte':
            table = ByteTable([bytes([i % 256]) for i in range(301)], [3], 301, CUDA)
            inside = torch.zeros(11, dtype=torch.bool, device=CUDA)
            loss, _ = byte_loss(h, W, h_t, W_t, w, [b'a'] * 11, inside, table_s=table, table_t=table, chunk=4)
        else:
            loss, _ = opd_loss(h, W, h_t[:11], W_t, torch.arange(11, device=CUDA), w, kind=kind, vocab=301, chunk=4)
        if kind:
            loss.backward()
            assert W.grad[:301].any() and not W.grad[301:].any()
    assert 'mm' in products.names and 'bmm' not in products.names and not products.unaligned


# ---- waits of the host -----------------------------------------------------------------------------

def trained(device):
    """A model and its optimizer after one step."""
    model = cuda_model().to(device)
    opt = adamw(model, 1e-3, (0.9, 0.5), 1e-2, 0.0)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=g) / 100).to(device)
    opt.step()
    return model, opt


def test_a_look_at_the_optimizer_waits_twice_and_a_save_once():
    """For every tensor the host stood still, up to three times, until the device had done all its work."""
    want = share_below_eps(trained('cpu')[1])
    with emulated_cuda() as cuda:
        model, opt = trained(CUDA)
        assert share_below_eps(opt) == want and 0 < want < 1
        assert len(cuda.waits('share_below_eps')) == 2
        state = tensors(model, opt)
        require_finite(None, 1, state)
        assert len(cuda.waits('require_finite')) == 1
        state['exp_avg.norm.weight'][3] = float('nan')
        with pytest.raises(UserError, match='exp_avg.norm.weight holds NaN'):
            require_finite(SimpleNamespace(out='run'), 1, state)


# ---- whole commands --------------------------------------------------------------------------------

def assert_same_run(out):
    """The log of a run on the device equals the CPU's, but for times and the device's memory."""
    logs = log_of(out / 'cpu'), log_of(out / 'cuda')
    assert len(logs[0]) == len(logs[1]) > 1
    for on_cpu, on_cuda in zip(*logs, strict=True):
        for name, value in on_cpu.items():
            if not name.startswith(('time/', 'elapsed')):
                assert on_cuda[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert set(on_cuda) - set(on_cpu) <= {'mem/peak', 'mem/update_dpeak'}


@pytest.mark.parametrize('keys', [
    dict(positions='last_k', last_k=5, rep_loss='cosine', checkpointing=True, token_budget=60),
    dict(opd='topk', opd_weight=0.5, head_rows=8, diagnose_every=1),
], ids=str)
def test_a_run_equals_the_cpu_s(toy_dir, tmp_path, keys):
    """distill.py from its command line to its checkpoint, with both terms, evaluations and diagnoses."""
    keys = dict(steps=2, dtype='float32') | keys
    distill.main(load_config(argv(toy_dir, tmp_path / 'cpu', device='cpu', **keys)))
    with emulated_cuda() as cuda, noted_lengths() as (lengths, _):
        distill.main(load_config(argv(toy_dir, tmp_path / 'cuda', device='cuda', **keys)))
    assert_same_run(tmp_path)
    assert lengths == {128}
    assert cuda.count['graph'] and cuda.count['layer_rows_kernel'] and not cuda.waits('decode')


def test_a_run_in_bfloat16_goes_on_from_its_checkpoint(toy_dir, tmp_path):
    """The default on CUDA; a checkpoint is read back to the device."""
    keys = dict(opd='full', oprd_weight=0, opd_weight=1, opd_k=4, eval_data='', save_every=1, device='cuda')
    with emulated_cuda():
        distill.main(load_config(argv(toy_dir, tmp_path / 'r', steps=1, **keys)))
        distill.main(load_config(argv(toy_dir, tmp_path / 'r', steps=2, **keys)))
    rows = log_of(tmp_path / 'r')
    assert [row['step'] for row in rows] == [0, 1, 2] and rows[2]['loss'] > 0


def test_a_bridge_and_a_run_through_it(toy_dir, tmp_path):
    """Stage 1 and stage 2 with a teacher of another width, depth and vocabulary, whose bytes are matched as well."""
    unlike = dict(toy_teacher_layers=4, toy_teacher_width=32, toy_teacher_tokens='merged', bridge_prompts=30, dtype='float32',
                  token_budget=200, eval_data='')
    figures = {}
    for device in ('cpu', 'cuda'):
        keys = unlike | dict(device=device, bridge=tmp_path / f'bridge_{device}')
        run = keys | dict(opd='byte', opd_weight=0.5, steps=2, bridge_rank=8, head_rows=8)

        def both(keys=keys, run=run, device=device):
            bridge.main(load_config(argv(toy_dir, 'unused', **keys)))
            distill.main(load_config(argv(toy_dir, tmp_path / device, **run)))
        if device == 'cpu':
            both()
        else:
            with emulated_cuda() as cuda, noted_lengths() as (lengths, _):
                both()
            assert lengths == {128}          # of both models, whose tokens are not the same
        figures[device] = read_json(tmp_path / f'bridge_{device}/bridge.json')['layers']
    assert_same_run(tmp_path)
    assert cuda.count['bridge_rows_kernel'] and cuda.count['bridge_back_kernel']
    for layer, on_cpu in figures['cpu'].items():
        assert figures['cuda'][layer]['cos'] == pytest.approx(on_cpu['cos'], rel=1e-3)


def test_an_evaluation_equals_the_cpu_s(toy_dir, tmp_path, monkeypatch):
    """eval_math.py, with fewer slots than answers."""
    monkeypatch.chdir(tmp_path)
    results = {}
    for device in ('cpu', 'cuda'):
        keys = dict(eval_n=4, eval_rows=5, eval_max_new_tokens=20, device=device, dtype='float32')
        arguments = for_script('eval_math.py', argv(toy_dir, 'unused', **keys))
        if device == 'cpu':
            eval_math.main(load_config(arguments, script='eval_math.py'))
        else:
            with emulated_cuda() as cuda:
                eval_math.main(load_config(arguments, script='eval_math.py'))
        for file in tmp_path.glob('out/eval/*/samples.jsonl'):
            results[device] = file.read_bytes()
            file.parent.rename(tmp_path / device)
    assert results['cpu'] == results['cuda'] and cuda.count['replay']


# ---- mistakes that must be noticed -----------------------------------------------------------------

def sample_15():
    return sample(cuda_model().to(CUDA), PROMPTS, 3, max_new_tokens=20, stop=[0], seed=3, step=7)


def broken(monkeypatch, name, change):
    """Slots whose function `name` is followed by a change of the slots."""
    function = getattr(Slots, name)

    def broken_function(slots, *args, **kwargs):
        result = function(slots, *args, **kwargs)
        change(slots)
        return result
    monkeypatch.setattr(Slots, name, broken_function)


def test_an_index_on_the_host_is_noticed(cuda, monkeypatch):
    """A kernel would read another address than it means."""
    broken(monkeypatch, '__init__', lambda slots: setattr(slots, 'all_slots', torch.arange(len(slots.ids))))
    with pytest.raises(CudaError, match='draw_token: slots .* is on the host'):
        sample_15()


def test_a_wait_in_a_decode_step_is_noticed(cuda, monkeypatch):
    """The host would stand still once a token."""
    broken(monkeypatch, 'decode_step', lambda slots: bool(slots.done.all()))
    with pytest.raises(CudaError, match='a wait in a recording'):
        sample_15()
    assert cuda.waits('broken_function')     # of the first step, which is not recorded


def test_a_copy_from_the_host_in_a_decode_step_is_noticed(cuda, monkeypatch):
    broken(monkeypatch, 'decode_step', lambda slots: slots.tensor([1, 2]))
    with pytest.raises(CudaError, match='a copy from the host in a recording'):
        sample_15()


@pytest.mark.parametrize('reset_by', ['reserve', 'compact'])
def test_a_graph_of_the_old_memory_is_noticed(cuda, monkeypatch, reset_by):
    """A cache that has grown, or a smaller batch, with the graph of before: it would read and write freed memory."""
    monkeypatch.setattr(rollout, 'ROOM', 2 if reset_by == 'reserve' else 1024)
    reset = Slots.reset_graph

    def forgotten(slots):
        if inspect.stack()[1].function != reset_by:
            reset(slots)
    monkeypatch.setattr(Slots, 'reset_graph', forgotten)
    with pytest.raises(CudaError, match='whose memory was freed'):
        sample(cuda_model().to(CUDA), PROMPTS, 3, **LONG)


def test_a_kernel_that_is_compiled_in_a_recording_is_noticed(cuda, monkeypatch):
    """A step that was not run before it is recorded."""
    replay = rollout.Replay.__init__

    def never_warm(self):
        replay(self)
        self.warm = True
    monkeypatch.setattr(rollout.Replay, '__init__', never_warm)
    with pytest.raises(CudaError, match='norm_product_kernel: compiled in a recording'):
        sample_15()


def on_cuda(*shape):
    return torch.rand(shape, device=CUDA)


@pytest.mark.parametrize('mix', [
    lambda x: x + torch.ones(3),
    lambda x: x.gather(0, torch.tensor([1])),
    lambda x: x.index_add(0, torch.tensor([1]), x[:1]),
    lambda x: torch.stack([x[0], torch.tensor(1.0)]),
    lambda x: torch.zeros(()).add_(x[0]),
    lambda x: torch.ones(3)[x.long()],
    lambda x: x.index_put_((x.long(),), torch.ones(3)),
    lambda x: torch.nn.functional.linear(x, torch.ones(2, 3)),
    lambda x: torch.cat([x, torch.ones(3)]),
    lambda x: x.to('cuda') @ x.cpu(),
], ids=range(10))
def test_tensors_on_two_devices_are_noticed(cuda, mix):
    """Each of these is an error on CUDA, and none on a CPU."""
    with pytest.raises(CudaError, match='host'):
        mix(on_cuda(3))


def test_what_cuda_allows_is_allowed(cuda):
    """Numbers, tensors of no dimensions in pointwise operations, and copies that are asked for."""
    x = on_cuda(3)
    assert (x * 2 + torch.tensor(1.0)).is_cuda and torch.where(x > 2, x, 0.0).is_cuda
    assert x[torch.tensor([1, 2])].is_cuda and x[[0]].is_cuda and x.new_zeros(2).is_cuda and torch.zeros_like(x).is_cuda
    assert cuda.count['upload'] == 2 and not cuda.count['wait']
    assert not x.cpu().is_cuda and not x.to('cpu', torch.float64).is_cuda and x.to(x.cpu()).device.type == 'cpu'
    assert torch.ones(2).to(x).is_cuda and torch.ones(2).cuda().device == CUDA
    x[0] = 1.0
    x.copy_(torch.ones(3))
    assert x.tolist() == [1, 1, 1] and x[x > 0].is_cuda and x.sum().item() == 3
    with pytest.raises(TypeError, match='use .cpu'):
        x.numpy()


class HostGradient(torch.autograd.Function):
    """Its backward makes a tensor on the wrong device."""
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.zeros(3)


def test_a_backward_on_the_wrong_device_is_noticed(cuda):
    """What C++ makes in a backward lies where it must. What our own backward makes need not."""
    x = on_cuda(3, 2).requires_grad_()
    (x[:2].square().sum() + x.chunk(3)[0].sum()).backward()
    assert x.grad.is_cuda
    y = on_cuda(3).requires_grad_()
    with pytest.raises(CudaError, match='add: .* at test_emulated_cuda.py:[0-9]* backward'):
        HostGradient.apply(y).sum().backward()


def test_a_kernel_that_is_given_a_host_tensor_is_noticed(cuda):
    """Triton would be given an address of the host."""
    at, w = torch.arange(2, device=CUDA), on_cuda(2)
    kernels.layer_rows(on_cuda(4, 8), on_cuda(2, 8), at, w, 'mse')
    with pytest.raises(CudaError, match='layer_rows_kernel: h_t .* on the host'):
        kernels.layer_rows(on_cuda(4, 8), torch.rand(2, 8), at, w, 'mse')


# ---- graphs ----------------------------------------------------------------------------------------

def test_a_graph_runs_at_its_replay_and_leaves_nothing_else_behind(cuda):
    """Recording changes no tensor; a replay reads what its inputs hold by then; what it makes on the way cannot be read."""
    x, total = on_cuda(3), torch.zeros(3, device=CUDA)
    before = x.tolist()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = x * 2
        total[1:] += made[1:]
        x += 1
    assert x.tolist() == before and total.tolist() == [0, 0, 0]
    graph.replay()
    graph.replay()
    assert x.tolist() == pytest.approx([value + 2 for value in before])
    assert total.tolist() == pytest.approx([0] + [4 * value + 2 for value in before[1:]])
    assert made.isnan().all()


def test_a_graph_does_not_keep_memory_alive(cuda):
    x = on_cuda(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
    graph.replay()
    del x
    with pytest.raises(CudaError, match='whose memory was freed'):
        graph.replay()


@pytest.mark.parametrize('act', [
    lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.sum().item(),
    lambda x: float(x[0]), lambda x: torch.tensor([1], device=CUDA), lambda x: torch.ones(3).to(CUDA), lambda x: x[[0, 1]],
    lambda x: x.copy_(torch.ones(3)), lambda x: torch.cuda.synchronize(), lambda x: torch.zeros(3).copy_(x),
], ids=range(12))
def test_what_a_recording_refuses(cuda, act):
    x = on_cuda(3)
    act(x)
    with pytest.raises(CudaError, match='in a recording'), torch.cuda.graph(torch.cuda.CUDAGraph()):
        act(x)
    act(x)
