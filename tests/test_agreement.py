"""studies/agreement.py: each of its numbers against transformers or a loop, on tiny models."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import rounding, tiny_model

from formats.huggingface import load_model, save_model
from formats.problems import Problem, load_problems
from formats.tokenizer import load_tokenizer
from grading.grader import grade
from rollout import naive
from studies import agreement
from support.files import read_json
from support.runtime import ROOT, UserError, start

transformers = pytest.importorskip('transformers')
PROMPTS = [[1, 5, 9], [2, 3, 4, 5, 6], [7]]
ANSWERS = [[3, 1, 4, 1, 5, 9], [2], list(range(20, 30)) * 7]         # one of one token, one longer than a chunk
SHAPE = dict(V=37, L=3, d=20, H=4, G=2, e=6, ff=28, context=128)
LAYER_MAP = {1: 2, 2: 3, 3: 5}


@pytest.fixture(scope='module')
def pair():
    """A student of three layers and a teacher of five, in float64."""
    return tiny_model(0, **SHAPE).double(), tiny_model(1, **SHAPE | {'L': 5}).double()


def brute_force(student, teacher, prompt, answer, layer_map, vocab):
    """One position at a time: each model reads the text up to it and no further."""
    sums = {'kl': 0.0, 'same': 0, 'surprise': 0.0} | {f'cosine/{l}': 0.0 for l in layer_map}
    for t, token in enumerate(answer):
        ids = torch.tensor([prompt + answer[:t]])
        z_s, z_t = (model(ids)[0, -1, :vocab].tolist() for model in (student, teacher))
        logp, logq = ([x - math.log(sum(map(math.exp, z))) for x in z] for z in (z_s, z_t))
        sums['kl'] += sum(math.exp(a) * (a - b) for a, b in zip(logp, logq, strict=True))
        sums['same'] += z_s.index(max(z_s)) == z_t.index(max(z_t))
        sums['surprise'] -= logp[token]
        states_s, states_t = student.hidden(ids, [1, 2, 3]), teacher.hidden(ids, [1, 2, 3, 4, 5])
        for l, layer_t in layer_map.items():
            a, b = states_s[l - 1][0, -1].tolist(), states_t[layer_t - 1][0, -1].tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            sums[f'cosine/{l}'] += dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sums


@torch.no_grad()
def test_all_sums_equal_a_loop_over_positions(pair):
    """In float64, by plain Python from the definitions. A column too far right, the stop token left out, the padded ids
    compared, a layer of the wrong model or a chunk forgotten: each changes a sum."""
    for prompt, answer, vocab in zip(PROMPTS, ANSWERS, (31, 37, 37), strict=True):
        got = agreement.answer_sums(*pair, prompt, answer, LAYER_MAP, vocab)
        wanted = brute_force(*pair, prompt, answer, LAYER_MAP, vocab)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert got[name] == pytest.approx(value, rel=1e-10, abs=1e-10), name
    assert len(ANSWERS[2]) > agreement.HEAD_ROWS


@torch.no_grad()
def test_sums_equal_transformers(tmp_path):
    """Saved, loaded by transformers, its logits, hidden_states and loss. It computes in float32, so do we."""
    folders = [tmp_path / 's', tmp_path / 't']
    for seed, folder in enumerate(folders):
        save_model(tiny_model(seed, **SHAPE), folder)
    ours = [load_model(folder) for folder in folders]
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    prompt, answer = PROMPTS[1], ANSWERS[0]
    ids = torch.tensor([prompt + answer])
    at = slice(len(prompt) - 1, -1)
    out_s, out_t = (model(ids, output_hidden_states=True) for model in theirs)
    p, q = (torch.distributions.Categorical(logits=out.logits[0, at].double()) for out in (out_s, out_t))
    got = agreement.answer_sums(*ours, prompt, answer, {1: 1, 3: 3}, 37)

    # A logit is off by its rounding, and the logarithm of a probability by that of two.
    bound = rounding(out_s.logits, 1000) * len(answer)
    assert abs(got['kl'] - torch.distributions.kl_divergence(p, q).sum()) < bound
    labels = ids.clone()
    labels[0, :len(prompt)] = -100
    loss = theirs[0](ids, labels=labels).loss                    # a mean over the tokens that have a label
    assert abs(got['surprise'] / len(answer) - loss) < bound
    assert got['same'] == (p.logits.argmax(-1) == q.logits.argmax(-1)).sum()
    for l in (1, 3):
        cosine = torch.cosine_similarity(out_s.hidden_states[l][0, at].double(), out_t.hidden_states[l][0, at].double(), dim=-1)
        assert abs(got[f'cosine/{l}'] - cosine.sum()) < bound


def test_a_model_beside_itself_agrees_everywhere(pair):
    sums = agreement.text_sums(pair[1], pair[1], PROMPTS, ANSWERS, {l: l for l in range(1, 6)}, 37)
    assert sums['tokens'] == sums['same'] == [6, 1, 70] and sum(sums['kl']) == 0
    scores = agreement.scores_of(sums)
    assert scores['same'] == (1, 0) and scores['cosine'] == pytest.approx((1, 0), abs=1e-12)


def test_means_are_over_positions_and_errors_over_prompts():
    """By hand, and the error against a simulation: if positions counted as independent, it would come out at half."""
    mean, error = agreement.mean_and_error([2.0, 9.0], [1, 3])
    assert mean == 11 / 4
    # Residuals 2 - 2.75 and 9 - 8.25; their squares times n / (n - 1); divided by the square of all positions.
    assert error == pytest.approx(math.sqrt(2 * (0.75**2 + 0.75**2)) / 4)
    assert math.isnan(agreement.mean_and_error([1.0], [2])[1])

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (2000, 30), generator=generator)
    levels = torch.randn(2000, 30, generator=generator, dtype=torch.float64)     # all positions of a prompt share one
    found = [agreement.mean_and_error((row * n).tolist(), n.tolist()) for row, n in zip(levels, lengths, strict=True)]
    spread = torch.tensor([mean for mean, _ in found]).std().item()
    typical = torch.tensor([error for _, error in found]).square().mean().sqrt().item()
    # The standard deviation of 2,000 means is known to 1 / sqrt(4000) = 1.6%; the formula is short by about 1 / 30.
    assert 0.9 < typical / spread < 1.06


def test_scores_are_ratios_of_sums():
    sums = {'tokens': [1, 3], 'kl': [2.0, 9.0], 'same': [1, 1], 'surprise': [0.5, 0.5], 'cosine/1': [1.0, 3.0], 'cosine/2': [0.0, 1.5]}
    scores = agreement.scores_of(sums)
    assert [scores[name][0] for name in ('kl', 'same', 'surprise', 'cosine/1', 'cosine/2')] == [2.75, 0.5, 0.25, 1.0, 0.375]
    assert scores['cosine'][0] == 0.6875 and 'tokens' not in scores
    assert 'cosine' not in agreement.scores_of({'tokens': [2], 'kl': [1.0]})


@torch.no_grad()
def test_texts_are_those_of_the_naive_sampler(monkeypatch):
    """Greedy and sampled, in groups of two slots. The number of a prompt, and not its place in a group, names its random
    numbers: the second group would repeat those of the first."""
    model = tiny_model(0, **SHAPE)
    for temperature in (0.0, 1.0):
        wanted = naive(model, PROMPTS, max_new_tokens=9, stop=[5], vocab=30, temperature=temperature, seed=4).answers()
        monkeypatch.setattr(agreement, 'SLOTS', 2)
        assert agreement.write(model, PROMPTS, 9, [5], 30, temperature, seed=4) == wanted


# ---- the files of questions --------------------------------------------------------------------------

FILES = {name: [json.loads(line) for line in (ROOT / f'studies/heal/{name}.jsonl').read_text().splitlines()]
         for name in ('train', 'test', 'exact')}


def words_of(question):
    return set(''.join(letter if letter.isalnum() else ' ' for letter in question.casefold()).split())


def test_the_questions_are_short_of_many_kinds_and_no_two_alike():
    """Two alike, one to train on and one held out, would make a held-out score a training score."""
    assert {name: len(rows) for name, rows in FILES.items()} == {'train': 360, 'test': 40, 'exact': 48}
    rows = FILES['train'] + FILES['test']
    assert len({row['kind'] for row in rows}) == 20 and {row['kind'] for row in FILES['test']} == {row['kind'] for row in FILES['train']}
    questions = [row['question'] for row in rows] + [row['messages'][-1]['content'] for row in FILES['exact']]
    assert max(map(len, questions)) < 120 and all(question == question.strip() and question.isascii() for question in questions)
    sets = [words_of(question) for question in questions]
    for i, one in enumerate(sets):
        for other in sets[:i]:
            assert one != other
    # Of an open question a held-out twin with most of its words would be nearly as bad; exact questions share their form.
    held_out = [words_of(row['question']) for row in FILES['test']]
    for row in FILES['train']:
        one = words_of(row['question'])
        assert all(len(one & other) / len(one | other) < 0.7 for other in held_out), row


def test_exact_answers_can_be_graded():
    """By the grader of eval_math.py, in the form that the two answered questions before each show."""
    for row in FILES['exact']:
        assert [message['role'] for message in row['messages']] == ['user', 'assistant'] * 2 + ['user']
        assert all(message['content'].startswith('Answer: ') for message in row['messages'][1::2])
        assert grade(f'Answer: {row["answer"]}', row['answer']) and not grade('Answer: 1000', row['answer'])


# ---- the script --------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def folders(tmp_path_factory, toy_cfg):
    """{name: folder}: the toy's teacher, its student, and a student of another width."""
    tmp = tmp_path_factory.mktemp('models')
    save_model(tiny_model(3, **SHAPE | {'V': 21, 'd': 28}), tmp / 'wide', source=toy_cfg['teacher'])
    return {'teacher': toy_cfg['teacher'], 'student': toy_cfg['student'], 'wide': str(tmp / 'wide')}


def arguments(tmp_path, folders, **options):
    """A command line as `parsed` returns it, with problems of the toy: three held-out ones, two with answers."""
    (tmp_path / 'prompts.jsonl').write_text(''.join(f'{{"question": "{q}"}}\n' for q in ('1+2', '3*4', '5-6')))
    (tmp_path / 'exact.jsonl').write_text('{"question": "1+2", "answer": "3"}\n{"question": "2+2", "answer": "4"}\n')
    return SimpleNamespace(**dict(teacher=folders['teacher'], students=[folders['student'], folders['wide']],
                                  prompts=str(tmp_path / 'prompts.jsonl'), exact=str(tmp_path / 'exact.jsonl'), tokens=12,
                                  layer_map='', seed=0, show=2, out=str(tmp_path / 'out/a.json'), device='cpu', dtype='float32') | options)


@torch.no_grad()
def test_the_script_writes_what_its_parts_measure(folders, tmp_path, capsys):
    """Table and JSON of two students and the teacher: the numbers of the functions above on texts of the naive sampler."""
    args = arguments(tmp_path, folders)
    agreement.main(args)
    said, found = capsys.readouterr().out, read_json(args.out)
    assert [model['model'] for model in found['models']] == [folders['student'], folders['wide'], folders['teacher']]
    tok, teacher, student = load_tokenizer(folders['teacher']), load_model(folders['teacher']), load_model(folders['student'])
    prompts = [tok.chat(question) for question in ('1+2', '3*4', '5-6')]
    text = naive(teacher, prompts, max_new_tokens=12, stop=tok.stop_ids, temperature=0.0, vocab=21).answers()
    own = naive(student, prompts, max_new_tokens=12, stop=tok.stop_ids, temperature=1.0, vocab=21).answers()
    same_numbers = {l: l for l in range(1, 4)}
    first, wide, itself = found['models']
    for name, answers in (('teacher_text', text), ('own_samples', own)):
        sums = agreement.text_sums(student, teacher, prompts, answers, same_numbers, 21)
        # Batches of other shapes round otherwise; the texts are the same, so these are differences of roundings.
        assert first['by_prompt'][name].keys() == sums.keys()
        for key, values in sums.items():
            assert first['by_prompt'][name][key] == pytest.approx(values, rel=1e-4, abs=1e-5), (name, key)
        mean = sum(sums['kl']) / sum(sums['tokens'])
        assert first['scores'][name]['kl'][0] == pytest.approx(mean, rel=1e-4) and f'{mean:.3f} +-' in said
    assert first['layer_map'] == {'1': 1, '2': 2, '3': 3} and wide['layer_map'] == {} and 'the widths differ' in said
    assert 'cosine' in first['scores']['own_samples'] and 'cosine' not in wide['scores']['own_samples']

    # Accuracy by hand, and the teacher beside itself.
    exact = [Problem(q, a, tok.chat(q)) for q, a in (('1+2', '3'), ('2+2', '4'))]
    written = naive(student, [problem.ids for problem in exact], max_new_tokens=16, stop=tok.stop_ids, temperature=0.0, vocab=21)
    right = sum(grade(tok.decode(ids), p.answer) for ids, p in zip(written.answers(), exact, strict=True))
    assert (first['right'], first['asked']) == (right, 2)
    assert itself['scores']['teacher_text']['kl'][0] < 1e-12 and itself['scores']['teacher_text']['same'][0] == 1
    assert [example['question'] for example in found['examples']] == ['1+2', '3*4']
    assert found['examples'][0]['teacher'] == tok.decode(text[0]) and tok.decode(text[0]) in said


def test_right_answers_are_counted_by_the_grader(monkeypatch):
    """Greedy answers, one verdict each in the order of the problems."""
    problems = [Problem('a', 'Paris', [1]), Problem('b', '7', [2]), Problem('c', '12', [3])]
    texts = {(1,): 'Answer: Paris', (2,): 'Answer: 8', (3,): 'It is easy.\nAnswer: 12'}
    monkeypatch.setattr(agreement, 'write', lambda model, prompts, tokens, stop, vocab: prompts)
    tokenizer = SimpleNamespace(decode=lambda ids: texts[tuple(ids)])
    assert agreement.right_answers(None, tokenizer, problems, [0], 9) == [True, False, True]


def test_what_cannot_be_compared_is_refused_before_any_work(folders, tmp_path, monkeypatch):
    """Another vocabulary, a question without an answer, a pruned student that fits no teacher layer."""
    monkeypatch.setattr(agreement, 'load_model', lambda *a: pytest.fail('work'))
    args = arguments(tmp_path, folders, layer_map='kept')
    with pytest.raises(UserError, match='has no kept_layers'):
        agreement.read_task(args, start('cpu'))
    args.exact = args.prompts
    with pytest.raises(UserError, match='without an answer cannot be graded'):
        agreement.read_task(args, start('cpu'))


def test_a_pruned_student_is_compared_by_what_it_kept():
    c = SimpleNamespace(d=8, L=2, hf={'kept_layers': [1, 3]})
    teacher = SimpleNamespace(d=8, L=4, hf={})
    assert agreement.pairs_of_layers(c, teacher, '') == {1: 1, 2: 4} == agreement.pairs_of_layers(c, teacher, 'depth')
    c = SimpleNamespace(d=8, L=3, hf={'kept_layers': [1, 2, 4]})
    assert agreement.pairs_of_layers(c, teacher, '') == {1: 1, 2: 2, 3: 4} != agreement.pairs_of_layers(c, teacher, 'depth')
    assert agreement.pairs_of_layers(SimpleNamespace(d=9, L=3, hf={}), teacher, '') == {}


def test_the_questions_load_as_a_training_and_an_evaluation_set(toy_cfg):
    """By the columns of docs/data.md: no row is lost, and only the exact ones have answers."""
    tok = load_tokenizer(toy_cfg['student'])
    for name, count in (('train', 360), ('test', 40), ('exact', 48)):
        problems = load_problems(ROOT / f'studies/heal/{name}.jsonl', tok, show=False)
        assert len(problems) == count and all((p.answer is None) == (name != 'exact') for p in problems)
