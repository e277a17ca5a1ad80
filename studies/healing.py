"""
Which objective heals a damaged model best? A study, from the intact model to tables and figures.

    python -m studies.healing heal_study          configs/heal_study.py: two CPU cores
    python -m studies.healing heal_study_gpu      the same study, larger, on one GPU
    python -m studies.healing my/study.py         any file with the variables of configs/heal_study.py

In time order:
1. Damaged copies of the model (studies/damage.py). Each is a student; the intact model is the teacher.
2. A search for the learning rate of each method: short runs with three rates on a seed of their own,
   judged on questions of the training set.
3. The runs: every method, kind of damage and seed.
4. How near each student is to the teacher on held-out questions (studies/agreement.py).
5. What a step costs: a few steps of each method, alone on the machine.
6. report.md, curves.png and layers.png in out/<study> (studies/healing_report.py).

The same command again goes on where it stopped. A run keeps its weights. The state of its optimizer, three
times as large, is deleted when it has ended, so it cannot be given more steps.

Simpler than usual: the learning rate is the only setting that is searched. The best of three is taken also
where it is the largest or the smallest of them; the report says where.
"""
import os
import shutil
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from formats.hub import snapshot
from studies import agreement
from studies.compare import is_finished, launch, slug
from studies.damage import damage, settings
from studies.figures import read_log
from studies.healing_report import write_report
from studies.peaks import measured as peak_of_run
from support.command_help import command_words
from support.fields import Field, check_fields
from support.files import read_json, whole, write_json
from support.provenance import code_notes, weights_digest
from support.runtime import ROOT, UserError, print0, run, run_file, shown, start

# The variables of a study's file; configs/heal_study.py says what they are.
WORDS = Field(list, items=Field(str))
STUDY = {
    'model': Field(str, 1), 'damages': Field(dict, 1, items=WORDS), 'size': WORDS,
    'methods': Field(dict, 1, items=WORDS), 'reference': Field(str),
    'rates': Field(dict, items=Field(list, 1, items=Field(float, 0, 10), other=Field(str))),
    'rates_of': Field(dict, items=Field(str)), 'search_seed': Field(int), 'search_size': WORDS,
    'seeds': Field(dict, items=Field(list, 1, items=Field(int))),
    'left_out': Field(dict, items=WORDS, default={}),
    'prompts': Field(int, 2), 'search_prompts': Field(int, 2), 'tokens': Field(int, 1),
}
ADVICE = 'see configs/heal_study.py'
QUESTIONS = ROOT / 'studies/heal'
COST_STEPS = 4                  # the first of them, which allocates memory, is not counted


# ---- the study's file ----------------------------------------------------------------------------

def read_study(name):
    """A study's path, or its name in configs/ -> its variables, and `out`, the folder of all that is made.

    A UserError says what is wrong with it.
    """
    for file in (Path(name), ROOT / 'configs' / f'{name}.py'):
        if file.is_file():
            plan = check_fields(run_file(file, name, 'study'), STUDY, file, ADVICE)
            check_names(file, plan)
            return SimpleNamespace(**plan, out=Path('out') / file.stem)
    raise UserError(f'{shown(name)}: no such file, and no such name in configs/; {ADVICE}')


def check_names(file, plan):
    """UserError unless each kind of damage and each method is in every table, and no table names others."""
    kinds = plan['damages']
    methods = plan['methods']
    for variable, names in (('seeds', kinds), ('rates_of', kinds), ('rates', methods)):
        missing = [name for name in names if name not in plan[variable]]
        if missing:
            raise UserError(f'{file}: {variable} lacks {shown(missing[0])}; add it')

    same_rates = [rates for rates in plan['rates'].values() if isinstance(rates, str)]
    left_out = [name for names in plan['left_out'].values() for name in names]
    used = [('reference', [plan['reference']], methods), ('rates', same_rates, methods),
            ('rates_of', plan['rates_of'].values(), kinds), ('left_out', left_out, methods)]
    for variable, names, known in used:
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f'{file}: {variable} names {shown(unknown[0])}, which the file does not define')


def methods_of(study, kind):
    """The names of the methods that are compared on one kind of damage."""
    return [name for name in study.methods if name not in study.left_out.get(kind, [])]


def student_of(study, kind):
    """The folder of the damaged model."""
    return f'{study.model}-{kind}'


def folders_of(study, kind, method):
    """The run folders of a method, one for each seed."""
    return [study.out / kind / f'{slug(method)}-s{seed}' for seed in study.seeds[kind]]


def command(study, kind, method, rate, folder, *more):
    """The command line of a run. `more` may change the size, and the method has the last word."""
    models = [f'student={student_of(study, kind)}', f'teacher={study.model}']
    return [*study.size, *models, *more, *study.methods[method], f'lr={rate:g}', f'out_dir={folder}']


# ---- 1. damaged copies ---------------------------------------------------------------------------

def make_students(study):
    """Make the damaged copies that are missing."""
    for kind, words in study.damages.items():
        folder = student_of(study, kind)
        source, out, options = settings([study.model, folder, *words])
        if not Path(folder).exists():
            damage(source, out, options)
            print0(f'{folder}: {source} with {" ".join(words)}')
            continue

        # What is there must be this damage of this model.
        made = read_json(Path(folder) / 'damage.json')
        digest = weights_digest(snapshot(source, weights=True))
        if made.get('damage') != options or made.get('model_digest') != digest:
            raise UserError(f'{folder}: is not {source} with {" ".join(words)}; delete the folder to make '
                            'it anew')


# ---- 2. learning rates ---------------------------------------------------------------------------

def search(study, kind):
    """Try the learning rates on one kind of damage -> {method: {rate: distance to the teacher}}.

    The distance is the sum of the KL on the teacher's text and of that on own samples. A method that takes
    the rate of another one is not in it.
    """
    out = study.out / kind / 'search'
    folders = {}                             # {(method, rate): folder}
    jobs = {}
    for method in methods_of(study, kind):
        if isinstance(study.rates[method], str):
            continue
        for rate in study.rates[method]:
            folder = out / f'{slug(method)}-lr{rate:g}-s{study.search_seed}'
            folders[method, rate] = folder
            jobs[folder] = [*command(study, kind, method, rate, folder, *study.search_size),
                            f'seed={study.search_seed}']
    make(jobs)

    # Held-out questions stay unseen.
    found = measure_students(study, folders.values(), out / 'measured', 'train', study.search_prompts)
    distances = {}
    for (method, rate), folder in folders.items():
        scores = found[str(folder)]['scores']
        distance = scores['teacher_text']['kl'][0] + scores['own_samples']['kl'][0]
        distances.setdefault(method, {})[rate] = distance
    return distances


def best_rates(study, kind, distances):
    """The best rate of each method for one kind of damage. distances: what `search` returns, by damage."""
    searched = distances[study.rates_of[kind]]
    best = {}
    for method in methods_of(study, kind):
        rates = study.rates[method]
        by_rate = searched[rates if isinstance(rates, str) else method]
        best[method] = min(by_rate, key=by_rate.get)
    return best


def delete_resume_state(folder):
    """Delete what only a resumed run needs."""
    for state in folder.glob('ckpt-*/resume'):
        shutil.rmtree(state)


# ---- 3. the runs ---------------------------------------------------------------------------------

def run_methods(study, kind, best):
    """Make the runs of one kind of damage that are missing. best: {method: rate}."""
    jobs = {}
    for method, rate in best.items():
        for seed, folder in zip(study.seeds[kind], folders_of(study, kind, method), strict=True):
            jobs[folder] = [*command(study, kind, method, rate, folder), f'seed={seed}']
    make(jobs)


def make(jobs):
    """Make the runs that are missing: {folder: command line}."""
    missing = {folder: words for folder, words in jobs.items() if not is_finished(folder, words)}
    if missing:
        launch('distill.py', missing, delete_resume_state)


# ---- 4. how near is each student -----------------------------------------------------------------

def measure_students(study, models, out, questions, count):
    """studies/agreement.py for models and run folders, where it is missing -> {model: what it found}.

    questions: 'train' or 'test'; the first `count` of that file are asked. What is found is written into
    the folder `out`, a file for each model, with the sums of every question.
    """
    wanted = {'questions': questions, 'count': count, 'tokens': study.tokens}
    files = {str(model): out / f'{Path(model).name}.json' for model in models}
    missing = [model for model, file in files.items() if not is_measured(file, wanted, model)]
    if missing:
        prompts = out / 'prompts.jsonl'
        lines = (QUESTIONS / f'{questions}.jsonl').read_text().splitlines()
        with whole(prompts) as temporary:
            temporary.write_text('\n'.join(lines[:count]) + '\n')

        # One model after the other, with all cores. The teacher writes its text once.
        words = [study.model, *map(weights_of, missing), '--prompts', str(prompts), '--exact', '',
                 '--tokens', str(study.tokens), '--dtype', 'float32']
        args = agreement.parsed(words)
        env = start(args.device, args.dtype)
        task = agreement.read_task(args, env)
        for model in missing:
            print0(f'measuring {model}')
            found = agreement.measure(task, weights_of(model), args, env)
            examples = agreement.examples_of(task, [found])
            write_json(files[model], found | {'settings': wanted, 'examples': examples})
    return {model: read_json(file) for model, file in files.items()}


def is_measured(file, wanted, model):
    """Does a file say how near this model is, with these weights and these questions?"""
    if not file.exists():
        return False
    found = read_json(file)
    digest = weights_digest(snapshot(weights_of(model)))
    return found.get('settings') == wanted and found.get('digest') == digest


def weights_of(model):
    """A model, or the folder of a run -> where its weights are."""
    last = Path(model) / 'last'
    return str(last if last.exists() else model)


# ---- 5. what a step costs ------------------------------------------------------------------------

def costs(study, kind, best):
    """A few steps of each method, one method at a time -> {method: what `cost` returns}."""
    found = {}
    for method, rate in best.items():
        folder = study.out / kind / 'cost' / slug(method)
        file = folder / 'cost.json'
        if not file.exists():
            print0(f'what a step costs: {method}')
            more = ['eval_data=', f'steps={COST_STEPS}']
            write_json(file, cost(command(study, kind, method, rate, folder, *more), folder))
        found[method] = read_json(file)
    return found


def cost(arguments, folder):
    """Run distill.py for a few steps -> {'sample', 'update': median seconds of a step, 'peak': GB}.

    update: teacher, student and optimizer. peak: on a GPU what was allocated there; on a CPU the private
    memory of the process during its steps, or 0 where the system does not tell it.
    """
    shutil.rmtree(folder, ignore_errors=True)            # of a run that was interrupted
    most = peak_of_run([ROOT / 'distill.py', *arguments], 1, folder, dict(os.environ), cwd='.')
    delete_resume_state(folder)
    rows = [row for row in read_log(folder) if row['step'] > 1]
    samples = [row['time/sample'] for row in rows]
    updates = [row['time/teacher'] + row['time/student'] + row['time/update'] for row in rows]
    peak = rows[-1].get('mem/peak') or most['step'] / 1e9
    return {'sample': median(samples), 'update': median(updates), 'peak': peak}


# ---- the script ----------------------------------------------------------------------------------

def heal(study):
    """Everything, in time order."""
    make_students(study)
    distances = {}                           # {damage: {method: {rate: distance}}}
    for kind in dict.fromkeys(study.rates_of.values()):
        distances[kind] = search(study, kind)

    best = {}                                # {damage: {method: rate}}
    results = {}                             # {damage: {'damaged', 'intact', method: [of each seed]}}
    for kind in study.damages:
        best[kind] = best_rates(study, kind, distances)
        run_methods(study, kind, best[kind])
        results[kind] = read_results(study, kind, best[kind])

    # Runs by different code should not be compared without knowing it.
    first = next(iter(study.damages))
    folders = [folder for kind in best for method in best[kind] for folder in folders_of(study, kind, method)]
    write_report(study, distances, best, results, costs(study, first, best[first]), code_notes(folders))


def read_results(study, kind, best):
    """All that the report needs of one kind of damage -> {name: [(what agreement found, rows of the log)]}, a
    pair for each seed. 'damaged' and 'intact' have one, whose rows are those of a run before its first step.
    """
    student = student_of(study, kind)
    folders = {method: folders_of(study, kind, method) for method in best}
    models = [student, study.model]
    for of_method in folders.values():
        models += of_method
    found = measure_students(study, models, study.out / kind / 'measured', 'test', study.prompts)

    results = {}
    for method, of_method in folders.items():
        results[method] = [(found[str(folder)], read_log(folder)) for folder in of_method]
    before = results[study.reference][0][1][:1]
    return {'damaged': [(found[student], before)], 'intact': [(found[study.model], [])], **results}


def main(words):
    if len(words) != 1 or words[0].startswith('-'):
        raise UserError('give one study: python -m studies.healing heal_study')
    heal(read_study(words[0]))


if __name__ == '__main__':
    run(main, lambda: command_words('studies/healing.py'))
