"""The house keeps its shape: arrows one way, rooms of a size, few packages, no dead names."""
import ast
import re
import subprocess
import sys

import pytest

from runtime import ROOT

FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob('*.py')) + ['configs/__init__.py', *sorted(f'kernels/{p.name}' for p in (ROOT / 'kernels').glob('*.py'))]
RUN_TIME = {'torch', 'numpy', 'tiktoken', 'tokenizers', 'safetensors', 'tqdm', 'huggingface_hub', 'jinja2',
            'pyarrow', 'matplotlib', 'triton'}

# file: (most lines, the project's files it may import)
GROUND = {'configs', 'runtime', 'files', 'model', 'data'}
ROOMS = {
    'configs/default.py': (167, set()),
    'configs/__init__.py': (115, {'configs', 'runtime'}),
    # Two rooms hold what design.md put into runtime.py, since bridge.py and eval_math.py will want
    # each on its own: runtime.py is where a process runs, files.py is what lies on disk.
    'runtime.py': (260, set()),
    'files.py': (230, {'runtime'}),
    'model.py': (580, {'files', 'runtime', 'kernels'}),      # five families' config.json, four kinds of rotary scaling
    'data.py': (385, {'files', 'model', 'runtime'}),  # two tokenizer libraries, five layouts of problems
    'rollout.py': (385, {'kernels', 'model'}),
    'kernels/__init__.py': (50, {'kernels'}),
    'kernels/layer_loss.py': (200, set()),
    'kernels/bridge_loss.py': (200, set()),
    'kernels/decode_attention.py': (200, set()),
    'losses.py': (480, {'kernels'}),            # six equations, each written down and fused
    'teacher.py': (200, {'losses', 'runtime'}),
    'preflight.py': (180, {'data', 'losses', 'model', 'runtime'}),   # keeps distill.py to the loop
    'toy.py': (235, GROUND),              # two vocabularies, the making, the checking and the reusing of a folder
    'grader.py': (650, set()),            # a grammar of our own: nothing of a model's answer is ever evaluated
    'eval_math.py': (310, GROUND | {'grader', 'rollout', 'toy'}),
    'figures.py': (265, {'files', 'runtime'}),
    'next_byte.py': (180, {'losses'}),
    'bridge.py': (500, GROUND | {'figures', 'preflight', 'rollout', 'losses', 'teacher', 'toy'}),   # the fit, its judge and its figure
    'measure.py': (190, set()),           # how bench.py measures; the tests count with it
    'bench.py': (590, {'data', 'distill', 'kernels', 'losses', 'measure', 'model', 'next_byte', 'rollout', 'runtime', 'teacher'}),
    'distill.py': (460, GROUND | {'rollout', 'losses', 'bridge', 'next_byte', 'teacher', 'preflight', 'eval_math', 'figures', 'grader', 'toy'}),
}


def imports(file):
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.split('.')[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split('.')[0])
    return names


@pytest.mark.parametrize('file', FILES)
def test_room(file):
    """Size, arrows, packages, a header that says what it does."""
    assert file in ROOMS, f'{file}: a new room needs a reason, a budget and its arrows here'
    budget, may = ROOMS[file]
    text = (ROOT / file).read_text()
    assert len(text.splitlines()) <= budget, f'{file} has outgrown {budget} lines'
    used = imports(file)
    ours = {p.stem for p in ROOT.glob('*.py')} | {'configs', 'kernels'}
    assert used & ours <= may, f'{file} may not import {used & ours - may}'
    assert used - ours - set(sys.stdlib_module_names) <= RUN_TIME
    assert len(ast.get_docstring(ast.parse(text)) or '') > 60


def test_nothing_imports_distill():
    """But the benchmark, which times its steps."""
    assert [f for f in FILES if 'distill' in imports(f)] == ['bench.py']


def test_libraries_do_not_know_the_config():
    """Only scripts see the config dict."""
    for file in ('model.py', 'data.py', 'rollout.py', 'losses.py', 'teacher.py', 'figures.py'):
        assert 'cfg' not in (ROOT / file).read_text(), file


@pytest.mark.parametrize('file', sorted(p.name for p in (ROOT / 'configs').glob('[a-z]*.py')))
def test_config_says_only_what_differs(file):
    text = (ROOT / 'configs' / file).read_text()
    study = 'runs = {' in text
    assert len(text.splitlines()) <= {'default.py': 167}.get(file, 35 if study else 25)


def test_the_config_link():
    assert (ROOT / 'config').is_symlink() and (ROOT / 'config/toy.py').exists()


def test_no_pickle_and_no_evaluation():
    """Model output and downloaded files are untrusted."""
    for file in FILES:
        text = (ROOT / file).read_text()
        assert not re.search(r'\btorch\.load\(|\bpickle\b\.|(?<![.\w])eval\(|(?<![.\w])exec\(|yaml\.load', text), file


def test_every_public_function_says_what_it_does():
    short = {'barrier', 'main', 'fsync', 'write_json', 'ranks', 'count'}
    for file in FILES:
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in short:
                helper = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 8
                plain = isinstance(node, ast.ClassDef) and node.name in ('Attention', 'MLP', 'Block')
                assert ast.get_docstring(node) or helper or plain, f'{file}: {node.name}'


def test_requirements_name_what_is_imported():
    named = {re.split(r'[<>=!\s\[]', line)[0].replace('-', '_')
             for line in (ROOT / 'requirements.txt').read_text().splitlines() if line and line[0] != '#'}
    used = set().union(*(imports(f) for f in FILES))
    assert named == (used & RUN_TIME) - {'triton'}


def test_readme_names_what_exists():
    """Every file in backticks, every function that the interface promises."""
    text = (ROOT / 'README.md').read_text()
    for name in set(re.findall(r'`([\w/]+\.(?:py|txt|toml|md))\b', text)):
        assert (ROOT / name).exists(), name
    for module, names in (('configs', ['load_config']), ('model', ['load_model', 'save_model', 'Model']),
                          ('data', ['load_tokenizer']), ('rollout', ['sample']), ('losses', ['oprd_loss']),
                          ('eval_math', ['grade'])):
        for name in names:
            assert f'{module}.{name}' in text and hasattr(__import__(module), name)
    assert len(text.split()) < 3500


def test_ruff_is_clean():
    ruff = pytest.importorskip('ruff')
    p = subprocess.run([ruff.find_ruff_bin(), 'check', '.'], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout
