"""
Every Triton kernel compiled for an A100 and an H100 on a machine without a GPU: shared memory and spills are bounded.

The functions of kernels/__init__.py are called at the shapes of the paper's models on an emulated device. Where they
would launch a kernel, it is compiled as Triton compiles it for that launch: same types, constants and alignments.
"""
import re
import subprocess
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import decode_products, layer_loss
from model import PRESETS
from rollout import Sampling

triton = pytest.importorskip('triton')
from emulated_cuda import CUDA, emulated_cuda  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

CAPABILITIES = (80, 90)         # of an A100 and an H100

# A multiprocessor of an A100 has 164 KB of shared memory, of which each program takes 1 KB for the system. Two programs
# must fit, so that one computes while the other waits for memory. An H100 has 228 KB.
SHARED = 81 * 1024
SPILLED = 64                    # bytes a thread: what a few registers hold, read back from the first cache


# ---- the launches ----------------------------------------------------------------------------------

def numbers(*shape, dtype=torch.bfloat16):
    """Memory on the device that is never touched: only types and addresses count."""
    return torch.empty(shape, dtype=dtype, device=CUDA)


def layer_rows(d, kind, dtype=torch.bfloat16):
    """2,000 rows of Eq. (6) out of 16,384."""
    at, w = numbers(2000, dtype=torch.long), numbers(2000, dtype=torch.float32)
    kernels.layer_rows(numbers(16384, d, dtype=dtype), numbers(2000, d, dtype=dtype), at, w, kind)


def bridge(d, r, normalise):
    """2,000 rows of Eq. (15) through a bridge of rank r, forth and back."""
    h, at, w = numbers(16384, d), numbers(2000, dtype=torch.long), numbers(2000, dtype=torch.float32)
    z_t, P_s, b_s = (numbers(*shape, dtype=torch.float32) for shape in ((2000, r), (2, r, d), (2, r)))
    inside, scale = numbers(2000, dtype=torch.bool), numbers(dtype=torch.float32)
    kernels.bridge_rows(h, z_t, at, w, P_s, b_s, inside, normalise)
    kernels.bridge_back(h, z_t, at, P_s, inside, scale)


def attend(name, B, dtype=torch.bfloat16):
    """A decode step's attention of B rows that may hold 17,408 tokens."""
    c = PRESETS[name]
    R = int(c.e * c.partial)
    norms = (numbers(c.e, dtype=dtype), numbers(c.e, dtype=dtype)) if c.qk_norm else (None, None)
    qkv, kv = numbers(B, c.H + 2 * c.G, c.e, dtype=dtype), numbers(B, 2, c.G, 17408, c.e, dtype=dtype)
    kernels.attend(qkv, kv, numbers(B, dtype=torch.long), numbers(B, R, dtype=dtype), numbers(B, R, dtype=dtype), *norms, c.eps)


def norm_product(d, n, activation=None, bias=False, B=1, dtype=torch.bfloat16):
    """A decode step's norm and product, (B, 1, d) -> (B, 1, n), gated if there is an activation."""
    rows = 2 * n if activation else n
    norm = SimpleNamespace(weight=numbers(d, dtype=dtype), eps=1e-6)
    linear = SimpleNamespace(weight=numbers(rows, d, dtype=dtype), bias=numbers(rows, dtype=dtype) if bias else None)
    kernels.norm_product(numbers(B, 1, d, dtype=dtype), norm, linear, activation)


def swiglu(ff, B):
    """The SwiGLU of a decode step of many rows, behind the matrix library's product."""
    decode_products.swiglu_triton(numbers(B, 1, 2 * ff))


def sample_next(V, vocab, temperature, dtype=torch.bfloat16):
    """The tokens of 16 slots, all of them drawn."""
    slots, ids, is_stop = numbers(16, dtype=torch.long), numbers(16, 16385, dtype=torch.long), numbers(V, dtype=torch.bool)
    keys, token, count, max_count = (numbers(16, dtype=torch.long) for _ in range(4))
    done, stopped = (numbers(16, dtype=torch.bool) for _ in range(2))
    state = SimpleNamespace(keys=keys, ids=ids, token=token, count=count, max_count=max_count, done=done, stopped=stopped,
                            is_stop=is_stop, sampling=Sampling(stop=[], vocab=vocab, temperature=temperature))
    kernels.sample_next(state, slots, numbers(16, V, dtype=dtype))


LAUNCHES = [                    # a function above, and its arguments; a new kernel needs a line here
    (layer_rows, 1536, 'mse'), (layer_rows, 2560, 'cosine'), (layer_rows, 4096, 'nmse'),
    (layer_rows, layer_loss.WIDEST, 'mse', torch.float32),
    (bridge, 2048, 64, False), (bridge, 2560, 256, True),
    (attend, 'r1_1p5b', 1), (attend, 'r1_1p5b', 256), (attend, 'qwen3_4b', 16), (attend, 'phi4_mini', 2),
    (attend, 'r1_1p5b', 2, torch.float32),
    (norm_product, 1536, 2048, None, True), (norm_product, 1536, 8960, F.silu), (norm_product, 2560, 9728, F.silu, False, 16),
    (norm_product, 1536, 8960, F.silu, False, 2, torch.float32), (norm_product, 2560, 6144),
    (swiglu, 8960, 17), (swiglu, 9728, 256),
    (sample_next, 151936, 151665, 1.0), (sample_next, 151936, 151665, 0.0), (sample_next, 200064, None, 0.6, torch.float32),
]


# ---- compiling -------------------------------------------------------------------------------------

def spilled(kernel):
    """The bytes of memory that a thread is given for what its registers do not hold, as the binary says."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(kernel.asm['cubin'])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, '-res-usage', file.name], check=True, capture_output=True, text=True).stdout
    return max(int(count) for count in re.findall(r'STACK:(\d+)', text))


def driver(capability):
    """What Triton asks the driver of a GPU before it compiles. Triton keeps what it has compiled by the device's number."""
    return SimpleNamespace(get_current_device=lambda: capability, get_current_stream=lambda device: 0,
                           get_current_target=lambda: GPUTarget('cuda', capability, 32))


def compile_launches(launches, capabilities, **changes):
    """-> {(name of the kernel, capability): [(launch, shared memory, spilled bytes, instructions)]}. changes: of the options
    that the launchers give, such as num_stages."""
    run = JITFunction.run
    driver_config = triton.runtime.driver
    results, seen = {}, set()
    launch = None

    def compile_only(kernel, *args, grid, warmup, **options):
        for capability in capabilities:
            driver_config.set_active(driver(capability))
            made = run(kernel, *args, grid=grid, warmup=True, **options | changes)
            if made.hash not in seen:        # two launches may share a specialisation
                seen.add(made.hash)
                figures = launch, made.metadata.shared, spilled(made), made.asm['ptx']
                results.setdefault((kernel.__name__, capability), []).append(figures)

    active = driver_config._active
    with emulated_cuda(references=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, 'run', compile_only)
        for launch in launches:
            launch[0](*launch[1:])
    driver_config.set_active(active)
    return results


@pytest.fixture(scope='module')
def compiled():
    return compile_launches(LAUNCHES, CAPABILITIES)


def launched_kernels():
    """The names of all kernels that a file in kernels/ launches: `NAME[grid](...)`."""
    names = set()
    for module in vars(kernels).values():
        if getattr(module, '__name__', '').startswith('kernels.'):
            with open(module.__file__) as file:
                source = file.read()
            for name, value in vars(module).items():
                if isinstance(value, JITFunction) and re.search(rf'\b{name}\[', source):
                    names.add(name)
    return names


def test_every_kernel_is_compiled(compiled):
    """A kernel without a line in LAUNCHES."""
    names = launched_kernels()
    assert {'attend', 'layer_rows_kernel', 'bridge_rows_kernel', 'bridge_back_kernel'} <= names
    assert {name for name, _ in compiled} == names


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_shared_memory_and_registers_suffice(compiled, capability):
    """Tiles that are too large: a kernel that cannot start on an A100, that runs alone on its multiprocessor, or whose
    registers are kept in memory."""
    for (name, of), figures in compiled.items():
        for launch, shared, spill, _ in figures:
            if of == capability:
                assert shared <= SHARED, (name, launch, shared)
                assert spill <= SPILLED, (name, launch, spill)


@pytest.mark.parametrize('change', [dict(maxnreg=32), dict(num_stages=6)], ids=str)
def test_a_kernel_that_needs_too_much_is_noticed(change):
    """With 32 registers a thread attention spills; with six tiles on their way it needs more shared memory."""
    results = compile_launches([(attend, 'r1_1p5b', 1)], [80], **change)
    (_, shared, spill, _), = results['attend', 80]
    assert (spill > SPILLED) == ('maxnreg' in change) and (shared > SHARED) == ('num_stages' in change)


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_the_program_that_joins_sees_the_other_shares(compiled, capability):
    """The interpreter runs one program after another, so it cannot see what is missing between two that run at once: a
    barrier between the writing threads and the counter, the ordering of the counter, a load that asks a cache of its own
    multiprocessor. The counter is set back last."""
    joined = 0
    for launch, _, _, instructions in compiled['attend', capability]:
        at_memory = re.findall(r'^.*\b(?:(?:ld|st|atom)\.global|bar\.sync).*$', instructions, re.MULTILINE)
        counts = [i for i, line in enumerate(at_memory) if 'atom.' in line]
        if not counts:
            continue                         # one share alone
        joined += 1
        (count,) = counts
        before = ['bar' if 'bar.sync' in line else 'store' for line in at_memory[:count] if 'ld.' not in line]
        assert 'atom.global.gpu.acq_rel.add' in at_memory[count], launch
        assert before[-1] == 'bar' and 'store' in before, launch
        assert 'bar.sync' in at_memory[count + 1], launch
        loads = [line for line in at_memory[count:] if 'ld.global' in line]
        assert loads and all('ld.global.cg' in line for line in loads), launch
        assert 'st.global.b32' in at_memory[-1], launch
    assert joined
