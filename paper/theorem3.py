"""
Theorems 3, 9 and 10 as an experiment: does the rank that the theory recommends distil best?

    python -m paper theorem3 out/toy_paper       bridges, and runs that differ in bridge_rank alone

What the theorem claims. PCA is the best linear encoder of r numbers for the teacher's states. Let lam_i be
the variance of the teacher's component i, and rho2_i the share of it that a linear map predicts from the
student. Then a bridge of rank r costs

    E(r) = sum_{i>r} lam_i rho2_i + sum_{i<=r} lam_i (1 - rho2_i)

so one more component pays while rho2 > 1/2, and the best rank can be read off before stage 2.

What it assumes. (1) What is left out although it can be predicted costs as much as what is included although
it cannot. So E(r) is no error of a prediction: that one only falls with the rank. (2) Each layer has a rank
of its own. The project uses one for all, with the least mean of E(r) over layers, each layer's divided by
its variance. (3) PCA comes first, and the rank second. Among all encoders E is least for another one: the
eigenvectors of 2 P - C with positive eigenvalues, where C is the covariance of the teacher's states and P
what is predicted of it. (4) The student stands still: what cannot be predicted is noise. But in stage 2 the
student learns to predict it.

What is measured: rho2 of each component, before stage 2 and after it; E(r), and the variance that an encoder
keeps, for PCA, for random directions, and for the best directions of E; the held-out cosine of the bridge;
and the accuracy of the students that were distilled at each rank. lam, rho2 and E come from bridge.json. The
rest is read from the answers that the bridge was fitted on (rollouts.jsonl): every fit is on one part of
them, every number from the other, held-out part. Also the trained students read these answers of the
untrained one, so that nothing but the student differs.

What was found on the toy (a teacher of another depth and width; configs/toy_paper.py, three seeds, 100
steps). The theorem's rank is 31, 31 and 30. Ranks 2, 4, 8, 16, that one, 64 and 96 lead from 36.4% to 8.4,
25.4, 49.7, 55.2, 52.4, 50.9 and 50.5%, means over seeds. So E says which ranks are too small, and not which
one is best: from rank 16 to 31 it still falls (0.17 to 0.15, 0.13 to 0.10 and 0.16 to 0.13 of the variance),
while rank 16 is level with 31 on one seed, and ahead by 5.4 and 3.0 points on the others (standard error over
the 64 problems of seed 1: 2.3). The held-out cosine, which is highest at rank 2, misleads: over the six ranks
other than the theorem's its rank correlation with the accuracies is -0.83, -0.77 and -0.43, where that of -E
is 0.77, 0.83 and 0.54.

Assumption (2) matters: the layers' own ranks are 17 to 38. So does (3): the best directions for E reach
0.130, 0.089 and 0.114 where PCA reaches 0.150, 0.100 and 0.129. And (4) does not hold: after stage 2 at the
theorem's rank the share of components 17 to 30 that can be predicted is 0.82, 0.84 and 0.87, where it was
0.56, 0.63 and 0.66. But most of this does not need them in the bridge: after stage 2 at rank 16, which
leaves them out, it is 0.75, 0.77 and 0.80.

Simpler than usual: everything is algebra on sums over rows (bridge_parts/closed_form.py). What it does not
do: choose a rank for each layer, which distill.py cannot use. Writes theorem3.json, .png and .pdf.

Letters: K positions, d width (d_s student, d_t teacher), R full rank, r rank, i a component, w a direction.
"""
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from bridge_parts.closed_form import (
    LayerBridge,
    Moments,
    energy,
    predicted_share,
    principal_directions,
    ridge,
)
from bridge_parts.collection import first_date, open_collection
from paper.first_last import open_pair, started_in
from paper.runs import Missing, method_key, of_kind, read_runs
from rollout import collect, numbered
from studies.drawing import draw_seeds, look_of, new_figure, paper_style, save
from studies.figures import accuracy, read_bridge
from support.fields import Field, check_fields
from support.files import write_json
from support.optimizer import ever_positive
from support.run_folder import scores_of
from support.runtime import UserError, print0

# What bridge.json must hold of a layer, beside what its own figure needs.
SHARE = Field(list, 1, items=Field(float, 0, 1.0000001))
LAYER = {'variance': Field(float, 0), 'lam': Field(list, 1, items=Field(float, 0)), 'rho2': SHARE}
FITTED = {'positions': Field(str), 'bridge_prompts': Field(int, 2), 'bridge_held_out': Field(float, 0, 1),
          'bridge_ridge': Field(float, 0), 'bridge_bias': Field(bool)}
ENCODERS = {'PCA': 'PCA', 'best for E': 'best for E', 'random': 'random directions'}


# ---- what the folders say ------------------------------------------------------------------------

@dataclass
class RankRun:
    """A run through a bridge."""
    run: object                 # paper.runs.Run
    bridge: str                 # the bridge's folder
    asked: int                  # bridge_rank; 0: the one that the theorem recommends
    rank: int                   # the one that was used


def rank_runs(runs):
    """Of some runs those that differ in bridge_rank and seed alone, where most ranks were tried ->
    ([RankRun], {a bridge's folder: its bridge.json}); both empty if no two ranks can be compared."""
    groups = {}                              # {what the runs have in common: runs}
    for run in runs:
        if run.config['bridge'] and not ever_positive(run.config['opd_weight']):
            common = tuple(pair for pair in method_key(run.config) if pair[0] != 'bridge_rank')
            groups.setdefault(common, []).append(run)
    asked_in = {common: {run.config['bridge_rank'] for run in group} for common, group in groups.items()}
    if not groups or max(map(len, asked_in.values())) < 2:
        return [], {}
    chosen = groups[max(groups, key=lambda common: len(asked_in[common]))]

    # The bridges of these runs, one for each seed. A run's config names the folder.
    found = []
    bridges = {}
    for run in with_all_ranks(chosen):
        with started_in(run.folder, run.config):
            folder = Path(run.config['bridge']).resolve()
        if folder.is_relative_to(Path.cwd()):
            folder = folder.relative_to(Path.cwd())          # the JSON file says nothing about the machine
        folder = str(folder)
        made = bridges.get(folder) or read_components(folder)
        bridges[folder] = made
        asked = run.config['bridge_rank']
        found.append(RankRun(run, folder, asked, asked or made['rank']))
    return found, bridges


def with_all_ranks(runs):
    """The runs of those seeds that have the most ranks: a mean over seeds needs all of them at each rank. A
    study that is not finished has seeds with fewer; a line says which are left out."""
    asked = {}                               # {seed: its ranks}
    for run in runs:
        ranks = asked.setdefault(run.seed, set())
        if run.config['bridge_rank'] in ranks:
            raise UserError(f'{run.folder}: another run has seed {run.seed} and bridge_rank='
                            f'{run.config["bridge_rank"]} too; give one of them')
        ranks.add(run.config['bridge_rank'])
    fullest = max(asked.values(), key=len)
    for seed, ranks in asked.items():
        if not fullest <= ranks:
            missing = ', '.join(map(str, sorted(fullest - ranks)))
            print0(f'theorem3: seed {seed} is left out, it has no run with bridge_rank={missing}')
    return [run for run in runs if fullest <= asked[run.seed]]


def read_components(folder):
    """A folder's bridge.json with lam and rho2 of every component."""
    made = read_bridge(folder)
    file = Path(folder) / 'bridge.json'
    advice = 'rerun bridge.py'
    check_fields(made, FITTED, file, advice)
    for layer, values in made['layers'].items():
        check_fields(values, LAYER, f'{file}: layer {layer}', advice)
        if len(values['lam']) != len(values['rho2']):
            counts = f'{len(values["lam"])} lam and {len(values["rho2"])} rho2'
            raise UserError(f'{file}: layer {layer}: {counts}; {advice}')
    return made


def first_bridges(folders):
    """The seeds of the first of some bridges, where no run says which belong together -> {folder: its
    bridge.json}. Seeds are folders whose names differ in their ends alone: x-s0, x-s1, ..."""
    bridges = {}
    for folder in folders:
        names = [re.sub(r'-s\d+$', '', Path(name).name) for name in (folder, folders[0])]
        if names[0] == names[1]:
            bridges[str(folder)] = read_components(folder)
        else:
            print0(f'theorem3: {folder} is left out, it is no seed of {folders[0]}')
    return bridges


# ---- Theorem 3, from bridge.json -------------------------------------------------------------------

def components(made):
    """A bridge.json -> what Theorem 3 says about it: of each layer rho2 (R,) and the rank with the least E;
    the mean E(r) (R,) over layers, each layer's divided by its variance, and the rank that it recommends."""
    layers = {}
    total = 0.0
    for layer, values in made['layers'].items():
        lam = torch.tensor(values['lam'], dtype=torch.float64)               # (R,)
        rho2 = torch.tensor(values['rho2'], dtype=torch.float64)             # (R,)
        E = energy(lam, rho2) / values['variance']                           # (R,)
        total = total + E
        weak = (rho2 <= 0.5).nonzero().flatten().tolist()

        # "While rho2 > 1/2" stops at the first component that is not; E may have its minimum later.
        layers[layer] = {'rho2': values['rho2'], 'rank of least E': int(E.argmin()) + 1,
                         'components before the first with rho2 <= 1/2': weak[0] if weak else len(rho2),
                         'components with rho2 > 1/2': len(rho2) - len(weak)}
    mean_E = total / len(layers)
    cosines = {}
    for r in made['layers'][layer]['cos']:
        cosines[r] = fmean(values['cos'][r] for values in made['layers'].values())
    return {'layers': layers, 'E': mean_E.tolist(), 'recommended': int(mean_E.argmin()) + 1, 'cos': cosines}


# ---- encoders, on the states themselves ------------------------------------------------------------

def fitted_and_held_out(pair, made):
    """The moments of the answers that a bridge was fitted on, and of those that judged it -> two {student
    layer: Moments}. made: its bridge.json. The pair's student may be another one than the one that answered.
    """
    cfg = pair.cfg | {key: made[key] for key in FITTED} | {'date': first_date(pair.cfg['bridge'])}
    collection = open_collection(cfg, pair.problems, pair.tok_s, pair.tok_t)
    if len(collection.answers) < len(collection.order):
        raise Missing(f'{collection.file}: {len(collection.answers)} of {len(collection.order)} answers; '
                      'bridge.py samples the others')
    # The same answers are held out as by bridge.py, and the same positions are read.
    held_out = max(1, round(made['bridge_held_out'] * len(collection.answers)))
    which = made['positions']
    sizes = {'last_k': cfg['last_k'], 'first_k': cfg['first_k'], 'last_frac': cfg['last_frac'],
             'first_frac': cfg['first_frac']}
    parts = []
    for answers in (collection.answers[:-held_out], collection.answers[-held_out:]):
        sums = {}
        for layer in pair.layer_map:
            sums[layer] = Moments(pair.student.config.d, pair.teacher.config.d, pair.device)
        roll = as_rollout(answers, pair)
        for _, _, inside, states_s, states_t in pair.read(roll, pair.layer_map, which, sizes.get(which, 0)):
            for layer in pair.layer_map:
                sums[layer].add(states_s[layer], states_t[layer], inside)
        parts.append(sums)
    return parts


def as_rollout(answers, pair):
    """Stored answers -> Rollout; its `prompt` is the problem's number."""
    numbers = [answer.problem for answer in answers]
    requests = numbered([pair.problems[number].ids for number in numbers], 1, numbers, None)
    ended = [(i, answer.ids, answer.stopped) for i, answer in enumerate(answers)]
    roll = collect(requests, 1, ended, pair.device)
    roll.prompt = torch.tensor(numbers, device=pair.device)
    return roll


def predictability(fit, held_out, made, rank):
    """rho2 (rank,) of the first components of a layer, of a new linear map from this student's states."""
    mean, P_t, _ = principal_directions(fit)
    P_t = P_t[:rank]
    P_s, b_s = ridge(fit, mean, P_t, made['bridge_ridge'], made['bridge_bias'])
    return predicted_share(held_out, LayerBridge(mean, P_t, P_s, b_s))[1]


def total_and_predicted(fit, judged, penalty, bias):
    """Covariance C (d_t, d_t) of the teacher's states in the moments `judged`, and P (d_t, d_t): what of it
    the linear map that is fitted on the moments `fit` predicts, C less the residual's second moment."""
    mean = fit.central().y                                                   # (d_t,)
    identity = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    maps, biases = ridge(fit, mean, identity, penalty, bias)                 # (2, d_t, d_s), (2, d_t)
    every_row = judged.central()
    residual = torch.zeros_like(identity)
    for c in (0, 1):
        # E (y - guess)(y - guess)' from the class's covariances, and the difference of the means.
        rows = judged.central(c)
        gap = rows.y - mean - maps[c] @ rows.x - biases[c]                   # (d_t,)
        cross = rows.yx @ maps[c].t()                                        # (d_t, d_t)
        second = rows.yy - cross - cross.t() + maps[c] @ rows.xx @ maps[c].t() + torch.outer(gap, gap)
        residual += rows.count / every_row.count * second
    return every_row.yy, every_row.yy - residual


def encoders(fit, penalty, bias, seed):
    """Three orthonormal bases of the teacher's space, a direction per row (d_t, d_t), of which rank r takes
    the first r: PCA, random directions, and the directions that minimise E."""
    C, P = total_and_predicted(fit, fit, penalty, bias)
    _, P_t, _ = principal_directions(fit)

    # A direction w adds w'(C - P)w to what is included in vain, and takes w'Pw from what is left out. So E is
    # least with all eigenvectors of 2 P - C whose eigenvalue is positive.
    _, vectors = torch.linalg.eigh(2 * P - C)        # ascending; one vector per column
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(C.shape, generator=generator, dtype=C.dtype).to(C.device)
    random_basis, _ = torch.linalg.qr(noise)
    return {'PCA': P_t, 'best for E': vectors.flip(1).t(), 'random': random_basis.t()}


def judge_encoder(basis, C, P, R):
    """A basis (d_t, d_t) -> of each rank r = 1..R: the share of the variance that its first r directions
    keep, and E(r) as a share of the variance. Two lists."""
    # Of each direction w its variance w'Cw, and what is predicted of it, w'Pw.
    variance = C.diagonal().sum()
    lam = ((basis @ C) * basis).sum(1)                                       # (d_t,)
    predicted = ((basis @ P) * basis).sum(1)                                 # (d_t,)
    kept = lam.cumsum(0) / variance
    E = energy(lam, predicted / lam.clamp(min=1e-30)) / variance
    return kept[:R].tolist(), E[:R].tolist()


def measure_encoders(ranked, made):
    """The three encoders of a run's teacher, before training -> {encoder: {'kept', 'E': a list, mean over
    layers}}. made: the bridge.json of the run's bridge."""
    folder = ranked.run.folder.resolve()
    with started_in(folder, ranked.run.config):
        pair = open_pair(ranked.run.config, folder)
        fitted, held_out = fitted_and_held_out(pair, made)
    penalty, bias = made['bridge_ridge'], made['bridge_bias']
    found = {name: {'kept': [], 'E': []} for name in ENCODERS}
    for layer in pair.layer_map:
        C, P = total_and_predicted(fitted[layer], held_out[layer], penalty, bias)
        for name, basis in encoders(fitted[layer], penalty, bias, pair.cfg['seed']).items():
            kept, E = judge_encoder(basis, C, P, made['ranks'])
            found[name]['kept'].append(kept)
            found[name]['E'].append(E)
    return {name: {key: mean_of(lists) for key, lists in values.items()} for name, values in found.items()}


def measure_trained(ranked, made):
    """A finished run -> rho2 of each component after stage 2, a list, mean over layers."""
    folder = ranked.run.folder.resolve()
    with started_in(folder, ranked.run.config):
        pair = open_pair(ranked.run.config, folder, student=folder / 'last')
        fitted, held_out = fitted_and_held_out(pair, made)
    by_layer = []
    for layer in pair.layer_map:
        rho2 = predictability(fitted[layer], held_out[layer], made, made['ranks'])
        by_layer.append(rho2.tolist())
    return mean_of(by_layer)


def measure(data, ranked, bridges):
    """Add what needs the models to the data: the encoders of each bridge, and rho2 after stage 2 for two
    values of bridge_rank, the one that distilled best and the recommended one (0). Where the models are not
    there, a line says so."""
    try:
        for folder, made in bridges.items():
            of_bridge = [one for one in ranked if one.bridge == folder]
            if of_bridge:
                data['encoders'][folder] = measure_encoders(of_bridge[0], made)
        if data['distilled']:
            for one in ranked:
                if one.asked in (data['distilled']['best'], 0):
                    rho2 = measure_trained(one, bridges[one.bridge])
                    data['trained'].setdefault(str(one.asked), []).append(rho2)
    except Missing as error:
        print0(f'theorem3: without the panels that need the models ({error})')


def mean_of(lists):
    """Lists of one length -> the list of their means."""
    return [fmean(values) for values in zip(*lists, strict=True)]


# ---- the numbers of the figure ---------------------------------------------------------------------

def theorem3_data(bridges, ranked):
    """{folder: bridge.json} and [RankRun] -> the numbers that need no model, for JSON."""
    found = {folder: components(made) for folder, made in bridges.items()}
    return {'bridges': found, 'distilled': distilled(ranked, found) if ranked else None,
            'encoders': {}, 'trained': {}}


def distilled(ranked, found):
    """[RankRun] and the components of their bridges -> the accuracies by rank, which rank distils best, and
    how well E and the cosine order them; None if nothing was evaluated."""
    by_seed = {}                             # {seed: {bridge_rank: RankRun}}
    for one in ranked:
        by_seed.setdefault(one.run.seed, {})[one.asked] = one

    seeds = sorted(by_seed)
    first = by_seed[seeds[0]]
    order = sorted(first, key=lambda asked: first[asked].rank)
    rows = first[order[0]].run.rows
    metric = accuracy(rows)[1]
    if metric is None:
        return None
    result = {'seeds': seeds, 'metric': metric, 'steps': rows[-1]['step'], 'asked': order}
    lists = ('ranks', 'accuracy', 'student', 'teacher', 'order by E', 'order by cosine')
    result |= {name: [] for name in lists}   # an entry for each seed
    for seed in seeds:
        runs = [by_seed[seed][asked] for asked in order]
        ranks = [one.rank for one in runs]
        scores = [accuracy(one.run.rows)[0][-1][1] for one in runs]
        result['ranks'].append(ranks)
        result['accuracy'].append(scores)
        for side, name in (('eval', 'student'), ('teacher', 'teacher')):
            result[name].append(scores_of(runs[0].run.rows[0], side).get(metric))
        by_E, by_cosine = order_of(ranks, scores, found[runs[0].bridge])
        result['order by E'].append(by_E)
        result['order by cosine'].append(by_cosine)
    means = mean_of(result['accuracy'])
    result['best'] = order[means.index(max(means))]
    return result


def order_of(ranks, scores, found):
    """Do E and the cosine, which are known before stage 2, put the ranks into the order of the accuracies?
    -> their rank correlations with the scores, over the ranks at which bridge.json has a cosine; the
    theorem's own rank is seldom one of them."""
    E = []
    cosines = []
    compared = []
    for rank, score in zip(ranks, scores, strict=True):
        if str(rank) in found['cos']:
            E.append(-found['E'][rank - 1])          # the lower the better
            cosines.append(found['cos'][str(rank)])
            compared.append(score)
    return rank_correlation(E, compared), rank_correlation(cosines, compared)


def rank_correlation(x, y):
    """Spearman's: the correlation of the places of two lists of numbers, 1 for the same order, -1 for the
    opposite one. Equal numbers share their mean place. 0 if all numbers of a list are equal."""
    deviations = []
    for values in (x, y):
        places = []
        for value in values:
            below = sum(other < value for other in values)
            equal = sum(other == value for other in values)
            places.append(below + (equal - 1) / 2)
        middle = fmean(places)
        deviations.append([place - middle for place in places])
    squares = [sum(a * a for a in centred) for centred in deviations]
    product = sum(a * b for a, b in zip(*deviations, strict=True))
    return product / (squares[0] * squares[1]) ** 0.5 if all(squares) else 0.0


# ---- drawing -----------------------------------------------------------------------------------------

def draw_theorem3(data, file):
    """The panels that the data can feed -> files."""
    panels = [draw_components, draw_energy]
    panels += [draw_kept] if data['encoders'] else []
    panels += [draw_cosines]
    panels += [draw_accuracy] if data['distilled'] else []
    panels += [draw_trained] if data['trained'] else []
    rows = -(-len(panels) // 3)
    largest = max(len(found['E']) for found in data['bridges'].values())
    with paper_style():
        figure, axes = new_figure(rows=rows, columns=3, height=2.3 * rows)
        for panel, draw in zip(axes, panels, strict=False):
            draw(panel, data)
            panel.axvline(recommended(data), color='0.25', ls=(0, (1, 1)), lw=0.8)
            panel.set(xscale='log', xlim=(0.9, 1.1 * largest))
            powers = [2**exponent for exponent in range(largest.bit_length())]
            panel.set_xticks(powers, powers)
            panel.minorticks_off()
        for panel in axes[len(panels):]:
            panel.set_axis_off()
        count = len(data['bridges'])
        seeds = f'mean of {count} seeds, thin: each' if count > 1 else 'one seed'
        notes = (f"{seeds} (first panel thin: each layer); vertical: Theorem 3's rank, "
                 f'{recommended(data):.0f}')
        return save(figure, file, notes)


def recommended(data):
    """The mean over bridges of the rank that the theorem recommends."""
    return fmean(found['recommended'] for found in data['bridges'].values())


def draw_lines(axes, by_seed, label, name, **look):
    """A value for each rank 1, 2, ..., a list for each seed. There is no room for markers on a logarithmic
    axis."""
    look = look_of(name) | {'marker': 'None'} | look
    draw_seeds(axes, range(1, len(by_seed[0]) + 1), by_seed, label, look)


def draw_components(axes, data):
    """rho2 of each component, a line for each layer, mean over seeds."""
    found = list(data['bridges'].values())
    by_layer = []
    for layer in found[0]['layers']:
        by_layer.append(mean_of([one['layers'][layer]['rho2'] for one in found]))
    draw_lines(axes, by_layer, 'before stage 2', 'before stage 2', linestyle='-')
    axes.axhline(0.5, color='0.25', ls='--', lw=0.8)
    axes.set(title='predictable, before stage 2', xlabel='component i', ylabel='ρ² of component i',
             ylim=(0, 1.02))


def draw_energy(axes, data):
    """E(r): of PCA as bridge.py has measured it, where a negative rho2 counts as 0, and of other encoders."""
    draw_lines(axes, [found['E'] for found in data['bridges'].values()], ENCODERS['PCA'], 'PCA')
    for name in list(ENCODERS)[1:]:
        by_seed = [found[name]['E'] for found in data['encoders'].values()]
        if by_seed:
            draw_lines(axes, by_seed, ENCODERS[name], name)
    axes.set(title='E(r)', xlabel='rank r', ylabel='share of the variance', ylim=(0, None))


def draw_kept(axes, data):
    """The variance that the first r directions of each encoder keep. The legend is beside E(r)."""
    for name in ENCODERS:
        draw_lines(axes, [found[name]['kept'] for found in data['encoders'].values()], None, name)
    axes.set(title='variance kept', xlabel='rank r', ylabel='share of the variance', ylim=(0, 1.02))


def draw_cosines(axes, data):
    """The held-out cosine of the bridge, before stage 2."""
    found = [one['cos'] for one in data['bridges'].values()]
    ranks = [rank for rank in found[0] if all(rank in one for one in found)]
    by_seed = [[one[rank] for rank in ranks] for one in found]
    draw_seeds(axes, [int(rank) for rank in ranks], by_seed, None, look_of('OPRD-Bridge'))
    axes.set(title='held-out cosine', xlabel='rank r', ylabel='cosine, mean of layers')


def draw_accuracy(axes, data):
    """The accuracy of the distilled students. The rank that the theorem chose differs from seed to seed."""
    numbers = data['distilled']
    look = look_of('OPRD-Bridge')
    for ranks, scores in zip(numbers['ranks'], numbers['accuracy'], strict=True):
        axes.plot(ranks, scores, color=look['color'], lw=0.5, alpha=0.6)
    axes.plot(mean_of(numbers['ranks']), mean_of(numbers['accuracy']), label='distilled', **look)
    for name in ('teacher', 'student'):
        if None not in numbers[name]:
            line = look_of(name)
            axes.axhline(fmean(numbers[name]), color=line['color'], ls=line['linestyle'], label=name)
    axes.set(title=f'accuracy after {numbers["steps"]} steps', xlabel='rank r',
             ylabel=f'Avg@{numbers["metric"][4:]} (%)', ylim=(0, 102))


def draw_trained(axes, data):
    """rho2 before and after stage 2, mean over layers."""
    before = []
    for found in data['bridges'].values():
        before.append(mean_of([layer['rho2'] for layer in found['layers'].values()]))
    draw_lines(axes, before, 'before stage 2', 'before stage 2', linestyle='-')
    for style, (asked, by_seed) in zip(('--', ':'), data['trained'].items(), strict=False):
        label = "after, Theorem 3's rank" if asked == '0' else f'after, r = {asked}'
        draw_lines(axes, by_seed, label, 'OPRD-Bridge', linestyle=style)
    axes.axhline(0.5, color='0.25', ls='--', lw=0.8)
    axes.set(title='predictable, after stage 2', xlabel='component i', ylabel='ρ², mean of layers',
             ylim=(0, 1.02))


def theorem3(folders, to='out/paper'):
    """Measure, and write theorem3.json and the figure into a folder -> files. folders: runs through bridges
    that differ in bridge_rank, or bridges of one study alone."""
    ranked, bridges = rank_runs(read_runs(of_kind(folders, 'run')))
    if not bridges:
        bridges = first_bridges(of_kind(folders, 'bridge'))
    if not bridges:
        raise Missing('a bridge, or runs through one that differ in bridge_rank; python -m studies.compare '
                      'toy_paper makes them')
    data = theorem3_data(bridges, ranked)
    measure(data, ranked, bridges)
    to = Path(to)
    write_json(to / 'theorem3.json', data)
    return [to / 'theorem3.json', *draw_theorem3(data, to / 'theorem3')]
