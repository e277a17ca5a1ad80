"""
How near is a student to its teacher? Measured on held-out prompts without a grader, and on questions with
exact answers.

    python -m studies.agreement TEACHER STUDENT                     two Hugging Face folders, or hub ids
    python -m studies.agreement TEACHER DAMAGED HEALED              several students: a line for each
    python -m studies.agreement TEACHER STUDENT --prompts FILE --exact FILE --tokens 64 --show 3

Both models read the same answers, once answers that the teacher has written (greedily), once answers that the
student has sampled itself (at temperature 1). At every position of these it takes

    KL           the exact KL(student || teacher) of the next token over the whole vocabulary, nats
    same token   per cent of the positions where both models have the same likeliest token
    perplexity   of the teacher's text under the student: exp of the mean of -log p(token)
    cosine       of the hidden states, for each layer; which teacher layer belongs to it says --layer_map

and, with `--exact`, how many questions are answered rightly, by the grader of eval_math.py. Means are over
all positions. The number after +- is the standard error if other prompts of the same kind had been drawn.
All of it, with the sums of each prompt, is written as JSON (--out).

Simpler than an evaluation harness: one answer is read at a time, by two models that fit into memory, so there
is no padding and no batch that rounds differently. All sums are float64. What it does not do: models with
two vocabularies; problems whose answers are long (eval_math.py).

Letters: K positions of an answer, T tokens of prompt and answer, d width, V vocabulary.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from formats.hub import snapshot
from formats.huggingface import load_model, read_config
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer, shared_size, stop_set
from grading.grader import grade
from losses import one_minus_cosine
from output_losses import divergence, log_probs
from rollout import sample
from support.answers import fitted
from support.command_help import OneLineParser
from support.files import existing_above, write_json
from support.preflight import check_pair, match_layers
from support.provenance import weights_digest
from support.runtime import ROOT, UserError, print0, run, start

HEAD_ROWS = 64                  # positions under the LM heads at once
SLOTS = 64                      # answers that are sampled at once
SHORT_ANSWER = 16               # tokens of an exact answer
COLUMNS = 110                   # of a printed answer


# ---- two models at the positions of one answer -------------------------------------------------------

def states_at(model, ids, layers, at):
    """The states of some layers, and of the last one, at positions (K,) of ids (1, T) -> {layer: (K, d)}."""
    layers = sorted({*layers, model.config.L})
    return dict(zip(layers, model.hidden(ids, layers, at), strict=True))


@torch.no_grad()
def answer_sums(student, teacher, prompt, answer, layer_map, vocab):
    """Compare two models at all K positions of one answer -> {name: sum over the positions}.

    prompt, answer: lists of ids. layer_map: {student layer: teacher layer}. vocab: ids from here on are
    padding of the embedding. Names: 'kl'; 'same', the number of positions with the same likeliest token;
    'surprise', -log p of the tokens that are there; 'cosine/1', 'cosine/2', ... by student layer.
    """
    # Position t of the answer is predicted by the column before it.
    device = student.embed.weight.device
    ids = torch.tensor([prompt + answer], device=device)                     # (1, T)
    at = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=device)      # (K,)
    student_states = states_at(student, ids, layer_map, at)
    teacher_states = states_at(teacher, ids, layer_map.values(), at)

    sums = {'kl': 0.0, 'same': 0, 'surprise': 0.0}
    for layer, layer_t in layer_map.items():
        distance = one_minus_cosine(student_states[layer].double(), teacher_states[layer_t].double())
        sums[f'cosine/{layer}'] = (1 - distance).sum().item()

    # The vocabulary is taken a few positions at a time: V numbers for each of them.
    h_s = student_states[student.config.L]                                   # (K, d)
    h_t = teacher_states[teacher.config.L]
    for start_row in range(0, len(at), HEAD_ROWS):
        piece = slice(start_row, start_row + HEAD_ROWS)
        logp = exact_log_probs(student, h_s[piece], vocab)                   # (<= 64, V)
        logq = exact_log_probs(teacher, h_t[piece], vocab)
        next_token = ids[0, at[piece] + 1]
        sums['kl'] += divergence(logp, logq).sum().item()
        sums['same'] += (logp.argmax(-1) == logq.argmax(-1)).sum().item()
        sums['surprise'] -= logp.gather(-1, next_token[:, None]).sum().item()
    return sums


def exact_log_probs(model, h, vocab):
    """States (K, d) under a model's head -> log-probabilities (K, V) whose sums are float64."""
    return log_probs(h, model.head.weight[:vocab], 1.0).double().log_softmax(-1)


def text_sums(student, teacher, prompts, answers, layer_map, vocab):
    """`answer_sums` of several answers -> {name: one number for each answer}; 'tokens' are their lengths."""
    sums = {'tokens': [len(answer) for answer in answers]}
    for prompt, answer in zip(prompts, answers, strict=True):
        for name, value in answer_sums(student, teacher, prompt, answer, layer_map, vocab).items():
            sums.setdefault(name, []).append(value)
    return sums


def mean_and_error(values, tokens):
    """Sums of each answer and their numbers of positions -> (mean over all positions, its standard error).

    The prompts are what was drawn at random, not the positions: those of one answer resemble each other. The
    mean is a ratio of two sums over prompts, and this is the usual error of such a ratio.
    """
    total = sum(tokens)
    mean = sum(values) / total
    count = len(values)
    if count == 1:
        return mean, math.nan
    squares = sum((value - mean * length)**2 for value, length in zip(values, tokens, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


def scores_of(sums):
    """What `text_sums` returns -> {name: (mean, standard error)}. 'cosine' is the mean over layers."""
    scores = {}
    for name, values in sums.items():
        if name != 'tokens':
            scores[name] = mean_and_error(values, sums['tokens'])
    layers = [values for name, values in sums.items() if name.startswith('cosine/')]
    if layers:
        over_layers = [sum(of_answer) / len(layers) for of_answer in zip(*layers, strict=True)]
        scores['cosine'] = mean_and_error(over_layers, sums['tokens'])
    return scores


# ---- what the models write ---------------------------------------------------------------------------

def write(model, prompts, tokens, stop, vocab, temperature=0.0, seed=0):
    """A model's answers to prompts, lists of ids both; temperature 0: always the likeliest token."""
    answers = []
    for first in range(0, len(prompts), SLOTS):
        group = prompts[first:first + SLOTS]
        numbers = range(first, first + len(group))       # of the prompts: they fix the random numbers
        roll = sample(model, group, which=numbers, max_new_tokens=tokens, stop=stop, vocab=vocab,
                      temperature=temperature, seed=seed)
        answers += roll.answers()
    return answers


def right_answers(model, tokenizer, problems, stop, vocab):
    """Is the model's greedy answer to each problem right? -> list of True and False."""
    answers = write(model, [problem.ids for problem in problems], SHORT_ANSWER, stop, vocab)
    verdicts = []
    for ids, problem in zip(answers, problems, strict=True):
        verdicts.append(grade(tokenizer.decode(ids), problem.answer))
    return verdicts


# ---- one student beside its teacher ------------------------------------------------------------------

@dataclass
class Task:
    """What is the same for all students."""
    folder: str                 # of the teacher
    teacher: object             # Model
    tokenizer: object           # the teacher's, for prompts and texts
    held_out: list              # problems without answers
    exact: list                 # problems with short answers
    vocab: int                  # ids below it are written and compared: all models know them
    text: list                  # what the teacher has written to the held-out prompts, a list of ids each
    shown: list                 # numbers of the prompts whose answers are printed

    @property
    def prompts(self):
        return [problem.ids for problem in self.held_out]


def read_task(args, env):
    """Problems and teacher -> Task. A student that cannot be compared is a UserError, before any work."""
    tokenizer = load_tokenizer(args.teacher)
    held_out = load_problems(args.prompts, tokenizer, split='test')
    exact = load_problems(args.exact, tokenizer, split='test') if args.exact else []
    if any(problem.answer is None for problem in exact):
        raise UserError(f'{args.exact}: a question without an answer cannot be graded; delete it')
    c = read_config(args.teacher)
    vocab = tokenizer.size
    for folder in args.students:
        student = read_config(folder)
        student_tokenizer = load_tokenizer(folder)
        check_pair(student, c, student_tokenizer, tokenizer, held_out[0].question, hidden=False)
        pairs_of_layers(student, c, args.layer_map)
        vocab = min(vocab, shared_size(student_tokenizer, tokenizer))

    # The teacher writes its answers once, for all students.
    teacher = load_model(args.teacher, env.dtype, env.device)
    prompts = [problem.ids for problem in held_out]
    text = write(teacher, prompts, args.tokens, tokenizer.stop_ids, vocab)
    count = min(args.show, len(prompts))
    shown = [number * len(prompts) // count for number in range(count)]      # spread evenly over all
    return Task(args.teacher, teacher, tokenizer, held_out, exact, vocab, text, shown)


def pairs_of_layers(student, teacher, how):
    """Two ModelConfigs -> {student layer: teacher layer} for the cosines; {} if the widths differ. how: the
    option --layer_map."""
    if student.d != teacher.d:
        return {}
    how = how or ('kept' if student.hf.get('kept_layers') else 'depth')
    return match_layers({'layers': 'all', 'layer_map': how, 'bridge': ''}, student, teacher)


def measure(task, folder, args, env):
    """Everything about one student -> dict for the table and the JSON file."""
    student = load_model(folder, env.dtype, env.device)
    stop = stop_set(load_tokenizer(folder), task.tokenizer)
    layer_map = pairs_of_layers(student.config, task.teacher.config, args.layer_map)

    # What it writes: samples, answers to exact questions, and a few greedy answers to show.
    own_text = write(student, task.prompts, args.tokens, stop, task.vocab, 1.0, args.seed)
    verdicts = right_answers(student, task.tokenizer, task.exact, stop, task.vocab)
    shown = write(student, [task.prompts[number] for number in task.shown], args.tokens, stop, task.vocab)

    # Both models read what the teacher has written, and what the student has.
    sums = {}
    for name, answers in (('teacher_text', task.text), ('own_samples', own_text)):
        sums[name] = text_sums(student, task.teacher, task.prompts, answers, layer_map, task.vocab)
    return {'model': str(folder), 'digest': weights_digest(snapshot(folder)), 'layer_map': layer_map,
            'right': sum(verdicts), 'asked': len(verdicts),
            'scores': {name: scores_of(values) for name, values in sums.items()}, 'by_prompt': sums,
            'shown': [task.tokenizer.decode(ids) for ids in shown]}


# ---- what is printed ---------------------------------------------------------------------------------

TITLES = ['', "KL, teacher's text", 'same token', 'perplexity', 'KL, own samples', 'same token', 'cosine',
          'right']


def table(measured):
    """Students, each as `measure` returns it -> the lines of a table."""
    rows = [TITLES]
    for found in measured:
        text = found['scores']['teacher_text']
        own = found['scores']['own_samples']
        perplexity = f'{math.exp(text["surprise"][0]):.3f}'
        cosine = f'{own["cosine"][0]:.4f}' if 'cosine' in own else ''
        right = f'{found["right"]}/{found["asked"]}' if found['asked'] else ''
        rows.append([found['model'], with_error(*text['kl']), percentage(text['same']), perplexity,
                     with_error(*own['kl']), percentage(own['same']), cosine, right])

    # Names to the left, numbers to the right, a column as wide as its longest cell.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        line = name.ljust(widths[0])
        for cell, width in zip(cells, widths[1:], strict=True):
            line += cell.rjust(width + 2)
        lines.append(line)
    return lines


def with_error(mean, error):
    """'0.352 +-0.021'"""
    return f'{mean:.3f} +-{error:.3f}'


def percentage(score):
    """A share (mean, standard error) -> '71.2 +-1.3'"""
    return f'{100 * score[0]:.1f} +-{100 * score[1]:.1f}'


def cosine_line(found):
    """The cosine of each layer on a student's own samples, in a line."""
    cosines = []
    for name, (mean, _) in found['scores']['own_samples'].items():
        if name.startswith('cosine/'):
            layer = name.removeprefix('cosine/')
            cosines.append(f'{layer}:{mean:.3f}')
    shown = ' '.join(cosines) or 'not compared, the widths differ'
    return f'{found["model"]}, cosine of each layer on its own samples: {shown}'


def examples_of(task, measured):
    """A few prompts with the greedy answers of all models -> [{'question', 'teacher', and each student}]."""
    examples = []
    for place, number in enumerate(task.shown):
        example = {'question': task.held_out[number].question,
                   'teacher': task.tokenizer.decode(task.text[number])}
        for found in measured:
            example[found['model']] = found['shown'][place]
        examples.append(example)
    return examples


# ---- the script --------------------------------------------------------------------------------------

def main(args):
    env = start(args.device, args.dtype)
    existing_above(Path(args.out).parent)
    task = read_task(args, env)

    # The teacher beside itself: its perplexity and its right answers are what a student can reach.
    measured = []
    for folder in [*args.students, args.teacher]:
        print0(f'measuring {folder}')
        measured.append(measure(task, folder, args, env))
    print0('\n'.join(['', *table(measured), '']))
    for found in measured[:-1]:
        print0(cosine_line(found))
    examples = examples_of(task, measured[:-1])
    for example in examples:
        print0()
        for name, text in example.items():
            print0(f'  {name}: {fitted(str(text), COLUMNS)}')

    settings = {name: getattr(args, name) for name in ('prompts', 'exact', 'tokens', 'seed')}
    write_json(args.out, {'teacher': args.teacher, 'settings': settings | {'dtype': str(env.dtype)[6:]},
                          'models': measured, 'examples': examples})
    print0(f'\n{args.out}: {len(task.prompts)} prompts, {sum(map(len, task.text))} tokens of the teacher')


def parsed(words=None):
    """The command line, or these words instead -> its options."""
    parser = OneLineParser('studies/agreement.py', 'TEACHER STUDENT [STUDENT ...] [--option VALUE ...]')
    parser.add_argument('teacher', help='Hugging Face folder or id')
    parser.add_argument('students', nargs='+', help='Hugging Face folders or ids, compared one by one')
    parser.add_argument('--prompts', default=str(ROOT / 'studies/heal/test.jsonl'), help='held-out questions')
    parser.add_argument('--exact', default=str(ROOT / 'studies/heal/exact.jsonl'),
                        help="questions with answers; '' = none")
    parser.add_argument('--tokens', type=int, default=64, help='longest answer to a held-out question')
    parser.add_argument('--layer_map', default='', choices=('', 'depth', 'kept'),
                        help="as in configs/default.py; '' = kept if config.json of the student has "
                             'kept_layers, else depth')
    parser.add_argument('--seed', type=int, default=0, help="of the student's samples")
    parser.add_argument('--show', type=int, default=3, help='prompts whose answers are printed')
    parser.add_argument('--out', default='out/agreement.json', help='JSON file to write')
    parser.add_argument('--device', default='auto', choices=('auto', 'cuda', 'cpu', 'mps'))
    parser.add_argument('--dtype', default='auto', choices=('auto', 'bfloat16', 'float32'))
    args = parser.parse_args(words)
    if args.tokens < 1 or args.show < 0:
        raise UserError(f'--tokens {args.tokens} --show {args.show}: give --tokens from 1 and --show from 0')
    return args


if __name__ == '__main__':
    run(main, parsed)
