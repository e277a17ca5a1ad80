"""
Stage 1 of OPRD-Bridge (section 3.3): a low-rank interface between two frozen models of any width,
depth and vocabulary, found in one pass over the student's own answers.

    1. collect: the student answers `bridge_prompts` problems; the ids go to rollouts.jsonl
    2. read:    both models read each answer once; moments of their states are summed for every
                pair of layers
    3. fit:     P_t by eigenvectors of the teacher's covariance, Eq. (12), and P_s by ridge
                regression, Eq. (13)
    4. judge:   on held-out prompts, per layer and rank: cosine, R^2, Theorem 3, and controls

Simpler than usual: nothing is trained. The fit is a closed form and gives every rank at once, since
rank r is the first r rows. The paper's twenty epochs (bridge_fit=adamw) can be run for comparison.
A teacher with another vocabulary reads the same text in its own tokens
(cross_tokenizer/pairing.py). Student positions inside a teacher token (class 1) have a P_s of their
own.

    python bridge.py configs/toy_bridge.py                           CPU, or one GPU
    torchrun --nproc_per_node=8 bridge.py configs/bridge_qwen.py     eight GPUs share the answers

Writes bridge.safetensors, bridge.json and bridge.png into the folder that the key `bridge` names;
distill.py (stage 2) reads them there. If it is run again, it keeps the answers that it has. --dry-run
checks everything but the weights, shows the plan, and writes nothing. What it does not do: models that
are too large for one GPU.

Memory on the device beside both models, for 28 layers of 2048 and 2560 numbers at full width, by
count: 7.2 GB of moments (those of the fit are freed before those of the judgement are made), 3.1 GB
of P_t and P_s in float64, and for a micro-batch of 32,768 rows 8.5 GB of states in bfloat16 and 6
GB for one layer at a time in float64. That is 25 GB at the peak, and less with a smaller
token_budget.

Letters: K supervised rows of a micro-batch, B answers, T tokens, L layers, d width (d_s student,
         d_t teacher), R full rank: the smaller width, or the number of rows less one; c class; lam,
         rho2: see bridge_parts/closed_form.py.
"""
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bridge_parts import saved
from bridge_parts.adamw_fit import adamw_fit
from bridge_parts.closed_form import (
    LayerBridge,
    Moments,
    cosine_sums,
    energy,
    match_by_cka,
    predicted_share,
    principal_directions,
    ridge,
)
from bridge_parts.collection import Answer, first_date, open_collection
from bridge_parts.report import COSINES, report, table
from configs import load_config
from cross_tokenizer.pairing import read_rollout
from formats.huggingface import load_model, read_config
from formats.problems import load_problems
from formats.tokenizer import check_ids, load_tokenizer, same_vocabulary, shared_size
from rollout import Rollout, sample
from step import micro_batches, position_mask
from studies import toy
from studies.figures import bridges
from support.files import owned
from support.preflight import check_lengths, match_layers, preflight_bridge
from support.progress import Progress, counted
from support.runtime import (
    UserError,
    all_gather,
    all_reduce,
    barrier,
    day_of_start,
    padded_length,
    print0,
    run,
    start,
)

FITS = ('ridge', 'adamw', 'random', 'shuffled')
CKA_ANSWERS = 16                # answers of each process that layers are matched on
CKA_ROWS = 1024                 # about so many of their positions


# ---- 1. collect ------------------------------------------------------------------------------

def collect(student, problems, collection, cfg, env):
    """The student's answers to `bridge_prompts` problems -> [Answer], the same on every process.

    Answers are appended to rollouts.jsonl as they come; what is there is not sampled again.
    """
    # Every process has read the file before one of them writes it.
    barrier()
    if env.rank == 0:
        collection.make_whole()

    # The random numbers of an answer are a function of (seed, step, slot) alone, so an interrupted
    # run goes on with the same ones. Step -2 is neither training's (1, 2, ...) nor evaluation's (-1). Each
    # process samples every world-th slot of a batch.
    order = collection.order
    answers = collection.answers
    total = len(order)
    batch = max(1, cfg['eval_rows']) * env.world
    share = len(range(len(answers), total, env.world))       # answers of process 0, which shows them
    progress = Progress('collect', share, 'answers', rank=env.rank, world=env.world,
                        longest=cfg['max_new_tokens'])
    with progress:
        while len(answers) < total:
            slots = range(len(answers), min(len(answers) + batch, total))
            sampled = {}
            my_slots = slots[env.rank::env.world]
            progress.next_call()
            if my_slots:
                prompts = [problems[order[slot]].ids for slot in my_slots]
                roll = sample(student, prompts, which=list(my_slots), step=-2, stop=collection.stop,
                              vocab=collection.vocab, on_poll=progress.update, **collection.draw)
                columns = zip(my_slots, roll.answers(), roll.stopped.tolist(), strict=True)
                for slot, ids, stopped in columns:
                    sampled[slot] = Answer(order[slot], ids, stopped)

            # Everybody gets everybody's answers, in the order of the slots.
            for part in all_gather(sampled):
                sampled |= part
            new = [sampled[slot] for slot in slots]
            answers += new
            if env.rank == 0:
                collection.append(new)
    return answers


def as_rollout(answers, problems, device):
    """Answers -> Rollout, right-padded; its `prompt` is the problem's number."""
    prompts = [problems[answer.problem].ids for answer in answers]
    prompt_len = torch.tensor([len(prompt) for prompt in prompts])           # (B,)
    resp_len = torch.tensor([len(answer.ids) for answer in answers])         # (B,)
    T = padded_length(int((prompt_len + resp_len).max()), device)
    ids = torch.zeros(len(answers), T, dtype=torch.long)                     # (B, T)
    for row, prompt, answer in zip(ids, prompts, answers, strict=True):
        row[:len(prompt) + len(answer.ids)] = torch.tensor(prompt + answer.ids)
    stopped = torch.tensor([answer.stopped for answer in answers])           # (B,)
    numbers = torch.tensor([answer.problem for answer in answers])           # (B,)
    columns = (ids, prompt_len, resp_len, stopped, numbers)
    return Rollout(*(column.to(device) for column in columns))


# ---- 2. read ---------------------------------------------------------------------------------

@dataclass
class Pair:
    """Both frozen models and how they read the student's answers."""
    student: object             # Model
    teacher: object
    tok_s: object               # Tokenizer
    tok_t: object
    problems: list              # training problems
    layer_map: dict             # {student layer: teacher layer}
    cfg: dict
    env: object                 # this process: its rank, how many there are, device, dtype
    held_out: int = 1           # answers that judge the fit, the last ones
    exact: list = field(default_factory=list)        # (tokens of class 0, tokens) per micro-batch
    forwards: int = 0           # answers that this process has read so far

    @torch.no_grad()
    def read(self, answers, name='', teacher_layers=None):
        """Read this process's share of some answers, one micro-batch at a time. Yields the states
        at the supervised positions: {student layer: (K, d_s)}, {teacher layer: (K, d_t)}, and
        inside (K,), which is True for rows of class 1.

        name: of the line that shows how far it is; without a name there is none. teacher_layers:
        which of them, default those of layer_map.
        """
        student_layers = list(self.layer_map)
        teacher_layers = teacher_layers or sorted(set(self.layer_map.values()))
        answers = answers[self.env.rank::self.env.world]
        lengths = []
        for answer in answers:
            length = len(self.problems[answer.problem].ids) + len(answer.ids)
            lengths.append(padded_length(length, self.env.device))
        groups = micro_batches(lengths, self.cfg['token_budget'])
        for group in counted(groups, name, 'batches', self.env.rank, self.env.world):
            roll = as_rollout([answers[i] for i in group], self.problems, self.env.device)
            reading = self.as_teacher_reads(roll)
            at, at_t, inside = self.supervised_rows(roll, reading)
            states_t = self.teacher.hidden(reading.ids, teacher_layers, at_t)
            states_s = self.student.hidden(roll.ids, student_layers, at)

            # For the report: how often both have read the same bytes, and what reading has cost.
            tokens = int(roll.resp_len.sum())
            self.exact.append((reading.align * tokens, tokens))
            self.forwards += len(group)
            by_layer_s = dict(zip(student_layers, states_s, strict=True))
            by_layer_t = dict(zip(teacher_layers, states_t, strict=True))
            yield by_layer_s, by_layer_t, inside

    def as_teacher_reads(self, roll):
        """What the teacher will read in distill.py -> Reading: with the student's vocabulary the same
        ids; with another one its own rendering of the prompts, and the answers' text in its tokens."""
        same_ids = same_vocabulary(self.tok_s, self.tok_t)
        prompts_t = {}
        for number in set(roll.prompt.tolist()):
            problem = self.problems[number]
            prompts_t[number] = problem.ids if same_ids else self.tok_t.chat(problem.question)
        context = self.teacher.config.context
        return read_rollout(roll, prompts_t, self.tok_s, self.tok_t, context,
                            self.cfg['pair'], self.cfg['teacher_ids'])

    def supervised_rows(self, roll, reading):
        """The positions that distill.py will supervise -> flat positions in the student's ids (K,)
        and in the teacher's ids (K,), and inside (K,)."""
        sizes = {key: self.cfg[key] for key in ('last_k', 'first_k', 'last_frac', 'first_frac')}
        which = self.cfg['positions']
        mask = position_mask(roll, which, sizes.get(which, 0))                   # (B, T)

        # Where the teacher has no state (-1), there is nothing to learn from.
        mask = mask & (reading.column >= 0)
        at = mask.flatten().nonzero().squeeze(-1)                            # (K,)
        row = torch.arange(len(roll.ids), device=mask.device)[:, None]       # (B, 1)
        at_t = (row * reading.ids.shape[1] + reading.column)[mask]           # (K,)
        return at, at_t, reading.inside[mask]

    def moments(self, answers, name, shuffle=False):
        """{student layer: Moments} of some answers, over all processes. shuffle: a control in which
        each student row is paired with the teacher's row half a micro-batch away."""
        moments = self.no_moments()
        for states_s, states_t, inside in self.read(answers, name):
            for layer, layer_t in self.layer_map.items():
                y = states_t[layer_t]                                        # (K, d_t)
                if shuffle:
                    y = y.roll(len(y) // 2, 0)
                moments[layer].add(states_s[layer], y, inside)
        for layer, sums in moments.items():
            reduce_moments(sums)
            if not all(total.isfinite().all() for total in sums.sums.values()):
                raise UserError(f'layer {layer}: states that are NaN or infinite; look at the weights of '
                                'both models, or set dtype=float32')
        return moments

    def no_moments(self):
        """{student layer: Moments} of no rows yet."""
        d_s = self.student.config.d
        d_t = self.teacher.config.d
        return {layer: Moments(d_s, d_t, self.env.device) for layer in self.layer_map}


def reduce_moments(moments):
    """Sum over all processes, in place."""
    for total in moments.sums.values():
        all_reduce(total)


def layers_by_cka(pair, answers):
    """layer_map='cka': {student layer: the teacher layer with the largest linear CKA}, over about
    CKA_ROWS positions of a few answers. Process 0 decides, from its share."""
    every_layer = list(range(1, pair.teacher.config.L + 1))
    answers = answers[:CKA_ANSWERS * pair.env.world]
    batches = list(pair.read(answers, 'cka', every_layer))
    states = ({}, {})                                # of the student, of the teacher
    for side in (0, 1):
        for layer in batches[0][side]:
            rows = torch.cat([batch[side][layer] for batch in batches])      # (all K, d)
            states[side][layer] = rows[::1 + len(rows) // CKA_ROWS]
    return all_gather(match_by_cka(*states))[0]


# ---- 3. fit ----------------------------------------------------------------------------------

def fit(pair, answers, cfg):
    """A bridge of full rank -> {student layer: LayerBridge} in float64, the same on every
    process."""
    kind = cfg['bridge_fit']
    assert kind in FITS, kind
    moments = pair.moments(answers, 'fit', shuffle=kind == 'shuffled')
    bridge = {}
    for layer in list(moments):
        sums = moments.pop(layer)                    # its memory is freed when the layer is fitted
        mean, P_t, lam = principal_directions(sums)

        # The full rank R: a student state of d_s numbers fills no more than d_s directions, and n
        # rows no more than n - 1 around their mean.
        count = sums.central().count
        R = min(len(P_t), pair.student.config.d, count - 1)
        if R < 1 or lam.sum() <= 1e-12 * mean.square().sum():
            raise UserError(f'layer {layer}: {count} rows of the teacher that do not vary; '
                            'nothing to bridge, look at data= and positions=')
        P_t = P_t[:R].clone()                                                # (R, d_t)
        P_s, b_s = ridge(sums, mean, P_t, cfg['bridge_ridge'], cfg['bridge_bias'])
        bridge[layer] = LayerBridge(mean, P_t, P_s, b_s)

    # For comparison: the same P_t with the paper's fit of P_s.
    if kind == 'adamw':
        fitted = adamw_fit(pair, answers, bridge, cfg['bridge_lr'], cfg['seed'])
        for layer, (P_s, b_s) in fitted.items():
            bridge[layer] = bridge[layer]._replace(P_s=P_s, b_s=b_s)

    # As a control: the same P_t with noise for P_s.
    if kind == 'random':
        generator = torch.Generator().manual_seed(cfg['seed'])
        for layer, closed_form in bridge.items():
            _, R, d_s = closed_form.P_s.shape
            noise = torch.randn(R, d_s, generator=generator).to(closed_form.P_s) * d_s**-0.5
            P_s = torch.stack([noise, noise])                                # (2, R, d_s)
            b_s = torch.zeros_like(closed_form.b_s)                          # (2, R)
            bridge[layer] = closed_form._replace(P_s=P_s, b_s=b_s)
    for layer, parts in bridge.items():
        if not all(part.isfinite().all() for part in parts):
            raise UserError(f'layer {layer}: the fit diverged; lower bridge_lr=, or raise bridge_ridge=')
    return bridge


# ---- 4. judge --------------------------------------------------------------------------------

def judge(pair, answers, bridge, seed):
    """Held-out answers through a bridge of full rank -> {student layer: {name: what was measured}}.

    At every rank, (R,): the mean cosine to the teacher's z of what `guesses` lists ('cos' is the
    bridge itself), and lam, rho2 and E of Theorem 3. Numbers: 'rows', the share of 'class 1', and
    'total', the variance of the teacher's states.
    """
    device = pair.env.device
    R, d_s = next(iter(bridge.values())).P_s.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    random_P_s = torch.randn(R, d_s, generator=generator, dtype=torch.float64).to(device)
    moments = pair.no_moments()
    cosines = {}
    for layer in bridge:
        cosines[layer] = torch.zeros(len(COSINES), R, dtype=torch.float64, device=device)

    # Cosines need the rows themselves. Everything else follows from their moments.
    for states_s, states_t, inside in pair.read(answers, 'judge'):
        for layer, fitted in bridge.items():
            x = states_s[layer].double()                                     # (K, d_s)
            y = states_t[pair.layer_map[layer]].double()                     # (K, d_t)
            moments[layer].add(x, y, inside)
            z_t = (y - fitted.mean) @ fitted.P_t.t()                         # (K, R)
            for i, z_s in enumerate(guesses(x, inside, fitted, random_P_s)):
                cosines[layer][i] += cosine_sums(z_s, z_t)

    judged = {}
    for layer, fitted in bridge.items():
        reduce_moments(moments[layer])
        rows = moments[layer].central()
        mean_cosines = all_reduce(cosines[layer]) / rows.count               # (4, R)
        lam, rho2 = predicted_share(moments[layer], fitted)
        judged[layer] = dict(zip(COSINES, mean_cosines, strict=True)) | {
            'rows': rows.count,
            'class 1': float(moments[layer].sums['n'][1]) / rows.count,
            'lam': lam,
            'rho2': rho2,
            'E': energy(lam, rho2),
            'total': float(rows.yy.diagonal().sum()),
        }
    return judged


def guesses(x, inside, fitted, random_P_s):
    """What is compared with the teacher's z of student rows x (K, d_s). Yields, in the order of
    COSINES, each (K, R): the bridge, a random P_s, the bridge of the row half a micro-batch away,
    and the bridge of the mean of x."""
    c = inside.long()                                                        # (K,)
    P_s = fitted.P_s
    z_s = torch.where(inside[:, None], x @ P_s[1].t(), x @ P_s[0].t())       # (K, R)
    z_s = z_s + fitted.b_s[c]
    yield z_s
    yield x @ random_P_s.t()
    yield z_s.roll(len(z_s) // 2, 0)

    # The mean of x within each class. No row asks for the guess of a class without rows.
    of_means = []
    for k in (0, 1):
        mean = x[c == k].mean(0) if (c == k).any() else torch.zeros_like(x[0])
        of_means.append(mean @ P_s[k].t() + fitted.b_s[k])                   # (R,)
    yield torch.stack(of_means)[c]


def align(exact, device):
    """Share of the answers' tokens that are of class 0, over all processes.

    exact: (tokens of class 0, tokens) of each micro-batch. They are summed on the device, because
    nccl cannot reduce a CPU tensor.
    """
    counts = torch.tensor(exact, dtype=torch.float64, device=device).sum(0)  # (2,)
    same, tokens = all_reduce(counts).tolist()
    return same / tokens


# ---- all of it -------------------------------------------------------------------------------

def load_text(cfg, env):
    """Read and check everything but the weights, and show the plan -> (Pair without models, Collection)."""
    # The shapes of both models, and their tokenizers.
    toks = []
    shapes = []
    for side in ('student', 'teacher'):
        shape = read_config(cfg[side])
        tok = load_tokenizer(cfg[side], enable_thinking=cfg['enable_thinking'], date=cfg['date'])
        check_ids(side, shape.V, tok)
        toks.append(tok)
        shapes.append(shape)

    # The problems: do their answers fit into the student's context, and the work into the memory? Of what is
    # longer than the teacher's context `Pair.read` takes care.
    layer_map = match_layers(cfg, *shapes)
    problems = load_problems(cfg['data'], toks[0], longest=cfg['max_prompt_tokens'])
    check_lengths(cfg, shapes[0], shapes[0], problems, [])
    preflight_bridge(cfg, env, shapes, layer_map, problems, shared_size(*toks))
    collection = open_collection(cfg, problems, *toks)

    # Whole prompts are held out, never single rows of one.
    total = len(collection.order)
    held_out = max(1, round(cfg['bridge_held_out'] * total))
    if min(total - held_out, held_out) < env.world:
        raise UserError(f'{total} answers, {held_out} of them held out, for {env.world} rank(s); raise '
                        'bridge_prompts')
    print0(f'plan: {total} answers of up to {cfg["max_new_tokens"]} tokens, {len(collection.answers)} of '
           f'them there, {held_out} held out; student layer -> teacher layer: {layer_map}; '
           f'{cfg["ranks"] or env.world} rank(s)')
    return Pair(None, None, *toks, problems, layer_map, cfg, env, held_out=held_out), collection


def main(cfg):
    env = start(cfg['device'], cfg['dtype'], timeout=cfg['timeout'])
    if cfg['teacher_shard']:
        raise UserError('teacher_shard=True: in bridge.py ranks read different numbers of micro-batches, so '
                        'each needs a whole teacher; set it to False here')
    for key in ('student', 'teacher', 'data', 'bridge'):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; set {key}= (see configs/toy_bridge.py)")
    saved.check_folder(cfg['bridge'], cfg['out_dir'])
    cfg = cfg | {'eval_data': ''}                    # nothing is evaluated here: no toy is made for it
    if toy.ends_dry_run(cfg):
        return

    # What can be refused is refused before the slow part. Prompts may hold the date: a collection that goes
    # on the next day asks as it asked on the first.
    cfg = toy.prepare(cfg, env)                      # fills in the toy's paths
    cfg = cfg | {'date': day_of_start(cfg['date'], first_date(cfg['bridge']))}
    pair, collection = load_text(cfg, env)
    if cfg['dry_run']:
        return

    # The weights come before the folder, so that a refused command leaves nothing behind.
    pair.student = load_model(cfg['student'], env.dtype, env.device).requires_grad_(False)
    pair.teacher = load_model(cfg['teacher'], env.dtype, env.device).requires_grad_(False)
    with owned(cfg['bridge'], env.rank):
        # The file is read again, because another process may have written until a moment ago.
        collection = open_collection(cfg, pair.problems, pair.tok_s, pair.tok_t)
        make_bridge(pair, collection, cfg, env)


def make_bridge(pair, collection, cfg, env):
    """The four stages, and what they write."""
    # 1. collect
    answers = collect(pair.student, pair.problems, collection, cfg, env)
    fit_answers = answers[:-pair.held_out]
    held_out_answers = answers[-pair.held_out:]

    # 2, 3. read and fit
    clock = time.perf_counter()
    if cfg['layer_map'] == 'cka':
        pair.layer_map = layers_by_cka(pair, fit_answers)
        print0(f'layers by CKA: {pair.layer_map}')
    bridge = fit(pair, fit_answers, cfg)
    forwards = pair.forwards / max(1, len(fit_answers[env.rank::env.world]))
    seconds = time.perf_counter() - clock

    # 4. judge
    judged = judge(pair, held_out_answers, bridge, cfg['seed'])
    share = align(pair.exact, env.device)
    figures = {'align': share, 'forwards per answer': forwards, 'seconds': seconds}
    figures |= report(judged, pair.layer_map, cfg['bridge_rank'])
    print0('\n'.join(table(figures)))

    # Both models, how they were read and how the bridge was fitted go into its file.
    if env.rank == 0:
        out = Path(cfg['bridge'])
        made = saved.fingerprint(cfg, pair.student.config, pair.teacher.config, pair.tok_s, pair.tok_t)
        saved.save_bridge(out, bridge, made | saved.settings_of_fit(cfg, pair.layer_map), figures)
        bridges([out], out / 'bridge.png')
        print0(f'{out}: bridge.safetensors, bridge.json, bridge.png; {seconds:.1f} s for the fit')
    barrier()


if __name__ == '__main__':
    run(main, lambda: load_config(script='bridge.py'))
