"""Every file is written completely or not at all, and reaches the disk before its name does."""
import fcntl
import os
import subprocess
import sys

import pytest
import torch
from conftest import entries

from support.files import digest, locked, owned, read_json, sweep, whole, write_json, write_safetensors
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


def test_one_at_a_time_holds_a_lock(tmp_path):
    """And it is free again afterwards. A second opening of the file stands for another process, as it does for flock."""
    path = tmp_path / 'x/.lock'
    now_or_never = fcntl.LOCK_EX | fcntl.LOCK_NB
    with locked(path), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, now_or_never)
    with path.open() as other:
        fcntl.flock(other, now_or_never)


def test_json_errors_name_the_file(tmp_path):
    (tmp_path / 'x.json').write_text('{"a": ')
    for name in ('x.json', 'none.json'):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)


def test_digest_ignores_order_but_not_values():
    assert digest({'a': 1, 'b': 2}) == digest({'b': 2, 'a': 1}) != digest({'a': 1, 'b': 3})


def test_a_folder_has_one_owner(tmp_path):
    """Two starts in one folder both trained, and mixed their logs. Another opening of the lock stands for another
    process, as it does for flock."""
    with owned(tmp_path / 'r'):
        with pytest.raises(UserError, match=f'in use by process {os.getpid()} on .*wait for its end'):
            with owned(tmp_path / 'r'):
                pass
    with owned(tmp_path / 'r'):
        pass


def test_a_killed_owner_leaves_no_lock(tmp_path):
    code = f'import os\nfrom support.files import owned\nwith owned({str(tmp_path)!r}): os.kill(os.getpid(), 9)'
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT)
    assert p.returncode == -9 and (tmp_path / '.lock').exists()
    with owned(tmp_path):
        pass


def test_what_a_killed_process_left_is_swept(tmp_path):
    """Half-written files and folders go, others stay; a folder that had stepped aside comes back if nothing has taken
    its place."""
    (tmp_path / '.a.json.tmp123').write_text('half')
    (tmp_path / '.m.tmp123').mkdir()
    (tmp_path / '.b.old123').mkdir()
    (tmp_path / '.c.old123').mkdir()
    (tmp_path / 'c').mkdir()
    for mine in ('.profile', '.notes.tmp', 'x.tmp12'):
        (tmp_path / mine).write_text('mine')
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['.notes.tmp', '.profile', 'b', 'c', 'x.tmp12']
