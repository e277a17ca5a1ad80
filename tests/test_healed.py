"""paper/healed.py: which part of a difference of states trained students still have, against numpy."""
import numpy as np
import pytest
import torch
from conftest import tiny_model

from formats.huggingface import load_model, save_model
from paper import __main__ as paper
from paper.healed import healed
from paper.theorem2 import read_pair
from studies.damage import add_noise
from support.files import read_json
from support.runtime import UserError


@pytest.fixture(scope='module')
def models(toy_cfg, tmp_path_factory):
    """The toy's teacher, a noisy copy as the student, and two models that began as it: nearly healed, and unchanged."""
    folder = tmp_path_factory.mktemp('models')
    teacher = load_model(toy_cfg['teacher'])
    student = load_model(toy_cfg['teacher'])
    near = load_model(toy_cfg['teacher'])
    with torch.no_grad():
        add_noise(student, 0.2)
        add_noise(near, 0.01)
    for name, model in (('student', student), ('near', near), ('same', student)):
        save_model(model, folder / name, toy_cfg['teacher'])
    return {'student': folder / 'student', 'near': folder / 'near', 'same': folder / 'same', 'teacher': toy_cfg['teacher']}, teacher


def words(models, toy_cfg, to, names):
    folders = models[0]
    return [f'student={folders["student"]}', f'teacher={folders["teacher"]}', f'data={toy_cfg["data"]}',
            f'models={",".join(str(folders[name]) for name in names)}', 'problems=3', f'to={to}']


def test_the_ratios_equal_numpy(models, toy_cfg, tmp_path):
    """The states by a loop over prompts, the directions by numpy's SVD of the centred head. What began as the student and
    did not change has ratio 1 everywhere."""
    paper.main(['healed', *words(models, toy_cfg, tmp_path, ['near', 'same'])])
    found = read_json(tmp_path / 'healed.json')
    pair = read_pair(models[0]['student'], models[0]['teacher'], toy_cfg['data'], 3)
    head = pair.W.numpy() - pair.W.numpy().mean(0)
    _, sigma, V_t = np.linalg.svd(head)
    layers = pair.layers
    with torch.no_grad():
        states = {}
        for name in ('student', 'near', 'teacher'):
            model = load_model(models[0][name]).double()
            states[name] = np.stack([rows.numpy() for rows in model.hidden(pair.ids, layers, pair.at)])
    energy = {}
    for name in ('student', 'near'):
        difference = states[name] - states['teacher']
        along = difference[-1] @ V_t.T
        energy[name] = [np.square(part).sum() for part in np.array_split(along, 10, axis=1)]
        energy[f'{name} layers'] = np.square(difference).sum((1, 2))
    near, same = (found['models'][str(models[0][name])] for name in ('near', 'same'))

    # Directions with sigma 0 (d > V) are any basis of the null space: only their sum is fixed.
    d = head.shape[1]
    seen = int((sigma > 1e-9).sum())
    for number, part in enumerate(np.array_split(np.arange(d), 10)):
        if part[-1] < seen:
            assert near['parts_ratio'][number] == pytest.approx(energy['near'][number] / energy['student'][number], rel=1e-5)
    assert sum(near['parts']) == pytest.approx(sum(energy['near']) / len(pair.at), rel=1e-5)
    assert near['layers_ratio'] == pytest.approx(list(energy['near layers'] / energy['student layers']), rel=1e-5)
    assert same['parts_ratio'] == [1.0] * 10 and same['layers_ratio'] == [1.0] * len(layers)
    assert near['kl'] < found['before']['kl'] == same['kl'] and seen >= 10
    assert all((tmp_path / f'healed.{ending}').stat().st_size > 5000 for ending in ('png', 'pdf'))


def test_wrong_models_are_refused(models, toy_cfg, tmp_path):
    with pytest.raises(UserError, match='give student=, teacher=, data= and models='):
        paper.main(['healed', *words(models, toy_cfg, tmp_path, [])])
    other = tiny_model(0)
    save_model(other, tmp_path / 'other', toy_cfg['teacher'])
    arguments = dict(word.split('=', 1) for word in words(models, toy_cfg, tmp_path, ['near']))
    for models_named, message in ((tmp_path / 'other', 'another shape'), (tmp_path / 'none', 'no such file or folder')):
        with pytest.raises(UserError, match=message):
            healed([], **arguments | {'models': str(models_named)})
    assert not (tmp_path / 'healed.json').exists()
