"""Checkpoints: written whole, found by their own record, and never mixed up or lost."""
import os
import shutil
from functools import partial

import pytest
import torch
from conftest import entries
from safetensors.torch import load_file

from support import checkpoints as checkpoints_module
from support.checkpoints import resume, save
from support.files import read_json, write_json, write_safetensors
from support.run_folder import begin, log_rows
from support.runtime import UserError

LATER = ('lr',)


def trained(seed):
    """A model of two weights, one of which never had a gradient, and its optimizer after two steps."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model.weight.grad = torch.randn(2, 3)
        opt.step()
    return model, opt


def write_model(folder, weights):
    """Stands in for the Hugging Face folder."""
    folder.mkdir()
    write_safetensors(dict(weights), folder / 'model.safetensors')


def run_in(out, **config):
    return begin(out, {'lr': 1.0, 'steps': 9} | config, LATER, 0, ['step', 'eval/avg@2'])


def saved_run(out, *steps, keep=2, scores=()):
    """A run folder with checkpoints of these steps, and a log of every step."""
    run = run_in(out)
    model, opt = trained(0)
    scores = dict(scores)
    for step in range(max(steps) + 1):
        run.log({'step': step} | ({'eval/avg@2': scores[step]} if step in scores else {}))
        if step in steps:
            save(run, step, model, opt, write_model, keep)
    return run, model, opt


def resumed(out, **config):
    """-> RunFolder, model and optimizer of a start that goes on there."""
    run = run_in(out, **config)
    model, opt = trained(1)
    resume(run, model, opt, LATER)
    return run, model, opt


def checkpoints(out):
    return sorted(path.name for path in out.iterdir() if path.name.startswith('ckpt-'))


def spoil(file):
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_was_saved_comes_back_to_the_bit(tmp_path):
    """Weights, moments, seconds and the log; and without a checkpoint nothing is changed."""
    run, model, opt = saved_run(tmp_path, 2)
    again, other, other_opt = resumed(tmp_path)
    assert (again.step, again.name) == (2, run.name) and again.seconds() >= run.rows[-1]['elapsed']
    assert again.rows == run.rows
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for key, moment in opt.state[model.weight].items():
        assert torch.equal(moment, other_opt.state[other.weight][key])
    assert resumed(tmp_path / 'nothing')[0].step == 0


def test_the_links_move_when_the_checkpoint_is_whole(disk, tmp_path):
    """And older ones go after that: at every instant `last` names a whole checkpoint."""
    run, model, opt = saved_run(tmp_path, 1, keep=1)
    run.log({'step': 2})
    disk.clear()
    save(run, 2, model, opt, write_model, 1)
    renamed = [name for kind, _, name in disk if kind == 'rename']
    assert renamed[-2:] == ['ckpt-000002', 'last'] and checkpoints(tmp_path) == ['ckpt-000002']
    assert os.readlink(tmp_path / 'last') == 'ckpt-000002/model'
    flushed = {inode for kind, inode, _ in disk if kind == 'fsync'}
    assert entries(tmp_path / 'ckpt-000002') <= flushed


def test_a_crash_between_checkpoint_and_link(tmp_path, monkeypatch):
    """The new checkpoint is whole, so the run goes on from it, and the link is put right."""
    run, model, opt = saved_run(tmp_path, 1)
    run.log({'step': 2})
    replace = os.replace

    def power_cut(source, target):
        if os.path.basename(target) == 'last':
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, 'replace', power_cut)
    with pytest.raises(KeyboardInterrupt):
        save(run, 2, model, opt, write_model, 2)
    monkeypatch.setattr(os, 'replace', replace)
    assert os.readlink(tmp_path / 'last') == 'ckpt-000001/model'
    assert resumed(tmp_path)[0].step == 2 and os.readlink(tmp_path / 'last') == 'ckpt-000002/model'


def test_the_newest_and_the_best_are_kept(tmp_path):
    """And nothing else is touched: `save` deleted everything called ckpt-*."""
    run = run_in(tmp_path)
    for name in ('ckpt-notes.txt', 'ckpt-best', 'ckpt-000000', 'ckpt-1'):
        (tmp_path / name).mkdir()
    saved_run(tmp_path, 1, 2, 3, 4, 5, scores={1: 10.0, 2: 80.0, 3: 30.0})
    mine = ['ckpt-000000', 'ckpt-1', 'ckpt-best', 'ckpt-notes.txt']
    assert set(checkpoints(tmp_path)) == {*mine, 'ckpt-000002', 'ckpt-000004', 'ckpt-000005'}
    assert os.readlink(tmp_path / 'best') == 'ckpt-000002/model'
    assert os.readlink(tmp_path / 'last') == 'ckpt-000005/model'

    # The best one is still known after a resume.
    run = resumed(tmp_path)[0]
    assert run.best == {'step': 2, 'score': 80.0, 'metric': 'avg@2'}


@pytest.mark.parametrize('name', ['resume.json', 'log.jsonl', 'model/model.safetensors',
                                  'resume/shard-00001-model-00001-of-00001.safetensors'])
@pytest.mark.parametrize('damage', ['flip', 'cut', 'delete', 'empty object'])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, name, damage):
    """A flipped bit was resumed from without a word. The one before it is whole, and the log goes back with it."""
    saved_run(tmp_path, 2, 4)
    file = tmp_path / 'ckpt-000004' / name
    if damage == 'flip':
        spoil(file)
    elif damage == 'cut':
        os.truncate(file, file.stat().st_size // 2)
    elif damage == 'delete':
        file.unlink()
    else:
        file.write_text('{}')
    run = resumed(tmp_path)[0]
    assert run.step == 2 and [row['step'] for row in log_rows(tmp_path / 'log.jsonl')] == [0, 1, 2]
    assert f'note: {tmp_path}/ckpt-000004/{name} is' in capsys.readouterr().out


def test_if_none_is_whole_the_run_stops(tmp_path):
    """It began again at step 0, and deleted what was there."""
    saved_run(tmp_path, 2, 4)
    for name in ('ckpt-000002', 'ckpt-000004'):
        spoil(tmp_path / name / 'resume.json')
    with pytest.raises(UserError, match='ckpt-000004/resume.json is damaged, and no other checkpoint is whole'):
        resumed(tmp_path)
    for name in checkpoints(tmp_path):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(UserError, match='last points to a checkpoint that is not there'):
        resumed(tmp_path)


def test_a_checkpoint_of_another_run(tmp_path):
    saved_run(tmp_path / 'a', 2)
    run_in(tmp_path / 'b')
    shutil.copytree(tmp_path / 'a/ckpt-000002', tmp_path / 'b/ckpt-000002')
    with pytest.raises(UserError, match='ckpt-000002 belongs to another run'):
        resumed(tmp_path / 'b')


@pytest.mark.parametrize('links', ['followed', 'left out', 'as text'])
def test_a_copied_folder_goes_on(tmp_path, links):
    """`cp -rL` makes folders of the links, an object store leaves them out, and some archives make them text files. The
    run began again at step 0."""
    saved_run(tmp_path / 'a', 1, 2, scores={1: 50.0})
    if links == 'followed':
        shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    else:
        shutil.copytree(tmp_path / 'a', tmp_path / 'b', symlinks=True, ignore=shutil.ignore_patterns('last', 'best'))
    if links == 'as text':
        (tmp_path / 'b/last').write_text('ckpt-000002/model')
    assert not (tmp_path / 'b/last').is_symlink()
    assert resumed(tmp_path / 'b')[0].step == 2
    assert os.readlink(tmp_path / 'b/last') == 'ckpt-000002/model'
    assert os.readlink(tmp_path / 'b/best') == 'ckpt-000001/model'


def test_a_folder_in_the_place_of_a_link_is_not_deleted(tmp_path):
    """Unless it is a copy of a checkpoint's model."""
    saved_run(tmp_path, 2)
    (tmp_path / 'last').unlink()
    (tmp_path / 'last').mkdir()
    (tmp_path / 'last/mine.txt').write_text('mine')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    with pytest.raises(UserError, match='last: not a link, and not a copy of a model of this run; move it away'):
        resumed(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


@pytest.mark.parametrize('where', ['weight', 'moment'])
@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_what_is_not_finite_is_not_saved(tmp_path, where, value):
    """A NaN that came with the update was saved, and the good checkpoint deleted."""
    run, model, opt = saved_run(tmp_path, 2)
    before = entries(tmp_path)
    tensor = model.bias if where == 'weight' else opt.state[model.weight]['exp_avg']
    with torch.no_grad():
        tensor.view(-1)[1] = float(value)
    with pytest.raises(UserError, match='step 3: .* holds NaN or infinite numbers; it is not saved.*lower lr='):
        save(run, 3, model, opt, write_model, 1)
    assert entries(tmp_path) == before


def test_a_full_disk_while_saving(tmp_path):
    """Whoever fails, the checkpoint before stays, and nothing half-written."""
    run, model, opt = saved_run(tmp_path, 2)
    before = sorted(os.listdir(tmp_path))

    def full(folder, weights):
        raise OSError(28, 'No space left on device', str(folder))
    with pytest.raises(OSError, match='No space left'):
        save(run, 3, model, opt, full, 1)
    assert sorted(os.listdir(tmp_path)) == before and resumed(tmp_path)[0].step == 2


def test_keys_that_may_change_are_told(tmp_path):
    """They differ from the checkpoint's config; what the checkpoint was made with is compared, not the last start."""
    saved_run(tmp_path, 2)
    assert resumed(tmp_path)[0].changed == {}
    for _ in range(2):                       # the second time config.json has the new value already
        assert resumed(tmp_path, lr=2.0)[0].changed == {'lr': [1.0, 2.0]}


def test_a_changed_record_is_noticed(tmp_path):
    """resume.json says which files there are and what they hold; nobody else vouches for itself."""
    saved_run(tmp_path, 2, 4)
    file = tmp_path / 'ckpt-000004/resume.json'
    write_json(file, read_json(file) | {'step': 5})
    assert resumed(tmp_path)[0].step == 2


def test_a_model_of_another_shape(tmp_path):
    """One line, not torch's bundle of tracebacks."""
    run, *_ = saved_run(tmp_path, 2)
    model = torch.nn.Linear(4, 2)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match='ckpt-000002: .*ize mismatch') as caught:
        resume(run_in(tmp_path), model, opt, LATER)
    assert '\n' not in str(caught.value)


def test_the_model_gets_every_weight_once(tmp_path):
    """In the order of the model's parameters, whole and on the CPU: save_model writes them as they come."""
    seen = []

    def write(folder, weights, names):
        weights = list(weights)
        names += [name for name, _ in weights]
        write_model(folder, weights)
    run = run_in(tmp_path)
    model, opt = trained(0)
    run.log({'step': 0})
    save(run, 0, model, opt, partial(write, names=seen), 1)
    assert seen == ['weight', 'bias']


def test_the_resume_state_in_several_files(tmp_path, monkeypatch):
    """A file is put together in memory, so a large state goes into several. Each tensor lies in one of them, and all come
    back."""
    monkeypatch.setattr(checkpoints_module, 'FILE_BYTES', 30)
    _, model, opt = saved_run(tmp_path, 2)
    files = sorted((tmp_path / 'ckpt-000002/resume').iterdir())
    names = [name for file in files for name in load_file(file)]
    assert len(files) > 2 and len(names) == len(set(names)) == 5
    _, other, other_opt = resumed(tmp_path)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    for key, moment in opt.state[model.weight].items():
        assert torch.equal(moment, other_opt.state[other.weight][key])
