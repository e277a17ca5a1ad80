"""
The Hugging Face hub: model folders and data sets that are given by an id, owner/name or owner/name@revision.

    folder = snapshot('Qwen/Qwen3-4B', weights=True)     a folder of this computer is returned as it is
    commits()                                            {'Qwen/Qwen3-4B': '1cfa9a72...'}, for the record

An id means one commit for the life of a process, and of a run: the first question to the hub decides it, and
`stay_at` takes the commits with which a run was started. On several ranks, rank 0 asks, one process of each
machine downloads, and the others wait for it. So there is one question and one error line, not 512.

Three variables of the environment decide, all of them the library's own: HF_HOME (where downloads are kept),
HF_TOKEN (who asks: for gated and private models), HF_HUB_OFFLINE=1 (take everything from HF_HOME).

Simpler than usual: no download code; huggingface_hub does that. What this file adds is which files may come
(never a pickled one), which text may be an id (never one that looks like a path), and what an error means.
It does not upload: studies/publish.py does.
"""
import errno
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import DistError, distributed_c10d

from support.files import whole
from support.runtime import UserError, cut, print0, ranks, shown, wait_until

# Of files; no hub id has them.
DATA_ENDINGS = ('.parquet', '.arrow', '.jsonl', '.json', '.csv', '.tsv', '.txt', '.gz', '.safetensors')
TEXT_PATTERNS = ('*.json', '*.jinja', '*.txt', '*.tiktoken')     # what a model folder has beside its weights
DATA_PATTERNS = ('*.parquet', '*.arrow', '*.jsonl', '*.jsonl.gz', '*.json', '*.json.gz', '*.csv', '*.csv.gz',
                 '*.tsv', '*.tsv.gz')
TIMEOUT = 10                    # seconds in which the hub must answer a question
TOKENS = 'https://huggingface.co/settings/tokens'

# What this process has asked the hub for, and what a run was started with.
resolved = {}                   # {HubId: Commit}
fetched = {}                    # {(HubId, patterns): Path}
started_with = {}               # {text of a HubId: commit}


# ---- ids -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class HubId:
    """A model or a data set of the hub."""
    name: str                   # owner/name
    revision: str               # a branch, a tag or a commit; '' = main
    kind: str                   # 'model' or 'dataset'

    def __str__(self):
        """As the user wrote it; of a data set with the prefix that its address has."""
        text = f'{self.name}@{self.revision}' if self.revision else self.name
        return f'datasets/{text}' if self.kind == 'dataset' else text

    def address(self):
        """Its page."""
        return f'https://huggingface.co/{"datasets/" if self.kind == "dataset" else ""}{self.name}'

    def command(self):
        """The command that fetches it, in a shell."""
        words = ['hf download', self.name]
        if self.kind == 'dataset':
            words.append('--repo-type dataset')
        if self.revision:
            words.append(f'--revision {self.revision}')
        return ' '.join(words)


@dataclass(frozen=True)
class Commit:
    """What an id means."""
    sha: str
    unreachable: str            # why the hub could not be asked, so that the cache alone counts; '' = it was


def hub_id(path_or_repo, dataset=False):
    """The text of an id -> HubId. A UserError if it is none, or looks like a path of this computer: a
    mistyped folder would be somebody's repository there."""
    match = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', path_or_repo)
    if not match or '..' in path_or_repo:
        raise UserError(f'{shown(path_or_repo)}: no such file or folder, and not a hub id (owner/name)')
    first = path_or_repo.split('/')[0]
    if first.startswith('.') or first == 'out' or os.path.lexists(first) or match[1].endswith(DATA_ENDINGS):
        raise UserError(f'{shown(path_or_repo)}: no such file or folder; it looks like a path, so the hub is '
                        f'not asked (for a hub id, start where no folder {shown(first)} is)')
    return HubId(match[1], match[2] or '', 'dataset' if dataset else 'model')


# ---- snapshots -----------------------------------------------------------------------------------

def snapshot(path_or_repo, weights=False, dataset=False):
    """A local folder as it is; a hub id, owner/name or owner/name@revision, downloaded once -> Path.

    Pickled files are never downloaded, weights only if asked for. dataset: the id is a data set's.
    """
    path_or_repo = str(path_or_repo)
    if path_or_repo and os.path.isdir(path_or_repo):
        return Path(path_or_repo)
    source = hub_id(path_or_repo, dataset)
    patterns = TEXT_PATTERNS
    if weights:
        patterns += ('*.safetensors',)
    if dataset:
        patterns = DATA_PATTERNS

    # Which commit? Rank 0 decides it for all ranks.
    if source not in resolved:
        is_rank_0 = os.environ.get('RANK', '0') == '0'
        answer = made_once(f'commit of {source}', is_rank_0, lambda: resolve(source, patterns))
        resolved[source] = Commit(*answer)

    # Its files. The first process of a machine downloads them; the others find them in the cache.
    if (source, patterns) not in fetched:
        is_first = os.environ.get('LOCAL_RANK', '0') == '0'
        key = f'files {patterns} of {source} on {socket.gethostname()}'
        fetched[source, patterns] = Path(made_once(key, is_first, lambda: download(source, patterns)))
    return fetched[source, patterns]


def commits():
    """What this process has taken from the hub -> {id: its commit}. Data sets: {datasets/owner/name: ...}."""
    return {str(source): commit.sha for source, commit in resolved.items()}


def stay_at(known):
    """From now on each of these ids means this commit, {id: commit}, wherever it is on the hub now. A run
    that is resumed goes on with what it was started with."""
    started_with.update(known)


def made_once(key, is_maker, make):
    """What one process makes for all that ask for it -> the same on each of them, or the same UserError.

    is_maker: is this the process that makes it? It need not wait for the others: rank 0 may ask alone. The
    others look into the store through which the ranks have met, for as long as a download takes. make()
    returns what JSON can hold.
    """
    if ranks() == 1:
        return make()
    store = distributed_c10d._get_default_store()
    if is_maker:
        try:
            result = make()
        except UserError as error:
            store.set(key, json.dumps({'error': str(error)}))
            raise
        store.set(key, json.dumps({'result': result}))
        return result

    # The maker may have ended before it came here, and the store may go with it.
    try:
        wait_until(lambda: store.check([key]), key)
        answer = json.loads(store.get(key))
    except DistError:
        raise UserError(f'{key}: the process that fetches it has ended; look at its messages') from None
    if 'error' in answer:
        raise UserError(answer['error'])
    return answer['result']


def resolve(source, patterns):
    """Ask the hub which commit an id means -> (commit, why the hub could not be asked).

    If it cannot be asked, or refuses, what the cache has of an earlier start is used, and that is said.
    """
    from huggingface_hub import HfApi
    stays = started_with.get(str(source), '')
    try:
        # One try: the library would wait for an answer without an end, and ask again.
        info = HfApi().repo_info(source.name, revision=source.revision or None, repo_type=source.kind,
                                 timeout=TIMEOUT)
    except Exception as error:               # the library lets the errors of its network libraries through
        reason = explain(error, source)
        folder = in_cache(source, stays or source.revision, patterns)
        if folder is None:
            raise UserError(reason) from None
        if not is_offline():
            why = status_of(error) or type(error).__name__
            print0(f'  note: {source}: the hub does not give it ({why}); the cache does, commit '
                   f'{folder.name[:12]} (with HF_HUB_OFFLINE=1 the hub is not asked)')
        return folder.name, reason

    if stays and stays != info.sha:
        print0(f'  note: {source}: since this run was started, the hub has moved from commit {stays[:12]} to '
               f'{info.sha[:12]}; the run stays at the former')
    return stays or info.sha, ''


def download(source, patterns):
    """The files of an id whose commit is known -> the path of their folder, as text."""
    from huggingface_hub import snapshot_download
    commit = resolved[source]
    try:
        folder = snapshot_download(source.name, revision=commit.sha, repo_type=source.kind,
                                   allow_patterns=list(patterns), local_files_only=bool(commit.unreachable))
    except Exception as error:               # see `resolve`
        raise UserError(commit.unreachable or explain(error, source)) from None
    if str(source) not in started_with:
        note_branch(source, Path(folder))
    return folder


def note_branch(source, folder):
    """Write into the cache which commit a branch or tag means, where the library looks for it offline. It
    does so itself for downloads by the name of the branch, but these are by commit."""
    branch = source.revision or 'main'
    file = folder.parents[1] / 'refs' / branch
    if branch == folder.name or (file.is_file() and file.read_text() == folder.name):
        return
    try:
        with whole(file) as temporary:
            temporary.write_text(folder.name)
    except OSError:
        pass                                 # a cache that others fill and we only read; all files are there


def in_cache(source, revision, patterns):
    """The folder of the cache that holds these files of a revision -> Path, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    try:
        return Path(snapshot_download(source.name, revision=revision or None, repo_type=source.kind,
                                      allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):        # ValueError: the id cannot be one
        return None


# ---- errors --------------------------------------------------------------------------------------

def is_offline():
    """Was the library told not to use the network?"""
    from huggingface_hub import constants
    return constants.HF_HUB_OFFLINE


def status_of(error):
    """The number of an answer that was an error, such as 404; 0: there was no answer."""
    return getattr(getattr(error, 'response', None), 'status_code', 0)


def explain(error, source):
    """An error of huggingface_hub, or of what it is built on -> one line that says what to do."""
    from huggingface_hub import constants, errors

    # The library says "not in the cache" where the reason is that it could not ask.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = status_of(error)
    what = 'model' if source.kind == 'model' else 'data set'
    cache = constants.HF_HUB_CACHE
    fetch = f'fetch it where there is a network (`{source.command()}`), and set the same HF_HOME'

    if isinstance(error, errors.GatedRepoError):
        return (f'{source}: a gated {what}; ask for access at {source.address()}, then set HF_TOKEN to a '
                f'token of yours ({TOKENS})')
    if isinstance(error, errors.RevisionNotFoundError):
        return (f'{source}: the {what} has no branch, tag or commit {source.revision or "main"!r}; look at '
                f'{source.address()}/commits/main')
    if status == 401 and 'credentials' in str(error):
        return (f'{source}: the hub does not know the token that was sent (401); it is wrong or has expired: '
                f'set HF_TOKEN to a new one ({TOKENS})')
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return (f'{source}: no such folder, and no such {what} on the hub, or a private one; check the '
                f'spelling, and for a private one set HF_TOKEN ({TOKENS})')
    if status == 429:
        return (f'{source}: the hub limits how much may be asked (429){wait_time(error)}; wait, or set '
                'HF_TOKEN, which raises the limit; HF_HUB_OFFLINE=1 asks nothing')
    if status >= 500:
        return f'{source}: the hub is out of order ({status}); try again later, or with HF_HUB_OFFLINE=1'
    if status:
        return f'{source}: the hub refuses it ({status}: {first_line(error)}); look at {source.address()}'
    return explain_without_answer(error, source, cache, fetch)


def explain_without_answer(error, source, cache, fetch):
    """`explain` for errors that are no answer of the hub: the network, the disk, the cache."""
    from huggingface_hub import errors
    code = getattr(error, 'errno', None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f'{source}: HF_HUB_OFFLINE is set, and the cache ({cache}) does not have all of it; {fetch}'
    if code in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in str(error):
        return (f'{source}: the disk is full ({cache}); make room, or set HF_HOME to a folder on a larger '
                'disk')
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (f'{source}: {getattr(error, "filename", None) or cache} cannot be written; set HF_HOME to a '
                'folder of yours')
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f'{source}: the cache ({cache}) does not have all of it; {fetch}'
    if isinstance(error, errors.HFValidationError):
        return f'{source}: not a hub id ({first_line(error)}); check the spelling'
    return (f'{source}: no connection to the hub, or it broke off ({type(error).__name__}: '
            f'{first_line(error)}); start again, whole files are kept; or {fetch} and HF_HUB_OFFLINE=1')


def wait_time(error):
    """', for another 55 s' where an answer says so, else ''."""
    headers = error.response.headers
    found = re.search(r't=(\d+)', headers.get('ratelimit', ''))
    found = found or re.fullmatch(r'(\d+)', headers.get('retry-after', ''))
    return f', for another {found[1]} s' if found else ''


def first_line(error):
    """The first line of an error's text, cut."""
    lines = str(error).strip().splitlines() or ['']
    return cut(lines[0], 60)
