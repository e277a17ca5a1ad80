"""The paper's figures hold the numbers of the logs, and say what is missing."""
import json
import math

from conftest import write_log

from configs import load_config

OPD = dict(oprd_weight=0, opd_weight=1)
METHODS = {                     # {folder: (keys, accuracy after the last step)}
    'oprd': (dict(lr=4e-3), 99),
    'top16': (OPD | dict(opd='topk', lr=1e-3), 70),
    'top1': (OPD | dict(opd='sampled', lr=1e-4), 52),
    'full': (OPD | dict(opd='full', lr=5e-4), 61),
    'mu1': (OPD | dict(opd='sampled', oprd_weight=1, lr=2e-4), 78),
    'mu10': (OPD | dict(opd='sampled', oprd_weight=10, lr=2e-3), 96),
}


def write_config(folder, keys, file='configs/toy.py'):
    config = load_config([file, *(f'{key}={value}' for key, value in keys.items())])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps({'config': config}))
    return config


def write_run(folder, seed=0, last=90, steps=100, every=10, file='configs/toy.py', sets=(), **keys):
    """A finished run as distill.py logs it, with numbers that a formula gives."""
    config = write_config(folder, dict(seed=seed, steps=steps, eval_n=4) | keys, file)
    rows = []
    for step in range(steps + 1):
        row = {'step': step}
        share = step / steps
        wave = math.sin(seed + step) * (1 - share)
        if step % every == 0:
            score = 30 + (last - 30) * (1 - math.exp(-4 * share)) + 2 * wave
            row |= {'eval/avg@4': score, 'eval/best@4': 95.0, 'eval/len': 40.0}
            for number, name in enumerate(sets):
                row[f'eval/avg@4/{name}'] = score + (-1) ** number * 5
        if step == 0:
            row |= {'teacher/avg@4': 98.0, 'teacher/best@4': 99.0, 'teacher/len': 41.0}
            for name in sets:
                row[f'teacher/avg@4/{name}'] = 98.0
        if step > 0:
            row |= {'len/mean': 40 + wave, 'time/sample': 0.5, 'time/update': 0.1 + seed / 10, 'opd/overlap16': 0.8 + 0.2 * share}
            row |= {'entropy/student': 0.3 * (1 - share) + 0.02 * abs(wave), 'entropy/teacher': 0.1 + 0.01 * wave}
            cosines = {layer: 0.9 + layer / 100 + 0.05 * share - last / 5000 for layer in (1, 2, 3, 4)}
            row |= {'rep/cos': sum(cosines.values()) / 4, **{f'rep/cos/{layer}': value for layer, value in cosines.items()}}
            if config['opd_weight']:
                row['loss/opd'] = 0.4 * (1 - share) + 0.1 * wave
        rows.append(row)
    write_log(folder, rows)
    (folder / 'results.json').write_text('{}')
    return folder


def write_study(out, seeds=(0, 1, 2), **how):
    return [write_run(out / f'{name}-s{seed}', seed, last + seed, **keys | how) for name, (keys, last) in METHODS.items() for seed in seeds]
