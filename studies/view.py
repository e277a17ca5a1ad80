"""
A page that shows what a student learns: its answers token by token, coloured by how near the teacher is.

    python -m studies.view out/toy                        every checkpoint of a run: out/toy/view.html
    python -m studies.view out/toy prompts=5 to=page.html
    python -m studies.view student=out/toy/last teacher=OTHER/MODEL data=problems.jsonl          two models

Each checkpoint that the run has kept, and the untrained student before them, answers the same held-out
problems with the random numbers of the run's evaluations, so the answers are those of out/toy/answers/.
Both models then read each answer once. For every token the page holds the cosine of their states in each
layer, the KL and both entropies, and the five likeliest next tokens of both. All of this is about the state
that predicts the token, as in Eq. (6). Every checkpoint also reads what the untrained student has answered:
there the text stays the same, and the numbers alone change.

Its own keys: prompts=3 problems, tokens=256 of each answer at most, checkpoints=12 at most (spread evenly),
to= the file. Of the keys in configs/default.py it knows data, seed, eval_temperature, eval_top_p, device,
dtype and toy_dir, and without a run also student, teacher, bridge, bridge_rank, layers and layer_map.

The page is one file, which needs no network and may use none: its policy allows the script and the style
that are in it, by their digests, and nothing else. What models write is untrusted. It stands in the page as
JSON in which no character can end the script, and is shown as text nodes, never as markup. The template is
studies/view.html.

Simpler than a viewer with a server: all numbers are computed before, on one device, and rounded. What it
does not do: attention, gradients, answers of the teacher, more than MOST_TOKENS tokens.

Letters: n tokens of an answer, K of them at which the teacher has a state, C of these in a chunk, L layers,
d width, V vocabulary, E outcomes of the next byte.
"""
import base64
import hashlib
import html
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from bridge_parts.saved import fingerprint, load_bridge
from configs import check, default, read_argument
from cross_tokenizer.next_byte import ByteTable, NextByte
from cross_tokenizer.pairing import read_rollout
from eval_math import answers, load_eval_sets, number_problems, verdict
from extensions import several_teachers
from formats.hub import stay_at
from formats.huggingface import load_model, read_config
from formats.problems import load_problems
from formats.tokenizer import check_ids, load_tokenizer, same_vocabulary, shared_size, stop_set
from losses import BridgeTerm, HiddenTerm
from output_losses import FullKL, OutputTerm, likeliest, log_probs
from rollout import Rollout
from step import Objective, cut_rollout, position_mask
from studies import toy
from studies.publish import without_folders
from support.checkpoints import checkpoint_folders, read_record
from support.command_help import command_words
from support.files import read_json, whole
from support.preflight import match_layers
from support.progress import Progress
from support.provenance import started_commits
from support.run_folder import stored_config
from support.runtime import UserError, cut, print0, printable, run, shown, start

# The keys of this command alone: default, smallest and largest value.
SIZES = {'prompts': (3, 1, 50), 'tokens': (256, 1, 4096), 'checkpoints': (12, 1, 200)}
# Keys of configs/default.py: for a run, and what is needed besides where there is none.
OF_A_RUN = ('data', 'seed', 'eval_temperature', 'eval_top_p', 'device', 'dtype', 'toy_dir')
OF_A_PAIR = ('student', 'teacher', 'bridge', 'bridge_rank', 'layers', 'layer_map')
GIVE = 'give the folder of a run of distill.py, or student=, teacher= and data='
MOST_TOKENS = 50_000            # that a page holds; with 30 layers it then has about 20 MB

UNDERLINED = ' Underlined tokens: the likeliest next tokens of both models differ there.'
LIKELIEST = 5                   # next tokens that are shown of each model
UNIT = 10_000                   # numbers are whole numbers of this part in the page: 0.98765 is 9877
LONGEST_PIECE = 60              # characters of a token's text
LONGEST_TEXT = 4000             # characters of a prompt, an answer of a problem, a name
MOST_MARKS = 2                  # accents on one letter: a hundred would cover the lines above
# Characters without ink or width that Unicode counts among letters, marks and symbols.
BLANK = re.compile('[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0'
                   '\U000e0100-\U000e01ef]')
ROWS = 64                       # positions under the heads at once


# ---- what is asked -------------------------------------------------------------------------------

@dataclass
class Request:
    """A command line."""
    cfg: dict                   # the run's, or that of a pair of models; 'toy' is not yet a path
    folder: Path | None         # of the run
    sizes: dict                 # {'prompts': 3, 'tokens': 256, 'checkpoints': 12}
    file: Path                  # that is written


def settings(words=None):
    """The command line -> Request. Nothing is loaded yet."""
    words = command_words('studies/view.py') if words is None else words
    # The folder of a run in a study can have '=' in its name: out/toy_paper/bridge_r_=_16-s0.
    folders = [word for word in words if '=' not in word or Path(word).is_dir()]
    keys = [word for word in words if word not in folders]
    if len(folders) > 1 or any(word.startswith('-') for word in folders):
        raise UserError(f'{shown(folders[-1])}: wants one run folder, then key=value; see --help')
    folder = Path(folders[0]) if folders else None

    # The keys of this command, and those of a config.
    sizes = {name: usual for name, (usual, _, _) in SIZES.items()}
    file = Path('out/view.html') if folder is None else folder / 'view.html'
    known = OF_A_RUN if folder else OF_A_RUN + OF_A_PAIR
    given = {}
    for word in keys:
        key, _, text = word.removeprefix('--').partition('=')
        if key in sizes:
            sizes[key] = size_of(key, text)
        elif key == 'to' and text:
            file = Path(text)
        elif key in known:
            _, given[key] = read_argument(word, '')
        else:
            raise UserError(f'{shown(key)}: no key of this command; it has '
                            f'{", ".join([*SIZES, "to", *known])}')
    cfg = config_of_run(folder) if folder else dict(default)
    cfg = check(cfg | given, 'command line')
    if 'data' in given:
        cfg['eval_data'] = ''                # the problems come from data= in its place
    for key in ('student', 'teacher', 'data'):
        if not cfg[key]:
            raise UserError(f"{key}='': nothing given; {GIVE}")
    return Request(cfg, folder, sizes, file)


def size_of(key, text):
    """The value of prompts=, tokens= or checkpoints=."""
    _, low, high = SIZES[key]
    if not re.fullmatch('[0-9]{1,9}', text) or not low <= int(text) <= high:
        raise UserError(f'{key}={shown(text)}: wants a whole number from {low} to {high}')
    return int(text)


def config_of_run(folder):
    """The config of a run, with every key there is; keys of other versions are left out."""
    stored = stored_config(folder)
    if not stored:
        raise UserError(f'{folder}/config.json: no such file; {GIVE}')
    known = {key: stored.get(key, value) for key, value in default.items()}
    return check(known, f'{folder}/config.json')


# ---- the models ----------------------------------------------------------------------------------

@dataclass
class Pair:
    """A student, of which checkpoints come one by one, and its teacher."""
    cfg: dict
    env: object                 # device and dtype
    tok: object                 # the student's tokenizer
    tok_t: object               # the teacher's
    teacher: object
    objective: Objective        # its two terms are not trained here: they are what is measured
    longest: int                # tokens of the longest prompt and answer of the run

    @property
    def same(self):
        """Does the teacher read the student's ids as they are?"""
        return same_vocabulary(self.tok, self.tok_t)

    @property
    def layers(self):
        """The student's layers that are compared, ascending; [] where states cannot be compared."""
        return list(self.objective.layer_map)

    @property
    def kl(self):
        """What the KL is over: 'token', 'byte', or '' where a teacher reads ids that it does not know."""
        if self.same:
            return 'token'
        return 'byte' if self.cfg['teacher_ids'] == 'text' else ''

    def load(self, folder):
        """A model of the pair from a folder, ready for forwards."""
        model = load_model(folder, self.env.dtype, self.env.device)
        model.requires_grad_(False)
        model.max_length = self.longest      # longrope chooses its frequencies by it
        return model


def load_pair(cfg, env, longest):
    """Tokenizers, bridge, teacher, and what is measured between the two models -> Pair."""
    names = {'date': cfg['date'], 'enable_thinking': cfg['enable_thinking']}
    tok = load_tokenizer(cfg['student'], **names)
    tok_t = load_tokenizer(cfg['teacher'], **names)
    shapes = [read_config(cfg[side]) for side in ('student', 'teacher')]
    for side, shape, tokenizer in zip(('student', 'teacher'), shapes, (tok, tok_t), strict=True):
        check_ids(side, shape.V, tokenizer)
    same = same_vocabulary(tok, tok_t)

    # Hidden states can be compared through a bridge, or number by number.
    layer_map = {}
    bridge = None
    hidden = HiddenTerm()
    student, teacher = shapes
    if cfg['bridge'] or (same and student.d == teacher.d):
        layer_map = match_layers(cfg, student, teacher)
    if cfg['bridge']:
        about = fingerprint(cfg, *shapes, tok, tok_t)
        bridge = load_bridge(cfg['bridge'], cfg['bridge_rank'], list(layer_map), about, env.device)
        layer_map = bridge.layer_map
        hidden = BridgeTerm(bridge)

    # Distributions can be compared token by token within one vocabulary, else byte by byte.
    pair = Pair(cfg, env, tok, tok_t, None, None, longest)
    pair.teacher = pair.load(cfg['teacher'])
    if same:
        output = FullKL(vocab=shared_size(tok, tok_t))
    else:
        table = ByteTable(tok.pieces, tok.stop_ids, tok.size, env.device)
        output = NextByte(table, ByteTable(tok_t.pieces, tok_t.stop_ids, tok_t.size, env.device))
    pair.objective = Objective(layer_map, hidden, OutputTerm(output, pair.teacher), bridge)
    return pair


def kept_checkpoints(request, untrained):
    """The models that a page shows -> ([(label, folder)], how many there are besides).

    The first is the student as it was before training, the others are checkpoints of the run that lie in
    its folder. Where there are more than asked for, the first and the last stay, with others spread evenly
    between them. Without a run it is the student alone. untrained: the folder of the student.
    """
    if request.folder is None:
        return [('the student', untrained)], 0
    name = read_json(request.folder / 'config.json')['run']
    found = [('untrained student', untrained)]
    for step, folder in reversed(checkpoint_folders(request.folder)):
        record = read_record(folder)
        if record is None or record['run'] != name:
            print0(f'  note: {folder} is left out, it is damaged or belongs to another run')
            continue
        found.append((f'step {step}', folder / 'model'))
    if len(found) == 1:
        print0(f'  note: {request.folder} holds no checkpoint, so the page shows the untrained student alone')
    chosen = spread(found, request.sizes['checkpoints'])
    return chosen, len(found) - len(chosen)


def spread(items, count):
    """At most `count` of a list, evenly spaced: the first, and from two on the last."""
    if len(items) <= count:
        return items
    if count == 1:
        return items[-1:]
    return [items[number * (len(items) - 1) // (count - 1)] for number in range(count)]


# ---- the problems --------------------------------------------------------------------------------

def chosen_problems(cfg, tok, count):
    """The problems of a page -> ({(name of a set, number): (number, Problem)}, which they are, in words).

    Of held-out sets they are spread evenly over all of them, as those that an evaluation prints. Of training
    problems they are the first.
    """
    if not cfg['eval_data']:
        problems = load_problems(cfg['data'], tok, count, longest=cfg['max_prompt_tokens'])
        numbered = number_problems({Path(cfg['data']).stem: problems})
        return numbered, f'the first {len(problems)} problems'
    sets = load_eval_sets(cfg['eval_data'], tok, cfg['eval_problems'], cfg['eval_suffix'])
    numbered = number_problems(sets)
    keys = list(numbered)
    total = len(keys)
    count = min(count, total)
    keys = [keys[number * total // count] for number in range(count)]
    return {key: numbered[key] for key in keys}, f'{count} of {total} held-out problems'


def answer_limit(cfg, longest_prompt, tokens):
    """How many tokens an answer has at most: those that are asked for, that the run allows, and that both
    models can read after the longest prompt."""
    context = min(read_config(cfg[side]).context for side in ('student', 'teacher'))
    limit = min(tokens, cfg['eval_max_new_tokens'] or cfg['max_new_tokens'], context - longest_prompt)
    if limit < 1:
        raise UserError(f'a prompt has {longest_prompt} tokens, and one of the models reads {context} in '
                        'all; choose other data=')
    return limit


# ---- one answer, measured ------------------------------------------------------------------------

class Pieces:
    """The texts of tokens, each once. A page refers to them by their numbers."""
    def __init__(self):
        self.numbers = {}                    # {(text, is it special?): number}

    def number(self, piece):
        return self.numbers.setdefault(piece, len(self.numbers))

    def table(self):
        """[[text, 1 if it is a special token]] in the order of the numbers."""
        return [[text, int(special)] for text, special in self.numbers]


@cache
def words_of(tok):
    """{id: its bytes, or its string where the tokenizer is not byte-level}."""
    return {number: word for word, number in tok.words.items()}


@cache
def piece_of(tok, number):
    """(text of a token, is it special?). Bytes that are no text become escapes, as do hidden characters."""
    word = words_of(tok).get(number, f'[{number}]')
    text = word.decode(errors='backslashreplace') if isinstance(word, bytes) else word
    return cut(without_hidden(text), LONGEST_PIECE), number in tok.vocabulary.special


def without_hidden(text):
    """A text in which a reader sees every character: 'a', U+200B, 'b' -> 'a\\u200bb'.

    Escapes stand for control characters, marks that change the direction of writing, characters without
    width, blanks that look like a space, code points without a meaning, and accents heaped on one letter.
    """
    characters = []
    marks = 0
    for character in printable(text):
        kind = unicodedata.category(character)
        marks = marks + 1 if kind in ('Mn', 'Me') else 0
        hidden = kind in ('Cf', 'Cn', 'Co') or kind == 'Zs' and character != ' ' or BLANK.match(character)
        if hidden or marks > MOST_MARKS:
            character = character.encode('unicode_escape').decode()
        characters.append(character)
    return ''.join(characters)


def whole_units(values):
    """A tensor -> whole numbers of 1 / UNIT, as lists."""
    return (values.double() * UNIT).round().long().tolist()


@torch.no_grad()
def measure(pair, student, problem, ids, pieces):
    """Both models read an answer (n token ids) -> what a page says of each of its tokens, lists of length n.

    'tokens': numbers in `pieces`. 'cos': of each layer. 'kl', 'entropy', 'entropy_t' in nats. 'student',
    'teacher': the likeliest next tokens, [number, probability, number, probability, ...]. 'written': the
    probabilities of the token that was written. 'inside': 1 where the student stands inside a token of the
    teacher. null where the teacher has no state. Numbers are in units of 1 / UNIT.
    """
    device = pair.env.device
    prompt_len = len(problem.ids)
    lengths = [torch.tensor([length], device=device) for length in (prompt_len, len(ids))]
    roll = Rollout(torch.tensor([problem.ids + ids], device=device), *lengths, torch.tensor([False]),
                   torch.tensor([0]))
    rows = rows_of_answer(pair, roll, problem)
    t = rows.at - (prompt_len - 1)                                           # (K,) response positions

    # One forward of each model. The student's states are kept at all positions, the teacher's at K of them.
    L = student.config.L
    layers = sorted({*pair.layers, L})
    at = torch.arange(prompt_len - 1, prompt_len - 1 + len(ids), device=device)
    states = dict(zip(layers, student.hidden(roll.ids, layers, at), strict=True))        # {layer: (n, d)}
    teacher_rows = pair.objective.teacher_rows(pair.teacher, rows)

    made = {'tokens': [pieces.number(piece_of(pair.tok, number)) for number in ids], 'cos': []}
    for layer in pair.layers:
        h_s = states[layer][t].float()                                       # (K, d)
        cosine = pair.objective.hidden.cosine(layer, h_s, teacher_rows[layer].float(), rows.inside)
        made['cos'].append(at_positions(t, whole_units(cosine), len(ids)))
    made['inside'] = at_positions(t, rows.inside.long().tolist(), len(ids))
    return made | heads(pair, student, states[L], teacher_rows['head'], rows, t, pieces)


def rows_of_answer(pair, roll, problem):
    """The positions of a single answer at which the teacher has a state -> step.Rows."""
    mask = position_mask(roll)                                               # (1, T)
    reading = None
    if not pair.same:
        cfg = pair.cfg
        reading = read_rollout(roll, [pair.tok_t.chat(problem.question)], pair.tok, pair.tok_t,
                               pair.teacher.config.context, cfg['pair'], cfg['teacher_ids'])
        mask = mask & (reading.column >= 0)
    if not mask.any():
        raise UserError(f'{pair.cfg["teacher"]}: its context of {pair.teacher.config.context} tokens ends '
                        'within a prompt; give shorter problems in data=')
    rows, = cut_rollout(roll, mask.float(), budget=1, reading=reading)
    return rows


def heads(pair, student, h_s, h_t, rows, t, pieces):
    """What both models say comes next -> the lists of `measure` that are about distributions.

    h_s (n, d): the student's last states. h_t: what the objective wants of the teacher, (K, d), or (2K, d)
    for the next byte. t (K,): the positions of the teacher's rows.
    """
    objective = pair.objective.output.objective
    batch = pair.objective.output.head_rows(h_t, pair.teacher.head.weight, rows)
    made = {'student': [], 'teacher': [], 'written': [[], []], 'kl': [], 'entropy': [], 'entropy_t': []}
    n = len(h_s)
    written = rows.ids[0, -n:]                                               # (n,) tokens of the answer
    vocab = shared_size(pair.tok, pair.tok_t)
    vocab_t = vocab if pair.same else pair.tok_t.size

    # The student, at all positions.
    for start_row in range(0, n, ROWS):
        piece = slice(start_row, start_row + ROWS)
        logp = log_probs(h_s[piece], student.head.weight[:vocab], 1.0)       # (C, V)
        made['student'] += likeliest_lists(pair.tok, logp, pieces)
        made['written'][0] += whole_units(logp.exp().gather(-1, written[piece, None])[:, 0])

    # The teacher, and the two together, where it has a state.
    for start_row in range(0, len(t), ROWS):
        piece = slice(start_row, start_row + ROWS)
        logp = log_probs(h_s[t[piece]], student.head.weight[:vocab], 1.0)
        logq = log_probs(h_t[:len(t)][piece], pair.teacher.head.weight[:vocab_t], 1.0)
        made['teacher'] += likeliest_lists(pair.tok_t, logq, pieces)
        if pair.same:
            made['written'][1] += whole_units(logq.exp().gather(-1, written[t[piece], None])[:, 0])
        KL, entropy, entropy_t, _ = objective.statistics(logp.clone(), batch, piece)
        known = known_rows(objective, logp, batch, piece)
        for name, values in (('kl', KL), ('entropy', entropy), ('entropy_t', entropy_t)):
            for value, is_known in zip(whole_units(values), known, strict=True):
                made[name].append(value if is_known else None)

    # From the K rows to the n positions.
    for name in ('teacher', 'kl', 'entropy', 'entropy_t'):
        made[name] = at_positions(t, made[name], n)
    made['written'][1] = at_positions(t, made['written'][1], n) if pair.same else None
    if not pair.kl:
        made['kl'] = [None] * n
    return made


def known_rows(objective, logp, batch, piece):
    """At which rows can the two distributions be compared? -> list of bool. The next byte is not known where
    no token of the teacher continues what is written."""
    if isinstance(objective, FullKL):
        return [True] * len(logp)
    _, _, Q, _ = objective.compare(logp, batch, piece)                       # it overwrites logp
    return (Q.sum(-1) > 0).tolist()


def likeliest_lists(tok, logp, pieces):
    """Log-probabilities (C, V) -> for each row [number of a piece, its probability, number, ...], the
    likeliest token first."""
    ids = likeliest(logp, LIKELIEST)                                         # (C, 5)
    probabilities = whole_units(logp.gather(-1, ids).exp())
    lists = []
    for row, row_probabilities in zip(ids.tolist(), probabilities, strict=True):
        flat = []
        for number, probability in zip(row, row_probabilities, strict=True):
            flat += [pieces.number(piece_of(tok, number)), probability]
        lists.append(flat)
    return lists


def at_positions(t, values, n):
    """Values of K rows at the positions t (K,) -> a list of n, None elsewhere."""
    placed = [None] * n
    for position, value in zip(t.tolist(), values, strict=True):
        placed[position] = value
    return placed


# ---- the page ------------------------------------------------------------------------------------

def collect(pair, problems, checkpoints, limit):
    """Every checkpoint answers every problem -> (problems with their answers, table of pieces).

    limit: the most tokens of an answer. Of a problem, 'answers' are those of the checkpoints, and 'first' is
    the first of them as each of the other checkpoints reads it.
    """
    pieces = Pieces()
    pages = []
    for (name, number), (_, problem) in problems.items():
        pages.append({'set': as_text(name), 'number': number, 'known': as_text(problem.answer or ''),
                      'prompt': as_text(pair.tok.decode(problem.ids)), 'answers': [], 'first': [None]})

    first = None                             # what the first checkpoint has written
    with Progress('view', len(checkpoints), 'checkpoints') as progress:
        for count, (_, folder) in enumerate(checkpoints, 1):
            student = pair.load(folder)
            written = written_answers(pair, student, problems, limit)
            for page, (key, (_, problem)) in zip(pages, problems.items(), strict=True):
                page['answers'].append(measured_answer(pair, student, problem, written[key], pieces))
                if first is not None:
                    page['first'].append(measured_answer(pair, student, problem, first[key], pieces))
            first = first or written
            progress.update(count)
    return pages, pieces.table()


def written_answers(pair, student, problems, limit):
    """A student answers each problem once -> {key: (ids, ended by a stop token?)}."""
    cfg = pair.cfg
    sampled = answers(student, problems, 1, rows=len(problems), max_new_tokens=limit,
                      stop=stop_set(pair.tok, pair.tok_t), vocab=shared_size(pair.tok, pair.tok_t),
                      seed=cfg['seed'], temperature=cfg['eval_temperature'], top_p=cfg['eval_top_p'])
    return {key: (ids, stopped) for key, _, ids, stopped in sampled}


def measured_answer(pair, student, problem, answer, pieces):
    """One answer for the page: what is measured of its tokens, and whether it is right."""
    ids, stopped = answer
    about = {'stopped': stopped, **grade_of(pair.tok, problem, ids)}
    return measure(pair, student, problem, ids, pieces) | about


def grade_of(tok, problem, ids):
    """Is an answer right? -> {'right': True, False or None, 'found': the answer that the grader read}."""
    if problem.answer is None:
        return {'right': None, 'found': None}
    graded = verdict(tok.decode(ids), problem)
    found = graded['extracted']
    return {'right': graded['correct'], 'found': None if found is None else as_text(found)}


def as_text(text):
    """A text of somebody else for the page: cut, and with nothing hidden in it."""
    return without_hidden(cut(text, LONGEST_TEXT))


def facts(request, pair, which, limit, checkpoints, left_out):
    """What is shown, where it comes from, and what was left out -> sentences. The first is always seen.

    which: the problems, in words. limit: the most tokens of an answer. left_out: how many checkpoints.
    """
    cfg = pair.cfg
    names = {side: as_text(without_folders(str(request.cfg[side]))) for side in ('student', 'teacher')}
    models = f'{len(checkpoints)} models' if len(checkpoints) > 1 else 'one model'
    if left_out:
        models = f'{len(checkpoints)} of {len(checkpoints) + left_out} models'
    return [
        f"Student {names['student']}, teacher {names['teacher']}; {models}, {which}, at most {limit} tokens "
        'of each answer.',
        f"Each model answers the problems itself, at temperature {cfg['eval_temperature']:g} and with the "
        f"same random numbers (seed {cfg['seed']}). What was left out lies evenly between what is shown. Or "
        'all models read the answers of the first one: then the text stays, and the numbers alone change.',
        'What is shown of a token belongs to the state that predicts it: the model has read the prompt and '
        'the tokens before it. Point at a token, in an answer or in the map beside it.',
        fact_of_cosine(pair),
        fact_of_kl(pair),
        'Scales are logarithmic (that of the cosine in 1 - cosine) and the same in every page. Beyond both '
        'ends colours do not change. The line above the slider is the mean over all tokens of the page, on '
        'the same scale: lower is nearer to the teacher. Numbers are rounded to four decimals.',
        'Hatched tokens have no number.' + (UNDERLINED if pair.same else ''),
    ]


def fact_of_cosine(pair):
    """How hidden states are compared, in a sentence."""
    if not pair.layers:
        return ('The two models have unlike widths or vocabularies and there is no bridge between them, so '
                'their hidden states cannot be compared.')
    how = 'number by number'
    if pair.objective.bridge is not None:
        how = f'through the bridge, in its space of {pair.objective.bridge.rank} numbers'
    pairs = [f'{l} and {t}' for l, t in pair.objective.layer_map.items() if l != t]
    which = f'; layers of student and teacher: {", ".join(pairs)}' if pairs else ''
    return f'Cosine: hidden states of both models, {how}{which}.'


def fact_of_kl(pair):
    """What KL and entropies are over, in a few sentences."""
    if pair.kl == 'token':
        return 'KL(student || teacher) and entropies are over the next token, in nats, at temperature 1.'
    if pair.kl == 'byte':
        return ('The teacher has another vocabulary and reads the same text in its own tokens. Its likeliest '
                'tokens are those that it would write after the last of its tokens that is whole. KL and '
                'entropies are over the next byte, in nats.')
    return ('The teacher has another vocabulary and is handed the ids of the student, which mean something '
            'else to it, as teacher_ids=student asks. There is no KL; entropies are over the next byte.')


def page_of(data, title):
    """What the page holds -> its text. The policy names the digests of the script and of the style in the
    template, so a script in a model's answer could not run even if it were markup."""
    template = Path(__file__).with_name('view.html').read_text(encoding='utf-8')
    sources = {}
    for tag in ('script', 'style'):
        source, = re.findall(f'<{tag}>(.*?)</{tag}>', template, re.DOTALL)
        sources[tag] = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    policy = (f"default-src 'none'; script-src 'sha256-{sources['script']}'; "
              f"style-src 'sha256-{sources['style']}'; base-uri 'none'; form-action 'none'")
    parts = {'POLICY': policy, 'TITLE': html.escape(title), 'DATA': safe_json(data)}
    return re.sub(r'\{\{(\w+)\}\}', lambda match: parts[match[1]], template)


def safe_json(data):
    """JSON in ASCII that may stand between <script> and </script>: no character of it can end that."""
    text = json.dumps(data, separators=(',', ':'), allow_nan=False)
    for character in '<>&':
        text = text.replace(character, f'\\u{ord(character):04x}')
    return text


def refuse_other_teachers(cfg):
    """UserError where a page would not show what the run has learned from: of several teachers it could show
    one, and a teacher that is the student itself has read other prompts, or has changed."""
    teachers = len(several_teachers.configs(cfg))
    if teachers > 1:
        raise UserError(f'teacher= names {teachers} models, and a page shows one; give student=, data= and '
                        'one teacher= in place of the run')
    if cfg['teacher'] == 'self' or cfg['teacher_sees'] == 'solution':
        raise UserError(f"teacher={shown(cfg['teacher'])} with teacher_sees={cfg['teacher_sees']!r}: a page "
                        'shows another model that reads the same prompt; choose another run')


def main(request):
    cfg = request.cfg
    if not toy.is_made(cfg):
        raise UserError(f'{toy.folder_of(cfg)}: the toy of this run is not there; start this command where '
                        'the run was started, or give its toy_dir=')
    if request.folder:
        stay_at(started_commits(request.folder))         # ids of the hub mean what they meant to the run
    env = start(cfg['device'], cfg['dtype'])
    cfg = toy.prepare(cfg, env)
    refuse_other_teachers(cfg)
    checkpoints, left_out = kept_checkpoints(request, cfg['student'])
    readings = 2 * len(checkpoints) - 1      # of each problem
    size = request.sizes['prompts'] * request.sizes['tokens'] * readings
    if size > MOST_TOKENS:
        raise UserError(f'up to {size} tokens, but a page holds {MOST_TOKENS}; lower prompts=, tokens= or '
                        'checkpoints=')

    # Text first, then the teacher, then one checkpoint after the other.
    tok = load_tokenizer(cfg['student'], cfg['date'], enable_thinking=cfg['enable_thinking'])
    problems, which = chosen_problems(cfg, tok, request.sizes['prompts'])
    longest_prompt = max(len(problem.ids) for _, problem in problems.values())
    limit = answer_limit(cfg, longest_prompt, request.sizes['tokens'])
    run_limit = cfg['eval_max_new_tokens'] or cfg['max_new_tokens']
    pair = load_pair(cfg, env, longest_prompt + (run_limit if request.folder else limit))
    pages, pieces = collect(pair, problems, checkpoints, limit)

    title = 'Two models, token by token'
    if request.folder:
        title = f'What the student learns: {as_text(request.folder.resolve().name)}'
    data = {'title': title, 'facts': facts(request, pair, which, limit, checkpoints, left_out),
            'layers': pair.layers, 'kl': pair.kl, 'same': pair.same, 'unit': UNIT, 'pieces': pieces,
            'checkpoints': [label for label, _ in checkpoints], 'problems': pages}
    with whole(request.file) as temporary:
        temporary.write_text(page_of(data, title), encoding='ascii')
    print0(f'{request.file}: {len(pages)} problems, {len(checkpoints)} models, '
           f'{request.file.stat().st_size / 1e6:.2f} MB; open it in a browser')


if __name__ == '__main__':
    run(main, settings)
