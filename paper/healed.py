"""
Theorem 2 on real weights: which part of a difference of hidden states do trained students still have?

    python -m paper healed student=out/smollm2-noise teacher=out/smollm2 data=studies/heal/test.jsonl \
        models=out/heal_study/noise/oprd_cosine-s0/last,out/heal_study/noise/opd_full_kl-s0/last

It writes healed.json, .png and .pdf, with a line for each of the models. They all began as the student.

The head multiplies a difference of the last layer's states along its right-singular direction i by sigma_i.
So an output-space loss should correct the directions with a large sigma first, and leave most of what lies
along the others, while a loss on the states sees all directions alike. Here the directions of the centred
head are put into tenths by their sigma, the largest first. The squared difference to the teacher in each
tenth is divided by what it was before training. The right panel has this ratio for each layer as a whole.

All models read the same answers of the untrained student, in float64. What it does not do: models of two
shapes (pruned ones), which `read_pair` of paper/theorem2.py refuses.
"""
from pathlib import Path
from statistics import fmean

import torch

from formats.hub import snapshot
from formats.huggingface import load_model, read_config
from paper.theorem1 import rounded
from paper.theorem2 import head_basis, kl_rows, read_pair, whole_number
from studies.drawing import PAGE, look_of, new_figure, paper_style, save, whole_ticks
from support.files import write_json
from support.runtime import UserError, print0

PARTS = 10                      # of the head's directions


def errors(pair, basis, h_t, model):
    """A model against the teacher, whose states are h_t -> {'kl'; 'parts', the mean squared difference of the
    last layer in each tenth of the directions; 'layers', that of each layer}."""
    h_s = pair.states(model)                                                 # one (K, d) for each layer
    along = (h_s[-1] - h_t[-1]) @ basis.directions                           # (K, d), largest sigma first
    parts = [part.square().sum(-1).mean() for part in along.tensor_split(PARTS, dim=-1)]
    layers = [(ours - theirs).square().mean() for ours, theirs in zip(h_s, h_t, strict=True)]
    kl = kl_rows(h_s[-1], h_t[-1], model.head.weight[:pair.vocab], pair.W).mean()
    return {'kl': rounded(kl), 'parts': rounded(torch.stack(parts)), 'layers': rounded(torch.stack(layers))}


@torch.no_grad()
def healed_data(pair, folders):
    """A pair and the folders of models that began as its student -> what is written."""
    basis = head_basis(pair.W)
    h_t = pair.states(pair.teacher)
    sigma = [fmean(part.tolist()) for part in basis.sigma.tensor_split(PARTS)]
    before = errors(pair, basis, h_t, pair.student)
    models = {}
    for folder in folders:
        c, c_student = read_config(folder), pair.student.config
        if (c.family, c.V, c.L, c.d) != (c_student.family, c_student.V, c_student.L, c_student.d):
            raise UserError(f'{folder}: has another shape than the student; give models that began as it')
        print0(f'reading {folder}')
        model = load_model(folder).double().requires_grad_(False)
        after = errors(pair, basis, h_t, model)
        for name in ('parts', 'layers'):
            after[f'{name}_ratio'] = rounded(torch.tensor(after[name]) / torch.tensor(before[name]))
        models[folder] = after
    sigma = rounded(torch.tensor(sigma))
    return {'positions': len(pair.at), 'sigma': sigma, 'before': before, 'models': models}


def draw_healed(data, file):
    """Left: the last layer by tenths of the head's directions. Right: every layer -> files."""
    with paper_style():
        figure, (left, right) = new_figure(columns=2, width=PAGE, height=2.4)
        for folder, found in data['models'].items():
            name = name_of(folder)
            for panel, key in ((left, 'parts_ratio'), (right, 'layers_ratio')):
                ratios = found[key]
                panel.plot(range(1, len(ratios) + 1), ratios, label=name, markevery=2, **look_of(name))
        left.set(xlabel="tenth of the head's directions, largest sigma first", title='last layer',
                 ylabel='squared difference, after / before', ylim=(0, None))
        right.set(xlabel='layer', title='all layers', ylim=(0, None))
        for panel in (left, right):
            whole_ticks(panel)
        return save(figure, file, f'{data["positions"]} positions of the untrained student\'s answers')


def name_of(folder):
    """What a model is called in the figure: its run's folder."""
    path = Path(folder)
    return path.parent.name if path.name in ('last', 'best') else path.name


def healed(folders, to='out/paper', student='', teacher='', data='', models='', problems='8'):
    """Measure, write healed.json and draw healed.png and .pdf in the folder `to` -> list of files.

    student, teacher, data: a pair and its problems. models: folders of models that began as the student, with
    commas between. problems: how many are answered.
    """
    problems = whole_number('problems', problems, 1)
    names = [name for name in models.split(',') if name]
    if folders or not (student and teacher and data and names):
        raise UserError('healed: give student=, teacher=, data= and models=, and no run; see paper/healed.py')
    for name in names:
        snapshot(name, weights=True)         # a wrong one is told before the work
    result = healed_data(read_pair(student, teacher, data, problems), names)
    file = Path(to) / 'healed'
    write_json(f'{file}.json', result)
    return [Path(f'{file}.json'), *draw_healed(result, file)]
