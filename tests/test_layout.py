"""The structure of the repository: which folder may import which, how large the core is, which packages are used."""
import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
import tomllib

import pytest

from support.runtime import ROOT

FOLDERS = ('bridge_parts', 'configs', 'extensions', 'kernels', 'paper', 'formats', 'cross_tokenizer', 'grading', 'support', 'studies')
ROOT_FILES = sorted(p.name for p in ROOT.glob('*.py'))
FILES = ROOT_FILES + sorted(str(p.relative_to(ROOT)) for name in FOLDERS for p in (ROOT / name).glob('*.py'))
RUN_TIME = {'torch', 'numpy', 'tiktoken', 'tokenizers', 'safetensors', 'tqdm', 'huggingface_hub', 'jinja2',
            'pyarrow', 'matplotlib', 'math_verify', 'triton'}
OPTIONAL = {'wandb'}            # imported only if a key asks for it

# What each part may import of the project. Imports run one way: a script is never imported by a library.
LIBRARIES = {'losses', 'output_losses', 'model', 'rollout', 'step', 'teacher'}
MAY_IMPORT = {
    'configs': {'configs', 'support'},
    'kernels': {'kernels'},
    'support': {'support', 'formats', 'losses', 'cross_tokenizer'},
    'formats': {'formats', 'support', 'model'},
    'bridge_parts': {'bridge_parts', 'formats', 'support'},
    'cross_tokenizer': {'formats', 'support', 'losses', 'output_losses'},
    'grading': {'grading', 'support'},
    'extensions': {'extensions', 'formats', 'losses', 'output_losses', 'rollout', 'support'},
    'losses.py': {'kernels'},
    'output_losses.py': {'support'},
    'step.py': {'support', 'teacher'},
    'model.py': {'kernels'},
    'rollout.py': {'kernels', 'model', 'support'},
    'teacher.py': set(),
    'minimal.py': {'configs', 'formats', 'losses', 'rollout', 'step', 'studies', 'support'},
    'eval_math.py': {'configs', 'formats', 'grading', 'rollout', 'studies', 'support'},
    'bridge.py': {*LIBRARIES, 'bridge_parts', 'configs', 'formats', 'cross_tokenizer', 'studies', 'support'},
    'distill.py': {*LIBRARIES, 'bridge_parts', 'configs', 'cross_tokenizer', 'eval_math', 'extensions', 'formats', 'grading', 'studies', 'support'},
    'studies': {*LIBRARIES, 'bridge_parts', 'configs', 'cross_tokenizer', 'eval_math', 'extensions', 'formats', 'grading',
                'kernels', 'studies', 'support'},
    'paper': {*LIBRARIES, 'bridge_parts', 'configs', 'cross_tokenizer', 'eval_math', 'formats', 'grading', 'paper', 'studies', 'support'},
}
# What is written for people, and endings of files that look like names of a module: `bridge.json`.
DOCUMENTS = ['README.md', 'CONTRIBUTING.md', *sorted(f'docs/{p.name}' for p in (ROOT / 'docs').glob('*.md'))]
FILE_ENDINGS = ('py', 'json', 'safetensors', 'png')

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
    assert used - ours - set(sys.stdlib_module_names) <= RUN_TIME | OPTIONAL
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
                 'formats/problems.py', 'formats/hub.py', 'formats/huggingface.py'):
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


@pytest.mark.parametrize('document', DOCUMENTS)
def test_documents_name_files_that_exist(document):
    """Every file in backticks and every target of a link: a command that was copied from a document must not fail because
    the file was renamed."""
    file = ROOT / document
    text = file.read_text()
    for name in set(re.findall(r'`([\w/.]+\.(?:py|txt|toml|md|cff))\b', text)):
        assert (ROOT / name).exists(), name
    for target in set(re.findall(r'\]\(([^)#]+)\)', text)):
        assert target.startswith('https://') or (file.parent / target).exists(), target


@pytest.mark.parametrize('document', DOCUMENTS)
def test_documents_name_functions_that_exist(document):
    """Every `module.name` of a module of this project: a table of equations that names functions of yesterday is worse
    than none."""
    modules = {name.removesuffix('.py') for name in ROOT_FILES} | set(FOLDERS)
    for dotted in set(re.findall(r'`([a-z_]\w*(?:\.\w+)+)`', (ROOT / document).read_text())):
        parts = dotted.split('.')
        if parts[0] not in modules or parts[-1] in FILE_ENDINGS:
            continue
        # The longest prefix that is a module; the rest are its names.
        found = importlib.import_module(parts.pop(0))
        while parts and (ROOT / found.__name__.replace('.', '/') / f'{parts[0]}.py').exists():
            found = importlib.import_module(f'{found.__name__}.{parts.pop(0)}')
        for name in parts:
            assert hasattr(found, name), dotted
            found = getattr(found, name)


def test_the_table_of_equations_names_functions():
    """The test above checks what it finds; it must find something."""
    text = (ROOT / 'docs/equations.md').read_text()
    assert len(set(re.findall(r'`\w+(?:\.\w+)+`', text))) > 40


def test_readme_is_short_and_promises_the_public_names():
    """The names that scripts and notebooks may rely on, in the text and in the code."""
    text = (ROOT / 'README.md').read_text()
    assert len(text.split()) <= 1800
    for module, names in (('configs', ['load_config']), ('formats.huggingface', ['load_model', 'save_model']), ('model', ['Model']),
                          ('formats.tokenizer', ['load_tokenizer']), ('rollout', ['sample']), ('losses', ['oprd_loss']),
                          ('eval_math', ['grade'])):
        for name in names:
            assert f'{module}.{name}' in text and hasattr(importlib.import_module(module), name)
    for name in ('encode', 'decode', 'chat', 'byte_ends'):
        assert f'`{name}`' in text and hasattr(importlib.import_module('formats.tokenizer').Tokenizer, name)


def test_readme_shows_minimal_as_it_is():
    """The algorithm on the first page is the one that runs: main() of minimal.py, line by line."""
    shown, = re.findall(r'```python\n(.*?)\n```', (ROOT / 'README.md').read_text(), re.DOTALL)
    source = (ROOT / 'minimal.py').read_text()
    node, = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == 'main']
    assert shown.splitlines() == source.splitlines()[node.lineno - 1:node.end_lineno]


def test_an_installation_has_every_module():
    """pyproject.toml lists them by hand: one that is missing there is an ImportError in a notebook, and nowhere else."""
    listed = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    assert sorted(f'{name}.py' for name in listed['py-modules']) == ROOT_FILES
    assert sorted(listed['packages']) == sorted(FOLDERS)


def test_ruff_is_clean():
    ruff = pytest.importorskip('ruff')
    p = subprocess.run([ruff.find_ruff_bin(), 'check', '.'], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout
