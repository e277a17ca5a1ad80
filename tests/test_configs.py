"""load_config: every key known, typed and in range, from any directory."""
import pytest

from configs import check, checks, default, free, load_config
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


@pytest.mark.parametrize('name', [p.stem for p in (ROOT / 'configs').glob('*.py') if 'config = ' in p.read_text()])
def test_every_config_file_loads(name):
    """The paper's experiments cannot be run here; their files can at least be read and checked."""
    cfg = load_config([f'config/{name}.py'])
    assert cfg['out_dir'].split('/')[-1] == name or name == 'default'


def test_help_prints_the_keys(capsys):
    with pytest.raises(SystemExit) as e:
        load_config(['--help'])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert all(f'{key}=' in out for key in default)


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
    (['layers=[0]'], 'give a list of layer numbers from 1'),
    (['layers=[]'], 'give a list of layer numbers from 1'),
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
    (['layers=' + '[' * 90 + ']' * 90], 'give a list of layer numbers'),
    (['layers=' + '[' * 50_000], "choose one of 'all'"),
    (['layers=[1' + ',1' * 1000 + ']'], 'give a list of layer numbers'),
    (['layers=[1' + '0' * 30 + ']'], 'give a list of layer numbers'),
    (['layers=[True]'], 'give a list of layer numbers'),
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
    ('x = []\nfor _ in range(99999): x = [x]\nconfig = dict(layers=x)', 'give a list of layer numbers'),
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
