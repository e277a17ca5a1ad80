"""The structure of the repository: which folder may import which, how large the core is, which packages are used."""
import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest

from support.runtime import ROOT

FOLDERS = ('bridge_parts', 'configs', 'kernels', 'formats', 'cross_tokenizer', 'grading', 'support', 'studies')
ROOT_FILES = sorted(p.name for p in ROOT.glob('*.py'))
FILES = ROOT_FILES + sorted(str(p.relative_to(ROOT)) for name in FOLDERS for p in (ROOT / name).glob('*.py'))
RUN_TIME = {'torch', 'numpy', 'tiktoken', 'tokenizers', 'safetensors', 'tqdm', 'huggingface_hub', 'jinja2',
            'pyarrow', 'matplotlib', 'math_verify', 'triton'}

# What each part may import of the project. Imports run one way: a script is never imported by a library.
LIBRARIES = {'losses', 'output_losses', 'model', 'rollout', 'step', 'teacher'}
MAY_IMPORT = {
    'configs': {'configs', 'support'},
    'kernels': {'kernels'},
    'support': {'support', 'formats', 'losses', 'cross_tokenizer'},
    'formats': {'formats', 'support', 'model'},
    'bridge_parts': {'bridge_parts', 'support'},
    'cross_tokenizer': {'formats', 'support', 'losses', 'output_losses'},
    'grading': {'grading', 'support'},
    'losses.py': {'kernels'},
    'output_losses.py': set(),
    'step.py': {'support', 'teacher'},
    'model.py': {'kernels'},
    'rollout.py': {'kernels', 'model'},
    'teacher.py': set(),
    'minimal.py': {'configs', 'formats', 'losses', 'rollout', 'step', 'studies', 'support'},
    'eval_math.py': {'configs', 'formats', 'grading', 'rollout', 'studies', 'support'},
    'bridge.py': {*LIBRARIES, 'bridge_parts', 'configs', 'formats', 'cross_tokenizer', 'studies', 'support'},
    'distill.py': {*LIBRARIES, 'bridge_parts', 'configs', 'cross_tokenizer', 'eval_math', 'formats', 'grading', 'studies', 'support'},
    'studies': {*LIBRARIES, 'configs', 'cross_tokenizer', 'formats', 'kernels', 'studies', 'support'},
}
CORE_LINES = 3000               # of code in root and configs: what somebody reads who wants to know the whole method


def imports(file):
    """Top-level names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.split('.')[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split('.')[0])
    return names


@pytest.mark.parametrize('file', FILES)
def test_imports_run_one_way(file):
    """And only the packages that the README names are used, and a file says in its header what it does."""
    used = imports(file)
    ours = {name.removesuffix('.py') for name in ROOT_FILES} | set(FOLDERS)
    part = file.split('/')[0]
    assert used & ours <= MAY_IMPORT[part] | {part.removesuffix('.py')}, f'{file} imports {sorted(used & ours - MAY_IMPORT[part])}'
    assert used - ours - set(sys.stdlib_module_names) <= RUN_TIME
    text = (ROOT / file).read_text()
    assert not text or len(ast.get_docstring(ast.parse(text)) or '') > 60


def code_lines(text):
    """Lines of code: neither blank, nor comment, nor docstring. Text that explains code costs nothing."""
    lines = set()
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_core_stays_small():
    """The sum counts, not the file: a key or a function more fails nothing."""
    assert len(ROOT_FILES) <= 10
    core = [*ROOT_FILES, *(f'configs/{p.name}' for p in (ROOT / 'configs').glob('*.py'))]
    assert sum(code_lines((ROOT / file).read_text()) for file in core) <= CORE_LINES


def test_nothing_imports_distill():
    assert [f for f in FILES if 'distill' in imports(f)] == []


def test_libraries_do_not_know_the_config():
    """Only scripts see the config dict."""
    for file in ('model.py', 'rollout.py', 'losses.py', 'output_losses.py', 'step.py', 'teacher.py', 'formats/tokenizer.py',
                 'formats/problems.py', 'formats/huggingface.py'):
        assert 'cfg' not in (ROOT / file).read_text(), file


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
    for module, names in (('configs', ['load_config']), ('formats.huggingface', ['load_model', 'save_model']), ('model', ['Model']),
                          ('formats.tokenizer', ['load_tokenizer']), ('rollout', ['sample']), ('losses', ['oprd_loss']),
                          ('eval_math', ['grade'])):
        for name in names:
            found = __import__(module, fromlist=[name])
            assert f'{module}.{name}' in text and hasattr(found, name)


def test_ruff_is_clean():
    ruff = pytest.importorskip('ruff')
    p = subprocess.run([ruff.find_ruff_bin(), 'check', '.'], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout
