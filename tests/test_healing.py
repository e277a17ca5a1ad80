"""studies/healing.py: a whole small study, what it does the second time, its statistics against loops, its refusals."""
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import argv

from configs import load_config
from distill import main as distill
from studies import healing, healing_report
from studies.agreement import mean_and_error
from support.files import read_json
from support.runtime import UserError

STUDY = """
model = {model!r}
damages = {{'noise': ['noise=0.1'], 'drop': ['drop=2']}}
size = {size!r}
methods = {{'OPRD': ['rep_loss=cosine'], 'same rate': ['rep_loss=nmse'], 'KL': ['oprd_weight=0', 'opd_weight=1', 'opd=full']}}
reference = 'KL'
rates = {{'OPRD': [1e-4, 1e-3], 'same rate': 'OPRD', 'KL': [1e-3]}}
rates_of = {{'noise': 'noise', 'drop': 'noise'}}
search_seed = 7
search_size = ['steps=1', 'eval_data=']
seeds = {{'noise': [0, 1], 'drop': [0]}}
left_out = {{'drop': ['same rate']}}
prompts = 3
search_prompts = 2
tokens = 5
"""


@pytest.fixture(scope='module')
def studied(toy_dir, toy_cfg, tmp_path_factory):
    """A folder in which a study of the tiny toy has been made -> (folder, the runs that were started, what it wrote)."""
    folder = tmp_path_factory.mktemp('study')
    (folder / 'model').symlink_to(Path(toy_cfg['teacher']).resolve())
    size = [*argv(toy_dir, 'unused', steps=2, eval_data=toy_cfg['eval_data'], eval_n=1, data=toy_cfg['data'], layer_map='kept',
                  diagnose_every=1)]
    (folder / 'small.py').write_text(STUDY.format(model='model', size=[word for word in size if 'out_dir' not in word]))
    started = []

    def launch(script, jobs, ended):
        for run_folder, arguments in jobs.items():
            started.append(run_folder)
            distill(load_config(arguments))
            ended(run_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(healing, 'launch', launch)
        patch.setattr(healing, 'QUESTIONS', folder)
        for split, key in (('train', 'data'), ('test', 'eval_data')):
            shutil.copy(toy_cfg[key], folder / f'{split}.jsonl')
        healing.main(['small.py'])
        yield folder, started


def test_a_study_makes_every_run_and_says_what_it_found(studied):
    """Each method at its own best rate; a rate of its own is searched once, on the damage that the file names."""
    folder, started = studied
    names = [str(run).removeprefix('out/small/') for run in started]
    assert names == ['noise/search/oprd-lr0.0001-s7', 'noise/search/oprd-lr0.001-s7', 'noise/search/kl-lr0.001-s7',
                     'noise/oprd-s0', 'noise/oprd-s1', 'noise/same_rate-s0', 'noise/same_rate-s1', 'noise/kl-s0', 'noise/kl-s1',
                     'drop/oprd-s0', 'drop/kl-s0']
    out = folder / 'out/small'
    distances = {}
    for rate in (1e-4, 1e-3):
        scores = read_json(out / f'noise/search/measured/oprd-lr{rate:g}-s7.json')['scores']
        distances[rate] = scores['teacher_text']['kl'][0] + scores['own_samples']['kl'][0]
    best = min(distances, key=distances.get)
    for run in ('noise/oprd-s1', 'noise/same_rate-s0', 'drop/oprd-s0'):
        config = read_json(out / run / 'config.json')['config']
        assert config['lr'] == best and config['seed'] == int(run[-1]) and config['student'] == f'model-{run.split("/")[0]}'

    # The report, and nothing that only a resumed run needs.
    report = (out / 'report.md').read_text()
    for part in ('## noise: noise=0.1; seeds 0, 1', '## drop: drop=2; seeds 0', '| same rate |', '- damaged: `', '| intact |',
                 'KL minus that of KL', '## learning rates: noise, seed 7', '## what a step costs: noise', f'**{best:g}: '):
        assert part in report, part
    intact = next(line for line in report.splitlines() if line.startswith('| intact'))
    assert intact.split('|')[3:6] == [' 0.000 ', ' 0.000 ', ' 100.0 ']
    assert all((out / name).stat().st_size > 10_000 for name in ('curves.png', 'layers.png'))
    assert (out / 'noise/kl-s0/last/model.safetensors').exists() and not list(out.glob('**/resume'))
    asked = read_json(out / 'noise/measured/kl-s0.json')
    assert len(asked['by_prompt']['teacher_text']['tokens']) == 3 and asked['settings']['questions'] == 'test'


def test_the_second_time_nothing_is_made_again(studied, monkeypatch):
    """What was measured is kept for the same weights and questions, and measured again for others."""
    folder, started = studied
    measured = []
    monkeypatch.setattr(healing.agreement, 'measure', lambda task, model, *rest: measured.append(model))
    monkeypatch.setattr(healing, 'peak_of_run', None)
    before = (folder / 'out/small/report.md').read_text()
    (folder / 'out/small/report.md').unlink()
    healing.main(['small.py'])
    assert not measured and (folder / 'out/small/report.md').read_text() == before
    assert len(started) == 11

    # Another number of questions, other weights under the same name.
    file = folder / 'out/small/noise/measured/kl-s0.json'
    wanted = read_json(file)['settings']
    assert healing.is_measured(file, wanted, folder / 'out/small/noise/kl-s0')
    assert not healing.is_measured(file, wanted | {'count': 4}, folder / 'out/small/noise/kl-s0')
    assert not healing.is_measured(file, wanted, folder / 'out/small/noise/kl-s1')
    assert not healing.is_measured(folder / 'none.json', wanted, folder / 'out/small/noise/kl-s0')


def test_another_damage_under_the_same_name_is_refused(studied):
    """Its runs would be compared with those of a student that is not in the study's file."""
    folder, _ = studied
    study = healing.read_study('small.py')
    study.damages['noise'] = ['noise=0.2']
    with pytest.raises(UserError, match='model-noise: is not model with noise=0.2; delete the folder'):
        healing.make_students(study)


def fake(rng, hard, shift, count=30):
    """What agreement.py says of a student: each prompt as hard as `hard` says, and the student `shift` farther away."""
    tokens = [rng.randrange(5, 20) for _ in range(count)]
    kl = [length * (hardness + shift + 0.01 * rng.random()) for length, hardness in zip(tokens, hard, strict=True)]
    return {'by_prompt': {'own_samples': {'tokens': tokens, 'kl': kl}}}, []


def test_a_difference_is_taken_prompt_by_prompt():
    """The error against the jackknife, which leaves out one prompt at a time, and against the error of one mean where the
    other method is a constant. Prompts that are hard for both must not count."""
    rng = random.Random(0)
    hard = [3 * rng.random() for _ in range(30)]
    first, second = ([fake(rng, hard, shift) for _ in range(2)] for shift in (0.5, 0.3))
    mean, error, same_sign = healing_report.difference(first, second, 'own_samples')

    def mean_without(gone):
        totals = []
        for seeds in (first, second):
            for found, _ in seeds:
                sums = found['by_prompt']['own_samples']
                left = [number for number in range(30) if number != gone]
                totals.append(sum(sums['kl'][n] for n in left) / sum(sums['tokens'][n] for n in left))
        return (totals[0] + totals[1] - totals[2] - totals[3]) / 2
    assert mean == pytest.approx(mean_without(None)) and same_sign
    without = torch.tensor([mean_without(number) for number in range(30)], dtype=torch.float64)
    jackknife = math.sqrt(29 / 30 * (without - without.mean()).square().sum())
    assert error == pytest.approx(jackknife, rel=0.1)
    sums = first[0][0]['by_prompt']['own_samples']
    assert error < mean_and_error(sums['kl'], sums['tokens'])[1] / 2

    # Against a method of KL zero it is the error of the mean.
    nothing = [({'by_prompt': {'own_samples': {'tokens': sums['tokens'], 'kl': [0.0] * 30}}}, [])]
    alone = healing_report.difference(first[:1], nothing, 'own_samples')
    assert alone[:2] == pytest.approx(mean_and_error(sums['kl'], sums['tokens']))


def test_a_verdict_needs_two_standard_errors_and_every_seed():
    rng = random.Random(1)
    hard = [rng.random() for _ in range(30)]
    students = {name: [fake(rng, hard, shift) for shift in shifts]
                for name, shifts in {'KL': (0.3, 0.3), 'near': (0.1, 0.2), 'far': (0.4, 0.5), 'split': (0.1, 0.4)}.items()}
    for seeds in students.values():
        for found, _ in seeds:
            found['by_prompt']['teacher_text'] = {'tokens': [10] * 30, 'kl': [10 * value for value in hard]}
    _, _, *rows = healing_report.differences_table('KL', students)
    assert [row.split()[-2] for row in rows] == ['nearer', 'farther', 'undecided']
    assert all('+0.000 +-0.000 undecided' in row for row in rows)


@pytest.mark.parametrize('change, message', [
    ("seeds = {'noise': [0]}", "seeds lacks 'drop'; add it"),
    ("rates = {'OPRD': [1e-4]}", "rates lacks 'same rate'; add it"),
    ("rates |= {'KL': 'OPDR'}", "rates names 'OPDR', which the file does not define"),
    ("reference = 'kl'", "reference names 'kl'"),
    ("rates_of = {'noise': 'bits', 'drop': 'noise'}", "rates_of names 'bits'"),
    ("left_out = {'drop': ['x']}", "left_out names 'x'"),
    ('prompts = 1', 'prompts'),
    ("rates = {'KL': [True]}", 'rates'),
    ('del methods', 'methods'),
])
def test_a_wrong_study_is_refused_in_a_line(tmp_path, change, message):
    (tmp_path / 's.py').write_text(STUDY.format(model='m', size=[]) + change + '\n')
    with pytest.raises(UserError) as error:
        healing.read_study(str(tmp_path / 's.py'))
    assert message in str(error.value) and '\n' not in str(error.value)


def test_the_sizes_of_the_project_are_studies():
    """The one for a GPU has every method, damage and seed that the other has."""
    small, large = healing.read_study('heal_study'), healing.read_study('heal_study_gpu')
    assert large.methods == small.methods and small.damages.items() < large.damages.items() and not large.left_out
    for kind in large.damages:
        assert set(small.seeds.get(kind, [])) < set(large.seeds[kind])
        for method in large.methods:
            rates = small.rates[method]
            load_config(healing.command(large, kind, method, 1e-4, 'out/x', *large.search_size))
            assert isinstance(rates, str) or len(rates) >= 3
