"""The hub: what is asked of it, what its errors become, one commit for a run. A small server stands in its place."""
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from conftest import argv, tiny_model
from huggingface_hub import ModelCard, constants
from torch import distributed as dist

import eval_math
from configs import load_config
from distill import main
from formats import hub
from formats.hub import commits, snapshot, stay_at
from formats.huggingface import load_model, read_config, save_model
from formats.problems import problem_files
from studies import publish
from support import runtime
from support.files import read_json, write_json
from support.provenance import read_starts, started_commits
from support.runtime import ROOT, UserError

# ---- a hub on this computer ----------------------------------------------------------------------


@dataclass
class Repository:
    files: dict                 # {name: bytes}
    branches: dict = field(default_factory=lambda: {'main': 'a' * 40})
    gated: bool = False
    private: bool = False
    card: dict = field(default_factory=dict)             # the metadata of its README.md

    def has(self, revision):
        return revision in self.branches or revision in self.branches.values()


class Hub(ThreadingHTTPServer):
    """The answers of the hub, as far as its client library asks for them."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repositories = {}               # {'me/model' or 'datasets/me/problems': Repository}
        self.asked = []                      # (method, path) of every request
        self.tokens = {'good', 'reader'}
        self.large = {}                      # {sha256: bytes} of what was put into the large file storage
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
                              'gated': repository.gated, 'cardData': repository.card, 'siblings': [{'rfilename': file} for file in repository.files]})

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

    # ---- uploads ----

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers['Content-Length']))
        if self.token() != 'good':
            return self.refuse(403 if self.token() in self.server.tokens else 401, message='Forbidden')
        if path == '/api/validate-yaml':
            content = json.loads(body)['content']
            ModelCard(content)               # raises where the metadata is no YAML
            return self.answer(200, {'errors': [], 'warnings': []})
        if path == '/api/repos/create':
            return self.create(json.loads(body))
        if path.endswith('/info/lfs/objects/batch'):
            objects = [{'oid': item['oid'], 'size': item['size'], 'actions': {'upload': {'href': f'{self.server.url}/large/{item["oid"]}'}}}
                       for item in json.loads(body)['objects']]
            return self.answer(200, {'objects': objects, 'transfer': 'basic'}, Content_Type='application/vnd.git-lfs+json')
        name, verb = '/'.join(path.split('/')[3:5]), path.split('/')[5]
        repository = self.server.repositories[name]
        if verb == 'preupload':
            files = [{'path': item['path'], 'shouldIgnore': False,
                      'uploadMode': 'lfs' if item['path'].endswith('.safetensors') else 'regular'} for item in json.loads(body)['files']]
            return self.answer(200, {'files': files})
        assert verb == 'commit', path
        for line in body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                repository.files[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                repository.files[value['path']] = self.server.large[value['oid']]
            elif item['key'] == 'deletedFile':
                del repository.files[value['path']]
        repository.branches['main'] = hashlib.sha1(body).hexdigest()
        self.answer(200, {'commitUrl': f'{self.server.url}/{name}/commit/{repository.branches["main"]}',
                          'commitOid': repository.branches['main'], 'success': True})

    def create(self, body):
        name = f'{body["organization"]}/{body["name"]}'
        if body['organization'] != 'me':
            return self.refuse(403, message='You may not write there')
        if name in self.server.repositories:
            return self.answer(409, {'error': 'exists', 'url': f'{self.server.url}/{name}'})
        private = body.get('private') or body.get('visibility') == 'private'
        self.server.repositories[name] = Repository({'.gitattributes': b''}, private=bool(private))
        self.answer(200, {'url': f'{self.server.url}/{name}'})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers['Content-Length']))
        oid = self.path.rsplit('/')[-1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        self.answer(200)


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
    with pytest.raises(UserError, match='no such file or folder') as error:
        snapshot(path, dataset=dataset)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize('name', ['me--you/model', 'me/model..', 'me/mod@a/../../b'])
def test_an_id_that_no_repository_can_have_is_one_line(name, server):
    """The dots would lead out of the cache."""
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
    (tmp_path / 'local').mkdir()
    assert snapshot('me/model').name == 'a' * 40 and snapshot('me/model@v1.2').name == 'b' * 40
    assert snapshot('me/problems', dataset=True).name == 'a' * 40 and snapshot(tmp_path / 'local') == tmp_path / 'local'
    assert commits() == {'me/model': 'a' * 40, 'me/model@v1.2': 'b' * 40, 'datasets/me/problems': 'a' * 40}


def test_an_id_means_one_commit_for_the_life_of_a_process(server):
    """The tokenizer of one commit was written beside weights of another if somebody pushed in between; and each checkpoint
    asked the hub again."""
    first = snapshot('me/model')
    asked = len(server.asked)
    repository = server.repositories['me/model']
    repository.branches |= {'main': 'c' * 40, 'old': 'a' * 40}
    assert snapshot('me/model') == first and len(server.asked) == asked
    assert snapshot('me/model', weights=True) == first and commits() == {'me/model': 'a' * 40}
    assert server.asked.count(('GET', '/api/models/me/model')) == 1  # which commit is main?
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
    # As torchrun does: the first that ends in an error ends the other, which has at most the same to say.
    stdout, stderr = processes[0].communicate(timeout=300)
    processes[1].terminate()
    other, other_errors = processes[1].communicate(timeout=300)
    assert stdout.strip() == 'rank 0: aaaa' and other.strip() == 'rank 1: aaaa', stderr + other_errors
    assert processes[0].returncode == 2 and stderr.startswith('error: me/gated: a gated model; ask for access at ')
    assert stderr.count('\n') == 1 and 'Traceback' not in other_errors
    assert [line for line in other_errors.splitlines() if line.startswith('error')] in ([], [stderr.strip()])
    for file in ('config.json', 'model.safetensors', 'tokenizer.json'):
        assert server.count('GET', f'/me/model/resolve/{"a" * 40}/{file}') == 1
    assert server.asked.count(('GET', '/api/models/me/model')) == 1


# ---- a run ----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def run(toy_cfg, toy_dir, tmp_path_factory):
    """A run of the toy whose student and problems are on the hub: two steps; then the hub has another student under the same
    name, and a third step is made with another learning rate. -> (out, what the second start printed, commits)."""
    folder = tmp_path_factory.mktemp('run')
    server = Hub()
    with pytest.MonkeyPatch.context() as patch:
        at(patch, folder, server.url)
        patch.chdir(folder)
        student = Repository(folder_bytes(Path(toy_cfg['student'])))
        server.repositories['me/student'] = student
        server.repositories['datasets/me/problems'] = Repository({'train.jsonl': Path(toy_cfg['data']).read_bytes()}, {'main': 'd' * 40})
        words = argv(toy_dir, folder / 'out', steps=2, student='me/student', teacher=toy_cfg['teacher'], data='me/problems',
                     eval_data=toy_cfg['eval_data'])
        forget()
        main(load_config(words))
        first = student.branches['main']

        # Somebody pushes; the old commit stays reachable.
        student.branches['main'] = 'e' * 40
        student.branches['old'] = first
        forget()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main(load_config([*words, 'steps=3', 'lr=1e-3']))
        forget()
    server.shutdown()
    server.server_close()
    return folder / 'out', printed.getvalue(), {'me/student': first, 'datasets/me/problems': 'd' * 40}


def test_a_run_notes_its_commits_and_stays_at_them(run):
    """The next start took whatever was on the hub by then, and nothing told which commit the first one had had."""
    out, printed, known = run
    first, second = read_starts(out)
    assert first['commits'] == second['commits'] == known == started_commits(out)
    assert first['problems'] == {'data': 40, 'eval_data': {'eval': 6}}
    assert ('note: me/student: since this run was started, the hub has moved from commit aaaaaaaaaaaa to eeeeeeeeeeee; '
            'the run stays at the former') in printed


def test_an_evaluation_notes_the_commit_of_its_model(server, toy_cfg):
    """Its scores are those of a commit, and not of a name."""
    server.repositories['me/student'] = Repository(folder_bytes(Path(toy_cfg['student'])))
    words = ['student=me/student', f'eval_data={toy_cfg["eval_data"]}', 'eval_n=1', 'eval_max_new_tokens=2', 'device=cpu']
    eval_math.main(load_config(words))
    results, = Path('out/eval').glob('student-*/results.json')
    assert read_json(results)['commits'] == {'me/student': 'a' * 40}


@pytest.mark.parametrize('commits', [[], {'me/x': 1}, {'me/x': 'main'}, {'me/x': '../../x'}])
def test_a_record_whose_commits_are_none_is_damaged(tmp_path, commits):
    """They are asked of the hub, and become a path in the cache."""
    row = {'step': 0, 'versions': {}, 'sources': {}, 'eval_data': {}, 'commits': commits}
    (tmp_path / 'starts.jsonl').write_text(json.dumps(row) + '\n')
    assert 'starts.jsonl: damaged' in error_of(read_starts, tmp_path)


# ---- publishing -----------------------------------------------------------------------------------

def body_of(text):
    """A card without its metadata."""
    return text.split('\n---\n', 1)[1]


def published(out, repo='me/new', name='last', *switches):
    """Run the script -> what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        publish.main(publish.settings([str(out / name), repo, *switches]))
    return printed.getvalue()


def test_what_is_published_is_the_model_with_its_card(run, server, monkeypatch):
    """Read back from the hub through our own loader: the same weights, the same files, and a card in front of them."""
    out = run[0]
    monkeypatch.setenv('HF_TOKEN', 'good')
    server.repositories['me/student'] = Repository({}, {'main': 'a' * 40}, card={'license': 'apache-2.0'})
    printed = published(out)
    repository = server.repositories['me/new']
    assert printed == f'me/new: 7 files; {server.url}/me/new/commit/{repository.branches["main"]}\n'
    assert repository.files.keys() == {'.gitattributes', 'README.md', *(file.name for file in (out / 'last').iterdir())}
    for (name, parameter), other in zip(load_model('me/new').named_parameters(), load_model(out / 'last').parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert not repository.private and sorted(os.listdir(out / 'last')) == sorted(repository.files.keys() - {'README.md', '.gitattributes'})


def test_the_card_says_how_the_model_was_made(run, server, toy_cfg):
    """Against the run's own files. The metadata is read by the hub's library."""
    out, _, known = run
    server.repositories['me/student'] = Repository({}, {'main': 'a' * 40}, card={
        'license': 'other', 'license_name': 'toy-licence', 'license_link': 'LICENSE', 'tags': ['x']})
    text = publish.card(made := publish.read_run(out / 'last'), 'me/new', publish.licence_of(made))
    assert ModelCard(text).data.to_dict() == {
        'library_name': 'transformers', 'pipeline_tag': 'text-generation', 'tags': publish.TAGS, 'license': 'other',
        'license_name': 'toy-licence', 'license_link': 'https://huggingface.co/me/student/blob/main/LICENSE',
        'base_model': 'me/student', 'base_model_relation': 'finetune', 'datasets': ['me/problems']}
    body = body_of(text)
    for row in (f'| student (base model) | me/student | {known["me/student"]} |', '| teacher | teacher | not from the hub |',
                f'| training problems | me/problems | {"d" * 40} |', '| training problems | 40 |', '| `steps` | 3 |', '| `rep_loss` | mse |'):
        assert row in body, row

    # The scores are those of results.json.
    results = read_json(out / 'results.json')
    head = [line for line in body.splitlines() if line.startswith('|  | avg')][0]
    assert [cell.strip().replace('\\', '') for cell in head.strip('|').split('|')] == ['', *results['student']]
    for name, side in (('student before', 'student'), ('this model, step 3', 'distilled'), ('teacher', 'teacher')):
        assert f'| {name} | ' + ' | '.join(f'{value:.1f}' for value in results[side].values()) + ' |' in body
    assert 'eval: 6 problems.' in body

    # Code, and what changed on the way.
    versions = read_starts(out)[0]['versions']
    assert f'torch {versions["torch"]}' in body and f'git {versions["git"]}' in body
    assert 'Started again after step 2, from where on: ' in body and '`lr` was 0.002, and is 0.001' in body

    # The config block is the config but for folders; the command, as a shell reads it, gives the same config.
    config = json.loads(body.split('```json\n')[1].split('\n```')[0])
    assert set(load_config([])) - set(config) == set(publish.NOT_TOLD) and config['lr'] == 1e-3 and config['teacher'] == 'teacher'
    line = body.split('```bash\n')[1].split('\n```')[0]
    shell = subprocess.run(['bash', '-c', f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    words = shell.stdout.split('\0')[:-1]
    assert words[:2] == ['python', 'distill.py'] and f'student=me/student@{known["me/student"]}' in words
    again = load_config(words[2:])
    assert {key for key, value in config.items() if again[key] != value} == {'student', 'data'}
    assert "from_pretrained('me/new')" in body and 'vllm serve me/new' in body


def test_the_card_of_a_checkpoint_tells_that_checkpoint(run):
    """`best` may be an older one than results.json tells of."""
    made = publish.read_run(run[0] / 'ckpt-000002/model')
    body = body_of(publish.card(made, 'me/new', {}))
    assert 'after 2 of 2 steps' in body and 'this model, step 2 |' in body and 'Started again' not in body


def test_the_card_of_a_control_does_not_say_on_policy(run):
    """Its answers are the teacher's. The card said that the student had written them."""
    made = publish.read_run(run[0] / 'last')
    assert 'steps of on-policy distillation' in body_of(publish.card(made, 'me/new', {}))
    made.config.update(answers_by='teacher', opd='supervised', oprd_weight=0.0, opd_weight=1.0)
    text = publish.card(made, 'me/new', {})
    body = body_of(text)
    assert 'steps of distillation from a teacher' in body and 'The teacher answers the problems, and' in body
    assert 'positions of these answers: the tokens of the answers become likelier. Made' in body
    assert ModelCard(text).data.tags == ['representation-distillation', 'nanoOPRD'] and 'on-policy' not in body


@pytest.mark.parametrize('keys, says', [
    (dict(teacher='me/sums,/home/x/products', teacher_share=[3, 1]),
     ['distillation from 2 teachers (me/sums, products). The student answers', f'| teacher | me/sums | {"a" * 40} |',
      '| teacher | products | not from the hub |', '| teacher2 | 70.0 |', '`teacher_share` | \\[3, 1\\] |', 'teacher=me/sums@aaaa']),
    (dict(teacher='self', teacher_sees='solution', teacher_every=2),
     ['on-policy distillation from itself, which sees a solution. ', '| `teacher_sees` | solution |', '| `teacher_every` | 2 |']),
    (dict(oprd_weight=0.0, reward_weight=1.0),
     ['steps of on-policy training with rewards. ', ': tokens of answers that are right become likelier than', '| `reward_scale` | True |']),
    (dict(attention_weight=1.0), ['(Eq. 6), and attention maps approach those of the teacher', '| `attention_heads` | all |']),
    (dict(answers_by='solution'), ['steps of distillation from', 'The answers are the solutions of the problems, and']),
])
def test_the_card_tells_of_other_teachers_and_terms(keys, says, tmp_path):
    """It said that everything came from one teacher, of several hub ids that they were a folder, and of rewards nothing."""
    config = load_config(['configs/toy.py']) | {'student': 'me/student', 'teacher': 'me/sums'} | keys
    scores = {'student': {'avg@2': 1.0}, 'teacher': {'avg@2': 60.0}, 'teacher2': {'avg@2': 70.0}, 'distilled': {'avg@2': 50.0}}
    starts = [{'step': 0, 'versions': {'torch': '2'}, 'commits': {'me/sums': 'a' * 40}}]
    body = body_of(publish.card(publish.Made(tmp_path, 3, config, scores, starts), 'me/new', {}))
    for text in says:
        assert text in body, text


def test_nothing_private_is_published(run, server, monkeypatch, tmp_path):
    """The config.json of a student that transformers has saved names the folder it was read from, and so does a
    tokenizer_config.json; data and teacher lie in somebody's home."""
    out = tmp_path / 'out'
    subprocess.run(['cp', '-r', run[0], out], check=True)
    folder = (out / 'last').resolve()
    for name in ('config.json', 'tokenizer_config.json'):
        write_json(folder / name, read_json(folder / name) | {'_name_or_path': '/home/secret/deep/base', 'more': {'file': ['~/secret/a/b.json', '../secret/c.json', r'C:\secret\d.json']},
                                                              'kept': '/think'})
    (folder / 'notes.txt').write_text('secret')
    (folder / 'train.py').write_text('secret')
    record = read_json(folder.parent / 'resume.json')
    record['config'] |= {'teacher': '/home/secret/models/teacher', 'data': '/data/secret/problems.jsonl', 'eval_data': 'aime24,/home/secret/x/eval.jsonl',
                         'bridge': '../secret/bridge'}
    write_json(folder.parent / 'resume.json', record)
    monkeypatch.setenv('HF_TOKEN', 'good')
    published(out)
    files = server.repositories['me/new'].files
    assert 'notes.txt' not in files and 'train.py' not in files
    for name, data in files.items():
        for secret in ('secret', str(tmp_path), str(run[0].parent)):
            assert secret.encode() not in data, (name, secret)
    assert json.loads(files['config.json'])['_name_or_path'] == 'base' and json.loads(files['config.json'])['more'] == {'file': ['b.json', 'c.json', 'd.json']}
    assert json.loads(files['config.json'])['kept'] == '/think'
    assert 'eval_data=aime24,eval.jsonl' in files['README.md'].decode()


def test_texts_of_others_are_no_markup(run):
    """The name of a set, a suffix and a revision of somebody else: no link, no picture, no script, no end of the block."""
    made = publish.read_run(run[0] / 'last')
    evil = '[x](javascript:alert(1)) <script>alert(1)</script> **b** ![p](http://x/y.png) | cell\n# head\n```\n~~~~'
    made.config |= {'eval_suffix': evil, 'rep_loss': evil, 'teacher': evil}
    made.starts[-1] |= {'problems': {'data': 1, 'eval_data': {evil: 5}}, 'versions': made.starts[-1]['versions'] | {'git': evil}}
    made.scores['teacher'] |= {f'avg@2/{evil}': 1.0}
    body = body_of(publish.card(made, 'me/new', {}))

    # What is left when code blocks are taken out, as CommonMark reads them: a fence ends at a line that is as long.
    outside = []
    fence = ''
    for line in body.splitlines():
        mark = line.strip('`') if fence else line
        if fence and not mark and len(line) >= len(fence):
            fence = ''
        elif not fence and line.startswith('```'):
            fence = line[:len(line) - len(line.lstrip('`'))]
        elif not fence:
            outside.append(line)
    assert fence == '' and len(outside) > 30
    columns = 0                              # of the table that goes on
    for line in outside:
        plain = re.sub(r'\\[^a-zA-Z0-9\s]', '', line)
        if line.startswith('#'):
            assert line in ('# new', '## Sources', '## Scores', '## Training', '## Use')
        assert not re.search(r'[<>\[\]!~]|\*\*|http:', plain), line
        if line.startswith('|'):
            columns = columns or plain.count('|')
            assert plain.count('|') == columns, line
        else:
            assert '|' not in plain
            columns = 0


def test_older_files_of_another_model_go(run, server, monkeypatch):
    """An index of the larger model that was there before would be read in place of the new weights. A licence is no file of a
    model, whatever its ending; it was deleted with them."""
    monkeypatch.setenv('HF_TOKEN', 'good')
    server.repositories['me/new'] = Repository({'model-00001-of-00002.safetensors': b'', 'model.safetensors.index.json': b'{}',
                                                'README.md': b'old', 'LICENSE.txt': b'l', 'vocab.txt': b'v', 'picture.png': b'p', 'logs/x.json': b'{}'})
    published(run[0])
    files = server.repositories['me/new'].files
    assert 'model.safetensors' in files and files['README.md'] != b'old'
    assert not {'model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'vocab.txt'} & files.keys()
    assert files['LICENSE.txt'] == b'l' and files['picture.png'] == b'p' and files['logs/x.json'] == b'{}'


def test_private_means_private(run, server, monkeypatch):
    """A repository that is public already stays public whatever is asked when it is "made" again."""
    monkeypatch.setenv('HF_TOKEN', 'good')
    published(run[0], 'me/hidden', 'last', '--private')
    assert server.repositories['me/hidden'].private and 'README.md' in server.repositories['me/hidden'].files
    before = server.repositories['me/model'].files.copy()
    assert 'exists on the hub and is public' in error_of(published, run[0], 'me/model', 'last', '--private')
    assert server.repositories['me/model'].files == before


def test_a_dry_run_shows_the_card_and_uploads_nothing(run, server):
    server.repositories['me/student'] = Repository({}, {'main': 'a' * 40})
    printed = published(run[0], 'me/new', 'last', '--dry-run')
    assert printed.startswith('---\nbase_model: me/student') and '\n## Scores\n' in printed
    assert re.search(r' bytes  model.safetensors\n', printed) and printed.endswith('nothing was uploaded\n')
    assert server.count('POST') == 0 and 'me/new' not in server.repositories


@pytest.mark.parametrize('token, repo, says', [
    ('', 'me/new', 'me/new: no token; set HF_TOKEN to one that may write (https://huggingface.co/settings/tokens)'),
    ('reader', 'me/new', 'me/new: your token may not write there (403); take one with write access to me '),
    ('good', 'you/new', 'you/new: your token may not write there (403); take one with write access to you '),
    ('old', 'me/new', 'me/new: the hub does not know the token that was sent (401); ')])
def test_who_may_not_write_is_told_so(run, server, monkeypatch, token, repo, says):
    monkeypatch.setenv('HF_TOKEN', token)
    assert error_of(published, run[0], repo).startswith(says)
    assert repo not in server.repositories


@pytest.mark.parametrize('words, says', [
    ([], 'wants a model folder and owner/name'), (['x'], 'wants a model folder'), (['x', 'a/b', '--privat'], 'wants a model folder'),
    (['x', 'name'], 'not the name of a repository'), (['x', '../b'], 'not the name of a repository'), (['x', 'a/b/c'], 'not the name of a repository')])
def test_a_command_that_is_not_understood(words, says):
    assert says in error_of(publish.settings, words)


@pytest.mark.parametrize('what', ['', 'last/..', 'gone', 'made'])
def test_what_is_no_model_of_a_run_is_refused(run, server, tmp_path, what):
    """The run folder, a checkpoint, nothing, and a model that no run has made."""
    folder = tmp_path / 'made' if what == 'made' else run[0] / what
    assert f'{folder}: not the model of a checkpoint; give last or best' in error_of(publish.main, publish.settings([str(folder), 'me/new']))
    assert server.asked == []


def test_a_rank_that_ends_before_it_asks_ends_those_that_wait_for_its_answer(monkeypatch):
    """Rank 0 may find an error that no other rank looks for, such as a tracker that is not installed. On other machines, where
    torchrun does not stop them, the ranks waited for its commit for ever."""
    store = dist.HashStore()
    monkeypatch.setattr(hub, 'ranks', lambda: 2)
    monkeypatch.setattr(hub.distributed_c10d, '_get_default_store', lambda: store)
    monkeypatch.setattr(runtime, 'meeting', runtime.Meeting(store, 1, 2, 60, 'localhost'))
    runtime.Meeting(store, 0, 2, 60, 'localhost').tell('report=wandb: not installed')
    with pytest.raises(UserError, match='^rank 0 has ended: report=wandb: not installed'):
        hub.made_once('commit of me/model', False, None)
