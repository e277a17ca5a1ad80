"""The hub: what is asked of it, what its errors become, one commit for a run. A small server stands in its place."""
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from conftest import tiny_model
from huggingface_hub import constants

from formats import hub
from formats.hub import commit_of, commits, snapshot, stay_at
from formats.huggingface import load_model, read_config, save_model
from formats.problems import problem_files
from support.runtime import ROOT, UserError

# ---- a hub on this computer ----------------------------------------------------------------------


@dataclass
class Repository:
    files: dict                 # {name: bytes}
    branches: dict = field(default_factory=lambda: {'main': 'a' * 40})
    gated: bool = False
    private: bool = False

    def has(self, revision):
        return revision in self.branches or revision in self.branches.values()


class Hub(ThreadingHTTPServer):
    """The answers of the hub, as far as its client library asks for them."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repositories = {}               # {'me/model' or 'datasets/me/problems': Repository}
        self.asked = []                      # (method, path) of every request
        self.tokens = {'good'}
        self.fault = ''                      # 'limit', 'broken', 'portal', 'cut', 'mute': what is wrong with it
        self.url = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that has gone is no news."""

    def count(self, method, part=''):
        return sum(1 for verb, path in self.asked if verb == method and part in path)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def answer(self, status, body=b'', **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers['Content_Type'] = 'application/json'
        self.send_response(status)
        for name, value in ({'Content_Length': len(body)} | headers).items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def refuse(self, status, code='', message=''):
        headers = {'X_Error_Message': message} if message else {}
        if code:
            headers['X_Error_Code'] = code
        self.answer(status, {'error': message}, **headers)

    def token(self):
        return self.headers.get('Authorization', '').removeprefix('Bearer ')

    def repository(self, name):
        """The repository, or None after a refusal. Who is not known is told 401 where nothing is, as by the real one."""
        found = self.server.repositories.get(name)
        if self.token() and self.token() not in self.server.tokens:
            self.refuse(401, message='Invalid credentials in Authorization header')
        elif found is None or (found.private and not self.token()):
            if self.token():
                self.refuse(404, 'RepoNotFound', 'Repository not found')
            else:
                self.refuse(401, message='Invalid username or password.')
        else:
            return found
        return None

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        parts = path.strip('/').split('/')
        fault = self.server.fault
        if fault == 'mute':
            time.sleep(3)
        elif fault == 'portal':
            self.answer(200, b'<html>Welcome to the airport. Please log in.</html>', Content_Type='text/html')
        elif parts[0] == 'api' and fault == 'limit':
            self.answer(429, {'error': 'rate'}, ratelimit='"api";r=0;t=55')
        elif parts[0] == 'api' and fault == 'broken':
            self.refuse(503)
        elif parts[0] == 'api':
            prefix = 'datasets/' if parts[1] == 'datasets' else ''
            self.answer_question(prefix + '/'.join(parts[2:4]), parts[4:])
        else:
            prefix = 'datasets/' if parts[0] == 'datasets' else ''
            if prefix:
                parts = parts[1:]
            self.answer_file(prefix + '/'.join(parts[:2]), parts[3], '/'.join(parts[4:]))

    do_HEAD = do_GET

    def answer_question(self, name, rest):
        repository = self.repository(name)
        if repository is None:
            return
        revision = rest[1] if rest else 'main'
        if not repository.has(revision):
            self.refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        elif rest and rest[0] == 'tree':
            self.answer(200, [{'type': 'file', 'path': file, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest()}
                              for file, data in repository.files.items()])
        else:
            self.answer(200, {'id': name, 'sha': repository.branches.get(revision, revision), 'private': repository.private,
                              'gated': repository.gated, 'siblings': [{'rfilename': file} for file in repository.files]})

    def answer_file(self, name, revision, file):
        repository = self.repository(name)
        if repository is None:
            return
        if repository.gated:
            return self.refuse(403 if self.token() else 401, 'GatedRepo', 'Access is restricted')
        data = repository.files[file]
        begin = int(self.headers.get('Range', 'bytes=0-')[6:].split('-')[0])
        headers = {'ETag': f'"{hashlib.sha1(data).hexdigest()}"', 'X_Repo_Commit': revision, 'Content_Length': len(data) - begin}
        if begin:
            headers['Content_Range'] = f'bytes {begin}-{len(data) - 1}/{len(data)}'
        rest = data[begin:]
        if self.server.fault == 'cut' and self.command == 'GET' and file.endswith('.safetensors'):
            rest = rest[:len(rest) // 2]
            self.close_connection = True
        self.answer(206 if begin else 200, rest, **headers)


def folder_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def at(monkeypatch, tmp_path, url):
    """Point the library at an address, with a home in tmp_path."""
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'home/hub'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'home/token'))
    monkeypatch.setattr(constants, 'HF_STORED_TOKENS_PATH', str(tmp_path / 'home/stored_tokens'), raising=False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'):
        monkeypatch.delenv(name, raising=False)


def forget():
    """As a new process: nothing has been asked yet."""
    for memory in (hub.resolved, hub.fetched, hub.started_with):
        memory.clear()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with a model, a model with another tokenizer on a branch, and a data set. What is asked is in server.asked."""
    server = Hub()
    at(monkeypatch, tmp_path, server.url)
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(), tmp_path / 'made')
    files = folder_bytes(tmp_path / 'made') | {'tokenizer.json': b'{}', 'pytorch_model.bin': b'pickle', 'modeling.py': b'print()',
                                               'README.md': b'words'}
    server.repositories['me/model'] = Repository(files, {'main': 'a' * 40, 'v1.2': 'b' * 40})
    server.repositories['datasets/me/problems'] = Repository({'train.jsonl': b'{"question": "1+1", "answer": "2"}\n', 'x.py': b''})
    forget()
    yield server
    forget()
    server.shutdown()
    server.server_close()


def error_of(call, *args, **kwargs):
    """The one line of a UserError."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    line = str(error.value)
    assert '\n' not in line and len(line) < 300, line
    return line


# ---- ids -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', ['out/tyop', 'out/x@main', './x/y', '../x', '.hidden/x', '/x/y', '/nowhere', '~/x', '~me/x', 'here/tyop', 'here/tyop@v1', 'x/y/z',
                                  'x', '', 'none/problems.jsonl', 'none/train.parquet', 'x/', 'a b/c', 'x' * 100_000, 'a\x00/b', 'a/b\n', '@/@', 'here/' + 'x' * 5000])
@pytest.mark.parametrize('dataset', [False, True])
def test_what_looks_local_is_never_asked_of_the_hub(path, dataset, monkeypatch, tmp_path):
    """out/tyop is a user's repository there: its model would be loaded, or a mistyped name told to the hub."""
    def asked(*_, **__):
        raise AssertionError('the hub was asked')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', asked)
    monkeypatch.setattr(huggingface_hub.HfApi, 'repo_info', asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    with pytest.raises(UserError, match='no such folder') as error:
        snapshot(path, dataset=dataset)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize('name', ['me--you/model', 'x' * 97 + '/y', '../a/b'[3:] + '..'])
def test_an_id_that_the_library_refuses_is_one_line(name, server):
    assert name in error_of(snapshot, name) and server.asked == []


# ---- what is fetched ------------------------------------------------------------------------------

def test_what_is_asked_of_the_hub(server):
    """Revision after @; weights only for load_model; never a pickled file or a program; data sets as data sets."""
    read_config('me/model@v1.2')
    assert {name for name in os.listdir(snapshot('me/model@v1.2'))} == {'config.json', 'tokenizer.json'}
    assert ('GET', '/api/models/me/model/revision/v1.2') in server.asked
    load_model('me/model')
    files = problem_files('me/problems', 'train')
    assert [file.name for file in files] == ['train.jsonl'] and ('GET', '/api/datasets/me/problems') in server.asked
    fetched = {path.rsplit('/')[-1] for method, path in server.asked if '/resolve/' in path}
    assert fetched == {'config.json', 'tokenizer.json', 'model.safetensors', 'train.jsonl'}


def test_a_model_of_the_hub_is_the_model_that_was_put_there(server, tmp_path):
    """Bit for bit, through the links of the cache; its commit is known, and a local folder has none."""
    model = load_model('me/model')
    for (name, parameter), other in zip(model.named_parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert commit_of('me/model') == 'a' * 40 and commit_of('me/model@v1.2') == 'b' * 40
    assert commit_of('me/problems', dataset=True) == 'a' * 40 and commit_of(tmp_path / 'made') == ''
    assert commits() == {'me/model': 'a' * 40, 'me/model@v1.2': 'b' * 40, 'datasets/me/problems': 'a' * 40}
    assert commit_of(snapshot('me/model@v1.2')) == 'b' * 40


def test_an_id_means_one_commit_for_the_life_of_a_process(server):
    """The tokenizer of one commit was written beside weights of another if somebody pushed in between; and each checkpoint
    asked the hub again."""
    first = snapshot('me/model')
    asked = len(server.asked)
    repository = server.repositories['me/model']
    repository.branches['main'] = 'c' * 40
    assert snapshot('me/model') == first and len(server.asked) == asked
    assert snapshot('me/model', weights=True) == first and commits() == {'me/model': 'a' * 40}
    assert server.count('GET', '/api/models/me/model') == 2          # which commit, and which files; the second of them once
    forget()
    assert snapshot('me/model').name == 'c' * 40


def test_a_resumed_run_stays_at_its_commit_and_says_that_the_hub_has_moved(server, capsys):
    stay_at({'me/model': 'b' * 40, 'datasets/me/problems': 'a' * 40})
    assert snapshot('me/model', weights=True).name == 'b' * 40
    assert snapshot('me/problems', dataset=True).name == 'a' * 40
    note, = capsys.readouterr().out.splitlines()
    assert note == ('  note: me/model: since this run was started, the hub has moved from commit bbbbbbbbbbbb to aaaaaaaaaaaa; '
                    'the run stays at the former')


# ---- errors ---------------------------------------------------------------------------------------

def test_a_gated_model(server, monkeypatch):
    """The hub tells everybody its commit and its files, and gives them to those who have asked for access."""
    server.repositories['me/model'].gated = True
    says = ('me/model: a gated model; ask for access at https://huggingface.co/me/model, then set HF_TOKEN to a token of yours '
            '(https://huggingface.co/settings/tokens)')
    assert error_of(load_model, 'me/model') == says
    monkeypatch.setenv('HF_TOKEN', 'good')
    assert error_of(load_model, 'me/model') == says
    server.repositories['datasets/me/problems'].gated = True
    assert 'a gated data set; ask for access at https://huggingface.co/datasets/me/problems,' in error_of(problem_files, 'me/problems', 'train')


@pytest.mark.parametrize('token', ['', 'good'])
def test_a_model_that_is_not_there(server, monkeypatch, token):
    """To whom it does not know, the hub says 401 "Invalid username or password": nobody has given one."""
    monkeypatch.setenv('HF_TOKEN', token)
    line = error_of(load_model, 'nobody/nothing')
    assert line.startswith('nobody/nothing: no such folder, and no such model on the hub, or a private one; check the spelling, and ')
    assert 'HF_TOKEN' in line
    assert line.split(':')[0] == 'nobody/nothing' and 'no such data set' in error_of(snapshot, 'nobody/data', dataset=True)


def test_a_private_model_comes_with_a_token(server, monkeypatch):
    server.repositories['me/model'].private = True
    assert 'or a private one' in error_of(snapshot, 'me/model')
    monkeypatch.setenv('HF_TOKEN', 'good')
    assert snapshot('me/model').name == 'a' * 40


def test_a_wrong_token(server, monkeypatch):
    """It is refused for public models too, so "no such model" would lead astray."""
    monkeypatch.setenv('HF_TOKEN', 'old')
    line = error_of(snapshot, 'me/model')
    assert 'does not know the token' in line and 'set HF_TOKEN to a new one' in line and 'old' not in line


@pytest.mark.parametrize('revision', ['v9', 'f' * 40])
def test_an_unknown_revision(server, revision):
    line = error_of(snapshot, f'me/model@{revision}')
    assert f"has no branch, tag or commit '{revision}'; look at https://huggingface.co/me/model/commits/main" in line


def test_a_rate_limit_says_how_long_it_lasts(server):
    server.fault = 'limit'
    line = error_of(snapshot, 'me/model')
    assert '(429), for another 55 s' in line and 'HF_TOKEN' in line


@pytest.mark.parametrize('fault, says', [('broken', 'the hub is out of order (503)'), ('portal', 'no connection to the hub')])
def test_a_hub_that_is_out_of_order_and_a_page_in_its_place(server, fault, says):
    """A network that wants a login answers every address with its own page."""
    server.fault = fault
    assert says in error_of(snapshot, 'me/model')


def test_a_hub_that_never_answers_is_given_up_after_seconds(server, monkeypatch):
    """The library waits without a limit for the answer to its first question."""
    monkeypatch.setattr(hub, 'TIMEOUT', 0.2)
    server.fault = 'mute'
    began = time.monotonic()
    assert 'no connection to the hub' in error_of(snapshot, 'me/model')
    assert time.monotonic() - began < 2


def test_no_network(server, monkeypatch, tmp_path):
    """Nothing listens on a port that was just closed. The line has the command for a computer with a network."""
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        port = closed.getsockname()[1]
    at(monkeypatch, tmp_path, f'http://127.0.0.1:{port}')
    line = error_of(snapshot, 'me/model@v1.2')
    assert 'no connection to the hub' in line and '`hf download me/model --revision v1.2`' in line and line.endswith('HF_HUB_OFFLINE=1')
    assert '`hf download me/problems --repo-type dataset`' in error_of(snapshot, 'me/problems', dataset=True)


def test_a_download_that_breaks_off(server, monkeypatch):
    """Each time at half of what is left. The library tries some times; the weights that arrived in part are not kept, and
    the small files are."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    server.fault = 'cut'
    line = error_of(load_model, 'me/model')
    assert 'no connection to the hub, or it broke off' in line and 'start again, whole files are kept' in line
    server.fault = ''
    forget()
    server.asked.clear()
    load_model('me/model')
    assert {path.rsplit('/')[-1] for method, path in server.asked if '/resolve/' in path} == {'model.safetensors'}


def test_a_full_disk(server, monkeypatch):
    """In the middle of a file; and the line names the folder and HF_HOME."""
    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(huggingface_hub.file_download, 'http_get', full)
    line = error_of(snapshot, 'me/model')
    assert f'the disk is full ({constants.HF_HUB_CACHE}); make room, or set HF_HOME' in line


def test_a_cache_that_cannot_be_written(server, monkeypatch, tmp_path):
    (tmp_path / 'home').write_text('a file')
    assert 'HF_HOME' in error_of(snapshot, 'me/model')


# ---- offline --------------------------------------------------------------------------------------

def test_offline_with_nothing_in_the_cache(server, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    line = error_of(load_model, 'me/model')
    assert line.startswith(f'me/model: HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) does not have all of it; ')
    assert 'where there is a network (`hf download me/model`), and set the same HF_HOME' in line and server.asked == []


def test_offline_with_a_part_in_the_cache(server, monkeypatch):
    """Config and tokenizer were read before, and the weights never came: not "no model.safetensors in it"."""
    snapshot('me/model')
    forget()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert read_config('me/model').L == 3
    assert 'does not have all of it' in error_of(load_model, 'me/model')


def test_offline_with_all_in_the_cache(server, monkeypatch, capsys):
    load_model('me/model')
    problem_files('me/problems', 'train')
    forget()
    server.asked.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    load_model('me/model')
    problem_files('me/problems', 'train')
    assert commits() == {'me/model': 'a' * 40, 'datasets/me/problems': 'a' * 40}
    assert server.asked == [] and capsys.readouterr().out == ''


@pytest.mark.parametrize('fault', ['broken', 'limit', 'portal', 'gone'])
def test_a_hub_that_fails_is_replaced_by_the_cache_and_that_is_said(server, monkeypatch, capsys, fault):
    """A run that is started again must not end because the hub is down."""
    load_model('me/model')
    forget()
    capsys.readouterr()
    server.fault = fault
    if fault == 'gone':
        server.repositories.clear()
    load_model('me/model')
    note, = capsys.readouterr().out.splitlines()
    assert note.startswith('  note: me/model: the hub does not give it (') and 'commit aaaaaaaaaaaa' in note
    assert 'HF_HUB_OFFLINE' in note and len(note) < 200


# ---- several ranks --------------------------------------------------------------------------------

TWO_RANKS = '''
import os, torch.distributed as dist
from formats.hub import commits, snapshot
from formats.huggingface import load_model
from support.runtime import barrier, run, start

def main(_):
    env = start('cpu')
    if env.rank == 0:
        snapshot('me/problems', dataset=True)            # rank 0 may ask alone
    load_model('me/model')
    print(f'rank {env.rank}: {commits()["me/model"][:4]}', flush=True)
    barrier()
    load_model('me/gated')

run(main, dict)
'''


def test_one_rank_asks_and_downloads_and_an_error_is_one_line(server, tmp_path):
    """Two processes. Each asked the hub, downloaded and failed by itself: eight questions, and eight lines of a gated model."""
    server.repositories['me/gated'] = Repository(server.repositories['me/model'].files, gated=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    home = {'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HOME': str(tmp_path)}
    processes = []
    for rank in range(2):
        ranks = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': 2, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        environment = os.environ | home | {key: str(value) for key, value in ranks.items()}
        processes.append(subprocess.Popen([sys.executable, '-c', TWO_RANKS], cwd=ROOT, env=environment, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    # As torchrun does: the first that ends in an error ends the other.
    stdout, stderr = processes[0].communicate(timeout=60)
    processes[1].terminate()
    other, other_errors = processes[1].communicate(timeout=60)
    assert stdout.strip() == 'rank 0: aaaa' and other.strip() == 'rank 1: aaaa', stderr + other_errors
    assert processes[0].returncode == 2 and stderr.startswith('error: me/gated: a gated model; ask for access at ')
    assert stderr.count('\n') == 1 and other_errors == ''
    for file in ('config.json', 'model.safetensors', 'tokenizer.json'):
        assert server.count('GET', f'/me/model/resolve/{"a" * 40}/{file}') == 1
    assert server.count('GET', '/api/models/me/model') == 2
