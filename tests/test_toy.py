"""The toy's arithmetic, split and folder."""
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY, argv, for_script

from configs import load_config
from cross_tokenizer.pairing import pair_text
from formats.huggingface import load_model
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer
from grading.grader import grade
from studies import toy
from support.files import read_json, write_json
from support.runtime import ROOT, UserError, start


def test_worked_answers_are_right():
    """Every line of the working and the box, against Python's own arithmetic on each step."""
    rng = random.Random(1)
    for _ in range(300):
        question, work, value = toy.problem(rng, 6)
        *lines, box = work.split(';')
        assert len(lines) == 6 and box == f'\\boxed{{{value}}}' and grade(work, value)
        carried = question[0]
        for line, op, x in zip(lines, question[1::2], question[2::2], strict=True):
            left, right = line.split('=')
            a, b = int(carried), int(x)
            assert left == f'{carried}{op}{x}' and not (op == '*' and b < 2)
            carried = right
            assert int(right) == {'+': a + b, '-': a - b, '*': a * b}[op] % 10
        assert carried == value


def test_held_out_questions_are_never_trained_on():
    held = {q for q, _, _ in toy.problems(300, 2, 0, held_out=True)}
    assert not held & {q for seed in range(3) for q, _, _ in toy.problems(2000, 2, seed)}


def test_tokenizer_is_21_characters_and_lengths_are_known(toy_cfg):
    tok = load_tokenizer(toy_cfg['student'])
    assert tok.size == len(tok.words) == 21 and tok.stop_ids == [2]
    question, work, _ = toy.problem(random.Random(0), 6)
    assert len(tok.chat(question)) == 15 and len(tok.encode(work)) == 39
    assert tok.decode(tok.chat(question)) == f'{question}=' and tok.decode(tok.encode(work) + [2]) == work
    assert tok.byte_ends(tok.encode('7;\\boxed{0}') + [2]) == [1, 2, 9, 10, 11, 11]


def test_folder_is_reused_and_mended(toy_dir, toy_cfg, capsys, tmp_path):
    """Same recipe: reused. A damaged weight file: made again, and the same numbers come out."""
    cfg = load_config(argv(tmp_path, 'unused'))
    env = start('cpu')
    paths = toy.prepare(cfg, env)
    first = load_model(paths['teacher'])
    for a, b in zip(first.parameters(), load_model(toy_cfg['teacher']).parameters(), strict=True):
        assert torch.equal(a, b)                          # made twice, in two places: bit for bit
    capsys.readouterr()
    toy.prepare(cfg, env)
    assert 'making' not in capsys.readouterr().out
    file = toy.folder_of(cfg) / 'teacher/model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    toy.prepare(cfg, env)
    assert 'cannot be used' in capsys.readouterr().out
    assert torch.equal(load_model(paths['teacher']).head.weight, first.head.weight)
    shutil.rmtree(paths['student'])
    assert not toy.is_made(cfg)


def test_a_folder_of_models_of_another_shape_is_not_reused(tmp_path, capsys, monkeypatch):
    """After the preset's activation was edited, models trained with the old one were used without a word, and the
    folder went on saying "silu"."""
    cfg = load_config(argv(tmp_path, 'unused', toy_student_steps=1, toy_teacher_steps=1))
    toy.prepare(cfg, start('cpu'))
    monkeypatch.setitem(toy.PRESETS, 'toy', replace(toy.PRESETS['toy'], activation='gelu'))
    assert not toy.is_made(cfg) and 'its student has another shape' in capsys.readouterr().out
    paths = toy.prepare(cfg, start('cpu'))
    assert toy.is_made(cfg) and load_model(paths['teacher']).config.activation == 'gelu'


def test_models_that_other_code_made_are_used_with_a_line(tmp_path, capsys, monkeypatch):
    """After an edit in model.py the models of the old code were used without a word. The line names the file and what to do;
    nothing is trained again, and the folder keeps saying what made it. Deleted, as the line says, it is made anew."""
    cfg = load_config(argv(tmp_path, 'unused', toy_student_steps=1, toy_teacher_steps=1))
    toy.prepare(cfg, start('cpu'))
    folder = toy.folder_of(cfg)
    made = {file: file.read_bytes() for file in folder.rglob('*') if file.is_file()}
    capsys.readouterr()
    toy.prepare(cfg, start('cpu'))
    assert capsys.readouterr().out == ''

    edited = toy.source_digests() | {'model.py': 'edited', 'rollout.py': 'edited', 'new.py': 'new'}
    monkeypatch.setattr(toy, 'source_digests', lambda: edited)
    for _ in range(2):
        toy.prepare(cfg, start('cpu'))
        assert capsys.readouterr().out == (f'toy: model.py changed since its models were made; to make it again (about two '
                                           f'minutes), delete {folder}\n')
    assert toy.is_made(cfg) and made == {file: file.read_bytes() for file in folder.rglob('*') if file.is_file()}
    shutil.rmtree(folder)
    toy.prepare(cfg, start('cpu'))
    assert 'changed since' not in capsys.readouterr().out
    assert read_json(folder / 'recipe.json')['sources']['model.py'] == 'edited'


@pytest.mark.parametrize('sources', [None, {}, [], {'model.py': ['x']}])
def test_models_of_a_version_that_noted_no_code_are_used_with_a_line(toy_dir, toy_cfg, capsys, tmp_path, sources):
    """Its recipe.json holds the recipe alone, or something else under that name."""
    cfg = load_config(argv(tmp_path, 'unused'))
    folder = toy.folder_of(cfg)
    shutil.copytree(toy.folder_of(load_config(argv(toy_dir, 'unused'))), folder)
    write_json(folder / 'recipe.json', toy.recipe(cfg) | ({} if sources is None else {'sources': sources}))
    toy.prepare(cfg, start('cpu'))
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and f'delete {folder}' in printed and 'making' not in printed


def test_the_folder_of_the_toy_is_the_one_that_documents_name():
    """Its name is a digest of the recipe: what is noted besides must not change it."""
    name = toy.folder_of(load_config(['configs/toy.py'])).name
    assert name == 'seed0-a3fbe5f9' and name in (ROOT / 'README.md').read_text()


def test_teacher_shares_embedding_and_head_but_not_blocks(toy_cfg):
    student, teacher = load_model(toy_cfg['student']), load_model(toy_cfg['teacher'])
    assert torch.equal(student.embed.weight, teacher.embed.weight)
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert not torch.equal(student.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)
    assert student.config.L == TINY['toy_layers'] and student.config.d == TINY['toy_width']


def test_another_seed_or_size_is_another_folder(toy_dir):
    names = {toy.folder_of(load_config(argv(toy_dir, 'x', **k))).name
             for k in ({}, {'seed': 1}, {'toy_width': 48}, {'toy_teacher_steps': 11})}
    assert len(names) == 4
    cfg = load_config(argv(toy_dir, 'x'))
    assert read_json(toy.folder_of(cfg) / 'recipe.json') == toy.recipe(cfg) | {'sources': toy.sources()}
    assert len(load_problems(toy.folder_of(cfg) / 'eval.jsonl', load_tokenizer(
        str(toy.folder_of(cfg) / 'student')))) == TINY['toy_eval']


def test_impossible_shape():
    with pytest.raises(UserError, match='toy_width=30 does not divide'):
        toy.shape(load_config(['toy_width=30', 'toy_heads=4']), None)


def test_merged_tokens_are_the_same_text_under_other_ids(toy_cfg, tmp_path):
    """Another vocabulary for the same task: 52 tokens, no id of a letter kept by accident for all, and
    what the student has written ends where a teacher token ends for about seven characters in ten."""
    toy.write_tokenizer(tmp_path, 'merged')
    s, t = load_tokenizer(toy_cfg['student']), load_tokenizer(tmp_path)
    assert t.size == 4 + 17 + 31 == len(t.words)
    assert sum(s.words[w] == t.words[w] for w in s.words) < 10
    exact, lengths = [], set()
    for question, work, _ in toy.problems(50, 6, seed=1):
        answer = s.encode(work) + s.stop_ids
        ids, at, inside, _ = pair_text(answer, s, t.chat(question), t)
        assert t.render(question) == s.render(question) and t.decode(ids).endswith(work)
        exact += list(~inside)
        lengths.add((len(t.chat(question)), len(ids)))
    assert len(lengths) == 1 and sum(exact) / len(exact) == pytest.approx(0.7, abs=0.05)
    assert t.encode('0;\\boxed{7}') == [t.words[w] for w in (b'0', b';\\boxed{', b'7', b'}')]


def test_an_unlike_teacher_begins_on_its_own(tmp_path):
    """Depth, width and vocabulary of its own; the student is the one that the usual toy has."""
    keys = dict(toy_student_steps=2, toy_teacher_steps=2)
    usual = toy.prepare(load_config(argv(tmp_path, 'x', **keys)), start('cpu'))
    cfg = toy.prepare(load_config(argv(tmp_path, 'x', **keys, toy_teacher_layers=4, toy_teacher_width=32,
                                       toy_teacher_tokens='merged')), start('cpu'))
    assert usual['student'] != cfg['student']
    assert all(torch.equal(a, b) for a, b in zip(load_model(usual['student']).parameters(),
                                                 load_model(cfg['student']).parameters(), strict=True))
    c = load_model(cfg['teacher']).config
    assert (c.L, c.d, c.V) == (4, 32, 52) and load_tokenizer(cfg["teacher"]).size == 52


def test_two_runs_at_once_make_the_folder_once(tmp_path):
    """The second waits for the first; neither sees half a folder."""
    args = [sys.executable, '-m', 'studies.toy', *for_script('studies/toy.py', argv(tmp_path, 'x'))]
    two = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = [p.communicate()[0] for p in two]
    assert [p.returncode for p in two] == [0, 0] and sum('making student' in o for o in out) == 1


@pytest.mark.parametrize('keys, says', [
    (['toy_width=9'], 'toy_width=9 does not divide'), (['toy_teacher_width=9'], 'toy_teacher_width=9 does not divide'),
    (['toy_dir='], "toy_dir='': nothing given"), (['toy_dir=loop/x'], 'loop is not a folder of yours'),
    (['toy_dir=a/' + 'x' * 300], 'a name has more than 255 bytes'),
])
def test_a_toy_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch, keys, says):
    """The folder of its lock was made first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'loop').symlink_to('loop')
    with pytest.raises(UserError) as error:
        toy.prepare(load_config(['configs/toy.py', 'toy_dir=made', *keys]), start('cpu'))
    assert says in str(error.value) and [path.name for path in tmp_path.iterdir()] == ['loop']


# ---- hints and halves ------------------------------------------------------------------------------

def test_after_a_slip_the_work_goes_on_from_the_wrong_result():
    """Recomputed with Python's own arithmetic on each line. If only one line was wrong, a model that is shown the right answer
    would learn to go back to it, and no student does."""
    rng = random.Random(2)
    for _ in range(200):
        question, right, value = toy.problem(rng, 5)
        slip, error = rng.randrange(5), rng.randrange(1, 10)
        work, slipped_value = toy.work_out(question, slip, error)
        *lines, box = work.split(';')
        *right_lines, _ = right.split(';')
        assert box == f'\\boxed{{{slipped_value}}}' and len(lines) == 5 and lines[:slip] == right_lines[:slip]
        carried = question[0]
        for number, (line, op, x) in enumerate(zip(lines, question[1::2], question[2::2], strict=True)):
            a, b = int(carried), int(x)
            result = {'+': a + b, '-': a - b, '*': a * b}[op] + (error if number == slip else 0)
            assert line == f'{carried}{op}{x}={result % 10}'
            carried = str(result % 10)
        assert carried == slipped_value and lines[slip] != right_lines[slip]
        assert toy.work_out(question) == (right, value)


def test_a_prompt_with_a_hint_shows_the_right_answer_and_the_index_names_the_wrong_token(toy_cfg):
    """If the index was another token's, a wrong result would be learned."""
    tok = load_tokenizer(toy_cfg['student'])
    rng = random.Random(3)
    count, slips = 1000, []
    for _ in range(count):
        question, answer, _ = toy.problem(rng, 4)
        prompt, written, wrong = toy.with_hint(rng, question, answer)
        assert prompt == answer + question
        ids, right_ids = tok.encode(written), tok.encode(answer)
        assert len(ids) == len(right_ids)
        if wrong is None:
            assert written == answer
            continue
        differing = [at for at, pair in enumerate(zip(ids, right_ids, strict=True)) if pair[0] != pair[1]]
        assert differing[0] == wrong and tok.decode(ids[:wrong + 1]).count('=') == wrong // 6 + 1
        slips.append(wrong // 6)
    deviation = (count * toy.SLIPS * (1 - toy.SLIPS)) ** 0.5
    assert abs(len(slips) - count * toy.SLIPS) < 4 * deviation and set(slips) == {0, 1, 2, 3}


def test_a_wrong_result_is_not_learned(toy_cfg, monkeypatch):
    """The logits that `supervise` trains get a gradient at each token of the answers but at the wrong results, which a hook on
    the LM head shows."""
    tok = load_tokenizer(toy_cfg['student'])
    texts, gradients = [], []
    real_hint = toy.with_hint

    def noted(*arguments):
        texts.append(real_hint(*arguments))
        return texts[-1]

    def watched(module, arguments, logits):
        logits.register_hook(gradients.append)
    monkeypatch.setattr(toy, 'with_hint', noted)
    model = load_model(toy_cfg['student'])
    model.head.register_forward_hook(watched)
    toy.supervise(model, tok, toy_cfg | {'toy_hints': 1.0, 'toy_student_steps': 1}, 'student')

    # The prompt has the worked answer of 17 tokens before the question: <bos>, 17, 5, '='.
    gradient, = gradients                                                    # (B, T - 1, V)
    prompt = len(tok.chat(texts[0][0]))
    learned = gradient.abs().sum(-1) > 0                                     # (B, T - 1)
    assert len(learned) == len(texts) == TINY['toy_batch'] and not learned[:, :prompt - 1].any()
    for row, (_, answer, wrong) in zip(learned[:, prompt - 1:].tolist(), texts, strict=True):
        assert len(row) == len(tok.encode(answer)) + 1                       # and the end
        assert [at for at, is_learned in enumerate(row) if not is_learned] == ([] if wrong is None else [wrong])
    assert any(wrong is not None for _, _, wrong in texts)


def test_each_half_has_its_own_operators_and_teacher(tmp_path):
    """Products among the sums would be taught by both teachers. Held-out questions are never trained on, neither those of
    data= nor those of the supervised training."""
    cfg = load_config(argv(tmp_path, 'x', toy_halves=True, toy_student_steps=1, toy_teacher_steps=1, toy_hints=0.5))
    asked = {}
    real = toy.problems

    def noted(n, ops, seed, held_out=False, operators='+-*'):
        chosen = real(n, ops, seed, held_out, operators)
        asked.setdefault((operators, held_out), set()).update(question for question, _, _ in chosen)
        return chosen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, 'problems', noted)
        made = toy.prepare(cfg, start('cpu'))
    folder = toy.folder_of(cfg)
    for key, names in (('teacher', ('teacher_sums', 'teacher_products')), ('data', ('train_sums.jsonl', 'train_products.jsonl')),
                       ('eval_data', ('eval_sums.jsonl', 'eval_products.jsonl'))):
        assert made[key] == ','.join(str(folder / name) for name in names)
    tok = load_tokenizer(made['student'])
    for suffix, operators in (('sums', '+-'), ('products', '*')):
        train, held_out = ({problem.question for problem in load_problems(folder / f'{name}_{suffix}.jsonl', tok, show=False)}
                           for name in ('train', 'eval'))
        for questions in (train, held_out):
            assert {symbol for question in questions for symbol in question[1::2]} == set(operators)
        trained_on = set.union(*(questions for (_, is_held_out), questions in asked.items() if not is_held_out))
        assert train <= trained_on and held_out == asked[operators, True] and not held_out & trained_on

    # One half alone teaches all problems. No other models are made for it.
    one = toy.prepare(cfg | {'toy_teacher_half': 'products'}, start('cpu'))
    assert one['teacher'] == str(folder / 'teacher_products') and one['data'] == made['data']
    sums, products = (load_model(folder / f'teacher_{suffix}') for suffix in ('sums', 'products'))
    assert not torch.equal(sums.blocks[0].attn.qkv.weight, products.blocks[0].attn.qkv.weight)
    assert torch.equal(sums.embed.weight, products.embed.weight)
