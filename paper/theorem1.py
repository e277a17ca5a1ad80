"""
Theorem 1 (4 to 6 in the appendix) as an experiment: the noise that a sampled token adds to the gradient.

    python -m paper theorem1                       the toy's pair; about a minute on two cores
    python -m paper theorem1 student=out/a/student teacher=out/a/teacher data=out/a/train.jsonl

The theorem: once the tokens before a position are given, the gradient of Eq. (6) there has no variance. That
of Eq. (3) depends on the token that is sampled next. As the student comes near the teacher, to a distance
delta, the signal of Eq. (3) falls like delta^2 and its variance like delta, so that their ratio goes to 0.

Measured is the gradient with respect to all weights, or to the logits where it says so. With g(y) the
gradient if the token y is sampled, and p(y) the student's probability of it:

    signal     |sum_y p(y) g(y)|^2                 the squared length of the mean gradient
    variance   sum_y p(y) |g(y) - mean|^2          of all its components together

All V tokens are enumerated, so both are exact. The student walks in a straight line to the teacher: its
weights are teacher + left (student - teacher), and the prefixes stay those that it wrote at first.

Simpler than usual: one gradient is kept for each token of the vocabulary, so the models must be small. What
it does not do: follow a training run, whose way to the teacher is not straight.

READING (the pair of configs/toy.py with seed 0, and of no other; numbers in theorem1.json)

No variance: true of Eq. (6), by causality; measured at one position, exactly 0 over all tokens. It is equally
0 for the exact KL and for top-k, which read no sampled token either. So the theorem sets apart Eq. (3) from
all others, and not hidden states from output space.

The slopes. As upper bounds O(delta^2) and O(delta) hold. That the ratio goes to 0 needs more: a variance that
falls no faster than delta. That is so if student and teacher disagree only about tokens whose probability is
of the order of delta, by log-ratios that do not shrink: then the slopes are 2 and 1. But if the teacher stays
as it is, with no probability of 0, and the student's weights come near it, then every log-ratio is of the
order of the distance in weights, and KL, signal and variance are all quadratic in it: 1 and 1 against the KL,
2 and 2 against the distance. The ratio goes to a constant; of the logits' gradient, near the teacher, it is
at least half of the smallest probability. Measured against the KL, near the teacher: 1.00 and 0.97 at 24
positions (in the logits, at all 641 positions: 1.00 and 1.01). So as a limit the claim does not hold for this
pair.

Before the limit it describes what happens: the ratio of the means falls from 0.19 to 0.001, and then stays.
Between 1/2 and 1/16 of the way the signal's slope is 1.6 and the variance's 1.1 (in the logits 1.2 and 1.0;
a few unsure positions decide these numbers). The student becomes sure of itself meanwhile: on average all
tokens but the likeliest have 0.065 of the probability at first, and 0.003 at 1/16 of the way. Over the
positions of one student the theorem's picture is nearly right, too: 1.8 and 1.1 for the untrained student,
1.5 and 1.0 at 1/256 of the way, since positions differ in how much probability their rare tokens have. The
ratio follows that probability with slope 1.0, far from the teacher and near it. So on this pair Eq. (3) is
noisy where the student is sure, rather than because it is near.

The variance of Eq. (3) does go to 0, as every reward does. It would not if the derivative of log p - log q
itself were left in the estimate, a reward of 1 + log p - log q: then the slope is 0.0.

What the theorem leaves out: prefixes vary too. Over 80 whole answers of each of four students the ratio of
OPRD is 0.36 to 0.40. That of the exact KL, which has no token noise, is 0.04 at one of them; at the others it
is within one standard error of 0, and below 0.03 with two. The variance of Eq. (3) is 4 to 155 times that of
the exact KL. So two factors lie between Eq. (3) and OPRD. The theorem explains one of them. The other one,
from the exact KL to OPRD, is 9 at the one student and at least 14 at the others, and is no part of it.

Letters: B answers, T tokens, K positions, V vocabulary, N weights, d width; p student, q teacher.
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from configs import load_config
from formats.huggingface import load_model
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer, same_vocabulary, shared_size, stop_set
from losses import oprd_loss
from model import Model
from output_losses import opd_rows
from paper.runs import Missing
from rollout import sample
from step import position_mask
from studies import toy
from studies.drawing import PAGE, look_of, new_figure, paper_style, save
from support.files import write_json
from support.runtime import UserError, print0, start

# Shares of the way that are left, and two parts of it over which slopes are taken.
LEFT = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64, 1 / 256, 1 / 1024)
MIDDLE = slice(1, 5)
END = slice(5, 8)
LEFT_ROLLOUTS = (1, 1 / 4, 1 / 16, 1 / 64)
SHOWN = {1: 'untrained', 1 / 256: 'arrived'}       # students of which every position is shown
SMALL_KL = 0.01                 # slopes over positions are taken below it: above it the KL saturates
PREFIX_ANSWERS = 16             # answers whose positions are looked at
POSITIONS = 24                  # of these, so many with the gradients of all weights
ROLLOUTS = 80                   # answers for the variance between answers
MAX_NEW_TOKENS = 48
MOST_NUMBERS = 10**8            # V times N, the gradients of one position

# The output-space objectives. 'OPD top-2' and not 16, because the toy has 21 tokens.
OBJECTIVES = {'OPD top-1': dict(kind='sampled'), 'OPD top-2': dict(kind='topk', k=2),
              'OPD full KL': dict(kind='full')}


# ---- one position: all tokens that could be sampled ------------------------------------------------

def token_gradients(z_s, z_t, **objective):
    """The gradient of an objective for every token that could be sampled: logits (K, V) of student and
    teacher -> (K, V, V), whose [k, y] is the gradient of the logits of position k if y is sampled there."""
    K, V = z_s.shape
    copies = z_s.detach().repeat_interleave(V, 0).requires_grad_()           # (K V, V)
    teacher = z_t.repeat_interleave(V, 0)
    tokens = torch.arange(V).repeat(K)
    value = opd_rows(copies, teacher, tokens, **objective)                   # (K V,)
    gradient, = torch.autograd.grad(value.sum(), copies)
    return gradient.view(K, V, V)


def score_gradients(z_s):
    """The gradient of log p(y) for every token y: logits (K, V) -> (K, V, V). Its mean is 0."""
    p = z_s.softmax(-1)
    return torch.eye(z_s.shape[-1], dtype=p.dtype) - p[:, None]


def squared_lengths(vectors, gram=None):
    """|J' a|^2 of each row a of (K, n, V) -> (K, n). gram (K, V, V) is J J', with J (V, N) the gradients of
    the logits by all weights; None: J = 1, the gradient with respect to the logits."""
    carried = vectors if gram is None else vectors @ gram
    return (carried * vectors).sum(-1)


def moments(p, gradients, gram=None):
    """Probabilities (K, V) and gradients (K, V, V) of all tokens -> signal (K,), variance (K,)."""
    # Differences to the first token's gradient: where no token matters they are exactly 0.
    first = gradients[:, :1]                                                 # (K, 1, V)
    away = gradients - first                                                 # (K, V, V)
    mean_away = (p[..., None] * away).sum(1, keepdim=True)                   # (K, 1, V)
    signal = squared_lengths(first + mean_away, gram)[:, 0]
    variance = (p * squared_lengths(away - mean_away, gram)).sum(-1)
    return signal, variance


def kl_rows(z_s, z_t):
    """KL(p || q) of each row, in nats: logits (K, V) and (K, V) -> (K,)."""
    return opd_rows(z_s, z_t, None, kind='full')


# ---- two models and the way between them -------------------------------------------------------------

@dataclass
class Pair:
    """Two models of one shape, in float64, and the prompts that the student answers."""
    student: Model
    teacher: Model
    prompts: list               # of lists of ids
    stop: list                  # ids that end an answer
    vocab: int                  # ids from here on are padding of the embedding

    def at(self, left):
        """The student with `left` of its way to the teacher before it: 1 is the student, 0 the teacher."""
        model = copy.deepcopy(self.teacher).requires_grad_()
        with torch.no_grad():
            for weight, begin in zip(model.parameters(), self.student.parameters(), strict=True):
                weight.add_(left * (begin - weight))
        return model

    def rollout(self, model, answers, step):
        """So many answers of a model, one to each prompt -> Rollout."""
        prompts = [self.prompts[number % len(self.prompts)] for number in range(answers)]
        return sample(model, prompts, max_new_tokens=MAX_NEW_TOKENS, stop=self.stop, step=step,
                      vocab=self.vocab)


@torch.no_grad()
def logits_at(model, ids, at, vocab):
    """Logits (K, V) at the flat positions `at` (K,) of ids (B, T)."""
    return model(ids, at=at)[:, :vocab]


def flat_positions(roll):
    """All response positions of a rollout -> flat positions (K,)."""
    return position_mask(roll).flatten().nonzero().squeeze(-1)


def flat_gradient(loss, weights):
    """The gradient of a loss by all weights as one vector (N,). That of a weight which has no part in the
    loss is 0: Eq. (6) never reaches the head."""
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    parts = []
    for weight, gradient in zip(weights, gradients, strict=True):
        part = torch.zeros_like(weight) if gradient is None else gradient
        parts.append(part.flatten())
    return torch.cat(parts)


@dataclass
class Position:
    """What one position of one student gives."""
    logits: torch.Tensor        # (1, V)
    gram: torch.Tensor          # (1, V, V) J J', see `squared_lengths`
    hidden_signal: float        # the squared length of the gradient of Eq. (6)


def look_at(model, teacher, ids, vocab):
    """The gradients of a model by all its weights, at the last token of a prefix ids (1, t) -> Position."""
    weights = list(model.parameters())
    layers = list(range(1, model.config.L + 1))
    last = torch.tensor([ids.shape[1] - 1])
    with torch.no_grad():
        h_t = teacher.hidden(ids, layers, last)                              # L times (1, d)
    h_s = model.hidden(ids, layers, last)
    logits = model.head(h_s[-1])[0, :vocab]                                  # (V,)

    # The gradient of each logit. Any output-space gradient is a sum of these.
    one_logit_each = torch.eye(vocab, dtype=logits.dtype)
    by_weight = torch.autograd.grad(logits, weights, one_logit_each, retain_graph=True, is_grads_batched=True)
    gram = torch.zeros_like(one_logit_each)
    for gradient in by_weight:                                               # (V, ...)
        gram += gradient.flatten(1) @ gradient.flatten(1).t()

    # Eq. (6) reads states and no token.
    loss = oprd_loss(h_s, h_t, torch.ones(1, dtype=logits.dtype))
    hidden_signal = flat_gradient(loss, weights).square().sum()
    return Position(logits.detach()[None], gram[None], float(hidden_signal))


# ---- the experiments ---------------------------------------------------------------------------------

def positions_data(pair, roll):
    """Every position of the untrained student's answers, with gradients of the logits.

    -> (points, means). points: {'untrained', 'arrived' (where 1/256 of the way is left): {'kl', 'signal',
    'variance', 'unsure': lists of K}}; unsure is the probability of all tokens but the likeliest. means: at
    each share of the way that is left, {'left', 'kl', 'signal', 'variance', 'unsure', 'median ratio':
    lists of n}.
    """
    at = flat_positions(roll)
    z_t = logits_at(pair.teacher, roll.ids, at, pair.vocab)                  # (K, V)
    points = {}
    means = {'left': list(LEFT), 'kl': [], 'signal': [], 'variance': [], 'unsure': [], 'median ratio': []}
    for left in LEFT:
        z_s = logits_at(pair.at(left), roll.ids, at, pair.vocab)
        p = z_s.softmax(-1)
        signal, variance = moments(p, token_gradients(z_s, z_t, kind='sampled'))
        likeliest = p.max(-1, keepdim=True).indices
        columns = {'kl': kl_rows(z_s, z_t), 'signal': signal, 'variance': variance,
                   'unsure': p.scatter(-1, likeliest, 0.0).sum(-1)}
        for name in columns:
            means[name].append(float(columns[name].mean()))
        means['median ratio'].append(float((signal / variance).median()))
        if left in SHOWN:
            points[SHOWN[left]] = {name: column.tolist() for name, column in columns.items()}
    return points, means


def spread_out(kl, count):
    """Numbers of `count` positions that stand for all: those at even ranks of their KL, K numbers."""
    by_kl = sorted(range(len(kl)), key=kl.__getitem__)
    count = min(count, len(kl))
    step = len(kl) / count
    return [by_kl[int((number + 0.5) * step)] for number in range(count)]


def way_data(pair, roll, chosen):
    """The chosen positions as the student walks to the teacher, with gradients of all weights.

    chosen: flat positions. -> {'left': n shares; 'kl', 'signal NAME', 'variance NAME': for each position a
    list of n}.
    """
    T = roll.ids.shape[1]
    prefixes = [roll.ids[at // T, :at % T + 1][None] for at in chosen]       # (1, t) each
    at = torch.tensor(chosen)
    z_t = logits_at(pair.teacher, roll.ids, at, pair.vocab)                  # (K, V)
    data = {'left': list(LEFT)}
    for left in LEFT:
        model = pair.at(left)
        looks = [look_at(model, pair.teacher, ids, pair.vocab) for ids in prefixes]
        z_s = torch.cat([look.logits for look in looks])                     # (K, V)
        gram = torch.cat([look.gram for look in looks])                      # (K, V, V)
        p = z_s.softmax(-1)

        # The gradients of every objective for every token, and Eq. (3) with the score left in.
        gradients = {}
        for name, objective in OBJECTIVES.items():
            gradients[name] = token_gradients(z_s, z_t, **objective)         # (K, V, V)
        gradients['OPD top-1 + grad log p'] = gradients['OPD top-1'] + score_gradients(z_s)

        columns = {'kl': kl_rows(z_s, z_t).tolist(), 'signal OPRD': [look.hidden_signal for look in looks]}
        for name, by_token in gradients.items():
            signal, variance = moments(p, by_token, gram)
            columns[f'signal {name}'] = signal.tolist()
            columns[f'variance {name}'] = variance.tolist()

        # One more number for each position's list.
        for name, column in columns.items():
            data.setdefault(name, [[] for _ in chosen])
            for series, value in zip(data[name], column, strict=True):
                series.append(value)
    return data


def token_has_no_part(pair, roll, at):
    """Eq. (6) at the flat position `at`, once for every token that could come next -> the variance of its
    gradient over these V tokens, in units of its signal."""
    T = roll.ids.shape[1]
    prefix = roll.ids[at // T, :at % T + 1]                                  # (t,)
    model = pair.at(1)
    weights = list(model.parameters())
    layers = list(range(1, model.config.L + 1))
    last = torch.tensor([len(prefix) - 1])
    gradients = []
    for token in range(pair.vocab):
        ids = torch.cat([prefix, torch.tensor([token])])[None]               # (1, t + 1)
        with torch.no_grad():
            h_t = pair.teacher.hidden(ids, layers, last)
        h_s = model.hidden(ids, layers, last)
        loss = oprd_loss(h_s, h_t, torch.ones(1, dtype=torch.float64))
        gradients.append(flat_gradient(loss, weights))

    # As in `moments`: equal gradients have a variance of exactly 0.
    gradients = torch.stack(gradients)                                       # (V, N)
    away = gradients - gradients[0]
    variance = (away - away.mean(0)).square().sum(-1).mean()
    return float(variance / gradients[0].square().sum())


def families_data():
    """Two students of two tokens each, at a distance delta from their teacher, with gradients of the logits.

    inner: the teacher is (0.9, 0.1), and the logits differ by delta: every log-ratio goes to 0.
    rare: the teacher is (1 - delta, delta), the student (1 - 4 delta, 4 delta): the log-ratio of the second
    token stays log 4, while the mass that it concerns goes to 0.
    """
    delta = torch.logspace(-6, -2, 17, dtype=torch.float64)
    inner_t = torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand(len(delta), 2)
    inner_s = inner_t + torch.stack([torch.zeros_like(delta), delta], -1)
    rare_t = torch.stack([1 - delta, delta], -1).log()
    rare_s = torch.stack([1 - 4 * delta, 4 * delta], -1).log()
    data = {'delta': delta.tolist()}
    for name, z_s, z_t in (('inner', inner_s, inner_t), ('rare', rare_s, rare_t)):
        signal, variance = moments(z_s.softmax(-1), token_gradients(z_s, z_t, kind='sampled'))
        data[name] = {'kl': kl_rows(z_s, z_t).tolist(), 'signal': signal.tolist(),
                      'variance': variance.tolist()}
    return data


def two_token_ratio(unsure):
    """Signal over variance of Eq. (3) at two tokens, where the student has arrived at the teacher:
    P (1 - P) / (1 - 2 P)^2 with P the probability of the less likely one."""
    return unsure * (1 - unsure) / (1 - 2 * unsure) ** 2


# ---- whole answers: what else varies -------------------------------------------------------------------

def signal_to_noise(inner, squares):
    """Signal over variance of the gradient of one answer -> (ratio, its standard error by the jackknife).

    inner (n, n): inner products of n gradients with the wanted mean. Pairs of different answers estimate the
    signal without a bias. squares (n,): the squared lengths of the gradients whose variance is asked for.
    """
    n = len(inner)
    answers = torch.arange(n)
    ratios = []
    for left_out in range(-1, n):            # -1: none
        kept = answers[answers != left_out]
        among_kept = inner[kept][:, kept]
        pairs = among_kept.sum() - among_kept.trace()
        signal = pairs / (len(kept) * (len(kept) - 1))
        variance = squares[kept].mean() - signal
        ratios.append(float(signal / variance))
    without_one = torch.tensor(ratios[1:], dtype=torch.float64)
    error = (n - 1) / n * (without_one - without_one.mean()).square().sum()
    return ratios[0], math.sqrt(error)


@dataclass
class AnswerGradients:
    """The gradients of B answers of one student, each a mean over the positions of the answer."""
    of: dict                    # {name of the objective: (B, N) in float32}
    kl: float                   # mean KL of the positions
    token_noise: float          # mean squared distance of the gradients of Eq. (3) and of the exact KL


def answer_gradients(pair, model, roll):
    """The gradient of each answer of a rollout by each objective -> AnswerGradients."""
    weights = list(model.parameters())
    layers = list(range(1, model.config.L + 1))
    numbers = sum(weight.numel() for weight in weights)
    of = {name: torch.empty(len(roll.ids), numbers) for name in ('OPRD', *OBJECTIVES)}
    kl = 0.0
    token_noise = 0.0
    for row in range(len(roll.ids)):
        ids = roll.ids[row, :roll.length[row]][None]                         # (1, T)
        at = torch.arange(roll.prompt_len[row] - 1, roll.length[row] - 1)    # (K,)
        share = torch.full((len(at),), 1 / len(at), dtype=torch.float64)
        with torch.no_grad():
            h_t = pair.teacher.hidden(ids, layers, at)                       # L times (K, d)
            z_t = pair.teacher.head(h_t[-1])[:, :pair.vocab]                 # (K, V)
        h_s = model.hidden(ids, layers, at)
        z_s = model.head(h_s[-1])[:, :pair.vocab]

        losses = {'OPRD': oprd_loss(h_s, h_t, share)}
        for name, objective in OBJECTIVES.items():
            losses[name] = (share * opd_rows(z_s, z_t, ids[0, at + 1], **objective)).sum()
        for name, loss in losses.items():
            of[name][row] = flat_gradient(loss, weights)
        kl += float(losses['OPD full KL'].detach()) / len(roll.ids)
        distance = of['OPD top-1'][row] - of['OPD full KL'][row]
        token_noise += float(distance.square().sum()) / len(roll.ids)
    return AnswerGradients(of, kl, token_noise)


def rollouts_data(pair):
    """Whole answers of students on the way, each from its own rollout -> {'left', 'kl', 'NAME': [signal over
    variance], 'error NAME', 'token share': of the variance of Eq. (3)}.

    The sampled token's noise at one position is uncorrelated with that at all others. So the variance of
    Eq. (3) over answers is that of the exact KL, plus the mean squared distance of the two gradients, plus
    a covariance of the two, which is counted to neither. Both this and the equal means of the two gradients
    are exact for answers of one length. A gradient here is a mean over its answer's positions, and the length
    depends on the sampled tokens. On the toy it hardly does: nearly all answers have 40 tokens.
    """
    data = {'left': list(LEFT_ROLLOUTS), 'answers': ROLLOUTS, 'kl': [], 'token share': []}
    for left in LEFT_ROLLOUTS:
        model = pair.at(left)
        gradients = answer_gradients(pair, model, pair.rollout(model, ROLLOUTS, step=2))
        data['kl'].append(gradients.kl)
        for name, rows in gradients.of.items():
            # The sampled token has the mean of the exact KL, which estimates it with less noise.
            with_its_mean = gradients.of['OPD full KL'] if name == 'OPD top-1' else rows
            inner = (with_its_mean @ with_its_mean.t()).double()             # (B, B)
            squares = rows.square().sum(-1).double()                         # (B,)
            ratio, error = signal_to_noise(inner, squares)
            data.setdefault(name, []).append(ratio)
            data.setdefault(f'error {name}', []).append(error)
            if name == 'OPD top-1':
                variance = float(squares.mean()) / (1 + ratio)
                data['token share'].append(gradients.token_noise / variance)
    return data


# ---- slopes --------------------------------------------------------------------------------------------

def slope(x, y):
    """The exponent s of y = c x^s by least squares of the logarithms -> [s, its standard error]. Points at
    which one of the two is 0 are left out; None: all are."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    if len(pairs) < 2:
        return None
    log_x, log_y = torch.tensor(pairs, dtype=torch.float64).t()
    from_mean = log_x - log_x.mean()
    s = (from_mean * log_y).sum() / from_mean.square().sum()
    residual = log_y - log_y.mean() - s * from_mean
    error = residual.square().sum() / max(1, len(pairs) - 2) / from_mean.square().sum()
    return [float(s), float(error.sqrt())]


def mean_over_positions(series):
    """A list of n for each position -> a list of n."""
    return [sum(values) / len(values) for values in zip(*series, strict=True)]


def slopes_of(data):
    """The exponents of signal and variance against the KL -> {what: [exponent, standard error]}.

    'end NAME', 'middle NAME': means over positions on the way, near the teacher and before; with 'logits' at
    the end, of all positions and the gradient of the logits. 'untrained NAME', 'arrived NAME': over the
    positions of one student. 'ratio unsure': of signal over variance against the probability of all tokens
    but the likeliest. 'inner NAME', 'rare NAME': of the two families.
    """
    slopes = {}
    way = data['way']
    kl = mean_over_positions(way['kl'])
    for name, series in way.items():
        if name.startswith(('signal', 'variance')):
            mean = mean_over_positions(series)
            slopes[f'middle {name}'] = slope(kl[MIDDLE], mean[MIDDLE])
            slopes[f'end {name}'] = slope(kl[END], mean[END])
    slopes['end left'] = slope(way['left'][END], kl[END])
    means = data['all positions']
    for name in ('signal', 'variance'):
        slopes[f'middle {name} logits'] = slope(means['kl'][MIDDLE], means[name][MIDDLE])
        slopes[f'end {name} logits'] = slope(means['kl'][END], means[name][END])

    for student, columns in data['positions'].items():
        near = [k for k, kl in enumerate(columns['kl']) if kl < SMALL_KL]
        near_kl = [columns['kl'][k] for k in near]
        for name in ('signal', 'variance'):
            slopes[f'{student} {name}'] = slope(near_kl, [columns[name][k] for k in near])
        slopes[f'{student} ratio unsure'] = slope(columns['unsure'], ratios(columns))
    for family in ('inner', 'rare'):
        columns = data['families'][family]
        for name in ('signal', 'variance'):
            slopes[f'{family} {name}'] = slope(columns['kl'], columns[name])
    return slopes


def ratios(columns):
    """Signal over variance of each position -> a list; 0 where student and teacher are equal."""
    pairs = zip(columns['signal'], columns['variance'], strict=True)
    return [signal / variance if variance else 0.0 for signal, variance in pairs]


# ---- the data, the figure, the command -------------------------------------------------------------------

def theorem1_data(pair):
    """All experiments on one pair -> a dict of lists and numbers."""
    roll = pair.rollout(pair.student, PREFIX_ANSWERS, step=1)
    data = {'vocabulary': pair.vocab, 'weights': sum(weight.numel() for weight in pair.student.parameters()),
            'families': families_data()}
    data['positions'], data['all positions'] = positions_data(pair, roll)
    at = flat_positions(roll)
    chosen = at[spread_out(data['positions']['untrained']['kl'], POSITIONS)].tolist()
    print0(f'theorem1: {len(LEFT)} students on the way, {len(chosen)} positions, {pair.vocab} gradients each')
    data['way'] = way_data(pair, roll, chosen)
    data['variance OPRD'] = token_has_no_part(pair, roll, chosen[-1])
    print0(f'theorem1: {ROLLOUTS} answers of each of {len(LEFT_ROLLOUTS)} students')
    data['rollouts'] = rollouts_data(pair)
    data['slopes'] = slopes_of(data)
    return data


def draw_theorem1(data, file):
    """The four panels -> files."""
    answers = data['rollouts']['answers']
    positions = len(data['positions']['untrained']['kl'])
    notes = ('gradient of one position in (a) to (c), of a whole answer in (d); signal: squared length of '
             'its mean; variance: summed over its components\n'
             'in (a) to (c) only the token that is sampled varies, so OPRD and full KL have no variance\n'
             f"(a): mean of {len(data['way']['kl'])} positions; (b), (c): {positions} positions; numbers in "
             'brackets: slopes against the KL, in (a) of the 3 points nearest to the teacher,\n'
             f'in (b) below a KL of {SMALL_KL}; black lines: two tokens in closed form\n'
             f'(d): {answers} answers a point, moved sideways, bars of one standard error; an arrow is an '
             'upper limit, two standard errors above the estimate')
    with paper_style():
        figure, panels = new_figure(2, 2, width=PAGE, height=5.2)
        for axes in panels:
            axes.set(xscale='log', yscale='log')
        draw_way(panels[0], data)
        draw_positions(panels[1], data)
        draw_unsure(panels[2], data['positions'])
        draw_rollouts(panels[3], data['rollouts'])
        for axes in panels:
            axes.minorticks_off()
        return save(figure, file, notes)


def draw_way(axes, data):
    """(a) Signal and variance as the student comes near: means over positions. Top-k is left out, because its
    signal lies on that of the exact KL."""
    way = data['way']
    kl = mean_over_positions(way['kl'])
    lines = [('variance OPD top-1 + grad log p', 'student', 'variance, top-1 with ∇log p left in'),
             ('variance OPD top-1', 'OPD top-1', 'variance, top-1'),
             ('signal OPRD', 'OPRD', 'signal, OPRD'),
             ('signal OPD full KL', 'OPD full KL', 'signal, top-1 and full KL')]
    for name, method, label in lines:
        exponent = round(data['slopes'][f'end {name}'][0], 1) + 0.0          # 0.0 and not -0.0
        axes.plot(kl, mean_over_positions(way[name]), label=f'{label} ({exponent:.1f})', **look_of(method))
    # Room for the legend above the lines.
    bottom = min(mean_over_positions(way['signal OPD full KL']))
    top = max(mean_over_positions(way['variance OPD top-1 + grad log p']))
    axes.set(title='(a) the student moves to the teacher', xlabel='mean KL to the teacher (nats)',
             ylabel='signal, variance (all weights)', ylim=(bottom / 10, 10 * top * (top / bottom) ** 0.5))
    axes.legend(loc='upper left', borderaxespad=0.2)


def draw_positions(axes, data):
    """(b) Signal and variance over the positions of one student, beside the family of rare tokens."""
    columns = data['positions']['untrained']
    rare = data['families']['rare']
    for name, method in (('variance', 'OPD top-1'), ('signal', 'OPD full KL')):
        look = look_of(method)
        exponent = data['slopes'][f'untrained {name}'][0]
        axes.scatter(columns['kl'], columns[name], s=3, marker=look['marker'], color=look['color'], lw=0,
                     label=f'{name}, top-1 ({exponent:.1f})')
    axes.plot(rare['kl'], rare['variance'], color='black', lw=0.8,
              label='two tokens, one rare (1.0, 2.0)')
    axes.plot(rare['kl'], rare['signal'], color='black', lw=0.8)
    axes.set(title='(b) the positions of the untrained student', xlabel='KL to the teacher there (nats)',
             ylabel='signal, variance (logits)')
    axes.legend(loc='lower right', markerscale=2)


def draw_unsure(axes, positions):
    """(c) Signal over variance against how unsure the student is."""
    looks = (('untrained', 'untrained student', 'o', '#0072B2', 0),
             ('arrived', '1/256 of the way left', 'x', '#D55E00', 0.6))
    for student, label, marker, color, width in looks:
        columns = positions[student]
        axes.scatter(columns['unsure'], ratios(columns), s=4, marker=marker, color=color, lw=width,
                     label=label)
    unsure = [10 ** (exponent / 20) for exponent in range(-80, -7)]
    axes.plot(unsure, [two_token_ratio(x) for x in unsure], color='black', lw=0.8,
              label='two tokens, student = teacher')
    axes.set(title='(c) the ratio of each position', xlabel='1 - probability of the likeliest token',
             ylabel='signal / variance, top-1')
    axes.legend(loc='upper left', markerscale=2)


def shown_ratios(ratios, errors):
    """Estimates and their standard errors -> (values, bars, is_limit). An estimate that is not above its
    error is shown as an upper limit, two errors above it (or above 0)."""
    values = []
    bars = []
    is_limit = []
    for ratio, error in zip(ratios, errors, strict=True):
        limit = ratio <= error
        is_limit.append(limit)
        values.append(max(ratio, 0.0) + 2 * error if limit else ratio)
        bars.append(values[-1] / 2 if limit else error)      # of a limit: the length of its arrow
    return values, bars, is_limit


def draw_rollouts(axes, rollouts):
    """(d) Signal over variance of the gradient of a whole answer."""
    for number, name in enumerate(('OPRD', *OBJECTIVES)):
        values, bars, is_limit = shown_ratios(rollouts[name], rollouts[f'error {name}'])
        look = look_of(name)
        if any(is_limit):                    # a line would join estimates and limits
            look['linestyle'] = 'none'
        kl = [value * 1.25 ** (number - 1.5) for value in rollouts['kl']]
        axes.errorbar(kl, values, bars, uplims=is_limit, label=name, elinewidth=0.7, **look)
    axes.set(title='(d) whole answers', xlabel='mean KL to the teacher (nats)', ylabel='signal / variance',
             ylim=(None, 20 * max(rollouts['OPRD'])))
    axes.legend(loc='upper center', ncols=2)


def load_pair(student, teacher, data):
    """Folders of two models and a file of problems -> Pair. All empty: the toy's pair."""
    if not student and not teacher:
        cfg = toy.prepare(load_config(['configs/toy.py']), start('cpu'))
        student, teacher, data = cfg['student'], cfg['teacher'], data or cfg['data']
    if not student or not teacher:
        raise UserError('theorem1 compares two models: give student=FOLDER and teacher=FOLDER, or neither of '
                        "them for the toy's pair")
    data = data or str(Path(student).parent / 'train.jsonl')
    if not Path(data).exists():
        raise Missing(f'{data}: no such file; give data=FILE, the problems that the student answers')

    tok_s = load_tokenizer(student)
    tok_t = load_tokenizer(teacher)
    models = [load_model(folder).double() for folder in (student, teacher)]
    if models[0].config != models[1].config or not same_vocabulary(tok_s, tok_t):
        raise UserError(f'{student} and {teacher}: two shapes or two vocabularies, so there is no straight '
                        'way from one to the other; give a pair of one shape')
    weights = zip(models[0].parameters(), models[1].parameters(), strict=True)
    if all(torch.equal(ours, theirs) for ours, theirs in weights):
        raise UserError(f'{student} and {teacher} have the same weights; give two models')
    vocab = shared_size(tok_s, tok_t)
    numbers = vocab * sum(weight.numel() for weight in models[0].parameters())
    if numbers > MOST_NUMBERS:
        raise UserError(f'{student}: {vocab} tokens times its weights are {numbers:.1e} numbers, the '
                        f'gradients of one position; give a model with at most {MOST_NUMBERS:.0e}, such as '
                        'the toy')
    problems = load_problems(data, tok_s, first=ROLLOUTS, show=False)
    return Pair(*models, [problem.ids for problem in problems], stop_set(tok_s, tok_t), vocab)


def rounded(value):
    """A structure of dicts, lists, tensors and numbers with six digits of each number, for a JSON file: what
    lies beyond depends on the order of summation."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f'{value:.6g}') if isinstance(value, float) else value


def theorem1(folders, to='out/paper', student='', teacher='', data=''):
    """The command -> the files that it wrote."""
    if folders:
        raise UserError(f'{folders[0]}: theorem1 reads no run; give student=FOLDER and teacher=FOLDER')
    pair = load_pair(student, teacher, data)
    file = Path(to) / 'theorem1'
    numbers = rounded(theorem1_data(pair))
    write_json(f'{file}.json', numbers)
    return [Path(f'{file}.json'), *draw_theorem1(numbers, file)]
