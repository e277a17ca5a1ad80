"""Vocabularies and models in the formats of published ones: small ones that are made here, and the real ones where
they are at hand (skipped, with the reason, where not). Both go through the same tests.

    small: vocabularies trained here on `mixed_text`, and a random Llama with the smallest of them
    shared/tokenizers, shared/data beside the project: Qwen and o200k vocabularies, AIME, AIMO, DAPO-Math
    SMOLLM2=folder made by tests/smollm2.py: SmolLM2-135M-Instruct
"""
import base64
import gzip
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import rounding, tiny_model
from test_pairing import brute_force
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from configs import load_config
from cross_tokenizer.pairing import pair_text
from distill import main
from formats.huggingface import load_model, save_model
from formats.problems import load_problems
from formats.tokenizer import TIKTOKEN, byte_alphabet, load_tokenizer
from model import Model, ModelConfig, init_weights
from rollout import sample
from support.files import write_json
from support.runtime import ROOT, UserError

transformers = pytest.importorskip('transformers')
SHARED = ROOT.parent / 'shared'
SMOL = Path(os.environ.get('SMOLLM2', '/nowhere'))
needs_vocabularies = pytest.mark.skipif(not (SHARED / 'tokenizers').exists(), reason='no shared/tokenizers beside the project')
needs_data = pytest.mark.skipif(not (SHARED / 'data').exists(), reason='no shared/data beside the project')
needs_smollm2 = pytest.mark.skipif(not SMOL.exists(), reason='SMOLLM2= is not set; see tests/smollm2.py')


def mixed_text(lines=1000):
    """Mathematics, code, Chinese, emoji, combining marks, odd whitespace; seeded."""
    rng = random.Random(0)
    pieces = ['\\frac{a}{b} = \\sqrt{x^2+y^2}', '数学题：求最大值。', '🙂👩‍👩‍👧🇫🇷', 'e\u0301\u0323', '  \t', 'def f(x):\n    return x**2',
              '3.14159', "don't we'll I'M", '١٢٣', 'ß ﬁ Ǆ', '\u00a0\u3000', 'http://a.b/c?d=e&f', '$$\\int_0^1 x\\,dx$$', '…—“”',
              'ÅNGSTRÖM', '1234567890', 'x²+y₃', '\r\n', 'HTMLParser2Go', 'नमस्ते', '한국어', '#!/bin/sh', "'s'T'RE"]
    return [' '.join(rng.sample(pieces, rng.randrange(1, 7))) + rng.choice(['', ' ', '\n', '  \n\n']) for _ in range(lines)]


CHAT = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def write_vocabulary_folder(folder, name, data, eos):
    """A model folder's text side: NAME.tiktoken, the end token, a chat template."""
    folder.mkdir()
    (folder / name).write_bytes(data)
    write_json(folder / 'generation_config.json', {'eos_token_id': eos})
    (folder / 'chat_template.jinja').write_text(CHAT)
    return folder


@pytest.fixture(scope='module')
def real_folders(tmp_path_factory):
    """{file name: model folder} of the published vocabularies."""
    tmp = tmp_path_factory.mktemp('real')
    out = {}
    for name, eos in (('qwen.tiktoken', 151645), ('o200k_base.tiktoken', 199999)):
        source = SHARED / 'tokenizers' / name
        data = source.read_bytes() if source.exists() else gzip.decompress(source.with_name(name + '.gz').read_bytes())
        out[name] = write_vocabulary_folder(tmp / name.split('.')[0], name, data, eos)
    return out


def train(text, size, pieces, normalizer=None, special=()):
    """A byte-level BPE of `size` tokens, all 256 bytes among them. pieces: the pre-tokenizer."""
    tok = HFTokenizer(models.BPE())
    tok.normalizer = normalizer
    tok.pre_tokenizer = pieces
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(text, trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


@pytest.fixture(scope='module')
def small_tiktoken(tmp_path_factory):
    """{file name: (model folder, its row of TIKTOKEN)}: the published patterns, special tokens and Unicode forms, with a
    few hundred ranks that are learnt here. One file has its special tokens behind a hole in the ids, as o200k has."""
    tmp = tmp_path_factory.mktemp('small')
    alphabet = byte_alphabet()
    out = {}
    for name, size in (('qwen.tiktoken', 420), ('o200k_base.tiktoken', 560)):
        _, pattern, special, form = TIKTOKEN[name]
        pieces = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), 'isolated'),
                                          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        vocabulary = train(mixed_text(300), size, pieces).get_vocab()
        words = sorted(vocabulary, key=vocabulary.get)
        lines = [base64.b64encode(bytes(alphabet[c] for c in word)) + b' %d' % rank for rank, word in enumerate(words)]
        first = len(words) + ('o200k' in name)
        special = {word: first + i for i, word in enumerate(special)}
        folder = write_vocabulary_folder(tmp / name.split('.')[0], name, b'\n'.join(lines) + b'\n', max(special.values()))
        out[name] = folder, (len(words), pattern, special, form)
    return out


@pytest.fixture(params=['small', pytest.param('real', marks=needs_vocabularies)])
def folders(request, monkeypatch):
    """{file name: model folder}, of the small vocabularies or the published ones."""
    if request.param == 'real':
        return request.getfixturevalue('real_folders')
    small = request.getfixturevalue('small_tiktoken')
    for name, (_, row) in small.items():
        monkeypatch.setitem(TIKTOKEN, name, row)
    return {name: folder for name, (folder, _) in small.items()}


@pytest.fixture(scope='module')
def small_model(tmp_path_factory):
    """A folder like SmolLM2's: single digits, NFC, added special tokens, a chat template; three random layers."""
    tmp = tmp_path_factory.mktemp('model')
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    pieces = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok = train([*mixed_text(200), TEXT, *QUESTIONS], 480, pieces, normalizers.NFC(), special)
    tok.add_tokens([AddedToken('<think>', special=False, normalized=False)])
    size = tok.get_vocab_size()
    c = ModelConfig('llama', V=size + 7, L=3, d=48, H=4, G=2, e=12, ff=96, theta=1e4, context=512)
    model = init_weights(Model(c), 0)
    with torch.no_grad():
        model.head.weight[size:] = 0.0       # published models round V up; the greedy token is never one of these
    save_model(model, tmp / 'm')
    tok.save(str(tmp / 'm/tokenizer.json'))
    write_json(tmp / 'm/tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|im_end|>', 'bos_token': '<|im_start|>', 'chat_template': CHAT,
        'clean_up_tokenization_spaces': False})
    write_json(tmp / 'm/generation_config.json', {'eos_token_id': 2})
    return tmp / 'm'


@pytest.fixture(params=['small', pytest.param('smollm2', marks=needs_smollm2)])
def model_folder(request):
    return SMOL if request.param == 'smollm2' else request.getfixturevalue('small_model')


@pytest.mark.parametrize('name', list(TIKTOKEN))
def test_tiktoken_vocabularies_equal_transformers(folders, name, monkeypatch):
    """1,000 lines of mixed text: ids equal to transformers' own conversion of the file, with the pattern
    and the normalisation that the reference libraries publish; text and byte offsets come back exactly."""
    import tiktoken_ext.openai_public as openai
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
    tok = load_tokenizer(folders[name])
    monkeypatch.setattr(openai, 'load_tiktoken_bpe', lambda *a, **k: {})
    published = openai.o200k_base()
    special = TIKTOKEN[name][2]
    if TIKTOKEN[name][0] > 100_000:          # the published ids
        known = published['special_tokens'] if 'o200k' in name else {'<|endoftext|>': 151643, '<|im_end|>': 151645}
        assert {word: special[word] for word in known} == known
    ref = TikTokenConverter(vocab_file=str(folders[name] / name), extra_special_tokens=list(special),
                            pattern=published['pat_str'] if 'o200k' in name else PRETOKENIZE_REGEX).converted()
    if 'qwen' in name:
        ref.normalizer = normalizers.NFC()
    for line in mixed_text():
        ids = tok.encode(line)
        assert ids == ref.encode(line, add_special_tokens=False).ids
        text = unicodedata.normalize('NFC', line) if 'qwen' in name else line
        assert tok.decode(ids) == text
        ends = tok.byte_ends(ids)
        assert ends[-1] == len(text.encode()) and all(
            tok.vocabulary.core.decode_bytes(ids[:i + 1]) == text.encode()[:end] for i, end in enumerate(ends))
    for word, i in special.items():
        assert tok.encode(word) == [i]
    assert tok.encode('<|endoftext|>') == [special['<|endoftext|>']] and tok.byte_ends([special['<|endoftext|>']]) == [0]


@pytest.mark.parametrize('name', list(TIKTOKEN))
def test_a_tiktoken_vocabulary_travels_with_the_model_and_must_be_whole(folders, name, tmp_path):
    save_model(tiny_model(), tmp_path / 'm', source=folders[name])
    tok = load_tokenizer(tmp_path / 'm')
    assert tok.encode('x²+1') == load_tokenizer(folders[name]).encode('x²+1')
    assert tok.decode([tok.size - 1, tok.size - 2, *tok.encode('a')]) == 'a'      # special, or a hole in the ids
    lines = (tmp_path / 'm' / name).read_bytes().splitlines(keepends=True)
    (tmp_path / 'm' / name).write_bytes(b''.join(lines[:300]))
    with pytest.raises(UserError, match='300 tokens, but this vocabulary has'):
        load_tokenizer(tmp_path / 'm')
    (tmp_path / 'm' / name).write_bytes(b'YQ== zero\n')
    with pytest.raises(UserError, match='not a tiktoken file'):
        load_tokenizer(tmp_path / 'm')
    (tmp_path / 'm' / name).rename(tmp_path / 'm/unknown.tiktoken')
    with pytest.raises(UserError, match='unknown.tiktoken: the pattern that cuts its text is not known'):
        load_tokenizer(tmp_path / 'm')


def test_chat_prompt_of_a_tiktoken_model(folders):
    tok = load_tokenizer(folders['qwen.tiktoken'])
    start, end = (TIKTOKEN['qwen.tiktoken'][2][word] for word in ('<|im_start|>', '<|im_end|>'))
    assert tok.chat('hi')[0] == start and tok.chat('hi').count(end) == 1 and tok.stop_ids == [end]
    assert start in tok.encode('<|im_start|>') and start not in tok.encode('<|im_start|>', special=False)


@needs_vocabularies
def test_ids_of_qwens_special_tokens(real_folders):
    tok = load_tokenizer(real_folders['qwen.tiktoken'])
    assert tok.chat('hi')[0] == 151644 and tok.chat('hi').count(151645) == 1 and tok.stop_ids == [151645]


@needs_data
@needs_vocabularies
def test_problem_sets(real_folders, capsys):
    """The verl layout as published; repeated questions once, long prompts left out, both counted."""
    tok = load_tokenizer(real_folders['qwen.tiktoken'])
    sets = {name: load_problems(SHARED / 'data' / f'{name}.parquet', tok) for name in ('AIME24', 'AIME25', 'AIMO')}
    assert {k: len(v) for k, v in sets.items()} == {'AIME24': 30, 'AIME25': 30, 'AIMO': 83}
    assert sets['AIME24'][0].answer == '204' and sets['AIMO'][0].answer == '142.0'
    assert tok.decode(sets['AIME25'][0].ids).startswith('user\nFind the sum of all integer bases')
    capsys.readouterr()
    dapo = load_problems(SHARED / 'data/dapo-math-17k.parquet', tok, longest=256)
    said = capsys.readouterr().out
    assert '17917 rows' in said and 'repeated' in said and 'longer than 256 tokens' in said
    assert len({json.dumps(p.question) for p in dapo}) == len(dapo) > 15_000
    assert max(len(p.ids) for p in dapo) <= 256 and all(p.answer for p in dapo)


# ---- a small model, and SmolLM2-135M-Instruct -------------------------------------------------------

QUESTIONS = ['What is the capital of France?', 'Add 17 and 25.', 'Write a haiku about rain.', 'Qui es-tu ?',
             'List three primes.', 'Explain gravity to a child.', 'Translate "good morning" to Spanish.',
             'def fib(n):', 'Why is the sky blue?', '2, 4, 8, 16, what comes next?']
TEXT = ('A representation is a way of writing something down. The same quantity may be written in many ways, and '
        'what is easy in one of them is hard in another: 3 + 4 = 7, but VII is III and IV. ') * 3


def test_a_models_tokenizer_equals_transformers(model_folder):
    """1,000 lines, byte offsets, and the chat template."""
    ours, theirs = load_tokenizer(model_folder), transformers.AutoTokenizer.from_pretrained(model_folder)
    for line in mixed_text():
        ids = ours.encode(line)
        assert ids == theirs.encode(line, add_special_tokens=False)
        assert ours.byte_ends(ids)[-1] == len(ours.normal(line).encode())
    for q in QUESTIONS:
        talk = [{'role': 'user', 'content': q}]
        assert ours.render(q) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


def test_a_pretrained_model_equals_transformers(model_folder):
    """Greedy text of ten prompts, 64 tokens each, and the perplexity of a fixed text to four digits."""
    tok, ours = load_tokenizer(model_folder), load_model(model_folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    prompts = [tok.chat(q) for q in QUESTIONS]
    roll = sample(ours, prompts, max_new_tokens=64, stop=tok.stop_ids, temperature=0.0, vocab=tok.size)
    for prompt, answer in zip(prompts, roll.answers(), strict=True):
        ref = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=tok.stop_ids)
        assert answer == ref[0, len(prompt):].tolist()
    ids = torch.tensor([tok.encode(TEXT)])
    with torch.no_grad():
        loss = [torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:]).exp() for x in (ours(ids), theirs(ids).logits)]
    assert abs(loss[0] - loss[1]) < 5e-5 * loss[1] and 2 < loss[0] < (60 if model_folder == SMOL else 2 * tok.size)


def test_a_pretrained_model_learns_from_its_unperturbed_self(model_folder, tmp_path):
    """A few steps of the whole loop (SmolLM2: with the real 49k vocabulary): the student is the model with noise on
    its weights, the teacher the model itself; the cosine rises."""
    noisy, g = load_model(model_folder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in noisy.parameters():
            if p.ndim == 2 and p is not noisy.embed.weight:
                p += 0.15 * p.std() * torch.randn(p.shape, generator=g)
    save_model(noisy, tmp_path / 'student', model_folder)
    how = ['steps=5', 'lr=1e-4'] if model_folder == SMOL else ['steps=8', 'lr=3e-4']
    (tmp_path / 'q.jsonl').write_text(''.join(json.dumps({'question': q}) + '\n' for q in QUESTIONS))
    main(load_config([f'student={tmp_path / "student"}', f'teacher={model_folder}', f'data={tmp_path / "q.jsonl"}', *how,
                      'warmup=0', 'prompts_per_step=2', 'n=2', 'max_new_tokens=24', f'out_dir={tmp_path / "r"}']))
    rows = [json.loads(line) for line in (tmp_path / 'r/log.jsonl').read_text().splitlines()][1:]
    assert rows[-1]['rep/cos'] > rows[0]['rep/cos'] + 0.01 and rows[-1]['loss'] < rows[0]['loss']

    # What was learned is what transformers loads: equal logits but for the rounding of L blocks.
    ours = load_model(tmp_path / 'r/last')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'r/last', dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(model_folder).encode(TEXT)])
    with torch.no_grad():
        logits = ours(ids)
        assert (logits - theirs(ids).logits).norm() <= rounding(logits, 300 * ours.config.L)
        assert not torch.equal(logits, noisy(ids))


# ---- text pairing on real vocabularies -----------------------------------------------------------

NAMES = [('qwen.tiktoken', 'o200k_base.tiktoken'), ('o200k_base.tiktoken', 'qwen.tiktoken'), ('qwen.tiktoken', 'a model'),
         ('a model', 'o200k_base.tiktoken')]


@pytest.mark.parametrize('pair', NAMES, ids=' to '.join)
def test_pairing_is_exact(folders, small_model, pair):
    """Texts of mathematics, code, Chinese, emoji and combining marks, all prefixes: the floor state and its class. Texts
    that the teacher's tokenizer rewrites (NFC) are in test_pairing.py."""
    folders = folders | {'a model': SMOL if SMOL.exists() else small_model}
    tok_s, tok_t = (load_tokenizer(folders[name]) for name in pair)
    is_real = tok_s.size > 100_000
    checked = 0
    for text in mixed_text(2000 if is_real else 300):
        text = tok_t.normal(tok_s.normal(text))[:120]
        answer = tok_s.encode(text, special=False) + tok_s.stop_ids[:1]
        ids, at, inside, _ = pair_text(answer, tok_s, [7, 7], tok_t)
        assert list(zip(at - 1, inside, strict=True)) == brute_force(answer, tok_s, ids[2:], tok_t), text
        checked += len(answer)
    assert checked > (40_000 if is_real else 4000)


@needs_vocabularies
@needs_data
def test_share_of_exactly_paired_positions_on_mathematics(real_folders):
    """Qwen read by o200k: most positions of real mathematics text end where a teacher token does."""
    tok_s, tok_t = (load_tokenizer(real_folders[name]) for name in TIKTOKEN)
    exact = []
    for p in load_problems(SHARED / 'data/AIMO.parquet', tok_s):
        text = p.question if isinstance(p.question, str) else p.question[0]['content']
        exact += list(~pair_text(tok_s.encode(text), tok_s, [0], tok_t)[2])
    assert len(exact) > 5000 and 0.9 < sum(exact) / len(exact) < 0.98
