"""The loop: results, resume bit for bit, interruption, bad input."""
import datetime
import importlib
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import argv, assert_all_measured, evaluate, log_of, resume_state, tiny_model, with_other_stop
from safetensors.torch import load_file

import distill
import eval_math
import model
from configs import load_config
from distill import main
from formats import huggingface, problems, tokenizer
from formats.huggingface import hf_config, load_model
from formats.problems import load_problems, prompt_order
from formats.tokenizer import load_tokenizer
from model import PRESETS, rotary
from rollout import naive
from studies import toy
from studies.compare import PHASES
from studies.toy import folder_of, write_tokenizer
from support import provenance, runtime
from support.files import digest, read_json, write_json
from support.optimizer import learning_rate
from support.preflight import check_objective
from support.report import first_step_notes, step_line
from support.runtime import ROOT, Clock, UserError, run, start


def timeless(rows):
    """Rows without what a clock says."""
    return [{k: v for k, v in r.items() if not k.startswith('time/') and k != 'elapsed'} for r in rows]


def answers_of(out):
    return {file.name: file.read_bytes() for file in (out / 'answers').iterdir()}


@pytest.fixture(scope='module')
def finished(toy_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'whole'
    main(load_config(argv(toy_dir, out, steps=7)))
    return out


def test_a_run_leaves_what_the_readme_promises(finished, capsys, toy_dir):
    best = max((row for row in log_of(finished)[1:] if 'eval/avg@2' in row), key=lambda row: row['eval/avg@2'])['step']
    kept = {f'ckpt-{step:06d}' for step in (6, 7, best)}
    assert {p.name for p in finished.iterdir()} == {'.lock', 'config.json', 'starts.jsonl', 'log.jsonl', 'results.json',
                                                    'curve.png', 'answers', 'last', 'best', *kept}
    assert sorted(p.name for p in (finished / 'answers').iterdir()) == [
        '000000.jsonl', '000002.jsonl', '000004.jsonl', '000006.jsonl', '000007.jsonl', 'teacher.jsonl']
    assert (finished / 'best').resolve() == finished / f'ckpt-{best:06d}/model'
    r = read_json(finished / 'results.json')
    assert set(r) == {'student', 'teacher', 'distilled', 'steps', 'seconds', 'rep_cos'} and r['steps'] == 7
    for side in ('student', 'teacher', 'distilled'):
        assert set(r[side]) == {'avg@2', 'best@2', 'len'} and 0 <= r[side]['avg@2'] <= r[side]['best@2'] <= 100
    rows = log_of(finished)
    assert [row['step'] for row in rows] == list(range(8))
    assert_all_measured(finished)
    assert list(json.loads((finished / 'log.jsonl').read_text().splitlines()[0])) == [
        'step', 'loss', 'loss/oprd', 'loss/layer/1', 'loss/layer/2', 'loss/layer/3', 'rep/cos', 'rep/cos/1', 'rep/cos/2',
        'rep/cos/3', 'opd/kl', 'entropy/student', 'entropy/teacher', 'opd/overlap16', 'len/mean', 'finish', 'tokens',
        'acc/rollout', 'lr', 'grad_norm', 'adam/below_eps', 'eval/avg@2', 'eval/best@2', 'eval/len', 'teacher/avg@2',
        'teacher/best@2', 'teacher/len', 'time/sample', 'time/diagnose', 'time/teacher', 'time/student', 'time/update',
        'elapsed', 'changed']
    assert [name for name in rows[1] if name.startswith('rep/cos')] == ['rep/cos', 'rep/cos/1', 'rep/cos/2', 'rep/cos/3']
    assert r['rep_cos'] == [rows[1]['rep/cos'], rows[7]['rep/cos']]
    assert [row['step'] for row in rows if 'eval/avg@2' in row] == [0, 2, 4, 6, 7]
    assert (finished / 'curve.png').read_bytes().startswith(b'\x89PNG')
    before = (finished / 'log.jsonl').read_bytes()
    main(load_config(argv(toy_dir, finished, steps=7)))      # finished: says so, shows the table
    out = capsys.readouterr().out
    assert 'finished at step 7' in out and 'distilled' in out
    assert (finished / 'log.jsonl').read_bytes() == before


def test_the_log_is_a_table_for_pandas(finished, tmp_path, monkeypatch, capsys):
    """The lines of docs/objectives.md, as they stand there: one column for each name, one row for each step, and what was
    not measured is NaN. Objects and lists would be columns of objects, which no library can draw."""
    pandas = pytest.importorskip('pandas')
    text = (ROOT / 'docs/objectives.md').read_text().split('## A run folder, as you find it')[1]
    lines = text.split('```python\n')[1].split('```')[0]
    assert lines.count('\n') == 3
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/toy').symlink_to(finished)
    (tmp_path / 'lines.py').write_text(lines)
    monkeypatch.chdir(tmp_path)
    log = runpy.run_path('lines.py')['log']
    rows = [json.loads(line) for line in (finished / 'log.jsonl').read_text().splitlines()]
    assert list(log.columns) == list(rows[0])[1:] and list(log.index) == list(range(8))
    assert all(pandas.api.types.is_numeric_dtype(log[name]) for name in log.columns if name != 'changed')
    for name in ('loss', 'rep/cos/3', 'eval/avg@2', 'teacher/avg@2', 'opd/kl'):
        assert [None if math.isnan(value) else value for value in log[name]] == pytest.approx([row[name] for row in rows])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ['loss', 'rep/cos', 'rep/cos/1', 'rep/cos/2', 'rep/cos/3', 'eval/avg@2']
    assert [line.split()[0] for line in printed[2:]] == ['2', '4', '6', '7']


def test_the_student_loads_in_transformers(finished, toy_dir):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / 'last')
    ours = load_model(finished / 'last')
    ids = torch.tensor([[1, 5, 14, 7, 9], [1, 4, 4, 4, 4]])
    assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-5
    tok = transformers.AutoTokenizer.from_pretrained(finished / 'last')
    assert tok.apply_chat_template([{'role': 'user', 'content': '1+2'}], tokenize=False,
                                   add_generation_prompt=True) == '<bos>1+2='
    assert tok.eos_token == '<eos>' and theirs.generation_config.eos_token_id == 2


@pytest.mark.parametrize('stop_at', [3, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(finished, toy_dir, tmp_path, monkeypatch, stop_at):
    """Ctrl-C within a step saves after it; then garbage of a crash is added to the log. The second
    run goes on: the same samples, losses, gradients, evaluations, weights and moments."""
    out, args = tmp_path / 'halves', argv(toy_dir, tmp_path / 'halves', steps=7, save_every=100)
    real, steps = distill.accumulate, []

    def interrupted(*a, **k):
        steps.append(1)
        if len(steps) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return real(*a, **k)
    monkeypatch.setattr(distill, 'accumulate', interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(load_config(args))
    monkeypatch.setattr(distill, 'accumulate', real)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (out / 'answers/000005.jsonl').write_text('of an evaluation that the checkpoint does not know')
    assert log_of(out)[-1]['step'] == stop_at and not (out / 'results.json').exists()
    with (out / 'log.jsonl').open('a') as f:
        f.write(json.dumps({'step': stop_at + 1, 'loss': -1.0}) + '\n{"step": ')
    main(load_config(args[:-1] + ['save_every=100', 'token_budget=100000']))
    assert timeless(log_of(out)) == timeless(log_of(finished)) and answers_of(out) == answers_of(finished)
    a, b = resume_state(out), resume_state(finished)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (out / 'last/model.safetensors').read_bytes() == (finished / 'last/model.safetensors').read_bytes()


def test_killed_and_resumed(finished, toy_dir, tmp_path):
    """kill -9 in the middle of a step: the last checkpoint is whole, and the rest is made again."""
    out = tmp_path / 'killed'
    code = ('import distill, os, sys\nfrom configs import load_config\nreal, n = distill.accumulate, []\n'
            'def dying(*a, **k):\n    n.append(1)\n    if len(n) == 6: os.kill(os.getpid(), 9)\n    return real(*a, **k)\n'
            'distill.accumulate = dying\n'
            'distill.main(load_config(sys.argv[1:]))')
    args = argv(toy_dir, out, steps=7)
    p = subprocess.run([sys.executable, '-c', code, *args], cwd=ROOT, capture_output=True)
    assert p.returncode == -signal.SIGKILL and (out / 'last').resolve().parent.name == 'ckpt-000004'
    main(load_config(args))
    assert timeless(log_of(out)) == timeless(log_of(finished)) and answers_of(out) == answers_of(finished)
    a, b = resume_state(out), resume_state(finished)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_seconds_go_on_after_a_resume(toy_dir, tmp_path, monkeypatch):
    """The clock of a resumed run goes on where the checkpoint left it. Guards against one that starts at 0 again:
    results.json would tell the seconds of the last part alone."""
    out, args = tmp_path / 'r', argv(toy_dir, tmp_path / 'r', steps=3, eval_data='')
    real = distill.accumulate

    def interrupted(*a, **k):
        signal.raise_signal(signal.SIGINT)
        return real(*a, **k)
    monkeypatch.setattr(distill, 'accumulate', interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(load_config(args))
    monkeypatch.setattr(distill, 'accumulate', real)
    file = (out / 'last').resolve().parent / 'resume.json'
    saved = read_json(file)
    assert 0 < log_of(out)[-1]['elapsed'] <= saved['elapsed'] < 5000
    del saved['digest']
    saved['elapsed'] = 5000.0
    write_json(file, saved | {'digest': digest(saved, 64)})
    main(load_config(args))
    seconds = [row['elapsed'] for row in log_of(out)]
    assert 0 < seconds[0] < seconds[1] < 5000 < seconds[2] < seconds[3] < 10_000
    assert read_json(out / 'results.json')['seconds'] == seconds[3]


def test_micro_batches_and_recomputation_leave_the_run_as_it_is(finished, toy_dir, tmp_path, monkeypatch):
    """With micro-batches of at most 40 tokens, and recomputed blocks. That both happen is counted: a run that ignores
    the two keys is the same run as well."""
    out, cut, recomputed = tmp_path / 'small', [], []
    real_cut, real_checkpoint = distill.cut_rollout, model.checkpoint

    def counted(*a, **k):
        cut.append(0)
        for rows in real_cut(*a, **k):
            cut[-1] += 1
            yield rows
    monkeypatch.setattr(distill, 'cut_rollout', counted)
    monkeypatch.setattr(model, 'checkpoint', lambda *a, **k: recomputed.append(1) or real_checkpoint(*a, **k))
    main(load_config(argv(toy_dir, out, steps=7, token_budget=40, checkpointing=True)))
    assert min(cut) > 1 and len(recomputed) >= 7 * 3 * 2
    for a, b in zip(log_of(out)[1:], log_of(finished)[1:], strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-4)


def test_compiled_blocks_leave_the_run_as_it_is(toy_dir, tmp_path, monkeypatch):
    """Traced and differentiated by torch.compile, recomputed as well and under FSDP, without a break; code is
    not generated (that takes minutes on a CPU). A model with other numbers of heads was compiled before: these numbers
    are then variables to torch.compile, and what is computed of them must not be an argument of attention."""
    how = dict(steps=3, dtype='bfloat16', eval_n=1)
    other = tiny_model()
    h = torch.randn(1, 5, other.config.d)
    other.blocks[0].compile(backend='aot_eager')
    other.blocks[0](h, rotary(torch.arange(5), *other.rope_frequencies(5, h.device), h.dtype))
    main(load_config(argv(toy_dir, tmp_path / 'plain', **how)))
    compile, blocks = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **how: (
        blocks.append(self), compile(self, backend='aot_eager', **how)))
    counters = importlib.import_module('torch._dynamo.utils').counters
    counters.clear()
    main(load_config(argv(toy_dir, tmp_path / 'compiled', compile=True, checkpointing=True, **how)))
    assert len(blocks) == 6 and not counters['graph_break'] and counters['stats']['unique_graphs'] >= 2
    for a, b in zip(log_of(tmp_path / 'plain')[1:], log_of(tmp_path / 'compiled')[1:], strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=0.02)


def test_bfloat16_run_keeps_float32_master_weights(toy_dir, tmp_path):
    """One rank, bf16 forwards: the folder is bf16, the resume state float32, and small steps count."""
    main(load_config(argv(toy_dir, tmp_path / 'b', steps=2, dtype='bfloat16', lr=1e-5)))
    assert read_json(tmp_path / 'b/last/config.json')['dtype'] == 'bfloat16'
    assert {t.dtype for t in load_file(tmp_path / 'b/last/model.safetensors').values()} == {torch.bfloat16}
    state = resume_state(tmp_path / 'b')
    assert {t.dtype for t in state.values()} == {torch.float32}
    start = load_model(folder_of(load_config(argv(toy_dir, 'x'))) / 'student')
    moved = (state['weight.blocks.0.mlp.down.weight'] - start.blocks[0].mlp.down.weight).abs().max()
    assert 1e-7 < moved < 3e-5


def test_a_student_from_the_hub_keeps_its_tokenizer(toy_dir, tmp_path, monkeypatch):
    """A hub id is no folder: what goes along with the weights must come from its snapshot."""
    for module in (huggingface, tokenizer, problems, provenance, distill):
        monkeypatch.setattr(module, 'snapshot', lambda name, **_: folder if name == 'me/student' else Path(name))
    folder = folder_of(load_config(argv(toy_dir, 'x'))) / 'student'
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=1, student='me/student', eval_data='')))
    assert {f.name for f in (tmp_path / 'r/last').iterdir()} == {f.name for f in folder.iterdir()}


def test_without_evaluation_data(toy_dir, tmp_path, capsys):
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=2, eval_data='')))
    assert read_json(tmp_path / 'r/results.json')['distilled'] == {}
    assert 'no eval_data' in capsys.readouterr().out and not (tmp_path / 'r/answers').exists()
    assert_all_measured(tmp_path / 'r')
    assert not any(name.startswith(('eval/', 'teacher/')) for name in log_of(tmp_path / 'r')[1])


def test_dry_run_writes_nothing(toy_dir, tmp_path, capsys):
    main(load_config([*argv(toy_dir, tmp_path / 'r'), '--dry-run']))
    out = capsys.readouterr().out
    assert 'plan: 4 steps of 3 prompts x 2 answers' in out and 'AdamW' in out and os.listdir(tmp_path) == []
    main(load_config([*argv(tmp_path / 'none', tmp_path / 'r'), '--dry-run']))
    assert 'a run makes' in capsys.readouterr().out and os.listdir(tmp_path) == []


def test_dry_run_of_the_paper_loads_no_weights(tmp_path, monkeypatch, capsys):
    """configs/r1_1p5b.py to the plan, on folders that hold config.json and tokenizer but no weights."""
    folder, data_file = tmp_path / 'model', tmp_path / 'p.jsonl'
    folder.mkdir()
    write_json(folder / 'config.json', hf_config(PRESETS['r1_1p5b']))
    write_tokenizer(folder)
    data_file.write_text('{"question": "1+2", "answer": "3"}')
    main(load_config(['config/r1_1p5b.py', f'student={folder}', f'teacher={folder}', f'data={data_file}', '--dry-run',
                      'eval_data=', f'out_dir={tmp_path / "r"}']))
    out = capsys.readouterr().out
    assert 'student 1777.09M weights, teacher 1777.09M' in out and '500 steps of 8 prompts x 2 answers' in out
    assert f'layers {list(range(1, 29))}' in out and not (tmp_path / 'r').exists()


def test_answers_unknown(toy_dir, tmp_path, capsys):
    """Plain questions: nothing to grade, and the line does not pretend."""
    (tmp_path / 'q.txt').write_text('1+2*3\n4-5-6\n7+8+9')
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=1, data=tmp_path / 'q.txt', eval_data='')))
    assert 'acc/rollout' not in log_of(tmp_path / 'r')[1] and ' acc ' not in capsys.readouterr().out.split('step 0001')[1]


def test_accuracy_is_a_share_of_the_answers_that_can_be_graded(toy_dir, tmp_path, monkeypatch):
    """Two of four problems have a known answer, and one of the two is always right: 50%. Guards against a share of
    all answers, and against grading by another problem's answer."""
    rows = [{'question': '1+2*3', 'answer': '7'}, {'question': '4-5-6'}, {'question': '7+8+9', 'answer': '4'}, {'question': '2*2-1'}]
    (tmp_path / 'p.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    monkeypatch.setattr(distill, 'grade', lambda text, answer: answer == '7')
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=2, prompts_per_step=4, data=tmp_path / 'p.jsonl', eval_data='')))
    assert [row['acc/rollout'] for row in log_of(tmp_path / 'r')[1:]] == [50.0, 50.0]


def test_each_model_is_scored_with_its_own_weights_under_the_eval_keys(toy_cfg, toy_dir, tmp_path, monkeypatch):
    """The first line of the log against an evaluation made here. Guards against the student's weights in the teacher's
    place, against answers that end at the student's stop tokens alone, and against an eval_ key that is ignored."""
    monkeypatch.setattr(eval_math, 'verdict', lambda text, problem: {
        'extracted': None, 'correct': (len(text) + int(problem.answer)) % 3 == 0, 'decided_by': ''})
    teacher = with_other_stop(toy_cfg['teacher'], tmp_path / 'teacher')
    keys = dict(seed=3, eval_n=3, eval_problems=5, eval_suffix='+1', eval_temperature=1.4, eval_top_p=0.8, eval_max_new_tokens=13)
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=1, eval_every=0, student=toy_cfg['student'], teacher=teacher,
                          data=toy_cfg['data'], eval_data=toy_cfg['eval_data'], **keys)))
    tok = load_tokenizer(toy_cfg['student'])
    sets = eval_math.load_eval_sets(toy_cfg['eval_data'], tok, 5, '+1')
    scores = {}
    for side, folder in (('student', toy_cfg['student']), ('teacher', teacher), ('distilled', tmp_path / 'r/last')):
        scores[side] = evaluate(load_model(folder), tok, sets, 3, temperature=1.4, top_p=0.8, stop=[2, 20], seed=3,
                                vocab=tok.size, max_new_tokens=13)
    assert read_json(tmp_path / 'r/results.json') | scores == read_json(tmp_path / 'r/results.json')
    assert len({json.dumps(score) for score in scores.values()}) == 3


def test_what_is_loaded_follows_the_keys(toy_dir, tmp_path, monkeypatch, capsys):
    """Long prompts are left out; chat templates are told about thinking; known answers of both sets are checked; both
    models know the longest text to come, by which a longrope model chooses its frequencies: in training its forward sees
    an answer that the sampler has read with those of the whole length."""
    (tmp_path / 'p.jsonl').write_text('{"question": "1+2+3+4+5+6+7", "answer": "8"}\n{"question": "1+2", "answer": "3"}')
    monkeypatch.setattr(distill, 'check_answers', lambda problems: [f'{len(problems)} answers were checked'])
    real, told = distill.load_tokenizer, []
    monkeypatch.setattr(distill, 'load_tokenizer', lambda *a, **variables: told.append(variables) or real(*a, **variables))
    keys = dict(data=tmp_path / 'p.jsonl', max_prompt_tokens=6, max_new_tokens=9, eval_max_new_tokens=30, enable_thinking=False)
    setup = distill.prepare(toy.prepare(load_config(argv(toy_dir, 'x', **keys)), start('cpu')), start('cpu'))
    assert [problem.question for problem in setup.train] == ['1+2'] and told == [{'enable_thinking': False}] * 2
    prompt = max(len(problem.ids) for problem in setup.held_out['eval'])
    assert setup.student.max_length == setup.teachers[0].model.max_length == prompt + 30
    out = capsys.readouterr().out
    assert '  1 answers were checked' in out and '  6 answers were checked' in out


def test_notes_on_the_first_step_name_the_layers():
    """By the student's own numbers and in their order: a note that blames another layer is worse than none."""
    losses = {'loss/layer/2': 1.0, 'loss/layer/5': 98.0, 'loss/layer/9': 1.0}
    shares, note = first_step_notes(losses | {'adam/below_eps': 0.05}, 1e-8)
    assert shares.endswith('2:1 5:98 9:1') and 'layer 5 has 98% of the loss' in note
    assert 'gradients of 20% of the weights are below adam_eps=1e-06' in first_step_notes({'adam/below_eps': 0.2}, 1e-6)[0]
    assert first_step_notes({'loss/layer/2': None, 'adam/below_eps': None}, 1e-6) == [], 'a step that did not look'


@pytest.mark.parametrize('weights', [(1.0, 0.0), (0.0, 1.0)], ids=['hidden states', 'outputs'])
def test_a_step_without_a_supervised_position_has_a_line(weights):
    """Short answers to a teacher of another vocabulary, of whose positions it knows none (positions=last, pair=exact): nothing
    is measured, and the line of the step was a KeyError, which ended the run."""
    term = {'loss/oprd': torch.tensor(0.0), 'layer_loss': torch.zeros(1), 'layer_cosine': torch.zeros(1)}
    if weights[1]:
        term = {'loss/opd': torch.tensor(0.0), 'statistics': torch.zeros(5)}
    row = distill.objective_metrics({'weight': torch.tensor(0.0), **term}, {}, dict(zip(('oprd', 'opd'), weights, strict=True)), {3: 3}, 'full')
    row |= {'step': 1, 'tokens': 6.0, 'len/mean': 6.0, 'finish': 0.0} | {f'time/{phase}': 1.0 for phase in ('sample', *PHASES)}
    line = step_line(row, 2, 1.0)
    assert line == 'step 0001/0002 | loss 0.00 | len 6 fin 0% | sample 1.0s train 3.0s | 1.5 tok/s | eta 1s'


def test_an_overlap_of_nothing_is_logged_as_0():
    """Models whose 16 likeliest tokens have none in common: the log had null, as if nobody had looked. The next byte has no
    likeliest tokens, and no overlap."""
    sums = {'statistics': torch.tensor([2.0, 1.0, 4.0, 6.0, 0.0])}
    row = distill.objective_metrics(sums, {}, {'oprd': 0.0, 'opd': 1.0}, {}, 'full')
    assert row == {'loss': 0.0, 'opd/kl': 0.5, 'entropy/student': 2.0, 'entropy/teacher': 3.0, 'opd/overlap16': 0.0}
    assert 'opd/overlap16' not in distill.objective_metrics(sums, {}, {'oprd': 0.0, 'opd': 1.0}, {}, 'byte')


@pytest.mark.parametrize('schedule, end', [('cosine', 0.1), ('linear', 0.1), ('constant', 1.0)])
def test_schedule(schedule, end):
    """Rises to the peak, falls towards the end and never reaches it early; no step at rate 0."""
    lrs = [learning_rate(s, 100, 2.0, 0.1, schedule, 0.1) for s in range(1, 101)]
    assert lrs[:10] == pytest.approx([0.2 * s for s in range(1, 11)]) and max(lrs) == 2.0
    assert lrs[-1] == pytest.approx(2.0 * end, abs=0.03) and lrs[9:] == sorted(lrs[9:], reverse=True)
    if schedule == 'cosine':
        assert lrs[55] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert learning_rate(5, 5, 2.0, 0.0, schedule, 0.0) > 0 and learning_rate(1, 1, 2.0, 1.0, schedule, 0.0) == 2.0


# ---- output-space objectives --------------------------------------------------------------------

OPD = dict(oprd_weight=0, opd_weight=1, opd='full', diagnose_every=3)
HEADS = {'opd/kl', 'opd/overlap16', 'entropy/student', 'entropy/teacher'}


@pytest.mark.parametrize('opd', ['full', 'topk', 'sampled'])
def test_an_opd_run(toy_dir, tmp_path, opd):
    """Trains the head too; logs exact KL, entropies and overlap of all its positions in every step,
    and cosines, which it does not need, every diagnose_every steps and at both ends."""
    main(load_config(argv(toy_dir, tmp_path / 'r', **OPD | {'opd': opd}, opd_k=4, steps=5)))
    rows = log_of(tmp_path / 'r')[1:]
    assert_all_measured(tmp_path / 'r')
    assert all(HEADS | {'loss/opd', 'time/teacher', 'time/student', 'time/update'} <= row.keys() for row in rows)
    assert [row['step'] for row in rows if 'rep/cos' in row] == [1, 3, 5] and not any('loss/oprd' in row for row in rows)
    assert all(row['loss'] == row['loss/opd'] and row['opd/kl'] > 0 and 0 < row['opd/overlap16'] <= 1 for row in rows)
    if opd == 'full':
        assert [row['loss'] for row in rows] == pytest.approx([row['opd/kl'] for row in rows], rel=1e-6)
    before = load_model(folder_of(load_config(argv(toy_dir, 'x'))) / 'student')
    after = load_model(tmp_path / 'r/last')
    assert not torch.equal(before.head.weight, after.head.weight)
    assert read_json(tmp_path / 'r/results.json')['rep_cos'] == [rows[0]['rep/cos'], rows[-1]['rep/cos']]


def test_supervised_learning_on_the_answers_of_the_teacher(toy_dir, toy_cfg, tmp_path):
    """The control without the student's own answers: at the first step the loss is the cross-entropy of the naive sampler's
    greedy text of the teacher. Answers of the student, or the teacher's at another temperature, have another one."""
    keys = OPD | dict(opd='supervised', answers_by='teacher', temperature=0, positions='all', eval_data='', steps=2)
    main(load_config(argv(toy_dir, tmp_path / 'r', **keys)))
    row = log_of(tmp_path / 'r')[1]
    tok, teacher, student = load_tokenizer(toy_cfg['student']), load_model(toy_cfg['teacher']), load_model(toy_cfg['student'])
    train = load_problems(toy_cfg['data'], tok, show=False)
    prompts = [train[number].ids for number in prompt_order(len(train), 3, 1, 0)]
    text = naive(teacher, prompts, max_new_tokens=20, stop=tok.stop_ids, temperature=0.0, vocab=tok.size).answers()
    losses = []
    for prompt, answer in zip(prompts, text, strict=True):
        logits = student(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
    assert row['loss'] == pytest.approx(sum(losses) / 3, rel=1e-4) and row['len/mean'] == pytest.approx(sum(map(len, text)) / 3)
    own = naive(student, prompts, max_new_tokens=20, stop=tok.stop_ids, temperature=0.0, vocab=tok.size).answers()
    assert own != text                       # or the test could not tell them apart


def test_what_the_teacher_may_not_write_is_refused():
    """Text in another vocabulary; the student's own answers as their own model; a direction that nothing reads. Rewards
    for the teacher's tokens do not estimate KL(p || q), which is told."""
    cfg = load_config(['answers_by=teacher'])
    with pytest.raises(UserError, match="answers_by='teacher': the student cannot read"):
        check_objective(cfg, same=False)
    assert check_objective(cfg) == []
    for keys in (dict(answers_by='student'), dict(kl_direction='forward')):
        with pytest.raises(UserError, match='learns answers of others as they are'):
            check_objective(cfg | OPD | {'opd': 'supervised'} | keys)
    assert check_objective(cfg | OPD | {'opd': 'supervised'}) == []
    note, = check_objective(cfg | OPD | {'opd': 'sampled'})
    assert 'answers_by' in note and check_objective(cfg | OPD | {'opd': 'sampled', 'answers_by': 'student'}) == []


def test_an_oprd_run_looks_at_the_vocabulary_now_and_then(finished, toy_dir):
    """Head frozen, its outputs diagnosed at the first and the last step alone (diagnose_every=10 of 7)."""
    rows = log_of(finished)[1:]
    assert [row['step'] for row in rows if HEADS <= row.keys()] == [1, 7]
    assert all('rep/cos' in row and 'loss/opd' not in row and row['loss'] == row['loss/oprd'] for row in rows)
    before = load_model(folder_of(load_config(argv(toy_dir, 'x'))) / 'student')
    assert torch.equal(before.head.weight, load_model(finished / 'last').head.weight)


@pytest.mark.parametrize('rows', [10**6, 17])
@pytest.mark.parametrize('keys', [{}, OPD], ids=['hidden states', 'output space'])
def test_what_a_probe_logs_is_what_the_models_say(toy_dir, tmp_path, keys, rows):
    """KL, entropies and cosine of step 1, recomputed here from whole logits and states. What the objective leaves out is
    a mean over about `diagnose_rows` positions, and not a sum; what it trains on is a mean over all of them."""
    main(load_config(argv(toy_dir, tmp_path / 'r', steps=1, eval_data='', diagnose_rows=rows, **keys)))
    row = log_of(tmp_path / 'r')[1]
    cfg = load_config(argv(toy_dir, 'x', steps=1))
    folder = folder_of(cfg)
    student, teacher, tok = load_model(folder / 'student'), load_model(folder / 'teacher'), load_tokenizer(folder / 'student')
    train = load_problems(folder / 'train.jsonl', tok)
    order = prompt_order(len(train), 3, 1, 0)
    roll = distill.sample(student, [train[i].ids for i in order], 2, max_new_tokens=20, stop=tok.stop_ids, vocab=tok.size, step=1)
    m = distill.position_mask(roll, 'all')
    w = distill.position_weights(m)
    few = w * distill.diagnostic_mask(roll, m, 1, rows / int(m.sum()))
    assert 0 < few.sum() < 0.9 or rows > 100
    output, hidden = (w, few) if keys else (few, w)

    def mean(values, weights):
        return pytest.approx(((weights * values).sum() / weights.sum()).item(), rel=1e-4)
    p, q = (model(roll.ids).log_softmax(-1) for model in (student, teacher))
    assert row['opd/kl'] == mean((p.exp() * (p - q)).sum(-1), output)
    assert row['entropy/student'] == mean(-(p.exp() * p).sum(-1), output)
    assert row['entropy/teacher'] == mean(-(q.exp() * q).sum(-1), output)
    for l in (1, 2, 3):
        s, t = (model.hidden(roll.ids, [l])[0] for model in (student, teacher))
        assert row[f'rep/cos/{l}'] == mean(torch.cosine_similarity(s, t, dim=-1), hidden)


def test_scheduled_weights_resume_bit_for_bit(toy_dir, tmp_path, monkeypatch):
    """OPRD, then sampled OPD beside it: the head learns from the switch on; stopped and
    resumed across the switch, the run is the same."""
    keys = dict(steps=6, save_every=2, opd='sampled', opd_future=True, opd_baseline=True, eval_every=0,
                oprd_weight='[[0,1],[0.5,1],[0.5,0.1]]', opd_weight='[[0,0],[0.5,0],[0.5,1]]', positions='drift')
    main(load_config(argv(toy_dir, tmp_path / 'whole', **keys)))
    rows = log_of(tmp_path / 'whole')[1:]
    assert_all_measured(tmp_path / 'whole')
    assert [row['step'] for row in rows if 'loss/opd' in row] == [4, 5, 6]
    assert all(row['loss'] == pytest.approx(0.1 * row['loss/oprd'] + row['loss/opd'], rel=1e-5) for row in rows[3:])
    real, steps = distill.accumulate, []

    def interrupted(*a, **k):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*a, **k)
    monkeypatch.setattr(distill, 'accumulate', interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(load_config(argv(toy_dir, tmp_path / 'halves', **keys)))
    main(load_config(argv(toy_dir, tmp_path / 'halves', **keys)))
    assert timeless(log_of(tmp_path / 'halves')) == timeless(log_of(tmp_path / 'whole'))
    a, b = resume_state(tmp_path / 'halves'), resume_state(tmp_path / 'whole')
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_teacher_of_another_width_by_output_space(toy_dir, tmp_path, capsys):
    """Hidden states cannot be compared, distributions can; no cosines are logged, and the table does without."""
    wide = argv(toy_dir, 'x', toy_width=32, toy_student_steps=2, toy_teacher_steps=2)
    toy.prepare(load_config(wide), start('cpu'))
    keys = dict(OPD, teacher=folder_of(load_config(wide)) / 'teacher', steps=2)
    main(load_config(argv(toy_dir, tmp_path / 'r', **keys)))
    assert 'widths 24 and 32' in capsys.readouterr().out and 'rep/cos' not in log_of(tmp_path / 'r')[1]
    assert read_json(tmp_path / 'r/results.json')['rep_cos'] == []
    assert 'or set oprd_weight=0 opd_weight=1' in refused(capsys, argv(toy_dir, tmp_path / 's', **keys | {'oprd_weight': 1.0}))


def test_objectives_that_make_no_sense(toy_dir, tmp_path, capsys):
    def args(**keys):
        return argv(toy_dir, tmp_path / 'r', **OPD | keys)
    assert "use opd='full' or 'topk'" in refused(capsys, args(opd='sampled', kl_direction='forward'))
    assert "belongs to opd='sampled'" in refused(capsys, args(opd_future=True))
    assert 'is 0 whatever the models say' in refused(capsys, args(opd='topk', opd_k=1, opd_tail='renorm'))
    assert 'a reward is a reverse KL' in refused(capsys, args(opd='topk', kl_direction='forward'))
    assert 'choose one of mse, nmse, cosine' in refused(capsys, args(rep_loss='l1', oprd_weight=1.0))
    assert 'set it to 0' in refused(capsys, args(position_offset=1, positions='drift', oprd_weight=1.0))
    assert 'step 1: oprd_weight, opd_weight, reward_weight, attention_weight are all 0' in refused(capsys, args(opd_weight=0))
    assert 'step 3: oprd_weight, opd_weight, reward_weight, attention_weight are all 0' in refused(capsys, args(opd_weight='[[0,1],[0.5,0]]'))
    assert 'give knots' in refused(capsys, args(opd_weight='[[0,1],[2,0]]'))
    assert 'give knots' in refused(capsys, args(opd_weight='[0,1]'))
    assert 'out of range' in refused(capsys, args(opd_weight=-1))
    main(load_config([*args(opd='sampled', temperature=0.5), '--dry-run']))
    out = capsys.readouterr().out
    assert 'Eq. (3) is biased' in out and 'memory of a rank by phase' in out


# ---- bad input: one line, exit code 2, nothing half-written ------------------------------------

def refused(capsys, args):
    """Run as a script would -> the one line on stderr."""
    with pytest.raises(SystemExit) as e:
        run(main, lambda: load_config(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
    return err


def test_folders_and_files_that_are_not_there(toy_dir, tmp_path, capsys):
    def args(**keys):
        return argv(toy_dir, tmp_path / 'r', **keys)
    assert 'student=' in refused(capsys, args(student=''))
    assert 'no such file or folder' in refused(capsys, args(student=tmp_path / 'none'))
    assert 'no such file or folder' in refused(capsys, args(teacher='a/b/c'))
    assert "'none.jsonl': no such file or folder" in refused(capsys, args(data='none.jsonl'))
    assert 'no .parquet, .arrow, .jsonl, .json, .csv, .tsv file in it for test' in refused(capsys, args(eval_data=tmp_path))
    assert 'problems come as' in refused(capsys, args(data=ROOT / 'README.md'))
    (tmp_path / 'q.txt').write_text('1+1')
    assert '1 of 1 problems have no answer' in refused(capsys, args(eval_data=tmp_path / 'q.txt'))
    (tmp_path / 'q.txt').unlink()
    assert 'lower max_new_tokens' in refused(capsys, args(max_new_tokens=10_000))
    assert 'lower eval_max_new_tokens' in refused(capsys, args(eval_max_new_tokens=10_000))
    assert 'the student has 3' in refused(capsys, args(layers=[7]))
    assert 'choose others' in refused(capsys, [*args(toy_layers=1, toy_student_steps=1, toy_teacher_steps=1),
                                               'layers=even'])
    assert 'toy_width=25' in refused(capsys, args(toy_width=25))


def test_an_output_folder_that_cannot_be_written(toy_dir, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert 'file' in refused(capsys, argv(toy_dir, tmp_path / 'file' / 'run'))
    assert 'file' in refused(capsys, argv(toy_dir, tmp_path / 'file'))
    assert (tmp_path / 'file').read_text() == '' and os.listdir(tmp_path) == ['file']


def test_resuming_something_else(finished, toy_dir, capsys, tmp_path):
    assert 'n=2, now 3' in refused(capsys, argv(toy_dir, finished, steps=7, n=3))
    (finished / 'config.json').rename(tmp_path / 'c')
    try:
        (finished / 'config.json').write_text('{"config"')
        assert 'config.json: not valid JSON' in refused(capsys, argv(toy_dir, finished, steps=7))
        (finished / 'config.json').unlink()
        assert 'and no run (no config.json)' in refused(capsys, argv(toy_dir, finished, steps=7))
    finally:
        (tmp_path / 'c').rename(finished / 'config.json')


def test_a_finished_run_goes_on_with_more_steps(toy_dir, tmp_path, capsys):
    """And with another rate, another number of answers to evaluate: what has changed is printed, and is a part of the log
    from the step on from which it holds. Fewer steps than were taken are an error."""
    out = tmp_path / 'r'
    main(load_config(argv(toy_dir, out, steps=3)))
    capsys.readouterr()
    main(load_config(argv(toy_dir, out, steps=5, lr=1e-3, eval_n=3, save_every=4)))
    printed = capsys.readouterr().out
    assert 'from step 4 on: lr=0.001, before 0.002' in printed and 'from step 4 on: steps=5, before 3' in printed
    rows = log_of(out)
    assert [row['step'] for row in rows] == list(range(6))
    assert [row['step'] for row in rows if 'changed' in row] == [4]
    assert rows[4]['changed'] == 'steps=5 (before 3), lr=0.001 (before 0.002), eval_n=3 (before 2), save_every=4 (before 2)'
    assert rows[4]['lr'] == learning_rate(4, 5, 1e-3, 0.03, 'cosine', 0.0)
    results = read_json(out / 'results.json')
    assert results['steps'] == 5 and set(results['distilled']) == {'avg@3', 'best@3', 'len'}
    main(load_config(argv(toy_dir, out, steps=3)))
    assert 'finished at step 5' in capsys.readouterr().out
    (out / 'results.json').unlink()
    assert 'has taken 5 steps already; raise steps=' in refused(capsys, argv(toy_dir, out, steps=3))


def test_a_run_without_a_checkpoint_begins_again_with_what_has_changed(toy_dir, tmp_path, monkeypatch, capsys):
    """A run died before its first checkpoint, and was started with another rate. Its config.json kept the first rate, its log
    told no change, and W&B kept the rows of the first rate, because those of the second one have the same steps."""
    out = tmp_path / 'r'
    monkeypatch.setattr(distill, 'stop_or_save', lambda *a: 1 / 0)       # it dies in step 1
    with pytest.raises(ZeroDivisionError):
        main(load_config(argv(toy_dir, out, steps=3)))
    assert [row['step'] for row in log_of(out)] == [0, 1] and not list(out.glob('ckpt-*'))
    monkeypatch.undo()
    capsys.readouterr()
    main(load_config(argv(toy_dir, out, steps=3, lr=1e-3)))
    assert 'from step 1 on: lr=0.001, before 0.002' in capsys.readouterr().out
    rows = log_of(out)
    assert [row['step'] for row in rows] == [0, 1, 2, 3] and rows[1]['changed'] == 'lr=0.001 (before 0.002)'
    assert [row['step'] for row in rows if 'changed' in row] == [1] and read_json(out / 'config.json')['config']['lr'] == 1e-3


def test_the_best_evaluation_is_saved_where_nothing_else_is(toy_dir, tmp_path, monkeypatch):
    """save_every and eval_every need not meet."""
    scores = iter([{'avg@2': score, 'best@2': score, 'len': 1.0} for score in (1.0, 2.0, 10.0, 90.0, 50.0)])
    monkeypatch.setattr(distill, 'evaluate_model', lambda *a: next(scores))
    out = tmp_path / 'r'
    main(load_config(argv(toy_dir, out, steps=3, eval_every=1, save_every=100, keep=1)))
    assert (out / 'best').resolve() == out / 'ckpt-000002/model'
    assert sorted(path.name for path in out.glob('ckpt-*')) == ['ckpt-000002', 'ckpt-000003']


def test_a_damaged_log_does_not_matter(finished, toy_dir, tmp_path, monkeypatch):
    """It lies with the checkpoint: a log that was cut at its end made a whole checkpoint useless."""
    out = tmp_path / 'r'
    shutil.copytree(finished, out, symlinks=True)
    (out / 'results.json').unlink()
    for content in ('', '{"step": 0}\n{"step": 0}\n', '{"st'):
        (out / 'log.jsonl').write_text(content)
        main(load_config(argv(toy_dir, out, steps=7)))
        assert log_of(out) == log_of(finished)
        (out / 'results.json').unlink()


@pytest.mark.parametrize('what', ['loss', 'gradient'])
@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_divergence_is_an_error_and_not_saved(what, value, toy_dir, tmp_path, capsys, monkeypatch):
    """Guards against a look at the loss alone, or for nan alone: clipping turns one infinite number of a gradient into
    nan everywhere, and a checkpoint of that step would replace the last good one."""
    real = distill.accumulate

    def diverging(student, *a, **k):
        sums = real(student, *a, **k)
        if what == 'loss':
            return {name: total * float(value) for name, total in sums.items()}
        student.norm.weight.grad.fill_(float(value))
        return sums
    monkeypatch.setattr(distill, 'accumulate', diverging)
    assert 'lower lr=' in refused(capsys, argv(toy_dir, tmp_path / 'r', save_every=1, eval_data=''))
    assert not (tmp_path / 'r/last').exists() and [row['step'] for row in log_of(tmp_path / 'r')] == [0]


def test_no_room_for_a_checkpoint(toy_dir, tmp_path):
    """A disk that fills up while saving: one line, exit 2, and the earlier checkpoint still there."""
    code = ('import distill, resource, signal, sys\nfrom configs import load_config\nfrom support.runtime import run\n'
            'real = distill.accumulate\nn = []\n'
            'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
            'def filling(*a, **k):\n    n.append(1)\n'
            '    if len(n) == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n'
            '    return real(*a, **k)\n'
            'distill.accumulate = filling\nrun(distill.main, load_config)')
    p = subprocess.run([sys.executable, '-c', code, *argv(toy_dir, tmp_path / 'r')], cwd=ROOT,
                       capture_output=True, text=True)
    assert p.returncode == 2 and p.stderr.startswith('error: ') and p.stderr.count('\n') == 1, p.stderr
    assert (tmp_path / 'r/last').resolve().parent.name == 'ckpt-000002'
    assert sorted(f.name for f in (tmp_path / 'r').iterdir()) == ['.lock', 'answers', 'best', 'ckpt-000002', 'config.json',
                                                                  'curve.png', 'last', 'log.jsonl', 'starts.jsonl']
    assert f'note: {tmp_path}/r/curve.png could not be drawn (OSError: ' in p.stdout, 'a figure must not end a run'
    load_model(tmp_path / 'r/last')


def test_as_a_process():
    """The real thing: exit code 2, one line, no traceback, and --help works."""
    p = subprocess.run([sys.executable, 'distill.py', 'configs/toy.py', 'stepz=3'], cwd=ROOT, capture_output=True, text=True)
    assert (p.returncode, p.stdout) == (2, '') and p.stderr == (
        "error: command line: unknown key 'stepz'; did you mean 'steps'?\n")
    p = subprocess.run([sys.executable, ROOT / 'distill.py', '--help'], cwd='/', capture_output=True, text=True)
    assert p.returncode == 0 and 'token_budget=' in p.stdout




def test_memory_of_the_update_on_cuda(monkeypatch):
    """delta-peak: the highest during the update minus what stood there when it began; the step's own peak
    may lie in the rollout. The allocator is played by numbers."""
    peaks, now = iter([9e9, 7e9]), 2.5e9
    for name, value in (('synchronize', lambda: None), ('reset_peak_memory_stats', lambda: None),
                        ('max_memory_allocated', lambda: next(peaks)), ('memory_allocated', lambda: now)):
        monkeypatch.setattr(torch.cuda, name, value)
    real = torch.tensor
    monkeypatch.setattr(torch, 'tensor', lambda x, device=None: real(x))
    clock = Clock(torch.device('cuda'))
    clock.start()
    clock.update_begins()
    got = clock.stop()
    assert got['mem/peak'] == pytest.approx(9.0) and got['mem/update_dpeak'] == pytest.approx(4.5)


def test_the_day_of_the_first_start_holds(toy_dir, tmp_path, monkeypatch):
    """A template that prints the date had other prompts after midnight, so a resumed run was another one."""
    student = tmp_path / 'student'
    shutil.copytree(folder_of(load_config(argv(toy_dir, 'x'))) / 'student', student)
    template = (student / 'chat_template.jinja').read_text()
    (student / 'chat_template.jinja').write_text("{{ strftime_now('%d')[0] }}+" + template)
    args = argv(toy_dir, tmp_path / 'r', student=student, steps=2, eval_data='')

    class Midnight(datetime.date):
        today = classmethod(lambda cls: cls(2031, 1, now[0]))
    now = [9]
    monkeypatch.setattr(runtime, 'date', Midnight)
    main(load_config(args))
    assert read_json(tmp_path / 'r/config.json')['config']['date'] == '2031-01-09'
    now[0] = 30
    main(load_config([*args, 'steps=3']))
    assert read_json(tmp_path / 'r/config.json')['config']['date'] == '2031-01-09'


@pytest.mark.parametrize('content', ['{}', '[]', '{"steps": 7}', 'flip'])
def test_results_that_do_not_agree_with_the_log(finished, toy_dir, tmp_path, capsys, content):
    """They were shown as they were, or ended in a KeyError. Deleted, they are made again."""
    out = tmp_path / 'r'
    shutil.copytree(finished, out, symlinks=True)
    before = read_json(out / 'results.json')
    if content == 'flip':
        content = json.dumps(before | {'teacher': before['teacher'] | {'avg@2': 99.5}})
    (out / 'results.json').write_text(content)
    assert 'results.json: ' in refused(capsys, argv(toy_dir, out, steps=7))
    (out / 'results.json').unlink()
    main(load_config(argv(toy_dir, out, steps=7)))
    assert read_json(out / 'results.json') == before
