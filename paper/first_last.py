"""
Figure 8: before training, how alike are the last-layer states of student and teacher over the first k and
the last k tokens of an answer?

    python -m paper figure8 out/toy                        the models and the sampling of a run, or its seeds
    python -m paper figure8 student=FOLDER teacher=FOLDER data=FILE max_new_tokens=2048
    python -m paper figure8 config=configs/toy_bridge.py   a pair that no run has, here through a bridge

It needs no training. The untrained student answers the prompts of the run's first steps with the run's own
random numbers, so its first answers are those that the run was trained on in step 1. Both models read the
answers, and the cosine of their last-layer states is taken at every response position. Through a bridge
(`bridge=`) it is the cosine in the space of the bridge.

    first k    the mean over the first k positions of an answer, then over the answers, as Eq. (6) averages
    last k     the same over the last k positions, which the paper supervises (k = 2000)

An answer of fewer than k tokens gives all its positions to both, so the curves meet at the longest answer.
The number below the panels is a control: the cosine to the teacher's state at the same position t of another
answer, the next one in the micro-batch. It is what any two answers have in common, for example the mean of
all states. Where a micro-batch has one answer alone, its positions have no control.

The figure is a measurement and no theorem, and the cosine is that of raw states: a few large coordinates
can decide it. The toy's answers have 40 tokens, and every sixth one is the result of an operation. Where it
is predicted, student and teacher differ most, which makes the teeth of the curves: the cosine is 0.62 there
and 0.94 or more elsewhere (seed 1: 0.75 and 0.95; 64 answers of each seed of configs/toy.py). How late a
token comes hardly matters in them. The control is as high as 0.57, because all answers have the same form.

Simpler than usual: one process, and models that fit on one device. Writes first_last.json, figure8.png and
figure8.pdf.

Letters: B answers, T tokens (columns), K positions, t response position, d width, r rank of a bridge.
"""
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from bridge_parts.saved import fingerprint, load_bridge
from configs import default, load_config
from cross_tokenizer.pairing import read_rollout
from formats.hub import snapshot, stay_at
from formats.huggingface import load_model, read_config
from formats.problems import load_problems, prompt_order
from formats.tokenizer import load_tokenizer, same_vocabulary, shared_size, stop_set
from losses import BridgeTerm, HiddenTerm
from paper.runs import Missing, of_kind, read_runs
from rollout import sample
from step import micro_batches, position_mask
from studies import toy
from studies.drawing import COLUMN, PAGE, draw_seeds, look_of, new_figure, paper_style, save
from support.files import write_json
from support.preflight import match_layers
from support.provenance import read_starts, started_commits, weights_digest
from support.runtime import UserError, start
from teacher import hidden_rows

ANSWERS = 128                   # at least so many are sampled, whole steps of the run
POINTS = 60                     # values of k; with more tokens than these, k grows by a constant factor

# What decides the measurement beside the seed and the bridge's folder. Runs that agree in it are seeds of one
# method.
DECIDES = ('student', 'teacher', 'data', 'max_prompt_tokens', 'enable_thinking', 'prompts_per_step', 'n',
           'max_new_tokens', 'temperature', 'top_k', 'top_p', 'layer_map', 'bridge_rank', 'pair',
           'teacher_ids', *(key for key in default if key.startswith('toy_') and key != 'toy_dir'))


# ---- both models, as a run reads them ------------------------------------------------------------

@dataclass
class Pair:
    """Two frozen models, and how the teacher reads the student's answers."""
    cfg: dict                   # every 'toy' replaced by a path
    student: object             # Model
    teacher: object
    tok_s: object               # Tokenizer
    tok_t: object
    problems: list              # training problems
    layer_map: dict             # {student layer: teacher layer}
    bridge: object              # bridge_parts.saved.Bridge, or None
    device: object

    def title(self):
        """What kind of pair it is, for a reader."""
        if self.bridge is None:
            return 'same architecture'
        kind = 'another width' if same_vocabulary(self.tok_s, self.tok_t) else 'another vocabulary'
        return f'{kind}, r = {self.bridge.rank}'

    def sample_step(self, step):
        """The answers that this student gives in a training step -> Rollout."""
        cfg = self.cfg
        order = prompt_order(len(self.problems), cfg['prompts_per_step'], step, cfg['seed'])
        slots = []
        samples = []
        for number in range(cfg['prompts_per_step'] * cfg['n']):
            slots.append(number // cfg['n'])
            samples.append(number % cfg['n'])
        prompts = [self.problems[order[slot]].ids for slot in slots]
        roll = sample(self.student, prompts, which=slots, samples=samples, step=step,
                      temperature=cfg['temperature'], top_k=cfg['top_k'], top_p=cfg['top_p'],
                      max_new_tokens=cfg['max_new_tokens'], stop=stop_set(self.tok_s, self.tok_t),
                      vocab=shared_size(self.tok_s, self.tok_t), seed=cfg['seed'])

        # Not the place in this list, but the problem's number, as bridge.py stores it.
        roll.prompt = torch.tensor([order[slot] for slot in slots], device=roll.ids.device)
        return roll

    @torch.no_grad()
    def read(self, roll, layer_map, which='all', size=0):
        """Both models read a rollout -> of each micro-batch: row (K,) and t (K,), which say where its
        positions are, inside (K,), and {student layer: states (K, d_s)}, {student layer: the teacher's (K,
        d_t)}. which, size: the positions, see step.position_mask. `roll.prompt` has numbers of problems."""
        mask = position_mask(roll, which, size)                              # (B, T)
        reading = None
        if not same_vocabulary(self.tok_s, self.tok_t):
            prompts_t = {}
            for number in set(roll.prompt.tolist()):
                prompts_t[number] = self.tok_t.chat(self.problems[number].question)
            reading = read_rollout(roll, prompts_t, self.tok_s, self.tok_t, self.teacher.config.context,
                                   self.cfg['pair'], self.cfg['teacher_ids'])
            mask = mask & (reading.column >= 0)

        for group in micro_batches(roll.length.tolist(), self.cfg['token_budget']):
            T = int(roll.length[group].max())
            ids = roll.ids[group, :T]                                        # (b, T)
            at = mask[group, :T].flatten().nonzero().squeeze(-1)             # (K,)
            ids_t, at_t, inside = ids, at, torch.zeros_like(at, dtype=torch.bool)
            if reading is not None:
                ids_t, at_t, inside, _ = reading.part(group, T, at)

            # hidden_rows takes the teacher's rows for each of the student's layers.
            layers = list(layer_map)
            states_s = self.student.hidden(ids, layers, at)
            states_t = hidden_rows(self.teacher, ids_t, dict.fromkeys(layers, at_t), layer_map)
            row = torch.tensor(group, device=at.device)[at // T]             # (K,)
            t = at % T - (roll.prompt_len[row] - 1)                          # (K,)
            yield row, t, inside, dict(zip(layers, states_s, strict=True)), states_t


@contextlib.contextmanager
def started_in(folder, cfg):
    """Inside, the current folder is the one in which a run was started, because the paths in its config begin
    there: the folder from which `out_dir` leads to the run. Nothing changes if there is none, because the run
    was moved, or because out_dir begins at the root."""
    root = Path.cwd()
    run_folder = Path(folder).resolve()
    if not Path(cfg['out_dir']).is_absolute():
        for parent in run_folder.parents:
            if (parent / cfg['out_dir']).resolve() == run_folder:
                root = parent
    with contextlib.chdir(root):
        yield


def open_pair(cfg, folder=None, student=None):
    """Models, tokenizers, problems and bridge of a config -> Pair. folder: of the run that it belongs to, if
    there is one; its models must be those that the run began with. student: a path, of a student in place of
    the untrained one."""
    for key in ('student', 'teacher', 'data'):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; give a run folder, or student=, teacher= and data=")
    if toy.wanted(cfg) and not toy.folder_of(cfg).exists():
        raise Missing(f"{toy.folder_of(cfg)}: the toy's models are not there; run distill.py again, or start "
                      'in the folder where the run was started')
    env = start(cfg['device'], cfg['dtype'])
    if folder:
        stay_at(started_commits(folder))
    cfg = toy.prepare(cfg, env)
    if folder:
        check_weights(cfg, folder)

    # Text first. A pair that no number can compare ends here.
    toks = []
    for side in ('student', 'teacher'):
        toks.append(load_tokenizer(cfg[side], cfg['date'], enable_thinking=cfg['enable_thinking']))
    shapes = [read_config(cfg[side]) for side in ('student', 'teacher')]
    bridge = None
    layer_map = {shapes[0].L: shapes[1].L}
    if cfg['bridge']:
        about = fingerprint(cfg, *shapes, *toks)
        layers = list(match_layers(cfg, *shapes))
        bridge = load_bridge(cfg['bridge'], cfg['bridge_rank'], layers, about, env.device)
        layer_map = bridge.layer_map
    elif shapes[0].d != shapes[1].d or not same_vocabulary(*toks):
        raise Missing(f'{cfg["student"]} and {cfg["teacher"]} have other widths ({shapes[0].d} and '
                      f'{shapes[1].d}) or vocabularies, so their states need a bridge; give bridge=FOLDER, '
                      'which bridge.py makes')
    problems = load_problems(cfg['data'], toks[0], longest=cfg['max_prompt_tokens'], show=False)
    models = []
    for path in (student or cfg['student'], cfg['teacher']):
        models.append(load_model(path, env.dtype, env.device).requires_grad_(False))
    return Pair(cfg, *models, *toks, problems, layer_map, bridge, env.device)


def check_weights(cfg, folder):
    """A UserError if the models are not those with which a run began."""
    starts = read_starts(folder)
    for side in ('student', 'teacher'):
        began_with = starts[0].get(side) if starts else None
        if began_with and began_with != weights_digest(snapshot(cfg[side], weights=True)):
            raise UserError(f'{cfg[side]}: not the {side} that {folder} began with; restore it, or run '
                            'distill.py again')


# ---- the measurement -----------------------------------------------------------------------------

def position_cosines(pair):
    """The untrained student's answers -> cosines (B, T) of the last-layer states at response position t, the
    same with the teacher's states of another answer, and the answers' lengths (B,). NaN: no state there."""
    L = pair.student.config.L
    if L not in pair.layer_map:
        raise Missing(f"{pair.cfg['bridge']}: has no layer {L}, the student's last; fit one with layers=all")
    term = BridgeTerm(pair.bridge) if pair.bridge else HiddenTerm('cosine')
    steps = max(1, math.ceil(ANSWERS / (pair.cfg['prompts_per_step'] * pair.cfg['n'])))
    tables = ([], [])                        # of the pair, of the control
    lengths = []
    for step in range(1, steps + 1):
        roll = pair.sample_step(step)
        table = torch.full((2, len(roll.ids), pair.cfg['max_new_tokens']), math.nan, dtype=torch.float64)
        for row, t, inside, states_s, states_t in pair.read(roll, {L: pair.layer_map[L]}):
            h_s = states_s[L].float()                                        # (K, d_s)
            h_t = states_t[L].float()                                        # (K, d_t)
            if pair.bridge:
                h_t = pair.bridge.teacher(L, h_t)                            # (K, r)
            other = in_next_answer(row)                                      # (K,)
            for number, target in enumerate((h_t, h_t[other])):
                cosine = term.cosine(L, h_s, target, inside).double()        # (K,)
                if number == 1:
                    cosine[row[other] == row] = math.nan                     # one answer alone
                table[number, row.cpu(), t.cpu()] = cosine.cpu()
        for number in (0, 1):
            tables[number].append(table[number])
        lengths += roll.resp_len.tolist()
    return torch.cat(tables[0]), torch.cat(tables[1]), torch.tensor(lengths)


def in_next_answer(row):
    """For each position the number of one in the next answer of a micro-batch, as far from the answer's
    beginning; in a shorter answer its last one. The last answer is followed by the first one.

    row (K,): the answer of each position, sorted -> (K,). Rows 4, 4, 4, 6, 6 -> 3, 4, 4, 0, 1.
    """
    _, answer, counts = row.unique_consecutive(return_inverse=True, return_counts=True)
    begins = counts.cumsum(0) - counts                                       # (b,)
    from_begin = torch.arange(len(row), device=row.device) - begins[answer]  # (K,)
    following = (answer + 1) % len(counts)                                   # (K,)
    return begins[following] + torch.minimum(from_begin, counts[following] - 1)


def first_and_last(cosines, lengths, ks):
    """Cosines (B, T) and the answers' lengths (B,) -> two lists, a mean for each k: over the first k and over
    the last k positions of each answer, then over the answers.

    Positions without a state (NaN) are left out, and so is an answer that has none among its k.
    """
    t = torch.arange(cosines.shape[1])                                       # (T,)
    first = []
    last = []
    for k in ks:
        for means, chosen in ((first, t < torch.full_like(lengths, k)[:, None]),
                              (last, t >= (lengths - k)[:, None])):
            of_answers = torch.where(chosen, cosines, math.nan).nanmean(1)   # (B,)
            means.append(float(of_answers.nanmean()))
    return first, last


def values_of_k(longest):
    """1, 2, ... up to the longest answer; of long answers POINTS of them, by a constant factor."""
    if longest <= POINTS:
        return list(range(1, longest + 1))
    return sorted({round(longest ** (i / (POINTS - 1))) for i in range(POINTS)})


# ---- the figure ----------------------------------------------------------------------------------

def figure8_data(panels):
    """{title: {name of a seed's run: what `position_cosines` returned}} -> the numbers of the figure."""
    data = {'panels': {}}
    for title, measured in panels.items():
        lengths = torch.cat([lengths for _, _, lengths in measured.values()])
        ks = values_of_k(int(lengths.max()))
        panel = {'k': ks, 'answers': len(lengths), 'runs': {}}

        # How many answers have k tokens: the others give all that they have.
        panel['answers of k tokens'] = [int((lengths >= k).sum()) for k in ks]
        for name, (cosines, elsewhere, lengths_of_run) in measured.items():
            first, last = first_and_last(cosines, lengths_of_run, ks)
            control = float(elsewhere.nanmean(1).nanmean())
            panel['runs'][name] = {'first': first, 'last': last,
                                   'another answer': None if math.isnan(control) else control}
        data['panels'][title] = panel
    return data


def draw_figure8(data, file):
    """A panel for each kind of pair -> files."""
    panels = data['panels']
    width = PAGE if len(panels) > 1 else COLUMN
    with paper_style():
        figure, axes = new_figure(columns=len(panels), width=width, height=2.5)
        controls = []
        for panel, (title, numbers) in zip(axes, panels.items(), strict=True):
            runs = numbers['runs'].values()
            for side in ('first', 'last'):
                by_seed = [run[side] for run in runs]
                draw_seeds(panel, numbers['k'], by_seed, f'{side} k tokens', look_of(f'{side} k tokens'))
            others = [run['another answer'] for run in runs if run['another answer'] is not None]
            controls.append(f'{fmean(others):.2f}' if others else 'not measured')
            panel.set(xlabel='k', title=title)
            if numbers['k'][-1] > POINTS:
                panel.set_xscale('log')
        axes[0].set_ylabel('cosine of last-layer states')
        notes = (f'before training; {described(panels.values())}; cosine to the state at the same position '
                 f'of another answer: {", ".join(controls)}')
        return save(figure, file, notes)


def described(panels):
    """What each panel is a mean of, once if it is the same."""
    texts = []
    for numbers in panels:
        count = len(numbers['runs'])
        seeds = f'{count} seeds (thin: each)' if count > 1 else 'one seed'
        texts.append(f'{numbers["answers"]} answers of {seeds}')
    return ', '.join(dict.fromkeys(texts))


def figure8(folders, to='out/paper', config='', student='', teacher='', data='', bridge='',
            max_new_tokens=''):
    """Measure, and write first_last.json and the figure into a folder -> files.

    folders: runs, of which the first of each kind of pair is measured with all its seeds. Without them the
    pair of a config file (`config`), of which the other keys change what it says.
    """
    keys = {'student': student, 'teacher': teacher, 'data': data, 'bridge': bridge,
            'max_new_tokens': max_new_tokens}
    words = [f'{key}={value}' for key, value in keys.items() if value]
    if config or words:
        if folders:
            raise UserError(f'{folders[0]}: a run folder says itself which models it has; give it without '
                            f'{words[0] if words else "config="}')
        cfg = load_config([*([config] if config else []), *words], 'distill.py')
        pair = open_pair(cfg)
        panels = {pair.title(): {cfg['student']: position_cosines(pair)}}
    else:
        panels = measured_panels(read_runs(of_kind(folders, 'run')))
    to = Path(to)
    data = figure8_data(panels)
    write_json(to / 'first_last.json', data)
    return [to / 'first_last.json', *draw_figure8(data, to / 'figure8')]


def measured_panels(runs):
    """[Run] -> {title of a panel: {run: what `position_cosines` returned}}."""
    chosen = {}                              # {kind of pair: {seed: run}}
    for run in runs:
        if run.pair != 'same' and not run.config['bridge']:
            continue                         # an objective of the output space between unlike models
        seeds = chosen.setdefault(run.pair, {})
        first = next(iter(seeds.values()), run)
        if all(run.config[key] == first.config[key] for key in DECIDES):
            seeds.setdefault(run.seed, run)
    if not chosen:
        raise Missing('a run between models of one width and vocabulary, or through a bridge; python '
                      'distill.py configs/toy.py makes one')

    panels = {}
    for seeds in chosen.values():
        for run in seeds.values():
            folder = run.folder.resolve()
            with started_in(folder, run.config):
                pair = open_pair(run.config, folder)
                panels.setdefault(pair.title(), {})[str(run.folder)] = position_cosines(pair)
    return panels
