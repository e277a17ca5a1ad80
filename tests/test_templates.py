"""Chat templates in their child process: as transformers renders them, the frozen date, and templates that mean harm."""
import datetime
import os
import subprocess
import sys
import time

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from formats import tokenizer
from formats.tokenizer import load_tokenizer, template_child
from support.files import write_json
from support.limited import LimitedChild, Limits
from support.runtime import ROOT, UserError

LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='only Linux keeps all of these limits')


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = HFTokenizer(models.BPE({token: number for number, token in enumerate(['<eos>', '<bos>', *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(['<eos>', '<bos>'])
    core.save(str(tmp_path / 'tokenizer.json'))
    write_json(tmp_path / 'tokenizer_config.json', {'eos_token': '<eos>', 'bos_token': '<bos>'})
    return tmp_path


@pytest.fixture
def small_limits(monkeypatch):
    """A second of processor time, and a child that keeps these limits from its start on."""
    template_child.stop()
    monkeypatch.setattr(tokenizer, 'TEMPLATE_LIMITS', Limits(1, 20, 2**28))
    yield
    template_child.stop()


def with_template(folder, text, **variables):
    (folder / 'chat_template.jinja').write_text(text)
    return load_tokenizer(folder, **variables)


# What published templates do: loops with their variables, namespaces, macros, slices, filters, tests, strip, dates.
PUBLISHED = """{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{{ '<|sys|>' + messages[0]['content'] + '\n' }}
{%- else %}{% set loop_messages = messages %}{% endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- macro say(role, text) %}<|{{ role }}|>{{ text.split('</think>')[-1].lstrip('\n') | trim }}{% endmacro %}
{%- for message in loop_messages %}{% if loop.last %}{{ loop.index0 }}{% endif %}
{%- if message.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
{{- say(message.role, message.content) }}{{ message | tojson }}{% if enable_thinking is defined and enable_thinking is false %}no{% endif %}
{%- endfor %}{{ ns.last }}{{ bos_token }}{% if tools is not none %}tools{% endif %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
TALKS = [[{'role': 'user', 'content': 'é∑\n 🙂 "x" <b>'}],
         [{'role': 'system', 'content': 'be\nbrief'}, {'role': 'user', 'content': '1'}, {'role': 'assistant', 'content': '<think>a</think>\n\n 2 '},
          {'role': 'tool', 'content': 'left out'}, {'role': 'user', 'content': ''}]]


@pytest.mark.parametrize('variables', [{}, {'enable_thinking': False}], ids=str)
def test_published_templates_render_as_in_transformers(folder, variables):
    """Through the child and its JSON, character by character, one conversation and many."""
    transformers = pytest.importorskip('transformers')
    tok = with_template(folder, PUBLISHED, **variables)
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), bos_token='<bos>', eos_token='<eos>',
                                                chat_template=PUBLISHED)
    wanted = [peer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **variables) for talk in TALKS]
    assert tok.render_all(TALKS * 200) == wanted * 200
    assert [tok.render(talk) for talk in TALKS] == wanted
    assert tok.chat_all(TALKS) == [tok.encode(text) for text in wanted]


def test_a_list_of_none_and_pieces_by_size(folder, monkeypatch):
    """However a list is cut into pieces, the texts are the same, and a template renders nothing without a conversation."""
    tok = with_template(folder, '{{ messages[0].content }}')
    texts = ['a' * size for size in (0, 5, 9, 10, 11, 50, 1)]
    for characters in (1, 10, 10**6):
        monkeypatch.setattr(tokenizer, 'PIECE_CHARACTERS', characters)
        for count in (1, 3):
            monkeypatch.setattr(tokenizer, 'PIECE', count)
            assert tok.render_all(texts) == texts and tok.render_all([]) == []
    (folder / 'chat_template.jinja').unlink()
    assert load_tokenizer(folder).render_all(['a', TALKS[1]])[0] == '<bos>a\n'


# ---- the date ------------------------------------------------------------------------------------

def test_the_date_is_frozen(folder):
    """A template that asked the clock made a resumed run, and ranks across midnight, render other prompts."""
    text = "{{ strftime_now('%Y-%m-%d %H:%M:%S %A') }}"
    assert with_template(folder, text, date='2024-02-29').render('x') == '2024-02-29 00:00:00 Thursday'
    today = with_template(folder, text)
    assert today.date in (str(datetime.date.today()), str(datetime.date.today() - datetime.timedelta(days=1)))
    assert today.render('x').startswith(f'{today.date} 00:00:00')
    today.date = '1999-12-31'
    assert today.render('x').startswith('1999-12-31')


@pytest.mark.parametrize('date', ['2024-2-3', '20240203', '2024-W05-1', '2023-02-29', 'today', '2024-02-03T00:00', 7, None, '2' * 10**5], ids=lambda date: str(date)[:20])
def test_dates_of_another_form_are_refused(folder, date):
    with pytest.raises(UserError, match='date=.*: not a day; write it like 2026-01-31') as error:
        load_tokenizer(folder, date)
    assert len(str(error.value)) < 200


# ---- templates that mean harm ----------------------------------------------------------------------

LOOPS = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'
HOSTILE = {
    'two loops': (LOOPS, 'took more than 1 s'),
    'a sum': ('{{ [0, 1] | sum }}{% set n = namespace(x=3) %}{% for a in range(99999) %}{% set n.x = n.x * n.x %}{% endfor %}', 'took more than 1 s'),
    'memory at compilation': ("{{ 'a' * 10**9 }}", 'out of memory'),
    'memory at rendering': ("{{ messages[0].content * 10**9 }}", 'out of memory'),
    'memory of a list': ("{% set x = [1] * 10**9 %}", 'out of memory'),
    'a power': ('{{ 7 ** (9 ** 9) }}', 'took more than 1 s'),
    'a power at rendering': ('{{ 7 ** (messages | length + 10 ** 9) }}', 'took more than 1 s'),
    'digits of a number': ("{{ (10 ** 5000) | string }}", 'Exceeds the limit'),
    'digits to a number': ("{{ ('9' * 5000) | int(0) + undefined.x }}", 'undefined'),
    'a format': ("{{ '%1000000000d' % 7 }}", 'failed'),
    'a join': ("{{ ['a' * 100000] * 99999 | join }}", 'failed'),
    'a long prompt': ("{{ 'ab' * 600000 }}", 'a prompt of 1,200,000 characters'),
    'recursion': ('{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}', 'recursion'),
    'recursive loop': ('{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}', 'recursion'),
    'nesting': ('{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', 'chat template'),
    'nested blocks': ('{% if 1 %}' * 3000 + '{% endif %}' * 3000, 'chat template'),
    'attributes': ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'unsafe'),
    'globals of a function': ("{{ cycler.__init__.__globals__.os.system('touch harm') }}", 'unsafe'),
    'changing': ("{{ messages.append(1) }}", 'unsafe'),
    'a file': ("{% include '/etc/passwd' %}", 'no loader'),
    'another file': ("{% import 'os' as os %}{{ os.system('touch harm') }}", 'no loader'),
    'a refusal': ("{{ raise_exception('one\ntwo' + 'x' * 10**6) }}", 'one two'),
    'a refusal that is no text': ("{{ raise_exception(messages) }}", 'failed'),
    'nothing': ('{% for %}', 'does not parse'),
}


@LINUX
@pytest.mark.parametrize('name', list(HOSTILE))
def test_hostile_templates_are_one_line(folder, small_limits, name):
    """Quickly, without memory of ours, and the next template renders as if nothing had been. Two loops of 99,999 took
    an hour, and 'a' * 10**9 a gigabyte, before."""
    text, says = HOSTILE[name]
    tok = with_template(folder, text)
    fine = with_template(folder, '[{{ messages[0].content }}]')
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        tok.render('x')
    assert time.monotonic() - began < 15
    line = str(error.value).replace(str(folder), '')
    assert says in line and 'chat template' in line and '\n' not in line and len(line) < 200, line
    assert fine.render('y') == '[y]' and not os.path.exists('harm')


@pytest.mark.parametrize('text', ["{{ ''|attr('__class__')|attr('__mro__') }}", "{{ '{0.__class__.__init__}'.format(messages) }}",
                                  '{{ raise_exception.__globals__ }}', '{{ strftime_now.__self__.__class__ }}', '{{ self.__init__.__globals__ }}'])
def test_what_the_sandbox_hides_is_nothing(folder, text):
    """Where jinja2 refuses an attribute without an error, there is nothing in its place."""
    try:
        assert with_template(folder, text).render('x') == ''
    except UserError as error:
        assert 'unsafe' in str(error) or 'undefined' in str(error)


@LINUX
@pytest.mark.parametrize('text', ["{{ print('x') }}", "{{ [1, 2] | pprint }}", "{{ dict(a=1) }}{{ lipsum(1) | length > 0 }}"])
def test_nothing_of_a_template_gets_between_the_replies(folder, small_limits, text):
    """Whatever it prints or fails at, each request has its own reply."""
    tok = with_template(folder, text)
    for number in range(3):
        try:
            tok.render('x')
        except UserError:
            pass
        assert with_template(folder, '{{ messages[0].content }}').render(str(number)) == str(number)


@LINUX
def test_one_conversation_in_many_takes_too_long(folder, small_limits):
    """And the same list without it is rendered."""
    tok = with_template(folder, "{% if messages[0].content == 'bad' %}" + LOOPS + '{% endif %}x')
    with pytest.raises(UserError, match='its chat template took more than 1 s'):
        tok.render_all(['fine'] * 150 + ['bad'])
    assert tok.render_all(['fine'] * 150) == ['x'] * 150


@LINUX
def test_the_child_of_templates_starts_without_torch(tmp_path):
    """It starts where the first prompt is rendered, in each process; with torch that would be seconds."""
    file = tmp_path / 'what.py'
    file.write_text('import sys\ndef prepare():\n    return lambda request: [name for name in request if name in sys.modules]\n')
    child = LimitedChild(file, 'a test', 'nothing')
    limits = Limits(1, 20, 2**28)
    assert child.ask(['torch', 'numpy', 'support', 'formats', 'json'], limits) == (['json'], None)
    child.stop()
    real = LimitedChild(ROOT / 'formats/template_child.py', 'chat templates', 'jinja2')
    answer, problem = real.ask(["{{ 1 }}", '2000-01-01', {}, [[]]], limits)
    assert (answer, problem) == ({'texts': ['1']}, None)
    modules = open(f'/proc/{real.process.pid}/maps').read()
    assert 'libtorch' not in modules
    real.stop()


def child_that_answers(tmp_path, answer):
    """A limited child that answers a request with the value of an expression."""
    file = tmp_path / 'answer.py'
    file.write_text(f'def prepare():\n    return lambda request: {answer}\n')
    return LimitedChild(file, 'a test', 'nothing')


@LINUX
def test_requests_and_replies_larger_than_a_pipe(tmp_path):
    """64 kB fit into a pipe: a parent that writes all and a child that answers all must not wait for each other."""
    child = child_that_answers(tmp_path, 'request * 2')
    for size in (0, 10, 4096, 10**5, 3 * 10**6):
        assert child.ask('é' * size, Limits(5, 60, 2**29)) == ('é' * 2 * size, None)
    child.stop()


@LINUX
def test_a_child_that_does_not_read_is_given_up(tmp_path):
    """A stopped child leaves the pipe full; the request must not wait for ever."""
    child = child_that_answers(tmp_path, 'request')
    assert child.ask(1, Limits(5, 60, 2**29)) == (1, None)
    os.kill(child.process.pid, 19)
    assert child.ask('x' * 10**6, Limits(5, 0.5, 2**29)) == (None, 'timeout') and child.process is None


def test_without_jinja2_the_first_prompt_is_one_line(folder, tmp_path):
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken/jinja2.py').write_text('raise ImportError("no such package")')
    with_template(folder, 'x')
    code = (f'from formats.tokenizer import load_tokenizer\nfrom support.runtime import UserError\n'
            f'try: load_tokenizer({str(folder)!r}).render("x")\nexcept UserError as error: print(error)')
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': f'{ROOT}:{tmp_path}/broken'})
    assert 'chat templates: jinja2 cannot be used (ImportError: no such package); pip install jinja2' in p.stdout, p.stderr


def test_limits_of_the_shell_are_kept():
    """Under `ulimit -t` the child died at each request, because it tried to lift a limit: every answer counted as wrong."""
    code = ('import resource\n'
            'for name, bound in (("CPU", 600), ("NOFILE", 12), ("FSIZE", 10**6)):\n'
            '    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (bound, bound))\n'
            'from grading.grader import judge\n'
            'print(judge(r"\\boxed{x^2-1}", "(x-1)(x+1)"))')
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert "correct=True, decided_by='math-verify'" in p.stdout, p.stdout + p.stderr
