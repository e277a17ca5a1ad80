"""
Publish the model of a run on the Hugging Face hub, with a model card that says how it was made.

    python -m studies.publish out/toy/last owner/name --dry-run    print card and files, upload nothing
    python -m studies.publish out/toy/last owner/name              or out/toy/best, out/toy/ckpt-000040/model
    python -m studies.publish out/toy/last owner/name --private    for you and your organisation alone

It needs a token that may write: HF_TOKEN. A repository that exists gets a new commit, in which README.md is
this card, and files of another model that were in it are deleted.

The card is written from what lies beside the model: the checkpoint's config and log, and starts.jsonl. It is
public, so folders of this computer are named by their last part alone, in the card and in the JSON files of
the model. Texts of others, such as the name of a problem set, are escaped, so that they are no markup.

Simpler than usual: no templates and no tracker. It does not publish the checkpoint's state for resuming, the
answers, or a model that no run here has made. The licence is taken from the card of the base model, and is
left out where that says nothing.
"""
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from configs import default
from extensions import several_teachers
from formats.hub import TIMEOUT, TOKENS, HubId, explain, first_line, status_of
from formats.huggingface import files_along, member, read_config, tensor_files
from support.command_help import command_words
from support.files import read_json
from support.optimizer import ever_positive
from support.provenance import differences, lasting_starts, read_starts
from support.report import summary
from support.run_folder import log_rows
from support.runtime import UserError, printable, run, shown

TAGS = ['on-policy-distillation', 'representation-distillation', 'nanoOPRD']
PATH_KEYS = ('student', 'teacher', 'data', 'eval_data', 'bridge')        # may hold folders of this computer
NOT_TOLD = ('out_dir', 'toy_dir', 'dry_run', 'ranks')                    # where a run was, not what it was
WRITERS = {'student': 'The student answers the problems', 'teacher': 'The teacher answers the problems',
           'solution': 'The answers are the solutions of the problems'}
MAIN_KEYS = ('loss_average', 'steps', 'prompts_per_step', 'n', 'max_new_tokens', 'temperature', 'lr',
             'schedule', 'warmup', 'seed')
# What a loader may read, by endings.
OF_A_MODEL = ('.safetensors', '.json', '.jinja', 'vocab.txt', 'merges.txt', '.tiktoken')


# ---- what there is to tell -----------------------------------------------------------------------

@dataclass
class Made:
    """A model, and how it was made."""
    folder: Path                # of the model
    step: int                   # after which it was saved
    config: dict                # of the run at that step
    scores: dict                # {'student': {'avg@16': ...}, 'teacher': ..., 'distilled': ...}
    starts: list                # rows of starts.jsonl that led to this step

    @property
    def commits(self):
        """What came from the hub: {id: its commit}."""
        found = {}
        for start in self.starts:
            found |= start.get('commits', {})
        return found


def read_run(folder):
    """A checkpoint's model folder -> Made. A UserError if it is none."""
    folder = Path(folder)
    if not (folder / 'config.json').is_file() or not (folder.resolve().parent / 'resume.json').is_file():
        raise UserError(f'{folder}: not the model of a checkpoint; give last or best of a run, such as '
                        'out/toy/last')
    checkpoint = folder.resolve().parent
    read_config(folder)

    # The config and the log as they were when the checkpoint was written: out/ may have gone on.
    record = read_json(checkpoint / 'resume.json')
    config = record.get('config')
    step = record.get('step')
    if not isinstance(config, dict) or type(step) is not int:
        raise UserError(f'{checkpoint}/resume.json: damaged; publish another checkpoint')
    scores = summary(log_rows(checkpoint / 'log.jsonl'))
    starts = [start for start in lasting_starts(read_starts(checkpoint.parent)) if start['step'] < step]
    return Made(folder, step, default | config, scores, starts)


def files_to_publish(folder):
    """{name: a Path, or the bytes of a JSON file without folders of this computer}."""
    names = ['config.json', *sorted({file.name for file in tensor_files(folder).values()})]
    if (folder / 'model.safetensors.index.json').exists():
        names.append('model.safetensors.index.json')
    names += [file.name for file in files_along(folder)]
    files = {}
    for name in names:
        files[name] = member(folder, name)
        if name.endswith('config.json'):     # also generation_ and tokenizer_config.json
            contents = without_folders(read_json(files[name]))
            files[name] = (json.dumps(contents, indent=2, ensure_ascii=False) + '\n').encode()
    return files


def without_folders(value):
    """JSON data in which every text that is a path of some computer is its last part: /home/me/model,
    ~/my/model, ../my/model and C:\\my\\model become 'model', while owner/model may be an id of the hub."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    path = r'(\.{0,2}/|~[^/\n]*/|[A-Za-z]:[\\/])[^\n]*[\\/][^\n]+'
    if isinstance(value, str) and re.fullmatch(path, value):
        return re.split(r'[\\/]', value.rstrip('\\/'))[-1]
    return value


def told(key, value, commits, pinned=False):
    """The value of a config key as the card tells it: an id of the hub as it is, a folder by its last part.
    pinned: an id gets its commit, owner/name@commit."""
    if key not in PATH_KEYS or not isinstance(value, str):
        return without_folders(value)
    parts = []
    for part in value.split(','):            # eval_data may name several sets
        commit = commits.get(f'datasets/{part}' if key in ('data', 'eval_data') else part)
        if commit is None:
            part = part.rstrip('/').split('/')[-1]
        elif pinned and '@' not in part:
            part = f'{part}@{commit}'
        parts.append(part)
    return ','.join(parts)


def licence_of(made):
    """The licence fields of the base model's card, {} if it says nothing or cannot be asked."""
    from huggingface_hub import HfApi
    base = made.config.get('student')
    if base not in made.commits:
        return {}
    name = base.split('@')[0]
    try:
        data = HfApi().model_info(name, revision=made.commits[base], timeout=TIMEOUT).card_data or {}
    except Exception as error:               # the library lets the errors of its network libraries through
        print(f'  note: {name}: its card cannot be read ({type(error).__name__}); add the licence to yours '
              'by hand', flush=True)
        return {}
    fields = {}
    for key in ('license', 'license_name', 'license_link'):
        if isinstance(data.get(key), str):
            fields[key] = data.get(key)
    link = fields.get('license_link', 'https://')
    if not link.startswith('https://'):      # a file of the base model's repository
        fields['license_link'] = f'https://huggingface.co/{name}/blob/main/{link}'
    return fields


# ---- the card ------------------------------------------------------------------------------------

def escape(text):
    """A text of somebody else as Markdown that shows it and does nothing else."""
    line = ' '.join(printable(str(text)).split())
    return re.sub(r'([\\`*_{}\[\]()<>#!|~&$@:])', r'\\\1', line)


def fenced(language, text):
    """A block of code. The fence is longer than any row of backticks in the text."""
    longest = max(map(len, re.findall('`+', text)), default=0)
    fence = '`' * max(3, longest + 1)
    return f'{fence}{language}\n{printable(text)}\n{fence}'


def markdown_table(rows):
    """Rows of texts, the first of them the head -> a table."""
    lines = [f'| {" | ".join(row)} |' for row in rows]
    lines.insert(1, '|' + '---|' * len(rows[0]))
    return '\n'.join(lines)


def card(made, repo, licence):
    """-> the text of README.md: metadata as YAML, then what a reader wants to know."""
    from huggingface_hub import ModelCardData
    cfg = made.config
    commits = made.commits
    on_policy = cfg['answers_by'] == 'student'
    tags = TAGS if on_policy else [tag for tag in TAGS if tag != 'on-policy-distillation']
    metadata = {'library_name': 'transformers', 'pipeline_tag': 'text-generation', 'tags': tags} | licence
    if cfg['student'] in commits:
        metadata |= {'base_model': cfg['student'].split('@')[0], 'base_model_relation': 'finetune'}
    if f'datasets/{cfg["data"]}' in commits:
        metadata['datasets'] = [cfg['data'].split('@')[0]]

    student = escape(told('student', cfg['student'], commits))
    parts = [
        f'---\n{ModelCardData(**metadata).to_yaml()}\n---',
        f'# {escape(repo.split("/")[-1])}',
        f'A student ({student}) after {made.step} of {cfg["steps"]} steps of {"on-policy " * on_policy}'
        f'{source_text(made)}. {WRITERS[cfg["answers_by"]]}, and the student learns at the positions of '
        f'these answers: {objective_text(cfg)}. Made with nanoOPRD, an implementation of arXiv 2606.06021.',
        '## Sources', markdown_table(source_rows(made)),
        '## Scores', *score_parts(made),
        '## Training', markdown_table(setting_rows(made)), *start_lines(made),
        repeat_sentence(made), fenced('bash', command(made)),
        'The whole config:', fenced('json', json.dumps(whole_config(made), indent=2)),
        '## Use', *use_parts(repo),
    ]
    return '\n\n'.join(parts) + '\n'


def source_text(made):
    """From whom the student learned, in words."""
    cfg = made.config
    names = [escape(told('teacher', name, made.commits)) for name in teachers_of(cfg)]
    if not any(ever_positive(cfg[f'{term}_weight']) for term in ('oprd', 'opd', 'attention')):
        return 'training with rewards'
    if names == ['self']:
        sees = ', which sees a solution' if cfg['teacher_sees'] == 'solution' else ''
        return f'distillation from itself{sees}'
    if len(names) == 1:
        return f'distillation from a teacher ({names[0]})'
    return f'distillation from {len(names)} teachers ({", ".join(names)})'


def teachers_of(cfg):
    """The names of a run's teachers."""
    return [pair['teacher'] for pair in several_teachers.configs(cfg)]


def objective_text(cfg):
    """What was minimised, in words."""
    terms = []
    if cfg['oprd_weight']:
        how = 'through a linear bridge' if cfg['bridge'] else 'number by number'
        terms.append(f'hidden states approach those of the teacher, {how} (Eq. 6)')
    if cfg['opd_weight'] and cfg['opd'] == 'supervised':
        terms.append('the tokens of the answers become likelier')
    elif cfg['opd_weight']:
        terms.append('distributions over what comes next approach those of the teacher (Eqs. 3 to 5)')
    if cfg['attention_weight']:
        terms.append('attention maps approach those of the teacher')
    if cfg['reward_weight']:
        terms.append('tokens of answers that are right become likelier than those of wrong ones')
    return ', and '.join(terms)


def source_rows(made):
    """What the run was made of -> rows of a table: models and problems, and the commit of each of the hub."""
    cfg = made.config
    rows = [['', 'name', 'commit on the hub']]
    names = {'student': 'student (base model)', 'teacher': 'teacher', 'data': 'training problems',
             'eval_data': 'held-out problems'}
    for key, what in names.items():
        parts = teachers_of(cfg) if key == 'teacher' else [cfg[key]] * bool(cfg[key])
        for part in parts:
            name = told(key, part, made.commits)
            commit = made.commits.get(f'datasets/{name}' if key in ('data', 'eval_data') else name, '')
            rows.append([what, escape(name), commit or 'not from the hub'])

    # Sets that are given by a short name have another one on the hub.
    for source, commit in made.commits.items():
        if not any(commit in row for row in rows):
            rows.append(['', escape(source), commit])
    return rows


def score_parts(made):
    """The scores of the untrained student, of this model and of the teacher -> a table and its legend."""
    names = {'student': 'student before', 'distilled': f'this model, step {made.step}', 'teacher': 'teacher'}
    names |= {side: side for side in made.scores if re.fullmatch('teacher[0-9]+', side)}     # of several
    rows = {}
    for side, name in names.items():
        if made.scores.get(side):
            rows[name] = made.scores[side]
    if not rows:
        return ['Not evaluated.']
    metrics = list(dict.fromkeys(metric for scores in rows.values() for metric in scores))
    table = [['', *map(escape, metrics)]]
    for name, scores in rows.items():
        cells = [f'{scores[metric]:.1f}' if scores.get(metric) is not None else '' for metric in metrics]
        table.append([name, *cells])

    # How many problems: what the last start has counted.
    text = ('avg@n: share of right answers, n for each problem, in per cent. best@n: share of problems with '
            'a right answer among the n. len: tokens of an answer.')
    counts = made.starts[-1].get('problems', {}).get('eval_data', {}) if made.starts else {}
    for name, count in counts.items():
        text += f' {escape(name)}: {count} problems.'
    if not made.scores.get('distilled'):
        text += f' The model of step {made.step} was not evaluated.'
    return [markdown_table(table), text]


def setting_rows(made):
    """The main keys of the config -> rows of a table. Keys of a term that was not in the loss stay out."""
    cfg = made.config
    keys = ['oprd_weight']
    if cfg['oprd_weight']:
        keys += ['bridge'] if cfg['bridge'] else ['rep_loss']
        keys += ['layers', 'layer_map']
    keys += ['opd_weight']
    if cfg['opd_weight']:
        keys += ['opd', 'kl_direction']
    for term in ('reward', 'attention'):
        if cfg[f'{term}_weight']:
            keys += [key for key in default if key.startswith(f'{term}_')]
    for key in ('teacher_share', 'teacher_sees', 'teacher_every', 'teacher_decay'):
        if cfg[key] != default[key]:
            keys.append(key)
    keys += ['positions']
    if cfg['positions'] in cfg:              # a rule with a size has a key of its own name
        keys += [cfg['positions']]
    keys += MAIN_KEYS

    rows = [['key', 'value']]
    for key in keys:
        rows.append([f'`{key}`', escape(told(key, cfg[key], made.commits))])
    count = made.starts[-1].get('problems', {}).get('data') if made.starts else None
    if count:
        rows.append(['training problems', str(count)])
    return rows


def start_lines(made):
    """Code and libraries, and what changed when the run was started again -> paragraphs."""
    if not made.starts:
        return ['The run does not say what code made it.']
    versions = made.starts[0]['versions']
    listed = ', '.join(f'{escape(key)} {escape(value)}' for key, value in versions.items())
    lines = [f'Code and libraries (git: the revision, "dirty" if files were changed): {listed}.']
    for before, now in zip(made.starts, made.starts[1:], strict=False):
        changes = [escape(line) for line in differences(before, now)]
        for key, value in now.get('config', {}).items():
            old = before.get('config', {}).get(key)
            if key in default and key not in NOT_TOLD and value != old:
                changes.append(f'`{key}` was {escape(told(key, old, made.commits))}, and is '
                               f'{escape(told(key, value, made.commits))}')
        if changes:
            lines.append(f'Started again after step {now["step"]}, from where on: {"; ".join(changes)}.')
    return lines


def repeat_sentence(made):
    """What stands before the command."""
    ranks = made.starts[0]['versions'].get('ranks', 1) if made.starts else 1
    where = '' if ranks == 1 else f' (it ran on {ranks} ranks, with torchrun)'
    return f'To train it again{where}:'


def command(made):
    """The command that trains such a model again. Models and problems of the hub have their commit."""
    words = ['python distill.py']
    for key, value in made.config.items():
        if key not in NOT_TOLD and value != default.get(key):
            words.append(shlex.quote(f'{key}={told(key, value, made.commits, pinned=True)}'))
    return ' \\\n    '.join(words)


def whole_config(made):
    """The config without where the run was."""
    config = {}
    for key, value in made.config.items():
        if key not in NOT_TOLD:
            config[key] = told(key, value, made.commits)
    return config


def use_parts(repo):
    """How to load it in two libraries."""
    python = (f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
              f"tokenizer = AutoTokenizer.from_pretrained('{repo}')\n"
              f"model = AutoModelForCausalLM.from_pretrained('{repo}', dtype='auto')\n"
              "messages = [{'role': 'user', 'content': 'What is 6 times 7?'}]\n"
              "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True,\n"
              "                                       return_tensors='pt', return_dict=True)\n"
              "answer = model.generate(**inputs, max_new_tokens=1024)\n"
              "print(tokenizer.decode(answer[0]))")
    return [fenced('python', python), fenced('bash', f'vllm serve {repo}')]


# ---- the hub -------------------------------------------------------------------------------------

def upload(files, text, repo, private, message):
    """Make the repository if it is not there, and commit the files -> the address of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    if not get_token():
        raise UserError(f'{repo}: no token; set HF_TOKEN to one that may write ({TOKENS})')
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.repo_info(repo, timeout=TIMEOUT)
        if private and not info.private:
            raise UserError(f'{repo}: exists on the hub and is public; make it private in its settings, or '
                            'choose another name')
        operations = [CommitOperationAdd('README.md', text.encode())]
        for name, file in files.items():
            operations.append(CommitOperationAdd(name, file))

        # Weights of another model in more files, with their index, would be loaded in place of these.
        for sibling in info.siblings or ():
            name = sibling.rfilename
            if '/' not in name and name.endswith(OF_A_MODEL) and name not in files:
                operations.append(CommitOperationDelete(name))
        return api.create_commit(repo, operations, commit_message=message).commit_url
    except UserError:
        raise
    except Exception as error:               # the library lets the errors of its network libraries through
        raise UserError(explain_upload(error, repo)) from None


def explain_upload(error, repo):
    """An error while uploading -> one line that says what to do."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__              # of one of several files
    status = status_of(error)
    owner = repo.split('/')[0]
    if status == 401:
        return (f'{repo}: the hub does not know the token that was sent (401); set HF_TOKEN to one that may '
                f'write ({TOKENS})')
    if status in (403, 404):
        return (f'{repo}: your token may not write there ({status}); take one with write access to '
                f'{owner} ({TOKENS})')
    if status in (429, 500, 502, 503, 504):
        return explain(error, HubId(repo, '', 'model'))
    if isinstance(error, ValueError):
        return f'{repo}: the hub refuses it ({" ".join(str(error).split())[:150]})'
    return (f'{repo}: the upload broke off ({type(error).__name__}: {first_line(error)}); start it again, '
            'files that have arrived are not sent again')


# ---- the script ----------------------------------------------------------------------------------

def settings(argv=None):
    """The command line -> (model folder, repository, {switch: is it given?})."""
    argv = command_words('studies/publish.py') if argv is None else argv
    switches = {switch: switch in argv for switch in ('--private', '--dry-run')}
    words = [word for word in argv if word not in switches]
    if len(words) != 2 or words[0].startswith('-') or words[1].startswith('-'):
        raise UserError(f'{shown(" ".join(words))}: wants a model folder and owner/name, then --private or '
                        '--dry-run; see --help')
    if not re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', words[1], re.ASCII):
        raise UserError(f'{shown(words[1])}: not the name of a repository; write owner/name')
    return words[0], words[1], switches


def main(given):
    folder, repo, switches = given
    made = read_run(folder)
    files = files_to_publish(made.folder)
    text = card(made, repo, licence_of(made))
    if switches['--dry-run']:
        print(printable(text))
        for name, file in {'README.md': text.encode(), **files}.items():
            size = len(file) if isinstance(file, bytes) else file.stat().st_size
            print(f'{size:>16,} bytes  {name}')
        print(f'would go to https://huggingface.co/{repo}; nothing was uploaded')
        return
    address = upload(files, text, repo, switches['--private'], f'Student after step {made.step}')
    print(f'{repo}: {len(files) + 1} files; {address}')


if __name__ == '__main__':
    run(main, settings)
