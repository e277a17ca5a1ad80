"""
On-policy representation distillation: the training loop.

One step, read downward (the same numbers stand in the loop):
    1. prompts:  this step's problems, this rank's share
    2. rollout:  the student answers them itself
    3. rows:     which response positions are supervised, with what weight over the global batch
    4. teacher:  its hidden states at exactly those rows, for the matched layers
    5. student:  one forward; each matched layer hands its rows to the loss there and then; backward
    6. update:   clip, AdamW, log
The loss is Eq. (7): oprd_weight * Eq. (6), hidden states, + opd_weight * one of Eqs. (3)-(5), output space.
With opd_weight=0 neither model's LM head runs after the rollout, and nothing of size rows x vocabulary
is ever made (but for a few rows every diagnose_every steps). Weights are normalised over the global
batch before any micro-batch runs, so the update does not depend on token_budget or the number of ranks.

    python distill.py configs/toy.py                              CPU, or one GPU
    torchrun --nproc_per_node=8 distill.py configs/toy.py         eight GPUs (FSDP2), or 8 CPU ranks
    python distill.py configs/toy.py lr=1e-3 out_dir=out/lr1e-3   any key of configs/default.py

Run again with the same folder, it resumes; Ctrl-C finishes the step, saves and stops (torchrun kills
its ranks 30 s after Ctrl-C: for steps longer than that, start it with --shutdown-timeout=600).
Between unlike models (`bridge=`, made by bridge.py) Eq. (15) stands in Eq. (6)'s place.
Simpler than usual: one loop, no trainer. What it does not know yet: several teachers, a teacher sharded
over ranks.
"""
import math
import time
from dataclasses import dataclass
from functools import partial

import torch

from bridge import load_bridge, made_for
from configs import default, free, load_config
from cross_tokenizer.next_byte import ByteTable, byte_loss
from cross_tokenizer.pairing import read_rollout
from eval_math import evaluate, exam_problems, table
from formats.huggingface import load_model, read_config, save_model, snapshot
from formats.problems import load_problems, prompt_order
from formats.tokenizer import load_tokenizer
from grading.grader import grade
from losses import (
    bridge_loss,
    ever,
    layer_loss,
    position_weights,
    positions,
    row_distance,
    spread,
    through,
    weight_at,
)
from output_losses import opd_loss
from rollout import micro_batches, sample
from studies import figures, toy
from support.checkpoints import open_run, resume, save
from support.files import Log, read_json, write_json
from support.optimizer import adamw, learning_rate
from support.preflight import preflight
from support.runtime import (
    Clock,
    UserError,
    all_gather,
    all_reduce,
    barrier,
    full,
    gathered,
    interruptible,
    print0,
    run,
    shard,
    start,
    versions,
)
from teacher import hidden_rows

# ---- one step's gradient ----------------------------------------------------------------------

def accumulate(student, teacher, roll, w, phi, kind, budget, factor=1.0, *, oprd_weight=1.0,
               opd_weight=0.0, opd=opd_loss, probe=None, drift=False, reading=None, bridge=None,
               normalise=True, lap=lambda phase: None):
    """Steps 4 and 5: add the gradient of factor * Eq. (7) over a rollout to the student's .grad.

    w: weights (B, T) from position_weights. phi: {student layer: teacher layer}. kind: rep_loss.
    budget: tokens of a micro-batch.
    opd: losses.opd_loss with its choices made. probe: mask (B, T) of positions where the cosines or
    output distributions that the objective leaves out are looked at, without a gradient; None = not now.
    reading: teacher.Reading, if the teacher reads other ids; w is 0 where it has no state. bridge: a
    Bridge, for Eq. (15) in Eq. (6)'s place. normalise: its projections.
    -> sums [Eq. (6), opd; w, KL, two entropies, overlap; w, cos of each layer], this rank's share; the
    sum over ranks is what it would be on one rank in one micro-batch. The two w's: of the rows seen.
    """
    L, learn, none = student.config.L, opd_weight > 0, torch.zeros((), device=w.device)

    def micro_batch(rows, share):
        """-> Eq. (6) or (15), the output-space term, its stats (5,), [w, cos of each layer]; or 0."""
        T = int(roll.length[rows].max())
        ids, m = roll.ids[rows, :T], share * w[rows, :T].flatten()
        at = m.nonzero().squeeze(-1)                                         # (K,) flat positions
        m, y, answer = m[at], ids.flatten()[at + 1], at // T                 # (K,) weight, next token, row
        none_inside = ids, at, torch.zeros_like(at).bool(), None
        ids_t, at_t, inside, written = reading.part(rows, T, at) if reading else none_inside
        # a term sees all K rows; what has no term is looked at in a few of them, or not in this step
        few = None if probe is None else probe[rows, :T].flatten()[at].nonzero().squeeze(-1)
        here = slice(None) if oprd_weight > 0 else few                       # for the layers
        there = None if opd is None else slice(None) if learn else few       # for the LM heads
        wanted = {} if here is None else {l: at_t[here] for l in phi}
        if there is not None:
            wanted['head'] = at_t[there]
            if written is not None:          # and the state before the teacher's last token
                written = written if learn else [written[i] for i in few.tolist()]
                back = torch.tensor([bool(word) for word in written], device=at.device) & ~inside[there]
                wanted['head'] = torch.cat([at_t[there], at_t[there] - back.long()])

        # 4. teacher: {l or 'head': (K, d)}, or (K, r) through a bridge
        h_t = hidden_rows(teacher, ids_t, wanted, phi, bridge)
        lap('teacher')

        # 5. student: every layer's loss as it passes, its gradient formed in h_t's memory
        def tap(l, h):
            rep, cos, out, stats = none, None, none, none.repeat(5)
            if l == L and 'head' in h_t:
                term = partial(opd, h_t=h_t['head'], W_t=teacher.head.weight, y=y[there], w=m[there],
                               answer=answer[there], **({} if learn else {'kind': None}))
                if written is not None:      # another vocabulary: the next byte, given these
                    term = partial(term, written=written, inside=inside[there])
                with torch.set_grad_enabled(learn):
                    out, stats = student.head(h.flatten(0, 1)[at[there]], term)
            if l in h_t and oprd_weight > 0 and bridge:
                h, rep, cos = bridge_loss(h, h_t[l], at, m, bridge.P_s[l], bridge.b_s[l], inside, normalise)
            elif l in h_t and oprd_weight > 0:
                h, rep, cos = layer_loss(h, h_t[l], at, m, kind, answer if drift else None)
            elif l in h_t:
                s = h.detach().flatten(0, 1)[at[few]].float()
                s = through(s, bridge.P_s[l], bridge.b_s[l], inside[few]) if bridge else s
                cos = (m[few] * (1 - row_distance(s, h_t[l].float(), 'cosine'))).sum()
            return h, (rep, cos, out, stats)
        read = sorted({L if l == 'head' else l for l in wanted})
        reps, cos, outs, stats = zip(*student.hidden(ids, read, tap=tap), strict=True)
        cos = [c for c in cos if c is not None] or [none] * len(phi)
        seen = none if here is None else m[here].sum()
        return sum(reps) / max(1, len(phi)), sum(outs), sum(stats), torch.stack([seen, *cos])

    groups = [(rows, 1.0) for rows in micro_batches(roll.length.tolist(), budget)]
    most = int(all_reduce(torch.tensor(len(groups), device=w.device), 'max'))
    groups += [([0], 0.0)] * (most - len(groups))    # FSDP: as many forwards on every rank, of no weight
    sums = torch.zeros(8 + len(phi), device=w.device)
    for rows, share in groups:
        rep, out, stats, cos = micro_batch(rows, share)
        ((oprd_weight * rep + opd_weight * out) * factor).backward()
        lap('student')
        sums += torch.cat([torch.stack([rep.detach(), out.detach()]), stats, cos])
    return sums


# ---- the loop ---------------------------------------------------------------------------------

@dataclass
class Setup:
    """What a run needs besides its config. student, teacher and opt are None in a dry run."""
    tok: object                 # tokenizers
    tok_t: object
    train: list                 # problems
    held_out: list
    phi: dict                   # {student layer: teacher layer}
    stop: list                  # ids that end an answer
    bridge: object              # Bridge, or None
    student: object = None
    teacher: object = None
    opt: object = None

    @property
    def same_ids(self):
        """Does the teacher read the student's ids as they are?"""
        return self.tok.words == self.tok_t.words


def prepare(cfg, place):
    """Tokenizers, problems, checks, bridge, models, optimizer -> Setup."""
    tok, tok_t = (load_tokenizer(cfg[side], enable_thinking=cfg['enable_thinking'])
                  for side in ('student', 'teacher'))
    train = load_problems(cfg['data'], tok, longest=cfg['max_prompt_tokens'])
    held_out = []
    if cfg['eval_data']:
        held_out = exam_problems(cfg['eval_data'], tok, cfg['eval_problems'], cfg['eval_suffix'])
    phi, stop, longest = preflight(cfg, place, tok, tok_t, train, held_out)
    bridge = None
    if cfg['bridge']:
        shapes = (read_config(cfg[side]) for side in ('student', 'teacher'))
        about = made_for(cfg, *shapes, tok, tok_t)
        bridge = load_bridge(cfg['bridge'], cfg['bridge_rank'], list(phi), about, place.device)
        phi = bridge.phi
        print0(f'  bridge {cfg["bridge"]}: rank {bridge.rank}, layers {phi}')
    setup = Setup(tok, tok_t, train, held_out, phi, stop, bridge)
    if cfg['dry_run']:
        return setup
    if place.local == 0:                             # from a hub: once per machine
        for side in ('student', 'teacher'):
            snapshot(cfg[side], weights=True)
    barrier()
    setup.teacher = load_model(cfg['teacher'], place.dtype, place.device).requires_grad_(False)
    setup.student = load_model(cfg['student'], torch.float32, place.device)
    if not setup.student.config.tied and not ever(cfg['opd_weight']):
        setup.student.head.requires_grad_(False)       # Eq. (6) never reaches it
    setup.student.checkpointing = cfg['checkpointing']
    setup.student.reach = setup.teacher.reach = longest
    if cfg['compile']:                               # before the shards are cut
        for block in [*setup.student.blocks, *setup.teacher.blocks]:
            block.compile()
    shard(setup.student, place)
    setup.opt = adamw(setup.student, cfg['lr'], (cfg['beta1'], cfg['beta2']), cfg['weight_decay'])
    return setup


def output_term(cfg, tok, tok_t, stop, device):
    """One of Eqs. (3)-(5), or the next-byte KL, with the config's choices made; None where two vocabularies
    cannot be compared token by token."""
    heads = dict(direction=cfg['kl_direction'], temperature=cfg['student_temperature'],
                 teacher_temperature=cfg['teacher_temperature'], chunk=cfg['head_rows'])
    if cfg['opd'] == 'byte':
        table_s, table_t = (ByteTable(t.pieces, ends, t.size, device)
                            for t, ends in ((tok, stop), (tok_t, tok_t.stop_ids)))
        return partial(byte_loss, table_s=table_s, table_t=table_t, **heads)
    if tok.words != tok_t.words:
        return None
    return partial(opd_loss, kind=cfg['opd'], k=cfg['opd_k'], support=cfg['opd_support'], vocab=tok.size,
                   tail=cfg['opd_tail'], future=cfg['opd_future'], baseline=cfg['opd_baseline'], **heads)


def open_log(out, asked, place, student, opt):
    """Write the run's config, or go on from its last checkpoint -> (log, steps done, seconds spent)."""
    if place.rank == 0 and not (out / 'config.json').exists():
        write_json(out / 'config.json', {'config': asked, 'versions': versions(place)})
    log = Log(out / 'log.jsonl')
    done, elapsed = resume(out, student, opt)
    log.keep(done)
    if done and (not log.rows or log.rows[-1]['step'] != done):
        raise UserError(f'{log.path}: its lines end before the checkpoint at step {done}, so the run cannot '
                        'be told whole; choose another out_dir=')
    if len(set(all_gather((done, len(log.rows))))) > 1:
        raise UserError(f'{out}: ranks see different files there; out_dir= must be on a disk that all share')
    if done:
        print0(f'resumed after step {done}')
    log.rewrite(place.rank)
    return log, done, elapsed


def examine(cfg, setup, place, name, side='student'):
    """Held-out scores of one of the models, the same on every rank; {} without eval_data."""
    tok, problems, stop = setup.tok, setup.held_out, setup.stop
    if not problems:
        return {}
    if side == 'teacher' and not setup.same_ids:       # its own prompts and stop tokens
        tok, stop = setup.tok_t, setup.tok_t.stop_ids
        problems = exam_problems(cfg['eval_data'], tok, cfg['eval_problems'], cfg['eval_suffix'])
    with gathered(getattr(setup, side)) as model:
        return evaluate(model, tok, problems, cfg['eval_n'], temperature=cfg['eval_temperature'],
                        top_p=cfg['eval_top_p'], stop=stop, seed=cfg['seed'], vocab=tok.size,
                        max_new_tokens=cfg['eval_max_new_tokens'] or cfg['max_new_tokens'],
                        rows=cfg['eval_rows'], rank=place.rank, world=place.world,
                        progress='' if place.rank else f'evaluate {name}')


def main(cfg):
    began, place = time.time(), start(cfg['device'], cfg['dtype'])
    print0('config:', ' '.join(f'{k}={v!r}' for k, v in cfg.items() if v != default[k]))
    print0('on:', ' '.join(f'{k}={v}' for k, v in versions(place).items()), f'dtype={str(place.dtype)[6:]}')
    for key in ('student', 'teacher', 'data'):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; set {key}= (see configs/toy.py)")
    asked = cfg | {'dtype': str(place.dtype)[6:]}    # 'auto' must not mean something else at resume
    out = open_run(cfg['out_dir'], asked, free)
    if (out / 'results.json').exists():
        results = read_json(out / 'results.json')
        print0(f"{out}: finished at step {results['steps']}; give another out_dir= to run again")
        print0('\n'.join(show(results)))
        return
    if cfg['dry_run'] and not toy.is_made(cfg):
        print0(f'  dry run: a run makes {toy.folder_of(cfg)} first (about two minutes)')
        return
    cfg = toy.prepare(cfg, place)
    setup = prepare(cfg, place)
    if cfg['dry_run']:
        return
    log, done, elapsed = open_log(out, asked, place, setup.student, setup.opt)
    began -= elapsed                                 # seconds spent by earlier runs of this folder
    if not log.rows:
        row = {'step': 0, **{side: examine(cfg, setup, place, side, side) for side in ('student', 'teacher')}}
        log.write(row | {'elapsed': time.time() - began}, place.rank)
        print0('\n'.join(table({k: row[k] for k in ('student', 'teacher')} if setup.held_out else {})))
    train(cfg, setup, place, out, log, done, began)
    if place.rank == 0:
        results = summary(log.rows)
        figures.curve([out], out / 'curve.png')
        write_json(out / 'results.json', results)
        print0('\n'.join(show(results)))
        print0(f"{out}: {results['seconds']:.0f} s in all; model in last/, figure in curve.png")


def train(cfg, setup, place, out, log, done, began):
    """The loop: steps done + 1 .. steps, each a line of the log."""
    student, teacher, opt, tok, tok_t = setup.student, setup.teacher, setup.opt, setup.tok, setup.tok_t
    rank, world, steps = place.rank, place.world, cfg['steps']
    source = snapshot(cfg['student'])                # its tokenizer goes along with every checkpoint
    draw = dict(temperature=cfg['temperature'], top_k=cfg['top_k'], top_p=cfg['top_p'],
                max_new_tokens=cfg['max_new_tokens'], stop=setup.stop, vocab=tok.size, seed=cfg['seed'])
    sequences = cfg['prompts_per_step'] * cfg['n']
    opd = output_term(cfg, tok, tok_t, setup.stop, place.device)

    def write_model(folder, weights):
        save_model(student, folder, source, {k: w.to(place.dtype) for k, w in weights.items()})

    clock = Clock(place.device)
    with interruptible() as caught:
        for step in range(done + 1, steps + 1):
            clock.start()
            # 1. prompts: a function of (step, seed); each slot of the step goes to one rank
            order = prompt_order(len(setup.train), cfg['prompts_per_step'], step, cfg['seed'])
            slots = range(rank, cfg['prompts_per_step'], world)
            mine = [setup.train[order[i]] for i in slots]

            # 2. rollout: every answer is a function of (weights, seed, step, slot, sample) alone
            with gathered(student) as sampler:
                roll = sample(sampler, [p.ids for p in mine], cfg['n'], which=slots, step=step,
                              progress='rollout' if rank == 0 and clock.cuda else '', **draw)
            clock.lap('sample')
            clock.update_begins()

            # 3. rows: mask m (B, T) -> weights (B, T), which sum to 1 over all ranks
            m = positions(roll, cfg['positions'], cfg.get(cfg['positions'], 0))
            reading = None
            if not setup.same_ids:             # the teacher reads the same text in its own tokens
                reading = read_rollout(roll, [tok_t.chat(p.question) for p in mine], tok, tok_t,
                                       teacher.config.context, cfg['pair'], cfg['teacher_ids'])
                m &= reading.at >= 0
            tokens = all_reduce(m.sum())
            w = position_weights(m, cfg['loss_average'], sequences, tokens)
            looking = step in (1, steps) or (cfg['diagnose_every'] and step % cfg['diagnose_every'] == 0)
            probe = spread(roll, m, step, cfg['diagnose_rows'] / max(1, int(tokens))) if looking else None

            # 4, 5. teacher, student (times world: FSDP averages over ranks what w already sums to 1)
            mu = {f'{term}_weight': weight_at(step, steps, cfg[f'{term}_weight']) for term in ('oprd', 'opd')}
            sums = accumulate(student, teacher, roll, w, setup.phi, cfg['rep_loss'], cfg['token_budget'],
                              world, opd=opd, probe=probe, drift=cfg['positions'] == 'drift',
                              reading=reading, bridge=setup.bridge, normalise=cfg['bridge_normalise'],
                              lap=clock.lap, **mu)

            # 6. update
            params = [p for p in student.parameters() if p.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(params, cfg['grad_clip'] or math.inf)
            lr = learning_rate(step, steps, cfg['lr'], cfg['warmup'], cfg['schedule'], cfg['min_lr'])
            for group in opt.param_groups:
                group['lr'] = lr
            opt.step()
            opt.zero_grad()
            clock.lap('update')

            row = {'step': step, **step_metrics(roll, sums, tok, mine, reading, **mu),
                   'lr': lr, 'grad_norm': float(full(norm)), **clock.stop()}
            if not math.isfinite(row['loss'] + row['grad_norm']):
                raise UserError(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; "
                                'nothing of this step is saved; lower lr=')
            if setup.held_out and (step == steps or (cfg['eval_every'] and step % cfg['eval_every'] == 0)):
                row |= examine(cfg, setup, place, f'step {step}')
            log.write(row | {'elapsed': time.time() - began}, rank)
            if step % cfg['log_every'] == 0 or step == steps:
                print0(step_line(row, steps, clock.eta(steps - step)))
            halt = bool(all_reduce(torch.tensor(float(bool(caught)), device=place.device), 'max'))
            if step % cfg['save_every'] == 0 or step == steps or halt:
                save(out, step, time.time() - began, student, opt, write_model, rank)
            if halt and step < steps:
                print0(f'stopped after step {step}; the same command goes on from there')
                raise KeyboardInterrupt


def step_metrics(roll, sums, tok, problems, reading, oprd_weight, opd_weight):
    """A step's weighted sums and its rollout -> the numbers to log, over all ranks. What this step did
    not look at is not there. Entropies and KL in nats."""
    answers = [(ids, problems[i].answer) for ids, i in zip(roll.answers(), roll.prompt.tolist(), strict=True)]
    verdicts = [grade(tok.decode(ids), answer) for ids, answer in answers if answer is not None]
    written = int(roll.resp_len.sum())
    counts = [written, int(roll.stopped.sum()), sum(verdicts), len(verdicts), len(answers),
              reading.align * written if reading else 0]
    total = all_reduce(torch.cat([sums, torch.tensor(counts, dtype=sums.dtype, device=sums.device)])).tolist()
    rep, out, in_heads, kl, entropy_s, entropy_t, common, in_layers, *cos = total[:-6]
    tokens, stopped, right, graded, rows, exact = total[-6:]
    row = {'loss': oprd_weight * rep + opd_weight * out}
    row |= {'loss/oprd': rep} if oprd_weight else {}
    row |= {'loss/opd': out} if opd_weight else {}
    if in_layers and cos:
        cos = [c / in_layers for c in cos]
        row |= {'rep/cos': sum(cos) / len(cos), 'rep/cos_layer': cos}
    if in_heads:
        row |= {'opd/overlap16': common / in_heads} if common else {}        # bytes have none
        row |= {'opd/kl': kl / in_heads, 'entropy/student': entropy_s / in_heads,
                'entropy/teacher': entropy_t / in_heads}
    row |= {'len/mean': tokens / rows, 'finish': stopped / rows, 'tokens': tokens}
    row |= {'align': exact / tokens} if reading else {}
    return row | ({'acc/rollout': 100 * right / graded} if graded else {})


def step_line(row, steps, eta):
    """One fixed-width line, most wanted first."""
    train = sum(row[f'time/{phase}'] for phase in ('teacher', 'student', 'update'))
    speed = row['tokens'] / (row['time/sample'] + train)
    line = f"step {row['step']:04d}/{steps:04d} | loss {row['loss']:.4f} | "
    line += f"cos {row['rep/cos']:.3f} | " if 'loss/opd' not in row else f"kl {row['opd/kl']:.4f} | "
    line += (f"len {row['len/mean']:.0f} fin {100 * row['finish']:.0f}% "
             + (f"acc {row['acc/rollout']:.0f}% | " if 'acc/rollout' in row else '| ') +
             f"sample {row['time/sample']:.1f}s train {train:.1f}s | {speed / 1000:.1f}k tok/s | ")
    if 'mem/peak' in row:
        line += f"mem {row['mem/peak']:.1f}G | "
    eta = f'{eta / 3600:.1f}h' if eta > 3600 else f'{eta / 60:.1f}m' if eta > 60 else f'{eta:.0f}s'
    exam = ' '.join(f'{k} {v:.1f}' for k, v in row.items() if '@' in k)
    return line + f'eta {eta}' + (f' | {exam}' if exam else '')


def summary(rows):
    """log.jsonl's rows -> results.json."""
    first, last, cos = rows[0], rows[-1], [r['rep/cos'] for r in rows if 'rep/cos' in r]
    return {'student': first['student'], 'teacher': first['teacher'],
            'distilled': {k: last[k] for k in first['student']}, 'steps': last['step'],
            'seconds': last['elapsed'], 'rep_cos': [cos[0], cos[-1]] if cos else []}


def show(results):
    """results.json -> the lines of the result table."""
    rows = {k: results[k] for k in ('student', 'teacher', 'distilled') if results[k]}
    cos = results['rep_cos']
    return table(rows) + (['rep cosine {:.3f} -> {:.3f}'.format(*cos)] if cos else [])


if __name__ == '__main__':
    run(main, load_config)
