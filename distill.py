"""
On-policy representation distillation: the training loop.

One step, read downward (the same numbers stand in the loop):
    1. prompts:  this step's problems, this rank's share
    2. rollout:  the student answers them itself
    3. rows:     which response positions are supervised, with what weight over the global batch
    4. teacher:  its hidden states at exactly those rows, for the matched layers
    5. student:  one forward; each matched layer hands its rows to the loss there and then; backward
    6. update:   clip, AdamW, log

The loss is Eq. (7): oprd_weight * Eq. (6), hidden states, + opd_weight * one of Eqs. (3)-(5), output
space. Between unlike models (`bridge=`, made by bridge.py) Eq. (15) stands in Eq. (6)'s place. With
opd_weight=0 neither model's LM head runs after the rollout, and nothing of size rows x vocabulary is
ever made (but for a few rows every diagnose_every steps). The weights of the rows are normalised over
the global batch before any micro-batch runs, so the update does not depend on token_budget or on the
number of ranks.

    python distill.py configs/toy.py                              CPU, or one GPU
    torchrun --nproc_per_node=8 distill.py configs/toy.py         eight GPUs (FSDP2), or 8 CPU ranks
    python distill.py configs/toy.py lr=1e-3 out_dir=out/lr1e-3   any key of configs/default.py

Run again with the same folder, it resumes. Ctrl-C finishes the step, saves and stops (torchrun kills
its ranks 30 s after Ctrl-C: for steps longer than that, start it with --shutdown-timeout=600). The random
numbers of an answer depend on neither batch, ranks nor restarts. In float32 the answer does not either, up
to a tie in the last bit; in bfloat16 it can differ with the shape of the batch (rollout.py).
Simpler than usual: one loop, no trainer. The algorithm without everything that makes it fast: minimal.py.
What goes beyond the paper's experiments, such as several teachers, is in extensions/.

Letters: B answers, T tokens, K supervised positions, L layers, d width, r rank of a bridge.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from bridge_parts.saved import fingerprint, load_bridge
from configs import default, free, later, load_config
from cross_tokenizer.next_byte import ByteTable, NextByte
from cross_tokenizer.pairing import read_rollout
from eval_math import check_answers, load_eval_sets, sample_and_grade, shared_scores, table
from extensions import attention_maps, rewards, self_teacher, several_teachers
from formats.hub import snapshot, stay_at
from formats.huggingface import load_model, read_config, save_model
from formats.problems import prompt_order
from formats.tokenizer import load_tokenizer, same_vocabulary, shared_size
from grading.grader import grade
from losses import BridgeTerm, HiddenTerm
from output_losses import OutputTerm, make_objective
from rollout import sample
from step import (
    TERMS,
    Objective,
    accumulate,
    add,
    cut_rollout,
    diagnose,
    diagnostic_mask,
    position_mask,
    position_weights,
)
from studies import figures, toy
from support.answers import keep_answers
from support.checkpoints import check_resumable, resume, save
from support.files import owned, write_json
from support.optimizer import adamw, ever_positive, learning_rate, share_below_eps, weight_at
from support.preflight import preflight
from support.profile import ProfilingClock
from support.progress import Progress
from support.provenance import note_start, start_record, started_commits, versions
from support.report import first_step_notes, log_names, read_results, step_line, summary
from support.run_folder import begin, open_run, scores_as_logged, stored_config
from support.runtime import (
    LONG_WAIT,
    Clock,
    UserError,
    all_reduce,
    barrier,
    before_leaving,
    day_of_start,
    full,
    gathered,
    interruptible,
    print0,
    run,
    shard,
    start,
)
from support.trackers import check_trackers, tracked
from teacher import Share, Teacher

# ---- what is minimised -----------------------------------------------------------------------

def make_objective_terms(cfg, teacher, output, vocab):
    """The config's choices -> the Objective of learning from a Teacher whose model is loaded. output: an
    objective of output_losses or next_byte, or None. vocab: a softmax runs over the ids below it."""
    # Hidden states: through a bridge, or number by number if width and vocabulary are the same.
    hidden = None
    if teacher.layer_map and teacher.bridge is not None:
        hidden = BridgeTerm(teacher.bridge, cfg['bridge_normalise'])
    elif teacher.layer_map:
        drift = cfg['positions'] == 'drift'
        hidden = HiddenTerm(cfg['rep_loss'], drift, teacher.model.embed.weight.device)
        if not hidden.fused:
            print0(f"  note: no kernel computes rep_loss={cfg['rep_loss']!r}; its gradient is taken by "
                   'autograd, which is slower')

    # Output space: the objective together with the teacher's head. Rewards: no teacher at all.
    if output is not None:
        output = OutputTerm(output, teacher.model)
    reward = None
    if ever_positive(cfg['reward_weight']):
        reward = rewards.RewardTerm(cfg['student_temperature'], cfg['head_rows'], vocab)
    attention = None
    if ever_positive(cfg['attention_weight']):
        attention = attention_maps.AttentionTerm(cfg['attention_layers'], cfg['attention_heads'],
                                                 teacher.layer_map, read_config(cfg['student']),
                                                 teacher.model.config)
    return Objective(teacher.layer_map, hidden, output, teacher.bridge, reward, attention)


def make_output_objective(cfg, setup, teacher, device):
    """One of Eqs. (3)-(5) or the next-byte KL, as the config says. None: the config asks to compare
    token by token, but the vocabularies differ."""
    # What every objective under the LM heads shares.
    heads = dict(temperature=cfg['student_temperature'], teacher_temperature=cfg['teacher_temperature'],
                 chunk=cfg['head_rows'])
    vocab = shared_size(setup.tok, teacher.tok)          # a softmax runs over the ids that both models know

    # Bytes can be compared between any two vocabularies, tokens only within one.
    if cfg['opd'] == 'byte':
        student_table = ByteTable(setup.tok.pieces, setup.stop, vocab, device)
        teacher_table = ByteTable(teacher.tok.pieces, teacher.tok.stop_ids, teacher.tok.size, device)
        return NextByte(student_table, teacher_table, direction=cfg['kl_direction'], **heads)
    if not teacher.same_ids:
        return None
    return make_objective(cfg['opd'], k=cfg['opd_k'], support=cfg['opd_support'], tail=cfg['opd_tail'],
                          direction=cfg['kl_direction'], future=cfg['opd_future'],
                          baseline=cfg['opd_baseline'], vocab=vocab, **heads)


# ---- before the loop ---------------------------------------------------------------------------

@dataclass
class Setup:
    """What a run needs besides its config. student and opt are None in a dry run."""
    tok: object                 # the student's tokenizer
    train: list                 # problems
    held_out: dict              # {name of a set: problems}
    teachers: list              # teacher.Teacher
    stop: list                  # ids that end an answer
    vocab: int                  # ids below it are known to all models
    student: object = None
    opt: object = None

    @property
    def named_teachers(self):
        """{name in the log and in the run folder: teacher}: 'teacher', 'teacher2', 'teacher3', ..."""
        names = ['teacher', *(f'teacher{number}' for number in range(2, len(self.teachers) + 1))]
        return dict(zip(names, self.teachers, strict=True))


def prepare(cfg, env):
    """Tokenizers, problems, checks, bridges, models, objectives, optimizer -> Setup."""
    # Text first: it is small, and most mistakes show here.
    self_teacher.check(cfg)
    pairs = several_teachers.configs(cfg)
    several_teachers.check(cfg, len(pairs))
    tok, *toks_t = (load_tokenizer(path, cfg['date'], enable_thinking=cfg['enable_thinking'])
                    for path in (cfg['student'], *(pair['teacher'] for pair in pairs)))
    train = several_teachers.load_training_problems(cfg, tok, toks_t)
    held_out = {}
    if cfg['eval_data']:
        held_out = load_eval_sets(cfg['eval_data'], tok, cfg['eval_problems'], cfg['eval_suffix'])
    if cfg['teacher_sees'] == 'solution' and cfg['eval_teacher']:
        held_out = self_teacher.show_in_sets(held_out, toks_t[0], cfg['solution_text'])
    # An answer that the grader does not accept as its own can never be scored.
    for problems in (train, *held_out.values()):
        for line in check_answers(problems):
            print0(f'  {line}')
    # The pairs, the objective, the lengths, the memory: a line each, or an error.
    held_out_problems = [problem for problems in held_out.values() for problem in problems]
    layer_maps, stop, longest = preflight(cfg, pairs, env, tok, toks_t, train, held_out_problems)
    # A bridge must have been made for just these two models.
    teachers = []
    for pair, tok_t, layer_map in zip(pairs, toks_t, layer_maps, strict=True):
        bridge = None
        if pair['bridge']:
            shapes = [read_config(pair[side]) for side in ('student', 'teacher')]
            about = fingerprint(pair, *shapes, tok, tok_t)
            bridge = load_bridge(pair['bridge'], cfg['bridge_rank'], list(layer_map), about, env.device)
            layer_map = bridge.layer_map
            print0(f'  bridge {pair["bridge"]}: rank {bridge.rank}, layers {layer_map}')
        teachers.append(Teacher(tok_t, same_vocabulary(tok, tok_t), layer_map, bridge))
    setup = Setup(tok, train, held_out, teachers, stop, min(shared_size(tok, tok_t) for tok_t in toks_t))
    if not cfg['dry_run']:
        load_models(cfg, pairs, setup, env, longest)
    return setup


def load_models(cfg, pairs, setup, env, longest):
    """Fill in a Setup's student and optimizer, and its teachers' models and objectives. longest: tokens of
    the longest sequence."""
    # A teacher runs in the dtype of forwards. The student keeps float32 weights, gradients and
    # optimizer state; `shard` casts its forwards. All are cut into shards before they have weights, so
    # each rank reads its own part alone.
    for pair, teacher in zip(pairs, setup.teachers, strict=True):
        teacher.model = load_model(pair['teacher'], env.dtype, env.device,
                                   partial(prepare_teacher, cfg=cfg, env=env, longest=longest))
        output = make_output_objective(cfg, setup, teacher, env.device)
        teacher.objective = make_objective_terms(cfg, teacher, output, shared_size(setup.tok, teacher.tok))
        if cfg['teachers_in_turn']:
            teacher.ready = several_teachers.keep_on_host(teacher.model, env.device)
    setup.student = load_model(cfg['student'], torch.float32, env.device,
                               partial(prepare_student, cfg=cfg, env=env, longest=longest))
    barrier('reading the models', LONG_WAIT)             # or downloading them, once on each machine

    # AdamW allocates its state now, so a run that does not fit fails before the first rollout.
    setup.opt = adamw(setup.student, cfg['lr'], (cfg['beta1'], cfg['beta2']), cfg['adam_eps'],
                      cfg['weight_decay'])
    if cfg['teacher_every']:
        self_teacher.keep_average(setup.opt)


def prepare_teacher(model, cfg, env, longest):
    """A teacher that has no weights yet: it is frozen, and sharded if the config says so."""
    model.requires_grad_(False)
    prepare_model(model, cfg, longest)
    if cfg['teacher_shard']:
        shard(model, env)


def prepare_student(model, cfg, env, longest):
    """A student that has no weights yet: which of them learn, and FSDP."""
    if not model.config.tied and not any(ever_positive(cfg[key]) for key in ('opd_weight', 'reward_weight')):
        model.head.requires_grad_(False)     # Eq. (6) never reaches it
    model.checkpointing = cfg['checkpointing']
    prepare_model(model, cfg, longest)
    shard(model, env)


def prepare_model(model, cfg, longest):
    """What both have in common. longrope chooses its frequencies by the longest sequence that may come."""
    model.max_length = longest
    if cfg['compile']:                       # before the weights are cut into shards
        for block in model.blocks:
            block.compile()


def evaluate_model(cfg, setup, env, run_folder, step, side='student'):
    """Held-out scores of one of the models, the same on every rank; {} without eval_data. Its answers
    are kept in the run folder. side: 'student', or a key of setup.named_teachers."""
    tok, sets, stop, vocab = setup.tok, setup.held_out, setup.stop, setup.vocab
    if not sets or (side != 'student' and not cfg['eval_teacher']):
        return {}
    writer = nullcontext(setup.student)
    if side != 'student':
        teacher = setup.named_teachers[side]
        writer = teacher.ready(teacher.model)
        if not teacher.same_ids:             # its own prompts and stop tokens
            tok, stop, vocab = teacher.tok, teacher.tok.stop_ids, teacher.tok.size
            sets = load_eval_sets(cfg['eval_data'], tok, cfg['eval_problems'], cfg['eval_suffix'])
        if cfg['teacher_sees'] == 'solution':
            sets = self_teacher.show_in_sets(sets, tok, cfg['solution_text'])
            sets = self_teacher.with_teacher_prompts(sets)
    # Whole weights on every rank while it samples; each rank answers its share of the problems.
    with writer as sharded, gathered(sharded) as model:
        rows = sample_and_grade(model, tok, sets, cfg['eval_n'], temperature=cfg['eval_temperature'],
                                top_p=cfg['eval_top_p'], stop=stop, seed=cfg['seed'], vocab=vocab,
                                max_new_tokens=cfg['eval_max_new_tokens'] or cfg['max_new_tokens'],
                                rows=cfg['eval_rows'], rank=env.rank, world=env.world,
                                label=f'evaluate {side}, step {step}')
    keep_answers(run_folder.out, side, step, rows, list(sets), cfg['eval_show'])
    return shared_scores(rows, sets, cfg['eval_n'])


# ---- the loop ----------------------------------------------------------------------------------

def train(cfg, setup, env, run_folder):
    """The steps that are left, each a line of the log."""
    student, steps = setup.student, cfg['steps']
    clock = Clock(env.device)
    if cfg['profile'] and env.rank == 0:
        clock = ProfilingClock(env.device, run_folder.out / 'profile', run_folder.step + 1,
                               cfg['max_new_tokens'])
    with interruptible() as caught:
        for step in range(run_folder.step + 1, steps + 1):
            clock.start()
            # 1. prompts: a function of (step, seed). Answer i of the step is number i % n to slot i // n.
            # It goes to rank i % world, so the n answers to one hard prompt do not meet on one rank.
            order = prompt_order(len(setup.train), cfg['prompts_per_step'], step, cfg['seed'])
            answers = cfg['prompts_per_step'] * cfg['n']
            mine = range(env.rank, answers, env.world)
            problems = [setup.train[order[i // cfg['n']]] for i in mine]

            # 2. rollout: the random numbers of an answer are a function of (seed, step, slot, sample).
            roll = sample_answers(cfg, setup, env, problems, mine, step)
            clock.lap('sample')
            clock.update_begins()

            # 3. rows: what each teacher reads, and which positions are supervised.
            verdicts = graded(roll, setup.tok, problems)
            term_weights = {term: weight_at(step, steps, cfg[f'{term}_weight']) for term in TERMS}
            # All answers are one share, unless several teachers divide them.
            shares = [Share(setup.teachers[0], roll, problems)]
            if term_weights['reward']:
                shares[0].advantage = rewards.shared_advantages(cfg, verdicts, mine, env.device)
            if len(setup.teachers) > 1:
                shares = several_teachers.split(shares[0], setup.teachers)
            for share in shares:
                share.reading, share.mask = supervised_positions(cfg, setup.tok, share)

            # 4, 5. teacher and student, one share after the other.
            sums, looked = add_gradients(cfg, env, student, shares, step, term_weights, clock)

            # 6. update
            lr, norm = update(cfg, setup, step)
            clock.lap('update')

            row = {'step': step,
                   **objective_metrics(sums, looked, term_weights, setup.teachers[0].layer_map,
                                       cfg['opd']),
                   **rollout_metrics(roll, verdicts, shares), 'lr': lr, 'grad_norm': norm}
            row = finish_step(cfg, setup, env, row | clock.stop(), run_folder, clock)
            stop_or_save(cfg, setup, env, row, run_folder, caught)


def update(cfg, setup, step):
    """Step 6: clip the gradients and let AdamW take a step -> (learning rate, gradient norm before
    clipping)."""
    # A frozen head, or one whose term has not begun, has no gradient.
    params = [p for p in setup.student.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, cfg['grad_clip'] or math.inf)
    lr = learning_rate(step, cfg['steps'], cfg['lr'], cfg['warmup'], cfg['schedule'], cfg['min_lr'])
    for group in setup.opt.param_groups:
        group['lr'] = lr
    setup.opt.step()
    setup.opt.zero_grad()

    # A teacher that follows the student takes over its weights, or a moving average of them.
    if cfg['teacher_every'] and step % cfg['teacher_every'] == 0:
        self_teacher.move_average(setup.opt, cfg['teacher_decay'])
        self_teacher.teach_average(setup.opt, setup.student, setup.teachers[0].model)
    return lr, float(full(norm))


def is_diagnosed(step, steps, every):
    """Is this a step in which what the objective leaves out is looked at? The first and the last
    always are."""
    return step in (1, steps) or bool(every and step % every == 0)


def sample_answers(cfg, setup, env, problems, mine, step):
    """Step 2: answers with the numbers `mine`, one to each of these problems -> Rollout. The student writes
    them, or in a control (answers_by) the teacher, or they are the solutions of the problems."""
    if cfg['answers_by'] == 'solution':
        return self_teacher.written_solutions(problems, setup.tok, cfg['max_new_tokens'], env.device)
    writer = {'student': setup.student, 'teacher': setup.teachers[0].model}[cfg['answers_by']]
    slots = [i // cfg['n'] for i in mine]
    samples = [i % cfg['n'] for i in mine]
    progress = Progress('rollout', len(mine), 'answers', rank=env.rank, world=env.world,
                        longest=cfg['max_new_tokens'])
    with gathered(writer) as sampler, progress:
        roll = sample(sampler, [problem.ids for problem in problems], which=slots, samples=samples, step=step,
                      temperature=cfg['temperature'], top_k=cfg['top_k'], top_p=cfg['top_p'],
                      max_new_tokens=cfg['max_new_tokens'], stop=setup.stop,
                      vocab=setup.vocab, seed=cfg['seed'], on_poll=progress.update)
    barrier(f'the rollout of step {step}')
    return roll


def supervised_positions(cfg, tok, share):
    """Step 3: what the teacher of a share reads if it reads other ids than the student (else None), and the
    mask of supervised positions (B, T)."""
    # Each rule has a key of its own name for its size; 'all', 'last' and 'drift' need none.
    roll, teacher = share.roll, share.teacher
    size = {'last_k': cfg['last_k'], 'first_k': cfg['first_k'],
            'last_frac': cfg['last_frac'], 'first_frac': cfg['first_frac']}.get(cfg['positions'], 0)
    mask = position_mask(roll, cfg['positions'], size)
    if teacher.same_ids and cfg['teacher_sees'] == 'prompt':
        return None, mask

    # Another vocabulary, or a solution in view: the teacher reads a prompt of its own, then the answer.
    prompts_t = [problem.teacher_ids or teacher.tok.chat(problem.question) for problem in share.problems]
    reading = read_rollout(roll, prompts_t, tok, teacher.tok, teacher.model.config.context,
                           cfg['pair'], cfg['teacher_ids'])
    return reading, mask & (reading.column >= 0)         # -1: the teacher has no state there


def add_gradients(cfg, env, student, shares, step, term_weights, clock):
    """Steps 4 and 5 for each share of the answers: add the gradient of all terms to the student's .grad.
    -> the sums of `accumulate`, and those of `diagnose` if the step is diagnosed."""
    # The weights of the rows sum to 1 over all ranks and all shares.
    answers = cfg['prompts_per_step'] * cfg['n']
    tokens = all_reduce(sum(share.mask.sum() for share in shares))
    looks = is_diagnosed(step, cfg['steps'], cfg['diagnose_every'])
    sums = {}
    looked = {}
    for share in shares:
        weights = position_weights(share.mask, cfg['loss_average'], answers, tokens)
        objective = share.teacher.objective
        micro_batches = partial(cut_rollout, share.roll, budget=cfg['token_budget'], reading=share.reading,
                                offset=cfg['position_offset'], advantage=share.advantage)
        with share.teacher.ready(share.teacher.model) as teacher:
            # What the objective leaves out is looked at now and then, at a few of the positions.
            if looks:
                part = cfg['diagnose_rows'] / max(1, int(tokens))
                few_weights = weights * diagnostic_mask(share.roll, share.mask, step, part)
                left_out = objective.only([term for term in ('oprd', 'opd') if term_weights[term] == 0])
                add(looked, diagnose(student, teacher, micro_batches(weights=few_weights), left_out))
                clock.lap('diagnose')

            # FSDP averages gradients over ranks, but the weights already sum to 1 over them, so the gradient
            # is scaled by their number.
            add(sums, accumulate(student, teacher, micro_batches(weights=weights), objective, term_weights,
                                 scale=env.world, lap=clock.lap))
    return sums, looked


def finish_step(cfg, setup, env, row, run_folder, clock):
    """Check, evaluate, log and print a step -> its row, with the scores if it was evaluated."""
    step, steps = row['step'], cfg['steps']
    if not math.isfinite(row['loss'] + row['grad_norm']):
        raise UserError(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; "
                        'nothing of this step is saved; lower lr=')

    # What is measured only now and then.
    if is_diagnosed(step, steps, cfg['diagnose_every']):
        row['adam/below_eps'] = share_below_eps(setup.opt)
    evaluates = step == steps or bool(cfg['eval_every'] and step % cfg['eval_every'] == 0)
    if setup.held_out and evaluates:
        row |= scores_as_logged(evaluate_model(cfg, setup, env, run_folder, step), 'eval')

    # Every step is a line of log.jsonl; the terminal shows some of them.
    run_folder.log(row)
    if evaluates and env.rank == 0:
        figures.redraw(run_folder.out)
    if step == 1:
        for line in first_step_notes(row, cfg['adam_eps']):
            print0(line)
    if step % cfg['log_every'] == 0 or step == steps:
        print0(step_line(row, steps, clock.eta(steps - step)))
    return row


def stop_or_save(cfg, setup, env, row, run_folder, caught):
    """Save a checkpoint where one is due: every `save_every` steps, at the end, and where the student was
    better on the held-out problems than ever before. caught: signals; if any rank has caught one, all
    ranks save and stop."""
    # All ranks must agree, or those that go on would wait for the others for ever.
    halt = torch.tensor(float(bool(caught)), device=env.device)
    halt = bool(all_reduce(halt, 'max'))
    step = row['step']
    if halt or step % cfg['save_every'] == 0 or step == cfg['steps'] or run_folder.is_best(step):
        write_model = partial(write_student, cfg, setup.student, env)
        save(run_folder, step, setup.student, setup.opt, write_model, cfg['keep'])
    if halt and step < cfg['steps']:
        print0(f'stopped after step {step}; the same command goes on from there')
        before_leaving()
        raise KeyboardInterrupt


def write_student(cfg, student, env, folder, weights):
    """A Hugging Face folder of the student in the dtype of forwards, its tokenizer beside it. weights:
    (name, float32 tensor) one by one."""
    weights = ((name, weight.to(env.dtype)) for name, weight in weights)
    save_model(student, folder, snapshot(cfg['student']), weights)


def objective_metrics(sums, looked, weights, layers, opd):
    """A step's sums, from `accumulate` and `diagnose` -> the numbers to log, over all ranks. What
    this step did not look at is not there. Entropies and KL in nats. weights: {term: its weight}. layers: the
    student's, in the order of the sums. opd: the key, which output-space objective it is."""
    # Sums over this rank's rows become sums over all rows.
    sums = {name: all_reduce(value).tolist() for name, value in sums.items()}
    looked = {name: all_reduce(value).tolist() for name, value in looked.items()}

    # Eq. (7), and its terms.
    row = {'loss': 0.0}
    for term, weight in weights.items():
        name = f'loss/{term}'
        if name in sums:
            row[name] = sums[name]
            row['loss'] += weight * sums[name]
    if 'layer_loss' in sums:
        for l, layer_loss in zip(layers, sums['layer_loss'], strict=True):
            row[f'loss/layer/{l}'] = layer_loss

    # Each of these comes from the step's own rows if its term runs, else from the rows that were
    # looked at.
    for part in (sums, looked):
        if 'layer_cosine' in part and part['weight']:
            cosines = [cosine / part['weight'] for cosine in part['layer_cosine']]
            row['rep/cos'] = sum(cosines) / len(cosines)
            for l, cosine in zip(layers, cosines, strict=True):
                row[f'rep/cos/{l}'] = cosine
        if 'statistics' in part and part['statistics'][0]:
            weight, kl, entropy_s, entropy_t, common = part['statistics']
            row['opd/kl'] = kl / weight
            row['entropy/student'] = entropy_s / weight
            row['entropy/teacher'] = entropy_t / weight
            if opd != 'byte':                # the next byte has no likeliest tokens
                row['opd/overlap16'] = common / weight
    return row


def graded(roll, tok, problems):
    """Are the answers right? True, False, or None where the right answer is not known: a list."""
    verdicts = []
    for ids, i in zip(roll.answers(), roll.prompt.tolist(), strict=True):
        known = problems[i].answer
        verdicts.append(None if known is None else grade(tok.decode(ids), known))
    return verdicts


def rollout_metrics(roll, verdicts, shares):
    """Lengths, finished share and accuracy of a step's answers, over all ranks."""
    # Problems without a known answer are not graded.
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    # Counts are summed over ranks first, and divided afterwards: ranks may hold unequal shares.
    written = int(roll.resp_len.sum())
    exact = 0.0
    for share in shares:                     # a teacher that reads the student's ids reads all bytes with it
        align = 1.0 if share.reading is None else share.reading.align
        exact += align * int(share.roll.resp_len.sum())
    counts = [written, int(roll.stopped.sum()), len(roll.ids), sum(verdicts), len(verdicts), exact]
    counts = torch.tensor(counts, dtype=torch.float32, device=roll.ids.device)
    tokens, stopped, answers, right, graded, exact = all_reduce(counts).tolist()
    row = {'len/mean': tokens / answers, 'finish': stopped / answers, 'tokens': tokens}
    if any(share.reading is not None for share in shares):
        row['align'] = exact / tokens
    if graded:
        row['acc/rollout'] = 100 * right / graded
    return row


# ---- the script ---------------------------------------------------------------------------------

def main(cfg):
    env = start(cfg['device'], cfg['dtype'], cfg['shard_ranks'], cfg['timeout'])
    print0('config:', ' '.join(f'{key}={value!r}' for key, value in cfg.items() if value != default[key]))
    print0('on:', ' '.join(f'{key}={value}' for key, value in versions(env).items()),
           f'dtype={str(env.dtype)[6:]}')
    for key in ('student', 'teacher', 'data'):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; set {key}= (see configs/toy.py)")

    # Neither today nor 'auto' must mean something else at resume.
    cfg = cfg | {'date': day_of_start(cfg['date'], stored_config(cfg['out_dir']).get('date'))}
    asked = cfg | {'dtype': str(env.dtype)[6:]}

    # A run of another config is an error, before anything is loaded; a finished run shows its result.
    may_change = free + later
    out = open_run(cfg['out_dir'], asked, may_change)
    results = read_results(out)
    if results and results['steps'] >= cfg['steps']:
        print0(f"{out}: finished at step {results['steps']}; raise steps= to go on, or give another out_dir=")
        print0('\n'.join(show(results)))
        return
    check_resumable(out)
    check_trackers(cfg['report'], env.rank)
    stay_at(started_commits(out))            # ids of the hub mean what they meant at the start
    if toy.ends_dry_run(cfg):
        return

    # The toy makes its own models and problems, once. A self-teacher is the student, read a second time.
    cfg = toy.prepare(cfg, env)
    cfg = self_teacher.named(cfg)
    setup = prepare(cfg, env)
    if cfg['dry_run']:
        return
    with owned(out, env.rank):
        names = log_names(cfg, setup, env.device)
        run_folder = begin(out, asked, may_change, env.rank, names)
        resume(run_folder, setup.student, setup.opt, later)
        if cfg['teacher_every']:
            self_teacher.teach_average(setup.opt, setup.student, setup.teachers[0].model)
        with tracked(run_folder, cfg['report']):
            run_in_folder(cfg, setup, env, run_folder)


def run_in_folder(cfg, setup, env, run_folder):
    """Take the steps that are left, write table and figure."""
    if env.rank == 0:
        pairs = several_teachers.configs(cfg)
        note_start(run_folder, start_record(cfg, pairs, env, setup.train, setup.held_out))

    # At the start, the scores of all models.
    if not run_folder.rows:
        scores = {}
        row = {'step': 0}
        for side in ('student', *setup.named_teachers):
            scores[side] = evaluate_model(cfg, setup, env, run_folder, 0, side)
            row |= scores_as_logged(scores[side], 'eval' if side == 'student' else side)
        run_folder.log(row)
        print0('\n'.join(table({side: values for side, values in scores.items() if values})))

    # The loop, then table and figure.
    train(cfg, setup, env, run_folder)
    if env.rank == 0:
        out = run_folder.out
        results = summary(run_folder.rows)
        write_json(out / 'results.json', results)
        print0('\n'.join(show(results)))
        print0(f"{out}: {results['seconds']:.0f} s from step 0 on; model in last/, figure in curve.png")


def show(results):
    """results.json -> the lines of the result table."""
    sides = [side for side in results if side.startswith(('student', 'teacher', 'distilled'))]
    rows = {side: results[side] for side in sides if results[side]}
    lines = table(rows)
    if results['rep_cos']:
        lines.append('rep cosine {:.3f} -> {:.3f}'.format(*results['rep_cos']))
    return lines


if __name__ == '__main__':
    run(main, lambda: load_config(script='distill.py'))
