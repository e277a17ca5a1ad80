"""load_config: every key known, typed, in range and read by the script, from any directory. What --help says, and hints."""
import ast
import json
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import argv

import bridge
import distill
import eval_math
import minimal
from configs import check, checks, default, free, load_config, read_argument, reads
from studies import toy
from support.command_help import command, header, key_lines
from support.key_hints import SAME, SENTENCES, hint
from support.runtime import ROOT, UserError


def test_command_line_forms(tmp_path, monkeypatch):
    """key=value, --key=value, a bare switch, and a config found from another folder."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config(['config/toy.py', 'lr=1e-3', '--steps=7', '--dry-run', 'layers=[1,3]', 'out_dir=1'])
    assert (cfg['lr'], cfg['steps'], cfg['dry_run'], cfg['layers'], cfg['out_dir']) == (1e-3, 7, True, [1, 3], '1')
    assert cfg['student'] == 'toy' and set(cfg) == set(default)


def test_defaults_pass_their_own_checks_and_checks_name_real_keys():
    assert check(dict(default), 'default') == default
    assert set(checks) <= set(default) and set(free) <= set(default)


def test_every_key_is_documented():
    """A key without a comment would be a key that --help does not explain."""
    text = (ROOT / 'configs/default.py').read_text().split('config = dict(')[1].split('\n)\n')[0]
    keys = [line for line in text.splitlines() if line.strip() and not line.strip().startswith('#')]
    assert len(keys) == len(default)
    assert [k for k in keys if '#' not in k] == ['    beta2=0.999,', '    toy_teacher_lr=1.5e-3,']


CONFIGS = [p.stem for p in (ROOT / 'configs').glob('*.py') if 'config = ' in p.read_text()]


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_file_loads(name):
    """The paper's experiments cannot be run here; their files can at least be read and checked."""
    assert load_config([f'config/{name}.py'])['out_dir'].startswith('out/')


def test_every_config_file_has_a_folder_of_its_own():
    """A copied file that kept its out_dir would be refused as another run's config, hours later perhaps."""
    folders = [load_config([f'configs/{name}.py'])['out_dir'] for name in CONFIGS]
    assert len(set(folders)) == len(CONFIGS) > 5


def test_help_prints_the_keys(capsys):
    """Of a script those that it reads, each with its comment, and no others; without a script all of them."""
    for script in ('', *reads):
        with pytest.raises(SystemExit) as e:
            load_config(['--help', 'nope=3'], script)
        assert e.value.code == 0
        printed = capsys.readouterr().out
        shown = re.findall(r'^(\w+)=', printed, re.MULTILINE)
        assert shown == [key for key in default if not script or key in reads[script]]
        assert script == '' or printed.startswith(f'usage: {command(script)} ')
        assert printed.count('\n') < 75 + len(shown) * 1.6 and max(map(len, printed.splitlines())) <= 110


def test_help_shows_a_key_with_its_comment_under_its_heading():
    """The first key of a section was shown without the heading, or the last one with that of the next section."""
    assert key_lines(['min_lr', 'adam_eps', 'dtype']) == [
        '# run',
        "dtype='auto',               # of forwards: 'auto' (bfloat16 on CUDA, else float32), 'bfloat16', 'float32';",
        '                            # weights, gradients and optimizer state are float32', '',
        '# update: AdamW', 'min_lr=0.0,                 # where the schedule ends, as a share of lr',
        'adam_eps=1e-8,              # added to the root mean square of a gradient; gradients of nmse lie below it']


# ---- which script reads which key --------------------------------------------------------------------------

MAINS = {'distill.py': distill.main, 'bridge.py': bridge.main, 'eval_math.py': eval_math.main, 'minimal.py': minimal.main,
         'studies/toy.py': toy.main}

# Keys that a script looks at, and that change nothing there: on its command line they are refused all the same.
WITHOUT_EFFECT = {
    'bridge.py': {
        'out_dir': 'must be another folder than bridge=', 'eval_data': "toy.prepare fills in every 'toy'; set to '' here",
        'n': 'one answer to each problem (preflight_bridge)', 'prompts_per_step': 'its answers at once are eval_rows',
        **dict.fromkeys(('opd_weight', 'reward_weight', 'attention_weight', 'attention_layers'),
                        'a Plan has it; bridge_phases does not ask'), 'eval_n': 'work_of an evaluation of no problems',
        'eval_max_new_tokens': 'likewise', 'teacher_shard': 'refused: ranks read different numbers of micro-batches',
        'steps': 'the unit of a progress bar', 'shard_ranks': 'both models are whole on each rank'},
    'eval_math.py': {
        'data': "toy.prepare fills in every 'toy'; set to '' here",
        'max_new_tokens': 'what eval_max_new_tokens=0 means; on its command line the latter says it'},
    'minimal.py': {
        'timeout': 'a parameter of start()', 'eval_data': "toy.prepare fills in every 'toy'", 'dry_run': 'refused: it has none', 'dtype': 'a key of config.json',
        'answers_by': 'refused: the student answers', 'reward_weight': 'refused: it has one term', 'attention_weight': 'likewise',
        **dict.fromkeys(('last_k', 'first_k', 'last_frac', 'first_frac'), 'rules of step.POSITIONS; it has one'),
        **dict.fromkeys(('opd', 'opd_future', 'opd_baseline', 'position_offset', 'bridge', 'temperature', 'top_k', 'top_p',
                         'teacher_ids', 'kl_direction', 'opd_tail', 'opd_k', 'opd_support', 'student_temperature'),
                        'check_objective compares it with other keys')},
    'studies/toy.py': {'timeout': 'a parameter of start()'},
}


@cache
def names_of(module):
    """What the names in a module of this project are: {name: a node of its syntax tree, or (module, name)}; {} of others."""
    path = ROOT / module.replace('.', '/')
    file = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
    if not file.exists():
        return {}
    tree = ast.parse(file.read_text())
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return names


def keys_named(script):
    """The keys that stand in quotes in a script's main(), or in any function, class or constant of this project that it
    can reach by name."""
    waiting = [(script.removesuffix('.py').replace('/', '.'), 'main')]
    seen = set()
    found = set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen or module.startswith('configs'):
            continue
        seen.add((module, name))
        names = names_of(module)
        node = names.get(name)
        if isinstance(node, tuple):
            waiting.append(node)
        for part in ast.walk(node) if isinstance(node, ast.AST) else ():
            if isinstance(part, ast.Name):
                waiting.append((module, part.id))
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                # toy.prepare, after `from studies import toy`
                origin = names.get(part.value.id)
                waiting.append(('.'.join(origin) if isinstance(origin, tuple) else '', part.attr))
            elif isinstance(part, ast.Constant):
                found.add(part.value)
            elif isinstance(part, ast.Subscript) and isinstance(part.slice, ast.JoinedStr):
                # cfg[f'toy_{name}_steps']
                texts = [re.escape(text.value) if isinstance(text, ast.Constant) else r'\w+' for text in part.slice.values]
                found |= {key for key in default if re.fullmatch(''.join(texts), key)}
    return found & set(default)


@pytest.mark.parametrize('script', reads)
def test_a_script_reads_the_keys_that_it_says(script):
    """A new key that bridge.py reads would be refused on its command line until it is named there; one that no code reads
    any more would be accepted and ignored."""
    named = keys_named(script)
    declared = set(reads[script])
    silent = sorted(declared - named)
    assert not silent, f"{script} does not read {silent}: take it out of reads['{script}'] in configs/default.py"
    new = sorted(named - declared - set(WITHOUT_EFFECT.get(script, ())))
    assert not new, f"{script} reads {new}: name it in reads['{script}'] in configs/default.py"
    assert set(WITHOUT_EFFECT.get(script, ())) <= named - declared, 'an entry of WITHOUT_EFFECT is not needed any more'


class Recording(dict):
    """A config that notes which keys are read; so do those that are made of it."""
    def __init__(self, values, read):
        super().__init__(values)
        self.read = read

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def __or__(self, other):
        return Recording(dict(self) | other, self.read)


@pytest.mark.parametrize('script, keys', [
    ('distill.py', dict(steps=1, opd_weight=1, opd='full')), ('distill.py', dict(steps=1, dry_run=True)),
    ('bridge.py', dict(bridge='b', bridge_prompts=8)), ('eval_math.py', dict(eval_n=1)),
    ('minimal.py', dict(steps=1, positions='all')), ('studies/toy.py', {})])
def test_what_a_run_reads_is_among_the_keys_that_were_found(toy_dir, tmp_path, monkeypatch, script, keys):
    """The search through the sources, held against real runs: a way to reach a function that it does not follow would hide
    keys from the test above."""
    monkeypatch.chdir(tmp_path)
    read = set()
    MAINS[script](Recording(load_config(argv(toy_dir, 'out', **keys)), read))
    assert {'seed', 'student', 'toy_ops'} <= read <= keys_named(script)


@pytest.mark.parametrize('script, given, says', [
    ('eval_math.py', 'n=8', 'eval_math.py does not read n=; did you mean eval_n=?'),
    ('eval_math.py', '--regrade=5', "regrade='5'"),
    ('bridge.py', 'lr=1', 'bridge.py does not read lr=; did you mean bridge_lr=?'),
    ('bridge.py', 'eval_temperature=1', 'bridge.py does not read eval_temperature=; did you mean temperature=?'),
    ('bridge.py', '--steps=1', 'bridge.py does not read steps=, a key of distill.py and minimal.py; leave it out, or see --help'),
    ('minimal.py', '--dry-run', 'minimal.py does not read dry_run=, a key of distill.py and bridge.py and eval_math.py'),
    ('distill.py', '--regrade', 'distill.py does not read regrade=, a key of eval_math.py;'),
    ('distill.py', 'bridge_ridge=1', 'distill.py does not read bridge_ridge=, a key of bridge.py;'),
    ('studies/toy.py', 'ranks=2', 'studies/toy.py does not read ranks=, a key of distill.py and bridge.py;'),
])
def test_a_key_that_a_script_does_not_read_is_refused(script, given, says):
    """It was ignored: bridge.py steps=1 took as long as ever, and eval_math.py had an n of its own."""
    with pytest.raises(UserError) as error:
        load_config(['configs/toy.py', given], script)
    assert says.replace("'5'", '5') in str(error.value) and '\n' not in str(error.value)


def test_a_config_file_may_hold_keys_of_other_scripts(tmp_path):
    """One file serves distill.py and eval_math.py."""
    file = tmp_path / 'mine.py'
    file.write_text('config = dict(student="x", lr=1e-3, bridge_ridge=0.5, ranks=0)')
    for script in reads:
        assert load_config([str(file)], script)['bridge_ridge'] == 0.5


COMMAND = re.compile(r"(?:python|torchrun [^\n`|]*?) (-m studies\.toy|(?:distill|bridge|eval_math|minimal)\.py)( [^\n`|;&]*)?")
WRITTEN = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'CONTRIBUTING.md', *(ROOT / name for name in reads),
           *sorted((ROOT / 'configs').glob('*.py'))]


def commands_in(text):
    """(script, words) of each command line in a document or a header; what follows two blanks is a comment."""
    for script, rest in COMMAND.findall(re.sub(r' *\\\n *', ' ', text)):
        script = 'studies/toy.py' if script.startswith('-m') else script
        words = re.split('  +', rest.strip())[0].replace("'", '').split()
        yield script, [word for word in words if '=' in word or word.startswith('--')]


@pytest.mark.parametrize('file', WRITTEN, ids=lambda file: file.name)
def test_commands_in_documents_are_accepted(file):
    """A command that was copied from a page ended with "does not read n="."""
    for script, words in commands_in(file.read_text()):
        for word in words:
            read_argument(word.replace('model=', 'student='), script)


def test_commands_in_documents_are_found():
    """The test above checks what it finds."""
    text = """`python bridge.py a=1` and
    torchrun --nproc_per_node=8 distill.py configs/toy.py b=2 \\
        c=3      a comment, d=4
    python -m studies.toy && python eval_math.py ... --regrade    more"""
    assert list(commands_in(text)) == [('bridge.py', ['a=1']), ('distill.py', ['b=2', 'c=3']), ('studies/toy.py', []),
                                       ('eval_math.py', ['--regrade'])]
    assert sum(len(list(commands_in(file.read_text()))) for file in WRITTEN) > 30


# ---- hints -------------------------------------------------------------------------------------------------

def test_hints_name_keys_that_exist():
    """A hint that leads to the next error is worse than none."""
    assert set(SAME.values()) <= set(default) and not {*SAME, *SENTENCES} & set(default)
    assert not set(SAME) & set(SENTENCES)
    for name, sentence in SENTENCES.items():
        assert set(re.findall(r'(\w+)=', sentence)) <= set(default) | {'nproc_per_node'}, name


@pytest.mark.parametrize('name, says', [
    ('learning_rate', "did you mean 'lr'"), ('num_generations', "did you mean 'n'"), ('rollout.n', "did you mean 'n'"),
    ('max_completion_length', "did you mean 'max_new_tokens'"), ('batch_size', "did you mean 'prompts_per_step'"),
    ('data.train_batch_size', "did you mean 'prompts_per_step'"), ('data.train_files', "did you mean 'data'"),
    ('actor_rollout_ref.actor.optim.lr', "did you mean 'lr'"), ('teacher_model_name_or_path', "did you mean 'teacher'"),
    ('num_train_epochs', 'give steps='), ('bf16', 'give dtype=bfloat16'), ('lmbda', 'there is no such key'),
    ('per_device_train_batch_size', 'give prompts_per_step='), ('beta', 'give oprd_weight='), ('max_iters', "mean 'steps'"),
    ('learning_rat', "did you mean 'lr'"), ('gradient-checkpointing', "did you mean 'checkpointing'"), ('STEPS', "mean 'steps'"),
    ('token_budgets', "did you mean 'token_budget'"), ('report_to', "mean 'report'"), ('wandb_log', 'give report=wandb'), ('zzz', 'see --help for all keys'), ('a.', 'see --help'),
])
def test_names_of_other_trainers_get_a_hint(name, says):
    assert says in hint(name, default)
    with pytest.raises(UserError, match=re.escape(says)):
        load_config([f'--{name}=1'], 'distill.py')


@pytest.mark.parametrize('script, name, says', [
    ('eval_math.py', 'num_generations', "did you mean 'eval_n'?"), ('eval_math.py', 'max_tokens', "did you mean 'eval_max_new_tokens'?"),
    ('bridge.py', 'learning_rate', "did you mean 'bridge_lr'?"), ('eval_math.py', 'learning_rate', 'eval_math.py has no key for it'),
    ('bridge.py', 'num_train_epochs', 'bridge.py has no key for it'), ('minimal.py', 'wandb_log', 'minimal.py has no key for it'),
    ('eval_math.py', 'model_name_or_path', "did you mean 'student'?"), ('bridge.py', 'batch_size', 'bridge.py has no key for it'),
    ('eval_math.py', 'eval_m', "did you mean 'eval_n'?"), ('eval_math.py', 'lr', 'eval_math.py does not read lr='),
])
def test_a_hint_names_a_key_that_the_script_reads(script, name, says):
    """`eval_math.py num_generations=4` was sent to n=, which eval_math.py refuses."""
    for words in ([f'{name}=1'], [f'--{name}', '1']):
        with pytest.raises(UserError, match=re.escape(says)):
            load_config(words, script)


def test_no_hint_leads_to_a_key_that_the_script_refuses():
    for script, keys in reads.items():
        for name in (*SAME, *SENTENCES):
            says = hint(name, keys, script)
            offered = re.findall(r"did you mean '(\w+)'|(\w+)=", says)
            assert {one or two for one, two in offered} <= set(keys), (script, name, says)


@pytest.mark.parametrize('words, says', [
    (['--lr', '1e-3'], '--lr: not key=value, and not a switch; give lr=VALUE'),
    (['--learning_rate', '1e-3'], "--learning_rate: not key=value, and not a switch; did you mean 'lr'?"),
    (['--num_train_epochs', '3'], 'give steps=; a step takes'),
])
def test_an_option_with_a_blank_is_told_in_our_form(words, says):
    """The number was taken for a config file: "1e-3: no such config file"."""
    with pytest.raises(UserError, match=re.escape(says)):
        load_config(words, 'distill.py')


# ---- --help of every command -------------------------------------------------------------------------------

COMMANDS = [str(file.relative_to(ROOT)) for folder in ('.', 'studies') for file in sorted((ROOT / folder).glob('*.py'))
            if "__name__ == '__main__'" in file.read_text()]

# Runs each script with --help in a fork of one process that has imported them all -> JSON on its output: {script: [exit
# code, error output, help]}. At first the pipe is closed before anything is written.
HELP = """
import importlib, json, os, runpy, sys
for script in sys.argv[1:]:
    importlib.import_module(script[:-3].replace('/', '.'))
told = {}
for script in sys.argv[1:]:
    ends = []
    for closed in (True, False):
        (out, into), (err, into_err) = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            os.dup2(into, 1), os.dup2(into_err, 2)
            for end in (out, into, err, into_err):
                os.close(end)
            sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
            sys.argv = [script, '--help']
            code = 1
            try:
                runpy.run_path(script, run_name='__main__')
            except SystemExit as end:
                code = end.code or 0
                sys.stdout.flush()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(into), os.close(into_err)
        if closed:
            os.close(out)
        text = '' if closed else os.fdopen(out).read()
        ends += [os.fdopen(err).read(), text, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
    told[script] = ends
print(json.dumps(told))
"""


def test_every_command_has_a_help_of_its_own_that_fits_a_pipe():
    """All printed the same keys, figures had none, and `--help | head` was "Broken pipe" with exit code 2."""
    assert {*reads, 'studies/compare.py', 'studies/figures.py', 'studies/bench.py'} <= set(COMMANDS)
    done = subprocess.run([sys.executable, '-c', HELP, *COMMANDS], cwd=ROOT, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert set(told) == set(COMMANDS)
    for script, (err, _, code, err_open, text, code_open) in told.items():
        assert (err, code, err_open, code_open) == ('', 0, '', 0), script
        first_paragraph = header(script).split('\n\n')[0]
        commands = re.findall(rf'{re.escape(command(script))}\b', text)
        assert first_paragraph in text and len(commands) >= 1, script


@pytest.mark.parametrize('script', COMMANDS)
def test_every_command_goes_through_run(script):
    """support.runtime.run turns errors, a closed pipe and Ctrl-C into one line."""
    last = ast.parse((ROOT / script).read_text()).body[-1]
    assert isinstance(last, ast.If) and [ast.unparse(line).split('(')[0] for line in last.body] == ['run']


def test_a_config_may_build_on_another(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text("from configs.toy import config\nconfig = config | dict(lr=1)\n")
    cfg = load_config([str(file)])
    assert cfg['lr'] == 1.0 and isinstance(cfg['lr'], float) and cfg['beta2'] == 0.95


@pytest.mark.parametrize('args, says', [
    (['stepz=3'], "unknown key 'stepz'; did you mean 'steps'"),
    (['steps=1.5'], 'steps=1.5 is float, but steps is int'),
    (['steps=many'], "steps='many' is str"),
    (['n=True'], 'n=True is bool'),
    (['steps=0'], 'steps=0 is out of range; choose 1 to 1e+07'),
    (['temperature=-1'], 'out of range'),
    (['lr=nan'], "lr='nan' is str"),
    (['top_p=0'], 'out of range'),
    (['position_offset=2'], 'out of range'),
    (['warmup=1.01'], 'warmup=1.01 is out of range; choose 0 to 1'),
    (['beta1=0.99991'], 'out of range'),
    (['opd_weight=[[0,1],[0.5,1],[0.2,0]]'], 'ascending shares from 0 to 1'),
    (['opd_weight=[[0,1],[1.01,0]]'], 'ascending shares from 0 to 1'),
    (['oprd_weight=[[0,1],[0.5,-1]]'], 'give knots'),
    (['device=tpu'], "choose one of 'auto', 'cuda', 'cpu', 'mps'"),
    (['layers=first'], "choose one of 'all', 'last', 'even', 'odd', a list of numbers"),
    (['layers=[0]'], 'give a list of whole numbers from 1'),
    (['layers=[]'], 'give a list of whole numbers from 1'),
    (['--fast'], 'not key=value'),
    (['steps=1000000000000'], 'steps=1000000000000 is out of range; choose 1 to 1e+07'),
    (['n=10000000'], 'out of range; choose 1 to 10000'),
    (['temperature=1e999'], 'temperature=inf is out of range'),
    (['temperature=1e-300'], 'choose 0 (greedy), or 1e-3 and more'),
    (['lr=1' + '0' * 400], 'out of range; choose 0 to 10'),
    (['lr=-1' + '0' * 400], 'out of range; choose 0 to 10'),
    (['lr=1' + '0' * 100_000], 'is str, but lr is float'),
    (['steps=1' + '0' * 4000], 'out of range'),
    (['steps=0x1' + '0' * 9000], 'steps=a large int is out of range'),
    (['layers=' + '[' * 90 + ']' * 90], 'give a list of whole numbers'),
    (['layers=' + '[' * 50_000], "choose one of 'all'"),
    (['layers=[1' + ',1' * 1000 + ']'], 'give a list of whole numbers'),
    (['layers=[1' + '0' * 30 + ']'], 'give a list of whole numbers'),
    (['layers=[True]'], 'give a list of whole numbers'),
    (['oprd_weight=' + str([[0, 1]] * 1001)], 'give knots'),
    (['oprd_weight=[[0,1e300]]'], 'give knots'),
    (['oprd_weight=[[0,1],[1e999,1]]'], 'give knots'),
    (['oprd_weight=[[0,1],[1]]'], 'give knots'),
    (['steps=-' + '-' * 50_000 + '1'], 'is str, but steps is int'),
    (['data=a\0b'], 'no text in UTF-8'),
    (['out_dir=\udcff'], 'no text in UTF-8'),
    (['x' * 100_000 + '=1'], "unknown key 'xxx"),
    (['--' + 'x' * 100_000], 'not key=value'),
    (['configs/tooy.py'], 'did you mean configs/toy.py?'),
    (['configs/toy.py', 'configs/toy.py', 'x.py'], 'second config file'),
])
def test_bad_command_lines(args, says):
    with pytest.raises(UserError) as e:
        load_config(args)
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 280


def test_every_number_has_finite_bounds_that_hold_its_default():
    """Without an upper bound, steps=10**12 walked every step of a schedule before the first message, and
    temperature=1e999 made NaN of every logit."""
    for key, like in default.items():
        if type(like) in (int, float):
            low, high = checks[key][:2]
            assert low <= like <= high and abs(low) < 2**63 and high < 2**63, key


@pytest.mark.parametrize('key', [key for key, like in default.items() if type(like) in (int, float)])
def test_a_number_beyond_its_bounds_is_refused(key):
    """Each key by itself, whole numbers and fractions, NaN too: a bound that is compared the wrong way round lets NaN in."""
    low, high = checks[key][:2]
    kind = type(default[key])
    beyond = [low - 1, high + 1, 10**400, -10**400] + ([float('nan'), float('inf')] if kind is float else [])
    for value in beyond:
        with pytest.raises(UserError, match='is out of range; choose'):
            check({key: kind(value) if abs(value) < 1e300 else value}, 'here')
    for value in (low, high):
        assert check({key: kind(value)}, 'here')[key] == value


def test_the_ends_of_a_range_are_in_it():
    """A bound that is taken as open refuses top_p=1 or weight_decay=0, which are the defaults of many a recipe."""
    cfg = load_config(['warmup=1', 'min_lr=0', 'top_p=1', 'lr=10', 'oprd_weight=[[0,0],[0.5,0],[0.5,1],[1,1]]'])
    assert (cfg['warmup'], cfg['min_lr'], cfg['top_p'], cfg['lr']) == (1.0, 0.0, 1.0, 10.0) and len(cfg['oprd_weight']) == 4


@pytest.mark.parametrize('text, says', [
    ('config = 3', 'no dict called `config`'),
    ('config = {', 'SyntaxError'),
    ('from configs.default import config\nconfig = config | dict(lrr=1)', "unknown key 'lrr'"),
    ('import no_such_module', 'ModuleNotFoundError'),
    ('raise SystemExit(0)', 'SystemExit'),
    ('def again():\n    again()\nagain()', 'RecursionError'),
    ('raise ValueError("x\\n" * 9999)', 'ValueError: x x x'),
    ('config = {' + '[' * 3000, 'bad.py'),
    ('\x00\x01\x02', 'null bytes'),
    ('config = {3: 4}', 'unknown key 3'),
    ('config = {("steps",): 4}', "unknown key ('steps',)"),
    ('config = dict(steps=None)', 'steps=None is NoneType'),
    ('config = dict(layers=(1, 2))', 'layers=(1, 2) is tuple'),
    ('config = dict(lr=float("nan"))', 'lr=nan is out of range'),
    ('config = dict(lr=1 + 0j)', 'lr=(1+0j) is complex'),
    ('config = dict(data="a\\ud800")', 'no text in UTF-8'),
    ('x = []\nfor _ in range(99999): x = [x]\nconfig = dict(layers=x)', 'give a list of whole numbers'),
])
def test_bad_config_files(tmp_path, text, says):
    (tmp_path / 'bad.py').write_text(text)
    with pytest.raises(UserError) as e:
        load_config([str(tmp_path / 'bad.py')])
    assert says in str(e.value) and 'bad.py' in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 280


def test_whatever_a_config_file_does_is_one_error(tmp_path, recwarn):
    """A warning was a second line, and an exception whose text cannot be made was a traceback."""
    file = tmp_path / 'mine.py'
    file.write_text('class E(Exception):\n    def __str__(self): raise ValueError\nraise E')
    with pytest.raises(UserError, match='mine.py: E: no message; mend the config file'):
        load_config([str(file)])
    file.write_text('import warnings\nwarnings.warn("x")\nconfig = {"stepz": 1}')
    with pytest.raises(UserError, match='unknown key'):
        load_config([str(file)])
    assert not recwarn.list
