"""Run folders become methods with seeds, and runs that cannot be compared are refused in one line."""
import json

import pytest
from conftest import write_run

from configs import load_config
from paper.runs import (
    Missing,
    by_method,
    folders_in,
    is_read,
    kind_of_folder,
    machines_of,
    method_key,
    method_of,
    of_kind,
    pair_of,
    read_runs,
    seconds_of_steps,
    told_apart,
)
from support.provenance import append_start
from support.runtime import UserError

SCORES = {'eval/avg@16': [20.0, 50.0], 'eval/best@16': [60.0, 70.0], 'eval/len': [9.0, 9.0]}
OPD = ['oprd_weight=0', 'opd_weight=1']


def config_of(*arguments, file='configs/toy.py'):
    return load_config([file, *arguments])


@pytest.mark.parametrize('arguments, name', [
    ([], 'OPRD'),
    (['oprd_weight=[[0,0],[1,1]]'], 'OPRD'),
    ([*OPD, 'opd=sampled'], 'OPD top-1'),
    (OPD, 'OPD top-16'),
    ([*OPD, 'opd_k=4'], 'OPD top-4'),
    ([*OPD, 'opd=full'], 'OPD full KL'),
    ([*OPD, 'opd=byte'], 'next byte'),
    (['opd_weight=1', 'opd=sampled'], 'OPD top-1 + 1 OPRD'),
    (['opd_weight=1', 'oprd_weight=10', 'opd=sampled'], 'OPD top-1 + 10 OPRD'),
    (['opd_weight=0.5', 'oprd_weight=0.25', 'opd=sampled'], '0.5 OPD top-1 + 0.25 OPRD'),
    (['bridge=b', 'bridge_rank=8'], 'OPRD-Bridge r=8'),
    (['bridge=b', 'bridge_rank=0'], 'OPRD-Bridge r of Theorem 3'),
    (['bridge=b', 'bridge_rank=4', 'teacher_ids=student'], "OPRD-Bridge r=4, student's ids"),
    (['bridge=b', 'bridge_rank=16', 'opd=sampled', 'oprd_weight=[[0,1],[0.5,1],[0.5,0]]', 'opd_weight=[[0,0],[0.5,0],[0.5,1]]'],
     'OPRD-Bridge r=16, then OPD top-1'),
    (['opd=full', 'oprd_weight=[[0,0],[0.5,0],[0.5,1]]', 'opd_weight=[[0,1],[0.5,1],[0.5,0]]'], 'OPD full KL, then OPRD'),
    (['opd=full', 'oprd_weight=[[0,1],[1,0]]', 'opd_weight=1'], 'OPD full KL and OPRD, changing weights'),
    (['oprd_weight=0', 'reward_weight=2'], 'rewards'),
    (['reward_weight=[[0,0],[1,1]]', 'attention_weight=1'], 'OPRD + rewards + attention maps'),
    ([*OPD, 'opd=full', 'teacher=self', 'teacher_sees=solution'], 'OPD full KL'),
])
def test_a_method_is_named_by_its_objective(arguments, name):
    assert method_of(config_of(*arguments)) == name


def test_the_pair_is_told_by_the_toys_keys_and_of_real_models_by_the_log():
    """Of real models the config has two names, which say nothing of their shapes."""
    assert pair_of(config_of()) == 'same'
    assert pair_of(config_of('toy_teacher_layers=4', 'toy_teacher_width=96')) == 'same'      # the student's own shape
    assert pair_of(config_of('toy_teacher_layers=6', *OPD)) == 'bridge' == pair_of(config_of('bridge=b'))
    assert pair_of(config_of(file='configs/toy_bridge.py')) == 'bridge'
    assert pair_of(config_of(file='configs/toy_bridge_tokens.py')) == 'tokens'
    real = config_of('student=a', 'teacher=b')
    assert pair_of(real, {'rep/cos': None, 'opd/kl': None}) == 'same'
    assert pair_of(real, {'opd/kl': None}) == 'bridge' == pair_of(real | {'bridge': 'x'}, {'rep/cos': None})
    assert pair_of(real, {'rep/cos': None, 'align': None}) == 'tokens'
    itself = config_of('teacher=self', 'teacher_sees=solution')
    assert pair_of(itself, {'rep/cos': None, 'align': None}) == 'same'       # it has 'align' because of its longer prompt


def test_a_run_with_several_teachers_is_none_of_the_papers(tmp_path):
    """The first teacher's score was drawn as that of "the teacher"."""
    teachers = {name.replace('eval/', f'{side}/'): [80.0, None] for name in SCORES for side in ('teacher', 'teacher2')}
    run = write_run(tmp_path / 'run', SCORES | teachers)
    with pytest.raises(UserError, match='run: has several teachers, and the runs of the paper one; draw it with python -m studies'):
        read_runs([run])


def test_folders_are_told_apart_and_a_folder_of_runs_gives_its_finished_ones(tmp_path):
    """A run that goes on would end a line half-way. Logs, tables and other folders beside the runs are passed over."""
    first = write_run(tmp_path / 'b-run', SCORES)
    going = write_run(tmp_path / 'a-run', SCORES)
    (going / 'results.json').unlink()
    (tmp_path / 'stage1').mkdir()
    (tmp_path / 'stage1/bridge.json').write_text('{}')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'table.md').write_text('')
    assert [kind_of_folder(tmp_path / name) for name in ('a-run', 'stage1', 'empty')] == ['run', 'bridge', 'other']
    assert folders_in(tmp_path) == ([first, tmp_path / 'stage1'], [going]) and folders_in(going) == ([going], [])
    assert of_kind([first, tmp_path / 'stage1'], 'bridge') == [tmp_path / 'stage1']
    for folder, says in ((tmp_path / 'none', 'none: no such folder'), (tmp_path / 'table.md', 'no such folder'),
                         (tmp_path / 'empty', 'empty: no finished run and no bridge in it')):
        with pytest.raises(UserError, match=says):
            folders_in(folder)
    assert issubclass(Missing, UserError)


def test_seeds_are_one_method_and_a_bridge_counts_without_its_seed(tmp_path):
    """Each seed has a bridge of its own, whose folder ends with the seed. Seeds come in their order."""
    folders = []
    for seed in (1, 0):
        for name, keys in (('wide', {}), ('other', dict(bridge=f'out/other-stage1-s{seed}'))):
            keys = dict(bridge=f'out/wide-stage1-s{seed}', bridge_rank=8, seed=seed) | keys
            folders.append(write_run(tmp_path / f'{name}-s{seed}', SCORES, device='cpu' if seed else 'auto', **keys))
    methods = by_method(read_runs(folders))
    assert {name: [run.folder.name for run in seeds] for name, seeds in methods.items()} == {
        'OPRD-Bridge r=8, bridge=wide-stage1': ['wide-s0', 'wide-s1'], 'OPRD-Bridge r=8, bridge=other-stage1': ['other-s0', 'other-s1']}
    assert [run.method for run in methods['OPRD-Bridge r=8, bridge=other-stage1']] == ['OPRD-Bridge r=8, bridge=other-stage1'] * 2
    assert [run.pair for run in read_runs(folders)] == ['bridge'] * 4


def test_methods_of_one_name_are_told_apart_by_the_keys_that_differ(tmp_path):
    """Only by these, and only where the name is not enough."""
    keys = {'a': dict(lr=1e-3), 'b': dict(lr=2e-3), 'c': dict(lr=2e-3, rep_loss='nmse'), 'd': dict(lr=5e-3, oprd_weight=0, opd_weight=1)}
    runs = read_runs([write_run(tmp_path / name, SCORES, **changed) for name, changed in keys.items()])
    assert list(by_method(runs)) == ['OPRD, lr=0.001', 'OPRD, lr=0.002', 'OPRD, rep_loss=nmse, lr=0.002', 'OPD top-16']
    assert list(by_method(runs[1:2] + runs[3:])) == ['OPRD', 'OPD top-16']
    long = write_run(tmp_path / 'long', SCORES, lr=1e-3, layers='[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]')
    assert max(map(len, by_method(read_runs([runs[0].folder, long])))) < 50


def test_long_values_that_begin_and_end_alike_are_two_methods(tmp_path):
    """Cut in their middle they were seeds of one method, and one mean stood for both."""
    lists = [[*range(1, 10), middle, *range(20, 29)] for middle in (14, 15)]
    folders = [write_run(tmp_path / str(seed), SCORES, seed=seed, layers=layers) for seed, layers in enumerate(lists)]
    names = [f'OPRD, layers={layers}' for layers in lists]
    runs = read_runs(folders)
    with pytest.raises(UserError, match='has the seeds 0, .* has 1, and a toy'):
        by_method(runs)
    assert told_apart([(run.method, method_key(run.config)) for run in runs]) == names


def test_a_key_that_a_run_does_not_read_makes_no_difference(tmp_path):
    """Names were like 'OPRD, layers=all, positions=all, last_k=2000, first_k=2000'."""
    keys = {'a': {}, 'b': dict(positions='last_k', last_k=20), 'c': dict(positions='first_k', first_k=20), 'd': dict(layers='last')}
    for number, output in enumerate((dict(opd='full'), dict(opd='full', opd_k=4), dict(opd='sampled', opd_baseline=True))):
        keys[f'x{number}'] = dict(oprd_weight=0, opd_weight=1) | output
    keys['x3'] = keys['x2'] | dict(opd_baseline=False, layers='last')
    keys['x1']['seed'] = 1
    runs = read_runs([write_run(tmp_path / name, SCORES, **changed) for name, changed in keys.items()])
    names = told_apart([(run.method, method_key(run.config)) for run in runs])
    assert names == ['OPRD, positions=all', 'OPRD, last_k=20', 'OPRD, positions=first_k, first_k=20', 'OPRD, layers=last, positions=all',
                     'OPD full KL', 'OPD full KL', 'OPD top-1, opd_baseline=True', 'OPD top-1']
    assert method_key(runs[4].config) == method_key(runs[5].config)


@pytest.mark.parametrize('key, unread', [('lr', {}), ('opd', dict(opd_weight=0)), ('layers', dict(oprd_weight=0)),
                                         ('opd_tail', dict(opd='full')), ('bridge_rank', dict(bridge='')), ('last_frac', dict(positions='all')),
                                         ('toy_ops', dict.fromkeys(['student', 'teacher', 'data', 'eval_data'], 'x'))])
def test_keys_are_read_where_they_matter(key, unread):
    """A key that counts as unread, and is read, would make seeds of two methods."""
    config = config_of('bridge=b', 'opd_weight=1', 'positions=last_frac')
    assert is_read(key, config)
    assert is_read(key, config | unread) == (not unread)
    assert not is_read('bridge_fit', config)


def test_methods_have_one_order(tmp_path):
    """Whatever the folders' order, which in a folder of runs is that of the alphabet: else the legend of each figure and the
    lines of each table would have another one."""
    keys = {'d': dict(bridge='b', bridge_rank=16), 'c': dict(bridge='b', bridge_rank=2), 'b': dict(oprd_weight=0, opd_weight=1, opd='full'),
            'a': dict(), 'e': dict(oprd_weight=0, opd_weight=1, opd='sampled'), 'f': dict(oprd_weight=0, opd_weight=1, opd_k=4)}
    runs = read_runs([write_run(tmp_path / name, SCORES, **changed) for name, changed in keys.items()])
    wanted = ['OPRD', 'OPD top-1', 'OPD full KL', 'OPRD-Bridge r=2', 'OPRD-Bridge r=16', 'OPD top-4']
    assert list(by_method(runs)) == wanted == list(by_method(runs[::-1]))


def test_a_seed_that_is_there_twice_or_not_at_all_is_refused(tmp_path):
    """A mean over two students would stand beside a mean over one. Real students do not change with the seed."""
    runs = {name: write_run(tmp_path / name, SCORES, seed=seed, **keys) for name, seed, keys in (
        ('a0', 0, {}), ('a1', 1, {}), ('a1b', 1, {}), ('b0', 0, dict(oprd_weight=0, opd_weight=1)))}
    with pytest.raises(UserError, match='a1 and .*/a1b: one method with one seed; give one of them'):
        by_method(read_runs([runs['a0'], runs['a1'], runs['a1b']]))
    with pytest.raises(UserError, match='OPRD has the seeds 0, 1, OPD top-16 has 0, and a toy has another student'):
        by_method(read_runs([runs['a0'], runs['a1'], runs['b0']]))
    assert len(by_method(read_runs([runs['a0'], runs['b0'], runs['b0']]))) == 2           # one folder that is given twice
    real = dict(student='me/s', teacher='me/t', eval_data='aime24')
    folders = [write_run(tmp_path / f'real{seed}', SCORES, seed=seed, **real) for seed in (0, 1)]
    folders.append(write_run(tmp_path / 'real-opd', SCORES, seed=0, oprd_weight=0, opd_weight=1, **real))
    assert [len(seeds) for seeds in by_method(read_runs(folders)).values()] == [2, 1]


@pytest.mark.parametrize('keys, says', [
    (dict(eval_n=4), 'eval_n=16 and 4'),
    (dict(eval_data='aime24'), "eval_data='toy' and 'aime24'"),
    (dict(max_new_tokens=20), 'eval_max_new_tokens=48 and 20'),
    (dict(student='me/s'), "student='toy' and 'me/s'"),
    (dict(toy_width=48), 'toy_width=96 and 48'),
    (dict(seed=1, eval_problems=5), 'eval_problems=0 and 5'),
    (dict(toy_teacher_steps=7), 'have different teachers: toy_teacher_steps=160 and 7'),
])
def test_runs_that_cannot_be_compared_are_refused(tmp_path, keys, says):
    """Other problems, another n, student or teacher. Seeds of the toy are compared too, in all but the seed."""
    runs = [write_run(tmp_path / 'a', SCORES), write_run(tmp_path / 'b', SCORES, **keys)]
    with pytest.raises(UserError, match=says) as error:
        read_runs(runs)
    assert str(error.value).startswith(f'{runs[0]} and {runs[1]} ') and '\n' not in str(error.value)


def test_runs_that_began_with_other_files_are_refused(tmp_path):
    """The same config can mean another student or other problems. Of a toy each seed has its own."""
    runs = {}
    for name, seed, student, held_out in (('a0', 0, 's0', 'e0'), ('b0', 0, 's0', 'e0'), ('a1', 1, 's1', 'e1'),
                                          ('x0', 0, 'other', 'e0'), ('y0', 0, 's0', 'other')):
        runs[name] = write_run(tmp_path / name, SCORES, seed=seed, lr=1e-3 + 1e-3 * ord(name[0]))
        append_start(runs[name], {'versions': {}, 'sources': {}, 'student': student, 'eval_data': {'eval': held_out}}, 0)
    assert len(read_runs([runs['a0'], runs['b0'], runs['a1']])) == 3
    for name, says in (('x0', 'the student that it started from'), ('y0', 'the held-out problems')):
        with pytest.raises(UserError, match=f'a0 and .*/{name} cannot be compared: they differ in {says};'):
            read_runs([runs['a0'], runs['a1'], runs[name]])


@pytest.mark.parametrize('changes', [{'opd': 'foo'}, {'opd': 5}, {'oprd_weight': 'x'}, {'opd_weight': []}, {'opd_weight': [[0]]}, {'seed': '0'},
                                     {'bridge': None}, {'lr': 'fast'}, {'eval_n': 0}, {'opd_k': 1.5, 'opd_weight': 1}])
def test_a_config_that_names_no_method_is_refused_in_one_line(tmp_path, changes):
    folder = write_run(tmp_path / 'a', SCORES)
    config = json.loads((folder / 'config.json').read_text())['config']
    (folder / 'config.json').write_text(json.dumps({'config': config | changes}))
    with pytest.raises(UserError) as error:
        read_runs([folder])
    assert next(iter(changes)) in str(error.value) and '\n' not in str(error.value)


def test_time_and_machine_of_a_run(tmp_path):
    """All phases of all steps; evaluations are in none of them. A run that went on elsewhere has two machines."""
    rows = [{'step': 0, 'time/sample': None, 'elapsed': 9.0}, {'step': 1, 'time/sample': 1.5, 'time/update': 0.25, 'elapsed': 20.0}]
    assert seconds_of_steps(rows) == 1.75
    assert machines_of(tmp_path) == ['a machine that the run does not name']
    for step, device in ((0, 'cpu'), (4, 'cpu'), (8, 'H100')):
        append_start(tmp_path, {'versions': {'device': device, 'ranks': 1, 'threads': 2}, 'sources': {}, 'eval_data': {}}, step)
    assert machines_of(tmp_path) == ['cpu, ranks 1, threads 2', 'H100, ranks 1, threads 2']
