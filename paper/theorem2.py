"""
Theorem 2 (7 and 8 in the appendix) as an experiment: which differences of hidden states does an output-space
loss not see, and do student and teacher differ there?

    python -m paper theorem2                              the toy's pair, before training
    python -m paper theorem2 out/toy_paper/oprd-s0 out/toy_paper/opd_top-16-s0    and at their checkpoints
    python -m paper theorem2 student=A teacher=B data=problems.jsonl problems=4   another pair
    python -m paper theorem2 head=HuggingFaceTB/SmolLM2-135M-Instruct    the spectrum of another head as well

It writes theorem2.json, .png and .pdf. The toy takes about ten seconds, and half a second for a checkpoint.

The claim. The output is softmax(W h). It does not change when the state h changes by a difference dh with
W dh in span{1}, so no output-space loss sees such a difference, while Eq. (6) sees all of it. Along the
right-singular directions of the head W, with singular values sigma_1 >= ... >= sigma_d, hidden distance over
output loss grows like (sigma_1 / sigma_i)^2. And output-space losses do not see intermediate layers.

What is measured, and where it is in theorem2.json:
    twin         a model with the student's embedding, final norm, head and outputs, and other states in every
                 layer (`twin_of`; it exists for small vocabularies only)
    heads        the singular values of the head with centred logits, of any model folder
    directions   the KL along each right-singular direction, against (sigma_1 / sigma_i)^2
    before, runs Eq. (6) of each layer in two parts, in the null space and the rest, at each checkpoint
    moved        how far the output moves when one part of the student's states becomes the teacher's, and the
                 blocks above read the new states

What holds, what was found, and what the claim does not say (the pair of configs/toy.py with seed 0, where
nothing else is said):
1. The first statement holds, up to rounding in float64: the twin has KL 0, and its Eq. (6) is as large as the
   teacher's in the last layer and larger below. But it needs a head with a null space. The toy has V = 21 and
   d = 96, so 76 of 96 directions are invisible. A real head has V > d: of SmolLM2-135M's 576 directions not
   one is invisible, and there the statement is about no difference at all.
2. It says what a loss can see, and not that the difference matters. Nothing reads the last layer's states but
   the head, so what the head does not see there changes no answer. As a target it may still shape the layers
   below; the theorem says nothing about that.
3. It does not say that student and teacher differ there. 79% of all directions are invisible, but before
   training only 28% of Eq. (6) of the last layer are in them (25 to 30% over three seeds). What it does
   predict is seen in training: OPD top-16 changes this part by -14 to +8% over three seeds, and lowers the
   rest by 19 to 33% (seed 0: 0.066 to 0.059, and 0.173 to 0.124). OPRD, at the step where its rest is as
   low as that, has halved this part, and it ends at a tenth or less.
4. (sigma_1 / sigma_i)^2 is exact for the squared difference of centred logits, where it is what a singular
   value is. For the KL there is a bound from above, sigma_i^2 step^2 / 4 (`kl_bound`), and none from below,
   because the KL weighs tokens by their probability. At the median position the KL follows the prediction
   within a factor of 2.5. The mean KL does not follow it: of the 19 other directions, 16 move it more than
   direction 1 does, though all have smaller singular values. On SmolLM2-135M the lowest direction's ratio is
   6,800 where 2,500 is predicted, and directions in the middle, with predictions of 60 to 100, all have
   ratios near 190.
5. Student and teacher must have the same head. Eq. (6) leaves the student's head as it is. The losses that
   the theorem is about train it: OPD top-16 moves it by 9 to 16% of its norm over three seeds, so the null
   space is then not the student's any more.
6. Intermediate layers are not invisible to output-space losses: the blocks above read all directions of
   their states, and pass a gradient to all. In the first layer, the part in the head's null space, which is
   74% of the difference, moves the output more than the rest does (KL 0.031 and 0.025). What the twin shows
   is weaker and true: equal outputs do not mean equal states. So the share of the null space in an
   intermediate layer is only what the head would not see along the residual path, if there were no blocks
   above (the logit lens).

Simpler than usual: everything is float64, on the CPU, on one rollout of the untrained student, whose answers
all models read. Letters: K positions, V vocabulary, d width, L layers, n directions.
"""
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from configs import load_config
from formats.hub import snapshot
from formats.huggingface import load_model, name_map, read_config, read_tensor, tensor_files
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer, same_vocabulary, shared_size, stop_set
from losses import squared_error
from model import Model
from output_losses import opd_rows
from paper.first_last import started_in
from paper.runs import Missing, by_method, of_kind, read_runs
from paper.theorem1 import rounded
from rollout import sample
from step import position_mask
from studies import toy
from studies.drawing import PAGE, draw_seeds, look_of, new_figure, paper_style, save, whole_ticks
from support.files import write_json
from support.runtime import UserError, print0, shown

TOKENS = 64                     # of an answer, at most
ROWS = 64                       # positions whose logits are held at once
ROWS_OF_A_MATRIX = 8192         # that are factored at once
ROUNDING = 1e-12                # a KL below this is drawn as 0
MOVED_LAYERS = 5                # in which states are moved, evenly spaced; of a shallow model all layers
FEWEST_CHECKPOINTS = 3          # that a run must have kept, or there is no course to see


# ---- the head's directions ----------------------------------------------------------------------

@dataclass
class Basis:
    """The right-singular directions of a matrix. That of the centred head is what a softmax sees: the logits
    W h up to a constant."""
    sigma: torch.Tensor         # (d,) singular values, largest first
    directions: torch.Tensor    # (d, d) its columns
    seen: int                   # how many are not zero; of a head the others span {dh: W dh in span{1}}

    def low(self, lowest=0):
        """How many directions count as low: the null space, or so many as asked for. Without a null space a
        tenth of all."""
        d = len(self.sigma)
        return lowest or d - self.seen or max(1, d // 10)

    def ratio(self):
        """(sigma_1 / sigma_i)^2 of the last direction that is seen."""
        return rounded((self.sigma[0] / self.sigma[self.seen - 1]) ** 2)


def basis_of(matrix, mean=0.0):
    """A matrix (N, d) less the mean of its rows (d,) -> Basis, in float64.

    The factor R of a QR decomposition has the singular values and the right-singular directions of the whole
    matrix. It is built from a slice of the rows at a time, so no second copy of a large head is made. A
    singular value counts as zero below max(N, d) * eps * sigma_1, as in numpy.linalg.matrix_rank.
    """
    N, d = matrix.shape
    R = torch.zeros(0, d, dtype=torch.float64)
    for rows in matrix.split(ROWS_OF_A_MATRIX):
        R = torch.linalg.qr(torch.cat([R, rows.double() - mean]), mode='r').R
    _, sigma, V_t = torch.linalg.svd(R, full_matrices=True)                  # (<= d,), (d, d)

    # With fewer rows than columns, the other directions have the singular value 0.
    sigma = torch.cat([sigma, sigma.new_zeros(d - len(sigma))])
    zero = max(N, d) * torch.finfo(torch.float64).eps * sigma[0]
    return Basis(sigma, V_t.t(), int((sigma > zero).sum()))


def head_basis(W):
    """A head (V, d) -> Basis of the centred head: the mean over the vocabulary is taken off its logits."""
    return basis_of(W, W.double().mean(0))


def head_and_norm(folder):
    """The head (V, d) and the final norm's weight (d,) of a model folder, without the rest of the model. Rows
    that no token stands for are left out: the softmax does not see them."""
    folder = snapshot(folder, weights=True)
    c = read_config(folder)
    files = tensor_files(folder)

    # A tied head is the embedding. Neither it nor the norm is stacked with others in the files.
    head = 'embed.weight' if c.tied else 'head.weight'
    tensors = []
    for ours, shape in ((head, [c.V, c.d]), ('norm.weight', [c.d])):
        name, = name_map(c)[ours]
        if name not in files:
            raise UserError(f'{folder}: tensor {name!r} is missing; fetch the model again')
        # A copy: a memory-mapped tensor dies with its file.
        tensors.append(read_tensor(files[name], name, shape).clone())
    W, norm = tensors
    return W[:load_tokenizer(folder).size], norm


def spectrum(W, norm):
    """What the figure and the text need of a head. Two heads are looked at: W reads the states that Eq. (6)
    compares in the last layer, which are final-normed; W times the norm's weight reads them before that
    weight is applied, as the residual stream has them but for their length."""
    V, d = W.shape
    basis = head_basis(W)
    with_norm = head_basis(W * norm)
    return {'vocabulary': V, 'width': d, 'null_space': d - basis.seen,
            'sigma': rounded(basis.sigma), 'sigma_with_norm': rounded(with_norm.sigma),
            'ratio': basis.ratio(), 'ratio_with_norm': with_norm.ratio()}


# ---- the pair and its rollout -------------------------------------------------------------------

@dataclass
class Pair:
    """A student and a teacher of one shape, in float64, and the positions at which both are looked at."""
    student: Model
    teacher: Model
    ids: torch.Tensor           # (B, T) answers of the student
    at: torch.Tensor            # (K,) flat positions in ids: those that predict an answer's tokens
    next_token: torch.Tensor    # (K,)
    vocab: int                  # ids that both models know

    @property
    def layers(self):
        return list(range(1, self.student.config.L + 1))

    @property
    def W(self):
        """The teacher's head (V, d)."""
        return self.teacher.head.weight[:self.vocab]

    @torch.no_grad()
    def states(self, model):
        """The states of all layers at the positions -> list of (K, d)."""
        return model.hidden(self.ids, self.layers, self.at)

    def bases(self):
        """A Basis for each layer. In the last layer the head reads the states. Below it reads them along the
        residual path, through the final norm's weight."""
        below = head_basis(self.W * self.teacher.norm.weight)
        return [below] * (len(self.layers) - 1) + [head_basis(self.W)]


def read_pair(student_folder, teacher_folder, data, problems, seed=0):
    """Two model folders and a problem set -> Pair. The student answers the first problems once each."""
    tokenizer = load_tokenizer(student_folder)
    teacher_tokenizer = load_tokenizer(teacher_folder)
    student = load_model(student_folder)
    teacher = load_model(teacher_folder)
    c_s, c_t = student.config, teacher.config
    same_shape = (c_s.family, c_s.d, c_s.L) == (c_t.family, c_t.d, c_t.L)
    if not same_shape or not same_vocabulary(tokenizer, teacher_tokenizer):
        raise Missing(f'{student_folder} and {teacher_folder}: no pair of one family, shape and vocabulary; '
                      'give two models that differ in their weights alone')

    weights = zip(student.parameters(), teacher.parameters(), strict=True)
    if all(torch.equal(ours, theirs) for ours, theirs in weights):
        raise UserError(f'{student_folder} and {teacher_folder}: the same weights; give two models that '
                        'differ')

    # It is sampled as a run samples: by the float32 model, at temperature 1.
    vocab = shared_size(tokenizer, teacher_tokenizer)
    prompts = [problem.ids for problem in load_problems(data, tokenizer, problems, show=False)]
    roll = sample(student, prompts, max_new_tokens=TOKENS, stop=stop_set(tokenizer, teacher_tokenizer),
                  vocab=vocab, seed=seed)
    at = position_mask(roll).flatten().nonzero().squeeze(-1)                 # (K,)
    for model in (student, teacher):
        model.double().requires_grad_(False)
    return Pair(student, teacher, roll.ids, at, roll.ids.flatten()[at + 1], vocab)


# ---- Theorem 7: equal outputs, other states -----------------------------------------------------

def free_directions(model):
    """The directions (d, f) of the residual stream into which the embedding writes nothing and of which the
    head reads nothing, through the final norm's weight."""
    used = torch.cat([model.embed.weight, model.head.weight * model.norm.weight])    # (2 V, d)
    basis = basis_of(used.detach())
    return basis.directions[:, basis.seen:]


@torch.no_grad()
def twin_of(model):
    """A model in float64 with the same embedding, final norm, head and outputs, and with other states in
    every layer; None if no direction is free.

    In the twin the free directions of the residual stream have the opposite sign: its states are h Q with
    Q = I - 2 B B'. An RMSNorm does not change a length, so it commutes with Q once its weight is moved into
    the matrix that reads it. Matrices that read the stream turn Q back, matrices that write to it apply Q.
    """
    B = free_directions(model)                                               # (d, f)
    if B.shape[1] == 0:
        return None
    Q = torch.eye(len(B), dtype=torch.float64) - 2 * B @ B.t()               # (d, d), its own inverse
    twin = Model(model.config).double()
    twin.load_state_dict(model.state_dict())

    # The embedding, the final norm and the head stay: Q leaves what they write and read as it is.
    for block in twin.blocks:
        for norm, reads, writes in ((block.norm1, block.attn.qkv, block.attn.out),
                                    (block.norm2, block.mlp.gate_up, block.mlp.down)):
            reads.weight.copy_(reads.weight * norm.weight @ Q)
            norm.weight.fill_(1.0)
            writes.weight.copy_(Q @ writes.weight)
    return twin.requires_grad_(False).eval()


# The output-space losses, as output_losses.opd_rows names them.
LOSSES = {'sampled (3)': dict(kind='sampled'), 'full KL (4)': dict(kind='full'),
          'top-16, renormalised (5)': dict(kind='topk', tail='renorm'),
          'top-16, reward (4.1.1)': dict(kind='topk', tail='reward')}


def output_losses(z_s, z_t, next_token):
    """Logits (K, V) of both -> the largest absolute value over the positions of each output-space loss, and
    of its gradient with respect to the logits."""
    values = {}
    gradients = {}
    for name, settings in LOSSES.items():
        leaf = z_s.detach().clone().requires_grad_()
        loss = opd_rows(leaf, z_t, next_token, **settings)                   # (K,)
        gradient, = torch.autograd.grad(loss.sum(), leaf)
        values[name] = float(loss.detach().abs().max())
        gradients[name] = float(gradient.abs().max())
    return values, gradients


def twin_data(pair):
    """The student against its twin: what each output-space loss says, and Eq. (6) of each layer."""
    twin = twin_of(pair.student)
    if twin is None:
        return None
    h_s = pair.states(pair.student)
    h_t = pair.states(twin)
    W = pair.student.head.weight[:pair.vocab]
    values, gradients = output_losses(h_s[-1] @ W.t(), h_t[-1] @ W.t(), pair.next_token)
    eq6 = [float(squared_error(a, b).mean()) for a, b in zip(h_s, h_t, strict=True)]
    return {'free_directions': free_directions(pair.student).shape[1], 'largest_loss': values,
            'largest_gradient': gradients, 'eq6': rounded(eq6)}


# ---- Theorem 8: the KL along each direction -----------------------------------------------------

def curvature(h, W, directions):
    """Second derivative at 0 of KL(p || p moved) when states h (K, d) take a step along each of the
    directions (d, n) -> (K, n). It is the variance under p of the logits' change z.

    A model may be nearly sure of a token a, and the difference of two sums near 1 would then be a rounding
    error. So z is counted from z_a, and a drops out of the sums.
    """
    z = W @ directions                                                       # (V, n)
    z_squared = z.square()
    parts = []
    for rows in h.split(ROWS):
        p = (rows @ W.t()).softmax(-1)                                       # (C, V)
        top = p.argmax(-1, keepdim=True)                                     # (C, 1)
        rest = p.scatter(-1, top, 0.0)
        mass = rest.sum(-1, keepdim=True)
        z_a = z[top.squeeze(-1)]                                             # (C, n)
        first = rest @ z                                                     # (C, n)
        mean = first - z_a * mass
        square = rest @ z_squared - 2 * z_a * first + z_a.square() * mass
        parts.append((square - mean.square()).clamp(min=0))
    return torch.cat(parts)


def kl_rows(h, h_moved, W, W_moved=None):
    """KL(p || p moved) at each state, (K, d) and (K, d) -> (K,)."""
    W_moved = W if W_moved is None else W_moved
    parts = []
    for rows, moved in zip(h.split(ROWS), h_moved.split(ROWS), strict=True):
        parts.append(opd_rows(rows @ W.t(), moved @ W_moved.t(), None, 'full'))
    return torch.cat(parts)


def kl_bound(sigma, step):
    """KL(p || p moved) is at most sigma_i^2 step^2 / 4, for a step of any length along direction i.

    KL = log E[exp(z - E z)] under p, at most (max z - min z)^2 / 8 by Hoeffding's lemma; and the range of
    numbers that are centred is at most sqrt(2) times their norm, which is sigma_i step.
    """
    return sigma.square() * step ** 2 / 4


def direction_data(pair):
    """For each direction that the head sees: (sigma_1 / sigma_i)^2, and how much more the KL says about a
    step along the first direction than about the same step along direction i."""
    basis = head_basis(pair.W)
    h_s = pair.states(pair.student)[-1]
    h_t = pair.states(pair.teacher)[-1]
    W = pair.W
    seen = basis.directions[:, :basis.seen]                                  # (d, n)
    curve = curvature(h_s, W, seen)                                          # (K, n)

    # Positions differ by orders of magnitude. Where the KL sees no step along some direction, there is no
    # ratio.
    measurable = curve[(curve > 0).all(-1)]
    by_position = measurable[:, :1] / measurable
    levels = {'10%': 0.1, '50%': 0.5, '90%': 0.9}
    of_positions = {name: rounded(by_position.quantile(level, 0)) for name, level in levels.items()}

    # A step as long as the two models are apart is not a small one.
    length = (h_s - h_t).square().sum(-1).mean().sqrt()
    full_step = [float(kl_rows(h_s, h_s + length * seen[:, i], W).mean()) for i in (0, -1)]
    return {'predicted': rounded((basis.sigma[0] / basis.sigma[:basis.seen]).square()),
            'of_mean_kl': rounded(curve[:, 0].mean() / curve.mean(0)),
            'of_positions': of_positions,
            'largest_share_of_bound': rounded((curve / 2 / kl_bound(basis.sigma[:basis.seen], 1)).max()),
            'full_step': {'length': rounded(length), 'kl_along_first': rounded(full_step[0]),
                          'kl_along_last': rounded(full_step[1]),
                          'ratio': rounded(full_step[0] / full_step[1])}}


# ---- where student and teacher differ -----------------------------------------------------------

def split(difference, basis, lowest=0):
    """Differences (K, d) -> the part of each in the low directions, and the rest: (K, d) and (K, d)."""
    low_directions = basis.directions[:, len(basis.sigma) - basis.low(lowest):]              # (d, n)
    low = difference @ low_directions @ low_directions.t()
    return low, difference - low


def measured(pair, bases, h_t, model, lowest=0):
    """A model against the teacher, whose states are h_t -> KL, distance of the heads relative to the
    teacher's, and Eq. (6) of each layer in two parts."""
    h_s = pair.states(model)
    W = model.head.weight[:pair.vocab]
    low_parts = []
    rest_parts = []
    for ours, theirs, basis in zip(h_s, h_t, bases, strict=True):
        low, rest = split(ours - theirs, basis, lowest)
        low_parts.append(float(low.square().mean()))
        rest_parts.append(float(rest.square().mean()))
    return {'kl': rounded(kl_rows(h_s[-1], h_t[-1], W, pair.W).mean()),
            'head': rounded((W - pair.W).norm() / pair.W.norm()),
            'low': rounded(low_parts), 'rest': rounded(rest_parts)}


@torch.no_grad()
def output_after(pair, layer, change):
    """The student's final states (K, d) when its states after a layer change by (K, d) at the positions; the
    blocks above read the new states."""
    def tap(l, h):
        if l != layer:
            return h
        return h.flatten(0, 1).index_add(0, pair.at, change).view_as(h)
    return pair.student.trunk(pair.ids, tap=tap).flatten(0, 1)[pair.at]


def moved_data(pair, bases, lowest=0):
    """For some layers: the KL from the student's output to its output when the low part of its states becomes
    the teacher's, and the same for the rest. In the last layer the first is 0 if the low directions are the
    null space."""
    L = pair.student.config.L
    count = min(L, MOVED_LAYERS)
    layers = sorted({1 + (L - 1) * i // max(1, count - 1) for i in range(count)})
    h_s = pair.states(pair.student)
    h_t = pair.states(pair.teacher)
    W = pair.student.head.weight[:pair.vocab]
    data = {'layers': layers, 'low': [], 'rest': []}
    for layer in layers:
        low, rest = split(h_t[layer - 1] - h_s[layer - 1], bases[layer - 1], lowest)
        for name, change in (('low', low), ('rest', rest)):
            h_moved = output_after(pair, layer, change)
            data[name].append(rounded(kl_rows(h_s[-1], h_moved, W).mean()))
    return data


def kept_checkpoints(folder):
    """{step: model folder} of the checkpoints that a run has kept."""
    found = {}
    for path in sorted(Path(folder).glob('ckpt-*/model')):
        name = re.fullmatch('ckpt-([0-9]{6})', path.parent.name)
        if name:
            found[int(name[1])] = path
    return found


def run_data(pair, run, lowest=0):
    """A run at its kept checkpoints, the untrained student first: what `measured` says, as lists over the
    steps. low and rest: [step][layer]."""
    bases = pair.bases()
    h_t = pair.states(pair.teacher)
    checkpoints = kept_checkpoints(run.folder)
    points = [measured(pair, bases, h_t, pair.student, lowest)]
    for folder in checkpoints.values():
        model = load_model(folder, torch.float64).requires_grad_(False)
        points.append(measured(pair, bases, h_t, model, lowest))
    data = {'method': run.method, 'seed': run.seed, 'steps': [0, *checkpoints]}
    return data | {name: [point[name] for point in points] for name in points[0]}


# ---- everything ---------------------------------------------------------------------------------

def theorem2_data(pair, runs, heads, lowest=0):
    """pair: Pair; runs: [(Run, its Pair)]; heads: {name: (W, norm)} -> everything that is written and
    drawn."""
    bases = pair.bases()
    d = pair.student.config.d
    before = measured(pair, bases, pair.states(pair.teacher), pair.student, lowest)
    return {'positions': len(pair.at), 'answers': len(pair.ids), 'layers': pair.layers, 'width': d,
            'low': {'directions': bases[-1].low(lowest), 'null_space': d - bases[-1].seen},
            'heads': {name: spectrum(*head) for name, head in heads.items()},
            'twin': twin_data(pair), 'directions': direction_data(pair), 'before': before,
            'moved': moved_data(pair, bases, lowest),
            'runs': [run_data(own_pair, run, lowest) for run, own_pair in runs]}


# ---- the figure ---------------------------------------------------------------------------------

# The two parts of a difference: one line style each, in all panels.
PARTS = {'rest': {'linestyle': '-'}, 'low': {'linestyle': ':'}}


def draw_theorem2(data, file):
    """Up to six panels, two in a row: Theorem 7, Theorem 8, and where student and teacher differ."""
    draw = [draw_moved, draw_heads, draw_directions, draw_shares]
    if data['twin']:
        draw.insert(0, draw_twin)
    if data['runs']:
        draw.append(draw_parts)
    with paper_style():
        rows = -(-len(draw) // 2)
        figure, axes = new_figure(rows, 2, PAGE, 2.3 * rows)
        for draw_panel, panel in zip(draw, axes, strict=False):
            draw_panel(panel, data)
        for panel in axes[len(draw):]:
            panel.remove()
        notes = (f"{data['answers']} answers of the untrained student, {data['positions']:,} positions; "
                 f'{low_name(data)}: {data["low"]["directions"]} of {data["width"]} directions of the '
                 "teacher's head; below the last layer: what the head would not see if it read the state "
                 'there')
        seeds = {run['seed'] for run in data['runs']}
        if len(seeds) > 1:
            notes += (f'; shares and training: mean of {len(seeds)} seeds; all else: seed '
                      f"{data['runs'][0]['seed']}")
        return save(figure, file, notes)


def low_name(data):
    """What the low directions are, in two words."""
    if data['low']['directions'] == data['low']['null_space']:
        return 'null space'
    return f"lowest {data['low']['directions']}"


def methods_of(data):
    """{method: its runs}, in the order in which they come."""
    methods = {}
    for run in data['runs']:
        methods.setdefault(run['method'], []).append(run)
    return methods


def layer_axis(axes, layers):
    """The x axis of a panel over the layers."""
    axes.set(xlabel='layer', xlim=(layers[0] - 0.3, layers[-1] + 0.3))
    whole_ticks(axes)


def draw_twin(axes, data):
    """Eq. (6) of each layer: the student against the teacher, and against its twin, whose outputs equal its
    own."""
    before = data['before']
    distance = [low + rest for low, rest in zip(before['low'], before['rest'], strict=True)]
    kl = {'teacher': before['kl'], 'twin': data['twin']['largest_loss']['full KL (4)']}
    twin = data['twin']['eq6']
    for name, values, line, marker in (('teacher', distance, '--', 'o'), ('twin', twin, '-', 's')):
        label = f'to the {name}: KL {0 if kl[name] < ROUNDING else kl[name]:.3g}'
        axes.plot(data['layers'], values, label=label, color='0.2', linestyle=line, marker=marker)
    axes.set(ylabel='Eq. (6)', title='equal outputs, other states')
    axes.set_ylim(0, 1.45 * max(distance + twin))
    axes.legend(loc='upper left')
    layer_axis(axes, data['layers'])


def draw_moved(axes, data):
    """How far the output moves when a part of the student's states becomes the teacher's."""
    moved = data['moved']
    for key, label, marker in (('rest', 'the rest', 'o'), ('low', low_name(data), 's')):
        axes.plot(moved['layers'], moved[key], label=label, color='0.2', marker=marker, **PARTS[key])
    axes.set(ylabel='KL to the output before (nats)', title="a part of the state becomes the teacher's")
    layer_axis(axes, moved['layers'])


def draw_shares(axes, data):
    """The low directions' share of student minus teacher, before and after training."""
    layers = data['layers']
    random_share = data['low']['directions'] / data['width']
    axes.axhline(100 * random_share, color='0.4', linestyle=(0, (1, 2)), lw=0.8, label='random direction')
    methods = methods_of(data)
    before = [data['before']]
    if methods:                              # of the same seeds as after training
        before = [{key: run[key][0] for key in PARTS} for run in next(iter(methods.values()))]
    axes.plot(layers, shares(before), label='before', color='0.4', linestyle='--', marker='x')
    for method, runs in methods.items():
        last = [{key: run[key][-1] for key in PARTS} for run in runs]
        axes.plot(layers, shares(last), label=f'after {method}', **look_of(method))
    axes.set(ylabel='share of Eq. (6) (%)', ylim=(0, 100), title=f'share of the {low_name(data)}')
    axes.legend(loc='lower left')
    layer_axis(axes, layers)


def shares(points):
    """The low part's share of Eq. (6) in each layer, in per cent, averaged over the seeds' points."""
    result = []
    for layer in range(len(points[0]['low'])):
        of_seeds = []
        for point in points:
            low = point['low'][layer]
            total = low + point['rest'][layer]
            of_seeds.append(100 * low / total if total else 0.0)
        result.append(fmean(of_seeds))
    return result


def draw_heads(axes, data):
    """Singular values against their number; those that are 0 cannot be drawn on a logarithmic axis."""
    for name, head in data['heads'].items():
        color = look_of(name)['color']
        line = look_of(name)['linestyle']
        d = head['width']
        seen = d - head['null_space']
        share = [number / d for number in range(1, seen + 1)]
        zero = f'{d - seen} of {d} are 0' if seen < d else f'none of {d} is 0'
        for key, label, width in (('sigma', f'{name}: {zero}', 1.3),
                                  ('sigma_with_norm', f'{name}, with the norm', 0.6)):
            values = [value / head[key][0] for value in head[key][:seen]]
            axes.plot(share, values, label=label, color=color, linestyle=line, lw=width)
    axes.set(xlabel='number of the direction i / width d', ylabel='σᵢ / σ₁', yscale='log', xlim=(-0.02, 1.02),
             title="the head's singular values")


def draw_directions(axes, data):
    """What the theorem predicts against what the KL says, for each direction."""
    directions = data['directions']
    predicted = directions['predicted']
    quantiles = directions['of_positions']
    ends = [predicted[0], predicted[-1]]
    axes.plot(ends, ends, color='0.4', linestyle='--', lw=0.8, label='(σ₁/σᵢ)²')
    axes.vlines(predicted, quantiles['10%'], quantiles['90%'], color='0.75', lw=0.8, label='80% of positions')
    axes.plot(predicted, quantiles['50%'], color='0.2', linestyle='None', marker='_', label='median position')
    axes.plot(predicted, directions['of_mean_kl'], color='#D55E00', linestyle='None', marker='o', ms=2.5,
              label='mean KL')
    axes.set(xlabel='(σ₁/σᵢ)²', ylabel='KL along 1 / KL along i', xscale='log', yscale='log',
             title='a small step along direction i')
    axes.set_ylim(top=8 * max(quantiles['90%']))
    axes.legend(loc='upper left', ncols=2)


def draw_parts(axes, data):
    """Both parts of Eq. (6) of the last layer over the steps; thin lines are seeds."""
    largest = 0
    for method, runs in methods_of(data).items():
        for key, what in (('rest', 'the rest'), ('low', low_name(data))):
            by_seed = [[step[-1] for step in run[key]] for run in runs]
            largest = max(largest, *(max(values) for values in by_seed))
            draw_seeds(axes, runs[0]['steps'], by_seed, f'{method}, {what}', look_of(method) | PARTS[key])
    axes.set(xlabel='step', ylabel='Eq. (6) of the last layer', yscale='log',
             title='the last layer during training')
    axes.set_ylim(top=5 * largest)
    axes.legend(loc='upper left', ncols=2, columnspacing=1, handlelength=2.5)


# ---- the command --------------------------------------------------------------------------------

def whole_number(key, value, least):
    """A whole number from the command line."""
    if not str(value).isdecimal() or int(value) < least:
        raise UserError(f'{key}={shown(value)}: not a whole number from {least} on')
    return int(value)


def paths_of(config):
    """The paths of a config's student, teacher and held-out problems -> tuple. 'toy' stands for a file of the
    toy's folder."""
    paths = []
    for path, name in ((config['student'], 'student'), (config['teacher'], 'teacher'),
                       (config['eval_data'] or config['data'], 'eval.jsonl')):
        if path == 'toy':
            folder = toy.folder_of(config)
            if not folder.exists():
                raise Missing(f'{folder}: no such folder; python -m studies.toy configs/toy.py makes the '
                              'toy; or give student=, teacher= and data=')
            path = str(folder / name)
        paths.append(path)
    return tuple(paths)


def usable_runs(folders):
    """The runs whose teacher has the student's shape, of the methods all of whose runs have kept three
    checkpoints or more. A line for each of the others."""
    same = []
    for run in read_runs(of_kind(folders, 'run')):
        if run.pair == 'same':
            same.append(run)
        else:
            print0(f'{run.folder}: left out, the teacher has another shape than the student')
    chosen = []
    for method, runs in by_method(same).items():
        fewest = min(len(kept_checkpoints(run.folder)) for run in runs)
        if fewest < FEWEST_CHECKPOINTS:
            print0(f'{method}: left out, a run has kept {fewest} checkpoint(s); save_every=10 keep=100 keeps '
                   'all of a run of 100 steps')
        else:
            chosen += runs
    return chosen


def theorem2(folders, to='out/paper', student='', teacher='', data='', head='', problems='64', lowest='0'):
    """Measure, write theorem2.json and draw theorem2.png and .pdf in the folder `to` -> list of files.

    folders: of runs. student, teacher, data: a pair and its problems, in place of the runs'. head: more model
    folders whose head is looked at, with commas between. problems: how many are answered. lowest: how many
    directions count as low; 0: the null space, or a tenth of all where there is none.
    """
    problems = whole_number('problems', problems, 1)
    lowest = whole_number('lowest', lowest, 0)
    runs = with_pairs(usable_runs(folders), problems)
    if student or teacher or data:
        if runs or not (student and teacher and data):
            raise UserError('student=, teacher=, data=: give all three, and no run; a run has its own pair')
        pair = read_pair(student, teacher, data, problems)
        name = Path(teacher).name
    elif runs:
        pair = runs[0][1]
        name = name_of(runs[0][0].config['teacher'])
    else:
        pair = read_pair(*paths_of(load_config(['configs/toy.py'])), problems)
        name = name_of('toy')
    if lowest > pair.student.config.d:
        raise UserError(f'lowest={lowest}: a state has {pair.student.config.d} numbers; give fewer')

    heads = {name: (pair.W, pair.teacher.norm.weight)}
    for folder in filter(None, head.split(',')):
        heads[Path(folder).name] = head_and_norm(folder)
    result = theorem2_data(pair, runs, heads, lowest)
    file = Path(to) / 'theorem2'
    write_json(f'{file}.json', result)
    return [Path(f'{file}.json'), *draw_theorem2(result, file)]


def name_of(teacher):
    """What a teacher is called in the figure."""
    return 'the toy' if teacher == 'toy' else Path(teacher).name


def with_pairs(runs, problems):
    """Runs -> [(Run, its Pair)]. A toy has another pair for each seed; a pair is read once."""
    pairs = {}
    result = []
    for run in runs:
        # The paths in a config begin in the folder in which the run was started.
        with started_in(run.folder, run.config):
            key = (Path.cwd(), *paths_of(run.config), run.seed)
            if key not in pairs:
                pairs[key] = read_pair(*paths_of(run.config), problems, run.seed)
        result.append((run, pairs[key]))
    return result
