"""What is checked before the first step: one vocabulary with extra tokens, the layers, the prompts; what a dry run
prints and refuses."""
import json
import os
import random
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import argv, scores_of
from conftest import log_of as rows_of
from tokenizers import Tokenizer as HFTokenizer

import bridge
from configs import load_config
from distill import main
from formats.huggingface import hf_config, load_model, read_config, save_model
from formats.problems import Problem
from formats.tokenizer import load_tokenizer
from model import PRESETS, Model
from studies import toy
from support import plan
from support.files import write_json
from support.optimizer import weight_at
from support.preflight import (
    as_ranges,
    check_lengths,
    check_objective,
    check_pair,
    check_prompts,
    layer_lines,
)
from support.report import amount
from support.runtime import UserError

needs_proc = pytest.mark.skipif(not os.path.isdir('/proc'), reason='no /proc here')


def with_extra_token(source, folder, word='<extra>'):
    """A copy of a model folder whose tokenizer has one special token more. Embedding and head have a row for it, of
    large random numbers, so that a softmax that includes it comes out different."""
    old = load_model(source)
    c = replace(old.config, V=old.config.V + 1)
    new = Model(c)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            before = old.get_parameter(name)
            parameter[:len(before)] = before
            if len(parameter) > len(before):
                parameter[len(before):] = 3 * torch.randn(1, c.d, generator=generator)
    save_model(new, folder, source=source)
    tok = HFTokenizer.from_file(str(folder / 'tokenizer.json'))
    tok.add_special_tokens([word])
    tok.save(str(folder / 'tokenizer.json'))
    assert load_tokenizer(folder).size == load_tokenizer(source).size + 1
    return folder


def log_of(toy_dir, out, **keys):
    main(load_config(argv(toy_dir, out, steps=3, eval_every=3, diagnose_every=1, **keys)))
    return rows_of(out)


OBJECTIVES = {'hidden states': {}, 'output space': dict(oprd_weight=0.0, opd_weight=1.0, opd='full')}


@pytest.fixture(scope='module', params=list(OBJECTIVES))
def usual_run(request, toy_dir, tmp_path_factory):
    """An objective, and the log of a run with it on the tiny toy as it is."""
    keys = OBJECTIVES[request.param]
    return keys, log_of(toy_dir, tmp_path_factory.mktemp('usual') / 'r', **keys)


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_an_extra_special_token_on_one_side_changes_nothing(usual_run, side, toy_dir, toy_cfg, tmp_path):
    """Such a pair was refused with "layers='all': a model of 4 layers has none" or "the tokenizers differ". The
    token has rows of random numbers in embedding and head: it must be neither sampled nor compared."""
    keys, usual = usual_run
    folder = with_extra_token(toy_cfg[side], tmp_path / side)
    got = log_of(toy_dir, tmp_path / 'r', **{side: folder}, **keys)
    bound = 100 * torch.finfo(torch.float32).eps     # a head of another height may round a product otherwise
    assert len(got) == len(usual) == 4 and scores_of(got[0]) == pytest.approx(scores_of(usual[0])) and len(scores_of(got[0])) == 3
    for a, b in zip(got[1:], usual[1:], strict=True):
        for key in ('loss', 'grad_norm', 'rep/cos', 'opd/kl', 'entropy/student', 'entropy/teacher', 'len/mean', 'acc/rollout'):
            assert a[key] == pytest.approx(b[key], rel=bound, abs=bound), key
    assert read_config(tmp_path / 'r/last').V == 21 + (side == 'student')


def test_a_teacher_without_a_row_for_the_students_extra_token(toy_dir, toy_cfg, tmp_path):
    """It is never asked for one: the student does not write the token. A prompt that holds it is refused."""
    folder = with_extra_token(toy_cfg['student'], tmp_path / 'student')
    assert len(log_of(toy_dir, tmp_path / 'r', student=folder)) == 4
    (folder / 'chat_template.jinja').write_text('<extra>{{ messages[0].content }}=')
    with pytest.raises(UserError, match="prompts hold id 21, b'<extra>', but the embedding of the teacher has 21 rows"):
        log_of(toy_dir, tmp_path / 'r2', student=folder)


def test_two_extra_tokens_with_one_id_are_two_vocabularies(toy_cfg, tmp_path):
    """The teacher would read <a> where the student wrote <b>."""
    s = with_extra_token(toy_cfg['student'], tmp_path / 's', '<a>')
    t = with_extra_token(toy_cfg['teacher'], tmp_path / 't', '<b>')
    with pytest.raises(UserError, match="tokenizers differ: id 21 is b'<b>' to the teacher and b'<a>' to the student"):
        check_pair(read_config(s), read_config(t), load_tokenizer(s), load_tokenizer(t), '1+2')


def test_what_is_printed_of_extra_tokens(toy_cfg, tmp_path):
    """How many, and what a stop token that the student never writes means."""
    folder = with_extra_token(toy_cfg['teacher'], tmp_path / 't')
    write_json(folder / 'generation_config.json', {'eos_token_id': 21})
    write_json(folder / 'config.json', json.loads((folder / 'config.json').read_text()) | {'eos_token_id': None})
    settings = json.loads((folder / 'tokenizer_config.json').read_text())
    write_json(folder / 'tokenizer_config.json', settings | {'eos_token': None})
    c = read_config(toy_cfg['student'])
    text = '\n'.join(check_pair(c, read_config(folder), load_tokenizer(toy_cfg['student']), load_tokenizer(folder), '1+2'))
    assert '21 tokens have the same id on both sides; the student has 0 others, the teacher 1' in text
    assert 'only ids below 21 are written and compared' in text
    assert 'stop ids: student [2], teacher [21]; answers end at any of [2]' in text
    assert 'the teacher ends its answers with [21], which the student never writes' in text


def test_prompts_that_the_teachers_tokenizer_does_not_know(toy_cfg, tmp_path):
    """A row that was never trained is read without an error: a note; no row at all is an error."""
    tok_s = load_tokenizer(with_extra_token(toy_cfg['student'], tmp_path / 's'))
    tok_t = load_tokenizer(toy_cfg['teacher'])
    known, unknown = SimpleNamespace(ids=[1, 5, 9]), SimpleNamespace(ids=[1, 21])
    assert check_prompts([known], SimpleNamespace(V=21), tok_s, tok_t) == []
    note, = check_prompts([known, unknown], SimpleNamespace(V=24), tok_s, tok_t)
    assert "id 21, b'<extra>', which the teacher's tokenizer does not know" in note
    with pytest.raises(UserError, match='id 21'):
        check_prompts([known, unknown], SimpleNamespace(V=21), tok_s, tok_t)


@pytest.mark.parametrize('key, side', [('max_new_tokens', 'student'), ('max_new_tokens', 'teacher'),
                                       ('eval_max_new_tokens', 'student'), ('eval_max_new_tokens', 'teacher')])
def test_a_prompt_and_its_answer_must_fit_into_both_contexts(key, side):
    """To the last token, of training and of held-out problems. A check that forgets the prompt lets a model read
    beyond its context, where it was never trained."""
    cfg = {'max_new_tokens': 10, 'eval_max_new_tokens': 0 if key == 'max_new_tokens' else 12}
    train, held_out = [Problem('', None, [1] * 7), Problem('', None, [1])], [Problem('', None, [1] * 5)]
    longest = 17                             # 7 + 10 and 5 + 12
    contexts = {'student': 100, 'teacher': 100} | {side: longest}

    def check():
        models = [SimpleNamespace(context=contexts[name]) for name in ('student', 'teacher')]
        return check_lengths(cfg, *models, train if key == 'max_new_tokens' else train[1:], held_out)
    assert check() == longest
    contexts[side] -= 1
    with pytest.raises(UserError, match=f'{side}: reads 16 tokens.*lower {key}'):
        check()


def test_pairs_of_layers_are_shown():
    """By ranges if they are the same; a shallower student paired by depth gets a note, since a pruned one's layer 3
    may have been the teacher's layer 9."""
    assert as_ranges([1, 2, 3, 5, 8, 9]) == '1-3, 5, 8-9' and as_ranges([4]) == '4'
    assert layer_lines({1: 1, 2: 2, 3: 3}, 3, 3, 'depth') == ['layers 1-3, each with the teacher layer of the same number']
    line, note = layer_lines({1: 1, 2: 3, 3: 5}, 3, 5, 'depth')
    assert line == 'layers, student -> teacher: 1 -> 1, 2 -> 3, 3 -> 5'
    assert '3 student layers are paired with 5 teacher layers by depth (2 -> 3, ...)' in note and 'layer_map=' in note
    assert len(layer_lines({1: 1, 2: 3, 3: 5}, 3, 5, [1, 3, 5])) == 1      # the user has said which
    assert len(layer_lines({1: 1, 2: 1, 3: 2}, 3, 2, 'depth')) == 1        # a deeper student was not pruned


def test_every_run_prints_the_pairs_of_layers(toy_dir, tmp_path, capsys):
    """Only --dry-run did, so a run trained on pairs that nobody had seen."""
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=1, eval_data='', toy_teacher_layers=5, toy_student_steps=1,
                          toy_teacher_steps=1)))
    out = capsys.readouterr().out
    assert 'layers, student -> teacher: 1 -> 1, 2 -> 3, 3 -> 5' in out and 'a pruned student may want layer_map=' in out


# ---- dry runs -----------------------------------------------------------------------------------

def paper_folder(folder):
    """A folder of the paper's 1.5B shape with a tokenizer and without weights, and a problem."""
    folder.mkdir()
    write_json(folder / 'config.json', hf_config(PRESETS['r1_1p5b']))
    toy.write_tokenizer(folder)
    (folder / 'p.jsonl').write_text('{"question": "1+2", "answer": "3"}')
    return [f'student={folder}', f'teacher={folder}', f'data={folder / "p.jsonl"}', f'eval_data={folder / "p.jsonl"}']


def test_a_dry_run_for_eight_gpus_on_a_machine_without_one(tmp_path, capsys):
    """The estimate was for the ranks that the dry run had been started with, so a laptop could not ask."""
    arguments = paper_folder(tmp_path / 'm')
    main(load_config(['configs/r1_1p5b.py', *arguments, f'out_dir={tmp_path / "r"}', '--dry-run', 'ranks=8', 'dtype=bfloat16']))
    out = capsys.readouterr().out

    # By hand: 1,777,088,000 weights, of which V d = 233,373,696 are a head that Eq. (6) never reaches.
    weights = 1_777_088_000
    head = 151_936 * 1536
    assert f'{4 * weights / 8 / 2**30:8.2f}  student weights, float32' in out
    assert f'{8 * (weights - head) / 8 / 2**30:8.2f}  AdamW, float32' in out
    assert f'{2 * weights / 2**30:8.2f}  teacher weights' in out
    assert f'4 checkpoints of {(2 * weights + 4 * weights + 8 * (weights - head)) / 1e9:.2f} GB' in out
    assert "of an H100's data sheet" in out and 'over 8 rank(s)' in out and 'free' not in out
    assert out.count('<- the peak') == 1 and 'host memory of rank 0 while saving' in out
    assert os.listdir(tmp_path) == ['m']


def test_ranks_belong_to_a_dry_run(tmp_path):
    """torchrun decides how many ranks a run has; a key that said otherwise would be ignored."""
    with pytest.raises(UserError, match='ranks=8: belongs to --dry-run'):
        load_config(['configs/toy.py', 'ranks=8'])
    arguments = paper_folder(tmp_path / 'm')
    with pytest.raises(UserError, match='prompts_per_step=8 with n=2 gives 16 answers, fewer than the 32 ranks'):
        main(load_config(['configs/r1_1p5b.py', *arguments, '--dry-run', 'ranks=32']))
    with pytest.raises(UserError, match='shard_ranks=6 does not divide the 16 ranks'):
        main(load_config(['configs/r1_1p5b.py', *arguments, '--dry-run', 'ranks=16', 'shard_ranks=6']))


def test_a_dry_run_for_several_machines(tmp_path, capsys):
    """Sixteen GPUs are two machines of eight, each with a copy of the weights; a sharded teacher needs less."""
    arguments = [*paper_folder(tmp_path / 'm'), '--dry-run', 'ranks=16', 'dtype=bfloat16']
    main(load_config(['configs/r1_1p5b.py', *arguments]))
    out = capsys.readouterr().out
    assert ('16 ranks: each 8 of them (as if a machine had 8 GPUs, see shard_ranks=) share one copy of the student, '
            'and each has the whole teacher') in out
    assert f'{4 * 1_777_088_000 / 8 / 2**30:8.2f}  student weights, float32' in out
    main(load_config(['configs/r1_1p5b.py', *arguments, 'shard_ranks=16', 'teacher_shard=True']))
    out = capsys.readouterr().out
    assert '  16 ranks share one copy of the student, and one of the teacher\n' in out
    assert f'{2 * 1_777_088_000 / 16 / 2**30:8.2f}  teacher weights' in out


@pytest.mark.parametrize('key, message', [
    ('toy_width=9', 'toy_width=9 does not divide into 4 heads'),
    ('toy_heads=5', 'toy_width=96 does not divide into 5 heads'),
    pytest.param('toy_dir=/proc/x', '/proc/x.* cannot be made', marks=needs_proc),
])
@pytest.mark.parametrize('script, config', [(main, 'toy'), (bridge.main, 'toy_bridge'), (toy.main, 'toy')])
def test_a_dry_run_refuses_a_toy_that_cannot_be_made(script, config, key, message, tmp_path):
    """It said "a run makes the toy first", and the run then refused."""
    arguments = [f'configs/{config}.py', f'toy_dir={tmp_path / "toys"}', f'out_dir={tmp_path / "r"}',
                 f'bridge={tmp_path / "b"}' if config == 'toy_bridge' else 'bridge=', key, '--dry-run']
    with pytest.raises(UserError, match=message):
        script(load_config(arguments))
    assert os.listdir(tmp_path) == []


@needs_proc
def test_a_dry_run_refuses_a_folder_that_cannot_be_made(toy_dir, tmp_path):
    """Who is root may write everywhere, says the system, but not into /proc."""
    with pytest.raises(UserError, match='/proc/run: cannot be made, /proc'):
        main(load_config([*argv(toy_dir, '/proc/run'), '--dry-run']))


def test_too_little_memory_and_disk_are_notes(toy_dir, tmp_path, capsys, monkeypatch):
    """Both are known before the first step."""
    monkeypatch.setattr(plan, 'free_memory', lambda device: 1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    main(load_config([*argv(toy_dir, tmp_path / 'r'), '--dry-run']))
    out = capsys.readouterr().out
    assert 'note: the run needs' in out and 'note: that is more than is free there' in out


def test_a_dry_run_of_the_bridge_samples_nothing(toy_dir, tmp_path, capsys):
    """It was ignored: the student answered every prompt."""
    tiny = argv(toy_dir, tmp_path / 'r')[1:]
    bridge.main(load_config(['configs/toy_bridge.py', *tiny, 'toy_teacher_layers=0', 'toy_teacher_width=0',
                             'toy_teacher_tokens=same', f'bridge={tmp_path / "b"}', '--dry-run']))
    out = capsys.readouterr().out
    assert 'collect' in out and 'judge' in out and 'student layer -> teacher layer: {1: 1, 2: 2, 3: 3}' in out and os.listdir(tmp_path) == []


def test_durations_and_amounts_are_in_units_that_read_well():
    assert [plan.seconds(x) for x in (0.123, 45.2, 600, 20000)] == ['0.12 s', '45 s', '10 min', '5.6 h']
    assert [amount(x, ' ') + 'B' for x in (12, 3.5e6, 1.54e12)] == ['12 B', '3.5 MB', '1.54 TB']
def test_steps_without_a_loss_are_found_as_a_walk_over_all_steps_finds_them():
    """Only the steps near the knots are looked at. Knots with jumps and flat parts at random, on shares that are steps and
    on others; the first step without a loss is the one that is told."""
    rng = random.Random(0)
    found = 0
    for _ in range(500):
        steps = rng.choice([1, 2, 3, 7, 10, 49, 100])
        keys = {'steps': steps}
        for key in ('oprd_weight', 'opd_weight'):
            shares = sorted(rng.choice([rng.random(), rng.randrange(11) / 10, rng.randrange(steps + 1) / steps])
                            for _ in range(rng.randint(1, 4)))
            keys[key] = rng.choice([0.0, [[share, rng.choice([0, 0, 1])] for share in shares]])
        cfg = load_config([]) | keys
        empty = [step for step in range(1, steps + 1)
                 if not any(weight_at(step, steps, cfg[key]) for key in ('oprd_weight', 'opd_weight'))]
        if empty:
            found += 1
            with pytest.raises(UserError, match=f'step {empty[0]}: oprd_weight, opd_weight, reward_weight, attention_weight are all 0'):
                check_objective(cfg)
        else:
            check_objective(cfg)
    assert 100 < found < 450


def test_a_schedule_over_many_steps_is_checked_at_once():
    """Walking over 10**9 steps takes an hour."""
    began = time.process_time()
    check_objective(load_config([]) | {'steps': 10**9, 'oprd_weight': [[0, 1], [0.5, 0]], 'opd_weight': [[0, 0], [0.5, 1]]})
    assert time.process_time() - began < 1
