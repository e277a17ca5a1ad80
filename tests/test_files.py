"""Every file is written completely or not at all, and reaches the disk before its name does."""
import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch

from support.checkpoints import open_run, resume, save
from support.files import Log, digest, locked, read_json, whole, write_json, write_safetensors
from support.runtime import ROOT, UserError


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / 'a.json'
    write_json(file, {'x': 1})
    with pytest.raises(RuntimeError), whole(file) as tmp:
        tmp.write_text('half')
        raise RuntimeError('power cut')
    assert read_json(file) == {'x': 1} and os.listdir(tmp_path) == ['a.json']


def test_a_folder_is_replaced_whole(tmp_path):
    """Leftovers of the old folder would mix two models' files."""
    for names in (['a', 'b'], ['c']):
        with whole(tmp_path / 'm') as tmp:
            tmp.mkdir()
            for name in names:
                (tmp / name).write_text(name)
    assert os.listdir(tmp_path / 'm') == ['c'] and os.listdir(tmp_path) == ['m']
    with pytest.raises(OSError), whole(tmp_path / 'm') as tmp:
        tmp.mkdir()
        raise OSError('disk full')
    assert os.listdir(tmp_path / 'm') == ['c'] and os.listdir(tmp_path) == ['m']


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    """The limit on file size stands in for the disk: a 1 MB tensor does not fit into 200 kB."""
    write_safetensors({'w': torch.ones(3)}, tmp_path / 'm.safetensors')
    before = (tmp_path / 'm.safetensors').read_bytes()
    code = f'''
import resource, signal, torch
from support.files import whole, write_safetensors
from support.runtime import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
def main(_):
    with whole({str(tmp_path / "m.safetensors")!r}) as tmp:
        write_safetensors({{'w': torch.ones(250_000)}}, tmp)
run(main, dict)
'''
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 2, p.stderr
    assert p.stderr.startswith('error: ') and p.stderr.count('\n') == 1 and 'm.safetensors' in p.stderr
    assert (tmp_path / 'm.safetensors').read_bytes() == before and os.listdir(tmp_path) == ['m.safetensors']


def test_log_survives_a_half_written_line_and_forgets_what_was_not_saved(tmp_path):
    log = Log(tmp_path / 'log.jsonl')
    for step in range(5):
        log.write({'step': step, 'loss': step / 10})
    with log.path.open('a') as f:
        f.write('{"step": 5, "lo')
    log = Log(log.path)
    log.keep(3)
    log.rewrite()
    log.write({'step': 4, 'loss': 9.0})
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [r['step'] for r in rows] == [0, 1, 2, 3, 4] and rows[-1]['loss'] == 9.0


@pytest.fixture
def disk(monkeypatch):
    """What is asked of the operating system, in order: ('fsync', inode, size then) and ('rename', inode, new name)."""
    events, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        about = os.fstat(descriptor)
        events.append(('fsync', about.st_ino, about.st_size))
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append(('rename', os.lstat(source).st_ino, os.path.basename(target)))
        replace(source, target)
    monkeypatch.setattr(os, 'fsync', recorded_fsync)
    monkeypatch.setattr(os, 'replace', recorded_replace)
    return events


def entries(folder):
    """Inodes of a folder and of all that it holds."""
    return {path.stat().st_ino for path in (folder, *folder.rglob('*'))}


def test_a_file_reaches_the_disk_before_its_name(disk, tmp_path):
    """Renamed before it is flushed, a power cut leaves the new name on an empty file; and without the parent folder's
    flush the rename itself may be lost."""
    file = tmp_path / 'a.json'
    for content in ({'x': 1}, {'x': 2}):     # new, and in place of the old one
        disk.clear()
        write_json(file, content)
        inode, size = file.stat().st_ino, file.stat().st_size
        assert disk[:2] == [('fsync', inode, size), ('rename', inode, 'a.json')]
        assert [event[:2] for event in disk[2:]] == [('fsync', tmp_path.stat().st_ino)]


def test_a_folder_reaches_the_disk_before_its_name(disk, tmp_path):
    """With all files and folders in it; an old folder steps aside after that, not before."""
    for names in (['a', 'b/c'], ['d/e/f']):
        disk.clear()
        with whole(tmp_path / 'm') as tmp:
            for name in names:
                (tmp / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp / name).write_text(name)
        kinds = [kind for kind, *_ in disk]
        first = kinds.index('rename')
        assert {inode for _, inode, _ in disk[:first]} == entries(tmp_path / 'm')
        last = len(kinds) - 1 - kinds[::-1].index('rename')
        assert disk[last][1:] == ((tmp_path / 'm').stat().st_ino, 'm')
        assert [event[:2] for event in disk[last + 1:]] == [('fsync', tmp_path.stat().st_ino)]


def test_a_line_of_the_log_is_on_the_disk_when_write_returns(disk, tmp_path):
    """Flushed from Python's buffer first, or the flush of the file would find nothing. Else a checkpoint could be newer than
    its log, and the run could not resume. The other ranks write nothing."""
    log = Log(tmp_path / 'log.jsonl')
    for step in range(3):
        log.write({'step': step})
        about = log.path.stat()
        assert disk == [('fsync', about.st_ino, about.st_size)]
        disk.clear()
        log.write({'step': step}, rank=1)
        assert disk == [] and log.path.stat().st_size == about.st_size


def test_one_at_a_time_holds_a_lock(tmp_path):
    """And it is free again afterwards. A second opening of the file stands for another process, as it does for flock."""
    path = tmp_path / 'x/.lock'
    now_or_never = fcntl.LOCK_EX | fcntl.LOCK_NB
    with locked(path), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, now_or_never)
    with path.open() as other:
        fcntl.flock(other, now_or_never)


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
    write_safetensors(weights, folder / 'model.safetensors')


def test_the_link_moves_when_the_checkpoint_is_whole(disk, tmp_path):
    """And the older one goes after that: at every instant `last` names a whole checkpoint. What was saved is read back to
    the bit, the optimizer's moments included."""
    model, opt = trained(0)
    for step in (20, 40):
        disk.clear()
        save(tmp_path, step, 1.5 * step, model, opt, write_model, rank=0)
        renamed = [name for kind, _, name in disk if kind == 'rename']
        assert renamed[-2:] == [f'ckpt-0000{step}', 'last']
        assert sorted(os.listdir(tmp_path)) == [f'ckpt-0000{step}', 'last']
        assert os.readlink(tmp_path / 'last') == f'ckpt-0000{step}/model'
        flushed = {inode for kind, inode, _ in disk if kind == 'fsync'}
        assert entries(tmp_path / f'ckpt-0000{step}') <= flushed

    other, other_opt = trained(1)
    assert resume(tmp_path / 'nothing', other, other_opt) == (0, 0.0)
    assert resume(tmp_path, other, other_opt) == (40, 60.0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for key, moment in opt.state[model.weight].items():
        assert torch.equal(moment, other_opt.state[other.weight][key])


def test_a_crash_between_checkpoint_and_link_leaves_the_old_one(tmp_path, monkeypatch):
    """The old checkpoint is deleted last of all."""
    model, opt = trained(0)
    save(tmp_path, 20, 0.0, model, opt, write_model, rank=0)
    replace = os.replace

    def power_cut(source, target):
        if os.path.basename(target) == 'last':
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, 'replace', power_cut)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 40, 0.0, model, opt, write_model, rank=0)
    assert resume(tmp_path, *trained(1)) == (20, 0.0)


def test_json_errors_name_the_file(tmp_path):
    (tmp_path / 'x.json').write_text('{"a": ')
    for name in ('x.json', 'none.json'):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)


def test_digest_ignores_order_but_not_values():
    assert digest({'a': 1, 'b': 2}) == digest({'b': 2, 'a': 1}) != digest({'a': 1, 'b': 3})


def test_a_run_folder_belongs_to_one_config(tmp_path):
    """And looking at one makes nothing: a command that fails must not claim the folder."""
    out = open_run(tmp_path / 'r', {'lr': 1.0, 'device': 'cpu'}, ('device',))
    assert not out.exists()
    write_json(out / 'config.json', {'config': {'lr': 1.0, 'device': 'cpu'}})
    open_run(tmp_path / 'r', {'lr': 1.0, 'device': 'cuda'}, ('device',))
    with pytest.raises(UserError, match='lr=1.0, now 2.0'):
        open_run(tmp_path / 'r', {'lr': 2.0, 'device': 'cpu'}, ('device',))
    with pytest.raises(UserError, match='cannot be made'):
        open_run(out / 'config.json' / 'x', {}, ())
