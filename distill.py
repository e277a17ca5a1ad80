"""
On-policy representation distillation: the training loop.

One step, read downward (the same numbers stand in the loop):
    1. prompts:  this step's problems, this rank's share
    2. rollout:  the student answers them itself
    3. rows:     which response positions are supervised, with what weight over the global batch
    4. teacher:  its hidden states at exactly those rows, for the matched layers
    5. student:  one forward; each matched layer hands its rows to the loss there and then
    6. update:   backward, clip, AdamW, log
Neither model's LM head runs outside sampling, and no tensor of a step has an axis of vocabulary
size. Weights are normalised over the global batch before any micro-batch runs, so the update does
not depend on token_budget or on the number of ranks.

    python distill.py configs/toy.py                              CPU, or one GPU
    torchrun --nproc_per_node=8 distill.py configs/toy.py         eight GPUs (FSDP2), or 8 CPU ranks
    python distill.py configs/toy.py lr=1e-3 out_dir=out/lr1e-3   any key of configs/default.py

Run again with the same folder, it resumes; Ctrl-C finishes the step, saves and stops. Simpler than
usual: one loop, no trainer. What it does not know yet: output-space objectives, bridges, several
teachers, a teacher sharded over ranks.
"""
import math
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import figures
import toy
from configs import default, free, load_config
from data import load_problems, load_tokenizer, prompt_order
from eval_math import evaluate, grade, table
from losses import layer_loss, layer_set, position_weights, positions
from model import load_model, open_safetensors, read_config, save_model, write_safetensors
from rollout import sample
from runtime import (
    Log,
    UserError,
    all_reduce,
    barrier,
    print0,
    read_json,
    run,
    start,
    versions,
    whole,
    write_json,
)
from teacher import check_pair, hidden_rows

GiB = 2**30


# ---- the schedule and the cutting of batches --------------------------------------------------

def learning_rate(step, steps, peak, warmup, schedule, min_lr):
    """Rate of a step 1..steps: linear rise over warmup * steps, then the schedule down to min_lr * peak."""
    rise = round(warmup * steps)
    if step <= rise:
        return peak * step / rise
    x = (step - rise) / max(1, steps - rise)                                 # (0, 1]
    fall = {'cosine': (1 + math.cos(math.pi * x)) / 2, 'linear': 1 - x, 'constant': 1.0}[schedule]
    return peak * (min_lr + (1 - min_lr) * fall)


def micro_batches(lengths, budget):
    """Row lengths -> groups of row indices, longest first, each at most `budget` tokens with padding
    (a longer row goes alone)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# ---- ranks ------------------------------------------------------------------------------------

def shard(model, place):
    """FSDP2: float32 weights, gradients and optimizer state in shards, forwards in place.dtype.

    On one rank in float32 the model stays as it is. On one rank in bfloat16 a mesh of one gives the
    same master weights. The head is a group of its own: an OPRD step never gathers it.
    """
    model.compute_dtype = place.dtype
    if place.world == 1 and place.dtype == torch.float32:
        return model
    if not dist.is_initialized():
        dist.init_process_group('nccl' if place.device.type == 'cuda' else 'gloo',
                                store=dist.HashStore(), rank=0, world_size=1)
    how = dict(mesh=init_device_mesh(place.device.type, (place.world,)),
               mp_policy=MixedPrecisionPolicy(param_dtype=place.dtype, reduce_dtype=torch.float32))
    for block in model.blocks:
        fully_shard(block, **how)
    if not model.config.tied:
        fully_shard(model.head, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, 'hidden')
    return model


@contextmanager
def gathered(model):
    """Whole weights on every rank while sampling: gathered once, not once a token, and not copied.
    Ranks may then stop at different lengths without waiting for each other."""
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in groups:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    for m in groups:
        m.reshard()
        m.set_reshard_after_forward(m is not model, recurse=False)


def full(t):
    """A possibly sharded tensor, whole, on the CPU (every rank must ask)."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()


# ---- the optimizer ----------------------------------------------------------------------------

def adamw(model, lr, betas, weight_decay):
    """AdamW with its state allocated now: a run that does not fit fails before the first rollout,
    not at its second step. Decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    fused = params[0].device.type != 'mps'
    opt = torch.optim.AdamW([{'params': [p for p in params if p.ndim >= 2], 'weight_decay': weight_decay},
                             {'params': [p for p in params if p.ndim < 2], 'weight_decay': 0.0}],
                            lr=lr, betas=betas, fused=fused)
    for p in params:
        opt.state[p] = {'step': torch.zeros((), device=p.device if fused else 'cpu'),
                        'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}
    return opt


# ---- checkpoints ------------------------------------------------------------------------------

def save(out, step, elapsed, student, opt, source, dtype, rank):
    """out/ckpt-000040/: the Hugging Face folder `model` and the resume state beside it (float32
    weights and AdamW moments, whole, so that another number of ranks can read them). `out/last`
    points at the folder and moves when all of it is on disk."""
    weights, state = {}, {}
    for name, p in student.named_parameters():
        weights[name] = full(p)              # a collective: all ranks, one tensor at a time
        for key in ('exp_avg', 'exp_avg_sq') if p in opt.state else ():
            state[f'{key}.{name}'] = full(opt.state[p][key])
        state[f'weight.{name}'] = weights[name]
    if rank == 0:
        folder = out / f'ckpt-{step:06d}'
        with whole(folder) as tmp:
            tmp.mkdir()
            save_model(student, tmp / 'model', source, {k: w.to(dtype) for k, w in weights.items()})
            write_safetensors(state, tmp / 'resume.safetensors')
            write_json(tmp / 'resume.json', {'step': step, 'elapsed': elapsed})
        with whole(out / 'last') as link:
            link.symlink_to(f'{folder.name}/model')
        for old in out.glob('ckpt-*'):
            if old != folder:
                shutil.rmtree(old)
    barrier()


def resume(out, student, opt):
    """Read back what `save` wrote into student and optimizer, shard by shard -> (step, elapsed)."""
    folder = (out / 'last').resolve().parent
    at = read_json(folder / 'resume.json')
    saved = open_safetensors(folder / 'resume.safetensors')
    known = set(saved.keys())

    def read(name, into):
        if name not in known:
            raise UserError(f'{folder}/resume.safetensors: {name} is missing; delete {out} and start again')
        t = saved.get_tensor(name)
        if t.shape != into.shape:
            raise UserError(f'{folder}/resume.safetensors: {name} has shape {list(t.shape)}, but the model '
                            f'has {list(into.shape)}; use another out_dir=')
        t = t.to(into.device)
        into.copy_(distribute_tensor(t, into.device_mesh, into.placements) if isinstance(into, DTensor) else t)

    with torch.no_grad():
        for name, p in student.named_parameters():
            read(f'weight.{name}', p)
            if p in opt.state:
                read(f'exp_avg.{name}', opt.state[p]['exp_avg'])
                read(f'exp_avg_sq.{name}', opt.state[p]['exp_avg_sq'])
                opt.state[p]['step'].fill_(at['step'])
    return at['step'], at['elapsed']


def open_run(cfg, place):
    """Make the run folder or find it again. A folder of another config is a UserError; what is
    finished or half done is left as it is."""
    out = Path(cfg['out_dir'])
    file = out / 'config.json'
    if file.exists():
        was = read_json(file).get('config', {})
        changed = [f'{k}={was.get(k)!r}, now {v!r}' for k, v in cfg.items() if k not in free and was.get(k) != v]
        if changed:
            raise UserError(f'{file}: this run was started with {"; ".join(changed)}; '
                            'give the same again, or another out_dir=')
    elif place.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, {'config': cfg, 'versions': versions(place)})
    barrier()
    return out


@contextmanager
def interruptible():
    """Ctrl-C (or a scheduler's SIGTERM) sets a flag that the loop reads after each step; a second
    one stops at once. Yields the list that will hold the signal."""
    caught = []

    def note(number, _):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        print0('\nstopping: this step is finished and saved first (again: stop at once)')
    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# ---- before the first step --------------------------------------------------------------------

def memory_estimate(cfg, student, teacher, layers, place):
    """Bytes per rank, by what they are for; {name: bytes}. Activations are a rough count."""
    size = 2 if place.dtype == torch.bfloat16 else 4
    rows = -(-cfg['prompts_per_step'] // place.world) * cfg['n']
    longest = min(cfg['max_new_tokens'] + 1024, student.context)
    tokens = max(cfg['token_budget'], longest)
    per_token = student.d * size if cfg['checkpointing'] else (14 * student.d + 5 * student.ff) * size
    n_s = parameters(student)
    return {
        'student weights, gradient, AdamW (float32)': 16 * n_s / place.world,
        'student weights gathered for sampling': 0 if place.world == 1 and size == 4 else n_s * size,
        'teacher': parameters(teacher) * size,
        'KV cache while sampling': rows * longest * 2 * student.L * student.G * student.e * size,
        'teacher rows of a micro-batch': len(layers) * min(tokens, rows * longest) * teacher.d * size,
        'activations of a micro-batch': min(tokens, rows * longest) * per_token * student.L,
    }


def parameters(c):
    """Number of weights of a ModelConfig."""
    attention = c.d * c.e * (2 * c.H + 2 * c.G)
    return c.L * (attention + 3 * c.d * c.ff + 2 * c.d) + c.V * c.d * (1 if c.tied else 2) + c.d


def preflight(cfg, place, tok, tok_t, problems):
    """Look before the leap: the pair, the sizes, the plan. Prints a line each; UserError if hopeless.
    -> (student layers, stop ids)."""
    student, teacher = read_config(cfg['student']), read_config(cfg['teacher'])
    lines = check_pair(student, teacher, tok, tok_t, cfg['layers'], problems[0].question)
    layers = layer_set(cfg['layers'], student.L)
    if not layers:
        raise UserError(f"layers={cfg['layers']!r}: a model of {student.L} layers has none; choose others")
    if cfg['prompts_per_step'] < place.world:
        raise UserError(f"prompts_per_step={cfg['prompts_per_step']} is fewer than the {place.world} ranks; raise it")
    longest = max(len(p.ids) for p in problems) + cfg['max_new_tokens']
    for side, c in (('student', student), ('teacher', teacher)):
        if longest > c.context:
            raise UserError(f'{side}: reads {c.context} tokens, but the longest prompt and max_new_tokens='
                            f"{cfg['max_new_tokens']} make {longest}; lower max_new_tokens")
    for line in lines:
        print0(f'  {line}')
    need = memory_estimate(cfg, student, teacher, layers, place)
    print0(f'  memory per rank, estimated: {sum(need.values()) / GiB:.2f} GiB')
    if cfg['dry_run']:
        for name, n in need.items():
            print0(f'    {n / GiB:8.2f} GiB  {name}')
        print0(f"  plan: {cfg['steps']} steps of {cfg['prompts_per_step']} prompts x {cfg['n']} answers over "
               f"{place.world} rank(s); {len(problems)} training problems; layers {layers}")
    return layers, sorted(set(tok.stop_ids) | set(tok_t.stop_ids))


# ---- the loop ---------------------------------------------------------------------------------

def main(cfg):
    asked, place = cfg, start(cfg['device'], cfg['dtype'])
    rank, world = place.rank, place.world
    print0('config:', ' '.join(f'{k}={v!r}' for k, v in cfg.items() if v != default[k]))
    print0('on:', ' '.join(f'{k}={v}' for k, v in versions(place).items()), f'dtype={str(place.dtype)[6:]}')
    for key in ('student', 'teacher', 'data'):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; set {key}= (see configs/toy.py)")
    began = time.time()
    if not cfg['dry_run']:
        out = open_run(cfg, place)
        if (out / 'results.json').exists():
            results = read_json(out / 'results.json')
            print0(f"{out}: finished, {results['steps']} steps; delete the folder or give another out_dir= to run again")
            print0('\n'.join(show(results)))
            return
    elif 'toy' in (cfg['student'], cfg['teacher'], cfg['data']) and not toy.folder_of(cfg).exists():
        print0(f'dry run: {toy.folder_of(cfg)} is not there yet; `python toy.py` with the same config makes it')
        return
    cfg = toy.prepare(cfg, place)

    tok, tok_t = load_tokenizer(cfg['student']), load_tokenizer(cfg['teacher'])
    train = load_problems(cfg['data'], tok)
    held_out = load_problems(cfg['eval_data'], tok, cfg['eval_problems']) if cfg['eval_data'] else []
    layers, stop = preflight(cfg, place, tok, tok_t, train)
    if cfg['dry_run']:
        return

    teacher = load_model(cfg['teacher'], place.dtype, place.device).requires_grad_(False)
    student = load_model(cfg['student'], torch.float32, place.device)
    source = cfg['student']                  # whose tokenizer files go along with every checkpoint
    if not student.config.tied:
        student.head.requires_grad_(False)   # Eq. (6) never reaches it
    student.checkpointing = cfg['checkpointing']
    shard(student, place)
    opt = adamw(student, cfg['lr'], (cfg['beta1'], cfg['beta2']), cfg['weight_decay'])
    log, done, before = Log(out / 'log.jsonl'), 0, 0.0
    if (out / 'last').exists():
        done, before = resume(out, student, opt)
        print0(f'resumed from {out}/last at step {done}')
    began -= before                          # seconds spent by earlier runs of this folder count

    draw = dict(temperature=cfg['temperature'], top_k=cfg['top_k'], top_p=cfg['top_p'],
                max_new_tokens=cfg['max_new_tokens'], stop=stop, seed=cfg['seed'])
    exam = dict(temperature=cfg['eval_temperature'], top_p=cfg['eval_top_p'], stop=stop, seed=cfg['seed'],
                max_new_tokens=cfg['eval_max_new_tokens'] or cfg['max_new_tokens'], rank=rank, world=world)

    def examine(model, name):
        if not held_out:
            return {}
        with gathered(model):
            return evaluate(model, tok, held_out, cfg['eval_n'], progress=f'evaluate {name}', **exam)

    if rank == 0:
        log.keep(done)
    if not log.rows:
        row = {'step': 0, 'student': examine(student, 'student'), 'teacher': examine(teacher, 'teacher')}
        row['elapsed'] = time.time() - began
        log.rows.append(row) if rank else log.write(row)
        if held_out:
            print0('\n'.join(table({'student': row['student'], 'teacher': row['teacher']})))

    steps, kind, which = cfg['steps'], cfg['rep_loss'], cfg['positions']
    sequences = cfg['prompts_per_step'] * cfg['n']
    clock = Clock(place.device)
    with interruptible() as caught:
        for step in range(done + 1, steps + 1):
            clock.start()
            # 1. prompts: a function of (step, seed), dealt to the ranks like cards
            mine = prompt_order(len(train), cfg['prompts_per_step'], step, cfg['seed'])[rank::world]

            # 2. rollout
            with gathered(student):
                roll = sample(student, [train[i].ids for i in mine], cfg['n'], which=mine, step=step,
                              progress='rollout' if place.device.type == 'cuda' else '', **draw)
            clock.lap('sample')

            # 3. rows: mask m (B, T) -> weights (B, T), whose sum over all ranks is 1
            m = positions(roll, which, cfg.get(which, 0))
            w = position_weights(m, cfg['loss_average'], sequences, int(all_reduce(m.sum())))
            groups = micro_batches(roll.length.tolist(), cfg['token_budget'])
            most = int(all_reduce(torch.tensor(len(groups), device=place.device), 'max'))
            groups += [[]] * (most - len(groups))    # FSDP: as many forwards on every rank

            lr = learning_rate(step, steps, cfg['lr'], cfg['warmup'], cfg['schedule'], cfg['min_lr'])
            sums = torch.zeros(1 + len(layers), device=place.device)
            for rows in groups:
                short = rows or [0]                  # an empty group runs a row without weight
                T = int(roll.length[short].max())
                ids, w_rows = roll.ids[short, :T], (w[short, :T] * bool(rows)).flatten()
                at = w_rows.nonzero().squeeze(-1)                            # (K,)

                # 4. teacher: {l: (K, d)}
                h_t = hidden_rows(teacher, ids, layers, at, student.config.L)

                # 5. student: each tapped layer's loss, with its gradient formed in h_t's memory
                def match(l, h, h_t=h_t, at=at, w_rows=w_rows):
                    h, loss, cos = layer_loss(h, h_t[l], at, w_rows[at], kind)
                    return h, (loss, cos)
                outs = student.hidden(ids, layers, tap=match)
                loss = sum(loss for loss, _ in outs) / len(layers)           # Eq. (6)

                # 6. update; FSDP averages gradients over ranks, the weights already sum to one
                (loss * cfg['oprd_weight'] * world).backward()
                sums += torch.stack([loss.detach(), *(cos for _, cos in outs)])
            params = [p for p in student.parameters() if p.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(params, cfg['grad_clip'] or float('inf'))
            for group in opt.param_groups:
                group['lr'] = lr
            opt.step()
            opt.zero_grad()
            clock.lap('train')

            row = step_metrics(roll, sums, tok, [train[i] for i in mine], cfg['n'])
            row = {'step': step, **row, 'lr': lr, 'grad_norm': float(full(norm)), **clock.laps()}
            if not math.isfinite(row['loss'] + row['grad_norm']):
                raise UserError(f'step {step}: loss {row["loss"]}, gradient norm {row["grad_norm"]}; '
                                f'the checkpoint in {out}/last is from before; lower lr=')
            halt = bool(all_reduce(torch.tensor(float(bool(caught)), device=place.device), 'max'))
            if held_out and (step == steps or (cfg['eval_every'] and step % cfg['eval_every'] == 0)):
                row |= examine(student, f'step {step}')
            row['elapsed'] = time.time() - began
            if rank == 0:
                log.write(row)
            if step % cfg['log_every'] == 0 or step == steps:
                print0(step_line(row, steps, clock.eta(steps - step)))
            if step % cfg['save_every'] == 0 or step == steps or halt:
                save(out, step, row['elapsed'], student, opt, source, place.dtype, rank)
            if halt and step < steps:
                print0(f'stopped after step {step}; the same command goes on from there')
                return 130

    if rank == 0:
        results = summary(log.rows, steps)
        figures.curve([out], out / 'curve.png')
        write_json(out / 'results.json', results)
        print0('\n'.join(show(results)))
        print0(f"{out}: {results['seconds']:.0f} s in all; model in last/, figure in curve.png")


class Clock:
    """Seconds of a step by phase, and what the remaining steps will take."""
    def __init__(self, device):
        self.cuda, self.steps, self.spent, self.phases = device.type == 'cuda', 0, 0.0, {}

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self):
        self.last, self.phases = self.now(), {}

    def lap(self, name):
        now = self.now()
        self.phases[f'time/{name}'], self.last = now - self.last, now

    def laps(self):
        self.steps, self.spent = self.steps + 1, self.spent + sum(self.phases.values())
        return self.phases

    def eta(self, steps):
        return self.spent / max(1, self.steps) * steps


def step_metrics(roll, sums, tok, problems, n):
    """A step's sums over micro-batches and its rollout -> the numbers to log, over all ranks."""
    right = sum(grade(tok.decode(ids), problems[i].answer)
                for ids, i in zip(roll.answers(), roll.prompt.tolist(), strict=True))
    counts = torch.tensor([roll.resp_len.sum(), roll.stopped.sum(), right, len(roll.ids)], device=sums.device)
    x = all_reduce(torch.cat([sums.double().cpu(), counts.double().cpu()]).to(sums)).tolist()
    cos, (tokens, stopped, right, rows) = x[1:-4], x[-4:]
    return {'loss': x[0], 'rep/cos': sum(cos) / len(cos), 'rep/cos_layer': cos, 'len/mean': tokens / rows,
            'finish': stopped / rows, 'acc/rollout': 100 * right / rows, 'tokens': tokens}


def step_line(row, steps, eta):
    """One fixed-width line, most wanted first."""
    speed = row['tokens'] / (row['time/sample'] + row['time/train'])
    line = (f"step {row['step']:04d}/{steps:04d} | loss {row['loss']:.4f} | cos {row['rep/cos']:.3f} | "
            f"len {row['len/mean']:.0f} fin {100 * row['finish']:.0f}% acc {row['acc/rollout']:.0f}% | "
            f"sample {row['time/sample']:.1f}s train {row['time/train']:.1f}s | {speed / 1000:.1f}k tok/s | ")
    if torch.cuda.is_available():
        line += f'mem {torch.cuda.max_memory_allocated() / GiB:.1f}G | '
    eta = f'{eta / 3600:.1f}h' if eta > 3600 else f'{eta / 60:.1f}m' if eta > 60 else f'{eta:.0f}s'
    exam = ' '.join(f'{k} {v:.1f}' for k, v in row.items() if '@' in k)
    return line + f'eta {eta}' + (f' | {exam}' if exam else '')


def summary(rows, steps):
    """log.jsonl's rows -> results.json."""
    first, trained, last = rows[0], rows[1:], rows[-1]
    exam = {k: last[k] for k in first['student']}
    return {'student': first['student'], 'teacher': first['teacher'], 'distilled': exam, 'steps': steps,
            'seconds': last['elapsed'], 'rep_cos': [trained[0]['rep/cos'], last['rep/cos']]}


def show(results):
    """results.json -> the lines of the result table."""
    rows = {k: results[k] for k in ('student', 'teacher', 'distilled') if results[k]}
    lines = table(rows) if rows else ['no eval_data, so no accuracy']
    return lines + ['rep cosine {:.3f} -> {:.3f}'.format(*results['rep_cos'])]


if __name__ == '__main__':
    run(main, load_config)
