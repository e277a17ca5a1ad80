"""
What a bridge and text pairing cost: the two measurements of studies/bench.py that are no table of lines.

    python -m studies.bench bridge                the toy's bridge in closed form beside 20 epochs of AdamW
    python -m studies.bench pair --tokenizers A B --data problems.parquet

Simpler than usual: the bridge is fitted by its own command, in a process. What is not here: peak memory.
"""
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from cross_tokenizer.pairing import pair_text
from formats.problems import load_problems
from formats.tokenizer import load_tokenizer, same_vocabulary
from studies.children import log_text, run_logged, show_failure
from studies.measure import MB, machine
from support.runtime import UserError

# ---- pair: the student's answers in the teacher's tokens -------------------------------------------

def pairing(args, env):
    """Cut the questions of a problem set as the student would, pair them with the teacher's tokens."""
    if not (args.tokenizers and args.data):
        raise UserError('pair: give --tokenizers STUDENT TEACHER and --data PROBLEMS')
    tok_s, tok_t = (load_tokenizer(path) for path in args.tokenizers)
    texts = [p.question for p in load_problems(args.data, tok_s, args.rows)]
    texts = [t if isinstance(t, str) else ''.join(m['content'] for m in t) for t in texts]
    answers = [tok_s.encode(t, special=False) for t in texts]
    size = sum(len(tok_s.pieces[i]) for answer in answers for i in answer)
    same, seconds = same_vocabulary(tok_s, tok_t), []
    for _ in range(args.repeat):
        began = time.perf_counter()
        inside = [pair_text(answer, tok_s, [0], tok_t, same=same)[2] for answer in answers]
        seconds.append(time.perf_counter() - began)
    count = sum(map(len, inside))
    align = 1 - sum(int(x.sum()) for x in inside) / count
    rate = size / MB / statistics.median(seconds)
    print(f'pair: {len(answers)} texts, {size / MB:.2f} MB, {count} positions, {align:.3f} of them exact; '
          f'{rate:.2f} MB/s on one core; {machine(env)}')
    return {'texts': len(answers), 'bytes': size, 'align': align, 'mb_per_s': rate}


# ---- bridge: one pass beside Algorithm 1 -----------------------------------------------------------

def fits(args, env):
    """Stage 1 of the toy in closed form and as Algorithm 1 does it, on the same answers."""
    made, keys = {}, [f'bridge_prompts={args.rows}', f'device={args.device}', *args.keys]
    print(f'bridge: configs/toy_bridge.py, {args.rows} prompts; {machine(env)}')
    with tempfile.TemporaryDirectory() as tmp:
        for fit in ('ridge', 'adamw'):
            out = Path(tmp) / fit
            if fit == 'adamw':
                out.mkdir()
                shutil.copy(Path(tmp) / 'ridge/rollouts.jsonl', out)
            log = Path(tmp) / f'{fit}.log'
            command = ['bridge.py', 'configs/toy_bridge.py', f'bridge={out}', f'bridge_fit={fit}', *keys]
            if run_logged(command, log) != 0:
                raise UserError(show_failure('bridge.py', log_text(log)))
            made[fit] = json.loads((out / 'bridge.json').read_text())
    got, ranks = {}, list(made['ridge']['layers']['1']['cos'])
    for fit, m in made.items():
        cos = {r: statistics.fmean(v['cos'][r] for v in m['layers'].values()) for r in ranks}
        got[fit] = {'forwards': m['forwards per answer'], 'seconds': m['seconds'], 'cos': cos}
    print(f'{"":8}{"forwards":>9}{"seconds":>9}' + ''.join(f'{"r=" + r:>7}' for r in ranks))
    for fit, m in got.items():
        cells = ''.join(f'{x:7.3f}' for x in m['cos'].values())
        print(f'{fit:8}{m["forwards"]:9.0f}{m["seconds"]:9.1f}{cells}')
    more, longer = (got['adamw'][k] / got['ridge'][k] for k in ('forwards', 'seconds'))
    print(f'AdamW: {more:.0f}x the forwards, {longer:.0f}x the seconds; both fits give every rank at once')
    return got
