"""What lies on disk is whole or not there at all."""
import json
import os
import subprocess
import sys

import pytest
import torch

from support.files import Log, digest, open_run, read_json, whole, write_json, write_safetensors
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
