"""The page of studies/view.py: its numbers against plain forwards, its texts against the run's answers, and the page itself
in a browser. The browser's tests are skipped where no Chromium starts."""
import html.parser
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import browser as chromium
import pytest
import torch
from conftest import argv, write_run

import distill
from bridge_parts.saved import Bridge
from configs import load_config
from cross_tokenizer.pairing import pair_text, read_rollout
from formats.huggingface import save_model
from formats.problems import Problem
from formats.tokenizer import load_tokenizer
from losses import BridgeTerm
from model import Model, init_weights
from rollout import Rollout
from step import cut_rollout, diagnose, position_mask
from studies import toy, view
from support.files import read_json, write_json
from support.runtime import UserError

EXACT = SimpleNamespace(device=torch.device('cpu'), dtype=torch.float64)
HOSTILE = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


def data_of(file):
    """What a page holds."""
    text, = re.findall('<script type="application/json" id="data">(.*?)</script>', file.read_text(encoding='ascii'), re.DOTALL)
    return json.loads(text)


@pytest.fixture(scope='module')
def page(toy_dir, tmp_path_factory):
    """(folder of a tiny run, file of its page). The run kept the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp('view') / 'tiny'
    distill.main(load_config(argv(toy_dir, folder, keep=9, eval_n=1)))
    file = folder / 'page.html'
    view.main(view.settings([str(folder), 'prompts=2', f'to={file}']))
    return folder, file


# ---- texts and numbers -----------------------------------------------------------------------------

def test_the_answers_are_those_of_the_run(page):
    """Another seed, another step number or another temperature gives answers that the run has never seen."""
    folder, file = page
    data = data_of(file)
    assert data['checkpoints'] == ['untrained student', 'step 2', 'step 4'] and [p['number'] for p in data['problems']] == [0, 3]
    for model, step in enumerate((0, 2, 4)):
        rows = [json.loads(line) for line in (folder / f'answers/{step:06d}.jsonl').read_text().splitlines()]
        by_problem = {row['problem']: row for row in rows}
        for problem in data['problems']:
            row = by_problem[problem['number']]
            answer = problem['answers'][model]
            shown = ''.join(text for text, special in map(data['pieces'].__getitem__, answer['tokens']) if not special)
            assert (shown, len(answer['tokens'])) == (row['text'], row['length'])
            assert [answer[key] for key in ('right', 'found', 'stopped')] == [row[key] for key in ('correct', 'extracted', 'stopped')]
            assert (problem['prompt'], problem['known']) == (row['prompt'], row['answer'])
            if model == 0:                   # it reads its own answer either way
                assert problem['first'][0] is None
                continue
            assert problem['first'][model]['tokens'] == problem['answers'][0]['tokens']
            assert problem['first'][model]['cos'] != problem['answers'][0]['cos']


def an_answer(toy_cfg, **keys):
    """(config, problem, 11 random ids of an answer) on the tiny toy. keys: of the config."""
    cfg = toy_cfg | keys
    tok = load_tokenizer(cfg['student'])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, tok.size, (11,), generator=generator).tolist()
    return cfg, Problem('7*2-3', '1', tok.chat('7*2-3')), ids


def close(units, value):
    """A number of the page is a number, but for the rounding to units and that of states to float32."""
    return abs(units / view.UNIT - float(value)) <= 0.5 / view.UNIT + 1e-5


def exact_page(pair, problem, ids):
    pieces = view.Pieces()
    made = view.measure(pair, pair.load(pair.cfg['student']), problem, ids, pieces)
    return made, [text for text, _ in pieces.table()]


def test_numbers_are_those_of_two_plain_forwards(toy_cfg):
    """Position t of an answer is the column before its token; layer l is student layer l against teacher layer l. An answer
    longer than a chunk of rows is measured whole."""
    cfg, problem, ids = an_answer(toy_cfg)
    view_rows, view.ROWS = view.ROWS, 4
    try:
        pair = view.load_pair(cfg, EXACT, 64)
        made, texts = exact_page(pair, problem, ids)
    finally:
        view.ROWS = view_rows
    student = pair.load(cfg['student'])
    text = torch.tensor([problem.ids + ids])
    with torch.no_grad():
        h_s, h_t = (model.hidden(text, [1, 2, 3]) for model in (student, pair.teacher))
        logp, logq = (model(text)[0].log_softmax(-1) for model in (student, pair.teacher))
    assert pair.layers == [1, 2, 3] and pair.kl == 'token' and made['inside'] == [0] * 11
    names = {number: word.decode() for word, number in pair.tok.words.items()}
    for t, written in enumerate(ids):
        column = len(problem.ids) - 1 + t
        for layer in range(3):
            a, b = h_s[layer][0, column], h_t[layer][0, column]
            assert close(made['cos'][layer][t], a @ b / a.norm() / b.norm())
        p, q = logp[column].exp(), logq[column].exp()
        assert close(made['kl'][t], (p * (logp[column] - logq[column])).sum())
        assert close(made['entropy'][t], -(p * logp[column]).sum()) and close(made['entropy_t'][t], -(q * logq[column]).sum())
        assert texts[made['tokens'][t]] == names[written]
        assert close(made['written'][0][t], p[written]) and close(made['written'][1][t], q[written])
        for side, probabilities in (('student', p), ('teacher', q)):
            best = probabilities.argsort(descending=True)[:5].tolist()
            assert [texts[piece] for piece in made[side][t][::2]] == [names[i] for i in best]
            assert all(close(units, probabilities[i]) for units, i in zip(made[side][t][1::2], best, strict=True))


def other_teacher(cfg, folder, tokens, width=20):
    """A random teacher of another width and perhaps another vocabulary, in a folder of its own -> config with it."""
    folder.mkdir()
    toy.write_tokenizer(folder, tokens)
    shape = toy.shape(cfg | {'toy_teacher_width': width, 'toy_teacher_layers': 2}, load_tokenizer(folder), 'teacher')
    save_model(init_weights(Model(shape), 5), folder / 'teacher', source=folder)
    return cfg | {'teacher': str(folder / 'teacher')}


def random_bridge(layer_map, d_s, d_t, rank=3):
    generator = torch.Generator().manual_seed(1)
    draw = {name: {layer: torch.randn(*shape, generator=generator) for layer in layer_map}
            for name, shape in (('mean', (d_t,)), ('P_t', (rank, d_t)), ('P_s', (2, rank, d_s)), ('b_s', (2, rank)))}
    return Bridge(layer_map, rank, **draw)


def test_through_a_bridge_the_cosine_is_that_of_the_projections(toy_cfg, tmp_path):
    """Number by number it would be between states of unlike widths. Without a bridge there is none, and the page says so."""
    cfg, problem, ids = an_answer(toy_cfg)
    pair = view.load_pair(other_teacher(cfg, tmp_path / 't', 'same'), EXACT, 64)
    made, _ = exact_page(pair, problem, ids)
    assert (pair.layers, made['cos'], pair.kl) == ([], [], 'token') and 'cannot be compared' in view.fact_of_cosine(pair)

    bridge = random_bridge({1: 1, 3: 2}, 24, 20)
    pair.objective = replace(pair.objective, layer_map=bridge.layer_map, bridge=bridge, hidden=BridgeTerm(bridge))
    made, _ = exact_page(pair, problem, ids)
    text = torch.tensor([problem.ids + ids])
    with torch.no_grad():
        h_s, h_t = pair.load(cfg['student']).hidden(text, [1, 3]), pair.teacher.hidden(text, [1, 2])
    for row, layer in enumerate((1, 3)):
        z_s = h_s[row][0].float() @ bridge.P_s[layer][0].t() + bridge.b_s[layer][0]
        z_t = (h_t[row][0].float() - bridge.mean[layer]) @ bridge.P_t[layer].t()
        cosine = torch.cosine_similarity(z_s, z_t, dim=-1)[len(problem.ids) - 1:]
        assert all(close(units, value) for units, value in zip(made['cos'][row], cosine[:11], strict=True))
    assert 'through the bridge, in its space of 3 numbers; layers of student and teacher: 3 and 2' in view.fact_of_cosine(pair)


def test_a_teacher_of_another_vocabulary_reads_the_text(toy_cfg, tmp_path, monkeypatch):
    """Its states, its tokens and the KL are those of the training loop: sums over the page's positions equal what `diagnose`
    logs. It has no state where its context ends."""
    cfg, problem, _ = an_answer(toy_cfg)
    tok = load_tokenizer(cfg['student'])
    ids = [*tok.encode('7*2=4;4-3=1;\\boxed{1}'), *tok.stop_ids]
    pair = view.load_pair(other_teacher(cfg, tmp_path / 't', 'merged'), EXACT, 64)
    bridge = random_bridge({1: 1, 3: 2}, 24, 20)
    pair.objective = replace(pair.objective, layer_map=bridge.layer_map, bridge=bridge, hidden=BridgeTerm(bridge))
    made, texts = exact_page(pair, problem, ids)

    # The same rows through the loop's own sums, each with weight 1.
    student = pair.load(cfg['student'])
    prompt_t = pair.tok_t.chat(problem.question)
    lengths = [torch.tensor([n]) for n in (len(problem.ids), len(ids))]
    roll = Rollout(torch.tensor([problem.ids + ids]), *lengths, torch.tensor([True]), torch.tensor([0]))
    reading = read_rollout(roll, [prompt_t], tok, pair.tok_t)
    sums = diagnose(student, pair.teacher, cut_rollout(roll, position_mask(roll).double(), 10**6, reading), pair.objective)
    for name, total in zip(('kl', 'entropy', 'entropy_t'), sums['statistics'][1:4].tolist(), strict=True):
        known = [value for value in made[name] if value is not None]
        assert abs(sum(known) / view.UNIT - total) <= len(ids) * (0.5 / view.UNIT + 1e-5)
    for row, total in zip(made['cos'], sums['layer_cosine'].tolist(), strict=True):
        assert abs(sum(row) / view.UNIT - total) <= len(ids) * (0.5 / view.UNIT + 1e-5)

    # Which of its states stands at each position, and what it would write there.
    ids_t, column, inside, _ = pair_text(ids, tok, prompt_t, pair.tok_t)
    assert made['inside'] == inside.astype(int).tolist() and 0 < sum(made['inside']) < len(ids)
    logits = pair.teacher(torch.tensor([ids_t]))[0]
    names = {number: word.decode() for word, number in pair.tok_t.words.items()}
    assert [texts[row[0]] for row in made['teacher']] == [names[i] for i in logits[column].argmax(-1).tolist()]
    assert made['written'][1] is None and pair.kl == 'byte' and 'next byte' in view.fact_of_kl(pair)

    # Where no token of the teacher begins with what is written, the next byte is not known. It is no KL of 0.
    position = made['inside'].index(1)
    rows_of_answer = view.rows_of_answer

    def odd_rows(*arguments):
        rows = rows_of_answer(*arguments)
        rows.written[position] = b'~'
        return rows
    with monkeypatch.context() as patch:
        patch.setattr(view, 'rows_of_answer', odd_rows)
        odd, _ = exact_page(pair, problem, ids)
    assert [t for t, value in enumerate(odd['kl']) if value is None] == [position] and made['kl'][position] is not None
    assert odd['entropy'][position] is odd['entropy_t'][position] is None and odd['cos'] == made['cos']

    # A context that ends within the answer.
    pair.teacher.config = replace(pair.teacher.config, context=len(prompt_t) + 3)
    cut, _ = exact_page(pair, problem, ids)
    _, column, _, _ = pair_text(ids, tok, prompt_t, pair.tok_t, context=len(prompt_t) + 3)
    missing = [t for t, c in enumerate(column.tolist()) if c < 0]
    for values in (*cut['cos'], cut['kl'], cut['entropy'], cut['teacher'], cut['inside']):
        assert [t for t, value in enumerate(values) if value is None] == missing and 0 < len(missing) < len(ids)
    assert None not in cut['student'] and cut['cos'][0][0] == made['cos'][0][0]

    # Fed the ids of the student, as published: a KL would compare unrelated texts.
    pair.cfg = pair.cfg | {'teacher_ids': 'student'}
    fed, _ = exact_page(pair, problem, ids)
    assert set(fed['kl']) == {None} and pair.kl == '' and 'There is no KL' in view.fact_of_kl(pair)


# ---- which checkpoints, which problems, how many --------------------------------------------------------

def test_checkpoints_are_spread_over_the_run(page, tmp_path, capsys):
    """The first and the last stay. A checkpoint of another run that was copied into the folder would be shown as this one's."""
    assert view.spread(list(range(11)), 4) == [0, 3, 6, 10] and view.spread([1, 2, 3], 1) == [3] and view.spread([1, 2], 5) == [1, 2]
    folder, _ = page
    copy = tmp_path / 'run'
    for name in ('ckpt-000002', 'ckpt-000004'):
        shutil.copytree(folder / name, copy / name)
    stored = read_json(folder / 'config.json')
    write_json(copy / 'config.json', stored)
    record = copy / 'ckpt-000002/resume.json'
    record.write_text(record.read_text().replace('"step": 2', '"step": 3'))
    request = view.settings([str(copy), 'checkpoints=2'])
    assert view.kept_checkpoints(request, 'S') == ([('untrained student', 'S'), ('step 4', copy / 'ckpt-000004/model')], 0)
    assert 'ckpt-000002 is left out, it is damaged or belongs to another run' in capsys.readouterr().out
    write_json(copy / 'config.json', stored | {'run': 'another'})
    assert view.kept_checkpoints(request, 'S') == ([('untrained student', 'S')], 0)
    assert 'holds no checkpoint' in capsys.readouterr().out


def test_two_models_without_a_run(toy_cfg, tmp_path):
    """Any two models and any file of problems, whose answers need not be known. The page is named, and says what it shows."""
    problems = tmp_path / 'mine.jsonl'
    problems.write_text('{"question": "3+4*2"}\n{"question": "9-1-1"}\n')
    file = tmp_path / 'page.html'
    words = [f'{key}={toy_cfg[key]}' for key in ('student', 'teacher')] + [f'data={problems}', 'tokens=5', f'to={file}']
    view.main(view.settings(words))
    data = data_of(file)
    assert data['checkpoints'] == ['the student'] and [p['set'] for p in data['problems']] == ['mine', 'mine']
    assert {answer['right'] for p in data['problems'] for answer in p['answers']} == {None}
    assert all(len(p['answers'][0]['tokens']) <= 5 for p in data['problems'])
    assert 'one model, the first 2 problems, at most 5 tokens' in data['facts'][0]
    before = file.read_bytes()
    view.main(view.settings(words))
    assert file.read_bytes() == before


def test_a_folder_may_have_the_name_of_a_study_s_run(tmp_path):
    """studies/compare.py names them after their methods. 'bridge_r_=_16-s0' was taken for a key."""
    folder = tmp_path / 'bridge_r_=_16-s0'
    write_json(folder / 'config.json', {'run': 'x', 'config': load_config(['configs/toy.py'])})
    request = view.settings([str(folder), 'tokens=7'])
    assert (request.folder, request.sizes['tokens'], request.file) == (folder, 7, folder / 'view.html')


@pytest.mark.parametrize('words, says', [
    ([], "student='': nothing given; give the folder of a run"), (['nowhere'], 'nowhere/config.json: no such file; give the'),
    (['a', 'b'], "'b': wants one run folder"), (['--tokens'], "'--tokens': wants one run folder"),
    (['nowhere', 'prompts=0'], "prompts='0': wants a whole number from 1 to 50"), (['x', 'tokens=1e3'], "tokens='1e3': wants a whole"),
    (['RUN', 'lr=1'], "'lr': no key of this command; it has prompts, tokens"), (['RUN', 'student=x'], "'student': no key of this command"),
    (['RUN', 'to='], "'to': no key of this command"), (['RUN', 'seed=x'], "seed='x' is str"),
    (['RUN', 'toy_dir=/nowhere'], 'the toy of this run is not there'),
    (['RUN', 'prompts=50', 'tokens=4096'], 'up to 1024000 tokens, but a page holds 50000; lower prompts='),
    (['RUN', 'data=/no.jsonl'], "'/no.jsonl': no such file")])
def test_a_bad_command_is_one_line(page, words, says, tmp_path):
    """And it writes nothing."""
    words = [str(page[0]) if word == 'RUN' else word for word in words]
    if not any(word.startswith('to=') for word in words):
        words.append(f'to={tmp_path}/page.html')
    with pytest.raises(UserError, match=re.escape(says)):
        view.main(view.settings(words))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('keys, says', [
    (dict(teacher='a,b'), 'teacher= names 2 models, and a page shows one; give student=, data= and one teacher='),
    (dict(teacher='self', teacher_every=1), "teacher='self' with teacher_sees='prompt': a page shows another model"),
    (dict(teacher='a', teacher_sees='solution'), "teacher='a' with teacher_sees='solution': a page shows another model that reads")])
def test_a_run_that_learned_from_other_teachers_is_one_line(keys, says, tmp_path):
    """The page would show one of several teachers, or a model that has read other prompts, as if it was what the run saw. It asked
    the hub for a model of the name 'self'."""
    run = write_run(tmp_path / 'run', {'eval/avg@1': [1.0, 2.0]}, student='x', data='y', eval_data='', **keys)
    write_json(run / 'config.json', read_json(run / 'config.json') | {'run': 'x'})
    with pytest.raises(UserError, match=re.escape(says)):
        view.main(view.settings([str(run)]))
    assert not (run / 'view.html').exists()


# ---- the page: what is in it cannot harm ----------------------------------------------------------------

def hostile(page):
    """The data of a page in which every text was written to do harm."""
    data = data_of(page[1])
    data['pieces'] = [[text, special] for _, special in data['pieces'] for text in [HOSTILE]]
    data['title'] = data['checkpoints'][0] = HOSTILE
    data['facts'] = [HOSTILE + 'x' * 3000] * 3
    for problem in data['problems']:
        problem |= {'set': HOSTILE, 'prompt': f'{HOSTILE}\u2028<!--', 'known': HOSTILE}
        for answer in problem['answers'] + problem['first'][1:]:
            answer['found'] = HOSTILE + 'x' * 3000
    return data


class Tags(html.parser.HTMLParser):
    """The tags of a text, as an HTML parser sees them."""
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_a_text_of_a_model_is_never_markup(page):
    """'</script>' in an answer ended the data, and what follows it was run. The page has the tags of its template whatever it
    holds, no address of anything, and its bytes are ASCII."""
    data = hostile(page)
    text = view.page_of(data, HOSTILE)
    harmless = view.page_of({'pieces': []}, 'x')
    assert Tags(text).found == Tags(harmless).found and text.isascii()
    assert not [name for _, attributes in Tags(text).found for name in attributes if name in ('src', 'href', 'style') or name.startswith('on')]
    assert json.loads(re.findall('id="data">(.*?)</script>', text)[0]) == data
    policy, = [attributes['content'] for _, attributes in Tags(text).found if attributes.get('http-equiv')]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and 'unsafe' not in policy


class Tok(SimpleNamespace):
    __hash__ = object.__hash__


def test_what_cannot_be_seen_is_shown():
    """A token that turns the direction of writing would reorder the answer, and half of a character has no text."""
    tok = Tok(words={'\u202e'.encode(): 0, b'\xe2': 1, b'\x1b[2J': 2, b'<eos>': 3, b' \n': 4, 'odd': 5},
              vocabulary=SimpleNamespace(special={3}))
    assert [view.piece_of(tok, number) for number in range(7)] == [
        ('\\u202e', False), ('\\xe2', False), ('\\x1b[2J', False), ('<eos>', True), (' \n', False), ('odd', False), ('[6]', False)]


@pytest.mark.parametrize('hidden', ['\u200b', '\u200d', '\u2060', '\xad', '\u034f', '\ufe0f', '\U000e0041', '\U000e0100', '\u3164', '\u2800',
                                    '\xa0', '\u2003', '\u3000', '\ue000', '\u0378', '\u202e', '\u2066'])
def test_no_character_is_hidden(hidden):
    """Zero-width characters, tags, fillers, other blanks and code points without a meaning stood in a prompt unseen."""
    escape = hidden.encode('unicode_escape').decode()
    assert view.without_hidden(f'a{hidden}b') == view.as_text(f'a{hidden}b') == f'a{escape}b'


def test_ordinary_texts_stay_and_heaped_accents_do_not():
    """A hundred accents on one letter covered the lines above. Two on a letter are writing."""
    for text in ('x\u0301\u0323 caf\u00e9', '\u0e17\u0e35\u0e48', '\u05e9\u05dc\u05d5\u05dd \u4f60\u597d', '\\frac{1}{2}\t\n'):
        assert view.without_hidden(text) == text
    heaped = view.without_hidden('a' + '\u0301' * 100)
    assert heaped == 'a\u0301\u0301' + '\\u0301' * 98
    assert len(view.as_text('\u200b' * 10**6)) <= 10 * view.LONGEST_TEXT


# ---- in a browser ----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def browser():
    try:
        opened = chromium.Browser(1100, 700).__enter__()
    except chromium.CannotStart as error:
        pytest.skip(f'the page is not opened: {error}')
    yield opened
    opened.__exit__()


def assert_quiet(browser, file):
    """No error, no warning, and no request but the file itself."""
    for name in ('Log.entryAdded', 'Runtime.exceptionThrown', 'Runtime.consoleAPICalled', 'Page.javascriptDialogOpening'):
        assert browser.seen(name) == []
    assert [event['request']['url'] for event in browser.seen('Network.requestWillBeSent')] == [file.resolve().as_uri()]


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def shown_tokens(data, answer):
    return [data['pieces'][piece][0] for piece in answer['tokens']]


def test_tokens_tooltip_and_slider_in_a_browser(page, browser):
    """The page is opened, a token is pointed at, and the slider is moved with a key: what is seen is what the data say."""
    _, file = page
    data = data_of(file)
    browser.open(file)
    first, second = data['problems'][0]['answers'][:2]
    assert texts(browser, 'section:first-child .token') == shown_tokens(data, first)
    assert browser.run("document.getElementById('tip').hidden") is True

    # The five likeliest tokens of both models with their probabilities.
    browser.point('section:first-child .token:nth-child(3)')
    assert browser.run("document.getElementById('tip').hidden") is False
    tip = browser.run("document.getElementById('tip').textContent")
    shares = texts(browser, '#tip .next span')
    for side, found in (('student', shares[:5]), ('teacher', shares[5:])):
        expected = [units / 100 for units in first[side][2][1::2]]
        assert all(abs(float(share.strip('<%')) - value) <= 0.051 for share, value in zip(found, expected, strict=True))
    names = texts(browser, '#tip td code')
    assert names == [data['pieces'][piece][0] for side in ('student', 'teacher') for piece in first[side][2][::2]]
    cosine = sum(layer[2] for layer in first['cos']) / 3 / view.UNIT
    assert f'token 3 of {len(first["tokens"])}' in tip and f'mean cosine {cosine:.4f}' in tip

    # Its colour is that of its number, and the slider shows the next model's answer.
    colour = "getComputedStyle(document.querySelector('section:first-child .token')).backgroundColor"
    before = browser.run(colour)
    browser.run("document.getElementById('slider').focus()")
    browser.press('ArrowRight')
    assert browser.run("document.getElementById('model').textContent") == 'step 2 (2 of 3)'
    assert texts(browser, 'section:first-child .token') == shown_tokens(data, second)
    assert shown_tokens(data, first) != shown_tokens(data, second) or browser.run(colour) != before
    browser.press('End')
    assert texts(browser, 'section:last-child .token') == shown_tokens(data, data['problems'][1]['answers'][2])

    # The same text for all models, and each of the four measures.
    choose = "(id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('change')); }"
    browser.run(f"({choose})('text', 'first')")
    assert texts(browser, 'section:first-child .token') == shown_tokens(data, first)
    seen = set()
    for measure in ('cos', 'kl', 'entropy', 'entropy_t'):
        browser.run(f"({choose})('measure', '{measure}')")
        seen.add(str(browser.run("[...document.querySelectorAll('.token')].map(e => e.style.backgroundColor)")))
        assert browser.run("document.getElementById('layer-part').hidden") is (measure != 'cos')
    assert len(seen) == 4
    assert_quiet(browser, file)


def test_map_keys_and_paper_in_a_browser(page, browser):
    """The map tells the layer under the mouse; every token is reached without a mouse; on paper a dark page is white."""
    _, file = page
    data = data_of(file)
    answer = data['problems'][0]['answers'][0]
    browser.open(file)
    n = len(answer['tokens'])
    browser.point('section:first-child canvas', x=(n - 0.5) / n, y=0.1)      # the last token, the last layer
    tip = browser.run("document.getElementById('tip').textContent")
    assert f'token {n} of {n}' in tip and f"layer 3: {answer['cos'][2][-1] / view.UNIT:.4f}" in tip
    pixel = "[...document.querySelector('canvas').getContext('2d').getImageData(%d, %d, 1, 1).data].slice(0, 3).join(', ')"
    browser.run("(e => { e.value = 2; e.dispatchEvent(new Event('change')); })(document.getElementById('layer'))")
    assert browser.run(pixel.replace("'canvas'", "'section canvas'") % (n - 1, 0)) in browser.run(
        f"document.querySelector('section:first-child .token:nth-child({n})').style.backgroundColor")

    # Keys. The tip goes with the token that has the focus.
    browser.run("document.querySelector('section:first-child .token[tabindex=\"0\"]').focus()")
    browser.press('Home')
    browser.press('ArrowRight')
    assert 'token 2 of' in browser.run("document.getElementById('tip').textContent")
    browser.press('PageDown')
    assert browser.run("document.getElementById('model').textContent") == 'step 2 (2 of 3)'
    assert browser.run("document.getElementById('tip').hidden") is False
    browser.press('Escape')
    assert browser.run("document.getElementById('tip').hidden") is True

    # Near the teacher is the end of the scale that is closest to the page: light, dark, and light again on paper.
    near = "(() => { const [r, g, b] = colour(0); return r + g + b; })()"
    page_colour = 'getComputedStyle(document.body).backgroundColor'
    assert browser.run(near) > 600 and browser.run(page_colour) == 'rgb(255, 255, 255)'
    browser.media('', 'dark')
    assert browser.run(near) < 200 and browser.run(page_colour) != 'rgb(255, 255, 255)'
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    browser.media('print', 'dark')
    assert browser.run(near) > 600 and browser.run(page_colour) == 'rgb(255, 255, 255)'
    browser.media()
    assert_quiet(browser, file)

    # Every colour of the scale has a text on it that can be read, in both modes: WCAG asks for a contrast of 4.5.
    contrast = """(() => { const span = document.createElement('span'); let worst = 21;
        const luminance = (text) => text.match(/\\d+/g).map((part) => part / 255).map(
            (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
            .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0.05);
        for (let k = 0; k <= 1000; k++) {
            paint(span, 'kl', 10 ** (4 * k / 1000 - 3));
            const [low, high] = [span.style.color, span.style.backgroundColor].map(luminance).sort((a, b) => a - b);
            worst = Math.min(worst, high / low);
        }
        return worst; })()"""
    for scheme in ('dark', 'light'):
        browser.media('', scheme)
        assert 4.5 <= browser.run(contrast) < 6

    # In a narrow window nothing is cut off.
    browser.resize(360, 700)
    assert browser.run('document.documentElement.scrollWidth') <= 360
    browser.resize(1100, 700)


def test_hostile_texts_and_the_policy_in_a_browser(page, browser, tmp_path):
    """What was written to do harm is shown letter by letter. Even a script that got into the page could not run, and nothing
    can be fetched."""
    file = tmp_path / 'hostile.html'
    file.write_text(view.page_of(hostile(page), HOSTILE))
    browser.open(file)
    assert browser.run('[document.images.length, window.hacked === undefined]') == [0, True]
    assert browser.run("document.querySelector('.token').textContent") == HOSTILE == browser.run('document.title')
    browser.point('section:first-child .token', x=0.1, y=0.1)
    assert HOSTILE.replace(' ', '\u2423') in browser.run("document.getElementById('tip').textContent")
    browser.resize(360, 700)                 # a text without a space does not widen the page
    assert browser.run('document.documentElement.scrollWidth') <= 360
    browser.resize(1100, 700)
    assert_quiet(browser, file)

    # The policy: a script, an image, a style and a request that somebody has put there.
    browser.run("""(() => { window.refused = [];
        document.addEventListener('securitypolicyviolation', event => refused.push(event.effectiveDirective));
        const script = document.createElement('script'); script.textContent = 'window.hacked = 1'; document.body.append(script);
        const image = document.createElement('img'); image.src = 'http://127.0.0.1:9/x'; document.body.append(image);
        document.body.insertAdjacentHTML('beforeend', '<p style="color: red">x</p>');
        fetch('http://127.0.0.1:9/y').catch(() => { window.over = true; }); })()""")
    end = time.monotonic() + chromium.SECONDS
    while not browser.run('window.over === true && refused.length >= 4'):
        assert time.monotonic() < end, browser.run('refused')
        time.sleep(0.05)
    assert sorted(browser.run('refused')) == ['connect-src', 'img-src', 'script-src-elem', 'style-src-attr']
    assert browser.run('window.hacked === undefined') is True


def alive(status):
    """Does the process of a file /proc/NUMBER/stat still run?"""
    try:
        return status.read_text().rpartition(') ')[2][0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize('program', ['exit 1', 'sleep 600 & echo $! > "$TMPDIR/../../child"; wait', None])
def test_a_browser_that_does_not_start_leaves_nothing(tmp_path, monkeypatch, program):
    """Its folder and its processes stayed, and the tests failed where they could only be skipped."""
    file = tmp_path / 'chromium'
    file.write_text(f'#!/bin/sh\n{program}\n')
    file.chmod(0o700 if program else 0o600)
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    monkeypatch.setattr(chromium.tempfile, 'tempdir', str(temporary))
    monkeypatch.setattr(chromium, 'FOUND', str(file))
    monkeypatch.setattr(chromium, 'SECONDS', 0.5)
    with pytest.raises(chromium.CannotStart, match='chromium: '), chromium.Browser():
        pass
    assert list(temporary.iterdir()) == []
    if (tmp_path / 'child').exists():        # it is killed; a zombie is what its new parent has not yet noticed
        status = Path('/proc', (tmp_path / 'child').read_text().strip(), 'stat')
        end = time.monotonic() + 60
        while alive(status):
            assert time.monotonic() < end, 'a process of the browser lives on'
            time.sleep(0.05)
    with pytest.raises(chromium.CannotStart, match='no chromium'):
        monkeypatch.setattr(chromium, 'FOUND', None)
        chromium.Browser().__enter__()
